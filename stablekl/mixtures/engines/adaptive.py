"""Sobol points, doubled row by row until the error is small enough.

Each row (batch element) gets the points that it needs and no more, so that its value does not depend on what else is
in the batch; of a cross term, each component of p. Rows are taken in chunks of bounded memory, forward and backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..._autograd import is_dual, is_eager
from ..components import Components
from ..weights import label_entropy
from .cross import Replicates, Triples, nearest_triples, replicated_cross
from .sobol import sobol_information, sobol_kl

__all__ = ["FIRST_BUDGET", "adaptive_cross", "adaptive_information", "adaptive_kl", "cross_tasks"]

REPLICATES = 16
FIRST_POINTS = 256  # per component and replicate; doubled from here
FIRST_BUDGET = REPLICATES * FIRST_POINTS
# The error is forecast to fall like the number of points to this power: a little faster than observed (0.7).
RATE = 0.8
# Points in all for a row, and the least and most for each of its components, where nothing else is said.
SHARED, LEAST, MOST = 2**20, 2**16, 2**18
# Where the first points of a cross term miss the tolerance by less than this, triples cost more than points.
MANY = 3.0
FIXED_POINTS = 512  # where the data may not be looked at
# Points x (dimensions + components) of one chunk of rows, and of one that is recorded for the backward. Measured on a
# CPU: the fastest of 2**18 ... 2**24, and the memory is theirs; another device needs more to be busy.
CHUNK, RECORDED_CHUNK, DEVICE_FACTOR = 2**20, 2**21, 16

Engine = Callable[..., tuple[Tensor, Tensor]]


def adaptive_information(p: Components, atol: Tensor, max_points: int | None) -> tuple[Tensor, Tensor]:
    """Information I between point and label of ``p``, to an error of ``atol``.

    Args:
        p: the mixture.
        atol: tolerance, of p's batch shape.
        max_points: most points per component.

    Returns:
        I, differentiable, and the half-width of a 95 % interval, both of p's batch shape.
    """

    def engine(tensors: Sequence[Tensor], n: int) -> tuple[Tensor, Tensor]:
        return sobol_information(Components(*tensors), num_points=n, num_replicates=REPLICATES)

    if not is_eager(*p, atol):
        return _fixed(engine, tuple(p), max_points)
    goal = atol.detach().reshape(-1)
    return _adaptive(
        engine, tuple(p), p.log_weights.shape[:-1], lambda value: goal, max_points, p.log_weights.shape[-1]
    )


def adaptive_kl(p: Components, q: Components, rtol: float, max_points: int | None) -> tuple[Tensor, Tensor]:
    """KL divergence of two mixtures of one batch shape, and the half-width of a 95 % interval."""

    def engine(tensors: Sequence[Tensor], n: int) -> tuple[Tensor, Tensor]:
        p, q = Components(*tensors[:3]), Components(*tensors[3:])
        return sobol_kl(p, q, num_points=n, num_replicates=REPLICATES)

    if not is_eager(*p, *q):
        return _fixed(engine, (*p, *q), max_points)
    return _adaptive(
        engine,
        (*p, *q),
        p.log_weights.shape[:-1],
        lambda value: rtol * (1 + value),
        max_points,
        p.log_weights.shape[-1],
    )


class CrossTasks(NamedTuple):
    """Each component of p against q, a row of its own, ``(rows * K_p,)``, with what the first points say.

    Attributes:
        p: one component each, of weight 1.
        q: K_q components each.
        log_weights: of the components in p, ``(rows, K_p)``.
        error: of ``sum_k w_k KL(p_k || q)`` after the first points, ``(rows,)``.
        relative: the same relative to 1 + KL.
        share: what part of it each component makes, ``(rows, K_p)``; squares add up to 1.
    """

    p: Components
    q: Components
    log_weights: Tensor
    error: Tensor
    relative: Tensor
    share: Tensor

    def rows(self, index: Tensor) -> CrossTasks:
        """Those of some rows only."""
        k = self.log_weights.shape[-1]
        tasks = (index.unsqueeze(-1) * k + torch.arange(k, device=index.device)).flatten()
        p, q = (Components(*(x.index_select(0, tasks) for x in c)) for c in self[:2])
        return CrossTasks(p, q, *(x.index_select(0, index) for x in self[2:]))


def _columns(found: Replicates) -> Tensor:
    """Rows of one component each: means, plain means, and what was missed."""
    return torch.cat([x.reshape(-1, x.shape[-2]).mT for x in found], -1)


def _rejoined(columns: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over k, and its error, from the columns of its tasks."""
    shaped = columns.reshape(*log_weights.shape, -1).movedim(-1, 0)
    return Replicates(shaped[:REPLICATES], shaped[REPLICATES:-1].detach(), shaped[-1].detach()).total(log_weights)


def _asked(value: Tensor, log_weights: Tensor) -> Tensor:
    """1 + KL, or 1 plus what it is at least, given the cross term."""
    return 1 + (value - label_entropy(log_weights)).clamp(min=0)


def cross_tasks(p: Components, q: Components) -> CrossTasks:
    """Of mixtures of one batch dimension; eager mode only."""
    rows, k = p.log_weights.shape
    one = Components(torch.zeros_like(p.log_weights).reshape(-1, 1), *(x.flatten(0, 1).unsqueeze(1) for x in p[1:]))
    every = Components(*(x.unsqueeze(1).expand(rows, k, *x.shape[1:]).flatten(0, 1) for x in q))
    with torch.no_grad():
        still = Components(*(x.detach() for x in p)), Components(*(x.detach() for x in q))
        log_weights = still[0].log_weights
        parts = []
        size = max(1, CHUNK // (FIRST_BUDGET * (p.loc.shape[-1] + max(k, q.log_weights.shape[-1]))))
        for index in torch.arange(rows, device=p.loc.device).split(size):
            here_p, here_q = (Components(*(x[index] for x in c)) for c in still)
            parts.append(replicated_cross(here_p, here_q, num_points=FIRST_POINTS, num_replicates=REPLICATES))
        found = Replicates(*(torch.cat(x, -2) for x in zip(*parts, strict=True)))
        value, error = found.total(log_weights)
        each = torch.exp(log_weights) * (found.means.std(0) + found.missed)
        share = (each / each.sum(-1, keepdim=True).clamp(min=torch.finfo(each.dtype).tiny)).sqrt()
    return CrossTasks(one, every, p.log_weights, error, error / _asked(value, log_weights), share)


def adaptive_cross(tasks: CrossTasks, rtol: float, max_points: int | None) -> tuple[Tensor, Tensor]:
    """``sum_k w_k KL(p_k || q)``, and the half-width of a 95 % interval; eager mode only.

    Each component gets the points that it needs: often it is one that all of the error comes from.
    """
    p, q, log_weights = tasks[:3]
    still = log_weights.detach()

    def goal(columns: Tensor) -> Tensor:
        """Errors of the components, independent as they are, add up to that of the sum."""
        asked = rtol * _asked(_rejoined(columns, still)[0], still)
        return (asked.unsqueeze(-1) * tasks.share / torch.exp(still).clamp(min=1e-300)).reshape(-1)

    def engine(tensors: Sequence[Tensor], n: int) -> tuple[Tensor, Tensor]:
        triples = Triples(*tensors[6:]) if len(tensors) > 6 else None
        here = Components(*tensors[:3]), Components(*tensors[3:6])
        found = replicated_cross(*here, triples, num_points=n, num_replicates=REPLICATES)
        return _columns(found), found.total(here[0].log_weights)[1]

    tensors: tuple[Tensor, ...] = (*p, *q)
    if q.log_weights.shape[-1] > 3:
        hard = (tasks.relative > MANY * rtol).unsqueeze(-1) & (tasks.share > 0.1)
        if bool(hard.any()):
            tensors = (*tensors, *nearest_triples(p, q, rtol, hard.flatten()))
    columns, _ = _adaptive(
        engine, tensors, torch.Size(p.log_weights.shape[:1]), goal, max_points, log_weights.shape[-1]
    )
    return _rejoined(columns, log_weights)


def _fixed(engine: Engine, tensors: Sequence[Tensor], max_points: int | None) -> tuple[Tensor, Tensor]:
    return engine(tensors, min(FIXED_POINTS, _most(max_points, 1)))


def _most(max_points: int | None, components: int) -> int:
    """Points per component and replicate, a power of two."""
    if max_points is None:
        max_points = min(max(SHARED // components, LEAST), MOST)
    return int(2 ** int(math.log2(max(max_points // REPLICATES, 1))))


def _adaptive(
    engine: Engine,
    tensors: Sequence[Tensor],
    batch: torch.Size,
    goal: Callable[[Tensor], Tensor],
    max_points: int | None,
    components: int,
) -> tuple[Tensor, Tensor]:
    rows = math.prod(batch)
    flat = [t.reshape(rows, *t.shape[len(batch) :]) for t in tensors]
    frozen = [t.detach() for t in flat]
    first, most = FIRST_POINTS, _most(max_points, components)
    first = min(first, most)
    every = torch.arange(rows, device=flat[0].device)
    passes: list[tuple[int, Tensor]] = []  # the points, and the rows that they are enough for
    with torch.no_grad():
        value, error = _chunked(engine, frozen, every, first)
        waiting = {first: every}
        while waiting:
            n = min(waiting)
            index = waiting.pop(n)
            if n > first:
                part, part_error = _chunked(engine, frozen, index, n)
                value, error = value.index_copy(0, index, part), error.index_copy(0, index, part_error)
            excess = error.index_select(0, index) / goal(value).index_select(0, index)
            done = ~(excess > 1) if n < most else torch.ones_like(excess, dtype=torch.bool)
            passes.append((n, index[done]))
            for row, doublings in zip(index[~done].tolist(), _doublings(excess[~done]), strict=True):
                after = min(n << doublings, most)
                waiting[after] = torch.cat([waiting.get(after, index[:0]), index.new_tensor([row])])
    if _differentiated(tensors):
        passes = [(n, index) for n, index in passes if index.numel()]
        parts = [_chunked(engine, flat, index, n)[0] for n, index in passes]
        order = torch.cat([index for _, index in passes]).argsort() if passes else every
        value = torch.cat(parts).index_select(0, order) if parts else value
    return value.reshape(batch + value.shape[1:]), error.reshape(batch)


def _doublings(excess: Tensor) -> list[int]:
    """How often to double the points before it is worth looking again: at least once."""
    return (excess.log2() / RATE).clamp(1, 40).floor().nan_to_num(1.0).int().tolist()


def _differentiated(tensors: Sequence[Tensor]) -> bool:
    """Whether somebody wants a derivative, backward or forward."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return True
    return is_dual(tensors)


def _chunked(engine: Engine, flat: Sequence[Tensor], index: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The engine on the rows of ``index``, in chunks; in the backward each chunk is computed once more."""
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in flat)
    k, d = flat[1].shape[-2:]
    k = max([k, *(t.shape[-1] for t in flat[3:4])])
    points = REPLICATES * n * (k * (d + k) if recorded else d + k)
    elements = RECORDED_CHUNK if recorded else CHUNK
    size = max(1, elements * (1 if index.device.type == "cpu" else DEVICE_FACTOR) // points)
    chunks = [index] if index.numel() <= size else list(index.split(size))
    results = []
    for rows in chunks:
        chunk = [t.index_select(0, rows) for t in flat]
        if recorded and len(chunks) > 1:
            results.append(checkpoint(engine, chunk, n, use_reentrant=False, preserve_rng_state=False))
        else:
            results.append(engine(chunk, n))
    value, error = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*results, strict=True))
    return value, error
