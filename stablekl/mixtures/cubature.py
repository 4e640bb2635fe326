r"""KL divergence and information of Gaussian mixtures in two and three dimensions, by adaptive cubature.

Each mass is integrated in the coordinates of its own component (`cubature_cells`): with s = p + q, s_j its weighted
components and u = log(p/q), or s = p for the information, r the posterior of the label,

.. math::
    KL(p \| q) &= \sum_j \int s_j F(u)\,dx, \qquad F = \frac{p u - p + q}{p + q} = h \tanh h + (h - \tanh h), \quad h = u/2\\
    I(X; Z) &= \sum_j \int s_j KL(r \| w)\,dx,

so that a factor of every integrand is a standard normal density on a fixed ball, the other is bounded (by -log min w)
or grows like u, and the mass of every box is known beforehand: boxes that cannot matter are left out, and what they
could have held counts as error.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .._autograd import custom, is_dual
from .components import Components
from .cubature_cells import (
    BLOCK,
    Cells,
    Frame,
    Problem,
    evaluate,
    frames,
    largest_log_ratio,
    maps,
    chunks,
    moments,
    pair_maps,
    positions,
)
from .density_terms import inverse_factor, living, parameter_gradients

__all__ = ["cubature_information", "cubature_kl"]

# Boxes are at first at most so wide, in the standard deviation of any component in reach, given the other coordinates.
WIDTH = {2: 6.0, 3: 12.0}
OWN_WIDTH = {2: 6.0, 3: 9.0}
# A component matters where it is less than so many standard deviations away.
REACH = 9.0
# Narrower than 1/THIN of another component, and THIN times longer than wide: worth turning the axes for.
THIN = 3.0
# Share of the tolerance that a box may cost unseen.
UNSEEN = 1e-4
# p and q are near each other where parameters differ by less, in standard deviations.
NEAR = 0.05
# Elements per temporary where every operation is recorded.
RECORDED = 2**15
EPS = 2.0**-52
ROUNDING = 16.0
# Frames x components of the rows that are refined together.
ROWS = 2**12


def _nodes(dim: int, tolerance: float) -> int:
    """Nodes per axis and box."""
    if tolerance > (1e-10 if dim == 2 else 1e-8):
        return 8
    return 9 if dim == 2 else 10


def _bounds(problem: Problem, cells: Cells) -> tuple[Tensor, Tensor, Tensor]:
    """What a box may hold at most, and what is in it.

    Returns:
        A bound on the integral, (C,); the largest posterior weight that each component may have there, its logarithm,
        -inf beyond `REACH`, (K, C); the components' inverse widths on each axis given the others, (K, D, C).
    """
    _, z, slope = positions(problem.seen, cells)
    identity = torch.eye(z.shape[1], dtype=z.dtype, device=z.device).unsqueeze(-1)
    steepness = (slope + identity).square().sum(1).sqrt()
    spread = (steepness * cells.half).sum(1)
    distance = z.square().sum(1).sqrt()
    nearest = (distance - spread).clamp(min=0.0)
    lw = problem.seen.log_weights
    constant = (problem.seen.constant + lw).index_select(-1, cells.frame)
    most, least = constant - 0.5 * nearest * nearest, constant - 0.5 * (distance + spread) ** 2
    share = torch.where(nearest < REACH, most, -math.inf)
    split = problem.split
    if split:
        least_p, least_q = least[:split].amax(0), least[split:].amax(0)
        factor = 2.0 * torch.clamp(most[:split].amax(0) + math.log(split) - least_q, min=1.0)
        share = torch.cat((share[:split] - least_p, share[split:] - least_q))
        if problem.pairs is not None and problem.near is not None:
            u = largest_log_ratio(problem.pairs, cells, (distance + spread)[problem.pairs.p])
            factor = torch.where(problem.near[cells.frame] & (u < 1.0), 0.5 * u * u, factor)
    else:
        factor = -torch.where(torch.isinf(lw), 0.0, lw).amin(0)[cells.frame]
        share = share - least.amax(0)
    mass = problem.log_mass[cells.frame].exp()
    for y, half in zip(cells.centre.abs(), cells.half, strict=True):
        density = torch.exp(-0.5 * (y - half).clamp(min=0.0) ** 2) * (2.0 / math.sqrt(2.0 * math.pi))
        mass = mass * torch.clamp(density * half, max=1.0)
    return mass * factor, share, steepness


def _add(rows: int, index: Tensor, values: Tensor) -> Tensor:
    return values.new_zeros(rows).index_add_(0, index, values)


def _split(cells: Cells, axis: int, mask: Tensor, *rest: Tensor) -> tuple[Cells, list[Tensor]]:
    """The boxes with those of the mask cut in two across the axis; ``rest`` goes along."""
    kept, cut = cells.take(~mask), cells.take(mask)
    half = cut.half.clone()
    half[axis] *= 0.5
    step = torch.zeros_like(half)
    step[axis] = half[axis]
    parts = (kept, cut._replace(centre=cut.centre - step, half=half), cut._replace(centre=cut.centre + step, half=half))
    joined = Cells(*(torch.cat(x, -1) for x in zip(*parts, strict=True)))
    return joined, [torch.cat((x[..., ~mask], x[..., mask], x[..., mask]), -1) for x in rest]


def _first_boxes(problem: Problem, row: Tensor, tolerance: Tensor, most: int) -> tuple[Cells, Tensor, Tensor]:
    """Boxes no wider than the components that they may contain.

    Returns:
        The boxes; what may be missed in each, where there were too many of them; and in each row, outside of all.
    """
    dim, rows = problem.seen.shift.shape[1], len(tolerance)
    device = row.device
    per_row = _add(rows, row, torch.ones_like(problem.log_mass))
    unseen = UNSEEN * tolerance / per_row
    radius = torch.sqrt(-2.0 * torch.log(unseen))[row]
    cells = Cells(torch.arange(len(row), device=device), radius.new_zeros(dim, len(row)), radius.expand(dim, -1))
    bound = _bounds(problem, cells)[0]
    outside = _add(rows, row, 2.0 * dim * torch.erfc(radius / math.sqrt(2.0)) * bound)
    done: list[Cells] = []
    open_bounds: list[Tensor] = []
    while len(cells.frame):
        bound, share, steepness = _bounds(problem, cells)
        here = row[cells.frame]
        negligible = bound <= unseen[here]
        outside += _add(rows, here[negligible], bound[negligible])
        relevant = share > torch.log(unseen)[here]
        wide = (2.0 * cells.half * steepness > WIDTH[dim]) & relevant.unsqueeze(1)
        cut = (wide.any(0) | (2.0 * cells.half > OWN_WIDTH[dim])) & ~negligible
        count = _add(rows, here, torch.pow(2.0, cut.sum(0)))
        for c in done:
            count = count + _add(rows, row[c.frame], torch.ones_like(c.centre[0]))
        exhausted = (count > most)[here] & ~negligible
        final = (~cut.any(0) | exhausted) & ~negligible
        done.append(cells.take(final))
        open_bounds.append(torch.where(cut.any(0), bound, 0.0)[final])
        going = ~final & ~negligible
        cells, cut = cells.take(going), cut[:, going]
        for axis in range(dim):
            cells, (cut,) = _split(cells, axis, cut[axis], cut)
    return Cells(*(torch.cat(x, -1) for x in zip(*done, strict=True))), torch.cat(open_bounds), outside


def _refined(
    problem: Problem, row: Tensor, rows: int, n: int, tolerance: Callable[[Tensor], Tensor], max_points: int
) -> tuple[Cells, Tensor, Tensor]:
    """The final boxes, in the order of the rows, the value and the error."""
    most = max(1, max_points // n ** problem.seen.shift.shape[1])
    zero = problem.log_mass.new_zeros(rows)
    cells, missed, outside = _first_boxes(problem, row, tolerance(zero), most)
    value, error = evaluate(problem, cells, n)
    used = _add(rows, row[cells.frame], torch.ones_like(value))
    frozen = torch.zeros(rows, dtype=torch.bool, device=row.device)
    while True:
        here = row[cells.frame]
        total = _add(rows, here, error.sum(0) + missed) + outside
        goal = tolerance(_add(rows, here, value))
        count = _add(rows, here, torch.ones_like(value))
        active = (total > goal) & ~frozen
        worst, axis = error.max(0)
        chosen = active[here] & (error.sum(0) > (goal / count)[here])
        chosen &= _within(here, worst, chosen, ((most - used) / 2).floor())
        frozen |= _add(rows, here, chosen.to(value.dtype)) == 0
        if not bool(chosen.any()):
            break
        used += 2.0 * _add(rows, here, chosen.to(value.dtype))
        children = cells.take(chosen)
        half, step = children.half.clone(), torch.zeros_like(children.half)
        cut = axis[chosen].unsqueeze(0)
        half.scatter_(0, cut, 0.5 * half.gather(0, cut))
        step.scatter_(0, cut, half.gather(0, cut))
        pair = [children._replace(centre=children.centre + s * step, half=half) for s in (-1.0, 1.0)]
        children = Cells(*(torch.cat(x, -1) for x in zip(*pair, strict=True)))
        new_value, new_error = evaluate(problem, children, n)
        kept = cells.take(~chosen)
        cells = Cells(*(torch.cat(x, -1) for x in zip(kept, children, strict=True)))
        value = torch.cat((value[~chosen], new_value))
        error = torch.cat((error[:, ~chosen], new_error), -1)
        missed = torch.cat((missed[~chosen], 0.5 * missed[chosen].repeat(2)))
    order = torch.argsort(row[cells.frame], stable=True)
    cells, value = cells.take(order), value[order]
    value = _sums(value, row[cells.frame], rows)
    return cells, value, total


def _within(row: Tensor, worst: Tensor, chosen: Tensor, most: Tensor) -> Tensor:
    """The worst boxes of each row, as many as it may have."""
    if bool((_add(len(most), row, chosen.to(worst.dtype)) <= most).all()):
        return torch.ones_like(chosen)
    order = torch.argsort(torch.where(chosen, worst, -1.0), descending=True, stable=True)
    order = order[torch.argsort(row[order], stable=True)]
    start = torch.searchsorted(row[order], torch.arange(len(most), device=row.device))
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(row), device=row.device) - start[row[order]]
    return rank < most[row]


def _sums(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """Sums over the elements of each row, which are neighbours, two by two: the same bits whatever the other rows are."""
    while len(values):
        start = torch.searchsorted(row, torch.arange(rows, device=row.device))
        odd = (torch.arange(len(row), device=row.device) - start[row]) % 2 == 1
        if not bool(odd.any()):
            break
        partner = torch.zeros_like(values)
        partner[:-1] = torch.where(odd[1:], values[1:], 0.0)
        values, row = (values + partner)[~odd], row[~odd]
    return values.new_zeros(rows).index_copy_(0, row, values)


def _near(split: int, log_weights: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """The rows (B,) where the parameters of p are near those of q."""
    kp, kq = split, log_weights.shape[-1] - split
    lw, mp, sp = (x[:, :kp] for x in (log_weights, loc, scale))
    lv, mq, sq = (x[:, kp:] for x in (log_weights, loc, scale))
    right = torch.cat((sp - sq, (mp - mq).unsqueeze(-1)), -1)
    sq = sq.expand(*right.shape[:-1], -1)
    change = torch.linalg.solve_triangular(sq, right, upper=False).abs().amax((-1, -2, -3))
    if kp == kq:
        both_zero = torch.isinf(lw) & torch.isinf(lv)
        weight = torch.where(both_zero, 0.0, lw) - torch.where(both_zero, 0.0, lv)
        change = torch.maximum(change, weight.abs().amax(-1))
    return change < NEAR


def _problem(frame: Frame, split: int, log_weights: Tensor, loc: Tensor, scale: Tensor, near: Tensor | None) -> Problem:
    seen = maps(frame, log_weights, loc, scale)
    log_mass = log_weights.detach()[frame.row, frame.seed]
    if near is None:
        return Problem(seen, log_mass, split, None, None)
    return Problem(seen, log_mass, split, pair_maps(frame, seen, split, log_weights, loc, scale), near)


def _gradient(split: int, n: int, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives under the integral sign, at fixed nodes, with fixed shares of the frames in the integrand.

    ``d f / d log p_k = r_k p u`` and ``d f / d log q_k = r_k (q - p)``, r_k the posterior weights; for the information
    ``d f / d log p_k = w_k p_k t_k`` and ``d f / d log w_k = w_k (p_k t_k - p_k + m)``, t_k = log(p_k/m): all zero, not
    small, where p = q or where all components are the same.
    """
    log_weights, loc, scale, _, *rest = inputs
    frame, cells, near = Frame(*rest[:5]), Cells(*rest[5:8]), rest[8] if len(rest) > 8 else None
    problem = _problem(frame, split, log_weights, loc, scale, near)
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in inputs[:3])
    rows = log_weights.shape[0]
    totals: list[Tensor] | None = None
    for index, paired in chunks(problem, cells, n, RECORDED if recorded else BLOCK):
        chunk = cells.take(index)
        if recorded:
            parts = checkpoint(moments, problem, chunk, n, paired, use_reentrant=False, preserve_rng_state=False)
        else:
            parts = moments(problem, chunk, n, paired)
        sums = [x.new_zeros(*x.shape[:-1], len(frame.row)).index_add(-1, chunk.frame, x) for x in parts]
        totals = sums if totals is None else [a + b for a, b in zip(totals, sums, strict=True)]
    if totals is None:
        return torch.zeros_like(log_weights), torch.zeros_like(loc), torch.zeros_like(scale)
    from_weight, mass, first, second = (x.movedim(-1, 0) for x in totals)
    turn = frame.rotation.unsqueeze(1)
    first = (turn @ first.unsqueeze(-1)).squeeze(-1)
    second = turn @ second @ turn.mT
    from_weight, mass, first, second = (
        x.new_zeros(rows, *x.shape[1:]).index_add(0, frame.row, x) for x in (from_weight, mass, first, second)
    )
    _, by_loc, by_scale = parameter_gradients((mass, first, second), inverse_factor(loc, scale))
    return from_weight, by_loc, by_scale


@functools.lru_cache(maxsize=64)
def _known(split: int, n: int) -> Callable[..., Tensor]:
    """A value that is known, as a function of the parameters, (B, K), (B, K, D), (B, K, D, D), and of the rule."""

    def value(*inputs: Tensor) -> tuple[Tensor]:
        return (inputs[3].clone(),)

    def partials(inputs: Sequence[Tensor]) -> list[Tensor]:
        return [*_gradient(split, n, inputs), *(torch.zeros_like(x) for x in inputs[3:4])]

    def vjp(
        grad: Tensor, inputs: Sequence[Tensor], saved: Sequence[Tensor] | None, needed: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        results: list[Tensor | None] = [None] * len(inputs)
        for i, d in enumerate(_gradient(split, n, inputs)):
            g = grad.reshape(-1, *(1,) * (d.ndim - 1))
            results[i] = torch.where(g == 0, 0.0, g * d) if needed[i] else None
        return tuple(results)

    def jvp(inputs: Sequence[Tensor], tangents: Sequence[Tensor | None], ndim: int) -> Tensor | None:
        total = torch.zeros_like(inputs[3])
        for d, t in zip(_gradient(split, n, inputs), tangents[:3], strict=True):
            if t is not None:
                total = total + torch.where(t == 0, 0.0, d * t).flatten(1).sum(1)
        return total

    return custom(value, vjp, jvp)


def _integrate(
    split: int, tensors: Sequence[Tensor], tolerance: Callable[[Tensor, Tensor], Tensor], max_points: int, n: int
) -> tuple[Tensor, Tensor]:
    """Value and error of rows (B,), a few at a time; ``tolerance(index, value)``."""
    rows, k = tensors[0].shape
    results = []
    for index in torch.arange(rows, device=tensors[0].device).split(max(1, ROWS // (k * k))):
        part = [x.index_select(0, index) for x in tensors]
        results.append(_rows(split, part, lambda v, i=index: tolerance(i, v), max_points, n))
    if not results:
        return tensors[0].sum(-1), tensors[0].detach().sum(-1)
    value, error = (torch.cat(x) for x in zip(*results, strict=True))
    return value, error


def _rows(
    split: int, tensors: Sequence[Tensor], tolerance: Callable[[Tensor], Tensor], max_points: int, n: int
) -> tuple[Tensor, Tensor]:
    log_weights, loc, scale = (x.detach() for x in tensors)
    rows = len(log_weights)
    live, kp, kq = log_weights > -math.inf, split, log_weights.shape[-1] - split
    row, seed = live.nonzero().unbind(1)
    frame = frames(row, seed, loc, scale, REACH, THIN)
    near = None
    if split and (kp == kq or 1 in (kp, kq)):
        by_row = _near(split, log_weights, loc, scale)
        near = by_row[row] if bool(by_row.any()) else None
    problem = _problem(frame, split, log_weights, loc, scale, near)
    if near is not None:
        # Near p = q the tolerance is that of the relative error, whose unit takes a first look.
        cells, _, _ = _first_boxes(problem, row, tolerance(torch.zeros_like(log_weights[:, 0])), max_points // n ** loc.shape[-1])
        look = _add(rows, row[cells.frame], evaluate(problem, cells, n)[0])
        look = torch.where(by_row & (look > 0.0), look, 0.0)
        wide = tolerance

        def tolerance(value: Tensor) -> Tensor:
            return torch.where(look > 0.0, look * wide(torch.zeros_like(value)), wide(value))

    cells, value, error = _refined(problem, row, rows, n, tolerance, max_points)
    relative = value if near is None else torch.where(by_row, 0.0, value)
    error = error + ROUNDING * EPS * (value.abs() + (8.0 if split else 1.0) * relative.abs().sqrt())
    if (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)) or is_dual(tensors):
        constants = (*frame, *cells) if near is None else (*frame, *cells, near)
        value = _known(split, n)(*tensors, value, *constants)
    return value, error


def _flat(c: Components) -> tuple[Tensor, Tensor, Tensor]:
    """Log-weights (B, K), means (B, K, D) and factors (B, K, D, D); harmless ones for weights of zero."""
    k, d = c.loc.shape[-2:]
    if d not in (2, 3):
        raise ValueError(
            f"cubature is for 2 and 3 dimensions, got means of shape {tuple(c.loc.shape)}; one dimension has line_kl, "
            "and more than three sobol_kl, or a projection where the components differ along a few directions only"
        )
    loc, scale = living(c.log_weights, c.loc, c.scale)
    scale = torch.diag_embed(scale) if c.is_diagonal else scale
    return c.log_weights.reshape(-1, k), loc.reshape(-1, k, d), scale.reshape(-1, k, d, d)


def cubature_kl(p: Components, q: Components, *, rtol: float, max_points: int) -> tuple[Tensor, Tensor]:
    r"""``KL(p || q) = \int q phi(log(p/q)) dx``, ``phi(u) = u e^u - e^u + 1``, in two or three dimensions."""
    (kp, d), batch = p.loc.shape[-2:], p.log_weights.shape[:-1]
    tensors = [torch.cat(x, 1) for x in zip(_flat(p), _flat(q), strict=True)]
    value, error = _integrate(kp, tensors, lambda i, v: rtol * (1.0 + v), max_points, _nodes(d, rtol))
    return value.reshape(batch), error.reshape(batch)


def cubature_information(p: Components, *, atol: float | Tensor, max_points: int) -> tuple[Tensor, Tensor]:
    """I."""
    batch = p.log_weights.shape[:-1]
    goal = torch.as_tensor(atol, dtype=p.loc.dtype, device=p.loc.device).detach().expand(batch).reshape(-1)
    n = _nodes(p.loc.shape[-1], float(goal.amin()) if goal.numel() else 1.0)
    value, error = _integrate(0, _flat(p), lambda i, v: goal[i].expand_as(v), max_points, n)
    return value.reshape(batch), error.reshape(batch)
