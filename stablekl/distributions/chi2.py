"""Chi2 distributions, and their KL divergence."""

from __future__ import annotations

from torch.distributions import Chi2 as TorchChi2

from .gamma import Gamma

__all__ = ["Chi2"]


class Chi2(TorchChi2, Gamma):
    """`torch.distributions.Chi2` with a KL divergence that is accurate for every pair of parameters.

    Args:
        df: degrees of freedom, positive.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is outside of its domain somewhere (says where).
    """
