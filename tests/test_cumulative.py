"""Distribution and survival functions of mixtures against the definition in mpmath."""

from __future__ import annotations

import math

import mpmath as mp
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import Categorical, Exponential, Gumbel, Independent, Laplace, MultivariateNormal, Normal
from torch.distributions import MixtureSameFamily as TorchMixture

from stablekl import GaussianMixture, MixtureSameFamily

from .normal_mixtures import CASES, EPS, F64, mixture, tails

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch._prims_common.check. is deprecated:FutureWarning"),
]
T = torch.tensor
STEPS = (-1e4, -100.0, -30.0, -8.0, -3.0, -1.0, -0.3, 0.0, 0.7, 2.0, 5.0, 9.0, 40.0, 1e4)


def log_of(part, rest):
    return mp.log(part) if part < 0.5 else mp.log1p(-rest)


def relative(got: float, expected: mp.mpf) -> float:
    """Relative error in eps; 0 below the normal numbers."""
    return 0.0 if abs(expected) < 1e-300 else float(abs((mp.mpf(got) - expected) / expected)) / EPS


@pytest.mark.parametrize("name", CASES)
def test_both_tails(name):
    """To 1e4 standard deviations either side: value, and slope up to the conditioning of exp(-z^2/2)."""
    parameters = CASES[name]
    points = sorted({m + t * s for _, m, s in zip(*parameters, strict=True) for t in STEPS})
    x = T(points, dtype=F64, requires_grad=True)
    m = mixture(*parameters)
    for f, sign in ((m.log_cdf, 1), (m.log_sf, -1)):
        value = f(x)
        (slope,) = torch.autograd.grad(value.sum(), x)
        with mp.workdps(60):
            for at, v, g in zip(points, value.tolist(), slope.tolist(), strict=True):
                *parts, density = tails(at, *parameters)
                part, rest = parts[::sign]
                assert relative(v, log_of(part, rest)) < 10, at  # 5.0 at worst
                assert relative(g, sign * density / part) < 400, at  # 160 at worst
    if name == "plain":
        far = float(m.log_cdf(T(-2.0 - 1e4, dtype=F64)))
        assert -5.1e7 < far < -5e7
        assert math.isfinite(far)


def test_textbook_is_infinite():
    """Must fail: the logarithm of torch's own cdf, 40 standard deviations out."""
    m = TorchMixture(Categorical(T([0.5, 0.5], dtype=F64)), Normal(T([0.0, 1.0], dtype=F64), T([1.0, 1.0], dtype=F64)))
    assert float(m.cdf(T(-40.0, dtype=F64)).log()) == -math.inf
    assert float(torch.log1p(-m.cdf(T(40.0, dtype=F64)))) == -math.inf
    ours = mixture([0.5, 0.5], [0.0, 1.0], [1.0, 1.0])
    assert math.isfinite(float(ours.log_cdf(T(-40.0, dtype=F64))))
    # and one log-sum-exp has nothing left of the upper tail
    l_k = torch.special.log_ndtr(T([10.0, 9.0], dtype=F64)) + math.log(0.5)
    x = T(10.0, dtype=F64)
    with mp.workdps(60):
        expected = log_of(*tails(10.0, [0.5, 0.5], [0.0, 1.0], [1.0, 1.0])[:2])
        assert relative(float(torch.logsumexp(l_k, -1)), expected) > 1e10
        assert relative(float(ours.log_cdf(x)), expected) < 10


def test_gradients_of_the_parameters():
    """In mpmath; those of the weights too in the upper tail, where w_k Phi_k/F is what the normalisation takes away."""
    logits, loc, scale = [0.3, -0.5], [-1.0, 1.0], [1.0, 0.5]
    leaves = [T(v, dtype=F64, requires_grad=True) for v in (logits, loc, scale)]
    m = MixtureSameFamily(Categorical(logits=leaves[0]), Normal(*leaves[1:]))
    with mp.workdps(60):
        w = [mp.exp(mp.mpf(v)) for v in logits]
        for at in (-20.0, -1.0, 0.5, 8.0, 15.0):
            f, sf, _ = tails(at, w, loc, scale)
            expected = [[], [], []]
            for k, (m_k, s_k) in enumerate(zip(loc, scale, strict=True)):
                z = (mp.mpf(at) - m_k) / s_k
                share, slope = w[k] / sum(w), mp.npdf(z) / s_k
                one = tails(at, [1], [m_k], [s_k])
                expected[0].append(share * (one[0] - f if f < 0.5 else sf - one[1]) / f)
                expected[1].append(-share * slope / f)
                expected[2].append(-share * slope * z / f)
            grads = torch.autograd.grad(m.log_cdf(T(at, dtype=F64)), leaves, retain_graph=True)
            for g, e in zip(grads, expected, strict=True):
                top = max(map(abs, e))
                assert max(float(abs(a - b) / top) for a, b in zip(g.tolist(), e, strict=True)) < 1e-13


def test_joint_distribution_of_diagonal_components():
    w, loc, scale = [0.25, 0.75], [[0.0, 1.0, 2.0], [3.0, -1.0, 0.5]], [[1.0, 2.0, 0.5], [1.0, 1.0, 3.0]]
    m = GaussianMixture(probs=T(w, dtype=F64), loc=T(loc, dtype=F64), scale_diag=T(scale, dtype=F64))
    points = [[0.5, 0.5, 0.5], [-40.0, 1.0, 2.0], [-1e4, -1e4, 3.0], [9.0, 12.0, 11.0], [1e4, 1e4, 0.0]]
    x = T(points, dtype=F64)
    with mp.workdps(60):
        for at, lower, upper in zip(points, m.log_cdf(x).tolist(), m.log_sf(x).tolist(), strict=True):
            both = [
                [tails(a, [1], [b], [c]) for a, b, c in zip(at, *p, strict=True)] for p in zip(loc, scale, strict=True)
            ]
            for got, side in ((lower, 0), (upper, 1)):
                joint = mp.fsum(v * mp.fprod(t[side] for t in p) for v, p in zip(w, both, strict=True))
                assert relative(got, mp.log(joint)) < 10
    torch.testing.assert_close(m.cdf(x), m.log_cdf(x).exp())
    y = m.sample((20000,))
    for at in ([0.5, 0.5, 0.5], [2.0, 0.0, 3.0]):
        share = (y <= T(at)).all(-1).double().mean()
        assert abs(float(share - m.cdf(T(at, dtype=F64)))) < 0.015


def test_refusals_say_why():
    full = GaussianMixture(probs=T([0.5, 0.5]), loc=torch.zeros(2, 2), scale_tril=torch.eye(2).expand(2, 2, 2))
    with pytest.raises(NotImplementedError, match=r"correlated normal coordinates.*scale_diag"):
        full.log_cdf(torch.zeros(2))
    with pytest.raises(NotImplementedError, match="Laplace"):
        MixtureSameFamily(Categorical(torch.ones(2)), Independent(Laplace(torch.zeros(2, 3), torch.ones(2, 3)), 1)).cdf(
            torch.zeros(3)
        )
    # one coordinate is not correlated with anything
    one = GaussianMixture(probs=T([0.5, 0.5]), loc=T([[0.0], [1.0]]), covariance_matrix=T([[[1.0]], [[4.0]]]))
    two = GaussianMixture(probs=T([0.5, 0.5]), loc=T([[0.0], [1.0]]), scale_diag=T([[1.0], [2.0]]))
    torch.testing.assert_close(one.log_sf(T([3.0])), two.log_sf(T([3.0])))


def test_other_families():
    w = T([0.25, 0.75], dtype=F64)
    x = T([-1.0, 0.5, 3.0, 800.0], dtype=F64, requires_grad=True)
    rate = T([1.0, 2.0], dtype=F64, requires_grad=True)
    m = MixtureSameFamily(Categorical(w), Exponential(rate))
    lower, upper = m.log_cdf(x), m.log_sf(x)
    inner = x[1:3, None]
    torch.testing.assert_close(lower[1:3], (w * -torch.expm1(-inner * rate)).sum(-1).log())
    torch.testing.assert_close(upper[1:3], (w * (-inner * rate).exp()).sum(-1).log())
    assert lower[0] == -math.inf
    assert upper[0] == lower[3] == 0
    assert float(upper[3].detach()) == pytest.approx(-800 + math.log(0.25), rel=1e-15)  # torch's cdf is 1 there
    for g in torch.autograd.grad((lower[1:] + upper[:3]).sum(), [x, rate]):
        assert bool(g.isfinite().all())
    gumbel = MixtureSameFamily(Categorical(w), Gumbel(T([0.0, 3.0], dtype=F64), T([1.0, 2.0], dtype=F64)))
    torch.testing.assert_close(gumbel.log_cdf(inner), gumbel.cdf(inner).log())
    torch.testing.assert_close(gumbel.log_sf(inner), torch.log1p(-gumbel.cdf(inner)))


def test_infinite_points_and_dead_components():
    loc = T([0.0, math.nan, 1.0], dtype=F64, requires_grad=True)
    m = MixtureSameFamily(
        Categorical(probs=T([0.5, 0.0, 0.5], dtype=F64)), Normal(loc, torch.ones(3, dtype=F64), validate_args=False)
    )
    x = T([-math.inf, 0.3, math.inf], dtype=F64, requires_grad=True)
    for f, ends in ((m.log_cdf, (-math.inf, 0.0)), (m.log_sf, (0.0, -math.inf))):
        value = f(x)
        assert (float(value[0].detach()), float(value[2].detach())) == ends
        grads = torch.autograd.grad(value[1], [loc, x], retain_graph=True)
        assert all(bool(g.isfinite().all()) for g in grads)
        assert grads[0][1] == 0
        assert bool(torch.autograd.grad(value.sum(), x)[0].isfinite().all())
    free = MixtureSameFamily(Categorical(probs=T([0.5, 0.5], dtype=F64)), Normal(T([0.0, 1.0]), 1.0), False)
    assert bool(free.log_cdf(T(math.nan, dtype=F64)).isnan())


def test_invalid_values_say_where():
    """Shapes that broadcast with the event's would count one coordinate for all of them."""
    m = GaussianMixture(torch.zeros(2), loc=torch.zeros(2, 3), scale_diag=torch.ones(2, 3))
    scalar = mixture([0.25, 0.75], [-2.0, 2.0], [1.0, 0.5])
    laplace = MixtureSameFamily(Categorical(torch.ones(2)), Laplace(T([0.0, 5.0]), T([1.0, 2.0])))
    for name in ("cdf", "log_cdf", "log_sf"):
        for bad in (torch.zeros(1), torch.zeros(5, 1), torch.zeros(2), torch.zeros(())):
            with pytest.raises(ValueError, match=r"must end in the event shape \(3,\)"):
                getattr(m, name)(bad)
        with pytest.raises(ValueError, match=r"NaN at \[1, 2\]"):
            getattr(m, name)(T([[0.0, 0.0, 0.0], [0.0, 0.0, math.nan]]))
        for other in (scalar, laplace):
            with pytest.raises(ValueError, match=r"NaN at \[1\]"):
                getattr(other, name)(T([0.0, math.nan]))
            with pytest.raises(ValueError, match="must be a tensor"):
                getattr(other, name)(0.0)
            with pytest.raises(ValueError, match="broadcast with the batch shape"):
                getattr(other.expand((3,)), name)(torch.zeros(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_distribution_function_is_rounded_once(dtype):
    """Not the exponential of a rounded logarithm l, which is off by l eps: 30 eps, the bound of the twin below."""
    half = mixture([0.25, 0.75], [-2.0, 2.0], [1.0, 0.5], dtype)
    x = torch.linspace(-6 if dtype == torch.float16 else -14, 0, 40).to(dtype)
    exact = mixture([0.25, 0.75], [-2.0, 2.0], [1.0, 0.5]).cdf(x.double())
    normal = exact > torch.finfo(dtype).tiny

    def error(value):
        return float(((value.double() - exact).abs() / exact)[normal].max()) / torch.finfo(dtype).eps

    assert error(half.cdf(x)) <= 0.51
    assert error(half.log_cdf(x).exp()) > 2


def test_shapes_and_dtypes():
    m = GaussianMixture(torch.zeros(4, 2), loc=torch.randn(4, 2, 3), scale_diag=torch.ones(4, 2, 3))
    assert m.log_cdf(torch.zeros(5, 1, 3)).shape == m.log_sf(torch.zeros(5, 4, 3)).shape == (5, 4)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        half = mixture([0.25, 0.75], [-2.0, 2.0], [1.0, 0.5], dtype)
        x = T([-30.0, -1.0, 0.25, 4.0], dtype=dtype)
        expected = mixture([0.25, 0.75], [-2.0, 2.0], [1.0, 0.5]).log_cdf(x.double())
        assert half.log_cdf(x).dtype == half.cdf(x).dtype == dtype
        torch.testing.assert_close(half.log_cdf(x).double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_transforms():
    g = torch.Generator().manual_seed(0)
    parameters = [torch.randn(3, generator=g, dtype=F64), torch.randn(3, 2, generator=g, dtype=F64)]
    parameters.append(torch.rand(3, 2, generator=g, dtype=F64) + 0.5)

    def f(x, logits, loc, scale):
        m = GaussianMixture(logits, loc=loc, scale_diag=scale, validate_args=False)
        return m.log_cdf(x) - 2 * m.log_sf(x)

    x = torch.randn(2, 2, generator=g, dtype=F64) * 2
    leaves = [t.clone().requires_grad_() for t in (x, *parameters)]
    assert gradcheck(f, leaves, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(f, leaves, fast_mode=True)
    batched = torch.vmap(f, in_dims=(0, None, None, None))(x, *parameters)
    torch.testing.assert_close(batched, f(x, *parameters), rtol=1e-14, atol=0)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), f(*leaves), rtol=1e-13, atol=0)
    ours, theirs = (torch.autograd.grad(c(*leaves).sum(), leaves) for c in (compiled, f))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_torch_agrees_where_it_can():
    m = mixture([0.25, 0.75], [-2.0, 2.0], [1.0, 0.5])
    theirs = TorchMixture(m.mixture_distribution, m.component_distribution)
    x = torch.linspace(-3, 5, 50, dtype=F64)
    torch.testing.assert_close(m.cdf(x), theirs.cdf(x), rtol=1e-12, atol=1e-15)
    mvn = MultivariateNormal(torch.zeros(2, 1, dtype=F64), torch.eye(1, dtype=F64))
    torch.testing.assert_close(
        MixtureSameFamily(Categorical(torch.ones(2, dtype=F64)), mvn).cdf(T([0.0], dtype=F64)), T(0.5, dtype=F64)
    )
