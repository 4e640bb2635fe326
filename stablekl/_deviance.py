r"""Log-densities of gamma and binomial kinds by deviances, which are positive: what differences of lgammas lose.

With :math:`L(v) = v - \log(1 + v)` and :math:`\log \Gamma(z) = z \log z - z - \log A(z) + R(z)`, where A is
:math:`\sqrt{z/2\pi}` and R the rest of Stirling's series from 10 on, and A(z) = z and R the rest of log Gamma(z + 1)
below, every term of the size of z log z cancels by itself:

.. math:: k \log \lambda - \lambda - \log k! = -k\,L\!\left(\tfrac{\lambda - k}{k}\right) - \log \tfrac{k}{A(k)} - R(k),

.. math:: \log \frac{\Gamma(a + b + 1)}{\Gamma(a + 1) \Gamma(b + 1)} x^a y^b
          = -a\,L\!\left(\tfrac ta\right) - b\,L\!\left(\tfrac{-t}b\right) + \ldots, \qquad t = b x - a y,

for x + y = 1. Of t no digit may be lost, since its square over a is all there is: both products are taken exactly.
The textbook form, of which torch's are variants, is off by eps a log a: by 1e5 at a rate of 1e12 in float32.

**Accuracy** of log-densities in units of eps max(1, abs(log p)), the largest seen for parameters from 1e-12 to 1e12
(float32, rounded once: 4,000 to 9,000 sets each) and throughout the range of float64 (as many). In float64 terms of
opposite sign that are left, such as the deviance and the logarithm of a small scale, keep an ulp of their own.

=================  =======  =======
family             float32  float64
=================  =======  =======
Poisson            0.50     4.9
Gamma, Chi2        0.50     10.9
InverseGamma       0.50     6.7
Beta               0.50     10.9
Binomial           0.50     13.3
=================  =======  =======

References: C. Loader, "Fast and accurate computation of binomial probabilities" (2000), whose stirlerr and bd0 these
are, up to where log Gamma is split.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._autograd import rowwise
from ._bregman import STIRLING, lgamma_curvature, log_quotient, product_difference
from ._elementwise import horner, sum_error
from .special import log1pmx

__all__ = [
    "binomial_deviance",
    "binomial_rest",
    "compensated_sum",
    "deviance",
    "digamma",
    "gamma_entropy",
    "gamma_scale",
    "poisson_rest",
    "product_deviance",
    "quotient_deviance",
]

_SERIES = 10.0  # from here on seven terms leave 1e-17
_TAU = 2 * math.pi


def _attached(value: Tensor, smooth: Tensor) -> Tensor:
    """The value with the derivatives of another formula of it."""
    return value.detach() + (smooth - smooth.detach())


def compensated_sum(x: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over the last dimension, and what rounding took from it, without derivatives."""
    high, low = x.detach(), torch.zeros_like(x)
    while high.shape[-1] > 1:
        if high.shape[-1] % 2:
            high, low = torch.nn.functional.pad(high, (0, 1)), torch.nn.functional.pad(low, (0, 1))
        a, b = high[..., ::2], high[..., 1::2]
        high = a + b
        low = low[..., ::2] + low[..., 1::2] + sum_error(a, b, high)
    return _attached(high.squeeze(-1), x.sum(-1)), low.squeeze(-1)


def gamma_scale(z: Tensor) -> tuple[Tensor, Tensor]:
    """A(z) and R(z) of the module's head, for z >= 0."""
    far = z >= _SERIES
    large, small = torch.where(far, z, _SERIES), torch.where(far, 1.0, z)
    inverse = 1 / large
    series = inverse * horner(inverse * inverse, STIRLING[::-1])
    rest = torch.lgamma(small + 1) - torch.xlogy(small, small) + small
    return torch.where(far, torch.sqrt(large / _TAU), z), torch.where(far, series, rest)


def _root(z: Tensor) -> tuple[Tensor, Tensor]:
    """z/A(z), which is 1 at 0, and R(z)."""
    far = z >= _SERIES
    return torch.where(far, torch.sqrt(_TAU * torch.where(far, z, 1.0)), 1.0), gamma_scale(z)[1]


def poisson_rest(k: Tensor) -> Tensor:
    """Log k! - k log k + k, never negative, for k >= 0."""
    root, rest = _root(k)
    return torch.log(root) + rest


def binomial_rest(k: Tensor, j: Tensor) -> Tensor:
    """`poisson_rest` of k + j less that of k and that of j."""
    (of_n, rest), (of_k, rest_k), (of_j, rest_j) = _root(k + j), _root(k), _root(j)
    return torch.log(of_n / of_k / of_j) + (rest - (rest_k + rest_j))


def deviance(a: Tensor, t: Tensor, m: Tensor, log_m: Tensor) -> Tensor:
    """The value a L(t/a) = m - a - a log(m/a), m at a = 0; t = m - a, m and log m to their relative accuracy."""
    some, floor = a > 0, torch.finfo(m.dtype).tiny
    x = torch.where(some, a, 1.0)
    v = t / x
    near = (v > -0.6) & (v < 1) & some
    plain = (m > floor) & m.isfinite()
    by_log = torch.where(near | ~some | (log_m == -torch.inf), 0.0, log_m) - torch.log(x)  # m may have underflowed
    log = torch.where(plain, log_quotient(torch.where(plain, m, 1.0), x), by_log)
    far = t - a * torch.where(near, 0.0, log)
    far = torch.where(some & (m == 0) & (log_m == -torch.inf), torch.inf, far)
    return torch.where(near, -x * log1pmx(torch.where(near, v, 0.0)), far)


def product_deviance(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """`deviance` of a > 0 and m = b x, positive numbers."""
    m = b * x
    t = _attached(product_difference(b, x, a, torch.ones_like(a)), m - a)
    return deviance(a, t, m, torch.log(b) + torch.log(x))


def quotient_deviance(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """`deviance` of a > 0 and m = b/x, positive numbers."""
    m = b / x
    t = _attached(product_difference(b, torch.ones_like(b), a, x) / x, m - a)
    return deviance(a, t, m, torch.log(b) - torch.log(x))


def binomial_deviance(a: Tensor, b: Tensor, x: Tensor, y: Tensor, log_x: Tensor, log_y: Tensor) -> Tensor:
    """The sum a log(a/((a + b) x)) + b log(b/((a + b) y)) for x + y = 1, with 0 log 0 = 0."""
    n = a + b
    still, other = x.detach(), y.detach()
    # the complement of an x below 1/2 is rounded, which a large a would magnify; of a larger one it is exact
    lost = torch.where(still <= other, sum_error(torch.ones_like(still), -still, 1 - still), 0.0)
    lost = torch.where((1 - still) == other, lost, 0.0)
    t = _attached(product_difference(b, x, a, y) - a.detach() * lost, b * x - a * y)
    log_n = torch.log(torch.where(n > 0, n, 1.0))
    return deviance(a, t, n * x, log_n + log_x) + deviance(b, -t, n * y, log_n + log_y)


def _entropy_value(z: Tensor) -> tuple[Tensor]:
    far = z >= _SERIES
    large, small = torch.where(far, z, _SERIES), torch.where(far, 1.0, z)
    u = 1 / large
    slope = horner(u * u, tuple((2 * k + 1) * c for k, c in enumerate(STIRLING))[::-1]) * u * u  # -R'
    by_series = 0.5 * torch.log(_TAU * large) + 0.5 - 0.5 * u + gamma_scale(large)[1] + (large - 1) * slope
    direct = small + torch.lgamma(small) + (1 - small) * torch.digamma(small)
    return (torch.where(far, by_series, direct),)


def _entropy_slope(inputs: tuple[Tensor, ...], saved: object) -> tuple[Tensor]:
    (z,) = inputs
    return (1 / z + (1 - z) * lgamma_curvature(z),)


gamma_entropy = rowwise(_entropy_value, _entropy_slope)
"""z + log Gamma(z) + (1 - z) digamma(z), the entropy of a Gamma of rate 1, whose terms are of the size of z log z."""

digamma = rowwise(lambda z: (torch.digamma(z),), lambda inputs, saved: (lgamma_curvature(inputs[0]) + 1 / inputs[0],))
"""torch's, but its trigamma is good to 5e-10 only."""
