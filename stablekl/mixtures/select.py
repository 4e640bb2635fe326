r"""KL divergences of Gaussian mixtures: which engine, to what accuracy, and the rules registered with torch.

With :math:`m = \sum_k w_k p_k` and a single Gaussian q, :math:`KL(m \| q) = S - I` where
:math:`S = \sum_k w_k KL(p_k \| q)` is closed form and only the information :math:`0 \le I \le H(w)` between point
and label needs integration.

============================  ========================================  ==================================
p and q                       engine                                    error
============================  ========================================  ==================================
one component each            "closed form"                             a few eps
dimension 1                   "line": panels, positive integrand        1e-13 (1 + S), relative near p = q
two components || one         "spectral": S - I, one 1-D integral       1e-13 (1 + S)
anything else                 "sobol": replicated quasi-random points   asked for, estimated
============================  ========================================  ==================================

Everything is computed in float64 where the device has it, and rounded once. The number of points is chosen from the
data, for each batch element, only in eager mode; under vmap, torch.compile and CUDA graph capture it is fixed.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent
from torch.distributions import MixtureSameFamily as TorchMixtureSameFamily

from ..distributions._gaussian import gaussian_kl
from ..distributions.low_rank import LowRankMultivariateNormal
from ..distributions.multivariate_normal import MultivariateNormal
from ..distributions.normal import Normal
from ..registry import register_hardened
from .adaptive import adaptive_information, adaptive_kl
from .components import broadcast_shape
from .estimate import AccuracyWarning, KLEstimate, checked_accuracy, requested_accuracy
from .line import line_kl
from .reading import Mixture, as_mixture, is_eager, simplified
from .spectral import label_information

__all__ = ["kl_estimate", "kl_mixture"]

Method = Literal["auto", "closed form", "spectral", "line", "sobol"]

# Bounds on the error of the exact engines, relative to 1 + S: twice what was observed against mpmath.
_EXACT_ERROR = 4e-14


def _choose(p: Mixture, q: Mixture) -> Method:
    if p.num_components == q.num_components == 1:
        return "closed form"
    if p.dim == 1:
        return "line"
    if p.num_components == 2 and q.num_components == 1:
        return "spectral"
    return "sobol"


def _check_method(method: Method, p: Mixture, q: Mixture) -> None:
    k_p, k_q, d = p.num_components, q.num_components, p.dim
    possible = {
        "closed form": k_p == k_q == 1,
        "line": d == 1,
        "spectral": k_p == 2 and k_q == 1,
        "sobol": True,
    }
    if method not in possible:
        raise ValueError(f"method must be 'auto' or one of {', '.join(map(repr, possible))}; got {method!r}")
    if not possible[method]:
        raise ValueError(
            f"method {method!r} does not apply to {k_p} against {k_q} components in {d} dimensions; method='auto' "
            f"takes {_choose(p, q)!r} here"
        )


def _pairs(p: Mixture, q: Mixture) -> Tensor:
    """KL(p_j || q_k), ``batch_shape + (K_p, K_q)``."""
    if q.num_components == 1:
        return gaussian_kl(p.gaussian, q.gaussian).unsqueeze(-1)
    return gaussian_kl(p.gaussian.unsqueeze(-1), q.gaussian.unsqueeze(-2))


def _weighted(log_weights: Tensor, terms: Tensor) -> Tensor:
    """sum_k w_k terms_k, where a weight of 0 counts nothing even beside an infinite term."""
    w = log_weights.exp()
    return (w * torch.where(w > 0, terms, 0.0)).sum(-1)


def _bounds(p: Mixture, q: Mixture, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Certified bounds, rounded outwards; both are +inf where the divergence overflows.

    Upper: q >= v_k q_k for each k, and the entropy of p is at least the mean entropy of its components. Lower, for a
    single q, where KL = S - I: I <= H(w).
    """
    lw = p.log_weights
    upper = _weighted(lw, (pairs - q.log_weights.unsqueeze(-2)).amin(-1))
    slack = 16 * torch.finfo(upper.dtype).eps * (1 + upper)
    if q.num_components > 1:
        return torch.zeros_like(upper), upper + slack
    entropy = -_weighted(lw, torch.where(lw > -torch.inf, lw, 0.0))
    lower = (upper - entropy - slack).clamp(min=0)
    return torch.where(upper.isinf(), upper, lower), upper + slack


def _clipped(value: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """``value`` moved into its certified interval, with the gradient it had."""
    with torch.no_grad():
        inside = torch.minimum(torch.maximum(value, lower), upper)
        correction = torch.where(inside == value, 0.0, inside - value)
    return value + correction


def _evaluate(
    method: Method, p: Mixture, q: Mixture, rtol: float, max_points: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value, error, lower and upper bound, in working precision."""
    if method == "closed form":
        value = gaussian_kl(p.gaussian, q.gaussian).squeeze(-1)
        # Observed at most 16 eps for condition numbers up to 1e3; an ill-conditioned covariance has eps * cond.
        error = 16 * torch.finfo(value.dtype).eps * value.detach()
        unknown = torch.zeros_like(error), torch.full_like(error, torch.inf)
        return value, error, *_interval(value.detach(), error, *unknown)
    p, q = p.widened(), q.widened()
    if q.num_components == 1:
        pairs = _pairs(p, q)
        mean_kl = _weighted(p.log_weights, pairs.squeeze(-1))
        pairs = pairs.detach()
    else:
        with torch.no_grad():
            pairs = _pairs(p, q)
    with torch.no_grad():
        lower, upper = _bounds(p, q, pairs)
    if method == "line":
        c_p, c_q = p.components(), q.components()
        batch = broadcast_shape(c_p.log_weights.shape[:-1], c_q.log_weights.shape[:-1])
        value, error = line_kl(c_p.expand(batch), c_q.expand(batch))
        value, error = torch.where(upper.isinf(), upper, value), torch.where(upper.isinf(), upper, error)
    elif method == "spectral":
        value = mean_kl - label_information(p.components())
        error = _EXACT_ERROR * (1 + mean_kl.detach())
    elif q.num_components == 1:
        information, error = adaptive_information(p.components(), mean_kl, rtol, max_points)
        value = mean_kl - information
        error = error + _EXACT_ERROR * (1 + mean_kl.detach())
    else:
        c_p, c_q = p.components(), q.components()
        batch = broadcast_shape(c_p.log_weights.shape[:-1], c_q.log_weights.shape[:-1])
        value, error = adaptive_kl(c_p.expand(batch), c_q.expand(batch), rtol, max_points)
        error = error + _EXACT_ERROR * (1 + value.detach())
    value = _clipped(value, lower, upper)
    error = torch.where(value.detach().isinf(), torch.inf, error)
    if method != "sobol":  # the error is a bound
        lower, upper = _interval(value.detach(), error, lower, upper)
    return value, error, lower, upper


def _interval(value: Tensor, error: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """The certified interval narrowed to ``value +- error``."""
    low = torch.where(value.isinf(), value, value - error)
    return torch.maximum(lower, low), torch.minimum(upper, value + error)


def kl_estimate(
    p: Distribution,
    q: Distribution,
    method: Method = "auto",
    *,
    rtol: float | None = None,
    max_points: int | None = None,
) -> KLEstimate:
    r"""KL divergence between Gaussians or Gaussian mixtures, with its error and certified bounds.

    Args:
        p: a `MixtureSameFamily` (torch's or ours) of Normal, Independent(Normal, 1), MultivariateNormal or
            LowRankMultivariateNormal components, or one of these itself.
        q: likewise; batch shapes broadcast.
        method: "auto", or one of "closed form", "line" (one dimension), "spectral" (two components against one) and
            "sobol" (anything).
        rtol: for "sobol", double the points until the error is below ``rtol * (1 + KL)``; default that of `accuracy`.
        max_points: for "sobol", most points per component; default that of `accuracy`.

    Returns:
        A `KLEstimate`, everything of the broadcast batch shape: value (differentiable), error, lower, upper, method.

    Raises:
        NotImplementedError: a component family without a rule (named).
        ValueError: event shapes that differ, a method that does not apply, or a tolerance or budget without sense.

    Example:
        >>> import torch, stablekl
        >>> m = stablekl.GaussianMixture(probs=torch.tensor([0.5, 0.5]), loc=torch.tensor([[-3.0, 0.0], [3.0, 0.0]]),
        ...                              scale_diag=torch.ones(2, 2))
        >>> q = stablekl.MultivariateNormal(torch.zeros(2), scale_diag=torch.tensor([10.0, 1.0]) ** 0.5)
        >>> e = stablekl.kl_estimate(m, q)
        >>> print(f"{e.value:.4f} {e.method} {bool(e.error < 1e-5)}")
        0.4620 spectral True
    """
    asked = requested_accuracy()
    if rtol is not None or max_points is not None:
        asked = checked_accuracy(
            asked.rtol if rtol is None else rtol, asked.max_points if max_points is None else max_points
        )
    mixtures = simplified(as_mixture(p)), simplified(as_mixture(q))
    _check_events(p, q, *mixtures)
    chosen: Method = _choose(*mixtures) if method == "auto" else method
    _check_method(chosen, *mixtures)
    dtype = torch.promote_types(mixtures[0].dtype, mixtures[1].dtype)
    value, error, lower, upper = _evaluate(chosen, *mixtures, *asked)
    info = torch.finfo(dtype)
    # Rounding to the dtype of the result must not move a bound inwards; a finite lower bound may overflow in it.
    lower = torch.where(lower.isinf(), lower, (lower * (1 - info.eps)).clamp(max=info.max))
    error = error + info.eps * value.detach()
    return KLEstimate(value.to(dtype), error.to(dtype), lower.to(dtype), (upper * (1 + info.eps)).to(dtype), chosen)


def _check_events(p: Distribution, q: Distribution, m_p: Mixture, m_q: Mixture) -> None:
    if m_p.dim != m_q.dim:
        raise ValueError(
            f"KL needs distributions over the same space, but the event shapes are {tuple(p.event_shape)} and "
            f"{tuple(q.event_shape)}"
        )


def kl_mixture(p: Distribution, q: Distribution) -> Tensor:
    """KL divergence in nats between Gaussian mixtures, or a mixture and a Gaussian: the value of `kl_estimate`.

    Warns:
        AccuracyWarning: in eager mode, where the estimated error exceeds the tolerance of `accuracy`.
    """
    estimate = kl_estimate(p, q)
    if estimate.method == "sobol" and is_eager(estimate.value):
        rtol = requested_accuracy().rtol
        excess = estimate.error / (1 + estimate.value.detach())
        if bool((excess > rtol).any()):
            worst = int(excess.argmax())
            warnings.warn(
                f"the KL divergence of batch element {worst} (of {excess.numel()}, flattened) is "
                f"{float(estimate.value.reshape(-1)[worst]):.6g} +- {float(estimate.error.reshape(-1)[worst]):.2g} "
                f"(95%), above the tolerance rtol = {rtol:g}. Allow more points: with stablekl.accuracy(rtol=..., "
                "max_points=...); or read the error: stablekl.kl_estimate.",
                AccuracyWarning,
                stacklevel=3,
            )
    return estimate.value


register_hardened(TorchMixtureSameFamily, TorchMixtureSameFamily)(kl_mixture)
for _family in (Normal, Independent, MultivariateNormal, LowRankMultivariateNormal):
    register_hardened(TorchMixtureSameFamily, _family)(kl_mixture)
    register_hardened(_family, TorchMixtureSameFamily)(kl_mixture)
