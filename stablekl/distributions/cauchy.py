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

from .._scaled import scaled
from .._wide import attached, difference, negative, product, wide
from ..registry import register_hardened
from ._base import Checked
from ._density import cauchy_log_density, checked, evaluated
from ._scalar import scalar_rule

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
    distance = 0.5 * torch.hypot(s_p - s_q, mu_p - mu_q)
    # the larger scale first: its quotient neither over- nor underflows before the product does
    larger, smaller = torch.maximum(s_p, s_q), torch.minimum(s_p, s_q)
    smaller = torch.where(smaller < 0, torch.nan, smaller)  # or scales of 1 and -1 give -inf
    # eighths of everything where the distance overflows
    big = distance.isinf()
    eighths = 0.5 * torch.hypot(0.125 * s_p - 0.125 * s_q, 0.125 * mu_p - 0.125 * mu_q)
    over, under = (torch.where(big, 8 * (eighths / s), distance / s) for s in (larger, smaller))
    x = over * under
    # log1p(x) = log(x) to all digits where x overflows
    logs = torch.where(big, math.log(64) + 2 * torch.log(eighths), 2 * torch.log(distance))
    return torch.where(x.isinf(), logs - torch.log(larger) - torch.log(smaller), torch.log1p(x))


def _gradient(mu_p: Tensor, s_p: Tensor, mu_q: Tensor, s_q: Tensor) -> tuple[Tensor, ...]:
    p, q, d = scaled(s_p), scaled(s_q), scaled(mu_p) - scaled(mu_q)
    total, gap = p + q, p - q
    square = total * total + d * d
    by_mu = (scaled(torch.full_like(s_p, 2.0)) * d / square).rounded()
    # 2 (s_p + s_q)/[(s_p + s_q)^2 + d^2] - 1/s_p, and likewise for s_q: s_p^2 - s_q^2 - d^2 in twice the digits
    with torch.no_grad():
        x, y = wide(s_p.detach()), wide(s_q.detach())
        z = difference(wide(mu_p.detach()), wide(mu_q.detach()))
        squares, far = difference(product(x, x), product(y, y)), product(z, z)
        exact_p, exact_q = difference(squares, far), difference(negative(squares), far)
    by_p = attached(exact_p, gap * total - d * d) / square / p
    by_q = attached(exact_q, -gap * total - d * d) / square / q
    return by_mu, by_p.rounded(), -by_mu, by_q.rounded()


cauchy_kl = scalar_rule(_value, _gradient)


@register_hardened(Cauchy, Cauchy)
def kl_cauchy_cauchy(p: TorchCauchy, q: TorchCauchy) -> Tensor:
    """KL between Cauchy distributions, elementwise; see the module."""
    return cauchy_kl(p.loc, p.scale, q.loc, q.scale)
