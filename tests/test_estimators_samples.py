"""Two sets of samples: against closed forms and slow formulas, with errors that cover, whatever the coordinates."""

from __future__ import annotations

import math

import pytest
import torch

import stablekl
from stablekl.estimators import MonteCarloEstimate, kl_from_samples
from stablekl.estimators.moments import satterthwaite
from stablekl.estimators.neighbours import kth_distances

F64 = torch.float64


def samples(n, m, d, shift=0.5, scale=1.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, dtype=F64, generator=generator) * scale + shift
    return x, torch.randn(m, d, dtype=F64, generator=generator)


def exact(d, shift=0.5, scale=1.2):
    return d * (0.5 * (scale**2 - 1) - math.log(scale) + 0.5 * shift**2)


def covered(runs, truth):
    value, error = (torch.stack([e[i] for e in runs]) for i in (0, 1))
    dof = torch.stack([torch.as_tensor(e.degrees_of_freedom, dtype=F64) for e in runs])
    low, high = MonteCarloEstimate(value, error, 0, dof).interval()
    return float(((low <= truth) & (high >= truth)).double().mean()), value, error


# --- neighbours -------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("k", [1, 4])
def test_neighbours_are_those_of_a_sorted_row(d, k, monkeypatch):
    x, y = samples(70, 90, d)
    monkeypatch.setattr("stablekl.estimators.neighbours.CHUNK", 500)
    seen = []
    found = kth_distances(x, y, k, seen.append)
    slow = (x[:, None] - y).square().sum(-1).sqrt().sort(-1).values[:, k - 1]
    torch.testing.assert_close(found, slow, rtol=1e-14, atol=0)
    assert sum(seen) == 70
    assert len(seen) > 1 or d * k == 1


@pytest.mark.parametrize("d", [1, 3])
@pytest.mark.parametrize("k", [1, 3])
def test_the_formula(d, k):
    """Written out, one sample at a time."""
    x, y = samples(60, 50, d)
    total = 0.0
    for i in range(60):
        rho = sorted(float((x[i] - x[j]).norm()) for j in range(60) if j != i)[k - 1]
        nu = sorted(float((x[i] - y[j]).norm()) for j in range(50))[k - 1]
        total += d / 60 * math.log(nu / rho)
    total += math.log(50 / 59)
    scale = torch.maximum((x - x.mean(0)).abs().amax(0), (y - x.mean(0)).abs().amax(0))
    e = kl_from_samples(x * scale, y * scale, num_neighbours=k, standardise=False)
    assert e.num_samples == 60
    assert float(e.value) == pytest.approx(total, rel=0.3), "units of the largest deviation: about the same"
    one = scale[:1] if d == 1 else None
    if one is not None:  # on a line every scale is the same
        assert float(e.value) == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize(("k", "bounds"), [(1, (0.93, 0.985)), (3, (0.91, 0.985))])
def test_the_error_of_neighbours_is_that_of_chance(k, bounds):
    """Around the estimator's own mean. Must fail: the spread of the summands, as if they shared no neighbours."""
    runs = [kl_from_samples(*samples(300, 300, 2, seed=s), num_neighbours=k) for s in range(300)]
    mean = torch.stack([e.value for e in runs]).mean()
    share, value, _ = covered(runs, mean)
    assert bounds[0] <= share <= bounds[1]
    naive = []
    for s in range(300):
        x, y = samples(300, 300, 2, seed=s)
        terms = 2 * (kth_distances(x, y, k, int) / kth_distances(x, x, k + 1, int)).log()
        naive.append(MonteCarloEstimate(terms.mean() + math.log(300 / 299), terms.std() / math.sqrt(300), 300))
    middle = torch.stack([e.value for e in naive]).mean()
    assert covered(naive, middle)[0] < 0.92
    assert float(value.std()) < 0.2


def test_the_bias_of_neighbours_is_what_the_docstring_says():
    runs = torch.stack(
        [kl_from_samples(*samples(1000, 1000, 4, 0.0, 1.3, seed=s), num_neighbours=5).value for s in range(8)]
    )
    assert float(runs.mean()) - exact(4, 0.0, 1.3) == pytest.approx(-0.35, abs=0.04)


# --- fitted Gaussians -------------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "n", "m"), [(1, 1000, 1000), (4, 300, 1000), (4, 1000, 300)])
def test_fitted_gaussians_have_no_bias_and_cover(d, n, m):
    """Must fail: the KL of the fitted Gaussians itself is too large by several errors of its mean."""
    runs = [kl_from_samples(*samples(n, m, d, seed=s), "gaussian") for s in range(1000)]
    share, value, error = covered(runs, exact(d))
    assert 0.93 <= share <= 0.97
    off = float(value.std()) / math.sqrt(1000)
    assert abs(float(value.mean()) - exact(d)) <= 4 * off
    assert float(error.square().mean().sqrt()) == pytest.approx(float(value.std()), rel=0.1)
    plug_in = []
    for s in range(1000):
        x, y = samples(n, m, d, seed=s)
        p, q = (stablekl.MultivariateNormal(z.mean(0), covariance_matrix=torch.cov(z.T).reshape(d, d)) for z in (x, y))
        plug_in.append(stablekl.kl_divergence(p, q))
    assert float(torch.stack(plug_in).mean()) - exact(d) > 4 * off or d == 1


def test_few_samples_in_many_dimensions_have_no_bias_either():
    runs = [kl_from_samples(*samples(30, 40, 8, seed=s), "gaussian") for s in range(1000)]
    value = torch.stack([e.value for e in runs])
    assert abs(float(value.mean()) - exact(8)) <= 4 * float(value.std()) / math.sqrt(1000)


def test_near_p_equal_to_q_the_error_is_on_the_wide_side():
    """Must fail: the first order alone, which vanishes there."""
    runs = [kl_from_samples(*samples(200, 200, 1, 0.0, 1.0, seed=s), "gaussian") for s in range(500)]
    share, _, _ = covered(runs, 0.0)
    assert share >= 0.97
    second = 0.25 * (2 / 200) ** 2 * 4
    first = [e._replace(standard_error=(e.standard_error.square() - second).clamp(min=0).sqrt()) for e in runs]
    assert covered(first, 0.0)[0] < 0.93


def test_the_error_by_the_fourth_moments_of_gaussians():
    """The influence function's variance in closed form, without its samples: the second way to derive it."""
    x, y = samples(200_000, 100_000, 3, 0.4, 0.8)
    p_cov, q_cov, gap = torch.cov(x.T), torch.cov(y.T), x.mean(0) - y.mean(0)
    inverse = torch.linalg.inv(q_cov)
    a = (inverse - torch.linalg.inv(p_cov)) @ p_cov
    b = torch.eye(3, dtype=F64) - inverse @ p_cov - torch.outer(inverse @ gap, gap)
    of_x = 0.5 * (a @ a).trace() + gap @ inverse @ p_cov @ inverse @ gap
    of_y = 0.5 * (b @ b).trace() + gap @ inverse @ gap
    expected = (of_x / 200_000 + of_y / 100_000).sqrt()
    e = kl_from_samples(x, y, "gaussian")
    assert float(e.standard_error) == pytest.approx(float(expected), rel=0.02)


# --- coordinates, precision, what is refused --------------------------------------------------------


@pytest.mark.parametrize("method", ["gaussian", "nearest_neighbour"])
def test_a_common_affine_map_changes_nothing(method):
    x, y = samples(400, 300, 3)
    here = kl_from_samples(x, y, method)
    for scale, offset in ((1.0, 1e6), (1e-12, 0.0), (1e12, 1e12), (torch.tensor([1e-12, 1.0, 1e12], dtype=F64), 0.0)):
        there = kl_from_samples(x * scale + offset, y * scale + offset, method)
        torch.testing.assert_close(there.value, here.value, rtol=1e-8, atol=0)
        torch.testing.assert_close(there.standard_error, here.standard_error, rtol=1e-8, atol=0)
    mixed = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 5.0], [0.0, 0.0, 1e-3]], dtype=F64)
    there = kl_from_samples(x @ mixed, y @ mixed, method)
    torch.testing.assert_close(there.value, here.value, rtol=1e-8, atol=0)


@pytest.mark.parametrize("method", ["gaussian", "nearest_neighbour"])
def test_float32_is_float64(method):
    x, y = (z.float() for z in samples(400, 300, 3))
    narrow, wide = kl_from_samples(x, y, method), kl_from_samples(x.double(), y.double(), method)
    assert narrow.value.dtype == F64
    torch.testing.assert_close(narrow.value, wide.value, rtol=1e-12, atol=0)
    line = kl_from_samples(x[:, 0], y[:, 0], method)
    assert float(line.value) == float(kl_from_samples(x[:, :1], y[:, :1], method).value)


def test_the_random_state_is_left_alone():
    before = torch.get_rng_state()
    a, b = (kl_from_samples(*samples(100, 100, 2)) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert float(a.standard_error) == float(b.standard_error)


def test_samples_without_a_density_are_refused():
    x, y = samples(100, 100, 2)
    twice = torch.cat([x, x[:3]])
    with pytest.raises(
        ValueError, match=r"x\[0\] is repeated, and 5.8% of the samples are: 1 or more of the other x equal it"
    ):
        kl_from_samples(twice, y)
    with pytest.raises(ValueError, match=r"x\[5\] is repeated, and 11.0% of the samples are: 1 or more of y"):
        kl_from_samples(x, torch.cat([y, x[5:16]]))
    assert math.isfinite(kl_from_samples(twice, y, num_neighbours=2).value)
    for method in ("gaussian", "nearest_neighbour"):
        flat = torch.cat([x, x.sum(-1, keepdim=True)], -1)
        with pytest.raises(ValueError, match="has rank 2 in 3 dimensions, from"):
            kl_from_samples(flat, torch.cat([y, y.sum(-1, keepdim=True)], -1), method)
        with pytest.raises(ValueError, match="coordinate 1 has one value"):
            kl_from_samples(x * torch.tensor([1.0, 0.0]), y * torch.tensor([1.0, 0.0]), method)
    with pytest.raises(ValueError, match="covariance of x has rank 4 in 6 dimensions, from 5 samples"):
        kl_from_samples(*samples(5, 50, 6), "gaussian")
    with pytest.raises(ValueError, match="y has 8 samples in 6 dimensions"):
        kl_from_samples(*samples(50, 8, 6), "gaussian")


def test_a_few_repeated_samples_take_later_neighbours():
    """float32 numbers on a line repeat: 0.04 % of 10,000 do, and the estimate was refused."""
    x, y = samples(10_000, 10_000, 1)
    x = x + 1
    exact, rounded = kl_from_samples(x, y), kl_from_samples(x.float(), y.float())
    assert (x.float().double().unique().numel()) < 10_000
    assert abs(float(exact.value - rounded.value)) < 0.1 * float(exact.standard_error)
    one = kl_from_samples(x[:400], torch.cat([y[:399], x[5:6]]))
    assert one.value.isfinite()


def test_what_is_needed():
    x, y = samples(40, 40, 2)
    for bad, message in (
        ((x.unsqueeze(0), y), "in rows"),
        ((x, y[:, :1]), "one space is needed"),
        ((x[:1], y), "at least 2 samples of each"),
        ((torch.where(x > 1, torch.nan, x), y), r"x\[\d+, \d\] is nan"),
        ((x, y, "histogram"), "method must be one of 'nearest_neighbour', 'gaussian', got 'histogram'"),
    ):
        with pytest.raises(ValueError, match=message):
            kl_from_samples(*bad)
    for k in (0, 3):
        with pytest.raises(ValueError, match="num_neighbours must be at least 1, and 16 samples"):
            kl_from_samples(x, y, num_neighbours=k)


def test_progress_is_a_line(capsys):
    kl_from_samples(*samples(100, 100, 2), progress=True)
    assert "1 nearest of 100 and 100" in capsys.readouterr().err


def test_satterthwaite_of_equal_variances_adds_up():
    v = torch.tensor(2.0, dtype=F64)
    assert float(satterthwaite([v, v], [torch.tensor(5.0), torch.tensor(5.0)])) == pytest.approx(10)
    zero = torch.tensor(0.0, dtype=F64)
    assert float(satterthwaite([zero, zero], [torch.tensor(5.0), torch.tensor(7.0)])) == 12
