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
any p || three                         likewise, on a plane                          1e-8 (1 + KL)
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

from typing import get_args

import torch
from torch import Tensor

from .._autograd import is_eager
from ..distributions._base import broadcast_shape
from ..distributions._gaussian import gaussian_kl
from .bounds import closed_bounds, pairwise_kl
from .components import Components
from .engines.adaptive import adaptive_information
from .engines.cubature import cubature_information
from .engines.line import line_kl
from .engines.spectral import label_information
from .engines.triple import triple_information
from .estimate import Bounds, KLEstimate, Method
from .information import CERTAIN, Information, by_engine, cubature_nodes, mixture_information
from .mixture_kl import EXACT_ERROR, by_subspace, mixture_kl, parameter_rounding, positive_where_sampled
from .reading import Mixture
from .weights import label_entropy, weighted

__all__ = ["applies", "check_method", "evaluate_kl", "narrowed", "slack_for"]


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
        "contour": k_p <= 2 and k_q in (2, 3),
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


def evaluate_kl(method: Method, p: Mixture, q: Mixture, rtol: float, max_points: int | None) -> KLEstimate:
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
        pairs = pairwise_kl(p, q)
        nearest = weighted(p.log_weights, pairs.squeeze(-1))
        found = _to_one(method, p, q, nearest, rtol, max_points, slack_for(dtype))
    else:
        with torch.no_grad():
            pairs = pairwise_kl(p, q)
            nearest = weighted(p.log_weights, (pairs - q.log_weights.unsqueeze(-2)).amin(-1))
        found = _to_many(method, p, q, rtol, max_points, slack_for(dtype))
    with torch.no_grad():
        bounds = _quick_bounds(p, q, nearest)
        if found.method not in CERTAIN:  # of each row by itself, whatever else is in the batch
            tight = closed_bounds(p, q, pairs)
            bounds = Bounds(*(torch.where(found.estimated, a, b) for a, b in zip(tight, bounds, strict=True)))
    value = torch.where(bounds.upper.isinf(), bounds.upper, found.value)
    value = bounds.clipped(value)
    error = torch.where(value.detach().isinf(), torch.inf, found.error.detach())
    return KLEstimate(value, error, *narrowed(value.detach(), error, bounds, found.estimated), found.method)


def _closed_form(p: Mixture, q: Mixture) -> KLEstimate:
    value = gaussian_kl(p.gaussian, q.gaussian).squeeze(-1)
    # Observed at most 16 eps for condition numbers up to 1e3; an ill-conditioned covariance has eps * cond.
    error = 16 * torch.finfo(value.dtype).eps * value.detach()
    unknown = Bounds(torch.zeros_like(error), torch.full_like(error, torch.inf))
    bounds = narrowed(value.detach(), error, unknown, torch.zeros_like(error, dtype=torch.bool))
    return KLEstimate(value, error, *bounds, "closed form")


def narrowed(value: Tensor, error: Tensor, bounds: Bounds, estimated: Tensor) -> Bounds:
    """The certified interval narrowed to ``value +- error``, where that is not an estimate."""
    low = torch.where(value.isinf(), value, value - error)
    lower = torch.where(estimated, bounds.lower, torch.maximum(bounds.lower, low))
    return Bounds(lower, torch.where(estimated, bounds.upper, torch.minimum(bounds.upper, value + error)))


def _quick_bounds(p: Mixture, q: Mixture, upper: Tensor) -> Bounds:
    """Wide bounds at no cost: each p_k against the nearest component of q, which is given, and 0 <= I <= H(w)."""
    slack = 64 * torch.finfo(upper.dtype).eps * (1 + upper)
    if q.num_components > 1:
        return Bounds(torch.zeros_like(upper), upper + slack)
    lower = (upper - label_entropy(p.log_weights) - slack).clamp(min=0)
    return Bounds(torch.where(upper.isinf(), upper, lower), upper + slack)


# ------------------------------------------------------------------------------------- against one Gaussian


def _to_one(
    method: Method, p: Mixture, q: Mixture, mean_kl: Tensor, rtol: float, max_points: int | None, slack: float
) -> Information:
    """KL(p || q) for a single q, given the mean of KL(p_k || q)."""
    if method in ("auto", "line") and p.dim == 1:
        return _on_the_line(p, q)
    components = p.components()
    if p.num_components == 2 and method in ("auto", "spectral"):  # nothing to ask for, and no time to lose
        value = mean_kl - label_information(components)
        return by_engine(value, EXACT_ERROR * (1 + mean_kl.detach().expand_as(value)), "spectral")
    with torch.no_grad():
        # what is sampled is sampled once for all q that share a p: to the tolerance of the smallest divergence
        goal = rtol * (1 + (mean_kl - label_entropy(p.log_weights)).clamp(min=0))
        goal = _least(goal, components.log_weights.shape[:-1])
    found = _information(method, components, goal, max_points, slack)
    value = mean_kl - found.value
    error = found.error + EXACT_ERROR * (1 + mean_kl.detach())
    result = Information(value, error.expand_as(value), found.method, found.estimated.expand_as(value))
    if method != "auto" or not is_eager(*components) or not bool(found.estimated.any()):
        return result
    one = q.components()
    if one.is_diagonal != components.is_diagonal:
        components, one = components.full(), one.full()
    return positive_where_sampled(result, components, one, rtol, max_points)


def _least(x: Tensor, shape: torch.Size) -> Tensor:
    """The minimum over the dimensions in which ``shape`` is smaller; of that shape."""
    x = torch.broadcast_to(x, broadcast_shape(x.shape, shape))
    extra = x.ndim - len(shape)
    shared = [*range(extra), *(i + extra for i, n in enumerate(shape) if n == 1)]
    if not x.numel():
        return x.new_ones(shape)
    return (x.amin(shared, keepdim=True) if shared else x).reshape(shape)


def _information(method: Method, p: Components, goal: Tensor, max_points: int | None, slack: float) -> Information:
    if method == "triple":
        return by_engine(*triple_information(p), method)
    if method == "cubature":
        return by_engine(*cubature_information(p, atol=goal, max_points=cubature_nodes(p, max_points)), method)
    if method == "sobol":
        return by_engine(*adaptive_information(p, goal, max_points), method)
    return mixture_information(p, goal, max_points, slack)


# ---------------------------------------------------------------------------------------- against a mixture


def _to_many(method: Method, p: Mixture, q: Mixture, rtol: float, max_points: int | None, slack: float) -> Information:
    """KL(p || q) for a mixture q."""
    if method in ("auto", "line") and p.dim == 1:
        return _on_the_line(p, q)
    c_p, c_q = p.components(), q.components()
    if c_p.is_diagonal != c_q.is_diagonal:
        c_p, c_q = c_p.full(), c_q.full()
    batch = broadcast_shape(c_p.log_weights.shape[:-1], c_q.log_weights.shape[:-1])
    c_p, c_q = c_p.expand(batch), c_q.expand(batch)
    if method == "auto" and is_eager(*c_p, *c_q):
        result = by_subspace(c_p, c_q, rtol, max_points, slack)
    else:
        if method == "auto":
            # also for many p_k: the information is bounded by H(w), and its error with it, which KL's is not
            method = "contour" if q.num_components == 2 else "sobol"
        result = mixture_kl(method, c_p, c_q, rtol, max_points, slack)
    if p.num_components != q.num_components:
        return result
    with torch.no_grad():  # equal parameters: exactly 0, the minimum, where S - I leaves rounding errors
        same = torch.ones(batch, dtype=torch.bool, device=c_p.loc.device)
        for a, b in zip(c_p, c_q, strict=True):
            same = same & (a == b).flatten(len(batch)).all(-1)
    value, error = (torch.where(same, 0.0, x) for x in result[:2])
    return Information(value, error, result.method, result.estimated & ~same)


def _on_the_line(p: Mixture, q: Mixture) -> Information:
    c_p, c_q = p.components(), q.components()
    batch = broadcast_shape(c_p.log_weights.shape[:-1], c_q.log_weights.shape[:-1])
    c_p, c_q = c_p.expand(batch), c_q.expand(batch)
    value, error = line_kl(c_p, c_q)
    with torch.no_grad():
        error = error + parameter_rounding(c_p, c_q, value)
    return by_engine(value, error, "line")
