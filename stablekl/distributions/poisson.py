"""Poisson distributions, and their KL divergence."""

from __future__ import annotations

from torch.distributions import Poisson as TorchPoisson

from ._base import Checked

__all__ = ["Poisson"]


class Poisson(TorchPoisson, Checked):
    """`torch.distributions.Poisson` with a KL divergence that is accurate for every pair of parameters.

    Args:
        rate: not negative; 0 is the point mass at 0.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is outside of its domain somewhere (says where).
    """
