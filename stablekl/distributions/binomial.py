"""Binomial distributions, and their KL divergence."""

from __future__ import annotations

from torch.distributions import Binomial as TorchBinomial

from ._base import Checked

__all__ = ["Binomial"]


class Binomial(TorchBinomial, Checked):
    """`torch.distributions.Binomial` with a KL divergence that is accurate for every pair of parameters.

    Args:
        total_count: number of trials, not negative.
        probs: between 0 and 1; or.
        logits: real.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is outside of its domain somewhere (says where).
    """
