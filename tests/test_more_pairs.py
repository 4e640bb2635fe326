"""KL divergences of more pairs that torch has no rule for: other spellings, Weibull, half-normal and log-normal."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributions

import stablekl
from stablekl.precision.references import FAMILIES
from stablekl.precision.references.context import mp
from stablekl.precision.references.family import divergence, kl

F64 = torch.float64


# ---- one distribution, two classes --------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [distributions, stablekl])
def test_one_hot_and_integers_are_the_same_categories(module):
    x, y = torch.tensor([[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]]), torch.tensor([0.4, 0.5, 0.1])
    expected = stablekl.kl_divergence(module.Categorical(x), module.Categorical(y))
    for p, q in ((module.OneHotCategorical, module.Categorical), (module.Categorical, module.OneHotCategorical)):
        assert torch.equal(distributions.kl_divergence(p(x, validate_args=False), q(y, validate_args=False)), expected)
    with pytest.raises(ValueError, match="3 categories and q has 2"):
        distributions.kl_divergence(module.OneHotCategorical(y), module.Categorical(y[:2]))


@pytest.mark.parametrize("module", [distributions, stablekl])
def test_beta_is_the_first_coordinate_of_a_dirichlet(module):
    a, b = torch.tensor([[2.0, 1e6], [3.0, 0.5]]), torch.tensor([0.7, 1e6 + 100])
    p, q = module.Beta(a, 1.5), module.Beta(b, 2.5)
    as_p, as_q = (module.Dirichlet(torch.stack([d.concentration1, d.concentration0], -1)) for d in (p, q))
    expected = stablekl.kl_divergence(p, q)
    assert expected.shape == (2, 2)
    assert torch.equal(distributions.kl_divergence(p, as_q), expected)
    assert torch.equal(distributions.kl_divergence(as_p, q), expected)
    # the order of the concentrations, by torch's own densities
    x = torch.tensor(0.3)
    torch.testing.assert_close(as_q.log_prob(torch.stack([x, 1 - x], -1)), q.log_prob(x))
    three = module.Dirichlet(torch.ones(3))
    for pair in ((p, three), (three, q)):
        with pytest.raises(ValueError, match="3 categories"):
            distributions.kl_divergence(*pair)


# ---- between families on the half-line ----------------------------------------------------------------------------

UP, DOWN = 1 + 2.0**-52, 1 - 2.0**-53
# Parameters of p, then of q: ordinary, near p = q or the closest q, and at the ends of the range.
CASES = {
    "Weibull-Exponential": [
        (1.3, 1.7, 0.6),
        (1.0, UP, DOWN),
        (2.0, 1 + 1e-9, 0.5),
        (3e5, 1e-2, 1e-7),
        (1.0, 1e12, 1.0),
    ],
    "Exponential-Weibull": [
        (0.6, 1.3, 1.7),
        (DOWN, 1.0, UP),
        (0.5, 2.0, 1 + 1e-9),
        (1e-7, 1e9, 0.3),
        (1.0, 1.0, 1e-12),
    ],
    "Weibull-Gamma": [
        *((1.3, 1.7, 2.2, 0.6), (1.0, UP, UP, 1.0), (1.0, 1 + 1e-9, 1 - 1.5e-9, 1.0), (1.0, 1 + 3e-5, 1 - 4e-5, 1.0)),
        *((1.0, 1e6, 6e11, 6e11), (1e-12, 0.01, 1e-12, 1e-12), (1.0, 1e12, 1e12, 1e12), (1.0, 1 / 150, 3.0, 1.0)),
    ],
    "Gamma-Weibull": [
        *((1.6, 1.9, 1.3, 1.7), (UP, 1.0, 1.0, DOWN), (1 + 1e-9, 1.0, 1.0, 1 + 1.5e-9), (1 + 3e-5, 1.0, 1.0, 1 + 4e-5)),
        *((1e12, 1e12, 1.0, 1e6), (1e-12, 1e-12, 1.0, 1e-12), (20.0, 0.1, 1.0, 100.0), (3.0, 1e12, 1e-12, 1e12)),
    ],
    "HalfNormal-Exponential": [(0.8, 0.6), (0.8, 1.5666426716443743), (1e12, 1e-12), (1e-12, 1e-12), (1e9, 1e12)],
    "HalfNormal-Gamma": [(0.8, 2.2, 0.6), (1.0, 1.363952374040109, 1.7), (1.0, 1e12, 1e12), (1e-12, 1e-12, 1.0)],
    "Exponential-HalfNormal": [(0.6, 0.8), (1.0, 1.4142135623730951), (1e12, 1e-12), (1e-12, 1e-12), (1e9, 1e12)],
    "Gamma-HalfNormal": [(1.6, 1.9, 0.8), (1.4, 1.0, 1.8330302779823362), (1e12, 1e12, 1.0), (1e-12, 1.0, 1.0)],
    "LogNormal-Exponential": [
        (0.3, 0.8, 0.6),
        (-0.5, 1.0, 1.0),
        (600.0, 1.0, 1e-12),
        (0.0, 1e-12, 1.0),
        (0.0, 40.0, 1.0),
    ],
    "LogNormal-Gamma": [
        (0.3, 0.8, 2.2, 0.6),
        (0.0, 1e-6, 1e12, 1e12),
        (-5e-13, 1e-6, 1e12, 1e12),
        (9.0, 1e-9, 1e-9, 1.0),
    ],
    "LogNormal-Weibull": [
        (0.3, 0.8, 1.3, 1.7),
        (0.0, 1e-6, 1.0, 1e6),
        (20.0, 1.0, 1e-9, 20.0),
        (0.0, 1e-9, 1.0, 1e-12),
    ],
    "Exponential-LogNormal": [(0.6, 0.3, 0.8), (1.0, -0.5772156649015329, 1.2825498301618641), (1e12, -28.0, 1e-9)],
    "Gamma-LogNormal": [
        *((1.6, 1.9, 0.3, 0.8), (1e12, 1e12, 0.0, 1e-6), (1e12, 1e12, -5e-13, 1e-6), (1e-12, 1.0, -1e12, 1e12)),
        *((0.3, 1.0, -3.5, 3.5), (0.29, 1.0, -3.6, 3.6)),
    ],
    "Weibull-LogNormal": [(1.3, 1.7, 0.3, 0.8), (1.0, 1e6, -5.77e-7, 1.28e-6), (1e-12, 1e-12, -5.8e11, 1.28e12)],
}
PAIRS = list(CASES)


def built(pair, values, module=stablekl):
    """The two distributions."""
    names, first = pair.split("-"), 0
    found = []
    for name in names:
        parameters = FAMILIES[name].parameters
        given = values[first : first + len(parameters)]
        first += len(parameters)
        found.append(getattr(module, name)(**dict(zip(parameters, given, strict=True)), validate_args=False))
    return found


def rule(pair):
    return lambda *values: stablekl.kl_divergence(*built(pair, values))


def columns(pair, dtype=F64):
    return [torch.tensor(column, dtype=dtype) for column in zip(*CASES[pair], strict=True)]


def halves(pair, row):
    """The families, each followed by its parameters."""
    p, q = (FAMILIES[name] for name in pair.split("-"))
    row, n = [mp.mpf(x) for x in row], len(p.parameters)
    return p, tuple(row[:n]), q, tuple(row[n:])


def ulps(value, expected):
    if expected > torch.finfo(F64).max:
        return 0 if value == math.inf else math.inf
    return float(abs(mp.mpf(value) - expected) / mp.mpf(math.ulp(float(expected))))


@pytest.mark.parametrize("pair", PAIRS)
def test_values(pair):
    found = rule(pair)(*columns(pair))
    for value, row in zip(found.tolist(), CASES[pair], strict=True):
        assert ulps(value, divergence(*halves(pair, row))) <= 16, (row, value)


@pytest.mark.parametrize("pair", PAIRS)
def test_torchs_classes_get_it_too(pair):
    torchs = distributions.kl_divergence(*built(pair, columns(pair), distributions))
    torch.testing.assert_close(torchs, rule(pair)(*columns(pair)), rtol=1e-14, atol=0)


@pytest.mark.parametrize("pair", PAIRS)
def test_half_precision_is_rounded_once(pair):
    for dtype in (torch.bfloat16, torch.float16):
        ordinary = [torch.tensor([x], dtype=dtype) for x in CASES[pair][0]]
        expected = float(divergence(*halves(pair, [x.item() for x in ordinary])))
        assert torch.equal(rule(pair)(*ordinary), torch.tensor([expected], dtype=F64).to(dtype))


@pytest.mark.parametrize("pair", PAIRS)
def test_derivatives(pair):
    ordinary = [torch.tensor([x, x * 1.01], dtype=F64, requires_grad=True) for x in CASES[pair][0]]
    assert torch.autograd.gradcheck(rule(pair), ordinary)
    assert torch.autograd.gradgradcheck(rule(pair), ordinary)
    every = [x.requires_grad_() for x in columns(pair)]
    gradients = torch.autograd.grad(rule(pair)(*every).sum(), every)
    assert all(not g.isnan().any() for g in gradients)


@pytest.mark.parametrize("pair", PAIRS)
def test_shapes_and_transforms(pair):
    values = [torch.tensor(x, dtype=F64) for x in CASES[pair][0]]
    n = len(FAMILIES[pair.split("-")[0]].parameters)
    wide = [v + 0.1 * torch.rand(2, 3, dtype=F64, generator=torch.Generator().manual_seed(1)) for v in values]
    mixed = [w[0] if i < n else w for i, w in enumerate(wide)]
    found = rule(pair)(*mixed)
    assert found.shape == (2, 3)
    torch.testing.assert_close(found[0], rule(pair)(*(w[0] for w in wide)), rtol=1e-14, atol=0)
    rows = torch.stack([w.reshape(-1) for w in wide], -1)

    def scalar(row):
        return rule(pair)(*row)

    by_row = torch.stack([torch.autograd.functional.jacobian(scalar, row) for row in rows])
    torch.testing.assert_close(torch.func.vmap(torch.func.jacrev(scalar))(rows), by_row)


@pytest.mark.parametrize("pair", ["Weibull-Exponential", "Exponential-Weibull", "Weibull-Gamma", "Gamma-Weibull"])
def test_textbook_form_fails(pair):
    """The same expectations, added in float64."""
    row = CASES[pair][2]
    with mp.workprec(53):
        plain = kl(*halves(pair, row))
    assert ulps(float(plain), divergence(*halves(pair, row))) > 1e5


def test_all_spellings_of_one_distribution_are_at_no_distance():
    one, rate = torch.ones(1, dtype=F64), torch.full((1,), 4.0, dtype=F64)
    same = (stablekl.Exponential(rate), stablekl.Gamma(one, rate), stablekl.Weibull(1 / rate, one))
    for p in same:
        for q in same:
            assert stablekl.kl_divergence(p, q) == 0


# ---- by sums over fixed points ------------------------------------------------------------------------------------


def snedecor(a, b, c, d, bits=240):
    """KL(F(a, b) || F(c, d)), from the expectation of a logarithm by mpmath's quadrature on the axis of log(a x/b)."""
    with mp.workprec(bits):
        a, b, c, d = (mp.mpf(x) / 2 for x in (a, b, c, d))
        n, shift = a + b, mp.log(c * b / a / d)

        def log_beta(x, y):
            return mp.loggamma(x) + mp.loggamma(y) - mp.loggamma(x + y)

        def more(t):
            # log(1 + e^(y + shift)) - log(1 + e^y) where y is the logit of a Beta(a, b) variable
            y = mp.log(a / b) + mp.sqrt(1 / a + 1 / b) * mp.sinh(t)
            density = mp.exp(-a * mp.log1p(mp.exp(-y)) - b * mp.log1p(mp.exp(y)) - log_beta(a, b))
            return density * mp.cosh(t) * mp.log1p(mp.expm1(shift) / (1 + mp.exp(-y)))

        mean = mp.fsum(more(mp.mpf(j) / 40) for j in range(-400, 401)) / 40 * mp.sqrt(1 / a + 1 / b)
        psi_a, psi_b, psi_n = mp.psi(0, a), mp.psi(0, b), mp.psi(0, n)
        own = a * (psi_a - psi_n) + b * (psi_b - psi_n) - log_beta(a, b)
        return own + log_beta(c, d) - c * (psi_a - psi_b + shift) + (c + d) * (mean + psi_n - psi_b)


F_CASES = [
    *((3.0, 5.0, 4.0, 5.0), (3.0, 5.0, 3.0, 5.0 * UP), (32.0, 7.5, 32.0, 8.5), (0.5, 900.0, 0.5, 900.125)),
    *((900.0, 0.5, 900.125, 0.5 + 2.0**-20), (1e6, 3e6, 1e6 + 1, 3e6), (0.5, 0.25, 40.0, 70.0)),
]


def snedecors(*values):
    return stablekl.kl_divergence(
        *(stablekl.FisherSnedecor(*pair, validate_args=False) for pair in (values[:2], values[2:]))
    )


def test_fisher_snedecor():
    found = snedecors(*(torch.tensor(x, dtype=F64) for x in zip(*F_CASES, strict=True)))
    for row, value in zip(F_CASES, found.tolist(), strict=True):
        assert ulps(value, snedecor(*row)) <= 64, (row, value)
    row = (3.0, 5.0, 3.0, 5.0 * UP)
    assert ulps(float(snedecor(*row, bits=53)), snedecor(*row)) > 1e5  # the must-fail twin


def test_fisher_snedecor_derivatives():
    rows = [torch.tensor(x, dtype=F64, requires_grad=True) for x in ((3.0, 0.5), (5.0, 9.0), (4.0, 0.5), (5.0, 9.0))]
    value = snedecors(*rows)
    assert value[1] == 0
    assert all((g[1] == 0).all() for g in torch.autograd.grad(value.sum(), rows))
    assert torch.autograd.gradcheck(snedecors, rows)
    assert torch.autograd.gradgradcheck(snedecors, rows)
    by_row = torch.stack(
        [torch.autograd.functional.jacobian(lambda *x: snedecors(*x), r)[0] for r in zip(*rows, strict=True)]
    )
    every = torch.func.vmap(torch.func.jacrev(lambda a, b, c, d: snedecors(a, b, c, d)))(*(x.detach() for x in rows))
    torch.testing.assert_close(every, by_row)
    assert snedecors(rows[0][:1], rows[1], torch.ones(3, 1), torch.ones(3, 1)).shape == (3, 2)


def test_fisher_snedecor_in_low_precision_is_rounded_once():
    rows = [torch.tensor(x, dtype=torch.bfloat16) for x in ((3.0, 0.5), (5.0, 9.0), (4.0, 0.75), (5.0, 10.0))]
    assert torch.equal(snedecors(*rows), snedecors(*(x.double() for x in rows)).bfloat16())


def kumaraswamy(a, b, c, d):
    """KL of Kumaraswamy distributions by mpmath: the trapezoidal rule in asinh of log(-a log x)."""
    with mp.workprec(240):
        a, b, c, d = (mp.mpf(x) for x in (a, b, c, d))

        def fall(tau):
            return mp.log(-mp.expm1(-tau))

        weight = total = mp.mpf(0)
        for j in range(-1500, 1501):
            t = mp.mpf(j) / 70
            y = mp.log1p(mp.log1p(b)) + mp.sinh(t)
            if y > 12:
                break
            tau = mp.exp(y)
            mass = mp.exp(b * fall(tau) - tau + y - fall(tau)) * mp.cosh(t)
            weight, total = weight + mass, total + mass * (fall(c / a * tau) - fall(tau))
        mean_tau = mp.psi(0, b + 1) + mp.euler
        return mp.log(a * b / c / d) + (c / a - 1) * mean_tau - (b - d) / b - (d - 1) * total / weight


K_CASES = [
    *((5.2e-3, 1.3e-4, 9.6e-3, 1.6e-4), (5.2e-3, 1.3e-5, 5.3e-3, 1.3e-5), (1.0, 1e-5, 1e3, 1e-5)),
    *((2.0, 3.0, 2.1, 3.2), (0.5, 20.0, 0.5001, 20.0), (1.0, 300.0, 2.0, 1e-3)),
]


def test_kumaraswamy_of_small_concentrations():
    p, q = ([torch.tensor([row[i] for row in K_CASES], dtype=F64) for i in pair] for pair in ((0, 1), (2, 3)))
    found = distributions.kl_divergence(stablekl.Kumaraswamy(*p), stablekl.Kumaraswamy(*q))
    for row, value in zip(K_CASES, found.tolist(), strict=True):
        assert ulps(value, kumaraswamy(*row)) <= 16, (row, value)


@pytest.mark.parametrize("divergence_of", [distributions.kl_divergence, stablekl.kl_divergence])
def test_relaxed_categories_say_why_they_have_no_rule(divergence_of):
    one, logits = torch.tensor(1.0), torch.tensor([0.1, 0.2, 0.3])
    for family, plain in (
        (distributions.RelaxedBernoulli, "Bernoulli"),
        (distributions.relaxed_bernoulli.LogitRelaxedBernoulli, "Bernoulli"),
        (distributions.RelaxedOneHotCategorical, "OneHotCategorical"),
    ):
        p = family(one, logits=logits)
        with pytest.raises(NotImplementedError, match=rf"{family.__name__} .* without a closed form.* {plain}\("):
            divergence_of(p, p)
