"""Users' exponential families: the Bregman divergence of their log-normalisers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributions as td
from mpmath import mp
from torch.distributions import ExponentialFamily, constraints

import stablekl

F64 = torch.float64


class InverseGaussian(ExponentialFamily):
    """Density proportional to x^(-3/2) exp(-shape (x - loc)^2/(2 loc^2 x))."""

    arg_constraints = {"loc": constraints.positive, "shape": constraints.positive}  # noqa: RUF012

    def __init__(self, loc, shape, validate_args=None):
        self.loc, self.shape = torch.broadcast_tensors(loc, shape)
        super().__init__(self.loc.shape, validate_args=validate_args)

    @property
    def _natural_params(self):
        return (-self.shape / (2 * self.loc**2), -self.shape / 2)

    def _log_normalizer(self, a, b):
        return -2 * torch.sqrt(a * b) - 0.5 * torch.log(-2 * b)


class Concentrations(ExponentialFamily):
    """A Dirichlet by another name."""

    arg_constraints = {"concentration": constraints.independent(constraints.positive, 1)}  # noqa: RUF012

    def __init__(self, concentration):
        self.concentration = concentration
        super().__init__(concentration.shape[:-1], concentration.shape[-1:])

    @property
    def _natural_params(self):
        return (self.concentration,)

    def _log_normalizer(self, a):
        return torch.lgamma(a).sum(-1) - torch.lgamma(a.sum(-1))


class Precisions(ExponentialFamily):
    """A MultivariateNormal, one of whose natural parameters is a matrix."""

    arg_constraints = {"shift": constraints.real_vector, "precision": constraints.positive_definite}  # noqa: RUF012

    def __init__(self, shift, precision):
        self.shift, self.precision = shift, precision
        super().__init__(shift.shape[:-1], shift.shape[-1:])

    @property
    def _natural_params(self):
        return (self.precision @ self.shift.unsqueeze(-1)).squeeze(-1), -0.5 * self.precision

    def _log_normalizer(self, linear, square):
        mean = torch.linalg.solve(-2 * square, linear)
        return 0.5 * (linear * mean).sum(-1) - 0.5 * torch.logdet(-2 * square)


def truth(p, q):
    """Of inverse Gaussian distributions, from their natural parameters."""

    def log_normaliser(a, b):
        return -2 * mp.sqrt(a * b) - mp.log(-2 * b) / 2

    with mp.workdps(60):
        a, b, c, d = (mp.mpf(x.item()) for x in (*p, *q))
        mean = mp.sqrt(b / a), mp.sqrt(a / b) - 1 / (2 * b)
        return log_normaliser(c, d) - log_normaliser(a, b) - (c - a) * mean[0] - (d - b) * mean[1]


def families(distance, count=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    loc, shape, u, v = torch.rand(4, count, dtype=F64, generator=generator)
    loc, shape = 10 ** (2 * loc - 1), 10 ** (2 * shape - 1)
    return InverseGaussian(loc, shape), InverseGaussian(loc * (1 + distance * u), shape * (1 + distance * v))


def worst(rule, p, q):
    found, largest = rule(p, q), mp.mpf(0)
    for i in range(len(found)):
        expected = truth([x[i] for x in p._natural_params], [x[i] for x in q._natural_params])
        error = abs(found[i].item() - expected)
        largest = max(largest, error / expected if expected else (mp.inf if error else 0))
    return largest


@pytest.mark.parametrize("distance", [1e-15, 1e-12, 1e-8, 1e-4, 1e-2, 0.1, 1.0, 10.0, 1e3, 1e6])
def test_accuracy(distance):
    assert worst(stablekl.kl_divergence, *families(distance)) < 1e-14


def test_torch_loses_all_digits():
    assert worst(td.kl_divergence, *families(1e-12)) > 1e6


def test_equal_is_zero():
    p, _ = families(0.0)
    assert (stablekl.kl_divergence(p, p) == 0).all()


def test_gradients_of_both():
    p, q = families(0.3, 3)
    leaves = [x.clone().requires_grad_() for x in (p.loc, p.shape, q.loc, q.shape)]

    def kl(*x):
        return stablekl.kl_divergence(InverseGaussian(*x[:2]), InverseGaussian(*x[2:]))

    torch.autograd.gradcheck(kl, leaves)
    torch.autograd.gradgradcheck(kl, leaves)
    jacobians = torch.vmap(torch.func.jacrev(kl, argnums=(0, 1, 2, 3)))(*(x.detach() for x in leaves))
    for jacobian, expected in zip(jacobians, torch.autograd.grad(kl(*leaves).sum(), leaves), strict=True):
        torch.testing.assert_close(jacobian, expected)


def test_torch_leaves_the_gradient_of_p_out():
    loc = torch.tensor(1.0, requires_grad=True)
    p, q = InverseGaussian(loc, torch.tensor(2.0)), InverseGaussian(torch.tensor(1.5), torch.tensor(2.0))
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(td.kl_divergence(p, q), loc)
    with stablekl.harden():
        (gradient,) = torch.autograd.grad(td.kl_divergence(p, q), loc)
    assert gradient == pytest.approx(-5 / 9, rel=1e-6)


def test_events_and_batches():
    x, y = torch.rand(3, 1, 4, dtype=F64) + 0.1, torch.rand(5, 4, dtype=F64) + 0.1
    found = stablekl.kl_divergence(Concentrations(x), Concentrations(y))
    assert found.shape == (3, 5)
    torch.testing.assert_close(found, stablekl.kl_divergence(stablekl.Dirichlet(x), stablekl.Dirichlet(y)))
    p, q = InverseGaussian(torch.tensor(1.0), torch.tensor(2.0)), InverseGaussian(torch.ones(2, 1), torch.ones(3))
    assert stablekl.kl_divergence(p, q).shape == (2, 3)
    assert stablekl.kl_divergence(p, q).dtype == torch.float32


def test_parameters_that_are_matrices():
    generator = torch.Generator().manual_seed(3)
    means, factors = torch.randn(2, 6, 3, generator=generator, dtype=F64), torch.randn(2, 6, 3, 3, dtype=F64)
    precisions = factors @ factors.mT + torch.eye(3, dtype=F64)
    p, q = (Precisions(m, a) for m, a in zip(means, precisions, strict=True))
    expected = stablekl.kl_divergence(
        *(stablekl.MultivariateNormal(m, precision_matrix=a) for m, a in zip(means, precisions, strict=True))
    )
    torch.testing.assert_close(stablekl.kl_divergence(p, q), expected, rtol=1e-12, atol=0)


def test_what_can_not_be_compared():
    p = InverseGaussian(torch.tensor(1.0), torch.tensor(2.0))
    with pytest.raises(NotImplementedError, match="InverseGaussian against Concentrations"):
        stablekl.kl_divergence(p, Concentrations(torch.ones(2)))
    with pytest.raises(ValueError, match="do not broadcast"):
        stablekl.kl_divergence(
            InverseGaussian(torch.ones(2), torch.ones(2)), InverseGaussian(torch.ones(3), torch.ones(3))
        )
    assert math.isfinite(stablekl.kl_divergence(p, p))


def test_compile():
    p, q = families(0.5, 3)

    def kl(*x):
        return stablekl.kl_divergence(
            InverseGaussian(*x[:2], validate_args=False), InverseGaussian(*x[2:], validate_args=False)
        )

    parameters = (p.loc, p.shape, q.loc, q.shape)
    compiled = torch.compile(kl, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*parameters), kl(*parameters), rtol=1e-14, atol=0)
