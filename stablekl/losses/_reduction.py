"""What the losses share: precision, shapes, and torch.nn's ``reduction``."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from .._autograd import is_eager
from ..distributions._base import broadcast_shape
from ..parameterizations import check_positive

__all__ = [
    "Reduction",
    "check_factor",
    "check_mask",
    "check_reduction",
    "check_rows",
    "promoted",
    "reduced",
    "together",
]

Reduction = Literal["none", "mean", "sum"]


def check_rows(name: str, shape: torch.Size, other: str, other_shape: torch.Size) -> torch.Size:
    """What two shapes broadcast to; ValueError where neither has it: (N,) and (N, 1) make (N, N)."""
    try:
        both = broadcast_shape(shape, other_shape)
    except RuntimeError as error:
        raise ValueError(f"{name}, {tuple(shape)}, and {other}, {tuple(other_shape)}, do not broadcast") from error
    if both not in (shape, other_shape):
        raise ValueError(
            f"{name}, {tuple(shape)}, and {other}, {tuple(other_shape)}, would broadcast to {tuple(both)}, each row of "
            "one with each row of the other. Likely cause: a dimension of 1 too many, which squeeze(-1) removes, or "
            "one too few. If it is meant, expand one of them"
        )
    return both


def check_factor(name: str, factor: Tensor) -> None:
    """ValueError unless matrices are lower triangular with a positive diagonal."""
    check_positive(name, factor.diagonal(dim1=-2, dim2=-1))
    if is_eager(factor) and bool((above := factor.detach().triu(1) != 0).any()):
        index = tuple(above.nonzero()[0].tolist())
        raise ValueError(
            f"{name} is not lower triangular: {name}{list(index)} is {float(factor[index])}. Of a covariance take "
            "torch.linalg.cholesky; what a network puts out goes through stablekl.scale_tril_from_unconstrained"
        )


def check_mask(mask: Tensor, shape: torch.Size, what: str) -> None:
    """ValueError unless it is boolean and has the shape of what it masks, or one that broadcasts to it."""
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be boolean, True where there is a {what}; got {mask.dtype}")
    check_rows("mask of shape", mask.shape, f"every {what} of shape", shape)


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


def promoted(*tensors: Tensor) -> torch.dtype:
    """The floating-point dtype that tensors promote to."""
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype if dtype.is_floating_point else torch.promote_types(dtype, torch.get_default_dtype())


def together(*inputs: Tensor | float, wide: bool = True) -> tuple[list[Tensor], torch.dtype]:
    """Tensors of one dtype, broadcast, and the dtype that the result is to have; numbers go where the tensors are.

    Args:
        inputs: tensors, one at least, and numbers.
        wide: in float64 where the device has it, for one number in a row; otherwise half precision becomes float32.
    """
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    dtype = promoted(*tensors)
    device = tensors[0].device
    working = torch.float64 if wide and device.type != "mps" else torch.promote_types(dtype, torch.float32)
    every = [x.to(working) if isinstance(x, Tensor) else torch.tensor(x, dtype=working, device=device) for x in inputs]
    return list(torch.broadcast_tensors(*every)), dtype
