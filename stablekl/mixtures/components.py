"""The parameters of a Gaussian mixture as the density and the integration engines read them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..distributions._gaussian import Gaussian, lower_factor

__all__ = ["Components", "broadcast_shape", "chosen_components", "gaussian_components"]


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

    def to(self, dtype: torch.dtype) -> Components:
        """The same in another dtype."""
        return Components(self.log_weights.to(dtype), self.loc.to(dtype), self.scale.to(dtype))

    def expand(self, batch_shape: torch.Size) -> Components:
        """The same with the batch shape expanded; no memory is allocated."""
        n = self.log_weights.ndim - 1
        return Components(*(x.expand(batch_shape + x.shape[n:]) for x in self))


def broadcast_shape(*shapes: torch.Size) -> torch.Size:
    """`torch.broadcast_shapes`, which takes 0.1 ms, without it where the shapes are the same."""
    if all(s == shapes[0] for s in shapes):
        return shapes[0]
    result: torch.Size = torch.broadcast_shapes(*shapes)
    return result


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
