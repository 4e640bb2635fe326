"""The references of vectors and matrices by a second route: integrals of the definition, other algebra, torch.

Every check is a function of the value, so that a wrong formula can be shown to fail it.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor
from torch import distributions as td

from stablekl.precision.references import categorical, dirichlet, multivariate_normal, wishart
from stablekl.precision.references.context import exact, gradient, mp
from stablekl.precision.references.multivariate_normal import Gaussian
from stablekl.precision.references.wishart import Wishart

F64 = torch.float64
KINDS = ("scale_tril", "covariance_matrix", "precision_matrix", "scale_diag", "low_rank")


def close(value, truth, bar) -> bool:
    """To ``bar``, relative to 1 + the truth."""
    with mp.workprec(1000):
        return bool(abs(mp.mpf(value) - mp.mpf(truth)) <= bar * (1 + abs(mp.mpf(truth))))


# --- Gaussians ------------------------------------------------------------------------------------------------


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def parameters(seed: int, d: int, kind: str) -> tuple[Tensor, ...]:
    """Tensors: a mean and the parameter of an ordinary covariance (two of them for low_rank)."""
    a = numbers(seed, d, d)
    s = a @ a.mT / d + 0.5 * torch.eye(d, dtype=F64)
    s = (s + s.mT) / 2
    value = {
        "scale_tril": lambda: (torch.linalg.cholesky(s),),
        "covariance_matrix": lambda: (s,),
        "precision_matrix": lambda: (s,),
        "scale_diag": lambda: (s.diagonal().clone(),),
        "low_rank": lambda: (a[:, :2].clone(), s.diagonal().clone()),
    }[kind]()
    return numbers(seed + 100, d), *value


def gaussian(tensors: tuple[Tensor, ...], kind: str) -> Gaussian:
    value = tuple(exact(x) for x in tensors[1:])
    return Gaussian(exact(tensors[0]), kind, value if kind == "low_rank" else value[0])


def in_torch(tensors: tuple[Tensor, ...], kind: str) -> td.Distribution:
    loc, *value = tensors
    if kind == "low_rank":
        return td.LowRankMultivariateNormal(loc, *value)
    if kind == "scale_diag":
        return td.Independent(td.Normal(loc, value[0]), 1)
    return td.MultivariateNormal(loc, **{kind: value[0]})


def covariance(tensors: tuple[Tensor, ...], kind: str) -> np.ndarray:
    """In float64, by numpy."""
    a = [x.numpy() for x in tensors[1:]]
    return {
        "scale_tril": lambda: a[0] @ a[0].T,
        "covariance_matrix": lambda: a[0],
        "precision_matrix": lambda: np.linalg.inv(a[0]),
        "scale_diag": lambda: np.diag(a[0] ** 2),
        "low_rank": lambda: a[0] @ a[0].T + np.diag(a[-1]),
    }[kind]()


def by_integral(p: tuple[Tensor, ...], kind_p: str, q: tuple[Tensor, ...], kind_q: str) -> float:
    """E_p[log p - log q] in the plane by the trapezoid rule in extended precision, 12 standard deviations of p wide."""
    cov = covariance(p, kind_p).astype(np.longdouble)
    lower = np.linalg.cholesky(cov.astype(float)).astype(np.longdouble)  # any affine map will do
    t = np.arange(-13, 13, 0.2, dtype=np.longdouble)
    z = np.stack([x.ravel() for x in np.meshgrid(t, t, indexing="ij")])
    x = p[0].numpy()[:, None] + lower @ z

    def log_density(tensors, kind):
        (a, b), (_, d) = covariance(tensors, kind).astype(np.longdouble)
        u, v = x - tensors[0].numpy()[:, None]
        det = a * d - b * b
        return -(d * u * u - 2 * b * u * v + a * v * v) / (2 * det) - np.log(det) / 2 - np.log(2 * np.longdouble(np.pi))

    log_p = log_density(p, kind_p)
    weight = np.longdouble(0.2) ** 2 * lower[0, 0] * lower[1, 1]
    return float((np.exp(log_p) * (log_p - log_density(q, kind_q))).sum() * weight)


@pytest.mark.parametrize("kind_q", KINDS)
@pytest.mark.parametrize("kind_p", KINDS)
def test_kl_is_the_integral_of_the_definition(kind_p, kind_q):
    p, q = parameters(1, 2, kind_p), parameters(2, 2, kind_q)
    value, truth = multivariate_normal.kl(gaussian(p, kind_p), gaussian(q, kind_q)), by_integral(p, kind_p, q, kind_q)
    assert close(value, truth, 1e-14)
    reverse = multivariate_normal.kl(gaussian(q, kind_q), gaussian(p, kind_p))
    assert not close(reverse, truth, 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_kl_log_density_and_gradients_against_torch(kind):
    p, q = (tuple(x.requires_grad_() for x in parameters(seed, 5, kind)) for seed in (3, 4))
    mine = gaussian(p, kind), gaussian(q, kind)
    value = td.kl_divergence(in_torch(p, kind), in_torch(q, kind))
    assert close(multivariate_normal.kl(*mine), value.item(), 1e-13)
    point = numbers(7, 5)
    log_density = in_torch(p, kind).log_prob(point).item()
    assert close(multivariate_normal.log_density(exact(point), mine[0]), log_density, 1e-13)
    assert not close(multivariate_normal.log_density(exact(point), mine[1]), log_density, 1e-3)

    loc_p, value_p, loc_q, value_q = multivariate_normal.gradients(*mine)
    both = kind == "low_rank"
    truth = [loc_p, *(value_p if both else [value_p]), loc_q, *(value_q if both else [value_q])]
    for ours, its in zip(truth, torch.autograd.grad(value, (*p, *q)), strict=True):
        if its.ndim == 2 and kind in ("covariance_matrix", "precision_matrix"):
            its = (its + its.mT) / 2
        if kind == "scale_tril":  # torch also derives by what is above the diagonal
            its = its if its.ndim == 1 else its.tril()
        mine_g = torch.tensor(np.array(ours, dtype=float))
        torch.testing.assert_close(mine_g, its, rtol=1e-11, atol=1e-12)
        assert not torch.allclose(mine_g, 1.001 * its, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_differences_of_the_kl(kind):
    p, q = gaussian(parameters(5, 2, kind), kind), gaussian(parameters(6, 2, kind), kind)

    def f(loc_p, value_p, loc_q, value_q):
        return multivariate_normal.kl_at(Gaussian(loc_p, kind, value_p), Gaussian(loc_q, kind, value_q))

    def flat(item):
        return [x for i in item for x in flat(i)] if isinstance(item, (list, tuple)) else [item]

    by_formula, by_difference = multivariate_normal.gradients(p, q), gradient(f, *p[::2], *q[::2])
    for a, b in zip(by_formula, by_difference, strict=True):
        for x, y in zip(flat(a), b, strict=True):
            assert close(x, y, 1e-24)
    assert not close(flat(by_formula)[-1], -by_difference[-1][-1], 1e-3)


def rational(rows: list[list[int]], by: int = 1) -> list:
    return [[mp.mpf(x) / by for x in row] for row in rows]


def test_kinds_of_one_gaussian():
    """Five dimensions with exact inverses: a unit triangle L has integers in L^-1, and so S and P are integers."""
    n = 5
    lower = [[1 if i == j else (i * 7 + j * 3) % 5 - 2 if j < i else 0 for j in range(n)] for i in range(n)]
    inverse = np.rint(np.linalg.inv(np.array(lower, dtype=float))).astype(int)
    a = np.array(lower)
    assert (a @ inverse == np.eye(n, dtype=int)).all()
    loc = [mp.mpf(i) for i in range(n)]
    values = {"scale_tril": a, "covariance_matrix": a @ a.T, "precision_matrix": inverse.T @ inverse}
    same = [Gaussian(loc, kind, rational(value.tolist())) for kind, value in values.items()]
    same.append(Gaussian(loc, "low_rank", (rational(a.tolist()), [mp.mpf(0)] * n)))
    other = gaussian(parameters(8, n, "covariance_matrix"), "covariance_matrix")
    for direction in (lambda g: (g, other), lambda g: (other, g)):
        first, *rest = [multivariate_normal.kl(*direction(g)) for g in same]
        for value in rest:
            assert close(value, first, 1e-28)
    wrong = Gaussian(loc, "covariance_matrix", same[2].value)
    assert not close(multivariate_normal.kl(wrong, other), multivariate_normal.kl(same[0], other), 1e-3)


def test_kl_by_eigenvalues():
    p, q = (gaussian(parameters(seed, 5, "covariance_matrix"), "covariance_matrix") for seed in (9, 10))
    with mp.workprec(400):
        sp, sq = mp.matrix(p.value), mp.matrix(q.value)
        delta = mp.matrix([a - b for a, b in zip(p.loc, q.loc, strict=True)])
        values = mp.eig(sq**-1 * sp, left=False, right=False)
        truth = (mp.fsum(e.real - 1 - mp.log(e.real) for e in values) + (delta.T * sq**-1 * delta)[0]) / 2
        without_the_mean = truth - (delta.T * sq**-1 * delta)[0] / 2
    value = multivariate_normal.kl(p, q)
    assert close(value, truth, 1e-24)
    assert not close(value, without_the_mean, 1e-3)


@pytest.mark.parametrize("scale", [2.0**-540, 1.0, 2.0**500])
def test_low_rank_is_the_dense_one(scale):
    """With a diagonal 2^-540 of the factor, a Cholesky decomposition has no last pivot at the first precisions."""
    w = [[mp.mpf(v) for v in row] for row in numbers(11, 4, 2).tolist()]
    d = [mp.mpf(v) * scale for v in (1, 2, 3, 4)]
    with mp.workprec(4000):
        dense = [[mp.fdot(zip(w[i], w[j], strict=True)) + (d[i] if i == j else 0) for j in range(4)] for i in range(4)]
    loc = [mp.mpf(0)] * 4
    other = gaussian(parameters(12, 4, "scale_tril"), "scale_tril")
    pair = [Gaussian(loc, "low_rank", (w, d)), Gaussian(loc, "covariance_matrix", dense)]
    for direction in (lambda g: (g, other), lambda g: (other, g)):
        low, full = (multivariate_normal.kl(*direction(g)) for g in pair)
        assert close(low, full, 1e-28)
    truth = max(mp.mpf(1), 1 / mp.mpf(scale)) if scale <= 1 else mp.mpf(4)
    kappa = multivariate_normal.condition("low_rank", (w, d))
    assert kappa >= 1
    assert kappa < 100 * truth
    if scale == 1:
        ratio = np.linalg.cond(np.array(dense, dtype=float))
        assert kappa == pytest.approx(ratio, rel=1e-12)


def test_condition():
    value = {"scale_diag": [mp.mpf(x) for x in (1, 1e-9, 4)], "scale_tril": rational([[4, 9], [0, 1]])}
    assert multivariate_normal.condition("scale_diag", value["scale_diag"]) == pytest.approx(4e9)
    assert multivariate_normal.condition("scale_tril", value["scale_tril"]) == pytest.approx(4)
    with mp.workprec(400):
        near_one = [[mp.mpf(1), 1 - mp.mpf(2) ** -50], [1 - mp.mpf(2) ** -50, mp.mpf(1)]]
    for kind in ("covariance_matrix", "precision_matrix"):
        assert multivariate_normal.condition(kind, near_one) == pytest.approx(2.0**51, rel=1e-3)
    for indefinite in ([[1, 2], [2, 1]], [[0, 0], [0, 1]]):
        assert multivariate_normal.condition("covariance_matrix", rational(indefinite)) == math.inf
        with pytest.raises(multivariate_normal.NotPositiveDefiniteError):
            multivariate_normal.kl(
                Gaussian([mp.mpf(0)] * 2, "covariance_matrix", rational(indefinite)),
                Gaussian([mp.mpf(0)] * 2, "scale_diag", [mp.mpf(1)] * 2),
            )
    with pytest.raises(ValueError, match="no parameter"):
        multivariate_normal.factor("scale", near_one)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_gaussians(kind):
    p = gaussian(parameters(13, 3, kind), kind)
    assert multivariate_normal.kl(p, p) == 0
    q = p._replace(loc=[x + 1 for x in p.loc])
    shapes = multivariate_normal.gradients(p, q)
    for a, b in zip(multivariate_normal.gradients(p, p), shapes, strict=True):
        zeros, other = (np.array(x[0] if kind == "low_rank" and len(x) == 2 else x, dtype=float) for x in (a, b))
        assert zeros.shape == other.shape
        assert not zeros.any()


# --- categorical ----------------------------------------------------------------------------------------------

WEIGHTS = {
    "ordinary": ([3, 1, 4, 1], [2, 7, 1, 8]),
    "near": ([2**60, 2**60, 1], [2**60 + 2**10, 2**60, 1]),
    "a zero in p": ([0, 1, 2], [5, 1, 1]),
    "a zero in both": ([0, 1, 2], [0, 3, 1]),
    "two": ([1, 10**15], [10**15, 1]),
}


def categorical_truth(p: list[int], q: list[int]) -> mp.mpf:
    """Exact fractions, of which only the logarithm is not."""
    rows = [(Fraction(a, sum(p)), Fraction(b, sum(q))) for a, b in zip(p, q, strict=True) if a]
    with mp.workprec(700):
        return mp.fsum(
            mp.mpf(a.numerator) / a.denominator * mp.log(mp.mpf((a / b).numerator) / (a / b).denominator)
            for a, b in rows
        )


@pytest.mark.parametrize("name", WEIGHTS)
def test_categorical(name):
    p, q = WEIGHTS[name]
    truth = categorical_truth(p, q)
    value = categorical.kl_from_probs([mp.mpf(x) for x in p], [mp.mpf(x) for x in q])
    with mp.workprec(2000):
        logits = [[mp.log(x) if x else -mp.inf for x in w] for w in (p, q)]
    by_logits = categorical.kl_from_logits(*logits)
    for v in (value, by_logits):
        assert abs(v - truth) <= truth * mp.mpf(10) ** -23
    with mp.workprec(100):
        unnormalised = categorical.kl_from_probs_at([mp.mpf(x) / 2 for x in p], [mp.mpf(x) for x in q])
        assert close(unnormalised, value, 1e-20)
    for i, x in enumerate(p):
        log = mp.log(mp.mpf(x) / sum(p)) if x else -mp.inf
        by_probs = categorical.log_prob_from_probs(i, [mp.mpf(w) for w in p])
        for v in (by_probs, categorical.log_prob_from_logits(i, logits[0])):
            assert v == log or close(v, log, 1e-14)


def test_categorical_limits_and_twin(monkeypatch):
    one, zero = mp.mpf(1), mp.mpf(0)
    assert categorical.kl_from_probs([one, one], [one, zero]) == mp.inf
    assert categorical.kl_from_logits([zero, zero], [zero, -mp.inf]) == mp.inf
    assert categorical.kl_from_probs([one, zero], [one, zero]) == 0
    assert categorical.kl_from_probs([one, one], [2 * one, 2 * one]) == 0
    huge = categorical.kl_from_logits([mp.mpf(1e300), zero], [zero, mp.mpf(1e300)])
    assert close(huge, 1e300, 1e-15)
    # a weight that is lost next to 1 at the usual precisions, where they agree on the wrong value
    tiny = [mp.mpf(1), mp.mpf(1e-300)], [mp.mpf(1), mp.mpf(2e-300)]
    assert close(categorical.kl_from_probs(*tiny) / tiny[0][1], 1 - mp.log(2), 1e-15)
    monkeypatch.setattr(categorical, "room", lambda *_: 0)
    assert categorical.kl_from_probs(*tiny) < 0
    p, q = WEIGHTS["near"]
    naive = sum(a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q, strict=True))
    assert abs(naive - categorical_truth(p, q)) > 1e-3 * categorical_truth(p, q)


# --- Dirichlet ------------------------------------------------------------------------------------------------

PAIRS = [((2.5, 4.0), (3.0, 2.25)), ((1.0, 3.0), (2.0, 1.0)), ((9.0, 12.5), (2.0, 30.0))]


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_dirichlet_of_two_is_an_integral(a, b):
    p, q = ([mp.mpf(x) for x in alpha] for alpha in (a, b))

    def density(x, alpha):
        return mp.beta(*alpha) ** -1 * x ** (alpha[0] - 1) * (1 - x) ** (alpha[1] - 1)

    def integrand(x, power=1):
        if x in (0, 1):
            return mp.mpf(0)
        return density(x, p) * mp.log(density(x, p) / density(x, q)) ** power

    with mp.workprec(100):
        truth = mp.quad(integrand, [0, mp.mpf(1) / 2, 1])
        assert close(dirichlet.kl(p, q), truth, 1e-17)
        assert not close(dirichlet.kl(q, p), truth, 1e-3)
        x = mp.mpf(1) / 4
        assert close(dirichlet.log_density([x, 1 - x], p), mp.log(density(x, p)), 1e-25)


def test_dirichlet_of_three_is_an_integral():
    p, q = [mp.mpf(x) for x in (3, 4, 5)], [mp.mpf(x) for x in (2, 6, 3)]
    u = 1 / (1 + np.exp(-np.arange(-25, 25, 0.2)))  # the trapezoid rule in the logit
    w = 0.2 * u * (1 - u)
    x, y = (g.ravel() for g in np.meshgrid(u, u, indexing="ij"))  # the simplex as x, (1 - x) y
    area = (np.outer(w, w).ravel()) * (1 - x)
    points = np.stack([x, (1 - x) * y, (1 - x) * (1 - y)])

    def log_density(alpha):
        a = [float(v) for v in alpha]
        norm = math.lgamma(sum(a)) - sum(math.lgamma(v) for v in a)
        return norm + sum((v - 1) * np.log(c) for v, c in zip(a, points, strict=True))

    log_p = log_density(p)
    truth = float((area * np.exp(log_p) * (log_p - log_density(q))).sum())
    assert close(dirichlet.kl(p, q), truth, 1e-10)
    assert not close(dirichlet.kl(p, q), truth * 1.001, 1e-10)
    assert dirichlet.kl(p, p) == 0


def test_dirichlet_of_a_large_concentration(monkeypatch):
    """The first coordinate is a gamma variable then, of shapes 1 and 2: E[log x] = -euler, of which log Gamma is 0."""
    p, q = [mp.mpf(1), mp.mpf(1e300)], [mp.mpf(2), mp.mpf(1e300)]
    assert close(dirichlet.kl(p, q), mp.euler, 1e-15)
    monkeypatch.setattr(dirichlet, "room", lambda *_, power: 0)
    assert not close(dirichlet.kl(p, q), mp.euler, 1e-3)


# --- Wishart --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [(3.0, 2.0, 4.5, 1.25), (6.0, 0.5, 2.5, 3.0)])
def test_wishart_of_one_is_a_gamma(rows):
    df_p, v_p, df_q, v_q = (mp.mpf(x) for x in rows)

    def log_density(x, df, v):
        a, rate = df / 2, 1 / (2 * v)
        return a * mp.log(rate) - mp.loggamma(a) + (a - 1) * mp.log(x) - rate * x

    def integrand(t):  # x = exp(t)
        log_p = log_density(mp.exp(t), df_p, v_p)
        return mp.exp(log_p + t) * (log_p - log_density(mp.exp(t), df_q, v_q))

    p, q = Wishart(df_p, "covariance_matrix", [[v_p]]), Wishart(df_q, "precision_matrix", [[1 / v_q]])
    with mp.workprec(110):
        steps = 32
        truth = mp.fsum(integrand(mp.mpf(i) / steps) for i in range(-50 * steps, 8 * steps)) / steps
        x = mp.mpf(3) / 2
        at_x = log_density(x, df_p, v_p)
    assert close(wishart.kl(p, q), truth, 1e-15)
    assert not close(wishart.kl(q, p), truth, 1e-3)
    assert close(wishart.log_density([[x]], p), at_x, 1e-20)


@pytest.mark.parametrize("kind", ["scale_tril", "covariance_matrix", "precision_matrix"])
def test_wishart_against_torch(kind):
    (_, v_p), (_, v_q) = (parameters(seed, 3, kind) for seed in (14, 15))
    p, q = (td.Wishart(torch.tensor(df, dtype=F64), **{kind: v}) for df, v in ((4.5, v_p), (7.0, v_q)))
    mine = [Wishart(mp.mpf(df), kind, exact(v)) for df, v in ((4.5, v_p), (7.0, v_q))]
    value = td.kl_divergence(p, q).item()
    assert close(wishart.kl(*mine), value, 1e-12)
    assert not close(wishart.kl(mine[0]._replace(df=mp.mpf(5)), mine[1]), value, 1e-3)
    x = covariance(parameters(16, 3, "covariance_matrix"), "covariance_matrix")
    log_density = p.log_prob(torch.tensor(x)).item()
    assert close(wishart.log_density(exact(torch.tensor(x)), mine[0]), log_density, 1e-12)
    assert wishart.kl(mine[0], mine[0]) == 0
