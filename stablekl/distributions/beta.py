"""Beta distributions, and their KL divergence."""

from __future__ import annotations

from torch.distributions import Beta as TorchBeta

from ._base import Checked

__all__ = ["Beta"]


class Beta(TorchBeta, Checked):
    """`torch.distributions.Beta` with a KL divergence that is accurate for every pair of parameters.

    Args:
        concentration1: positive, any shape; the power of x is this less 1.
        concentration0: positive; the power of 1 - x is this less 1.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is outside of its domain somewhere (says where).
    """
