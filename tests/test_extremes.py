"""Parameters from end to end of the range of floats: no NaN, nothing negative, infinite where the truth is."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions.kl import _KL_REGISTRY

import stablekl
from stablekl import registry
from stablekl.precision.metrics import group_error
from stablekl.precision.references import FAMILIES
from stablekl.precision.references.context import PrecisionError, exact, gradient
from stablekl.precision.references.family import divergence, kl

INF = math.inf
INTEGRATED = ("FisherSnedecor", "Kumaraswamy", "StudentT")  # by sums at points, which know no such parameters
# By sums at points too, whose squares and products of parameters leave the range of float64 beyond these.
NARROW, WITHIN = {("Beta", "Laplace"), ("Gamma", "Laplace"), ("GeneralizedPareto", "GeneralizedPareto")}, 1e100
# Against these, or from these, gradients are those of textbook forms, whose parts overflow in float64.
TEXTBOOK = (
    "Beta",
    "ContinuousBernoulli",
    "Gumbel",
    "HalfNormal",
    "Laplace",
    "LogNormal",
    "Normal",
    "Pareto",
    "Uniform",
)
BY_HAND = {("Exponential", "Gamma"), ("Gamma", "Exponential"), ("Exponential", "Weibull"), ("Weibull", "Exponential")}
BY_HAND |= {(p, "Gumbel") for p in ("Exponential", "Gamma")} | {(p, "Normal") for p in ("Beta", "Gamma", "Pareto")}
BY_HAND |= {(p, "LogNormal") for p in ("Exponential", "Gamma", "Weibull")} | {("LogNormal", "Weibull")}
BY_HAND |= {("Exponential", "HalfNormal")}


def grid(dtype: torch.dtype) -> dict[str, tuple[float, ...]]:
    """Values of a parameter, by its domain."""
    wide = dtype == torch.float64
    small, large = ((1e-300, 1e-150, 1e-30), (1e30, 1e150, 1e300)) if wide else ((1e-38, 1e-19), (1e19, 1e38))
    positive = (*small, 1e-12, 1.0, 1 + torch.finfo(dtype).eps, 3.0, 1e12, *large)
    probability = (0.0, small[0], 1e-12, 0.5, 1 - torch.finfo(dtype).eps / 2, 1.0)
    return {
        "positive": positive,
        "nonnegative": (0.0, *positive),
        "real": (0.0, -0.0, *positive, *(-x for x in positive)),
        "probability": probability,
        "count": (1.0, 7.0, 9999.0),
        "signed": (-0.4, 0.0, 1e-12, 0.3, 1.0, 2.0),
    }


def points(name: str, dtype: torch.dtype) -> list[tuple[float, ...]]:
    values = grid(dtype)
    found = list(itertools.product(*(values[d] for d in FAMILIES[name].parameters.values())))
    if name == "Uniform":
        return [x for x in found if x[0] < x[1]]
    return [x for x in found if x[0] > 0] if name == "Geometric" else found


def _within(x: float) -> bool:
    return x == 0 or 1 / WITHIN <= abs(x) <= WITHIN


def rows(p: str, q: str, dtype: torch.dtype, count: int) -> Tensor:
    """Some of all pairs of points, the same every time."""
    first, second = points(p, dtype), points(q, dtype)
    if (p, q) in NARROW:
        first, second = ([x for x in side if all(_within(v) for v in x)] for side in (first, second))
    chosen = np.random.default_rng(0).integers(len(first) * len(second), size=count)
    return torch.tensor([(*first[i // len(second)], *second[i % len(second)]) for i in chosen], dtype=torch.float64).to(
        dtype
    )


def evaluated(p: str, q: str, batch: Tensor, rule=stablekl.kl_divergence, home=stablekl) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.clone().requires_grad_() for x in batch.unbind(-1)]
    halves = leaves[: len(FAMILIES[p].parameters)], leaves[len(FAMILIES[p].parameters) :]
    built = (
        getattr(home, name, getattr(td, name))(
            **dict(zip(FAMILIES[name].parameters, half, strict=True)), validate_args=False
        )
        for name, half in zip((p, q), halves, strict=True)
    )
    value = rule(*built)
    gradients = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
    return value.detach(), [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves, strict=True)]


def registered() -> list[tuple[str, str]]:
    """Pairs of families on the line that have a rule of stablekl's, and a reference."""
    pairs = {
        (registry._host(p).__name__, registry._host(q).__name__)
        for p, q in (*registry._HARDENED, *_KL_REGISTRY)
        if p.__module__.startswith(("torch.", "stablekl.")) and q.__module__.startswith(("torch.", "stablekl."))
    }
    pairs |= {(name, name) for name in ("Chi2", "HalfCauchy", "InverseGamma", "LogNormal")}
    known = set(FAMILIES) - set(INTEGRATED) - {"NegativeBinomial"}
    return sorted(pair for pair in pairs if set(pair) <= known)


PAIRS = registered()


def by_hand(p: str, q: str) -> bool:
    return p == q or (p, q) in BY_HAND or not ({p, q} & set(TEXTBOOK) or {p, q} == {"Gamma", "Weibull"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_no_nan_and_nothing_negative(p, q, dtype):
    batch = rows(p, q, dtype, 400)
    value, gradients = evaluated(p, q, batch)
    assert (value >= 0).all(), batch[~(value >= 0)][:3]
    if by_hand(p, q) or dtype == torch.float32:
        for g in gradients:
            assert not g.isnan().any(), batch[g.isnan()][:3]


SELF = (
    *("Cauchy", "Chi2", "Exponential", "Gamma", "Gumbel", "HalfCauchy", "HalfNormal", "InverseGamma", "Laplace"),
    *("LogNormal", "Normal", "Pareto", "Poisson", "Weibull"),
)
CROSS = (
    *(("Exponential", q) for q in ("Gamma", "Gumbel", "HalfNormal", "Laplace", "Weibull")),
    *(("Gamma", q) for q in ("Exponential", "Gumbel", "HalfNormal")),
    *(("HalfNormal", q) for q in ("Exponential", "Gamma")),
    *(("LogNormal", q) for q in ("Exponential", "Gamma")),
    *(("Normal", "Gumbel"), ("Pareto", "Gamma"), ("Uniform", "Gumbel"), ("Weibull", "Exponential")),
)
RIGHT = (*((name, name) for name in SELF), *CROSS)


def judged(p: str, q: str, dtype: torch.dtype, count: int, bar: float) -> None:
    """Values against mpmath: an infinity where the truth is none is an infinite error, as is its opposite."""
    batch = rows(p, q, dtype, count)
    value, _ = evaluated(p, q, batch)
    width = len(FAMILIES[p].parameters)
    for row, found in zip(batch, value, strict=True):
        theta = tuple(exact(row))
        truth = divergence(FAMILIES[p], theta[:width], FAMILIES[q], theta[width:])
        assert group_error([float(found)], [truth], dtype, None) <= bar, (row.tolist(), float(found))


@pytest.mark.parametrize(("p", "q"), RIGHT)
def test_values_are_right(p, q):
    judged(p, q, torch.float64, 6, 16.0 if p == q else 64.0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("p", "q"), RIGHT)
def test_more_values_are_right(p, q, dtype):
    judged(p, q, dtype, 150, 16.0 if p == q else 64.0)


@pytest.mark.slow
@pytest.mark.parametrize(("p", "q"), [pair for pair in PAIRS if pair[0] == pair[1]])
def test_the_whole_grid_has_no_nan(p, q):
    value, gradients = evaluated(p, q, rows(p, q, torch.float64, 100_000))
    assert (value >= 0).all()
    assert not any(g.isnan().any() for g in gradients)


@pytest.mark.parametrize("name", ["Gamma", "Gumbel", "Weibull", "Laplace"])
def test_gradients_are_infinite_where_the_truth_is(name):
    batch = rows(name, name, torch.float64, 8)
    _, gradients = evaluated(name, name, batch)
    width = len(FAMILIES[name].parameters)

    def at(*theta):
        return kl(FAMILIES[name], theta[:width], FAMILIES[name], theta[width:])

    for i, row in enumerate(batch):
        try:
            truth = gradient(at, *exact(row))
        except PrecisionError:  # e^(1e150)
            continue
        largest = torch.finfo(torch.float64).max
        for (t,), g in zip(truth, gradients, strict=True):
            assert math.isinf(g[i]) == (abs(t) > largest), (row.tolist(), float(g[i]))


def test_torchs_rules_fail():
    """The must-fail twin."""
    for name in ("Beta", "Cauchy", "Gamma", "Gumbel", "Laplace", "Normal"):
        value, gradients = evaluated(name, name, rows(name, name, torch.float64, 400), td.kl_divergence, td)
        assert not (value >= 0).all() or any(g.isnan().any() for g in gradients), name


def test_gradient_of_a_beta_beside_a_tiny_concentration():
    """Digamma of a concentration less that of the sum, when the former is all but the latter."""
    leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (3.0, 2.0, 1e-150, 1e-170)]
    value = stablekl.kl_divergence(stablekl.Beta(*leaves[:2]), stablekl.Beta(*leaves[2:]))
    by_first = torch.autograd.grad(value, leaves[2])[0].item()
    # digamma(a) - digamma(a + b) of tiny numbers is -b/(a (a + b)), here -1e130; by p's it is 0.58
    assert by_first == pytest.approx(-1e130, rel=1e-14)
