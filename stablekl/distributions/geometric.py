"""Geometric distributions, and their KL divergence."""

from __future__ import annotations

from torch.distributions import Geometric as TorchGeometric

from ._base import Checked

__all__ = ["Geometric"]


class Geometric(TorchGeometric, Checked):
    """`torch.distributions.Geometric` with a KL divergence that is accurate for every pair of parameters.

    Args:
        probs: of success, above 0 and up to 1; or.
        logits: real.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is outside of its domain somewhere (says where).
    """
