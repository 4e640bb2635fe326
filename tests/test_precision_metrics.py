"""The metric must catch what it is there to catch."""

from __future__ import annotations

import math

import pytest
import torch

from stablekl.precision.metrics import group_error, rough_ulps, ulp, ulp_error, worst_ulp
from stablekl.precision.references.context import exact, mp

mpf = mp.mpf
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
INF, NAN = math.inf, math.nan

CASES = {
    "exact": (1.5, mpf(1.5), F32, 0),
    "one ulp above 1": (1 + 2.0**-23, mpf(1), F32, 1),
    "one ulp below 1, in ulps at 1": (1 - 2.0**-24, mpf(1), F32, 0.5),
    "the binade is the truth's": (1.0, mpf(1) - mpf(2) ** -24, F32, 1),
    "float64": (1 + 2.0**-51, mpf(1), F64, 2),
    "float16": (1 + 2.0**-10, mpf(1), F16, 1),
    "bfloat16": (1 + 2.0**-7, mpf(1), BF16, 1),
    "sign": (-1.0, mpf(1), F32, 2.0**24),
    "far off": (0.0, mpf(1), F32, 2.0**23),
    "subnormal": (2.0**-149, mpf(2) ** -148, F32, 1),
    "subnormal float64": (5e-324, mpf(2) ** -1073, F64, 1),
    "underflow, rounded well": (0.0, mpf("1e-60"), F32, 0),
    "underflow, rounded up": (2.0**-149, mpf("1e-60"), F32, 1),
    "half of the smallest": (0.0, mpf(2) ** -150, F32, 0.5),
    "zero": (0.0, mpf(0), F32, 0),
    "negative zero": (-0.0, mpf(0), F32, 0),
    "zero expected": (2.0**-149, mpf(0), F32, 1),
    "nan": (NAN, mpf("nan"), F32, 0),
    "nan for a number": (NAN, mpf(1), F32, INF),
    "number for nan": (1.0, mpf("nan"), F32, INF),
    "infinity": (INF, mpf("inf"), F32, 0),
    "wrong infinity": (-INF, mpf("inf"), F32, INF),
    "number for infinity": (3e38, mpf("inf"), F32, INF),
    "infinity for a number": (INF, mpf("3.4e38"), F32, INF),
    "overflow, rounded well": (INF, mpf("1e39"), F32, 0),
    "overflow to the wrong side": (-INF, mpf("1e39"), F32, INF),
    "the largest number": (torch.finfo(F32).max, mpf(torch.finfo(F32).max), F32, 0),
    "the largest number for more": (torch.finfo(F32).max, mpf(2) ** 128, F32, 1),
    "65504 in float16": (INF, mpf(65504), F16, INF),
    "65520 in float16": (INF, mpf(65520), F16, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_ulp_error(name):
    computed, truth, dtype, expected = CASES[name]
    assert ulp_error(computed, truth, dtype) == pytest.approx(expected, abs=1e-9)
    assert ulp_error(torch.tensor(computed, dtype=F64), truth, dtype) == pytest.approx(expected, abs=1e-9)


def test_a_correctly_rounded_result_is_within_half():
    for k in range(1, 200):
        with mp.workprec(200):
            third = mpf(k) / 3
        assert ulp_error(k / 3, third, F64) <= 0.5
        assert ulp_error(torch.tensor(k / 3, dtype=F32), third, F32) <= 0.5 + 1e-8
        # and a metric of the other dtype would not do
        assert k % 3 == 0 or ulp_error(torch.tensor(k / 3, dtype=F32), third, F64) > 1e3


def test_worst_ulp_must_see_a_bad_log1p():
    x = torch.logspace(-12, 0, 40, dtype=F64)
    with mp.workdps(50):
        truth = [mp.log1p(mpf(v)) for v in x.tolist()]
    assert worst_ulp(torch.log1p(x), truth) <= 2
    assert worst_ulp(torch.log(1 + x), truth) > 1e3


def test_worst_ulp_wants_one_truth_per_entry():
    with pytest.raises(ValueError, match="shorter"):
        worst_ulp(torch.zeros(2), [mpf(0)])


@pytest.mark.parametrize(
    ("dtype", "exponents"), [(F16, (-24, 5)), (BF16, (-133, 120)), (F32, (-149, 104)), (F64, (-1074, 971))]
)
def test_an_ulp_is_the_distance_to_the_next_number(dtype, exponents):
    info = torch.finfo(dtype)
    assert ulp(mpf(0), dtype) == ulp(mpf(info.tiny) / 2, dtype) == mpf(2) ** exponents[0]
    assert ulp(mpf(info.max), dtype) == ulp(4 * mpf(info.max), dtype) == mpf(2) ** exponents[1]
    for x in (1.0, -3.0, 0.7):
        above = torch.nextafter(torch.tensor(x, dtype=dtype), torch.tensor(2 * x, dtype=dtype)).item()
        assert ulp(mpf(torch.tensor(x, dtype=dtype).item()), dtype) == abs(above - torch.tensor(x, dtype=dtype).item())


# ---- groups -------------------------------------------------------------------------------------------------------

GROUPS = {
    "in ulps of the largest": ([1.0, 2.0**-23], [1, 0], None, 1),
    "which a small one alone would fail": ([2.0**-23], [2.0**-24], None, 2.0**23),
    "infinities leave the unit alone": ([INF, 1 + 2.0**-23], [mp.inf, 1], None, 1),
    "no largest": ([2.0**-149], [0], None, 1),
    "none at all": ([], [], None, 0),
    "a scale instead": ([1 + 2.0**-20], [1], 4.0, 2),
    "a scale that is large excuses much": ([5.0], [1], 2.0**25, 1),
    "but not NaN": ([NAN], [1], 2.0**25, INF),
    "nor an infinity": ([1.0, INF], [1, 1], 2.0**25, INF),
    "NaN is no number of the group": ([NAN, 1.0], [mp.nan, 1], None, 0),
}


@pytest.mark.parametrize("name", GROUPS)
def test_group_error(name):
    computed, truth, scale, expected = GROUPS[name]
    assert group_error(computed, [mpf(t) for t in truth], F32, scale) == expected


def test_the_last_bits_of_a_truth_count():
    with mp.workprec(200):
        truth = mpf(1) + mp.ldexp(1, -25)
    assert ulp_error(1.0, truth, F32) == 0.25, "compared at more than the context's own 53 bits"
    assert ulp_error(1.0, truth, F64) == 2.0**27
    with mp.workprec(200):
        truth = mpf(1) + mp.ldexp(1, -60)
    assert ulp_error(1.0, truth, F64) == 2.0**-8


# ---- whole batches ------------------------------------------------------------------------------------------------

SPECIAL = [0.0, -0.0, 1.0, INF, -INF, NAN, 5e-324, 1e-320, 2.0**-149, 1e-40, 3e38, 3.5e38, 1e308, 65504.0, 65520.0]


def random_numbers(seed: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    """Every bit pattern alike: subnormals, infinities and NaN among them; and the special ones."""
    width = {F16: torch.int16, BF16: torch.int16, F32: torch.int32, F64: torch.int64}[dtype]
    info = torch.iinfo(width)
    bits = torch.randint(info.min, info.max, (n,), generator=torch.Generator().manual_seed(seed), dtype=width)
    return torch.cat([bits.view(dtype), torch.tensor(SPECIAL, dtype=F64).to(dtype)])


def judged(computed: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    pairs = zip(computed.double().tolist(), truth.tolist(), strict=True)
    return torch.tensor([group_error([c], [mpf(t)], computed.dtype) for c, t in pairs], dtype=F64)


def disagreement(rough, computed: torch.Tensor, truth: torch.Tensor) -> int:
    """How many of the errors differ by more than the rounding of one."""
    a, b = rough(computed, truth, computed.dtype), judged(computed, truth)
    return int((~((a == b) | ((a - b).abs() <= 1e-9 * b.abs()))).sum())


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
def test_rough_ulps_are_those_of_group_error(dtype):
    computed = random_numbers(0, 3000, dtype)
    wide = computed.double()
    g = torch.Generator().manual_seed(1)
    near = wide * (1 + torch.finfo(dtype).eps * torch.randn(len(wide), generator=g, dtype=F64))
    for truth in (near, wide, wide.flip(0), -wide / 256, random_numbers(2, 3000, dtype).double()):
        assert disagreement(rough_ulps, computed, truth) == 0


def test_rough_ulps_next_to_overflow():
    """The one difference: of truths between the largest number and half an ulp beyond, infinity is forgiven."""
    largest = torch.finfo(F32).max
    truth = torch.tensor([largest * (1 + 2.0**-26)], dtype=F64)
    infinite = torch.tensor([INF], dtype=F32)
    assert judged(infinite, truth) == INF
    assert rough_ulps(infinite, truth, F32) == 0
    assert disagreement(rough_ulps, infinite, 2 * truth) == 0


def test_a_relative_error_is_no_substitute():
    """Must fail: the error relative to the truth, in eps."""

    def relative(computed, truth, dtype):
        return (computed.double() - truth).abs() / truth.abs() / torch.finfo(dtype).eps

    computed = random_numbers(0, 1000, F32)
    assert disagreement(relative, computed, random_numbers(2, 1000, F32).double()) > 500


def test_exact_numbers_are_exact():
    x = random_numbers(5, 200, F64)
    for value, number in zip(x.tolist(), exact(x), strict=True):
        assert math.isnan(value) or float(number) == value
