"""The primitives of `stablekl.special`, beside what one writes in torch without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import special
from ..batches import REACH, Batch, Expand, Plan, neighbours, plans, values
from ..references import special as truths
from ..subject import Rule, Subject, settled

__all__ = ["ONE_ARGUMENT", "subjects"]

COUNT = 4096
BARS = {torch.float64: 4.0, torch.float32: 4.0, torch.float16: 1.0, torch.bfloat16: 1.0}


def _plain_bregman(a: Tensor, b: Tensor) -> Tensor:
    quotient = a / b
    return quotient - 1 - torch.log(quotient)


def _plain_bd0(x: Tensor, M: Tensor) -> Tensor:
    return x * torch.log(x / M) + M - x


# By name: stablekl's, torch's, and the truth.
ONE_ARGUMENT: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Callable[[Any], Any]]] = {
    "log1pmx": (special.log1pmx, lambda x: torch.log1p(x) - x, truths.log1pmx_at),
    "expm1mx": (special.expm1mx, lambda x: torch.expm1(x) - x, truths.expm1mx_at),
    "log_ndtr": (special.log_ndtr, torch.special.log_ndtr, truths.log_ndtr_at),
}
TWO_ARGUMENTS: dict[str, tuple[Rule, Rule, Callable[..., Any]]] = {
    "log_ratio_bregman": (special.log_ratio_bregman, _plain_bregman, truths.log_ratio_bregman_at),
    "bd0": (special.bd0, _plain_bd0, truths.bd0_at),
}


def _line(plan: Plan, dtype: torch.dtype) -> Batch:
    rng = plan.generator()
    size = values("positive", plan, rng, (COUNT,), REACH[dtype], torch.ones(1).numpy())
    x = torch.from_numpy(size * rng.choice((-1, 1), COUNT)).to(dtype)
    near_end = torch.from_numpy(-1 + np.exp2(-rng.uniform(0, 50, COUNT))).to(dtype)
    return (torch.where(x > -1, x, torch.where(near_end > -1, near_end, -x)),)


def _above_minus_one(x: Tensor) -> Tensor:
    return (x > -1) & x.isfinite()


def _moderate(x: Tensor) -> Tensor:
    return x.abs() <= 2.0**30


def _quotients(plan: Plan, dtype: torch.dtype) -> Batch:
    rng = plan.generator()
    ones = torch.ones(1).numpy()
    b = torch.from_numpy(values("positive", plan, rng, (COUNT,), REACH[dtype], ones)).to(dtype)
    if plan.relation == "near":
        return neighbours(b, plan, rng, 1.0), b
    if plan.relation == "ratio":
        return (b.double() * torch.from_numpy(2.0 ** rng.normal(size=COUNT))).to(dtype), b
    return torch.from_numpy(values("positive", plan, rng, (COUNT,), REACH[dtype], ones)).to(dtype), b


def _sums(plan: Plan, dtype: torch.dtype) -> Batch:
    rng = plan.generator()
    x = rng.normal(size=(COUNT // 8, 8)) * 2.0 ** (6 * plan.spread) + 2.0 ** (10 * plan.centre)
    return (torch.from_numpy(x).to(dtype),)


def _signed(plan: Plan, dtype: torch.dtype) -> Batch:
    rng = plan.generator()
    size = values("positive", plan, rng, (COUNT,), min(REACH[dtype], 30), torch.ones(1).numpy())
    return (torch.from_numpy(size * rng.choice((-1, 1), COUNT)).to(dtype),)


def subjects() -> Iterator[Subject]:
    """All of them."""
    for name, (ours, plain, truth) in ONE_ARGUMENT.items():
        expand: Expand = _line if name == "log1pmx" else _signed
        yield Subject(
            name=name,
            parameters=("x",),
            rules={"torch": plain, "stablekl": ours},
            reference=settled(truth),
            draw=plans(("apart",)),
            expand=expand,
            valid=_above_minus_one if name == "log1pmx" else _moderate,
            divergence=False,
            bars=BARS,
        )
    for name, (ours, plain, truth) in TWO_ARGUMENTS.items():
        yield Subject(
            name=name,
            parameters=("a", "b") if name != "bd0" else ("x", "M"),
            rules={"torch": plain, "stablekl": ours},
            reference=settled(truth),
            draw=plans(("near", "ratio", "apart")),
            expand=_quotients,
            valid=lambda a, b: (a > 0) & (b > 0) & a.isfinite() & b.isfinite(),
            bars=BARS,
        )
    yield Subject(
        name="logsumexp",
        parameters=("x",),
        rules={
            "torch": lambda x: torch.logsumexp(x, -1),
            "stablekl": lambda x: special.logsumexp(x, -1),
        },
        reference=settled(truths.logsumexp_at),
        draw=plans(("apart",)),
        expand=_sums,
        valid=lambda x: x.isfinite().all(-1),
        # the terms may sum to nearly 1 though none is near 1: the result is then small, and its error eps
        scale=lambda top, row: max(top, 1),
        floor=1.0,
        unit="eps max(1, abs(result))",
        divergence=False,
        bars=BARS,
    )
