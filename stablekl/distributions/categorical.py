"""Categorical distributions; their KL divergence is a sum over outcomes (see `_outcomes`).

torch's own class normalises probabilities and logits in its constructor, which rounds; `Categorical` of stablekl
keeps what it was given, and its divergence is that of the exact weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical as TorchCategorical
from torch.types import _size

from .._autograd import masked_product
from .._double import Double
from ..parameterizations import holds_data, raise_outside
from ..registry import register_hardened
from ._base import Checked, Given, common_dtype, given, widened
from ._density import checked
from ._outcomes import log_probabilities, log_weights_kl, weights_kl
from ._trials import log_of

__all__ = ["Categorical", "categories_kl"]


class Categorical(Given, TorchCategorical, Checked):
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
        """Check the weights, and keep them besides torch's normalised version of them."""
        checked = self._validate_args if validate_args is None else validate_args
        if checked:
            _check_weights(type(self).__name__, probs, logits)
        # torch would want probabilities to sum to 1 to six digits, which its own in half precision do not
        super().__init__(probs, logits, validate_args=False)
        self._validate_args = checked
        self._keep(probs, logits, self._param)

    def expand(self, batch_shape: _size, _instance: Any = None) -> Categorical:
        """Return this distribution with its batch shape expanded; no memory is allocated."""
        new = self._get_checked_instance(Categorical, _instance)  # type: ignore[no-untyped-call]
        expanded: Categorical = super().expand(batch_shape, new)  # type: ignore[no-untyped-call]
        expanded.given_as, expanded.given_value = self.given_as, self.given_value.expand(*batch_shape, -1)
        return expanded

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of the probability, of the weights given: torch moves probabilities of 0 to eps, and -inf to -15.9."""
        index = checked(self, value).long().unsqueeze(-1)
        index, logs = torch.broadcast_tensors(index, self._log_probabilities())
        found: Tensor = logs.gather(-1, index[..., :1]).squeeze(-1)
        return found.to(self.given_value.dtype)

    def entropy(self) -> Tensor:
        """The entropy; a category that does not occur adds nothing."""
        logs = self._log_probabilities()
        return masked_product(torch.exp(logs), -logs).sum(-1).to(self.given_value.dtype)

    def _log_probabilities(self) -> Tensor:
        return log_probabilities(self.given_as, widened(self.given_value))


def _check_weights(owner: str, probs: Tensor | None, logits: Tensor | None) -> None:
    """Raise an error that says which weights make no distribution."""
    if (probs is None) == (logits is None):
        raise ValueError(f"{owner} takes either probs or logits")
    name, x = ("probs", probs) if logits is None else ("logits", logits)
    if x is None or not holds_data(x):
        return
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"{name} of {owner} must be (..., K), one for each category, but the shape is {tuple(x.shape)}"
        )
    good = (x >= 0) & x.isfinite() if name == "probs" else x < torch.inf
    if not bool(good.all()):
        raise_outside(owner, name, x, good, "finite and 0 or more" if name == "probs" else "below inf, and no NaN")
    some = (x > (0 if name == "probs" else -torch.inf)).any(-1)
    if not bool(some.all()):
        raise_outside(owner, name, x, some, "those of one possible category at least")


def categories_kl(p: TorchCategorical, q: TorchCategorical) -> Tensor:
    """KL between distributions over as many categories, ours or torch's.

    Raises:
        ValueError: the numbers of categories differ.
    """
    (name_p, x), (name_q, y) = given(p), given(q)
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
