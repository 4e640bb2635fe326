"""Numbers with an exponent of their own: products, quotients and sums whose parts would leave the range of floats.

A quotient of parameters such as a_p b_q/(a_q b_p) is a float more often than a_p b_q is one, and its logarithm always
is. A `Scaled` is a tensor times a power of two, whose exponent is a tensor of whole numbers; powers of two round
nothing, so that results are those of float64, or float32, with exponents of any size. They can be differentiated: an
exponent counts as constant.

Almost always every number is within 2^+-100, and a few products and quotients of such numbers are floats. Where a CPU
in eager mode sees that, the exponent is `NONE`, a zero that operations pass on without work: the result is the same but
for what would have under- or overflowed, at half the cost. Every other mantissa is around 1, so a number with `NONE`
gets an exponent when it meets one that has one (`alike`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._autograd import is_plain
from ._bregman import lgamma_bend, product_difference, remainder_of_log
from ._bregman import lgamma_change as plain_change
from ._bregman import trigamma_fall as plain_fall
from ._elementwise import product_error, sum_error
from ._opaque import opaque
from .special import log1pmx

__all__ = [
    "NONE",
    "Scaled",
    "alike",
    "difference_of_products",
    "has_none",
    "less_product",
    "log_of_ratio",
    "needs_none",
    "power_of_two",
    "ratio",
    "scaled",
    "scaled_sum",
    "shifted",
    "split",
    "weighted_remainder",
    "where",
]

# By dtype, the exponent of numbers that need none: compared by identity.
NONE = {dtype: torch.zeros((), dtype=dtype, device="cpu") for dtype in (torch.float64, torch.float32)}
_NEAR = 2.0**100
# Of numbers with exponents this far apart the smaller is no part of a sum; one of a quotient is 1e30 times the other.
_FAR = 100.0
_LOG_2 = math.log(2)
# By dtype: of the same width the integers, the bits behind the exponent, the exponent of 1, and its smallest one.
_LAYOUT = {torch.float64: (torch.int64, 52, 1023, -1022.0), torch.float32: (torch.int32, 23, 127, -126.0)}


def has_none(*exponents: Tensor) -> bool:
    """Whether these exponents are all `NONE`."""
    return all(k is NONE.get(k.dtype) for k in exponents)


def needs_none(x: Tensor) -> bool:
    """Whether a CPU in eager mode sees that all of these are 0 or within 2^+-100."""
    if x.device.type != "cpu" or x.dtype not in NONE or not is_plain((x,)) or x.numel() == 0:
        return False
    size = x.abs()
    low, high = torch.aminmax(size)
    if not bool(high < _NEAR):
        return False
    return bool(low > 1 / _NEAR) or bool(((size > 1 / _NEAR) | (size == 0)).all())


def power_of_two(k: Tensor) -> Tensor:
    """2^k of whole numbers, exactly; those beyond the normal floats are taken to be at their ends."""
    return _power_of_two(k)[0]


@opaque(1)
def _power_of_two(k: Tensor) -> tuple[Tensor]:
    integers, bits, bias, least = _LAYOUT[k.dtype]
    return (((k.clamp(least, -1 - least).to(integers) + bias) << bits).view(k.dtype),)


def shifted(x: Tensor, k: Tensor) -> Tensor:
    """X 2^k for x around 1, by two factors, since 2^k may be no float where x 2^k is one; rounded once."""
    if has_none(k):
        return x
    half = torch.floor(0.5 * k)
    return x * power_of_two(half) * power_of_two(k - half)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """The number x as m 2^k with m from 1 to 2 in size; as itself where it is 0 or no number, with k = 0."""
    (k,) = _exponent(x.detach())
    half = torch.floor(-0.5 * k)
    return x * power_of_two(half) * power_of_two(-k - half), k


@opaque(1)
def _exponent(x: Tensor) -> tuple[Tensor]:
    integers, bits, bias, least = _LAYOUT[x.dtype]
    # a subnormal number has its exponent only after a multiplication
    lift = torch.where(x.abs() < 2.0**least, float(bits + 2), 0.0).to(x.dtype)
    lifted = x * power_of_two(lift)
    k = ((lifted.view(integers) >> bits) & (2 * bias + 1)).to(x.dtype) - bias - lift
    return (torch.where((x == 0) | ~x.isfinite(), 0.0, k),)


def alike(*numbers: Scaled) -> tuple[Scaled, ...]:
    """With exponents if one of them has one."""
    none = [has_none(x.exponent) for x in numbers]
    if all(none) or not any(none):
        return numbers
    return tuple(Scaled(*split(x.mantissa)) if missing else x for x, missing in zip(numbers, none, strict=True))


def _aligned(x: Scaled, y: Scaled) -> tuple[Tensor, Tensor, Tensor]:
    """The mantissas of two of them for one exponent, and that: the larger of those that are not 0."""
    x, y = alike(x, y)
    if has_none(x.exponent, y.exponent):
        return x.mantissa, y.mantissa, x.exponent
    k, m = (torch.where(v.mantissa == 0, -torch.inf, v.exponent) for v in (x, y))
    top = torch.maximum(k, m)
    top = torch.where(top == -torch.inf, torch.maximum(x.exponent, y.exponent), top)
    # a zero, too, by its own exponent: its derivative may be none
    return x.mantissa * power_of_two(x.exponent - top), y.mantissa * power_of_two(y.exponent - top), top


class Scaled(NamedTuple):
    """The number ``mantissa * 2^exponent``; made by `scaled`."""

    mantissa: Tensor
    exponent: Tensor

    def __mul__(self, other: Scaled) -> Scaled:  # type: ignore[override]
        x, y = alike(self, other)
        k = x.exponent if has_none(x.exponent) else x.exponent + y.exponent
        return Scaled(x.mantissa * y.mantissa, k)

    def __truediv__(self, other: Scaled) -> Scaled:
        x, y = alike(self, other)
        k = x.exponent if has_none(x.exponent) else x.exponent - y.exponent
        return Scaled(x.mantissa / y.mantissa, k)

    def __neg__(self) -> Scaled:
        return Scaled(-self.mantissa, self.exponent)

    def __add__(self, other: Scaled) -> Scaled:  # type: ignore[override]
        a, b, top = _aligned(self, other)
        return Scaled(a + b, top)

    def __sub__(self, other: Scaled) -> Scaled:
        return self + -other

    def size(self) -> Scaled:
        """The absolute value."""
        return Scaled(self.mantissa.abs(), self.exponent)

    def less(self, other: Scaled) -> Tensor:
        """Whether this one is below the other."""
        return (self + -other).mantissa < 0

    def rounded(self) -> Tensor:
        """The nearest float: 0 or infinite where it leaves their range."""
        return shifted(self.mantissa, self.exponent)

    def log(self) -> Tensor:
        """The logarithm of a positive number, to an absolute error of an ulp of max(1, its size)."""
        log = torch.log(self.mantissa)
        return log if has_none(self.exponent) else log + self.exponent * _LOG_2

    def each(self, f: Callable[[Tensor], Tensor]) -> Scaled:
        """With a view of both parts."""
        return Scaled(f(self.mantissa), self.exponent if has_none(self.exponent) else f(self.exponent))


def where(mask: Tensor, x: Scaled, y: Scaled) -> Scaled:
    """torch.where of two of them."""
    x, y = alike(x, y)
    k = x.exponent if has_none(x.exponent) else torch.where(mask, x.exponent, y.exponent)
    return Scaled(torch.where(mask, x.mantissa, y.mantissa), k)


def scaled(x: Tensor) -> Scaled:
    """A float as one of these numbers."""
    return Scaled(x, NONE[x.dtype]) if needs_none(x) else Scaled(*split(x))


def scaled_sum(x: Scaled) -> Scaled:
    """The sum over the last dimension, which is kept with size 1."""
    if has_none(x.exponent):
        return Scaled(x.mantissa.sum(-1, keepdim=True), x.exponent)
    k = torch.where(x.mantissa == 0, -torch.inf, x.exponent)
    top = k.amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, x.exponent.amax(-1, keepdim=True), top)
    return Scaled((x.mantissa * power_of_two(x.exponent - top)).sum(-1, keepdim=True), top)


def difference_of_products(a: Scaled, b: Scaled, c: Scaled, d: Scaled) -> Scaled:
    """A b - c d to its relative accuracy, without derivatives."""
    a, b, c, d = alike(a, b, c, d)
    first, second = a * b, c * d
    one = Scaled(torch.where(first.mantissa == 0, 0.0, a.mantissa), first.exponent)
    two = Scaled(torch.where(second.mantissa == 0, 0.0, c.mantissa), second.exponent)
    left, right, top = _aligned(one, two)
    return Scaled(product_difference(left, b.mantissa, right, d.mantissa), top)


def less_product(y: Scaled, x: Scaled, factor: Scaled) -> Scaled:
    """The difference y - x less a multiple of x, to its relative accuracy; the factor counts as constant."""
    y, x, factor = alike(y, x, factor)
    a, b, top = _aligned(y, x)
    difference = a - b
    still = Scaled(factor.mantissa.detach(), factor.exponent)
    multiple = still * x
    first, second, end = _aligned(Scaled(difference, top), multiple)
    e = first - second
    with torch.no_grad():
        by = power_of_two(top - end), power_of_two(multiple.exponent - end)
        lost = sum_error(a, -b, difference) * by[0]
        lost = lost - product_error(still.mantissa, x.mantissa, multiple.mantissa) * by[1]
        lost = sum_error(first, -second, e) + lost
    return Scaled(e + torch.where(lost.isfinite(), lost, 0.0), end)


def ratio(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Scaled, Scaled]:
    """A b/(c d) - 1, from the difference of exact products, and a b/(c d), of positive numbers."""
    x, y, z, w = alike(*(scaled(v) for v in (a, b, c, d)))
    quotient = (x * y) / (z * w)
    k = quotient.exponent
    close = k.abs() < _FAR
    by = y.mantissa * power_of_two(torch.where(close, k, 0.0))
    below = z.mantissa * w.mantissa
    smooth = (x.mantissa * by - below) / below
    near = (product_difference(x.mantissa, by, z.mantissa, w.mantissa) / below).detach() + (smooth - smooth.detach())
    far = torch.where(k > 0, quotient.mantissa, -1.0)
    return Scaled(torch.where(close, near, far), torch.where(close | (k < 0), 0.0, k)), quotient


def log_of_ratio(t: Scaled, quotient: Scaled) -> Tensor:
    """The logarithm of what `ratio` returns."""
    value = t.rounded()
    near = value.abs() < 0.5
    return torch.where(near, torch.log1p(torch.where(near, value, 0.0)), quotient.log())


def weighted_remainder(weight: Scaled, t: Scaled, quotient: Scaled) -> Scaled:
    """``weight * (t - log(1 + t))`` for a positive weight and 1 + t = quotient, where t may be no float."""
    t, quotient = alike(t, quotient)
    value = t.rounded()
    up, down = value > 2.0**_FAR, quotient.exponent < -_FAR
    far = up | down
    near = remainder_of_log(torch.where(far, 0.0, value), torch.where(far, 1.0, quotient.rounded()))
    # of t = 2^100 the logarithm is nothing, nor is q = 2^-100 of 1
    return weight * where(up, t, scaled(torch.where(down, -1 - quotient.log(), near)))


def lgamma_change(x: Scaled, y: Scaled, d: Scaled) -> Scaled:
    """`_bregman.lgamma_change`, which need not be a float next to the smallest numbers; differentiable."""
    largest = torch.finfo(x.mantissa.dtype).max
    a, b, e = (v.rounded().clamp(-largest, largest) for v in (x, y, d))
    rest = plain_change(a, b, e, first=1)
    falls = d.mantissa > 0
    u, v = where(falls, x, y), where(falls, y, x)
    # not the absolute value, which has no derivative at 0
    w = where(falls, d, -d) / (u + scaled(torch.ones_like(rest))) / v
    value = w.rounded()
    far = value > 2.0**_FAR
    step = where(far, w, scaled(-log1pmx(torch.where(far, 0.0, value)))) + w / u
    return scaled(rest) + where(falls, step, -step)


def digamma_rise(x: Scaled, d: Scaled) -> Scaled:
    """Digamma of x + d less that of x, for d >= 0; differentiable."""
    part = d / x
    value = part.rounded()
    near = value < 2.0**_FAR
    log = torch.where(near, torch.log1p(torch.where(near, value, 0.0)), part.log())
    return lgamma_change(x + d, x, d) + scaled(log)


def trigamma_fall(x: Scaled, d: Scaled) -> Scaled:
    """Trigamma of x less that of x + d, for d >= 0; differentiable."""
    largest = torch.finfo(x.mantissa.dtype).max
    rest = plain_fall(*(v.rounded().clamp(max=largest) for v in (x, d)))
    one, end = scaled(torch.ones_like(rest)), x + d
    return scaled(rest) + d / end * (one / x + one / end) / x


def trigamma(x: Scaled) -> Scaled:
    """The derivative of digamma; differentiable."""
    value = x.rounded().clamp(max=torch.finfo(x.mantissa.dtype).max)
    return (scaled(lgamma_bend(value)) / x + scaled(torch.ones_like(value))) / x
