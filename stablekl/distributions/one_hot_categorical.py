"""OneHotCategorical distributions, and their KL divergence."""

from __future__ import annotations

from torch.distributions import OneHotCategorical as TorchOneHotCategorical

from ._base import Checked

__all__ = ["OneHotCategorical"]


class OneHotCategorical(TorchOneHotCategorical, Checked):
    """`torch.distributions.OneHotCategorical` with a KL divergence that is accurate for every pair of parameters.

    Args:
        probs: weights of the K categories, not negative, ``(..., K)``; or.
        logits: their logarithms, ``(..., K)``.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is outside of its domain somewhere (says where).
    """
