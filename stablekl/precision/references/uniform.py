"""Uniform."""

from __future__ import annotations

from typing import ClassVar

from .context import Number, mp
from .family import ONE, REAL, Family, Statistic, Support

__all__ = ["Uniform"]


def _mean_log(low: Number, high: Number, width: Number) -> Number:
    """The mean of log x over 0 <= low < high."""

    def primitive(x: Number) -> Number:
        return x * mp.log(x) if x else x

    with mp.extraprec(20 + 2 * int(mp.mag(high) - mp.mag(width))):
        value = (primitive(high) - primitive(low)) / width - 1
    return +value


class Uniform(Family):
    """Constant density from ``low`` to ``high``."""

    parameters: ClassVar = {"low": REAL, "high": REAL}

    def support(self, low: Number, high: Number) -> Support:
        """From low to high."""
        return Support(low, high)

    def terms(self, low: Number, high: Number) -> dict[Statistic, Number]:
        """-log(high - low)."""
        return {ONE: -mp.log(high - low)}

    def expectation(self, statistic: Statistic, low: Number, high: Number) -> Number:
        """Of x, (x - m)^2, |x - m|, exp(t x); of log x, 1/x and log(1 - x) where these are real on the support."""
        kind, a = statistic
        width, mean = high - low, (low + high) / 2
        if kind == "x":
            return mean
        if kind == "square":
            return width**2 / 12 + (mean - a) ** 2
        if kind == "abs":
            return ((a - low) ** 2 + (high - a) ** 2) / (2 * width) if low < a < high else abs(mean - a)
        if kind == "exp":
            return mp.exp(a * low) * mp.expm1(a * width) / (a * width) if a else mp.mpf(1)
        if kind == "log":
            return _mean_log(low, high, width)
        if kind == "inverse":
            return mp.log1p(width / low) / width if low > 0 else mp.inf
        if kind == "log1m":
            # Near 0 this is about -mean: enough bits for 1 - x to tell x.
            small = max(0, *(-int(mp.mag(x)) for x in (low, high) if x))
            with mp.extraprec(2 * small + 20):
                value = _mean_log(1 - high, 1 - low, high - low)
            return +value
        raise self.unknown(statistic)
