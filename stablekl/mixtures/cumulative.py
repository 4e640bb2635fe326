r"""Distribution function and survival function of mixtures, in log space, right in both tails.

With :math:`\ell_k = \log F_k(x)` the component's own (a sum over the coordinates of a vector), the logarithm of
:math:`F(x) = \sum_k w_k F_k(x)` is

    log F = logsumexp_k(log w_k + l_k)                 where F <= 1/2,
    log F = log1p(sum_k w_k expm1(l_k))                where F > 1/2:   1 - F = sum_k w_k (1 - F_k), positive terms.

The first alone leaves eps of a value that is 1e-20 where the tail above x is. The second has also the
gradient with respect to the weights that survives their normalisation: w_k (F_k - 1)/F rather than w_k F_k/F, of which
the normalisation keeps a difference of numbers near w_k. The survival function is the same sum of the components' own.

Normal components take their l_k from `special.log_ndtr`, in float64: log F is right to its last digits at 1e4 standard
deviations, where it is -5e7, and so is its gradient. Accuracy in float64, the largest error observed on the
cases of ``tests/test_cumulative.py`` (x up to 1e4 standard deviations either side, weights down to 1e-300): 5 eps of
the value. The slope in x has 160 eps of its own where components 100 standard deviations apart take over from one
another (posterior weights are exponentials of thousands), 5 otherwise. The families of `family_tails` have both tails
in log space as well; others have what torch's ``cdf`` leaves them: its logarithm, and log1p of minus it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from ..distributions._base import common_dtype, widened
from ..distributions._gaussian import Gaussian, as_gaussian, lower_factor
from ..special import log_ndtr, logsumexp
from .density_terms import living
from .engines.line import expm1
from .family_tails import known_tails
from .interior import interior_point
from .weights import log_probability

__all__ = ["cumulative", "diagonal_gaussian", "log_cumulative", "nearer_tail"]


def diagonal_gaussian(component: Distribution) -> Gaussian | None:
    """Means and standard deviations of components with independent coordinates, in working precision; else None."""
    gaussian = as_gaussian(component)
    if gaussian is None or (gaussian.kind != "scale_diag" and gaussian.loc.shape[-1] > 1):
        return None
    gaussian = gaussian.to(widened(gaussian.loc).dtype)
    if gaussian.kind == "scale_diag":
        return gaussian
    return Gaussian("scale_diag", gaussian.loc, lower_factor(gaussian).squeeze(-1))


def log_cumulative(mixture: Any, value: Tensor, *, upper: bool = False) -> Tensor:
    """Log P(X <= x), or log P(X > x), coordinate by coordinate; see the module's formula.

    Args:
        mixture: a `MixtureSameFamily`.
        value: points, ``sample_shape + batch_shape + event_shape``.
        upper: the survival function rather than the distribution function.

    Returns:
        ``sample_shape + batch_shape``.

    Raises:
        ValueError: the value has the wrong shape or is NaN, when validation is on.
        NotImplementedError: events are vectors with dependent coordinates, or the family has no ``cdf``.

    Example:
        >>> import torch, stablekl
        >>> m = stablekl.GaussianMixture(probs=torch.tensor([0.3, 0.7]), loc=torch.tensor([[-2.0], [2.0]]),
        ...                              scale_diag=torch.ones(2, 1))
        >>> print(f"{m.log_cdf(torch.tensor([-42.0])):.4f}, {m.cdf(torch.tensor([-42.0])):.4f}")
        -805.8124, 0.0000
    """
    result, dtype = _log_cumulative(mixture, value, upper)
    return result.to(dtype)


def _log_cumulative(mixture: Any, value: Tensor, upper: bool) -> tuple[Tensor, torch.dtype]:
    """`log_cumulative` in working precision, and the dtype that it is to be rounded to."""
    if mixture._validate_args:
        mixture._check_point(value)
    component = mixture.component_distribution
    gaussian = diagonal_gaussian(component)
    log_weights = mixture._log_weights(widened(mixture.mixture_distribution._param).dtype)
    if gaussian is not None:
        x = value if component.event_shape else value.unsqueeze(-1)
        loc, scale = living(log_weights, gaussian.loc, gaussian.scale)
        z = (x.to(loc.dtype).unsqueeze(-2) - loc) / scale
        by_component = log_ndtr(-z if upper else z).sum(-1)
        dtype = component.mean.dtype
    elif component.event_shape:
        raise NotImplementedError(_refusal(component))
    else:
        by_component, dtype = _family_log_tail(mixture, value, upper)
    dtype = torch.promote_types(dtype, mixture.mixture_distribution._param.dtype)
    return _pooled(by_component, log_weights), common_dtype(value.new_empty(0, dtype=dtype), value)


def cumulative(mixture: Any, value: Tensor) -> Tensor:
    """P(X <= x): the exponential of its logarithm where that is known, else the sum of the components' own."""
    component = mixture.component_distribution
    if component.event_shape or diagonal_gaussian(component) is not None or known_tails(component) is not None:
        # Rounded once: the exponential of a rounded logarithm l is off by l eps.
        log_cdf, dtype = _log_cumulative(mixture, value, False)
        return log_cdf.exp().to(dtype)
    if mixture._validate_args:
        mixture._check_point(value)
    result: Tensor = (family_cdf(mixture, value) * mixture.log_weights.exp()).sum(-1)
    return result


def nearer_tail(mixture: Any, value: Tensor, lower: Tensor) -> Tensor:
    """Log F where ``lower``, else log(1 - F), of a scalar mixture of any family, from one evaluation of its cdf."""
    lower = lower.unsqueeze(-1)
    if known_tails(mixture.component_distribution) is None:
        cdf = family_cdf(mixture, value)
        by_component = torch.where(lower, log_probability(cdf), _log_complement(cdf))
    else:
        below, above = (_family_log_tail(mixture, value, upper)[0] for upper in (False, True))
        by_component = torch.where(lower, below, above)
    return _pooled(by_component, mixture.log_weights)


def _family_log_tail(mixture: Any, value: Tensor, upper: bool) -> tuple[Tensor, torch.dtype]:
    """Log F or log(1 - F) of each scalar component, in working precision, and the dtype of parameters and value."""
    tails = known_tails(mixture.component_distribution)
    if tails is None:
        cdf = family_cdf(mixture, value)
        return _log_complement(widened(cdf)) if upper else log_probability(widened(cdf)), cdf.dtype
    padded = value.unsqueeze(-1)
    inside = mixture._inside(value) & padded.isfinite()
    if tails.quantile is not None:  # at an edge a gradient may be infinite, and 0 times it NaN
        zero = torch.zeros_like(widened(padded.detach()))
        low, high = (tails.quantile(zero, side).detach() for side in (False, True))
        inside = inside & (padded > low) & (padded < high)
    interior = interior_point(mixture.component_distribution, padded)
    result = (tails.upper if upper else tails.lower)(widened(torch.where(inside, padded, interior)))
    outside = torch.where((padded > interior) == upper, -torch.inf, 0.0).to(result.dtype)
    outside = torch.where(padded.isnan(), torch.nan, outside)
    return torch.where(inside, result, outside), common_dtype(value, *tails.parameters)


def _refusal(component: Distribution) -> str:
    if as_gaussian(component) is not None:
        return (
            f"the joint distribution function of {component.event_shape[0]} correlated normal coordinates has no "
            "closed form. It exists here for scale_diag components; estimate it from samples, or take that of a "
            "marginal, which is a mixture of the components' marginals"
        )
    name = type(component.base_dist if isinstance(component, Independent) else component).__name__
    return (
        f"no joint distribution function of events of shape {tuple(component.event_shape)} with {name} components: it "
        "exists here for scalar events, and for vectors of independent normal coordinates. That of a marginal is that "
        "of a mixture of the components' marginals"
    )


def _pooled(by_component: Tensor, log_weights: Tensor) -> Tensor:
    dead = log_weights == -torch.inf
    by_component = torch.where(dead, -torch.inf, by_component)
    small = logsumexp(by_component + log_weights, -1)
    # torch's expm1 differentiates to expm1 + 1, which keeps eps of a small exponential: only near 0.
    near = by_component > -1.0
    loss = torch.where(near, expm1(torch.where(near, by_component, 0.0)), by_component.exp() - 1.0)
    large = small > -math.log(2.0)
    loss = torch.where(large, (log_weights.exp() * loss).sum(-1), 0.0)
    return torch.where(large, torch.log1p(loss), small)


def _log_complement(cdf: Tensor) -> Tensor:
    """log(1 - F), -inf at F = 1 with gradient 0 there."""
    small = cdf < 0.5
    return torch.where(small, torch.log1p(-torch.where(small, cdf, 0.0)), log_probability(1.0 - cdf))


def family_cdf(mixture: Any, value: Tensor) -> Tensor:
    """Distribution function of each scalar component, ``(..., K)``: 0 below its support and 1 above.

    Outside its support, an interval, a component's formula may raise: there it is evaluated at a point inside.
    """
    component, padded, inside = mixture.component_distribution, value.unsqueeze(-1), mixture._inside(value)
    interior = interior_point(component, padded)
    try:
        cdf: Tensor = component.cdf(torch.where(inside, padded, interior))
    except NotImplementedError as error:
        raise NotImplementedError(
            f"{type(component).__name__} has no cdf in torch, and so its mixtures have none; estimate it from samples"
        ) from error
    return torch.where(inside | padded.isnan(), cdf, (padded > interior).to(cdf.dtype))
