"""Wishart, as torch has it: mean df V, for df > D - 1 and V given as a covariance, a precision or a Cholesky factor.

The log-density is (df - D - 1)/2 log|X| - tr(V^-1 X)/2 less the normaliser; E[X] = df V, and log|X| is log|V| plus
the logarithms of D independent chi-squares of df, df - 1, ... degrees of freedom.
"""

from __future__ import annotations

from typing import NamedTuple

from .context import Number, mp
from .multivariate_normal import Factor, Matrix, factor, settled
from .room import room

__all__ = ["Wishart", "kl", "kl_at", "log_density", "log_density_at"]


class Wishart(NamedTuple):
    """Degrees of freedom, and the kind and value of the scale matrix: as in `multivariate_normal.Gaussian`."""

    df: Number
    kind: str
    value: Matrix


def _normaliser(df: Number, root: Factor) -> Number:
    """Logarithm of 2^(df D/2) |V|^(df/2) Gamma_D(df/2)."""
    n = root.size
    gammas = mp.fsum(mp.loggamma((df - i) / 2) for i in range(n)) + mp.log(mp.pi) * n * (n - 1) / 4
    return df * (n * mp.log(2) / 2 + root.half_log_det()) + gammas


def kl_at(p: Wishart, q: Wishart) -> Number:
    """`kl` at the current precision."""
    with mp.workprec(mp.prec + room(p.df, q.df, power=1)):
        root_p, root_q = factor(p.kind, p.value), factor(q.kind, q.value)
        n = root_p.size
        log_det = mp.fsum(mp.digamma((p.df - i) / 2) for i in range(n)) + n * mp.log(2) + 2 * root_p.half_log_det()
        log_p = (p.df - n - 1) / 2 * log_det - p.df * n / 2 - _normaliser(p.df, root_p)
        log_q = (q.df - n - 1) / 2 * log_det - p.df * root_q.trace_of_quotient(root_p) / 2 - _normaliser(q.df, root_q)
        return log_p - log_q


def kl(p: Wishart, q: Wishart) -> Number:
    """KL divergence between two Wishart distributions of one size."""
    return mp.mpf(0) if p == q else settled(lambda: kl_at(p, q))


def log_density_at(x: Matrix, p: Wishart) -> Number:
    """`log_density` at the current precision."""
    with mp.workprec(mp.prec + room(p.df, power=1)):
        root, draw = factor(p.kind, p.value), factor("covariance_matrix", x)
        power = (p.df - root.size - 1) * draw.half_log_det()
        return power - root.trace_of_quotient(draw) / 2 - _normaliser(p.df, root)


def log_density(x: Matrix, p: Wishart) -> Number:
    """The log-density at a positive definite matrix, with respect to its lower triangle."""
    return settled(lambda: log_density_at(x, p))
