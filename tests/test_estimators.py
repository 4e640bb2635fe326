"""Monte Carlo estimates: right in the mean, honest about their error, the same in parts; and misuse is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Independent, Laplace, Normal, StudentT

import stablekl
from stablekl.estimators import kl_from_log_ratio, kl_monte_carlo

F64 = torch.float64
P, Q = Normal(torch.tensor(0.3, dtype=F64), 1.0), Normal(torch.tensor(-0.2, dtype=F64), 1.3)
EXACT = float(stablekl.kl_divergence(P, Q))


def coverage(estimator, scale):
    """Of 1,000 runs at once, as a batch."""
    torch.manual_seed(0)
    q = Normal(torch.tensor(-0.2, dtype=F64), scale)
    exact = float(stablekl.kl_divergence(P, q))
    e = kl_monte_carlo(P.expand((1000,)), q.expand((1000,)), 2000, estimator=estimator)
    low, high = e.interval()
    assert abs(float(e.value.mean()) - exact) <= 5 * float(e.standard_error.mean()) / math.sqrt(1000)
    return float(((low <= exact) & (high >= exact)).double().mean())


@pytest.mark.parametrize(("estimator", "scale"), [("k1", 1.3), ("k1", 0.8), ("k3", 0.9)])
def test_intervals_cover(estimator, scale):
    assert 0.93 <= coverage(estimator, scale) <= 0.97


def test_k3_must_not_be_trusted_where_q_is_wider():
    """Must fail: the few samples that matter most are not among 2,000."""
    assert coverage("k3", 1.3) < 0.9


def test_intervals_of_stratified_samples_cover():
    torch.manual_seed(1)
    m = stablekl.GaussianMixture(
        probs=torch.tensor([0.05, 0.95], dtype=F64).expand(1000, 2),
        loc=torch.tensor([[-4.0], [2.0]], dtype=F64).expand(1000, 2, 1),
        scale_diag=torch.tensor([[1.0], [0.5]], dtype=F64).expand(1000, 2, 1),
    )
    q = stablekl.MultivariateNormal(torch.zeros(1, dtype=F64), scale_diag=torch.full((1,), 2.0, dtype=F64))
    exact = float(stablekl.kl_divergence(m, q)[0])
    spread = []
    for stratified in (True, False):
        e = kl_monte_carlo(m, q, 1000, stratified=stratified)
        low, high = e.interval()
        assert 0.93 <= float(((low <= exact) & (high >= exact)).double().mean()) <= 0.97
        spread.append(float(e.value.std()))
    assert spread[0] < 0.9 * spread[1], "none of the variance is the choice's"


def test_k2_is_biased_and_k3_is_not():
    torch.manual_seed(2)
    p, q = Normal(torch.tensor(0.0, dtype=F64), 1.0), Normal(torch.tensor(1.0, dtype=F64), 1.0)
    for estimator, truth in (("k1", 0.5), ("k3", 0.5), ("k2", 0.625)):
        e = kl_monte_carlo(p, q, 200_000, estimator=estimator)
        assert abs(float(e.value) - truth) <= 5 * float(e.standard_error)


def test_parts_are_the_whole():
    torch.manual_seed(3)
    x = P.sample((10_001, 3))
    ratio = P.log_prob(x) - Q.log_prob(x)
    whole = kl_from_log_ratio(ratio)
    parts = (
        kl_from_log_ratio(ratio[:17]).merged(kl_from_log_ratio(ratio[17:4000])).merged(kl_from_log_ratio(ratio[4000:]))
    )
    assert parts.num_samples == whole.num_samples == 10_001
    torch.testing.assert_close(parts.value, whole.value, rtol=1e-13, atol=0)
    torch.testing.assert_close(parts.standard_error, whole.standard_error, rtol=1e-12, atol=0)
    far = kl_from_log_ratio(ratio + 1e6)
    torch.testing.assert_close(far.standard_error, whole.standard_error, rtol=1e-8, atol=0)


def test_memory_is_bounded_and_the_result_is_not_changed_by_it(monkeypatch):
    torch.manual_seed(4)
    whole = kl_monte_carlo(P, Q, 5000)
    monkeypatch.setattr("stablekl.estimators.monte_carlo.CHUNK", 100)
    torch.manual_seed(4)
    parts = kl_monte_carlo(P, Q, 5000)
    assert parts.num_samples == 5000
    assert abs(float(parts.value - whole.value)) <= 6 * float(whole.standard_error)
    assert float(parts.standard_error) == pytest.approx(float(whole.standard_error), rel=0.1)


def test_until_the_standard_error_is_small_enough():
    torch.manual_seed(5)
    e = kl_monte_carlo(P, Q, 1000, target_standard_error=2e-3)
    assert float(e.standard_error) <= 2e-3
    assert e.num_samples > 10_000
    stopped = kl_monte_carlo(P, Q, 1000, target_standard_error=1e-9, max_samples=3000)
    assert stopped.num_samples == 3000


def test_mirrored_samples():
    torch.manual_seed(6)
    p, q = Normal(torch.tensor(0.0, dtype=F64), 1.0), Normal(torch.tensor(3.0, dtype=F64), 1.0)
    plain, mirrored = kl_monte_carlo(p, q, 1000), kl_monte_carlo(p, q, 1000, points="antithetic")
    assert float(plain.standard_error) > 0.05
    assert float(mirrored.standard_error) < 1e-12, "the log-ratio is linear"
    assert float(mirrored.value) == pytest.approx(4.5)
    with pytest.raises(ValueError, match="mirrored at the mean"):
        kl_monte_carlo(Laplace(0.0, 1.0), q, points="antithetic")


def test_batches_broadcast():
    torch.manual_seed(7)
    p = Independent(Normal(torch.zeros(4, 1, 3), torch.ones(4, 1, 3)), 1)
    q = stablekl.MultivariateNormal(torch.zeros(5, 3), scale_diag=torch.ones(5, 3))
    e = kl_monte_carlo(p, q, 100)
    assert e.value.shape == e.standard_error.shape == (4, 5)
    e = kl_monte_carlo(StudentT(torch.tensor(5.0)), Laplace(torch.zeros(3), 1.0), 100, estimator="k3")
    assert e.value.shape == (3,)
    assert bool((e.value >= 0).all())


def test_the_usual_mistakes_are_refused():
    """Samples of q, the other sign; and weighting by p again, which no test can see, is in the docstring."""
    torch.manual_seed(8)
    p, q = Normal(0.0, 1.0), Normal(2.0, 1.0)
    x = p.sample((1000,))
    with pytest.raises(ValueError, match="KL is never negative"):
        kl_from_log_ratio(q.log_prob(x) - p.log_prob(x))
    y = q.sample((1000, 2))
    with pytest.raises(ValueError, match=r"of batch element \[0\]"):
        kl_from_log_ratio(p.log_prob(y) - q.log_prob(y), "k3")
    kl_from_log_ratio(1e-3 * torch.randn(100))  # about 0: noise may be negative


def test_what_is_needed():
    ratio = torch.tensor([0.1, math.nan, 0.3])
    with pytest.raises(ValueError, match=r"log_ratio\[1\] is NaN"):
        kl_from_log_ratio(ratio)
    assert kl_from_log_ratio(ratio, mask=torch.tensor([True, False, True])).num_samples == 2
    for bad, message in ((ratio[:1], "at least 2 samples"), (torch.tensor(1.0), "at least 2 samples")):
        with pytest.raises(ValueError, match=message):
            kl_from_log_ratio(bad)
    with pytest.raises(ValueError, match="mask must be boolean"):
        kl_from_log_ratio(ratio, mask=torch.ones(3))
    with pytest.raises(ValueError, match="estimator must be one of"):
        kl_monte_carlo(P, Q, estimator="k4")
    with pytest.raises(ValueError, match="at least 2 samples"):
        kl_monte_carlo(P, Q, 1)
    with pytest.raises(ValueError, match="must be positive"):
        kl_monte_carlo(P, Q, target_standard_error=0.0)
    with pytest.raises(ValueError, match="do not broadcast"):
        kl_monte_carlo(P.expand((2,)), Q.expand((3,)))
    with pytest.raises(ValueError, match="confidence must be between"):
        kl_monte_carlo(P, Q, 10).interval(1.0)
    impossible = kl_from_log_ratio(torch.tensor([0.1, math.inf]))
    assert float(impossible.value) == math.inf


def test_distributions_over_different_spaces():
    """A RuntimeError about the sizes of tensors, before."""
    vector = torch.distributions.MultivariateNormal(torch.zeros(1), torch.eye(1))
    for p, q in ((vector, Normal(torch.zeros(1), 1.0)), (Normal(torch.zeros(1), 1.0), vector)):
        with pytest.raises(ValueError, match="over the same space"):
            kl_monte_carlo(p, q)


def test_the_rounding_of_a_constant_is_not_a_wrong_sign():
    """The same Gaussian from two classes, float32: log-ratios of -1e-6 with a spread of 1e-6 were refused."""
    torch.manual_seed(3)
    loc, scale = torch.randn(19), torch.rand(19) + 0.2
    p = torch.distributions.Independent(Normal(loc, scale), 1)
    q = torch.distributions.MultivariateNormal(loc, torch.diag(scale * scale))
    x = p.sample((20_000,))
    for d in (p.log_prob(x) - q.log_prob(x), q.log_prob(x) - p.log_prob(x), torch.full((9,), -1e-6)):
        assert abs(float(kl_from_log_ratio(d).value)) < 1e-5
    with pytest.raises(ValueError, match="KL is never negative"):
        kl_from_log_ratio(torch.full((9,), -1e-3))
