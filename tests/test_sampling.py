"""rsample and stratified_sample of mixtures."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, Laplace, LowRankMultivariateNormal, Normal, Poisson

from stablekl import GaussianMixture, MixtureSameFamily

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch._prims_common.check. is deprecated:FutureWarning"),
]
F64 = torch.float64
T = torch.tensor


def gaussian(kind: str, batch=(), dtype=torch.float32, k=3, d=2):
    g = torch.Generator().manual_seed(0)
    logits, loc = torch.randn(*batch, k, generator=g).to(dtype), torch.randn(*batch, k, d, generator=g).to(dtype)
    scale = torch.rand(*batch, k, d, generator=g).to(dtype) + 0.5
    leaves = [logits.requires_grad_(), loc.requires_grad_()]
    if kind == "normal":
        leaves[1] = loc[..., 0].detach().requires_grad_()
        leaves.append(scale[..., 0].clone().requires_grad_())
        return leaves, MixtureSameFamily(Categorical(logits=leaves[0]), Normal(*leaves[1:]))
    if kind == "low rank":
        leaves.append((0.3 * torch.ones(*batch, k, d, 1, dtype=dtype)).requires_grad_())
        component = LowRankMultivariateNormal(loc, leaves[2], scale.detach())
        return leaves, MixtureSameFamily(Categorical(logits=logits), component)
    matrix = torch.diag_embed(scale) + 0.3 * torch.ones(d, d, dtype=dtype).tril(-1)
    parameter = {"scale_diag": scale, "scale_tril": matrix, "covariance_matrix": matrix @ matrix.mT}[kind]
    leaves.append(parameter.detach().clone().requires_grad_())
    return leaves, GaussianMixture(logits, loc=loc, **{kind: leaves[2]})


KINDS = ("normal", "scale_diag", "scale_tril", "covariance_matrix", "low rank")


@pytest.mark.parametrize("batch", [(), (4,)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_points_are_those_of_sample(kind, batch):
    leaves, m = gaussian(kind, batch)
    assert m.has_rsample
    torch.manual_seed(5)
    x = m.sample((7, 3))
    state = torch.get_rng_state()
    torch.manual_seed(5)
    y = m.rsample((7, 3))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, y)
    assert y.requires_grad
    assert not x.requires_grad
    assert y.shape == (7, 3, *batch, *m.event_shape)
    assert m.rsample().shape == (*batch, *m.event_shape)
    for g in torch.autograd.grad(y.square().sum(), leaves):
        assert bool(g.isfinite().all())
        assert bool(g.any())


@pytest.mark.parametrize("kind", KINDS)
def test_single_precision_is_rounded_once(kind):
    """The gradient at the same points in float64."""
    single, m = gaussian(kind)
    torch.manual_seed(0)
    x = m.rsample((20,))
    double = [t.detach().double().requires_grad_() for t in single]
    if kind == "normal":
        wide = MixtureSameFamily(Categorical(logits=double[0]), Normal(*double[1:]))
    elif kind == "low rank":
        diagonal = m.component_distribution.cov_diag.detach().double()
        component = LowRankMultivariateNormal(double[1], double[2], diagonal)
        wide = MixtureSameFamily(Categorical(logits=double[0]), component)
    else:
        wide = GaussianMixture(double[0], loc=double[1], **{kind: double[2]})
    wide.sample = lambda shape: x.detach().double()
    ours = torch.autograd.grad(x.sum(), single)
    theirs = torch.autograd.grad(wide.rsample((20,)).sum(), double)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    leaves, m = gaussian("scale_diag", dtype=dtype)
    x = m.rsample((10,))
    assert x.dtype == dtype
    assert all(g.dtype == dtype and bool(g.isfinite().all()) for g in torch.autograd.grad(x.sum(), leaves))


def test_one_component_is_torchs_own_gradient():
    leaves, m = gaussian("scale_tril", dtype=F64, k=1, d=3)
    torch.manual_seed(0)
    x = m.rsample((50,))
    loc, tril = (t[0].detach().requires_grad_() for t in leaves[1:])
    e = torch.linalg.solve_triangular(tril, (x - loc).mT, upper=False).detach()
    y = loc + (tril @ e).mT
    d_loc, d_tril = torch.autograd.grad(x.sin().sum(), leaves[1:])
    expected = torch.autograd.grad(y.sin().sum(), [loc, tril])
    torch.testing.assert_close((d_loc[0], d_tril[0]), (expected[0], expected[1].tril()), rtol=1e-10, atol=1e-12)


def test_other_families_say_what_to_do():
    for component in (
        Laplace(torch.zeros(2), torch.ones(2)),
        Independent(Laplace(torch.zeros(2, 3), torch.ones(2, 3)), 1),
    ):
        m = MixtureSameFamily(Categorical(torch.ones(2)), component)
        assert not m.has_rsample
        with pytest.raises(NotImplementedError, match=r"not of Laplace .*Use stratified_sample"):
            m.rsample()
    # and what it says works
    loc = T([0.0, 5.0], requires_grad=True)
    m = MixtureSameFamily(Categorical(torch.ones(2)), Laplace(loc, 1.0))
    torch.manual_seed(0)
    (g,) = torch.autograd.grad(m.icdf(torch.rand(2000)).mean(), loc)
    torch.testing.assert_close(g, T([0.5, 0.5]), rtol=0, atol=0.05)


def test_zero_weights():
    """Never drawn, no gradient, no NaN: neither from a weight of 0 nor from a logit of -inf."""
    for given in ({"probs": T([0.0, 0.5, 0.5, 0.0])}, {"logits": T([-math.inf, 0.0, 0.0, -math.inf])}):
        (weights,) = given.values()
        weights = weights.requires_grad_()
        loc = T([[1e3], [0.0], [4.0], [-1e3]], requires_grad=True)
        m = GaussianMixture(**{next(iter(given)): weights}, loc=loc, scale_diag=torch.ones(4, 1))
        torch.manual_seed(0)
        x = m.rsample((20000,))
        assert float(x.detach().abs().max()) < 20
        g_weights, g_loc = torch.autograd.grad(x.mean(), [weights, loc])
        assert g_weights[T([0, 3])].tolist() == g_loc[T([0, 3]), 0].tolist() == [0.0, 0.0]
        assert bool(g_weights.isfinite().all())
        torch.testing.assert_close(g_loc[1:3], torch.full((2, 1), 0.5), rtol=0, atol=0.03)


def test_transforms():
    g = torch.Generator().manual_seed(0)
    p = [torch.randn(4, 3, generator=g), torch.randn(4, 3, 2, generator=g), torch.rand(4, 3, 2, generator=g) + 0.5]

    def f(logits, loc, scale):
        return GaussianMixture(logits, loc=loc, scale_diag=scale, validate_args=False).rsample((500,))

    x = torch.vmap(f, randomness="different")(*p)
    assert x.shape == (4, 500, 2)
    assert not torch.equal(x[0], x[1])
    grads = torch.vmap(torch.func.grad(lambda *a: f(*a).mean(), (0, 1, 2)), randomness="different")(*p)
    assert all(bool(v.isfinite().all()) for v in grads)
    torch.testing.assert_close(grads[1].sum((1, 2)), torch.ones(4), rtol=0, atol=1e-4)  # it moves with its means
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    leaves = [t[0].clone().requires_grad_() for t in p]
    results = []
    for c in (compiled, f):
        torch.manual_seed(0)
        y = c(*leaves)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)


# ------------------------------------------------------------------------------------------------- stratified


@pytest.mark.parametrize("batch", [(), (4,), (2, 4)])
def test_one_of_each(batch):
    leaves, m = gaussian("scale_diag", batch, F64)
    x = m.stratified_sample((500,))
    assert x.shape == (500, 3, *batch, 2)
    assert m.log_prob(x).shape == (500, 3, *batch)
    w = m.log_weights.exp().movedim(-1, 0)
    mean = (w.unsqueeze(-1) * x).sum(1).mean(0)
    torch.testing.assert_close(mean, m.mean, rtol=0, atol=0.3)
    grads = torch.autograd.grad(mean.sum(), leaves)
    # the means' gradient is exact
    torch.testing.assert_close(grads[1], m.log_weights.exp()[..., None].expand_as(grads[1]))
    centre = torch.autograd.grad(m.mean.sum(), leaves[0])[0]
    torch.testing.assert_close(grads[0], centre, rtol=0, atol=0.3)


def test_smaller_variance_than_joint_samples():
    """E[x] of modes 20 apart: the labels' variance is gone, in the value and in the weights' gradient."""
    logits = torch.zeros(2, dtype=F64, requires_grad=True)
    m = GaussianMixture(logits, loc=T([[-10.0], [10.0]], dtype=F64), scale_diag=torch.ones(2, 1, dtype=F64))
    torch.manual_seed(0)
    spreads = []
    for draw in (
        lambda: (m.log_weights.exp() * m.stratified_sample((5,)).squeeze(-1)).sum(-1).mean(),
        lambda: m.rsample((10,)).mean(),
    ):
        values = [draw() for _ in range(60)]
        slopes = [torch.autograd.grad(v, logits, retain_graph=True)[0][0] for v in values]
        spreads.append([torch.stack(v).detach().std() for v in (values, slopes)])
    (value, slope), (joint_value, joint_slope) = spreads
    assert value < 0.2 * joint_value
    assert slope < 0.3 * joint_slope


def test_elbo_with_a_component_switched_off():
    """KL(q || q) = 0 through samples of dead components' places, whose own parameters are unusable."""
    logits = T([0.0, -math.inf, 1.0], dtype=F64, requires_grad=True)
    loc = T([[0.0], [math.nan], [2.0]], dtype=F64, requires_grad=True)
    q = MixtureSameFamily(
        Categorical(logits=logits, validate_args=False),
        Independent(Normal(loc, torch.ones(3, 1, dtype=F64), validate_args=False), 1),
    )
    target = GaussianMixture(T([0.0, 1.0], dtype=F64), loc=T([[0.0], [2.0]], dtype=F64), scale_diag=torch.ones(2, 1))
    x = q.stratified_sample((16,))
    kl = (q.log_weights.exp() * (q.log_prob(x) - target.log_prob(x))).sum(-1).mean()
    assert abs(float(kl.detach())) < 1e-14
    for g in torch.autograd.grad(kl, [logits, loc]):
        assert bool(g.isfinite().all())
        assert float(g.reshape(-1)[1]) == 0


def test_without_rsample_the_weights_still_have_a_gradient():
    logits = torch.zeros(2, requires_grad=True)
    m = MixtureSameFamily(Categorical(logits=logits), Poisson(T([1.0, 5.0])))
    torch.manual_seed(0)
    x = m.stratified_sample((4000,))
    assert x.shape == (4000, 2)
    (g,) = torch.autograd.grad((m.log_weights.exp() * x).sum(-1).mean(), logits)
    torch.testing.assert_close(g, T([-1.0, 1.0]), rtol=0, atol=0.05)
