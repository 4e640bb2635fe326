"""The precision suite's search must find what is planted, and nothing where there is nothing."""

from __future__ import annotations

import math
import time

import mpmath
import pytest
import torch
from hypothesis import strategies as st

from stablekl.precision import search
from stablekl.precision.batches import pairs, plans, related, scalars
from stablekl.precision.measure import measure
from stablekl.precision.metrics import group_error
from stablekl.precision.references.context import PrecisionError, gradient, mp
from stablekl.precision.search import Limits, Tally, explore
from stablekl.precision.subject import Subject, differentiated, divergence_of, settled
from stablekl.precision.subjects import catalogue

CPU = torch.device("cpu")
F32, F64 = torch.float32, torch.float64
DOMAINS = {"rate": "positive"}


def batches_of(domains, count=1000):
    def expand(plan, dtype):
        rng = plan.generator()
        q = scalars(domains, plan, dtype, count, rng)
        return (*related(domains, q, plan, dtype, rng).values(), *q.values())

    return expand


def positive(*batch):
    return torch.stack([(x > 0) & x.isfinite() for x in batch]).all(0)


def quotient(a, b):
    return a / b


def subject(*rules, **changes):
    """A quotient, which a processor rounds correctly, or rules that pretend to be one."""
    settings = {
        "name": "quotient",
        "parameters": ("a", "b"),
        "rules": {f"rule {i}": rule for i, rule in enumerate(rules)},
        "reference": settled(quotient),
        "draw": plans(),
        "expand": batches_of(DOMAINS),
        "valid": positive,
    }
    return Subject(**(settings | changes))


def found(*rules, dtype=F64, examples=12, seed=0, seconds=20.0, cases=(), compiled=False, **changes):
    limits = Limits(examples, seconds, seed)
    tallies = explore(subject(*rules, **changes), dtype, CPU, limits, cases, compiled)
    return tallies["rule 0"] if len(rules) == 1 else tuple(tallies.values())


def clean(tally):
    return not (tally.nan or tally.inf or tally.negative or tally.unstable or tally.failure)


# ---- nothing, and a known flaw ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, F32, F64], ids=str)
def test_nothing_in_a_correctly_rounded_rule(dtype):
    tally = found(quotient, dtype=dtype)
    assert 0.45 < tally.worst <= 0.5
    assert clean(tally)
    assert tally.evaluations >= 12_000
    assert tally.judged >= 300
    assert tally.defects == {}
    assert len(tally.samples) == tally.judged


def naive(mu_p, sigma_p, mu_q, sigma_q):
    return torch.log(sigma_q / sigma_p) + (sigma_p**2 + (mu_p - mu_q) ** 2) / (2 * sigma_q**2) - 0.5


def true_normal(mu_p, sigma_p, mu_q, sigma_q):
    return mp.log(sigma_q / sigma_p) + (sigma_p**2 + (mu_p - mu_q) ** 2) / (2 * sigma_q**2) - mp.mpf(1) / 2


NORMAL = {
    "reference": divergence_of(true_normal),
    "expand": batches_of({"loc": "real", "scale": "positive"}),
    "valid": lambda m, s, n, t: m.isfinite() & n.isfinite() & (s > 0) & (t > 0) & s.isfinite() & t.isfinite(),
    "parameters": ("mu_p", "sigma_p", "mu_q", "sigma_q"),
}


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_the_flaw_of_the_textbook_formula(dtype):
    tally = found(naive, dtype=dtype, **NORMAL)
    assert tally.worst > 1e6
    assert tally.negative > 0
    first = tally.defects["negative"]
    assert naive(*first) < 0
    assert all(x.shape == (1,) and x.dtype == dtype for x in first)
    if math.isfinite(tally.worst):
        values, truth = tally.value, [true_normal(*(mp.mpf(x.item()) for x in tally.row))]
        with mp.workprec(300):
            truth = [true_normal(*(mp.mpf(x.item()) for x in tally.row))]
        assert values == naive(*tally.row).tolist()
        assert group_error(values, truth, dtype) == pytest.approx(tally.worst), "the row gives the error again"


# ---- planted defects ----------------------------------------------------------------------------------------------


def spoiled(where, what):
    """A quotient, but ``what`` where the condition on a and b holds; right in other dtypes than the first called."""

    def rule(a, b):
        dtype.setdefault("of", a.dtype)
        hit = where(a, b) if a.dtype == dtype["of"] else torch.zeros_like(a, dtype=torch.bool)
        return torch.where(hit, torch.full_like(a, what), a / b)

    dtype: dict[str, torch.dtype] = {}
    return rule


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(
    ("kind", "what"), [("nan", math.nan), ("inf", math.inf), ("inf", -math.inf), ("negative", -1.0)]
)
def test_a_defect_in_one_regime(kind, what, dtype):
    tally = found(spoiled(lambda a, b: (a > 2.0**10) & (a < 2.0**12), what), dtype=dtype, seed=1)
    assert getattr(tally, kind) > 0
    assert 2.0**10 < tally.defects[kind][0].item() < 2.0**12
    assert tally.worst > 100
    assert tally.worst == math.inf or kind == "negative"
    others = {"nan", "inf", "negative"} - {kind} - ({"negative"} if what < 0 else set())
    assert not any(getattr(tally, other) for other in others)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_a_right_infinity_is_no_defect(dtype):
    def far(plan, dtype):
        return tuple(torch.full((20,), x, dtype=dtype) for x in (torch.finfo(dtype).max, 0.5))

    tally = found(quotient, dtype=dtype, expand=far, draw=plans(("apart",)), examples=2)
    assert clean(tally)
    assert tally.worst <= 0.5


def test_negative_results_are_a_defect_of_divergences_alone():
    def minus(a, b):
        return -(a / b)

    assert found(minus, reference=settled(minus), divergence=False).negative == 0
    assert found(minus, reference=settled(minus)).negative > 0


def test_an_implementation_that_differs_is_suspected():
    """One row in a thousand is off by 30 ulps: the sample of mpmath would miss it, the other rule points to it."""

    def rarely(a, b):
        hit = (a.view(torch.int64) % 1009) == 0
        return torch.where(hit, a / b * (1 + 30 * 2.0**-52), a / b)

    right, wrong = found(quotient, rarely, examples=6)
    assert right.worst <= 0.5
    assert 15 < wrong.worst < 61


def test_bits_that_depend_on_the_place_in_the_batch():
    def by_place(a, b):
        return a / b * (1 + torch.finfo(a.dtype).eps * (torch.arange(len(a)) % 2).to(a))

    assert found(by_place).unstable > 0
    assert found(by_place, elementwise=False).unstable == 0
    assert found(lambda a, b: a / b + 0 * (a / b).sum()).unstable == 0, "NaN and infinity apart, the same bits"


def test_a_rule_that_raises_is_a_finding():
    def raises(a, b):
        raise RuntimeError("not today\nnor tomorrow")

    broken, right = found(raises, quotient)
    assert broken.failure == "RuntimeError: not today"
    assert broken.evaluations == 0
    assert math.isnan(broken.worst)
    assert clean(right)
    assert right.evaluations > 0


def test_a_reference_that_does_not_settle_judges_nothing():
    def never(*row):
        raise PrecisionError("never")

    tally = found(quotient, reference=never)
    assert tally.judged == 0
    assert tally.evaluations > 0
    assert math.isnan(tally.worst)


def test_groups_are_judged_by_their_largest():
    def square(a, b):
        return a * a / b

    def of_gradient(*changes):
        rule = differentiated(square)
        return found(
            lambda a, b: tuple(g * (1 + c) for g, c in zip(rule(a, b), changes, strict=True)),
            reference=lambda a, b: gradient(square, a, b),
            divergence=False,
            examples=4,
        )

    assert of_gradient(0, 0).worst < 4
    assert of_gradient(0, 2.0**-40).worst > 2000
    tally = of_gradient(0, math.inf)
    assert tally.inf > 0
    assert tally.worst == math.inf


# ---- the climb ----------------------------------------------------------------------------------------------------


def peaked(a, b):
    """Right but for a peak of the error at a = 1.37: the nearer the worse, up to 2^40 ulps."""
    peak = torch.finfo(a.dtype).eps * 2 / (2.0**-40 + (a / 1.37 - 1).abs())
    return a / b * (1 + peak)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_the_climb_goes_on_from_the_worst(dtype, monkeypatch):
    changes = {"expand": batches_of(DOMAINS, 300), "draw": plans(("apart",)), "dtype": dtype, "examples": 5}
    climbed = found(peaked, **changes)
    monkeypatch.setattr(search._Search, "climb", lambda self, name: None)
    before = found(peaked, **changes)
    assert climbed.worst > 10 * before.worst
    assert abs(climbed.row[0].item() / 1.37 - 1) < 0.2 * abs(before.row[0].item() / 1.37 - 1)


def test_mutations_stay_where_they_belong():
    seeker = search._Search(subject(quotient, valid=lambda s, v: s[:, 0, 0] > 1), F64, CPU, Limits(), False)
    matrix = torch.tensor([[2.0, 0.5, 0.0], [0.5, 3.0, 0.25], [0.0, 0.25, 4.0]], dtype=F64)
    vector = torch.tensor([1.0, 0.0], dtype=F64)
    matrices, vectors = seeker.mutated((matrix.unsqueeze(0), vector.unsqueeze(0)), 200)
    assert 100 < len(matrices) <= 200
    assert torch.equal(matrices, matrices.mT)
    assert bool((matrices[:, 0, 0] > 1).all())
    assert bool((matrices[:, 0, 2] == 0).all())
    assert bool((vectors[:, 1] == 0).all())
    assert bool((vectors[:, 0] > 0).all())
    factors = (matrices / matrix).nan_to_num(1.0)
    assert 1 < factors.max() <= 4
    assert len(matrices.unique(dim=0)) > 100


# ---- seeds, limits, cases -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_the_same_seed_finds_the_same(dtype):
    a, b, c = (found(naive, dtype=dtype, examples=5, seed=seed, **NORMAL) for seed in (0, 0, 1))
    assert (a.worst, a.value, a.evaluations, a.judged, a.negative) == (
        b.worst,
        b.value,
        b.evaluations,
        b.judged,
        b.negative,
    )
    assert all(map(torch.equal, a.row, b.row))
    assert a.samples == b.samples
    assert a.samples != c.samples


def test_the_time_limit():
    def slow(a, b):
        time.sleep(0.02)
        return a / b

    start = time.monotonic()
    tally = found(slow, examples=10**5, seconds=0.5)
    assert 0.3 < time.monotonic() - start < 5
    assert tally.evaluations > 1000
    assert 1000 <= found(slow, examples=10**5, seconds=0.0).evaluations < 10_000, "one batch, always"


def test_cases_come_first():
    case = tuple(torch.tensor([x], dtype=F64) for x in (math.pi, math.e))

    def wrong_there(a, b):
        return torch.where((a == case[0]) & (b == case[1]), 2.0, a / b)

    assert found(wrong_there, examples=3).worst <= 0.5
    tally = found(wrong_there, examples=3, cases=[case])
    assert tally.worst > 1e14
    assert torch.equal(tally.row[0], case[0])


def test_compiled_rules_are_what_is_evaluated(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda rule, dynamic: compiled.append(rule) or (lambda a, b: 2 * a / b))
    assert found(quotient, compiled=True, examples=2).worst > 1e15
    assert compiled == [quotient]


@pytest.mark.slow
def test_compiled():
    tally = found(quotient, compiled=True, examples=3)
    assert clean(tally)
    assert tally.worst <= 0.5


# ---- a rule of your own -------------------------------------------------------------------------------------------


def test_measure_names_the_input():
    row = measure(naive, true_normal, pairs(loc="real", scale="positive"), examples=10, name="mine")
    assert row.rule == "mine"
    assert row.impl == "yours"
    assert row.dtype == "float64"
    assert row.worst_ulp > 1e6
    assert row.negative > 0
    assert list(row.worst_input) == ["mu_p", "sigma_p", "mu_q", "sigma_q"]
    given = (torch.tensor([float.fromhex(x)], dtype=F64) for x in row.worst_input.values())
    assert naive(*given).item().hex() == row.worst_value[0]


def test_measure_takes_the_dtype_of_the_batches_and_a_reference_in_mpmath():
    def mpmaths(a, b):
        return mpmath.mpf(a) / mpmath.mpf(b)

    for reference in (quotient, mpmaths):
        found = measure(quotient, reference, pairs(F32, 50, rate="positive"), examples=3)
        assert found.dtype == "float32"
        assert found.worst_ulp <= 0.5
    assert list(measure(torch.div, quotient, pairs(F32, 50, rate="positive"), examples=1).worst_input) == [
        "input 0",
        "input 1",
    ]


STRATEGIES = {
    "two dtypes": (st.just((torch.ones(3), torch.ones(3, dtype=F64))), "share a floating-point dtype"),
    "integers": (st.just((torch.ones(3, dtype=torch.int64),) * 2), "share a floating-point dtype"),
    "two lengths": (st.just((torch.ones(3), torch.ones(2))), "their length"),
    "numbers": (st.just((1.0, 2.0)), "tuples of tensors"),
    "a tensor": (st.just(torch.ones(3)), "tuples of tensors"),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_measure_of_what_is_no_batch(name):
    strategy, says = STRATEGIES[name]
    with pytest.raises(ValueError, match=says):
        measure(quotient, quotient, strategy)


def test_measure_by_a_reference_in_floats():
    with pytest.raises(ValueError, match=r"Python float.*mp\.log"):
        measure(quotient, lambda a, b: float(a) / float(b), pairs(rate="positive"), examples=1)


# ---- a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("name", ["Normal-Normal", "MultivariateNormal(scale_tril)-MultivariateNormal(scale_tril)"])
def test_on_a_gpu(name, dtype):
    target = catalogue()[name]
    tally = explore(target, dtype, torch.device("cuda"), Limits(15, 15.0))["stablekl"]
    assert tally.worst <= target.bars[dtype]
    assert clean(tally)
    assert tally.device_gap is not None
    assert tally.device_gap <= 2 * target.bars[dtype] * (1 if target.scale is None else 2.0**12)


def test_a_tally_begins_without_an_error():
    tally = Tally()
    assert math.isnan(tally.worst)
    tally.record((torch.zeros(1),), [[1.0]], [[mp.mpf(1)]], 0.0)
    assert tally.worst == 0
