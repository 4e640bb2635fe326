"""Entropy, cross-entropy, information and Jensen-Shannon divergence against integrals of their definitions."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Independent, Laplace, MixtureSameFamily, Normal

import stablekl
from stablekl.precision.references.context import mp

from .mixture_references import F64, gaussian, plane

# rows (weight, mean, standard deviation)
ONE = [(1.0, 0.5, 1.5)]
TWO = [(0.3, -1.0, 1.0), (0.7, 2.0, 0.5)]
THREE = [(0.2, -2.0, 1.0), (0.3, 1.0, 0.5), (0.5, 4.0, 2.0)]
FIVE = [(0.1, -3.0, 0.2), (0.2, -1.0, 1.0), (0.3, 0.0, 0.5), (0.399, 2.0, 3.0), (0.001, 9.0, 0.1)]
MIXTURES = {"one": ONE, "two": TWO, "three": THREE, "five": FIVE}

LOC = {2: [[0.0, 0.5], [2.0, -1.0]], 3: [[0.0, 0.5], [2.0, -1.0], [-1.0, -1.5]]}
COV = [[[1.0, 0.6], [0.6, 0.8]], [[0.7, -0.3], [-0.3, 1.5]], [[0.9, 0.0], [0.0, 0.5]]]


def log_density(rows):
    total = mp.fsum(mp.mpf(w) for w, _, _ in rows)
    terms = [(mp.mpf(w) / total, mp.mpf(m), mp.mpf(s)) for w, m, s in rows]
    return lambda x: mp.log(mp.fsum(w * mp.npdf(x, m, s) for w, m, s in terms))


def integral(f, *mixtures):
    """Over the line, Gauss-Legendre between all standard deviations of all components."""
    edges = {mp.mpf(m) + mp.mpf(s) * t for rows in mixtures for _, m, s in rows for t in range(-14, 15, 2)}
    return mp.quad(f, sorted(edges), maxdegree=5)


def cross_entropy_on_the_line(p, q):
    with mp.workdps(25):
        log_p, log_q = log_density(p), log_density(q)
        return integral(lambda x: -mp.exp(log_p(x)) * log_q(x), p)


def jensen_shannon_on_the_line(p, q, digits=40):
    with mp.workdps(digits):
        log_p, log_q = log_density(p), log_density(q)

        def f(x):
            a, b = log_p(x), log_q(x)
            m = mp.log((mp.exp(a) + mp.exp(b)) / 2)
            return (mp.exp(a) * (a - m) + mp.exp(b) * (b - m)) / 2

        return integral(f, p, q)


def scalar(rows, dtype=F64):
    w, m, s = (torch.tensor(x, dtype=dtype) for x in zip(*rows, strict=True))
    return MixtureSameFamily(Categorical(probs=w), Normal(m, s)) if len(rows) > 1 else Normal(m[0], s[0])


def in_the_plane(k, shift=0.0):
    w = np.arange(1.0, k + 1)
    return w / w.sum(), np.array(LOC[k]) + shift, np.array(COV[:k])


def distribution(w, loc, cov):
    return stablekl.GaussianMixture(probs=torch.tensor(w), loc=torch.tensor(loc), covariance_matrix=torch.tensor(cov))


def random_mixture(k, dim, seed, *, grad=False):
    g = torch.Generator().manual_seed(seed)
    given = [torch.randn(k, generator=g, dtype=F64), torch.randn(k, dim, generator=g, dtype=F64)]
    given.append(torch.exp(0.3 * torch.randn(k, dim, generator=g, dtype=F64)))
    given = [x.requires_grad_(grad) for x in given]
    return stablekl.GaussianMixture(logits=given[0], loc=given[1], scale_diag=given[2]), given


def covered(estimate, truth, bar):
    miss = abs(float(mp.mpf(float(estimate.value)) - truth))
    assert miss <= bar
    assert miss <= float(estimate.error) + 2e-15
    assert float(estimate.lower) <= float(truth) <= float(estimate.upper)
    assert float(estimate.lower) <= float(estimate.value) <= float(estimate.upper)


# ----------------------------------------------------------------------------------------- the definitions


@pytest.mark.parametrize("name", MIXTURES)
def test_entropy_on_the_line(name):
    rows = MIXTURES[name]
    truth = cross_entropy_on_the_line(rows, rows)
    covered(stablekl.entropy_estimate(scalar(rows)), truth, 2e-14)
    if len(rows) > 1:
        w, m, s = (torch.tensor(x, dtype=F64) for x in zip(*rows, strict=True))
        ours = stablekl.GaussianMixture(probs=w, loc=m.unsqueeze(-1), scale_diag=s.unsqueeze(-1))
        assert abs(float(ours.entropy()) - float(truth)) <= 2e-14


@pytest.mark.parametrize(
    ("p", "q"), [("one", "two"), ("two", "one"), ("two", "three"), ("three", "two"), ("five", "three")]
)
def test_cross_entropy_on_the_line(p, q):
    truth = cross_entropy_on_the_line(MIXTURES[p], MIXTURES[q])
    covered(stablekl.cross_entropy_estimate(scalar(MIXTURES[p]), scalar(MIXTURES[q])), truth, 2e-12)


@pytest.mark.parametrize("name", ["two", "three", "five"])
def test_information_on_the_line(name):
    rows = MIXTURES[name]
    with mp.workdps(25):
        own = mp.fsum(mp.mpf(w) * (mp.log(mp.mpf(s)) + mp.log(2 * mp.pi) / 2 + 0.5) for w, _, s in rows)
        own /= mp.fsum(mp.mpf(w) for w, _, _ in rows)
        covered(stablekl.mutual_information_estimate(scalar(rows)), cross_entropy_on_the_line(rows, rows) - own, 2e-14)


@pytest.mark.parametrize(("p", "q"), list(itertools.combinations(MIXTURES, 2)))
def test_jensen_shannon_on_the_line(p, q):
    truth = jensen_shannon_on_the_line(MIXTURES[p], MIXTURES[q], 20)
    here, there = (
        stablekl.jensen_shannon_estimate(scalar(a), scalar(b))
        for a, b in ((MIXTURES[p], MIXTURES[q]), (MIXTURES[q], MIXTURES[p]))
    )
    covered(here, truth, 1e-14)
    assert abs(float(here.value - there.value)) <= 1e-15


@pytest.mark.parametrize("dim", [2, 6])
def test_lines_in_disguise(dim):
    """Components that differ along one direction: the same divergence, and the entropy of the rest on top."""
    p, q = gaussian(THREE, dim), gaussian(TWO, dim)
    e = stablekl.jensen_shannon_estimate(p, q, rtol=1e-9)
    assert abs(float(e.value) - float(jensen_shannon_on_the_line(THREE, TWO, 20))) <= float(e.error) + 1e-13
    assert float(e.error) <= 1e-9
    gap = stablekl.cross_entropy_estimate(p, q).value - stablekl.entropy_estimate(p).value
    truth = cross_entropy_on_the_line(THREE, TWO) - cross_entropy_on_the_line(THREE, THREE)
    assert abs(float(gap) - float(truth)) <= 1e-12


def test_in_the_plane():
    """Full covariances that share no direction, by the trapezoid rule in extended precision."""
    a, b = in_the_plane(2), in_the_plane(3, 0.5)
    p, q = distribution(*a), distribution(*b)
    both = tuple(
        np.concatenate([x / 2 if i == 0 else x for x in pair]) for i, pair in enumerate(zip(a, b, strict=True))
    )
    truth = (plane(a, both, 0.1) + plane(b, both, 0.1)) / 2
    covered(stablekl.jensen_shannon_estimate(p, q), mp.mpf(truth), 2e-9)
    one = (np.ones(1), np.zeros((1, 2)), 4 * np.eye(2)[None])
    cross = 1 + math.log(8 * math.pi)  # H of N(0, 4 I), the value of -E log q where the second moment is 4 I
    moment = sum(w * (m @ m + np.trace(c)) for w, m, c in zip(*a, strict=True))
    entropy = cross + (moment - 8) / 8 - plane(a, one, 0.1)
    covered(stablekl.entropy_estimate(p), mp.mpf(entropy), 1e-13)
    covered(stablekl.cross_entropy_estimate(p, q), mp.mpf(plane(a, b, 0.1) + entropy), 2e-9)


def test_the_difference_of_entropies_fails_near_each_other():
    """Must fail: H((p + q)/2) - H(p)/2 - H(q)/2, the textbook's Jensen-Shannon divergence."""
    near = [(w, m + 1e-7, s) for w, m, s in TWO]
    truth = float(jensen_shannon_on_the_line(TWO, near))
    both = [(w / 2, m, s) for w, m, s in (*TWO, *near)]
    h = [float(stablekl.entropy_estimate(scalar(rows)).value) for rows in (both, TWO, near)]
    assert abs((h[0] - (h[1] + h[2]) / 2) / truth - 1) > 1e-2
    assert abs(float(stablekl.jensen_shannon(scalar(TWO), scalar(near))) / truth - 1) <= 1e-13


# ------------------------------------------------------------------------------------ Jensen-Shannon's ends


@pytest.mark.parametrize("step", [1e-3, 1e-6, 1e-8])
@pytest.mark.parametrize("wider", [0.0, 1.0])
def test_two_gaussians_near_each_other(step, wider):
    p, q = [(1.0, 0.0, 1.0)], [(1.0, step, 1.0 + wider * step)]
    value = stablekl.jensen_shannon(scalar(p), scalar(q))
    assert abs(float(mp.mpf(float(value)) / jensen_shannon_on_the_line(p, q) - 1)) <= 1e-12


@pytest.mark.parametrize("step", [1e-2, 1e-5, 1e-7])
def test_mixtures_near_each_other(step):
    near = [(w, m + step * (1 + i), s) for i, (w, m, s) in enumerate(TWO)]
    truth = jensen_shannon_on_the_line(TWO, near)
    e = stablekl.jensen_shannon_estimate(scalar(TWO), scalar(near))
    assert abs(float(mp.mpf(float(e.value)) / truth - 1)) <= 1e-13
    assert float(e.error) <= 1e-13 * float(truth)
    flat = stablekl.jensen_shannon_estimate(gaussian(TWO, 3), gaussian(near, 3))
    assert abs(float(flat.value) - float(truth)) <= float(flat.error) + 1e-7 * float(truth)


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_equal_mixtures(k, dim):
    """Exactly 0, with gradients of 0."""
    p, leaves = random_mixture(k, dim, 10 * k + dim, grad=True)
    q, _ = random_mixture(k, dim, 10 * k + dim)
    e = stablekl.jensen_shannon_estimate(p, q)
    assert float(e.value.detach()) == 0
    gradients = torch.autograd.grad(e.value, leaves, allow_unused=True)
    assert all(g is None or not bool(g.any()) for g in gradients)


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("apart", [10.0, 100.0, 1e6])
def test_at_most_log_two(k, dim, apart):
    p, (logits, loc, scale) = random_mixture(k, dim, k)
    q = stablekl.GaussianMixture(logits=logits, loc=loc + apart, scale_diag=scale)
    e = stablekl.jensen_shannon_estimate(p, q)
    assert 0 <= float(e.value) <= math.log(2)
    assert float(e.lower) <= float(e.value) <= float(e.upper)
    if apart > 10:
        assert math.log(2) - float(e.value) <= 1e-15


def test_a_far_backward_has_something_to_follow():
    """Nothing overlaps: the divergence is log 2 whatever the means, with gradients of 0."""
    for dim in (1, 3):
        loc = torch.zeros(2, dim, dtype=F64, requires_grad=True)
        w = torch.ones(2, dtype=F64)
        p = stablekl.GaussianMixture(
            probs=w, loc=loc, scale_diag=torch.ones(2, dim, dtype=F64) * torch.tensor([[1.0], [2.0]])
        )
        q = stablekl.GaussianMixture(probs=w, loc=loc.detach() + 1e3, scale_diag=torch.ones(2, dim, dtype=F64))
        (gradient,) = torch.autograd.grad(stablekl.jensen_shannon(p, q), loc)
        assert float(gradient.abs().max()) <= 1e-15


def test_a_batch_of_unlike_rows():
    """One row near q, one far, one apart: each as it is alone, and the bounds only as certain as the engines."""
    p, (logits, loc, scale) = random_mixture(2, 4, 1)
    shifts = torch.tensor([0.0, 1e-7, 1.0, 1e3], dtype=F64)[:, None, None]
    q = stablekl.GaussianMixture(logits=logits.expand(4, 2), loc=loc + shifts, scale_diag=scale.expand(4, 2, 4))
    with stablekl.accuracy(rtol=1e-2, max_points=2**11):
        e = stablekl.jensen_shannon_estimate(p, q)
        for i in range(4):
            row = stablekl.GaussianMixture(logits=logits, loc=loc + shifts[i], scale_diag=scale)
            alone = stablekl.jensen_shannon_estimate(p, row)
            assert float(e.value[i]) == pytest.approx(float(alone.value), rel=1e-13)
            assert float(e.error[i]) == pytest.approx(float(alone.error), rel=1e-6)
    assert e.method == "sobol"
    assert bool((e.lower <= e.value).all() & (e.value <= e.upper).all())


# ---------------------------------------------------------------------------------------------- gradients


FUNCTIONS = {
    "entropy": lambda p, q: stablekl.entropy_estimate(p, rtol=1e-9),
    "information": lambda p, q: stablekl.mutual_information_estimate(p, rtol=1e-9),
    "cross-entropy": lambda p, q: stablekl.cross_entropy_estimate(p, q, rtol=1e-9),
    "cross-entropy of q": lambda p, q: stablekl.cross_entropy_estimate(q, p, rtol=1e-9),
    "Jensen-Shannon": lambda p, q: stablekl.jensen_shannon_estimate(p, q, rtol=1e-9),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("k", "dim", "bar"), [(2, 1, 1e-10), (3, 1, 1e-10), (2, 2, 1e-8)])
def test_gradients(name, k, dim, bar):
    """Central differences of fourth order in logits, means and scales."""
    _, given = random_mixture(k, dim, 3, grad=True)
    q, _ = random_mixture(2, dim, 8)
    g = torch.Generator().manual_seed(0)
    directions = [torch.randn(x.shape, generator=g, dtype=F64) for x in given]

    def at(t):
        logits, loc, scale = (x + t * d for x, d in zip(given, directions, strict=True))
        return FUNCTIONS[name](stablekl.GaussianMixture(logits=logits, loc=loc, scale_diag=scale), q).value

    gradients = torch.autograd.grad(at(0.0), given)
    total = sum(float((x * d).sum()) for x, d in zip(gradients, directions, strict=True))
    h = 1e-3
    with torch.no_grad():
        difference = float(8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    assert abs(total - difference) <= bar


@pytest.mark.parametrize(("dim", "name"), [*itertools.product((1, 2), FUNCTIONS), (4, "cross-entropy")])
def test_zero_weights(dim, name):
    """A component that is off, far away and thin: no NaN, no trace, no gradient."""
    loc = torch.randn(3, dim, generator=torch.Generator().manual_seed(1), dtype=F64)
    loc[1] = 50.0
    scale = torch.tensor([1.0, 1e-3, 2.0], dtype=F64).unsqueeze(-1).repeat(1, dim)
    leaves = [torch.tensor([0.3, 0.0, 0.7], dtype=F64), loc, scale]
    leaves = [x.clone().requires_grad_() for x in leaves]
    p = stablekl.GaussianMixture(probs=leaves[0], loc=leaves[1], scale_diag=leaves[2])
    n = stablekl.GaussianMixture(probs=leaves[0].detach()[::2], loc=loc[::2], scale_diag=scale[::2])
    q, _ = random_mixture(2, dim, 2)
    e = FUNCTIONS[name](p, q)
    assert abs(float(e.value.detach() - FUNCTIONS[name](n, q).value)) <= float(2 * e.error) + 1e-13
    gradients = torch.autograd.grad(e.value, leaves)
    assert all(bool(x.isfinite().all()) for x in gradients)
    assert not bool(gradients[1][1].any())


# ------------------------------------------------------------------------------------------------ options


def test_warnings_are_about_the_callers_line():
    p, q = random_mixture(4, 5, 1)[0], random_mixture(5, 5, 2)[0]
    with stablekl.accuracy(rtol=1e-9, max_points=64):
        for name, f in {
            "entropy": lambda: p.entropy(),
            "cross-entropy": lambda: stablekl.cross_entropy(p, q),
            "mutual information": lambda: stablekl.mutual_information(p),
            "Jensen-Shannon divergence": lambda: stablekl.jensen_shannon(p, q),
        }.items():
            with pytest.warns(stablekl.AccuracyWarning, match=f"the {name} of batch element 0") as record:
                f()
            assert record[0].filename == __file__
            assert len(record) == 1


def test_the_unit_of_length_gives_no_warning():
    """The tolerance of a cross-entropy is relative to the divergences: its own size depends on the unit."""
    (_, a), (_, b) = random_mixture(3, 5, 0), random_mixture(4, 5, 10)
    values = []
    for unit in (1.0, 1e-3):
        p, q = (stablekl.GaussianMixture(logits=w, loc=2 * unit * m, scale_diag=unit * s) for w, m, s in (a, b))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            values.append(float(stablekl.cross_entropy(p, q)))
    assert values[0] - values[1] == pytest.approx(5 * math.log(1000), rel=1e-9)


def test_an_infinite_cross_entropy():
    far = stablekl.MultivariateNormal(torch.full((2,), 1e160, dtype=F64), scale_diag=torch.ones(2, dtype=F64))
    e = stablekl.cross_entropy_estimate(random_mixture(2, 2, 0)[0], far)
    assert float(e.value) == float(e.lower) == float(e.upper) == math.inf


def test_tolerance_and_budget():
    p, q = random_mixture(4, 5, 1)[0], random_mixture(2, 5, 2)[0]
    for f in (stablekl.entropy_estimate, stablekl.mutual_information_estimate):
        loose = f(p, rtol=1e-1, max_points=512)
        goal = 0.5 * float(loose.error)
        tight = f(p, rtol=goal)
        assert loose.method == "sobol"
        assert float(tight.error) <= goal + 1e-14
        assert abs(float(loose.value - tight.value)) <= float(loose.error + tight.error)
        with pytest.raises(ValueError, match="rtol must be positive"):
            f(p, rtol=-1.0)
    for f in (stablekl.cross_entropy_estimate, stablekl.jensen_shannon_estimate):
        with pytest.raises(ValueError, match="max_points must be at least 64"):
            f(p, q, max_points=1)
        with pytest.raises(ValueError, match="same space"):
            f(p, random_mixture(2, 3, 0)[0])


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (Laplace(torch.zeros(()), torch.ones(())), "Laplace"),
        (MixtureSameFamily(Categorical(torch.ones(2)), Laplace(torch.zeros(2), torch.ones(2))), "mixtures of Laplace"),
        (Independent(Laplace(torch.zeros(2), torch.ones(2)), 1), r"Independent\(Laplace, 1\)"),
    ],
)
def test_other_families_are_named(family, name):
    p = random_mixture(2, 2, 0)[0]
    for f in (
        stablekl.entropy_estimate,
        stablekl.mutual_information_estimate,
        lambda x: stablekl.cross_entropy_estimate(p, x),
        lambda x: stablekl.jensen_shannon_estimate(x, p),
    ):
        with pytest.raises(NotImplementedError, match=f"is not available for {name}"):
            f(family)


def test_shapes_and_dtypes():
    p = stablekl.GaussianMixture(
        logits=torch.randn(5, 1, 2, dtype=torch.float32), loc=torch.randn(5, 1, 2, 2), scale_diag=torch.ones(5, 1, 2, 2)
    )
    g = torch.Generator().manual_seed(1)
    q = stablekl.MultivariateNormal(torch.randn(3, 2, generator=g, dtype=F64), scale_diag=torch.ones(3, 2, dtype=F64))
    for f in (stablekl.cross_entropy_estimate, stablekl.jensen_shannon_estimate):
        e = f(p, q)
        assert all(x.shape == (5, 3) and x.dtype == F64 for x in e[:4])
        single = f(p, q.to(torch.float32)) if hasattr(q, "to") else e
        assert single.value.dtype == torch.float32
    for f in (stablekl.entropy_estimate, stablekl.mutual_information_estimate):
        e = f(p)
        assert all(x.shape == (5, 1) and x.dtype == torch.float32 for x in e[:4])
        assert not e.error.requires_grad


# --------------------------------------------------------------------------------------------- transforms


def entropy_of(loc):
    k, dim = loc.shape
    scale = torch.linspace(0.5, 2, k * dim, dtype=F64).reshape(k, dim)
    m = stablekl.GaussianMixture(logits=torch.arange(k, dtype=F64) / 4, loc=loc, scale_diag=scale, validate_args=False)
    return m.entropy(), m


def functions_of(loc):
    h, m = entropy_of(loc)
    _, q = entropy_of(torch.ones(2, loc.shape[-1], dtype=F64) * torch.tensor([[0.0], [1.0]], dtype=F64))
    return torch.stack([h, stablekl.jensen_shannon(m, q), stablekl.cross_entropy(m, q), stablekl.mutual_information(m)])


@pytest.mark.parametrize(("k", "dim", "bar"), [(2, 1, 1e-14), (3, 1, 1e-14), (2, 3, 1e-3)])
def test_vmap(k, dim, bar):
    """On the line everything is as exact as without; elsewhere the Jensen-Shannon divergence has a fixed budget."""
    loc = torch.randn(2, k, dim, generator=torch.Generator().manual_seed(k), dtype=F64)
    value = torch.vmap(functions_of)(loc)
    plain = torch.stack([functions_of(x) for x in loc])
    assert float((value - plain)[:, [0, 2, 3]].abs().max()) <= 1e-13
    assert float((value - plain).abs().max()) <= bar
    gradient = torch.vmap(torch.func.grad(lambda x: functions_of(x).sum()))(loc)
    assert bool(gradient.isfinite().all())


def test_compile():
    """Python's max with a key is nothing that torch.compile can trace."""
    torch._dynamo.reset()
    other = stablekl.Normal(torch.zeros((), dtype=F64), torch.ones((), dtype=F64), validate_args=False)

    def distance(loc):
        return stablekl.jensen_shannon(stablekl.Normal(loc, torch.full_like(loc, 2.0), validate_args=False), other)

    loc = torch.tensor([0.0, 1.0], dtype=F64)
    compiled = torch.compile(distance, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(loc), distance(loc), rtol=1e-13, atol=1e-14)
