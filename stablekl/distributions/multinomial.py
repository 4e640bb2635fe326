r"""Multinomial distributions, and their KL divergence: that of one draw (see `_outcomes`) times their number.

.. math:: KL = n \sum_j p_j \log \frac{p_j}{q_j},

as the binomial coefficients are the same. Distributions of different numbers of draws have no outcome in common, since
counts sum to that number: infinite. torch has no rule.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Multinomial as TorchMultinomial
from torch.types import _size

from .._autograd import masked_product
from .._deviance import binomial_deviance, binomial_rest, deviance, poisson_rest
from .._double import Double
from ..registry import register_hardened
from ._base import Checked, common_dtype, given, moved, widened
from ._density import checked
from ._outcomes import log_weights_kl, weights_kl
from ._trials import log_of
from .categorical import Categorical, categories_kl

__all__ = ["Multinomial"]


class Multinomial(TorchMultinomial, Checked):
    """`torch.distributions.Multinomial` with a KL divergence, which torch has not.

    Args:
        total_count: number of draws, the same for the whole batch.
        probs: weights of the K categories, not negative, ``(..., K)``, of any sum; or
        logits: their logarithms, ``(..., K)``, -inf for a category that does not occur.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a weight is negative or NaN, or all of them are 0; a negative number of draws.

    Example:
        >>> import torch, stablekl
        >>> p = stablekl.Multinomial(3, torch.tensor([0.5, 0.5]))
        >>> q = stablekl.Multinomial(3, torch.tensor([0.1, 0.9]))
        >>> print(torch.distributions.kl_divergence(p, q))
        tensor(1.5325)
    """

    _categorical: Categorical

    def __init__(
        self,
        total_count: int = 1,
        probs: Tensor | None = None,
        logits: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        """Keep what was given besides torch's normalised version of it."""
        if not isinstance(total_count, int):
            raise NotImplementedError(
                f"total_count of Multinomial must be one int for the whole batch, but is {total_count!r:.60}"
            )
        self.total_count = total_count
        self._categorical = Categorical(probs, logits, validate_args=validate_args)
        # not torch's constructor, which would want probabilities to sum to 1 to six digits
        Checked.__init__(self, self._categorical.batch_shape, self._categorical.param_shape[-1:], validate_args=False)
        self._validate_args = self._categorical._validate_args
        if self._validate_args and total_count < 0:
            raise ValueError(f"total_count of Multinomial must be 0 or more, but is {total_count}")

    def expand(self, batch_shape: _size, _instance: Any = None) -> Multinomial:
        """Return this distribution with its batch shape expanded; no memory is allocated."""
        new = self._get_checked_instance(Multinomial, _instance)  # type: ignore[no-untyped-call]
        expanded: Multinomial = super().expand(batch_shape, new)  # type: ignore[no-untyped-call]
        return expanded

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of the probability, of the weights given: -n KL(x/n || p), and what Stirling leaves of factorials.

        Logarithms of the factorials, of the size of n log n, would cancel.
        """
        name, x = given(self._categorical)
        dtype = common_dtype(checked(self, value), x)
        counts, w = torch.broadcast_tensors(widened(value), widened(x))
        n = counts.sum(-1)
        drawn = torch.where((n > 0).unsqueeze(-1), counts, 1.0)
        one = weights_kl(drawn, w) if name == "probs" else log_weights_kl(log_of(drawn), Double(w, torch.zeros_like(w)))
        rests = poisson_rest(n) - poisson_rest(counts).sum(-1)
        return torch.where(n > 0, rests - masked_product(n, one), 0.0).to(dtype)

    def entropy(self) -> Tensor:
        """The entropy, the sum over categories of E[log x! - x log(n p) + n p], less the same of all draws.

        torch's takes the logarithms of factorials in float32, and cancels for many draws.
        """
        one = widened(self._categorical.entropy())
        n = self.total_count
        if n < 2:
            return (n * one).to(self._categorical.given_value.dtype)
        p = torch.exp(self._categorical._log_probabilities())
        possible, certain = p > 0, p == 1
        p = torch.where(possible & ~certain, p, 0.5)
        k = torch.arange(n + 1, dtype=p.dtype, device=p.device).reshape(-1, *(1,) * p.ndim)
        j = n - k
        log_p, log_q = torch.log(p), torch.log1p(-p)
        mass = torch.exp(binomial_rest(k, j) - binomial_deviance(k, j, p, 1 - p, log_p, log_q))
        each = (mass * (poisson_rest(k) + deviance(k, n * p - k, n * p, log_p + math.log(n)))).sum(0)
        of_all = poisson_rest(k[-1])
        each = torch.where(certain, of_all, torch.where(possible, each, 0.0))
        return (each.sum(-1) - of_all.squeeze(-1)).to(self._categorical.given_value.dtype)


@register_hardened(Multinomial, Multinomial)
def kl_multinomial_multinomial(p: TorchMultinomial, q: TorchMultinomial) -> Tensor:
    """KL between multinomial distributions; see the module.

    Raises:
        ValueError: the numbers of categories differ.
    """
    dtype = common_dtype(p.probs, q.probs)
    wide = widened(p.probs).dtype
    one = categories_kl(*(moved(d._categorical, wide) for d in (p, q)))
    if p.total_count != q.total_count:
        return torch.full_like(one, torch.inf).to(dtype)
    return (one * p.total_count if p.total_count else torch.zeros_like(one)).to(dtype)
