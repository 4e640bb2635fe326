"""Exponential."""

from __future__ import annotations

from typing import ClassVar

from .context import Number, mp
from .family import ONE, POSITIVE, Family, Statistic, Support, X

__all__ = ["Exponential"]


class Exponential(Family):
    """Mean 1/``rate``."""

    parameters: ClassVar = {"rate": POSITIVE}

    def support(self, rate: Number) -> Support:
        """The positive half-line."""
        return Support(mp.mpf(0), mp.inf)

    def terms(self, rate: Number) -> dict[Statistic, Number]:
        """log(rate) - rate x."""
        return {ONE: mp.log(rate), X: -rate}

    def expectation(self, statistic: Statistic, rate: Number) -> Number:
        """Of x, (x - m)^2, |x - m|, log x, (log x - m)^2, x^k, exp(t x) and 1/x."""
        kind, a = statistic
        mean = 1 / rate
        if kind == "x":
            return mean
        if kind == "square":
            return mean**2 + (mean - a) ** 2
        if kind == "abs":
            return a - mean + 2 * mean * mp.exp(-rate * a) if a > 0 else mean - a
        if kind == "log":
            return -mp.euler - mp.log(rate)
        if kind == "log square":
            return mp.pi**2 / 6 + (mp.euler + mp.log(rate) + a) ** 2
        if kind == "power":
            return mp.gamma(1 + a) * mp.exp(-a * mp.log(rate))
        if kind == "exp":
            return rate / (rate - a) if a < rate else mp.inf
        if kind == "inverse":
            return mp.inf
        raise self.unknown(statistic)
