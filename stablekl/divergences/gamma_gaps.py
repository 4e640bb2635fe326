r"""Jensen gap of lgamma, and that of the perspective of -log, of which it and its families are sums.

The log-normalisers of Gamma and Dirichlet distributions are sums of two kinds of convex functions,

.. math::
    h(a, b) = a \log(a/b), \qquad g(a) = \log \Gamma(a) - a \log a + a,

and linear ones, which have no gap. For the gaps of `gaps` over 1 - alpha, with
:math:`m = \alpha x + (1 - \alpha) y`, the module evaluates

* `perspective_gap`, of h at (x, b) and (y, c): y min(w, 1) times `log_gap` of order :math:`w = \alpha x/m` from
  log((c/y)/(b/x)), because h is the perspective of -log;

* `lgamma_gap`, of g, which N = 10 times takes one step of the recurrence and then Stirling's series,

  .. math::
      g(a) = h(a + 1, a) - 1 + g(a + 1), \qquad
      g(a) = -\tfrac12 \log a + \text{const} + \sum_k c_k a^{1-2k},

  where the steps are gaps of the first kind, the logarithm's is `log_gap`, and a power's is a divided difference:
  :math:`\alpha (x - y)^2 (x m y)^{-1} h_{2k-2}(1/x, 1/m, 1/y)` for :math:`a^{1-2k}`, with the complete homogeneous
  symmetric polynomial h.

All terms of one sign, but for the c_k of the series, whose first outweighs the others: near and far, within the
interval of x and y and beyond it (alpha > 1), for small arguments and large. What is passed through the steps is the
difference x - y of the caller: that of the shifted arguments has lost its digits. The gap of lgamma itself would be
that of g plus that of a log a, but no family needs it: next to a rate, or to a sum of concentrations, the latter belongs
to the first kind, whose ratio log((c/y)/(b/x)) may be far smaller than the logarithms of c/b and x/y
(`cross_ratio`). Differences of lgamma lose all digits from 1e-8 apart, and at x = 1e6 from 1e-5 apart.

**Accuracy** (float64): 2e-15 relative for x and y from 1e-3 to 1e6, from 1e-12 apart to far, and orders 0 to 3; the
series stops 8e-18 short. Subnormal arguments are beyond it.

References: the recurrence and Stirling's series are 5.5.1 and 5.11.1 of the NIST Digital Library of Mathematical
Functions; C. Loader, "Fast and accurate computation of binomial probabilities" (2000), has the split into deviance and
Stirling's error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._elementwise import product_error
from .gaps import log_gap, log_ratio, times, weights

__all__ = ["cross_ratio", "excess", "lgamma_gap", "mixture", "perspective_gap"]

# B_2k/(2k (2k - 1)), k = 1 ... 7: with them and as many steps, what is left out is 8e-18 of the gap.
_STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156)
_STEPS = 10


def mixture(x: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
    """``alpha x + (1 - alpha) y``, exactly x or y at the ends."""
    return torch.where(alpha <= 1, alpha * x + (1 - alpha) * y, x + (alpha - 1) * (x - y))


def _attached(value: Tensor, smooth: Tensor) -> Tensor:
    """The value with the derivatives of another formula of it."""
    return value.detach() + (smooth - smooth.detach())


# ---- a log(a/b) -------------------------------------------------------------------------------------------------


def excess(p: Tensor, q: Tensor, factor: Tensor) -> Tensor:
    """``p - factor q``, rounded once, without derivatives."""
    p, q, factor = p.detach(), q.detach(), factor.detach()
    product = factor * q
    return (p - product) - product_error(factor, q, product)


def cross_ratio(x: Tensor, y: Tensor, b: Tensor, c: Tensor, factor: Tensor, more_x: Tensor, more_b: Tensor) -> Tensor:
    """log((c/y)/(b/x)) to its own relative accuracy.

    Args:
        x: positive.
        y: positive.
        b: positive.
        c: positive.
        factor: a number near b/c.
        more_x: ``x - factor y``, to its relative accuracy.
        more_b: ``b - factor c``, likewise.
    """
    info = torch.finfo(x.dtype)
    base = factor * y
    change = more_x - more_b / c * y
    quotient = (x / base).detach()
    usable = (factor >= info.tiny) & (factor <= info.max) & (quotient >= info.tiny) & (quotient <= info.max)
    usable = usable & change.isfinite()
    change = torch.where(usable, change, 0.0)
    # The larger of x c and y b over the smaller is 1 plus something that is not negative.
    size = change.abs() / torch.where(usable, torch.where(change > 0, base, x), 1.0)
    near = torch.where(change > 0, torch.log1p(size), -torch.log1p(size))
    smooth = (torch.log(x) - torch.log(b)) - (torch.log(y) - torch.log(c))
    return torch.where(usable, _attached(near, smooth), log_ratio(x, y) - log_ratio(b, c))


def perspective_gap(x: Tensor, y: Tensor, mean: Tensor, ratio: Tensor, alpha: Tensor) -> Tensor:
    """D_alpha for F(a, b) = a log(a/b), at (x, b) and (y, c).

    Args:
        x: positive, float64.
        y: positive.
        mean: `mixture` of x and y, positive.
        ratio: log((c/y)/(b/x)), to its own relative accuracy.
        alpha: the order, not negative; all five broadcast.

    Returns:
        Non-negative values, 0 with gradient 0 where ratio = 0; +inf where the mixture of b and c is not positive.
    """
    order, rest = alpha * x / mean, (1 - alpha) * y / mean
    return times(y * weights(order, rest)[0], log_gap(ratio, order, rest))


# ---- lgamma -----------------------------------------------------------------------------------------------------


def _stepped(x: Tensor, y: Tensor, d: Tensor, mean: Tensor, alpha: Tensor) -> Tensor:
    """The steps of the recurrence and the logarithm of Stirling's series, as one sum of perspectives."""
    steps = torch.arange(_STEPS, dtype=x.dtype, device=x.device)
    x, y, d, mean, alpha = (v.unsqueeze(-1) for v in (x, y, d, mean, alpha))
    falls = d > 0
    a, b = x + steps, y + steps
    size = d.abs() / torch.where(falls, a + 1, b + 1) / torch.where(falls, b, a)
    step = torch.where(falls, -torch.log1p(size), torch.log1p(size))
    end_x, end_y = x + _STEPS, y + _STEPS
    size = d.abs() / torch.where(falls, end_y, end_x)
    last = torch.where(falls, -torch.log1p(size), torch.log1p(size))
    # By these the slope of log(a/(a + 1)) is 1/a/(a + 1), not the difference of 1/a and 1/(a + 1).
    smooth = torch.cat([torch.log1p(1 / a) - torch.log1p(1 / b), torch.log(end_y) - torch.log(end_x)], -1)
    ratio = _attached(torch.cat([step, last], -1), smooth)
    half = torch.full_like(last, 0.5)
    rows = (torch.cat([v + steps + 1, half], -1) for v in (x, y, mean))
    return perspective_gap(*rows, ratio, alpha.expand(ratio.shape)).sum(-1)


def _series(x: Tensor, y: Tensor, mean: Tensor) -> Tensor:
    """sum c_k h_(2k-2)(1/x, 1/mean, 1/y), by the recurrence of the polynomials of one, two and three variables."""
    u, v, w = 1 / x, 1 / mean, 1 / y
    one = two = three = torch.ones_like(u)
    total = _STIRLING[0] * three
    for degree in range(1, 2 * len(_STIRLING) - 1):
        one = one * u
        two = one + v * two
        three = two + w * three
        if degree % 2 == 0:
            total = total + _STIRLING[degree // 2] * three
    return total


def lgamma_gap(x: Tensor, y: Tensor, d: Tensor, mean: Tensor, alpha: Tensor) -> Tensor:
    """D_alpha for F(a) = lgamma(a) - a log a + a.

    Args:
        x: positive, float64.
        y: positive.
        d: x - y, to its own relative accuracy.
        mean: `mixture` of x and y, positive.
        alpha: the order, not negative; all five of one shape.

    Returns:
        Non-negative values, 0 with gradient 0 where d = 0.
    """
    far_x, far_y, far_mean = x + _STEPS, y + _STEPS, mean + _STEPS
    lead = alpha * (d / far_x) * (d / far_y) / far_mean
    return _stepped(x, y, d, mean, alpha) + lead * _series(far_x, far_y, far_mean)
