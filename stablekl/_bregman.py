r"""Bregman divergences of lgamma and of its kin, by sums without cancellation: what Gamma and Dirichlet families need.

For a convex F, :math:`B_F(y, x) = F(y) - F(x) - F'(x)(y - x)`. With :math:`L(v) = v - \log(1 + v)` and d = y - x the
module evaluates B of

.. math:: g(a) = \log \Gamma(a) - a \log a + a
               = (a + 1) \log \frac{a + 1}{a} - 1 + g(a + 1)
               = -\tfrac12 \log a + \text{const} + \sum_k c_k a^{1-2k}.

The divergence of a step of the recurrence is :math:`(y + 1) L(v)`, :math:`v = d/(x (y + 1))`; that of the logarithm
:math:`\tfrac12 L(d/x)`; that of a power :math:`d^2 x^{-2} y^{-1} h_{2k-2}(1/x, 1/x, 1/y)` with the complete homogeneous
symmetric polynomial h. N = 10 steps, and seven terms of Stirling's series from there on, leave 8e-18. Everything is
positive but the c_k, whose first outweighs the others; d is the caller's, since differences of shifted arguments have
lost their digits. torch's ``lgamma(y) - lgamma(x) - digamma(x) (y - x)`` keeps none from d/x = 1e-8 on.

**Accuracy** (float64): within 4.1 eps, relative, in 6,000 pairs from 1e-12 to 1e12, neighbouring floats to far apart.

References: 5.5.1 and 5.11.1 of the NIST Digital Library of Mathematical Functions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _fused
from ._autograd import rowwise
from ._elementwise import product_error, sum_error
from ._opaque import opaque
from .special import log1pmx, log1pmx_value

__all__ = [
    "STEPS",
    "STIRLING",
    "lgamma_bend",
    "lgamma_bregman",
    "lgamma_bregman_value",
    "lgamma_change",
    "lgamma_curvature",
    "log_quotient",
    "power_series",
    "product_difference",
    "remainder_of_log",
    "shape_bregman",
    "stirling_series",
    "trigamma_fall",
]

# B_2k/(2k (2k - 1)), k = 1 ... 7: with them and as many steps, what is left out is 8e-18 of the divergence.
STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156)
STEPS = 10
# Below it L(v) is taken from 1 + v, which is known as a product, with digits that v has lost.
_LOW = -0.6
_TINY, _LIFT = 1e-290, 2.0**64


def log_quotient(a: Tensor, b: Tensor) -> Tensor:
    """log(a/b) of positive numbers to an absolute error of an ulp of max(1, its size), even where a/b is no float."""
    q, info = a / b, torch.finfo(a.dtype)
    return torch.where((q >= info.tiny) & (q <= info.max), torch.log(q), torch.log(a) - torch.log(b))


@_fused.fused
def remainder_of_log(v: Tensor, q: Tensor) -> Tensor:
    """L(v) = v - log(1 + v) from v to its relative accuracy and from q = 1 + v likewise; +inf at v = -1 or inf.

    Below -0.6 both terms come from q, whose error then cancels in part.
    """
    high = v > _LOW
    by_v = torch.where(high, v, 0.0)
    # 1 + v by its own logarithm where v is large: q may have over- or underflowed on the way
    above = torch.where(v < 1, -log1pmx_value(by_v), torch.where(v.isinf(), v, by_v - torch.log1p(by_v)))
    return torch.where(high, above, (q - 1) - torch.log(q))


def product_difference(a: Tensor, b: Tensor, c: Tensor, e: Tensor) -> Tensor:
    """``a b - c e`` to its relative accuracy, if the products are within the range of floats; without derivatives."""
    a, b, c, e = (x.detach() for x in (a, b, c, e))
    p, q = a * b, c * e
    difference = p - q
    rest = sum_error(p, -q, difference) + (product_error(a, b, p) - product_error(c, e, q))
    return difference + torch.where(rest.isfinite(), rest, 0.0)


def _rows(*tensors: Tensor, first: int = 1) -> tuple[Tensor, ...]:
    """The numbers of the steps, and the tensors with a dimension for them."""
    steps = torch.arange(first, STEPS, dtype=tensors[0].dtype, device=tensors[0].device)
    return (steps, *(x.unsqueeze(-1) for x in tensors))


def stirling_series(u: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Sum of c_k h_(2k-2)(u, v, w), by the recurrence of the polynomials of one, two and three variables."""
    one = two = three = torch.ones_like(u)
    total = STIRLING[0] * three
    for degree in range(1, 2 * len(STIRLING) - 1):
        one = one * u
        two = one + v * two
        three = two + w * three
        if degree % 2 == 0:
            total = total + STIRLING[degree // 2] * three
    return total


def power_series(*variables: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of (2k - 1) c_k h_(2k-2) and of (2k - 1) c_k h_(2k-1)."""
    sums = [torch.ones_like(v) for v in variables]
    even = odd = torch.zeros_like(sums[0])
    for degree in range(2 * len(STIRLING)):
        if degree:
            below = torch.zeros_like(even)
            for i, v in enumerate(variables):
                below = sums[i] = below + v * sums[i]
        term = (degree // 2 * 2 + 1) * STIRLING[degree // 2] * sums[-1]
        even, odd = (even, odd + term) if degree % 2 else (even + term, odd)
    return even, odd


def _first_step(y: Tensor, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """The v = d/(x (y + 1)) of the first step as rounded, and what L(v) lacks for that.

    L changes by up to 2.6 times as many ulps as v, which takes four roundings; small x and y have no other term.
    """
    f = y + 1
    v = d / f / x  # d/x may overflow
    g = v * f
    h = x * g
    lost = (d - h) - product_error(x, g, h) - x * product_error(v, f, g)
    # a sum's difference is known to more digits than the sums
    lost = lost + torch.where(d == y - x, sum_error(y, -x, d), 0.0) - x * (v * sum_error(y, torch.ones_like(y), f))
    rest = lost / x / f * (v / (1 + v))
    return v, torch.where(rest.isfinite() & (v > _LOW), rest, 0.0)


def lgamma_bregman_value(y: Tensor, x: Tensor, d: Tensor) -> Tensor:
    """B_g(y, x) of positive numbers with d = y - x; plain operations, without derivatives of use.

    On a CPU a kernel in C does the same (see `_fused`).
    """
    return _lgamma_bregman(y, x, d)[0]


@opaque(1)
def _lgamma_bregman(y: Tensor, x: Tensor, d: Tensor) -> tuple[Tensor]:
    by_kernel = _fused.lgamma_function("lgamma_bregman", (y, x, d))
    if by_kernel is not None:
        return (by_kernel,)
    far_x, far_y = x + STEPS, y + STEPS
    u, w = 1 / far_x, 1 / far_y
    # by quotients of sums, of which neither a square nor a reciprocal leaves the range of floats
    v = d / far_x
    total = v * (d * w) * u * stirling_series(u, u, w) + 0.5 * remainder_of_log(v, far_y / far_x)

    steps, rows_x, rows_y, rows_d = _rows(x, y, d)
    v = rows_d / (rows_x + steps) / (rows_y + steps + 1)  # -1/2 at least
    total = total + ((rows_y + steps + 1) * remainder_of_log(v, 1 + v)).sum(-1)

    v, rest = _first_step(y, x, d)
    # 1 + v = y (x + 1)/(x (y + 1)), where it is below 1 by quotients of which none overflows, nor underflows alone
    # (a multiple of a tiny y: only the logarithm is left of the ratio, and subnormal numbers round)
    tiny = y < _TINY
    z = torch.where(tiny, y * _LIFT, y)
    ratio = torch.where(x > 1, (z / (y + 1)) * ((x + 1) / x), (z / x) * ((x + 1) / (y + 1)))
    remainder = remainder_of_log(v, ratio)
    lifted = torch.where(tiny & (v <= _LOW), remainder + math.log(_LIFT), remainder)
    return (total + (y + 1) * (lifted + rest),)


def lgamma_change(x: Tensor, y: Tensor, d: Tensor, first: int = 0) -> Tensor:
    """g'(x) - g'(y), with d = x - y, of the sign of d; differentiable. With ``first`` 1 without the first step."""
    by_kernel = _fused.lgamma_function("lgamma_change_next" if first else "lgamma_change", (x, y, d))
    if by_kernel is not None:
        return by_kernel
    falls = d > 0
    u, v, e = torch.where(falls, x, y), torch.where(falls, y, x), torch.where(falls, d, -d)
    one, two = 1 / (u + STEPS), 1 / (v + STEPS)
    series = (e * one) * two * (0.5 + power_series(one, two)[1])
    steps, u, v, e = _rows(u, v, e, first=first)
    u, v = u + steps, v + steps
    # g'(a) - g'(a + 1) = -L(1/a), a difference of which is again one of L and a positive rest
    w = e / (u + 1) / v
    change = series + (w / u - log1pmx(w)).sum(-1)
    return torch.where(falls, change, -change)


def lgamma_bend(x: Tensor) -> Tensor:
    """X^2 g''(x), between 1/2 and 1 whatever x; differentiable."""
    by_kernel = _fused.lgamma_function("lgamma_bend", (x,))
    if by_kernel is not None:
        return by_kernel
    one, share = 1 / (x + STEPS), x / (x + STEPS)
    steps, rows = _rows(x, first=0)
    u = rows + steps
    part = rows / u
    return share * share * (0.5 + power_series(one, one)[1]) + (part * part / (u + 1)).sum(-1)


def trigamma_fall(x: Tensor, d: Tensor) -> Tensor:
    """The fall of trigamma from x + 1 to x + 1 + d for d >= 0, by positive terms; differentiable."""
    by_kernel = _fused.lgamma_function("trigamma_fall", (x, d))
    if by_kernel is not None:
        return by_kernel
    u, w = 1 / (x + STEPS), 1 / (x + d + STEPS)
    series = 1 + 0.5 * (u + w)
    power = total = torch.ones_like(u)
    for k, c in enumerate(STIRLING, 1):
        for _ in range(2):  # h_2k(u, w)
            power = power * u
            total = power + w * total
        series = series + (2 * k - 1) * 2 * k * c * total
    steps, rows, rows_d = _rows(x, d)
    a = rows + steps
    b = a + rows_d
    return (d * w) * u * series + (rows_d / b * (1 / a + 1 / b) / a).sum(-1)


def lgamma_curvature(x: Tensor) -> Tensor:
    """g''(x) = trigamma(x) - 1/x, positive, differentiable."""
    return lgamma_bend(x) / x / x


def _shape_gradient(inputs: tuple[Tensor, ...], saved: object) -> tuple[Tensor, ...]:
    y, x, d = inputs
    d = d.detach() + ((y - x) - (y - x).detach())
    return lgamma_change(y, x, d), -lgamma_bend(x) * (d / x) / x, torch.zeros_like(d)


shape_bregman = rowwise(lambda y, x, d: (lgamma_bregman_value(y, x, d),), _shape_gradient)
"""B_g(y, x) with d = y - x, differentiable: three positive tensors of one shape."""


def _lgamma_value(y: Tensor, x: Tensor, d: Tensor) -> tuple[Tensor]:
    # lgamma is g plus a log a - a, whose divergence is y L(x/y - 1)
    return (y * remainder_of_log(-d / y, x / y) + lgamma_bregman_value(y, x, d),)


def _lgamma_gradient(inputs: tuple[Tensor, ...], saved: object) -> tuple[Tensor, ...]:
    y, x, d = inputs
    d = d.detach() + ((y - x) - (y - x).detach())
    near = d.abs() < 0.5 * x
    log = torch.where(near, torch.log1p(torch.where(near, d / x, 0.0)), log_quotient(y, x))
    by_x = -(lgamma_bend(x) + x) * (d / x) / x
    return lgamma_change(y, x, d) + log, by_x, torch.zeros_like(d)


lgamma_bregman = rowwise(_lgamma_value, _lgamma_gradient)
"""The divergence of lgamma itself, at y from x with d = y - x: three positive tensors of one shape, differentiable."""
