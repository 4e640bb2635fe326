"""Means, variances and covariances of mixtures against the definition in mpmath, beside a common offset."""

from __future__ import annotations

import math

import mpmath as mp
import pytest
import torch
from torch.distributions import Categorical, Normal, Pareto
from torch.distributions import MixtureSameFamily as TorchMixture

from stablekl import GaussianMixture, MixtureSameFamily

F64 = torch.float64
T = torch.tensor


def problem(dtype, offset):
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(4, generator=g, dtype=F64).to(dtype)
    loc = (offset + torch.randn(4, generator=g, dtype=F64) * max(1.0, 20 * offset * torch.finfo(dtype).eps)).to(dtype)
    return logits, loc, (torch.rand(4, generator=g, dtype=F64) + 0.5).to(dtype)


def exact(logits, loc, scale):
    """Mean and variance."""
    with mp.workdps(60):
        w = [mp.exp(mp.mpf(v)) for v in logits.tolist()]
        w = [v / mp.fsum(w) for v in w]
        mu, sigma = [mp.mpf(v) for v in loc.tolist()], [mp.mpf(v) for v in scale.tolist()]
        mean = mp.fsum(a * b for a, b in zip(w, mu, strict=True))
        return mean, mp.fsum(a * (c * c + (b - mean) ** 2) for a, b, c in zip(w, mu, sigma, strict=True))


def errors(m, expected):
    """Of mean and variance, relative and in eps."""
    eps = torch.finfo(m.mean.dtype).eps
    with mp.workdps(60):
        return [
            abs(float((mp.mpf(float(a)) - e) / e)) / eps for a, e in zip((m.mean, m.variance), expected, strict=True)
        ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 10.0, 1e3, 1e6, 1e10])
def test_an_offset_costs_nothing(dtype, offset):
    logits, loc, scale = problem(dtype, offset)
    expected = exact(logits, loc, scale)
    m = MixtureSameFamily(Categorical(logits=logits), Normal(loc, scale))
    assert max(errors(m, expected)) < 4
    v = GaussianMixture(logits, loc=loc.unsqueeze(-1), scale_diag=scale.unsqueeze(-1))
    for value in (v.covariance_matrix[0, 0], v.variance[0]):
        torch.testing.assert_close(value, m.variance, rtol=2 * torch.finfo(dtype).eps, atol=0)
    torch.testing.assert_close(v.stddev[0], m.variance.sqrt(), rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_the_weighted_sum_of_means_loses_it():
    """Must fail: torch's own, float32 at an offset of 1e6."""
    logits, loc, scale = problem(torch.float32, 1e6)
    theirs = TorchMixture(Categorical(logits=logits), Normal(loc, scale))
    assert errors(theirs, exact(logits, loc, scale))[1] > 1000


def test_half_precision_does_not_overflow_on_the_way():
    m = MixtureSameFamily(
        Categorical(logits=T([0.0, -10.0]).half()), Normal(T([0.0, 300.0]).half(), torch.ones(2).half())
    )
    w = 1 / (1 + math.exp(10.0))
    assert float(m.variance) == pytest.approx(1 + 9e4 * w * (1 - w), rel=1e-3)


def test_infinite_moments_and_dead_components():
    pareto = MixtureSameFamily(Categorical(torch.ones(2)), Pareto(torch.ones(2), T([0.5, 3.0])))
    assert float(pareto.mean) == math.inf
    loc, scale = T([0.0, math.nan], requires_grad=True), T([1.0, 1e38], requires_grad=True)
    m = MixtureSameFamily(Categorical(probs=T([1.0, 0.0])), Normal(loc, scale, validate_args=False))
    assert (float(m.mean.detach()), float(m.variance.detach())) == (0.0, 1.0)
    for g in torch.autograd.grad(m.mean + m.variance, [loc, scale]):
        assert bool(g.isfinite().all())
        assert g[1] == 0


def test_derivatives_and_batches():
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(2, 3, generator=g, dtype=F64), torch.randn(2, 3, 2, generator=g, dtype=F64)]
    leaves = [t.requires_grad_() for t in (*leaves, torch.rand(2, 3, 2, generator=g, dtype=F64) + 0.5)]

    def f(logits, loc, scale):
        m = GaussianMixture(logits, loc=loc, scale_diag=scale, validate_args=False)
        return m.mean, m.variance, m.covariance_matrix

    assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True)
    for batched, whole in zip(torch.vmap(f)(*leaves), f(*leaves), strict=True):
        torch.testing.assert_close(batched, whole, rtol=1e-14, atol=1e-15)
