"""The two-component integral against integrals of the definition, in one, two and many dimensions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import mpmath as mp
import numpy as np
import pytest
import torch
from torch import Tensor

from stablekl.mixtures.components import Components
from stablekl.mixtures.engines import spectral_terms
from stablekl.mixtures.engines.spectral import label_entropy_given_sample, label_information

# What torch's own transforms and compiler warn about, wherever they are used.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]
F64 = torch.float64
BAR = 1e-14


# ------------------------------------------------------------------------------------------------- truths


def normalised(log_weights: Tensor) -> tuple[mp.mpf, mp.mpf]:
    """The exact weights behind two float log-weights."""
    a, b = (mp.exp(mp.mpf(x)) for x in log_weights.tolist())
    return a / (a + b), b / (a + b)


def information_density(p1: mp.mpf, p2: mp.mpf, w: tuple[mp.mpf, mp.mpf]) -> mp.mpf:
    """The integrand sum_k w_k p_k log(p_k/m)."""
    m = w[0] * p1 + w[1] * p2
    return sum(v * p * mp.log(p / m) if p else mp.mpf(0) for v, p in zip(w, (p1, p2), strict=True))


STEPS = (-16, -11, -8, -6, -4, -2, 0, 2, 4, 6, 8, 11, 16)


def line(
    w: tuple[mp.mpf, mp.mpf],
    shift: mp.mpf,
    s1: mp.mpf,
    s2: mp.mpf,
    score: Callable[[mp.mpf, int], mp.mpf] | None = None,
) -> mp.mpf:
    """I for w1 N(0, s1^2) + w2 N(shift, s2^2) by Gauss-Legendre panels, from the definition.

    With ``score(x, k)`` the integrand log(p_k/m) of each component is weighted by it.
    """
    centres, scales = (mp.mpf(0), mp.mpf(shift)), (mp.mpf(s1), mp.mpf(s2))
    edges = sorted({m + s * k for m, s in zip(centres, scales, strict=True) for k in STEPS})

    def f(x: mp.mpf) -> mp.mpf:
        a, b = (
            v * mp.exp(-(((x - m) / s) ** 2) / 2) / (s * mp.sqrt(2 * mp.pi))
            for v, m, s in zip(w, centres, scales, strict=True)
        )
        if score is None:
            return information_density(a / w[0], b / w[1], w)
        return sum(score(x, k) * v * mp.log(v / w[k] / (a + b)) if v else mp.mpf(0) for k, v in enumerate((a, b)))

    return mp.quad(f, edges, method="gauss-legendre")


def radius(w: tuple[mp.mpf, mp.mpf], dim: int, ratio: float) -> mp.mpf:
    """I for two centred spherical components whose scales have this ratio: an integral over the radius."""
    g = mp.mpf(ratio)
    norm = mp.mpf(2) ** (1 - mp.mpf(dim) / 2) / mp.gamma(mp.mpf(dim) / 2)

    def f(r: mp.mpf) -> mp.mpf:
        return information_density(
            *(norm * r ** (dim - 1) * mp.exp(-r * r / 2 / s**2) / s**dim for s in (mp.mpf(1), g)), w
        )

    middle = mp.sqrt(dim)
    edges = sorted({max(mp.mpf(0), s * (middle + k)) for s in (1, g) for k in STEPS})
    return mp.quad(f, edges, method="gauss-legendre")


def plane(log_w: list[float], shift: tuple[float, float], s: tuple[float, float], step: float) -> float:
    """I for w1 N(0, I) + w2 N(shift, diag(s^2)) on a grid, in extended precision (trapezoid rule)."""
    grid = np.arange(-16 / step, 16 / step + 1, dtype=np.longdouble) * np.longdouble(step)
    x, y = grid[:, None], grid[None, :]
    lw = np.array(log_w, dtype=np.longdouble)
    lw -= np.logaddexp(lw[0], lw[1])
    p = -(x * x + y * y) / 2
    u, v = (x - shift[0]) / s[0], (y - shift[1]) / s[1]
    q = -(u * u + v * v) / 2 - np.log(np.longdouble(s[0] * s[1]))
    m = np.logaddexp(lw[0] + p, lw[1] + q)
    integrand = np.exp(lw[0] + p) * (p - m) + np.exp(lw[1] + q) * (q - m)
    return integrand.sum() * np.longdouble(step) ** 2 / (2 * np.longdouble(np.pi))


# ------------------------------------------------------------------------------------------------ problems


class Line(NamedTuple):
    """w1 N(0, 1) + w2 N(shift, scale^2), exact floats."""

    name: str
    second_weight: float
    shift: float
    scale: float


LINES = [
    Line("plain", 0.5, 1.0, 1.0),
    Line("wider", 0.3, 0.5, 2.0),
    Line("narrow, off centre", 0.5, 3.0, 0.125),
    Line("rare and narrow", 1e-3, 2.0, 0.25),
    Line("weight 1e-9", 1e-9, 1.0, 2.0),
    Line("weight 1e-9, far", 1e-9, 20.0, 1.0),
    Line("weight 1e-30", 1e-30, 3.0, 0.5),
    Line("scale 1e-8", 0.2, 0.5, 1e-8),
    Line("scale 1e8", 0.2, 1e3, 1e8),
    Line("scale 1e-16", 0.4, -0.25, 1e-16),
    Line("scale 1e16", 0.4, -3.0, 1e16),
    Line("apart", 0.5, 12.0, 1.5),
    Line("1e10 apart", 0.5, 1e10, 1.0),
    Line("at the near switch", 0.4, 0.0, 1.29),
    Line("at the far switch", 0.4, 0.0, 4.36),
]
NEARBY = [
    Line("near, mean", 0.5, 1e-9, 1.0),
    Line("near, scale", 0.5, 0.0, 1 + 2.0**-30),
    Line("near, both, uneven", 0.3, -1e-9, 1 - 2.0**-30),
    Line("one ulp", 0.5, 0.0, 1 + 2.0**-52),
    Line("half a percent", 0.25, 0.005, 0.995),
]
NEAR_NAMES = {case.name for case in NEARBY}


def log_weights(second: float) -> Tensor:
    return torch.tensor([math.log1p(-second), math.log(second)], dtype=F64)


def line_components(case: Line, form: str) -> Components:
    loc = torch.tensor([[0.0], [case.shift]], dtype=F64)
    scale = torch.tensor([[1.0], [case.scale]], dtype=F64)
    scale = scale if form == "diagonal" else scale.unsqueeze(-1)
    return Components(log_weights(case.second_weight), loc, scale)


@functools.cache
def line_truth(case: Line) -> mp.mpf:
    results = []
    for digits in (60, 70) if case.name in NEAR_NAMES or case.second_weight < 1e-12 else (30, 40):
        with mp.workdps(digits):
            results.append(line(normalised(log_weights(case.second_weight)), case.shift, 1, case.scale))
    assert abs(results[0] - results[1]) <= mp.mpf(10) ** -20 * abs(results[1])
    return results[1]


def sheared(dim: int, seed: int) -> Tensor:
    """A lower-triangular map with eighths as entries: products with powers of two are exact."""
    g = torch.Generator().manual_seed(seed)
    off = torch.randint(-3, 4, (dim, dim), generator=g).to(F64).tril(-1) / 8 / dim**0.5
    return torch.diag_embed(1 + torch.randint(0, 4, (dim,), generator=g).to(F64) / 4) + (off * 8).round() / 8


def embedded(
    dim: int, second: float, shift: dict[int, float], scale: dict[int, float], form: str, seed: int = 0
) -> Components:
    """Components that differ along a few axes of R^dim, carried along by one affine map."""
    mu, s = torch.zeros(dim, dtype=F64), torch.ones(dim, dtype=F64)
    for i, value in shift.items():
        mu[i] = value
    for i, value in scale.items():
        s[i] = value
    a = sheared(dim, seed)
    if form == "diagonal":
        a = a.diagonal()
        return Components(log_weights(second), torch.stack([0 * mu, a * mu]), torch.stack([a, a * s]))
    return Components(log_weights(second), torch.stack([0 * mu, a @ mu]), torch.stack([a, a * s]))


# -------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("case", LINES, ids=lambda c: c.name)
def test_one_dimension(case: Line) -> None:
    components, truth = line_components(case, "diagonal"), line_truth(case)
    assert abs(label_information(components).item() - truth) <= BAR
    w = normalised(components.log_weights)
    rest = -sum(v * mp.log(v) for v in w) - truth
    assert abs(label_entropy_given_sample(components).item() - rest) <= BAR
    assert label_information(line_components(case, "full")) == label_information(components)


@pytest.mark.parametrize("case", NEARBY, ids=lambda c: c.name)
def test_relative_accuracy_near_identical_components(case: Line) -> None:
    truth = line_truth(case)
    assert abs(label_information(line_components(case, "diagonal")).item() - truth) <= 4e-15 * truth


@pytest.mark.parametrize("dim", [2, 8, 64])
@pytest.mark.parametrize("case", NEARBY[1:3], ids=lambda c: c.name)
def test_relative_accuracy_near_identical_full_covariances(case: Line, dim: int) -> None:
    case = case._replace(shift=round(case.shift * 2**50) / 2**50)  # exact under the map
    components = embedded(dim, case.second_weight, {dim // 2: case.shift}, {dim // 2: case.scale}, "full")
    truth = line_truth(case)
    assert abs(label_information(components).item() - truth) <= 1e-14 * truth


@pytest.mark.parametrize("kappa", [1e2, 1e4, 1e6])
def test_ill_conditioned_factors(kappa: float) -> None:
    dim, g = 16, torch.Generator().manual_seed(3)
    u, v = (torch.linalg.qr(torch.randn(dim, dim, generator=g, dtype=F64)).Q for _ in range(2))
    factor = torch.linalg.qr((u * torch.logspace(0, -math.log10(kappa), dim, dtype=F64)) @ v).R.mT
    factor = factor * factor.diagonal().sign()
    for case in (LINES[2], Line("wide", 0.3, 1.0, 1024.0)):
        for k in (0, dim - 1):
            s = torch.ones(dim, dtype=F64)
            s[k] = case.scale
            loc = torch.stack([0 * s, factor[:, k] * case.shift])
            components = Components(log_weights(case.second_weight), loc, torch.stack([factor, factor * s]))
            assert abs(label_information(components).item() - line_truth(case)) <= BAR


def test_twin_entropy_difference_fails_near_identical_components() -> None:
    components, truth = line_components(NEARBY[0], "diagonal"), line_truth(NEARBY[0])
    w = components.log_weights.exp()
    naive = -(w * components.log_weights).sum() - label_entropy_given_sample(components)
    assert abs(naive.item() - truth) > truth


def test_twin_sixty_four_nodes_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectral_terms, "NODES", 64)
    monkeypatch.setattr(spectral_terms, "STEP", 0.125)
    error = abs(label_information(line_components(LINES[-4], "diagonal")).item() - line_truth(LINES[-4]))
    assert BAR < error < 1e-8


@pytest.mark.parametrize("form", ["diagonal", "full"])
@pytest.mark.parametrize(
    ("second", "shift", "s"),
    [(0.5, (1.0, -0.5), (0.5, 1.5)), (0.125, (2.0, 2.0), (1.0, 0.75)), (0.3, (0.0, 0.25), (1.25, 0.75))],
)
@pytest.mark.parametrize("dim", [2, 8, 64])
def test_two_directions(dim: int, second: float, shift: tuple[float, float], s: tuple[float, float], form: str) -> None:
    i, j = (0, 1) if dim == 2 else (dim // 3, dim - 2)
    components = embedded(dim, second, {i: shift[0], j: shift[1]}, {i: s[0], j: s[1]}, form)
    coarse, truth = (plane(components.log_weights.tolist(), shift, s, step) for step in (1 / 12, 1 / 16))
    assert abs(coarse - truth) < 1e-16
    assert abs(float(label_information(components).item() - truth)) <= BAR


@pytest.mark.parametrize("form", ["diagonal", "full"])
@pytest.mark.parametrize("dim", [2, 8, 64])
@pytest.mark.parametrize("case", [LINES[2], LINES[3], LINES[0]], ids=lambda c: c.name)
def test_one_direction_of_many(dim: int, case: Line, form: str) -> None:
    components = embedded(dim, case.second_weight, {dim // 2: case.shift}, {dim // 2: case.scale}, form)
    assert abs(label_information(components).item() - line_truth(case)) <= BAR


@pytest.mark.parametrize("dim", [2, 8, 64])
def test_shared_covariance(dim: int) -> None:
    components = embedded(dim, 0.25, {0: 0.375, dim - 1: 0.5}, {}, "full")  # a mean difference of 0.625
    truth = line_truth(Line("", 0.25, 0.625, 1.0))
    assert abs(label_information(components).item() - truth) <= BAR


@pytest.mark.parametrize("form", ["diagonal", "full"])
@pytest.mark.parametrize(("dim", "ratio"), [(2, 1.5), (8, 0.5), (64, 1.125), (64, 8.0), (1000, 1.0625)])
def test_concentric_spheres(dim: int, ratio: float, form: str) -> None:
    components = embedded(dim, 0.3, {}, dict.fromkeys(range(dim), ratio), form)
    truth = radius(normalised(components.log_weights), dim, ratio)
    assert abs(label_information(components).item() - truth) <= BAR


def test_zero_weight_and_identical_components_give_exact_zeros() -> None:
    for form in ("diagonal", "full"):
        for components in (
            embedded(5, 0.3, {}, {}, form),
            embedded(5, 0.3, {1: 2.0}, {2: 3.0}, form)._replace(log_weights=torch.tensor([-math.inf, 0.0], dtype=F64)),
        ):
            inputs = [x.clone().requires_grad_() for x in components]
            value = label_information(Components(*inputs))
            assert value == 0
            assert all((g == 0).all() for g in torch.autograd.grad(value, inputs))
    tiny = embedded(5, 0.3, {1: 2.0}, {2: 3.0}, "full")._replace(log_weights=torch.tensor([0.0, -690.0], dtype=F64))
    assert abs(label_information(tiny)) < 1e-150


@pytest.mark.parametrize("form", ["diagonal", "full"])
def test_extremes_are_finite(form: str) -> None:
    s = torch.tensor([1e-16, 1.0, 1e16, 1e-300, 1e300], dtype=F64)
    scale = torch.stack([torch.ones_like(s), s])
    for shift in (0.0, 1.0, 1e10, 1e160):
        inputs = [
            log_weights(0.5).requires_grad_(),
            torch.stack([0 * s, 0 * s + shift]).requires_grad_(),
            (scale if form == "diagonal" else torch.diag_embed(scale)).requires_grad_(),
        ]
        value = label_information(Components(*inputs))
        assert abs(value.item() - math.log(2)) < 1e-15
        assert all(g.isfinite().all() for g in torch.autograd.grad(value, inputs))


# ----------------------------------------------------------------------------------------------- gradients

GRADIENT_CASES = [LINES[1], LINES[2], NEARBY[2], Line("far switch", 0.4, 0.5, 8.0)]


@functools.cache
def line_gradient(case: Line) -> tuple[float, ...]:
    """The derivatives of I by (log w1, log w2, shift, s1, s2).

    By the definition: d/d theta sum_k w_k E_k[log(p_k/m)] = sum_k w_k E_k[score log(p_k/m)], since the
    expected derivative of the logarithm itself is 0. The weights count as two free numbers.
    """
    with mp.workdps(40):
        w = normalised(log_weights(case.second_weight))
        shift, s2 = mp.mpf(case.shift), mp.mpf(case.scale)
        scores: list[Callable[..., mp.mpf]] = [
            lambda x, k: 1 - k,
            lambda x, k: k,
            lambda x, k: k * (x - shift) / s2**2,
            lambda x, k: (1 - k) * (x * x - 1),
            lambda x, k: k * (((x - shift) / s2) ** 2 - 1) / s2,
        ]
        return tuple(float(line(w, shift, mp.mpf(1), s2, score)) for score in scores)


def test_reference_gradient_is_the_derivative_of_the_reference() -> None:
    case = GRADIENT_CASES[0]
    with mp.workdps(40):
        h = mp.mpf(10) ** -12
        w = normalised(log_weights(case.second_weight))
        for theta, want in enumerate(line_gradient(case)):
            ends = []
            for sign in (1, -1):
                e = [sign * h if i == theta else mp.mpf(0) for i in range(5)]
                v = (w[0] * mp.exp(e[0]), w[1] * mp.exp(e[1]))
                mass = v[0] + v[1]
                v = (v[0] / mass, v[1] / mass)
                ends.append(mass * line(v, case.shift + e[2], 1 + e[3], case.scale + e[4]))
            assert abs((ends[0] - ends[1]) / (2 * h) - want) < 1e-15


@pytest.mark.parametrize("form", ["diagonal", "full"])
@pytest.mark.parametrize("dim", [1, 2, 8, 64])
@pytest.mark.parametrize("case", GRADIENT_CASES, ids=lambda c: c.name)
def test_gradient(case: Line, dim: int, form: str) -> None:
    k = dim // 2
    components = embedded(dim, case.second_weight, {k: case.shift}, {k: case.scale}, form)
    a = sheared(dim, 0)
    inputs = [x.clone().requires_grad_() for x in components]
    for create_graph in (False, True):
        lw, loc, scale = torch.autograd.grad(label_information(Components(*inputs)), inputs, create_graph=create_graph)
        # back to the frame in which only axis k differs: loc = A mu, scale = A B
        if form == "diagonal":
            loc, scale = a.diagonal() * loc, torch.diag_embed(a.diagonal() * scale)
        else:
            loc, scale = loc @ a, (a.mT @ scale).tril()
        e1, e2, m, s1, s2 = line_gradient(case)
        expected_loc, expected_scale = torch.zeros(2, dim, dtype=F64), torch.zeros(2, dim, dim, dtype=F64)
        expected_loc[:, k] = torch.tensor([-m, m], dtype=F64)
        expected_scale[:, k, k] = torch.tensor([s1, s2], dtype=F64)
        for got, want in (
            (lw, torch.tensor([e1, e2], dtype=F64)),
            (loc, expected_loc),
            (scale, expected_scale),
        ):
            assert (got - want).abs().max() <= 2e-14 * want.abs().max()


def random_inputs(batch: tuple[int, ...], dim: int, form: str, equal: bool = False) -> list[Tensor]:
    g = torch.Generator().manual_seed(7)
    scale = 0.5 + torch.rand(*batch, 2, dim, generator=g, dtype=F64)
    if equal:
        scale = torch.ones_like(scale)
    if form == "full":
        scale = torch.diag_embed(scale)
        if not equal:
            scale = scale + torch.randn(*batch, 2, dim, dim, generator=g, dtype=F64).tril(-1)
    loc = torch.randn(*batch, 2, dim, generator=g, dtype=F64)
    if equal:
        loc = torch.zeros_like(loc)
    weights = torch.randn(*batch, 2, generator=g, dtype=F64).log_softmax(-1)
    return [x.clone().requires_grad_() for x in (weights, loc, scale)]


def restricted(f: Callable[[Components], Tensor], form: str) -> Callable[..., Tensor]:
    """F of inputs of which only the lower triangle counts, as finite differences need."""
    return lambda lw, loc, scale: f(Components(lw, loc, scale.tril() if form == "full" else scale))


@pytest.mark.parametrize("equal", [False, True], ids=["generic", "identical"])
@pytest.mark.parametrize("form", ["diagonal", "full"])
@pytest.mark.parametrize("f", [label_information, label_entropy_given_sample])
def test_first_second_and_forward_derivatives(f: Callable[[Components], Tensor], form: str, equal: bool) -> None:
    inputs = random_inputs((), 2, form, equal)
    assert torch.autograd.gradcheck(restricted(f, form), inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(restricted(f, form), inputs)


@pytest.mark.parametrize("form", ["diagonal", "full"])
def test_transforms(form: str) -> None:
    inputs = random_inputs((3, 2), 3, form)

    def f(lw: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        return label_information(Components(lw, loc, scale))

    value = f(*inputs)
    gradients = torch.autograd.grad(value.sum(), inputs)
    plain = [x.detach() for x in inputs]
    assert torch.allclose(torch.vmap(torch.vmap(f))(*plain), value, rtol=1e-14)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        rows = torch.vmap(torch.vmap(transform(f, argnums=(0, 1, 2))))(*plain)
        for row, g in zip(rows, gradients, strict=True):
            assert torch.allclose(row, g, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("form", ["diagonal", "full"])
def test_blocks_do_not_change_the_result(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[Tensor]:
        inputs = random_inputs((7,), 5, form)
        value = label_information(Components(*inputs))
        return [value, *torch.autograd.grad(value.sum(), inputs)]

    whole = run()
    monkeypatch.setattr(spectral_terms, "BLOCK", 150)
    for a, b in zip(run(), whole, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("form", ["diagonal", "full"])
def test_one_graph_forward_and_backward(form: str) -> None:
    torch.compiler.reset()  # or the second form is a recompilation of the first

    def f(lw: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        return label_information(Components(lw, loc, scale))

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    # the second time with symbolic shapes, which the factorisations of full covariances must bear
    for batch in ((3,), (5,)) if form == "full" else ((3,),):
        inputs = random_inputs(batch, 4, form)
        value, plain = compiled(*inputs), f(*inputs)
        assert torch.allclose(value, plain, rtol=1e-13)
        for a, b in zip(
            torch.autograd.grad(value.sum(), inputs), torch.autograd.grad(plain.sum(), inputs), strict=True
        ):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("second", [0.5, 0.1])
@pytest.mark.parametrize("shift", [3.0, 10.0, 20.0, 40.0])
def test_label_entropy_keeps_its_relative_accuracy_far_apart(shift: float, second: float) -> None:
    lw = log_weights(second)
    components = Components(lw, torch.tensor([[0.0], [shift]], dtype=F64), torch.tensor([[1.0], [1.0]], dtype=F64))
    with mp.workdps(30):
        w, d = normalised(lw), mp.mpf(shift)
        unit = mp.exp(d * d / 8)
        middle = d / 2 + mp.log(w[0] / w[1]) / d  # where the responsibilities cross

        def f(x: mp.mpf) -> mp.mpf:
            a, b = w[0] * mp.exp(-x * x / 2), w[1] * mp.exp(-((x - d) ** 2) / 2)
            # brought to size 1, as the quadrature stops at an absolute error
            return unit * (a * mp.log1p(b / a) + b * mp.log1p(a / b)) / mp.sqrt(2 * mp.pi)

        # The log-ratio is shift (x - middle): panels two wide in it, out to +-80 where f has lost exp(-40).
        truth = mp.quad(f, [middle + 2 * k / d for k in range(-40, 41)], method="gauss-legendre") / unit
    assert abs(label_entropy_given_sample(components).item() - truth) <= 1e-14 * truth
    left_over = -(lw.exp() * lw).sum() - label_information(components)
    if shift >= 10:  # the twin: a difference of numbers near log 2
        assert abs(left_over.item() - truth) > 1e-12 * truth


def test_shapes_dtypes_and_errors() -> None:
    lw, loc, scale = (x.detach() for x in random_inputs((3,), 4, "diagonal"))
    assert label_information(Components(lw[0], loc, scale[:1])).shape == (3,)
    assert label_information(Components(lw[:0], loc[:0], scale[:0])).shape == (0,)
    half = Components(lw.float(), loc.float(), scale.float())
    assert label_information(half).dtype == torch.float32
    with pytest.raises(ValueError, match="two components"):
        label_information(Components(torch.zeros(3), torch.zeros(3, 1), torch.ones(3, 1)))


# ------------------------------------------------------------------------------------- elementary functions


def worst_relative_error(f: Callable[[Tensor], Tensor], exact: Callable[[mp.mpf], mp.mpf], x: Tensor) -> float:
    with mp.workdps(40):
        truths = [exact(mp.mpf(v)) for v in x.tolist()]
        return max(float(abs(v / t - 1)) for v, t in zip(f(x).tolist(), truths, strict=True))


def test_differences_of_inverse_functions_keep_their_digits():
    x = torch.logspace(-7, 1.3, 600, dtype=F64)
    small = torch.logspace(-7, math.log10(0.9), 600, dtype=F64)
    arctan, artanh = (lambda v: v - mp.atan(v)), (lambda v: mp.atanh(v) - v)
    assert worst_relative_error(spectral_terms.x_minus_atan, arctan, x) < 1e-14
    assert worst_relative_error(spectral_terms.atanh_minus_x, artanh, small) < 1e-14
    odd = spectral_terms.x_minus_atan(-x)
    assert torch.equal(odd, -spectral_terms.x_minus_atan(x))
    # must fail: the subtraction
    assert worst_relative_error(lambda v: v - torch.atan(v), arctan, x) > 1e-3
