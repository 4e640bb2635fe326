"""The mpmath references for families on the line, against torch's densities and against integrals of the definition."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import product
from typing import Any

import mpmath
import pytest
import torch
from torch.distributions import kl_divergence

from stablekl.precision.references import FAMILIES
from stablekl.precision.references.context import PrecisionError, agreed, exact, gradient, mp
from stablekl.precision.references.family import INVERSE, LOG, LOG1M, ONE, Family, Statistic, X, divergence, kl
from stablekl.precision.references.gamma import Gamma

DPS = 30
INF, NAN, LOG2 = math.inf, math.nan, math.log(2)


def numbers(values: Iterable[float]) -> tuple[Any, ...]:
    return tuple(mp.mpf(v) for v in values)


def of(kind: str, *argument: float) -> Statistic:
    """The statistic of that kind, and its argument."""
    values = numbers(argument)
    return Statistic(kind, values if len(values) > 1 else values[0] if values else None)


ON_LINE = (X, of("square", 0.75), of("abs", 0.25), of("abs", -30), of("exp", -0.3), of("exp", 0.25))
ON_HALF_LINE = (X, of("square", 1.5), of("abs", 0.7), of("abs", -2), LOG, of("exp", -1.5))
ON_INTERVAL = (X, of("square", 0.3), of("abs", 0.3), of("abs", -1), of("abs", 1.5))

# For each family: parameter sets, and the statistics whose expectations are finite for all of them.
CASES: dict[str, tuple[tuple[tuple[float, ...], ...], tuple[Statistic, ...]]] = {
    "Bernoulli": (
        ((0.3,), (0.9375,)),
        (X, of("complement", 1), of("complement", 4), of("square", 2.5), of("log choose", 3), of("log factorial")),
    ),
    "Beta": (((2, 3), (1.25, 4.5), (7.5, 2)), (*ON_INTERVAL, LOG, LOG1M, INVERSE)),
    "Binomial": (
        ((6, 0.3), (1, 0.8), (4, 1), (4, 0)),
        (X, of("complement", 9), of("square", 2.5), of("log choose", 6), of("log factorial")),
    ),
    "Cauchy": (((0, 1), (-2, 0.5)), (of("log quadratic", 0, 1), of("log quadratic", 1.5, 3))),
    "Chi2": (((3,), (4.5,)), (*ON_HALF_LINE, INVERSE)),
    "ContinuousBernoulli": (((0.3,), (0.5,), (0.8,)), (*ON_INTERVAL, of("exp", -2), of("exp", 0.75))),
    "Exponential": (((0.5,), (3,)), (*ON_HALF_LINE, of("exp", 0.25))),
    "Gamma": (((2.5, 0.5), (1.25, 3)), (*ON_HALF_LINE, of("exp", 0.25), INVERSE)),
    "Geometric": (((0.3,), (0.75,), (1,)), (X, of("complement", 3), of("square", 1.5))),
    "Gumbel": (((0, 1), (1.5, 0.5)), ON_LINE),
    "HalfCauchy": (((1,), (0.25,)), (of("log quadratic", 0, 2), LOG)),
    "HalfNormal": (((1,), (2.5,)), (X, of("square", 0.5))),
    "InverseGamma": (((3, 1), (4.5, 2)), (X, of("square", 0.5), LOG, INVERSE)),
    "Laplace": (((0, 1), (-1.5, 0.5)), ON_LINE),
    "LogNormal": (((0, 1), (-0.5, 0.25)), (X, LOG, of("log square", 0.5))),
    "Normal": (((0, 1), (2, 0.5)), ON_LINE),
    "Pareto": (((1, 3), (0.5, 4.5)), (X, of("square", 1.5), of("abs", 0.25), of("abs", 2), LOG, INVERSE)),
    "Poisson": (((3,), (0.25,), (0,)), (X, of("complement", 3), of("square", 1.5))),
    "Uniform": (((0.125, 0.875), (0.5, 0.75)), (*ON_INTERVAL, of("exp", -2), LOG, LOG1M, INVERSE)),
}
# The ends of the interval, where torch's density and the integrals of the rest make no sense.
ENDS = {
    "Uniform": (((0, 1), (*ON_INTERVAL, LOG, LOG1M)), ((-2, 3), (X, of("square", 1), of("abs", 0.5), of("exp", -1))))
}

INFINITE = (
    ("Beta", (1, 2), INVERSE), ("Cauchy", (0, 1), of("square", 0)), ("Cauchy", (0, 1), of("abs", 0)),
    ("Exponential", (2,), of("exp", 2)), ("Exponential", (2,), INVERSE), ("Gamma", (1, 2), INVERSE),
    ("Gamma", (3, 2), of("exp", 2.5)), ("Gumbel", (0, 0.5), of("exp", 2)), ("HalfCauchy", (1,), X),
    ("InverseGamma", (1, 1), X), ("InverseGamma", (2, 1), of("square", 1)), ("Laplace", (0, 0.5), of("exp", -2)),
    ("Pareto", (1, 1), X), ("Pareto", (1, 1), of("abs", 2)), ("Pareto", (1, 2), of("square", 0)),
    ("Uniform", (0, 1), INVERSE),
)  # fmt: skip


def torch_distribution(name: str, theta: Iterable[Any]) -> torch.distributions.Distribution:
    tensors = [t if isinstance(t, torch.Tensor) else torch.tensor([float(t)], dtype=torch.float64) for t in theta]
    cls = getattr(torch.distributions, name)
    return cls(**dict(zip(FAMILIES[name].parameters, tensors, strict=True)), validate_args=False)


def density(family: Family, theta: tuple[Any, ...]) -> Callable[[Any], Any]:
    """The log-density at one precision, inside the support."""
    terms = [(statistic, c) for statistic, c in family.terms(*theta).items() if c and mp.isfinite(c)]
    return lambda x: mp.fsum(c * statistic(x) for statistic, c in terms)


def integral(f: Callable[[Any], Any], family: Family, theta: tuple[Any, ...], kinks: Iterable[Any] = ()) -> Any:
    """The integral, or the sum, of ``f`` over the support."""
    low, high, discrete = family.support(*theta)
    if discrete:
        return mp.fsum(f(mp.mpf(k)) for k in range(int(low), int(min(high, 300)) + 1))
    points = {mp.mpf(k) for k in (*kinks, -8, -2, 0.5, 2, 8, 32)}
    if "loc" in family.parameters:
        points.add(theta[0])
    if type(family).__name__ == "Gumbel":  # its exp(exp(-z)) takes forever where it no longer matters
        low = theta[0] - 6 * theta[1]
    panels = [low, *sorted(x for x in points if low < x < high), high]
    if low != 0:
        return mp.quad(f, panels)
    return mp.quad(lambda u: 4 * u**3 * f(u**4), [mp.root(x, 4) for x in panels])  # which flattens powers of x at 0


def near(value: Any, truth: Any, tolerance: float) -> bool:
    if not mp.isfinite(truth):
        return bool(value == truth)
    return bool(abs(value - truth) <= tolerance * max(1, abs(truth)))


def check_density(family: Family, name: str, theta: tuple[Any, ...]) -> None:
    """At quantiles of a sample, as torch has it."""
    mine = torch_distribution(name, theta)
    torch.manual_seed(0)
    for x in mine.sample((8,)).squeeze(-1):
        theirs = mine.log_prob(x).item()
        with mp.workdps(DPS):
            assert near(family.log_density(mp.mpf(x.item()), *theta), mp.mpf(theirs), 1e-11)


def check_normalized(family: Family, theta: tuple[Any, ...]) -> None:
    with mp.workdps(DPS):
        log_p = density(family, theta)
        assert near(integral(lambda x: mp.exp(log_p(x)), family, theta), 1, 1e-20)


def check_expectation(family: Family, theta: tuple[Any, ...], statistic: Statistic) -> None:
    with mp.workdps(DPS):
        log_p = density(family, theta)
        kinks = [statistic.argument] if statistic.kind == "abs" else []
        truth = integral(lambda x: mp.exp(log_p(x)) * statistic(x), family, theta, kinks)
        assert near(family.expectation(statistic, *theta), truth, 1e-18)


def from_definition(p: Family, theta_p: tuple[Any, ...], q: Family, theta_q: tuple[Any, ...]) -> Any:
    with mp.workdps(DPS):
        log_p, log_q = density(p, theta_p), density(q, theta_q)
        kinks = theta_q[:1] if "loc" in q.parameters else ()
        return integral(lambda x: mp.exp(a := log_p(x)) * (a - log_q(x)), p, theta_p, kinks)


PARAMETER_SETS = [(name, theta) for name, (sets, _) in CASES.items() for theta in sets]
CLAIMS = [(name, theta, s) for name, (sets, claimed) in CASES.items() for theta in sets for s in claimed]
CLAIMS += [(name, theta, s) for name, cases in ENDS.items() for theta, claimed in cases for s in claimed]


def test_every_family_has_cases_and_the_parameters_of_torch():
    assert FAMILIES.keys() >= CASES.keys()
    for name in CASES:
        family = FAMILIES[name]
        assert type(family).__name__ == name
        signature = list(inspect.signature(getattr(torch.distributions, name)).parameters)
        assert signature[: len(family.parameters)] == list(family.parameters)


@pytest.mark.parametrize(("name", "theta"), PARAMETER_SETS)
def test_density(name, theta):
    family, theta = FAMILIES[name], numbers(theta)
    check_normalized(family, theta)
    low, high, _ = family.support(*theta)
    if low < high:
        check_density(family, name, theta)
    if mp.isfinite(low):
        assert family.log_density(low - 1, *theta) == -mp.inf


@pytest.mark.parametrize(("name", "theta", "statistic"), CLAIMS)
def test_expectation(name, theta, statistic):
    check_expectation(FAMILIES[name], numbers(theta), statistic)


@pytest.mark.parametrize(("name", "theta", "statistic"), INFINITE)
def test_infinite_expectation(name, theta, statistic):
    assert FAMILIES[name].expectation(statistic, *numbers(theta)) == mp.inf


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"Bernoulli", "Binomial"}))  # those two sum anything
def test_an_expectation_without_closed_form_is_refused(name):
    with pytest.raises(NotImplementedError, match="unheard of"):
        FAMILIES[name].expectation(Statistic("unheard of"), *numbers(CASES[name][0][0]))


# Where digits are lost that two low precisions could lose alike: a false agreement.
EXTREME = (
    ("Beta", (2.0**-300, 1), LOG1M), ("Beta", (2.0**-300, 2.0**300), LOG1M), ("Beta", (2.0**300, 2.0**-300), LOG),
    ("Beta", (1, 2.0**300), ONE), ("Bernoulli", (2.0**-900,), of("complement", 1)),
    ("ContinuousBernoulli", (0.5 + 2.0**-52,), of("square", 0.5)), ("ContinuousBernoulli", (0.5 - 2.0**-54,), ONE),
    ("ContinuousBernoulli", (2.0**-900,), X), ("Gamma", (2.0**300, 2.0**300), LOG),
    ("Gamma", (3, 2.0**300), of("exp", -1)), ("Uniform", (0, 2.0**-900), LOG1M), ("Uniform", (1 - 2.0**-53, 1), LOG),
    ("Uniform", (2.0**-900, 2.0**-900 * (1 + 2.0**-52)), LOG1M),
)  # fmt: skip


@pytest.mark.parametrize(("name", "theta", "statistic"), EXTREME)
def test_full_relative_precision_at_any_working_precision(name, theta, statistic):
    def both() -> list[Any]:
        terms = list(FAMILIES[name].terms(*numbers(theta)).values())
        return terms if statistic == ONE else [*terms, FAMILIES[name].expectation(statistic, *numbers(theta))]

    with mp.workprec(160):
        low = both()
    with mp.workprec(2500):
        high = both()
    assert all(abs(a - b) <= mp.ldexp(abs(b), -140) for a, b in zip(low, high, strict=True))


P = {name: sets[-1] for name, (sets, _) in CASES.items()} | {
    "Binomial": (5, 0.3), "Geometric": (0.3,), "Poisson": (3,), "Uniform": (0.25, 0.75), "Pareto": (1.5, 4.5),
}  # fmt: skip
Q = {
    "Bernoulli": (0.6,), "Beta": (1.5, 2.5), "Binomial": (5, 0.6), "Cauchy": (1, 2), "Chi2": (5,),
    "ContinuousBernoulli": (0.7,), "Exponential": (1.25,), "Gamma": (2, 1.5), "Geometric": (0.6,), "Gumbel": (0.5, 2),
    "HalfCauchy": (3,), "HalfNormal": (1.5,), "InverseGamma": (2, 3), "Laplace": (0.3, 2), "LogNormal": (0.25, 1.5),
    "Normal": (0.5, 1.75), "Pareto": (0.2, 2), "Poisson": (1.5,), "Uniform": (-0.5, 1.5),
}  # fmt: skip


def torch_pairs() -> list[tuple[str, str]]:
    """Every pair for which torch returns something: registered by name, or by a base class."""
    pairs = []
    for p, q in product(CASES, CASES):
        with suppress(NotImplementedError):
            kl_divergence(torch_distribution(p, P[p]), torch_distribution(q, Q[q]))
            pairs.append((p, q))
    return pairs


PAIRS = torch_pairs()


def test_pairs_are_those_of_the_registry():
    registered = {(p.__name__, q.__name__) for p, q in torch.distributions.kl._KL_REGISTRY}
    assert {(p, q) for p, q in registered if p in CASES and q in CASES} <= set(PAIRS)


@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_divergence(p, q):
    theta_p, theta_q = numbers(P[p]), numbers(Q[q])
    value = divergence(FAMILIES[p], theta_p, FAMILIES[q], theta_q)
    theirs = kl_divergence(torch_distribution(p, theta_p), torch_distribution(q, theta_q)).item()
    assert near(mp.mpf(theirs), value, 1e-9)
    if theirs == INF:
        assert value == mp.inf
    else:
        assert near(value, from_definition(FAMILIES[p], theta_p, FAMILIES[q], theta_q), 1e-18)
        assert value > 0


# What torch 2.13 returns, and the truth.
DEFECTS = (
    ("ContinuousBernoulli", (0.5,), "Uniform", (0, 2), INF, LOG2),  # infinite unless low < 0 and high > 1
    ("Uniform", (0, 0.5), "ContinuousBernoulli", (0.5,), INF, LOG2),  # infinite wherever low = 0 or high = 1
    ("Bernoulli", (0,), "Poisson", (0,), NAN, 0),
    ("Binomial", (3, 0), "Binomial", (2, 0.5), INF, 2 * LOG2),
    ("Binomial", (3, 0.5), "Binomial", (3, 0), 51.986038542, INF),  # logits are clamped
    ("Binomial", (3, 1), "Binomial", (3, 0.5), -INF, 3 * LOG2),
    ("Geometric", (1,), "Geometric", (1,), INF, 0),
    ("Poisson", (0,), "Bernoulli", (0.5,), INF, LOG2),
    ("Poisson", (0,), "Binomial", (2, 0.5), INF, 2 * LOG2),
    ("Poisson", (0,), "Poisson", (2,), NAN, 2),
)


@pytest.mark.parametrize(("p", "theta_p", "q", "theta_q", "torchs", "truth"), DEFECTS)
def test_truth_where_torch_is_wrong(p, theta_p, q, theta_q, torchs, truth):
    value = divergence(FAMILIES[p], numbers(theta_p), FAMILIES[q], numbers(theta_q))
    assert near(value, mp.mpf(truth), 1e-12)
    theirs = kl_divergence(torch_distribution(p, theta_p), torch_distribution(q, theta_q)).item()
    assert any(theirs == pytest.approx(known, nan_ok=True) for known in (torchs, truth))  # a later torch may be right


@pytest.mark.parametrize("name", CASES)
def test_zero_at_equal_parameters(name):
    theta = numbers(Q[name])
    assert divergence(FAMILIES[name], theta, FAMILIES[name], theta) == 0
    assert kl(FAMILIES[name], theta, FAMILIES[name], theta) == 0


BOUNDARY = (
    ("Bernoulli", (0,), "Bernoulli", (0.5,), LOG2), ("Bernoulli", (1,), "Bernoulli", (0.25,), 2 * LOG2),
    ("Bernoulli", (0.5,), "Bernoulli", (0,), INF), ("Bernoulli", (0.5,), "Bernoulli", (1,), INF),
    ("Bernoulli", (0,), "Bernoulli", (1,), INF), ("Bernoulli", (1,), "Poisson", (0,), INF),
    ("Binomial", (3, 0.5), "Binomial", (2, 0.5), INF), ("Binomial", (3, 1), "Binomial", (4, 0.5), 2 * LOG2),
    ("Binomial", (1, 0.5), "Bernoulli", (0.5,), 0), ("Poisson", (3,), "Poisson", (0,), INF),
    ("Geometric", (1,), "Geometric", (0.5,), LOG2), ("Geometric", (0.5,), "Geometric", (1,), INF),
    ("Uniform", (0, 1), "Beta", (2, 3), 3 - math.log(12)), ("Uniform", (0, 1), "Beta", (1, 1), 0),
    ("Uniform", (-1, 1), "Beta", (2, 3), INF), ("Uniform", (0, 1), "Exponential", (1,), 0.5),
    ("Uniform", (0, 1), "ContinuousBernoulli", (0.5,), 0), ("Uniform", (0, 1), "Pareto", (0.5, 1), INF),
    ("ContinuousBernoulli", (0.5,), "Uniform", (0, 1), 0), ("ContinuousBernoulli", (0.5,), "Uniform", (0.25, 1), INF),
    ("Beta", (1, 1), "Uniform", (0, 2), LOG2), ("Exponential", (2,), "Gamma", (1, 2), 0),
    ("Chi2", (2,), "Exponential", (0.5,), 0), ("Pareto", (2, 3), "Pareto", (1, 3), 3 * LOG2),
    ("Pareto", (1, 3), "Pareto", (2, 3), INF), ("Pareto", (1, 1), "Exponential", (1,), INF),
    ("Pareto", (1, 2), "Normal", (0, 1), INF), ("Laplace", (0, 2), "Gumbel", (0, 2), INF),
    ("Cauchy", (0, 1), "Normal", (0, 1), INF), ("HalfCauchy", (1,), "Cauchy", (0, 1), LOG2),
)  # fmt: skip


@pytest.mark.parametrize(("p", "theta_p", "q", "theta_q", "truth"), BOUNDARY)
def test_boundary(p, theta_p, q, theta_q, truth):
    assert near(divergence(FAMILIES[p], numbers(theta_p), FAMILIES[q], numbers(theta_q)), mp.mpf(truth), 1e-15)


# A family, parameters, which of them is moved by one ulp, and its Fisher information.
NEIGHBOURS = (
    ("Bernoulli", (0.3,), 0, lambda p: 1 / (p * (1 - p))),
    ("Beta", (2.5, 3), 0, lambda a, b: mp.psi(1, a) - mp.psi(1, a + b)),
    ("Cauchy", (1, 0.75), 0, lambda m, s: 1 / (2 * s**2)),
    ("ContinuousBernoulli", (0.5,), 0, lambda p: mp.mpf(4) / 3),
    ("Gamma", (2.5, 3), 0, lambda a, r: mp.psi(1, a)),
    ("Gamma", (1e15, 3e-20), 1, lambda a, r: a / r**2),
    ("Gumbel", (1, 0.75), 0, lambda m, s: 1 / s**2),
    ("Laplace", (1, 0.75), 1, lambda m, s: 1 / s**2),
    ("Pareto", (1, 0.75), 1, lambda s, a: 1 / a**2),
    ("Poisson", (1e-250,), 0, lambda r: 1 / r),
)


@pytest.mark.parametrize(("name", "theta", "which", "information"), NEIGHBOURS)
def test_neighbours_follow_fisher_information(name, theta, which, information):
    moved = list(theta)
    moved[which] = math.nextafter(theta[which], INF)
    value = divergence(FAMILIES[name], numbers(theta), FAMILIES[name], numbers(moved))
    expected = information(*numbers(theta)) * (mp.mpf(moved[which]) - mp.mpf(theta[which])) ** 2 / 2
    assert value > 0
    assert abs(value / expected - 1) < 1e-13


class _WrongExpectation(Gamma):
    def expectation(self, statistic, concentration, rate):
        wrong = mp.log(rate) if statistic == LOG else 0
        return super().expectation(statistic, concentration, rate) + wrong


class _WrongTerms(Gamma):
    def terms(self, concentration, rate):
        return super().terms(concentration, rate) | {LOG: concentration}


def test_a_wrong_family_is_caught():
    theta = numbers((2.5, 0.5))
    check_expectation(_WrongExpectation(), theta, X)
    with pytest.raises(AssertionError):
        check_expectation(_WrongExpectation(), theta, LOG)
    with pytest.raises(AssertionError):
        check_normalized(_WrongTerms(), theta)
    with pytest.raises(AssertionError):
        check_density(_WrongTerms(), "Gamma", theta)
    q = FAMILIES["Exponential"], numbers((3,))
    assert not near(divergence(_WrongExpectation(), theta, *q), from_definition(FAMILIES["Gamma"], theta, *q), 1e-9)


def test_agreed_escalates():
    tiny = mp.ldexp(mp.mpf(1), -1000)
    assert agreed(lambda: (1 + tiny) - 1) == tiny
    assert agreed(lambda: [mp.mpf(2), [(1 + tiny) - 1]]) == [2, [tiny]]


def test_agreed_takes_noise_for_zero():
    assert agreed(lambda: mp.sqrt(2) ** 2 - 2) == 0
    assert agreed(lambda: [mp.ldexp(mp.sqrt(3), 10 - mp.prec), mp.mpf(1)]) == [0, 1]
    assert agreed(lambda: mp.inf) == mp.inf


def test_what_never_settles_is_an_error():
    with pytest.raises(PrecisionError):
        agreed(lambda: mp.mpf(1) + mp.prec // 20)


GRADIENTS = ("Beta", "Beta"), ("Gamma", "Normal"), ("Gumbel", "Gumbel"), ("Laplace", "Laplace"), ("Beta", "Gamma")


@pytest.mark.parametrize(("p", "q"), GRADIENTS)
def test_gradient_is_that_of_autograd(p, q):
    leaves = [torch.tensor([float(v)], dtype=torch.float64, requires_grad=True) for v in (*P[p], *Q[q])]
    n = len(P[p])
    value = kl_divergence(torch_distribution(p, leaves[:n]), torch_distribution(q, leaves[n:]))
    theirs = torch.cat(torch.autograd.grad(value.sum(), leaves)).tolist()
    mine = gradient(lambda *theta: kl(FAMILIES[p], theta[:n], FAMILIES[q], theta[n:]), *numbers((*P[p], *Q[q])))
    # torch.polygamma(1, x) of float64 is right to 1e-9 only.
    assert [float(d) for [d] in mine] == pytest.approx(theirs, rel=1e-8, abs=1e-8)


def test_the_context_is_private(monkeypatch):
    p, q = numbers((2, 3)), numbers((1.5, 2.5))
    before, ours = divergence(FAMILIES["Beta"], p, FAMILIES["Beta"], q), mp.prec
    monkeypatch.setattr(mpmath.mp, "prec", 20)
    assert divergence(FAMILIES["Beta"], p, FAMILIES["Beta"], q) == before
    assert (mpmath.mp.prec, mp.prec) == (20, ours)
    assert mpmath.mpf(1) / 3 != mp.mpf(1) / 3


def test_exact():
    assert exact(torch.tensor([[0.1, 2.0]], dtype=torch.float64)) == [[mp.mpf(0.1), 2]]
