"""Low-rank Gaussians against mpmath's definition: dense D x D, determinants and traces as they stand."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import Tensor
from torch.distributions import LowRankMultivariateNormal as TorchLowRank
from torch.distributions.kl import _kl_lowrankmultivariatenormal_lowrankmultivariatenormal as torch_kl
from torch.func import jacrev, vmap

from stablekl.distributions.low_rank import LowRankMultivariateNormal, dense_scale_tril, low_rank_kl
from stablekl.precision.metrics import group_error
from stablekl.precision.references import multivariate_normal
from stablekl.precision.references.context import Number, exact, mp
from stablekl.precision.references.multivariate_normal import Gaussian, gradients, kl, log_density

EPS = 2.0**-52
Parameters = tuple[Tensor, Tensor, Tensor]


# --- truth ------------------------------------------------------------------------------------------------


def gaussian(loc: Tensor, factor: Tensor, diag: Tensor) -> Gaussian:
    return Gaussian(exact(loc), "low_rank", (exact(factor), exact(diag)))


def true_kl(*args: Tensor) -> Number:
    return kl(gaussian(*args[:3]), gaussian(*args[3:]))


def true_gradient(*args: Tensor) -> list[list[Number]]:
    """For each parameter the list of its entries' derivatives."""
    loc_p, p, loc_q, q = gradients(gaussian(*args[:3]), gaussian(*args[3:]))
    return [[*itertools.chain(*x)] if x and isinstance(x[0], list) else x for x in (loc_p, *p, loc_q, *q)]


def condition(factor: Tensor, diag: Tensor) -> float:
    return max(1.0, multivariate_normal.condition("low_rank", (exact(factor), exact(diag))))


def units(value: Tensor, truth: Number, kappa: float = 1.0) -> float:
    """Error in eps of the dtype times kappa, relative to the truth; total on NaN, inf and 0."""
    if not truth:
        return 0.0 if value == 0 else float("inf")
    return group_error([float(value)], [truth], value.dtype, kappa * abs(truth))


# --- cases ------------------------------------------------------------------------------------------------


def base(seed: int, d: int, r: int, size: float = 1.0) -> Parameters:
    g = torch.Generator().manual_seed(seed)
    draw = {"generator": g, "dtype": torch.float64}
    return torch.randn(d, **draw), size * torch.randn(d, r, **draw), 0.2 + torch.rand(d, **draw)


def moved(p: Parameters, by: float, which: str, seed: int = 9) -> Parameters:
    """Each entry of the named parameters (m, w, d) times 1 + by * noise; by = 0: one ulp up or down or not."""
    g = torch.Generator().manual_seed(seed)

    def move(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=g, dtype=torch.float64)
        return x * (1 + EPS * noise.round().clamp(-1, 1)) if by == 0 else x * (1 + by * noise.clamp(-2, 2))

    return tuple(move(x) if n in which else x for n, x in zip("mwd", p, strict=True))  # type: ignore[return-value]


def near(d: int, r: int, by: float, which: str, size: float = 1.0) -> tuple[Tensor, ...]:
    q = base(d, d, r, size)
    return (*moved(q, by, which), *q)


def heywood(d: int, r: int, tiny: float, which: str) -> tuple[Tensor, ...]:
    """One coordinate that the factors explain almost entirely, in an otherwise ordinary covariance."""
    loc, factor, diag = base(d, d, r)
    diag[0] = tiny
    q = (loc, factor, diag)
    return (*moved(q, 1e-3, which), *q)


CASES = {
    **{
        f"near-{by:g}-{which}": near(8, 2, by, which)
        for by in (0.1, 1e-3, 1e-6, 1e-10, 0)
        for which in ("mwd", "w", "d")
    },
    **{f"saturated-{size:g}-{by:g}": near(8, 2, by, "wd", size) for size in (1e2, 1e4, 1e8) for by in (0.1, 1e-3, 0)},
    **{
        f"heywood-{tiny:g}-{which}": heywood(8, 2, tiny, which)
        for tiny in (1e-4, 1e-10, 1e-16)
        for which in ("w", "wd")
    },
    **{f"heywood-all-{tiny:g}": heywood(4, 1, tiny, "d") for tiny in (1e-4, 1e-16)},
    "far": (*base(1, 8, 2), *base(2, 8, 2)),
    "far-saturated": (*base(1, 8, 2, 1e4), *base(2, 8, 2, 1e4)),
    "wide-near": near(32, 5, 1e-4, "wd"),
    "wide-far": (*base(1, 32, 5), *base(2, 32, 5)),
    "low-dimension": near(2, 3, 1e-5, "wd"),
    "scalar": near(1, 1, 1e-5, "d", 1e6),
    "rank-2-to-1": (*base(1, 8, 2), *base(2, 8, 1)),
    "rank-1-to-3": (*base(1, 9, 1), *base(2, 9, 3)),
    "diagonal-to-low-rank": (*base(1, 8, 0), *base(2, 8, 2)),
    "low-rank-to-diagonal": (*base(1, 8, 2), *base(2, 8, 0)),
    "diagonals": near(6, 0, 1e-6, "md"),
}

# In eps, whatever the condition number.
BAR = 16.0

# Known limits, in eps * kappa: different parameters of (almost) one covariance, where terms cancel.
LIMITS = {
    "rotated": (1e5, lambda: _rotated(1e-6)),
    "only a saturated variance": (1e9, lambda: _one_variance(1e-10)),
}


def _rotated(by: float) -> tuple[Tensor, ...]:
    q = base(3, 8, 2)
    g = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(2, 2, generator=g, dtype=torch.float64))[0]
    p = moved(q, by, "w")
    return (p[0], p[1] @ turn, p[2], *q)


def _one_variance(tiny: float) -> tuple[Tensor, ...]:
    loc, factor, diag = base(8, 8, 2)
    diag[0] = tiny
    other = diag.clone()
    other[0] *= 1.001
    return (loc, factor, other, loc, factor, diag)


# --- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_kl_float64(name):
    args = CASES[name]
    assert units(low_rank_kl(*args), true_kl(*args)) <= BAR


@pytest.mark.parametrize("name", [n for n in CASES if not n.endswith(("-0", "-0-w", "-0-d", "-0-mwd"))])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_kl_low_precision_is_rounded_once(name, dtype):
    args = [x.to(dtype) for x in CASES[name]]
    tiny = torch.finfo(dtype).tiny
    if any(not bool(x.isfinite().all()) for x in args) or any(bool((x <= 0).any()) for x in (args[2], args[5])):
        pytest.skip("not representable")
    value, truth = low_rank_kl(*args), true_kl(*args)
    assert value.dtype == dtype
    if truth > torch.finfo(dtype).max:
        assert value.isinf()
    elif abs(truth) >= tiny:
        assert units(value, truth) <= 0.51
    else:
        assert 0 <= float(value) <= tiny * 1.01


@pytest.mark.parametrize("name", ["near-1e-06-mwd", "saturated-10000-0.001", "heywood-1e-10-w", "diagonals"])
def test_torch_fails_the_same_check(name):
    args = CASES[name]
    if args[1].shape[-1] == 0:
        args = tuple(torch.zeros(6, 1, dtype=torch.float64) if x.ndim == 2 else x for x in args)
    value = torch_kl(TorchLowRank(*args[:3]), TorchLowRank(*args[3:]))
    assert units(value, true_kl(*args)) > 100 * BAR


@pytest.mark.parametrize("name", LIMITS)
def test_limits_are_where_they_were_measured(name):
    bar, make = LIMITS[name]
    args = make()
    value = low_rank_kl(*args)
    assert value >= 0
    assert units(value, true_kl(*args), condition(args[4], args[5])) <= bar


def test_itself_with_a_small_diagonal():
    p = (torch.zeros(3), torch.ones(3, 1), torch.full((3,), 1e-8))
    args = [x.clone().requires_grad_() for x in (*p, *p)]
    value = low_rank_kl(*args)
    assert value == 0
    assert all(bool((g == 0).all()) for g in torch.autograd.grad(value, args))
    torch_p = TorchLowRank(*p)
    assert torch_kl(torch_p, torch_p) < 0


def test_factors_swapped_and_negated_are_the_same_distribution():
    loc, factor, diag = base(4, 12, 3)
    assert low_rank_kl(loc, factor, diag, loc, -factor[:, [2, 0, 1]], diag) == 0


def test_never_negative_never_nan():
    g = torch.Generator().manual_seed(0)
    for d, r_p, r_q in ((1, 1, 1), (2, 3, 1), (8, 2, 2), (9, 0, 2), (16, 5, 3)):
        args = []
        for r in (r_p, r_q):
            size = 10 ** (6 * torch.rand(200, 1, 1, generator=g) - 2)
            args += [
                torch.randn(200, d, generator=g),
                size * torch.randn(200, d, r, generator=g),
                10 ** (-30 * torch.rand(200, d, generator=g) * torch.rand(200, 1, generator=g)),
            ]
        args = [x.requires_grad_() for x in args]
        value = low_rank_kl(*args)
        assert bool((value >= 0).all())
        for gradient in torch.autograd.grad(value.sum(), args):
            assert not bool(gradient.isnan().any())


def test_shapes_broadcast():
    (loc_p, factor_p, diag_p), (loc_q, factor_q, diag_q) = base(1, 5, 2), base(2, 5, 1)
    scale = torch.arange(1.0, 4.0, dtype=torch.float64)[:, None]
    value = low_rank_kl(loc_p, factor_p, scale * diag_p, loc_q.expand(2, 1, 5), factor_q, diag_q)
    assert value.shape == (2, 3)
    one = low_rank_kl(loc_p, factor_p, 3 * diag_p, loc_q, factor_q, diag_q)
    torch.testing.assert_close(value[1, 2], one, rtol=1e-14, atol=0)


# --- derivatives ------------------------------------------------------------------------------------------

GRADIENTS = ["near-0.1-mwd", "near-1e-06-mwd", "near-1e-10-d", "near-0-w", "heywood-1e-10-wd", "heywood-all-1e-16",
             "far", "far-saturated", "rank-1-to-3", "low-dimension", "diagonal-to-low-rank", "wide-near"]  # fmt: skip


def gradient_units(gradients: tuple[Tensor, ...], truths: list[list[Number]], kappa: float) -> list[float]:
    """For each parameter the error relative to the largest component of its gradient, in eps * kappa."""
    errors = []
    for g, truth in zip(gradients, truths, strict=True):
        top = max(map(abs, truth), default=mp.mpf(0))
        if not top:
            assert not g.any()
        errors.append(group_error(g.flatten().tolist(), truth, g.dtype, kappa * top) if top else 0.0)
    return errors


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradient(name, dtype):
    args = [x.to(dtype, copy=True) for x in CASES[name]]
    truth = true_gradient(*args)
    kappa = condition(args[4], args[5]) if dtype == torch.float64 else 1.0
    args = [x.requires_grad_() for x in args]
    gradients = torch.autograd.grad(low_rank_kl(*args), args)
    assert max(gradient_units(gradients, truth, kappa)) <= (BAR if dtype == torch.float64 else 0.51)


def test_torch_fails_the_gradient_check():
    args = CASES["near-1e-10-d"]
    truth, kappa = true_gradient(*args), condition(args[4], args[5])
    args = [x.clone().requires_grad_() for x in args]
    gradients = torch.autograd.grad(torch_kl(TorchLowRank(*args[:3]), TorchLowRank(*args[3:])), args[2])
    assert max(gradient_units(gradients, truth[2:3], kappa)) > 100 * BAR


SMALL_FACTORS = (
    [6797.607453015719, -6219.543698072369],
    [[-33.410157362339326], [-11.123065992496507]],
    [58476593.77373751, 11436273.74565914],
    [6797.607486340341, -6219.54368574613],
    [[-33.291706703499656], [-10.189675462594746]],
    [58476593.773665175, 11436273.746421529],
)


def test_gradient_by_factors_that_hardly_matter():
    args = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in SMALL_FACTORS]
    truth, kappa = true_gradient(*args), condition(args[4], args[5])
    assert max(gradient_units(torch.autograd.grad(low_rank_kl(*args), args), truth, kappa)) <= BAR
    p, q = (TorchLowRank(*side, validate_args=False) for side in (args[:3], args[3:]))
    assert max(gradient_units(torch.autograd.grad(torch_kl(p, q), args), truth, kappa)) > 100 * BAR


@pytest.mark.parametrize(("d", "r_p", "r_q"), [(3, 1, 2), (7, 2, 1)])
def test_transforms(d, r_p, r_q):
    args = [torch.stack([x, 1.1 * x]).requires_grad_() for x in (*base(1, d, r_p), *base(2, d, r_q))]
    assert torch.autograd.gradcheck(low_rank_kl, args, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(low_rank_kl, args)
    gradients = torch.autograd.grad(low_rank_kl(*args).sum(), args)
    rows = vmap(jacrev(low_rank_kl, argnums=tuple(range(6))))(*(x.detach() for x in args))
    for a, b in zip(gradients, rows, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo does it itself
@pytest.mark.slow  # tracing a few hundred small operations takes ten seconds
def test_compiles_without_a_graph_break():
    args = [x[None].clone().requires_grad_() for x in CASES["far"]]
    compiled = torch.compile(low_rank_kl, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), low_rank_kl(*args), rtol=1e-14, atol=0)
    a, b = (torch.autograd.grad(f(*args).sum(), args) for f in (compiled, low_rank_kl))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


# --- the class --------------------------------------------------------------------------------------------


def test_log_prob_and_entropy():
    loc, factor, diag = base(5, 6, 2, 1e3)
    x = loc + factor.sum(-1)  # along the factors, where the Woodbury identity subtracts equal numbers
    truth = gaussian(loc, factor, diag)
    log_prob = log_density(exact(x), truth)
    with mp.workprec(200):
        entropy = multivariate_normal.factor(*truth[1:]).half_log_det() + 3 * mp.log(2 * mp.pi) + 3
    p = LowRankMultivariateNormal(loc, factor, diag)
    assert units(p.log_prob(x), log_prob) <= BAR
    assert units(p.entropy(), entropy) <= 4
    assert units(TorchLowRank(loc, factor, diag).log_prob(x), log_prob) > 100 * BAR


def test_log_prob_float32_with_a_small_diagonal():
    args = (torch.zeros(2), torch.ones(2, 1), torch.full((2,), 1e-8))
    x = torch.ones(2)
    truth = log_density(exact(x), gaussian(*args))
    assert units(LowRankMultivariateNormal(*args).log_prob(x), truth) <= 0.51
    assert units(TorchLowRank(*args).log_prob(x), truth) > 100 * BAR


def test_drop_in():
    loc, factor, diag = (torch.randn(3, 1, 5), torch.randn(4, 5, 2), torch.rand(1, 5) + 0.5)
    p, t = LowRankMultivariateNormal(loc, factor, diag), TorchLowRank(loc, factor, diag)
    x = torch.randn(7, 3, 4, 5)
    names = ("mean", "mode", "variance", "covariance_matrix", "precision_matrix", "scale_tril", "_capacitance_tril")
    for name in names:
        torch.testing.assert_close(getattr(p, name), getattr(t, name), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(p.log_prob(x), t.log_prob(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(p.entropy(), t.entropy(), rtol=1e-5, atol=1e-5)
    torch.manual_seed(0)
    mine = p.rsample((2,))
    torch.manual_seed(0)
    assert torch.equal(mine, t.rsample((2,)))
    wide = p.expand((6, 3, 4))
    assert type(wide) is LowRankMultivariateNormal
    assert wide.log_prob(torch.zeros(5)).shape == (6, 3, 4)
    assert p.to(torch.float64).log_prob(x.double()).dtype == torch.float64
    for other in (copy.deepcopy(p), pickle.loads(pickle.dumps(p))):
        assert torch.equal(other.log_prob(x), p.log_prob(x))


def test_a_diagonal_entry_that_is_not_positive():
    diag = torch.ones(2, 3)
    diag[1, 2] = -0.5
    with pytest.raises(ValueError, match=r"cov_diag\[1, 2\] is -0\.5.*softplus_scale"):
        # by name: torch.compile turns the default off for the whole process
        LowRankMultivariateNormal(torch.zeros(3), torch.ones(3, 1), diag, validate_args=True)


@pytest.mark.parametrize(
    "shapes",
    [((), (3, 1), (3,)), ((3,), (2, 1), (3,)), ((3,), (3, 1), (2,)), ((2, 3), (4, 3, 1), (3,))],
)
def test_shapes_that_do_not_fit(shapes):
    with pytest.raises(ValueError, match=r"must|do not broadcast"):
        LowRankMultivariateNormal(*(torch.ones(s) for s in shapes))


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_dense_scale_tril(size):
    _, factor, diag = base(6, 8, 2, size)
    with mp.workprec(200):
        root = multivariate_normal.factor("low_rank", (exact(factor), exact(diag))).root
    truth = torch.tensor([[float(v) for v in row] for row in root], dtype=torch.float64)

    def worst(tril: Tensor) -> float:
        return float(((tril - truth).norm(dim=-1) / truth.norm(dim=-1)).max()) / EPS

    tril = dense_scale_tril(factor, diag)
    assert torch.equal(tril, tril.tril())
    assert bool((tril.diagonal() > 0).all())
    assert worst(tril) <= BAR
    if size > 1:
        assert worst(torch.linalg.cholesky(factor @ factor.mT + torch.diag(diag))) > 100 * BAR
    inputs = [x.requires_grad_() for x in (base(6, 4, 2)[1:])]
    assert torch.autograd.gradgradcheck(dense_scale_tril, inputs)
    assert dense_scale_tril(torch.ones(3, 1, 4, 2), torch.ones(2, 4)).shape == (3, 2, 4, 4)
