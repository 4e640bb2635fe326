"""KL divergences of mixtures: the public functions, and the rules registered with torch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent
from torch.distributions import MixtureSameFamily as TorchMixtureSameFamily

from ..distributions.low_rank import LowRankMultivariateNormal
from ..distributions.multivariate_normal import MultivariateNormal
from ..distributions.normal import Normal
from ..registry import register_hardened
from .bounds import refined_bounds
from .engines.integrate import integrate_kl
from .estimate import Bounds, KLEstimate, Method, requested, warn_of_excess
from .families import family_kl
from .family_bounds import family_bounds
from .family_reading import HOSTS
from .reading import as_mixture, check_same_space, simplified
from .select import applies, check_method, evaluate_kl

__all__ = ["kl_bounds", "kl_estimate", "kl_mixture"]


def kl_estimate(
    p: Distribution,
    q: Distribution,
    method: Method | Literal["integrate"] = "auto",
    *,
    rtol: float | None = None,
    max_points: int | None = None,
) -> KLEstimate:
    r"""KL divergence between Gaussians or Gaussian mixtures, with its error and certified bounds.

    With ``method="integrate"``: between any two continuous distributions of scalars that have a ``log_prob``, by
    adaptive quadrature.

    Args:
        p: a `MixtureSameFamily` (torch's or ours) of Normal, Independent(Normal, 1), MultivariateNormal or
            LowRankMultivariateNormal components, or one of these itself. Other families: two components against one,
            and any number of Bernoulli, Categorical and OneHotCategorical on both sides (`mixtures.families`).
        q: likewise; batch shapes broadcast.
        method: "auto" takes the problem apart and gives each part to the most exact engine for it. An engine by its
            name takes the whole: "closed form", "line" (one dimension), "spectral" (two components against one),
            "triple" (three against one), "contour" (up to two against two or three), "cubature" (two or three
            dimensions) and "sobol" (anything); components are counted as given, or else without those of weight 0.
            "integrate" is for other densities on the line, a half-line or an interval, never chosen by "auto", and
            runs in eager mode only. Its error is an estimate, with no certified bounds: a peak of p or q of less than
            1e-11 of the mass, or away from its quartiles, can go unseen. Where log-densities next to an end other than
            0 are beyond the last float (Beta(0.1, 0.1) near 1) they are extrapolated, and the error says so. inf where
            p has mass off q's support or a tail that is too heavy for q's. Where float64, or ``log_prob``, does not
            resolve the mass of p the error is inf, with an `AccuracyWarning`.
        rtol: for "cubature" and "sobol", refine until the error is below ``rtol * (1 + KL)``; default that of
            `accuracy`.
        max_points: for these, most points per component; default that of `accuracy`.

    Returns:
        A `KLEstimate`, everything of the broadcast batch shape: value (differentiable), error, lower, upper, method.

    Raises:
        NotImplementedError: a component family without a rule (named); a support that cannot be integrated over.
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
    asked = requested(rtol, max_points)
    if method == "integrate":
        return integrate_kl(p, q, asked.rtol)
    found = family_kl(p, q, method)
    if found is not None:
        return found
    given = as_mixture(p), as_mixture(q)
    check_same_space(p, q, *given)
    # what an engine may be asked for by its name follows from shapes: it does not end where a weight becomes 0
    mixtures = given if method != "auto" and applies(method, *given) else (simplified(given[0]), simplified(given[1]))
    check_method(method, *mixtures)
    dtype = torch.promote_types(mixtures[0].dtype, mixtures[1].dtype)
    return evaluate_kl(method, *mixtures, *asked).rounded(dtype)


def kl_bounds(p: Distribution, q: Distribution) -> Bounds:
    r"""Certified bounds on the KL divergence between Gaussian mixtures, for any number of components and dimensions.

    The intersection of 0 <= I <= H(w), the bounds of Kolchinsky and Tracey (2017) on the information between point and
    label, those of Durrieu et al. (2012), Hershey and Olsen's (2007) variational upper bound, and the
    spanning tree of pair terms <= H(Z|X) <= their sum; pairs less triples up to five components. The formulas are in
    docs/derivations. No sampling: the bounds are deterministic, rounded outwards, and differentiable (almost
    everywhere: they are minima and maxima).

    Args:
        p: as in `kl_estimate`.
        q: likewise; batch shapes broadcast.

    Returns:
        ``Bounds(lower, upper)`` in nats, each of the broadcast batch shape; the upper one is inf where the divergence
        overflows.

    Raises:
        NotImplementedError: a component family without a rule (named).
        ValueError: event shapes that differ.

    Example:
        >>> import torch, stablekl
        >>> m = stablekl.GaussianMixture(probs=torch.tensor([0.2, 0.3, 0.5]), loc=torch.tensor([[-4.0], [0.0], [5.0]]),
        ...                              scale_diag=torch.ones(3, 1))
        >>> lower, upper = stablekl.kl_bounds(m, stablekl.Normal(0.0, 4.0))
        >>> kl = torch.distributions.kl_divergence(m, stablekl.Normal(0.0, 4.0))
        >>> bool(lower <= kl <= upper), bool(upper - lower < 0.01)
        (True, True)
    """
    found = family_bounds(p, q)
    if found is not None:
        return found
    mixtures = simplified(as_mixture(p)), simplified(as_mixture(q))
    check_same_space(p, q, *mixtures)
    dtype = torch.promote_types(mixtures[0].dtype, mixtures[1].dtype)
    return refined_bounds(*(m.widened() for m in mixtures)).rounded(dtype)


def kl_mixture(p: Distribution, q: Distribution) -> Tensor:
    """KL divergence in nats between mixtures, or a mixture and one member of its family: the value of `kl_estimate`.

    Warns:
        AccuracyWarning: in eager mode, where the estimated error exceeds the tolerance of `accuracy`.
    """
    estimate = kl_estimate(p, q)
    warn_of_excess(estimate, "KL divergence", stacklevel=4)  # torch, and the check of shapes, between
    return estimate.value


register_hardened(TorchMixtureSameFamily, TorchMixtureSameFamily)(kl_mixture)
for _family in (Normal, Independent, MultivariateNormal, LowRankMultivariateNormal, *HOSTS):
    register_hardened(TorchMixtureSameFamily, _family)(kl_mixture)
    register_hardened(_family, TorchMixtureSameFamily)(kl_mixture)
