"""Factors by QR of sorted rows, against mpmath."""

from __future__ import annotations

import math

import mpmath as mp
import pytest
import torch

from stablekl.mixtures.square_root import inverse_square_root, lower_square_root

F64 = torch.float64
EPS = torch.finfo(F64).eps


def rows(condition: float, seed: int, d: int = 5) -> torch.Tensor:
    """A square root whose singular values span ``condition``, small ones and large ones in a random order."""
    g = torch.Generator().manual_seed(seed)
    v = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=F64))[0]
    values = torch.logspace(0, -math.log10(condition), d, dtype=F64)[torch.randperm(d, generator=g)]
    return values[:, None] * v


def errors(factor: torch.Tensor, square: mp.matrix) -> tuple[float, float]:
    """Of the diagonal, relative; and of the whitened covariance, L^-1 S L^-T - I."""
    truth = mp.cholesky(square)
    d = square.rows
    diagonal = max(abs(mp.mpf(factor[i, i].item()) / truth[i, i] - 1) for i in range(d))
    whitened = mp.inverse(truth) * mp.matrix(factor.tolist())
    return float(diagonal), float(max(abs(x) for x in whitened * whitened.T - mp.eye(d)))


def unsorted(a: torch.Tensor) -> torch.Tensor:
    r = torch.linalg.qr(a)[1]
    return (r * r.diagonal().sign()[:, None]).mT


@pytest.mark.parametrize("condition", [1e2, 1e6, 1e10])
def test_diagonal_to_eps_and_the_rest_to_eps_cond(condition):
    worst = worst_unsorted = 0.0
    with mp.workdps(80):
        for seed in range(4):
            a = rows(condition, seed)
            m = mp.matrix(a.tolist())
            diagonal, whitened = errors(lower_square_root(a), m.T * m)
            worst = max(worst, diagonal)
            worst_unsorted = max(worst_unsorted, errors(unsorted(a), m.T * m)[0])
            assert whitened < 8 * EPS * condition
    assert worst < 8 * EPS
    if condition > 1e3:  # must fail: rows as they come, and the square
        assert worst_unsorted > 100 * EPS
    if condition > 1e8:
        factor, info = torch.linalg.cholesky_ex(a.mT @ a)
        with mp.workdps(80):
            assert int(info) or errors(factor, m.T * m)[0] > 1e-2


@pytest.mark.parametrize("condition", [1e2, 1e8])
def test_inverse(condition):
    with mp.workdps(80):
        for seed in range(4):
            a = rows(condition, seed)
            m = mp.matrix(a.tolist())
            factor = inverse_square_root(a)
            assert torch.equal(factor, factor.tril())
            diagonal, whitened = errors(factor, mp.inverse(m.T * m))
            assert diagonal < 16 * EPS
            assert whitened < 16 * EPS * condition


def test_shapes_signs_and_derivatives():
    a = torch.randn(2, 3, 7, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    factor = lower_square_root(a)
    assert factor.shape == (2, 3, 4, 4)
    assert bool((factor.diagonal(dim1=-2, dim2=-1) > 0).all())
    assert not bool(torch.signbit(factor.triu(1)).any())
    torch.testing.assert_close(factor @ factor.mT, a.mT @ a)
    inverse = inverse_square_root(a)
    torch.testing.assert_close(inverse @ inverse.mT, torch.linalg.inv(a.mT @ a))
    b = a[0, 0, :3, :2].clone().requires_grad_()
    for f in (lower_square_root, inverse_square_root):
        assert torch.autograd.gradcheck(f, b, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(f, b)
        torch.testing.assert_close(torch.vmap(f)(a), f(a))
