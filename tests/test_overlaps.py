"""Overlap integrals of Gaussians against the integral itself, and against the textbook's formula in 60 digits."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from stablekl.mixtures.components import Components
from stablekl.mixtures.engines.overlaps import (
    component_pairs,
    divergences,
    geometric_overlaps,
    log_determinants,
    overlaps,
)
from stablekl.mixtures.engines.overlaps import whitened as whitening
from stablekl.precision.references.context import mp

F64 = torch.float64
EPS = 2.0**-52


def random(seed, k, dim, *, full=True, spread=2.0, log_scale=0.5):
    """Components, weights uneven."""
    g = torch.Generator().manual_seed(seed)
    loc = spread * torch.randn(k, dim, generator=g, dtype=F64)
    scale = torch.exp(log_scale * torch.randn(k, dim, generator=g, dtype=F64))
    if full:
        below = torch.randn(k, dim, dim, generator=g, dtype=F64).tril(-1) / math.sqrt(dim)
        scale = torch.diag_embed(scale) + scale.unsqueeze(-1) * below
    return Components(torch.log_softmax(torch.randn(k, generator=g, dtype=F64), -1), loc, scale)


def exactly(c, k):
    """Mean and factor of component k as mpmath matrices."""
    scale = torch.diag_embed(c.scale) if c.is_diagonal else c.scale
    return mp.matrix(c.loc[k].tolist()), mp.matrix(scale[k].tolist())


def log_integral(gaussians, powers):
    """Log of the integral of the product of p_i^a_i by precision matrices: digits enough for what cancels."""
    with mp.workdps(120):
        dim = gaussians[0][0].rows
        a, b, c = mp.matrix(dim, dim), mp.matrix(dim, 1), mp.mpf(0)
        for (m, factor), power in zip(gaussians, powers, strict=True):
            precision = (factor * factor.T) ** -1
            a, b = a + power * precision, b + power * precision * m
            log_det = sum(mp.log(factor[i, i]) for i in range(dim))
            c -= power * ((m.T * precision * m)[0] / 2 + log_det + mp.mpf(dim) / 2 * mp.log(2 * mp.pi))
        return c + (b.T * a**-1 * b)[0] / 2 - mp.log(mp.det(a)) / 2 + mp.mpf(dim) / 2 * mp.log(2 * mp.pi)


def entropy(gaussian):
    dim = gaussian[0].rows
    return sum(mp.log(gaussian[1][i, i]) for i in range(dim)) + mp.mpf(dim) / 2 * (1 + mp.log(2 * mp.pi))


def check(a, b, bar=20.0):
    """Both closed forms, in eps of 1 + themselves + D."""
    found = overlaps(a, b)
    dim = a.loc.shape[-1]
    for j, k in itertools.product(range(a.loc.shape[-2]), range(b.loc.shape[-2])):
        pair = [exactly(a, j), exactly(b, k)]
        with mp.workdps(120):
            chernoff = log_integral(pair, [mp.mpf("0.5")] * 2)
            jensen = -entropy(pair[0]) - log_integral(pair, [1, 1])
        for value, truth in ((found.log_chernoff[j, k], chernoff), (found.jensen[j, k], jensen)):
            assert abs(float(value) - truth) <= bar * EPS * (dim + abs(truth)), (j, k, float(value), float(truth))
    assert bool((found.log_chernoff <= 0).all())


@pytest.mark.parametrize("powers", [(0.5, 0.5), (1, 1), (1 / 3, 1 / 3, 1 / 3)])
def test_the_reference_is_the_integral(powers):
    """On a grid of the plane, in extended precision."""
    c = random(0, len(powers), 2)
    grid = np.arange(-30, 30, 0.1, dtype=np.longdouble)
    x = np.stack(np.meshgrid(grid, grid, indexing="ij"), -1)
    log_p = 0
    for k, power in enumerate(powers):
        factor, loc = (v[k].numpy().astype(np.longdouble) for v in (c.scale, c.loc))
        first = (x[..., 0] - loc[0]) / factor[0, 0]
        second = (x[..., 1] - loc[1] - factor[1, 0] * first) / factor[1, 1]
        norm = np.log(factor[0, 0] * factor[1, 1]) + np.log(2 * np.longdouble(np.pi))
        log_p = log_p - np.longdouble(power) * (0.5 * (first**2 + second**2) + norm)
    integral = float(np.exp(log_p).sum() * np.longdouble(0.1) ** 2)
    reference = log_integral([exactly(c, k) for k in range(len(powers))], list(map(mp.mpf, powers)))
    assert float(mp.exp(reference)) == pytest.approx(integral, rel=1e-12)


@pytest.mark.parametrize("full_a", [False, True])
@pytest.mark.parametrize("full_b", [False, True])
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_closed_forms(full_a, full_b, dim):
    check(random(1, 3, dim, full=full_a), random(2, 2, dim, full=full_b))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("ratio", [1e-8, 1e-4, 1e4, 1e8])
def test_scales_and_means_far_apart(full, ratio):
    a, b = random(3, 2, 3, full=full), random(4, 2, 3, full=full)
    check(a, b._replace(scale=ratio * b.scale))
    check(a._replace(scale=ratio * a.scale), b)
    check(a, b._replace(loc=b.loc + 1e4))


@pytest.mark.parametrize("dim", [2, 64])
def test_sixty_four_dimensions(dim):
    """By Cholesky factors in 40 digits: precision matrices would take minutes."""
    a, b = random(5, 1, dim, log_scale=0.2), random(6, 1, dim, log_scale=0.2)
    pair = [exactly(a, 0), exactly(b, 0)]
    with mp.workdps(40):
        total = sum((factor * factor.T for _, factor in pair), mp.matrix(dim, dim))
        root = mp.cholesky(total)
        shift = pair[0][0] - pair[1][0]
        square, log_det = (shift.T * mp.lu_solve(total, shift))[0], sum(mp.log(root[i, i]) for i in range(dim))
        own = [sum(mp.log(factor[i, i]) for i in range(dim)) for _, factor in pair]
        product = -square / 2 - log_det - mp.mpf(dim) / 2 * mp.log(2 * mp.pi)
        chernoff = -square / 4 - log_det + mp.mpf(dim) / 2 * mp.log(2) + sum(own) / 2  # C = (S_a + S_b)/2
        if dim == 2:
            assert mp.almosteq(product, log_integral(pair, [1, 1]), 1e-30)
            assert mp.almosteq(chernoff, log_integral(pair, [mp.mpf("0.5")] * 2), 1e-30)
        jensen = -entropy(pair[0]) - product
    found = overlaps(a, b)
    assert float(found.log_chernoff) == pytest.approx(float(chernoff), rel=1e-14)
    assert float(found.jensen) == pytest.approx(float(jensen), rel=1e-14)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("unit", [1.0, 1e-8, 1e8, 1e-100])
@pytest.mark.parametrize("dim", [1, 8, 64])
def test_identical_gaussians_whatever_the_units(full, unit, dim):
    c = random(7, 1, dim, full=full, log_scale=0.2)
    c = Components(c.log_weights, unit * c.loc, unit * c.scale)
    loc, scale = c.loc.clone().requires_grad_(), c.scale.clone().requires_grad_()
    found = overlaps(Components(c.log_weights, loc, scale), c)
    assert -dim * EPS <= found.log_chernoff.item() <= 0
    assert found.jensen.item() == pytest.approx(0.5 * dim * (math.log(2) - 1), rel=1e-14)
    gradient = torch.autograd.grad(found.log_chernoff.sum(), (loc, scale))
    lower = gradient[0], gradient[1].tril() if full else gradient[1]
    assert all(float(x.abs().max()) * unit <= 100 * EPS for x in lower)


def test_the_sum_of_logarithms_has_units():
    """Must fail: log R - (log L_a + log L_b)/2, every logarithm on its own."""
    c = random(8, 1, 64, full=False)
    scale = 1e-100 * c.scale
    textbook = (scale * math.sqrt(2)).log().sum(-1) - scale.log().sum(-1) - 32 * math.log(2)
    exact = overlaps(c._replace(scale=scale), c._replace(scale=scale)).log_chernoff
    assert float(exact) == 0
    assert float(textbook.abs()) > 100 * EPS


def test_nearly_identical_diagonal_gaussians_keep_their_digits():
    c = random(9, 1, 4, full=False)
    other = c._replace(scale=c.scale * (1 + 1e-10), loc=c.loc)
    pair = [exactly(c, 0), exactly(other, 0)]
    truth = log_integral(pair, [mp.mpf("0.5")] * 2)  # -1e-20
    assert float(overlaps(c, other).log_chernoff) == pytest.approx(float(truth), rel=1e-14)


def test_batches_broadcast():
    parts = [random(s, 3, 2) for s in range(6)]
    a = Components(*(torch.stack(x).reshape(3, 1, *x[0].shape) for x in zip(*parts[:3], strict=True)))
    b = Components(*(torch.stack(x).unsqueeze(0) for x in zip(*parts[3:], strict=True)))
    found = overlaps(a, b)
    for i, j in itertools.product(range(3), range(3)):
        for x, y in zip(overlaps(parts[i], parts[3 + j]), found, strict=True):
            torch.testing.assert_close(x, y[i, j], rtol=1e-14, atol=1e-15)


# -------------------------------------------------------------------------------------- several at once


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("dim", [1, 3])
def test_sums_of_geometric_overlaps(full, n, dim):
    c = random(10 + n, 4, dim, full=full)
    truth = mp.mpf(0)
    for chosen in itertools.combinations(range(4), n):
        log_w = mp.fsum(mp.mpf(float(c.log_weights[k])) for k in chosen) / n
        truth += mp.exp(log_w + log_integral([exactly(c, k) for k in chosen], [mp.mpf(1) / n] * n))
    assert float(geometric_overlaps(c, n)) == pytest.approx(float(truth), rel=1e-13)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("unit", [2.0**-700, 2.0**700])
def test_geometric_overlaps_whatever_the_unit(full, unit):
    c = random(14, 4, 3, full=full)
    truth = geometric_overlaps(c, 3)
    value = geometric_overlaps(c._replace(loc=c.loc * unit, scale=c.scale * unit), 3)
    torch.testing.assert_close(value, truth, rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("ratio", [1e-8, 1e-4, 1e4, 1e8])
def test_geometric_overlaps_of_a_needle(full, ratio):
    c = random(20, 3, 3, full=full, spread=0.5)
    scale = c.scale.clone()
    scale[1] *= ratio
    c = c._replace(scale=scale)
    truth = sum(map(mp.mpf, c.log_weights.tolist())) / 3 + log_integral(
        [exactly(c, k) for k in range(3)], [mp.mpf(1) / 3] * 3
    )
    assert float(geometric_overlaps(c, 3)) == pytest.approx(float(mp.exp(truth)), rel=1e-12)


@pytest.mark.parametrize("full", [False, True])
def test_geometric_overlaps_far_from_the_origin(full):
    """Must fail: sum m'Pm - b'A^-1 b, which the textbook subtracts."""
    c = random(21, 3, 3, full=full, spread=0.5)
    far = c._replace(loc=c.loc + 1e6)
    truth = sum(map(mp.mpf, c.log_weights.tolist())) / 3
    truth += log_integral([exactly(far, k) for k in range(3)], [mp.mpf(1) / 3] * 3)
    assert float(geometric_overlaps(far, 3)) == pytest.approx(float(mp.exp(truth)), rel=1e-12)
    scale = torch.diag_embed(far.scale) if far.is_diagonal else far.scale
    precision = (scale @ scale.mT).inverse()
    pulled = (precision @ far.loc.unsqueeze(-1)).mean(0)
    form = (far.loc.unsqueeze(-2) @ precision @ far.loc.unsqueeze(-1)).mean() - pulled.mT @ precision.mean(
        0
    ).inverse() @ pulled
    log_det = -log_determinants(far).mean() - 0.5 * precision.mean(0).logdet()
    textbook = torch.exp(far.log_weights.mean() + log_det - 0.5 * form)
    assert float(textbook) != pytest.approx(float(mp.exp(truth)), rel=1e-6)


def test_geometric_overlaps_agree_with_those_of_pairs():
    c = random(22, 5, 8)
    first, second = component_pairs(5, c.loc.device)
    log_w = 0.5 * (c.log_weights[first] + c.log_weights[second])
    expected = (log_w + overlaps(c, c).log_chernoff[first, second]).exp().sum()
    torch.testing.assert_close(geometric_overlaps(c, 2), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("full", [False, True])
def test_far_apart_is_zero_with_gradient_zero(full):
    c = random(23, 3, 2, full=full)
    leaves = [x.clone().requires_grad_() for x in c._replace(loc=torch.diag(torch.ones(3, dtype=F64))[:, :2] * 1e4)]
    value = geometric_overlaps(Components(*leaves), 3)
    assert value.item() == 0
    assert all(bool((x == 0).all()) for x in torch.autograd.grad(value, leaves))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_zero_weights(full, n):
    c = random(24, 4, 2, full=full)
    log_w = torch.log_softmax(c.log_weights[1:], -1)
    leaves = [
        x.clone().requires_grad_()
        for x in c._replace(log_weights=torch.cat([torch.full((1,), -math.inf, dtype=F64), log_w]))
    ]
    value = geometric_overlaps(Components(*leaves), n)
    rest = Components(log_w, c.loc[1:], c.scale[1:])
    expected = geometric_overlaps(rest, n) if n < 4 else torch.zeros((), dtype=F64)
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)
    assert all(bool(x.isfinite().all()) for x in torch.autograd.grad(value, leaves))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", ["log_chernoff", "jensen", "geometric 2", "geometric 3", "divergences"])
def test_gradients(full, name):
    a, b = random(25, 3, 3, full=full, spread=0.7), random(26, 2, 3, full=full, spread=0.7)

    def f(lw, loc, scale):
        c = Components(lw, loc, scale.tril() if full else scale)
        if name.startswith("geometric"):
            return geometric_overlaps(c, int(name[-1]))
        return divergences(c, b) if name == "divergences" else getattr(overlaps(c, b), name)

    assert torch.autograd.gradcheck(f, tuple(x.clone().requires_grad_() for x in a), fast_mode=False)


@pytest.mark.parametrize("full", [False, True])
def test_whitening_makes_the_mean_covariance_the_identity(full):
    c = random(27, 5, 3, full=full)
    c = c._replace(scale=1e-6 * c.scale, loc=c.loc + 1e3)
    w = whitening(c)
    scale = torch.diag_embed(w.scale) if w.is_diagonal else w.scale
    mean = (scale @ scale.mT).mean(0)
    covariance = mean if full else torch.diag_embed(mean.diagonal())
    torch.testing.assert_close(covariance, torch.eye(3, dtype=F64), rtol=1e-12, atol=1e-12)
    assert bool((w.scale.diagonal(dim1=-2, dim2=-1) > 0).all()) if full else True


@pytest.mark.parametrize("full", [False, True])
def test_under_vmap(full):
    parts = [random(s, 4, 2, full=full) for s in range(30, 33)]
    batch = [torch.stack(x) for x in zip(*parts, strict=True)]
    for n in (2, 3, 4):
        mapped = torch.vmap(lambda *x, n=n: geometric_overlaps(Components(*x), n))(*batch)
        torch.testing.assert_close(mapped, geometric_overlaps(Components(*batch), n), rtol=1e-13, atol=1e-15)
    mapped = torch.vmap(lambda *x: overlaps(Components(*x), Components(*x)))(*batch)
    for x, y in zip(mapped, overlaps(Components(*batch), Components(*batch)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-14)
