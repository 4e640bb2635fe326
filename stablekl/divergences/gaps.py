r"""Jensen gaps of -log and of exp, as sums of non-negative terms for every order alpha >= 0.

In an exponential family with log-normaliser F the Rényi divergence of order alpha is a Jensen gap,

.. math::
    D_\alpha = \frac{\alpha F(x) + (1 - \alpha) F(y) - F(\alpha x + (1 - \alpha) y)}{1 - \alpha},

which divides a difference of large terms by a number that may be 0. Both functions here return
:math:`D_\alpha / \min(\alpha, 1)`, finite at alpha = 0, 1 and everywhere between and beyond. With a = min(alpha, 1),
c = \|1 - alpha\| and the remainders :math:`L(x) = x - \log(1 + x)`, :math:`E(x) = e^x - 1 - x`:

* `log_gap`, F = -log and l = log(y/x): with :math:`w = (e^l - 1)/(a + (1 - a) e^l)`, the difference of x and y in
  units of their mean,

  .. math:: \frac{L(a w)}{a} + \frac{L(-c w)}{c};

* `exp_gap`, F = exp, l = x - y: with the base :math:`m = \exp(a x + (1 - a) y)`,

  .. math:: m \left[\frac{E(c l)}{c} + \frac{E(-a l)}{a}\right].

No term is subtracted for any alpha: below 1 the reference point is the mixture itself, beyond 1 it is y (or x for exp),
because then the mixture lies outside of the interval and would enter with a negative sign. The textbook form loses
1/l^2 eps near l = 0, and again 1/(1 - alpha) eps. An argument beyond the reach of L and E takes the logarithms
themselves.

**Accuracy** (float64): 1e-15 relative, value and first derivative, for \|l\| from 1e-12 to 10 and orders 0 to 3; beyond
that an exponential of l costs \|l\|/2 eps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._autograd import rowwise
from ..distributions._base import widened
from ..special import expm1_value, expm1mx, expm1mx_value, log1pmx, log1pmx_value

__all__ = [
    "exp_gap",
    "log1p_over",
    "log_gap",
    "log_gap_value",
    "log_mean",
    "log_ratio",
    "minus_log1pmx",
    "over",
    "quadratic_ratio",
    "quadratic_share",
    "same",
    "times",
    "weights",
]

# Below it x/2 is L(x)/x and E(x)/x to 2^-53 even before the quadratic term, and x * x would soon underflow.
_TINY = 1e-100
# Beyond it the remainder is taken from the logarithms or exponentials themselves, at a cost of 6 eps at most.
_FAR_LOG, _FAR_EXP = 0.5, 1.0
# The largest |x| for which log1p(x)/x comes from its remainder: a Taylor series would end there, too.
_NEAR = 0.5


def same(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Float64 (float32 on MPS), of one shape."""
    return tuple(torch.broadcast_tensors(*(widened(x) for x in tensors)))


def weights(alpha: Tensor, rest: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """``min(alpha, 1)``, ``|1 - alpha|`` and ``max(alpha, 1)``, with the derivatives of alpha < 1 at alpha = 1.

    ``rest`` is 1 - alpha where that is known to more digits than alpha leaves.
    """
    rest = 1 - alpha if rest is None else rest
    one = torch.ones_like(alpha)
    inside = rest >= 0
    capped = torch.where(inside, alpha, one)
    return capped, torch.where(inside, rest, -rest), torch.where(inside, one, alpha)


def times(weight: Tensor, value: Tensor) -> Tensor:
    """The product, 0 where the weight is 0 and the value infinite."""
    nothing = (weight == 0) & value.isinf()
    return torch.where(nothing, 0.0, weight * torch.where(nothing, 0.0, value))


def over(value: Tensor, weight: Tensor, limit: Tensor) -> Tensor:
    """``value / weight``, and ``limit`` where the weight is too small to divide by."""
    usable = weight > _TINY
    return torch.where(usable, value / torch.where(usable, weight, 1.0), limit)


def quadratic_ratio(remainder: Callable[[Tensor], Tensor], x: Tensor, cubic: float) -> Tensor:
    """``remainder(x)/x`` for a remainder x^2/2 + cubic x^3 + ...; 0 at 0."""
    tiny = x.abs() < _TINY
    return torch.where(tiny, x * (0.5 + cubic * x), remainder(x) / torch.where(tiny, 1.0, x))


def quadratic_share(remainder: Callable[[Tensor], Tensor], x: Tensor, cubic: float) -> Tensor:
    """``remainder(x)/x^2``; 1/2 at 0."""
    tiny = x.abs() < _TINY
    return torch.where(tiny, 0.5 + cubic * x, quadratic_ratio(remainder, x, cubic) / torch.where(tiny, 1.0, x))


def minus_log1pmx(x: Tensor) -> Tensor:
    """The remainder L of the module's head."""
    return -log1pmx(x)


def log1p_over(x: Tensor, factor: Tensor, x_over_factor: Tensor) -> Tensor:
    """log1p(x)/factor, from x/factor where x is small: the factor may be 0."""
    far = x.abs() > _NEAR
    near = x_over_factor * (1 - quadratic_ratio(minus_log1pmx, torch.where(far, 0.0, x), -1 / 3))
    return torch.where(far, torch.log1p(torch.where(far, x, 1.0)) / torch.where(far, factor, 1.0), near)


def log_ratio(a: Tensor, b: Tensor) -> Tensor:
    """log(a/b) of positive tensors, accurate relative to itself near a = b; its derivatives are 1/a and -1/b.

    Plain operations and not a `rowwise` function, which would stop the second derivative of what this is fed into where
    the first is 0: at p = q.
    """
    info = torch.finfo(a.dtype)
    quotient = (a / b).detach()
    close = (quotient > 0.5) & (quotient < 2)
    usable = (quotient >= info.tiny) & (quotient <= info.max)
    far = usable & ~close
    a_near, b_near = torch.where(close, a, 1.0), torch.where(close, b, 1.0)
    near = torch.log1p((a_near - b_near) / b_near)
    by_quotient = torch.log(torch.where(far, a, 1.0) / torch.where(far, b, 1.0))
    return torch.where(close, near, torch.where(usable, by_quotient, torch.log(a) - torch.log(b)))


# ---- -log -------------------------------------------------------------------------------------------------------


def _minus_size(x: Tensor) -> Tensor:
    """-|x|, with the derivative 1 at 0, where that of torch's abs is 0."""
    return torch.where(x > 0, -x, x)


def _mean(ratio: Tensor, capped: Tensor, spare: Tensor) -> Tensor:
    """``capped + spare e^ratio`` in units of the larger of 1 and ``e^ratio``."""
    shrunk = torch.exp(_minus_size(ratio))
    return torch.where(ratio > 0, capped * shrunk + spare, capped + spare * shrunk)


def log_mean(ratio: Tensor, capped: Tensor, spare: Tensor) -> Tensor:
    """log(capped + spare e^ratio), of two numbers that sum to 1."""
    mean = _mean(ratio, capped, spare)
    return torch.log(torch.where(mean > 0, mean, 1.0)) + torch.where(ratio > 0, ratio, 0.0)


def _tilt(ratio: Tensor, capped: Tensor, spare: Tensor) -> Tensor:
    """The w of the module's head, with no exponential that overflows."""
    change = expm1_value(_minus_size(ratio))
    return torch.where(ratio > 0, -change, change) / _mean(ratio, capped, spare)


def _log_terms(ratio: Tensor, alpha: Tensor, rest: Tensor, again: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The two terms, w, and where the integral exists (the others see a ratio of 0)."""
    minus_l = log1pmx if again else log1pmx_value

    def remainder(x: Tensor) -> Tensor:
        return -minus_l(x)

    capped, gap, _ = weights(alpha, rest)
    spare = torch.where(rest > 0, rest, 0.0)
    w = _tilt(ratio, capped, spare)
    exists = (rest >= 0) | ((gap * w < 1) & ~w.isinf())
    ratio, w = torch.where(exists, ratio, 0.0), torch.where(exists & ~w.isinf(), w, 0.0)
    top = log_mean(ratio, capped, spare)
    first, second = capped * w, -gap * w
    far = first < -_FAR_LOG
    by_log = over(first - (ratio - top), capped, first)
    one = torch.where(far, by_log, w * quadratic_ratio(remainder, torch.where(far, 0.0, first), -1 / 3))
    far = (second < -_FAR_LOG) & (rest > 0)
    by_log = over(second + top, gap, second)
    two = torch.where(far, by_log, -w * quadratic_ratio(remainder, torch.where(far, 0.0, second), -1 / 3))
    return one, two, w, exists


def log_gap_value(ratio: Tensor, alpha: Tensor, rest: Tensor) -> Tensor:
    """`log_gap` without its gradient; ``rest`` is 1 - alpha, which may be known to more digits than alpha leaves."""
    one, two, _, exists = _log_terms(ratio, alpha, rest, False)
    infinite = _tilt(ratio, weights(alpha, rest)[0], torch.where(rest > 0, rest, 0.0)).isinf()
    return torch.where(exists & ~infinite, one + two, torch.inf)


def _log_gap_gradient(inputs: tuple[Tensor, ...], saved: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    # With the mean in the place of w's denominator, d/dl = max(alpha, 1) (e^l - 1)/(alpha + (1 - alpha) e^l).
    ratio, alpha = inputs
    one, two, w, _ = _log_terms(ratio, alpha, 1 - alpha, saved is None and not torch.compiler.is_compiling())
    capped, gap, excess = weights(alpha)
    mixture = torch.where(alpha <= 1, torch.ones_like(w), 1 - gap * w)
    half = 0.5 * w * w
    first, second = over(one, capped, half), over(two, gap, half)
    return excess * w / mixture, torch.where(alpha <= 1, second - first, w * w / mixture - second)


_log_gap = rowwise(lambda ratio, alpha: (log_gap_value(ratio, alpha, 1 - alpha),), _log_gap_gradient)


def log_gap(ratio: Tensor, alpha: Tensor) -> Tensor:
    """D_alpha / min(alpha, 1) for F = -log, from log(y/x); +inf where alpha x + (1 - alpha) y <= 0.

    Args:
        ratio: log(y/x), float64, any shape. It should be known to its own relative accuracy.
        alpha: the order, not negative, broadcastable with ``ratio``.

    Returns:
        Non-negative values of the broadcast shape, 0 with gradient 0 at ratio = 0. The gradient is 0 where the value is
        infinite.
    """
    return _log_gap(*torch.broadcast_tensors(ratio, alpha))


# ---- exp --------------------------------------------------------------------------------------------------------


def _exp_terms(log_y: Tensor, ratio: Tensor, alpha: Tensor, again: bool) -> tuple[Tensor, ...]:
    """The two terms, the base m, and m times the exponential minus 1 over the weight: [c], [-a]."""
    remainder = expm1mx if again else expm1mx_value
    capped, gap, _ = weights(alpha)
    base = torch.exp(log_y + capped * ratio)
    first, second = gap * ratio, -capped * ratio
    linear = base * ratio
    far = first.abs() > _FAR_EXP
    top = torch.exp(log_y + torch.where(alpha <= 1, ratio, alpha * ratio))
    near = linear * quadratic_ratio(remainder, torch.where(far, 0.0, first), 1 / 6)
    one = torch.where(far, over(top - base * (1 + first), gap, near), near)
    slope_one = torch.where(far, over(top - base, gap, near), near + linear)
    far = second.abs() > _FAR_EXP
    bottom = torch.exp(log_y)
    near = -linear * quadratic_ratio(remainder, torch.where(far, 0.0, second), 1 / 6)
    two = torch.where(far, over(bottom - base * (1 + second), capped, near), near)
    slope_two = torch.where(far, over(bottom - base, capped, near), near - linear)
    return one, two, base, slope_one, slope_two


def _exp_gap_value(log_x: Tensor, log_y: Tensor, ratio: Tensor, alpha: Tensor) -> tuple[Tensor, ...]:
    one, two, *_ = _exp_terms(log_y, ratio, alpha, False)
    return (one + two,)


def _exp_gap_gradient(inputs: tuple[Tensor, ...], saved: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    log_x, log_y, ratio, alpha = inputs
    if saved is None:
        difference = log_x - log_y
        ratio = ratio.detach() + (difference - difference.detach())
    again = saved is None and not torch.compiler.is_compiling()
    one, two, base, slope_x, slope_y = _exp_terms(log_y, ratio, alpha, again)
    capped, gap, excess = weights(alpha)
    half = 0.5 * base * ratio * ratio
    first, second = over(one, gap, half), over(two, capped, half)
    inside = alpha <= 1
    by_alpha = torch.where(inside, first - second, 2 * half + ratio * one - first)
    by_y = torch.where(inside, slope_y, slope_y - gap * slope_x)
    return excess * slope_x, by_y, torch.zeros_like(ratio), by_alpha


_exp_gap = rowwise(_exp_gap_value, _exp_gap_gradient)


def exp_gap(log_x: Tensor, log_y: Tensor, ratio: Tensor, alpha: Tensor) -> Tensor:
    """D_alpha / min(alpha, 1) for F = exp: the Rényi divergence of Poisson distributions.

    Args:
        log_x: x, the logarithm of the first rate, float64.
        log_y: y, that of the second.
        ratio: x - y to its own relative accuracy; gradients take the way through ``log_x`` and ``log_y``.
        alpha: the order, not negative; all four broadcast.

    Returns:
        Non-negative values of the broadcast shape, 0 with gradient 0 at ratio = 0.
    """
    return _exp_gap(*torch.broadcast_tensors(log_x, log_y, ratio.detach(), alpha))
