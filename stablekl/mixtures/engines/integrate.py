r"""KL divergence of two densities on a line of which nothing but ``log_prob`` is known, by adaptive quadrature.

The integrand is :math:`p (e^{-u} - 1 + u)`, u = log p - log q, never negative: evaluated as p u + q - p where u is
large. It is that of KL only if q has no mass off the support of p, for whose mass there p u itself is taken instead. On
the axis of `axis` it is integrated by Gauss-Legendre panels, which are halved, those of the largest error first, until
the estimate of the error is met. Beyond the last float the logarithms of the densities go on as straight lines.

What the error consists of: the last Legendre coefficients of the panels, and what changes where they are halved once
more; rounding; what ``log_prob`` loses, which shows when the last bits of the parameters move; the tails by
extrapolation, and the noise of their slopes; and the mass of p and of q that is missing or too much, times the largest
logarithm of the ratio where p has that much mass. Where more than a thousandth of p's mass is not found, or a tail that
has mass is noise, the error is inf. What it cannot contain: a constant by which ``log_prob`` of q is off by itself, if
q's support is larger than p's; and what p log q adds where p is below the smallest float.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from ..._autograd import is_eager
from ...distributions._base import broadcast_shape, check_batch_shapes, common_dtype, mapped
from ...quadrature import gauss_legendre
from ...special import expm1mx
from ..estimate import AccuracyWarning, KLEstimate
from .axis import Axis, bounds, edges, middle
from .tails import SMALL, Values, tail_beyond

__all__ = ["integrate_kl"]

_NODES = 16
_HALVED = 24  # panels of a row that are halved at a time
_ROUNDS = 40
_GOAL = 1e-13  # relative; less is asked of a coarser tolerance
_EPS = 2.0**-52
_BITS = (-7, -5, -3, -1, 2, 3, 4, 6)  # by which parameters are moved to see what log_prob loses
_LARGE = 1e100  # scale of what has its quartiles beyond the last float
_LACKING = 1e-6  # mass of p where q is 0
_UNSEEN = 1e-3  # mass of p that is not found, from which on nothing is known


def _widened(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _unchecked(distribution: Distribution) -> None:
    """No checks of values, which points beyond the last float would not pass."""
    distribution._validate_args = False
    for item in distribution.__dict__.values():
        if isinstance(item, Distribution):
            _unchecked(item)


class _Problem(NamedTuple):
    """Two densities on an axis, which rows of parameters share.

    Attributes:
        p: the first distribution, in float64.
        q: the second.
        axis: whose points are asked for.
        shape: the batch shape.
        alike: rows of which q's mass is where p's is.
    """

    p: Distribution
    q: Distribution
    axis: Axis
    shape: torch.Size
    alike: Tensor

    def logs(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The point, log(dx/dy), and the logarithms of both densities of y."""
        x, log_slope = self.axis.at(y)
        point = x.reshape(*x.shape[:-1], *self.shape)
        log_p, log_q = (d.log_prob(point).reshape(x.shape) + log_slope for d in (self.p, self.q))
        return x, log_slope, log_p, log_q

    def at(self, y: Tensor) -> Values:
        """Everything at points."""
        x, log_slope, log_p, log_q = self.logs(y)
        # where q is unknown, or 0 by underflow, p is left out too, and missing of its mass
        none = ~(log_p.isfinite() & log_q.isfinite())
        log_p = torch.where(none, -torch.inf, log_p)
        unknown = log_q.isnan() | (log_q == torch.inf)
        u = torch.where(none, 0.0, torch.where(none, 0.0, log_p) - torch.where(none, 0.0, log_q))
        mass_p = torch.where(none, 0.0, torch.exp(torch.where(none, 0.0, log_p)))
        mass_q = torch.where(unknown, 0.0, torch.exp(torch.where(unknown, 0.0, log_q)))
        # p = 0 to the last float: 0 inf would be NaN
        plain = torch.where(mass_p > 0, mass_p * torch.where(mass_p > 0, u, 0.0), 0.0)
        small = (u.abs() < SMALL) & ~none
        near = mass_p * expm1mx(-torch.where(small, u, 0.0))
        positive = torch.where(small, near, plain + (mass_q - mass_p))
        # y moves by this when x is rounded
        shift = x.detach().abs() * torch.exp(-log_slope)
        return Values(torch.where(self.alike, positive, plain), shift, log_p, u, mass_p, mass_q)

    def moved(self, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Both logarithms with the last bits of the parameters changed."""
        for k in _BITS:
            factor = 1 + k * _EPS
            p, q = (mapped(d, lambda x, f=factor: x * f if x.is_floating_point() else x) for d in (self.p, self.q))  # type: ignore[misc]
            yield self._replace(p=p, q=q).logs(y)[2:]

    def noise(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """What ``log_prob`` loses, from how both logarithms change with the last bits of the parameters."""
        _, log_slope, *logs = self.logs(y)
        found = [2 * _EPS * (x.abs() + log_slope.abs()) for x in logs]
        for moved in self.moved(y):
            for i, (new, old) in enumerate(zip(moved, logs, strict=True)):
                change = (new - old).abs()
                found[i] = torch.maximum(found[i], torch.where(change.isfinite(), change, 0.0))
        return found[0], found[1]


def _panel_values(values: Values, width: Tensor) -> Tensor:
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


def _nodes(left: Tensor, width: Tensor) -> Tensor:
    unit = gauss_legendre(_NODES, left.device)[0].unsqueeze(-1)
    return left.unsqueeze(-2) + width.unsqueeze(-2) * unit


def _clipped(problem: _Problem, edge: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """The edges, no further out than both densities are known where p has mass; and where q lacks a part of p's."""
    left, right = edge[:-1], edge[1:]
    y = _nodes(left, right - left)
    _, _, log_p, log_q = problem.logs(y)
    alive = (log_p > -745) | log_p.isnan()
    good = ~alive | (log_p.isfinite() & log_q.isfinite())
    lacking = log_p.isfinite() & (log_q == -torch.inf)
    if bool((alive & lacking).any()):  # in earnest, and not by what log_prob has lost
        for moved_p, moved_q in problem.moved(y):
            lacking = lacking & moved_p.isfinite() & (moved_q == -torch.inf)
    weight = gauss_legendre(_NODES, edge.device)[1].unsqueeze(-1) * (right - left).unsqueeze(-2)
    excluded = (weight * torch.where(lacking, torch.exp(log_p.clamp(max=700)), 0.0)).sum((0, 1)) > _LACKING
    y = y.flatten(0, 1)
    bad = ~good.flatten(0, 1)
    low = torch.where(bad & (y < centre), y, -torch.inf).amax(0)
    high = torch.where(bad & (y >= centre), y, torch.inf).amin(0)
    first = torch.where(y > low, y, torch.inf).amin(0)
    last = torch.where(y < high, y, -torch.inf).amax(0)
    first, last = torch.where(low.isfinite(), first, edge[0]), torch.where(high.isfinite(), last, edge[-1])
    return torch.minimum(torch.maximum(edge, first), last), excluded


def _refined(problem: _Problem, edge: Tensor, rtol: float) -> tuple[Tensor, Tensor, Tensor]:
    """The ends of the panels, and their `_panel_values`."""
    left, right = edge[:-1], edge[1:]
    found = _panel_values(problem.at(_nodes(left, right - left)), right - left)
    for _ in range(_ROUNDS):
        total, error, rounding = found[:3].sum(1)
        done = (error <= min(rtol, _GOAL) * total.abs() + 4 * _EPS * rounding) | ~total.isfinite()
        if bool(done.all()):
            break
        a, b, worst = _halved(left, right, found[1].nan_to_num(nan=torch.inf))
        more = _panel_values(problem.at(_nodes(a, b - a)), b - a)
        kept = torch.ones_like(left, dtype=torch.bool).scatter(0, worst, False)
        order = kept.to(torch.int8).sort(dim=0, descending=True, stable=True)[1][: left.shape[0] - worst.shape[0]]
        left, right = (torch.cat([x.gather(0, order), y]) for x, y in ((left, a), (right, b)))
        found = torch.cat([found.gather(1, order.expand(5, *order.shape)), more], 1)
    return left, right, found


class _Found(NamedTuple):
    """Panels, and everything but what is differentiated; one number a row."""

    left: Tensor
    right: Tensor
    tails: Tensor
    error: Tensor
    infinite: Tensor
    mass_q: Tensor


def _found(problem: _Problem, edge: Tensor, same: Tensor, rtol: float) -> _Found:
    """Panels for a row each, and an estimate of the error from all that is known to be uncertain."""
    left, right, found = _refined(problem, edge, rtol)
    total, error, rounding, mass_p, mass_q = found.sum(1)
    tails = []
    eighth = (edge[-1] - edge[0]) / 8
    step = (0.5 * eighth).clamp(max=4.0)
    back = torch.stack([0 * step, step, 2 * step, eighth, eighth + step])
    for y in (edge[0] + back, edge[-1] - back):
        tails.append(tail_beyond(problem.at(y), problem.noise(y), problem.alike, step))
    for tail in tails:
        total, error = total + tail.value, error + tail.error
        mass_p, mass_q = mass_p + tail.mass_p, mass_q + tail.mass_q
    # Once more by halves of the panels: noise of log_prob is no part of what a polynomial leaves.
    half = 0.5 * (left + right)
    again = sum(_panel_values(problem.at(_nodes(a, b - a)), b - a) for a, b in ((left, half), (half, right)))
    moved = (again - found).abs().sum(1)
    y = _nodes(left, right - left)
    values, (noise_p, noise_q) = problem.at(y), problem.noise(y)
    part = (values.u.abs() + noise_p + noise_q).clamp(max=1.0)
    lost = values.mass_p * ((noise_p + noise_q) * part + noise_p * values.u.abs())
    lost = torch.where(values.mass_p > 0, lost, 0.0)  # not 0 inf
    weight = gauss_legendre(_NODES, edge.device)[1].unsqueeze(-1) * (right - left).unsqueeze(-2)
    error = error + moved[0] + 4 * (weight * lost).sum((0, 1)) + 16 * _EPS * rounding
    # what of p is missing may be where the logarithm is as large as anywhere where p has that much mass
    missed = (mass_p - 1).abs() + moved[3]
    seen = weight * values.mass_p > 1e-3 * missed
    largest = torch.where(seen, values.u.abs(), 0.0).amax((0, 1))
    # that little is rounding, and relative
    elsewhere = torch.where(missed > 1e-11, 1 + largest, total.abs() + torch.where(problem.alike, 0.0, 1.0))
    error = error + 2 * missed * elsewhere
    error = torch.where((missed > _UNSEEN) | ~total.isfinite(), torch.inf, error)
    # q's is part of the integrand, or tells that its logarithm is wrong
    missed_q = torch.where(mass_q > 1, torch.log(mass_q), 1 - mass_q) + moved[4]
    missed_q = torch.where(missed_q > 1e-11, missed_q, missed_q * largest.clamp(max=1.0))
    error = error + torch.where(same, 2 * missed_q, 0.0)
    infinite = tails[0].infinite | tails[1].infinite
    return _Found(left, right, tails[0].value + tails[1].value, error, infinite, mass_q)


def integrate_kl(p: Distribution, q: Distribution, rtol: float) -> KLEstimate:
    """KL(p || q) in float64 for continuous densities on intervals; eager mode.

    Args:
        p: with ``log_prob``, ``support`` and one of ``icdf`` and ``sample``.
        q: likewise; batch shapes broadcast.
        rtol: the error asked for, relative to KL; never more than 1e-13.

    Returns:
        The divergence, differentiable as far as ``log_prob`` is (the points are held fixed), with an estimate of its
        error; inf where p has mass off the support of q, or a tail that q's does not bear.

    Warns:
        AccuracyWarning: the mass of p cannot be resolved in float64, or ``log_prob`` is NaN or noise where it is. The
            error is inf there.
    """
    check_batch_shapes(p, q)
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
        _unchecked(d)
    rows = torch.zeros(shape, dtype=torch.float64, device=tensors[0].device)
    ends = [tuple(x.reshape(-1) for x in bounds(d, rows)) for d in (p, q)]
    (low, high), (low_q, high_q) = ends
    outside = (low < low_q) | (high > high_q)
    inner = torch.finfo(rows.dtype).tiny
    quartiles = [middle(d, shape) for d in (p, q)]
    first, median, third = quartiles[0]
    spread = (third - first).clamp(min=inner)
    # the far quartile: the near one may have sunk into the end
    scale = torch.where(low.isfinite(), third - low, torch.where(high.isfinite(), high - first, spread))
    axis = Axis(low, high, median.clamp(-_LARGE, _LARGE), scale.nan_to_num(nan=_LARGE).clamp(min=inner, max=_LARGE))
    same = (low == low_q) & (high == high_q)
    problem = _Problem(p, q, axis, shape, same)

    with torch.no_grad():
        edge, excluded = _clipped(problem, edges(axis, *quartiles), axis.of(axis.centre))
        found = _found(problem, edge, same, rtol)
        # q's mass is that of p only where the axis has it; else it is not needed
        alike = same & ((found.mass_q - 1).abs() < 1e-6)
        if bool((alike != same).any()):
            problem = problem._replace(alike=alike)
            found = _found(problem, edge, same, rtol)
        known = outside | found.infinite
        infinite = known | excluded
    values = problem.at(_nodes(found.left, found.right - found.left))
    weight = gauss_legendre(_NODES, rows.device)[1].unsqueeze(-1)
    integral = ((weight * torch.where(infinite, 0.0, values.integrand)).sum(-2) * (found.right - found.left)).sum(0)
    value = torch.where(infinite, torch.inf, integral + found.tails)
    # a divergence that is negative is none
    unresolved = found.error.isnan() | value.isnan() | (value.detach() < -found.error)
    error = torch.where(infinite | unresolved, torch.inf, found.error)
    given_nan = quartiles[0][1].isnan() | quartiles[1][1].isnan()
    _warn_of_unresolved(error.isinf() & ~known & ~given_nan)
    value = torch.where(given_nan, torch.nan, torch.where(value.isnan(), 0.0, value).clamp(min=0.0)).reshape(shape)
    error = torch.where(given_nan, torch.nan, error).reshape(shape)
    found_all = KLEstimate(value, error, torch.zeros_like(error), torch.full_like(error, torch.inf), "integrate")
    return found_all.rounded(common_dtype(*(x for x in tensors if x.is_floating_point())))


def _warn_of_unresolved(rows: Tensor) -> None:
    if bool(rows.any()):
        warnings.warn(
            f"method 'integrate' does not resolve the mass of p, or gets no more than noise from log_prob, in batch "
            f"element {int(rows.nonzero()[0])} (of {rows.numel()}, flattened): the error is inf. Parameters of this "
            "size need a closed form, stablekl.kl_divergence, or another unit; stablekl's classes have more accurate "
            "log-densities than torch's.",
            AccuracyWarning,
            stacklevel=4,
        )
