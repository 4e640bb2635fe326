r"""Rényi and Jeffreys divergences of other exponential families, composed of the gaps of `gaps`.

=====================  ====================================================================================
family                 D_alpha / min(alpha, 1), or D_alpha
=====================  ====================================================================================
Poisson                ``exp_gap``
Exponential            ``log_gap`` of the rates
Categorical, one-hot   the gaps g_j of Poisson distributions with rates p_j, q_j sum to 1 - integral p^alpha
                       q^(1-alpha), up to a factor: D = S log1p(x)/x with S = min(alpha, 1) sum g_j and
                       x = (alpha - 1) S
Bernoulli, Binomial    two categories; times n
Geometric              below 1: the Exponential's of the probabilities, plus log1p of the Poisson gap of the
                       failures over the mean probability; above 1 see the code
=====================  ====================================================================================

A category that p or q excludes has no gap but its own probability. What a Categorical was given counts as unnormalised
weights: torch's normalisation leaves sums off by eps, which is more than nearby divergences are.

The Jeffreys divergence is the inner product of the differences of natural and of mean parameters, all products
non-negative.

**Accuracy** (float64): 1.5e-15 relative for moderate parameters at distances from 1 to 1e-12 and orders 0 to 3; a
logarithm of size l costs l/2 eps (probabilities down to 1e-26: 6e-15).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Binomial, Distribution, Exponential, Geometric, OneHotCategorical, Poisson
from torch.nn.functional import softplus

from .._autograd import is_plain
from ..distributions._base import given, widened
from ..special import expm1_value, logsumexp
from .gaps import (
    exp_gap,
    log1p_over,
    log_gap,
    log_ratio,
    minus_log1pmx,
    over,
    quadratic_ratio,
    same,
    times,
    weights,
)

__all__ = [
    "bernoulli_jeffreys",
    "bernoulli_renyi",
    "binomial_jeffreys",
    "binomial_renyi",
    "categorical_jeffreys",
    "categorical_renyi",
    "exponential_jeffreys",
    "exponential_renyi",
    "geometric_jeffreys",
    "geometric_renyi",
    "poisson_jeffreys",
    "poisson_renyi",
]

# The largest |x| for which a log1p comes from x itself.
_NEAR = 0.5


# ---- rates ------------------------------------------------------------------------------------------------------


class Masses(NamedTuple):
    """Two non-negative measures on points, float64 and of one shape; logarithms are safe numbers where not in both.

    Attributes:
        log_p: logarithm of p's mass.
        log_q: that of q's.
        ratio: their difference, to its own relative accuracy.
        both: where neither is 0.
        only_p: p's mass where q's is 0, else 0.
        only_q: q's where p's is 0.
    """

    log_p: Tensor
    log_q: Tensor
    ratio: Tensor
    both: Tensor
    only_p: Tensor
    only_q: Tensor


def _masses(p: Tensor, q: Tensor) -> Masses:
    """From the masses themselves."""
    both = (p > 0) & (q > 0)
    x, y = torch.where(both, p, 1.0), torch.where(both, q, 1.0)
    only_p, only_q = torch.where((q == 0) & (p > 0), p, 0.0), torch.where((p == 0) & (q > 0), q, 0.0)
    return Masses(torch.log(x), torch.log(y), log_ratio(x, y), both, only_p, only_q)


def _mass_renyi(m: Masses, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """[alpha p + (1 - alpha) q - p^alpha q^(1 - alpha)]/(1 - alpha) for each point, and where it is infinite."""
    capped, gap, _ = weights(alpha)
    inner = torch.where(m.both, exp_gap(m.log_p, m.log_q, m.ratio, alpha), 0.0)
    infinite = (m.only_p > 0) & (alpha >= 1)
    excluded = over(alpha * torch.where(infinite, 0.0, m.only_p), gap, torch.zeros_like(inner))
    return capped * inner + m.only_q + excluded, infinite


def _mass_jeffreys(m: Masses) -> Tensor:
    """(p - q) log(p/q) for each point."""
    rising = m.ratio > 0
    t = torch.where(rising, -m.ratio, m.ratio)
    finite = torch.where(m.both, torch.exp(torch.where(rising, m.log_p, m.log_q)) * expm1_value(t) * t, 0.0)
    return torch.where((m.only_p > 0) | (m.only_q > 0), torch.inf, finite)


def poisson_renyi(p: Poisson, q: Poisson, alpha: Tensor) -> Tensor:
    """By the rates; a rate of 0 is the point mass at 0."""
    rate_p, rate_q, alpha = same(p.rate, q.rate, alpha)
    value, infinite = _mass_renyi(_masses(rate_p, rate_q), alpha)
    return torch.where(infinite, torch.inf, value)


def poisson_jeffreys(p: Poisson, q: Poisson) -> Tensor:
    """By the rates."""
    return _mass_jeffreys(_masses(*same(p.rate, q.rate)))


def exponential_renyi(p: Exponential, q: Exponential, alpha: Tensor) -> Tensor:
    """By the rates; infinite where alpha rate_p + (1 - alpha) rate_q <= 0."""
    rate_p, rate_q, alpha = same(p.rate, q.rate, alpha)
    return times(weights(alpha)[0], log_gap(log_ratio(rate_q, rate_p), alpha))


def exponential_jeffreys(p: Exponential, q: Exponential) -> Tensor:
    """(a - b)^2/(a b) of the rates."""
    a, b = same(p.rate, q.rate)
    return (a - b) / a * ((a - b) / b)


# ---- categories -------------------------------------------------------------------------------------------------


def _category_renyi(m: Masses, alpha: Tensor) -> Tensor:
    """D_alpha of two distributions over the last dimension; ``alpha`` broadcasts with the batch."""
    batch = torch.broadcast_shapes(m.ratio.shape[:-1], alpha.shape)
    alpha = alpha.expand(batch)
    m = Masses(*(x.expand(batch + x.shape[-1:]) for x in m))
    column = alpha.unsqueeze(-1).expand(m.ratio.shape)
    masses, infinite = _mass_renyi(m, column)
    total, factor = masses.sum(-1), alpha - 1
    x = factor * total
    far = x.abs() > _NEAR
    near = log1p_over(torch.where(far, 0.0, x), factor, torch.where(far, 0.0, total))
    logs = torch.where(m.both, column * m.log_p + (1 - column) * m.log_q, -torch.inf)
    by_sum = logsumexp(logs, -1) / torch.where(far, factor, 1.0)
    return torch.where(infinite.any(-1), torch.inf, torch.where(far, by_sum, near))


def _given(distribution: Distribution) -> tuple[str, Tensor]:
    """What the distribution was built from: the constructor stores it before the other can be asked for."""
    if isinstance(distribution, OneHotCategorical):
        distribution = distribution._categorical
    name, value = given(distribution)
    return name, widened(value)


def _log(x: Tensor) -> Tensor:
    """log(x), -inf with gradient 0 at 0."""
    return torch.where(x > 0, torch.log(torch.where(x > 0, x, 1.0)), -torch.inf)


def _categories(p: Distribution, q: Distribution) -> Masses:
    (name_p, x), (name_q, y) = _given(p), _given(q)
    if name_p == name_q == "probs":
        x, y = same(x, y)
        m = _masses(x, y)
        sum_p, sum_q = x.sum(-1, keepdim=True), y.sum(-1, keepdim=True)
        between = torch.log1p((x - y).sum(-1, keepdim=True) / sum_q)
        log_p, log_q = m.log_p - sum_p.log(), m.log_q - sum_q.log()
        return Masses(log_p, log_q, m.ratio - between, m.both, m.only_p / sum_p, m.only_q / sum_q)
    x, y = same(*(_log(v) if name == "probs" else v for name, v in ((name_p, x), (name_q, y))))
    log_p, log_q = torch.log_softmax(x, -1), torch.log_softmax(y, -1)
    has_p, has_q = x > -torch.inf, y > -torch.inf
    both = has_p & has_q
    change = torch.where(both, x, 0.0) - torch.where(both, y, 0.0)
    close = ((change.abs() < 1) & (has_p == has_q)).all(-1, keepdim=True)
    change = torch.where(close, change, 0.0)
    log_p_safe, log_q_safe = torch.where(both, log_p, 0.0), torch.where(both, log_q, 0.0)
    weighted = torch.where(both, torch.exp(log_q_safe), 0.0) * expm1_value(change)
    near = change - torch.log1p(weighted.sum(-1, keepdim=True))
    zero = torch.zeros_like(log_p)
    return Masses(
        log_p_safe,
        log_q_safe,
        torch.where(both, torch.where(close, near, log_p_safe - log_q_safe), 0.0),
        both,
        torch.where(has_p & ~has_q, torch.exp(torch.where(has_p, log_p, 0.0)), zero),
        torch.where(has_q & ~has_p, torch.exp(torch.where(has_q, log_q, 0.0)), zero),
    )


def _check_categories(p: Distribution, q: Distribution) -> None:
    n, m = _given(p)[1].shape[-1], _given(q)[1].shape[-1]
    if n != m:
        raise ValueError(
            f"p has {n} categories and q has {m}: they are no distributions over the same points. Give the missing "
            "categories a probability of 0."
        )


def categorical_renyi(p: Distribution, q: Distribution, alpha: Tensor) -> Tensor:
    """Of two `Categorical` or two `OneHotCategorical` distributions."""
    _check_categories(p, q)
    return _category_renyi(_categories(p, q), alpha)


def categorical_jeffreys(p: Distribution, q: Distribution) -> Tensor:
    """Of two `Categorical` or two `OneHotCategorical` distributions; infinite where the supports differ."""
    _check_categories(p, q)
    return _mass_jeffreys(_categories(p, q)).sum(-1)


# ---- success and failure ----------------------------------------------------------------------------------------


def _outcomes(p: Distribution, q: Distribution) -> tuple[Masses, Masses]:
    """Success and failure."""
    (name_p, x), (name_q, y) = _given(p), _given(q)
    if name_p == name_q == "probs":
        x, y = same(x, y)
        success = _masses(x, y)
        has_p, has_q = x < 1, y < 1
        both = has_p & has_q
        a, b = torch.where(both, x, 0.0), torch.where(both, y, 0.0)
        # 1 - p - (1 - q) would keep the rounding of both
        change = (b - a) / (1 - b)
        close = change.abs() < _NEAR
        log_a, log_b = torch.log1p(-a), torch.log1p(-b)
        ratio = torch.where(close, torch.log1p(torch.where(close, change, 0.0)), log_a - log_b)
        only_p, only_q = torch.where(has_p & ~has_q, 1 - x, 0.0), torch.where(has_q & ~has_p, 1 - y, 0.0)
        return success, Masses(log_a, log_b, ratio, both, only_p, only_q)
    x, y = same(*(torch.logit(v) if name == "probs" else v for name, v in ((name_p, x), (name_q, y))))
    finite = x.isfinite() & y.isfinite()
    change = torch.where(finite, x, 0.0) - torch.where(finite, y, 0.0)
    close = finite & (change.abs() < 1)
    change = torch.where(close, change, 0.0)
    outcomes = []
    for sign in (1.0, -1.0):
        has_p, has_q = sign * x > -torch.inf, sign * y > -torch.inf
        both = has_p & has_q
        log_p, log_q = (-softplus(-sign * torch.where(both, z, 0.0)) for z in (x, y))
        near = -torch.log1p(torch.exp(-softplus(sign * torch.where(both, y, 0.0))) * expm1_value(-sign * change))
        outcomes.append(
            Masses(
                log_p,
                log_q,
                torch.where(close, near, log_p - log_q),
                both,
                torch.where(has_p & ~has_q, torch.sigmoid(sign * x), 0.0),
                torch.where(has_q & ~has_p, torch.sigmoid(sign * y), 0.0),
            )
        )
    return outcomes[0], outcomes[1]


def _two_categories(p: Distribution, q: Distribution) -> Masses:
    return Masses(*(torch.stack(pair, -1) for pair in zip(*_outcomes(p, q), strict=True)))


def bernoulli_renyi(p: Distribution, q: Distribution, alpha: Tensor) -> Tensor:
    """By the probabilities or the logits, as given."""
    return _category_renyi(_two_categories(p, q), alpha)


def bernoulli_jeffreys(p: Distribution, q: Distribution) -> Tensor:
    """By the probabilities or the logits, as given."""
    return _mass_jeffreys(_two_categories(p, q)).sum(-1)


def _count(p: Binomial, q: Binomial) -> Tensor:
    n, m = same(p.total_count, q.total_count)
    if is_plain((n, m)) and not bool((n == m).all()):
        index = (n != m).nonzero()[0].tolist()
        raise NotImplementedError(
            f"Binomial with {int(n[tuple(index)])} trials against {int(m[tuple(index)])} at {index}: only equal "
            "numbers of trials are an exponential family and have a closed form"
        )
    return n


def binomial_renyi(p: Binomial, q: Binomial, alpha: Tensor) -> Tensor:
    """The Bernoulli's, times the number of trials."""
    return times(_count(p, q), bernoulli_renyi(p, q, alpha))


def binomial_jeffreys(p: Binomial, q: Binomial) -> Tensor:
    """The Bernoulli's, times the number of trials."""
    return times(_count(p, q), bernoulli_jeffreys(p, q))


def geometric_renyi(p: Geometric, q: Geometric, alpha: Tensor) -> Tensor:
    r"""Of the numbers of failures, :math:`\rho = p^\alpha q^{1-\alpha}/(1 - m)`, m the same of 1 - p and 1 - q.

    With :math:`S = [\alpha \bar p + (1 - \alpha) \bar q - m]/(1 - \alpha)` of the failures,
    :math:`1 - m = \alpha p + (1 - \alpha) q + (1 - \alpha) S`. Beyond alpha = 1, with b = alpha - 1, e = (q - p)/p and
    y = e + S/p, :math:`D = L(e) + S/p + L(-b y)/b`, infinite where b y >= 1.
    """
    success, failure = _outcomes(p, q)
    batch = torch.broadcast_shapes(success.ratio.shape, alpha.shape)
    alpha = alpha.expand(batch)
    success, failure = (Masses(*(x.expand(batch) for x in m)) for m in (success, failure))
    capped, gap, _ = weights(alpha)
    total, infinite = _mass_renyi(failure, alpha)
    inside = alpha <= 1
    by_rate = capped * log_gap(-success.ratio, capped)
    mean = capped * torch.exp(success.log_p) + (1 - capped) * torch.exp(success.log_q)
    below = log1p_over(gap * total / mean, gap, total / mean)
    change = total / torch.exp(success.log_p)
    y = torch.where(inside, 0.0, expm1_value(-success.ratio) + change)
    exists = gap * y < 1
    y = torch.where(exists, y, 0.0)
    above = change - y * quadratic_ratio(minus_log1pmx, -gap * y, -1 / 3)
    value = by_rate + torch.where(inside, below, above)
    return torch.where(infinite | ~exists, torch.inf, value)


def geometric_jeffreys(p: Geometric, q: Geometric) -> Tensor:
    """(1/p - 1/q) log((1 - p)/(1 - q))."""
    success, failure = _outcomes(p, q)
    odds = torch.exp(-success.log_p) * expm1_value(success.ratio)
    finite = torch.where(failure.both, -odds * failure.ratio, 0.0)
    return torch.where((failure.only_p > 0) | (failure.only_q > 0), torch.inf, finite)
