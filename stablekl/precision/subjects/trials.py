"""Families of trials of two outcomes from logits of any size, and binomial distributions of different counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ... import distributions, registry
from ..batches import Batch, Plan, neighbours, plans
from ..references import FAMILIES, logits
from ..references.context import Number
from ..subject import Subject, divergence_of
from .scalar import CROSS, SELF, bars, divergence

__all__ = ["subjects"]

COUNT = 2048


def unequal_trials() -> Subject:
    """The KL divergence of binomial distributions whose numbers of trials differ, by a sum over p's outcomes."""
    name = "Binomial"
    value = divergence(name, name)

    def expand(plan: Plan, dtype: torch.dtype) -> Batch:
        rng = plan.generator()
        _, p, _, q = value.expand(plan, dtype)
        n = np.floor(np.exp2(rng.uniform(0, 5, COUNT)))
        m = n + np.floor(np.exp2(rng.uniform(0, 5 if dtype == torch.float16 else 6, COUNT)))
        counts = [torch.from_numpy(x) for x in (n, m)]
        # means that all but agree
        some = torch.from_numpy(rng.uniform(size=COUNT) < 0.5)
        q = torch.where(some, (counts[0] * p.double() / counts[1]).to(dtype), q)
        batch = counts[0].to(dtype), p, counts[1].to(dtype), q
        good = valid(*batch)
        return tuple(x[good] for x in batch)

    def valid(n: Tensor, p: Tensor, m: Tensor, q: Tensor) -> Tensor:
        return value.valid(n, p, m, q) & (n < 64) & (n < m) & (p > 0) & (q > 0)

    return replace(
        value,
        name=f"{value.name} of other counts",
        rules={"stablekl": value.rules["stablekl"]},
        draw=plans(("near", "ratio", "apart")),
        expand=expand,
        valid=valid,
        cost=20,
        bars=bars(CROSS),
    )


# Logits, to 1e4 in size: log2 of the largest.
_LOGITS = 13.3
_BY_LOGITS: dict[str, Callable[[Number, Number], Number]] = {
    "Bernoulli": logits.trial_kl,
    "Binomial": logits.trial_kl,
    "ContinuousBernoulli": logits.continuous_kl,
    "Geometric": logits.wait_kl,
    "NegativeBinomial": lambda x, y: logits.wait_kl(-x, -y),
}


def by_logits(name: str) -> Subject:
    """The KL divergence of a family of two outcomes from logits."""
    value, own, reference = divergence(name, name), getattr(distributions, name), _BY_LOGITS[name]
    counted = "total_count" in FAMILIES[name].parameters

    def drawn(plan: Plan, rng: np.random.Generator) -> Tensor:
        far = np.exp2(plan.logs(rng, (COUNT,), _LOGITS)) * rng.choice((-1, 1), COUNT)
        return torch.from_numpy(np.where(rng.uniform(size=COUNT) < 0.3, 3 * rng.normal(size=COUNT), far))

    def expand(plan: Plan, dtype: torch.dtype) -> Batch:
        rng = plan.generator()
        y = drawn(plan, rng).to(dtype)
        p = {
            "equal": lambda: y,
            "near": lambda: neighbours(y, plan, rng),
            "ratio": lambda: (y.double() + torch.from_numpy(rng.normal(size=COUNT))).to(dtype),
            "apart": lambda: drawn(plan, rng).to(dtype),
        }[plan.relation]()
        if not counted:
            return p, y
        n = torch.from_numpy(np.floor(np.exp2(rng.uniform(0, 7, COUNT)))).to(dtype)
        return n, p, n, y

    def rule(*batch: Tensor) -> Tensor:
        half = len(batch) // 2
        given = [{"logits": x[-1], **({"total_count": x[0]} if counted else {})} for x in (batch[:half], batch[half:])]
        return registry.kl_divergence(*(own(**parameters, validate_args=False) for parameters in given))

    def valid(*batch: Tensor) -> Tensor:
        good = (batch[-1].abs() < 2e4) & (batch[len(batch) // 2 - 1].abs() < 2e4)
        return good & (batch[0] == batch[2]) & (batch[0] >= 1) if counted else good

    return replace(
        value,
        name=f"{value.name} by logits",
        parameters=tuple(x.replace("probs", "logits") for x in value.parameters),
        rules={"stablekl": rule},
        reference=divergence_of(lambda *row: (row[0] if counted else 1) * reference(row[len(row) // 2 - 1], row[-1])),
        expand=expand,
        valid=valid,
        bars=bars(SELF),
    )


def subjects() -> Iterator[Subject]:
    """All of them."""
    yield unequal_trials()
    for name in _BY_LOGITS:
        yield by_logits(name)
