"""Uniform distributions, and their KL divergence."""

from __future__ import annotations

from torch.distributions import Uniform as TorchUniform

from ._base import Checked

__all__ = ["Uniform"]


class Uniform(TorchUniform, Checked):
    """`torch.distributions.Uniform` with a KL divergence that is accurate for every pair of parameters.

    Args:
        low: lower end of the interval.
        high: upper end, above ``low``.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is outside of its domain somewhere (says where).
    """
