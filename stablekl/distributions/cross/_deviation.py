r"""Mean absolute deviations of Gamma and Beta variables from any point, to a few ulps, with their derivatives.

:math:`E|X - \mu| = |m - \mu| + 2 T`, m the mean and T the expectation of what X has beyond mu, on the side of mu that
is away from m: no term is negative. In closed form T is a difference of incomplete gamma or beta functions, which
cancels; torch has the first without a derivative by the shape, and the second not at all. Here it is an integral from
mu on, in units of the density there. For a Gamma variable of rate 1 with z for mu, :math:`D = z^a e^{-z}/\Gamma(a)`,

.. math::
    T &= z D \int_0^\infty (1 - e^{-t})\, e^{-(a - z) t - z E(-t)}\, dt,
        \qquad E(x) = e^x - 1 - x, \quad z \le a, \quad x = z e^{-t}, \\
    T &= z D \int_0^\infty \frac{w}{1 + w}\, e^{-(z - a) w - a L(w)}\, dw,
        \qquad L(w) = w - \log(1 + w), \quad z > a, \quad x = z (1 + w);

for a Beta variable with :math:`\mu \le 1/2` (else it is 1 - X), :math:`\kappa = 1 - \mu`, n = a + b and
:math:`D = \mu^a \kappa^b/B(a, b)`, by t and w of the odds :math:`x/(1 - x)`,

.. math::
    T &= \mu \kappa D \int_0^\infty \frac{1 - e^{-t}}{c}\, e^{-(a - n \mu) t - n [\log c + \mu t]}\, dt,
        \qquad c = \kappa + \mu e^{-t}, \\
    T &= \mu \kappa D \int_0^\infty \frac{w}{(1 + w)(1 + \mu w)}\,
         e^{-(n \mu - a) \log(1 + w) - n [\log(1 + \mu w) - \mu \log(1 + w)]}\, dw.

Exponents fall from 0 on, as sums of terms of one sign. The integrands are analytic around the half-line, whatever the
parameters: the trapezoidal rule in log t (or w) converges exponentially. The second of the last two has a tail of power
b, and is left to :math:`n \mu > 12`, where b is large; for smaller ones the first serves on both sides of the mean: T
is then the larger tail, and :math:`2 T - |m - \mu|` at least T.

D is by deviances, as densities are (see `_deviance`), from the difference of mu and m in twice the digits. The same
sums without the factor of x - mu are distribution functions, the derivative by mu, and with :math:`\log x` the
derivatives by shapes. All of it is differentiable, with the points held fixed.

Accuracy, float64: 4 ulp (Gamma) and 16 ulp (Beta, where the larger tail is taken) in 500 sets of parameters or more.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..._bregman import lgamma_curvature
from ..._deviance import binomial_deviance, deviance, gamma_scale
from ..._double import exact_sum, multiply, rounded, subtract
from ..._elementwise import elementwise
from ...special import expm1mx, log1pmx
from .._scalar import attached
from ._pieces import remainders

__all__ = ["Deviation", "beta_deviation", "gamma_deviation"]

# The integrand is below e^-50 beyond the first point, and below the last, e^-54 of it, a like part of the integral.
POINTS, STEP = 480, 0.1125
_NOTHING = 50.0
# Up to this n mu the lower tail of a Beta serves on both sides of the mean.
_SPARSE = 12.0


class Deviation(NamedTuple):
    """A mean absolute deviation and its derivatives, in units of the caller.

    Attributes:
        value: E|X - mu|.
        by_point: its derivative by mu, P(X < mu) - P(X > mu).
        by_shapes: by the first and the second concentration; the latter is empty for a Gamma.
    """

    value: Tensor
    by_point: Tensor
    by_shapes: tuple[Tensor, ...]


def _points(d: Tensor, slope: Tensor, c: float) -> tuple[Tensor, Tensor]:
    """The t at which d t + v t^2/(c + t) is large, and the points below it over it; ``slope`` is d + v, positive."""
    with torch.no_grad():
        d, slope = d.detach(), slope.detach()
        linear = c * d - _NOTHING
        root = torch.hypot(linear, 2 * torch.sqrt(slope * (c * _NOTHING)))
        top = torch.where(linear < 0, (root - linear) / (2 * slope), 2 * c * _NOTHING / (root + linear.clamp(min=0.0)))
        falls = torch.exp(-STEP * torch.arange(POINTS, dtype=d.dtype, device=d.device))
    return top, falls


def _sums(weight: Tensor, exponent: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
    """Sums of weight times e^-exponent times each of the factors."""
    density = weight * torch.exp(-exponent)
    return tuple((density * f).sum(-1) for f in factors)


def _columns(*x: Tensor) -> tuple[Tensor, ...]:
    return tuple(v.unsqueeze(-1) for v in x)


def _gamma_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """`_deviance.gamma_scale`, but by Stirling's remainder from 1 on: an error by lgamma would be 20 times it in KL."""
    far = x >= 1
    scale, rest = gamma_scale(torch.where(far, 0.5, x))
    large = torch.where(far, x, 1.0)
    return torch.where(far, torch.sqrt(large / (2 * math.pi)), scale), torch.where(far, _remainder(large), rest)


# `remainders` has no derivatives under torch.func: forward over reverse would take none of them into account.
_log_less_digamma = elementwise(lambda x, *, lifted=False: 0.5 / x + remainders(x)[1], lambda x: -lgamma_curvature(x))
_remainder = elementwise(lambda x, *, lifted=False: remainders(x)[0], lambda x: 0.5 / x - _log_less_digamma(x))


def _log_ratio(x: Tensor, d: Tensor, y: Tensor) -> Tensor:
    """log(y/x), d = y - x."""
    near = d.abs() < 0.5 * x
    far = torch.where(near, x, y)
    return torch.where(near, torch.log1p(torch.where(near, d, 0.0) / x), torch.log(far) - torch.log(x))


# ---- Gamma ------------------------------------------------------------------------------------------------------


def _gamma_below(a: Tensor, z: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    """Integrals of T, of the mass and of T's derivative by a, over zD, D and zD; for d = z - a <= 0."""
    a, z, d = _columns(a, z, d)
    top, falls = _points(-d, a, 2.0)
    t = top * falls
    u = -torch.expm1(-t)
    return _sums(STEP * t, z * expm1mx(-t) - d * t, u, torch.ones_like(u), -t * u)


def _gamma_above(a: Tensor, z: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    a, z, d = _columns(a, z, d)
    top, falls = _points(d, d + 0.5 * a, 1.0)
    w = top * falls
    part = w / (1 + w)
    return _sums(STEP * w, d * w - a * log1pmx(w), part, 1 / (1 + w), torch.log1p(w) * part)


def gamma_deviation(a: Tensor, z: Tensor, d: Tensor) -> Deviation:
    """Of a Gamma of concentration a and rate 1 from z, any number, with d = z - a to its relative accuracy."""
    inside = z > 0
    low = d <= 0
    shape, point, shift = (torch.where(inside, x, y) for x, y in ((a, 1.0), (z, 1.0), (d, 0.0)))
    one = torch.ones_like(a)
    below = _gamma_below(*(torch.where(low, x, y) for x, y in ((shape, one), (point, one), (shift, 0 * one))))
    above = _gamma_above(*(torch.where(low, y, x) for x, y in ((shape, one), (point, 2 * one), (shift, one))))
    tail, mass, by_shape = (torch.where(low, x, y) for x, y in zip(below, above, strict=True))
    scale, rest = _gamma_scale(shape)
    density = scale * torch.exp(-(rest + deviance(shape, shift, point, torch.log(point))))
    tail, mass, by_shape = point * density * tail, density * mass, point * density * by_shape
    by_shape = tail * (_log_ratio(shape, shift, point) + _log_less_digamma(shape)) + by_shape
    sign = torch.where(low, -1.0, 1.0)
    return Deviation(
        sign * d + torch.where(inside, 2 * tail, 0.0),
        torch.where(inside, sign * (1 - 2 * mass), -1.0),
        (torch.where(inside, 2 * by_shape, 0.0) - sign,),
    )


# ---- Beta -------------------------------------------------------------------------------------------------------


def _beta_below(a: Tensor, b: Tensor, mu: Tensor, kappa: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    """Integrals of T, of the mass and of T's derivatives by a and b; d = a - n mu."""
    a, b, mu, kappa, d = _columns(a, b, mu, kappa, d)
    n = a + b
    top, falls = _points(d, a, 4.0)
    t = top * falls
    u = -torch.expm1(-t)
    v = mu * u
    log = torch.log1p(-v)
    # beyond the mean the logarithm as it stands, which is at most n mu or so: of a t and n mu t little may be left
    exponent = torch.where(d < 0, a * t + n * log, d * t + n * (mu * expm1mx(-t) + log1pmx(-v)))
    part = u / (1 - v)
    return _sums(STEP * t, exponent, part, torch.ones_like(u), -(t + log) * part, -log * part)


def _beta_above(a: Tensor, b: Tensor, mu: Tensor, kappa: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    a, b, mu, kappa, d = _columns(a, b, mu, kappa, d)
    n = a + b
    top, falls = _points(-d, n * mu * kappa - d, 2.0)
    w = torch.expm1(top) * falls
    log, slow = torch.log1p(w), torch.log1p(mu * w)
    exponent = n * (log1pmx(mu * w) - mu * log1pmx(w)) - d * log
    part = w / (1 + w) / (1 + mu * w)
    return _sums(STEP * w, exponent, part, 1 / (1 + w), (log - slow) * part, -slow * part)


def _beta_difference(a: Tensor, b: Tensor, mu: Tensor) -> Tensor:
    """The difference a - (a + b) mu, differentiable."""
    with torch.no_grad():
        exact = rounded(subtract(a.detach(), multiply(exact_sum(a.detach(), b.detach()), mu.detach())))
    return attached(exact, a - (a + b) * mu)


def beta_deviation(a: Tensor, b: Tensor, mu: Tensor) -> Deviation:
    """Of a Beta from mu, any number, times a + b; the derivatives are of the deviation itself."""
    mirrored = mu > 0.5
    inside = (mu > 0) & (mu < 1)
    first, second = torch.where(mirrored, b, a), torch.where(mirrored, a, b)
    point = torch.where(mirrored, 1 - mu, mu)
    d = _beta_difference(a, b, mu)
    d = torch.where(mirrored, -d, d)
    n = a + b
    x, y, shift = (torch.where(inside, v, w) for v, w in ((first, 1.0), (second, 1.0), (d, 0.0)))
    at = torch.where(inside, point, 0.5)
    rest = torch.where(inside & mirrored, mu, 1 - at)
    n_inside = x + y
    low = (shift >= 0) | (n_inside * at <= _SPARSE)
    one = torch.ones_like(a)
    inputs = (x, y, at, rest, shift)
    below = _beta_below(
        *(torch.where(low, v, w) for v, w in zip(inputs, (one, one, one / 2, one / 2, 0 * one), strict=True))
    )
    above = _beta_above(
        *(
            torch.where(low, w, v)
            for v, w in zip(inputs, (20 * one, 40 * one, one / 2, one / 2, -10 * one), strict=True)
        )
    )
    tail, mass, by_first, by_second = (torch.where(low, v, w) for v, w in zip(below, above, strict=True))
    (of_x, rest_x), (of_y, rest_y), (of_n, rest_n) = _gamma_scale(x), _gamma_scale(y), _gamma_scale(n_inside)
    size = torch.minimum(of_x, of_y) * (torch.maximum(of_x, of_y) / of_n)
    gap = binomial_deviance(x, y, at, rest, torch.log(at), torch.log(rest))
    density = size * torch.exp(-((rest_x + rest_y - rest_n) + gap))
    unit = at * rest * density
    tail, mass = unit * tail, density * mass
    gap_n = _log_less_digamma(n_inside)
    by_first = tail * (_log_ratio(x, -shift, n_inside * at) + (_log_less_digamma(x) - gap_n)) + unit * by_first
    by_second = tail * (_log_ratio(y, shift, n_inside * rest) + (_log_less_digamma(y) - gap_n)) + unit * by_second
    # m - mu = d/n for the lower tail
    sign = torch.where(torch.where(inside, low, d >= 0), 1.0, -1.0)
    by_first = torch.where(inside, 2 * by_first, 0.0) + sign * (second / n / n)
    by_second = torch.where(inside, 2 * by_second, 0.0) - sign * (first / n / n)
    by_point = -sign * (1 - 2 * torch.where(inside, mass, 0.0))
    return Deviation(
        sign * d + torch.where(inside, 2 * n * tail, 0.0),
        torch.where(mirrored, -by_point, by_point),
        (torch.where(mirrored, by_second, by_first), torch.where(mirrored, by_first, by_second)),
    )
