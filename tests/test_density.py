"""The streamed log-density of Gaussian mixtures against the definition in mpmath."""

from __future__ import annotations

import math
from typing import NamedTuple

import mpmath as mp
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import stablekl
from stablekl.mixtures import density_blocks
from stablekl.mixtures.components import Components
from stablekl.mixtures.density import component_log_probs, mixture_log_prob
from stablekl.mixtures.density_expanded import Expansion
from stablekl.mixtures.density_terms import inverse_factor
from tests.benchmarks.bench_mixture_log_prob import Problem, backward, inputs, memory, ours, theirs

# What torch's own transforms and compiler warn about, wherever they are used.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch._prims_common.check. is deprecated:FutureWarning"),
]
F32, F64 = torch.float32, torch.float64
KINDS = ("diagonal", "full")


# ------------------------------------------------------------------------------------------------- truths


def rows(t: Tensor) -> list:
    return [mp.mpf(v) if not isinstance(v, list) else [mp.mpf(u) for u in v] for v in t.tolist()]


def normal_log_prob(x: list, loc: list, scale: list) -> tuple[mp.mpf, mp.mpf]:
    """log N(x; mu, L L') from the definition, and the sum of the magnitudes of its terms."""
    d = len(x)
    if isinstance(scale[0], list):
        factor = mp.matrix([[mp.mpf(scale[i][j]) if j <= i else 0 for j in range(d)] for i in range(d)])
        dev = mp.matrix([a - b for a, b in zip(x, loc, strict=True)])
        z = mp.lu_solve(factor, dev) if any(dev) else dev
        spread = [mp.mpf(scale[i][i]) for i in range(d)]
    else:
        spread = [mp.mpf(s) for s in scale]
        z = [(a - b) / s for a, b, s in zip(x, loc, spread, strict=True)]
    form = sum(v * v for v in z) / 2
    logs = [mp.log(s) for s in spread]
    constant = mp.log(2 * mp.pi) * d / 2
    return -form - sum(logs) - constant, form + sum(abs(v) for v in logs) + constant


def truth(value: Tensor, parameters: Components) -> tuple[list, list]:
    """log p at each point, and the magnitude of the terms behind it; parameters without batch shape."""
    weights = parameters.log_weights.tolist()
    result, size = [], []
    with mp.workdps(60):
        for x in value.tolist():
            terms = []
            for w, m, s in zip(weights, parameters.loc.tolist(), parameters.scale.tolist(), strict=True):
                if w != -math.inf:
                    log_prob, magnitude = normal_log_prob([mp.mpf(v) for v in x], [mp.mpf(v) for v in m], s)
                    terms.append((mp.mpf(w) + log_prob, magnitude + abs(mp.mpf(w))))
            top, magnitude = max(terms)
            result.append(top + mp.log(sum(mp.exp(t - top) for t, _ in terms)))
            size.append(max(1, magnitude))
    return result, size


def worst(got: Tensor, expected: tuple[list, list], dtype: torch.dtype) -> float:
    """Largest error in eps of the terms that make up the result; inf for NaN."""
    eps, errors = torch.finfo(dtype).eps, [0.0]
    for g, e, s in zip(got.tolist(), *expected, strict=True):
        errors.append(math.inf if math.isnan(g) or math.isinf(g) else float(abs(mp.mpf(g) - e) / (s * eps)))
    return max(errors)


# -------------------------------------------------------------------------------------------------- cases


class Case(NamedTuple):
    name: str
    k: int = 3
    d: int = 3
    at: float = 0.0  # every point and mean is moved here
    spread: float = 1.0  # of the means and the points
    near: float = 0.0  # components this far apart, relative to their scale; 0: independent
    log_weights: tuple[float, ...] = ()
    points: int = 12


CASES = (
    Case("ordinary"),
    Case("one component", k=1),
    Case("far apart", spread=1e3),
    Case("very far apart", spread=1e8),
    Case("near components", near=1e-5),
    Case("at 1e10", at=1e10, spread=1e4),
    Case("tiny weight", log_weights=(-690.0, -1e-9, -30.0)),
    Case("zero weights", log_weights=(-math.inf, math.log(0.25), math.log(0.75))),
    Case("many dimensions", k=2, d=20, points=4),
    Case("expansion", k=5, d=2, points=300),
    Case("expansion off centre", k=5, d=2, at=1e4, points=300),
    Case("expansion refused", k=5, d=2, spread=1e5, points=300),
    Case("expansion at 1e10", k=5, d=2, at=1e10, spread=1e5, points=300),
)


def problem(case: Case, kind: str, dtype: torch.dtype) -> tuple[Tensor, Components]:
    g = torch.Generator().manual_seed(len(case.name))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=F64, generator=g)

    loc = draw(case.k, case.d) * case.spread + case.at
    scale = draw(case.k, case.d).abs() + 0.3
    if case.near:
        loc, scale = loc[:1] + draw(case.k, case.d) * case.near, scale[:1] * (1 + draw(case.k, case.d) * case.near)
    if kind == "full":
        scale = torch.diag_embed(scale) + draw(case.k, case.d, case.d).tril(-1) * 0.4
    x = loc[torch.arange(case.points) % case.k] + draw(case.points, case.d) * case.spread ** (case.points > 6)
    log_weights = torch.tensor(case.log_weights, dtype=F64) if case.log_weights else draw(case.k).log_softmax(-1)
    return x.to(dtype), Components(log_weights.to(dtype), loc.to(dtype), scale.to(dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_value(case: Case, dtype: torch.dtype, kind: str) -> None:
    x, parameters = problem(case, kind, dtype)
    keep = slice(None, None, 12) if case.points > 100 else slice(None)  # mpmath is slow
    got = mixture_log_prob(x, parameters)
    assert got.shape == x.shape[:1]
    assert got.dtype == dtype
    assert worst(got[keep], truth(x[keep], parameters), dtype) <= 6


def bare_expansion(x: Tensor, parameters: Components) -> Tensor:
    """The expanded quadratic in the caller's own precision."""
    a = parameters.scale.square().reciprocal()
    form = x.square() @ a.mT - 2 * x @ (a * parameters.loc).mT + (a * parameters.loc.square()).sum(-1)
    base = parameters.log_weights - parameters.scale.log().sum(-1) - x.shape[-1] * math.log(2 * math.pi) / 2
    return torch.logsumexp(base - form / 2, -1)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_value_refuses_the_bare_expansion(dtype: torch.dtype) -> None:
    # The must-fail twin of test_value.
    for case in CASES[-3:]:
        x, parameters = problem(case, "diagonal", dtype)
        assert worst(bare_expansion(x, parameters)[::12], truth(x[::12], parameters), dtype) > 30


@pytest.mark.parametrize("kind", KINDS)
def test_component_log_probs(kind: str) -> None:
    for dtype in (F32, F64):
        for case in CASES[:4]:
            x, parameters = problem(case, kind, dtype)
            got = component_log_probs(x, parameters)
            assert got.shape == (case.points, case.k)
            for k in range(case.k):
                alone = Components(torch.zeros(1, dtype=dtype), parameters.loc[k : k + 1], parameters.scale[k : k + 1])
                assert worst(got[:, k], truth(x, alone), dtype) <= 6


def test_ill_conditioned_factors() -> None:
    # An inverse from the left keeps the error of substitution, eps cond(L); measured: below 1 of these units.
    for log_condition in (3, 6, 9, 12):
        d = 6
        g = torch.Generator().manual_seed(log_condition)
        turn = torch.linalg.qr(torch.randn(d, d, dtype=F64, generator=g))[0]
        factor = torch.linalg.qr(torch.logspace(0, -log_condition, d, dtype=F64)[:, None] * turn)[1].mT
        factor = factor * factor.diagonal().sign()
        condition = float(torch.linalg.cond(factor))
        # points that are ordinary under the component: the forms are of order one
        x = torch.randn(8, d, dtype=F64, generator=g) @ factor.mT
        parameters = Components(torch.zeros(1, dtype=F64), torch.zeros(1, d, dtype=F64), factor[None])
        assert worst(mixture_log_prob(x, parameters), truth(x, parameters), F64) <= 2 * condition
        residual = inverse_factor(parameters.loc, parameters.scale) @ factor - torch.eye(d, dtype=F64)
        assert residual.abs().max() <= 50 * 2.0**-52 * condition


# ------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_gradient_against_the_differentiated_definition(kind: str, dtype: torch.dtype) -> None:
    for case in (CASES[0], CASES[5]._replace(spread=1.0)):
        x, parameters = problem(case._replace(points=2, k=2, d=2), kind, dtype)
        leaves = [t.clone().requires_grad_() for t in (x, *parameters)]
        got = torch.autograd.grad(mixture_log_prob(leaves[0], Components(*leaves[1:])).sum(), leaves)

        def total(*flat: mp.mpf, shapes=tuple(t.shape for t in leaves)) -> mp.mpf:
            flat_values, tensors = list(flat), []
            for shape in shapes:
                n = shape.numel()
                tensors.append(nested(flat_values[:n], shape))
                del flat_values[:n]
            points, weights, loc, scale = tensors
            return sum(
                mp.log(
                    sum(mp.exp(w + normal_log_prob(p, m, s)[0]) for w, m, s in zip(weights, loc, scale, strict=True))
                )
                for p in points
            )

        with mp.workdps(80):
            at = [mp.mpf(v) for t in leaves for v in t.detach().flatten().tolist()]
            index = 0
            for g, t in zip(got, leaves, strict=True):
                reference = []
                for _ in range(t.numel()):
                    step = mp.mpf(10) ** -25 * max(1, abs(at[index]))
                    up, down = list(at), list(at)
                    up[index] += step
                    down[index] -= step
                    reference.append((total(*up) - total(*down)) / (2 * step))
                    index += 1
                largest = max(abs(r) for r in reference)
                errors = [abs(mp.mpf(a) - b) for a, b in zip(g.flatten().tolist(), reference, strict=True)]
                assert float(max(errors)) <= 16 * torch.finfo(dtype).eps * largest


def nested(values: list, shape: torch.Size) -> list:
    if len(shape) == 1:
        return values
    n = shape[1:].numel()
    return [nested(values[i * n : (i + 1) * n], shape[1:]) for i in range(shape[0])]


def small(kind: str, batch: tuple[int, ...] = (), d: int = 2) -> list[Tensor]:
    p = Problem("", 3, 3, d, kind == "full", F64, batch)
    return inputs(p, "cpu")


def components_of(value: Tensor, log_weights: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    return component_log_probs(value, Components(log_weights, loc, scale))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("f", [ours, components_of])
@pytest.mark.parametrize(("batch", "d"), [((), 2), ((2,), 2), ((), 4)])  # d = 4: with saved responsibilities
def test_first_and_second_derivatives(f, kind: str, batch: tuple[int, ...], d: int) -> None:
    tensors = small(kind, batch, d)

    def g(*args: Tensor) -> Tensor:
        args = (*args[:3], args[3].tril()) if kind == "full" else args
        return f(*args)

    fast = {"fast_mode": True} if d == 4 else {}
    assert gradcheck(
        g, tensors, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True, **fast
    )
    assert gradgradcheck(g, tensors, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_gradient_is_that_of_the_expression(kind: str) -> None:
    for dtype, d in ((F64, 3), (F64, 5), (F32, 5)):
        tensors = inputs(Problem("", 700, 6, d, kind == "full", dtype), "cpu")
        w = torch.randn(700, dtype=dtype)
        for f, weight in ((ours, w), (components_of, w[:, None] * torch.ones(6, dtype=dtype))):
            streamed = torch.autograd.grad((weight * f(*tensors)).sum(), tensors, allow_unused=True)
            expression = torch.autograd.grad(
                (weight * f(*tensors)).sum(), tensors, create_graph=True, allow_unused=True
            )
            for a, b in zip(streamed, expression, strict=True):
                if a is not None and b is not None:
                    assert (a - b).abs().max() <= 200 * torch.finfo(dtype).eps * b.abs().max()


# ------------------------------------------------------------------------------------- nothing comes of zero


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("points", [3, 400])
@pytest.mark.parametrize("create_graph", [False, True])
def test_zero_weight_contributes_nothing(kind: str, dtype: torch.dtype, points: int, create_graph: bool) -> None:
    tensors = inputs(Problem("", points, 5, 4, kind == "full", dtype), "cpu")
    with torch.no_grad():
        x, log_weights, loc, scale = tensors
        log_weights[1], loc[1], x[0], x[1] = -math.inf, 1e10, 1e10, 1e10
        loc[3] = math.nan  # whatever an absent component holds
        log_weights[3] = -math.inf
    value = ours(*tensors)
    rest = [0, 2, 4]
    assert torch.equal(value[2:], ours(x, log_weights[rest], loc[rest], scale[rest])[2:]) or (points == 400)
    torch.testing.assert_close(value, ours(x, log_weights[rest], loc[rest], scale[rest]), rtol=1e-6, atol=1e-5)
    gradients = torch.autograd.grad(value.sum(), tensors, create_graph=create_graph)
    for g in gradients:
        assert torch.isfinite(g).all()
    for g in gradients[1:]:
        assert (g[[1, 3]] == 0).all()
        assert (g[rest] != 0).any()


def test_torch_leaks_a_zero_weight() -> None:
    # The must-fail twin: a far point under probs [1, 0].
    loc, scale, x = torch.tensor([[0.0], [10.0]]), torch.ones(2, 1), torch.tensor([[10.0]])
    torchs = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(probs=torch.tensor([1.0, 0.0])),
        torch.distributions.Independent(torch.distributions.Normal(loc, scale), 1),
    ).log_prob(x)
    parameters = Components(torch.tensor([0.0, -math.inf]), loc, scale)
    assert worst(mixture_log_prob(x, parameters), truth(x, parameters), F32) <= 2
    assert worst(torchs, truth(x, parameters), F32) > 1e5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("points", [4, 400])
@pytest.mark.parametrize("far", [1e25, 3e38, math.inf, -math.inf])
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_row_without_density(kind: str, points: int, far: float, create_graph: bool) -> None:
    tensors = inputs(Problem("", points, 5, 4, kind == "full", F32), "cpu")
    clean = [t.detach().clone().requires_grad_() for t in tensors]
    with torch.no_grad():
        tensors[0][1, 2] = far
        tensors[3].mul_(0.25)
        clean[3].mul_(0.25)
    value = ours(*tensors)
    assert value[1] == -math.inf
    assert torch.isfinite(value[[0, *range(2, points)]]).all()
    gradients = torch.autograd.grad(value.sum(), tensors, create_graph=create_graph)
    assert (gradients[0][1] == 0).all()
    keep = [0, *range(2, points)]
    expected = torch.autograd.grad(ours(clean[0][keep], *clean[1:]).sum(), clean)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_a_component_without_density_has_no_gradient() -> None:
    x = torch.tensor([[1e25], [0.5]])
    loc, scale = torch.zeros(2, 1, requires_grad=True), torch.ones(2, 1, requires_grad=True)
    value = component_log_probs(x, Components(torch.zeros(2), loc, scale))
    assert (value[0] == -math.inf).all()
    for g in torch.autograd.grad(value.sum(), (loc, scale)):
        assert torch.isfinite(g).all()


def test_nan_is_not_hidden() -> None:
    for kind in KINDS:
        tensors = [t.detach() for t in small(kind)]
        for i in (0, 2, 3):
            spoilt = [t.clone() for t in tensors]
            spoilt[i].view(-1)[0] = math.nan
            assert ours(*spoilt)[0].isnan()


# -------------------------------------------------------------------------------------- shapes and transforms


@pytest.mark.parametrize("kind", KINDS)
def test_batch_shapes(kind: str) -> None:
    tensors = [t.detach() for t in inputs(Problem("", 6, 3, 4, kind == "full", F64, (2, 5)), "cpu")]
    x, *parameters = tensors
    expected = torch.stack(
        [torch.stack([ours(x[:, i, j], *(p[i, j] for p in parameters)) for j in range(5)], -1) for i in range(2)], 1
    )
    got = ours(*tensors)
    assert got.shape == (6, 2, 5)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    assert ours(x.view(2, 3, 2, 5, 4), *parameters).shape == (2, 3, 2, 5)
    assert ours(x[0, 0, 0], *parameters).shape == (2, 5)
    assert ours(x[:, :1], *parameters).shape == (6, 2, 5)
    assert ours(x[:0], *parameters).shape == (0, 2, 5)
    assert components_of(x, *parameters).shape == (6, 2, 5, 3)
    shared = [p[:1, :1] for p in parameters[:2]]  # only the scales differ along the batch
    expanded = [p.expand(2, 5, *p.shape[2:]) for p in shared]
    assert torch.equal(ours(x, *shared, parameters[2]), ours(x, *expanded, parameters[2]))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_do_not_show(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype, batch in ((F64, ()), (F64, (7,)), (F32, ())):
        tensors = inputs(Problem("", 600, 5, 4, kind == "full", dtype, batch), "cpu")
        results = []
        for elements in (2**18, 300):
            monkeypatch.setattr(density_blocks, "_CPU_BLOCK", elements)
            for f in (ours, components_of):
                value = f(*tensors)
                gradients = torch.autograd.grad(value.sum(), tensors, allow_unused=True)
                results.append([value, *(g for g in gradients if g is not None)])
        for a, b in zip(results[0] + results[1], results[2] + results[3], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e3 * torch.finfo(dtype).eps * float(b.detach().abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_and_functional_transforms(kind: str) -> None:
    tensors = [t.detach() for t in small(kind, (4,))]
    x, *parameters = tensors
    torch.testing.assert_close(torch.vmap(ours, in_dims=(1, 0, 0, 0), out_dims=1)(*tensors), ours(*tensors))
    one = [p[0] for p in parameters]
    torch.testing.assert_close(torch.vmap(lambda v: ours(v, *one))(x[:, 0]), ours(x[:, 0], *one))
    jacobian = torch.vmap(torch.func.jacrev(ours, argnums=(0, 1, 2, 3)), in_dims=(1, 0, 0, 0))(*tensors)
    forward = torch.vmap(torch.func.jacfwd(ours, argnums=(0, 1, 2, 3)), in_dims=(1, 0, 0, 0))(*tensors)
    for a, b in zip(jacobian, forward, strict=True):
        torch.testing.assert_close(a, b)
    hessian = torch.func.hessian(lambda m: ours(x[:, 0], one[0], m, one[2]).sum())(one[1])
    reference = torch.autograd.functional.hessian(lambda m: ours(x[:, 0], one[0], m, one[2]).sum(), one[1])
    torch.testing.assert_close(hessian, reference)


@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind: str) -> None:
    torch.compiler.reset()
    tensors = inputs(Problem("", 5, 3, 4, kind == "full", F32), "cpu")
    compiled = torch.compile(ours, fullgraph=True)(*tensors)
    expected = ours(*tensors)
    torch.testing.assert_close(compiled, expected)
    for a, b in zip(
        torch.autograd.grad(compiled.sum(), tensors), torch.autograd.grad(expected.sum(), tensors), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_half_precision_is_rounded_once() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        x, parameters = problem(CASES[0], "diagonal", dtype)
        wide = mixture_log_prob(x.float(), Components(*(p.float() for p in parameters)))
        got = mixture_log_prob(x, parameters)
        assert got.dtype == dtype
        assert torch.equal(got, wide.to(dtype))


# --------------------------------------------------------------------------------------- the expansion's bound


def test_expansion_keeps_its_bound() -> None:
    # Spreads up to where `holds` refuses; the reference is the direct form in float64.
    accepted = refused = 0
    for exponent in range(0, 24):
        x, _, loc, scale = (t.detach() for t in inputs(Problem("", 300, 5, 8), "cpu"))
        x, loc = x * 2.0**exponent, loc * 2.0**exponent
        # half of the points right at a mean: the cancellation is complete
        x[::2] = loc[torch.arange(150) % 5] + 0.1 * x[::2] / 2.0**exponent
        direct = -0.5 * ((x[:, None].double() - loc.double()) / scale.double()).square().sum(-1)
        expansion = Expansion(torch.zeros(1, 5, dtype=F64), loc[None], scale.double().reciprocal()[None])
        points = x.mT[None]
        if not expansion.holds(points):
            refused += 1
            continue
        accepted += 1
        features = expansion.features(points, torch.empty(1, 16, 300, dtype=F64))
        got = expansion.logits(features, torch.empty(1, 5, 300, dtype=F64))[0].mT
        assert (got - direct).abs().max() <= 2.0**-23
    assert accepted >= 8
    assert refused >= 8


def test_expansion_refuses_what_is_not_finite() -> None:
    x, _, loc, scale = (t.detach() for t in inputs(Problem("", 300, 5, 8), "cpu"))
    expansion = Expansion(torch.zeros(1, 5, dtype=F64), loc[None], scale.double().reciprocal()[None])
    for bad in (math.nan, math.inf, -math.inf, 1e30):
        spoilt = x.clone()
        spoilt[7, 3] = bad
        assert not expansion.holds(spoilt.mT[None])
    assert expansion.holds(x.mT[None])


# ----------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "p",
    [
        Problem("expanded", 12000, 16, 32),
        Problem("direct", 6000, 16, 32, dtype=F64),
        Problem("full", 6000, 16, 32, True),
        Problem("few dimensions", 120000, 16, 2, dtype=F64),
        Problem("batched", 64, 4, 8, False, F64, (4000,)),
    ],
    ids=lambda p: p.name,
)
def test_memory(p: Problem) -> None:
    unit = p.n * p.k * p.d * math.prod(p.batch)
    tensors = inputs(p, "cpu")
    counted = memory(backward(ours, tensors, 0))
    assert counted.largest < unit / 2
    assert counted.peak <= 0.6 * unit * p.dtype.itemsize
    # The must-fail twin.
    torchs = memory(backward(theirs, tensors, 0))
    assert torchs.largest >= unit
    assert torchs.peak >= 2 * unit * p.dtype.itemsize


def test_points_in_more_rows_than_mixtures():
    """A batch dimension of 1 broadcasts against the points, as in torch's class; it once was an error."""
    g = torch.Generator().manual_seed(5)
    for batch, points in (((1,), (5,)), ((4, 1), (4, 5)), ((4, 1), (3, 1, 5)), ((1, 1), (2, 4, 5))):
        logits, loc = torch.randn(*batch, 3, generator=g), torch.randn(*batch, 3, 2, generator=g).requires_grad_()
        m = stablekl.GaussianMixture(logits=logits, loc=loc, scale_diag=torch.full((*batch, 3, 2), 0.5))
        x = torch.randn(*points, 2, generator=g)
        shape = torch.broadcast_shapes(batch, points)
        expected = m.expand(shape[-len(batch) :]).log_prob(x.expand(*shape, 2))
        torch.testing.assert_close(m.log_prob(x), expected)
        found, wanted = (torch.autograd.grad(y.sum(), loc)[0] for y in (m.log_prob(x), expected))
        torch.testing.assert_close(found, wanted)
