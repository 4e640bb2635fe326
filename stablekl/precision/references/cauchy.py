"""Cauchy and HalfCauchy."""

from __future__ import annotations

from typing import ClassVar

from .context import Number, mp
from .family import ONE, POSITIVE, REAL, Family, Statistic, Support

__all__ = ["Cauchy", "HalfCauchy"]


class Cauchy(Family):
    """Median ``loc``, half of the mass within ``scale`` of it."""

    parameters: ClassVar = {"loc": REAL, "scale": POSITIVE}

    def support(self, loc: Number, scale: Number) -> Support:
        """The whole line."""
        return Support(-mp.inf, mp.inf)

    def terms(self, loc: Number, scale: Number) -> dict[Statistic, Number]:
        """log(scale/pi) - log((x - loc)^2 + scale^2)."""
        return {ONE: mp.log(scale / mp.pi), Statistic("log quadratic", (loc, scale)): mp.mpf(-1)}

    def expectation(self, statistic: Statistic, loc: Number, scale: Number) -> Number:
        """Of log((x - m)^2 + s^2); of (x - m)^2 and |x - m|, which are infinite.

        log|z - m + is|^2 is harmonic for z above the real line, and a Cauchy is what the Poisson kernel puts there for
        the point loc + i scale: the mean over the line is the value at that point.
        """
        kind, a = statistic
        if kind == "log quadratic":
            m, s = a
            return mp.log((loc - m) ** 2 + (scale + s) ** 2)
        if kind in ("square", "abs"):
            return mp.inf
        raise self.unknown(statistic)


class HalfCauchy(Family):
    """The absolute value of a Cauchy with median 0."""

    parameters: ClassVar = {"scale": POSITIVE}

    def support(self, scale: Number) -> Support:
        """The positive half-line."""
        return Support(mp.mpf(0), mp.inf)

    def terms(self, scale: Number) -> dict[Statistic, Number]:
        """Twice the Cauchy density."""
        return {ONE: mp.log(2 * scale / mp.pi), Statistic("log quadratic", (mp.mpf(0), scale)): mp.mpf(-1)}

    def expectation(self, statistic: Statistic, scale: Number) -> Number:
        """Of log(x^2 + s^2), as of the Cauchy, and log x; of x, (x - m)^2 and |x - m|, which are infinite."""
        kind, a = statistic
        if kind == "log quadratic" and a[0] == 0:
            return 2 * mp.log(scale + a[1])
        if kind == "log":
            return mp.log(scale)
        if kind in ("x", "square", "abs"):
            return mp.inf
        raise self.unknown(statistic)
