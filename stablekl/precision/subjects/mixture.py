"""Mixtures of Gaussians: on the line, of two components in any dimension, and their densities."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, MultivariateNormal
from torch.distributions import MixtureSameFamily as TorchMixture
from torch.distributions import Normal as TorchNormal

from ... import registry
from ...distributions import MultivariateNormal as OurMultivariateNormal
from ...distributions import Normal
from ...mixtures import MixtureSameFamily
from ..batches import Batch, Plan, neighbours, plans
from ..references import mixture as truths
from ..references.context import Number, mp
from ..references.multivariate_normal import Gaussian
from ..subject import Subject, differentiated, one_plus
from . import gaussian

__all__ = ["BARS", "UNIT", "mixture_weights", "subjects"]

COUNT, ON_A_LINE = 1024, 256
# 1e-13 (1 + S) and 1e-6 (1 + S); the unit here, eps (1 + KL), is the smaller one since KL <= S
BARS = {torch.float64: 450.0, torch.float32: 8.4, torch.float16: 1.0, torch.bfloat16: 1.0}
UNIT = "eps (1 + KL)"


def mixture_weights(plan: Plan, rng: np.random.Generator, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """From even weights to tiny ones, and a few of exactly 0."""
    smallest = {torch.float16: 10, torch.bfloat16: 60, torch.float32: 60, torch.float64: 300}[dtype]
    logs = -rng.uniform(0, 1, (n, k)) * plan.spread**2 * smallest
    logs[:, 0] = 0
    w = np.exp2(logs) * (rng.uniform(size=(n, k)) < (0.97 if k > 2 else 1.0))
    w[:, 0] = 1
    return torch.from_numpy(w / w.sum(-1, keepdims=True)).to(dtype)


def _lines(plan: Plan, rng: np.random.Generator, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, means and scales of mixtures on the line: from identical components to ones far apart."""
    apart = np.exp2(rng.uniform(-1, 1, (n, 1)) * 8 * plan.centre)
    loc = apart * rng.standard_normal((n, k)) * (rng.uniform(size=(n, 1)) < 0.9)
    scale = np.exp2(rng.uniform(-1, 1, (n, k)) * 5 * plan.spread)
    near = plan.relation == "near"
    loc_t, scale_t = torch.from_numpy(loc).to(dtype), torch.from_numpy(scale).to(dtype)
    if near:  # components that nearly coincide
        loc_t = neighbours(loc_t[:, :1].expand(n, k).contiguous(), plan, rng)
        scale_t = neighbours(scale_t[:, :1].expand(n, k).contiguous(), plan, rng)
    return mixture_weights(plan, rng, n, k, dtype), loc_t, scale_t


def _rows(w: Sequence[Number], loc: Sequence[Number], scale: Sequence[Number]) -> list[tuple[Number, ...]]:
    return list(zip(w, loc, scale, strict=True))


def _on_the_line(w: Tensor, loc: Tensor, scale: Tensor) -> Distribution:
    if w.shape[-1] == 1:
        return Normal(loc[..., 0], scale[..., 0], validate_args=False)
    return MixtureSameFamily(
        Categorical(probs=w, validate_args=False), Normal(loc, scale, validate_args=False), validate_args=False
    )


def _valid(*batch: Tensor) -> Tensor:
    """Weights that are some, finite means, positive scales, three by three."""
    checks = []
    for w, loc, scale in zip(batch[::3], batch[1::3], batch[2::3], strict=True):
        checks.append((w >= 0).all(-1) & (w.sum(-1) > 0) & w.isfinite().all(-1))
        checks.append(loc.isfinite().all(-1) & (loc.abs() < 2.0**12).all(-1))
        checks.append(((scale > 2.0**-12) & (scale < 2.0**12)).all(-1))
    return torch.stack(checks).all(0)


def _line(p: str, q: str, counts: tuple[int, int]) -> Subject:
    """KL on the line; with a count of 1 for a plain Normal."""

    def expand(plan: Plan, dtype: torch.dtype) -> Batch:
        rng = plan.generator()
        k = [plan.size if c > 1 else 1 for c in counts]
        a, b = (_lines(plan, rng, ON_A_LINE, n, dtype) for n in k)
        if k[0] == k[1] and plan.relation == "equal":
            b = a
        elif k[0] == k[1] and plan.relation == "ratio":
            b = (a[0], neighbours(a[1], plan, rng), neighbours(a[2], plan, rng))
        return (*a, *b)

    def rule(*batch: Tensor) -> Tensor:
        return registry.kl_divergence(_on_the_line(*batch[:3]), _on_the_line(*batch[3:]))

    def reference(*row: Any) -> Number:
        return truths.line(_rows(*row[:3]), _rows(*row[3:]))

    return Subject(
        name=f"{p}-{q}",
        parameters=tuple(f"{name}_{side}" for side in "pq" for name in ("weights", "loc", "scale")),
        rules={"stablekl": rule},
        reference=reference,
        draw=plans(("near", "ratio", "apart", "equal"), (2, 2, 2, 3, 5)),
        expand=expand,
        valid=_valid,
        scale=one_plus,
        floor=1.0,
        unit=UNIT,
        elementwise=False,
        cost=500.0,
        bars=BARS,
    )


def _line_gradient(value: Subject) -> Subject:
    """The gradient of a KL on the line, for mixtures of two components."""

    def expand(plan: Plan, dtype: torch.dtype) -> Batch:
        return tuple(x[: ON_A_LINE // 4] for x in value.expand(plan, dtype))

    def reference(*row: Any) -> list[list[Number]]:
        p, q = _rows(*row[:3]), _rows(*row[3:])
        if p == q:
            return [[mp.mpf(0)] * len(x) for x in row]
        found = truths.line_gradients(p, q)
        # the weight of a plain Normal is no parameter of it
        return [[mp.mpf(0)] if i % 3 == 0 and len(g) == 1 else g for i, g in enumerate(found)]

    def scale(top: Number, row: Sequence[Tensor]) -> Number:
        # a derivative by a weight is a difference of divergences
        kl = float(value.rules["stablekl"](*(x.double().unsqueeze(0) for x in row)))
        return 1 + top + (mp.mpf(kl) if math.isfinite(kl) else 0)

    return replace(
        value,
        name=f"gradient {value.name}",
        rules={name: differentiated(rule) for name, rule in value.rules.items()},
        reference=reference,
        expand=expand,
        draw=plans(("near", "ratio", "apart"), (2,)),
        scale=scale,
        unit="eps (1 + KL + abs(gradient))",
        divergence=False,
        cost=2000.0,
        bars={dtype: 2 * bar for dtype, bar in BARS.items()},
    )


def _pair(kind: str) -> Subject:
    """KL of a mixture of two Gaussians over vectors to one Gaussian."""
    draws = gaussian.expansion(kind, kind)

    def expand(plan: Plan, dtype: torch.dtype) -> Batch:
        rng = plan.generator()
        parts = draws(plan, dtype)
        n = min(len(parts[0]), COUNT)
        loc = torch.stack([parts[0][:n], parts[2][:n]], 1)
        value = torch.stack([parts[1][:n], parts[3][:n]], 1)
        other = draws(Plan("apart", plan.seed + 1, plan.centre, plan.spread, plan.step, plan.size), dtype)
        m = min(n, len(other[0]))
        return mixture_weights(plan, rng, m, 2, dtype), loc[:m], value[:m], other[2][:m], other[3][:m]

    def rule(w: Tensor, loc: Tensor, value: Tensor, loc_q: Tensor, value_q: Tensor) -> Tensor:
        components = OurMultivariateNormal(loc, **{kind: value}, validate_args=False)
        p = MixtureSameFamily(Categorical(probs=w, validate_args=False), components, validate_args=False)
        return registry.kl_divergence(p, OurMultivariateNormal(loc_q, **{kind: value_q}, validate_args=False))

    def reference(w: Any, loc: Any, value: Any, loc_q: Any, value_q: Any) -> Number:
        components = [Gaussian(m, kind, v) for m, v in zip(loc, value, strict=True)]
        return truths.kl_to_gaussian(w, components, Gaussian(loc_q, kind, value_q))

    def valid(w: Tensor, loc: Tensor, value: Tensor, loc_q: Tensor, value_q: Tensor) -> Tensor:
        check = gaussian.validity(kind, kind)
        weights = (w >= 0).all(-1) & (w.sum(-1) > 0)
        return weights & check(loc[:, 0], value[:, 0], loc_q, value_q) & check(loc[:, 1], value[:, 1], loc_q, value_q)

    def scale(top: Number, row: Sequence[Tensor]) -> Number:
        return mp.mpf(float(gaussian.kappa(kind, row[4:]))) * (1 + top)

    return Subject(
        name=f"MixtureSameFamily-MultivariateNormal({kind})",
        parameters=("weights", "loc_p", f"{kind}_p", "loc_q", f"{kind}_q"),
        rules={"stablekl": rule},
        reference=reference,
        draw=plans(("near", "ratio", "apart", "equal"), (1, 2, 2, 3, 4, 8, 16)),
        expand=expand,
        valid=valid,
        scale=scale,
        unit=UNIT if kind == "scale_diag" else f"{UNIT} max(1, cond)",
        floor=1.0,
        kappa=lambda *batch: gaussian.kappa(kind, batch[4:]),
        elementwise=False,
        cost=60.0,
        bars=BARS,
    )


def _density(name: str, component: Callable[..., Distribution], ours: Callable[..., Distribution]) -> Subject:
    """The log-density of a mixture on the line or, for MultivariateNormal, of diagonal components over vectors."""
    vectors = name == "MultivariateNormal"

    def expand(plan: Plan, dtype: torch.dtype) -> Batch:
        rng = plan.generator()
        w, loc, scale = _lines(plan, rng, COUNT, plan.size, dtype)
        if vectors:
            loc = torch.stack([loc, loc.flip(-1)], -1).contiguous()
            scale = torch.stack([scale, scale.roll(1, -1)], -1).contiguous()
        k = torch.from_numpy(rng.integers(0, plan.size, len(w)))
        pick = torch.arange(len(w))
        z = torch.from_numpy(rng.standard_normal(loc[:, 0].shape) * np.exp2(6 * plan.step * rng.uniform(size=1)))
        x = (loc[pick, k].double() + scale[pick, k].double() * z).to(dtype)
        return x, w, loc, scale

    def rule(cls: Any, build: Callable[..., Distribution]) -> Callable[..., Tensor]:
        def log_prob(x: Tensor, w: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
            mixture = cls(Categorical(probs=w, validate_args=False), build(loc, scale), validate_args=False)
            found: Tensor = mixture.log_prob(x)
            return found

        return log_prob

    def reference(x: Any, w: Any, loc: Any, scale: Any) -> Number:
        if not vectors:
            return truths.line_log_density(x, _rows(w, loc, scale))
        components = [Gaussian(m, "scale_diag", s) for m, s in zip(loc, scale, strict=True)]
        return truths.log_density(x, w, components)

    def valid(x: Tensor, w: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        n = len(w)
        flat = (loc.reshape(n, -1), scale.reshape(n, -1))
        return _valid(w, *flat) & x.reshape(n, -1).isfinite().all(-1) & (x.reshape(n, -1).abs() < 2.0**20).all(-1)

    return Subject(
        name=f"log_prob MixtureSameFamily({name})",
        parameters=("x", "weights", "loc", "scale"),
        rules={"torch": rule(TorchMixture, component), "stablekl": rule(MixtureSameFamily, ours)},
        reference=reference,
        draw=plans(("near", "apart"), (2, 2, 3, 8)),
        expand=expand,
        valid=valid,
        scale=one_plus,
        floor=1.0,
        unit="eps (1 + abs(log p))",
        divergence=False,
        elementwise=False,
        cost=1.0,
        bars={torch.float64: 16.0, torch.float32: 4.0, torch.float16: 1.0, torch.bfloat16: 1.0},
    )


def subjects() -> Iterator[Subject]:
    """All of them."""
    for p, q in (("MixtureSameFamily", "Normal"), ("Normal", "MixtureSameFamily"), ("MixtureSameFamily",) * 2):
        value = _line(p, q, (1 if p == "Normal" else 2, 1 if q == "Normal" else 2))
        yield value
        yield _line_gradient(value)
    for kind in ("scale_diag", "scale_tril", "covariance_matrix"):
        yield _pair(kind)

    def plain(loc: Tensor, scale: Tensor) -> Distribution:
        return TorchNormal(loc, scale, validate_args=False)

    yield _density("Normal", plain, plain)
    yield _density(
        "MultivariateNormal",
        lambda loc, s: MultivariateNormal(loc, scale_tril=torch.diag_embed(s), validate_args=False),
        lambda loc, s: OurMultivariateNormal(loc, scale_diag=s, validate_args=False),
    )
