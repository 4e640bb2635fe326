r"""Network outputs as positive scales and Cholesky factors, and the check that says when to use them.

A network whose last layer is a ReLU returns variances that are exactly 0, and every density, entropy and
KL divergence is then infinite or NaN. `softplus_scale` (positive, with a floor), `bounded_log_scale`
(within bounds) and `scale_tril_from_unconstrained` (lower triangular with a positive diagonal) take the raw
output of a linear layer instead; each has an inverse, so that a network can start at a known scale.

=============================  =========================================  ==================================
function                       value                                      inverse
=============================  =========================================  ==================================
softplus_scale                 floor + log(1 + exp(x))                    inverse_softplus_scale
bounded_log_scale              exp(m + h t/sqrt(1 + t^2)), t = (x - m)/h  inverse_bounded_log_scale
scale_tril_from_unconstrained  triangle of x, softplus on its diagonal    unconstrained_from_scale_tril
=============================  =========================================  ==================================
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._elementwise import broadcast_apply, elementwise

__all__ = [
    "bounded_log_scale",
    "check_positive",
    "holds_data",
    "inverse_bounded_log_scale",
    "inverse_softplus_scale",
    "raise_outside",
    "scale_tril_from_unconstrained",
    "softplus_scale",
    "unconstrained_from_scale_tril",
]


# --- errors -----------------------------------------------------------------------------------------------


def holds_data(value: Tensor) -> bool:
    """False while compiling, inside vmap and the like, during CUDA graph capture and on the meta device."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._functorch.is_functorch_wrapped_tensor(value)
        or value.is_meta
        or (value.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _first_bad(good: Tensor) -> tuple[str, tuple[int, ...], str]:
    """The first index where ``good`` is False, as printed and as it is, and how many others there are."""
    bad = (~good).nonzero()
    index = tuple(bad[0].tolist())
    others = f" (and {len(bad) - 1} more of {good.numel()} entries)" if len(bad) > 1 else ""
    return (f"[{', '.join(map(str, index))}]" if index else ""), index, others


def check_positive(name: str, value: Tensor, owner: str | None = None) -> None:
    """Raise an error that helps if an entry of ``value`` is zero, negative or NaN.

    Skipped where the data cannot be looked at: under ``torch.compile`` and ``vmap``, during the capture of a
    CUDA graph, on the meta device.

    Args:
        name: what the caller calls the argument, such as ``"scale"``.
        value: any shape.
        owner: the name of the class whose parameter it is, if it is one's.

    Raises:
        ValueError: names the first bad index and its value, the likely cause, and the call that cures it.

    Example:
        >>> import torch, stablekl
        >>> stablekl.parameterizations.check_positive("scale", torch.relu(torch.tensor([1.0, -0.3])))
        Traceback (most recent call last):
        ...
        ValueError: scale must be positive, but scale[1] is 0.0. An exact zero usually comes from a ReLU ...
    """
    if not holds_data(value):
        return
    good = value > 0
    if bool(good.all()):
        return
    where, index, others = _first_bad(good)
    entry = value[index].item()
    if math.isnan(entry):
        cause = "A NaN usually comes from a step that diverged, or from NaN in the network's input"
        cure = "torch.autograd.set_detect_anomaly(True) finds where; to keep scales away from 0, use"
    elif entry == 0:
        cause = "An exact zero usually comes from a ReLU or from an exp that underflowed"
        cure = "to turn the raw output x of a layer (before any ReLU) into a positive scale, use"
    else:
        cause = "A negative entry usually is the raw output of a layer, which nothing has made positive"
        cure = "to turn such an output x into a positive scale, use"
    whole = f"{name} of {owner}" if owner else name
    raise ValueError(
        f"{whole} must be positive, but {name}{where} is {entry}{others}. {cause}; {cure} "
        "stablekl.softplus_scale(x, floor=1e-3), with a floor that suits the data."
    )


def raise_outside(owner: str, name: str, value: Tensor, good: Tensor, requirement: str) -> None:
    """Raise the error of a parameter that is outside of its domain.

    Args:
        owner: the name of the class whose parameter it is.
        name: of the parameter.
        value: what was given.
        good: where it is in the domain; without the last dimensions of ``value`` where these are judged together.
        requirement: the domain, to be read after "must be".

    Raises:
        ValueError: names the first bad index and its value, and the likely cause.
    """
    where, index, others = _first_bad(good)
    entry = value[index].detach()
    shown = entry.item() if entry.ndim == 0 else entry.tolist()
    if bool(entry.isnan().any()):
        cause = (
            "A NaN usually comes from a step that diverged, or from NaN in the network's input; "
            "torch.autograd.set_detect_anomaly(True) finds where"
        )
    elif name == "probs" and good.shape == value.shape and entry == 0:
        cause = "An exact zero usually is a probability that has underflowed: give its logit as logits"
    elif name == "probs":
        cause = (
            "Values outside of [0, 1], or sums that are not 1, usually are the raw output of a layer: give that as "
            "logits"
        )
    elif name == "logits":
        cause = "A log-probability usually is infinite since a probability has underflowed to 0"
    else:
        cause = "Such a value usually is the raw output of a layer, or the result of an overflow"
    raise ValueError(f"{name} of {owner} must be {requirement}, but {name}{where} is {shown}{others}. {cause}.")


def _check_floor(floor: float, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    smallest = info.tiny * info.eps  # the smallest subnormal
    if not (floor == 0 or smallest <= floor <= info.max):
        raise ValueError(
            f"floor must be 0, or positive and representable in {dtype} ({smallest:.3g} to {info.max:.3g}), "
            f"but is {floor}. A floor that rounds to zero is none: choose a larger one or a wider dtype."
        )


# --- softplus ---------------------------------------------------------------------------------------------


def _softplus_value(x: Tensor, *, lifted: bool = False) -> Tensor:
    # torch's softplus returns x beyond a threshold of 20 (1e-10 off in float64)
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


def _sigmoid_value(x: Tensor, *, lifted: bool = False) -> Tensor:
    # 1/(1 + exp(-x)) is 0 as soon as exp(-x) overflows, where exp(x) still is a number
    e = torch.exp(-x.abs())
    return torch.where(x < 0, e, 1) / (1 + e)


_sigmoid = elementwise(_sigmoid_value, lambda x: _sigmoid_value(x) * _sigmoid_value(-x))
_softplus = elementwise(_softplus_value, _sigmoid)
_inverse_softplus = elementwise(
    # y + log(1 - exp(-y)) for large y, where expm1(y) overflows; log(expm1(y)) for small y, where they cancel
    lambda y, lifted=False: torch.where(y < 1, torch.log(torch.expm1(y)), y + torch.log1p(-torch.exp(-y))),
    lambda y: -1 / torch.expm1(-y),
)


def softplus_scale(x: Tensor, floor: float = 0.0) -> Tensor:
    """Turn an unconstrained tensor into a positive one: ``floor + log(1 + exp(x))``.

    Without a floor the result is ``exp(x)`` far below zero and underflows to 0 where exp does (x < -104 in
    float32, -17 in float16): give a floor where the network may go there. The gradient is ``sigmoid(x)``.

    Args:
        x: any shape, such as the output of a linear layer.
        floor: the infimum of the result; 0 or representable in the dtype of ``x``.

    Returns:
        A tensor of the shape and dtype of ``x``.

    Raises:
        ValueError: the floor is negative, NaN or infinite, or rounds to zero in the dtype.

    Accuracy: 0.51 ulp in float32 on a CPU and in half precisions, else 2 ulp; a floor adds one rounding.

    Example:
        >>> import torch, stablekl
        >>> print(stablekl.softplus_scale(torch.tensor([-100.0, 0.0, 100.0]), floor=0.01))
        tensor([1.0000e-02, 7.0315e-01, 1.0001e+02])
    """
    _check_floor(floor, x.dtype)
    if floor == 0:
        return broadcast_apply(_softplus, x)
    return broadcast_apply(lambda x: _softplus(x) + floor, x)


def inverse_softplus_scale(scale: Tensor, floor: float = 0.0) -> Tensor:
    """Find the x for which ``softplus_scale(x, floor)`` is ``scale``.

    Args:
        scale: any shape, greater than ``floor``.
        floor: as given to `softplus_scale`.

    Returns:
        A tensor of the shape and dtype of ``scale``.

    Raises:
        ValueError: the floor is not valid, or an entry of ``scale`` is not above it (says which).
    """
    _check_floor(floor, scale.dtype)
    if holds_data(scale) and not bool((good := scale > floor).all()):
        where, index, others = _first_bad(good)
        raise ValueError(
            f"scale must be greater than floor = {floor}, but scale{where} is {scale[index].item()}{others}. "
            "softplus_scale reaches only values above its floor: lower it, or start from a larger scale."
        )
    return broadcast_apply(lambda y: _inverse_softplus(y - floor), scale)


# --- bounded log-scale ------------------------------------------------------------------------------------


def _squash_value(t: Tensor, *, lifted: bool = False) -> Tensor:
    return torch.where(t.isinf(), t.sign(), t / torch.hypot(t, torch.ones_like(t)))


_squash = elementwise(_squash_value, lambda t: (1 / torch.hypot(t, torch.ones_like(t))) ** 3)


def _check_log_bounds(min_log: float, max_log: float, dtype: torch.dtype) -> tuple[float, float]:
    info = torch.finfo(dtype)
    low, high = math.log(info.tiny), math.log(info.max)
    if not low <= min_log < max_log <= high:
        raise ValueError(
            f"the bounds must satisfy {low:.2f} <= min_log < max_log <= {high:.2f}, so that exp of both is a "
            f"normal number in {dtype}, but are min_log = {min_log} and max_log = {max_log}. They bound the "
            "logarithm of the scale, not the scale."
        )
    return 0.5 * (min_log + max_log), 0.5 * (max_log - min_log)


def bounded_log_scale(x: Tensor, min_log: float, max_log: float) -> Tensor:
    """Turn an unconstrained tensor into a scale between ``exp(min_log)`` and ``exp(max_log)``.

    The log-scale is ``m + h t/sqrt(1 + t^2)``, t = (x - m)/h, with m the middle and h half the width of the
    bounds: x itself in the middle, and its derivative ``(1 + t^2)^(-3/2)`` falls off like a power. A clamp
    has no gradient outside the bounds, and that of a sigmoid or a softplus dies exponentially, so that a
    unit that strayed never returns.

    Args:
        x: any shape, such as the output of a linear layer; a log-scale where it is well inside the bounds.
        min_log: lower bound of the logarithm of the result.
        max_log: upper bound of the logarithm of the result.

    Returns:
        The scale (not its logarithm), of the shape and dtype of ``x``.

    Accuracy: exp turns the rounding of the log-scale into its size in ulps, 3 ulp for bounds of +-3 and 12 for +-20.

    Raises:
        ValueError: the bounds are not in order, or exp of one is not a normal number of the dtype.

    Example:
        >>> import torch, stablekl
        >>> print(stablekl.bounded_log_scale(torch.tensor([-1e6, 0.0, 1e6]), -3.0, 3.0))
        tensor([ 0.0498,  1.0000, 20.0855])
    """
    m, h = _check_log_bounds(min_log, max_log, x.dtype)
    return broadcast_apply(lambda x: torch.exp(m + h * _squash((x - m) / h)), x)


def inverse_bounded_log_scale(scale: Tensor, min_log: float, max_log: float) -> Tensor:
    """Find the x for which ``bounded_log_scale(x, min_log, max_log)`` is ``scale``.

    Args:
        scale: any shape, strictly between ``exp(min_log)`` and ``exp(max_log)``.
        min_log: as given to `bounded_log_scale`.
        max_log: as given to `bounded_log_scale`.

    Returns:
        A tensor of the shape and dtype of ``scale``.

    Raises:
        ValueError: the bounds are not valid, or an entry of ``scale`` is not between them (says which).
    """
    m, h = _check_log_bounds(min_log, max_log, scale.dtype)
    working = torch.promote_types(scale.dtype, torch.float32)
    log_scale = torch.log(scale.to(working))
    if holds_data(scale) and not bool((good := (log_scale > min_log) & (log_scale < max_log)).all()):
        where, index, others = _first_bad(good)
        raise ValueError(
            f"scale must be strictly between exp(min_log) = {math.exp(min_log):.6g} and exp(max_log) = "
            f"{math.exp(max_log):.6g}, but scale{where} is {scale[index].item()}{others}. "
            "The bounds are reached only by an infinite x: widen them."
        )
    # 1 - u^2 as (max - log)(log - min)/h^2 keeps its accuracy next to a bound
    room = torch.sqrt((max_log - log_scale) * (log_scale - min_log))
    return (m + h * ((log_scale - m) / room)).to(scale.dtype)


# --- lower triangular -------------------------------------------------------------------------------------


def scale_tril_from_unconstrained(x: Tensor, dim: int, floor: float = 0.0) -> Tensor:
    """Turn vectors into lower triangular matrices with a positive diagonal (Cholesky factors).

    The entries of a vector fill the triangle row by row, (0, 0), (1, 0), (1, 1), (2, 0) ..., and those on the
    diagonal go through `softplus_scale`.

    Args:
        x: shape ``(..., dim * (dim + 1) / 2)``, such as the output of a linear layer.
        dim: size D of the matrices.
        floor: the infimum of the diagonal, as in `softplus_scale`.

    Returns:
        Shape ``(..., dim, dim)``, zero above the diagonal.

    Raises:
        ValueError: the last dimension has another size (says which it should be), or the floor is not valid.

    Example:
        >>> import torch, stablekl
        >>> print(stablekl.scale_tril_from_unconstrained(torch.tensor([0.0, 2.0, 0.0]), dim=2))
        tensor([[0.6931, 0.0000],
                [2.0000, 0.6931]])
    """
    if dim < 1:
        raise ValueError(f"dim, the size of the matrices, must be at least 1, but is {dim}.")
    size = dim * (dim + 1) // 2
    if x.ndim == 0 or x.shape[-1] != size:
        raise ValueError(
            f"the last dimension of x must be dim * (dim + 1) / 2 = {size} for dim = {dim}, but x has shape "
            f"{tuple(x.shape)}. A triangle has {dim} entries on its diagonal and {size - dim} below it: give "
            f"the last layer {size} outputs."
        )
    row = torch.arange(dim, device=x.device)
    # for each entry of the matrix, where in the vector it is; above the diagonal any valid place will do
    place = (row * (row + 1) // 2)[:, None] + torch.minimum(row[None, :], row[:, None])
    diagonal = softplus_scale(x[..., row * (row + 3) // 2], floor)
    return x[..., place].tril(-1) + torch.diag_embed(diagonal)


def unconstrained_from_scale_tril(scale_tril: Tensor, floor: float = 0.0) -> Tensor:
    """Find the x for which ``scale_tril_from_unconstrained(x, dim, floor)`` is ``scale_tril``.

    Args:
        scale_tril: shape ``(..., D, D)``; what is above the diagonal is not read.
        floor: as given to `scale_tril_from_unconstrained`.

    Returns:
        Shape ``(..., D * (D + 1) / 2)``.

    Raises:
        ValueError: the matrices are not square, or a diagonal entry is not above the floor (says which).
    """
    if scale_tril.ndim < 2 or scale_tril.shape[-1] != scale_tril.shape[-2]:
        raise ValueError(f"scale_tril must hold square matrices, (..., D, D), but has shape {tuple(scale_tril.shape)}.")
    diagonal = inverse_softplus_scale(scale_tril.diagonal(dim1=-2, dim2=-1), floor)
    size = scale_tril.shape[-1]
    rows, columns = torch.tril_indices(size, size, device=scale_tril.device).unbind(0)
    return (scale_tril.tril(-1) + torch.diag_embed(diagonal))[..., rows, columns]
