"""The logarithm of Gamma and its derivative in twice the digits; see `_double`.

Largest errors seen over 1e-290 to 1e290, against mpmath, of 500 arguments in each of a few ranges:

====================================  =======================================================
`stirling`                            9e-32 from 20 on; below it an absolute 2e-30
`lgamma`, `digamma`                   2e-30 and 3e-31 of max(1, result)
====================================  =======================================================
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

from torch import Tensor

from . import _fused
from ._double import (
    HALF_LOG_TAU,
    Double,
    Number,
    add,
    constant,
    divide,
    double,
    log,
    multiply,
    select,
    subtract,
)
from ._opaque import opaque

__all__ = ["Stirling", "digamma", "lgamma", "stirling"]

# Bernoulli numbers B_2k: B_2k/(2k (2k - 1)) x^(1 - 2k) in Stirling's series; what is left out at 20 is 1e-36.
# fmt: off
_BERNOULLI = tuple(Fraction(*x) for x in (
    (1, 6), (-1, 30), (1, 42), (-1, 30), (5, 66), (-691, 2730), (7, 6), (-3617, 510), (43867, 798), (-174611, 330),
    (854513, 138), (-236364091, 2730), (8553103, 6), (-23749461029, 870), (8615841276005, 14322),
    (-7709321041217, 510), (2577687858367, 6), (-26315271553053477373, 1919190), (2929993913841559, 6),
))
# fmt: on
_STEPS = 20  # from here on the series; smaller numbers take as many steps of the recurrence
_PAIRS = tuple(float(i * (_STEPS - 1 - i)) for i in range(_STEPS // 2))


def _series(w: Double, coefficients: list[Fraction]) -> Double:
    """The polynomial in w <= 1/400, lowest coefficient first, of whose terms those from the ninth on are small."""
    tail = w.hi * 0
    for c in reversed(coefficients[8:]):
        tail = (tail + float(c)) * w.hi
    result = double(tail)
    for c in reversed(coefficients[1:8]):
        result = multiply(add(result, constant(c)), w)
    return add(result, constant(coefficients[0]))


_LGAMMA = [b / (2 * k * (2 * k - 1)) for k, b in enumerate(_BERNOULLI, 1)]
_DIGAMMA = [b / (2 * k) for k, b in enumerate(_BERNOULLI, 1)]


class Stirling(NamedTuple):
    """What `stirling` returns."""

    lgamma: Double
    digamma: Double


def _shift(x: Double, near: Tensor) -> tuple[Double, Double]:
    """The product of x, x + 1, ..., x + 19, and the sum of the reciprocals; 1 and 0 where not ``near``."""
    # (x + i)(x + 19 - i) = x (x + 19) + i (19 - i)
    safe = select(near, x, 1.0)
    u = multiply(safe, add(safe, float(_STEPS - 1)))
    product, slope = u, constant(Fraction(1))
    for c in _PAIRS[1:]:
        factor = add(u, c)
        slope = add(multiply(slope, factor), product)
        product = multiply(product, factor)
    reciprocals = divide(multiply(slope, add(multiply(safe, 2.0), float(_STEPS - 1))), product)
    return select(near, product, 1.0), select(near, reciprocals, 0.0)


def stirling(x: Number) -> Stirling:
    """What Stirling's formulas leave of log Gamma and of digamma at x > 0, both positive and falling.

    log Gamma(x) = (x - 1/2) log(x) - x + log(2 pi)/2 + lgamma, and digamma(x) = log(x) - 1/(2 x) - digamma: about
    1/(12 x) and 1/(12 x^2) for large x, to their relative accuracy. The second is minus the derivative of the first.
    """
    r, r_low, s, s_low = _stirling_parts(*double(x))
    return Stirling(Double(r, r_low), Double(s, s_low))


@opaque(4)
def _stirling_parts(*parts: Tensor) -> tuple[Tensor, ...]:
    if _fused.available(parts):
        return _fused.double_stirling(parts)
    x = Double(*parts)
    near = x.hi < _STEPS
    z = select(near, add(x, float(_STEPS)), x)
    inverse = divide(1.0, z)
    w = multiply(inverse, inverse)
    far = Stirling(multiply(_series(w, _LGAMMA), inverse), multiply(_series(w, _DIGAMMA), w))
    product, reciprocals = _shift(x, near)
    safe = select(near, x, z)
    log_z, log_x = log(z), log(safe)
    gap = subtract(log_z, log_x)
    steps = float(_STEPS)
    less = subtract(multiply(subtract(safe, 0.5), gap), log(product))
    first = add(far.lgamma, add(less, multiply(subtract(log_z, 1.0), steps)))
    halves = multiply(subtract(divide(1.0, safe), inverse), 0.5)
    second = add(far.digamma, subtract(subtract(reciprocals, halves), gap))
    return (*select(near, first, far.lgamma), *select(near, second, far.digamma))


def lgamma(x: Number) -> Double:
    """The logarithm of Gamma(x) for x > 0; the error is absolute near its zeros, 1 and 2."""
    x = double(x)
    leading = subtract(multiply(subtract(x, 0.5), log(x)), x)
    return add(add(leading, HALF_LOG_TAU), stirling(x).lgamma)


def digamma(x: Number) -> Double:
    """The derivative of log Gamma for x > 0; the error is absolute near its zero, 1.46."""
    x = double(x)
    return subtract(subtract(log(x), divide(0.5, x)), stirling(x).digamma)
