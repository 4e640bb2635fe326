"""What a search draws: whole batches of parameters, from a few knobs that hypothesis turns.

A `Plan` says how p relates to q and on what scale. Expanding it to thousands of parameter sets takes no more draws, so
hypothesis explores regimes, and a device works as it does for users. Values are log-uniform bit patterns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from .references.family import COUNT, NONNEGATIVE, POSITIVE, PROBABILITY, REAL, SIGNED

__all__ = ["INTEGER", "REACH", "Plan", "moved", "pairs", "plans", "scalars"]

Array = NDArray[np.float64]
Batch = tuple[Tensor, ...]
# Largest |log2| of a scale. The square of a ratio of scales is still a normal number in float64; in float32 it may
# overflow, as it does for users; bfloat16 has float32's range, and float16 hardly any.
REACH = {torch.float64: 200, torch.float32: 40, torch.bfloat16: 40, torch.float16: 5}
INTEGER = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
# How p is drawn: independently of q; within a factor of a few; a few units in the last place away; equal.
RELATIONS = ("near", "ratio", "apart", "equal")


@dataclass(frozen=True)
class Plan:
    """The knobs of one batch.

    Attributes:
        relation: one of ``RELATIONS``.
        seed: of the batch's generator.
        centre: log2 of the scale that the batch is drawn around, as a part of the dtype's `REACH` (-1 to 1).
        spread: of the logarithms around it, in the same unit (0 to 1).
        step: log2 of the largest distance of p from q, in ulps, as a part of the significand's bits (0 to 1).
        size: the dimension, for families that have one.
    """

    relation: str
    seed: int
    centre: float
    spread: float
    step: float
    size: int = 1

    def generator(self) -> np.random.Generator:
        """The generator of the batch: the same batch for the same plan."""
        return np.random.default_rng(self.seed)

    def logs(self, rng: np.random.Generator, shape: tuple[int, ...], reach: float) -> Array:
        """log2 of the sizes to draw, within ``reach``."""
        u = self.centre + self.spread * rng.uniform(-1, 1, shape)
        result: Array = reach * np.clip(u, -1, 1)
        return result


def plans(relations: tuple[str, ...] = RELATIONS, sizes: tuple[int, ...] = (1,)) -> st.SearchStrategy[Plan]:
    """Plans of every kind; hypothesis turns each knob for itself, and all of them towards larger errors."""
    return st.builds(
        Plan,
        relation=st.sampled_from(relations),
        seed=st.integers(0, 2**32 - 1),
        centre=st.floats(-1, 1, width=16),
        # hypothesis begins with the smallest of each: a whole range, not a point
        spread=st.floats(0, 1, width=16).map(lambda x: 1 - x),
        step=st.floats(0, 1, width=16).map(lambda x: 1 - x),
        size=st.sampled_from(sizes),
    )


def narrowed(plan: Plan, dtype: torch.dtype, reach: float = 40.0) -> Plan:
    """The plan with scales of no more than 2^+-reach: for references whose time grows with the digits they need."""
    part = min(1.0, 0.5 * reach / REACH[dtype])
    return replace(plan, centre=part * plan.centre, spread=part * plan.spread)


def moved(x: Tensor, steps: Tensor | int) -> Tensor:
    """``x``, so many representable numbers further from zero."""
    return (x.view(INTEGER[x.dtype]) + torch.as_tensor(steps).to(INTEGER[x.dtype])).view(x.dtype)


def neighbours(x: Tensor, plan: Plan, rng: np.random.Generator, chance: float = 0.6) -> Tensor:
    """``x`` with some of its entries 1, 2, 4, ... ulps away, never across zero or a change of sign."""
    bits = int(-np.log2(torch.finfo(x.dtype).eps))
    steps = 2.0 ** np.floor(rng.uniform(0, 1 + plan.step * (bits - 3), x.shape)) * rng.choice((-1, 1), x.shape)
    steps *= rng.uniform(size=x.shape) < chance
    if not steps.any():
        steps.reshape(-1)[:1] = 1
    return torch.where(x == 0, x, moved(x, torch.from_numpy(steps.astype(np.int64))))


def values(
    domain: str, plan: Plan, rng: np.random.Generator, shape: tuple[int, ...], reach: float, unit: Array
) -> Array:
    """Float64 values of a domain; real ones are multiples of ``unit``, a scale."""
    logs = plan.logs(rng, shape, reach)
    if domain == POSITIVE:
        return np.exp2(logs)
    if domain == NONNEGATIVE:
        return np.where(rng.uniform(size=shape) < 0.05, 0.0, np.exp2(logs))
    if domain == SIGNED:
        signs = rng.choice((-1, 0, 1), shape, p=(0.45, 0.1, 0.45))
        # powers of 2 to the 40th, and ordinary ones; nobody has those of the scales
        return signs * np.exp2(np.where(rng.uniform(size=shape) < 0.5, logs / 5, rng.uniform(-4, 4, shape)))
    if domain == COUNT:
        return np.floor(np.exp2(rng.uniform(0, 7, shape)))
    if domain == PROBABILITY:
        tail, kind = np.exp2(-np.abs(logs) - 1), rng.uniform(size=shape)
        above = np.where(kind < 0.65, 1 - tail, rng.uniform(size=shape))
        saturated = np.where(kind < 0.97, above, rng.integers(0, 2, shape))
        return np.where(kind < 0.35, tail, saturated)
    if domain == REAL:
        offsets = np.exp2(rng.uniform(-1, 1, shape) * plan.spread * reach / 4) * rng.choice(
            (-1, 0, 1), shape, p=(0.4, 0.2, 0.4)
        )
        result: Array = offsets * unit
        return result
    raise ValueError(f"no values are known for the domain {domain!r}")


def scalars(
    domains: Mapping[str, str], plan: Plan, dtype: torch.dtype, count: int, rng: np.random.Generator | None = None
) -> dict[str, Tensor]:
    """Parameters of one scalar family, ``count`` of each; locations are drawn in units of the scale."""
    rng = plan.generator() if rng is None else rng
    reach, shape = REACH[dtype], (count,)
    scale = next((name for name in ("scale", "sigma") if name in domains), None)
    unit = np.exp2(plan.logs(rng, shape, reach)) if scale else np.ones(shape)
    drawn = {name: unit if name == scale else values(d, plan, rng, shape, reach, unit) for name, d in domains.items()}
    return {name: torch.from_numpy(x).to(dtype) for name, x in drawn.items()}


def related(
    domains: Mapping[str, str], q: dict[str, Tensor], plan: Plan, dtype: torch.dtype, rng: np.random.Generator
) -> dict[str, Tensor]:
    """Parameters of p for those of q of the same family, as the plan's relation has it; counts are shared."""
    count = len(next(iter(q.values())))
    other = scalars(domains, plan, dtype, count, rng) if plan.relation == "apart" else {}
    unit = q.get("scale", torch.ones(count, dtype=dtype))
    p = {}
    for name, domain in domains.items():
        x = q[name]
        if domain == COUNT or plan.relation == "equal":
            p[name] = x
        elif plan.relation == "apart":
            p[name] = other[name]
        elif plan.relation == "near":
            p[name] = neighbours(x, plan, rng).clamp(max=1.0 if domain == PROBABILITY else torch.inf)
        elif domain == REAL:
            p[name] = (x.double() + unit.double() * torch.from_numpy(rng.normal(size=count))).to(dtype)
        elif domain == PROBABILITY:  # another point of the unit interval, from the odds
            odds = x.double() / (1 - x.double()) * torch.from_numpy(np.exp2(rng.normal(size=count)))
            p[name] = torch.where((x > 0) & (x < 1), odds / (1 + odds), x.double()).to(dtype)
        else:
            p[name] = (x.double() * torch.from_numpy(np.exp2(1.5 * rng.normal(size=count)))).to(dtype)
    if plan.relation in ("ratio", "apart") and {"loc", "scale"} <= domains.keys():
        # where the second moments agree, about which derivatives by the scale change sign
        scale_p, scale_q = p["scale"].double(), q["scale"].double()
        offset = scale_q * (1 - (scale_p / scale_q).square()).clamp(min=0).sqrt()
        some = torch.from_numpy(rng.uniform(size=count) < 0.1) & (offset > 0)
        p["loc"] = torch.where(some, (q["loc"].double() + offset).to(dtype), p["loc"])
    return p


def pairs(
    dtype: torch.dtype = torch.float64, count: int = 2000, **domains: str
) -> st.SearchStrategy[tuple[Tensor, ...]]:
    """Batches of parameters of p, then of q, for a rule of one scalar family of your own.

    Args:
        dtype: of the tensors.
        count: the number of parameter sets in a batch.
        domains: the parameters' names in order and their domains: ``"real"`` (drawn in units of the parameter called
            ``scale``, where there is one), ``"signed"``, ``"positive"``, ``"nonnegative"``, ``"probability"``,
            ``"count"``.

    Returns:
        A hypothesis strategy of tuples of tensors of shape ``(count,)``: apart, within a factor of a few, or 1, 2,
        4, ... ulps from each other.
    """

    def expand(plan: Plan) -> tuple[Tensor, ...]:
        rng = plan.generator()
        q = scalars(domains, plan, dtype, count, rng)
        p = related(domains, q, plan, dtype, rng)
        return (*p.values(), *q.values())

    return plans().map(expand)


def hexadecimal(x: Any) -> Any:
    """A tensor's values as nested lists of hexadecimal strings, which say every bit."""
    items = x.detach().double().tolist() if isinstance(x, Tensor) else x
    return [hexadecimal(i) for i in items] if isinstance(items, list) else float(items).hex()


def from_hexadecimal(x: Any, dtype: torch.dtype) -> Tensor:
    """The tensor that `hexadecimal` wrote."""

    def read(item: Any) -> Any:
        return [read(i) for i in item] if isinstance(item, list) else float.fromhex(item)

    return torch.tensor(read(x), dtype=torch.float64).to(dtype)


Expand = Callable[[Plan, torch.dtype], Batch]
