r"""KL divergences of Gaussian mixtures: which engine, to what accuracy, and the rules registered with torch.

With :math:`m = \sum_k w_k p_k` and a single Gaussian q, :math:`KL(m \| q) = S - I` where :math:`S = \sum_k w_k KL(p_k \| q)` is closed form
and only the information :math:`0 \le I \le H(w)` between point and label needs integration.

============================  ========================================  ==================================
p and q                       engine                                    error
============================  ========================================  ==================================
one component each            "closed form"                             a few eps
dimension 1                   "line": panels, positive integrand        1e-13 (1 + S), relative near p = q
two components || one         "spectral": S - I, one 1-D integral       1e-13 (1 + S)
anything else                 "sobol": replicated quasi-random points   asked for, estimated
============================  ========================================  ==================================

Everything is computed in float64 where the device has it, and rounded once. The number of points is chosen from the data only in eager mode;
under vmap, torch.compile and CUDA graph capture it is fixed.
"""

from __future__ import annotations

import math
import warnings
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent
from torch.distributions import MixtureSameFamily as TorchMixtureSameFamily

from .._autograd import is_plain
from ..distributions._base import widened
from ..distributions._gaussian import Gaussian, as_gaussian, gaussian_kl
from ..distributions.low_rank import LowRankMultivariateNormal
from ..distributions.multivariate_normal import MultivariateNormal
from ..distributions.normal import Normal
from ..registry import register_hardened
from .components import Components, gaussian_components
from .estimate import AccuracyWarning, KLEstimate, requested_accuracy
from .line import line_kl
from .mixture_same_family import MixtureSameFamily
from .sobol import sobol_information, sobol_kl
from .spectral import label_information
from .weights import categorical_log_weights

__all__ = ["kl_estimate", "kl_mixture"]

Method = Literal["auto", "closed form", "spectral", "line", "sobol"]

_REPLICATES = 8
_FIRST_POINTS = 512  # per component and replicate; doubled from here
_FIXED_POINTS = 1024  # where the data may not be looked at
# Bounds on the error of the exact engines, relative to 1 + S: twice what was observed against mpmath.
_EXACT_ERROR = 4e-14


class _Mixture(NamedTuple):
    """Weights ``batch_shape + (K,)`` and Gaussians of batch shape ``batch_shape + (K,)``."""

    log_weights: Tensor
    gaussian: Gaussian

    @property
    def num_components(self) -> int:
        return self.log_weights.shape[-1]


def _as_mixture(distribution: Distribution) -> _Mixture:
    if isinstance(distribution, TorchMixtureSameFamily):
        component = distribution.component_distribution
        gaussian = as_gaussian(component)
        if gaussian is None:
            raise NotImplementedError(
                f"no KL rule for mixtures of {type(component).__name__} ({component}): components must be Normal, "
                "Independent(Normal, 1), MultivariateNormal or LowRankMultivariateNormal"
            )
        if isinstance(distribution, MixtureSameFamily):
            log_weights = distribution.log_weights
        else:
            log_weights = categorical_log_weights(distribution.mixture_distribution)
        return _Mixture(log_weights, gaussian)
    gaussian = as_gaussian(distribution)
    if gaussian is None:
        raise NotImplementedError(f"no KL rule between a mixture and {distribution}: it is not Gaussian")
    return _Mixture(gaussian.loc.new_zeros((*gaussian.loc.shape[:-1], 1)), gaussian.unsqueeze(-1))


def _is_eager(*tensors: Tensor) -> bool:
    """Whether the data may be looked at: not under vmap or torch.compile, not while a CUDA graph is captured."""
    if not is_plain([t.detach() for t in tensors]):
        return False
    return not (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing())


def _simplified(m: _Mixture) -> _Mixture:
    """The same mixture without components of weight 0, and as one Gaussian where all components are the same."""
    if m.num_components == 1 or not _is_eager(m.log_weights, m.gaussian.loc, m.gaussian.scale):
        return m
    g = m.gaussian
    alive = (m.log_weights.detach() > -torch.inf).reshape(-1, m.num_components).any(0)
    if not bool(alive.all()):
        keep = alive.nonzero()[:, 0]
        factor = None if g.cov_factor is None else g.cov_factor.index_select(-3, keep)
        g = Gaussian(g.kind, g.loc.index_select(-2, keep), g.scale.index_select(_k_dim(g), keep), factor)
        m = _Mixture(m.log_weights.index_select(-1, keep), g)
    parameters = [(g.loc, -2), (g.scale, _k_dim(g))] + ([] if g.cov_factor is None else [(g.cov_factor, -3)])
    if not all(bool((x.detach() == x.detach().narrow(dim, 0, 1)).all()) for x, dim in parameters):
        return m
    # The weighted mean of equal parameters, formed so that it is exactly they: each component then receives its
    # share w_k of the gradient.
    means = [_mean_of_equals(m.log_weights, x, dim) for x, dim in parameters]
    merged = Gaussian(g.kind, means[0], means[1], means[2] if len(means) > 2 else None)
    return _Mixture(torch.zeros_like(m.log_weights[..., :1]), merged)


def _k_dim(g: Gaussian) -> int:
    """The dimension of ``scale`` that indexes the components."""
    return -2 if g.scale.ndim == g.loc.ndim else -3


def _mean_of_equals(log_weights: Tensor, x: Tensor, dim: int) -> Tensor:
    first = x.narrow(dim, 0, 1)
    w = log_weights.exp().reshape(log_weights.shape + (1,) * (-1 - dim))
    return first.detach() + (w * (x - first.detach())).sum(dim, keepdim=True)


class _Problem(NamedTuple):
    """One KL divergence between mixtures, in working precision, with what bounds it.

    ``pairs`` holds KL(p_j || q_k), ``(..., K_p, K_q)``.
    """

    p: Components
    q: Components
    pairs: Tensor

    @property
    def mean_kl(self) -> Tensor:
        """S = sum_k w_k KL(p_k || q) for a single q."""
        w = self.p.log_weights.exp()
        terms = self.pairs[..., 0]
        return (w * torch.where(w > 0, terms, torch.zeros_like(terms))).sum(-1)

    def entropy(self) -> Tensor:
        """H(w), the most that I can be."""
        lw = self.p.log_weights
        return -(lw.exp() * torch.where(lw > -torch.inf, lw, torch.zeros_like(lw))).sum(-1)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Certified bounds, rounded outwards.

        Upper: q >= v_k q_k for each k, and the entropy of p is at least the mean entropy of its components. Lower: I <= H(w).
        """
        w = self.p.log_weights.exp()
        nearest = (self.pairs - self.q.log_weights.unsqueeze(-2)).amin(-1)
        upper = (w * torch.where(w > 0, nearest, torch.zeros_like(nearest))).sum(-1)
        slack = 16 * torch.finfo(upper.dtype).eps * (1 + upper.abs())
        lower = torch.zeros_like(upper)
        if self.q.loc.shape[-2] == 1:
            lower = (upper - self.entropy() - slack).clamp(min=0)
        return lower, upper + slack


def _problem(p: _Mixture, q: _Mixture) -> _Problem:
    dtype = widened(p.gaussian.loc).dtype
    g_p, g_q = p.gaussian.to(dtype), q.gaussian.to(dtype)
    c_p = gaussian_components(p.log_weights.to(dtype), g_p)
    c_q = gaussian_components(q.log_weights.to(dtype), g_q)
    batch = torch.broadcast_shapes(c_p.log_weights.shape[:-1], c_q.log_weights.shape[:-1])
    pairs = gaussian_kl(g_p.unsqueeze(-1), g_q.unsqueeze(-2))
    pairs = pairs.expand(batch + (p.num_components, q.num_components))
    return _Problem(c_p.expand(batch), c_q.expand(batch), pairs)


def _choose(p: _Mixture, q: _Mixture) -> Method:
    if p.num_components == q.num_components == 1:
        return "closed form"
    if p.gaussian.loc.shape[-1] == 1:
        return "line"
    if p.num_components == 2 and q.num_components == 1:
        return "spectral"
    return "sobol"


def _check_method(method: Method, p: _Mixture, q: _Mixture) -> None:
    k_p, k_q, d = p.num_components, q.num_components, p.gaussian.loc.shape[-1]
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
            f"method {method!r} does not apply to {k_p} against {k_q} components in {d} dimensions; method='auto' takes "
            f"{_choose(p, q)!r} here"
        )


def _sobol(problem: _Problem, rtol: float, max_points: int) -> tuple[Tensor, Tensor]:
    """S - I or the general integrand, doubling the points until the error is small enough; the last pass is differentiable."""
    single = problem.q.loc.shape[-2] == 1

    def run(pr: _Problem, n: int) -> tuple[Tensor, Tensor]:
        if not single:
            return sobol_kl(pr.p, pr.q, num_points=n, num_replicates=_REPLICATES)
        information, error = sobol_information(pr.p, num_points=n, num_replicates=_REPLICATES)
        return pr.mean_kl - information, error

    most = 2 ** int(math.log2(max(max_points // _REPLICATES, 1)))
    tensors = (*problem.p, *problem.q)
    if not _is_eager(*tensors):
        return run(problem, min(_FIXED_POINTS, most))
    n = min(_FIRST_POINTS, most)
    pilot = _Problem(
        Components(*(x.detach() for x in problem.p)), Components(*(x.detach() for x in problem.q)), problem.pairs.detach()
    )
    with torch.no_grad():
        value, error = run(pilot, n)
        while n < most and not bool((error <= rtol * (1 + value)).all()):
            n *= 2
            value, error = run(pilot, n)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return run(problem, n)
    return value, error


def _clipped(value: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """``value`` moved into its certified interval, with the gradient it had."""
    with torch.no_grad():
        inside = torch.minimum(torch.maximum(value, lower), upper)
        correction = torch.where(inside == value, torch.zeros_like(value), inside - value)
    return value + correction


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
        ValueError: event shapes that differ, or a method that does not apply.

    Example:
        >>> import torch, stablekl
        >>> m = stablekl.GaussianMixture(probs=torch.tensor([0.5, 0.5]), loc=torch.tensor([[-3.0, 0.0], [3.0, 0.0]]),
        ...                              scale_diag=torch.ones(2, 2))
        >>> e = stablekl.kl_estimate(m, stablekl.MultivariateNormal(torch.zeros(2), scale_diag=torch.tensor([10.0, 1.0]) ** 0.5))
        >>> print(f"{e.value:.4f} {e.method} {bool(e.error < 1e-5)}")
        0.4620 spectral True
    """
    asked = requested_accuracy()
    mixtures = _simplified(_as_mixture(p)), _simplified(_as_mixture(q))
    _check_events(p, q, *mixtures)
    chosen: Method = _choose(*mixtures) if method == "auto" else method
    _check_method(chosen, *mixtures)
    dtype = torch.promote_types(mixtures[0].gaussian.loc.dtype, mixtures[1].gaussian.loc.dtype)
    value, error, lower, upper = _evaluate(
        chosen, *mixtures, asked.rtol if rtol is None else rtol, asked.max_points if max_points is None else max_points
    )
    eps = torch.finfo(dtype).eps
    error = (error + eps * value.detach()).to(dtype)
    # rounding to the dtype of the result must not move a bound inwards
    return KLEstimate(value.to(dtype), error, (lower * (1 - eps)).to(dtype), (upper * (1 + eps)).to(dtype), chosen)


def _evaluate(
    method: Method, p: _Mixture, q: _Mixture, rtol: float, max_points: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value, error, lower and upper bound, in working precision."""
    if method == "closed form":
        value = gaussian_kl(p.gaussian, q.gaussian).squeeze(-1)
        detached = value.detach()
        # Observed at most 16 eps for condition numbers up to 1e3; an ill-conditioned covariance has eps * cond.
        error = 16 * torch.finfo(value.dtype).eps * detached
        return value, error, (detached - error).clamp(min=0), detached + error
    problem = _problem(p, q)
    with torch.no_grad():
        lower, upper = problem.bounds()
    if method == "sobol":
        value, error = _sobol(problem, rtol, max_points)
        return _clipped(value, lower, upper), error, lower, upper
    if method == "line":
        value, error = line_kl(problem.p, problem.q)
    else:
        value = problem.mean_kl - label_information(problem.p)
        error = _EXACT_ERROR * (1 + problem.mean_kl.detach())
    value = _clipped(value, lower, upper)
    detached = value.detach()
    return value, error, torch.maximum(lower, detached - error), torch.minimum(upper, detached + error)


def _check_events(p: Distribution, q: Distribution, m_p: _Mixture, m_q: _Mixture) -> None:
    if m_p.gaussian.loc.shape[-1] != m_q.gaussian.loc.shape[-1]:
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
    if estimate.method == "sobol" and _is_eager(estimate.value):
        rtol = requested_accuracy().rtol
        excess = estimate.error / (1 + estimate.value.detach())
        if bool((excess > rtol).any()):
            worst = int(excess.argmax())
            warnings.warn(
                f"the KL divergence of batch element {worst} (of {excess.numel()}, flattened) is "
                f"{float(estimate.value.reshape(-1)[worst]):.6g} +- {float(estimate.error.reshape(-1)[worst]):.2g} (95%), "
                f"above the tolerance rtol = {rtol:g}. Allow more points: with stablekl.accuracy(rtol=..., max_points=...); "
                "or read the error: stablekl.kl_estimate.",
                AccuracyWarning,
                stacklevel=3,
            )
    return estimate.value


register_hardened(TorchMixtureSameFamily, TorchMixtureSameFamily)(kl_mixture)
for _family in (Normal, Independent, MultivariateNormal, LowRankMultivariateNormal):
    register_hardened(TorchMixtureSameFamily, _family)(kl_mixture)
    register_hardened(_family, TorchMixtureSameFamily)(kl_mixture)
