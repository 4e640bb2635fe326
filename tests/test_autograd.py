"""The machinery of hand-written gradients: masks, factors of zero, second derivatives."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import kl_divergence

import stablekl
from stablekl._autograd import masked_product, rowwise

F64 = torch.float64


def f64(*x):
    return torch.tensor(x, dtype=F64)


def mixture(mean, count):
    loc = torch.stack((mean, f64(2.0, 1.0), f64(0.0, 3.0), f64(3.0, 3.0))[:count])
    tril = torch.eye(2, dtype=F64) * f64(1.0, 1.0, 2.0, 1.5)[:count, None, None]
    return stablekl.GaussianMixture(probs=f64(0.3, 0.3, 0.2, 0.2)[:count], loc=loc, scale_tril=tril)


Q = stablekl.MultivariateNormal(f64(1.0, 0.0), scale_tril=2 * torch.eye(2, dtype=F64))
TWO = mixture(f64(0.0, -1.0), 2)
DIVERGENCES = {
    "normal": lambda m: kl_divergence(stablekl.Normal(m, 1.0), stablekl.Normal(0.5 * m**2, 2.0)).sum(),
    "multivariate": lambda m: kl_divergence(stablekl.MultivariateNormal(m, scale_tril=torch.eye(2, dtype=F64)), Q),
    "two": lambda m: kl_divergence(mixture(m, 2), Q),
    "three": lambda m: kl_divergence(mixture(m, 3), Q),
    "four": lambda m: kl_divergence(mixture(m, 4), Q),
    "two against two": lambda m: kl_divergence(mixture(m, 2), TWO),
    "three against four": lambda m: kl_divergence(mixture(m, 3), mixture(f64(1.0, 1.0), 4)),
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_factor_of_zero_has_a_derivative(name):
    """d/dc d(c KL)/dm at c = 0, where a penalty's weight starts: the gradient of KL, not 0."""
    mean, weight = f64(0.3, -0.2).requires_grad_(), f64(0.0)[0].requires_grad_()
    (expected,) = torch.autograd.grad(DIVERGENCES[name](mean), mean)
    (gradient,) = torch.autograd.grad(weight * DIVERGENCES[name](mean), mean, create_graph=True)
    assert (gradient == 0).all()
    for i, one in enumerate(gradient):
        torch.testing.assert_close(torch.autograd.grad(one, weight, retain_graph=True)[0], expected[i])


def test_a_masked_row_stays_masked():
    """An infinite derivative, times 0: 0, with a derivative of 0 in both; a finite one, times 0: d."""
    g, d = f64(0.0, 0.0, 2.0).requires_grad_(), f64(torch.inf, 3.0, 4.0).requires_grad_()
    product = masked_product(g, d)
    assert product.tolist() == [0.0, 0.0, 8.0]
    by_g, by_d = torch.autograd.grad(product.sum(), (g, d))
    assert by_g.tolist() == [0.0, 3.0, 4.0]
    assert by_d.tolist() == [0.0, 0.0, 2.0]


def test_tangents_of_zero():
    """The derivative of a directional derivative by its direction, along axes on which the direction is 0."""
    square = rowwise(lambda x: (x.square().sum(-1),), lambda inputs, _: (2 * inputs[0],))
    x = f64(1.0, 2.0)

    def along(t):
        return torch.func.jvp(square, (x,), (t,))[1]

    assert torch.func.grad(along)(f64(0.0, 1.0)).tolist() == [2.0, 4.0]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch.compile itself
@pytest.mark.parametrize("family", [stablekl.Normal, stablekl.Laplace, stablekl.Gamma, stablekl.Weibull])
def test_compiled_with_a_tensor_that_p_and_q_share(family):
    torch._dynamo.reset()
    a, b, s = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.0, 2.0, 3.0))

    def rule(a, b, s):
        return stablekl.kl_divergence(family(a, s, validate_args=False), family(b, s, validate_args=False))

    compiled = torch.compile(rule, backend="aot_eager", fullgraph=True)(a, b, s)
    expected = rule(a, b, s)
    torch.testing.assert_close(compiled, expected, rtol=1e-14, atol=0)  # kernels in C, or the same operations
    gradients = (torch.autograd.grad(value, (a, b, s)) for value in (compiled, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=0)
