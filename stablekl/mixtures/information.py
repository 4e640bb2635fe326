r"""Information between a mixture's point and label: the problem taken apart, each part given to the engine it suits.

Components that do not overlap split the problem. With groups g of components, W_g their weights and I_g the
information within the mixture of a group,

.. math:: I(X; Z) = H(W) + \sum_g W_g I_g - \Delta, \qquad 0 \le \Delta \le \sum_{i, j} T_{ij},

the last sum over pairs of components from different groups, T_ij the pair's label entropy given the sample
(`spectral`), at most 2 log 2 sqrt(w_i w_j) times the Chernoff coefficient at 1/2. Groups are what pairs with a bound
above 1e-17 connect: a mixture of many separated pairs is as exact as each of the pairs.

=======================================  ==============================================================
a group of                               goes to
=======================================  ==============================================================
one                                      nothing: I_g = 0
two                                      `spectral`
any that differ along one direction      `line`, after `projection`
three                                    `triple`
any that differ along two or three       `cubature`, after `projection`
any other                                `sobol`: the error is estimated, and made as small as asked for
=======================================  ==============================================================

The data decide, for each row of a batch on its own, in eager mode only. Under vmap, torch.compile and CUDA graph
capture two components go to `spectral`, more in one dimension to `line`, three to `triple`, whose nodes do not depend
on the data, and any other to `sobol` with a fixed number of points.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._autograd import is_eager
from ..distributions.normal import normal_kl
from ..special import logsumexp
from .components import Components, chosen_components
from .engines.adaptive import adaptive_information
from .engines.cubature import cubature_information
from .engines.line import line_kl
from .engines.overlaps import component_pairs, overlaps
from .engines.projection import projected, subspace
from .engines.spectral import label_information
from .engines.triple import triple_information
from .weights import weighted

__all__ = [
    "CAUTION",
    "CERTAIN",
    "CUBATURE_ERROR",
    "ENGINES",
    "NODES_PER_POINT",
    "POINTS",
    "SPECTRAL_ERROR",
    "Information",
    "by_engine",
    "cubature_nodes",
    "cubature_tolerance",
    "gathered",
    "improved",
    "least_exact",
    "line_information",
    "mixture_information",
]

# On the pair's entropy: its sum over all pairs stays below the rounding errors of the rest.
SEPARATE = 1e-17
# Absolute error of the spectral integral, twice what was observed.
SPECTRAL_ERROR = 2e-15
# What `cubature` is asked for at most, in the plane and in space: it costs little more than 1e-4 does. In the plane, a
# covariance that all components share makes for 1e-12 at that cost.
PLANE, PLANE_SHARED, SPACE = 1e-9, 1e-13, 3e-7
# Measured on problems of known truth: the cubature's own estimate is up to 1.3 times too small where thousands of boxes
# are near their tolerance, and 1e-14 too small where there is nothing to refine.
CAUTION, CUBATURE_ERROR = 2.0, 1e-14
# Points that a cubature's nodes are counted by, where nothing else is said.
POINTS = 2**16
# Nodes of a cubature per point that may be sampled: a node takes a hundredth of a point's time.
NODES_PER_POINT = 128
# In space, for the information of so few components, so many times more: 16 of scales 1e3 apart need up to 4e7, and a
# node costs only as much as the components that matter there. Of many the first boxes are too many already.
SPACE_NODES, FEW = 6, 16
# Engines, the least exact last. (`contour` is for divergences only.)
ENGINES = ("closed form", "line", "spectral", "triple", "contour", "cubature", "sobol")
# Those whose error is a bound rather than an estimate. Not the contour: components with condition numbers of 1e7 are
# off by more than it claims.
CERTAIN = ENGINES[:4]


def least_exact(*methods: str) -> str:
    """The last of these in `ENGINES`."""
    return ENGINES[max([ENGINES.index(x) for x in methods])]  # torch.compile knows no max with a key


class Information(NamedTuple):
    """Mutual information of point and label.

    Attributes:
        value: in nats, of the batch shape; differentiable.
        error: bound on its error, or half-width of a 95 % interval where some of it was sampled.
        method: the least exact of the engines that took part, in any row.
        estimated: in which rows the error is, in part, an estimate; of the batch shape.
    """

    value: Tensor
    error: Tensor
    method: str
    estimated: Tensor

    def reshaped(self, batch: torch.Size) -> Information:
        """Rows as a batch."""
        value, error, estimated = (x.reshape(batch) for x in (self.value, self.error, self.estimated))
        return Information(value, error, self.method, estimated)


def by_engine(value: Tensor, error: Tensor, method: str) -> Information:
    """What one engine says of all rows."""
    return Information(value, error, method, torch.full_like(error, method not in CERTAIN, dtype=torch.bool))


def line_information(p: Components) -> tuple[Tensor, Tensor]:
    """``I = S - KL(p || q)`` in one dimension, q the normal of p's moments, and a bound on its error.

    I does not depend on q, a constant here. Of all q this one leaves the least to cancel; sum_k w_k KL(p_k || p), which
    leaves nothing, takes K integrals in place of one.
    """
    weights = torch.exp(p.log_weights)
    with torch.no_grad():
        first = p.loc[..., :1, :]
        mean = (weights.unsqueeze(-1) * (p.loc - first)).sum(-2, keepdim=True)
        spread = weights.unsqueeze(-1) * (p.scale.square() + (p.loc - first - mean).square())
        q = Components(torch.zeros_like(p.log_weights[..., :1]), first + mean, spread.sum(-2, keepdim=True).sqrt())
    apart = normal_kl(p.loc, p.scale, q.loc.expand_as(p.loc), q.scale.expand_as(p.scale)).squeeze(-1)
    mean_kl = weighted(p.log_weights, apart)
    value, error = line_kl(p, q)
    return mean_kl - value, error + 4 * torch.finfo(error.dtype).eps * (1 + mean_kl.detach())


def mixture_information(p: Components, atol: Tensor, max_points: int | None, slack: float = 1e-14) -> Information:
    """I(X; Z) of Gaussian mixtures, by whichever engines they suit.

    Args:
        p: the mixtures, float64.
        atol: the error asked of what must be sampled, of the batch shape.
        max_points: most points per component.
        slack: information that a `projection` may lose.
    """
    k = p.log_weights.shape[-1]
    if k == 1:
        zero = _zero(p)
        return by_engine(zero, zero.detach(), "closed form")
    if k == 2:
        return by_engine(label_information(p), torch.full_like(atol, SPECTRAL_ERROR), "spectral")
    if not is_eager(*p):
        name = "line" if p.loc.shape[-1] == 1 else "triple" if k == 3 else "sobol"
        return _evaluate(name, p, atol, max_points)
    batch = atol.shape
    rows = math.prod(batch)
    return _by_groups(p.flattened(), atol.reshape(rows), max_points, slack).reshaped(batch)


def _zero(p: Components) -> Tensor:
    """0, of the batch shape, with derivatives of 0 in means and scales.

    Nothing else depends on them where all components are apart, or the same; and whether a backward has anything to
    follow must not depend on the data.
    """
    return 0 * (p.loc[..., 0, 0] + p.scale.flatten(p.log_weights.ndim - 1)[..., 0])


class _Groups(NamedTuple):
    """Groups of one size: the row that each belongs to ``(tasks,)`` and its components ``(tasks, n)``."""

    row: Tensor
    members: Tensor


def _connected(p: Components) -> tuple[list[_Groups], Tensor]:
    """The groups of components that overlap, by their size; and a bound on what separating them costs."""
    k = p.log_weights.shape[-1]
    with torch.no_grad():
        lw = p.log_weights
        log_bound = overlaps(p, p).log_chernoff + 0.5 * (lw.unsqueeze(-1) + lw.unsqueeze(-2))
        bound = 2 * math.log(2) * log_bound.exp()
        linked = (bound > SEPARATE) | torch.eye(k, dtype=torch.bool, device=lw.device)
        reach = linked
        for _ in range(max(1, (k - 1).bit_length())):
            reach = (reach.double() @ reach.double()) > 0
        first, second = component_pairs(k, lw.device)
        lost = torch.where(reach, 0.0, bound)[:, first, second].sum(-1)
    leaders = reach.double().argmax(-1).tolist()  # the first component of each one's group
    by_size: dict[int, tuple[list[int], list[list[int]]]] = {}
    for row, leader in enumerate(leaders):
        for a in sorted(set(leader)):
            group = [i for i, b in enumerate(leader) if a == b]
            tasks = by_size.setdefault(len(group), ([], []))
            tasks[0].append(row)
            tasks[1].append(group)
    device = lw.device
    groups = [_Groups(torch.tensor(r, device=device), torch.tensor(g, device=device)) for r, g in by_size.values()]
    return groups, lost


def _by_groups(p: Components, atol: Tensor, max_points: int | None, slack: float) -> Information:
    k = p.log_weights.shape[-1]
    groups, error = _connected(p)
    value = _zero(p)
    estimated = torch.zeros_like(error, dtype=torch.bool)
    methods = {"closed form"}
    for row, index in groups:
        whole = index.shape[-1] == k
        part = _rows(p, row) if whole else chosen_components(_rows(p, row), index)
        log_weight = logsumexp(part.log_weights, -1)
        alive = log_weight > -torch.inf
        if not whole:  # how much is said by the group itself; the weights within it then sum to one
            safe = torch.where(alive, log_weight, 0.0)
            value = value.index_add(0, row, torch.where(alive, -safe * safe.exp(), 0.0))
            within = torch.where(alive.unsqueeze(-1), part.log_weights, 0.0) - safe.unsqueeze(-1)
            part = part._replace(log_weights=within)
        if index.shape[-1] == 1:
            continue
        goal = atol.index_select(0, row)
        inside = _group_information(part, goal, max_points, slack)
        weight = 1.0 if whole else log_weight.exp()
        value = value.index_add(0, row, weight * inside.value)
        error = error.index_add(0, row, (weight * inside.error).detach())
        estimated[row[inside.estimated]] = True
        methods.add(inside.method)
    return Information(value, error, least_exact(*methods), estimated)


def _rows(p: Components, row: Tensor) -> Components:
    return Components(*(x.index_select(0, row) for x in p))


def _group_information(p: Components, atol: Tensor, max_points: int | None, slack: float) -> Information:
    """That of tasks, ``(tasks, n)`` components, all of which overlap."""
    n, dim = p.loc.shape[-2:]
    if n == 2:
        return by_engine(label_information(p), torch.full_like(atol, SPECTRAL_ERROR), "spectral")
    if dim == 1:
        return _evaluate("line", p, atol, max_points)
    found = subspace(p, slack)
    rank = found.rank.tolist()
    results: list[tuple[Tensor, Information]] = []
    for r in sorted(set(rank)):
        index = torch.tensor([i for i, x in enumerate(rank) if x == r], device=p.loc.device)
        part, goal, loss = _rows(p, index), atol[index], found.loss[index].nan_to_num(posinf=0.0)
        if 0 < r < min(dim, 4):
            part = projected(part, found.basis[index, :r], found.origin[index])
        inside = _evaluate(_engine_for(n, r), part, goal, max_points)
        results.append((index, inside._replace(error=inside.error + loss)))
    return gathered(results)


def gathered(parts: list[tuple[Tensor, Information]]) -> Information:
    """One row after the other, from parts with the indices of theirs."""
    order = torch.cat([index for index, _ in parts]).argsort()
    columns = ([getattr(x, name) for _, x in parts] for name in ("value", "error", "estimated"))
    value, error, estimated = (torch.cat(x).index_select(0, order) for x in columns)
    return Information(value, error, least_exact(*{x.method for _, x in parts}), estimated)


def cubature_tolerance(p: Components) -> Tensor:
    """The error that a cubature of these mixtures, ``(rows, K)``, is asked for."""
    if p.loc.shape[-1] == 3:
        return torch.full_like(p.log_weights[:, 0].detach(), SPACE)
    scale = p.scale.detach().flatten(2)
    shared = ((scale - scale[:, :1]).abs() <= 1e-14 * scale.abs().amax((1, 2), keepdim=True)).all(-1).all(-1)
    # not of the numbers themselves, which would be of the default dtype: 0 in float16
    return torch.where(shared, torch.full_like(scale[:, 0, 0], PLANE_SHARED), PLANE)


def cubature_nodes(p: Components, max_points: int | None) -> int:
    """Most nodes of a cubature of the information, where so many points may be sampled."""
    k, dim = p.loc.shape[-2:]
    more = max(1.0, SPACE_NODES * min(1.0, FEW / k) ** 2) if dim == 3 else 1.0
    return int(NODES_PER_POINT * more * (max_points or POINTS))


def improved(found: Information, index: Tensor, other: Information) -> Information:
    """With the rows of ``index`` by another engine, where its error is smaller.

    Where the two exclude each other one has missed something: points that are few, most likely. The first stands, with
    their difference as its error.
    """
    gap = (other.value - found.value.index_select(0, index)).detach().abs()
    apart = gap > other.error + found.error[index]
    better = (other.error < found.error[index]) & ~apart
    value = torch.where(better, other.value, found.value.index_select(0, index))
    error = torch.where(better, other.error, torch.where(apart, gap, found.error[index]))
    estimated = torch.where(better, other.estimated, found.estimated[index] | apart)
    return Information(
        found.value.index_copy(0, index, value),
        found.error.index_copy(0, index, error),
        least_exact(found.method, other.method) if bool(better.any()) else found.method,
        found.estimated.index_copy(0, index, estimated),
    )


def _engine_for(n: int, rank: int) -> str:
    """The engine for n >= 3 components that differ in a subspace of this dimension, four standing for more."""
    if rank <= 1:
        return ("closed form", "line")[rank]
    if n == 3:
        return "triple"
    return "cubature" if rank <= 3 else "sobol"


def _evaluate(name: str, p: Components, atol: Tensor, max_points: int | None) -> Information:
    """By this engine; or another where that did not suffice."""
    if name == "line":
        return by_engine(*line_information(p._replace(scale=p.scale if p.is_diagonal else p.scale.squeeze(-1))), name)
    if name == "triple":
        return by_engine(*triple_information(p), name)
    if name == "cubature":
        goal = torch.minimum(atol, cubature_tolerance(p))
        value, error = cubature_information(p, atol=goal, max_points=cubature_nodes(p, max_points))
        found = by_engine(value, CAUTION * error + CUBATURE_ERROR, name)
        missed = (found.error > atol).nonzero().squeeze(-1)
        if not missed.numel():
            return found
        return improved(found, missed, _evaluate("sobol", _rows(p, missed), atol[missed], max_points))
    if name == "sobol":
        return by_engine(*adaptive_information(p, atol, max_points), name)
    return by_engine(_zero(p), torch.zeros_like(atol), name)  # components that are all the same
