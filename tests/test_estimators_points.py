"""Sobol and mirrored points, control variates, Student's intervals: they cover, and say where they end."""

from __future__ import annotations

import math
import statistics

import mpmath
import pytest
import torch
from torch.distributions import (
    Beta,
    Categorical,
    Cauchy,
    Dirichlet,
    Exponential,
    Gamma,
    Independent,
    Laplace,
    LogNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    Poisson,
    StudentT,
    Uniform,
)

import stablekl
from stablekl.distributions._base import moved
from stablekl.estimators import MonteCarloEstimate, kl_monte_carlo
from stablekl.estimators.moments import Moments, controlled
from stablekl.estimators.student_t import student_t_quantile

F64 = torch.float64
P, Q = Normal(torch.tensor(0.3, dtype=F64), 1.0), Normal(torch.tensor(-0.2, dtype=F64), 1.3)
EXACT = float(stablekl.kl_divergence(P, Q))


def f64(*values):
    return torch.tensor(values, dtype=F64)


def mixture(*batch):
    """Of two in the plane, unlike each other."""
    return stablekl.GaussianMixture(
        probs=f64(0.3, 0.7).expand(*batch, 2),
        loc=torch.tensor([[-2.0, 0.0], [1.0, 1.0]], dtype=F64).expand(*batch, 2, 2),
        scale_diag=torch.tensor([[1.0, 0.5], [0.7, 1.5]], dtype=F64).expand(*batch, 2, 2),
    )


WIDE = stablekl.MultivariateNormal(torch.zeros(2, dtype=F64), scale_diag=f64(2.0, 2.0))


def covered(e, exact, confidence=0.95):
    low, high = e.interval(confidence)
    return float(((low <= exact) & (high >= exact)).double().mean())


# --- Student's t ------------------------------------------------------------------------------------


@pytest.mark.parametrize("confidence", [0.1, 0.95, 0.9999, 1 - 1e-6])
def test_student_t_quantiles(confidence):
    dof = [1.0, 1.5, 2.0, 3.0, 15.0, 20.0, 123.4, 9999.0, 1e6]
    found = student_t_quantile(confidence, torch.tensor([dof, dof]))
    assert found.shape == (2, 9)
    for n, t in zip(dof, found[1].tolist(), strict=True):
        with mpmath.workdps(30):
            # P(|T| <= t) = 1 - I_{n/(n + t^2)}(n/2, 1/2)
            tail = mpmath.betainc(mpmath.mpf(n) / 2, 0.5, 0, n / (n + mpmath.mpf(t) ** 2), regularized=True)
            density = 2 * mpmath.gamma((n + 1) / 2) / mpmath.gamma(mpmath.mpf(n) / 2) / mpmath.sqrt(n * mpmath.pi)
            density *= (1 + mpmath.mpf(t) ** 2 / n) ** (-(mpmath.mpf(n) + 1) / 2)
            off = float((1 - tail - mpmath.mpf(confidence)) / density)
        assert abs(off) <= 1e-8 * t, (n, t, off)
    assert float(student_t_quantile(0.95, torch.tensor(math.inf))) == statistics.NormalDist().inv_cdf(0.975)


def test_an_estimate_is_value_error_and_number():
    e = MonteCarloEstimate(torch.tensor(1.0), torch.tensor(0.1), 100)
    assert e[:3] == (e.value, e.standard_error, e.num_samples)
    low, high = e.interval()
    assert float(high - low) == pytest.approx(2 * 0.1 * statistics.NormalDist().inv_cdf(0.975))


def test_merging_keeps_few_degrees_of_freedom_few():
    torch.manual_seed(0)
    a, b = (kl_monte_carlo(P, Q, 1000, points="sobol") for _ in range(2))
    both = a.merged(b)
    assert both.num_samples == a.num_samples + b.num_samples
    assert 31 <= float(both.degrees_of_freedom) <= 62
    mean_square = 0.5 * math.sqrt(float(a.standard_error**2 + b.standard_error**2))
    assert float(both.standard_error) == pytest.approx(mean_square, rel=0.01)


# --- Sobol points -----------------------------------------------------------------------------------


def sobol_runs(p, q, points, estimator="k1", replicates=32):
    runs = []
    for seed in range(1000):
        torch.manual_seed(seed)
        runs.append(
            kl_monte_carlo(p, q, points * replicates, points="sobol", num_replicates=replicates, estimator=estimator)
        )
    value, error = (torch.stack([e[i] for e in runs]) for i in (0, 1))
    return MonteCarloEstimate(value, error, runs[0].num_samples, runs[0].degrees_of_freedom)


@pytest.mark.parametrize(
    ("p", "q", "points", "estimator", "replicates"),
    [
        (P, Q, 32, "k1", 32),
        (P, Normal(f64(0.0)[0], 0.9), 256, "k3", 32),
        (mixture(), WIDE, 32, "k1", 16),
    ],
)
def test_intervals_of_sobol_points_cover(p, q, points, estimator, replicates):
    exact = float(stablekl.kl_divergence(p, q))
    e = sobol_runs(p, q, points, estimator, replicates)
    assert e.degrees_of_freedom == replicates - 1
    assert 0.93 <= covered(e, exact) <= 0.97
    assert abs(float(e.value.mean()) - exact) <= 5 * float(e.value.std()) / math.sqrt(1000)


def test_the_normal_interval_of_few_scrambles_is_too_narrow():
    """Must fail: four scrambles' spread taken for the truth."""
    e = sobol_runs(P, Q, 32, replicates=4)
    assert e.num_samples == 128
    assert covered(e, EXACT) > 0.91
    assert covered(e._replace(degrees_of_freedom=math.inf), EXACT) < 0.87


def test_sobol_points_are_better_by_far_where_the_function_is_smooth():
    torch.manual_seed(0)
    for p, q, exact, factor in (
        (P, Q, EXACT, 10),
        (mixture(), WIDE, float(stablekl.kl_divergence(mixture(), WIDE)), 5),
    ):
        plain, sobol = kl_monte_carlo(p, q, 2**14), kl_monte_carlo(p, q, 2**14, points="sobol")
        assert sobol.num_samples <= 2**15
        assert float(sobol.standard_error) < float(plain.standard_error) / factor
        assert abs(float(sobol.value) - exact) <= 5 * float(sobol.standard_error)


LAPLACES = Laplace(torch.zeros(2, 3, dtype=F64), 1.0)
FAMILIES = [
    (P, Q),
    (Independent(Normal(torch.zeros(3, dtype=F64), 1.0), 1), Independent(Laplace(torch.zeros(3, dtype=F64), 1.0), 1)),
    (MultivariateNormal(torch.zeros(2, dtype=F64), torch.tensor([[2.0, 1.0], [1.0, 1.0]], dtype=F64)), WIDE),
    (MultivariateNormal(torch.zeros(2, dtype=F64), precision_matrix=2 * torch.eye(2, dtype=F64)), WIDE),
    (
        stablekl.LowRankMultivariateNormal(torch.zeros(2, dtype=F64), torch.ones(2, 1, dtype=F64), f64(1.0, 0.5)),
        WIDE,
    ),
    (mixture(), WIDE),
    (mixture(3), WIDE),
    (Laplace(f64(0.0, 1.0), 1.0), Normal(f64(0.0, 0.0), 1.0)),
    (Independent(Laplace(torch.zeros(2, dtype=F64), 1.0), 1), Independent(Normal(torch.zeros(2, dtype=F64), 1.0), 1)),
    (Exponential(f64(1.0)), LogNormal(f64(0.0), 1.0)),
    (Uniform(f64(0.0), 1.0), Beta(f64(2.0), 1.0)),
    (MixtureSameFamily(Categorical(f64(0.5, 0.5)), Laplace(f64(0.0, 3.0), 1.0)), Normal(f64(1.5)[0], 2.0)),
    (
        MixtureSameFamily(Categorical(torch.ones(2, 3, dtype=F64)), Independent(Laplace(torch.randn(2, 3, 2), 1.0), 1)),
        Independent(Laplace(torch.zeros(2, dtype=F64), 2.0), 1),
    ),
]


@pytest.mark.parametrize(("p", "q"), FAMILIES)
def test_all_points_agree(p, q):
    """Two ways to sample of the same distribution, and its mirrored samples and controls where it has them."""
    torch.manual_seed(1)
    plain = kl_monte_carlo(p, q, 20_000)
    others = [kl_monte_carlo(p, q, 8192, points="sobol"), kl_monte_carlo(p, q, 5000, control_variates=True)]
    if isinstance(p, (Normal, MultivariateNormal, stablekl.GaussianMixture)):
        others.append(kl_monte_carlo(p, q, 5000, points="antithetic"))
        others.append(kl_monte_carlo(p, q, 5000, points="antithetic", control_variates=True))
    for other in others:
        assert other.value.shape == plain.value.shape == torch.broadcast_shapes(p.batch_shape, q.batch_shape)
        gap = (other.value - plain.value).abs()
        assert bool((gap <= 5 * (plain.standard_error**2 + other.standard_error**2).sqrt()).all())


def test_sobol_points_in_chunks_are_the_same(monkeypatch):
    results = []
    for chunk in (2**20, 300, 40):
        monkeypatch.setattr("stablekl.estimators.monte_carlo.CHUNK", chunk)
        torch.manual_seed(3)
        results.append(kl_monte_carlo(mixture(), WIDE, 4000, points="sobol"))
    for e in results[1:]:
        assert e.num_samples == results[0].num_samples
        torch.testing.assert_close(e.value, results[0].value, rtol=1e-13, atol=0)
        torch.testing.assert_close(e.standard_error, results[0].standard_error, rtol=1e-8, atol=0)


def test_sobol_points_to_a_standard_error():
    torch.manual_seed(4)
    e = kl_monte_carlo(P, Q, 256, points="sobol", target_standard_error=1e-4)
    assert float(e.standard_error) <= 1e-4
    assert abs(float(e.value) - EXACT) <= 5e-4
    assert e.num_samples in [256 * 2**i for i in range(1, 12)]  # 8 points in each of 32
    stopped = kl_monte_carlo(P, Q, 256, points="sobol", target_standard_error=1e-9, max_samples=3000)
    assert stopped.num_samples == 2048


def test_what_has_no_sobol_points():
    p = Dirichlet(torch.ones(3))
    with pytest.raises(ValueError, match="Dirichlet with events of shape"):
        kl_monte_carlo(p, Dirichlet(torch.full((3,), 2.0)), points="sobol")
    with pytest.raises(ValueError, match="Poisson with events"):
        kl_monte_carlo(Poisson(torch.tensor(2.0)), Poisson(torch.tensor(3.0)), points="sobol")
    with pytest.raises(ValueError, match="stratified=True"):
        kl_monte_carlo(mixture(), WIDE, points="sobol", stratified=False)
    many = Independent(Normal(torch.zeros(21202), 1.0), 1)
    with pytest.raises(ValueError, match="up to 21201 dimensions"):
        kl_monte_carlo(many, many, 32, points="sobol")
    with pytest.raises(ValueError, match="num_replicates scrambles, at least 2"):
        kl_monte_carlo(P, Q, points="sobol", num_replicates=1)
    with pytest.raises(ValueError, match="points must be one of 'random', 'antithetic', 'sobol', got 'halton'"):
        kl_monte_carlo(P, Q, points="halton")


# --- mirrored samples and control variates ----------------------------------------------------------


def target():
    """A mixture on the line: what no polynomial explains."""
    return stablekl.GaussianMixture(
        probs=f64(0.5, 0.5), loc=f64(-1.0, 1.5).unsqueeze(-1), scale_diag=f64(0.8, 1.2).unsqueeze(-1)
    )


LINE = stablekl.MultivariateNormal(f64(0.2), scale_diag=f64(1.0))
NARROW = stablekl.MultivariateNormal(f64(0.3), scale_diag=f64(0.9))


@pytest.mark.parametrize("points", ["random", "antithetic"])
@pytest.mark.parametrize("controls", [False, True])
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_intervals_cover(points, controls, estimator):
    torch.manual_seed(5)
    p, q = LINE.expand((1000,)), target() if estimator == "k1" else NARROW
    exact = float(stablekl.kl_divergence(LINE, q))
    e = kl_monte_carlo(p, q, 4000, points=points, control_variates=controls, estimator=estimator)
    assert 0.93 <= covered(e, exact) <= 0.97
    assert abs(float(e.value.mean()) - exact) <= 5 * float(e.value.std()) / math.sqrt(1000)


@pytest.mark.parametrize("points", ["random", "antithetic"])
def test_intervals_of_mixtures_cover(points):
    torch.manual_seed(6)
    exact = float(stablekl.kl_divergence(mixture(), WIDE))
    spread = []
    for controls in (False, True):
        e = kl_monte_carlo(mixture(1000), WIDE, 4000, points=points, control_variates=controls)
        assert 0.93 <= covered(e, exact) <= 0.97
        spread.append(float(e.value.std()))
    assert spread[1] < 0.7 * spread[0]


def test_intervals_of_runs_to_a_standard_error_cover():
    torch.manual_seed(7)
    runs = [kl_monte_carlo(P, Q, 300, target_standard_error=0.012) for _ in range(1000)]
    value, error = (torch.stack([e[i] for e in runs]) for i in (0, 1))
    assert bool((error <= 0.012).all())
    assert 0.93 <= covered(MonteCarloEstimate(value, error, 0), EXACT) <= 0.97


def test_controls_of_other_families_cover():
    torch.manual_seed(8)
    p, q = Gamma(f64(3.0).expand(1000), 2.0), Gamma(f64(2.0).expand(1000), 1.5)
    exact = float(stablekl.kl_divergence(p, q)[0])
    plain, controlled = (kl_monte_carlo(p, q, 500, control_variates=c) for c in (False, True))
    assert 0.93 <= covered(controlled, exact) <= 0.97
    assert float(controlled.value.std()) < 0.6 * float(plain.value.std())


def test_coefficients_of_other_samples_leave_honest_residuals():
    """Must fail: residuals of the samples that the coefficients were fitted to."""
    torch.manual_seed(9)
    n, controls = 40, 8
    c = torch.randn(n, 2000, controls, dtype=F64)
    f = 3.0 + c @ torch.arange(1.0, controls + 1, dtype=F64) + torch.randn(n, 2000, dtype=F64)
    both = torch.cat([f.unsqueeze(-1), c], -1)
    value, variance, dof = controlled([Moments.of(x) for x in both.chunk(4)])
    assert 0.93 <= covered(MonteCarloEstimate(value, variance.sqrt(), n, dof), 3.0) <= 0.97
    whole = Moments.of(both)
    beta = whole.coefficients()
    fitted = whole.mean[..., 0] - (beta * whole.mean[..., 1:]).sum(-1)
    naive = (f - (c * beta).sum(-1)).var(0).div(n).sqrt()
    assert covered(MonteCarloEstimate(fitted, naive, n, n - 1.0), 3.0) < 0.91


def test_controls_explain_gaussians_and_are_never_worse():
    torch.manual_seed(10)
    p = MultivariateNormal(torch.zeros(3, dtype=F64), torch.eye(3, dtype=F64) + 0.5)
    q = MultivariateNormal(torch.ones(3, dtype=F64), torch.eye(3, dtype=F64) * 2 + 0.1)
    e = kl_monte_carlo(p, q, 1000, control_variates=True)
    assert float(e.value) == pytest.approx(float(stablekl.kl_divergence(p, q)), rel=1e-10)
    assert 0 < float(e.standard_error) < 1e-6, "the rounding of a difference is not 0"
    # a constant log-ratio, and one that the controls have nothing to do with
    same = kl_monte_carlo(P, P, 1000, control_variates=True)
    assert float(same.value) == float(same.standard_error) == 0.0
    p, q = (
        Uniform(f64(0.0).expand(1000), 1.0),
        stablekl.MixtureSameFamily(
            Categorical(probs=torch.ones(2, dtype=F64)), Uniform(f64(0.0, 0.45), f64(1.0, 0.55))
        ),
    )
    plain, controlled = (kl_monte_carlo(p, q, 200, control_variates=c) for c in (False, True))
    assert float(controlled.value.std()) < 1.1 * float(plain.value.std())


def test_collinear_controls_are_shared():
    """The square of a coin is the coin."""
    torch.manual_seed(11)
    p, q = (torch.distributions.Bernoulli(torch.tensor(x, dtype=F64)) for x in (0.3, 0.6))
    e = kl_monte_carlo(p, q, 200, control_variates=True)
    assert float(e.value) == pytest.approx(float(stablekl.kl_divergence(p, q)), rel=1e-9)


def test_more_dimensions_take_fewer_kinds_of_controls():
    torch.manual_seed(12)
    errors = []
    for d in (8, 20, 60):
        p = Independent(Normal(torch.zeros(d, dtype=F64), 1.0), 1)
        q = Independent(Normal(torch.full((d,), 0.3, dtype=F64), 1.0), 1)
        e = kl_monte_carlo(p, q, 4000, control_variates=True)
        errors.append(float(e.standard_error))
        assert abs(float(e.value) - 0.045 * d) < 1e-6
    p = Independent(Normal(torch.zeros(65), 1.0), 1)
    with pytest.raises(ValueError, match="64 coordinates at most"):
        kl_monte_carlo(p, p, control_variates=True)
    many = Independent(Normal(torch.zeros(30_000, 30), 1.0), 1)
    with pytest.raises(ValueError, match="there are 30000 problems"):
        kl_monte_carlo(many, many, control_variates=True)
    with pytest.raises(ValueError, match="smallest part has 60 samples"):
        kl_monte_carlo(mixture(), WIDE, 200, control_variates=True)


def test_what_has_no_controls():
    for p in (Cauchy(torch.tensor(0.0), 1.0), StudentT(torch.tensor(1.5))):
        with pytest.raises(ValueError, match="infinite, 0, or not implemented"):
            kl_monte_carlo(p, Cauchy(0.0, 1.0), control_variates=True)
    with pytest.raises(ValueError, match="by themselves"):
        kl_monte_carlo(P, Q, points="sobol", control_variates=True)


def test_mirrored_samples_of_mixtures_are_mirrored_in_their_component():
    torch.manual_seed(13)
    exact = float(stablekl.kl_divergence(mixture(), WIDE))
    e = kl_monte_carlo(mixture(), WIDE, 20_000, points="antithetic")
    assert abs(float(e.value) - exact) <= 5 * float(e.standard_error)
    with pytest.raises(ValueError, match="mirrored at the mean"):
        kl_monte_carlo(mixture(), WIDE, points="antithetic", stratified=False)


# --- precision, random state, what is impossible ----------------------------------------------------


@pytest.mark.parametrize(("p", "q"), FAMILIES)
@pytest.mark.parametrize("kwargs", [{}, {"points": "sobol"}, {"control_variates": True}])
def test_float32_is_float64(p, q, kwargs):
    """The same numbers in float32: the same samples, within 1e-5."""
    results = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(14)
        pair = (moved(moved(x, torch.float32), dtype) for x in (p, q))
        results.append(kl_monte_carlo(*pair, 4000, **kwargs).value)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", [Normal, Laplace])
@pytest.mark.parametrize("kwargs", [{}, {"points": "sobol"}, {"control_variates": True}, {"estimator": "k3"}])
def test_float32_of_torch_is_float64(family, kwargs):
    results = []
    for dtype in (torch.float32, torch.float64):
        loc, other = (torch.tensor([x, 1e3 + x], dtype=torch.float32).to(dtype) for x in (0.1, 0.2))
        scale = torch.tensor([1.1, 0.1], dtype=torch.float32).to(dtype)
        torch.manual_seed(15)
        results.append(kl_monte_carlo(family(loc, scale), family(other, scale), 2000, **kwargs).value)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


def test_the_random_state_advances_by_one_number():
    states = []
    for n in (100, 100_000):
        torch.manual_seed(16)
        kl_monte_carlo(P, Q, n)
        states.append(torch.get_rng_state())
    torch.manual_seed(16)
    torch.randint(2**62, (), dtype=torch.int64)
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], torch.get_rng_state())
    first, second = kl_monte_carlo(P, Q, 100).value, kl_monte_carlo(P, Q, 100).value
    assert first != second


def test_impossible_log_ratios_are_named():
    class Gap(Normal):
        def log_prob(self, value):
            return torch.where(value > 2, math.nan, super().log_prob(value))

    q = Normal(torch.zeros(3), 1.0)
    with pytest.raises(ValueError, match=r"log p\(x\) - log q\(x\) is nan at sample \d+ of batch element \[\d\]"):
        kl_monte_carlo(q, Gap(torch.zeros(3), 1.0), 5000)
    with pytest.raises(ValueError, match=r"is -inf at sample 0, one of 1 numbers from"):
        kl_monte_carlo(_Lost(0.0, 1.0), Laplace(0.0, 1.0), 10)


class _Lost(Laplace):
    def log_prob(self, value):
        return torch.full_like(value, -math.inf)


def test_infinite_is_an_answer(monkeypatch):
    monkeypatch.setattr("stablekl.estimators.monte_carlo.CHUNK", 50)
    torch.manual_seed(17)
    p, q = Normal(0.0, 1.0), Uniform(torch.tensor(-1.0), 1.0, validate_args=False)
    for kwargs in ({}, {"points": "sobol"}, {"control_variates": True}, {"target_standard_error": 0.1}):
        e = kl_monte_carlo(p, q, 1000, **kwargs)
        assert float(e.value) == math.inf
        assert math.isnan(float(e.standard_error))


def test_a_line_of_progress(capsys):
    kl_monte_carlo(P, Q, 1000, target_standard_error=0.01, progress=True)
    err = capsys.readouterr().err
    assert "kl_monte_carlo [" in err
    assert err.endswith("\n")
    kl_monte_carlo(P, Q, 1000, target_standard_error=0.01, progress=False)
    assert capsys.readouterr().err == ""
