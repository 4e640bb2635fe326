r"""Poisson distributions, and their KL divergence without cancellation.

.. math:: KL = \lambda_p \log\frac{\lambda_p}{\lambda_q} + \lambda_q - \lambda_p = \mathrm{bd0}(\lambda_p, \lambda_q),

Loader's deviance. A rate of 0 is the point mass at 0: the divergence is :math:`\lambda_q` for :math:`\lambda_p = 0`,
where torch returns NaN, and infinite for :math:`\lambda_q = 0 < \lambda_p`. Near p = q torch subtracts two numbers that
agree.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributions import Poisson as TorchPoisson

from ..registry import register_hardened
from ..special import bd0
from ._base import Checked
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


_kl = scalar_rule(bd0)


@register_hardened(Poisson, Poisson)
def kl_poisson_poisson(p: TorchPoisson, q: TorchPoisson) -> Tensor:
    """KL between Poisson distributions, elementwise; see the module."""
    return _kl(p.rate, q.rate)
