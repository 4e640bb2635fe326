"""KL of a Kumaraswamy distribution against a Beta."""

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
P, Q = FAMILIES["Kumaraswamy"], FAMILIES["Beta"]
# ordinary ones; next to being the same; extreme and near each other; narrow; far
CASES = [
    *((2.0, 3.0, 2.0, 3.0), (0.3, 7.0, 2.0, 0.1), (1e3, 20.0, 300.0, 5.0)),
    *((1.0, 3.0, 1.0, 3.0 + 2.0**-30), (1.000000001, 3.0, 1.0, 3.0), (1.000001, 1e6, 1.0, 1e6)),
    *((5.0, 1.0, 5.0, 1.000000000001), (5.0, 1.0, 5.0000000005, 1.0), (1.0, 1e-3, 1.0, 1.1e-3)),
    *((1e6, 1e12, 2.8e7, 784.0), (1e-4, 1.5, 1e-4, 1e4), (2.0, 1e-6, 3.0, 1e-6)),
    *((2.0, 3.0, 1e12, 1e12), (30.0, 1e9, 1e4, 2e3), (1.5e-11, 18.0, 6.8e9, 6e4), (2e10, 8e-9, 5e7, 4e6)),
]


def rule(a, b, c, d):
    return stablekl.kl_divergence(
        stablekl.Kumaraswamy(a, b, validate_args=False), stablekl.Beta(c, d, validate_args=False)
    )


def columns(rows=CASES, dtype=F64):
    return [torch.tensor(column, dtype=dtype) for column in zip(*rows, strict=True)]


def halves(row):
    values = tuple(exact(torch.tensor(x, dtype=F64)) for x in row)
    return P, values[:2], Q, values[2:]


def test_values():
    found = rule(*columns())
    for value, row in zip(found.tolist(), CASES, strict=True):
        assert ulp_error(value, divergence(*halves(row)), F64) <= 32, (row, value)


def test_reference_is_the_definition():
    a, b, c, d = (mpf(x) for x in CASES[0])

    def term(x):
        log_p = mp.log(a * b) + (a - 1) * mp.log(x) + (b - 1) * mp.log1p(-(x**a))
        log_q = (c - 1) * mp.log(x) + (d - 1) * mp.log1p(-x) - mp.log(mp.beta(c, d))
        return mp.exp(log_p) * (log_p - log_q)

    with mp.workdps(25):
        value = mp.quad(term, [0, 0.1, 0.5, 0.9, 1])
        assert abs(value - mpf(str(divergence(*halves(CASES[0]))))) < mpf(10) ** -14


def test_textbook_form_fails():
    row = CASES[3]
    with mp.workprec(53):
        plain = kl(*halves(row))
    assert ulp_error(float(plain), divergence(*halves(row)), F64) > 1e5


def test_the_same_distribution():
    inputs = [x.requires_grad_() for x in columns([(1.0, 3.0, 1.0, 3.0), (5.0, 1.0, 5.0, 1.0), (1.0, 1e-3, 1.0, 1e-3)])]
    value = rule(*inputs)
    assert (value == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(value.sum(), inputs))


def test_derivatives():
    rows = [(2.0, 3.0, 1.5, 2.2), (0.7, 1.2, 3.0, 0.4), (1.0, 2.0, 1e5, 1e5), (1.0, 2.5, 1.0, 2.5)]
    inputs = [x.requires_grad_() for x in columns(rows)]
    assert torch.autograd.gradcheck(rule, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(rule, inputs)
    every = [x.requires_grad_() for x in columns()]
    assert all(g.isfinite().all() for g in torch.autograd.grad(rule(*every).sum(), every))


def test_shapes_and_transforms():
    wide = [0.5 + torch.rand(2, 3, dtype=F64, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    found = rule(wide[0][0], wide[1][0], wide[2], wide[3])
    assert found.shape == (2, 3)
    torch.testing.assert_close(found[1], rule(wide[0][0], wide[1][0], wide[2][1], wide[3][1]), rtol=1e-13, atol=0)
    rows = torch.stack([x.reshape(-1) for x in wide], -1)
    by_row = torch.stack([torch.autograd.functional.jacobian(lambda row: rule(*row), row) for row in rows])
    torch.testing.assert_close(torch.func.vmap(torch.func.jacrev(lambda row: rule(*row)))(rows), by_row)
    p, q = distributions.Kumaraswamy(wide[0], wide[1]), distributions.Beta(wide[2], wide[3])
    assert torch.equal(distributions.kl_divergence(p, q), rule(*wide))
    assert stablekl.kl_divergence(p.expand((4, 2, 3)), q).shape == (4, 2, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_rounded_once(dtype):
    narrow = [x.to(dtype) for x in columns([(2.0, 3.0, 2.0, 3.0), (0.5, 7.0, 2.0, 0.125)])]
    assert torch.equal(rule(*narrow), rule(*(x.double() for x in narrow)).to(dtype))


def test_compiles():
    torch._dynamo.reset()
    inputs = columns(CASES[:4])
    compiled = torch.compile(rule, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), rule(*inputs), rtol=1e-12, atol=0)
    assert not math.isnan(float(compiled(*inputs).sum()))
