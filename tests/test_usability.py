"""Errors in the user's words, batches without entries, and parameters outside of a domain."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributions as d

import stablekl as S
from stablekl.registry import rule_for

NAN = math.nan
EMPTY = torch.empty(0)


def t(*x: float) -> torch.Tensor:
    return torch.tensor(x if len(x) > 1 else x[0], dtype=torch.float64)


# --- the class that was built, the parameter, the index, the value --------------------------------------------------

WRONG = [
    (lambda: S.Beta(t(1.0, -1.0), 1.0), r"concentration1 of Beta must be positive, but concentration1\[1\] is -1.0"),
    (lambda: S.Beta(1.0, 0.0), r"concentration0 of Beta must be positive, but concentration0 is 0.0"),
    (lambda: S.InverseGamma(-1.0, 1.0), r"concentration of InverseGamma must be positive, but concentration is -1.0"),
    (lambda: S.FisherSnedecor(t(2.0, 0.0), 1.0), r"df1 of FisherSnedecor must be positive, but df1\[1\] is 0.0"),
    (lambda: S.LogNormal(0.0, t(1.0, 2.0, -1.0)), r"scale of LogNormal must be positive, but scale\[2\] is -1.0"),
    (lambda: S.LogNormal(NAN, 1.0), r"loc of LogNormal must be .*no NaN, but loc is nan"),
    (lambda: S.StudentT(-1.0), r"df of StudentT must be positive, but df is -1.0"),
    (lambda: S.Chi2(t(1.0, NAN)), r"df of Chi2 must be positive, but df\[1\] is nan"),
    (lambda: S.LKJCholesky(3, t(1.0, -1.0)), r"concentration of LKJCholesky must be .*concentration\[1\] is -1.0"),
    (lambda: S.Normal(t(0.0, NAN), 1.0), r"loc of Normal must be .*no NaN, but loc\[1\] is nan"),
    (lambda: S.Normal(0.0, 0.0), r"scale of Normal must be positive, but scale is 0.0.*softplus_scale"),
    (
        lambda: S.Geometric(t(0.5, 0.0)),
        r"probs of Geometric must be above 0 and up to 1, but probs\[1\] is 0.0",
    ),
    (lambda: S.Dirichlet(t(1.0, -2.0)), r"concentration of Dirichlet must be positive, but concentration\[1\] is -2.0"),
    (lambda: S.Uniform(t(0.0, 1.0), t(1.0, 0.5)), r"low of Uniform must be below the upper end, but low\[1\] is 1.0"),
    (lambda: S.LogisticNormal(t(0.0, 0.0), t(1.0, -1.0)), r"scale of LogisticNormal must be .*scale\[1\] is -1.0"),
]


@pytest.mark.parametrize(("build", "message"), WRONG)
def test_errors_name_the_class_that_was_built(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_torchs_own_name_another_class():
    """The must-fail twin."""
    with pytest.raises(ValueError, match="distribution Dirichlet"):
        d.Beta(-1.0, 1.0)


@pytest.mark.parametrize("family", [S.Categorical, S.OneHotCategorical])
def test_a_list_is_no_tensor(family):
    with pytest.raises(TypeError, match=rf"probs of {family.__name__} must be a tensor, and is a list: give torch"):
        family([1.0, 2.0])
    with pytest.raises(TypeError, match="loc of Normal must be a tensor, and is a list"):
        S.Normal([1.0, 2.0], 1.0)


def test_what_is_no_parameter_is_left_to_python_and_torch():
    with pytest.raises(TypeError, match="concentration0"):
        S.Beta(1.0)
    with pytest.raises(RuntimeError, match="size of tensor"):
        S.Normal(torch.zeros(2), torch.ones(3))
    with pytest.raises(ValueError, match="dim"):
        S.LKJCholesky(1, 1.0)


def test_subclasses_and_expand_keep_their_type():
    class Mine(S.LogNormal):
        pass

    assert type(Mine(0.0, 1.0).expand((3,))) is Mine
    with pytest.raises(ValueError, match="scale of Mine"):
        Mine(0.0, -1.0)
    assert type(S.LKJCholesky(3, 1.0).expand((2,))) is S.LKJCholesky

    class Other(S.Normal):
        def __init__(self, width):
            super().__init__(0.0, width)

    with pytest.raises(NotImplementedError):
        Other(1.0).expand((3,))


def test_a_single_matrix_has_no_index():
    with pytest.raises(S.NotPositiveDefiniteError, match=r"^the matrix is not positive definite"):
        S.safe_cholesky(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"^the matrix has the entry nan at \[0, 1\]"):
        S.safe_cholesky(torch.tensor([[1.0, NAN], [NAN, 1.0]]))


# --- batch shapes ----------------------------------------------------------------------------------------------------

SHAPES = {
    "Normal": lambda n, c: c.Normal(torch.zeros(n), torch.ones(n)),
    "Gamma": lambda n, c: c.Gamma(torch.ones(n), torch.ones(n)),
    "Beta": lambda n, c: c.Beta(torch.ones(n), torch.ones(n)),
    "Dirichlet": lambda n, c: c.Dirichlet(torch.ones(n, 3)),
    "Categorical": lambda n, c: c.Categorical(torch.ones(n, 3)),
    "Bernoulli": lambda n, c: c.Bernoulli(0.5 * torch.ones(n)),
    "MultivariateNormal": lambda n, c: c.MultivariateNormal(torch.zeros(n, 2), torch.eye(2)),
    "Independent": lambda n, c: d.Independent(c.Laplace(torch.zeros(n, 2), torch.ones(n, 2)), 1),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("classes", [S, d])
def test_batch_shapes_that_do_not_broadcast(name, classes):
    p, q = (SHAPES[name](n, classes) for n in (2, 3))
    with pytest.raises(ValueError, match=r"batch shapes \(2,\) and \(3,\) do not broadcast.*insert a 1"):
        S.kl_divergence(p, q)
    with S.harden(), pytest.raises(ValueError, match="do not broadcast"):
        d.kl_divergence(p, q)
    one = SHAPES[name](1, classes)
    assert S.kl_divergence(one, q).shape == (3,)


def test_cross_pairs_say_so_too():
    with pytest.raises(ValueError, match="do not broadcast"):
        S.kl_divergence(S.Normal(torch.zeros(2), 1.0), S.Laplace(torch.zeros(3), 1.0))
    with pytest.raises(ValueError, match="do not broadcast"):
        S.kl_estimate(d.StudentT(3 * torch.ones(2)), d.Normal(torch.zeros(3), 1.0), "integrate")


def test_constructors_and_the_check_of_shapes_compile():
    @torch.compile(fullgraph=True, backend="eager")
    def f(a, b):
        first = S.kl_divergence(S.Beta(a, b), S.Beta(b, a[:1])) + S.kl_divergence(S.Normal(a, b), S.Normal(b, a))
        return first + S.kl_divergence(S.LogNormal(a, b), S.Gamma(b, a)) + S.kl_divergence(S.Chi2(a), S.Gamma(b, a))

    asked = d.Distribution._validate_args
    try:
        assert f(torch.rand(3) + 0.1, torch.rand(3) + 0.1).shape == (3,)
    finally:
        d.Distribution.set_default_validate_args(asked)  # torch.compile has turned it off


# --- empty batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "other"),
    [
        (lambda: S.Beta(EMPTY, EMPTY), S.Beta(1.0, 2.0)),
        (lambda: S.Beta(EMPTY, 1.0, validate_args=True), S.Beta(1.0, 2.0)),
        (lambda: S.Dirichlet(torch.empty(0, 3)), S.Dirichlet(torch.ones(3))),
        (lambda: S.LKJCholesky(3, EMPTY), S.LKJCholesky(3, 1.0)),
        (lambda: S.Kumaraswamy(EMPTY, EMPTY), S.Kumaraswamy(1.0, 2.0)),
    ],
)
def test_empty_batches(build, other):
    empty = build()
    assert empty.batch_shape == (0,)
    assert empty._validate_args
    assert S.kl_divergence(empty, other).shape == S.kl_divergence(other, empty).shape == (0,)
    assert empty.sample((2,)).shape[:2] == (2, 0)


def test_torchs_beta_takes_no_empty_batch():
    """The must-fail twin: when torch repairs it, so much less for us to do."""
    with pytest.raises(RuntimeError, match="0 elements"):
        d.Beta(EMPTY, EMPTY)


# --- parameters outside of a domain, unchecked -----------------------------------------------------------------------

PARAMETERS = {
    S.Cauchy: {"loc": 0.3, "scale": 1.2},
    S.Pareto: {"scale": 0.5, "alpha": 2.0},
    S.Uniform: {"low": 0.1, "high": 0.9},
    S.VonMises: {"loc": 0.3, "concentration": 1.5},
    S.Normal: {"loc": 0.3, "scale": 1.2},
    S.Gamma: {"concentration": 1.5, "rate": 0.8},
    S.Exponential: {"rate": 0.8},
    S.Beta: {"concentration1": 1.5, "concentration0": 2.0},
}
POSITIVE = ("scale", "alpha", "concentration")
SELF = [S.Cauchy, S.Pareto, S.Uniform, S.VonMises]
INFINITE = [
    (S.Normal, S.Gamma),
    (S.Exponential, S.Beta),
    (S.Pareto, S.Uniform),
    (S.Gamma, S.Pareto),
    (S.Beta, S.Pareto),
]


def changed(pair: tuple[type, type], side: int, name: str, value: float) -> torch.Tensor:
    given = [{k: t(v) for k, v in PARAMETERS[c].items()} for c in pair]
    given[side][name] = t(value)
    return S.kl_divergence(*(c(**x, validate_args=False) for c, x in zip(pair, given, strict=True)))


@pytest.mark.parametrize("pair", [*((c, c) for c in SELF), *INFINITE])
def test_nan_stays_nan(pair):
    assert rule_for(*pair) is not None
    for side in (0, 1):
        for name in PARAMETERS[pair[side]]:
            assert changed(pair, side, name, NAN).isnan(), (side, name)


@pytest.mark.parametrize("family", SELF)
def test_a_negative_scale_is_nan(family):
    for side in (0, 1):
        for name in PARAMETERS[family]:
            if name in POSITIVE:
                assert changed((family, family), side, name, -1.0).isnan(), (side, name)


def test_cauchy_of_opposite_scales():
    """The finding: log1p(-1)."""
    p, q = S.Cauchy(0.0, -1.0, validate_args=False), S.Cauchy(0.0, 1.0)
    assert S.kl_divergence(p, q).isnan()


def test_an_interval_the_wrong_way_round_is_nan():
    p = S.Uniform(t(1.0), t(0.0), validate_args=False)
    assert S.kl_divergence(p, S.Uniform(t(0.2), t(0.3))).isnan()
    assert S.kl_divergence(S.Uniform(t(0.2), t(0.3)), p).isnan()
    assert S.kl_divergence(S.Uniform(t(0.0), t(1.0)), S.Uniform(t(0.2), t(0.3))) == math.inf
