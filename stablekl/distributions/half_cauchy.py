"""Half-Cauchy distributions; their KL divergence is that of the Cauchy distributions of median 0 (see `cauchy`)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import HalfCauchy as TorchHalfCauchy

from ..registry import register_hardened
from ._base import Checked
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


@register_hardened(HalfCauchy, HalfCauchy)
def kl_half_cauchy_half_cauchy(p: TorchHalfCauchy, q: TorchHalfCauchy) -> Tensor:
    """KL between half-Cauchy distributions, elementwise: the sign of a symmetric variable is the same for both."""
    # two tensors of zeros: torch.compile takes no tensor twice into a function of ours
    zero, other = torch.zeros_like(p.scale), torch.zeros_like(q.scale)
    return cauchy_kl(zero, p.scale, other, q.scale)
