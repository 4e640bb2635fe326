"""LogNormal distributions, and their KL divergence."""

from __future__ import annotations

from torch.distributions import LogNormal as TorchLogNormal

from ._base import Checked

__all__ = ["LogNormal"]


class LogNormal(TorchLogNormal, Checked):
    """`torch.distributions.LogNormal` with a KL divergence that is accurate for every pair of parameters.

    Args:
        loc: mean of the logarithm, any shape that broadcasts with ``scale``.
        scale: standard deviation of the logarithm, positive.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is outside of its domain somewhere (says where).
    """
