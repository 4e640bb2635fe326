"""Gaussians restricted, conditioned, multiplied and merged, against mpmath's dense formulas."""

from __future__ import annotations

import math

import mpmath as mp
import numpy as np
import pytest
import torch

from stablekl.distributions._gaussian import Gaussian
from stablekl.mixtures.algebra import condition, log_overlap, marginal, matched, positions, product

F64 = torch.float64
T = torch.tensor
EPS = torch.finfo(F64).eps
D, A, B = 5, [3, 0], [1, 2, 4]
KINDS = ["scale_diag", "scale_tril", "covariance_matrix", "precision_matrix", "low_rank"]
# The condition number that a kind's rounding meets: of the factor, or of the matrix that is factorised.
SQUARED = {"covariance_matrix": True, "precision_matrix": True}


def exact(x: torch.Tensor) -> mp.matrix:
    return mp.matrix(x.tolist())


def problem(kind: str, cond: float, seed: int) -> tuple[Gaussian, mp.matrix]:
    """One Gaussian, K = 1, and its covariance from the very numbers that it was given."""
    g = torch.Generator().manual_seed(seed)
    v = torch.linalg.qr(torch.randn(D, D, generator=g, dtype=F64))[0]
    values = torch.logspace(0, -math.log10(cond), D, dtype=F64)
    loc = torch.randn(1, D, generator=g, dtype=F64)
    if kind == "scale_diag":
        scale = values.sqrt()
        return Gaussian(kind, loc, scale[None]), mp.diag([x**2 for x in exact(scale)])
    if kind == "low_rank":
        w, diag = torch.randn(D, 2, generator=g, dtype=F64), values[torch.randperm(D, generator=g)]
        return Gaussian(kind, loc, diag[None], w[None]), exact(w) * exact(w).T + mp.diag(diag.tolist())
    if kind == "scale_tril":
        r = torch.linalg.qr((v * values.sqrt()).mT)[1]
        scale = (r * r.diagonal().sign()[:, None]).mT.tril()
        return Gaussian(kind, loc, scale[None]), exact(scale) * exact(scale).T
    matrix = v * values @ v.mT if kind == "covariance_matrix" else v / values @ v.mT
    matrix = 0.5 * (matrix + matrix.mT)
    covariance = exact(matrix) if kind == "covariance_matrix" else mp.inverse(exact(matrix))
    return Gaussian(kind, loc, matrix[None]), covariance


def block(s: mp.matrix, rows: list[int], columns: list[int]) -> mp.matrix:
    return mp.matrix([[s[i, j] for j in columns] for i in rows])


def log_normal(x: mp.matrix, s: mp.matrix) -> mp.mpf:
    return -((x.T * mp.inverse(s) * x)[0] + mp.log(mp.det(s)) + s.rows * mp.log(2 * mp.pi)) / 2


def covariance(g: Gaussian) -> mp.matrix:
    """Of the first component, exactly."""
    s = exact(g.scale[0])
    if g.kind == "scale_diag":
        return mp.diag([x**2 for x in s])
    if g.cov_factor is not None:
        return exact(g.cov_factor[0]) * exact(g.cov_factor[0]).T + mp.diag(list(s))
    return {"scale_tril": lambda: s * s.T, "covariance_matrix": lambda: s, "precision_matrix": lambda: mp.inverse(s)}[
        g.kind
    ]()


def off(g: Gaussian, mean: mp.matrix, s: mp.matrix) -> tuple[float, float]:
    """Of the mean, in standard deviations, and of the whitened covariance."""
    white = mp.inverse(mp.cholesky(s))
    d = white * (exact(g.loc[0]) - mean)
    w = white * covariance(g) * white.T - mp.eye(s.rows)
    return float(max(abs(x) for x in d)), float(max(abs(x) for x in w))


def unit(kind: str, cond: float) -> float:
    """What rounding of the parameters, eps, does to whitened results."""
    if kind == "scale_diag":
        return EPS
    return EPS * (cond if SQUARED.get(kind) else math.sqrt(cond))


@pytest.mark.parametrize("cond", [1e2, 1e8, 1e12])
@pytest.mark.parametrize("kind", KINDS)
def test_marginal_and_conditional(kind, cond):
    u = unit(kind, cond)
    with mp.workdps(80):
        for seed in range(3):
            g, s = problem(kind, cond, seed)
            mean = exact(g.loc[0])
            s_a, s_ba = block(s, A, A), block(s, B, A)
            restricted = marginal(g, positions(A, D))
            assert restricted.kind == {"precision_matrix": "scale_tril"}.get(kind, kind)
            mean_error, cov_error = off(restricted, block(mean, A, [0]), s_a)
            assert mean_error == 0
            assert cov_error <= (16 * u if kind in ("scale_tril", "precision_matrix") else 1e-70)
            z = torch.randn(len(A), generator=torch.Generator().manual_seed(seed + 100), dtype=F64)
            x = block(mean, A, [0]) + mp.cholesky(s_a) * exact(z)
            value = torch.tensor([float(v) for v in x], dtype=F64)
            d = exact(value) - block(mean, A, [0])
            given = condition(g, positions(A, D), value)
            assert given.gaussian.kind == {"covariance_matrix": "scale_tril"}.get(kind, kind)
            truth = block(mean, B, [0]) + s_ba * mp.inverse(s_a) * d
            rest = block(s, B, B) - s_ba * mp.inverse(s_a) * s_ba.T
            mean_error, cov_error = off(given.gaussian, truth, rest)
            # the rounding of the mean itself, in standard deviations, comes on top
            assert mean_error < 16 * u + 8 * EPS * math.sqrt(cond)
            assert cov_error < 16 * u
            assert abs(given.log_density.item() - log_normal(d, s_a)) < 16 * u + 8 * EPS * math.sqrt(cond)


def test_squares_lose_what_factors_keep():
    """Must fail: the covariance formed from scale_tril, and the Schur complement subtracted, at a condition of 1e12."""
    worst = worst_ours = 0.0
    with mp.workdps(80):
        for seed in range(3):
            g, s = problem("scale_tril", 1e12, seed)
            c = g.scale[0] @ g.scale[0].mT
            truth = block(s, B, B) - block(s, B, A) * mp.inverse(block(s, A, A)) * block(s, A, B)
            schur = c[B][:, B] - c[B][:, A] @ torch.linalg.inv(c[A][:, A]) @ c[A][:, B]
            white = mp.inverse(mp.cholesky(truth))
            worst = max(worst, float(max(abs(x) for x in white * exact(schur) * white.T - mp.eye(3))))
            ours = condition(g, A, g.loc[0, A]).gaussian
            worst_ours = max(worst_ours, off(ours, exact(ours.loc[0]), truth)[1])
    assert worst > 1e-6
    assert worst_ours < 1e-10


@pytest.mark.parametrize("cond", [1e2, 1e8])
@pytest.mark.parametrize("kinds", [(a, b) for i, a in enumerate(KINDS) for b in KINDS[i:]])
def test_product_and_overlap(kinds, cond):
    u = max(unit(k, cond) for k in kinds)
    with mp.workdps(80):
        (p, s_p), (q, s_q) = (problem(k, cond, seed) for seed, k in enumerate(kinds))
        precision = mp.inverse(s_p) + mp.inverse(s_q)
        s = mp.inverse(precision)
        mean = s * (mp.inverse(s_p) * exact(p.loc[0]) + mp.inverse(s_q) * exact(q.loc[0]))
        d = exact(p.loc[0]) - exact(q.loc[0])
        # How far the two means are in the whitened space is what the factors' rounding is multiplied with.
        far = float(mp.sqrt((d.T * precision * d)[0]))
        for first, second in ((p, q), (q, p)):
            result = product(first, second)
            assert result.kind == ("scale_diag" if kinds == ("scale_diag", "scale_diag") else "scale_tril")
            mean_error, cov_error = off(result, mean, s)
            assert cov_error < 16 * max(u, EPS * math.sqrt(cond))
            assert mean_error < 16 * max(u, EPS * math.sqrt(cond)) * (1 + far)
            truth = log_normal(d, s_p + s_q)
            assert abs(log_overlap(first, second).item() - truth) < 64 * max(u, EPS * math.sqrt(cond)) * (
                1 + abs(truth)
            )


def test_product_of_crossed_needles():
    """Each narrow where the other is wide: precisions add up to a well-conditioned one."""
    g = torch.Generator().manual_seed(0)
    v = torch.linalg.qr(torch.randn(2, 2, generator=g, dtype=F64))[0]
    factors = []
    for scales in ([1e-6, 1e6], [1e6, 1e-6]):
        r = torch.linalg.qr((v * torch.tensor(scales, dtype=F64)).mT)[1]
        factors.append((r * r.diagonal().sign()[:, None]).mT.tril())
    p, q = (Gaussian("scale_tril", torch.zeros(1, 2, dtype=F64), f[None]) for f in factors)
    with mp.workdps(80):
        s_p, s_q = (exact(f) * exact(f).T for f in factors)
        s = mp.inverse(mp.inverse(s_p) + mp.inverse(s_q))
        assert off(product(p, q), mp.matrix([0, 0]), s)[1] < 1e-3  # a rounded needle of 1e12 turns by 1e-4
        # must fail: the same in covariances
        a, b = (f @ f.mT for f in factors)
        twin = a @ torch.linalg.solve(a + b, b)
        white = mp.inverse(mp.cholesky(s))
        assert max(abs(x) for x in white * exact(twin) * white.T - mp.eye(2)) > 0.5


def test_extreme_diagonals():
    """Squares of standard deviations that overflow; a mean that stays with the sharp component."""
    p = Gaussian("scale_diag", torch.tensor([[1e10, 0.0]], dtype=F64), torch.tensor([[1e-160, 1e200]], dtype=F64))
    q = Gaussian("scale_diag", torch.tensor([[0.1, 3.0]], dtype=F64), torch.tensor([[1e150, 1e200]], dtype=F64))
    for first, second in ((p, q), (q, p)):
        result = product(first, second)
        torch.testing.assert_close(result.loc, torch.tensor([[1e10, 1.5]], dtype=F64), rtol=1e-15, atol=0)
        expected = torch.tensor([[1e-160, 1e200 / math.sqrt(2)]], dtype=F64)
        torch.testing.assert_close(result.scale, expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("scale", [1.0, 1e-8])
@pytest.mark.parametrize("kind", ["scale_diag", "scale_tril", "low_rank"])
def test_matched_moments(kind, scale):
    """Narrow components far apart: the Cholesky factor of the sum does not exist, and its QR's diagonal is right."""
    g = torch.Generator().manual_seed(1)
    k = 3
    loc, w = torch.randn(k, D, generator=g, dtype=F64), torch.rand(k, generator=g, dtype=F64)
    factor = None
    if kind == "scale_diag":
        given = scale * (torch.rand(k, D, generator=g, dtype=F64) + 0.1)
        squares = [mp.diag([x**2 for x in exact(s)]) for s in given]
    elif kind == "scale_tril":
        given = scale * torch.randn(k, D, D, generator=g, dtype=F64).tril(-1) + scale * torch.eye(D, dtype=F64)
        squares = [exact(s) * exact(s).T for s in given]
    else:
        given = scale**2 * (torch.rand(k, D, generator=g, dtype=F64) + 0.1)
        factor = scale * torch.randn(k, D, 1, generator=g, dtype=F64)
        squares = [exact(f) * exact(f).T + mp.diag(s.tolist()) for s, f in zip(given, factor, strict=True)]
    result = matched((w / w.sum()).log(), Gaussian(kind, loc, given, factor))
    with mp.workdps(80):
        weights = [mp.mpf(x) / sum(map(mp.mpf, w.tolist())) for x in w.tolist()]
        mean, total = mp.zeros(D, 1), mp.zeros(D)
        for x, m in zip(weights, loc, strict=True):
            mean += x * exact(m)
        for x, m, s in zip(weights, loc, squares, strict=True):
            total += x * (s + (exact(m) - mean) * (exact(m) - mean).T)
        truth = mp.cholesky(total)
        diagonal = result.scale.diagonal().tolist()
        assert max(abs(mp.mpf(x) / truth[i, i] - 1) for i, x in enumerate(diagonal)) < 32 * EPS
        white = mp.inverse(truth) * exact(result.scale)
        assert max(abs(x) for x in white * white.T - mp.eye(D)) < 64 * EPS / scale
        summed = torch.tensor([[float(total[i, j]) for j in range(D)] for i in range(D)], dtype=F64)
    if scale < 1:  # must fail: one rounding of the covariance, and the factor is lost
        cholesky, info = torch.linalg.cholesky_ex(summed)
        assert int(info) or abs(cholesky[-1, -1].item() / float(truth[D - 1, D - 1]) - 1) > 1e-3


def test_matched_at_an_offset():
    """A common offset costs nothing; must fail: deviations from the rounded mean."""
    loc = torch.tensor([[2.0**40], [2.0**40 + 2.0**-12]], dtype=F64)
    w = torch.tensor([0.3, 0.7], dtype=F64)
    result = matched(w.log(), Gaussian("scale_diag", loc, torch.full((2, 1), 1e-9, dtype=F64)))
    truth = math.sqrt(0.3 * 0.7) * 2.0**-12
    assert float(result.scale[0, 0]) == pytest.approx(truth, rel=1e-9)
    mean = (w * loc[:, 0]).sum()
    assert math.sqrt(float((w * (loc[:, 0] - mean) ** 2).sum())) != pytest.approx(truth, rel=1e-3)


@pytest.mark.parametrize("unit", [1e-300, 1e-150, 1.0, 1e150, 1e300])
def test_matched_in_any_unit(unit):
    loc, scale = T([[0.0], [2.0]], dtype=F64) * unit, torch.full((2, 1), unit, dtype=F64)
    result = matched(T([0.3, 0.7], dtype=F64).log(), Gaussian("scale_diag", loc, scale))
    assert float(result.scale) == pytest.approx(math.sqrt(1 + 4 * 0.21) * unit, rel=4e-16)


def test_a_component_without_weight_may_be_anything():
    loc = torch.tensor([[0.0], [math.inf], [2.0]], dtype=F64, requires_grad=True)
    scale = torch.tensor([[1.0], [math.nan], [1.0]], dtype=F64, requires_grad=True)
    log_weights = torch.tensor([0.5, 0.0, 0.5], dtype=F64).log()
    result = matched(log_weights, Gaussian("scale_diag", loc, scale))
    assert result.loc.tolist() == [1.0]
    assert float(result.scale.detach()) == pytest.approx(math.sqrt(2), rel=1e-15)
    for g in torch.autograd.grad(result.loc.sum() + result.scale.sum(), [loc, scale]):
        assert bool(g.isfinite().all())
        assert float(g[1]) == 0


@pytest.mark.parametrize(
    ("dims", "message"),
    [([0, 5], "entry 5.* 5 coordinates"), ([-6], "entry -6"), ([1, -4], "coordinate 1 twice"), ([], "empty")],
)
def test_positions(dims, message):
    assert positions([-1, 0], 5) == [4, 0]
    with pytest.raises(ValueError, match=message):
        positions(dims, 5)


@pytest.mark.parametrize(
    "dims",
    [0, T(0), slice(0, 2), None, "01", [0.0], T([0.0]), [True, False], T([True, False, True]), np.array([True, False])],
)
def test_positions_are_integers(dims):
    """A mask would be read as coordinates 1 and 0."""
    assert positions(T([-1, 0]), 5) == positions(np.array([-1, 0]), 5) == positions((T(-1), T(0)), 5) == [4, 0]
    with pytest.raises(ValueError, match="sequence of integers"):
        positions(dims, 5)
