r"""Binomial distributions, and their KL divergence: that of one trial (see `bernoulli`) times their number.

Where q has fewer trials than p, it is infinite unless p never succeeds. Where it has more, with n and N trials, the
mean m = n p and :math:`t = N q - m`,

.. math:: KL = \Phi(n, p, N) + m\,L\!\left(\frac tm\right) + (N - m)\,L\!\left(\frac{-t}{N - m}\right), \qquad
          L(v) = v - \log(1 + v),

the divergence between p and the distribution of its mean with q's number of trials, a positive integral (see
`_trial_gap`), and the divergence of this one from q. A sum over n + 1 outcomes would depend on the data; the logarithms
of binomial coefficients cancel against the rest of it, at small probabilities all of them. Numbers of trials that
differ are whole, and have no derivatives.

Accuracy: see the table of `precision`; Phi was seen up to 10 ulp from the sum, in 900 triples with n up to 1000, N up
to 1e15 and p from 1e-100 to 1 - 2^-53.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Binomial as TorchBinomial

from .. import _double
from .._autograd import masked_product, may_hold
from .._deviance import binomial_deviance, binomial_rest, deviance
from .._double import Double
from ..registry import register_hardened
from ._base import Checked, common_dtype, given, widened
from ._density import checked, outcomes
from ._scalar import attached
from ._trial_gap import trial_gap, trial_gap_slope
from ._trials import Trial, by_kinds, by_parameter, log_gain, log_probability, mirrored, trial
from .bernoulli import bernoulli_kl

__all__ = ["Binomial"]


class Binomial(TorchBinomial, Checked):
    """`torch.distributions.Binomial` with a KL divergence that is exact at probabilities of 0 and 1.

    Args:
        total_count: number of trials, not negative.
        probs: of success, between 0 and 1; or
        logits: log(probs/(1 - probs)), real or infinite.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is outside of its domain somewhere (says where).

    Example:
        >>> import torch, stablekl
        >>> p, q = stablekl.Binomial(3, torch.tensor(1.0)), stablekl.Binomial(3, torch.tensor(0.5))
        >>> print(torch.distributions.kl_divergence(p, q))
        tensor(2.0794)
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of the probability, by deviances (see `_deviance`), of the probabilities or logits as they were given."""
        dtype = common_dtype(checked(self, value), self.total_count, given(self)[1])
        inputs = widened(value), widened(self.total_count), *outcomes(self)
        return _log_mass(*torch.broadcast_tensors(*inputs)).to(dtype)


def _log_mass(k: Tensor, n: Tensor, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    inside = (k >= 0) & (k <= n)
    k, j = torch.where(inside, k, 0.0), torch.where(inside, n - k, n)
    value = binomial_rest(k, j) - binomial_deviance(k, j, p, q, log_p, log_q)
    return torch.where(inside, value, -torch.inf)


def _probability(kind: str, x: Tensor) -> Double:
    """In twice the digits."""
    if kind == "probs":
        return _double.double(x)
    fall = _double.exp(-x.abs())
    fall = _double.select(fall.hi == 0, torch.exp(-x.abs()), fall)  # of fewer digits below e^-700
    return _double.divide(_double.select(x > 0, 1.0, fall), _double.add(fall, 1.0))


class _Means(NamedTuple):
    """What the rule is made of: a has no more than b trials.

    Attributes:
        mean: of successes under p.
        rest: b's trials less that.
        t: the mean under q less that under p, to its relative accuracy.
        log_success: logarithm of the mean under q.
        log_failure: of the mean of failures under q.
    """

    mean: Tensor
    rest: Tensor
    t: Tensor
    log_success: Tensor
    log_failure: Tensor


def _means(n: Tensor, p: Trial, m: Tensor, q: Trial, exact: Tensor) -> _Means:
    mean, log_m = n * p.success, torch.log(torch.where(m > 0, m, 1.0))
    t = attached(exact, m * q.success - mean)
    return _Means(mean, (m - n) + n * p.failure, t, *(log_m + log_probability(x) for x in (q, mirrored(q))))


def _exact(kind_p: str, kind_q: str) -> Callable[..., Tensor]:
    def difference(n: Tensor, x: Tensor, m: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            n, x, m, y = (v.detach() for v in (n, x, m, y))
            own, other = _double.multiply(m, _probability(kind_q, y)), _double.multiply(n, _probability(kind_p, x))
            return _double.rounded(_double.subtract(own, other))

    return difference


def _gap_inputs(n: Tensor, p: Trial, m: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Where the numbers of trials matter, and harmless ones elsewhere."""
    some = (m > n) & (n > 0) & (p.success > 0)
    inputs = zip((n, p.success, p.failure, m - n), (1.0, 0.5, 0.5, 1.0), strict=True)
    return some, tuple(torch.where(some, x, safe) for x, safe in inputs)


def _impossible(n: Tensor, p: Trial, m: Tensor, q: Trial) -> Tensor:
    """Where p has successes that q has not, or more of them; NaN has neither."""
    return (n > 0) & (p.hi > -torch.inf) & ((n > m) & (q.hi == q.hi) | (q.hi == -torch.inf))


def _unequal_value(kind_p: str, kind_q: str) -> Callable[..., Tensor]:
    exact = _exact(kind_p, kind_q)

    def value(n: Tensor, x: Tensor, m: Tensor, y: Tensor) -> Tensor:
        p, q = trial(kind_p, x), trial(kind_q, y)
        at = _means(n, p, m, q, exact(n, x, m, y))
        some, inputs = _gap_inputs(n, p, m)
        gap = torch.where(some, trial_gap(*inputs), 0.0)
        means = deviance(at.mean, at.t, m * q.success, at.log_success)
        means = means + deviance(at.rest, -at.t, m * q.failure, at.log_failure)
        value = gap + means
        value = torch.where(value <= 0, 0.0, value)  # -0, and what subnormal terms leave
        value = torch.where(_impossible(n, p, m, q), torch.inf, value)
        return torch.where(p.hi.isnan() | q.hi.isnan(), torch.nan, value)

    return value


def _unequal_gradient(kind_p: str, kind_q: str) -> Callable[..., tuple[Tensor, ...]]:
    exact = _exact(kind_p, kind_q)

    def gradient(n: Tensor, x: Tensor, m: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        p, q = trial(kind_p, x), trial(kind_q, y)
        at = _means(n, p, m, q, exact(n, x, m, y))
        some, inputs = _gap_inputs(n, p, m)
        impossible = _impossible(n, p, m, q)
        some = some & ~impossible & (q.hi < torch.inf)
        mean, rest, t = (torch.where(some, v, 1.0) for v in (at.mean, at.rest, at.t))
        log_success, log_failure = (torch.where(some, v, 0.0) for v in (at.log_success, at.log_failure))
        by_mean = log_gain(rest, -t, log_failure) - log_gain(mean, t, log_success)
        by_p = torch.where(some, trial_gap_slope(*inputs) + n * by_mean, 0.0)
        by_p = masked_product(p.success * p.failure, by_p) if kind_p == "logits" else by_p
        by_q = torch.where(impossible & (n > m), 0.0, at.t)
        return torch.zeros_like(n), by_p, torch.zeros_like(m), by_parameter(kind_q, q, by_q, (m, -m))

    return gradient


_UNEQUAL = by_kinds(_unequal_value, _unequal_gradient)


@register_hardened(Binomial, Binomial)
def kl_binomial_binomial(p: TorchBinomial, q: TorchBinomial) -> Tensor:
    """KL between binomial distributions, elementwise; see the module."""
    (kind_p, x), (kind_q, y) = given(p), given(q)
    dtype = common_dtype(x, y)
    n, m = widened(p.total_count), widened(q.total_count)
    unequal, one = n != m, bernoulli_kl(p, q)
    value = masked_product(n, torch.where(unequal, 0.0, one))  # finite where it is not taken, for the gradient's sake
    if may_hold(unequal):
        columns = torch.broadcast_tensors(n, widened(x), m, widened(y))
        safe = (torch.where(unequal, v, s) for v, s in zip(columns, (1.0, 0.5, 2.0, 0.5), strict=True))
        value = torch.where(unequal, _UNEQUAL[kind_p, kind_q](*safe), value)
    return value.to(dtype)
