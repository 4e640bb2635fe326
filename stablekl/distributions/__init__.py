"""The Gaussian families, drop-in for torch's, and their KL rules."""

from . import _cross
from .low_rank import LowRankMultivariateNormal
from .multivariate_normal import MultivariateNormal
from .normal import Normal

__all__ = ["LowRankMultivariateNormal", "MultivariateNormal", "Normal", "_cross"]
