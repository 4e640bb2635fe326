r"""Gaussians restricted, conditioned, multiplied and merged, each in the parameters it was given in.

=================  ===============================================  ==============================================
given              marginal of the coordinates a                    conditional of b given a
=================  ===============================================  ==============================================
scale_diag         the entries                                      the entries
scale_tril         QR of the rows a of L                            :math:`L_{bb}` of the QR of L's rows, a first
covariance_matrix  the submatrix                                    :math:`L_{bb}` of the Cholesky factor, a first
precision_matrix   :math:`C_{aa}^{-\top}`, C the Cholesky factor    the submatrix of the precision
                   of the precision, b first
low rank           the rows of W and entries of d                   :math:`W_b R^{-1}`, R of :math:`[d_a^{-1/2} W_a; I]`
=================  ===============================================  ==============================================

A factor stays a factor: :math:`L L^\top` is never formed, whose Cholesky factor would be off by eps times the condition
number of the covariance rather than of L. Nor is a Schur complement :math:`S_{bb} - S_{ba} S_{aa}^{-1} S_{ab}`
subtracted: it is what a factor whose first rows belong to a has in its last block. Only for a precision matrix are
triangles inverted.

The product of two Gaussians has the precision :math:`F_1^\top F_1 + F_2^\top F_2`, F the inverse factors: the QR of
:math:`[F_1; F_2]`, in which nothing is subtracted and neither side is preferred. With
:math:`S_1 (S_1 + S_2)^{-1} S_2`, its twin in covariances, a direction narrow in one and wide in the other is lost: what
remains of 1e16 is 1e-16. The mean is that of the side that decides, moved towards the other.

All of it is computed in float64 where the device has it and rounded once.

Accuracy, observed against mpmath, D = 5, float64: with a scale_tril of a covariance of condition number 1e12, whitened
covariances of marginals, conditionals and products are off by 2e-14 to 6e-13, the conditional mean by 2e-10 standard
deviations, log-densities by 6e-14; given as a covariance or a precision, by 4e-5, 1e-8 and 1e-5. That is eps times the
condition number of what was given. A product's mean is off by that times the distance of the two means in units of the
product's standard deviations (1e-4 at 1e6 of them).
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributions._base import widened
from ..distributions._gaussian import Gaussian, _low_rank, lower_factor
from ..distributions._low_rank_factors import Whitened
from ..distributions.low_rank import LowRankMultivariateNormal
from .square_root import inverse_square_root, lower_square_root

__all__ = ["Conditional", "condition", "log_overlap", "marginal", "matched", "positions", "product", "take"]

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Conditional(NamedTuple):
    """What a value of some coordinates leaves.

    Attributes:
        gaussian: of the other coordinates.
        log_density: of the value, of the batch shape of ``gaussian``.
    """

    gaussian: Gaussian
    log_density: Tensor


def positions(dims: Sequence[int], size: int) -> list[int]:
    """``dims`` counted from the front.

    Raises:
        ValueError: there are none, one is out of range or occurs twice, or they are no sequence of integers.
    """
    listed = dims.tolist() if isinstance(dims, Tensor) else dims
    try:
        given = [operator.index(i) for i in listed]
        # A mask would be read as the coordinates 0 and 1. (numpy's booleans are no integers to begin with.)
        integers = not any(isinstance(i, bool) or getattr(i, "dtype", None) is torch.bool for i in listed)
    except TypeError:
        integers = False
    if not integers:
        raise ValueError(
            f"dims must be a sequence of integers, the coordinates by their numbers, got {dims!r}. For a single "
            "coordinate write [i], for a mask m.nonzero()[:, 0]."
        )
    for i in given:
        if not -size <= i < size:
            raise ValueError(
                f"dims has the entry {i}: events have {size} coordinates, counted from {-size} to {size - 1}"
            )
    result = [i % size for i in given]
    if len(set(result)) < len(result):
        twice = next(i for i in result if result.count(i) > 1)
        raise ValueError(f"dims = {given} names coordinate {twice} twice")
    if not result:
        raise ValueError("dims is empty: name at least one coordinate")
    return result


def _wide(g: Gaussian) -> Gaussian:
    return g.to(widened(g.loc).dtype)


def take(x: Tensor, dims: Sequence[int], *axes: int) -> Tensor:
    """The entries ``dims`` along each of the axes; as slices, for an index would have to be copied to the device."""
    starts = [n for n, i in enumerate(dims) if n == 0 or i != dims[n - 1] + 1]
    runs = [(dims[a], b - a) for a, b in itertools.pairwise([*starts, len(dims)])]
    for axis in axes:
        slices = [x.narrow(axis, start, length) for start, length in runs]
        x = slices[0] if len(slices) == 1 else torch.cat(slices, axis)
    return x


def _reordered(scale_tril: Tensor, dims: list[int]) -> Tensor:
    """Factor of the covariance of some coordinates, in this order: exact where they are the first ones."""
    if dims == list(range(len(dims))):
        return scale_tril[..., : len(dims), : len(dims)]
    return lower_square_root(take(scale_tril, dims, -2)[..., : max(dims) + 1].mT)


def _cholesky(a: Tensor, order: list[int]) -> Tensor:
    factor: Tensor = torch.linalg.cholesky(take(a, order, -2, -1))
    return factor


def marginal(g: Gaussian, dims: list[int]) -> Gaussian:
    """The Gaussian of some coordinates, in the order of ``dims`` (from `positions`), in the dtype of ``g``."""
    dtype, loc = g.dtype, take(g.loc, dims, -1)
    if g.kind == "scale_diag":
        return Gaussian(g.kind, loc, take(g.scale, dims, -1)).to(dtype)
    if g.cov_factor is not None:
        return Gaussian(g.kind, loc, take(g.scale, dims, -1), take(g.cov_factor, dims, -2)).to(dtype)
    if g.kind == "covariance_matrix":
        return Gaussian(g.kind, loc, take(g.scale, dims, -2, -1)).to(dtype)
    if g.kind == "scale_tril":
        return Gaussian(g.kind, loc, _reordered(widened(g.scale), dims)).to(dtype)
    if len(dims) == g.loc.shape[-1]:
        return Gaussian(g.kind, loc, take(g.scale, dims, -2, -1)).to(dtype)
    # C_aa C_aa' is a's own precision, the Schur complement. With a backwards, its inverse, backwards, is lower too.
    others = [i for i in range(g.loc.shape[-1]) if i not in dims]
    factor = _cholesky(widened(g.scale), others + dims[::-1])[..., len(others) :, len(others) :]
    identity = torch.eye(len(dims), dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    return Gaussian("scale_tril", loc, inverse.mT.flip((-2, -1))).to(dtype)


def condition(g: Gaussian, dims: list[int], value: Tensor) -> Conditional:
    """The Gaussian of the other coordinates given those in ``dims``, and the log-density of the value.

    Args:
        g: of batch shape ``batch_shape + (K,)``.
        dims: from `positions`; not all coordinates.
        value: shape ``sample_shape + batch_shape + (len(dims),)``.

    Returns:
        Of batch shape ``sample_shape + batch_shape + (K,)``; the Gaussian in the dtype of ``g`` and ``value``, with a
        scale that has no sample dimensions; the log-density in working precision.
    """
    dtype = torch.promote_types(g.dtype, value.dtype)
    g, value = _wide(g), widened(value)
    others = [i for i in range(g.loc.shape[-1]) if i not in dims]
    # One solve for all samples: sample dimensions become columns beside the batch that the factors have.
    lead = max(value.ndim - 1 - (g.loc.ndim - 2), 0)
    samples = value.shape[:lead]
    columns = value.unsqueeze(-2).flatten(0, lead - 1) if lead else value.unsqueeze(-2).unsqueeze(0)
    x = columns.movedim(0, -1) - take(g.loc, dims, -1).unsqueeze(-1)
    shift, log_density, scale, factor = _CONDITIONS[g.kind](g, dims, others, x)
    shift, log_density = shift.movedim(-1, 0), log_density.movedim(-1, 0)
    loc = take(g.loc, others, -1) + shift
    batch = samples + log_density.shape[1:]
    loc = loc.expand(log_density.shape + loc.shape[-1:]).reshape(batch + loc.shape[-1:])
    rest = Gaussian("scale_tril" if g.kind == "covariance_matrix" else g.kind, loc, scale, factor)
    return Conditional(rest.to(dtype), log_density.reshape(batch))


_Parts = tuple[Tensor, Tensor, Tensor, Tensor | None]


def _log_density(z: Tensor, log_scales: Tensor) -> Tensor:
    """Of whitened columns z, (..., n, S), and the logarithms of the scales, (..., n)."""
    constant = log_scales.sum(-1) + z.shape[-2] * _HALF_LOG_2PI
    return -0.5 * z.square().sum(-2) - constant.unsqueeze(-1)


def _given_diagonal(g: Gaussian, dims: list[int], others: list[int], x: Tensor) -> _Parts:
    scale = take(g.scale, dims, -1)
    shift = x.new_zeros((len(others), 1))
    return shift, _log_density(x / scale.unsqueeze(-1), scale.log()), take(g.scale, others, -1), None


def _given_factor(g: Gaussian, dims: list[int], others: list[int], x: Tensor) -> _Parts:
    n, order = len(dims), dims + others
    factor = _reordered(g.scale, order) if g.kind == "scale_tril" else _cholesky(g.scale, order)
    z = torch.linalg.solve_triangular(factor[..., :n, :n], x, upper=False)
    log_scales = factor[..., :n, :n].diagonal(dim1=-2, dim2=-1).log()
    return factor[..., n:, :n] @ z, _log_density(z, log_scales), factor[..., n:, n:], None


def _given_precision(g: Gaussian, dims: list[int], others: list[int], x: Tensor) -> _Parts:
    n, factor = len(others), _cholesky(g.scale, others + dims)
    own = factor[..., n:, n:]
    shift = -torch.linalg.solve_triangular(factor[..., :n, :n].mT, factor[..., n:, :n].mT @ x, upper=True)
    log_density = _log_density(own.mT @ x, -own.diagonal(dim1=-2, dim2=-1).log())
    return shift, log_density, take(g.scale, others, -2, -1), None


def _given_low_rank(g: Gaussian, dims: list[int], others: list[int], x: Tensor) -> _Parts:
    # Given x = W_a z + noise, the factors z have the covariance (R'R)^-1 and the least-squares solution as their mean.
    factor, diag = _low_rank(g)
    root = take(diag, dims, -1).sqrt()
    y = x / root.unsqueeze(-1)
    whitened = Whitened.of(take(factor, dims, -2) / root.unsqueeze(-1))
    rows = torch.linalg.solve_triangular(whitened.r, take(factor, others, -2), upper=True, left=False)
    constant = 0.5 * whitened.log_det() + root.log().sum(-1) + len(dims) * _HALF_LOG_2PI
    log_density = -0.5 * whitened.quadratic(y) - constant.unsqueeze(-1)
    return rows @ (whitened.q1.mT @ y), log_density, take(diag, others, -1), rows


_CONDITIONS = {
    "scale_diag": _given_diagonal,
    "scale_tril": _given_factor,
    "covariance_matrix": _given_factor,
    "precision_matrix": _given_precision,
    "low_rank": _given_low_rank,
}


# ---- products ---------------------------------------------------------------------------------------------------


def log_overlap(p: Gaussian, q: Gaussian) -> Tensor:
    r""":math:`\log \int p q = \log N(\mu_p; \mu_q, \Sigma_p + \Sigma_q)`, of the broadcast batch shape, not rounded."""
    p, q = _wide(p), _wide(q)
    x = (p.loc - q.loc).unsqueeze(-1)
    kinds = {p.kind, q.kind}
    if kinds == {"scale_diag"}:
        scale = torch.hypot(p.scale, q.scale)
        return _log_density(x / scale.unsqueeze(-1), scale.log()).squeeze(-1)
    if kinds <= {"low_rank", "scale_diag"}:
        (w_p, d_p), (w_q, d_q) = _low_rank(p), _low_rank(q)
        factor = torch.cat(_broadcast_batch(w_p, w_q), -1)
        total = LowRankMultivariateNormal(torch.zeros_like(x[..., 0]), factor, d_p + d_q, validate_args=False)
        return total.log_prob(x[..., 0])
    factor = lower_square_root(torch.cat(_broadcast_batch(lower_factor(p).mT, lower_factor(q).mT), -2))
    z = torch.linalg.solve_triangular(factor, x, upper=False)
    return _log_density(z, factor.diagonal(dim1=-2, dim2=-1).log()).squeeze(-1)


def product(p: Gaussian, q: Gaussian) -> Gaussian:
    """The Gaussian proportional to p q, of the broadcast batch shape; diagonal if both are, else by its factor."""
    dtype = torch.promote_types(p.dtype, q.dtype)
    p, q = _wide(p), _wide(q)
    d = q.loc - p.loc
    if p.kind == q.kind == "scale_diag":
        scale = torch.hypot(p.scale, q.scale)
        from_p, from_q = d * (p.scale / scale).square(), -d * (q.scale / scale).square()
        # The quotient of the larger one: that of the smaller may underflow.
        first = p.scale.detach() <= q.scale.detach()
        small, large = torch.where(first, p.scale, q.scale), torch.where(first, q.scale, p.scale)
        loc = torch.where(first, p.loc + from_p, q.loc + from_q)  # from the narrower one, the shorter way
        return Gaussian("scale_diag", loc, small * (large / scale)).to(dtype)
    f_p, f_q = _inverse_factor(p), _inverse_factor(q)
    factor = inverse_square_root(torch.cat(_broadcast_batch(f_p, f_q), -2))
    # F L is that side's block of the QR's orthonormal factor, and L Q'(F d) the way from the other side's mean.
    x = d.unsqueeze(-1)
    z_p, z_q = f_p @ x, f_q @ x
    from_p = (factor @ ((f_q @ factor).mT @ z_q)).squeeze(-1)
    from_q = -(factor @ ((f_p @ factor).mT @ z_p)).squeeze(-1)
    # Whole vectors: the errors of a side's coordinates belong together, and a mixture of both loses eps cond instead.
    start_at_p = (z_q.detach().square().sum(-2) <= z_p.detach().square().sum(-2)).expand_as(from_p)
    loc = torch.where(start_at_p, p.loc + from_p, q.loc + from_q)
    return Gaussian("scale_tril", loc, factor).to(dtype)


def _inverse_factor(g: Gaussian) -> Tensor:
    """F with F'F the precision."""
    if g.kind == "scale_diag":
        return torch.diag_embed(1 / g.scale)
    if g.kind == "precision_matrix":
        return _cholesky(g.scale, list(range(g.loc.shape[-1]))).mT
    factor = lower_factor(g)
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
    return inverse


def _broadcast_batch(*matrices: Tensor) -> list[Tensor]:
    batch = torch.broadcast_shapes(*(a.shape[:-2] for a in matrices))
    return [a.expand(batch + a.shape[-2:]) for a in matrices]


# ---- moments ----------------------------------------------------------------------------------------------------


def matched(log_weights: Tensor, g: Gaussian) -> Gaussian:
    r"""The Gaussian with the mean and covariance of a mixture, by its factor, in working precision.

    The QR of the rows :math:`\sqrt{w_k} L_k^\top` and :math:`\sqrt{w_k}(\mu_k - \mu)^\top`. The Cholesky factor of the
    summed covariance does not exist where narrow components are far apart (1e-8 beside 1 in float64). Means are taken
    relative to that of the heaviest component, so that a common offset costs nothing.

    Args:
        log_weights: normalised, shape ``(..., K)``; -inf switches a component off, whatever its parameters.
        g: of batch shape ``(..., K)``.
    """
    g, log_weights = _wide(g), widened(log_weights)
    alive = (log_weights > -torch.inf).unsqueeze(-1)
    w, root = log_weights.exp().unsqueeze(-1), (0.5 * log_weights).exp().unsqueeze(-1)
    heaviest = log_weights.detach().argmax(-1, keepdim=True).unsqueeze(-1)
    batch = torch.broadcast_shapes(log_weights.shape, g.loc.shape[:-1])
    start = torch.take_along_dim(g.loc.expand(batch + g.loc.shape[-1:]), heaviest.expand((*batch[:-1], 1, 1)), -2)
    distance = torch.where(alive, g.loc - start, 0.0)
    shift = (w * distance).sum(-2, keepdim=True)
    rows = [root * (distance - shift)]
    if g.kind in ("scale_diag", "low_rank"):
        factor, _ = _low_rank(g)
        deviation = g.scale if g.kind == "scale_diag" else g.scale.sqrt()
        # In units of the largest: below 1e-154 squares underflow.
        share = root * torch.where(alive, deviation, 0.0)
        unit = share.detach().amax(-2, keepdim=True)
        unit = torch.where(unit > 0, unit, 1.0)
        pooled = unit.squeeze(-2) * torch.linalg.vector_norm(share / unit, dim=-2)
        rows.append(torch.diag_embed(pooled))
    else:
        factor = lower_factor(g)
    if factor.shape[-1]:
        rows.append((root.unsqueeze(-1) * torch.where(alive.unsqueeze(-1), factor, 0.0)).mT.flatten(-3, -2))
    return Gaussian(
        "scale_tril", (start + shift).squeeze(-2), lower_square_root(torch.cat(_broadcast_batch(*rows), -2))
    )
