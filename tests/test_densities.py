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


CURVES = {
    "log_prob": ("Cauchy", "GeneralizedPareto", "Gumbel", "Laplace", "LogNormal", "Normal", "Pareto", "Weibull"),
    "log_sf": ("Gumbel", "LogNormal", "Normal", "Pareto", "Weibull"),
}


@pytest.mark.parametrize(("name", "curve"), [(name, curve) for curve, names in CURVES.items() for name in names])
def test_forward_mode(name, curve):
    """What is computed without derivatives, to more digits, must not bring a tangent of its own."""
    theta = [0.4, 0.7, 0.3][: len(FAMILIES[name].parameters)]
    x = torch.tensor([1.3, *theta], dtype=torch.float64)

    def f(v):
        return getattr(getattr(stablekl, name)(*v[1:], validate_args=False), curve)(v[0])

    forward, reverse = torch.func.jacfwd(f)(x), torch.func.jacrev(f)(x)
    torch.testing.assert_close(forward, reverse, rtol=1e-12, atol=1e-14)
    twice = torch.func.jacrev(torch.func.jacrev(f))(x)
    torch.testing.assert_close(torch.func.hessian(f)(x), twice, rtol=1e-11, atol=1e-13)


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


def dirichlet_truth(p, x):
    a, x = [mpf(v.item()) for v in p.concentration], [mpf(v.item()) for v in x]
    powers = mp.fsum((b - 1) * mp.log(y) for b, y in zip(a, x, strict=True))
    return powers + mp.loggamma(mp.fsum(a)) - mp.fsum(map(mp.loggamma, a))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("a", [(1e9, 2e9, 5e8), (1e-9, 2.0, 1.0), (3.0, 1e3, 1e11)])
def test_dirichlet(a, dtype):
    x = torch.tensor((0.29, 0.57, 0.14), dtype=dtype)
    p = stablekl.Dirichlet(torch.tensor(a, dtype=dtype), validate_args=False)
    with mp.workdps(60):
        truth = dirichlet_truth(p, x)
        b = [mpf(v.item()) for v in p.concentration]
        n = mp.fsum(b)
        entropy = mp.fsum(mp.loggamma(v) - (v - 1) * mp.digamma(v) for v in b) - mp.loggamma(n)
        entropy += (n - len(b)) * mp.digamma(n)
        assert float(abs(mpf(p.log_prob(x).item()) - truth) / max(1, abs(truth))) < 4 * torch.finfo(dtype).eps
        assert float(abs(mpf(p.entropy().item()) - entropy) / max(1, abs(entropy))) < 4 * torch.finfo(dtype).eps


def test_dirichlet_at_a_corner():
    corner = torch.tensor([0.0, 1.0])
    for first, expected in ((0.5, torch.inf), (1.0, mpmath.log(3.0)), (2.0, -torch.inf)):
        found = stablekl.Dirichlet(torch.tensor([first, 3.0])).log_prob(corner)
        torch.testing.assert_close(found, torch.tensor(float(expected)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_entropies_of_gamma_and_beta(dtype):
    for a, b in ((1e8, 3e7), (1e-6, 20.0), (9.9, 10.1), (1.0, 1.0)):
        a, b = torch.tensor(a, dtype=dtype), torch.tensor(b, dtype=dtype)
        x, y = mpf(a.item()), mpf(b.item())
        with mp.workdps(60):
            gamma = x - mp.log(y) + mp.loggamma(x) + (1 - x) * mp.digamma(x)
            beta = mp.loggamma(x) + mp.loggamma(y) - mp.loggamma(x + y)
            beta += (x + y - 2) * mp.digamma(x + y) - (x - 1) * mp.digamma(x) - (y - 1) * mp.digamma(y)
            for found, truth in ((stablekl.Gamma(a, b).entropy(), gamma), (stablekl.Beta(a, b).entropy(), beta)):
                assert float(abs(mpf(found.item()) - truth) / max(1, abs(truth))) < 20 * torch.finfo(dtype).eps
    assert torch.distributions.Gamma(torch.tensor(1e8), 1.0).entropy() != stablekl.Gamma(1e8, 1.0).entropy()


TAILED = [
    ("Laplace", (0.3, 1.7), lambda z: mp.exp(-abs(z)) / 2 if z < 0 else 1 - mp.exp(-z) / 2),
    ("Cauchy", (0.3, 1.7), lambda z: mp.atan2(1, -z) / mp.pi),
    ("Gumbel", (0.3, 1.7), lambda z: mp.exp(-mp.exp(-z))),
    ("Exponential", (1.7,), None),
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("name", "parameters", "cdf"), TAILED)
def test_tails(name, parameters, cdf, dtype):
    p = built(name, parameters, dtype)
    x = torch.tensor([1e-9, 0.5, 3.0, 30.0] if cdf is None else [-5.0, -0.4, 0.29, 0.5, 3.0, 30.0], dtype=dtype)
    bar = 0.51 if dtype == torch.float32 else 24
    theta = [mpf(torch.tensor(v, dtype=dtype).item()) for v in parameters]
    with mp.workdps(60):
        for point in x:
            v = mpf(point.item())
            truth = -mp.expm1(-theta[0] * v) if cdf is None else cdf((v - theta[0]) / theta[1])
            assert ulps(p.cdf(point), truth, dtype) < bar
            assert ulps(p.sf(point), 1 - truth, dtype) < bar
            assert ulps(p.log_cdf(point), mp.log(truth), dtype) < bar
            assert ulps(p.log_sf(point), mp.log(1 - truth), dtype) < bar
    inputs = x[x.abs() > 1e-3].double().requires_grad_()
    wide = built(name, parameters, torch.float64)
    for f in (wide.log_prob, wide.cdf, wide.sf, wide.log_cdf, wide.log_sf):
        assert gradcheck(f, inputs)
        assert gradgradcheck(f, inputs)


def test_torch_loses_tails():
    """The must-fail twin."""
    assert torch.distributions.Exponential(1.0).cdf(torch.tensor(1e-9)) == 0
    assert torch.distributions.Laplace(0.0, 1.0).cdf(torch.tensor(-20.0)) == 0
    assert torch.distributions.Cauchy(0.0, 1.0).cdf(torch.tensor(-1e9)) == 0
    assert torch.distributions.Cauchy(0.0, 1.0).log_prob(torch.tensor(1e25)).isinf()
    assert stablekl.Cauchy(0.0, 1.0).log_prob(torch.tensor(1e25)).isfinite()


def test_probabilities_are_those_given():
    rare = torch.tensor([0.0, 1e-20, 1.0])
    one = torch.tensor(1.0)
    expected = torch.tensor([-torch.inf, -46.0517, 0.0])
    torch.testing.assert_close(stablekl.Bernoulli(rare).log_prob(one), expected)
    assert torch.distributions.Bernoulli(rare).log_prob(one)[0] > -16
    assert stablekl.Bernoulli(rare).entropy()[[0, 2]].tolist() == [0.0, 0.0]
    logits = torch.tensor([-torch.inf, -46.0517, torch.inf])
    torch.testing.assert_close(stablekl.Bernoulli(logits=logits).log_prob(one), expected)
    torch.testing.assert_close(stablekl.Categorical(rare).log_prob(torch.tensor([0, 1, 2])), expected)
    assert torch.distributions.Categorical(rare, validate_args=False).log_prob(torch.tensor(0)) > -17
    assert 0 < stablekl.Categorical(rare).entropy() < 1e-18
    certain = stablekl.Categorical(logits=torch.tensor([0.0, -torch.inf]))
    assert certain.entropy() == 0
    assert certain.log_prob(torch.tensor([0, 1])).tolist() == [0.0, -torch.inf]
    torch.testing.assert_close(stablekl.Geometric(torch.tensor(1e-20)).entropy(), torch.tensor(47.0517))
    for p in (torch.tensor([0.3, 0.7]), torch.tensor([1e-20, 1.0])):
        p = p.requires_grad_()
        (slope,) = torch.autograd.grad(stablekl.Bernoulli(p).log_prob(one).sum(), p)
        torch.testing.assert_close(slope, 1 / p)


def test_continuous_bernoulli():
    for dtype in FLOATS:
        for given in (1e-12, 0.3, 0.49999, 0.5, 0.4991, 0.9, 0.999999):
            probs = torch.tensor(given, dtype=dtype)
            p, x = stablekl.ContinuousBernoulli(probs), torch.tensor(0.3, dtype=dtype)
            with mp.workdps(60):
                lam, v = mpf(probs.item()), mpf(x.item())
                eta = mp.log(lam / (1 - lam))
                if eta == 0:
                    truths = mpf(0), v, mpf(0), mpf(1) / 2, mpf(1) / 12
                else:
                    a = mp.log(mp.expm1(eta) / eta)
                    mean = mp.exp(eta) / mp.expm1(eta) - 1 / eta
                    variance = 1 / eta**2 - 1 / (4 * mp.sinh(eta / 2) ** 2)
                    truths = eta * v - a, mp.expm1(eta * v) / mp.expm1(eta), a - eta * mean, mean, variance
                found = p.log_prob(x), p.cdf(x), p.entropy(), p.mean, p.variance
                for f, truth in zip(found, truths, strict=True):
                    assert f.dtype == dtype
                    assert abs(mpf(f.item()) - truth) <= 16 * torch.finfo(dtype).eps * max(1, abs(truth))
    inputs = torch.tensor([0.2, 0.49999, 0.6, 0.99], dtype=torch.float64, requires_grad=True)
    x = torch.tensor(0.3, dtype=torch.float64)
    for f in (lambda p: p.log_prob(x), lambda p: p.cdf(x), lambda p: p.entropy(), lambda p: p.mean):
        assert gradcheck(lambda probs, f=f: f(stablekl.ContinuousBernoulli(probs, validate_args=False)), inputs)
    rare = torch.tensor(1e-20)
    torch.testing.assert_close(stablekl.ContinuousBernoulli(rare).mean, torch.tensor(0.0217147))
    assert not torch.isclose(torch.distributions.ContinuousBernoulli(rare).mean, torch.tensor(0.0217147), rtol=0.1)


@pytest.mark.parametrize("dtype", FLOATS)
def test_kumaraswamy(dtype):
    for a, b, x in ((1e-9, 2.0, 0.3), (3.0, 0.5, 0.9999), (2.0, 1e6, 1e-4), (1e4, 3.0, 0.999)):
        inputs = [torch.tensor(v, dtype=dtype) for v in (a, b, x)]
        p = stablekl.Kumaraswamy(*inputs[:2])
        with mp.workdps(60):
            a, b, x = (mpf(v.item()) for v in inputs)
            truth = mp.log(a * b) + (a - 1) * mp.log(x) + (b - 1) * mp.log(1 - x**a)
            below = -mp.expm1(b * mp.log(1 - x**a))
            error = abs(mpf(p.log_prob(inputs[2]).item()) - truth) / max(1, abs(truth))
            assert float(error) < 16 * torch.finfo(dtype).eps
            assert ulps(p.cdf(inputs[2]), below, dtype) < (0.51 if dtype == torch.float32 else 40)


MORE = [
    ("NegativeBinomial", (1e8, 0.25), (3e7, 3.3e7, 0.0)),
    ("NegativeBinomial", (0.3, 1e-6), (0.0, 2.0)),
    ("InverseGamma", (1e9, 3e9), (3.0, 3.0001)),
    ("Chi2", (1e9,), (1e9, 1.0001e9)),
    ("StudentT", (1e9, 0.0, 1.0), (0.0, 2.0, 1e30)),
    ("StudentT", (1e-3, 0.0, 1.0), (0.0, 2.0)),
    ("Pareto", (3.0, 1e6), (3.0, 3.0001, 5.0)),
    ("VonMises", (0.3, 1e6), (0.3, 0.3001)),
    ("Gumbel", (0.3, 1e-3), (0.25, 0.3, 1.0)),
    ("LogNormal", (0.3, 1e-6), (1.35, 1.34986)),
    ("HalfNormal", (1e-25,), (1e-25, 1e-20)),
    ("HalfCauchy", (1e-25,), (1e-25, 1e5)),
    ("Geometric", (1e-9,), (0.0, 1e9)),
    ("Laplace", (1e8, 1e-3), (1e8, 3.0)),
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("name", "parameters", "points"), MORE)
def test_more_log_densities(name, parameters, points, dtype):
    # in float64 of two large terms that cancel in part, each is rounded
    assert max(errors(name, parameters, points, dtype)) < (0.51 if dtype == torch.float32 else 16)


@pytest.mark.parametrize(("name", "parameters", "points"), MORE)
def test_their_derivatives(name, parameters, points):
    mild = {"loc": 0.3, "probs": 0.3, "scale": 1.2, "alpha": 2.0}
    names = FAMILIES[name].parameters
    inputs = [torch.tensor(mild.get(n, 3.2), dtype=torch.float64, requires_grad=True) for n in names]
    x = torch.tensor(2.0, dtype=torch.float64)
    assert gradcheck(lambda *theta: getattr(stablekl, name)(*theta, validate_args=False).log_prob(x), inputs)
    assert gradgradcheck(lambda *theta: getattr(stablekl, name)(*theta, validate_args=False).log_prob(x), inputs)


EVERY = [
    ("Normal", (0.3, 0.7), 1.1),
    ("Poisson", (3.3,), 4.0),
    ("Gamma", (2.2, 0.7), 3.0),
    ("Beta", (2.2, 3.0), 0.3),
    ("Binomial", (9.0, 0.3), 4.0),
    ("NegativeBinomial", (9.0, 0.3), 4.0),
    ("Bernoulli", (0.3,), 1.0),
    ("Geometric", (0.3,), 4.0),
    ("ContinuousBernoulli", (0.3,), 0.4),
    ("Kumaraswamy", (2.2, 3.0), 0.3),
    ("Cauchy", (0.3, 0.7), 1.1),
    ("HalfCauchy", (0.3,), 1.1),
    ("HalfNormal", (0.3,), 1.1),
    ("LogNormal", (0.3, 0.7), 1.1),
    ("InverseGamma", (2.3, 0.7), 1.1),
    ("Pareto", (0.3, 0.7), 1.1),
    ("StudentT", (3.0, 0.3, 0.7), 1.1),
    ("VonMises", (0.3, 0.7), 1.1),
    ("Laplace", (0.3, 0.7), 1.1),
    ("Exponential", (0.3,), 1.1),
    ("Gumbel", (0.3, 0.7), 1.1),
]


@pytest.mark.parametrize(("name", "parameters", "x"), EVERY)
def test_what_torch_can_do(name, parameters, x):
    """The values of torch where it keeps them; shapes; expand; vmap(jacrev); half precision; validation."""
    x, *theta = (torch.tensor(v) for v in (x, *parameters))
    cls, host = getattr(stablekl, name), getattr(torch.distributions, name)
    expected = host(*theta).log_prob(x)
    torch.testing.assert_close(cls(*theta).log_prob(x), expected, rtol=1e-5, atol=1e-6)
    wide = cls(*(v.expand(2, 3) for v in theta))
    assert wide.log_prob(x.expand(4, 1, 1)).shape == (4, 2, 3)
    expanded = cls(*theta).expand((2, 3))
    assert isinstance(expanded, cls)
    torch.testing.assert_close(expanded.log_prob(x), expected.expand(2, 3), rtol=1e-5, atol=1e-6)

    def log_prob(*theta):
        return cls(*theta, validate_args=False).log_prob(x)

    slope = torch.func.vmap(torch.func.jacrev(log_prob, argnums=len(theta) - 1))(*(v.expand(3) for v in theta))
    leaf = theta[-1].clone().requires_grad_()
    (direct,) = torch.autograd.grad(host(*theta[:-1], leaf).log_prob(x), leaf)
    torch.testing.assert_close(slope, direct.expand(3), rtol=1e-4, atol=1e-5)
    half = cls(*(v.bfloat16() for v in theta), validate_args=False).log_prob(x.bfloat16())
    assert half.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="support"):
        cls(*theta).log_prob(torch.tensor(torch.nan))


@pytest.mark.parametrize(("name", "parameters", "x"), [EVERY[i] for i in (0, 2, 3, 4, 8)])
def test_compiled(name, parameters, x):
    x, *theta = (torch.tensor([v]) for v in (x, *parameters))

    def log_prob(x, *theta):
        return getattr(stablekl, name)(*theta, validate_args=False).log_prob(x)

    compiled = torch.compile(log_prob, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, *theta), log_prob(x, *theta))
