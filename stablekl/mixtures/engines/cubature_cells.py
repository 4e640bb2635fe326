"""The boxes of cubature: no wider than what they may contain, then halved where the error is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .cubature_crossings import crossings
from .cubature_frames import Cells, largest_log_ratio, positions
from .cubature_nodes import Problem, evaluate, largest_mass

__all__ = ["bounds", "first_boxes", "refined", "row_totals"]

# Boxes are at first at most so wide, in standard deviations, given the other coordinates, of any component in reach:
# nodes are then 2 apart at most, and see it. Three dimensions cannot afford the same: 3.7 at the centre. (16 components
# of scales 2e3 apart take 2.8e7 nodes for 12 and 3.2e7 for 10; 5 of scales 2e4 apart, errors of 1e-7 and 3e-8.)
WIDTH = {2: 6.0, 3: 10.0}
# The same for the frame's own component, of which there is one.
OWN_WIDTH = {2: 6.0, 3: 9.0}
# A component matters where it is less than so many standard deviations away.
REACH = 9.0
# Volume of the unit ball.
BALL = {2: math.pi, 3: 4.0 * math.pi / 3.0}
# Share of the tolerance that a box may cost unseen: all of them together come to a tenth of it, and to a third where
# components are thin and many (observed).
UNSEEN = 1e-3
# Share of the tolerance that is left to the boxes with the smallest errors; and the most that is left to one of them,
# where there are more: the error of a single box may be several times what was estimated (observed: six).
LEFT, MOST_LEFT = 0.5, 1 / 400
# What may be missed cannot be refined: nothing is gained by errors below this share of it.
PROPORTION = 1e-2
# Boxes are halved across every axis whose error is more than so many times the largest that is left.
STEEP = 4.0


class Content(NamedTuple):
    """What boxes may hold.

    Attributes:
        bound: on the integral, (C,).
        share: the largest posterior weight that each component may have there, its logarithm, -inf beyond `REACH`,
            (K, C).
        steepness: the components' inverse widths on each axis given the others, (K, D, C).
        hidden: what overlooking a component may cost, (K, C).
    """

    bound: Tensor
    share: Tensor
    steepness: Tensor
    hidden: Tensor


def bounds(problem: Problem, cells: Cells) -> Content:
    """What the boxes may hold.

    A narrow component matters where its posterior weight is not small: in a ball, in its own coordinates, that is a
    small part of a large box, and holds little of the frame's mass.
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
    mass, peak = largest_mass(problem, cells)
    bound = mass * factor
    if split:
        return Content(bound, share, steepness, bound.expand_as(share))
    dim = len(cells.half)
    # log s_k - log s_j falls from its largest value, at the component's centre, to e^-2 at this distance from it
    square = 2.0 * (share + 0.5 * nearest * nearest).clamp(min=0.0) + 4.0
    ball = BALL[dim] * square ** (0.5 * dim) * torch.exp(-problem.seen.constant.index_select(-1, cells.frame))
    faint = share.clamp(max=0.0)
    hidden = torch.minimum(mass, peak * ball) * factor * torch.exp(faint) * (1.0 - faint)
    return Content(bound, share, steepness, torch.where(torch.isinf(share), 0.0, hidden))


def row_totals(rows: int, index: Tensor, values: Tensor) -> Tensor:
    """Sums of the values of each row, (rows,); ``index`` has the rows."""
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


def first_boxes(problem: Problem, row: Tensor, tolerance: Tensor, most: int) -> tuple[Cells, Tensor, Tensor]:
    """Boxes no wider than the components that they may contain.

    Returns:
        The boxes; what may be missed in each, more where there were too many of them; and in each row, outside of all.
    """
    dim, rows = problem.seen.shift.shape[1], len(tolerance)
    device = row.device
    per_row = row_totals(rows, row, torch.ones_like(problem.log_mass))
    unseen = UNSEEN * tolerance / per_row
    radius = torch.sqrt(-2.0 * torch.log(unseen))[row]
    cells = Cells(torch.arange(len(row), device=device), radius.new_zeros(dim, len(row)), radius.expand(dim, -1))
    bound = bounds(problem, cells).bound
    outside = row_totals(rows, row, 2.0 * dim * torch.erfc(radius / math.sqrt(2.0)) * bound)
    done: list[Cells] = []
    overlooked: list[Tensor] = []
    while len(cells.frame):
        bound, share, steepness, hidden = bounds(problem, cells)
        here = row[cells.frame]
        negligible = bound <= unseen[here]
        outside += row_totals(rows, here[negligible], bound[negligible])
        relevant = share > torch.log(unseen)[here]
        wide = (2.0 * cells.half * steepness > WIDTH[dim]) & relevant.unsqueeze(1)
        small = hidden <= unseen[here]
        tolerated = torch.where(small & wide.any(1), hidden, 0.0).sum(0)
        missed = torch.where(wide.any(1), hidden, 0.0).sum(0)
        large = 2.0 * cells.half > OWN_WIDTH[dim]
        missed = torch.where(large.any(0), bound, torch.minimum(bound, missed))
        wide &= ~small.unsqueeze(1)
        cut = (wide.any(0) | large) & ~negligible
        count = row_totals(rows, here, (~negligible).to(bound.dtype))
        for c in done:
            count = count + row_totals(rows, row[c.frame], torch.ones_like(c.centre[0]))
        more = torch.pow(2.0, cut.sum(0)) - 1.0
        final = ~(cut.any(0) & _within(here, missed, more, most - count)) & ~negligible
        done.append(cells.take(final))
        overlooked.append(torch.where(cut.any(0), missed, tolerated)[final])
        going = ~final & ~negligible
        cells, cut = cells.take(going), cut[:, going]
        for axis in range(dim):
            cells, (cut,) = _split(cells, axis, cut[axis], cut)
    return Cells(*(torch.cat(x, -1) for x in zip(*done, strict=True))), torch.cat(overlooked), outside


def refined(
    problem: Problem, row: Tensor, rows: int, n: int, tolerance: Callable[[Tensor], Tensor], max_points: int
) -> tuple[Cells, Tensor, Tensor]:
    """The final boxes, in the order of the rows, the value and the error."""
    most = max(1, max_points // n ** problem.seen.shift.shape[1])
    zero = problem.log_mass.new_zeros(rows)
    # half of them for what might be overlooked, the others for what is seen
    cells, missed, outside = first_boxes(problem, row, tolerance(zero), max(1, most // 2))
    value, error = evaluate(problem, cells, n)
    crease = crossings(problem, cells, n)
    used = row_totals(rows, row[cells.frame], torch.ones_like(value))
    frozen = torch.zeros(rows, dtype=torch.bool, device=row.device)
    while True:
        here = row[cells.frame]
        each = error.sum(0)
        seen, unseen = row_totals(rows, here, each), row_totals(rows, here, missed) + outside
        goal = tolerance(row_totals(rows, here, value))
        count = row_totals(rows, here, torch.ones_like(value))
        folds = row_totals(rows, here, crease.sum(0).square()).sqrt()
        active = (seen + unseen + folds > goal) & (seen + folds > PROPORTION * unseen) & ~frozen
        worst, axis = (error + crease).max(0)
        # As few boxes as bring the error down to its goal: it is the sum of what the others have that counts.
        room = LEFT * (goal - unseen)
        share = goal / count
        for candidate in [share * 2.0**m for m in range(1, 10)]:
            rest = row_totals(rows, here, torch.where(each <= candidate[here], each, 0.0))
            share = torch.where((rest <= room) & (candidate <= MOST_LEFT * goal), candidate, share)
        fold = LEFT * goal / count.sqrt()
        chosen = active[here] & ((each > share[here]) | (crease.sum(0) > fold[here]))
        cut = (error > STEEP * share[here]) | (crease > STEEP * fold[here])
        cut |= axis == torch.arange(len(error), device=row.device).unsqueeze(1)
        parts = torch.pow(2.0, cut.sum(0))
        chosen &= _within(here, worst, torch.where(chosen, parts, 0.0), most - used)
        frozen |= row_totals(rows, here, chosen.to(value.dtype)) == 0
        if not bool(chosen.any()):
            break
        used += row_totals(rows, here, torch.where(chosen, parts, 0.0))
        new, cut, new_missed = cells.take(chosen), cut[:, chosen], (missed / parts)[chosen]
        for i in range(len(error)):
            new, (cut, new_missed) = _split(new, i, cut[i], cut, new_missed)
        new_value, new_error = evaluate(problem, new, n)
        crease = torch.cat((crease[:, ~chosen], crossings(problem, new, n)), -1)
        kept = cells.take(~chosen)
        cells = Cells(*(torch.cat(x, -1) for x in zip(kept, new, strict=True)))
        value = torch.cat((value[~chosen], new_value))
        error = torch.cat((error[:, ~chosen], new_error), -1)
        missed = torch.cat((missed[~chosen], new_missed))
    order = torch.argsort(row[cells.frame], stable=True)
    cells, value = cells.take(order), value[order]
    value = _sums(value, row[cells.frame], rows)
    return cells, value, seen + unseen + folds


def _within(row: Tensor, worst: Tensor, parts: Tensor, most: Tensor) -> Tensor:
    """The worst boxes of each row, while the numbers of their parts, 0 for boxes that stay, sum to what it may have."""
    if bool((row_totals(len(most), row, parts) <= most).all()):
        return torch.ones_like(row, dtype=torch.bool)
    order = torch.argsort(torch.where(parts > 0.0, worst, -1.0), descending=True, stable=True)
    order = order[torch.argsort(row[order], stable=True)]
    start = torch.searchsorted(row[order], torch.arange(len(most), device=row.device))
    total = torch.cat((parts.new_zeros(1), parts[order].cumsum(0)))  # whole numbers, exact whatever the other rows have
    within = torch.empty_like(row, dtype=torch.bool)
    within[order] = total[1:] - total[start[row[order]]] <= most[row[order]]
    return within


def _sums(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """Sums over the elements of each row, which are neighbours, two by two: no other row changes the bits."""
    while len(values):
        start = torch.searchsorted(row, torch.arange(rows, device=row.device))
        odd = (torch.arange(len(row), device=row.device) - start[row]) % 2 == 1
        if not bool(odd.any()):
            break
        partner = torch.zeros_like(values)
        partner[:-1] = torch.where(odd[1:], values[1:], 0.0)
        values, row = (values + partner)[~odd], row[~odd]
    return values.new_zeros(rows).index_copy_(0, row, values)
