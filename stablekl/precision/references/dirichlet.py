"""Dirichlet: the definition with E[log X_i] = digamma(alpha_i) - digamma(sum of alpha)."""

from __future__ import annotations

from .context import Number, agreed, mp
from .room import room

__all__ = ["kl", "kl_at", "log_density", "log_density_at"]

Vector = list[Number]


def _log_beta(alpha: Vector) -> Number:
    """Logarithm of the normalising integral."""
    return mp.fsum(mp.loggamma(a) for a in alpha) - mp.loggamma(mp.fsum(alpha))


def kl_at(alpha_p: Vector, alpha_q: Vector) -> Number:
    """`kl` at the current precision."""
    with mp.workprec(mp.prec + room(alpha_p, alpha_q, power=1)):
        of_total = mp.digamma(mp.fsum(alpha_p))
        means = mp.fsum((a - b) * (mp.digamma(a) - of_total) for a, b in zip(alpha_p, alpha_q, strict=True) if a != b)
        return means - _log_beta(alpha_p) + _log_beta(alpha_q)


def kl(alpha_p: Vector, alpha_q: Vector) -> Number:
    """KL divergence between two Dirichlet distributions, given their positive concentrations."""
    return mp.mpf(0) if alpha_p == alpha_q else agreed(lambda: kl_at(alpha_p, alpha_q))


def log_density_at(x: Vector, alpha: Vector) -> Number:
    """`log_density` at the current precision."""
    with mp.workprec(mp.prec + room(alpha, power=1)):
        return mp.fsum((a - 1) * mp.log(v) for v, a in zip(x, alpha, strict=True) if a != 1) - _log_beta(alpha)


def log_density(x: Vector, alpha: Vector) -> Number:
    """The log-density at a point of the simplex, with respect to all coordinates but one.

    Args:
        x: nonnegative coordinates, taken as they are: that they sum to one is not used.
        alpha: positive concentrations.
    """
    return agreed(lambda: log_density_at(x, alpha))
