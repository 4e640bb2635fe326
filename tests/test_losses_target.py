"""Forward and reverse KL to a target known in four ways, against each other and against the closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Independent, Laplace, Normal, StudentT

import stablekl
from stablekl.losses import Grid, elbo_loss, forward_kl_loss, reverse_kl_loss

F64 = torch.float64


def two(dtype=F64):
    """The mixture of the thread that asked: N(-5, 1) and N(10, 1)."""
    loc = torch.tensor([-5.0, 10.0], dtype=dtype)
    return stablekl.MixtureSameFamily(
        torch.distributions.Categorical(logits=torch.zeros(2, dtype=dtype)),
        stablekl.Normal(loc, torch.ones(2, dtype=dtype)),
    )


def grid_of(p, low, high, n=20001):
    x = torch.linspace(low, high, n, dtype=F64)
    return Grid(x, p.log_prob(x) + 3.0, (high - low) / (n - 1))  # up to a factor


def trained(loss, loc, scale):
    """A normal's mean and log-scale, by at most 50 steps of L-BFGS."""
    leaves = [torch.tensor(x, dtype=F64, requires_grad=True) for x in (loc, math.log(scale))]
    optimizer = torch.optim.LBFGS(leaves, max_iter=50, line_search_fn="strong_wolfe", tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        value = loss(stablekl.Normal(leaves[0], leaves[1].exp()))
        value.backward()
        return value

    optimizer.step(closure)
    return float(leaves[0].detach()), float(leaves[1].detach().exp())


def test_four_forms_of_a_target_are_one_divergence():
    p = two()
    q = stablekl.Normal(torch.tensor(2.0, dtype=F64), torch.tensor(7.0, dtype=F64))
    exact = float(stablekl.kl_divergence(p, q))
    assert float(forward_kl_loss(q, p)) == exact
    assert float(forward_kl_loss(q, grid_of(p, -60, 60))) == pytest.approx(exact, rel=1e-9)
    torch.manual_seed(0)
    x = p.sample((200_000,))
    by_samples = float(forward_kl_loss(q, x)) - float(stablekl.entropy_estimate(p).value)
    assert by_samples == pytest.approx(exact, abs=0.02)
    by_density = float(forward_kl_loss(q, lambda x: p.log_prob(x) + 3.0, num_samples=200_000))
    assert by_density == pytest.approx(exact, abs=0.02)
    backwards = float(stablekl.kl_divergence(q, p))
    assert float(reverse_kl_loss(q, p)) == backwards
    assert float(reverse_kl_loss(q, grid_of(p, -60, 60))) == pytest.approx(backwards, rel=1e-9)
    assert float(reverse_kl_loss(q, lambda x: p.log_prob(x), num_samples=200_000)) == pytest.approx(backwards, rel=0.02)


def test_forward_covers_and_reverse_seeks():
    """Moments (2.5, sqrt(57.25)) within 1e-3; and one of the modes."""
    p = two()
    for target in (p, grid_of(p, -60, 60)):
        loc, scale = trained(lambda q, t=target: forward_kl_loss(q, t), 0.0, 1.0)
        assert loc == pytest.approx(2.5, abs=1e-3)
        assert scale == pytest.approx(math.sqrt(57.25), abs=1e-3)
    for start, mode in ((-3.0, -5.0), (7.0, 10.0)):
        loc, scale = trained(lambda q: reverse_kl_loss(q, p), start, 1.0)
        assert loc == pytest.approx(mode, abs=1e-3)
        assert scale == pytest.approx(1.0, abs=1e-3)


def test_what_a_short_grid_leaves_out_is_counted():
    """The minimiser is the target's moments, not those of a normal cut off at the ends."""
    loc, scale = trained(lambda q: forward_kl_loss(q, grid_of(two(), -15, 15)), 0.0, 1.0)
    assert loc == pytest.approx(2.5, abs=1e-3)
    assert scale == pytest.approx(math.sqrt(57.25), abs=2e-3)


def test_gradients_by_samples_are_those_of_the_divergence():
    """A mixture's own: weights, means and scales; sticking the landing or not. In standard errors."""
    torch.manual_seed(1)
    p = Normal(torch.tensor(0.5, dtype=F64), 1.5)
    leaves = [torch.tensor(x, dtype=F64, requires_grad=True) for x in ([0.3, -0.4], [-1.0, 2.0], [-0.2, 0.1])]

    def mixture():
        c = torch.distributions.Categorical(logits=leaves[0])
        return stablekl.MixtureSameFamily(c, stablekl.Normal(leaves[1], leaves[2].exp()))

    expected = torch.cat(torch.autograd.grad(stablekl.kl_divergence(mixture(), p), leaves))
    for stick in (False, True):
        found = []
        for _ in range(40):
            loss = reverse_kl_loss(mixture(), p.log_prob, num_samples=500, sticking_the_landing=stick)
            found.append(torch.cat(torch.autograd.grad(loss, leaves)))
        found = torch.stack(found)
        assert bool(((found.mean(0) - expected).abs() <= 5 * found.std(0) / math.sqrt(40)).all())


def test_sticking_the_landing_is_noise_free_at_the_target():
    q = Normal(torch.tensor(0.5, dtype=F64, requires_grad=True), torch.tensor(1.5, dtype=F64, requires_grad=True))
    p = Normal(torch.tensor(0.5, dtype=F64), torch.tensor(1.5, dtype=F64))
    torch.manual_seed(2)
    for stick in (True, False):
        loss = reverse_kl_loss(q, p.log_prob, num_samples=10, sticking_the_landing=stick)
        size = max(float(x.abs()) for x in torch.autograd.grad(loss, (q.loc, q.scale)))
        assert (size < 1e-12) == stick


def test_importance_weights_have_the_forward_gradient():
    torch.manual_seed(3)
    p = Normal(torch.tensor(0.3, dtype=F64), 1.0)
    leaves = [torch.tensor(x, dtype=F64, requires_grad=True) for x in (0.0, 1.5)]
    q = Normal(*leaves)
    expected = torch.autograd.grad(torch.distributions.kl_divergence(p, q), leaves)
    found = torch.autograd.grad(forward_kl_loss(q, p.log_prob, num_samples=200_000), leaves)
    for a, b in zip(found, expected, strict=True):
        assert float(a) == pytest.approx(float(b), abs=0.02)


def test_families_without_a_rule_are_sampled():
    torch.manual_seed(4)
    p, q = StudentT(torch.tensor(5.0)), Laplace(torch.zeros(3), torch.tensor([1.0, 2.0, 3.0]))
    with pytest.raises(NotImplementedError):
        stablekl.kl_divergence(p, q)
    x = torch.linspace(-200, 200, 400_001)
    dx = 400 / 400_000
    for loss, first, second in ((forward_kl_loss, p, q), (reverse_kl_loss, q, p)):
        log_first, log_second = (d.log_prob(x.unsqueeze(-1)) for d in (first, second))
        truth = (log_first.exp() * (log_first - log_second)).sum(0) * dx
        torch.testing.assert_close(loss(q, p, num_samples=100_000), truth, rtol=0.05, atol=0.01)


def test_elbo_is_the_evidence_at_the_posterior():
    torch.manual_seed(5)
    y = torch.tensor(1.0, dtype=F64)
    evidence = Normal(torch.zeros((), dtype=F64), math.sqrt(2)).log_prob(y)
    q = Normal(torch.tensor(0.5, dtype=F64), math.sqrt(0.5))
    prior = Normal(torch.zeros((), dtype=F64), 1.0)
    for given in (prior, prior.log_prob):
        loss = elbo_loss(q, lambda z: Normal(z, 1.0).log_prob(y), given, num_samples=100_000)
        assert float(loss) == pytest.approx(-float(evidence), abs=0.01)
    mixture = two()
    bound = elbo_loss(mixture, lambda z: Normal(z, 1.0).log_prob(y), prior, num_samples=10_000)
    assert float(bound) > -float(evidence)
    assert float(bound) == pytest.approx(
        float(stablekl.kl_divergence(mixture, prior)) + 0.5 * (0.5 * (36 + 81) + 1) + 0.5 * math.log(2 * math.pi),
        rel=0.3,
    )


def test_batches_and_vectors():
    torch.manual_seed(6)
    q = Independent(Normal(torch.zeros(4, 3), torch.ones(4, 3)), 1)
    p = stablekl.MultivariateNormal(torch.ones(3), scale_tril=torch.eye(3))
    assert forward_kl_loss(q, p).shape == (4,)
    assert reverse_kl_loss(q, p.log_prob).shape == (4,)
    assert forward_kl_loss(q, torch.randn(10, 4, 3)).shape == (4,)
    assert forward_kl_loss(q, p.log_prob).shape == (4,)
    m = stablekl.GaussianMixture(logits=torch.zeros(4, 2), loc=torch.randn(4, 2, 3), scale_diag=torch.ones(4, 2, 3))
    assert reverse_kl_loss(m, StudentTs()).shape == (4,)
    grid = Grid(torch.linspace(-9, 9, 100), Normal(0.0, 1.0).log_prob(torch.linspace(-9, 9, 100)), 18 / 99)
    assert forward_kl_loss(Normal(torch.zeros(2, 5), 1.0), grid).shape == (2, 5)


class StudentTs:
    """A log-density that is no distribution."""

    def __call__(self, x):
        return StudentT(torch.tensor(5.0)).log_prob(x).sum(-1)


def test_a_weight_of_zero_counts_nothing():
    weights = torch.tensor([1.0, 0.0], requires_grad=True)
    loc, scale = torch.tensor([[0.0], [1e30]], requires_grad=True), torch.ones(2, 1, requires_grad=True)
    q = stablekl.GaussianMixture(probs=weights, loc=loc, scale_diag=scale)
    for stick in (True, False):
        loss = reverse_kl_loss(q, lambda x: Normal(0.0, 1.0).log_prob(x).sum(-1), sticking_the_landing=stick)
        assert abs(float(loss.detach())) < 1e-6
        grads = torch.autograd.grad(loss, (weights, loc, scale))
        assert all(bool(x.isfinite().all()) for x in grads)
        assert float(grads[1][1]) == float(grads[2][1]) == 0

    def quartic(x):  # whose derivative is inf/inf there
        return -torch.log1p(x.pow(4)).sum(-1)

    for loss in (
        reverse_kl_loss(q, quartic),
        elbo_loss(q, quartic, stablekl.MultivariateNormal(torch.zeros(1), torch.eye(1))),
        forward_kl_loss(q, quartic),
    ):
        assert all(bool(x.isfinite().all()) for x in torch.autograd.grad(loss, (loc, scale), allow_unused=True))


def test_what_is_refused():
    q = Normal(torch.zeros(2), 1.0)
    with pytest.raises(ValueError, match="samples have none: use forward_kl_loss"):
        reverse_kl_loss(q, torch.randn(5, 2))
    with pytest.raises(ValueError, match="no samples"):
        forward_kl_loss(q, torch.randn(0, 2))
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        reverse_kl_loss(q, q.log_prob, num_samples=0)
    with pytest.raises(ValueError, match="no reparameterised samples"):
        reverse_kl_loss(torch.distributions.Poisson(torch.tensor(3.0)), q.log_prob)
    with pytest.raises(ValueError, match="a grid is on a line"):
        forward_kl_loss(stablekl.MultivariateNormal(torch.zeros(2), torch.eye(2)), grid_of(two(), -9, 9, 10))


def test_functions_that_do_not_return_a_number_for_each_point():
    """A likelihood summed over everything once counted num_samples times, and a column made a matrix."""
    q = Normal(torch.tensor(0.0), 1.0)
    vector = torch.distributions.Independent(Normal(torch.zeros(1), 1.0), 1)
    data = torch.ones(16)

    def summed(z):
        return Normal(z.unsqueeze(-1), 1.0).log_prob(data).sum()

    def each(z):
        return Normal(z.unsqueeze(-1), 1.0).log_prob(data)

    column = Normal(torch.zeros(1), 1.0).log_prob
    for call in (
        lambda: elbo_loss(q, summed, Normal(0.0, 1.0)),
        lambda: elbo_loss(q, each, Normal(0.0, 1.0)),
        lambda: elbo_loss(q, summed, Normal(0.0, 1.0).log_prob),
        lambda: elbo_loss(vector, column, vector),
        lambda: reverse_kl_loss(vector, column),
        lambda: forward_kl_loss(vector, column),
    ):
        with pytest.raises(ValueError, match="one number for each point"):
            call()


def test_samples_of_another_shape_than_q():
    three = Normal(torch.zeros(3), 1.0)
    for q, shape in ((three, (3,)), (Normal(torch.tensor(0.0), 1.0), (9, 1)), (Normal(torch.zeros(1), 1.0), (9,))):
        with pytest.raises(ValueError, match="samples must have shape"):
            forward_kl_loss(q, torch.zeros(shape))
    with pytest.raises(ValueError, match="samples must have shape"):
        forward_kl_loss(torch.distributions.Independent(three, 1), torch.zeros(9, 1))
    assert forward_kl_loss(three, torch.zeros(9, 1)).shape == (3,)
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        forward_kl_loss(
            torch.distributions.Laplace(0.0, 1.0), torch.distributions.StudentT(torch.tensor(5.0)), num_samples=0
        )
    with pytest.raises(ValueError, match="the grid has 1 points"):
        forward_kl_loss(Normal(0.0, 1.0), Grid(torch.zeros(1), torch.zeros(9), 0.1))
