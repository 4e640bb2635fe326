r"""Two Gaussians as what the divergences of this package need: factors, and the difference of the covariances.

The difference :math:`\Delta = \Sigma_p - \Sigma_q` carries the relative accuracy near p = q, so it is never the
difference of two covariances that were computed. It is the product of two matrices, symmetrised:

* factors: :math:`(L_p - L_q)(L_p + L_q)^\top`;
* covariances: :math:`(\Sigma_p - \Sigma_q) I`; against a factor, :math:`\Sigma_p - L_q L_q^\top` as the residual of
  the factorisation, to more digits than the product has;
* precisions: :math:`[\Sigma_p (P_q - P_p)] \Sigma_q`;
* low rank: :math:`\mathrm{diag}(d_p - d_q) + (W_p - W_q)(W_p + W_q)^\top`.

Other combinations convert one side and then subtract, which leaves eps cond(Sigma), undiminished as p nears q.

The gradients are written with respect to the two covariances, and autograd continues from there to the parameters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._residual import residual
from ..distributions._base import widened
from ..distributions._gaussian import Gaussian, lower_factor

__all__ = ["Pair", "full_pair", "qr_factor", "symmetric", "whitened_difference"]


class Pair(NamedTuple):
    """Everything of one batch shape, in float64; only the first three take gradients.

    Attributes:
        shift: mu_p - mu_q, ``(..., D)``.
        cov_p: covariance of p, ``(..., D, D)``.
        cov_q: covariance of q.
        factor_p: its lower-triangular factor.
        factor_q: that of q.
        left: the difference of the covariances is ``left @ right.mT``, symmetrised.
        right: see ``left``.
    """

    shift: Tensor
    cov_p: Tensor
    cov_q: Tensor
    factor_p: Tensor
    factor_q: Tensor
    left: Tensor
    right: Tensor


def symmetric(a: Tensor) -> Tensor:
    """The symmetric part."""
    return 0.5 * (a + a.mT)


def whitened_difference(factor: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``F^-1 Delta F^-T`` for a lower-triangular factor F."""
    size = left.shape[-1]
    solved = torch.linalg.solve_triangular(factor, torch.cat([left, right], -1), upper=False)
    return symmetric(solved[..., :size] @ solved[..., size:].mT)


def qr_factor(stacked: Tensor) -> Tensor:
    """Lower-triangular F with ``F F' = A A'`` for a wide A; the signs of its diagonal are arbitrary."""
    dim = stacked.shape[-2]
    # linalg.qr(mode="r") fails under vmap and geqrf under dynamic shapes (torch 2.13)
    if torch.compiler.is_compiling():
        root: Tensor = torch.linalg.qr(stacked.mT).R.mT
        return root
    packed: Tensor = torch.geqrf(stacked.mT)[0][..., :dim, :]
    return packed.triu().mT


def _detached(g: Gaussian) -> Gaussian:
    factor = None if g.cov_factor is None else g.cov_factor.detach()
    return Gaussian(g.kind, g.loc.detach(), g.scale.detach(), factor)


def _covariance(g: Gaussian) -> Tensor:
    """Differentiable; its digits matter to derivatives of gradients alone."""
    if g.cov_factor is not None:
        return g.cov_factor @ g.cov_factor.mT + torch.diag_embed(g.scale)
    if g.kind == "scale_tril":
        lower = g.scale.tril()
        return lower @ lower.mT
    if g.kind == "scale_diag":
        return torch.diag_embed(g.scale.square())
    if g.kind == "precision_matrix":
        return symmetric(torch.linalg.inv(g.scale))
    return symmetric(g.scale)


def _padded(factor: Tensor, rank: int) -> Tensor:
    return torch.nn.functional.pad(factor, (0, rank - factor.shape[-1]))


def _low_rank(g: Gaussian) -> tuple[Tensor, Tensor]:
    if g.cov_factor is not None:
        return g.cov_factor, g.scale
    return g.scale.unsqueeze(-1)[..., :0], g.scale.square()


def _difference(p: Gaussian, q: Gaussian, factor_p: Tensor, factor_q: Tensor) -> tuple[Tensor, Tensor]:
    """``left`` and ``right`` of `Pair`."""
    kinds = {p.kind, q.kind}
    if kinds <= {"scale_tril", "scale_diag"}:
        return factor_p - factor_q, factor_p + factor_q
    if kinds == {"precision_matrix"}:
        return factor_p @ (factor_p.mT @ (q.scale - p.scale)), factor_q @ factor_q.mT
    identity = torch.eye(factor_p.shape[-1], dtype=factor_p.dtype, device=factor_p.device)
    if "low_rank" in kinds and kinds <= {"low_rank", "scale_diag"}:
        (w_p, d_p), (w_q, d_q) = _low_rank(p), _low_rank(q)
        rank = max(w_p.shape[-1], w_q.shape[-1])
        w_p, w_q = _padded(w_p, rank), _padded(w_q, rank)
        return torch.diag_embed(d_p - d_q) + symmetric((w_p - w_q) @ (w_p + w_q).mT), identity
    if p.kind == "covariance_matrix" and q.kind in ("scale_tril", "scale_diag"):
        return _residual(symmetric(p.scale), factor_q), identity
    if q.kind == "covariance_matrix" and p.kind in ("scale_tril", "scale_diag"):
        return -_residual(symmetric(q.scale), factor_p), identity
    return _covariance(p) - _covariance(q), identity


def _residual(cov: Tensor, factor: Tensor) -> Tensor:
    batch = torch.broadcast_shapes(cov.shape, factor.shape)
    return symmetric(residual(cov.expand(batch), factor.expand(batch), factor.expand(batch)))


def full_pair(p: Gaussian, q: Gaussian) -> Pair:
    """Read two Gaussians over vectors of one length D into float64 (float32 on MPS); batch shapes broadcast."""
    dtype = widened(p.loc).dtype
    p, q = p.to(dtype), q.to(dtype)
    still_p, still_q = _detached(p), _detached(q)
    factor_p, factor_q = lower_factor(still_p).tril(), lower_factor(still_q).tril()
    left, right = _difference(still_p, still_q, factor_p, factor_q)
    shift = p.loc - q.loc
    matrices = (_covariance(p), _covariance(q), factor_p, factor_q, left, right)
    batch = torch.broadcast_shapes(shift.shape[:-1], *(m.shape[:-2] for m in matrices))
    return Pair(shift.expand(batch + shift.shape[-1:]), *(m.expand(batch + m.shape[-2:]) for m in matrices))
