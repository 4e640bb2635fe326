"""A Gaussian mixture with parameters that an optimiser can move: for losses that EM has no step for."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ..mixtures.gaussian_mixture import GaussianMixture
from ..parameterizations import (
    inverse_softplus_scale,
    scale_tril_from_unconstrained,
    softplus_scale,
    unconstrained_from_scale_tril,
)
from ._model import CovarianceType, components_of, in_units

__all__ = ["GaussianMixtureModel"]


class GaussianMixtureModel(nn.Module):
    r"""A module whose parameters are those of a `GaussianMixture`, unconstrained; calling it makes the mixture.

    Parameters are in units of the start's standard deviation about its mean, column by column, so that a step of an
    optimiser is the same whatever the units of the data: ``logits``, ``loc``, and ``unconstrained``, from which
    `scale_tril_from_unconstrained` or `softplus_scale` makes factors.

    Args:
        start: the mixture to begin at, of batch shape (): ``gaussian_mixture(x, K, max_iter=0).mixture`` for one that
            EM has not touched. Its dtype is that of the parameters.
        covariance_type: "full", "tied", "diag" or "spherical"; covariances of the start are reduced to that.
        floor: least standard deviation, or diagonal entry of a factor, in units of the start's.

    Raises:
        ValueError: a batch of mixtures, a scale of the start that is not above the floor, or a type of another name.

    Example:
        >>> import torch
        >>> from stablekl.data import load_iris
        >>> from stablekl.fit import GaussianMixtureModel, gaussian_mixture
        >>> x, _ = load_iris()
        >>> model = GaussianMixtureModel(gaussian_mixture(x, 2, max_iter=0).mixture)
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        >>> for _ in range(300):
        ...     optimizer.zero_grad()
        ...     loss = -model().log_prob(x).mean()
        ...     loss.backward()
        ...     optimizer.step()
        >>> print(f"{-150 * loss.item():.1f}, EM {gaussian_mixture(x, 2, tol=1e-8).log_likelihood:.1f}")
        -214.4, EM -214.4
    """

    centre: Tensor
    unit: Tensor

    def __init__(self, start: Distribution, covariance_type: CovarianceType = "full", floor: float = 0.0) -> None:
        """Read the start's parameters."""
        super().__init__()
        if covariance_type not in get_args(CovarianceType):
            raise ValueError(f"covariance_type must be one of {get_args(CovarianceType)}, got {covariance_type!r}")
        self.covariance_type, self.floor = covariance_type, floor
        with torch.no_grad():
            components = components_of(start)  # in float64: squares of scales may leave the range of float32
            log_weights, loc, scale = components
            share = log_weights.exp().unsqueeze(-1)
            centre = (share * loc).sum(0)
            variance = scale.square() if components.is_diagonal else scale.square().sum(-1)
            unit = (share * (variance + (loc - centre).square())).sum(0).sqrt()
            if covariance_type == "spherical":
                unit = unit.square().mean().sqrt().expand_as(unit).clone()  # load_state_dict writes there
            model = in_units(covariance_type, components, centre, unit)
            inverse = unconstrained_from_scale_tril if model.triangular else inverse_softplus_scale
            raw = inverse(model.scale, floor)
        dtype = start.mean.dtype
        self.register_buffer("centre", centre.to(dtype))
        self.register_buffer("unit", unit.to(dtype))
        self.logits = nn.Parameter(model.log_weights.to(dtype))
        self.loc = nn.Parameter(model.loc.to(dtype))
        self.unconstrained = nn.Parameter(raw.to(dtype))

    def forward(self) -> GaussianMixture:
        """The mixture, differentiable in the module's parameters."""
        loc = self.centre + self.unit * self.loc
        if self.covariance_type in ("full", "tied"):
            tril = scale_tril_from_unconstrained(self.unconstrained, loc.shape[-1], self.floor)
            tril = (self.unit.unsqueeze(-1) * tril).expand(*loc.shape, loc.shape[-1])
            return GaussianMixture(self.logits, None, loc, scale_tril=tril)
        scale = (self.unit * softplus_scale(self.unconstrained, self.floor)).expand(loc.shape)
        return GaussianMixture(self.logits, None, loc, scale_diag=scale)
