"""Integrands of cubature on boxes: values, errors by axis, moments of the derivatives."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...quadrature import table
from .cubature_frames import Cells, Maps, Pairs, along, on_nodes, pair_quadratics, quadratics
from .line import expm1

__all__ = ["BLOCK", "Problem", "chunks", "evaluate", "largest_mass", "moments"]

# Elements per temporary: half a MiB, so that a handful stays in the cache, and the boxes, the last dimension of all
# broadcasts, are not too few (a quarter of this takes up to 1.7 times longer in space).
BLOCK = 2**16
# The errors of the boxes as estimated, times this: see `evaluate`.
EXCESS = 0.5
# A posterior weight of exp(FAINT) is below the rounding errors of the others.
FAINT = -40.0
SQRT_2PI = math.sqrt(2.0 * math.pi)


class Problem(NamedTuple):
    """What is integrated.

    Attributes:
        seen: all components from all frames; those of p first.
        log_mass: log-weight of each frame's own component, (T,).
        split: components of p; 0 for the information of a single mixture.
        pairs: how near p is to q, by `pair_maps`; None where it is not needed.
        near: the frames whose row needs it, (T,).
    """

    seen: Maps
    log_mass: Tensor
    split: int
    pairs: Pairs | None
    near: Tensor | None


@functools.lru_cache(maxsize=16)
def _rule(n: int) -> tuple[tuple[float, ...], ...]:
    """Nodes on [-1, 1], weights that sum to 1, and the null rules for the Legendre coefficients n - 1 and n - 2."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    last, second = ((m + 0.5) * weights * np.polynomial.Legendre.basis(m)(nodes) for m in (n - 1, n - 2))
    return tuple(tuple(x.tolist()) for x in (nodes, 0.5 * weights, last, second))


def _contracted(f: Tensor, weights: tuple[float, ...], axis: int = 0) -> Tensor:
    """A weighted sum along one axis by elementwise operations: its bits do not depend on the number of boxes."""
    parts = f.unbind(axis)
    total = parts[0] * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total += part * weight
    return total


def _integral(f: Tensor, weights: tuple[float, ...]) -> Tensor:
    while f.ndim > 1:
        f = _contracted(f, weights)
    return f


def _log_sum(terms: list[Tensor]) -> Tensor:
    top = functools.reduce(torch.maximum, [x.detach() for x in terms])
    total = torch.exp(terms[0] - top)
    for x in terms[1:]:
        total = total + torch.exp(x - top)
    return torch.log(total) + top


def _log_ratios(
    problem: Problem, cells: Cells, constant: Tensor, gradient: Tensor, hessian: Tensor, nodes: Tensor, *, paired: bool
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """log(w_k p_k/p_j) of all components, of p and of q at the nodes, and log(p/q)."""
    constant = constant + problem.seen.log_weights.index_select(-1, cells.frame)
    terms = [on_nodes(*x, nodes) for x in zip(constant, gradient, hessian, strict=True)]
    log_p, log_q = _log_sum(terms[: problem.split]), _log_sum(terms[problem.split :])
    u = log_p - log_q
    if paired and problem.pairs is not None:
        pairs = problem.pairs
        quadratics = pair_quadratics(Maps(*(x[pairs.p] for x in problem.seen)), pairs.maps, cells)
        share = pairs.split_weight.index_select(-1, cells.frame)
        total, size = torch.zeros_like(u), torch.zeros_like(u)
        for k, (c, b, h) in enumerate(zip(*quadratics, strict=True)):
            ratio = torch.exp(terms[pairs.q[k]] + share[k] - log_q)
            # a log-ratio of 50 has no weight where p is near q
            term = ratio * expm1(torch.clamp(on_nodes(c, b, h, nodes), max=50.0))
            total, size = total + term, size + term.detach().abs()
        use = size < 0.5
        u = torch.where(use, torch.log1p(torch.where(use, total, 0.0)), u)
    return terms, log_p, log_q, u


def _excess(u: Tensor) -> Tensor:
    """``(p u - p + q)/(p + q) = h tanh h + (h - tanh h)``, h = u/2: no difference of large terms for u > 0."""
    h = 0.5 * u
    t = torch.tanh(h)
    s = h * h
    series = h * s * (1 / 3 - s * (2 / 15 - s * (17 / 315 - s * (62 / 2835 - s * 1382 / 155925))))
    odd = torch.where(h.abs() < 0.1, series, h - t)
    return torch.where(h < -20.0, 1.0, h * t + odd)


def _divergence(problem: Problem, cells: Cells, nodes: Tensor, *, paired: bool) -> Tensor:
    constant, gradient, hessian, _, _ = quadratics(problem.seen, cells)
    return _excess(_log_ratios(problem, cells, constant, gradient, hessian, nodes, paired=paired)[3])


def matters(problem: Problem, cells: Cells) -> Tensor:
    """Which components have a posterior weight above exp(`FAINT`) somewhere in the box, (K, C).

    By the largest difference of its quadratic and that of the component that leads at the centre.
    """
    k, dim = problem.seen.shift.shape[:2]
    parts = []
    everything = torch.arange(len(cells.frame), device=cells.frame.device)
    for index in everything.split(max(1, 2**20 // (k * dim * dim))):
        part = cells.take(index)
        constant, gradient, hessian, _, _ = quadratics(problem.seen, part)
        constant = constant + problem.seen.log_weights.index_select(-1, part.frame)
        lead = constant.argmax(0, keepdim=True)
        gap = constant - constant.gather(0, lead)
        steep = (gradient - gradient.gather(0, lead.unsqueeze(1).expand(1, dim, -1))).abs()
        bent = hessian - hessian.gather(0, lead.reshape(1, 1, 1, -1).expand(1, dim, dim, -1))
        for i in range(dim):
            gap = gap + steep[:, i] + 0.5 * bent[:, i, i].clamp(min=0.0)
            for j in range(i):
                gap = gap + bent[:, i, j].abs()
        parts.append(gap > FAINT)
    return torch.cat(parts, -1) if parts else torch.ones(k, 0, dtype=torch.bool, device=cells.frame.device)


def _information(problem: Problem, cells: Cells, nodes: Tensor, use: Tensor) -> Tensor:
    """KL(posterior of the label || w) = sum r_k e_k - log sum w_k exp(e_k), over the components that each box uses."""
    constant, gradient, hessian, _, _ = quadratics(problem.seen, cells)
    weights = torch.exp(problem.seen.log_weights).index_select(-1, cells.frame)
    total = functools.reduce(torch.add, weights.unbind(0))
    # exp(-1000) is 0: a box has the same bits whether others, taken with it, use a component that it does not.
    constant = torch.where(use, constant, -math.inf)
    gradient = torch.where(use.unsqueeze(1), gradient, 0.0)
    hessian = torch.where(use.unsqueeze(1).unsqueeze(1), hessian, 0.0)
    mass = weighted = torch.zeros((), dtype=nodes.dtype, device=nodes.device)
    for k in use.any(-1).nonzero()[:, 0].tolist():
        # Beyond exp(500) one component has everything there, and the frame's own nothing.
        e = on_nodes(constant[k], gradient[k], hessian[k], nodes).clamp_(-1000.0, 500.0)
        density = torch.exp(e).mul_(weights[k])
        e.mul_(density)
        mass, weighted = density.add_(mass), e.add_(weighted)
    # The weights sum to 1 but for rounding, and in this order: where all components are the same the result is 0.
    return weighted.div_(mass).sub_(torch.log(mass.div_(total)))


def _normal(cells: Cells, nodes: Tensor) -> Tensor:
    """The density of the frame's own component at the nodes, times the volume of the box."""
    dim = cells.centre.shape[0]
    total = torch.ones((1,) * (dim + 1), dtype=nodes.dtype, device=nodes.device)
    for i in range(dim):
        y = cells.centre[i] + cells.half[i] * nodes.unsqueeze(-1)
        total = total * along(torch.exp(-0.5 * y * y) * (cells.half[i] * (2.0 / SQRT_2PI)), i, dim)
    return total


def largest_mass(problem: Problem, cells: Cells) -> tuple[Tensor, Tensor]:
    """Bounds (C,) on what the frame's own weighted component has in each box, and on its density there."""
    mass = peak = problem.log_mass[cells.frame].exp()
    for y, half in zip(cells.centre.abs(), cells.half, strict=True):
        density = torch.exp(-0.5 * (y - half).clamp(min=0.0) ** 2) / SQRT_2PI
        mass = mass * torch.clamp(2.0 * density * half, max=1.0)
        peak = peak * density
    return mass, peak


def chunks(problem: Problem, cells: Cells, n: int, block: int = BLOCK) -> Iterator[tuple[Tensor, bool, Tensor | None]]:
    """Indices of the boxes to take at a time, whether p is near q there, and for the information what `matters`."""
    everything = torch.arange(len(cells.frame), device=cells.frame.device)
    parts, use = [(everything, False)], None
    if problem.near is not None:
        near = problem.near[cells.frame]
        parts = [(everything[~near], False), (everything[near], True)]
    if not problem.split:  # boxes with the same components together
        use = matters(problem, cells)
        digits = 2 ** (torch.arange(len(use), device=use.device) % 62)
        parts = [((use * digits.unsqueeze(-1)).sum(0).argsort(stable=True), False)]
    step = max(1, block // n ** cells.centre.shape[0])
    for index, paired in parts:
        for part in index.split(step) if index.numel() else ():
            yield part, paired, None if use is None else use[:, part]


def evaluate(problem: Problem, cells: Cells, n: int) -> tuple[Tensor, Tensor]:
    """Integrals over the boxes, (C,), and their errors by axis, (D, C), with n nodes per axis.

    A Legendre coefficient of r^-(n-1) of the largest goes with a Gauss error of r^-2n: the error is estimated by the
    mean square of the last two coefficients along an axis (two, since symmetry hides every other one) over the largest
    value in the box. Summed, these were 8 to 10,000 times the true errors: `EXCESS` takes some of that back.
    """
    rule = _rule(n)
    nodes = table(rule[0], cells.centre.device)
    dim = cells.centre.shape[0]
    value, error = torch.empty_like(cells.centre[0]), torch.empty_like(cells.centre)
    for index, paired, use in chunks(problem, cells, n):
        chunk = cells.take(index)
        if use is None:
            f = _divergence(problem, chunk, nodes, paired=paired)
        else:
            f = _information(problem, chunk, nodes, use)
        f = f * _normal(chunk, nodes)
        mass = torch.exp(problem.log_mass[chunk.frame])
        value[index] = mass * _integral(f, rule[1])
        top = f.flatten(0, dim - 1).amax(0)
        scale = EXCESS * mass / torch.where(top > 0, top, 1.0)
        for i in range(dim):
            squares = _contracted(f, rule[2], i).square_() + _contracted(f, rule[3], i).square_()
            error[i, index] = scale * _integral(squares, rule[1])
    return value, error


def moments(
    problem: Problem, cells: Cells, n: int, paired: bool, use: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums of the derivatives of the integrand on the boxes, each box by itself; differentiable.

    Returns:
        The derivatives with respect to log w_k, (K, C), and with respect to log p_k: their sum, and their sums with z
        and with z z', (K, C), (K, D, C), (K, D, D, C).
    """
    rule = _rule(n)
    nodes, weights = (table(x, cells.centre.device) for x in rule[:2])
    dim = cells.centre.shape[0]
    constant, gradient, hessian, z, jacobian = quadratics(problem.seen, cells)
    kept = list(range(len(constant))) if use is None else use.any(-1).nonzero()[:, 0].tolist()
    by_weight: list[Tensor] = []
    if problem.split:
        terms, log_p, log_q, u = _log_ratios(problem, cells, constant, gradient, hessian, nodes, paired=paired)
        total = torch.logaddexp(log_p, log_q)
        p_side, q_side = u * torch.sigmoid(u), -torch.tanh(0.5 * u)
        by_density = [p_side * torch.exp(x - log_p) for x in terms[: problem.split]]
        by_density += [q_side * torch.exp(x - log_q) for x in terms[problem.split :]]
    else:
        log_w = problem.seen.log_weights.index_select(-1, cells.frame)
        logs = [on_nodes(constant[k], gradient[k], hessian[k], nodes).clamp(-1000.0, 500.0) for k in kept]
        total = _log_sum([e + log_w[k] for k, e in zip(kept, logs, strict=True)])
        shares = [torch.exp(e + log_w[k] - total) for k, e in zip(kept, logs, strict=True)]
        by_density = [r * (e - total) for r, e in zip(shares, logs, strict=True)]
        by_weight = [d - r + torch.exp(log_w[k]) for k, d, r in zip(kept, by_density, shares, strict=True)]
    # The frame's share of the whole is fixed, not the whole: a factor of 1 that has a derivative.
    whole = torch.exp(total - total.detach())
    measure = _normal(cells, nodes) * torch.exp(problem.log_mass[cells.frame]) * whole
    flat = [along(weights, i, dim).squeeze(-1) for i in range(dim)]
    grid = functools.reduce(torch.mul, flat)
    axes = [along(nodes, i, dim).squeeze(-1) for i in range(dim)]
    rows = [grid, *(grid * t for t in axes), *(grid * a * b for a in axes for b in axes)]
    monomials = torch.stack([x.reshape(-1) for x in rows])
    place = torch.tensor(kept, device=nodes.device)
    found = torch.stack([monomials @ (c * measure).flatten(0, dim - 1) for c in by_density])
    sums = found.new_zeros(len(constant), *found.shape[1:]).index_copy(0, place, found)
    mass, first = sums[:, 0], sums[:, 1 : dim + 1]
    second = sums[:, dim + 1 :].reshape(len(sums), dim, dim, -1)
    if by_weight:
        found = torch.stack([monomials[0] @ (c * measure).flatten(0, dim - 1) for c in by_weight])
        from_weight = torch.exp(log_w) * (monomials[0] @ measure.flatten(0, dim - 1))
        from_weight = from_weight.index_copy(0, place, found)
    else:
        from_weight = mass
    turned = (jacobian * first.unsqueeze(1)).sum(2)
    half_way = (jacobian.unsqueeze(3) * second.unsqueeze(1)).sum(2)
    inner = (half_way.unsqueeze(2) * jacobian.unsqueeze(1)).sum(3)
    outer = z.unsqueeze(2) * turned.unsqueeze(1)
    square = z.unsqueeze(2) * (z * mass.unsqueeze(1)).unsqueeze(1) + outer + outer.transpose(1, 2) + inner
    return from_weight, mass, z * mass.unsqueeze(1) + turned, square
