"""Merging components: the costs against mpmath, the bound against the divergence, what is preserved."""

from __future__ import annotations

import itertools
import math

import mpmath as mp
import pytest
import torch
from torch.distributions import Categorical, Independent, LowRankMultivariateNormal, Normal

import stablekl
from stablekl import GaussianMixture, MixtureSameFamily
from stablekl.mixtures.reduction import _costs, _State

from .mixture_references import lines

F64 = torch.float64
EPS = torch.finfo(F64).eps


def random_mixture(k: int, d: int, seed: int = 0, batch: tuple[int, ...] = ()) -> GaussianMixture:
    g = torch.Generator().manual_seed(seed)
    tril = 0.5 * torch.randn(*batch, k, d, d, generator=g, dtype=F64).tril(-1)
    tril = tril + torch.diag_embed(torch.rand(*batch, k, d, generator=g, dtype=F64) + 0.3)
    loc = 2 * torch.randn(*batch, k, d, generator=g, dtype=F64)
    return GaussianMixture(probs=torch.rand(*batch, k, generator=g, dtype=F64) + 0.1, loc=loc, scale_tril=tril)


def parts(m: MixtureSameFamily) -> tuple[list[mp.mpf], list[mp.matrix], list[mp.matrix]]:
    c = m.component_distribution
    w = [mp.exp(mp.mpf(x)) for x in m.log_weights.tolist()]
    trils = [mp.matrix(x) for x in c.scale_tril.tolist()]
    return [x / sum(w) for x in w], [mp.matrix(x) for x in c.loc.tolist()], [x * x.T for x in trils]


def merge(a, b):
    """Weight, mean and covariance of two, in mpmath, from the definition."""
    w = a[0] + b[0]
    mean = (a[0] * a[1] + b[0] * b[1]) / w
    total = sum((x[0] / w * (x[2] + (x[1] - mean) * (x[1] - mean).T) for x in (a, b)), mp.zeros(mean.rows))
    return w, mean, total


def runnalls(a, b) -> mp.mpf:
    """B(i, j) as it is in the paper: log-determinants."""
    w, _, total = merge(a, b)
    return (w * mp.log(mp.det(total)) - a[0] * mp.log(mp.det(a[2])) - b[0] * mp.log(mp.det(b[2]))) / 2


@pytest.mark.parametrize("distance", [1.0, 1e-3, 1e-6])
def test_costs(distance):
    """Two components near each other; must fail: the paper's log-determinants in float64."""
    d = 3
    m = random_mixture(2, d, 1)
    c = m.component_distribution
    loc = c.loc[:1] + torch.stack([torch.zeros(d, dtype=F64), distance * c.loc[1]])
    tril = c.scale_tril[:1] + torch.stack([torch.zeros(d, d, dtype=F64), distance * 0.1 * c.scale_tril[1]])
    state = _State(m.log_weights[None], loc[None], tril[None])
    first, second = (_State(*(x[:, i : i + 1] for x in state)) for i in (0, 1))
    cost = _costs(first, second).item()
    with mp.workdps(60):
        w = [mp.exp(mp.mpf(x)) for x in m.log_weights.tolist()]
        trils = [mp.matrix(x) for x in tril.tolist()]
        truth = runnalls(*((w[i], mp.matrix(loc[i].tolist()), trils[i] * trils[i].T) for i in (0, 1)))
        assert abs(cost / truth - 1) < 64 * EPS / distance
    weights, covariance = m.log_weights.exp(), tril @ tril.mT
    naive = 0.5 * (
        GaussianMixture(probs=weights, loc=loc, scale_tril=tril).covariance_matrix.logdet()
        - (weights * covariance.logdet()).sum()
    )
    assert (abs(float(naive / float(truth)) - 1) > 1e-5) == (distance < 1e-4)


@pytest.mark.parametrize("k_left", [1, 2, 4])
def test_greedy_choice_bound_and_moments(k_left):
    """Every choice as mpmath makes it, the bound equal to the sum of the costs, the moments kept."""
    m = random_mixture(6, 2, 3)
    result = m.reduce(k_left)
    with mp.workdps(40):
        w, means, squares = parts(m)
        left = list(zip(w, means, squares, strict=True))
        total = mp.mpf(0)
        while len(left) > k_left:
            i, j = min(itertools.combinations(range(len(left)), 2), key=lambda ij: runnalls(left[ij[0]], left[ij[1]]))
            total += runnalls(left[i], left[j])
            left[i] = merge(left[i], left[j])
            del left[j]
        assert result.kl_bound.item() == pytest.approx(float(total), rel=1e-14)
        for (a, b, c), x, y, z in zip(left, *parts(result.mixture), strict=True):
            assert abs(a - x) < 8 * EPS
            assert max(abs(v) for v in b - y) < 16 * EPS
            assert max(abs(v) for v in c - z) < 64 * EPS
    torch.testing.assert_close(result.mixture.mean, m.mean, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(result.mixture.covariance_matrix, m.covariance_matrix, rtol=1e-14, atol=1e-14)


def test_the_bound_holds():
    """KL(m || reduced) by integration over the line, for each number of components."""
    g, k = torch.Generator().manual_seed(0), 5
    for _ in range(3):
        w, u, scale = (torch.rand(k, generator=g, dtype=F64) + 0.1 for _ in range(3))
        loc = 9 * u
        m = MixtureSameFamily(Categorical(w), Normal(loc, scale))
        given = torch.stack([w, loc, scale], -1).numpy()
        for left in range(1, k):
            mixture, bound = m.reduce(left)
            c = mixture.component_distribution
            assert isinstance(c, Normal)
            table = torch.stack([mixture.log_weights.exp(), c.loc, c.scale], -1).numpy()
            assert 0 <= float(lines(given[None], table[None])[0]) <= float(bound)


def test_components_without_weight_go_first_and_cost_nothing():
    m = random_mixture(3, 2, 5)
    c = m.component_distribution
    order = [0, 1, 0, 2, 1]  # the dead ones have parameters of their own
    loc = c.loc[order] + torch.tensor([0.0, 9.0, 9.0, 0.0, 0.0], dtype=F64)[:, None]
    w = torch.tensor([0.5, 0.0, 0.0, 0.2, 0.3], dtype=F64).requires_grad_()
    big = GaussianMixture(probs=w, loc=loc.requires_grad_(), scale_tril=c.scale_tril[order])
    mixture, bound = big.reduce(3)
    assert bound.item() == 0
    torch.testing.assert_close(mixture.log_weights.exp(), w[[0, 3, 4]], rtol=1e-15, atol=0)
    assert torch.equal(mixture.component_distribution.loc, loc[[0, 3, 4]])
    assert torch.equal(mixture.component_distribution.scale_tril, c.scale_tril[[0, 2, 1]])
    mixture, bound = big.reduce(1)
    torch.testing.assert_close(mixture.covariance_matrix, big.covariance_matrix)
    g_w, g_loc = torch.autograd.grad(mixture.log_prob(loc[0].detach()) + bound, [w, loc])
    assert bool(g_w.isfinite().all())
    assert bool(g_loc[[0, 3, 4]].all())
    assert float(g_loc[[1, 2]].abs().max()) == 0
    # equal components: nothing but rounding
    twice = GaussianMixture(
        probs=torch.ones(6, dtype=F64), loc=c.loc.repeat(2, 1), scale_tril=c.scale_tril.repeat(2, 1, 1)
    )
    mixture, bound = twice.reduce(3)
    assert 0 <= bound.item() < 1e-29
    torch.testing.assert_close(mixture.component_distribution.loc, c.loc, rtol=1e-15, atol=0)


def test_batches_are_reduced_one_by_one():
    m = random_mixture(5, 2, 7, (3, 2))
    mixture, bound = m.reduce(2)
    assert (mixture.batch_shape, bound.shape) == ((3, 2), (3, 2))
    c = m.component_distribution
    for i, j in itertools.product(range(3), range(2)):
        single = GaussianMixture(logits=m.log_weights[i, j], loc=c.loc[i, j], scale_tril=c.scale_tril[i, j])
        alone, its_bound = single.reduce(2)
        torch.testing.assert_close(bound[i, j], its_bound)
        torch.testing.assert_close(mixture.log_weights[i, j], alone.log_weights)
        torch.testing.assert_close(mixture.component_distribution.loc[i, j], alone.component_distribution.loc)


def test_parameterisations_agree():
    m = random_mixture(4, 3, 9)
    c = m.component_distribution
    covariances = GaussianMixture(logits=m.log_weights, loc=c.loc, covariance_matrix=c.covariance_matrix)
    precisions = MixtureSameFamily(
        Categorical(logits=m.log_weights), stablekl.MultivariateNormal(c.loc, precision_matrix=c.precision_matrix)
    )
    for other in (covariances, precisions):
        torch.testing.assert_close(other.reduce(2).kl_bound, m.reduce(2).kl_bound)
        assert type(other.reduce(2).mixture) is type(other)
    scales, w = c.stddev, torch.rand(4, 3, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    diagonal = GaussianMixture(logits=m.log_weights, loc=c.loc, scale_diag=scales)
    independent = MixtureSameFamily(Categorical(logits=m.log_weights), Independent(Normal(c.loc, scales), 1))
    assert torch.equal(independent.reduce(2).kl_bound, diagonal.reduce(2).kl_bound)
    low_rank = MixtureSameFamily(Categorical(logits=m.log_weights), LowRankMultivariateNormal(c.loc, w, scales))
    dense = GaussianMixture(logits=m.log_weights, loc=c.loc, covariance_matrix=w @ w.mT + torch.diag_embed(scales))
    torch.testing.assert_close(low_rank.reduce(1).kl_bound, dense.reduce(1).kl_bound)


def test_derivatives_and_transforms():
    m = random_mixture(3, 1, 11)
    c = m.component_distribution
    leaves = [x.clone().requires_grad_() for x in (m.log_weights, c.loc, c.scale_tril)]
    x = torch.zeros(1, dtype=F64)

    def f(logits, loc, tril):
        small = GaussianMixture(logits=logits, loc=loc, scale_tril=tril.tril(), validate_args=False).reduce(2)
        return small.kl_bound, small.mixture.log_prob(x)

    assert torch.autograd.gradcheck(f, leaves)
    plain = [t.detach() for t in leaves]
    stacked = [torch.stack([t, t + 0.1 * t.abs()]) for t in plain]
    for got, *rows in zip(torch.vmap(f)(*stacked), *(f(*(t[i] for t in stacked)) for i in (0, 1)), strict=True):
        torch.testing.assert_close(got, torch.stack(rows))


def test_arguments():
    m = random_mixture(3, 2)
    mixture, bound = m.reduce(3)
    assert mixture is m
    assert bound.item() == 0
    for bad in (0, 4, -1):
        with pytest.raises(ValueError, match=f"between 1 and 3.* got {bad}"):
            m.reduce(bad)
    gamma = MixtureSameFamily(Categorical(torch.ones(2)), torch.distributions.Gamma(torch.ones(2), torch.ones(2)))
    with pytest.raises(NotImplementedError, match="reduce is not available for mixtures of Gamma"):
        gamma.reduce(1)
    half = GaussianMixture(
        probs=torch.ones(3).half(), loc=m.component_distribution.loc.half(), scale_diag=torch.ones(3, 2).half()
    )
    assert half.reduce(2).kl_bound.dtype == half.reduce(2).mixture.mean.dtype == torch.float16
    assert math.isfinite(float(half.reduce(1).kl_bound))
