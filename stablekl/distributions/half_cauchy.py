"""Half-Cauchy distributions; their KL divergence is that of the Cauchy distributions of median 0 (see `cauchy`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import HalfCauchy as TorchHalfCauchy

from ..registry import register_hardened
from ._base import Checked
from ._density import cauchy_log_density, checked, evaluated
from .cauchy import cauchy_kl

__all__ = ["HalfCauchy"]


class HalfCauchy(TorchHalfCauchy, Checked):
    """`torch.distributions.HalfCauchy` with a KL divergence that is accurate for every pair of parameters.

    Args:
        scale: positive, that of the Cauchy whose absolute value this is.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is outside of its domain somewhere (says where).
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of the density, finite where the square of z overflows."""
        return evaluated(_log_density, checked(self, value), self.scale)

    def cdf(self, value: Tensor) -> Tensor:
        """P(X <= value), to its relative accuracy for small values."""
        return evaluated(lambda x, s: torch.atan2(x, s) * (2 / math.pi), checked(self, value), self.scale)


def _log_density(x: Tensor, s: Tensor) -> Tensor:
    value = math.log(2) + cauchy_log_density(x, torch.zeros_like(x), s)
    return torch.where(x >= 0, value, -torch.inf)


@register_hardened(HalfCauchy, HalfCauchy)
def kl_half_cauchy_half_cauchy(p: TorchHalfCauchy, q: TorchHalfCauchy) -> Tensor:
    """KL between half-Cauchy distributions, elementwise: the sign of a symmetric variable is the same for both."""
    # two tensors of zeros: torch.compile takes no tensor twice into a function of ours
    zero, other = torch.zeros_like(p.scale), torch.zeros_like(q.scale)
    return cauchy_kl(zero, p.scale, other, q.scale)
