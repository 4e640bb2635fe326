r"""KL between log-normal and Gamma, exponential or Weibull distributions, in both directions; torch has none of them.

With :math:`\mu, s` of the logarithm, c and r, or :math:`\lambda` and k of the other, R and S what Stirling's formulas
leave of lgamma and digamma (`_pieces`), :math:`E(y) = y - 1 - \log y` and :math:`w = k (\mu - \log \lambda) + (k
s)^2/2`,

.. math::
    KL(LN \| G) &= \mathrm{deviance}(c, r e^{\mu + s^2/2}) + \tfrac12 E(c s^2) + R(c), \\
    KL(LN \| W) &= (e^w - 1 - w) + \tfrac12 E((k s)^2) + R(1), \\
    KL(G \| LN) &= \frac{(\psi(c) - \log r - \mu)^2}{2 s^2} + \tfrac12 E\!\left(\frac{\psi'(c)}{s^2}\right)
                   + \left[\tfrac12 \log(c\,\psi'(c)) - R(c) - c\,S(c)\right], \\
    KL(W \| LN) &= \frac{(\log \lambda - \gamma/k - \mu)^2}{2 s^2}
                   + \tfrac12 E\!\left(\frac{\pi^2}{6 (k s)^2}\right) + 0.0906.

Nothing is negative; the last bracket, how far the logarithm of a Gamma variable is from a normal one, cancels by a
factor of 5, and below c = 0.3 it is summed from what is left of c Gamma(c). All arguments are known to twice the
digits: of the difference of two means nothing would be left after a rounding.

Accuracy, float64: 24 ulp at most (LogNormal against Gamma at the closest one; Gamma against LogNormal 14, the others 5)
in 1,200 parameter sets of each, and up to 2,000 at the closest q of the first two. float32: correctly rounded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _bregman, _scaled, _wide
from ..._autograd import may_hold
from ..._double import EULER, Double, add, negative, select, subtract
from ..._double_gamma import digamma
from ..._elementwise import horner
from ..._scaled import Scaled, scaled, where
from ..._wide import Wide, difference, half, narrow, product, quotient, total, wide
from ...special import bd0, expm1mx_value, log_ratio_bregman
from ..exponential import Exponential
from ..gamma import Gamma
from ..log_normal import LogNormal
from ..weibull import Weibull
from ._moments import added, normal_slopes, powers, summed
from ._pieces import deviance, excess, lgamma_bregman, remainders
from ._rule import register_pair

__all__ = [
    "kl_exponential_log_normal",
    "kl_gamma_log_normal",
    "kl_log_normal_exponential",
    "kl_log_normal_gamma",
    "kl_log_normal_weibull",
    "kl_weibull_log_normal",
]

_EULER = 0.57721566490153286
_EDGE = 0.3
_LEAST, _DEEP = 1e-290, 6e4
_LOG_SMALL = -640.0  # of a mean that the gradient takes by its logarithm
# R(1) = 1 - log(2 pi)/2, and log(2 pi)/2 - 1/2
_REMAINDER, _CONSTANT = 0.081061466795327258220, 0.41893853320467274178
# the variance of a Gumbel of scale 1, pi^2/6, and the bracket at c = 1, log(pi^3/3)/2 - 1/2 - euler
_VARIANCE: Any = Double(1.6449340668482264, 3.040672350398476e-17)  # type: ignore[arg-type]
_FROM_GUMBEL = 0.090573019538512554911
# From 20 on in powers of 1/c, highest first: the derivative of the bracket, times c^2, and c times that of log psi'(c);
# what is left out is 3e-16 and 3e-17.
_LARGE = 20.0
_SHAPE = (
    *(7741785698027 / 5230697472000, -15609883 / 452874240, -13933289 / 38320128, -80467 / 17740800),
    *(895583 / 7257600, 391 / 34560, -7247 / 120960, -65 / 4032, 61 / 1440, 7 / 240, -1 / 24, -1 / 12),
)
_LEAN = (
    7741785698027 / 2615348736000,
    1523365 / 3483648,
    -13933289 / 19160064,
    -129497 / 806400,
    895583 / 3628800,
    1543 / 17280,
    -7247 / 60480,
    -23 / 288,
    61 / 720,
    1 / 8,
    -1 / 12,
    -1 / 2,
    -1.0,
)


# ---- from a log-normal distribution -------------------------------------------------------------------------------


def _log_normal_gamma(mu: Tensor, s: Tensor, c: Tensor, r: Tensor) -> Tensor:
    square = product(wide(s), wide(s))
    level = narrow(total(half(square), wide(mu)))
    low = level.hi < -_DEEP  # then the mean is nothing beside c, but for its logarithm
    mean = product(_wide.exp(level), wide(r))
    part = torch.where(low, c * ((torch.log(c) - torch.log(r)) - level.hi - 1), deviance(c, mean))
    return part + (0.5 * excess(product(square, wide(c)), torch.ones_like(c)) + remainders(c)[0])


def _log_normal_gamma_smooth(mu: Tensor, s: Tensor, c: Tensor, r: Tensor) -> Tensor:
    # R(c) as a divergence from 1, its slope there apart
    one, square = torch.ones_like(c), s * s
    shape = lgamma_bregman(c, one, c - 1) + (0.5 - _EULER) * (c - 1) - 0.5 * (c - 1 - torch.log(c))
    exponent = mu + 0.5 * square
    log_mean = torch.log(r) + exponent
    small = log_mean < _LOG_SMALL
    near = bd0(torch.where(small, 1.0, c), torch.where(small, 1.0, r * torch.exp(exponent)))
    # there c s^2/2 of both terms is left out, since it cancels
    mean = torch.where(small, c * (torch.log(c) - torch.log(r) - mu) - c, near)
    gap = torch.where(small, -torch.log(c * square), log_ratio_bregman(torch.where(small, one, c * square), one))
    return mean + 0.5 * gap + shape


def _log_normal_exponential(mu: Tensor, s: Tensor, r: Tensor) -> Tensor:
    return _log_normal_gamma(mu, s, torch.ones_like(r), r)


def _log_normal_exponential_smooth(mu: Tensor, s: Tensor, r: Tensor) -> Tensor:
    return _log_normal_gamma_smooth(mu, s, torch.ones_like(r), r)


def _weibull_level(mu: Tensor, s: Tensor, scale: Tensor, k: Tensor) -> tuple[Double, Wide]:
    """The w of the module's head, and (k s)^2."""
    spread = product(wide(k), wide(s))
    square = product(spread, spread)
    shift = product(difference(wide(_wide.log(wide(scale))), wide(mu)), wide(k))
    return narrow(difference(half(square), shift)), square


def _log_normal_weibull(mu: Tensor, s: Tensor, scale: Tensor, k: Tensor) -> Tensor:
    w, square = _weibull_level(mu, s, scale, k)
    large = w.hi > 1
    root = torch.exp(0.5 * w.hi)
    power = root * (1 + torch.where(w.hi < 1e3, w.lo, 0.0)) * root
    near = expm1mx_value(torch.where(large, 0.0, w.hi))
    level = torch.where(large, power - 1 - w.hi.clamp(max=1e4), near)
    return level + (0.5 * excess(square, torch.ones_like(k)) + _REMAINDER)


def _log_normal_weibull_gradient(mu: Tensor, s: Tensor, scale: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """By P = e^w - 1 and t = (k s)^2 e^w - 1: k P, t/s, -k P/scale and P (mu - log scale) + t/k."""
    w, exact_square = _weibull_level(*(x.detach() for x in (mu, s, scale, k)))
    one, x, spread = torch.ones_like(k), scaled(k), scaled(k) * scaled(s)
    square, shift = spread * spread, added(scaled(mu), -scaled(torch.log(scale)))
    half_square = Scaled(square.mantissa, square.exponent - 1)
    power, exp = powers(w, summed(x * shift, half_square))
    gap = _wide.attached(difference(exact_square, wide(one)), added(square, -scaled(one)))
    # t next to its zero, and of small e^w
    t = where(power.rounded() < -0.5, added(square * exp, -scaled(one)), added(gap, power * square))
    by_mu = x * power
    by_k = summed(power * shift, t / x)
    return by_mu.rounded(), (t / scaled(s)).rounded(), -(by_mu / scaled(scale)).rounded(), by_k


# ---- against a log-normal distribution ----------------------------------------------------------------------------


def _log_shape(c: Tensor) -> Tensor:
    """The bracket of the module's head."""
    r, s = remainders(c)
    small = c < _EDGE
    far = 0.5 * torch.log1p(_bregman.lgamma_bend(c) / torch.where(small, 1.0, c)) - r - c * s
    if not may_hold(small):
        return far
    x = torch.where(small, c, 0.1)
    one = torch.ones_like(c)
    up = x + 1
    curvature = _bregman.lgamma_curvature(up) + 1 / up
    # log Gamma(1) from 1 + x: digamma(1 + x) x - log Gamma(1 + x)
    rest = _bregman.lgamma_bregman_value(one, up, -x) + _bregman.remainder_of_log(x, up)
    return torch.where(small, _CONSTANT + 0.5 * torch.log1p(x * x * curvature) + (rest - x), far)


def _gamma_moments(c: Tensor, r: Tensor) -> tuple[Double, Wide]:
    """The mean and the variance of the logarithm."""
    tiny = c < _LEAST
    level = select(tiny, -1 / c, digamma(torch.where(tiny, 1.0, c)))
    inverse = quotient(wide(torch.ones_like(c)), wide(c))
    bend = wide(_bregman.lgamma_bend(c))
    return subtract(level, _wide.log(wide(r))), total(inverse, product(bend, inverse, inverse))


def _gamma_log_normal(c: Tensor, r: Tensor, mu: Tensor, s: Tensor) -> Tensor:
    mean, variance = _gamma_moments(c, r)
    z = subtract(mean, mu).hi / s
    return 0.5 * z * z + 0.5 * excess(variance, product(wide(s), wide(s))) + _log_shape(c)


def _shape_slopes(c: Tensor) -> tuple[Tensor, Tensor]:
    """The derivative of `_log_shape`, and c times that of the logarithm of trigamma.

    By trigamma and its derivative at 1 + c, of which neither grows for small c; for large c by series.
    """
    large = c > _LARGE
    x = torch.where(large, 1.0, c)
    up, w = 1 + x, 1 / torch.where(large, c, _LARGE)
    first, second = _bregman.lgamma_curvature(up) + 1 / up, torch.polygamma(2, up)
    change = x * x * first
    near = (x * first - 1) + (x * first + 0.5 * x * x * second) / (1 + change)
    lean = (x * x * x * second - 2) / (1 + change)
    return torch.where(large, w * w * horner(w, _SHAPE), near), torch.where(large, horner(w, _LEAN), lean)


def _gamma_log_normal_gradient(c: Tensor, r: Tensor, mu: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    mean, variance = _gamma_moments(c.detach(), r.detach())
    x, trigamma = scaled(c), _scaled.trigamma(scaled(c))
    # digamma(c), but for 1/c that may be no float
    one = torch.ones_like(c)
    later = torch.log1p(c) - _EULER + _bregman.lgamma_change(1 + c, one, c) - torch.log(r)
    at = normal_slopes(wide(mean), variance, added(scaled(later), -(scaled(one) / x)), trigamma, mu, s)
    shape, lean = (scaled(v) for v in _shape_slopes(c))
    by_c = summed(at.by_mean * trigamma, at.by_log_variance * lean / x, shape)
    return by_c, -(at.by_mean / scaled(r)).rounded(), *at.by_q


def _standardised(mean: Double, k: Tensor, s: Tensor) -> Tensor:
    """From a Gumbel variable of this mean and of scale 1/k, in units of s."""
    z = mean.hi / s
    spread = product(wide(k), wide(s))
    return 0.5 * z * z + 0.5 * excess(add(torch.zeros_like(k), _VARIANCE), product(spread, spread)) + _FROM_GUMBEL


def _weibull_log_normal(scale: Tensor, k: Tensor, mu: Tensor, s: Tensor) -> Tensor:
    log = difference(wide(_wide.log(wide(scale))), wide(mu))
    return _standardised(narrow(difference(log, quotient(wide(add(torch.zeros_like(k), EULER)), wide(k)))), k, s)


def _weibull_log_normal_gradient(scale: Tensor, k: Tensor, mu: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    zero, still = torch.zeros_like(k), wide(k.detach())
    mean = difference(wide(_wide.log(wide(scale.detach()))), quotient(wide(add(zero, EULER)), still))
    variance = quotient(wide(add(zero, _VARIANCE)), product(still, still))
    x, euler = scaled(k), scaled(zero + _EULER)
    smooth_variance = scaled(zero + _VARIANCE.hi) / x / x
    at = normal_slopes(mean, variance, added(scaled(torch.log(scale)), -(euler / x)), smooth_variance, mu, s)
    lag = at.by_log_variance
    by_k = summed(at.by_mean * euler / x / x, -Scaled(lag.mantissa, lag.exponent + 1) / x)
    return (at.by_mean / scaled(scale)).rounded(), by_k, *at.by_q


def _exponential_log_normal(r: Tensor, mu: Tensor, s: Tensor) -> Tensor:
    return _standardised(negative(add(add(_wide.log(wide(r)), mu), EULER)), torch.ones_like(s), s)


def _exponential_log_normal_gradient(r: Tensor, mu: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    zero = torch.zeros_like(r)
    mean = negative(add(_wide.log(wide(r.detach())), EULER))
    smooth_mean, variance = scaled(-torch.log(r) - _EULER), add(zero, _VARIANCE)
    at = normal_slopes(wide(mean), wide(variance), smooth_mean, scaled(zero + _VARIANCE.hi), mu, s)
    return -(at.by_mean / scaled(r)).rounded(), *at.by_q


kl_log_normal_gamma = register_pair(LogNormal, Gamma, _log_normal_gamma, _log_normal_gamma_smooth, (0.0, 1.0, 1.0, 1.0))
kl_log_normal_exponential = register_pair(
    LogNormal, Exponential, _log_normal_exponential, _log_normal_exponential_smooth, (0.0, 1.0, 1.0)
)
kl_log_normal_weibull = register_pair(
    LogNormal, Weibull, _log_normal_weibull, gradient=_log_normal_weibull_gradient, torch_lacks_it=True
)
kl_gamma_log_normal = register_pair(Gamma, LogNormal, _gamma_log_normal, gradient=_gamma_log_normal_gradient)
kl_weibull_log_normal = register_pair(
    Weibull, LogNormal, _weibull_log_normal, gradient=_weibull_log_normal_gradient, torch_lacks_it=True
)
kl_exponential_log_normal = register_pair(
    Exponential, LogNormal, _exponential_log_normal, gradient=_exponential_log_normal_gradient
)
