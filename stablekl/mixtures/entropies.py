r"""Entropy, cross-entropy, mutual information and Jensen-Shannon divergence of Gaussian mixtures.

All follow from the divergences of Gaussians and the information between point and label, whatever engine computes it:

.. math::
    H(m) &= \sum_k w_k H(p_k) + I(m), \qquad
    H(m, q) = \sum_k w_k [H(p_k) + KL(p_k \| q)], \\
    JS(p, q) &= I(\tfrac12 p + \tfrac12 q) - \tfrac12 I(p) - \tfrac12 I(q),

the last by the chain rule: a component's label tells which of the two it belongs to. Two Gaussians have no I of their
own, and in one dimension JS is half the sum of the divergences to the mean, positive integrals both; so it is wherever
the difference would leave fewer than three digits. Against the mean each component of p is taken in two halves, so that
every one has a counterpart: p near q keeps its relative accuracy, and p = q gives 0. The cross-entropy does not go
through KL(m || q), whose I would cancel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Distribution

from .._autograd import is_eager
from ..distributions._base import broadcast_shape
from ..distributions._gaussian import Gaussian
from .bounds import closed_bounds, information_bounds, pairwise_kl
from .components import Components
from .engines.overlaps import log_determinants
from .estimate import Bounds, KLEstimate, requested, warn_of_excess
from .families import family_information_estimate, family_jensen_shannon
from .information import least_exact, mixture_information
from .reading import Mixture, as_mixture, check_same_space, simplified
from .select import evaluate_kl, narrowed, slack_for
from .weights import weighted

__all__ = [
    "cross_entropy",
    "cross_entropy_estimate",
    "entropy_estimate",
    "jensen_shannon",
    "jensen_shannon_estimate",
    "mutual_information",
    "mutual_information_estimate",
]

LOG2 = math.log(2.0)


def _component_entropies(m: Mixture, components: Components) -> Tensor:
    return log_determinants(components) + 0.5 * m.dim * (1 + math.log(2 * math.pi))


def _information(m: Mixture, rtol: float, max_points: int | None) -> tuple[Components, KLEstimate]:
    """The components of a mixture in working precision, and their information."""
    components = m.components()
    goal = torch.full_like(components.log_weights[..., 0].detach(), rtol)
    found = mixture_information(components, goal, max_points, slack_for(m.dtype))
    with torch.no_grad():
        bounds = narrowed(found.value.detach(), found.error, information_bounds(m, components), found.estimated)
    return components, KLEstimate(bounds.clipped(found.value), found.error, *bounds, found.method)


def mutual_information_estimate(
    p: Distribution, *, rtol: float | None = None, max_points: int | None = None
) -> KLEstimate:
    r"""Mutual information of a mixture's draw and its component, with its error.

    .. math:: I(X; Z) = \sum_k w_k KL(p_k \| m)

    How well the components can be told apart: 0 where all are the same, the entropy of the weights where none overlap.

    Args:
        p: a mixture of Gaussians as in `kl_estimate`; a single Gaussian has none.
        rtol: for what must be sampled, the error asked for; default that of `accuracy`.
        max_points: most points per component; default that of `accuracy`.

    Returns:
        A `KLEstimate` in nats, of the batch shape.

    Raises:
        NotImplementedError: a component family without a rule (named).
        ValueError: a tolerance or budget without sense.

    Example:
        >>> import torch, stablekl
        >>> m = stablekl.GaussianMixture(probs=torch.ones(3), loc=torch.tensor([[0.0], [100.0], [200.0]]),
        ...                              scale_diag=torch.ones(3, 1))
        >>> print(f"{stablekl.mutual_information_estimate(m).value:.4f}, log 3 = {torch.tensor(3.0).log():.4f}")
        1.0986, log 3 = 1.0986
    """
    asked = requested(rtol, max_points)
    found = family_information_estimate(p)
    if found is not None:
        return found
    m = simplified(as_mixture(p, "mutual information"))
    return _information(m.widened(), *asked)[1].rounded(m.dtype)


def mutual_information(p: Distribution) -> Tensor:
    """Mutual information in nats of a mixture's draw and its component: the value of `mutual_information_estimate`.

    Warns:
        AccuracyWarning: in eager mode, where the estimated error exceeds the tolerance of `accuracy`.
    """
    estimate = mutual_information_estimate(p)
    warn_of_excess(estimate, "mutual information", stacklevel=2)
    return estimate.value


def entropy_estimate(p: Distribution, *, rtol: float | None = None, max_points: int | None = None) -> KLEstimate:
    r"""Differential entropy :math:`H(m) = \sum_k w_k H(p_k) + I(X; Z)` of a Gaussian mixture, with its error.

    Args:
        p: a mixture of Gaussians as in `kl_estimate`, or a Gaussian.
        rtol: for what must be sampled, the error asked for; default that of `accuracy`.
        max_points: most points per component; default that of `accuracy`.

    Returns:
        A `KLEstimate` in nats, of the batch shape. An entropy may be negative.

    Raises:
        NotImplementedError: a component family without a rule (named).
        ValueError: a tolerance or budget without sense.
    """
    asked = requested(rtol, max_points)
    given = simplified(as_mixture(p, "entropy"))
    m = given.widened()
    components, found = _information(m, *asked)
    own = _component_entropies(m, components)
    mean = weighted(m.log_weights, own)
    rounding = 4 * torch.finfo(mean.dtype).eps * weighted(m.log_weights, own.abs() + m.dim).detach()
    return KLEstimate(
        mean + found.value,
        found.error + rounding,
        mean.detach() + found.lower - rounding,
        mean.detach() + found.upper + rounding,
        found.method,
    ).rounded(given.dtype)


def cross_entropy_estimate(
    p: Distribution, q: Distribution, *, rtol: float | None = None, max_points: int | None = None
) -> KLEstimate:
    r"""Cross-entropy :math:`-E_p \log q` of Gaussian mixtures, with its error; closed form for a single Gaussian q.

    Args:
        p: a mixture of Gaussians as in `kl_estimate`, or a Gaussian.
        q: likewise; batch shapes broadcast.
        rtol: for what must be sampled, refine until the error of each KL(p_k || q) is below ``rtol * (1 + KL)``.
        max_points: most points per component; default that of `accuracy`.

    Returns:
        A `KLEstimate` in nats, of the broadcast batch shape. A cross-entropy may be negative.

    Raises:
        NotImplementedError: a component family without a rule (named).
        ValueError: event shapes that differ, or a tolerance or budget without sense.
    """
    return _cross_entropy(p, q, *requested(rtol, max_points))[0]


def _cross_entropy(p: Distribution, q: Distribution, rtol: float, max_points: int | None) -> tuple[KLEstimate, Tensor]:
    """The estimate, and the mean of KL(p_k || q), which the tolerance is relative to.

    Not to the cross-entropy: that may be 0 in one unit of length and 100 in another.
    """
    given_p, given_q = (simplified(as_mixture(x, "cross-entropy")) for x in (p, q))
    check_same_space(p, q, given_p, given_q)
    m_p, m_q = given_p.widened(), given_q.widened()
    # each component of p by itself against q: one more batch dimension
    alone = m_p._replace(
        log_weights=torch.zeros_like(m_p.log_weights).unsqueeze(-1), gaussian=m_p.gaussian.unsqueeze(-1)
    )
    whole = m_q._replace(log_weights=m_q.log_weights.unsqueeze(-2), gaussian=m_q.gaussian.unsqueeze(-2))
    kl = evaluate_kl("auto", alone, whole, rtol, max_points)
    own = _component_entropies(m_p, m_p.components())
    lw = m_p.log_weights
    rounding = 4 * torch.finfo(lw.dtype).eps * weighted(lw, own.abs() + m_p.dim + kl.value).detach()
    rounding = torch.where(rounding.isinf(), 0.0, rounding)  # inf - inf below
    estimate = KLEstimate(
        weighted(lw, own + kl.value),
        weighted(lw, kl.error).detach() + rounding,
        weighted(lw, own + kl.lower).detach() - rounding,
        weighted(lw, own + kl.upper).detach() + rounding,
        kl.method,
    )
    return estimate.rounded(torch.promote_types(given_p.dtype, given_q.dtype)), weighted(lw, kl.value)


def cross_entropy(p: Distribution, q: Distribution) -> Tensor:
    """Cross-entropy of q relative to p in nats, -E_p log q: the value of `cross_entropy_estimate`.

    Warns:
        AccuracyWarning: in eager mode, where the estimated error exceeds the tolerance of `accuracy`.
    """
    estimate, size = _cross_entropy(p, q, *requested(None, None))
    warn_of_excess(estimate, "cross-entropy", stacklevel=2, size=size)
    return estimate.value


def _mean_of(p: Mixture, q: Mixture) -> Mixture:
    """The mixture (p + q)/2, its components in a common form."""
    parts = [p.components(), q.components()]
    if parts[0].is_diagonal != parts[1].is_diagonal:
        parts = [c.full() for c in parts]
    batch = broadcast_shape(*(c.log_weights.shape[:-1] for c in parts))
    lw, loc, scale = (torch.cat(x, len(batch)) for x in zip(*(c.expand(batch) for c in parts), strict=True))
    gaussian = Gaussian("scale_diag" if parts[0].is_diagonal else "scale_tril", loc, scale)
    return Mixture(lw - LOG2, gaussian, torch.promote_types(p.dtype, q.dtype))


def _rows(m: Mixture, batch: torch.Size, index: Tensor) -> Mixture:
    """The batch elements of these flat indices."""
    c = m.components().expand(batch)
    lw, loc, scale = (x.reshape(-1, *x.shape[len(batch) :]).index_select(0, index) for x in c)
    return m._replace(log_weights=lw, gaussian=Gaussian("scale_diag" if c.is_diagonal else "scale_tril", loc, scale))


def _js_by_divergences(p: Mixture, q: Mixture, rtol: float, max_points: int | None) -> KLEstimate:
    m = _mean_of(p, q)
    if p.num_components == q.num_components:
        p, q = _mean_of(p, p), _mean_of(q, q)
    one, two = (evaluate_kl("auto", x, m, rtol, max_points) for x in (p, q))
    value, error, lower, upper = (0.5 * (a + b) for a, b in zip(one[:4], two[:4], strict=True))
    return KLEstimate(value, error, lower, upper, least_exact(one.method, two.method))


def _js_by_information(p: Mixture, q: Mixture, m: Mixture, rtol: float, max_points: int | None) -> KLEstimate:
    total, one, two = (_information(x, rtol, max_points)[1] for x in (m, p, q))
    return KLEstimate(
        total.value - 0.5 * (one.value + two.value),
        total.error + 0.5 * (one.error + two.error),
        total.lower - 0.5 * (one.upper + two.upper),
        total.upper - 0.5 * (one.lower + two.lower),
        least_exact(total.method, one.method, two.method),
    )


def _positive_where_small(found: KLEstimate, p: Mixture, q: Mixture, rtol: float, max_points: int | None) -> KLEstimate:
    """Rows where the difference leaves fewer than three digits, anew by positive integrals."""
    batch = found.value.shape
    value, error, lower, upper = (x.expand(batch).reshape(-1) for x in found[:4])
    few = (value.detach() < 1e3 * error).nonzero().squeeze(-1)
    if not few.numel():
        return found
    other = _js_by_divergences(_rows(p, batch, few), _rows(q, batch, few), rtol, max_points)
    better = other.error < error[few]
    value = value.index_copy(0, few, torch.where(better, other.value, value.index_select(0, few)))
    error = error.index_copy(0, few, torch.where(better, other.error, error[few]))
    lower = lower.index_copy(0, few, torch.maximum(other.lower, lower[few]))
    upper = upper.index_copy(0, few, torch.minimum(other.upper, upper[few]))
    method = least_exact(found.method, other.method) if bool(better.any()) else found.method
    value, error, lower, upper = (x.reshape(batch) for x in (value, error, lower, upper))
    return KLEstimate(value, error, lower, upper, method)


def jensen_shannon_estimate(
    p: Distribution, q: Distribution, *, rtol: float | None = None, max_points: int | None = None
) -> KLEstimate:
    r"""Jensen-Shannon divergence of Gaussians or Gaussian mixtures, with its error.

    .. math:: JS(p, q) = \tfrac12 KL(p \| \tfrac12 p + \tfrac12 q) + \tfrac12 KL(q \| \tfrac12 p + \tfrac12 q)

    lies between 0 and log 2, where p and q do not overlap. (Its square root is a metric.)

    Args:
        p: as in `kl_estimate`.
        q: likewise; batch shapes broadcast.
        rtol: for what must be sampled, the error asked for; default that of `accuracy`.
        max_points: most points per component; default that of `accuracy`.

    Returns:
        A `KLEstimate` in nats, of the broadcast batch shape.

    Raises:
        NotImplementedError: a component family without a rule (named).
        ValueError: event shapes that differ, or a tolerance or budget without sense.

    Example:
        >>> import torch, stablekl
        >>> js = stablekl.jensen_shannon_estimate(stablekl.Normal(0.0, 1.0), stablekl.Normal(1e-4, 1.0))
        >>> print(f"{js.value:.6e}")  # (1e-4)^2/8
        1.250000e-09
    """
    asked = requested(rtol, max_points)
    by_family = family_jensen_shannon(p, q)
    if by_family is not None:
        return by_family
    given_p, given_q = (simplified(as_mixture(x, "the Jensen-Shannon divergence")) for x in (p, q))
    check_same_space(p, q, given_p, given_q)
    m_p, m_q = given_p.widened(), given_q.widened()
    m = _mean_of(m_p, m_q)
    single = m_p.num_components == m_q.num_components == 1
    if m.dim == 1 and not single:
        found = _js_by_divergences(m_p, m_q, *asked)
    else:
        found = _js_by_information(m_p, m_q, m, *asked)
        if not single and is_eager(found.value):
            found = _positive_where_small(found, m_p, m_q, *asked)
    with torch.no_grad():
        parts = [closed_bounds(x, m, pairwise_kl(x, m)) for x in (m_p, m_q)]
        lower, upper = (0.5 * (a + b) for a, b in zip(*parts, strict=True))
        lower = torch.maximum(lower, found.lower).clamp(max=LOG2)
        upper = torch.minimum(upper, found.upper).clamp(max=LOG2 * (1 + 4 * torch.finfo(upper.dtype).eps))
    value = Bounds(lower, upper.clamp(max=LOG2)).clipped(found.value)  # rounding may say more than log 2
    return KLEstimate(value, found.error, lower, upper, found.method).rounded(m.dtype)


def jensen_shannon(p: Distribution, q: Distribution) -> Tensor:
    """Jensen-Shannon divergence in nats, in [0, log 2]: the value of `jensen_shannon_estimate`.

    Warns:
        AccuracyWarning: in eager mode, where the estimated error exceeds the tolerance of `accuracy`.
    """
    estimate = jensen_shannon_estimate(p, q)
    warn_of_excess(estimate, "Jensen-Shannon divergence", stacklevel=2)
    return estimate.value
