"""Two components of an exponential family that is not Gaussian: the integral of `spectral` with their own rho.

Nothing of that integral depends on the family but the Chernoff coefficient, and abs(rho) <= 1 on the strip for any two
densities or mass functions: the nodes and the bound on the error are the same.

torch.compile sees log rho and its derivatives as two operators that run as they do outside: their hundred passes over
the nodes, which inductor would unite into a few, take it minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from ..._autograd import rowwise
from .chernoff import CHERNOFF, Chernoff, Tensors
from .chernoff_gaps import Complex
from .spectral_gradient import sensitivity, weight_gradient
from .spectral_terms import BLOCK, NODES, Rule, fixed_rule, integral, slope

__all__ = ["family_information"]

_FAMILIES = {family.name: family for family in CHERNOFF}


def _by_rows(width: int, f: Callable[..., Tensors], inputs: list[Tensor]) -> list[Tensor]:
    """``f`` of so many rows at once that float64 temporaries stay in a core's cache."""
    rows = len(inputs[0])
    step = max(1, BLOCK // (NODES * width * inputs[0][0].numel())) if rows else 1
    if rows <= step:
        return list(f(*inputs))
    parts = [f(*(x[start : start + step] for x in inputs)) for start in range(0, rows, step)]
    return [torch.cat(p) for p in zip(*parts, strict=True)]


def _log_rho(name: str, inputs: list[Tensor]) -> list[Tensor]:
    """Real and imaginary part of log rho, from the parameters and the nodes."""
    family = _FAMILIES[name]

    def minus_gap(*rows: Tensor) -> Tensors:
        gap = family.gap(rows[:-1], rows[-1])
        return -gap.real, -gap.imag

    return _by_rows(family.width, minus_gap, inputs)


def _partials(name: str, inputs: list[Tensor]) -> list[Tensor]:
    """The family's partial derivatives, from the parameters, the nodes and kappa."""
    family = _FAMILIES[name]

    def partials(*rows: Tensor) -> Tensors:
        return family.partials(rows[:-3], rows[-3], Complex(*rows[-2:]))

    return _by_rows(family.width, partials, inputs)


@torch.library.custom_op("stablekl::chernoff_log_rho", mutates_args=())
def _traced_log_rho(name: str, inputs: list[Tensor]) -> list[Tensor]:
    return [x.contiguous() for x in _log_rho(name, inputs)]


@_traced_log_rho.register_fake
def _(name: str, inputs: list[Tensor]) -> list[Tensor]:
    return [inputs[-1].new_empty(inputs[-1].shape) for _ in range(2)]


@torch.library.custom_op("stablekl::chernoff_partials", mutates_args=())
def _traced_partials(name: str, inputs: list[Tensor]) -> list[Tensor]:
    return [x.contiguous() for x in _partials(name, inputs)]


@_traced_partials.register_fake
def _(name: str, inputs: list[Tensor]) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in inputs[:-3]]


def _flat(x: Tensor, events: int) -> Tensor:
    return x.reshape(-1, *x.shape[x.ndim - events :])


def _engine(family: Chernoff) -> Callable[..., Tensor]:
    def log_rho(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        f = _traced_log_rho if torch.compiler.is_compiling() else _log_rho
        real, imag = cast("list[Tensor]", f(family.name, list(inputs)))
        return real, imag

    def flattened(log_weights: Tensor, parameters: Tensors) -> tuple[Tensor, Tensors, Rule]:
        weights = _flat(log_weights, 1)
        inputs = tuple([_flat(x, n) for x, n in zip(parameters, family.events, strict=True)])
        return weights, inputs, fixed_rule(weights[..., 0].detach())

    def value(log_weights: Tensor, *parameters: Tensor) -> Tensors:
        weights, inputs, rule = flattened(log_weights, parameters)
        real, imag = log_rho(*inputs, rule[0])
        batch = log_weights.shape[:-1]
        result = integral(weights, rule, real, imag, information=True)
        return result.reshape(batch), real.reshape(*batch, NODES), imag.reshape(*batch, NODES)

    def gradient(inputs: Tensors, saved: Tensors | None) -> Tensors:
        weights, parameters, rule = flattened(inputs[0], inputs[1:])
        real, imag = log_rho(*parameters, rule[0]) if saved is None else [_flat(x, 1) for x in saved]
        by_weight = weight_gradient(*[f(weights, rule, real, imag, True) for f in (integral, slope)])
        kappa = sensitivity(weights, rule, real, imag, information=True)
        f = _traced_partials if torch.compiler.is_compiling() else _partials
        by_parameter = cast("list[Tensor]", f(family.name, [*parameters, rule[0], *kappa]))
        return tuple([r.reshape(x.shape) for r, x in zip([by_weight, *by_parameter], inputs, strict=True)])

    return rowwise(value, gradient)


_ENGINES = {family.name: _engine(family) for family in CHERNOFF}


def family_information(family: Chernoff, log_weights: Tensor, parameters: Tensors) -> Tensor:
    """I(X; Z) of two components, which is 0, with gradients of 0 in the parameters, where they are the same.

    Args:
        family: theirs.
        log_weights: normalised, ``batch_shape + (2,)``, float64; independent inputs, as in `label_information`.
        parameters: of the batch shape and the family's event dimensions.

    Returns:
        In nats, of the batch shape.
    """
    return _ENGINES[family.name](log_weights, *parameters)
