r"""KL of a Kumaraswamy distribution against a Beta, by a sum of non-negative terms at fixed points.

For concentrations (a, b) of p and (c, d) of q, :math:`\tau = -a \log x`, t = tau/a and :math:`l(t) = \log(1 - e^{-t})`,
the logarithm of the ratio of the densities is, but for a constant,

.. math:: v = (\tfrac ca - 1)(\tau - \tau_0) + (b - d)[l(\tau) - l(\tau_0)]
    + (d - 1)[l(\tau) - l(\tau_0) - l(t) + l(t_0)],

tau_0 the centre of p's mass: differences of the parameters, and of l, which vanish where the two are the same
distribution (a = c = 1 and b = d; b = d = 1 and a = c). The sum is that of `_integrated`, on the axis of log tau, as
in `..kumaraswamy`. A Beta too narrow to be near any Kumaraswamy distribution, whose own width on that axis is
:math:`1/\log b` at the least, is not integrated: its normaliser and :math:`E_p \log q` are taken by Loader's
deviances, as in `_deviance`. torch has no rule, and :math:`E_p \log(1 - x)` is an infinite series of beta functions.

Accuracy, float64, concentrations between 1e-12 and 1e12: 83 ulp at a = c (1 + 1e-14) = 1e-6, b = 1 + 3 eps,
d = 1 - 3e-8 (the bar is 64; the cause is not known), and 5.4 at most in 40 sets, most of them next to each other or
to the closest q; versions before this one 20.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Beta as TorchBeta
from torch.distributions import Kumaraswamy as TorchKumaraswamy

from ..._deviance import binomial_deviance, digamma, gamma_scale
from ...registry import register_hardened
from ...special import expm1_value
from .._integrated import Comparison, chunked, compared, placed, points
from .._scalar import scalar_rule
from ..beta import Beta
from ..kumaraswamy import _LEAST, _LOW, _NOTHING, _WIDTH, Kumaraswamy, _centre, _excess_gap, _Side, _side

__all__: list[str] = []

# A Beta of this width, on the axis of log(-log x), is narrower than any Kumaraswamy distribution of b below 1e60.
_NARROW = 0.01
# Distance of the centres on that axis from which on the divergence is no small one.
_FAR = 6.0
# d from which on the corner of the density for small c has a place of its own.
_MANY = 10.0
# Exponents that are left as they are.
_MODERATE = 50.0


def _placed(c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Where the mass of a Beta is on the axis of log(-log x), and its width."""
    size = 1 / c + torch.log1p(d / c)
    spread = torch.sqrt(1 / c / c + d / (c + d) / c)
    return torch.log(size), _WIDTH * torch.minimum(spread / size, torch.ones_like(size))


def _risen(side: _Side, start: _Side, h: Tensor) -> Tensor:
    """l(t) - l(t_0) for t = t_0 e^h."""
    rise = start.tau * expm1_value(h.clamp(max=600.0))
    low = torch.maximum(side.tau, start.tau) < _LOW
    at, to = torch.where(low, start.tau, 0.5), torch.where(low, side.tau, 0.5)
    by_series = h - _excess_gap(at, to, torch.where(low, rise, 0.0))
    share = -expm1_value(-rise.clamp(max=60.0)) / torch.expm1(start.tau)
    near = share.abs() < 0.5
    by_share = torch.log1p(torch.where(near, share, 0.0))
    return torch.where(low, by_series, torch.where(near, by_share, side.fall - start.fall))


def _step(p: _Side, q: _Side, change: Tensor, log_ratio: Tensor) -> Tensor:
    """l(t) - l(tau) for t = (1 + change) tau, change between -1/2 and 1."""
    low = torch.maximum(p.tau, q.tau) < _LOW
    small = torch.where(low, p.tau, 0.5)
    by_series = log_ratio - _excess_gap(small, torch.where(low, q.tau, 0.5), change * small)
    tau = torch.where(low, 1.0, p.tau).clamp(max=600.0)
    return torch.where(low, by_series, torch.log1p(-expm1_value(-change * tau) / torch.expm1(tau)))


class _Found(NamedTuple):
    """The masses, log(p/q) of a q that is far, and both sides at the points; tau of p moves with a, t of q does not."""

    compared: Comparison
    far: Tensor
    direct: Tensor
    p: _Side
    q: _Side


def _integrated(*parameters: Tensor) -> _Found:
    a, b, c, d = (x.unsqueeze(-1) for x in parameters)
    still = a.detach()
    log_still = torch.log(still)
    (centre, width), (centre_q, width_q) = _centre(b.detach()), _placed(c.detach(), d.detach())
    shift = centre - (centre_q + log_still)
    far = (width_q < _NARROW * _WIDTH) | (shift.abs() > _FAR)
    # of a small c the density turns twice: where it ends, and here
    corner, bend = _centre(d.detach())
    turns = (c < 1) & (d > _MANY) & ~far
    shift = torch.where(turns, centre - (corner + log_still), shift)
    width_q = torch.where(far, _WIDTH, torch.where(turns, bend, width_q))
    # of a small c the tail towards 1 is that of t before it is that of t^d
    reach = _NOTHING / torch.where(far, b, torch.minimum(b, d)).detach().clamp(max=1) + 6
    at = points(shift, width, width_q, None, torch.log(reach))
    h, _ = placed(at, torch.zeros_like(centre), width, -shift, width_q)
    # the step from where h is: neighbours would share the roundings of logarithms of the map
    log_step = at.log_step - torch.log(1 / torch.hypot(h, width) + 1 / torch.hypot(h + shift, width_q))
    log_a = torch.log(a) - log_still  # 0, with its derivative
    p, q = _side(centre + h + log_a), _side(centre + h - log_still)
    start = _side(centre + log_a)
    start_q = _side(centre - log_still)._replace(tau=start.tau.detach() / still)  # without the rounding of log a
    moved = h.clamp(max=600.0)

    change = (1 - a) / a
    close = (change > -0.5) & (change < 1)
    near = torch.where(close, change, 0.0)
    log_ratio = torch.where(close, torch.log1p(near), -torch.log(a))
    risen, risen_q = _risen(p, start, h), _risen(q, start_q, h)
    apart = risen - risen_q
    # of far left points both logarithms are large, and all but the same
    low, both = torch.maximum(p.tau, q.tau) < _LOW, torch.maximum(start.tau, start_q.tau)
    small = torch.where(low, p.tau, 0.5)
    left = _excess_gap(small, torch.where(low, q.tau, 0.5), (change * small)) - log_ratio - (start.fall - start_q.fall)
    apart = torch.where(low & (both >= _LOW), left, apart)
    apart = torch.where(close, _step(start, start_q, near, log_ratio) - _step(p, q, near, log_ratio), apart)
    by_terms = (b - d) * risen + (d - 1) * apart
    # of a tau and t that have nothing to do with each other their terms are not mixed
    by_terms = torch.where(~close & (b > 0.5) & (d > 0.5), (b - 1) * risen - (d - 1) * risen_q, by_terms)
    v = (c - a) / a * start.tau * expm1_value(moved) + by_terms

    # relative to their values at p's centre
    rise_p = b * risen + (p.excess - start.excess) - start.tau * expm1_value(moved)
    rise_q = d * risen_q + (q.excess - start_q.excess) - c * start_q.tau * expm1_value(moved)
    peak = torch.where(far, 0.0, rise_q).amax(-1, keepdim=True)
    peak = torch.where(peak > _MODERATE, peak, 0.0).detach()
    log_p, log_q = log_step + rise_p, log_step + (rise_q - peak)
    found = compared(log_p, torch.where(far, log_p, log_q), torch.where(far, 0.0, v + peak))
    return _Found(found, far, _direct(a, b, c, d, p, q, far), p, q)


def _direct(a: Tensor, b: Tensor, c: Tensor, d: Tensor, p: _Side, q: _Side, far: Tensor) -> Tensor:
    """log(p/q) at the points, from q's normaliser; 0 where q isn't far."""
    c, d = torch.where(far, c, 1.0), torch.where(far, d, 1.0)
    # where x or y is no float, what is left of the deviance is linear in its logarithm
    tau, fall = q.tau.clamp(max=600.0), q.fall.clamp(min=_LEAST)
    x, y = torch.exp(-tau), -expm1_value(-tau)
    (of_c, rest_c), (of_d, rest_d), (of_n, rest_n) = gamma_scale(c), gamma_scale(d), gamma_scale(c + d)
    size = torch.minimum(of_c, of_d) * (torch.maximum(of_c, of_d) / of_n)
    rests = rest_c + rest_d - rest_n
    deviance = binomial_deviance(c, d, x, y, -tau, fall) + d * (fall - q.fall) + c * (q.tau - tau)
    log_q = torch.log(size) - rests - deviance + q.excess
    log_p = torch.log(b) + b * p.fall - p.tau + p.excess
    return torch.where(far, log_p - log_q, 0.0)


def _value(*parameters: Tensor) -> Tensor:
    def value(*x: Tensor) -> tuple[Tensor]:
        found = _integrated(*x)
        direct = (found.compared.p * found.direct).sum(-1)
        return (torch.where(found.far.squeeze(-1), direct, found.compared.terms.sum(-1)),)

    return chunked(value, *parameters)[0]


def _gradients(*parameters: Tensor) -> tuple[Tensor, ...]:
    found = _integrated(*parameters)
    a, b, c, d = (x.unsqueeze(-1) for x in parameters)
    mass, p, q, far = found.compared.p, found.p, found.q, found.far.squeeze(-1)
    u = torch.where(found.far, found.direct, found.compared.u)
    weight = mass * (u - (mass * u).sum(-1, keepdim=True))
    by_p = ((weight * x).sum(-1) for x in ((b * p.share - p.tau + p.rise) / a, p.fall))
    c, d = (torch.where(far, x, 1.0) for x in parameters[2:])
    of_n, by_q = digamma(c + d), []
    for x, score in ((c, -q.tau), (d, q.fall)):
        exact = digamma(x) - of_n - (mass * score).sum(-1)
        by_q.append(torch.where(far, exact, -(found.compared.gain * score).sum(-1)))
    return *by_p, *by_q


_kl = scalar_rule(_value, lambda *parameters: chunked(_gradients, *parameters))


@register_hardened(Kumaraswamy, Beta, torch_lacks_it=True)
def kl_kumaraswamy_beta(p: TorchKumaraswamy, q: TorchBeta) -> Tensor:
    """KL of a Kumaraswamy distribution against a Beta, elementwise; see the module."""
    return _kl(p.concentration1, p.concentration0, q.concentration1, q.concentration0)
