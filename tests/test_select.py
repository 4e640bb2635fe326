"""Which engine for which p and q: near p = q, in batches of unlike rows, by name, and with weights of zero."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.distributions import kl_divergence

import stablekl
from stablekl.mixtures import mixture_kl
from stablekl.mixtures.engines.cubature import cubature_kl
from stablekl.mixtures.information import cubature_tolerance
from stablekl.mixtures.reading import as_mixture
from stablekl.mixtures.select import applies
from stablekl.precision.references import mixture as reference
from stablekl.precision.references.context import mp

from .mixture_references import F64, gaussian, line
from .test_kl_mixture import single_or_mixture


def parameters(k, dim, seed, *, full=False):
    g = torch.Generator().manual_seed(seed)
    weights, loc = 0.5 * torch.randn(k, generator=g, dtype=F64), torch.randn(k, dim, generator=g, dtype=F64)
    scale = torch.exp(0.3 * torch.randn(k, dim, generator=g, dtype=F64))
    if full:
        scale = torch.diag_embed(scale) + 0.3 * torch.randn(k, dim, dim, generator=g, dtype=F64).tril(-1)
    return [weights, loc, scale]


def built(weights, loc, scale):
    """A mixture, or a Gaussian where there is one component."""
    kind = {"scale_diag" if scale.ndim == loc.ndim else "scale_tril": scale}
    if loc.shape[-2] == 1:
        return stablekl.MultivariateNormal(loc[..., 0, :], **{k: v.select(loc.ndim - 2, 0) for k, v in kind.items()})
    return stablekl.GaussianMixture(logits=weights, loc=loc, **kind)


@pytest.fixture
def sharper(monkeypatch):
    """The reference with 12 more digits: its own are those of 1 + KL."""
    monkeypatch.setattr(reference, "_TOLERANCE", mp.mpf(10) ** -36)


# ---------------------------------------------------------------------------------------------- near p = q


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dim", [1, 2, 3, 5])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_equal_parameters(k, dim, full):
    """Exactly 0, with gradients of exactly 0 in every parameter, of p and of q."""
    given = parameters(k, dim, k, full=full)
    leaves = [x.clone().requires_grad_() for x in given]
    for p, q in ((built(*leaves), built(*given)), (built(*given), built(*leaves))):
        e = stablekl.kl_estimate(p, q)
        assert float(e.value.detach()) == float(e.lower) == 0
        for g in torch.autograd.grad(e.value, leaves, allow_unused=True):
            assert g is None or not bool(g.any())


@pytest.mark.parametrize("step", [1e-5, 1e-7, 1e-8])
@pytest.mark.parametrize(("k", "dim"), [(2, 2), (3, 2), (2, 5), (3, 5)])
def test_moved_across_the_line_of_the_means(k, dim, step):
    """Means on a line, moved at a right angle to it: half the square of the step, all of it outside that line."""
    weights = torch.linspace(0, 1, k, dtype=F64)
    loc = torch.arange(k, dtype=F64).unsqueeze(-1) * torch.eye(dim, dtype=F64)[0]
    moved = (loc + step * torch.eye(dim, dtype=F64)[1]).requires_grad_()
    unit = torch.ones(k, dim, dtype=F64)
    e = stablekl.kl_estimate(built(weights, loc, unit), built(weights, moved, unit))
    truth = step**2 / 2
    assert abs(float(e.value.detach()) / truth - 1) <= 1e-10
    assert float(e.error) <= 1e-9 * truth
    (gradient,) = torch.autograd.grad(e.value, moved)
    torch.testing.assert_close(gradient[:, 1], step * torch.softmax(weights, 0), rtol=1e-10, atol=0)


def test_a_projection_that_ignores_it_is_noticed(monkeypatch):
    """Must fail: the plane of the step left out, as 5e-15 nats may be."""
    monkeypatch.setattr(mixture_kl, "LOSSY", 0.0)
    weights, loc = torch.zeros(3, dtype=F64), torch.arange(3, dtype=F64).unsqueeze(-1) * torch.eye(2, dtype=F64)[0]
    moved = loc + 1e-7 * torch.eye(2, dtype=F64)[1]
    unit = torch.ones(3, 2, dtype=F64)
    e = stablekl.kl_estimate(built(weights, loc, unit), built(weights, moved, unit))
    assert float(e.value) < 1e-20
    assert float(e.error) >= 5e-15  # but said


@pytest.mark.parametrize("step", [1e-3, 1e-6, 1e-8])
@pytest.mark.parametrize("dim", [1, 2, 6])
@pytest.mark.parametrize("k", [2, 3])
def test_relative_accuracy_along_a_line(k, dim, step, sharper):
    """Two and three components moved along their line, in any number of dimensions."""
    rows = [(0.25, 0.0, 1.0), (0.5, 1.5, 0.75), (0.25, -2.0, 1.25)][:k]
    near = [(w, m + step * (1 + i), s) for i, (w, m, s) in enumerate(rows)]
    truth = line(rows, near)
    e = stablekl.kl_estimate(gaussian(rows, dim), gaussian(near, dim))
    assert e.method == "line"
    assert abs(float(mp.mpf(float(e.value)) / truth - 1)) <= 1e-12 + 2e-14 / step  # `embedded` rounds


@pytest.mark.parametrize("change", [0, 1, 2])
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_a_certified_interval_near_each_other(dim, change, sharper):
    """Weights, means or scales changed a little: their rounding, relative to the change, is in the interval."""
    unit, step = torch.ones(2, dim, dtype=F64), 1e-7
    rows = torch.tensor([[0.3, -0.7, 1.1], [0.7, 1.3, 0.6]], dtype=F64)
    near = rows.clone()
    near[:, change] *= 1 + step * torch.tensor([3.0, -1.0], dtype=F64)
    mixtures = []
    for w, m, s in (rows.T, near.T):
        loc, scale = 0.7 * unit, 0.3 * unit
        loc[:, -1], scale[:, -1] = m, s
        mixtures.append(stablekl.GaussianMixture(probs=w, loc=loc, scale_diag=scale))
    e = stablekl.kl_estimate(*mixtures)
    truth = line(rows.tolist(), near.tolist())
    assert e.method == "line"
    assert abs(mp.mpf(float(e.value)) - truth) <= float(e.error) <= 1e-6 * truth
    assert float(e.lower) <= truth <= float(e.upper)


@pytest.mark.parametrize(("k", "dim", "bar"), [(2, 2, 1e-8), (3, 2, 1e-8), (2, 3, 1e-4), (2, 5, 0.1), (3, 5, 0.1)])
def test_the_square_of_the_step(k, dim, bar):
    """In all directions at once, KL/step^2 has a limit."""
    p, change = parameters(k, dim, 1, full=True), parameters(k, dim, 5, full=True)
    found = []
    for step in (1e-6, 1e-7):
        e = stablekl.kl_estimate(built(*p), built(*(x + step * c for x, c in zip(p, change, strict=True))))
        assert 0 < float(e.error) <= bar * float(e.value)
        found.append(float(e.value) / step**2)
    assert found[0] == pytest.approx(found[1], rel=max(bar, 1e-4))


# ------------------------------------------------------------------------------------------------- batches


def test_a_row_does_not_depend_on_the_rest_of_the_batch():
    """Lines, planes, near and far, equal: alone and together."""
    ranks = []
    unit = torch.eye(4, dtype=F64).expand(3, 4, 4)
    weights, loc, factor = parameters(3, 4, 2, full=True)
    for r in range(1, 5):
        keep = (torch.arange(4) < r).to(F64)
        ranks.append((loc * keep, unit if r < 4 else factor))
    shared = [(m, s) for m, s in ranks for _ in range(2)]
    other = [x for m, s in ranks for x in ((m * 2 + (m != 0) * 0.3, s), (m * (1 + 1e-7), s))]
    rows = [(*pair[0], *pair[1]) for pair in zip(shared, other, strict=True)]
    rows.append((loc, factor, loc, factor))
    together = [torch.stack(x) for x in zip(*rows, strict=True)]
    many = weights.expand(len(rows), 3)
    options = {"rtol": 1e-2, "max_points": 2**12}
    whole = stablekl.kl_estimate(built(many, *together[:2]), built(many, *together[2:]), **options)
    assert whole.method == "sobol"
    for i, (a, b, c, d) in enumerate(rows):
        alone = stablekl.kl_estimate(built(weights, a, b), built(weights, c, d), **options)
        assert abs(float(whole.value[i] - alone.value)) <= 1e-15 * (1 + float(alone.value))
        assert float(whole.error[i]) == pytest.approx(float(alone.error), rel=1e-9, abs=1e-30)
        assert float(whole.lower[i]) <= float(alone.value) <= float(whole.upper[i])
    assert float(whole.value[-1]) == 0


def test_the_tolerance_of_a_plane_is_each_rows_own():
    """A covariance that all share asks for 1e-13, also beside a row whose components do not share one."""
    weights, loc, factor = parameters(3, 2, 3, full=True)
    alike = factor[:1].expand(3, 2, 2)
    p = built(weights.expand(2, 3), loc.expand(2, 3, 2), torch.stack([alike, factor]))
    q = built(weights.expand(2, 3), 2 * loc.expand(2, 3, 2), torch.stack([alike, factor]))
    tolerance = cubature_tolerance(as_mixture(p).components())
    assert tolerance.tolist() == [1e-13, 1e-9]
    both = stablekl.kl_estimate(p, q)
    one = stablekl.kl_estimate(built(weights, loc, alike), built(weights, 2 * loc, alike))
    assert both.method == one.method == "cubature"
    assert float(both.value[0]) == float(one.value)
    assert float(both.error[0]) == float(one.error) <= 1e-12


@pytest.mark.parametrize(("k_p", "k_q"), list(itertools.product((1, 2, 3), (1, 2, 3))))
def test_shapes_and_kinds(k_p, k_q):
    """Batch shapes that broadcast, expanded ones, and mixed kinds, torch's and ours."""
    for dim, kinds in ((1, ["normal"]), (2, ["independent", "low_rank"]), (3, ["covariance_matrix", "scale_diag"])):
        for kind_p, kind_q in itertools.product(kinds, kinds):
            p = single_or_mixture(kind_p, (2, 1), k_p, dim, 1, torch.distributions)
            q = single_or_mixture(kind_q, (3,), k_q, dim, 2, stablekl)
            e = stablekl.kl_estimate(p, q, rtol=1e-1, max_points=512)
            assert all(x.shape == (2, 3) for x in e[:4])
            assert bool((e.lower <= e.value).all() & (e.value <= e.upper).all())
            wide = stablekl.kl_estimate(p.expand((2, 3)), q.expand((2, 3)), rtol=1e-1, max_points=512)
            torch.testing.assert_close(wide.value, e.value, rtol=1e-14, atol=1e-15)


def test_float32_and_float64():
    p, q = parameters(3, 2, 1), parameters(2, 2, 2)
    single = [x.to(torch.float32) for x in p]
    mixed = stablekl.kl_estimate(built(*single), built(*q))
    wide = stablekl.kl_estimate(built(*(x.to(F64) for x in single)), built(*q))
    assert mixed.value.dtype == F64
    assert abs(float(mixed.value - wide.value)) <= 1e-8  # float32 parameters may be projected further
    narrow = stablekl.kl_estimate(built(*single), built(*(x.to(torch.float32) for x in q)))
    assert narrow.value.dtype == torch.float32
    assert float(narrow.value) == pytest.approx(float(wide.value), rel=1e-6)


# ------------------------------------------------------------------------------------------ explicit methods

SHAPES = {  # method: (components of p, of q, dimensions) where it applies, and where it does not
    "closed form": ([(1, 1, 3)], [(2, 1, 3), (1, 2, 1)]),
    "line": ([(3, 2, 1), (1, 1, 1)], [(3, 2, 2)]),
    "spectral": ([(2, 1, 3), (2, 1, 1)], [(3, 1, 3), (2, 2, 3), (1, 2, 3)]),
    "triple": ([(3, 1, 3), (3, 1, 1)], [(2, 1, 3), (3, 2, 3)]),
    "contour": ([(2, 2, 3), (1, 2, 2), (2, 2, 1), (2, 3, 4), (1, 3, 1)], [(3, 2, 3), (2, 4, 3), (2, 1, 3)]),
    "cubature": ([(3, 3, 2), (2, 1, 2), (2, 2, 3)], [(3, 3, 1), (3, 3, 4)]),
    "sobol": ([(3, 3, 2), (2, 1, 1), (1, 1, 2)], []),
}


@pytest.mark.parametrize("method", SHAPES)
def test_methods_by_name(method):
    possible, impossible = SHAPES[method]
    for k_p, k_q, dim in possible:
        p, q = built(*parameters(k_p, dim, 1)), built(*parameters(k_q, dim, 2))
        named, chosen = stablekl.kl_estimate(p, q, method, rtol=1e-3), stablekl.kl_estimate(p, q)
        assert named.method == method
        assert abs(float(named.value - chosen.value)) <= float(named.error + chosen.error)
    for k_p, k_q, dim in impossible:
        p, q = built(*parameters(k_p, dim, 1)), built(*parameters(k_q, dim, 2))
        with pytest.raises(ValueError, match=rf"{method!r} does not apply to {k_p} against {k_q} components in {dim}"):
            stablekl.kl_estimate(p, q, method)


@pytest.mark.parametrize(("method", "k_p", "k_q"), [("spectral", 2, 1), ("triple", 3, 1), ("contour", 2, 2)])
def test_a_method_does_not_end_where_a_weight_becomes_zero(method, k_p, k_q):
    given, other = parameters(k_p, 3, 1), parameters(k_q, 3, 2)
    given[0][1] = -math.inf
    leaves = [x.clone().requires_grad_() for x in given]
    p, q = built(*leaves), built(*other)
    e = stablekl.kl_estimate(p, q, method)
    assert e.method == method
    assert abs(float((e.value - kl_divergence(p, q)).detach())) <= 1e-13
    gradients = torch.autograd.grad(e.value, leaves)
    assert all(bool(g.isfinite().all()) for g in gradients)
    assert not bool(gradients[1][1].any())
    # and one that fits only without that component is still found
    assert applies(method, as_mixture(p), as_mixture(q))
    if method == "triple":
        assert stablekl.kl_estimate(p, q, "spectral").method == "spectral"


# ----------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("method", "k_p", "k_q", "dim", "bar"),
    [
        ("line", 3, 2, 1, 1e-11),
        ("spectral", 2, 1, 3, 1e-10),
        ("triple", 3, 1, 3, 1e-10),
        ("contour", 2, 2, 3, 1e-9),
        ("cubature", 3, 3, 2, 1e-8),
    ],
)
def test_gradients(method, k_p, k_q, dim, bar, full):
    """Central differences of fourth order in all parameters of p and of q."""
    given = parameters(k_p, dim, 1, full=full) + parameters(k_q, dim, 2, full=full)
    changes = parameters(k_p, dim, 3, full=full) + parameters(k_q, dim, 4, full=full)
    h = 1e-4 if method != "cubature" else 1e-3

    def at(t, tensors=given):
        moved = [x + t * c for x, c in zip(tensors, changes, strict=True)]
        return stablekl.kl_estimate(built(*moved[:3]), built(*moved[3:]))

    leaves = [x.clone().requires_grad_() for x in given]
    e = at(0.0, leaves)
    assert e.method == method
    gradients = torch.autograd.grad(e.value, leaves, allow_unused=True)
    total = sum(float((g * c).sum()) for g, c in zip(gradients, changes, strict=True) if g is not None)
    values = [float(at(i * h).value) for i in (-2, -1, 1, 2)]
    difference = (8 * (values[2] - values[1]) - (values[3] - values[0])) / (12 * h)
    assert abs(total - difference) <= bar * (1 + abs(difference))


# ---------------------------------------------------------------------------------------------- transforms


@pytest.mark.parametrize(
    ("k", "dim", "bar"), [(2, 1, 1e-14), (5, 1, 1e-14), (2, 3, 1e-13), (3, 3, 1e-13), (4, 3, 1e-3)]
)
def test_vmap(k, dim, bar):
    """Against one Gaussian and two: exact for up to three components, and sampled only for the information of more."""
    weights, loc, scale = parameters(k, dim, 1)
    many = loc + torch.randn(2, k, dim, generator=torch.Generator().manual_seed(2), dtype=F64)
    q1, q2 = (built(*parameters(n, dim, 5)) for n in (1, 2))

    def f(m):
        p = stablekl.GaussianMixture(logits=weights, loc=m, scale_diag=scale, validate_args=False)
        return torch.stack([kl_divergence(p, q1), kl_divergence(p, q2)])

    torch.testing.assert_close(torch.vmap(f)(many), torch.stack([f(m) for m in many]), rtol=bar, atol=bar)
    gradient = torch.vmap(torch.func.grad(lambda m: f(m).sum()))(many)
    for m, g in zip(many, gradient, strict=True):
        leaf = m.clone().requires_grad_()
        torch.testing.assert_close(g, torch.autograd.grad(f(leaf).sum(), leaf)[0], rtol=10 * bar, atol=10 * bar)


def test_compile():
    torch._dynamo.reset()
    weights, loc, scale = parameters(2, 2, 1)
    q = built(*parameters(2, 2, 2))

    def f(m):
        return kl_divergence(stablekl.GaussianMixture(logits=weights, loc=m, scale_diag=scale, validate_args=False), q)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(loc), f(loc), rtol=1e-13, atol=1e-13)


def test_in_the_plane_by_name_and_not():
    """The engine itself, with the tolerance that is asked of it."""
    p, q = built(*parameters(3, 2, 1)), built(*parameters(3, 2, 2))
    parts = [as_mixture(x).components() for x in (p, q)]
    value, error = cubature_kl(*parts, rtol=1e-12, max_points=2**22)
    assert abs(float(stablekl.kl_estimate(p, q).value - value)) <= 1e-9
    assert float(error) <= 1e-11


def test_an_interval_does_not_depend_on_the_rest_of_the_batch():
    """Five components, of which a row has groups, one a line, and one must be sampled."""
    generator = torch.Generator().manual_seed(4)
    loc = 2 * torch.randn(3, 5, 6, generator=generator, dtype=F64)
    loc[0] += 1e3 * torch.tensor([0, 0, 1, 1, 2], dtype=F64).unsqueeze(-1)
    loc[1, :, 1:] = 0.0
    weights = torch.softmax(torch.randn(3, 5, generator=generator, dtype=F64), -1)
    scale = torch.ones(3, 5, 6, dtype=F64)
    scale[2] = torch.exp(0.3 * torch.randn(5, 6, generator=generator, dtype=F64))
    q = stablekl.MultivariateNormal(torch.zeros(6, dtype=F64), scale_diag=torch.full((6,), 3.0, dtype=F64))
    two = stablekl.GaussianMixture(probs=weights[2, :3], loc=loc[2, :3], scale_diag=scale[2, :3])

    def of(rows):
        return stablekl.GaussianMixture(probs=weights[rows], loc=loc[rows], scale_diag=scale[rows])

    for function in (
        lambda p: stablekl.kl_estimate(p, q),
        lambda p: stablekl.kl_estimate(p, two),
        lambda p: stablekl.jensen_shannon_estimate(p, q),
        stablekl.entropy_estimate,
    ):
        together = function(of(slice(None)))
        for i in range(3):
            alone = function(of(slice(i, i + 1)))
            for a, b in zip(alone[:4], together[:4], strict=True):
                torch.testing.assert_close(a[0], b[i], rtol=1e-6, atol=1e-12)
    assert stablekl.kl_estimate(of(slice(2, 3)), q).method == "sobol"


@pytest.mark.parametrize("which", [0, 1])
def test_a_batch_of_nothing_can_be_differentiated(which):
    leaf = torch.zeros(0, 3, 4, dtype=F64, requires_grad=True)
    locs = [torch.zeros(0, 3, 4, dtype=F64), torch.zeros(0, 3, 4, dtype=F64)]
    locs[which] = leaf
    p, q = (
        stablekl.GaussianMixture(probs=torch.ones(0, 3, dtype=F64), loc=x, scale_diag=torch.ones(0, 3, 4, dtype=F64))
        for x in locs
    )
    assert torch.autograd.grad(torch.distributions.kl_divergence(p, q).sum(), leaf)[0].shape == (0, 3, 4)
