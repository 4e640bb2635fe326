"""The metric must catch what it is there to catch."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from mpmath import mpf

from tests.ulps import ulp_error, worst_ulp

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
        with mpmath.workprec(200):
            third = mpf(k) / 3
        assert ulp_error(k / 3, third, F64) <= 0.5
        assert ulp_error(torch.tensor(k / 3, dtype=F32), third, F32) <= 0.5 + 1e-8
        # and a metric of the other dtype would not do
        assert k % 3 == 0 or ulp_error(torch.tensor(k / 3, dtype=F32), third, F64) > 1e3


def test_worst_ulp_must_see_a_bad_log1p():
    x = torch.logspace(-12, 0, 40, dtype=F64)
    with mpmath.workdps(50):
        truth = [mpmath.log1p(mpf(v)) for v in x.tolist()]
    assert worst_ulp(torch.log1p(x), truth) <= 2
    assert worst_ulp(torch.log(1 + x), truth) > 1e3


def test_worst_ulp_wants_one_truth_per_entry():
    with pytest.raises(ValueError, match="shorter"):
        worst_ulp(torch.zeros(2), [mpf(0)])
