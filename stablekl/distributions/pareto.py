r"""Pareto distributions, and their KL divergence as a sum of non-negative terms.

With the smallest values m and the exponents :math:`\alpha`, where :math:`m_p \ge m_q`,

.. math:: KL = \alpha_q \log\frac{m_p}{m_q} + \mathrm{log\_ratio\_bregman}(\alpha_q, \alpha_p),

and infinite elsewhere: p has mass where q has none. torch takes the logarithms of rounded quotients, whose distance
from 1 has lost its digits near p = q.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Pareto as TorchPareto

from .. import _double
from .._bregman import log_quotient
from ..registry import register_hardened
from ..special import log_ratio_bregman_value, log_ratio_value
from ._base import Checked
from ._density import checked, evaluated, log1mexp
from ._scalar import attached, scalar_rule

__all__ = ["Pareto"]


class Pareto(TorchPareto, Checked):
    """`torch.distributions.Pareto` with a KL divergence that is accurate for every pair of parameters.

    Args:
        scale: smallest value, positive.
        alpha: positive.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is outside of its domain somewhere (says where).
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of the density, by log(value/scale), whose digits torch's difference of two logarithms loses."""
        return evaluated(_log_density, checked(self, value), self.scale, self.alpha)

    def cdf(self, value: Tensor) -> Tensor:
        """P(X <= value), to its relative accuracy next to the smallest, where torch's 1 - (scale/x)^alpha cancels."""
        return evaluated(lambda *x: -torch.expm1(-_hazard(*x)[0]), checked(self, value), self.scale, self.alpha)

    def sf(self, value: Tensor) -> Tensor:
        """P(X > value)."""
        return evaluated(_upper_tail, checked(self, value), self.scale, self.alpha)

    def log_cdf(self, value: Tensor) -> Tensor:
        """Log of P(X <= value)."""
        return evaluated(lambda *x: log1mexp(*_hazard(*x)), checked(self, value), self.scale, self.alpha)

    def log_sf(self, value: Tensor) -> Tensor:
        """Log of P(X > value), finite where that underflows."""
        return evaluated(lambda *x: -_hazard(*x)[0], checked(self, value), self.scale, self.alpha)


def _hazard(x: Tensor, m: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The exponent a log(x/m) of the upper tail, and what is lost of it."""
    safe = torch.where(x > m, x, m)
    smooth = a * log_ratio_value(safe, m)
    with torch.no_grad():
        h = _double.multiply(_double.log_quotient(safe.detach(), m.detach()), a.detach())
        fits = h.lo.isfinite()
    close = torch.where(fits, smooth, 0.0)
    return torch.where(fits, attached(h.hi, close), smooth), torch.where(fits, h.lo, 0.0)


def _upper_tail(x: Tensor, m: Tensor, a: Tensor) -> Tensor:
    h, lost = _hazard(x, m, a)
    return torch.exp(-h) * (1 - lost)


def _log_density(x: Tensor, m: Tensor, a: Tensor) -> Tensor:
    inside = x >= m
    safe = torch.where(inside, x, m)
    return torch.where(inside, log_quotient(a, safe) - a * log_ratio_value(safe, m), -torch.inf)


def _value(m_p: Tensor, a_p: Tensor, m_q: Tensor, a_q: Tensor) -> Tensor:
    outside = m_p < m_q
    ratio = log_ratio_value(torch.where(outside, m_q, m_p), m_q)
    value = a_q * ratio + log_ratio_bregman_value(a_q, a_p)
    # an invalid parameter, or NaN, is no answer of infinity
    valid = (torch.minimum(m_p, m_q) >= 0) & (torch.minimum(a_p, a_q) >= 0)
    return torch.where(valid, torch.where(outside, torch.inf, value), torch.nan)


def _gradient(m_p: Tensor, a_p: Tensor, m_q: Tensor, a_q: Tensor) -> tuple[Tensor, ...]:
    inside = m_p >= m_q
    m = torch.where(inside, m_p, m_q)
    near = m < 2 * m_q
    log = torch.where(near, torch.log1p((torch.where(near, m, m_q) - m_q) / m_q), torch.log(m) - torch.log(m_q))
    by_a_q = log + (a_q - a_p) / torch.maximum(a_p, a_q) / torch.minimum(a_p, a_q)
    partials = a_q / m_p, (a_p - a_q) / a_p / a_p, -a_q / m_q, by_a_q
    return tuple(torch.where(inside, x, 0.0) for x in partials)


_kl = scalar_rule(_value, _gradient)


@register_hardened(Pareto, Pareto)
def kl_pareto_pareto(p: TorchPareto, q: TorchPareto) -> Tensor:
    """KL between Pareto distributions, elementwise; +inf where q's smallest value is above p's; see the module."""
    return _kl(p.scale, p.alpha, q.scale, q.alpha)
