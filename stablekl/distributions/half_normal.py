"""Half-normal distributions; their KL divergence is that of the normal distributions of mean 0 (see `normal`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import HalfNormal as TorchHalfNormal

from ..registry import register_hardened
from ._base import Checked
from ._density import checked, evaluated, normal_log_density
from .normal import normal_kl

__all__ = ["HalfNormal"]


class HalfNormal(TorchHalfNormal, Checked):
    """`torch.distributions.HalfNormal` with a KL divergence that is accurate for every pair of parameters.

    Args:
        scale: positive, that of the Normal whose absolute value this is.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is outside of its domain somewhere (says where).
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of the density, by z^2 rather than a square of the scale, which underflows."""
        return evaluated(_log_density, checked(self, value), self.scale)

    def cdf(self, value: Tensor) -> Tensor:
        """P(X <= value), to its relative accuracy for small values, where torch's 2 cdf - 1 cancels."""
        return evaluated(lambda x, s: torch.erf(x / s * math.sqrt(0.5)), checked(self, value), self.scale)


def _log_density(x: Tensor, s: Tensor) -> Tensor:
    value = math.log(2) + normal_log_density(x, torch.zeros_like(x), s)
    return torch.where(x >= 0, value, -torch.inf)


@register_hardened(HalfNormal, HalfNormal)
def kl_half_normal_half_normal(p: TorchHalfNormal, q: TorchHalfNormal) -> Tensor:
    """KL between half-normal distributions, elementwise: the sign of a symmetric variable is the same for both."""
    # two tensors of zeros: torch.compile takes no tensor twice into a function of ours
    zero, other = torch.zeros_like(p.scale), torch.zeros_like(q.scale)
    return normal_kl(zero, p.scale, other, q.scale)
