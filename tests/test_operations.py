"""The methods of mixtures: identities between densities, classes and shapes, far values, errors, transforms."""

from __future__ import annotations

import itertools
import math

import mpmath as mp
import pytest
import torch
from torch.distributions import (
    Beta,
    Categorical,
    Dirichlet,
    Gamma,
    Independent,
    Laplace,
    MultivariateNormal,
    Normal,
    Poisson,
    Uniform,
)
from torch.distributions import MixtureSameFamily as TorchMixture

import stablekl
from stablekl import GaussianMixture, LowRankMultivariateNormal, MixtureSameFamily

F64 = torch.float64
T = torch.tensor
K, D = 3, 4
G = torch.Generator().manual_seed(0)
LOC = torch.randn(K, D, generator=G, dtype=F64)
TRIL = torch.randn(K, D, D, generator=G, dtype=F64).tril(-1) + torch.eye(D, dtype=F64) * T([1.0, 0.5, 2.0, 0.3])
COV = TRIL @ TRIL.mT
SCALES = torch.rand(K, D, generator=G, dtype=F64) + 0.2
FACTOR = torch.randn(K, D, 2, generator=G, dtype=F64)
PROBS = T([0.2, 0.3, 0.5], dtype=F64)
POINTS = torch.randn(6, D, generator=G, dtype=F64)


def mixture(component) -> MixtureSameFamily:
    return MixtureSameFamily(Categorical(PROBS), component)


MIXTURES = {
    "scale_tril": lambda: GaussianMixture(probs=PROBS, loc=LOC, scale_tril=TRIL),
    "covariance": lambda: GaussianMixture(probs=PROBS, loc=LOC, covariance_matrix=COV),
    "scale_diag": lambda: GaussianMixture(probs=PROBS, loc=LOC, scale_diag=SCALES),
    "precision": lambda: mixture(stablekl.MultivariateNormal(LOC, precision_matrix=torch.linalg.inv(COV))),
    "torch's": lambda: mixture(MultivariateNormal(LOC, scale_tril=TRIL)),
    "low rank": lambda: mixture(LowRankMultivariateNormal(LOC, FACTOR, SCALES)),
    "independent": lambda: mixture(Independent(Normal(LOC, SCALES), 1)),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_marginal_times_conditional_is_joint(name):
    m = MIXTURES[name]()
    for dims in ([0], [2], [0, 1], [3, 1], [1, 2, 3], [2, 0, 1]):
        others = [i for i in range(D) if i not in dims]
        marginal, conditional = m.marginal(dims), m.condition(dims, POINTS[:, dims])
        assert type(marginal) is type(conditional) is type(m)
        assert (marginal.event_shape, conditional.event_shape) == ((len(dims),), (len(others),))
        assert conditional.batch_shape == (6,)
        total = marginal.log_prob(POINTS[:, dims]) + conditional.log_prob(POINTS[:, others])
        torch.testing.assert_close(total, m.log_prob(POINTS), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(m.marginal(range(D)).log_prob(POINTS), m.log_prob(POINTS))
    flipped = m.marginal([-1, -2, -3, -4])
    torch.testing.assert_close(flipped.log_prob(POINTS.flip(-1)), m.log_prob(POINTS), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "other"), list(itertools.combinations_with_replacement(MIXTURES, 2)))
def test_product_is_pointwise(name, other):
    a, b = MIXTURES[name](), MIXTURES[other]()
    product, constant = a.product(b), a.log_inner_product(b)
    assert type(product) is type(a)
    assert product.log_weights.shape == (K * K,)
    expected = a.log_prob(POINTS) + b.log_prob(POINTS) - constant
    torch.testing.assert_close(product.log_prob(POINTS), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(constant, b.log_inner_product(a), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(b.product(a).log_prob(POINTS), expected, rtol=1e-12, atol=1e-12)


def test_inner_product_by_integration():
    w, v = [0.3, 0.7], [0.6, 0.1, 0.3]
    a = MixtureSameFamily(Categorical(T(w, dtype=F64)), Normal(T([0.0, 2.0], dtype=F64), T([0.5, 1.0], dtype=F64)))
    b = TorchMixture(
        Categorical(T(v, dtype=F64)), Normal(T([1.0, -3.0, 0.25], dtype=F64), T([0.25, 2.0, 1.5], dtype=F64))
    )

    def density(x, weights, m):
        c = m.component_distribution
        return sum(k * mp.npdf(x, i, s) for k, i, s in zip(weights, c.loc.tolist(), c.scale.tolist(), strict=True))

    with mp.workdps(25):
        truth = mp.log(mp.quad(lambda x: density(x, w, a) * density(x, v, b), list(range(-12, 13))))
    assert float(a.log_inner_product(b)) == pytest.approx(float(truth), rel=1e-14)
    assert isinstance(a.product(b).component_distribution, Normal)
    # a single Gaussian is a mixture of one
    q = stablekl.Normal(T(1.0, dtype=F64), T(0.5, dtype=F64))
    assert a.product(q).log_weights.shape == (2,)
    one = MixtureSameFamily(Categorical(T([1.0], dtype=F64)), Normal(T([1.0], dtype=F64), T([0.5], dtype=F64)))
    torch.testing.assert_close(a.log_inner_product(q), a.log_inner_product(one), rtol=0, atol=0)


@pytest.mark.parametrize("name", MIXTURES)
def test_moments(name):
    m = MIXTURES[name]()
    q = m.to_mvn()
    torch.testing.assert_close(q.mean, m.mean)
    torch.testing.assert_close(q.covariance_matrix, m.covariance_matrix)


def test_scalar_mixtures_give_normals():
    m = MixtureSameFamily(Categorical(T([[0.5, 0.5], [1.0, 0.0]])), Normal(T([-1.0, 1.0]), T([1.0, 2.0])))
    q = m.to_mvn()
    assert isinstance(q, stablekl.Normal)
    torch.testing.assert_close(q.mean, m.mean)
    torch.testing.assert_close(q.stddev, m.variance.sqrt())
    for call in (lambda: m.marginal([0]), lambda: m.condition([0], T([0.0]))):
        with pytest.raises(ValueError, match=r"shape \(\).*Independent\(component, 1\)"):
            call()


# ------------------------------------------------------------------------------------------------ conditioning


def test_a_value_1e4_standard_deviations_away():
    """Log-weights stay finite and normalised, and right against mpmath; must fail: the densities."""
    m = GaussianMixture(probs=PROBS, loc=LOC, scale_tril=TRIL)
    value = T([1e4], dtype=F64)
    given = m.condition([1], value)
    assert bool(given.log_weights.isfinite().all())
    assert float(given.log_weights.logsumexp(-1)) == pytest.approx(0.0, abs=1e-15)
    with mp.workdps(60):
        deviation = [mp.sqrt(sum(mp.mpf(x) ** 2 for x in TRIL[k, 1].tolist())) for k in range(K)]
        logs = [
            mp.log(mp.mpf(PROBS[k].item())) - ((10000 - mp.mpf(LOC[k, 1].item())) / deviation[k]) ** 2 / 2
            - mp.log(deviation[k])
            for k in range(K)
        ]  # fmt: skip
        total = max(logs)
        total += mp.log(sum(mp.exp(x - total) for x in logs))
        for ours, truth in zip(given.log_weights.tolist(), logs, strict=True):
            assert abs(ours - (truth - total)) < 8 * 2.0**-52 * max(abs(x) for x in logs)
    assert float(m.marginal([1]).component_log_probs(value).exp().max()) == 0


def test_batches_of_values():
    m = GaussianMixture(probs=torch.rand(5, 1, K), loc=torch.randn(4, K, D), scale_tril=TRIL.float())
    for shape in ((), (4,), (5, 1), (5, 4), (7, 5, 4), (2, 3, 1, 4)):
        x = torch.randn(*shape, 2)
        given = m.condition([3, 0], x)
        assert given.batch_shape == torch.broadcast_shapes(shape, (5, 4))
        assert given.component_distribution.loc.dtype == torch.float32
    x = torch.randn(7, 5, 4, 2)
    given, one = m.condition([3, 0], x), m.condition([3, 0], x[2])
    torch.testing.assert_close(given.component_distribution.loc[2], one.component_distribution.loc)
    torch.testing.assert_close(given.log_weights[2], one.log_weights)


def test_conditioning_twice():
    m = MIXTURES["scale_tril"]()
    once, twice = m.condition([2, 0], POINTS[0, [2, 0]]), m.condition([0], POINTS[0, :1]).condition([1], POINTS[0, 2:3])
    torch.testing.assert_close(once.log_prob(POINTS[:, [1, 3]]), twice.log_prob(POINTS[:, [1, 3]]))


def test_float32_is_rounded_once():
    single, double = (
        GaussianMixture(probs=PROBS.to(t), loc=LOC.to(t), scale_tril=TRIL.to(t)) for t in (torch.float32, F64)
    )
    double = double.to(torch.float32).to(F64)
    a, b = single.condition([1], T([0.5])), double.condition([1], T([0.5], dtype=F64))
    torch.testing.assert_close(a.component_distribution.loc.double(), b.component_distribution.loc, rtol=2**-23, atol=0)
    p, q = single.product(single), double.product(double)
    torch.testing.assert_close(
        p.component_distribution.scale_tril.double(), q.component_distribution.scale_tril, rtol=2**-23, atol=0
    )


def test_zero_weights():
    w = T([0.4, 0.0, 0.6], dtype=F64).requires_grad_()
    loc = LOC.clone().requires_grad_()
    m = GaussianMixture(probs=w, loc=loc, scale_tril=TRIL)
    alive = GaussianMixture(probs=w[[0, 2]], loc=loc[[0, 2]], scale_tril=TRIL[[0, 2]])
    for f in (
        lambda m: m.condition([0], POINTS[:, :1]).log_prob(POINTS[:, 1:]),
        lambda m: m.marginal([1, 0]).log_prob(POINTS[:, :2]),
        lambda m: m.product(m).log_prob(POINTS) + m.log_inner_product(m),
        lambda m: m.to_mvn().log_prob(POINTS),
    ):
        torch.testing.assert_close(f(m), f(alive))
        grads = [torch.autograd.grad(f(x).sum(), [loc, w], retain_graph=True) for x in (m, alive)]
        torch.testing.assert_close(grads[0][0], grads[1][0])
        assert bool(grads[0][1].isfinite().all())
    assert float(m.condition([0], POINTS[:, :1]).log_weights.max(0).values[1].detach()) == -math.inf


# --------------------------------------------------------------------------------------------------- transforms


def conditioned(logits, loc, tril, x):
    m = GaussianMixture(logits=logits, loc=loc, scale_tril=tril.tril(), validate_args=False)
    return m.condition([2, 0], x[:2]).log_prob(x[2:])


def restricted(logits, loc, tril, x):
    m = GaussianMixture(logits=logits, loc=loc, scale_tril=tril.tril(), validate_args=False)
    return m.marginal([2, 0]).log_prob(x[:2])


def multiplied(logits, loc, tril, x):
    m = GaussianMixture(logits=logits, loc=loc, scale_tril=tril.tril(), validate_args=False)
    other = GaussianMixture(logits=logits.flip(-1), loc=loc + 1, scale_diag=tril[..., 0].exp(), validate_args=False)
    return m.product(other).log_prob(x) + m.log_inner_product(other)


def matched(logits, loc, tril, x):
    m = GaussianMixture(logits=logits, loc=loc, scale_tril=tril.tril(), validate_args=False)
    return m.to_mvn().log_prob(x)


FUNCTIONS = [conditioned, restricted, multiplied, matched]
ARGUMENTS = (PROBS[:2].log(), LOC[:2, :3].clone(), TRIL[:2, :3, :3].clone(), POINTS[0, :3].clone())


@pytest.mark.parametrize("f", FUNCTIONS)
def test_derivatives(f):
    leaves = [x.clone().requires_grad_() for x in ARGUMENTS]
    assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize("f", FUNCTIONS)
def test_vmap(f):
    stacked = [torch.stack([x, x + 0.1 * x.abs()]) for x in ARGUMENTS]
    rows = torch.stack([f(*(x[i] for x in stacked)) for i in (0, 1)])
    torch.testing.assert_close(torch.vmap(f)(*stacked), rows)
    gradients = torch.vmap(torch.func.grad(f, argnums=(0, 1, 2, 3)))(*stacked)
    single = torch.func.grad(f, argnums=(0, 1, 2, 3))(*(x[1] for x in stacked))
    for g, s in zip(gradients, single, strict=True):
        torch.testing.assert_close(g[1], s)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while compiling
@pytest.mark.parametrize("f", FUNCTIONS)
def test_compile(f):
    torch.compiler.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    leaves = [x.clone().requires_grad_() for x in ARGUMENTS]
    torch.testing.assert_close(compiled(*leaves), f(*leaves))
    for a, b in zip(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(f(*leaves), leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------------------------ other families

ELEMENTWISE = {
    "laplace": lambda: Laplace(LOC, SCALES),
    "gamma": lambda: Gamma(SCALES, SCALES + 1),
    "beta": lambda: Beta(SCALES, SCALES + 1),
    "uniform": lambda: Uniform(LOC, LOC + SCALES, validate_args=False),
    "poisson": lambda: Poisson(SCALES),
    "shared rate": lambda: Gamma(SCALES, T(2.0, dtype=F64)),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_marginals_of_other_families(name):
    m = MixtureSameFamily(Categorical(PROBS), Independent(ELEMENTWISE[name](), 1))
    torch.manual_seed(0)
    x = m.sample((5,))
    marginal = m.marginal([3, 1])
    assert marginal.event_shape == (2,)
    by_component = m.component_distribution.base_dist.log_prob(x.unsqueeze(-2))[..., [3, 1]].sum(-1)
    torch.testing.assert_close(marginal.component_log_probs(x[:, [3, 1]]), by_component)


def test_other_families_are_refused():
    gamma = MixtureSameFamily(Categorical(PROBS), Independent(Gamma(SCALES, SCALES), 1))
    gaussian = MIXTURES["scale_tril"]()
    for call in (
        lambda: gamma.condition([0], T([1.0], dtype=F64)),
        lambda: gamma.product(gaussian),
        lambda: gaussian.product(gamma),
        lambda: gamma.log_inner_product(gamma),
        gamma.to_mvn,
        lambda: gamma.reduce(1),
    ):
        with pytest.raises(NotImplementedError, match=r"not available for mixtures of Independent\(Gamma, 1\)"):
            call()
    with pytest.raises(NotImplementedError, match=r"product is not available for Independent\(Gamma, 1\)"):
        gaussian.product(gamma.component_distribution)
    with pytest.raises(NotImplementedError, match="marginal is not available for mixtures of Dirichlet"):
        MixtureSameFamily(Categorical(PROBS), Dirichlet(SCALES)).marginal([0])


def test_errors_say_what_and_where():
    m = MIXTURES["scale_tril"]()
    for dims, message in (([4], "entry 4"), ([0, -4], "coordinate 0 twice"), ([], "empty")):
        with pytest.raises(ValueError, match=message):
            m.marginal(dims)
        with pytest.raises(ValueError, match=message):
            m.condition(dims, torch.zeros(len(dims), dtype=F64))
    with pytest.raises(ValueError, match="every coordinate"):
        m.condition(range(D), torch.zeros(D, dtype=F64))
    with pytest.raises(ValueError, match=r"\(2,\) to go with 2 dims, got \(3,\)"):
        m.condition([0, 1], torch.zeros(3, dtype=F64))
    with pytest.raises(ValueError, match="broadcast"):
        m.expand((5,)).condition([0], torch.zeros(4, 1, dtype=F64))
    with pytest.raises(ValueError, match="must be a tensor"):
        m.condition([0], [0.0])
    for mask in ([True, False, False, False], T([True, False, False, False])):
        with pytest.raises(ValueError, match="sequence of integers"):
            m.marginal(mask)
    for number in (0, K + 1, 1.0, "2"):
        with pytest.raises(ValueError, match="num_components must be an integer between 1 and 3"):
            m.reduce(number)
    with pytest.raises(ValueError, match=r"entry nan at \[1, 0\]"):
        m.condition([0], T([[0.0], [math.nan]], dtype=F64))
    with pytest.raises(ValueError, match=r"value at \[1\] has log-density -inf under every component"):
        m.condition([0], T([[0.0], [1e200]], dtype=F64))
    far = GaussianMixture(probs=PROBS, loc=LOC + 1e200, scale_tril=TRIL)
    assert float(m.log_inner_product(far)) == -math.inf
    with pytest.raises(ValueError, match="no overlap"):
        m.product(far)
    with pytest.raises(ValueError, match=r"\(4,\) and \(2,\)"):
        m.product(m.marginal([0, 1]))
