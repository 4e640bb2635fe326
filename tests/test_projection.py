"""The subspace in which components differ: found where there is one, never too small, of no effect on the result."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import stablekl
from stablekl.mixtures.components import Components
from stablekl.mixtures.engines.projection import projected, subspace
from stablekl.mixtures.engines.spectral import label_information

F64 = torch.float64


def factor(a):
    """A lower triangular factor of a a'."""
    r = torch.linalg.qr(a.mT).R.mT
    return r * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)


def seen(mu, sigma, condition, seed, log_weights=None):
    """Means and standard deviations (rows, K, D) along axes, through random maps of this condition number."""
    g = torch.Generator().manual_seed(seed)
    rows, k, dim = mu.shape
    first, second = (torch.linalg.qr(torch.randn(rows, dim, dim, generator=g, dtype=F64))[0] for _ in range(2))
    values = condition ** -torch.rand(rows, dim, generator=g, dtype=F64)
    a = (first * values.unsqueeze(-2) @ second).unsqueeze(1)
    if log_weights is None:
        log_weights = torch.full((k,), -math.log(k), dtype=F64)
    loc = (a @ mu.unsqueeze(-1)).squeeze(-1)
    return Components(log_weights.expand(rows, k), loc, factor(a * sigma.unsqueeze(-2)))


def alike(rows, k, dim):
    return torch.zeros(rows, k, dim, dtype=F64), torch.ones(rows, k, dim, dtype=F64)


def differing(rank, *, ratio=10.0, rows=10, k=5, dim=8, seed=0):
    """Means and scales that differ along the first axes."""
    g = torch.Generator().manual_seed(seed)
    mu, sigma = alike(rows, k, dim)
    mu[..., :rank] = 2 * torch.randn(rows, k, rank, generator=g, dtype=F64)
    sigma[..., :rank] = ratio ** (torch.rand(rows, k, rank, generator=g, dtype=F64) - 0.5)
    return mu, sigma


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_the_rank_is_found(rank, condition):
    found = subspace(seen(*differing(rank), condition, 1), 1e-14)
    assert found.rank.tolist() == [rank] * 10
    assert bool((found.loss <= 1e-14).all())
    assert found.basis.shape == (10, 3, 8)


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_few_coordinates_of_diagonal_components(rank):
    mu, sigma = differing(rank, ratio=1e3)
    p = Components(torch.full((10, 5), -math.log(5), dtype=F64), 1e-3 + 1e-6 * mu, 1e-6 * sigma)
    assert subspace(p, 1e-14).rank.tolist() == [rank] * 10


def test_parameters_rounded_to_single_precision():
    p = seen(*differing(2), 10.0, 2)
    p = Components(*(x.float().double() for x in p))
    assert subspace(p, 1e-9).rank.tolist() == [2] * 10
    assert min(subspace(p, 1e-20).rank.tolist()) > 2


def test_more_than_three():
    found = subspace(seen(*differing(4), 1.0, 3), 1e-14)
    assert found.rank.tolist() == [4] * 10
    assert bool(found.loss.isinf().all())


def test_weights_of_zero_are_no_reason_for_a_dimension():
    mu, sigma = differing(1, rows=2)
    sigma[0, 4] = torch.linspace(0.5, 3, 8, dtype=F64)
    lw = torch.tensor([0.25, 0.25, 0.25, 0.25, 0], dtype=F64).log()
    for p in (Components(lw.expand(2, 5), mu, sigma), seen(mu, sigma, 10.0, 4, lw)):
        assert subspace(p, 1e-14).rank.tolist() == [1, 1]


@pytest.mark.parametrize("full", [False, True])
def test_squares_that_overflow_leave_other_rows_alone(full):
    """Scales 1e160 apart both ways raised an error out of LAPACK."""
    mu, sigma = alike(2, 3, 5)
    sigma[0, 1, 0], sigma[0, 2, 1] = 1e160, 1e160
    p = Components(torch.full((2, 3), -math.log(3), dtype=F64), mu, torch.diag_embed(sigma) if full else sigma)
    found = subspace(p, 1e-14)
    assert found.rank.tolist() == [4, 0]


# ------------------------------------------------------------------------------------ what is lost, by adversaries


def adversary(name, size, rows, dim, g):
    """Two components: needles, slabs, differences just above and below what matters."""
    mu, sigma = alike(rows, 2, dim)
    normal = torch.randn(rows, dim, generator=g, dtype=F64)
    if name in ("needle", "needle in a crowd"):
        sigma[:, 1, 0] = 1 / size
    if name in ("slab", "slab in a crowd"):
        sigma[:, 1, 0] = size
    if name.endswith("crowd"):
        sigma[:, 1, 1:] *= 1 + 1e-6 * normal[:, 1:]
        mu[:, 1, 1:] = 1e-6 * normal[:, 1:]
    if name == "scales":
        sigma[:, 1] = size ** (2 * torch.rand(rows, dim, generator=g, dtype=F64) - 1)
    if name == "means":
        mu[:, 1] = normal / size
    if name == "covariances":
        sigma[:, 1] = 1 + 0.1 * normal / size
    return mu, sigma


ADVERSARIES = ("needle", "needle in a crowd", "slab", "slab in a crowd", "scales", "means", "covariances")


@pytest.mark.parametrize("name", ADVERSARIES)
@pytest.mark.parametrize("condition", [1.0, 1e3])
def test_what_is_lost_is_within_the_bound(name, condition):
    """By the spectral integral, which takes two components whole; a bar for rounding, times the condition number."""
    g = torch.Generator().manual_seed(5)
    for dim, weight, size in itertools.product((4, 8), (0.5, 1e-3, 1e-9), (3.0, 1e2, 1e4, 1e6, 1e8, 1e12, 1e20)):
        rows = 3
        lw = torch.tensor([1 - weight, weight], dtype=F64).log()
        p = seen(*adversary(name, size, rows, dim, g), condition, dim, lw)
        whole, found = label_information(p), subspace(p, 1e-14)
        for i, r in enumerate(found.rank.tolist()):
            if r <= 3:
                one = Components(*(x[i : i + 1] for x in p))
                image = projected(one, found.basis[i : i + 1, :r], found.origin[i : i + 1]) if r else None
                part = label_information(image) if image is not None else torch.zeros(1, dtype=F64)
                lost = float((whole[i] - part).abs())
                assert lost <= float(found.loss[i]) + 4e-15 + 2e-16 * condition, (dim, weight, size, r)


def test_scales_that_no_map_in_float64_shows():
    """Ratios of 1e20, any direction: the needle's variance taken as 1 + U'GU lost 0.68 nats to a loss of 1e-17."""
    mu, sigma = alike(20, 2, 6)
    sigma[:, 1, 0] = 1e20
    p = seen(mu, sigma, 1.0, 3)
    found, whole = subspace(p, 1e-14), label_information(p)
    for i, r in enumerate(found.rank.tolist()):
        if r <= 3:
            one = Components(*(x[i : i + 1] for x in p))
            image = projected(one, found.basis[i : i + 1, :r], found.origin[i : i + 1])
            assert float((label_information(image) - whole[i]).abs()) <= 1e-14 + float(found.loss[i])


def test_a_narrow_component_that_hardly_weighs():
    """A loss of leading order is w/4 for each direction, however narrow; the divergence goes with the logarithm."""
    mu, sigma = alike(1, 2, 4)
    sigma[0, 1] = 1e-100
    lw = torch.tensor([1 - 3e-15, 3e-15], dtype=F64).log()
    p = Components(lw.expand(1, 2), mu, sigma)
    for full in (False, True):
        found = subspace(p._replace(scale=torch.diag_embed(sigma)) if full else p, 1e-14)
        assert found.rank.tolist() == [4]


def test_a_rare_component_of_q_is_all_of_q_where_p_is():
    """1e-20 of q, and all that p sees of it."""
    loc = torch.zeros(3, 5, dtype=F64)
    loc[0, 0], loc[1, 0] = 60.0, 61.0
    scale = torch.ones(3, 5, dtype=F64)
    scale[2, 1:] = torch.tensor([0.7, 0.8, 1.2, 1.3], dtype=F64)
    weights = torch.tensor([0.5, 0.5, 1e-20], dtype=F64)
    q = stablekl.GaussianMixture(probs=weights, loc=loc, scale_diag=scale)
    p = stablekl.MultivariateNormal(torch.zeros(5, dtype=F64), scale_diag=torch.ones(5, dtype=F64))
    nearest = stablekl.MultivariateNormal(loc[2], scale_diag=scale[2])
    expected = stablekl.kl_divergence(p, nearest) - math.log(1e-20)
    e = stablekl.kl_estimate(p, q)
    assert float((e.value - expected).abs()) <= 1e-9


# -------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("diagonal", [False, True])
def test_the_gradient_is_that_of_the_whole(diagonal):
    mu, sigma = differing(2, rows=2, k=2, dim=5)
    p = seen(mu, sigma, 3.0, 7)
    if diagonal:
        p = Components(p.log_weights, mu, sigma)
    leaves = [x.clone().requires_grad_() for x in p]
    found = subspace(Components(*leaves), 1e-14)
    assert found.rank.tolist() == [2, 2]
    whole = label_information(Components(*leaves))
    part = label_information(projected(Components(*leaves), found.basis[:, :2], found.origin))
    torch.testing.assert_close(part, whole, rtol=1e-13, atol=1e-15)
    for a, b in zip(torch.autograd.grad(part.sum(), leaves), torch.autograd.grad(whole.sum(), leaves), strict=True):
        a, b = (x if diagonal or x.ndim < 4 else x.tril() for x in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_projection_on_a_line_and_a_plane():
    p = seen(*differing(3, dim=3), 10.0, 8)
    basis = torch.randn(10, 3, 3, generator=torch.Generator().manual_seed(9), dtype=F64)
    origin = torch.ones(10, 3, dtype=F64)
    for r in (1, 2, 3):
        image = projected(p, basis[:, :r], origin)
        b = basis[:, None, :r]
        torch.testing.assert_close(image.loc, (b @ (p.loc - 1).unsqueeze(-1)).squeeze(-1), rtol=1e-13, atol=1e-13)
        scale = torch.diag_embed(image.scale) if image.is_diagonal else image.scale
        torch.testing.assert_close(scale @ scale.mT, b @ p.scale @ p.scale.mT @ b.mT, rtol=1e-11, atol=1e-13)
        assert bool((scale.diagonal(dim1=-2, dim2=-1) > 0).all())
