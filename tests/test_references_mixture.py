"""The references of mixtures and of the primitives by a second route: grids, other integrals, reductions, series."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from stablekl.precision.references import mixture, special
from stablekl.precision.references.context import PrecisionError, exact, mp
from stablekl.precision.references.multivariate_normal import Gaussian, kl
from tests.mixture_references import embedded

F64 = torch.float64


def numbers(item):
    return [numbers(x) for x in item] if isinstance(item, (list, tuple)) else mp.mpf(item)


def on_line(m, s) -> Gaussian:
    return Gaussian([mp.mpf(m)], "scale_diag", [mp.mpf(s)])


def close(value, truth, bar) -> bool:
    """To ``bar``, relative to 1 + the truth."""
    with mp.workprec(1000):
        return bool(abs(mp.mpf(value) - mp.mpf(truth)) <= bar * (1 + abs(mp.mpf(truth))))


# --- the line -------------------------------------------------------------------------------------------------

N01 = ((1, 0, 1),)
PAIRS = {
    "ordinary": (((0.3, -1, 1), (0.7, 2, 0.5)), ((0.5, 0, 1), (0.5, 1, 2))),
    "near": (((0.5, 0, 1), (0.5, 1, 1)), ((0.5, 1e-7, 1), (0.5, 1, 1))),
    "tiny weight far out in q": (((1, 0, 1e3),), ((1, 0, 1), (1e-300, 0, 1e3))),
    "crossing in the tail": (N01, ((1, 0, 0.1), (1e-20, 3, 1))),
    "modes apart": (((0.5, 0, 1), (0.5, 500, 1)), ((0.5, 0, 1), (0.5, 500, 2))),
    "three": (((1, 0, 1), (1, 3, 0.2), (2, 9, 3)), ((1, 1, 1), (2, 4, 0.3), (1, 9, 4))),
}


def by_trapezoid(p, q) -> float:
    """The definition on one uniform grid in extended precision; for smooth integrands more than exponentially good."""
    p, q = (np.array(x, dtype=np.longdouble) for x in (p, q))
    low, high = (p[:, 1] - 13 * p[:, 2]).min(), (p[:, 1] + 13 * p[:, 2]).max()
    finest = min(p[:, 2].min(), q[:, 2].min())
    step = np.longdouble(finest / 60)
    x = np.arange(low, high, step, dtype=np.longdouble)

    def log_density(rows):
        terms = np.log(rows[:, 0] / rows[:, 0].sum()) - np.log(rows[:, 2])
        z = (x - rows[:, 1:2]) / rows[:, 2:]
        return np.logaddexp.reduce(terms[:, None] - z * z / 2) - np.log(2 * np.longdouble(np.pi)) / 2

    log_p = log_density(p)
    return float((np.exp(log_p) * (log_p - log_density(q))).sum() * step)


@pytest.mark.parametrize("name", PAIRS)
def test_line_is_a_sum_on_a_grid(name):
    p, q = PAIRS[name]
    truth = by_trapezoid(p, q)
    assert close(mixture.line(numbers(p), numbers(q)), truth, 1e-14 if "crossing" not in name else 1e-10)
    if name != "near":
        assert not close(mixture.line(numbers(q), numbers(p)), truth, 1e-3)


GAUSSIANS = [
    (0, 1, 0.5, 2), (0, 1, 1e-12, 1), (3, 1e-8, 3, 1e8), (3, 1e8, 3, 1e-8), (1e8, 1e-8, 1e8 + 1e-6, 2e-8),
    (0, 1, 700, 1), (0, 1e-300, 0, 2e-300), (1e300, 1e299, -1e300, 1e300),
]  # fmt: skip


@pytest.mark.parametrize("row", GAUSSIANS)
def test_line_of_gaussians(row):
    """One component, and the same one in two halves; the closed form is `multivariate_normal`'s."""
    (m, s, n, r), half = numbers(row), mp.mpf(1) / 2
    truth = kl(on_line(m, s), on_line(n, r))
    assert close(mixture.line([(1, m, s)], [(1, n, r)]), truth, 1e-23)
    assert close(mixture.line([(half, m, s), (half, m, s)], [(7, n, r)]), truth, 1e-23)
    assert close(mixture.line([(1, m, s), (0, n, r)], [(half, n, r), (half, n, r)]), truth, 1e-23)


# Weights and scales from one end to the other: (weight, mean, scale) twice, and a Gaussian.
TWO = {
    "ordinary": ((0.3, 0, 1), (0.7, 2, 0.5), (0, 1)),
    "nearly one": ((0.3, 0, 1), (0.7, 1e-9, 1 + 1e-10), (0, 1)),
    "one variance": ((0.5, 0, 1), (0.5, 0.1, 1), (0, 1)),
    "tiny weight": ((1e-300, 0, 1), (1, 300, 1e-8), (1, 3)),
    "small weight, far": ((1e-20, 300, 2), (1, 0, 1), (0, 1)),
    "scales apart": ((0.3, 0, 1e8), (0.7, 1, 1e-8), (0, 1)),
    "scales apart, light": ((1e-12, 0, 1e8), (1, 1, 1), (0, 1)),
    "modes apart": ((0.3, 0, 1), (0.7, 400, 1), (0, 1)),
    "some way apart": ((0.3, 0, 1), (0.7, 9, 1), (0, 1)),
    "inside": ((0.999, 0, 1), (0.001, 2, 0.01), (0, 1)),
    "an alias": ((math.exp(-100.53), 0, 1), (1, 2, 3), (0, 1)),
}


@pytest.mark.parametrize("name", TWO)
def test_two_components_on_the_line(name):
    *rows, q = TWO[name]
    rows, q = numbers(rows), numbers(q)
    weights, components, gaussian = [r[0] for r in rows], [on_line(*r[1:]) for r in rows], on_line(*q)
    truth = mixture.line(rows, [(1, *q)])
    assert close(mixture.kl_to_gaussian(weights, components, gaussian), truth, 1e-23)
    # the information is a sum of divergences of the components from the mixture
    with mp.workprec(200):
        split = mp.fsum(r[0] * mixture.line([r], rows) for r in rows) / mp.fsum(weights)
    value = mixture.information(weights, components)
    assert abs(value - split) <= mp.mpf(10) ** -22
    assert abs(mixture.information(weights[::-1], components[::-1]) - value) <= mp.mpf(10) ** -23
    if name in ("ordinary", "one variance", "modes apart", "some way apart", "inside"):
        assert not close(mixture.information(weights, [components[0], on_line(0.5, 0.25)]), split, 1e-6)


def test_information_limits():
    half = mp.mpf(1) / 2
    a, b, far = on_line(0, 1), on_line(1, 2), on_line(1e6, 1)
    assert mixture.information([half, half], [a, a]) == 0
    assert mixture.information([half, mp.mpf(0)], [a, b]) == 0
    assert close(mixture.information([half, half], [a, far]), mp.log(2), 1e-15)
    assert mixture.line(numbers([(1, 0, 1)]), numbers([(1, 0, 1)])) == 0
    assert close(mixture.kl_to_gaussian([half, mp.mpf(0)], [a, b], b), kl(a, b), 1e-24)


def test_an_integral_that_does_not_settle_is_an_error(monkeypatch):
    monkeypatch.setattr(mixture, "_MOST_PANELS", 10)
    monkeypatch.setattr(mixture, "_TOLERANCE", mp.mpf(10) ** -60)
    with pytest.raises(PrecisionError, match="not known"):
        mixture.line(numbers([(1, 0, 1)]), numbers([(1, 0, 1e-3), (1e-30, 0, 1)]))


@pytest.mark.parametrize("name", ["ordinary", "near"])
def test_gradients_on_the_line_are_the_values_difference_quotients(name):
    p, q = ([list(map(mp.mpf, row)) for row in rows] for rows in PAIRS[name])
    found = mixture.line_gradients(p, q)
    h = mp.mpf(2) ** -20  # the values are good to 1e-24, and a fourth-order quotient with this step to 1e-17
    direction = [
        [[mp.mpf((5 * k + 3 * kind + side) % 7 - 3) for kind in range(3)] for k in range(2)] for side in (0, 1)
    ]

    def value(steps):
        rows = (
            [[x + steps * h * d for x, d in zip(*pair, strict=True)] for pair in zip(*sides, strict=True)]
            for sides in zip((p, q), direction, strict=True)
        )
        return mixture.line(*rows)

    with mp.workprec(200):
        quotient = (8 * (value(1) - value(-1)) - (value(2) - value(-2))) / (12 * h)
        along = [direction[i // 3][k][i % 3] * g for i, group in enumerate(found) for k, g in enumerate(group)]
        assert abs(mp.fsum(along) - quotient) < mp.mpf(10) ** -14
        without = [a for i, a in enumerate(along) if i != 5]
        assert abs(mp.fsum(without) - quotient) > mp.mpf(10) ** -12, "must fail: a component left out"
        # the divergence does not depend on the sum of the weights
        assert abs(mp.fsum(w * g for (w, _, _), g in zip(p, found[0], strict=True))) < mp.mpf(10) ** -20


# --- many dimensions ------------------------------------------------------------------------------------------


def by_plane(weights, locs, covs, q_loc, q_cov) -> float:
    """The definition in the plane, by the trapezoid rule in extended precision."""
    t = np.arange(-18, 18, 0.15, dtype=np.longdouble)
    x, y = np.meshgrid(t, t, indexing="ij")

    def log_gaussian(loc, cov):
        a, b, d = (np.longdouble(cov[i][j]) for i, j in ((0, 0), (0, 1), (1, 1)))
        det, u, v = a * d - b * b, x - loc[0], y - loc[1]
        return -(d * u * u - 2 * b * u * v + a * v * v) / det / 2 - np.log(det) / 2 - np.log(2 * np.longdouble(np.pi))

    logs = [np.log(np.longdouble(w)) + log_gaussian(m, c) for w, m, c in zip(weights, locs, covs, strict=True)]
    log_p = np.logaddexp(*logs)
    return float((np.exp(log_p) * (log_p - log_gaussian(q_loc, q_cov))).sum() * np.longdouble(0.15) ** 2)


PLANES = {
    "overlapping": ([0.25, 0.75], [[0, 0], [1, -0.5]], [[[1, 0.3], [0.3, 0.8]], [[0.7, -0.2], [-0.2, 1.2]]]),
    "crossed": ([0.5, 0.5], [[0, 0], [0, 0]], [[[2, 1.5], [1.5, 2]], [[2, -1.5], [-1.5, 2]]]),
    "apart": ([0.125, 0.875], [[-3, 0], [3, 1]], [[[1, 0], [0, 0.5]], [[1, 0.25], [0.25, 1]]]),
}


@pytest.mark.parametrize("name", PLANES)
def test_two_components_in_the_plane(name):
    weights, locs, covs = PLANES[name]
    q_loc, q_cov = [0.5, 0.25], [[2, 0.5], [0.5, 1.5]]
    truth = by_plane(weights, locs, covs, q_loc, q_cov)
    components = [Gaussian(m, "covariance_matrix", c) for m, c in zip(numbers(locs), numbers(covs), strict=True)]
    q = Gaussian(numbers(q_loc), "covariance_matrix", numbers(q_cov))
    assert close(mixture.kl_to_gaussian(numbers(weights), components, q), truth, 1e-13)
    assert not close(mixture.kl_to_gaussian(numbers(weights[::-1]), components[::-1], q), truth * 1.001, 1e-6)
    if weights[0] != weights[1]:
        assert not close(mixture.kl_to_gaussian(numbers(weights[::-1]), components, q), truth, 1e-3)


@pytest.mark.parametrize("dim", [3, 5, 8])
@pytest.mark.parametrize("kind", ["covariance_matrix", "low_rank", "precision_matrix"])
def test_two_components_that_differ_along_one_direction(dim, kind):
    """Seen through an affine map they are a problem on the line; of this map every product is exact."""
    rows, q = ((0.3, 0.0, 1.0), (0.7, 2.0, 0.5)), (1, 0.5, 1.25)
    truth = mixture.line(numbers(rows), numbers([q]))
    a = [[mp.mpf((3 * i + 5 * j) % 7 - 3) + (8 if i == j else 0) for j in range(dim)] for i in range(dim)]
    with mp.workprec(1000):

        def seen(row):
            _, m, s = numbers(row)
            loc = [m * line[0] + mp.fsum(line) for line in a]
            scaled = [[x * (s if j == 0 else 1) for j, x in enumerate(line)] for line in a]
            if kind == "low_rank":
                return Gaussian(loc, kind, (scaled, [mp.mpf(0)] * dim))
            s = mp.matrix(scaled) * mp.matrix(scaled).T
            return Gaussian(loc, kind, (s if kind == "covariance_matrix" else s**-1).tolist())

        components, gaussian = [seen(row) for row in rows], seen(q)
    weights = numbers([row[0] for row in rows])
    value = mixture.kl_to_gaussian(weights, components, gaussian)
    assert close(value, truth, 1e-23)
    assert not close(mixture.kl_to_gaussian(weights, components, components[0]), truth, 1e-6)


def test_two_components_of_rounded_covariances():
    """The float problems that the tests of estimators are made of, to the rounding of their covariances."""
    rows, q = ((0.3, 0.0, 1.0), (0.7, 2.0, 0.5)), (1, 0.5, 1.25)
    truth = mixture.line(numbers(rows), numbers([q]))
    w, loc, cov = embedded((*rows, q), 6)
    first, second, gaussian = (
        Gaussian(exact(m), "covariance_matrix", exact((s + s.mT) / 2)) for m, s in zip(loc, cov, strict=True)
    )
    assert close(mixture.kl_to_gaussian(exact(w[:2]), [first, second], gaussian), truth, 1e-13)


def test_log_densities():
    rows = numbers([(1, 0, 1), (3, 2, 0.5), (0, 9, 9)])
    weights, components = [r[0] for r in rows], [on_line(*r[1:]) for r in rows]
    for x in (-40.0, 0.3, 2.0):
        value = mixture.line_log_density(mp.mpf(x), rows)
        assert close(value, mixture.log_density([mp.mpf(x)], weights, components), 1e-22)
        mix = torch.distributions.Categorical(torch.tensor([1.0, 3.0], dtype=F64))  # of a zero torch makes an epsilon
        parts = torch.distributions.Normal(torch.tensor([0.0, 2], dtype=F64), torch.tensor([1, 0.5], dtype=F64))
        in_torch = torch.distributions.MixtureSameFamily(mix, parts).log_prob(torch.tensor(x, dtype=F64)).item()
        assert close(value, in_torch, 1e-14)
        assert not close(mixture.line_log_density(mp.mpf(x), rows[:1]), in_torch, 1e-3)
    loc, s = torch.tensor([[0.0, 1], [1, 1]], dtype=F64), torch.eye(2, dtype=F64) + 0.25
    both = [Gaussian(exact(m), "covariance_matrix", exact(s)) for m in loc]
    mix = torch.distributions.Categorical(torch.tensor([0.25, 0.75], dtype=F64))
    in_torch = torch.distributions.MixtureSameFamily(mix, torch.distributions.MultivariateNormal(loc, s))
    value = mixture.log_density(numbers([0.5, -1]), numbers([1, 3]), both)
    assert close(value, in_torch.log_prob(torch.tensor([0.5, -1], dtype=F64)).item(), 1e-14)


# --- primitives -----------------------------------------------------------------------------------------------

INF, NAN = math.inf, math.nan


def series(coefficient, x: float, terms: int = 40):
    """A power series with rational coefficients at a float, exactly; then rounded to 60 digits."""
    total = sum(coefficient(k) * Fraction(x) ** k for k in range(2, 2 + terms))
    with mp.workdps(60):
        return mp.mpf(total.numerator) / total.denominator


def tail(y: float):
    """Mills' ratio (1 - Phi(y))/phi(y) by Laplace's continued fraction, and its factor."""
    with mp.workdps(40):
        x, value = mp.mpf(y), mp.mpf(0)
        for k in range(4000, 0, -1):
            value = k / (x + value)
        return mp.log(1 / (x + value)) - x * x / 2 - mp.log(2 * mp.pi) / 2


SECOND_ROUTES = {
    "log1pmx": [((x,), lambda x=x: series(lambda k: Fraction((-1) ** (k + 1), k), x)) for x in (1e-3, -1e-9, 1e-300)],
    "expm1mx": [((x,), lambda x=x: series(lambda k: Fraction(1, math.factorial(k)), x)) for x in (1.5, -1e-9, 5e-324)],
    "log_ratio_bregman": [
        ((a, b), lambda a=a, b=b: mp.quad(lambda t: (t - mp.mpf(b)) / (t * b), numbers([b, a])))
        for a, b in ((1, 2), (3, 0.5), (1, 1 + 2.0**-52))
    ],
    "bd0": [
        ((x, m), lambda x=x, m=m: mp.quad(lambda t: mp.log(t / m), numbers([m, x])))
        for x, m in ((1, 2), (3, 0.5), (1, 1 + 2.0**-20))
    ],
    "log_ndtr": [((-x,), lambda x=x: tail(x)) for x in (2, 9.5, 1e4, 1e18, 1e200)]
    + [((x,), lambda x=x: mp.log1p(-mp.exp(tail(x)))) for x in (2, 9.5, 38)],
    "logsumexp": [(([0.5, -1, 3],), lambda: mp.log(sum(mp.exp(x) for x in (0.5, -1, 3))))],
    "softplus_scale": [((x,), lambda x=x: mp.quad(lambda t: 1 / (1 + mp.exp(-t)), [-90, x])) for x in (-2, 0, 7)]
    + [((-200, 0.25), lambda: mp.mpf(0.25) + mp.exp(-200)), ((1e300,), lambda: mp.mpf(1e300))],
    "bounded_log_scale": [((x, -3, 1), lambda x=x: mp.exp(-1 + 2 * mp.sin(mp.atan((x + 1) / mp.mpf(2)))))
                          for x in (-9, -1, 4)],
}  # fmt: skip


@pytest.mark.parametrize(("name", "case"), [(n, i) for n, c in SECOND_ROUTES.items() for i in range(len(c))])
def test_primitive(name, case):
    args, route = SECOND_ROUTES[name][case]
    value = getattr(special, name)(*numbers(args))
    with mp.workdps(60):
        truth = route()
        assert abs(value - truth) <= abs(truth) * mp.mpf(10) ** -22
        if name not in ("softplus_scale",):
            assert abs(value - truth * (1 + mp.mpf(10) ** -20)) > abs(truth) * mp.mpf(10) ** -22


def test_without_room_two_precisions_agree_on_a_wrong_value(monkeypatch):
    x = mp.mpf(1e-200)
    assert close(special.log1pmx(x) / x**2, -0.5, 1e-15)
    monkeypatch.setattr(special, "room", lambda *_: 0)
    assert special.log1pmx(x) == -x


def test_textbook_forms_in_float_fail_where_the_references_hold():
    x = 1e-14
    assert not math.isclose(math.log1p(x) - x, float(special.log1pmx(mp.mpf(x))), rel_tol=1e-3)
    assert not math.isclose(math.expm1(x) - x, float(special.expm1mx(mp.mpf(x))), rel_tol=1e-3)
    a, b = 1.0, 1 + 2.0**-52
    assert not math.isclose(a / b - 1 - math.log(a / b), float(special.log_ratio_bregman(a, mp.mpf(b))), rel_tol=1e-3)


INVERSES = [("softplus_scale", ()), ("softplus_scale", (0.25,)), ("bounded_log_scale", (-3, 2))]


@pytest.mark.parametrize(("name", "args"), INVERSES)
@pytest.mark.parametrize("x", [-40.0, -1.0, 0.0, 2.5, 60.0])
def test_inverses(name, args, x):
    with mp.workprec(600):
        value = getattr(special, f"{name}_at")(mp.mpf(x), *numbers(args))
        assert close(getattr(special, f"inverse_{name}_at")(value, *numbers(args)), x, 1e-30)
    back = getattr(special, f"inverse_{name}")(value, *numbers(args))
    assert close(back, x, 1e-20)


def test_triangles():
    x = numbers([-1, 2, 0, 3, 4, 1])
    rows = special.scale_tril_from_unconstrained(x, 3, mp.mpf(0.5))
    assert [len(row) for row in rows] == [1, 2, 3]
    assert [rows[1][0], *rows[2][:2]] == numbers([2, 3, 4])
    for row, v in zip(rows, (-1, 0, 1), strict=True):
        assert close(row[-1], special.softplus_scale(mp.mpf(v), mp.mpf(0.5)), 1e-24)
    with mp.workprec(600):
        rows = special.scale_tril_from_unconstrained_at(x, 3, mp.mpf(0.5))
        back = special.unconstrained_from_scale_tril_at([[*r, *[mp.nan] * (3 - len(r))] for r in rows], mp.mpf(0.5))
        assert all(close(a, b, 1e-30) for a, b in zip(back, x, strict=True))
    assert len(special.unconstrained_from_scale_tril(rows, mp.mpf(0.5))) == 6


BOUNDARIES = [
    ("log1pmx", (-1,), -INF), ("log1pmx", (-1.5,), NAN), ("log1pmx", (INF,), -INF), ("log1pmx", (0,), 0),
    ("log1pmx", (NAN,), NAN), ("expm1mx", (INF,), INF), ("expm1mx", (-INF,), INF), ("expm1mx", (0,), 0),
    ("expm1mx", (NAN,), NAN), ("log_ratio_bregman", (0, 2), INF), ("log_ratio_bregman", (2, 0), INF),
    ("log_ratio_bregman", (INF, 2), INF), ("log_ratio_bregman", (2, INF), INF), ("log_ratio_bregman", (NAN, 2), NAN),
    ("log_ratio_bregman", (2, NAN), NAN), ("log_ratio_bregman", (-1, 2), NAN), ("log_ratio_bregman", (3, 3), 0),
    ("bd0", (0, 3), 3), ("bd0", (0, 0), 0), ("bd0", (2, 0), INF), ("bd0", (INF, 2), INF), ("bd0", (2, INF), INF),
    ("bd0", (NAN, INF), NAN), ("bd0", (2, NAN), NAN), ("bd0", (0, NAN), NAN), ("bd0", (-1, 2), NAN),
    ("log_ndtr", (INF,), 0), ("log_ndtr", (-INF,), -INF), ("log_ndtr", (NAN,), NAN), ("logsumexp", ([],), -INF),
    ("logsumexp", ([-INF, -INF],), -INF), ("logsumexp", ([INF, 0, -INF],), INF), ("logsumexp", ([NAN, INF],), NAN),
    ("softplus_scale", (INF,), INF), ("softplus_scale", (-INF,), 0), ("softplus_scale", (NAN,), NAN),
    ("inverse_softplus_scale", (0,), -INF), ("inverse_softplus_scale", (-1,), NAN),
    ("inverse_softplus_scale", (INF,), INF), ("bounded_log_scale", (NAN, -1, 1), NAN),
    ("inverse_bounded_log_scale", (9, -1, 1), NAN), ("inverse_bounded_log_scale", (-1, -1, 1), NAN),
    ("inverse_bounded_log_scale", (NAN, -1, 1), NAN),
]  # fmt: skip


@pytest.mark.parametrize(("name", "args", "expected"), BOUNDARIES)
def test_boundary(name, args, expected):
    for suffix in ("", "_at"):
        value = float(getattr(special, name + suffix)(*numbers(args)))
        assert value == expected or (math.isnan(value) and math.isnan(expected))


def test_the_ends_of_the_bounds():
    for x, end in itertools.product((INF, 1e30), (1, -1)):
        assert close(special.bounded_log_scale(mp.mpf(end * x), mp.mpf(-2), mp.mpf(2)), mp.exp(2 * end), 1e-14)
