"""Gaussian mixtures and the integration engines for their KL divergences."""

from .entropies import (
    cross_entropy,
    cross_entropy_estimate,
    entropy_estimate,
    jensen_shannon,
    jensen_shannon_estimate,
    mutual_information,
    mutual_information_estimate,
)
from .estimate import AccuracyWarning, Bounds, KLEstimate, accuracy
from .gaussian_mixture import GaussianMixture
from .kl import kl_bounds, kl_estimate
from .mixture_same_family import MixtureSameFamily

__all__ = [
    "AccuracyWarning",
    "Bounds",
    "GaussianMixture",
    "KLEstimate",
    "MixtureSameFamily",
    "accuracy",
    "cross_entropy",
    "cross_entropy_estimate",
    "entropy_estimate",
    "jensen_shannon",
    "jensen_shannon_estimate",
    "kl_bounds",
    "kl_estimate",
    "mutual_information",
    "mutual_information_estimate",
]
