"""Families, drop-in for torch's, and their KL rules."""

from . import _cross
from .exponential import Exponential
from .laplace import Laplace
from .low_rank import LowRankMultivariateNormal
from .multivariate_normal import MultivariateNormal
from .normal import Normal

__all__ = ["Exponential", "Laplace", "LowRankMultivariateNormal", "MultivariateNormal", "Normal", "_cross"]
