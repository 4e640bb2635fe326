"""What the losses share: precision, shapes, and torch.nn's ``reduction``."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["Reduction", "check_reduction", "reduced", "together"]

Reduction = Literal["none", "mean", "sum"]


def check_reduction(reduction: str) -> None:
    """ValueError unless it is one of torch.nn's."""
    if reduction not in get_args(Reduction):
        names = ", ".join(map(repr, get_args(Reduction)))
        raise ValueError(f"reduction must be one of {names}, got {reduction!r}")


def reduced(values: Tensor, reduction: Reduction, mask: Tensor | None = None) -> Tensor:
    """A loss of every row as torch.nn's modules reduce it: "mean" is over rows, those of the mask where there is one.

    Args:
        values: the loss of each row, 0 where the mask is False.
        reduction: "none", "mean" or "sum".
        mask: True for the rows that count; the mean over none of them is 0.
    """
    check_reduction(reduction)
    if reduction == "none":
        return values
    # in float64, since the sum of a batch leaves the range of float16, where its mean does not
    total = values.sum(dtype=torch.float32 if values.device.type == "mps" else torch.float64)
    if reduction == "mean":
        total = total / (values.numel() if mask is None else mask.expand(values.shape).sum().clamp(min=1))
    return total.to(values.dtype)


def together(*inputs: Tensor | float, wide: bool = True) -> tuple[list[Tensor], torch.dtype]:
    """Tensors of one dtype, broadcast, and the dtype that the result is to have; numbers go where the tensors are.

    Args:
        inputs: tensors, one at least, and numbers.
        wide: in float64 where the device has it, for one number in a row; otherwise half precision becomes float32.
    """
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    if not dtype.is_floating_point:
        dtype = torch.promote_types(dtype, torch.get_default_dtype())
    device = tensors[0].device
    working = torch.float64 if wide and device.type != "mps" else torch.promote_types(dtype, torch.float32)
    every = [x.to(working) if isinstance(x, Tensor) else torch.tensor(x, dtype=working, device=device) for x in inputs]
    return list(torch.broadcast_tensors(*every)), dtype
