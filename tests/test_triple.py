"""The three-component integral against integrals of the definition, on the line, in the plane and embedded in space."""

from __future__ import annotations

import functools
import math

import mpmath as mp
import numpy as np
import pytest
import torch
from torch import Tensor

from stablekl.mixtures.components import Components
from stablekl.mixtures.engines import triple_terms
from stablekl.mixtures.engines.spectral import label_entropy_given_sample, label_information
from stablekl.mixtures.engines.triple import triple_information, triple_term
from stablekl.mixtures.engines.triple_terms import RULE_ERROR, Rule, geometry, log_moment, plane_rule, spectrum

from .mixture_references import F64, affine_map, embedded

# What torch's own transforms and compiler warn about, wherever they are used.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

CPU = torch.device("cpu")
BAR = 2e-14
STENCIL = {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12}  # of the first derivative, to fourth order
Problem = tuple[Tensor, Tensor, Tensor]


# ----------------------------------------------------------------------------------------------- problems

KINDS = ("plain", "tiny weights", "near", "far", "scales", "far, tiny weights")
COUNT = 60


@functools.cache
def problems(kind: str) -> Problem:
    """Log-weights, means and standard deviations on the line, [60, 3]."""
    g = torch.Generator().manual_seed(KINDS.index(kind))

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=F64)

    def normal() -> Tensor:
        return torch.randn(COUNT, 3, generator=g, dtype=F64)

    weights, loc, scale = torch.zeros(COUNT, 3, dtype=F64), normal(), torch.exp(0.4 * normal())
    if kind == "plain":
        weights = normal()
    elif kind == "tiny weights":
        weights = -21 * uniform(COUNT, 3)
    elif kind == "near":
        distance = 10 ** (-8 * uniform(COUNT, 1))
        loc, scale = loc * distance, torch.exp(distance * normal())
    elif kind == "far":
        weights, loc = normal(), 7 * loc
    elif kind == "scales":
        weights, loc, scale = 2 * normal(), loc * 10 ** (2 * uniform(COUNT, 1) - 1), 10 ** (4 * uniform(COUNT, 3) - 2)
    else:
        weights, loc, scale = -21 * uniform(COUNT, 3), 7 * loc, 10 ** (2 * uniform(COUNT, 3) - 1)
    return torch.log_softmax(weights, -1), loc, scale


def on_a_line(problem: Problem) -> Components:
    log_weights, loc, scale = problem
    return Components(log_weights, loc.unsqueeze(-1), scale.unsqueeze(-1))


def lower_factor(a: Tensor) -> Tensor:
    """The Cholesky factor of A A', without forming it."""
    r = torch.linalg.qr(a.mT).R
    return r.mT * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)


def in_space(problem: Problem, dim: int, stretch: float = 1.0) -> Components:
    """The same divergences in D dimensions, with full covariances, each seen through an affine map of its own."""
    log_weights, loc, scale = problem
    a = torch.stack([affine_map(dim, i) for i in range(len(loc))])
    a = (a * torch.logspace(0, -math.log10(stretch), dim, dtype=F64).unsqueeze(-1)).unsqueeze(1)
    deviations = torch.cat([scale.unsqueeze(-1), scale.new_ones(*scale.shape, dim - 1)], -1)
    return Components(log_weights, loc.unsqueeze(-1) * a[..., 0], lower_factor(a * deviations.unsqueeze(-2)))


# ------------------------------------------------------------------------------------------------- truths


def line(problem: Problem, n: int, scores: bool = False) -> np.ndarray:
    """sum_k w_k KL(p_k || m) by Gauss-Legendre panels in extended precision.

    With ``scores`` the derivatives instead, [60, 3, 3]: by log-weight, mean and standard deviation of each component,
    the integrals of log(p_k/m) times the derivative of w_k p_k (those of log(p_k/m) itself add up to zero).
    """
    wide = np.longdouble
    nodes, weights = (x.astype(wide) for x in np.polynomial.legendre.leggauss(n))
    results = []
    for lw, m, s in zip(*(x.numpy().astype(wide) for x in problem), strict=True):
        lw = lw - np.logaddexp.reduce(lw)
        edges = np.unique((m[:, None] + s[:, None] * np.arange(-14, 15, dtype=wide)).ravel())
        half = np.diff(edges)[:, None] / 2
        x = (edges[:-1, None] + half + half * nodes).ravel()
        z = (x - m[:, None]) / s[:, None]
        log_p = -z * z / 2 - np.log(s)[:, None] - np.log(2 * wide(np.pi)) / 2
        a = np.exp(log_p + lw[:, None])
        terms = a * (log_p - np.logaddexp.reduce(log_p + lw[:, None], 0)) * (half * weights).ravel()
        if scores:
            factors = np.stack([np.ones_like(z), z / s[:, None], (z * z - 1) / s[:, None]])
            results.append((factors * terms).sum(-1).T)
        else:
            results.append(terms.sum())
    return np.array(results).astype(float)


def precise_line(problem: Problem) -> mp.mpf:
    """The same for one problem whose components nearly coincide, to 30 digits."""
    lw, m, s = ([mp.mpf(v) for v in x.tolist()] for x in problem)
    total = sum(mp.exp(v) for v in lw)
    w = [mp.exp(v) / total for v in lw]

    def f(x: mp.mpf) -> mp.mpf:
        p = [mp.exp(-(((x - a) / b) ** 2) / 2) / b / mp.sqrt(2 * mp.pi) for a, b in zip(m, s, strict=True)]
        q = sum(u * v for u, v in zip(w, p, strict=True))
        return sum(u * v * mp.log(v / q) for u, v in zip(w, p, strict=True))

    return mp.quad(f, [-16, -8, -4, 0, 4, 8, 16], method="gauss-legendre", maxdegree=5)


def plane(log_weights: Tensor, loc: Tensor, factor: Tensor, step: float) -> float:
    """The definition in two dimensions, by a trapezoid rule in extended precision."""
    wide = np.longdouble
    axes = []
    for i in range(2):  # not np.arange(start, ...), which rounds the step to eps * start
        reach = 9 * np.linalg.norm(factor.numpy()[:, i], axis=-1)
        low, high = (loc[:, i].numpy() - reach).min(), (loc[:, i].numpy() + reach).max()
        axes.append(wide(low) + wide(step) * np.arange(int((high - low) / step) + 1))
    x, y = np.meshgrid(*axes, indexing="ij")
    log_p = []
    for m, f in zip(loc.numpy().astype(wide), factor.numpy().astype(wide), strict=True):
        u = (x - m[0]) / f[0, 0]
        v = (y - m[1] - f[1, 0] * u) / f[1, 1]
        log_p.append(-(u * u + v * v) / 2 - np.log(f[0, 0] * f[1, 1]) - np.log(2 * wide(np.pi)))
    log_a = np.stack(log_p) + (lambda lw: lw - np.logaddexp.reduce(lw))(log_weights.numpy().astype(wide))[:, None, None]
    terms = np.exp(log_a) * (np.stack(log_p) - np.logaddexp.reduce(log_a, 0))
    return float(terms.sum() * wide(step) ** 2)


@functools.cache
def plane_problems() -> tuple[Components, np.ndarray]:
    """Genuinely two-dimensional: neither means on a line nor covariances with a common basis; 10 problems."""
    g = torch.Generator().manual_seed(11)
    a = torch.randn(10, 3, 2, 2, generator=g, dtype=F64) + torch.eye(2, dtype=F64)
    factor = torch.linalg.cholesky(a @ a.mT + torch.eye(2, dtype=F64))
    loc = torch.randn(10, 3, 2, generator=g, dtype=F64) * torch.linspace(0.1, 3, 10, dtype=F64)[:, None, None]
    log_weights = torch.log_softmax(torch.randn(10, 3, generator=g, dtype=F64), -1)
    return Components(log_weights, loc, factor), np.array(
        [plane(*p, 0.11) for p in zip(log_weights, loc, factor, strict=True)]
    )


# ------------------------------------------------------------------------------------------------ the rule


def rule_errors(rule: Rule) -> np.ndarray:
    """|rule(a) - t(a)| / (a_1 + a_2 + a_3) for many a: what an integral over any mixture can be off by."""
    g = np.random.default_rng(0)
    r = np.concatenate(
        [np.zeros((3, 1)), 0.1 * g.normal(size=(3, 200)), 3 * g.normal(size=(3, 500)), g.uniform(-60, 0, (3, 1500))], 1
    )
    r -= r.max(0)
    a = np.exp(r)
    t = sum(-x * np.log(x) for x in (a[0], a[1], a[2], a.sum(0)))
    t += sum(x * np.log(x) for x in (a[0] + a[1], a[0] + a[2], a[1] + a[2]))
    omega = (rule.radius[:, None] * rule.direction[:, None, :]).numpy().reshape(-1, 3)
    kernel = torch.complex(rule.real, rule.imag).numpy().ravel()
    parts = []
    for i in range(0, r.shape[1], 200):
        turn = omega @ r[:, i : i + 200]
        parts.append(kernel.real @ np.cos(turn) - kernel.imag @ np.sin(turn))
    return np.abs(np.exp(r.mean(0)) * np.concatenate(parts) - t) / a.sum(0)


def test_the_rule_is_right_for_every_mixture():
    rule = plane_rule(CPU)
    assert rule.real.shape == (132, 85)
    worst = rule_errors(rule).max()
    print(f"largest error of the rule: {worst:.2e}")
    assert worst < RULE_ERROR


def test_half_the_directions_are_not_enough():
    rule = plane_rule(CPU)
    half = Rule(rule.direction[::2], rule.radius, 2 * rule.real[::2], 2 * rule.imag[::2])
    assert rule_errors(half).max() > 100 * RULE_ERROR


def test_constants_of_the_rule():
    zeros, slope = triple_terms._bessel_zeros(85)
    for k in (1, 2, 3, 40, 85):
        with mp.workdps(30):
            z = mp.besseljzero(0, k)
            assert abs(zeros[k - 1] / z - 1) < 1e-15
            assert abs(slope[k - 1] - mp.besselj(1, z)) < 3e-15
    for omega in (0.0, 0.4, 3.0, 11.0):
        z = 2 / 3 - 1j * omega
        assert abs(triple_terms._gamma(np.array([z]))[0] / complex(mp.gamma(z)) - 1) < 2e-14


@pytest.mark.parametrize("dim", [1, 3])
def test_log_moment_from_the_definition(dim):
    g = torch.Generator().manual_seed(dim)
    loc = torch.randn(3, dim, generator=g, dtype=F64)
    a = torch.randn(3, dim, dim, generator=g, dtype=F64)
    factor = lower_factor(a)
    frame = geometry(loc[None], factor[None])
    rule = plane_rule(CPU)
    real, imag = log_moment(frame, spectrum(frame, rule.direction), rule)
    with mp.workdps(40):
        factors = [mp.matrix(f.tolist()) for f in factor]
        precisions = [(f * f.T) ** -1 for f in factors]
        means = [mp.matrix(m.tolist()) for m in loc]
        for n, k in ((0, 0), (17, 30), (100, 60)):
            u, r = rule.direction[n], rule.radius[k]
            s = [mp.mpf(1) / 3 + 1j * mp.mpf(float(r)) * mp.mpf(float(v)) for v in u]
            s[2] = 1 - s[0] - s[1]
            total, b = mp.zeros(dim), mp.zeros(dim, 1)
            result = mp.mpf(0)
            for si, p, m, f in zip(s, precisions, means, factors, strict=True):
                total, b = total + si * p, b + si * (p * m)
                result -= si * (sum(mp.log(f[i, i]) for i in range(dim)) + (m.T * p * m)[0] / 2)
            result += (b.T * mp.lu_solve(total, b))[0] / 2
            expected = mp.exp(result) / mp.sqrt(mp.det(total))
            found = mp.exp(mp.mpc(float(real[0, n, k]), float(imag[0, n, k])))
            # the square root of the determinant has two signs; the right one is in the value of the integral
            assert min(abs(found - expected), abs(found + expected)) < 1e-13 * abs(expected)


# -------------------------------------------------------------------------------------------- the accuracy


@pytest.mark.parametrize("kind", KINDS)
def test_information_on_a_line(kind):
    problem = problems(kind)
    truth = line(problem, 24)
    value, error = triple_information(on_a_line(problem))
    off = np.abs(value.numpy() - truth)
    print(f"{kind}: {off.max():.1e}")
    assert off.max() < BAR
    assert (off < error.numpy()).all()
    assert error.max() < 3.5e-14


@pytest.mark.parametrize("dim", [2, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_information_in_space(kind, dim):
    problem = tuple(x[::4] for x in problems(kind))
    truth = line(problem, 24)
    value, error = triple_information(in_space(problem, dim))
    off = np.abs(value.numpy() - truth)
    assert off.max() < BAR
    assert (off < error.numpy()).all()


def test_the_reference_has_converged():
    for kind in KINDS:
        some = tuple(x[::6] for x in problems(kind))
        assert np.abs(line(some, 24) - line(some, 16)).max() < 1e-15


@pytest.mark.parametrize("dim", [2, 8, 32])
def test_information_in_the_plane(dim):
    p, truth = plane_problems()
    if dim > 2:
        g = torch.Generator().manual_seed(dim)
        loc = torch.cat([p.loc, torch.randn(10, 1, dim - 2, generator=g, dtype=F64).expand(10, 3, -1)], -1)
        block = torch.eye(dim, dtype=F64).repeat(10, 3, 1, 1)
        block[..., :2, :2] = p.scale
        a = affine_map(dim, 5)
        p = Components(p.log_weights, loc @ a.mT, lower_factor(a @ block))
    value, error = triple_information(p)
    off = np.abs(value.numpy() - truth)
    print(f"D = {dim}: {off.max():.1e}")
    assert off.max() < BAR
    assert (off < error.numpy()).all()


def test_the_plane_has_converged():
    p, truth = plane_problems()
    assert abs(plane(p.log_weights[3], p.loc[3], p.scale[3], 0.08) - truth[3]) < 2e-15


@pytest.mark.parametrize("stretch", [1e3, 1e6])
def test_the_error_knows_the_condition_number(stretch):
    problem = tuple(x[::4] for x in problems("plain"))
    value, error = triple_information(in_space(problem, 8, stretch))
    off = np.abs(value.numpy() - line(problem, 24))
    assert (off < error.numpy()).all()
    assert off.max() > error.max() / 1e3


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.5, 0.3, 0.2), (0.9, 0.0999, 1e-4)])
@pytest.mark.parametrize("distance", [1e-3, 1e-8])
def test_near_identical_components_keep_relative_accuracy(weights, distance):
    log_weights = torch.tensor(weights, dtype=F64).log().log_softmax(-1)
    loc = torch.tensor([0.0, 1.0, -0.7], dtype=F64) * distance
    scale = 1 + distance * torch.tensor([0.3, -0.6, 0.9], dtype=F64)
    with mp.workdps(45):
        truth = precise_line((log_weights, loc, scale))
    p = Components(log_weights, loc.unsqueeze(-1), scale.unsqueeze(-1))
    value = float(triple_information(p)[0])
    assert abs(value / float(truth) - 1) < 3e-12
    # two dimensions, in which the second changes nothing but the factors are full
    factor = torch.zeros(3, 2, 2, dtype=F64)
    factor[:, 0, 0], factor[:, 1, 0], factor[:, 1, 1] = scale, 0.5 * scale, 1.0
    full = Components(log_weights, loc.unsqueeze(-1) * torch.tensor([1.0, 0.5], dtype=F64), factor)
    assert abs(float(triple_information(full)[0]) / float(truth) - 1) < 3e-8 * max(1, 1e-8 / distance)
    # H(w) - H(Z|X), the textbook form
    pairs = sum(label_entropy_given_sample(pair(p, i, j)) for i, j in ((0, 1), (0, 2), (1, 2)))
    entropy = -(log_weights * log_weights.exp()).sum()
    textbook = float(entropy - (pairs - triple_term(p)))
    assert abs(textbook / float(truth) - 1) > 1e-10


# ----------------------------------------------------------------------------------------------- the edges


def pair(p: Components, i: int, j: int) -> Components:
    return Components(p.log_weights[..., [i, j]], p.loc[..., [i, j], :], p.scale[..., [i, j], :])


def random_components(full: bool, dim: int = 3, batch: tuple[int, ...] = (), seed: int = 0) -> Components:
    g = torch.Generator().manual_seed(seed)
    log_weights = torch.randn(*batch, 3, generator=g, dtype=F64).log_softmax(-1)
    loc = torch.randn(*batch, 3, dim, generator=g, dtype=F64)
    if not full:
        return Components(log_weights, loc, torch.randn(*batch, 3, dim, generator=g, dtype=F64).exp())
    a = torch.randn(*batch, 3, dim, dim, generator=g, dtype=F64)
    return Components(log_weights, loc, torch.linalg.cholesky(a @ a.mT + torch.eye(dim, dtype=F64)))


def value_and_gradients(p: Components) -> tuple[Tensor, tuple[Tensor, ...]]:
    inputs = [x.clone().requires_grad_() for x in p]
    value = triple_information(Components(*inputs))[0]
    return value.detach(), torch.autograd.grad(value.sum(), inputs)


@pytest.mark.parametrize("full", [False, True])
def test_a_zero_weight_leaves_a_pair(full):
    p = random_components(full)
    p = p._replace(log_weights=torch.tensor([0.6, 0.0, 0.4], dtype=F64).log())
    value, gradients = value_and_gradients(p)
    two = Components(*(x[[0, 2]].clone().requires_grad_() for x in p))
    expected = label_information(two)
    assert value == expected
    for found, wanted in zip(gradients, torch.autograd.grad(expected, two), strict=True):
        assert torch.equal(found[[0, 2]], wanted)
        assert (found[1] == 0).all()
    assert triple_term(p) == 0


@pytest.mark.parametrize("full", [False, True])
def test_identical_components_have_no_information(full):
    p = random_components(full)
    same = Components(p.log_weights, p.loc[:1].repeat(3, 1), p.scale[:1].expand_as(p.scale).clone())
    value, gradients = value_and_gradients(same)
    assert value == 0
    assert all((g == 0).all() for g in gradients)
    twice, _ = value_and_gradients(Components(p.log_weights, p.loc[[0, 0, 1]], p.scale[[0, 0, 1]]))
    merged = torch.stack([p.log_weights[:2].logsumexp(0), p.log_weights[2]])
    assert abs(twice - label_information(Components(merged, p.loc[:2], p.scale[:2]))) < BAR


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("change", ["means 1e30", "means 1e200", "scales 1e150", "all 1e-160", "log-weight -1e5"])
def test_extremes_stay_finite(full, change):
    lw, loc, scale = random_components(full)
    if change.startswith("means"):
        loc = loc * float(change.split()[1])
    elif change.startswith("scales"):
        scale = scale * torch.tensor([1e-150, 1, 1e150], dtype=F64).reshape(3, *[1] * (scale.ndim - 1))
    elif change.startswith("all"):
        loc, scale = loc * 1e-160, scale * 1e-160
    else:
        lw = torch.tensor([-1.0, -1e5, -0.5], dtype=F64)
    value, gradients = value_and_gradients(Components(lw, loc, scale))
    assert value.isfinite()
    assert 0 <= value <= math.log(3)
    assert all(g.isfinite().all() for g in gradients)
    if change.startswith(("means", "scales")):
        assert abs(value + (lw * lw.exp()).sum()) < BAR  # apart, in place or in scale


@pytest.mark.parametrize("full", [False, True])
def test_symmetry_and_homogeneity(full):
    p = random_components(full)
    value, term = triple_information(p)[0], triple_term(p)
    for order in ([1, 2, 0], [1, 0, 2], [2, 1, 0]):
        assert abs(triple_information(Components(*(x[order] for x in p)))[0] - value) < 4e-16
    heavier = triple_term(p._replace(log_weights=p.log_weights + 3))
    assert abs(heavier / (math.exp(3) * term) - 1) < 1e-14
    assert 0 < term < math.log(64 / 27) / 3
    diagonal = random_components(False)
    factors = diagonal._replace(scale=torch.diag_embed(diagonal.scale))
    assert abs(triple_term(factors) - triple_term(diagonal)) < 1e-15


def test_pairs_less_the_triple_are_the_entropy():
    p = random_components(False)
    entropy = sum(label_entropy_given_sample(pair(p, i, j)) for i, j in ((0, 1), (0, 2), (1, 2))) - triple_term(p)
    expected = -(p.log_weights * p.log_weights.exp()).sum() - triple_information(p)[0]
    assert abs(entropy - expected) < BAR


def test_batches_blocks_and_dtypes(monkeypatch):
    for full in (False, True):
        p = random_components(full, batch=(2, 3))
        value, error = triple_information(p)
        assert value.shape == error.shape == (2, 3)
        assert not error.requires_grad
        one = triple_information(Components(*(x[1, 2] for x in p)))[0]
        assert abs(value[1, 2] - one) < 4e-16
        _, gradients = value_and_gradients(p)
        with monkeypatch.context() as m:
            m.setattr(triple_terms, "BLOCK", 40_000)
            assert (triple_information(p)[0] - value).abs().max() < 4e-16
            for a, b in zip(value_and_gradients(p)[1], gradients, strict=True):
                assert (a - b).abs().max() < 1e-15 * b.abs().max().clamp(min=1)
        assert triple_information(Components(*(x[:0] for x in p)))[0].shape == (0, 3)
        single, bound = triple_information(p.to(torch.float32))
        assert single.dtype == bound.dtype == torch.float32
        assert (single - value).abs().max() < 1e-6


def test_other_numbers_of_components_are_refused():
    p = random_components(False)
    with pytest.raises(ValueError, match=r"three components, got log_weights of shape \(2,\).*kl_estimate"):
        triple_information(Components(*(x[:2] for x in p)))


# ------------------------------------------------------------------------------------------- the gradients


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_on_a_line(kind):
    problem = tuple(x[::6] for x in problems(kind))
    truth = torch.from_numpy(line(problem, 24, scores=True))
    _, gradients = value_and_gradients(on_a_line(problem))
    for k, found in enumerate(gradients):
        expected = truth[..., k]
        size = expected.abs().amax(-1)
        off = (found.reshape(expected.shape) - expected).abs().amax(-1)
        # near identical components the reference keeps an absolute error; the means are divided by the scales
        assert (off <= 1e-10 * size + 3e-13 / problem[2].amin(-1) ** (k > 0)).all()


@pytest.mark.parametrize("kind", ["plain", "far"])
def test_gradients_in_space(kind):
    problem = tuple(x[::10] for x in problems(kind))
    log_weights, loc, scale = (x.clone().requires_grad_() for x in problem)
    weights = log_weights.exp()
    _, m, covariance = embedded(torch.stack([weights.detach(), loc, scale], -1), 6, 1)
    value = triple_information(Components(log_weights, m, torch.linalg.cholesky(covariance)))[0]
    found = torch.stack(torch.autograd.grad(value.sum(), (log_weights, loc, scale)), -1)
    expected = torch.from_numpy(line(problem, 24, scores=True))
    assert (found - expected).abs().max() < 2e-11 * expected.abs().max()


@pytest.mark.parametrize("full", [False, True])
def test_near_identical_gradients_keep_relative_accuracy(full):
    """I is a quadratic form there: the gradient at twice the distance is twice the gradient."""
    p = random_components(full, dim=2)
    towards = [x - x[:1] for x in (p.loc, p.scale)]

    def at(distance: float) -> tuple[Tensor, ...]:
        return value_and_gradients(
            Components(p.log_weights, *(x[:1] + distance * t for x, t in zip(p[1:], towards, strict=True)))
        )[1]

    for near, nearer in zip(at(2.0**-20)[1:], at(2.0**-30)[1:], strict=True):
        assert (near - 2**10 * nearer).abs().max() < 1e-4 * near.abs().max()


@pytest.mark.parametrize("case", ["diagonal", "full", "equal covariances"])
def test_second_derivatives(case):
    p = random_components(case != "diagonal", dim=2)
    if case == "equal covariances":  # every eigenvalue is double: an eigendecomposition has no derivative
        p = p._replace(scale=p.scale[:1].repeat(3, 1, 1))
    g = torch.Generator().manual_seed(3)
    along = [torch.randn(x.shape, generator=g, dtype=F64) for x in p]
    along[2] = along[2] if case == "diagonal" else along[2].tril()
    inputs = [x.clone().requires_grad_() for x in p]
    gradients = torch.autograd.grad(triple_information(Components(*inputs))[0], inputs, create_graph=True)
    slope = sum((x * v).sum() for x, v in zip(gradients, along, strict=True))
    found = torch.autograd.grad(slope, inputs)
    h = 1e-3
    shifted = [Components(*(x + k * h * v for x, v in zip(p, along, strict=True))) for k in STENCIL]
    steps = [value_and_gradients(x)[1] for x in shifted]
    for k, second in enumerate(found):
        expected = sum(c * s[k] for c, s in zip(STENCIL.values(), steps, strict=True)) / h
        assert (second - expected).abs().max() < 1e-8 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("full", [False, True])
def test_transforms(full):
    p = random_components(full, dim=2, batch=(2,))

    def f(*inputs: Tensor) -> Tensor:
        return triple_information(Components(*inputs))[0]

    value, gradients = value_and_gradients(p)
    assert (torch.vmap(f)(*p) - value).abs().max() < 4e-16
    for a, b in zip(torch.vmap(torch.func.grad(f, (0, 1, 2)))(*p), gradients, strict=True):
        assert (a - b).abs().max() < 1e-15
    tangents = tuple(torch.ones_like(x) if i < 2 else torch.ones_like(x).tril() for i, x in enumerate(p))
    _, slope = torch.func.jvp(f, tuple(p), tangents)
    expected = sum((g * t).flatten(1).sum(-1) for g, t in zip(gradients, tangents, strict=True))
    assert (slope - expected).abs().max() < 1e-14
    hessian = torch.func.hessian(lambda loc: f(p.log_weights[0], loc, p.scale[0]))(p.loc[0])
    assert hessian.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
def test_compiled(full):
    p = random_components(full, dim=2, batch=(2,))
    f = torch.compile(lambda *inputs: triple_information(Components(*inputs))[0], fullgraph=True)
    value, gradients = value_and_gradients(p)
    inputs = [x.clone().requires_grad_() for x in p]
    found = f(*inputs)
    assert (found - value).abs().max() < 1e-15
    for a, b in zip(torch.autograd.grad(found.sum(), inputs), gradients, strict=True):
        assert (a - b).abs().max() < 1e-14
