r"""What two negative binomial distributions of one mean and different counts differ by, as a positive integral.

Let X have the count r, the mean m and the generating function :math:`M(t) = E e^{-tX} = (1 + m u/r)^{-r}`,
:math:`u = 1 - e^{-t}`, and let q have the count s and the same mean. Malmsten's integral of log Gamma(x + s) - log
Gamma(s), whose expectation needs M alone, and Frullani's of what else depends on s, make of the cross entropy

.. math:: -E \log q(X) = \text{const} + \int_0^\infty e^{-st}\, W(t)\, \frac{dt}{t}, \qquad
          W(t) = \frac{1 - M(t)}{u} - \frac{1 - e^{-mt}}{t}.

It is stationary at s = r, so :math:`\int e^{-rt} W dt = 0`: W is negative up to one point :math:`t_0` and positive
beyond (seen wherever it was looked at, and not relied on but for accuracy). With :math:`\delta = s - r` and
:math:`k(t) = (e^{-\delta t} - 1 + \delta t)/t`, which rises whatever the sign of delta,

.. math:: KL = \int_0^\infty e^{-rt}\,[k(t) - k(t_0)]\,W(t)\,dt,

a positive integrand, of second order in delta. Without :math:`k(t_0)`, which adds nothing to the integral, the two
sides of :math:`t_0` cancel; without the linear term of k all but :math:`\delta/r` does.

W itself is a difference of two positive terms, of which neither cancels, the Poisson distribution's and the excess of
the variance over it: with :math:`E(x) = e^x - 1 - x`, :math:`L(x) = x - \log(1 + x)`, :math:`v = m u`,
:math:`g = m E(-t)`,

.. math:: W = e^{-v} \frac{g E(v)/v + E(-g)}{t} - e^{-v} \frac{e^{r L(m u/r)} - 1}{u}.

For small counts these two may be large beside W, and the two of its definition are not: the smaller ones are taken.

All of it is analytic and bounded for t in the right half-plane, so the trapezoidal rule in log t converges like
:math:`e^{-\pi^2/h}` whatever the parameters are.

References: 5.9.1 of the NIST Digital Library of Mathematical Functions is the integral of log Gamma.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..special import expm1_value, expm1mx, log1pmx
from ._integrated import chunked

__all__ = ["count_gap", "count_gap_gradient"]

# Points of the rule; the step in log t is 0.1 for moderate parameters, and 0.2 for those 1e24 apart.
POINTS = 512
# The integrand falls like t^2 below its scales, and like t^3 e^-t beyond.
_BELOW, _BEYOND = 20.0, 56.0


class _Nodes(NamedTuple):
    """The points and what the integrand is made of there.

    Attributes:
        t: the points, without derivatives.
        weight: their weights, in t.
        sign_change: the last of them at which W is negative, one for each row; 0 if there is none.
        x: m u/r.
        log: log(1 + x).
        bend: r L(x).
        shift: m E(-t).
        generating: M.
        poisson: e^(-m t).
        u: 1 - e^-t.
        w: W.
    """

    t: Tensor
    weight: Tensor
    sign_change: Tensor
    x: Tensor
    log: Tensor
    bend: Tensor
    shift: Tensor
    generating: Tensor
    poisson: Tensor
    u: Tensor
    w: Tensor


def _nodes(r: Tensor, m: Tensor, s: Tensor) -> _Nodes:
    with torch.no_grad():
        still_r, still_m, still_s = r.detach(), m.detach(), s.detach()
        largest = torch.maximum(torch.maximum(still_r, still_s), torch.maximum(still_m, still_m / still_r))
        low = -torch.log(largest.clamp(min=1.0)) - _BELOW
        high = torch.log(_BEYOND / torch.minimum(still_r, still_s))
        grid = torch.linspace(0.0, 1.0, POINTS, dtype=r.dtype, device=r.device)
        t = torch.exp(low + (high - low) * grid)
        weight = t * ((high - low) / (POINTS - 1))
        u, rise = -expm1_value(-t), expm1mx(-t)
    v, x = m * u, m * u / r
    log, bend, shift = torch.log1p(x), -r * log1pmx(x), m * rise
    generating = torch.exp(-r * log)
    low = v < 2
    near, far = torch.where(low, v, 1.0), torch.where(low, 2.0, v)
    fall = torch.exp(-v)
    convex = torch.where(low, torch.exp(-near) * expm1mx(near), 1 - torch.exp(-far) * (1 + far))
    plus = (shift * (convex / v) + fall * expm1mx(-shift)) / t
    small = bend < 1
    change = torch.where(small, fall * torch.expm1(torch.where(small, bend, 0.0)), generating - fall)
    minus = change / u
    # M is all but 1 for small counts, where what is large beside W are these two
    tall, wide = -expm1_value(-r * log) / u, -expm1_value(-m * t) / t
    w = torch.where(plus + minus < tall + wide, plus - minus, tall - wide)
    last = torch.where(w < 0, t, 0.0).detach().amax(-1, keepdim=True)
    return _Nodes(t, weight, last, x, log, bend, shift, generating, torch.exp(-m * t), u, w)


def _gain(at: _Nodes, r: Tensor, s: Tensor, d: Tensor) -> Tensor:
    """e^(-rt) [k(t) - k(t_0)]."""
    start = at.sign_change
    some = start > 0
    safe = torch.where(some, start, 1.0)
    fall = torch.exp(-r * at.t)
    # for s >> r k is nearly constant: its rest, (1 - e^(-dt))/t, is not
    flat = (d * start > 1) & some
    rest = torch.expm1(-torch.where(flat, d, 1.0) * at.t) / at.t - torch.expm1(-torch.where(flat, d, 1.0) * safe) / safe
    own = torch.where(some, expm1mx(-d * safe) / safe, 0.0)
    # for s << r k may overflow where e^(-rt) k does not
    y = -d * at.t
    large = y > 1
    grown = (torch.exp(-s * at.t) - fall * (1 + y)) / at.t
    plain = torch.where(large, grown, fall * expm1mx(torch.where(large, 0.0, y)) / at.t) - fall * own
    return torch.where(flat, fall * rest, plain)


def _columns(*x: Tensor) -> tuple[Tensor, ...]:
    return tuple(v.unsqueeze(-1) for v in x)


def _value(r: Tensor, m: Tensor, s: Tensor, d: Tensor) -> tuple[Tensor]:
    r, m, s, d = _columns(r, m, s, d)
    at = _nodes(r, m, s)
    return ((at.weight * _gain(at, r, s, d) * at.w).sum(-1),)


def count_gap(r: Tensor, m: Tensor, s: Tensor, d: Tensor) -> Tensor:
    """KL between negative binomial distributions of counts r and s and of the mean m, positive numbers; d = s - r."""
    return chunked(_value, r, m, s, d)[0]


def _gradient(r: Tensor, m: Tensor, s: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    r, m, s, d = _columns(r, m, s, d)
    at = _nodes(r, m, s)
    gain = at.weight * _gain(at, r, s, d)
    # e^(-rt) [e^(-d t_0) - e^(-dt)]
    lag = d * (at.t - at.sign_change)
    close = lag.abs() < 1
    near = -torch.exp(-r * at.t - d * at.sign_change) * torch.expm1(-torch.where(close, lag, 0.0))
    far = torch.exp(-r * at.t - d * at.sign_change) - torch.exp(-s * at.t)
    by_s = (at.weight * torch.where(close, near, far) * at.w).sum(-1)
    # M/(1 + x) - e^(-mt)
    y = at.shift + at.bend - at.log
    close = y.abs() < 1
    near = at.poisson * torch.expm1(torch.where(close, y, 0.0))
    by_m = (gain * torch.where(close, near, at.generating / (1 + at.x) - at.poisson)).sum(-1)
    # log(1 + x) - x/(1 + x) = x^2/(1 + x) - L(x)
    small = at.x < 1
    x = torch.where(small, at.x, 0.0)
    slope = torch.where(small, x * x / (1 + x) + log1pmx(x), at.log - at.x / (1 + at.x))
    # of e^(-rt) [k(t) - k(t_0)] the derivative is -e^(-rt) (t - t_0) (1 - e^(-d t_0))/t_0
    start = at.sign_change
    some = start > 0
    safe = torch.where(some, start, 1.0)
    rate = torch.where(some, -torch.expm1(-d * safe) / safe, d)
    turned = torch.exp(-r * at.t) * (at.t - start) * at.w
    by_r = (gain * at.generating * slope / at.u - at.weight * rate * turned).sum(-1)
    return by_r, by_m, by_s


def count_gap_gradient(r: Tensor, m: Tensor, s: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    """Its partial derivatives by r, m and s, differentiable."""
    return chunked(_gradient, r, m, s, d)
