r"""KL divergence of two densities on a line of which nothing but ``log_prob`` is known, by adaptive quadrature.

The integrand is :math:`p (e^{-u} - 1 + u)`, u = log p - log q, never negative: evaluated as p u + q - p where u is
large. It is that of KL only if q has no mass off the support of p, for whose mass there p u itself is taken instead. On
the axis of `axis` it is integrated by Gauss-Legendre panels, which are halved, those of the largest error first, until
the estimate of the error is met. Beyond the last float the logarithms of the densities go on as straight lines.

What the error consists of: the last Legendre coefficients of the panels; rounding; the tails by extrapolation; and the
mass of p and of q that the panels have missed, which is all that can be said of a peak between the points.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from ..._autograd import is_eager
from ...distributions._base import broadcast_shape, common_dtype, mapped
from ...quadrature import gauss_legendre
from ...special import expm1mx
from ..estimate import KLEstimate
from .axis import Axis, bounds, edges, middle

__all__ = ["integrate_kl"]

_NODES = 16
_HALVED = 24  # panels of a row that are halved at a time
_ROUNDS = 40
_GOAL = 1e-13  # relative; less is asked of a coarser tolerance
_EPS = 2.0**-52
_SMALL = 0.35


class _Values(NamedTuple):
    """Everything at points, as densities of y."""

    integrand: Tensor
    shift: Tensor
    log_p: Tensor
    u: Tensor
    mass_p: Tensor
    mass_q: Tensor


def _widened(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _evaluated(p: Distribution, q: Distribution, axis: Axis, y: Tensor, shape: torch.Size, alike: Tensor) -> _Values:
    x, log_slope = axis.at(y)
    point = x.reshape(*x.shape[:-1], *shape)
    log_p, log_q = (d.log_prob(point).reshape(x.shape) + log_slope for d in (p, q))
    none = (log_p == -torch.inf) | log_p.isnan()
    log_p = torch.where(none, -torch.inf, log_p)
    u = torch.where(none, 0.0, torch.where(none, 0.0, log_p) - torch.where(none & log_q.isinf(), 0.0, log_q))
    u = torch.where(log_q.isnan() & ~none, torch.inf, u)
    mass_p = torch.where(none, 0.0, torch.exp(torch.where(none, 0.0, log_p)))
    mass_q = torch.where(log_q.isnan(), 0.0, torch.exp(torch.where(log_q.isnan(), 0.0, log_q)))
    # p = 0 to the last float: 0 inf would be NaN
    plain = torch.where(mass_p > 0, mass_p * torch.where(mass_p > 0, u, 0.0), 0.0)
    small = u.abs() < _SMALL
    near = mass_p * expm1mx(-torch.where(small, u, 0.0))
    positive = torch.where(small, near, plain + (mass_q - mass_p))
    # y moves by this when x is rounded
    shift = x.detach().abs() * torch.exp(-log_slope)
    return _Values(torch.where(alike, positive, plain), shift, log_p, u, mass_p, mass_q)


def _panel_values(values: _Values, width: Tensor) -> Tensor:
    """Integral, error, size of the terms that were rounded, and masses of p and q, ``(5, panels, rows)``."""
    _, weight, last = gauss_legendre(_NODES, width.device)
    weight, last = weight.unsqueeze(-1), last.unsqueeze(-1)
    f = values.integrand
    coefficient = (last * f).sum(-2).abs()
    largest = f.abs().amax(-2)
    share = (coefficient / torch.where(largest > 0, largest, 1.0)).clamp(max=1.0)
    rounded = values.mass_p * torch.where(
        values.mass_p > 0, values.u.abs().clamp(max=1.0) * (1 + values.log_p.abs()), 0
    )
    moved_by = torch.where(f[..., 1:, :] == f[..., :-1, :], 0.0, values.shift[..., 1:, :] * f.diff(dim=-2).abs()).sum(
        -2
    )
    sums = [(weight * g).sum(-2) for g in (f, f.abs() + rounded, values.mass_p, values.mass_q)]
    result = torch.stack([sums[0], coefficient * share, *sums[1:]]) * width
    result[2] += moved_by
    return result


def _halved(left: Tensor, right: Tensor, error: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The worst panels of each row in two, and which they were."""
    worst = error.topk(min(_HALVED, error.shape[0]), 0).indices
    a, b = left.gather(0, worst), right.gather(0, worst)
    half = 0.5 * (a + b)
    return torch.cat([a, half]), torch.cat([half, b]), worst


def _tail(values: _Values, alike: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What lies beyond an end, from the values at 0, 2 and 4 before it; its error; and where it is infinite."""
    log_p, u = values.log_p, values.u
    alive = log_p[0] > -800
    fall = torch.where(alive, 0.5 * (log_p[1] - log_p[0]), 1.0)
    rise = torch.where(alive, 0.5 * (u[0] - u[1]), 0.0)
    bend = torch.where(alive, (u[0] - 2 * u[1] + u[2]).abs() + (log_p[0] - 2 * log_p[1] + log_p[2]).abs(), 0.0)
    straight = bend < 1e-3 * (rise.abs() + fall.abs())
    mass, level = torch.exp(log_p[0]), torch.where(alive, u[0], 0.0)
    # the integral of e^(-fall t)(level + rise t)
    linear = mass * (level + rise / fall) / fall
    q_fall = fall + rise
    small = level.abs() < _SMALL
    near = torch.where(small, level, 0.0)
    both = expm1mx(-near) / fall + rise * rise / (fall * fall * q_fall) - rise * torch.expm1(-near) / (fall * q_fall)
    far = (level - 1 + rise / fall) / fall + torch.exp(-level) / q_fall
    positive = torch.where(q_fall > 0, mass * torch.where(small, both, far), linear)
    # u a power of x: p u is exponential
    log_f = [a + torch.log(b.abs()) for a, b in zip(log_p[:2], u[:2], strict=True)]
    decay = torch.where(alive, 0.5 * (log_f[1] - log_f[0]), 1.0)
    power = torch.exp(log_f[0]) / decay
    value = torch.where(straight, torch.where(alike, positive, linear), power)
    error = torch.where(straight, (1e-9 + 10 * bend / (fall.abs() + rise.abs())) * value.abs(), 0.3 * value.abs())
    infinite = alive & ((fall <= 0) | (~straight & (decay <= 1e-6)) | (u[0] == torch.inf))
    nothing = ~alive | infinite
    return torch.where(nothing, 0.0, value), torch.where(nothing, 0.0, error), infinite


def integrate_kl(p: Distribution, q: Distribution, rtol: float) -> KLEstimate:
    """KL(p || q) in float64 for continuous densities on intervals; eager mode.

    Args:
        p: with ``log_prob``, ``support`` and one of ``icdf`` and ``sample``.
        q: likewise; batch shapes broadcast.
        rtol: the error asked for, relative to KL; never more than 1e-13.

    Returns:
        The divergence, differentiable as far as ``log_prob`` is (the points are held fixed), with an estimate of its
        error; inf where p has mass off the support of q, or a tail that q's does not bear.
    """
    shape = broadcast_shape(p.batch_shape, q.batch_shape)
    tensors: list[Tensor] = []
    p, q = (mapped(d, lambda x: tensors.append(x) or _widened(x)) for d in (p, q))  # type: ignore[func-returns-value]
    if p.event_shape or q.event_shape or not tensors:
        raise NotImplementedError(
            f"method 'integrate' takes distributions of scalars with parameters, and the event shapes are "
            f"{tuple(p.event_shape)} and {tuple(q.event_shape)}"
        )
    if not is_eager(*tensors):
        raise NotImplementedError(
            "method 'integrate' chooses its points by looking at the densities, which torch.compile and vmap do not "
            "allow: call it outside of them"
        )
    for d in (p, q):
        d._validate_args = False
    rows = torch.zeros(shape, dtype=torch.float64, device=tensors[0].device)
    ends = [tuple(x.reshape(-1) for x in bounds(d, rows)) for d in (p, q)]
    (low, high), (low_q, high_q) = ends
    outside = (low < low_q) | (high > high_q)
    alike = (low == low_q) & (high == high_q)
    inner = torch.finfo(rows.dtype).tiny
    quartiles = [middle(d, shape) for d in (p, q)]
    first, median, third = quartiles[0]
    spread = (third - first).clamp(min=inner)
    # the far quartile: the near one may have sunk into the end
    scale = torch.where(low.isfinite(), third - low, torch.where(high.isfinite(), high - first, spread))
    axis = Axis(low, high, median, scale.clamp(min=inner))

    unit = gauss_legendre(_NODES, rows.device)[0].unsqueeze(-1)

    def nodes(left: Tensor, width: Tensor) -> Tensor:
        return left.unsqueeze(-2) + width.unsqueeze(-2) * unit

    with torch.no_grad():
        edge = edges(axis, *quartiles)
        left, right = edge[:-1], edge[1:]
        found = _panel_values(_evaluated(p, q, axis, nodes(left, right - left), shape, alike), right - left)
        for _ in range(_ROUNDS):
            total, error, rounding = found[:3].sum(1)
            done = (error <= min(rtol, _GOAL) * total.abs() + 4 * _EPS * rounding) | ~total.isfinite()
            if bool(done.all()):
                break
            a, b, worst = _halved(left, right, found[1].nan_to_num(nan=torch.inf))
            more = _panel_values(_evaluated(p, q, axis, nodes(a, b - a), shape, alike), b - a)
            kept = torch.ones_like(left, dtype=torch.bool).scatter(0, worst, False)
            order = kept.to(torch.int8).sort(dim=0, descending=True, stable=True)[1][: left.shape[0] - worst.shape[0]]
            left, right = (torch.cat([x.gather(0, order), y]) for x, y in ((left, a), (right, b)))
            found = torch.cat([found.gather(1, order.expand(5, *order.shape)), more], 1)
        total, error, rounding, mass_p, mass_q = found.sum(1)
        first_y, last_y = axis.ends()
        back = torch.tensor([0.0, 2.0, 4.0], dtype=rows.dtype, device=rows.device).unsqueeze(-1)
        beyond = [_evaluated(p, q, axis, y, shape, alike) for y in (first_y + back, last_y - back)]
        infinite, tails, mass_beyond = outside, torch.zeros_like(total), torch.zeros_like(total)
        for values in beyond:
            value, uncertain, diverges = _tail(values, alike)
            infinite, tails, error = infinite | diverges, tails + value, error + uncertain
            fall = (0.5 * (values.log_p[1] - values.log_p[0])).clamp(min=1e-300)
            mass_beyond = mass_beyond + torch.where(values.log_p[0] > -800, values.mass_p[0] / fall, 0.0)
        missed = (mass_p + mass_beyond - 1).abs()
        missed = torch.where(missed > 1e-11, missed, 0.0)
        missed_q = torch.where(alike & (tails == 0), (mass_q - 1).abs(), 0.0)
        missed_q = torch.where(missed_q > 1e-11, missed_q, 0.0)
        error = error + 16 * _EPS * rounding + missed * (1 + total.abs() / mass_p.clamp(min=inner)) + missed_q
        infinite = infinite | total.isinf()
    values = _evaluated(p, q, axis, nodes(left, right - left), shape, alike)
    weight = gauss_legendre(_NODES, rows.device)[1].unsqueeze(-1)
    value = ((weight * torch.where(infinite, 0.0, values.integrand)).sum(-2) * (right - left)).sum(0) + tails
    value = torch.where(infinite, torch.inf, value.clamp(min=0.0)).reshape(shape)
    error = torch.where(infinite, torch.inf, error).reshape(shape)
    found_all = KLEstimate(value, error, torch.zeros_like(error), torch.full_like(error, torch.inf), "integrate")
    return found_all.rounded(common_dtype(*(x for x in tensors if x.is_floating_point())))
