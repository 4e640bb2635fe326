"""LKJ: the density of correlation matrices proportional to the power concentration - 1 of their determinant."""

from __future__ import annotations

from .context import Number, agreed, mp
from .room import room

__all__ = ["kl", "kl_at"]


def _halves(dim: int) -> list[Number]:
    """(D - 1 - k)/2 for k = 1 ... D - 1: what the concentration is added to, in the k-th factor of the normaliser."""
    return [mp.mpf(dim - 1 - k) / 2 for k in range(1, dim)]


def _log_normaliser(dim: int, eta: Number) -> Number:
    """Lewandowski, Kurowicka and Joe (2009), without what does not depend on the concentration."""
    return mp.fsum(mp.loggamma(eta + h) for h in _halves(dim)) - (dim - 1) * mp.loggamma(eta + mp.mpf(dim - 1) / 2)


def _mean_log_determinant(dim: int, eta: Number) -> Number:
    return mp.fsum(mp.psi(0, eta + h) for h in _halves(dim)) - (dim - 1) * mp.psi(0, eta + mp.mpf(dim - 1) / 2)


def kl_at(dim: int, concentration_p: Number, concentration_q: Number) -> Number:
    """`kl` at the current precision."""
    p, q = concentration_p, concentration_q
    with mp.workprec(mp.prec + room(p, q)):
        mean = (p - q) * _mean_log_determinant(dim, p)
        return mean - _log_normaliser(dim, p) + _log_normaliser(dim, q)


def kl(dim: int, concentration_p: Number, concentration_q: Number) -> Number:
    """KL divergence between two LKJ distributions of matrices of one size, or of their Cholesky factors."""
    if concentration_p == concentration_q:
        return mp.mpf(0)
    return agreed(lambda: kl_at(dim, concentration_p, concentration_q))
