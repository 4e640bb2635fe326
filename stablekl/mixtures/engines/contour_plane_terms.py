"""Two log-ratios of Gaussians under a third, their joint moment generating function, and a plane to integrate it over.

The formulas and their reasons are at the head of `contour_plane`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .contour_terms import log_ratio
from .spectral_terms import x_minus_atan

__all__ = [
    "DIRECTIONS",
    "LogRatios",
    "Rays",
    "Rule",
    "Saddle",
    "integrand",
    "log_ratios",
    "radii",
    "rays",
    "reach",
    "saddle",
]

# Newton's method from within the domain: 1 to 30 steps were observed, 5 in the median (p 1e-2 to 1e4 times as wide).
ITERATIONS, HALVINGS = 60, 40
# What is left of the decrement squared where the saddle is good enough: the plane may cross anywhere near it.
CONVERGED = 1e-4
# Of the logarithm at the saddle.
LARGEST = 600.0
# Rays in half a turn of the coarsest rule. Radii are exp(t - exp(-t)), of a trapezoid rule in t that takes a power-law
# decay, of wide p's, and a Gaussian one, of narrow p's, alike; below the first their weights are 1e-16.
DIRECTIONS, STEP, NEAREST = 64, 0.13, -2.8
# Rays are dense about the three along which the kernel does not decay, s_1, s_2 or s_1 + s_2 being constant: they have
# this share, spread like the Poisson kernel of this radius. (Equidistant ones took 8 times as many for wide p's.)
SHARE, RADIUS = 0.75, 0.9
TABLE = 1024
# The kernel is exp(-pi FAR) of its peak where either imaginary part is this large.
FAR = 13.0
# Stirling's series for log Gamma(z), from Re z = SHIFT on; relative error 1e-14 of Gamma.
SHIFT = 7
SERIES = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156)


class LogRatios(NamedTuple):
    """Both log-ratios y_i(z) = level_i + slope_i'z - 1/2 z' curvature_i z, z ~ N(0, I).

    ``level`` is [B, 2], ``slope`` [B, 2, D], ``curvature`` [B, 2, D, D], or [B, 2, D] where all is diagonal.
    """

    level: Tensor
    slope: Tensor
    curvature: Tensor


class Saddle(NamedTuple):
    """Where the plane crosses the real one.

    ``place`` s0 [B, 2]; ``log_size`` of the integrand there [B], ``axes`` that normalise its curvature [B, 2, 2];
    ``root`` C with C C' = I + s0 . curvature, [B, D, D] or [B, D], and whether there is one, ``found`` [B].
    """

    place: Tensor
    log_size: Tensor
    axes: Tensor
    root: Tensor
    found: Tensor


class Rule(NamedTuple):
    """How fine: the rays are doubled ``turns`` times and the radii ``fine`` times, out to t = ``reach``."""

    turns: int
    fine: int
    reach: int


class Rays(NamedTuple):
    """Directions u in the plane, [B, n, 2], and along each the pencil I + s0 . curvature + i r u . curvature.

    ``share`` is the angle that each stands for, as a part of half a turn, [B, n]. In the basis ``vectors`` (None for
    diagonal components) that makes the first part the identity and the second diagonal: the ``eigenvalue`` of the
    second, ``push`` s0 . slope and ``pull`` u . slope, [B, n, D].
    """

    direction: Tensor
    share: Tensor
    eigenvalue: Tensor
    push: Tensor
    pull: Tensor
    vectors: Tensor | None


def log_ratios(log_weights: Tensor, p_loc: Tensor, p_scale: Tensor, loc: Tensor, scale: Tensor) -> LogRatios:
    """Of the second and third component to the first; differentiable.

    Args:
        log_weights: [B, 3], finite.
        p_loc: [B, D].
        p_scale: [B, D], or factors [B, D, D].
        loc: [B, 3, D].
        scale: [B, 3, D], or factors [B, 3, D, D].
    """
    shift = p_loc.unsqueeze(-2) - loc
    diagonal = p_scale.ndim == p_loc.ndim
    if diagonal:
        maps, centres, own = p_scale.unsqueeze(-2) / scale, shift / scale, scale
        pulled = maps * centres
    else:
        factor = p_scale.unsqueeze(-3).expand_as(scale)
        solved = torch.linalg.solve_triangular(scale, torch.cat([factor, shift.unsqueeze(-1)], -1), upper=False)
        maps, centres, own = solved[..., :-1], solved[..., -1], scale.diagonal(dim1=-2, dim2=-1)
        pulled = (maps.mT @ centres.unsqueeze(-1)).squeeze(-1)
    # squares as products of differences: exactly 0 for equal components
    less, more = maps[:, 1:] - maps[:, :1], maps[:, 1:] + maps[:, :1]
    curvature = less * more if diagonal else less.mT @ more
    if not diagonal:
        curvature = 0.5 * (curvature + curvature.mT)
    first = own[:, :1].expand_as(own[:, 1:])
    gap = 0.5 * (centres[:, :1] - centres[:, 1:]) * (centres[:, :1] + centres[:, 1:])
    level = log_weights[:, 1:] - log_weights[:, :1] + (log_ratio(first, own[:, 1:]) + gap).sum(-1)
    return LogRatios(level, pulled[:, :1] - pulled[:, 1:], curvature)


# ------------------------------------------------------------------------------------------ the saddle


def _combined(weights: Tensor, y: Tensor) -> Tensor:
    """Sum over the two of weights [B, ..., 2] and y [B, 2, ...]."""
    lead = weights.shape[1:-1]
    flat = weights.reshape(weights.shape[0], math.prod(lead), 2) @ y.flatten(2)
    return flat.reshape(weights.shape[0], *lead, *y.shape[2:])


class _Local(NamedTuple):
    """Logarithm of the integrand at real s, its gradient and Hessian, and C."""

    value: Tensor
    gradient: Tensor
    hessian: Tensor
    root: Tensor


def _local(y: LogRatios, s: Tensor, diagonal: bool) -> _Local:
    """The logarithm is +inf outside of the domain."""
    push = _combined(s, y.slope)
    mixed = _combined(s, y.curvature)
    if diagonal:
        square = 1 + mixed
        inside = (square > 0).all(-1)
        root = torch.where(inside.unsqueeze(-1), square, 1.0).sqrt()
        inverse = (root * root).reciprocal()
        mean = inverse * push
        bent = y.curvature * mean.unsqueeze(-2)
        force = y.slope - bent
        scaled = inverse.unsqueeze(-2) * y.curvature
        trace = scaled.sum(-1)
        hessian = 0.5 * scaled @ scaled.mT + (force * inverse.unsqueeze(-2)) @ force.mT
        log_det = 2 * root.log().sum(-1)
    else:
        identity = torch.eye(push.shape[-1], dtype=s.dtype, device=s.device)
        root, failed = torch.linalg.cholesky_ex(identity + mixed)
        inside = failed == 0
        root = torch.where(inside[:, None, None], root, identity)
        inverse = torch.cholesky_inverse(root)
        mean = (inverse @ push.unsqueeze(-1)).squeeze(-1)
        bent = (y.curvature @ mean[:, None, :, None]).squeeze(-1)
        force = y.slope - bent
        scaled = inverse.unsqueeze(-3) @ y.curvature
        trace = scaled.diagonal(dim1=-2, dim2=-1).sum(-1)
        hessian = 0.5 * scaled.flatten(2) @ scaled.mT.flatten(2).mT + force @ inverse @ force.mT
        log_det = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    inside = inside & ((s > 0) & (s < 1)).all(-1)
    safe = torch.where(inside.unsqueeze(-1), s, 0.5)
    total = safe.sum(-1)
    value = (s * y.level).sum(-1) - 0.5 * log_det + 0.5 * (push * mean).sum(-1)
    value = value + (torch.lgamma(1 - safe) - safe.log()).sum(-1) + torch.lgamma(total)
    gradient = y.level - 0.5 * trace + ((y.slope - 0.5 * bent) * mean.unsqueeze(-2)).sum(-1)
    gradient = gradient - torch.digamma(1 - safe) - 1 / safe + torch.digamma(total).unsqueeze(-1)
    own = torch.polygamma(1, 1 - safe) + safe.reciprocal().square()
    hessian = hessian + torch.diag_embed(own) + torch.polygamma(1, total)[:, None, None]
    return _Local(torch.where(inside, value, torch.inf), gradient, hessian, root)


def saddle(y: LogRatios, diagonal: bool) -> Saddle:
    """The least value of the integrand, positive and log-convex, on the real points of its domain."""
    # no eigenvalue is below minus the Frobenius norm
    steepest = y.curvature.amin(-1).clamp(max=0).neg() if diagonal else torch.linalg.matrix_norm(y.curvature)
    inside = 0.5 / steepest.sum(-1).clamp(min=1.25)
    s = inside.unsqueeze(-1).expand(-1, 2).contiguous()
    here = _local(y, s, diagonal)
    working = here.value.isfinite()
    decrement = torch.full_like(inside, torch.inf)
    for _ in range(ITERATIONS):
        step = -torch.linalg.solve_ex(here.hessian, here.gradient.unsqueeze(-1))[0].squeeze(-1)
        decrement = -(here.gradient * step).sum(-1)
        working = working & (decrement > CONVERGED)  # not where it is NaN
        if not bool(working.any()):
            break
        length = working.to(s.dtype)
        for _ in range(HALVINGS):
            moved = s + length.unsqueeze(-1) * step
            there = _local(y, moved, diagonal)
            worse = working & ~(there.value <= here.value - 0.1 * length * decrement + 1e-12 * here.value.abs())
            if not bool(worse.any()):
                break
            length = torch.where(worse, 0.5 * length, length)
        working = working & ~worse
        s = torch.where(working.unsqueeze(-1), moved, s)
        here = _Local(
            *(torch.where(working.reshape(-1, *(1,) * (a.ndim - 1)), a, b) for a, b in zip(there, here, strict=True))
        )
    # near enough for the plane; and a peak within the range of float64
    found = (decrement >= 0) & (decrement < 0.1) & (here.value < LARGEST)
    root, failed = torch.linalg.cholesky_ex(here.hessian)
    identity = torch.eye(2, dtype=s.dtype, device=s.device)
    found = found & (failed == 0)
    root = torch.where(found[:, None, None], root, identity)
    axes = torch.linalg.solve_triangular(root.mT, identity.expand_as(root), upper=True)
    return Saddle(s, here.value, axes, here.root, found)


# ---------------------------------------------------------------------------------------------- the plane


def _angles(at: Saddle, count: int) -> tuple[Tensor, Tensor]:
    """Angles of half a turn, and the part of it that each stands for, [B, n]: a periodic trapezoid rule, stretched."""
    device = at.place.device
    lines = torch.cat([at.axes, at.axes.sum(-2, keepdim=True)], -2)  # u_1, u_2, u_1 + u_2 by the angle's cosine, sine
    flat = torch.atan2(lines[..., 0], -lines[..., 1]).unsqueeze(-2)
    ratio = (1 + RADIUS) / (1 - RADIUS)

    def rise(x: Tensor) -> Tensor:
        """The integral of the Poisson kernel, continuous."""
        turn = torch.round(x / math.pi) * math.pi
        return torch.atan2(ratio * torch.sin(x - turn), torch.cos(x - turn)) + turn

    def total(x: Tensor) -> Tensor:
        return (1 - SHARE) * x + SHARE * (rise(x.unsqueeze(-1) - flat) - rise(-flat)).mean(-1)

    def density(x: Tensor) -> Tensor:
        wave = torch.cos(2 * (x.unsqueeze(-1) - flat))
        kernel = (1 - RADIUS**2) / (1 + RADIUS**2 - 2 * RADIUS * wave)
        return 1 - SHARE + SHARE * kernel.mean(-1)

    grid = torch.linspace(0, math.pi, TABLE + 1, dtype=torch.float64, device=device)
    known = total(grid.expand(len(flat), -1))
    goal = torch.arange(count, dtype=torch.float64, device=device) * (math.pi / count)
    place = torch.searchsorted(known, goal.expand(len(flat), -1).contiguous(), right=True).clamp(1, TABLE)
    low, high = known.gather(-1, place - 1), known.gather(-1, place)
    angle = grid[place - 1] + (grid[1] - grid[0]) * (goal - low) / (high - low)
    for _ in range(3):
        angle = angle - (total(angle) - goal) / density(angle)
    return angle, 1 / (count * density(angle))


def reach(at: Saddle) -> Tensor:
    """How far out a rule must go, the `Rule.reach` of each row, [B]."""
    angle = _angles(at, DIRECTIONS)[0]
    direction = torch.stack([angle.cos(), angle.sin()], -1) @ at.axes.mT
    radius = FAR / direction.abs().amax(-1).amin(-1)
    result: Tensor = radius.log().ceil().clamp(2, 40).to(torch.int64)
    return result


def rays(y: LogRatios, at: Saddle, rule: Rule, diagonal: bool, piece: slice = slice(None)) -> Rays:
    """The directions of a rule, or some of them, and the pencils along them."""
    angle, share = (x[:, piece] for x in _angles(at, DIRECTIONS << rule.turns))
    direction = torch.stack([angle.cos(), angle.sin()], -1) @ at.axes.mT
    push, pull = _combined(at.place, y.slope).unsqueeze(-2), _combined(direction, y.slope)
    along = _combined(direction, y.curvature)
    if diagonal:
        root = at.root.unsqueeze(-2)
        return Rays(direction, share, along / root / root, (push / root).expand_as(pull), pull / root, None)
    root = at.root.unsqueeze(-3)
    half = torch.linalg.solve_triangular(root, along, upper=False)
    whole = torch.linalg.solve_triangular(root, half.mT, upper=False)
    eigenvalue, vectors = torch.linalg.eigh(0.5 * (whole + whole.mT))
    both = torch.stack([push.expand_as(pull), pull], -1)
    both = vectors.mT @ torch.linalg.solve_triangular(root, both, upper=False)
    return Rays(direction, share, eigenvalue, both[..., 0], both[..., 1], vectors)


def radii(rule: Rule, device: torch.device) -> tuple[Tensor, Tensor]:
    """The radii of a rule, and the weights r dr."""
    step = STEP / 2**rule.fine
    count = 4 * math.ceil((rule.reach - NEAREST) / step / 4)
    t = rule.reach - step * torch.arange(count, dtype=torch.float64, device=device)
    fall = torch.exp(-t)
    r = torch.exp(t - fall)
    return r, step * r * r * (1 + fall)


def _gamma(z: Tensor) -> Tensor:
    """The gamma function for Re z > 0, complex, by Stirling's series."""
    y = z + SHIFT
    inverse = y.reciprocal()
    square = inverse * inverse
    correction = torch.full_like(inverse, SERIES[-1])
    for c in SERIES[-2::-1]:
        correction = correction * square + c
    shifted = torch.exp((y - 0.5) * torch.log(y) - y + 0.5 * math.log(2 * math.pi) + correction * inverse)
    below = z
    for k in range(1, SHIFT):
        below = below * (z + k)
    result: Tensor = shifted / below
    return result


def _kernel(s: Tensor) -> Tensor:
    """Gamma(-s_1) Gamma(-s_2) Gamma(s_1 + s_2), for s [..., 2] in the strip."""
    g = _gamma(torch.stack([1 - s[..., 0], 1 - s[..., 1], s.sum(-1)]))
    return g[0] * g[1] * g[2] / (s[..., 0] * s[..., 1])


def integrand(y: LogRatios, at: Saddle, along: Rays, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """Kappa, complex, at the nodes [B, n, r], such that E g = sum Re kappa, dE = sum Re(kappa d log M); with s and r.

    Relative to its size at the saddle, where the first-order terms of the phase are those of the kernel's.
    """
    r, weight = radii(rule, at.place.device)
    x = r.unsqueeze(-1) * along.eigenvalue.unsqueeze(-2)
    z = x * x
    force = (along.pull - along.push * along.eigenvalue).square()
    even, odd = ((1 / (1 + z)) @ torch.stack([force, force * along.eigenvalue], -1)).unbind(-1)
    linear = (along.direction * y.level.unsqueeze(-2)).sum(-1)
    linear = linear + (along.push * along.pull - 0.5 * along.eigenvalue * (1 + along.push.square())).sum(-1)
    real = -(0.25 * torch.log1p(z).sum(-1) + 0.5 * r * r * even)
    imag = r * linear.unsqueeze(-1) + 0.5 * (x_minus_atan(x).sum(-1) + r**3 * odd)
    place = at.place[:, None, None, :].expand(*x.shape[:3], 2)
    s = torch.complex(place, r.unsqueeze(-1) * along.direction.unsqueeze(-2))
    kernel = _kernel(s)
    start = _kernel(at.place.to(s.dtype)).real[:, None, None]
    size = torch.exp(at.log_size) * at.axes.diagonal(dim1=-2, dim2=-1).prod(-1) / (2 * math.pi)
    node = weight * (size[:, None] * along.share).unsqueeze(-1)
    kappa = torch.polar(torch.exp(real), imag) * (kernel / start) * node
    return kappa, s, r
