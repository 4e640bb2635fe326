"""Kumaraswamy."""

from __future__ import annotations

from typing import ClassVar

from .context import Number, mp
from .family import LOG, ONE, POSITIVE, Family, Statistic, Support

__all__ = ["Kumaraswamy"]


class Kumaraswamy(Family):
    """Below x there is mass 1 - (1 - x^concentration1)^concentration0."""

    parameters: ClassVar = {"concentration1": POSITIVE, "concentration0": POSITIVE}

    def support(self, concentration1: Number, concentration0: Number) -> Support:
        """From 0 to 1."""
        return Support(mp.mpf(0), mp.mpf(1))

    def terms(self, concentration1: Number, concentration0: Number) -> dict[Statistic, Number]:
        """log(a b) + (a - 1) log x + (b - 1) log(1 - x^a)."""
        a, b = concentration1, concentration0
        return {ONE: mp.log(a) + mp.log(b), LOG: a - 1, Statistic("log1m power", a): b - 1}

    def expectation(self, statistic: Statistic, concentration1: Number, concentration0: Number) -> Number:
        """Of log x, log(1 - x), and log(1 - x^k), the last two by an integral where k is not that of the density."""
        a, b = concentration1, concentration0
        kind, k = statistic
        if kind == "log":
            with mp.extraprec(abs(int(mp.mag(b))) + 20):
                return -(mp.psi(0, b + 1) + mp.euler) / a
        if kind == "log1m":
            kind, k = "log1m power", mp.mpf(1)
        if kind != "log1m power":
            raise self.unknown(statistic)
        if k == a:
            return -1 / b
        return mp.log(k / a) - 1 / b + _mean_gap(k / a, b)


def _mean_gap(ratio: Number, b: Number) -> Number:
    """E l(r T) - l(T) - log r, l(t) = log(1 - e^-t), for T = -log(x^a): of the first order for small T.

    The trapezoidal rule on the axis of log T, from the end of one tail to that of the other.
    """
    digits = mp.prec * mp.log(2)
    with mp.extraprec(abs(int(mp.mag(ratio))) + abs(int(mp.mag(b))) + 20):
        step = mp.mpf(5) / (digits + 10) / (1 + mp.log1p(b) / 8)
        high = mp.log(digits + mp.log1p(b) + 10)
        low = -(digits + 10 + mp.log1p(ratio)) / (1 + b) if b < 1 else -(digits + 10) / (1 + b) - mp.log1p(ratio)
        low = min(low, -3 - mp.log1p(ratio)) if b < 50 else min(low, mp.mpf(-3))
        total = mp.mpf(0)
        for j in range(int(low / step), int(high / step) + 1):
            y = j * step
            t = mp.exp(y)
            fall = mp.log(-mp.expm1(-t))
            mass = b * mp.exp(b * fall - t + y - fall)
            total += mass * (mp.log(-mp.expm1(-ratio * t)) - fall - mp.log(ratio))
        return total * step
