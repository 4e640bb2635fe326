"""Logistic-normal distributions; their KL divergence is that of the normal distributions before the transform.

Stick breaking is a bijection, so `transformed` has the rule; this class is torch's with errors that help.
"""

from __future__ import annotations

from torch.distributions import LogisticNormal as TorchLogisticNormal

from ..registry import register_hardened
from ._base import Checked
from .transformed import kl_transformed_transformed

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


register_hardened(LogisticNormal, LogisticNormal)(kl_transformed_transformed)
