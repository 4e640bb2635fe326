"""KL divergences in torch that do not go negative, infinite or NaN.

Importing stablekl teaches `torch.distributions.kl_divergence` pairs it has no rule for: mixtures of Gaussians, and
every pair of Gaussian families. torch's own rules stay until `harden` replaces them.
"""

from . import estimators, fit, linalg, losses, special
from .distributions import Exponential, Laplace, LowRankMultivariateNormal, MultivariateNormal, Normal
from .divergences import (
    bhattacharyya_distance,
    chernoff_distance,
    jeffreys_divergence,
    renyi_divergence,
    squared_hellinger,
    squared_wasserstein2,
    wasserstein2,
)
from .linalg import NotPositiveDefiniteError, safe_cholesky
from .mixtures import (
    AccuracyWarning,
    GaussianMixture,
    KLEstimate,
    MixtureSameFamily,
    accuracy,
    cross_entropy,
    cross_entropy_estimate,
    entropy_estimate,
    jensen_shannon,
    jensen_shannon_estimate,
    kl_bounds,
    kl_estimate,
    mutual_information,
    mutual_information_estimate,
)
from .parameterizations import (
    bounded_log_scale,
    inverse_bounded_log_scale,
    inverse_softplus_scale,
    scale_tril_from_unconstrained,
    softplus_scale,
    unconstrained_from_scale_tril,
)
from .registry import harden, kl_divergence

__all__ = [
    "AccuracyWarning",
    "Exponential",
    "GaussianMixture",
    "KLEstimate",
    "Laplace",
    "LowRankMultivariateNormal",
    "MixtureSameFamily",
    "MultivariateNormal",
    "Normal",
    "NotPositiveDefiniteError",
    "accuracy",
    "bhattacharyya_distance",
    "bounded_log_scale",
    "chernoff_distance",
    "cross_entropy",
    "cross_entropy_estimate",
    "entropy_estimate",
    "estimators",
    "fit",
    "harden",
    "inverse_bounded_log_scale",
    "inverse_softplus_scale",
    "jeffreys_divergence",
    "jensen_shannon",
    "jensen_shannon_estimate",
    "kl_bounds",
    "kl_divergence",
    "kl_estimate",
    "linalg",
    "losses",
    "mutual_information",
    "mutual_information_estimate",
    "renyi_divergence",
    "safe_cholesky",
    "scale_tril_from_unconstrained",
    "softplus_scale",
    "special",
    "squared_hellinger",
    "squared_wasserstein2",
    "unconstrained_from_scale_tril",
    "wasserstein2",
]
