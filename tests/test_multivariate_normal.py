"""Multivariate normals: the KL of each parameter's rule against mpmath's, and the class as a stand-in for torch's.

The unit of the errors is eps * max(1, kappa) of the result, kappa = cond(Lq) for scale_tril and the larger of cond(Sp)
and cond(Sq) for a covariance or precision: a Cholesky factor of Sp knows Sp to eps * cond(Sp).
"""

from __future__ import annotations

import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal as TorchMVN
from torch.distributions.kl import _KL_REGISTRY

import stablekl
from stablekl.distributions import _mvn_kl
from stablekl.distributions._base import broadcast_shape
from stablekl.distributions._mvn_kl import covariance_kl, precision_kl, scale_tril_kl
from stablekl.precision.metrics import group_error
from stablekl.precision.references import FAMILIES
from stablekl.precision.references.context import exact, mp
from stablekl.precision.references.family import divergence
from stablekl.precision.references.multivariate_normal import Gaussian, gradients, kl

MVN = stablekl.MultivariateNormal
RULES = {"scale_tril": scale_tril_kl, "covariance_matrix": covariance_kl, "precision_matrix": precision_kl}
DTYPES = (torch.float32, torch.float64)
torchs_rule = _KL_REGISTRY[TorchMVN, TorchMVN]

# Largest known of 120,000 random sets (D = 1 ... 12, conditions of p and q to 1e6 each): 2.0, 3.4 and 8.7 in float64;
# 2.4, 0.5 and 0.5 in float32. Gradients (6,000 sets, D to 4, in units of cond(Sq) or cond(Lq) alone): 11, 27 and 7.4.
BAR = 16
GRADIENT_BAR = 32


def spd(rng, d, condition):
    basis = np.linalg.qr(rng.standard_normal((d, d)))[0]
    return (basis * np.logspace(0, -np.log10(condition), d)) @ basis.T


def parameter(kind, covariance):
    """The float64 parameter of a covariance; a precision is just as good a random matrix."""
    covariance = 0.5 * (covariance + covariance.T)
    return np.linalg.cholesky(covariance) if kind == "scale_tril" else covariance


def as_given(kind, a, dtype):
    """Rounded to the dtype, exactly symmetric or triangular."""
    a = torch.from_numpy(a).to(dtype)
    return a.tril() if kind == "scale_tril" else a.tril() + a.tril(-1).mT


def nudged(x, ulps, rng):
    exponent = torch.frexp(torch.where(x == 0, torch.ones_like(x), x))[1] - 1
    ulp = torch.ldexp(torch.ones_like(x), exponent) * torch.finfo(x.dtype).eps
    steps = torch.from_numpy(rng.integers(-ulps, ulps + 1, x.shape)).to(x.dtype)
    return torch.where(x == 0, x, x + steps * ulp)


def far(kind, d, condition, dtype, seed):
    rng = np.random.default_rng(seed)
    q = as_given(kind, parameter(kind, spd(rng, d, condition ** (2 if kind == "scale_tril" else 1))), dtype)
    p = as_given(kind, parameter(kind, 3.0 * spd(rng, d, min(condition, 100.0))), dtype)
    return (
        torch.from_numpy(rng.standard_normal(d)).to(dtype),
        p,
        torch.from_numpy(rng.standard_normal(d)).to(dtype),
        q,
    )


def stretched(kind, d, condition_p, condition_q, dtype, seed):
    """Conditions of their own."""
    rng = np.random.default_rng(seed)
    power = 2 if kind == "scale_tril" else 1
    a_p, a_q = (as_given(kind, parameter(kind, spd(rng, d, c**power)), dtype) for c in (condition_p, condition_q))
    return torch.from_numpy(rng.standard_normal(d)).to(dtype), a_p, torch.zeros(d, dtype=dtype), a_q


def between(kind, d, condition, norm, seed):
    """Sp = Lq (I + W) Lq' with |W| given: about where the rules for near and for far covariances meet."""
    rng = np.random.default_rng(seed)
    a_q = as_given(kind, parameter(kind, spd(rng, d, condition)), torch.float64)
    root, w = np.linalg.cholesky(a_q.numpy()), rng.standard_normal((d, d))
    w = (w + w.T) * norm / np.linalg.norm(w + w.T)
    a_p = as_given(kind, parameter(kind, root @ (np.eye(d) + w) @ root.T), torch.float64)
    mean = torch.zeros(d, dtype=torch.float64)
    return mean, a_p, mean, a_q


def near(kind, d, condition, dtype, seed, ulps, same_mean=False):
    rng = np.random.default_rng(seed)
    _, _, mean, q = far(kind, d, condition, dtype, seed)
    p = nudged(q, ulps, rng)
    p = p if kind == "scale_tril" else p.tril() + p.tril(-1).mT
    return mean if same_mean else nudged(mean, ulps, rng), p, mean, q


def shrunk(kind, d, condition, dtype, seed, ratio, columns=False):
    """Lp << Lq, in all columns or in every other one."""
    _, _, mean, q = far(kind, d, condition, dtype, seed)
    factors = torch.full((d,), ratio, dtype=dtype)
    if columns:
        factors[::2] = 1
    return mean, q * factors if kind == "scale_tril" else q * ratio, mean, q


def condition_of(row):
    return max(1.0, float(torch.linalg.cond(row[3].double())))


def both(kind, row):
    """The two Gaussians as the reference knows them."""
    mu_p, a_p, mu_q, a_q = map(exact, row)
    return Gaussian(mu_p, kind, a_p), Gaussian(mu_q, kind, a_q)


def error(rule, kind, row):
    """Relative error of the KL in units of eps * cond(Sq), or cond(Lq) for factors: p's condition excuses nothing."""
    truth, got = kl(*both(kind, row)), rule(*row).item()
    if truth == 0:
        return 0.0 if got == 0 else math.inf
    return group_error([got], [truth], row[0].dtype, condition_of(row) * truth)


def torchs(kind):
    def rule(mu_p, a_p, mu_q, a_q):
        return torchs_rule(
            TorchMVN(mu_p, **{kind: a_p}, validate_args=False), TorchMVN(mu_q, **{kind: a_q}, validate_args=False)
        )

    return rule


by_kind = pytest.mark.parametrize("kind", RULES)
by_dtype = pytest.mark.parametrize("dtype", DTYPES)


def far_rows(kind, dtype):
    for seed, (d, condition) in enumerate([(1, 1.0), (2, 10.0), (3, 1e3), (3, 1e6), (8, 1e2)]):
        yield far(
            kind, d, condition if dtype == torch.float64 or kind == "scale_tril" else min(condition, 1e4), dtype, seed
        )


def near_rows(kind, dtype):
    reach = 12 if dtype == torch.float32 else 36
    conditions = (1.0, 1e3, 1e6) if dtype == torch.float64 or kind == "scale_tril" else (1.0, 1e3)
    for k in range(0, reach, 3):
        d = (1, 2, 3, 5)[(k // 3) % 4]
        condition = conditions[(k // 3) % len(conditions)]
        ulps = min(2**k, max(1, int(0.01 / condition / torch.finfo(dtype).eps)))  # p stays positive definite
        yield near(kind, d, condition, dtype, k, ulps)
        yield near(kind, d, condition, dtype, k + 100, ulps, same_mean=True)


def shrunk_rows(kind, dtype):
    for seed, ratio in enumerate([0.6, 0.4, 1e-3, 1e-7, 1e-12]):
        yield shrunk(kind, 3, 10.0, dtype, seed, ratio)
        yield shrunk(kind, 3, 10.0, dtype, seed, ratio, columns=True)
    if dtype == torch.float64:
        yield shrunk(kind, 3, 10.0, dtype, 9, 1e-30)


def stretched_rows(kind, dtype):
    reach = 1e6 if dtype == torch.float64 or kind == "scale_tril" else 1e4
    for seed, (d, condition_q) in enumerate(itertools.product((2, 5), (1.0, 30.0, 1e3))):
        yield stretched(kind, d, reach, condition_q, dtype, seed)
        yield stretched(kind, d, 300.0, condition_q, dtype, seed + 100)


@pytest.mark.parametrize("kind", ["covariance_matrix", "precision_matrix"])
def test_between_near_and_far(kind):
    for seed in range(3):
        for norm in (0.3, 0.5, 0.6, 0.75, 0.87, 0.88, 0.95):
            assert error(RULES[kind], kind, between(kind, 2 + seed, 1e3**seed, norm, seed)) <= BAR
    assert error(RULES[kind], kind, between(kind, 3, 1.0, 0.531, 9377)) <= BAR  # 18 with two factorisations


@pytest.mark.parametrize("kind", ["covariance_matrix", "precision_matrix"])
@pytest.mark.parametrize("condition", [1e4, 1e8, 1e12, 1e14])
def test_a_scaled_copy_is_exact_however_ill_conditioned(kind, condition):
    for d, ratio in itertools.product((2, 5), (0.25, 4.0, 16.0)):  # powers of 4: the factors scale exactly
        a = as_given(kind, spd(np.random.default_rng(d), d, condition), torch.float64)
        zeros, variance = [mp.mpf(0)] * d, ratio if kind == "covariance_matrix" else 1 / ratio
        p, q = (Gaussian(zeros, "scale_diag", [mp.sqrt(v)] * d) for v in (1, variance))
        truth = float(kl(p, q))
        zero = torch.zeros(d, dtype=torch.float64)
        assert abs(RULES[kind](zero, a, zero, ratio * a).item() / truth - 1) <= 1e-15


@pytest.mark.parametrize("kl", [scale_tril_kl, covariance_kl])
def test_second_derivatives_where_no_gradient_is_recorded(kl):
    row = [
        x.detach() for x in far("scale_tril" if kl is scale_tril_kl else "covariance_matrix", 3, 10.0, torch.float64, 0)
    ]

    def of_shift(t):
        return kl(row[0] + t, row[1], row[2], row[3]) + kl(row[0], row[1] * (1 + t), row[2], row[3])

    zero = torch.zeros((), dtype=torch.float64)
    expected = torch.func.hessian(of_shift)(zero)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.hessian(of_shift)(zero), expected)
        torch.vmap(lambda t: torch.func.jvp(of_shift, (zero,), (t,)))(torch.ones(2, dtype=torch.float64))


@by_dtype
@by_kind
@pytest.mark.parametrize("rows", [far_rows, near_rows, shrunk_rows, stretched_rows])
def test_kl(rows, kind, dtype):
    assert max(error(RULES[kind], kind, row) for row in rows(kind, dtype)) <= BAR


@pytest.mark.parametrize("kind", ["covariance_matrix", "precision_matrix"])
def test_computed_factors_left_as_they_are_fail_the_same_check(kind, monkeypatch):
    monkeypatch.setattr(_mvn_kl, "residual", lambda c, a, b: torch.zeros_like(c))
    assert max(error(RULES[kind], kind, row) for row in stretched_rows(kind, torch.float64)) > 10 * BAR


@by_dtype
@by_kind
def test_kl_of_32_dimensions(kind, dtype):
    assert error(RULES[kind], kind, near(kind, 32, 100.0, dtype, 0, 4)) <= BAR


@by_dtype
@by_kind
def test_torchs_rule_fails_the_same_check(kind, dtype):
    # in units of eps * condition: the same pairs at condition 1, where nothing excuses it
    rows = [near(kind, 3, 1.0, dtype, seed, 4) for seed in range(4)]
    assert max(error(torchs(kind), kind, row) for row in rows) > 1e4
    assert max(error(RULES[kind], kind, row) for row in rows) <= BAR


def without_the_choice_of_columns(mu_p, a_p, mu_q, a_q):
    x = torch.linalg.solve_triangular(a_q, a_p - a_q, upper=False)
    r = x.diagonal()
    return 0.5 * x.square().sum() + (r - torch.log1p(r)).sum() + 0 * (mu_p - mu_q).sum()


def test_subtracting_columns_that_are_far_apart_fails_the_same_check():
    rows = list(shrunk_rows("scale_tril", torch.float64))
    assert max(error(without_the_choice_of_columns, "scale_tril", row) for row in rows) > 1e4


def test_the_reference_on_a_diagonal_is_the_sum_of_univariate_ones():
    mu, sigma = [0.3, -1.0], [0.5, 2.0]
    rows = [[mp.mpf(x) for x in row] for row in (mu, sigma, [0.0, 1.0], [1.5, 0.25])]
    normal = FAMILIES["Normal"]
    each = [divergence(normal, (a, b), normal, (c, d)) for a, b, c, d in zip(*rows, strict=True)]
    with mp.workprec(100):
        truth = mp.fsum(each)
        dense = kl(Gaussian(rows[0], "scale_diag", rows[1]), Gaussian(rows[2], "scale_diag", rows[3]))
        assert abs(dense - truth) < mp.ldexp(truth, -80)
    p = MVN(torch.tensor(mu), scale_diag=torch.tensor(sigma))
    q = MVN(torch.tensor([0.0, 1.0]), scale_diag=torch.tensor([1.5, 0.25]))
    assert float(stablekl.kl_divergence(p, q)) == pytest.approx(float(truth), rel=3e-7)


def gradient_error(rule, kind, row):
    """In ulps of the largest component of each parameter's gradient, over the condition."""
    leaves = [x.clone().requires_grad_() for x in row]
    rule(*leaves).backward()
    truths = gradients(*both(kind, row))
    worst = 0.0
    condition = max(condition_of(row), condition_of((row[2], row[3], row[0], row[1])))
    for leaf, truth in zip(leaves, truths, strict=True):
        entries = list(itertools.chain(*truth)) if leaf.ndim == 2 else truth
        got = leaf.grad.flatten().tolist()
        assert all(map(math.isfinite, got))
        largest = max(abs(t) for t in entries)
        if largest:
            worst = max(worst, group_error(got, entries, row[0].dtype, condition * largest))
        elif any(got):
            worst = math.inf
    return worst


@by_dtype
@by_kind
def test_gradients(kind, dtype):
    rows = [
        far(kind, 2, 10.0, dtype, 0),
        near(kind, 2, 100.0, dtype, 1, 1),
        near(kind, 3, 10.0, dtype, 2, 64, same_mean=True),
    ]
    rows += [shrunk(kind, 2, 10.0, dtype, 3, 1e-10), shrunk(kind, 1, 1.0, dtype, 4, 0.5)]
    rows += [shrunk(kind, 3, 1e4, dtype, 5, 0.7)]  # just beyond what counts as near
    assert max(gradient_error(RULES[kind], kind, row) for row in rows) <= GRADIENT_BAR


@by_dtype
@by_kind
def test_torchs_gradients_fail_the_same_check(kind, dtype):
    assert gradient_error(torchs(kind), kind, near(kind, 2, 10.0, dtype, 1, 1)) > 1e4


@pytest.mark.parametrize("d", [255, 256, 300, 520])
def test_gradients_of_large_factors_are_made_of_blocks(d):
    g = torch.Generator().manual_seed(d)
    row = [torch.randn(2, d, generator=g, dtype=torch.float64) for _ in range(2)]
    for _ in range(2):
        noise = torch.randn(2, d, d, generator=g, dtype=torch.float64) * 0.2 / d**0.5
        row.append((torch.eye(d) + noise).tril())
    mu_p, mu_q, tril_p, tril_q = leaves = [x.requires_grad_() for x in row]
    weight = torch.tensor([1.0, -3.0], dtype=torch.float64)
    expected = torch.autograd.grad(
        torchs_rule(*(TorchMVN(*x) for x in ((mu_p, None, None, tril_p), (mu_q, None, None, tril_q)))), leaves, weight
    )
    for got, want in zip(
        torch.autograd.grad(scale_tril_kl(mu_p, tril_p, mu_q, tril_q), leaves, weight), expected, strict=True
    ):
        want = want.tril() if want.ndim == 3 else want  # torch's has entries above the diagonal too
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
        assert got.is_contiguous()


def test_second_derivatives_of_a_covariance_far_smaller_than_the_other():
    def f(c):
        q = TorchMVN(torch.zeros(1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64))
        return stablekl.kl_divergence(MVN(q.loc, c.reshape(1, 1)), q)

    c = torch.tensor(1e-20, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(f(c), c, create_graph=True)
    (second,) = torch.autograd.grad(first, c)
    assert first.item() == pytest.approx(-0.5e20, rel=1e-14)
    assert second.item() == pytest.approx(0.5e40, rel=1e-14)


# ---- the ends of the range ----------------------------------------------------------------------------------------


@by_dtype
@by_kind
def test_overflow_is_infinite_not_nan(kind, dtype):
    largest = torch.finfo(dtype).max
    identity, zero = torch.eye(3, dtype=dtype), torch.zeros(3, dtype=dtype)
    mean = torch.tensor([largest, -largest, 0], dtype=dtype) / 8
    tiny = 1e-40 if dtype == torch.float32 else 1e-310
    small, large = (1e3, 1e-3) if kind == "precision_matrix" else (1e-3, 1e3)
    rule = RULES[kind]
    assert rule(mean, identity, zero, small * identity) == math.inf
    assert rule(mean, identity, -mean, small * identity) == math.inf
    if kind == "scale_tril":
        assert rule(zero, identity, zero, tiny * identity) == math.inf
    assert rule(mean, large * identity, mean, large * identity) == 0
    assert rule(zero, tiny * identity, zero, tiny * identity) == 0
    assert rule(zero * math.nan, identity, zero, identity).isnan()
    assert rule(zero, identity * math.nan, zero, identity).isnan()


@by_kind
def test_rows_do_not_disturb_one_another(kind):
    rows = [[*far(kind, 3, 10.0, torch.float64, seed)] for seed in range(3)]
    rows[1][0] = torch.full((3,), 1e300, dtype=torch.float64)
    together = RULES[kind](*(torch.stack(x) for x in zip(*rows, strict=True)))
    assert together[1] == math.inf
    for i in (0, 2):
        torch.testing.assert_close(together[i], RULES[kind](*rows[i]), rtol=1e-14, atol=0)


# ---- the class ----------------------------------------------------------------------------------------------------


LOC = torch.tensor([0.5, -1.0, 2.0])
TRIL = torch.tensor([[1.0, 0, 0], [0.5, 0.7, 0], [-0.3, 0.2, 2.0]])
GIVEN = {
    "covariance_matrix": TRIL @ TRIL.mT,
    "precision_matrix": TRIL @ TRIL.mT,
    "scale_tril": TRIL,
    "scale_diag": torch.tensor([1.0, 0.5, 2.0]),
}


def host(name):
    """torch's distribution for the same parameters."""
    value = GIVEN[name]
    return TorchMVN(LOC, scale_tril=torch.diag(value)) if name == "scale_diag" else TorchMVN(LOC, **{name: value})


@pytest.mark.parametrize("name", GIVEN)
def test_it_is_torchs_multivariate_normal(name):
    p, h = MVN(LOC, **{name: GIVEN[name]}), host(name)
    assert isinstance(p, TorchMVN)
    assert p.has_rsample
    assert repr(p) == f"MultivariateNormal(loc: torch.Size([3]), {name}: {GIVEN[name].shape})"
    for attribute in ("mean", "mode", "variance", "stddev", "covariance_matrix", "precision_matrix", "scale_tril"):
        torch.testing.assert_close(getattr(p, attribute), getattr(h, attribute), rtol=1e-5, atol=1e-6)
    assert (p.batch_shape, p.event_shape, p.support) == (h.batch_shape, h.event_shape, h.support)
    x = torch.randn(4, 5, 3)
    torch.testing.assert_close(p.log_prob(x), h.log_prob(x))
    torch.testing.assert_close(p.entropy(), h.entropy())
    torch.testing.assert_close(p.perplexity(), h.perplexity())
    with pytest.raises(ValueError, match="Expected value argument"):
        p.log_prob(x * math.nan)
    assert p.sample().shape == (3,)
    assert p.rsample((4, 5)).shape == (4, 5, 3)
    assert p.expand((2,)).sample((4,)).shape == (4, 2, 3)
    torch.manual_seed(0)
    sample = p.sample((20_000,))
    torch.testing.assert_close(sample.mean(0), h.mean, rtol=0, atol=0.1)
    torch.testing.assert_close(sample.T.cov(), h.covariance_matrix, rtol=0.1, atol=0.15)
    assert type(pickle.loads(pickle.dumps(p))) is MVN
    for wide in (p.to(torch.float64), p.to(dtype=torch.float64)):
        assert wide.sample().dtype == wide.covariance_matrix.dtype == torch.float64
    loc = LOC.clone().requires_grad_()
    MVN(loc, **{name: GIVEN[name]}).rsample().sum().backward()
    assert torch.equal(loc.grad, torch.ones(3))


def test_positional_arguments_are_in_torchs_order():
    assert torch.equal(MVN(LOC, GIVEN["covariance_matrix"]).covariance_matrix, GIVEN["covariance_matrix"])
    assert torch.equal(MVN(LOC, None, GIVEN["precision_matrix"]).precision_matrix, GIVEN["precision_matrix"])
    assert torch.equal(MVN(LOC, None, None, TRIL).scale_tril, TRIL)
    assert MVN(LOC, None, None, TRIL, False)._validate_args is False
    assert MVN(LOC, None, None, TRIL)._validate_args is True


@pytest.mark.parametrize("name", GIVEN)
def test_what_was_given_is_remembered(name):
    p = MVN(LOC, **{name: GIVEN[name]})
    assert p.covariance_matrix.shape == p.precision_matrix.shape == p.scale_tril.shape == (3, 3)
    for q in (p, p.expand((2,)), p.to(torch.float64), pickle.loads(pickle.dumps(p))):
        assert stablekl.distributions.multivariate_normal.given_parameter(q) == name
        assert q.is_diagonal == (name == "scale_diag")
    if name != "scale_diag":
        assert not hasattr(p, "scale_diag")


def test_a_diagonal_builds_no_matrix():
    d = 300_000  # a matrix of d x d floats would take 360 GB
    p = MVN(torch.zeros(d), scale_diag=torch.ones(d))
    q = MVN(torch.ones(d), scale_diag=torch.full((d,), 2.0))
    x = p.rsample()
    assert p.log_prob(x).isfinite()
    assert p.entropy().isfinite()
    assert stablekl.kl_divergence(p, q).item() == pytest.approx(d * (math.log(2.0) - 0.25), rel=1e-6)
    assert p.expand((2,)).log_prob(x).shape == (2,)
    assert torch.equal(q.stddev, q.scale_diag)
    assert q.variance[0] == 4
    assert not {"_unbroadcasted_scale_tril", "covariance_matrix"} & set(p.__dict__)


def test_small_standard_deviations_do_not_underflow():
    assert (MVN(torch.zeros(2), scale_diag=torch.full((2,), 1e-30)).stddev == 1e-30).all()


def test_shapes_broadcast_at_construction():
    p = MVN(torch.zeros(3), scale_tril=torch.eye(3).repeat(4, 1, 1))
    assert p.batch_shape == p.loc.shape[:-1] == (4,)
    assert MVN(torch.zeros(4, 3), torch.eye(3)).covariance_matrix.shape == (4, 3, 3)
    assert MVN(torch.zeros(2, 1, 3), scale_diag=torch.ones(5, 3)).batch_shape == (2, 5)


def test_half_precision_covariances_are_factorised():
    for dtype in (torch.float16, torch.bfloat16):
        a = (TRIL @ TRIL.mT).to(dtype)
        p, q = MVN(LOC.to(dtype), a), MVN(LOC.to(dtype), 2 * a)
        assert stablekl.kl_divergence(p, q).item() == pytest.approx(1.5 * (math.log(2) - 0.5), rel=5e-3)
        asymmetric = a.clone()
        asymmetric[0, 1] *= 1 + torch.finfo(dtype).eps
        MVN(LOC.to(dtype), asymmetric)


WRONG = {
    "nothing given": ({}, "exactly one.*got none"),
    "two given": (
        {"covariance_matrix": torch.eye(3), "scale_tril": torch.eye(3)},
        "got covariance_matrix and scale_tril",
    ),
    "matrix of another size": ({"covariance_matrix": torch.eye(2)}, r"shape batch_shape \+ \(3, 3\).*got \(2, 2\)"),
    "a vector for a matrix": ({"scale_tril": torch.ones(3)}, r"shape batch_shape \+ \(3, 3\)"),
    "diagonal of another size": ({"scale_diag": torch.ones(2)}, r"shape batch_shape \+ \(3,\)"),
    "one deviation for all": ({"scale_diag": torch.tensor(1.0)}, r"shape batch_shape \+ \(3,\)"),
    "zero deviation": (
        {"scale_diag": torch.tensor([1.0, 0, 0])},
        r"scale_diag\[1\] is 0.0 .*stablekl.softplus_scale",
    ),
    "negative deviation": (
        {"scale_diag": torch.tensor([1.0, 2, -3])},
        r"scale_diag\[2\] is -3.0.*stablekl.softplus_scale",
    ),
    "nan deviation": (
        {"scale_diag": torch.tensor([math.nan, 2, 3])},
        r"scale_diag\[0\] is nan.*stablekl.softplus_scale",
    ),
    "infinite deviation": ({"scale_diag": torch.tensor([1, math.inf, 3])}, r"scale_diag has the value inf at \[1\]"),
    "zero on the diagonal": ({"scale_tril": torch.diag(torch.tensor([1.0, 1, 0]))}, r"\[2\] is 0.0.*softplus_scale"),
    "nan below the diagonal": (
        {"scale_tril": torch.eye(3).index_put((torch.tensor(1), torch.tensor(0)), torch.tensor(math.nan))},
        r"scale_tril has the value nan at \[1, 0\]",
    ),
    "upper triangular": (
        {"scale_tril": TRIL.mT.contiguous()},
        r"not lower triangular: entry \[0, 1\].*covariance_matrix=",
    ),
    "not symmetric": ({"covariance_matrix": TRIL @ TRIL.mT + 0.1 * TRIL}, r"not symmetric: entry \[0, 1\]"),
    "not symmetric precision": ({"precision_matrix": torch.ones(3, 3).triu()}, r"not symmetric: entry \[0, 1\]"),
    "not positive definite": (
        {"covariance_matrix": torch.ones(3, 3) + torch.eye(3) * torch.tensor([0.1, 0.1, -2])},
        "smallest eig",
    ),
    "nan covariance": ({"covariance_matrix": torch.eye(3) * math.nan}, r"entry nan at \[0, 0\].*not finite"),
    "one of a batch": (
        {"precision_matrix": torch.stack([torch.eye(3), -torch.eye(3)])},
        r"matrix \[1\].*smallest eigenvalue -1",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_error_says_what_is_wrong_and_where(name):
    arguments, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        MVN(LOC, **arguments)


def test_errors_about_loc():
    with pytest.raises(ValueError, match=r"loc has the value inf at \[0, 2\]"):
        MVN(torch.tensor([[1.0, 2, math.inf]]), torch.eye(3))
    with pytest.raises(ValueError, match="use Normal"):
        MVN(torch.tensor(0.0), torch.eye(1))
    with pytest.raises(ValueError, match=r"scale_diag \(4, 2\) and loc \(3, 2\) do not broadcast"):
        MVN(torch.zeros(3, 2), scale_diag=torch.ones(4, 2))


def test_a_factor_is_no_covariance():
    with pytest.raises(stablekl.NotPositiveDefiniteError):
        MVN(LOC, torch.ones(3, 3))
    with pytest.raises(stablekl.NotPositiveDefiniteError, match="matrix \\[0, 1\\]"):
        MVN(LOC, torch.stack([torch.eye(3), torch.ones(3, 3)])[None])


def test_validation_can_be_switched_off():
    for arguments in ({"scale_diag": torch.zeros(3)}, {"scale_tril": torch.zeros(3, 3)}, {"covariance_matrix": TRIL}):
        assert MVN(LOC, **arguments, validate_args=False).batch_shape == ()
    with pytest.raises(RuntimeError, match="positive-definite"):  # torch's own factorisation, as in torch
        MVN(LOC, -torch.eye(3), validate_args=False)


def test_scaled_variables_and_ill_conditioned_covariances_are_fine():
    MVN(torch.zeros(2), torch.diag(torch.tensor([1.0, 1e-20])))
    MVN(torch.zeros(2), torch.tensor([[1.0, 1 - 1e-6], [1 - 1e-6, 1.0]]))
    MVN(torch.zeros(2), 1e-12 * torch.tensor([[1.0, 0.5], [0.5 + 1e-6, 1.0]]))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo does it itself
def test_compile():
    def f(loc_p, tril_p, loc_q, cov_q):
        p = MVN(loc_p, scale_tril=tril_p)
        return stablekl.kl_divergence(p, MVN(loc_q, scale_tril=cov_q)) + stablekl.kl_divergence(
            MVN(loc_p, cov_q @ cov_q.mT), MVN(loc_q, tril_p @ tril_p.mT)
        )

    row = [
        torch.stack([a, b])
        for a, b in zip(*(far("scale_tril", 3, 10.0, torch.float32, s) for s in (0, 1)), strict=True)
    ]
    expected = f(*row)
    leaves = [x.clone().requires_grad_() for x in row]
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*row), expected)
    compiled(*leaves).sum().backward()
    eager = [x.clone().requires_grad_() for x in row]
    f(*eager).sum().backward()
    for a, b in zip(leaves, eager, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("distance", [1e-3, 3.0])
def test_one_covariance_that_many_share(distance):
    """The matrices of a shared q are factorised once: as if each pair had its own."""
    g = torch.Generator().manual_seed(5)
    a = torch.randn(4, 6, 12, generator=g, dtype=torch.float64)
    cov = a @ a.mT / 12
    cov_p, cov_q = cov[:1] + distance * cov[1:], cov[:1]
    mu_p, mu_q = torch.randn(3, 6, generator=g, dtype=torch.float64), torch.zeros(1, 6, dtype=torch.float64)
    for shared in (cov_q, cov_q.expand(3, 6, 6)):
        together = covariance_kl(mu_p, cov_p, mu_q, shared)
        apart = torch.stack([covariance_kl(mu_p[i], cov_p[i], mu_q[0], cov_q[0]) for i in range(3)])
        torch.testing.assert_close(together, apart, rtol=1e-14, atol=0)
        inside_out = covariance_kl(mu_q, shared, mu_p, cov_p)
        apart = torch.stack([covariance_kl(mu_q[0], cov_q[0], mu_p[i], cov_p[i]) for i in range(3)])
        torch.testing.assert_close(inside_out, apart, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    "shapes", [[(2,), (1,)], [(), (3, 2)], [(3, 1), (1, 2)], [(0, 2), (1, 1)], [(4, 1, 2), (3, 1), ()], [(2,), (2,)]]
)
def test_broadcast_shape(shapes):
    sizes = [torch.Size(s) for s in shapes]
    assert broadcast_shape(*sizes) == torch.broadcast_shapes(*sizes)


def test_shapes_that_do_not_broadcast():
    with pytest.raises(RuntimeError, match="shape"):
        broadcast_shape(torch.Size([2]), torch.Size([3]))
