"""What an estimated divergence is returned as, and how accurate it is asked to be."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .._autograd import is_eager

__all__ = [
    "Accuracy",
    "AccuracyWarning",
    "Bounds",
    "KLEstimate",
    "Method",
    "accuracy",
    "checked_accuracy",
    "requested",
    "requested_accuracy",
    "warn_of_excess",
]


Method = Literal["auto", "closed form", "line", "spectral", "triple", "contour", "cubature", "sobol"]


class Bounds(NamedTuple):
    """A certified interval.

    Attributes:
        lower: in nats, of the batch shape; differentiable.
        upper: likewise.
    """

    lower: Tensor
    upper: Tensor

    def clipped(self, value: Tensor) -> Tensor:
        """``value`` moved into the interval, with the gradient it had."""
        with torch.no_grad():
            inside = torch.minimum(torch.maximum(value, self.lower), self.upper)
            correction = torch.where(inside == value, 0.0, inside - value)
        return value + correction

    def rounded(self, dtype: torch.dtype) -> Bounds:
        """In ``dtype``, rounded outwards; a finite lower bound may overflow in it."""
        if dtype == self.lower.dtype:
            return self
        info = torch.finfo(dtype)
        # a step besides: half precision has no eps left below 6e-5
        step = info.eps * info.smallest_normal
        lower, upper = (
            x + sign * torch.where((x == 0) | x.isinf(), 0.0, info.eps * x.detach().abs() + step)
            for x, sign in ((self.lower, -1), (self.upper, 1))
        )
        lower = torch.where(self.lower > 0, lower.clamp(min=0), lower)
        lower = torch.where(lower.isinf(), lower, lower.clamp(max=info.max))
        return Bounds(lower.to(dtype), upper.to(dtype))


class KLEstimate(NamedTuple):
    """A KL divergence, or an entropy, an information or another divergence, with its error.

    Attributes:
        value: in nats, of the batch shape; differentiable.
        error: half-width of a 95% interval around it (a t quantile over replicates for sampled values, the spread of a
            refinement for cubature; a bound on the truncation and rounding of the exact engines). Not differentiable.
        lower: certified lower bound, 0 where nothing better is known.
        upper: certified upper bound, +inf where none is known.
        method: the engine, and the least exact of them where several took part: "closed form", "line", "spectral",
            "triple", "contour", "cubature" or "sobol".
    """

    value: Tensor
    error: Tensor
    lower: Tensor
    upper: Tensor
    method: str

    def rounded(self, dtype: torch.dtype) -> KLEstimate:
        """In ``dtype``: the value rounded once, the error larger by that, the interval rounded outwards."""
        error = self.error + torch.finfo(dtype).eps * self.value.detach().abs()
        bounds = Bounds(self.lower, self.upper).rounded(dtype)
        return KLEstimate(self.value.to(dtype), error.to(dtype), *bounds, self.method)


class AccuracyWarning(UserWarning):
    """The estimated error of a KL divergence exceeds the tolerance that was asked for."""


class Accuracy(NamedTuple):
    """The tolerance and the budget in force.

    Attributes:
        rtol: the error asked for is ``rtol * (1 + KL)``.
        max_points: most quasi-random points per component that may be spent on it; None for a million shared by the
            components, but from 2^16 to 2^18 for each.
    """

    rtol: float = 1e-4
    max_points: int | None = None


_DEFAULT = Accuracy()
_ACCURACY: ContextVar[Accuracy] = ContextVar("stablekl_accuracy", default=_DEFAULT)


def requested_accuracy() -> Accuracy:
    """The tolerance and budget of the innermost `accuracy` block; the defaults under torch.compile.

    A context variable cannot be traced, and a traced function must not change with the block it is called in.
    """
    return _DEFAULT if torch.compiler.is_compiling() else _ACCURACY.get()


def requested(rtol: float | None, max_points: int | None) -> Accuracy:
    """What a call asks for: its own arguments, else those of the innermost `accuracy` block.

    Raises:
        ValueError: a tolerance or a budget without sense.
    """
    asked = requested_accuracy()
    if rtol is None and max_points is None:
        return asked
    return checked_accuracy(
        asked.rtol if rtol is None else rtol, asked.max_points if max_points is None else max_points
    )


def warn_of_excess(estimate: KLEstimate, what: str, stacklevel: int, size: Tensor | None = None) -> None:
    """AccuracyWarning, in eager mode, where a refined value has not reached the tolerance in force.

    Args:
        estimate: the value and its error.
        what: it is called.
        stacklevel: as for `warnings.warn`, 1 being the caller of this function.
        size: the tolerance is relative to 1 and this; default the value's.
    """
    if estimate.method not in ("sobol", "cubature", "contour") or not is_eager(estimate.value):
        return
    rtol = requested_accuracy().rtol
    # an infinite divergence has an infinite error, and is what it is
    size = estimate.value.detach().abs() if size is None else size.detach()
    excess = (estimate.error / (1 + size)).nan_to_num(nan=0.0)
    if not bool((excess > rtol).any()):
        return
    worst = int(excess.argmax())
    warnings.warn(
        f"the {what} of batch element {worst} (of {excess.numel()}, flattened) is "
        f"{float(estimate.value.reshape(-1)[worst]):.6g} +- {float(estimate.error.reshape(-1)[worst]):.2g} "
        f"(95%), above the tolerance rtol = {rtol:g}. Allow more points: with stablekl.accuracy(rtol=..., "
        "max_points=...); or read the error: stablekl.kl_estimate and its like.",
        AccuracyWarning,
        stacklevel=stacklevel + 1,
    )


def checked_accuracy(rtol: float, max_points: int | None) -> Accuracy:
    """A tolerance and a budget; ValueError where they make no sense."""
    if not rtol > 0:
        raise ValueError(f"rtol must be positive, got {rtol}")
    if max_points is not None and not max_points >= 64:
        raise ValueError(f"max_points must be at least 64 (16 replicates of 4 points), got {max_points}")
    return Accuracy(rtol, max_points)


@contextmanager
def accuracy(*, rtol: float | None = None, max_points: int | None = None) -> Iterator[Accuracy]:
    """Ask for another accuracy of sampled mixture divergences inside a ``with`` block.

    Args:
        rtol: double the points until the 95% half-width is below ``rtol * (1 + KL)``. Default 1e-4.
        max_points: stop doubling at this many points per component, and warn. Default: 2^18 for up to four components,
            2^17 for up to eight, 2^16 for more.

    Raises:
        ValueError: ``rtol`` is not positive, or ``max_points`` is below 64.

    Example:
        >>> import stablekl
        >>> with stablekl.accuracy(rtol=1e-3, max_points=2**14) as asked:
        ...     asked.rtol, asked.max_points
        (0.001, 16384)
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
