"""The weights of a mixture in log space, read from what the caller gave.

torch's Categorical turns probs into logits by clamping them at eps, so that a weight of exactly 0 leaks 1e-7 of a
component into the density. The logarithm taken here is of the probability itself, and -inf at 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Categorical

from .._autograd import rowwise

__all__ = ["categorical_log_weights", "log_probability"]


def _value(p: Tensor) -> tuple[Tensor]:
    return (p.log(),)


def _gradient(inputs: tuple[Tensor, ...], saved: tuple[Tensor, ...] | None) -> tuple[Tensor]:
    (p,) = inputs
    positive = p > 0
    return (torch.where(positive, 1 / torch.where(positive, p, torch.ones_like(p)), torch.zeros_like(p)),)


log_probability = rowwise(_value, _gradient)
log_probability.__doc__ = "log(p), -inf at p = 0 with gradient 0 there: a component that is switched off stays off."


def categorical_log_weights(mixture: Categorical) -> Tensor:
    """Normalised log-weights of a Categorical, torch's own, shape ``batch_shape + (K,)``; -inf for a probability of 0.

    Whichever of probs and logits the caller gave is read; a Categorical that was expanded after both had been
    computed no longer tells them apart, and is read by its probs.
    """
    stored = mixture.__dict__
    if "probs" in stored and ("logits" not in stored or next(n for n in stored if n in ("probs", "logits")) == "probs"):
        p = stored["probs"]
        return log_probability(p) - p.sum(-1, keepdim=True).log()
    return torch.log_softmax(mixture.logits, -1)
