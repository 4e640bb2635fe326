"""What an estimated KL divergence is returned as, and how accurate it is asked to be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Accuracy", "AccuracyWarning", "KLEstimate", "accuracy", "checked_accuracy", "requested_accuracy"]


class KLEstimate(NamedTuple):
    """A KL divergence with its error.

    Attributes:
        value: the divergence in nats, of the batch shape; differentiable.
        error: half-width of a 95% interval around it (a t quantile over replicates for sampled values; a bound on the
            truncation and rounding of the exact engines). Not differentiable.
        lower: certified lower bound, 0 where nothing better is known.
        upper: certified upper bound, +inf where none is known.
        method: the engine: "closed form", "spectral", "line" or "sobol".
    """

    value: Tensor
    error: Tensor
    lower: Tensor
    upper: Tensor
    method: str


class AccuracyWarning(UserWarning):
    """The estimated error of a KL divergence exceeds the tolerance that was asked for."""


class Accuracy(NamedTuple):
    """The tolerance and the budget in force.

    Attributes:
        rtol: the error asked for is ``rtol * (1 + KL)``.
        max_points: most quasi-random points per component that may be spent on it.
    """

    rtol: float = 1e-2
    max_points: int = 2**16


_DEFAULT = Accuracy()
_ACCURACY: ContextVar[Accuracy] = ContextVar("stablekl_accuracy", default=_DEFAULT)


def requested_accuracy() -> Accuracy:
    """The tolerance and budget of the innermost `accuracy` block; the defaults under torch.compile.

    A context variable cannot be traced, and a traced function must not change with the block it is called in.
    """
    return _DEFAULT if torch.compiler.is_compiling() else _ACCURACY.get()


def checked_accuracy(rtol: float, max_points: int) -> Accuracy:
    """A tolerance and a budget; ValueError where they make no sense."""
    if not rtol > 0:
        raise ValueError(f"rtol must be positive, got {rtol}")
    if not max_points >= 64:
        raise ValueError(f"max_points must be at least 64 (16 replicates of 4 points), got {max_points}")
    return Accuracy(rtol, max_points)


@contextmanager
def accuracy(*, rtol: float | None = None, max_points: int | None = None) -> Iterator[Accuracy]:
    """Ask for another accuracy of sampled mixture divergences inside a ``with`` block.

    Args:
        rtol: double the points until the 95% half-width is below ``rtol * (1 + KL)``. Default 1e-2.
        max_points: stop doubling at this many points per component, and warn. Default 65536.

    Raises:
        ValueError: ``rtol`` is not positive, or ``max_points`` is below 64.

    Example:
        >>> import stablekl
        >>> with stablekl.accuracy(rtol=1e-3) as asked:
        ...     asked.rtol, asked.max_points
        (0.001, 65536)
    """
    outer = _ACCURACY.get()
    asked = checked_accuracy(
        outer.rtol if rtol is None else rtol, outer.max_points if max_points is None else max_points
    )
    token = _ACCURACY.set(asked)
    try:
        yield asked
    finally:
        _ACCURACY.reset(token)
