"""Beta distributions: their KL divergence is that of Dirichlet distributions over two categories (see `dirichlet`)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Beta as TorchBeta

from .._bregman import log_quotient
from .._deviance import binomial_deviance, digamma, gamma_entropy, gamma_scale
from ..registry import register_hardened
from ._base import Checked
from ._density import checked, evaluated
from .dirichlet import dirichlet_kl

__all__ = ["Beta"]


class Beta(TorchBeta, Checked):
    """`torch.distributions.Beta` with a KL divergence that is accurate for every pair of parameters.

    Args:
        concentration1: positive, any shape; the power of x is this less 1.
        concentration0: positive; the power of 1 - x is this less 1.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is zero, negative or NaN somewhere (says where).

    Example:
        >>> import torch, stablekl
        >>> p, q = stablekl.Beta(torch.tensor(1e6), 1e6), stablekl.Beta(torch.tensor(1e6 + 100), 1e6)
        >>> print(f"{torch.distributions.kl_divergence(p, q):.4e}")
        2.4999e-03
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of the density, by a deviance in place of differences of lgammas (see `_deviance`)."""
        return evaluated(_log_density, checked(self, value), self.concentration1, self.concentration0)

    def entropy(self) -> Tensor:
        """The entropy, by those of Gammas (see `Dirichlet.entropy`)."""
        return evaluated(_entropy, self.concentration1, self.concentration0)


def _entropy(a: Tensor, b: Tensor) -> Tensor:
    return gamma_entropy(a) + gamma_entropy(b) - gamma_entropy(a + b) - digamma(a + b)


def _log_density(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    inside = (x > 0) & (x < 1)
    x_in = torch.where(inside, x, 0.5)
    log_y = torch.log1p(-x_in)
    (of_a, rest_a), (of_b, rest_b), (of_n, rest_n) = gamma_scale(a), gamma_scale(b), gamma_scale(a + b)
    # the larger of both is of the size of that of the sum
    size = torch.minimum(of_a, of_b) * (torch.maximum(of_a, of_b) / of_n)
    rests = rest_a + rest_b - rest_n
    gap = binomial_deviance(a, b, x_in, 1 - x_in, torch.log(x_in), log_y)
    value = log_quotient(size, x_in) - log_y - rests - gap
    # of the power that is not 0^0 or 1^0
    power, other = torch.where(x == 0, a, b), torch.where(x == 0, b, a)
    edge = torch.where(power == 1, torch.log(other), torch.where(power < 1, torch.inf, -torch.inf))
    return torch.where(inside, value, torch.where((x == 0) | (x == 1), edge, torch.nan))


@register_hardened(Beta, Beta)
def kl_beta_beta(p: TorchBeta, q: TorchBeta) -> Tensor:
    """KL between beta distributions, elementwise; see the module."""
    return dirichlet_kl(*(torch.stack([x.concentration1, x.concentration0], -1) for x in (p, q)))
