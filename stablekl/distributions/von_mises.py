r"""Von Mises distributions, and their KL divergence as a sum of non-negative terms.

With the log-normaliser :math:`F(k) = \log I_0(k)`, its derivative :math:`A = I_1/I_0`, the mean of the cosine, and
the Bregman divergence :math:`B(y, x) = F(y) - F(x) - A(x)(y - x)`,

.. math:: KL = B(k_q, k_p) + 2 k_q A(k_p) \sin^2\tfrac{\mu_p - \mu_q}{2}.

* Both concentrations up to M = 64: the midpoint rule with 80 points on the circle is a von Mises distribution to
  1e-22, one of finitely many points: with v = 1 - cos and weights proportional to :math:`e^{-x v}`,
  :math:`B = \log(1 + E[e^g - 1 - g])`, :math:`g = -(y - x)(v - E v)`. No Bessel function is evaluated, and an error of
  the mean costs nothing of first order.
* Both beyond: :math:`F(k) = k - \tfrac12 \log(2 \pi k) + \sum_n c_n k^{-n}`, n up to 12, whose terms have the Bregman
  divergences of -log and of powers, all positive.
* One on each side: :math:`B(y, x) = B(y, M) + B(M, x) + (A(M) - A(x))(y - M)`, positive again.

The difference of values of log I0 loses everything near equal concentrations, and 1 - A/k - A^2, the textbook
derivative of A, 1e8 eps at k = 1e4. A(k) itself is a sum of positive terms, the cosine times the sine of k cos.
The difference of the locations keeps its rounding error, which counts near multiples of two pi.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import VonMises as TorchVonMises

from ..quadrature import table, two_sum
from ..registry import register_hardened
from ..special import expm1_value, expm1mx_value, log_ratio_bregman
from ._base import Checked
from ._density import checked, evaluated
from ._scalar import scalar_rule

__all__ = ["VonMises"]

_BORDER = 64.0
# The upper half of the circle, the points with a positive cosine first: the rest are their mirror images.
_POINTS = 80
_ANGLES = tuple((j + 0.5) * 2 * math.pi / _POINTS for j in range(_POINTS // 4))
_ABOVE = tuple(2 * math.sin(0.5 * a) ** 2 for a in _ANGLES)
_BELOW = tuple(2 * math.cos(0.5 * a) ** 2 for a in _ANGLES)
_COSINES = tuple(math.cos(a) for a in _ANGLES)
# c_1 ... c_12, rational numbers, from n c_n = n a_n - sum_j j c_j a_(n-j) with the coefficients a of I0's own series
_SERIES = (
    *(1 / 8, 1 / 16, 25 / 384, 13 / 128, 1073 / 5120, 103 / 192, 375733 / 229376, 23797 / 4096),
    *(55384775 / 2359296, 2180461 / 20480, 24713030909 / 46137344, 72763141 / 24576),
)


class VonMises(TorchVonMises, Checked):
    """`torch.distributions.VonMises` with a KL divergence, which torch has not.

    Args:
        loc: mean angle in radians, any shape that broadcasts with ``concentration``.
        concentration: positive.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is outside of its domain somewhere (says where).

    Example:
        >>> import torch, stablekl
        >>> p, q = stablekl.VonMises(torch.tensor(0.0), 2.0), stablekl.VonMises(torch.tensor(1e-4), 2.0)
        >>> print(f"{torch.distributions.kl_divergence(p, q):.3e}")
        6.978e-09
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of the density; torch subtracts log I0 from concentration cos, which cancel, by 7 digits of I0."""
        return evaluated(_log_density, checked(self, value), self.loc, self.concentration)


def _log_density(x: Tensor, m: Tensor, k: Tensor) -> Tensor:
    # k cos(x - m) - k, of the half angle
    return -2 * k * torch.sin(0.5 * (x - m)).square() - torch.log(2 * math.pi * torch.special.i0e(k))


# ---- the midpoint rule, for concentrations up to the border ------------------------------------------------------


def _weighted(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights of the points, which sum to 1, their 1 - cos, its mean, and the divisor; x has a last dimension of 1."""
    v = table(_ABOVE + _BELOW, x.device).to(x.dtype)
    w = torch.exp(-x * v)
    total = w.sum(-1, keepdim=True)
    w = w / total
    return w, v, (w * v).sum(-1, keepdim=True), total


def _near(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """B(y, x) and A(y) - A(x)."""
    x, y = x.unsqueeze(-1), y.unsqueeze(-1)
    w, v, mean, total = _weighted(x)
    g = (x - y) * (v - mean)
    # Two roads to w (e^g - 1): far from 0 the rounding of x v and of g would count twice, up to 64 ulp each.
    close = g.abs() < 1
    small = torch.where(close, g, 0.0)
    change = torch.exp(-y * v - (x - y) * mean) / total - w
    change = torch.where(close, w * expm1_value(small), change)
    growth = torch.where(close, w * expm1mx_value(small), change - w * g).sum(-1)
    # under the tilted weights, w e^g, the mean has moved by that of (v - mean), each term of one sign
    return torch.log1p(growth), -((v - mean) * change).sum(-1) / (1 + growth)


def _near_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """A(x), and A'(x) times x where that is above 1."""
    x = x.unsqueeze(-1)
    w, v, mean, _ = _weighted(x)
    cosines = table(_COSINES, x.device).to(x.dtype)
    # a point and its mirror image together: w(c) - w(-c) = w(c) (1 - e^(-2 x c))
    half = w[..., : len(_COSINES)] * cosines * -expm1_value(-2 * x * cosines)
    slope = (w * (v - mean) * (v - mean)).sum(-1)
    return half.sum(-1), slope * x.squeeze(-1).clamp(min=1.0)


# ---- the series, for those beyond --------------------------------------------------------------------------------


def _far(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """B(y, x) and A(y) - A(x)."""
    a, b = 1 / x, 1 / y
    d = y - x
    gap = d / x / y  # a - b
    # The Bregman divergence of k^-n is gap d/x sum_j (j + 1) a^j b^(n-1-j), and n (a^(n+1) - b^(n+1)) the difference.
    weighted, plain, power = torch.ones_like(a), a + b, a
    bregman, slope = torch.zeros_like(a), torch.full_like(a, 0.5)
    for n, c in enumerate(_SERIES, 1):
        bregman = bregman + c * weighted
        slope = slope + n * c * plain
        weighted = b * weighted + (n + 1) * power
        power = power * a
        plain = b * plain + power
    return 0.5 * log_ratio_bregman(y, x) + gap * (d / x) * bregman, gap * slope


def _far_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """A(x) and x A'(x)."""
    a = 1 / x
    short, slope = torch.zeros_like(a), torch.zeros_like(a)
    for n, c in zip(range(len(_SERIES), 0, -1), reversed(_SERIES), strict=True):
        short, slope = a * (n * c + short), a * (n * (n + 1) * c + slope)
    return 1 - a * (0.5 + short), a * (0.5 + slope)


# ---- both ---------------------------------------------------------------------------------------------------------


def _bregman(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """B(y, x) and A(y) - A(x), split where the way from x to y crosses the border."""
    # NaN goes both ways
    near_x, near_y = (torch.where(k > _BORDER, _BORDER, k) for k in (x, y))
    far_x, far_y = (torch.where(k < _BORDER, _BORDER, k) for k in (x, y))
    near, near_rise = _near(near_x, near_y)
    far, far_rise = _far(far_x, far_y)
    crossing = torch.where(y > x, near_rise * (far_y - far_x), far_rise * (near_y - near_x))
    return near + far + crossing, near_rise + far_rise


def _mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """A(x), and A'(x) times x where that is above 1."""
    near = _near_mean(torch.where(x < _BORDER, x, _BORDER))
    far = _far_mean(torch.where(x > _BORDER, x, _BORDER))
    value, slope = (torch.where(x < _BORDER, a, b) for a, b in zip(near, far, strict=True))
    return value, slope


def _turned(mu_p: Tensor, mu_q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sine and cosine of half of the difference of the locations, which is not rounded, and of all of it."""

    def turn(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        d, error = two_sum(x, -y)
        sine, cosine = torch.sin(d), torch.cos(d)
        # beyond 2^50 the error of d is no small angle
        less, most = torch.sin(error), torch.cos(error)
        return sine * most + cosine * less, cosine * most - sine * less

    overflows = (mu_p - mu_q).isinf()
    half = turn(0.5 * mu_p, 0.5 * mu_q)
    whole = turn(*(torch.where(overflows, 0.0, x) for x in (mu_p, mu_q)))
    sine = torch.where(overflows, 2 * half[0] * half[1], whole[0])
    return *half, sine, torch.where(overflows, 1 - 2 * half[0] * half[0], whole[1])


def _value(mu_p: Tensor, k_p: Tensor, mu_q: Tensor, k_q: Tensor) -> Tensor:
    sine, *_ = _turned(mu_p, mu_q)
    value = _bregman(k_p, k_q)[0] + (k_q * sine) * _mean(k_p)[0] * (2 * sine)
    return torch.where(torch.minimum(k_p, k_q) < 0, torch.nan, value)


def _gradient(mu_p: Tensor, k_p: Tensor, mu_q: Tensor, k_q: Tensor) -> tuple[Tensor, ...]:
    half, _, sine, cosine = _turned(mu_p, mu_q)
    mean, slope = _mean(k_p)
    turn = 2 * half * half
    across = turn > 0.5
    # in units of k_p where it is large: A' is no float then, nor need the sum be
    unit = torch.where(k_p < 1, 1.0, k_p)
    by_p = torch.where(across, k_p / unit - k_q / unit * cosine, (k_p - k_q) / unit + k_q / unit * turn)
    by_p = slope * by_p
    by_q = torch.where(across, _mean(k_q)[0] - mean * cosine, _bregman(k_p, k_q)[1] + mean * turn)
    by_mu = k_q * mean * sine
    return by_mu, by_p, -by_mu, by_q


_kl = scalar_rule(_value, _gradient)


@register_hardened(VonMises, VonMises)
def kl_von_mises_von_mises(p: TorchVonMises, q: TorchVonMises) -> Tensor:
    """KL between von Mises distributions, elementwise; see the module."""
    return _kl(p.loc, p.concentration, q.loc, q.concentration)
