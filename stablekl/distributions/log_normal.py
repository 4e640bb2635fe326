"""Log-normal distributions; their KL divergence is that of the logarithms of the variables (see `normal`)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import LogNormal as TorchLogNormal

from .. import _double
from ..registry import register_hardened
from ._base import Checked
from ._density import checked, evaluated, normal_log_density, normal_log_tail, normal_tail, standardised
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

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of the density; the logarithm of the value to twice the digits, since the scale may be small."""
        return evaluated(_log_density, checked(self, value), self.loc, self.scale)

    def cdf(self, value: Tensor) -> Tensor:
        """P(X <= value), to its relative accuracy in the lower tail too (see `Normal`)."""
        return evaluated(lambda *x: normal_tail(*_standardised(*x)), checked(self, value), self.loc, self.scale)

    def sf(self, value: Tensor) -> Tensor:
        """P(X > value), which 1 - cdf loses in the upper tail."""
        return evaluated(lambda *x: normal_tail(*_upward(*x)), checked(self, value), self.loc, self.scale)

    def log_cdf(self, value: Tensor) -> Tensor:
        """Log of P(X <= value), finite where that underflows."""
        return evaluated(lambda *x: normal_log_tail(*_standardised(*x)), checked(self, value), self.loc, self.scale)

    def log_sf(self, value: Tensor) -> Tensor:
        """Log of P(X > value), finite where that underflows."""
        return evaluated(lambda *x: normal_log_tail(*_upward(*x)), checked(self, value), self.loc, self.scale)


def _standardised(x: Tensor, m: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """As of a Normal, for log x, of which more is lost."""
    inside = x > 0
    safe = torch.where(inside, x, 1.0)
    log_x = torch.log(safe)
    z, lost = standardised(log_x, m, s)
    with torch.no_grad():
        more = _double.subtract(_double.log(safe.detach()), log_x.detach()).hi / s.detach()
        lost = torch.where(inside, lost + torch.where(more.isfinite(), more, 0.0), 0.0)
    return torch.where(inside, z, -torch.inf), lost


def _upward(x: Tensor, m: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    z, lost = _standardised(x, m, s)
    return -z, -lost


def _log_density(x: Tensor, m: Tensor, s: Tensor) -> Tensor:
    inside = x > 0
    safe = torch.where(inside, x, 1.0)
    log_x = torch.log(safe)
    with torch.no_grad():
        lost = _double.subtract(_double.log(safe.detach()), log_x.detach()).hi / s.detach()
        lost = torch.where(lost.isfinite(), lost, 0.0)
    z = (log_x - m) / s
    value = normal_log_density(log_x, m, s) - (z + 0.5 * lost) * lost - log_x
    return torch.where(inside, value, torch.where(x == 0, -torch.inf, torch.nan))


@register_hardened(LogNormal, LogNormal)
def kl_log_normal_log_normal(p: TorchLogNormal, q: TorchLogNormal) -> Tensor:
    """KL between log-normal distributions, elementwise: that of the logarithms."""
    return normal_kl(p.loc, p.scale, q.loc, q.scale)
