"""KL between families on the line: values, boundaries, gradients, transforms."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch.distributions import kl as torch_kl

import stablekl
from stablekl import distributions
from stablekl.distributions.cross.infinite import INFINITE
from stablekl.precision.references import FAMILIES
from stablekl.precision.references.context import exact, gradient, mp
from stablekl.precision.references.family import divergence, kl

F64 = torch.float64

# Parameters of p, then of q: ordinary, near the family of q, and at the ends of the range.
CASES = {
    "Bernoulli-Poisson": [(0.3, 0.2), (1e-9, 1.0000000001e-9), (0.0, 2.0), (1.0, 3.0), (1 - 1e-12, 1e-12)],
    "Beta-ContinuousBernoulli": [(2.0, 3.0, 0.3), (1 + 1e-9, 1.0, 0.5 + 1e-10), (1.0, 30.0, 1e-13), (1e6, 3e6, 0.2)],
    "Beta-Exponential": [(2.0, 3.0, 1.5), (1.0, 1e11, 1e11), (1.0, 1e12, 1e12 + 1), (1e-9, 1e-9, 1.0)],
    "Beta-Gamma": [(2.0, 3.0, 1.5, 2.0), (2.0, 1e11, 2.0, 1e11 + 2), (1e-9, 1e10, 1e-9, 1e10), (1e6, 1e10, 1e6, 1e10)],
    "Beta-Normal": [(2.0, 3.0, 0.5, 0.3), (1e10, 1e10, 0.5, 0.5 / math.sqrt(2e10)), (7.0, 1e12, 7e-12, 2.6e-12)],
    "Beta-Uniform": [(2.0, 3.0, -1.0, 2.0), (1 + 1e-12, 1.0, 0.0, 1.0), (1e12, 1e12, 0.0, 1.0), (1e-12, 5.0, 0.0, 1.0)],
    "ContinuousBernoulli-Exponential": [(0.3, 2.0), (1e-13, 29.933606208922594), (0.5 + 1e-12, 2.0), (0.999999, 1.0)],
    "ContinuousBernoulli-Laplace": [(0.3, 0.2, 0.4), (0.5 + 1e-12, 0.5, 0.2), (1e-12, 0.02, 0.03), (0.9, -3.0, 1.0)],
    "ContinuousBernoulli-Normal": [(0.3, 0.2, 0.4), (0.5 + 1e-12, 0.5, 0.28867513), (1e-12, 0.0361912, 0.0361912)],
    "ContinuousBernoulli-Uniform": [(0.3, -1.0, 2.0), (0.5 + 1e-12, 0.0, 1.0), (1e-12, 0.0, 1 + 1e-9)],
    "Exponential-Gamma": [(1.5, 2.0, 3.0), (1.5, 1 + 1e-9, 1.5 + 1e-9), (1e-12, 1e12, 1e12)],
    "Exponential-Gumbel": [(1.5, 0.3, 0.7), (1.0, 0.0, 0.618), (1e-9, 600.0, 1.0)],
    "Exponential-Laplace": [(1.5, 0.3, 0.7), (1.0, math.log(2), math.log(2)), (1e-12, -3.0, 1e12)],
    "Exponential-Normal": [(1.5, 0.3, 0.7), (1e12, 1e-12, 1e-12)],
    "Gamma-Exponential": [(2.0, 1.5, 3.0), (1 + 1e-9, 1.5, 1.5), (1e12, 1e12, 1.0), (1e-12, 1.0, 1e12)],
    "Gamma-Gumbel": [(2.0, 1.5, 0.3, 0.7), (5.5, 1.0, 4.42, 1.9), (1e12, 1e6, 999999.0, 1.0)],
    "Gamma-Normal": [(2.0, 1.5, 0.3, 0.7), (1e12, 1.0, 1e12, 1e6), (1e8, 1.0, 1e8 + 1, 1e4), (1e-6, 1.0, 1e-6, 1e-3)],
    "Gumbel-Laplace": [(0.3, 0.7, 0.2, 1.5), (0.0, 1.0, 0.37, 1.0), (0.0, 1.0, 1e6, 1e6), (5.0, 0.1, -3.0, 1.0)],
    "Gumbel-Normal": [(0.3, 0.7, 0.2, 1.5), (0.0, 1.0, 0.5772156649, 1.2825498)],
    "Laplace-Normal": [(0.3, 0.7, 0.2, 1.5), (1e-9, 1.0, 0.0, 1.4142135)],
    "Normal-Gumbel": [(0.3, 0.7, 0.2, 1.5), (0.0, 1.0, 0.5, 1.0), (-300.0, 1.0, 0.0, 0.5)],
    "Normal-Laplace": [(0.3, 0.7, 0.2, 1.5), (0.0, 1.0, 0.0, 0.79788456), (5.0, 1e-9, 0.0, 5.0)],
    "Pareto-Exponential": [(1.5, 3.0, 0.7), (1.0, 2.0, 0.5), (1.0, 1 + 1e-9, 1.0), (1.0, 1.0, 1.0)],
    "Pareto-Gamma": [(1.5, 3.0, 2.0, 0.7), (1.0, 1e6, 1e12, 1e12), (1.0, 0.5, 1.0, 1.0)],
    "Pareto-Laplace": [(1.5, 3.0, 0.2, 0.7), (1.0, 3.0, 1.5, 0.5), (1.0, 1e9, 1 + 1e-9, 1e-9), (1.0, 1.0, 1.0, 1.0)],
    "Pareto-Normal": [(1.5, 3.0, 0.2, 0.7), (1.0, 2 + 1e-9, 2.0, 1.0), (1.0, 2.0, 1.0, 1.0)],
    "Uniform-Beta": [(0.2, 0.7, 2.0, 3.0), (0.0, 1.0, 1 + 1e-9, 1.0), (0.4999999, 0.5000001, 1e13, 1e13)],
    "Uniform-ContinuousBernoulli": [(0.2, 0.7, 0.3), (0.0, 1.0, 0.5 + 1e-9), (1e-13, 1.0, 0.51), (0.9, 1.0, 1 - 1e-13)],
    "Uniform-Exponential": [(0.2, 0.7, 1.3), (0.0, 1.0, 2.0), (-0.1, 1.0, 2.0)],
    "Uniform-Gamma": [(0.2, 0.7, 2.0, 1.3), (1.0, 1 + 1e-9, 3e18, 3e18), (0.0, 1.0, 1e-9, 1.0), (-0.1, 1.0, 2.0, 1.0)],
    "Uniform-Gumbel": [(0.2, 0.7, 0.3, 1.3), (0.0, 3.83, 1.9, 1.0), (-600.0, 0.0, 0.0, 1.0)],
    "Uniform-Laplace": [(0.2, 0.7, 0.3, 1.3), (0.0, 1.0, 0.5, 0.25), (0.0, 1.0, -1e9, 1e9)],
    "Uniform-Normal": [(0.2, 0.7, 0.3, 1.3), (0.0, 1.0, 0.5, 0.28867513)],
    "Uniform-Pareto": [(1.2, 1.7, 1.0, 1.3), (1.0, 1 + 1e-9, 1.0, 2e9), (0.5, 1.0, 0.6, 1.0), (1.0, 1e12, 1.0, 0.1)],
}
# where torch's own rule is right, at the first case
ORDINARY = {pair: cases[0] for pair, cases in CASES.items()}


def split(pair, values):
    """The parameters of p and of q by name."""
    families = [FAMILIES[name] for name in pair.split("-")]
    n = len(families[0].parameters)
    halves = values[:n], values[n:]
    return [dict(zip(f.parameters, half, strict=True)) for f, half in zip(families, halves, strict=True)]


def built(pair, values, module=distributions, *, logits=False):
    found = []
    for name, given in zip(pair.split("-"), split(pair, values), strict=True):
        if logits and name == "ContinuousBernoulli":
            given = {"logits": given["probs"]}  # torch's constructor looks at the data of probs, whatever it is told
        found.append(getattr(module, name)(**given, validate_args=False))
    return found


def rule(pair, module=distributions, **kwargs):
    return lambda *values: stablekl.kl_divergence(*built(pair, values, module, **kwargs))


def tensors(pair, dtype=F64):
    return [torch.tensor(column, dtype=dtype) for column in zip(*CASES[pair], strict=True)]


def truth(pair, values):
    p, q = (FAMILIES[name] for name in pair.split("-"))
    n = len(p.parameters)
    row = [mp.mpf(x) for x in values]
    return divergence(p, tuple(row[:n]), q, tuple(row[n:]))


def ulps(value, expected):
    if mp.isinf(expected):
        return 0 if value == math.inf else math.inf
    return float(abs(mp.mpf(value) - expected) / mp.mpf(math.ulp(float(expected))))


@pytest.mark.parametrize("pair", CASES)
def test_values(pair):
    columns = tensors(pair)
    found = rule(pair)(*columns)
    for value, *row in zip(found.tolist(), *(c.tolist() for c in columns), strict=True):
        assert ulps(value, truth(pair, row)) <= 40, (row, value)


@pytest.mark.parametrize("pair", CASES)
def test_half_precision_is_rounded_once(pair):
    for dtype in (torch.bfloat16, torch.float16):
        columns = [torch.tensor([x], dtype=dtype) for x in ORDINARY[pair]]
        found = rule(pair)(*columns)
        expected = torch.tensor([float(truth(pair, [x.item() for x in columns]))], dtype=F64)
        assert found.dtype == dtype
        assert torch.equal(found, expected.to(dtype))


@pytest.mark.parametrize(
    "pair", ["Gamma-Normal", "Beta-Gamma", "Beta-Exponential", "Uniform-Beta", "Gamma-Exponential"]
)
def test_torchs_own_rule_fails(pair):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        classes = [getattr(torch.distributions, name) for name in pair.split("-")]
        own = torch_kl._KL_REGISTRY[tuple(classes)]
        columns = tensors(pair)
        found = own(*built(pair, columns, torch.distributions))
    worst = max(
        ulps(value, truth(pair, row))
        for value, *row in zip(found.tolist(), *(c.tolist() for c in columns), strict=True)
    )
    assert worst > 1e5


@pytest.mark.parametrize("pair", CASES)
def test_gradients(pair):
    values = [torch.tensor([x, x * (1 + 1e-2)], dtype=F64, requires_grad=True) for x in ORDINARY[pair]]
    assert torch.autograd.gradcheck(rule(pair), values)
    assert torch.autograd.gradgradcheck(rule(pair), values, atol=1e-4)


@pytest.mark.parametrize("pair", CASES)
def test_gradients_are_finite_where_they_should_be(pair):
    values = [x.requires_grad_() for x in tensors(pair)]
    for g in torch.autograd.grad(rule(pair)(*values).sum(), values):
        assert not g.isnan().any()


@pytest.mark.parametrize("pair", CASES)
def test_broadcasting_dtypes_and_transforms(pair):
    values = [torch.tensor(x, dtype=F64) for x in ORDINARY[pair]]
    n = len(split(pair, values)[0])
    f = rule(pair)
    expected = f(*values)
    wide = [x.expand(3) if i < n else x.expand(2, 1) for i, x in enumerate(values)]
    torch.testing.assert_close(f(*wide), expected.expand(2, 3), rtol=0, atol=0)
    mixed = [x if i < n else x.float() for i, x in enumerate(values)]
    assert f(*mixed).dtype == F64
    with torch.no_grad():
        torch.testing.assert_close(rule(pair, torch.distributions)(*values), expected, rtol=0, atol=0)
    f = rule(pair, logits=True)
    rows = [x.expand(3) for x in values]
    arguments = tuple(range(len(values)))
    jacobian = torch.func.vmap(torch.func.jacrev(f, arguments))(*rows)
    leaves = [x.clone().requires_grad_() for x in rows]
    for j, g in zip(jacobian, torch.autograd.grad(f(*leaves).sum(), leaves), strict=True):
        torch.testing.assert_close(j, g)


@pytest.mark.parametrize("pair", ["Beta-Normal", "Uniform-Beta", "ContinuousBernoulli-Exponential", "Pareto-Laplace"])
def test_compiled(pair):
    values = [torch.tensor([x], dtype=F64) for x in ORDINARY[pair]]
    f = rule(pair, logits=True)
    compiled = torch.compile(f, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*values), f(*values), rtol=1e-14, atol=0)


# ---- ContinuousBernoulli and Bernoulli by logits -----------------------------------------------------------------


def test_logits_are_taken_as_they_are():
    p = distributions.ContinuousBernoulli(logits=torch.tensor([-1e-12, -30.0, 40.0], dtype=F64))
    q = distributions.Exponential(torch.tensor([2.0, 30.0, 1.0], dtype=F64))
    with mp.workdps(60):
        for value, y, r in zip(stablekl.kl_divergence(p, q).tolist(), (-1e-12, -30, 40), (2, 30, 1), strict=True):
            y, r = mp.mpf(y), mp.mpf(r)
            mean = -1 / mp.expm1(-y) - 1 / y
            assert ulps(value, y * mean - mp.log(mp.expm1(y) / y) - mp.log(r) + r * mean) < 20


def test_bernoulli_by_logits_next_to_its_rate():
    logits = torch.tensor([-50.0, -5.0, 3.0, -math.inf, 800.0], dtype=F64)
    p = distributions.Bernoulli(logits=logits)
    rate = torch.sigmoid(logits).clamp(min=1e-3)
    rate[0] = math.exp(-50)
    found = stablekl.kl_divergence(p, distributions.Poisson(rate)).tolist()
    with mp.workdps(60):
        for value, x, r in zip(found, logits.tolist(), rate.tolist(), strict=True):
            one, zero, r = 1 / (1 + mp.exp(-x)), 1 / (1 + mp.exp(mp.mpf(x))), mp.mpf(r)
            expected = (one * mp.log(one / r) if one else 0) + (zero * mp.log(zero) if zero > 1e-300 else 0) + r
            assert ulps(value, expected) < 20
    leaf = logits[:3].clone().requires_grad_()
    f = lambda x: stablekl.kl_divergence(distributions.Bernoulli(logits=x), distributions.Poisson(rate[1:4]))  # noqa: E731
    assert torch.autograd.gradcheck(f, (leaf,))


def test_gradient_of_a_flat_continuous_bernoulli():
    def f(probs):
        p = distributions.ContinuousBernoulli(probs=probs)
        return torch.stack(
            [
                stablekl.kl_divergence(p, distributions.Exponential(torch.tensor(2.0, dtype=F64))),
                stablekl.kl_divergence(p, distributions.Normal(torch.tensor(0.3, dtype=F64), 0.5)),
                stablekl.kl_divergence(p, distributions.Laplace(torch.tensor(0.3, dtype=F64), 0.5)),
            ]
        )

    assert torch.autograd.gradcheck(f, (torch.tensor(0.5, dtype=F64, requires_grad=True),))


# ---- nothing between p and q -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pair", "values"),
    [
        ("Beta-Uniform", (1.0, 1.0, 0.0, 1.0)),
        ("Beta-ContinuousBernoulli", (1.0, 1.0, 0.5)),
        ("ContinuousBernoulli-Uniform", (0.5, 0.0, 1.0)),
        ("Uniform-Beta", (0.0, 1.0, 1.0, 1.0)),
        ("Uniform-ContinuousBernoulli", (0.0, 1.0, 0.5)),
        ("Exponential-Gamma", (0.3, 1.0, 0.3)),
        ("Gamma-Exponential", (1.0, 0.3, 0.3)),
    ],
)
def test_one_distribution_under_two_names(pair, values):
    leaves = [torch.tensor(x, dtype=F64, requires_grad=True) for x in values]
    found = rule(pair)(*leaves)
    assert found.item() == 0
    ends = {"low", "high"}  # where the gradient is one-sided
    names = [name for half in split(pair, values) for name in half]
    for name, g in zip(names, torch.autograd.grad(found, leaves), strict=True):
        assert name in ends or g.item() == 0


# ---- infinite ---------------------------------------------------------------------------------------------------


SOME = {name: [0.3, 0.6][: len(FAMILIES[name].parameters)] for name in FAMILIES}


@pytest.mark.parametrize(("p", "q"), [(p.__name__, q.__name__) for p, qs in INFINITE.items() for q in qs])
def test_always_infinite(p, q):
    values = [torch.tensor(x).expand(3).clone().requires_grad_() for x in SOME[p]]
    values += [torch.tensor(x, dtype=F64).expand(2, 1).clone().requires_grad_() for x in SOME[q]]
    found = rule(f"{p}-{q}")(*values)
    assert found.shape == (2, 3)
    assert found.dtype == F64
    assert (found == math.inf).all()
    assert all((g == 0).all() for g in torch.autograd.grad(found.sum(), values))


def test_every_pair_of_torch_has_a_rule():
    scalar = {p for p in FAMILIES if hasattr(distributions, p)}
    for p, q in torch_kl._KL_REGISTRY:
        names = (p.__name__, q.__name__)
        if names[0] != names[1] and set(names) <= scalar and p.__module__.startswith("torch."):
            found = stablekl.registry.rule_for(p, q)
            assert found.__module__.startswith("stablekl."), names


def test_a_poisson_without_mass_but_at_zero():
    rate = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=F64, requires_grad=True)
    probs = torch.tensor([0.3, 0.0, 1.0, 0.3], dtype=F64, requires_grad=True)
    count = torch.tensor(5.0)
    p = distributions.Poisson(rate)
    found = stablekl.kl_divergence(p, distributions.Binomial(count, probs))
    expected = torch.tensor([-5 * math.log1p(-0.3), 0.0, math.inf, math.inf], dtype=F64)
    torch.testing.assert_close(found, expected)
    for g in torch.autograd.grad(found.sum(), (rate, probs)):
        assert g.isfinite().all()
    one = stablekl.kl_divergence(p, distributions.Bernoulli(logits=torch.tensor(-2.0, dtype=F64)))
    torch.testing.assert_close(one, torch.tensor([math.log1p(math.exp(-2.0))] * 3 + [math.inf], dtype=F64))
    assert torch.autograd.grad(one[:3].sum(), rate)[0].eq(0).all()


def test_an_open_support_holds_as_much_as_a_closed_one():
    unit = distributions.Uniform(torch.tensor(0.0, dtype=F64), 1.0)
    cb = distributions.ContinuousBernoulli(probs=torch.tensor(0.3, dtype=F64))
    for p, q in ((cb, unit), (unit, cb), (unit, distributions.Beta(torch.tensor(2.0, dtype=F64), 2.0))):
        assert stablekl.kl_divergence(p, q).isfinite()


@pytest.mark.parametrize(
    ("p", "parameters", "mu", "b"),
    [
        ("Uniform", (1e-6, 1.001e-6), 0.0, 1e3),
        ("Pareto", (1e-10, 1035.0), 0.0, 3975.0),
        ("Normal", (1.0, 1.0), 0.0, 1e9),
        ("Exponential", (1e12,), -1e-9, 1e3),
        ("Gumbel", (1e-9, 1e-12), 0.0, 1e4),
    ],
)
def test_gradients_against_a_wide_laplace(p, parameters, mu, b):
    """By the mean deviation the derivative is 1/b; taken as 1/b - 1/A and 1/A it would lose the digits of b/A."""
    leaves = [torch.tensor(x, dtype=F64, requires_grad=True) for x in (*parameters, mu, b)]
    value = stablekl.kl_divergence(getattr(stablekl, p)(*leaves[:-2]), stablekl.Laplace(*leaves[-2:]))
    found = torch.autograd.grad(value, leaves)

    def at(*theta):
        return kl(FAMILIES[p], theta[:-2], FAMILIES["Laplace"], theta[-2:])

    for (truth,), slope in zip(gradient(at, *(exact(x.detach()) for x in leaves)), found, strict=True):
        assert float(slope) == pytest.approx(float(truth), rel=1e-13)


@pytest.mark.parametrize(
    ("p", "q", "parameters"),
    [
        ("Gamma", "LogNormal", (1e-12, 4.0, -9e11, 8e11)),
        ("Weibull", "LogNormal", (1e-80, 1e-40, 1e60, 1e-70)),
        ("Pareto", "Normal", (1e-300, 1e300, 1.0, 1e-30)),
        ("Gamma", "Normal", (8e8, 2.4e-74, -1e15, 2e12)),
        ("Exponential", "HalfNormal", (1e100, 1e100)),
        ("InverseGamma", "Gamma", (2.5, 1e150, 3.0, 1e-149)),
    ],
)
def test_gradients_at_the_ends_of_the_range(p, q, parameters):
    leaves = [torch.tensor(x, dtype=F64, requires_grad=True) for x in parameters]
    width = len(FAMILIES[p].parameters)
    value = stablekl.kl_divergence(getattr(stablekl, p)(*leaves[:width]), getattr(stablekl, q)(*leaves[width:]))
    found = torch.autograd.grad(value, leaves)

    def at(*theta):
        return kl(FAMILIES[p], theta[:width], FAMILIES[q], theta[width:])

    for (truth,), slope in zip(gradient(at, *(exact(x.detach()) for x in leaves)), found, strict=True):
        if abs(truth) > torch.finfo(F64).max:
            assert float(slope) == math.copysign(math.inf, truth)
        else:
            assert float(slope) == pytest.approx(float(truth), rel=1e-11, abs=0)


@pytest.mark.parametrize(
    ("p", "q", "parameters"),
    [
        ("Gamma", "Normal", (1.0, 2.0, 0.5, 0.7)),
        ("Beta", "Normal", (1.0, 1.0, 0.0, 0.7)),
        ("Pareto", "Normal", (1.0, 3.0, 1.5, 0.7)),
        ("Gamma", "Gumbel", (1.0, 1.0, 0.0, 0.7)),
        ("Gamma", "LogNormal", (1.0, 1.0, 0.0, 0.7)),
        ("InverseGamma", "Gamma", (30.0, 29.0, 30.0, 30.0)),
    ],
)
def test_second_derivatives_where_a_term_of_the_first_is_zero(p, q, parameters):
    leaves = tuple(torch.tensor(x, dtype=F64, requires_grad=True) for x in parameters)
    width = len(FAMILIES[p].parameters)

    def f(*x):
        return stablekl.kl_divergence(getattr(stablekl, p)(*x[:width]), getattr(stablekl, q)(*x[width:]))

    assert torch.autograd.gradgradcheck(f, leaves)
