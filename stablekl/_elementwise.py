"""Elementwise functions with hand-written derivatives, and the precision they work in.

float32 on a CPU is *lifted*: evaluated in float64 and rounded once, which takes fewer passes there than a
float32 formula without cancellation, and is faster. (Consumer GPUs have slow float64 and MPS none, so other devices
take the float32 form.) float16 and bfloat16 are computed in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import _fused
from ._autograd import blockwise, rowwise

__all__ = ["broadcast_apply", "elementwise", "horner", "is_lifted", "product_error", "sum_error"]


def is_lifted(x: Tensor) -> bool:
    """Whether values of this tensor are computed in float64: float32 on a CPU."""
    return x.dtype == torch.float32 and x.device.type == "cpu"


_MANY = 512  # elements that are worth the call of a kernel
# the plain form of each function that `elementwise` has made
_PLAIN: dict[Callable[..., Tensor], Callable[..., Tensor]] = {}


def elementwise(value: Callable[..., Tensor], *partials: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An elementwise function of tensors of one shape and dtype, float32 or float64, with its derivatives.

    Args:
        value: ``value(*inputs, lifted=...)``, plain operations.
        partials: the partial derivatives: made by `elementwise` in turn where autograd through their formula
            would cancel, else differentiable operations.
    """
    plain_partials = tuple(_PLAIN.get(f, f) for f in partials)

    def plain(*inputs: Tensor) -> Tensor:
        if is_lifted(inputs[0]) and not _fused.takes(value, inputs):
            return value(*(x.double() for x in inputs), lifted=True).float()
        return value(*inputs)

    def gradient(inputs: tuple[Tensor, ...], saved: object) -> tuple[Tensor, ...]:
        # torch.compile can neither differentiate twice nor trace an autograd function within another
        again = saved is None and not torch.compiler.is_compiling()
        return tuple(f(*inputs) for f in (partials if again else plain_partials))

    call = rowwise(lambda *inputs: blockwise(lambda *x: (plain(*x),), *inputs), gradient)
    _PLAIN[call] = plain
    return call


def broadcast_apply(f: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``f`` on inputs of one dtype and shape; half precisions computed in float32, rounded once."""
    dtype = inputs[0].dtype
    for x in inputs[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    if not dtype.is_floating_point:
        dtype = torch.promote_types(dtype, torch.get_default_dtype())
    working = torch.promote_types(dtype, torch.float32)
    shape = torch.broadcast_shapes(*(x.shape for x in inputs))
    return f(*(x.to(working).expand(shape) for x in inputs)).to(dtype)


def horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """A polynomial in ``x``, its highest coefficient first; on a CPU by a kernel in C, with the same roundings."""
    if x.dtype == torch.float64 and x.numel() >= _MANY and _fused.available((x,)):
        return _fused.polynomial(x, coefficients)
    p = x * coefficients[0] + coefficients[1]
    for c in coefficients[2:]:
        p = p * x + c
    return p


def product_error(a: Tensor, b: Tensor, p: Tensor) -> Tensor:
    """What rounding took from the product p of a and b, exactly: Dekker's, which needs no fused multiply-add."""
    factor = 2.0**27 + 1 if p.dtype == torch.float64 else 2.0**12 + 1
    c, d = factor * a, factor * b
    a_high, b_high = c - (c - a), d - (d - b)
    a_low, b_low = a - a_high, b - b_high
    return ((a_high * b_high - p) + a_high * b_low + a_low * b_high) + a_low * b_low


def sum_error(a: Tensor, b: Tensor, s: Tensor) -> Tensor:
    """What rounding took from the sum s of a and b, exactly: Knuth's."""
    c = s - a
    return (a - (s - c)) + (b - c)
