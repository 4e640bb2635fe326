"""Families on the line: every closed-form KL that torch registers between them, gradients, and log-densities."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import kl as torch_kl

from ... import distributions, registry
from ..batches import RELATIONS, Batch, Expand, Plan, narrowed, plans, related, scalars
from ..references import FAMILIES
from ..references.context import Number, mp
from ..references.family import Family, kl
from ..references.student_t import kl_gradient as student_t_gradient
from ..subject import Rule, Subject, differentiated, divergence_of, gradient_of, settled

__all__ = ["subjects"]

COUNT = 2048
# torch computes these by their base distributions, or as a subclass; its registry does not name them.
INHERITED = (
    ("Chi2", "Chi2"),
    ("HalfCauchy", "HalfCauchy"),
    ("InverseGamma", "InverseGamma"),
    ("LogNormal", "LogNormal"),
)
# Pairs that torch lacks.
ADDED = (
    ("Kumaraswamy", "Beta"),
    *((p, "Laplace") for p in ("Beta", "ContinuousBernoulli", "Exponential", "Gamma", "Gumbel", "Pareto", "Uniform")),
    *((p, "Weibull") for p in ("Exponential", "Gamma", "Weibull")),
    *((p, q) for p in ("HalfNormal", "Weibull") for q in ("Exponential", "Gamma")),
    *((p, "HalfNormal") for p in ("Exponential", "Gamma")),
    *((p, "LogNormal") for p in ("Exponential", "Gamma", "Weibull")),
    *(("LogNormal", q) for q in ("Exponential", "Gamma", "Weibull")),
    *(("InverseGamma", q) for q in ("Exponential", "Gamma")),
    ("Gamma", "InverseGamma"),
)
ELSEWHERE = {("Kumaraswamy", "Kumaraswamy")}  # in `integrated`
ON_UNIT_INTERVAL, ON_HALF_LINE = ("Beta", "ContinuousBernoulli"), ("Exponential", "Gamma", "Pareto")
# torch's sampler, which rejects, does not end at extreme concentrations.
UNSAMPLED = ("VonMises",)
# Probabilities that torch's constructors or rules exclude, so that what is stored is what was passed.
EXCLUDED = {"ContinuousBernoulli": (True, True), "Geometric": (True, False), "NegativeBinomial": (False, True)}
# Milliseconds of references that are integrals, and gradients that have one of their own.
COSTS = {"StudentT": 300.0}
GRADIENTS = {"StudentT": student_t_gradient}
CANCELS = "a derivative changes sign, or is small beside the other parameter's, where terms of it cancel"
# Of gradients.
LIMITS: dict[str, dict[torch.dtype, str]] = {
    "Normal": {
        torch.float64: "twice the digits are not enough for q's scale where all but 2^-56 of its two terms cancels"
    },
    **{
        name: {torch.float64: CANCELS}
        for name in (
            *("Beta", "Cauchy", "Gamma", "GeneralizedPareto", "Gumbel", "InverseGamma", "Kumaraswamy"),
            *("Laplace", "LogNormal", "Pareto", "StudentT", "VonMises", "Weibull"),
        )
    },
}
# The largest error of a family's rule that the project aims at; of one between two families.
_SHAPES = ("Beta", "Chi2", "Gamma", "InverseGamma", "NegativeBinomial", "StudentT", "VonMises", "Weibull")
SELF, _SHAPE, CROSS = 8.0, 16.0, 64.0
_DENSITY = 4.0


def bars(bar: float) -> dict[torch.dtype, float]:
    """By dtype; half precision is rounded once."""
    return {torch.float64: bar, torch.float32: bar, torch.float16: 1.0, torch.bfloat16: 1.0}


def torch_class(name: str) -> Any:
    """The class of torch by that name."""
    return getattr(torch.distributions, name)


def registered_pairs() -> list[tuple[str, str]]:
    """The pairs of these families that torch has a rule for, by name, and some that it lacks."""
    names = {(p.__name__, q.__name__) for p, q in torch_kl._KL_REGISTRY if p.__module__.startswith("torch.")}
    known = {pair for pair in names - ELSEWHERE if pair[0] in FAMILIES and pair[1] in FAMILIES}
    return sorted(known | set(INHERITED) | set(ADDED))


# ---- rules --------------------------------------------------------------------------------------------------------


def _built(classes: tuple[Any, Any], batch: Batch) -> tuple[torch.distributions.Distribution, ...]:
    widths = [len(FAMILIES[c.__name__].parameters) for c in classes]
    names = [list(FAMILIES[c.__name__].parameters) for c in classes]
    halves = batch[: widths[0]], batch[widths[0] :]
    return tuple(
        c(**dict(zip(n, half, strict=True)), validate_args=False)
        for c, n, half in zip(classes, names, halves, strict=True)
    )


def rules(p: str, q: str) -> dict[str, Rule]:
    """The rule of torch for a pair, and stablekl's where it has one of its own."""
    classes = torch_class(p), torch_class(q)
    found: dict[str, Rule] = {"torch": lambda *batch: torch_kl.kl_divergence(*_built(classes, batch))}
    torchs = torch_kl._dispatch_kl(*classes)
    ours = torchs.__module__.startswith("stablekl.")
    if ours:  # torch has none, and found the one that stablekl registered
        del found["torch"]
    if ours or registry.rule_for(classes[0], classes[1]) is not torchs:
        # our own class where there is one
        own = getattr(distributions, p, classes[0]), getattr(distributions, q, classes[1])
        found["stablekl"] = lambda *batch: registry.kl_divergence(*_built(own, batch))
    return found


# ---- inputs -------------------------------------------------------------------------------------------------------


def _within(name: str, drawn: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Without the probabilities that the family excludes."""
    if name in EXCLUDED:
        eps = torch.finfo(dtype).eps
        low, high = EXCLUDED[name]  # whether 0 and 1 are
        drawn["probs"] = drawn["probs"].clamp(2 * eps if low else 0, 1 - 2 * eps if high else 1)
    return drawn


def single(name: str, partner: str, plan: Plan, dtype: torch.dtype, rng: np.random.Generator) -> dict[str, Tensor]:
    """Parameters of one family, such that it can lie inside the support of its partner."""
    family = FAMILIES[name]
    if name != "Uniform":
        drawn = scalars(family.parameters, plan, dtype, COUNT, rng)
        return _within(name, drawn, dtype)
    if partner in ON_UNIT_INTERVAL:
        a, b = (scalars({"x": "probability"}, plan, dtype, COUNT, rng)["x"] for _ in range(2))
        low, high = torch.minimum(a, b), torch.maximum(a, b)
        return {"low": torch.where(low < high, low, low / 2), "high": torch.where(high > 0, high, 1)}
    width = scalars({"x": "positive"}, plan, dtype, COUNT, rng)["x"]
    kind = "positive" if partner in ON_HALF_LINE else "real"
    low = scalars({"x": kind, "scale": "positive"}, plan, dtype, COUNT, rng)["x"]
    high = low + width
    return {"low": low, "high": torch.where(high > low, high, torch.nextafter(high, torch.full_like(high, torch.inf)))}


def _inside(p: str, q: str, a: dict[str, Tensor], b: dict[str, Tensor], rng: np.random.Generator) -> None:
    """Move q's support out around p's, for most rows; where p sticks out, the divergence is infinite."""
    some = torch.from_numpy(rng.uniform(size=COUNT) < 0.9)
    if p == q == "GeneralizedPareto":
        _contain(a, b, some)
    start = {"Uniform": "low", "Pareto": "scale"}
    if q == "Pareto" and p in start:
        low = torch.where(some, torch.minimum(a[start[p]], b["scale"]), b["scale"])
        b["scale"] = torch.where(low > 0, low, b["scale"])
    elif q == "Uniform" and p in ON_UNIT_INTERVAL:
        b["low"], b["high"] = (torch.where(some, bound(b[k]), b[k]) for k, bound in _UNIT_BOUNDS.items())
    elif q == "Uniform" and p == "Uniform":
        b["low"] = torch.where(some, torch.minimum(a["low"], b["low"]), b["low"])
        b["high"] = torch.where(some, torch.maximum(a["high"], b["high"]), b["high"])


def _contain(a: dict[str, Tensor], b: dict[str, Tensor], some: Tensor) -> None:
    """Of generalized Pareto distributions: some q that begin before p, and end, if at all, where p ends or later."""
    b["loc"] = torch.where(some, torch.minimum(a["loc"], b["loc"]), b["loc"])
    ends = some & (b["concentration"] < 0)
    xi = a["concentration"]
    a["concentration"] = torch.where(ends, -torch.where(xi == 0, 1, xi).abs(), xi)
    x, y = a["concentration"].double(), b["concentration"].double()
    least = (a["loc"].double() - b["loc"].double()) * -y + a["scale"].double() * (y / x)
    below = ends & (b["scale"].double() < least)
    b["scale"] = torch.where(below, least.to(b["scale"].dtype), b["scale"])


_UNIT_BOUNDS: dict[str, Callable[[Tensor], Tensor]] = {"low": lambda x: -x.abs(), "high": lambda x: 1 + x.abs()}


def expansion(p: str, q: str) -> Expand:
    """From a plan to a batch for a pair of families: all parameters of p, then all of q."""

    def expand(plan: Plan, dtype: torch.dtype) -> Batch:
        if p in COSTS:
            plan = narrowed(plan, dtype)
        rng = plan.generator()
        b = single(q, p, plan, dtype, rng)
        same = p == q and p != "Uniform"
        a = related(FAMILIES[p].parameters, b, plan, dtype, rng) if same else single(p, q, plan, dtype, rng)
        a = _within(p, a, dtype)
        if p == q == "Uniform" and plan.relation == "equal":
            a = dict(b)
        _inside(p, q, a, b, rng)
        return tuple(x[: 256 if p in COSTS else COUNT] for x in (*a.values(), *b.values()))

    return expand


def validity(*families: Family) -> Callable[..., Tensor]:
    """Which rows hold parameters of the families' domains."""
    checks: dict[str, Callable[[Tensor], Tensor]] = {
        "real": lambda x: x.isfinite(),
        "signed": lambda x: x.isfinite(),
        "positive": lambda x: (x > 0) & x.isfinite(),
        "nonnegative": lambda x: (x >= 0) & x.isfinite(),
        "probability": lambda x: (x >= 0) & (x <= 1),
        "count": lambda x: (x >= 1) & (x == x.floor()) & (x < 1e4),
    }
    domains = [d for family in families for d in family.parameters.values()]
    names = [type(family).__name__ for family in families for _ in family.parameters]

    def valid(*batch: Tensor) -> Tensor:
        columns = [checks[d](x) for d, x in zip(domains, batch, strict=True)]
        columns += [
            x == _within(n, {"probs": x}, x.dtype)["probs"]
            for n, d, x in zip(names, domains, batch, strict=True)
            if d == "probability"
        ]
        # the two parameters of a Uniform follow each other
        bounds = [i for i, name in enumerate(names) if name == "Uniform"]
        columns += [batch[low] < batch[high] for low, high in zip(bounds[::2], bounds[1::2], strict=True)]
        return torch.stack(columns).all(0)

    return valid


# ---- subjects -----------------------------------------------------------------------------------------------------


def _reference(p: Family, q: Family) -> Callable[..., Number]:
    split = len(p.parameters)

    return lambda *theta: kl(p, theta[:split], q, theta[split:])


def divergence(p: str, q: str) -> Subject:
    """The KL divergence of a pair of families."""
    families = FAMILIES[p], FAMILIES[q]
    relations = RELATIONS if p == q and p != "Uniform" else ("apart",)
    return Subject(
        name=f"{p}-{q}",
        parameters=tuple(f"{name}_{side}" for side, f in zip("pq", families, strict=True) for name in f.parameters),
        rules=rules(p, q),
        reference=(divergence_of if p == q else settled)(_reference(*families)),
        draw=plans(relations),
        expand=expansion(p, q),
        valid=validity(*families),
        elementwise=p not in COSTS,
        cost=COSTS.get(p, 0.5),
        bars=bars(CROSS if p != q or p == "GeneralizedPareto" else _SHAPE if p in _SHAPES else SELF),
    )


def gradient(value: Subject, p: str, q: str) -> Subject:
    """The gradient of `divergence` in every parameter, inside their ranges: at an end there is no two-sided one."""
    domains = [d for family in (FAMILIES[p], FAMILIES[q]) for d in family.parameters.values()]

    def valid(*batch: Tensor) -> Tensor:
        inside = [x < 1 if d == "probability" else x == x for d, x in zip(domains, batch, strict=True)]
        inside += [x > 0 for d, x in zip(domains, batch, strict=True) if d in ("probability", "nonnegative")]
        if p == "Pareto":  # the smallest value of p is an end of its range
            inside.append(batch[0] > batch[2])
        if p == "GeneralizedPareto":  # so are that, where both supports end, and 0
            loc_p, scale_p, xi_p, loc_q, scale_q, xi_q = (x.double() for x in batch)
            beyond = xi_p * scale_q < xi_q * (scale_p + xi_p * (loc_q - loc_p)) * (1 + 1e-9)
            inside.append((loc_p > loc_q) & (xi_p != 0) & ((xi_q > 0) | ((xi_p < 0) & beyond)))
        return value.valid(*batch) & torch.stack(inside).all(0)

    def expand(plan: Plan, dtype: torch.dtype) -> Batch:
        batch = value.expand(plan, dtype)
        good = valid(*batch)
        return tuple(x[good] for x in batch)

    return replace(
        value,
        name=f"gradient {value.name}",
        rules={name: differentiated(rule) for name, rule in value.rules.items()},
        limit=LIMITS.get(p, {}),
        reference=GRADIENTS.get(p) or gradient_of(_reference(FAMILIES[p], FAMILIES[q])),
        expand=expand,
        valid=valid,
        draw=plans(("near", "ratio", "apart")),
        divergence=False,
        cost=max(10.0, 2 * value.cost),
        bars={dtype: 2 * bar for dtype, bar in value.bars.items()},
    )


# log2 of the largest and smallest count
_COUNTS = 40.0


def unequal_counts() -> Subject:
    """The KL divergence of negative binomial distributions whose counts differ, and are no whole numbers."""
    name = "NegativeBinomial"
    value = divergence(name, name)

    def expand(plan: Plan, dtype: torch.dtype) -> Batch:
        rng = plan.generator()
        _, p, _, q = value.expand(plan, dtype)
        s = torch.from_numpy(np.exp2(plan.logs(rng, (COUNT,), _COUNTS))).to(dtype)
        r = related({"x": "positive"}, {"x": s}, plan, dtype, rng)["x"].clamp(2.0**-_COUNTS, 2.0**_COUNTS)
        # means that all but agree, from counts that do not
        means = r.double() * (p.double() / (1 - p.double()))
        some = torch.from_numpy(rng.uniform(size=COUNT) < 0.1)
        q = torch.where(some, _within(name, {"probs": (means / (means + s.double())).to(dtype)}, dtype)["probs"], q)
        return r, p, s, q

    def valid(r: Tensor, p: Tensor, s: Tensor, q: Tensor) -> Tensor:
        one = torch.ones_like(p)
        inside = [(x >= 2.0**-_COUNTS) & (x <= 2.0**_COUNTS) for x in (r, s)]
        return torch.stack([*inside, value.valid(one, p, one, q)]).all(0)

    return replace(
        value,
        name=f"{value.name} of other counts",
        draw=plans(("near", "ratio", "apart")),
        expand=expand,
        valid=valid,
        cost=3000,
        bars=bars(CROSS),
    )


def log_density(name: str) -> Subject:
    """The log-density of a family, at points drawn from it and around."""
    family, cls = FAMILIES[name], torch_class(name)

    def rule(by: Any) -> Rule:
        def log_prob(*batch: Tensor) -> Tensor:
            parameters = dict(zip(family.parameters, batch[1:], strict=True))
            found: Tensor = by(**parameters, validate_args=False).log_prob(batch[0])
            return found

        return log_prob

    rules = {"torch": rule(cls)}
    own = getattr(distributions, name, cls)
    if own.log_prob.__module__.startswith("stablekl."):
        rules["stablekl"] = rule(own)

    def valid(x: Tensor, *theta: Tensor) -> Tensor:
        good = validity(family)(*theta)
        if not good.any():
            return good
        # some of torch's constructors raise even when asked not to validate
        safe = [torch.where(good, t, t[good][0]) for t in theta]
        inside = cls(**dict(zip(family.parameters, safe, strict=True)), validate_args=False).support.check(x)
        result: Tensor = good & inside & x.isfinite()
        return result

    def expand(plan: Plan, dtype: torch.dtype) -> Batch:
        rng = plan.generator()
        theta = single(name, "", plan, dtype, rng)
        torch.manual_seed(plan.seed)
        # torch has no sampler of half precision for some
        wide = {name: x.double() for name, x in theta.items()}
        drawn = cls(**wide, validate_args=False).sample().to(dtype)
        stretch = torch.from_numpy(np.exp2(rng.normal(size=COUNT) * plan.step))
        far = (drawn.double() * stretch).to(dtype)
        x = torch.where(cls(**wide, validate_args=False).support.check(far.double()), far, drawn)
        # samples of an extreme distribution round to the ends of its support, or overflow
        inner = (1.5 * theta["scale"]).to(dtype) if "scale" in theta else torch.ones_like(x)
        x = torch.where(valid(x, *theta.values()), x, inner)
        good = valid(x, *theta.values())
        return tuple(v[good] for v in (x, *theta.values()))

    return Subject(
        name=f"log_prob {name}",
        parameters=("x", *family.parameters),
        rules=rules,
        reference=settled(family.log_density),
        draw=plans(("apart",)),
        expand=expand,
        valid=valid,
        scale=lambda top, row: max(mp.mpf(1), top),
        floor=1.0,
        unit="eps max(1, abs(log p))",
        divergence=False,
        bars=bars(_DENSITY),
    )


def subjects() -> Iterator[Subject]:
    """All of them."""
    for p, q in registered_pairs():
        value = divergence(p, q)
        yield value
        if p == q and not set(FAMILIES[p].parameters.values()) & {"count"} and p != "Uniform":
            yield gradient(value, p, q)
    yield unequal_counts()
    for name in FAMILIES:
        if name not in UNSAMPLED:
            yield log_density(name)
