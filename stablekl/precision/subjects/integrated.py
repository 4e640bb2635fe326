"""Families without a closed-form divergence, and LKJ matrices: FisherSnedecor, Kumaraswamy, LKJCholesky."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import distributions, registry
from ..batches import Batch, Plan, narrowed, plans, related, scalars
from ..references import fisher_snedecor, kumaraswamy, lkj_cholesky
from ..references.context import Number
from ..subject import Rule, Subject, differentiated, divergence_of, gradient_from, gradient_of
from .scalar import CANCELS, bars

__all__ = ["subjects"]

COUNT = 256
DIMENSIONS = (2, 3, 10)
_CROSS, _SHAPE = 64.0, 16.0


def _pair(
    name: str,
    domains: dict[str, str],
    build: Callable[..., Any],
    at: Callable[..., Number],
    gradient_reference: Callable[..., Any],
    bar: float,
    cost: float,
) -> Iterator[Subject]:
    """The divergence between two of a family of positive parameters, and its gradient."""
    width = len(domains)

    def rule(*batch: Tensor) -> Tensor:
        return registry.kl_divergence(build(*batch[:width]), build(*batch[width:]))

    def expand(plan: Plan, dtype: torch.dtype) -> Batch:
        plan = narrowed(plan, dtype)
        rng = plan.generator()
        q = scalars(domains, plan, dtype, COUNT, rng)
        return (*related(domains, q, plan, dtype, rng).values(), *q.values())

    def valid(*batch: Tensor) -> Tensor:
        return torch.stack([(x > 0) & x.isfinite() for x in batch]).all(0)

    rules: dict[str, Rule] = {"stablekl": rule}
    common: dict[str, Any] = {
        "parameters": tuple(f"{n}_{side}" for side in "pq" for n in domains),
        "expand": expand,
        "valid": valid,
        # sums over points, which torch may order by the shape of a batch
        "elementwise": False,
    }
    yield Subject(
        name=name,
        rules=rules,
        reference=divergence_of(at),
        draw=plans(),
        cost=cost,
        bars=bars(bar),
        **common,
    )
    yield Subject(
        name=f"gradient {name}",
        rules={n: differentiated(r) for n, r in rules.items()},
        reference=gradient_reference,
        draw=plans(("near", "ratio", "apart")),
        limit={torch.float64: CANCELS},
        divergence=False,
        cost=2 * cost,
        bars=bars(2 * bar),
        **common,
    )


def subjects() -> Iterator[Subject]:
    """All of them."""
    for name, module, names, bar in (
        ("FisherSnedecor", fisher_snedecor, ("df1", "df2"), _CROSS),
        ("Kumaraswamy", kumaraswamy, ("concentration1", "concentration0"), _SHAPE),
    ):
        build = partial(getattr(distributions, name), validate_args=False)
        domains = dict.fromkeys(names, "positive")
        yield from _pair(
            f"{name}-{name}", domains, build, module.kl_at, gradient_from(module.kl_gradient_at), bar, 400.0
        )
    for dim in DIMENSIONS:
        build = partial(distributions.LKJCholesky, dim, validate_args=False)
        at = partial(lkj_cholesky.kl_at, dim)
        yield from _pair(
            f"LKJCholesky({dim})-LKJCholesky({dim})",
            {"concentration": "positive"},
            build,
            at,
            gradient_of(at),
            _SHAPE,
            float(dim),
        )
