"""Gumbel distributions, and their KL divergence."""

from __future__ import annotations

from torch.distributions import Gumbel as TorchGumbel

from ._base import Checked

__all__ = ["Gumbel"]


class Gumbel(TorchGumbel, Checked):
    """`torch.distributions.Gumbel` with a KL divergence that is accurate for every pair of parameters.

    Args:
        loc: mode, any shape that broadcasts with ``scale``.
        scale: positive.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is outside of its domain somewhere (says where).
    """
