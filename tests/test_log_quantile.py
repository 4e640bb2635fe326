"""Quantiles of log-probabilities, against mpmath."""

from __future__ import annotations

import math

import pytest
import torch
from mpmath import mp
from torch.distributions import Categorical, Laplace

import stablekl

F64 = torch.float64
EPS = 2.0**-52
MIXTURES = {
    "one": ([0.0], [1.5], [2.0]),
    "apart": ([-1.0, -0.5], [-300.0, 400.0], [1e-4, 3.0]),
    "rare": ([-46.0, 0.0, -2.0], [80.0, 1e4, 1e4 + 1], [5.0, 1e-3, 0.5]),
    "none": ([-math.inf, 0.0, -1.0], [1e300, -1.0, 2.0], [1e-300, 1.0, 0.3]),
}
LOGS = [-1e-17, -1e-3, -0.5, -0.69, -0.7, -3.0, -700.0, -1e4, -5e7, -1e12]


def f64(x):
    return torch.tensor(x, dtype=F64)


def mixture(logits, loc, scale, **options):
    options = {"validate_args": False, **options}
    component = stablekl.Normal(loc, scale, **options)
    return stablekl.MixtureSameFamily(Categorical(logits=logits, validate_args=False), component, **options)


def log_tail(name, x, upper):
    """The exact logarithm of a tail, of the weights as given."""
    rows = [tuple(map(mp.mpf, row)) for row in zip(*MIXTURES[name], strict=True) if row[0] > -math.inf]
    total = mp.fsum(mp.exp(w) for w, *_ in rows)

    def tail(z):
        if z < 1e3:
            return mp.erfc(z / mp.sqrt(2)) / 2
        return mp.exp(-z * z / 2) / mp.sqrt(2 * mp.pi) / z * (1 - z**-2 + 3 * z**-4 - 15 * z**-6 + 105 * z**-8)

    sign = 1 if upper else -1
    return mp.log(mp.fsum(mp.exp(w) / total * tail(sign * (mp.mpf(x) - mu) / sd) for w, mu, sd in rows))


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("name", MIXTURES)
def test_to_the_conditioning_of_the_point(name, upper):
    m = mixture(*map(f64, MIXTURES[name]))
    found = (m.ilogccdf if upper else m.ilogcdf)(f64(LOGS))
    with mp.workdps(50):
        for x, given in zip(found.tolist(), LOGS, strict=True):
            small = given <= -math.log(2)
            wanted = mp.mpf(given) if small else mp.log(-mp.expm1(given))
            side = upper if small else not upper
            got = log_tail(name, x, side)
            ulp = abs(log_tail(name, math.nextafter(x, math.inf), side) - got)
            assert abs(got - wanted) <= 2 * (EPS * (1 + abs(wanted)) + ulp)


def test_ten_thousand_standard_deviations():
    m = mixture(f64([0.0, 0.0]), f64([0.0, 10.0]), f64([1.0, 1.0]))
    x = f64([-1e4, -40.0, 1.0])
    torch.testing.assert_close(m.ilogcdf(m.log_cdf(x)), x, rtol=1e-15, atol=0)
    torch.testing.assert_close(m.ilogccdf(m.log_sf(10 - x)), 10 - x, rtol=1e-15, atol=0)
    # must fail: the probability itself, which is 0 there, and in the upper tail 1
    assert m.icdf(m.log_cdf(x[:2]).exp())[0] == -math.inf
    assert not torch.isclose(m.icdf(-torch.expm1(m.log_sf(10 - x))), 10 - x, rtol=1e-3)[:2].any()
    u = f64([1e-300, 1e-5, 0.3, 0.99])
    torch.testing.assert_close(m.ilogcdf(u.log()), m.icdf(u), rtol=1e-13, atol=0)


@pytest.mark.parametrize("upper", [False, True])
def test_derivatives(upper):
    """Of the first two orders, in the logarithm and in all parameters."""
    leaves = [f64(x).requires_grad_() for x in ([-2000.0, -5.0, -0.6], [0.3, -0.2], [0.0, 3.0], [1.0, 0.5])]

    def f(log_p, *parameters):
        m = mixture(*parameters)
        return m.ilogccdf(log_p) if upper else m.ilogcdf(log_p)

    assert torch.autograd.gradcheck(f, leaves, rtol=1e-5)
    assert torch.autograd.gradgradcheck(f, leaves, rtol=1e-4)
    x = f(*leaves)
    slope = torch.autograd.grad(x.sum(), leaves[0])[0]
    m = mixture(*leaves[1:])
    tail = m.log_sf(x) if upper else m.log_cdf(x)
    exact = (tail - m.log_prob(x)).exp() * (-1.0 if upper else 1.0)  # dx/dl = e^l/m(x)
    torch.testing.assert_close(slope, exact, rtol=1e-12, atol=0)


def test_transforms():
    parameters = [f64(x) for x in ([0.3, -0.2], [0.0, 3.0], [1.0, 0.5])]
    log_p = f64([[-2000.0, -0.1], [-5.0, -1e-3]])

    def f(log_p, *parameters):
        return mixture(*parameters).ilogcdf(log_p)

    expected = f(log_p, *parameters)
    torch.testing.assert_close(torch.func.vmap(f, (0, None, None, None))(log_p, *parameters), expected)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(log_p, *parameters), expected)


def test_shapes_and_dtypes():
    m = stablekl.GaussianMixture(
        probs=torch.ones(3, 1, 2), loc=torch.zeros(3, 4, 2, 3), scale_tril=torch.eye(3).expand(3, 4, 2, 3, 3)
    ).marginal([1])
    assert m.ilogcdf(torch.full((5, 1, 1), -2.0)).shape == (5, 3, 4, 1)
    assert m.ilogcdf(torch.full((), -2.0)).dtype == torch.float32
    assert m.ilogccdf(torch.full((0, 3, 4), -2.0)).shape == (0, 3, 4, 1)
    half = mixture(torch.zeros(1).half(), torch.zeros(1).half(), torch.ones(1).half()).ilogcdf(
        torch.tensor(-6e4).half()
    )
    assert half.dtype == torch.float16
    assert float(half) == pytest.approx(-346.4, rel=1e-3)


def test_ends():
    m = mixture(f64([0.0, 0.0]), f64([0.0, 10.0]), f64([1.0, 1.0]))
    assert m.ilogcdf(f64([-math.inf, 0.0])).tolist() == [-math.inf, math.inf]
    assert m.ilogccdf(f64([-math.inf, 0.0])).tolist() == [math.inf, -math.inf]


def test_what_is_refused():
    m = mixture(torch.zeros(2), torch.zeros(2), torch.ones(2))
    with pytest.raises(ValueError, match=r"0\.5.* at \[1\] is not the logarithm"):
        m.ilogcdf(torch.tensor([-1.0, 0.5]))
    with pytest.raises(ValueError, match=r"nan at \[\]"):
        m.ilogccdf(torch.tensor(math.nan))
    with pytest.raises(ValueError, match="must be a tensor"):
        m.ilogcdf(-1.0)
    with pytest.raises(ValueError, match="broadcast"):
        mixture(torch.zeros(3, 2), torch.zeros(3, 2), torch.ones(3, 2)).ilogcdf(torch.full((2,), -1.0))
    other = stablekl.MixtureSameFamily(Categorical(torch.ones(2)), Laplace(torch.zeros(2), torch.ones(2)))
    with pytest.raises(NotImplementedError, match="Laplace has no quantiles of log-probabilities"):
        other.ilogcdf(torch.tensor(-1.0))
    plane = stablekl.GaussianMixture(probs=torch.ones(1), loc=torch.zeros(1, 2), scale_diag=torch.ones(1, 2))
    with pytest.raises(NotImplementedError, match="no quantiles: many points"):
        plane.ilogcdf(torch.tensor(-1.0))
