r"""Weibull distributions, and their KL divergence as that of the Gumbel distributions of their negative logarithms.

With scales :math:`\lambda` and concentrations k, :math:`z = k_q \log(\lambda_p/\lambda_q)` and :math:`r = k_q/k_p` in
the formula of `gumbel`. torch knows the divergence only of a distribution from itself.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Weibull as TorchWeibull

from .._double import Double
from .._scaled import scaled
from .._wide import log_quotient, narrow, product, wide
from ..registry import register_hardened
from ._base import Checked
from ._scalar import attached, scalar_rule
from .gumbel import extreme_value, slopes

__all__ = ["Weibull"]


class Weibull(TorchWeibull, Checked):
    """`torch.distributions.Weibull` with a KL divergence for every pair of parameters.

    Args:
        scale: positive, any shape that broadcasts with ``concentration``.
        concentration: positive; 1 is an exponential distribution.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is zero, negative or NaN somewhere (says where).

    Example:
        >>> import torch, stablekl
        >>> p, q = stablekl.Weibull(torch.tensor(1.0), 2.0), stablekl.Weibull(torch.tensor(1.0), 1.0)
        >>> print(f"{torch.distributions.kl_divergence(p, q):.4f}")
        0.2908
    """


def _shift(s_p: Tensor, k_q: Tensor, s_q: Tensor) -> tuple[Double, Double]:
    """The logarithm of the ratio of the scales, and z."""
    log = log_quotient(wide(s_p), wide(s_q))
    return log, narrow(product(wide(log), wide(k_q)))


def _value(s_p: Tensor, k_p: Tensor, s_q: Tensor, k_q: Tensor) -> Tensor:
    return extreme_value(_shift(s_p, k_q, s_q)[1], k_q, k_p)


def _gradient(s_p: Tensor, k_p: Tensor, s_q: Tensor, k_q: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        exact, z = _shift(s_p, k_q, s_q)
    log = attached(exact.hi, torch.log(s_p) - torch.log(s_q))
    s = slopes(z, k_q * log, k_q, k_p)
    power, by_ratio = scaled(k_q) * s.power, s.by_ratio / scaled(k_p)
    by_k_p = scaled(k_q) * by_ratio / scaled(k_p)
    by_k_q = s.power * scaled(log) + by_ratio
    return (power / scaled(s_p)).rounded(), -by_k_p.rounded(), -(power / scaled(s_q)).rounded(), by_k_q.rounded()


_kl = scalar_rule(_value, _gradient)


@register_hardened(Weibull, Weibull, torch_lacks_it=True)
def kl_weibull_weibull(p: TorchWeibull, q: TorchWeibull) -> Tensor:
    """KL between Weibull distributions, elementwise; see the module."""
    return _kl(p.scale, p.concentration, q.scale, q.concentration)
