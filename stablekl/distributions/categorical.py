"""Categorical distributions; their KL divergence is a sum over outcomes (see `_outcomes`).

torch's own class normalises probabilities and logits in its constructor, which rounds; `Categorical` of stablekl
keeps what it was given, and its divergence is that of the exact weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical as TorchCategorical
from torch.distributions import Distribution
from torch.types import _size

from .._double import Double
from ..registry import register_hardened
from ._base import Checked, common_dtype, given, widened
from ._outcomes import log_of, log_weights_kl, weights_kl

__all__ = ["Categorical", "categories_kl"]


class Categorical(TorchCategorical, Checked):
    """`torch.distributions.Categorical` with a KL divergence that is exact at probabilities of 0 and logits of -inf.

    Args:
        probs: weights of the K categories, not negative, ``(..., K)``, of any sum; or
        logits: their logarithms, ``(..., K)``, -inf for a category that does not occur.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a weight is negative or NaN, or all of them are 0.

    Example:
        >>> import torch, stablekl
        >>> p = stablekl.Categorical(torch.tensor([0.5, 0.5]))
        >>> q = stablekl.Categorical(torch.tensor([1e-30, 1.0]))
        >>> print(f"{torch.distributions.kl_divergence(p, q):.3f}")
        33.846
    """

    def __init__(
        self, probs: Tensor | None = None, logits: Tensor | None = None, validate_args: bool | None = None
    ) -> None:
        """Keep what was given besides torch's normalised version of it."""
        super().__init__(probs, logits, validate_args=validate_args)
        self.given_as = "logits" if probs is None else "probs"
        self.given_weights: Tensor = logits if probs is None else probs  # type: ignore[assignment]

    def expand(self, batch_shape: _size, _instance: Any = None) -> Categorical:
        """Return this distribution with its batch shape expanded; no memory is allocated."""
        new = self._get_checked_instance(Categorical, _instance)  # type: ignore[no-untyped-call]
        expanded: Categorical = super().expand(batch_shape, new)  # type: ignore[no-untyped-call]
        expanded.given_as = self.given_as
        expanded.given_weights = self.given_weights.expand(*batch_shape, -1)
        return expanded


def _given(p: Distribution) -> tuple[str, Tensor]:
    return (p.given_as, p.given_weights) if isinstance(p, Categorical) else given(p)


def categories_kl(p: TorchCategorical, q: TorchCategorical) -> Tensor:
    """KL between distributions over as many categories, ours or torch's.

    Raises:
        ValueError: the numbers of categories differ.
    """
    (name_p, x), (name_q, y) = _given(p), _given(q)
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"p has {x.shape[-1]} categories and q has {y.shape[-1]}: they are no distributions over the same points. "
            "Give the missing categories a probability of 0"
        )
    dtype = common_dtype(x, y)
    x, y = torch.broadcast_tensors(widened(x), widened(y))
    if name_p == name_q == "probs":
        return weights_kl(x, y).to(dtype)
    zero = torch.zeros_like(x)
    a, b = (Double(w, zero) if name == "logits" else log_of(w) for name, w in ((name_p, x), (name_q, y)))
    return log_weights_kl(a, b).to(dtype)


@register_hardened(Categorical, Categorical)
def kl_categorical_categorical(p: TorchCategorical, q: TorchCategorical) -> Tensor:
    """KL between categorical distributions; see `_outcomes`."""
    return categories_kl(p, q)
