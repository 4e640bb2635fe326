"""Beta distributions: their KL divergence is that of Dirichlet distributions over two categories (see `dirichlet`)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Beta as TorchBeta

from ..registry import register_hardened
from ._base import Checked
from .dirichlet import dirichlet_kl

__all__ = ["Beta"]


class Beta(TorchBeta, Checked):
    """`torch.distributions.Beta` with a KL divergence that is accurate for every pair of parameters.

    Args:
        concentration1: positive, any shape; the power of x is this less 1.
        concentration0: positive; the power of 1 - x is this less 1.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is zero, negative or NaN somewhere (says where).

    Example:
        >>> import torch, stablekl
        >>> p, q = stablekl.Beta(torch.tensor(1e6), 1e6), stablekl.Beta(torch.tensor(1e6 + 100), 1e6)
        >>> print(f"{torch.distributions.kl_divergence(p, q):.4e}")
        2.4999e-03
    """


@register_hardened(Beta, Beta)
def kl_beta_beta(p: TorchBeta, q: TorchBeta) -> Tensor:
    """KL between beta distributions, elementwise; see the module."""
    return dirichlet_kl(*(torch.stack([x.concentration1, x.concentration0], -1) for x in (p, q)))
