"""Quantiles of scalar mixtures against the distribution function in mpmath."""

from __future__ import annotations

import math

import mpmath as mp
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import (
    Beta,
    Categorical,
    Exponential,
    Gumbel,
    Laplace,
    LogNormal,
    Normal,
    Uniform,
)

from stablekl import GaussianMixture, MixtureSameFamily
from stablekl.mixtures import quantile as module

from .normal_mixtures import CASES, EPS, F64, mixture, tails

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch._prims_common.check. is deprecated:FutureWarning"),
]
T = torch.tensor
PROBABILITIES = (
    *(1e-300, 1e-200, 1e-100, 1e-30, 1e-16, 1e-10, 1e-5, 0.01, 0.1, 0.2, 0.25, 0.25 + 1e-9, 0.3, 0.4, 0.49),
    *(0.5, 0.51, 0.6, 0.7, 0.75, 0.9, 0.99, 1 - 1e-10, 1 - 2**-52, 1 - 2**-53),
)


@pytest.mark.parametrize("name", CASES)
def test_to_the_conditioning(name, monkeypatch):
    """|log F(x) - log u|, in the nearer tail, against eps (1 + |log u|) and what an ulp of x changes; and how fast."""
    evaluations = [0]
    root = module.find_root

    def counted(rise, *rest):
        def f(x):
            evaluations[0] += 1
            return rise(x)

        return root(f, *rest)

    monkeypatch.setattr(module, "find_root", counted)
    parameters = CASES[name]
    x = mixture(*parameters).icdf(T(PROBABILITIES, dtype=F64))
    assert evaluations[0] < 40  # 26 at worst
    assert bool((x.diff() >= 0).all())
    with mp.workdps(60):
        for u, at in zip(PROBABILITIES, x.tolist(), strict=True):
            lower, upper, density = tails(at, *parameters)
            tail, target = (lower, mp.mpf(u)) if u <= 0.5 else (upper, 1 - mp.mpf(u))
            error = abs(mp.log(tail) - mp.log(target))
            unit = EPS * (1 + abs(mp.log(target))) + density / tail * math.ulp(at)
            assert error < 2 * unit, u  # 0.99 at worst


def test_bracketing_the_distribution_function_itself():
    """Must fail: bisection of F in ordinary numbers, which is 0 where the quantile of 1e-300 might be."""
    m = mixture([0.5, 0.5], [0.0, 10.0], [1.0, 1.0])
    low, high = T(-100.0, dtype=F64), T(100.0, dtype=F64)
    for _ in range(200):
        middle = (low + high) / 2
        below = m.component_distribution.cdf(middle).mean() < 1e-300
        low, high = (middle, high) if below else (low, middle)
    exact = m.icdf(T(1e-300, dtype=F64))
    with mp.workdps(40):
        truth = mp.findroot(lambda x: mp.log(mp.ncdf(x) / 2) - mp.log(mp.mpf("1e-300")), -37.0)
        assert abs(float(exact - float(truth))) < 1e-14
    assert abs(float(low - exact)) > 20


def test_random_mixtures():
    """Scales 1e-4 to 1e4, weights from 1e-20, means up to 1e7 apart: F(icdf(u)) = u wherever x can tell."""
    g = torch.Generator().manual_seed(0)
    for _ in range(25):
        k = int(torch.randint(1, 8, (), generator=g))
        w, loc, scale = torch.rand(3, k, generator=g, dtype=F64)
        loc = torch.randn(k, generator=g, dtype=F64) * 10 ** (8 * loc[0] - 1)
        m = MixtureSameFamily(Categorical(10 ** (-20 * w)), Normal(loc, 10 ** (8 * scale - 4)))
        u = torch.rand(50, generator=g, dtype=F64)
        u = torch.cat([u, 10 ** (-300 * u), (1 - 10 ** (-16 * u)).clamp(max=1 - 2**-53)])
        x = m.icdf(u)
        lower = u <= 0.5
        log_tail = torch.where(lower, m.log_cdf(x), m.log_sf(x))
        log_p = torch.where(lower, u.log(), torch.log1p(-u))
        ulp = (torch.nextafter(x, T(math.inf, dtype=F64)) - x).abs()
        unit = EPS * (1 + log_p.abs()) + (m.log_prob(x) - log_tail).exp() * ulp
        error = float(((log_tail - log_p).abs() / unit).max())
        assert error < 5


def test_gradient_in_mpmath():
    for name in ("plain", "far", "scales"):
        w, loc, scale = CASES[name]
        logits = [math.log(v) for v in w]
        leaves = [T(v, dtype=F64, requires_grad=True) for v in (logits, loc, scale)]
        m = MixtureSameFamily(Categorical(logits=leaves[0]), Normal(*leaves[1:]))
        for probability in (1e-200, 1e-3, 0.3, 0.6, 1 - 1e-9):
            u = T(probability, dtype=F64, requires_grad=True)
            x = m.icdf(u)
            got = torch.autograd.grad(x, [u, *leaves], retain_graph=True)
            with mp.workdps(80):
                weights = [mp.exp(mp.mpf(v)) for v in logits]
                at = float(x.detach())
                f, sf, density = tails(at, weights, loc, scale)
                expected = [[1 / density], [], [], []]
                for v, m_k, s_k in zip(weights, loc, scale, strict=True):
                    z, share = (mp.mpf(at) - m_k) / s_k, v / sum(weights)
                    one = tails(at, [1], [m_k], [s_k])
                    change = one[0] - f if f < 0.5 else sf - one[1]
                    expected[1].append(-share * change / density)
                    expected[2].append(share * one[2] / density)
                    expected[3].append(share * one[2] / density * z)
                for a, e in zip(got, expected, strict=True):
                    top = max(map(abs, e))
                    if top > 1e-300:
                        assert (
                            max(float(abs(c - d) / top) for c, d in zip(a.reshape(-1).tolist(), e, strict=True)) < 1e-12
                        )


def test_ends_and_errors():
    loc = T([0.0, 1.0], dtype=F64, requires_grad=True)
    m = MixtureSameFamily(Categorical(torch.ones(2)), Normal(loc, 1.0))
    u = T([0.0, 0.5, 1.0], dtype=F64, requires_grad=True)
    x = m.icdf(u)
    assert x.tolist() == [-math.inf, pytest.approx(0.5), math.inf]
    grads = torch.autograd.grad(x[1], [loc, u], retain_graph=True)
    assert all(bool(g.isfinite().all()) for g in grads)
    assert torch.autograd.grad(x.sum(), u)[0].tolist()[::2] == [0.0, 0.0]
    uniform = MixtureSameFamily(Categorical(torch.ones(2)), Uniform(T([0.0, 4.0]), T([1.0, 6.0])))
    assert uniform.icdf(T([0.0, 0.25, 0.75, 1.0])).tolist() == [0.0, 0.5, 5.0, 6.0]
    for bad in (math.nan, -1e-9, 1.0 + 1e-6):
        with pytest.raises(ValueError, match=r"at \[1\] is not a probability"):
            m.icdf(T([0.5, bad]))
    with pytest.raises(ValueError, match="tensor"):
        m.icdf(0.5)
    with pytest.raises(NotImplementedError, match="no quantiles"):
        GaussianMixture(torch.zeros(2), loc=torch.zeros(2, 2), scale_diag=torch.ones(2, 2)).icdf(T(0.5))
    with pytest.raises(ValueError, match=r"shape \(2,\) must broadcast with the batch shape \(3,\)"):
        m.expand((3,)).icdf(T([0.5, 0.5]))
    with pytest.raises(NotImplementedError, match="Beta has no icdf"):
        MixtureSameFamily(Categorical(torch.ones(2)), Beta(T([1.0, 2.0]), T([2.0, 2.0]))).icdf(T(0.5))


def test_marginals_have_quantiles():
    """Vectors of length 1 have what scalars have: it is where the error of longer ones sends its reader."""
    g = torch.Generator().manual_seed(1)
    loc, a = torch.randn(4, 2, 3, generator=g, dtype=F64), torch.randn(4, 2, 3, 3, generator=g, dtype=F64)
    cov = a @ a.mT + torch.eye(3, dtype=F64)
    m = GaussianMixture(probs=torch.ones(4, 2), loc=loc, covariance_matrix=cov)
    u = torch.rand(5, 4, generator=g, dtype=F64)
    x = m.marginal([2]).icdf(u)
    scalars = MixtureSameFamily(Categorical(torch.ones(4, 2)), Normal(loc[..., 2], cov[..., 2, 2].sqrt()))
    assert x.shape == (5, 4, 1)
    torch.testing.assert_close(x.squeeze(-1), scalars.icdf(u), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(m.marginal([2]).cdf(x), u, rtol=1e-13, atol=0)


FAMILIES = {
    "laplace": lambda a: Laplace(T([0.0, 5.0], dtype=F64) + a, T([1.0, 0.5], dtype=F64)),
    "exponential": lambda a: Exponential(T([1.0, 0.1], dtype=F64) + a),
    "gumbel": lambda a: Gumbel(T([0.0, 9.0], dtype=F64) + a, T([1.0, 2.0], dtype=F64)),
    "log-normal": lambda a: LogNormal(T([0.0, 3.0], dtype=F64) + a, T([1.0, 0.25], dtype=F64)),
    "uniform": lambda a: Uniform(T([0.0, 1.0], dtype=F64) + a, T([2.0, 5.0], dtype=F64) + a),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families(name):
    u = T([0.001, 0.45, 0.999], dtype=F64, requires_grad=True)
    logits = T([0.3, -0.2], dtype=F64, requires_grad=True)
    shift = T(0.1, dtype=F64, requires_grad=True)

    def f(u, logits, shift):
        return MixtureSameFamily(Categorical(logits=logits), FAMILIES[name](shift)).icdf(u)

    m = MixtureSameFamily(Categorical(logits=logits), FAMILIES[name](shift))
    torch.testing.assert_close(m.cdf(f(u, logits, shift)), u, rtol=0, atol=4e-16)
    assert gradcheck(f, (u, logits, shift), eps=1e-7, atol=1e-4, fast_mode=True)
    if name in ("laplace", "log-normal"):
        assert gradgradcheck(f, (u[1:2].detach().requires_grad_(), logits, shift), eps=1e-5, atol=1e-3, fast_mode=True)
    single = MixtureSameFamily(Categorical(T([1.0, 0.0], dtype=F64)), FAMILIES[name](shift))
    torch.testing.assert_close(single.icdf(u), single.component_distribution.icdf(u[:, None])[:, 0])


def test_dead_components_are_ignored():
    loc = T([0.0, math.nan], dtype=F64, requires_grad=True)
    m = MixtureSameFamily(
        Categorical(T([1.0, 0.0], dtype=F64)), Normal(loc, T([1.0, -1.0], dtype=F64), validate_args=False)
    )
    u = T([1e-300, 0.3, 0.9], dtype=F64)
    x = m.icdf(u)
    torch.testing.assert_close(x, torch.special.ndtri(u), rtol=4e-16, atol=0)
    assert torch.autograd.grad(x.sum(), loc)[0].tolist() == [3.0, 0.0]


def test_shapes_and_dtypes():
    m = MixtureSameFamily(Categorical(torch.ones(4, 2)), Normal(torch.randn(4, 2), torch.ones(4, 2)))
    assert m.icdf(T(0.5)).shape == (4,)
    assert m.icdf(torch.rand(5, 1)).shape == m.icdf(torch.rand(5, 4)).shape == (5, 4)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = mixture([0.25, 0.75], [-2.0, 2.0], [1.0, 0.5], dtype).icdf(T([0.125, 0.75], dtype=dtype))
        expected = mixture([0.25, 0.75], [-2.0, 2.0], [1.0, 0.5]).icdf(T([0.125, 0.75], dtype=F64))
        assert x.dtype == dtype
        torch.testing.assert_close(x, expected.to(dtype), rtol=0, atol=0)


def test_transforms():
    g = torch.Generator().manual_seed(0)
    u = torch.rand(3, 4, generator=g, dtype=F64)
    parameters = [torch.randn(3, 2, generator=g, dtype=F64) for _ in range(2)]
    parameters.append(torch.rand(3, 2, generator=g, dtype=F64) + 0.5)

    def f(u, logits, loc, scale):
        component = Normal(loc, scale, validate_args=False)
        return MixtureSameFamily(Categorical(logits=logits, validate_args=False), component, validate_args=False).icdf(
            u
        )

    rows = torch.stack([f(*row) for row in zip(u, *parameters, strict=True)])
    torch.testing.assert_close(torch.vmap(f)(u, *parameters), rows, rtol=1e-15, atol=0)
    leaves = [t[0].clone().requires_grad_() for t in (u, *parameters)]
    assert gradcheck(f, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, leaves, fast_mode=True)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), f(*leaves), rtol=1e-15, atol=0)
    ours, theirs = (torch.autograd.grad(c(*leaves).sum(), leaves) for c in (compiled, f))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)

    def family(u, loc):
        component = Laplace(loc, torch.ones_like(loc), validate_args=False)
        weights = Categorical(torch.ones(2, dtype=F64), validate_args=False)
        return MixtureSameFamily(weights, component, validate_args=False).icdf(u)

    rows = torch.stack([family(*row) for row in zip(u[:2, :1], parameters[1][:2], strict=True)])
    torch.testing.assert_close(torch.vmap(family)(u[:2, :1], parameters[1][:2]), rows, rtol=1e-13, atol=1e-15)
