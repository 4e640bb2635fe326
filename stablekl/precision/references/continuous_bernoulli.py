"""ContinuousBernoulli."""

from __future__ import annotations

from typing import ClassVar

from .context import Number, mp
from .family import ONE, PROBABILITY, Family, Statistic, Support, X

__all__ = ["ContinuousBernoulli"]


def _logit(p: Number) -> Number:
    """log(p/(1 - p)) to full relative precision, near p = 1/2 too; 2p - 1 loses nothing there."""
    return 2 * mp.atanh(2 * p - 1) if 0.25 < p < 0.75 else mp.log(p) - mp.log1p(-p)


def _exprel(y: Number) -> Number:
    """(e^y - 1)/y, which is the integral of e^(yx) over x from 0 to 1."""
    return mp.expm1(y) / y if y else mp.mpf(1)


class ContinuousBernoulli(Family):
    """Density proportional to probs^x (1 - probs)^(1 - x), that is to e^(yx), y the logit of ``probs``.

    Its moment generating function is exprel(y + t)/exprel(y), and its mean and variance are the first two derivatives
    of log exprel at y. These divide by y and by y^2, so small logits are given the bits that this takes.
    """

    parameters: ClassVar = {"probs": PROBABILITY}

    def support(self, probs: Number) -> Support:
        """From 0 to 1."""
        return Support(mp.mpf(0), mp.mpf(1))

    def terms(self, probs: Number) -> dict[Statistic, Number]:
        """The difference x y - log exprel(y)."""
        with mp.extraprec(self._guard(probs)):
            y = _logit(probs)
            one = -mp.log(_exprel(y))
        return {ONE: +one, X: +y}

    def expectation(self, statistic: Statistic, probs: Number) -> Number:
        """Of x, (x - m)^2, |x - m| and exp(t x)."""
        with mp.extraprec(self._guard(probs)):
            value = self._expectation(statistic, _logit(probs))
        return +value

    @staticmethod
    def _guard(probs: Number) -> int:
        """Twice the leading zero bits of 2 probs - 1, and a few more."""
        return 20 - 2 * int(mp.mag(2 * probs - 1)) if 2 * probs != 1 else 20

    def _expectation(self, statistic: Statistic, y: Number) -> Number:
        """`expectation` at the logit y."""
        kind, a = statistic
        if kind == "exp":
            return _exprel(y + a) / _exprel(y)
        mean = -1 / mp.expm1(-y) - 1 / y if y else mp.mpf(1) / 2
        if kind == "x":
            return mean
        if kind == "square":
            # e^-y/(1 - e^-y)^2 is even in y.
            variance = 1 / y**2 - mp.exp(-abs(y)) / mp.expm1(-abs(y)) ** 2 if y else mp.mpf(1) / 12
            return variance + (mean - a) ** 2
        if kind == "abs":
            if not 0 < a < 1:
                return abs(mean - a)
            # The integral of the distribution function up to a.
            below = (a * _exprel(y * a) - a) / mp.expm1(y) if y else a**2 / 2
            return mean - a + 2 * below
        raise self.unknown(statistic)
