"""Log-normal distributions; their KL divergence is that of the logarithms of the variables (see `normal`)."""

from __future__ import annotations

from torch import Tensor
from torch.distributions import LogNormal as TorchLogNormal

from ..registry import register_hardened
from ._base import Checked
from .normal import normal_kl

__all__ = ["LogNormal"]


class LogNormal(TorchLogNormal, Checked):
    """`torch.distributions.LogNormal` with a KL divergence that is accurate for every pair of parameters.

    Args:
        loc: mean of the logarithm, any shape that broadcasts with ``scale``.
        scale: standard deviation of the logarithm, positive.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is outside of its domain somewhere (says where).
    """


@register_hardened(LogNormal, LogNormal)
def kl_log_normal_log_normal(p: TorchLogNormal, q: TorchLogNormal) -> Tensor:
    """KL between log-normal distributions, elementwise: that of the logarithms."""
    return normal_kl(p.loc, p.scale, q.loc, q.scale)
