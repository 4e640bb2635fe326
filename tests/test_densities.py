"""Densities, distribution functions and entropies of the drop-in classes, where torch's lose digits."""

from __future__ import annotations

import mpmath
import pytest
import torch
from mpmath import mp, mpf
from torch.autograd import gradcheck, gradgradcheck

import stablekl
from stablekl.precision.references import FAMILIES
from stablekl.precision.references.context import agreed, exact

FLOATS = (torch.float32, torch.float64)

# name, parameters, points: large parameters near the mode, and the ends
HARD = [
    ("Normal", (3.0, 1e-25), (3.0, 3.0000002)),
    ("Normal", (-1e8, 1e25), (0.0, 1e30)),
    ("Poisson", (1e8,), (1e8, 1e8 + 8, 99_990_000.0, 0.0)),
    ("Poisson", (1e-12,), (0.0, 1.0, 7.0)),
    ("Binomial", (9999.0, 0.999), (9999.0, 9990.0, 0.0)),
    ("Binomial", (100.0, 1e-12), (0.0, 1.0, 100.0)),
    ("Gamma", (1e10, 1e3), (1e7, 1.0001e7)),
    ("Gamma", (1e-10, 1e3), (1e-3, 1e-20)),
    ("Beta", (1e9, 3e9), (0.25, 0.25001, 1e-20)),
    ("Beta", (1e9, 1e-3), (0.99, 0.9999999)),
]


def built(name, parameters, dtype):
    return getattr(stablekl, name)(*(torch.tensor(x, dtype=dtype) for x in parameters), validate_args=False)


def errors(name, parameters, points, dtype, computed=None):
    """In units of eps max(1, |log p|)."""
    x = torch.tensor(points, dtype=dtype)
    theta = [exact(torch.tensor(v, dtype=dtype)) for v in parameters]
    found = (built(name, parameters, dtype) if computed is None else computed).log_prob(x)
    assert found.dtype == dtype
    truths = [agreed(lambda point=point: FAMILIES[name].log_density(exact(point), *theta)) for point in x]
    pairs = zip(found, truths, strict=True)
    return [float(abs(mpf(f.item()) - t) / max(1, abs(t))) / torch.finfo(dtype).eps for f, t in pairs]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("name", "parameters", "points"), HARD)
def test_log_densities_are_those_of_mpmath(name, parameters, points, dtype):
    bar = 0.51 if dtype == torch.float32 else 8
    assert max(errors(name, parameters, points, dtype)) < bar


@pytest.mark.parametrize(
    ("name", "parameters", "points"),
    [("Normal", (3.0, 1e-25), (3.0,)), *(row for row in HARD if row[0] != "Normal" and max(row[1]) > 1e3)],
)
def test_torch_loses_them(name, parameters, points):
    """The must-fail twin."""
    inputs = (torch.tensor(x) for x in parameters)
    plain = getattr(torch.distributions, name)(*inputs, validate_args=False)
    assert not max(errors(name, parameters, points, torch.float32, plain)) < 50


SMOOTH = [
    ("Normal", (0.3, 0.7), 1.1),
    ("Poisson", (3.3,), 4.0),
    ("Poisson", (300.0,), 290.0),
    ("Gamma", (2.2, 0.7), 3.0),
    ("Gamma", (220.0, 0.7), 300.0),
    ("Gamma", (0.1, 2.0), 1e-3),
    ("Beta", (2.2, 3.0), 0.3),
    ("Beta", (0.2, 33.0), 0.3),
    ("Beta", (30.2, 33.0), 0.99),
]


@pytest.mark.parametrize(("name", "parameters", "x"), SMOOTH)
def test_derivatives(name, parameters, x):
    inputs = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (x, *parameters)]

    def log_prob(x, *theta):
        return getattr(stablekl, name)(*theta, validate_args=False).log_prob(x)

    assert gradcheck(log_prob, inputs)
    assert gradgradcheck(log_prob, inputs)


def test_broadcasting_vmap_compile_and_validation():
    p = stablekl.Gamma(torch.tensor([1.0, 2.0, 30.0]), torch.tensor([[1.0], [2.0]]))
    assert p.log_prob(torch.ones(5, 1, 1)).shape == (5, 2, 3)
    assert p.expand((4, 2, 3)).log_prob(torch.tensor(1.0)).shape == (4, 2, 3)

    def slope(a):
        return torch.func.jacrev(lambda a: stablekl.Gamma(a, 1.0, validate_args=False).log_prob(torch.tensor(2.0)))(a)

    a = torch.tensor([0.5, 3.0, 300.0])
    expected = torch.tensor(2.0).log() - torch.digamma(a)
    torch.testing.assert_close(torch.func.vmap(slope)(a), expected)
    with pytest.raises(ValueError, match="support"):
        p.log_prob(torch.tensor(-1.0))
    assert stablekl.Normal(0.0, 1.0).log_prob(torch.tensor(0.5, dtype=torch.float64)).dtype == torch.float64
    for name in ("Poisson", "Binomial"):
        d = stablekl.Poisson(torch.tensor(0.0)) if name == "Poisson" else stablekl.Binomial(5, torch.tensor(0.0))
        assert d.log_prob(torch.tensor([0.0, 1.0])).tolist() == [0.0, -torch.inf]


def test_ends_of_the_support():
    low = torch.tensor([0.5, 1.0, 2.0])
    found = stablekl.Gamma(low, 3.0).log_prob(torch.tensor(0.0))
    torch.testing.assert_close(found, torch.tensor([torch.inf, mpmath.log(3), -torch.inf], dtype=torch.float32))
    for end, found in ((0.0, stablekl.Beta(low, 3.0)), (1.0, stablekl.Beta(3.0, low))):
        expected = torch.tensor([torch.inf, mpmath.log(3), -torch.inf], dtype=torch.float32)
        torch.testing.assert_close(found.log_prob(torch.tensor(end)), expected)


def ulps(found, truth, dtype):
    return float(abs(mpf(found.item()) - truth) / abs(truth)) / torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", FLOATS)
def test_normal_tails(dtype):
    p = stablekl.Normal(torch.tensor(0.0, dtype=dtype), 1.0)
    x = torch.tensor([-12.5, -6.0, -1.0, -0.25, 0.0, 0.5, 3.0, 7.0], dtype=dtype)
    bar = 0.51 if dtype == torch.float32 else 8
    with mp.workdps(60):
        for point, low, high, log_low, log_high in zip(x, p.cdf(x), p.sf(x), p.log_cdf(x), p.log_sf(x), strict=True):
            truth, rest = mp.erfc(-mpf(point.item()) / mp.sqrt(2)) / 2, mp.erfc(mpf(point.item()) / mp.sqrt(2)) / 2
            assert ulps(low, truth, dtype) < bar
            assert ulps(high, rest, dtype) < bar
            assert ulps(log_low, mp.log(truth), dtype) < bar
            assert ulps(log_high, mp.log(rest), dtype) < bar
        u = torch.tensor([1e-30, 1e-9, 0.02, 0.4], dtype=dtype)
        for point, found in zip(u, p.icdf(u), strict=True):
            truth = mp.findroot(lambda z, point=point: mp.log(mp.ncdf(z) / mpf(point.item())), found.item())
            assert ulps(found, truth, dtype) < bar
    plain = torch.distributions.Normal(torch.tensor(0.0), 1.0)
    assert plain.cdf(torch.tensor(-6.0)) == 0
    assert plain.icdf(torch.tensor(1e-9)).isinf()


def test_normal_tails_have_derivatives():
    x = torch.tensor([-8.0, -0.3, 0.2, 3.0], dtype=torch.float64, requires_grad=True)
    p = stablekl.Normal(0.1, 1.3)
    for f in (p.cdf, p.sf, p.log_cdf, p.log_sf):
        assert gradcheck(f, x)
        assert gradgradcheck(f, x)
    assert gradcheck(p.icdf, torch.tensor([1e-3, 0.2, 0.7], dtype=torch.float64, requires_grad=True))
