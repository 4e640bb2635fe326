"""The log-ratio of two Gaussians under a third, its moment generating function, and a contour to integrate it along.

The formulas and their reasons are at the head of `contour`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...quadrature import table

__all__ = [
    "Ordered",
    "Quadratic",
    "Rule",
    "WhitenedPair",
    "blocks",
    "by_blocks",
    "contour",
    "crossing_sensitivity",
    "diagonal_quadratic",
    "full_quadratic",
    "integrand",
    "log_moment",
    "log_odds",
    "log_ratio",
]

# Nodes of the trapezoid rule, a multiple of 2 (every other one gives the error). Measured: half of them leave up to
# 1e-9 (1 + KL), where p is 1e8 times wider in one direction or more, and 1e-15 on a line; an error of r becomes r^2.
NODES = 160
# The integrand is cut off where it has lost exp(-42) = 6e-19 of its peak.
LOST = 42.0
# |1/sin(pi s)| at this height is exp(-44), whatever the parameters.
HEIGHT = 14.0
# Directions that the contour may bend to, as angles from the vertical.
BENDS = (0.0, -0.35, 0.35, -0.7, 0.7)
TRIALS = 30
LADDER = tuple(j / TRIALS for j in range(TRIALS + 1))
RISE = tuple(j / 12 for j in range(13))
# Trial crossings of the real axis, as shares of the strip: quarters and halves of what is left to either end.
SHARES = (*(0.25**j for j in range(46, 0, -1)), 0.5, *(1 - 0.5**j for j in range(2, 12)))
REFINED = 40
# A stationary point of the log-ratio within this many standard deviations of p becomes the origin of z.
REACH = 6.0
# Elements (rows x nodes x dimensions) handled at once, so that float64 temporaries stay in a core's cache.
BLOCK = 2**17


class Quadratic(NamedTuple):
    """The log-ratio y(z) = level + slope'(z - origin) - 1/2 (z - origin)' diag(curvature) (z - origin), z ~ N(0, I).

    ``level`` is [B]; ``curvature``, ``slope`` and ``origin`` are [B, D].
    """

    level: Tensor
    curvature: Tensor
    slope: Tensor
    origin: Tensor


class WhitenedPair(NamedTuple):
    """The basis of z and the two components in it.

    For a diagonal covariance ``maps`` is s_p/s_j, [B, 2, D]; for a full one L_j^-1 L_p V, [B, 2, D, D], and
    ``vectors`` is V. ``centres`` is the whitened residual L_j^-1 (x0 - mu_j) at the origin, [B, 2, D].
    """

    vectors: Tensor
    maps: Tensor
    centres: Tensor


class Ordered(NamedTuple):
    """Flattened rows: log-weights [B, 2], p's mean and scale, means and scales of the two components."""

    log_weights: Tensor
    p_loc: Tensor
    p_scale: Tensor
    loc: Tensor
    scale: Tensor


class Rule(NamedTuple):
    """Nodes s and weights such that the integral is Re(sum of weight * integrand / i); each part [B, n]."""

    real: Tensor
    imag: Tensor
    weight_real: Tensor
    weight_imag: Tensor


# --------------------------------------------------------------------------- from parameters to the quadratic


def log_odds(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """The constant c = log(v2/v1), 0 beside a zero weight, and whether there is one."""
    first, second = log_weights.unbind(-1)
    dead = torch.isneginf(first) | torch.isneginf(second)
    return torch.where(dead, 0.0, second) - torch.where(dead, 0.0, first), dead


def log_ratio(a: Tensor, b: Tensor) -> Tensor:
    """log(a/b); the difference of logarithms only where the quotient leaves the normal range."""
    r = a / b
    usable = (r > 1e-300) & (r < 1e300)
    return torch.where(usable, torch.log(torch.where(usable, r, 1.0)), a.log() - b.log())


def _origin(curvature: Tensor, slope: Tensor) -> Tensor:
    """Where the log-ratio is stationary in each direction, if p can be there."""
    flat = curvature == 0
    point = slope / torch.where(flat, 1.0, curvature)
    origin: Tensor = torch.where(flat, 0.0, point).clamp(-REACH, REACH).detach()
    return origin


def diagonal_quadratic(rows: Ordered) -> tuple[Quadratic, WhitenedPair]:
    """For diagonal covariances: elementwise."""
    c, _ = log_odds(rows.log_weights)
    s1, s2 = rows.scale.unbind(-2)
    shift = rows.p_loc.unsqueeze(-2) - rows.loc
    maps = rows.p_scale.unsqueeze(-2) / rows.scale
    a1, a2 = maps.unbind(-2)
    curvature = (rows.p_scale / s2) * ((s1 - s2) / s1) * (a1 + a2)
    m1, m2 = (shift / rows.scale).unbind(-2)
    origin = _origin(curvature.detach(), (a1 * m1 - a2 * m2).detach())
    centres = (shift + (rows.p_scale * origin).unsqueeze(-2)) / rows.scale
    m1, m2 = centres.unbind(-2)
    level = c + (log_ratio(s1, s2) + 0.5 * (m1 - m2) * (m1 + m2)).sum(-1)
    return Quadratic(level, curvature, a1 * m1 - a2 * m2, origin), WhitenedPair(origin, maps, centres)


def full_quadratic(rows: Ordered) -> tuple[Quadratic, WhitenedPair]:
    """For full covariances: one eigendecomposition."""
    c, _ = log_odds(rows.log_weights)
    shift = (rows.p_loc.unsqueeze(-2) - rows.loc).unsqueeze(-1)
    factor = rows.p_scale.unsqueeze(-3).expand_as(rows.scale)
    solved = torch.linalg.solve_triangular(rows.scale, torch.cat([factor, shift], -1), upper=False)
    a1, a2 = solved[..., :-1].unbind(-3)
    # A2'A2 - A1'A1 as a product of the difference: exactly 0 for equal components
    product = (a2 - a1).mT @ (a1 + a2)
    curvature, vectors = torch.linalg.eigh(0.5 * (product + product.mT))
    maps = solved[..., :-1] @ vectors.unsqueeze(-3)
    centres = solved[..., -1]

    def slope_at(centres: Tensor) -> Tensor:
        pulled: Tensor = (maps.mT @ centres.unsqueeze(-1)).squeeze(-1)
        return pulled[..., 0, :] - pulled[..., 1, :]

    origin = _origin(curvature, slope_at(centres))
    centres = centres + (maps @ origin.unsqueeze(-1).unsqueeze(-3)).squeeze(-1)
    m1, m2 = centres.unbind(-2)
    d1, d2 = rows.scale.diagonal(dim1=-2, dim2=-1).unbind(-2)
    level = c + (log_ratio(d1, d2) + 0.5 * (m1 - m2) * (m1 + m2)).sum(-1)
    return Quadratic(level, curvature, slope_at(centres), origin), WhitenedPair(vectors, maps, centres)


# ------------------------------------------------------------------------------- the moment generating function


def blocks(rows: int, nodes: int, dim: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of rows and nodes; a single one while tracing, where a fused kernel needs no temporaries."""
    if torch.compiler.is_compiling() or rows == 0:
        yield slice(None), slice(None)
        return
    width = max(1, min(nodes, BLOCK // dim))
    step = max(1, BLOCK // (width * dim))
    for row in range(0, rows, step):
        for node in range(0, nodes, width):
            yield slice(row, row + step), slice(node, node + width)


def by_blocks(
    f: Callable[..., tuple[Tensor, ...]], quadratic: Quadratic, *nodes: Tensor, total: bool = False
) -> tuple[Tensor, ...]:
    """``f(quadratic, *nodes)`` block by block, results concatenated over the nodes, or summed."""
    rows: list[list[tuple[Tensor, ...]]] = []
    for r, n in blocks(quadratic.slope.shape[0], nodes[0].shape[-1], quadratic.slope.shape[-1]):
        if not n.start:
            rows.append([])
        rows[-1].append(f(Quadratic(*(x[r] for x in quadratic)), *(x[r, n] for x in nodes)))
    if len(rows) == 1 and len(rows[0]) == 1:
        return rows[0][0]

    def joined(parts: tuple[Tensor, ...]) -> Tensor:
        return torch.stack(parts).sum(0) if total else torch.cat(parts, -1)

    joined_rows = ([joined(parts) for parts in zip(*row, strict=True)] for row in rows)
    return tuple(torch.cat(parts) for parts in zip(*joined_rows, strict=True))


def _reciprocal(quadratic: Quadratic, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """1 + s k = u + i v, its squared modulus, and its reciprocal, real and imaginary part; each [B, n, D]."""
    k = quadratic.curvature.unsqueeze(-2)
    u, v = 1 + x.unsqueeze(-1) * k, y.unsqueeze(-1) * k
    norm = torch.addcmul(u * u, v, v)
    inverse = 1 / norm
    return u, v, norm, u * inverse, -v * inverse


def _quad_and_line(quadratic: Quadratic) -> tuple[Tensor, Tensor]:
    """The coefficients of s^2/(1 + s k) and of s/(1 + s k) in the exponent of E exp(s y), [B, D]."""
    _, curvature, slope, origin = quadratic
    return 0.5 * slope * slope, -origin * (slope + 0.5 * curvature * origin)


def _slant(quadratic: Quadratic, x: Tensor, y: Tensor, hr: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """The exponent over s, level + sum line h + s sum quad h, [B, n]."""
    sides = torch.stack(_quad_and_line(quadratic), -1)
    (qr, lr), (qi, li) = ((h @ sides).unbind(-1) for h in (hr, hi))
    return quadratic.level.unsqueeze(-1) + lr + x * qr - y * qi, li + x * qi + y * qr


def _log_moment(quadratic: Quadratic, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    u, v, norm, hr, hi = _reciprocal(quadratic, x, y)
    real, imag = _slant(quadratic, x, y, hr, hi)
    log_modulus = x * real - y * imag - 0.25 * torch.log(norm).sum(-1)
    return log_modulus, x * imag + y * real - 0.5 * torch.atan2(v, u).sum(-1)


def log_moment(quadratic: Quadratic, real: Tensor, imag: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of log E exp(s y) at s = real + i imag, [B, n]."""
    return by_blocks(_log_moment, quadratic, real, imag)  # type: ignore[return-value]


def _log_kernel_modulus(x: Tensor, y: Tensor) -> Tensor:
    sine, sinh = torch.sin(math.pi * x), torch.sinh(math.pi * y)
    return math.log(math.pi) - 0.5 * torch.log((x * x + y * y) * (sine * sine + sinh * sinh))


def _kernel_phase(x: Tensor, y: Tensor) -> Tensor:
    """The imaginary part of log(pi/(s sin pi s)), up to multiples of 2 pi."""
    tangent = torch.atan2(torch.cos(math.pi * x) * torch.tanh(math.pi * y), torch.sin(math.pi * x))
    return -torch.atan2(y, x) - tangent


# ------------------------------------------------------------------------------------------ the contour


def _tilted_mean(quadratic: Quadratic, s: Tensor) -> tuple[Tensor]:
    """Derivative of log E exp(s y) at real s, [B, n]."""
    level, curvature, slope, origin = quadratic
    s = s.unsqueeze(-1)
    h = 1 / (1 + s * curvature.unsqueeze(-2))
    m = (s * slope.unsqueeze(-2) - origin.unsqueeze(-2)) * h
    # sum of g m - k (h + m^2)/2
    linear = (m @ slope.unsqueeze(-1)).squeeze(-1)
    return (level.unsqueeze(-1) + linear - 0.5 * (torch.addcmul(h, m, m) @ curvature.unsqueeze(-1)).squeeze(-1),)


def _tilted_variance(quadratic: Quadratic, s: Tensor) -> Tensor:
    """Second derivative of log E exp(s y) at real s [B], [B]."""
    _, curvature, slope, origin = quadratic
    s = s.unsqueeze(-1)
    h = 1 / (1 + s * curvature)
    force = slope - curvature * ((s * slope - origin) * h)
    return (0.5 * (curvature * h).square() + h * force * force).sum(-1)


def _crossing(quadratic: Quadratic) -> tuple[Tensor, Tensor]:
    """Where the contour crosses the real axis, and the scale of the integrand there; both [B].

    The integrand is positive and its logarithm convex on the real axis of the strip: the crossing is its least value.
    """
    device = quadratic.slope.device
    lowest = quadratic.curvature.amin(-1).clamp(max=-1.0)
    end = -1 / lowest

    def decreasing(s: Tensor) -> Tensor:
        (mean,) = by_blocks(_tilted_mean, quadratic, s)
        return mean - 1 / s - math.pi / torch.tan(math.pi * s) < 0

    shares = table(SHARES, device)
    # the last trial is the left end of the last interval
    below = decreasing(end.unsqueeze(-1) * shares).sum(-1).clamp(1, len(SHARES) - 1)
    low, high = end * shares[below - 1], end * shares[below]
    steps = table(tuple(j / REFINED for j in range(1, REFINED)), device)
    trial = low.unsqueeze(-1) + (high - low).unsqueeze(-1) * steps
    place = (decreasing(trial).sum(-1) + 0.5) / REFINED
    a = low + (high - low) * place
    bend = _tilted_variance(quadratic, a) + 1 / (a * a) + (math.pi / torch.sin(math.pi * a)).square()
    return a, bend.rsqrt()


def _path(a: Tensor, b: Tensor, bend: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """s(t) = a + b (i sinh t cos(bend) + (cosh t - 1) sin(bend)), a branch of a hyperbola, and s'(t)."""
    sinh, cosh = b * torch.sinh(t), b * torch.cosh(t)
    less = 2 * b * torch.sinh(0.5 * t).square()
    sine, cosine = torch.sin(bend), torch.cos(bend)
    return a + less * sine, sinh * cosine, sinh * sine, cosh * cosine


def _log_integrand(quadratic: Quadratic, x: Tensor, y: Tensor) -> tuple[Tensor]:
    """The logarithm of |E exp(s y) pi/(s sin pi s)| at s = x + i y, [B, n]."""
    _, _, norm, hr, hi = _reciprocal(quadratic, x, y)
    real, imag = _slant(quadratic, x, y, hr, hi)
    return (x * real - y * imag - 0.25 * torch.log(norm).sum(-1) + _log_kernel_modulus(x, y),)


def _log_integrand_and_speed(quadratic: Quadratic, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same, and d log(E exp(s y) pi/(s sin pi s))/ds."""
    _, _, norm, hr, hi = _reciprocal(quadratic, x, y)
    real, imag = _slant(quadratic, x, y, hr, hi)
    size = x * real - y * imag - 0.25 * torch.log(norm).sum(-1) + _log_kernel_modulus(x, y)
    # d/ds of s (level + line h + s quad h) - log(1 + s k)/2 is that bracket - k h/2 + s (quad h^2 - line k h^2)
    # with s k h^2 = h - h^2 for the latter
    quad, line = _quad_and_line(quadratic)
    once = (-0.5 * quadratic.curvature - line).unsqueeze(-1)
    twice = torch.stack([line, quad], -1)
    cr, ci = ((h @ once).squeeze(-1) for h in (hr, hi))
    (lr, qr), (li, qi) = ((h @ twice).unbind(-1) for h in ((hr - hi) * (hr + hi), 2 * hr * hi))
    sinh, sine = torch.sinh(math.pi * y), torch.sin(math.pi * x)
    below = (sinh * sinh + sine * sine) / math.pi
    square = x * x + y * y
    real = real + cr + lr + x * qr - y * qi - x / square - sine * torch.cos(math.pi * x) / below
    imag = imag + ci + li + x * qi + y * qr + y / square + sinh * torch.cosh(math.pi * y) / below
    return size, real, imag


def contour(quadratic: Quadratic) -> Rule:
    """Nodes and weights for a row: crossing, direction and length follow the integrand.

    The direction is the one whose busiest place asks for the fewest nodes: those that the phase turns through where
    the integrand is alive, and those that make a trapezoid rule err by what the integrand has left.
    """
    quadratic = Quadratic(*(x.detach() for x in quadratic))
    device = quadratic.slope.device
    a, b = _crossing(quadratic)
    a, b = a[:, None, None], b[:, None, None]
    bends = table(BENDS, device).unsqueeze(-1)
    longest = torch.asinh(HEIGHT / b)
    # [B, directions, trials]
    x, y, dx, dy = _path(a, b, bends, longest * table(LADDER, device))
    size, speed_real, speed_imag = (
        z.unflatten(-1, y.shape[1:]) for z in by_blocks(_log_integrand_and_speed, quadratic, x.flatten(1), y.flatten(1))
    )
    size = size + 0.5 * torch.log(dx * dx + dy * dy)
    peak = torch.cummax(size, -1).values
    margin = LOST + size - peak
    alive = torch.cumprod((margin > 0).to(size.dtype), -1)
    margin = margin * alive
    count = alive.sum(-1, keepdim=True)
    reach = longest * (count.clamp(max=TRIALS) / TRIALS)
    turn = (speed_real * dy + speed_imag * dx).abs() * (margin / 8).clamp(0.0, 1.0)
    cost = (turn + margin / (1.2 - bends.abs())).amax(-1, keepdim=True) * reach
    # From its end the contour may rise vertically, where nothing comes to life again: nothing does for no bend.
    x, y, _, _ = _path(a, b, bends, reach)
    y = y * torch.clamp(HEIGHT / y, min=1.0) ** table(RISE, device)
    x = x.expand_as(y)
    rising = by_blocks(_log_integrand, quadratic, x.flatten(1), y.flatten(1))[0].unflatten(-1, y.shape[1:])
    revived = (rising + torch.log(y) > peak[..., -1:] - LOST + 3).any(-1, keepdim=True)
    cost = torch.where(revived & (count < TRIALS) & (bends != 0), torch.inf, cost)
    chosen = cost.argmin(-2, keepdim=True)
    step = torch.gather(reach, -2, chosen) / NODES
    j = torch.arange(NODES, dtype=a.dtype, device=device)
    x, y, dx, dy = (z.squeeze(-2) for z in _path(a, b, bends.squeeze(-1)[chosen], step * j))
    weight = torch.where(j == 0, 0.5, 1.0) * step.squeeze(-2) / math.pi
    return Rule(x, y, dx * weight, dy * weight)


def integrand(rule: Rule, real: Tensor, imag: Tensor) -> tuple[Tensor, Tensor]:
    """Kappa at each node, real and imaginary part, such that E softplus(y) = sum Re kappa, dE = sum Re(kappa d log M).

    ``real`` and ``imag`` are those of log M, the log-moment.
    """
    size = torch.exp(real + _log_kernel_modulus(rule.real, rule.imag))
    phase = imag + _kernel_phase(rule.real, rule.imag)
    c, s = size * torch.cos(phase), size * torch.sin(phase)
    return c * rule.weight_imag + s * rule.weight_real, s * rule.weight_imag - c * rule.weight_real


def crossing_sensitivity(quadratic: Quadratic, pair: WhitenedPair, rule: Rule, diagonal: bool) -> Tensor:
    """What a relative rounding error of 1 in the quadratic's numbers would change in log E exp(s y) at the crossing.

    An eigendecomposition errs by its largest eigenvalue in each of them.
    """
    level, curvature, slope, origin = quadratic
    s = rule.real[..., :1]
    h = 1 / (1 + s * curvature)
    m = (s * slope - origin) * h
    k = curvature.abs()
    k = k if diagonal else k.amax(-1, keepdim=True)
    square = pair.centres.square().sum((-2, -1))
    return s.squeeze(-1) * (level.abs() + 0.5 * square + (0.5 * k * (h + m * m)).sum(-1))
