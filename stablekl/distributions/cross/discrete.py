r"""KL between Bernoulli, binomial and Poisson distributions.

* Bernoulli(p) against Poisson(lambda): :math:`deviance(p, \lambda) + [(1 - p) \log(1 - p) + p]`, neither negative, with
  :math:`deviance(x, y) = x \log(x/y) + y - x`, of which the second term is deviance(1 - p, 1). torch adds an entropy, a
  logarithm and a rate, of which nothing is left for small p near the rate: KL is :math:`p^2/2` there. From logits, p and
  1 - p are taken in twice the digits, since p may lie closer to the rate than its rounding does.
* Poisson against Bernoulli and binomial distributions: infinite, since no count is too large for a Poisson, except where
  its rate is 0 and all of its mass at 0: :math:`-n \log(1 - q)`, the logarithm of the other's mass there. The gradient by
  the rate is given as 0 where that is 0 (the one-sided derivative is infinite). torch says infinite throughout.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import Binomial as TorchBinomial
from torch.distributions import Poisson as TorchPoisson

from ..._double import Double, add, divide, double, exp, select, subtract
from ...registry import register_hardened
from .._base import given
from .._scalar import scalar_rule
from ..bernoulli import Bernoulli
from ..binomial import Binomial
from ..poisson import Poisson
from ._pieces import deviance

__all__: list[str] = []


def _odds(logits: Tensor) -> tuple[Double, Double]:
    """The probabilities of 1 and of 0 in twice the digits."""
    falls = exp(-logits.abs())
    whole = add(falls, 1.0)
    small, large = divide(falls, whole), divide(1.0, whole)
    rises = logits > 0
    return select(rises, large, small), select(rises, small, large)


def _bernoulli_poisson(one: Double, zero: Double, rate: Tensor) -> Tensor:
    return deviance(one, rate) + deviance(zero, torch.ones_like(rate))


def _softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), infinite at infinity with gradient 0; torch's own is x from 20 on."""
    finite = x < torch.inf
    safe = torch.where(finite, x, 0.0)
    return torch.where(finite, safe.clamp(min=0) + torch.log1p(torch.exp(-safe.abs())), torch.inf)


def _by_outcome(one: Tensor, log_one: Tensor, log_zero: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    """The derivatives by the probability and by the rate; 0 where the one-sided ones are infinite."""
    inside = (one > 0) & (rate > 0) & (log_zero > -torch.inf)
    by_one = torch.where(inside, log_one - torch.log(torch.where(rate > 0, rate, 1.0)) - log_zero, 0.0)
    return by_one, torch.where(rate > 0, (rate - one) / torch.where(rate > 0, rate, 1.0), (one == 0).to(one.dtype))


def _by_probs(p: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    some, certain = p > 0, p == 1
    log_zero = torch.where(certain, -torch.inf, torch.log1p(-torch.where(certain, 0.0, p)))
    return _by_outcome(p, torch.log(torch.where(some, p, 1.0)), log_zero, rate)


def _by_logits(logits: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    one, zero = torch.sigmoid(logits), torch.sigmoid(-logits)
    finite = torch.where(logits.isfinite(), logits, 0.0)
    by_one, by_rate = _by_outcome(one, -_softplus(-finite), -_softplus(finite), rate)
    return by_one * one * zero, by_rate


_RULES = {
    "probs": scalar_rule(lambda p, rate: _bernoulli_poisson(double(p), subtract(1.0, p), rate), _by_probs),
    "logits": scalar_rule(lambda logits, rate: _bernoulli_poisson(*_odds(logits), rate), _by_logits),
}


@register_hardened(Bernoulli, Poisson)
def kl_bernoulli_poisson(p: TorchBernoulli, q: TorchPoisson) -> Tensor:
    """KL of a Bernoulli against a Poisson distribution, elementwise; see the module."""
    kind, value = given(p)
    return _RULES[kind](value, q.rate)


def _none_of(kind: str, value: Tensor) -> Tensor:
    """-log of the probability of 0."""
    if kind == "logits":
        return _softplus(value)
    inside = value < 1
    return torch.where(inside, -torch.log1p(-torch.where(inside, value, 0.0)), torch.inf)


def _poisson(kind: str, rate: Tensor, count: Tensor, value: Tensor) -> Tensor:
    at_zero = (rate == 0) & (count > 0)
    kl = count * _none_of(kind, torch.where(at_zero, value, 0.0))
    return torch.where(rate == 0, torch.where(at_zero, kl, 0.0), torch.inf)


_POISSON = {
    kind: scalar_rule(lambda rate, count, value, kind=kind: _poisson(kind, rate, count, value))
    for kind in ("probs", "logits")
}


@register_hardened(Poisson, Bernoulli)
def kl_poisson_bernoulli(p: TorchPoisson, q: TorchBernoulli) -> Tensor:
    """KL of a Poisson against a Bernoulli distribution, elementwise; see the module."""
    kind, value = given(q)
    return _POISSON[kind](p.rate, torch.ones_like(value), value)


@register_hardened(Poisson, Binomial)
def kl_poisson_binomial(p: TorchPoisson, q: TorchBinomial) -> Tensor:
    """KL of a Poisson against a binomial distribution, elementwise; see the module."""
    kind, value = given(q)
    return _POISSON[kind](p.rate, q.total_count, value)
