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
from .references.context import Number, agreed, mp

__all__ = ["EDGES", "NAMES", "Sweep", "sweep"]

Function = Callable[[Tensor], Tensor]
# Upper ends of the histogram's bins, in ulps; the last holds what is wrongly NaN or infinite, too.
EDGES = (0.5, 0.501, 0.51, 0.6, 1.0, 2.0, 4.0, math.inf)
_BINADE, _BLOCK = 2**23, 2**17


def _series(x: Tensor, coefficients: list[float]) -> Tensor:
    total = torch.zeros_like(x)
    for c in reversed(coefficients):
        total = total * x + c
    return x * x * total


def _log1pmx(x: Tensor) -> Tensor:
    small = _series(x, [(-1) ** (k + 1) / k for k in range(2, 10)])
    # log1p(x) - x at x = inf would be inf - inf
    far = torch.where(x == torch.inf, -x, torch.log1p(x) - x)
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
        worst_truth: the true result there, to 20 digits (numbers of a private context cannot be sent to a process).
        counts: by bin of `EDGES`, of all arguments, NaN included.
        nan: results that are NaN where the truth is none.
        inf: results that are infinite where the truth is a number of the dtype, or the reverse.
        defect: the first argument of either.
        judged: arguments that mpmath judged, the worst of each binade.
        seconds: that it took.
    """

    name: str
    impl: str
    worst: float = 0.0
    worst_input: float = math.nan
    worst_value: float = math.nan
    worst_truth: str = ""
    counts: list[int] = field(default_factory=lambda: [0] * len(EDGES))
    nan: int = 0
    inf: int = 0
    defect: float | None = None
    judged: int = 0
    seconds: float = 0.0


def _ulps(computed: Tensor, truth: Tensor) -> Tensor:
    """`metrics.rough_ulps` for float32 results in fewer passes: an ulp is read off the exponent's bits of the truth."""
    exponent = (truth.view(torch.int64) & 0x7FF0000000000000).clamp_((1023 - 126) << 52, (1023 + 127) << 52)
    unit = (exponent - (23 << 52)).view(torch.float64)
    wide = computed.double()
    error = (wide - truth).abs_().div_(unit)
    if bool((error < torch.inf).all()):  # false for NaN too
        return error
    return rough_ulps(computed, truth, torch.float32)


def _counts(error: Tensor, edges: Tensor) -> list[int]:
    """How many errors are in each bin."""
    if float(error.max()) <= EDGES[0]:
        return [len(error), *[0] * (len(EDGES) - 1)]
    return torch.bincount(torch.bucketize(error, edges), minlength=len(EDGES)).tolist()


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
        worst = dict.fromkeys(found, (-1.0, math.nan, math.nan))
        for first in range(leading * _BINADE, (leading + 1) * _BINADE, _BLOCK):
            x = torch.from_numpy(np.arange(first, first + _BLOCK, dtype=np.uint32).view(np.float32))
            wide = primitive.wide(x.double())
            for impl, rule in primitive.rules.items():
                start, record = time.monotonic(), found[impl]
                computed = rule(x.to(device)).cpu()
                error = _ulps(computed, wide)
                record.counts = [a + b for a, b in zip(record.counts, _counts(error, edges), strict=True)]
                wrong = error.isinf()
                if bool(wrong.any()):
                    record.nan += int((wrong & computed.isnan()).sum())
                    record.inf += int((wrong & ~computed.isnan()).sum())
                    record.defect = float(x[wrong][0]) if record.defect is None else record.defect
                i = int(torch.where(wrong, -1.0, error).argmax())
                if float(error[i]) > worst[impl][0] and not wrong[i] and bool(x[i].isfinite()):
                    worst[impl] = float(error[i]), float(x[i]), float(computed[i])
                record.seconds += time.monotonic() - start
        for impl, record in found.items():
            _confirm(record, primitive.reference, *worst[impl])
    return list(found.values())


def _confirm(record: Sweep, reference: Callable[[Number], Number], error: float, x: float, computed: float) -> None:
    """Have mpmath judge the worst of a binade."""
    if error < 0:
        return
    record.judged += 1
    truth = agreed(lambda: reference(mp.mpf(x)))
    confirmed = group_error([computed], [truth], torch.float32)
    if confirmed >= record.worst:
        record.worst, record.worst_input, record.worst_value = confirmed, x, computed
        record.worst_truth = mp.nstr(truth, 20)
