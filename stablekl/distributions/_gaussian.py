"""Any Gaussian as its parameters, whichever class it comes from, and the KL between two of them.

Each way to give a covariance has a rule that takes it as it is. Parameters are converted only where the two
sides were given differently, and then in float64 where the device has it. In that mixed case the difference of nearby
covariances carries the rounding of the conversion, about eps * cond, undiminished: for float64 pairs that are nearly
equal, give both the same way.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
)

from ._base import common_dtype, widened
from ._low_rank_kl import low_rank_kl
from ._mvn_kl import covariance_kl, precision_kl, scale_tril_kl
from .low_rank import dense_scale_tril
from .multivariate_normal import given_parameter
from .normal import normal_kl

__all__ = ["Gaussian", "as_gaussian", "gaussian_kl", "lower_factor"]

Kind = Literal["scale_diag", "scale_tril", "covariance_matrix", "precision_matrix", "low_rank"]


class Gaussian(NamedTuple):
    """The parameters of a Gaussian as the caller gave them.

    Attributes:
        kind: which parameter ``scale`` is.
        loc: mean, ``(..., D)``.
        scale: ``(..., D)`` for scale_diag; ``(..., D, D)`` for a matrix; for low_rank the diagonal variances
            ``(..., D)``.
        cov_factor: ``(..., D, r)`` for low_rank, else None.
    """

    kind: Kind
    loc: Tensor
    scale: Tensor
    cov_factor: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What the dtypes of the parameters, which may differ, promote to."""
        tensors = (self.loc, self.scale) if self.cov_factor is None else (self.loc, self.scale, self.cov_factor)
        return common_dtype(*tensors)

    def to(self, dtype: torch.dtype) -> Gaussian:
        """The same in another dtype."""
        factor = None if self.cov_factor is None else self.cov_factor.to(dtype)
        return Gaussian(self.kind, self.loc.to(dtype), self.scale.to(dtype), factor)

    def unsqueeze(self, dim: int) -> Gaussian:
        """Insert a batch dimension; ``dim`` counts from the end of the batch shape, -1 being last."""
        events = 1 if self.scale.ndim == self.loc.ndim else 2
        factor = None if self.cov_factor is None else self.cov_factor.unsqueeze(dim - 2)
        return Gaussian(self.kind, self.loc.unsqueeze(dim - 1), self.scale.unsqueeze(dim - events), factor)


def as_gaussian(distribution: Distribution) -> Gaussian | None:
    """Read a Gaussian's parameters; a scalar `Normal` counts as one-dimensional. None if it is no Gaussian."""
    if isinstance(distribution, Independent) and distribution.reinterpreted_batch_ndims == 1:
        base = distribution.base_dist
        if isinstance(base, Normal):
            return Gaussian("scale_diag", base.loc, base.scale)
    if isinstance(distribution, Normal):
        return Gaussian("scale_diag", distribution.loc.unsqueeze(-1), distribution.scale.unsqueeze(-1))
    if isinstance(distribution, MultivariateNormal):
        kind: Kind = given_parameter(distribution)  # type: ignore[assignment]
        return Gaussian(kind, distribution.loc, getattr(distribution, kind))
    if isinstance(distribution, LowRankMultivariateNormal):
        return Gaussian(
            "low_rank",
            distribution.loc,
            distribution.cov_diag,
            distribution.cov_factor,
        )
    return None


def lower_factor(g: Gaussian) -> Tensor:
    """Lower-triangular Cholesky factor of the covariance, ``(..., D, D)``, in the dtype of ``g``."""
    if g.kind == "scale_tril":
        return g.scale
    if g.kind == "scale_diag":
        return torch.diag_embed(g.scale)
    if g.cov_factor is not None:
        return dense_scale_tril(g.cov_factor, g.scale)
    if g.kind == "covariance_matrix":
        lower: Tensor = torch.linalg.cholesky(widened(g.scale))
        return lower.to(g.scale.dtype)
    upper = torch.linalg.cholesky(widened(g.scale).flip((-2, -1))).flip((-2, -1))
    identity = torch.eye(upper.shape[-1], dtype=upper.dtype, device=upper.device)
    lower = torch.linalg.solve_triangular(upper.mT, identity, upper=False)
    return lower.to(g.scale.dtype)


def gaussian_kl(p: Gaussian, q: Gaussian) -> Tensor:
    """KL(p || q) in nats, of the broadcast batch shape; in the promoted dtype, rounded once where it is a half one."""
    dtype = torch.promote_types(p.dtype, q.dtype)
    working = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    p, q = p.to(working), q.to(working)
    return _gaussian_kl(p, q).to(dtype)


def _gaussian_kl(p: Gaussian, q: Gaussian) -> Tensor:
    kinds = {p.kind, q.kind}
    if kinds == {"scale_diag"}:
        return normal_kl(p.loc, p.scale, q.loc, q.scale).sum(-1)
    if kinds == {"low_rank"}:
        return low_rank_kl(p.loc, *_low_rank(p), q.loc, *_low_rank(q))
    if kinds == {"covariance_matrix"}:
        return covariance_kl(p.loc, p.scale, q.loc, q.scale)
    if kinds == {"precision_matrix"}:
        return precision_kl(p.loc, p.scale, q.loc, q.scale)
    if kinds == {"scale_tril"}:
        if p.loc.shape[-1] == 1:  # a Normal, whose gradient is accurate where it changes sign, too
            return normal_kl(p.loc, p.scale.squeeze(-1), q.loc, q.scale.squeeze(-1)).squeeze(-1)
        return scale_tril_kl(p.loc, p.scale, q.loc, q.scale)
    # From here on something is converted: in more precision than the parameters have.
    dtype = p.loc.dtype
    p, q = p.to(widened(p.loc).dtype), q.to(widened(q.loc).dtype)
    if kinds == {"low_rank", "scale_diag"}:
        return low_rank_kl(p.loc, *_low_rank(p), q.loc, *_low_rank(q)).to(dtype)
    if q.kind == "scale_diag":
        return _full_to_diagonal_kl(p, q).to(dtype)
    return scale_tril_kl(p.loc, lower_factor(p), q.loc, lower_factor(q)).to(dtype)


def _full_to_diagonal_kl(p: Gaussian, q: Gaussian) -> Tensor:
    """KL of a full Gaussian to a diagonal one: whitening by q is a division of the rows, no solve.

    The diagonal of the factor contributes univariate KLs, what lies below it half its whitened square.
    """
    factor = lower_factor(p)
    below = factor.tril(-1) / q.scale.unsqueeze(-1)
    univariate = normal_kl(p.loc, factor.diagonal(dim1=-2, dim2=-1), q.loc, q.scale).sum(-1)
    return univariate + (0.5 * below * below).sum((-2, -1))


def _low_rank(g: Gaussian) -> tuple[Tensor, Tensor]:
    """Factor and diagonal variances; a diagonal Gaussian is of rank 0."""
    if g.cov_factor is not None:
        return g.cov_factor, g.scale
    return g.scale.new_zeros((*g.scale.shape, 0)), g.scale.square()
