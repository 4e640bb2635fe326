"""Categorical distributions, and their KL divergence."""

from __future__ import annotations

from torch.distributions import Categorical as TorchCategorical

from ._base import Checked

__all__ = ["Categorical"]


class Categorical(TorchCategorical, Checked):
    """`torch.distributions.Categorical` with a KL divergence that is accurate for every pair of parameters.

    Args:
        probs: weights of the K categories, not negative, ``(..., K)``; or.
        logits: their logarithms, ``(..., K)``.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is outside of its domain somewhere (says where).
    """
