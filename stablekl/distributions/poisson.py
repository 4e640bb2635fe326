r"""Poisson distributions, and their KL divergence without cancellation.

.. math:: KL = \lambda_p \log\frac{\lambda_p}{\lambda_q} + \lambda_q - \lambda_p = \mathrm{bd0}(\lambda_p, \lambda_q),

Loader's deviance. A rate of 0 is the point mass at 0: the divergence is :math:`\lambda_q` for :math:`\lambda_p = 0`,
where torch returns NaN, and infinite for :math:`\lambda_q = 0 < \lambda_p`. Near p = q torch subtracts two numbers that
agree.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Poisson as TorchPoisson

from .._deviance import deviance, poisson_rest
from ..registry import register_hardened
from ..special import bd0
from ._base import Checked
from ._density import checked, evaluated
from ._scalar import scalar_rule

__all__ = ["Poisson"]


class Poisson(TorchPoisson, Checked):
    """`torch.distributions.Poisson` with a KL divergence that is accurate for every pair of parameters.

    Args:
        rate: not negative; 0 is the point mass at 0.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is outside of its domain somewhere (says where).
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of the probability, as minus a sum of non-negative terms (see `_deviance`)."""
        return evaluated(_log_mass, checked(self, value), self.rate)


def _log_mass(k: Tensor, rate: Tensor) -> Tensor:
    inside = k >= 0
    k, some = torch.where(inside, k, 0.0), rate > 0
    log_rate = torch.where(some, torch.log(torch.where(some, rate, 1.0)), -torch.inf)
    return torch.where(inside, -(deviance(k, rate - k, rate, log_rate) + poisson_rest(k)), -torch.inf)


_kl = scalar_rule(bd0)


@register_hardened(Poisson, Poisson)
def kl_poisson_poisson(p: TorchPoisson, q: TorchPoisson) -> Tensor:
    """KL between Poisson distributions, elementwise; see the module."""
    return _kl(p.rate, q.rate)
