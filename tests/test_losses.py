"""Losses in closed form against mpmath, and what no training run may meet: NaN, a wrong sign, a wrong gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical, Normal

import stablekl
from stablekl import losses
from stablekl.precision.references.context import exact, mp

# torch.compile instantiates the Function that it inlines
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
F64 = torch.float64
DTYPES = [torch.float16, torch.bfloat16, torch.float32, F64]


@mp.workdps(50)
def gaussian_truth(mu, logvar, mu_q, logvar_q):
    """One dimension, in mpmath."""
    x = exact(logvar) - exact(logvar_q)
    m = (exact(mu) - exact(mu_q)) * mp.exp(-exact(logvar_q) / 2)
    return (mp.expm1(x) - x + m * m) / 2


# ---- Gaussians ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_gaussians_from_next_to_the_prior_to_overflow(dtype):
    eps, most = torch.finfo(dtype).eps, torch.finfo(dtype).max
    g = torch.Generator().manual_seed(0)
    for size in (1e-6, 1e-3, 0.1, 1.0, 10.0, 80.0):
        rows = (size * torch.randn(4, 60, 1, generator=g, dtype=F64)).clamp(-80, 80).to(dtype)
        values = losses.gaussian_kl_loss(*rows)
        for value, row in zip(values.tolist(), rows.squeeze(-1).T, strict=True):
            truth = gaussian_truth(*row)
            if truth > most:
                assert value == math.inf
            else:
                size_of_x = abs(float(row[1] - row[3]))  # e^x magnifies the rounding of x
                assert abs(mp.mpf(value) - truth) <= (4 + size_of_x) * eps * truth + torch.finfo(dtype).tiny * eps
    same = torch.randn(2, 5, 3, generator=g).to(dtype)
    assert bool((losses.gaussian_kl_loss(*same, *same) == 0).all())


def test_the_usual_formula_must_fail():
    """Must fail: its error near the prior, in float32."""
    logvar = torch.tensor([1e-4])
    truth = float(gaussian_truth(torch.tensor(0.0), logvar[0], torch.tensor(0.0), torch.tensor(0.0)))
    usual = float(-0.5 * (1 + logvar - logvar.exp()).sum())
    assert abs(usual - truth) > 0.5 * truth
    assert float(losses.gaussian_kl_loss(torch.zeros(1), logvar)) == pytest.approx(truth, rel=1e-6)


def test_gaussian_gradients():
    g = torch.Generator().manual_seed(1)
    leaves = [torch.randn(3, 4, generator=g, dtype=F64).requires_grad_() for _ in range(5)]
    assert torch.autograd.gradcheck(losses.gaussian_kl_loss, leaves[:4], check_forward_ad=True)
    assert torch.autograd.gradgradcheck(losses.gaussian_kl_loss, leaves[:4])
    assert torch.autograd.gradcheck(losses.gaussian_log_ratio_loss, leaves)
    extreme = [torch.tensor([[x]], requires_grad=True) for x in (1.0, 80.0, -1.0, 75.0)]
    grads = torch.autograd.grad(losses.gaussian_kl_loss(*extreme).sum(), extreme)
    assert all(bool(x.isfinite().all()) for x in grads)


def test_gaussian_gradients_in_float32():
    """Those of float64, from next to the prior on; the derivative of the usual formula must fail there."""
    g = torch.Generator().manual_seed(20)
    for size in (1e-6, 1e-3, 1.0, 20.0):
        rows = [(size * torch.randn(40, 3, generator=g)).requires_grad_() for _ in range(4)]
        wide = [x.detach().double().requires_grad_() for x in rows]
        found = torch.autograd.grad(losses.gaussian_kl_loss(*rows).sum(), rows)
        truth = torch.autograd.grad(losses.gaussian_kl_loss(*wide).sum(), wide)
        for a, b in zip(found, truth, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-7 * size**2)
    logvar = torch.full((1,), 1e-8, requires_grad=True)
    (usual,) = torch.autograd.grad((-0.5 * (1 + logvar - logvar.exp())).sum(), logvar)
    assert float(usual) == 0.0, "where the truth is 5e-9"
    (ours,) = torch.autograd.grad(losses.gaussian_kl_loss(torch.zeros(1), logvar), logvar)
    assert float(ours) == pytest.approx(5e-9, rel=1e-6)


def test_gaussians_of_every_shape():
    mu, logvar = torch.randn(5, 1, 3), torch.randn(3)
    assert losses.gaussian_kl_loss(mu, logvar).shape == (5, 1)
    assert losses.gaussian_kl_loss(mu, logvar, torch.randn(4, 3), -1.0).shape == (5, 4)
    p, q = Normal(mu, torch.exp(0.5 * logvar)), Normal(0.0, 1.0)
    torch.testing.assert_close(
        losses.gaussian_kl_loss(mu, logvar), torch.distributions.kl_divergence(p, q).sum(-1), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ValueError, match="last dimension"):
        losses.gaussian_kl_loss(torch.tensor(0.0), torch.tensor(0.0))


def test_gaussians_against_a_full_covariance():
    g = torch.Generator().manual_seed(2)
    mu, logvar = torch.randn(2, 6, 3, generator=g, dtype=F64)
    factor = torch.randn(3, 3, generator=g, dtype=F64).tril(-1) + torch.eye(3, dtype=F64)
    p = stablekl.MultivariateNormal(mu, scale_diag=torch.exp(0.5 * logvar))
    q = stablekl.MultivariateNormal(torch.ones(3, dtype=F64), scale_tril=factor)
    expected = stablekl.kl_divergence(p, q)
    by_factor = losses.gaussian_kl_loss(mu, logvar, 1.0, scale_tril_q=factor)
    by_covariance = losses.gaussian_kl_loss(mu, logvar, 1.0, covariance_matrix_q=factor @ factor.mT)
    torch.testing.assert_close(by_factor, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(by_covariance, expected, rtol=1e-12, atol=0)
    single = losses.gaussian_kl_loss(mu.float(), logvar.float(), 1.0, scale_tril_q=factor.float())
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=0)
    for given in ({"logvar_q": 1.0, "scale_tril_q": factor}, {"scale_tril_q": factor, "covariance_matrix_q": factor}):
        with pytest.raises(ValueError, match="not several"):
            losses.gaussian_kl_loss(mu, logvar, **given)


def test_the_log_ratio_is_that_of_the_densities():
    """And in float32 where p is next to q, where the difference of two log-densities is rounding."""
    g = torch.Generator().manual_seed(3)
    for size in (1.0, 1e-4):
        mu, logvar, mu_q, logvar_q = size * torch.randn(4, 50, 2, generator=g, dtype=F64)
        z = mu + torch.exp(0.5 * logvar) * torch.randn(50, 2, generator=g, dtype=F64)
        rows = [x.float().double() for x in (z, mu, logvar, mu_q, logvar_q)]
        p, q = Normal(rows[1], torch.exp(0.5 * rows[2])), Normal(rows[3], torch.exp(0.5 * rows[4]))
        expected = (p.log_prob(rows[0]) - q.log_prob(rows[0])).sum(-1)
        torch.testing.assert_close(losses.gaussian_log_ratio_loss(*rows), expected, rtol=1e-9, atol=1e-14)
        single = losses.gaussian_log_ratio_loss(*(x.float() for x in rows)).double()
        torch.testing.assert_close(single, expected, rtol=1e-4, atol=1e-6 * size)


def test_the_mean_of_the_log_ratio_and_of_its_gradient():
    """Those of the closed form, within five standard errors; sticking the landing has no variance at p = q."""
    g = torch.Generator().manual_seed(4)
    n = 200_000
    eps = torch.randn(n, 1, generator=g, dtype=F64)
    for stick in (False, True):
        leaves = [torch.tensor([x], dtype=F64, requires_grad=True) for x in (0.7, -0.4)]
        z = leaves[0] + torch.exp(0.5 * leaves[1]) * eps
        ratio = losses.gaussian_log_ratio_loss(z, *leaves, sticking_the_landing=stick)
        closed = losses.gaussian_kl_loss(*leaves)
        assert abs(float((ratio.mean() - closed).detach())) <= 5 * float(ratio.detach().std() / math.sqrt(n))
        found = torch.autograd.grad(ratio.mean(), leaves)
        for a, b in zip(found, torch.autograd.grad(closed, leaves), strict=True):
            assert float(a) == pytest.approx(float(b), abs=0.02)
    zero = [torch.zeros(1, dtype=F64, requires_grad=True) for _ in range(2)]
    z = zero[0] + torch.exp(0.5 * zero[1]) * eps[:100]
    grads = torch.autograd.grad(losses.gaussian_log_ratio_loss(z, *zero, sticking_the_landing=True).sum(), zero)
    assert all(float(x.abs()) <= 1e-12 for x in grads)


# ---- categories ---------------------------------------------------------------------------------------------------


@mp.workdps(50)
def categorical_truth(a, b):
    """In mpmath, from the logits as they are."""
    a, b = [exact(x) for x in a], [exact(x) for x in b]
    za, zb = mp.log(sum(map(mp.exp, a))), mp.log(sum(map(mp.exp, b)))
    return sum(mp.exp(x - za) * ((x - za) - (y - zb)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_categories_from_alike_to_apart(dtype):
    g = torch.Generator().manual_seed(5)
    eps = torch.finfo(dtype).eps
    for size in (0.0, 1e-7, 1e-4, 0.1, 1.0, 30.0, 1000.0):
        a = 3 * torch.randn(20, 6, generator=g, dtype=F64)
        b = (a + size * torch.randn(20, 6, generator=g, dtype=F64) + 5).to(dtype)
        a = a.to(dtype)
        values = losses.categorical_kl(a, b)
        for value, x, y in zip(values.tolist(), a, b, strict=True):
            truth = categorical_truth(x, y)
            # logits near 10 are rounded by 10 eps: nothing beside their difference, once that is formed exactly
            assert abs(value - float(truth)) <= 20 * eps * float(truth) + 50 * eps * size**2 + 1e-30
    assert bool((losses.categorical_kl(a, a) == 0).all())


def test_impossible_classes():
    inf = math.inf
    a = torch.tensor([[0.0, 1.0, -inf], [0.0, 1.0, 0.5], [0.0, -inf, -inf]], dtype=F64, requires_grad=True)
    b = torch.tensor([[0.3, 0.1, -inf], [0.0, 1.0, -inf], [0.7, 1.0, 0.0]], dtype=F64, requires_grad=True)
    values = losses.categorical_kl(a, b)
    found = values.detach().tolist()
    assert found[0] == pytest.approx(float(categorical_truth(a[0, :2].detach(), b[0, :2].detach())), rel=1e-14)
    assert found[1] == inf
    assert found[2] == pytest.approx(float(-torch.log_softmax(b[2].detach(), -1)[0]), rel=1e-14)
    grads = torch.autograd.grad(values[[0, 2]].sum(), (a, b), retain_graph=True)
    assert all(bool(x.isfinite().all()) for x in grads)
    assert float(grads[0][0, 2]) == float(grads[1][0, 2]) == 0
    assert not any(bool(x.isnan().any()) for x in torch.autograd.grad(values[1], (a, b)))
    rows = [x.detach()[[0, 2]].requires_grad_() for x in (a, b)]
    first = torch.autograd.grad(losses.categorical_kl(*rows).sum(), rows, create_graph=True)
    second = torch.autograd.grad(sum(x.square().sum() for x in first), rows)
    assert all(bool(x.isfinite().all()) for x in second)


def test_categorical_gradients():
    g = torch.Generator().manual_seed(6)
    a = torch.randn(3, 5, generator=g, dtype=F64)
    for other in (torch.randn(3, 5, generator=g, dtype=F64), a + 0.05 * torch.randn(3, 5, generator=g, dtype=F64)):
        leaves = [a.clone().requires_grad_(), other.requires_grad_()]
        assert torch.autograd.gradcheck(losses.categorical_kl, leaves, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(losses.categorical_kl, leaves)
    p, q = leaves
    grads = torch.autograd.grad(losses.categorical_kl(p, p.detach().requires_grad_()).sum(), p)[0]
    assert bool((grads == 0).all())
    torch.testing.assert_close(
        losses.categorical_kl(p, q), torch.distributions.kl_divergence(Categorical(logits=p), Categorical(logits=q))
    )


def test_categories_by_rows_and_reductions():
    a, b = torch.randn(4, 3), torch.randn(2, 1, 3)
    assert losses.categorical_kl(a, b).shape == (2, 4)
    rows = losses.categorical_kl(a, b)
    assert float(losses.categorical_kl(a, b, reduction="mean")) == pytest.approx(float(rows.mean()))
    assert float(losses.categorical_kl(a, b, reduction="sum")) == pytest.approx(float(rows.sum()))
    batched = torch.vmap(losses.categorical_kl)(a, b[0].expand(4, 3))
    torch.testing.assert_close(batched, rows[0])


def test_spaces_that_are_confused():
    p = torch.softmax(torch.randn(4, 3), -1)
    for arguments, name in (((p, p.log()), "logits_p"), ((p.log(), p), "logits_q")):
        with pytest.raises(ValueError, match=f"{name} looks like probabilities"):
            losses.categorical_kl(*arguments)
    losses.categorical_kl(p + 1, p.log())  # logits by chance: only differences count
    losses.categorical_kl(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]))  # whole numbers are logits
    with pytest.raises(ValueError, match="no class is possible"):
        losses.categorical_kl(torch.full((2, 3), -math.inf), p[:2].log())
    with pytest.raises(ValueError, match="holds the classes"):
        losses.categorical_kl(p.log(), torch.zeros(4))
    with pytest.raises(ValueError, match="reduction must be one of"):
        losses.categorical_kl(p.log(), p.log(), reduction="batchmean")


# ---- densities on a grid ------------------------------------------------------------------------------------------


def two_bumps(x):
    return torch.logaddexp(Normal(-5.0, 1.0).log_prob(x), Normal(10.0, 1.0).log_prob(x))


def test_one_gaussian_to_two_on_a_grid():
    """The numbers of the thread that asked: inf, 62.50 and 30.557."""
    x = torch.linspace(-15, 15, 1000)
    log_p, log_q = two_bumps(x), Normal(0.0, 1.0).log_prob(x)
    assert float(torch.nn.functional.kl_div(log_q.exp().log(), log_p.exp(), reduction="sum")) == math.inf
    dx = 30 / 999
    assert float(losses.grid_kl_loss(log_q, log_p, dx)) == pytest.approx(30.557, abs=1e-3)
    halved = log_p - math.log(2)
    assert float(losses.grid_kl_loss(log_q, halved, dx, normalized=True)) == pytest.approx(30.557, abs=1e-3)
    wide = losses.grid_kl_loss(log_q.double(), log_p.double(), dx)
    assert float(losses.grid_kl_loss(log_q, log_p, dx)) == pytest.approx(float(wide), rel=1e-5)


def test_a_grid_of_uneven_cells_in_a_batch():
    edges = torch.linspace(-3.2, 3.2, 400, dtype=F64).sinh()
    x, dx = 0.5 * (edges[1:] + edges[:-1]), edges.diff()
    loc = torch.tensor([[0.0], [1.0]], dtype=F64)
    p, q = Normal(loc, 1.0), Normal(0.5, 2.0)
    expected = torch.distributions.kl_divergence(p, q).squeeze(-1)
    for normalized in (False, True):
        found = losses.grid_kl_loss(q.log_prob(x), p.log_prob(x), dx, normalized)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_grid_gradients_and_errors():
    x = torch.linspace(-6, 6, 50, dtype=F64)
    loc = torch.tensor(0.3, dtype=F64, requires_grad=True)
    for normalized in (False, True):

        def f(loc, normalized=normalized):
            return losses.grid_kl_loss(Normal(loc, 1.2).log_prob(x), Normal(0.0, 1.0).log_prob(x), 12 / 49, normalized)

        assert torch.autograd.gradcheck(f, (loc,))
    with pytest.raises(ValueError, match="must integrate to 1; its sum times dx is 2"):
        losses.grid_kl_loss(two_bumps(x), two_bumps(torch.linspace(-15, 15, 50, dtype=F64)), 30 / 49, normalized=True)
    with pytest.raises(ValueError, match="dx must be positive"):
        losses.grid_kl_loss(two_bumps(x), two_bumps(x), 0.0)
    nowhere = torch.full((50,), -math.inf, dtype=F64)
    nowhere[:25] = 0.0
    assert float(losses.grid_kl_loss(nowhere, Normal(0.0, 1.0).log_prob(x), 12 / 49)) == math.inf
    assert math.isfinite(float(losses.grid_kl_loss(Normal(0.0, 1.0).log_prob(x), nowhere, 12 / 49)))


# ---- penalties ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_penalties_from_1e6_to_overflow(estimator, dtype):
    for size in (1e-6, 1e-3, 1.0, 50.0, 1e3):
        logq = torch.tensor([-1.0, 1.0]).to(dtype) * size
        logp = torch.zeros(2, dtype=dtype)
        found = losses.kl_penalty(logp, logq, estimator).tolist()
        for value, x in zip(found, logq, strict=True):
            r = exact(x)
            with mp.workdps(50):
                truth = {"k1": -r, "k2": r * r / 2, "k3": mp.expm1(r) - r}[estimator]
            most = mp.mpf(torch.finfo(dtype).max)
            assert (
                (value == math.inf) if truth > most else abs(value - truth) <= 4 * torch.finfo(dtype).eps * abs(truth)
            )


def test_the_gradient_of_a_penalty_is_that_of_the_divergence():
    """Over all samples of a policy of five actions, weighted by their probabilities: exactly, for every k."""
    g = torch.Generator().manual_seed(7)
    logits, other = torch.randn(2, 5, generator=g, dtype=F64)
    leaves = [logits.requires_grad_(), other.requires_grad_()]
    logp, logq = (torch.log_softmax(x, -1) for x in leaves)
    expected = torch.autograd.grad((logp.exp() * (logp - logq)).sum(), leaves, retain_graph=True)
    weight = logp.exp().detach()
    for estimator in ("k1", "k2", "k3"):
        found = torch.autograd.grad(
            (weight * losses.kl_penalty(logp, logq, estimator)).sum(), leaves, retain_graph=True
        )
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    naive = torch.autograd.grad((weight * (logp - logq)).sum(), leaves, retain_graph=True)[0]
    assert float(naive.abs().max()) < 1e-15, "the derivative of k1 itself: none"


def test_penalties_of_reparameterised_samples():
    g = torch.Generator().manual_seed(8)
    leaves = [torch.randn(4, generator=g, dtype=F64).requires_grad_() for _ in range(2)]
    for estimator in ("k1", "k2", "k3"):
        assert torch.autograd.gradcheck(
            lambda p, q, e=estimator: losses.kl_penalty(p, q, e, reparameterized=True), leaves
        )


def test_masked_and_overflowing_samples_have_no_nan():
    inf, nan = math.inf, math.nan
    logp = torch.tensor([-1.0, nan, -inf, 0.0, -2.0], requires_grad=True)
    logq = torch.tensor([-1.5, -inf, nan, 1e4, -inf], requires_grad=True)
    mask = torch.tensor([True, False, False, True, True])
    for estimator in ("k1", "k2", "k3"):
        values = losses.kl_penalty(logp, logq, estimator, mask)
        assert values[1:3].tolist() == [0.0, 0.0]
        assert float(values[4].detach()) == inf
        assert not bool(values.isnan().any())
        for grad in torch.autograd.grad(values.sum(), (logp, logq)):
            assert bool(grad.isfinite().all())
            assert grad[1:3].tolist() == [0.0, 0.0]
    assert float(losses.kl_penalty(logp, logq, "k3", mask)[3].detach()) == inf
    with pytest.raises(ValueError, match="estimator must be one of"):
        losses.kl_penalty(logp, logq, "k4")
    with pytest.raises(ValueError, match="mask must be boolean"):
        losses.kl_penalty(logp, logq, mask=torch.ones(5))


# ---- mixtures -----------------------------------------------------------------------------------------------------


def network_output(rows, k, d, seed=9, dtype=F64):
    g = torch.Generator().manual_seed(seed)
    target, logits = torch.randn(rows, d, generator=g, dtype=dtype), torch.randn(rows, k, generator=g, dtype=dtype)
    loc, log_scale = torch.randn(2, rows, k, d, generator=g, dtype=dtype)
    return target, logits, loc, log_scale


@pytest.mark.parametrize("d", [1, 3])
def test_mixtures_of_networks(d):
    target, logits, loc, log_scale = network_output(7, 4, d)
    expected = -stablekl.GaussianMixture(logits=logits, loc=loc, scale_diag=log_scale.exp()).log_prob(target)
    found = losses.mixture_nll_loss(target, logits, loc, log_scale=log_scale)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    factor = torch.diag_embed(log_scale.exp())
    for given in ({"scale": log_scale.exp()}, {"scale_tril": factor}):
        torch.testing.assert_close(losses.mixture_nll_loss(target, logits, loc, **given), expected)
    if d == 1:
        flat = losses.mixture_nll_loss(target[:, 0], logits, loc[..., 0], log_scale=log_scale[..., 0])
        torch.testing.assert_close(flat, expected)
    single = losses.mixture_nll_loss(*(x.float() for x in (target, logits, loc)), log_scale=log_scale.float())
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-5)
    torch.autograd.gradcheck(
        lambda *x: losses.mixture_nll_loss(*x[:3], log_scale=x[3], min_scale=0.1),
        [x.clone().requires_grad_() for x in (target, logits, loc, log_scale)],
        fast_mode=True,
    )


def test_where_the_usual_code_is_nan():
    """A target 1e4 standard deviations away: exp underflows, log(0), and 0/0 behind it."""
    target, logits = torch.tensor([[0.0]]), torch.zeros(1, 2)
    leaves = [torch.tensor([[[1e4], [-2e4]]], requires_grad=True), torch.zeros(1, 2, 1, requires_grad=True)]
    usual = -torch.log(
        (torch.softmax(logits, -1) * Normal(leaves[0], leaves[1].exp()).log_prob(target).exp()[..., 0]).sum(-1)
    )
    assert float(usual.detach()) == math.inf
    assert bool(torch.autograd.grad(usual.sum(), leaves, retain_graph=True)[0].isnan().any())
    loss = losses.mixture_nll_loss(target, logits, leaves[0], log_scale=leaves[1])
    assert float(loss.detach()) == pytest.approx(5e7, rel=1e-6)
    grads = torch.autograd.grad(loss.sum(), leaves)
    assert all(bool(x.isfinite().all()) for x in grads)
    assert float(grads[0][0, 0, 0]) == pytest.approx(1e4)


def test_masked_targets_are_not_looked_at():
    target, logits, loc, log_scale = network_output(4, 2, 2)
    expected = losses.mixture_nll_loss(target, logits, loc, log_scale=log_scale)
    mask = torch.tensor([True, False, True, False])
    spoiled = [
        x.masked_fill(~mask.reshape(-1, *(1,) * (x.ndim - 1)), math.nan).requires_grad_()
        for x in (target, logits, loc, log_scale)
    ]
    found = losses.mixture_nll_loss(*spoiled[:3], log_scale=spoiled[3], mask=mask)
    torch.testing.assert_close(found, torch.where(mask, expected, 0.0))
    for grad in torch.autograd.grad(found.sum(), spoiled):
        assert bool(grad.isfinite().all())
        assert bool((grad[~mask] == 0).all())
    factor = torch.diag_embed(spoiled[3].detach().exp())
    torch.testing.assert_close(
        losses.mixture_nll_loss(*(x.detach() for x in spoiled[:3]), scale_tril=factor, mask=mask), found.detach()
    )


def test_a_component_on_a_target_does_not_collapse():
    y = torch.tensor([0.0, 1.0, 2.0, 3.0])
    loss = losses.MixtureNLLLoss(data_scale=y.std(), relative_floor=1e-2)
    loc = y.unsqueeze(-1).expand(4, 2)
    narrow, narrower = (torch.full((4, 2), x, requires_grad=True) for x in (-5.0, -60.0))
    first, second = (
        loss(y, torch.zeros(4, 2), loc, log_scale=narrow),
        loss(y, torch.zeros(4, 2), loc, log_scale=narrower),
    )
    assert abs(float((first - second).detach())) < 0.2
    unbounded = losses.mixture_nll_loss(y, torch.zeros(4, 2), loc, log_scale=narrower)
    assert float(unbounded.mean().detach()) < -50
    found = losses.mixture_diagnostics(y, torch.zeros(4, 2), loc, log_scale=narrower.detach(), min_scale=loss.min_scale)
    assert float(found.collapsed) == 1
    assert float(found.effective_components) == pytest.approx(2)
    assert "min_scale" in loss.state_dict()
    tril = losses.mixture_nll_loss(
        y.unsqueeze(-1),
        torch.zeros(4, 2),
        loc.unsqueeze(-1),
        scale_tril=narrow.detach().exp()[..., None, None],
        min_scale=0.1,
    )
    diagonal = losses.mixture_nll_loss(y, torch.zeros(4, 2), loc, log_scale=narrow.detach(), min_scale=0.1)
    torch.testing.assert_close(tril, diagonal, rtol=1e-2, atol=0)


def test_a_floor_is_left_again():
    """From a log-scale of -20 a network comes back; under one that is added in quadrature nothing moves."""
    y = torch.linspace(-1, 1, 50)
    loc = torch.zeros(50, 1)

    def slope(floored):
        log_scale = torch.full((50, 1), -20.0, requires_grad=True)
        return float(torch.autograd.grad(floored(log_scale), log_scale)[0].sum())

    def ours(log_scale):
        return losses.mixture_nll_loss(y, torch.zeros(50, 1), loc, log_scale=log_scale, min_scale=0.01).mean()

    def added(log_scale):
        return -Normal(loc, torch.hypot(log_scale.exp(), torch.tensor(0.01))).log_prob(y[:, None]).mean()

    assert slope(ours) < -0.1
    assert abs(slope(added)) < 1e-8
    wide = torch.full((50, 1), math.log(10.0))
    floored = losses.mixture_nll_loss(y, torch.zeros(50, 1), loc, log_scale=wide, min_scale=0.01)
    free = losses.mixture_nll_loss(y, torch.zeros(50, 1), loc, log_scale=wide)
    torch.testing.assert_close(floored, free, rtol=0, atol=2e-3)


def test_what_a_mixture_needs():
    target, logits, loc, log_scale = network_output(4, 2, 2)
    with pytest.raises(ValueError, match="exactly one of scale, log_scale and scale_tril; got none"):
        losses.mixture_nll_loss(target, logits, loc)
    with pytest.raises(ValueError, match="got scale, log_scale"):
        losses.mixture_nll_loss(target, logits, loc, scale=log_scale.exp(), log_scale=log_scale)
    with pytest.raises(ValueError, match="a mixture needs logits"):
        losses.mixture_nll_loss(target, logits[:, :1], loc, log_scale=log_scale)
    with pytest.raises(ValueError, match="softplus_scale"):
        losses.mixture_nll_loss(target, logits, loc, scale=torch.zeros_like(loc))
    with pytest.raises(ValueError, match="data_scale and relative_floor must be positive"):
        losses.MixtureNLLLoss(data_scale=0.0)
    with pytest.raises(ValueError, match="no target to diagnose"):
        losses.mixture_diagnostics(target, logits, loc, log_scale=log_scale, mask=torch.zeros(4, dtype=torch.bool))


# ---- modules ------------------------------------------------------------------------------------------------------


def test_modules_reduce_as_those_of_torch():
    mu, logvar = torch.randn(2, 6, 3)
    rows = losses.gaussian_kl_loss(mu, logvar)
    for reduction, expected in (("none", rows), ("mean", rows.mean()), ("sum", rows.sum())):
        torch.testing.assert_close(losses.GaussianKLLoss(reduction)(mu, logvar), expected)
        assert f"reduction={reduction!r}" in repr(losses.GaussianKLLoss(reduction))
    with pytest.raises(ValueError, match="reduction must be one of"):
        losses.GaussianKLLoss("median")
    a, b = torch.randn(2, 4, 5)
    torch.testing.assert_close(losses.CategoricalKLLoss()(a, b), losses.categorical_kl(a, b).mean())
    x = torch.linspace(-6, 6, 40)
    grid = losses.GridKLLoss(12 / 39)
    log_p, log_q = Normal(0.0, 1.0).log_prob(x), Normal(0.5, 1.0).log_prob(x)
    torch.testing.assert_close(grid(log_q, log_p), losses.grid_kl_loss(log_q, log_p, 12 / 39))
    mask = torch.tensor([True, True, False, False])
    penalty = losses.KLPenalty("k3")
    torch.testing.assert_close(penalty(a[:, 0], b[:, 0], mask), losses.kl_penalty(a[:2, 0], b[:2, 0], "k3").mean())
    assert "'k3'" in repr(penalty)
    target, logits, loc, log_scale = network_output(4, 2, 2)
    found = losses.MixtureNLLLoss()(target, logits, loc, log_scale=log_scale, mask=mask)
    expected = losses.mixture_nll_loss(target[:2], logits[:2], loc[:2], log_scale=log_scale[:2]).mean()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["gaussian", "categorical", "penalty"])
def test_under_torch_compile(name):
    g = torch.Generator().manual_seed(10)
    leaves = [torch.randn(3, 4, generator=g).requires_grad_() for _ in range(2)]
    f = {"gaussian": losses.gaussian_kl_loss, "categorical": losses.categorical_kl, "penalty": losses.kl_penalty}[name]
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    expected, found = f(*leaves), compiled(*leaves)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_mean_that_fits_although_the_sum_does_not():
    half, single = torch.full((1000, 1), 20.0).half(), torch.full((10,), 1e38)
    assert float(losses.GaussianKLLoss()(half, torch.zeros_like(half))) == 200
    assert float(losses.KLPenalty()(single, torch.zeros(10))) == pytest.approx(1e38)
    assert float(losses.GaussianKLLoss("sum")(half, torch.zeros_like(half))) == math.inf


def test_what_is_not_a_number_does_not_become_one():
    """NaN in a logit once gave 1: it was taken for a class that p makes impossible."""
    for value in (math.nan, math.inf):
        logits = torch.tensor([[0.0, 1.0], [value, 0.0]])
        with pytest.raises(ValueError, match=r"logits_p\[1, 0\] is (nan|inf)"):
            losses.categorical_kl(logits, torch.zeros(2, 2))
        with pytest.raises(ValueError, match=r"logits_q\[1, 0\] is (nan|inf)"):
            losses.categorical_kl(torch.zeros(2, 2), logits)
        with pytest.raises(ValueError, match=r"log_q\[1, 0\] is (nan|inf)"):
            losses.grid_kl_loss(logits, torch.zeros(2, 2), 0.5)
        for pair in ((logits, torch.zeros(2, 2)), (torch.zeros(2, 2), logits)):
            found = torch.vmap(losses.categorical_kl)(*pair)
            assert found.isnan().tolist() == [False, True]
            grads = torch.vmap(torch.func.grad(losses.categorical_kl, argnums=(0, 1)))(*pair)
            assert all(bool(x[1].isnan().any()) for x in grads)


def test_densities_that_miss_the_grid():
    """P that is nowhere gave 1, and Q NaN."""
    x = torch.linspace(-5, 5, 101)
    log_p, nowhere = Normal(0.0, 1.0).log_prob(x), torch.full((101,), -math.inf)
    q = nowhere.clone().requires_grad_()
    loss = losses.grid_kl_loss(q, log_p, 0.1)
    assert float(loss.detach()) == float(losses.grid_kl_loss(nowhere, log_p, 0.1, normalized=True)) == math.inf
    assert not bool(torch.autograd.grad(loss, q)[0].isnan().any())
    with pytest.raises(ValueError, match="log_p is -inf at every point"):
        losses.grid_kl_loss(log_p, nowhere, 0.1)


def test_densities_in_place_of_their_logarithms():
    x = torch.linspace(-5, 5, 101)
    log_p = Normal(0.0, 1.0).log_prob(x)
    for arguments, name in (((log_p.exp(), log_p), "log_q"), ((log_p, log_p.exp()), "log_p")):
        with pytest.raises(ValueError, match=f"{name} looks like a density"):
            losses.grid_kl_loss(*arguments, 0.1)
    losses.grid_kl_loss(log_p.exp() + 1, log_p, 0.1)
    with pytest.raises(ValueError, match="at the same points"):
        losses.grid_kl_loss(log_p[:1], log_p, 0.1)


def test_rows_that_would_be_paired_with_every_other():
    """(N,) beside (N, 1) is (N, N) numbers, their mean is not the loss, and nothing shows it."""
    n, k = 5, 3
    y, logits, loc = torch.randn(n), torch.randn(n, k), torch.randn(n, k)
    ones = torch.ones(n, k)
    every = torch.ones(n, 1, dtype=torch.bool)
    for call in (
        lambda: losses.mixture_nll_loss(y.unsqueeze(-1), logits, loc, scale=ones),
        lambda: losses.mixture_nll_loss(y, logits, loc, scale=ones, mask=every),
        lambda: losses.kl_penalty(y, y.unsqueeze(-1)),
        lambda: losses.kl_penalty(y, y, mask=every),
        lambda: losses.gaussian_kl_loss(y.unsqueeze(-1), y),
        lambda: losses.gaussian_log_ratio_loss(y, y.unsqueeze(-1), y.unsqueeze(-1)),
    ):
        with pytest.raises(ValueError, match="each row of one with each row of the other"):
            call()
    shared = losses.mixture_nll_loss(y, logits[0], loc[0], scale=ones[0])
    torch.testing.assert_close(shared, losses.mixture_nll_loss(y, logits[:1], loc[:1], scale=ones[:1]))
    assert losses.mixture_nll_loss(torch.randn(7, n), logits, loc, scale=ones).shape == (7, n)
    assert losses.kl_penalty(torch.zeros(4, n), y, mask=every[:, 0]).shape == (4, n)


def test_mixtures_that_are_not_what_was_meant():
    n, k, d = 3, 3, 3  # where every wrong order of dimensions fits
    target, logits, loc = torch.randn(n, d), torch.randn(n, k), torch.randn(n, k, d)
    with pytest.raises(ValueError, match="needs scale of the shape of loc"):
        losses.mixture_nll_loss(target, logits, loc, scale=torch.ones(n, k))
    with pytest.raises(ValueError, match="needs scale_tril"):
        losses.mixture_nll_loss(target, logits, loc, scale_tril=torch.ones(n, k, d))
    covariance = torch.full((n, k, d, d), 0.5) + torch.eye(d)
    with pytest.raises(ValueError, match=r"not lower triangular: scale_tril\[0, 0, 0, 1\] is 0.5"):
        losses.mixture_nll_loss(target, logits, loc, scale_tril=covariance)
    with pytest.raises(ValueError, match="logits looks like probabilities"):
        losses.mixture_nll_loss(target, torch.softmax(logits, -1), loc, scale=torch.ones(n, k, d))
    with pytest.raises(ValueError, match=r"logits\[1, 0\] is nan"):
        losses.mixture_nll_loss(
            target,
            logits.index_put((torch.tensor(1), torch.tensor(0)), torch.tensor(math.nan)),
            loc,
            scale=torch.ones(n, k, d),
        )
    with pytest.raises(ValueError, match="positive and finite"):
        losses.MixtureNLLLoss(math.inf)
    common = losses.mixture_nll_loss(target, logits, loc, scale=torch.full((n, k, 1), 2.0))
    torch.testing.assert_close(common, losses.mixture_nll_loss(target, logits, loc, scale=torch.full((n, k, d), 2.0)))


def test_the_dtype_of_a_mixtures_loss():
    """Whole numbers once gave whole numbers, and a scale of float64 float32."""
    y, loc = torch.tensor([1, 2]), torch.tensor([[0, 1, 2], [0, 1, 2]])
    found = losses.mixture_nll_loss(y, torch.zeros(2, 3), loc, scale=torch.ones(2, 3))
    expected = losses.mixture_nll_loss(y.float(), torch.zeros(2, 3), loc.float(), scale=torch.ones(2, 3))
    torch.testing.assert_close(found, expected)
    assert (
        losses.mixture_nll_loss(y.float(), torch.zeros(2, 3), loc.float(), scale=torch.ones(2, 3, dtype=F64)).dtype
        == F64
    )


def test_half_precision_is_not_taken_for_probabilities():
    """The slack for rounding once grew with the classes, to 62 of 1,000 in bfloat16."""
    logits = torch.zeros(1, 1000, dtype=torch.bfloat16)
    logits[0, :3] = torch.tensor([1.5, 2.25, 0.5])
    losses.categorical_kl(logits, -logits)
    with pytest.raises(ValueError, match="looks like probabilities"):
        losses.categorical_kl(torch.softmax(torch.randn(4, 1000), -1).bfloat16(), logits)


def test_matrices_that_are_not_what_they_are_said_to_be():
    """A negative diagonal was inf, and a covariance was taken for its factor."""
    mu, logvar = torch.zeros(2, 2), torch.zeros(2, 2)
    covariance = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    for given, message in (
        ({"scale_tril_q": -torch.eye(2)}, "must be positive"),
        ({"scale_tril_q": covariance}, "not lower triangular"),
        ({"scale_tril_q": torch.eye(3)}, "shape"),
        ({"scale_tril_q": torch.ones(2)}, "shape"),
        ({"covariance_matrix_q": covariance.tril()}, "symmetric"),
        ({"covariance_matrix_q": -covariance}, "positive"),
    ):
        with pytest.raises(ValueError, match=message):
            losses.gaussian_kl_loss(mu, logvar, **given)


def test_penalties_of_samples_that_cannot_be():
    """-inf under the policy itself was a penalty of -inf, and both impossible NaN."""
    for logp, logq in ((-math.inf, -1.0), (-math.inf, -math.inf), (math.nan, 0.0), (0.0, math.nan), (0.0, math.inf)):
        rows = torch.tensor([-1.0, logp]), torch.tensor([-2.0, logq])
        with pytest.raises(ValueError, match=r"logp\[1\] is .* and logq\[1\] is"):
            losses.kl_penalty(*rows)
        assert losses.kl_penalty(*rows, mask=torch.tensor([True, False])).tolist() == [1, 0]
    assert losses.kl_penalty(torch.tensor([-1.0]), torch.tensor([-math.inf])).tolist() == [math.inf]


@pytest.mark.parametrize("kind", ["scale", "scale_tril"])
def test_one_mixture_for_all_targets_and_a_mask(kind):
    """The mask gave the parameters rows that they had not, and the next one an error."""
    target, mask = torch.randn(6, 2), torch.arange(6) % 2 == 0
    logits, loc, scale = torch.randn(3), torch.randn(3, 2), torch.full((3, 2), 0.5)
    given = {kind: scale if kind == "scale" else torch.diag_embed(scale)}
    found = losses.mixture_nll_loss(target, logits, loc, mask=mask, **given)
    expected = losses.mixture_nll_loss(target, logits, loc, **given)
    torch.testing.assert_close(found, torch.where(mask, expected, 0.0))
    usage = losses.mixture_diagnostics(target, logits, loc, mask=mask, **given).usage
    torch.testing.assert_close(usage, losses.mixture_diagnostics(target[mask], logits, loc, **given).usage)
    rows = logits.expand(4, 3), loc.expand(4, 3, 2)
    given = {name: x.expand(4, *x.shape) for name, x in given.items()}
    columns = torch.tensor([True, False, True, True])
    usage = losses.mixture_diagnostics(target[:, None].expand(6, 4, 2), *rows, mask=columns, **given).usage
    assert float(usage.sum()) == pytest.approx(1)


def test_one_hot_labels_are_not_logits():
    with pytest.raises(ValueError, match="one-hot labels"):
        losses.categorical_kl(torch.eye(3), torch.zeros(3, 3))
    with pytest.raises(ValueError, match="one-hot labels"):
        losses.categorical_kl(torch.zeros(3, 3), torch.eye(3)[[0, 1, 1]])
    assert losses.categorical_kl(torch.tensor([0.0, 1.0]), torch.zeros(2)) > 0  # one row may be logits
    assert losses.categorical_kl(torch.zeros(4, 3), torch.ones(4, 3)).abs().max() == 0


@pytest.mark.parametrize("log_scale", [-20.0, -30.0, -40.0, -43.0, 40.0])
def test_a_mixture_that_starts_far_too_narrow_has_finite_gradients(log_scale):
    """Those by the scale leave float32 long before those by its logarithm do."""
    leaves = [torch.zeros(2, 2), torch.tensor([[-1.0, 1.0], [0.0, 3.0]]), torch.full((2, 2), log_scale)]
    leaves = [x.requires_grad_() for x in leaves]
    target = torch.tensor([0.5, 1.0])
    loss = losses.mixture_nll_loss(target, *leaves[:2], log_scale=leaves[2])
    loss.sum().backward()
    nearest = torch.tensor([-0.5, 1.0], dtype=F64)  # from the likelier component
    z2 = (nearest * math.exp(-log_scale)).square()
    if log_scale < 0:
        expected = 0.5 * z2 + log_scale + math.log(2) + 0.5 * math.log(2 * math.pi)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(leaves[2].grad.sum(-1).double(), -z2, rtol=1e-6, atol=0)
    assert all(bool(x.grad.isfinite().all()) for x in leaves)
