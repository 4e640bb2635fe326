r"""Gamma distributions, and their KL divergence as a sum of non-negative terms.

With g(a) = log Gamma(a) - a log a + a, its Bregman divergence :math:`B_g` (see `_bregman`) and :math:`L(t) = t -
\log(1 + t)`,

.. math:: KL = B_g(a_q, a_p) + a_q\,L(t), \qquad t = \frac{a_p b_q - a_q b_p}{a_q b_p}:

the mismatch of the shapes, and that of the means a/b. torch adds :math:`a_q \log(b_p/b_q)`, the difference of lgammas,
a digamma and :math:`(b_q - b_p) a_p/b_p`: terms of the size of a log a, where the divergence of Gamma(1e5, 1) and
Gamma(1e5 + 1, 1) is 5e-6; in float32 it returns -0.0129. The numerator of t is a difference of exact products, since
means may agree to more digits than shapes and rates.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Gamma as TorchGamma

from .._autograd import masked_product
from .._bregman import (
    lgamma_bregman_value,
    lgamma_curvature,
    lgamma_slope,
    log_quotient,
    product_difference,
    remainder_of_log,
)
from .._deviance import gamma_entropy, gamma_scale, product_deviance
from ..registry import register_hardened
from ._base import Checked
from ._density import checked, evaluated
from ._scalar import attached, scalar_rule

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


def gamma_log_density(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Of float64 tensors; at 0 the limit."""
    inside = x > 0
    safe = torch.where(inside, x, 1.0)
    scale, rest = gamma_scale(a)
    value = log_quotient(scale, safe) - rest - product_deviance(a, b, safe)
    edge = torch.where(a == 1, torch.log(b), torch.where(a < 1, torch.inf, -torch.inf))
    return torch.where(inside, value, torch.where(x == 0, edge, torch.nan))


def _excess(a_p: Tensor, b_p: Tensor, a_q: Tensor, b_q: Tensor) -> tuple[Tensor, Tensor]:
    """The t of the module's head, and 1 + t."""
    # by quotients where a product would leave the range of floats
    product = a_q * b_p
    info = torch.finfo(product.dtype)
    room = info.tiny / info.eps / info.eps
    usable = (product > room) & (product < 1e-3 / room) & (a_p * b_q > room) & (a_p * b_q < 1e-3 / room)
    one = torch.ones_like(product)
    a, b, c, d = (torch.where(usable, x, one) for x in (a_p, b_q, a_q, b_p))
    quotient = torch.where(usable, (a * b) / (c * d), (a_p / a_q) * (b_q / b_p))
    return torch.where(usable, product_difference(a, b, c, d) / (c * d), quotient - 1), quotient


def _value(a_p: Tensor, b_p: Tensor, a_q: Tensor, b_q: Tensor) -> Tensor:
    t, quotient = _excess(a_p, b_p, a_q, b_q)
    means = a_q * remainder_of_log(t, quotient)
    # where the quotient leaves the range of floats, its logarithm does not
    far = a_p * (b_q / b_p) - a_q - a_q * (log_quotient(a_p, a_q) + log_quotient(b_q, b_p))
    lost = (quotient == 0) | quotient.isinf()
    return torch.where(lost, far, means) + lgamma_bregman_value(a_q, a_p, a_q - a_p)


def _gradient(a_p: Tensor, b_p: Tensor, a_q: Tensor, b_q: Tensor) -> tuple[Tensor, ...]:
    t, quotient = _excess(a_p, b_p, a_q, b_q)
    t = attached(t, (a_p / a_q) * (b_q / b_p) - 1)
    d = a_q - a_p
    near = (t.abs() < 0.5) & (quotient > 0)
    # log of M/a_q, the ratio of the means times that of the rates: derivatives 1/a_p, 1/b_q, -1/a_q, -1/b_p
    by_sum = log_quotient(a_p, a_q) + log_quotient(b_q, b_p)
    log = torch.where(near, torch.log1p(torch.where(near, t, 0.0)), by_sum)
    by_a_q = masked_product(d, lgamma_slope(a_q, a_p, d)) - log
    by_a_p = a_q / a_p * t - masked_product(d, lgamma_curvature(a_p))
    return by_a_p, -(a_q / b_p) * t, by_a_q, a_q / b_q * t


gamma_kl = scalar_rule(_value, _gradient)


@register_hardened(Gamma, Gamma)
def kl_gamma_gamma(p: TorchGamma, q: TorchGamma) -> Tensor:
    """KL between gamma distributions, elementwise; see the module."""
    return gamma_kl(p.concentration, p.rate, q.concentration, q.rate)
