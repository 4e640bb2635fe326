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
that of g plus that of a log a, but no family needs it: next to a rate, or to a sum of concentrations, the latter
belongs to the first kind, whose ratio log((c/y)/(b/x)) may be far smaller than the logarithms of c/b and x/y
(`cross_ratio`). Differences of lgamma lose all digits from 1e-8 apart on.

Gradients are written by hand from differences of g' = digamma - log and of log, which have such sums of their own;
autograd through the sums above loses up to x/y of the digits where x >> y.

**Accuracy** (float64): 2e-15 relative for x and y from 1e-3 to 1e6, from 1e-12 apart to far, and orders 0 to 3; the
series stops 8e-18 short. Beyond alpha = 1 an x that is r times the mixture costs r times that. Subnormal arguments are
out of reach.

References: the recurrence and Stirling's series are 5.5.1 and 5.11.1 of the NIST Digital Library of Mathematical
Functions; C. Loader, "Fast and accurate computation of binomial probabilities" (2000), has the split into deviance and
Stirling's error.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._autograd import rowwise
from .._bregman import STEPS, power_series, stirling_series
from .._elementwise import product_error
from ..special import expm1_value, log1pmx_value
from .gaps import (
    log_gap_value,
    log_mean,
    log_ratio,
    minus_log1pmx,
    over,
    quadratic_ratio,
    quadratic_share,
    times,
    weights,
)

__all__ = ["cross_ratio", "excess", "lgamma_gap", "mixture", "perspective_gap"]

Tensors = tuple[Tensor, ...]

# From here on a remainder is taken from a logarithm that is known to its own accuracy.
_FAR = 0.5


def mixture(x: Tensor, y: Tensor, d: Tensor, alpha: Tensor) -> Tensor:
    """``alpha x + (1 - alpha) y`` with d = x - y, exactly x at alpha = 1 and y at alpha = 0."""
    return torch.where(alpha <= 1, alpha * x + (1 - alpha) * y, x + (alpha - 1) * d)


def _attached(value: Tensor, smooth: Tensor) -> Tensor:
    """The value with the derivatives of another formula of it."""
    return value.detach() + (smooth - smooth.detach())


def _minus_log1pmx_value(x: Tensor) -> Tensor:
    return -log1pmx_value(x)


def _remainder(saved: Tensors | None) -> Callable[[Tensor], Tensor]:
    """L, differentiable where the gradient has to be."""
    return _minus_log1pmx_value if saved is not None or torch.compiler.is_compiling() else minus_log1pmx


# ---- a log(a/b) -------------------------------------------------------------------------------------------------


def excess(p: Tensor, q: Tensor, factor: Tensor) -> Tensor:
    """``p - factor q``, rounded once, without derivatives."""
    p, q, factor = p.detach(), q.detach(), factor.detach()
    product = factor * q
    return (p - product) - product_error(factor, q, product)


def cross_ratio(x: Tensor, y: Tensor, b: Tensor, c: Tensor, factor: Tensor, more_x: Tensor, more_b: Tensor) -> Tensor:
    """log((c/y)/(b/x)) to its own relative accuracy, without derivatives.

    Args:
        x: positive.
        y: positive.
        b: positive.
        c: positive.
        factor: a number near b/c.
        more_x: ``x - factor y``, to its relative accuracy.
        more_b: ``b - factor c``, likewise.
    """
    x, y, b, c = x.detach(), y.detach(), b.detach(), c.detach()
    info = torch.finfo(x.dtype)
    base = factor * y
    change = more_x - more_b / c * y
    quotient = x / base
    usable = (factor >= info.tiny) & (factor <= info.max) & (quotient >= info.tiny) & (quotient <= info.max)
    usable = usable & change.isfinite()
    # The larger of x c and y b over the smaller is 1 plus something that is not negative.
    near = torch.log1p(change.abs() / torch.where(change > 0, base, x))
    return torch.where(usable, torch.where(change > 0, near, -near), log_ratio(x, y) - log_ratio(b, c))


def _perspective_value(x: Tensor, b: Tensor, y: Tensor, c: Tensor, ratio: Tensor, alpha: Tensor) -> Tensors:
    mean = mixture(x, y, x - y, alpha)
    order, rest = alpha * x / mean, (1 - alpha) * y / mean
    return (times(y * weights(order, rest)[0], log_gap_value(ratio, order, rest)),)


def _perspective_gradient(inputs: Tensors, saved: Tensors | None) -> Tensors:
    # With (m, n) the mixture of (x, b) and (y, c): alpha/(1 - alpha) log((x/b)/(m/n)) by x, log((y/c)/(m/n)) by y,
    # -alpha/(1 - alpha) (x/b - m/n) by b, m/n - y/c by c, and by alpha x L(z)/(1 - alpha)^2, z = (b/x)/(n/m) - 1.
    x, b, y, c, ratio, alpha = inputs
    remainder = _remainder(saved)
    if saved is None:
        ratio = _attached(ratio, (torch.log(x) - torch.log(b)) - (torch.log(y) - torch.log(c)))
    spare = 1 - alpha
    m, n = mixture(x, y, x - y, alpha), mixture(b, c, b - c, alpha)
    order, rest = alpha * x / m, spare * y / m
    rises = ratio > 0
    small = torch.where(rises, -ratio, ratio)
    change = expm1_value(small)
    up = torch.where(rises, -change * torch.exp(torch.where(rises, ratio, 0.0)), change)
    down = torch.where(rises, change, -change * torch.exp(torch.where(rises, 0.0, -ratio)))

    inner = rest * up
    near = inner.abs() < _FAR
    inner = torch.where(near, inner, 0.0)
    inside = alpha <= 1
    beyond = torch.log1p(torch.where(inside | near, 0.0, rest * up))
    top = log_mean(ratio, torch.where(inside, order, 1.0), torch.where(inside, rest, 0.0))
    top = torch.where(inside, top, beyond)
    zero = torch.zeros_like(ratio)
    by_log = torch.where(inside, over(top, spare, zero), -over(top, -spare, zero))
    by_change = y / m * torch.where(near, up, 0.0) * (1 - quadratic_ratio(remainder, inner, -1 / 3))
    by_x = alpha * torch.where(near, by_change, by_log)

    outer = order * down
    outer_near = outer.abs() < _FAR
    outer = torch.where(outer_near, outer, 0.0)
    top = torch.where(near, torch.log1p(inner), top)
    by_y = torch.where(outer_near, outer * (1 - quadratic_ratio(remainder, outer, -1 / 3)), top - ratio)

    flow = torch.where(rises, -change * (x / b) * c, change * y) / n
    by_b = -alpha * flow
    by_c = alpha * torch.where(rises, -change * x, change * (y / c) * b) / n
    tau = -flow * (b / x)
    z = spare * tau
    close = z.abs() < _FAR
    z = torch.where(close, z, 0.0)
    square = torch.where(close, tau, 0.0)
    square = x * square * square * quadratic_share(remainder, z, -1 / 3)
    by_order = torch.where(close, square, over(x * (spare * tau + top), spare * spare, zero))
    return by_x, by_b, by_y, by_c, zero, by_order


_perspective_gap = rowwise(_perspective_value, _perspective_gradient)


def perspective_gap(x: Tensor, b: Tensor, y: Tensor, c: Tensor, ratio: Tensor, alpha: Tensor) -> Tensor:
    """D_alpha for F(a, b) = a log(a/b), at (x, b) and (y, c), whose mixture is positive.

    Args:
        x: positive, float64.
        b: positive.
        y: positive.
        c: positive.
        ratio: log((c/y)/(b/x)), to its own relative accuracy; gradients take the way through the others.
        alpha: the order, not negative; all six broadcast.

    Returns:
        Non-negative values of the broadcast shape, 0 with gradient 0 where ratio = 0.
    """
    return _perspective_gap(*torch.broadcast_tensors(x, b, y, c, ratio.detach(), alpha))


# ---- lgamma -----------------------------------------------------------------------------------------------------


def _rows(*tensors: Tensor) -> Tensors:
    """The numbers of the steps, and the tensors with a dimension for them."""
    steps = torch.arange(STEPS, dtype=tensors[0].dtype, device=tensors[0].device)
    return (steps, *(x.unsqueeze(-1) for x in tensors))


def _log_shift(size: Tensor, falls: Tensor) -> Tensor:
    return torch.where(falls, -torch.log1p(size), torch.log1p(size))


def _lgamma_value(x: Tensor, y: Tensor, d: Tensor, alpha: Tensor) -> Tensors:
    mean = mixture(x, y, d, alpha)
    far_x, far_y, far_mean = x + STEPS, y + STEPS, mean + STEPS
    lead = alpha * (d / far_x) * (d / far_y) / far_mean
    rest = lead * stirling_series(1 / far_x, 1 / far_mean, 1 / far_y)

    steps, x, y, d, mean, alpha = _rows(x, y, d, mean, alpha)
    falls = d > 0
    a, b = x + steps, y + steps
    step = _log_shift(d.abs() / torch.where(falls, a + 1, b + 1) / torch.where(falls, b, a), falls)
    last = _log_shift(d.abs() / torch.where(falls, y, x).add(STEPS), falls)
    # The steps and the logarithm of Stirling's series, as perspectives.
    half = torch.full_like(last, 0.5)
    rows_x, rows_y, rows_mean = (torch.cat([v + steps + 1, half], -1) for v in (x, y, mean))
    order, spare = alpha * rows_x / rows_mean, (1 - alpha) * rows_y / rows_mean
    gaps = log_gap_value(torch.cat([step, last], -1), order, spare)
    return (rest + times(rows_y * weights(order, spare)[0], gaps).sum(-1),)


def _slope(u: Tensor, v: Tensor, d: Tensor, remainder: Callable[[Tensor], Tensor]) -> Tensor:
    """[g'(u) - g'(v)]/(u - v), with d = u - v."""
    falls = d > 0
    u, v, d = torch.where(falls, u, v), torch.where(falls, v, u), torch.where(falls, d, -d)
    one, two = 1 / (u + STEPS), 1 / (v + STEPS)
    series = one * two * (0.5 + power_series(one, two)[1])
    steps, u, v, d = _rows(u, v, d)
    u, v = u + steps, v + steps
    # g'(a) - g'(a + 1) = -L(1/a), a difference of which is again one of L and a positive rest
    terms = (quadratic_ratio(remainder, d / (u + 1) / v, -1 / 3) + 1 / u) / (u + 1) / v
    return series + terms.sum(-1)


def _by_order(x: Tensor, m: Tensor, d: Tensor, spare: Tensor, remainder: Callable[[Tensor], Tensor]) -> Tensor:
    """[g(x) - g(m) - g'(m)(x - m)]/(1 - alpha)^2, with m the mixture and d = x - y."""
    far_x, far_m = x + STEPS, m + STEPS
    series = (d / far_x) * (d / far_m) / far_m * stirling_series(1 / far_x, 1 / far_m, 1 / far_m)
    steps, x, m, d, spare = _rows(x, m, d, spare)
    rows_x, rows_m = x + steps + 1, m + steps
    half = torch.full_like(x, 0.5)
    tau = torch.cat([d / rows_x / rows_m, d / (m + STEPS)], -1)
    weight = torch.cat([rows_x, half], -1)
    z = spare * tau
    close = z > -_FAR
    near = tau * tau * quadratic_share(remainder, torch.where(close, z, 0.0), -1 / 3)
    # log1p(z) of a z near -1, from the other side
    gap = torch.where(close.all(-1, keepdim=True), 0.0, (spare * d).abs())
    other = torch.cat([gap / (rows_m + 1) / (rows_x - 1), gap / (x + STEPS)], -1)
    far = over(torch.where(close, 0.0, z + torch.log1p(other)), (spare * spare).expand(z.shape), near)
    return series + (weight * torch.where(close, near, far)).sum(-1)


def _lgamma_gradient(inputs: Tensors, saved: Tensors | None) -> Tensors:
    # alpha/(1 - alpha) [g'(x) - g'(m)] by x and g'(y) - g'(m) by y, with x - m = (1 - alpha) d and y - m = -alpha d.
    x, y, d, alpha = torch.broadcast_tensors(*inputs)
    remainder = _remainder(saved)
    if saved is None:
        d = _attached(d, x - y)
    mean, spare = mixture(x, y, d, alpha), 1 - alpha
    flow = alpha * d
    by_x = flow * _slope(x, mean, spare * d, remainder)
    by_y = -flow * _slope(mean, y, flow, remainder)
    return by_x, by_y, torch.zeros_like(d), _by_order(x, mean, d, spare, remainder)


_lgamma_gap = rowwise(_lgamma_value, _lgamma_gradient)


def lgamma_gap(x: Tensor, y: Tensor, d: Tensor, alpha: Tensor) -> Tensor:
    """D_alpha for F(a) = lgamma(a) - a log a + a, where the mixture of x and y is positive.

    Args:
        x: positive, float64.
        y: positive.
        d: x - y, to its own relative accuracy; gradients take the way through x and y.
        alpha: the order, not negative; all four broadcast.

    Returns:
        Non-negative values of the broadcast shape, 0 with gradient 0 where d = 0.
    """
    return _lgamma_gap(*torch.broadcast_tensors(x, y, d.detach(), alpha))
