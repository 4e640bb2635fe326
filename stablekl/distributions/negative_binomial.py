r"""Negative binomial distributions, and their KL divergence without cancellation.

Successes before the n-th failure are n times those before the first, each a geometric distribution: with
:math:`L(v) = v - \log(1 + v)`, n the same for p and q,

.. math:: KL = \frac{n}{1 - p}\,\left[p\,L\!\left(\frac{q - p}{p}\right)
               + (1 - p)\,L\!\left(\frac{p - q}{1 - p}\right)\right],

the divergence of one trial in the brackets (see `bernoulli`). For different numbers of failures the log-ratio has the
terms log Gamma(x + n) - log Gamma(x + m), whose expectation is an infinite sum without a closed form: not implemented.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import NegativeBinomial as TorchNegativeBinomial

from .._autograd import is_eager, masked_product
from .._deviance import binomial_deviance, binomial_rest
from ..registry import register_hardened
from ._base import Checked, common_dtype, given, widened
from ._density import checked, outcomes
from ._scalar import scalar_rule
from .bernoulli import bernoulli_kl, failure_excess, log_ratio, success_excess

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


def _value(n: Tensor, p: Tensor, q: Tensor) -> Tensor:
    some = p > 0
    success = torch.where(some, p * success_excess(torch.where(some, p, 1.0), q), q)
    return masked_product(n, (success + failure_excess(p, q)) / (1 - p))


def _gradient(n: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, ...]:
    # log(p/q)/(1 - p)^2, the derivative of 0 log 0 being 0, and (q - p)/(q (1 - q) (1 - p))
    d, some = p - q, q > 0
    by_p = log_ratio(p, q, d) / (1 - p) / (1 - p)
    by_q = torch.where(some, -d / torch.where(some, q, 1.0), 1.0) / (1 - q) / (1 - p)
    infinite = (q == 0) & (p > 0)
    by_p, by_q = torch.where(infinite, torch.inf, by_p), torch.where(infinite, -torch.inf, by_q)
    return _value(torch.ones_like(n), p, q), masked_product(n, by_p), masked_product(n, by_q)


_kl = scalar_rule(_value, _gradient)


def _counts(p: TorchNegativeBinomial, q: TorchNegativeBinomial) -> tuple[Tensor, Tensor]:
    """The number of failures, and which are the same.

    Raises:
        NotImplementedError: they differ somewhere, seen in eager mode.
    """
    n, m = torch.broadcast_tensors(widened(p.total_count), widened(q.total_count))
    same = n == m
    if is_eager(same) and not bool(same.all()):
        at = int((~same).reshape(-1).to(torch.int8).argmax())
        raise NotImplementedError(
            "KL between negative binomial distributions is known for equal total_count only, and element "
            f"{at} (of {same.numel()}, flattened) has {float(n.reshape(-1)[at]):g} and {float(m.reshape(-1)[at]):g}: "
            "the expectation of log Gamma(x + total_count) has no closed form. Estimate it from samples"
        )
    return n, same


@register_hardened(NegativeBinomial, NegativeBinomial)
def kl_negative_binomial_negative_binomial(p: TorchNegativeBinomial, q: TorchNegativeBinomial) -> Tensor:
    """KL between negative binomial distributions of equal total_count, elementwise; by what they were built from.

    Raises:
        NotImplementedError: the counts differ somewhere. Under vmap and torch.compile the result is NaN there.
    """
    n, same = _counts(p, q)
    (name_p, x), (name_q, y) = given(p), given(q)
    dtype = common_dtype(x, y)
    if name_p == name_q == "probs":
        value = _kl(n, widened(x), widened(y))
    else:
        failure = torch.sigmoid(-widened(x)) if name_p == "logits" else 1 - widened(x)
        value = masked_product(n, bernoulli_kl(p, q) / failure)
    return torch.where(same, value, torch.nan).to(dtype)
