r"""Tails of Gamma variables of any shape to their relative accuracy.

With z = b x, d = z - a, :math:`E(s) = e^s - 1 - s` and :math:`D = z^a e^{-z}/\Gamma(a)`, by :math:`y = z e^{\mp t}`

.. math:: P(X \le x) = D \int_0^\infty e^{-|d| t - z E(-t)} dt, \quad d \le 0, \qquad
          P(X > x) = D \int_0^\infty e^{-d t - z E(t)} dt,

the one at most 0.63, and the other, where a >= 1, at most 1/2. The second serves for all z > 1/4 where a < 1; and for
smaller ones, where that integral is a logarithm's, the first terms of :math:`S = 1 - M(a, a + 1, -z)` do,

.. math:: \log P(X \le x) = a \log z - \log \Gamma(1 + a) + \log(1 - S), \qquad
          S = \sum_{k \ge 1} \frac{a}{a + k} \frac{(-1)^{k + 1} z^k}{k!},

a sum of terms below 0 but one, so that its complement, about :math:`a \log 1/z`, is as accurate as P is. D is by a
deviance, as the density is. Derivatives by x are 1/x over the integral; those by a differentiate under it, and are sums
of terms of one sign, but for 1/(2a) or so. torch's gammainc has no derivative by a, and loses 6e6 ulp at a = 44.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .._autograd import rowwise
from .._bregman import product_difference
from .._deviance import deviance, digamma
from .._double import EULER
from .._opaque import opaque
from ._incomplete import (
    DIFFERENTIABLE,
    NOTHING,
    PLAIN,
    Functions,
    Tail,
    in_blocks,
    lgamma_from_one,
    lgamma_rest,
    log_less_digamma,
    log_ratio,
    points,
    steepest,
)
from ._scalar import attached

__all__ = ["gamma_tail", "inverse_gamma_tail"]

_SMALL, _TERMS = 0.25, 13  # below it the series, of which 0.25^14/14! is left out
_LARGEST = 1e300


def _phi(t: Tensor, slope: Tensor, z: Tensor, lower: Tensor, f: Functions) -> Tensor:
    return slope * t + z * f.expm1mx(torch.where(lower, -t, t))


def _top(slope: Tensor, z: Tensor, lower: Tensor) -> Tensor:
    """Where phi is `NOTHING`: from bounds by t^2/(2 + t) <= E(-t), and by t^2/2 and the exponential of E(t)."""
    linear = 2 * slope - NOTHING
    root = torch.hypot(linear, torch.sqrt(8 * NOTHING * (slope + z)))
    below = torch.where(linear < 0, (root - linear) / (2 * (slope + z)), 4 * NOTHING / (root + linear.clamp(min=0.0)))
    root = torch.hypot(slope, torch.sqrt(2 * NOTHING * z))
    above = torch.where(slope < 0, (root - slope) / z, 2 * NOTHING / (root + slope.clamp(min=0.0)))
    above = torch.minimum(above, torch.log1p(NOTHING / z) + 1.3)

    def phi(t: Tensor) -> tuple[Tensor, Tensor]:
        rise = torch.expm1(torch.where(lower, -t, t))
        return _phi(t, slope, z, lower, PLAIN), slope + z * torch.where(lower, -rise, rise)

    return steepest(phi, torch.where(lower, below, above))


def _integrals(slope: Tensor, z: Tensor, lower: Tensor, f: Functions = PLAIN) -> tuple[Tensor, Tensor]:
    """Of e^-phi, and of t e^-phi."""
    with torch.no_grad():
        t, weights = points(_top(slope.detach(), z.detach(), lower))
    density = weights * torch.exp(-_phi(t, slope.unsqueeze(-1), z.unsqueeze(-1), lower.unsqueeze(-1), f))
    return density.sum(-1), (t * density).sum(-1)


def _series(a: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """S over a, and its derivative by a."""
    term, total, slope = torch.ones_like(z), torch.zeros_like(z), torch.zeros_like(z)
    for k in range(1, _TERMS + 1):
        term = term * (z * (-1.0 if k > 1 else 1.0) / k)
        part = term / (a + k)
        total, slope = total + part, slope + part * (k / (a + k))
    return total, slope


def _place(x: Tensor, a: Tensor, b: Tensor, inverse: bool) -> tuple[Tensor, ...]:
    """Z, its logarithm, z - a to its relative accuracy, and whether z is small and whether it is below a."""
    one = torch.ones_like(x)
    if inverse:
        z = b / x
        d = product_difference(b, one, a, x) / x.detach()
    else:
        z = b * x
        d = product_difference(b, x, a, one)
    d = torch.where(d.isfinite(), d, z.detach().clamp(max=_LARGEST))
    # the product may leave the range of floats, where its logarithm does not
    tiny = torch.finfo(z.dtype).tiny
    plain = z > tiny
    by_logs = torch.log(b) - torch.log(x) if inverse else torch.log(b) + torch.log(x)
    log_z = torch.where(plain, torch.log(torch.where(plain, z, 1.0)), by_logs)
    z = torch.where(plain, z.clamp(max=_LARGEST), tiny)
    small = (a < 1) & (z < _SMALL)
    return z, log_z, attached(d, z - a), small, (a >= 1) & (d <= 0)


def _inner(a: Tensor, z: Tensor, d: Tensor, small: Tensor, lower: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A, z and the slope of phi where there is an integral, else of some that has one."""
    safe = torch.where(small, 1.0, torch.where(lower, -d, d))
    return torch.where(small, 1.0, a), torch.where(small, 2.0, z), safe


def _value(inverse: bool, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor]:
    z, log_z, d, small, lower = _place(x, a, b, inverse)
    shape, point, slope = _inner(a, z, d, small, lower)
    integral = _integrals(slope, point, lower)[0]
    scale, rest = lgamma_rest(shape)
    gap = deviance(shape, torch.where(small, 1.0, d), point, torch.where(small, 0.0, log_z))
    far = torch.log(scale * integral) - (rest + gap)
    part, near = torch.where(small, a, 0.5), torch.where(small, z, 0.1)
    one = torch.ones_like(a)
    series = torch.log1p(-part * _series(part, near)[0]) - lgamma_from_one(1 + part, one, part)
    return (torch.where(small, a * (log_z + EULER.hi) + series, far),)


def _slopes(inverse: bool, f: Functions, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    z, log_z, d, small, lower = _place(x, a, b, inverse)
    shape, point, slope = _inner(a, z, d, small, lower)
    integral, moment = _integrals(slope, point, lower, f)
    mean = moment / integral
    plain = point > torch.finfo(z.dtype).tiny
    change = torch.where(plain, log_ratio(shape, torch.where(small, 1.0, d), point), log_z - torch.log(shape))
    far = change + log_less_digamma(shape)
    far = far + torch.where(lower, -mean, mean)
    part, near = torch.where(small, a, 0.5), torch.where(small, z, 0.1)
    total, change = _series(part, near)
    rest = 1 - part * total
    by_shape = torch.where(small, log_z - digamma(1 + part) - change / rest, far)
    by_log = torch.where(small, part * torch.exp(-near) / rest, torch.where(lower, 1.0, -1.0) / integral)
    return (-by_log if inverse else by_log) / x, by_shape, by_log / b


@opaque(1)
def _gamma_log(*inputs: Tensor) -> tuple[Tensor, ...]:
    return in_blocks(partial(_value, False), *inputs)


@opaque(1)
def _inverse_log(*inputs: Tensor) -> tuple[Tensor, ...]:
    return in_blocks(partial(_value, True), *inputs)


@opaque(3)
def _gamma_slopes(*inputs: Tensor) -> tuple[Tensor, ...]:
    return in_blocks(partial(_slopes, False, PLAIN), *inputs)


@opaque(3)
def _inverse_slopes(*inputs: Tensor) -> tuple[Tensor, ...]:
    return in_blocks(partial(_slopes, True, PLAIN), *inputs)


def _gamma_gradient(inputs: tuple[Tensor, ...], saved: object) -> tuple[Tensor, ...]:
    return _slopes(False, DIFFERENTIABLE, *inputs) if saved is None else _gamma_slopes(*inputs)


def _inverse_gradient(inputs: tuple[Tensor, ...], saved: object) -> tuple[Tensor, ...]:
    return _slopes(True, DIFFERENTIABLE, *inputs) if saved is None else _inverse_slopes(*inputs)


_GAMMA, _INVERSE = rowwise(_gamma_log, _gamma_gradient), rowwise(_inverse_log, _inverse_gradient)


def _tail(x: Tensor, a: Tensor, b: Tensor, inverse: bool) -> Tail:
    inside = (x > 0) & x.isfinite()
    safe = torch.where(inside, x, 1.0)
    with torch.no_grad():
        small, lower = _place(safe, a, b, inverse)[3:]
    log = torch.where(
        inside, (_INVERSE if inverse else _GAMMA)(safe, a, b), torch.where(x.isnan(), torch.nan, -torch.inf)
    )
    return Tail(log, torch.where(inside, (small | lower) ^ inverse, x <= 0))


def gamma_tail(x: Tensor, a: Tensor, b: Tensor) -> Tail:
    """Of float64 tensors of one shape: a Gamma of concentration a and rate b, at x."""
    return _tail(x, a, b, inverse=False)


def inverse_gamma_tail(x: Tensor, a: Tensor, b: Tensor) -> Tail:
    """Of its reciprocal."""
    return _tail(x, a, b, inverse=True)
