"""A subject of measurement: what is computed, what is true of it, and which inputs to try."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from .batches import Batch, Plan
from .references.context import Number, agreed, exact, gradient, mp

__all__ = ["Rule", "Subject", "differentiated"]

Rule = Callable[..., Any]  # tensors with one leading dimension -> a tensor, or a tuple of them, with that dimension


def _everything(*batch: Tensor) -> Tensor:
    return torch.ones(len(batch[0]), dtype=torch.bool, device=batch[0].device)


@dataclass(frozen=True)
class Subject:
    """One row of the report, before it is measured.

    Attributes:
        name: of the rule, as ``--pairs`` selects it.
        parameters: the names of the inputs, for the report.
        rules: by implementation, ``"torch"`` and ``"stablekl"``: from a batch to a tensor ``(n,)``, or a tuple of
            tensors ``(n, ...)`` whose components are judged together, as those of a gradient are.
        reference: the true result for one parameter set, exact numbers in, as far as two precisions agree; as many
            nested lists as the rules return tensors.
        draw: the strategy of plans.
        expand: from a plan and a dtype to a batch.
        valid: which sets of a batch are in the rule's domain; keeps the climb inside.
        scale: None to count ulps; else the factor of eps that is the unit of error, from the largest true number of a
            group and the input.
        unit: the name of the unit.
        divergence: whether a negative result is a defect.
        elementwise: whether a result may depend on nothing but its own row, to the last bit.
        cost: rough milliseconds of one reference.
        bars: the largest error that the project aims at, by dtype.
        limit: by dtype, why stablekl's rule has no bound on its error; such an error is shown, and no regression.
        floor: what ``scale`` is at least, to choose suspects by: 1 where the error is absolute.
        kappa: of each set of a batch the condition number that ``scale`` allows for, to choose suspects by.
    """

    name: str
    parameters: tuple[str, ...]
    rules: Mapping[str, Rule]
    reference: Callable[..., Any]
    draw: st.SearchStrategy[Any]
    expand: Callable[[Plan, torch.dtype], Batch] = lambda plan, dtype: plan  # type: ignore[assignment, return-value]
    valid: Callable[..., Tensor] = _everything
    scale: Callable[[Number, Sequence[Tensor]], Number] | None = None
    unit: str = "ulp"
    divergence: bool = True
    elementwise: bool = True
    cost: float = 0.5
    bars: Mapping[torch.dtype, float] = field(default_factory=dict)
    limit: Mapping[torch.dtype, str] = field(default_factory=dict)
    floor: float = 0.0
    kappa: Callable[..., Tensor] | None = None

    def truth(self, row: Sequence[Tensor]) -> list[list[Number]]:
        """The true results for one parameter set, each a flat list of numbers."""
        result = self.reference(*(exact(x) for x in row))
        return [_flat(r) for r in result] if isinstance(result, (list, tuple)) else [[result]]


def _flat(item: Any) -> list[Number]:
    return [x for i in item for x in _flat(i)] if isinstance(item, (list, tuple)) else [item]


def outputs(rule: Rule, batch: Batch) -> tuple[Tensor, ...]:
    """The results of a rule, as a tuple of detached tensors ``(n, components)``."""
    result, n = rule(*batch), len(batch[0])
    results = tuple(result) if isinstance(result, (tuple, list)) else (result,)
    for r in results:
        if not (isinstance(r, Tensor) and r.dtype == batch[0].dtype and r.ndim and len(r) == n):
            what = f"{r.dtype} {tuple(r.shape)}" if isinstance(r, Tensor) else type(r).__name__
            raise ValueError(f"the rule must return {batch[0].dtype} of {n} rows, as many as it was given, not {what}")
    return tuple(r.detach().reshape(n, -1) for r in results)


def differentiated(rule: Rule) -> Rule:
    """The gradient of a rule in each of its inputs, for a batch of independent parameter sets."""

    def gradients(*batch: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().clone().requires_grad_() for x in batch]
        with torch.enable_grad():
            found = torch.autograd.grad(rule(*leaves).sum(), leaves, allow_unused=True)
        return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True))

    return gradients


def settled(at: Callable[..., Number]) -> Callable[..., Number]:
    """A reference for one precision, at two that agree."""
    return lambda *row: agreed(lambda: at(*row))


def _same(row: Sequence[Any]) -> bool:
    """Whether the parameters of p are those of q; no precision but the last shows that by itself."""
    half = len(row) // 2
    return row[:half] == row[half:]


def divergence_of(at: Callable[..., Number]) -> Callable[..., Number]:
    """The reference of a divergence within one family: 0 where p = q."""
    return lambda *row: mp.mpf(0) if _same(row) else agreed(lambda: at(*row))


def gradient_of(at: Callable[..., Number]) -> Callable[..., list[list[Number]]]:
    """The reference of `differentiated`, for a divergence within one family: 0 where p = q, its minimum."""

    def partials(*row: Any) -> list[list[Number]]:
        if _same(row):
            return [[mp.mpf(0)] * len(_flat(x)) for x in row]
        return gradient(at, *row)

    return partials


def gradient_from(at: Callable[..., list[list[Number]]]) -> Callable[..., list[list[Number]]]:
    """The same from a reference of the gradient itself."""

    def partials(*row: Any) -> list[list[Number]]:
        if _same(row):
            return [[mp.mpf(0)] * len(_flat(x)) for x in row]
        found: list[list[Number]] = agreed(lambda: at(*row))
        return found

    return partials


def one_plus(top: Number, row: Sequence[Tensor]) -> Number:
    """The unit of results whose error is absolute: eps (1 + |truth|)."""
    return 1 + top
