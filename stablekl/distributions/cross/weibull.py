r"""KL between Weibull and exponential or Gamma distributions, in both directions; torch has none of them.

An exponential distribution is the Weibull of concentration 1: its pairs are those of `weibull`, by the same two terms.
Next to a Gamma of concentration c and rate r, or of a and b, and with t = 1/k, :math:`E(y) = y - 1 - \log y`,

.. math::
    KL(W \| G) &= \mathrm{deviance}(c, r m) + \Omega, \quad m = \lambda\,\Gamma(1 + t), \\
    \Omega &= g(c) - 1 + c [\log \Gamma(1 + t) + \gamma t] - \gamma - \log t; \\
    KL(G \| W) &= E(M) + \Omega', \quad M = \frac{\Gamma(a + k)}{\Gamma(a)} (b \lambda)^{-k}, \\
    \Omega' &= 1 + \log \Gamma(a + k) - 2 \log \Gamma(a) + (a - k) \psi(a) - a - \log k.

Both terms are divergences, from the best rate and from the best scale. The Omega vanish where both distributions are
exponential, as quadratic forms that are nearly degenerate, of 0.047 to 3.1: whatever their terms are, they cancel by a
factor of 67. So they are summed in twice the digits, and where both concentrations are within 1e-6 of 1, taken from the
square completed and the third and fourth derivatives.

Gradients are by hand, or those of sums of terms that vanish one by one where both are exponential.

Accuracy, float64: 37 ulp at most (Weibull against Gamma; Gamma against Weibull 5, the exponential pairs 5) in 1,500
parameter sets of each, and up to 2,000 at the best rate or scale. float32: correctly rounded, as far as seen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Exponential as TorchExponential
from torch.distributions import Gamma as TorchGamma
from torch.distributions import Weibull as TorchWeibull

from ... import _bregman, _double, _double_gamma, _wide
from ..._autograd import may_hold
from ..._double import (
    EULER,
    HALF_LOG_TAU,
    Double,
    add,
    divide,
    log,
    multiply,
    negative,
    select,
    subtract,
)
from ..._scaled import scaled
from ..._wide import Wide, difference, narrow, product, wide
from ...registry import register_hardened
from ...special import bd0, expm1mx_value
from .._scalar import attached, scalar_rule
from ..exponential import Exponential
from ..gamma import Gamma
from ..gumbel import extreme_value, slopes
from ..weibull import Weibull
from ._pieces import deviance, lgamma_bregman, remainders
from ._rule import register_pair

__all__ = ["kl_exponential_weibull", "kl_gamma_weibull", "kl_weibull_exponential", "kl_weibull_gamma"]

_EULER = 0.57721566490153286
_LESS_EULER: Any = Double(0.42278433509846713, 4.942915152430645e-18)  # type: ignore[arg-type]

# ---- Weibull and exponential --------------------------------------------------------------------------------------


def _shift(x: Tensor, y: Tensor) -> Wide:
    """The logarithm of a product, to its relative accuracy where that is 1."""
    return wide(_wide.log(product(wide(x), wide(y))))


def _weibull_exponential_value(s: Tensor, k: Tensor, rate: Tensor) -> Tensor:
    return extreme_value(narrow(_shift(s, rate)), torch.ones_like(k), k)


def _weibull_exponential_gradient(s: Tensor, k: Tensor, rate: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        z = narrow(_shift(s.detach(), rate.detach()))
    at = slopes(z, attached(z.hi, torch.log(s) + torch.log(rate)), torch.ones_like(k), k)
    by_t = at.by_ratio / scaled(k) / scaled(k)
    return (at.power / scaled(s)).rounded(), -by_t.rounded(), (at.power / scaled(rate)).rounded()


def _exponential_weibull_value(rate: Tensor, s: Tensor, k: Tensor) -> Tensor:
    return extreme_value(narrow(product(_shift(s, rate), wide(-k))), k, torch.ones_like(k))


def _exponential_weibull_gradient(rate: Tensor, s: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        level = _shift(s.detach(), rate.detach())
        z = narrow(product(level, wide(-k.detach())))
    smooth = attached(narrow(level).hi, torch.log(s) + torch.log(rate))
    at = slopes(z, -k * smooth, k, torch.ones_like(k))
    by_k = at.by_ratio - at.power * scaled(smooth)
    power = -scaled(k) * at.power
    return (power / scaled(rate)).rounded(), (power / scaled(s)).rounded(), by_k.rounded()


_weibull_exponential = scalar_rule(_weibull_exponential_value, _weibull_exponential_gradient)
_exponential_weibull = scalar_rule(_exponential_weibull_value, _exponential_weibull_gradient)


@register_hardened(Weibull, Exponential)
def kl_weibull_exponential(p: TorchWeibull, q: TorchExponential) -> Tensor:
    """KL of Weibull against Exponential, elementwise; see the module."""
    return _weibull_exponential(p.scale, p.concentration, q.rate)


@register_hardened(Exponential, Weibull)
def kl_exponential_weibull(p: TorchExponential, q: TorchWeibull) -> Tensor:
    """KL of Exponential against Weibull, elementwise; see the module."""
    return _exponential_weibull(p.rate, q.scale, q.concentration)


# ---- both concentrations near 1 -----------------------------------------------------------------------------------

_NEAR = 1e-6
_ENDLESS, _SHORT, _LEAST, _FAR, _HUGE = 1e-4, 1e-8, 1e-290, 1e12, 2.5e305
# Coefficients of x^2, y^2 less 1/(4 _SQUARE), of log Gamma(1 + x) and log Gamma(2 + x) from x^2 on, and of the Omega
# from y^3, x y^2, ... on, by mpmath's derivatives at 0.
_SQUARE, _REST = 0.32246703342411322, 0.047193985058898003
_ONE, _TWO = (0.8224670334241132, -0.40068563438653143), (0.3224670334241132, -0.06735230105319809)
_OMEGA = ((-0.40068563438653143, 0.3224670334241132, 0.0, -0.23401896771986476),
          (0.27058080842778455, -0.06735230105319809, 0.0, 0.0, 0.18724747509445121))  # fmt: skip
_OMEGA_PRIME = ((-0.40068563438653143, -0.20205690315959429, 1.0, -0.46803793543972947),
                (0.27058080842778455, 0.08232323371113819, 0.12348485056670729, -1.0, 0.56174242528335364))  # fmt: skip


def _near_exponential(x: Tensor, y: Tensor, sign: float, powers: tuple[tuple[float, ...], ...]) -> Tensor:
    """Either Omega up to the fourth order; ``sign`` that of its xy."""
    mixed = x + (0.5 * sign / _SQUARE) * y
    total = _SQUARE * mixed * mixed + _REST * y * y
    for row in powers:
        for i, c in enumerate(row):
            total = total + c * x**i * y ** (len(row) - 1 - i)
    return total


def _series(x: Tensor, coefficients: tuple[float, float]) -> Tensor:
    return x * x * (coefficients[0] + x * coefficients[1])


def _total(*terms: Double | Tensor) -> Tensor:
    return _double.rounded(_double.total(*terms))


# ---- Weibull against Gamma ----------------------------------------------------------------------------------------


def _weibull_gamma(s: Tensor, k: Tensor, c: Tensor, r: Tensor) -> Tensor:
    # for small k the mean is beyond any float, whatever it is multiplied by
    endless = k < _ENDLESS
    k = torch.where(endless, 1.0, k)
    t, x, y = divide(1.0, k), c - 1, divide(1 - k, k)
    level = y.hi.abs() < _NEAR
    small = torch.where(level, y.hi, 0.0)
    # log Gamma(1 + t), which vanishes at 1
    gain = select(level, add(multiply(y, _LESS_EULER), _series(small, _TWO)), _double_gamma.lgamma(add(t, 1.0)))
    # of short t the first order cancels
    short = t.hi < _SHORT
    bend = product(wide(torch.where(short, t.hi * (_ONE[0] + t.hi * _ONE[1]), 1.0)), wide(t))
    gain = select(short, subtract(narrow(bend), multiply(t, EULER)), gain)

    near = level & (x.abs() < _NEAR)
    inner = _near_exponential(torch.where(near, x, 0.0), small, 1.0, _OMEGA)
    remainder = _double_gamma.stirling(c).lgamma
    constant = subtract(subtract(HALF_LOG_TAU, EULER), 1.0)
    bulk = select(short, narrow(product(bend, wide(c))), multiply(add(gain, multiply(t, EULER)), c))
    outer = _total(add(remainder, constant), multiply(log(c), -0.5), log(k), bulk)

    mean = product(_wide.exp(gain), wide(s), wide(r))
    return torch.where(endless, torch.inf, deviance(c, mean) + torch.where(near, inner, outer))


def _weibull_gamma_smooth(s: Tensor, k: Tensor, c: Tensor, r: Tensor) -> Tensor:
    t, one = 1 / k, torch.ones_like(k)
    y = attached((1 - k) / k, t - 1)
    gain = torch.lgamma(1 + t)
    omega = lgamma_bregman(c, one, c - 1) + (c - 1) * (gain + _EULER * y) + _bregman.lgamma_bregman(t, one, y)
    return bd0(c, r * s * torch.exp(gain)) + omega


kl_weibull_gamma = register_pair(Weibull, Gamma, _weibull_gamma, _weibull_gamma_smooth, (1.0, 1.0, 1.0, 1.0))


# ---- Gamma against Weibull ----------------------------------------------------------------------------------------


def _log_moment(a: Tensor, b: Tensor, s: Tensor, k: Tensor) -> Double:
    """The logarithm of M."""
    x, y = a - 1, k - 1
    near = (x.abs() < _NEAR) & (y.abs() < _NEAR)
    inside = _series(torch.where(near, x + y, 0.0), _TWO) - _series(torch.where(near, x, 0.0), _ONE)
    inner = add(add(multiply(y, _LESS_EULER), x), inside)
    outer = subtract(_double_gamma.lgamma(_double.exact_sum(a, k)), _double_gamma.lgamma(a))
    return subtract(select(near, inner, outer), narrow(product(_shift(b, s), wide(k))))


def _large_shape(a: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Of large a: log Gamma(a + k) - log Gamma(a) - k digamma(a), and Omega', where nothing cancels any more."""
    gap = _bregman.lgamma_bregman(a + k, a, k)
    r, s = remainders(a)
    # log(a/k^2)/2 of numbers whose square may overflow
    logs = 0.5 * torch.log(a) - torch.log(k) - HALF_LOG_TAU.hi
    return gap, 0.5 + gap + logs - a * s - r


def _gamma_weibull_value(a: Tensor, b: Tensor, s: Tensor, k: Tensor) -> Tensor:
    far, endless = a > _FAR, (a <= _FAR) & (k > _HUGE)  # log Gamma(a + k), a part of the divergence, overflows
    k = torch.where(endless, 1.0, k)
    if not may_hold(far | endless):
        return _gamma_weibull_near(a, b, s, k)
    one = torch.ones_like(a)
    a_far, k_far = torch.where(far, a, _FAR), torch.where(far, k, one)
    gap, omega = _large_shape(a_far, k_far)
    level = difference(wide(_double_gamma.digamma(a_far)), _shift(torch.where(far, b, one), torch.where(far, s, one)))
    beyond = _moment(add(narrow(product(level, wide(k_far))), gap)) + omega
    beyond = torch.where(gap.isinf(), gap, beyond)
    near = _gamma_weibull_near(*(torch.where(far, one, v) for v in (a, b, s, k)))
    return torch.where(endless, torch.inf, torch.where(far, beyond, near))


def _moment(w: Double) -> Tensor:
    """E(M) for M = e^w."""
    large = w.hi > 1
    power = torch.exp(w.hi) * (1 + torch.where(w.hi < 800, w.lo, 0.0))
    return torch.where(large, power - 1 - w.hi.clamp(max=1e4), expm1mx_value(torch.where(large, 0.0, w.hi)))


def _gamma_weibull_near(a: Tensor, b: Tensor, s: Tensor, k: Tensor) -> Tensor:
    x, y, w = a - 1, k - 1, _log_moment(a, b, s, k)
    near = (x.abs() < _NEAR) & (y.abs() < _NEAR)
    inner = _near_exponential(torch.where(near, x, 0.0), torch.where(near, y, 0.0), -1.0, _OMEGA_PRIME)
    apart = _double.exact_sum(a, -k)
    logs = subtract(_double_gamma.lgamma(_double.exact_sum(a, k)), multiply(_double_gamma.lgamma(a), 2.0))
    tiny = a < _LEAST
    moved = multiply(apart, _double_gamma.digamma(torch.where(tiny, 1.0, a)))
    outer = _total(logs, select(tiny, (k - a) / a, moved), subtract(1.0, a), negative(log(k)))
    return _moment(w) + torch.where(near, inner, outer)


def _gamma_weibull_gradient(a: Tensor, b: Tensor, s: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        w = _log_moment(*(x.detach() for x in (a, b, s, k))).hi
    level = torch.log(b) + torch.log(s)
    w = attached(w, torch.lgamma(a + k) - torch.lgamma(a) - k * level)
    finite = w < 709
    excess = torch.expm1(torch.where(finite, w, 0.0))  # M - 1
    ratio = k / a
    step = torch.log1p(ratio) + _bregman.lgamma_change(a + k, a, k)  # digamma(a + k) - digamma(a)
    curvature = _bregman.lgamma_curvature(a)
    by_a = excess * step + (step - ratio - k * curvature) + a * curvature
    by_k = excess * (torch.digamma(a + k) - level) + (step - 1 / k)
    slopes_ = (by_a, -k / b * excess, -k / s * excess, by_k)
    return tuple(torch.where(finite, x, 0.0) for x in slopes_)


_gamma_weibull = scalar_rule(_gamma_weibull_value, _gamma_weibull_gradient)


@register_hardened(Gamma, Weibull)
def kl_gamma_weibull(p: TorchGamma, q: TorchWeibull) -> Tensor:
    """KL of Gamma against Weibull, elementwise; see the module."""
    return _gamma_weibull(p.concentration, p.rate, q.scale, q.concentration)
