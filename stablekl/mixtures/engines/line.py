r"""KL divergence between one-dimensional Gaussian mixtures, any number of components, by panels.

With u = log(p/q) the integrand is taken in its positive form,

    KL(p || q) = \int q phi(u) dx,    q phi(u) = p (u + expm1(-u)) = p u - p + q >= 0,

which is zero with all its first derivatives where p = q, so that nothing cancels between panels.

Panels. Composite Gauss-Legendre between edges at ``loc + t scale`` for every component of p and of q, and
around every *kink*: where two weighted components of one mixture cross, log p (or log q) turns from one
parabola to another within 1/slope, with singularities at a distance pi/slope from the real axis. A steep
crossing (far or narrow components, weights like 1e-300) lies where no component has its own edges, and costs
1e-3 rather than 1e-14 if left to them. Crossings are roots of quadratics; those that matter most are kept,
a fixed number, so that shapes do not depend on data.

Near p = q, u comes from differences of parameters (see `_log_ratio`), not from log p(x) - log q(x).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import EllipsisType

import torch
from torch import Tensor

from ..._autograd import is_plain, rowwise
from ...quadrature import gauss_legendre, panel_rule, table, two_sum
from ...special import expm1_value, expm1mx_value
from ..components import Components

__all__ = ["line_kl"]

NODES = 16
# Edges per component, in its standard deviations: beyond 9.2 the density is 4e-19 of its peak.
STEPS = (-9.2, -6.4, -4.4, -2.8, -1.4, 0.0, 1.4, 2.8, 4.4, 6.4, 9.2)
# Edges per kink, in units of 1/slope: softplus(40) = 40 + 4e-18, so the kink is over there.
KINK_STEPS = (-40.0, -10.0, -3.0, 0.0, 3.0, 10.0, 40.0)
# Kinks kept per component (the upper envelope of K parabolas has at most 2 K - 2 breakpoints).
KINKS = 4
# Elements per temporary in eager mode: 4 MiB.
BLOCK = 2**19
EPS = 2.0**-52
# Rounding errors of an evaluated integrand, in eps of its terms.
ROUNDING = 16.0
LOG_SQRT_2PI = 0.5 * math.log(2.0 * math.pi)

# log-weights, means and standard deviations of p, then of q; each of shape batch_shape + (K,).
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _component_log_densities(
    log_weights: Tensor, loc: Tensor, scale: Tensor, high: Tensor, low: Tensor
) -> tuple[Tensor, Tensor]:
    """``log w_k + log N(x; loc_k, scale_k)`` and ``z_k``, shape ``batch_shape + (K, N)``, for N points x."""
    z = ((high.unsqueeze(-2) - loc.unsqueeze(-1)) + low.unsqueeze(-2)) / scale.unsqueeze(-1)
    constant = log_weights - torch.log(scale) - LOG_SQRT_2PI
    return constant.unsqueeze(-1) - 0.5 * z * z, z


def expm1(x: Tensor) -> Tensor:
    """The same under torch.compile, which makes ``exp(x) - 1`` of torch's on a CPU; differentiable at any x."""
    small = x.abs() < 0.5
    return torch.where(small, expm1_value(torch.where(small, x, 0.0)), torch.expm1(x))


def _logsumexp(x: Tensor) -> Tensor:
    """Over the components. All -inf gives -inf, with zero gradient."""
    largest = x.detach().amax(-2, keepdim=True)
    largest = torch.where(torch.isinf(largest), torch.zeros_like(largest), largest)
    total = torch.exp(x - largest).sum(-2)
    dead = total == 0
    return torch.where(dead, -math.inf, torch.log(torch.where(dead, 1.0, total)) + largest.squeeze(-2))


def _paired(inputs: Inputs) -> Inputs | None:
    """Both mixtures with components in pairs, or None: a Gaussian is the sum of its weighted copies."""
    lw, mp, sp, lv, mq, sq = inputs
    kp, kq = lw.shape[-1], lv.shape[-1]
    if kp == kq:
        return inputs
    if kq == 1:
        return lw, mp, sp, lw + lv, mq.expand_as(mp), sq.expand_as(sp)
    if kp == 1:
        return lv + lw, mp.expand_as(mq), sp.expand_as(sq), lv, mq, sq
    return None


def _log_ratio(inputs: Inputs, high: Tensor, low: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """The log-ratio u = log(p/q) at the points, and the size of the terms that it was computed from.

    With the components paired, p/q - 1 = sum_k r_k expm1(e_k), r_k the posterior weights of q,

        e_k = log(w_k/v_k) - log1p(rho) + 1/2 (z_q - z_p)(z_q + z_p),    rho = (sigma_p - sigma_q)/sigma_q,

    z_q - z_p = z_p rho + (mu_p - mu_q)/sigma_q: every term is small when the parameters are near each
    other. log p - log q would have the rounding errors of both: at KL = 1e-17 it leaves a relative error of
    6e-9, at 1e-25 one of 1e-4, in place of 3e-16 for both (and the textbook integral of p u, at 1e-17, noise).
    """
    plain = log_p - log_q
    plain_size = 1.0 + log_p.abs() + log_q.abs()
    pairs = _paired(inputs)
    if pairs is None:
        return plain, plain_size
    lw, mp, sp, lv, mq, sq = pairs
    log_qk, z_q = _component_log_densities(lv, mq, sq, high, low)
    log_pk, z_p = _component_log_densities(lw, mp, sp, high, low)
    rho, shift = (sp - sq) / sq, (mp - mq) / sq
    near = rho > -0.5
    log_scale = torch.where(near, torch.log1p(torch.where(near, rho, 0.0)), torch.log(sp) - torch.log(sq))
    both_zero = torch.isinf(lw) & torch.isinf(lv)
    log_weight = torch.where(both_zero, 0.0, lw) - torch.where(both_zero, 0.0, lv)
    difference = z_p * rho.unsqueeze(-1) + shift.unsqueeze(-1)
    e = (log_weight - log_scale).unsqueeze(-1) + 0.5 * difference * (z_q + z_p)
    # r_k expm1(e_k); where expm1 could overflow, (w_k p_k/q) (1 - exp(-e_k)): far from both
    # components e_k is large while its weight is nothing.
    small = e < 1.0
    # More than exp(8) is as good as infinite: the point goes the plain way.
    ratio = torch.exp(torch.clamp(torch.where(small, log_qk, log_pk) - log_q.unsqueeze(-2), max=8.0))
    gain = -torch.expm1(-torch.where(small, 1.0, e))
    terms = ratio * torch.where(small, expm1(torch.where(small, e, 0.0)), gain)
    size = terms.abs().sum(-2)
    use = size < 0.5
    total = torch.where(use, terms.sum(-2), 0.0)
    return torch.where(use, torch.log1p(total), plain), torch.where(use, size, plain_size)


def _crossings(log_weights: Tensor, loc: Tensor, scale: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Where the weighted components of one mixture cross in pairs.

    Returns:
        For the first and the second root of every pair: both halves of x, the width of the kink there
        (1/slope, or the narrower component's scale if that is less) and the logarithm of slope times
        density; NaN or infinite, the rest finite, where there is no such root.
    """
    k = log_weights.shape[-1]
    first, second = torch.triu_indices(k, k, 1, device=loc.device)
    # The narrower component first: the roots are then found in its units.
    swap = scale[..., first] > scale[..., second]
    lw_a, m_a, s_a = (torch.where(swap, x[..., second], x[..., first]) for x in (log_weights, loc, scale))
    lw_b, m_b, s_b = (torch.where(swap, x[..., first], x[..., second]) for x in (log_weights, loc, scale))
    # log(w_a p_a) - log(w_b p_b) = a y^2 + b y + c at x = m_a + s_a y
    ratio, distance = s_a / s_b, (m_b - m_a) / s_b
    a = 0.5 * ((s_a - s_b) / s_b) * (1.0 + ratio)
    b = -ratio * distance
    c = lw_a - lw_b - torch.log(ratio) + 0.5 * distance * distance
    slope = torch.sqrt(torch.clamp(b * b - 4.0 * a * c, min=0.0))
    half = -0.5 * (b + torch.where(b < 0, -slope, slope))
    steepness = torch.where(torch.isfinite(slope), torch.clamp(slope, min=1.0), 1.0)
    found = []
    for root in (half / a, c / half):  # never the difference of b and slope
        y = torch.where(torch.isfinite(root), root, 0.0)
        high, low = two_sum(m_a, s_a * y)
        here = torch.log(slope / s_a) + lw_a - torch.log(s_a) - LOG_SQRT_2PI - 0.5 * y * y + 0.0 * root
        found.append((high, low, s_a / steepness, here))
    return found


def _kinks(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor] | None:
    """The crossings that matter most: upper and lower half of x, and 1/slope there."""
    candidates = []
    for mixture in (inputs[:3], inputs[3:]):
        if mixture[0].shape[-1] == 1:
            continue
        for high, low, step, here in _crossings(*mixture):
            # What a kink left alone would cost: p's density, the jump in slope, how near to the envelope.
            log_p = _logsumexp(_component_log_densities(*inputs[:3], high, low)[0])
            own = _logsumexp(_component_log_densities(*mixture, high, low)[0])
            rank = log_p + (here - own)
            candidates.append((high, low, step, torch.where(torch.isfinite(rank), rank, -math.inf)))
    if not candidates:
        return None
    high, low, step, rank = (torch.cat(parts, -1) for parts in zip(*candidates, strict=True))
    kept = min(rank.shape[-1], KINKS * (inputs[0].shape[-1] + inputs[3].shape[-1]))
    chosen = torch.topk(rank, kept, dim=-1).indices
    return torch.gather(high, -1, chosen), torch.gather(low, -1, chosen), torch.gather(step, -1, chosen)


def _rule(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Nodes (two halves), weights and panel widths for these parameters, which are taken as constants."""
    inputs = tuple(x.detach() for x in inputs)  # type: ignore[assignment]
    _, mp, sp, _, mq, sq = inputs
    loc, scale = torch.cat((mp, mq), -1).unsqueeze(-1), torch.cat((sp, sq), -1).unsqueeze(-1)
    high, low = (x.flatten(-2) for x in two_sum(loc, scale * table(STEPS, loc.device)))
    kinks = _kinks(inputs)
    if kinks is not None:
        centre, centre_low, width = (x.unsqueeze(-1) for x in kinks)
        total, error = two_sum(centre, width * table(KINK_STEPS, loc.device))
        high = torch.cat((high, total.flatten(-2)), -1)
        low = torch.cat((low, (error + centre_low).flatten(-2)), -1)
    return panel_rule(high, low, NODES)


def _integrand(u: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """``p (u + expm1(-u))``; ``p u - p + q`` away from 0, where expm1(-u) may overflow while p is 0."""
    small = u.abs() <= 0.35
    near = p * expm1mx_value(-torch.where(small, u, 0.0))
    far = torch.where(p > 0, p * torch.where(p > 0, u, 0.0), 0.0) - p + q
    return torch.where(small, near, far)


def _panel_blocks(panels: int, inputs: Sequence[Tensor]) -> list[tuple[EllipsisType, slice, slice]]:
    """The panels to take at a time: few enough for memory in eager mode, else all of them."""
    largest = max(inputs[0].shape[-1], inputs[3].shape[-1])
    step = max(1, BLOCK // (max(1, inputs[0][..., 0].numel()) * NODES * largest))
    step = step if is_plain(inputs) else panels
    return [(..., slice(start, start + step), slice(None)) for start in range(0, panels, step)]


def _row_blocks(inputs: Sequence[Tensor]) -> list[list[Tensor]] | None:
    """The rows to take at a time in eager mode, or None for all of them."""
    rows = inputs[0][..., 0].numel()
    per_component = NODES * (len(STEPS) + KINKS * len(KINK_STEPS))
    step = max(1, BLOCK // (per_component * (inputs[0].shape[-1] + inputs[3].shape[-1])))
    if rows <= step or not is_plain(inputs):
        return None
    batch_ndim = inputs[0].ndim - 1
    flat = [x.reshape(-1, *x.shape[batch_ndim:]) for x in inputs]
    return [[x[i : i + step] for x in flat] for i in range(0, rows, step)]


def _integrate(inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Value and error."""
    blocks = _row_blocks(inputs)
    if blocks is not None:
        results = zip(*(_integrate(block) for block in blocks), strict=True)
        value, error = (torch.cat(parts).reshape(inputs[0].shape[:-1]) for parts in results)
        return value, error
    rows: Inputs = inputs  # type: ignore[assignment]
    all_high, all_low, all_weight, all_width = _rule(rows)
    null_rule = gauss_legendre(NODES, all_high.device)[2]
    value = error = torch.zeros_like(inputs[0][..., 0])
    for block in _panel_blocks(all_width.shape[-2], inputs):
        high, low, weight = (x[block].flatten(-2) for x in (all_high, all_low, all_weight))
        log_p = _logsumexp(_component_log_densities(*rows[:3], high, low)[0])
        log_q = _logsumexp(_component_log_densities(*rows[3:], high, low)[0])
        u, size = _log_ratio(rows, high, low, log_p, log_q)
        p, q = torch.exp(log_p), torch.exp(log_q)
        f = _integrand(u, p, q)
        value = value + (weight * f).sum(-1)
        # Rounding: an error d in u costs |p - q| d; sizes beyond range only occur where p is 0.
        sensitivity = torch.where(p > 0, p * torch.clamp(u.abs(), max=1.0) * size, 0.0)
        error = error + ROUNDING * EPS * (weight * (f + sensitivity)).sum(-1)
        # Truncation: a last Legendre coefficient of r^-(n-1) goes with a Gauss error of r^-2n.
        by_panel = f.reshape(*f.shape[:-1], f.shape[-1] // NODES, NODES)
        last, largest = (by_panel * null_rule).sum(-1).abs(), by_panel.amax(-1)
        largest = torch.where(largest > 0, largest, 1.0)
        share = torch.clamp(last / largest, max=1.0)
        error = error + (all_width[block].squeeze(-1) * last * share).sum(-1)
    return value, error


def _gradient(inputs: tuple[Tensor, ...], saved: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    """Derivatives under the integral sign, at fixed nodes.

    ``d f / d log p = p u`` and ``d f / d log q = q - p = -q expm1(u)``, both zero, not small, where p = q.
    """
    blocks = _row_blocks(inputs)
    if blocks is not None:
        results = zip(*(_gradient(tuple(block), saved) for block in blocks), strict=True)
        return tuple(torch.cat(parts).reshape(x.shape) for parts, x in zip(results, inputs, strict=True))
    rows: Inputs = inputs[:6]  # type: ignore[assignment]
    all_high, all_low, all_weight, all_width = _rule(rows)
    grads = [torch.zeros_like(x) for x in rows]
    for block in _panel_blocks(all_width.shape[-2], inputs):
        high, low, weight = (x[block].flatten(-2) for x in (all_high, all_low, all_weight))
        log_pk, z_p = _component_log_densities(*rows[:3], high, low)
        log_qk, z_q = _component_log_densities(*rows[3:], high, low)
        log_p, log_q = _logsumexp(log_pk), _logsumexp(log_qk)
        u, _ = _log_ratio(rows, high, low, log_p, log_q)
        u, log_ratio = u.unsqueeze(-2), (log_p - log_q).unsqueeze(-2)
        small, q_k = u < 1.0, torch.exp(log_qk)
        # expm1(u) may overflow where q_k is 0; (q - p) times the posterior of q does not
        mass = torch.where(
            small,
            -expm1(torch.where(small, u, 0.0)) * q_k,
            q_k - torch.exp(log_qk + torch.where(small, 0.0, log_ratio)),
        )
        for i, density, z, scale in (0, torch.exp(log_pk) * u, z_p, rows[2]), (3, mass, z_q, rows[5]):
            density = weight.unsqueeze(-2) * density
            grads[i] = grads[i] + density.sum(-1)
            grads[i + 1] = grads[i + 1] + (density * z).sum(-1) / scale
            grads[i + 2] = grads[i + 2] + (density * (z * z - 1.0)).sum(-1) / scale
    return (*grads, torch.zeros_like(inputs[6]))


def _known_value(*inputs: Tensor) -> tuple[Tensor]:
    return (inputs[6].clone(),)


_with_gradient = rowwise(_known_value, _gradient)


def line_kl(p: Components, q: Components) -> tuple[Tensor, Tensor]:
    r"""``KL(p || q) = \int q phi(log(p/q)) dx``, ``phi(u) = u e^u - e^u + 1``, in one dimension.

    Weights are taken as they are: where they do not sum to one this is the divergence of measures,
    ``\int p log(p/q) - p + q``, whose derivatives with respect to log-weights differ from those of
    ``\int p log(p/q)`` by a multiple of the weights, which ``log_softmax`` removes.

    Args:
        p: the first mixture, D = 1, float64.
        q: the second, with the same batch shape and any number of components.

    Returns:
        The divergence, differentiable any number of times, and a bound on its error (not
        differentiable), both of the batch shape.
    """
    inputs = tuple(
        x
        for c in (p, q)
        for x in (c.log_weights, c.loc[..., 0], c.scale[..., 0] if c.is_diagonal else c.scale[..., 0, 0])
    )
    value, error = _integrate([x.detach() for x in inputs])
    return _with_gradient(*inputs, value), error
