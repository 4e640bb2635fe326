r"""Student's t distributions, and their KL divergence by a sum of non-negative terms at fixed points.

:math:`E_p \log(1 + t_q^2/\nu_q)` has no closed form (Villa and Rubio, 2018, have one for special pairs), and the
differences of digamma and lgamma around it cancel near p = q. The divergence is the sum of `_integrated` at points made
for both densities, with

.. math:: v = -\frac{\nu_p - \nu_q}{2} \log(1 + y_p) + \frac{\nu_q + 1}{2} \log(1 + z),
    \qquad y = t^2/\nu, \quad 1 + z = \frac{1 + y_q}{1 + y_p},

z from the differences of the parameters. Many degrees of freedom make both terms all but opposite: there the Gaussian
part is split off, and with :math:`L(y) = y - \log(1 + y)`

.. math:: v = \tfrac12 (t_q^2 - t_p^2) + \tfrac12 (y_q - y_p)
    - \tfrac12 [(\nu_q + 1)(y_p z + L(z)) - (\nu_p - \nu_q) L(y_p)].

A derivative has several equal forms; the one is taken whose terms cancel least (`surest`): the covariance with a score
alone has no digit left where p is narrow and q wide.

Accuracy, float64: 6 ulp at the worst input (97, before it was mended) of searches of 12,000 parameter sets between
1e-12 and 1e12, of which mpmath judged 100. Gradients have no bound where they change sign, and by tiny degrees of
freedom that are nearly equal (1e11 ulp at 1e-12). float32: both are correctly rounded.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import StudentT as TorchStudentT

from .._bregman import lgamma_change
from .._deviance import gamma_scale
from ..registry import register_hardened
from ..special import log1pmx
from ._base import Checked
from ._density import checked, evaluated
from ._integrated import Comparison, Points, Sum, chunked, compared, points, summed, surest
from ._scalar import attached, scalar_rule

__all__ = ["StudentT"]

# Degrees of freedom from which on the Gaussian part is split off.
_GAUSSIAN = 16.0
# Width of the singularities in units of the scale, squared, where there are many degrees of freedom: those of the
# density lie further away than its mass.
_WIDTH = 6.0
# p and q are compared by the differences of their parameters up to such distances, in widths.
_CLOSE = 4.0
# Exponent of the smallest mass that counts.
_NOTHING = 44.0
# Beyond this asinh of x, x itself may overflow: 1 + y is y, and a shift of x does not show.
_HUGE = 300.0


class StudentT(TorchStudentT, Checked):
    """`torch.distributions.StudentT` with a KL divergence, which torch has not.

    Args:
        df: degrees of freedom, positive, any shape that broadcasts with the others.
        loc: median.
        scale: positive; not the standard deviation.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is outside of its domain somewhere (says where).

    Example:
        >>> import torch, stablekl
        >>> p, q = stablekl.StudentT(torch.tensor(3.0), 0.0, 1.0), stablekl.StudentT(torch.tensor(3.0), 1e-4, 1.0)
        >>> print(f"{torch.distributions.kl_divergence(p, q):.3e}")
        3.333e-09
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of the density, without a difference of two lgammas of many degrees of freedom."""
        return evaluated(_log_density, checked(self, value), self.df, self.loc, self.scale)

    def entropy(self) -> Tensor:
        """The entropy, without differences of digammas and of lgammas of many degrees of freedom."""
        return evaluated(_entropy, self.df, self.scale)


def _level(half: Tensor) -> Tensor:
    """The difference log Gamma(h + 1/2) - log Gamma(h) - log(h)/2."""
    far = half >= _GAUSSIAN
    large, small = torch.where(far, half, _GAUSSIAN), torch.where(far, 1.0, half)
    series = large * log1pmx(0.5 / large) + (gamma_scale(large + 0.5)[1] - gamma_scale(large)[1])
    direct = torch.lgamma(small + 0.5) - torch.lgamma(small) - 0.5 * torch.log(small)
    return torch.where(far, series, direct)


def _entropy(df: Tensor, s: Tensor) -> Tensor:
    half, step = 0.5 * df, torch.full_like(df, 0.5)
    # digamma(h + 1/2) - digamma(h)
    rise = torch.log1p(0.5 / half) + lgamma_change(half + 0.5, half, step)
    return (half + 0.5) * rise - _level(half) + torch.log(s * math.sqrt(2 * math.pi))


def _log_density(x: Tensor, df: Tensor, m: Tensor, s: Tensor) -> Tensor:
    z = ((x - m) / s).abs()
    huge = z > 1e100
    near = torch.where(huge, 0.0, z)
    log = torch.where(huge, 2 * torch.log(torch.where(huge, z, 1.0)) - torch.log(df), torch.log1p(near / df * near))
    return _level(0.5 * df) - torch.log(s * math.sqrt(2 * math.pi)) - 0.5 * (df + 1) * log


class _Side(NamedTuple):
    """One density at the points, as a function of its parameters with the points held fixed.

    Attributes:
        log: log(1 + y), y = t^2/df.
        tangent: sign(t) sqrt(y/(1 + y)).
        secant: 1/sqrt(1 + y).
        t: (x - loc)/scale, 0 where it is huge.
        y: its square over df, likewise.
        root: sqrt(df) scale.
        log_rest: log of sqrt(1 + y)/cosh of the angle, without derivatives.
    """

    log: Tensor
    tangent: Tensor
    secant: Tensor
    t: Tensor
    y: Tensor
    root: Tensor
    log_rest: Tensor


def _width(df: Tensor, scale: Tensor) -> Tensor:
    return scale * torch.sqrt(df * (_WIDTH / (df + _WIDTH)))


def _side(angle: Tensor, df: Tensor, loc: Tensor, scale: Tensor) -> _Side:
    still_df, still_scale = df.detach(), scale.detach()
    width = _width(still_df, still_scale)
    huge = angle.abs() > _HUGE
    sign = torch.where(angle < 0, -1.0, 1.0)
    t = (width * torch.sinh(torch.where(huge, 0.0, angle)) - (loc - loc.detach())) / scale
    root = torch.sqrt(df) * scale
    y = t * t / df
    secant = torch.rsqrt(1 + y)
    far = 2 * (angle.abs() + torch.log(0.5 * width / root))
    shrunk = torch.exp(-2 * angle.abs())
    flat = width / (torch.sqrt(still_df) * still_scale) * (1 - shrunk)
    log_rest = 0.5 * torch.log((4 * shrunk + flat * flat) / ((1 + shrunk) * (1 + shrunk)))
    return _Side(
        torch.where(huge, far, torch.log1p(y)),
        torch.where(huge, sign, t / torch.sqrt(df) * secant),
        torch.where(huge, 0.0, secant),
        t,
        y,
        root,
        log_rest,
    )


def _still(x: Tensor) -> Tensor:
    """0, with the derivatives of x."""
    return x - x.detach()


def _difference(
    p: _Side, q: _Side, at: Points, df_p: Tensor, loc_p: Tensor, scale_p: Tensor, df_q: Tensor, loc_q: Tensor,
    scale_q: Tensor,
) -> Tensor:  # fmt: skip
    """The logarithm of the ratio of the unnormalised densities."""
    shift, more = loc_p - loc_q, df_p - df_q
    # each side by itself; what both have of the first power of 1 + y is taken from the angles
    common = (q.log_rest - p.log_rest - at.log_cosh_ratio) + 0.5 * (_still(q.log) - _still(p.log))
    apart = 0.5 * (df_q * q.log - df_p * p.log) + common
    a_p, a_q = _width(df_p, scale_p).detach(), _width(df_q, scale_q).detach()
    close = (shift.abs() < _CLOSE * torch.minimum(a_p, a_q)) & (a_p < _CLOSE * a_q) & (a_q < _CLOSE * a_p)
    close = close & (more.abs() < torch.minimum(df_p, df_q))

    wider = (more * scale_p * scale_p + df_q * (scale_p - scale_q) * (scale_p + scale_q)) / (p.root + q.root)
    step = (shift * p.secant + p.tangent * wider) / q.root
    z = step * (step + 2 * p.tangent)
    usable = close & (z > -0.75)
    near = 0.5 * ((df_q + 1) * torch.log1p(torch.where(usable, z, 0.0)) - more * p.log)

    gaussian = (df_p > _GAUSSIAN) & (df_q > _GAUSSIAN) & (p.y < 2) & usable
    t = torch.where(gaussian, p.t, 0.0)
    y = torch.where(gaussian, p.y, 0.0)
    step = (shift + t * (scale_p - scale_q)) / scale_q
    squares = step * (step + 2 * t)
    rise = squares / df_q + y * more / df_q
    z = torch.where(gaussian, rise / (1 + y), 0.0)
    bend = (df_q + 1) * (y * z - log1pmx(z)) + more * log1pmx(y)
    split = 0.5 * (squares + rise - bend)
    return torch.where(gaussian, split, torch.where(usable, near, apart))


def _integrated(*parameters: Tensor) -> tuple[Comparison, _Side, _Side]:
    df_p, loc_p, scale_p, df_q, loc_q, scale_q = parameters = tuple(x.unsqueeze(-1) for x in parameters)
    a_p, a_q = _width(df_p, scale_p), _width(df_q, scale_q)
    reach = []
    for df, scale, other in ((df_p, scale_p, df_q), (df_q, scale_q, df_p)):
        # log(1 + y) at which the density has fallen so far, or its product with the logarithm of the other's
        power = 2 * (_NOTHING + torch.log1p(50 * other)) / df
        reach.append(0.5 * (torch.log(df) + power + torch.log(-torch.expm1(-power))) + torch.log(scale))
    furthest = torch.maximum(torch.sqrt(df_p) * scale_p, torch.sqrt(df_q) * scale_q)
    at = points(loc_p - loc_q, a_p, a_q, furthest, torch.maximum(*reach))
    p, q = _side(at.one, df_p, loc_p, scale_p), _side(at.two, df_q, loc_q, scale_q)
    # dx/ds = 1/(1/(a_p cosh) + 1/(a_q cosh)), over sqrt(1 + y)
    share_p = torch.log(1 + (a_p / a_q).detach() * torch.exp(at.log_cosh_ratio))
    share_q = torch.log(1 + (a_q / a_p).detach() * torch.exp(-at.log_cosh_ratio))
    log_p = at.log_step - share_p - p.log_rest - 0.5 * (df_p * p.log + _still(p.log))
    log_q = at.log_step - share_q - q.log_rest - 0.5 * (df_q * q.log + _still(q.log)) + torch.log(a_q / a_p).detach()
    return compared(log_p, log_q, _difference(p, q, at, *parameters)), p, q


def _value(*parameters: Tensor) -> Tensor:
    return chunked(lambda *x: (_integrated(*x)[0].terms.sum(-1),), *parameters)[0]


def _by_df(side: _Side, df: Tensor) -> Tensor:
    """The derivative of the log-density by df, up to what does not depend on x."""
    square = side.tangent * side.tangent
    inner = square < 0.5
    bend = torch.where(inner, log1pmx(-torch.where(inner, square, 0.0)), square - side.log)
    return 0.5 * (bend + square / df)


def _gradients(*parameters: Tensor) -> tuple[Tensor, ...]:
    """By the scores at the points; what else equals a derivative may cancel less.

    The divergence does not change with both locations, nor with the scales and the distance in proportion; the mean of
    a score under its own density is 0; and a constant may be added to a score.
    """
    found, p, q = _integrated(*parameters)
    df_p, loc_p, scale_p, df_q, loc_q, scale_q = (x.unsqueeze(-1) for x in parameters)
    weight = found.p * (found.u - found.terms.sum(-1, keepdim=True))
    sides = (p, df_p, scale_p), (q, df_q, scale_q)
    by_loc_p, by_loc_q = ((df + 1) * x.tangent * x.secant / x.root for x, df, _ in sides)
    # up to a constant, nothing at the centre, or nothing in the tails
    rise_p, rise_q = ((df + 1) / scale * x.tangent * x.tangent for x, df, scale in sides)
    fall_p, fall_q = (-(df + 1) / scale * x.secant * x.secant for x, df, scale in sides)
    score_q = (df_q * q.tangent * q.tangent - q.secant * q.secant) / scale_q

    loc = surest(summed(weight * by_loc_p), summed(found.gain * by_loc_q), summed(found.p * by_loc_q))
    shift = (loc_p - loc_q).squeeze(-1)
    by_loc = attached(torch.where(shift == 0, 0.0, loc.value), loc.value)  # 0 by symmetry

    minus = surest(*(summed(x) for x in (found.gain * rise_q, found.gain * fall_q, found.p * score_q)))
    plus = surest(summed(weight * rise_p), summed(weight * fall_p))
    s_p, s_q = scale_p.squeeze(-1), scale_q.squeeze(-1)
    of_q = Sum((s_q * minus.value - shift * by_loc) / s_p, (s_q * minus.size + shift.abs() * loc.size) / s_p)
    of_p = Sum((s_p * plus.value + shift * by_loc) / s_q, (s_p * plus.size + shift.abs() * loc.size) / s_q)
    by_scale_p, by_scale_q = surest(plus, of_q).value, -surest(minus, of_p).value

    by_df_p, by_df_q = (weight * _by_df(p, df_p)).sum(-1), -(found.gain * _by_df(q, df_q)).sum(-1)
    return by_df_p, by_loc, by_scale_p, by_df_q, -by_loc, by_scale_q


_kl = scalar_rule(_value, lambda *parameters: chunked(_gradients, *parameters))


@register_hardened(StudentT, StudentT)
def kl_student_t_student_t(p: TorchStudentT, q: TorchStudentT) -> Tensor:
    """KL between Student's t distributions, elementwise; see the module."""
    return _kl(p.df, p.loc, p.scale, q.df, q.loc, q.scale)
