"""True values in mpmath: one file per family, written from the definition."""

from __future__ import annotations

from .bernoulli import Bernoulli, Binomial, Geometric
from .beta import Beta
from .cauchy import Cauchy, HalfCauchy
from .continuous_bernoulli import ContinuousBernoulli
from .exponential import Exponential
from .family import Family
from .gamma import Chi2, Gamma, InverseGamma
from .generalized_pareto import GeneralizedPareto
from .gumbel import Gumbel
from .kumaraswamy import Kumaraswamy
from .laplace import Laplace
from .negative_binomial import NegativeBinomial
from .normal import HalfNormal, LogNormal, Normal
from .pareto import Pareto
from .poisson import Poisson
from .student_t import StudentT
from .uniform import Uniform
from .von_mises import VonMises
from .weibull import Weibull

__all__ = ["FAMILIES", "Family"]

_CLASSES: tuple[type[Family], ...] = (
    Bernoulli,
    Beta,
    Binomial,
    Cauchy,
    Chi2,
    ContinuousBernoulli,
    Exponential,
    Gamma,
    GeneralizedPareto,
    Geometric,
    Gumbel,
    HalfCauchy,
    HalfNormal,
    InverseGamma,
    Kumaraswamy,
    Laplace,
    LogNormal,
    NegativeBinomial,
    Normal,
    Pareto,
    Poisson,
    StudentT,
    Uniform,
    VonMises,
    Weibull,
)
FAMILIES: dict[str, Family] = {c.__name__: c() for c in _CLASSES}  # by the name of torch's class
