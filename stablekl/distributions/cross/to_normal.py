r"""KL against normal distributions: a shape, a shift and a scale, none of them negative.

With m and v the mean and the variance of p, and N(mu, s^2) for q,

.. math:: KL = J(p) + \frac12 \left(\frac{m - \mu}{s}\right)^2
               + \frac12 \left[\frac{v}{s^2} - 1 - \log \frac{v}{s^2}\right],

the negentropy J of p, which is its KL against the normal distribution of its own mean and variance, and the KL between
this one and q. J is a number for location-scale families, and a function of the shape for the others:

=====================  =====================================================================================
p                      J
=====================  =====================================================================================
Exponential            log(2 pi)/2 - 1/2
Gumbel                 log(pi^3 e/3)/2 - 1 - Euler's constant
Laplace                log(pi)/2 - 1/2
Uniform                log(pi e/6)/2
Pareto(alpha)          log(2 pi)/2 - 1/2 + L(-1/alpha) - log(1 - 2/alpha)/2, L(z) = z - log(1 + z)
Gamma(a)               T(a), see `_pieces`
Beta(a, b)             T(a) + T(b) - U(a + b), U(n) = log(1 + 1/n)/2 + 1/n - R(n) - (n - 2) S(n)
ContinuousBernoulli    log(2 pi e v)/2 + e, see `_truncated`
=====================  =====================================================================================

torch sums entropy, moments and logarithms. For a Gamma of concentration 1e8 these are 1e9, and J is 3e-9; it is what
remains where the moments agree. There T leaves out the leading terms by hand, the mean and the variance enter as
differences from those of q, taken in twice the digits, and for Beta distributions U cancels T once more, in twice the
digits or, from 1e6 on, order by order in 1/a and 1/b.

Gradients of Beta, Gamma and Pareto are those of `_moments`, by trigamma of `_bregman`, since torch's is good to 5e-10
only; the others are differentiated as they stand.

Accuracy, float64: 12 ulp at most (Beta and ContinuousBernoulli; the others 7). The precision suite evaluated 55,000
to 205,000 sets of parameters of every pair, with scales up to 2^200, and judged 2,500 to 5,400 against mpmath; a few
hundred more mostly had moments that agree, up to 1 ulp, and concentrations up to 1e12. float32: correctly rounded in
1,300 to 8,000 judged sets.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._bregman import lgamma_bend
from ..._double import Double, add, divide, exact_sum, log1p, multiply, rounded, subtract, total
from ..._double_gamma import stirling
from ..._elementwise import horner
from ..._opaque import where_needed
from ..._scaled import Scaled, scaled, where
from ..._wide import Wide, difference, narrow, product, quotient, wide
from ..._wide import total as total_of
from ..beta import Beta
from ..continuous_bernoulli import ContinuousBernoulli
from ..exponential import Exponential
from ..gamma import Gamma
from ..gumbel import Gumbel
from ..laplace import Laplace
from ..normal import Normal, normal_kl
from ..pareto import Pareto
from ..uniform import Uniform
from . import _truncated
from ._moments import added, normal_slopes, summed
from ._pieces import excess, gamma_shape, minus_log1pmx, remainders
from ._rule import register_pair, settled

__all__ = ["beta_shape"]

EULER = 0.5772156649015329
LOG_TAU = math.log(2 * math.pi)
# The means of these are offsets from their locations in units of the scale, as are the standard deviations.
GUMBEL_DEVIATION = math.pi / math.sqrt(6)
EXPONENTIAL, LAPLACE = 0.5 * LOG_TAU - 0.5, 0.5 * math.log(math.pi) - 0.5
GUMBEL, UNIFORM = 0.5 * math.log(math.pi**3 * math.e / 3) - 1 - EULER, 0.5 * math.log(math.pi * math.e / 6)


def _between(shift: Tensor, deviation: Tensor, mu_scale: Tensor) -> Tensor:
    """KL between normal distributions from the difference of their means; differentiable."""
    return normal_kl(shift, deviation, torch.zeros_like(shift), mu_scale)


def _exponential(rate: Tensor, mu: Tensor, s: Tensor) -> Tensor:
    return EXPONENTIAL + _between(1 / rate - mu, 1 / rate, s)


def _gumbel(loc: Tensor, scale: Tensor, mu: Tensor, s: Tensor) -> Tensor:
    return GUMBEL + _between((loc - mu) + EULER * scale, GUMBEL_DEVIATION * scale, s)


def _laplace(loc: Tensor, scale: Tensor, mu: Tensor, s: Tensor) -> Tensor:
    return LAPLACE + _between(loc - mu, math.sqrt(2) * scale, s)


def _uniform(low: Tensor, high: Tensor, mu: Tensor, s: Tensor) -> Tensor:
    shift = 0.5 * (low - mu) + 0.5 * (high - mu)
    return UNIFORM + _between(shift, (high - low) / math.sqrt(12), s)


def _pareto_moments(scale: Tensor, a: Tensor) -> tuple[Wide, Wide]:
    one, two = (wide(subtract(a, x)) for x in (1.0, 2.0))
    over = quotient(wide(scale), one)
    return product(over, wide(a)), quotient(product(over, over, wide(a)), two)


def _pareto(scale: Tensor, alpha: Tensor, mu: Tensor, s: Tensor) -> Tensor:
    finite = alpha > 2
    a = torch.where(finite, alpha, 3.0)
    # 2/a is rounded, a - 2 is not
    edge = a < 4
    low, high = torch.where(edge, a, 3.0), torch.where(edge, 4.0, a)
    tail = torch.where(edge, torch.log(low / (low - 2)), -torch.log1p(-2 / high))
    shape = EXPONENTIAL + minus_log1pmx(-1 / a) + 0.5 * tail
    mean, variance = _pareto_moments(scale, a)
    t = narrow(quotient(difference(mean, wide(mu)), wide(s))).hi
    kl = shape + 0.5 * t * t + 0.5 * excess(variance, product(wide(s), wide(s)))
    return torch.where(finite, kl, torch.inf)


def _pareto_gradient(scale: Tensor, alpha: Tensor, mu: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    finite = alpha > 2
    a = torch.where(finite, alpha, 3.0)
    m, x, one, two = scaled(scale), scaled(a), scaled(a - 1), scaled(a - 2)
    over = m / one
    variance = over * over * x / two
    at = normal_slopes(*_pareto_moments(scale.detach(), a.detach()), over * x, variance, mu, s)
    unit, double = scaled(torch.ones_like(a)), scaled(torch.full_like(a, 2.0))
    # log v by a is -2/(a - 1) - 2/(a (a - 2))
    last, lag = unit / x / two, at.by_log_variance
    # near a = 2 of a small v D is all but -s^2: (1 + D/s^2)/(a (a - 2)) as one
    ratio = variance / scaled(s) / scaled(s)
    last = where(a < 4, ratio * last, added(last, double * lag * last))
    by_a = summed(-(at.by_mean * over / one), -(double * lag / one), -last, -(unit / x / x / one))
    by_scale = summed(at.by_mean * x / one, at.by_log_variance * double / m)
    return tuple(torch.where(finite, v, 0.0) for v in (by_scale, by_a, *at.by_q))


def _truncated_exponential(y: Tensor, mu: Tensor, s: Tensor) -> Tensor:
    tail = _truncated.tail_mean(y)
    shift = torch.where(y <= 0, tail - mu, (1 - mu) - tail)
    return _truncated.shape(y) + _between(shift, torch.sqrt(_truncated.variance(y)), s)


# ---- Gamma ------------------------------------------------------------------------------------------------------


# -T' in powers of 1/a from a^-2 on; from here on what is left out is 1e-16
_T_SLOPE, _SERIES_FROM = (-1 / 30, 1 / 30, 1 / 6, 1 / 3), 1e4


def _gamma(a: Tensor, rate: Tensor, mu: Tensor, s: Tensor) -> Tensor:
    scaled = product(wide(rate), wide(s))
    t = narrow(quotient(difference(wide(a), product(wide(rate), wide(mu))), scaled)).hi
    return gamma_shape(a) + 0.5 * t * t + 0.5 * excess(a, product(scaled, scaled))


def _gamma_gradient(a: Tensor, rate: Tensor, mu: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    x, r = scaled(a), scaled(rate)
    mean = quotient(wide(a.detach()), wide(rate.detach()))
    at = normal_slopes(mean, quotient(mean, wide(rate.detach())), x / r, x / r / r, mu, s)
    large = a > _SERIES_FROM
    w = 1 / torch.where(large, a, _SERIES_FROM)
    near = scaled(a - 1) * scaled(lgamma_bend(torch.where(large, 1.0, a))) / x / x
    near = added(near, -(scaled(torch.full_like(a, 0.5)) / x))
    shape = where(large, scaled(-w * w * horner(w, _T_SLOPE)), near)
    by_a = summed(at.by_mean / r, at.by_log_variance / x, shape)
    twice = Scaled(at.by_log_variance.mantissa, at.by_log_variance.exponent + 1)
    return by_a, summed(-(at.by_mean * x / r / r), -(twice / r)), *at.by_q


# ---- Beta -------------------------------------------------------------------------------------------------------

# T and U in powers of 1/x, from the first on
_T_SERIES, _U_SERIES = (1 / 3, 1 / 12, 1 / 90, -1 / 120), (4 / 3, -1 / 12, 8 / 45, -17 / 120)
_LARGE = 1e6


def _beta_shape_large(a: Tensor, b: Tensor) -> Tensor:
    """J of large parameters, where the first order vanishes at a = b."""
    u, v, w = 1 / a, 1 / b, 1 / (a + b)
    higher = sum(
        t * (u**k + v**k) - c * w**k for k, (t, c) in enumerate(zip(_T_SERIES, _U_SERIES, strict=True), 1) if k > 1
    )
    return ((a - b) * u) * ((a - b) * v) * w / 3 + higher


@where_needed
def _beta_shape_precise(a: Tensor, b: Tensor) -> Tensor:
    """J in twice the digits."""
    n = exact_sum(a, b)
    x = Double(torch.stack([a, b, n.hi]), torch.stack([torch.zeros_like(a), torch.zeros_like(b), n.lo]))
    r, s = stirling(x)
    # T of all three; U is log1p(1/n)/2 + 1/n - R - (n - 2) S = T + log1p(1/n)/2 + 1/(2n) + S
    shapes = subtract(subtract(divide(0.5, x), r), multiply(subtract(x, 1.0), s))
    at_a, at_b, at_n = (Double(shapes.hi[i], shapes.lo[i]) for i in range(3))
    inverse = divide(1.0, n)
    rest = total(multiply(add(log1p(inverse), inverse), 0.5), Double(s.hi[2], s.lo[2]), at_n)
    return rounded(subtract(add(at_a, at_b), rest))


def beta_shape(a: Tensor, b: Tensor) -> Tensor:
    """J of a Beta."""
    n = a + b
    r, s = remainders(n)
    terms = (gamma_shape(a), gamma_shape(b), -0.5 * torch.log1p(1 / n), -1 / n, r, (n - 2) * s)
    large = (a > _LARGE) & (b > _LARGE)
    return torch.where(large, _beta_shape_large(a, b), settled(terms, _beta_shape_precise, (a, b), ~large))


def _beta(a: Tensor, b: Tensor, mu: Tensor, s: Tensor) -> Tensor:
    n = total_of(wide(a), wide(b))
    scaled = product(n, wide(s))
    t = narrow(quotient(difference(wide(a), product(n, wide(mu))), scaled)).hi
    one = wide(torch.ones_like(a))
    variances = excess(product(wide(a), wide(b)), product(scaled, scaled, total_of(n, one)))
    return beta_shape(a, b) + 0.5 * t * t + 0.5 * variances


def _beta_gradient(a: Tensor, b: Tensor, mu: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    still = [wide(v.detach()) for v in (a, b)]
    whole, one = total_of(*still), torch.ones_like(a)
    mean = quotient(still[0], whole)
    variance = quotient(product(mean, still[1]), product(whole, total_of(whole, wide(one))))
    x, y, unit = scaled(a), scaled(b), scaled(one)
    n, double = x + y, scaled(2 * one)
    at = normal_slopes(mean, variance, x / n, x / n * (y / n) / (n + unit), mu, s)
    rounded_n = n.rounded().clamp(max=torch.finfo(a.dtype).max)
    shared = added(double / n, added(double, -n) * scaled(lgamma_bend(rounded_n)) / n / n)
    lean = double / n + unit / (n + unit)

    def partial(v: Tensor, of_mean: Scaled) -> Tensor:
        z = scaled(v)
        own = added(scaled(v - 1) * scaled(lgamma_bend(v)) / z / z, -(unit / z))
        return summed(
            at.by_mean * of_mean,
            at.by_log_variance * (added(unit / z, -lean)),
            at_half * (added(unit / z, -lean)),
            own,
            shared,
        )

    at_half = scaled(0.5 * one)
    return partial(a, y / n / n), partial(b, -(x / n / n)), *at.by_q


kl_beta_normal = register_pair(Beta, Normal, _beta, gradient=_beta_gradient)
kl_continuous_bernoulli_normal = register_pair(ContinuousBernoulli, Normal, _truncated_exponential)
kl_exponential_normal = register_pair(Exponential, Normal, _exponential)
kl_gamma_normal = register_pair(Gamma, Normal, _gamma, gradient=_gamma_gradient)
kl_gumbel_normal = register_pair(Gumbel, Normal, _gumbel)
kl_laplace_normal = register_pair(Laplace, Normal, _laplace)
kl_pareto_normal = register_pair(Pareto, Normal, _pareto, gradient=_pareto_gradient)
kl_uniform_normal = register_pair(Uniform, Normal, _uniform)
