"""Every ordered pair of Gaussian families, ours and torch's mixed, and what every family must satisfy."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal

import stablekl
from stablekl.precision.metrics import ulp_error
from stablekl.precision.references.context import exact, mp
from stablekl.precision.references.multivariate_normal import Gaussian, kl
from tests.conformance import FAMILIES, OURS, REQUIREMENTS, VECTORS

KIND = {
    "Independent": "scale_diag",
    "scale_diag": "scale_diag",
    "scale_tril": "scale_tril",
    "covariance": "covariance_matrix",
    "precision": "precision_matrix",
    "low rank": "low_rank",
}


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch's validation under vmap
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("requirement", REQUIREMENTS)
def test_every_family(name, requirement):
    REQUIREMENTS[requirement](FAMILIES[name])


@pytest.mark.parametrize("name", OURS)
def test_to_another_dtype(name):
    family = OURS[name]
    p = family.build(*family.parameters((2,), torch.float64, 1))
    if isinstance(p, Independent):  # torch's own class
        return
    narrow = p.to(torch.float32)
    assert type(narrow) is type(p)
    assert narrow.sample().dtype == torch.float32
    q = family.build(*family.parameters((2,), torch.float64, 2))
    expected = stablekl.kl_divergence(p, q)
    torch.testing.assert_close(stablekl.kl_divergence(narrow, q.to(torch.float32)), expected.float(), rtol=1e-5, atol=0)
    assert p.sample().dtype == torch.float64, "the original is unchanged"


def gaussian(name, seed, dtype):
    """A distribution and what the reference knows of it."""
    parameters = FAMILIES[name].parameters((), dtype, seed)
    loc, *value = map(exact, parameters)
    truth = Gaussian(loc, KIND[name.removeprefix("torch ")], value[0] if len(value) == 1 else tuple(value))
    return FAMILIES[name].build(*parameters), truth


PAIRS = list(itertools.product(VECTORS, repeat=2))


def test_every_ordered_pair_by_torchs_own_dispatch_in_the_order_given():
    """torch.distributions.kl_divergence finds a rule, warns of nothing, and is right."""
    truths = {}
    with stablekl.harden(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for name_p, name_q in PAIRS:
            p, reference_p = gaussian(name_p, 1, torch.float64)
            q, reference_q = gaussian(name_q, 2, torch.float64)
            key = name_p.removeprefix("torch "), name_q.removeprefix("torch ")
            if key not in truths:
                truths[key] = float(kl(reference_p, reference_q))
            got = torch.distributions.kl_divergence(p, q)
            assert float(got) == pytest.approx(truths[key], rel=1e-14), (name_p, name_q)


def test_pairs_that_torch_lacks_need_no_hardening():
    rng_p, rng_q = 1, 2
    for name_p, name_q in PAIRS:
        p, _ = gaussian(name_p, rng_p, torch.float64)
        q, _ = gaussian(name_q, rng_q, torch.float64)
        own = stablekl.kl_divergence(p, q)
        torch.testing.assert_close(torch.distributions.kl_divergence(p, q), own, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("name_p", "name_q"), [pair for pair in PAIRS if "torch" not in "".join(pair)])
def test_mixed_pairs_in_float32_are_rounded_once(name_p, name_q):
    p, reference_p = gaussian(name_p, 3, torch.float32)
    q, reference_q = gaussian(name_q, 4, torch.float32)
    truth = kl(reference_p, reference_q)
    assert ulp_error(stablekl.kl_divergence(p, q), truth, torch.float32) <= 4


@pytest.mark.parametrize(("name_p", "name_q"), [pair for pair in PAIRS if "torch" not in "".join(pair)])
def test_mixed_pairs_broadcast_and_differentiate(name_p, name_q):
    p_parameters = tuple(x.requires_grad_() for x in FAMILIES[name_p].parameters((3,), torch.float64, 1))
    q_parameters = tuple(x.requires_grad_() for x in FAMILIES[name_q].parameters((2, 3), torch.float64, 2))
    n = len(p_parameters)

    def f(*x):
        return stablekl.kl_divergence(FAMILIES[name_p].build(*x[:n]), FAMILIES[name_q].build(*x[n:]))

    assert f(*p_parameters, *q_parameters).shape == (2, 3)
    assert torch.autograd.gradcheck(f, (*p_parameters, *q_parameters), fast_mode=True)


def test_a_normal_is_a_vector_of_length_one():
    p = Normal(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]))
    q = MultivariateNormal(torch.zeros(1), scale_tril=torch.full((1, 1), 2.0))
    expected = torch.tensor([math.log(2.0) - 0.375, 0.125])
    torch.testing.assert_close(torch.distributions.kl_divergence(p, q), expected)
    assert torch.distributions.kl_divergence(q, p).shape == (2,)


NOT_THE_SAME_SPACE = {
    "normal and D = 3": (Normal(torch.zeros(3), torch.ones(3)), MultivariateNormal(torch.zeros(3), torch.eye(3))),
    "D = 2 and D = 3": (
        stablekl.MultivariateNormal(torch.zeros(2), torch.eye(2)),
        stablekl.MultivariateNormal(torch.zeros(3), torch.eye(3)),
    ),
    "independent D = 1 and D = 3": (
        Independent(stablekl.Normal(torch.zeros(1), torch.ones(1)), 1),
        Independent(stablekl.Normal(torch.zeros(3), torch.ones(3)), 1),
    ),
    "normal and independent": (Normal(0.0, 1.0), Independent(Normal(torch.zeros(3), torch.ones(3)), 1)),
}


@pytest.mark.parametrize("name", NOT_THE_SAME_SPACE)
def test_different_event_shapes_are_an_error(name):
    p, q = NOT_THE_SAME_SPACE[name]
    for a, b in ((p, q), (q, p)):
        with pytest.raises(ValueError, match="event shapes"):
            stablekl.kl_divergence(a, b)


def test_an_independent_that_is_no_gaussian_over_vectors():
    p = Independent(Normal(torch.zeros(2, 3), torch.ones(2, 3)), 2)
    with pytest.raises(NotImplementedError, match=r"Independent\(Normal, 1\)"):
        stablekl.kl_divergence(p, MultivariateNormal(torch.zeros(3), torch.eye(3)))
    with pytest.raises(NotImplementedError, match="reinterprets 2"):
        stablekl.kl_divergence(p, Independent(Normal(torch.zeros(2, 3), torch.ones(2, 3)), 1))
    assert stablekl.kl_divergence(p, p).shape == ()


def test_parameters_of_different_dtypes_promote():
    wide, narrow = torch.float64, torch.float32
    p = MultivariateNormal(torch.zeros(2, dtype=narrow), 1.1 * torch.eye(2, dtype=wide))
    q = MultivariateNormal(torch.zeros(2, dtype=narrow), torch.eye(2, dtype=narrow))
    result = stablekl.kl_divergence(p, q)
    assert result.dtype == wide
    one, other = (Gaussian([mp.mpf(0)], "covariance_matrix", [[mp.mpf(v)]]) for v in (1.1, 1.0))
    truth = mp.ldexp(kl(one, other), 1)
    assert ulp_error(result, truth, wide) <= 8
