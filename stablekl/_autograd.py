"""Derivatives written by hand, usable under every torch transform.

Autograd through a cancellation-free formula cancels again (the derivative of ``x - log1p(x)`` is
``1 - 1/(1 + x)``), so each primitive and each KL rule states its own gradient. `rowwise` turns a
value and a gradient, both plain functions of tensors, into one callable that supports backward, double
backward, forward mode, ``vmap`` and ``torch.compile``; `custom` is the same for functions whose rows share
inputs. `blockwise` runs an elementwise function through the cache instead of through memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "blockwise",
    "custom",
    "is_dual",
    "is_eager",
    "is_plain",
    "is_transformed",
    "masked_product",
    "may_hold",
    "rowwise",
]

# Elements per block: enough for torch to split each pass over its threads, few enough for a handful of float64
# temporaries of 1 MiB to stay in the caches. Measured, idle: 2^16 to 2^18 are as good; blocks of 2^15 shared between
# Python's threads, which then hand over the interpreter lock at every operation, are three times slower.
BLOCK = 2**17


def is_plain(tensors: Sequence[Tensor]) -> bool:
    """True when the tensors hold data here and now: no tracing, no vmap, no graph to record."""
    return not (is_transformed(tensors) or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)))


def is_eager(*tensors: Tensor) -> bool:
    """Whether the data may be looked at: not under vmap or torch.compile, not while a CUDA graph is captured."""
    if is_transformed(tensors):
        return False
    return not (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing())


def may_hold(mask: Tensor) -> bool:
    """False where a CPU in eager mode sees that no row needs the treatment: its work would be thrown away.

    The result is the same bit for bit; everywhere else (devices, tracing) the treatment is computed for all rows.
    """
    return mask.device.type != "cpu" or not is_plain((mask,)) or bool(mask.any())


def is_dual(tensors: Sequence[Tensor]) -> bool:
    """Whether one of these plain tensors carries a tangent of forward mode outside of torch.func."""
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def is_transformed(tensors: Sequence[Tensor]) -> bool:
    """Under torch.compile, torch.jit.trace or make_fx, with fake tensors, or inside vmap and its like."""
    if torch.compiler.is_compiling():
        return True
    c, wrapped = torch._C, torch._C._functorch.is_functorch_wrapped_tensor
    batched = torch._C._functorch.is_legacy_batchedtensor  # torch.autograd.grad(..., is_grads_batched=True)
    key = c._TorchDispatchModeKey
    modes = c._len_torch_dispatch_stack() and (c._get_dispatch_mode(key.PROXY) or c._get_dispatch_mode(key.FAKE))
    return (
        c._is_tracing()
        or bool(modes)
        or torch._ops._len_torch_dispatch_stack_pre_dispatch() > 0
        or any(wrapped(t) or batched(t) for t in tensors)
    )


def blockwise(f: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Apply an elementwise, tuple-valued ``f`` to inputs of one shape, block by block on a CPU.

    The result is that of ``f(*inputs)``, bit for bit: on other devices, for small inputs and inside any
    transform it is that call.
    """
    shape, n = inputs[0].shape, inputs[0].numel()
    if n <= 2 * BLOCK or inputs[0].device.type != "cpu" or not is_plain(inputs):
        return f(*inputs)
    # An expanded scalar stays a scalar: broadcasting inside the block is free, materialising is not.
    flat = [x.reshape(-1) if any(x.stride()) else x[(0,) * x.ndim].reshape(1) for x in inputs]

    def block(start: int) -> tuple[Tensor, ...]:
        return f(*(x if len(x) == 1 else x[start : start + BLOCK] for x in flat))

    # A block of nothing but scalars would have their shape: the first input gives the block its own.
    if len(flat[0]) == 1:
        flat[0] = flat[0].expand(n)
    first = block(0)
    outputs = [r.new_empty(n) for r in first]
    for start in range(0, n, BLOCK):
        for out, r in zip(outputs, block(start) if start else first, strict=True):
            out[start : start + BLOCK] = r
    return tuple(out.view(shape) for out in outputs)


def masked_product(g: Tensor, d: Tensor) -> Tensor:
    """``g * d`` with 0 * inf = 0, and the derivatives of a product where d is finite: also that by g where g is 0."""
    return g * torch.where((g == 0) & ~d.isfinite(), torch.zeros_like(d), d)


def _scaled(g: Tensor, d: Tensor) -> Tensor:
    """``g * d`` with the rows of ``g`` broadcast over the event dimensions of ``d``, and 0 * inf = 0.

    A row whose KL is infinite has an infinite gradient; whoever masks that row out sends it g = 0, and
    must get 0 back rather than NaN.
    """
    if d.device.type == "cpu" and g.numel() and not any(g.stride()) and is_plain((g, d)):
        scale = float(g.reshape(-1)[0])  # one number for all rows, as from .sum() or .mean()
        if scale != 0:
            return d if scale == 1 else d * scale
    return masked_product(g.reshape(g.shape + (1,) * (d.ndim - g.ndim)), d)


def rowwise(
    value: Callable[..., tuple[Tensor, ...]],
    gradient: Callable[..., tuple[Tensor, ...]],
    pullback: Callable[..., tuple[Tensor | None, ...] | None] | None = None,
) -> Callable[..., Tensor]:
    """A function of rows with a hand-written gradient.

    Args:
        value: ``value(*inputs) -> (out, *saved)``. ``out`` has the common batch shape; input i has shape
            ``batch_shape + event_shape_i``, already broadcast. ``saved`` are intermediates worth keeping
            for the backward. Always called with plain tensors (or traced by torch.compile).
        gradient: ``gradient(inputs, saved) -> (d out / d input_i, ...)``, of the shapes of the inputs, row
            by row. ``saved`` is None when the result itself must be differentiable: everything is
            then recomputed from ``inputs`` with differentiable operations.
        pullback: ``pullback(grad, inputs, needed)``, the gradient times that of the caller in one go, or None
            where it has no shorter way than that.

    Returns:
        ``f(*inputs) -> out``.
    """

    def vjp(
        grad: Tensor, inputs: Sequence[Tensor], saved: Sequence[Tensor] | None, needed: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        pulled = None if pullback is None else pullback(grad, inputs, needed)
        if pulled is not None:
            return pulled

        def scaled_partials(grad: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            kept = None if saved is None else tensors[len(inputs) :]
            partials = gradient(tensors[: len(inputs)], kept)
            return tuple([_scaled(grad, d) for d, n in zip(partials, needed, strict=True) if n])

        tensors = (grad, *inputs, *(saved or ()))
        # Lists, not generators, which torch.compile can't run within a custom function's backward (torch 2.15).
        elementwise = all([x.shape == grad.shape for x in tensors])  # noqa: C419
        results = list(blockwise(scaled_partials, *tensors) if elementwise else scaled_partials(*tensors))
        return tuple([results.pop(0) if n else None for n in needed])

    def jvp(inputs: Sequence[Tensor], tangents: Sequence[Tensor | None], ndim: int) -> Tensor | None:
        total: Tensor | None = None
        for d, t in zip(gradient(inputs, None), tangents, strict=True):
            if t is not None:
                # an event dimension of d is one that the output has not
                term = masked_product(t, d)
                events = d.ndim - ndim
                term = term.sum(tuple(range(-events, 0))) if events else term
                total = term if total is None else total + term
        return total

    return custom(value, vjp, jvp)


def _refuse_nested_forward_mode() -> None:
    jvp = torch._C._functorch.TransformType.Jvp
    stack = torch._C._functorch.get_interpreter_stack() or ()
    if sum(level.key() == jvp for level in stack) > 1:
        raise NotImplementedError(
            "forward mode inside forward mode: torch takes the derivative of a custom function's jvp to be 0. "
            "Use reverse mode for one of the two, as torch.func.hessian does (jacfwd of jacrev)."
        )


def custom(
    value: Callable[..., tuple[Tensor, ...]],
    vjp: Callable[..., tuple[Tensor | None, ...]],
    jvp: Callable[..., Tensor | None],
) -> Callable[..., Tensor]:
    """A function with hand-written derivatives, whose inputs may be shared by many rows of the output.

    Args:
        value: ``value(*inputs) -> (out, *saved)``, as in `rowwise`, except that the shapes of the inputs are
            free. ``vmap`` puts one more dimension in front of every input and of ``out``.
        vjp: ``vjp(grad, inputs, saved, needed) -> (gradient with respect to input_i, ...)``, where ``grad``
            has the shape of ``out`` and ``needed`` says which inputs want a gradient (None elsewhere).
            ``saved`` is None when the result itself must be differentiable.
        jvp: ``jvp(inputs, tangents, ndim) -> tangent of out``, differentiable; ``ndim`` is that of ``out``.

    Returns:
        ``f(*inputs) -> out``.
    """

    class Traceable(torch.autograd.Function):
        # torch.compile refuses functions that define jvp or vmap (torch 2.13), so this one does not.
        @staticmethod
        def forward(*inputs: Tensor) -> tuple[Tensor, ...]:
            out, *saved = value(*inputs)
            if torch.compiler.is_compiling():
                # torch 2.11 sends a gradient of zeros to an output that ends in an operation without effect, .to(dtype)
                out = out.clone()
            return (out, *saved)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
            ctx.mark_non_differentiable(*output[1:])
            ctx.save_for_backward(*inputs, *output[1:])
            ctx.num_inputs = len(inputs)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            tensors = ctx.saved_tensors
            inputs, saved = tensors[: ctx.num_inputs], tensors[ctx.num_inputs :]
            if grads[0] is None:
                return (None,) * ctx.num_inputs
            # What was saved has no derivative. Forward over reverse needs one even where no gradient is recorded.
            again = torch.is_grad_enabled()
            if not torch.compiler.is_compiling():
                again = again or not is_plain((grads[0], *tensors)) or is_dual((grads[0], *tensors))
            return vjp(grads[0], inputs, None if again else saved, ctx.needs_input_grad)

    class Eager(Traceable):
        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
            Traceable.setup_context(ctx, inputs, output)
            ctx.save_for_forward(*inputs, *output[1:])
            ctx.set_materialize_grads(False)  # True would allocate zeros for everything that was saved
            ctx.num_outputs, ctx.out_ndim = len(output), output[0].ndim

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor) -> tuple[Tensor | None, ...]:
            inputs = ctx.saved_tensors[: ctx.num_inputs]
            nothing = [None] * (ctx.num_outputs - 1)
            return (jvp(inputs, tangents, ctx.out_ndim), *nothing)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Any, Any]:
            rows = [
                x.unsqueeze(0).expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
                for x, dim in zip(inputs, in_dims, strict=True)
            ]
            outputs = Eager.apply(*rows)  # type: ignore[no-untyped-call]
            return outputs, (0,) * len(outputs)

    def call(*inputs: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            # tracing a Function that records nothing fails (torch 2.13), and there is nothing to record
            recorded = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
            # it refuses a tensor that comes twice, as where p and q share a scale
            apart = [x.view_as(x) if any(x is other for other in inputs[:i]) else x for i, x in enumerate(inputs)]
            outputs = Traceable.apply(*apart) if recorded else value(*inputs)  # type: ignore[no-untyped-call]
        elif is_plain(inputs) and not is_dual(inputs):  # the same without the 15 us that a Function takes
            with torch.no_grad():
                outputs = value(*inputs)
        else:
            _refuse_nested_forward_mode()
            outputs = Eager.apply(*inputs)  # type: ignore[no-untyped-call]
        result: Tensor = outputs[0]
        return result

    return call
