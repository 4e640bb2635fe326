r"""Derivatives of the divergence from a distribution of mean m and variance v to a normal one.

Of :math:`KL = J + (m - \mu)^2/(2 s^2) + [v/s^2 - 1 - \log(v/s^2)]/2` with :math:`M = m - \mu` and
:math:`D = v - s^2`, both known to all their digits, by a parameter of p and by those of q,

.. math::
    \partial_\theta KL = J_\theta + \frac{M}{s^2} m_\theta + \frac{D}{2 s^2} (\log v)_\theta, \qquad
    \partial_\mu KL = -\frac{M}{s^2}, \qquad \partial_s KL = -\frac{M^2 + D}{s^3}.

Autograd through the textbook form cancels where the moments of p are nearly those of q, and its parts leave the range
of floats where these do not: here numbers have an exponent of their own (`_scaled`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._double import Double
from ..._scaled import Scaled, power_of_two, scaled, shifted, where
from ..._wide import Wide, attached, difference, exp, product, total, wide
from .._scalar import attached as carried

__all__ = ["Slopes", "added", "normal_slopes", "powers", "summed"]


# From here on e^w and e^-w have derivatives no more, but those that are written down.
_BEYOND = 600.0


class Slopes(NamedTuple):
    """What the derivatives consist of.

    Attributes:
        by_mean: M/s^2.
        by_log_variance: D/(2 s^2).
        by_q: the derivatives by mu and by s.
    """

    by_mean: Scaled
    by_log_variance: Scaled
    by_q: tuple[Tensor, Tensor]


def normal_slopes(
    mean: Wide, variance: Wide, smooth_mean: Scaled, smooth_variance: Scaled, mu: Tensor, s: Tensor
) -> Slopes:
    """From the moments without derivatives, and the same with derivatives, which may have lost digits."""
    still = wide(s.detach())
    shift, gap = difference(mean, wide(mu.detach())), difference(variance, product(still, still))
    scale = scaled(s)
    square = scale * scale
    smooth_shift, smooth_gap = added(smooth_mean, -scaled(mu)), added(smooth_variance, -square)
    both = attached(total(product(shift, shift), gap), added(smooth_shift * smooth_shift, smooth_gap))
    by_mean = attached(shift, smooth_shift) / square
    lag = attached(gap, smooth_gap) / square
    by_s = -(both / square / scale).rounded()
    return Slopes(by_mean, Scaled(lag.mantissa, lag.exponent - 1), (-by_mean.rounded(), by_s))


def added(*terms: Scaled) -> Scaled:
    """The sum, in which a term that is 0 keeps its derivatives: by the operator + of `Scaled` it would lose them."""
    top = torch.full_like(terms[0].exponent, -torch.inf)
    for x in terms:
        top = torch.maximum(top, torch.where(x.mantissa == 0, -torch.inf, x.exponent))
    for x in terms:
        top = torch.where(top == -torch.inf, x.exponent, top)
    total = torch.zeros_like(top)
    for x in terms:
        total = total + x.mantissa * power_of_two(x.exponent - top)
    return Scaled(total, top)


def summed(*terms: Scaled) -> Tensor:
    """The sum as a float."""
    return added(*terms).rounded()


class Powers(NamedTuple):
    """Of w.

    Attributes:
        less_one: e^w - 1.
        exp: e^w.
    """

    less_one: Scaled
    exp: Scaled


def powers(w: Double, smooth: Tensor) -> Powers:
    """With the derivatives of ``smooth`` for w."""
    low, power = w.hi < 1, exp(w)
    value = Scaled(power.number.hi, power.exponent)
    rise = value + scaled(-torch.ones_like(smooth))
    less = where(low, scaled(torch.expm1(torch.where(low, w.hi, 0.0))), rise)
    moving = torch.where(w.hi.abs() < _BEYOND, smooth, 0.0)
    slope = shifted(value.mantissa, value.exponent - less.exponent)
    return Powers(
        Scaled(carried(less.mantissa, slope * moving), less.exponent),
        Scaled(carried(value.mantissa, value.mantissa * moving), value.exponent),
    )
