"""Every float32 there is: the primitives of one argument over all 2^32 bit patterns, with a histogram of their errors.

The truth is float64, by formulas that share nothing with stablekl's and are good to 2^-12 of a float32 ulp; mpmath
confirms the worst input of each of the 512 binades, and it is its figure that is reported.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .. import parameterizations, special
from .metrics import group_error, rough_ulps
from .references import special as truths
from .references.context import Number, agreed, exact, mp

__all__ = ["EDGES", "NAMES", "Sweep", "sweep"]

Function = Callable[[Tensor], Tensor]
# Upper ends of the histogram's bins, in ulps; what is beyond the last, or wrongly NaN or infinite, has a bin of its own.
EDGES = (0.5, 0.501, 0.51, 0.6, 1.0, 2.0, 4.0, math.inf)
_BINADE = 2**23


def _series(x: Tensor, coefficients: list[float]) -> Tensor:
    total = torch.zeros_like(x)
    for c in reversed(coefficients):
        total = total * x + c
    return x * x * total


def _log1pmx(x: Tensor) -> Tensor:
    small = _series(x, [(-1) ** (k + 1) / k for k in range(2, 10)])
    # log1p(x) - x at x = inf would be inf - inf
    far = torch.where(x.isinf(), -x, torch.log1p(x) - x)
    return torch.where(x.abs() < 2.0**-7, small, far)


def _expm1mx(x: Tensor) -> Tensor:
    small = _series(x, [1 / math.factorial(k) for k in range(2, 12)])
    far = torch.where(x == torch.inf, x, torch.expm1(x) - x)
    return torch.where(x.abs() < 2.0**-4, small, far)


def _softplus(x: Tensor) -> Tensor:
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


@dataclass(frozen=True)
class Primitive:
    """A function of one argument: stablekl's, its formula for devices without lifting, torch's, and two truths."""

    rules: dict[str, Function]
    wide: Function
    reference: Callable[[Number], Number]


# "native" is the float32 formula that other devices than a CPU take, here with the CPU's log1p and expm1.
PRIMITIVES = {
    "log1pmx": Primitive(
        {"torch": lambda x: torch.log1p(x) - x, "stablekl": special.log1pmx, "native": special.log1pmx_value},
        _log1pmx,
        truths.log1pmx_at,
    ),
    "expm1mx": Primitive(
        {"torch": lambda x: torch.expm1(x) - x, "stablekl": special.expm1mx, "native": special.expm1mx_value},
        _expm1mx,
        truths.expm1mx_at,
    ),
    "log_ndtr": Primitive(
        {"torch": torch.special.log_ndtr, "stablekl": special.log_ndtr, "native": special.log_ndtr_value},
        torch.special.log_ndtr,
        truths.log_ndtr_at,
    ),
    "softplus_scale": Primitive(
        {"torch": torch.nn.functional.softplus, "stablekl": parameterizations.softplus_scale},
        _softplus,
        truths.softplus_scale_at,
    ),
}
NAMES = tuple(PRIMITIVES)


@dataclass
class Sweep:
    """One implementation of a primitive over all float32.

    Attributes:
        name: of the primitive.
        impl: the implementation.
        worst: the largest error of a finite result in ulps, confirmed by mpmath.
        worst_input: where.
        worst_value: what was computed there.
        worst_truth: the true result there.
        counts: by bin of `EDGES`, of all arguments, NaN included.
        wrong: NaN or infinite results where the truth is a number of the dtype, or the reverse.
        seconds: that it took.
    """

    name: str
    impl: str
    worst: float = 0.0
    worst_input: float = math.nan
    worst_value: float = math.nan
    worst_truth: Number = field(default_factory=lambda: mp.mpf(0))
    counts: list[int] = field(default_factory=lambda: [0] * len(EDGES))
    wrong: int = 0
    seconds: float = 0.0


def sweep(name: str, device: str = "cpu", binades: range = range(512)) -> list[Sweep]:
    """All float32 arguments of a primitive, binade by binade.

    Args:
        name: one of ``NAMES``.
        device: where the implementations run.
        binades: the leading nine bits of the arguments to go through.
    """
    primitive, found = PRIMITIVES[name], {impl: Sweep(name, impl) for impl in PRIMITIVES[name].rules}
    edges = torch.tensor(EDGES[:-1], dtype=torch.float64)
    for leading in binades:
        first = leading * _BINADE
        pattern = torch.arange(first, first + _BINADE, dtype=torch.int64)
        x = torch.from_numpy(pattern.numpy().astype(np.uint32).view(np.float32))
        wide = primitive.wide(x.double())
        for impl, rule in primitive.rules.items():
            start, record = time.monotonic(), found[impl]
            computed = rule(x.to(device)).cpu()
            error = rough_ulps(computed, wide, torch.float32)
            wrong = error.isinf()
            record.wrong += int(wrong.sum())
            binned = torch.bincount(torch.bucketize(error, edges), minlength=len(EDGES)).tolist()
            record.counts = [a + b for a, b in zip(record.counts, binned, strict=True)]
            _confirm(record, primitive.reference, x, computed, torch.where(wrong, -1.0, error))
            record.seconds += time.monotonic() - start
    return list(found.values())


def _confirm(record: Sweep, reference: Callable[[Number], Number], x: Tensor, computed: Tensor, error: Tensor) -> None:
    """Have mpmath judge the worst of a binade."""
    i = int(error.argmax())
    if error[i] < 0 or not x[i].isfinite():
        return
    truth = agreed(lambda: reference(exact(x[i])))
    confirmed = group_error([float(computed[i])], [truth], torch.float32)
    if confirmed > record.worst:
        record.worst, record.worst_input, record.worst_value = confirmed, float(x[i]), float(computed[i])
        record.worst_truth = truth
