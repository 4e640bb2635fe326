"""Cholesky factors with an honest answer: a factor, the jitter it took, or an error that says what is wrong.

Accuracy: a Cholesky factor of a matrix with condition number kappa carries a relative error of about ``eps * kappa``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._autograd import is_plain

__all__ = ["NotPositiveDefiniteError", "safe_cholesky"]

# Jitter is raised by this factor until the factorisation succeeds: fine enough that at most ten times the
# necessary amount is added, coarse enough that max_jitter is reached in a few steps.
_JITTER_GROWTH = 10.0


class NotPositiveDefiniteError(ValueError):
    """A matrix that should be positive definite is not; the message says which one and what to do."""


def _first(mask: Tensor) -> tuple[int, ...]:
    """Index of the first True."""
    return tuple(int(i) for i in mask.nonzero()[0])


def _which(index: tuple[int, ...]) -> str:
    """The matrix at a batch index, in words; a single one has none."""
    return f"matrix {list(index)}" if index else "the matrix"


def _raise_not_finite(a: Tensor) -> None:
    index = _first(~a.isfinite())
    raise ValueError(
        f"{_which(index[:-2])} has the entry {float(a[index])} at {list(index[-2:])}: the input is not "
        "finite, so there is nothing to factorise. The likely cause lies upstream (an overflow, a division by "
        "zero, or a diverged optimiser step); look for the first non-finite tensor there. "
        "torch.autograd.set_detect_anomaly(True) finds it in a backward pass."
    )


def _raise_not_positive_definite(a: Tensor, bad: Tensor, max_jitter: float | None) -> None:
    index = _first(bad) if bad.ndim else ()
    eigenvalue = float(torch.linalg.eigvalsh(a[index].double())[0])
    tried = "no jitter was tried (max_jitter=None)" if max_jitter is None else f"jitter up to {max_jitter:g}"
    raise NotPositiveDefiniteError(
        f"{_which(index)} is not positive definite to working precision: smallest eigenvalue "
        f"{eigenvalue:.6g}, mean diagonal {float(a[index].diagonal().mean()):.6g}; {tried}. Likely causes: fewer "
        "samples than dimensions, a variance that is exactly 0 (a ReLU output), duplicated columns, or too little "
        "precision for its condition number. Use float64, give scale_tril or scale_diag instead of the covariance "
        "(stablekl.scale_tril_from_unconstrained, stablekl.softplus_scale), or allow "
        "stablekl.safe_cholesky(A, max_jitter=...) and look at the jitter it returns."
    )


def safe_cholesky(a: Tensor, *, max_jitter: float | None = None) -> tuple[Tensor, Tensor]:
    r"""Cholesky factor of the symmetric part of ``a``, and the jitter it took.

    Factorises :math:`(A + A^\top)/2 + j\,\bar a I = L L^\top`, with :math:`\bar a` the mean of the diagonal. Nothing is
    added (:math:`j = 0`) unless ``max_jitter`` allows it; then, for each matrix on its own that needs it, j is the
    smallest of ``eps``, ``10 eps``, ``100 eps``, ..., ``max_jitter`` that succeeds. A matrix counts as positive
    definite when every pivot exceeds ``eps`` times its own diagonal entry: below that rounding alone decides its sign.
    The test is invariant under scaling of the variables, so ``diag(1, 1e-20)`` is fine.

    Args:
        a: symmetric matrices, shape ``(..., D, D)``. Not modified. Half precision is factorised in float32.
        max_jitter: the largest j allowed, relative to the mean diagonal. None: no jitter.

    Returns:
        ``(factor, jitter)``: lower triangular with positive diagonal, ``(..., D, D)``; and j, ``(...)``, in units of
        the mean diagonal, 0 where none was needed.

    Raises:
        ValueError: ``a`` is not square, or holds a NaN or an infinity (says where); ``max_jitter`` is negative or not
            finite.
        NotPositiveDefiniteError: a matrix is not positive definite (says which, and its smallest eigenvalue).
            The checks that need the data are skipped under ``vmap`` and ``torch.compile``.

    Example:
        >>> import torch, stablekl
        >>> factor, jitter = stablekl.safe_cholesky(torch.tensor([[1.0, 1.0], [1.0, 1.0]]), max_jitter=1e-4)
        >>> bool(0 < jitter <= 1e-4)
        True
    """
    if a.ndim < 2 or a.shape[-1] != a.shape[-2]:
        raise ValueError(f"expected square matrices of shape (..., D, D), got {tuple(a.shape)}")
    if max_jitter is not None and not 0 <= max_jitter < math.inf:
        raise ValueError(
            f"max_jitter must be a finite, non-negative number relative to the mean diagonal, got {max_jitter}"
        )
    # is_plain is about recording too, but here only a transform matters: detach first.
    eager = is_plain((a.detach(),))
    if eager and not bool(a.isfinite().all()):
        _raise_not_finite(a)
    dtype = a.dtype
    a = a.to(torch.promote_types(dtype, torch.float32))
    symmetric = 0.5 * a + 0.5 * a.mT
    factor, bad = _factor_and_verdict(symmetric)
    jitter = torch.zeros_like(bad, dtype=symmetric.dtype)
    if max_jitter and not (eager and not bool(bad.any())):
        jitter, bad = _smallest_jitter(symmetric.detach(), bad, max_jitter, eager)
        # Factorised anew, jitter and all: choosing between two factors would send NaN back through the one that failed.
        factor = _factor_and_verdict(_shifted(symmetric, jitter))[0]
    if eager and bool(bad.any()):
        _raise_not_positive_definite(symmetric.detach(), bad, max_jitter)
    return factor.to(dtype), jitter.to(dtype)


def _shifted(symmetric: Tensor, jitter: Tensor) -> Tensor:
    diagonal = symmetric.diagonal(dim1=-2, dim2=-1)
    shift = (jitter * diagonal.mean(-1)).unsqueeze(-1)
    return symmetric + torch.diag_embed(shift.expand_as(diagonal))


def _smallest_jitter(symmetric: Tensor, bad: Tensor, max_jitter: float, eager: bool) -> tuple[Tensor, Tensor]:
    """For each matrix the first level that makes it positive definite; and which none did."""
    jitter = torch.zeros_like(bad, dtype=symmetric.dtype)
    level = min(torch.finfo(symmetric.dtype).eps, max_jitter)
    while True:
        jitter = torch.where(bad, level, jitter)
        bad = bad & _factor_and_verdict(_shifted(symmetric, jitter))[1]
        if level >= max_jitter or (eager and not bool(bad.any())):
            return jitter, bad
        level = min(level * _JITTER_GROWTH, max_jitter)


def _factor_and_verdict(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """The factor (NaN-free where it exists) and whether each matrix failed the pivot test."""
    factor, info = torch.linalg.cholesky_ex(symmetric)
    pivots = factor.detach().diagonal(dim1=-2, dim2=-1).square()
    diagonal = symmetric.detach().diagonal(dim1=-2, dim2=-1)
    bad = (info != 0) | ~(pivots > torch.finfo(symmetric.dtype).eps * diagonal).all(-1)
    return factor, bad
