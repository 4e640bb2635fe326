r"""The divergence of one trial of two outcomes, by logits: of a Bernoulli distribution, and of the wait for a success.

With p's logit x and q's logit y, of twice the digits where a probability was given, and d = x - y,

.. math:: \frac qp - 1 = v_1 = (1 - q)(e^{-d} - 1), \qquad \frac{1 - q}{1 - p} - 1 = v_0 = q\,(e^d - 1),

.. math:: KL = p\,L(v_1) + (1 - p)\,L(v_0), \qquad L(v) = v - \log(1 + v).

A sum of two positive terms in which nothing cancels but x - y, which is exact to twice the digits. No exponential is
taken of a rounded number: e^d of d = 400 would be off by 200 ulp. Where :math:`v_1` is large :math:`p L(v_1)` is
q - p - p log(q/p), and where p or q is no normal number the logarithm comes from the logits. An outcome is excluded
by an infinite logit, never by a probability that has underflowed: a logit of -800 is none of 0.

The wait has :math:`KL/p`, which for p below e^-100 is :math:`E(-d)`, :math:`E(x) = e^x - 1 - x`, or
:math:`e^{-x} KL` in two halves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _double
from .._autograd import may_hold
from .._bregman import remainder_of_log
from .._double import Double
from .._opaque import opaque
from ..special import expm1mx_value
from ._scalar import attached, scalar_rule

__all__ = [
    "Trial",
    "by_kinds",
    "by_parameter",
    "failure_gain",
    "log_gain",
    "log_of",
    "log_probability",
    "logit",
    "mirrored",
    "trial",
    "trial_kl",
    "trial_slopes",
    "wait_kl",
    "wait_slopes",
]

# Where v_1 is larger q - p loses nothing.
_FAR = 1e3
# Logits of probabilities below which 1 - p is 1 to twice the digits.
_RARE = -100.0
# log(2^200) in twice the digits
_LOG_SCALE = Double(138.62943611198907, -3.3555121496085278e-15)  # type: ignore[arg-type]
_SCALE, _SMALL = 2.0**200, 1e-280


class Trial(NamedTuple):
    """One trial.

    Attributes:
        success: its probability.
        failure: that of the other outcome.
        hi: the logit, all but
        lo: this, a small number without derivatives.
    """

    success: Tensor
    failure: Tensor
    hi: Tensor
    lo: Double


def _scaled_up(x: Tensor) -> tuple[Tensor, Tensor]:
    """Positive numbers, those of fewer digits than twice the digits take as 2^200 times as large; which these are."""
    small = x < _SMALL
    return torch.where(small, x * _SCALE, x), small


def log_of(x: Tensor) -> Double:
    """The logarithm to twice the digits, -inf at 0, with its derivative."""
    some = x != 0
    safe = torch.where(some, x, 1.0)
    with torch.no_grad():
        scaled, small = _scaled_up(safe.detach())
        log = _double.log(scaled)
        if may_hold(small):
            log = _double.select(small, _double.subtract(log, _LOG_SCALE), log)
    hi = attached(log.hi, torch.log(safe))
    return Double(torch.where(some, hi, -torch.inf), torch.where(some, log.lo, 0.0))


def _precise_logit(x: Tensor) -> Double:
    """The logit of a probability between 0 and 1 in twice the digits, to its relative accuracy at 1/2 too."""
    scaled, small = _scaled_up(x)
    log = _double.log_quotient(scaled, _double.exact_sum(torch.ones_like(x), -x))
    return _double.select(small, _double.subtract(log, _LOG_SCALE), log) if may_hold(small) else log


def _smooth_logit(x: Tensor) -> Tensor:
    return torch.log(x) - torch.log1p(-x)


def logit(kind: str, x: Tensor) -> Double:
    """The logit in twice the digits, from a probability or a logit, whichever ``kind`` says, with its derivative."""
    if kind == "logits":
        return Double(x, torch.zeros_like(x))
    inside = (x != 0) & (x != 1)
    safe = torch.where(inside, x, 0.25)
    with torch.no_grad():
        log = _precise_logit(safe.detach())
    hi = attached(log.hi, _smooth_logit(safe))
    ends = torch.where(x == 0, -torch.inf, torch.inf)
    return Double(torch.where(inside, hi, ends), torch.where(inside, log.lo, 0.0))


# 2 atanh(z) - 2 z as 2 z^3/3 times a polynomial in z^2, the lowest coefficient first
_CUBIC = tuple(_double.constant(Fraction(3, 2 * k + 3)) for k in range(9))
_TWO_THIRDS = _double.constant(Fraction(2, 3))
_HALF_REACH = 2.0**-6


@opaque(2)
def _beyond_linear(z: Tensor) -> tuple[Tensor, ...]:
    """The logit of (1 + z)/2 less 2 z in twice the digits, for |z| up to 2^-6."""
    square = _double.exact_product(z, z)
    factor = _double.multiply(square, _CUBIC[-1])
    for c in _CUBIC[-2:0:-1]:
        factor = _double.multiply(_double.add(factor, c), square)
    cube = _double.multiply(_double.multiply(square, z), _TWO_THIRDS)
    return tuple(_double.multiply(cube, _double.add(factor, 1.0)))


def _parts(x: Tensor) -> tuple[Tensor, Double]:
    """The logit of a probability as a number and a small one.

    About 1/2 the first is 2 (2 x - 1), which is exact: a logit that was given may well be that number.
    """
    hi, lo = logit("probs", x)
    z = 2 * x - 1
    near = z.abs() < _HALF_REACH
    rest = torch.zeros_like(lo)
    if not may_hold(near):
        return hi, Double(lo, rest)
    with torch.no_grad():
        least = Double(*_beyond_linear(torch.where(near, z, 0.0).detach()))
    hi = torch.where(near, attached(2 * z, torch.where(near, hi, 0.0)), hi)
    return hi, _double.select(near, least, Double(lo, rest))


def trial(kind: str, x: Tensor) -> Trial:
    """A trial from its probability or logit, whichever ``kind`` says; differentiable."""
    if kind == "probs":
        return Trial(x, 1 - x, *_parts(x))
    # sigmoid(-x) of torch is 0 where this is subnormal
    rises = x > 0
    e = torch.exp(torch.where(rises, -x, x))
    small, large = e / (1 + e), 1 / (1 + e)
    return Trial(torch.where(rises, large, small), torch.where(rises, small, large), x, _double.double(0 * e))


def mirrored(a: Trial) -> Trial:
    """With the outcomes exchanged."""
    return Trial(a.failure, a.success, -a.hi, _double.negative(a.lo))


def _either(mask: Tensor, a: Tensor | float, b: Tensor | float, like: Tensor) -> Tensor:
    a, b = (torch.as_tensor(x, dtype=like.dtype, device=like.device) for x in (a, b))
    return torch.where(mask, a, b)


def by_parameter(kind: str, a: Trial, slope: Tensor, ends: tuple[Tensor | float, Tensor | float]) -> Tensor:
    """From the derivative by the logit that by a probability; what it is at 0 and 1 if the former is 0 there."""
    if kind == "logits":
        return slope
    inside = (slope != 0) | ((a.success != 0) & (a.failure != 0))
    one, other = (torch.where(inside, x, 1.0) for x in (a.success, a.failure))
    return torch.where(inside, slope / one / other, _either(a.success == 0, *ends, slope))


Kinded = Callable[[str, str], Callable[..., Any]]


def by_kinds(value: Kinded, gradient: Kinded) -> dict[tuple[str, str], Callable[..., Tensor]]:
    """Scalar rules by what p and q are given as; value and gradient are made by these two kinds."""
    kinds = [(a, b) for a in ("probs", "logits") for b in ("probs", "logits")]
    return {pair: scalar_rule(value(*pair), gradient(*pair)) for pair in kinds}


def _difference(a: Trial, b: Trial) -> Double:
    """The logits' difference; 0 of two infinite ones."""
    d = torch.where((a.hi == b.hi) & a.hi.isinf(), 0.0, a.hi - b.hi)
    finite = d.isfinite() & a.hi.isfinite()
    with torch.no_grad():
        x, y = (torch.where(finite, v.hi, 0.0).detach() for v in (a, b))
        exact = _double.add(_double.exact_sum(x, -y), _double.subtract(a.lo, b.lo))
    return Double(torch.where(finite, attached(exact.hi, d), d), torch.where(finite, exact.lo, 0.0))


def _growth(d: Double) -> Tensor:
    """e^d - 1, from both parts."""
    e = torch.expm1(d.hi)
    return e + (e * d.lo + d.lo)


def _reach(x: Tensor) -> float:
    """What e^d overflows beyond, with some room."""
    return math.log(torch.finfo(x.dtype).max) - 9


def _gains(a: Trial, b: Trial, d: Double) -> tuple[Tensor, Tensor]:
    """The v_1 and v_0 of the module's head."""
    v_1, v_0 = b.failure * _growth(Double(-d.hi, -d.lo)), b.success * _growth(d)
    apart = d.hi.abs() > _reach(d.hi)
    if not may_hold(apart):
        return v_1, v_0
    # then e^d is no float, and the probabilities do not cancel
    gain = torch.where((a.hi > 0) & (b.hi > 0), a.failure - b.failure, b.success - a.success)
    ends = torch.where(d.hi > 0, -1.0, torch.inf)
    by_1 = torch.where(a.success > 0, gain / a.success, ends)
    by_0 = torch.where(a.failure > 0, -gain / a.failure, torch.where(d.hi > 0, torch.inf, -1.0))
    return torch.where(apart, by_1, v_1), torch.where(apart, by_0, v_0)


def _softplus(x: Tensor) -> Tensor:
    """log(1 + e^x); torch's own is x beyond 20."""
    return -torch.nn.functional.logsigmoid(-x)


def _log_ratio(x: Tensor, y: Tensor, d: Tensor) -> Tensor:
    """log(p/q) of successes."""
    low_x, low_y = x < 0, y < 0
    linear = torch.where(low_x & low_y, d, torch.where(low_x, x, 0.0) - torch.where(low_y, y, 0.0))
    rest = torch.log1p(torch.exp(-y.abs())) - torch.log1p(torch.exp(-x.abs()))
    return linear + rest


def _excess(a: Trial, b: Trial, d: Tensor, v: Tensor) -> Tensor:
    """The success' p L(v_1)."""
    p, q, tiny = a.success, b.success, torch.finfo(d.dtype).tiny
    # v may have overflowed, where the truth is q - p - p log(q/p)
    far = v > _FAR
    # q/p is the smaller of two roundings as a sum; where v is all but -1 its logarithm is what matters
    quotient = torch.where(v < -0.95, q / torch.where(p == 0, 1.0, p), q + b.failure * torch.exp(-d))
    near = p * remainder_of_log(torch.where(far, 0.0, v), torch.where(far, 1.0, quotient))
    value = torch.where(far, (q - p) - p * torch.log1p(torch.where(far & v.isfinite(), v, 0.0)), near)
    rare = ((p < tiny) | (q < tiny)) & (a.hi > -torch.inf)
    if may_hold(rare):
        t = _log_ratio(a.hi + a.lo.hi, b.hi + b.lo.hi, d)
        half = torch.exp(torch.where(a.hi < 0, 0.5 * a.hi, 0.0))  # the logarithm may be as large as p is small
        product = torch.where(p < tiny, half * t * half, p * t)
        small = t.abs() < 1
        by_log = torch.where(small, p * expm1mx_value(torch.where(small, -t, 0.0)), (q - p) + product)
        value = torch.where(rare, by_log, value)
    return torch.where(a.hi == -torch.inf, q, value)


def log_probability(a: Trial) -> Tensor:
    """The logarithm of the success' probability, differentiable where that is positive."""
    low = a.hi < 0
    small = torch.where(low, a.hi, -a.hi) + torch.where(low, a.lo.hi, -a.lo.hi)
    rest = torch.log1p(torch.exp(small))
    return (
        torch.where(low, torch.where(small == -torch.inf, 0.0, small), 0.0)
        - rest
        + torch.where(a.hi == -torch.inf, -torch.inf, 0.0)
    )


def _impossible(a: Trial, b: Trial) -> Tensor:
    """Where q excludes an outcome that p does not."""
    return ((b.hi == -torch.inf) & (a.hi > -torch.inf)) | ((b.hi == torch.inf) & (a.hi < torch.inf))


def _negative(d: Double) -> Double:
    return Double(-d.hi, -d.lo)


def trial_kl(a: Trial, b: Trial) -> Tensor:
    """KL of the outcomes, without derivatives."""
    d = _difference(a, b)
    v_1, v_0 = _gains(a, b, d)
    value = _excess(a, b, d.hi, v_1) + _excess(mirrored(a), mirrored(b), -d.hi, v_0)
    # + 0, for the terms may be -0
    return torch.where(_impossible(a, b), torch.inf, value + 0.0)


def _gain(a: Trial, b: Trial, d: Double) -> Tensor:
    """The difference q - p, differentiable."""
    near = d.hi.abs() < 1
    product = a.success * b.failure * torch.expm1(torch.where(near, -d.hi, 0.0))
    both = (a.hi > 0) & (b.hi > 0)
    return torch.where(near, product, torch.where(both, a.failure - b.failure, b.success - a.success))


def trial_slopes(a: Trial, b: Trial) -> tuple[Tensor, Tensor]:
    """The derivative by p's success, x - y, and by q's logit, q - p.

    That of 0 log 0 is taken to be 0, and that by p where KL is infinite.
    """
    d = _difference(a, b)
    ends = torch.where(a.hi > 0, _softplus(-b.hi), -_softplus(b.hi))
    by_p = torch.where(a.hi.isinf(), torch.where(d.hi == 0, 0.0, ends), d.hi)
    return torch.where(_impossible(a, b), 0.0, by_p), _gain(a, b, d)


def wait_kl(a: Trial, b: Trial) -> Tensor:
    """KL of the numbers of failures before a success: KL/p."""
    one = trial_kl(a, b)
    value = one / a.success
    rare = a.hi < _RARE
    if may_hold(rare):
        both = rare & (b.hi < _RARE)  # then 1 - p and 1 - q are 1
        by_log = expm1mx_value(torch.where(both, -_difference(a, b).hi, 0.0))
        half = torch.exp(-0.5 * torch.where(rare & ~both, a.hi, 0.0))
        by_log = torch.where(both, by_log, one * half * half * (1 - a.lo.hi))
        value = torch.where(rare & ~_impossible(a, b), by_log, value)
    return value


def failure_gain(a: Trial, b: Trial) -> Tensor:
    """The value log((1 - q)/(1 - p)), differentiable; 0 where p has no failures or KL is infinite."""
    d = _difference(a, b)
    near = d.hi.abs() < 1
    close = torch.log1p(b.success * torch.expm1(torch.where(near, d.hi, 0.0)))
    certain = (a.hi == torch.inf) | _impossible(a, b)
    far = _softplus(torch.where(certain, 0.0, a.hi)) - _softplus(torch.where(certain, 0.0, b.hi))
    return torch.where(certain, 0.0, torch.where(near, close, far))


def log_gain(m: Tensor, t: Tensor, log_mean: Tensor) -> Tensor:
    """log(1 + t/m), from the logarithm of m + t where t is no small part of m; m > 0."""
    v = t / m
    near = (v > -0.5) & (v < 1)
    return torch.where(near, torch.log1p(torch.where(near, v, 0.0)), log_mean - torch.log(m))


def wait_slopes(a: Trial, b: Trial) -> tuple[Tensor, Tensor]:
    """The derivatives of `wait_kl` by p's logit, (1 - p)/p log((1 - q)/(1 - p)), and by q's, v_1.

    Where the odds overflow, from (1 - p)/p v_0 = -v_1.
    """
    d = _difference(a, b)
    beyond = -d.hi > _reach(d.hi)  # e^-d is no float, where q/p may be
    by_q = b.failure * _growth(Double(torch.where(beyond, 0.0, -d.hi), torch.where(beyond, 0.0, -d.lo)))
    infinite = b.hi == torch.inf
    rest = torch.where(infinite, -a.hi, -d.hi - _softplus(torch.where(infinite, 0.0, b.hi)))
    by_q = torch.where(beyond, torch.expm1(torch.where(beyond, rest, 0.0)), by_q)
    rare = a.hi < _RARE
    by_odds = a.failure / torch.where(rare, 1.0, a.success) * failure_gain(a, b)
    small = b.success < 1e-8
    ratio = torch.where(small, 1 + 0.5 * b.success, _surprise(b, small))
    by_p = torch.where(rare & ~_impossible(a, b), torch.where(rare, -by_q, 0.0) * ratio, by_odds)
    return by_p, by_q


def _surprise(b: Trial, small: Tensor) -> Tensor:
    """-log(1 - q)/q."""
    plain = ~small & (b.hi < torch.inf)
    return _softplus(torch.where(plain, b.hi, 0.0)) / torch.where(plain, b.success, 1.0)
