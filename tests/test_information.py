"""The problem taken apart: groups, projections, engines, and what must not depend on the rest of the batch."""

from __future__ import annotations

import math

import pytest
import torch

import stablekl
from stablekl.mixtures import information
from stablekl.mixtures.components import Components
from stablekl.mixtures.engines.cubature import cubature_information
from stablekl.mixtures.engines.spectral import label_information
from stablekl.mixtures.engines.triple import triple_information
from stablekl.mixtures.information import ENGINES, least_exact, mixture_information
from stablekl.mixtures.select import slack_for

from .mixture_references import F64, lines

OFF = -math.inf


def mixture(k, dim, seed, spread=1.0, *, full=True):
    """Random components, unit scales and unlike shapes."""
    g = torch.Generator().manual_seed(seed)
    loc = spread * torch.randn(k, dim, generator=g, dtype=F64)
    root = torch.randn(k, dim, dim, generator=g, dtype=F64)
    factor = torch.linalg.cholesky(root @ root.mT / dim + 0.5 * torch.eye(dim, dtype=F64))
    weights = torch.log_softmax(torch.randn(k, generator=g, dtype=F64), -1)
    return Components(weights, loc, factor if full else factor.diagonal(dim1=-2, dim2=-1).contiguous())


def seen(k, dim, rank, seed, *, shared=False):
    """Components that differ in ``rank`` directions, seen through a map, and the same in these directions alone."""
    g = torch.Generator().manual_seed(seed)
    small = mixture(k, max(rank, 1), seed, 1.5)
    small = small._replace(loc=small.loc if rank else 0 * small.loc)
    if shared or not rank:
        small = small._replace(scale=small.scale[:1].expand_as(small.scale).clone())
    rank = max(rank, 1)
    a = torch.linalg.qr(torch.randn(dim, dim, generator=g, dtype=F64))[0] * torch.linspace(0.5, 2, dim, dtype=F64)
    inner = torch.eye(dim, dtype=F64).repeat(k, 1, 1)
    inner[:, :rank, :rank] = small.scale @ small.scale.mT
    cov = a @ inner @ a.mT
    return Components(small.log_weights, small.loc @ a[:, :rank].mT, torch.linalg.cholesky((cov + cov.mT) / 2)), small


def evaluate(p, atol=1e-4, points=2**13):
    goal = torch.full(p.log_weights.shape[:-1], atol, dtype=F64)
    return mixture_information(p, goal, points)


def permuted(p, order):
    return Components(*(x[order] for x in p))


def stack(rows):
    return Components(*(torch.stack(x) for x in zip(*rows, strict=True)))


def rows():
    """Six components in four dimensions: every structure there is."""
    free = mixture(6, 4, 20, 1.5)
    apart, dead, near = (Components(*(x.clone() for x in free)) for _ in range(3))
    apart.loc[2:4] += 200
    apart.loc[4:] += 500
    dead.log_weights[[0, 3]] = OFF
    alone = free._replace(log_weights=torch.full((6,), OFF, dtype=F64).index_fill(0, torch.tensor([2]), 0.0))
    near.loc[1], near.scale[1] = near.loc[0] + 1e-9, near.scale[0]
    near.loc[3], near.scale[3] = near.loc[2], near.scale[2]
    dead = dead._replace(log_weights=torch.log_softmax(dead.log_weights, -1))
    return {
        "rank 0": seen(6, 4, 0, 10)[0],
        "rank 1": seen(6, 4, 1, 11)[0],
        "rank 2": seen(6, 4, 2, 12)[0],
        "rank 2, shared": seen(6, 4, 2, 13, shared=True)[0],
        "all directions": free,
        "three pairs": apart,
        "two are off": dead,
        "all but one are off": alone,
        "near-duplicates": near,
    }


# ------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(("size", "count"), [(2, 8), (3, 4)])
def test_separated_groups_are_as_exact_as_one(size, count, full):
    parts = [mixture(size, 8, i, 0.7, full=full) for i in range(count)]
    outer = torch.softmax(torch.randn(count, generator=torch.Generator().manual_seed(9), dtype=F64), -1)
    whole = Components(
        torch.cat([p.log_weights + w.log() for p, w in zip(parts, outer, strict=True)]),
        torch.cat([p.loc + 100.0 * i for i, p in enumerate(parts)]),
        torch.cat([p.scale for p in parts]),
    )
    engine = label_information if size == 2 else lambda p: triple_information(p)[0]
    truth = float(sum(w * (engine(p) - w.log()) for p, w in zip(parts, outer, strict=True)))
    found = evaluate(whole)
    assert found.method == ("spectral" if size == 2 else "triple")
    assert abs(float(found.value) - truth) <= 1e-14
    assert float(found.error) <= 1e-13
    shuffled = torch.randperm(size * count, generator=torch.Generator().manual_seed(1))
    assert abs(float(evaluate(permuted(whole, shuffled)).value - found.value)) <= 1e-15


def test_groups_that_are_cut_too_early_are_noticed(monkeypatch):
    """Must fail: components apart by a Chernoff coefficient of 1e-3 treated as separate."""
    p = mixture(4, 3, 1, 3.0)
    exact = evaluate(p, 1e-6)
    monkeypatch.setattr(information, "SEPARATE", 0.05)
    cut = evaluate(p, 1e-6)
    assert abs(float(cut.value - exact.value)) > 1e-6
    assert abs(float(cut.value - exact.value)) <= float(cut.error)  # and the error says so


def test_pairs_on_a_line_against_the_definition():
    """Three pairs, five deviations apart, and KL to a wide Gaussian in extended precision."""
    table = torch.tensor([[w, m + 10 * i, s] for i in range(3) for w, m, s in ((1e-3, 0.0, 1.0), (0.3, 2.0, 0.7))])
    table = table.to(F64)
    table[:, 0] /= table[:, 0].sum()
    p = Components(table[:, 0].log(), table[:, 1:2], table[:, 2:])
    q = torch.tensor([[1.0, 10.0, 12.0]], dtype=F64)
    kl = float(lines(table[None].numpy(), q[None].numpy(), 40)[0])
    variance = table[:, 2] ** 2 + (table[:, 1] - 10) ** 2
    mean = (table[:, 0] * (math.log(12) - table[:, 2].log() + variance / 288 - 0.5)).sum()
    assert abs(float(mean - evaluate(p).value) - kl) <= 1e-13


# ------------------------------------------------------------------------------------- structure and batches


@pytest.mark.parametrize("name", rows())
def test_the_order_of_the_components_is_irrelevant(name):
    p = rows()[name]
    found, other = evaluate(p), evaluate(permuted(p, torch.tensor([4, 2, 0, 5, 3, 1])))
    assert found.method == other.method
    assert abs(float(found.value - other.value)) <= (1e-9 if found.method == "cubature" else 5e-15)


def test_a_row_does_not_depend_on_the_rest_of_the_batch():
    each = rows()
    whole = evaluate(stack(list(each.values())))
    for i, p in enumerate(each.values()):
        alone = evaluate(p)
        assert abs(float(whole.value[i] - alone.value)) <= (1e-15 if alone.method == "sobol" else 0)
        assert float(whole.error[i]) == pytest.approx(float(alone.error), rel=1e-12)
    assert whole.method == "sobol"  # the least exact


@pytest.mark.parametrize(
    ("rank", "shared", "method", "bar"),
    [
        (0, False, "closed form", 0),
        (1, False, "line", 1e-14),
        (2, True, "cubature", 1e-12),
        (2, False, "cubature", 1e-9),
    ],
)
def test_few_directions(rank, shared, method, bar):
    p, small = seen(5, 6, rank, 30 + rank, shared=shared)
    found = evaluate(p)
    truth = torch.zeros((), dtype=F64)
    if rank == 1:
        table = torch.stack([small.log_weights.exp(), small.loc[:, 0], small.scale[:, 0, 0]], -1)
        one = torch.stack([torch.ones(5, dtype=F64), table[:, 1], table[:, 2]], -1).unsqueeze(1)
        parts = lines(one.numpy(), table.expand(5, 5, 3).numpy(), 40)
        truth = (table[:, 0] * torch.from_numpy(parts.astype(float))).sum()
    elif rank == 2:
        truth = cubature_information(small, atol=1e-13, max_points=2**22)[0]
    assert found.method == method
    assert abs(float(found.value - truth)) <= bar
    assert float(found.error) <= 1.5 * bar


def test_duplicates_count_as_one():
    """Exact copies, and copies up to rounding, of the components of a pair."""
    pair = mixture(2, 5, 3)
    for step in (0.0, 1e-15, 1e-12):
        loc = torch.cat([pair.loc, pair.loc * (1 + step)])
        four = Components(torch.cat([pair.log_weights] * 2) - math.log(2), loc, torch.cat([pair.scale] * 2))
        found = evaluate(four, 1e-6, 2**16)
        assert abs(float(found.value - label_information(pair))) <= float(found.error) + 5e-13


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_dead_components(dim):
    """Off in some rows and on in others: the value of those that are left, no NaN, nothing for them in a gradient."""
    p = mixture(4, dim, 5, 1.5)
    weights = p.log_weights.expand(3, 4).clone()
    weights[0, 1], weights[1, [0, 2, 3]] = OFF, OFF
    leaves = [torch.log_softmax(weights, -1), *(x.expand(3, *x.shape).clone() for x in (p.loc, p.scale))]
    leaves = [x.requires_grad_() for x in leaves]
    found = evaluate(Components(*leaves))
    value = found.value.detach()
    kept = Components(*(x.detach()[0, [0, 2, 3]] for x in leaves))
    assert abs(float(value[0] - evaluate(kept).value)) <= 1e-15
    assert float(value[1]) == 0
    gradients = torch.autograd.grad(found.value.sum(), leaves)
    assert all(bool(g.isfinite().all()) for g in gradients)
    assert float(gradients[1][0, 1].abs().max()) == float(gradients[1][1].abs().max()) == 0


def test_a_backward_always_has_something_to_follow():
    """Components apart, or all the same: the information is constant in the means, and says so with zeros."""
    loc = torch.tensor([[0.0, 0.0], [1e3, 0.0], [0.0, 1e3]], dtype=F64)
    for means in (loc, 0 * loc):
        leaf = means.clone().requires_grad_()
        m = stablekl.GaussianMixture(probs=torch.ones(3, dtype=F64), loc=leaf, scale_diag=torch.ones_like(loc))
        (gradient,) = torch.autograd.grad(stablekl.mutual_information(m), leaf)
        assert torch.equal(gradient, torch.zeros_like(loc))


# ------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize(("k", "rank", "step", "bar"), [(3, 1, 1e-4, 1e-10), (4, 1, 1e-4, 1e-10), (4, 2, 1e-3, 1e-9)])
def test_gradients_of_projected_engines(k, rank, step, bar):
    """Against central differences of fourth order: of the engine itself, or of one that does not project."""
    p, _ = seen(k, 4, rank, 40 + rank)
    leaves = [x.clone().requires_grad_() for x in p]
    _, by_loc, by_scale = torch.autograd.grad(evaluate(Components(*leaves), 1e-9, 2**16).value, leaves)
    g = torch.Generator().manual_seed(2)
    # four components have to stay on the line or in the plane: elsewhere they are sampled
    along = p.loc.flip(0) - p.loc.roll(1, 0) if k == 4 else torch.randn(p.loc.shape, generator=g, dtype=F64)
    wider = 0.1 * p.scale if k == 4 else torch.randn(p.scale.shape, generator=g, dtype=F64).tril()

    def value(q):
        return float(evaluate(q, 1e-9, 2**16).value if k == 4 else triple_information(q)[0])

    def difference(move):
        return (8 * (value(move(step)) - value(move(-step))) - (value(move(2 * step)) - value(move(-2 * step)))) / (
            12 * step
        )

    by_difference = difference(lambda t: p._replace(loc=p.loc + t * along))
    assert abs(float((by_loc * along).sum()) - by_difference) <= bar
    if k == 3:  # a factor of four moves off the plane
        by_difference = difference(lambda t: p._replace(scale=p.scale + t * wider))
        assert abs(float((by_scale * wider).sum()) - by_difference) <= bar


def test_what_a_projection_costs_a_gradient():
    """Nearly on a line: off by less than the root of twice what may be left out, in the gradient only."""
    g = torch.Generator().manual_seed(0)
    loc = torch.tensor([0.0, 1.5, 3.0], dtype=F64).unsqueeze(-1) * torch.eye(4, dtype=F64)[0]
    loc = loc + 3e-8 * torch.randn(3, 4, generator=g, dtype=F64)
    leaf = loc.requires_grad_()
    p = Components(torch.full((3,), -math.log(3), dtype=F64), leaf, torch.eye(4, dtype=F64).expand(3, 4, 4))
    found, (exact, _) = evaluate(p), triple_information(p)
    assert found.method == "line"
    assert abs(float((found.value - exact).detach())) <= 1e-14
    miss = torch.autograd.grad(found.value, leaf)[0] - torch.autograd.grad(exact, leaf)[0]
    assert float(miss.abs().max()) <= math.sqrt(2 * slack_for(F64))


# ---------------------------------------------------------------------------------------------- transforms


@pytest.mark.parametrize(
    ("k", "dim", "method"), [(2, 3, "spectral"), (5, 1, "line"), (3, 3, "triple"), (5, 3, "sobol")]
)
def test_under_vmap_the_numbers_decide(k, dim, method):
    many = stack([mixture(k, dim, i) for i in range(3)])
    names = []

    def one(*p):
        found = mixture_information(Components(*p), torch.tensor(1e-4, dtype=F64), 2**13)
        names.append(found.method)
        return found.value

    value = torch.vmap(one)(*many)
    assert names == [method]
    plain = evaluate(many)
    assert float((value - plain.value).abs().max()) <= (1e-3 if method == "sobol" else 1e-14)
    gradient = torch.vmap(torch.func.grad(one, argnums=1))(*many)
    assert bool(gradient.isfinite().all())


def test_the_least_exact():
    assert least_exact("line", "spectral", "closed form") == "spectral"
    assert least_exact("contour", "sobol", "cubature") == "sobol"
    assert ENGINES[0] == "closed form"
