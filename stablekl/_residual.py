"""The residual of a factorisation or of a solution, in float64: what rounding has left, to several digits."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["residual"]

_PRECISION = 53


def residual(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``C - A B'`` of float64 matrices, known where it is no larger than the rounding errors of ``A B'`` themselves.

    A and B are split into slices of so few digits that the products of leading slices, summed over D terms in whatever
    order, are exact. Ordinary matrix products then leave an error of about D 2^-62 |a_i| |b_j| for rows i and j, where
    ``c - a @ b.mT`` leaves D 2^-53, as much as there is to know. After Ozaki, Ogita, Oishi and Rump, "Error-free
    transformations of matrix multiplication by using fast routines of matrix multiplication and its applications",
    Numerical Algorithms 59 (2012).

    Args:
        c: shape (..., M, N).
        a: shape (..., M, D), D at most 2^20.
        b: shape (..., N, D).
    """
    a1, a2, a3 = _slices(a)
    if b is a:  # then half of these products are the others' transposes
        second, third = a1 @ a2.mT, a1 @ a3.mT
        rest = (c - a1 @ a1.mT) - (second + second.mT)
        return rest - (a2 @ a2.mT + (third + third.mT))
    b1, b2, b3 = _slices(b)
    rest = c - a1 @ b1.mT
    rest = rest - (a1 @ b2.mT + a2 @ b1.mT)
    return rest - (a2 @ b2.mT + (a1 @ b3.mT + a3 @ b1.mT))


def _slices(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three terms whose sum is exactly ``a``; in a row of either of the first two, small multiples of a number."""
    bits = (_PRECISION - math.ceil(math.log2(max(1, a.shape[-1])))) // 2
    # Adding and subtracting a number so many times as large rounds to multiples of its last place; 4 for sums that
    # leave its binade.
    scale = 4.0 * 2.0 ** (_PRECISION - bits)
    first = a.abs().amax(-1, keepdim=True) * scale
    a1 = (a + first) - first
    rest = a - a1
    second = rest.abs().amax(-1, keepdim=True) * scale
    a2 = (rest + second) - second
    return a1, a2, rest - a2
