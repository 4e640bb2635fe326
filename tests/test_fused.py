"""The kernels in C: what they may take, and that their results depend on nothing but the values."""

from __future__ import annotations

import math
from importlib.util import spec_from_file_location

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import stablekl
from stablekl import _bregman, _fused
from stablekl._elementwise import horner
from stablekl.distributions.cross._pieces import remainders
from stablekl.distributions.normal import normal_kl
from stablekl.losses.gaussian import _kl as gaussian_kl

pytestmark = pytest.mark.skipif(_fused._library is None, reason="installed without a C compiler")

DTYPES = (torch.float32, torch.float64)
# The rule by scales, and that by log-variances with the scales' logarithms.
RULES = (normal_kl, gaussian_kl)


def parameters(*shape, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    mu_p, mu_q = torch.randn(2, *shape, generator=g, dtype=torch.float64)
    sigma_p, sigma_q = torch.exp(3 * torch.randn(2, *shape, generator=g, dtype=torch.float64))
    return [x.to(dtype) for x in (mu_p, sigma_p, mu_q, sigma_q)]


def parameters_of(rule, *shape, **options):
    mu_p, sigma_p, mu_q, sigma_q = parameters(*shape, **options)
    return [mu_p, sigma_p, mu_q, sigma_q] if rule is normal_kl else [mu_p, 2 * sigma_p.log(), mu_q, 2 * sigma_q.log()]


def by_operations(monkeypatch, inputs, grad, rule=normal_kl):
    with monkeypatch.context() as patch:
        patch.setattr(_fused, "_library", None)
        return value_and_gradient(inputs, grad, rule)


def value_and_gradient(inputs, grad, rule=normal_kl):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = rule(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves, grad)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_gradient_are_those_of_the_operations(dtype, rule, monkeypatch):
    inputs = parameters_of(rule, 10_007, dtype=dtype)
    grad = torch.randn(10_007, dtype=dtype, generator=torch.Generator().manual_seed(1))
    grad[::7] = 0
    eps = torch.finfo(dtype).eps
    inputs[0][::14] = math.inf  # an infinite gradient where half of the zeros are
    fused, expected = value_and_gradient(inputs, grad, rule), by_operations(monkeypatch, inputs, grad, rule)
    for a, b in zip(fused, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=20 * eps, atol=20 * eps * float(b.abs().median()))
    assert all((a[::7] == 0).all() for a in fused[1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operations_are_not_called(dtype, monkeypatch):
    monkeypatch.setattr("stablekl.distributions.normal._value_block", None)
    assert _fused.available(parameters(5, dtype=dtype))
    assert normal_kl(*parameters(5, dtype=dtype)).isfinite().all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 255, 256, 257, 300_001])
def test_bits_depend_on_the_values_alone(dtype, n, rule):
    inputs = parameters_of(rule, n, dtype=dtype)
    value = rule(*inputs)
    for i in {0, n // 2, n - 1}:
        one = [x[i].clone() for x in inputs]
        assert torch.equal(rule(*one), value[i])
        assert torch.equal(rule(*(x.expand(3, 2) for x in one)), value[i].expand(3, 2))
    strided = [x.repeat_interleave(2)[::2] for x in inputs]
    assert torch.equal(rule(*strided), value)
    assert torch.equal(rule(*(x.flip(0) for x in inputs)).flip(0), value)
    shifted = [torch.cat((x[:1], x))[1:] for x in inputs]  # another alignment
    assert torch.equal(rule(*shifted), value)
    zero, one = torch.zeros((), dtype=dtype), torch.tensor(1.0 if rule is normal_kl else 0.3, dtype=dtype)
    numbers = torch.broadcast_tensors(inputs[0], inputs[1], zero, one)
    assert torch.equal(rule(*numbers), rule(*(x.contiguous() for x in numbers)))


@pytest.mark.parametrize("rule", RULES)
def test_threads_do_not_show(rule):
    inputs, threads = parameters_of(rule, 600_000, dtype=torch.float32), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(value_and_gradient(inputs, torch.ones(600_000), rule))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(dtype):
    assert normal_kl(*parameters(0, dtype=dtype)).shape == (0,)
    assert normal_kl(*parameters(2, 0, 3, dtype=dtype)).shape == (2, 0, 3)
    inputs = parameters(4, 5, dtype=dtype)
    column = normal_kl(*(x.mT for x in inputs))
    assert torch.equal(column, normal_kl(*inputs).mT)
    rows = normal_kl(inputs[0], inputs[1], inputs[2][:1], inputs[3][:1])
    assert torch.equal(rows, normal_kl(inputs[0], inputs[1], *(x[:1].repeat(4, 1) for x in inputs[2:])))
    conjugate = torch.complex(torch.zeros_like(inputs[0]), -inputs[0]).conj().imag
    assert conjugate.is_neg()
    assert torch.equal(normal_kl(conjugate, *inputs[1:]), normal_kl(*inputs))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_scale(dtype, monkeypatch):
    inf, nan = math.inf, math.nan
    cases = {  # mu_p, sigma_p, mu_q, sigma_q
        (0, 1, 0, inf): inf, (0, inf, 0, 1): inf, (0, inf, 0, inf): nan, (0, 0, 0, 1): inf, (0, 1, 0, 0): nan,
        (0, -1, 0, 1): nan, (0, 1, 0, -1): nan, (nan, 1, 0, 1): nan, (0, nan, 0, 1): nan, (0, 1, nan, 1): nan,
        (0, 1, 0, nan): nan, (inf, 1, 0, 1): inf, (inf, 1, inf, 1): nan, (1, 1, 0, 0): inf,
    }  # fmt: skip
    columns = [torch.tensor(x, dtype=dtype) for x in zip(*cases, strict=True)]
    expected = torch.tensor(list(cases.values()), dtype=dtype)
    torch.testing.assert_close(normal_kl(*columns), expected, rtol=0, atol=0, equal_nan=True)
    monkeypatch.setattr(_fused, "_library", None)
    torch.testing.assert_close(normal_kl(*columns), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_log_variance(dtype, monkeypatch):
    inf, nan, far = math.inf, math.nan, 1420.0
    cases = {  # mu_p, logvar_p, mu_q, logvar_q
        (0, inf, 0, 0): inf, (0, -inf, 0, 0): inf, (0, inf, 0, inf): nan, (0, 0, 0, -inf): nan, (1, 0, 0, -inf): inf,
        (nan, 0, 0, 0): nan, (0, nan, 0, 0): nan, (0, 0, nan, 0): nan, (0, 0, 0, nan): nan, (inf, 0, 0, 0): inf,
        (inf, 0, inf, 0): nan, (0, 710, 0, 0): inf, (0, -far, 0, 0): (far - 1) / 2, (0, 0, 0, far): (far - 1) / 2,
        (2, 0, 0, far): (far - 1) / 2, (0, far, 0, far): 0, (0, -1400, 0, -1400): 0,
    }  # fmt: skip
    columns = [torch.tensor(x, dtype=dtype) for x in zip(*cases, strict=True)]
    expected = torch.tensor(list(cases.values()), dtype=dtype)
    torch.testing.assert_close(gaussian_kl(*columns), expected, rtol=1e-7, atol=0, equal_nan=True)
    monkeypatch.setattr(_fused, "_library", None)
    torch.testing.assert_close(gaussian_kl(*columns), expected, rtol=1e-7, atol=0, equal_nan=True)


def test_whatever_records_operations_gets_operations():
    inputs = parameters(3)
    assert not _fused.available([x.half() for x in inputs])
    assert not _fused.available([x.to("meta") for x in inputs])
    assert not _fused.available([x.clone().requires_grad_() for x in inputs])
    others = parameters(3, seed=1)
    for pre_dispatch in (False, True):
        graph = make_fx(normal_kl, pre_dispatch=pre_dispatch)(*inputs)
        torch.testing.assert_close(graph(*others), normal_kl(*others), rtol=1e-14, atol=0)
    torch.testing.assert_close(torch.vmap(normal_kl)(*others), normal_kl(*others), rtol=1e-14, atol=0)


def test_the_default_device_is_not_asked():
    with torch.device("meta"):
        assert normal_kl(*parameters_on_cpu()).device.type == "cpu"


def parameters_on_cpu():
    return [torch.tensor([x, x], device="cpu") for x in (0.0, 1.0, 0.5, 2.0)]


def test_tensors_without_memory():
    leaf = torch.ones(3, requires_grad=True)
    normal_kl(torch.zeros(3), leaf, torch.zeros(3), 2 * torch.ones(3)).sgn().sum().backward()  # an "efficient zero"
    assert torch.equal(leaf.grad, torch.zeros(3))


def test_dual_numbers():
    mu_p, sigma_p, mu_q, sigma_q = parameters(3)
    expected = torch.func.hessian(lambda s: normal_kl(mu_p, s, mu_q, sigma_q).sum())(sigma_p).sum(-1)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(sigma_p.clone().requires_grad_(), torch.ones(3, dtype=torch.float64))
        (gradient,) = torch.autograd.grad(normal_kl(mu_p, dual, mu_q, sigma_q).sum(), dual)
        torch.testing.assert_close(forward_ad.unpack_dual(gradient).tangent, expected)


@pytest.mark.parametrize("content", [b"", b"not a library"])
def test_a_library_that_does_not_load_is_none(content, tmp_path, monkeypatch):
    path = tmp_path / "_fused_kernels.so"
    path.write_bytes(content)
    monkeypatch.setattr(_fused, "find_spec", lambda name: spec_from_file_location(name, path))
    assert _fused._load() is None
    monkeypatch.setattr(_fused, "find_spec", lambda name: None)
    assert _fused._load() is None


def test_a_library_of_another_version_is_none(monkeypatch):
    assert _fused._load() is not None
    monkeypatch.setattr(_fused, "_VERSION", -1)
    assert _fused._load() is None


# ---- lgamma and Beta ----------------------------------------------------------------------------------------------


def spread(seed, size=20_000):
    """Positive numbers over 24 decades, and others: near, and anywhere."""
    g = torch.Generator().manual_seed(seed)
    x, u, v, w = torch.rand((4, size), generator=g, dtype=torch.float64)
    x = 10 ** (24 * x - 12)
    near = x * (1 + 10 ** (-15 * u) * (v - 0.5))
    return x, torch.where(w < 0.5, near, 10 ** (24 * v - 12))


def test_lgamma_kernel_is_the_same_formula(monkeypatch):
    x, y = spread(1)
    by_kernel = _bregman.lgamma_bregman_value(y, x, y - x)
    monkeypatch.setattr(_fused, "available", lambda inputs: False)
    torch.testing.assert_close(by_kernel, _bregman.lgamma_bregman_value(y, x, y - x), rtol=2e-15, atol=0)


def test_beta_kernel_is_the_same_formula(monkeypatch):
    x, y = (v.reshape(-1, 4) for v in spread(2))
    p, q = stablekl.Dirichlet(x), stablekl.Dirichlet(y)
    by_kernel = stablekl.kl_divergence(p, q)
    monkeypatch.setattr(_fused, "available", lambda inputs: False)
    torch.testing.assert_close(by_kernel, stablekl.kl_divergence(p, q), rtol=4e-15, atol=0)
    assert (by_kernel >= 0).all()


def test_kernels_of_odd_layouts():
    x, y = (v[:600].reshape(20, 30) for v in spread(3))
    whole = _bregman.lgamma_bregman_value(y, x, y - x)
    assert torch.equal(_bregman.lgamma_bregman_value(y.T, x.T, (y - x).T), whole.T)
    assert torch.equal(_bregman.lgamma_bregman_value(y[:, ::3], x[:, ::3], (y - x)[:, ::3]), whole[:, ::3])
    one = x[0, 0].expand(20, 30)
    assert torch.equal(
        _bregman.lgamma_bregman_value(y, one, y - one), _bregman.lgamma_bregman_value(y, one.clone(), y - one)
    )
    assert _bregman.lgamma_bregman_value(y[:0], x[:0], y[:0]).shape == (0, 30)


def test_remainders_kernel_is_the_same_formula(monkeypatch):
    x, _ = spread(4)
    by_kernel = remainders(x)
    monkeypatch.setattr(_fused, "available", lambda inputs: False)
    for a, b in zip(by_kernel, remainders(x), strict=True):
        torch.testing.assert_close(a, b, rtol=4e-15, atol=0)


@pytest.mark.parametrize("shape", [(2000,), (30, 20), (3, 1000)])
def test_polynomial_kernel_has_the_same_roundings(shape, monkeypatch):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    coefficients = (0.1, -1 / 3, 2.0, math.pi)
    by_kernel = [horner(x, coefficients), horner(x.mT if x.ndim > 1 else x[::2], coefficients)]
    monkeypatch.setattr(_fused, "available", lambda inputs: False)
    assert torch.equal(by_kernel[0], horner(x, coefficients))
    assert torch.equal(by_kernel[1], horner(x.mT if x.ndim > 1 else x[::2], coefficients))


def test_kernels_of_derivatives_are_the_same_formulas(monkeypatch):
    x, y = spread(5)
    size = (y - x).abs()
    functions = (
        lambda: _bregman.lgamma_change(x, y, x - y),
        lambda: _bregman.lgamma_change(x, y, x - y, first=1),
        lambda: _bregman.lgamma_bend(x),
        lambda: _bregman.trigamma_fall(x, size),
    )
    by_kernel = [f() for f in functions]
    monkeypatch.setattr(_fused, "available", lambda inputs: False)
    for a, f in zip(by_kernel, functions, strict=True):
        torch.testing.assert_close(a, f(), rtol=3e-15, atol=0)
