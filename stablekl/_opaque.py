"""Elementwise functions of hundreds of operations: one for torch.compile, and for those rows alone that need them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._autograd import is_plain, is_transformed

__all__ = ["opaque", "where_needed"]

_FUNCTIONS: dict[str, Callable[..., tuple[Tensor, ...]]] = {}


def opaque(count: int) -> Callable[[Callable[..., tuple[Tensor, ...]]], Callable[..., tuple[Tensor, ...]]]:
    """Decorate an elementwise function with ``count`` results of the first argument's dtype and no derivatives.

    torch.compile sees one operation, which runs the function as it stands: of the hundreds or thousands in it, it would
    take up to a minute to make code. vmap runs it once for all, kernels in C included, and views by other dtypes, which
    it has no rule for before torch 2.13. Arguments are broadcast first.
    """

    def decorated(f: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        name = f"{f.__module__}.{f.__qualname__}"
        _FUNCTIONS[name] = f

        def g(*inputs: Tensor) -> tuple[Tensor, ...]:
            inputs = torch.broadcast_tensors(*inputs)
            return tuple(_operation(name, inputs, count)) if is_transformed(inputs) else f(*inputs)

        return g

    return decorated


@torch.library.custom_op(
    "stablekl::opaque", mutates_args=(), schema="(str name, Tensor[] inputs, int count) -> Tensor[]"
)
def _operation(name: str, inputs: Sequence[Tensor], count: int) -> list[Tensor]:
    return [result.contiguous() for result in _FUNCTIONS[name](*inputs)]


@_operation.register_fake
def _(name: str, inputs: Sequence[Tensor], count: int) -> list[Tensor]:
    return [torch.empty_like(inputs[0], memory_format=torch.contiguous_format) for _ in range(count)]


@_operation.register_vmap
def _(info: object, in_dims: tuple[object, list[int | None], object], name: str, inputs: Sequence[Tensor], count: int):  # type: ignore[no-untyped-def]
    dims = in_dims[1]
    rows = [x.unsqueeze(0) if d is None else x.movedim(d, 0) for x, d in zip(inputs, dims, strict=True)]
    return _operation(name, list(torch.broadcast_tensors(*rows)), count), [0] * count


def where_needed(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Turn an elementwise f into ``g(otherwise, mask, *inputs)``, torch.where(mask, f(*inputs), otherwise).

    A CPU in eager mode, or in what torch.compile has made, evaluates f where the mask holds and nowhere else; on
    devices and under vmap it is evaluated for all. Without derivatives.
    """

    def selected(otherwise: Tensor, mask: Tensor, *inputs: Tensor) -> tuple[Tensor]:
        if mask.device.type != "cpu" or not is_plain((otherwise, mask, *inputs)):
            return (torch.where(mask, f(*inputs), otherwise),)
        rows = mask.reshape(-1).nonzero().squeeze(-1)
        result = otherwise.reshape(-1)
        if len(rows):
            result = result.index_put((rows,), f(*(x.reshape(-1)[rows] for x in inputs)))
        return (result.reshape(mask.shape).clone(),)

    selected.__module__, selected.__qualname__ = f.__module__, f.__qualname__
    evaluated = opaque(1)(selected)
    return lambda *inputs: evaluated(*inputs)[0]
