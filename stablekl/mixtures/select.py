r"""KL divergences of Gaussian mixtures: which engine evaluates what.

With :math:`m = \sum_k w_k p_k`, :math:`KL(m \| q) = \sum_k w_k KL(p_k \| q) - I`, where the information
:math:`0 \le I \le H(w)` between point and label is that of `information`, whichever q is. For a single Gaussian q
the rest, S, is closed form.

=====================================  ============================================  ==========================
p and q                                engine                                        error
=====================================  ============================================  ==========================
one component each                     "closed form"                                 a few eps
dimension 1, or alike in all others    "line": panels, positive integrand            1e-13 (1 + S), relative
                                                                                     near p = q
any p || one Gaussian                  S - I: "spectral" and "triple" for up to      1e-13 (1 + S)
                                       three components that overlap
any p || two                           "contour" for KL(p_k || q), less I            1e-13 (1 + KL)
alike in all but two or three          "cubature": adaptive cells, positive          asked for, 1e-9 at most
dimensions                             integrand
anything else                          "sobol": replicated quasi-random points       asked for, estimated
=====================================  ============================================  ==========================

Near p = q a difference leaves few digits, and the directions that a projection leaves out may be those in which p and q
differ: there the terms are made positive, or more directions kept. Everything is computed in float64 where the device
has it, and rounded once. Engines and the numbers of points are chosen from the data, for each batch element, only in
eager mode; under vmap, torch.compile and CUDA graph capture they follow from the numbers of components and dimensions.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from .._autograd import is_eager
from ..distributions._gaussian import gaussian_kl
from .adaptive import FIRST_BUDGET, adaptive_cross, adaptive_information, adaptive_kl
from .bounds import closed_bounds, pairwise_kl
from .components import Components, broadcast_shape
from .contour import contour_kl
from .cubature import cubature_information, cubature_kl
from .estimate import Bounds, KLEstimate
from .information import (
    CAUTION,
    CUBATURE_ERROR,
    NODES_PER_POINT,
    Information,
    cubature_tolerance,
    least_exact,
    mixture_information,
    replaced,
)
from .line import line_kl
from .projection import Subspace, projected, subspace
from .reading import Mixture
from .spectral import label_information
from .triple import triple_information
from .weights import label_entropy, weighted

__all__ = ["CERTAIN", "Method", "applies", "check_method", "evaluate_kl", "slack_for"]

Method = Literal["auto", "closed form", "line", "spectral", "triple", "contour", "cubature", "sobol"]

# Bounds on the error of the exact engines, relative to 1 + S: twice what was observed against mpmath.
_EXACT_ERROR = 4e-14
# Engines whose error is a bound rather than an estimate.
CERTAIN = ("closed form", "line", "spectral", "triple", "contour")
# A divergence below this many times what a projection may have lost is computed again, with 1e-6 of that left out, down
# to the rounding errors of a well-conditioned problem. (The gradient misses the root of what the value does.)
LOSSY, TIGHTER, ROUNDING = 1e6, 1e-6, 1e-28
# A divergence below this many times the error of a difference is computed again by positive terms.
FEW_DIGITS = 1e3
# Near p = q a cubature in space that is relative to the divergence costs seconds at 3e-7, a few tenths of one at this.
NEARBY = 1e-5


def slack_for(dtype: torch.dtype) -> float:
    """What a projection may leave out, in nats: the rounding of parameters of the caller's precision.

    A gradient may miss the root of twice that, in units of the widest component: 1.4e-7 and 4e-5 (observed 2e-8 in
    float64), where components are that near to being alike in a direction, and not quite.
    """
    return 1e-14 if dtype == torch.float64 else 1e-9


def _possible(p: Mixture, q: Mixture) -> dict[str, bool]:
    k_p, k_q, d = p.num_components, q.num_components, p.dim
    return {
        "auto": True,
        "closed form": k_p == k_q == 1,
        "line": d == 1,
        "spectral": k_p == 2 and k_q == 1,
        "triple": k_p == 3 and k_q == 1,
        "contour": k_p <= 2 and k_q == 2,
        "cubature": d in (2, 3),
        "sobol": True,
    }


def applies(method: Method, p: Mixture, q: Mixture) -> bool:
    """Whether this engine can take the whole problem."""
    return _possible(p, q).get(method, False)


def check_method(method: Method, p: Mixture, q: Mixture) -> None:
    """ValueError where an engine does not exist or does not apply."""
    possible = _possible(p, q)
    if method not in possible:
        names = ", ".join(map(repr, get_args(Method)[1:]))
        raise ValueError(f"method must be 'auto' or one of {names}; got {method!r}")
    if not possible[method]:
        raise ValueError(
            f"method {method!r} does not apply to {p.num_components} against {q.num_components} components in {p.dim} "
            "dimensions; method='auto' takes the most exact one that does"
        )


def evaluate_kl(method: Method, p: Mixture, q: Mixture, rtol: float, max_points: int) -> KLEstimate:
    """Value, error and certified interval, in working precision.

    Args:
        method: an engine, for the whole problem; or "auto".
        p: the first mixture.
        q: the second.
        rtol: the error asked for, relative to 1 + KL.
        max_points: most points per component.
    """
    if p.num_components == q.num_components == 1 and method in ("auto", "closed form"):
        return _closed_form(p, q)
    dtype = torch.promote_types(p.dtype, q.dtype)
    p, q = p.widened(), q.widened()
    if q.num_components == 1:
        result, pairs = _to_one(method, p, q, rtol, max_points, slack_for(dtype))
    else:
        result, pairs = _to_many(method, p, q, rtol, max_points, slack_for(dtype))
    value, error, engine = result
    with torch.no_grad():
        bounds = _quick_bounds(p, q, pairs) if engine in CERTAIN else closed_bounds(p, q, pairs)
    value = torch.where(bounds.upper.isinf(), bounds.upper, value)
    value = bounds.clipped(value)
    error = torch.where(value.detach().isinf(), torch.inf, error)
    if engine in CERTAIN:
        bounds = _narrowed(value.detach(), error, bounds)
    return KLEstimate(value, error, *bounds, engine)


def _closed_form(p: Mixture, q: Mixture) -> KLEstimate:
    value = gaussian_kl(p.gaussian, q.gaussian).squeeze(-1)
    # Observed at most 16 eps for condition numbers up to 1e3; an ill-conditioned covariance has eps * cond.
    error = 16 * torch.finfo(value.dtype).eps * value.detach()
    unknown = Bounds(torch.zeros_like(error), torch.full_like(error, torch.inf))
    return KLEstimate(value, error, *_narrowed(value.detach(), error, unknown), "closed form")


def _narrowed(value: Tensor, error: Tensor, bounds: Bounds) -> Bounds:
    """The certified interval narrowed to ``value +- error``."""
    low = torch.where(value.isinf(), value, value - error)
    return Bounds(torch.maximum(bounds.lower, low), torch.minimum(bounds.upper, value + error))


def _quick_bounds(p: Mixture, q: Mixture, pairs: Tensor) -> Bounds:
    """Wide bounds at no cost: each p_k against the nearest component of q, and 0 <= I <= H(w)."""
    upper = weighted(p.log_weights, (pairs - q.log_weights.unsqueeze(-2)).amin(-1))
    slack = 64 * torch.finfo(upper.dtype).eps * (1 + upper)
    if q.num_components > 1:
        return Bounds(torch.zeros_like(upper), upper + slack)
    lower = (upper - label_entropy(p.log_weights) - slack).clamp(min=0)
    return Bounds(torch.where(upper.isinf(), upper, lower), upper + slack)


# ------------------------------------------------------------------------------------- against one Gaussian


def _to_one(
    method: Method, p: Mixture, q: Mixture, rtol: float, max_points: int, slack: float
) -> tuple[Information, Tensor]:
    """KL(p || q) for a single q, and KL(p_k || q)."""
    pairs = pairwise_kl(p, q)
    mean_kl = weighted(p.log_weights, pairs.squeeze(-1))
    if method in ("auto", "line") and p.dim == 1:
        return _on_the_line(p, q), pairs.detach()
    components = p.components()
    if p.num_components == 2 and method in ("auto", "spectral"):  # nothing to ask for, and no time to lose
        value = mean_kl - label_information(components)
        return Information(value, _EXACT_ERROR * (1 + mean_kl.detach().expand_as(value)), "spectral"), pairs.detach()
    with torch.no_grad():
        # what is sampled is sampled once for all q that share a p: to the tolerance of the smallest divergence
        goal = rtol * (1 + (mean_kl - label_entropy(p.log_weights)).clamp(min=0))
        goal = _least(goal, components.log_weights.shape[:-1])
    found = _information(method, components, goal, max_points, slack)
    value = mean_kl - found.value
    error = found.error + _EXACT_ERROR * (1 + mean_kl.detach())
    return Information(value, error.expand_as(value), found.method), pairs.detach()


def _least(x: Tensor, shape: torch.Size) -> Tensor:
    """The minimum over the dimensions in which ``shape`` is smaller; of that shape."""
    x = torch.broadcast_to(x, broadcast_shape(x.shape, shape))
    extra = x.ndim - len(shape)
    shared = [*range(extra), *(i + extra for i, n in enumerate(shape) if n == 1)]
    if not x.numel():
        return x.new_ones(shape)
    return (x.amin(shared, keepdim=True) if shared else x).reshape(shape)


def _information(method: Method, p: Components, goal: Tensor, max_points: int, slack: float) -> Information:
    if method == "triple":
        return Information(*triple_information(p), method)
    if method == "cubature":
        return Information(*cubature_information(p, atol=goal, max_points=NODES_PER_POINT * max_points), method)
    if method == "sobol":
        return Information(*adaptive_information(p, goal, max_points), method)
    return mixture_information(p, goal, max_points, slack)


# ---------------------------------------------------------------------------------------- against a mixture


def _to_many(
    method: Method, p: Mixture, q: Mixture, rtol: float, max_points: int, slack: float
) -> tuple[Information, Tensor]:
    """KL(p || q) for a mixture q, and KL(p_j || q_k)."""
    with torch.no_grad():
        pairs = pairwise_kl(p, q)
    if method in ("auto", "line") and p.dim == 1:
        return _on_the_line(p, q), pairs
    c_p, c_q = p.components(), q.components()
    if c_p.is_diagonal != c_q.is_diagonal:
        c_p, c_q = (c._replace(scale=torch.diag_embed(c.scale)) if c.is_diagonal else c for c in (c_p, c_q))
    batch = broadcast_shape(c_p.log_weights.shape[:-1], c_q.log_weights.shape[:-1])
    c_p, c_q = c_p.expand(batch), c_q.expand(batch)
    if method == "auto" and is_eager(*c_p, *c_q):
        result = _by_subspace(c_p, c_q, rtol, max_points, slack)
    else:
        if method == "auto":
            # also for many p_k: the information is bounded by H(w), and its error with it, which KL's is not
            method = "contour" if q.num_components == 2 else "sobol"
        result = _mixture_kl(method, c_p, c_q, rtol, max_points, slack)
    if p.num_components != q.num_components:
        return result, pairs
    with torch.no_grad():  # equal parameters: exactly 0, the minimum, where S - I leaves rounding errors
        same = torch.ones(batch, dtype=torch.bool, device=pairs.device)
        for a, b in zip(c_p, c_q, strict=True):
            same = same & (a == b).flatten(len(batch)).all(-1)
    value, error = (torch.where(same, 0.0, x) for x in result[:2])
    return Information(value, error, result.method), pairs


def _on_the_line(p: Mixture, q: Mixture) -> Information:
    c_p, c_q = p.components(), q.components()
    batch = broadcast_shape(c_p.log_weights.shape[:-1], c_q.log_weights.shape[:-1])
    return Information(*line_kl(c_p.expand(batch), c_q.expand(batch)), "line")


def _mixture_kl(
    method: Method, p: Components, q: Components, rtol: float, max_points: int, slack: float
) -> Information:
    """One engine for all rows."""
    if method == "line":
        value, error = line_kl(p, q)
    elif method == "cubature":
        value, error = cubature_kl(p, q, rtol=rtol, max_points=NODES_PER_POINT * max_points)
    elif method == "contour":
        parts, part_error = contour_kl(p, q)
        mean_kl = weighted(p.log_weights, parts)
        goal = rtol * (1 + (mean_kl.detach() - label_entropy(p.log_weights)).clamp(min=0))
        found = mixture_information(p, goal, max_points, slack)
        error = weighted(p.log_weights, part_error) + found.error + _EXACT_ERROR * (1 + mean_kl.detach())
        return Information(mean_kl - found.value, error, least_exact(method, found.method))
    else:
        value, error = adaptive_kl(p, q, rtol, max_points)
        error = error + _EXACT_ERROR * (1 + value.detach())
    return Information(value, error, method)


def _rows(c: Components, index: Tensor) -> Components:
    return Components(*(x.index_select(0, index) for x in c))


def _sampled(p: Components, q: Components, rtol: float, max_points: int, slack: float) -> Information:
    """By positive terms where that is accurate enough at once or better, else as the difference of S and I.

    The integrand of the first has no control variate and its error goes with KL; that of the second is far more
    accurate but absolute.
    """
    value, error = adaptive_kl(p, q, rtol, min(FIRST_BUDGET, max_points))
    hard = (error > rtol * (1 + value.detach())).nonzero().squeeze(-1)
    if not hard.numel():
        return Information(value, error, "sobol")
    here_p, here_q = _rows(p, hard), _rows(q, hard)
    with torch.no_grad():
        by_difference = adaptive_cross(here_p, here_q, rtol, min(FIRST_BUDGET, max_points))[1] < error[hard]
    for difference in (False, True):
        chosen = (by_difference == difference).nonzero().squeeze(-1)
        if not chosen.numel():
            continue
        part_p, part_q = _rows(here_p, chosen), _rows(here_q, chosen)
        if difference:
            mean_kl, part_error = adaptive_cross(part_p, part_q, 0.5 * rtol, max_points)
            goal = 0.5 * rtol * (1 + (mean_kl.detach() - label_entropy(part_p.log_weights)).clamp(min=0))
            found = mixture_information(part_p, goal, max_points, slack)
            part, part_error = mean_kl - found.value, part_error + found.error
        else:
            part, part_error = adaptive_kl(part_p, part_q, rtol, max_points)
        value = value.index_copy(0, hard[chosen], part)
        error = error.index_copy(0, hard[chosen], part_error)
    return Information(value, error + _EXACT_ERROR * (1 + value.detach()), "sobol")


def _by_cubature(p: Components, q: Components, tolerance: Tensor, max_points: int) -> Information:
    value, error = torch.zeros_like(p.log_weights[:, 0]), torch.zeros_like(p.log_weights[:, 0].detach())
    for fine in tolerance.unique().tolist():  # each row its own, whatever else is in the batch
        index = (tolerance == fine).nonzero().squeeze(-1)
        here = _rows(p, index), _rows(q, index)
        part, part_error = cubature_kl(*here, rtol=fine, max_points=NODES_PER_POINT * max_points)
        value, error = value.index_copy(0, index, part), error.index_copy(0, index, part_error)
    return Information(value, error, "cubature")


def _in_few_dimensions(p: Components, q: Components, rtol: float, max_points: int, slack: float) -> Information:
    """By cubature, and where its nodes do not suffice by what samples better."""
    found = _by_cubature(p, q, cubature_tolerance(p).clamp(max=rtol), max_points)
    error = CAUTION * found.error + 1e2 * CUBATURE_ERROR * found.value.detach()
    found = found._replace(error=error)
    missed = (found.error > rtol * (1 + found.value.detach())).nonzero().squeeze(-1)
    if not missed.numel():
        return found
    return _improved(found, missed, _sampled(_rows(p, missed), _rows(q, missed), rtol, max_points, slack))


def _improved(found: Information, index: Tensor, other: Information) -> Information:
    """The rows of ``index`` by another engine, where its error is smaller."""
    better = bool((other.error < found.error[index]).any())
    method = least_exact(found.method, other.method) if better else found.method
    return Information(*replaced(found.value, found.error, index, other.value, other.error), method)


def _positive_where_small(
    found: Information, p: Components, q: Components, seen: Subspace, rank: int, rtol: float, max_points: int
) -> Information:
    """Rows where a difference leaves few digits, near p = q, anew by an integral of positive terms."""
    for engine in ("cubature", "sobol") if 2 <= rank <= 3 else ("sobol",):
        few = (found.value.detach() < FEW_DIGITS * found.error).nonzero().squeeze(-1)
        if not few.numel():
            return found
        here_p, here_q = _rows(p, few), _rows(q, few)
        if engine == "sobol":
            other = Information(*adaptive_kl(here_p, here_q, rtol, max_points), engine)
        else:
            if rank < p.loc.shape[-1]:
                here_p, here_q = (projected(c, seen.basis[few, :rank], seen.origin[few]) for c in (here_p, here_q))
            fine = cubature_tolerance(here_p).clamp(min=NEARBY if rank == 3 else 0.0)
            other = _by_cubature(here_p, here_q, fine, max_points)
            other = other._replace(error=other.error + seen.loss[few])
        found = _improved(found, few, other)
    return found


def _by_subspace(p: Components, q: Components, rtol: float, max_points: int, slack: float) -> Information:
    batch = p.log_weights.shape[:-1]
    rows = math.prod(batch)
    flat_p, flat_q = (Components(*(x.reshape(rows, *x.shape[len(batch) :]) for x in c)) for c in (p, q))
    if not rows:
        return Information(p.log_weights.sum(-1), p.log_weights.detach().sum(-1), "line")
    value, error, method = _in_subspaces(flat_p, flat_q, rtol, max_points, slack)
    return Information(value.reshape(batch), error.reshape(batch), method)


def _in_subspaces(p: Components, q: Components, rtol: float, max_points: int, slack: float) -> Information:
    """Each row by the engine for the dimensions in which any of its components differ."""
    # a component of q, however rare, may be all of q where p is: it counts in full
    every_q = q._replace(log_weights=torch.where(q.log_weights > -torch.inf, 0.0, -torch.inf))
    joined = Components(*(torch.cat(x, 1) for x in zip(p, every_q, strict=True)))
    seen = subspace(joined, slack)
    seen = seen._replace(loss=4 * torch.where(seen.loss.isfinite(), seen.loss, 0.0))  # of a divergence
    two = q.log_weights.shape[-1] == 2
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    methods = set()
    ranks = seen.rank.tolist()
    for r in sorted(set(ranks)):
        index = torch.tensor([i for i, x in enumerate(ranks) if x == r], device=seen.rank.device)
        here_p, here_q = _rows(p, index), _rows(q, index)
        low = r <= (1 if two else 3)  # the contour is as exact as a cubature and takes a tenth of the time
        if low and max(r, 1) < p.loc.shape[-1]:
            basis, origin = seen.basis[index, : max(r, 1)], seen.origin[index]
            here_p, here_q = projected(here_p, basis, origin), projected(here_q, basis, origin)
        method: Method = "line" if r <= 1 else "contour" if two else "cubature" if low else "sobol"
        if method == "sobol":
            result = _sampled(here_p, here_q, rtol, max_points, slack)
        elif method == "cubature":
            result = _in_few_dimensions(here_p, here_q, rtol, max_points, slack)
        else:
            result = _mixture_kl(method, here_p, here_q, rtol, max_points, slack)
        if method == "contour":
            here = Subspace(*(x[index] for x in seen))
            result = _positive_where_small(result, here_p, here_q, here, r, rtol, max_points)
        lost = seen.loss[index] if low else torch.zeros_like(result.error)
        parts.append((index, result.value, result.error + lost, lost))
        methods.add(result.method)
    order = torch.cat([index for index, *_ in parts]).argsort()
    value, error, lost = (torch.cat(x).index_select(0, order) for x in [*zip(*parts, strict=True)][1:])
    found = Information(value, error, least_exact(*methods))
    lossy = ((value.detach() < LOSSY * lost) & (lost > ROUNDING)).nonzero().squeeze(-1)
    if not lossy.numel():
        return found
    return _improved(found, lossy, _in_subspaces(_rows(p, lossy), _rows(q, lossy), rtol, max_points, TIGHTER * slack))
