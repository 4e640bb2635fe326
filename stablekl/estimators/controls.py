"""Functions of a sample whose mean is known to be 0: its standardised coordinates, their squares and products."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["Controls"]

# A regression on more controls than this takes longer than the densities. Samples for each of them: with 30, intervals
# of what is left, whose tails are heavier, covered 91 %; with 60, 93.5 %; with 100 and more, 94 to 95 %.
MOST, SAMPLES = 64, 50
# Products of controls that are kept, for all batch elements and parts of p together: times 32 bytes, half a gigabyte.
KEPT = 2**24


class Controls:
    """Polynomials of degree two in standardised coordinates u, as many as the samples can bear.

    u_i; then u_i^2 - 1; then, where the coordinates are independent, u_i u_j: with these the log-ratio of two Gaussians
    is explained to the last digit. The mean of e^-d - 1, another function of known mean, is not used: it is what k3
    adds to k1, and its variance is infinite where q is wider than p by sqrt(2).

    Args:
        dimension: of u.
        count: samples of the smallest part.
        copies: batch elements times parts.
        independent: whether products of coordinates have mean 0.
        even: leave out u_i, which mirrored samples cancel.
    """

    def __init__(self, dimension: int, count: int, copies: int, *, independent: bool, even: bool) -> None:
        """Choose."""
        room = min(MOST, count // SAMPLES, math.isqrt(KEPT // max(1, copies)))
        linear = 0 if even else dimension
        self.linear = not even
        self.squares = linear + dimension <= room
        pairs = dimension * (dimension - 1) // 2
        self.products = independent and self.squares and linear + dimension + pairs <= room
        self.size = linear + dimension * self.squares + pairs * self.products
        if linear + dimension * even > room or self.size == 0:
            raise ValueError(
                f"control variates for {dimension} coordinates take {SAMPLES} samples for each of them in every part, "
                f"and {MOST} coordinates at most, fewer for large batches; the smallest part has {count} samples, and "
                f"there are {copies} problems (batch elements times parts). Take more samples, smaller batches, or "
                "control_variates=False"
            )

    def of(self, u: Tensor) -> Tensor:
        """``(...,) + (D,)`` to ``(...,) + (size,)``."""
        found = [u] if self.linear else []
        if self.squares:
            found.append(u * u - 1)
        if self.products:
            i, j = torch.triu_indices(u.shape[-1], u.shape[-1], 1, device=u.device)
            found.append(u[..., i] * u[..., j])
        return torch.cat(found, -1)
