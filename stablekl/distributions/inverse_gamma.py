"""Inverse gamma distributions; KL divergences do not change when both variables are inverted."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import InverseGamma as TorchInverseGamma

from .._bregman import log_quotient
from .._deviance import digamma, gamma_entropy, gamma_scale, quotient_deviance
from ..registry import register_hardened
from ._base import Checked
from ._density import checked, evaluated
from ._incomplete_gamma import inverse_gamma_tail
from .gamma import gamma_kl

__all__ = ["InverseGamma"]


class InverseGamma(TorchInverseGamma, Checked):
    """`torch.distributions.InverseGamma` with a KL divergence that is accurate for every pair of parameters.

    Args:
        concentration: positive, any shape that broadcasts with ``rate``.
        rate: positive.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is zero, negative or NaN somewhere (says where).
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of the density, by a deviance (see `_deviance`)."""
        return evaluated(_log_density, checked(self, value), self.concentration, self.rate)

    def entropy(self) -> Tensor:
        """The entropy, by that of a Gamma (see `Gamma.entropy`), whose terms do not cancel."""
        return evaluated(_entropy, self.concentration, self.rate)

    def cdf(self, value: Tensor) -> Tensor:
        """P(X <= value), to its relative accuracy in the lower tail (see `_incomplete_gamma`)."""
        return evaluated(lambda *x: inverse_gamma_tail(*x).cdf(), checked(self, value), self.concentration, self.rate)

    def sf(self, value: Tensor) -> Tensor:
        """P(X > value), to its relative accuracy in the upper tail."""
        return evaluated(lambda *x: inverse_gamma_tail(*x).sf(), checked(self, value), self.concentration, self.rate)

    def log_cdf(self, value: Tensor) -> Tensor:
        """Log of P(X <= value), also where that is no float or nearly 1."""
        return evaluated(
            lambda *x: inverse_gamma_tail(*x).log_cdf(), checked(self, value), self.concentration, self.rate
        )

    def log_sf(self, value: Tensor) -> Tensor:
        """Log of P(X > value), likewise."""
        return evaluated(
            lambda *x: inverse_gamma_tail(*x).log_sf(), checked(self, value), self.concentration, self.rate
        )


def _entropy(a: Tensor, b: Tensor) -> Tensor:
    return gamma_entropy(a) - 2 * digamma(a) + torch.log(b)


def _log_density(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    inside = x > 0
    safe = torch.where(inside, x, 1.0)
    scale, rest = gamma_scale(a)
    value = log_quotient(scale, safe) - rest - quotient_deviance(a, b, safe)
    return torch.where(inside, value, torch.where(x == 0, -torch.inf, torch.nan))


@register_hardened(InverseGamma, InverseGamma)
def kl_inverse_gamma_inverse_gamma(p: TorchInverseGamma, q: TorchInverseGamma) -> Tensor:
    """KL between inverse gamma distributions: that of the gamma distributions of the inverses (see `gamma`)."""
    return gamma_kl(p.concentration, p.rate, q.concentration, q.rate)
