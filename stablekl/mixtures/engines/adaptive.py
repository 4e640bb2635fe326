"""Sobol points, doubled row by row until the error is small enough.

Each row (batch element) gets the points that it needs and no more, so that its value does not depend on what else is
in the batch. Rows are taken in chunks of bounded memory, forward and backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..._autograd import is_dual, is_eager
from ..components import Components
from ..weights import label_entropy
from .cross import sobol_cross
from .sobol import sobol_information, sobol_kl

__all__ = ["FIRST_BUDGET", "adaptive_cross", "adaptive_information", "adaptive_kl"]

REPLICATES = 16
FIRST_POINTS = 256  # per component and replicate; doubled from here
FIRST_BUDGET = REPLICATES * FIRST_POINTS
# The error is forecast to fall like the number of points to this power: a little faster than observed (0.7).
RATE = 0.8
FIXED_POINTS = 512  # where the data may not be looked at
# Points x (dimensions + components) of one chunk of rows, and of one that is recorded for the backward. Measured on a
# CPU: the fastest of 2**18 ... 2**24, and the memory is theirs; another device needs more to be busy.
CHUNK, RECORDED_CHUNK, DEVICE_FACTOR = 2**20, 2**21, 16

Engine = Callable[..., tuple[Tensor, Tensor]]


def adaptive_information(p: Components, atol: Tensor, max_points: int) -> tuple[Tensor, Tensor]:
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
    return _adaptive(engine, tuple(p), p.log_weights.shape[:-1], lambda value: goal, max_points)


def adaptive_kl(p: Components, q: Components, rtol: float, max_points: int) -> tuple[Tensor, Tensor]:
    """KL divergence of two mixtures of one batch shape, and the half-width of a 95 % interval."""

    def engine(tensors: Sequence[Tensor], n: int) -> tuple[Tensor, Tensor]:
        p, q = Components(*tensors[:3]), Components(*tensors[3:])
        return sobol_kl(p, q, num_points=n, num_replicates=REPLICATES)

    if not is_eager(*p, *q):
        return _fixed(engine, (*p, *q), max_points)
    return _adaptive(engine, (*p, *q), p.log_weights.shape[:-1], lambda value: rtol * (1 + value), max_points)


def adaptive_cross(p: Components, q: Components, rtol: float, max_points: int) -> tuple[Tensor, Tensor]:
    """``sum_k w_k KL(p_k || q)``, and the half-width of a 95 % interval; eager mode only."""

    def engine(tensors: Sequence[Tensor], n: int) -> tuple[Tensor, Tensor]:
        p, q = Components(*tensors[:3]), Components(*tensors[3:])
        return sobol_cross(p, q, num_points=n, num_replicates=REPLICATES)

    spread = label_entropy(p.log_weights).detach().reshape(-1)
    return _adaptive(
        engine, (*p, *q), p.log_weights.shape[:-1], lambda value: rtol * (1 + (value - spread).clamp(min=0)), max_points
    )


def _fixed(engine: Engine, tensors: Sequence[Tensor], max_points: int) -> tuple[Tensor, Tensor]:
    return engine(tensors, min(FIXED_POINTS, _most(max_points)))


def _most(max_points: int) -> int:
    return int(2 ** int(math.log2(max(max_points // REPLICATES, 1))))


def _adaptive(
    engine: Engine,
    tensors: Sequence[Tensor],
    batch: torch.Size,
    goal: Callable[[Tensor], Tensor],
    max_points: int,
) -> tuple[Tensor, Tensor]:
    rows = math.prod(batch)
    flat = [t.reshape(rows, *t.shape[len(batch) :]) for t in tensors]
    frozen = [t.detach() for t in flat]
    first, most = FIRST_POINTS, _most(max_points)
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
    return value.reshape(batch), error.reshape(batch)


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
