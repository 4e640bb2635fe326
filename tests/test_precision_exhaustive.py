"""The sweeps over all float32: every argument counts once, the worst is mpmath's, and a wrong function is caught."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import stablekl
from stablekl.precision import exhaustive
from stablekl.precision.exhaustive import EDGES, NAMES, PRIMITIVES, Primitive, sweep
from stablekl.precision.metrics import group_error, rough_ulps
from stablekl.precision.references.context import agreed, mp
from stablekl.precision.run import _swept_row
from stablekl.precision.subjects import special

BINADE = 2**23
BINADES = (126, 382)  # leading nine bits of the arguments: [1/2, 1) of both signs


@pytest.fixture(autouse=True)
def one_thread():
    """As in the processes of a sweep; two threads wait for each other on a machine that is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", NAMES)
def test_two_binades(name):
    for records in (sweep(name, binades=range(b, b + 1)) for b in BINADES):
        assert [r.impl for r in records] == list(PRIMITIVES[name].rules)
        for record in records:
            assert sum(record.counts) == BINADE
            assert record.nan == record.inf == 0
            assert record.judged <= 2
            assert record.seconds > 0
            again = PRIMITIVES[name].rules[record.impl](torch.full((64,), record.worst_input))[0]  # vectorised, too
            truth = agreed(lambda x=record.worst_input: PRIMITIVES[name].reference(mp.mpf(x)))
            assert again.item() == record.worst_value
            assert group_error([record.worst_value], [truth], torch.float32) == record.worst
            assert mp.nstr(truth, 20) == record.worst_truth
            top = next(i for i, edge in enumerate(EDGES) if record.worst <= edge)
            assert record.counts[top], "a bin for the worst"
            assert not any(record.counts[top + 2 :])
        best = next(r for r in records if r.impl == "stablekl")
        assert best.worst <= 0.51
        assert sum(best.counts[:3]) == BINADE
        assert max(r.worst for r in records) > best.worst, "the others are not as good"


def test_a_row_sums_its_parts():
    parts = [sweep("softplus_scale", binades=range(b, b + 1))[0] for b in BINADES]
    row = _swept_row(parts, "cpu")
    assert sum(row.histogram.values()) == row.evaluations == 2 * BINADE
    assert row.worst_ulp == max(p.worst for p in parts)
    assert len(row.histogram) == len(EDGES)


def test_the_primitives_are_those_of_the_search():
    for name, (ours, _, truth) in special.ONE_ARGUMENT.items():
        assert PRIMITIVES[name].rules["stablekl"] is ours
        assert PRIMITIVES[name].reference is truth


@pytest.mark.parametrize(
    ("what", "worst", "nan", "inf"),
    [
        (lambda x: x * (1 + 2.0**-20), 16, 0, 0),
        (lambda x: x.new_tensor(math.nan), 0.5, 1, 0),
        (lambda x: x / 0, 0.5, 0, 1),
    ],
    ids=["an error", "NaN", "infinity"],
)
def test_one_wrong_argument_in_a_binade_is_caught(what, worst, nan, inf, monkeypatch):
    place = torch.tensor(0.7)

    def planted(x):
        y = torch.nn.functional.relu(x)
        hit = x == place
        return torch.where(hit, what(y), y) if bool(hit.any()) else y

    primitive = Primitive({"planted": planted}, lambda x: x.clamp(min=0), lambda x: max(x, mp.mpf(0)))
    monkeypatch.setitem(exhaustive.PRIMITIVES, "log1pmx", primitive)
    (record,) = sweep("log1pmx", binades=range(126, 127))
    wrong = nan + inf
    assert (record.nan, record.inf) == (nan, inf)
    assert record.defect == (place.item() if wrong else None)
    assert sum(record.counts) == BINADE
    assert record.counts[-1] == 1
    assert (record.worst_input == place.item()) is (not wrong)
    assert record.worst <= 0 if wrong else 8 <= record.worst <= worst
    line = _swept_row([record], "cpu")
    assert (line.nan, line.inf, line.worst_ulp) == (nan, inf, math.inf if wrong else record.worst)
    assert set(line.defects) == ({"nan"} if nan else {"inf"} if inf else set())


def test_the_truths_in_float64_are_good_to_a_part_of_an_ulp():
    for name in NAMES:
        g = torch.Generator().manual_seed(0)
        x = torch.exp2(60 * torch.rand(150, generator=g) - 40) * (1 - 2 * (torch.arange(150) % 2))
        x = x[x > -1] if name == "log1pmx" else x[x.abs() < 80]
        wide = PRIMITIVES[name].wide(x.double()).tolist()
        for v, w in zip(x.tolist(), wide, strict=True):
            truth = agreed(lambda v=v, name=name: PRIMITIVES[name].reference(mp.mpf(v)))
            assert group_error([w], [truth], torch.float32) <= 2.0**-12, (name, v)


def test_ulps_by_bits_are_rough_ulps():
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (20_000,), generator=g, dtype=torch.int32)
    computed = bits.view(torch.float32)
    near = computed.double() * (1 + 2.0**-24 * torch.randn(len(bits), generator=g, dtype=torch.float64))
    far = torch.exp2(600 * torch.rand(len(bits), generator=g, dtype=torch.float64) - 300)
    subnormal = torch.exp2(-125 - 30 * torch.rand(len(bits), generator=g, dtype=torch.float64))
    for truth in (near, far, -far, subnormal, near.roll(1), torch.zeros_like(far)):
        for keep in (slice(None), computed.isfinite() & truth.isfinite()):
            c, t = computed[keep], truth[keep]
            assert torch.equal(exhaustive._ulps(c, t), rough_ulps(c, t, torch.float32))


# ---- the numbers of the references --------------------------------------------------------------------------------

DIGITS = """
import mpmath.libmp
import torch
from stablekl.precision.references import FAMILIES
from stablekl.precision.references.context import mp
from stablekl.precision.references.family import divergence
from stablekl.precision.references.multivariate_normal import Gaussian, kl
from stablekl.precision.references.special import log_ndtr_at
number = lambda *x: tuple(map(mp.mpf, x))
families = [FAMILIES[n] for n in ("Gamma", "Beta", "Normal")]
values = [divergence(f, number(1.25, 0.5), f, number(1.25, 0.7)) for f in families]
values += [log_ndtr_at(mp.mpf(-3.5))]
root = [list(number(1, 0)), list(number(0.3, 0.1))]
values += [kl(Gaussian(list(number(0, 1)), "scale_tril", root), Gaussian(list(number(1, 0.1)), "covariance_matrix",
              [list(number(2, 0.1)), list(number(0.1, 1))]))]
print(mpmath.libmp.BACKEND)
print([tuple(map(int, v._mpf_)) for v in values])
"""


def digits(**environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", DIGITS],
        cwd=Path(stablekl.__file__).parent.parent,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


@pytest.mark.skipif(importlib.util.find_spec("gmpy2") is None, reason="gmpy2 is not installed")
def test_gmpy2_changes_no_bit():
    with_it, without = digits(), digits(MPMATH_NOGMPY="1")
    assert (with_it[0], without[0]) == ("gmpy", "python")
    assert with_it[1] == without[1]
    assert len(with_it[1]) > 400, "numbers of hundreds of bits"
