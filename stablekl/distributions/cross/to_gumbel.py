r"""KL against Gumbel distributions: the convex function :math:`E(w) = e^w - 1 - w`, and a shape.

For q with location mu and scale b, :math:`E_p[-\log q]` has the moment generating function of p at -1/b in it,
:math:`e^{\mu/b} M(-1/b) = e^w`. With rho = s/b, theta = rate b and delta = (high - low)/b,

=============================  ===========================================  ===========================================
p                              w                                            KL - E(w)
=============================  ===========================================  ===========================================
Normal(m, s)                   rho^2/2 - (m - mu)/b                         [rho^2 - 1 - log rho^2 + 2 - log(2 pi)]/2
Exponential(rate)              mu/b - log(1 + 1/theta)                      L(1/theta) + log(theta)
Gamma(a, rate)                 mu/b - a log(1 + 1/theta)                    T(a) + a L(1/theta) + 1/2
                                                                            - log(2 pi a/theta^2)/2
Uniform(low, high)             k(delta) - [(low + high)/2 - mu]/b           1 + k(delta) - log(delta)
=============================  ===========================================  ===========================================

with L(z) = z - log(1 + z), T of `_pieces` and k of `_truncated`. torch adds mean, entropy and e^w as they come; e^w of
a rounded w is off by as many ulps as w is large, 700 at the end of the range, so w is taken in twice the digits. For
the Gamma, which a Gumbel resembles near a = 5.5, where KL is 0.003, the terms are of order 1 and their sum is taken in
twice the digits as well.

Gradients of Exponential and Gamma are by e^w - 1, a number with an exponent of its own; those of the others by the
textbook form.

Accuracy, float64: 20 ulp at most (Gamma; Uniform 16, Exponential 8, Normal 6), in 1,800 to 5,400 sets of parameters
of every pair that the precision suite judged against mpmath, of 16,000 to 52,000, and a few hundred more, mostly near
the closest q. float32: correctly rounded in 1,800 to 4,200 judged sets.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..._bregman import lgamma_bend
from ..._double import PI, Double, divide, log, log1p, multiply, negative, rounded, select, subtract, total
from ..._double_gamma import stirling
from ..._opaque import where_needed
from ..._scaled import scaled, shifted, where
from ..._wide import Wide, difference, half, log_quotient, narrow, product, quotient, wide
from ..._wide import log as log_of
from ...special import expm1mx_value, log1pmx, log1pmx_value
from ..exponential import Exponential
from ..gamma import Gamma
from ..gumbel import Gumbel
from ..normal import Normal
from ..uniform import Uniform
from . import _truncated
from ._moments import added, powers, summed
from ._pieces import excess, gamma_shape
from ._rule import register_pair, settled

__all__: list[str] = []

LOG_TAU = math.log(2 * math.pi)
_LEAST = 1e-290


def _excess(w: Tensor, exp_w: Tensor) -> Tensor:
    """E(w), from e^w too where that is large."""
    return torch.where(w < 1, expm1mx_value(w.clamp(max=1.0)), exp_w - 1 - w.clamp(max=1e4))


def _exp(w: Double, factor: Tensor | float = 1.0) -> Tensor:
    """e^w times a factor that is small where e^w alone overflows."""
    half = torch.exp(0.5 * w.hi)
    value = ((half * factor) * half) * (1 + torch.where(w.hi < 1e3, w.lo, 0.0))
    return torch.where(w.hi > 2e3, torch.inf, value)  # no factor is that small


def _level(mu: Tensor, b: Tensor) -> Double:
    return narrow(quotient(wide(mu), wide(b)))


def _normal(m: Tensor, s: Tensor, mu: Tensor, b: Tensor) -> Tensor:
    rho = quotient(wide(s), wide(b))
    square = product(rho, rho)
    w = narrow(difference(half(square), quotient(difference(wide(m), wide(mu)), wide(b))))
    return _excess(w.hi, _exp(w)) + (0.5 * excess(square, torch.ones_like(s)) + (1 - 0.5 * LOG_TAU))


def _normal_smooth(m: Tensor, s: Tensor, mu: Tensor, b: Tensor) -> Tensor:
    z, rho = (m - mu) / b, s / b
    return z + torch.exp(0.5 * rho * rho - z) - torch.log(rho) - 0.5 * (1 + LOG_TAU)


def _exponential(rate: Tensor, mu: Tensor, b: Tensor) -> Tensor:
    theta = rate * b
    log_theta = torch.where((theta > _LEAST) & theta.isfinite(), torch.log(theta), torch.log(rate) + torch.log(b))
    z = _level(mu, b)
    w = z.hi - torch.where(theta > _LEAST, torch.log1p(1 / theta), -log_theta)
    large = theta > 1
    inverse = torch.where(large, 1 / theta, 0.0)
    above = log_theta - log1pmx_value(inverse)
    below = 1 / theta + 2 * log_theta - torch.log1p(torch.where(large, 1.0, theta))
    return _excess(w, _exp(z, 1 / (1 + 1 / theta))) + torch.where(large, above, below)


def _exponential_gradient(rate: Tensor, mu: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return _gamma_gradient(torch.ones_like(rate), rate, mu, b)[1:]


@where_needed
def _gamma_precise(a: Tensor, theta_hi: Tensor, theta_lo: Tensor, excess_w: Tensor) -> Tensor:
    """Everything but E(w) in twice the digits."""
    theta = Double(theta_hi, theta_lo)
    inverse = divide(1.0, theta)
    r, s = stirling(a)
    shape = subtract(subtract(divide(0.5, a), r), multiply(subtract(a, 1.0), s))
    logs = subtract(multiply(log(multiply(PI, 2 * a)), 0.5), log(theta))
    rest = total(shape, multiply(subtract(inverse, log1p(inverse)), a), negative(logs), 0.5)
    return rounded(rest) + excess_w


class _Level(NamedTuple):
    """Of a Gamma: theta, its reciprocal, whether this is beyond 2^300, and as a float elsewhere, and w."""

    theta: Wide
    inverse: Wide
    far: Tensor
    plain: Double
    w: Double


def _gamma_level(a: Tensor, rate: Tensor, mu: Tensor, b: Tensor) -> _Level:
    theta = product(wide(rate), wide(b))
    inverse = quotient(wide(torch.ones_like(a)), theta)
    far = inverse.exponent > 300
    plain = narrow(Wide(inverse.number, torch.where(far, 0.0, inverse.exponent)))
    log = select(far, negative(log_of(theta)), log1p(plain))
    fall = product(wide(a), wide(log))
    return _Level(theta, inverse, far, plain, narrow(difference(quotient(wide(mu), wide(b)), fall)))


def _gamma(a: Tensor, rate: Tensor, mu: Tensor, b: Tensor) -> Tensor:
    theta, inverse, far, plain, w = _gamma_level(a, rate, mu, b)
    excess_w = _excess(w.hi, _exp(w))
    logs = math.log(math.sqrt(2 * math.pi)) + 0.5 * torch.log(a) - log_of(theta).hi
    usual = theta.exponent.abs() < 500
    product_ = shifted(theta.number.hi, torch.where(usual, theta.exponent, 0.0))
    logs = torch.where(usual, torch.log(math.sqrt(2 * math.pi) * torch.sqrt(a) / product_), logs)
    # of 1/theta beyond 2^300 the logarithm is nothing
    gap = torch.where(far, narrow(product(wide(a), inverse)).hi, -a * log1pmx_value(plain.hi))
    terms = (excess_w, gamma_shape(a), gap, -logs, torch.full_like(a, 0.5))
    safe = select(usual, Double(product_, shifted(theta.number.lo, torch.where(usual, theta.exponent, 0.0))), 1.0)
    return settled(terms, _gamma_precise, (a, *safe, excess_w), usual)


def _gamma_gradient(a: Tensor, rate: Tensor, mu: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """By P = e^w - 1, theta dKL/dtheta = 1 - a/[theta (theta + 1)] + P a/(theta + 1) and z = mu/b."""
    exact = _gamma_level(*(x.detach() for x in (a, rate, mu, b)))
    x, r, scale, one = scaled(a), scaled(rate), scaled(b), scaled(torch.ones_like(a))
    inverse, z = one / (r * scale), scaled(mu) / scale
    near = torch.where(exact.far, 1.0, inverse.rounded())
    log = torch.where(exact.far, inverse.log(), torch.log1p(near))
    gap = where(exact.far, inverse, scaled(-log1pmx(near)))
    power = powers(exact.w, summed(z, -(x * scaled(log)))).less_one
    share = x * inverse / (one + inverse)
    by_theta = added(one, -(share * inverse), share * power)
    entropy = scaled(a - 1) * scaled(lgamma_bend(a)) / x / x
    by_a = summed(gap, -(power * scaled(log)), entropy, -(one / x))
    return by_a, (by_theta / r).rounded(), (power / scale).rounded(), summed(by_theta / scale, -(power * z / scale))


def _uniform(low: Tensor, high: Tensor, mu: Tensor, b: Tensor) -> Tensor:
    delta = narrow(quotient(difference(wide(high), wide(low)), wide(b))).hi
    infinite = delta.isinf()  # as is half of it, a part of the divergence
    delta = torch.where(infinite, 1.0, delta)
    k = _truncated.log_mgf(delta)
    # half of delta cancels where that is large
    far = delta > 3
    edge = torch.where(far, delta, 3.0)
    start = narrow(quotient(difference(wide(mu), wide(low)), wide(b)))
    end = narrow(quotient(difference(wide(mu), wide(high)), wide(b)))
    outer = start.hi - torch.log(edge) + _truncated.shortfall(edge)
    w = torch.where(far, outer, k + 0.5 * (start.hi + end.hi))
    tiny = delta < _LEAST
    share = torch.where(tiny, 1.0, -torch.expm1(-delta) / torch.where(tiny, 1.0, delta))
    width = difference(wide(high), wide(low))
    log_delta = torch.where(tiny, log_quotient(width, wide(b)).hi, torch.log(delta))
    return torch.where(infinite, torch.inf, _excess(w, _exp(start, share)) + (1 + k - log_delta))


def _uniform_smooth(low: Tensor, high: Tensor, mu: Tensor, b: Tensor) -> Tensor:
    delta = (high - low) / b
    z = 0.5 * ((low - mu) / b + (high - mu) / b)
    return z - torch.log(delta) + torch.exp(_truncated.log_mgf(delta) - z)


kl_exponential_gumbel = register_pair(Exponential, Gumbel, _exponential, gradient=_exponential_gradient)
kl_gamma_gumbel = register_pair(Gamma, Gumbel, _gamma, gradient=_gamma_gradient)
kl_normal_gumbel = register_pair(Normal, Gumbel, _normal, _normal_smooth, (0.0, 1.0, 0.0, 1.0))
kl_uniform_gumbel = register_pair(Uniform, Gumbel, _uniform, _uniform_smooth, (0.0, 1.0, 0.0, 1.0))
