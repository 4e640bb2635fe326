"""Both tails and the quantiles of other families, 1e4 scales out, against the definition in mpmath."""

from __future__ import annotations

import math

import mpmath as mp
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import (
    Beta,
    Categorical,
    Cauchy,
    Chi2,
    Exponential,
    Gamma,
    Gumbel,
    HalfCauchy,
    HalfNormal,
    InverseGamma,
    Kumaraswamy,
    Laplace,
    LogNormal,
    Pareto,
    Uniform,
    Weibull,
)
from torch.distributions import MixtureSameFamily as TorchMixture

from stablekl import MixtureSameFamily
from stablekl.mixtures.family_tails import known_tails

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch._prims_common.check. is deprecated:FutureWarning"),
]
F64 = torch.float64
EPS = 2.0**-52
T = torch.tensor
WEIGHTS = (0.25, 0.75)
FAR = (1e-30, 1e-5, 0.5, 3.0, 100.0, 1e4)
BOTH = (-1e4, -40.0, -1.0, 0.0, 1.0, 3.0, 30.0, 1e4)
U = (1e-300, 1e-20, 1e-3, 0.3, 0.5, 0.8, 1 - 1e-9, 1 - 2.0**-53)


def hazard(t):
    return lambda x, *v: (-mp.expm1(-t(x, *v)), mp.exp(-t(x, *v)))


def laplace(x, m, s):
    z = (x - m) / s
    near = mp.exp(-abs(z)) / 2
    return (near, 1 - near) if z < 0 else (1 - near, near)


def normal(z):
    return mp.erfc(-z / mp.sqrt(2)) / 2, mp.erfc(z / mp.sqrt(2)) / 2


def gamma(x, a, b):
    return mp.gammainc(a, 0, b * x, regularized=True), mp.gammainc(a, b * x, mp.inf, regularized=True)


# name: class, parameters of the two components, (F, 1 - F) of one, points
CASES = {
    "exponential": (Exponential, [(1.0, 0.25)], hazard(lambda x, rate: rate * x), FAR),
    "weibull": (Weibull, [(1.0, 3.0), (1.5, 0.75)], hazard(lambda x, s, k: (x / s) ** k), FAR),
    "pareto": (
        Pareto,
        [(1.0, 1.0), (2.0, 0.5)],
        hazard(lambda x, s, a: a * mp.log(x / s)),
        (1 + 1e-12, 1.5, 1e4, 1e99),
    ),
    "kumaraswamy": (
        Kumaraswamy,
        [(2.0, 0.5), (0.5, 3.0)],
        hazard(lambda x, a, b: -b * mp.log1p(-(x**a))),
        (1e-30, 1e-5, 0.5, 0.9, 1 - 1e-12),
    ),
    "laplace": (Laplace, [(0.0, 3.0), (1.0, 2.0)], laplace, BOTH),
    "cauchy": (
        Cauchy,
        [(0.0, 3.0), (1.0, 2.0)],
        lambda x, m, s: (mp.atan2(1, (m - x) / s) / mp.pi, mp.atan2(1, (x - m) / s) / mp.pi),
        (-1e20, *BOTH, 1e20),
    ),
    "gumbel": (
        Gumbel,
        [(0.0, 3.0), (1.0, 2.0)],
        lambda x, m, s: (mp.exp(-mp.exp((m - x) / s)), -mp.expm1(-mp.exp((m - x) / s))),
        (-12.0, -5.0, -1.0, 0.0, 1.0, 3.0, 30.0, 1e3, 1e4),
    ),
    "half-normal": (HalfNormal, [(1.0, 2.0)], lambda x, s: (mp.erf(x / s / mp.sqrt(2)), 2 * normal(x / s)[1]), FAR),
    "half-Cauchy": (
        HalfCauchy,
        [(1.0, 2.0)],
        lambda x, s: (2 * mp.atan(x / s) / mp.pi, 2 * mp.atan2(s, x) / mp.pi),
        FAR,
    ),
    "log-normal": (LogNormal, [(0.0, 3.0), (1.0, 0.25)], lambda x, m, s: normal((mp.log(x) - m) / s), FAR),
    "uniform": (
        Uniform,
        [(0.0, 0.0), (1.0, 5.0)],
        lambda x, a, b: (min((x - a) / (b - a), mp.mpf(1)), max((b - x) / (b - a), mp.mpf(0))),
        (1e-30, 1e-5, 0.75, 1.5, 3.0, 5 - 1e-15),
    ),
    "gamma": (Gamma, [(2.0, 0.5), (1.0, 3.0)], gamma, (1e-30, 1e-5, 0.5, 3.0, 100.0, 600.0)),
    "chi2": (Chi2, [(2.0, 3.0)], lambda x, k: gamma(x, k / 2, mp.mpf(0.5)), (1e-30, 1e-5, 0.5, 3.0, 100.0, 600.0)),
    "inverse gamma": (
        InverseGamma,
        [(2.0, 0.5), (1.0, 3.0)],
        lambda x, a, b: gamma(1 / x, a, b)[::-1],
        (0.1, 1.0, 1e10),
    ),
}


def build(name, *parameters, ours=True):
    kind = CASES[name][0]
    parameters = parameters or [T(v, dtype=F64) for v in CASES[name][1]]
    component = kind(*parameters, validate_args=False)
    weights = Categorical(probs=T(WEIGHTS, dtype=F64), validate_args=False)
    return (MixtureSameFamily if ours else TorchMixture)(weights, component, validate_args=False)


def exact(name, x):
    """(F, 1 - F) of the mixture."""
    _, parameters, rule, _ = CASES[name]
    rows = [rule(mp.mpf(x), *map(mp.mpf, v)) for v in zip(*parameters, strict=True)]
    return tuple(mp.fsum(w * row[i] for w, row in zip(WEIGHTS, rows, strict=True)) for i in (0, 1))


@pytest.mark.parametrize("name", CASES)
def test_both_tails(name):
    points = CASES[name][3]
    x = T(points, dtype=F64, requires_grad=True)
    m = build(name)
    density = m.log_prob(x.detach())
    with mp.workdps(60):
        for side, sign in ((0, 1), (1, -1)):
            value = (m.log_sf if side else m.log_cdf)(x)
            (slope,) = torch.autograd.grad(value.sum(), x)
            for at, v, g, lp in zip(points, value.tolist(), slope.tolist(), density.tolist(), strict=True):
                part, rest = exact(name, at)[side], exact(name, at)[1 - side]
                expected = mp.log(part) if part < 0.5 else mp.log1p(-rest)
                if abs(expected) < 1e-300:
                    continue
                # x and what z is rounded to: an ulp of x changes the tail by x m
                conditioning = 1 + float(abs(at) * mp.exp(lp) / min(part, rest)) if min(part, rest) else 1.0
                assert abs(float((v - expected) / expected)) < 8 * EPS * (1 + conditioning), at
                assert g == pytest.approx(float(sign * mp.exp(lp) / part), rel=200 * EPS * (1 + conditioning)), at


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("gamma", "chi2", "inverse gamma")])
def test_quantiles(name):
    """To the conditioning of x, from 1e-300 to the last below 1."""
    u = T(U, dtype=F64, requires_grad=True)
    m = build(name)
    x = m.icdf(u)
    (slope,) = torch.autograd.grad(x.sum(), u)
    with mp.workdps(60):
        for at, v in zip(U, x.tolist(), strict=True):
            side = int(at > 0.5)
            tail = mp.mpf(at) if not side else 1 - mp.mpf(at)
            if v == 0:  # underflow: the quantile of 1e-300 of Weibull and Kumaraswamy is 1e-400 and less
                assert exact(name, 5e-324)[0] > tail
                continue
            got = exact(name, v)[side]
            step = abs(exact(name, v * (1 - EPS))[side] - got) + abs(exact(name, v * (1 + EPS))[side] - got)
            assert abs(got - tail) < 3 * (EPS * tail * (1 + abs(mp.log(tail))) + step), at
    inner = slice(2, 6)
    torch.testing.assert_close(slope[inner], (-m.log_prob(x[inner])).exp().detach(), rtol=1e-11, atol=0)


def test_torch_has_neither():
    """Must fail: Laplace 200 scales below, Exponential's tail, and Laplace's quantile of 1e-20."""
    assert float(build("laplace", ours=False).cdf(T(-400.0, dtype=F64))) == 0
    assert float(1 - build("exponential", ours=False).cdf(T(200.0, dtype=F64))) == 0
    assert float(Laplace(T(0.0, dtype=F64), 1.0).icdf(T(1e-20, dtype=F64))) == -math.inf
    assert float(build("laplace").log_cdf(T(-1e4, dtype=F64))) == pytest.approx(-5001.5 + math.log(0.375), rel=1e-15)


@pytest.mark.parametrize("name", CASES)
def test_ends_of_the_support(name):
    """Outside, at the edges and at infinity: 0 or 1, with finite gradients."""
    parameters = [T(v, dtype=F64, requires_grad=name not in ("gamma", "chi2", "inverse gamma")) for v in CASES[name][1]]
    m = build(name, *parameters)
    low, high = (m.icdf(T(v, dtype=F64)).item() for v in (0.0, 1.0)) if known_quantile(m) else (0.0, math.inf)
    x = T([-math.inf, low, high, math.inf], dtype=F64)
    assert m.log_cdf(x).tolist() == [-math.inf, -math.inf, 0.0, 0.0]
    assert m.log_sf(x).tolist() == [0.0, 0.0, -math.inf, -math.inf]
    if parameters[0].requires_grad:
        total = sum(f(x)[i] for f, ends in ((m.log_cdf, (2, 3)), (m.log_sf, (0, 1)), (m.cdf, range(4))) for i in ends)
        for g in torch.autograd.grad(total, parameters):
            assert bool(g.isfinite().all())


def known_quantile(m):
    tails = known_tails(m.component_distribution)
    return tails is not None and tails.quantile is not None


def test_bounded_components_side_by_side():
    """The end of one component's support does not bound the quantiles of the mixture."""
    m = MixtureSameFamily(
        Categorical(T([0.25, 0.75], dtype=F64)), Uniform(T([0.0, 1.0], dtype=F64), T([2.0, 5.0], dtype=F64))
    )
    torch.testing.assert_close(m.icdf(T([0.05, 0.5, 0.95], dtype=F64)), T([0.4, 7 / 3, 4.7333333333333333], dtype=F64))


def test_float32_is_rounded_once():
    x = torch.linspace(-60, 60, 50)
    single = MixtureSameFamily(Categorical(T(WEIGHTS)), Laplace(T([0.0, 3.0]), T([1.0, 2.0])))
    for f in ("log_cdf", "log_sf", "cdf"):
        value = getattr(single, f)(x)
        assert value.dtype == torch.float32
        expected = getattr(build("laplace"), f)(x.double())
        torch.testing.assert_close(value.double(), expected, rtol=2.0**-24, atol=1e-38)


def test_derived_classes_keep_their_own_cdf():
    class Mine(Exponential):
        def cdf(self, value):
            return super().cdf(value) ** 2

    m = MixtureSameFamily(Categorical(torch.ones(2)), Mine(T([1.0, 2.0])))
    x = T([0.5, 1.0])
    torch.testing.assert_close(m.log_cdf(x), m.cdf(x).log())
    assert known_tails(Beta(T([1.0, 2.0]), 1.0)) is None


@pytest.mark.parametrize("name", ["weibull", "half-Cauchy"])
def test_transforms(name):
    leaves = [T(v, dtype=F64, requires_grad=True) for v in CASES[name][1]]
    x = T([0.75, 1.75], dtype=F64, requires_grad=True)

    def f(x, *parameters):
        m = build(name, *parameters)
        return m.log_cdf(x) - 2 * m.log_sf(x)

    assert gradcheck(f, [x, *leaves], check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(f, [x, *leaves], fast_mode=True)
    in_dims = (0, *[None] * len(leaves))
    torch.testing.assert_close(torch.vmap(f, in_dims)(x, *leaves), f(x, *leaves), rtol=1e-14, atol=1e-15)
    assert gradcheck(lambda u, *v: build(name, *v).icdf(u), [T([0.1, 0.8], dtype=F64, requires_grad=True), *leaves])


def test_compile():
    leaves = [T(v, dtype=F64, requires_grad=True) for v in CASES["laplace"][1]]
    x = T([-50.0, 0.75, 60.0], dtype=F64)

    def f(x, *parameters):
        return build("laplace", *parameters).log_sf(x)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, *leaves), f(x, *leaves), rtol=1e-14, atol=0)
