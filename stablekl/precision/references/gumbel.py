"""Gumbel."""

from __future__ import annotations

from typing import ClassVar

from .context import Number, mp
from .family import ONE, POSITIVE, REAL, Family, Statistic, Support, X

__all__ = ["Gumbel"]


class Gumbel(Family):
    """Distribution function exp(-exp(-(x - loc)/scale))."""

    parameters: ClassVar = {"loc": REAL, "scale": POSITIVE}

    def support(self, loc: Number, scale: Number) -> Support:
        """The whole line."""
        return Support(-mp.inf, mp.inf)

    def terms(self, loc: Number, scale: Number) -> dict[Statistic, Number]:
        """-log(scale) - z - exp(-z), with z = (x - loc)/scale."""
        return {
            ONE: loc / scale - mp.log(scale),
            X: -1 / scale,
            Statistic("exp", -1 / scale): -mp.exp(loc / scale),
        }

    def expectation(self, statistic: Statistic, loc: Number, scale: Number) -> Number:
        """Of x, (x - m)^2, |x - m| and exp(t x): exp(-z) is a standard exponential."""
        kind, a = statistic
        mean = loc + mp.euler * scale
        if kind == "x":
            return mean
        if kind == "square":
            return (mp.pi * scale) ** 2 / 6 + (mean - a) ** 2
        if kind == "abs":
            # Twice the integral of the distribution function up to a, which is scale E1: nothing far below loc.
            z = (loc - a) / scale
            return mean - a + (2 * scale * mp.e1(mp.exp(z)) if z < mp.log(mp.prec) else 0)
        if kind == "exp":
            return mp.exp(a * loc) * mp.gamma(1 - a * scale) if a * scale < 1 else mp.inf
        raise self.unknown(statistic)
