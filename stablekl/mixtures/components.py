"""The parameters of a Gaussian mixture as the integration engines read them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Components"]


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
