"""Laplace."""

from __future__ import annotations

from typing import ClassVar

from .context import Number, mp
from .family import ONE, POSITIVE, REAL, Family, Statistic, Support

__all__ = ["Laplace"]


class Laplace(Family):
    """Two exponentials of mean ``scale``, back to back at ``loc``."""

    parameters: ClassVar = {"loc": REAL, "scale": POSITIVE}

    def support(self, loc: Number, scale: Number) -> Support:
        """The whole line."""
        return Support(-mp.inf, mp.inf)

    def terms(self, loc: Number, scale: Number) -> dict[Statistic, Number]:
        """-log(2 scale) - |x - loc|/scale."""
        return {ONE: -mp.log(2 * scale), Statistic("abs", loc): -1 / scale}

    def expectation(self, statistic: Statistic, loc: Number, scale: Number) -> Number:
        """Of x, (x - m)^2, |x - m| and exp(t x)."""
        kind, a = statistic
        if kind == "x":
            return loc
        if kind == "square":
            return 2 * scale**2 + (loc - a) ** 2
        if kind == "abs":
            d = abs(loc - a)
            return d + scale * mp.exp(-d / scale)
        if kind == "exp":
            s = a * scale
            return mp.exp(a * loc) / ((1 - s) * (1 + s)) if abs(s) < 1 else mp.inf
        raise self.unknown(statistic)
