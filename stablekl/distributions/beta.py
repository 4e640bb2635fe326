"""Beta distributions: their KL divergence is that of Dirichlet distributions over two categories (see `dirichlet`).

So is that between a Beta and such a Dirichlet, which torch has no rule for: a Beta variable is the first coordinate of
a Dirichlet variable, whose first concentration is ``concentration1``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Beta as TorchBeta
from torch.distributions import Dirichlet as TorchDirichlet

from .._bregman import log_quotient
from .._deviance import binomial_deviance, digamma, gamma_entropy, gamma_scale
from ..registry import register_hardened
from ._base import Checked
from ._density import checked, evaluated
from ._incomplete_beta import beta_tail
from .dirichlet import Dirichlet, dirichlet_kl

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

    def cdf(self, value: Tensor) -> Tensor:
        """P(X <= value), to its relative accuracy in the lower tail; torch has none (see `_incomplete_beta`)."""
        return evaluated(lambda *x: beta_tail(*x).cdf(), checked(self, value), self.concentration1, self.concentration0)

    def sf(self, value: Tensor) -> Tensor:
        """P(X > value), to its relative accuracy in the upper tail."""
        return evaluated(lambda *x: beta_tail(*x).sf(), checked(self, value), self.concentration1, self.concentration0)

    def log_cdf(self, value: Tensor) -> Tensor:
        """Log of P(X <= value), also where that is no float or nearly 1."""
        return evaluated(
            lambda *x: beta_tail(*x).log_cdf(), checked(self, value), self.concentration1, self.concentration0
        )

    def log_sf(self, value: Tensor) -> Tensor:
        """Log of P(X > value), likewise."""
        return evaluated(
            lambda *x: beta_tail(*x).log_sf(), checked(self, value), self.concentration1, self.concentration0
        )


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


def _of_two(p: TorchBeta) -> Tensor:
    return torch.stack([p.concentration1, p.concentration0], -1)


def _checked(dirichlet: TorchDirichlet) -> Tensor:
    count = dirichlet.concentration.shape[-1]
    if count != 2:
        raise ValueError(
            f"the Dirichlet distribution has {count} categories, and a Beta distribution is one over 2: give the one "
            "as many as the other, as Dirichlet(torch.stack([concentration1, concentration0], -1))"
        )
    return dirichlet.concentration


@register_hardened(Beta, Beta)
def kl_beta_beta(p: TorchBeta, q: TorchBeta) -> Tensor:
    """KL between beta distributions, elementwise; see the module."""
    return dirichlet_kl(_of_two(p), _of_two(q))


@register_hardened(Beta, Dirichlet, torch_lacks_it=True)
def kl_beta_dirichlet(p: TorchBeta, q: TorchDirichlet) -> Tensor:
    """KL between a beta distribution and a Dirichlet distribution over two categories; see the module.

    Raises:
        ValueError: q has another number of categories.
    """
    return dirichlet_kl(_of_two(p), _checked(q))


@register_hardened(Dirichlet, Beta, torch_lacks_it=True)
def kl_dirichlet_beta(p: TorchDirichlet, q: TorchBeta) -> Tensor:
    """KL between a Dirichlet distribution over two categories and a beta distribution; see the module.

    Raises:
        ValueError: p has another number of categories.
    """
    return dirichlet_kl(_checked(p), _of_two(q))
