r"""Gamma distributions, and their KL divergence as a sum of non-negative terms.

With g(a) = log Gamma(a) - a log a + a, its Bregman divergence :math:`B_g` (see `_bregman`) and :math:`L(t) = t -
\log(1 + t)`,

.. math:: KL = B_g(a_q, a_p) + a_q\,L(t), \qquad t = \frac{a_p b_q - a_q b_p}{a_q b_p}:

the mismatch of the shapes, and that of the means a/b. torch adds :math:`a_q \log(b_p/b_q)`, the difference of lgammas,
a digamma and :math:`(b_q - b_p) a_p/b_p`: terms of the size of a log a, where the divergence of Gamma(1e5, 1) and
Gamma(1e5 + 1, 1) is 5e-6; in float32 it returns -0.0129. The numerator of t is a difference of exact products, since
means may agree to more digits than shapes and rates; products and quotients have exponents of their own (`_scaled`),
since neither a_q b_p nor t need be a float where the divergence or its gradient is one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Gamma as TorchGamma

from .._bregman import lgamma_bend, lgamma_bregman_value, lgamma_change, log_quotient
from .._deviance import gamma_entropy, gamma_scale, product_deviance
from .._scaled import log_of_ratio, ratio, scaled, weighted_remainder
from ..registry import register_hardened
from ._base import Checked
from ._density import checked, evaluated
from ._incomplete_gamma import gamma_tail
from ._scalar import scalar_rule

__all__ = ["Gamma", "gamma_kl"]


class Gamma(TorchGamma, Checked):
    """`torch.distributions.Gamma` with a KL divergence that is accurate for every pair of parameters.

    Args:
        concentration: positive, any shape that broadcasts with ``rate``.
        rate: positive.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is zero, negative or NaN somewhere (says where).

    Example:
        >>> import torch, stablekl
        >>> p, q = stablekl.Gamma(torch.tensor(1e5), 1.0), stablekl.Gamma(torch.tensor(1e5 + 1), 1.0)
        >>> print(f"{torch.distributions.kl_divergence(p, q):.3e}")
        5.000e-06
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of the density, by a deviance in place of differences of the size of a log a (see `_deviance`)."""
        value = torch.as_tensor(value, dtype=self.rate.dtype, device=self.rate.device)
        return evaluated(gamma_log_density, checked(self, value), self.concentration, self.rate)

    def entropy(self) -> Tensor:
        """The entropy, by Stirling's series where torch's terms of the size of a log a cancel."""
        return evaluated(lambda a, b: gamma_entropy(a) - torch.log(b), self.concentration, self.rate)

    def cdf(self, value: Tensor) -> Tensor:
        """P(X <= value), to its relative accuracy, differentiable in all (see `_incomplete_gamma`)."""
        return evaluated(lambda *x: gamma_tail(*x).cdf(), checked(self, value), self.concentration, self.rate)

    def sf(self, value: Tensor) -> Tensor:
        """P(X > value), to its relative accuracy in the upper tail."""
        return evaluated(lambda *x: gamma_tail(*x).sf(), checked(self, value), self.concentration, self.rate)

    def log_cdf(self, value: Tensor) -> Tensor:
        """Log of P(X <= value), also where that is no float or nearly 1."""
        return evaluated(lambda *x: gamma_tail(*x).log_cdf(), checked(self, value), self.concentration, self.rate)

    def log_sf(self, value: Tensor) -> Tensor:
        """Log of P(X > value), likewise."""
        return evaluated(lambda *x: gamma_tail(*x).log_sf(), checked(self, value), self.concentration, self.rate)


def gamma_log_density(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Of float64 tensors; at 0 the limit."""
    inside = x > 0
    safe = torch.where(inside, x, 1.0)
    scale, rest = gamma_scale(a)
    value = log_quotient(scale, safe) - rest - product_deviance(a, b, safe)
    edge = torch.where(a == 1, torch.log(b), torch.where(a < 1, torch.inf, -torch.inf))
    return torch.where(inside, value, torch.where(x == 0, edge, torch.nan))


def _value(a_p: Tensor, b_p: Tensor, a_q: Tensor, b_q: Tensor) -> Tensor:
    means = weighted_remainder(scaled(a_q), *ratio(a_p, b_q, a_q, b_p)).rounded()
    return means + lgamma_bregman_value(a_q, a_p, a_q - a_p)


def _gradient(a_p: Tensor, b_p: Tensor, a_q: Tensor, b_q: Tensor) -> tuple[Tensor, ...]:
    t, quotient = ratio(a_p, b_q, a_q, b_p)
    d = a_q - a_p
    means = scaled(a_q) * t
    # parts of opposite sign, each of which may overflow where their sum does not
    by_a_p = (means - scaled(d) * scaled(lgamma_bend(a_p)) / scaled(a_p)) / scaled(a_p)
    by_a_q = lgamma_change(a_q, a_p, d) - log_of_ratio(t, quotient)
    return by_a_p.rounded(), -(means / scaled(b_p)).rounded(), by_a_q, (means / scaled(b_q)).rounded()


gamma_kl = scalar_rule(_value, _gradient)


@register_hardened(Gamma, Gamma)
def kl_gamma_gamma(p: TorchGamma, q: TorchGamma) -> Tensor:
    """KL between gamma distributions, elementwise; see the module."""
    return gamma_kl(p.concentration, p.rate, q.concentration, q.rate)
