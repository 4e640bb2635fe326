"""Control variates of the information: their means by integration, no bias, honest errors."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from stablekl.mixtures.components import Components
from stablekl.mixtures.engines import sobol
from stablekl.mixtures.engines.controls import Controls, fit
from stablekl.mixtures.engines.sobol import sobol_information
from stablekl.mixtures.information import line_information

from .mixture_references import F64, embedded
from .test_kl_estimate import WEIGHTS, tables

REPLICATES = 16  # what the adaptive driver uses


def on_the_line(rows):
    return Components(rows[..., 0].log(), rows[..., 1:2], rows[..., 2:])


def in_space(rows, dim, seed=1):
    w, loc, cov = embedded(rows, dim, seed)
    return Components(w.log(), loc, torch.linalg.cholesky(cov))


@pytest.mark.parametrize("k", [3, 4, 5, 7])
@pytest.mark.parametrize("weights", ["even", "one rare"])
def test_means_by_integration(k, weights):
    """On the line, in extended precision, of the very values that are used; and embedded in four dimensions."""
    for separation in (0.3, 3.0):
        rows = tables(3, k, separation, weights, k)
        p = on_the_line(rows)
        controls, above = Controls(p), Controls(in_space(rows, 4))
        torch.testing.assert_close(above.means, controls.means, rtol=1e-10, atol=1e-12)
        x = torch.linspace(-40, 40, 16001, dtype=F64)
        z = (x.reshape(-1, 1, 1) - p.loc[..., 0]) / p.scale[..., 0]
        joint = p.log_weights - 0.5 * z.square() - p.scale[..., 0].log() - 0.5 * math.log(2 * math.pi)
        log_m = joint.logsumexp(-1, keepdim=True)
        values = controls.at(joint - log_m).numpy().astype(np.longdouble)
        integral = (np.exp(log_m.numpy().astype(np.longdouble)) * values).sum(0) * np.longdouble(5e-3)
        found = controls.means.numpy()
        assert np.abs(integral - found).max() <= 2e-13 * k * k
        assert np.abs(integral - 1.001 * found).max() > 1e-6


@pytest.mark.parametrize(
    ("k", "dim", "weights"),
    [
        (4, 4, "even"),
        (5, 8, "one rare"),
        *(pytest.param(k, d, w, marks=pytest.mark.slow) for k, d in ((4, 4), (5, 8), (16, 4)) for w in WEIGHTS),
    ],
)
def test_coverage(k, dim, weights, request):
    """Even weights make a constant of sum r_k log w_k, whose coefficient was 3e11: a bias of 1e-4, 78 % covered."""
    covered = []
    slow = request.node.get_closest_marker("slow") is not None
    for separation, n in itertools.product((0.3, 3.0, 10.0), (256, 1024) if slow else (256, 512)):
        rows = tables(40 if slow else 20, k, separation, weights, int(10 * separation) + k)
        truth = line_information(on_the_line(rows))[0]
        value, error = sobol_information(in_space(rows, dim), num_points=n, num_replicates=REPLICATES)
        covered.append((value - truth).abs() <= error + 1e-13)
        bias = (value - truth).mean().abs() / (error.square().mean().sqrt() / math.sqrt(len(rows)))
        assert float(bias) < 2
    assert float(torch.cat(covered).double().mean()) >= 0.95


def test_controls_are_worth_it(monkeypatch):
    """Must fail: none."""
    rows = tables(10, 4, 3.0, "uneven", 3)
    p = in_space(rows, 4)
    error = sobol_information(p, num_points=256, num_replicates=REPLICATES)[1]
    monkeypatch.setattr(sobol, "Controls", lambda _: None)
    plain = sobol_information(p, num_points=256, num_replicates=REPLICATES)[1]
    assert float((error / plain).median()) < 0.5


def test_a_constant_is_no_control():
    """It has the variance of its rounding; as it has a mean, too, no coefficient may come of it."""
    g = torch.Generator().manual_seed(0)
    f = torch.randn(16, 256, 1, generator=g, dtype=F64)
    noisy = math.log(3) * (1 + 2.0**-52 * torch.randint(-2, 3, (16, 256, 1, 1), generator=g).double())
    found = fit([(f, noisy)], torch.ones(1, 1, dtype=F64), torch.full((1, 1), math.log(3), dtype=F64))
    assert float(found.beta) == 0
    useful = torch.cat([noisy, f.unsqueeze(-1)], -1)
    found = fit([(f, useful)], torch.ones(1, 1, dtype=F64), torch.tensor([[math.log(3), 0.0]], dtype=F64))
    torch.testing.assert_close(found.beta, torch.tensor([[0.0, 1.0]], dtype=F64), rtol=1e-9, atol=0)


def test_a_control_that_no_point_saw():
    f = torch.randn(16, 256, 1, generator=torch.Generator().manual_seed(1), dtype=F64)
    c = torch.zeros(16, 256, 1, 1, dtype=F64)
    c[3, 7] = 1e-8
    found = fit([(f, c)], torch.ones(1, 1, dtype=F64), torch.full((1, 1), 1e-3, dtype=F64))
    assert float(found.beta) == 0
    assert float(found.missed) == pytest.approx(1e-3)
    seen = fit([(f, f.unsqueeze(-1))], torch.ones(1, 1, dtype=F64), torch.zeros(1, 1, dtype=F64))
    assert float(seen.missed) == 0


def test_overlaps_that_are_never_sampled_are_in_the_error():
    """Two needles in a third component, and two slabs that cross at 40 standard deviations of every other."""
    for wide in (1e3, 1e5, 1e7):
        rows = torch.tensor([[[0.4, 0.0, 1.0], [0.3, 30.0, wide], [0.3, -30.0, 1.0], [1e-9, 0.0, 1e-3]]], dtype=F64)
        truth = line_information(on_the_line(rows / torch.tensor([rows[..., 0].sum(), 1, 1], dtype=F64)))[0]
        p = in_space(rows / torch.tensor([rows[..., 0].sum(), 1, 1], dtype=F64), 4)
        value, error = sobol_information(p, num_points=256, num_replicates=REPLICATES)
        assert float((value - truth).abs()) <= 2 * float(error) + 1e-12  # 16 times without what few points saw


@pytest.mark.parametrize("k", [3, 4, 6])
def test_zero_weights(k):
    rows = tables(2, k, 2.0, "uneven", 5)
    rows[:, 0, 0] = 0
    rows[..., 0] = rows[..., 0] / rows[..., 0].sum(-1, keepdim=True)
    truth = line_information(on_the_line(rows))[0]
    leaves = [x.clone().requires_grad_() for x in in_space(rows, 3)]
    value, error = sobol_information(Components(*leaves), num_points=256, num_replicates=REPLICATES)
    assert bool(((value - truth).abs() <= 1.5 * error + 1e-12).all())
    assert all(bool(x.isfinite().all()) for x in torch.autograd.grad(value.sum(), leaves))


def test_gradients_are_those_of_the_value():
    p = in_space(tables(1, 4, 1.5, "uneven", 6), 2)

    def f(lw, loc, scale):
        p = Components(torch.log_softmax(lw, -1), loc, scale.tril())
        return sobol_information(p, num_points=64, num_replicates=2)[0]

    assert torch.autograd.gradcheck(f, tuple(x.clone().requires_grad_() for x in p), fast_mode=True, rtol=1e-4)


def test_under_vmap():
    p = in_space(tables(3, 4, 1.5, "uneven", 7), 2)
    mapped = torch.vmap(lambda *x: sobol_information(Components(*x), num_points=64, num_replicates=4))(*p)
    for a, b in zip(mapped, sobol_information(p, num_points=64, num_replicates=4), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# torch.compile instantiates autograd functions, against its own advice
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_under_compile():
    p = in_space(tables(1, 4, 1.5, "uneven", 8), 2)

    def f(*x):
        return sobol_information(Components(*x), num_points=64, num_replicates=4)[0]

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*p), f(*p), rtol=1e-9, atol=1e-12)
