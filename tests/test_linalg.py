"""safe_cholesky: an honest answer for matrices that are fine, that are not, and that need help."""

from __future__ import annotations

import math

import pytest
import torch

from stablekl import NotPositiveDefiniteError, safe_cholesky

EPS = torch.finfo(torch.float32).eps


def spd(*shape, dtype=torch.float32):
    a = torch.randn(*shape[:-1], shape[-1] + 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (a @ a.mT).to(dtype)


SINGULAR = torch.ones(2, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_factor_of_a_matrix_that_is_fine(dtype):
    a = spd(4, 3, 3, dtype=dtype)
    before = a.clone()
    factor, jitter = safe_cholesky(a)
    assert factor.dtype == jitter.dtype == dtype
    assert (jitter == 0).all()
    assert jitter.shape == (4,)
    assert torch.equal(a, before)
    assert torch.equal(factor, factor.tril())
    wide = factor.double()
    torch.testing.assert_close(wide @ wide.mT, a.double(), rtol=0, atol=20 * torch.finfo(dtype).eps)


def test_max_jitter_changes_nothing_where_none_is_needed():
    a = spd(4, 3, 3)
    factor, jitter = safe_cholesky(a, max_jitter=1e-2)
    assert torch.equal(factor, safe_cholesky(a)[0])
    assert (jitter == 0).all()


def test_the_symmetric_part_is_factorised():
    a = spd(3, 3)
    skew = torch.tensor([[0.0, 1, 2], [-1, 0, 3], [-2, -3, 0]]) * 0.25
    torch.testing.assert_close(safe_cholesky(a + skew)[0], safe_cholesky(a)[0])


SCALED = {
    "variables of different units": torch.tensor([1.0, 1e-20]),
    "small": torch.tensor([1e-30, 1e-30]),
    "large": torch.tensor([1e30, 1e30]),
    "subnormal": torch.tensor([1.0, 1e-40]),
}


@pytest.mark.parametrize("name", SCALED)
def test_scaling_the_variables_is_no_reason_to_fail(name):
    diagonal = SCALED[name]
    factor, jitter = safe_cholesky(torch.diag(diagonal), max_jitter=1.0)
    assert jitter == 0
    torch.testing.assert_close(factor, torch.diag(diagonal.sqrt()))


def test_ill_conditioned_is_not_singular():
    a = torch.tensor([[1.0, 1 - 1e-15], [1 - 1e-15, 1.0]], dtype=torch.float64)
    assert safe_cholesky(a)[1] == 0
    with pytest.raises(NotPositiveDefiniteError):
        safe_cholesky(a.float())


# ---- what is wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite(bad):
    a = torch.eye(3).repeat(2, 4, 1, 1)
    a[1, 2, 0, 2] = bad
    with pytest.raises(ValueError, match=rf"matrix \[1, 2\] has the entry {bad} at \[0, 2\].*not finite") as caught:
        safe_cholesky(a, max_jitter=1.0)
    assert not isinstance(caught.value, NotPositiveDefiniteError)


def test_not_positive_definite_says_which_and_what_to_do():
    a = torch.eye(2).repeat(3, 1, 1)
    a[2] = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    with pytest.raises(
        NotPositiveDefiniteError, match=r"matrix \[2\].*smallest eigenvalue -1.*safe_cholesky\(A, max_jitter"
    ) as e:
        safe_cholesky(a)
    assert isinstance(e.value, ValueError)
    assert "no jitter was tried" in str(e.value)
    with pytest.raises(NotPositiveDefiniteError, match=r"jitter up to 0\.1"):
        safe_cholesky(a, max_jitter=0.1)


NOT_POSITIVE_DEFINITE = {
    "zero": torch.zeros(2, 2),
    "a zero variance": torch.diag(torch.tensor([1.0, 0.0])),
    "negative definite": -torch.eye(2),
    "rank one": SINGULAR,
    "three samples in five dimensions": (lambda x: x.mT @ x)(torch.arange(15.0).reshape(3, 5).sin()),
}


@pytest.mark.parametrize("name", NOT_POSITIVE_DEFINITE)
def test_not_positive_definite(name):
    with pytest.raises(NotPositiveDefiniteError):
        safe_cholesky(NOT_POSITIVE_DEFINITE[name])


def test_zero_and_negative_definite_matrices_are_beyond_relative_jitter():
    for name in ("zero", "negative definite"):
        with pytest.raises(NotPositiveDefiniteError):
            safe_cholesky(NOT_POSITIVE_DEFINITE[name], max_jitter=10.0)


@pytest.mark.parametrize("shape", [(3,), (2, 3), ()])
def test_not_square(shape):
    with pytest.raises(ValueError, match="square"):
        safe_cholesky(torch.ones(shape))


@pytest.mark.parametrize("bad", [-1e-3, math.nan, math.inf])
def test_max_jitter_must_make_sense(bad):
    with pytest.raises(ValueError, match="max_jitter must be"):
        safe_cholesky(SINGULAR, max_jitter=bad)


# ---- jitter ---------------------------------------------------------------------------------------------------


def test_jitter_is_per_matrix_and_relative_to_the_mean_diagonal():
    a = torch.stack([torch.eye(2), 1e10 * SINGULAR, 1e-10 * SINGULAR])
    factor, jitter = safe_cholesky(a, max_jitter=1e-3)
    assert jitter[0] == 0
    assert (jitter[1:] > 0).all()
    assert (jitter[1:] <= 10 * EPS).all()
    torch.testing.assert_close(factor @ factor.mT, a, rtol=1e-5, atol=0)


def test_the_smallest_level_that_succeeds_and_max_jitter_itself():
    deficit = 4e-5
    a = torch.tensor([[1.0, 1 + deficit], [1 + deficit, 1.0]])
    for allowed in (5e-5, 1e-4, 1.0):  # the first two lie between levels
        jitter = safe_cholesky(a, max_jitter=allowed)[1].item()
        assert deficit < jitter <= allowed * (1 + EPS)
        assert jitter <= 10 * deficit
    with pytest.raises(NotPositiveDefiniteError):
        safe_cholesky(a, max_jitter=3e-5)


def test_max_jitter_below_eps_or_zero_ends():
    for allowed in (1e-12, 0.0):
        with pytest.raises(NotPositiveDefiniteError):
            safe_cholesky(SINGULAR, max_jitter=allowed)
        assert safe_cholesky(torch.eye(2), max_jitter=allowed)[1] == 0


# ---- transforms -----------------------------------------------------------------------------------------------


def test_gradient():
    a = spd(3, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: safe_cholesky(a)[0], a)
    assert torch.autograd.gradgradcheck(lambda a: safe_cholesky(a)[0], a)


def test_gradient_where_jitter_was_needed_is_that_of_the_jittered_matrix():
    a = torch.stack([torch.eye(2), SINGULAR]).double().requires_grad_()
    factor, jitter = safe_cholesky(a, max_jitter=1e-3)
    (gradient,) = torch.autograd.grad(factor.sum(), a)
    assert gradient.isfinite().all()
    by_hand = a + jitter[:, None, None] * a.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * torch.eye(2)
    (expected,) = torch.autograd.grad(torch.linalg.cholesky(by_hand).sum(), a)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-8)


def test_vmap():
    a = torch.stack([torch.eye(2), SINGULAR, 4 * SINGULAR])
    expected = safe_cholesky(a, max_jitter=1e-3)
    for got, want in zip(torch.vmap(lambda a: safe_cholesky(a, max_jitter=1e-3))(a), expected, strict=True):
        torch.testing.assert_close(got, want)
    fine = spd(4, 3, 3)
    torch.testing.assert_close(torch.vmap(safe_cholesky)(fine)[0], safe_cholesky(fine)[0])


def test_compile():
    a = torch.stack([torch.eye(2), SINGULAR])
    f = torch.compile(lambda a: safe_cholesky(a, max_jitter=1e-5), fullgraph=True, backend="aot_eager")
    for got, want in zip(f(a), safe_cholesky(a, max_jitter=1e-5), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 0), (0, 0)])
def test_empty(shape):
    factor, jitter = safe_cholesky(torch.zeros(shape), max_jitter=1e-3)
    assert factor.shape == shape
    assert jitter.shape == shape[:-2]
