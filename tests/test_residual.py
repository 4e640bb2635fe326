"""What rounding leaves of a factorisation, against exact rational arithmetic."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from stablekl._residual import residual


def exact(c, a, b):
    c, a, b = ([[Fraction(x) for x in row] for row in t.tolist()] for t in (c, a, b))
    return [
        [c[i][j] - sum(x * y for x, y in zip(a[i], b[j], strict=True)) for j in range(len(b))] for i in range(len(a))
    ]


def worst(got, truth):
    return max(
        abs(float(Fraction(g) - t))
        for row, true in zip(got.tolist(), truth, strict=True)
        for g, t in zip(row, true, strict=True)
    )


def covariance(d, seed, spread=3.0):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(d, d, generator=g, dtype=torch.float64) * torch.logspace(0, -spread, d, dtype=torch.float64)
    return a @ a.mT + 10.0 ** (-2 * spread) * torch.eye(d, dtype=torch.float64)


@pytest.mark.parametrize("d", [1, 2, 3, 8, 33])
def test_of_a_cholesky_factor(d):
    c = covariance(d, d)
    factor = torch.linalg.cholesky(c)
    truth = exact(c, factor, factor)
    size = max(abs(float(t)) for row in truth for t in row)
    assert worst(residual(c, factor, factor), truth) <= 1e-3 * size
    if d > 2:  # the must-fail twin
        assert worst(c - factor @ factor.mT, truth) >= 0.1 * size


def test_of_a_solution_with_rows_of_all_sizes():
    a = torch.linalg.cholesky(covariance(6, 0)) * torch.logspace(-100, 100, 6, dtype=torch.float64).unsqueeze(-1)
    c = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * a.diagonal().unsqueeze(-1)
    b = torch.linalg.solve_triangular(a, c, upper=False).mT
    truth = exact(c, a, b)
    for i in range(6):
        size = max(abs(float(t)) for t in truth[i])
        assert worst(residual(c, a, b)[i : i + 1], truth[i : i + 1]) <= 1e-2 * size


def test_batches_and_transforms():
    c = torch.stack([covariance(4, s) for s in range(3)])
    factor = torch.linalg.cholesky(c)
    rows = torch.stack([residual(x, y, y) for x, y in zip(c, factor, strict=True)])
    torch.testing.assert_close(residual(c, factor, factor), rows, rtol=1e-3, atol=1e-20)
    torch.testing.assert_close(torch.vmap(residual)(c, factor, factor), rows, rtol=1e-3, atol=1e-20)
