"""Negative binomial."""

from __future__ import annotations

from typing import ClassVar

from .context import Number, mp
from .family import COUNT, ONE, PROBABILITY, Family, Statistic, Support, X

__all__ = ["NegativeBinomial"]


class NegativeBinomial(Family):
    """The number of successes before failure number ``total_count``."""

    parameters: ClassVar = {"total_count": COUNT, "probs": PROBABILITY}

    def support(self, total_count: Number, probs: Number) -> Support:
        """0, 1, 2, ...; only 0 where there is no success, or no failure to wait for."""
        return Support(mp.mpf(0), mp.inf if probs and total_count else mp.mpf(0), discrete=True)

    def terms(self, total_count: Number, probs: Number) -> dict[Statistic, Number]:
        """The sum log of the number of ways + n log(1 - probs) + x log(probs)."""
        ways = Statistic("log rising", total_count)
        return {ONE: total_count * mp.log1p(-probs), X: mp.log(probs), ways: mp.mpf(1)}

    def expectation(self, statistic: Statistic, total_count: Number, probs: Number) -> Number:
        """Of x and (x - m)^2; of any statistic where there is no success."""
        kind, a = statistic
        if not probs:
            return statistic(mp.mpf(0))
        mean = total_count * probs / (1 - probs)
        if kind == "x":
            return mean
        if kind == "square":
            return mean / (1 - probs) + (mean - a) ** 2
        raise self.unknown(statistic)
