"""The mixture that a fit works on, in standard units."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from ..mixtures.components import Components, gaussian_components
from ..mixtures.reading import as_mixture
from ..mixtures.square_root import lower_square_root

__all__ = ["CovarianceType", "Model", "components_of", "in_units", "scale_of"]

CovarianceType = Literal["full", "tied", "diag", "spherical"]


class Model(NamedTuple):
    """A mixture in standard units.

    Attributes:
        kind: "full", "tied", "diag" or "spherical".
        log_weights: normalised, ``(K,)``.
        loc: ``(K, D)``.
        scale: Cholesky factors ``(K, D, D)``, or one for all, ``(1, D, D)``; or standard deviations, ``(K, D)``, or
            one for all columns, ``(K, 1)``.
    """

    kind: CovarianceType
    log_weights: Tensor
    loc: Tensor
    scale: Tensor

    @property
    def triangular(self) -> bool:
        """Whether scales are Cholesky factors."""
        return self.scale.ndim == 3

    def log_volume(self) -> Tensor:
        """Logarithms of the determinants of the factors, ``(K,)`` or ``(1,)``."""
        if self.triangular:
            return self.scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return self.scale.log().sum(-1) * (self.loc.shape[-1] / self.scale.shape[-1])

    def base(self) -> Tensor:
        """What log-densities of weighted components are at their means, ``(K, 1)``."""
        d = self.loc.shape[-1]
        return (self.log_weights - self.log_volume() - 0.5 * d * math.log(2 * math.pi)).unsqueeze(-1)

    def covariance(self) -> Tensor:
        """``(K, D, D)``, or ``(1, D, D)`` where tied."""
        return self.scale @ self.scale.mT if self.triangular else torch.diag_embed(self.variance())

    def variance(self) -> Tensor:
        """Of the columns, ``(K, D)``, or ``(1, D)`` where tied."""
        squares = self.scale.square().sum(-1) if self.triangular else self.scale.square()
        return squares.expand(-1, self.loc.shape[-1])

    def pulls(self, pooled: Tensor) -> Tensor:
        """The covariance of all samples, of Cholesky factor ``pooled``, in the coordinates of each component.

        ``(K or 1, D, D)``, ``(K, D)`` or ``(K, 1)``: in standard units every column has variance 1.
        """
        if not self.triangular:
            return self.scale.square().reciprocal()
        half: Tensor = torch.linalg.solve_triangular(self.scale, pooled.expand(self.scale.shape), upper=False)
        return half @ half.mT

    def penalty(self, pooled: Tensor) -> float:
        """The sum of tr(S_0 S^-1) + log det S over the covariances."""
        pulls = self.pulls(pooled)
        trace = pulls.diagonal(dim1=-2, dim2=-1) if self.triangular else pulls.expand(self.loc.shape)
        return float((trace.sum(-1) + 2 * self.log_volume()).sum())


def scale_of(kind: CovarianceType, rows: Tensor) -> Tensor:
    """The scale of a `Model` of this kind whose covariances are rows' rows, of ``(K, R, D)``, or ``(1, R, D)`` if tied.

    From rows, not from their products, which have no digit of a direction that is 1e-8 as wide as another.
    """
    if kind in ("full", "tied"):
        return lower_square_root(rows)
    variance = rows.square().sum(-2)
    return (variance if kind == "diag" else variance.mean(-1, keepdim=True)).sqrt()


def components_of(given: Distribution, dim: int | None = None) -> Components:
    """A mixture of Gaussians that was given to start from, in float64.

    Raises:
        ValueError: a batch of mixtures, or one of another dimension.
        NotImplementedError: components that are not Gaussian.
    """
    mixture = as_mixture(given, "a fit")
    found = gaussian_components(mixture.log_weights.detach(), mixture.gaussian)
    if found.loc.ndim != 2 or found.loc.shape[-1] != (dim or found.loc.shape[-1]):
        expected = "(D,)" if dim is None else f"({dim},)"
        raise ValueError(
            f"a mixture to start from must have batch shape () and event shape {expected}, got batch shape "
            f"{tuple(given.batch_shape)} and event shape {tuple(given.event_shape)}"
        )
    return Components(*(x.detach().to(torch.float64) for x in found))


def in_units(kind: CovarianceType, given: Components, centre: Tensor, unit: Tensor) -> Model:
    """A mixture that was given, in standard units, its covariances reduced to what the kind has.

    Args:
        kind: "full", "tied", "diag" or "spherical".
        given: the mixture.
        centre: the origin of standard units, ``(D,)``.
        unit: by column, ``(D,)``.
    """
    log_weights, loc, scale = given
    loc = (loc - centre) / unit
    scale = scale / (unit if given.is_diagonal else unit.unsqueeze(-1))
    if kind == ("diag" if given.is_diagonal else "full"):
        return Model(kind, log_weights, loc, scale)
    rows = torch.diag_embed(scale) if given.is_diagonal else scale.mT
    if kind == "tied":
        rows = (log_weights.exp().sqrt().reshape(-1, 1, 1) * rows).reshape(1, -1, rows.shape[-1])
    return Model(kind, log_weights, loc, scale_of(kind, rows))
