"""ContinuousBernoulli distributions, and their KL divergence."""

from __future__ import annotations

from torch.distributions import ContinuousBernoulli as TorchContinuousBernoulli

from ._base import Checked

__all__ = ["ContinuousBernoulli"]


class ContinuousBernoulli(TorchContinuousBernoulli, Checked):
    """`torch.distributions.ContinuousBernoulli` with a KL divergence that is accurate for every pair of parameters.

    Args:
        probs: between 0 and 1; or.
        logits: real.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is outside of its domain somewhere (says where).
    """
