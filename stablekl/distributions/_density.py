"""What the log-densities and distribution functions of the families share: one precision, one rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._base import common_dtype, given, widened

__all__ = ["checked", "evaluated", "log1mexp", "outcomes"]


def checked(distribution: Any, x: Tensor) -> Tensor:
    """The sample as a tensor, validated as torch does where the distribution asks for it."""
    if distribution._validate_args:
        distribution._validate_sample(x)
    return x


def evaluated(f: Callable[..., Tensor], *inputs: Tensor | float) -> Tensor:
    """``f`` of the inputs in float64 and of one shape, rounded once to the dtype that they promote to."""
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    dtype = common_dtype(*tensors)
    wide = (widened(x if isinstance(x, Tensor) else torch.as_tensor(x, device=tensors[0].device)) for x in inputs)
    return f(*torch.broadcast_tensors(*wide)).to(dtype)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^-x) for x >= 0, to its relative accuracy."""
    near = x < 0.7
    low, high = torch.where(near, x, 0.5), torch.where(near, 1.0, x)
    return torch.where(near, torch.log(-torch.expm1(-low)), torch.log1p(-torch.exp(-high)))


def outcomes(distribution: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In float64 the probabilities of success and failure, from what was given, and their logarithms."""
    name, x = given(distribution)
    x = widened(x)
    if name == "logits":
        p, q = torch.sigmoid(x), torch.sigmoid(-x)
        return p, q, torch.nn.functional.logsigmoid(x), torch.nn.functional.logsigmoid(-x)
    some, rest = x > 0, x < 1
    log_p = torch.where(some, torch.log(torch.where(some, x, 1.0)), -torch.inf)
    log_q = torch.where(rest, torch.log1p(-torch.where(rest, x, 0.0)), -torch.inf)
    return x, 1 - x, log_p, log_q
