"""Weibull."""

from __future__ import annotations

from typing import ClassVar

from .context import Number, mp
from .family import LOG, ONE, POSITIVE, Family, Statistic, Support

__all__ = ["Weibull"]


class Weibull(Family):
    """The power 1/concentration of a standard exponential variable, times ``scale``."""

    parameters: ClassVar = {"scale": POSITIVE, "concentration": POSITIVE}

    def support(self, scale: Number, concentration: Number) -> Support:
        """The positive half-line."""
        return Support(mp.mpf(0), mp.inf)

    def terms(self, scale: Number, concentration: Number) -> dict[Statistic, Number]:
        """The sum log(k) - k log(scale) + (k - 1) log x - (x/scale)^k."""
        one = mp.log(concentration) - concentration * mp.log(scale)
        power = Statistic("power", concentration)
        return {ONE: one, LOG: concentration - 1, power: -mp.exp(-concentration * mp.log(scale))}

    def expectation(self, statistic: Statistic, scale: Number, concentration: Number) -> Number:
        """Of log x, (log x - m)^2, x and the powers of x."""
        kind, a = statistic
        if kind == "log":
            return mp.log(scale) - mp.euler / concentration
        if kind == "log square":
            return (mp.pi / concentration) ** 2 / 6 + (mp.log(scale) - mp.euler / concentration - a) ** 2
        if kind in ("x", "power"):
            power = mp.mpf(1) if kind == "x" else a
            return mp.exp(power * mp.log(scale) + mp.loggamma(1 + power / concentration))
        raise self.unknown(statistic)
