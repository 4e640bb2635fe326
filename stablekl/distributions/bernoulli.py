"""Bernoulli distributions, and their KL divergence."""

from __future__ import annotations

from torch.distributions import Bernoulli as TorchBernoulli

from ._base import Checked

__all__ = ["Bernoulli"]


class Bernoulli(TorchBernoulli, Checked):
    """`torch.distributions.Bernoulli` with a KL divergence that is accurate for every pair of parameters.

    Args:
        probs: between 0 and 1; or.
        logits: real, or infinite for a certain outcome.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is outside of its domain somewhere (says where).
    """
