"""Double-double arithmetic against mpmath."""

from __future__ import annotations

import math

import pytest
import torch
from mpmath import mp

from stablekl import _double, _double_gamma, _fused
from stablekl._double import add, constant, divide, double, exp, expm1, log, log1p, multiply, subtract
from stablekl._double_gamma import lgamma

COUNT = 60


@pytest.fixture(params=["kernels", "operations"], autouse=True)
def evaluated_by(request, monkeypatch):
    """Every test with the kernels in C, where there are any, and with torch's operations."""
    if request.param == "operations":
        monkeypatch.setattr(_fused, "_library", None)
    elif _fused._library is None:
        pytest.skip("installed without a C compiler")


def exact(x, i):
    return mp.mpf(x.hi[i].item()) + mp.mpf(x.lo[i].item())


def numbers(low, high, signed=False, seed=0, count=COUNT):
    """Doubles between 10^low and 10^high, some of them of one part."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(4, count, dtype=torch.float64, generator=generator)
    hi = 10 ** (low + (high - low) * u[0])
    hi = torch.where(u[1] < 0.5, -hi, hi) if signed else hi
    lo = torch.where(u[2] < 0.3, 0.0, hi * 2.0**-54 * (2 * u[3] - 1))
    return _double.exact_sum(hi, lo)


def error(f, truth, *arguments, absolute=False):
    """The largest relative error; of those results that are less than 1 the absolute one on request."""
    result, worst = f(*arguments), mp.mpf(0)
    assert (result.hi + result.lo == result.hi).all()
    with mp.workdps(200):
        for i in range(len(result.hi)):
            value = truth(*(exact(x, i) for x in arguments))
            unit = max(abs(value), 1) if absolute else abs(value)
            worst = max(worst, abs(exact(result, i) - value) / unit if unit else abs(exact(result, i)))
    return worst


@pytest.mark.parametrize(
    ("f", "truth"),
    [
        (add, lambda x, y: x + y),
        (subtract, lambda x, y: x - y),
        (multiply, lambda x, y: x * y),
        (divide, lambda x, y: x / y),
    ],
)
def test_operations(f, truth):
    assert error(f, truth, numbers(-140, 140, True), numbers(-140, 140, True, 1)) < 6e-32


def test_sums_cancel_without_loss():
    x = numbers(-140, 140, True)
    y = _double.exact_sum(x.hi * (1 + 2.0**-40), x.lo * 0.3)
    assert error(subtract, lambda x, y: x - y, x, y) < 2e-32
    assert (subtract(x, x).hi == 0).all()


RANGES = [(-290, -1), (-3, 3), (1, 290)]


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_logarithms(low, high):
    x = numbers(low, high)
    assert error(log, mp.log, x) < 8e-32
    assert error(log1p, mp.log1p, x) < 8e-32


def test_logarithms_near_their_zeros():
    x = numbers(-25, -0.5, True)
    assert error(log, mp.log, add(x, 1.0)) < 8e-32
    assert error(log1p, mp.log1p, numbers(-150, -0.001, True)) < 8e-32


@pytest.mark.parametrize(("low", "high"), [(-290, -1), (-3, 0), (0, 2.8)])
def test_exponentials(low, high):
    x = numbers(low, high, True)
    assert error(exp, mp.exp, x) < 8e-32
    assert error(expm1, mp.expm1, x) < 8e-32


@pytest.mark.parametrize(("low", "high"), [(-60, 0), (-1, 1.3), (1.31, 30), (30, 60)])
def test_log_gamma(low, high):
    x = numbers(low, high, count=20)
    half = mp.mpf(1) / 2
    rest = error(
        lambda x: _double_gamma.stirling(x).lgamma,
        lambda x: mp.loggamma(x) - (x - half) * mp.log(x) + x - mp.log(2 * mp.pi) / 2,
        x,
        absolute=high < 1.31,
    )
    slope = error(
        lambda x: _double_gamma.stirling(x).digamma,
        lambda x: mp.log(x) - 1 / (2 * x) - mp.psi(0, x),
        x,
        absolute=high < 1.31,
    )
    assert max(rest, slope) < (4e-30 if high < 1.31 else 1e-31)
    assert error(lgamma, mp.loggamma, x, absolute=True) < 4e-30
    assert error(_double_gamma.digamma, lambda x: mp.psi(0, x), x, absolute=True) < 1e-30


def test_float64_has_not_these_digits():
    x = numbers(-3, 3)
    plain = error(lambda x: double(torch.log1p(x.hi)), mp.log1p, x)
    assert plain > 1e-17


def test_ends():
    ends = torch.tensor([0.0, math.inf, -1.0, math.nan, 1.0], dtype=torch.float64)
    torch.testing.assert_close(log(ends).hi, ends.log(), equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(log1p(ends).hi, ends.log1p(), equal_nan=True, rtol=1e-15, atol=0)
    ends = torch.tensor([-math.inf, math.inf, 709.7, 710.0, -800.0], dtype=torch.float64)
    torch.testing.assert_close(exp(ends).hi, ends.exp(), rtol=1e-14, atol=0)
    torch.testing.assert_close(expm1(ends).hi, ends.expm1(), rtol=1e-14, atol=0)


def test_constants():
    with mp.workdps(50):
        for (hi, lo), value in (
            (_double.LOG_2, mp.log(2)),
            (_double.PI, mp.pi),
            (_double.EULER, mp.euler),
            (_double.HALF_LOG_TAU, mp.log(2 * mp.pi) / 2),
        ):
            assert abs(mp.mpf(hi) + mp.mpf(lo) - value) < 1e-32 * value
        assert abs(mp.fsum(_double._LOG_2_PARTS) - mp.log(2)) < 1e-46


def test_operands_broadcast_and_may_be_numbers():
    x, y = torch.rand(3, dtype=torch.float64), torch.rand(2, 1, dtype=torch.float64)
    assert multiply(x, y).hi.shape == add(x, double(y)).lo.shape == (2, 3)
    torch.testing.assert_close(_double.rounded(_double.total(x, y, 1.0)), x + y + 1)
    torch.testing.assert_close(divide(1.0, x).hi, 1 / x)
    thirds = multiply(x, constant(_double.Fraction(1, 3)))
    torch.testing.assert_close(_double.rounded(multiply(thirds, 3.0)), x, rtol=0, atol=0)


def test_compiled_gives_the_same_digits(monkeypatch):
    # Inductor's code for a CPU keeps every rounding; its compiler takes a minute for log
    monkeypatch.setattr(_fused, "_library", None)  # no tracing goes through a kernel
    for f, arguments, backend in ((divide, (-3, -2), "inductor"), (log, (-3,), "aot_eager")):
        x = [numbers(low, 3, seed=-low) for low in arguments]
        compiled = torch.compile(f, fullgraph=True, backend=backend)
        for a, b in zip(compiled(*x), f(*x), strict=True):
            assert torch.equal(a, b)


def test_bits_depend_on_the_values_alone():
    x = numbers(-3, 3, count=2 * 64 + 3)
    for f in (log, lambda x: _double_gamma.stirling(x).lgamma, lambda x: _double_gamma.stirling(x).digamma):
        whole = f(x)
        for i in (0, 63, 64, 2 * 64 + 2):
            one = f(_double.Double(x.hi[i], x.lo[i]))
            assert (one.hi, one.lo) == (whole.hi[i], whole.lo[i])
        strided = f(_double.Double(*(v.repeat_interleave(2)[::2] for v in x)))
        assert torch.equal(strided.hi, whole.hi)
        assert torch.equal(strided.lo, whole.lo)
        column = f(_double.Double(x.hi.unsqueeze(-1).expand(-1, 2), x.lo.unsqueeze(-1).expand(-1, 2)))
        assert torch.equal(column.lo[:, 1], whole.lo)
