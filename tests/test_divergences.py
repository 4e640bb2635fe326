"""Divergences beyond KL against their definitions in mpmath, from far apart to one part in 1e12."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import mpmath as mp
import pytest
import torch
from torch import Tensor
from torch import distributions as td
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import Distribution, Independent

import stablekl
from stablekl.divergences.gaps import exp_gap, log_gap

F64 = torch.float64
BAR = 1e-14  # observed: 3e-15 for matrices, 6e-16 elsewhere
ORDERS = (0.0, 1e-9, 0.1, 0.5, 0.9, 1 - 1e-12, 1.0, 1 + 1e-9, 1.5, 3.0)
DISTANCES = (1e-1, 1e-4, 1e-8, 1e-12)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*vmap:UserWarning"),
]


@pytest.fixture(autouse=True)
def _digits():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # thousands of operations on small tensors
    with mp.workdps(80):
        yield
    torch.set_num_threads(threads)


def error(value: Tensor, truth: mp.mpf) -> float:
    """Relative error; 0 and infinity must be met exactly."""
    x = float(value)
    if mp.isinf(truth) or truth == 0:
        return 0.0 if x == truth else math.inf
    return float(abs(mp.mpf(x) - truth) / abs(truth))


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# ---- truths -----------------------------------------------------------------------------------------------------


def matrix(x: Tensor) -> mp.matrix:
    return mp.matrix(x.tolist())


def gaussian_renyi(cov_p: mp.matrix, cov_q: mp.matrix, d: mp.matrix, alpha: float) -> mp.mpf:
    """The textbook form (Gil, Alajaji and Linder, 2013), which cancels: with 100 digits."""
    a, n = mp.mpf(alpha), d.rows
    if a == 1:
        trace = mp.fsum((mp.inverse(cov_q) * cov_p)[i, i] for i in range(n))
        return (trace - n + (d.T * mp.inverse(cov_q) * d)[0] + mp.log(mp.det(cov_q) / mp.det(cov_p))) / 2
    mixed = a * cov_q + (1 - a) * cov_p
    if min(mp.det(mixed[:k, :k]) for k in range(1, n + 1)) <= 0:
        return mp.inf
    if a == 0:
        return mp.mpf(0)
    dets = mp.log(mp.det(mixed) / (mp.det(cov_p) ** (1 - a) * mp.det(cov_q) ** a))
    return a / 2 * (d.T * mp.inverse(mixed) * d)[0] - dets / (2 * (a - 1))


def amplification(cov_p: mp.matrix, cov_q: mp.matrix, alpha: float) -> float:
    """How near the integral is to divergence: 1/min s_i, at most."""
    if alpha <= 1:
        return 1.0
    ratios = mp.eigsy(square_root(mp.inverse(cov_q)) * cov_p * square_root(mp.inverse(cov_q)), eigvals_only=True)
    return float(max(1, alpha / abs(1 - (mp.mpf(alpha) - 1) * (max(ratios) - 1))))


def square_root(a: mp.matrix) -> mp.matrix:
    values, vectors = mp.eigsy(a)
    return vectors * mp.diag([mp.sqrt(x) for x in values]) * vectors.T


def gaussian_transport(cov_p: mp.matrix, cov_q: mp.matrix, d: mp.matrix) -> mp.mpf:
    root = square_root(cov_q)
    cross = square_root(root * cov_p * root)
    return (d.T * d)[0] + mp.fsum(cov_p[i, i] + cov_q[i, i] - 2 * cross[i, i] for i in range(d.rows))


def renyi_of(log_integral: Callable[[mp.mpf], mp.mpf], alpha: float) -> mp.mpf:
    """From log int p^a q^(1-a); at alpha = 1 by its difference quotient, 1e-45 away."""
    a = mp.mpf(alpha)
    if a == 1:
        h = mp.mpf(10) ** -45
        return log_integral(1 + h) / h
    value = log_integral(a) / (a - 1)
    return value if abs(value) > mp.mpf(10) ** -60 else mp.mpf(0)


# ---- Gaussians --------------------------------------------------------------------------------------------------

Tensors = list[Tensor]
D = 3


class Form(NamedTuple):
    """A way to write a Gaussian down: from a mean and matrices to the distribution, and to the exact covariance."""

    build: Callable[..., Distribution]
    covariance: Callable[..., mp.matrix]
    draw: Callable[[int], Tensors]


def symmetric(a: Tensor) -> Tensor:
    return 0.5 * a + 0.5 * a.mT


def _positive(seed: int) -> Tensor:
    return 0.5 + random(seed, D).sigmoid()


def _tril(seed: int) -> Tensors:
    return [random(seed, D), 0.4 * random(seed + 50, D, D).tril(-1) + torch.diag(_positive(seed))]


def _matrix(seed: int) -> Tensors:
    a = random(seed + 50, D, D)
    return [random(seed, D), symmetric(a @ a.mT / D + 0.5 * torch.eye(D, dtype=F64))]


def _square(x: mp.matrix) -> mp.matrix:
    return x * x.T


FORMS = {
    "Independent": Form(
        lambda m, s: Independent(td.Normal(m, s), 1),
        lambda s: _square(mp.diag(s.tolist())),
        lambda seed: [random(seed, D), _positive(seed)],
    ),
    "scale_diag": Form(
        lambda m, s: stablekl.MultivariateNormal(m, scale_diag=s),
        lambda s: _square(mp.diag(s.tolist())),
        lambda seed: [random(seed, D), _positive(seed)],
    ),
    "scale_tril": Form(
        lambda m, t: stablekl.MultivariateNormal(m, scale_tril=t.tril()), lambda t: _square(matrix(t.tril())), _tril
    ),
    "covariance": Form(
        lambda m, c: td.MultivariateNormal(m, covariance_matrix=symmetric(c)), lambda c: matrix(c), _matrix
    ),
    "precision": Form(
        lambda m, c: stablekl.MultivariateNormal(m, precision_matrix=c), lambda c: mp.inverse(matrix(c)), _matrix
    ),
    "low rank": Form(
        td.LowRankMultivariateNormal,
        lambda w, d: _square(matrix(w)) + mp.diag(d.tolist()),
        lambda seed: [random(seed, D), random(seed + 50, D, 2), _positive(seed)],
    ),
}


def near(form: str, parameters: Tensors, distance: float, seed: int) -> Tensors:
    moved = []
    for k, x in enumerate(parameters):
        y = x + min(distance, 0.05) * x.abs().clamp(min=0.1) * random(seed + 200 + k, *x.shape)
        y = y.tril() if form == "scale_tril" and k else y
        moved.append(symmetric(y) if form in ("covariance", "precision") and k else y)
    return moved


def gaussian_pairs(form: str) -> list[tuple[Tensors, Tensors]]:
    q = FORMS[form].draw(1)
    return [(FORMS[form].draw(2), q)] + [(near(form, q, x, k), q) for k, x in enumerate(DISTANCES)]


@pytest.mark.parametrize("form", FORMS)
def test_gaussians_against_the_definition(form):
    build, covariance, _ = FORMS[form]
    for p, q in gaussian_pairs(form):
        cov_p, cov_q, d = covariance(*p[1:]), covariance(*q[1:]), matrix(p[0]) - matrix(q[0])
        first, second = build(*p), build(*q)
        truth = {a: gaussian_renyi(cov_p, cov_q, d, a) for a in ORDERS}
        for a, t in truth.items():
            bar = BAR * amplification(cov_p, cov_q, a)
            assert error(stablekl.renyi_divergence(first, second, a), t) < bar, a
        assert error(stablekl.chernoff_distance(first, second, 0.9), truth[0.9] * (1 - mp.mpf(0.9))) < BAR
        assert error(stablekl.bhattacharyya_distance(first, second), truth[0.5] / 2) < BAR
        assert error(stablekl.squared_hellinger(first, second), -mp.expm1(-truth[0.5] / 2)) < BAR
        jeffreys = truth[1.0] + gaussian_renyi(cov_q, cov_p, d, 1)
        assert error(stablekl.jeffreys_divergence(first, second), jeffreys) < BAR
        square = gaussian_transport(cov_p, cov_q, d)
        assert error(stablekl.squared_wasserstein2(first, second), square) < BAR
        assert error(stablekl.wasserstein2(first, second), mp.sqrt(square)) < BAR


@pytest.mark.parametrize("form", FORMS)
def test_the_textbook_forms_fail_nearby(form):
    """Must-fail twin: the same truths, double precision, the formulas of the literature."""
    _, covariance, _ = FORMS[form]
    p, q = gaussian_pairs(form)[3]
    truth = gaussian_renyi(covariance(*p[1:]), covariance(*q[1:]), matrix(p[0]) - matrix(q[0]), 0.5)
    sp, sq = (torch.tensor(covariance(*x[1:]).tolist(), dtype=F64).reshape(D, D) for x in (p, q))
    mixed, d = 0.5 * (sp + sq), p[0] - q[0]
    dets = torch.logdet(mixed) - 0.5 * torch.logdet(sp) - 0.5 * torch.logdet(sq)
    assert error(0.25 * d @ torch.linalg.solve(mixed, d) + dets, truth) > 1e-7
    square = gaussian_transport(covariance(*p[1:]), covariance(*q[1:]), matrix(p[0]) - matrix(q[0]))
    eigenvalues = torch.linalg.eigvals(sp @ sq).real
    assert error(d @ d + (torch.trace(sp) + torch.trace(sq) - 2 * eigenvalues.sqrt().sum()), square) > 1e-7


def test_the_definition_is_an_integral():
    """The closed form of the truths, in one dimension, by quadrature."""
    m, s, u, v = (mp.mpf(x) for x in (0.25, 0.75, -1, 1.5))
    for a in (mp.mpf("0.3"), mp.mpf("1.4")):

        def integrand(x, a=a):
            return mp.npdf(x, m, s) ** a * mp.npdf(x, u, v) ** (1 - a)

        integral = mp.quad(integrand, [-40, -10, -3, 0, 3, 10, 40])
        closed = gaussian_renyi(mp.matrix([[s * s]]), mp.matrix([[v * v]]), mp.matrix([[m - u]]), float(a))
        assert abs(mp.log(integral) / (a - 1) - closed) < 1e-15


@pytest.mark.parametrize(
    "pair", [("covariance", "scale_tril"), ("scale_diag", "covariance"), ("precision", "low rank")]
)
def test_mixed_forms(pair):
    (build_p, cov_p, draw_p), (build_q, cov_q, draw_q) = (FORMS[name] for name in pair)
    p, q = draw_p(1), draw_q(2)
    covs, d = (cov_p(*p[1:]), cov_q(*q[1:])), matrix(p[0]) - matrix(q[0])
    first, second = build_p(*p), build_q(*q)
    for a in (0.3, 1.0, 1.1):
        assert error(stablekl.renyi_divergence(first, second, a), gaussian_renyi(*covs, d, a)) < BAR
    assert error(stablekl.squared_wasserstein2(first, second), gaussian_transport(*covs, d)) < BAR


def test_a_covariance_next_to_a_factor_keeps_its_digits():
    """The residual of the factorisation knows the difference far below eps cond(Sigma)."""
    mean, factor = FORMS["scale_tril"].draw(1)
    cov = factor @ factor.mT + 1e-6 * torch.eye(D, dtype=F64)
    p, q = td.MultivariateNormal(mean, cov), td.MultivariateNormal(mean, scale_tril=factor)
    truth = gaussian_renyi(matrix(cov), _square(matrix(factor)), mp.matrix([0] * D), 0.5)
    assert error(stablekl.renyi_divergence(p, q, 0.5), truth) < 1e-12


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e4, 1e12, 1e100])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_extreme_scales(scale, alpha):
    p, q = td.Normal(*torch.tensor([1.0, scale], dtype=F64)), td.Normal(*torch.tensor([0.0, 1.0], dtype=F64))
    truth = gaussian_renyi(mp.matrix([[mp.mpf(scale) ** 2]]), mp.matrix([[1]]), mp.matrix([[1]]), alpha)
    # an exponential of twice the log-ratio of the scales costs that many eps
    assert error(stablekl.renyi_divergence(p, q, alpha), truth) < max(BAR, 2e-16 * abs(math.log(scale)))
    full = [stablekl.MultivariateNormal(x.loc.expand(2), scale_tril=torch.diag(x.scale.expand(2))) for x in (p, q)]
    if scale < 1e5:
        assert error(stablekl.renyi_divergence(*full, alpha), 2 * truth) < 1e-13


# ---- other families ---------------------------------------------------------------------------------------------


def poisson(p: Tensor, q: Tensor) -> Callable[[mp.mpf], mp.mpf]:
    x, y = mp.mpf(float(p)), mp.mpf(float(q))
    return lambda a: x**a * y ** (1 - a) - a * x - (1 - a) * y


def exponential(p: Tensor, q: Tensor) -> Callable[[mp.mpf], mp.mpf]:
    x, y = mp.mpf(float(p)), mp.mpf(float(q))
    return lambda a: mp.log(x**a * y ** (1 - a) / (a * x + (1 - a) * y)) if a * x + (1 - a) * y > 0 else mp.inf


def categories(x: list[mp.mpf], y: list[mp.mpf]) -> Callable[[mp.mpf], mp.mpf]:
    u, v = mp.fsum(x), mp.fsum(y)
    return lambda a: mp.log(mp.fsum((p / u) ** a * (q / v) ** (1 - a) for p, q in zip(x, y, strict=True)))


def bernoulli(p: mp.mpf, q: mp.mpf) -> Callable[[mp.mpf], mp.mpf]:
    return categories([p, 1 - p], [q, 1 - q])


def geometric(p: mp.mpf, q: mp.mpf) -> Callable[[mp.mpf], mp.mpf]:
    def log_integral(a: mp.mpf) -> mp.mpf:
        m = (1 - p) ** a * (1 - q) ** (1 - a)
        return mp.log(p**a * q ** (1 - a) / (1 - m)) if m < 1 else mp.inf

    return log_integral


def jensen(normaliser: Callable[[list[mp.mpf]], mp.mpf]) -> Callable[[Tensor, Tensor], Callable[[mp.mpf], mp.mpf]]:
    """Of an exponential family whose log-normaliser is a function of its parameters."""

    def log_integral_of(p: Tensor, q: Tensor) -> Callable[[mp.mpf], mp.mpf]:
        x, y = ([mp.mpf(v) for v in side.reshape(-1).tolist()] for side in (p, q))

        def log_integral(a: mp.mpf) -> mp.mpf:
            mixed = [a * u + (1 - a) * v for u, v in zip(x, y, strict=True)]
            return normaliser(mixed) - a * normaliser(x) - (1 - a) * normaliser(y) if min(mixed) > 0 else mp.inf

        return log_integral

    return log_integral_of


gamma = jensen(lambda v: mp.loggamma(v[0]) - v[0] * mp.log(v[1]))
dirichlet = jensen(lambda v: mp.fsum(map(mp.loggamma, v)) - mp.loggamma(mp.fsum(v)))


def laplace(p: Tensor, q: Tensor) -> Callable[[mp.mpf], mp.mpf]:
    (mean_p, scale_p), (mean_q, scale_q) = ([mp.mpf(v) for v in side.tolist()] for side in (p, q))

    def log_integral(a: mp.mpf) -> mp.mpf:
        u, v, d = a / scale_p, (1 - a) / scale_q, abs(mean_p - mean_q)
        if u + v <= 0:
            return mp.inf
        between = d * mp.exp(-u * d) if u == v else (mp.exp(-v * d) - mp.exp(-u * d)) / (u - v)
        tails = (mp.exp(-u * d) + mp.exp(-v * d)) / (u + v)
        return mp.log(tails + between) - a * mp.log(2 * scale_p) - (1 - a) * mp.log(2 * scale_q)

    return log_integral


def exact(x: Tensor) -> mp.mpf:
    return mp.mpf(float(x))


def sigmoid(x: Tensor) -> mp.mpf:
    return 1 / (1 + mp.exp(-exact(x)))


class Other(NamedTuple):
    build: Callable[[Tensor], Distribution]
    log_integral: Callable[[Tensor, Tensor], Callable[[mp.mpf], mp.mpf]]
    p: Tensor
    q: Tensor


def scalar(x: float) -> Tensor:
    return torch.tensor(x, dtype=F64)


WEIGHTS = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.25, 0.05, 0.35, 0.35]], dtype=F64)
LOGITS = torch.tensor([[0.1, -2.0, 3.0, 0.4], [1.5, 0.5, 0.35, -0.35]], dtype=F64)

OTHERS = {
    "Poisson": Other(td.Poisson, poisson, scalar(0.7), scalar(5.3)),
    "Exponential": Other(td.Exponential, exponential, scalar(2.1), scalar(0.6)),
    "Bernoulli": Other(td.Bernoulli, lambda p, q: bernoulli(exact(p), exact(q)), scalar(0.31), scalar(0.83)),
    "Bernoulli, rare": Other(td.Bernoulli, lambda p, q: bernoulli(exact(p), exact(q)), scalar(1e-9), scalar(3e-7)),
    "Bernoulli, logits": Other(
        lambda x: td.Bernoulli(logits=x), lambda p, q: bernoulli(sigmoid(p), sigmoid(q)), scalar(-3.0), scalar(4.0)
    ),
    "Binomial": Other(
        lambda x: td.Binomial(5, x),
        lambda p, q: lambda a: 5 * bernoulli(exact(p), exact(q))(a),
        scalar(0.31),
        scalar(0.43),
    ),
    "Geometric": Other(td.Geometric, lambda p, q: geometric(exact(p), exact(q)), scalar(0.31), scalar(0.43)),
    "Geometric, rare": Other(td.Geometric, lambda p, q: geometric(exact(p), exact(q)), scalar(1e-9), scalar(0.9)),
    "Geometric, logits": Other(
        lambda x: td.Geometric(logits=x), lambda p, q: geometric(sigmoid(p), sigmoid(q)), scalar(-1.0), scalar(1.5)
    ),
    "Gamma": Other(
        lambda x: td.Gamma(x[..., 0], x[..., 1]),
        gamma,
        torch.tensor([1.3, 0.7], dtype=F64),
        torch.tensor([4.1, 1.9], dtype=F64),
    ),
    "Chi2": Other(
        td.Chi2,
        lambda p, q: gamma(*(0.5 * torch.stack([x, x / x]) for x in (p, q))),
        scalar(3.0),
        scalar(40.0),
    ),
    "InverseGamma": Other(
        lambda x: td.InverseGamma(x[..., 0], x[..., 1]),
        gamma,
        torch.tensor([30.0, 0.7], dtype=F64),
        torch.tensor([50.0, 9.0], dtype=F64),
    ),
    "Beta": Other(
        lambda x: td.Beta(x[..., 0], x[..., 1]),
        dirichlet,
        torch.tensor([0.9, 1.7], dtype=F64),
        torch.tensor([2.5, 0.6], dtype=F64),
    ),
    "Dirichlet": Other(
        td.Dirichlet,
        dirichlet,
        torch.tensor([0.4, 1.7, 12.0], dtype=F64),
        torch.tensor([2.5, 0.6, 8.0], dtype=F64),
    ),
    "Laplace": Other(
        lambda x: td.Laplace(x[..., 0], x[..., 1]),
        laplace,
        torch.tensor([-0.4, 0.7], dtype=F64),
        torch.tensor([1.5, 1.1], dtype=F64),
    ),
    "Categorical": Other(
        td.Categorical,
        lambda p, q: categories(*([mp.mpf(v) for v in td.Categorical(x).probs.tolist()] for x in (p, q))),
        *WEIGHTS,
    ),
    "OneHotCategorical, logits": Other(
        lambda x: td.OneHotCategorical(logits=x),
        lambda p, q: categories(*([mp.exp(v) for v in td.Categorical(logits=x).logits.tolist()] for x in (p, q))),
        *LOGITS,
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_against_the_definition(name):
    build, log_integral, far, q = OTHERS[name]
    mp.mp.dps = 130  # difference quotients of integrals that differ from 1 by 1e-24
    for p in (far, *(q * (1 - x * random(7, *q.shape).sigmoid()) for x in DISTANCES)):
        f, first, second = log_integral(p, q), build(p), build(q)
        for a in ORDERS:
            assert error(stablekl.renyi_divergence(first, second, a), renyi_of(f, a)) < BAR, (a, p)
        assert error(stablekl.chernoff_distance(first, second, 0.9), -f(mp.mpf(0.9))) < BAR
        assert error(stablekl.squared_hellinger(first, second), -mp.expm1(f(mp.mpf("0.5")))) < BAR
        jeffreys = renyi_of(f, 1) + renyi_of(log_integral(q, p), 1)
        assert error(stablekl.jeffreys_divergence(first, second), jeffreys) < BAR


def test_supports_that_differ():
    p, q = td.Categorical(torch.tensor([0.5, 0.5, 0.0])), td.Categorical(torch.tensor([0.0, 0.25, 0.75]))
    both = td.Categorical(torch.tensor([0.2, 0.3, 0.5]))
    assert stablekl.renyi_divergence(p, both, 0.0) == pytest.approx(math.log(2))  # -log q(supp p)
    assert stablekl.renyi_divergence(both, p, 0.0) == 0
    assert stablekl.renyi_divergence(both, p, 1.0) == math.inf
    assert stablekl.renyi_divergence(p, both, 2.0) == pytest.approx(math.log(0.25 / 0.2 + 0.25 / 0.3), rel=1e-6)
    assert stablekl.chernoff_distance(both, p, 1.0) == pytest.approx(math.log(2))
    assert stablekl.bhattacharyya_distance(p, q) == pytest.approx(-0.5 * math.log(0.125))
    apart = td.Bernoulli(torch.tensor(0.0)), td.Bernoulli(torch.tensor(1.0))
    assert stablekl.bhattacharyya_distance(*apart) == math.inf
    assert stablekl.squared_hellinger(*apart) == 1
    logits = torch.tensor([0.0, 0.0, -torch.inf], requires_grad=True)
    value = stablekl.squared_hellinger(td.Categorical(logits=logits, validate_args=False), both)
    assert value.item() == pytest.approx(1 - math.sqrt(0.1) - math.sqrt(0.15), rel=1e-6)
    value.backward()
    assert logits.grad.isfinite().all()


def test_a_rate_of_zero_is_a_point_mass():
    p, q = td.Poisson(torch.tensor(0.0, dtype=F64)), td.Poisson(torch.tensor(2.0, dtype=F64))
    assert stablekl.renyi_divergence(p, q, 0.5) == 2
    assert stablekl.renyi_divergence(p, q, 3.0) == 2
    assert stablekl.renyi_divergence(q, p, 0.5) == 2
    assert stablekl.renyi_divergence(q, p, 1.0) == math.inf


# ---- all of them ------------------------------------------------------------------------------------------------

DIVERGENCES: dict[str, Callable[[Distribution, Distribution], Tensor]] = {
    "renyi 0": lambda p, q: stablekl.renyi_divergence(p, q, 0.0),
    "renyi 0.3": lambda p, q: stablekl.renyi_divergence(p, q, 0.3),
    "renyi 1": lambda p, q: stablekl.renyi_divergence(p, q, 1.0),
    "renyi 1.2": lambda p, q: stablekl.renyi_divergence(p, q, 1.2),
    "chernoff": lambda p, q: stablekl.chernoff_distance(p, q, 0.7),
    "bhattacharyya": stablekl.bhattacharyya_distance,
    "hellinger": stablekl.squared_hellinger,
    "jeffreys": stablekl.jeffreys_divergence,
    "squared wasserstein": stablekl.squared_wasserstein2,
    "wasserstein": stablekl.wasserstein2,
}
BUILDS = {name: (form.build, form.draw(1), form.draw(2)) for name, form in FORMS.items()}
BUILDS |= {name: (other.build, [other.p], [other.q]) for name, other in OTHERS.items()}
MODERATE = [name for name in BUILDS if "rare" not in name]


def known(what: str, name: str) -> bool:
    return name in FORMS or "wasserstein" not in what


@pytest.mark.parametrize("name", BUILDS)
def test_zero_with_gradient_zero_at_equality(name):
    build, parameters, _ = BUILDS[name]
    for what, divergence in DIVERGENCES.items():
        if known(what, name):
            p, q = ([x.clone().requires_grad_() for x in parameters] for _ in range(2))
            value = divergence(build(*p), build(*q))
            value.backward()
            assert value == 0, what
            assert all((x.grad == 0).all() for x in p + q if x.grad is not None), what


@pytest.mark.parametrize("name", MODERATE)
@pytest.mark.parametrize("same", [False, True])
def test_derivatives(name, same):
    build, first, second = BUILDS[name]
    inputs = [x.clone().requires_grad_() for x in (*(second if same else first), *second)]
    fold = symmetric if name in ("covariance", "precision") else (lambda x: x)
    n = len(first)

    def make(x: tuple[Tensor, ...]) -> Distribution:
        return build(x[0], *(fold(y) for y in x[1:])) if n > 1 else build(*x)

    td.Distribution.set_default_validate_args(False)
    try:
        for what in ("renyi 0.3", "jeffreys", "squared wasserstein") if same else ("renyi 1.2", "squared wasserstein"):
            if known(what, name):

                def f(*x: Tensor, what: str = what) -> Tensor:
                    return DIVERGENCES[what](make(x[:n]), make(x[n:]))

                if f(*inputs).isfinite():
                    assert gradcheck(f, inputs, fast_mode=True, check_forward_ad=not same)
                    assert gradgradcheck(f, inputs, fast_mode=True, atol=1e-4)
    finally:
        td.Distribution.set_default_validate_args(True)


@pytest.mark.parametrize("alpha", [0.3, 0.999, 1.2])
@pytest.mark.parametrize(
    "name", ["Independent", "scale_tril", "Poisson", "Categorical", "Geometric", "Gamma", "Beta", "Laplace"]
)
def test_derivatives_by_the_order(name, alpha):
    build, first, second = BUILDS[name]
    p, q = build(*first), build(*second)
    order = torch.tensor([alpha], dtype=F64, requires_grad=True)
    assert gradcheck(lambda a: stablekl.renyi_divergence(p, q, a), order, check_forward_ad=True)
    assert gradgradcheck(lambda a: stablekl.renyi_divergence(p, q, a), order)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("gap", [log_gap, exp_gap])
def test_gradients_keep_their_digits(gap, distance):
    """d/dl of the two gaps, which autograd through the textbook form loses altogether at 1e-12."""
    for a in (0.0, 0.3, 1.0, 1.7):
        ratio, zero = scalar(distance).requires_grad_(), scalar(0.0)
        inputs = (ratio, scalar(a)) if gap is log_gap else (ratio, zero, ratio, scalar(a))
        (slope,) = torch.autograd.grad(gap(*inputs), ratio)
        x, w = mp.mpf(distance), mp.mpf(a)
        if gap is log_gap:
            truth = max(w, 1) * mp.expm1(x) / (w + (1 - w) * mp.exp(x))
        else:
            truth = max(w, 1) * (mp.exp(x) * x if w == 1 else (mp.exp(x) - mp.exp(w * x)) / (1 - w))
        assert error(slope, truth) < BAR


def test_gradients_of_matrices_keep_their_digits():
    """Along a direction in the factor of p, against a difference quotient with 80 digits."""
    for p, q in gaussian_pairs("scale_tril"):
        direction = random(11, D, D).tril()
        mean, factor = p[0], p[1].clone().requires_grad_()
        build, step = FORMS["scale_tril"].build, mp.mpf(10) ** -30
        d, cov_q = matrix(p[0]) - matrix(q[0]), _square(matrix(q[1]))
        truths = (lambda c, cov_q=cov_q, d=d: gaussian_renyi(c, cov_q, d, 0.3), "renyi 0.3")
        distances = (lambda c, cov_q=cov_q, d=d: gaussian_transport(c, cov_q, d), "squared wasserstein")
        for truth, what in (truths, distances):
            moved = [_square(matrix(p[1]) + sign * step * matrix(direction)) for sign in (1, -1)]
            quotient = (truth(moved[0]) - truth(moved[1])) / (2 * step)
            (gradient,) = torch.autograd.grad(DIVERGENCES[what](build(mean, factor), build(*q)), factor)
            size = float((gradient.abs() * direction.abs()).sum())
            assert abs(float((gradient * direction).sum()) - quotient) < BAR * size, what


def test_derivatives_where_the_integral_diverges():
    for pair in (
        [
            td.Normal(torch.zeros(2), torch.tensor([4.0, 1.0], requires_grad=True)),
            td.Normal(torch.ones(2), torch.ones(2)),
        ],
        [
            td.MultivariateNormal(torch.zeros(2), scale_tril=torch.diag(torch.tensor([4.0, 2.0])).requires_grad_()),
            td.MultivariateNormal(torch.ones(2), torch.eye(2)),
        ],
        [td.Exponential(torch.tensor(0.5, requires_grad=True)), td.Exponential(torch.tensor(4.0))],
        [td.Geometric(torch.tensor(0.1, requires_grad=True)), td.Geometric(torch.tensor(0.9))],
    ):
        order = torch.tensor(3.0, requires_grad=True)
        value = stablekl.renyi_divergence(*pair, order)
        assert value.isinf().any()
        leaf = next(v for v in pair[0].__dict__.values() if isinstance(v, Tensor) and v.requires_grad)
        for gradient in torch.autograd.grad(value.sum(), (leaf, order)):
            assert not gradient.isnan().any()


def test_orders_are_monotone_and_continuous():
    p, q = stablekl.Normal(scalar(0.3), scalar(0.8)), stablekl.Normal(scalar(-0.5), scalar(1.3))
    orders = torch.linspace(0, 4, 400, dtype=F64)
    value = stablekl.renyi_divergence(p, q, orders)
    assert (value.diff() >= 0).all()
    assert stablekl.renyi_divergence(p, q, 1.0) == pytest.approx(float(stablekl.kl_divergence(p, q)), rel=1e-15)
    # skew symmetry: (1 - a) D_a(p || q) = a D_(1-a)(q || p)
    a = orders[:100]
    assert torch.allclose((1 - a) * value[:100], a * stablekl.renyi_divergence(q, p, 1 - a), rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", [n for n in MODERATE if n != "low rank"])
def test_batches_and_dtypes(name):
    build, first, second = BUILDS[name]
    p, q = [x.expand(3, 1, *x.shape) for x in first], [x.expand(2, *x.shape) for x in second]
    halves = not name.startswith(("covariance", "precision"))
    for what, divergence in DIVERGENCES.items():
        if known(what, name):
            single = divergence(build(*first), build(*second))
            batch = divergence(build(*p), build(*q))
            assert batch.shape == (3, 2), what
            assert torch.allclose(batch, single, rtol=1e-14), what
            for dtype in (torch.float32, torch.float16, torch.bfloat16) if halves else (torch.float32,):
                low = [[x.to(dtype) for x in side] for side in (first, second)]
                value = divergence(*(build(*x) for x in low))
                exact_value = divergence(*(build(*(x.double() for x in side)) for side in low))
                assert value.dtype == dtype
                if "Categorical" not in name:  # torch's constructor has normalised in the narrow dtype
                    assert torch.allclose(value.double(), exact_value, rtol=4 * torch.finfo(dtype).eps), (what, dtype)


def test_float32_near_equality():
    loc, scale = torch.zeros(4), torch.ones(4)
    p = Independent(td.Normal(loc + 2.0**-20, scale), 1)
    q = Independent(td.Normal(loc, scale + 2.0**-22), 1)
    wide = [Independent(td.Normal(x.base_dist.loc.double(), x.base_dist.scale.double()), 1) for x in (p, q)]
    for what, divergence in DIVERGENCES.items():
        assert torch.allclose(divergence(p, q).double(), divergence(*wide), rtol=2e-7, atol=0), what


@pytest.mark.parametrize(
    "name",
    ["Independent", "scale_tril", "low rank", "Bernoulli", "Categorical", "Poisson", "Gamma", "Dirichlet", "Laplace"],
)
def test_vmap(name):
    build, first, second = BUILDS[name]
    stacked = [torch.stack((x, y)) for x, y in zip(first, second, strict=True)]
    n = len(first)
    td.Distribution.set_default_validate_args(False)
    try:
        for what in ("renyi 0.3", "renyi 1.2", "jeffreys", "squared wasserstein"):
            if known(what, name):

                def f(*x: Tensor, what: str = what) -> Tensor:
                    return DIVERGENCES[what](build(*x[:n]), build(*x[n:]))

                inputs = (*stacked, *(x.flip(0) for x in stacked))
                assert torch.allclose(torch.func.vmap(f)(*inputs), f(*inputs), rtol=1e-13)
                gradients = torch.func.vmap(torch.func.grad(f, argnums=tuple(range(2 * n))))(*inputs)
                leaves = [x.clone().requires_grad_() for x in inputs]
                for a, b in zip(gradients, torch.autograd.grad(f(*leaves).sum(), leaves), strict=True):
                    assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)
    finally:
        td.Distribution.set_default_validate_args(True)


@pytest.mark.parametrize("name", ["Independent", "scale_tril", "Categorical", "Gamma", "Laplace"])
def test_compile(name):
    build, first, second = BUILDS[name]
    n = len(first)
    for what in ("renyi 1.2", "squared wasserstein") if name == "scale_tril" else ("renyi 0.3",):

        def f(*x: Tensor, what: str = what) -> Tensor:
            return DIVERGENCES[what](build(*x[:n]), build(*x[n:]))

        torch.compiler.reset()
        td.Distribution.set_default_validate_args(False)
        try:
            leaves = [x.clone().requires_grad_() for x in (*first, *second)]
            value = torch.compile(f, fullgraph=True, backend="aot_eager")(*leaves)
            compiled, plain = (torch.autograd.grad(v, leaves) for v in (value, f(*leaves)))
        finally:
            td.Distribution.set_default_validate_args(True)
        assert torch.allclose(value, f(*leaves), rtol=1e-13)
        for a, b in zip(compiled, plain, strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)


def test_products_of_independent_members():
    rates = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=F64)
    p, q = Independent(td.Poisson(rates), 1), Independent(td.Poisson(rates.flip(-1)), 1)
    for what, divergence in DIVERGENCES.items():
        if "wasserstein" not in what and what != "hellinger":
            assert torch.allclose(divergence(p, q), divergence(p.base_dist, q.base_dist).sum(-1), rtol=1e-15), what
    orders = torch.tensor([0.3, 1.4], dtype=F64)
    by_hand = torch.stack([stablekl.renyi_divergence(p, q, float(a))[k] for k, a in enumerate(orders)])
    assert torch.allclose(stablekl.renyi_divergence(p, q, orders), by_hand, rtol=1e-15)


def test_errors():
    normal, poisson_1 = td.Normal(0.0, 1.0), td.Poisson(torch.ones(3))
    vector = td.MultivariateNormal(torch.zeros(2), torch.eye(2))
    with pytest.raises(NotImplementedError, match="Rényi divergence of Normal and Poisson"):
        stablekl.renyi_divergence(normal, poisson_1, 0.5)
    with pytest.raises(NotImplementedError, match="Jeffreys divergence of Cauchy and Cauchy"):
        stablekl.jeffreys_divergence(td.Cauchy(0.0, 1.0), td.Cauchy(0.0, 2.0))
    with pytest.raises(NotImplementedError, match="Wasserstein distance of Poisson and Poisson"):
        stablekl.wasserstein2(poisson_1, poisson_1)
    with pytest.raises(NotImplementedError, match="Binomial with 3 trials against 4"):
        stablekl.bhattacharyya_distance(td.Binomial(3, torch.tensor(0.5)), td.Binomial(4, torch.tensor(0.5)))
    with pytest.raises(ValueError, match="event shapes are"):
        stablekl.squared_wasserstein2(vector, td.MultivariateNormal(torch.zeros(3), torch.eye(3)))
    with pytest.raises(ValueError, match="event shapes are"):
        stablekl.renyi_divergence(Independent(poisson_1, 1), Independent(td.Poisson(torch.ones(2)), 1), 0.5)
    with pytest.raises(ValueError, match="p has 2 categories and q has 3"):
        stablekl.squared_hellinger(td.Categorical(torch.ones(2)), td.Categorical(torch.ones(3)))
    for bad in (-0.5, math.nan, math.inf, torch.tensor([0.5, -1.0])):
        with pytest.raises(ValueError, match="alpha"):
            stablekl.renyi_divergence(normal, normal, bad)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        stablekl.chernoff_distance(normal, normal, 1.5)


@pytest.mark.parametrize("unit", [1e-300, 1e-160, 1.0, 1e160, 1e300])
def test_distances_whose_square_is_no_number(unit):
    leaves = [torch.tensor(v, dtype=torch.float64) * unit for v in ([0.0, 1.0], [1.0, 5.0], [3.0, 1.0], [5.0, 5.0])]
    mu_p, sigma_p, mu_q, sigma_q = (t.requires_grad_() for t in leaves)
    p, q = (Independent(td.Normal(m, s), 1) for m, s in ((mu_p, sigma_p), (mu_q, sigma_q)))
    distance = stablekl.wasserstein2(p, q)
    assert float(distance.detach()) == pytest.approx(5.0 * unit, rel=1e-15)
    assert torch.autograd.grad(distance, mu_p)[0].tolist() == [pytest.approx(-0.6), 0.0]


@pytest.mark.parametrize("kind", ["normal", "full"])
def test_the_slope_at_order_zero(kind):
    """D_alpha/alpha is not 0 there: it is KL(q || p)."""
    if kind == "normal":
        p, q = (td.Normal(*torch.tensor(v, dtype=torch.float64)) for v in ([0.0, 1.0], [1.0, 2.0]))
    else:
        cov = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
        p, q = (td.MultivariateNormal(cov[i], cov * (i + 1)) for i in range(2))
    alpha = torch.zeros((), dtype=torch.float64, requires_grad=True)
    expected = stablekl.kl_divergence(q, p)
    for f in (stablekl.renyi_divergence, stablekl.chernoff_distance):
        value = f(p, q, alpha)
        assert float(value.detach()) == 0
        torch.testing.assert_close(torch.autograd.grad(value, alpha)[0], expected, rtol=1e-14, atol=0)


def test_what_does_not_go_together_is_named():
    p = td.Normal(torch.zeros(3), 1.0)
    functions = [lambda p, q: stablekl.renyi_divergence(p, q, 0.5), lambda p, q: stablekl.chernoff_distance(p, q, 0.5)]
    functions += [stablekl.squared_hellinger, stablekl.jeffreys_divergence, stablekl.wasserstein2]
    for f in functions:
        with pytest.raises(ValueError, match=r"batch shapes \(3,\) and \(2,\) do not broadcast"):
            f(p, td.Normal(torch.zeros(2), 1.0))
        for pair in ((p, 1.0), (1.0, p)):
            with pytest.raises(ValueError, match=r"two distributions, got 1\.0"):
                f(*pair)
