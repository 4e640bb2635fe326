"""Distances to the k-th nearest neighbour, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["kth_distances"]

# Distances in memory at a time.
CHUNK = 2**22


def kth_distances(points: Tensor, others: Tensor, k: int, tick: Callable[[int], None]) -> Tensor:
    """Euclidean distance from each point to the k-th nearest of the others, ``(n,)``.

    Of differences, not of inner products, whose cancellation leaves 1e-8 of the norms and makes neighbours of it. On a
    line the others are sorted and 2k of them looked at; elsewhere all are.

    Args:
        points: float64, ``(n, D)``.
        others: float64, ``(m, D)``, m >= k.
        k: counted from 1.
        tick: told of the points that are done.
    """
    find = _on_a_line if points.shape[-1] == 1 else _anywhere
    prepared = others.squeeze(-1).sort().values if points.shape[-1] == 1 else others
    rows = max(1, CHUNK // (2 * k if points.shape[-1] == 1 else len(others)))
    found = []
    for start in range(0, len(points), rows):
        found.append(find(points[start : start + rows], prepared, k))
        tick(len(found[-1]))
    return torch.cat(found)


def _anywhere(points: Tensor, others: Tensor, k: int) -> Tensor:
    distances = torch.cdist(points, others, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.topk(k, dim=-1, largest=False).values[:, -1]


def _on_a_line(points: Tensor, ordered: Tensor, k: int) -> Tensor:
    """The k nearest are among the k below and the k from there on."""
    place = torch.searchsorted(ordered, points.squeeze(-1).contiguous()).unsqueeze(-1)
    index = place + torch.arange(-k, k, device=points.device)
    inside = (index >= 0) & (index < len(ordered))
    distances = (points - ordered[index.clamp(0, len(ordered) - 1)]).abs()
    distances = torch.where(inside, distances, torch.inf)
    return distances.topk(k, dim=-1, largest=False).values[:, -1]
