"""The errors that are promised: random problems of known truth in every kind of cell, at the default settings.

A few problems of each family here; many, in all cells, when `-m slow` asks for them. The truths are integrals of the
definition (`mixture_integrals`), checked below against mpmath and against grids.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import stablekl

from .benchmarks.bench_mixture_accuracy import DTYPES, TO_MANY, TO_ONE, TO_TWO, bar, outcome
from .mixture_integrals import Table, integral, mean_divergence
from .mixture_problems import draw, families, joint, realised
from .mixture_references import line, plane, radial


def cases(cells):
    return [(family, *cell) for cell in cells for family in families(*cell)]


QUICK = [
    *cases([(2, 1, 1), (2, 1, 8), (3, 1, 3), (3, 1, 8), (5, 1, 1), (5, 1, 2), (5, 1, 3), (5, 1, 8), (16, 1, 1)]),
    *cases([(4, 1, 3), (1, 2, 1), (2, 2, 3), (2, 2, 32), (2, 3, 2), (3, 5, 8)]),
    *((family, 16, 1, 8) for family in ("shared", "groups")),
    *((family, 1, 2, 8) for family in ("shared", "radial", "axial")),
]


def verdicts(family, k_p, k_q, dim, count, seed=0):
    """Outcomes in both precisions; the error of one problem must be within the bar, and its interval hold."""
    results = []
    for i in range(count):
        problem = draw(family, k_p, k_q, dim, seed + i)
        for dtype in DTYPES.values():
            o = outcome(problem, dtype)
            assert o.error <= bar(family, k_p, k_q, dim, dtype), (seed + i, dtype, o)
            assert o.bounded, (seed + i, dtype, o)
            results.append(o)
    return results


@pytest.mark.parametrize(("family", "k_p", "k_q", "dim"), QUICK)
def test_a_few(family, k_p, k_q, dim):
    results = verdicts(family, k_p, k_q, dim, 2)
    assert all(o.covered or o.engine == "sobol" for o in results)


SLOW_SIXTEEN = pytest.param("axial", 7_000_000, marks=pytest.mark.slow)


@pytest.mark.parametrize(("family", "seed"), [("radial", 7_000_001), SLOW_SIXTEEN])
def test_sixteen_components_of_very_different_scales_in_space(family, seed):
    """Scales 600 apart and more: boxes that see the narrowest must not take all the nodes."""
    o = outcome(draw(family, 16, 1, 3, seed), torch.float64)
    assert o.engine == "cubature"
    assert o.error <= 1e-8
    assert o.reported <= 1e-6
    assert o.covered


@pytest.mark.slow
@pytest.mark.parametrize(("family", "k_p", "k_q", "dim"), cases([*TO_ONE, *TO_TWO, *TO_MANY]))
def test_many(family, k_p, k_q, dim):
    results = verdicts(family, k_p, k_q, dim, 20, seed=1000)
    assert sum(o.covered for o in results) >= 0.95 * len(results)


def test_errors_are_noticed():
    """Must fail: S without the information, the bound that is often used in its place."""
    problem = draw("axial", 5, 1, 8, 0)
    assert problem.scale - problem.truth > 100 * bar("axial", 5, 1, 8, torch.float64) * (1 + problem.scale)


# ------------------------------------------------------------------------------------------ the references


def on_a_line(rows):
    w, m, s = (np.array(x, float) for x in zip(*rows, strict=True))
    return Table(w, m[:, None], s[:, None, None], np.ones(len(w)), 0)


@pytest.mark.parametrize(
    ("p", "q"),
    [
        ([(0.2, -2.0, 1.0), (0.3, 1.0, 0.5), (0.5, 4.0, 2.0)], [(1.0, 1.0, 3.0)]),
        ([(0.25, 0.0, 0.001), (0.75, 0.1, 3.0)], [(1.0, 0.0, 2.0)]),
        ([(1.0, 0.0, 50.0)], [(0.4, 0.0, 1.0), (0.6, 2.0, 0.5)]),
    ],
)
def test_the_reference_on_a_line(p, q):
    found = integral(on_a_line(p), on_a_line(q))
    truth = float(line(p, q))
    assert float(abs(found.value - truth)) <= 1e-15 * (1 + truth)
    assert float(found.error) <= 1e-13 * (1 + truth)


def test_the_reference_in_the_plane():
    w, loc = np.array([0.35, 0.65]), np.array([[0.0, 0.5], [2.0, -1.0]])
    cov = np.array([[[1.0, 0.6], [0.6, 0.8]], [[0.7, -0.3], [-0.3, 1.5]]])
    one = np.ones(1), np.array([[1.0, 0.0]]), np.array([[[2.5, -0.5], [-0.5, 2.0]]])
    truth = plane((w, loc, cov), one, 0.08)
    p = Table(w, loc, np.linalg.cholesky(cov), np.ones(2), 0)
    q = Table(one[0], one[1], np.linalg.cholesky(one[2]), np.ones(1), 0)
    for dtype in (np.float64, np.longdouble):
        assert abs(float(integral(p, q, dtype=dtype).value) - truth) <= 2e-15
    inside = integral(p, p, "component")  # S - I of the same
    assert abs(mean_divergence(p, q) - float(inside.value) - truth) <= 2e-15


@pytest.mark.parametrize("dim", [2, 3, 32])
def test_the_reference_around_a_point(dim):
    p, q = [(0.25, 0.5), (0.75, 1.5)], [(1.0, 1.25)]
    truth = float(radial(p, q, dim))
    concentric, axial = [], []
    for rows in (p, q):
        w, s = np.array([w for w, _ in rows]), np.array([s for _, s in rows])
        concentric.append(Table(w, np.zeros((len(w), 0)), np.zeros((len(w), 0, 0)), s, dim))
        axial.append(Table(w, np.zeros((len(w), 1)), s[:, None, None], s, dim - 1))
    for pair in (concentric, axial):
        assert abs(float(integral(*pair).value) - truth) <= 1e-15 * (1 + truth)


def test_the_reference_of_a_product():
    """The joint components of a product, in the plane, have the sum of the factors' divergences."""
    p = [on_a_line([(0.25, 0.0, 1.0), (0.75, 2.0, 0.5)]), on_a_line([(0.5, -1.0, 1.0), (0.5, 1.0, 2.0)])]
    q = [on_a_line([(1.0, 1.0, 2.0)]), on_a_line([(0.5, 0.0, 2.0), (0.5, 3.0, 1.0)])]
    apart = sum(float(integral(a, b).value) for a, b in zip(p, q, strict=True))
    together = [Table(w, m, t, np.ones(len(w)), 0) for w, m, t in (joint(p, 2), joint(q, 2))]
    assert abs(float(integral(*together).value) - apart) <= 1e-14


def test_the_problems_are_what_was_solved():
    """Both precisions hold the same numbers."""
    for seed in range(4):
        problem = draw("radial", 3, 1, 8, seed)
        p, _, _ = realised(problem._replace(seed=3 * seed), torch.float64)
        single, _, _ = realised(problem._replace(seed=3 * seed), torch.float32)
        a, b = p.component_distribution, single.component_distribution
        assert torch.equal(a.loc, b.loc.double())
        assert torch.equal(a.scale_tril, b.scale_tril.double())


def test_a_loss_of_single_precision_is_bounded_and_not_only_to_leading_order():
    """Three concentric components, alike to 1e-5: S is 2e-9 and I the same, the projection's loss a third of it."""
    problem = draw("radial", 3, 1, 3, 61027)
    p, q, slack = realised(problem, torch.float32)
    e = stablekl.kl_estimate(p, q)
    assert abs(float(e.value) - problem.truth) <= float(e.error) + slack
    assert float(e.lower) - slack <= problem.truth <= float(e.upper) + slack
