r"""What cubature may miss where the components of the second mixture cross.

Far from all of its components log q is nearly the largest of log v_k q_k: paraboloids with creases where two of them
cross, of width 1/\|grad D\|, D the log-ratio of the two. Under a first mixture much wider than q the creases are where
the mass is, and sharper than any box. Last Legendre coefficients do not measure them: they come squared into an
estimate for analytic integrands (200 times too little was observed), and a corner that is cut off between the nodes is
not in them at all (there 1e-16 was claimed for an error of 5e-8). But D is known, a quadratic, and the error can be
estimated beforehand. With slopes g_i of D along the axes, in units of the half widths, log(1 + exp(D)) has its
singularities at :math:`i \pi / g` from the real axis, and n nodes miss of it

.. math::
    \epsilon_i \le \frac{0.5}{n^2} g_i \rho_i^{4-2n}, \qquad \rho_i = \pi/g_i + \sqrt{1 + (\pi/g_i)^2}

wherever in the box the crease is (0.35 was found by search, n from 8 to 10, g from 1 to 1e4). Where D stays apart from
zero, or a third component above both, as much less as the exponential of that. In space a crease that is oblique to two
axes passes the nodes of one at different places along the other: its errors average over those n, as n^-1/2. (In the
plane they do not where D's slopes are alike: the nodes are a lattice.) From box to box their signs differ: they are
added in quadrature.

**Observed** for one Gaussian, 2 to 1e4 times wider, against two components (truth: `contour`): errors below 0.8 of the
claim in the plane (700 problems) and 1 in space (90), where one component is moved along an axis 2.2 (once in 180);
typically 1/50 of it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .cubature_frames import Cells, quadratics
from .cubature_nodes import BLOCK, Problem, largest_mass

__all__ = ["crossings"]


def _crossings(problem: Problem, cells: Cells, n: int) -> Tensor:
    constant, gradient, hessian, _, _ = quadratics(problem.seen, cells)
    constant = constant + problem.seen.log_weights.index_select(-1, cells.frame)
    bend = 0.5 * hessian.abs().sum(2)
    reach = gradient.abs().sum(1) + bend.sum(1)
    split = problem.split
    # F grows like log(p/q) where p is above q, and hardly where it is below.
    below = (constant - reach)[split:].amax(0) - (constant + reach)[:split].amax(0) - math.log(split)
    c, b, h = (x[split:] for x in (constant, gradient, hessian))
    c = c.clamp(min=-1e300)  # weights of zero: no difference of infinities
    weight = largest_mass(problem, cells)[0] * torch.exp(-below.clamp(min=0.0))
    if problem.near is not None:  # where p is next to q it is no wider, and has the same creases
        weight = torch.where(problem.near[cells.frame], 0.0, weight)
    # by how much at least another component is above each of them in all of the box
    covered = torch.zeros_like(c)
    pairs = []
    for j in range(len(c)):
        for k in range(j):
            difference, slope = c[j] - c[k], (b[j] - b[k]).abs()
            curve = 0.5 * (h[j] - h[k]).abs().sum(1)
            wide = slope.sum(0) + curve.sum(0)
            covered[j] = torch.maximum(covered[j], -difference - wide)
            covered[k] = torch.maximum(covered[k], difference - wide)
            pairs.append((j, k, (difference.abs() - wide).clamp(min=0.0), slope + curve))
    total = torch.zeros_like(cells.centre)
    for j, k, apart, slope in pairs:
        share = torch.exp(-torch.maximum(covered[j], covered[k]) - apart)
        slope = slope.clamp(min=1e-3)
        t = math.pi / slope
        missed = slope * (t + torch.sqrt(1.0 + t * t)) ** (4 - 2 * n)
        if len(slope) == 3:
            for others in (slope.roll(1, 0), slope.roll(2, 0)):
                missed = missed / torch.sqrt(1.0 + (n * others / slope).clamp(max=n - 1.0))
        total = total + share * missed
    return (0.5 / n**2) * weight * total


def crossings(problem: Problem, cells: Cells, n: int) -> Tensor:
    """What n nodes per axis may miss of the creases in each box, by axis, (D, C)."""
    kinds = problem.seen.shift.shape[0] - problem.split
    if not problem.split or kinds < 2:
        return torch.zeros_like(cells.centre)
    chunks = torch.arange(len(cells.frame), device=cells.frame.device).split(max(1, BLOCK // kinds))
    parts = [_crossings(problem, cells.take(index), n) for index in chunks]
    return torch.cat(parts, -1) if parts else torch.zeros_like(cells.centre)
