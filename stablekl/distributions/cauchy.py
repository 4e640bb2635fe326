"""Cauchy distributions, and their KL divergence."""

from __future__ import annotations

from torch.distributions import Cauchy as TorchCauchy

from ._base import Checked

__all__ = ["Cauchy"]


class Cauchy(TorchCauchy, Checked):
    """`torch.distributions.Cauchy` with a KL divergence that is accurate for every pair of parameters.

    Args:
        loc: median, any shape that broadcasts with ``scale``.
        scale: positive; half of the mass is within it of the median.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is outside of its domain somewhere (says where).
    """
