r"""Integrands of mixtures in two and three dimensions on boxes: nodes, values, error per axis, moments.

The mass of every component is integrated in its own coordinates, ``x = loc_j + L_j U y``, where its density is the
standard normal one, thin or round, and wherever it lies. U is a rotation. There every other component is

.. math:: e_k(y) = \log\frac{p_k}{p_j} = \log\frac{|L_j|}{|L_k|} - \sum_i d_i (y_i + d_i/2), \qquad d = z_k - y = E y + g,

with :math:`E = U^T L_k^{-1} (L_j - L_k) U` and :math:`g = U^T L_k^{-1} (\mu_j - \mu_k)` from differences of parameters:
nothing cancels where components are near each other, or far from the origin. On a box around c, e_k is the quadratic
:math:`e_k(c) + b't + t'Ht/2`, which costs two passes over the nodes in any dimension, and one exponential.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..quadrature import table
from .line import expm1

__all__ = ["Cells", "Frame", "Maps", "Pairs", "Problem", "chunks", "evaluate", "frames", "largest_log_ratio", "maps", "moments", "pair_maps", "positions"]

# Elements per temporary: 1 MiB, so that a handful stays in the cache.
BLOCK = 2**17
# The sum of the boxes' errors as estimated, times this: see `evaluate`.
EXCESS = {2: 0.5, 3: 0.125}
SQRT_2PI = math.sqrt(2.0 * math.pi)


class Cells(NamedTuple):
    """Boxes in the coordinates of a frame: index of the frame (C,), centre and half widths (D, C)."""

    frame: Tensor
    centre: Tensor
    half: Tensor

    def take(self, index: Tensor) -> Cells:
        """Those of an index or a mask."""
        return Cells(self.frame[index], self.centre[:, index], self.half[:, index])


class Frame(NamedTuple):
    """The coordinates of T components, one for each mass that is integrated, as constants.

    Attributes:
        row: the row of the batch, (T,).
        seed: the component, (T,).
        loc: its mean, (T, D).
        scale: its factor, (T, D, D).
        rotation: U, (T, D, D).
    """

    row: Tensor
    seed: Tensor
    loc: Tensor
    scale: Tensor
    rotation: Tensor


class Maps(NamedTuple):
    """All K log-ratios of T frames: log|L_j|/|L_k| (K, T), g (K, D, T), E (K, D, D, T); log-weights (K, T)."""

    constant: Tensor
    shift: Tensor
    slope: Tensor
    log_weights: Tensor


def _log_ratio(a: Tensor, b: Tensor) -> Tensor:
    """``log(a/b)``, accurate where a is near b."""
    change = (a - b) / b
    near = change.abs() < 0.5
    return torch.where(near, torch.log1p(torch.where(near, change, 0.0)), torch.log(a) - torch.log(b))


def maps(frame: Frame, log_weights: Tensor, loc: Tensor, scale: Tensor) -> Maps:
    """The K components (B, K), (B, K, D), (B, K, D, D) as seen from the frames; differentiable."""
    lw, mu, factor = (x.index_select(0, frame.row) for x in (log_weights, loc, scale))
    ours, rotation = frame.scale.unsqueeze(1), frame.rotation.unsqueeze(1)
    difference = torch.cat((ours - factor, (frame.loc.unsqueeze(1) - mu).unsqueeze(-1)), -1)
    whitened = torch.linalg.solve_triangular(factor, difference, upper=False)
    d = loc.shape[-1]
    turned = _product(rotation.mT, whitened)
    slope = _product(turned[..., :d], rotation)
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    constant = _log_ratio(ours.diagonal(dim1=-2, dim2=-1), diagonal).sum(-1)
    return Maps(*(x.movedim(0, -1) for x in (constant, turned[..., d], slope, lw)))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product of small matrices, whose bits do not depend on how many there are."""
    total = a[..., :, :1] * b[..., :1, :]
    for i in range(1, a.shape[-1]):
        total = total + a[..., :, i : i + 1] * b[..., i : i + 1, :]
    return total


def frames(row: Tensor, seed: Tensor, loc: Tensor, scale: Tensor, reach: float, thin: float) -> Frame:
    """Frames for the given components, rotated into the axes of the narrowest other component in reach.

    Only components narrower than ``1/thin`` and longer than ``thin`` times their width count.
    """
    identity = torch.eye(loc.shape[-1], dtype=loc.dtype, device=loc.device).expand(len(row), -1, -1)
    frame = Frame(row, seed, loc[row, seed], scale[row, seed], identity)
    seen = maps(frame, loc.new_zeros(loc.shape[:-1]), loc, scale)
    gram_root = (seen.slope.movedim(-1, 0) + identity.unsqueeze(1)).contiguous()
    _, widths, axes = torch.linalg.svd(gram_root)
    near = seen.shift.movedim(-1, 0).square().sum(-1).sqrt() <= reach * (1.0 + widths[..., 0])
    steep = (widths[..., 0] > thin) & (widths[..., 0] > thin * widths[..., -1]) & near
    score = torch.where(steep, widths[..., 0], 0.0)
    best = score.argmax(-1)
    chosen = axes[torch.arange(len(row), device=row.device), best].mT
    turn = (score.amax(-1) > 0).reshape(-1, 1, 1)
    return frame._replace(rotation=torch.where(turn, chosen, identity))


def positions(seen: Maps, cells: Cells) -> tuple[Tensor, Tensor, Tensor]:
    """z - y and z of all components at the centres, (K, D, C), and the maps' slopes E there, (K, D, D, C)."""
    slope, y = seen.slope.index_select(-1, cells.frame), cells.centre
    d = seen.shift.index_select(-1, cells.frame)
    for i in range(y.shape[0]):
        d = d + slope[:, :, i] * y[i]
    return d, y + d, slope


def _quadratics(seen: Maps, cells: Cells) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """e_k on the boxes: value (K, C), gradient (K, D, C) and Hessian (K, D, D, C) in units of the half widths.

    Also z at the centres, (K, D, C), and its derivative in those units, (K, D, D, C).
    """
    d, z, slope = positions(seen, cells)
    y, half, dim = cells.centre, cells.half, cells.centre.shape[0]
    constant = seen.constant.index_select(-1, cells.frame)
    for i in range(dim):
        constant = constant - d[:, i] * (y[i] + 0.5 * d[:, i])
    gradient = d
    hessian = slope + slope.transpose(1, 2)
    for i in range(dim):
        gradient = gradient + slope[:, i] * z[:, i : i + 1]
        hessian = hessian + slope[:, i].unsqueeze(2) * slope[:, i].unsqueeze(1)
    identity = torch.eye(dim, dtype=y.dtype, device=y.device).unsqueeze(-1)
    return constant, -gradient * half, -hessian * half * half.unsqueeze(1), z, (slope + identity) * half


def _pair_quadratics(seen: Maps, pairs: Maps, cells: Cells) -> tuple[Tensor, Tensor, Tensor]:
    """The same for log(w_k p_k / (v_k q_k)) with ``z_q = z_p + D y + delta`` given by ``pairs``; `seen`: p's side."""
    _, z, slope = positions(seen, cells)
    difference = pairs.slope.index_select(-1, cells.frame)
    d = pairs.shift.index_select(-1, cells.frame)
    y, half, dim = cells.centre, cells.half, cells.centre.shape[0]
    for i in range(dim):
        d = d + difference[:, :, i] * y[i]
    constant = (pairs.constant + pairs.log_weights).index_select(-1, cells.frame)
    identity = torch.eye(dim, dtype=y.dtype, device=y.device).unsqueeze(-1)
    jacobian = slope + identity
    gradient, hessian = torch.zeros_like(z), torch.zeros_like(slope)
    for i in range(dim):
        constant = constant + d[:, i] * (z[:, i] + 0.5 * d[:, i])
        gradient = gradient + difference[:, i] * (z + d)[:, i : i + 1] + jacobian[:, i] * d[:, i : i + 1]
        a, b = difference[:, i], jacobian[:, i]
        hessian = hessian + a.unsqueeze(2) * (b + a).unsqueeze(1) + b.unsqueeze(2) * a.unsqueeze(1)
    return constant, gradient * half, hessian * half * half.unsqueeze(1)


def largest_log_ratio(pairs: Pairs, cells: Cells, distance: Tensor) -> Tensor:
    """A bound (C,) on ``|log(p/q)|`` in the boxes, where components of p are at most so far away, (K, C)."""
    d, slope = pairs.maps.shift.index_select(-1, cells.frame), pairs.maps.slope.index_select(-1, cells.frame)
    spread = torch.zeros_like(d[:, 0])
    for i in range(cells.centre.shape[0]):
        d = d + slope[:, :, i] * cells.centre[i]
        spread = spread + slope[:, :, i].square().sum(1).sqrt() * cells.half[i]
    size = d.square().sum(1).sqrt() + spread
    constant = (pairs.maps.constant + pairs.maps.log_weights).index_select(-1, cells.frame)
    return (constant.abs() + size * (distance + 0.5 * size)).amax(0)


def _along(t: Tensor, axis: int, dim: int) -> Tensor:
    """Values (n,) or (n, C) along one axis of the nodes (n, ..., n, C)."""
    return t.reshape(*(1,) * axis, t.shape[0], *(1,) * (dim - 1 - axis), *(t.shape[1:] or (1,)))


def _on_nodes(constant: Tensor, gradient: Tensor, hessian: Tensor, nodes: Tensor) -> Tensor:
    """A quadratic at the tensor nodes, (n, ..., n, C)."""
    dim = gradient.shape[0]
    value = constant.reshape(*(1,) * dim, -1)
    for i in range(dim):
        t = _along(nodes, i, dim)
        line = gradient[i] + 0.5 * hessian[i, i] * t
        for j in range(i):
            line = line + hessian[i, j] * _along(nodes, j, dim)
        value = torch.addcmul(value, line, t)
    return value


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


class Pairs(NamedTuple):
    """The components of p and q in pairs.

    Attributes:
        maps: of log(w_k p_k / (v_k q_k)): ``z_q - z_p``; its log_weights are log(w_k/v_k).
        split_weight: log of the share of q's component that belongs to the pair, (K, T).
        p: indices of the components of p.
        q: indices of the components of q, among all.
    """

    maps: Maps
    split_weight: Tensor
    p: list[int]
    q: list[int]


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


def pair_maps(frame: Frame, seen: Maps, split: int, log_weights: Tensor, loc: Tensor, scale: Tensor) -> Pairs | None:
    """Both mixtures with components in pairs; None for different numbers of them, none of which is 1."""
    kp, kq = split, log_weights.shape[-1] - split
    if kp != kq and 1 not in (kp, kq):
        return None
    p, q = ([k % n + first for k in range(max(kp, kq))] for n, first in ((kp, 0), (kq, kp)))
    rotation = frame.rotation.unsqueeze(1)
    mp, mq, sp, sq = (x.index_select(0, frame.row)[:, i] for x in (loc, scale) for i in (p, q))
    lw, lv = (x.index_select(0, frame.row) for x in (log_weights[:, p], log_weights[:, q]))
    right = torch.cat((sp - sq, (mp - mq).unsqueeze(-1)), -1)
    whitened = torch.linalg.solve_triangular(sq, right, upper=False)
    d = loc.shape[-1]
    turned = _product(rotation.mT, whitened)
    back, shift = _product(turned[..., :d], rotation), turned[..., d:]
    identity = torch.eye(d, dtype=loc.dtype, device=loc.device)
    slope, centre = seen.slope[p].movedim(-1, 0) + identity, seen.shift[p].movedim(-1, 0)
    delta = (_product(back, centre.unsqueeze(-1)) + shift).squeeze(-1)
    constant = -_log_ratio(sp.diagonal(dim1=-2, dim2=-1), sq.diagonal(dim1=-2, dim2=-1)).sum(-1)
    share = torch.zeros_like(lw)
    if kp == kq:
        both_zero = torch.isinf(lw) & torch.isinf(lv)
        weight = torch.where(both_zero, 0.0, lw) - torch.where(both_zero, 0.0, lv)
    else:  # a Gaussian is the sum of its weighted copies
        weight, share = (-lv, lw) if kq == 1 else (lw, share)
    parts = (x.movedim(0, -1) for x in (constant, delta, _product(back, slope), weight))
    return Pairs(Maps(*parts), share.movedim(0, -1), p, q)


def _log_sum(terms: list[Tensor]) -> Tensor:
    top = functools.reduce(torch.maximum, [x.detach() for x in terms])
    total = torch.exp(terms[0] - top)
    for x in terms[1:]:
        total = total + torch.exp(x - top)
    return torch.log(total) + top


def _log_ratios(problem: Problem, cells: Cells, constant: Tensor, gradient: Tensor, hessian: Tensor, nodes: Tensor, *, paired: bool) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """log(w_k p_k/p_j) of all components, of p and of q at the nodes, and log(p/q)."""
    constant = constant + problem.seen.log_weights.index_select(-1, cells.frame)
    terms = [_on_nodes(*x, nodes) for x in zip(constant, gradient, hessian, strict=True)]
    log_p, log_q = _log_sum(terms[: problem.split]), _log_sum(terms[problem.split :])
    u = log_p - log_q
    if paired and problem.pairs is not None:
        pairs = problem.pairs
        quadratics = _pair_quadratics(Maps(*(x[pairs.p] for x in problem.seen)), pairs.maps, cells)
        share = pairs.split_weight.index_select(-1, cells.frame)
        total, size = torch.zeros_like(u), torch.zeros_like(u)
        for k, (c, b, h) in enumerate(zip(*quadratics, strict=True)):
            ratio = torch.exp(terms[pairs.q[k]] + share[k] - log_q)
            # a log-ratio of 50 has no weight where p is near q
            term = ratio * expm1(torch.clamp(_on_nodes(c, b, h, nodes), max=50.0))
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
    constant, gradient, hessian, _, _ = _quadratics(problem.seen, cells)
    return _excess(_log_ratios(problem, cells, constant, gradient, hessian, nodes, paired=paired)[3])


def _information(problem: Problem, cells: Cells, nodes: Tensor) -> Tensor:
    """KL(posterior of the label || w) = sum r_k e_k - log sum w_k exp(e_k)."""
    constant, gradient, hessian, _, _ = _quadratics(problem.seen, cells)
    weights = torch.exp(problem.seen.log_weights).index_select(-1, cells.frame)
    mass = weighted = None
    for c, b, h, w in zip(constant, gradient, hessian, weights, strict=True):
        # Beyond exp(500) one component has everything there, and the frame's own nothing.
        e = _on_nodes(c, b, h, nodes).clamp_(-1000.0, 500.0)
        density = torch.exp(e).mul_(w)
        e.mul_(density)
        mass = density if mass is None else mass.add_(density)
        weighted = e if weighted is None else weighted.add_(e)
    return weighted.div_(mass).sub_(torch.log(mass))


def _normal(cells: Cells, nodes: Tensor) -> Tensor:
    """The density of the frame's own component at the nodes, times the volume of the box."""
    dim = cells.centre.shape[0]
    total = torch.ones((1,) * (dim + 1), dtype=nodes.dtype, device=nodes.device)
    for i in range(dim):
        y = cells.centre[i] + cells.half[i] * nodes.unsqueeze(-1)
        total = total * _along(torch.exp(-0.5 * y * y) * (cells.half[i] * (2.0 / SQRT_2PI)), i, dim)
    return total


def chunks(problem: Problem, cells: Cells, n: int, block: int = BLOCK) -> Iterator[tuple[Tensor, bool]]:
    """Indices of the boxes to take at a time, and whether p is near q there."""
    everything = torch.arange(len(cells.frame), device=cells.frame.device)
    parts = [(everything, False)]
    if problem.near is not None:
        near = problem.near[cells.frame]
        parts = [(everything[~near], False), (everything[near], True)]
    step = max(1, block // n ** cells.centre.shape[0])
    for index, paired in parts:
        for part in index.split(step) if index.numel() else ():
            yield part, paired


def evaluate(problem: Problem, cells: Cells, n: int) -> tuple[Tensor, Tensor]:
    """Integrals over the boxes, (C,), and their errors by axis, (D, C), with n nodes per axis."""
    rule = _rule(n)
    nodes = table(rule[0], cells.centre.device)
    dim = cells.centre.shape[0]
    value, error = torch.empty_like(cells.centre[0]), torch.empty_like(cells.centre)
    for index, paired in chunks(problem, cells, n):
        chunk = cells.take(index)
        f = _divergence(problem, chunk, nodes, paired=paired) if problem.split else _information(problem, chunk, nodes)
        f = f * _normal(chunk, nodes)
        mass = torch.exp(problem.log_mass[chunk.frame])
        value[index] = mass * _integral(f, rule[1])
        top = f.flatten(0, dim - 1).amax(0)
        scale = EXCESS[dim] * mass / torch.where(top > 0, top, 1.0)
        for i in range(dim):
            squares = _contracted(f, rule[2], i).square_() + _contracted(f, rule[3], i).square_()
            error[i, index] = scale * _integral(squares, rule[1])
    return value, error


def moments(problem: Problem, cells: Cells, n: int, paired: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums of the derivatives of the integrand on the boxes, each box by itself; differentiable.

    Returns:
        The derivatives with respect to log w_k, (K, C), and with respect to log p_k: their sum, and their sums with z
        and with z z', (K, C), (K, D, C), (K, D, D, C).
    """
    rule = _rule(n)
    nodes, weights = (table(x, cells.centre.device) for x in rule[:2])
    dim = cells.centre.shape[0]
    constant, gradient, hessian, z, jacobian = _quadratics(problem.seen, cells)
    by_weight: list[Tensor] = []
    if problem.split:
        terms, log_p, log_q, u = _log_ratios(problem, cells, constant, gradient, hessian, nodes, paired=paired)
        total = torch.logaddexp(log_p, log_q)
        p_side, q_side = u * torch.sigmoid(u), -torch.tanh(0.5 * u)
        by_density = [p_side * torch.exp(x - log_p) for x in terms[: problem.split]]
        by_density += [q_side * torch.exp(x - log_q) for x in terms[problem.split :]]
    else:
        log_w = problem.seen.log_weights.index_select(-1, cells.frame)
        logs = [_on_nodes(*x, nodes).clamp(-1000.0, 500.0) for x in zip(constant, gradient, hessian, strict=True)]
        total = _log_sum([e + w for e, w in zip(logs, log_w, strict=True)])
        weight = torch.exp(log_w)
        shares = [torch.exp(e + w - total) for e, w in zip(logs, log_w, strict=True)]
        by_density = [r * (e - total) for r, e in zip(shares, logs, strict=True)]
        by_weight = [d - r + w for d, r, w in zip(by_density, shares, weight, strict=True)]
    # The frame's share of the whole is fixed, not the whole: a factor of 1 that has a derivative.
    whole = torch.exp(total - total.detach())
    measure = _normal(cells, nodes) * torch.exp(problem.log_mass[cells.frame]) * whole
    flat = [_along(weights, i, dim).squeeze(-1) for i in range(dim)]
    grid = functools.reduce(torch.mul, flat)
    axes = [_along(nodes, i, dim).squeeze(-1) for i in range(dim)]
    rows = [grid, *(grid * t for t in axes), *(grid * a * b for a in axes for b in axes)]
    monomials = torch.stack([x.reshape(-1) for x in rows])
    sums = torch.stack([monomials @ (c * measure).flatten(0, dim - 1) for c in by_density])
    mass, first = sums[:, 0], sums[:, 1 : dim + 1]
    second = sums[:, dim + 1 :].reshape(len(sums), dim, dim, -1)
    if by_weight:
        from_weight = torch.stack([monomials[0] @ (c * measure).flatten(0, dim - 1) for c in by_weight])
    else:
        from_weight = mass
    turned = (jacobian * first.unsqueeze(1)).sum(2)
    half_way = (jacobian.unsqueeze(3) * second.unsqueeze(1)).sum(2)
    inner = (half_way.unsqueeze(2) * jacobian.unsqueeze(1)).sum(3)
    outer = z.unsqueeze(2) * turned.unsqueeze(1)
    square = z.unsqueeze(2) * (z * mass.unsqueeze(1)).unsqueeze(1) + outer + outer.transpose(1, 2) + inner
    return from_weight, mass, z * mass.unsqueeze(1) + turned, square
