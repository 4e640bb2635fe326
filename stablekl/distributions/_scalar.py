"""What the rules of parameters share: broadcasting, one precision, one rounding, derivatives by hand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._autograd import blockwise, rowwise
from ._base import common_dtype, widened

__all__ = ["attached", "scalar_rule", "vector_rule"]


def attached(value: Tensor, smooth: Tensor) -> Tensor:
    """The value with the derivatives of another formula of it, which may have lost its digits, or be infinite."""
    return value.detach() + torch.where(smooth.isfinite(), smooth - smooth.detach(), 0.0)


def scalar_rule(
    value: Callable[..., Tensor], gradient: Callable[..., tuple[Tensor, ...]] | None = None
) -> Callable[..., Tensor]:
    """A KL rule of parameters of scalar families, elementwise.

    Args:
        value: ``value(*parameters)``, of float64 tensors of one shape (float32 on MPS). With a ``gradient`` it is
            called with plain tensors; without one it is made of functions that have derivatives of their own.
        gradient: ``gradient(*parameters)``, the partial derivatives, by operations whose own derivatives do not
            cancel: second derivatives are taken through them.

    Returns:
        A function of parameters of any shapes that broadcast and of any floating-point dtypes; the result has the dtype
        that these promote to, and is rounded to it once.
    """
    if gradient is None:
        core = value
    else:
        partials = gradient
        core = rowwise(
            lambda *inputs: blockwise(lambda *x: (value(*x),), *inputs), lambda inputs, saved: partials(*inputs)
        )

    def rule(*parameters: Tensor) -> Tensor:
        dtype = common_dtype(*parameters)
        return core(*torch.broadcast_tensors(*(widened(x) for x in parameters))).to(dtype)

    return rule


def vector_rule(
    value: Callable[..., Tensor], gradient: Callable[..., tuple[Tensor, ...]]
) -> Callable[[Tensor, Tensor], Tensor]:
    """A KL rule of two parameters ``(..., K)``, as `scalar_rule` is for numbers; the result is without K."""
    core = rowwise(lambda *inputs: (value(*inputs),), lambda inputs, saved: gradient(*inputs))

    def rule(x: Tensor, y: Tensor) -> Tensor:
        return core(*torch.broadcast_tensors(widened(x), widened(y))).to(common_dtype(x, y))

    return rule
