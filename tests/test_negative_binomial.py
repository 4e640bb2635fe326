"""KL divergences of negative binomial distributions of different counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, distributions

import stablekl
from stablekl.precision.references import FAMILIES
from stablekl.precision.references.context import exact, mp
from stablekl.precision.references.family import divergence

EPS, F64 = 2.0**-52, torch.float64
FAMILY = FAMILIES["NegativeBinomial"]
UP = 1 + 2.0**-52
# Count and probability of p, then of q.
CASES = [
    (2.5, 0.3, 4.0, 0.2),
    (2.5, 0.3, 2.5 * UP, 0.3),
    (2.5, 0.3, 2.5 * UP, 0.3 - 2.0**-54),
    (30.0, 0.5, 29.999999, 0.5000000166666669),  # of the same mean
    (1e-9, 1e-3, 1e-12, 0.7),
    (1e-12, 1 - 1e-9, 1e12, 1e-12),
    (1e12, 1e-12, 1e-12, 0.5),
    (1e8, 1 - 1e-6, 1.1e8, 1 - 1e-6),
    (3.0, 1e-12, 3.0000001, 1e-12),
]


def ours(r: Tensor, p: Tensor, s: Tensor, q: Tensor, name: str = "probs") -> Tensor:
    made = (stablekl.NegativeBinomial(n, **{name: x}, validate_args=False) for n, x in ((r, p), (s, q)))
    return stablekl.kl_divergence(*made)


def columns(rows: list[tuple[float, ...]], dtype: torch.dtype = F64) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(x, dtype=F64).to(dtype) for x in zip(*rows, strict=True))


def by_counting(r, p, s, q):
    """The definition, term by term."""
    total, mass, k = mp.mpf(0), (1 - p) ** r, 0
    while k < 400:
        ratio = mp.loggamma(k + r) - mp.loggamma(r) - mp.loggamma(k + s) + mp.loggamma(s)
        total += mass * (ratio + r * mp.log(1 - p) - s * mp.log(1 - q) + k * mp.log(p / q))
        mass *= (k + r) / (k + 1) * p
        k += 1
    return total


def test_the_reference_is_the_definition():
    with mp.workprec(200):
        row = [mp.mpf(x) for x in (2.5, 0.3, 4.0, 0.2)]
        truth = by_counting(*row)
        assert abs(divergence(FAMILY, tuple(row[:2]), FAMILY, tuple(row[2:])) / truth - 1) < mp.mpf(2) ** -80


def test_accuracy():
    found = ours(*columns(CASES))
    worst = 0.0
    for row, value in zip(CASES, found, strict=True):
        r, p, s, q = (mp.mpf(x) for x in row)
        truth = divergence(FAMILY, (r, p), FAMILY, (s, q))
        assert abs(mp.mpf(float(value)) / truth - 1) < 16 * EPS, row
        with mp.workprec(53):  # the must-fail twin, with an exact expectation of log Gamma
            if 1e-3 < p < 0.9 and r < 100:
                worst = max(worst, float(abs(by_counting(r, p, s, q) / truth - 1)))
    assert worst > 1


def test_logits_are_those_probabilities():
    logits = torch.tensor([-1.0, 30.0], dtype=F64)
    r, s = torch.tensor([0.3, 5.0], dtype=F64), torch.tensor([0.3 * UP, 0.5], dtype=F64)
    other = logits - torch.tensor([1e-9, 2.0], dtype=F64)
    found = ours(r, logits, s, other, "logits")
    mixed = stablekl.kl_divergence(
        stablekl.NegativeBinomial(r, torch.sigmoid(logits), validate_args=False),
        stablekl.NegativeBinomial(s, logits=other),
    )
    for i in range(2):
        with mp.workprec(300):
            x, y = (1 / (1 + mp.exp(-exact(v[i]))) for v in (logits, other))
            truth = divergence(FAMILY, (exact(r[i]), x), FAMILY, (exact(s[i]), y))
            rounded = divergence(FAMILY, (exact(r[i]), exact(torch.sigmoid(logits)[i])), FAMILY, (exact(s[i]), y))
        assert abs(mp.mpf(float(found[i])) / truth - 1) < 16 * EPS
        assert abs(mp.mpf(float(mixed[i])) / rounded - 1) < 16 * EPS


def test_edges():
    inf, log2 = math.inf, math.log(2)
    rows = [
        (3.0, 0.0, 2.0, 0.5, 2 * log2),  # no success under p
        (0.0, 0.5, 2.0, 0.5, 2 * log2),
        (0.0, 0.5, 0.0, 0.2, 0.0),
        (3.0, 0.0, 0.0, 0.5, 0.0),
        (3.0, 0.5, 0.0, 0.5, inf),  # no success under q
        (3.0, 0.5, 2.0, 0.0, inf),
        (3.0, 0.0, 2.0, 0.0, 0.0),
    ]
    *inputs, expected = columns(rows)
    torch.testing.assert_close(ours(*inputs), expected, rtol=4 * EPS, atol=0)
    leaves = [x.clone().requires_grad_() for x in inputs]
    gradients = torch.autograd.grad(ours(*leaves).sum(), leaves)
    assert not any(g.isnan().any() for g in gradients)
    by_logits = ours(inputs[0], torch.logit(inputs[1]), inputs[2], torch.logit(inputs[3]), "logits")
    torch.testing.assert_close(by_logits, expected, rtol=4 * EPS, atol=0)


def test_equal_is_zero_with_zero_gradient():
    r, p = torch.tensor([3.0, 1e-9, 1e12], dtype=F64), torch.tensor([0.3, 0.9, 1e-9], dtype=F64)
    for name, x in (("probs", p), ("logits", torch.logit(p))):
        leaves = [v.clone().requires_grad_() for v in (r, x, r, x)]
        value = ours(*leaves, name)
        assert (value == 0).all()
        assert all((g == 0).all() for g in torch.autograd.grad(value.sum(), leaves))


def test_gradient_by_differences_of_many_digits():
    rows = [CASES[0]]
    leaves = [x.requires_grad_() for x in columns(rows)]
    gradients = torch.autograd.grad(ours(*leaves).sum(), leaves)
    for i, row in enumerate(rows):
        for j in range(4):
            with mp.workprec(300):
                theta = [mp.mpf(x) for x in row]
                h = theta[j] * mp.mpf(2) ** -60
                up, down = ([x + (h * sign if k == j else 0) for k, x in enumerate(theta)] for sign in (1, -1))
                difference = (
                    divergence(FAMILY, tuple(up[:2]), FAMILY, tuple(up[2:]))
                    - divergence(FAMILY, tuple(down[:2]), FAMILY, tuple(down[2:]))
                ) / (2 * h)
            torch.testing.assert_close(float(gradients[j][i]), float(difference), rtol=1e-12, atol=0)


def test_derivatives_twice():
    rows = [(3.0, 0.3, 3.0, 0.3), (2.0, 0.9, 2.5, 0.1), (0.7, 0.5, 20.0, 0.4), (5.0, 0.2, 0.3, 0.6)]
    leaves = tuple(x.requires_grad_() for x in columns(rows))
    assert torch.autograd.gradcheck(ours, leaves)
    assert torch.autograd.gradgradcheck(ours, leaves)
    logits = (leaves[0], torch.logit(leaves[1]).detach().requires_grad_(), leaves[2], leaves[3])

    def mixed(r: Tensor, x: Tensor, s: Tensor, q: Tensor) -> Tensor:
        p = stablekl.NegativeBinomial(r, logits=x, validate_args=False)
        return stablekl.kl_divergence(p, stablekl.NegativeBinomial(s, q, validate_args=False))

    assert torch.autograd.gradcheck(mixed, logits)
    assert torch.autograd.gradgradcheck(mixed, logits)


def test_shapes_and_transforms():
    r, p, s, q = columns(CASES[:3])
    wide = s * torch.tensor([[1.0], [2.0]], dtype=F64)
    value = ours(r, p, wide, q)
    assert value.shape == (2, 3)
    assert torch.equal(value[1], ours(r, p, wide[1], q))
    expanded = stablekl.NegativeBinomial(r, p).expand((2, 3))
    assert torch.equal(stablekl.kl_divergence(expanded, stablekl.NegativeBinomial(wide, q)), value)
    rows = torch.stack([r, p, s, q], -1)
    by_row = torch.stack([torch.autograd.functional.jacobian(lambda x: ours(*x), row) for row in rows])
    torch.testing.assert_close(torch.func.vmap(torch.func.jacrev(lambda x: ours(*x)))(rows), by_row)
    by_torch = distributions.kl_divergence(distributions.NegativeBinomial(r, p), distributions.NegativeBinomial(s, q))
    assert torch.equal(by_torch, ours(r, p, s, q))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_rounded_once(dtype):
    rng = np.random.default_rng(0)
    x = [torch.from_numpy(rng.uniform(0.1, 0.9, 40) * scale).to(dtype) for scale in (30, 1, 30, 1)]
    assert torch.equal(ours(*x), ours(*(v.double() for v in x)).to(dtype))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while compiling
def test_compiled():
    x = [v.requires_grad_() for v in columns(CASES[:1] + CASES[3:5])]
    for backward in (False, True):
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        if not backward:
            with torch.no_grad():
                torch.testing.assert_close(compiled(*x), ours(*x), rtol=1e-13, atol=0)
            continue
        for a, b in zip(*(torch.autograd.grad(f(*x).sum(), x) for f in (compiled, ours)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
