"""Gaussian mixtures fitted to data: by EM, in any units and on many machines; by gradient; and their number by BIC."""

from .em import FitWarning, GaussianMixtureFit, gaussian_mixture
from .model import GaussianMixtureModel
from .selection import Selection, select

__all__ = [
    "FitWarning",
    "GaussianMixtureFit",
    "GaussianMixtureModel",
    "Selection",
    "gaussian_mixture",
    "select",
]
