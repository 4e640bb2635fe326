"""kl_estimate(method="integrate"): any two densities on an interval, with an error that holds."""

from __future__ import annotations

import math
import random
import warnings

import pytest
import torch
from torch import distributions as d

import stablekl
import stablekl.registry


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


# --- findings: scales far from 1, masses next to an end --------------------------------------------------------------


@pytest.mark.parametrize("scale", [10.0**e for e in (-12, -9, -6, 0, 6, 8, 9, 10, 12)])
def test_any_scale(scale):
    """log(1e9/1e-300) was inf, and values NaN."""
    s = t(scale)
    pairs = {
        0.22579135264472734: (d.Exponential(1 / s), d.HalfNormal(s)),
        0.17634753382804583: (d.Gamma(t(2.0), 1 / s), d.LogNormal(s.log(), t(1.0))),
    }
    for known, (p, q) in pairs.items():
        estimate = stablekl.kl_estimate(p, q, "integrate")
        assert abs(estimate.value - known) <= estimate.error
        assert estimate.error < 1e-10


FOUND = [
    (("Beta", 0.0782209235497979, 10308160328.246288), ("Beta", 32.9831550485144, 3.719855347179117e-07)),
    (("Beta", 3.482257798631181e-05, 39534007764.72981), ("Uniform", 0.0, 1.0)),
    (("Beta", 0.0034005702425084963, 1.2213139973679544e-07), ("Uniform", 0.0, 1.0000004814569012)),
    (
        ("LogNormal", 1.3901289161890773, 1.524684004686866e-11),
        ("Gamma", 4.301701811998598e21, 1.0713095939886991e21),
    ),
    # q's mass in the part of the axis where p is 0 to the last float, or next to an end
    (("Gumbel", 83.50139046172981, 175.83768794556946), ("Normal", 0.0, 78419694.05932687)),
    (("Exponential", 2.795736938918898e-07), ("LogNormal", 3.325750581884537, 12080208730.061104)),
    (("StudentT", 2.3037991140464156, -320.8, 0.0448), ("StudentT", 0.0019461847275854059, 0.0, 7.44)),
    # torch's log_prob is -inf where it should be -700, or NaN
    (("Weibull", 8.625943720764075, 5.637265487925053), ("Weibull", 8.87997193521977, 6.174918909194652)),
    (("HalfCauchy", 4.2792773683765607e-07), ("HalfCauchy", 1.077272391926698e-10)),
    # a tail that is no power, nor exponential
    (("Gamma", 0.002228235962982489, 0.02242084194280321), ("LogNormal", 2.9474102746988566, 194.5199952337737)),
    (("Weibull", 8.2069008903614, 0.0068950571687363465), ("Gamma", 0.07938700153423017, 0.0013600055172481849)),
]


def built(classes: object, name: str, *parameters: float) -> d.Distribution:
    return getattr(classes, name)(*map(t, parameters))


def judged(p: tuple, q: tuple) -> tuple[stablekl.KLEstimate, bool]:
    """The estimate of torch's classes, and whether it warned."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        estimate = stablekl.kl_estimate(built(d, *p), built(d, *q), "integrate")
    return estimate, any(issubclass(w.category, stablekl.AccuracyWarning) for w in caught)


@pytest.mark.parametrize(("p", "q"), FOUND)
def test_found_cases_are_within_their_error(p, q):
    known = stablekl.kl_divergence(built(stablekl, *p), built(stablekl, *q))
    estimate, warned = judged(p, q)
    assert abs(estimate.value - known) <= estimate.error
    assert warned == bool(estimate.error.isinf())


def test_what_cannot_be_resolved_is_said():
    """Nearly all of p is next to 1, beyond the last float."""
    p = d.Beta(t(0.0034), t(1.2e-7))
    with pytest.warns(stablekl.AccuracyWarning, match=r"batch element 1 \(of 2, flattened\): the error is inf"):
        estimate = stablekl.kl_estimate(
            d.Beta(torch.stack([t(2.0), p.concentration1]), torch.stack([t(3.0), p.concentration0])),
            d.Uniform(t(0.0), t(1.1)),
            "integrate",
        )
    assert estimate.error[0] < 1e-10
    assert estimate.error[1] == math.inf


FAMILIES = {
    **dict.fromkeys(("Normal", "Laplace", "Gumbel", "Cauchy"), "rs"),
    **dict.fromkeys(("Gamma", "Weibull", "Beta", "Pareto", "InverseGamma"), "ss"),
    **dict.fromkeys(("Exponential", "HalfNormal", "HalfCauchy"), "s"),
    "LogNormal": "ls",
}


def test_random_pairs_over_24_decades():
    rng = random.Random(8)
    draw = {
        "s": lambda width: 10 ** rng.uniform(-width, width),
        "r": lambda width: rng.choice([-1, 0, 1]) * 10 ** rng.uniform(-width, width),
        "l": lambda width: rng.gauss(0, 5),
    }
    resolved = tried = 0
    while tried < 120:
        names = [rng.choice(list(FAMILIES)) for _ in range(2)]
        if stablekl.registry.rule_for(*(getattr(stablekl, name) for name in names)) is None:
            continue
        width = rng.choice([1, 3, 12])
        p, q = ((name, *(draw[k](width) for k in FAMILIES[name])) for name in names)
        try:
            known = stablekl.kl_divergence(built(stablekl, *p), built(stablekl, *q))
        except NotImplementedError:
            continue
        tried += 1
        estimate, warned = judged(p, q)
        assert not estimate.value.isnan(), (p, q)
        assert warned or (estimate.value == known == math.inf) or estimate.error.isfinite(), (p, q)
        if not (estimate.value.isinf() and known.isinf()):
            assert abs(estimate.value - known) <= estimate.error + 4e-16 * known, (p, q)
        resolved += not warned
    assert resolved > 100


def test_nan_parameters_are_nan():
    estimate = stablekl.kl_estimate(d.Normal(t(math.nan), 1.0, validate_args=False), d.Normal(t(0.0), 1.0), "integrate")
    assert estimate.value.isnan()
    assert estimate.error.isnan()
