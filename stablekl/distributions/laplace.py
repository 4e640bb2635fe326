r"""Laplace distributions, and their KL divergence as a sum of non-negative terms.

With :math:`u = |\mu_p - \mu_q|/b_p`, :math:`\rho = b_p/b_q` and :math:`E(x) = e^x - 1 - x`,

.. math:: KL = \rho\,E(-u) + \mathrm{log\_ratio\_bregman}(b_p, b_q).

torch evaluates :math:`-\log \rho + |\mu_p - \mu_q|/b_q + \rho e^{-u} - 1`, of which nothing is left where p is near q:
L(0, 1) against L(1e-4, 1) is 0 in float32, for 5e-9.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Laplace as TorchLaplace

from .._autograd import masked_product
from .._elementwise import sum_error
from .._scaled import split
from ..registry import register_hardened
from ..special import expm1_value, expm1mx, expm1mx_value, log_ratio_bregman_value
from ._base import Checked
from ._density import LOG_2_HIGH, LOG_2_LOW, checked, evaluated, standardised
from ._scalar import scalar_rule

__all__ = ["Laplace"]

# Beyond it |mu_p - mu_q|/b_q and rho (1 - e^-u) are taken apart, a quarter of it: u overflows where they do not.
_FAR = 4.0
_SMALL = 1e-290  # below it u has lost digits
_LEAST = 1e-305  # below it reciprocals overflow


class Laplace(TorchLaplace, Checked):
    """`torch.distributions.Laplace` with a KL divergence that is accurate for every pair of parameters.

    Args:
        loc: median, any shape that broadcasts with ``scale``.
        scale: positive.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: ``scale`` is zero, negative or NaN somewhere (says where, and how to parameterise).

    Example:
        >>> import torch, stablekl
        >>> p, q = stablekl.Laplace(torch.tensor(0.0), 1.0), stablekl.Laplace(torch.tensor(1e-4), 1.0)
        >>> print(f"{torch.distributions.kl_divergence(p, q):.3e}")
        5.000e-09
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of the density."""
        return evaluated(_log_density, checked(self, value), self.loc, self.scale)

    def cdf(self, value: Tensor) -> Tensor:
        """P(X <= value), to its relative accuracy in the lower tail, where torch's 1/2 - 1/2 expm1 cancels."""
        return evaluated(lambda *x: _tail(*standardised(*x)), checked(self, value), self.loc, self.scale)

    def sf(self, value: Tensor) -> Tensor:
        """P(X > value), which 1 - cdf loses in the upper tail."""
        return evaluated(lambda x, m, b: _tail(*standardised(-x, -m, b)), checked(self, value), self.loc, self.scale)

    def log_cdf(self, value: Tensor) -> Tensor:
        """Log of P(X <= value), finite where that underflows."""
        return evaluated(lambda *x: _log_tail(*standardised(*x)), checked(self, value), self.loc, self.scale)

    def log_sf(self, value: Tensor) -> Tensor:
        """Log of P(X > value), finite where that underflows."""
        return evaluated(
            lambda x, m, b: _log_tail(*standardised(-x, -m, b)), checked(self, value), self.loc, self.scale
        )

    def icdf(self, value: Tensor) -> Tensor:
        """The quantile, to its accuracy for small probabilities, which torch subtracts from 1/2."""
        return evaluated(_quantile, value, self.loc, self.scale)


def _log_density(x: Tensor, m: Tensor, b: Tensor) -> Tensor:
    z, lost = standardised(x, m, b)
    mantissa, k = split(b)
    level, size = -k * LOG_2_HIGH, z.abs()
    leading = level - size  # may be all but nothing of either: see `_density.normal_log_density`
    with torch.no_grad():
        rest = sum_error(level, -size.detach(), leading.detach())
        rest = torch.where(rest.isfinite(), rest, 0.0) - torch.where(z < 0, -lost, lost)
    return leading + (rest - k * LOG_2_LOW - torch.log(2 * mantissa))


def _half(z: Tensor, lost: Tensor) -> Tensor:
    """The smaller tail: an ulp of z is z ulps of its exponential."""
    return 0.5 * torch.exp(-z.abs()) * torch.where(z < 0, 1 + lost, 1 - lost)


def _tail(z: Tensor, lost: Tensor) -> Tensor:
    half = _half(z, lost)
    return torch.where(z < 0, half, 1 - half)


def _log_tail(z: Tensor, lost: Tensor) -> Tensor:
    low = z < 0
    return torch.where(low, z - math.log(2), torch.log1p(-_half(torch.where(low, 0.0, z), lost)))


def _quantile(u: Tensor, m: Tensor, b: Tensor) -> Tensor:
    low = u < 0.5
    log = torch.where(low, torch.log(2 * torch.where(low, u, 0.5)), -torch.log(2 * (1 - torch.where(low, 0.5, u))))
    return m + b * log


def _over(mu_p: Tensor, mu_q: Tensor, b: Tensor) -> Tensor:
    """The distance of the locations in units of b, by their halves where it overflows."""
    # not the absolute value, which has no derivative at 0
    left = mu_p < mu_q
    low, high = torch.where(left, mu_p, mu_q), torch.where(left, mu_q, mu_p)
    d = high - low
    return torch.where(d.isinf(), 2 * ((0.5 * high - 0.5 * low) / b), d / b)


def _value(mu_p: Tensor, b_p: Tensor, mu_q: Tensor, b_q: Tensor) -> Tensor:
    u, rho = _over(mu_p, mu_q, b_p), b_p / b_q
    near = masked_product(expm1mx_value(-u.clamp(max=_FAR)), rho)
    # the bound changes rho = inf alone, where the other term is infinite too
    far = _over(mu_p, mu_q, b_q) + rho.clamp(max=torch.finfo(rho.dtype).max) * expm1_value(-u)
    return torch.where(u < _FAR, near, far) + log_ratio_bregman_value(b_p, b_q)


def _gradient(mu_p: Tensor, b_p: Tensor, mu_q: Tensor, b_q: Tensor) -> tuple[Tensor, ...]:
    left = mu_p < mu_q
    larger, unit = torch.maximum(b_p, b_q), torch.minimum(b_p, b_q)
    u, t = _over(mu_p, mu_q, b_p), _over(mu_p, mu_q, b_q)
    fall = -expm1_value(-u)  # 1 - e^-u
    fall = torch.where(u < _SMALL, _over(mu_p, mu_q, larger) / unit, fall / b_q)
    by_mu = torch.where(left, -fall, fall)
    # rho E(-u) differentiates to e^-u (1 + u)/b_q - 1/b_q = -e^-u E(u)/b_q by b_p
    near = u < 1
    v, far = torch.where(near, u, 0.0), torch.where(u < 1e4, u, 1e4)
    within = ((b_p - b_q) / larger - unit / b_q * (torch.exp(-v) * expm1mx(v))) / unit
    rest = torch.exp(-far) * (1 + far)
    both = (unit / b_q * rest - unit / b_p) / unit  # where either reciprocal overflows
    beyond = torch.where(rest == 0, -1 / b_p, torch.where(b_p < _LEAST, both, rest / b_q - 1 / b_p))
    by_p = torch.where(near, within, beyond)
    rho = (b_p / b_q).clamp(max=torch.finfo(b_p.dtype).max)
    d = (mu_p - mu_q).abs()
    outer = torch.where(t.isinf() | d.isinf(), 1 - t, (b_q - d) / b_q) - rho * torch.exp(-u)
    by_q = torch.where(near, (b_q - b_p) / b_q - rho * expm1mx(-v), outer)
    return by_mu, by_p, -by_mu, by_q / b_q


_kl = scalar_rule(_value, _gradient)


@register_hardened(Laplace, Laplace)
def kl_laplace_laplace(p: TorchLaplace, q: TorchLaplace) -> Tensor:
    """KL between Laplace distributions, elementwise; see the module."""
    return _kl(p.loc, p.scale, q.loc, q.scale)
