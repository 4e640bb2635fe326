"""kl_estimate: is the error what it says, do the bounds hold, are the options obeyed?

The coverage is measured on random problems that reduce to a line or a plane, where the truth is an integral of the
definition, by the sampling engine, which does not know that. Every setting is one batch; each row of a batch gets its
own number of points, as it would alone.
"""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch

import stablekl

from .mixture_references import F64, affine_map, gaussian, lines, plane

SEPARATIONS = (0.0, 0.3, 1.0, 3.0, 10.0)
WEIGHTS = ("even", "uneven", "one rare")


def tables(count: int, k: int, separation: float, weights: str, seed: int, *, wide: bool = False) -> torch.Tensor:
    """Random rows (weight, mean, standard deviation), (count, k, 3)."""
    g = torch.Generator().manual_seed(seed)

    def normal(size=k):
        return torch.randn(count, size, generator=g, dtype=F64)

    scale = torch.exp(0.5 * normal()) * (max(1.0, separation) if wide else 1.0)
    log_weights = {"even": 0.0, "uneven": 2.0, "one rare": 0.3}[weights] * normal()
    if weights == "one rare":  # down to 1e-6
        log_weights[:, 0] -= math.log(1e6) * torch.rand(count, generator=g, dtype=F64)
    return torch.stack([torch.softmax(log_weights, -1), separation * normal(), scale], -1)


def problem(count, k_p, k_q, separation, weights, dim, seed=0):
    """Distributions in ``dim`` dimensions and the truth."""
    p = tables(count, k_p, separation, weights, 2 * seed)
    q = tables(count, k_q, separation, weights, 2 * seed + 1, wide=k_q == 1)
    truth = torch.from_numpy(lines(p.numpy(), q.numpy()).astype(np.float64))
    return gaussian(p, dim, seed), gaussian(q, dim, seed), truth


def verdict(p, q, truth):
    """Shares of covered and of accurate results, the worst error over 1 + KL, and whether the bounds hold."""
    e = stablekl.kl_estimate(p, q, method="sobol")
    rounding = 1e-12 * (1 + truth)
    covered = ((e.value - truth).abs() <= e.error + rounding).double().mean()
    relative = e.error / (1 + e.value)
    bounded = bool(((e.lower <= truth + rounding) & (truth <= e.upper + rounding)).all())
    assert bool((e.lower <= e.value).all())
    assert bool((e.value <= e.upper).all())
    return float(covered), float((relative <= 1e-2).double().mean()), float(relative.max()), bounded


@pytest.mark.parametrize(("k_p", "k_q"), [(3, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize("dim", [2, 5])
def test_coverage(k_p, k_q, dim):
    covered, accurate, _, bounded = verdict(*problem(40, k_p, k_q, 2.0, "uneven", dim))
    assert covered >= 0.95
    assert accurate == 1
    assert bounded


def test_too_narrow_an_interval_is_noticed():
    """Must fail: the standard error of a mean in place of a 95 % half-width."""
    p, q, truth = problem(200, 3, 1, 2.0, "uneven", 3)
    e = stablekl.kl_estimate(p, q, method="sobol")
    narrow = e.error / 3.2  # to the standard deviation of the mean of 16 replicates: t = 2.13, widened by 1.5
    assert float(((e.value - truth).abs() <= narrow).double().mean()) < 0.9


@pytest.mark.slow
@pytest.mark.parametrize(("k_p", "k_q"), [(4, 1), (8, 1), (1, 4), (1, 8), (3, 4), (8, 8)])
@pytest.mark.parametrize("dim", [2, 3, 8])
def test_coverage_everywhere(k_p, k_q, dim):
    """At least 95 % of 200 problems in every setting, and 1e-2 (1 + KL) within the default budget."""
    for separation, weights in itertools.product(SEPARATIONS, WEIGHTS):
        count = 200
        covered, accurate, worst, bounded = verdict(*problem(count, k_p, k_q, separation, weights, dim, seed=1))
        print(
            f"\nK {k_p} || {k_q}, D {dim}, {separation:4} sd, {weights:8}: "
            f"covered {covered:.3f}, accurate {accurate:.3f}, worst {worst:.1e}",
            end="",
            flush=True,
        )
        assert bounded
        assert covered >= 0.95
        assert accurate == 1


@pytest.mark.slow
@pytest.mark.parametrize(("k_p", "k_q"), [(5, 1), (1, 5), (3, 4)])
def test_coverage_in_the_plane(k_p, k_q):
    """Full covariances in two dimensions, seen in two and in six."""
    rng = np.random.default_rng(0)
    hits = {2: 0, 6: 0}
    count = 200
    for _ in range(count):
        mixtures = []
        for k in (k_p, k_q):
            root = rng.normal(size=(k, 2, 2))
            cov = root @ root.transpose(0, 2, 1) / 2 + 0.5 * np.eye(2)
            mixtures.append((rng.dirichlet(np.ones(k)), 2 * rng.normal(size=(k, 2)), cov * (1 + 3 * (k == 1))))
        truth = plane(*mixtures, 0.25)
        for dim in hits:
            a = affine_map(dim, 0)
            pair = []
            for w, loc, cov in mixtures:
                full = torch.eye(dim, dtype=F64).repeat(len(w), 1, 1)
                full[:, :2, :2] = torch.from_numpy(cov)
                padded = torch.cat([torch.from_numpy(loc), torch.zeros(len(w), dim - 2, dtype=F64)], -1)
                full, padded = a @ full @ a.mT, padded @ a.mT
                if len(w) == 1:
                    pair.append(stablekl.MultivariateNormal(padded[0], covariance_matrix=full[0]))
                else:
                    pair.append(stablekl.GaussianMixture(probs=torch.from_numpy(w), loc=padded, covariance_matrix=full))
            e = stablekl.kl_estimate(*pair, method="sobol")
            hits[dim] += abs(float(e.value) - truth) <= float(e.error) + 1e-9
            assert float(e.lower) - 1e-9 <= truth <= float(e.upper) + 1e-9
    assert min(hits.values()) >= 0.95 * count


# ----------------------------------------------------------------------------------------- exact engines


@pytest.mark.parametrize(
    ("k_p", "k_q", "dim", "method"), [(2, 1, 4, "spectral"), (3, 2, 1, "line"), (1, 1, 3, "closed form")]
)
def test_errors_of_the_exact_engines(k_p, k_q, dim, method):
    """A bound that holds and is small; the certified interval is value +- error."""
    for separation, weights in itertools.product((0.3, 3.0), WEIGHTS):
        p, q, truth = problem(20, k_p, k_q, separation, weights, dim)
        e = stablekl.kl_estimate(p, q)
        assert e.method == method
        assert bool(((e.value - truth).abs() <= e.error + 1e-12 * (1 + truth)).all())  # the embedding rounds
        assert bool((e.error <= 1e-12 * (1 + e.upper)).all())
        assert bool((e.lower <= e.value).all() & (e.value <= e.upper).all() & (e.lower >= 0).all())
        assert bool((e.upper - e.lower <= 2.1 * e.error).all())


@pytest.mark.parametrize(("method", "k_p", "k_q", "dim"), [("sobol", 2, 1, 3), ("sobol", 2, 2, 1), ("sobol", 1, 1, 2)])
def test_engines_agree(method, k_p, k_q, dim):
    p, q, _ = problem(10, k_p, k_q, 2.0, "even", dim)
    forced, chosen = stablekl.kl_estimate(p, q, method), stablekl.kl_estimate(p, q)
    assert forced.method == method != chosen.method
    assert bool(((forced.value - chosen.value).abs() <= 2 * (forced.error + chosen.error)).all())


def test_shapes_and_dtypes():
    p, q, _ = problem(3, 3, 1, 1.0, "even", 2)
    for dtype in (torch.float32, torch.float64):
        e = stablekl.kl_estimate(p.to(dtype), q.to(dtype))
        assert all(x.shape == (3,) and x.dtype == dtype for x in e[:4])
        assert not e.error.requires_grad


def test_lower_and_upper_are_what_is_known():
    """Tighter than S - H(w) <= KL <= S against a Gaussian; the error itself where that is a bound."""
    p, q, truth = problem(10, 3, 1, 2.0, "even", 2)
    sampled, exact = stablekl.kl_estimate(p, q, method="sobol"), stablekl.kl_estimate(p, q)
    w = p.mixture_distribution.probs
    entropy = -(w * w.log()).sum(-1)
    for e in (sampled, exact):
        assert bool((e.lower <= truth + 1e-12).all())
        assert bool((truth <= e.upper + 1e-12).all())
    assert bool((sampled.upper - sampled.lower < entropy).all())
    assert float((exact.upper - exact.lower).max()) < 1e-11
    mixed = stablekl.kl_estimate(p, p.expand((10,)))
    assert torch.equal(mixed.value, torch.zeros(10, dtype=F64))
    assert torch.equal(mixed.lower, torch.zeros(10, dtype=F64))
    assert bool(mixed.upper.isfinite().all())


# ---------------------------------------------------------------------------------------------- options


def hard():
    """A problem in all its dimensions that a few points do not settle."""
    g = torch.Generator().manual_seed(4)
    loc = 3 * torch.randn(2, 4, 5, generator=g, dtype=F64)
    scale = torch.exp(torch.randn(2, 4, 5, generator=g, dtype=F64))
    return [
        stablekl.GaussianMixture(probs=torch.ones(4, dtype=F64), loc=m, scale_diag=s)
        for m, s in zip(loc, scale, strict=True)
    ]


def test_more_points_for_a_smaller_tolerance():
    p, q, truth = problem(20, 1, 3, 1.0, "even", 3)
    loose, tight = (stablekl.kl_estimate(p, q, method="sobol", rtol=r) for r in (1e-1, 1e-3))
    assert float((tight.error / (1 + tight.value)).max()) <= 1e-3
    assert float((tight.value - truth).abs().max()) < float((loose.value - truth).abs().max())


def test_the_budget_is_obeyed_and_warned_about():
    p, q = hard()
    with (
        stablekl.accuracy(rtol=1e-6, max_points=512),
        pytest.warns(stablekl.AccuracyWarning, match=r"rtol = 1e-06") as record,
    ):
        value = torch.distributions.kl_divergence(p, q)
    assert record[0].filename == __file__  # the caller's line, not stablekl's
    assert "stablekl.accuracy" in str(record[0].message)
    e = stablekl.kl_estimate(p, q, rtol=1e-6, max_points=512)
    assert torch.equal(e.value, value)


def test_the_value_is_that_of_kl_divergence():
    for k_p, k_q, dim in ((3, 1, 2), (1, 3, 2), (2, 2, 1), (2, 1, 3)):
        p, q, _ = problem(3, k_p, k_q, 1.0, "even", dim)
        value = stablekl.kl_estimate(p, q).value
        assert torch.equal(value, torch.distributions.kl_divergence(p, q))
        assert torch.equal(value, stablekl.kl_divergence(p, q))


def test_no_warning_under_vmap_or_within_the_tolerance():
    p, q = hard()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with stablekl.accuracy(rtol=1e-9):
            torch.vmap(
                lambda loc: torch.distributions.kl_divergence(
                    stablekl.MultivariateNormal(loc, scale_diag=torch.ones(5, dtype=F64)), q
                )
            )(p.component_distribution.loc)
        with stablekl.accuracy(rtol=10.0):
            torch.distributions.kl_divergence(p, q)
        a, b, _ = problem(1, 2, 1, 1.0, "even", 3)
        with stablekl.accuracy(rtol=1e-18):
            torch.distributions.kl_divergence(a, b)  # exact engines have nothing to double


def test_accuracy_nests_and_ends():
    with stablekl.accuracy(rtol=0.5) as outer:
        assert (outer.rtol, outer.max_points) == (0.5, None)
        with stablekl.accuracy(max_points=1024) as inner:
            assert (inner.rtol, inner.max_points) == (0.5, 1024)
        with pytest.raises(RuntimeError), stablekl.accuracy(rtol=0.1):
            raise RuntimeError
        with stablekl.accuracy() as same:
            assert same == outer


@pytest.mark.parametrize(("rtol", "max_points"), [(0.0, None), (-1.0, None), (math.nan, None), (None, 0), (None, 63)])
def test_senseless_options(rtol, max_points):
    p, q, _ = problem(1, 3, 1, 1.0, "even", 2)
    with pytest.raises(ValueError, match="must be"):
        stablekl.kl_estimate(p, q, rtol=rtol, max_points=max_points)
    with pytest.raises(ValueError, match="must be"), stablekl.accuracy(rtol=rtol, max_points=max_points):
        pass


def test_methods_that_do_not_apply():
    p, q, _ = problem(1, 3, 2, 1.0, "even", 2)
    for method in ("spectral", "line", "closed form"):
        with pytest.raises(ValueError, match=f"{method!r} does not apply to 3 against 2 components in 2 dimensions"):
            stablekl.kl_estimate(p, q, method)
    with pytest.raises(ValueError, match="one of 'closed form'"):
        stablekl.kl_estimate(p, q, "monte carlo")


def test_the_result_is_deterministic():
    p, q, _ = problem(3, 3, 2, 1.0, "even", 2)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = stablekl.kl_estimate(p, q)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(stablekl.kl_estimate(p, q).value, first.value)


def test_shared_mixtures_are_sampled_once(monkeypatch):
    """One mixture against many Gaussians: the information is that of one."""
    seen = []
    engine = stablekl.mixtures.engines.adaptive.sobol_information

    def spy(p, **options):
        seen.append(p.log_weights.shape)
        return engine(p, **options)

    monkeypatch.setattr(stablekl.mixtures.engines.adaptive, "sobol_information", spy)
    p = hard()[0]
    q = stablekl.MultivariateNormal(torch.zeros(50, 5, dtype=F64), scale_diag=5 * torch.ones(50, 5, dtype=F64))
    assert stablekl.kl_estimate(p, q).value.shape == (50,)
    assert set(seen) == {(1, 4)}
