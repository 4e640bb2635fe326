"""Gaussian mixtures and the integration engines for their KL divergences."""

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
    "kl_bounds",
    "kl_estimate",
]
