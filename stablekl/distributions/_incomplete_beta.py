r"""Tails of Beta variables of any shapes to their relative accuracy.

With n = a + b, y = 1 - x, d = a y - b x and :math:`D = x^a y^b/B(a, b)`, by t of the odds :math:`e^{-t} x/y`,

.. math:: P(X \le x) = D \int_0^\infty e^{-d t - n \psi(t)} dt, \qquad
          \psi(t) = \log(y + x e^{-t}) + x t \ge 0,

where a, b >= 1 and d >= 0, or where a >= 1 alone; else the other tail, which is that of 1 - X. Neither is more than
0.8. Small a and x have a logarithm in that integral: where a < 1 and b x < 1/4, or x <= 1/2 if b < 1 too,

.. math:: \log P(X \le x) = a \log x - \log \frac{a + b}{b} + \log \frac{\Gamma(1 + a + b)}{\Gamma(1 + a) \Gamma(1 + b)}
          + \log\Bigl(1 + \sum_{k \ge 1} \frac{a}{a + k} \frac{(1 - b)_k x^k}{k!}\Bigr),

of which the first two outweigh the others, of the other sign: the complement is as accurate. D is by deviances, as the
density is. Derivatives by x are a reciprocal of the integral, and those by the shapes differentiate under it.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .._autograd import rowwise
from .._bregman import lgamma_change, product_difference
from .._deviance import binomial_deviance, digamma
from .._double import EULER
from .._elementwise import sum_error
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

__all__ = ["beta_tail"]

_SMALL, _TERMS = 0.25, 54  # below it the series, of which 2^-55 is left out where b < 1


def _psi(t: Tensor, u: Tensor, v: Tensor, f: Functions) -> tuple[Tensor, Tensor]:
    """Psi and log(v + u e^-t), of which neither cancels; by e^-t where u <= 1/2, else by e^t."""
    low = u <= 0.5
    at = torch.where(low, t, 0.0)
    fall = torch.where(low, u, 0.0) * torch.expm1(-at)
    by_fall, log_fall = u * f.expm1mx(-at) + f.log1pmx(fall), torch.log1p(fall)
    at = torch.where(low, 0.0, t)
    near = torch.where(at < 1, at, 0.0)
    rise = v * torch.expm1(at)
    log_rise = torch.log1p(rise)
    by_rise = torch.where(at < 1, v * f.expm1mx(near) + f.log1pmx(torch.where(at < 1, rise, 0.0)), log_rise - v * at)
    return torch.where(low, by_fall, by_rise), torch.where(low, log_fall, log_rise - at)


def _top(p: Tensor, q: Tensor, u: Tensor, v: Tensor, d: Tensor) -> Tensor:
    """Where phi = d t + n psi is `NOTHING`, from bounds of psi that are below it."""
    n = p + q
    z = n * v
    # u t^2/(4 + t), where u <= 1/2
    linear = 4 * d - NOTHING
    slope = d + n * u
    root = torch.hypot(linear, torch.sqrt(16 * NOTHING * slope))
    low = torch.where(linear < 0, (root - linear) / (2 * slope), 8 * NOTHING / (root + linear.clamp(min=0.0)))
    # u v t^2/2 until the odds are the reciprocal of what they were; log v + u t; and as of a Gamma
    root = torch.hypot(d, torch.sqrt(2 * NOTHING * z * u))
    square = torch.where(d < 0, (root - d) / (z * u), 2 * NOTHING / (root + d.clamp(min=0.0)))
    square = torch.where(square <= 2 * (torch.log(u) - torch.log(v)), square, torch.inf)
    far = (NOTHING - n * torch.log(v)) / p
    gamma = torch.where(n > 200, torch.log1p(NOTHING / z) + 1.3, torch.inf)
    high = torch.minimum(torch.minimum(square, far), gamma)

    def phi(t: Tensor) -> tuple[Tensor, Tensor]:
        psi, log = _psi(t, u, v, PLAIN)
        return d * t + n * psi, d + n * (u - u * torch.exp(-t - log))

    return steepest(phi, torch.where(u <= 0.5, low, high))


def _integrals(
    p: Tensor, q: Tensor, u: Tensor, v: Tensor, d: Tensor, f: Functions = PLAIN
) -> tuple[Tensor, Tensor, Tensor]:
    """Of e^-phi, and of minus its derivatives by p and by q."""
    with torch.no_grad():
        t, weights = points(_top(*(x.detach() for x in (p, q, u, v, d))))
    n, u, v, d = ((p + q).unsqueeze(-1), u.unsqueeze(-1), v.unsqueeze(-1), d.unsqueeze(-1))
    psi, log = _psi(t, u, v, f)
    density = weights * torch.exp(-(d * t + n * psi))
    by_p = torch.where(u <= 0.5, t + log, torch.log1p(v * torch.expm1(torch.where(u <= 0.5, 0.0, t))))
    return density.sum(-1), (by_p * density).sum(-1), (log * density).sum(-1)


def _series(p: Tensor, q: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sum over p, its derivative by p and that by q."""
    term, slope = torch.ones_like(u), torch.zeros_like(u)
    total, by_p, by_q = torch.zeros_like(u), torch.zeros_like(u), torch.zeros_like(u)
    for k in range(1, _TERMS + 1):
        by = (k - q) * u / k
        slope = slope * by - term * (u / k)
        term = term * by
        share = 1 / (p + k)
        total, by_p, by_q = total + term * share, by_p + term * (k * share * share), by_q + slope * share
    return total, by_p, by_q


def _place(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """Which tail, and whether by the series; then of that one the shapes, the point, its complement, and d."""
    y = 1 - x
    with torch.no_grad():
        # of the complement of an x below 1/2 something is lost
        lost = torch.where(x < 0.5, sum_error(torch.ones_like(x), -x, y), 0.0)
        exact = product_difference(a, y, b, x) + a * lost
    d = attached(exact, a * y - b * x)
    thin, slim = a < 1, b < 1
    from_low = thin & torch.where(slim, x <= 0.5, b * x <= _SMALL)
    from_high = slim & torch.where(thin, x > 0.5, a * y <= _SMALL)
    series = from_low | from_high
    upper = from_high | (~series & torch.where(thin, True, ~slim & (d < 0)))
    p, q = torch.where(upper, b, a), torch.where(upper, a, b)
    u, v = torch.where(upper, y, x), torch.where(upper, x, y)
    return upper, series, p, q, u, v, torch.where(upper, -d, d)


def _inner(series: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Shapes, point, complement and d where there is an integral, else of some that has one."""
    return tuple(torch.where(series, safe, x) for safe, x in zip((2.0, 2.0, 0.5, 0.5, 0.0), inputs, strict=True))


def _outer(series: Tensor, p: Tensor, q: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.where(series, p, 0.5), torch.where(series, q, 0.5), torch.where(series, u, 0.125)


def _value(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor]:
    _, series, *inputs = _place(x, a, b)
    p, q, u, v, d = _inner(series, *inputs)
    integral = _integrals(p, q, u, v, d)[0]
    (of_p, rest_p), (of_q, rest_q), (of_n, rest_n) = lgamma_rest(p), lgamma_rest(q), lgamma_rest(p + q)
    size = torch.minimum(of_p, of_q) * (torch.maximum(of_p, of_q) / of_n)
    # unmirrored: what the complement of x has lost is known of the second alone
    whole = zip((2.0, 2.0, 0.5, 0.5), (a, b, x, 1 - x), strict=True)
    first, second, low, high = (torch.where(series, safe, w) for safe, w in whole)
    gap = binomial_deviance(first, second, low, high, torch.log(low), torch.log1p(-low))
    far = torch.log(size * integral) - ((rest_p + rest_q - rest_n) + gap)
    p, q, u = _outer(series, *inputs[:3])
    one = torch.ones_like(p)
    gap = p * (torch.digamma(1 + q) + EULER.hi)
    gap = gap + lgamma_from_one(1 + q + p, 1 + q, p) - lgamma_from_one(1 + p, one, p)
    near = p * torch.log(u) - torch.log1p(p / q) + (gap + torch.log1p(p * _series(p, q, u)[0]))
    return (torch.where(series, near, far),)


def _slopes(f: Functions, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    upper, series, *inputs = _place(x, a, b)
    p, q, u, v, d = _inner(series, *inputs)
    n = p + q
    integral, by_p, by_q = _integrals(p, q, u, v, d, f)
    gap = log_less_digamma(n)
    far_p = log_ratio(p, -d, n * u) + (log_less_digamma(p) - gap) - by_p / integral
    far_q = log_ratio(q, d, n * v) + (log_less_digamma(q) - gap) - by_q / integral
    far_u = 1 / integral / u / v
    p, q, u = _outer(series, *inputs[:3])
    total, by_p, by_q = _series(p, q, u)
    rest = 1 + p * total
    near_p = torch.log(u) - 1 / (p + q) + (digamma(1 + p + q) - digamma(1 + p)) + by_p / rest
    rise = lgamma_change(1 + q + p, 1 + q, p) + torch.log1p(p / (1 + q))
    near_q = p / q / (p + q) + rise + p * by_q / rest
    near_u = p * torch.exp((q - 1) * torch.log1p(-u)) / rest / u
    of_u, of_p, of_q = (
        torch.where(series, near, far) for near, far in ((near_u, far_u), (near_p, far_p), (near_q, far_q))
    )
    return torch.where(upper, -of_u, of_u), torch.where(upper, of_q, of_p), torch.where(upper, of_p, of_q)


@opaque(1)
def _log(*inputs: Tensor) -> tuple[Tensor, ...]:
    return in_blocks(_value, *inputs)


@opaque(3)
def _plain_slopes(*inputs: Tensor) -> tuple[Tensor, ...]:
    return in_blocks(partial(_slopes, PLAIN), *inputs)


def _gradient(inputs: tuple[Tensor, ...], saved: object) -> tuple[Tensor, ...]:
    return _slopes(DIFFERENTIABLE, *inputs) if saved is None else _plain_slopes(*inputs)


_log_tail = rowwise(_log, _gradient)


def beta_tail(x: Tensor, a: Tensor, b: Tensor) -> Tail:
    """Of float64 tensors of one shape: a Beta of concentrations a and b, at x."""
    inside = (x > 0) & (x < 1)
    safe = torch.where(inside, x, 0.5)
    with torch.no_grad():
        upper = _place(safe, a, b)[0]
    log = torch.where(inside, _log_tail(safe, a, b), torch.where(x.isnan(), torch.nan, -torch.inf))
    return Tail(log, torch.where(inside, ~upper, x <= 0))
