r"""Kumaraswamy distributions, and their KL divergence by a sum of non-negative terms at fixed points.

:math:`E_p \log(1 - x^{a_q})` has no closed form but for equal a. With :math:`\tau = -a_p \log x`,
:math:`\rho = a_q/a_p` and :math:`l(\tau) = \log(1 - e^{-\tau})`, the densities of log tau have the ratio

.. math:: v = (\rho - 1) \tau + (b_p - b_q)\,l(\tau) + (b_q - 1)[l(\tau) - l(\rho \tau)] + \text{const},

each term from the differences of the parameters. The sum is that of `_integrated`, on the axis of log tau, on which
power tails at x = 1 are exponential and those at x = 0 exponential twice. torch knows the divergence only of a
distribution from itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Kumaraswamy as TorchKumaraswamy

from ..registry import register_hardened
from ..special import expm1_value
from ._base import Checked
from ._density import checked, evaluated, log1mexp
from ._integrated import Comparison, chunked, compared, points
from ._scalar import scalar_rule

__all__ = ["Kumaraswamy"]

_WIDTH = 1.5
_NOTHING = 45.0
# Beyond these log tau the last float of tau, and of e^(-tau), is long passed: they stay finite.
_LEAST, _MOST, _FURTHEST = -600.0, 600.0, 200.0


class Kumaraswamy(TorchKumaraswamy, Checked):
    """`torch.distributions.Kumaraswamy` with a KL divergence for every pair of parameters.

    Args:
        concentration1: positive, the power of x; any shape that broadcasts with ``concentration0``.
        concentration0: positive, the power of 1 - x^concentration1.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is zero, negative or NaN somewhere (says where).

    Example:
        >>> import torch, stablekl
        >>> p, q = stablekl.Kumaraswamy(torch.tensor(2.0), 3.0), stablekl.Kumaraswamy(torch.tensor(2.0), 6.0)
        >>> print(f"{torch.distributions.kl_divergence(p, q):.4f}")
        0.3069
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of the density, with log(1 - x^a) from the logarithm of x, where torch rounds x^a to 1."""
        return evaluated(_log_density, checked(self, value), self.concentration1, self.concentration0)

    def cdf(self, value: Tensor) -> Tensor:
        """P(X <= value), to its relative accuracy for small values too."""
        return evaluated(_distribution, checked(self, value), self.concentration1, self.concentration0)


def _log_density(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    inside = (x > 0) & (x < 1)
    log_x = torch.log(torch.where(inside, x, 0.5))
    value = torch.log(a) + torch.log(b) + (a - 1) * log_x + (b - 1) * log1mexp(-a * log_x)
    power, other = torch.where(x == 0, a, b), torch.where(x == 0, b, a)
    edge = torch.where(power == 1, torch.log(other), torch.where(power < 1, torch.inf, -torch.inf))
    return torch.where(inside, value, torch.where((x == 0) | (x == 1), edge, torch.nan))


def _distribution(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    inside = (x > 0) & (x < 1)
    value = -torch.expm1(b * log1mexp(-a * torch.log(torch.where(inside, x, 0.5))))
    return torch.where(inside, value, torch.where(x > 0, 1.0, 0.0))


class _Side(NamedTuple):
    """At the points: log tau, tau, l(tau), log tau - l(tau), and tau/(e^tau - 1)."""

    log: Tensor
    tau: Tensor
    fall: Tensor
    excess: Tensor
    share: Tensor


def _side(log_tau: Tensor) -> _Side:
    tau = torch.exp(log_tau.clamp(_LEAST, _FURTHEST))
    low = tau < 0.5
    near, far = torch.where(low, tau, 0.5), torch.where(low, 0.5, tau.clamp(max=_MOST))
    ratio, plain = torch.log(-expm1_value(-near) / near), torch.log1p(-torch.exp(-far))
    fall = torch.where(low, log_tau + ratio, plain)
    # not a difference of the two, which are large for small tau
    excess = torch.where(low, -ratio, log_tau - plain)
    share = torch.where(low, near / expm1_value(near), far * torch.exp(-far) / -torch.expm1(-far))
    return _Side(log_tau, tau, fall, excess, share)


def _centre(b: Tensor) -> tuple[Tensor, Tensor]:
    """Where the mass is on the axis of its own log tau, and its width: at most 1, and 1/log b for large b."""
    size = 1 + torch.log1p(b)
    return torch.log(size), _WIDTH / size


def _integrated(*parameters: Tensor) -> tuple[Comparison, _Side, _Side]:
    a_p, b_p, a_q, b_q = (x.unsqueeze(-1) for x in parameters)
    still = a_p.detach()
    (centre, width), (centre_q, width_q) = _centre(b_p.detach()), _centre(b_q.detach())
    apart = torch.log(a_q.detach()) - torch.log(still)
    shift = centre - (centre_q - apart)
    reach = _NOTHING / torch.minimum(b_p, b_q) + 6
    at = points(shift, width, width_q, None, torch.log(reach))
    size = at.one.abs()
    log_width = torch.log(width) + size + torch.log1p(torch.exp(-2 * size))
    log_step = at.log_step + log_width - torch.log1p(width / width_q * torch.exp(at.log_cosh_ratio))

    from_p = centre + width * torch.sinh(at.one)
    from_q = (centre_q - apart) + width_q * torch.sinh(at.two)
    base = torch.where(at.one.abs() < at.two.abs(), from_p, from_q)
    p = _side(base + (torch.log(a_p) - torch.log(still)))
    q = _side(base + (torch.log(a_q) - torch.log(still)))

    change = (a_q - a_p) / a_p
    close = change.abs() < 0.5
    near = torch.where(close, change, 0.0)
    tau = p.tau.clamp(max=_MOST)
    ratio = torch.log1p(-expm1_value(-near * tau) / torch.where(p.log > _LEAST, torch.expm1(tau), tau))
    step = torch.where(close, ratio, q.fall - p.fall)  # l(rho tau) - l(tau)
    v = change * p.tau + (b_p - b_q) * p.fall - (b_q - 1) * step

    def log_mass(side: _Side, b: Tensor) -> Tensor:
        # tau e^-tau (1 - e^-tau)^(b - 1), whose first and last factor cancel at the left
        return log_step + b * side.fall - side.tau + side.excess

    # that of q in units of log tau_q - log tau_p, which is the same at all points
    log_q = log_mass(q, b_q) - (torch.log(a_q) - torch.log(a_p))
    return compared(log_mass(p, b_p), log_q, v), p, q


def _value(*parameters: Tensor) -> Tensor:
    return chunked(lambda *x: (_integrated(*x)[0].terms.sum(-1),), *parameters)[0]


def _gradients(*parameters: Tensor) -> tuple[Tensor, ...]:
    found, p, q = _integrated(*parameters)
    a_p, b_p, a_q, b_q = (x.unsqueeze(-1) for x in parameters)
    weight = found.p * (found.u - found.terms.sum(-1, keepdim=True))
    by_a, by_b = -(p.tau - (b_p - 1) * p.share) / a_p, p.fall
    by_a_q, by_b_q = -(q.tau - (b_q - 1) * q.share) / a_q, q.fall
    of_p = ((weight * score).sum(-1) for score in (by_a, by_b))
    return *of_p, *(-(found.gain * score).sum(-1) for score in (by_a_q, by_b_q))


_kl = scalar_rule(_value, lambda *parameters: chunked(_gradients, *parameters))


@register_hardened(Kumaraswamy, Kumaraswamy, torch_lacks_it=True)
def kl_kumaraswamy_kumaraswamy(p: TorchKumaraswamy, q: TorchKumaraswamy) -> Tensor:
    """KL between Kumaraswamy distributions, elementwise; see the module."""
    return _kl(p.concentration1, p.concentration0, q.concentration1, q.concentration0)
