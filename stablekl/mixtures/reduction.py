r"""Fewer components by merging: greedy, by Runnalls' bound on the KL divergence that a merge costs.

A merge replaces components i and j by the Gaussian m with their mean and covariance. Its cost,

.. math:: B(i, j) = \tfrac12 [(w_i + w_j) \log\det S_m - w_i \log\det S_i - w_j \log\det S_j]
                  = w_i KL(p_i \| m) + w_j KL(p_j \| m),

is evaluated as the second form, a sum of non-negative terms; the first subtracts log-determinants, which leaves noise
of either sign for components that are near each other, the very ones to merge (A. R. Runnalls, Kullback-Leibler
approach to Gaussian mixture reduction, IEEE Transactions on Aerospace and Electronic Systems 43, 2007).

**The bound.** By the log-sum inequality, the divergence of a mixture from another to whose components :math:`r_c` its
own are assigned, :math:`p_k` to :math:`r_{c(k)}`, with weights that add up, is at most
:math:`\sum_k w_k KL(p_k \| r_{c(k)})`. Where each :math:`r_c` matches the moments of its cluster, traces and squared
distances add up to D times its weight, and the sum is one of log-determinants alone; so is that of the costs B of the
merges, which telescopes. The two are equal, and the first is returned: it is made of the given components and
the result, whatever happened to be rounded in between.

Greedy merges are not the best ones. Pairs are compared for all of the batch at once; the loop is over merges only.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributions._base import widened
from ..distributions._gaussian import Gaussian, gaussian_kl
from ..special import logsumexp
from .algebra import matched
from .components import gaussian_components

__all__ = ["Merged", "merged"]

# Numbers in one stack of matrices when all pairs are compared: about ten such stacks, of 4 MiB each, live at a time.
_BLOCK = 2**19


class Merged(NamedTuple):
    """What is left after the merges.

    Attributes:
        log_weights: normalised, shape ``(..., K')``.
        gaussian: of batch shape ``(..., K')``.
        bound: on the KL divergence of the mixture from this one, in nats, shape ``(...)``.
    """

    log_weights: Tensor
    gaussian: Gaussian
    bound: Tensor


class _State(NamedTuple):
    """Components (B, K), of which the dead ones have been merged into others."""

    log_weights: Tensor
    loc: Tensor
    tril: Tensor

    def detach(self) -> _State:
        """Without history: what decides between pairs has no derivative."""
        return _State(*(x.detach() for x in self))


def _merge(first: _State, second: _State) -> _State:
    """Pairs merged; where one of the two has no weight, the other as it is."""
    log_weights = torch.stack((first.log_weights, second.log_weights), -1)
    total = logsumexp(log_weights, -1)
    empty = (total == -torch.inf).unsqueeze(-1)
    relative = torch.where(empty, 0.0, log_weights) - torch.where(empty, 0.0, total.unsqueeze(-1))
    loc, tril = torch.stack((first.loc, second.loc), -2), torch.stack((first.tril, second.tril), -3)
    # A pair without weights: equal shares, which are then not used.
    relative = torch.where(empty, -math.log(2), relative)
    both = matched(relative, Gaussian("scale_tril", loc, tril))
    keep_first = (second.log_weights == -torch.inf)[..., None]
    keep_second = ((first.log_weights == -torch.inf) & ~keep_first[..., 0])[..., None]
    loc = torch.where(keep_first, first.loc, torch.where(keep_second, second.loc, both.loc))
    keep_first, keep_second = keep_first.unsqueeze(-1), keep_second.unsqueeze(-1)
    tril = torch.where(keep_first, first.tril, torch.where(keep_second, second.tril, both.scale))
    return _State(total, loc, tril)


def _weighted_kl(state: _State, target: _State) -> Tensor:
    """The weight times KL(component || target), 0 for a weight of 0."""
    kl = gaussian_kl(Gaussian("scale_tril", state.loc, state.tril), Gaussian("scale_tril", target.loc, target.tril))
    w = state.log_weights.exp()
    return torch.where(w > 0, w * torch.where(w > 0, kl, 0.0), 0.0)


def _costs(first: _State, second: _State) -> Tensor:
    """Runnalls' B of pairs, of the broadcast batch shape."""
    batch = torch.broadcast_shapes(first.log_weights.shape, second.log_weights.shape)
    first, second = (_State(*(x.expand(batch + x.shape[s.log_weights.ndim :]) for x in s)) for s in (first, second))
    target = _merge(first, second)
    return _weighted_kl(first, target) + _weighted_kl(second, target)


def _at(state: _State, index: Tensor) -> _State:
    """The components ``index`` (B, n) of each mixture."""
    d = state.loc.shape[-1]
    return _State(
        state.log_weights.gather(1, index),
        state.loc.gather(1, index[..., None].expand(*index.shape, d)),
        state.tril.gather(1, index[..., None, None].expand(*index.shape, d, d)),
    )


def _all_costs(state: _State) -> Tensor:
    """B(i, j) for all pairs, (B, K, K), +inf but for i < j."""
    batch, k, d = state.loc.shape
    i, j = torch.triu_indices(k, k, 1, device=state.loc.device).unbind(0)
    size = max(1, _BLOCK // max(1, batch * d * d))
    blocks = [
        _costs(_State(*(x.index_select(1, a) for x in state)), _State(*(x.index_select(1, b) for x in state)))
        for a, b in zip(i.split(size), j.split(size), strict=True)
    ]
    table = state.loc.new_full((batch, k * k), torch.inf)
    return table.index_copy(1, i * k + j, torch.cat(blocks, 1)).view(batch, k, k)


def _merges(state: _State, count: int) -> tuple[_State, Tensor]:
    """After the cheapest merges: components, and for each that there was the one that it went into, (B, K).

    A cluster stands at the place of its first component.
    """
    batch, k = state.log_weights.shape
    index = torch.arange(k, device=state.loc.device)
    cluster = index.expand(batch, k)
    table = _all_costs(state.detach())
    for _ in range(count):
        flat = table.flatten(1).argmin(1, keepdim=True)
        i, j = flat // k, flat % k
        new = _merge(_at(state, i), _at(state, j))
        cluster = torch.where(cluster == j, i, cluster)
        here = index == i
        state = _State(
            torch.where(here, new.log_weights, state.log_weights),
            torch.where(here[..., None], new.loc, state.loc),
            torch.where(here[..., None, None], new.tril, state.tril),
        )
        costs = _costs(new.detach(), state.detach())
        row, column = here[:, :, None] & (index > i)[:, None, :], here[:, None, :] & (index < i)[:, :, None]
        table = torch.where(row, costs[:, None, :], torch.where(column, costs[:, :, None], table))
        dead = cluster != index
        table = table.masked_fill(dead[:, :, None] | dead[:, None, :], torch.inf)
    return state, cluster


def merged(log_weights: Tensor, g: Gaussian, num_components: int) -> Merged:
    """Merge components, the cheapest pair first, until ``num_components`` are left.

    Args:
        log_weights: normalised, shape ``batch_shape + (K,)``.
        g: of batch shape ``batch_shape + (K,)`` or broadcastable with it.
        num_components: K', at most K. Those left are in the order of the first of each cluster.

    Returns:
        In working precision. The choice of the pairs has no derivative; the rest has.
    """
    components = gaussian_components(widened(log_weights), g.to(widened(g.loc).dtype))
    tril = torch.diag_embed(components.scale) if components.is_diagonal else components.scale
    batch, k, d = components.loc.shape[:-2], *components.loc.shape[-2:]
    state = _State(components.log_weights.reshape(-1, k), components.loc.reshape(-1, k, d), tril.reshape(-1, k, d, d))
    final, cluster = _merges(state, k - num_components)
    gone = cluster != torch.arange(k, device=cluster.device)
    kept = gone.to(torch.uint8).argsort(dim=1, stable=True)[:, :num_components]
    bound = _weighted_kl(state, _at(final, cluster)).sum(-1)
    log_total, loc, factor = (x.reshape(batch + x.shape[1:]) for x in _at(final, kept))
    return Merged(log_total, Gaussian("scale_tril", loc, factor), bound.reshape(batch))
