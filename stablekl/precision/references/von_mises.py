"""Von Mises."""

from __future__ import annotations

from typing import ClassVar

from .context import Number, mp
from .family import ONE, POSITIVE, REAL, Family, Statistic, Support
from .room import room

__all__ = ["VonMises"]

_CONSTANT = Statistic("one", "the same for all, which would swamp the rest")


class VonMises(Family):
    """Density proportional to exp(concentration cos(x - loc)) on the circle."""

    parameters: ClassVar = {"loc": REAL, "concentration": POSITIVE}

    def support(self, loc: Number, concentration: Number) -> Support:
        """The circle, cut anywhere."""
        return Support(-mp.pi, mp.pi)

    def terms(self, loc: Number, concentration: Number) -> dict[Statistic, Number]:
        """The sum k cos(x - loc) - log(2 pi I0(k))."""
        with mp.workprec(mp.prec + room(concentration)):  # log(1 + k^2/4), to its own accuracy
            log_i0 = mp.log(mp.besseli(0, concentration))
        return {ONE: -log_i0, _CONSTANT: -mp.log(2 * mp.pi), Statistic("cos", loc): concentration}

    def expectation(self, statistic: Statistic, loc: Number, concentration: Number) -> Number:
        """Of cos(x - m), by symmetry that of cos(x - loc) times cos(loc - m)."""
        kind, m = statistic
        if kind == "cos":
            with mp.extraprec(20):
                ratio = mp.besseli(1, concentration) / mp.besseli(0, concentration)
            return ratio * mp.cos(loc - m)
        raise self.unknown(statistic)
