"""What a family of distributions tells of itself, and the KL divergence that follows from it.

A family gives its log-density as a combination of *statistics* of x and its expectations of such statistics. Then

    KL(p || q) = E_p[log p - log q] = sum over statistics T of (coefficient in log p - coefficient in log q) E_p[T],

which is the definition and nothing else, for every pair whose expectations are known. It cancels as any textbook form
does; `agreed` takes the digits that this costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

from .context import Number, agreed, mp
from .room import room

__all__ = ["Family", "Statistic", "Support", "divergence", "kl"]

# The domains of parameters.
REAL, POSITIVE, NONNEGATIVE, PROBABILITY, COUNT = "real", "positive", "nonnegative", "probability", "count"
SIGNED = "signed"  # of either sign, and no unit


class Statistic(NamedTuple):
    """A function of x: its kind, and its argument where it has one."""

    kind: str
    argument: Any = None

    def __call__(self, x: Number) -> Number:
        """Its value at a number x."""
        a = self.argument
        return _VALUES[self.kind](x, a)


_VALUES: dict[str, Callable[[Number, Any], Number]] = {
    "one": lambda x, _: mp.mpf(1),
    "x": lambda x, _: x,
    "log": lambda x, _: mp.log(x),
    "log1m": lambda x, _: mp.log(1 - x),
    "inverse": lambda x, _: 1 / x,
    "complement": lambda x, n: n - x,
    "power": lambda x, k: mp.exp(k * mp.log(x)),
    "square": lambda x, m: (x - m) ** 2,
    "log square": lambda x, m: (mp.log(x) - m) ** 2,
    "abs": lambda x, m: abs(x - m),
    "exp": lambda x, t: mp.exp(t * x),
    "cos": lambda x, m: mp.cos(x - m),
    "log1m power": lambda x, k: mp.log(-mp.expm1(k * mp.log(x))),
    "exponent": lambda x, a: mp.log1p(a[2] * (x - a[0]) / a[1]) / a[2] if a[2] else (x - a[0]) / a[1],
    "log quadratic": lambda x, ms: mp.log((x - ms[0]) ** 2 + ms[1] ** 2),
    "log factorial": lambda x, _: mp.loggamma(x + 1),
    "log rising": lambda x, n: mp.loggamma(x + n) - mp.loggamma(n) - mp.loggamma(x + 1),
    "log choose": lambda x, n: mp.log(mp.binomial(n, x)),
}

ONE, X, LOG, LOG1M, INVERSE = (Statistic(k) for k in ("one", "x", "log", "log1m", "inverse"))
LOG_FACTORIAL = Statistic("log factorial")


class Support(NamedTuple):
    """The interval outside which the density is zero; whether it is made of integers."""

    low: Number
    high: Number
    discrete: bool = False

    def within(self, other: Support) -> bool:
        """Whether ``other`` contains all of this one, up to a set of measure zero."""
        return bool(self.discrete == other.discrete and other.low <= self.low and self.high <= other.high)


class Family:
    """A family of distributions on the line.

    A subclass gives the three methods below for parameters in torch's order, each an mpf. They are called at whatever
    precision is current and round to it.
    """

    parameters: ClassVar[Mapping[str, str]]  # the names of torch's arguments, and their domains

    def support(self, *theta: Number) -> Support:
        """Where the density is positive, as an interval."""
        raise NotImplementedError

    def terms(self, *theta: Number) -> dict[Statistic, Number]:
        """The log-density: coefficients of statistics, whose sum it is on the support."""
        raise NotImplementedError

    def expectation(self, statistic: Statistic, *theta: Number) -> Number:
        """E[statistic(X)], possibly infinite; NotImplementedError where no closed form is known."""
        raise NotImplementedError

    def log_density(self, x: Number, *theta: Number) -> Number:
        """The log-density at a number x, -inf off the support."""
        low, high, discrete = self.support(*theta)
        if not low <= x <= high or (discrete and not mp.isint(x)):
            return -mp.inf
        values = ((c, statistic(x)) for statistic, c in self.terms(*theta).items())
        return mp.fsum(c * value for c, value in values if c and value)  # 0 log 0 = 0

    def unknown(self, statistic: Statistic) -> NotImplementedError:
        """The error to raise for an expectation that has no closed form."""
        return NotImplementedError(f"E[{statistic.kind}] of {type(self).__name__}")


def kl(p: Family, theta_p: tuple[Number, ...], q: Family, theta_q: tuple[Number, ...]) -> Number:
    """KL(p || q) at the current precision; +inf where p has mass off the support of q."""
    if not p.support(*theta_p).within(q.support(*theta_q)):
        return mp.inf
    # log(1 - p) is 0 at any precision that has no room for 1 - p, and two such precisions agree
    with mp.workprec(mp.prec + room(theta_p, theta_q, power=1)):
        in_p, in_q = p.terms(*theta_p), q.terms(*theta_q)
        total = mp.mpf(0)
        for statistic in {**in_p, **in_q}:
            a, b = in_p.get(statistic, 0), in_q.get(statistic, 0)
            if a == b:  # what both have, such as log x! of two Poissons, needs no expectation
                continue
            mean = mp.mpf(1) if statistic == ONE else p.expectation(statistic, *theta_p)
            if mean:  # 0 log 0 = 0
                total += (a - b) * mean
        return total


def divergence(p: Family, theta_p: tuple[Number, ...], q: Family, theta_q: tuple[Number, ...]) -> Number:
    """`kl` to all the digits that two precisions share; 0 for equal parameters of one family."""
    if type(p) is type(q) and theta_p == theta_q:
        return mp.mpf(0)
    return agreed(lambda: kl(p, theta_p, q, theta_q))
