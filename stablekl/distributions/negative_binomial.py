r"""Negative binomial distributions, and their KL divergence as a sum of non-negative terms.

X counts successes before failure number r, of p, and s, of q; real numbers will do for both. With m the mean of p,
:math:`m = r p/(1 - p)`, what the means differ by, :math:`t = s q - m (1 - q)`, and :math:`L(v) = v - \log(1 + v)`,

.. math:: KL = \Phi(r, m, s) + m\,L\!\left(\frac tm\right) + s\,L\!\left(-\frac ts\right):

the divergence between p and the distribution of its mean with q's count, a positive integral (see `_count_gap`) that is
0 for equal counts, and the divergence of this one from q. E log Gamma(X + s) has no closed form, and the terms around
it cancel; t takes twice the digits, since the means may agree to more digits than counts and probabilities.

Accuracy, float64: Phi was seen up to 5 ulp from mpmath's integral, in 240 triples from 1e-12 to 1e12, half of them with
counts that differ by 1 to 1e-15 of themselves; the sum 6 ulp, and 10 for equal counts, where the precision suite judged
4,500 sets of parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import NegativeBinomial as TorchNegativeBinomial

from .. import _double
from .._autograd import is_dual, is_plain, masked_product, may_hold
from .._deviance import binomial_deviance, binomial_rest, deviance
from .._double import Double
from ..registry import register_hardened
from ._base import Checked, common_dtype, given, widened
from ._count_gap import count_gap, count_gap_gradient
from ._density import checked, outcomes
from ._scalar import attached, scalar_rule
from ._trials import by_kinds, by_parameter, failure_gain, log_gain, logit, mirrored, trial, wait_kl, wait_slopes

__all__ = ["NegativeBinomial"]


class NegativeBinomial(TorchNegativeBinomial, Checked):
    """`torch.distributions.NegativeBinomial` with a KL divergence, which torch has not.

    Args:
        total_count: number of failures at which to stop, not negative, not necessarily whole.
        probs: of a success, from 0 to below 1; or
        logits: log(probs/(1 - probs)), real.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is outside of its domain somewhere (says where).

    Example:
        >>> import torch, stablekl
        >>> p, q = stablekl.NegativeBinomial(3.0, torch.tensor(0.5)), stablekl.NegativeBinomial(3.0, torch.tensor(0.2))
        >>> print(torch.distributions.kl_divergence(p, q))
        tensor(1.3389)
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of the probability, by deviances (see `_deviance`), of the probabilities or logits as they were given."""
        dtype = common_dtype(checked(self, value), self.total_count, given(self)[1])
        inputs = widened(value), widened(self.total_count), *outcomes(self)
        return _log_mass(*torch.broadcast_tensors(*inputs)).to(dtype)


def _log_mass(k: Tensor, n: Tensor, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    inside, some = k >= 0, n > 0
    k, r = torch.where(inside, k, 0.0), torch.where(some, n, 1.0)
    value = torch.log(r / (r + k)) + binomial_rest(k, r) - binomial_deviance(k, r, p, q, log_p, log_q)
    return torch.where(inside, torch.where(some, value, torch.where(k == 0, 0.0, -torch.inf)), -torch.inf)


def _shape(r: Tensor, m: Tensor, s: Tensor, d: Tensor) -> Tensor:
    """Phi; 0 where there are no successes, and where d = s - r is 0."""
    unequal = (d != 0) & (m > 0) & (r > 0) & (s > 0)
    if not may_hold(unequal):
        return torch.zeros_like(d)
    r, m, s = (torch.where(unequal, x, 1.0) for x in (r, m, s))
    return torch.where(unequal, count_gap(r, m, s, s - r), 0.0)


def _shape_gradient(r: Tensor, m: Tensor, s: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    inside = (m > 0) & (r > 0) & (s > 0)
    # 0 for equal counts, but not so its own derivatives
    if is_plain((r, m, s)) and not is_dual((r, m, s)) and not may_hold(inside & (d != 0)):
        return (torch.zeros_like(d),) * 3
    r, m, s = (torch.where(inside, x, 1.0) for x in (r, m, s))
    partials = count_gap_gradient(r, m, s, s - r)
    return tuple(torch.where(inside, x, 0.0) for x in partials)


def _sum(
    r: Tensor, m: Tensor, s: Tensor, q: Tensor, rest: Tensor, log_q: Tensor, log_rest: Tensor, t: Tensor
) -> Tensor:
    """The divergence from t; q and ``rest`` are the probabilities of a success and a failure."""
    n = m + s
    some = n != 0
    log_n = torch.log(torch.where(some, n, 1.0))
    means = deviance(m, t, n * q, log_n + log_q) + deviance(s, -t, n * rest, log_n + log_rest)
    value = _shape(r, m, s, s - r) + torch.where(some, means, 0.0) + 0.0  # not -0
    # no failure to wait for: X is 0
    return torch.where((s == 0) & (m > 0), torch.inf, value)


def _slopes(
    r: Tensor, m: Tensor, s: Tensor, t: Tensor, log_q: Tensor, log_rest: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives by r, m and s. That of 0 log 0 is taken to be 0."""
    by_r, by_m, by_s = _shape_gradient(r, m, s, s - r)
    some, other = (m > 0) & (log_q > -torch.inf), (s > 0) & (log_rest > -torch.inf)
    safe_m, safe_s = torch.where(some, m, 1.0), torch.where(other, s, 1.0)
    log_n = torch.log(torch.where(m + s > 0, m + s, 1.0))
    over = log_gain(safe_m, torch.where(some, t, 0.0), torch.where(some, log_n + log_q, 0.0))
    under = log_gain(safe_s, torch.where(other, -t, 0.0), torch.where(other, log_n + log_rest, 0.0))
    infinite = (m > 0) & ~(some & other)
    return by_r, torch.where(infinite, torch.inf, by_m - over), torch.where(infinite, -torch.inf, by_s - under)


# ---- of probabilities -------------------------------------------------------------------------------------------


def _mismatch(r: Tensor, p: Tensor, s: Tensor, q: Tensor) -> Tensor:
    """[s q (1 - p) - r p (1 - q)]/(1 - p)."""
    own = _double.multiply(_double.exact_product(s, q), _double.exact_sum(torch.ones_like(p), -p))
    other = _double.multiply(_double.exact_product(r, p), _double.exact_sum(torch.ones_like(q), -q))
    return _double.rounded(_double.subtract(own, other)) / (1 - p)


def _log(q: Tensor) -> Tensor:
    some = q != 0
    return torch.where(some, torch.log(torch.where(some, q, 1.0)), -torch.inf)


def _value(r: Tensor, p: Tensor, s: Tensor, q: Tensor) -> Tensor:
    value = _sum(r, r * p / (1 - p), s, q, 1 - q, _log(q), torch.log1p(-q), _mismatch(r, p, s, q))
    return torch.where((p >= 0) & (p <= 1) & (q >= 0) & (q <= 1), value, torch.nan)


def _gradient(r: Tensor, p: Tensor, s: Tensor, q: Tensor) -> tuple[Tensor, ...]:
    m = r * (p / (1 - p))
    with torch.no_grad():
        exact = _mismatch(*(x.detach() for x in (r, p, s, q)))
    t = attached(exact, s * q - m * (1 - q))
    by_r, by_m, by_s = _slopes(r, m, s, t, _log(q), torch.log1p(-q))
    some = q > 0
    by_q = t / torch.where(some, q, 1.0) / (1 - q)
    by_q = torch.where(some, by_q, torch.where(m > 0, -torch.inf, s))
    return (
        masked_product(p / (1 - p), by_m) + by_r,
        masked_product(r, torch.where(p > 0, by_m, 0.0)) / (1 - p) / (1 - p),
        by_s,
        by_q,
    )


# ---- of logits --------------------------------------------------------------------------------------------------


def _means(r: Tensor, x: Double, s: Tensor, y: Double) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P/(1 - p), q, 1 - q and t, of logits of twice the digits."""
    odds = torch.exp(x.hi) * (1 + x.lo)
    q, rest = torch.sigmoid(y.hi), torch.sigmoid(-y.hi)
    q, rest = q + q * rest * y.lo, rest - q * rest * y.lo
    m = r * odds
    inside = (r > 0) & (s > 0) & x.hi.isfinite() & y.hi.isfinite()
    with torch.no_grad():
        safe = [torch.where(inside, v, 1.0).detach() for v in (s, r, y.hi, y.lo, x.hi, x.lo)]
        logs = _double.subtract(Double(*safe[2:4]), Double(*safe[4:]))
        ratio = _double.rounded(_double.add(_double.log_quotient(safe[0], safe[1]), logs))
        near = inside & (ratio.abs() < 1)
        exact = m.detach() * rest.detach() * torch.expm1(torch.where(near, ratio, 0.0))
    plain = s * q - m * rest
    return odds, q, rest, torch.where(near, attached(exact, plain), plain)


def _logs(y: Tensor) -> tuple[Tensor, Tensor]:
    return torch.nn.functional.logsigmoid(y), torch.nn.functional.logsigmoid(-y)


def _unequal(r: Tensor, x: Double, s: Tensor, y: Double) -> Tensor:
    odds, q, rest, t = _means(r, x, s, y)
    value = _sum(
        r, torch.where(odds.isinf(), 1.0, r * odds), s, q, rest, *_logs(y.hi), torch.where(odds.isinf(), 1.0, t)
    )
    return torch.where(odds.isinf() & (r > 0), torch.inf, value)


def _unequal_gradient(r: Tensor, x: Double, s: Tensor, y: Double) -> tuple[Tensor, ...]:
    odds, _, _, t = _means(r, x, s, y)
    finite = odds < torch.inf  # the divergence is infinite elsewhere
    odds, t = torch.where(finite, odds, 1.0), torch.where(finite, t, 0.0)
    m = r * odds
    by_r, by_m, by_s = _slopes(r, m, s, t, *_logs(y.hi))
    partials = masked_product(odds, by_m) + by_r, masked_product(m, by_m), by_s, t
    return tuple(torch.where(finite, v, 0.0) for v in partials)


# e^-45 is below 2^-53; logits whose odds are far from the end of the floats
_DISCRETE, _FINITE, _LARGEST = 45.0, 300.0, 690.0


def _moderate(r: Tensor, x: Double, s: Tensor, y: Double, where: Tensor) -> tuple[Double, Double]:
    """The logits there, and harmless ones elsewhere.

    Large means with hardly a count below 1 are taken down together: the divergence is that of two Gamma distributions.
    """
    x, y = (Double(torch.where(where, v.hi, 0.0), torch.where(where, v.lo, 0.0)) for v in (x, y))
    with torch.no_grad():
        still_x, still_y = x.hi.detach(), y.hi.detach()
        least = torch.minimum(r, s).detach().clamp(max=1.0)
        spare = torch.minimum(still_x, still_y) - _DISCRETE / torch.where(least > 0, least, 1e-3)
        # of counts so small that this is no limit, the means are those of the largest floats at least
        spare = torch.maximum(spare, torch.minimum(still_x, still_y + _LARGEST) - _LARGEST)
        spare = torch.where((spare > 0) & spare.isfinite(), spare.floor(), 0.0)
    return Double(x.hi - spare, x.lo), Double(y.hi - spare, y.lo)


def _logits_value(kind_p: str, kind_q: str) -> Callable[..., Tensor]:
    def value(r: Tensor, x: Tensor, s: Tensor, y: Tensor) -> Tensor:
        # of one count: r times the divergence of a wait for a failure, which no mean overflows in
        result = masked_product(r, wait_kl(mirrored(trial(kind_p, x)), mirrored(trial(kind_q, y))))
        other = r != s
        if may_hold(other):
            a, b = _moderate(r, logit(kind_p, x), s, logit(kind_q, y), other)
            result = torch.where(other, _unequal(r, a, s, b), result)
        return result

    return value


def _logits_gradient(kind_p: str, kind_q: str) -> Callable[..., tuple[Tensor, ...]]:
    def gradient(r: Tensor, x: Tensor, s: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        p, q = trial(kind_p, x), trial(kind_q, y)
        by_p, by_q = wait_slopes(mirrored(p), mirrored(q))
        partials: tuple[Tensor, ...] = -by_p, masked_product(r, -by_p), -failure_gain(p, q), masked_product(r, -by_q)
        other = r != s
        if may_hold(other):
            small = (p.hi.abs() < _FINITE) & (q.hi.abs() < _FINITE)
            a, b = _moderate(r, logit(kind_p, x), s, logit(kind_q, y), other | small)
            pairs = zip(_unequal_gradient(r, a, s, b), partials, strict=True)
            # of one count with the second derivatives by the counts, which trials know nothing of
            partials = tuple(
                torch.where(other, u, torch.where(small, attached(v, torch.where(small, u, 0.0)), v)) for u, v in pairs
            )
        by_r, by_x, by_s, by_y = partials
        return by_r, by_parameter(kind_p, p, by_x, (0.0, 0.0)), by_s, by_parameter(kind_q, q, by_y, (1.0, 0.0))

    return gradient


_RULES = by_kinds(_logits_value, _logits_gradient) | {("probs", "probs"): scalar_rule(_value, _gradient)}


@register_hardened(NegativeBinomial, NegativeBinomial)
def kl_negative_binomial_negative_binomial(p: TorchNegativeBinomial, q: TorchNegativeBinomial) -> Tensor:
    """KL between negative binomial distributions, elementwise; by what they were built from."""
    (name_p, x), (name_q, y) = given(p), given(q)
    return _RULES[name_p, name_q](widened(p.total_count), x, widened(q.total_count), y).to(common_dtype(x, y))
