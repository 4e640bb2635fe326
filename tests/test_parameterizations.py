"""`stablekl.parameterizations`: values against mpmath, inverses, gradients that stay alive, errors that help."""

from __future__ import annotations

import math
from functools import partial

import mpmath
import pytest
import torch
from mpmath import mpf

from stablekl import parameterizations as P
from stablekl.precision.metrics import ulp_error, worst_ulp

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
INF, NAN = math.inf, math.nan


def mp_softplus(x, floor=0.0):
    with mpmath.workdps(60):
        low = mpf(floor) + mpmath.log1p(mpmath.exp(mpf(x)))
    with mpmath.workdps(90):
        high = mpf(floor) + mpmath.log1p(mpmath.exp(mpf(x)))
        assert abs(low - high) <= abs(high) * mpf(10) ** -50
    return high


def points(dtype):
    wide = torch.tensor([-1e4, -800.0, -104.0, -100.0, -88.0, -50.0, 50.0, 800.0, 1e4], dtype=F64)
    return torch.cat([torch.linspace(-40, 40, 401, dtype=F64), wide]).to(dtype)


# --- softplus ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bar"), [(F16, 0.51), (BF16, 0.51), (F32, 0.51), (F64, 2)], ids=str)
def test_softplus_value(dtype, bar):
    x = points(dtype)
    assert worst_ulp(P.softplus_scale(x), map(mp_softplus, x.double().tolist())) <= bar
    floor = 0.0625
    assert worst_ulp(P.softplus_scale(x, floor), (mp_softplus(v, floor) for v in x.double().tolist())) <= bar + 0.51


def test_softplus_of_torch_fails():
    x = points(F64)
    assert worst_ulp(torch.nn.functional.softplus(x), map(mp_softplus, x.tolist())) > 1e3


@pytest.mark.parametrize(("dtype", "lowest"), [(F32, -103.0), (F64, -744.0)], ids=str)
def test_softplus_underflows_no_earlier_than_exp(dtype, lowest):
    x = torch.tensor([lowest], dtype=dtype, requires_grad=True)
    y = P.softplus_scale(x)
    (g,) = torch.autograd.grad(y, x, create_graph=True)
    (h,) = torch.autograd.grad(g, x)
    for t in (y, g, h):
        assert ulp_error(t, mp_softplus(lowest), dtype) <= 1


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_softplus_gradient(dtype):
    x = points(dtype).requires_grad_()
    (g,) = torch.autograd.grad(P.softplus_scale(x, 0.1).sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), x)
    with mpmath.workdps(60):
        slope = [1 / (1 + mpmath.exp(-mpf(v))) for v in x.tolist()]
        bend = [s * s * mpmath.exp(-mpf(v)) for s, v in zip(slope, x.tolist(), strict=True)]
    assert worst_ulp(g, slope) <= 3
    assert worst_ulp(h, bend) <= 6


def test_softplus_boundaries():
    y = P.softplus_scale(torch.tensor([-INF, INF, NAN]), 0.5)
    torch.testing.assert_close(y, torch.tensor([0.5, INF, NAN]), equal_nan=True)


@pytest.mark.parametrize("floor", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
def test_softplus_inverse(dtype, floor):
    scale = floor + torch.logspace(-3, 3, 61, dtype=F64)
    scale = scale.to(dtype)
    back = P.softplus_scale(P.inverse_softplus_scale(scale, floor), floor)
    # x itself is rounded: next to a large |x| that costs its size in ulps
    torch.testing.assert_close(back, scale, rtol=10 * torch.finfo(dtype).eps, atol=0)
    tiny = torch.tensor([1e-30, 1e-10, 30.0, 700.0], dtype=F64)
    with mpmath.workdps(80):
        truth = [mpmath.log(mpmath.expm1(mpf(v))) for v in tiny.tolist()]
    assert worst_ulp(P.inverse_softplus_scale(tiny), truth) <= 2


# --- bounded log-scale ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bar"), [(F16, 1), (BF16, 1), (F32, 12), (F64, 12)], ids=str)
def test_bounded_value(dtype, bar):
    x = points(dtype)
    with mpmath.workdps(40):
        t = [(mpf(v) - 1) / 4 for v in x.double().tolist()]
        truth = [mpmath.exp(1 + 4 * u / mpmath.sqrt(1 + u * u)) for u in t]
    assert worst_ulp(P.bounded_log_scale(x, -3.0, 5.0), truth) <= bar


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
def test_bounded_is_monotone_within_bounds_and_alive(dtype):
    x = torch.cat([points(dtype).sort().values, torch.tensor([INF], dtype=dtype)])
    y = P.bounded_log_scale(x, -3.0, 3.0)
    assert bool((y.diff() >= 0).all())
    slack = 1 + 4 * torch.finfo(dtype).eps
    assert math.exp(-3) / slack <= float(y[0]) <= float(y[-1]) <= math.exp(3) * slack
    far = torch.tensor([-1e4, 1e4], dtype=F32, requires_grad=True)
    (g,) = torch.autograd.grad(P.bounded_log_scale(far, -3.0, 3.0).sum(), far)
    assert bool((g > 0).all())
    # the usual choices are dead there
    (g,) = torch.autograd.grad((far.clamp(-3, 3) + 6 * torch.sigmoid(far)).exp().sum(), far)
    assert bool((g == 0).all())


def test_bounded_is_the_exponential_in_the_middle():
    x = torch.tensor([2.0], dtype=F64, requires_grad=True)
    y = P.bounded_log_scale(x, -8.0, 12.0)
    (g,) = torch.autograd.grad(y, x)
    assert y.item() == pytest.approx(math.exp(2), rel=1e-14)
    assert g.item() == pytest.approx(math.exp(2), rel=1e-14)


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
def test_bounded_inverse(dtype):
    scale = torch.logspace(-1.2, 1.2, 61, dtype=F64).to(dtype)
    back = P.bounded_log_scale(P.inverse_bounded_log_scale(scale, -3.0, 3.0), -3.0, 3.0)
    torch.testing.assert_close(back, scale, rtol=12 * torch.finfo(dtype).eps, atol=0)


# --- triangles -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 3, 7])
def test_triangle(dim):
    x = torch.randn(4, 5, dim * (dim + 1) // 2, dtype=F64)
    tril = P.scale_tril_from_unconstrained(x, dim, floor=0.01)
    assert tril.shape == (4, 5, dim, dim)
    assert torch.equal(tril, tril.tril())
    assert bool((tril.diagonal(dim1=-2, dim2=-1) > 0.01).all())
    rows, columns = torch.tril_indices(dim, dim)
    below = rows != columns
    assert torch.equal(tril[..., rows, columns][..., below], x[..., below])
    torch.testing.assert_close(P.unconstrained_from_scale_tril(tril, floor=0.01), x)
    eye = P.unconstrained_from_scale_tril(torch.eye(dim))
    torch.testing.assert_close(P.scale_tril_from_unconstrained(eye, dim), torch.eye(dim))


def test_triangle_ignores_what_is_above_the_diagonal():
    tril = torch.tensor([[1.0, NAN], [2.0, 3.0]])
    assert bool(P.unconstrained_from_scale_tril(tril).isfinite().all())


# --- transforms ----------------------------------------------------------------------------------------------

FUNCTIONS = {
    "softplus_scale": partial(P.softplus_scale, floor=0.1),
    "inverse_softplus_scale": lambda x: P.inverse_softplus_scale(x.exp() + 0.2, 0.1),
    "bounded_log_scale": partial(P.bounded_log_scale, min_log=-1.0, max_log=2.0),
    "inverse_bounded_log_scale": lambda x: P.inverse_bounded_log_scale(x.sigmoid() + 0.5, -1.0, 2.0),
    "scale_tril": partial(P.scale_tril_from_unconstrained, dim=3, floor=0.1),
    "inverse scale_tril": lambda x: P.unconstrained_from_scale_tril(
        x.exp().diag_embed() + (x[..., :, None] * x[..., None, :]).tril(-1)
    ),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch's own forward mode
@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_and_vmap(name):
    f = FUNCTIONS[name]
    x = torch.randn(4, 6, dtype=F64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(f, x[0].clone().requires_grad_(), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, x[0].clone().requires_grad_())
    torch.testing.assert_close(torch.vmap(f)(x), f(x))
    jacobians = torch.vmap(torch.func.jacrev(f))(x)
    torch.testing.assert_close(jacobians, torch.stack([torch.func.jacrev(f)(row) for row in x]))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_compile():
    def f(x: torch.Tensor) -> torch.Tensor:
        P.check_positive("the square", x * x)
        return torch.stack([g(x).sum() for g in FUNCTIONS.values()]).sum()

    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for u, v in zip(torch.autograd.grad(compiled(x), x), torch.autograd.grad(f(x), x), strict=True):
        torch.testing.assert_close(u, v)


# --- errors --------------------------------------------------------------------------------------------------

BAD = {
    "zero": (torch.tensor([[1.0, 0.0], [2.0, 0.0]]), r"scale\[0, 1\] is 0\.0 \(and 1 more of 4 entries\).*ReLU"),
    "negative": (torch.tensor([1.0, 2.0, -3.0]), r"scale\[2\] is -3\.0\. A negative entry.*raw output"),
    "nan": (torch.tensor([NAN, 1.0]), r"scale\[0\] is nan.*diverged"),
    "scalar": (torch.tensor(0.0), r"scale is 0\.0\."),
    "float16": (torch.tensor([1e-8]).half(), r"scale\[0\] is 0\.0.*underflowed"),
    "with a gradient": (torch.relu(torch.tensor([-1.0], requires_grad=True)), r"scale\[0\] is 0\.0"),
}


@pytest.mark.parametrize("name", BAD)
def test_check_positive(name):
    value, message = BAD[name]
    with pytest.raises(ValueError, match=message) as error:
        P.check_positive("scale", value)
    assert "stablekl.softplus_scale(x, floor=" in str(error.value)


def test_check_positive_passes():
    smallest = torch.finfo(F32).tiny * torch.finfo(F32).eps
    for value in (torch.tensor([smallest, INF]), torch.ones(0), torch.ones(2, 3).expand(4, 2, 3)):
        P.check_positive("scale", value)


def test_check_positive_is_skipped_where_there_is_no_data():
    P.check_positive("scale", torch.zeros(3, device="meta"))

    def f(x: torch.Tensor) -> torch.Tensor:
        P.check_positive("scale", x)
        return x + 1

    assert torch.vmap(f)(torch.zeros(3)).tolist() == [1, 1, 1]
    assert torch.func.grad(lambda x: f(x).sum())(torch.zeros(3)).tolist() == [1, 1, 1]
    assert torch.compile(f, fullgraph=True, backend="eager")(torch.zeros(3)).tolist() == [1, 1, 1]


ERRORS = {
    "negative floor": (lambda: P.softplus_scale(torch.zeros(2), -1.0), "floor must be 0, or positive.*is -1"),
    "nan floor": (lambda: P.softplus_scale(torch.zeros(2), NAN), "floor must be"),
    "infinite floor": (lambda: P.softplus_scale(torch.zeros(2), INF), "floor must be"),
    "floor that rounds to zero": (lambda: P.softplus_scale(torch.zeros(2).half(), 1e-8), "torch.float16.*is 1e-08"),
    "scale at its floor": (
        lambda: P.inverse_softplus_scale(torch.tensor([2.0, 1.0]), 1.0),
        r"greater than floor = 1\.0, but scale\[1\] is 1\.0",
    ),
    "bounds out of order": (lambda: P.bounded_log_scale(torch.zeros(2), 1.0, -1.0), "min_log = 1.0"),
    "bounds of the scale": (lambda: P.bounded_log_scale(torch.zeros(2).half(), 1e-3, 1e3), "not the scale"),
    "nan bound": (lambda: P.bounded_log_scale(torch.zeros(2), NAN, 1.0), "min_log = nan"),
    "scale out of bounds": (
        lambda: P.inverse_bounded_log_scale(torch.tensor([1.0, 9.0]), -2.0, 2.0),
        r"scale\[1\] is 9\.0",
    ),
    "size of the triangle": (
        lambda: P.scale_tril_from_unconstrained(torch.zeros(3, 9), 3),
        r"= 6 for dim = 3.*\(3, 9\).*6 outputs",
    ),
    "no dimension": (lambda: P.scale_tril_from_unconstrained(torch.tensor(1.0), 1), "= 1 for dim = 1"),
    "dim 0": (lambda: P.scale_tril_from_unconstrained(torch.zeros(0), 0), "at least 1, but is 0"),
    "not square": (lambda: P.unconstrained_from_scale_tril(torch.zeros(3, 2)), r"square.*\(3, 2\)"),
    "zero on the diagonal": (
        lambda: P.unconstrained_from_scale_tril(torch.diag(torch.tensor([1.0, 0.0]))),
        r"scale\[1\] is 0\.0",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()
