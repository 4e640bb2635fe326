"""The weights of a mixture in log space, read from what the caller gave.

torch's Categorical turns probs into logits by clamping them at eps, so that a weight of exactly 0 leaks 1e-7 of a
component into the density. The logarithm taken here is of the probability itself, and -inf at 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily
from torch.distributions.utils import probs_to_logits

from .._autograd import rowwise
from ..distributions._base import common_dtype

__all__ = [
    "categorical_log_weights",
    "given_weights",
    "label_entropy",
    "log_probability",
    "log_weights_of",
    "normalised_log_weights",
    "weighted",
]


def _value(p: Tensor) -> tuple[Tensor]:
    return (p.log(),)


def _gradient(inputs: tuple[Tensor, ...], saved: tuple[Tensor, ...] | None) -> tuple[Tensor]:
    (p,) = inputs
    positive = p > 0
    return (torch.where(positive, 1 / torch.where(positive, p, torch.ones_like(p)), torch.zeros_like(p)),)


log_probability = rowwise(_value, _gradient)
log_probability.__doc__ = "log(p), -inf at p = 0 with gradient 0 there: a component that is switched off stays off."


def normalised_log_weights(logits: Tensor | None, probs: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """Normalised log-weights from unnormalised logits or probs, whichever is given, ``(..., K)``.

    Args:
        logits: unnormalised log-weights, or None.
        probs: unnormalised weights, or None.
        dtype: of the result (default: that of the weights). The logarithm is taken in it, in float32 at the least: a
            half-precision log-weight is rounded once, not summed up in half precision.
    """
    given = logits if probs is None else probs
    if given is None:
        raise ValueError("give exactly one of logits and probs; got neither")
    target = common_dtype(given) if dtype is None else dtype
    working = given.to(torch.promote_types(target, torch.float32))
    if probs is not None:
        result = log_probability(working) - working.sum(-1, keepdim=True).log()
    else:
        result = torch.log_softmax(working, -1)
    return result.to(target)


def given_weights(mixture: Categorical) -> tuple[Tensor | None, Tensor | None]:
    """The logits or the probs, one of them None, that a Categorical, torch's own, was built from.

    Both may exist, each computed from the other on demand; a dict keeps the order in which they were stored.
    `Categorical.expand` loses it and stores probs first. Its logits are then right, however small the
    weight, except where they are what torch makes of the probabilities: those were clamped, and are computed anew.
    """
    stored = mixture.__dict__
    probs, logits = stored.get("probs"), stored.get("logits")
    if probs is None or logits is None:
        return logits, probs
    if next(name for name in stored if name in ("probs", "logits")) == "logits":
        return logits, None
    if mixture._param is not logits:
        return None, probs
    derived = logits.detach() == probs_to_logits(probs.detach())
    return torch.where(derived, log_probability(probs), logits), None


def categorical_log_weights(mixture: Categorical, dtype: torch.dtype | None = None) -> Tensor:
    """Normalised log-weights of a Categorical, torch's own, ``batch_shape + (K,)``; -inf for a probability of 0."""
    return normalised_log_weights(*given_weights(mixture), dtype)


def log_weights_of(mixture: MixtureSameFamily, dtype: torch.dtype) -> Tensor:
    """Normalised log-weights of a mixture, torch's or ours, ``batch_shape + (K,)``, in this precision.

    Our class keeps the weights as they were given; torch's has to be asked what it was built from.
    """
    ours = getattr(mixture, "_log_weights", None)
    result: Tensor = categorical_log_weights(mixture.mixture_distribution, dtype) if ours is None else ours(dtype)
    return result


def weighted(log_weights: Tensor, terms: Tensor) -> Tensor:
    """sum_k w_k terms_k, where a weight of 0 counts nothing even beside an infinite term."""
    w = log_weights.exp()
    return (w * torch.where(w > 0, terms, 0.0)).sum(-1)


def label_entropy(log_weights: Tensor) -> Tensor:
    """H(w), of the batch shape."""
    # no weight is left of a log-weight of -800
    return -(log_weights.exp() * log_weights.clamp(min=-800.0)).sum(-1)
