"""Gaussian mixtures and the integration engines for their KL divergences."""

from .estimate import AccuracyWarning, KLEstimate, accuracy
from .gaussian_mixture import GaussianMixture
from .mixture_same_family import MixtureSameFamily
from .select import kl_estimate

__all__ = ["AccuracyWarning", "GaussianMixture", "KLEstimate", "MixtureSameFamily", "accuracy", "kl_estimate"]
