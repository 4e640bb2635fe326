"""Cubature, against lines, planes and radii, products of mixtures, and the spectral integral."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stablekl.mixtures.components import Components
from stablekl.mixtures.engines import cubature, cubature_cells, cubature_nodes
from stablekl.mixtures.engines.cubature import cubature_information, cubature_kl
from stablekl.mixtures.engines.line import line_kl
from stablekl.mixtures.engines.spectral import label_information

from .mixture_references import plane, radial
from .test_sobol import disguise, exact_information

F64 = torch.float64
POINTS = 10**7


def pair(rows, dim, seed, *, ratio=1.0, separation=20.0, weight=0.5, correlation=0.0, shared=False):
    """Two components: scales up to ``ratio`` apart, thin and turned at random, the rarer one as rare as ``weight``."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=F64)

    rare = 0.5 * torch.exp(uniform(rows) * math.log(weight))
    log_weights = torch.stack((torch.log1p(-rare), torch.log(rare)), -1)
    log_weights = torch.where(uniform(rows, 1) < 0.5, log_weights, log_weights.flip(-1))
    sd = torch.exp(math.log(ratio) * uniform(rows, 2, 1)).expand(-1, -1, dim).clone()
    sd[..., 0] *= math.sqrt((1 - correlation) / (1 + correlation))
    rotation = torch.linalg.qr(torch.randn(rows, 2, dim, dim, generator=generator, dtype=F64))[0]
    factor = torch.linalg.cholesky(rotation @ torch.diag_embed(sd**2) @ rotation.mT)
    factor = factor[:, :1].expand(-1, 2, -1, -1) if shared else factor
    direction = torch.randn(rows, dim, generator=generator, dtype=F64)
    direction = separation * uniform(rows, 1) * direction / direction.norm(dim=-1, keepdim=True)
    shift = (factor[:, 1] @ direction.unsqueeze(-1)).squeeze(-1)
    return Components(log_weights, torch.stack((torch.zeros_like(shift), shift), 1), factor)


REGIMES = {
    "shared covariance": {"shared": True},
    "shared and thin": {"shared": True, "correlation": 0.999},
    "near each other": {"separation": 0.2, "ratio": 1.1},
    "rare": {"weight": 1e-9, "ratio": 3.0, "correlation": 0.5},
    "narrow in wide": {"ratio": 1e3, "separation": 5.0, "weight": 0.1},
    "thin": {"ratio": 3.0, "separation": 6.0, "weight": 0.1, "correlation": 0.999},
    "all of it": {"ratio": 1e3, "weight": 1e-9, "correlation": 0.999},
}


@pytest.mark.parametrize(("dim", "atol", "rows"), [(2, 1e-12, 16), (2, 1e-9, 16), (3, 1e-6, 4)])
@pytest.mark.parametrize("name", REGIMES)
def test_two_components_as_by_the_spectral_integral(name, dim, atol, rows):
    p = pair(rows, dim, 7, **REGIMES[name])
    value, error = cubature_information(p, atol=atol, max_points=POINTS)
    actual = (value - label_information(p)).abs()
    assert (error <= atol).all()
    assert actual.max() <= atol
    assert (actual <= error + 1e-14).double().mean() >= 0.9


def line(generator, rows, k, separation=2.0):
    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    weights = torch.log_softmax(normal(rows, k), -1)
    return Components(weights, separation * normal(rows, k, 1), torch.exp(0.5 * normal(rows, k, 1)))


@pytest.mark.parametrize(("dim", "rtol"), [(2, 1e-12), (2, 1e-6), (3, 1e-6)])
@pytest.mark.parametrize(("kp", "kq"), [(3, 1), (1, 3), (2, 5), (3, 3)])
def test_a_line_in_disguise(kp, kq, dim, rtol):
    generator = torch.Generator().manual_seed(10 * kp + kq)
    p, q = line(generator, 4, kp), line(generator, 4, kq)
    rotation = torch.linalg.qr(torch.randn(4, 1, dim, dim, generator=generator, dtype=F64))[0]
    scale = torch.exp(0.5 * torch.randn(4, 1, dim - 1, generator=generator, dtype=F64))
    high_p, high_q = disguise(p, rotation, scale), disguise(q, rotation, scale)
    for (value, error), truth in (
        (cubature_kl(high_p, high_q, rtol=rtol, max_points=POINTS), line_kl(p, q)[0]),
        (cubature_information(high_p, atol=rtol, max_points=POINTS), exact_information(p)),
    ):
        assert (error <= rtol * (1 + truth) + 1e-13).all()
        assert ((value - truth).abs() <= error + 1e-13).all()


def in_the_plane(seed, k):
    generator = np.random.default_rng(seed)
    weights, means = generator.dirichlet(np.ones(k)), 2 * generator.normal(size=(k, 2))
    shear = np.array([[1.0, 0.0], [0.0, 1.0]]) + 0.5 * generator.normal(size=(k, 2, 2)) * np.tri(2)
    return weights, means, shear @ np.swapaxes(shear, 1, 2) + 0.2 * np.eye(2)


def as_components(weights, means, covariances):
    weights, means, covariances = (torch.from_numpy(x) for x in (weights, means, covariances))
    return Components(torch.log(weights), means, torch.linalg.cholesky(covariances))


@pytest.mark.parametrize(("kp", "kq"), [(5, 1), (3, 3)])
def test_the_plane_by_the_trapezoid_rule(kp, kq):
    p, q = in_the_plane(kp, kp), in_the_plane(100 + kq, kq)
    value, error = cubature_kl(as_components(*p), as_components(*q), rtol=1e-10, max_points=POINTS)
    truth = plane(p, q, 0.06)
    assert abs(float(value) - truth) <= float(error) <= 1e-10 * (1 + truth)


def test_information_and_divergence_agree():
    p, q = in_the_plane(1, 5), in_the_plane(2, 1)
    high, one = as_components(*p), as_components(*q)
    mvn = torch.distributions.MultivariateNormal
    each = torch.distributions.kl_divergence(
        mvn(high.loc, scale_tril=high.scale), mvn(one.loc, scale_tril=one.scale).expand((5,))
    )
    mean = (high.log_weights.exp() * each).sum()
    information = cubature_information(high, atol=1e-11, max_points=POINTS)[0]
    value, _ = cubature_kl(high, one, rtol=1e-11, max_points=POINTS)
    assert abs(float(value - (mean - information))) <= 2e-11 * (1 + float(mean))


@pytest.mark.parametrize("ratio", [2.0, 1e3])
def test_concentric_components_by_their_radius(ratio):
    rows = [(0.3, 1.0), (0.5, 1 / ratio), (0.2, 0.4)]
    other = [(1.0, 0.8)]
    p, q = (
        Components(
            torch.tensor([w for w, _ in side], dtype=F64).log(),
            torch.zeros(len(side), 3, dtype=F64),
            torch.tensor([[s] * 3 for _, s in side], dtype=F64),
        )
        for side in (rows, other)
    )
    value, error = cubature_kl(p, q, rtol=1e-7, max_points=POINTS)
    truth = float(radial(rows, other, 3))
    assert abs(float(value) - truth) <= float(error) <= 1e-7 * (1 + truth)


def test_a_product_of_mixtures_carries_the_information_of_both():
    generator = torch.Generator().manual_seed(4)
    a, b = line(generator, 2, 2), pair(2, 2, 5, separation=4.0, correlation=0.8)
    loc = torch.cat((a.loc.repeat_interleave(2, 1), b.loc.repeat(1, 2, 1)), -1)
    factor = torch.zeros(2, 4, 3, 3, dtype=F64)
    factor[..., 0, 0] = a.scale[..., 0].repeat_interleave(2, 1)
    factor[..., 1:, 1:] = b.scale.repeat(1, 2, 1, 1)
    weights = (a.log_weights.unsqueeze(-1) + b.log_weights.unsqueeze(-2)).flatten(1)
    value, error = cubature_information(Components(weights, loc, factor), atol=1e-6, max_points=POINTS)
    truth = exact_information(a) + label_information(b)
    assert ((value - truth).abs() <= error).all()
    assert (error <= 1e-6).all()


@pytest.mark.parametrize("dim", [2, 3])
def test_distance_costs_no_digits(dim):
    weights = torch.tensor([0.3, 0.3, 0.4], dtype=F64)
    loc = 1e8 + torch.tensor([[0.0, 0.0, 0.0], [1e12, 3e11, 1.0], [1e12 + 1.5, 3e11, 2.0]], dtype=F64)[:, :dim]
    p = Components(weights.log(), loc, torch.ones(3, dim, dtype=F64))
    near = Components(torch.log_softmax(p.log_weights[1:], 0), p.loc[1:], p.scale[1:])
    truth = -(0.3 * math.log(0.3) + 0.7 * math.log(0.7)) + 0.7 * float(label_information(near))
    value, error = cubature_information(p, atol=1e-12 if dim == 2 else 1e-7, max_points=POINTS)
    assert abs(float(value) - truth) <= float(error) <= 1e-7


def near_pair(step, dim):
    """Mixtures on a line, about ``step`` apart, times the same Gaussian in the other dimensions."""
    p = Components(
        *(torch.tensor(x, dtype=F64) for x in ([math.log(0.3), math.log(0.7)], [[-2.0], [1.0]], [[1.0], [0.5]]))
    )
    q = p._replace(loc=p.loc + step * torch.tensor([[1.0], [-2.0]], dtype=F64), scale=p.scale * (1.0 + step))
    rest = torch.ones(2, dim - 1, dtype=F64)
    high = [Components(c.log_weights, torch.cat((c.loc, rest), -1), torch.cat((c.scale, rest), -1)) for c in (p, q)]
    return p, q, *high


@pytest.mark.parametrize(("dim", "rtol"), [(2, 1e-9), (3, 1e-4)])
@pytest.mark.parametrize("step", [1e-3, 1e-6, 1e-9])
def test_relative_accuracy_near_equality(step, dim, rtol):
    p, q, high_p, high_q = near_pair(step, dim)
    value, error = cubature_kl(high_p, high_q, rtol=rtol, max_points=POINTS)
    truth = float(line_kl(p, q)[0])
    assert abs(float(value) - truth) <= float(error) + 1e-14 * truth
    assert float(error) <= 1.1 * rtol * truth


def test_log_ratios_must_come_from_parameters_near_equality(monkeypatch):
    p, q, high_p, high_q = near_pair(1e-9, 2)
    monkeypatch.setattr(cubature_nodes, "pair_quadratics", lambda *args: ([], [], []))
    lost = cubature_kl(high_p, high_q, rtol=1e-6, max_points=10**5)[0]
    assert float(lost) == 0.0  # no pair, no log-ratio
    monkeypatch.undo()
    monkeypatch.setattr(cubature, "_near", lambda split, lw, loc, scale: torch.zeros(len(lw), dtype=torch.bool))
    plain = cubature_kl(high_p, high_q, rtol=1e-6, max_points=10**5)[0]
    assert abs(float(plain) / float(line_kl(p, q)[0]) - 1) > 1e-9


def test_boxes_must_be_narrow_where_a_component_is(monkeypatch):
    p = Components(
        torch.tensor([0.999, 0.001], dtype=F64).log(),
        torch.tensor([[0.0, 0.0], [1.2345, 0.777]], dtype=F64),
        torch.tensor([[1.0, 1.0], [1e-3, 1e-3]], dtype=F64),
    )
    truth = label_information(p)
    value, error = cubature_information(p, atol=1e-9, max_points=POINTS)
    assert abs(float(value - truth)) <= float(error) <= 1e-9
    monkeypatch.setattr(cubature_cells, "WIDTH", {2: math.inf})
    value, error = cubature_information(p, atol=1e-9, max_points=POINTS)
    assert abs(float(value - truth)) > 10 * float(error)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("k", [1, 3])
def test_equal_parameters_give_zero_with_zero_gradient(k, dim):
    generator = torch.Generator().manual_seed(k)
    weights = torch.log_softmax(torch.randn(2, k, generator=generator, dtype=F64), -1)
    loc = 1e5 * torch.randn(2, k, dim, generator=generator, dtype=F64)
    scale = torch.exp(torch.randn(2, k, dim, generator=generator, dtype=F64))
    p = [t.clone().requires_grad_() for t in (weights, loc, scale)]
    q = [t.clone().requires_grad_() for t in (weights, loc, scale)]
    value, _ = cubature_kl(Components(*p), Components(*q), rtol=1e-6, max_points=POINTS)
    assert value.tolist() == [0.0, 0.0]
    for g in torch.autograd.grad(value.sum(), p + q):
        assert torch.equal(g, torch.zeros_like(g))
    same = [weights, loc[:, :1].expand_as(loc), scale[:, :1].expand_as(scale)]
    leaves = [t.clone().requires_grad_() for t in same]
    value, _ = cubature_information(Components(*leaves), atol=1e-6, max_points=POINTS)
    assert value.tolist() == [0.0, 0.0]
    for g in torch.autograd.grad(value.sum(), leaves)[1:]:
        assert torch.equal(g, torch.zeros_like(g))


@pytest.mark.parametrize("side", ["p", "q"])
def test_a_weight_of_zero_is_as_good_as_no_component(side):
    other = as_components(*in_the_plane(3, 2))
    plain = as_components(*in_the_plane(4, 2))
    padded = Components(
        torch.cat((plain.log_weights, torch.tensor([-math.inf], dtype=F64))),
        torch.cat((plain.loc, torch.full((1, 2), math.nan, dtype=F64))),
        torch.cat((plain.scale, torch.zeros(1, 2, 2, dtype=F64))),
    )
    leaves = [t.clone().requires_grad_() for t in padded]
    c = Components(*leaves)
    value, expected = (
        cubature_kl(*x, rtol=1e-9, max_points=POINTS)[0]
        for x in (((c, other), (plain, other)) if side == "p" else ((other, c), (other, plain)))
    )
    information = cubature_information(c, atol=1e-9, max_points=POINTS)[0]
    assert abs(float((value - expected).detach())) < 2e-9
    for g in torch.autograd.grad(value + information, leaves):
        assert torch.isfinite(g).all()
        assert not g[2].any()


def scales(x):
    return x if x.ndim == 3 else x.tril()


def divergence(*x, rtol=1e-8):
    p = Components(torch.log_softmax(x[0], -1), x[1], scales(x[2]))
    q = Components(torch.log_softmax(x[3], -1), x[4], scales(x[5]))
    return cubature_kl(p, q, rtol=rtol, max_points=POINTS)[0]


def information(*x, atol=1e-8):
    return cubature_information(
        Components(torch.log_softmax(x[0], -1), x[1], scales(x[2])), atol=atol, max_points=POINTS
    )[0]


def leaves(seed, k, full, dim=2):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    scale = torch.exp(0.3 * normal(1, k, dim))
    if full:
        scale = scale.unsqueeze(-1) * (torch.eye(dim, dtype=F64) + torch.tril(0.4 * normal(1, k, dim, dim), -1))
    return [t.requires_grad_() for t in (normal(1, k), 1.5 * normal(1, k, dim), scale)]


def twice(f, x):
    """First derivatives, and those of their sum of squares."""
    first = torch.autograd.grad(f(*x), x, create_graph=True)
    return [*first, *torch.autograd.grad(sum((g * g).sum() for g in first), x)]


@pytest.mark.parametrize("full", [False, True])
def test_derivatives_of_the_information(full):
    x = leaves(1, 2, full)
    expected = twice(lambda w, m, s: label_information(Components(torch.log_softmax(w, -1), m, scales(s))).sum(), x)
    for g, e in zip(twice(information, x), expected, strict=True):
        assert torch.allclose(g, e, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("step", [0.3, 1e-4])
def test_derivatives_of_the_divergence(step):
    p, q, high_p, high_q = near_pair(step, 2)
    low, high = ([t.clone().requires_grad_() for t in (*a, *b)] for a, b in ((p, q), (high_p, high_q)))
    expected = twice(lambda *t: line_kl(Components(*t[:3]), Components(*t[3:]))[0], low)
    results = twice(
        lambda *t: cubature_kl(Components(*t[:3]), Components(*t[3:]), rtol=1e-8, max_points=POINTS)[0], high
    )
    for g, e in zip(results, expected, strict=True):
        assert torch.allclose(g[..., :1] if g.ndim > 1 else g, e, rtol=1e-6, atol=1e-6 * float(e.detach().abs().max()))


def test_the_gradient_in_three_dimensions_is_that_of_the_line():
    p, q, high_p, high_q = near_pair(0.3, 3)
    low, high = ([t.clone().requires_grad_() for t in (*a, *b)] for a, b in ((p, q), (high_p, high_q)))
    expected = torch.autograd.grad(line_kl(Components(*low[:3]), Components(*low[3:]))[0], low)
    value = cubature_kl(Components(*high[:3]), Components(*high[3:]), rtol=1e-6, max_points=POINTS)[0]
    for g, e in zip(torch.autograd.grad(value, high), expected, strict=True):
        assert torch.allclose(g[..., :1] if g.ndim > 1 else g, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dim", "rtol"), [(2, 1e-6), (3, 1e-2)])
def test_other_rows_do_not_change_a_bit(dim, rtol):
    p = pair(3, dim, 1, ratio=5.0, separation=5.0, correlation=0.5, weight=0.1)
    q = pair(3, dim, 2, ratio=5.0, separation=5.0, correlation=0.5, weight=0.1)
    whole = cubature_kl(p, q, rtol=rtol, max_points=POINTS)
    goal = torch.tensor([1e-3, 1e-12, 1e-6], dtype=F64).clamp(min=rtol)
    information = cubature_information(p, atol=goal, max_points=POINTS)
    for i in range(3):
        one, other = (Components(*(x[i : i + 1] for x in c)) for c in (p, q))
        alone = cubature_kl(one, other, rtol=rtol, max_points=POINTS)
        assert torch.equal(alone[0][0], whole[0][i])
        alone = cubature_information(one, atol=float(goal[i]), max_points=POINTS)
        assert torch.equal(alone[0][0], information[0][i])


def test_blocks_do_not_change_the_result(monkeypatch):
    x = [*leaves(3, 3, True), *leaves(4, 2, True)]
    whole = divergence(*x)
    expected = torch.autograd.grad(whole, x)
    monkeypatch.setattr(cubature_nodes, "BLOCK", 2**10)
    monkeypatch.setattr(cubature, "BLOCK", 2**10)
    blocked = divergence(*x)
    assert torch.equal(whole, blocked)
    for a, b in zip(torch.autograd.grad(blocked, x), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("points", [1, 10**4, 10**5])
def test_too_few_points_are_admitted(points):
    p = pair(4, 3, 3, ratio=5.0, separation=3.0, correlation=0.9)
    value, error = cubature_information(p, atol=1e-9, max_points=points)
    assert (error > 1e-9).all()
    assert ((value - label_information(p)).abs() <= error).all()


def test_no_rows_and_batches_of_any_shape():
    p = Components(*(torch.ones(0, *s, dtype=F64) for s in ((2,), (2, 2), (2, 2))))
    assert cubature_information(p, atol=1e-6, max_points=100)[0].shape == (0,)
    assert cubature_kl(p, p, rtol=1e-6, max_points=100)[0].shape == (0,)
    p = pair(6, 2, 1)
    folded = Components(*(x.reshape(2, 3, *x.shape[1:]) for x in p))
    flat = cubature_information(p, atol=1e-6, max_points=POINTS)
    shaped = cubature_information(folded, atol=1e-6, max_points=POINTS)
    assert all(torch.equal(a.reshape(2, 3), b) for a, b in zip(flat, shaped, strict=True))


def test_what_is_refused():
    p = pair(2, 2, 1)
    with pytest.raises(ValueError, match=r"atol must be positive, got 0.0 at batch index \(1,\)"):
        cubature_information(p, atol=torch.tensor([1e-6, 0.0], dtype=F64), max_points=100)
    with pytest.raises(ValueError, match="max_points must be at least 1"):
        cubature_kl(p, p, rtol=1e-6, max_points=0)
    with pytest.raises(ValueError, match="cubature is for 2 and 3 dimensions"):
        cubature_information(
            Components(*(torch.ones(*s, dtype=F64) for s in ((2,), (2, 4), (2, 4)))), atol=1e-6, max_points=1
        )
