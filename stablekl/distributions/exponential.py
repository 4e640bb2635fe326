r"""Exponential distributions, and their KL divergence without cancellation.

.. math:: KL = \frac{\lambda_q - \lambda_p}{\lambda_p} - \log\frac{\lambda_q}{\lambda_p}
              = \mathrm{log\_ratio\_bregman}(\lambda_q, \lambda_p).

torch evaluates :math:`\lambda_q/\lambda_p - 1 - \log(\lambda_q/\lambda_p)` of the rounded quotient: 1e16 ulp off near
p = q, and infinite where the quotient leaves the range of floats though its logarithm does not.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Exponential as TorchExponential

from ..registry import register_hardened
from ..special import log_ratio_bregman
from ._base import Checked
from ._density import checked, evaluated, log1mexp, product
from ._scalar import scalar_rule

__all__ = ["Exponential"]


class Exponential(TorchExponential, Checked):
    """`torch.distributions.Exponential` with a KL divergence that is accurate for every pair of rates.

    Args:
        rate: positive, any shape.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: ``rate`` is zero, negative or NaN somewhere (says where).

    Example:
        >>> import torch, stablekl
        >>> p, q = stablekl.Exponential(torch.tensor(1.0)), stablekl.Exponential(torch.tensor(1.0001))
        >>> print(f"{torch.distributions.kl_divergence(p, q):.3e}")
        5.001e-09
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of the density."""
        return evaluated(lambda x, rate: torch.log(rate) - rate * x, checked(self, value), self.rate)

    def cdf(self, value: Tensor) -> Tensor:
        """P(X <= value), to its relative accuracy for small values, where torch's 1 - exp cancels."""
        return evaluated(lambda x, rate: -torch.expm1(-rate * x), checked(self, value), self.rate)

    def sf(self, value: Tensor) -> Tensor:
        """P(X > value)."""
        return evaluated(lambda *x: _tail(*product(*x)), checked(self, value), self.rate)

    def log_cdf(self, value: Tensor) -> Tensor:
        """Log of P(X <= value)."""
        return evaluated(lambda *x: log1mexp(*product(*x)), checked(self, value), self.rate)

    def log_sf(self, value: Tensor) -> Tensor:
        """Log of P(X > value)."""
        return evaluated(lambda x, rate: -rate * x, checked(self, value), self.rate)


def _tail(h: Tensor, lost: Tensor) -> Tensor:
    return torch.exp(-h) * (1 - lost)


_kl = scalar_rule(lambda rate_p, rate_q: log_ratio_bregman(rate_q, rate_p))


@register_hardened(Exponential, Exponential)
def kl_exponential_exponential(p: TorchExponential, q: TorchExponential) -> Tensor:
    """KL between exponential distributions, elementwise; see the module."""
    return _kl(p.rate, q.rate)
