"""KL divergences of mixtures of exponential families: against quadrature and sums of p log(p/q) in mpmath."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import mpmath as mp
import pytest
import torch
from torch import Tensor
from torch import distributions as td
from torch.distributions import kl_divergence
from torch.func import jacfwd, jacrev, vmap

import stablekl
from stablekl.mixtures.engines import chernoff_gaps
from stablekl.mixtures.engines.chernoff import CHERNOFF
from stablekl.mixtures.finite import finite_kl, outcomes
from stablekl.precision.references import family_mixture

F64 = torch.float64
EPS = torch.finfo(F64).eps
BAR = 1e-14  # times 1 + S
WEIGHTS = (0.3, 0.7)


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def mixture(component: td.Distribution, *weights: float, ours: bool = True) -> td.Distribution:
    cls = stablekl.MixtureSameFamily if ours else td.MixtureSameFamily
    return cls(td.Categorical(probs=t(*(weights or WEIGHTS))), component)


# ------------------------------------------------------------------------------------------------ the definition

Density = Callable[[Any], Any]
HALF_LINE = [0, 0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 512]


def gamma(a: float, b: float) -> Density:
    a, b = mp.mpf(a), mp.mpf(b)
    return lambda x: mp.exp(a * mp.log(b) + (a - 1) * mp.log(x) - b * x - mp.loggamma(a))


def inverse_gamma(a: float, b: float) -> Density:
    return lambda x: gamma(a, b)(1 / x) / x**2


def beta(a: float, b: float) -> Density:
    a, b = mp.mpf(a), mp.mpf(b)
    return lambda x: x ** (a - 1) * (1 - x) ** (b - 1) / mp.beta(a, b)


def poisson(rate: float) -> Density:
    return lambda k: mp.mpf(rate) ** k * mp.exp(-mp.mpf(rate)) / mp.factorial(k)


def geometric(p: float) -> Density:
    return lambda k: mp.mpf(p) * (1 - mp.mpf(p)) ** k


def binomial(p: float) -> Density:
    return lambda k: mp.binomial(12, k) * mp.mpf(p) ** k * (1 - mp.mpf(p)) ** (12 - k)


def truth(parts: list[Density], q: Density, points: Any, weights: tuple[float, ...] = WEIGHTS) -> float:
    """Quadrature between the points, or a sum over a range, at two precisions."""
    found = []
    for digits in (25, 35):
        with mp.workdps(digits):
            w = [mp.mpf(x) / mp.fsum(map(mp.mpf, weights)) for x in weights]

            def term(x: Any, w: list[Any] = w) -> Any:
                m = mp.fsum(a * p(x) for a, p in zip(w, parts, strict=True))
                return m * mp.log(m / q(x)) if m else mp.mpf(0)

            found.append(mp.fsum(map(term, points)) if isinstance(points, range) else mp.quad(term, points))
    assert abs(found[0] - found[1]) < 1e-16
    return float(found[1])


# torch's class, its arguments for two components and q, the density, and where it is integrated
CASES = {
    "Gamma": (td.Gamma, [(2.0, 3.5), (1.0, 0.75)], (2.5, 1.0), gamma, HALF_LINE),
    "Gamma apart": (td.Gamma, [(1.5, 90.0), (1.0, 4.0)], (3.0, 0.25), gamma, [*HALF_LINE[:-1], 20, 24, 40, 48, 512]),
    "Gamma alike": (td.Gamma, [(2.0, 2.0078125), (1.0, 1.015625)], (2.0, 1.0), gamma, HALF_LINE),
    "InverseGamma": (td.InverseGamma, [(2.0, 3.5), (1.0, 0.75)], (2.5, 1.0), inverse_gamma, [*HALF_LINE, mp.inf]),
    "Beta": (td.Beta, [(2.0, 3.5), (1.0, 4.0)], (2.5, 1.5), beta, [0, 0.25, 0.5, 0.75, 1]),
    "Exponential": (td.Exponential, [(2.0, 0.5)], (1.0,), lambda r: gamma(1, r), HALF_LINE),
    "Poisson": (td.Poisson, [(2.0, 0.5)], (1.0,), poisson, range(90)),
    "Poisson apart": (td.Poisson, [(0.125, 30.0)], (4.0,), poisson, range(160)),
    "Geometric": (td.Geometric, [(0.25, 0.5)], (0.375,), geometric, range(400)),
    "Binomial": (lambda p: td.Binomial(12, p), [(0.25, 0.5)], (0.375,), binomial, range(13)),
}


def built(name: str) -> tuple[Any, td.Distribution, td.Distribution]:
    make, components, other, *_ = CASES[name]
    return make, make(*(t(*x) for x in components)), make(*(t(x)[0] for x in other))


@pytest.mark.parametrize("name", CASES)
def test_definition(name: str) -> None:
    _, components, other, density, points = CASES[name]
    _, component, q = built(name)
    expected = truth([density(*x) for x in zip(*components, strict=True)], density(*other), points)
    s = float((t(*WEIGHTS) * stablekl.kl_divergence(component, type(component)(**_expanded(q)))).sum())
    for ours in (True, False):
        p = mixture(component, ours=ours)
        assert abs(kl_divergence(p, q).item() - expected) <= BAR * (1 + s)
        assert kl_divergence(p, q) == stablekl.kl_divergence(p, q)
    estimate = stablekl.kl_estimate(p, q)
    assert estimate.method == "spectral"
    assert abs(estimate.value - expected) <= estimate.error
    lower, upper = stablekl.kl_bounds(p, q)
    assert lower <= expected <= upper


def _expanded(q: td.Distribution) -> dict[str, Tensor]:
    names = {"InverseGamma": ("concentration", "rate"), "Binomial": ("total_count", "probs")}
    found = names.get(type(q).__name__, tuple(type(q).arg_constraints))
    return {n: getattr(q, n).expand(2) for n in found if n != "logits"}


@pytest.mark.parametrize("dim", [3, 8])
def test_dirichlet_by_its_marginal(dim: int) -> None:
    """Concentrations that differ in one entry: the rest of a draw tells nothing, and that entry is a Beta's."""
    rest = t(*(0.5 + 0.25 * i for i in range(dim - 1)))
    a = torch.stack([torch.cat([t(x), rest]) for x in (2.0, 0.75)])
    expected = stablekl.mutual_information(mixture(td.Beta(t(2.0, 0.75), rest.sum().expand(2))))
    assert abs(stablekl.mutual_information(mixture(td.Dirichlet(a))) - expected) < 1e-15


def test_dirichlet_by_a_plane_integral() -> None:
    a = [(2, 1, 3), (1, 2, 2)]
    with mp.workdps(20):
        logs = [mp.loggamma(sum(x)) - mp.fsum(mp.loggamma(v) for v in x) for x in a]

        def term(x: Any, u: Any) -> Any:
            y, z = (1 - x) * u, (1 - x) * (1 - u)  # the simplex as a square
            p = [mp.exp(c) * x ** (v[0] - 1) * y ** (v[1] - 1) * z ** (v[2] - 1) for c, v in zip(logs, a, strict=True)]
            m = mp.mpf(WEIGHTS[0]) * p[0] + mp.mpf(WEIGHTS[1]) * p[1]
            return (1 - x) * mp.fsum(mp.mpf(w) * v * mp.log(v / m) for w, v in zip(WEIGHTS, p, strict=True) if v)

        expected = float(mp.quad(term, [0, 0.5, 1], [0, 0.5, 1], maxdegree=5))
    found = stablekl.mutual_information(mixture(td.Dirichlet(t(*a[0], *a[1]).reshape(2, 3))))
    assert abs(found.item() - expected) < 1e-13


# ------------------------------------------------------------------------------------- components that nearly agree

NEARBY = [
    ("Gamma", (2.0, 1.0), (1, 1)),
    ("Gamma", (1e-3, 1e6), (1, 1)),
    ("Gamma", (1e6, 3.0), (1, 0.5)),
    ("Beta", (2.0, 3.0), (1, -0.5)),
    ("Beta", (1e5, 1e-2), (1, 1)),
    ("Poisson", (3.0,), (1,)),
    ("Poisson", (1e9,), (1,)),
]


@pytest.mark.parametrize("distance", [1e-2, 1e-6, 1e-12])
@pytest.mark.parametrize(("name", "centre", "direction"), NEARBY)
def test_relative_accuracy(name: str, centre: tuple[float, ...], direction: tuple[float, ...], distance: float) -> None:
    other = [x * (1 + distance * d) for x, d in zip(centre, direction, strict=True)]
    component = getattr(td, name)(*(t(*x) for x in zip(centre, other, strict=True)))
    numbers = [[family_mixture.mp.mpf(x) for x in v] for v in (WEIGHTS, centre, other)]
    expected = float(family_mixture.information(name, *numbers))
    found = stablekl.mutual_information(mixture(component)).item()
    assert abs(found - expected) <= 1e-14 * expected


def test_textbook_coefficient_fails() -> None:
    """The same sum over the same nodes, of exp(F(m) - s F(x) - (1 - s) F(y)) in complex arithmetic."""
    rate = t(3.0, 3.0 * (1 + 2.0**-30))
    omega = torch.arange(150, dtype=F64) * 0.078125
    s = torch.complex(torch.full_like(omega, 0.5), omega)
    x, y = rate.log()
    rho = torch.exp(torch.exp(s * x + (1 - s) * y) - s * rate[0] - (1 - s) * rate[1])
    kernel = 0.078125 / ((0.25 + omega**2) * torch.cosh(math.pi * omega))
    kernel[0] *= 0.5
    c = math.log(WEIGHTS[0] / WEIGHTS[1])
    turn = torch.exp(torch.complex(torch.zeros_like(omega), omega * c))
    textbook = math.sqrt(WEIGHTS[0] * WEIGHTS[1]) * ((turn * (1 - rho)).real * kernel).sum().item()
    found = stablekl.mutual_information(mixture(td.Poisson(rate))).item()
    assert abs(found - 3 * 2.0**-60 * 0.21 / 2) < 1e-8 * found
    assert abs(textbook - found) > found


def test_gaps_are_as_accurate_as_their_modulus() -> None:
    with mp.workdps(60):
        omega = torch.tensor([0.0, 0.5, 2.0, 6.0], dtype=F64)

        def g(a: Any) -> Any:
            return mp.loggamma(a) - a * mp.log(a) + a

        for x, y in itertools.product((1e-6, 0.3, 7.0, 1e5), repeat=2):
            for other in (y, x * (1 + 1e-7)):
                if x == other:
                    continue
                d = x - other
                found = chernoff_gaps.lgamma_gap(t(x), t(other), t(d), omega)
                for w, re, im in zip(omega.tolist(), *(v.tolist() for v in found), strict=True):
                    s = mp.mpc(0.5, w)
                    exact = s * g(mp.mpf(x)) + (1 - s) * g(mp.mpf(other)) - g(s * x + (1 - s) * other)
                    assert abs(mp.mpc(re, im) - exact) <= 32 * EPS * abs(exact)


# ------------------------------------------------------------------------------------------------------ exact cases


@pytest.mark.parametrize("name", CASES)
def test_identical_components_and_zero_weights(name: str) -> None:
    make, components, *_ = CASES[name]
    _, _, q = built(name)
    same = make(*(t(x[0], x[0]) for x in components))
    single = make(*(t(x[0])[0] for x in components))
    expected = stablekl.kl_divergence(single, q)  # torch.distributions' would be torch's own rule
    assert stablekl.mutual_information(mixture(same)) == 0
    assert abs(kl_divergence(mixture(same), q) - expected) <= 4 * EPS * expected
    assert kl_divergence(mixture(same), single) == 0
    part = mixture(make(*(t(*x) for x in components)), 1.0, 0.0)
    assert kl_divergence(part, q) == expected
    assert stablekl.mutual_information(part) == 0
    assert kl_divergence(mixture(make(*(t(x[0]) for x in components)), 1.0), q) == expected


def test_different_supports() -> None:
    assert abs(stablekl.mutual_information(mixture(td.Binomial(5, t(0, 1)))) - _entropy(WEIGHTS)) < 1e-15
    p = mixture(td.Poisson(t(0.0, 3.0)))
    point: Density = lambda k: mp.mpf(k == 0)  # noqa: E731
    mean = 0.7 * float(truth([poisson(3.0)], poisson(1.0), range(80), (1.0,))) + 0.3
    information = mean - truth([point, poisson(3.0)], poisson(1.0), range(80))
    assert abs(stablekl.mutual_information(p) - information) < 1e-15
    assert kl_divergence(mixture(td.Bernoulli(t(0.0, 1.0))), td.Bernoulli(t(0.0)[0])) == math.inf
    assert kl_divergence(mixture(td.Bernoulli(t(0.0, 1.0)), 1.0, 0.0), td.Bernoulli(t(0.0)[0])) == 0


def _entropy(weights: tuple[float, ...]) -> float:
    return -sum(w * math.log(w) for w in weights)


def test_far_components_leave_the_entropy_of_the_weights() -> None:
    for component in (
        td.Gamma(t(1e-12, 1e12), t(1e12, 1e-12)),
        td.Beta(t(1e-12, 1e12), t(1e12, 1e-12)),
        td.Poisson(t(1e-12, 1e12)),
        td.Binomial(1e6, t(0.5, 0.6)),
    ):
        assert abs(stablekl.mutual_information(mixture(component)) - _entropy(WEIGHTS)) < 1e-15


# ------------------------------------------------------------------------------------------------------- few outcomes


def finite_truth(w: list[float], p: list[list[float]], v: list[float], q: list[list[float]]) -> float:
    with mp.workdps(60):

        def mean(w: list[float], rows: list[list[float]]) -> list[Any]:
            rows = [[mp.mpf(x) / mp.fsum(map(mp.mpf, row)) for x in row] for row in rows]
            total = mp.fsum(map(mp.mpf, w))
            return [
                mp.fsum(mp.mpf(a) / total * row[j] for a, row in zip(w, rows, strict=True)) for j in range(len(rows[0]))
            ]

        m, n = mean(w, p), mean(v, q)
        return float(mp.fsum(a * mp.log(a / b) for a, b in zip(m, n, strict=True) if a))


P3 = [[0.2, 0.3, 0.5, 0.0], [0.1, 0.1, 0.1, 0.7], [0.25, 0.25, 0.25, 0.25]]
Q2 = [[0.4, 0.2, 0.2, 0.2], [0.1, 0.6, 0.2, 0.1]]


@pytest.mark.parametrize("family", [td.Categorical, td.OneHotCategorical, stablekl.Categorical])
def test_categories(family: Any) -> None:
    m = mixture(family(probs=t(*itertools.chain(*P3)).reshape(3, 4)), 0.2, 0.3, 0.5)
    n = mixture(family(logits=t(*itertools.chain(*Q2)).reshape(2, 4).log()), 0.25, 0.75)
    single = family(probs=t(*Q2[0]))
    for a, b, expected in (
        (m, n, finite_truth([0.2, 0.3, 0.5], P3, [0.25, 0.75], Q2)),
        (n, m, finite_truth([0.25, 0.75], Q2, [0.2, 0.3, 0.5], P3)),
        (m, single, finite_truth([0.2, 0.3, 0.5], P3, [1.0], Q2[:1])),
        (single, m, finite_truth([1.0], Q2[:1], [0.2, 0.3, 0.5], P3)),
    ):
        assert abs(kl_divergence(a, b).item() - expected) <= 16 * EPS * expected
        assert stablekl.kl_estimate(a, b).method == "closed form"
    assert kl_divergence(m, m) == 0
    assert stablekl.jensen_shannon(m, m) == 0
    js = stablekl.jensen_shannon(m, n)
    both = mixture(family(probs=t(*itertools.chain(*P3, *Q2)).reshape(5, 4)), 0.1, 0.15, 0.25, 0.125, 0.375)
    assert abs(js - 0.5 * (kl_divergence(m, both) + kl_divergence(n, both))) < 1e-15
    information = sum(
        w * finite_truth([1.0], [p], [0.2, 0.3, 0.5], P3) for w, p in zip((0.2, 0.3, 0.5), P3, strict=True)
    )
    assert abs(stablekl.mutual_information(m) - information) < 1e-15


@pytest.mark.parametrize("kind", ["probs", "logits"])
def test_nearby_mixtures_of_categories(kind: str) -> None:
    rows = t(*itertools.chain(*P3)).reshape(3, 4).clamp(min=0.05)
    step = 1e-9 * torch.tensor([[1.0, -2, 1, 0], [2, -1, 0, 3], [0, 1, -1, 1]], dtype=F64)
    given = rows if kind == "probs" else rows.log()
    near = given * (1 + step)
    w = [0.2, 0.3, 0.5]
    to_rows = (
        (lambda x: x.tolist()) if kind == "probs" else (lambda x: [[mp.exp(mp.mpf(v)) for v in r] for r in x.tolist()])
    )
    with mp.workdps(60):
        expected = finite_truth(w, to_rows(near), w, to_rows(given))
    # torch's classes normalise what they are given, with rounding that is more than this distance's digits
    log_w = t(*w).log()
    a, b = (outcomes(log_w, **({"probs": None, "logits": None} | {kind: x})) for x in (near, given))
    assert abs(finite_kl(a, b).item() - expected) <= 1e-6 * expected


def test_outcomes_that_q_excludes() -> None:
    m = mixture(td.Categorical(probs=t(*itertools.chain(*P3)).reshape(3, 4)), 0.2, 0.3, 0.5)
    q = td.Categorical(probs=t(0.5, 0.5, 0.0, 0.0))
    assert kl_divergence(m, q) == math.inf
    assert kl_divergence(q, m) < math.inf
    logits = mixture(td.Bernoulli(logits=t(-math.inf, math.inf)))
    assert (
        abs(
            kl_divergence(logits, td.Bernoulli(logits=t(0.5)[0]))
            - finite_truth(
                list(WEIGHTS), [[1.0, 0.0], [0.0, 1.0]], [1.0], [[1 / (1 + math.exp(0.5)), 1 / (1 + math.exp(-0.5))]]
            )
        )
        < 1e-15
    )
    assert kl_divergence(logits, logits) == 0


def test_zero_probabilities_have_the_true_gradient() -> None:
    p = t(0.0, 0.5).requires_grad_()
    q = td.Bernoulli(t(0.25)[0])
    (g,) = torch.autograd.grad(kl_divergence(mixture(td.Bernoulli(p)), q), p)
    m = 0.35
    expected = math.log(m / 0.25) - math.log((1 - m) / 0.75)
    assert torch.allclose(g, expected * t(*WEIGHTS), rtol=1e-14, atol=0)


# --------------------------------------------------------------------------------------------- more components, bounds


def test_bounds_for_any_number_of_components() -> None:
    parts, q = [(2.0, 1.0), (3.5, 0.75), (9.0, 1.0)], (2.5, 1.0)
    w = (0.2, 0.3, 0.5)
    p = mixture(td.Gamma(*(t(*x) for x in zip(*parts, strict=True))), *w)
    one = td.Gamma(*(t(x)[0] for x in q))
    forward = truth([gamma(*x) for x in parts], gamma(*q), HALF_LINE, w)
    with mp.workdps(25):
        m = lambda x: mp.fsum(mp.mpf(a) * gamma(*v)(x) for a, v in zip(w, parts, strict=True))  # noqa: E731
        backward = mp.quad(lambda x: gamma(*q)(x) * mp.log(gamma(*q)(x) / m(x)), HALF_LINE)
    for a, b, expected, width in ((p, one, forward, 0.1), (one, p, float(backward), 2.0)):
        lower, upper = stablekl.kl_bounds(a, b)
        assert lower <= expected <= upper
        assert upper - lower < width
    for a, b in ((p, one), (one, p), (p, p)):
        with pytest.raises(NotImplementedError, match=r"kl_bounds.*kl_monte_carlo"):
            kl_divergence(a, b)
    dead = mixture(p.component_distribution, 0.3, 0.7, 0.0)
    alive = mixture(td.Gamma(*(t(*x) for x in zip(*parts[:2], strict=True))))
    assert kl_divergence(dead, one) == kl_divergence(alive, one)


def test_jensen_shannon() -> None:
    p, q = td.Gamma(t(2.0)[0], t(1.0)[0]), td.Gamma(t(3.5)[0], t(0.75)[0])
    expected = stablekl.mutual_information(mixture(td.Gamma(t(2.0, 3.5), t(1.0, 0.75)), 0.5, 0.5))
    assert abs(stablekl.jensen_shannon(p, q) - expected) < 1e-16
    assert stablekl.jensen_shannon(p, p) == 0
    near = td.Gamma(t(2.0)[0], t(1 + 1e-9)[0])
    assert abs(stablekl.jensen_shannon(p, near) / (2 * 1e-18 / 8) - 1) < 1e-6


def test_independent_products() -> None:
    a, b = torch.tensor([[2.0, 3.0], [2.0, 0.5]], dtype=F64), torch.tensor([[1.0, 2.0], [1.0, 0.25]], dtype=F64)
    p = mixture(td.Independent(td.Gamma(a, b), 1))
    q = td.Independent(td.Gamma(t(2.0, 1.0), t(1.0, 1.0)), 1)
    # the first coordinate is that of q in both components
    expected = kl_divergence(mixture(td.Gamma(a[:, 1], b[:, 1])), td.Gamma(t(1.0)[0], t(1.0)[0]))
    assert abs(kl_divergence(p, q) - expected) < 1e-15
    x = t(0.25, 0.5, 0.75, 0.125).reshape(2, 2)
    bits = mixture(td.Independent(td.Bernoulli(x), 1))
    rows = torch.stack(
        [x[:, 0] * x[:, 1], x[:, 0] * (1 - x[:, 1]), (1 - x[:, 0]) * x[:, 1], (1 - x[:, 0]) * (1 - x[:, 1])], -1
    )
    one = td.Independent(td.Bernoulli(t(0.5, 0.5)), 1)
    expected = kl_divergence(mixture(td.Categorical(probs=rows)), td.Categorical(probs=t(1, 1, 1, 1)))
    assert abs(kl_divergence(bits, one) - expected) < 1e-15


def test_errors_say_what_to_do() -> None:
    p = mixture(td.Gamma(t(1.0, 2.0), t(1.0, 2.0)))
    with pytest.raises(ValueError, match="method 'line' does not apply"):
        stablekl.kl_estimate(p, td.Gamma(t(1.0)[0], t(1.0)[0]), method="line")
    with pytest.raises(NotImplementedError, match="number of trials"):
        kl_divergence(mixture(td.Binomial(t(3, 4), t(0.5, 0.25))), td.Binomial(4, t(0.5)[0]))
    with pytest.raises(ValueError, match="3 categories"):
        kl_divergence(mixture(td.Categorical(probs=torch.ones(2, 3))), td.Categorical(probs=torch.ones(4)))


# -------------------------------------------------------------------------------------------------------- derivatives


def information_of(name: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Of differentiable parameters and logits of the weights."""
    make, components, *_ = CASES[name]

    def f(logits: Tensor, *parameters: Tensor) -> Tensor:
        m = stablekl.MixtureSameFamily(td.Categorical(logits=logits, validate_args=False), make(*parameters))
        return stablekl.mutual_information(m)

    return f, [t(0.25, -0.5), *(t(*x) for x in components)]


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("name", ["Gamma", "Beta", "Exponential", "Poisson", "Geometric", "Binomial"])
def test_derivatives(name: str, same: bool) -> None:
    f, inputs = information_of(name)
    if same:
        inputs = [inputs[0], *(x[:1].expand(2).clone() for x in inputs[1:])]
    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)
    if same:
        assert all((g == 0).all() for g in torch.autograd.grad(f(*leaves), leaves[1:]))


def test_every_engine_is_differentiated() -> None:
    assert {f.name for f in CHERNOFF} == {"rates", "exponential", "gamma", "dirichlet", "categories", "geometric"}


@pytest.mark.parametrize("name", ["Gamma", "Poisson"])
@pytest.mark.parametrize("distance", [1e-3, 1e-8])
def test_gradient_of_nearby_components(name: str, distance: float) -> None:
    """To leading order I = w1 w2 F'' d^2/2, and its derivative by the weights' logits and the parameters too."""
    rate = t(3.0, 3.0 + distance).requires_grad_()
    logits = t(*WEIGHTS).log().requires_grad_()
    component = td.Poisson(rate) if name == "Poisson" else td.Gamma(torch.full((2,), 2.0, dtype=F64), rate)
    m = stablekl.MixtureSameFamily(td.Categorical(logits=logits), component)
    by_rate, by_logit = torch.autograd.grad(stablekl.mutual_information(m), (rate, logits))
    curvature = 1 / 3 if name == "Poisson" else 2 / 9
    d = (rate[1] - rate[0]).item()
    size = 0.21 * curvature * d
    assert torch.allclose(by_rate, t(-size, size), rtol=2 * distance + 1e-14, atol=0)
    expected = 0.21 * 0.4 * curvature * d * d / 2
    assert torch.allclose(by_logit, t(expected, -expected), rtol=10 * distance + 1e-12, atol=0)


@pytest.mark.parametrize("name", ["Gamma", "Beta", "Poisson", "Binomial"])
def test_transforms(name: str) -> None:
    f, inputs = information_of(name)
    batch = [torch.stack([x, x * 1.0625, x * 0.875]) for x in inputs]
    numbers = tuple(range(len(inputs)))

    def quiet(*x: Tensor) -> Tensor:
        previous = td.Distribution._validate_args
        td.Distribution.set_default_validate_args(False)
        try:
            return f(*x)
        finally:
            td.Distribution.set_default_validate_args(previous)

    rows = [jacrev(quiet, numbers)(*row) for row in zip(*batch, strict=True)]
    for transform in (jacrev, jacfwd):
        found = vmap(transform(quiet, numbers))(*batch)
        for k, g in enumerate(found):
            assert torch.allclose(g, torch.stack([r[k] for r in rows]), rtol=1e-12, atol=1e-15)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while compiling
def test_compiled() -> None:
    def f(concentration: Tensor, rate: Tensor) -> Tensor:
        w = td.Categorical(probs=t(*WEIGHTS), validate_args=False)
        component = stablekl.Gamma(concentration, rate, validate_args=False)
        return stablekl.mutual_information(stablekl.MixtureSameFamily(w, component, validate_args=False))

    a, b = t(2.0, 3.5).requires_grad_(), t(1.0, 0.75).requires_grad_()
    compiled = torch.compile(f, fullgraph=True)
    assert abs(compiled(a, b) - f(a, b)) < 1e-16
    for x, y in zip(*(torch.autograd.grad(g(a, b), (a, b)) for g in (compiled, f)), strict=True):
        assert torch.allclose(x, y, rtol=1e-14, atol=0)


# ---------------------------------------------------------------------------------------------------- shapes and dtypes


def test_broadcasting_and_blocks() -> None:
    generator = torch.Generator().manual_seed(3)
    a = 0.5 + torch.rand(2, 3, 2, generator=generator, dtype=F64)
    b = 0.5 + torch.rand(2, 3, 2, generator=generator, dtype=F64)
    p = stablekl.MixtureSameFamily(td.Categorical(probs=t(*WEIGHTS).expand(2, 3, 2)), td.Gamma(a, b))
    q = td.Gamma(t(1.0, 2.0, 3.0), t(1.0, 1.0, 1.0))
    found = kl_divergence(p, q)
    assert found.shape == (2, 3)
    for i, j in itertools.product(range(2), range(3)):
        row = kl_divergence(mixture(td.Gamma(a[i, j], b[i, j])), td.Gamma(q.concentration[j], q.rate[j]))
        assert torch.allclose(found[i, j], row, rtol=0, atol=1e-15)
    many = 0.5 + torch.rand(200, 2, generator=generator, dtype=F64)
    w = td.Categorical(probs=t(*WEIGHTS).expand(200, 2))
    whole = stablekl.mutual_information(stablekl.MixtureSameFamily(w, td.Gamma(many, many.flip(-1))))
    parts = [stablekl.mutual_information(mixture(td.Gamma(x, x.flip(-1)))) for x in many[::50]]
    assert torch.allclose(whole[::50], torch.stack(parts), rtol=0, atol=1e-16)
    assert stablekl.mutual_information(
        stablekl.MixtureSameFamily(td.Categorical(probs=torch.ones(0, 2)), td.Gamma(torch.ones(0, 2), torch.ones(0, 2)))
    ).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["Gamma", "Poisson", "Bernoulli"])
def test_low_precision_is_rounded_once(name: str, dtype: torch.dtype) -> None:
    make = {"Gamma": td.Gamma, "Poisson": td.Poisson, "Bernoulli": td.Bernoulli}[name]
    values = [(0.25, 0.75), (1.25, 0.5)] if name == "Gamma" else [(0.25, 0.75)]
    other = (0.5, 1.0) if name == "Gamma" else (0.5,)
    found = kl_divergence(
        stablekl.MixtureSameFamily(
            td.Categorical(probs=torch.tensor([0.25, 0.75], dtype=dtype)),
            make(*(torch.tensor(x, dtype=dtype) for x in values)),
        ),
        make(*(torch.tensor(x, dtype=dtype) for x in other)),
    )
    exact = kl_divergence(mixture(make(*(t(*x) for x in values)), 0.25, 0.75), make(*(t(x)[0] for x in other)))
    assert found.dtype == dtype
    assert found == exact.to(dtype)


def test_every_class_dispatches() -> None:
    families = (
        ("Gamma", (2.0, 1.0)), ("Beta", (2.0, 1.0)), ("Exponential", (2.0,)), ("Poisson", (2.0,)),
        ("Bernoulli", (0.5,)), ("Geometric", (0.5,)), ("InverseGamma", (2.0, 1.0)),
    )  # fmt: skip
    for name, values in families:
        results = []
        for inner, outer, ours in itertools.product((td, stablekl), (td, stablekl), (True, False)):
            component = getattr(inner, name)(*(t(x, 0.75 * x) for x in values))
            results.append(
                kl_divergence(mixture(component, ours=ours), getattr(outer, name)(*(t(x)[0] for x in values)))
            )
        assert all(r == results[0] for r in results)
        assert results[0] > 0
