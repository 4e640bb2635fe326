"""Integration rules: nodes, panels in twice the precision, Sobol normals, Student's quantile."""

from __future__ import annotations

import math
from fractions import Fraction

import mpmath
import pytest
import torch

from stablekl import quadrature

CPU = torch.device("cpu")


@pytest.mark.parametrize("n", [2, 5, 16, 40])
def test_gauss_legendre_integrates_polynomials_of_degree_2n_minus_1(n):
    nodes, weights, _ = quadrature.gauss_legendre(n, CPU)
    for degree in (0, 1, n, 2 * n - 1):
        assert abs(float((weights * nodes**degree).sum()) * (degree + 1) - 1) < 2e-14 * n
    if n < 8:  # must fail: one degree more
        assert abs(float((weights * nodes ** (2 * n)).sum()) * (2 * n + 1) - 1) > 1e-9


def test_gauss_legendre_nodes_are_roots_of_the_legendre_polynomial():
    nodes = quadrature.gauss_legendre(16, CPU)[0]
    with mpmath.workdps(40):
        for x in nodes:
            root = mpmath.findroot(lambda t: mpmath.legendre(16, 2 * t - 1), mpmath.mpf(float(x)))
            assert abs(float(root - mpmath.mpf(float(x)))) < 2e-16


def test_null_rule_is_the_last_legendre_coefficient():
    nodes, _, null_rule = quadrature.gauss_legendre(8, CPU)
    values = torch.tensor([float(mpmath.legendre(7, 2 * float(x) - 1)) for x in nodes], dtype=torch.float64)
    assert abs(float((null_rule * values).sum()) - 1) < 1e-14
    assert abs(float((null_rule * nodes**6).sum())) < 1e-14


def test_two_sum_is_exact():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(500, generator=generator, dtype=torch.float64) * 1e10
    b = torch.randn(500, generator=generator, dtype=torch.float64) * 10.0 ** torch.arange(-250, 250).div(20.0)
    total, error = quadrature.two_sum(a, b)
    for x, y, s, e in zip(a.tolist(), b.tolist(), total.tolist(), error.tolist(), strict=True):
        assert Fraction(x) + Fraction(y) == Fraction(s) + Fraction(e)


def _peak_mass(low_is_kept: bool) -> float:
    """The mass of a normal density of scale 1e-9 at 1e6, where one ulp is 1.2e-10."""
    centre, scale = torch.tensor(1e6, dtype=torch.float64), 1e-9
    steps = scale * torch.linspace(-9, 9, 13, dtype=torch.float64)
    high, low = quadrature.two_sum(centre.expand(13), steps)
    low = low if low_is_kept else torch.zeros_like(low)
    node, node_low, weight, _ = quadrature.panel_rule(high, low, 16)
    node_low = node_low if low_is_kept else torch.zeros_like(node_low)
    z = ((node - centre) + node_low) / scale
    return float((weight * torch.exp(-0.5 * z * z)).sum()) / (scale * math.sqrt(2 * math.pi))


def test_panels_resolve_a_peak_narrower_than_the_spacing_of_floats_allows():
    assert abs(_peak_mass(True) - 1) < 1e-14
    assert abs(_peak_mass(False) - 1) > 1e-6  # must fail: abscissae in working precision


def test_panels_may_coincide_and_come_in_any_order():
    high = torch.tensor([2.0, 0.0, 1.0, 1.0, 0.5], dtype=torch.float64)
    node, low, weight, width = quadrature.panel_rule(high, torch.zeros_like(high), 4)
    assert width.squeeze(-1).tolist() == [0.5, 0.5, 0.0, 1.0]
    assert abs(float((weight * (node + low) ** 3).sum()) - 4.0) < 1e-14


def test_sobol_normals_are_reproducible_and_leave_the_random_state_alone():
    state = torch.get_rng_state()
    quadrature._sobol_normals.cache_clear()
    first = quadrature.sobol_normals(3, 64, 2, CPU)
    quadrature._sobol_normals.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        again = quadrature.sobol_normals(3, 64, 2, CPU)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(first, again)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("transform", ["grad", "vmap", "inference", "no transform"])
def test_points_first_made_inside_a_transform_are_plain_tensors(transform):
    quadrature._sobol_normals.cache_clear()
    x = torch.ones(3, dtype=torch.float64)

    def f(x):
        return (quadrature.sobol_normals(3, 8, 2, CPU).sum() * x).sum()

    if transform == "grad":
        torch.func.grad(f)(x)
    elif transform == "vmap":
        torch.vmap(f)(x)
    elif transform == "inference":
        with torch.inference_mode():
            f(x)
    points = quadrature.sobol_normals(3, 8, 2, CPU)
    assert type(points) is torch.Tensor
    assert not points.is_inference()
    y = torch.ones(3, dtype=torch.float64, requires_grad=True)
    f(y).backward()
    assert torch.isfinite(y.grad).all()


@pytest.mark.parametrize("dimension", [1, 2, 7])
def test_sobol_normals_are_balanced(dimension):
    z = quadrature.sobol_normals(dimension, 256, 3, CPU)
    assert z.shape == (3, 256, dimension)
    assert torch.isfinite(z).all()
    # Every one of 256 equal intervals of the unit interval holds one point, in every coordinate.
    cells = (torch.special.ndtr(z) * 256).floor().sort(dim=1).values
    assert torch.equal(cells, torch.arange(256.0, dtype=torch.float64)[:, None].expand(3, 256, dimension))


def test_the_normal_score_of_the_outermost_cells_is_finite_and_accurate():
    with mpmath.workdps(40):
        for k in (1, 3, 5, 2**30 - 1, 2**31 - 3, 2**31 - 1):
            u = k * 2.0**-31
            z = float(torch.special.ndtri(torch.tensor(u, dtype=torch.float64)))
            truth = mpmath.findroot(lambda t, u=u: mpmath.ncdf(t) - mpmath.mpf(u), z)
            assert abs(z - truth) <= 1e-15 * abs(truth)


def test_student_t_half_width():
    for n in (2, 3, 8, 9, 64):
        got = quadrature.student_t_half_width(n)
        with mpmath.workdps(30):  # SciPy 1.15 has the quantile to 2e-11 only
            nu, t = mpmath.mpf(n - 1), got * mpmath.sqrt(n)
            tail = mpmath.betainc(nu / 2, 0.5, 0, nu / (nu + t * t), regularized=True) / 2
            density = mpmath.gamma((nu + 1) / 2) / mpmath.gamma(nu / 2) / mpmath.sqrt(nu * mpmath.pi)
            density *= (1 + t * t / nu) ** (-(nu + 1) / 2)
            assert abs((tail - mpmath.mpf("0.025")) / density / t) < 1e-14


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="8 is usual"):
        quadrature.student_t_half_width(1)
    with pytest.raises(ValueError, match="Monte Carlo"):
        quadrature.sobol_normals(30_000, 8, 2, CPU)
