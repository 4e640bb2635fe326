"""Two components of an exponential family that is not Gaussian: the integral of `spectral` with their own rho.

Nothing of that integral depends on the family but the Chernoff coefficient, and abs(rho) <= 1 on the strip for any two
densities or mass functions: the nodes and the bound on the error are the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..._autograd import rowwise
from .chernoff import Chernoff, Tensors
from .chernoff_gaps import Complex
from .spectral_gradient import sensitivity, weight_gradient
from .spectral_terms import BLOCK, NODES, Rule, fixed_rule, integral, slope

__all__ = ["family_information"]


def _blocks(rows: int, width: int) -> Iterator[slice]:
    """Rows that are handled at once; all of them while tracing."""
    if torch.compiler.is_compiling() or rows == 0:
        yield slice(None)
        return
    step = max(1, BLOCK // (NODES * width))
    for start in range(0, rows, step):
        yield slice(start, start + step)


@functools.cache
def _engine(family: Chernoff) -> Callable[..., Tensor]:
    def flat(x: Tensor, events: int) -> Tensor:
        return x.reshape(-1, *x.shape[x.ndim - events :])

    def by_rows(f: Callable[..., Tensors], *inputs: Tensor) -> Tensors:
        width = inputs[0][0].numel() if len(inputs[0]) else 1
        parts = [f(*(x[rows] for x in inputs)) for rows in _blocks(len(inputs[0]), width)]
        return parts[0] if len(parts) == 1 else tuple(torch.cat(p) for p in zip(*parts, strict=True))

    def log_rho(parameters: Tensors, omega: Tensor) -> tuple[Tensor, Tensor]:
        def minus_gap(*inputs: Tensor) -> Tensors:
            gap = family.gap(inputs[:-1], inputs[-1])
            return -gap.real, -gap.imag

        real, imag = by_rows(minus_gap, *parameters, omega)
        return real, imag

    def flattened(log_weights: Tensor, parameters: Tensors) -> tuple[Tensor, Tensors, Rule]:
        weights = flat(log_weights, 1)
        inputs = tuple(flat(x, n) for x, n in zip(parameters, family.events, strict=True))
        return weights, inputs, fixed_rule(weights[..., 0].detach())

    def value(log_weights: Tensor, *parameters: Tensor) -> Tensors:
        weights, inputs, rule = flattened(log_weights, parameters)
        real, imag = log_rho(inputs, rule[0])
        batch = log_weights.shape[:-1]
        result = integral(weights, rule, real, imag, information=True)
        return result.reshape(batch), real.reshape(*batch, NODES), imag.reshape(*batch, NODES)

    def gradient(inputs: Tensors, saved: Tensors | None) -> Tensors:
        weights, parameters, rule = flattened(inputs[0], inputs[1:])
        real, imag = log_rho(parameters, rule[0]) if saved is None else (flat(x, 1) for x in saved)
        by_weight = weight_gradient(*(f(weights, rule, real, imag, True) for f in (integral, slope)))

        def partials(*rows: Tensor) -> Tensors:
            return family.partials(rows[:-3], rows[-3], Complex(*rows[-2:]))

        kappa = sensitivity(weights, rule, real, imag, information=True)
        results = (by_weight, *by_rows(partials, *parameters, rule[0], *kappa))
        return tuple(r.reshape(x.shape) for r, x in zip(results, inputs, strict=True))

    return rowwise(value, gradient)


def family_information(family: Chernoff, log_weights: Tensor, parameters: Tensors) -> Tensor:
    """I(X; Z) of two components, which is 0, with gradients of 0 in the parameters, where they are the same.

    Args:
        family: theirs.
        log_weights: normalised, ``batch_shape + (2,)``, float64; independent inputs, as in `label_information`.
        parameters: of the batch shape and the family's event dimensions.

    Returns:
        In nats, of the batch shape.
    """
    return _engine(family)(log_weights, *parameters)
