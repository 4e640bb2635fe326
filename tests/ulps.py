"""The error metric of the suite: ulps of the correctly rounded result, defined for every input.

One ulp is the spacing of the dtype's numbers at the truth, that of its subnormals below the smallest normal
number, that of its largest binade above. A correctly rounded result is off by 0.5 at most.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import mpmath
import torch
from mpmath import mpf
from torch import Tensor

__all__ = ["ulp_error", "worst_ulp"]


def ulp_error(computed: float | Tensor, truth: mpf, dtype: torch.dtype) -> float:
    """The distance of ``computed`` from ``truth`` in ulps of ``dtype``.

    Args:
        computed: a number of ``dtype``.
        truth: the real number it stands for, to many more digits; infinite or NaN where the function is.
        dtype: a floating-point dtype.

    Returns:
        0 for NaN where the truth is NaN, and for an infinity where the truth is that infinity or rounds to it;
        infinity for any other disagreement between NaN, infinities and numbers.
    """
    value = float(computed.detach() if isinstance(computed, Tensor) else computed)
    info = torch.finfo(dtype)
    if math.isnan(value) or mpmath.isnan(truth):
        return 0.0 if math.isnan(value) and mpmath.isnan(truth) else math.inf
    if mpmath.isinf(truth):
        return 0.0 if value == float(truth) else math.inf
    with mpmath.workprec(max(mpmath.mp.prec, 200)):
        size = abs(truth)
        overflow = mpf(info.max) * (1 + mpf(info.eps) / 4)  # from half an ulp beyond the largest number
        if math.isinf(value):
            return 0.0 if size >= overflow and (value > 0) == (truth > 0) else math.inf
        binade = mpmath.frexp(size)[1] - 1 if size else 0
        # info.tiny and info.max are finite, so their exponents are those of the normal range
        lowest, highest = math.frexp(info.tiny)[1] - 1, math.frexp(info.max)[1] - 1
        binade = min(max(int(binade), lowest), highest) if size else lowest
        ulp = mpmath.ldexp(mpf(info.eps), binade)
        return float(abs(mpf(value) - truth) / ulp)


def worst_ulp(computed: Tensor, truths: Iterable[mpf]) -> float:
    """The largest `ulp_error` of a tensor's entries in its own dtype."""
    entries = computed.detach().reshape(-1).double().tolist()
    return max(ulp_error(c, t, computed.dtype) for c, t in zip(entries, truths, strict=True))
