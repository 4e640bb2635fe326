"""Fits of Gaussian mixtures: as likely as scikit-learn's, the same in any units, and never NaN."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture as SklearnMixture
from torch.utils.data import DataLoader, TensorDataset

import stablekl
from stablekl.data import load_iris
from stablekl.fit import FitWarning, GaussianMixtureModel, gaussian_mixture, select
from stablekl.fit._model import Model
from stablekl.fit._squares import collect_squares, squares_are_safe
from stablekl.fit._steps import collect, maximised

from .sklearn_fits import precisions

F64 = torch.float64
KINDS = ("full", "tied", "diag", "spherical")
IRIS = load_iris()[0]


def clusters(n=2000, seed=1, dtype=F64):
    """Three, in three dimensions, one of them behind another."""
    g = torch.Generator().manual_seed(seed)
    loc = torch.tensor([[0.0, 0, 0], [4, 0, 1], [0, 5, -2]], dtype=F64)
    first, second = [[1, 0, 0], [0.5, 0.7, 0], [0, 0.2, 0.4]], [[0.3, 0, 0], [0, 1, 0], [0.5, 0.2, 0.9]]
    tril = torch.tensor([first, second, [[2, 0, 0], [1, 0.5, 0], [0.3, 0.2, 0.2]]], dtype=F64)
    label = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), n, replacement=True, generator=g)
    noise = torch.randn(n, 3, 1, generator=g, dtype=F64)
    return (loc[label] + (tril[label] @ noise).squeeze(-1)).to(dtype)


X = clusters()


def in_sklearn(x, kind, start, **options):
    """scikit-learn's mean log-likelihood from this start, or None where it gives up."""
    c = start.component_distribution
    precision = precisions(kind, c.covariance_matrix)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = SklearnMixture(
                len(c.mean),
                covariance_type=kind,
                weights_init=start.log_weights.double().softmax(-1).numpy(),
                means_init=c.mean.double().numpy(),
                precisions_init=precision.numpy(),
                **options,
            ).fit(x.numpy())
            return float(model.score(x.numpy()))
        except ValueError:
            return None


def parameters(mixture):
    """Weights, means and covariances in float64."""
    c = mixture.component_distribution
    tril = c.scale_tril.double()
    return mixture.mixture_distribution.probs.double(), c.mean.double(), tril @ tril.mT


def distance(a, b):
    """Largest difference of two mixtures' parameters."""
    return max(float((x - y).detach().abs().max()) for x, y in zip(parameters(a), parameters(b), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tol", [1e-3, 1e-8])
@pytest.mark.parametrize("data", ["iris", "clusters"])
def test_as_likely_as_in_sklearn_from_the_same_start(kind, tol, data):
    x = IRIS if data == "iris" else X
    start = gaussian_mixture(x, 3, kind, max_iter=0).mixture
    fit = gaussian_mixture(x, 3, kind, init=start, tol=tol, max_iter=2000)
    theirs = in_sklearn(x, kind, start, tol=tol, max_iter=2000)
    ours = float(fit.history[-1])
    assert fit.converged
    assert ours >= theirs - 1e-6 * abs(theirs)
    torch.testing.assert_close(fit.mixture.log_prob(x).mean(), fit.history[-1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_em_never_falls(kind):
    fit = gaussian_mixture(X, 4, kind, tol=1e-9, max_iter=1000, init="random_from_data", seed=3)
    assert bool((fit.history.diff() > -1e-12).all())
    assert len(fit.history) == fit.num_iterations + 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("a", "b", "dtype", "tolerance"),
    [
        (1.0, 1e6, torch.float64, 1e-9),
        (-3.0, 1e9, torch.float64, 1e-6),
        (1e-12, 0.0, torch.float64, 1e-12),
        (1e12, 1e12, torch.float64, 1e-12),
        (1e-12, 0.0, torch.float32, 1e-5),
        (1e12, 0.0, torch.float32, 1e-5),
        (1.0, 1e6, torch.float32, 0.05),  # the samples are rounded to 0.06
    ],
)
def test_units_make_no_difference(kind, a, b, dtype, tolerance):
    one = gaussian_mixture(X, 3, kind, tol=1e-8, max_iter=1000)
    other = gaussian_mixture((a * X + b).to(dtype), 3, kind, tol=1e-8, max_iter=1000, dtype=F64)
    (w, loc, cov), (v, moved, scaled) = parameters(one.mixture), parameters(other.mixture)
    assert float((w - v).abs().max()) <= tolerance
    assert float((loc - (moved - b) / a).abs().max()) <= tolerance
    assert float((cov - scaled / a**2).abs().max()) <= tolerance
    if dtype == F64:
        assert other.num_iterations == one.num_iterations


def test_sklearn_must_not_survive_this():
    """Must fail: expanded squares and a floor in units of nobody."""
    x = (X + 1e6).float()
    start = gaussian_mixture(x, 3, "diag", max_iter=0).mixture
    assert in_sklearn(x, "diag", start) is None
    small = (1e-12 * X).double()
    start = gaussian_mixture(small, 3, max_iter=0).mixture
    assert in_sklearn(small, "full", start) < float(gaussian_mixture(small, 3, init=start).history[-1]) - 50


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_float64(kind):
    x = X.float()
    narrow = gaussian_mixture(x, 3, kind, tol=1e-8, max_iter=1000)
    wide = gaussian_mixture(x.double(), 3, kind, tol=1e-8, max_iter=1000)
    assert narrow.mixture.component_distribution.mean.dtype == torch.float32
    assert distance(narrow.mixture, wide.mixture) <= 1e-5
    torch.testing.assert_close(narrow.history, wide.history, rtol=1e-12, atol=0)
    assert float((narrow.responsibilities - wide.responsibilities).abs().max()) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_order_streams_and_chunks_make_no_difference(kind):
    whole = gaussian_mixture(X, 3, kind, tol=1e-6)
    loader = DataLoader(
        TensorDataset(X, torch.arange(len(X))), 77, shuffle=True, generator=torch.Generator().manual_seed(0)
    )
    streamed = gaussian_mixture(loader, 3, kind, tol=1e-6)
    listed = gaussian_mixture(list(X.flip(0).split(501)), 3, kind, tol=1e-6)
    assert distance(whole.mixture, streamed.mixture) <= 1e-12
    assert distance(whole.mixture, listed.mixture) <= 1e-12
    assert streamed.responsibilities is None
    assert whole.responsibilities.shape == (2000, 3)
    posterior = whole.mixture.posterior_marginal(X).probs
    torch.testing.assert_close(whole.responsibilities, posterior, rtol=0, atol=1e-12)


def test_large_samples_start_from_a_subsample_that_order_does_not_change():
    x = clusters(20_000)
    one, other = gaussian_mixture(x, 3, max_iter=0), gaussian_mixture(x.flip(0), 3, max_iter=0)
    assert distance(one.mixture, other.mixture) <= 1e-12
    assert distance(one.mixture, gaussian_mixture(x, 3, max_iter=0, seed=1).mixture) > 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_repetitions(kind):
    g = torch.Generator().manual_seed(0)
    w = torch.randint(0, 4, (len(X),), generator=g)
    options = {"init": X[:3], "tol": 1e-9, "max_iter": 1000}
    weighted = gaussian_mixture(X, 3, kind, weights=w.double(), **options)
    repeated = gaussian_mixture(X.repeat_interleave(w, 0), 3, kind, **options)
    scaled = gaussian_mixture(X, 3, kind, weights=1e-3 * w.double(), **options)
    assert distance(weighted.mixture, repeated.mixture) <= 1e-11
    assert abs(weighted.bic - repeated.bic) <= 1e-8
    assert distance(weighted.mixture, scaled.mixture) <= 1e-11


@pytest.mark.parametrize("kind", KINDS)
def test_criteria_are_sklearns(kind):
    fit = gaussian_mixture(X, 3, kind, tol=1e-9, max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = SklearnMixture(3, covariance_type=kind, tol=1e-9, max_iter=1000, means_init=parameters(fit.mixture)[1])
        model.fit(X.numpy())
    assert abs(fit.bic - model.bic(X.numpy())) <= 1e-3
    assert abs(fit.aic - model.aic(X.numpy())) <= 1e-3


# --- samples that break other fits --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "kinds", "message"),
    [
        (torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), ("full", "tied"), "rank 3 of 6"),
        (torch.ones(10, 2), KINDS, "rank 0"),
        (torch.cat([X, X[:, :1]], 1), ("full", "tied"), r"rank 3 of 4: columns \[0, 3\] are linearly dependent"),
        (torch.cat([X, X[:, :1] - X[:, 1:2]], 1).float(), ("full", "tied"), "rank 3 of 4"),
        (torch.cat([X, 0 * X[:, :1] + 0.1], 1), ("full", "tied", "diag"), "rank 3 at most, of 4: column 3 is constant"),
        (X[:2], ("diag", "spherical"), "3 components need"),
        (X[:, 0], KINDS, r"unsqueeze"),
        (torch.where(torch.arange(2000) == 7, math.nan, X.T).T, KINDS, "column 0 of sample 7 is nan"),
        ([X, X[:, :2]], KINDS, "2 columns"),
        (iter([X]), KINDS, "only once"),
        ([], KINDS, "no samples"),
        (X.numpy(), KINDS, r"torch\.from_numpy\(x\)"),
        (TensorDataset(X), KINDS, r"DataLoader\(dataset"),
    ],
)
def test_bad_samples_are_named(x, kinds, message):
    for kind in kinds:
        with pytest.raises(ValueError, match=message):
            gaussian_mixture(iter([X]) if message == "only once" else x, 3, kind)


def start_of(k, d):
    return stablekl.GaussianMixture(torch.zeros(k), None, torch.zeros(k, d), scale_diag=torch.ones(k, d))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"covariance_type": "banded"}, "covariance_type must be one of 'full'"),
        ({"init": "magic"}, "init must be one of 'kmeans'"),
        ({"init": X[:2]}, r"shape \(3, 3\)"),
        ({"init": X[:3], "n_init": 2}, "n_init=1"),
        ({"weights": torch.ones(3)}, "one for each of 2000"),
        ({"weights": -torch.ones(2000)}, r"weights\[0\] is -1"),
        ({"tol": -1.0}, "tol must not be negative"),
        ({"max_iter": 2.5}, "max_iter must be a whole number, got 2.5"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"init": start_of(3, 2)}, r"event shape \(3,\)"),
        ({"init": start_of(2, 3)}, "has 2 components, not 3"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        gaussian_mixture(X, 3, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [3, 5, 8])
def test_duplicated_points_converge_and_are_told(kind, count):
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=F64).repeat(40, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit = gaussian_mixture(x, count, kind)
    assert fit.converged
    assert bool(fit.history.isfinite().all())
    assert all(bool(p.isfinite().all()) for p in parameters(fit.mixture))
    assert bool(fit.collapsed.any()) == any("collapsed" in str(w.message) for w in caught)
    assert count == 3 or bool(fit.collapsed.all())
    with pytest.raises(ValueError, match="has collapsed"):
        gaussian_mixture(x, 5, kind, penalty=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_distant_cluster_does_not_widen_its_neighbour(kind):
    """The penalty is relative to all samples, 5e5 wide: with a_n = 1/n it would make these clusters 1,000 wide."""
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(500, 2, generator=g, dtype=F64), 1e6 + torch.randn(500, 2, generator=g, dtype=F64)])
    fit = gaussian_mixture(x, 2, kind, tol=1e-9)
    found = parameters(fit.mixture)[2].diagonal(dim1=-2, dim2=-1).sqrt()
    assert 0.9 < float(found.min()) <= float(found.max()) < 1.1
    with pytest.warns(FitWarning, match="collapsed"):
        strong = gaussian_mixture(x, 2, kind, tol=1e-9, penalty=1e-6)
    assert float(parameters(strong.mixture)[2].diagonal(dim1=-2, dim2=-1).sqrt().min()) > 500


@pytest.mark.parametrize("kind", KINDS)
def test_dead_components_come_back(kind):
    start = stablekl.GaussianMixture(
        probs=torch.tensor([0.4, 0.3, 0.3], dtype=F64),
        loc=torch.tensor([[0.0, 0, 0], [1e3, 0, 0], [1e5, 1e5, 0]], dtype=F64),
        scale_diag=torch.ones(3, 3, dtype=F64),
    )
    fit = gaussian_mixture(X, 3, kind, init=start, tol=1e-8, max_iter=2000)
    assert float(fit.mixture.mixture_distribution.probs.min()) > 0.01
    single = gaussian_mixture(X, 1, kind)
    assert fit.log_likelihood > single.log_likelihood + 100


def test_a_fit_that_is_not_done_says_so():
    with pytest.warns(FitWarning, match="has not converged"):
        fit = gaussian_mixture(X, 3, tol=1e-12, max_iter=2)
    assert not fit.converged
    again = gaussian_mixture(X, 3, init=fit.mixture, tol=1e-9, max_iter=500)
    assert again.converged
    assert gaussian_mixture(X, 3, max_iter=0).num_iterations == 0


def test_restarts_are_no_worse():
    one = gaussian_mixture(IRIS, 4, tol=1e-5, max_iter=1000)
    many = gaussian_mixture(IRIS, 4, tol=1e-5, max_iter=1000, n_init=5)
    assert many.log_likelihood >= one.log_likelihood - 1e-6


def test_a_start_that_collapses_without_a_penalty_leaves_the_others():
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    single = []
    for seed in range(6):
        try:
            single.append(gaussian_mixture(x, 8, penalty=0.0, seed=seed, max_iter=1000))
        except ValueError as error:
            assert "has collapsed" in str(error)  # noqa: PT017 - some starts do, some do not
    many = gaussian_mixture(x, 8, penalty=0.0, n_init=20, max_iter=1000)
    assert len(single) < 6
    assert not many.collapsed.any()


def test_where_to_compute_may_be_a_name():
    here, named = gaussian_mixture(X, 2), gaussian_mixture(X, 2, device="cpu")
    assert distance(here.mixture, named.mixture) == 0


def test_random_state_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    gaussian_mixture(X, 3, n_init=2)
    assert torch.equal(before, torch.get_rng_state())


def test_one_component_is_the_sample_covariance():
    fit = gaussian_mixture(X, 1)
    _, loc, cov = parameters(fit.mixture)
    torch.testing.assert_close(loc[0], X.mean(0), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(cov[0], torch.from_numpy(np.cov(X.T.numpy(), bias=True)), rtol=1e-12, atol=1e-12)


def test_progress_is_shown_when_asked_for(capsys):
    gaussian_mixture(X, 3, progress=True)
    assert "fit of 3 components [" in capsys.readouterr().err
    gaussian_mixture(X, 3)
    assert capsys.readouterr().err == ""


# --- parts ------------------------------------------------------------------------------------------


def model_of(kind, spread):
    g = torch.Generator().manual_seed(5)
    loc = spread * torch.randn(4, 3, generator=g, dtype=F64)
    scale = {
        "full": torch.linalg.cholesky(torch.eye(3, dtype=F64) + 0.3 * torch.ones(3, 3, dtype=F64)).expand(4, 3, 3),
        "tied": torch.linalg.cholesky(torch.eye(3, dtype=F64) + 0.3 * torch.ones(3, 3, dtype=F64)).unsqueeze(0),
        "diag": 0.2 + torch.rand(4, 3, generator=g, dtype=F64),
        "spherical": 0.2 + torch.rand(4, 1, generator=g, dtype=F64),
    }[kind]
    return Model(kind, torch.log_softmax(torch.randn(4, generator=g, dtype=F64), 0), loc, scale)


@pytest.mark.parametrize("kind", KINDS)
def test_an_m_step_is_the_textbooks(kind):
    """About the origin, from responsibilities by exponentials: right where nothing is narrow or far away."""
    model = model_of(kind, 1.0)
    z = torch.randn(500, 3, generator=torch.Generator().manual_seed(6), dtype=F64)
    w = torch.rand(500, generator=torch.Generator().manual_seed(7), dtype=F64)
    pooled, a = 0.9 * torch.eye(3, dtype=F64) + 0.1, 1e-3
    sums = collect(model, [(z[:99], w[:99]), (z[99:], w[99:])])
    new = maximised(model, sums, torch.linalg.cholesky(pooled), a)
    density = torch.distributions.MultivariateNormal(model.loc, model.covariance().expand(4, 3, 3))
    r = density.log_prob(z.unsqueeze(1)).exp() * model.log_weights.exp()
    r = w.unsqueeze(-1) * r / r.sum(-1, keepdim=True)
    size, weight = r.sum(0), 2 * a * w.sum()
    loc = (r.mT @ z) / size.unsqueeze(-1)
    scatter = torch.einsum("nk,ni,nj->kij", r, z, z) - torch.einsum("k,ki,kj->kij", size, loc, loc)
    if kind == "tied":
        expected = (scatter.sum(0, keepdim=True) + weight * pooled) / (size.sum() + weight)
    else:
        expected = (scatter + weight * pooled) / (size + weight).reshape(-1, 1, 1)
    variance = expected.diagonal(dim1=-2, dim2=-1)
    if kind in ("diag", "spherical"):
        expected = torch.diag_embed(variance if kind == "diag" else variance.mean(-1, keepdim=True).expand(4, 3))
    torch.testing.assert_close(new.log_weights.exp(), size / size.sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(new.loc, loc, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(new.covariance(), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", ["diag", "spherical"])
def test_expanded_squares_are_used_where_they_are_right(kind):
    z = torch.randn(500, 3, generator=torch.Generator().manual_seed(6), dtype=F64)
    reach = z.abs().amax(0)
    model = model_of(kind, 1.0)
    assert squares_are_safe(model, reach)
    for a, b in zip(collect_squares(model, [(z, None)]), collect(model, [(z, None)]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    narrow = model._replace(scale=1e-6 * model.scale)
    assert not squares_are_safe(narrow, reach)
    assert not squares_are_safe(model_of("full", 1.0), reach)


def test_expanded_squares_must_not_be_used_where_they_are_wrong():
    """Must fail: a component of width 1e-6 at 1, whose variance is lost."""
    z = 1 + 1e-6 * torch.randn(500, 3, generator=torch.Generator().manual_seed(6), dtype=F64)
    model = Model("diag", torch.zeros(1, dtype=F64), torch.ones(1, 3, dtype=F64), torch.full((1, 3), 1e-6, dtype=F64))
    assert not squares_are_safe(model, z.abs().amax(0))
    wrong, right = collect_squares(model, [(z, None)]).second, collect(model, [(z, None)]).second
    assert float((wrong / right - 1).abs().max()) > 1e-6


# --- by batches, by gradient, by number -----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("streamed", [False, True])
def test_stepwise_em_comes_near(kind, streamed):
    x = clusters(20_000)
    best = gaussian_mixture(x, 3, kind, tol=1e-6)
    data = DataLoader(TensorDataset(x), 100) if streamed else x
    fit = gaussian_mixture(data, 3, kind, batch_size=1000)
    # tied components settle slowly, by batches or not
    assert float(best.history[-1] - fit.history[-1]) < (0.02 if kind == "tied" else 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_fit_by_gradient(kind):
    start = gaussian_mixture(X, 3, kind, max_iter=0).mixture
    model = GaussianMixtureModel(start, kind)
    assert distance(model(), start) <= 1e-12
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -model().log_prob(X).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    best = gaussian_mixture(X, 3, kind, init=start, tol=1e-9, max_iter=1000)
    assert -closure().item() >= float(best.history[-1]) - 1e-4


@pytest.mark.parametrize("a", [1e-25, 1e25])
def test_a_trainable_mixture_takes_any_units(a):
    start = gaussian_mixture((a * X).float(), 3, max_iter=0)
    model = GaussianMixtureModel(start.mixture)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    torch.testing.assert_close(
        model().component_distribution.mean, start.mixture.component_distribution.mean, rtol=1e-4, atol=1e-5 * a
    )
    with pytest.raises(ValueError, match="covariance_type"):
        GaussianMixtureModel(start.mixture, "banded")


def test_the_number_of_components():
    x = clusters(3000)
    found = select(x, range(1, 7), tol=1e-5, max_iter=1000, n_init=2)
    assert found.num_components == 3
    assert set(found.values) == set(range(1, 7))
    assert found.best.bic == found.values[3] == min(found.values.values())
    assert select(x.flip(0), [1, 3], "aic", tol=1e-5, max_iter=1000).num_components == 3
    with pytest.raises(ValueError, match="no candidate"):
        select(x, [])
    with pytest.raises(ValueError, match="criterion"):
        select(x, [1], "mdl")


def test_collapsed_fits_are_not_selected():
    """Must fail with the least criterion alone: a component on a few equal points makes it as small as you like."""
    x = torch.cat([X[:200], X[:1].repeat(10, 1)])
    found = select(x, [1, 3, 8, 12], tol=1e-5, max_iter=1000, n_init=2)
    assert found.collapsed
    assert min(found.values, key=found.values.get) in found.collapsed
    assert found.num_components not in found.collapsed
    five = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).repeat(40, 1)
    with pytest.raises(ValueError, match="every candidate"):
        select(five, [5, 6])


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_of_a_model_can_be_loaded(kind):
    """One unit for all columns was an expanded tensor, which load_state_dict cannot write to."""
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = gaussian_mixture(x, 2, kind, max_iter=0).mixture
    moved, other = (GaussianMixtureModel(s, kind) for s in (start, gaussian_mixture(5 * x + 1, 2, kind).mixture))
    other.load_state_dict(moved.state_dict())
    assert torch.equal(other().log_prob(x), moved().log_prob(x))


def test_samples_of_weight_zero_are_none():
    """They once counted as samples: five components were fitted to three, and a rank had another cause."""
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    weights = (torch.arange(40) < 3).float()
    with pytest.raises(ValueError, match="5 components need as many samples at least, got 3"):
        gaussian_mixture(x, 5, "diag", weights=weights)
    with pytest.raises(ValueError, match="rank 2 of 3: 3 samples span 2 dimensions at most"):
        gaussian_mixture(x, 1, weights=weights)


def test_a_start_of_another_type_is_named():
    x = torch.randn(40, 2)
    with pytest.raises(ValueError, match=r"means of shape \(K, D\), or a mixture; got <class 'numpy.ndarray'>"):
        gaussian_mixture(x, 2, init=x[:2].numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_that_leaves_the_range_of_its_dtype(kind):
    """It was said to come from a ReLU: a scale that half precision rounds to 0."""
    x = 1e-9 * torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"does not fit into torch.float16: standard deviations are .*dtype="):
        gaussian_mixture(x, 2, kind, dtype=torch.float16)
    assert gaussian_mixture(x, 2, kind).mixture.mean.dtype == torch.float32
