"""The scalar and vector families: what every rule must satisfy, edges, and the reference's digits at hard inputs."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions.kl import _KL_REGISTRY

import stablekl
from stablekl.precision.batches import Plan
from stablekl.precision.metrics import group_error
from stablekl.precision.references.categorical import kl_from_probs
from stablekl.precision.references.context import exact as exact_value
from stablekl.precision.subjects import catalogue
from tests.conformance import REQUIREMENTS, Family, Tensors

INF = math.inf


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- conformance --------------------------------------------------------------------------------------------------


def drawn(*domains: str, size: int = 0) -> Any:
    """Parameters of a family: "real", "positive", "probability"; vectors of ``size``."""

    def parameters(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensors:
        g = torch.Generator().manual_seed(seed)
        full = (*shape, size) if size else shape
        kinds = {
            "real": lambda: torch.randn(full, generator=g, dtype=torch.float64),
            "positive": lambda: 0.5 + 2 * torch.rand(full, generator=g, dtype=torch.float64),
            "probability": lambda: 0.2 + 0.6 * torch.rand(full, generator=g, dtype=torch.float64),
        }
        return tuple(kinds[d]().to(dtype) for d in domains)

    return parameters


def nested(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensors:
    """Intervals and half-lines of p within those of q: seed 1 is p's."""
    low, width = drawn("positive", "positive")(shape, torch.float64, seed)
    return (low + 10 if seed == 1 else low).to(dtype), (low + 10 + width if seed == 1 else low + 20 + width).to(dtype)


def started(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensors:
    scale, alpha = drawn("positive", "positive")(shape, torch.float64, seed)
    return (scale + 3 if seed == 1 else scale).to(dtype), alpha.to(dtype)


def wishart(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensors:
    df, x, y, z = drawn("positive", "positive", "positive", "real")(shape, torch.float64, seed)
    tril = torch.stack([torch.stack([x, 0 * x], -1), torch.stack([z, y], -1)], -2)
    return (3 + df).to(dtype), tril.to(dtype)


S = stablekl
LOC_SCALE, TWO, ONE = drawn("real", "positive"), drawn("positive", "positive"), drawn("positive")
CASES = {
    "Bernoulli(probs)": Family(lambda p: S.Bernoulli(p, validate_args=False), drawn("probability")),
    "Bernoulli(logits)": Family(lambda x: S.Bernoulli(logits=x), drawn("real")),
    "Beta": Family(S.Beta, TWO),
    "Binomial(probs)": Family(lambda p: S.Binomial(7, p, validate_args=False), drawn("probability")),
    "Binomial(logits)": Family(lambda x: S.Binomial(7, logits=x), drawn("real")),
    "Categorical(probs)": Family(lambda w: S.Categorical(w), drawn("probability", size=4)),
    "Categorical(logits)": Family(lambda x: S.Categorical(logits=x), drawn("real", size=4)),
    "Cauchy": Family(S.Cauchy, LOC_SCALE),
    "Chi2": Family(S.Chi2, ONE),
    "ContinuousBernoulli(probs)": Family(lambda p: S.ContinuousBernoulli(p, validate_args=False), drawn("probability")),
    "ContinuousBernoulli(logits)": Family(lambda x: S.ContinuousBernoulli(logits=x), drawn("real")),
    "Dirichlet": Family(S.Dirichlet, drawn("positive", size=4)),
    "Exponential": Family(S.Exponential, ONE),
    "FisherSnedecor": Family(S.FisherSnedecor, TWO, rows=12),
    "Gamma": Family(S.Gamma, TWO),
    "Geometric(probs)": Family(lambda p: S.Geometric(p, validate_args=False), drawn("probability")),
    "Geometric(logits)": Family(lambda x: S.Geometric(logits=x), drawn("real")),
    "Gumbel": Family(S.Gumbel, LOC_SCALE),
    "HalfCauchy": Family(S.HalfCauchy, ONE),
    "HalfNormal": Family(S.HalfNormal, ONE),
    "InverseGamma": Family(S.InverseGamma, TWO),
    "Kumaraswamy": Family(S.Kumaraswamy, TWO, rows=12),
    "LKJCholesky": Family(lambda c: S.LKJCholesky(3, c), ONE),
    "Laplace": Family(S.Laplace, LOC_SCALE),
    "LogNormal": Family(S.LogNormal, LOC_SCALE),
    "LogisticNormal": Family(S.LogisticNormal, drawn("real", "positive", size=3)),
    "Multinomial(probs)": Family(lambda w: S.Multinomial(3, w, validate_args=False), drawn("probability", size=4)),
    "Multinomial(logits)": Family(lambda x: S.Multinomial(3, logits=x), drawn("real", size=4)),
    "NegativeBinomial(probs)": Family(lambda p: S.NegativeBinomial(7, p, validate_args=False), drawn("probability")),
    "NegativeBinomial(logits)": Family(lambda x: S.NegativeBinomial(7, logits=x), drawn("real")),
    "OneHotCategorical(probs)": Family(lambda w: S.OneHotCategorical(w), drawn("probability", size=4)),
    "OneHotCategorical(logits)": Family(lambda x: S.OneHotCategorical(logits=x), drawn("real", size=4)),
    "Pareto": Family(S.Pareto, started),
    "Poisson": Family(S.Poisson, ONE),
    "StudentT": Family(S.StudentT, drawn("positive", "real", "positive"), rows=12),
    "Uniform": Family(lambda a, b: S.Uniform(a, b, validate_args=False), nested),
    "VonMises": Family(S.VonMises, LOC_SCALE),
    "Weibull": Family(S.Weibull, TWO),
    "Wishart": Family(lambda n, t: S.Wishart(n, scale_tril=t.tril(), validate_args=False), wishart, False),
}
# torch's constructors of these compare data, or have no kernel in half precision.
NO_HALF = {"LogisticNormal", "Wishart"}
CHECKS = set(REQUIREMENTS) - {"expand_keeps_type_and_value", "copies"}
ONE_WAY = {"Pareto", "Uniform"}  # q must contain p


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("check", sorted(CHECKS))
@pytest.mark.filterwarnings("ignore:Low df values")
def test_conformance(name, check):
    family = CASES[name]
    if name in ONE_WAY and check == "batch_shapes_broadcast":
        p, q = family.parameters((3,), torch.float64, 1), family.parameters((2, 3), torch.float64, 2)
        assert stablekl.kl_divergence(family.build(*p), family.build(*q)).shape == (2, 3)
        return
    if name in ONE_WAY and check in ("never_negative", "zero_at_equality"):
        pytest.skip("a perturbed q does not contain p, and at p = q derivatives are one-sided: see the next test")
    if name in NO_HALF:
        family = family._replace(lenient=False)
    if name in NO_HALF and check == "transforms":
        pytest.skip("torch's constructor looks at the data")
    REQUIREMENTS[check](family)


@pytest.mark.parametrize("name", sorted(ONE_WAY))
def test_zero_at_equality_with_one_sided_derivatives(name):
    p, q = (tuple(x.requires_grad_() for x in nested((4,), torch.float64, 1)) for _ in range(2))
    value = stablekl.kl_divergence(CASES[name].build(*p), CASES[name].build(*q))
    assert (value == 0).all()
    value.sum().backward()
    assert all(x.grad.isfinite().all() for x in (*p, *q))


@pytest.mark.parametrize("name", CASES)
def test_expand_keeps_the_type_and_what_was_given(name):
    family = CASES[name]
    p, q = family.parameters((3,), torch.float64, 1), family.parameters((3,), torch.float64, 2)
    small, other = family.build(*p), family.build(*q)
    large = small.expand((2, 3))
    assert type(large) is type(small)
    assert large.to(torch.float32).batch_shape == (2, 3)
    expected = stablekl.kl_divergence(small, other).expand(2, 3)
    torch.testing.assert_close(stablekl.kl_divergence(large, other), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:Low df values")
def test_ours_and_torchs_in_every_mixture(name):
    """Dispatch finds the rule for ours against torch's, and harden() for torch's alone."""
    family = CASES[name]
    ours = [family.build(*family.parameters((), torch.float64, seed)) for seed in (1, 2)]
    host = next(c for c in type(ours[0]).__mro__ if c.__module__.startswith("torch."))
    before = dict(_KL_REGISTRY)
    theirs = []
    for d in ours:
        twin = host.__new__(host)
        twin.__dict__.update(d.__dict__)
        theirs.append(twin)
    expected = stablekl.kl_divergence(*ours)
    assert expected > 0
    for p in (ours[0], theirs[0]):
        for q in (ours[1], theirs[1]):
            with stablekl.harden():
                torch.testing.assert_close(td.kl_divergence(p, q), expected, rtol=1e-14, atol=0)
            if p is ours[0] or q is ours[1]:
                torch.testing.assert_close(td.kl_divergence(p, q), expected, rtol=1e-14, atol=0)
    assert dict(_KL_REGISTRY) == before


def compiled(family, *inputs):
    n = len(inputs) // 2

    def f(*x):
        return stablekl.kl_divergence(family.build(*x[:n]), family.build(*x[n:]))

    return f(*inputs), torch.compile(f, fullgraph=True)(*inputs)


@pytest.mark.parametrize("name", ["Bernoulli(logits)", "Cauchy", "Exponential", "Laplace", "Poisson"])
def test_compile(name):
    family = CASES[name]
    inputs = (*family.parameters((5,), torch.float64, 1), *family.parameters((5,), torch.float64, 2))
    torch._dynamo.reset()
    eager, traced = compiled(family, *inputs)
    torch.testing.assert_close(traced, eager, rtol=1e-14, atol=0)


# ---- accuracy -----------------------------------------------------------------------------------------------------

WITHIN_8 = (
    *("Bernoulli", "Binomial", "Cauchy", "ContinuousBernoulli", "Exponential", "Geometric", "Gumbel", "HalfCauchy"),
    *("HalfNormal", "Laplace", "LogNormal", "Pareto", "Poisson", "Uniform"),
)
WITHIN_16 = ("Beta", "Categorical", "Chi2", "Dirichlet", "Gamma", "InverseGamma", "OneHotCategorical")
BARS = dict.fromkeys(WITHIN_8, 8.0) | dict.fromkeys(WITHIN_16, 16.0)
REGIMES = (
    *(("near", 0.0, 0.05, 2), ("near", 0.0, 0.5, 3), ("ratio", 0.0, 0.05, 3), ("ratio", 0.1, 0.6, 2)),
    *(("apart", 0.0, 0.1, 3), ("apart", 0.0, 0.6, 2)),
)
PLANS = [Plan(relation, i, centre, spread, 1.0, size) for i, (relation, centre, spread, size) in enumerate(REGIMES)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", BARS)
def test_accuracy(name, dtype):
    """A few rows of every regime against mpmath; the precision suite looks for the worst."""
    subject = catalogue()[f"{name}-{name}"]
    worst = 0.0
    for plan in PLANS:
        batch = tuple(x[:12] for x in subject.expand(plan, dtype))
        result = subject.rules["stablekl"](*batch)
        assert not result.isnan().any()
        assert (result >= 0).all()
        for i in range(len(result)):
            truth = subject.truth([x[i] for x in batch])[0]
            worst = max(worst, group_error([float(result[i])], truth, dtype, None))
    assert worst <= (BARS[name] if dtype == torch.float64 else 0.51)


@pytest.mark.parametrize("name", BARS)
def test_torchs_rule_fails(name):
    """The must-fail twin: next to p = q torch's own rule has no digit left."""
    subject = catalogue()[f"{name}-{name}"]
    batch = tuple(x[:12] for x in subject.expand(PLANS[0], torch.float64))
    if name == "Uniform":  # q just around p
        batch = tuple(torch.full((12,), v, dtype=torch.float64) for v in (1.0, 3.0, 1 - 2.0**-53, 3.0))
    result = subject.rules["torch"](*batch)
    errors = []
    for i in range(len(result)):
        truth = subject.truth([x[i] for x in batch])[0]
        errors.append(group_error([float(result[i])], truth, torch.float64, None))
    assert max(errors) > 1000


# ---- edges --------------------------------------------------------------------------------------------------------


def kl(p, q):
    return stablekl.kl_divergence(p, q).item()


def test_probabilities_of_zero_and_one():
    b = S.Bernoulli
    assert kl(b(f64(0.0)), b(f64(0.0))) == 0
    assert kl(b(f64(1.0)), b(f64(1.0))) == 0
    assert kl(b(f64(1.0)), b(f64(0.25))) == pytest.approx(math.log(4), rel=1e-15)
    assert kl(b(f64(0.0)), b(f64(0.25))) == pytest.approx(-math.log1p(-0.25), rel=1e-15)
    assert kl(b(f64(0.5)), b(f64(0.0))) == INF
    assert kl(b(f64(0.5)), b(f64(1.0))) == INF
    assert kl(b(logits=f64(INF)), b(logits=f64(-2.0))) == pytest.approx(math.log1p(math.exp(2)), rel=1e-15)
    assert kl(b(logits=f64(INF)), b(logits=f64(INF))) == 0
    assert kl(b(logits=f64(0.0)), b(logits=f64(20.0))) == pytest.approx(9.30685282150, rel=1e-11)
    assert kl(b(f64(1.0)), b(logits=f64(-60.0))) == pytest.approx(60.0, rel=1e-15)
    assert kl(S.Geometric(f64(1.0)), S.Geometric(f64(0.5))) == pytest.approx(math.log(2), rel=1e-15)
    assert kl(S.Poisson(f64(0.0)), S.Poisson(f64(3.0))) == 3
    assert kl(S.Poisson(f64(3.0)), S.Poisson(f64(0.0))) == INF
    assert kl(S.Binomial(3, f64(1.0)), S.Binomial(3, f64(0.5))) == pytest.approx(3 * math.log(2), rel=1e-15)


def test_binomials_of_unequal_counts():
    def truth(n, p, m, q):
        total = 0.0
        for k in range(n + 1):
            a = math.comb(n, k) * p**k * (1 - p) ** (n - k)
            b = math.comb(m, k) * q**k * (1 - q) ** (m - k)
            total += a * math.log(a / b) if a else 0
        return total

    for n, p, m, q in (
        (3, 0.3, 5, 0.2),
        (1, 0.9, 40, 0.5),
        (20, 0.05, 400, 0.0025),
        (4, 1.0, 9, 0.1),
        (0, 0.5, 3, 0.5),
    ):
        found = kl(S.Binomial(n, f64(p)), S.Binomial(m, f64(q)))
        assert found == pytest.approx(truth(n, p, m, q), rel=1e-10)
    assert kl(S.Binomial(5, f64(0.3)), S.Binomial(3, f64(0.3))) == INF
    assert kl(S.Binomial(5, f64(0.0)), S.Binomial(3, f64(0.3))) == pytest.approx(-3 * math.log1p(-0.3), rel=1e-15)


def test_excluded_categories():
    c = S.Categorical
    assert kl(c(f64(0.5, 0.5)), c(f64(1e-30, 1.0))) == pytest.approx(33.8456, abs=1e-4)
    assert kl(c(f64(0.5, 0.5, 0.0)), c(f64(0.25, 0.25, 0.5))) == pytest.approx(math.log(2), rel=1e-15)
    assert kl(c(f64(0.5, 0.5)), c(f64(0.0, 1.0))) == INF
    assert kl(c(f64(0.0, 1.0)), c(f64(0.0, 2.0))) == 0
    masked = f64(0.3, -INF, 1.0).requires_grad_()
    other = f64(0.1, -INF, 0.5).requires_grad_()
    value = stablekl.kl_divergence(c(logits=masked), c(logits=other))
    first = torch.autograd.grad(value, (masked, other), create_graph=True)
    assert all(g.isfinite().all() for g in first)
    second = torch.autograd.grad(sum((g * g).sum() for g in first), (masked, other))
    assert all(g.isfinite().all() for g in second)


def test_raw_weights_are_kept():
    """torch's constructor rounds what it normalises: the divergence of the same weights times 3 is not 0 then."""
    w = f64(3.0, 5.0, 11.0)
    assert kl(S.Categorical(w), S.Categorical(3 * w)) == 0
    near = w.clone()
    near[0] = math.nextafter(3.0, 4)
    exact = kl(S.Categorical(w), S.Categorical(near))
    truth = float(kl_from_probs([exact_value(v) for v in w], [exact_value(v) for v in near]))
    assert abs(exact / truth - 1) < 1e-14
    with stablekl.harden():
        rounded = td.kl_divergence(td.Categorical(w), td.Categorical(near)).item()
    assert abs(rounded / truth - 1) > 0.01
    p = S.ContinuousBernoulli(f64(1e-20))  # torch's are clamped to one and the same
    assert kl(p, S.ContinuousBernoulli(f64(2e-20))) == pytest.approx(1.1e-4, rel=0.2)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: S.Exponential(f64(1.0, 0.0)), r"rate of Exponential must be positive, but rate\[1\] is 0.0"),
        (lambda: S.Bernoulli(f64(0.2, 1.5)), r"probs of Bernoulli must be between 0 and 1, but probs\[1\] is 1.5"),
        (lambda: S.Laplace(f64(0.0, math.nan), 1.0), r"loc of Laplace must be .*loc\[1\] is nan. A NaN usually"),
        (lambda: S.Poisson(f64(-1.0)), r"rate of Poisson must be 0 or more, but rate\[0\] is -1.0"),
        (lambda: S.HalfNormal(f64(0.0)), r"scale of HalfNormal must be positive, but scale\[0\] is 0.0"),
        (
            lambda: S.Gamma(f64(1.0, -2.0), 1.0),
            r"concentration of Gamma must be positive, but concentration\[1\] is -2.0",
        ),
    ],
)
def test_errors_say_where(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_transforms_that_lose_something():
    """torch: 18, for two descriptions of one distribution."""
    absolute = [td.AbsTransform()]
    p, q, r = (td.TransformedDistribution(td.Normal(m, 1.0), absolute) for m in (3.0, -3.0, 0.5))
    assert kl(p, q) == 0
    assert 0 < kl(p, r) < stablekl.kl_divergence(td.Normal(3.0, 1.0), td.Normal(0.5, 1.0))
    with stablekl.harden():
        assert td.kl_divergence(p, q) == 0
    x, y = (td.TransformedDistribution(td.Laplace(m, 1.0), absolute) for m in (3.0, -3.0))
    with pytest.raises(NotImplementedError, match="maps several points to one"):
        stablekl.kl_divergence(x, y)
    z = td.TransformedDistribution(td.Laplace(3.0, 1.0), [td.ExpTransform()])
    with pytest.raises(NotImplementedError, match="different transforms"):
        stablekl.kl_divergence(x, z)
    assert kl(z, td.TransformedDistribution(td.Laplace(3.0, 2.0), [td.ExpTransform()])) == pytest.approx(
        0.1931, abs=1e-4
    )


# ---- a grid of extremes -------------------------------------------------------------------------------------------

POSITIVE = (1e-30, 1e-12, 0.5, 1.0, 3.0, 1e12, 1e30)
REAL = (0.0, -1e-12, 1.0, -1e12)
GRID = {
    **dict.fromkeys(("Chi2", "Exponential", "HalfCauchy", "HalfNormal"), (POSITIVE,)),
    **dict.fromkeys(("Beta", "Gamma", "InverseGamma", "Pareto", "Weibull"), (POSITIVE, POSITIVE)),
    **dict.fromkeys(("Cauchy", "Gumbel", "Laplace", "LogNormal", "Normal"), (REAL, POSITIVE)),
    "Bernoulli": ((0.0, 1e-300, 1e-12, 0.5, 1 - 1e-12, 1.0),),
    "ContinuousBernoulli": ((0.0, 1e-300, 1e-12, 0.5, 1 - 1e-12, 1.0),),
    "Geometric": ((1e-300, 1e-12, 0.5, 1 - 1e-12, 1.0),),
    "Poisson": ((0.0, *POSITIVE),),
}


def on_the_grid(name, rule):
    """The values of a rule on all pairs, and its gradients."""
    points = list(itertools.product(*GRID[name]))
    rows = f64(*(v for p in points for q in points for v in (*p, *q))).reshape(len(points) ** 2, -1)
    leaves = [x.clone().requires_grad_() for x in rows.unbind(-1)]
    half = len(leaves) // 2
    cls = getattr(S, name) if rule is stablekl.kl_divergence else getattr(td, name)
    value = rule(cls(*leaves[:half], validate_args=False), cls(*leaves[half:], validate_args=False))
    return value, torch.autograd.grad(value.sum(), leaves)


@pytest.mark.parametrize("name", GRID)
def test_extremes_give_no_nan(name):
    value, gradients = on_the_grid(name, stablekl.kl_divergence)
    assert (value >= 0).all()
    assert not any(g.isnan().any() for g in gradients)


def test_extremes_give_torch_nan_or_negative_values():
    """The must-fail twin."""
    for name in ("Beta", "Gamma", "Geometric", "Gumbel", "InverseGamma", "Poisson"):
        value, gradients = on_the_grid(name, td.kl_divergence)
        assert not (value >= 0).all() or any(g.isnan().any() for g in gradients), name
