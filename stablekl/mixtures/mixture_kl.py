"""KL divergence of two mixtures of which the second has several components: each row by the engine it suits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .components import Components
from .engines.adaptive import FIRST_BUDGET, adaptive_cross, adaptive_kl, cross_tasks
from .engines.contour import contour_kl
from .engines.contour_plane import contour_kl_of_three
from .engines.cubature import cubature_kl
from .engines.line import line_kl
from .engines.projection import Subspace, projected, subspace
from .estimate import Method
from .information import (
    CAUTION,
    CUBATURE_ERROR,
    NODES_PER_POINT,
    POINTS,
    Information,
    by_engine,
    cubature_tolerance,
    gathered,
    improved,
    least_exact,
    mixture_information,
)
from .weights import label_entropy, weighted

__all__ = ["EXACT_ERROR", "by_subspace", "mixture_kl", "parameter_rounding", "positive_where_sampled"]

# Bounds on the error of the exact engines, relative to 1 + S: twice what was observed against mpmath.
EXACT_ERROR = 4e-14
# A divergence below this many times what a projection may have lost is computed again, with 1e-6 of that left out, down
# to the rounding errors of a well-conditioned problem. (The gradient misses the root of what the value does.)
LOSSY, TIGHTER, ROUNDING = 1e6, 1e-6, 1e-28
# A divergence below this many times the error of a difference is computed again by positive terms.
FEW_DIGITS = 1e3
# What the plane of a mixture q of three is asked for: two doublings more than for 1e-4.
PLANE = 1e-8
# By how much the triples of a cross term, which the first points are taken without, reduce its error as a rule.
GAIN = 2.0
# Near p = q a cubature in space that is relative to the divergence costs seconds at 3e-7, a few tenths of one at this.
NEARBY = 1e-5


def parameter_rounding(p: Components, q: Components, value: Tensor, moved: int = 0) -> Tensor:
    """What the rounding of log-weights, means and scales on a line changes a divergence by.

    A perturbation of log p by d changes KL by sqrt(2 KL E d^2) to leading order: nothing beside 1, but near p = q more
    than the integral's own error, which takes its parameters to be exact.

    Args:
        p: the first mixture, in one dimension.
        q: the second.
        value: the divergence.
        moved: the dimensions from which means and scales were projected; 0 where they are the caller's.
    """
    weights = torch.exp(p.log_weights)
    alive = weights > 0
    change = torch.where(alive, 1 - p.log_weights, 0.0)
    if p.log_weights.shape[-1] == q.log_weights.shape[-1]:
        change = torch.where(p.log_weights == q.log_weights, 0.0, change)
    elif min(p.log_weights.shape[-1], q.log_weights.shape[-1]) == 1:  # a Gaussian has the weights of the other
        change = torch.zeros_like(change)
    square = change.square()
    if moved:
        scale = p.scale if p.is_diagonal else p.scale.squeeze(-1)
        square = square + moved * (2 + (p.loc / scale).squeeze(-1).square())
    size = (weights * torch.where(alive, square, 0.0)).sum(-1).sqrt()
    return 4 * torch.finfo(size.dtype).eps * size * (2 * value.clamp(min=0)).sqrt()


def mixture_kl(
    method: Method, p: Components, q: Components, rtol: float, max_points: int | None, slack: float, dim: int = 0
) -> Information:
    """One engine for all rows; those on a line projected from ``dim`` dimensions."""
    if method == "line":
        value, error = line_kl(p, q)
        error = error + parameter_rounding(p, q, value, dim).detach()
    elif method == "cubature":
        value, error = cubature_kl(p, q, rtol=rtol, max_points=_nodes(p, max_points))
    elif method == "contour":
        parts, part_error = contour_kl(p, q) if q.log_weights.shape[-1] == 2 else _plane(p, q, rtol)
        mean_kl = weighted(p.log_weights, parts)
        goal = rtol * (1 + (mean_kl.detach() - label_entropy(p.log_weights)).clamp(min=0))
        found = mixture_information(p, goal, max_points, slack)
        error = weighted(p.log_weights, part_error).detach() + found.error + EXACT_ERROR * (1 + mean_kl.detach())
        return by_engine(mean_kl - found.value, error, least_exact(method, found.method))
    else:
        value, error = adaptive_kl(p, q, rtol, max_points)
        error = error + EXACT_ERROR * (1 + value.detach())
    return by_engine(value, error, method)


def _rows(c: Components, index: Tensor) -> Components:
    return Components(*(x.index_select(0, index) for x in c))


def _plane(p: Components, q: Components, rtol: float) -> tuple[Tensor, Tensor]:
    """KL of each component of p to a mixture q of three, and its error."""
    parts = contour_kl_of_three(p.flattened(), q.flattened(), min(PLANE, 0.01 * rtol))
    value, error = (x.reshape(p.log_weights.shape) for x in parts)
    return value, error


def _by_plane(p: Components, q: Components, rtol: float, max_points: int | None, slack: float) -> Information:
    """For a mixture q of three: a plane of contours, and another way where that is not enough."""
    parts, part_error = _plane(p, q, rtol)
    mean_kl = weighted(p.log_weights, parts)
    size = 1 + mean_kl.detach()
    goal = 0.5 * rtol * (1 + (mean_kl.detach() - label_entropy(p.log_weights)).clamp(min=0))
    found = mixture_information(p, goal, max_points, slack)
    # an infinite error of a component without weight is none
    error = weighted(p.log_weights, part_error).detach() + found.error + EXACT_ERROR * size
    result = by_engine(mean_kl - found.value, error, least_exact("contour", found.method))
    missed = (~(error <= rtol * size)).nonzero().squeeze(-1)
    if not missed.numel():
        return result
    other = _in_few_dimensions if p.loc.shape[-1] == 3 else _sampled
    return improved(result, missed, other(_rows(p, missed), _rows(q, missed), rtol, max_points, slack))


def _sampled(p: Components, q: Components, rtol: float, max_points: int | None, slack: float) -> Information:
    """By positive terms where that is accurate enough at once or better, else as the difference of S and I.

    The integrand of the first has no control variate and its error goes with KL; that of the second is far more
    accurate but absolute.
    """
    value, error = adaptive_kl(p, q, rtol, min(FIRST_BUDGET, max_points or FIRST_BUDGET))
    hard = (error > rtol * (1 + value.detach())).nonzero().squeeze(-1)
    if not hard.numel():
        return by_engine(value, error, "sobol")
    here_p, here_q = _rows(p, hard), _rows(q, hard)
    tasks = cross_tasks(here_p, here_q)
    by_difference = tasks.error < GAIN * error[hard]
    for difference in (False, True):
        chosen = (by_difference == difference).nonzero().squeeze(-1)
        if not chosen.numel():
            continue
        part_p = _rows(here_p, chosen)
        if difference:
            mean_kl, part_error = adaptive_cross(tasks.rows(chosen), 0.5 * rtol, max_points)
            goal = 0.5 * rtol * (1 + (mean_kl.detach() - label_entropy(part_p.log_weights)).clamp(min=0))
            found = mixture_information(part_p, goal, max_points, slack)
            part, part_error = mean_kl - found.value, part_error + found.error
        else:
            part, part_error = adaptive_kl(part_p, _rows(here_q, chosen), rtol, max_points)
        value = value.index_copy(0, hard[chosen], part)
        error = error.index_copy(0, hard[chosen], part_error)
    return by_engine(value, error + EXACT_ERROR * (1 + value.detach()), "sobol")


def _nodes(p: Components, max_points: int | None) -> int:
    """Most nodes where so many points may be sampled: in space half of them left scales 1e3 apart at 5e-6 (1 + S)."""
    return (2 if p.loc.shape[-1] == 3 else 1) * NODES_PER_POINT * (max_points or POINTS)


def _by_cubature(p: Components, q: Components, tolerance: Tensor, max_points: int | None) -> Information:
    value, error = torch.zeros_like(p.log_weights[:, 0]), torch.zeros_like(p.log_weights[:, 0].detach())
    for fine in tolerance.unique().tolist():  # each row its own, whatever else is in the batch
        index = (tolerance == fine).nonzero().squeeze(-1)
        here = _rows(p, index), _rows(q, index)
        part, part_error = cubature_kl(*here, rtol=fine, max_points=_nodes(p, max_points))
        value, error = value.index_copy(0, index, part), error.index_copy(0, index, part_error)
    return by_engine(value, error, "cubature")


def _in_few_dimensions(p: Components, q: Components, rtol: float, max_points: int | None, slack: float) -> Information:
    """By cubature, and where its nodes do not suffice by what samples better."""
    found = _by_cubature(p, q, cubature_tolerance(p).clamp(max=rtol), max_points)
    error = CAUTION * found.error + 1e2 * CUBATURE_ERROR * found.value.detach()
    found = found._replace(error=error)
    missed = (found.error > rtol * (1 + found.value.detach())).nonzero().squeeze(-1)
    if not missed.numel():
        return found
    other = _by_plane if q.log_weights.shape[-1] == 3 and p.loc.shape[-1] == 2 else _sampled
    return improved(found, missed, other(_rows(p, missed), _rows(q, missed), rtol, max_points, slack))


def _positive_where_small(
    found: Information, p: Components, q: Components, seen: Subspace, rank: int, rtol: float, max_points: int | None
) -> Information:
    """Rows where a difference leaves few digits, near p = q, anew by an integral of positive terms."""
    for engine in ("cubature", "sobol") if 2 <= rank <= 3 else ("sobol",):
        few = (found.value.detach() < FEW_DIGITS * found.error).nonzero().squeeze(-1)
        if not few.numel():
            return found
        here_p, here_q = _rows(p, few), _rows(q, few)
        if engine == "sobol":
            other = by_engine(*adaptive_kl(here_p, here_q, rtol, max_points), engine)
        else:
            if rank < p.loc.shape[-1]:
                here_p, here_q = (projected(c, seen.basis[few, :rank], seen.origin[few]) for c in (here_p, here_q))
            fine = cubature_tolerance(here_p).clamp(min=NEARBY if rank == 3 else 0.0)
            other = _by_cubature(here_p, here_q, fine, max_points)
            other = other._replace(error=other.error + seen.loss[few])
        found = improved(found, few, other)
    return found


def positive_where_sampled(
    found: Information, p: Components, q: Components, rtol: float, max_points: int | None
) -> Information:
    """Rows where a sampled difference misses the tolerance, or leaves few digits, anew by positive terms.

    Args:
        found: ``KL(p || q)`` as a difference, of the batch shape.
        p: the first mixture, of that batch shape or broadcastable with it.
        q: the second, likewise.
        rtol: the error asked for, relative to 1 + KL.
        max_points: most points per component.
    """
    value, error = found.value.detach(), found.error
    doubtful = (error > rtol * (1 + value)) | (value < FEW_DIGITS * error)
    few = (found.estimated & doubtful).reshape(-1).nonzero().squeeze(-1)
    if not few.numel():
        return found
    batch = value.shape
    flat = found.reshaped(torch.Size((value.numel(),)))
    here_p, here_q = (_rows(c.expand(batch).flattened(), few) for c in (p, q))
    other = by_engine(*adaptive_kl(here_p, here_q, rtol, max_points), "sobol")
    return improved(flat, few, other).reshaped(batch)


def by_subspace(p: Components, q: Components, rtol: float, max_points: int | None, slack: float) -> Information:
    """Each row by the engine for the dimensions in which any of its components differ; p and q of one batch shape."""
    batch = p.log_weights.shape[:-1]
    rows = math.prod(batch)
    flat_p, flat_q = p.flattened(), q.flattened()
    if not rows:
        nothing = torch.stack([x.flatten(len(batch)).sum(-1) for x in (*p, *q)]).sum(0)
        return by_engine(nothing, nothing.detach(), "line")
    return _in_subspaces(flat_p, flat_q, rtol, max_points, slack).reshaped(batch)


def _in_subspaces(p: Components, q: Components, rtol: float, max_points: int | None, slack: float) -> Information:
    # a component of q, however rare, may be all of q where p is: it counts in full
    every_q = q._replace(log_weights=torch.where(q.log_weights > -torch.inf, 0.0, -torch.inf))
    joined = Components(*(torch.cat(x, 1) for x in zip(p, every_q, strict=True)))
    seen = subspace(joined, slack)
    seen = seen._replace(loss=4 * torch.where(seen.loss.isfinite(), seen.loss, 0.0))  # of a divergence
    two = q.log_weights.shape[-1] == 2
    parts: list[tuple[Tensor, Information]] = []
    lost = torch.zeros_like(seen.loss)
    dim = p.loc.shape[-1]
    ranks = seen.rank.tolist()
    for r in sorted(set(ranks)):
        index = torch.tensor([i for i, x in enumerate(ranks) if x == r], device=seen.rank.device)
        here_p, here_q = _rows(p, index), _rows(q, index)
        low = r <= (1 if two else 3)  # the contour is as exact as a cubature and takes a tenth of the time
        if low and max(r, 1) < dim:
            basis, origin = seen.basis[index, : max(r, 1)], seen.origin[index]
            here_p, here_q = projected(here_p, basis, origin), projected(here_q, basis, origin)
        method: Method = "line" if r <= 1 else "contour" if two else "cubature" if low else "sobol"
        # in space a plane of contours takes a tenth of the time of a cubature
        plane = r >= 3 and q.log_weights.shape[-1] == 3
        if plane:
            result = _by_plane(here_p, here_q, rtol, max_points, slack)
        elif method == "sobol":
            result = _sampled(here_p, here_q, rtol, max_points, slack)
        elif method == "cubature":
            result = _in_few_dimensions(here_p, here_q, rtol, max_points, slack)
        else:
            result = mixture_kl(method, here_p, here_q, rtol, max_points, slack, dim)
        if plane or method == "contour":
            here = Subspace(*(x[index] for x in seen))
            result = _positive_where_small(result, here_p, here_q, here, r, rtol, max_points)
        if low:
            lost[index] = seen.loss[index]
        parts.append((index, result._replace(error=result.error + lost[index])))
    found = gathered(parts)
    lossy = ((found.value.detach() < LOSSY * lost) & (lost > ROUNDING)).nonzero().squeeze(-1)
    if not lossy.numel():
        return found
    return improved(found, lossy, _in_subspaces(_rows(p, lossy), _rows(q, lossy), rtol, max_points, TIGHTER * slack))
