"""Normal, HalfNormal and LogNormal."""

from __future__ import annotations

from typing import ClassVar

from .context import Number, mp
from .family import LOG, ONE, POSITIVE, REAL, Family, Statistic, Support, X

__all__ = ["HalfNormal", "LogNormal", "Normal"]


class Normal(Family):
    """Mean ``loc``, standard deviation ``scale``."""

    parameters: ClassVar[dict[str, str]] = {"loc": REAL, "scale": POSITIVE}

    def support(self, loc: Number, scale: Number) -> Support:
        """The whole line."""
        return Support(-mp.inf, mp.inf)

    def terms(self, loc: Number, scale: Number) -> dict[Statistic, Number]:
        """-log(scale sqrt(2 pi)) - (x - loc)^2/(2 scale^2)."""
        return {ONE: -mp.log(scale * mp.sqrt(2 * mp.pi)), Statistic("square", loc): -1 / (2 * scale**2)}

    def expectation(self, statistic: Statistic, loc: Number, scale: Number) -> Number:
        """Of x, (x - m)^2, |x - m| and exp(t x)."""
        kind, a = statistic
        if kind == "x":
            return loc
        if kind == "square":
            return scale**2 + (loc - a) ** 2
        if kind == "abs":
            z = (loc - a) / scale
            return scale * (mp.sqrt(2 / mp.pi) * mp.exp(-(z**2) / 2) + z * mp.erf(z / mp.sqrt(2)))
        if kind == "exp":
            return mp.exp(a * loc + (a * scale) ** 2 / 2)
        raise self.unknown(statistic)


class HalfNormal(Family):
    """The absolute value of a normal with mean 0 and standard deviation ``scale``."""

    parameters: ClassVar[dict[str, str]] = {"scale": POSITIVE}

    def support(self, scale: Number) -> Support:
        """The positive half-line."""
        return Support(mp.mpf(0), mp.inf)

    def terms(self, scale: Number) -> dict[Statistic, Number]:
        """Twice the normal density."""
        return {ONE: mp.log(2 / mp.pi) / 2 - mp.log(scale), Statistic("square", mp.mpf(0)): -1 / (2 * scale**2)}

    def expectation(self, statistic: Statistic, scale: Number) -> Number:
        """Of x, log x and (x - m)^2."""
        kind, a = statistic
        mean = scale * mp.sqrt(2 / mp.pi)
        if kind == "x":
            return mean
        if kind == "log":
            return mp.log(scale) - (mp.euler + mp.log(2)) / 2
        if kind == "square":
            return scale**2 - 2 * a * mean + a**2
        raise self.unknown(statistic)


class LogNormal(Family):
    """The exponential of a normal."""

    parameters: ClassVar[dict[str, str]] = {"loc": REAL, "scale": POSITIVE}

    def support(self, loc: Number, scale: Number) -> Support:
        """The positive half-line."""
        return Support(mp.mpf(0), mp.inf)

    def terms(self, loc: Number, scale: Number) -> dict[Statistic, Number]:
        """The normal log-density at log x, less log x."""
        return {
            ONE: -mp.log(scale * mp.sqrt(2 * mp.pi)),
            LOG: mp.mpf(-1),
            Statistic("log square", loc): -1 / (2 * scale**2),
        }

    def expectation(self, statistic: Statistic, loc: Number, scale: Number) -> Number:
        """Of x, its powers, log x and (log x - m)^2."""
        if statistic == X:
            return mp.exp(loc + scale**2 / 2)
        if statistic.kind == "power":
            return mp.exp(statistic.argument * loc + (statistic.argument * scale) ** 2 / 2)
        if statistic == LOG:
            return loc
        if statistic.kind == "log square":
            return scale**2 + (loc - statistic.argument) ** 2
        raise self.unknown(statistic)
