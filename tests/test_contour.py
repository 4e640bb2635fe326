"""KL of a Gaussian to a mixture of two, against the definition: in long double on a line, in mpmath elsewhere."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from stablekl.distributions._gaussian import Gaussian, gaussian_kl
from stablekl.mixtures.components import Components
from stablekl.mixtures.engines import contour_terms
from stablekl.mixtures.engines.contour import contour_kl
from stablekl.precision.references import mixture
from stablekl.precision.references.context import mp
from tests.mixture_references import embedded, line, radial

# torch.compile instantiates the Function that it inlines
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
F64 = torch.float64
LD = np.longdouble
BAR = 1e-13

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def kl(p_loc: Tensor, p_scale: Tensor, lv: Tensor, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """For one Gaussian per row: p_loc [B, D], the rest of shapes [B, 2, ...]."""
    p = Components(torch.zeros_like(p_loc[..., :1]), p_loc.unsqueeze(-2), p_scale.unsqueeze(p_loc.ndim - 1))
    value, error = contour_kl(p, Components(lv, loc, scale))
    return value.squeeze(-1), error.squeeze(-1)


# ---- truths -------------------------------------------------------------------------------------------------------


def definition(inputs: Inputs) -> list[np.ndarray]:
    """KL = int p (log p - log q) on a line and its gradients by the five inputs, [B, ...], in long double.

    Panels follow p, the components and the crossings of the components, at all scales around each.
    """
    pm, ps, lv, qm, qs = (x.detach().numpy().astype(LD) for x in inputs)
    (m1, m2), (s1, s2) = (x[..., 0].T for x in (qm, qs))
    square = (s2 - s1) * (s2 + s1) / (2 * s1**2 * s2**2)
    line_ = m2 / s2**2 - m1 / s1**2
    level = lv[:, 1] - lv[:, 0] + np.log(s1 / s2) - (m2 / s2) ** 2 / 2 + (m1 / s1) ** 2 / 2
    root = np.sqrt(np.maximum(line_**2 - 4 * square * level, 0))
    half = np.where(line_ < 0, root - line_, -root - line_) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        places = [(half / square, 1 / root), (level / half, 1 / root)]
        places += [(m1, s1), (m2, s2), (-line_ / (2 * square), 1 / np.sqrt(np.abs(square)))]
    steps = np.concatenate([LD(2) ** np.arange(-4, 40, dtype=LD), [0], -(LD(2) ** np.arange(-4, 40, dtype=LD))])
    edges = [pm + ps * np.linspace(-13, 13, 53).astype(LD)]
    for place, width in places:
        usable = np.isfinite(place) & np.isfinite(width)
        place, width = (np.where(usable, x, y)[:, None] for x, y in ((place, 0), (width, 1)))
        edges.append(place + width * steps)
    ends = np.concatenate(edges, 1)
    ends = np.sort(np.clip(ends, pm - 13 * ps, pm + 13 * ps), 1)
    nodes, weights = (x.astype(LD) for x in np.polynomial.legendre.leggauss(20))
    width = np.diff(ends)[..., None] / 2
    x = (ends[:, :-1, None] + width * (1 + nodes)).reshape(len(pm), -1)
    z = (x - pm) / ps
    mass = (width * weights).reshape(len(pm), -1) * np.exp(-z * z / 2) / ps / np.sqrt(2 * LD(np.pi))
    zq = (x[:, None] - qm) / qs
    terms = lv[..., None] - np.log(qs) - zq * zq / 2
    log_q = np.logaddexp(terms[:, 0], terms[:, 1])
    share = np.exp(terms - log_q[:, None]) * mass[:, None]
    pull = (share * zq / qs).sum(1)
    return [
        (mass * (-np.log(ps) - z * z / 2 - log_q)).sum(1),
        pull.sum(1)[:, None],
        (pull * z).sum(1)[:, None] - 1 / ps,
        -share.sum(2),
        -(share * zq / qs).sum(2)[..., None],
        -(share * (zq * zq - 1) / qs).sum(2)[..., None],
    ]


def random_lines(n: int, decades: float, seed: int) -> Inputs:
    """p and q on a line, with scales within 10^+-decades of each other and weights down to 1e-80."""
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(*shape, generator=g, dtype=F64) - 1

    small = torch.exp(-torch.rand(n, generator=g, dtype=F64) * torch.where(uniform(n) < 0.3, 3.0, 180.0)) / 2
    lv = torch.stack([torch.log1p(-small), torch.log(small)], -1)
    lv = torch.where(uniform(n, 1) < 0, lv, lv.flip(-1))
    near = torch.where(uniform(n, 1, 1) < 0, 1.0, 0.02)
    qs = 10 ** ((0.5 + decades / 4) * uniform(n, 1, 1) + near * uniform(n, 2, 1))
    spread = 10 ** ((decades + 0.5) * uniform(n, 1, 1))
    qm = torch.randn(n, 2, 1, generator=g, dtype=F64) * spread
    return torch.randn(n, 1, generator=g, dtype=F64), 10 ** (decades * uniform(n, 1)), lv, qm, qs


def rows(inputs: Inputs, i: int) -> tuple[list[tuple[float, float, float]], list[tuple[mp.mpf, float, float]]]:
    pm, ps, lv, qm, qs = (x[i].flatten().tolist() for x in inputs)
    return [(1.0, pm[0], ps[0])], [(mp.exp(w), m, s) for w, m, s in zip(lv, qm, qs, strict=True)]


# ---- on a line ----------------------------------------------------------------------------------------------------


def test_the_truth_itself() -> None:
    inputs = random_lines(6, 0.3, 1)
    truth = definition(inputs)[0]
    for i in range(6):
        p, q = rows(inputs, i)
        total = sum(w for w, _, _ in q)  # `line` normalises
        assert abs(float(truth[i]) - (line(p, q) - mp.log(total))) < 1e-15 * (1 + float(truth[i]))


@pytest.mark.parametrize("decades", [0.0, 1.0, 2.0, 4.0])
def test_on_a_line(decades: float) -> None:
    inputs = tuple(x.requires_grad_() for x in random_lines(80, decades, int(decades) + 10))
    value, error = kl(*inputs)
    gradients = torch.autograd.grad(value.sum(), inputs)
    truth, *slopes = definition(inputs)
    off = np.abs(value.detach().numpy() - truth) / (1 + truth)
    print(f"decades {decades}: {off.max():.1e}; error claimed up to {(error.detach() / (1 + value)).max():.1e}")
    assert off.max() < BAR / 3
    assert (off * (1 + truth) <= error.numpy()).all()
    for mine, slope in zip(gradients, slopes, strict=True):
        gap = np.abs(mine.numpy() - slope).reshape(80, -1).max(1) / np.abs(slope).reshape(80, -1).max(1)
        assert gap.max() < 1e-11, f"{gap.max():.1e}"


def test_a_fixed_crossing_would_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: a crossing that knows the strip but not the integrand, at equal covariances and far apart means."""
    inputs = (
        torch.zeros(1, 1, dtype=F64),
        torch.tensor([[100.0]], dtype=F64),
        torch.tensor([[0.5, 0.5]], dtype=F64).log(),
        torch.tensor([[[-3.0], [3.0]]], dtype=F64),
        torch.ones(1, 2, 1, dtype=F64),
    )
    truth = definition(inputs)[0]
    assert abs(kl(*inputs)[0].numpy() - truth) < BAR * (1 + truth)

    def middle(quadratic: contour_terms.Quadratic) -> tuple[Tensor, Tensor]:
        half = -0.5 / quadratic.curvature.amin(-1).clamp(max=-1.0)
        return half, half

    monkeypatch.setattr(contour_terms, "_crossing", middle)
    assert not abs(kl(*inputs)[0].numpy() - truth) < 1e-6 * (1 + truth)


# ---- many dimensions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 8, 64])
def test_embedded_lines(dim: int) -> None:
    n = {2: 60, 8: 30, 64: 6}[dim]
    inputs = tuple(x.requires_grad_() for x in random_lines(n, 1.0, dim))
    truth, *slopes = definition(inputs)
    pm, ps, lv, qm, qs = inputs
    one = torch.ones(n, 1, dtype=F64)
    table = torch.cat([torch.stack([one, pm, ps], -1), torch.cat([lv.exp().unsqueeze(-1), qm, qs], -1)], 1)
    _, loc, cov = embedded(table, dim, seed=dim)
    factors = torch.linalg.cholesky(cov)
    value, error = kl(loc[:, 0], factors[:, 0], lv, loc[:, 1:], factors[:, 1:])
    gradients = torch.autograd.grad(value.sum(), inputs)
    off = np.abs(value.detach().numpy() - truth)
    condition = torch.linalg.cond(factors.detach()).amax(-1).numpy()
    print(f"dim {dim}: {(off / (1 + truth)).max():.1e}, over the condition {(off / (1 + truth) / condition).max():.1e}")
    assert (off <= BAR / 3 * (1 + truth)).all()
    assert (off <= error.numpy()).all()
    for mine, slope in zip(gradients, slopes, strict=True):
        gap = np.abs(mine.numpy() - slope).reshape(n, -1).max(1) / np.abs(slope).reshape(n, -1).max(1)
        print(f"    gradient {gap.max():.1e}")
        assert gap.max() <= 1e-12


@pytest.mark.parametrize("dim", [8, 64, 1000])
@pytest.mark.parametrize("form", ["diagonal", "full"])
def test_concentric(dim: int, form: str) -> None:
    if form == "full" and dim == 1000:
        pytest.skip("an eigendecomposition of that size takes a second")
    near = 1 / math.sqrt(dim)
    cases = [
        (1.0, (0.5, 0.5), (1 - near, 1 + near)),
        (1.0, (0.9, 0.1), (1.0, 1 + 2 * near)),
        (1.0, (1 - 1e-6, 1e-6), (1 + near, 1.0)),
        (1e4, (0.3, 0.7), (1.0, 1 + 1e-9)),
        (1e-4, (0.3, 0.7), (1.0, 1.2)),
    ]
    for sigma, weights, scales in cases[:3] if dim == 1000 else cases:
        truth = radial([(1.0, sigma)], list(zip(weights, scales, strict=True)), dim)
        p = torch.full((dim,), sigma, dtype=F64)
        q = torch.tensor(scales, dtype=F64).unsqueeze(-1).expand(2, dim)
        if form == "full":
            p, q = torch.diag_embed(p), torch.diag_embed(q)
        lv = torch.tensor(weights, dtype=F64)
        lv = torch.log(lv / lv.sum())
        value, error = kl(torch.zeros(dim, dtype=F64), p, lv, torch.zeros(2, dim, dtype=F64), q)
        off = abs(value.item() - truth)
        print(f"{dim} {form} {sigma}: KL {float(truth):.6g}, off {float(off / (1 + truth)):.1e}")
        assert off <= BAR * (1 + truth)
        assert off <= error.item()


@pytest.mark.parametrize("decades", [0.0, 1.0, 2.0, 4.0])
def test_log_ratio_of_two_exponentials(decades: float) -> None:
    """In four dimensions, in pairs: y = c + k (u - 1) - l (v - 1) with u, v exponential, so a closed density."""
    scale = 10.0**decades
    for first, second in (((1.0, 1.5), (1.4, 1.1)), ((0.3, 20.0), (7.0, 0.2)), ((1.0, 1.0), (1e-3, 2.0))):
        a, b = (torch.tensor([s, s, t, t], dtype=F64) for s, t in (first, second))
        p = torch.tensor([scale, scale, 1 / scale, 1 / scale], dtype=F64)
        lv = torch.tensor([0.25, 0.75], dtype=F64).log()
        zeros = torch.zeros(4, dtype=F64)
        value, error = kl(zeros, p, lv, torch.zeros(2, 4, dtype=F64), torch.stack([a, b]))
        with mp.workdps(40):
            s = [mp.mpf(x.item()) for x in p[::2]]
            q1, q2 = ([mp.mpf(x.item()) for x in q[::2]] for q in (a, b))
            c = (
                mp.mpf(lv[1].item())
                - mp.mpf(lv[0].item())
                + 2 * sum(mp.log(x / y) for x, y in zip(q1, q2, strict=True))
            )
            k = [u * u * (1 / (x * x) - 1 / (y * y)) for u, x, y in zip(s, q1, q2, strict=True)]
            alone = sum((u / x) ** 2 - 1 - 2 * mp.log(u / x) for u, x in zip(s, q1, strict=True))
            # E softplus(c + k0 u + k1 v): softplus(c) + int sigmoid(c + t) P(beyond t) dt over both signs
            mean = mp.mpf(0)

            def density(t: mp.mpf, k: list[mp.mpf] = k) -> mp.mpf:
                total = mp.mpf(0)
                for i in range(2):
                    if k[i] != 0 and (t > 0) == (k[i] > 0):
                        total += mp.exp(-t / k[i]) / abs(k[i]) * (k[i] / (k[i] - k[1 - i]))
                return total

            cut = {-c}
            for w in [1, *(abs(x) for x in k if x)]:
                cut |= {
                    place + sign * w * mp.mpf(2) ** j for place in (0, -c) for sign in (1, -1) for j in range(-5, 8)
                }
            reach = 90 * max(abs(x) for x in k)
            cut = sorted({mp.mpf(0), *(x for x in cut if abs(x) < reach), reach, -reach})
            for low, high in itertools.pairwise(cut):
                half, middle = (high - low) / 2, (high + low) / 2
                for x, w in NODES:
                    t = middle + half * x
                    y = t + c
                    mean += half * w * density(t) * (max(y, 0) + mp.log1p(mp.exp(-abs(y))))
            truth = alone - mp.mpf(lv[0].item()) - mean
        off = abs(value.item() - truth)
        print(f"{decades} {first}: KL {float(truth):.4g}, off {float(off / (1 + truth)):.1e}")
        assert off <= BAR * (1 + truth)
        assert off <= error.item()


NODES = mixture._gauss_legendre(24, 128)


# ---- choices and limits -------------------------------------------------------------------------------------------


def random_inputs(batch: tuple[int, ...], dim: int, form: str, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*batch, *shape, generator=g, dtype=F64)

    def scale(*shape: int) -> Tensor:
        stds = torch.exp(0.5 * randn(*shape, dim))
        if form == "diagonal":
            return stds
        return torch.diag_embed(stds) + 0.5 * randn(*shape, dim, dim).tril(-1)

    inputs = [randn(dim), scale(), torch.log_softmax(randn(2), -1), randn(2, dim), scale(2)]
    return [x.requires_grad_() for x in inputs]


def value_of(*inputs: Tensor) -> Tensor:
    return kl(*inputs)[0]


def test_the_nearer_component_is_the_reference() -> None:
    """KL(p || q1) = 5e7 beside KL(p || q2) = 0.5, either way round; the twin subtracts from the other."""
    p_loc, p_scale = torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64)
    loc = torch.tensor([[0.5, 0.0], [1.0, 0.0]], dtype=F64)
    scale = torch.tensor([[1e-4, 1e-4], [1.0, 1.0]], dtype=F64)
    lv = torch.tensor([0.5, 0.5], dtype=F64).log()
    # q1 is a needle: it takes its posterior share of p where it stands
    with mp.workdps(30):

        def shell(r: mp.mpf, t: mp.mpf) -> mp.mpf:
            r, t = mp.mpf(r) * mp.mpf("1e-4"), mp.mpf(t)
            x, y = mp.mpf("0.5") + r * mp.cos(t), r * mp.sin(t)
            u = 8 * mp.log(10) - (r / mp.mpf(1e-4)) ** 2 / 2 + ((x - 1) ** 2 + y * y) / 2
            return mp.exp(-(x * x + y * y) / 2) / (2 * mp.pi) * mp.log1p(mp.exp(u)) * r * mp.mpf("1e-4")

        angles = [(mp.pi * (2 * j + 1) / 8, mp.pi / 4) for j in range(8)]
        gain = mp.mpf(0)
        for low in range(0, 12):
            for x, w in NODES:
                gain += sum(w / 2 * weight * shell(low + (1 + x) / 2, t) for t, weight in angles)
        truth = mp.mpf("0.5") - mp.log(mp.mpf("0.5")) - gain
    for order in ([0, 1], [1, 0]):
        value, error = kl(p_loc, p_scale, lv, loc[order], scale[order])
        assert abs(value.item() - truth) < 2e-14
        assert abs(value.item() - truth) <= error.item()
    y = gaussian_kl(Gaussian("scale_diag", p_loc, p_scale), Gaussian("scale_diag", loc, scale)).diff()
    assert abs(torch.nextafter(y, torch.zeros(1, dtype=F64)) - y).item() > 5e-9  # E y, which the other would subtract


@pytest.mark.parametrize("form", ["diagonal", "full"])
def test_zero_weights(form: str) -> None:
    p_loc, p_scale, _, loc, scale = random_inputs((3,), 4, form)
    for j in (0, 1):
        lv = torch.zeros(3, 2, dtype=F64)
        lv[:, 1 - j] = -math.inf
        inputs = (p_loc, p_scale, lv.requires_grad_(), loc, scale)
        value = value_of(*inputs)
        kind = "scale_diag" if form == "diagonal" else "scale_tril"
        alone = gaussian_kl(Gaussian(kind, p_loc, p_scale), Gaussian(kind, loc[:, j], scale[:, j]))
        assert torch.equal(value, alone)
        gradients = torch.autograd.grad(value.sum(), inputs, create_graph=True)
        expected = torch.autograd.grad(alone.sum(), (p_loc, p_scale, loc, scale))
        for mine, right in zip([gradients[i] for i in (0, 1, 3, 4)], expected, strict=True):
            assert torch.equal(mine, right)
        assert torch.equal(gradients[2], torch.where(lv == 0, -1.0, 0.0))
        seconds = torch.autograd.grad(sum(x.square().sum() for x in gradients), inputs)
        assert all(x.isfinite().all() for x in seconds)


@pytest.mark.parametrize("weight", [1e-16, 1e-100, 1e-300, 5e-324])
def test_tiny_weights(weight: float) -> None:
    """q1 of almost no weight, but p is there and far from q2."""
    for distance in (0.0, 5.0, 40.0, 1e4):
        inputs = tuple(
            torch.tensor(x, dtype=F64)
            for x in ([[0.1]], [[1.0]], [[math.log(weight), 0.0]], [[[0.0], [distance]]], [[[1.5], [1.0]]])
        )
        truth = definition(inputs)[0]
        value, error = kl(*inputs)
        assert abs(value.numpy() - truth) <= BAR / 3 * (1 + truth)
        assert abs(value.numpy() - truth) <= error.numpy()


@pytest.mark.parametrize("form", ["diagonal", "full"])
def test_equal_components_are_one(form: str) -> None:
    p_loc, p_scale, lv, loc, scale = random_inputs((5,), 4, form)
    loc, scale = (x[:, :1].expand(x.shape) for x in (loc, scale))
    value = value_of(p_loc, p_scale, lv, loc, scale)
    kind = "scale_diag" if form == "diagonal" else "scale_tril"
    alone = gaussian_kl(Gaussian(kind, p_loc, p_scale), Gaussian(kind, loc[:, 0], scale[:, 0]))
    assert torch.allclose(value, alone, rtol=1e-15, atol=3e-16)
    gradients = torch.autograd.grad(value.sum(), (p_loc, p_scale, lv))
    expected = torch.autograd.grad(alone.sum(), (p_loc, p_scale))
    for mine, right in zip(gradients, (*expected, -lv.exp()), strict=True):
        assert torch.allclose(mine, right, rtol=1e-13, atol=1e-14)


def test_nearly_equal_components() -> None:
    for gap in (1e-3, 1e-8, 1e-15):
        inputs = tuple(
            torch.tensor(x, dtype=F64)
            for x in ([[0.3]], [[0.9]], [[math.log(0.3), math.log(0.7)]], [[[0.0], [gap]]], [[[1.0], [1.0 + gap]]])
        )
        assert abs(kl(*inputs)[0].numpy() - definition(inputs)[0]) <= 1e-15


def test_beyond_range() -> None:
    """One component as good as at infinity, then both."""
    p_loc, p_scale = torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64)
    lv, scale = torch.tensor([0.5, 0.5], dtype=F64).log(), torch.ones(2, 1, dtype=F64)
    for far in (1e6, 1e40, 1e100, 1e200):
        loc = torch.tensor([[far], [1.0]], dtype=F64, requires_grad=True)
        value, error = kl(p_loc, p_scale, lv, loc, scale)
        value.sum().backward()
        assert abs(value.item() - 0.5 - math.log(2)) < 1e-15
        assert torch.equal(loc.grad, torch.tensor([[0.0], [1.0]], dtype=F64))
        value, error = kl(p_loc, p_scale, lv, loc.detach().flip(-2) * 0 + far, scale)
        assert abs(value.item() / far / far - 0.5) < 1e-5 or (far == 1e200 and value.item() == math.inf)
        assert not error.isnan()


@pytest.mark.parametrize("form", ["diagonal", "full"])
def test_forms_and_broadcasting(form: str) -> None:
    """Full factors that are diagonal, mixed forms, and several p for each q give the diagonal's values."""
    p_loc, p_scale, lv, loc, scale = (x.detach() for x in random_inputs((3,), 4, "diagonal"))
    q = Components(lv, loc, scale)
    rotate = torch.diag_embed if form == "full" else torch.clone
    p = Components(torch.zeros(3, dtype=F64), p_loc, rotate(p_scale))
    value, error = contour_kl(p, q)
    assert value.shape == error.shape == (3, 3)
    for i in range(3):
        single, _ = kl(p_loc, p_scale, lv[i], loc[i], scale[i])
        assert torch.allclose(value[i], single, rtol=1e-14, atol=1e-15)
    value, _ = contour_kl(p, q._replace(scale=torch.diag_embed(scale)))
    assert torch.allclose(value[1], kl(p_loc, p_scale, lv[1], loc[1], scale[1])[0], rtol=1e-14, atol=1e-15)
    none, _ = contour_kl(p, Components(lv[:0], loc[:0], scale[:0]))
    assert none.shape == (0, 3)
    half, _ = contour_kl(p.to(torch.float32), q.to(torch.float32))
    assert half.dtype == torch.float32
    assert torch.allclose(half, contour_kl(p, q)[0].float(), rtol=1e-5)


def test_errors() -> None:
    p = Components(torch.zeros(1), torch.zeros(1, 2), torch.ones(1, 2))
    with pytest.raises(ValueError, match="two components"):
        contour_kl(p, Components(torch.zeros(3), torch.zeros(3, 2), torch.ones(3, 2)))
    with pytest.raises(ValueError, match="same dimension"):
        contour_kl(p, Components(torch.zeros(2), torch.zeros(2, 3), torch.ones(2, 3)))


# ---- transforms ---------------------------------------------------------------------------------------------------


def free(form: str) -> Callable[..., Tensor]:
    """With factors that may have anything above the diagonal, as gradcheck perturbs it."""

    def f(*inputs: Tensor) -> Tensor:
        p_loc, p_scale, lv, loc, scale = inputs
        if form == "full":
            p_scale, scale = p_scale.tril(), scale.tril()
        return value_of(p_loc, p_scale, lv, loc, scale)

    return f


@pytest.mark.parametrize("form", ["diagonal", "full"])
def test_derivatives(form: str) -> None:
    inputs = random_inputs((1,), 2, form, seed=3)
    assert torch.autograd.gradcheck(free(form), inputs, rtol=1e-5, atol=1e-7, fast_mode=True)
    assert torch.autograd.gradgradcheck(free(form), inputs, rtol=1e-5, atol=1e-7, fast_mode=True)


def test_second_derivatives_at_equal_eigenvalues() -> None:
    inputs = random_inputs((1,), 2, "full", seed=4)
    eye = torch.eye(2, dtype=F64).expand(1, 2, 2)
    inputs[1] = eye.clone().requires_grad_()
    inputs[4] = torch.stack([1.3 * eye, 0.8 * eye], 1).requires_grad_()
    assert torch.autograd.gradgradcheck(free("full"), inputs, rtol=1e-5, atol=1e-7, fast_mode=True)


@pytest.mark.parametrize("form", ["diagonal", "full"])
def test_vmap_and_forward_mode(form: str) -> None:
    inputs = random_inputs((2, 3), 3, form)
    value = value_of(*inputs)
    gradients = torch.autograd.grad(value.sum(), inputs)
    plain = [x.detach() for x in inputs]
    assert torch.allclose(torch.vmap(torch.vmap(value_of))(*plain), value, rtol=1e-14)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        per_row = torch.vmap(torch.vmap(transform(free(form), argnums=(0, 1, 2, 3, 4))))(*plain)
        for row, g in zip(per_row, gradients, strict=True):
            assert torch.allclose(row, g, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("form", "batches"),
    [
        ("diagonal", [(3,)]),
        ("full", [(3,)]),
        # the second time with symbolic shapes
        pytest.param("full", [(3,), (5,)], marks=pytest.mark.slow),
    ],
)
def test_one_graph_forward_and_backward(form: str, batches: list[tuple[int, ...]]) -> None:
    torch.compiler.reset()
    compiled = torch.compile(value_of, fullgraph=True, backend="aot_eager")
    for batch in batches:
        inputs = random_inputs(batch, 4, form)
        value, plain = compiled(*inputs), value_of(*inputs)
        assert torch.allclose(value, plain, rtol=1e-13)
        for a, b in zip(
            torch.autograd.grad(value.sum(), inputs), torch.autograd.grad(plain.sum(), inputs), strict=True
        ):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("form", ["diagonal", "full"])
def test_blocks_do_not_change_the_result(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[Tensor]:
        inputs = random_inputs((7,), 5, form)
        value = value_of(*inputs)
        return [value, *torch.autograd.grad(value.sum(), inputs)]

    whole = run()
    monkeypatch.setattr(contour_terms, "BLOCK", 150)
    for a, b in zip(run(), whole, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("nodes", [20, 40, 160])
def test_the_error_is_no_less_than_the_truth(nodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contour_terms, "NODES", nodes)
    for decades in (0.0, 2.0):
        inputs = random_lines(60, decades, 77)
        value, error = kl(*inputs)
        off = np.abs(value.numpy() - definition(inputs)[0])
        print(f"{nodes}: off {off.max():.1e}, outside {(off > error.numpy()).sum()}")
        assert (off <= error.numpy()).all()
