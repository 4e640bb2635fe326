r"""Gumbel distributions, and their KL divergence as a sum of two non-negative terms.

With :math:`z = (\mu_q - \mu_p)/\beta_q`, :math:`r = \beta_p/\beta_q`, :math:`w = z + \log \Gamma(1 + r)` and
:math:`E(w) = e^w - 1 - w`,

.. math:: KL = E(w) + \left[\log \Gamma(r) + \gamma (r - 1)\right],

where the second is the Bregman divergence of lgamma at r from 1. Both come from r - 1 = :math:`(\beta_p -
\beta_q)/\beta_q`, by `_bregman`; :math:`\log \Gamma(1 + r) = (1 - \gamma)(r - 1)` plus its divergence from 2. For w
above 1 the exponential takes w to twice the digits: rounding an exponent of 700 costs 350 ulp. torch's :math:`e^z
\Gamma(1 + r) - \log r - z + \gamma r - 1 - \gamma` cancels near p = q.

The negative logarithm of a Weibull variable is a Gumbel variable, so `weibull` uses the same function of z and r.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Gumbel as TorchGumbel

from .. import _double
from .._autograd import masked_product, may_hold
from .._bregman import lgamma_bregman_value, lgamma_slope, remainder_of_log
from .._double import Double
from ..registry import register_hardened
from ..special import expm1_value, expm1mx_value, log_ratio_bregman_value
from ._base import Checked
from ._density import checked, evaluated, exponential, log1mexp, standardised
from ._scalar import attached, scalar_rule

__all__ = ["Gumbel", "Slopes", "extreme_value", "slopes"]

_EULER = 0.57721566490153286
# From here on e^w takes w to twice the digits.
_LARGE = 1.0
# z from which on log(1 - e^-h), h = e^-z, is -z; that h is still a normal number.
_UNDERFLOW = 600.0


class Gumbel(TorchGumbel, Checked):
    """`torch.distributions.Gumbel` with a KL divergence that is accurate for every pair of parameters.

    Args:
        loc: mode, any shape that broadcasts with ``scale``.
        scale: positive.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: ``scale`` is zero, negative or NaN somewhere (says where, and how to parameterise).
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of the density."""
        return evaluated(_log_density, checked(self, value), self.loc, self.scale)

    def cdf(self, value: Tensor) -> Tensor:
        """P(X <= value)."""
        return evaluated(lambda *x: _tail(*_hazard(*x)), checked(self, value), self.loc, self.scale)

    def sf(self, value: Tensor) -> Tensor:
        """P(X > value), which 1 - cdf loses in the upper tail."""
        return evaluated(lambda *x: -torch.expm1(-_hazard(*x)[0]), checked(self, value), self.loc, self.scale)

    def log_cdf(self, value: Tensor) -> Tensor:
        """Log of P(X <= value), finite where that underflows."""
        return evaluated(lambda *x: -_hazard(*x)[0], checked(self, value), self.loc, self.scale)

    def log_sf(self, value: Tensor) -> Tensor:
        """Log of P(X > value), finite where that underflows."""
        return evaluated(_log_upper_tail, checked(self, value), self.loc, self.scale)


def _hazard(x: Tensor, m: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """e^-z, z = (x - m)/b, and what is lost of it: as an exponent it is off by the rounding of z times z times e^-z."""
    return exponential(*standardised(-x, -m, b))


def _tail(h: Tensor, lost: Tensor) -> Tensor:
    return torch.exp(-h) * (1 - lost)


def _log_upper_tail(x: Tensor, m: Tensor, b: Tensor) -> Tensor:
    z = (x - m) / b
    far = z > _UNDERFLOW
    h, lost = _hazard(torch.where(far, m, x), m, b)
    return torch.where(far, -z, log1mexp(h, lost))


def _log_density(x: Tensor, m: Tensor, b: Tensor) -> Tensor:
    return -(x - m) / b - _hazard(x, m, b)[0] - torch.log(b)


def _lgamma_near_two(r: Tensor, d: Tensor) -> Tensor:
    """The logarithm of Gamma(1 + r), d = r - 1."""
    two = torch.full_like(r, 2.0)
    ratio = (1 + r) * remainder_of_log(-d / (1 + r), 2 / (1 + r))
    return (1 - _EULER) * d + (ratio + lgamma_bregman_value(1 + r, two, d))


def _power(z: Double, up: Tensor, down: Tensor, w: Tensor) -> Tensor:
    """The exponential of w, which is z + log Gamma(1 + up/down)."""
    large = w > _LARGE
    if not may_hold(large):
        return torch.exp(w)
    careful = large & (w < 800) & (up / down < 1e15)
    ratio = _double.divide(torch.where(careful, up, 1.0), torch.where(careful, down, 1.0))
    exponent = _double.lgamma(_double.add(ratio, torch.ones_like(w)))
    exponent = _double.add(exponent, Double(*(torch.where(careful, x, 0.0) for x in z)))
    return torch.where(careful, torch.exp(exponent.hi) * (1 + exponent.lo), torch.exp(w))


def extreme_value(z: Double, up: Tensor, down: Tensor) -> Tensor:
    """The divergence for z and r = up/down."""
    r, d = up / down, (up - down) / down
    # the divergence of a log a from 1, and that of the rest of lgamma
    shape = r * log_ratio_bregman_value(down, up) + lgamma_bregman_value(r, torch.ones_like(r), d)
    w = z.hi + _lgamma_near_two(r, d)
    large = w > _LARGE
    near = expm1mx_value(torch.where(large, 0.0, w))
    return torch.where(large, _power(z, up, down, w) - 1 - w.clamp(max=1e4), near) + shape


class Slopes(NamedTuple):
    """Parts of the derivatives: by z that is ``power``, and by r ``power * next_digamma + digamma``.

    Attributes:
        power: e^w - 1.
        next_digamma: of 1 + r.
        digamma: of r, plus Euler's constant.
    """

    power: Tensor
    next_digamma: Tensor
    digamma: Tensor


def slopes(z: Double, up: Tensor, down: Tensor) -> Slopes:
    """For z and r = up/down; differentiable through z's first part."""
    r = up / down
    d = attached((up - down) / down, r - 1)
    one, two = torch.ones_like(r), torch.full_like(r, 2.0)
    near = d.abs() < 0.5
    log = torch.where(near, torch.log1p(torch.where(near, d, 0.0)), torch.log(r))
    next_digamma = (1 - _EULER) + (torch.log1p(d / 2) + d * lgamma_slope(1 + r, two, d))
    with torch.no_grad():
        w = z.hi + _lgamma_near_two(r, d)
        power = torch.where(w < _LARGE, expm1_value(w.clamp(max=_LARGE)), _power(z, up, down, w) - 1)
    finite = w < 600
    smooth = torch.exp(torch.where(finite, w, 0.0)) * torch.where(finite, z.hi + torch.lgamma(1 + r), 0.0)
    power = attached(power, smooth)  # e^w times w has the derivatives of e^w, where w is taken to be constant
    return Slopes(power, next_digamma, log + d * lgamma_slope(r, one, d))


def _value(mu_p: Tensor, b_p: Tensor, mu_q: Tensor, b_q: Tensor) -> Tensor:
    return extreme_value(_double.divide(_double.subtract(mu_q, mu_p), b_q), b_p, b_q)


def _gradient(mu_p: Tensor, b_p: Tensor, mu_q: Tensor, b_q: Tensor) -> tuple[Tensor, ...]:
    z, r = (mu_q - mu_p) / b_q, b_p / b_q
    with torch.no_grad():
        exact = _double.divide(_double.subtract(mu_q, mu_p), b_q)
    s = slopes(Double(attached(exact.hi, z), exact.lo), b_p, b_q)
    by_mu = s.power / b_q
    by_p = masked_product(s.power, s.next_digamma) + s.digamma
    by_q = masked_product(s.power, z + r * s.next_digamma) + r * s.digamma
    return -by_mu, by_p / b_q, by_mu, -by_q / b_q


_kl = scalar_rule(_value, _gradient)


@register_hardened(Gumbel, Gumbel)
def kl_gumbel_gumbel(p: TorchGumbel, q: TorchGumbel) -> Tensor:
    """KL between Gumbel distributions, elementwise; see the module."""
    return _kl(p.loc, p.scale, q.loc, q.scale)
