r"""KL against Laplace distributions, which torch lacks but for the normal: two convex terms of the mean deviation.

For q with location mu and scale b only the mean absolute deviation :math:`A = E_p|X - \mu|` is needed, and with
:math:`G(x) = x - 1 - \log x`

.. math:: KL = G(A/b) + [1 + \log(2 A) - H(p)],

of which the second term is the KL against the Laplace distribution about mu of the best scale, A. In units of p's own
scale:

===================  =========================================================  =================================
p                    A                                                          second term
===================  =========================================================  =================================
Normal(m, s)         s sqrt(2/pi) C, C = e^(-u^2/2) + u sqrt(pi/2) erf(u/2^.5)  1/2 - log(pi/2) + log(C)
Exponential(rate)    [t - 1 + 2 e^-t]/rate, t = rate mu; 1/rate - mu below 0    log(2 rate A)
Gumbel(loc, s)       s [z + gamma + 2 E1(e^z)], z = (loc - mu)/s                log(2 A/s) - gamma
Pareto(scale, a)     scale X/(a - 1); infinite up to a = 1                      log(2 X) + L(-1/a)
Uniform(low, high)   outside: the distance of the middle; a square inside       1 - log(2) + log(4 A/width)
ContinuousBernoulli  by the integral of the distribution function               1 + log(2 A) + e(y)
===================  =========================================================  =================================

Here u = (m - mu)/s, gamma is Euler's constant, E1 the exponential integral, L(z) = z - log(1 + z), and e that of
`_truncated`. For mu above the scale of a Pareto, with t = (mu - scale)/scale, X = (a - 1) t - 1 + 2 (1 + t)^(1 - a).

All of it is positive and of order 1 at the least, so that nothing cancels, and rules are differentiated as they stand,
but for A: its derivative is 1/b, to which G and the second term contribute 1/b - 1/A and 1/A. Where A is below b/2 the
latter two are left out, since log(b/A) digits would cancel; where it is not, the difference is what is small at the
closest q, and is taken as it stands. torch's formula for the normal takes the logarithms apart and multiplies s and
e^(-u^2/2).

Accuracy, float64: 35 ulp at most (Gumbel and Normal, near the closest q, where KL is 0.05 to 0.1; the others 11), in
3,100 to 9,300 sets of parameters of every pair that the precision suite judged against mpmath, of 84,000 to 208,000.
float32: correctly rounded in 3,100 to 4,500 judged sets.

Beta and Gamma distributions are in `shapes_to_laplace`: their mean absolute deviations are incomplete beta and gamma
functions, of which torch has no derivative by the shape, and the former not at all.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._bregman import log_quotient
from ..._elementwise import elementwise, horner
from ...special import _reciprocal_gap_value, _scaled_gap, log_ratio_bregman_value
from .._scalar import attached
from ..continuous_bernoulli import ContinuousBernoulli
from ..exponential import Exponential
from ..gumbel import Gumbel
from ..laplace import Laplace
from ..normal import Normal
from ..pareto import Pareto
from ..uniform import Uniform
from . import _truncated
from ._pieces import minus_log1pmx
from ._rule import register_pair

__all__: list[str] = []

EULER = 0.5772156649015329
_HUGE, _LARGEST = 1e300, 1.7976931348623157e308


def _below(deviation: Tensor, b: Tensor) -> Tensor:
    """Whether the terms 1/A of the derivative are left out."""
    return deviation.detach() < 0.5 * b.detach()


_by_deviation = elementwise(
    lambda a, b, *, lifted=False: torch.where(_below(a, b), 1 / b, _reciprocal_gap_value(a, b)),
    lambda a, b: torch.where(_below(a, b), 0.0, 1 / a / a),
    lambda a, b: -1 / b / b,
)
_scaled = elementwise(log_ratio_bregman_value, _by_deviation, _scaled_gap)
"""G(A/b), without the derivative of -log(A) where `_logarithm` is without it."""


def _logarithm(log: Tensor, of_unit: Tensor | float, deviation: Tensor, b: Tensor) -> Tensor:
    """``log``, the logarithm of a deviation in some unit; ``of_unit`` is that of the unit."""
    below = _below(deviation, b)
    return torch.where(below, attached(log, -of_unit + torch.zeros_like(log)), log)


def _normal(m: Tensor, s: Tensor, mu: Tensor, b: Tensor) -> Tensor:
    d = m - mu
    size = torch.where(d < 0, -d, d)
    u = (size / s).clamp(max=50.0)  # beyond, the deviation is the distance
    # over sqrt(2/pi)
    over = torch.exp(-0.5 * u * u) + math.sqrt(math.pi / 2) * u * torch.erf(math.sqrt(0.5) * u)
    far = size > 40 * s
    deviation = torch.where(far, size, math.sqrt(2 / math.pi) * s * over)
    distance = torch.where(far, size, s)
    log = torch.where(far, 0.5 * math.log(math.pi / 2) + log_quotient(distance, s), torch.log(over))
    return _scaled(deviation, b) + (0.5 - math.log(math.pi / 2)) + _logarithm(log, torch.log(s), deviation, b)


def _back_to_back(t: Tensor) -> Tensor:
    """T - 1 + 2 e^-t for t > 0 and 1 - t elsewhere: the mean distance of a standard exponential from t."""
    inside = t > 0
    r = torch.where(inside, t, 1.0)
    return torch.where(inside, r - 1 + 2 * torch.exp(-r), 1 - t)


def _exponential(rate: Tensor, mu: Tensor, b: Tensor) -> Tensor:
    t = rate * mu
    huge, fast = t.isinf(), rate > 1  # t overflows for large rates alone
    x = _back_to_back(torch.where(huge, 1.0, t))
    size = torch.where(huge, mu.abs(), 1.0)
    deviation = torch.where(fast, torch.where(huge, size, x / rate), x)
    log = torch.where(huge, torch.log(size) + torch.log(rate) + math.log(2), math.log(2) + torch.log(x))
    scale = torch.where(fast, b, rate * torch.where(fast, 1.0, b))
    unit = -torch.log(torch.where(fast, rate, 1.0))
    return _scaled(deviation, scale) + _logarithm(log, unit, deviation, scale)


# ---- Gumbel -----------------------------------------------------------------------------------------------------

# (-1)^k/((k + 1) (k + 1)!), k = 27 ... 0: E1(x) + log(x) + gamma over x, up to x = 2
_SERIES = tuple((-1) ** k / ((k + 1) * math.factorial(k + 1)) for k in range(27, -1, -1))
_SERIES_REACH = math.log(2)
_FRACTION_DEPTH = 45  # of the continued fraction of E1 from 2 on, where it leaves 1e-15 of E1


def _gumbel_deviation_value(z: Tensor, *, lifted: bool = False) -> Tensor:
    near = z < _SERIES_REACH
    x = torch.exp(torch.where(near, z, 0.0))
    below = 2 * (x * horner(x, _SERIES)) - (z + EULER)
    x = torch.exp(torch.where(near, 1.0, z).clamp(max=7.0))  # e^-1096 is 0
    fraction = x + (2 * _FRACTION_DEPTH + 1)
    for k in range(_FRACTION_DEPTH, 0, -1):
        fraction = x + (2 * k - 1) - k * k / fraction
    return torch.where(near, below, z + EULER + 2 * torch.exp(-x) / fraction)


_gumbel_deviation = elementwise(_gumbel_deviation_value, lambda z: 1 - 2 * torch.exp(-torch.exp(z.clamp(max=7.0))))


def _gumbel(loc: Tensor, s: Tensor, mu: Tensor, b: Tensor) -> Tensor:
    d = (loc - mu).clamp(-_LARGEST, _LARGEST)
    z = d / s
    far = z.abs() > _HUGE  # then the deviation is the distance
    x = _gumbel_deviation(torch.where(far, 1.0, z))
    distance = torch.where(far, d.abs(), s)
    deviation = torch.where(far, distance, x * s)
    log = torch.where(far, log_quotient(distance, s), torch.log(x))
    return _scaled(deviation, b) + (_logarithm(log, torch.log(s), deviation, b) + (math.log(2) - EULER))


# ---- Pareto, Uniform, ContinuousBernoulli -----------------------------------------------------------------------


def _pareto(scale: Tensor, alpha: Tensor, mu: Tensor, b: Tensor) -> Tensor:
    finite = alpha > 1
    a = torch.where(finite, alpha, 2.0)
    beta = a - 1
    d = mu - scale
    t = d / scale
    # beyond, the deviation is the distance
    huge = (t.abs() > _HUGE) | ((beta * t).abs() > _HUGE)
    t = torch.where(huge, 1.0, t)
    inside = t > 0
    r = torch.where(inside, t, 1.0)
    x = torch.where(inside, beta * r - 1 + 2 * torch.exp(-beta * torch.log1p(r)), 1 - beta * t)
    distance = torch.where(huge, d.abs().clamp(max=torch.finfo(d.dtype).max), 1.0)
    log = torch.where(huge, log_quotient(distance, scale) + torch.log(beta) + math.log(2), torch.log(2 * x))
    deviation = torch.where(huge, distance, torch.where(beta > 1, (x / beta) * scale, x * (scale / beta)))
    edge = a < 2
    high, low = torch.where(edge, 2.0, a), torch.where(edge, a, 2.0)
    # 1/a is rounded, a - 1 is not
    shape = torch.where(edge, torch.log(low) - torch.log(low - 1) - 1 / low, minus_log1pmx(-1 / high))
    log = _logarithm(log, torch.log(scale) - torch.log(beta), deviation, b)
    return torch.where(finite, _scaled(deviation, b) + log + shape, torch.inf)


def _uniform(low: Tensor, high: Tensor, mu: Tensor, b: Tensor) -> Tensor:
    # smaller units where differences overflow
    unit = torch.where(torch.maximum(torch.maximum(low.abs(), high.abs()), mu.abs()) > _HUGE, 2.0**-8, 1.0)
    low, high, mu, b = (x * unit.to(x.dtype) for x in (low, high, mu, b))
    width, below, above = high - low, mu - low, high - mu
    inside = (below > 0) & (above > 0)
    squares = 0.5 * (below * (below / width) + above * (above / width))
    distance = torch.where(below < above, -below, -above) + 0.5 * width
    deviation = torch.where(inside, squares, distance)
    log = _logarithm(log_quotient(deviation, width), torch.log(width), deviation, b)
    return _scaled(deviation, b) + ((1 + math.log(2)) + log)


def _truncated_exponential(y: Tensor, mu: Tensor, b: Tensor) -> Tensor:
    # from the end where the density is highest
    falling = y <= 0
    rate = torch.where(falling, -y, y)
    centre = torch.where(falling, mu, 1 - mu)
    mean = _truncated.tail_mean(y)
    inside = (centre > 0) & (centre < 1)
    c = torch.where(inside, centre, 0.5)
    outside = torch.where(centre > 0.5, (centre - 1) + (1 - mean), mean - centre)
    deviation = torch.where(inside, mean - c + 2 * _truncated.integral(rate, c), outside)
    far = rate > 3
    r = torch.where(far, rate, 3.0)
    term = _scaled(deviation, b)
    deviation = torch.where(_below(deviation, b), deviation.detach(), deviation)
    log_far = math.log(2) + (torch.log(r) + torch.log(torch.where(far, deviation, 1.0))) + _truncated.unit_negentropy(r)
    small = torch.where(far, 0.0, y)
    log_near = math.log(2) + torch.log(torch.where(far, 1.0, deviation)) + _truncated.negentropy(small)
    return term + (1 + torch.where(far, log_far, log_near))


kl_continuous_bernoulli_laplace = register_pair(ContinuousBernoulli, Laplace, _truncated_exponential)
kl_exponential_laplace = register_pair(Exponential, Laplace, _exponential)
kl_gumbel_laplace = register_pair(Gumbel, Laplace, _gumbel)
kl_normal_laplace = register_pair(Normal, Laplace, _normal)
kl_pareto_laplace = register_pair(Pareto, Laplace, _pareto)
kl_uniform_laplace = register_pair(Uniform, Laplace, _uniform)
