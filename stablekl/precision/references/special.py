"""The primitives of `stablekl.special` and `stablekl.parameterizations`, from their definitions.

Each comes twice: ``name_at`` at the current precision, and ``name``, on which two precisions agree. Limits are taken
where an argument is 0 or infinite; outside the domain and for NaN the value is NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from .context import Number, agreed, mp
from .room import room

__all__ = [
    "bd0",
    "bd0_at",
    "bounded_log_scale",
    "bounded_log_scale_at",
    "expm1mx",
    "expm1mx_at",
    "inverse_bounded_log_scale",
    "inverse_bounded_log_scale_at",
    "inverse_softplus_scale",
    "inverse_softplus_scale_at",
    "log1pmx",
    "log1pmx_at",
    "log_ndtr",
    "log_ndtr_at",
    "log_ratio_bregman",
    "log_ratio_bregman_at",
    "logsumexp",
    "logsumexp_at",
    "scale_tril_from_unconstrained",
    "scale_tril_from_unconstrained_at",
    "softplus_scale",
    "softplus_scale_at",
    "unconstrained_from_scale_tril",
    "unconstrained_from_scale_tril_at",
]

Function = Callable[..., Any]
_ZERO = mp.mpf(0)
_FAR = 400  # bits of a number of which mpmath's erfc has no value


def _agreeing(f: Function) -> Function:
    """The function of the same name without ``_at``."""

    @wraps(f)
    def settled(*arguments: Any) -> Any:
        return agreed(lambda: f(*arguments))

    settled.__name__ = f.__name__.removesuffix("_at")
    settled.__doc__ = f"{f.__doc__} At two precisions that agree."
    return settled


def log1pmx_at(x: Number) -> Number:
    """log(1 + x) - x."""
    if not x > -1:
        return -mp.inf if x == -1 else mp.nan
    if x == mp.inf:
        return -mp.inf
    with mp.workprec(mp.prec + room(x)):
        return mp.log(1 + x) - x


def expm1mx_at(x: Number) -> Number:
    """exp(x) - 1 - x."""
    if mp.isinf(x):
        return mp.inf
    with mp.workprec(mp.prec + room(x)):
        return mp.exp(x) - 1 - x


def log_ratio_bregman_at(a: Number, b: Number) -> Number:
    """(a - b)/b - log(a/b); infinite where one of them is 0 or infinite, NaN where both are the same of these."""
    if not (a >= 0 and b >= 0):
        return mp.nan
    if 0 in (a, b) or mp.inf in (a, b):
        return mp.nan if a == b else mp.inf
    return (a - b) / b - mp.log(a / b)


def bd0_at(x: Number, m: Number) -> Number:
    """The deviance x log(x/m) + m - x; m at x = 0."""
    if not (x >= 0 and m >= 0):
        return mp.nan
    if x == 0:
        return m
    if m == 0 or mp.inf in (x, m):
        return mp.nan if x == m else mp.inf
    return x * mp.log(x / m) + m - x


def _far_tail(x: Number) -> Number:
    """The normal tail by its asymptotic series, of which the second term is 2^-800."""
    return mp.exp(-x * x / 2) / (x * mp.sqrt(2 * mp.pi))


def log_ndtr_at(x: Number) -> Number:
    """Logarithm of the standard normal distribution function."""
    if mp.isnan(x) or mp.isinf(x):
        return _ZERO if x == mp.inf else x
    tail = _far_tail(abs(x)) if mp.mag(x) > _FAR else mp.erfc(abs(x) / mp.sqrt(2)) / 2
    return mp.log(tail) if x < 0 else mp.log1p(-tail)


def logsumexp_at(x: list[Number]) -> Number:
    """Logarithm of the sum of the exponentials; -inf for no terms."""
    if any(mp.isnan(v) for v in x):
        return mp.nan
    if mp.inf in x:
        return mp.inf
    with mp.workprec(mp.prec + room(x)):
        return mp.log(mp.fsum(mp.exp(v) for v in x))


def softplus_scale_at(x: Number, floor: Number = _ZERO) -> Number:
    """Floor + log(1 + exp(x))."""
    return floor + mp.log1p(mp.exp(x))


def inverse_softplus_scale_at(scale: Number, floor: Number = _ZERO) -> Number:
    """The x at which `softplus_scale` is ``scale``."""
    y = scale - floor
    if not y > 0 or y == mp.inf:
        return -mp.inf if y == 0 else y if y > 0 else mp.nan
    return mp.log(mp.expm1(y))


def _middle(min_log: Number, max_log: Number) -> tuple[Number, Number]:
    return (min_log + max_log) / 2, (max_log - min_log) / 2


def bounded_log_scale_at(x: Number, min_log: Number, max_log: Number) -> Number:
    """exp(m + h t/sqrt(1 + t^2)), t = (x - m)/h, with the middle m and half the width h of the bounds."""
    m, h = _middle(min_log, max_log)
    if mp.isinf(x):
        return mp.exp(max_log if x > 0 else min_log)
    t = (x - m) / h
    return mp.exp(m + h * t / mp.sqrt(1 + t * t))


def inverse_bounded_log_scale_at(scale: Number, min_log: Number, max_log: Number) -> Number:
    """The x at which `bounded_log_scale` is ``scale``."""
    m, h = _middle(min_log, max_log)
    u = (mp.log(scale) - m) / h if scale > 0 else mp.nan
    if not abs(u) < 1:
        return mp.nan
    return m + h * u / mp.sqrt(1 - u * u)


def scale_tril_from_unconstrained_at(x: list[Number], dim: int, floor: Number = _ZERO) -> list[list[Number]]:
    """The lower triangle filled row by row, `softplus_scale` on its diagonal, as ragged rows of 1, 2, ... entries."""
    rows = [x[i * (i + 1) // 2 : (i + 1) * (i + 2) // 2] for i in range(dim)]
    return [[*row[:-1], softplus_scale_at(row[-1], floor)] for row in rows]


def unconstrained_from_scale_tril_at(scale_tril: list[list[Number]], floor: Number = _ZERO) -> list[Number]:
    """The vector of which `scale_tril_from_unconstrained` makes this matrix; its upper triangle is not read."""
    rows = [[*row[:i], inverse_softplus_scale_at(row[i], floor)] for i, row in enumerate(scale_tril)]
    return [x for row in rows for x in row]


log1pmx = _agreeing(log1pmx_at)
expm1mx = _agreeing(expm1mx_at)
log_ratio_bregman = _agreeing(log_ratio_bregman_at)
bd0 = _agreeing(bd0_at)
log_ndtr = _agreeing(log_ndtr_at)
logsumexp = _agreeing(logsumexp_at)
softplus_scale = _agreeing(softplus_scale_at)
inverse_softplus_scale = _agreeing(inverse_softplus_scale_at)
bounded_log_scale = _agreeing(bounded_log_scale_at)
inverse_bounded_log_scale = _agreeing(inverse_bounded_log_scale_at)
scale_tril_from_unconstrained = _agreeing(scale_tril_from_unconstrained_at)
unconstrained_from_scale_tril = _agreeing(unconstrained_from_scale_tril_at)
