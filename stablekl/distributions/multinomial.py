r"""Multinomial distributions, and their KL divergence: that of one draw (see `_outcomes`) times their number.

.. math:: KL = n \sum_j p_j \log \frac{p_j}{q_j},

as the binomial coefficients are the same. Distributions of different numbers of draws have no outcome in common, since
counts sum to that number: infinite. torch has no rule.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Binomial
from torch.distributions import Multinomial as TorchMultinomial
from torch.types import _size

from ..registry import register_hardened
from ._base import Checked, check_batch_shapes, common_dtype, moved, widened
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

    def __init__(
        self,
        total_count: int = 1,
        probs: Tensor | None = None,
        logits: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        """Keep what was given besides torch's normalised version of it."""
        if not isinstance(total_count, int):
            raise NotImplementedError("total_count of Multinomial must be an int, the same for the whole batch")
        # not torch's constructor, whose categories are checked even with validate_args=False
        self.total_count = total_count
        self._categorical = Categorical(probs, logits, validate_args=validate_args)
        self._binomial = Binomial(total_count, self.probs, validate_args=False)
        event_shape = self._categorical.param_shape[-1:]
        Checked.__init__(self, self._categorical.batch_shape, event_shape, validate_args=validate_args)

    def expand(self, batch_shape: _size, _instance: Any = None) -> Multinomial:
        """Return this distribution with its batch shape expanded; no memory is allocated."""
        new = self._get_checked_instance(Multinomial, _instance)  # type: ignore[no-untyped-call]
        expanded: Multinomial = super().expand(batch_shape, new)  # type: ignore[no-untyped-call]
        return expanded


@register_hardened(Multinomial, Multinomial)
def kl_multinomial_multinomial(p: TorchMultinomial, q: TorchMultinomial) -> Tensor:
    """KL between multinomial distributions; see the module.

    Raises:
        ValueError: the numbers of categories differ, or batch shapes that do not broadcast.
    """
    check_batch_shapes(p, q)
    dtype = common_dtype(p.probs, q.probs)
    wide = widened(p.probs).dtype
    one = categories_kl(*(moved(d._categorical, wide) for d in (p, q)))
    if p.total_count != q.total_count:
        return torch.full_like(one, torch.inf).to(dtype)
    return (one * p.total_count if p.total_count else torch.zeros_like(one)).to(dtype)
