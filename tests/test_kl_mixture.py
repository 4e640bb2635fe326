"""torch's own kl_divergence for mixtures: values, gradients, classes, batches, and what must never happen."""

from __future__ import annotations

import functools
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.distributions import (
    Categorical,
    Independent,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    kl_divergence,
)

import stablekl
from stablekl.precision.references import mixture
from stablekl.precision.references.context import mp

from .mixture_references import F64, embedded, gaussian, line, plane, radial

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

# name: rows (weight, mean, standard deviation) of p and of q
TWO = {
    "overlapping": ([(0.3, 0.0, 1.0), (0.7, 1.0, 1.0)], [(1.0, 0.5, 1.2)]),
    "bimodal": ([(0.5, -5.0, 1.0), (0.5, 5.0, 1.0)], [(1.0, 0.0, 5.1)]),
    "far": ([(0.5, 0.0, 1.0), (0.5, 200.0, 1.0)], [(1.0, 100.0, 100.0)]),
    "narrow and wide": ([(0.25, 0.0, 0.01), (0.75, 0.1, 3.0)], [(1.0, 0.0, 2.0)]),
    "rare": ([(1e-6, 4.0, 0.5), (1.0 - 1e-6, 0.0, 1.0)], [(1.0, 0.0, 1.0)]),
}
MANY = {
    "three to one": ([(0.2, -2.0, 1.0), (0.3, 1.0, 0.5), (0.5, 4.0, 2.0)], [(1.0, 1.0, 3.0)]),
    "one to three": ([(1.0, 1.0, 3.0)], [(0.2, -2.0, 1.0), (0.3, 1.0, 0.5), (0.5, 4.0, 2.0)]),
    "two to three": ([(0.4, 0.0, 1.0), (0.6, 2.0, 0.7)], [(0.2, -2.0, 1.0), (0.3, 1.0, 0.5), (0.5, 4.0, 2.0)]),
}


def mean_component_kl(p, q):
    """S up to the weight of q's nearest component: the scale of the bar."""

    def pair(a, b):
        return math.log(b[2] / a[2]) + (a[2] ** 2 + (a[1] - b[1]) ** 2) / (2 * b[2] ** 2) - 0.5 - math.log(b[0])

    return sum(a[0] * min(pair(a, b) for b in q) for a in p)


def relative_miss(value, p, q):
    return abs(float(mp.mpf(float(value)) - line(p, q))) / (1 + mean_component_kl(p, q))


# --------------------------------------------------------------------------------------------- exact engines


@pytest.mark.parametrize("dim", [1, 2, 8, 64])
@pytest.mark.parametrize("name", TWO)
def test_two_components_against_a_gaussian(name, dim):
    p, q = TWO[name]
    value = kl_divergence(gaussian(p, dim), gaussian(q, dim))
    assert relative_miss(value, p, q) <= 1e-13
    single = kl_divergence(gaussian(p, dim, dtype=torch.float32), gaussian(q, dim, dtype=torch.float32))
    assert single.dtype == torch.float32


@pytest.mark.parametrize("dim", [2, 8, 64])
def test_two_components_in_float32(dim):
    # Inputs that float32 holds exactly: coordinate-wise standard deviations.
    p = [(0.25, -1.5, 0.5), (0.75, 2.0, 1.25)]
    loc, scale = torch.zeros(2, dim), torch.ones(2, dim)
    loc[:, 0], scale[:, 0] = torch.tensor([-1.5, 2.0]), torch.tensor([0.5, 1.25])
    m = stablekl.GaussianMixture(probs=torch.tensor([0.25, 0.75]), loc=loc, scale_diag=scale)
    q = stablekl.MultivariateNormal(torch.full((dim,), 0.0), scale_diag=torch.tensor([3.0] + [1.0] * (dim - 1)))
    assert relative_miss(kl_divergence(m, q), p, [(1.0, 0.0, 3.0)]) <= 1e-6


@pytest.mark.parametrize("name", [*TWO, *MANY])
def test_one_dimension(name):
    p, q = {**TWO, **MANY}[name]
    for a, b in ((p, q), (q, p)):
        if name == "far" and a is q:
            continue  # 100 standard deviations wide of both: see tests/test_line.py
        assert relative_miss(kl_divergence(gaussian(a, 1), gaussian(b, 1)), a, b) <= 1e-13


@pytest.mark.parametrize("dim", [2, 8, 64])
def test_concentric_components(dim):
    p, q = [(0.25, 0.5), (0.75, 1.5)], [(1.0, 1.25)]
    scale = torch.tensor([s for _, s in p], dtype=F64).unsqueeze(-1).expand(2, dim)
    probs = torch.tensor([w for w, _ in p], dtype=F64)
    m = stablekl.GaussianMixture(probs=probs, loc=torch.zeros(2, dim, dtype=F64), scale_diag=scale)
    single = stablekl.MultivariateNormal(torch.zeros(dim, dtype=F64), scale_diag=torch.full((dim,), 1.25, dtype=F64))
    truth = radial(p, q, dim)
    assert float(abs(mp.mpf(float(kl_divergence(m, single))) - truth)) <= 1e-13 * (1 + dim)


def test_the_plane():
    """Two full components that share no direction, against a cubature of the definition."""
    w = np.array([0.35, 0.65])
    loc = np.array([[0.0, 0.5], [2.0, -1.0]])
    cov = np.array([[[1.0, 0.6], [0.6, 0.8]], [[0.7, -0.3], [-0.3, 1.5]]])
    single = (np.array([1.0]), np.array([[1.0, 0.0]]), np.array([[[2.5, -0.5], [-0.5, 2.0]]]))
    m = stablekl.GaussianMixture(probs=torch.tensor(w), loc=torch.tensor(loc), covariance_matrix=torch.tensor(cov))
    q = stablekl.MultivariateNormal(torch.tensor(single[1][0]), covariance_matrix=torch.tensor(single[2][0]))
    truth = plane((w, loc, cov), single, 0.08)
    assert truth == pytest.approx(plane((w, loc, cov), single, 0.1), abs=1e-14)  # the reference has converged
    assert float(kl_divergence(m, q)) == pytest.approx(truth, abs=2e-13)


@pytest.fixture
def sharper(monkeypatch):
    """The reference with 12 more digits: its own are those of 1 + KL."""
    monkeypatch.setattr(mixture, "_TOLERANCE", mp.mpf(10) ** -36)


@pytest.mark.parametrize("step", [1e-6, 1e-9])
def test_close_to_the_gaussian_on_the_line(step, sharper):
    """KL of 1e-12 and less, to a relative error of 1e-8."""
    p, q = [(0.25, step, 1.0), (0.5, -step, 1.0 + step), (0.25, 0.0, 1.0)], [(1.0, 0.0, 1.0)]
    p = [(w, m, float(np.float64(s))) for w, m, s in p]
    truth = line(p, q)
    w, m, s = (torch.tensor(x, dtype=F64) for x in zip(*p, strict=True))
    value = kl_divergence(MixtureSameFamily(Categorical(w), Normal(m, s)), Normal(torch.zeros((), dtype=F64), 1.0))
    assert abs(float(mp.mpf(float(value)) / truth - 1)) <= 1e-8


def test_the_obvious_formulas_fail_there(sharper):
    """Must fail: plain Monte Carlo, and the integral of p log(p/q) in floating point."""
    step = 1e-6
    p, q = [(0.25, step, 1.0), (0.5, -step, 1.0 + step), (0.25, 0.0, 1.0)], [(1.0, 0.0, 1.0)]
    truth = float(line(p, q))
    w, m, s = (torch.tensor(x, dtype=F64) for x in zip(*p, strict=True))
    mixture, single = MixtureSameFamily(Categorical(w), Normal(m, s)), Normal(torch.zeros((), dtype=F64), 1.0)
    torch.manual_seed(0)
    x = mixture.sample((100_000,))
    assert abs(float((mixture.log_prob(x) - single.log_prob(x)).mean()) / truth - 1) > 1
    x = torch.linspace(-10, 10, 20001, dtype=F64)
    u = mixture.log_prob(x) - single.log_prob(x)
    assert abs(float((mixture.log_prob(x).exp() * u).sum() * 1e-3) / truth - 1) > 1e-6


# -------------------------------------------------------------------------------------------- every class


def single_or_mixture(kind, batch, k, dim, seed, module):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*batch, k, *shape, generator=g, dtype=F64)

    loc, root = normal(dim), normal(dim, dim)
    scale, cov = normal(dim).exp(), root @ root.mT / dim + torch.eye(dim, dtype=F64)
    component = {
        "normal": lambda: getattr(module, "Normal", Normal)(loc[..., 0], scale[..., 0]),
        "independent": lambda: Independent(getattr(module, "Normal", Normal)(loc, scale), 1),
        "scale_diag": lambda: stablekl.MultivariateNormal(loc, scale_diag=scale),
        "covariance_matrix": lambda: module.MultivariateNormal(loc, cov),
        "precision_matrix": lambda: module.MultivariateNormal(loc, precision_matrix=cov),
        "scale_tril": lambda: module.MultivariateNormal(loc, scale_tril=torch.linalg.cholesky(cov)),
        "low_rank": lambda: module.LowRankMultivariateNormal(loc, root[..., :2], scale.square()),
    }[kind]()
    if k == 1 and kind != "normal":
        return _first(component)
    return module.MixtureSameFamily(Categorical(logits=torch.randn(*batch, k, generator=g, dtype=F64)), component)


def _first(component):
    """The component distribution without its last batch dimension."""
    if isinstance(component, Independent):
        return Independent(
            type(component.base_dist)(component.base_dist.loc[..., 0, :], component.base_dist.scale[..., 0, :]), 1
        )
    if isinstance(component, LowRankMultivariateNormal):
        return type(component)(
            component.loc[..., 0, :], component.cov_factor[..., 0, :, :], component.cov_diag[..., 0, :]
        )
    if getattr(component, "is_diagonal", False):
        return stablekl.MultivariateNormal(component.loc[..., 0, :], scale_diag=component.scale_diag[..., 0, :])
    name = next(n for n in ("covariance_matrix", "precision_matrix", "scale_tril") if n in component.__dict__)
    return type(component)(component.loc[..., 0, :], **{name: getattr(component, name)[..., 0, :, :]})


VECTOR_KINDS = ["independent", "scale_diag", "covariance_matrix", "precision_matrix", "scale_tril", "low_rank"]


@pytest.mark.parametrize(("kind_p", "kind_q"), list(itertools.product(VECTOR_KINDS, VECTOR_KINDS)))
def test_every_pair_of_classes(kind_p, kind_q):
    """Each parameterisation gives what the same Gaussians give as covariances, in torch's classes and in ours."""

    def as_covariance(d):
        if isinstance(d, MixtureSameFamily):
            c = d.component_distribution
            return MixtureSameFamily(d.mixture_distribution, as_covariance(c))
        cov = getattr(d, "covariance_matrix", None)
        return MultivariateNormal(d.mean, torch.diag_embed(d.variance) if cov is None else cov)

    for k_p, k_q in ((2, 1), (2, 2), (1, 2)):
        for module_p, module_q in ((torch.distributions, stablekl), (stablekl, torch.distributions)):
            p = single_or_mixture(kind_p, (2, 1), k_p, 3, 1, module_p)
            q = single_or_mixture(kind_q, (2,), k_q, 3, 2, module_q)
            with warnings.catch_warnings(), stablekl.accuracy(rtol=1.0):
                warnings.simplefilter("error")
                value, twin = kl_divergence(p, q), kl_divergence(as_covariance(p), as_covariance(q))
            assert value.shape == (2, 2)
            torch.testing.assert_close(value, twin, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("module", [torch.distributions, stablekl])
def test_scalar_components(module):
    p = single_or_mixture("normal", (3, 1), 3, 1, 1, module)
    q = single_or_mixture("normal", (2,), 2, 1, 2, torch.distributions)
    value = kl_divergence(p, q)
    assert value.shape == (3, 2)
    for i, j in itertools.product(range(3), range(2)):
        rows_p, rows_q = (
            torch.stack(
                [m.mixture_distribution.probs, m.component_distribution.loc, m.component_distribution.scale], -1
            )
            for m in (p, q)
        )
        truth = line(rows_p[i, 0].tolist(), rows_q[j].tolist())
        assert float(abs(mp.mpf(float(value[i, j])) - truth)) <= 1e-12 * (1 + float(truth))


@pytest.mark.parametrize("kind", VECTOR_KINDS)
@pytest.mark.parametrize("k", [2, 3])
def test_equal_parameters_give_zero(kind, k):
    p = single_or_mixture(kind, (2,), k, 3, 1, torch.distributions)
    for twin in (p, single_or_mixture(kind, (2,), k, 3, 1, stablekl)):
        assert torch.equal(kl_divergence(p, twin), torch.zeros(2, dtype=F64))


@pytest.mark.parametrize("dim", [1, 3])
def test_equal_parameters_give_zero_gradient(dim):
    given = [
        torch.tensor([0.2, 0.3, 0.5], dtype=F64),
        torch.randn(3, dim, generator=torch.Generator().manual_seed(1), dtype=F64),
        torch.ones(3, dim, dtype=F64),
    ]
    leaves = [x.clone().requires_grad_() for x in given]
    p = stablekl.GaussianMixture(probs=leaves[0], loc=leaves[1], scale_diag=leaves[2])
    q = stablekl.GaussianMixture(probs=given[0], loc=given[1], scale_diag=given[2])
    for a, b in ((p, q), (q, p)):
        for g in torch.autograd.grad(kl_divergence(a, b), leaves, retain_graph=True):
            assert float(g.abs().max()) <= 1e-15


def test_identical_components_are_one_gaussian():
    one = torch.ones(3, 2, dtype=F64)
    m = stablekl.GaussianMixture(logits=torch.randn(3, dtype=F64), loc=one, scale_diag=one)
    q = stablekl.MultivariateNormal(torch.zeros(2, dtype=F64), covariance_matrix=2 * torch.eye(2, dtype=F64))
    p = stablekl.MultivariateNormal(one[0], scale_diag=one[0])
    for a, b, c, d in ((m, q, p, q), (q, m, q, p), (m, m.expand((2,)), p, p.expand((2,)))):
        e = stablekl.kl_estimate(a, b)
        assert e.method == "closed form"
        assert torch.equal(e.value, kl_divergence(c, d))


def test_gradient_of_identical_components():
    """Each receives its share of the weight."""
    loc = torch.ones(3, 2, dtype=F64, requires_grad=True)
    w = torch.tensor([0.2, 0.3, 0.5], dtype=F64)
    m = stablekl.GaussianMixture(probs=w, loc=loc, scale_diag=torch.ones(3, 2, dtype=F64))
    q = stablekl.MultivariateNormal(torch.zeros(2, dtype=F64), scale_diag=torch.full((2,), 2.0, dtype=F64))
    kl_divergence(m, q).backward()
    torch.testing.assert_close(loc.grad, w.unsqueeze(-1) * torch.full((3, 2), 0.25, dtype=F64))


# ------------------------------------------------------------------------------------------ zero weights


def dead_pair(kind):
    """A mixture with a component switched off, and the same without it."""
    loc = torch.tensor([[0.0, 0.0], [9.0, 9.0], [1.0, -1.0]], dtype=F64)
    scale = torch.tensor([[1.0, 1.0], [0.01, 1e3], [0.5, 2.0]], dtype=F64)
    weights = {"probs": torch.tensor([0.25, 0.0, 0.75], dtype=F64)}
    if kind == "logits":
        weights = {"logits": weights["probs"].log()}
    m = MixtureSameFamily(Categorical(**weights), Independent(Normal(loc, scale), 1))
    alive = [0, 2]
    n = MixtureSameFamily(
        Categorical(probs=torch.tensor([0.25, 0.75], dtype=F64)), Independent(Normal(loc[alive], scale[alive]), 1)
    )
    return m, n


@pytest.mark.parametrize("kind", ["probs", "logits"])
def test_zero_weights_do_not_leak(kind):
    m, n = dead_pair(kind)
    q = MultivariateNormal(torch.zeros(2, dtype=F64), 4 * torch.eye(2, dtype=F64))
    for a, b, c, d in ((m, q, n, q), (q, m, q, n), (m, m, n, n)):
        torch.testing.assert_close(kl_divergence(a, b), kl_divergence(c, d), rtol=1e-15, atol=0)


def test_torch_clamps_its_weights():
    """Must fail: the density that torch computes from the same objects has a thousand times the leak of float64."""
    m = MixtureSameFamily(Categorical(probs=torch.tensor([1.0, 0.0])), Normal(torch.tensor([0.0, 10.0]), torch.ones(2)))
    assert float(m.log_prob(torch.tensor(10.0))) > -20
    away = Normal(torch.tensor(10.0), torch.tensor(1.0))
    assert float(kl_divergence(away, m)) == pytest.approx(50.0, rel=1e-6)
    x = away.sample((1000,))
    assert float((away.log_prob(x) - m.log_prob(x)).mean()) < 20


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("mixed", [False, True])
def test_gradients_with_zero_weights(dim, mixed):
    """No NaN and nothing for the component that is off, in each engine, alone and beside a row where it is on."""
    probs = torch.tensor([[0.5, 0.0, 0.5], [0.2, 0.3, 0.5]], dtype=F64)
    probs = (probs if mixed else probs[:1]).clone().requires_grad_()
    g = torch.Generator().manual_seed(0)
    loc = torch.randn(3, dim, generator=g, dtype=F64).requires_grad_()
    scale = torch.tensor([1.0, 1e-3, 2.0], dtype=F64).unsqueeze(-1).repeat(1, dim).requires_grad_()
    rows = probs.shape[0]
    q = stablekl.MultivariateNormal(torch.zeros(dim, dtype=F64), scale_diag=torch.full((dim,), 2.0, dtype=F64))
    other = stablekl.GaussianMixture(
        probs=torch.tensor([0.5, 0.5], dtype=F64),
        loc=torch.ones(2, dim, dtype=F64) * torch.tensor([[1.0], [-1.0]], dtype=F64),
        scale_diag=torch.ones(2, dim, dtype=F64),
    )
    m = stablekl.GaussianMixture(probs=probs, loc=loc.expand(rows, 3, dim), scale_diag=scale.expand(rows, 3, dim))
    with stablekl.accuracy(rtol=1.0):
        for a, b in ((m, q), (q, m), (m, other), (other, m)):
            value = kl_divergence(a, b)
            grads = torch.autograd.grad(value[0], [probs, loc, scale], retain_graph=True)
            assert all(bool(x.isfinite().all()) for x in grads)
            assert float(grads[1][1].abs().max()) == float(grads[2][1].abs().max()) == 0


# ----------------------------------------------------------------------------------------------- gradients


@functools.lru_cache
def derivative(p, q, which, direction):
    """The derivative of the exact divergence along a direction in one of the two tables of rows."""

    def f(t):
        tables = [[[mp.mpf(x) for x in row] for row in table] for table in (p, q)]
        for row, change in zip(tables[which], direction, strict=True):
            row[:] = [x + t * c for x, c in zip(row, change, strict=True)]
        return line(*tables)

    with mp.workprec(140):
        h = mp.mpf("1e-8")
        return float((f(h) - f(-h)) / (2 * h))


CASES = [(*TWO["overlapping"], dim) for dim in (1, 8, 64)] + [(*MANY["two to three"], 1), (*MANY["one to three"], 1)]


@pytest.mark.parametrize(("p", "q", "dim"), CASES)
def test_gradients_of_the_exact_engines(p, q, dim):
    """Along a direction in the weights, the means and the scales of each side."""
    leaves = [torch.tensor(t, dtype=F64, requires_grad=True) for t in (p, q)]
    value = kl_divergence(gaussian(leaves[0], dim), gaussian(leaves[1], dim))
    grads = torch.autograd.grad(value, leaves)
    for which, rows in enumerate((p, q)):
        for column in range(3):
            if len(rows) == 1 and column == 0:
                continue  # the weight of a single Gaussian
            direction = tuple(
                tuple((1.0 + 0.5 * i) * (-1) ** i * (c == column) for c in range(3)) for i in range(len(rows))
            )
            truth = derivative(tuple(p), tuple(q), which, direction)
            found = float((grads[which] * torch.tensor(direction, dtype=F64)).sum())
            assert found == pytest.approx(truth, rel=1e-11, abs=1e-11)


@pytest.mark.parametrize("rtol", [1e3, 1e-4])
@pytest.mark.parametrize("shape", [(4, 1), (1, 4), (2, 5)])
def test_sampled_values_have_the_gradient_they_say(shape, rtol):
    """The points are fixed: finite differences of the value agree with backward, to every parameter.

    So they do with control variates, whose coefficients move with the parameters.
    """
    g = torch.Generator().manual_seed(3)
    leaves = []
    for k in shape:
        leaves.append(torch.randn(k, generator=g, dtype=F64))
        leaves.append(torch.randn(k, 4, generator=g, dtype=F64))
        leaves.append(torch.randn(k, 4, 4, generator=g, dtype=F64).tril(-1) + torch.eye(4, dtype=F64))
    leaves = [x.requires_grad_() for x in leaves]

    def f(*leaves):
        p, q = (
            stablekl.GaussianMixture(logits=x[0], loc=x[1], scale_tril=x[2])
            if k > 1
            else stablekl.MultivariateNormal(x[1][0], scale_tril=x[2][0])
            for k, x in zip(shape, (leaves[:3], leaves[3:]), strict=True)
        )
        e = stablekl.kl_estimate(p, q, rtol=rtol, max_points=8192)
        assert e.method == "sobol"
        return e.value

    used = [i for i, x in enumerate(leaves) if shape[i // 3] > 1 or i % 3]
    grads = dict(zip(used, torch.autograd.grad(f(*leaves), [leaves[i] for i in used]), strict=True))
    for i in used:
        direction = torch.randn(leaves[i].shape, generator=g, dtype=F64)
        direction = direction.tril() if i % 3 == 2 else direction
        h = 1e-5
        ends = [
            float(f(*(x + s * h * direction if i == j else x for j, x in enumerate(leaves))).detach()) for s in (1, -1)
        ]
        expected = (ends[0] - ends[1]) / (2 * h)
        assert float((grads[i] * direction).sum()) == pytest.approx(expected, rel=1e-6, abs=1e-8)


def test_double_backward():
    p, q = TWO["overlapping"]
    table = torch.tensor(p, dtype=F64, requires_grad=True)
    for dim in (1, 3):
        assert torch.autograd.gradgradcheck(lambda t, d=dim: kl_divergence(gaussian(t, d), gaussian(q, d)), (table,))


# ------------------------------------------------------------------------------- never negative, never NaN


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("k_p", "k_q", "dim"), [(2, 1, 3), (3, 1, 2), (1, 3, 2), (2, 2, 2), (3, 2, 1)])
def test_random_problems(dtype, k_p, k_q, dim):
    g = torch.Generator().manual_seed(5)
    shift = 10.0 ** torch.linspace(-4, 2, 20, dtype=F64)

    def make(k):
        loc = torch.randn(20, k, dim, generator=g, dtype=F64) * shift[:, None, None]
        scale = torch.randn(20, k, dim, generator=g, dtype=F64).exp()
        logits = 3 * torch.randn(20, k, generator=g, dtype=F64)
        return stablekl.GaussianMixture(logits=logits.to(dtype), loc=loc.to(dtype), scale_diag=scale.to(dtype))

    p, q = make(k_p), make(k_q)
    with stablekl.accuracy(rtol=1.0):
        value = kl_divergence(p, q)
        assert value.dtype == dtype
        assert bool((value >= 0).all())
        double = kl_divergence(p.to(F64), q.to(F64))
    eps = torch.finfo(dtype).eps
    largest = torch.finfo(dtype).max
    within = (value.double() - double).abs() <= 8 * eps * (1 + double)
    assert bool((within | (double > 0.99 * largest)).all())


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("dim", [1, 2])
def test_what_overflows_is_infinite(k, dim):
    m = stablekl.GaussianMixture(
        logits=torch.zeros(k, dtype=F64),
        loc=torch.arange(k * dim, dtype=F64).reshape(k, dim),
        scale_diag=torch.ones(k, dim, dtype=F64),
    )
    needle = torch.full((2, dim), 1e-200, dtype=F64)
    q = stablekl.MultivariateNormal(torch.zeros(dim, dtype=F64), scale_diag=needle[0])
    r = stablekl.GaussianMixture(
        logits=torch.tensor([0.0, 1.0], dtype=F64),
        loc=needle * torch.tensor([[0.0], [1.0]], dtype=F64),
        scale_diag=needle,
    )
    for other in (q, r):
        e = stablekl.kl_estimate(m, other)
        assert float(e.value) == float(e.upper) == math.inf
        assert not bool(e.lower.isnan())
        assert not bool(e.error.isnan())


def test_components_without_a_rule():
    two, laplace = Categorical(torch.ones(2)), torch.distributions.Laplace(torch.zeros(2, 3), torch.ones(2, 3))
    q = MultivariateNormal(torch.zeros(3), torch.eye(3))
    m = MixtureSameFamily(two, Independent(Normal(torch.zeros(2, 3), torch.ones(2, 3)), 1))
    with pytest.raises(NotImplementedError, match=r"mixtures of Independent\(Laplace, 1\)"):
        kl_divergence(MixtureSameFamily(two, Independent(laplace, 1)), q)
    with pytest.raises(NotImplementedError, match=r"Independent\(Laplace, 1\)"):
        kl_divergence(m, Independent(torch.distributions.Laplace(torch.zeros(3), torch.ones(3)), 1))
    with pytest.raises(NotImplementedError, match="mixtures of Gamma"):
        kl_divergence(MixtureSameFamily(two, torch.distributions.Gamma(torch.ones(2), torch.ones(2))), m)
    with pytest.raises(NotImplementedError, match="Laplace"):
        kl_divergence(m, torch.distributions.Laplace(0.0, 1.0))


def test_dimensions_must_agree():
    with pytest.raises(ValueError, match="same space"):
        kl_divergence(gaussian(TWO["bimodal"][0], 2), gaussian(TWO["bimodal"][1], 3))


@pytest.mark.parametrize("divergence", [kl_divergence, stablekl.kl_bounds, stablekl.jensen_shannon])
def test_batches_must_broadcast(divergence):
    p = single_or_mixture("scale_diag", (2, 5), 2, 3, 1, stablekl)
    q = single_or_mixture("scale_diag", (4,), 1, 3, 2, stablekl)
    with pytest.raises(ValueError, match=r"batch shapes \(2, 5\) and \(4,\) do not broadcast"):
        divergence(p, q)


# ------------------------------------------------------------------------------------- batches, transforms


@pytest.mark.parametrize(("k_p", "k_q"), [(1, 3), (2, 1), (3, 1), (4, 1), (2, 2), (3, 3)])
@pytest.mark.parametrize("dim", [1, 2, 4])
def test_no_rows(k_p, k_q, dim):
    p, q = (
        stablekl.GaussianMixture(
            probs=torch.ones(*batch, k), loc=torch.zeros(*batch, k, dim), covariance_matrix=torch.eye(dim)
        )
        for batch, k in (((2, 0), k_p), ((1,), k_q))
    )
    assert kl_divergence(p, q).shape == (2, 0)
    results = [*stablekl.kl_estimate(p, q)[:4], *stablekl.kl_bounds(p, q), stablekl.jensen_shannon(p, q)]
    results += [stablekl.cross_entropy(p, q), stablekl.mutual_information(p), stablekl.entropy_estimate(p).value]
    assert all(x.shape == (2, 0) for x in results)


@pytest.mark.parametrize(("k_p", "k_q"), [(2, 1), (3, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize(("batch_p", "batch_q"), [((), (3,)), ((3,), ()), ((2, 1), (3,)), ((1, 3), (2, 1))])
def test_batches_are_their_rows(k_p, k_q, batch_p, batch_q):
    p = single_or_mixture("covariance_matrix", batch_p, k_p, 2, 1, stablekl)
    q = single_or_mixture("covariance_matrix", batch_q, k_q, 2, 2, stablekl)
    value = kl_divergence(p, q)
    batch = torch.broadcast_shapes(batch_p, batch_q)
    assert value.shape == batch
    wide_p, wide_q = p.expand(batch), q.expand(batch)

    def row(d, i):
        if isinstance(d, MixtureSameFamily):
            c = d.component_distribution
            return stablekl.GaussianMixture(
                logits=d.log_weights[i], loc=c.loc[i], covariance_matrix=c.covariance_matrix[i]
            )
        return stablekl.MultivariateNormal(d.loc[i], covariance_matrix=d.covariance_matrix[i])

    for i in itertools.product(*map(range, batch)):
        # what else is in the batch does not matter: each row has the points that it needs
        torch.testing.assert_close(value[i], kl_divergence(row(wide_p, i), row(wide_q, i)), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("k_p", "k_q"), [(3, 1), (2, 2)])
def test_gradients_of_many_rows_come_in_chunks(k_p, k_q, monkeypatch):
    p = single_or_mixture("covariance_matrix", (5,), k_p, 2, 1, stablekl)
    q = single_or_mixture("covariance_matrix", (5,), k_q, 2, 2, stablekl)

    def gradient():
        loc = p.component_distribution.loc.clone().requires_grad_()
        m = stablekl.GaussianMixture(
            logits=p.log_weights, loc=loc, covariance_matrix=p.component_distribution.covariance_matrix
        )
        (g,) = torch.autograd.grad(kl_divergence(m, q).sum(), loc)
        return g

    whole = gradient()
    monkeypatch.setattr(stablekl.mixtures.engines.adaptive, "RECORDED_CHUNK", 1)
    torch.testing.assert_close(gradient(), whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("k_p", "k_q", "dim"), [(2, 1, 2), (3, 1, 2), (1, 2, 2), (2, 3, 1)])
def test_vmap_and_jacrev(k_p, k_q, dim):
    """A fixed choice under transforms: right to the tolerance, and no warning."""
    p = single_or_mixture("scale_diag", (3,), k_p, dim, 1, stablekl)
    q = single_or_mixture("scale_diag", (), k_q, dim, 2, stablekl)
    if k_p == 1:
        f, x = (
            lambda loc: kl_divergence(stablekl.MultivariateNormal(loc, scale_diag=torch.ones(dim, dtype=F64)), q),
            p.loc,
        )
    else:
        component = p.component_distribution

        def f(loc):
            m = stablekl.GaussianMixture(logits=p.log_weights[0], loc=loc, scale_diag=component.scale_diag[0])
            return kl_divergence(m, q)

        x = component.loc
    values = torch.vmap(f)(x)
    rows = torch.stack([f(row) for row in x])
    torch.testing.assert_close(values, rows, rtol=2e-2, atol=2e-2)
    jacobian = torch.vmap(torch.func.jacrev(f))(x)
    assert jacobian.shape == x.shape
    assert bool(jacobian.isfinite().all())
    tangent = torch.ones_like(x[0])
    _, forward = torch.func.jvp(f, (x[0],), (tangent,))
    torch.testing.assert_close(forward, jacobian[0].sum(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("k_p", "k_q", "dim"), [(2, 1, 2), (3, 1, 2), (1, 2, 2), (2, 3, 1)])
def test_forward_mode_outside_of_transforms(k_p, k_q, dim):
    """Dual numbers in eager mode: the derivative that backward gives, of the same points."""
    p = single_or_mixture("scale_diag", (2,), k_p, dim, 1, stablekl)
    q = single_or_mixture("scale_diag", (), k_q, dim, 2, stablekl)
    loc = (p if k_p == 1 else p.component_distribution).loc

    def f(loc):
        if k_p == 1:
            return kl_divergence(stablekl.MultivariateNormal(loc, scale_diag=p.scale_diag), q)
        scale = p.component_distribution.scale_diag
        return kl_divergence(stablekl.GaussianMixture(logits=p.log_weights, loc=loc, scale_diag=scale), q)

    leaf = loc.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(leaf).sum(), leaf)
    with forward_ad.dual_level():
        value = f(forward_ad.make_dual(loc, torch.ones_like(loc)))
        tangent = forward_ad.unpack_dual(value).tangent
    torch.testing.assert_close(tangent, g.flatten(1).sum(1), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("k_p", "k_q"), [(2, 1), (2, 2)])
def test_compiled(k_p, k_q):
    def f(logits, loc, scale):
        m = stablekl.GaussianMixture(logits=logits, loc=loc, scale_diag=scale, validate_args=False)
        q = stablekl.MultivariateNormal(
            torch.zeros(2, dtype=F64), scale_diag=torch.full((2,), 2.0, dtype=F64), validate_args=False
        )
        if k_q == 2:
            q = stablekl.GaussianMixture(
                logits=torch.zeros(2, dtype=F64),
                loc=torch.ones(2, 2, dtype=F64),
                scale_diag=loc.abs() + 1,
                validate_args=False,
            )
        return stablekl.kl_divergence(m, q)

    g = torch.Generator().manual_seed(0)
    given = [
        torch.randn(k_p, generator=g, dtype=F64),
        torch.randn(k_p, 2, generator=g, dtype=F64),
        torch.ones(k_p, 2, dtype=F64),
    ]
    leaves = [x.requires_grad_() for x in given]
    compiled = torch.compile(f, fullgraph=True)(*leaves)
    torch.testing.assert_close(compiled, f(*leaves), rtol=2e-2, atol=2e-2)
    assert all(bool(x.isfinite().all()) for x in torch.autograd.grad(compiled, leaves))


def test_the_map_of_the_references():
    """Embedding a problem must not change its divergence: single Gaussians, by torch's own rule."""
    p, q = [(1.0, 0.3, 0.7)], [(1.0, -0.5, 1.3)]
    truth = float(line(p, q))
    for dim in (2, 8):
        a, b = (embedded(rows, dim) for rows in (p, q))
        value = kl_divergence(MultivariateNormal(a[1][0], a[2][0]), MultivariateNormal(b[1][0], b[2][0]))
        assert float(value) == pytest.approx(truth, rel=1e-12)
