"""Negative binomial."""

from __future__ import annotations

from typing import ClassVar

from .context import Number, mp
from .family import COUNT, ONE, PROBABILITY, Family, Statistic, Support, X

__all__ = ["NegativeBinomial"]


class NegativeBinomial(Family):
    """The number of successes before failure number ``total_count``."""

    parameters: ClassVar = {"total_count": COUNT, "probs": PROBABILITY}

    def support(self, total_count: Number, probs: Number) -> Support:
        """0, 1, 2, ...; only 0 where there is no success, or no failure to wait for."""
        return Support(mp.mpf(0), mp.inf if probs and total_count else mp.mpf(0), discrete=True)

    def terms(self, total_count: Number, probs: Number) -> dict[Statistic, Number]:
        """The sum log of the number of ways + n log(1 - probs) + x log(probs)."""
        ways = Statistic("log rising", total_count)
        return {ONE: total_count * mp.log1p(-probs), X: mp.log(probs), ways: mp.mpf(1)}

    def expectation(self, statistic: Statistic, total_count: Number, probs: Number) -> Number:
        """Of x, (x - m)^2 and the logarithm of the number of ways; of any statistic where there is no success."""
        kind, a = statistic
        if not probs:
            return statistic(mp.mpf(0))
        mean = total_count * probs / (1 - probs)
        if kind == "x":
            return mean
        if kind == "square":
            return mean / (1 - probs) + (mean - a) ** 2
        if kind == "log rising":
            return _mean_log_ways(total_count, mean, a)
        raise self.unknown(statistic)


def _mean_log_ways(n: Number, mean: Number, a: Number) -> Number:
    """E[log Gamma(x + a) - log Gamma(a) - log Gamma(x + 1)], by Malmsten's integrals of the log Gammas.

    log Gamma(x + a) - log Gamma(a) is the integral of x e^-t - e^-at (1 - e^-xt)/(1 - e^-t) over dt/t, of which the
    expectation has the generating function alone. On the axis of log t the integrand is bounded for angles of t up to
    pi/2, and the trapezoidal rule of step h is right to e^(-pi^2/h); the error that it makes at one precision is
    another at the next.
    """
    bits = mp.prec + 10
    digits = bits * mp.log(2)
    with mp.workprec(bits):
        low = -digits - mp.log(max(mp.mpf(1), n, a, mean, mean / n)) - 5
        high = mp.log(2 * digits / min(mp.mpf(1), a))
        steps = int((high - low) * digits / 9) + 1
        h = (high - low) / steps
        terms = []
        for i in range(steps + 1):
            t = mp.exp(low + i * h)
            fall = mp.exp(-t)
            u = 1 - fall if t > 1 else -mp.expm1(-t)
            generated = -mp.expm1(-n * mp.log1p(mean / n * u))
            terms.append(generated * (fall - mp.exp(-a * t)) / u)
        return h * mp.fsum(terms)
