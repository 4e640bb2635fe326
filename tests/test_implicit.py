"""Implicit derivatives of a mixture's samples: against mpmath, against quantiles, against closed-form expectations."""

from __future__ import annotations

import math

import mpmath as mp
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Normal

from stablekl import GaussianMixture, MixtureSameFamily
from stablekl.mixtures import implicit
from stablekl.mixtures.components import Components
from stablekl.mixtures.implicit import implicit_point

from .normal_mixtures import F64, tails

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch._prims_common.check. is deprecated:FutureWarning"),
]
T = torch.tensor

# name: logits, means, standard deviations
CASES = {
    "plain": ([-1.0, 0.5], [-2.0, 2.0], [1.0, 0.5]),
    "far": ([0.0, 1.0, 0.5], [-100.0, 0.0, 100.0], [1.0, 1.0, 1.0]),
    "far and narrow": ([0.0, 1.0, 0.5], [-100.0, 0.0, 100.0], [1e-4, 1.0, 1e-4]),
    "tiny weight": ([-46.0, 0.0], [0.0, 1.0], [1.0, 1.0]),
    "tiny and far": ([-46.0, 0.0, -100.0], [-100.0, 1.0, 50.0], [1.0, 1.0, 1e-4]),
}


def leaves(*values: object) -> list[Tensor]:
    return [torch.as_tensor(v, dtype=F64).clone().requires_grad_() for v in values]


def truth(x: float, logits, loc, scale):
    """-(dF/dtheta)/m for the logits, the means and the scales, and F."""
    w = [mp.exp(mp.mpf(v)) for v in logits]
    f, sf, density = tails(x, w, loc, scale)
    result: list[list] = [[], [], []]
    for v, m, s in zip(w, loc, scale, strict=True):
        one, share, z = tails(x, [1], [m], [s]), v / sum(w), (mp.mpf(x) - mp.mpf(m)) / mp.mpf(s)
        change = one[0] - f if f < 0.5 else sf - one[1]
        result[0].append(-share * change / density)
        result[1].append(share * one[2] / density)
        result[2].append(share * one[2] / density * z)
    return result


@pytest.mark.parametrize("name", CASES)
def test_one_dimension_in_mpmath(name):
    logits, loc, scale = CASES[name]
    p = leaves(logits, loc, scale)
    m = MixtureSameFamily(Categorical(logits=p[0]), Normal(p[1], p[2]))
    torch.manual_seed(0)
    x = m.rsample((12,))
    with mp.workdps(80):
        for point in x:
            got = torch.autograd.grad(point, p, retain_graph=True)
            for g, e in zip(got, truth(float(point.detach()), logits, loc, scale), strict=True):
                top = max(map(abs, e))
                if top > 1e-300:
                    assert max(float(abs(a - b) / top) for a, b in zip(g.tolist(), e, strict=True)) < 1e-13


def test_the_textbook_ratio_fails():
    """Must fail: -(dF/dlogit)/m with F and m as ordinary numbers; all of the upper mode's tail is rounded off."""
    logits, loc, scale = CASES["tiny weight"]
    p = leaves(logits, loc, scale)
    x = T(1.3, dtype=F64)
    w = p[0].softmax(-1)
    component = Normal(p[1], p[2])
    f, density = (w * component.cdf(x)).sum(), (w * component.log_prob(x).exp()).sum()
    (slope,) = torch.autograd.grad(f, p[0], retain_graph=True)
    with mp.workdps(80):
        expected = truth(1.3, logits, loc, scale)[0]
        textbook = (-slope / density).tolist()
        components = Components(p[0].log_softmax(-1), p[1][:, None], p[2][:, None])
        (ours,) = torch.autograd.grad(implicit_point(x.reshape(1), components).sum(), p[0])
        assert abs(float((textbook[1] - expected[1]) / expected[1])) > 1e-3
        # the last step, through the softmax of the weights, is that of the weights themselves
        assert abs(float((float(ours[0]) - expected[0]) / expected[0])) < 1e-13


def conditionals(z: Tensor, logits: Tensor, loc: Tensor, tril: Tensor) -> Tensor:
    """The solution of z_i = F(x_i | x_<i), coordinate by coordinate, by quantiles of scalar mixtures."""
    log_r, e, xs = logits.log_softmax(-1), loc[:, :0], []
    for i in range(loc.shape[1]):
        component = Normal(loc[:, i] + (tril[:, i, :i] * e).sum(-1), tril[:, i, i])
        x = MixtureSameFamily(Categorical(logits=log_r), component).icdf(z[i])
        e = torch.cat([e, ((x - component.loc) / component.scale)[:, None]], 1)
        log_r = (log_r + component.log_prob(x)).log_softmax(-1)
        xs.append(x)
    return torch.stack(xs)


def rosenblatt(full: bool) -> tuple[list[Tensor], Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    k, d = 3, 3
    loc = torch.randn(k, d, generator=g, dtype=F64)
    scale = 0.5 + torch.rand(k, d, generator=g, dtype=F64)
    if full:
        scale = torch.diag_embed(scale) + 0.5 * torch.randn(k, d, d, generator=g, dtype=F64).tril(-1)
    p = leaves([0.2, -0.3, 0.5], loc, scale)
    z = torch.rand(d, generator=g, dtype=F64)
    return p, z, torch.randn(d, generator=g, dtype=F64)


def lower(scale: Tensor) -> Tensor:
    return scale.tril() if scale.ndim == 3 else torch.diag_embed(scale)


def attached(x: Tensor, logits: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    return implicit_point(x, Components(logits.log_softmax(-1), loc, scale))


@pytest.mark.parametrize("full", [False, True])
def test_several_dimensions_by_conditional_quantiles(full):
    p, z, cotangent = rosenblatt(full)
    x = conditionals(z, p[0], p[1], lower(p[2]))
    expected = torch.autograd.grad((x * cotangent).sum(), p)
    got = torch.autograd.grad((attached(x, *p) * cotangent).sum(), p)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("full", [False, True])
def test_second_derivatives_and_forward_mode(full):
    p, z, cotangent = rosenblatt(full)
    x = conditionals(z, p[0], p[1], lower(p[2])).detach()
    sizes = [t.numel() for t in p]

    def at(theta: Tensor) -> list[Tensor]:
        return [t.reshape(q.shape) for t, q in zip(theta.split(sizes), p, strict=True)]

    def loss(y: Tensor) -> Tensor:
        return (y * cotangent).sum() ** 3 + y.square().sum()

    theta = torch.cat([t.detach().flatten() for t in p])
    with torch.no_grad():
        steps = 1e-5 * torch.eye(len(theta), dtype=F64)

    def slope(theta: Tensor) -> Tensor:
        theta = theta.clone().requires_grad_()
        logits, loc, scale = at(theta)
        return torch.autograd.grad(loss(conditionals(z, logits, loc, lower(scale))), theta)[0]

    differences = torch.stack([(slope(theta + s) - slope(theta - s)) / 2e-5 for s in steps])
    # forward over reverse, reverse over reverse
    for outer in (torch.func.jacfwd, torch.func.jacrev):
        hessian = outer(torch.func.grad(lambda t: loss(attached(x, *at(t)))))(theta)
        torch.testing.assert_close(hessian, differences, rtol=1e-6, atol=1e-6)
    jacobians = [f(lambda t: attached(x, *at(t)))(theta) for f in (torch.func.jacfwd, torch.func.jacrev)]
    torch.testing.assert_close(*jacobians, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("d", "full"), [(1, False), (2, True), (3, False)])
def test_expectations_in_closed_form(d, full):
    """E[sin(a.x)], E[(a.x)^2], and E[x_1 x_D]: within 6 of 16 batches' standard errors."""
    g = torch.Generator().manual_seed(3)
    loc = 2 * torch.randn(3, d, generator=g, dtype=F64)
    scale = 0.5 + torch.rand(3, d, generator=g, dtype=F64)
    if full:
        scale = torch.diag_embed(scale) + 0.5 * torch.randn(3, d, d, generator=g, dtype=F64).tril(-1)
    p = leaves(torch.randn(3, generator=g, dtype=F64), loc, scale)
    a = torch.randn(d, generator=g, dtype=F64)
    m = GaussianMixture(p[0], loc=p[1], **{"scale_tril" if full else "scale_diag": p[2]})
    w, at, cov = p[0].softmax(-1), p[1] @ a, lower(p[2]) @ lower(p[2]).mT
    spread = (cov @ a) @ a
    exact = [
        (w * at.sin() * (-0.5 * spread).exp()).sum(),
        (w * (at.square() + spread)).sum(),
        (w * (p[1][:, 0] * p[1][:, -1] + cov[:, 0, -1])).sum(),
    ]
    functions = [lambda x: (x @ a).sin(), lambda x: (x @ a).square(), lambda x: x[..., 0] * x[..., -1]]
    torch.manual_seed(1)
    samples = [m.rsample((700,)) for _ in range(16)]
    for e, f in zip(exact, functions, strict=True):
        grads = [torch.autograd.grad(f(x).mean(), p, retain_graph=True) for x in samples]
        rows = torch.stack([torch.cat([t.flatten() for t in g]) for g in grads])
        expected = torch.autograd.grad(e, p, retain_graph=True)
        error = rows.mean(0) - torch.cat([t.flatten() for t in expected])
        bound = 6 * rows.std(0) / 4 + 1e-12
        assert bool((error.abs() <= bound).all()), (error / bound).abs().max()


def test_ignoring_the_label_fails():
    """Must fail: differentiating the component that was drawn leaves the weights without a gradient."""
    p = leaves([0.0, 0.0], [[0.0], [4.0]], [[1.0], [1.0]])
    m = GaussianMixture(p[0], loc=p[1], scale_diag=p[2])
    torch.manual_seed(0)
    with torch.no_grad():
        label = m.mixture_distribution.sample((1000,))
    x = m.component_distribution.rsample((1000,)).gather(1, label[:, None, None])
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(x.mean(), p[0], retain_graph=True)
    (g,) = torch.autograd.grad(m.rsample((1000,)).mean(), p[0])
    assert float(g[1]) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("full", [False, True])
def test_many_dimensions_and_dead_components(full):
    """Densities of e^-1000 in 100 dimensions; a component that is switched off holds NaN."""
    g = torch.Generator().manual_seed(0)
    k, d = 4, 100
    logits, loc = torch.zeros(k, dtype=F64), 3 * torch.randn(k, d, generator=g, dtype=F64)
    logits[2], loc[2] = -math.inf, math.nan
    scale = torch.full((k, d), 1e-3, dtype=F64)
    if full:
        scale = torch.diag_embed(scale) + 1e-4 * torch.randn(k, d, d, generator=g, dtype=F64).tril(-1)
    p = leaves(logits, loc, scale)
    live = T([0, 1, 3])
    name = "scale_tril" if full else "scale_diag"
    torch.manual_seed(0)
    x = GaussianMixture(logits[live], loc=loc[live], **{name: scale[live]}).sample((50,))
    components = Components(p[0].log_softmax(-1), p[1], p[2])
    grads = torch.autograd.grad(implicit_point(x, components).square().sum(), p)
    for v in grads:
        assert bool(v.isfinite().all())
        assert not bool(v[2].any())
    labels = torch.cdist(x, loc[live]).argmin(-1)
    # so far apart, a point moves with its own component
    for j, row in enumerate(live.tolist()):
        torch.testing.assert_close(grads[1][row], 2 * x[labels == j].sum(0), rtol=1e-9, atol=1e-9)


def test_blocks_of_samples_change_nothing(monkeypatch):
    p, _, _ = rosenblatt(True)
    x = torch.randn(40, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    whole = torch.autograd.grad(attached(x, *p).square().sum(), p)
    monkeypatch.setattr(implicit, "BLOCK", 100)
    torch.testing.assert_close(torch.autograd.grad(attached(x, *p).square().sum(), p), whole, rtol=1e-13, atol=1e-13)


def test_batches_share_nothing():
    g = torch.Generator().manual_seed(0)
    p = leaves(
        torch.randn(5, 3, generator=g), torch.randn(5, 3, 2, generator=g), torch.rand(5, 3, 2, generator=g) + 0.5
    )
    x = torch.randn(4, 5, 2, dtype=F64, generator=g)
    grads = torch.autograd.grad(attached(x, *p).square().sum(), p)
    for i in range(5):
        row = [t[i].detach().requires_grad_() for t in p]
        one = torch.autograd.grad(attached(x[:, i], *row).square().sum(), row)
        torch.testing.assert_close([t[i] for t in grads], list(one), rtol=1e-13, atol=1e-14)


def test_compiled():
    p, _, _ = rosenblatt(True)
    x = torch.randn(6, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(attached, fullgraph=True, backend="aot_eager")
    ours, theirs = (torch.autograd.grad(f(x, *p).square().sum(), p) for f in (compiled, attached))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
