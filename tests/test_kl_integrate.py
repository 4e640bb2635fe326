"""kl_estimate(method="integrate"): any two densities on an interval, with an error that holds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributions as d

import stablekl


def t(x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


KNOWN = {
    "normals": (d.Normal(t(0.0), 1.0), d.Normal(t(0.1), 1.5)),
    "far normals": (d.Normal(t(5.0), 1e-6), d.Normal(t(0.0), 1.0)),
    "narrow q": (d.Normal(t(0.0), 1.0), d.Normal(t(0.0), 1e-9)),
    "near normals": (d.Normal(t(0.0), 1.0), d.Normal(t(1e-6), 1.0)),
    "Cauchy": (d.Cauchy(t(0.0), 1.0), d.Cauchy(t(3.0), 100.0)),
    "few degrees": (d.StudentT(t(0.5)), d.StudentT(t(3.0))),
    "both ends": (d.Beta(t(0.1), t(0.1)), d.Beta(t(2.0), t(3.0))),
    "one end": (d.Gamma(t(1e-3), t(1.0)), d.Gamma(t(1.0), t(2.0))),
    "other end": (d.Gamma(t(1.0), t(2.0)), d.Gamma(t(1e-3), t(1.0))),
    "inside": (d.Uniform(t(0.0), t(1.0)), d.Normal(t(0.0), 1.0)),
    "Pareto": (d.Pareto(t(1.0), t(0.7)), d.Pareto(t(0.5), t(2.0))),
    "half of a line": (d.Exponential(t(1.0)), d.Normal(t(0.0), t(1.0))),
    "kink": (d.Laplace(t(0.0), t(1.0)), d.Laplace(t(2.0), t(0.3))),
    "skew": (d.Gumbel(t(0.0), t(1.0)), d.Gumbel(t(1.0), t(2.0))),
    "circle": (d.VonMises(t(0.0), t(3.0)), d.VonMises(t(1.0), t(2.0))),
}


@pytest.mark.parametrize("name", KNOWN)
def test_within_its_error_of_the_closed_form(name):
    p, q = KNOWN[name]
    estimate = stablekl.kl_estimate(p, q, "integrate")
    assert estimate.method == "integrate"
    known = stablekl.kl_divergence(p, q)
    assert abs(estimate.value - known) <= estimate.error + 4e-16 * known
    assert estimate.error < 3e-4 * (1 + known)
    assert estimate.lower == 0
    assert estimate.upper == math.inf


@pytest.mark.parametrize(
    ("p", "q"),
    [
        (d.Cauchy(t(0.0), 1.0), d.Normal(t(0.0), 1.0)),
        (d.StudentT(t(2.0)), d.Normal(t(0.0), 1.0)),
        (d.Pareto(t(1.0), t(0.7)), d.Exponential(t(2.0))),
        (d.HalfCauchy(t(1.0)), d.HalfNormal(t(1.0))),
        (d.Normal(t(0.0), 1.0), d.Uniform(t(-9.0), t(9.0))),
        (d.Normal(t(0.0), 1.0), d.Gamma(t(2.0), t(1.0))),
    ],
)
def test_infinite(p, q):
    estimate = stablekl.kl_estimate(p, q, "integrate")
    assert estimate.value == math.inf == estimate.error


def test_naive_sum_on_the_same_density_fails():
    """The must-fail twin: p log(p/q) by Simpson's rule within nine deviations, near p = q."""
    p, q = KNOWN["near normals"]
    x = torch.linspace(-9, 9, 2001, dtype=torch.float64)
    terms = p.log_prob(x).exp() * (p.log_prob(x) - q.log_prob(x))
    naive = torch.trapezoid(terms, x)
    assert abs(naive / 5e-13 - 1) > 1e-5
    assert abs(stablekl.kl_estimate(p, q, "integrate").value / 5e-13 - 1) < 1e-9


def test_batches_of_mixtures_and_dtypes():
    mixture = d.MixtureSameFamily(
        d.Categorical(torch.tensor([0.3, 0.7])), d.Gamma(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))
    )
    q = d.Gamma(torch.tensor([2.0, 1.0]), 1.0)
    before = torch.get_rng_state()
    estimate = stablekl.kl_estimate(mixture, q, "integrate")
    assert torch.equal(before, torch.get_rng_state())
    assert estimate.value.shape == (2,)
    assert estimate.value.dtype == torch.float32
    x = torch.linspace(1e-6, 60, 400001, dtype=torch.float64)
    for i in range(2):
        log_p, log_q = mixture.log_prob(x), d.Gamma(q.concentration[i], q.rate[i]).log_prob(x)
        plain = torch.trapezoid(log_p.exp() * (log_p - log_q), x)
        assert abs(estimate.value[i] - plain) < 1e-6


def test_differentiable():
    loc = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)

    def value(loc, scale):
        return stablekl.kl_estimate(d.StudentT(t(3.0), loc, 1.0), d.Normal(0 * loc, scale), "integrate").value

    assert torch.autograd.gradcheck(value, (loc, scale))


def test_refused():
    with pytest.raises(NotImplementedError, match="Poisson has the support"):
        stablekl.kl_estimate(d.Poisson(3.0), d.Poisson(2.0), "integrate")
    with pytest.raises(NotImplementedError, match="scalars"):
        stablekl.kl_estimate(d.Dirichlet(torch.ones(3)), d.Dirichlet(torch.ones(3)), "integrate")
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.func.vmap(lambda x: stablekl.kl_estimate(d.Normal(x, 1.0), d.Normal(0.0, 1.0), "integrate").value)(
            torch.zeros(2)
        )
