"""KL divergences of pairs that torch has no rule for: von Mises, Student's t, negative binomial, multinomial."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, distributions

import stablekl
from stablekl.distributions import _integrated
from stablekl.precision.references import FAMILIES
from stablekl.precision.references.context import exact, mp
from stablekl.precision.references.family import divergence, kl

EPS = 2.0**-52


def built(name: str, *parameters: Tensor) -> distributions.Distribution:
    keywords = dict(zip(FAMILIES[name].parameters, parameters, strict=True))
    found: distributions.Distribution = getattr(stablekl, name)(**keywords, validate_args=False)
    return found


def ours(name: str, p: tuple[Tensor, ...], q: tuple[Tensor, ...]) -> Tensor:
    return stablekl.kl_divergence(built(name, *p), built(name, *q))


def angles(rng: np.random.Generator, size: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    mu, k = rng.uniform(-3, 3, size), 10 ** rng.uniform(-12, 12, size)
    k[: size // 4] = rng.uniform(50, 80, size // 4)  # both sides of the border
    near = rng.uniform(size=size) < 0.6
    distance = 10 ** rng.uniform(-15, 0, size)
    mu_q = np.where(near, mu + rng.choice((0, 1), size) * distance, rng.uniform(-3, 3, size))
    k_q = np.where(near, k * (1 + distance * rng.choice((0, 1, -0.5), size)), 10 ** rng.uniform(-12, 12, size))
    p, q = (tuple(torch.from_numpy(x) for x in pair) for pair in ((mu, k), (mu_q, k_q)))
    return p, q


def tails(rng: np.random.Generator, size: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    df, scale = 10 ** rng.uniform(-3, 9, size), 10 ** rng.uniform(-6, 6, size)
    loc = rng.normal(size=size) * scale
    near = rng.uniform(size=size) < 0.7
    distance = 10 ** rng.uniform(-15, 0, (3, size)) * rng.choice((0, 1), (3, size))
    df_q = np.where(near, df * (1 + distance[0]), 10 ** rng.uniform(-3, 9, size))
    scale_q = np.where(near, scale * (1 + distance[1]), 10 ** rng.uniform(-6, 6, size))
    loc_q = np.where(near, loc + scale * distance[2], rng.normal(size=size) * scale_q)
    p, q = (tuple(torch.from_numpy(x) for x in triple) for triple in ((df, loc, scale), (df_q, loc_q, scale_q)))
    return p, q


def failures(rng: np.random.Generator, size: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    n, x = np.floor(10 ** rng.uniform(0, 3, size)), 1 / (1 + 10 ** rng.uniform(-12, 12, size))
    near = x * (1 + 10 ** rng.uniform(-15, -1, size) * (1 - x))
    y = np.where(rng.uniform(size=size) < 0.6, near, rng.uniform(size=size))
    p, q = (tuple(torch.from_numpy(v) for v in pair) for pair in ((n, x), (n, np.minimum(y, 1 - 2 * EPS))))
    return p, q


CASES = {"VonMises": (angles, 200, 8.0), "StudentT": (tails, 40, 64.0), "NegativeBinomial": (failures, 200, 8.0)}


def errors(name: str, p: tuple[Tensor, ...], q: tuple[Tensor, ...]) -> list[float]:
    """In units of 2^-52, relative."""
    found, family = ours(name, p, q), FAMILIES[name]
    result = []
    for row in range(len(found)):
        truth = divergence(family, tuple(exact(x[row]) for x in p), family, tuple(exact(x[row]) for x in q))
        value = mp.mpf(float(found[row]))
        result.append(float(abs(value - truth) / truth / EPS) if truth else float(value))
    return result


@pytest.mark.parametrize("name", CASES)
def test_near_and_far_within_its_bar(name):
    draw, size, bar = CASES[name]
    p, q = draw(np.random.default_rng(1), size)
    assert max(errors(name, p, q)) < bar


@pytest.mark.parametrize("name", CASES)
def test_textbook_form_fails(name):
    """The same expectations in float64, as a sum of terms that cancel."""
    p, _ = CASES[name][0](np.random.default_rng(1), 8)
    family = FAMILIES[name]
    worst = 0.0
    for row in range(8):
        near = tuple(exact(x[row]) * (1 + mp.mpf(2) ** -40 * (x is p[1])) for x in p)
        theta = tuple(exact(x[row]) for x in p)
        truth = divergence(family, theta, family, near)
        with mp.workprec(53):
            terms_p, terms_q = family.terms(*theta), family.terms(*near)
            value = sum(
                c * (1 if t.kind == "one" else float(family.expectation(t, *theta))) * sign
                for terms, sign in ((terms_p, 1), (terms_q, -1))
                for t, c in terms.items()
                if t.kind != "log rising"
            )
        worst = max(worst, float(abs(value - truth) / truth) if truth else 0.0)
    assert worst > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_equal_is_exactly_zero_with_zero_gradient(name):
    p, _ = CASES[name][0](np.random.default_rng(2), 50)
    a, b = ([x.clone().requires_grad_() for x in p] for _ in range(2))
    value = ours(name, tuple(a), tuple(b))
    gradients = torch.autograd.grad(value.sum(), a + b, allow_unused=True)
    assert (value == 0).all()
    assert all(g is None or (g == 0).all() for g in gradients)


GRADIENTS = {
    "VonMises": ((0.3, 0.3, 1.0), (2.0, 90.0, 60.0), (0.3, -2.0, 1.1), (2.0, 20.0, 70.0)),
    "StudentT": (
        *((3.0, 0.7, 40.0), (0.0, 1.0, 0.2), (1.0, 2.0, 0.5)),
        *((3.0, 2.0, 44.0), (0.0, -1.0, 0.3), (1.0, 1.5, 1.0)),
    ),
    "NegativeBinomial": ((3.0, 2.0, 0.7), (0.3, 0.9, 0.5), (3.0, 2.5, 20.0), (0.3, 0.1, 0.4)),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_derivatives_twice(name):
    rows = tuple(torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in GRADIENTS[name])
    half = len(rows) // 2
    assert torch.autograd.gradcheck(lambda *x: ours(name, x[:half], x[half:]), rows)
    assert torch.autograd.gradgradcheck(lambda *x: ours(name, x[:half], x[half:]), rows)


@pytest.mark.parametrize("name", ["VonMises", "StudentT"])
def test_shapes_and_transforms(name):
    count = len(FAMILIES[name].parameters)
    wide = tuple(
        torch.rand(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) + 1 for i in range(count)
    )
    narrow = tuple(x[0] + 0.5 for x in wide)
    value = ours(name, narrow, wide)
    assert value.shape == (2, 3)
    assert torch.equal(value[1], ours(name, narrow, tuple(x[1] for x in wide)))
    rows = torch.stack([*(x.expand(2, 3) for x in narrow), *wide], -1).reshape(6, -1)

    def scalar(row: Tensor) -> Tensor:
        return ours(name, tuple(row[:count]), tuple(row[count:]))

    by_row = torch.stack([torch.autograd.functional.jacobian(scalar, row) for row in rows])
    torch.testing.assert_close(torch.func.vmap(torch.func.jacrev(scalar))(rows), by_row)


@pytest.mark.parametrize("name", ["VonMises", "StudentT"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_rounded_once(name, dtype):
    draw = CASES[name][0]
    p, q = draw(np.random.default_rng(3), 30)
    p, q = (tuple(x.abs().clamp(0.1, 90.0).to(dtype) for x in side) for side in (p, q))
    wide = ours(name, *(tuple(x.double() for x in side) for side in (p, q)))
    assert torch.equal(ours(name, p, q), wide.to(dtype))


def test_many_rows_are_those_of_one():
    p, q = tails(np.random.default_rng(4), _integrated.ROWS + 3)
    value = ours("StudentT", p, q)
    assert torch.equal(value[-1], ours("StudentT", tuple(x[-1] for x in p), tuple(x[-1] for x in q)))


def test_student_t_one_degree_is_cauchy():
    one = torch.tensor(1.0, dtype=torch.float64)
    p, q = (one, 0 * one, one), (one, 3 * one, 7 * one)
    expected = math.log1p((36 + 9) / 28)
    torch.testing.assert_close(float(ours("StudentT", p, q)), expected, rtol=1e-15, atol=0)


def test_negative_binomial_of_logits_and_edges():
    logits = torch.tensor([-40.0, -1.0, 0.5, 30.0], dtype=torch.float64)
    p = stablekl.NegativeBinomial(3.0, logits=logits)
    q = stablekl.NegativeBinomial(3.0, logits=logits + 1e-6)
    family = FAMILIES["NegativeBinomial"]
    for row in range(4):
        with mp.workprec(400):
            x, y = (1 / (1 + mp.exp(-mp.mpf(float(d.logits[row])))) for d in (p, q))
            truth = kl(family, (mp.mpf(3), x), family, (mp.mpf(3), y))
        assert abs(float(distributions.kl_divergence(p, q)[row] / float(truth)) - 1) < 64 * EPS
    never = stablekl.NegativeBinomial(2.0, torch.tensor([0.0, 0.5]))
    other = stablekl.NegativeBinomial(2.0, torch.tensor([0.5, 0.0]))
    value = distributions.kl_divergence(never, other)
    torch.testing.assert_close(value, torch.tensor([2 * math.log(2), math.inf]))


def test_multinomial():
    p, q = torch.tensor([[0.5, 0.5], [0.0, 1.0]]), torch.tensor([0.5 + 2.0**-20, 0.5 - 2.0**-20])
    value = distributions.kl_divergence(stablekl.Multinomial(4, p), stablekl.Multinomial(4, q))
    one = distributions.kl_divergence(stablekl.Categorical(p.double()), stablekl.Categorical(q.double()))
    torch.testing.assert_close(value, (4 * one).float(), rtol=0, atol=0)
    many = distributions.kl_divergence(stablekl.Multinomial(4, p), stablekl.Multinomial(5, q))
    assert (many == math.inf).all()
    none = stablekl.Multinomial(0, p)
    assert (distributions.kl_divergence(none, none.expand((3, 2))) == 0).all()
    assert type(none.expand((3, 2))) is stablekl.Multinomial
    by_torch = distributions.kl_divergence(distributions.Multinomial(4, p), stablekl.Multinomial(4, q))
    torch.testing.assert_close(by_torch, value)


def test_multinomial_of_logits_keeps_them():
    p, q = torch.tensor([0.0, 0.0]), torch.tensor([0.0, -200.0])
    value = distributions.kl_divergence(stablekl.Multinomial(2, logits=p), stablekl.Multinomial(2, logits=q))
    torch.testing.assert_close(float(value), 2 * (100 - math.log(2)))


@pytest.mark.parametrize("name", ["VonMises", "StudentT"])
def test_compiled(name, monkeypatch):
    # torch's StudentT builds a Chi2 that is validated in any case, which may not trace
    monkeypatch.setattr(distributions.Distribution, "_validate_args", False)
    rows = [torch.tensor(x, dtype=torch.float64) for x in GRADIENTS[name]]
    half = len(rows) // 2
    compiled = torch.compile(lambda *x: ours(name, x[:half], x[half:]), fullgraph=True)
    torch.testing.assert_close(compiled(*rows), ours(name, tuple(rows[:half]), tuple(rows[half:])), rtol=1e-13, atol=0)


# ---- Kumaraswamy and LKJ ------------------------------------------------------------------------------------------


def test_kumaraswamy_of_one_power_is_exponential():
    """-log(1 - x^a) is exponential of rate b."""
    a, b, c = (10 ** torch.linspace(*ends, 9, dtype=torch.float64) for ends in ((-2, 2), (-1.5, 3), (-1.4, 2.5)))
    p, q = stablekl.Kumaraswamy(a, b), stablekl.Kumaraswamy(a, c)
    expected = stablekl.special.log_ratio_bregman(c, b)
    torch.testing.assert_close(distributions.kl_divergence(p, q), expected, rtol=64 * EPS, atol=0)


def test_kumaraswamy_by_adaptive_quadrature():
    p = stablekl.Kumaraswamy(*(torch.tensor(x, dtype=torch.float64) for x in ([0.5, 3.0, 2.0], [2.0, 20.0, 1.5])))
    q = stablekl.Kumaraswamy(*(torch.tensor(x, dtype=torch.float64) for x in ([1.0, 3.1, 2.1], [2.0, 10.0, 1.6])))
    estimate = stablekl.kl_estimate(p, q, "integrate")
    assert ((distributions.kl_divergence(p, q) - estimate.value).abs() <= estimate.error).all()


def test_kumaraswamy_derivatives():
    rows = tuple(
        torch.tensor(x, dtype=torch.float64, requires_grad=True)
        for x in ((0.5, 3.0, 2.0), (0.3, 20.0, 2.0), (1.0, 3.1, 2.0), (2.0, 10.0, 2.0))
    )

    def value(*x: Tensor) -> Tensor:
        made = (stablekl.Kumaraswamy(*pair, validate_args=False) for pair in (x[:2], x[2:]))
        return stablekl.kl_divergence(*made)

    assert value(*rows)[2] == 0
    assert torch.autograd.gradcheck(value, rows)
    assert torch.autograd.gradgradcheck(value, rows)


def lkj_normaliser(x, dim: int):
    half = mp.mpf(1) / 2
    return mp.fsum(mp.loggamma(x + half * (dim - 1 - k)) - mp.loggamma(x + half * (dim - 1)) for k in range(1, dim))


def lkj_mean(x, dim: int):
    """Of the logarithm of the determinant."""
    half = mp.mpf(1) / 2
    return mp.fsum(mp.psi(0, x + half * (dim - 1 - k)) - mp.psi(0, x + half * (dim - 1)) for k in range(1, dim))


@pytest.mark.parametrize("dim", [2, 3, 4, 7])
def test_lkj(dim):
    rng = np.random.default_rng(dim)
    x = 10 ** rng.uniform(-12, 8, 60)
    y = np.where(rng.uniform(size=60) < 0.6, x * (1 + 10 ** rng.uniform(-15, 0, 60)), 10 ** rng.uniform(-12, 8, 60))
    found = distributions.kl_divergence(*(stablekl.LKJCholesky(dim, torch.from_numpy(v)) for v in (x, y)))
    textbook = 0.0
    for a, b, value in zip(x, y, found, strict=True):
        with mp.workprec(500):
            a, b = mp.mpf(a), mp.mpf(b)
            truth = lkj_normaliser(b, dim) - lkj_normaliser(a, dim) - lkj_mean(a, dim) * (b - a)
            assert abs(mp.mpf(float(value)) / truth - 1) < 16 * EPS
        with mp.workprec(53):
            plain = lkj_normaliser(b, dim) - lkj_normaliser(a, dim) - lkj_mean(a, dim) * (b - a)
            textbook = max(textbook, float(abs(plain / truth - 1)))
    assert textbook > 1  # the must-fail twin


def test_lkj_derivatives_and_sizes():
    x, y = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ((0.3, 2.0, 5.0), (1.0, 2.0, 50.0)))

    def value(a: Tensor, b: Tensor) -> Tensor:
        return stablekl.kl_divergence(*(stablekl.LKJCholesky(4, v, validate_args=False) for v in (a, b)))

    assert value(x, y)[1] == 0
    assert torch.autograd.gradcheck(value, (x, y))
    assert torch.autograd.gradgradcheck(value, (x, y))
    with pytest.raises(ValueError, match="size 4 and q over those of size 3"):
        stablekl.kl_divergence(stablekl.LKJCholesky(4, x), stablekl.LKJCholesky(3, y))
