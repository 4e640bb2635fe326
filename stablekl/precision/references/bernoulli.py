"""Bernoulli, Binomial and Geometric."""

from __future__ import annotations

from typing import ClassVar

from .context import Number, mp
from .family import COUNT, ONE, PROBABILITY, Family, Statistic, Support, X

__all__ = ["Bernoulli", "Binomial", "Geometric"]


class Bernoulli(Family):
    """1 with probability ``probs``, otherwise 0."""

    parameters: ClassVar = {"probs": PROBABILITY}

    def support(self, probs: Number) -> Support:
        """0 and 1, or the only one of them that has any mass."""
        return Support(mp.mpf(probs == 1), mp.mpf(probs != 0), discrete=True)

    def terms(self, probs: Number) -> dict[Statistic, Number]:
        """The sum x log(probs) + (1 - x) log(1 - probs)."""
        return {X: mp.log(probs), Statistic("complement", mp.mpf(1)): mp.log1p(-probs)}

    def expectation(self, statistic: Statistic, probs: Number) -> Number:
        """Of any statistic, as the sum of two terms."""
        return mp.fsum(w * statistic(mp.mpf(x)) for x, w in enumerate((1 - probs, probs)) if w)


class Binomial(Family):
    """The number of successes in ``total_count`` trials."""

    parameters: ClassVar = {"total_count": COUNT, "probs": PROBABILITY}

    def support(self, total_count: Number, probs: Number) -> Support:
        """0, ..., total_count, or the only one of them that has any mass."""
        return Support(
            total_count if probs == 1 else mp.mpf(0), total_count if probs != 0 else mp.mpf(0), discrete=True
        )

    def terms(self, total_count: Number, probs: Number) -> dict[Statistic, Number]:
        """The sum log C(n, x) + x log(probs) + (n - x) log(1 - probs)."""
        return {
            X: mp.log(probs),
            Statistic("complement", total_count): mp.log1p(-probs),
            Statistic("log choose", total_count): mp.mpf(1),
        }

    def expectation(self, statistic: Statistic, total_count: Number, probs: Number) -> Number:
        """Of x, n - x and (x - m)^2 in closed form, of any other as a sum over the support."""
        kind, a = statistic
        mean = total_count * probs
        if kind == "x":
            return mean
        if kind == "complement":
            return total_count * (1 - probs) + (a - total_count)
        if kind == "square":
            return mean * (1 - probs) + (mean - a) ** 2
        low, high, _ = self.support(total_count, probs)
        return mp.fsum(
            mp.binomial(total_count, x) * probs**x * (1 - probs) ** (total_count - x) * statistic(mp.mpf(x))
            for x in range(int(low), int(high) + 1)
        )


class Geometric(Family):
    """The number of failures before the first success."""

    parameters: ClassVar = {"probs": PROBABILITY}

    def support(self, probs: Number) -> Support:
        """0, 1, 2, ...; only 0 where success is certain."""
        return Support(mp.mpf(0), mp.mpf(0) if probs == 1 else mp.inf, discrete=True)

    def terms(self, probs: Number) -> dict[Statistic, Number]:
        """The sum log(probs) + x log(1 - probs)."""
        return {ONE: mp.log(probs), X: mp.log1p(-probs)}

    def expectation(self, statistic: Statistic, probs: Number) -> Number:
        """Of x, n - x and (x - m)^2; of any statistic where success is certain."""
        kind, a = statistic
        if probs == 1:
            return statistic(mp.mpf(0))
        mean = (1 - probs) / probs
        if kind == "x":
            return mean
        if kind == "complement":
            return a - mean
        if kind == "square":
            return mean / probs + (mean - a) ** 2
        raise self.unknown(statistic)
