"""Gamma distributions, and their KL divergence."""

from __future__ import annotations

from torch.distributions import Gamma as TorchGamma

from ._base import Checked

__all__ = ["Gamma"]


class Gamma(TorchGamma, Checked):
    """`torch.distributions.Gamma` with a KL divergence that is accurate for every pair of parameters.

    Args:
        concentration: positive, any shape that broadcasts with ``rate``.
        rate: positive.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is outside of its domain somewhere (says where).
    """
