"""Beta distributions: their KL divergence is that of Dirichlet distributions over two categories (see `dirichlet`).

So is that between a Beta and such a Dirichlet, which torch has no rule for: a Beta variable is the first coordinate of
a Dirichlet variable, whose first concentration is ``concentration1``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Beta as TorchBeta
from torch.distributions import Dirichlet as TorchDirichlet

from ..registry import register_hardened
from ._base import Checked
from .dirichlet import Dirichlet, dirichlet_kl

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


def _of_two(p: TorchBeta) -> Tensor:
    return torch.stack([p.concentration1, p.concentration0], -1)


def _checked(dirichlet: TorchDirichlet) -> Tensor:
    count = dirichlet.concentration.shape[-1]
    if count != 2:
        raise ValueError(
            f"the Dirichlet distribution has {count} categories, and a Beta distribution is one over 2: give the one "
            "as many as the other, as Dirichlet(torch.stack([concentration1, concentration0], -1))"
        )
    return dirichlet.concentration


@register_hardened(Beta, Beta)
def kl_beta_beta(p: TorchBeta, q: TorchBeta) -> Tensor:
    """KL between beta distributions, elementwise; see the module."""
    return dirichlet_kl(_of_two(p), _of_two(q))


@register_hardened(Beta, Dirichlet, torch_lacks_it=True)
def kl_beta_dirichlet(p: TorchBeta, q: TorchDirichlet) -> Tensor:
    """KL between a beta distribution and a Dirichlet distribution over two categories; see the module.

    Raises:
        ValueError: q has another number of categories.
    """
    return dirichlet_kl(_of_two(p), _checked(q))


@register_hardened(Dirichlet, Beta, torch_lacks_it=True)
def kl_dirichlet_beta(p: TorchDirichlet, q: TorchBeta) -> Tensor:
    """KL between a Dirichlet distribution over two categories and a beta distribution; see the module.

    Raises:
        ValueError: p has another number of categories.
    """
    return dirichlet_kl(_checked(p), _of_two(q))
