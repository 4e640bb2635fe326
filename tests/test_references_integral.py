"""References that are sums at points, of LKJ matrices and of tails, by second routes; the rules they judge."""

from __future__ import annotations

import pytest
import torch

import stablekl
from stablekl.precision.batches import Plan
from stablekl.precision.metrics import group_error
from stablekl.precision.references import FAMILIES, beta, fisher_snedecor, kumaraswamy, lkj_cholesky, student_t
from stablekl.precision.references.context import agreed, gradient, mp
from stablekl.precision.references.family import divergence
from stablekl.precision.references.family import kl as family_kl
from stablekl.precision.references.tails import FUNCTIONS, TAILS, entropy_at, function_at
from stablekl.precision.subjects import catalogue
from stablekl.precision.subjects.tails import ENTROPIES

F64 = torch.float64


def numbers(*values):
    return tuple(mp.mpf(v) for v in values)


# ---- sums at points -----------------------------------------------------------------------------------------------

MODULES = {"FisherSnedecor": fisher_snedecor, "Kumaraswamy": kumaraswamy}
EDGES = {"FisherSnedecor": [0, 0.1, 1, 10, mp.inf], "Kumaraswamy": [0, 0.1, 0.5, 0.9, 1]}


@pytest.mark.parametrize("values", [(3.0, 5.0, 4.0, 5.0), (2.5, 7.0, 9.0, 2.5), (30.0, 8.0, 3.0, 2.0)])
@pytest.mark.parametrize("name", MODULES)
def test_sums_are_the_integral_of_the_definition(name, values):
    module, theta = MODULES[name], numbers(*values)
    with mp.workdps(30):

        def integrand(x):
            log_p, log_q = (module.log_density_at(x, *half) for half in (theta[:2], theta[2:]))
            return mp.exp(log_p) * (log_p - log_q)

        whole = mp.quad(lambda x: mp.exp(module.log_density_at(x, *theta[:2])), EDGES[name])
        assert abs(whole - 1) < 1e-15
        assert abs(mp.quad(integrand, EDGES[name]) / module.kl(*theta) - 1) < 1e-12


@pytest.mark.parametrize("name", MODULES)
def test_their_densities_are_torchs(name):
    for x, theta in ((0.3, (3.0, 5.0)), (0.9, (0.4, 0.3))):
        cls = getattr(torch.distributions, name)
        theirs = cls(*(torch.tensor(t, dtype=F64) for t in theta)).log_prob(torch.tensor(x, dtype=F64)).item()
        assert float(MODULES[name].log_density_at(*numbers(x, *theta))) == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("name", MODULES)
def test_their_gradients_are_differences(name):
    module, theta = MODULES[name], numbers(3.0, 5.0, 3.0001, 4.0)
    found = agreed(lambda: module.kl_gradient_at(*theta))
    for (a,), (b,) in zip(found, gradient(module.kl_at, *theta), strict=True):
        assert abs(a / b - 1) < 1e-20


def test_student_t_gradients_are_differences():
    theta, family = numbers(3.0, 0.5, 1.0, 4.0, 0.25, 2.0), FAMILIES["StudentT"]
    found = student_t.kl_gradient(*theta)
    for (a,), (b,) in zip(found, gradient(lambda *x: family_kl(family, x[:3], family, x[3:]), *theta), strict=True):
        assert abs(a / b - 1) < 1e-20
    assert student_t.kl_gradient(*theta[:3], *theta[:3]) == [[0]] * 6
    assert student_t.kl_gradient(*numbers(3.0, 0.5, 1.0, 4.0, 0.5, 2.0))[1] == [0]


def test_an_f_distribution_of_many_degrees_is_a_gamma():
    """df2 -> infinity: df1 X is chi-squared."""
    found = fisher_snedecor.kl(*numbers(3.0, 1e30, 5.0, 1e30))
    # Gamma(df/2, df/2) of either
    truth = divergence(FAMILIES["Gamma"], numbers(1.5, 1.5), FAMILIES["Gamma"], numbers(2.5, 2.5))
    assert abs(found / truth - 1) < 1e-25


# ---- LKJ ----------------------------------------------------------------------------------------------------------


def test_lkj_of_two_dimensions_is_a_beta():
    for p, q in ((1.0, 1.0001), (0.2, 7.0), (1e6, 3.0)):
        a, b = numbers(p, q)
        truth = divergence(beta.Beta(), (a, a), beta.Beta(), (b, b))
        assert abs(lkj_cholesky.kl(2, a, b) / truth - 1) < 1e-20


@pytest.mark.parametrize("dim", [3, 6])
def test_lkj_normalisers_are_torchs(dim):
    """The density of one concentration over that of another is a power of the determinant, and the normalisers."""
    root = torch.distributions.LKJCholesky(dim, torch.tensor(2.0, dtype=F64)).sample()
    log_p, log_q = (
        torch.distributions.LKJCholesky(dim, torch.tensor(c, dtype=F64)).log_prob(root).item() for c in (1.5, 4.0)
    )
    log_det = 2 * root.diagonal().log().sum().item()
    ours = lkj_cholesky._log_normaliser(dim, mp.mpf(4.0)) - lkj_cholesky._log_normaliser(dim, mp.mpf(1.5))
    assert log_p - log_q == pytest.approx((1.5 - 4.0) * log_det + float(ours), rel=1e-11)


# ---- tails and entropies ------------------------------------------------------------------------------------------

AT = {
    "Beta": (0.375, 1.5, 2.5),
    "Chi2": (1.5, 3.0),
    "Gamma": (1.5, 2.0, 0.75),
    "InverseGamma": (1.5, 2.0, 0.75),
    "Cauchy": (1.5, 0.25, 0.5),
    "Exponential": (1.5, 0.75),
    "Gumbel": (1.5, 0.25, 0.5),
    "HalfCauchy": (1.5, 0.5),
    "HalfNormal": (1.5, 0.5),
    "Laplace": (1.5, 0.25, 0.5),
    "LogNormal": (1.5, 0.25, 0.5),
    "Normal": (1.5, 0.25, 0.5),
    "Pareto": (1.5, 0.5, 3.0),
    "Weibull": (1.5, 0.5, 1.5),
}


@pytest.mark.parametrize("name", TAILS)
def test_tails_are_integrals_of_the_density(name):
    x, *theta = numbers(*AT[name])
    family = FAMILIES[name]
    low = theta[0] - 6 * theta[1] if name == "Gumbel" else family.support(*theta).low  # e^-e^400 takes forever
    edges = [low, *(m for m in numbers(-2, 0.1, 0.25, 0.5, 1) if low < m < x), x]
    below = mp.quad(lambda t: mp.exp(family.log_density(t, *theta)), edges)
    found = [function_at(name, f, x, *theta) for f in FUNCTIONS]
    for value, truth in zip(found, (below, 1 - below, mp.log(below), mp.log1p(-below)), strict=True):
        assert abs(value / truth - 1) < 1e-10
    assert abs(found[0] + found[1] - 1) < 1e-15


@pytest.mark.parametrize("name", ["Gamma", "StudentT", "Weibull", "Geometric"])
def test_entropies_are_torchs(name):
    theta = {"Geometric": (0.25,), "StudentT": (3.0, 0.5, 2.0)}.get(name, (1.5, 2.5))
    theirs = getattr(torch.distributions, name)(*(torch.tensor(t, dtype=F64) for t in theta)).entropy().item()
    assert float(entropy_at(FAMILIES[name], *numbers(*theta))) == pytest.approx(theirs, rel=1e-12)


MEASURED = [n for n, s in catalogue().items() if n.split(" ")[0] in (*FUNCTIONS, "entropy") and "stablekl" in s.rules]
PLANS = [Plan("apart", i, centre, spread, 1.0) for i, (centre, spread) in enumerate(((0.0, 0.02), (0.0, 1.0)))]


def worst(name, implementation, dtype=F64, rows=12):
    subject, found = catalogue()[name], 0.0
    for plan in PLANS:
        batch = tuple(x[:rows] for x in subject.expand(plan, dtype))
        result = subject.rules[implementation](*batch)
        for i in range(len(result)):
            row = [x[i] for x in batch]
            truth = subject.truth(row)[0]
            scale = subject.scale(abs(truth[0]), row) if subject.scale else None
            found = max(found, group_error([float(result[i])], truth, dtype, scale))
    return found


@pytest.mark.parametrize("name", MEASURED)
def test_tails_and_entropies(name):
    assert worst(name, "stablekl") <= 32
    assert worst(name, "stablekl", torch.float32) <= 0.51


@pytest.mark.parametrize(
    "name", ["sf Normal", "log_cdf Gumbel", "cdf LogNormal", "cdf Pareto", "entropy StudentT", "entropy InverseGamma"]
)
def test_torchs_lose_them(name):
    """The must-fail twin."""
    assert worst(name, "torch", rows=40) > 1000


def test_every_entropy_and_tail_of_ours_is_measured():
    for name in ENTROPIES:
        assert f"entropy {name}" in catalogue()
    for name in TAILS:
        for function in FUNCTIONS:
            if function in vars(getattr(stablekl, name)):
                assert f"{function} {name}" in catalogue()


# ---- what they judge ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["FisherSnedecor-FisherSnedecor", "Kumaraswamy-Kumaraswamy", "StudentT-StudentT"])
def test_rules_without_a_closed_form(name):
    subject = catalogue()[name]
    for plan in (Plan("near", 1, 0.0, 1.0, 1.0), Plan("apart", 2, 0.0, 1.0, 1.0)):
        batch = tuple(x[:4] for x in subject.expand(plan, F64))
        result = subject.rules["stablekl"](*batch)
        for i in range(4):
            assert group_error([float(result[i])], subject.truth([x[i] for x in batch])[0], F64, None) <= 64


LARGE = [
    ("LogNormal", (-16511.908203125, 17.91421890258789), "Exponential", (50.81624984741211,)),
    ("LogNormal", (-28747.5234375, 133.0248260498047), "Gamma", (407795990528.0, 7.9614977721576e-07)),
]


@pytest.mark.parametrize(("p", "theta_p", "q", "theta_q"), LARGE)
def test_log_normals_of_a_mean_below_any_float(p, theta_p, q, theta_q):
    x = [torch.tensor(v, dtype=F64, requires_grad=True) for v in (*theta_p, *theta_q)]
    value = stablekl.kl_divergence(getattr(stablekl, p)(*x[:2]), getattr(stablekl, q)(*x[2:]))
    theta = numbers(*theta_p), numbers(*theta_q)
    truth = divergence(FAMILIES[p], theta[0], FAMILIES[q], theta[1])
    assert abs(mp.mpf(value.item()) / truth - 1) < 1e-14
    slopes = torch.autograd.grad(value, x)
    expected = gradient(lambda *t: family_kl(FAMILIES[p], t[:2], FAMILIES[q], t[2:]), *theta[0], *theta[1])
    for slope, (derivative,) in zip(slopes, expected, strict=True):
        assert abs(mp.mpf(slope.item()) - derivative) <= 1e-12 * abs(derivative)


def test_huge_concentrations():
    def gamma(a, b):
        return stablekl.Gamma(torch.tensor(a, dtype=F64), b)

    overflows = stablekl.HalfNormal(torch.tensor(3.6712709276866088e-59, dtype=F64))
    assert stablekl.kl_divergence(gamma(8.652209007628378e58, 7.066013378916741e-38), overflows) == torch.inf
    q = stablekl.Weibull(torch.tensor(1e10, dtype=F64), 1e9)
    values = numbers(1e20, 1e10, 1e10, 1e9)
    truth = divergence(FAMILIES["Gamma"], values[:2], FAMILIES["Weibull"], values[2:])
    found = stablekl.kl_divergence(gamma(1e20, 1e10), q)
    assert abs(mp.mpf(found.item()) / truth - 1) < 1e-14
