"""The numbers that references are made of: a private mpmath context, and two precisions that must agree.

Nothing that a user sets in ``mpmath.mp`` reaches this context, and nothing here reaches theirs. mpmath takes gmpy2 for
its integers where it is installed, and gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from mpmath.ctx_mp import MPContext
from torch import Tensor

__all__ = ["PrecisionError", "agreed", "exact", "gradient", "mp"]

Number = Any  # an mpf of `mp`

mp: Any = MPContext()

# Bits. A KL near p = q cancels twice the distance of p from q (104 bits for neighbours in float64), so most values
# agree at the first two; the last serves scales at both ends of float64's range.
_LADDER = (160, 240, 360, 540, 800, 1200, 1800, 2700, 4000, 6000, 9000)
_GRADIENT_LADDER = (480, 720, 1080, 1600, 2400, 3600)
# Two precisions agree when they share this many bits: 53 of a float64 and 27 more.
_AGREEMENT = 80


class PrecisionError(ArithmeticError):
    """A reference did not settle at any precision."""


def exact(x: Tensor) -> Any:
    """The values of a tensor as nested lists of numbers; every float is exact, so nothing is rounded."""

    def convert(item: Any) -> Any:
        return [convert(i) for i in item] if isinstance(item, list) else mp.mpf(item)

    return convert(x.detach().double().tolist())


def _flat(item: Any) -> Iterator[Number]:
    if isinstance(item, (list, tuple)):
        for i in item:
            yield from _flat(i)
    else:
        yield item


def _close(a: Number, b: Number) -> bool:
    if not (mp.isfinite(a) and mp.isfinite(b)):
        return bool(a == b) or bool(mp.isnan(a) and mp.isnan(b))
    # A zero may be a difference of which nothing was left: only a higher precision can tell.
    return bool(a != 0 and abs(a - b) <= mp.ldexp(abs(b), -_AGREEMENT))


def agreed(f: Callable[[], Any], ladder: tuple[int, ...] = _LADDER) -> Any:
    """``f()`` at the first two successive precisions that agree, in each of its numbers.

    Args:
        f: returns a number, or nested lists of them, from numbers that do not change.
        ladder: working precisions in bits, rising.

    Returns:
        The result at the higher of the two. What has sunk below 2^-(a quarter of the bits) at the last precision,
        with nothing but rounding noise left of it, is 0.

    Raises:
        PrecisionError: no two of them agree.
    """
    before = None
    for bits in ladder:
        with mp.workprec(bits):
            now = f()
            if before is not None and all(_close(a, b) for a, b in zip(_flat(before), _flat(now), strict=True)):
                return now
            if bits != ladder[-1]:
                before = now
    noise = mp.ldexp(mp.mpf(1), -ladder[-1] // 4)
    for a, b in zip(_flat(before), _flat(now), strict=True):
        if not _close(a, b) and not (abs(a) < mp.sqrt(noise) and abs(b) < noise):
            raise PrecisionError(f"{mp.nstr(a, 20)} at {ladder[-2]} bits, {mp.nstr(b, 20)} at {ladder[-1]}")
    return _quiet(now, noise)


def _quiet(item: Any, noise: Number) -> Any:
    if isinstance(item, (list, tuple)):
        return [_quiet(i, noise) for i in item]
    return mp.mpf(0) if abs(item) < noise else item


def _moved(item: Any, path: tuple[int, ...], step: Number) -> Any:
    if not path:
        return item + step
    return [_moved(x, path[1:], step) if i == path[0] else x for i, x in enumerate(item)]


def _paths(item: Any) -> Iterator[tuple[int, ...]]:
    if isinstance(item, (list, tuple)):
        for i, x in enumerate(item):
            yield from ((i, *rest) for rest in _paths(x))
    else:
        yield ()


def _at(item: Any, path: tuple[int, ...]) -> Number:
    for i in path:
        item = item[i]
    return item


def gradient(f: Callable[..., Number], *arguments: Any) -> list[list[Number]]:
    """The partial derivatives of ``f`` by central differences of many digits: independent of any formula for them.

    The step is 2^-(a third of the bits) of the entry; rounding and truncation both leave two thirds of the bits.

    Args:
        f: the function, which need not take care of its own precision.
        arguments: numbers, or nested lists of numbers.

    Returns:
        For each argument the list of its entries' derivatives, in order.

    Raises:
        PrecisionError: as in `agreed`.
    """

    def quotient(position: int, path: tuple[int, ...]) -> Number:
        argument = arguments[position]
        h = mp.ldexp(abs(_at(argument, path)) or mp.mpf(1), -mp.prec // 3)
        up, down = (
            f(*arguments[:position], _moved(argument, path, step), *arguments[position + 1 :]) for step in (h, -h)
        )
        return (up - down) / (2 * h)

    return [
        [agreed(partial(quotient, i, path), _GRADIENT_LADDER) for path in _paths(argument)]
        for i, argument in enumerate(arguments)
    ]
