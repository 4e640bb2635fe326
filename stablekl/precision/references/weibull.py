"""Weibull."""

from __future__ import annotations

from typing import ClassVar

from .context import Number, mp
from .family import LOG, ONE, POSITIVE, Family, Statistic, Support

__all__ = ["Weibull"]


class Weibull(Family):
    """Survival function exp(-(x/scale)^concentration)."""

    parameters: ClassVar = {"scale": POSITIVE, "concentration": POSITIVE}

    def support(self, scale: Number, concentration: Number) -> Support:
        """The positive half-line."""
        return Support(mp.mpf(0), mp.inf)

    def terms(self, scale: Number, concentration: Number) -> dict[Statistic, Number]:
        """The sum log(k) - k log(scale) + (k - 1) log x - (x/scale)^k."""
        one = mp.log(concentration) - concentration * mp.log(scale)
        return {
            ONE: one,
            LOG: concentration - 1,
            Statistic("power", concentration): -mp.exp(-concentration * mp.log(scale)),
        }

    def expectation(self, statistic: Statistic, scale: Number, concentration: Number) -> Number:
        """Of log x, x^a and x: (x/scale)^k is a standard exponential."""
        kind, a = statistic
        if kind == "log":
            return mp.log(scale) - mp.euler / concentration
        if kind in ("power", "x"):
            power = a if kind == "power" else mp.mpf(1)
            return mp.exp(power * mp.log(scale)) * mp.gamma(1 + power / concentration)
        raise self.unknown(statistic)
