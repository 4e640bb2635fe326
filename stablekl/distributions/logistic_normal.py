"""LogisticNormal distributions, and their KL divergence."""

from __future__ import annotations

from torch.distributions import LogisticNormal as TorchLogisticNormal

from ._base import Checked

__all__ = ["LogisticNormal"]


class LogisticNormal(TorchLogisticNormal, Checked):
    """`torch.distributions.LogisticNormal` with a KL divergence that is accurate for every pair of parameters.

    Args:
        loc: mean before the transform, ``(..., K - 1)``.
        scale: standard deviation before the transform, positive.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is outside of its domain somewhere (says where).
    """
