r"""kl_bounds against the divergence from its definition, and the inequalities it is made of.

Where they come from, in a line each, with m = sum_k w_k p_k and q = sum_j v_j q_j:

- information, above (Kolchinsky and Tracey, 2017): log m(x) >= log p_i-average by Jensen for the logarithm of a sum of
  exponentials, sum_j w_j exp(E_i log p_j) <= exp E_i log sum_j w_j p_j, E_i log p_j = E_i log p_i - KL(p_i||p_j);
- information, below: -sum_i w_i log sum_j w_j (integral of sqrt(p_i p_j)), the same of the Chernoff divergence;
- KL(p || q) <= -log sum_j v_j exp(-KL(p || q_j)) (Durrieu et al., 2012): minimise over a distribution u_j the sum of
  u_j (KL(p || q_j) + log u_j/v_j), a bound by the log-sum inequality for each u;
- KL(p || q) >= -H(p) - log E_p q, Jensen; and >= -2 log integral of sqrt(p q), which is subadditive in q;
- Hershey and Olsen (2007): split w_a = sum_b phi_ab and v_b = sum_a psi_ab; by the log-sum inequality KL is at most
  sum_ab phi_ab (log phi_ab/psi_ab + KL(p_a || q_b)), for any such phi and psi;
- Hunter (1976) and Worsley (1982): P(union) <= sum P(A_k) - sum over a tree P(A_i and A_j), since a point in n events
  has at most n - 1 edges of a forest among them; Bonferroni: >= sum P(A_k) - sum over all pairs.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import stablekl
from stablekl.mixtures import bounds as module
from stablekl.mixtures.bounds import closed_bounds, information_bounds, pair_bounds, pairwise_kl, refined_bounds
from stablekl.mixtures.estimate import Bounds
from stablekl.mixtures.reading import as_mixture

from .mixture_references import F64, lines, plane

EPS = 2.0**-52


def table(rng, count, k, separation, decades, log_scale):
    """Rows (weight, mean, standard deviation), weights and scales over so many decades."""
    w = 10.0 ** -(decades * rng.uniform(size=(count, k)))
    m = separation * rng.normal(size=(count, k))
    s = 10.0 ** (log_scale * (rng.uniform(size=(count, k)) - 0.5))
    return np.stack([w / w.sum(1, keepdims=True), m, s], -1)


def on_the_line(rows):
    t = torch.as_tensor(rows, dtype=F64)
    return stablekl.GaussianMixture(probs=t[..., 0], loc=t[..., 1:2], scale_diag=t[..., 2:])


def random(seed, k, dim, *, full=True, batch=(), spread=1.0):
    """Unnormalised log-weights, means, and standard deviations or factors."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(*batch, k, generator=g, dtype=F64)
    loc = spread * torch.randn(*batch, k, dim, generator=g, dtype=F64)
    scale = torch.exp(0.3 * torch.randn(*batch, k, dim, generator=g, dtype=F64))
    if full:
        scale = torch.diag_embed(scale) + 0.3 * torch.randn(*batch, k, dim, dim, generator=g, dtype=F64).tril(-1)
    return [logits, loc, scale]


def build(logits, loc, scale):
    kind = "scale_tril" if scale.ndim > loc.ndim else "scale_diag"
    return stablekl.GaussianMixture(logits=logits, loc=loc, **{kind: scale})


def excess(bounds, truth):
    """By how much the truth leaves the interval, where positive."""
    return torch.maximum(bounds.lower - truth, truth - bounds.upper)


SETTINGS = [(0, 0, 0), (0.3, 0, 1), (1, 3, 1), (3, 0, 0.5), (10, 9, 0.5), (20, 0, 1), (1, 1, 4), (20, 9, 4)]


@pytest.mark.parametrize("k_p", range(1, 7))
def test_never_wrong_on_a_line(k_p):
    """1 to 6 components each, 0 to 20 apart, weights to 1e-9, scales over four decades."""
    rng = np.random.default_rng(k_p)
    for k_q, setting in itertools.product(((1, 2), (3, 6), (4, 5))[k_p % 3], SETTINGS):
        p, q = table(rng, 10, k_p, *setting), table(rng, 10, k_q, *setting)
        b = stablekl.kl_bounds(on_the_line(p), on_the_line(q))
        wrong = excess(b, torch.from_numpy(lines(p, q).astype(np.float64))) > 1e-18
        for i in wrong.nonzero()[:, 0].tolist():  # or is it the reference?
            fine = float(lines(p[i : i + 1], q[i : i + 1], 120)[0])
            assert float(b.lower[i]) <= fine <= float(b.upper[i]), (k_q, setting, p[i], q[i])


def test_never_wrong_in_the_plane():
    rng = np.random.default_rng(0)
    for k_p, k_q in ((1, 3), (2, 1), (4, 2)):
        parts = []
        for k in (k_p, k_q):
            root = rng.normal(size=(k, 2, 2))
            cov = root @ root.transpose(0, 2, 1) / 2 + 0.5 * np.eye(2)
            parts.append((rng.dirichlet(np.ones(k)), 2 * rng.normal(size=(k, 2)), cov))
        truth = torch.tensor(plane(*parts, 0.2), dtype=F64)
        p, q = (
            stablekl.GaussianMixture(
                probs=torch.from_numpy(w), loc=torch.from_numpy(m), covariance_matrix=torch.from_numpy(c)
            )
            for w, m, c in parts
        )
        assert float(excess(stablekl.kl_bounds(p, q), truth)) <= 1e-9 * float(1 + truth)


def test_the_variational_approximation_is_no_bound():
    """Must fail: Hershey and Olsen's other formula, sum_a w_a log(...)/(...), which the module leaves out."""
    rng = np.random.default_rng(1)
    p, q = table(rng, 200, 3, 2, 1, 0.5), table(rng, 200, 3, 2, 1, 0.5)
    truth = torch.from_numpy(lines(p, q).astype(np.float64))
    m_p, m_q = as_mixture(on_the_line(p)), as_mixture(on_the_line(q))
    own, other = (torch.logsumexp(m.log_weights.unsqueeze(-2) - pairwise_kl(m_p, m), -1) for m in (m_p, m_q))
    approximate = (m_p.log_weights.exp() * (own - other)).sum(-1)
    assert bool((approximate < truth - 1e-3).any())
    assert bool((approximate > truth + 1e-3).any())


def test_the_coupling_may_stop_anywhere(monkeypatch):
    rng = np.random.default_rng(2)
    p, q = table(rng, 100, 4, 2, 1, 0.5), table(rng, 100, 3, 2, 1, 0.5)
    truth = torch.from_numpy(lines(p, q).astype(np.float64))
    m_p, m_q = as_mixture(on_the_line(p)), as_mixture(on_the_line(q))
    values = []
    for iterations in (0, 1, 2, 3, 5, 10, 20):
        monkeypatch.setattr(module, "ITERATIONS", iterations)
        values.append(module._variational(m_p, m_q, pairwise_kl(m_p, m_q)))
        assert bool((values[-1] >= truth).all())
    for before, after in itertools.pairwise(values):
        assert bool((after <= before + 1e-13).all())
    assert float((values[0] - values[-1]).max()) > 0.01


def test_trees_are_found():
    """The heaviest of the 16 spanning trees of four points, by trying all."""
    terms = torch.rand(50, 6, generator=torch.Generator().manual_seed(3), dtype=F64)
    index = torch.triu_indices(4, 4, 1).T
    best = torch.zeros(50, dtype=F64)
    for chosen in itertools.combinations(range(6), 3):
        reached = {0}
        for _ in range(3):
            reached |= {j for e in chosen for j in index[e].tolist() if set(index[e].tolist()) & reached}
        if len(reached) == 4:
            best = torch.maximum(best, terms[:, list(chosen)].sum(-1))
    torch.testing.assert_close(module._heaviest_tree(terms, index, 4), best, rtol=1e-15, atol=0)


@pytest.mark.parametrize("full", [False, True])
def test_tight_in_the_limits(full):
    p = random(4, 3, 2, full=full)
    same = [p[0], *(x[:1].expand_as(x) for x in p[1:])]
    far = [p[0], p[1] + 1e3 * torch.eye(3, 2, dtype=F64) * torch.arange(1, 4).unsqueeze(-1), p[2]]
    q = stablekl.MultivariateNormal(torch.zeros(2, dtype=F64), scale_tril=2 * torch.eye(2, dtype=F64))
    for parameters in (same, far):
        m = build(*parameters)
        for b in (stablekl.kl_bounds(m, q), information_bounds(as_mixture(m), as_mixture(m).components())):
            assert bool((b.lower <= b.upper).all())
            assert float(b.upper - b.lower) <= 1e-12 * float(1 + b.upper)
    one = build(*(x[:1] for x in p))
    exact = stablekl.kl_divergence(one, q)
    b = stablekl.kl_bounds(one, q)
    assert float(b.upper - b.lower) <= 1e-13 * float(1 + exact)


def test_three_components_are_known():
    """Pairs less triples are an equality there."""
    m = as_mixture(build(*random(5, 3, 4, batch=(20,)))).components()
    assert float((lambda b: b.upper - b.lower)(pair_bounds(m)).max()) > 1e-3
    b = pair_bounds(m, triples=True)
    tree, pairs = pair_bounds(m), b
    assert bool((pairs.upper <= tree.upper).all())
    information = stablekl.mixtures.engines.triple.triple_information(m)[0]
    assert float((b.upper - information).abs().max()) <= 2e-13
    assert bool((excess(b, information) <= 0).all())


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("unit", [1e-100, 1e-8, 1e8])
@pytest.mark.parametrize("dim", [8, 64])
def test_bounds_know_no_units(full, unit, dim):
    """A lower bound of 2e-14 came above the upper one when logarithms of scales were summed on their own."""
    logits, loc, scale = random(6, 3, dim, full=full)
    scale = scale[:1] * (1 + 1e-13 * torch.rand(3, *([1] * (scale.ndim - 1)), dtype=F64))
    p, q = (build(logits, torch.zeros_like(loc), x) for x in (scale, 1.1 * scale))
    small, scaled = (build(logits, torch.zeros_like(loc), unit * x) for x in (scale, 1.1 * scale))
    m = as_mixture(small)
    b = information_bounds(m, m.components())
    assert float(b.lower) <= 1e-24
    assert float(b.upper) >= 0
    for here, there in zip(stablekl.kl_bounds(p, q), stablekl.kl_bounds(small, scaled), strict=True):
        torch.testing.assert_close(here, there, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------- gradients, transforms


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("k_p", "k_q"), [(1, 3), (3, 1), (4, 2)])
def test_gradients(full, k_p, k_q):
    """Of the coupling, too, which is a constant only at its optimum."""
    leaves = [x.requires_grad_() for seed, k in ((7, k_p), (8, k_q)) for x in random(seed, k, 2, full=full)]

    def f(*x):
        x = [y.tril() if y.ndim == 3 else y for y in x]
        p, q = (as_mixture(build(*part)) for part in (x[:3], x[3:]))
        pairs = pairwise_kl(p, q)
        return (*closed_bounds(p, q, pairs), *refined_bounds(p, q), module._variational(p, q, pairs))

    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)


CHANGES = {
    "zero weight": lambda w, m, s: [w.index_fill(-1, torch.tensor([0]), -math.inf), m, s],
    "two zero weights": lambda w, m, s: [w.index_fill(-1, torch.tensor([0, 1]), -math.inf), m, s],
    "identical components": lambda w, m, s: [w, m[:1].expand_as(m), s[:1].expand_as(s)],
    "far": lambda w, m, s: [w, 1e8 * m, s],
    "very far": lambda w, m, s: [w, 1e150 * m, s],
    "wide": lambda w, m, s: [w, m, 1e8 * s],
    "a needle": lambda w, m, s: [w, m, torch.cat([1e-8 * s[:1], s[1:]])],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("full", [False, True])
def test_no_nan(full, change):
    """Neither for what `simplified` has taken out nor with it left in, as under vmap."""
    for side, raw in itertools.product((0, 1), (False, True)):
        parts = [random(9, 3, 2, full=full), random(10, 3, 2, full=full)]
        parts[side] = CHANGES[change](*parts[side])
        leaves = [x.clone().requires_grad_() for part in parts for x in part]
        p, q = build(*leaves[:3]), build(*leaves[3:])
        b = refined_bounds(as_mixture(p), as_mixture(q)) if raw else stablekl.kl_bounds(p, q)
        assert bool((b.lower >= 0).all() & (b.lower <= b.upper).all())
        for value in b:
            gradient = torch.autograd.grad(value.sum(), leaves, retain_graph=True, allow_unused=True)
            assert all(x is None or bool(x.isfinite().all()) for x in gradient)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("k_p", "k_q"), [(1, 2), (2, 1), (3, 3), (6, 2)])
def test_batches_and_vmap(full, k_p, k_q):
    p, q = random(11, k_p, 2, full=full, batch=(3, 1)), random(12, k_q, 2, full=full, batch=(2,))
    b = stablekl.kl_bounds(build(*p), build(*q))
    assert b.lower.shape == b.upper.shape == (3, 2)
    for i, j in itertools.product(range(3), range(2)):
        one = stablekl.kl_bounds(build(*(x[i, 0] for x in p)), build(*(x[j] for x in q)))
        for x, y in zip(one, b, strict=True):
            torch.testing.assert_close(x, y[i, j], rtol=1e-12, atol=1e-13)
    many = [x.expand(3, 2, *x.shape[2:]).reshape(6, *x.shape[2:]) for x in p]
    other = [x.expand(3, *x.shape).reshape(6, *x.shape[1:]) for x in q]
    mapped = torch.vmap(lambda *x: tuple(stablekl.kl_bounds(build(*x[:3]), build(*x[3:]))))(*many, *other)
    for x, y in zip(mapped, b, strict=True):
        torch.testing.assert_close(x.reshape(3, 2), y, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_outwards(dtype):
    """In half precision there is no eps left below 6e-5."""
    for size in (1.0, 1e-3, 1e-5):
        p = [x.to(dtype) for x in random(13, 3, 2, full=False, batch=(200,))]
        p[0] = torch.zeros_like(p[0])
        q = [x[:, :1].to(dtype) for x in p]
        p = [p[0], (q[1] + size * p[1]).to(dtype), q[2].expand(200, 3, 2)]
        narrow = stablekl.kl_bounds(build(*p), build(*q))
        wide = stablekl.kl_bounds(*(build(*(x.double() for x in part)) for part in (p, q)))
        assert narrow.lower.dtype == dtype
        assert bool((narrow.lower.double() <= wide.lower).all() & (narrow.upper.double() >= wide.upper).all())
        assert bool((narrow.lower >= 0).all())


def test_rounding_to_nearest_is_not_outwards():
    """Must fail: a conversion on its own; and the ends of the range."""
    x = torch.rand(1000, generator=torch.Generator().manual_seed(14), dtype=F64)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        tiny = torch.cat([x, 1e-6 * x, 1e-40 * x])
        assert bool((tiny.to(dtype).double() > tiny).any())
        b = Bounds(tiny, tiny).rounded(dtype)
        assert bool((b.lower.double() <= tiny).all() & (b.upper.double() >= tiny).all() & (b.lower >= 0).all())
        ends = torch.tensor([0.0, 1e300, torch.inf], dtype=F64)
        b = Bounds(ends, ends).rounded(dtype)
        assert b.lower.tolist() == [0.0, torch.finfo(dtype).max, torch.inf]
        assert b.upper.tolist() == [0.0, torch.inf, torch.inf]
        b = Bounds(-tiny, -tiny).rounded(dtype)  # of an entropy
        assert bool((b.lower.double() <= -tiny).all() & (b.upper.double() >= -tiny).all())
