r"""The sums of an iteration for diagonal covariances by matrix products, where their rounding is known to be small.

.. math:: \sum_j \frac{(z_j - \mu_{kj})^2}{s_{kj}^2} = \sum_j \frac{z_j^2}{s_{kj}^2}
          - 2 \sum_j \frac{z_j \mu_{kj}}{s_{kj}^2} + \sum_j \frac{\mu_{kj}^2}{s_{kj}^2}

is two products of matrices, and so are the sums over samples, where differences are passes over samples x components x
columns. Terms cancel: the error is a few eps times the largest of them, for which there is a bound before the pass.
scikit-learn expands wherever the data are; here they are in standard units, and components that are too narrow or too
far out are left to `stablekl.fit._steps`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ._model import Model
from ._steps import Sums

__all__ = ["collect_squares", "squares_are_safe"]

# Largest error of a log-density, and relative error of a variance, from the terms that cancel.
_ERROR = 1e-9


def squares_are_safe(model: Model, reach: Tensor) -> bool:
    """Whether to expand squares, for samples whose coordinates are at most ``reach``, ``(D,)``."""
    if model.triangular:
        return False
    largest = ((reach + model.loc.abs()) / model.scale).square().sum(-1).amax()
    return bool(8 * torch.finfo(reach.dtype).eps * largest < _ERROR)


def collect_squares(model: Model, chunks: Iterable[tuple[Tensor, Tensor | None]]) -> Sums:
    """As `stablekl.fit._steps.collect`, without a shift."""
    _, _, loc, scale = model
    k, d = loc.shape
    precision = scale.expand(k, d).square().reciprocal()
    linear = (precision * loc).mT
    constant = model.base().squeeze(-1) - 0.5 * (precision * loc.square()).sum(-1)
    zero = loc.new_zeros
    total, log_likelihood, size, first, second = zero(()), zero(()), zero(k), zero(k, d), zero(k, d)
    for z, w in chunks:
        squares = z.square()
        logits = torch.addmm(torch.addmm(constant, z, linear), squares, precision.mT, alpha=-0.5)
        log_density = torch.logsumexp(logits, -1, keepdim=True)
        r = logits.sub_(log_density).exp_()
        if w is not None:
            r, log_density = r * w.unsqueeze(-1), log_density * w.unsqueeze(-1)
        total += len(z) if w is None else w.sum()
        log_likelihood += log_density.sum()
        size += r.sum(0)
        first.addmm_(r.mT, z)
        second.addmm_(r.mT, squares)
    members = size.unsqueeze(-1)
    about = (second - 2 * loc * first + loc.square() * members) * precision
    about = about if model.kind == "diag" else about.sum(-1, keepdim=True)
    return Sums(total, log_likelihood, size, (first - loc * members) / scale, about)
