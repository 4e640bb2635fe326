r"""What two binomial distributions of one mean and different numbers of trials differ by, as positive integrals.

Let X have n trials of probability p, c = 1 - p and the mean m = n p, and let q have N > n trials and the same mean.
With Malmsten's integral of log Gamma(N + 1) - log Gamma(N + 1 - X), whose expectation needs the generating function
alone, and Frullani's of the logarithms, and :math:`\delta = N - n`,

.. math:: KL = \int_0^\infty W(t)\, k(t)\, dt, \qquad k(t) = \frac{1 - e^{-\delta t}}{t},

.. math:: W = \frac{e^{-nct} - e^{-nt}}{t} - \frac{(1 - c y)^n - e^{-nt}}{e^t - 1}, \qquad y = 1 - e^{-t}.

W is positive up to one point :math:`t_0` and negative beyond, if anywhere, and k falls. The two sides cancel where the
distributions are all but alike; its integral does not vanish, for a binomial distribution ends, but is small:

.. math:: \int_0^\infty W\,dt = \sum_{j>n} \frac{p^j}{j} = p^{n+1} \int_0^\infty \frac{e^{-(n+1)t}}{c + p y}\,dt = T,
          \qquad KL = \int_0^\infty W(t)\,[k(t) - k(t_0)]\,dt + k(t_0)\,T,

all positive. W is a difference of two positive terms, which must not cancel but about :math:`t_0`. With
:math:`E(x) = e^x - 1 - x`, :math:`L(x) = x - \log(1 + x)` and :math:`\ell = \log(1 - cy) + ct \ge 0`,

.. math:: e^{nct} (e^t - 1) W = (1 - e^{-mt}) \frac{E(t)}{t} - (e^{n\ell} - 1)
          = e^a (1 - e^{-b}) - E(a) - \frac{E(t)\,E(-mt)}{t},

a = m E(t), b = n L(p (e^t - 1)): the former where p is no small number, of which all but a part p of either term
cancels, and the latter, of the Poisson distribution and what its variance exceeds the binomial's by, where it is.

All of it is analytic and bounded for t in the right half-plane, so the trapezoidal rule in log t converges like
:math:`e^{-\pi^2/h}`. Derivatives are by p; the numbers of trials are whole and have none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..special import expm1mx, log1pmx
from ._integrated import chunked

__all__ = ["trial_gap", "trial_gap_slope"]

POINTS = 640
# The integrands fall like t below their scales, and like e^-t and e^-nct, or for c = 0 like 1/t, beyond.
_BELOW, _BEYOND, _SLOW = 38.0, 56.0, 42.0
_HUGE = 60.0


def _points(n: Tensor, c: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
    """Points and weights in t."""
    with torch.no_grad():
        low = -torch.log(n + more) - _BELOW
        high = torch.log(_BEYOND / (n * c.detach()).clamp(max=1.0)).clamp(max=_SLOW)
        grid = torch.linspace(0.0, 1.0, POINTS, dtype=n.dtype, device=n.device)
        t = torch.exp(low + (high - low) * grid)
        return t, t * ((high - low) / (POINTS - 1))


def _log_power(t: Tensor, p: Tensor, c: Tensor) -> Tensor:
    """log(1 - c y), which for large t is that of p + c e^-t."""
    near = t < 0.5
    return torch.where(near, torch.log1p(c * torch.expm1(-torch.where(near, t, 0.0))), torch.log(p + c * torch.exp(-t)))


def _bend(t: Tensor, p: Tensor, c: Tensor) -> Tensor:
    """The l of the module's head; p (e^t - 1) - p t, less L, for p up to 1/2, where c y + c t loses its digits."""
    y = -torch.expm1(-t)
    low = (p < 0.5) & (t < _HUGE)
    w = p * torch.expm1(torch.where(low, t, 0.0))
    by_p = p * expm1mx(torch.where(low, t, 0.0)) + log1pmx(torch.where(low, w, 0.0))
    near = t < 1
    by_c = c * expm1mx(torch.where(near, -t, 0.0)) + log1pmx(torch.where(near, -c * y, 0.0))
    by_c = torch.where(near, by_c, _log_power(t, p, c) + c * t)
    return torch.where(low, by_p, by_c)


def _difference(t: Tensor, n: Tensor, p: Tensor, c: Tensor) -> Tensor:
    """W."""
    m = n * p
    w = torch.expm1(t)
    fall, small = torch.exp(-n * c * t), t < 1
    excess = torch.where(small, expm1mx(torch.where(small, t, 0.0)) / torch.where(small, w, 1.0), 1 - t / w) / t
    bend = n * _bend(t, p, c)
    low = bend < 1
    rise = torch.where(low, fall * torch.expm1(torch.where(low, bend, 0.0)), torch.exp(n * _log_power(t, p, c)) - fall)
    plain = -fall * torch.expm1(-m * t) * excess - rise / w
    a = m * expm1mx(torch.where(t < _HUGE, t, 0.0))
    poisson = (p < 0.5) & (a < 1) & (t < _HUGE)
    s, a = torch.where(poisson, t, 1.0), torch.where(poisson, a, 0.0)
    b = -n * log1pmx(p * torch.expm1(s))
    other = -torch.exp(a) * torch.expm1(-b) - expm1mx(a) - expm1mx(s) * expm1mx(-m * s) / s
    return torch.where(poisson, fall * other / torch.expm1(s), plain)


def _kernel(t: Tensor, w: Tensor, n: Tensor, c: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
    """The values k(t) - k(t_0) and k(t_0)."""
    with torch.no_grad():
        # where hardly any trial fails nothing cancels, and the sum T may be infinite
        some = ((w < 0).any(-1, keepdim=True)) & (n * c > 1)
        start = torch.where(some, torch.where(w < 0, t, torch.inf).amin(-1, keepdim=True), 1.0)
        own = torch.where(some, -torch.expm1(-more * start) / start, 0.0)
        plain = -torch.expm1(-more * t) / t - own
        # k is delta - E(-delta t)/t
        close = some & (more * start < 1)
        bent = expm1mx(-more * start) / start - expm1mx(-more * t) / t
        return torch.where(close, bent, plain), own


def _tail(t: Tensor, weight: Tensor, n: Tensor, p: Tensor, c: Tensor) -> Tensor:
    """T."""
    terms = torch.exp(-(n + 1) * t) / (c - p * torch.expm1(-t))
    return torch.exp((n + 1) * torch.log(p)).squeeze(-1) * (weight * terms).sum(-1)


def _columns(*x: Tensor) -> tuple[Tensor, ...]:
    return tuple(v.unsqueeze(-1) for v in x)


def _value(n: Tensor, p: Tensor, c: Tensor, more: Tensor) -> tuple[Tensor]:
    n, p, c, more = _columns(n, p, c, more)
    t, weight = _points(n, c, more)
    w = _difference(t, n, p, c)
    gain, own = _kernel(t, w, n, c, more)
    return ((weight * gain * w).sum(-1) + torch.where(own > 0, own, 0.0).squeeze(-1) * _tail(t, weight, n, p, c),)


def trial_gap(n: Tensor, p: Tensor, c: Tensor, more: Tensor) -> Tensor:
    """KL of n trials of probability p = 1 - c against n + more trials of one mean, positive; without derivatives."""
    return chunked(_value, n, p, c, more)[0]


def _slope(n: Tensor, p: Tensor, c: Tensor, more: Tensor) -> tuple[Tensor]:
    n, p, c, more = _columns(n, p, c, more)
    t, weight = _points(n, c, more)
    gain, own = _kernel(t, _difference(t, n, p, c).detach(), n, c, more)
    # n [e^-nct - e^-t (1 - c y)^(n-1)], the exponents' difference being (n - 1) l - p t
    bend = (n - 1) * _bend(t, p, c) - p * t
    low = bend < 1
    fall = torch.exp(-n * c * t)
    far = torch.exp((n - 1) * _log_power(t, p, c) - t) - fall
    by_p = -n * torch.where(low, fall * torch.expm1(torch.where(low, bend, 0.0)), far)
    some = own > 0
    tail = torch.where(some, own * torch.exp(n * torch.log(p)) / torch.where(some, c, 1.0), 0.0)
    return ((weight * gain * by_p).sum(-1) + tail.squeeze(-1),)


def trial_gap_slope(n: Tensor, p: Tensor, c: Tensor, more: Tensor) -> Tensor:
    """Its derivative by p, differentiable."""
    return chunked(_slope, n, p, c, more)[0]
