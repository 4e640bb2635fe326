"""The line, a half-line or an interval as the image of the real axis, for densities of which nothing is known.

The axis is that of `asinh`, `log` or `logit` in units of where p's mass is, so that power tails, and singularities at
an end of the support, are exponential of it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, VonMises, constraints

__all__ = ["Axis", "bounds", "edges", "middle"]

# The largest x, whose square does not overflow, and the smallest distance from an end at 0.
_LARGEST, _SMALLEST = 1e150, 1e-300
_INFINITY = math.inf


def bounds(distribution: Distribution, like: Tensor) -> tuple[Tensor, Tensor]:
    """The ends of the support.

    Raises:
        NotImplementedError: it is no interval, or discrete (says which).
    """
    if isinstance(distribution, VonMises):  # whose support torch calls the real line
        return like - math.pi, like + math.pi
    support: Any = distribution.support
    while not hasattr(support, "lower_bound") and hasattr(support, "base_constraint"):  # of a mixture's components
        support = support.base_constraint
    low, high = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    unknown = low is None and high is None and support is not constraints.real
    if unknown or support is None or support.is_discrete:
        raise NotImplementedError(
            f"integration over an axis needs a continuous density on an interval, and {type(distribution).__name__} "
            f"has the support {support}"
        )
    ends = (-_INFINITY if low is None else low, _INFINITY if high is None else high)
    first, last = (torch.as_tensor(x, dtype=like.dtype, device=like.device).expand_as(like).detach() for x in ends)
    return first, last


def middle(distribution: Distribution, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    """Quartiles, by the distribution itself or from 4097 samples; torch's random state is left as it was."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            found = torch.stack([distribution.icdf(torch.tensor(x, dtype=torch.float64)) for x in (0.25, 0.5, 0.75)])
        except (NotImplementedError, RuntimeError):
            drawn = distribution.sample(torch.Size([4097])).double()
            found = drawn.sort(0).values[[1024, 2048, 3072]]
        missing = (1,) * (len(shape) + 1 - found.ndim)
        low, median, high = found.reshape(3, *missing, *found.shape[1:]).expand(3, *shape).reshape(3, -1)
    return low, median, high


class Axis(NamedTuple):
    """The map from y on the real axis to x; everything of one shape, ``(rows,)``.

    Attributes:
        low: the lower end of the support, or -inf.
        high: the upper end, or inf.
        centre: a point in the middle of the mass.
        scale: of the mass.
    """

    low: Tensor
    high: Tensor
    centre: Tensor
    scale: Tensor

    def at(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The point x and log(dx/dy), for y of shape ``(..., rows)``."""
        size = y.abs()
        soft = torch.log1p(torch.exp(-2 * size))
        line = self.centre + self.scale * torch.sinh(y.clamp(-700, 700))
        log_line = torch.log(self.scale) + size + soft - math.log(2)
        up, down = self.low.isfinite(), self.high.isfinite()
        # a root first: the exponential is no float where its product with the scale is one
        root = torch.exp(0.5 * torch.where(up, y, -y))
        distance = self.scale * root * root
        half = torch.where(up, self.low + distance, self.high - distance)
        log_half = torch.log(self.scale) + torch.where(up, y, -y)
        width = torch.where(up & down, self.high - self.low, 1.0)
        share = width * torch.sigmoid(-size)
        inside = torch.where(y < 0, self.low + share, self.high - share)
        log_inside = torch.log(width) - size - 2 * torch.log1p(torch.exp(-size))
        x = torch.where(up & down, inside, torch.where(up | down, half, line))
        return x, torch.where(up & down, log_inside, torch.where(up | down, log_half, log_line))

    def of(self, x: Tensor) -> Tensor:
        """The y of a point; within `ends` where x is not inside the support."""
        up, down = self.low.isfinite(), self.high.isfinite()
        above, below = (x - self.low).clamp(min=0), (self.high - x).clamp(min=0)
        line = torch.asinh((x - self.centre) / self.scale)
        half = torch.where(up, torch.log(above / self.scale), -torch.log(below / self.scale))
        inside = torch.log(above) - torch.log(below)
        y = torch.where(up & down, inside, torch.where(up | down, half, line))
        first, last = self.ends()
        return torch.minimum(torch.maximum(y.nan_to_num(nan=0.0), first), last)

    def ends(self) -> tuple[Tensor, Tensor]:
        """The part of the axis where x and its distance from an end of the support are floats of some accuracy."""
        up, down = self.low.isfinite(), self.high.isfinite()
        unit = torch.where(up & down, self.high - self.low, self.scale)
        # differences of logarithms, since quotients overflow
        largest = math.log(_LARGEST) - torch.log(self.scale)
        largest = torch.where(up | down, largest, torch.logaddexp(largest, -largest) + math.log(2)).clamp(min=1.0)

        def nearest(end: Tensor) -> Tensor:
            least = torch.where(end == 0, _SMALLEST, end.abs().nan_to_num(posinf=1.0) * 2.0**-40)
            return (torch.log(unit) - torch.log(least)).clamp(min=1.0)

        return torch.where(up, -nearest(self.low), -largest), torch.where(down, nearest(self.high), largest)


def edges(axis: Axis, *quartiles: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Edges of the first panels, sorted, ``(E, rows)``: a grid, and more around the middle of each density."""
    first, last = axis.ends()
    steps = torch.cat([torch.arange(0.0, 8.0, 1.0), 8.0 * 2.0 ** torch.arange(0.0, 7.0, 0.5)]).to(first)
    grid = torch.cat([-steps.flip(0), steps[1:]]).unsqueeze(-1)
    found = [first.unsqueeze(0), last.unsqueeze(0), torch.minimum(torch.maximum(grid, first), last)]
    around = torch.tensor([0.0, 0.25, 1.0, 2.0, 4.0, 8.0, 16.0, 40.0]).to(first)
    around = torch.cat([-around.flip(0), around[1:]]).unsqueeze(-1)
    found += [axis.of(median + around * (high - low)) for low, median, high in quartiles]
    return torch.cat(found).sort(0).values
