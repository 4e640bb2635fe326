"""Families over finitely many outcomes, and waits for one of two: probabilities that underflow, or are none."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributions as td
from torch import Tensor

import stablekl as S
from stablekl.precision.references.context import mp

INF, NAN = math.inf, math.nan
LOOSE = {"validate_args": False}


@pytest.fixture(autouse=True)
def digits():
    """References of as many digits as probabilities of e^-2000 take beside 1."""
    with mp.workprec(3500):
        yield


def f64(*x: float) -> Tensor:
    return torch.tensor(x if len(x) > 1 else x[0], dtype=torch.float64)


def bernoulli(**parameter: float) -> tuple[Any, Any]:
    """Ours and torch's."""
    tensors = {name: f64(x) for name, x in parameter.items()}
    return S.Bernoulli(**tensors, **LOOSE), td.Bernoulli(**tensors, **LOOSE)


def assert_kl(p: Any, q: Any, truth: float, ulps: float = 8) -> None:
    found = S.kl_divergence(p, q).item()
    assert not math.isnan(found)
    assert math.copysign(1, found) == 1
    assert found == truth if math.isinf(truth) else abs(found - truth) <= ulps * math.ulp(truth), (found, truth)


def logs(kind: str, x: float) -> tuple[Any, Any]:
    x = mp.mpf(x)
    if kind == "probs":
        return mp.log(x), mp.log1p(-x)
    rest = mp.log1p(mp.exp(-abs(x)))
    return (-rest, -rest - x) if x > 0 else (x - rest, -rest)


def trial(kind_p: str, x: float, kind_q: str, y: float) -> Any:
    with mp.workprec(3000):
        pairs = zip(logs(kind_p, x), logs(kind_q, y), strict=True)
        return +sum(mp.exp(a) * (a - b) for a, b in pairs if a > -mp.inf)


# ---- 1: logits beyond the exponents of floats -----------------------------------------------------------------------

FAR = [
    ("logits", 0.0, "logits", -800.0),
    ("logits", -800.0, "logits", 0.0),
    ("logits", -800.0, "logits", -801.0),
    ("logits", 1e4, "logits", -1e4),
    ("logits", -800.0, "logits", -1e308),
    ("probs", float.fromhex("0x1.4541c3c1efdbcp-377"), "logits", float.fromhex("-0x1.b26c7a0ea8b4ep+9")),
    ("probs", 0.3, "logits", 954.0),
    ("logits", 954.0, "probs", 0.3),
]


@pytest.mark.parametrize(("kind_p", "x", "kind_q", "y"), FAR)
def test_far_logits(kind_p, x, kind_q, y):
    one = trial(kind_p, x, kind_q, y)
    for p in bernoulli(**{kind_p: x}):
        for q in bernoulli(**{kind_q: y}):
            assert_kl(p, q, float(one))
            with S.harden():
                assert td.kl_divergence(p, q).item() == S.kl_divergence(p, q).item()
    n = f64(7.0)
    p, q = (S.Binomial(n, **{kind: f64(v)}, **LOOSE) for kind, v in ((kind_p, x), (kind_q, y)))
    assert_kl(p, q, float(7 * one))
    a, b = logs(kind_p, x)
    p, q = (S.Geometric(**{kind: f64(v)}, **LOOSE) for kind, v in ((kind_p, x), (kind_q, y)))
    assert_kl(p, q, float(one / mp.exp(a)))
    p, q = (S.NegativeBinomial(n, **{kind: f64(v)}, **LOOSE) for kind, v in ((kind_p, x), (kind_q, y)))
    assert_kl(p, q, float(7 * one / mp.exp(b)))
    if kind_p == kind_q == "logits":
        rows = f64(x, 0.0), f64(y, 0.0)
        for C in (S.Categorical, S.OneHotCategorical):
            assert_kl(C(logits=rows[0]), C(logits=rows[1]), float(one), 16)
        assert_kl(S.Multinomial(7, logits=rows[0]), S.Multinomial(7, logits=rows[1]), float(7 * one), 16)


def test_far_logits_have_gradients():
    for kind_p, x, kind_q, y in FAR:
        u, v = f64(x).requires_grad_(), f64(y).requires_grad_()
        value = S.kl_divergence(S.Bernoulli(**{kind_p: u}), S.Bernoulli(**{kind_q: v}))
        by_p, by_q = torch.autograd.grad(value, (u, v))
        (a, b), (c, d) = logs(kind_p, x), logs(kind_q, y)
        gap = (a - b) - (c - d)
        true_p = gap if kind_p == "probs" else gap * mp.exp(a + b)
        true_q = (mp.exp(c) - mp.exp(a)) / (1 if kind_q == "logits" else mp.exp(c + d))
        torch.testing.assert_close(by_p.item(), float(true_p), rtol=1e-12, atol=1e-30)
        torch.testing.assert_close(by_q.item(), float(true_q), rtol=1e-12, atol=1e-30)


def test_certainty_of_probability_excludes_where_a_logit_does_not():
    certain = S.Bernoulli(f64(1.0))
    assert_kl(certain, S.Bernoulli(logits=f64(-800.0)), 800.0)
    assert_kl(S.Bernoulli(logits=f64(954.0)), certain, INF)
    assert_kl(S.Bernoulli(logits=f64(-954.0)), S.Bernoulli(f64(0.0)), INF)
    assert_kl(S.Categorical(logits=f64(1e4, 0.0)), S.Categorical(f64(1.0, 0.0)), INF)
    assert_kl(S.Bernoulli(f64(0.0)), S.Bernoulli(logits=f64(1194.0)), 1194.0)
    small = S.Categorical(logits=torch.zeros(2)), S.Categorical(logits=torch.tensor([0.0, -1e4]))
    assert S.kl_divergence(*small).item() == pytest.approx(4999.3069, rel=1e-7)


# ---- 3: binomial distributions of different numbers of trials -------------------------------------------------------


def counted(n: int, p: tuple[Any, Any], m: int, q: tuple[Any, Any]) -> Any:
    """The definition, from logarithms of probabilities of success and failure."""
    total = mp.mpf(0)
    for k in range(n + 1):
        a = (k * p[0] if k else 0) + ((n - k) * p[1] if n > k else 0)
        b = (k * q[0] if k else 0) + ((m - k) * q[1] if m > k else 0)
        ways = mp.binomial(n, k)
        total += ways * mp.exp(a) * (a - b + mp.log(ways / mp.binomial(m, k)))
    return total


TRIALS = [
    (1, "probs", 1e-6, 2, "probs", 5e-7),
    (4, "probs", float.fromhex("0x1.80951d7b4fafep-45"), 7, "probs", float.fromhex("0x1.b77d253f37e62p-46")),
    (3, "logits", -1.1, 8, "logits", 37.2),
    (3, "logits", float.fromhex("-0x1.1aa742103ce6ep+0"), 8, "logits", float.fromhex("0x1.2975e530c9651p+5")),
    (30, "probs", 0.5, 31, "probs", 15 / 31),
    (100, "probs", 0.99, 150, "logits", 0.5),
    (5, "logits", -200.0, 6, "probs", 1e-87),
    (2, "probs", 1 - 2.0**-50, 3, "probs", 0.7),
]


@pytest.mark.parametrize("case", TRIALS)
def test_unequal_trials(case):
    n, kind_p, x, m, kind_q, y = case
    with mp.workprec(3000):
        truth = counted(n, logs(kind_p, x), m, logs(kind_q, y))
    u, v = f64(x).requires_grad_(), f64(y).requires_grad_()
    p, q = S.Binomial(n, **{kind_p: u}), S.Binomial(m, **{kind_q: v})
    assert_kl(p, q, float(truth), 32)
    found = torch.autograd.grad(S.kl_divergence(p, q), (u, v))
    with mp.workprec(3000):
        for i, g in enumerate(found):
            ends = []
            for sign in (1, -1):
                at = [mp.mpf(x), mp.mpf(y)]
                h = abs(at[i]) * mp.mpf(2) ** -400
                at[i] += sign * h
                ends.append(counted(n, logs(kind_p, at[0]), m, logs(kind_q, at[1])))
            assert float(g) == pytest.approx(float((ends[0] - ends[1]) / (2 * h)), rel=1e-12)


def test_unequal_trials_at_ends():
    def kl(n: int, p: float, m: int, q: float) -> Tensor:
        return S.kl_divergence(S.Binomial(n, f64(p)), S.Binomial(m, f64(q)))

    assert kl(0, 0.0, 1, 0.3).item() == pytest.approx(-math.log(0.7), rel=1e-15)
    assert kl(2, 1e-20, 3, 0.3).item() == pytest.approx(-3 * math.log(0.7), rel=1e-15)
    assert str(kl(2, 0.0, 3, 0.0).item()) == "0.0"
    assert kl(3, 0.0, 2, 0.3).item() == pytest.approx(-2 * math.log(0.7), rel=1e-15)
    assert [kl(3, 0.1, 2, 0.1).item(), kl(2, 0.1, 3, 1.0).item(), kl(2, 0.1, 3, 0.0).item()] == [INF] * 3
    tiny = S.Binomial(1, logits=f64(-2500.0))
    assert S.kl_divergence(tiny, S.Binomial(2, f64(0.0))).item() == INF


def test_unequal_trials_differentiate_twice_and_transform():
    n, m = f64(2.0, 3.0, 0.0), f64(3.0, 3.0, 4.0)
    x, y = f64(0.3, 0.6, 0.2).requires_grad_(), f64(-0.4, 1.0, 0.3).requires_grad_()

    def kl(x: Tensor, y: Tensor) -> Tensor:
        return S.kl_divergence(S.Binomial(n, x, **LOOSE), S.Binomial(m, logits=y, **LOOSE))

    assert torch.autograd.gradcheck(kl, (x, y))
    assert torch.autograd.gradgradcheck(kl, (x, y))

    def one(z: Tensor) -> Tensor:
        return S.kl_divergence(S.Binomial(z[0], z[1], **LOOSE), S.Binomial(z[2], logits=z[3], **LOOSE))

    rows = torch.stack([n, x, m, y], -1).detach()
    by_row = torch.stack([torch.autograd.functional.jacobian(one, r) for r in rows])
    torch.testing.assert_close(torch.func.vmap(torch.func.jacrev(one))(rows)[:, [1, 3]], by_row[:, [1, 3]])


# ---- 4 and 5: waits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_negative_binomial_by_far_logits(dtype):
    x = torch.tensor([720.0, -720.0, 1e4], dtype=dtype).requires_grad_()
    made = [S.NegativeBinomial(torch.tensor(2.0, dtype=dtype), logits=v) for v in (x, x.detach())]
    value = S.kl_divergence(*made)
    assert (value == 0).all()
    assert (torch.autograd.grad(value.sum(), x)[0] == 0).all()
    p, q = (S.NegativeBinomial(f64(2.0), logits=f64(v)) for v in (0.0, 800.0))
    assert_kl(p, q, float(2 * trial("logits", 0.0, "logits", 800.0) * 2))


def test_negative_binomial_of_other_counts_and_large_means():
    gamma = S.kl_divergence(S.Gamma(f64(2.0), f64(1.0)), S.Gamma(f64(3.0), f64(math.e)))
    for x in (50.0, 300.0, 720.0):
        p, q = S.NegativeBinomial(f64(2.0), logits=f64(x)), S.NegativeBinomial(f64(3.0), logits=f64(x - 1))
        torch.testing.assert_close(S.kl_divergence(p, q), gamma, rtol=1e-13, atol=0)


def test_negative_binomial_gradient_where_a_probability_is_lost_beside_another():
    p, q = f64(0.3).requires_grad_(), f64(1e-72)
    value = S.kl_divergence(S.NegativeBinomial(f64(2.0), p), S.NegativeBinomial(f64(2.0), q))
    (found,) = torch.autograd.grad(value, p)
    with mp.workprec(2000):
        x, y = mp.mpf(0.3), mp.mpf(1e-72)
        truth = 2 * mp.log(x / y) / (1 - x) ** 2
    assert found.item() == pytest.approx(float(truth), rel=1e-14)


def test_geometric_ends():
    half = S.Geometric(f64(0.5))
    assert_kl(half, S.Geometric(logits=f64(INF)), INF)
    assert_kl(half, S.Geometric(f64(1.0)), INF)
    assert_kl(S.Geometric(logits=f64(720.0)), S.Geometric(f64(0.25)), math.log(4))
    assert_kl(S.Geometric(logits=f64(5e-7)), S.Geometric(f64(1.0)), INF)
    for x in (5.0, 20.0, 40.0, 100.0, 400.0, -400.0, -720.0):
        for y in (0.7, 2.7, x + 0.5):
            truth = trial("logits", x, "logits", y) / mp.exp(logs("logits", x)[0])
            assert_kl(S.Geometric(logits=f64(x)), S.Geometric(logits=f64(y)), float(truth) if truth < 1e308 else INF)


# ---- 6: weights of any sum ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ((1e-160, 1e-160), (1e160, 3e160)),
        ((1e200, 1e200), (1e-200, 3e-200)),
        ((1e-310, 1e-310), (1.0, 3.0)),
        ((5e-324, 5e-324), (1.0, 3.0)),
        ((1e308, 1e308), (1.0, 3.0)),
        ((1e308, 5e-324), (5e-324, 1e308)),
        ((1.0, 1e-300), (1.0, 5e-324)),
    ],
)
def test_weights_of_any_sum(x, y):
    with mp.workprec(4000):
        p, q = ([mp.mpf(v) / mp.fsum(map(mp.mpf, w)) for v in w] for w in (x, y))
        truth = float(mp.fsum(a * mp.log(a / b) for a, b in zip(p, q, strict=True)))
    a, b = f64(*x).requires_grad_(), f64(*y).requires_grad_()
    for C in (S.Categorical, S.OneHotCategorical):
        assert_kl(C(a), C(b), truth, 16)
    assert not any(
        g.isnan().any() for g in torch.autograd.grad(S.kl_divergence(S.Categorical(a), S.Categorical(b)), (a, b))
    )
    assert_kl(S.Categorical(a), S.Categorical(logits=torch.log(b)), truth, 1e5)
    assert_kl(S.Categorical(a), S.Categorical(a), 0.0)


# ---- 7: what is no probability --------------------------------------------------------------------------------------

SCALAR = {
    "Bernoulli": S.Bernoulli,
    "Binomial": lambda **x: S.Binomial(3, **x),
    "Binomial of other counts": lambda **x: S.Binomial(3 if float(next(iter(x.values())).nan_to_num()) > 0 else 2, **x),
    "ContinuousBernoulli": S.ContinuousBernoulli,
    "Geometric": S.Geometric,
    "NegativeBinomial": lambda **x: S.NegativeBinomial(3.0, **x),
    "NegativeBinomial of other counts": lambda **x: S.NegativeBinomial(
        3.0 if float(next(iter(x.values())).nan_to_num()) > 0 else 2.0, **x
    ),
}


@pytest.mark.parametrize("name", SCALAR)
@pytest.mark.parametrize("kinds", [(a, b) for a in ("probs", "logits") for b in ("probs", "logits")])
def test_nan_gives_nan(name, kinds):
    def kl(x: float, y: float) -> float:
        made = (SCALAR[name](**{kind: f64(v)}, **LOOSE) for kind, v in zip(kinds, (x, y), strict=True))
        return S.kl_divergence(*made).item()

    assert all(math.isnan(kl(x, y)) for x, y in ((NAN, 0.5), (0.5, NAN), (NAN, NAN), (NAN, 1.0), (0.25, NAN)))
    outside = [(1.5, 0.5), (-0.5, 0.5)] if kinds[0] == "probs" else []
    outside += [(0.5, 1.5)] if kinds[1] == "probs" else []
    assert all(math.isnan(kl(x, y)) for x, y in outside)


@pytest.mark.parametrize("C", [S.Categorical, S.OneHotCategorical, lambda *x, **k: S.Multinomial(2, *x, **k)])
def test_nan_weights_give_nan(C):
    good = f64(0.0, 0.5)
    for bad in (f64(NAN, 0.5), f64(NAN, NAN)):
        for p, q in ((C(bad, **LOOSE), C(good)), (C(good), C(bad, **LOOSE)), (C(logits=bad, **LOOSE), C(good))):
            assert S.kl_divergence(p, q).isnan()
    assert S.kl_divergence(S.Categorical(f64(-0.1, 1.1), **LOOSE), S.Categorical(f64(0.5, 0.5))).isnan()
    assert S.kl_divergence(S.Poisson(f64(NAN), **LOOSE), S.Poisson(f64(0.0), **LOOSE)).isnan()


# ---- 10, 14, 15, 16 -------------------------------------------------------------------------------------------------


def test_subnormal_probabilities():
    p, q = 0.3, 5e-324
    truth = trial("probs", p, "probs", q)
    assert_kl(S.Bernoulli(f64(p)), S.Bernoulli(f64(q)), float(truth))
    assert_kl(S.Geometric(f64(p)), S.Geometric(f64(q)), float(truth / mp.mpf(p)))
    assert_kl(S.Categorical(f64(p, 1 - p)), S.Categorical(f64(q, 1.0)), float(trial("probs", p, "probs", q)), 16)
    p, q = 4.1825354420351467e-293, 4.1825356396308515e-293
    assert_kl(S.ContinuousBernoulli(f64(p)), S.ContinuousBernoulli(f64(q)), 2.4621998474509867711e-21)


def test_continuous_bernoulli_at_the_largest_logits():
    x = f64(1.79e308).requires_grad_()
    value = S.kl_divergence(S.ContinuousBernoulli(logits=x), S.ContinuousBernoulli(logits=-x.detach()))
    # 2 x E X - [A(x) - A(-x)], all but x
    assert value.item() == 1.79e308
    assert torch.autograd.grad(value, x)[0].isfinite()


def test_continuous_bernoulli_checks_what_it_is_given():
    for bad in (2.0, -1.0, NAN, f64(2.0), f64(0.3, NAN)):
        for options in ({}, {"validate_args": True}):
            with pytest.raises(ValueError, match="between 0 and 1"):
                S.ContinuousBernoulli(bad, **options)
        S.ContinuousBernoulli(bad, **LOOSE)
    with pytest.raises(ValueError, match="logits of ContinuousBernoulli"):
        S.ContinuousBernoulli(logits=f64(0.0, NAN))
    assert S.ContinuousBernoulli(0.3).expand((3,)).given_value.shape == (3,)


@pytest.mark.parametrize("name", SCALAR)
def test_zero_has_no_sign(name):
    for kind, x in (("probs", f64(0.3)), ("logits", f64(0.3)), ("probs", f64(0.5))):
        p = SCALAR[name](**{kind: x}, **LOOSE)
        assert str(S.kl_divergence(p, p).item()) == "0.0"
    if name == "Bernoulli":
        assert str(torch.compile(lambda x: S.kl_divergence(S.Bernoulli(x), S.Bernoulli(x)))(f64(0.3)).item()) == "0.0"


@pytest.mark.parametrize(
    ("p", "x"),
    [
        (float.fromhex("0x1.ffffffffff574p-2"), float.fromhex("-0x1.51800000006f5p-41")),
        (float.fromhex("0x1.fffffffffffb3p-2"), float.fromhex("-0x1.34p-46")),
        (float.fromhex("0x1.0000000000386p-1"), float.fromhex("0x1.c3p-42")),
    ],
)
def test_probability_against_logit_near_a_half(p, x):
    for first, second in ((("probs", p), ("logits", x)), (("logits", x), ("probs", p))):
        one = trial(*first, *second)
        made = [{kind: f64(v)} for kind, v in (first, second)]
        assert_kl(*(S.Bernoulli(**m) for m in made), float(one))
        assert_kl(*(S.Binomial(5, **m) for m in made), float(5 * one))
        assert_kl(*(S.Geometric(**m) for m in made), float(one / mp.exp(logs(*first)[0])))
        assert_kl(*(S.NegativeBinomial(f64(3.0), **m) for m in made), float(3 * one / mp.exp(logs(*first)[1])))
        # of variance 1/12, where one trial's is 1/4
        value = S.kl_divergence(*(S.ContinuousBernoulli(**m) for m in made)).item()
        assert value == pytest.approx(float(one) / 3, rel=4e-15)
