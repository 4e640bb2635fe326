r"""KL against Gamma and exponential distributions: a mismatch of means, and a shape.

With m the mean of p, and c and r for the concentration and the rate of q (c = 1 for the exponential distribution),

.. math:: KL = \mathrm{deviance}(c, r m) + \Omega(p, c), \qquad \mathrm{deviance}(x, y) = x \log(x/y) + y - x.

Omega is the KL against the Gamma of concentration c that has the mean of p; neither term is negative. With
g(x) = lgamma(x) - x log(x) + x, B its Bregman divergence, L(z) = z - log(1 + z), and T, R, S of `_pieces`,

=====================================  ===========================================================================
p                                      Omega
=====================================  ===========================================================================
Gamma(a, rate)                         B(c, a); an exponential distribution is that with a = 1
Beta(a, b), n = a + b                  B(c, a) + [log(n/b) - a/n]/2 + (a - c)/(2n) + T(b) - T(n) - c S(n)
Pareto(scale, alpha)                   R(c) + c L(-1/alpha) + log(2 pi alpha^2/c)/2 - 1, infinite up to alpha = 1
Uniform(low, high)                     R(c) + (c - 1) gap - log(2 c eta^2/pi)/2, eta = (high - low)/(high + low)
ContinuousBernoulli(y), c = 1, y < -1  -log(1 - e^y) - L(y/(e^-y - 1))
the same, other y                      1 + log(m) + e(y), with e of `_truncated`
=====================================  ===========================================================================

where gap = log E[X] - E[log X]. torch adds entropies, moments and log Gammas, which cancel without end where p comes
near the family of q: Beta(1, b) is within 1/(2 b^2) of the exponential distribution of rate b, to which the leading
terms of Stirling's series contribute nothing. They are left out by hand, and what still cancels (T(b) against T(n), the
terms linear in a - c against the others) is summed in twice the digits. A product or quotient enters the deviance in
twice the digits, too: of the difference c - r m nothing is left after a rounding.

Gradients are those of the textbook form, or of these where they are differentiable.

Accuracy, float64: 37 ulp at most (Beta against Gamma; Uniform 17, ContinuousBernoulli 14, the others 10), in 560 to
8,600 sets of parameters of every pair that the precision suite judged against mpmath, of 32,000 to 206,000, and a few
hundred more, mostly next to the closest q, with concentrations up to 1e12. float32: correctly rounded in 1,300 to
6,000 judged sets. For c beyond 1e8 a, B(c, a) and the terms linear in c, which would cancel, are one: c times the
difference of g' at n and a.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor
from torch.distributions import Exponential as TorchExponential
from torch.distributions import Gamma as TorchGamma

from ..._autograd import may_hold
from ..._double import (
    Double,
    add,
    constant,
    divide,
    exact_sum,
    log_quotient,
    multiply,
    negative,
    rounded,
    select,
    subtract,
    total,
)
from ..._double_gamma import stirling
from ..._opaque import where_needed
from ..._scaled import lgamma_change, scaled
from ..._wide import half, product, quotient, wide
from ..._wide import total as total_of
from ...registry import register_hardened
from ...special import bd0, log1pmx_value
from ..beta import Beta
from ..continuous_bernoulli import ContinuousBernoulli
from ..exponential import Exponential
from ..gamma import Gamma, gamma_kl
from ..pareto import Pareto
from ..uniform import Uniform
from . import _truncated
from ._pieces import (
    beta_unit,
    deviance,
    excess,
    gamma_shape,
    lgamma_bregman,
    log_mean_gap,
    minus_log1pmx,
    product_excess,
    remainders,
)
from ._rule import register_pair, settled

__all__ = ["beta_excess"]

# ---- from Gamma and exponential distributions -------------------------------------------------------------------


# An exponential distribution is the Gamma of concentration 1.


@register_hardened(Exponential, Gamma)
def kl_exponential_gamma(p: TorchExponential, q: TorchGamma) -> Tensor:
    """KL of Exponential against Gamma, elementwise; see the module."""
    return gamma_kl(torch.ones_like(p.rate), p.rate, q.concentration, q.rate)


@register_hardened(Gamma, Exponential)
def kl_gamma_exponential(p: TorchGamma, q: TorchExponential) -> Tensor:
    """KL of Gamma against Exponential, elementwise; see the module."""
    return gamma_kl(p.concentration, p.rate, torch.ones_like(q.rate), q.rate)


# ---- from Beta distributions ------------------------------------------------------------------------------------

_LARGE, _CLOSE = 1e6, 1e-15
_OUTWEIGHED, _TINY = 1e8, 1e-290
_STEP = 2.0**-27


def _part(x: Double, i: int) -> Double:
    return Double(x.hi[i], x.lo[i])


def _shape_gap(a: Tensor, b: Tensor, n: Double, t: Double) -> Double:
    """T(b) - T(n), where t holds T of b, n, b (1 - h) and b (1 + h).

    For large b it is the divided difference of 1/(3x) + 1/(12 x^2) + 1/(90 x^3) - 1/(120 x^4), which does not cancel;
    for small a a derivative, by central differences, which leave 1e-16.
    """
    u, v = 1 / b, 1 / n.hi
    one, two = u + v, u * u + u * v + v * v
    higher = one / 12 + two / 90 - (u + v) * (u * u + v * v) / 120
    divided = multiply(divide(a, multiply(n, b)), add(constant(Fraction(1, 3)), higher))
    slope = multiply(subtract(_part(t, 2), _part(t, 3)), divide(a, 2 * _STEP * b))
    gap = select(a < _CLOSE * b, slope, subtract(_part(t, 0), _part(t, 1)))
    return select(b > _LARGE, divided, gap)


@where_needed
def _omega_precise(a: Tensor, b: Tensor, c: Tensor, near: Tensor) -> Tensor:
    """Omega in twice the digits, from B(c, a) in float64: it has more of them where R(a) is large and B small."""
    n, zero = exact_sum(a, b), torch.zeros_like(a)
    down, up = exact_sum(b, -_STEP * b), exact_sum(b, _STEP * b)
    x = Double(torch.stack([b, n.hi, down.hi, up.hi, a, c]), torch.stack([zero, n.lo, down.lo, up.lo, zero, zero]))
    r, s = stirling(x)
    t = subtract(subtract(divide(0.5, x), r), multiply(subtract(x, 1.0), s))
    d = exact_sum(c, -a)
    # B(c, a) = [z - log1p(z)]/2 + R(c) - R(a) + S(a) d, z = d/a
    logs = multiply(subtract(divide(d, a), log_quotient(c, a)), 0.5)
    bregman = total(logs, multiply(_part(s, 4), d), subtract(_part(r, 5), _part(r, 4)))
    bregman = select((a < 20) & (near < 1e-15), near, bregman)
    scale = multiply(subtract(log_quotient(n, b), divide(a, n)), 0.5)
    linear = divide(multiply(d, -0.5), n)
    return rounded(total(bregman, scale, linear, _shape_gap(a, b, n, t), negative(multiply(_part(s, 1), c))))


def _shape_fall(a: Tensor, b: Tensor, n: Tensor) -> Tensor:
    """T(b) - T(n), n = a + b; of small numbers 1/b - 1/n apart."""
    small = b < 1
    x, y = (torch.where(small, v, 1.0) for v in (b, n))

    def rest(v: Tensor) -> Tensor:
        r, s = remainders(v)
        return torch.log(v) - torch.digamma(1 + v) - r - torch.where(v < _TINY, 0.5, v * s)

    near = (scaled(a) / scaled(x) / scaled(y)).rounded() + (rest(x) - rest(y))
    return torch.where(small, near, gamma_shape(b) - gamma_shape(n))


def _beta_excess_far(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Omega for c much larger than a, where B(c, a) and -c [1/(2n) + S(n)] are all but opposite.

    With their leading terms as one, c [g'(n) - g'(a)], it is that and a few logarithms.
    """
    n = (a + b).clamp(max=torch.finfo(a.dtype).max)
    (at_c, _), (at_a, s) = remainders(c), remainders(a)
    leading = (scaled(c) * lgamma_change(scaled(n), scaled(a), scaled(b))).rounded()
    logs = 0.5 * ((scaled(a) / scaled(c)) * (scaled(n) / scaled(b))).log()
    own = torch.where(a < _TINY, 0.5, a * s)
    return leading + (logs + (at_c - at_a) - (0.5 + own) + _shape_fall(a, b, n))


def beta_excess(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Omega of a Beta."""
    far = c > _OUTWEIGHED * a
    if not may_hold(far):
        return _beta_excess_near(a, b, c)
    one = torch.ones_like(a)
    beyond = _beta_excess_far(*(torch.where(far, x, s) for x, s in ((a, one), (b, one), (c, 1e9 * one))))
    return torch.where(far, beyond, _beta_excess_near(*(torch.where(far, one, x) for x in (a, b, c))))


def _beta_excess_near(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    n = a + b
    u = a / n
    small = u < 0.5
    scale = torch.where(small, -log1pmx_value(-torch.where(small, u, 0.0)), torch.log1p(a / b) - u)
    d = c - a
    _, s = remainders(n)
    bregman = lgamma_bregman(c, a, d)
    terms = (bregman, 0.5 * scale, -0.5 * d / n, gamma_shape(b), -gamma_shape(n), -c * s)
    return settled(terms, _omega_precise, (a, b, c, bregman))


def _beta_gamma(a: Tensor, b: Tensor, c: Tensor, r: Tensor) -> Tensor:
    mean = quotient(product(wide(a), wide(r)), total_of(wide(a), wide(b)))
    return deviance(c, mean) + beta_excess(a, b, c)


def _beta_gamma_smooth(a: Tensor, b: Tensor, c: Tensor, r: Tensor) -> Tensor:
    n = a + b
    mean_log = torch.digamma(a) - torch.digamma(n)
    return torch.lgamma(c) - c * torch.log(r) + beta_unit(a, b) - (c - 1) * mean_log + r * (a / n)


def _beta_exponential(a: Tensor, b: Tensor, r: Tensor) -> Tensor:
    return _beta_gamma(a, b, torch.ones_like(r), r)


def _beta_exponential_smooth(a: Tensor, b: Tensor, r: Tensor) -> Tensor:
    return r * (a / (a + b)) - torch.log(r) + beta_unit(a, b)


def _centred_lgamma(c: Tensor) -> Tensor:
    """g, the textbook form."""
    return torch.lgamma(c) - c * torch.log(c) + c


# ---- from Pareto distributions ----------------------------------------------------------------------------------


def _pareto_gamma(scale: Tensor, alpha: Tensor, c: Tensor, r: Tensor) -> Tensor:
    finite = alpha > 1
    alpha = torch.where(finite, alpha, 2.0)
    mean = quotient(product(wide(scale), wide(alpha), wide(r)), wide(subtract(alpha, 1.0)))
    remainder, _ = remainders(c)
    # of a factor alpha/sqrt(c), its square may be out of range
    log = torch.log(math.sqrt(2 * math.pi) * (alpha / torch.sqrt(c)))
    shape = remainder + (log - 1) - c * _pareto_gap(alpha)
    return torch.where(finite, deviance(c, mean) + shape, torch.inf)


def _pareto_gap(alpha: Tensor) -> Tensor:
    """-L(-1/alpha), which takes the other form near alpha = 1: 1/alpha is rounded, alpha - 1 is not."""
    near = alpha < 2
    inside = torch.where(near, 0.0, -1 / alpha)
    edge = torch.where(near, alpha, 2.0)
    return torch.where(near, torch.log(edge - 1) - torch.log(edge) + 1 / edge, log1pmx_value(inside))


def _pareto_gamma_smooth(scale: Tensor, alpha: Tensor, c: Tensor, r: Tensor) -> Tensor:
    shape = torch.log(alpha) - 1 + c * minus_log1pmx(-1 / alpha)
    return bd0(c, r * (scale * (alpha / (alpha - 1)))) + _centred_lgamma(c) + shape


def _pareto_exponential(scale: Tensor, alpha: Tensor, r: Tensor) -> Tensor:
    finite = alpha > 1
    a = torch.where(finite, alpha, 2.0)
    mean = scale * (a / (a - 1))
    shape = torch.log(a) + (torch.log(a) - torch.log(a - 1) - 1 / a)
    return torch.where(finite, product_excess(mean, r) + shape, torch.inf)


# ---- from uniform distributions ---------------------------------------------------------------------------------


def _uniform_gamma(low: Tensor, high: Tensor, c: Tensor, r: Tensor) -> Tensor:
    inside = low >= 0
    low, high = torch.where(inside, low, 0.0), torch.where(inside, high, 1.0)
    mean = half(product(total_of(wide(low), wide(high)), wide(r)))
    eta = (high - low) / (high + low)
    remainder, _ = remainders(c)
    log = torch.log(math.sqrt(2 / math.pi) * torch.sqrt(c) * eta)
    kl = deviance(c, mean) + (remainder - log + (c - 1) * log_mean_gap(low, high - low))
    return torch.where(inside, kl, torch.inf)


def _uniform_gamma_smooth(low: Tensor, high: Tensor, c: Tensor, r: Tensor) -> Tensor:
    mean, width = 0.5 * (low + high), high - low
    return bd0(c, r * mean) + _centred_lgamma(c) + (c - 1) * log_mean_gap(low, width) + torch.log(mean / width)


def _uniform_exponential(low: Tensor, high: Tensor, r: Tensor) -> Tensor:
    inside = low >= 0
    low, high = torch.where(inside, low, 0.0), torch.where(inside, high, 1.0)
    shape = (1 - math.log(2)) + torch.log1p(2 * low / (high - low))
    return torch.where(inside, product_excess(0.5 * low + 0.5 * high, r) + shape, torch.inf)


# ---- from a ContinuousBernoulli ---------------------------------------------------------------------------------


def _truncated_exponential(y: Double, r: Tensor) -> Tensor:
    falling = y.hi < -1
    rate = select(falling, negative(y), 1.0)
    weight = _truncated.tail_weight(rate.hi)
    kl_falling = excess(product(wide(subtract(1.0, weight)), wide(r)), rate)
    kl_falling = kl_falling - _truncated.shortfall(rate.hi) + log1pmx_value(-weight)
    z = torch.where(falling, 0.0, rounded(y))
    mean = _truncated.mean(z)
    other = excess(product(wide(mean), wide(r)), torch.ones_like(r)) + (1 + torch.log(mean) + _truncated.negentropy(z))
    return torch.where(falling, kl_falling, other)


def _truncated_exponential_smooth(y: Tensor, r: Tensor) -> Tensor:
    return _truncated.negentropy(y) - torch.log(r) + r * _truncated.mean(y)


kl_beta_exponential = register_pair(Beta, Exponential, _beta_exponential, _beta_exponential_smooth, (1.0, 1.0, 1.0))
kl_beta_gamma = register_pair(Beta, Gamma, _beta_gamma, _beta_gamma_smooth, (1.0, 1.0, 1.0, 1.0))
kl_continuous_bernoulli_exponential = register_pair(
    ContinuousBernoulli, Exponential, _truncated_exponential, _truncated_exponential_smooth, (0.5, 1.0)
)
kl_pareto_exponential = register_pair(Pareto, Exponential, _pareto_exponential)
kl_pareto_gamma = register_pair(Pareto, Gamma, _pareto_gamma, _pareto_gamma_smooth, (1.0, 2.0, 1.0, 1.0))
kl_uniform_exponential = register_pair(Uniform, Exponential, _uniform_exponential)
kl_uniform_gamma = register_pair(Uniform, Gamma, _uniform_gamma, _uniform_gamma_smooth, (0.25, 0.75, 1.0, 1.0))
