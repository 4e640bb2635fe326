r"""The few directions in which the components of mixtures differ.

Where all components are alike in the complement of a subspace, given the coordinates in it, that complement knows
nothing about the label, and drops out of every divergence between the mixtures. This is so for components with one
covariance (only the span of the mean differences matters), for diagonal ones that differ in few coordinates, and
for whatever is such a mixture seen through an affine map.

In coordinates that make the widest component N(0, I), component k is N(d_k, I + G_k). The subspace is the span U of all
columns of d_k and G_k: orthogonally to it each component has mean 0, covariance I and no correlation with U. What the
complement may still know is, by the chain rule, at most

.. math::
    \sum_k w_k \tfrac12 \bigl[|d_{k,v}|^2 + |C_{k,vu} C_{k,uu}^{-1/2}|_F^2 + \tfrac12 |G_{k,vv}|_F^2\bigr]

(v: the complement, C = I + G; leading order in what is left there, which is small where it is used). It is quadratic:
rounding errors of 1e-12 in the covariances cost 1e-24, and the derivative with respect to any parameter is 0. So the
gradient of the projected problem, the map being a constant, is the gradient of the whole. Second derivatives lack the
complement's quadratic term.

U comes from a sketch, random combinations of the columns (Halko, Martinsson and Tropp, 2011, SIAM Review 53, 217-288):
it costs one small singular value decomposition whatever the number of columns, and finds a span of few dimensions with
probability one. What it could miss is in the bound.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..components import Components
from .overlaps import log_determinants

__all__ = ["Subspace", "projected", "subspace"]

MOST = 3  # dimensions there are engines for
SKETCH = 8  # columns, a few more than MOST


class Subspace(NamedTuple):
    """Where the components of each row differ.

    Attributes:
        origin: a point near the means, ``(rows, D)``.
        rank: its dimension, shape ``(rows,)``; MOST + 1 where it has more than MOST.
        basis: rows of the map from the space to the subspace, ``(rows, MOST, D)``, in the order of their weight.
        loss: bound on the information left outside, in nats, ``(rows,)``.
    """

    origin: Tensor
    rank: Tensor
    basis: Tensor
    loss: Tensor


@functools.lru_cache(maxsize=8)
def _test_matrix(k: int, dim: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(k, dim + 1, SKETCH, generator=generator, dtype=torch.float64).to(device)


def _select(x: Tensor, index: Tensor) -> Tensor:
    """Component ``index[row]`` of each row, kept as a dimension of 1."""
    return torch.stack([x[i, j : j + 1] for i, j in enumerate(index.tolist())])


def _instead(where: Tensor, x: Tensor, other: Tensor) -> Tensor:
    """``other`` in place of what ``where`` names by the leading dimensions of ``x``."""
    return torch.where(where.reshape(*where.shape, *(1,) * (x.ndim - where.ndim)), other, x)


def subspace(p: Components, tolerance: float) -> Subspace:
    """The smallest subspace outside of which at most ``tolerance`` nats are left.

    Args:
        p: mixtures of batch shape ``(rows,)``, float64.
        tolerance: on the loss.
    """
    p = Components(*(x.detach() for x in p))
    rows, k, dim = p.loc.shape
    live = p.log_weights > -torch.inf
    widest = torch.where(live, log_determinants(p), -torch.inf).argmax(-1)
    origin, unit = _select(p.loc, widest), _select(p.scale, widest)
    # a weight of 0 is no reason for a dimension
    loc, scale = _instead(~live, p.loc, origin), _instead(~live, p.scale, unit)
    test = _test_matrix(k, dim, p.loc.device)
    columns, means = test[:, :dim], test[:, dim:]
    shift = (loc - origin).unsqueeze(-1)
    if p.is_diagonal:
        shift = shift / unit.unsqueeze(-1)
        factor, relative = scale / unit, (scale - unit) / unit
        excess = relative * (2 + relative)
        sketch = (excess.unsqueeze(-1) * columns + shift * means).sum(1)
    else:
        shift, factor, relative = (
            torch.linalg.solve_triangular(unit, x, upper=False) for x in (shift, scale, scale - unit)
        )
        # (I + W)(I + W)' - I without forming 1 + W
        excess = relative + relative.mT + relative @ relative.mT
        sketch = (excess @ columns + shift * means).sum(1)
    # not for scales 1e160 times apart: their squares overflow
    usable = sketch.isfinite().flatten(1).all(-1) & factor.isfinite().flatten(1).all(-1)
    shift, factor, excess = (_instead(~usable, x, torch.zeros_like(x)) for x in (shift, factor, excess))
    directions = torch.linalg.svd(torch.where(usable[:, None, None], sketch, 0.0), full_matrices=False).U
    weights = torch.exp(p.log_weights)
    rank = torch.full((rows,), MOST + 1, device=p.loc.device)
    loss = torch.full((rows,), torch.inf, dtype=p.loc.dtype, device=p.loc.device)
    for r in range(min(MOST, directions.shape[-1], dim), -1, -1):
        left = (weights * _left_outside(directions[..., :r].unsqueeze(1), shift, factor, excess)).sum(-1)
        enough = usable & (left <= tolerance)
        rank, loss = torch.where(enough, r, rank), torch.where(enough, left, loss)
    basis = directions[..., :MOST].mT
    basis = torch.nn.functional.pad(basis, (0, 0, 0, MOST - basis.shape[-2]))
    if p.is_diagonal:
        return Subspace(origin.squeeze(1), rank, basis / unit, loss)
    return Subspace(
        origin.squeeze(1), rank, torch.linalg.solve_triangular(unit.squeeze(1), basis, upper=False, left=False), loss
    )


def _left_outside(u: Tensor, shift: Tensor, factor: Tensor, excess: Tensor) -> Tensor:
    """For each component the divergence left in the complement of the columns of ``u``, ``(rows, K)``."""
    dim, r = u.shape[-2:]
    means = (shift - u @ (u.mT @ shift)).square().sum((-2, -1))
    if excess.ndim == shift.ndim:  # a matrix
        outside = excess - u @ (u.mT @ excess)
        across = outside @ u
        outside = outside - across @ u.mT
        rest, trace = outside.square().sum((-2, -1)), outside.diagonal(dim1=-2, dim2=-1).sum(-1)
        mapped, log_det = factor.mT @ u, factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    else:
        # the projector P is dense: |P diag(g) P|^2 <= |P diag(g)|^2. Its columns' norms are not 1 - |u_j|^2, whose
        # rounding error eps a large g would multiply, but computed: eps^2
        projector = torch.eye(dim, dtype=u.dtype, device=u.device) - u @ u.mT
        across = excess.unsqueeze(-1) * u
        across = across - u @ (u.mT @ across)
        norms = torch.linalg.vector_norm(projector, dim=-1)
        rest, trace = (excess * norms).square().sum(-1), (excess * norms.square()).sum(-1)
        mapped, log_det = factor.unsqueeze(-1) * u, factor.log().sum(-1)
    near = 0.5 * means + 0.25 * rest * (1 + rest.sqrt())  # g - log(1 + g) <= g^2 (1 + |g|)/2 for g > -0.1
    log_inside = torch.zeros_like(means)
    if r > 0:
        # standard deviations in U: of a needle, I + U'GU would leave 1e-16 at best for the variance
        inside = torch.linalg.svdvals(mapped)
        # rounding: the smallest is not known to better
        inside = torch.maximum(inside, dim * torch.finfo(u.dtype).eps * inside[..., :1])
        near = near + 0.5 * across.square().sum((-2, -1)) / inside[..., -1].square()
        log_inside = inside.log().sum(-1)
    # where the leading order is no bound, of a component far narrower than the widest, the divergence itself
    far = 0.5 * (means + trace) - log_det + log_inside
    return torch.where(rest > 0.01, torch.maximum(near, far), near)


def projected(p: Components, basis: Tensor, origin: Tensor) -> Components:
    """The mixtures' images under the map ``basis (x - origin)``: r-dimensional, with Cholesky factors.

    Args:
        p: mixtures of batch shape ``(rows,)``.
        basis: ``(rows, r, D)``, a constant.
        origin: ``(rows, D)``, a constant near the means, the same for mixtures that are to be compared.
    """
    loc = (p.loc - origin.unsqueeze(-2)) @ basis.mT
    mapped = basis.unsqueeze(1)
    mapped = mapped * p.scale.unsqueeze(-2) if p.is_diagonal else mapped @ p.scale
    if basis.shape[-2] == 1:
        return Components(p.log_weights, loc, torch.linalg.vector_norm(mapped, dim=-1))
    factor = torch.linalg.qr(mapped.mT).R.mT
    sign = factor.detach().diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return Components(p.log_weights, loc, factor * sign)
