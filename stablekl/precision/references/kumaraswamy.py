"""Kumaraswamy, by sums on the axis of log(-log x) (see `integral`)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import ClassVar

from .context import Number, agreed, mp
from .family import LOG, ONE, POSITIVE, Family, Statistic, Support
from .integral import Density, Node, divergence_at, gradient_at, nodes
from .room import room

__all__ = ["Kumaraswamy", "kl", "kl_at", "kl_gradient_at", "log_density_at"]


def log_density_at(x: Number, concentration1: Number, concentration0: Number) -> Number:
    """The log-density at a number between 0 and 1, at the current precision."""
    a, b = concentration1, concentration0
    with mp.workprec(mp.prec + room(a, b, x, 1 - x, power=1)):
        return mp.log(a * b) + (a - 1) * mp.log(x) + (b - 1) * mp.log(-mp.expm1(a * mp.log(x)))


def _size(b: Number) -> Number:
    """About -a log x, where the mass is; for small b at an edge of it."""
    return 1 + mp.log1p(b)


def _density(a: Number, b: Number, second: bool) -> Density:
    """Of log T, T = -log x: T e^(-aT) (1 - e^(-aT))^(b - 1)."""
    centre = mp.log(_size(b))

    def at(node: Node) -> tuple[Number, tuple[Number, ...]]:
        log_tau = centre + (node.two if second else node.one)
        tau = mp.exp(log_tau)
        fall = -mp.expm1(-tau)
        log_fall = mp.log(fall)
        value = log_tau - tau + (b - 1) * log_fall
        return value, (tau / a * ((b - 1) * (1 / fall - 1) - 1), log_fall)

    return at


def _compared(p: tuple[Number, Number], q: tuple[Number, Number]) -> tuple[Iterator[Node], Density, Density]:
    (a, b), (c, d) = p, q
    widths = [3 / _size(x) / 2 for x in (b, d)]
    shift = mp.log(_size(d) / c) - mp.log(_size(b) / a)
    reach = abs(shift) + mp.prec * (1 / min(b, d) + sum(widths))
    end = sum(mp.asinh(reach / w) for w in widths) + 1
    # T from which on neither has mass: exp(-aT) would need as many digits as T has
    most = (4 * mp.prec + 4 * mp.log1p(b) + 4 * mp.log1p(d)) / min(a, c)
    last = mp.log(most * a / _size(b))
    points = itertools.takewhile(lambda node: node.one < last, nodes(shift, widths[0], widths[1], end))
    return points, _density(a, b, False), _density(c, d, True)


def kl_at(
    concentration1_p: Number, concentration0_p: Number, concentration1_q: Number, concentration0_q: Number
) -> Number:
    """`kl` at the current precision."""
    p, q = (concentration1_p, concentration0_p), (concentration1_q, concentration0_q)
    with mp.workprec(mp.prec + room(p, q, power=1)):
        return divergence_at(*_compared(p, q))


def kl_gradient_at(
    concentration1_p: Number, concentration0_p: Number, concentration1_q: Number, concentration0_q: Number
) -> list[list[Number]]:
    """The derivatives of the divergence by all four parameters, at the current precision."""
    p, q = (concentration1_p, concentration0_p), (concentration1_q, concentration0_q)
    with mp.workprec(mp.prec + room(p, q, power=1)):
        return gradient_at(*_compared(p, q))


def kl(
    concentration1_p: Number, concentration0_p: Number, concentration1_q: Number, concentration0_q: Number
) -> Number:
    """KL divergence between two Kumaraswamy distributions, given their positive concentrations."""
    p, q = (concentration1_p, concentration0_p), (concentration1_q, concentration0_q)
    return mp.mpf(0) if p == q else agreed(lambda: kl_at(*p, *q))


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
