"""Gaussians in many dimensions: every parameter of one, against itself, and diagonal against full."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent
from torch.distributions import LowRankMultivariateNormal as TorchLowRank
from torch.distributions import MultivariateNormal as TorchMVN
from torch.distributions import Normal as TorchNormal
from torch.distributions import kl as torch_kl

from ... import registry
from ...distributions import LowRankMultivariateNormal, MultivariateNormal
from ..batches import REACH, Array, Batch, Expand, Plan, neighbours, plans
from ..references import multivariate_normal as truths
from ..references.context import Number, mp
from ..subject import Rule, Subject, differentiated

__all__ = ["subjects"]

SIZES = (1, 2, 2, 3, 4, 4, 6, 8, 12, 16, 32)
# Largest log2 of cond(L): float32 covariances beyond cond(S) = 2^16 are not positive definite after rounding.
CONDITION = {torch.float64: 10.0, torch.float32: 8.0, torch.bfloat16: 2.0, torch.float16: 2.0}
KINDS = ("scale_tril", "covariance_matrix", "precision_matrix", "low_rank", "scale_diag")
# Where what two parameters say nearly cancels, nothing but their own rounding is left; the difference of two of one
# kind is exact.
_SIGNS = "the terms of the derivative in q's matrix cancel where it changes sign; what is left is eps times either"
_COMPENSATED = "a change of the factor and one of the diagonal that nearly compensate leave eps times either"
_CONVERTED = (
    "one of the two is converted to the other's kind, and nearly equal ones keep the rounding of that, eps cond"
)
# Of float64: float32 values are computed in it, but for factors.
LIMITS = {
    "gradient scale_tril": {torch.float32: _SIGNS, torch.float64: _SIGNS},
    "gradient precision_matrix": {torch.float64: _SIGNS},
    "low_rank": {torch.float64: _COMPENSATED},
    "gradient low_rank": {torch.float64: _COMPENSATED},
    "converted": {torch.float64: _CONVERTED},
}
BARS = {torch.float64: 16.0, torch.float32: 16.0, torch.float16: 1.0, torch.bfloat16: 1.0}

# A side of a subject: how many tensors it takes, and the distributions to build from them, torch's and ours.
Build = Callable[..., Distribution]


def _torch(kind: str) -> Build:
    if kind == "scale_diag":
        return lambda loc, scale: Independent(TorchNormal(loc, scale, validate_args=False), 1, validate_args=False)
    if kind == "low_rank":
        return lambda loc, w, d: TorchLowRank(loc, w, d, validate_args=False)
    return lambda loc, value: TorchMVN(loc, **{kind: value}, validate_args=False)


def _ours(kind: str) -> Build:
    if kind == "low_rank":
        return lambda loc, w, d: LowRankMultivariateNormal(loc, w, d, validate_args=False)
    return lambda loc, value: MultivariateNormal(loc, **{kind: value}, validate_args=False)


def _width(kind: str) -> int:
    return 3 if kind == "low_rank" else 2


def _rule(divergence: Callable[..., Tensor], p: Build, q: Build, split: int) -> Rule:
    return lambda *batch: divergence(p(*batch[:split]), q(*batch[split:]))


def _read(kind: str, side: Sequence[Any]) -> truths.Gaussian:
    loc, *value = side
    return truths.Gaussian(loc, kind, value[0] if len(value) == 1 else tuple(value))


# ---- inputs -------------------------------------------------------------------------------------------------------


def _roots(rng: np.random.Generator, plan: Plan, n: int, d: int, dtype: torch.dtype) -> Array:
    """Square roots of covariances, with singular values spread over the condition number that the plan allows."""
    u = np.linalg.qr(rng.standard_normal((n, d, d)))[0]
    spread = rng.uniform(-0.5, 0.5, (n, d)) * CONDITION[dtype] * plan.spread
    size = np.exp2(plan.centre * min(REACH[dtype] / 2, 100))
    result: Array = size * u * np.exp2(spread)[:, None, :]
    return result


def _lower(root: Array) -> Tensor:
    """The Cholesky factor of A A', by QR of A': a product would square the condition number."""
    r = np.linalg.qr(np.swapaxes(root, -1, -2))[1]
    signs = np.sign(np.diagonal(r, axis1=-2, axis2=-1))
    return torch.from_numpy(np.swapaxes(r * signs[..., None], -1, -2).copy()).tril()


def _symmetric(root: Array) -> Tensor:
    return _mirrored(torch.from_numpy(root @ np.swapaxes(root, -1, -2)))


def _mirrored(s: Tensor) -> Tensor:
    """Symmetric to the last bit: no rule need say what it makes of any other matrix."""
    return torch.triu(s) + torch.triu(s, 1).mT


def _value(kind: str, rng: np.random.Generator, plan: Plan, n: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    d = plan.size
    if kind == "low_rank":
        r = 1 + int(rng.integers(0, min(d, 4)))
        size = np.exp2(plan.centre * min(REACH[dtype] / 2, 100))
        w = (
            size
            * rng.standard_normal((n, d, r))
            * np.exp2(rng.uniform(-1, 1, (n, 1, 1)) * CONDITION[dtype] * plan.spread / 2)
        )
        variances = size**2 * np.exp2(rng.uniform(-1, 1, (n, d)) * CONDITION[dtype] * plan.spread)
        return torch.from_numpy(w).to(dtype), torch.from_numpy(variances).to(dtype)
    root = _roots(rng, plan, n, d, dtype)
    if kind == "scale_diag":
        return (torch.from_numpy(np.linalg.norm(root, axis=-1)).to(dtype),)
    return ((_lower(root) if kind == "scale_tril" else _symmetric(root)).to(dtype),)


def _perturbed(kind: str, value: tuple[Tensor, ...], rng: np.random.Generator, plan: Plan) -> tuple[Tensor, ...]:
    """Some entries of each parameter a few units in the last place away, symmetric matrices symmetrically."""
    changed = []
    for x in value:
        y = neighbours(x, plan, rng, chance=min(0.6, 4 / x[0].numel()))
        changed.append(_mirrored(y) if kind in ("covariance_matrix", "precision_matrix") else y)
    return tuple(changed)


def _scaled(kind: str, value: tuple[Tensor, ...], rng: np.random.Generator, plan: Plan) -> tuple[Tensor, ...]:
    """The same axes with other scales: diag(c) S diag(c)."""
    n, d = len(value[0]), plan.size
    c = torch.from_numpy(np.exp2(rng.normal(size=(n, d)) * 2.0 ** (-12 * plan.step)))
    wide = tuple(x.double() for x in value)
    if kind == "low_rank":
        result: tuple[Tensor, ...] = (wide[0] * c.unsqueeze(-1), wide[1] * c * c)
    elif kind == "scale_diag":
        result = (wide[0] * c,)
    elif kind == "scale_tril":
        result = (wide[0] * c.unsqueeze(-1),)
    else:
        result = (_mirrored(wide[0] * c.unsqueeze(-1) * c.unsqueeze(-2)),)
    return tuple(x.to(value[0].dtype) for x in result)


def _scale(kind: str, value: tuple[Tensor, ...]) -> Tensor:
    """Standard deviations, roughly, to draw means by."""
    if kind == "low_rank":
        return (value[0].double().square().sum(-1) + value[1].double()).sqrt()
    if kind == "scale_diag":
        return value[0].double()
    if kind == "scale_tril":
        norms: Tensor = torch.linalg.vector_norm(value[0].double(), dim=-1)
        return norms
    diagonal = value[0].double().diagonal(dim1=-2, dim2=-1)
    return diagonal.sqrt() if kind == "covariance_matrix" else diagonal.rsqrt()


def expansion(kind_p: str, kind_q: str) -> Expand:
    """From a plan to a batch: mean and value of p, then of q."""

    def expand(plan: Plan, dtype: torch.dtype) -> Batch:
        rng, d = plan.generator(), plan.size
        n = int(np.clip(32768 // d**2, 32, 2048))
        q = _value(kind_q, rng, plan, n, dtype)
        scale = _scale(kind_q, q)
        offset = scale * torch.from_numpy(np.exp2(rng.uniform(-2, 4, (n, 1))) * rng.standard_normal((n, d)))
        loc_q = offset.to(dtype)
        if plan.relation == "apart" or kind_p != kind_q:
            p = _value(kind_p, rng, plan, n, dtype)
        elif plan.relation == "equal":
            p = q
        else:
            p = (_perturbed if plan.relation == "near" else _scaled)(kind_q, q, rng, plan)
        if plan.relation == "equal":
            loc_p = loc_q
        elif plan.relation == "near":
            loc_p = neighbours(loc_q, plan, rng, chance=0.5) if rng.uniform() < 0.7 else loc_q
        else:
            loc_p = (loc_q.double() + scale * torch.from_numpy(rng.standard_normal((n, d)))).to(dtype)
        batch = (loc_p, *p, loc_q, *q)
        good = validity(kind_p, kind_q, dtype)(*batch)
        # a covariance that rounding or a step has made indefinite is nobody's input
        return tuple(x[good] for x in batch) if good.any() else (loc_q, *q, loc_q, *q)

    return expand


def _good(kind: str, value: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    limit = 2.0 ** (CONDITION[dtype] + 2)
    wide = [x.double() for x in value]
    finite = torch.stack([x.reshape(len(x), -1).isfinite().all(-1) for x in wide]).all(0)
    if kind == "low_rank":
        return finite & (wide[1] > 0).all(-1)
    if kind == "scale_diag":
        return finite & (wide[0] > 0).all(-1)
    matrices = torch.where(finite[:, None, None], wide[0], torch.eye(wide[0].shape[-1], dtype=torch.float64))
    if kind == "scale_tril":
        positive = (matrices.diagonal(dim1=-2, dim2=-1) > 0).all(-1)
        # LAPACK would raise for a singular one
        conditioned: Tensor = torch.linalg.cond(matrices) < limit
        return finite & positive & conditioned
    values = torch.linalg.eigvalsh(matrices)
    # with room for the host, which factorises in the dtype of the matrix
    least = values[:, -1] * max(limit**-2, 8 * torch.finfo(dtype).eps)
    result: Tensor = finite & (values[:, 0] > least)
    return result


def validity(kind_p: str, kind_q: str, dtype: torch.dtype | None = None) -> Callable[..., Tensor]:
    """Which rows hold Gaussians."""
    split = _width(kind_p)

    def valid(*batch: Tensor) -> Tensor:
        p, q = (tuple(x for x in side) for side in (batch[:split], batch[split:]))
        locs = p[0].isfinite().all(-1) & q[0].isfinite().all(-1)
        used = dtype or batch[0].dtype
        return locs & _good(kind_p, p[1:], used) & _good(kind_q, q[1:], used)

    return valid


# ---- subjects -----------------------------------------------------------------------------------------------------


def kappa(kind: str, value: Sequence[Tensor]) -> Tensor:
    """cond(L) for scale_tril, cond(S) for the others, 1 where there is no matrix; of one parameter or a batch."""
    wide = [x.double() for x in value]
    if kind == "scale_diag":
        return torch.ones_like(wide[0][..., 0])
    matrix = wide[0] @ wide[0].mT + torch.diag_embed(wide[1]) if kind == "low_rank" else wide[0]
    found: Tensor = torch.linalg.cond(matrix).clamp(min=1.0)
    return found


def unit(*kinds: tuple[str, slice]) -> dict[str, Any]:
    """The unit max(1, kappa) times the truth, with the largest condition number of the values at these places."""

    def largest(*batch: Tensor) -> Tensor:
        return torch.stack([kappa(kind, batch[place]) for kind, place in kinds]).amax(0)

    def scale(top: Number, row: Sequence[Tensor]) -> Number:
        tiny = torch.finfo(row[0].dtype).tiny
        return mp.mpf(float(largest(*row))) * max(top, mp.mpf(tiny))

    return {"scale": scale, "kappa": largest}


def _parameters(kind: str, side: str) -> tuple[str, ...]:
    names = ("loc", "cov_factor", "cov_diag") if kind == "low_rank" else ("loc", kind)
    return tuple(f"{name}_{side}" for name in names)


def _name(kind_p: str, kind_q: str) -> str:
    family = {"low_rank": "LowRankMultivariateNormal", "scale_diag": "Independent"}
    p, q = (family.get(k, f"MultivariateNormal({k})") for k in (kind_p, kind_q))
    return f"{p}-{q}"


def divergence(kind_p: str, kind_q: str) -> Subject:
    """KL between two Gaussians given by two parameters."""
    split = _width(kind_p)
    rules: dict[str, Rule] = {}
    if (kind_p == "scale_diag") == (kind_q == "scale_diag"):  # torch has no rule for a diagonal against a matrix
        rules["torch"] = _rule(torch_kl.kl_divergence, _torch(kind_p), _torch(kind_q), split)
    rules["stablekl"] = _rule(registry.kl_divergence, _ours(kind_p), _ours(kind_q), split)

    def reference(*row: Any) -> Number:
        return truths.kl(_read(kind_p, row[:split]), _read(kind_q, row[split:]))

    same = kind_p == kind_q
    return Subject(
        name=_name(kind_p, kind_q),
        parameters=_parameters(kind_p, "p") + _parameters(kind_q, "q"),
        rules=rules,
        reference=reference,
        draw=plans(("near", "ratio", "apart", "equal") if same else ("apart",), SIZES),
        expand=expansion(kind_p, kind_q),
        valid=validity(kind_p, kind_q),
        **unit((kind_q, slice(split + 1, None))),
        unit="eps max(1, cond(Lq))" if kind_q == "scale_tril" else "eps max(1, cond(Sq))",
        elementwise=False,
        cost=3.0,
        bars=BARS,
        limit=LIMITS.get(kind_q if same else "converted" if "low_rank" in (kind_p, kind_q) else "", {}),
    )


def gradient(value: Subject, kind: str) -> Subject:
    """The gradient of `divergence` in every parameter, for two of one kind."""
    split = _width(kind)

    def reference(*row: Any) -> list[Any]:
        found = truths.gradients(_read(kind, row[:split]), _read(kind, row[split:]))
        if kind != "low_rank":
            return found
        return [found[0], *found[1], found[2], *found[3]]

    return replace(
        value,
        name=f"gradient {value.name}",
        rules={name: differentiated(rule) for name, rule in value.rules.items()},
        reference=reference,
        draw=plans(("near", "ratio", "apart"), (1, 2, 2, 3, 4, 6, 8)),
        # the derivative in the covariance of p holds its inverse
        **unit((kind, slice(1, split)), (kind, slice(split + 1, None))),
        unit=value.unit.replace("Lq", "Lp or Lq").replace("Sq", "Sp or Sq"),
        divergence=False,
        cost=6.0,
        limit=LIMITS.get(f"gradient {kind}", {}),
        bars={dtype: 2 * bar for dtype, bar in BARS.items()},
    )


def subjects() -> Iterator[Subject]:
    """All of them."""
    for kind in KINDS:
        value = divergence(kind, kind)
        yield value
        yield gradient(value, kind)
    yield divergence("scale_diag", "scale_tril")
    yield divergence("scale_tril", "scale_diag")
    yield divergence("scale_tril", "low_rank")
    yield divergence("low_rank", "scale_tril")
