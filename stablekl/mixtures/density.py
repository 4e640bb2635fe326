"""Log-density of Gaussian mixtures, streamed: no points x components x dimensions tensor, forward or backward.

Written from the definition, log p(x) = log sum_k exp(log w_k + log N(x; mu_k, Sigma_k)), in log space, with the
mean subtracted before anything is multiplied (right at x = 1e10). Gradients are stated by hand through the
responsibilities r_k = softmax_k: a weight of zero, or a component whose log-density is -inf, contributes
exactly nothing to the value and to every gradient.

The parameters are shared by many points, and points and components meet only in blocks that fit into the
cache (`density_blocks`): of the direct form, or, for float32 diagonals on a CPU, of a float64 matrix product
(`density_expanded`) where its error is provably below float32's. When the result must be traced or differentiated
again, it is one expression over whole tensors (torch.compile fuses its reductions).

Accuracy: `tests/test_density.py` has the regimes and the worst observed errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from .._autograd import custom, is_plain
from ..distributions._base import broadcast_shape
from . import density_blocks as blocks
from .components import Components
from .density_terms import base, coefficients, inverse_factor, is_diagonal, living, parameter_gradients, pool

__all__ = ["component_log_probs", "mixture_log_prob"]


def mixture_log_prob(value: Tensor, components: Components) -> Tensor:
    """Log-density of a Gaussian mixture, log sum_k w_k N(x; mu_k, Sigma_k).

    Args:
        value: points, shape ``sample_shape + batch_shape + (D,)``.
        components: weights, means and scales, ``batch_shape`` in front.

    Returns:
        Shape ``sample_shape + batch_shape``; -inf (with gradient zero) where every component is -inf.
    """
    result: Tensor = _evaluate(value, components, pooled=True).movedim(-1, 0)
    return result.reshape(_shape(value, components)).to(_dtype(value, components))


def component_log_probs(value: Tensor, components: Components) -> Tensor:
    """Log-density of every component, log N(x; mu_k, Sigma_k), without the weights.

    Args:
        value: points, shape ``sample_shape + batch_shape + (D,)``.
        components: means and scales, ``batch_shape`` in front; the weights are not read.

    Returns:
        Shape ``sample_shape + batch_shape + (K,)``.
    """
    unweighted = components._replace(log_weights=torch.zeros_like(components.loc[..., 0]))
    result: Tensor = _evaluate(value, unweighted, pooled=False).movedim(-1, 0)
    shape = (*_shape(value, components), components.loc.shape[-2])
    return result.reshape(shape).to(_dtype(value, components))


def _dtype(value: Tensor, components: Components) -> torch.dtype:
    return reduce(torch.promote_types, (t.dtype for t in components), value.dtype)


def _batch_shape(components: Components) -> torch.Size:
    event = components.scale.ndim - 2 if components.is_diagonal else components.scale.ndim - 3
    log_weights, loc, scale = components
    shapes = log_weights.shape[:-1], loc.shape[:-2], scale.shape[:event]
    return broadcast_shape(*shapes)


def _shape(value: Tensor, components: Components) -> torch.Size:
    shapes = value.shape[:-1], _batch_shape(components)
    return broadcast_shape(*shapes)


def _evaluate(value: Tensor, components: Components, *, pooled: bool) -> Tensor:
    """Bring the arguments into this file's layout and call the function; points stay last."""
    dtype = _dtype(value, components)
    dtype = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    shape = _shape(value, components)
    # that of the components, or where they have a 1 and the points more, that of the points
    batch = shape[len(shape) - len(_batch_shape(components)) :]
    samples = math.prod(shape[: len(shape) - len(batch)])
    x = value.to(dtype).expand(*shape, value.shape[-1]).reshape(samples, *batch, value.shape[-1]).movedim(0, -1)
    k, d = components.loc.shape[-2:]
    parameters = (
        components.log_weights.to(dtype).expand(*batch, k),
        components.loc.to(dtype).expand(*batch, k, d),
        components.scale.to(dtype).expand(*batch, k, *components.scale.shape[components.loc.ndim - 1 :]),
    )
    if not pooled:
        return _components(x, *parameters)
    # The responsibilities cost N K elements to keep. For D < 4 that is of the order of N K D: recompute them.
    keep = d >= 4 and torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters))
    return (_mixture_keep if keep else _mixture)(x, *parameters)


def _expression(inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (..., K, N), z (..., K, D, N) (zero where a logit is -inf) and inverse factors, differentiable."""
    x, log_weights, loc, scale = inputs
    loc, scale = living(log_weights, loc, scale)
    inverse, constant = inverse_factor(loc, scale), base(log_weights, loc, scale)
    infinite = x.isinf()
    deviation = torch.where(infinite, 0.0, x).unsqueeze(-3) - loc.unsqueeze(-1)
    z = deviation * inverse.unsqueeze(-1) if is_diagonal(loc, inverse) else inverse @ deviation
    # A dead entry must not reach an operation whose derivative at it is NaN: 0 * inf in the second backward.
    dead = infinite.any(-2, keepdim=True) | z.detach().square().sum(-2).isinf()
    z = torch.where(dead.unsqueeze(-2), 0.0, z)
    logits = constant.unsqueeze(-1) - 0.5 * z.square().sum(-2)
    return logits.masked_fill(dead, -math.inf), z, inverse


def _vjp(pooled: bool, grad: Tensor, inputs: Sequence[Tensor], needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
    logits, z, inverse = _expression(inputs)
    c = coefficients(grad, logits, pooled)
    cz = c.unsqueeze(-2) * z
    diagonal = is_diagonal(inputs[2], inverse)
    d_x = -(cz * inverse.unsqueeze(-1) if diagonal else inverse.mT @ cz).sum(-3)
    second = (cz * z).sum(-1) if diagonal else cz @ z.mT
    results = (d_x, *parameter_gradients((c.sum(-1), cz.sum(-1), second), inverse))
    return tuple(r if wanted else None for r, wanted in zip(results, needed, strict=True))


def _jvp(pooled: bool, inputs: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> Tensor:
    logits, z, inverse = _expression(inputs)
    dx, d_log_weights, d_loc, d_scale = (
        torch.zeros_like(i) if t is None else t for i, t in zip(inputs, tangents, strict=True)
    )
    shift = dx.unsqueeze(-3) - d_loc.unsqueeze(-1)
    if is_diagonal(d_loc, inverse):
        dz = (shift - z * d_scale.unsqueeze(-1)) * inverse.unsqueeze(-1)
        volume = (d_scale * inverse).sum(-1)
    else:
        d_scale = d_scale.tril()
        dz = inverse @ (shift - d_scale @ z)
        volume = (d_scale * inverse).diagonal(dim1=-2, dim2=-1).sum(-1)
    d_logits = (d_log_weights - volume).unsqueeze(-1) - (z * dz).sum(-2)
    c = coefficients(torch.ones_like(logits[..., 0, :] if pooled else logits), logits, pooled)
    terms = torch.where(c == 0, 0.0, c * d_logits)
    return terms.sum(-2) if pooled else terms


def _function(*, pooled: bool, keep: bool = False) -> Callable[..., Tensor]:
    # Plain nested functions: torch.compile cannot trace a functools.partial here.
    def value(*inputs: Tensor) -> tuple[Tensor, ...]:
        if is_plain(inputs):
            return blocks.value(pooled, keep, inputs)
        logits = _expression(inputs)[0]
        return (pool(logits)[0] if pooled else logits,)

    def vjp(
        grad: Tensor, inputs: Sequence[Tensor], saved: Sequence[Tensor] | None, needed: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        if saved is not None and is_plain((grad, *inputs)):
            return blocks.vjp(pooled, grad, inputs, saved, needed)
        return _vjp(pooled, grad, inputs, needed)

    def jvp(inputs: Sequence[Tensor], tangents: Sequence[Tensor | None], ndim: int) -> Tensor:
        return _jvp(pooled, inputs, tangents)

    return custom(value, vjp, jvp)


_components = _function(pooled=False)
_mixture = _function(pooled=True)
_mixture_keep = _function(pooled=True, keep=True)
