r"""KL divergence between distributions over finitely many outcomes, as a sum of non-negative terms.

With the outcomes' probabilities :math:`p_j` and :math:`q_j`, :math:`v_j = q_j/p_j - 1` and :math:`t_j = \log(p_j/q_j)`,

.. math:: KL = \sum_j p_j L(v_j) = \sum_j p_j E(-t_j), \qquad L(v) = v - \log(1 + v), \quad E(x) = e^x - 1 - x,

where the textbook's :math:`\sum_j p_j t_j` cancels near p = q. What matters is that v and t come from differences of
what was given:

* weights x and y, which are not taken to be normalised: with sums X and Y,
  :math:`v_j = (X/Y)(e_j/x_j - \bar e)`, where :math:`e_j = (y_j - x_j) - \delta x_j` for one :math:`\delta` near
  Y/X - 1, and :math:`\bar e = \sum e_j/X` for what that misses;
* logarithms of weights a and b, less the largest of each: with the differences d,
  :math:`t_j = d_j - \log(1 + \sum_i q_i (e^{d_i} - 1))`. Weights against logarithms go this way too, with logarithms
  of twice the digits.

An outcome that p excludes adds :math:`q_j`; one that q alone excludes makes the divergence infinite. 0 log 0 is
constant: at :math:`p_j = 0` the derivative of :math:`p_j \log p_j` is taken to be 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._autograd import may_hold, rowwise
from .._bregman import log_quotient, remainder_of_log
from .._double import Double
from .._elementwise import product_error, sum_error
from .._opaque import opaque
from ..special import expm1_value, expm1mx_value

__all__ = ["log_probabilities", "log_weights_kl", "weights_kl"]

# The largest |t| for which a term is p E(-t).
_NEAR = 1.0
# The largest |d| for which q (e^d - 1) is taken as such, instead of as a difference of weights.
_CLOSE = 1.0


class Outcomes(NamedTuple):
    """Probabilities over the last dimension, and how they differ.

    Attributes:
        p: probabilities.
        q: probabilities.
        t: log(p/q); 0 where either is 0.
        v: q/p - 1; 0 where p is 0.
        excluded_p: where p has no weight at all, and its probability is not just too small for a float.
        excluded_q: where q has none.
    """

    p: Tensor
    q: Tensor
    t: Tensor
    v: Tensor
    excluded_p: Tensor
    excluded_q: Tensor


def _with_excluded(terms: Tensor, o: Outcomes) -> Tensor:
    # an outcome whose probability has underflowed is not excluded
    terms = torch.where(o.excluded_p, o.q, torch.where(o.excluded_q, torch.inf, terms))
    return terms.sum(-1)


# ---- weights ------------------------------------------------------------------------------------------------------


@opaque(1)
def _unit(x: Tensor) -> tuple[Tensor]:
    """The power of two at or below a positive number, a subnormal one too; NaN of others."""
    return (x / (2 * torch.frexp(x).mantissa),)


def _unit_of(x: Tensor) -> Tensor:
    with torch.no_grad():
        return _unit(x.detach().amax(-1, keepdim=True))[0]


class _Weighed(NamedTuple):
    """What `of_weights` returns.

    Attributes:
        outcomes: with these weights.
        quotient: q/p.
        rare: where a weight is so small beside the largest that it has lost digits, or all of them.
        sums: of p's and q's weights, as two factors of which one is a power of two.
    """

    outcomes: Outcomes
    quotient: Tensor
    rare: Tensor
    sums: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def of_weights(raw_x: Tensor, raw_y: Tensor) -> _Weighed:
    """Compare outcomes by their weights, which are scaled by powers of two first: of any sum, they may overflow."""
    unit_x, unit_y = _unit_of(raw_x), _unit_of(raw_y)
    x, y = raw_x / unit_x, raw_y / unit_y
    d = y - x
    sum_x, sum_y = x.sum(-1, keepdim=True), y.sum(-1, keepdim=True)
    delta = (d.sum(-1, keepdim=True) / sum_x).detach()
    product = delta * x
    e = d - product
    with torch.no_grad():
        lost = sum_error(d, -product, e) + (sum_error(y, -x, d) - product_error(delta, x, product))
        lost = torch.where(lost.isfinite(), lost, 0.0)
    e = e + lost
    has = x != 0  # and not x > 0: negative weights and NaN are to give NaN
    safe = torch.where(has, x, 1.0)
    v = torch.where(has, (e / safe - e.sum(-1, keepdim=True) / sum_x) * (sum_x / sum_y), 0.0)
    quotient = (y / safe) * (sum_x / sum_y)
    excluded_p, excluded_q = raw_x == 0, raw_y == 0
    both, info = ~(excluded_p | excluded_q), torch.finfo(x.dtype)
    near = (v.abs() < 0.5) & has & (y != 0)
    lost_digits = (x < info.tiny) | (y < info.tiny) | (quotient < info.tiny) | (quotient > info.max)
    rare = both & lost_digits & ~near
    log = torch.log(torch.where(both & ~rare & ~near, quotient, 1.0))
    if may_hold(rare):
        logs = (torch.log(torch.where(rare, w, 1.0)) for w in (raw_y, raw_x, unit_y, unit_x))
        of_y, of_x, scale_y, scale_x = logs
        log = torch.where(rare, (of_y - of_x) - (scale_y - scale_x) + torch.log(sum_x / sum_y), log)
    t = -torch.where(near, torch.log1p(torch.where(near, v, 0.0)), log)
    found = Outcomes(x / sum_x, y / sum_y, t, v, excluded_p, excluded_q)
    return _Weighed(found, quotient, rare, ((sum_x, unit_x), (sum_y, unit_y)))


def _weights_value(x: Tensor, y: Tensor) -> tuple[Tensor]:
    o, quotient, rare, _ = of_weights(x, y)
    near = (o.v < 1) & ~rare
    terms = torch.where(near, o.p * remainder_of_log(o.v, quotient), (o.q - o.p) + o.p * o.t)
    return (_with_excluded(terms, o),)


def _weights_gradient(inputs: tuple[Tensor, ...], saved: object) -> tuple[Tensor, ...]:
    x, y = inputs
    o, _, _, ((sum_x, unit_x), (sum_y, unit_y)) = of_weights(x, y)
    possible = (o.excluded_p | ~o.excluded_q).all(-1, keepdim=True)
    by_x = torch.where(possible, o.t - (o.p * o.t).sum(-1, keepdim=True), 0.0) / sum_x
    small = o.v.abs() < 0.5
    v = torch.where(small, o.v, 0.0)
    far = 1 - torch.where(small, 0.0, o.p) / torch.where(o.q > 0, o.q, 1.0)
    by_y = torch.where(small & (o.p > 0), v / (1 + v), torch.where(o.q > 0, far, torch.where(o.p > 0, -torch.inf, 1.0)))
    return by_x / unit_x, by_y / sum_y / unit_y


weights_kl = rowwise(_weights_value, _weights_gradient)

# ---- logarithms of weights ----------------------------------------------------------------------------------------


class _Scaled(NamedTuple):
    """Weights in units of the largest."""

    log: Double  # 0 where there is no weight
    weight: Tensor
    sum: Tensor
    log_sum: Tensor


def _scaled(a: Double) -> _Scaled:
    has = a.hi > -torch.inf
    top, index = a.hi.max(-1, keepdim=True)
    a = Double(torch.where(has, a.hi, top), torch.where(has, a.lo, 0.0))
    hi = a.hi - top
    with torch.no_grad():
        lo = sum_error(a.hi, -top, hi)
    log = Double(hi, a.lo + lo)
    # the exponential of a number of two parts: that of the sum would cost half the number in ulps
    weight = torch.where(has, torch.exp(log.hi) * (1 + log.lo), 0.0)
    others = torch.where(torch.arange(hi.shape[-1], device=hi.device) == index, 0.0, weight).sum(-1, keepdim=True)
    largest = weight.gather(-1, index)  # 1, but for the second part of its logarithm
    return _Scaled(log, weight, others + largest, torch.log1p(others + (largest - 1)))


def log_probabilities(name: str, x: Tensor) -> Tensor:
    """Logarithms of probabilities, from "probs", weights of any sum, or "logits"; -inf for an impossible outcome.

    A log-softmax, of rounded probabilities or logits, gives 0 for an outcome that is all but certain: its log is that
    of 1 minus the others, which are summed by themselves.
    """
    if name == "logits":
        s = _scaled(Double(x, torch.zeros_like(x)))
        return torch.where(x > -torch.inf, s.log.hi - s.log_sum, -torch.inf)
    top, index = x.max(-1, keepdim=True)
    largest = torch.arange(x.shape[-1], device=x.device) == index
    others = torch.where(largest, 0.0, x).sum(-1, keepdim=True)
    some = x > 0
    return torch.where(some, log_quotient(torch.where(some, x, 1.0), top) - torch.log1p(others / top), -torch.inf)


def of_log_weights(a: Double, b: Double) -> Outcomes:
    """The outcomes whose weights have these logarithms; -inf for none."""
    s, z = _scaled(a), _scaled(b)
    p, q = s.weight / s.sum, z.weight / z.sum
    excluded_p, excluded_q = a.hi == -torch.inf, b.hi == -torch.inf
    both = ~(excluded_p | excluded_q)
    d = s.log.hi - z.log.hi
    with torch.no_grad():
        rest = sum_error(s.log.hi, -z.log.hi, d)
    low = rest + (s.log.lo - z.log.lo)
    d = torch.where(both, d, 0.0)
    low = torch.where(both, low, 0.0)
    close = both & (d.abs() < _CLOSE)
    growth = q * expm1_value(torch.where(close, d + low, 0.0))
    growth = torch.where(close, growth, (s.weight - z.weight) / z.sum).sum(-1, keepdim=True)
    falls = growth < -0.5
    change = torch.where(falls, s.log_sum - z.log_sum, torch.log1p(torch.where(falls, 0.0, growth)))
    t = torch.where(both, (d - change) + low, 0.0)
    return Outcomes(p, q, t, torch.where(both, expm1_value(-t.clamp(min=-700)), -1.0), excluded_p, excluded_q)


def _log_weights_value(a: Tensor, a_low: Tensor, b: Tensor, b_low: Tensor) -> tuple[Tensor]:
    o = of_log_weights(Double(a, a_low), Double(b, b_low))
    small = o.t.abs() < _NEAR
    near = o.p * expm1mx_value(torch.where(small, -o.t, 0.0))
    product = o.p * o.t
    rare = (o.p < torch.finfo(a.dtype).tiny) & ~small
    if may_hold(rare):  # p may have underflowed where t is as large
        half = torch.exp(0.5 * (a - a.amax(-1, keepdim=True)))
        product = torch.where(rare, half * o.t * half, product)
    return (_with_excluded(torch.where(small, near, (o.q - o.p) + product), o),)


def _log_weights_gradient(inputs: tuple[Tensor, ...], saved: object) -> tuple[Tensor, ...]:
    a, a_low, b, b_low = inputs
    o = of_log_weights(Double(a, a_low.detach()), Double(b, b_low.detach()))
    possible = (o.excluded_p | ~o.excluded_q).all(-1, keepdim=True)
    by_a = torch.where(possible, o.p * (o.t - (o.p * o.t).sum(-1, keepdim=True)), 0.0)
    by_b = torch.where(o.v.abs() < 0.5, o.p * o.v, o.q - o.p)
    return by_a, torch.zeros_like(a), by_b, torch.zeros_like(b)


_log_weights_kl = rowwise(_log_weights_value, _log_weights_gradient)


def log_weights_kl(a: Double, b: Double) -> Tensor:
    """KL of the outcomes whose weights have these logarithms; derivatives by the first parts."""
    return _log_weights_kl(a.hi, a.lo.detach(), b.hi, b.lo.detach())
