"""`stablekl.special` against mpmath, evaluated from the definitions at two precisions that agree."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial

import mpmath
import pytest
import torch
from mpmath import mpf

from stablekl import special
from stablekl.precision.metrics import ulp_error, worst_ulp

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
INF, NAN = math.inf, math.nan
WIDTH = {F32: torch.int32, F64: torch.int64}

# --- truths: definitions, and derivatives of the definitions by hand -----------------------------------------


def mp_cdf(x):
    return mpmath.erfc(-x / mpmath.sqrt(2)) / 2


def mp_mills(x):
    """phi(x)/Phi(x)."""
    return mpmath.exp(-x * x / 2) / mpmath.sqrt(2 * mpmath.pi) / mp_cdf(x)


TRUTH: dict[str, Callable[..., mpf]] = {
    "log1pmx": lambda x: mpmath.log(1 + x) - x,
    "log1pmx/x": lambda x: -x / (1 + x),
    "log1pmx/xx": lambda x: -1 / (1 + x) ** 2,
    "expm1mx": lambda x: mpmath.exp(x) - 1 - x,
    "expm1mx/x": lambda x: mpmath.exp(x) - 1,
    "expm1mx/xx": mpmath.exp,
    "log_ratio_bregman": lambda a, b: (a - b) / b - mpmath.log(a / b),
    "log_ratio_bregman/a": lambda a, b: 1 / b - 1 / a,
    "log_ratio_bregman/b": lambda a, b: 1 / b - a / b**2,
    "log_ratio_bregman/aa": lambda a, b: 1 / a**2,
    "log_ratio_bregman/ab": lambda a, b: -1 / b**2,
    "log_ratio_bregman/bb": lambda a, b: 2 * a / b**3 - 1 / b**2,
    "bd0": lambda x, M: x * mpmath.log(x / M) + M - x,
    "bd0/x": lambda x, M: mpmath.log(x / M),
    "bd0/M": lambda x, M: 1 - x / M,
    "bd0/xx": lambda x, M: 1 / x,
    "bd0/xM": lambda x, M: -1 / M,
    "bd0/MM": lambda x, M: x / M**2,
    # the logarithm of a number next to 1 would need as many digits as the tail has zeros
    "log_ndtr": lambda x: mpmath.log(mp_cdf(x)) if x < 0 else mpmath.log1p(-mp_cdf(-x)),
    "log_ndtr/x": mp_mills,
    "log_ndtr/xx": lambda x: -mp_mills(x) * (x + mp_mills(x)),
}


@cache
def truth(name: str, *args: float) -> mpf:
    """TRUTH[name] at exact floats: with as many digits as cancel at most, and with more, which must agree."""
    tail = name.startswith("log_ndtr")  # cancels x^2-fold at most, and is slow
    results = []
    for digits in (50, 70) if tail else (700, 800):
        with mpmath.workdps(digits):
            results.append(TRUTH[name](*map(mpf, args)))
    with mpmath.workdps(40):
        low, high = (+r for r in results)
        assert abs(low - high) <= abs(high) * mpf(10) ** -30, (name, args)
        return high


# --- inputs --------------------------------------------------------------------------------------------------


def log_uniform(seed: int, n: int, low: float, high: float, dtype: torch.dtype) -> torch.Tensor:
    """Magnitudes whose logarithms are uniform; bounds are natural logarithms."""
    g = torch.Generator().manual_seed(seed)
    return torch.exp(low + (high - low) * torch.rand(n, dtype=F64, generator=g)).to(dtype)


def signed(x: torch.Tensor) -> torch.Tensor:
    return x * (1 - 2 * (torch.arange(len(x)) % 2)).to(x.dtype)


def ladder(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs 1, 2, 4 ... 2^40 (float32: 2^22) ulps apart, either side, at many scales."""
    steps = [2**k for k in range(41 if dtype == F64 else 23)]
    b = log_uniform(1, 4 * len(steps), -60, 60, dtype)
    apart = torch.tensor([s * sign for s in steps for sign in (1, -1)] * 2, dtype=WIDTH[dtype])
    return (b.view(WIDTH[dtype]) + apart).view(dtype), b


def ratios(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    b = log_uniform(2, 300, -3, 3, dtype)
    return (b.double() * log_uniform(3, 300, -4, 4, F64)).to(dtype), b


def extremes(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Every pair of magnitudes from the smallest subnormal to the largest number."""
    info = torch.finfo(dtype)
    marks = [info.tiny * info.eps, info.tiny * info.eps * 5, info.tiny, 1e-30, 1e-10, 0.3, 1.0, 3.0, 1e10, 1e30]
    marks += [info.max / 3, info.max]
    x = torch.tensor(marks, dtype=dtype)
    return tuple(t.flatten() for t in torch.meshgrid(x, x, indexing="ij"))


def one_argument(name: str, dtype: torch.dtype) -> torch.Tensor:
    small = signed(log_uniform(4, 300, -40, -0.1, dtype))
    wide = log_uniform(5, 100, 0, 80, dtype)
    g = torch.Generator().manual_seed(6)
    middle = torch.rand(400, dtype=F64, generator=g).to(dtype)
    if name == "log1pmx":
        next_to_minus_one = -1 + log_uniform(7, 50, -15, -1, dtype)
        return torch.cat([small, wide, 5 * middle - 0.9, next_to_minus_one])
    if name == "expm1mx":
        return torch.cat([small, 8 * middle - 4, 170 * middle - 85])
    return torch.cat([small, 12 * middle - 6, -log_uniform(8, 60, 0, 6, dtype), 6 + 6 * middle])


def inputs(name: str, dtype: torch.dtype, regime: str) -> tuple[torch.Tensor, ...]:
    if name in ("bd0", "log_ratio_bregman"):
        return {"ladder": ladder, "ratios": ratios, "extremes": extremes}[regime](dtype)
    return (one_argument(name, dtype),)


REGIMES = [
    (name, regime)
    for name in ("log_ratio_bregman", "bd0", "log1pmx", "expm1mx", "log_ndtr")
    for regime in (("ladder", "ratios", "extremes") if name in ("log_ratio_bregman", "bd0") else ("all",))
]
# The largest error allowed, in ulps: the worst seen in millions of evaluations (the module's table), rounded up.
LIFTED = 0.6
BAR = {"log_ratio_bregman": 4.0, "bd0": 4.5, "log1pmx": 3.0, "expm1mx": 3.0, "log_ndtr": 5.0}
TEXTBOOK = {
    "log_ratio_bregman": lambda a, b: a / b - 1 - torch.log(a / b),
    "bd0": lambda x, M: x * torch.log(x / M) + M - x,
    "log1pmx": lambda x: torch.log1p(x) - x,
    "expm1mx": lambda x: torch.expm1(x) - x,
    "log_ndtr": torch.special.log_ndtr,
}


def worst(f: Callable[..., torch.Tensor], name: str, args: tuple[torch.Tensor, ...]) -> float:
    rows = zip(*(x.double().tolist() for x in args), strict=True)
    return worst_ulp(f(*args), (truth(name, *row) for row in rows))


# --- values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(("name", "regime"), REGIMES)
def test_value(name, regime, dtype):
    args = inputs(name, dtype, regime)
    assert worst(getattr(special, name), name, args) <= (LIFTED if dtype == F32 else BAR[name])


@pytest.mark.parametrize(("name", "regime"), REGIMES)
def test_native_float32(name, regime):
    """The form that devices without fast float64 use."""
    assert worst(getattr(special, f"{name}_value"), name, inputs(name, F32, regime)) <= BAR[name]


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("name", TEXTBOOK)
def test_the_textbook_fails(name, dtype):
    regime = "ladder" if name in ("log_ratio_bregman", "bd0") else "all"
    assert worst(TEXTBOOK[name], name, inputs(name, dtype, regime)) > 20 * BAR[name] or name == "log_ndtr"
    if name == "log_ndtr":  # torch's value is good; its gradient is not
        x = torch.tensor([-1e4], dtype=F32, requires_grad=True)
        (g,) = torch.autograd.grad(torch.special.log_ndtr(x), x)
        assert ulp_error(g, 1e4 + mpf("9.999999800000008e-05"), F32) > 1e6


@pytest.mark.parametrize("name", ["log_ratio_bregman", "bd0"])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_never_negative_and_zero_only_when_equal(name, dtype):
    f = getattr(special, name)
    a, b = ladder(dtype)
    assert bool((f(a, b) > 0).all())
    x = torch.cat([a, extremes(dtype)[0]]).requires_grad_()
    y = x.detach().clone().requires_grad_()
    value = f(x, y)
    grads = torch.autograd.grad(value.sum(), (x, y))
    assert all(bool((t == 0).all()) for t in (value, *grads))


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_half_precision_is_rounded_once(dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    for name in ("log1pmx", "expm1mx", "log_ndtr"):
        f = getattr(special, name)
        torch.testing.assert_close(f(every), f(every.double()).to(dtype), rtol=0, atol=0, equal_nan=True)
    positive = every[(every > 0) & every.isfinite()]
    a, b = positive[::7], positive[::7].flip(0)
    near = (a.view(torch.int16) + 1).view(dtype)
    for f in (special.log_ratio_bregman, special.bd0):
        for other in (b, near):
            torch.testing.assert_close(f(a, other), f(a.double(), other.double()).to(dtype), rtol=0, atol=0)


def test_the_float32_ratio_of_1e_76():
    a, b = torch.tensor(1e-38), torch.tensor(1e38)
    assert ulp_error(special.log_ratio_bregman(a, b), truth("log_ratio_bregman", a.item(), b.item()), F32) <= 0.5
    assert special.log_ratio_bregman(b, a) == INF
    a, b = torch.tensor(1e-300, dtype=F64), torch.tensor(1e300, dtype=F64)
    assert ulp_error(special.log_ratio_bregman(a, b), truth("log_ratio_bregman", a.item(), b.item()), F64) <= 1
    assert torch.log(a / b) == -INF  # what the quotient alone would give


# name: (function, arguments, value)
BOUNDARIES = {
    "log1pmx at -1": ("log1pmx", (-1.0,), -INF),
    "log1pmx below -1": ("log1pmx", (-1.5,), NAN),
    "log1pmx at infinity": ("log1pmx", (INF,), -INF),
    "log1pmx at 0": ("log1pmx", (0.0,), 0.0),
    "log1pmx of nan": ("log1pmx", (NAN,), NAN),
    "expm1mx at infinity": ("expm1mx", (INF,), INF),
    "expm1mx at -infinity": ("expm1mx", (-INF,), INF),
    "expm1mx where exp overflows": ("expm1mx", (1e4,), INF),
    "expm1mx at 0": ("expm1mx", (0.0,), 0.0),
    "expm1mx of nan": ("expm1mx", (NAN,), NAN),
    "ratio with a = 0": ("log_ratio_bregman", (0.0, 2.0), INF),
    "ratio with b = 0": ("log_ratio_bregman", (2.0, 0.0), INF),
    "ratio with a infinite": ("log_ratio_bregman", (INF, 2.0), INF),
    "ratio with b infinite": ("log_ratio_bregman", (2.0, INF), INF),
    "ratio with a nan": ("log_ratio_bregman", (NAN, 2.0), NAN),
    "ratio with b nan": ("log_ratio_bregman", (2.0, NAN), NAN),
    "bd0 at x = 0": ("bd0", (0.0, 3.0), 3.0),
    "bd0 at x = M = 0": ("bd0", (0.0, 0.0), 0.0),
    "bd0 at M = 0": ("bd0", (2.0, 0.0), INF),
    "bd0 at x infinite": ("bd0", (INF, 2.0), INF),
    "bd0 at M infinite": ("bd0", (2.0, INF), INF),
    "bd0 at x nan": ("bd0", (NAN, INF), NAN),
    "bd0 at M nan": ("bd0", (2.0, NAN), NAN),
    "bd0 at x = 0, M nan": ("bd0", (0.0, NAN), NAN),
    "log_ndtr at infinity": ("log_ndtr", (INF,), 0.0),
    "log_ndtr at -infinity": ("log_ndtr", (-INF,), -INF),
    "log_ndtr of nan": ("log_ndtr", (NAN,), NAN),
}


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
@pytest.mark.parametrize("case", BOUNDARIES)
def test_boundary(case, dtype):
    name, args, expected = BOUNDARIES[case]
    f, native = getattr(special, name), getattr(special, f"{name}_value")
    tensors = [torch.tensor(v, dtype=dtype) for v in args]
    torch.testing.assert_close(f(*tensors), torch.tensor(expected, dtype=dtype), equal_nan=True)
    wide = [t.float() if dtype in (F16, BF16) else t for t in tensors]
    torch.testing.assert_close(native(*wide), torch.tensor(expected, dtype=wide[0].dtype), equal_nan=True)


# --- derivatives ---------------------------------------------------------------------------------------------

DERIVATIVES = [key for key in TRUTH if "/" in key]
NAMES = {"log1pmx": "x", "expm1mx": "x", "log_ndtr": "x", "bd0": "xM", "log_ratio_bregman": "ab"}
SLOPE_BAR = {"log_ndtr/xx": 7.0}


def derivative(key: str, *args: torch.Tensor) -> torch.Tensor:
    name, wrt = key.split("/")
    leaves = [x.clone().requires_grad_() for x in args]
    result = getattr(special, name)(*leaves)
    for letter in wrt:
        leaf = leaves[NAMES[name].index(letter)]
        (result,) = torch.autograd.grad(result.sum(), leaf, create_graph=True)
    return result.detach()


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("key", DERIVATIVES)
def test_derivative(key, dtype):
    name = key.split("/")[0]
    for regime in [r for n, r in REGIMES if n == name and r != "extremes"]:
        args = inputs(name, dtype, regime)
        assert worst(partial(derivative, key), key, args) <= SLOPE_BAR.get(key, 4.0)


@pytest.mark.parametrize("key", ["log_ratio_bregman/a", "log_ratio_bregman/b", "bd0/x", "bd0/M"])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_gradient_at_extreme_ratios(key, dtype):
    args = extremes(dtype)
    assert worst(partial(derivative, key), key, args) <= 4


def test_autograd_through_the_textbook_fails():
    a, b = ladder(F32)
    a.requires_grad_()
    (g,) = torch.autograd.grad(TEXTBOOK["log_ratio_bregman"](a, b).sum(), a)
    rows = zip(a.double().tolist(), b.double().tolist(), strict=True)
    assert worst_ulp(g, (truth("log_ratio_bregman/a", *row) for row in rows)) > 100


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_log_ndtr_far_in_the_tail(dtype):
    x = torch.tensor([-1e4, -1e10, -1e18], dtype=dtype, requires_grad=True)
    value = special.log_ndtr(x)
    (g,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), x)
    for i, y in enumerate(mpf(-v) for v in x.tolist()):
        with mpmath.workdps(50):  # the asymptotic series of the tail, whose next term is below 1e-24
            assert ulp_error(value[i], -y * y / 2 - mpmath.log(y * mpmath.sqrt(2 * mpmath.pi)) - 1 / y**2, dtype) < 2
            assert ulp_error(g[i], y + 1 / y - 2 / y**3, dtype) < 2
            assert ulp_error(h[i], -1 + 1 / y**2 - 6 / y**4, dtype) < 2


def test_bd0_at_zero_has_finite_derivatives():
    x = torch.tensor([0.0, 0.0, 1.0], requires_grad=True)
    M = torch.tensor([2.0, 0.0, 2.0], requires_grad=True)
    gx, gM = torch.autograd.grad(special.bd0(x, M).sum(), (x, M), create_graph=True)
    assert gx.tolist() == [0, 0, pytest.approx(-math.log(2))]
    assert gM.tolist() == [1, 1, 0.5]
    second = torch.autograd.grad(gx.sum(), (x, M), retain_graph=True) + torch.autograd.grad(gM.sum(), (x, M))
    assert all(bool(t.isfinite().all()) for t in second)


GENERAL = {
    "log1pmx": (special.log1pmx, 1, -0.3),
    "expm1mx": (special.expm1mx, 1, -2.0),
    "log_ndtr": (special.log_ndtr, 1, -2.0),
    "log_ratio_bregman": (special.log_ratio_bregman, 2, 0.1),
    "bd0": (special.bd0, 2, 0.1),
    "logsumexp": (partial(special.logsumexp, dim=-1), 1, -2.0),
}


def general_inputs(name: str, *shape: int) -> tuple[torch.Tensor, ...]:
    _, count, low = GENERAL[name]
    g = torch.Generator().manual_seed(9)
    return tuple(low + 4 * torch.rand(*shape, dtype=F64, generator=g) for _ in range(count))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch's own forward mode
@pytest.mark.parametrize("name", GENERAL)
def test_gradcheck(name):
    f = GENERAL[name][0]
    args = tuple(x.requires_grad_() for x in general_inputs(name, 2, 3))
    assert torch.autograd.gradcheck(f, args, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, args)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch's own forward mode
@pytest.mark.parametrize("name", GENERAL)
def test_vmap(name):
    f, count, _ = GENERAL[name]
    args, every = general_inputs(name, 5, 3), tuple(range(count))
    torch.testing.assert_close(torch.vmap(f)(*args), f(*args))
    reverse = torch.vmap(torch.func.jacrev(f, argnums=every))(*args)
    forward = torch.vmap(torch.func.jacfwd(f, argnums=every))(*args)
    loop = [torch.func.jacrev(f, argnums=every)(*(x[i] for x in args)) for i in range(5)]
    for k in every:
        torch.testing.assert_close(reverse[k], forward[k])
        torch.testing.assert_close(reverse[k], torch.stack([row[k] for row in loop]))
    assert bool(torch.vmap(torch.func.hessian(f))(*args).isfinite().all())


def everything(small: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
    """All functions at once, in one graph: compiling each costs seconds."""
    results, used = [special.expm1mx(small)], 0
    for f, count, _ in GENERAL.values():
        result = f(*args[used : used + count])
        used += count
        results.append(result if result.shape == small.shape else result.unsqueeze(-1).expand(small.shape))
    return torch.stack(results)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("f", "count", "backend", "dtype"),
    [
        pytest.param(everything, 8, "aot_eager", F32, id="all, traced"),
        # 1e-4 is where inductor's code for expm1 on a CPU, exp(x) - 1, shows
        pytest.param(special.expm1mx, 0, "inductor", F64, id="expm1mx"),
        pytest.param(everything, 8, "inductor", F32, id="all, float32", marks=pytest.mark.slow),
        pytest.param(everything, 8, "inductor", F64, id="all, float64", marks=pytest.mark.slow),
    ],
)
def test_compile(f, count, backend, dtype):
    small = torch.linspace(-1e-4, 1e-4, 64 * 3, dtype=F64).reshape(64, 3)
    several = [x for name in GENERAL for x in general_inputs(name, 64, 3)]
    args = [x.to(dtype).requires_grad_() for x in (small, *several[:count])]
    compiled = torch.compile(f, fullgraph=True, backend=backend)
    weights = torch.linspace(-1, 1, f(*args).numel(), dtype=dtype).reshape(f(*args).shape)
    got, expected = ((y, *torch.autograd.grad((weights * y).sum(), args)) for y in (compiled(*args), f(*args)))
    for u, v in zip(got, expected, strict=True):
        torch.testing.assert_close(u, v, rtol=8 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("name", ["log_ratio_bregman", "log1pmx"])
def test_large_tensors_are_the_same_bit_for_bit(name):
    f = GENERAL[name][0]
    args = tuple(x.float().requires_grad_() for x in general_inputs(name, 300_001))
    parts = [f(*(x[s : s + 1001] for x in args)) for s in range(0, 300_001, 1001)]
    assert torch.equal(f(*args), torch.cat(parts))


def test_broadcasting_and_promotion():
    a, b = torch.rand(3, 1) + 1, torch.rand(4, dtype=F64) + 1
    out = special.log_ratio_bregman(a, b)
    assert out.shape == (3, 4)
    assert out.dtype == F64
    assert special.bd0(torch.tensor([1, 2]), torch.tensor(3.0)).dtype == torch.get_default_dtype()
    assert special.log1pmx(torch.zeros(0)).shape == (0,)


# --- logsumexp -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("shift", [0.0, 1e3, -1e7])
def test_logsumexp(shift, dtype):
    g = torch.Generator().manual_seed(10)
    x = (3 * torch.randn(200, 8, dtype=F64, generator=g) + shift).to(dtype).requires_grad_()
    value = special.logsumexp(x, -1)
    with mpmath.workdps(60):
        rows = [mpmath.log(mpmath.fsum(mpmath.exp(mpf(v)) for v in row)) for row in x.tolist()]
    # next to a sum of 1 the result is small, its error an ulp of the largest term
    rows = [r if abs(r) > 0.5 else mpf("nan") for r in rows]
    kept = [(v, r) for v, r in zip(value, rows, strict=True) if not mpmath.isnan(r)]
    assert max(ulp_error(v, r, dtype) for v, r in kept) <= (0.6 if dtype == F32 else 4)
    (weights,) = torch.autograd.grad(value.sum(), x)
    assert float((weights.double().sum(-1) - 1).abs().max()) <= 4 * torch.finfo(dtype).eps


def test_logsumexp_of_torch_does_not_sum_to_one():
    x = (torch.randn(200, 8, generator=torch.Generator().manual_seed(10)) - 1e7).requires_grad_()
    (weights,) = torch.autograd.grad(torch.logsumexp(x, -1).sum(), x)
    assert float((weights.sum(-1) - 1).abs().max()) > 0.1


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
def test_logsumexp_boundaries(dtype):
    rows = {
        "all -inf": ([-INF, -INF, -INF], -INF, [0, 0, 0]),
        "one -inf": ([-INF, 2, 2], 2 + math.log(2), [0, 0.5, 0.5]),
        "one +inf": ([INF, 0, -INF], INF, [1, 0, 0]),
        "two +inf": ([INF, INF, 1], INF, [0.5, 0.5, 0]),
        "nan": ([NAN, 1, 2], NAN, [NAN, NAN, NAN]),
        "dominated": ([0, -9, -INF], math.log1p(math.exp(-9)), [1 / (1 + math.exp(-9)), 1 / (1 + math.exp(9)), 0]),
    }
    x = torch.tensor([r[0] for r in rows.values()], dtype=dtype, requires_grad=True)
    value = special.logsumexp(x, -1)
    (grad,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    expected = torch.tensor([r[1] for r in rows.values()], dtype=dtype)
    torch.testing.assert_close(value, expected, equal_nan=True, atol=0, rtol=2 * torch.finfo(dtype).eps)
    weights = torch.tensor([r[2] for r in rows.values()], dtype=dtype)
    torch.testing.assert_close(grad, weights, equal_nan=True, atol=0, rtol=2 * torch.finfo(dtype).eps)
    (second,) = torch.autograd.grad(grad[:4].sum(), x)
    assert bool(second[:4].isfinite().all())


def test_logsumexp_dimensions():
    x = torch.randn(2, 3, 4)
    for dim in (-3, -1, 0, 1, 2):
        for keepdim in (False, True):
            torch.testing.assert_close(special.logsumexp(x, dim, keepdim), torch.logsumexp(x, dim, keepdim))
    assert special.logsumexp(torch.zeros(2, 0), 1).tolist() == [-INF, -INF]


def test_forward_mode_twice_is_refused_rather_than_zero():
    x = torch.tensor(0.7, dtype=torch.float64)
    assert torch.func.jacfwd(torch.func.jacrev(special.log1pmx))(x) != 0
    with pytest.raises(NotImplementedError, match="jacfwd of jacrev"):
        torch.func.jacfwd(torch.func.jacfwd(special.log1pmx))(x)
