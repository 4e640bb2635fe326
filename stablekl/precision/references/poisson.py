"""Poisson."""

from __future__ import annotations

from typing import ClassVar

from .context import Number, mp
from .family import LOG_FACTORIAL, NONNEGATIVE, ONE, Family, Statistic, Support, X

__all__ = ["Poisson"]


class Poisson(Family):
    """Mean ``rate``; all mass at 0 where that is 0."""

    parameters: ClassVar = {"rate": NONNEGATIVE}

    def support(self, rate: Number) -> Support:
        """0, 1, 2, ...; only 0 where the rate is 0."""
        return Support(mp.mpf(0), mp.inf if rate else mp.mpf(0), discrete=True)

    def terms(self, rate: Number) -> dict[Statistic, Number]:
        """The sum x log(rate) - rate - log x!."""
        return {ONE: -rate, X: mp.log(rate), LOG_FACTORIAL: mp.mpf(-1)}

    def expectation(self, statistic: Statistic, rate: Number) -> Number:
        """Of x, n - x and (x - m)^2; of any statistic where the rate is 0."""
        kind, a = statistic
        if not rate:
            return statistic(mp.mpf(0))
        if kind == "x":
            return rate
        if kind == "complement":
            return a - rate
        if kind == "square":
            return rate + (rate - a) ** 2
        raise self.unknown(statistic)
