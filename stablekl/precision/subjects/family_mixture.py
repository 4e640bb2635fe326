"""Mixtures of two Gamma, Beta or Poisson distributions against one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical

from ... import distributions, registry
from ...mixtures import MixtureSameFamily
from ..batches import Batch, Plan, neighbours, plans, scalars
from ..references import FAMILIES
from ..references.context import Number
from ..references.family_mixture import MIXED, kl_to_member
from ..subject import Subject, one_plus
from .mixture import BARS, UNIT, mixture_weights

__all__ = ["subjects"]

COUNT = 512
# log2 of the largest concentration, rate or mean, and of the smallest
REACH = 40


def _subject(name: str) -> Subject:
    names = tuple(FAMILIES[name].parameters)

    def expand(plan: Plan, dtype: torch.dtype) -> Batch:
        rng = plan.generator()

        def member() -> list[Tensor]:
            drawn = scalars(dict.fromkeys(names, "positive"), plan, dtype, COUNT, rng)
            return [drawn[n].clamp(2.0**-REACH, 2.0**REACH) for n in names]

        first, q = member(), member()
        if plan.relation == "near":
            second = [neighbours(x, plan, rng) for x in first]
        elif plan.relation == "equal":
            second = first
        else:
            second = member()
        if plan.relation == "ratio":
            q = [neighbours(x, plan, rng) for x in first]
        pairs = [torch.stack(pair, -1) for pair in zip(first, second, strict=True)]
        return mixture_weights(plan, rng, COUNT, 2, dtype), *pairs, *q

    def rule(w: Tensor, *parameters: Tensor) -> Tensor:
        family = getattr(distributions, name)
        own, other = parameters[: len(names)], parameters[len(names) :]
        component = family(**dict(zip(names, own, strict=True)), validate_args=False)
        p = MixtureSameFamily(Categorical(probs=w, validate_args=False), component, validate_args=False)
        return registry.kl_divergence(p, family(**dict(zip(names, other, strict=True)), validate_args=False))

    def reference(w: Any, *parameters: Any) -> Number:
        own, other = parameters[: len(names)], parameters[len(names) :]
        one, two = ([x[k] for x in own] for k in (0, 1))
        return kl_to_member(name, w, one, two, other)

    def valid(w: Tensor, *parameters: Tensor) -> Tensor:
        good = (w >= 0).all(-1) & (w.sum(-1) > 0) & w.isfinite().all(-1)
        for x in parameters:
            flat = x.reshape(len(w), -1)
            good = good & ((flat >= 2.0 ** (-1 - REACH)) & (flat <= 2.0 ** (1 + REACH))).all(-1)
        return good

    return Subject(
        name=f"MixtureSameFamily-{name}",
        parameters=("weights", *(f"{n}_p" for n in names), *(f"{n}_q" for n in names)),
        rules={"stablekl": rule},
        reference=reference,
        draw=plans(("near", "ratio", "apart", "equal")),
        expand=expand,
        valid=valid,
        scale=one_plus,
        floor=1.0,
        unit=UNIT,
        elementwise=False,
        cost=700.0,
        bars=BARS,
    )


def subjects() -> Iterator[Subject]:
    """One for each family that has a reference."""
    for name in MIXED:
        yield _subject(name)
