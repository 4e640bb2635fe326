"""Gamma, Chi2 and InverseGamma."""

from __future__ import annotations

from typing import ClassVar

from .context import Number, mp
from .deviation import tail_moment
from .family import INVERSE, LOG, ONE, POSITIVE, Family, Statistic, Support, X

__all__ = ["Chi2", "Gamma", "InverseGamma"]

# From here on the incomplete gamma function takes long, or does not converge.
_SLOW = 300


def _mean_log(concentration: Number, rate: Number) -> Number:
    """E[log X] of a Gamma, right even where digamma(concentration) is all but log(rate)."""
    with mp.extraprec(max(0, int(mp.mag(concentration))) + 20):
        value = mp.psi(0, concentration) - mp.log(rate)
    return +value


def _beyond(concentration: Number, z: Number) -> Number:
    """E|Y - z| over the side of z away from the mean, of Y with rate 1, on the axis of log y."""
    with mp.extraprec(2 * max(0, int(mp.mag(concentration)), int(mp.mag(z))) + 20):
        norm = mp.loggamma(concentration)
        return tail_moment(lambda y: concentration * y - mp.exp(y) - norm, mp.exp, mp.log(z), bool(z > concentration))


class Gamma(Family):
    """Mean ``concentration``/``rate``."""

    parameters: ClassVar = {"concentration": POSITIVE, "rate": POSITIVE}

    def support(self, concentration: Number, rate: Number) -> Support:
        """The positive half-line."""
        return Support(mp.mpf(0), mp.inf)

    def terms(self, concentration: Number, rate: Number) -> dict[Statistic, Number]:
        """The sum a log(rate) - log Gamma(a) + (a - 1) log x - rate x."""
        one = concentration * mp.log(rate) - mp.loggamma(concentration)
        return {ONE: one, LOG: concentration - 1, X: -rate}

    def expectation(self, statistic: Statistic, concentration: Number, rate: Number) -> Number:
        """Of x, (x - m)^2, |x - m|, log x, (log x - m)^2, x^k, exp(t x) and 1/x."""
        kind, a = statistic
        mean = concentration / rate
        if kind == "x":
            return mean
        if kind == "square":
            return mean / rate + (mean - a) ** 2
        if kind == "abs":
            if a <= 0:
                return mean - a
            z = rate * a
            if concentration > _SLOW or z > _SLOW:
                return abs(mean - a) + 2 * _beyond(concentration, z) / rate
            below = (a - mean) * mp.gammainc(concentration, 0, z, regularized=True)
            below += mp.exp(concentration * mp.log(z) - z - mp.loggamma(concentration)) / rate
            return mean - a + 2 * below
        if kind == "log":
            return _mean_log(concentration, rate)
        if kind == "log square":
            return mp.psi(1, concentration) + (_mean_log(concentration, rate) - a) ** 2
        if kind == "power":
            return mp.exp(mp.loggamma(concentration + a) - mp.loggamma(concentration) - a * mp.log(rate))
        if kind == "exp":
            return mp.exp(-concentration * mp.log1p(-a / rate)) if a < rate else mp.inf
        if kind == "inverse":
            return rate / (concentration - 1) if concentration > 1 else mp.inf
        raise self.unknown(statistic)


class Chi2(Family):
    """The Gamma of concentration ``df``/2 and rate 1/2."""

    parameters: ClassVar = {"df": POSITIVE}
    _gamma = Gamma()

    def support(self, df: Number) -> Support:
        """The positive half-line."""
        return self._gamma.support(df / 2, mp.mpf(1) / 2)

    def terms(self, df: Number) -> dict[Statistic, Number]:
        """As of the Gamma."""
        return self._gamma.terms(df / 2, mp.mpf(1) / 2)

    def expectation(self, statistic: Statistic, df: Number) -> Number:
        """As of the Gamma."""
        return self._gamma.expectation(statistic, df / 2, mp.mpf(1) / 2)


class InverseGamma(Family):
    """The reciprocal of a Gamma of the same parameters."""

    parameters: ClassVar = {"concentration": POSITIVE, "rate": POSITIVE}

    def support(self, concentration: Number, rate: Number) -> Support:
        """The positive half-line."""
        return Support(mp.mpf(0), mp.inf)

    def terms(self, concentration: Number, rate: Number) -> dict[Statistic, Number]:
        """The sum a log(rate) - log Gamma(a) - (a + 1) log x - rate/x."""
        one = concentration * mp.log(rate) - mp.loggamma(concentration)
        return {ONE: one, LOG: -concentration - 1, INVERSE: -rate}

    def expectation(self, statistic: Statistic, concentration: Number, rate: Number) -> Number:
        """Of x, (x - m)^2, log x and 1/x; the first two are infinite for concentrations up to 1 and to 2."""
        kind, a = statistic
        if kind == "log":
            return -_mean_log(concentration, rate)
        if kind == "inverse":
            return concentration / rate
        if kind in ("x", "square"):
            if concentration <= (1 if kind == "x" else 2):
                return mp.inf
            mean = rate / (concentration - 1)
            return mean if kind == "x" else mean**2 / (concentration - 2) + (mean - a) ** 2
        raise self.unknown(statistic)
