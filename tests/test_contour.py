"""KL of a Gaussian to a mixture of two, against the definition: in long double on a line, in mpmath elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from stablekl.distributions._gaussian import Gaussian, gaussian_kl
from stablekl.mixtures import contour, contour_terms
from stablekl.mixtures.components import Components
from stablekl.mixtures.contour import contour_kl
from stablekl.precision.references import mixture
from stablekl.precision.references.context import mp
from tests.mixture_references import embedded, line, radial

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
    places = [(half / square, 1 / np.maximum(root, 1e-30)), (level / half, 1 / np.maximum(root, 1e-30))]
    places += [(m1, s1), (m2, s2), (-line_ / (2 * square), 1 / np.sqrt(np.abs(square)))]
    steps = np.concatenate([LD(2) ** np.arange(-4, 40, dtype=LD), [0], -(LD(2) ** np.arange(-4, 40, dtype=LD))])
    edges = [pm + ps * np.linspace(-13, 13, 53).astype(LD)]
    edges += [np.nan_to_num(c)[:, None] + np.nan_to_num(w)[:, None] * steps for c, w in places]
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
    truth = definition((*inputs[:4], inputs[4] + torch.tensor([[[0.0], [1e-18]]])))[0]
    assert abs(kl(*inputs)[0].numpy() - truth) < BAR * (1 + truth)

    def middle(quadratic: contour_terms.Quadratic) -> tuple[Tensor, Tensor]:
        half = -0.5 / quadratic.curvature.amin(-1).clamp(max=-1.0)
        return half, half

    monkeypatch.setattr(contour_terms, "_crossing", middle)
    assert not abs(kl(*inputs)[0].numpy() - truth) < 1e-6 * (1 + truth)


# ---- many dimensions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 8, 64])
def test_embedded_lines(dim: int) -> None:
    n = {2: 60, 8: 30, 64: 10}[dim]
    inputs = random_lines(n, 1.0, dim)
    truth = definition(inputs)[0]
    pm, ps, lv, qm, qs = inputs
    one = torch.ones(n, 1, dtype=F64)
    table = torch.cat([torch.stack([one, pm, ps], -1), torch.cat([lv.exp().unsqueeze(-1), qm, qs], -1)], 1)
    _, loc, cov = embedded(table, dim, seed=dim)
    factors = torch.linalg.cholesky(cov)
    value, error = kl(loc[:, 0], factors[:, 0], lv, loc[:, 1:], factors[:, 1:])
    off = np.abs(value.numpy() - truth)
    condition = torch.linalg.cond(factors).amax(-1).numpy()
    print(f"dim {dim}: {(off / (1 + truth)).max():.1e}, over the condition {(off / (1 + truth) / condition).max():.1e}")
    assert (off <= BAR * (1 + truth) * condition).all()
    assert (off <= error.numpy() * condition).all()


@pytest.mark.parametrize("dim", [8, 64, 1000])
@pytest.mark.parametrize("form", ["diagonal", "full"])
def test_concentric(dim: int, form: str) -> None:
    if form == "full" and dim == 1000:
        pytest.skip("an eigendecomposition of 1000 rows takes seconds")
    near = 1 / math.sqrt(dim)
    cases = [
        (1.0, (0.5, 0.5), (1 - near, 1 + near)),
        (1.0, (0.9, 0.1), (1.0, 1 + 2 * near)),
        (1.0, (1 - 1e-6, 1e-6), (1 + near, 1.0)),
        (1e4, (0.3, 0.7), (1.0, 1 + 1e-9)),
        (1e-4, (0.3, 0.7), (1.0, 1.2)),
    ]
    for sigma, weights, scales in cases:
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
            c = mp.mpf(lv[1].item()) - mp.mpf(lv[0].item()) + 2 * sum(mp.log(x / y) for x, y in zip(q1, q2, strict=True))
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
                cut |= {place + sign * w * mp.mpf(2) ** j for place in (0, -c) for sign in (1, -1) for j in range(-5, 8)}
            reach = 90 * max(abs(x) for x in k)
            cut = sorted({mp.mpf(0), *(x for x in cut if abs(x) < reach), reach, -reach})
            for low, high in zip(cut[:-1], cut[1:], strict=True):
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
