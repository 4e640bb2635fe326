"""What the log-densities and distribution functions of the families share: one precision, one rounding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _double
from .._double import Double
from .._elementwise import product_error, sum_error
from .._normal_tail import normal_cdf, normal_log_cdf
from .._scaled import split
from ._base import common_dtype, given, widened

__all__ = [
    "LOG_2_HIGH",
    "LOG_2_LOW",
    "cauchy_log_density",
    "checked",
    "evaluated",
    "exponential",
    "log1mexp",
    "normal_log_density",
    "normal_log_tail",
    "normal_tail",
    "outcomes",
    "product",
    "standardised",
]


def checked(distribution: Any, x: Tensor) -> Tensor:
    """The sample as a tensor, validated as torch does where the distribution asks for it."""
    if distribution._validate_args:
        distribution._validate_sample(x)
    return x


def evaluated(f: Callable[..., Tensor], *inputs: Tensor | float) -> Tensor:
    """``f`` of the inputs in float64 and of one shape, rounded once to the dtype that they promote to."""
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    dtype = common_dtype(*tensors)
    like = tensors[-1]
    wide = (widened(torch.as_tensor(x, dtype=None if isinstance(x, Tensor) else like.dtype)) for x in inputs)
    return f(*torch.broadcast_tensors(*wide)).to(dtype)


def log1mexp(x: Tensor, lost: Tensor | float = 0.0) -> Tensor:
    """log(1 - e^-x) for x >= 0, to its relative accuracy; what rounding took from x matters where that is large."""
    near = x < 0.7
    low, high = torch.where(near, x, 0.5), torch.where(near, 1.0, x)
    return torch.where(near, torch.log(-torch.expm1(-low)), torch.log1p(-torch.exp(-high) * (1 - lost)))


def product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A product, and what rounding took from it, without derivatives."""
    p = a * b
    with torch.no_grad():
        lost = product_error(a.detach(), b.detach(), p.detach())
        lost = torch.where(lost.isfinite(), lost, 0.0)
    return p, lost


def exponential(z: Tensor, lost: Tensor) -> tuple[Tensor, Tensor]:
    """e^(z + lost), and what rounding took from it, without derivatives: e to the minus that would magnify it."""
    smooth = torch.exp(z.clamp(max=710.0))  # infinite, and flat, from there on
    with torch.no_grad():
        fits = z.abs() < 708
        found = _double.exp(Double(*(torch.where(fits, x.detach(), 0.0) for x in (z, lost))))
    close = torch.where(fits, smooth, 0.0)
    return torch.where(fits, found.hi + (close - close.detach()), smooth), torch.where(fits, found.lo, 0.0)


def normal_tail(z: Tensor, lost: Tensor) -> Tensor:
    """The standard normal distribution function at z + lost; in the tail an ulp of z is z^2 of the result."""
    return normal_cdf(z) + (lost * torch.exp(-0.5 * z * z) / _SQRT_TAU).detach()


def standardised(x: Tensor, m: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Z = (x - m)/s, and what rounding took from it, without derivatives: exp and squares would magnify that."""
    d = x - m
    z = d / s
    with torch.no_grad():
        x, m, s, d, still = (v.detach() for v in (x, m, s, d, z))
        whole = still * s
        lost = ((d - whole) - product_error(still, s, whole) + sum_error(x, -m, d)) / s
        lost = torch.where(lost.isfinite(), lost, 0.0)
    return z, lost


_SQRT_TAU = math.sqrt(2 * math.pi)


# log 2 in two parts; of the first a product with an exponent is exact
LOG_2_HIGH, LOG_2_LOW = 0.6931471805598903, 5.497923018708371e-14


def normal_log_density(x: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
    """Of float64 tensors; sigma is not squared, which would underflow.

    z^2/2 and the logarithm of a small sigma are of opposite sign, and where the density is about 1 all of both cancels:
    the square, the exponent of sigma and their sum are exact, so that their roundings, 20 eps, do not stay.
    """
    z, lost = standardised(x, mu, sigma)
    mantissa, k = split(sigma)
    half = 0.5 * z
    square, level = half * z, -k * LOG_2_HIGH
    leading = level - square
    with torch.no_grad():
        level, square, half, still = (v.detach() for v in (level, square, half, z))
        rest = sum_error(level, -square, leading.detach()) - product_error(half, still, square)
        rest = torch.where(rest.isfinite(), rest, 0.0)
    return leading + (rest - z * lost - k * LOG_2_LOW - torch.log(mantissa * _SQRT_TAU))


def normal_log_tail(z: Tensor, lost: Tensor) -> Tensor:
    """The logarithm of `normal_tail`: of an upper tail, minus the lower one."""
    high = z > 0
    change = lost * torch.exp(-0.5 * z * z) / _SQRT_TAU / normal_cdf(torch.where(high, z, 0.0))
    return normal_log_cdf(z) + torch.where(high, change, 0.0).detach()


def cauchy_log_density(x: Tensor, m: Tensor, s: Tensor) -> Tensor:
    """Of float64 tensors; z^2 is not formed where it might overflow."""
    z = (x - m) / s
    size = z.abs()
    far = size > 1
    near, large = torch.where(far, 0.0, size), torch.where(far, size, 1.0)
    (mantissa, k), (lead, j) = split(s), split(large)
    tail = torch.where(far, 2 * torch.log(lead) + torch.log1p((1 / large).square()), torch.log1p(near * near))
    # the logarithms of z^2 and of a small s cancel: their exponents do so exactly
    k = k + 2 * j
    return -k * LOG_2_HIGH - (tail + k * LOG_2_LOW + torch.log(math.pi * mantissa))


def outcomes(distribution: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In float64 the probabilities of success and failure, from what was given, and their logarithms."""
    name, x = given(distribution)
    x = widened(x)
    if name == "logits":
        p, q = torch.sigmoid(x), torch.sigmoid(-x)
        return p, q, torch.nn.functional.logsigmoid(x), torch.nn.functional.logsigmoid(-x)
    some, rest = x > 0, x < 1
    log_p = torch.where(some, torch.log(torch.where(some, x, 1.0)), -torch.inf)
    log_q = torch.where(rest, torch.log1p(-torch.where(rest, x, 0.0)), -torch.inf)
    return x, 1 - x, log_p, log_q
