r"""KL against distributions on an interval, or on the half-line that begins at a Pareto's scale.

Infinite where p has mass outside; a support that is open or closed at its ends has the same mass, which torch's rules
take apart: Uniform(0, 1) against a ContinuousBernoulli is infinite there. With B, L, T, R, S of `_pieces` (B(y, x) of
lgamma), k and e of `_truncated`, y the logit of a ContinuousBernoulli, and lambda its size:

* Beta(a, b) against Uniform(low, high): :math:`\log(high - low) + K`, K the KL against Uniform(0, 1), that is
  Beta(1, 1): with n = a + b, :math:`K = -\log[1 - ((a - b)/n)^2] + B(1, a) + B(1, b) - B(2, n)`, of which the last is
  less than the others together;
* ContinuousBernoulli against Uniform: :math:`\log(high - low) + e(y)`;
* Beta against ContinuousBernoulli: :math:`K - y (a - b)/(2 n) + k(y)` up to lambda = 8, in twice the digits where that
  cancels. Beyond, the KL against the exponential distribution that is truncated, of rate lambda from the end where the
  density is highest, and :math:`\log(1 - e^{-\lambda})`;
* Uniform against ContinuousBernoulli, with c the distance of the middle from that end:
  :math:`-\log(high - low) - y (mean - 1/2) + k(y)` up to lambda = 3, beyond it
  :math:`\lambda c - 1 - \log(\lambda c) + 1 + \log(c/width) + \log(1 - e^{-\lambda})`;
* Uniform against Beta(a, b), for a, b < 4: :math:`-\log(width) + K' - (a - 1)(E \log x + 1) - (b - 1)(E \log(1 - x) +
  1)`, K' the KL from Uniform(0, 1), :math:`a L((b - a)/2a) + b L((a - b)/2b) + B(a, 1) + B(b, 1) - B(n, 2)`. Otherwise,
  with m the mean of p and the gaps those of log x and log(1 - x), log E less E log:
  :math:`deviance(a, nm) + deviance(b, n(1 - m)) + (a - 1) gap_1 + (b - 1) gap_0 + R(a) + R(b) - R(n) +
  \frac12 \log[2\pi n m^2 (1 - m)^2/(a b width^2)]`;
* Uniform against Pareto(s, alpha), with M = E log(x/s): :math:`\alpha M - 1 - \log(\alpha M) + 1 + M +
  \log(M s/width)`.

The textbook forms add log Gammas, digammas and mean logarithms: about 1e13 for Beta(1e12, 1e12), whose KL is 13.

Accuracy, float64: 18 ulp at most (Uniform against Pareto and Beta, Beta against ContinuousBernoulli; others 9), in
500 to 11,000 sets of parameters of every pair that the precision suite judged against mpmath, of 34,000 to 91,000,
and a few hundred more, mostly near its zero or the closest q. float32: correctly rounded in 1,000 to 4,000 judged
sets.

Gradients of Beta against ContinuousBernoulli and of Uniform against Beta are those of the textbook forms.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._bregman import log_quotient
from ..._double import (
    Double,
    absolute,
    divide,
    exact_sum,
    expm1,
    log,
    multiply,
    negative,
    rounded,
    select,
    subtract,
    total,
)
from ..._double_gamma import digamma, lgamma
from ..._opaque import where_needed
from ...special import log_ratio_bregman
from ..beta import Beta
from ..continuous_bernoulli import ContinuousBernoulli
from ..pareto import Pareto
from ..uniform import Uniform
from . import _truncated
from ._pieces import (
    beta_unit,
    deviance,
    excess,
    lgamma_bregman,
    log_mean_gap,
    minus_log1pmx,
    product_excess,
    remainders,
)
from ._rule import register_pair, settled
from .to_gamma import beta_excess

__all__: list[str] = []

# ---- against uniform distributions ------------------------------------------------------------------------------


def _widened(kl: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """A divergence against Uniform(0, 1), and what a wider interval adds."""
    inside = (low <= 0) & (high >= 1)
    low, high = torch.where(inside, low, 0.0), torch.where(inside, high, 1.0)
    return torch.where(inside, kl + torch.log1p((high - 1) - low), torch.inf)


def _beta_uniform(a: Tensor, b: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return _widened(beta_unit(a, b), low, high)


def _truncated_uniform(y: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return _widened(_truncated.negentropy(y), low, high)


# ---- against a ContinuousBernoulli ------------------------------------------------------------------------------

_FAR = 8.0


@where_needed
def _beta_truncated_precise(a: Tensor, b: Tensor, y_hi: Tensor, y_lo: Tensor) -> Tensor:
    """The textbook form in twice the digits: negative entropy, log of the normaliser, mean."""
    y, n, zero = Double(y_hi, y_lo), exact_sum(a, b), torch.zeros_like(a)
    x = Double(torch.stack([a, b, n.hi]), torch.stack([zero, zero, n.lo]))
    sign = a.new_tensor([1.0, 1.0, -1.0]).reshape(3, *(1,) * a.ndim)
    less = multiply(subtract(x, a.new_tensor([1.0, 1.0, 2.0]).reshape(sign.shape)), digamma(x))
    terms = multiply(subtract(less, lgamma(x)), sign)
    entropy = total(*(Double(terms.hi[i], terms.lo[i]) for i in range(3)))
    rate = absolute(y)
    # log((1 - e^-rate)/rate), -rate/2 where the rate is small, and rate times the mean's distance from the end
    tiny = rate.hi < 1e-30
    safe = select(tiny, 1.0, rate)
    mass = log(divide(negative(expm1(negative(safe))), safe))
    end = torch.where(y.hi < 0, a, b)
    return rounded(total(entropy, select(tiny, multiply(rate, -0.5), mass), multiply(rate, divide(end, n))))


def _beta_truncated(a: Tensor, b: Tensor, y: Double) -> Tensor:
    far = y.hi.abs() > _FAR
    rate = select(far, absolute(y), _FAR)
    x, z = torch.where(y.hi < 0, a, b), torch.where(y.hi < 0, b, a)
    mean = divide(multiply(rate, x), exact_sum(x, z))
    beyond = excess(mean, torch.ones_like(a)) + beta_excess(x, z, torch.ones_like(a)) + _truncated.shortfall(rate.hi)
    near = torch.where(far, 0.0, y.hi)
    terms = (beta_unit(a, b), -near * (0.5 * (a - b) / (a + b)), _truncated.log_mgf(near))
    within = settled(terms, _beta_truncated_precise, (a, b, *y), ~far)
    return torch.where(far, beyond, within)


def _beta_truncated_smooth(a: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return _truncated.log_mgf(y) - 0.5 * y * ((a - b) / (a + b)) + beta_unit(a, b)


def _log_width(low: Tensor, high: Tensor) -> Tensor:
    """The logarithm of the width of an interval within (0, 1), to its relative accuracy near 1 too."""
    width = high - low
    near = width > 0.5
    missing = torch.where(near, low + (1 - high), 0.0)
    return torch.where(near, torch.log1p(-missing), torch.log(width))


def _inside_unit(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    inside = (low >= 0) & (high <= 1)
    return inside, torch.where(inside, low, 0.25), torch.where(inside, high, 0.75)


def _uniform_truncated(low: Tensor, high: Tensor, y: Tensor) -> Tensor:
    inside, low, high = _inside_unit(low, high)
    far = y.abs() > 3
    small, rate = torch.where(far, 0.0, y), torch.where(far, y, 3.0).abs()
    twice = torch.where(y < 0, low + high, (1 - low) + (1 - high))
    near = _truncated.log_mgf(small) - _log_width(low, high) - small * (0.5 * (low - (1 - high)))
    beyond = log_ratio_bregman(rate * twice, torch.full_like(rate, 2.0)) + _truncated.shortfall(rate)
    beyond = beyond + (1 + torch.log(0.5 * (twice / (high - low))))
    return torch.where(inside, torch.where(far, beyond, near), torch.inf)


# ---- against Beta distributions ---------------------------------------------------------------------------------

_MODEST = 4.0
_WIDE = 0.65


def _mean_log_plus_one(low: Tensor, high: Tensor) -> Tensor:
    """E[log X] + 1 of a uniform distribution within (0, 1)."""
    width, total_ = high - low, low + high
    wide = width > _WIDE * total_
    rest = torch.where(low > 0, low * torch.log(torch.where(low > 0, low, 1.0)), 0.0)
    return torch.where(
        wide,
        (high * torch.log(high) - rest) / width,
        torch.log(total_) - math.log(2) - log_mean_gap(low, high - low) + 1,
    )


def _mean_log_complement_plus_one(low: Tensor, high: Tensor) -> Tensor:
    """E[log(1 - X)] + 1."""
    x, y = 1 - high, 1 - low
    width, total_ = high - low, x + y
    wide = width > _WIDE * total_
    rest = torch.where(x > 0, x * torch.log1p(-torch.where(x > 0, high, 0.0)), 0.0)
    mean = 0.5 * (low + high)
    small = mean < 0.5
    log = torch.where(small, torch.log1p(-torch.where(small, mean, 0.0)), torch.log(0.5 * (x + y)))
    inner = log - log_mean_gap(x, width) + 1
    return torch.where(wide, (y * torch.log1p(-low) - rest) / width, inner)


def _unit_beta(a: Tensor, b: Tensor) -> Tensor:
    """KL of Uniform(0, 1) against a Beta."""
    one, d = torch.ones_like(a), 0.5 * (b - a)
    means = a * minus_log1pmx(d / a) + b * minus_log1pmx(-d / b)
    own = lgamma_bregman(a, one, a - 1) + lgamma_bregman(b, one, b - 1)
    return means + (own - lgamma_bregman(a + b, 2 * one, (a - 1) + (b - 1)))


def _uniform_beta_near(low: Tensor, high: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Where the parameters are modest, and the KL there; differentiable."""
    modest = (a < _MODEST) & (b < _MODEST)
    a, b = torch.where(modest, a, 1.0), torch.where(modest, b, 1.0)
    logs = (a - 1) * _mean_log_plus_one(low, high) + (b - 1) * _mean_log_complement_plus_one(low, high)
    return modest, (_unit_beta(a, b) - _log_width(low, high)) - logs


def _uniform_beta(low: Tensor, high: Tensor, a: Tensor, b: Tensor) -> Tensor:
    inside, low, high = _inside_unit(low, high)
    modest, near = _uniform_beta_near(low, high, a, b)

    n, mean = exact_sum(a, b), multiply(exact_sum(low, high), 0.5)
    other = subtract(1.0, mean)
    width = high - low
    gap_1, gap_0 = log_mean_gap(low, width), log_mean_gap(1 - high, width)
    (r_a, _), (r_b, _), (r_n, _) = remainders(a), remainders(b), remainders(n.hi)
    # quotients in an order that neither overflows nor underflows
    smaller, larger = torch.minimum(a, b), torch.maximum(a, b)
    root = torch.sqrt(n.hi / larger) / torch.sqrt(smaller)
    # the mean over the width, whose half may be no float
    logs = torch.log(math.sqrt(0.5 * math.pi) * root * (other.hi * ((low + high) / width)))
    far = deviance(a, multiply(n, mean)) + deviance(b, multiply(n, other))
    far = far + ((a - 1) * gap_1 + (b - 1) * gap_0 + (r_a + r_b - r_n) + logs)
    return torch.where(inside, torch.where(modest, near, far), torch.inf)


def _uniform_beta_smooth(low: Tensor, high: Tensor, a: Tensor, b: Tensor) -> Tensor:
    modest, near = _uniform_beta_near(low, high, a, b)
    width = high - low
    log_beta = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
    mean_log = torch.log(0.5 * (low + high)) - log_mean_gap(low, width)
    mean_log_other = torch.log(0.5 * ((1 - low) + (1 - high))) - log_mean_gap(1 - high, width)
    far = log_beta - torch.log(width) - (a - 1) * mean_log - (b - 1) * mean_log_other
    return torch.where(modest, near, far)


# ---- against Pareto distributions -------------------------------------------------------------------------------


def _uniform_pareto(low: Tensor, high: Tensor, scale: Tensor, alpha: Tensor) -> Tensor:
    inside = low >= scale
    low, high = torch.where(inside, low, scale), torch.where(inside, high, 2 * scale)
    width = (high - low) / scale
    huge = width.isinf() | (low / scale).isinf()
    usual = torch.log1p(torch.where(huge, 1.0, (low - scale) / scale) + 0.5 * torch.where(huge, 1.0, width))
    mean_log = torch.where(huge, log_quotient(0.5 * low + 0.5 * high, scale), usual) - log_mean_gap(low, high - low)
    log_width = torch.where(huge, log_quotient(high - low, scale), torch.log(torch.where(huge, 1.0, width)))
    last = torch.where(huge, torch.log(mean_log) - log_width, torch.log(mean_log / torch.where(huge, 1.0, width)))
    kl = product_excess(mean_log, alpha) + (1 + mean_log + last)
    return torch.where(inside, kl, torch.inf)


kl_beta_continuous_bernoulli = register_pair(
    Beta, ContinuousBernoulli, _beta_truncated, _beta_truncated_smooth, (1.0, 1.0, 0.5)
)
kl_beta_uniform = register_pair(Beta, Uniform, _beta_uniform)
kl_continuous_bernoulli_uniform = register_pair(ContinuousBernoulli, Uniform, _truncated_uniform)
kl_uniform_beta = register_pair(Uniform, Beta, _uniform_beta, _uniform_beta_smooth, (0.25, 0.75, 1.0, 1.0))
kl_uniform_continuous_bernoulli = register_pair(Uniform, ContinuousBernoulli, _uniform_truncated)
kl_uniform_pareto = register_pair(Uniform, Pareto, _uniform_pareto)
