"""Pareto."""

from __future__ import annotations

from typing import ClassVar

from .context import Number, mp
from .family import LOG, ONE, POSITIVE, Family, Statistic, Support

__all__ = ["Pareto"]


class Pareto(Family):
    """Beyond x, which is at least ``scale``, there is mass (scale/x)^alpha."""

    parameters: ClassVar = {"scale": POSITIVE, "alpha": POSITIVE}

    def support(self, scale: Number, alpha: Number) -> Support:
        """From the scale up."""
        return Support(scale, mp.inf)

    def terms(self, scale: Number, alpha: Number) -> dict[Statistic, Number]:
        """log(alpha) + alpha log(scale) - (alpha + 1) log x."""
        return {ONE: mp.log(alpha) + alpha * mp.log(scale), LOG: -alpha - 1}

    def expectation(self, statistic: Statistic, scale: Number, alpha: Number) -> Number:
        """Of x, (x - m)^2, |x - m|, log x and 1/x; infinite where alpha is too small."""
        kind, a = statistic
        if kind == "log":
            return mp.log(scale) + 1 / alpha
        if kind == "inverse":
            return alpha / ((alpha + 1) * scale)
        if kind not in ("x", "square", "abs"):
            raise self.unknown(statistic)
        if alpha <= (2 if kind == "square" else 1):
            return mp.inf
        mean = alpha * scale / (alpha - 1)
        if kind == "x":
            return mean
        if kind == "square":
            return (scale / (alpha - 1)) ** 2 * alpha / (alpha - 2) + (mean - a) ** 2
        if a <= scale:
            return mean - a
        # Twice the mean excess over a.
        return a - mean + 2 * a * mp.exp(alpha * mp.log(scale / a)) / (alpha - 1)
