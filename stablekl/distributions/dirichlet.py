"""Dirichlet distributions, and their KL divergence."""

from __future__ import annotations

from torch.distributions import Dirichlet as TorchDirichlet

from ._base import Checked

__all__ = ["Dirichlet"]


class Dirichlet(TorchDirichlet, Checked):
    """`torch.distributions.Dirichlet` with a KL divergence that is accurate for every pair of parameters.

    Args:
        concentration: positive, ``(..., K)``.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is outside of its domain somewhere (says where).
    """
