r"""Weibull distributions, and their KL divergence as that of the Gumbel distributions of their negative logarithms.

With scales :math:`\lambda` and concentrations k, :math:`z = k_q \log(\lambda_p/\lambda_q)` and :math:`r = k_q/k_p` in
the formula of `gumbel`. torch knows the divergence only of a distribution from itself.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Weibull as TorchWeibull

from .. import _double
from .._bregman import log_quotient
from .._double import Double
from .._scaled import scaled
from .._wide import log_quotient as wide_log_quotient
from .._wide import narrow, product, wide
from ..registry import register_hardened
from ._base import Checked
from ._density import checked, evaluated, exponential, log1mexp
from ._scalar import attached, scalar_rule
from .gumbel import extreme_value, slopes

__all__ = ["Weibull"]

# Logarithm of the hazard below which log(1 - e^-hazard) is that.
_UNDERFLOW = -600.0


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

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of the density."""
        return evaluated(_log_density, checked(self, value), self.scale, self.concentration)

    def cdf(self, value: Tensor) -> Tensor:
        """P(X <= value), to its relative accuracy for small values too."""
        return evaluated(lambda *x: -torch.expm1(-_hazard(*x)[0]), checked(self, value), self.scale, self.concentration)

    def sf(self, value: Tensor) -> Tensor:
        """P(X > value), which 1 - cdf loses in the upper tail."""
        return evaluated(_upper_tail, checked(self, value), self.scale, self.concentration)

    def log_cdf(self, value: Tensor) -> Tensor:
        """Log of P(X <= value)."""
        return evaluated(_log_lower_tail, checked(self, value), self.scale, self.concentration)

    def log_sf(self, value: Tensor) -> Tensor:
        """Log of P(X > value), finite where that underflows."""
        return evaluated(lambda *x: -_hazard(*x)[0], checked(self, value), self.scale, self.concentration)


def _hazard(x: Tensor, scale: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x/scale)^k, what is lost of it, and its logarithm, to twice the digits: pow is off by its exponent in ulps."""
    smooth = k * (torch.log(x) - torch.log(scale))
    with torch.no_grad():
        z = _double.multiply(_double.log_quotient(x.detach(), scale.detach()), k.detach())
        fits = z.lo.isfinite()
    log = torch.where(fits, attached(z.hi, torch.where(fits, smooth, 0.0)), smooth)
    return *exponential(log, torch.where(fits, z.lo, 0.0)), log


def _upper_tail(x: Tensor, scale: Tensor, k: Tensor) -> Tensor:
    h, lost, _ = _hazard(x, scale, k)
    return torch.exp(-h) * (1 - lost)


def _log_lower_tail(x: Tensor, scale: Tensor, k: Tensor) -> Tensor:
    h, lost, log = _hazard(x, scale, k)
    far = log < _UNDERFLOW
    return torch.where(far, log, log1mexp(torch.where(far, 1.0, h), lost))


def _log_density(x: Tensor, scale: Tensor, k: Tensor) -> Tensor:
    hazard, lost, log = _hazard(x, scale, k)
    return log_quotient(k, x) + log - (hazard + lost)


def _shift(s_p: Tensor, k_q: Tensor, s_q: Tensor) -> tuple[Double, Double]:
    """The logarithm of the ratio of the scales, and z."""
    log = wide_log_quotient(wide(s_p), wide(s_q))
    return log, narrow(product(wide(log), wide(k_q)))


def _value(s_p: Tensor, k_p: Tensor, s_q: Tensor, k_q: Tensor) -> Tensor:
    return extreme_value(_shift(s_p, k_q, s_q)[1], k_q, k_p)


def _gradient(s_p: Tensor, k_p: Tensor, s_q: Tensor, k_q: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        exact, z = _shift(s_p.detach(), k_q.detach(), s_q.detach())
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
