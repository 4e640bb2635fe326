"""HalfNormal distributions, and their KL divergence."""

from __future__ import annotations

from torch.distributions import HalfNormal as TorchHalfNormal

from ._base import Checked

__all__ = ["HalfNormal"]


class HalfNormal(TorchHalfNormal, Checked):
    """`torch.distributions.HalfNormal` with a KL divergence that is accurate for every pair of parameters.

    Args:
        scale: positive, that of the Normal whose absolute value this is.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is outside of its domain somewhere (says where).
    """
