r"""What a ContinuousBernoulli is made of: an exponential distribution truncated to the unit interval.

Its density is proportional to :math:`e^{yx}` with y the logit of ``probs``. About the middle of the interval its
cumulants are the derivatives of the even and convex

.. math:: k(y) = \log \frac{\sinh(y/2)}{y/2},

so that its mean is :math:`1/2 + k'(y)`, its variance :math:`k''(y)`, and its negative entropy the Bregman divergence
:math:`e(y) = y k'(y) - k(y)` of k at 0 and y. For y up to 3 in size these are their Taylor series in :math:`y^2`: the
textbook forms divide a difference by y or its square. Beyond, with :math:`\lambda` the size of y, the textbook forms
stand, in terms of the mean's distance from the end of the interval where the density is highest, :math:`1/\lambda -
1/(e^\lambda - 1)`.

All functions are differentiable.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._elementwise import horner
from ...special import expm1mx

__all__ = [
    "integral",
    "log_mgf",
    "mean",
    "negentropy",
    "shape",
    "shortfall",
    "tail_mean",
    "tail_weight",
    "unit_negentropy",
    "variance",
]

# B_2j/(2j)!, j = 1 ... 28, by mpmath; the series' radius is 2 pi, and what is left out at 3 is 2e-18
# fmt: off
_COEFFICIENTS = (
    0.083333333333333333, -0.0013888888888888889, 3.3068783068783069e-05, -8.2671957671957672e-07,
    2.0876756987868099e-08, -5.2841901386874932e-10, 1.3382536530684679e-11, -3.3896802963225829e-13,
    8.5860620562778446e-15, -2.1748686985580619e-16, 5.5090028283602295e-18, -1.3954464685812523e-19,
    3.5347070396294675e-21, -8.9535174270375469e-23, 2.2679524523376831e-24, -5.7447906688722024e-26,
    1.4551724756148649e-27, -3.6859949406653102e-29, 9.3367342570950447e-31, -2.3650224157006299e-32,
    5.9906717624821343e-34, -1.5174548844682903e-35, 3.8437581254541882e-37, -9.736353072646691e-39,
    2.466247044200681e-40, -6.2470767418207437e-42, 1.5824030244644914e-43, -4.008273685948936e-45,
)
# fmt: on
_ORDERS = tuple(enumerate(_COEFFICIENTS, 1))
_K = tuple(c / (2 * j) for j, c in reversed(_ORDERS))  # k/y^2
_MEAN = tuple(c for _, c in reversed(_ORDERS))  # k'/y
_VARIANCE = tuple(c * (2 * j - 1) for j, c in reversed(_ORDERS))
_ENTROPY = tuple(c * (2 * j - 1) / (2 * j) for j, c in reversed(_ORDERS))  # e/y^2
_REACH = 3.0
# (e^x - 1)/x and (e^x - 1 - x)/x^2, for |x| <= 1
_FIRST, _SECOND = (tuple(1 / math.factorial(k + n) for k in range(18, -1, -1)) for n in (1, 2))


def _split(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where y is near 0, y^2 there, and |y| elsewhere."""
    near = y.abs() < _REACH
    inner = torch.where(near, y, 0.0)
    return near, inner * inner, torch.where(near, _REACH, y).abs()


def integral(rate: Tensor, x: Tensor) -> Tensor:
    """The integral from 0 to x in (0, 1) of the distribution function of y = -rate, rate >= 0."""
    near = rate < 1
    r = torch.where(near, rate, 0.0)
    series = x * x * horner(-r * x, _SECOND) / horner(-r, _FIRST)
    r = torch.where(near, 1.0, rate)
    return torch.where(near, series, expm1mx(-r * x) / r / -torch.expm1(-r))


def shortfall(rate: Tensor) -> Tensor:
    """log(1 - e^-rate), the weight that truncation leaves of an exponential distribution, for rates from 1 on."""
    return torch.log1p(-torch.exp(-rate))


def tail_weight(rate: Tensor) -> Tensor:
    """rate/(e^rate - 1)."""
    return rate.clamp(max=1e4) * torch.exp(-rate) / -torch.expm1(-rate)


def log_mgf(y: Tensor) -> Tensor:
    """k(y)."""
    near, square, rate = _split(y)
    return torch.where(near, square * horner(square, _K), 0.5 * rate + shortfall(rate) - torch.log(rate))


def tail_mean(y: Tensor) -> Tensor:
    """The mean's distance from 1 where y is positive, and from 0 where it is not: 1/2 - |k'|."""
    near, square, rate = _split(y)
    inner = torch.where(near, torch.where(y > 0, y, -y), 0.0)  # abs has the derivative 0 at 0
    return torch.where(near, 0.5 - inner * horner(square, _MEAN), (1 - tail_weight(rate)) / rate)


def mean(y: Tensor) -> Tensor:
    """The mean, which is small where y is far below 0."""
    tail = tail_mean(y)
    return torch.where(y <= 0, tail, 1 - tail)


def _scaled_variance(rate: Tensor) -> Tensor:
    """rate^2 times the variance."""
    return 1 - torch.exp(-rate) * (rate / torch.expm1(-rate)).square()


def variance(y: Tensor) -> Tensor:
    """k''(y)."""
    near, square, rate = _split(y)
    return torch.where(near, horner(square, _VARIANCE), _scaled_variance(rate) / rate / rate)


def unit_negentropy(rate: Tensor) -> Tensor:
    """E less log(rate), the negative entropy of rate times the variable, for rates from 3 on."""
    return tail_weight(rate) - 1 - shortfall(rate)


def negentropy(y: Tensor) -> Tensor:
    """e(y), the KL against the uniform distribution."""
    near, square, rate = _split(y)
    return torch.where(near, square * horner(square, _ENTROPY), torch.log(rate) + unit_negentropy(rate))


def shape(y: Tensor) -> Tensor:
    """The KL against the normal distribution of the same mean and variance."""
    near, square, rate = _split(y)
    inner = 0.5 * torch.log(horner(square, _VARIANCE)) + square * horner(square, _ENTROPY)
    outer = 0.5 * torch.log(_scaled_variance(rate)) + unit_negentropy(rate)
    return 0.5 * math.log(2 * math.pi * math.e) + torch.where(near, inner, outer)
