"""Numbers with an exponent of their own: against floats of any range, and without an exponent where none is needed."""

from __future__ import annotations

import math

import pytest
import torch

import stablekl
from stablekl import _scaled, _wide
from stablekl._scaled import NONE, has_none, scaled

F64 = torch.float64


def spread(decades, count=200, seed=0):
    u = torch.rand(4, count, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return 10 ** (decades * (2 * u - 1))


@pytest.fixture
def with_exponents(monkeypatch):
    """Every number with its exponent, whether it needs one or not."""

    def switch():
        for module in (_scaled, _wide):
            monkeypatch.setattr(module, "needs_none", lambda x: False)

    return switch


def test_who_needs_an_exponent():
    assert has_none(scaled(torch.tensor([0.0, 1e-29, 1e29, -3.0], dtype=F64)).exponent)
    for x in (1e-31, 1e31, math.inf, math.nan, 5e-324):
        assert not has_none(scaled(torch.tensor([1.0, x], dtype=F64)).exponent)
    leaf = torch.ones(2, dtype=F64, requires_grad=True)
    assert not has_none(scaled(leaf).exponent)
    assert all(k == 0 for k in NONE.values())


def test_arithmetic_of_either_kind():
    x, y, z, w = spread(290)
    product = (scaled(x) * scaled(y)) / (scaled(z) * scaled(w))
    assert not has_none(product.exponent)
    expected = sum(sign * torch.log(v) for sign, v in ((1, x), (1, y), (-1, z), (-1, w)))
    torch.testing.assert_close(product.log(), expected, rtol=1e-14, atol=1e-12)
    near = torch.full_like(x, 3.0)
    for a, b in ((scaled(x), scaled(near)), (scaled(near), scaled(x)), (scaled(near), scaled(near))):
        torch.testing.assert_close((a + b).rounded(), a.rounded() + b.rounded(), rtol=1e-15, atol=0)
        torch.testing.assert_close((a * b / b).rounded(), a.rounded(), rtol=1e-15, atol=0)


PAIRS = [
    (stablekl.Gamma, stablekl.Gamma),
    (stablekl.Gumbel, stablekl.Gumbel),
    (stablekl.Weibull, stablekl.Weibull),
    (stablekl.Beta, stablekl.Beta),
    (stablekl.Gamma, stablekl.Gumbel),
    (stablekl.Gamma, stablekl.Normal),
    (stablekl.Beta, stablekl.Gamma),
    (stablekl.LogNormal, stablekl.Gamma),
    (stablekl.Gamma, stablekl.Weibull),
]


@pytest.mark.parametrize(("p", "q"), PAIRS)
@pytest.mark.parametrize("decades", [0.5, 4])
def test_exponents_change_nothing_where_none_is_needed(p, q, decades, with_exponents):
    leaves = [x.clone().requires_grad_() for x in spread(decades)]

    def evaluated():
        value = stablekl.kl_divergence(p(*leaves[:2]), q(*leaves[2:]))
        finite = value.isfinite() & (value < 1e200)
        return value[finite], torch.autograd.grad(value[finite].sum(), leaves)

    value, gradient = evaluated()
    with_exponents()
    other, other_gradient = evaluated()
    assert len(value) > 20
    torch.testing.assert_close(value, other, rtol=1e-14, atol=0)
    for a, b in zip(gradient, other_gradient, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0)


@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_an_extreme_row_changes_no_bit_of_the_others(p, q):
    x = spread(4)
    extreme = torch.cat([x, torch.full((4, 1), 1e-60, dtype=F64)], 1)
    rows = stablekl.kl_divergence(p(*x[:2]), q(*x[2:]))
    others = stablekl.kl_divergence(p(*extreme[:2]), q(*extreme[2:]))[:-1]
    assert torch.equal(rows, others)
