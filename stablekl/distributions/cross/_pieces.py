r"""The non-negative pieces that KL divergences between families are sums of, in float64.

All are elementwise functions. Those that say so can be differentiated; the others are for values alone. With
:math:`L(z) = z - \log(1 + z)`,

* ``excess(x, y)``: :math:`x/y - 1 - \log(x/y)`, and ``deviance(x, y)``: :math:`x \log(x/y) + y - x`, of Doubles: of a
  product and a quotient the difference is known to all its digits, of their roundings it is not;
* ``remainders(x)``: what Stirling's formulas leave of lgamma and digamma, R and S of `_double_gamma.stirling`;
* ``gamma_shape(x)``: :math:`T = 1/(2x) - R - (x - 1) S`, the KL of a Gamma of concentration x against the normal
  distribution of its mean and variance;
* ``lgamma_bregman(y, x, d)``: :math:`g(y) - g(x) - g'(x) d` with :math:`g(x) = \log\Gamma(x) - x \log x + x` and
  d = y - x, the KL of a Gamma of concentration x against one of concentration y and the same mean;
* ``log_mean_gap(low, width)``: :math:`\log E[X] - E[\log X]` of a uniform distribution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _fused
from ..._bregman import shape_bregman
from ..._double import LOG_2, Double, rounded, select, subtract
from ..._elementwise import horner
from ..._opaque import opaque
from ..._scaled import has_none, power_of_two, shifted
from ..._wide import Wide, alike, narrow, wide
from ...special import _ATANH, log1pmx, log1pmx_value, log_ratio_bregman

__all__ = [
    "beta_unit",
    "deviance",
    "excess",
    "gamma_entropy",
    "gamma_shape",
    "lgamma_bregman",
    "log_mean_gap",
    "minus_log1pmx",
    "product_excess",
    "remainders",
]

# Between these, log1p(z) - z comes from a polynomial that does not cancel.
_NEAR_LOW, _NEAR_HIGH = -0.6, 1.0


Operand = Double | Tensor | Wide


def minus_log1pmx(z: Tensor) -> Tensor:
    """L(z) = z - log(1 + z); differentiable."""
    return -log1pmx(z)


_LARGEST = 1e308
_APART = 200.0  # beyond 2^200 or below 2^-200 one term of a divergence is all


def _excess_of(a: Double, b: Double) -> tuple[Tensor, Tensor]:
    """A/b - 1 - log(a/b), and a/b, which is a float."""
    z, quotient = rounded(subtract(a, b)) / b.hi, a.hi / b.hi
    near = (z > _NEAR_LOW) & (z < _NEAR_HIGH)
    return torch.where(near, -log1pmx_value(torch.where(near, z, 0.0)), z - torch.log(quotient)), quotient


def _excess(x: Wide, y: Wide) -> tuple[Tensor, Tensor, Tensor]:
    """X/y - 1 - log(x/y) unless x is much larger than y, whether it is, and x/y without its exponent."""
    k = x.exponent - y.exponent
    up, down = k > _APART, k < -_APART
    by = power_of_two(torch.where(up | down, 0.0, k))
    inner, quotient = _excess_of(Double(x.number.hi * by, x.number.lo * by), y.number)
    return torch.where(down, -1 - (torch.log(quotient) + k * LOG_2.hi), inner), up, quotient


def excess(x: Operand, y: Operand) -> Tensor:
    """x/y - 1 - log(x/y) of positive numbers, whose quotient need not be a float."""
    x, y = alike(wide(x), wide(y))
    if has_none(x.exponent):
        return _excess_of(x.number, y.number)[0]
    value, up, quotient = _excess(x, y)
    return torch.where(up, shifted(quotient, x.exponent - y.exponent), value)


def deviance(x: Operand, y: Operand) -> Tensor:
    """X log(x/y) + y - x, y where x is 0; neither need be a float."""
    x, y = alike(wide(x), wide(y))
    none = x.number.hi == 0
    safe = Wide(select(none, 1.0, x.number), x.exponent)
    if has_none(x.exponent):
        return torch.where(none, y.number.hi, x.number.hi * _excess_of(y.number, safe.number)[0])
    value, up, _ = _excess(y, safe)
    return torch.where(none | up, narrow(y).hi, shifted(x.number.hi * value, x.exponent))


def product_excess(x: Tensor, r: Tensor) -> Tensor:
    """X r - 1 - log(x r) of positive numbers, whose product may underflow; differentiable."""
    m = x * r
    usual = (m > _TINY) | ((x < 1 / _LARGEST) & (r < 1 / _LARGEST))
    larger, smaller = torch.maximum(x, r), torch.minimum(x, r)
    a = torch.where(usual, m, smaller)
    b = torch.where(usual, torch.ones_like(m), 1 / torch.where(usual, 1.0, larger))
    return log_ratio_bregman(a, b)


# ---- log Gamma --------------------------------------------------------------------------------------------------

# B_2k/(2k (2k - 1)) and B_2k/(2k), k = 8 ... 1: what is left out at 10 is 2e-18 of the sum
_STEPS = 10
_LGAMMA = (-3617 / 122400, 1 / 156, -691 / 360360, 1 / 1188, -1 / 1680, 1 / 1260, -1 / 360, 1 / 12)
_DIGAMMA = (-3617 / 8160, 1 / 12, -691 / 32760, 1 / 132, -1 / 240, 1 / 252, -1 / 120, 1 / 12)
_ATANH_REACH = 3 / 7
_LARGE, _TINY = 1e8, 1e-100


@opaque(2)
def remainders(x: Tensor) -> tuple[Tensor, ...]:
    """R and S, both to their relative accuracy.

    For x below 10 the steps R(x) - R(x + 1) = (x + 1/2) log(1 + 1/x) - 1 and those of S, all positive, are written in
    s = 1/(2x + 1), where log(1 + 1/x) = 2 atanh(s), and summed.
    """
    if x.dtype == torch.float64 and _fused.available((x,)):
        return _fused.remainders((x,))
    near = x < _STEPS
    z = torch.where(near, x + _STEPS, x)
    w = 1 / z / z
    far_r, far_s = horner(w, _LGAMMA) / z, horner(w, _DIGAMMA) * w
    steps = torch.arange(_STEPS, dtype=x.dtype, device=x.device)
    v = torch.where(near, x, 1.0).unsqueeze(-1) + steps
    s = 1 / (2 * v + 1)
    square = s * s
    small = s < _ATANH_REACH
    # (atanh(s) - s)/s^3
    rest = torch.where(
        small,
        horner(torch.where(small, square, 0.0), _ATANH[torch.float64]),
        (0.5 * torch.where(v < _TINY, -torch.log(v), torch.log1p(1 / v)) / s - 1) / square,
    )
    step_r = square * rest
    step_s = 2 * s * square * (1 / (4 * v * (v + 1) * square) - rest)
    return far_r + torch.where(near, step_r.sum(-1), 0.0), far_s + torch.where(near, step_s.sum(-1), 0.0)


def gamma_shape(x: Tensor) -> Tensor:
    """T, about 1/(3x) for large x and 1/x for small ones."""
    large = x > _LARGE
    y = torch.where(large, 1.0, x)
    r, s = remainders(y)
    # of large x the square would underflow
    return torch.where(large, (1 / 3 + 1 / 12 / x) / x, 0.5 / y - r - (y - 1) * s)


def lgamma_bregman(y: Tensor, x: Tensor, d: Tensor) -> Tensor:
    """The Bregman divergence of g (see `_bregman`); differentiable, by way of y and x. d is known to all its digits."""
    return shape_bregman(*torch.broadcast_tensors(y, x, d.detach()))


def gamma_entropy(x: Tensor) -> Tensor:
    """The entropy of a Gamma of rate 1; differentiable. torch's would take its trigamma, which is good to 5e-10."""
    return 1 + torch.log(x) - lgamma_bregman(torch.ones_like(x), x, 1 - x)


def beta_unit(a: Tensor, b: Tensor) -> Tensor:
    """The negative entropy of a Beta, its KL against Uniform(0, 1), which is Beta(1, 1); differentiable.

    Beta(a, b) has K = -log[1 - ((a - b)/n)^2] + B(1, a) + B(1, b) - B(2, n), n = a + b, B as in `lgamma_bregman`; the
    last is less than the two before it.
    """
    n = a + b
    t = (a - b) / n
    near = t.abs() < 0.7
    one = torch.ones_like(a)
    inner = torch.where(near, t, 0.0)
    x, y = torch.where(near, one, a), torch.where(near, one, b)
    means = torch.where(near, -torch.log1p(-inner * inner), -torch.log(4 * (x / (x + y)) * (y / (x + y))))
    own = lgamma_bregman(one, a, 1 - a) + lgamma_bregman(one, b, 1 - b)
    return means + (own - lgamma_bregman(2 * one, n, (1 - a) + (1 - b)))


# ---- uniform distributions --------------------------------------------------------------------------------------

# 1/(2j (2j + 1)), j = 40 ... 1: what is left out at 0.65 is 2e-19
_JENSEN = tuple(1 / (2 * j * (2 * j + 1)) for j in range(40, 0, -1))
_JENSEN_REACH = 0.65


def log_mean_gap(low: Tensor, width: Tensor) -> Tensor:
    """The logarithm of the mean less the mean of the logarithm, for 0 <= low and 0 < width; differentiable."""
    total = 2 * low + width
    eta, rest = width / total, 2 * (low / total)
    near = eta < _JENSEN_REACH
    w = torch.where(near, eta, 0.0)
    w = w * w
    series = w * horner(w, _JENSEN)
    eta = torch.where(near, 1.0, eta)
    some = (rest > 0) & ~near
    log_rest = torch.log(torch.where(some, rest, 1.0))
    return torch.where(near, series, 1 - ((1 + eta) * torch.log1p(eta) - rest * log_rest) / (2 * eta))
