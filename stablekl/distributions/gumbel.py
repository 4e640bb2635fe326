r"""Gumbel distributions, and their KL divergence as a sum of two non-negative terms.

With :math:`z = (\mu_q - \mu_p)/\beta_q`, :math:`r = \beta_p/\beta_q`, :math:`w = z + \log \Gamma(1 + r)` and
:math:`E(w) = e^w - 1 - w`,

.. math:: KL = E(w) + \left[\log \Gamma(r) + \gamma (r - 1)\right],

where the second is the Bregman divergence of lgamma at r from 1. Both come from r - 1 = :math:`(\beta_p -
\beta_q)/\beta_q`, by `_bregman`; :math:`\log \Gamma(1 + r) = (1 - \gamma)(r - 1)` plus its divergence from 2, or
:math:`-\gamma r` plus that from 1. The exponential takes w to twice the digits: rounding an exponent of 700 costs 350
ulp. torch's :math:`e^z \Gamma(1 + r) - \log r - z + \gamma r - 1 - \gamma` cancels near p = q.

In the gradient :math:`e^w` has an exponent of its own (`_scaled`), since what it is divided by may be as large.

The negative logarithm of a Weibull variable is a Gumbel variable, so `weibull` uses the same function of z and r.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Gumbel as TorchGumbel

from .. import _double, _double_gamma
from .._bregman import lgamma_bregman_value, lgamma_change, log_quotient, remainder_of_log
from .._double import Double
from .._opaque import where_needed
from .._scaled import Scaled, scaled, shifted, where
from .._wide import difference, narrow, wide
from .._wide import quotient as wide_quotient
from ..registry import register_hardened
from ..special import expm1_value, expm1mx_value, log_ratio_bregman_value
from ._base import Checked
from ._density import checked, evaluated, exponential, log1mexp, standardised
from ._scalar import attached, scalar_rule

__all__ = ["Gumbel", "Slopes", "extreme_value", "slopes"]

_EULER = 0.57721566490153286
# From here on e^w takes w to twice the digits.
_LARGE = 1.0
# The divergence is infinite long before; of a derivative e^w may be a factor up to e^1500.
_BEYOND = 1e5
# Ratios of the scales beyond which lgamma, or digamma, is the leading term of its expansion to all digits.
_TINY, _HUGE = 2.0**-64, 2.0**100
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


def _next_lgamma(r: Tensor, d: Tensor) -> Tensor:
    """The logarithm of Gamma(1 + r), d = r - 1, to its relative accuracy next to both of its zeros."""
    low = r < 0.5
    one = torch.ones_like(r)
    at, step = torch.where(low, one, 2 * one), torch.where(low, r, d)
    ratio = (1 + r) * remainder_of_log(-step / (1 + r), at / (1 + r))
    return torch.where(low, -_EULER * r, (1 - _EULER) * d) + (ratio + lgamma_bregman_value(1 + r, at, step))


class _Exponent(NamedTuple):
    """The w of the module's head as a float, and e^w."""

    w: Tensor
    power: Scaled


def _exponent(z: Double, up: Tensor, down: Tensor) -> _Exponent:
    """W = z + log Gamma(1 + up/down)."""
    r, d = up / down, (up - down) / down
    ratio, usual = scaled(up) / scaled(down), r < _HUGE
    plain = _next_lgamma(torch.where(usual, r, 1.0), torch.where(usual, d, 0.0))
    # beyond, r log r - r is all, which may be no float though the sum is one
    lgamma = where(usual, scaled(plain), ratio * scaled(ratio.log() - 1))
    w = (scaled(z.hi) + lgamma).rounded()
    w = torch.where(z.hi.isinf() & usual, z.hi, w)
    bounded = w.clamp(-_BEYOND, _BEYOND)
    k = torch.round(bounded / math.log(2))
    careful = (bounded > _LARGE) & (bounded < _BEYOND) & (r < _HUGE)
    mantissa = _exp_less(Double(bounded, torch.zeros_like(w)), k)
    return _Exponent(w, Scaled(_precise_mantissa(mantissa, careful, *z, up, down, k), k))


def _exp_less(x: Double, k: Tensor) -> Tensor:
    """The exponential of x less k log 2."""
    rest = _double.subtract(x, _double.multiply(k, _double.add(torch.zeros_like(k), _double.LOG_2)))
    return torch.exp(rest.hi) * (1 + rest.lo)


@where_needed
def _precise_mantissa(z_hi: Tensor, z_lo: Tensor, up: Tensor, down: Tensor, k: Tensor) -> Tensor:
    lgamma = _double_gamma.lgamma(_double.add(narrow(wide_quotient(wide(up), wide(down))), 1.0))
    return _exp_less(_double.add(Double(z_hi, z_lo), lgamma), k)


def extreme_value(z: Double, up: Tensor, down: Tensor) -> Tensor:
    """The divergence for z and r = up/down."""
    r, d = up / down, (up - down) / down
    infinite, tiny = r == torch.inf, r < _TINY
    usual = ~(infinite | tiny)
    r, d = torch.where(usual, r, 1.0), torch.where(usual, d, 0.0)
    # the divergence of a log a from 1, and that of the rest of lgamma; of r below any float only the logarithm is left
    shape = r * log_ratio_bregman_value(*(torch.where(usual, x, 1.0) for x in (down, up)))
    shape = shape + lgamma_bregman_value(r, torch.ones_like(r), d)
    shape = torch.where(usual, shape, torch.where(tiny, log_quotient(down, up) - _EULER, torch.inf))
    w, power = _exponent(z, up, down)
    large = w > _LARGE
    near = expm1mx_value(torch.where(large, 0.0, w))
    level = torch.where(large, power.rounded() - 1 - w.clamp(max=_BEYOND), near)
    return torch.where(infinite, torch.inf, level + shape)


class Slopes(NamedTuple):
    """The derivatives of `extreme_value`.

    Attributes:
        power: by z, e^w - 1.
        by_ratio: by r, power digamma(1 + r) + digamma(r) + Euler's constant.
    """

    power: Scaled
    by_ratio: Scaled


def slopes(z: Double, smooth: Tensor, up: Tensor, down: Tensor) -> Slopes:
    """For z, which ``smooth`` has the derivatives of, and r = up/down."""
    ratio = scaled(up) / scaled(down)
    r = ratio.rounded()
    tiny, huge = r < _TINY, r > 1 / _TINY
    usual = ~(tiny | huge)
    r = torch.where(usual, r, 1.0)
    d = attached(torch.where(usual, (up - down) / down, 0.0), r - 1)
    one, two = torch.ones_like(r), torch.full_like(r, 2.0)
    near = d.abs() < 0.5
    log = torch.where(near, torch.log1p(torch.where(near, d, 0.0)), torch.log(r))
    next_digamma = (1 - _EULER) + (torch.log1p(d / 2) + lgamma_change(1 + r, two, d))
    end = torch.where(tiny, -_EULER, ratio.log())
    following = scaled(torch.where(usual, next_digamma, end))
    edge = where(tiny, -(scaled(one) / ratio), scaled(ratio.log() + _EULER))
    digamma = where(usual, scaled(log + lgamma_change(r, one, d)), edge)

    with torch.no_grad():  # which stops no tangent of forward mode: inputs are detached
        w, exp = _exponent(Double(*(x.detach() for x in z)), up.detach(), down.detach())
        low = w < _LARGE
        value = where(low, scaled(expm1_value(torch.where(low, w, 0.0))), exp + scaled(-one))
        slope = shifted(exp.mantissa, exp.exponent - value.exponent)
    # e^w times w has the derivatives of e^w, where e^w is taken to be constant
    moving = torch.where(usual & (w < 600), smooth + torch.lgamma(1 + r), 0.0)
    power = Scaled(attached(value.mantissa, slope * moving), value.exponent)
    exp = Scaled(attached(exp.mantissa, exp.mantissa * moving), exp.exponent)
    # both digammas cancel where e^w is small
    apart = exp * following + (scaled(one * _EULER) - scaled(one) / ratio)
    return Slopes(power, where(value.rounded() < -0.5, apart, power * following + digamma))


def _value(mu_p: Tensor, b_p: Tensor, mu_q: Tensor, b_q: Tensor) -> Tensor:
    return extreme_value(_shift(mu_p, mu_q, b_q), b_p, b_q)


def _shift(mu_p: Tensor, mu_q: Tensor, b_q: Tensor) -> Double:
    return narrow(wide_quotient(difference(wide(mu_q), wide(mu_p)), wide(b_q)))


def _gradient(mu_p: Tensor, b_p: Tensor, mu_q: Tensor, b_q: Tensor) -> tuple[Tensor, ...]:
    scale = scaled(b_q)
    z, r = (scaled(mu_q) - scaled(mu_p)) / scale, scaled(b_p) / scale
    with torch.no_grad():
        exact = _shift(mu_p.detach(), mu_q.detach(), b_q.detach())
    s = slopes(exact, z.rounded(), b_p, b_q)
    by_mu = (s.power / scale).rounded()
    by_q = (s.power * z + r * s.by_ratio) / scale
    return -by_mu, (s.by_ratio / scale).rounded(), by_mu, -by_q.rounded()


_kl = scalar_rule(_value, _gradient)


@register_hardened(Gumbel, Gumbel)
def kl_gumbel_gumbel(p: TorchGumbel, q: TorchGumbel) -> Tensor:
    """KL between Gumbel distributions, elementwise; see the module."""
    return _kl(p.loc, p.scale, q.loc, q.scale)
