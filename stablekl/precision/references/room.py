"""Extra bits for where small numbers meet large ones.

Two precisions also agree where both of them lose the same number entirely: log(1 + x) - x is -x at any precision that
has no room for 1 + x. A reference whose terms compensate each other therefore works with enough bits to lose nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .context import mp

__all__ = ["room"]

# 2^-2700 is below the square of every float64: of numbers further apart, one does not show in a result.
_WIDEST = 2700


def _exponents(item: Any) -> Iterator[int]:
    if isinstance(item, (list, tuple)):
        for i in item:
            yield from _exponents(i)
    elif item and mp.isfinite(item):
        yield int(mp.mag(item))


def room(*items: Any, power: int = 2) -> int:
    """The bits of a power of the largest ratio of any two of these numbers and 1, to add to a precision.

    Args:
        items: numbers and nested lists of them; zeros, infinities and NaNs do not count.
        power: 2 where a result is of second order in the smallest of them, 1 where it is of first order.
    """
    exponents = [1, *_exponents(items)]
    return power * min(max(exponents) - min(exponents), _WIDEST)
