"""Pareto distributions, and their KL divergence."""

from __future__ import annotations

from torch.distributions import Pareto as TorchPareto

from ._base import Checked

__all__ = ["Pareto"]


class Pareto(TorchPareto, Checked):
    """`torch.distributions.Pareto` with a KL divergence that is accurate for every pair of parameters.

    Args:
        scale: smallest value, positive.
        alpha: positive.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is outside of its domain somewhere (says where).
    """
