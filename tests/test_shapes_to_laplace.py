"""KL from Gamma and Beta to Laplace distributions, and between InverseGamma and Gamma distributions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, distributions

import stablekl
from stablekl.distributions import _integrated
from stablekl.distributions.cross import _deviation
from stablekl.precision.references import FAMILIES, beta, gamma
from stablekl.precision.references.context import mp
from stablekl.precision.references.family import Statistic, divergence

EPS, F64 = 2.0**-52, torch.float64
UP = 1 + 2.0**-52
# Parameters of p, then of q: ordinary, near the closest q, below and above the support, and at the ends of the range.
CASES = {
    "Gamma-Laplace": [
        (2.5, 1.3, 1.7, 0.9),
        (2.5, 1.0, 2.1826, 1.24),
        (7.667668, 1.0, 7.90825, 2.21),
        (1e-9, 1.0, 1e-3, 1e-3),
        (1e-3, 1e12, 0.0, 1e-12),
        (40.0, 1e-6, -1e12, 1e9),
        (1e12, 1.0, 1e12 + 3e5, 8e5),
        (1e12, 1e-12, 1e12, 1.0),
        (0.4, 2.0, 1e6, 1.0),
        (1e8, 1.0, 1e-12, 1e12),
    ],
    "Beta-Laplace": [
        (2.5, 1.3, 0.7, 0.2),
        (8.8416, 28.434, 0.25735, 0.0666),
        (4.8e-4, 8082.0, 1.5e-4, 1.5e-4),
        (2.8e-4, 127.0, 0.9985, 0.5),
        (127.0, 2.8e-4, 0.9985, 0.1),
        (1e12, 3e12, 0.25, 1e-7),
        (1e-12, 1e-12, 0.3, 1.0),
        (3.0, 1e12, 3e-12, 1e-12),
        (2.0, 2.0, -4.0, 1e3),
        (2.0, 2.0, 1e12, 1e12),
        (1.0, 1.0, 0.5, 0.25),
        (30.0, 7.6, 1e-12, 1.0),
    ],
    "InverseGamma-Gamma": [
        (2.5, 1.3, 0.7, 0.2),
        (UP, 1.0, 2.0, 1e-3),
        (1e12, 1e12, 1e12, 1.0),
        (10.3418, 1.0, 10.3418, 96.6),
        (1 + 1e-9, 1e12, 1e-12, 1e-12),
        (3e5, 1e-12, 3e5 + 1, 9e22),
    ],
    "InverseGamma-Exponential": [(2.5, 1.3, 0.7), (1.7, 1.0, 0.7), (1e12, 1e12, 1.0), (1 + 1e-9, 1e12, 1e-12)],
    "Gamma-InverseGamma": [(2.5, 1.3, 0.7, 0.2), (1e12, 1e12, 1e12, 1.0)],
}
DERIVATIVES = {
    "Gamma-Laplace": [(2.5, 1.3, 1.7, 0.9), (0.3, 2.0, 0.01, 0.2), (30.0, 1.0, 45.0, 6.0), (2.0, 1.0, -1.0, 1.0)],
    "Beta-Laplace": [
        *((2.5, 1.3, 0.3, 0.2), (0.3, 2.0, 0.4, 0.2), (30.0, 90.0, 0.3, 0.1)),
        *((2.0, 0.7, 0.9, 1.0), (2.0, 1.0, -1.0, 1.0), (2.0, 1.0, 2.0, 1.0)),
    ],
    "InverseGamma-Gamma": [(2.5, 1.3, 0.7, 0.2), (30.0, 29.0, 30.0, 30.0)],
    "InverseGamma-Exponential": [(2.5, 1.3, 0.7), (12.0, 29.0, 3.0)],
    "Gamma-InverseGamma": [(2.5, 1.3, 0.7, 0.2), (30.0, 29.0, 30.0, 30.0)],
}


def ours(pair: str, *x: Tensor) -> Tensor:
    p, q = pair.split("-")
    made = (getattr(stablekl, p)(*x[:2], validate_args=False), getattr(stablekl, q)(*x[2:], validate_args=False))
    return stablekl.kl_divergence(*made)


def columns(rows: list[tuple[float, ...]], dtype: torch.dtype = F64) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(x, dtype=F64).to(dtype) for x in zip(*rows, strict=True))


@pytest.mark.parametrize("pair", CASES)
def test_accuracy(pair):
    family_p, family_q = (FAMILIES[name] for name in pair.split("-"))
    for row, value in zip(CASES[pair], ours(pair, *columns(CASES[pair])), strict=True):
        theta = [mp.mpf(x) for x in row]
        truth = divergence(family_p, tuple(theta[:2]), family_q, tuple(theta[2:]))
        assert abs(mp.mpf(float(value)) / truth - 1) < 64 * EPS, row


def test_the_textbook_form_fails():
    a = b = 1e8
    with mp.workprec(53):
        entropy = mp.loggamma(a) - (a - 1) * mp.psi(0, a) + a
        textbook = mp.log(2 * math.sqrt(a)) - entropy + mp.sqrt(2 / mp.pi)
    value = ours("Gamma-Laplace", *columns([(a, 1.0, b, math.sqrt(a))]))
    assert abs(textbook / float(value) - 1) > 1e-9


def test_references_by_quadrature_are_those_by_special_functions():
    with mp.workprec(120):
        for a, b, m in ((2.5, 1.0, 0.3), (0.01, 0.02, 0.9), (30.0, 20.0, 0.6)):
            a, b, m = mp.mpf(a), mp.mpf(b), mp.mpf(m)
            closed = FAMILIES["Beta"].expectation(Statistic("abs", m), a, b)
            assert abs((abs(a / (a + b) - m) + 2 * beta._beyond(a, b, m)) / closed - 1) < mp.mpf(2) ** -80
            closed = FAMILIES["Gamma"].expectation(Statistic("abs", m * a), a, mp.mpf(1))
            assert abs((abs(a - m * a) + 2 * gamma._beyond(a, m * a)) / closed - 1) < mp.mpf(2) ** -80


def test_deviation_of_an_exponential_and_a_uniform():
    z = torch.tensor([-1.0, 0.0, 1e-9, 0.7, 1.0, 3.0, 50.0], dtype=F64)
    one = torch.ones_like(z)
    found = _deviation.gamma_deviation(one, z, z - 1)
    expected = torch.where(z > 0, z - 1 + 2 * torch.exp(-z.clamp(min=0)), 1 - z)
    torch.testing.assert_close(found.value, expected, rtol=8 * EPS, atol=0)
    torch.testing.assert_close(found.by_point, torch.where(z > 0, 1 - 2 * torch.exp(-z), -1.0), rtol=0, atol=8 * EPS)
    x = torch.tensor([-1.0, 0.0, 0.2, 0.5, 0.9, 1.0, 7.0], dtype=F64)
    inside = (x > 0) & (x < 1)
    found = _deviation.beta_deviation(one, one, x)
    expected = torch.where(inside, x * x + (1 - x) * (1 - x), (2 * x - 1).abs())
    torch.testing.assert_close(found.value, expected, rtol=8 * EPS, atol=0)
    torch.testing.assert_close(found.by_point, (2 * x - 1).clamp(-1, 1), rtol=0, atol=8 * EPS)


@pytest.mark.parametrize("pair", DERIVATIVES)
def test_derivatives_twice(pair):
    leaves = tuple(x.requires_grad_() for x in columns(DERIVATIVES[pair]))
    assert torch.autograd.gradcheck(lambda *x: ours(pair, *x), leaves)
    assert torch.autograd.gradgradcheck(lambda *x: ours(pair, *x), leaves)


@pytest.mark.parametrize("pair", CASES)
def test_gradients_are_finite(pair):
    leaves = [x.requires_grad_() for x in columns(CASES[pair])]
    gradients = torch.autograd.grad(ours(pair, *leaves).sum(), leaves)
    assert all(g.isfinite().all() for g in gradients)


def test_gradient_of_large_concentrations():
    """By the mean deviation of the normal distribution that they come near."""
    a = torch.tensor(1e10, dtype=F64, requires_grad=True)
    mu = a.detach() + 5e4
    by_a, by_mu = torch.autograd.grad(
        ours("Gamma-Laplace", a, torch.ones((), dtype=F64), mu.requires_grad_(), torch.tensor(1e5, dtype=F64)), (a, mu)
    )
    slope = math.erf(0.5 / math.sqrt(2)) / 1e5
    torch.testing.assert_close(float(by_mu), slope, rtol=1e-4, atol=0)
    torch.testing.assert_close(float(by_a), -slope, rtol=1e-4, atol=0)


@pytest.mark.parametrize("pair", CASES)
def test_shapes_and_transforms(pair):
    p, q = pair.split("-")
    x = columns(DERIVATIVES[pair][:2] * 2)
    wide = x[2].abs() * torch.tensor([[1.0], [0.5]], dtype=F64)
    value = ours(pair, *x[:2], wide, *x[3:])
    assert value.shape == (2, 4)
    assert torch.equal(value[1], ours(pair, *x[:2], wide[1], *x[3:]))
    expanded = getattr(stablekl, p)(*x[:2]).expand((2, 4))
    assert torch.equal(stablekl.kl_divergence(expanded, getattr(stablekl, q)(wide, *x[3:])), value)
    by_torch = getattr(distributions, p)(*x[:2]), getattr(distributions, q)(x[2].abs(), *x[3:])
    assert torch.equal(distributions.kl_divergence(*by_torch), value[0])
    rows = torch.stack(x, -1)
    by_row = torch.stack([torch.autograd.functional.jacobian(lambda v: ours(pair, *v), row) for row in rows])
    batched = torch.func.vmap(torch.func.jacrev(lambda v: ours(pair, *v)))(rows)
    torch.testing.assert_close(batched, by_row, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("pair", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_rounded_once(pair, dtype):
    x = columns(DERIVATIVES[pair], dtype)
    assert torch.equal(ours(pair, *x), ours(pair, *(v.double() for v in x)).to(dtype))


@pytest.mark.parametrize("pair", ["Gamma-Laplace", "Beta-Laplace"])
def test_many_rows_are_those_of_one(pair):
    rows = _integrated.ROWS + 3
    x = [torch.linspace(low, 2 * low, rows, dtype=F64) for low in (1.5, 2.0, 0.3, 0.2)]
    assert torch.equal(ours(pair, *x)[-1], ours(pair, *(v[-1] for v in x)))


@pytest.mark.parametrize("a", [0.5, 1.0])
def test_inverse_gamma_without_a_mean_is_infinitely_far(a):
    leaves = [torch.tensor(x, dtype=F64, requires_grad=True) for x in (a, 1.0, 2.0, 3.0)]
    for pair in ("InverseGamma-Gamma", "Gamma-InverseGamma"):
        value = ours(pair, *leaves)
        assert value == math.inf
        assert all(g == 0 for g in torch.autograd.grad(value, leaves))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while compiling
@pytest.mark.parametrize(
    "pair", ["Gamma-Laplace", pytest.param("Beta-Laplace", marks=pytest.mark.slow), "InverseGamma-Gamma"]
)
def test_compiled(pair):
    x = [v.requires_grad_() for v in columns(DERIVATIVES[pair])]

    def value(*x: Tensor) -> Tensor:
        return ours(pair, *x)

    compiled = torch.compile(value, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*x), value(*x), rtol=1e-13, atol=0)
    for a, b in zip(*(torch.autograd.grad(f(*x).sum(), x) for f in (compiled, value)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)
