r"""Bernoulli distributions, and their KL divergence as a sum of non-negative terms, exact at probabilities of 0 and 1.

.. math:: KL = p\,L\!\left(\frac{q - p}{p}\right) + (1 - p)\,L\!\left(\frac{p - q}{1 - p}\right), \qquad
          L(v) = v - \log(1 + v),

of probabilities; of logits, or of one of each, see `_trials`. An outcome that p excludes adds q's probability of it;
one that q alone excludes makes the divergence infinite. torch's differences of cross-entropies cancel near p = q, and
its logits of 0 against 20 give inf for 9.307.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import Distribution

from .._autograd import masked_product
from .._bregman import log_quotient, remainder_of_log
from ..registry import register_hardened
from ._base import Checked, common_dtype, given, widened
from ._density import checked, outcomes
from ._scalar import scalar_rule
from ._trials import by_kinds, by_parameter, trial, trial_kl, trial_slopes

__all__ = ["Bernoulli", "bernoulli_kl", "failure_excess", "log_ratio", "success_excess"]


class Bernoulli(TorchBernoulli, Checked):
    """`torch.distributions.Bernoulli` with a KL divergence that is exact at probabilities of 0 and 1.

    Args:
        probs: of 1, between 0 and 1; or
        logits: log(probs/(1 - probs)), real or infinite.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a probability is outside of [0, 1] or NaN somewhere (says where).

    Example:
        >>> import torch, stablekl
        >>> p, q = stablekl.Bernoulli(torch.tensor(1.0)), stablekl.Bernoulli(logits=torch.tensor(-60.0))
        >>> print(torch.distributions.kl_divergence(p, q))
        tensor(60.)
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of the probability, of those given: torch moves them away from 0 and 1 first."""
        dtype = common_dtype(checked(self, value), given(self)[1])
        x, _, _, log_p, log_q = torch.broadcast_tensors(widened(value), *outcomes(self))
        return (masked_product(x, log_p) + masked_product(1 - x, log_q)).to(dtype)

    def entropy(self) -> Tensor:
        """The entropy, 0 for probabilities of 0 and 1."""
        p, q, log_p, log_q = outcomes(self)
        return -(masked_product(p, log_p) + masked_product(q, log_q)).to(given(self)[1].dtype)


def _excess(x: Tensor, m: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """L(v) for v = m/x - 1 = d/x, and where it must come from v - log(m/x) instead; x positive.

    That is where v may overflow, or m/x is below the normal numbers and has lost digits.
    """
    v, quotient = d / x, m / x
    far = (v >= 1) | (quotient < torch.finfo(x.dtype).tiny)
    return remainder_of_log(v, quotient), far


def success_excess(p: Tensor, q: Tensor) -> Tensor:
    """[p log(p/q) + q - p]/p for positive p."""
    near, far = _excess(p, q, q - p)
    return torch.where(far, (q - p) / p - _log_quotient(q, p), near)


def _log_quotient(q: Tensor, p: Tensor) -> Tensor:
    """log(q/p) for positive p, -inf at 0."""
    some = q != 0
    return torch.where(some, log_quotient(torch.where(some, q, 1.0), p), -torch.inf)


def failure_excess(p: Tensor, q: Tensor) -> Tensor:
    """(1 - p) log((1 - p)/(1 - q)) + p - q, by the differences of p and q; p - q is not that of 1 - q and 1 - p."""
    x, m, d = 1 - p, 1 - q, p - q
    some = x != 0
    safe = torch.where(some, x, 1.0)
    near, far = _excess(safe, m, d)
    return torch.where(some, torch.where(far, d - x * _log_quotient(m, safe), x * near), m)


def _value(p: Tensor, q: Tensor) -> Tensor:
    some = p != 0  # and not p > 0: NaN and what is no probability give NaN
    x = torch.where(some, p, 1.0)
    near, far = _excess(x, q, q - p)
    success = torch.where(far, (q - x) - x * _log_quotient(q, x), x * near)
    # + 0, for the terms may be -0
    return torch.where(some, success, q) + failure_excess(p, q) + 0.0


def log_ratio(x: Tensor, y: Tensor, d: Tensor) -> Tensor:
    """log(x/y) with d = x - y; 0 where x is 0."""
    some = (x > 0) & (y > 0)
    x, y, d = (torch.where(some, v, w) for v, w in ((x, 1.0), (y, 1.0), (d, 0.0)))
    near = (d.abs() < 0.5 * y) & some
    log = torch.where(near, torch.log1p(torch.where(near, d / y, 0.0)), log_quotient(x, y))
    return torch.where(some, log, 0.0)


def _gradient(p: Tensor, q: Tensor) -> tuple[Tensor, ...]:
    # The derivative of 0 log 0 is taken to be 0.
    d = p - q
    infinite = ((q == 0) & (p > 0)) | ((q == 1) & (p < 1))
    by_p = log_ratio(p, q, d) - log_ratio(1 - p, 1 - q, -d)
    inner = (p > 0) & (p < 1)
    edge = torch.where(p == 0, 1 / (1 - q), -1 / torch.where(q > 0, q, 1.0))
    by_q = torch.where(inner, -d / torch.where(inner, q, 0.5) / torch.where(inner, 1 - q, 0.5), edge)
    return torch.where(infinite, 0.0, by_p), by_q


def _trial_value(kind_p: str, kind_q: str) -> Callable[..., Tensor]:
    return lambda x, y: trial_kl(trial(kind_p, x), trial(kind_q, y))


def _trial_gradient(kind_p: str, kind_q: str) -> Callable[..., tuple[Tensor, ...]]:
    def gradient(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        p, q = trial(kind_p, x), trial(kind_q, y)
        by_p, by_q = trial_slopes(p, q)
        by_p = by_p if kind_p == "probs" else masked_product(p.success * p.failure, by_p)
        return by_p, by_parameter(kind_q, q, by_q, (1.0, -1.0))

    return gradient


_RULES = by_kinds(_trial_value, _trial_gradient) | {("probs", "probs"): scalar_rule(_value, _gradient)}


def bernoulli_kl(p: Distribution, q: Distribution) -> Tensor:
    """KL between the successes of one trial of each, in float64; by probabilities or logits, whichever were given."""
    (name_p, x), (name_q, y) = given(p), given(q)
    return _RULES[name_p, name_q](widened(x), widened(y))


@register_hardened(Bernoulli, Bernoulli)
def kl_bernoulli_bernoulli(p: TorchBernoulli, q: TorchBernoulli) -> Tensor:
    """KL between Bernoulli distributions, elementwise; see the module."""
    return bernoulli_kl(p, q).to(common_dtype(given(p)[1], given(q)[1]))
