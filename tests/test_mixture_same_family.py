"""stablekl.MixtureSameFamily: torch's class, with exact weights and supports."""

from __future__ import annotations

import copy
import math
import pickle

import mpmath as mp
import pytest
import torch
from torch.distributions import (
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
    Dirichlet,
    Exponential,
    Gamma,
    Geometric,
    HalfNormal,
    Independent,
    Laplace,
    LKJCholesky,
    LogNormal,
    LowRankMultivariateNormal,
    Multinomial,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
    Pareto,
    Poisson,
    Uniform,
    VonMises,
)
from torch.distributions import MixtureSameFamily as TorchMixture

from stablekl import MixtureSameFamily

F64 = torch.float64
T = torch.tensor


def even(k: int = 2) -> Categorical:
    return Categorical(torch.ones(k))


# ------------------------------------------------------------------------------------------ drop-in for torch

LOC = torch.arange(6.0).reshape(2, 3)
FAMILIES = {
    "normal": lambda: Normal(T([0.0, 2.0]), T([1.0, 0.5])),
    "independent": lambda: Independent(Normal(LOC, LOC + 1), 1),
    "mvn": lambda: MultivariateNormal(LOC, torch.eye(3) + 0.5),
    "low rank": lambda: LowRankMultivariateNormal(LOC, torch.ones(2, 3, 1), torch.ones(2, 3)),
    "gamma": lambda: Gamma(T([0.5, 2.0]), T([1.0, 3.0])),
    "laplace": lambda: Independent(Laplace(LOC, LOC + 1), 1),
    "log-normal": lambda: LogNormal(T([0.0, 1.0]), T([1.0, 0.5])),
    "beta": lambda: Beta(T([0.5, 2.0]), T([1.0, 3.0])),
    "dirichlet": lambda: Dirichlet(LOC + 0.5),
    "von Mises": lambda: VonMises(T([0.0, 1.0]), T([1.0, 2.0])),
    "poisson": lambda: Poisson(T([1.0, 5.0])),
    "binomial": lambda: Binomial(7, T([0.5, 0.25])),
    "multinomial": lambda: Multinomial(3, LOC + 1),
    "one-hot": lambda: OneHotCategorical(LOC + 1),
    "matrix normal": lambda: Independent(Normal(torch.zeros(2, 3, 2), torch.ones(2, 3, 2)), 2),
    "cholesky": lambda: LKJCholesky(3, T([1.0, 2.0])),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("weights", ["probs", "logits"])
def test_drop_in(name, weights):
    given = {weights: T([0.25, 0.75])}
    ours, theirs = (c(Categorical(**given), FAMILIES[name]()) for c in (MixtureSameFamily, TorchMixture))
    assert isinstance(ours, TorchMixture)
    for attribute in ("batch_shape", "event_shape"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    assert ours.has_rsample == (name in ("normal", "independent", "mvn", "low rank"))
    assert not theirs.has_rsample
    assert repr(ours) == repr(theirs)
    torch.manual_seed(0)
    x = theirs.sample((5,))
    torch.manual_seed(0)
    assert torch.equal(ours.sample((5,)), x)
    assert bool(ours.support.check(x).all())
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x))
    component = theirs.component_distribution.log_prob(theirs._pad(x))
    torch.testing.assert_close(ours.component_log_probs(x), component)
    log_weights = given["probs"].log() if weights == "probs" else given["logits"]
    posterior = torch.softmax(component + log_weights, -1)
    torch.testing.assert_close(ours.posterior_marginal(x).probs, posterior)
    if name not in ("cholesky",):
        torch.testing.assert_close(ours.mean, theirs.mean)
        torch.testing.assert_close(ours.variance, theirs.variance)
    if name in ("normal", "gamma", "log-normal"):
        torch.testing.assert_close(ours.cdf(x), theirs.cdf(x))


def test_constructor_errors_are_torchs():
    for bad in ((Normal(0.0, 1.0), Normal(torch.zeros(2), 1.0)), (even(3), Normal(torch.zeros(2), torch.ones(2)))):
        with pytest.raises(ValueError, match="ixture"):
            MixtureSameFamily(*bad)
    with pytest.raises(ValueError, match="not compatible"):
        MixtureSameFamily(Categorical(torch.ones(3, 2)), Normal(torch.zeros(4, 2), torch.ones(4, 2)))
    with pytest.raises(ValueError, match="give all K components' parameters in one distribution"):
        MixtureSameFamily(even(), Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("weights", "components", "batch"),
    [((5,), (), (5,)), ((), (5,), (5,)), ((4, 1), (5,), (4, 5)), ((5,), (4, 1), (4, 5))],
)
def test_batches_broadcast_between_weights_and_components(weights, components, batch):
    m = MixtureSameFamily(
        Categorical(torch.rand(*weights, 2)), Independent(Normal(torch.randn(*components, 2, 3), torch.ones(2, 3)), 1)
    )
    assert m.batch_shape == batch
    assert m.mean.shape == m.variance.shape == (*batch, 3)
    assert m.covariance_matrix.shape == (*batch, 3, 3)
    assert m.log_weights.shape == (*batch, 2)
    x = m.sample((7,))
    assert x.shape == (7, *batch, 3)
    assert m.log_prob(x).shape == (7, *batch)
    assert m.component_log_probs(x).shape == (7, *batch, 2)
    assert m.posterior_marginal(x).batch_shape == (7, *batch)
    wide = m.expand((2, *batch))
    assert isinstance(wide, MixtureSameFamily)
    assert torch.equal(wide.log_prob(x[:, None]), m.log_prob(x)[:, None].expand(7, 2, *batch))
    assert wide.sample().shape == (2, *batch, 3)


@pytest.mark.parametrize(
    "transport", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.expand((2,))]
)
@pytest.mark.parametrize("weights", [{"probs": T([1.0, 0.0])}, {"logits": T([0.0, -300.0])}])
def test_weights_survive_transport(weights, transport):
    m = MixtureSameFamily(Categorical(**weights), Normal(T([0.0, 1.0]), T([1.0, 1.0])))
    _ = m.mixture_distribution.probs, m.mixture_distribution.logits  # both exist now
    expected = T([0.0, -math.inf if "probs" in weights else -300.0])
    new = transport(m)
    assert torch.equal(new.log_weights, expected.expand(new.log_weights.shape))
    assert torch.equal(new.to(F64).log_weights, expected.double().expand(new.log_weights.shape))


def test_to():
    m = MixtureSameFamily(even(), Independent(Normal(LOC, LOC + 1), 1)).to("cpu", F64)
    assert m.mean.dtype == m.log_weights.dtype == m.sample().dtype == F64
    assert m.component_distribution.base_dist.loc.dtype == F64


# ------------------------------------------------------------------------------------------------ zero weights


@pytest.mark.parametrize("weights", [{"probs": T([1.0, 0.0])}, {"logits": T([0.0, -math.inf])}])
def test_a_weight_of_zero_is_zero(weights):
    m = MixtureSameFamily(Categorical(**weights), Normal(T([0.0, 10.0]), T([1.0, 1.0])))
    x = T(10.0)
    assert torch.equal(m.log_prob(x), Normal(0.0, 1.0).log_prob(x))
    assert torch.equal(m.posterior_marginal(x).probs, T([1.0, 0.0]))
    assert float(m.mean) == 0
    assert float(m.variance) == 1
    assert torch.equal(m.cdf(x), Normal(0.0, 1.0).cdf(x))


def test_torchs_class_leaks():
    """Must fail: the same numbers in torch's own class."""
    m = TorchMixture(Categorical(probs=T([1.0, 0.0])), Normal(T([0.0, 10.0]), T([1.0, 1.0])))
    assert float(m.log_prob(T(10.0))) > -20 > float(Normal(0.0, 1.0).log_prob(T(10.0)))


def test_expanded_categoricals_are_read_rightly():
    """`Categorical.expand` forgets whether probs or logits were given, once both have been computed."""
    for given, expected in (({"probs": T([1.0, 0.0])}, -math.inf), ({"logits": T([0.0, -300.0])}, -300.0)):
        c = Categorical(**given)
        _ = c.logits, c.probs
        m = MixtureSameFamily(c.expand((2,)), Normal(torch.zeros(2), torch.ones(2)))
        assert torch.equal(m.log_weights, T([0.0, expected]).expand(2, 2))


def test_what_a_dead_component_holds_does_not_matter():
    """Infinite densities and gradients of a component that is switched off."""
    concentration = T([2.0, 0.5], requires_grad=True)
    m = MixtureSameFamily(Categorical(probs=T([1.0, 0.0])), Beta(concentration, T([2.0, 2.0])))
    x = T([0.25, 0.0], requires_grad=True)  # the dead component is infinite at 0
    value = m.log_prob(x)
    assert value.tolist() == [pytest.approx(math.log(6 * 0.25 * 0.75), rel=1e-6), -math.inf]
    grads = torch.autograd.grad(value[0], [concentration, x])
    assert all(bool(g.isfinite().all()) for g in grads)
    assert float(grads[0][1]) == 0
    assert MixtureSameFamily(Categorical(probs=T([1.0, 0.0])), Pareto(T([1.0, 1.0]), T([3.0, 0.5]))).mean == 1.5


# ---------------------------------------------------------------------------------------------------- supports

# name: components, points, and for each point which components can have produced it
SUPPORTS = {
    "uniform": (lambda a: Uniform(T([0.0, 1.0]) + a, T([2.0, 3.0]) + a), [0.5, 1.5, 2.5], [[1, 0], [1, 1], [0, 1]]),
    "pareto": (lambda a: Pareto(T([1.0, 3.0]) + a, T([2.0, 1.0])), [1.5, 3.5], [[1, 0], [1, 1]]),
    "binomial": (lambda a: Binomial(T([3.0, 10.0]), T([0.5, 0.25]) + a), [2.0, 9.0], [[1, 1], [0, 1]]),
}


@pytest.mark.parametrize("name", SUPPORTS)
def test_points_outside_one_support(name):
    make, points, inside = SUPPORTS[name]
    shift = torch.zeros(2, requires_grad=True)
    m = MixtureSameFamily(even(), make(shift))
    x, inside = T(points), T(inside).bool()
    by_component = m.component_log_probs(x)
    assert torch.equal(by_component > -math.inf, inside)
    densities = {
        "uniform": [[0.5, 0.0], [0.5, 0.5], [0.0, 0.5]],
        "pareto": [[2 / 1.5**3, 0.0], [2 / 3.5**3, 3 / 3.5**2]],
        "binomial": [[3 / 8, 45 * 0.75**8 / 16], [0.0, 10 * 0.75 / 4**9]],
    }
    expected = T(densities[name]).log()
    torch.testing.assert_close(by_component, expected)
    torch.testing.assert_close(m.log_prob(x), torch.logsumexp(expected, -1) - math.log(2))
    (g,) = torch.autograd.grad(m.log_prob(x).sum(), shift)
    assert bool(g.isfinite().all())
    if name == "uniform":  # the second cannot have produced the first point
        assert torch.equal(m.posterior_marginal(x).probs, T([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]))
        torch.testing.assert_close(m.cdf(x), T([0.125, 0.5, 0.875]))


def test_torch_raises_outside_one_support():
    """Must fail: torch evaluates every component everywhere."""
    with pytest.raises(ValueError, match="support"):
        TorchMixture(even(), Uniform(T([0.0, 1.0]), T([2.0, 3.0]))).log_prob(T(0.5))


OUTSIDE = {
    "uniform": (lambda **v: Uniform(T([0.0, 1.0]), T([2.0, 3.0]), **v), -0.5),
    "gamma": (lambda **v: Gamma(T([1.0, 2.0]), T([1.0, 1.0]), **v), -1.0),
    "exponential": (lambda **v: Exponential(T([1.0, 2.0]), **v), -1.0),
    "beta": (lambda **v: Beta(T([1.0, 2.0]), T([1.0, 1.0]), **v), 1.5),
    "pareto": (lambda **v: Pareto(T([1.0, 2.0]), T([1.0, 1.0]), **v), 0.5),
    "poisson": (lambda **v: Poisson(T([1.0, 2.0]), **v), -1.0),
    "poisson, not an integer": (lambda **v: Poisson(T([1.0, 2.0]), **v), 1.5),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_points_outside_every_support(name):
    make, bad = OUTSIDE[name]
    m = MixtureSameFamily(even(), make())
    good = float(m.sample())
    with pytest.raises(ValueError, match=r"value .* at \[1, 0\] lies outside the support of every component"):
        m.log_prob(T([[good], [bad]]))
    m = MixtureSameFamily(even(), make(validate_args=False), validate_args=False)
    x = T([good, bad], requires_grad=True)
    value = m.log_prob(x)
    assert float(value[1].detach()) == -math.inf
    assert math.isfinite(float(value[0].detach()))
    if value.requires_grad:  # a uniform density has no gradient to give
        (g,) = torch.autograd.grad(value[1], x)
        assert torch.equal(g, torch.zeros(2))


def test_the_edge_of_a_support():
    """Beta(2, 2) and Beta(3, 3) have density 0 at 0, with infinite slopes of its logarithm: -inf, and no gradient."""
    a, x = T([2.0, 3.0], requires_grad=True), T([0.0, 0.5], requires_grad=True)
    m = MixtureSameFamily(even(), Beta(a, T([2.0, 3.0])))
    value = m.log_prob(x)
    assert value.tolist() == [-math.inf, pytest.approx(math.log(1.6875))]
    for g in torch.autograd.grad(value.sum(), [a, x]):
        assert bool(g.isfinite().all())
    with torch.no_grad():
        assert torch.equal(m.log_prob(x), value)
    assert float(torch.func.grad(m.log_prob)(x.detach()[0]).detach()) == 0
    # must fail: torch's
    theirs = TorchMixture(even(), Beta(a, T([2.0, 3.0])))
    assert bool(torch.autograd.grad(theirs.log_prob(x)[0], x)[0][0].isnan())


def test_the_support_contains_its_samples():
    """torch's constraint asks for the support of every component at once."""
    ours, theirs = (c(even(), Uniform(T([0.0, 5.0]), T([1.0, 6.0]))) for c in (MixtureSameFamily, TorchMixture))
    x = T([0.5, 5.5, 3.0])
    assert ours.support.check(x).tolist() == [True, True, False]
    assert theirs.support.check(x).tolist() == [False, False, False]
    assert (ours.support.event_dim, ours.support.is_discrete) == (0, False)


def test_invalid_values_say_where():
    m = MixtureSameFamily(even(), Independent(Normal(LOC, LOC + 1), 1))
    bad = torch.zeros(4, 3)
    bad[2, 1] = math.nan
    with pytest.raises(ValueError, match=r"\[0.0, nan, 0.0\] at \[2\]"):
        m.log_prob(bad)
    with pytest.raises(ValueError, match=r"shape \(4, 2\).*event shape \(3,\)"):
        m.log_prob(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="event shape"):
        m.log_prob(torch.zeros(4, 1))  # would broadcast, silently
    with pytest.raises(ValueError, match="batch shape"):
        m.expand((5,)).log_prob(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="tensor"):
        m.log_prob(1.0)
    with pytest.raises(ValueError, match="NaN"):
        m.posterior_marginal(bad)


# ------------------------------------------------------------------------------------------- values and shapes


def test_far_from_the_origin():
    loc = T([1e10, 1e10 + 4.0], dtype=F64)
    m = MixtureSameFamily(Categorical(T([0.5, 0.5], dtype=F64)), Normal(loc, torch.ones(2, dtype=F64)))
    x = T([1e10, 1e10 + 1.0, 1e10 + 30.0], dtype=F64)
    for value, point in zip(m.log_prob(x).tolist(), x.tolist(), strict=True):
        density = sum(mp.npdf(mp.mpf(point), mp.mpf(a), 1) for a in loc.tolist()) / 2
        assert value == pytest.approx(float(mp.log(density)), rel=1e-15)
    assert m.variance.item() == pytest.approx(5.0, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weights", ["probs", "logits"])
def test_half_precision(dtype, weights):
    w = T([0.01, 0.99]).to(dtype)
    w = w if weights == "probs" else w.log()
    loc, scale = T([[0.0, 1.0], [3.0, -2.0]]).to(dtype), T([[0.5, 1.0], [1.0, 2.0]]).to(dtype)

    def make(t):
        component = Independent(Normal(loc.to(t), scale.to(t)), 1)
        return MixtureSameFamily(Categorical(**{weights: w.to(t)}), component)

    half, double = make(dtype), make(F64)
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    value = half.log_prob(x)
    assert value.dtype == dtype
    # one rounding, but for that of the weights in Categorical's constructor
    torch.testing.assert_close(value.double(), double.log_prob(x.double()), rtol=2 * torch.finfo(dtype).eps, atol=8e-3)
    for name in ("mean", "variance", "covariance_matrix", "log_weights"):
        result = getattr(half, name)
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), getattr(double, name), rtol=0.05, atol=0.05)
    assert half.component_log_probs(x).dtype == half.posterior_marginal(x).probs.dtype == half.sample().dtype == dtype


def test_covariance():
    cov = torch.stack([torch.eye(2, dtype=F64), T([[2.0, 0.5], [0.5, 1.0]], dtype=F64)])
    loc, w = T([[1e8, 0.0], [1e8 + 2, 1.0]], dtype=F64), T([0.25, 0.75], dtype=F64)
    m = MixtureSameFamily(Categorical(w), MultivariateNormal(loc, cov))
    between = 0.25 * 0.75 * T([[4.0, 2.0], [2.0, 1.0]], dtype=F64)
    # rounded means of 1e8 cost 1e-8; E[x x'] - mean mean' would cost 1e16 eps = 2
    torch.testing.assert_close(m.covariance_matrix, 0.25 * cov[0] + 0.75 * cov[1] + between, rtol=0, atol=1e-7)
    torch.testing.assert_close(m.variance, m.covariance_matrix.diagonal(), rtol=1e-12, atol=0)
    with pytest.raises(AttributeError, match="vector events"):
        _ = MixtureSameFamily(even(), Normal(torch.zeros(2), torch.ones(2))).covariance_matrix


def test_a_row_without_density():
    loc = torch.zeros(2, 1, requires_grad=True)
    m = MixtureSameFamily(even(), Independent(Normal(loc, torch.ones(2, 1)), 1))
    value = m.log_prob(T([[1e30], [0.0]]))
    assert value.tolist()[0] == -math.inf
    (g,) = torch.autograd.grad(value[0], loc)
    assert torch.equal(g, torch.zeros(2, 1))


# ------------------------------------------------------------------------------------- the most probable label


def test_posterior_mode():
    loc, scale = T([[0.0, 4.0, 4.0]] * 2), T([[1.0, 1.0, 1.0], [1.0, 0.5, 1.0]])
    m = MixtureSameFamily(Categorical(T([[0.2, 0.4, 0.4], [0.0, 0.5, 0.5]])), Normal(loc, scale))
    x = T([-1.0, 2.0, 4.0, 9.0]).unsqueeze(-1)
    mode = m.posterior_mode(x)
    assert mode.dtype == torch.int64
    # ties go to the lowest index; a component of weight 0 is never chosen
    assert mode.tolist() == [[0, 2], [1, 2], [1, 1], [1, 2]]
    assert m.posterior_mode(T(1e6)).tolist() == [1, 2]
    torch.testing.assert_close(mode[:3], m.posterior_marginal(x[:3]).probs.argmax(-1))
    assert m.posterior_mode(torch.zeros(7, 5, 1)).shape == (7, 5, 2)
    assert torch.equal(
        torch.vmap(MixtureSameFamily(m.mixture_distribution, Normal(loc, scale), False).posterior_mode)(x), mode
    )
    with pytest.raises(ValueError, match="NaN"):
        m.posterior_mode(T([math.nan, 0.0]))


def test_posterior_mode_of_other_families():
    m = MixtureSameFamily(even(), Uniform(T([0.0, 1.0]), T([2.0, 1.5])))
    assert m.posterior_mode(T([0.5, 1.25, 1.75])).tolist() == [0, 1, 0]
    vectors = MixtureSameFamily(even(), Independent(Laplace(LOC, LOC + 1), 1))
    assert vectors.posterior_mode(LOC).tolist() == [0, 1]
    with pytest.raises(ValueError, match="outside the support of every component"):
        m.posterior_mode(T(3.0))


# ------------------------------------------------------------------------- different supports, all that is asked


def _parameters(distribution):
    return [name for name in distribution.arg_constraints if name != "logits"]


def _each_alone(components, x):
    """Log-densities of the components one by one, in torch, -inf outside."""
    columns = []
    for c in components:
        inside = c.support.check(x)
        columns.append([float(c.log_prob(v)) if i else -math.inf for v, i in zip(x, inside.tolist(), strict=True)])
    return T(columns).mT


# name: a family over two parameter sets, the same one by one, and points in one, both and none of the supports
MIXED = {
    "uniform": (lambda a: Uniform(a, a + T([1.0, 3.0])), T([0.0, 2.0]), [0.5, 1.5, 2.5, 5.5, -0.5, 0.0, 5.0]),
    "pareto": (lambda a: Pareto(a, T([2.0, 1.0])), T([1.0, 3.0]), [0.5, 1.0, 1.5, 3.5]),
    "half-normal": (lambda a: HalfNormal(a), T([1.0, 2.0]), [-1.0, 0.0, 0.5, 9.0]),
    "gamma": (lambda a: Gamma(a, a), T([1.5, 3.0]), [-1.0, 0.0, 0.5, 9.0]),
    "beta": (lambda a: Beta(a, a), T([1.5, 3.0]), [-1.0, 0.0, 0.5, 1.0, 1.5]),
    "binomial": (lambda a: Binomial(T([2.0, 5.0]), a), T([0.25, 0.5]), [-1.0, 0.0, 1.5, 2.0, 4.0, 6.0]),
    "bernoulli": (lambda a: Bernoulli(a), T([0.25, 0.5]), [-1.0, 0.0, 0.5, 1.0]),
    "geometric": (lambda a: Geometric(a), T([0.25, 0.5]), [-1.0, 0.0, 1.5, 3.0]),
}


@pytest.mark.parametrize("name", MIXED)
def test_everything_asked_of_points_outside_a_support(name):
    make, given, points = MIXED[name]
    given, x = given.clone().requires_grad_(), T(points)
    m = MixtureSameFamily(even(), make(given), validate_args=False)
    both = make(given.detach())
    singles = [type(both)(**{k: getattr(both, k)[i] for k in _parameters(both)}, validate_args=False) for i in (0, 1)]
    truth = _each_alone(singles, x)
    torch.testing.assert_close(m.component_log_probs(x), truth)
    total = torch.logsumexp(truth, -1) - math.log(2)
    value = m.log_prob(x)
    torch.testing.assert_close(value, total)
    supported = total > -math.inf
    posterior = m.posterior_marginal(x[supported]).probs
    torch.testing.assert_close(posterior, torch.softmax(truth[supported], -1))
    assert torch.equal(m.posterior_mode(x), truth.argmax(-1))
    outputs = [value[supported], m.component_log_probs(x)[truth > -math.inf], posterior]
    for output in outputs:
        (g,) = torch.autograd.grad(output.sum(), given, retain_graph=True)
        assert bool(g.isfinite().all())
    try:
        cdf = m.cdf(x)
    except NotImplementedError:
        return
    alone = [[float(c.cdf(v)) if c.support.check(v) else float(v > c.mean) for c in singles] for v in x]
    torch.testing.assert_close(cdf.detach(), T(alone).mean(-1))


@pytest.mark.parametrize("family", ["normal", "uniform"])
def test_vmap(family):
    def f(loc):
        component = Normal(loc, torch.ones(2)) if family == "normal" else Uniform(loc, loc + 1.0, validate_args=False)
        return MixtureSameFamily(even(), component).log_prob(T(0.75))

    loc = T([[0.0, 0.5], [0.5, 2.0], [5.0, 6.0]])
    rows = [f(row) if family == "normal" or row[0] < 1 else T(-math.inf) for row in loc]
    torch.testing.assert_close(torch.vmap(f)(loc), torch.stack(rows))
    assert bool(torch.vmap(torch.func.grad(f))(loc).isfinite().all())
