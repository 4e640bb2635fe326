"""Distribution functions, their logarithms and complements, and entropies of the families on the line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import distributions
from ..batches import Batch, Plan, narrowed, plans
from ..references import FAMILIES
from ..references.context import mp
from ..references.tails import FUNCTIONS, TAILS, entropy_at, function_at
from ..subject import Rule, Subject, settled
from .scalar import bars, log_density, single, torch_class, validity

__all__ = ["subjects"]

COUNT = 1024
_BAR, _ENTROPY = 8.0, 4.0
# What there is with torch's classes.
PLAIN = {
    "cdf": lambda d, x: d.cdf(x),
    "sf": lambda d, x: 1 - d.cdf(x),
    "log_cdf": lambda d, x: d.cdf(x).log(),
    "log_sf": lambda d, x: (-d.cdf(x)).log1p(),
}
# Incomplete gamma and beta functions; milliseconds of a reference that is an integral.
INCOMPLETE = ("Beta", "Chi2", "Gamma", "InverseGamma")
COST = 300.0
# Whose expectations are in the references; of counts they are not.
ENTROPIES = (
    *("Beta", "Cauchy", "Exponential", "Gamma", "Gumbel", "HalfCauchy", "HalfNormal", "InverseGamma", "Laplace"),
    *("LogNormal", "Normal", "Pareto", "StudentT", "Uniform", "Weibull", "Bernoulli", "ContinuousBernoulli"),
    "Geometric",
)


def _ours(name: str, method: str) -> Any:
    """Our class where it has the method for itself."""
    cls = getattr(distributions, name, None)
    own = getattr(cls, method, None)
    return cls if own is not None and own.__module__.startswith("stablekl.") else None


def _tail(name: str, function: str) -> Subject:
    base, names = log_density(name), list(FAMILIES[name].parameters)

    def build(cls: Any, theta: tuple[Tensor, ...]) -> Any:
        return cls(**dict(zip(names, theta, strict=True)), validate_args=False)

    rules: dict[str, Rule] = {"torch": lambda x, *theta: PLAIN[function](build(torch_class(name), theta), x)}
    if name == "Beta":  # torch has none
        del rules["torch"]
    if (own := _ours(name, function)) is not None:
        rules["stablekl"] = lambda x, *theta: getattr(build(own, theta), function)(x)
    own_unit = name in INCOMPLETE

    def expand(plan: Plan, dtype: torch.dtype) -> Batch:
        return base.expand(narrowed(plan, dtype) if own_unit else plan, dtype)

    return replace(
        base,
        expand=expand,
        name=f"{function} {name}",
        rules=rules,
        reference=settled(partial(function_at, name, function)),
        scale=_by_logarithm if own_unit else None,
        floor=0.0,
        unit="eps max(1, abs(log))" if own_unit else "ulp",
        cost=COST if own_unit else base.cost,
        bars=bars(_BAR),
    )


def _by_logarithm(top: Any, row: Any) -> Any:
    """Of a number whose logarithm is what is computed, and has an ulp of its own."""
    unit = top * max(mp.mpf(1), abs(mp.log(top))) if top else mp.mpf(0)
    return max(unit, mp.mpf(torch.finfo(row[0].dtype).tiny))


def _entropy(name: str) -> Subject:
    family, names = FAMILIES[name], list(FAMILIES[name].parameters)

    def through(cls: Any) -> Rule:
        return lambda *theta: cls(**dict(zip(names, theta, strict=True)), validate_args=False).entropy()

    def expand(plan: Plan, dtype: torch.dtype) -> Batch:
        return tuple(x[:COUNT] for x in single(name, "", plan, dtype, plan.generator()).values())

    rules = {"torch": through(torch_class(name))}
    if (own := _ours(name, "entropy")) is not None:
        rules["stablekl"] = through(own)
    return Subject(
        name=f"entropy {name}",
        parameters=tuple(names),
        rules=rules,
        reference=settled(partial(entropy_at, family)),
        draw=plans(("apart",)),
        expand=expand,
        valid=validity(family),
        scale=lambda top, row: max(mp.mpf(1), top),
        floor=1.0,
        unit="eps max(1, abs(entropy))",
        divergence=False,
        bars=bars(_ENTROPY),
    )


def subjects() -> Iterator[Subject]:
    """All of them."""
    for name in TAILS:
        for function in FUNCTIONS:
            if function == "cdf" or _ours(name, function) is not None:
                yield _tail(name, function)
    for name in ENTROPIES:
        yield _entropy(name)
