r"""Three Gaussian components in any dimension: pairs, and one integral over a plane."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .._autograd import rowwise
from .components import Components
from .reading import is_eager
from .spectral import label_information
from .triple_gradient import Moments, diagonal_gradient, full_gradient, inverse_sums, moments
from .triple_terms import RULE_ERROR, Geometry, Rule, blocks, geometry, integrand, log_moment, plane_rule, spectrum

__all__ = ["triple_information", "triple_term"]


def _flat(x: Tensor, events: int) -> Tensor:
    return x.reshape(-1, *x.shape[x.ndim - events :])


def _accumulate(
    sums: Callable[[Tensor, Geometry, Rule, slice], Sequence[Tensor]],
    log_weights: Tensor,
    frame: Geometry,
    size: int,
) -> tuple[Tensor, ...]:
    """``sums(log_weights, frame, rule, rows)`` block by block over rows and directions, each of bounded size."""
    rule = plane_rule(log_weights.device)
    rows: list[list[Tensor]] = []
    for row, part in blocks(log_weights.shape[0], size):
        nodes = Rule(rule.direction[part], rule.radius, rule.real[part], rule.imag[part])
        new = list(sums(log_weights[row], Geometry(*(field[row] for field in frame)), nodes, row))
        if not part.start:
            rows.append(new)
        else:
            rows[-1] = [total + x for total, x in zip(rows[-1], new, strict=True)]
    return tuple(torch.cat(parts) if len(rows) > 1 else parts[0] for parts in zip(*rows, strict=True))


def _engine(information: bool, diagonal: bool) -> Callable[..., Tensor]:
    events = (1, 2, 2 if diagonal else 3)

    def values(log_weights: Tensor, frame: Geometry, rule: Rule, _: slice) -> list[Tensor]:
        real, imag = log_moment(frame, spectrum(frame, rule.direction), rule)
        return [integrand(log_weights, rule, real, imag, information)[0].sum((-2, -1))]

    def first_order(log_weights: Tensor, frame: Geometry, rule: Rule, _: slice) -> list[Tensor]:
        along = spectrum(frame, rule.direction)
        tr, ti, kr, ki = integrand(log_weights, rule, *log_moment(frame, along, rule), information)
        slope = -(ti @ rule.radius) @ rule.direction
        return [tr.sum((-2, -1)), slope, *moments(along, rule, kr, ki)]

    def by_formula(log_weights: Tensor, loc: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        frame = geometry(loc, scale)
        value, slope, *sums = _accumulate(first_order, log_weights, frame, loc.shape[-1])
        m = Moments(*sums)
        pair = diagonal_gradient(scale, frame, m) if diagonal else full_gradient(frame, m)
        return value.unsqueeze(-1) / 3 + slope, *pair

    def by_inverses(log_weights: Tensor, loc: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        def second_order(lw: Tensor, frame: Geometry, rule: Rule, row: slice) -> tuple[Tensor, ...]:
            exact = log_moment(frame, spectrum(frame, rule.direction), rule)
            inputs = (lw, loc[row], scale[row], rule, *exact, information)
            if torch.is_grad_enabled() and is_eager(log_weights, loc, scale):
                result: tuple[Tensor, ...] = checkpoint(
                    inverse_sums, *inputs, use_reentrant=False, preserve_rng_state=False
                )
                return result
            return inverse_sums(*inputs)

        frame = geometry(loc.detach(), scale.detach())
        value, slope, *pair = _accumulate(second_order, log_weights, frame, loc.shape[-1] ** 2)
        return value.unsqueeze(-1) / 3 + slope, *pair

    def value(*inputs: Tensor) -> tuple[Tensor, ...]:
        log_weights, loc, scale = (_flat(x, e) for x, e in zip(inputs, events, strict=True))
        (out,) = _accumulate(values, log_weights, geometry(loc, scale), loc.shape[-1])
        return (out.reshape(inputs[0].shape[:-1]),)

    def gradient(inputs: tuple[Tensor, ...], saved: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        flat = [_flat(x, e) for x, e in zip(inputs, events, strict=True)]
        if saved is None and not diagonal:
            exact = by_formula(*(x.detach() for x in flat))
            moving = by_inverses(*flat)
            results = tuple(e + (m - m.detach()) for e, m in zip(exact, moving, strict=True))
        else:
            results = by_formula(*flat)
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
        *(
            x.to(torch.float64).expand(batch + x.shape[x.ndim - e :])
            for x, e in ((log_weights, 1), (loc, 2), (scale, events))
        )
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
