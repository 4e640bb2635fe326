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

from ... import _bregman, _double
from ..._autograd import masked_product
from ..._double import (
    EULER,
    HALF_LOG_TAU,
    Double,
    add,
    divide,
    exact_product,
    log,
    multiply,
    negative,
    select,
    subtract,
)
from ...registry import register_hardened
from ...special import bd0, expm1mx_value
from .._scalar import attached, scalar_rule
from ..exponential import Exponential
from ..gamma import Gamma
from ..gumbel import extreme_value, slopes
from ..weibull import Weibull
from ._pieces import deviance, lgamma_bregman
from ._rule import register_pair

__all__ = ["kl_exponential_weibull", "kl_gamma_weibull", "kl_weibull_exponential", "kl_weibull_gamma"]

_EULER = 0.57721566490153286
_LESS_EULER: Any = Double(0.42278433509846713, 4.942915152430645e-18)  # type: ignore[arg-type]

# ---- Weibull and exponential --------------------------------------------------------------------------------------


def _shift(x: Tensor, y: Tensor) -> Double:
    """The logarithm of a product, to its relative accuracy where that is 1."""
    return log(exact_product(x, y))


def _weibull_exponential_value(s: Tensor, k: Tensor, rate: Tensor) -> Tensor:
    return extreme_value(_shift(s, rate), torch.ones_like(k), k)


def _weibull_exponential_gradient(s: Tensor, k: Tensor, rate: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        z = _shift(s, rate)
    at = slopes(Double(attached(z.hi, torch.log(s) + torch.log(rate)), z.lo), torch.ones_like(k), k)
    by_t = masked_product(at.power, at.next_digamma) + at.digamma
    return at.power / s, -by_t / k / k, at.power / rate


def _exponential_weibull_value(rate: Tensor, s: Tensor, k: Tensor) -> Tensor:
    return extreme_value(multiply(_shift(s, rate), -k), k, torch.ones_like(k))


def _exponential_weibull_gradient(rate: Tensor, s: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        level = _shift(s, rate)
        z = multiply(level, -k)
    smooth = attached(level.hi, torch.log(s) + torch.log(rate))
    at = slopes(Double(attached(z.hi, -k * smooth), z.lo), k, torch.ones_like(k))
    by_k = masked_product(at.power, at.next_digamma - smooth) + at.digamma
    return -k * at.power / rate, -k * at.power / s, by_k


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
    t, x, y = divide(1.0, k), c - 1, divide(1 - k, k)
    level = y.hi.abs() < _NEAR
    small = torch.where(level, y.hi, 0.0)
    # log Gamma(1 + t), which vanishes at 1
    gain = select(level, add(multiply(y, _LESS_EULER), _series(small, _TWO)), _double.lgamma(add(t, 1.0)))

    near = level & (x.abs() < _NEAR)
    inner = _near_exponential(torch.where(near, x, 0.0), small, 1.0, _OMEGA)
    remainder = _double.stirling(c).lgamma
    constant = subtract(subtract(HALF_LOG_TAU, EULER), 1.0)
    bulk = multiply(add(gain, multiply(t, EULER)), c)
    outer = _total(add(remainder, constant), multiply(log(c), -0.5), log(k), bulk)

    half = _double.exp(multiply(gain, 0.5))
    product = exact_product(s, r)
    size = (product.hi * half.hi) * half.hi
    large = ~(size < 1e280)
    half = select(large, torch.ones_like(k), half)
    mean = deviance(c, multiply(multiply(product, half), half))
    return torch.where(large, size, mean) + torch.where(near, inner, outer)


def _weibull_gamma_smooth(s: Tensor, k: Tensor, c: Tensor, r: Tensor) -> Tensor:
    t, one = 1 / k, torch.ones_like(k)
    y = attached((1 - k) / k, t - 1)
    gain = torch.lgamma(1 + t)
    omega = lgamma_bregman(c, one, c - 1) + (c - 1) * (gain + _EULER * y) + _bregman.lgamma_bregman(t, one, y)
    return bd0(c, r * s * torch.exp(gain)) + omega


kl_weibull_gamma = register_pair(Weibull, Gamma, _weibull_gamma, _weibull_gamma_smooth, (1.0, 1.0, 1.0, 1.0))


# From here on Stirling's series is its first term, and lgammas are so large that of twice the digits none is left.
_STIRLING = 1e17

# ---- Gamma against Weibull ----------------------------------------------------------------------------------------


def _bend(a: Tensor, k: Tensor) -> Double:
    """The difference log Gamma(a + k) - log Gamma(a) - k log a for a > _STIRLING."""
    total = add(_double.exact_sum(a, k), -0.5)
    return subtract(multiply(total, _double.log1p(divide(k, a))), k)


def _log_moment(a: Tensor, b: Tensor, s: Tensor, k: Tensor) -> Double:
    """The logarithm of M."""
    x, y = a - 1, k - 1
    near = (x.abs() < _NEAR) & (y.abs() < _NEAR)
    inside = _series(torch.where(near, x + y, 0.0), _TWO) - _series(torch.where(near, x, 0.0), _ONE)
    inner = add(add(multiply(y, _LESS_EULER), x), inside)
    outer = subtract(_double.lgamma(_double.exact_sum(a, k)), _double.lgamma(a))
    outer = select(a > _STIRLING, add(_bend(a, k), multiply(log(a), k)), outer)
    return subtract(select(near, inner, outer), multiply(_shift(b, s), k))


def _gamma_weibull_value(a: Tensor, b: Tensor, s: Tensor, k: Tensor) -> Tensor:
    x, y, w = a - 1, k - 1, _log_moment(a, b, s, k)
    large = w.hi > 1
    power = torch.exp(w.hi) * (1 + torch.where(w.hi < 800, w.lo, 0.0))
    moment = torch.where(large, power - 1 - w.hi.clamp(max=1e4), expm1mx_value(torch.where(large, 0.0, w.hi)))

    near = (x.abs() < _NEAR) & (y.abs() < _NEAR)
    inner = _near_exponential(torch.where(near, x, 0.0), torch.where(near, y, 0.0), -1.0, _OMEGA_PRIME)
    apart = _double.exact_sum(a, -k)
    logs = subtract(_double.lgamma(_double.exact_sum(a, k)), multiply(_double.lgamma(a), 2.0))
    outer = _total(logs, multiply(apart, _double.digamma(a)), subtract(1.0, a), negative(log(k)))
    level = subtract(multiply(log(a), 0.5), HALF_LOG_TAU)
    outer = torch.where(a > _STIRLING, _total(_bend(a, k), level, add(0.5 * (k / a), 0.5), negative(log(k))), outer)
    return moment + torch.where(near, inner, outer)


def _gamma_weibull_gradient(a: Tensor, b: Tensor, s: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        w = _log_moment(a, b, s, k).hi
    level = torch.log(b) + torch.log(s)
    w = attached(w, torch.lgamma(a + k) - torch.lgamma(a) - k * level)
    finite = w < 709
    excess = torch.expm1(torch.where(finite, w, 0.0))  # M - 1
    ratio = k / a
    step = torch.log1p(ratio) + k * _bregman.lgamma_slope(a + k, a, k)  # digamma(a + k) - digamma(a)
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
