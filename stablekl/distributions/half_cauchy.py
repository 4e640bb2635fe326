"""HalfCauchy distributions, and their KL divergence."""

from __future__ import annotations

from torch.distributions import HalfCauchy as TorchHalfCauchy

from ._base import Checked

__all__ = ["HalfCauchy"]


class HalfCauchy(TorchHalfCauchy, Checked):
    """`torch.distributions.HalfCauchy` with a KL divergence that is accurate for every pair of parameters.

    Args:
        scale: positive, that of the Cauchy whose absolute value this is.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is outside of its domain somewhere (says where).
    """
