"""Categorical, Dirichlet and Wishart: families over vectors and matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Categorical, Dirichlet, Distribution, OneHotCategorical, Wishart
from torch.distributions import kl as torch_kl

from ... import registry
from ...distributions import Categorical as OurCategorical
from ...distributions import Multinomial
from ..batches import REACH, Batch, Plan, neighbours, plans
from ..references import categorical, dirichlet, wishart
from ..subject import Rule, Subject, differentiated, divergence_of, gradient_of
from . import gaussian

__all__ = ["subjects"]

COUNT = 512
SIZES = (2, 2, 3, 5, 10)
BARS = {torch.float64: 16.0, torch.float32: 16.0, torch.float16: 1.0, torch.bfloat16: 1.0}


def _rules(build: Callable[..., Distribution], family: type[Distribution], split: int = 1) -> dict[str, Rule]:
    def through(divergence: Callable[..., Tensor]) -> Rule:
        return lambda *batch: divergence(build(*batch[:split]), build(*batch[split:]))

    rules: dict[str, Rule] = {"torch": through(torch_kl.kl_divergence)}
    if registry.rule_for(family, family) is not torch_kl._dispatch_kl(family, family):
        rules["stablekl"] = through(registry.kl_divergence)
    return rules


def _near(x: Tensor, plan: Plan, rng: np.random.Generator) -> Tensor:
    return neighbours(x, plan, rng, 0.5)


# ---- categories ---------------------------------------------------------------------------------------------------


def _stored(cls: type[Any]) -> Callable[[Tensor], Distribution]:
    """A categorical of exactly these weights: torch rounds what it stores, and is judged on what is stored."""

    def build(weights: Tensor) -> Distribution:
        made = cls(probs=weights, validate_args=False)
        inner = made if cls is Categorical else made._categorical
        inner.probs = inner._param = weights
        found: Distribution = made
        return found

    return build


def _weights(plan: Plan, dtype: torch.dtype) -> Batch:
    rng = plan.generator()
    reach = min(REACH[dtype], 90)
    logs = rng.uniform(-1, 0, (COUNT, plan.size)) * plan.spread * reach

    def normalised(x: Tensor) -> Tensor:
        wide = x.double()
        return (wide / wide.sum(-1, keepdim=True)).to(dtype)

    q = normalised(torch.from_numpy(np.exp2(logs)))
    if plan.relation == "equal":
        return q, q
    if plan.relation == "near":
        return _near(q, plan, rng), q
    if plan.relation == "ratio":
        return normalised(q.double() * torch.from_numpy(np.exp2(rng.normal(size=q.shape)))), q
    other = np.exp2(rng.uniform(-1, 0, q.shape) * plan.spread * reach)
    other *= rng.uniform(size=q.shape) < 0.9  # some categories without weight
    other[:, 0] = 1.0
    return normalised(torch.from_numpy(other)), q


DRAWS = 7


def _multinomial() -> Subject:
    """Of weights that our class keeps as they are."""

    def rule(p: Tensor, q: Tensor) -> Tensor:
        return registry.kl_divergence(*(Multinomial(DRAWS, x, validate_args=False) for x in (p, q)))

    return replace(
        _categorical(Categorical),
        name="Multinomial-Multinomial",
        rules={"stablekl": rule},
        reference=divergence_of(lambda p, q: DRAWS * categorical.kl_from_probs_at(p, q)),
    )


def _categorical(cls: type[Any]) -> Subject:
    return Subject(
        name=f"{cls.__name__}-{cls.__name__}",
        parameters=("probs_p", "probs_q"),
        rules=_rules(_stored(cls), cls),
        reference=divergence_of(categorical.kl_from_probs_at),
        draw=plans(sizes=SIZES),
        expand=_weights,
        valid=lambda p, q: ((p >= 0) & (p < 2)).all(-1) & ((q >= 0) & (q < 2)).all(-1),
        elementwise=False,
        bars=BARS,
    )


def _of_any_sum() -> Subject:
    """Of weights whose sums are anything from the smallest to the largest float."""

    def expand(plan: Plan, dtype: torch.dtype) -> Batch:
        rng = plan.generator()
        info = torch.finfo(dtype)
        low, high = np.log2(info.tiny), np.log2(info.max) - 1

        def scaled(x: Tensor) -> Tensor:
            shift = torch.from_numpy(np.floor(rng.uniform(low, high, (COUNT, 1))))
            half = (shift / 2).floor()
            return ((x.double() * torch.exp2(half)) * torch.exp2(shift - half)).clamp(max=info.max).to(dtype)

        return tuple(scaled(x) for x in _weights(plan, dtype))

    return replace(
        _categorical(Categorical),
        name="Categorical-Categorical of any sum",
        rules={"stablekl": lambda p, q: registry.kl_divergence(*(OurCategorical(x) for x in (p, q)))},
        expand=expand,
        valid=lambda p, q: torch.stack([(x >= 0).all(-1) & x.isfinite().all(-1) & (x > 0).any(-1) for x in (p, q)]).all(
            0
        ),
    )


def _by_logits() -> Subject:
    """Of logits up to 1e4 in size."""

    def expand(plan: Plan, dtype: torch.dtype) -> Batch:
        rng = plan.generator()

        def drawn() -> Tensor:
            signs = rng.choice((-1, 1), (COUNT, plan.size))
            return torch.from_numpy(np.exp2(plan.logs(rng, signs.shape, 13.3)) * signs).to(dtype)

        q = drawn()
        if plan.relation == "equal":
            return q, q
        if plan.relation == "near":
            return _near(q, plan, rng), q
        return (
            drawn() if plan.relation == "apart" else (q.double() + torch.from_numpy(rng.normal(size=q.shape))).to(dtype)
        ), q

    return replace(
        _categorical(Categorical),
        name="Categorical-Categorical by logits",
        parameters=("logits_p", "logits_q"),
        rules={"stablekl": lambda p, q: registry.kl_divergence(*(OurCategorical(logits=x) for x in (p, q)))},
        reference=divergence_of(categorical.kl_from_logits_at),
        expand=expand,
        valid=lambda p, q: ((p.abs() < 2e4) & (q.abs() < 2e4)).all(-1),
    )


# ---- Dirichlet ----------------------------------------------------------------------------------------------------


def _concentrations(plan: Plan, dtype: torch.dtype) -> Batch:
    rng = plan.generator()
    shape = (COUNT, plan.size)
    reach = min(REACH[dtype], 60)
    q = torch.from_numpy(np.exp2(plan.logs(rng, shape, reach))).to(dtype)
    if plan.relation == "equal":
        return q, q
    if plan.relation == "near":
        return _near(q, plan, rng), q
    if plan.relation == "ratio":  # proportional ones too: no difference of the means
        each = rng.normal(size=shape) * (rng.uniform(size=(COUNT, 1)) < 0.5)
        return (q.double() * torch.from_numpy(np.exp2(rng.normal(size=(COUNT, 1)) + each))).to(dtype), q
    return torch.from_numpy(np.exp2(plan.logs(rng, shape, reach))).to(dtype), q


def _dirichlet() -> Iterator[Subject]:
    rules = _rules(lambda a: Dirichlet(a, validate_args=False), Dirichlet)
    common: dict[str, Any] = {
        "parameters": ("concentration_p", "concentration_q"),
        "expand": _concentrations,
        "valid": lambda p, q: ((p > 0) & p.isfinite() & (q > 0) & q.isfinite()).all(-1),
        "elementwise": False,
    }
    yield Subject(
        name="Dirichlet-Dirichlet",
        rules=rules,
        reference=divergence_of(dirichlet.kl_at),
        draw=plans(sizes=SIZES),
        bars=BARS,
        cost=2.0,
        **common,
    )
    yield Subject(
        name="gradient Dirichlet-Dirichlet",
        rules={name: differentiated(rule) for name, rule in rules.items()},
        reference=gradient_of(dirichlet.kl_at),
        draw=plans(("near", "ratio", "apart"), sizes=(2, 3)),
        divergence=False,
        cost=30.0,
        bars={dtype: 2 * bar for dtype, bar in BARS.items()},
        **common,
    )


# ---- Wishart ------------------------------------------------------------------------------------------------------


def _wisharts(plan: Plan, dtype: torch.dtype) -> Batch:
    rng = plan.generator()
    _, p, _, q = gaussian.expansion("scale_tril", "scale_tril")(plan, dtype)
    df_q = torch.from_numpy(plan.size + np.exp2(rng.uniform(-4, 10, len(q)))).to(dtype)
    if plan.relation == "equal":
        return df_q, p, df_q, q
    if plan.relation == "near":
        return _near(df_q, plan, rng), p, df_q, q
    return torch.from_numpy(plan.size + np.exp2(rng.uniform(-4, 10, len(q)))).to(dtype), p, df_q, q


def _wishart() -> Subject:
    def valid(df_p: Tensor, p: Tensor, df_q: Tensor, q: Tensor) -> Tensor:
        means = torch.zeros_like(p[..., 0])
        degrees = torch.minimum(df_p, df_q)
        enough = (degrees > p.shape[-1] - 1) & torch.maximum(df_p, df_q).isfinite()
        return enough & gaussian.validity("scale_tril", "scale_tril")(means, p, means, q)

    return Subject(
        name="Wishart-Wishart",
        parameters=("df_p", "scale_tril_p", "df_q", "scale_tril_q"),
        rules=_rules(lambda df, root: Wishart(df, scale_tril=root, validate_args=False), Wishart, 2),
        reference=lambda a, p, b, q: wishart.kl(
            wishart.Wishart(a, "scale_tril", p), wishart.Wishart(b, "scale_tril", q)
        ),
        draw=plans(sizes=(1, 2, 3, 5)),
        expand=_wisharts,
        valid=valid,
        **gaussian.unit(("scale_tril", slice(3, None))),
        unit="eps max(1, cond(Lq))",
        elementwise=False,
        cost=4.0,
        bars=BARS,
    )


def subjects() -> Iterator[Subject]:
    """All of them."""
    yield _categorical(Categorical)
    yield _categorical(OneHotCategorical)
    yield _multinomial()
    yield _of_any_sum()
    yield _by_logits()
    yield from _dirichlet()
    yield _wishart()
