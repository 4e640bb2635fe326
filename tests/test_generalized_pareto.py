"""Generalized Pareto distributions: densities, tails, and the KL divergence by the ratio of hazards."""

from __future__ import annotations

import math

import pytest
import torch
from mpmath import mp, mpf
from torch import distributions

import stablekl
from stablekl.precision.metrics import ulp_error
from stablekl.precision.references import FAMILIES
from stablekl.precision.references.context import exact
from stablekl.precision.references.family import divergence, kl

F64 = torch.float64
FAMILY = FAMILIES["GeneralizedPareto"]
UP = 1 + 2.0**-52

# loc, scale, concentration of p, then of q
CASES = [
    *((1.0, 2.0, 0.5, 0.5, 1.0, 0.7), (1.0, 1.0, 0.0, 0.5, 1.0, 0.3), (1.0, 1.0, -0.5, 0.5, 1.5, 0.3)),
    *((1.0, 1.0, -0.5, 0.5, 2.5, -1.0), (0.0, 1.0, -2.0, 0.0, 0.7, -1.3), (0.5, 1.0, -1.0, 0.25, 2.0, -1.0)),
    *((0.0, 1.0, 0.3, 0.0, UP, 0.3), (0.0, 1.0, 0.3, 0.0, 1.0, 0.3 * UP), (UP, 1.0, 0.3, 1.0, 1.0, 0.3)),
    *((0.0, 1.0, -0.8, 0.0, UP, -0.8), (0.0, 1.0, -8.0, 0.0, UP, -8.0), (0.0, 1.0, -0.4, 0.0, UP, -0.4)),
    *((0.0, 1.0, 1e-12, 0.0, 1.0, 1e-15), (0.0, 1.0, 0.0, 0.0, 1.0, 1e-12), (0.0, 1.0, 1e-5, 0.0, 1.0, 0.0)),
    *((0.0, 1.0, -1e-9, 0.0, 1.0, 1e-9), (0.0, 1.0, 2.0, 0.0, 1.0, 1e-100), (0.0, 1.0, 0.999, 0.0, 1.0, 0.0)),
    *((0.0, 1.0, 1e12, 0.0, 2.0, 1e12), (0.0, 1.0, 1e12, 0.0, 1.0, 1.0000000001e12), (0.0, 1.0, 1e12, 0.0, 1.0, 1.0)),
    *((0.0, 1.0, -1e12, 0.0, 1e3, -1e3), (0.0, 1e-12, 0.5, -1e12, 1.0, 0.5), (0.0, 1e12, 0.1, 0.0, 1e-12, 0.2)),
    *((-0.625, 2.0**-30, -3.0, -0.625, 2.0**-30 * UP, -3.0), (0.0, 2.0, -3.0, 0.0, 4.0, -6.0)),
]  # fmt: skip


def built(values, module=stablekl):
    half = len(values) // 2
    return [module.GeneralizedPareto(*v, validate_args=False) for v in (values[:half], values[half:])]


def rule(*values):
    return stablekl.kl_divergence(*built(values))


def columns(rows=CASES, dtype=F64):
    return [torch.tensor(column, dtype=dtype) for column in zip(*rows, strict=True)]


def truth(row):
    values = tuple(mp.mpf(x) for x in row)
    return divergence(FAMILY, exact_row(values[:3]), FAMILY, exact_row(values[3:]))


def exact_row(values):
    return tuple(exact(torch.tensor(float(x), dtype=F64)) for x in values)


def test_values():
    found = rule(*columns())
    for value, row in zip(found.tolist(), CASES, strict=True):
        assert ulp_error(value, truth(row), F64) <= 16, (row, value)


def test_values_in_float32_are_rounded_once():
    rows = [row for row in CASES if max(abs(x) for x in row) < 1e6]
    found = rule(*columns(rows, torch.float32))
    wide = rule(*(x.double() for x in columns(rows, torch.float32)))
    assert torch.equal(found, wide.float())


def test_textbook_form_fails():
    """The same expectations, added in float64."""
    row = CASES[6]
    with mp.workprec(53):
        plain = kl(FAMILY, exact_row(row[:3]), FAMILY, exact_row(row[3:]))
    assert ulp_error(float(plain), truth(row), F64) > 1e5


@pytest.mark.parametrize("row", [CASES[i] for i in (0, 1, 2, 3, 4, 5)])
def test_reference_is_the_definition(row):
    """By quadrature of p log(p/q) in -log of p's survival function."""
    with mp.workdps(30):
        m, s, xi, n, t, eta = (mpf(x) for x in row)

        def term(e):
            x = m + s * (mp.expm1(xi * e) / xi if xi else e)
            w = mp.log1p(eta * (x - n) / t) / eta if eta else (x - n) / t
            return mp.exp(-e) * (mp.log(t / s) - (1 + xi) * e + (1 + eta) * w)

        value = mp.quad(term, [0, 0.1, 1, 2, 4, 8, 16, 32, 80])
        assert abs(value - mpf(str(truth(row)))) < mpf(10) ** -14


def test_infinite_exactly_where_the_support_is_left():
    inf, third = math.inf, 1 / 3
    rows = [
        ((0.0, 1.0, 0.5, 1e-300, 1.0, 0.5), True),  # begins below
        ((0.0, 1.0, 0.5, 0.0, 1.0, -1e-9), True),  # does not end
        ((0.0, 1.0, 0.0, 0.0, 1.0, -1e-300), True),
        ((0.0, 1.0, -1.0, 0.0, 1.0, -UP), True),  # ends an ulp later
        ((0.0, 1.0, -1.0, 0.0, 1.0, -1 / UP), False),
        ((0.0, third, -third, 0.0, 2 * third, -2 * third), False),  # the same end
        ((0.25, third, -third, 0.125, 2 * third + 0.125 * 2 * third, -2 * third), False),
        ((0.0, 1.0, 1.0, 0.0, 1.0, 0.0), True),  # no mean
        ((0.0, 1.0, 1e6, 0.0, 1.0, 1e-300), False),
        ((0.0, 1.0, 1.0, 0.0, 1.0, 5e-13), False),
    ]
    value = rule(*columns([row for row, _ in rows]))
    for found, (row, infinite) in zip(value.tolist(), rows, strict=True):
        assert (found == inf) == infinite, row
        assert found == inf or ulp_error(found, truth(row), F64) <= 64, (row, found)


def test_equal_is_exactly_zero():
    xi = torch.tensor([0.0, 0.3, -0.3, -1.0, -7.0, 1e12, -1e12, 1e-300], dtype=F64)
    p, q = ([torch.full_like(xi, v).requires_grad_() for v in (0.7, 3.0)] + [xi.clone().requires_grad_()] for _ in "pq")
    value = rule(*p, *q)
    assert (value == 0).all()
    by_loc, *others = torch.autograd.grad(value.sum(), [*p, *q])
    del others[2]  # q's location: at an end of its range, as p's is
    assert all((g == 0).all() for g in others)
    torch.testing.assert_close(by_loc, torch.full_like(xi, 1 / 3))


def test_derivatives():
    rows = [
        *((1.0, 2.0, 0.5, 0.5, 1.0, 0.7), (2.0, 1.0, -0.4, 0.5, 3.0, 0.2), (0.5, 1.5, 1.5, 0.3, 1.5, 0.6)),
        *((0.3, 1.0, -1.3, 0.1, 3.0, -0.9), (0.1, 1.0, 0.1, 0.0, 1.2, 0.3), (0.1, 1.0, 3e-13, 0.0, 1.2, 2e-3)),
    ]
    inputs = [x.requires_grad_() for x in columns(rows)]
    assert torch.autograd.gradcheck(rule, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(rule, inputs)


def test_gradients_against_the_reference():
    inputs = [x.requires_grad_() for x in columns(CASES[:1] + CASES[2:3])]
    found = torch.autograd.grad(rule(*inputs).sum(), inputs)
    for i, row in enumerate(CASES[:1] + CASES[2:3]):
        for j, g in enumerate(found):
            with mp.workprec(300):
                h = mpf(2) ** -100
                up, down = (
                    mpf(str(kl_at([mpf(x) + sign * h * (k == j) for k, x in enumerate(row)]))) for sign in (1, -1)
                )
                expected = float((up - down) / (2 * h))
            assert g[i].item() == pytest.approx(expected, rel=1e-13)


def kl_at(values):
    """The formula of the reference in mpmath's own context, for xi > 0 or < 0 and another concentration above 0."""
    m, s, xi, n, t, eta = values
    size = (t + eta * (m - n)) / s
    ratio = eta / (xi * size)
    c, w, scale = (1 + 1 / xi, 1 - ratio, size) if xi > 0 else (2 - 1 / xi, ratio, size * (1 - xi))
    exponent = mp.log(size * s / t) / eta + mp.hyp2f1(1, 1, c, w) / scale
    return mp.nstr(mp.log(t / s) - 1 - xi + (1 + eta) * exponent, 80)


def test_gradient_where_q_is_exponential():
    rows = [(0.0, 1.0, 0.3, 0.0, 1.3, 0.0), (0.0, 1.0, 0.2, 0.0, 1.3, 0.0), (0.0, 1.0, 0.6, 0.0, 1.3, 0.0)]
    inputs = [x.requires_grad_() for x in columns(rows)]
    found = torch.autograd.grad(rule(*inputs).sum(), inputs)
    later = columns(rows)
    later[5] = later[5] + 1e-8
    slope = (rule(*later) - rule(*columns(rows))) / 1e-8
    torch.testing.assert_close(found[5][:2], slope[:2], rtol=1e-4, atol=0)
    assert found[5][2] == -math.inf
    assert all(g.isfinite().all() for g in found[:5])


def test_shapes_and_transforms():
    wide = [0.5 + torch.rand(2, 3, dtype=F64, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    wide[0] = wide[0] + 1.5
    mixed = [*(x[0] for x in wide[:3]), *wide[3:]]
    found = rule(*mixed)
    assert found.shape == (2, 3)
    torch.testing.assert_close(found[1], rule(*(x[0] for x in wide[:3]), *(x[1] for x in wide[3:])), rtol=1e-14, atol=0)
    rows = torch.stack([x.reshape(-1) for x in wide], -1)
    by_row = torch.stack([torch.autograd.functional.jacobian(lambda row: rule(*row), row) for row in rows])
    torch.testing.assert_close(torch.func.vmap(torch.func.jacrev(lambda row: rule(*row)))(rows), by_row)
    p, q = built([x[0] for x in wide])
    large = p.expand((2, 3))
    assert isinstance(large, stablekl.GeneralizedPareto)
    torch.testing.assert_close(stablekl.kl_divergence(large, q), stablekl.kl_divergence(p, q).expand(2, 3))
    torchs = distributions.kl_divergence(*built([x[0] for x in wide], distributions))
    assert torch.equal(torchs, stablekl.kl_divergence(p, q))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    narrow = [
        torch.tensor(x, dtype=dtype) for x in ((1.0, 2.0), (2.0, 1.0), (0.5, -0.4), (0.5, 0.5), (1.0, 3.0), (0.7, 0.2))
    ]
    assert torch.equal(rule(*narrow), rule(*(x.double() for x in narrow)).to(dtype))


def test_compiles():
    torch._dynamo.reset()
    inputs = columns(CASES[:4])
    compiled = torch.compile(rule, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), rule(*inputs), rtol=1e-13, atol=0)


# ---- densities and tails ------------------------------------------------------------------------------------------

POINTS = [
    *((0.0, 1.0, 1e-12, 3.0), (0.0, 1.0, -1e-9, 70.0), (0.0, 2.0, 0.0, 5.0), (1.0, 1e-3, 4.0, 1e9)),
    *((0.0, 1.0, -0.3, 3.33333), (0.7, 3.0, -7.0, 1.128), (1e8, 1.0, 0.2, 1e8 + 8), (0.0, 1.0, 30.0, 1e-20)),
]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("row", POINTS)
def test_density_and_tails(row, dtype):
    *theta, x = (torch.tensor(v, dtype=dtype) for v in row)
    d = stablekl.GeneralizedPareto(*theta, validate_args=False)
    m, s, xi, y = (mpf(v.item()) for v in (*theta, x))
    with mp.workdps(60):
        e = mp.log1p(xi * (y - m) / s) / xi if xi else (y - m) / s
        truths = (-mp.log(s) - (1 + xi) * e, -mp.expm1(-e), mp.exp(-e), mp.log(-mp.expm1(-e)), -e)
        found = (d.log_prob(x), d.cdf(x), d.sf(x), d.log_cdf(x), d.log_sf(x))
        for f, expected in zip(found, truths, strict=True):
            assert f.dtype == dtype
            assert abs(mpf(f.item()) - expected) <= 4 * torch.finfo(dtype).eps * max(1, abs(expected)), (row, f)
        for i in (1, 2):  # to their relative accuracy, but for that of the exponent
            assert abs(mpf(found[i].item()) / truths[i] - 1) <= 4 * torch.finfo(dtype).eps * (1 + e)


def test_torch_loses_small_concentrations():
    """The must-fail twin: torch takes what is within 1e-8 of 0 for 0."""
    x, xi = torch.tensor(1e4), torch.tensor(-9e-9)
    ours, torchs = (
        m.GeneralizedPareto(0.0, 1.0, xi, validate_args=False).log_prob(x) for m in (stablekl, distributions)
    )
    assert float(ours) == pytest.approx(math.log1p(-9e-5) * (1 / 9e-9 - 1), rel=1e-7)
    assert abs(float(torchs - ours)) > 0.4


def test_ends_and_beyond():
    d = stablekl.GeneralizedPareto(
        torch.zeros(4, dtype=F64), 1.0, torch.tensor([-2.0, -1.0, -0.5, 0.5], dtype=F64), validate_args=False
    )
    inf = math.inf
    at = {0.5: (inf, 0.0, -0.28768, -0.66943), 1.0: (-inf, 0.0, -math.log(2), -3 * math.log(1.5)), -1.0: (-inf,) * 4}
    for x, expected in at.items():
        torch.testing.assert_close(d.log_prob(torch.tensor(x)), torch.tensor(expected, dtype=F64), rtol=1e-4, atol=0)
    assert (d.log_prob(torch.tensor(inf)) == -inf).all()
    assert (d.cdf(torch.tensor(inf)) == 1).all()
    assert (d.cdf(torch.tensor(-1.0)) == 0).all()
    assert d.icdf(torch.tensor(1.0)).tolist() == [0.5, 1.0, 2.0, inf]
    assert d.icdf(torch.tensor(0.0)).tolist() == [0.0] * 4
    torch.testing.assert_close(d.entropy(), 1 + d.concentration)


def test_quantiles_and_samples():
    u = torch.tensor([1e-20, 1e-3, 0.5, 1 - 1e-6], dtype=F64)
    for xi in (0.0, 1e-12, -1e-5, 0.3, -2.0, 5.0):
        d = stablekl.GeneralizedPareto(torch.tensor(0.0, dtype=F64), 2.0, xi)
        torch.testing.assert_close(d.cdf(d.icdf(u)), u, rtol=1e-9, atol=0)
    torch.manual_seed(0)
    d = stablekl.GeneralizedPareto(torch.tensor([0.0, 1.0]), 2.0, torch.tensor([0.2, -0.4]))
    sample = d.rsample((20000,))
    assert sample.dtype == torch.float32
    torch.testing.assert_close(sample.mean(0), d.mean, rtol=0.03, atol=0)


def test_derivatives_of_densities():
    theta = [torch.tensor(v, dtype=F64, requires_grad=True) for v in ([1.0, 0.2, 0.0, 0.3], [2.0, 3.0, 1.5, 1.0])]
    theta.append(torch.tensor([0.5, -0.3, 0.0, -0.3], dtype=F64, requires_grad=True))
    x = torch.tensor(1.7, dtype=F64)
    for name, at in (("log_prob", x), ("cdf", x), ("log_sf", x), ("log_cdf", x), ("icdf", x - 1.4)):

        def f(*values, name=name, at=at):
            return getattr(stablekl.GeneralizedPareto(*values, validate_args=False), name)(at)

        assert torch.autograd.gradcheck(f, theta)
        assert torch.autograd.gradgradcheck(f, theta)


def test_errors_say_where():
    with pytest.raises(ValueError, match="scale"):
        stablekl.GeneralizedPareto(0.0, torch.tensor([1.0, -1.0]), 0.5)
    with pytest.raises(ValueError, match="support"):
        stablekl.GeneralizedPareto(torch.tensor(0.0), 1.0, 0.5).log_prob(torch.tensor(-1.0))
