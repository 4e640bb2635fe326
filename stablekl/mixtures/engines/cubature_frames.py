r"""The coordinates of cubature: every component of a mixture as seen from one of them.

The mass of every component is integrated in its own coordinates, ``x = loc_j + L_j U y``, where its density is the
standard normal one, thin or round, and wherever it lies. U is a rotation. There every other component is

.. math::
    e_k(y) = \log\frac{p_k}{p_j} = \log\frac{|L_j|}{|L_k|} - \sum_i d_i (y_i + d_i/2), \qquad d = z_k - y = E y + g,

with :math:`E = U^T L_k^{-1} (L_j - L_k) U` and :math:`g = U^T L_k^{-1} (\mu_j - \mu_k)` from differences of parameters:
nothing cancels where components are near each other, or far from the origin. On a box around c, e_k is the quadratic
:math:`e_k(c) + b't + t'Ht/2`, which costs two passes over the nodes in any dimension, and one exponential.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Cells",
    "Frame",
    "Maps",
    "Pairs",
    "along",
    "frames",
    "largest_log_ratio",
    "maps",
    "on_nodes",
    "pair_maps",
    "pair_quadratics",
    "positions",
    "quadratics",
]


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


def _log_ratio(a: Tensor, b: Tensor) -> Tensor:
    """``log(a/b)``, accurate where a is near b."""
    change = (a - b) / b
    near = change.abs() < 0.5
    return torch.where(near, torch.log1p(torch.where(near, change, 0.0)), torch.log(a) - torch.log(b))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product of small matrices, whose bits do not depend on how many there are."""
    total = a[..., :, :1] * b[..., :1, :]
    for i in range(1, a.shape[-1]):
        total = total + a[..., :, i : i + 1] * b[..., i : i + 1, :]
    return total


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
    """Offsets z - y, and z, of all components at the centres, (K, D, C), and the maps' slopes E there, (K, D, D, C)."""
    slope, y = seen.slope.index_select(-1, cells.frame), cells.centre
    d = seen.shift.index_select(-1, cells.frame)
    for i in range(y.shape[0]):
        d = d + slope[:, :, i] * y[i]
    return d, y + d, slope


def quadratics(seen: Maps, cells: Cells) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
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


def pair_quadratics(seen: Maps, pairs: Maps, cells: Cells) -> tuple[Tensor, Tensor, Tensor]:
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


def along(t: Tensor, axis: int, dim: int) -> Tensor:
    """Values (n,) or (n, C) along one axis of the nodes (n, ..., n, C)."""
    return t.reshape(*(1,) * axis, t.shape[0], *(1,) * (dim - 1 - axis), *(t.shape[1:] or (1,)))


def on_nodes(constant: Tensor, gradient: Tensor, hessian: Tensor, nodes: Tensor) -> Tensor:
    """A quadratic at the tensor nodes, (n, ..., n, C)."""
    dim = gradient.shape[0]
    value = constant.reshape(*(1,) * dim, -1)
    for i in range(dim):
        t = along(nodes, i, dim)
        line = gradient[i] + 0.5 * hessian[i, i] * t
        for j in range(i):
            line = line + hessian[i, j] * along(nodes, j, dim)
        value = torch.addcmul(value, line, t)
    return value
