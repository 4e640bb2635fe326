"""Mixtures of two members of an exponential family: the integral of `mixture` with the family's own rho.

With a log-normaliser F at natural parameters x and y, log rho(s) = F(s x + (1 - s) y) - s F(x) - (1 - s) F(y), as it
stands: 400 bits leave what it cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .beta import Beta
from .context import Number, mp
from .family import Family, divergence
from .gamma import Gamma
from .mixture import fourier_integral
from .poisson import Poisson

__all__ = ["MIXED", "information", "kl_to_member"]

Vector = Sequence[Number]

_BITS = 400


def _rates(x: Number) -> Number:
    return mp.exp(x)


def _gamma(a: Number, b: Number) -> Number:
    return mp.loggamma(a) - a * mp.log(b)


def _beta(a: Number, b: Number) -> Number:
    return mp.loggamma(a) + mp.loggamma(b) - mp.loggamma(a + b)


# By torch's name: the family, its log-normaliser, and the parameters in which that is a mixture's.
MIXED: dict[str, tuple[Family, Callable[..., Any], Callable[[Number], Number]]] = {
    "Beta": (Beta(), _beta, lambda x: x),
    "Gamma": (Gamma(), _gamma, lambda x: x),
    "Poisson": (Poisson(), _rates, lambda x: mp.log(x)),
}


def information(name: str, weights: Vector, one: Vector, two: Vector) -> Number:
    """I(X; Z) of a mixture of two members, with an error below 1e-23.

    Args:
        name: of the family, as in `MIXED`.
        weights: two nonnegative numbers, of any positive sum.
        one: the parameters of the first, a rate of 0 excepted.
        two: those of the second.

    Raises:
        PrecisionError: the integral did not settle.
    """
    if list(one) == list(two) or 0 in weights:
        return mp.mpf(0)
    _, normaliser, natural = MIXED[name]
    with mp.workprec(_BITS):
        total = weights[0] + weights[1]
        x, y = [natural(v) for v in one], [natural(v) for v in two]
        ends = normaliser(*x), normaliser(*y)

        def transform(t: Number) -> tuple[Number, Number]:
            s = mp.mpc(mp.mpf(1) / 2, t)
            value = normaliser(*(s * a + (1 - s) * b for a, b in zip(x, y, strict=True)))
            value -= s * ends[0] + (1 - s) * ends[1]
            # fourier_integral has the phase of the coefficient with the components the other way round
            return value.real, -value.imag

        return fourier_integral([w / total for w in weights], transform)


def kl_to_member(name: str, weights: Vector, one: Vector, two: Vector, q: Vector) -> Number:
    """KL divergence from a mixture of two members to a member, with an error below 1e-23 (1 + KL)."""
    family = MIXED[name][0]
    total = weights[0] + weights[1]
    apart = [
        w / total * divergence(family, tuple(p), family, tuple(q))
        for w, p in zip(weights, (one, two), strict=True)
        if w
    ]
    return mp.fsum(apart) - information(name, weights, one, two)
