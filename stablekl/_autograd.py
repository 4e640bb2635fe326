"""Derivatives written by hand, usable under every torch transform.

Autograd through a cancellation-free formula cancels again (the derivative of ``x - log1p(x)`` is
``1 - 1/(1 + x)``), so each primitive and each KL rule states its own gradient. `rowwise` turns a
value and a gradient, both plain functions of tensors, into one callable that supports backward, double
backward, forward mode, ``vmap`` and ``torch.compile``. `blockwise` runs an elementwise function through
the cache instead of through memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["blockwise", "rowwise"]

# Elements per block: float64 temporaries of 1 MiB stay in a core's L2 cache. Measured: 2**17 is the
# fastest of 2**13 ... 2**18 for 4 million elements (an elementwise pass that allocates its result costs
# four times one that writes into warm memory).
BLOCK = 2**17


def _is_plain(tensors: Sequence[Tensor]) -> bool:
    """True when the tensors hold data here and now: no tracing, no vmap, no graph to record."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    return not any(
        functorch.is_functorch_wrapped_tensor(t) or (torch.is_grad_enabled() and t.requires_grad)
        for t in tensors
    )


def blockwise(f: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Apply an elementwise, tuple-valued ``f`` to inputs of one shape, block by block on a CPU.

    The result is that of ``f(*inputs)``, bit for bit: on other devices, for small inputs and inside any
    transform it is that call.
    """
    shape, n = inputs[0].shape, inputs[0].numel()
    if n <= 2 * BLOCK or inputs[0].device.type != "cpu" or not _is_plain(inputs):
        return f(*inputs)
    # An expanded scalar stays a scalar: broadcasting inside the block is free, materialising is not.
    flat = [x.reshape(-1)[:1] if not any(x.stride()) else x.reshape(-1) for x in inputs]
    outputs: list[Tensor] = []
    for start in range(0, n, BLOCK):
        block = [x if x.numel() == 1 else x[start : start + BLOCK] for x in flat]
        results = f(*block)
        if not outputs:
            outputs = [torch.empty(n, dtype=r.dtype, device=r.device) for r in results]
        for out, r in zip(outputs, results, strict=True):
            out[start : start + BLOCK] = r
    return tuple(out.view(shape) for out in outputs)


def _scaled(g: Tensor, d: Tensor) -> Tensor:
    """``g * d`` with the rows of ``g`` broadcast over the event dimensions of ``d``, and 0 * inf = 0.

    A row whose KL is infinite has an infinite gradient; whoever masks that row out sends it g = 0, and
    must get 0 back rather than NaN.
    """
    g = g.reshape(g.shape + (1,) * (d.ndim - g.ndim))
    if g.ndim and not any(g.stride()) and _is_plain((g, d)):
        scale = float(g.reshape(-1)[0]) if g.device.type == "cpu" and g.numel() else None
        if scale == 1.0:  # the gradient of a plain .sum(): nothing to multiply
            return d

    def scale_block(g: Tensor, d: Tensor) -> tuple[Tensor]:
        return (torch.where(g == 0, torch.zeros_like(d), g * d),)

    if g.shape == d.shape:
        return blockwise(scale_block, g, d)[0]
    return scale_block(g, d)[0]


def rowwise(
    value: Callable[..., tuple[Tensor, ...]],
    gradient: Callable[..., tuple[Tensor, ...]],
) -> Callable[..., Tensor]:
    """A function of rows with a hand-written gradient.

    Args:
        value: ``value(*inputs) -> (out, *saved)``. ``out`` has the common batch shape; input i has shape
            ``batch_shape + event_shape_i``, already broadcast. ``saved`` are intermediates worth keeping
            for the backward. Always called with plain tensors (or traced by torch.compile).
        gradient: ``gradient(inputs, saved) -> (d out / d input_i, ...)``, of the shapes of the inputs, row
            by row. ``saved`` is None when the result itself must be differentiable: everything is
            then recomputed from ``inputs`` with differentiable operations.

    Returns:
        ``f(*inputs) -> out``.
    """

    class Traceable(torch.autograd.Function):
        # torch.compile refuses functions that define jvp or vmap (torch 2.13), so this one does not.
        @staticmethod
        def forward(*inputs: Tensor) -> tuple[Tensor, ...]:
            return value(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
            ctx.mark_non_differentiable(*output[1:])
            ctx.save_for_backward(*inputs, *output[1:])
            ctx.num_inputs = len(inputs)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            tensors = ctx.saved_tensors
            inputs, saved = tensors[: ctx.num_inputs], tensors[ctx.num_inputs :]
            partials = gradient(inputs, None if torch.is_grad_enabled() else saved)
            return tuple(
                _scaled(grads[0], d) if needed else None
                for d, needed in zip(partials, ctx.needs_input_grad, strict=True)
            )

    class Eager(Traceable):
        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
            Traceable.setup_context(ctx, inputs, output)
            ctx.save_for_forward(*inputs, *output[1:])
            ctx.set_materialize_grads(True)
            ctx.num_outputs, ctx.batch_ndim = len(output), output[0].ndim

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor) -> tuple[Tensor | None, ...]:
            inputs = ctx.saved_tensors[: ctx.num_inputs]
            total: Tensor | None = None
            for d, t in zip(gradient(inputs, None), tangents, strict=True):
                if t is not None:
                    # an event dimension of d is one that the output has not
                    term = torch.where(t == 0, torch.zeros_like(d), d * t)
                    events = d.ndim - ctx.batch_ndim
                    term = term.sum(tuple(range(-events, 0))) if events else term
                    total = term if total is None else total + term
            return (total,) + (None,) * (ctx.num_outputs - 1)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Any, Any]:
            rows = [
                x.unsqueeze(0).expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
                for x, dim in zip(inputs, in_dims, strict=True)
            ]
            outputs = Eager.apply(*rows)
            return outputs, (0,) * len(outputs)

    def call(*inputs: Tensor) -> Tensor:
        function = Traceable if torch.compiler.is_compiling() else Eager
        result: Tensor = function.apply(*inputs)[0]
        return result

    return call
