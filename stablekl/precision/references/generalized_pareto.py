"""Generalized Pareto."""

from __future__ import annotations

from typing import ClassVar

from .context import Number, mp
from .family import ONE, POSITIVE, REAL, SIGNED, Family, Statistic, Support

__all__ = ["GeneralizedPareto"]

_END = 6000  # bits: quotients of float64 that differ do so in fewer


class GeneralizedPareto(Family):
    """Density (1/scale) (1 + xi z)^(-1 - 1/xi), z = (x - loc)/scale: beyond x there is mass (1 + xi z)^(-1/xi)."""

    parameters: ClassVar = {"loc": REAL, "scale": POSITIVE, "concentration": SIGNED}

    def support(self, loc: Number, scale: Number, concentration: Number) -> Support:
        """From the location to where 1 + xi z is 0, so precisely that equal ends come out equal, and others do not."""
        if concentration >= 0:
            return Support(loc, mp.inf)
        with mp.workprec(2 * _END):
            end = loc - scale / concentration
        with mp.workprec(_END):
            return Support(loc, +end)

    def terms(self, loc: Number, scale: Number, concentration: Number) -> dict[Statistic, Number]:
        """-log(scale), and -(1 + xi) times log(1 + xi z)/xi."""
        exponent = Statistic("exponent", (loc, scale, concentration))
        return {ONE: -mp.log(scale), exponent: -(1 + concentration)}

    def expectation(self, statistic: Statistic, loc: Number, scale: Number, concentration: Number) -> Number:
        """Of log(1 + xi z)/xi of this distribution, which is exponential, and of another."""
        kind, a = statistic
        if kind != "exponent":
            raise self.unknown(statistic)
        if a == (loc, scale, concentration):
            return mp.mpf(1)
        m, s, xi = a
        rise = s + xi * (loc - m)
        at_start = mp.log(rise / s) / xi if xi else (loc - m) / s
        return at_start + _mean_slope(concentration, xi, rise / scale)


def _mean_slope(xi: Number, other: Number, size: Number) -> Number:
    """E 1/Y of an exponential variable e, Y = size e^(-xi e) + other (1 - e^(-xi e))/xi.

    By Euler's integral a hypergeometric function of (1, 1), for xi = 0 an exponential integral.
    """
    if not xi:
        return mp.exp(size / other) * mp.e1(size / other) / other if other else 1 / size
    if not other:
        return 1 / (size * (1 - xi)) if xi < 1 else mp.inf
    ratio = other / (xi * size)
    if xi > 0:
        return _hypergeometric(1 + 1 / xi, 1 - ratio) / size
    return _hypergeometric(2 - 1 / xi, ratio) / (size * (1 - xi))


def _hypergeometric(c: Number, w: Number) -> Number:
    """F(1, 1; c; w) for w <= 1 by its series, as long as it falls quickly; else by mpmath, which is slow for large c.

    For w < 0 the terms alternate and envelop the function, wherever the series is cut.
    """
    term = total = mp.mpf(1)
    for n in range(1, 1000):
        term *= n * w / (c + n - 1)
        total += term
        if abs(term) < mp.ldexp(abs(total), -mp.prec - 4):
            return total
        if abs(term) > 100:
            break
    return mp.hyp2f1(1, 1, c, w)
