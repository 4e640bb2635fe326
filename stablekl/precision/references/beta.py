"""Beta."""

from __future__ import annotations

from typing import ClassVar

from .context import Number, mp
from .deviation import tail_moment
from .family import LOG, LOG1M, ONE, POSITIVE, Family, Statistic, Support

__all__ = ["Beta"]

# From here on the incomplete beta function takes long, or does not converge.
_SLOW = 50


def _guard(a: Number, b: Number) -> int:
    """Bits that log Gamma(a) - log Gamma(a + b), or the same of digamma, can lose, and a few more.

    Where a + b would round to a, the difference would be 0 at every precision that does so, and they would agree on it.
    """
    return int(abs(mp.mag(a) - mp.mag(b)) + max(0, mp.mag(a + b)) + 20)


def _beyond(a: Number, b: Number, m: Number) -> Number:
    """E|X - m| over the side of m away from the mean, on the axis of the logit."""
    with mp.extraprec(2 * _guard(a, b) + 2 * abs(int(mp.mag(m))) + 2 * abs(int(mp.mag(1 - m)))):
        norm = mp.loggamma(a) + mp.loggamma(b) - mp.loggamma(a + b)

        def log_density(y: Number) -> Number:
            return -a * mp.log1p(mp.exp(-y)) - b * mp.log1p(mp.exp(y)) - norm

        start = mp.log(m) - mp.log1p(-m)
        return tail_moment(log_density, lambda y: 1 / (1 + mp.exp(-y)), start, bool(m * (a + b) > a))


class Beta(Family):
    """Density proportional to x^(concentration1 - 1) (1 - x)^(concentration0 - 1)."""

    parameters: ClassVar = {"concentration1": POSITIVE, "concentration0": POSITIVE}

    def support(self, concentration1: Number, concentration0: Number) -> Support:
        """From 0 to 1."""
        return Support(mp.mpf(0), mp.mpf(1))

    def terms(self, concentration1: Number, concentration0: Number) -> dict[Statistic, Number]:
        """(a - 1) log x + (b - 1) log(1 - x) - log B(a, b)."""
        a, b = concentration1, concentration0
        with mp.extraprec(_guard(a, b)):
            log_b = mp.loggamma(a) + mp.loggamma(b) - mp.loggamma(a + b)
        return {ONE: -log_b, LOG: a - 1, LOG1M: b - 1}

    def expectation(self, statistic: Statistic, concentration1: Number, concentration0: Number) -> Number:
        """Of x, (x - m)^2, |x - m|, log x, log(1 - x) and 1/x."""
        a, b = concentration1, concentration0
        kind, m = statistic
        n = a + b
        mean = a / n
        if kind == "x":
            return mean
        if kind == "square":
            return a * b / (n**2 * (n + 1)) + (mean - m) ** 2
        if kind == "abs":
            if not 0 < m < 1:
                return abs(mean - m)
            if max(a, b) > _SLOW:
                return abs(mean - m) + 2 * _beyond(a, b, m)
            below = m * mp.betainc(a, b, 0, m, True) - mean * mp.betainc(a + 1, b, 0, m, True)
            return mean - m + 2 * below
        if kind in ("log", "log1m"):
            with mp.extraprec(_guard(a, b)):
                value = mp.psi(0, a if kind == "log" else b) - mp.psi(0, a + b)
            return +value
        if kind == "inverse":
            return (n - 1) / (a - 1) if a > 1 else mp.inf
        raise self.unknown(statistic)
