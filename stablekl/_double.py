"""Double-double arithmetic: numbers of twice the digits, as unevaluated sums of two float64 tensors.

For sums whose terms cancel by more digits than float64 has, when no rearrangement into terms of one sign is known. A
`Double` is a pair ``hi + lo`` with ``|lo|`` at most half an ulp of ``hi``: about 2^-106, or 1e-32. All functions are
elementwise, branchless and broadcast; their operands are Doubles, float64 tensors (taken as exact) or, next to one of
these, Python's floats. Nothing here has derivatives: take values with it, and gradients from a formula in float64.

Valid while the operands and the results lie between 1e-290 and 1e290, for then their second parts are normal numbers;
next to these ends the first part stays right where float64's would. Largest relative errors seen over that range,
against mpmath, of 20,000 arguments (500 in each of a few ranges for the last two lines), log-uniform, of two parts:

====================================  =======================================================
`add`, `subtract`                     1.5e-32, where a sum cancels too
`multiply`, `divide`                  3e-32, 5e-32
`exp`                                 2e-32 (times the error of the argument's last digits)
`expm1`, `log1p`, `log`               5e-32, at arguments near 0 or 1 too
====================================  =======================================================

torch.compile keeps every rounding on a CPU (measured: `log1p`, `exp` and `divide` give the same bits), and takes a
logarithm and `stirling` as one operation each (see `_opaque`). What contracts products and sums, or reassociates sums,
would destroy the second parts.

After T. Dekker, "A floating-point technique for extending the available precision" (1971), and M. Joldes, J.-M. Muller,
V. Popescu, "Tight and rigorous error bounds for basic building blocks of double-word arithmetic" (2017), whose
algorithms 6, 12 and 17 are `add`, `multiply` and `divide`.
"""

from __future__ import annotations

from fractions import Fraction
from math import factorial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _fused
from ._elementwise import product_error, sum_error
from ._opaque import opaque

__all__ = [
    "EULER",
    "HALF_LOG_TAU",
    "LOG_2",
    "PI",
    "Double",
    "Number",
    "absolute",
    "add",
    "constant",
    "divide",
    "double",
    "exact_product",
    "exact_sum",
    "exp",
    "expm1",
    "log",
    "log1p",
    "log_quotient",
    "multiply",
    "negative",
    "rounded",
    "select",
    "subtract",
    "total",
]


class Double(NamedTuple):
    """The number ``hi + lo``, where ``hi`` is that number rounded."""

    hi: Tensor
    lo: Tensor


Number = Double | Tensor | float


def constant(value: Fraction) -> Any:
    """A Double of Python's floats: a number that may stand next to a tensor."""
    hi = float(value)
    return Double(hi, float(value - Fraction(hi)))  # type: ignore[arg-type]


# hi = float(x), lo = float(x - hi) in mpmath, x = log(2), pi, euler, log(2 pi)/2
LOG_2: Any = Double(0.6931471805599453, 2.3190468138462996e-17)  # type: ignore[arg-type]
PI: Any = Double(3.141592653589793, 1.2246467991473532e-16)  # type: ignore[arg-type]
EULER: Any = Double(0.5772156649015329, -4.942915152430645e-18)  # type: ignore[arg-type]
HALF_LOG_TAU: Any = Double(0.9189385332046728, -3.8782941580672414e-17)  # type: ignore[arg-type]


# ---- four operations --------------------------------------------------------------------------------------------


def double(x: Number) -> Double:
    """A Double of a tensor, which is exact."""
    if isinstance(x, Double):
        return x
    return Double(x, torch.zeros_like(x)) if isinstance(x, Tensor) else Double(x, 0.0)  # type: ignore[arg-type]


def rounded(x: Double) -> Tensor:
    """The nearest float64."""
    return x.hi + x.lo


def select(mask: Tensor, x: Number, y: Number) -> Double:
    """torch.where of two numbers."""
    x, y = double(x), double(y)
    # of two Python floats torch.where makes a tensor of the default dtype
    pairs = ((torch.as_tensor(a, dtype=torch.float64, device=mask.device), b) for a, b in zip(x, y, strict=True))
    return Double(*(torch.where(mask, a, b) for a, b in pairs))


def _normal(hi: Tensor, lo: Tensor) -> Double:
    """The sum hi + lo, where hi is not smaller than lo."""
    lo = _kept(lo)
    s = hi + lo
    return Double(s, _kept(lo - (s - hi)))


def _kept(lo: Tensor) -> Tensor:
    """A second part, 0 where the first has overflowed or nearly."""
    return torch.where(lo.isfinite(), lo, 0.0) if isinstance(lo, Tensor) else lo


def exact_sum(a: Tensor, b: Tensor) -> Double:
    """The sum a + b without any error."""
    s = a + b
    return Double(s, _kept(sum_error(a, b, s)))


def exact_product(a: Tensor, b: Tensor) -> Double:
    """The product a b without any error."""
    p = a * b
    return Double(p, _kept(product_error(a, b, p)))


def negative(x: Number) -> Double:
    """The number -x."""
    x = double(x)
    return Double(-x.hi, -x.lo)


def absolute(x: Double) -> Double:
    """|x|."""
    return select(x.hi < 0, negative(x), x)


def add(x: Number, y: Number) -> Double:
    """The sum x + y, to its relative accuracy where it cancels."""
    x, y = double(x), double(y)
    parts = _fused.double_arithmetic("add", (*x, *y))
    if parts:
        return Double(*parts)
    s, t = exact_sum(x.hi, y.hi), exact_sum(x.lo, y.lo)
    v = _normal(s.hi, s.lo + t.hi)
    return _normal(v.hi, t.lo + v.lo)


def subtract(x: Number, y: Number) -> Double:
    """The difference x - y, to its relative accuracy where it cancels."""
    return add(x, negative(y))


def total(first: Number, *others: Number) -> Double:
    """The sum of all, one after the other."""
    result = double(first)
    for x in others:
        result = add(result, x)
    return result


def multiply(x: Number, y: Number) -> Double:
    """The product x y."""
    if not isinstance(x, Double) and not isinstance(y, Double) and isinstance(x, Tensor):
        return exact_product(x, torch.as_tensor(y, dtype=x.dtype, device=x.device))
    x, y = double(x), double(y)
    parts = _fused.double_arithmetic("multiply", (*x, *y))
    if parts:
        return Double(*parts)
    p = exact_product(x.hi, y.hi)
    return _normal(p.hi, p.lo + (x.hi * y.lo + (x.lo * y.hi + x.lo * y.lo)))


def divide(x: Number, y: Number) -> Double:
    """The quotient x/y."""
    x, y = double(x), double(y)
    parts = _fused.double_arithmetic("divide", (*x, *y))
    if parts:
        return Double(*parts)
    q = x.hi / y.hi
    p = exact_product(q, y.hi)
    # x - q y, whose leading parts are the same number or neighbours
    rest = ((x.hi - p.hi) - p.lo) + (x.lo - q * y.lo)
    return _normal(q, _kept(rest / y.hi))


# ---- exponential and logarithm ----------------------------------------------------------------------------------

# 1/k!, k = 1 ... 26, for |x| <= log(2)/2: what is left out is 2e-40. The first in twice the digits, the others are
# below 2^-50 of the sum, where float64 does.
_LEADING, _TRAILING = 13, 26
_FACTORIALS = tuple(constant(Fraction(1, factorial(k))) for k in range(1, _LEADING + 1))
_SMALL_FACTORIALS = tuple(1 / factorial(k) for k in range(_LEADING + 1, _TRAILING + 1))
# log 2 in three parts, of which an integer below 2^11 times the first is exact
_LOG_2_PARTS = (0.6931471805598903, 5.497923018708371e-14, 1.94704509238075e-31)
_LOG_OVERFLOW = 709.782712893384
_LOG_UNDERFLOW = -700.0


_FRACTION, _ONE = (1 << 52) - 1, 1023 << 52  # the bits of a float64 behind its exponent; those of 1


@opaque(1)
def _power_of_two(k: Tensor) -> tuple[Tensor]:
    """2^k of whole numbers from -1022 to 1023, exactly, by its bits; torch's own exp2 is rounded where vectorised."""
    return (((k.to(torch.int64) + 1023) << 52).view(torch.float64),)


def _expm1_near(x: Double) -> Double:
    """expm1 of numbers up to log(2)/2."""
    tail = x.hi * 0
    for c in reversed(_SMALL_FACTORIALS):
        tail = (tail + c) * x.hi
    result = double(tail)
    for k in range(_LEADING - 1, 0, -1):
        result = multiply(add(result, _FACTORIALS[k]), x)
    return multiply(add(result, 1.0), x)


def _reduced(x: Double) -> tuple[Double, Tensor]:
    """The rest x - k log 2, at most log(2)/2, and k, whose power of two is a normal number."""
    k = torch.round((x.hi / LOG_2.hi).nan_to_num().clamp(-1021, 1023))
    first, second, third = _LOG_2_PARTS
    r = subtract(x, k * first)
    return subtract(r, add(multiply(k, torch.full_like(k, second)), k * third)), k


def exp(x: Number) -> Double:
    """The exponential e^x; infinite beyond 709, and 0 below -700."""
    x = double(x)
    r, k = _reduced(x)
    # 2^1023 and twice that: e^709 has an exponent of 1023 and a factor above 1
    near = add(_expm1_near(r), 1.0)
    (half,) = _power_of_two(k - 1)
    hi, lo = 2 * (near.hi * half), 2 * (near.lo * half)
    hi = torch.where(x.hi > _LOG_OVERFLOW, torch.inf, torch.where(x.hi < _LOG_UNDERFLOW, 0.0, hi))
    return Double(torch.where(x.hi.isnan(), torch.nan, hi), torch.where((hi == 0) | hi.isinf(), 0.0, lo))


def expm1(x: Number) -> Double:
    """The exponential less 1, e^x - 1, to its relative accuracy near 0 too."""
    x = double(x)
    near = x.hi.abs() < 0.34
    zero = x.hi * 0
    far = exp(x)
    infinite = far.hi == torch.inf
    far = select(infinite, Double(far.hi, zero), subtract(select(infinite, zero, far), 1.0))
    return select(near, _expm1_near(select(near, x, zero)), far)


def _log1p_near(z: Double) -> Double:
    """log1p of numbers from 1/sqrt(2) - 1 to sqrt(2) - 1: Newton's step, from a logarithm in float64."""
    y = torch.log1p(z.hi)
    e = _expm1_near(double(y))
    # log(1 + z) - y = log1p(t), of which t^2/2 is 2^-106 of z
    t = rounded(subtract(z, e)) / (1 + e.hi)
    return _normal(y, t)


def _log(x: Double, less_one: Double) -> Double:
    """log(x), from x - 1 too, which x does not show where it is small."""
    return Double(*_log_parts(*x, *less_one))


@opaque(2)
def _log_parts(*parts: Tensor) -> tuple[Tensor, ...]:
    if _fused.available(parts):
        return _fused.double_log(parts)
    x, less_one = Double(*parts[:2]), Double(*parts[2:])
    # its exponent by its bits: the compiler for CPUs fails on torch.frexp (torch 2.13); subnormal numbers have none
    lift = torch.where(x.hi < 2.0**-1022, 54.0, 0.0).to(x.hi.dtype)
    by = torch.where(lift > 0, 2.0**54, 1.0).to(x.hi.dtype)
    x = Double(x.hi * by, x.lo * by)
    bits = x.hi.view(torch.int64)
    mantissa = ((bits & _FRACTION) | _ONE).view(torch.float64)  # from 1 to 2
    high = mantissa > 1.4142135623730951
    k = ((bits >> 52) & 0x7FF).to(torch.float64) - torch.where(high, 1022.0, 1023.0) - lift
    m = torch.where(high, 0.5 * mantissa, mantissa)
    z = add(Double(m, x.lo * torch.where(x.hi == 0, 1.0, m / x.hi)), -1.0)
    near = _log1p_near(select(k == 0, less_one, z))
    first, second, third = _LOG_2_PARTS
    shift = add(k * first, add(multiply(k, torch.full_like(k, second)), k * third))
    result = add(shift, near)
    end = torch.where(x.hi == 0, -torch.inf, torch.where(x.hi == torch.inf, torch.inf, torch.nan))
    inside = (x.hi > 0) & x.hi.isfinite()
    return torch.where(inside, result.hi, end), torch.where(inside, result.lo, 0.0)


def log(x: Number) -> Double:
    """The logarithm of x, to its relative accuracy near 1 too."""
    x = double(x)
    return _log(x, subtract(x, 1.0))


def log1p(x: Number) -> Double:
    """The logarithm of 1 + x, to its relative accuracy near 0 too."""
    x = double(x)
    one_more = add(x, 1.0)
    return _log(select(x.hi == torch.inf, x, one_more), x)


def log_quotient(x: Number, y: Number) -> Double:
    """The logarithm of x/y for positive x and y, to its relative accuracy where they are near each other too."""
    return _log(divide(x, y), divide(subtract(x, y), y))
