r"""Low-rank-plus-diagonal multivariate normals without the capacitance matrix.

torch forms :math:`C = I + W^\top D^{-1} W` and subtracts :math:`x^\top D^{-1} W C^{-1} W^\top D^{-1} x` from
:math:`x^\top D^{-1} x` (the Woodbury identity). With a diagonal of 1e-8 in float32 that leaves noise: a log-density of 15.115
where 14.615 is true, and a KL divergence of -1.5 from a distribution to itself. Here the QR of :math:`[D^{-1/2} W; I]`
does the work of C (`_low_rank_factors`), a quadratic form is the squared length of a residual, and the KL
divergence is formed from differences of the parameters (`_low_rank_kl`).

Accuracy: log_prob and entropy are computed in float64 where the device has it and rounded once; in float64 a quadratic form
is off by about ``eps * |x - loc|^2 / min(diag)`` at most. The KL divergence is described in `_low_rank_kl`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions import LowRankMultivariateNormal as TorchLowRankMultivariateNormal
from torch.distributions.utils import lazy_property
from torch.types import _size

from ..parameterizations import check_positive
from ._base import Movable, widened
from ._low_rank_factors import Whitened
from ._low_rank_kl import low_rank_kl

__all__ = ["LowRankMultivariateNormal", "dense_scale_tril", "low_rank_kl"]


def dense_scale_tril(factor: Tensor, diag: Tensor) -> Tensor:
    r"""Cholesky factor of :math:`W W^\top + \mathrm{diag}(d)`, without forming that matrix.

    :math:`L = R^\top` of the QR factorisation of :math:`[W, \mathrm{diag}(\sqrt d)]^\top`, with the diagonal made positive. The
    Cholesky factor of the product would be off by eps cond(Sigma); this is off by eps times its square root.

    Args:
        factor: W, shape ``(..., D, r)``.
        diag: d, shape ``(..., D)``, positive; batch shapes broadcast.

    Returns:
        Lower triangular with positive diagonal, shape ``(..., D, D)``; computed in float64 where the device has it and
        rounded once. Differentiable twice.
    """
    wide, root = widened(factor), widened(diag).sqrt()
    columns = torch.diag_embed(root)
    batch = torch.broadcast_shapes(wide.shape[:-2], columns.shape[:-2])
    stacked = torch.cat([wide.mT.expand(*batch, *wide.mT.shape[-2:]), columns.expand(*batch, *columns.shape[-2:])], -2)
    upper = torch.linalg.qr(stacked)[1]
    sign = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(upper.dtype)
    return (upper * sign[..., None]).mT.to(torch.promote_types(factor.dtype, diag.dtype))


class LowRankMultivariateNormal(Movable, TorchLowRankMultivariateNormal):
    r"""`torch.distributions.LowRankMultivariateNormal` with a stable log-density and a KL divergence that is never negative.

    The covariance is :math:`W W^\top + \mathrm{diag}(d)`.

    Args:
        loc: mean, shape ``batch_shape + (D,)``.
        cov_factor: W, shape ``batch_shape + (D, r)``.
        cov_diag: d, shape ``batch_shape + (D,)``, positive variances.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: shapes do not fit; an entry of ``cov_diag`` is not positive (says where, and how to
            parameterise); a parameter is not a number.

    Example:
        >>> import torch, stablekl
        >>> p = stablekl.LowRankMultivariateNormal(torch.zeros(2), torch.ones(2, 1), torch.full((2,), 1e-8))
        >>> print(f"{torch.distributions.kl_divergence(p, p):.3f}")
        0.000
    """

    def __init__(
        self, loc: Tensor, cov_factor: Tensor, cov_diag: Tensor, validate_args: bool | None = None
    ) -> None:
        """Check the diagonal with a message that helps; factorise nothing yet."""
        if loc.dim() < 1:
            raise ValueError("loc must be at least one-dimensional: shape batch_shape + (D,)")
        d = loc.shape[-1]
        if cov_factor.dim() < 2 or cov_factor.shape[-2] != d:
            raise ValueError(
                f"cov_factor must have shape batch_shape + ({d}, r) to go with loc of shape {tuple(loc.shape)}, got "
                f"{tuple(cov_factor.shape)}"
            )
        if cov_diag.dim() < 1 or cov_diag.shape[-1] != d:
            raise ValueError(
                f"cov_diag must have shape batch_shape + ({d},) to go with loc of shape {tuple(loc.shape)}, got "
                f"{tuple(cov_diag.shape)}"
            )
        if validate_args or (validate_args is None and Distribution._validate_args):
            check_positive("cov_diag", cov_diag)
        try:
            batch_shape = torch.broadcast_shapes(loc.shape[:-1], cov_factor.shape[:-2], cov_diag.shape[:-1])
        except RuntimeError as error:
            raise ValueError(
                f"the batch shapes of loc {tuple(loc.shape)}, cov_factor {tuple(cov_factor.shape)} and cov_diag "
                f"{tuple(cov_diag.shape)} do not broadcast"
            ) from error
        self.loc = loc.expand(*batch_shape, d)
        self.cov_factor = cov_factor.expand(*batch_shape, *cov_factor.shape[-2:])
        self.cov_diag = cov_diag.expand(*batch_shape, d)
        self._unbroadcasted_cov_factor = cov_factor
        self._unbroadcasted_cov_diag = cov_diag
        Distribution.__init__(self, batch_shape, torch.Size((d,)), validate_args=validate_args)

    def expand(self, batch_shape: _size, _instance: Any = None) -> LowRankMultivariateNormal:
        """Return this distribution with its batch shape expanded; no memory is allocated."""
        new = self._get_checked_instance(LowRankMultivariateNormal, _instance)
        batch_shape = torch.Size(batch_shape)
        new.loc = self.loc.expand(batch_shape + self.event_shape)
        new.cov_diag = self.cov_diag.expand(batch_shape + self.event_shape)
        new.cov_factor = self.cov_factor.expand(batch_shape + self.cov_factor.shape[-2:])
        new._unbroadcasted_cov_factor = self._unbroadcasted_cov_factor
        new._unbroadcasted_cov_diag = self._unbroadcasted_cov_diag
        Distribution.__init__(new, batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _whitened(self) -> tuple[Whitened, Tensor]:
        """The QR factors, and the square root of the diagonal, both of the unbroadcast batch shape."""
        root = widened(self._unbroadcasted_cov_diag).sqrt()
        v = widened(self._unbroadcasted_cov_factor) / root[..., None]
        return Whitened.of(v), root

    def _log_det(self, whitened: Whitened, root: Tensor) -> Tensor:
        return whitened.log_det() + 2 * root.log().sum(-1)

    @lazy_property
    def _capacitance_tril(self) -> Tensor:
        # torch's own code asks for it; from the QR it exists where the Cholesky factorisation of C fails
        upper = self._whitened()[0].r
        sign = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(upper.dtype)
        return (upper * sign[..., None]).mT.to(self.loc.dtype)

    @lazy_property
    def scale_tril(self) -> Tensor:
        """Cholesky factor of the covariance, ``batch_shape + (D, D)``; see `dense_scale_tril`."""
        tril = dense_scale_tril(self._unbroadcasted_cov_factor, self._unbroadcasted_cov_diag)
        return tril.expand(*self.batch_shape, *tril.shape[-2:])

    @lazy_property
    def precision_matrix(self) -> Tensor:
        """Inverse covariance, ``batch_shape + (D, D)``, as a product of its factor: positive definite, nothing subtracted."""
        tril = dense_scale_tril(widened(self._unbroadcasted_cov_factor), widened(self._unbroadcasted_cov_diag))
        identity = torch.eye(tril.shape[-1], dtype=tril.dtype, device=tril.device)
        inverse = torch.linalg.solve_triangular(tril, identity, upper=False)
        precision = (inverse.mT @ inverse).to(self.loc.dtype)
        return precision.expand(*self.batch_shape, *precision.shape[-2:])

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, ``sample_shape + batch_shape``."""
        if self._validate_args:
            self._validate_sample(value)
        whitened, root = self._whitened()
        y = (widened(value) - widened(self.loc)) / root
        # One matrix product for all samples: sample dimensions become columns beside the batch that W has.
        batch_ndim = max(whitened.q1.ndim - 2, root.ndim - 1)
        lead = y.shape[: y.ndim - 1 - batch_ndim]
        columns = y.reshape(-1, *y.shape[len(lead) :]).movedim(0, -1)
        distance = whitened.quadratic(columns).movedim(-1, 0).reshape(y.shape[:-1])
        constant = self.event_shape[0] * math.log(2 * math.pi)
        return (-0.5 * (constant + self._log_det(whitened, root) + distance)).to(self.loc.dtype)

    def entropy(self) -> Tensor:
        """Differential entropy in nats, ``batch_shape``."""
        constant = self.event_shape[0] * (1 + math.log(2 * math.pi))
        entropy = (0.5 * (constant + self._log_det(*self._whitened()))).to(self.loc.dtype)
        return entropy.expand(self.batch_shape)
