"""What the precision suite draws: the same for the same plan, inside the domains, as close to each other as it says."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stablekl.precision.batches import (
    INTEGER,
    REACH,
    RELATIONS,
    Plan,
    from_hexadecimal,
    hexadecimal,
    moved,
    neighbours,
    pairs,
    plans,
    related,
    scalars,
    values,
)
from stablekl.precision.subjects import catalogue

DTYPES = tuple(REACH)
FAMILY = {"loc": "real", "scale": "positive", "probs": "probability", "rate": "nonnegative", "total_count": "count"}
DOMAINS = {
    "real": lambda x: x.isfinite(),
    "positive": lambda x: (x > 0) & x.isfinite(),
    "nonnegative": lambda x: (x >= 0) & x.isfinite(),
    "probability": lambda x: (x >= 0) & (x <= 1),
    "count": lambda x: (x >= 1) & (x == x.floor()),
}
KNOBS = ((0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (-1.0, 0.25, 0.5), (0.0, 0.0, 0.0))  # centre, spread, step
EVERY_PLAN = [Plan(r, seed, *knobs, 2) for r, (seed, knobs) in product(RELATIONS, enumerate(KNOBS))]


def distance(x, y):
    """In representable numbers, for numbers of one sign."""
    return (x.view(INTEGER[x.dtype]).long() - y.view(INTEGER[x.dtype]).long()).abs()


def drawn(plan, dtype, count=500):
    rng = plan.generator()
    q = scalars(FAMILY, plan, dtype, count, rng)
    return related(FAMILY, q, plan, dtype, rng), q


# ---- plans --------------------------------------------------------------------------------------------------------


def test_a_strategy_turns_every_knob_within_its_range():
    seen = []

    @settings(max_examples=100, database=None)
    @given(plans(sizes=(1, 2, 5)))
    def collect(plan):
        assert plan.relation in RELATIONS
        assert -1 <= plan.centre <= 1
        assert 0 <= plan.spread <= 1
        assert 0 <= plan.step <= 1
        seen.append(plan)

    collect()
    assert {p.relation for p in seen} == set(RELATIONS)
    assert {p.size for p in seen} == {1, 2, 5}
    assert len({p.seed for p in seen}) > 10
    assert (seen[0].spread, seen[0].step) == (1, 1), "begin with a whole range"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", EVERY_PLAN, ids=lambda p: f"{p.relation}-{p.seed}")
def test_a_plan_is_its_batch(plan, dtype):
    first, again = (torch.stack([x for side in drawn(plan, dtype) for x in side.values()]) for _ in range(2))
    assert torch.equal(first, again)
    other = Plan(plan.relation, plan.seed + 1, plan.centre, plan.spread, plan.step)
    assert not torch.equal(first, torch.stack([x for side in drawn(other, dtype) for x in side.values()]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", EVERY_PLAN, ids=lambda p: f"{p.relation}-{p.seed}")
def test_domains_and_dtypes(plan, dtype):
    for side in drawn(plan, dtype, 3000):
        for name, x in side.items():
            assert x.dtype == dtype
            assert x.shape == (3000,)
            assert bool(DOMAINS[FAMILY[name]](x).all()), name


def test_a_domain_without_values():
    plan = EVERY_PLAN[0]
    with pytest.raises(ValueError, match="'complex'"):
        values("complex", plan, plan.generator(), (3,), 1.0, np.ones(3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_fill_the_reach_and_probabilities_both_ends(dtype):
    q = scalars(FAMILY, Plan("apart", 0, 0.0, 1.0, 1.0), dtype, 5000)
    logs = q["scale"].double().log2()
    assert logs.max() > 0.98 * REACH[dtype]
    assert logs.min() < -0.98 * REACH[dtype]
    assert logs.abs().max() <= REACH[dtype]
    assert logs.abs().median() == pytest.approx(REACH[dtype] / 2, rel=0.1), "log-uniform"
    assert {0.0, 1.0} <= set(q["probs"].tolist())
    assert (q["probs"] < 2.0 ** -(REACH[dtype] // 2)).sum() > 100
    narrow = scalars(FAMILY, Plan("apart", 0, 0.5, 0.0, 1.0), dtype, 50)["scale"]
    assert narrow.double().log2().tolist() == pytest.approx([REACH[dtype] / 2] * 50, abs=0.01)


# ---- how p relates to q -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("knobs", KNOBS)
def test_near_is_a_power_of_two_of_units_in_the_last_place(dtype, knobs):
    p, q = drawn(Plan("near", 0, *knobs), dtype)
    bits = int(-math.log2(torch.finfo(dtype).eps))
    assert torch.equal(p["total_count"], q["total_count"])
    for name in ("loc", "scale", "rate"):
        apart = distance(p[name], q[name])
        steps = set(apart.tolist())
        assert steps <= {0, *(2**k for k in range(bits - 2))}, name
        assert {0, 1} <= steps
        assert max(steps) == 2 ** max(0, math.ceil(knobs[2] * (bits - 3))), "the step is what the knob says"
        assert bool((p[name].sign() == q[name].sign()).all())
        assert bool((p[name][q[name] == 0] == 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_near_is_never_equal_everywhere(dtype, count):
    x = torch.ones(count, dtype=dtype)
    for seed in range(50):
        plan = Plan("near", seed, 0.0, 0.0, 0.0)
        assert not torch.equal(neighbours(x, plan, plan.generator(), chance=0.01), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_other_relations(dtype):
    p, q = drawn(Plan("equal", 0, *KNOBS[0]), dtype)
    assert all(torch.equal(p[name], q[name]) for name in FAMILY)
    p, q = drawn(Plan("ratio", 0, 0.0, 0.5, 1.0), dtype)
    assert ((p["scale"].double() / q["scale"].double()).log2().abs() < 8).all()
    assert ((p["loc"].double() - q["loc"].double()).abs() <= 8 * q["scale"].double()).all()
    p, q = drawn(Plan("apart", 0, *KNOBS[0]), dtype)
    assert (p["scale"].double() / q["scale"].double()).log2().abs().max() > REACH[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moved(dtype):
    x = torch.tensor([1.0, -1.0, 0.5], dtype=dtype)
    infinite = torch.full_like(x, math.inf) * x.sign()
    assert torch.equal(moved(x, 1), torch.nextafter(x, infinite))
    assert torch.equal(moved(moved(x, 7), -7), x)
    assert torch.equal(
        moved(x, torch.tensor([1, 0, -1])), torch.stack([moved(x, k)[i] for i, k in enumerate((1, 0, -1))])
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pairs_of_your_own(dtype):
    kinds = set()

    @settings(max_examples=20, database=None)
    @given(pairs(dtype, 64, rate="positive", scale="positive"))
    def look(batch):
        rate_p, scale_p, rate_q, scale_q = batch
        assert all(x.dtype == dtype and x.shape == (64,) for x in batch)
        assert all(bool((x > 0).all()) for x in batch)
        kinds.add(torch.equal(rate_p, rate_q) and torch.equal(scale_p, scale_q))

    look()
    assert kinds == {True, False}


# ---- hexadecimal --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
def test_hexadecimal_says_every_bit(dtype, data):
    width = torch.finfo(dtype).bits
    bits = data.draw(st.lists(st.integers(-(2 ** (width - 1)), 2 ** (width - 1) - 1), min_size=4, max_size=4))
    x = torch.tensor(bits, dtype=INTEGER[dtype]).view(dtype).nan_to_num(nan=0.5).reshape(2, 2)
    for shaped in (x, x[0], x[0, 0]):
        back = from_hexadecimal(hexadecimal(shaped), dtype)
        assert back.shape == shaped.shape
        assert torch.equal(back.view(INTEGER[dtype]), shaped.view(INTEGER[dtype]))


def test_hexadecimal_of_nan_and_decimals_that_lose():
    assert math.isnan(float.fromhex(hexadecimal(torch.tensor(math.nan))))
    x = torch.tensor(1 / 3, dtype=torch.float64)
    assert from_hexadecimal(hexadecimal(x), torch.float64) == x
    assert float(f"{x:.6g}") != x, "must fail: six decimals"


# ---- every subject ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", catalogue())
def test_a_subject_accepts_its_own_batches(name, dtype):
    subject = catalogue()[name]
    if name.startswith("gradient ") and subject.expand == catalogue()[name.removeprefix("gradient ")].expand:
        return  # the batches of its divergence
    for relation, knobs in zip(RELATIONS, KNOBS, strict=True):
        if relation == "equal" and name.startswith("gradient "):
            continue  # they draw none: at p = q a derivative by an end of a range has one side alone
        batch = subject.expand(Plan(relation, 3, *knobs, 2), dtype)
        assert len(batch) == len(subject.parameters)
        assert {x.dtype for x in batch} == {dtype}
        assert len({len(x) for x in batch}) == 1
        assert len(batch[0]) > 0
        good = subject.valid(*batch)
        assert good.shape == (len(batch[0]),)
        assert bool(good.all()), [x[~good][0] for x in batch]
        spoiled = (batch[0].clone().fill_(math.nan), *batch[1:])
        assert not subject.valid(*spoiled).any(), "must fail: not a number"
