r"""Three Gaussian components in any dimension: pairs, and one integral over a plane.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._autograd import rowwise
from .components import Components
from .spectral import label_information
from .triple_gradient import Moments, diagonal_gradient, full_gradient, moments
from .triple_terms import RULE_ERROR, Geometry, Rule, blocks, geometry, integrand, log_moment, plane_rule, spectrum

__all__ = ["triple_information", "triple_term"]

Sums = tuple[Tensor, Tensor, Moments | None]


def _flat(x: Tensor, events: int) -> Tensor:
    return x.reshape(-1, *x.shape[x.ndim - events :])


def _sums(log_weights: Tensor, frame: Geometry, rule: Rule, information: bool, derivative: bool) -> Sums:
    """F [B], its slope by the log-weights at fixed (w1 w2 w3)^(1/3), [B, 3], and the moments for its gradient."""
    rows: list[list[Tensor]] = []
    for row, part in blocks(log_weights.shape[0], frame.shift.shape[-1]):
        nodes = Rule(rule.direction[part], rule.radius, rule.real[part], rule.imag[part])
        local = Geometry(*(field[row] for field in frame))
        along = spectrum(local, nodes.direction)
        real, imag = log_moment(local, along, nodes.direction, nodes.radius)
        tr, ti, kr, ki = integrand(log_weights[row], nodes, real, imag, information)
        sums = [tr.sum((-2, -1)), -(ti @ nodes.radius) @ nodes.direction]
        if derivative:
            sums += moments(along, nodes.direction, nodes.radius, kr, ki)
        rows = rows if part.start else [*rows, []]
        rows[-1] = [s + t for s, t in zip(rows[-1], sums, strict=True)] if rows[-1] else sums
    value, slope, *rest = (torch.cat(parts) if len(rows) > 1 else parts[0] for parts in zip(*rows, strict=True))
    return value, slope, Moments(*rest) if derivative else None


def _engine(information: bool, diagonal: bool) -> Callable[..., Tensor]:
    events = (1, 2, 2 if diagonal else 3)

    def value(*inputs: Tensor) -> tuple[Tensor, ...]:
        log_weights, loc, scale = (_flat(x, e) for x, e in zip(inputs, events, strict=True))
        out = _sums(log_weights, geometry(loc, scale), plane_rule(loc.device), information, derivative=False)[0]
        return (out.reshape(inputs[0].shape[:-1]),)

    def gradient(inputs: tuple[Tensor, ...], saved: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        log_weights, loc, scale = (_flat(x, e) for x, e in zip(inputs, events, strict=True))
        frame = geometry(loc, scale)
        out, slope, sums = _sums(log_weights, frame, plane_rule(loc.device), information, derivative=True)
        pair = diagonal_gradient(scale, frame, sums) if diagonal else full_gradient(frame, sums)
        results = (out.unsqueeze(-1) / 3 + slope, *pair)
        return tuple(r.reshape(x.shape) for r, x in zip(results, inputs, strict=True))

    return rowwise(value, gradient)


_ENGINES = {
    (information, diagonal): _engine(information, diagonal)
    for information in (True, False)
    for diagonal in (True, False)
}


def _prepared(components: Components) -> Components:
    log_weights, loc, scale = components
    if log_weights.shape[-1] != 3 or loc.shape[-2] != 3:
        raise ValueError(
            "the plane integral is for three components, got log_weights of shape "
            f"{tuple(log_weights.shape)} and loc of shape {tuple(loc.shape)}; for any other number of "
            "components use kl_estimate with method='auto'"
        )
    diagonal = components.is_diagonal
    if not diagonal and loc.shape[-1] == 1:
        scale, diagonal = scale.squeeze(-1), True
    events = 2 if diagonal else 3
    corner = scale[..., 0, 0] if diagonal else scale[..., 0, 0, 0]
    batch = (log_weights[..., 0] + loc[..., 0, 0] + corner).shape
    return Components(
        *(x.to(torch.float64).expand(batch + x.shape[x.ndim - e :]) for x, e in ((log_weights, 1), (loc, 2), (scale, events)))
    )


def triple_term(components: Components) -> Tensor:
    p = _prepared(components)
    return _ENGINES[False, p.is_diagonal](*p)


def triple_information(p: Components) -> tuple[Tensor, Tensor]:
    p = _prepared(p)
    total = -_ENGINES[True, p.is_diagonal](*p)
    dim = -2 if p.is_diagonal else -3
    for i, j in ((0, 1), (0, 2), (1, 2)):
        pair = (torch.stack([x.select(d, i), x.select(d, j)], d) for x, d in zip(p, (-1, -2, dim), strict=True))
        total = total + label_information(Components(*pair))
    return total, torch.full_like(total.detach(), RULE_ERROR)
