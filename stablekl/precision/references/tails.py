"""Distribution functions of the families that stablekl gives tails for, from their definitions, and entropies."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .context import Number, mp
from .deviation import tail_moment
from .family import ONE, Family
from .room import room

__all__ = ["FUNCTIONS", "TAILS", "entropy_at", "function_at"]

_MOST = 10**6  # of an exponent: e to the minus that is 0 in every dtype
_SLOW = 50  # from here on the incomplete gamma and beta functions take long, or do not converge


class Tail(NamedTuple):
    """P(X <= x) and P(X > x), and their logarithms."""

    cdf: Number
    sf: Number
    log_cdf: Number
    log_sf: Number


FUNCTIONS = Tail._fields


def _two(low: Number, high: Number) -> Tail:
    """From both, each to its relative accuracy."""
    logs = (mp.log1p(-other) if one > other else mp.log(one) for one, other in ((low, high), (high, low)))
    return Tail(low, high, *logs)


def _surviving(h: Number) -> Tail:
    """P(X > x) = e^-h."""
    h_most = min(h, mp.mpf(_MOST))
    high, low = mp.exp(-h_most), -mp.expm1(-h_most)
    return Tail(low, high, mp.log1p(-high) if h > 1 else mp.log(low), -h)


def _turned(tail: Tail) -> Tail:
    """That of -X at -x."""
    return Tail(tail.sf, tail.cdf, tail.log_sf, tail.log_cdf)


def _normal(x: Number, loc: Number, scale: Number) -> Tail:
    z = (x - loc) / scale / mp.sqrt(2)
    low, high = mp.erfc(-z) / 2, mp.erfc(z) / 2
    return _two(low, high)


def _half_normal(x: Number, scale: Number) -> Tail:
    z = x / scale / mp.sqrt(2)
    return _two(mp.erf(z), mp.erfc(z))


def _cauchy(x: Number, loc: Number, scale: Number) -> Tail:
    z = (x - loc) / scale

    def below(z: Number) -> Number:
        return mp.atan(-1 / z) / mp.pi if z < 0 else mp.mpf(1) / 2 + mp.atan(z) / mp.pi

    return _two(below(z), below(-z))


def _half_cauchy(x: Number, scale: Number) -> Tail:
    z = x / scale
    return _two(2 * mp.atan(z) / mp.pi, 2 * mp.atan(1 / z) / mp.pi)


def _laplace(x: Number, loc: Number, scale: Number) -> Tail:
    z = (x - loc) / scale
    tail = mp.exp(-min(abs(z), mp.mpf(_MOST))) / 2
    low = Tail(tail, 1 - tail, -abs(z) - mp.log(2), mp.log1p(-tail))
    return low if z < 0 else _turned(low)


def _gumbel(x: Number, loc: Number, scale: Number) -> Tail:
    z = (x - loc) / scale
    h = mp.exp(min(-z, mp.mpf(_MOST)))
    return _turned(_surviving(h))


def _gamma(x: Number, a: Number, rate: Number) -> Tail:
    """From the tail on x's side of the mean, which is where the density of log x falls."""
    z = rate * x
    up = bool(z > a)
    if max(a, z) <= _SLOW:
        near = mp.gammainc(a, z, mp.inf, regularized=True) if up else mp.gammainc(a, 0, z, regularized=True)
    else:
        norm = mp.loggamma(a)
        near = tail_moment(lambda y: a * y - mp.exp(y) - norm, None, mp.log(z), up)
    tail = _of_smaller(near)
    return _turned(tail) if up else tail


def _beta(x: Number, a: Number, b: Number) -> Tail:
    """From the tail on x's side of the mean, which is where the density of the logit falls."""
    if x in (0, 1):
        nothing = Tail(mp.mpf(0), mp.mpf(1), mp.ninf, mp.mpf(0))
        return nothing if x == 0 else _turned(nothing)
    up = bool(x * (a + b) > a)
    if max(a, b) <= _SLOW:
        near = mp.betainc(b, a, 0, 1 - x, True) if up else mp.betainc(a, b, 0, x, True)
    else:
        norm = mp.loggamma(a) + mp.loggamma(b) - mp.loggamma(a + b)

        def log_density(y: Number) -> Number:
            return -a * mp.log1p(mp.exp(-y)) - b * mp.log1p(mp.exp(y)) - norm

        near = tail_moment(log_density, None, mp.log(x) - mp.log1p(-x), up)
    tail = _of_smaller(near)
    return _turned(tail) if up else tail


def _of_smaller(low: Number) -> Tail:
    """Of the lower tail, itself to its relative accuracy."""
    return Tail(low, 1 - low, mp.log(low), mp.log1p(-low))


TAILS: dict[str, Callable[..., Tail]] = {
    "Beta": _beta,
    "Cauchy": _cauchy,
    "Chi2": lambda x, df: _gamma(x, df / 2, mp.mpf(1) / 2),
    "Exponential": lambda x, rate: _surviving(rate * x),
    "Gamma": _gamma,
    "Gumbel": _gumbel,
    "HalfCauchy": _half_cauchy,
    "HalfNormal": _half_normal,
    "InverseGamma": lambda x, a, rate: _turned(_gamma(1 / x, a, rate)),
    "Laplace": _laplace,
    "LogNormal": lambda x, loc, scale: _normal(mp.log(x), loc, scale),
    "Normal": _normal,
    "Pareto": lambda x, scale, alpha: _surviving(alpha * mp.log(x / scale)),
    "Weibull": lambda x, scale, k: _surviving(mp.exp(k * mp.log(x / scale))),
}


def function_at(family: str, function: str, x: Number, *theta: Number) -> Number:
    """One of `FUNCTIONS` at the current precision."""
    with mp.workprec(mp.prec + room(x, theta)):
        return getattr(TAILS[family](x, *theta), function)


def entropy_at(family: Family, *theta: Number) -> Number:
    """-E[log p] at the current precision."""
    with mp.workprec(mp.prec + room(theta, power=1)):
        terms = family.terms(*theta).items()
        means = ((c, mp.mpf(1) if t == ONE else family.expectation(t, *theta)) for t, c in terms if c)
        return -mp.fsum(c * mean for c, mean in means if mean)  # 0 log 0 = 0
