"""The logarithm of the normal distribution function, from one polynomial for the hazard.

With h(y) = phi(y)/Phi(-y) for y >= 0, both tails and all derivatives are sums and products of positive terms. erfcx
would do for the value, but not for the second derivative, which needs h(y) - y to its own accuracy, and not every
device has it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._elementwise import elementwise, horner

__all__ = ["log_ndtr_value", "normal_cdf", "normal_log_cdf"]

# (h(y) - y)(1 + y) for y >= 0, h(y) = phi(y)/Phi(-y) the hazard of a standard normal, as a polynomial in
# t = (y - 4)/(y + 4), -1 <= t <= 1: mpmath.chebyfit with 16 or 28 terms, error 7e-10 and 6e-17 (the change
# of variable is Shepherd and Laframboise's, Math. Comp. 36, 1981).
# fmt: off
_HAZARD = {
    torch.float32: (
        -6.9120315893e-05, 5.830872712e-05, 0.00046155171403, -0.00052779492368, -0.0015579588926,
        0.0027198677671, 0.003232593765, -0.010589496091, -0.0011143209886, 0.032419996015, -0.030771199591,
        -0.061070549689, 0.19293255403, -0.19210377384, -0.062056380645, 1.1280357226,
    ),
    torch.float64: (
        2.2501328670616362e-09, -2.4718037307037143e-08, 6.152648471664335e-09, 2.4793195546526405e-07,
        -2.6802602884846845e-07, -1.2537891945577625e-06, 2.311160155885865e-06, 4.253147833626413e-06,
        -1.2769619217049497e-05, -9.992943426249927e-06, 5.530731245130676e-05, 9.04926190807614e-06,
        -0.0002024281888011342, 6.880733798298331e-05, 0.0006390008528879599, -0.0005604024685909188,
        -0.0016937135976097686, 0.0027520409331516877, 0.0032926605391776654, -0.010605539423600189,
        -0.001129086112549831, 0.032424205079456946, -0.030769392022650558, -0.06107108420454685,
        0.192932468879107, -0.19210374819081538, -0.06205637998113664, 1.1280357224473554,
    ),
}
# fmt: on
_SQRT_2PI = math.sqrt(2 * math.pi)


def _hazard_excess(y: Tensor, lifted: bool = False) -> Tensor:
    """h(y) - y for y >= 0, h = phi/(1 - Phi): positive, 1/y for large y, where h - y would cancel."""
    return horner(1 - 8 / (y + 4), _HAZARD[torch.float32 if lifted else y.dtype]) / (1 + y)


def _density(y: Tensor) -> Tensor:
    """phi(y), y >= 0: m^2 is exact, so that exp does not magnify the rounding of y^2 by y^2."""
    y = y.clamp(max=64.0)  # where exp(-y^2/2) has long underflowed
    m = torch.round(y * 64) / 64
    return torch.exp(-0.5 * m * m) * torch.exp(-0.5 * (y - m) * (y + m)) / _SQRT_2PI


# Between -0.6 and 0.6, Phi comes from erf: the constants 1/2 and log 2 stay exact there, and the error of
# the hazard's polynomial (4 ulp) stays out.
_ERF_REACH, _SQRT_HALF = 0.6, math.sqrt(0.5)


def log_ndtr_value(x: Tensor, *, lifted: bool = False) -> Tensor:
    """`log_ndtr` without its gradient; ``lifted``: x holds float32 values as float64."""
    y = x.abs()
    h = y + _hazard_excess(y, lifted)
    lower = -((0.5 * x) * x + torch.log(h * _SQRT_2PI))
    tail = torch.where(x < 0, lower, torch.log1p(-_density(y) / h))
    return torch.where(y < _ERF_REACH, torch.log1p(torch.erf(x * _SQRT_HALF)) - math.log(2), tail)


def _inverse_mills_value(x: Tensor, *, lifted: bool = False) -> Tensor:
    """phi(x)/Phi(x)."""
    y = x.abs()
    h, phi = y + _hazard_excess(y, lifted), _density(y)
    tail = torch.where(x < 0, h, phi / (1 - phi / h))
    return torch.where(y < _ERF_REACH, 2 * phi / (1 + torch.erf(x * _SQRT_HALF)), tail)


def _inverse_mills_slope(x: Tensor) -> Tensor:
    # -H (x + H), H = phi/Phi; far below zero x + H would cancel
    x = x.clamp(min=-1e18, max=1e18)  # from there on the result is -1 or 0
    g, inverse_mills = _hazard_excess(x.abs()), _inverse_mills_value(x)
    return torch.where(x < -0.3, (x - g) * g, -inverse_mills * (x + inverse_mills))


def _cdf_value(x: Tensor, *, lifted: bool = False) -> Tensor:
    """Phi(x), as phi/h in the tail, where erfc would magnify the rounding of x/sqrt(2)."""
    y = x.abs()
    tail = _density(y) / (y + _hazard_excess(y, lifted))
    near = 0.5 + 0.5 * torch.erf(torch.where(y < _ERF_REACH, x, 0.0) * _SQRT_HALF)
    return torch.where(y < _ERF_REACH, near, torch.where(x < 0, tail, 1 - tail))


_inverse_mills = elementwise(_inverse_mills_value, _inverse_mills_slope)
normal_log_cdf = elementwise(log_ndtr_value, _inverse_mills)
normal_cdf = elementwise(_cdf_value, lambda x: torch.exp(-0.5 * x * x) / _SQRT_2PI)
