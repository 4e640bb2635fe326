"""How wrong a result is: a number for every result, whatever it is.

One *ulp* is the spacing of the dtype's numbers at the truth: below the smallest normal number that of the subnormals,
above the largest that of the last binade. A correctly rounded result is off by 0.5 at most. Nothing excuses an error
but its unit: inputs are exact floats, however close p is to q.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .references.context import Number, mp

__all__ = ["group_error", "rough_ulps", "ulp", "ulp_error", "worst_ulp"]

_BITS = 200  # of the arithmetic on errors; truths have more than 80 good ones


def ulp(truth: Number, dtype: torch.dtype) -> Number:
    """The spacing of the numbers of ``dtype`` at a finite ``truth``."""
    info = torch.finfo(dtype)
    # info.tiny and info.max are finite, so their exponents are those of the normal range
    lowest, highest = math.frexp(info.tiny)[1] - 1, math.frexp(info.max)[1] - 1
    binade = min(max(int(mp.frexp(truth)[1]) - 1, lowest), highest) if truth else lowest
    return mp.ldexp(mp.mpf(info.eps), binade)


def _overflow(dtype: torch.dtype) -> Number:
    """The least number that rounds to infinity: half an ulp beyond the largest."""
    info = torch.finfo(dtype)
    return mp.mpf(info.max) * (1 + mp.mpf(info.eps) / 4)


def group_error(
    computed: Sequence[float], truth: Sequence[Number], dtype: torch.dtype, scale: Number | None = None
) -> float:
    """The largest error in a group of numbers, in ulps of the group's largest true number.

    Args:
        computed: numbers of ``dtype``: one result, or all components of the gradient in one parameter (components
            change sign, so none is held to ulps of its own).
        truth: the real numbers they stand for, to more digits; infinite or NaN where the function is.
        dtype: a floating-point dtype.
        scale: measure in units of ``eps * scale`` instead of ulps.

    Returns:
        0 for NaN where the truth is NaN, and for an infinity where the truth is that infinity or rounds to it;
        infinity for any other disagreement between NaN, infinities and numbers.
    """
    with mp.workprec(_BITS):
        finite = [abs(t) for t in truth if mp.isfinite(t)]
        unit = ulp(max(finite, default=mp.mpf(0)), dtype) if scale is None else torch.finfo(dtype).eps * mp.mpf(scale)
        return max(map(lambda c, t: _error(c, t, unit, _overflow(dtype)), computed, truth), default=0.0)


def _error(value: float, truth: Number, unit: Number, overflow: Number) -> float:
    if math.isnan(value) or mp.isnan(truth):
        return 0.0 if math.isnan(value) and mp.isnan(truth) else math.inf
    if mp.isinf(truth):
        return 0.0 if value == float(truth) else math.inf
    if math.isinf(value):
        return 0.0 if abs(truth) >= overflow and (value > 0) == (truth > 0) else math.inf
    return float(abs(mp.mpf(value) - truth) / unit)


def ulp_error(computed: float | Tensor, truth: Any, dtype: torch.dtype) -> float:
    """The distance of one number from the truth, in ulps; see `group_error`."""
    value = float(computed.detach() if isinstance(computed, Tensor) else computed)
    with mp.workprec(_BITS):
        return group_error([value], [mp.mpf(truth)], dtype)


def worst_ulp(computed: Tensor, truths: Iterable[Any]) -> float:
    """The largest `ulp_error` of a tensor's entries in its own dtype."""
    entries = computed.detach().reshape(-1).double().tolist()
    return max(ulp_error(c, t, computed.dtype) for c, t in zip(entries, truths, strict=True))


def rough_ulps(computed: Tensor, truth: Tensor, dtype: torch.dtype) -> Tensor:
    """`ulp_error` of whole batches at once, by float64 truths: good enough to choose what mpmath then judges.

    Args:
        computed: results of ``dtype``, in any dtype that holds them.
        truth: float64, of the same shape.
        dtype: the dtype whose ulps are meant.

    Returns:
        float64 errors of the same shape; infinite where one of the two is NaN or infinite and the other is not that.
    """
    info = torch.finfo(dtype)
    computed, truth = computed.double(), truth.double()
    size = truth.abs().clamp(info.tiny, info.max)
    unit = torch.ldexp(torch.full_like(size, info.eps), torch.frexp(size)[1] - 1)
    same = (computed == truth) | (computed.isnan() & truth.isnan())
    rounded = computed.isinf() & (truth.abs() >= info.max) & (computed.sign() == truth.sign())
    error = (computed - truth).abs() / unit
    broken = ~(computed.isfinite() & truth.isfinite())
    return torch.where(same | rounded, 0.0, torch.where(broken, torch.inf, error))
