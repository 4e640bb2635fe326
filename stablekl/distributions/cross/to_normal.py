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

Gradients are those of the textbook form, with entropies by `_pieces.lgamma_bregman`, since torch's trigamma is good to
5e-10 only.

Accuracy, float64: 12 ulp at most (Beta and ContinuousBernoulli; the others 7). The precision suite evaluated 55,000
to 205,000 sets of parameters of every pair, with scales up to 2^200, and judged 2,500 to 5,400 against mpmath; a few
hundred more mostly had moments that agree, up to 1 ulp, and concentrations up to 1e12. float32: correctly rounded in
1,300 to 8,000 judged sets.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._double import (
    Double,
    add,
    divide,
    exact_product,
    exact_sum,
    log1p,
    multiply,
    rounded,
    stirling,
    subtract,
    total,
)
from ..._opaque import where_needed
from ...special import log_ratio_bregman
from ..beta import Beta
from ..continuous_bernoulli import ContinuousBernoulli
from ..exponential import Exponential
from ..gamma import Gamma
from ..gumbel import Gumbel
from ..laplace import Laplace
from ..normal import Normal
from ..pareto import Pareto
from ..uniform import Uniform
from . import _truncated
from ._pieces import beta_unit, excess, gamma_entropy, gamma_shape, minus_log1pmx, remainders
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
    r = (deviation - mu_scale) / mu_scale
    t = shift / mu_scale
    return 0.5 * t * t + (0.5 * r * r + log_ratio_bregman(deviation, mu_scale))


def _exponential(rate: Tensor, mu: Tensor, s: Tensor) -> Tensor:
    return EXPONENTIAL + _between(1 / rate - mu, 1 / rate, s)


def _gumbel(loc: Tensor, scale: Tensor, mu: Tensor, s: Tensor) -> Tensor:
    return GUMBEL + _between((loc - mu) + EULER * scale, GUMBEL_DEVIATION * scale, s)


def _laplace(loc: Tensor, scale: Tensor, mu: Tensor, s: Tensor) -> Tensor:
    return LAPLACE + _between(loc - mu, math.sqrt(2) * scale, s)


def _uniform(low: Tensor, high: Tensor, mu: Tensor, s: Tensor) -> Tensor:
    shift = 0.5 * (low - mu) + 0.5 * (high - mu)
    return UNIFORM + _between(shift, (high - low) / math.sqrt(12), s)


def _pareto(scale: Tensor, alpha: Tensor, mu: Tensor, s: Tensor) -> Tensor:
    finite = alpha > 2
    a = torch.where(finite, alpha, 3.0)
    # 2/a is rounded, a - 2 is not
    edge = a < 4
    low, high = torch.where(edge, a, 3.0), torch.where(edge, 4.0, a)
    tail = torch.where(edge, torch.log(low / (low - 2)), -torch.log1p(-2 / high))
    shape = EXPONENTIAL + minus_log1pmx(-1 / a) + 0.5 * tail
    over = scale / (a - 1)
    kl = shape + _between((scale - mu) + over, over * torch.sqrt(a / (a - 2)), s)
    return torch.where(finite, kl, torch.inf)


def _truncated_exponential(y: Tensor, mu: Tensor, s: Tensor) -> Tensor:
    tail = _truncated.tail_mean(y)
    shift = torch.where(y <= 0, tail - mu, (1 - mu) - tail)
    return _truncated.shape(y) + _between(shift, torch.sqrt(_truncated.variance(y)), s)


# ---- Gamma ------------------------------------------------------------------------------------------------------


def _textbook(entropy: Tensor, mean: Tensor, variance: Tensor, mu: Tensor, s: Tensor) -> Tensor:
    t = (mean - mu) / s
    return 0.5 * (LOG_TAU + t * t + variance / s / s) + torch.log(s) - entropy


def _gamma(a: Tensor, rate: Tensor, mu: Tensor, s: Tensor) -> Tensor:
    scaled = exact_product(rate, s)
    t = rounded(subtract(a, exact_product(rate, mu))) / scaled.hi
    return gamma_shape(a) + 0.5 * t * t + 0.5 * excess(a, multiply(scaled, scaled))


def _gamma_smooth(a: Tensor, rate: Tensor, mu: Tensor, s: Tensor) -> Tensor:
    return _textbook(gamma_entropy(a) - torch.log(rate), a / rate, a / rate / rate, mu, s)


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
    n = exact_sum(a, b)
    scaled = multiply(n, s)
    t = rounded(subtract(a, multiply(n, mu))) / scaled.hi
    variances = excess(exact_product(a, b), multiply(multiply(scaled, scaled), add(n, 1.0)))
    return beta_shape(a, b) + 0.5 * t * t + 0.5 * variances


def _beta_smooth(a: Tensor, b: Tensor, mu: Tensor, s: Tensor) -> Tensor:
    n = a + b
    return _textbook(-beta_unit(a, b), a / n, (a / n) * (b / n) / (n + 1), mu, s)


kl_beta_normal = register_pair(Beta, Normal, _beta, _beta_smooth, (1.0, 1.0, 0.0, 1.0))
kl_continuous_bernoulli_normal = register_pair(ContinuousBernoulli, Normal, _truncated_exponential)
kl_exponential_normal = register_pair(Exponential, Normal, _exponential)
kl_gamma_normal = register_pair(Gamma, Normal, _gamma, _gamma_smooth, (1.0, 1.0, 0.0, 1.0))
kl_gumbel_normal = register_pair(Gumbel, Normal, _gumbel)
kl_laplace_normal = register_pair(Laplace, Normal, _laplace)
kl_pareto_normal = register_pair(Pareto, Normal, _pareto)
kl_uniform_normal = register_pair(Uniform, Normal, _uniform)
