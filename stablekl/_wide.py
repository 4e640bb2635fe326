"""Doubles with an exponent of their own: products and quotients in twice the digits that leave the range of floats.

What `_scaled` is to float64, these are to `_double`, whose functions are valid from 1e-290 to 1e290 only. Powers of
two round nothing. Nothing here has derivatives.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _double
from ._double import Double
from ._scaled import NONE, Scaled, has_none, needs_none, power_of_two, shifted, split

__all__ = [
    "Wide",
    "alike",
    "attached",
    "difference",
    "exp",
    "log",
    "log_quotient",
    "narrow",
    "negative",
    "product",
    "quotient",
    "total",
    "wide",
]


class Wide(NamedTuple):
    """The number ``number * 2^exponent``; made by `wide`."""

    number: Double
    exponent: Tensor


def alike(*numbers: Wide) -> tuple[Wide, ...]:
    """With exponents if one of them has one (see `_scaled`)."""
    none = [has_none(x.exponent) for x in numbers]
    if all(none) or not any(none):
        return numbers
    return tuple(_split(x.number) if missing else x for x, missing in zip(numbers, none, strict=True))


def _split(x: Double) -> Wide:
    hi, k = split(x.hi)
    return Wide(Double(hi, shifted(x.lo, -k)), k)


def wide(x: Double | Tensor | Wide) -> Wide:
    """A Double or a float as one of these, the size of its number from 1 to 2; one of these as it is."""
    if isinstance(x, Wide):
        return x
    x = _double.double(x)
    return Wide(x, NONE[x.hi.dtype]) if needs_none(x.hi) else _split(x)


def _again(x: Double, k: Tensor) -> Wide:
    """With a number from 1 to 2 again, after a product or a difference."""
    if has_none(k):
        return Wide(x, k)
    new = _split(x)
    return Wide(new.number, k + new.exponent)


def product(*factors: Wide) -> Wide:
    """The product of all."""
    result, *others = alike(*factors)
    none = has_none(result.exponent)
    for x in others:
        k = result.exponent if none else result.exponent + x.exponent
        result = Wide(_double.multiply(result.number, x.number), k)
    return _again(*result)


def quotient(x: Wide, y: Wide) -> Wide:
    """The quotient x/y."""
    x, y = alike(x, y)
    k = x.exponent if has_none(x.exponent) else x.exponent - y.exponent
    return _again(_double.divide(x.number, y.number), k)


def _aligned(x: Wide, k: Tensor) -> Double:
    by = power_of_two(k)
    return Double(x.number.hi * by, x.number.lo * by)


def difference(x: Wide, y: Wide) -> Wide:
    """The difference x - y, to its relative accuracy where it cancels."""
    x, y = alike(x, y)
    if has_none(x.exponent, y.exponent):
        return Wide(_double.subtract(x.number, y.number), x.exponent)
    k, m = (torch.where(v.number.hi == 0, -torch.inf, v.exponent) for v in (x, y))
    top = torch.maximum(k, m)
    top = torch.where(top == -torch.inf, 0.0, top)
    return _again(_double.subtract(_aligned(x, k - top), _aligned(y, m - top)), top)


def total(x: Wide, y: Wide) -> Wide:
    """The sum x + y."""
    return difference(x, negative(y))


def half(x: Wide) -> Wide:
    """The number x/2."""
    if has_none(x.exponent):
        return Wide(Double(0.5 * x.number.hi, 0.5 * x.number.lo), x.exponent)
    return Wide(x.number, x.exponent - 1)


def negative(x: Wide) -> Wide:
    """The number -x."""
    return Wide(_double.negative(x.number), x.exponent)


def narrow(x: Wide) -> Double:
    """As a Double: 0 or infinite where it leaves the range of floats."""
    if has_none(x.exponent):
        return x.number
    hi = shifted(x.number.hi, x.exponent)
    return Double(hi, torch.where((hi == 0) | ~hi.isfinite(), 0.0, shifted(x.number.lo, x.exponent)))


def attached(x: Wide, smooth: Scaled) -> Scaled:
    """Its first part with the derivatives of another formula of it, which may have lost its digits."""
    k = torch.where(x.number.hi == 0, smooth.exponent, x.exponent)
    other = shifted(smooth.mantissa, smooth.exponent - k)
    return Scaled(x.number.hi.detach() + torch.where(other.isfinite(), other - other.detach(), 0.0), k)


def _with_exponent(log: Double, k: Tensor) -> Double:
    return _double.add(log, _double.multiply(k, _double.add(torch.zeros_like(k), _double.LOG_2)))


def log(x: Wide) -> Double:
    """The logarithm of a positive number."""
    if has_none(x.exponent):
        return _double.log(x.number)
    near = x.exponent.abs() <= 1
    k = torch.where(near, x.exponent, 0.0)
    return _with_exponent(_double.log(_aligned(x, k)), x.exponent - k)


def exp(x: Double) -> Wide:
    """The exponential e^x, as far as 2^(1e5)."""
    hi = x.hi.clamp(-7e4, 7e4)
    x = Double(hi, torch.where(hi == x.hi, x.lo, 0.0))
    k = torch.round(hi / _double.LOG_2.hi)
    rest = _double.subtract(x, _double.multiply(k, _double.add(torch.zeros_like(k), _double.LOG_2)))
    return Wide(_double.exp(rest), k)


def log_quotient(x: Wide, y: Wide) -> Double:
    """The logarithm of x/y of positive numbers, to its relative accuracy where they are near each other too."""
    x, y = alike(x, y)
    if has_none(x.exponent):
        return _double.log_quotient(x.number, y.number)
    k = x.exponent - y.exponent
    near = torch.where(k.abs() <= 1, k, 0.0)
    return _with_exponent(_double.log_quotient(_aligned(x, near), y.number), k - near)
