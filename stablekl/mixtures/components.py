"""The parameters of a Gaussian mixture as the density and the integration engines read them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributions._base import broadcast_shape, common_dtype
from ..distributions._gaussian import Gaussian, lower_factor

__all__ = ["Components", "chosen_components", "gaussian_components", "prepared"]


class Components(NamedTuple):
    """K Gaussian components with their weights, batched.

    Attributes:
        log_weights: normalised log-weights, shape ``batch_shape + (K,)``; -inf for a weight of zero.
        loc: means, shape ``batch_shape + (K, D)``.
        scale: standard deviations, shape ``batch_shape + (K, D)``, for diagonal components; else lower
            triangular Cholesky factors with a positive diagonal, shape ``batch_shape + (K, D, D)``.
    """

    log_weights: Tensor
    loc: Tensor
    scale: Tensor

    @property
    def is_diagonal(self) -> bool:
        """Whether ``scale`` holds standard deviations rather than Cholesky factors."""
        return self.scale.ndim == self.loc.ndim

    def full(self) -> Components:
        """With Cholesky factors, whichever they have."""
        return self._replace(scale=torch.diag_embed(self.scale)) if self.is_diagonal else self

    def to(self, dtype: torch.dtype) -> Components:
        """The same in another dtype."""
        return Components(self.log_weights.to(dtype), self.loc.to(dtype), self.scale.to(dtype))

    def expand(self, batch_shape: torch.Size) -> Components:
        """The same with the batch shape expanded; no memory is allocated."""
        n = self.log_weights.ndim - 1
        return Components(*(x.expand(batch_shape + x.shape[n:]) for x in self))

    def flattened(self) -> Components:
        """The same with one batch dimension."""
        n = self.log_weights.ndim - 1
        rows = math.prod(self.log_weights.shape[:-1])
        return Components(*(x.reshape(rows, *x.shape[n:]) for x in self))


def gaussian_components(log_weights: Tensor, gaussian: Gaussian) -> Components:
    """Weights ``batch_shape + (K,)`` and the Gaussians they weigh, of batch shape ``batch_shape + (K,)``."""
    scale = gaussian.scale if gaussian.kind == "scale_diag" else lower_factor(gaussian)
    events = 1 if gaussian.kind == "scale_diag" else 2
    batch = broadcast_shape(log_weights.shape, gaussian.loc.shape[:-1], scale.shape[:-events])
    return Components(
        log_weights.expand(batch),
        gaussian.loc.expand(batch + gaussian.loc.shape[-1:]),
        scale.expand(batch + scale.shape[-events:]),
    )


def chosen_components(p: Components, index: Tensor) -> Components:
    """Sub-mixtures, of the components that ``index`` names, with their weights as they are.

    Args:
        p: K components.
        index: ``batch_shape + (..., n)``, batch shape as that of p.

    Returns:
        n components of batch shape ``batch_shape + (...)``.
    """
    batch = p.log_weights.ndim - 1
    flat = index.flatten(batch)
    events = p.scale.shape[batch + 1 :]
    loc_index = flat.unsqueeze(-1).expand(*flat.shape, p.loc.shape[-1])
    scale_index = flat.reshape(*flat.shape, *(1,) * len(events)).expand(*flat.shape, *events)
    return Components(
        p.log_weights.gather(-1, flat).reshape(index.shape),
        p.loc.gather(batch, loc_index).reshape(*index.shape, p.loc.shape[-1]),
        p.scale.gather(batch, scale_index).reshape(*index.shape, *events),
    )


def prepared(p: Components, count: int, integral: str) -> tuple[Components, torch.dtype]:
    """Components for an integral that takes so many: float64, of one batch shape, diagonal in one dimension.

    Args:
        p: the components.
        count: how many there must be.
        integral: what it is called.

    Returns:
        These and the dtype that the result is to be in.

    Raises:
        ValueError: there are more or fewer.
    """
    log_weights, loc, scale = p
    if log_weights.shape[-1] != count or loc.shape[-2] != count:
        raise ValueError(
            f"{integral} is for {('one', 'two', 'three')[count - 1]} components, got log_weights of shape "
            f"{tuple(log_weights.shape)} and loc of shape {tuple(loc.shape)}; for any other number of "
            "components use kl_estimate with method='auto'"
        )
    dtype = common_dtype(log_weights, loc, scale)
    if loc.shape[-1] == 1 and not p.is_diagonal:
        scale = scale.squeeze(-1)
    events = 1 if scale.ndim == loc.ndim else 2
    batch = broadcast_shape(log_weights.shape[:-1], loc.shape[:-2], scale.shape[: -1 - events])
    widened = zip((log_weights, loc, scale), (1, 2, 1 + events), strict=True)
    return Components(*(x.to(torch.float64).expand(batch + x.shape[x.ndim - e :]) for x, e in widened)), dtype
