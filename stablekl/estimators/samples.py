"""KL(p || q) from samples of both, without a density of either."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .._progress import Progress
from .moments import MonteCarloEstimate
from .neighbours import kth_distances

__all__ = ["kl_from_samples"]

Method = Literal["nearest_neighbour", "gaussian"]
# Most groups whose spread is the standard error of nearest neighbours, fewest, and neighbours' worth of samples in one.
MOST_GROUPS, FEWEST_GROUPS, GROUP = 32, 5, 8
# Of the largest singular value: columns that are combinations of others, up to rounding.
RANK = 1e-12


def kl_from_samples(
    x: Tensor,
    y: Tensor,
    method: Method = "nearest_neighbour",
    *,
    num_neighbours: int = 5,
    standardise: bool = True,
    progress: bool | None = None,
) -> MonteCarloEstimate:
    """x"""
    return None


class _Sample(NamedTuple):
    """A sample in float64, about its mean.

    Attributes:
        name: "x" or "y".
        mean: ``(D,)``.
        centred: ``(N, D)``.
        factor: upper triangular R with R^T R the covariance, divisor N - 1.
    """

    name: str
    mean: Tensor
    centred: Tensor
    factor: Tensor


def _solve(rows: Tensor, factor: Tensor) -> Tensor:
    """Rows times the inverse of an upper triangular factor."""
    return torch.linalg.solve_triangular(factor, rows, upper=True, left=False)


def _nearest(x: Tensor, y: Tensor, k: int, tick) -> Tensor:
    """D log(nu/rho) of each x, plus log(M/(N - 1))."""
    nu = kth_distances(x, y, k, tick)
    rho = kth_distances(x, x, k + 1, tick)
    return x.shape[-1] * (nu.log() - rho.log()) + math.log(len(y) / (len(x) - 1))
