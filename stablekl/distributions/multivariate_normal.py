"""Multivariate normals: full (covariance, precision or Cholesky factor, as torch) and diagonal without a matrix.

The KL rules are in `_mvn_kl`; this file holds the class. What the caller gave is remembered, because each
parameter has a rule of its own that loses no digits to a conversion.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Wishart, constraints
from torch.distributions import MultivariateNormal as TorchMultivariateNormal
from torch.distributions.utils import lazy_property
from torch.types import _size

from .._autograd import is_plain
from ..linalg import safe_cholesky
from ..parameterizations import check_positive
from ._base import Movable, widened

__all__ = ["MultivariateNormal", "given_parameter"]

_MATRICES = ("covariance_matrix", "precision_matrix", "scale_tril")

# Largest asymmetry that counts as rounding, relative to sqrt(a_ii a_jj): torch's own relative tolerance, or a few
# roundings of a half-precision dtype.
_ASYMMETRY, _ASYMMETRY_EPS = 1e-5, 4


def given_parameter(distribution: TorchMultivariateNormal | Wishart) -> str:
    """The name of the matrix a multivariate normal or a Wishart, torch's or ours, was built from.

    The constructor stores it before any of the others can be computed on demand, and a dict keeps its order.
    """
    stored = [name for name in (*_MATRICES, "scale_diag") if name in distribution.__dict__]
    if len(stored) == 1:  # always so where torch.compile traces, which before torch 2.12 can't run through a __dict__
        return stored[0]
    return next(name for name in distribution.__dict__ if name in stored)


class MultivariateNormal(Movable, TorchMultivariateNormal):
    r"""`torch.distributions.MultivariateNormal`, with ``scale_diag`` and a KL divergence that is never negative.

    Args:
        loc: mean, shape ``batch_shape + (D,)``.
        covariance_matrix: positive-definite covariance, ``batch_shape + (D, D)``.
        precision_matrix: positive-definite inverse covariance, ``batch_shape + (D, D)``.
        scale_tril: lower-triangular factor with positive diagonal, ``batch_shape + (D, D)``.
        validate_args: as in torch; on by default.
        scale_diag: standard deviations of independent coordinates, ``batch_shape + (D,)``. No D x D matrix is built by
            log_prob, sampling, entropy, or KL against another diagonal.

    Raises:
        ValueError: not exactly one of the four was given; shapes do not fit; a parameter is not finite; a standard
            deviation is not positive (says where, and how to parameterise); a matrix is not symmetric or triangular.
        NotPositiveDefiniteError: a covariance or precision is not positive definite (says which matrix of the batch,
            and its smallest eigenvalue).

    The covariance is factorised in float64 (float32 on MPS) and the factor rounded once.

    Example:
        >>> import torch, stablekl
        >>> p = stablekl.MultivariateNormal(torch.zeros(3), scale_diag=torch.ones(3))
        >>> q = stablekl.MultivariateNormal(torch.zeros(3), covariance_matrix=2 * torch.eye(3))
        >>> print(f"{torch.distributions.kl_divergence(p, q):.6f}")
        0.289721
    """

    arg_constraints = {  # noqa: RUF012
        **TorchMultivariateNormal.arg_constraints,
        "scale_diag": constraints.independent(constraints.positive, 1),
    }

    def __init__(
        self,
        loc: Tensor,
        covariance_matrix: Tensor | None = None,
        precision_matrix: Tensor | None = None,
        scale_tril: Tensor | None = None,
        validate_args: bool | None = None,
        *,
        scale_diag: Tensor | None = None,
    ) -> None:
        """Remember what was given, with errors that say what to do about it."""
        candidates = {
            "covariance_matrix": covariance_matrix,
            "precision_matrix": precision_matrix,
            "scale_tril": scale_tril,
            "scale_diag": scale_diag,
        }
        given = {name: value for name, value in candidates.items() if value is not None}
        if len(given) != 1:
            raise ValueError(
                "give exactly one of covariance_matrix, precision_matrix, scale_tril or scale_diag; got "
                f"{' and '.join(given) or 'none'}"
            )
        if loc.dim() < 1:
            raise ValueError(f"loc must have shape batch_shape + (D,), got a scalar {loc}: use Normal")
        [(name, value)] = given.items()
        event_ndims = 1 if name == "scale_diag" else 2
        batch_shape = _checked_batch_shape(name, value, loc, event_ndims)
        validate = Distribution._validate_args if validate_args is None else validate_args
        if name == "scale_diag":
            if validate:
                check_positive(name, value)
                _check_finite(name, value)
        else:
            value, self._unbroadcasted_scale_tril = _factorised(name, value, validate)
        setattr(self, name, value.expand(batch_shape + value.shape[-event_ndims:]))
        self.loc = loc.expand(batch_shape + loc.shape[-1:])
        # Matrices were checked above, in more precision and with a better message than torch's constraint has.
        Distribution.__init__(self, batch_shape, self.loc.shape[-1:], validate_args=False)
        self._validate_args = validate
        if validate:
            _check_finite("loc", loc)

    def expand(self, batch_shape: _size, _instance: Any = None) -> MultivariateNormal:
        """Return this distribution with its batch shape expanded; no memory is allocated."""
        new: MultivariateNormal = self._get_checked_instance(MultivariateNormal, _instance)  # type: ignore[no-untyped-call]
        batch_shape = torch.Size(batch_shape)
        for name, value in self.__dict__.items():
            if name in (*_MATRICES, "scale_diag", "loc"):
                events = 1 if name in ("scale_diag", "loc") else 2
                new.__dict__[name] = value.expand(batch_shape + value.shape[-events:])
            elif name == "_unbroadcasted_scale_tril":
                new.__dict__[name] = value
        Distribution.__init__(new, batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def is_diagonal(self) -> bool:
        """Whether the coordinates are independent by construction: built from ``scale_diag``."""
        return given_parameter(self) == "scale_diag"

    @lazy_property
    def scale_diag(self) -> Tensor:
        """Standard deviations, ``batch_shape + (D,)``, of a diagonal distribution."""
        raise AttributeError(
            "scale_diag exists only where it was given; the standard deviations of a full Gaussian are .stddev"
        )

    @lazy_property
    def _unbroadcasted_scale_tril(self) -> Tensor:
        # Only what needs a matrix by its nature (.scale_tril, .covariance_matrix, foreign code) comes here.
        return torch.diag_embed(self.scale_diag)

    @property
    def variance(self) -> Tensor:
        """Variances of the coordinates, ``batch_shape + (D,)``."""
        return self.scale_diag.square() if self.is_diagonal else super().variance

    @property
    def stddev(self) -> Tensor:
        """Standard deviations of the coordinates, ``batch_shape + (D,)``."""
        # not the root of the variance, which underflows where scale_diag does not
        return self.scale_diag if self.is_diagonal else super().stddev

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        """Reparameterised samples, ``sample_shape + batch_shape + (D,)``."""
        if not self.is_diagonal:
            return super().rsample(sample_shape)
        shape = self._extended_shape(sample_shape)
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + self.scale_diag * noise

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, ``sample_shape + batch_shape``."""
        if not self.is_diagonal:
            full: Tensor = super().log_prob(value)  # type: ignore[no-untyped-call]
            return full
        if self._validate_args:
            self._validate_sample(value)
        z = (value - self.loc) / self.scale_diag
        half_log_2pi = 0.5 * math.log(2 * math.pi)
        return -(0.5 * z * z + self.scale_diag.log() + half_log_2pi).sum(-1)

    def entropy(self) -> Tensor:
        """Differential entropy in nats, ``batch_shape``."""
        if not self.is_diagonal:
            full: Tensor = super().entropy()  # type: ignore[no-untyped-call]
            return full
        return (self.scale_diag.log() + 0.5 * (1 + math.log(2 * math.pi))).sum(-1)


def _checked_batch_shape(name: str, value: Tensor, loc: Tensor, event_ndims: int) -> torch.Size:
    d = loc.shape[-1]
    expected = (d,) * event_ndims
    if value.dim() < event_ndims or tuple(value.shape[-event_ndims:]) != expected:
        raise ValueError(
            f"{name} must have shape batch_shape + {expected} to go with loc of shape {tuple(loc.shape)}, got "
            f"{tuple(value.shape)}"
        )
    try:
        return torch.Size(torch.broadcast_shapes(value.shape[:-event_ndims], loc.shape[:-1]))
    except RuntimeError as error:
        raise ValueError(
            f"the batch shapes of {name} {tuple(value.shape)} and loc {tuple(loc.shape)} do not broadcast"
        ) from error


def _check_finite(name: str, value: Tensor) -> None:
    value = value.detach()
    if is_plain((value,)) and not bool(value.isfinite().all()):
        index = (~value.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"{name} has the value {float(value[tuple(index)])} at {index}: it must be finite. Look for the first "
            "non-finite tensor upstream."
        )


def _factorised(name: str, value: Tensor, validate: bool) -> tuple[Tensor, Tensor]:
    """The parameter, exactly symmetric where it should be, and the Cholesky factor of the covariance."""
    if name == "scale_tril":
        if validate:
            check_positive("scale_tril (its diagonal)", value.diagonal(dim1=-2, dim2=-1))
            _check_finite(name, value)
            _check_lower(value)
        return value, value
    if validate:
        _check_symmetric(name, value)
    value = 0.5 * value + 0.5 * value.mT
    wide = widened(value)
    if name == "covariance_matrix":
        factor = safe_cholesky(wide)[0] if validate else torch.linalg.cholesky(wide)
        return value, factor.to(value.dtype)
    # P = U U' with U upper triangular (Cholesky from the last row up), so U^-T is the lower-triangular factor.
    flipped = wide.flip((-2, -1))
    upper = (safe_cholesky(flipped)[0] if validate else torch.linalg.cholesky(flipped)).flip((-2, -1))
    identity = torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)
    return value, torch.linalg.solve_triangular(upper.mT, identity, upper=False).to(value.dtype)


def _check_lower(value: Tensor) -> None:
    if is_plain((value.detach(),)) and not bool((value == value.tril()).all()):
        index = (value != value.tril()).nonzero()[0].tolist()
        raise ValueError(
            f"scale_tril is not lower triangular: entry {index} is {float(value[tuple(index)])}. If this is a "
            "covariance, pass covariance_matrix=; if it comes from a network, use "
            "stablekl.scale_tril_from_unconstrained."
        )


def _check_symmetric(name: str, value: Tensor) -> None:
    value = value.detach()
    if not is_plain((value,)):
        return
    root = value.diagonal(dim1=-2, dim2=-1).abs().sqrt()
    tolerance = max(_ASYMMETRY, _ASYMMETRY_EPS * torch.finfo(value.dtype).eps) if value.is_floating_point() else 0
    asymmetric = (value - value.mT).abs() > tolerance * root.unsqueeze(-1) * root.unsqueeze(-2)
    if bool(asymmetric.any()):
        index = asymmetric.nonzero()[0].tolist()
        a, b = float(value[tuple(index)]), float(value.mT[tuple(index)])
        raise ValueError(
            f"{name} is not symmetric: entry {index} is {a!r} but its mirror image is {b!r}, more than rounding "
            "explains. If this is a Cholesky factor, pass scale_tril=; else symmetrise it with 0.5 * (A + A.mT)."
        )
