r"""Cauchy distributions, and their KL divergence without cancellation.

.. math:: KL = \log\left[1 + \frac{(\sigma_p - \sigma_q)^2 + (\mu_p - \mu_q)^2}{4\,\sigma_p \sigma_q}\right],

of differences, symmetric in p and q. torch's :math:`\log[(\sigma_p + \sigma_q)^2 + (\mu_p - \mu_q)^2] - \log(4
\sigma_p \sigma_q)` has lost them.

Reference: F. Chyzak and F. Nielsen, "A closed-form formula for the Kullback-Leibler divergence between Cauchy
distributions" (2019), https://arxiv.org/abs/1905.10965.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Cauchy as TorchCauchy

from .._bregman import product_difference
from ..registry import register_hardened
from ._base import Checked
from ._density import cauchy_log_density, checked, evaluated
from ._scalar import attached, scalar_rule

__all__ = ["Cauchy", "cauchy_kl"]


class Cauchy(TorchCauchy, Checked):
    """`torch.distributions.Cauchy` with a KL divergence that is accurate for every pair of parameters.

    Args:
        loc: median, any shape that broadcasts with ``scale``.
        scale: positive; half of the mass is within it of the median.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is outside of its domain somewhere (says where).
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of the density, finite where the square of z overflows."""
        return evaluated(cauchy_log_density, checked(self, value), self.loc, self.scale)

    def cdf(self, value: Tensor) -> Tensor:
        """P(X <= value), to its relative accuracy in the lower tail, where torch's atan + 1/2 cancels."""
        return evaluated(_tail, checked(self, value), self.loc, self.scale)

    def sf(self, value: Tensor) -> Tensor:
        """P(X > value), which 1 - cdf loses in the upper tail."""
        return evaluated(lambda x, m, s: _tail(-x, -m, s), checked(self, value), self.loc, self.scale)

    def log_cdf(self, value: Tensor) -> Tensor:
        """Log of P(X <= value)."""
        return evaluated(_log_tail, checked(self, value), self.loc, self.scale)

    def log_sf(self, value: Tensor) -> Tensor:
        """Log of P(X > value)."""
        return evaluated(lambda x, m, s: _log_tail(-x, -m, s), checked(self, value), self.loc, self.scale)


def _tail(x: Tensor, m: Tensor, s: Tensor) -> Tensor:
    return torch.atan2(s, m - x) / math.pi


def _log_tail(x: Tensor, m: Tensor, s: Tensor) -> Tensor:
    low = x < m
    return torch.where(low, torch.log(_tail(x, m, s)), torch.log1p(-_tail(-x, -m, s)))


def _value(mu_p: Tensor, s_p: Tensor, mu_q: Tensor, s_q: Tensor) -> Tensor:
    distance, narrow = 0.5 * torch.hypot(s_p - s_q, mu_p - mu_q), torch.minimum(s_p, s_q)
    narrow = torch.where(narrow < 0, torch.nan, narrow)  # or scales of 1 and -1 give -inf
    # the larger scale first: its quotient neither over- nor underflows before the product does
    over, under = distance / torch.maximum(s_p, s_q), distance / narrow
    x = over * under
    # log1p(x) = log(x) to all digits where x overflows
    return torch.where(x.isinf(), torch.log(over) + torch.log(distance) - torch.log(narrow), torch.log1p(x))


def _gradient(mu_p: Tensor, s_p: Tensor, mu_q: Tensor, s_q: Tensor) -> tuple[Tensor, ...]:
    total, d = s_p + s_q, mu_p - mu_q
    # in units of about the larger of both, whose square may overflow; a power of 2 rounds nothing
    unit = torch.exp2(torch.floor(torch.log2(torch.maximum(total, d.abs()).detach())))
    t, u, gap = total / unit, d / unit, (s_p - s_q) / unit
    square = t * t + u * u
    by_mu = 2 * u / square / unit
    # 2 (s_p + s_q)/[(s_p + s_q)^2 + d^2] - 1/s_p, and likewise for s_q; each changes sign
    by_p = attached(product_difference(gap, t, u, u), gap * t - u * u) / square / s_p
    by_q = attached(product_difference(-gap, t, u, u), -gap * t - u * u) / square / s_q
    return by_mu, by_p, -by_mu, by_q


cauchy_kl = scalar_rule(_value, _gradient)


@register_hardened(Cauchy, Cauchy)
def kl_cauchy_cauchy(p: TorchCauchy, q: TorchCauchy) -> Tensor:
    """KL between Cauchy distributions, elementwise; see the module."""
    return cauchy_kl(p.loc, p.scale, q.loc, q.scale)
