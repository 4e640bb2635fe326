"""One-hot categorical distributions: their KL divergence is that of the categories (see `categorical`).

So is that between a OneHotCategorical and a Categorical, which torch has no rule for: the events are written
differently, as vectors and as integers, but they are the same K outcomes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributions import Categorical as TorchCategorical
from torch.distributions import OneHotCategorical as TorchOneHotCategorical
from torch.types import _size

from ..registry import register_hardened
from ._base import Checked
from .categorical import Categorical, categories_kl

__all__ = ["OneHotCategorical"]


class OneHotCategorical(TorchOneHotCategorical, Checked):
    """`torch.distributions.OneHotCategorical` with a KL divergence that is exact at probabilities of 0.

    Args:
        probs: weights of the K categories, not negative, ``(..., K)``, of any sum; or
        logits: their logarithms, ``(..., K)``, -inf for a category that does not occur.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a weight is negative or NaN, or all of them are 0.
    """

    def __init__(
        self, probs: Tensor | None = None, logits: Tensor | None = None, validate_args: bool | None = None
    ) -> None:
        """Build on stablekl's `Categorical`, which keeps what was given."""
        self._categorical = Categorical(probs, logits, validate_args=validate_args)
        shape = self._categorical.batch_shape
        # not torch's constructor, which would want probabilities to sum to 1 to six digits
        Checked.__init__(self, shape, self._categorical.param_shape[-1:], validate_args=False)
        self._validate_args = self._categorical._validate_args

    def expand(self, batch_shape: _size, _instance: Any = None) -> OneHotCategorical:
        """Return this distribution with its batch shape expanded; no memory is allocated."""
        new = self._get_checked_instance(OneHotCategorical, _instance)  # type: ignore[no-untyped-call]
        expanded: OneHotCategorical = super().expand(batch_shape, new)  # type: ignore[no-untyped-call]
        return expanded


@register_hardened(OneHotCategorical, OneHotCategorical)
def kl_one_hot_categorical_one_hot_categorical(p: TorchOneHotCategorical, q: TorchOneHotCategorical) -> Tensor:
    """KL between one-hot categorical distributions: that of the categories."""
    return categories_kl(p._categorical, q._categorical)


@register_hardened(OneHotCategorical, Categorical)
def kl_one_hot_categorical_categorical(p: TorchOneHotCategorical, q: TorchCategorical) -> Tensor:
    """KL between categories written as vectors and categories written as integers: that of the categories."""
    return categories_kl(p._categorical, q)


@register_hardened(Categorical, OneHotCategorical)
def kl_categorical_one_hot_categorical(p: TorchCategorical, q: TorchOneHotCategorical) -> Tensor:
    """KL between categories written as integers and categories written as vectors: that of the categories."""
    return categories_kl(p, q._categorical)
