"""Every registered pair of different families, and that none is without a case: what a rule must satisfy."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch.distributions.kl import _KL_REGISTRY

import stablekl
from stablekl import distributions, registry
from stablekl.distributions.cross.infinite import INFINITE
from stablekl.precision.references import FAMILIES
from tests import test_families
from tests.conformance import REQUIREMENTS, Family, Tensors

# Of a family on the line, parameters at which every divergence from and to it is finite.
DOMAINS = {
    "real": lambda g, shape: torch.randn(shape, generator=g, dtype=torch.float64),
    "positive": lambda g, shape: 0.5 + 2 * torch.rand(shape, generator=g, dtype=torch.float64),
    "nonnegative": lambda g, shape: 0.5 + 2 * torch.rand(shape, generator=g, dtype=torch.float64),
    "probability": lambda g, shape: 0.2 + 0.2 * torch.rand(shape, generator=g, dtype=torch.float64),
    "count": lambda g, shape: torch.full(shape, 7.0, dtype=torch.float64),
    "signed": lambda g, shape: -0.3 + torch.rand(shape, generator=g, dtype=torch.float64),
}
UNIT_INTERVAL = ("Beta", "ContinuousBernoulli")
# Where p is, and where q is: an interval in all that contains a half-line or the unit interval, and one around that.
PLACED = {
    ("Gamma", 1): ((1.5, 2.0), (0.5, 2.0)),  # a concentration at which the mean of the reciprocal is finite
    ("GeneralizedPareto", 1): ((0.1, 1.0), (0.5, 2.0), (-0.3, 1.0)),
    ("GeneralizedPareto", 2): ((-1.0, 1.0), (0.5, 2.0), (0.1, 1.0)),
    ("InverseGamma", 1): ((1.5, 2.0), (0.5, 2.0)),
    ("Uniform", 1): ((0.3, 0.1), (0.6, 0.3)),
    ("Uniform", 2): ((-1.0, 0.5), (1.5, 0.5)),
    ("Pareto", 1): ((0.5, 0.5), (3.5, 1.0)),  # a power at which second moments are finite
    ("Pareto", 2): ((0.1, 0.1), (1.0, 1.0)),
}


def parameters_of(name: str) -> Any:
    """The parameters of p (seed 1) or q (seed 2)."""

    def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensors:
        g = torch.Generator().manual_seed(seed)
        if (name, seed) in PLACED:
            ranges = PLACED[name, seed]
            return tuple((a + b * torch.rand(shape, generator=g, dtype=torch.float64)).to(dtype) for a, b in ranges)
        return tuple(DOMAINS[d](g, shape).to(dtype) for d in FAMILIES[name].parameters.values())

    return drawn


def on_the_line(name: str) -> Family:
    """The class of stablekl, or torch's where there is none."""
    cls, names = getattr(distributions, name), list(FAMILIES[name].parameters)
    if name == "ContinuousBernoulli":  # torch's constructor looks at the data of probs, whatever it is told
        return Family(lambda x: cls(logits=x), test_families.drawn("real"))
    return Family(lambda *x: cls(**dict(zip(names, x, strict=True)), validate_args=False), parameters_of(name))


def over(name: str) -> Family:
    """Families over vectors."""
    positive, two = test_families.drawn("positive", size=2), test_families.drawn("positive", "positive")
    weights = test_families.drawn("probability", size=4)
    return {
        "Beta": Family(stablekl.Beta, two),
        "Dirichlet": Family(stablekl.Dirichlet, positive),
        "Categorical": Family(lambda w: stablekl.Categorical(w), weights),
        "OneHotCategorical": Family(lambda w: stablekl.OneHotCategorical(w), weights),
    }[name]


def registered() -> set[tuple[str, str]]:
    """The pairs of families that stablekl has a rule for."""
    return {
        (p.__name__, q.__name__)
        for rules in (registry._HARDENED, _KL_REGISTRY)
        for (p, q), rule in rules.items()
        if rule.__module__.startswith("stablekl.")
    }


# Gaussians, in tests/test_cross.py: every ordered pair; mixtures, in files of their own.
GAUSSIANS = {"Independent", "LowRankMultivariateNormal", "MultivariateNormal", "Normal"}
MIXTURES = {"MixtureSameFamily"}
SAME = {re.sub(r"\(.*", "", name) for name in test_families.CASES}
ERRORS = {"ExpRelaxedCategorical", "LogitRelaxedBernoulli", "RelaxedBernoulli", "RelaxedOneHotCategorical"}
# Of other rules or of users' functions, in files of their own.
OF_BASES = {("TransformedDistribution", "TransformedDistribution"), ("ExponentialFamily", "ExponentialFamily")}
ALWAYS = {(p.__name__, q.__name__) for p, families in INFINITE.items() for q in families}
ALWAYS |= {("Poisson", "Bernoulli"), ("Poisson", "Binomial")}  # but for a rate of 0
VECTORS = {("Beta", "Dirichlet"), ("Dirichlet", "Beta")}
VECTORS |= {("Categorical", "OneHotCategorical"), ("OneHotCategorical", "Categorical")}
SELF = {(name, name) for name in SAME | ERRORS}
PAIRS = {pair for pair in registered() - SELF - OF_BASES if not set(pair) & MIXTURES and not set(pair) <= GAUSSIANS}
CASES = {
    f"{p}-{q}": (over(p) if (p, q) in VECTORS else on_the_line(p))._replace(
        other=over(q) if (p, q) in VECTORS else on_the_line(q)
    )
    for p, q in sorted(PAIRS)
}
FINITE = sorted(name for name in CASES if tuple(name.split("-")) not in ALWAYS)
CHECKS = ("batch_shapes_broadcast", "empty_batches", "derivatives", "transforms", "dtypes")


def test_every_registered_pair_has_a_case():
    """By construction: a pair is a case of this file, or of a family with itself, or of Gaussians and mixtures."""
    known = SELF | OF_BASES | {tuple(name.split("-")) for name in CASES}
    rest = registered() - known
    assert all(set(pair) <= GAUSSIANS or set(pair) & MIXTURES for pair in rest)
    assert registered() - OF_BASES >= {tuple(name.split("-")) for name in CASES}, "no case without a rule"
    assert len(FINITE) > 50


@pytest.mark.parametrize("name", FINITE)
@pytest.mark.parametrize("check", CHECKS)
def test_finite_pairs(name, check):
    REQUIREMENTS[check](CASES[name])


@pytest.mark.parametrize("name", FINITE)
def test_expanded_pairs(name):
    family = CASES[name]
    p = family.build(*family.parameters((3,), torch.float64, 1))
    q = family.other.build(*family.other.parameters((3,), torch.float64, 2))
    expected = stablekl.kl_divergence(p, q).expand(2, 3)
    assert expected.isfinite().all()
    torch.testing.assert_close(stablekl.kl_divergence(p.expand((2, 3)), q), expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(stablekl.kl_divergence(p, q.expand((2, 3))), expected, rtol=1e-14, atol=0)


ON_THE_LINE = sorted((p, q) for p, q in registered() - ALWAYS if {p, q} <= set(FAMILIES))
# Where both counts are the same a part of their rule is skipped, with its second derivative.


def _hessians(p: str, q: str, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward over reverse mode, and reverse mode twice."""
    first, second = on_the_line(p), on_the_line(q)
    halves = first.parameters((2,), torch.float64, 1), second.parameters((2,), torch.float64, 2)
    x = torch.stack([v[row] for half in halves for v in half])
    n = len(halves[0])

    def f(theta: torch.Tensor) -> torch.Tensor:
        return stablekl.kl_divergence(first.build(*theta[:n]), second.build(*theta[n:]))

    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    twice = [torch.autograd.grad(s, leaf, retain_graph=True)[0] for s in slope]
    return torch.func.hessian(f)(x), torch.stack(twice)


@pytest.mark.parametrize(("p", "q"), ON_THE_LINE)
def test_forward_over_reverse_mode(p, q):
    """``torch.no_grad`` stops no tangents, and functions without derivatives lose them under torch.func alone."""
    for row in range(2):
        forward, backward = _hessians(p, q, row)
        assert backward.isfinite().all()
        size = backward.abs().max()
        torch.testing.assert_close(forward, backward, rtol=1e-9, atol=1e-12 * float(size))


@pytest.mark.parametrize(("p", "q"), [("Gamma", "InverseGamma"), ("InverseGamma", "Gamma")])
def test_without_a_mean_the_reciprocal_is_infinitely_far(p, q):
    family, other = on_the_line(p), on_the_line(q)
    x = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64, requires_grad=True)
    one = torch.ones_like(x)
    value = stablekl.kl_divergence(family.build(x, one), other.build(one, one))
    assert value.isinf().tolist() == [True, True, False]
    (slope,) = torch.autograd.grad(value.sum(), x)
    assert not slope.isnan().any()


@pytest.mark.parametrize("name", sorted(set(CASES) - set(FINITE)))
def test_infinite_pairs(name):
    family = CASES[name]
    for dtype in (torch.float16, torch.float64):
        p = tuple(x.requires_grad_() for x in family.parameters((3,), dtype, 1))
        q = family.other.parameters((2, 3), dtype, 2)
        value = stablekl.kl_divergence(family.build(*p), family.other.build(*q))
        assert value.dtype == dtype
        assert torch.equal(value, torch.full((2, 3), math.inf, dtype=dtype))
        if value.requires_grad:
            value.sum().backward()
            assert not any(x.grad.isnan().any() for x in p)


AT_EQUALITY = {
    "Beta": (2.0, 3.0), "Bernoulli": (0.3,), "Cauchy": (0.0, 2.0), "Chi2": (3.0,), "ContinuousBernoulli": (0.3,),
    "Exponential": (2.0,), "FisherSnedecor": (5.0, 7.0), "Gamma": (2.0, 3.0), "Geometric": (0.3,),
    "Gumbel": (0.0, 2.0), "HalfCauchy": (2.0,), "HalfNormal": (2.0,), "InverseGamma": (2.0, 3.0),
    "Kumaraswamy": (2.0, 3.0), "Laplace": (0.0, 2.0), "LogNormal": (0.0, 2.0), "Normal": (0.0, 2.0),
    "Poisson": (2.0,), "StudentT": (3.0, 0.0, 2.0), "VonMises": (0.0, 2.0), "Weibull": (2.0, 3.0),
}  # fmt: skip


@pytest.mark.parametrize("name", AT_EQUALITY)
def test_second_derivatives_at_equality_are_the_fisher_information(name):
    parameters = AT_EQUALITY[name]
    n, leaves = len(parameters), torch.tensor(parameters * 2, dtype=torch.float64)

    def kl(x):
        return stablekl.kl_divergence(*(getattr(stablekl, name)(*half.unbind()) for half in (x[:n], x[n:])))

    for hessian in (torch.autograd.functional.hessian(kl, leaves), torch.func.hessian(kl)(leaves)):
        information = hessian[n:, n:]
        assert (torch.linalg.eigvalsh(information) > 0).all()
        torch.testing.assert_close(hessian[:n, :n], information, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(hessian[:n, n:], -information, rtol=1e-9, atol=1e-11)
