"""Divergences of Gamma, Beta, Dirichlet and Laplace distributions over the whole range of their parameters.

What they share with the other families (equality, transforms, dtypes, second derivatives) is in test_divergences.py.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import mpmath as mp
import pytest
import torch
from torch import Tensor
from torch import distributions as td

import stablekl
from stablekl.divergences.gamma_gaps import cross_ratio, excess, lgamma_gap

F64 = torch.float64
BAR = 1e-14
ORDERS = (0.0, 1e-9, 0.1, 0.5, 1 - 1e-12, 1.0, 1 + 1e-9, 1.5, 3.0)
DISTANCES = (1e-1, 1e-3, 1e-6, 1e-9, 1e-12)
Point = list[mp.mpf]


@pytest.fixture(autouse=True)
def _digits():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with mp.workdps(120):
        yield
    torch.set_num_threads(threads)


def point(x: Tensor) -> Point:
    return [mp.mpf(v) for v in x.tolist()]


def mixed(p: Point, q: Point, a: mp.mpf) -> Point:
    return [a * u + (1 - a) * v for u, v in zip(p, q, strict=True)]


class Family(NamedTuple):
    """A log-normaliser as a function of parameters that mix linearly, and its gradient."""

    build: Callable[[Tensor], td.Distribution]
    normaliser: Callable[[Point], mp.mpf]
    slope: Callable[[Point], Point]
    size: int


FAMILIES = {
    "Gamma": Family(
        lambda x: td.Gamma(x[0], x[1]),
        lambda v: mp.loggamma(v[0]) - v[0] * mp.log(v[1]),
        lambda v: [mp.digamma(v[0]) - mp.log(v[1]), -v[0] / v[1]],
        2,
    ),
    "Beta": Family(
        lambda x: td.Beta(x[0], x[1]),
        lambda v: mp.loggamma(v[0]) + mp.loggamma(v[1]) - mp.loggamma(v[0] + v[1]),
        lambda v: [mp.digamma(x) - mp.digamma(v[0] + v[1]) for x in v],
        2,
    ),
    "Dirichlet": Family(
        td.Dirichlet,
        lambda v: mp.fsum(map(mp.loggamma, v)) - mp.loggamma(mp.fsum(v)),
        lambda v: [mp.digamma(x) - mp.digamma(mp.fsum(v)) for x in v],
        4,
    ),
}


def divergence(family: Family, p: Point, q: Point, alpha: float | mp.mpf) -> mp.mpf:
    """By the definition; at alpha = 1 as KL(p || q)."""
    a, f = mp.mpf(alpha), family.normaliser
    if a == 1:
        return f(q) - f(p) - mp.fsum(s * (v - u) for s, u, v in zip(family.slope(p), p, q, strict=True))
    m = mixed(p, q, a)
    return (a * f(p) + (1 - a) * f(q) - f(m)) / (1 - a) if min(m) > 0 else mp.inf


def amplification(p: Point, q: Point, alpha: float) -> float:
    """What rounding the mixture costs beyond alpha = 1: how near it is to where the integral diverges."""
    if alpha <= 1:
        return 1.0
    return float(max([1, *(alpha * u / m for u, m in zip(p, mixed(p, q, mp.mpf(alpha)), strict=True))]))


def error(value: Tensor, truth: mp.mpf) -> float:
    x = float(value)
    if mp.isinf(truth) or truth == 0:
        return 0.0 if x == truth else math.inf
    return float(abs(mp.mpf(x) - truth) / abs(truth))


def pairs(size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Far, near, and near with nearly equal means: parameters log-uniform from 1e-3 to 1e6."""
    g = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return 10 ** (torch.rand(size, generator=g, dtype=F64) * 9 - 3)

    yield draw(), draw()
    for x in DISTANCES:
        q, change = draw(), torch.randn(size, generator=g, dtype=F64).clamp(-3, 3)
        yield q * (1 + 0.3 * x * change), q
        yield q * (1 + x + 1e-4 * x * change), q
        yield q * (1 + x), q


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", FAMILIES)
def test_values_over_the_whole_range(name, seed):
    family = FAMILIES[name]
    for p, q in pairs(family.size, seed):
        x, y = point(p), point(q)
        # a Dirichlet's terms are up to 1/s as large as the divergence if all but one of the concentrations sum to s
        spare = 1.0 if name == "Gamma" else min(1.0, float(min(p.sum() - p.max(), q.sum() - q.max())))
        for a in ORDERS:
            truth = divergence(family, x, y, a)
            value = stablekl.renyi_divergence(family.build(p), family.build(q), a)
            bar = BAR if mp.isinf(truth) else BAR * amplification(x, y, a)
            assert error(value, truth) < bar / max(spare, 0.02), (p, q, a)
        both = divergence(family, x, y, 1) + divergence(family, y, x, 1)
        assert error(stablekl.jeffreys_divergence(family.build(p), family.build(q)), both) < BAR / max(spare, 0.02)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_textbook_form_fails_nearby(name):
    """Must-fail twin: the definition, in double precision."""
    family = FAMILIES[name]
    q = torch.tensor([20.0, 3.0, 7.0, 1.5][: family.size], dtype=F64)
    p = q * (1 + 1e-8 * torch.tensor([1.0, -0.5, 0.2, 0.7][: family.size], dtype=F64))
    truth = divergence(family, point(p), point(q), 0.5)

    def normaliser(v: Tensor) -> Tensor:
        return v[0].lgamma() - v[0] * v[1].log() if name == "Gamma" else v.lgamma().sum() - v.sum().lgamma()

    assert error(normaliser(p) + normaliser(q) - 2 * normaliser(0.5 * (p + q)), truth) > 0.1
    assert error(stablekl.renyi_divergence(family.build(p), family.build(q), 0.5), truth) < 1e-15


def test_the_definition_is_an_integral():
    """The truths' log-normalisers, by quadrature."""
    with mp.workdps(20):
        a, (x, b), (y, c) = mp.mpf("0.3"), (mp.mpf(2.5), mp.mpf(0.75)), (mp.mpf(1.25), mp.mpf(2))

        def gamma(t: mp.mpf, k: mp.mpf, rate: mp.mpf) -> mp.mpf:
            return rate**k / mp.gamma(k) * t ** (k - 1) * mp.exp(-rate * t)

        def beta(t: mp.mpf, k: mp.mpf, m: mp.mpf) -> mp.mpf:
            return t ** (k - 1) * (1 - t) ** (m - 1) / mp.beta(k, m)

        for name, density, grid in (("Gamma", gamma, [0, 1, 4, mp.inf]), ("Beta", beta, [0, 0.5, 1])):
            integral = mp.quad(lambda t, f=density: f(t, x, b) ** a * f(t, y, c) ** (1 - a), grid)
            assert abs(mp.log(integral) / (a - 1) - divergence(FAMILIES[name], [x, b], [y, c], a)) < 1e-9


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_differences_of_digamma(name):
    """By the logarithms of the parameters, relative to the largest; by the order, to itself."""
    family = FAMILIES[name]
    mp.mp.dps = 200  # second differences whose steps are 1e-50
    for p, q in pairs(family.size, 11):
        x, y = point(p), point(q)
        for alpha in (1e-9, 0.3, 1.0, 1.5, 3.0):
            order = torch.tensor(alpha, dtype=F64, requires_grad=True)
            leaves = p.clone().requires_grad_(), q.clone().requires_grad_()
            value = stablekl.renyi_divergence(*(family.build(v) for v in leaves), order)
            if value.isinf():
                continue
            *gradients, by_order = torch.autograd.grad(value, (*leaves, order))
            a = mp.mpf(alpha) if alpha != 1 else 1 + mp.mpf(10) ** -50
            m = family.slope(mixed(x, y, a))
            bar = 4 * BAR * amplification(x, y, alpha)
            truths = (
                [a / (1 - a) * (u - v) for u, v in zip(family.slope(x), m, strict=True)],
                [u - v for u, v in zip(family.slope(y), m, strict=True)],
            )
            for at, gradient, truth in zip((x, y), gradients, truths, strict=True):
                size = max(abs(t * v) for t, v in zip(truth, at, strict=True))
                for t, v, g in zip(truth, at, gradient.tolist(), strict=True):
                    assert abs(mp.mpf(g) - t) * v < bar * size, (p, q, alpha)
            kl = divergence(family, mixed(x, y, a), x, 1) / (1 - a) ** 2  # KL(m || p): positive for every order
            assert error(by_order, kl) < bar, (p, q, alpha)


def test_second_derivatives_at_equality_are_fisher_information():
    x = torch.tensor([0.4, 1.7, 12.0], dtype=F64)
    alone, together = ([float(mp.psi(1, v)) for v in at] for at in (point(x), [mp.fsum(point(x))]))
    truth = torch.diag(torch.tensor(alone, dtype=F64)) - together[0]

    def f(p: Tensor) -> Tensor:
        return stablekl.renyi_divergence(
            td.Dirichlet(p, validate_args=False), td.Dirichlet(x, validate_args=False), 0.3
        )

    for hessian in (torch.func.hessian(f)(x), torch.autograd.functional.hessian(f, x)):
        assert torch.allclose(hessian, 0.3 * truth, rtol=1e-13, atol=1e-15)


def test_means_that_agree_to_more_digits_than_the_parameters():
    """Gamma(k, k) near Gamma(k', k'): the ratio of the means is that of roundings, and the shapes must show."""
    for k in (1e2, 1e4, 1e6):
        p = torch.tensor([k * 1.1, k * 1.1 * (1 + 1e-6 / math.sqrt(k))], dtype=F64)
        q = torch.tensor([k, k], dtype=F64)
        truth = divergence(FAMILIES["Gamma"], point(p), point(q), 0.5)
        assert error(stablekl.renyi_divergence(td.Gamma(*p), td.Gamma(*q), 0.5), truth) < 2e-15
        x, y, b, c = p[0], q[0], p[1], q[1]
        factor = b / c
        ratio = cross_ratio(x, y, b, c, factor, excess(x, y, factor), excess(b, c, factor))
        exact = mp.log(mp.mpf(float(c)) * mp.mpf(float(x)) / (mp.mpf(float(y)) * mp.mpf(float(b))))
        assert error(ratio, exact) < 1e-15
        assert error(torch.log(x / y) - torch.log(b / c), exact) > 1e-12  # must fail


def test_one_large_concentration_that_changes_next_to_a_small_one():
    """The known limit: the gap of the sums cancels that of the large one up to the small one."""
    family = FAMILIES["Beta"]
    for small in (1.0, 1e-1, 1e-2, 1e-3):
        for large in (1.0, 1e3, 1e6):
            for x in (0.3, 1e-6):
                p, q = (torch.tensor([large * f, small], dtype=F64) for f in (1 + x, 1.0))
                truth = divergence(family, point(p), point(q), 0.5)
                assert error(stablekl.renyi_divergence(family.build(p), family.build(q), 0.5), truth) < 1e-15 / small


@pytest.mark.parametrize(
    ("p", "q"),
    [
        ((1.0, 1e-200), (1.0, 1e200)),  # the ratio of the rates is no number
        ((1e6, 1e12), (1e-6, 1e-6)),  # 1 - w of the mixture is 1e-12
        ((1e-300, 1.0), (1e-10, 1.0)),
        ((1e15, 1e15), (1e15 + 1, 1e15)),
        ((1e100, 1e100), (2e100, 1e100)),
    ],
)
def test_extremes(p, q):
    x, y = (torch.tensor(v, dtype=F64) for v in (p, q))
    with mp.workdps(800):
        for a in (0.3, 0.999):
            truth = divergence(FAMILIES["Gamma"], point(x), point(y), a)
            assert error(stablekl.renyi_divergence(td.Gamma(*x), td.Gamma(*y), a), truth) < BAR


@pytest.mark.parametrize("build", [td.Dirichlet, lambda x: td.Gamma(x[..., 0], x[..., 1])])
def test_where_the_integral_diverges(build):
    p, q = (torch.tensor(v, dtype=F64) for v in ([[0.5, 1.0], [2.0, 3.0]], [[4.0, 1.0], [2.5, 2.0]]))
    leaves = [x.requires_grad_() for x in (p, q, torch.tensor(1.5, dtype=F64))]
    value = stablekl.renyi_divergence(build(p), build(q), leaves[2])
    assert value.isinf().tolist() == [True, False]
    gradients = torch.autograd.grad(value.sum(), leaves)
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[0][0] == 0).all()


def test_orders_are_monotone_and_symmetric():
    a = torch.linspace(0, 3, 301, dtype=F64)
    first, second = torch.tensor([3.0, 2.0], dtype=F64), torch.tensor([2.5, 1.7], dtype=F64)
    for build in (td.Gamma, td.Beta, td.Laplace):
        p, q = build(*first), build(*second)
        value = stablekl.renyi_divergence(p, q, a)
        assert (value.diff() >= 0).all()
        inner = a[:100]
        skew = inner * stablekl.renyi_divergence(q, p, 1 - inner)
        assert torch.allclose((1 - inner) * value[:100], skew, rtol=1e-13, atol=0)
        assert float(value[100]) == pytest.approx(float(td.kl_divergence(p, q)), rel=1e-12)


def test_the_gap_of_lgamma_alone():
    """Without a rate, down to 1e-12 apart and across the interval."""
    rng = random.Random(3)
    for _ in range(60):
        x = mp.mpf(10 ** rng.uniform(-3, 6))
        y = mp.mpf(float(x * (1 + 10 ** rng.uniform(-12, 3))))
        for a in (0.3, 1.0, 1.7):
            p, q = (x, y) if rng.random() < 0.5 and y < 2 * x else (y, x)

            def g(t: mp.mpf) -> mp.mpf:
                return mp.loggamma(t) - t * mp.log(t) + t

            m = a * p + (1 - mp.mpf(a)) * q
            if m <= 0:
                continue
            if a == 1:
                truth = g(q) - g(p) - (mp.digamma(p) - mp.log(p)) * (q - p)
            else:
                truth = (a * g(p) + (1 - mp.mpf(a)) * g(q) - g(m)) / (1 - mp.mpf(a))
            s, t, order = (torch.tensor(float(v), dtype=F64) for v in (p, q, a))
            assert error(lgamma_gap(s, t, s - t, order), truth) < 4e-15 * max(1.0, float(a * p / m)), (p, q, a)


# ---- Laplace ----------------------------------------------------------------------------------------------------


def laplace(p: Point, q: Point, alpha: float) -> mp.mpf:
    """The integral piece by piece; at alpha = 1 its slope."""
    if alpha == 1:
        d, (_, b), (_, c) = abs(p[0] - q[0]), p, q
        return mp.log(c / b) + d / c + b / c * mp.exp(-d / b) - 1
    a, d = mp.mpf(alpha), abs(p[0] - q[0])
    u, v = a / p[1], (1 - a) / q[1]
    if u + v <= 0:
        return mp.inf
    between = d * mp.exp(-u * d) if u == v else (mp.exp(-v * d) - mp.exp(-u * d)) / (u - v)
    tails = (mp.exp(-u * d) + mp.exp(-v * d)) / (u + v)
    value = (mp.log(tails + between) - a * mp.log(2 * p[1]) - (1 - a) * mp.log(2 * q[1])) / (a - 1)
    return value if abs(value) > mp.mpf(10) ** -100 else mp.mpf(0)


def test_the_definition_of_laplace_is_an_integral():
    with mp.workdps(20):
        a, p, q = mp.mpf("1.25"), (mp.mpf(0.25), mp.mpf(0.75)), (mp.mpf(1), mp.mpf(2))

        def density(t: mp.mpf, v: tuple[mp.mpf, mp.mpf]) -> mp.mpf:
            return mp.exp(-abs(t - v[0]) / v[1]) / (2 * v[1])

        integral = mp.quad(lambda t: density(t, p) ** a * density(t, q) ** (1 - a), [-mp.inf, -4, 0.25, 1, 5, mp.inf])
        assert abs(mp.log(integral) / (a - 1) - laplace(list(p), list(q), 1.25)) < 1e-12


def laplace_pairs() -> Iterator[tuple[Tensor, Tensor]]:
    rng = random.Random(5)
    for _ in range(15):
        scale, x = 10 ** rng.uniform(-3, 3), 10 ** rng.uniform(-12, 0)
        q = torch.tensor([rng.gauss(0, 1), scale], dtype=F64)
        yield q + torch.tensor([rng.gauss(0, x) * scale, 0.0], dtype=F64), q  # another location
        yield torch.stack([q[0], q[1] * (1 + x)]), q  # another scale
        yield q + scale * x * torch.tensor([rng.gauss(0, 1), 0.3], dtype=F64), q
        yield torch.tensor([rng.gauss(0, 3), 10 ** rng.uniform(-3, 3)], dtype=F64), q


def test_laplace():
    for p, q in laplace_pairs():
        x, y = point(p), point(q)
        for a in (*ORDERS, 1.05):
            truth = laplace(x, y, a)
            finite = a > 1 and not mp.isinf(truth)
            bar = BAR * float(max(1, a / x[1] / (a / x[1] + (1 - mp.mpf(a)) / y[1]))) if finite else BAR
            assert error(stablekl.renyi_divergence(td.Laplace(*p), td.Laplace(*q), a), truth) < bar, (p, q, a)
        both = laplace(x, y, 1) + laplace(y, x, 1)
        assert error(stablekl.jeffreys_divergence(td.Laplace(*p), td.Laplace(*q)), both) < BAR


def test_gradients_of_laplace():
    step = mp.mpf(10) ** -40
    for p, q in laplace_pairs():
        x, y = point(p), point(q)
        for a in (0.3, 1.0, 1.1):
            leaves = p.clone().requires_grad_(), q.clone().requires_grad_()
            value = stablekl.renyi_divergence(*(td.Laplace(*v) for v in leaves), a)
            if value.isinf() or p[0] == q[0]:
                continue
            weights = amplification([1 / x[1]], [1 / y[1]], a)
            for side, gradient in enumerate(torch.autograd.grad(value, leaves)):
                truth = []
                for i in range(2):
                    moved = [[list(x), list(y)] for _ in range(2)]
                    moved[0][side][i] += step
                    moved[1][side][i] -= step
                    truth.append((laplace(*moved[0], a) - laplace(*moved[1], a)) / (2 * step))
                size = max(map(abs, truth))
                for t, g in zip(truth, gradient.tolist(), strict=True):
                    assert abs(mp.mpf(g) - t) < 4 * BAR * weights * size, (p, q, a)


def test_the_textbook_form_of_laplace_fails_nearby():
    p, q = torch.tensor([1e-6, 1.0], dtype=F64), torch.tensor([0.0, 1.1], dtype=F64)
    u, v, d = 0.5 / p[1], 0.5 / q[1], p[0] - q[0]
    log_r = torch.log((u * torch.exp(-v * d) - v * torch.exp(-u * d)) / (u - v))
    apart = laplace(point(p), point(q), 0.5) - laplace([mp.mpf(0), mp.mpf(1)], [mp.mpf(0), mp.mpf(float(q[1]))], 0.5)
    assert error(-2 * log_r, apart) > 1e-6
