"""Distribution functions of Gamma, Chi2, InverseGamma and Beta, in both tails, against mpmath."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from stablekl import Beta, Chi2, Gamma, InverseGamma
from stablekl.precision.references.context import agreed, mp
from stablekl.precision.references.room import room
from stablekl.precision.references.tails import FUNCTIONS, TAILS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch._prims_common.check. is deprecated:FutureWarning"),
]
F64 = torch.float64
T = partial(torch.tensor, dtype=F64)
CLASSES = {"Beta": Beta, "Chi2": Chi2, "Gamma": Gamma, "InverseGamma": InverseGamma}
# x and the parameters: both sides of the mean and of where the formula changes; extremes
CASES = [
    *(("Gamma", (34.23, 43.59, 1.0)), ("Gamma", (1183.0, 1320.0, 1.0)), ("Gamma", (1e12 - 3e6, 1e12, 1.0))),
    *(("Gamma", (x, a, 1.0)) for x in (0.2499, 0.25, 3.0) for a in (1e-3, 0.5, 0.9999, 1.0)),
    *(("Gamma", (1e-4, 1e-12, 1.0)), ("Gamma", (1e-300, 1e-12, 1.0)), ("Gamma", (650.0, 1e-12, 1.0))),
    *(("Gamma", (1e-200, 3.0, 1e-200)), ("Gamma", (0.5, 1e5, 3e5)), ("Chi2", (300.0, 100.0)), ("Chi2", (1e-5, 0.25))),
    *(("InverseGamma", (2.0, 3.0, 1.0)), ("InverseGamma", (1e5, 0.3, 2.0)), ("InverseGamma", (1e-2, 3.0, 2.0))),
    *(("Beta", (0.3, 30.0, 70.0)), ("Beta", (0.29999, 3e8, 7e8)), ("Beta", (1e-5, 1e-12, 1e-12))),
    *(("Beta", (x, 0.5, 0.75)) for x in (1e-9, 0.5, 0.51, 0.999)),
    *(("Beta", (x, 0.01, 8.0)) for x in (1e-3, 0.031, 0.032, 0.9)),
    *(("Beta", (x, 40.0, 0.3)) for x in (1e-3, 0.99, 0.993, 0.994, 1 - 1e-9)),
    ("Beta", (0.12359580687057627, 677286797617.2773, 4802587810137.014)),
    ("Beta", (0.9999, 8836215060.907732, 1021909.8655577465)),
    *(("Beta", (0.5, 1.0, 1.0)), ("Beta", (1e-9, 1e-3, 1e9)), ("Beta", (0.5, 2.0, 1e-12))),
]


def build(name, *theta):
    return CLASSES[name](*theta, validate_args=False)


def truths(name, *row):
    def at():
        with mp.workprec(mp.prec + room(row)):
            return list(TAILS[name](*row))

    return agreed(at)


def of_all(name, x, *theta):
    d = build(name, *theta)
    return tuple(getattr(d, f)(x) for f in FUNCTIONS)


@pytest.mark.parametrize(("name", "row"), CASES)
def test_accuracy(name, row):
    x, *theta = (T([v]) for v in row)
    for f, got, truth in zip(FUNCTIONS, of_all(name, x, *theta), truths(name, *map(mp.mpf, row)), strict=True):
        if mp.mpf("1e-300") < abs(truth) < mp.mpf("1e300"):
            unit = abs(truth) * max(1, abs(mp.log(abs(truth)))) * mp.mpf(2) ** -52
            assert abs(got.item() - truth) < 8 * unit, f
        else:
            assert abs(got.item()) < 1e-299 or abs(got.item()) > 1e299, f


def test_torchs_own_is_off_by_millions_of_ulps():
    """Must fail: torch's incomplete gamma function, and its class for Beta."""
    truth = truths("Gamma", mp.mpf(34.23), mp.mpf(43.59), mp.mpf(1))[0]
    theirs = torch.distributions.Gamma(T(43.59), T(1.0)).cdf(T(34.23))
    assert abs(theirs.item() - truth) > 1e6 * 2.0**-53 * truth
    with pytest.raises(NotImplementedError):
        torch.distributions.Beta(T(2.0), T(2.0)).cdf(T(0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounded_once(dtype):
    x, a, b = (torch.tensor(v, dtype=dtype) for v in ([[0.25, 0.5, 0.75]], [[3.0], [0.5]], [2.0, 0.5, 3.0]))
    for name in ("Gamma", "InverseGamma", "Beta"):
        wide = of_all(name, x.double(), a.double(), b.double())
        for got, expected in zip(of_all(name, x, a, b), wide, strict=True):
            assert got.dtype == dtype
            assert got.shape == (2, 3)
            assert torch.equal(got, expected.to(dtype))


@pytest.mark.parametrize("name", CLASSES)
def test_ends_and_outside(name):
    theta = [T(v).requires_grad_() for v in ([0.5, 1.0, 1e12, 1e-300], [0.5, 2.0, 3.0, 1.0])]
    theta = theta[: 1 if name == "Chi2" else 2]
    ends = (-1.0, 0.0, 1.0, 2.0) if name == "Beta" else (-math.inf, -1.0, 0.0, math.inf)
    for v, low in zip(ends, (0.0, 0.0, 1.0, 1.0) if name == "Beta" else (0.0, 0.0, 0.0, 1.0), strict=True):
        x = torch.full((4,), v, dtype=F64, requires_grad=True)
        cdf, sf, log_cdf, log_sf = of_all(name, x, *theta)
        assert cdf.tolist() == [low] * 4
        assert sf.tolist() == [1 - low] * 4
        assert log_cdf.tolist() == [0.0 if low else -math.inf] * 4
        assert log_sf.tolist() == [-math.inf if low else 0.0] * 4
        for g in torch.autograd.grad(cdf.sum() + sf.sum(), [x, *theta]):
            assert bool(g.isfinite().all())
    assert all(bool(f.isnan().all()) for f in of_all(name, T([math.nan]), *(t.detach()[:1] for t in theta)))


def test_validated_as_torch_does():
    with pytest.raises(ValueError, match="support"):
        Beta(T(1.0), T(2.0)).cdf(T(1.5))
    with pytest.raises(ValueError, match="support"):
        Gamma(T(1.0), T(2.0)).log_sf(T(-1.0))


def test_complements_and_order():
    """Both sum to 1, and the functions are monotone over the seams of the formulas."""
    x = torch.linspace(0.001, 0.999, 997, dtype=F64)
    for a in (1e-9, 0.3, 0.99, 1.0, 1.01, 7.0, 300.0):
        for b in (1e-3, 0.9, 1.0, 40.0):
            for d in (Beta(T(a), T(b)), Gamma(T(a), T(b))):
                cdf, sf = d.cdf(x), d.sf(x)
                assert float((cdf + sf - 1).abs().max()) < 4e-16
                assert bool((cdf.diff() >= -2e-15 * cdf[1:]).all())
                assert bool((sf.diff() <= 2e-15 * sf[:-1]).all())


def test_many_rows_are_the_same_rows():
    x = torch.linspace(0.01, 0.99, 9000, dtype=F64)
    assert torch.equal(Beta(T(3.0), T(0.5)).cdf(x)[::1000], Beta(T(3.0), T(0.5)).cdf(x[::1000]))


# ------------------------------------------------------------------------------------------------- derivatives

ROWS = {
    "Gamma": (
        [34.0, 1.0, 0.1, 0.2, 3.0, 0.05, 50.0],
        [43.0, 0.5, 0.3, 2.0, 2.0, 0.1, 30.0],
        [1.0, 0.5, 0.5, 1, 2, 1, 1.2],
    ),
    "Chi2": ([34.0, 1.0, 0.3], [43.0, 0.5, 0.3]),
    "Beta": (
        [0.3, 0.5, 0.05, 0.9, 0.99, 0.4, 0.6, 0.2],
        [30.0, 0.5, 0.3, 20.0, 5.0, 0.4, 200.0, 0.5],
        [70.0, 0.5, 9.0, 2.0, 0.2, 0.8, 130.0, 300.0],
    ),
}
ROWS["InverseGamma"] = ROWS["Gamma"]


@pytest.mark.parametrize("name", ROWS)
def test_gradcheck(name):
    leaves = [T(v).requires_grad_() for v in ROWS[name]]
    f = partial(of_all, name)
    assert gradcheck(f, leaves, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(f, leaves, fast_mode=True)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("Gamma", (34.23, 43.59)),
        ("Gamma", (0.1, 1e-3)),
        ("Gamma", (40.0, 3.0)),
        ("Beta", (0.3, 30.0, 7.0)),
        ("Beta", (0.99, 5.0, 0.2)),
        ("Beta", (0.01, 0.3, 0.7)),
    ],
)
def test_accuracy_of_derivatives(name, row):
    numbers = [mp.mpf(v) for v in (*row, 1.0)[:3]]
    leaves = [T(v).requires_grad_() for v in (*row, 1.0)[:3]]
    got = torch.autograd.grad(build(name, *leaves[1:]).cdf(leaves[0]), leaves)
    with mp.workdps(60):
        for i, g in enumerate(got):
            truth = mp.diff(lambda v, i=i: TAILS[name](*numbers[:i], v, *numbers[i + 1 :]).cdf, numbers[i])
            assert abs(g.item() - truth) < 64 * 2.0**-53 * abs(truth)


@pytest.mark.parametrize("name", ROWS)
def test_transforms(name):
    inputs = [T(v) for v in ROWS[name]]
    argnums = tuple(range(len(inputs)))

    def f(*v):
        return sum(of_all(name, *v))

    leaves = [v.clone().requires_grad_() for v in inputs]
    expected = torch.autograd.grad(f(*leaves).sum(), leaves)
    for g, e in zip(torch.vmap(torch.func.jacrev(f, argnums))(*inputs), expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("name", ["Gamma", "Beta"])
def test_compile(name):
    leaves = [T(v).requires_grad_() for v in ROWS[name]]

    def f(*v):
        return build(name, *v[1:]).cdf(v[0])

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*leaves), f(*leaves), rtol=1e-15, atol=0)
    found, expected = (torch.autograd.grad(g(*leaves).sum(), leaves) for g in (compiled, f))
    for g, e in zip(found, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-14, atol=0)


def test_far_tails_have_gradients():
    """The logarithms where the tails themselves are 0."""
    x = T([1e4, 1e-4]).requires_grad_()
    gamma = Gamma(T(30.0), T(1.0))
    (slope,) = torch.autograd.grad(gamma.log_sf(x)[0] + gamma.log_cdf(x)[1], x)
    assert gamma.sf(x)[0] == 0
    assert slope[0].item() == pytest.approx(-1 + 29 / 1e4, rel=1e-5)
    assert slope[1].item() == pytest.approx(30 / 1e-4, rel=1e-4)
