"""The methods of a mixture that are about probabilities of events: distribution functions and their inverses."""

from __future__ import annotations

from torch import Tensor

from .cumulative import cumulative, log_cumulative
from .log_quantile import log_quantile
from .quantile import quantile

__all__ = ["DistributionFunctions"]


class DistributionFunctions:
    """For a mixture of any family; a base of `MixtureSameFamily`."""

    def cdf(self, value: Tensor) -> Tensor:
        """Distribution function P(X <= x), ``sample_shape + batch_shape``; of vectors, and errors, as `log_cdf`."""
        return cumulative(self, value)

    def log_cdf(self, value: Tensor) -> Tensor:
        r"""Log of the distribution function, :math:`\log P(X \le x)`, ``sample_shape + batch_shape``.

        Of vectors with independent normal coordinates, the joint one, :math:`\sum_k w_k \prod_i F_{ki}(x_i)`. Normal
        components keep their relative accuracy at any distance in both tails, and so do Laplace, Exponential, Gumbel,
        Cauchy and others (`mixtures.family_tails`); else it is the log of the component's ``cdf``, to its eps.

        Raises:
            ValueError: the value has the wrong shape or is NaN (when validation is on; says where).
            NotImplementedError: events are vectors that are not diagonal Gaussians, or the family has no ``cdf``.
        """
        return log_cumulative(self, value)

    def log_sf(self, value: Tensor) -> Tensor:
        r"""Log of the survival function, :math:`\log P(X > x)`, ``sample_shape + batch_shape``; otherwise as `log_cdf`.

        Of vectors, the joint one: every coordinate exceeds its own of x, which is not the complement of the `cdf`.
        """
        return log_cumulative(self, value, upper=True)

    def icdf(self, value: Tensor) -> Tensor:
        r"""Quantile function of scalar events, ``sample_shape + batch_shape``, differentiable in everything.

        Of vectors of length 1, such as those of ``marginal([i])``, too: ``sample_shape + batch_shape + (1,)``.

        Normal components: to the conditioning of x, in both tails (u from 1e-300 in float64 to the last below 1). So
        those of `mixtures.family_tails`; else by the family's ``cdf`` and ``icdf``. 0 and 1: the support's ends.

        Raises:
            ValueError: a value is NaN or outside [0, 1] (says where; inside transforms the result is NaN), or its shape
                does not broadcast with the batch shape.
            NotImplementedError: events are longer vectors, or the family has no ``cdf`` or no ``icdf``.
        """
        return quantile(self, value)

    def ilogcdf(self, value: Tensor) -> Tensor:
        r"""Quantile of a log-probability: x with :math:`\log P(X \le x)` = value, the inverse of `log_cdf`.

        For normal components, scalar or in vectors of length 1; shapes and derivatives as in `icdf`. To the
        conditioning of x at any distance: value = -5e7 is 1e4 standard deviations below, where `icdf` has no number for
        the probability. -inf and 0 give -inf and inf.

        Raises:
            ValueError: a value is NaN or positive (says where; inside transforms the result is NaN), or its shape does
                not broadcast with the batch shape.
            NotImplementedError: events are longer vectors, or components are not normal.
        """
        return log_quantile(self, value)

    def ilogccdf(self, value: Tensor) -> Tensor:
        r"""Quantile of an upper tail: x with :math:`\log P(X > x)` = value, the inverse of `log_sf`; as `ilogcdf`."""
        return log_quantile(self, value, upper=True)
