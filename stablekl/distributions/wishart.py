"""Wishart distributions, and their KL divergence."""

from __future__ import annotations

from torch.distributions import Wishart as TorchWishart

from ._base import Checked

__all__ = ["Wishart"]


class Wishart(TorchWishart, Checked):
    """`torch.distributions.Wishart` with a KL divergence that is accurate for every pair of parameters.

    Args:
        df: degrees of freedom, above D - 1.
        covariance_matrix: ``(..., D, D)``; or.
        precision_matrix: ``(..., D, D)``; or.
        scale_tril: ``(..., D, D)``.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is outside of its domain somewhere (says where).
    """
