"""The two ways to draw: samples from random numbers, and scrambled Sobol points, each in chunks that can be shared."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .controls import Controls
from .moments import Moments, MonteCarloEstimate, pooled
from .parts import FamilyPart, Part, Points
from .sharing import seeded

__all__ = ["Chunk", "RandomRun", "SobolRun"]

Function = Callable[[Tensor], Tensor]
# Parts of the samples, each less controls with the coefficients of the others.
FOLDS = 4


class Chunk(NamedTuple):
    """Some of the samples of one part.

    Attributes:
        number: of the chunk, or of the first replicate.
        part: index of the part.
        size: samples; of each replicate, where there are replicates.
        start: points of each replicate that come before.
        replicates: how many.
    """

    number: int
    part: int
    size: int
    start: int = 0
    replicates: int = 1


class RandomRun:
    """Samples from torch's generators, mirrored or not, less control variates or not.

    Args:
        parts: of p.
        function: of samples, ``(n,) + batch_shape``.
        batch_shape: of the result.
        device: of it.
        seed: of the first chunk.
        chunk: numbers that may be in memory at a time.
        mirrored: average each sample's value with that of the one opposite.
        controls: in each part, or None.
    """

    def __init__(
        self,
        parts: list[Part],
        function: Function,
        batch_shape: torch.Size,
        device: torch.device,
        seed: int,
        chunk: int,
        *,
        mirrored: bool,
        controls: Controls | None,
    ) -> None:
        """No samples yet."""
        self._parts, self._function, self._batch, self._device = parts, function, batch_shape, device
        self._seed, self._mirrored, self._controls = seed, mirrored, controls
        self._functions = 1 + (0 if controls is None else controls.size)
        widest = max(part.dimension for part in parts)
        self._size = max(2 * FOLDS, chunk // max(1, batch_shape.numel() * max(widest, self._functions)))
        self._folds = 1 if controls is None else FOLDS
        none = Moments.none(batch_shape, self._functions, device)
        self._moments = [[none] * self._folds for _ in parts]
        self._next = 0

    def round(self, num_samples: int) -> Iterator[Chunk]:
        """The chunks of so many more samples; two of each part at least."""
        for k, part in enumerate(self._parts):
            count = max(2, math.ceil(num_samples * part.share))
            for start in range(0, count, self._size):
                yield Chunk(self._next, k, min(self._size, count - start))
                self._next += 1

    def evaluate(self, chunk: Chunk) -> Tensor:
        """Moments of a chunk's folds, packed, ``(folds,) + batch_shape + (...)``."""
        with seeded(self._seed + chunk.number, self._device):
            points = self._parts[chunk.part].random(chunk.size)
        values = self._values(points)
        return torch.stack([Moments.of(values[own]).packed() for own in self._rows(chunk.size)])

    def _rows(self, count: int) -> list[slice]:
        """The samples of a chunk that each fold takes: they are independent, so neighbours will do."""
        edges = [count * i // self._folds for i in range(self._folds + 1)]
        return [slice(*pair) for pair in itertools.pairwise(edges)]

    def _values(self, points: Points) -> Tensor:
        values = self._function(points.x)
        if self._mirrored and points.mirrored is not None:
            values = 0.5 * (values + self._function(points.mirrored))
        values = values.unsqueeze(-1)
        if self._controls is None or points.standard is None:
            return values
        controls = self._controls.of(points.standard)
        missing = values.ndim - controls.ndim
        controls = controls.reshape(len(controls), *(1,) * missing, *controls.shape[1:])
        return torch.cat([values, controls.expand(*values.shape[:-1], -1)], -1)

    def blank(self) -> Tensor:
        """What `evaluate` returns, of no chunk."""
        return Moments.none(self._batch, self._functions, self._device).packed().expand(self._folds, *self._batch, -1)

    def absorb(self, chunk: Chunk, packed: Tensor) -> None:
        """Take up a chunk."""
        folds = self._moments[chunk.part]
        for i, rows in enumerate(self._rows(chunk.size)):
            new = Moments.unpacked(rows.stop - rows.start, packed[i], self._functions)
            folds[i] = folds[i].merged(new)

    def estimate(self) -> MonteCarloEstimate:
        """Of all chunks so far."""
        return pooled([(m, part.weight) for m, part in zip(self._moments, self._parts, strict=True)])

    @property
    def drawn(self) -> int:
        """Samples so far."""
        return sum(m.size for folds in self._moments for m in folds)


class SobolRun:
    """Independently scrambled Sobol sequences, the error from the spread of their means.

    Each further round doubles the points of every sequence.

    Args:
        parts: of p.
        function: of samples, ``(n,) + batch_shape``.
        batch_shape: of the result.
        device: of it.
        seed: of the first scramble.
        chunk: numbers that may be in memory at a time.
        replicates: scrambles of each part.
    """

    def __init__(
        self,
        parts: list[Part],
        function: Function,
        batch_shape: torch.Size,
        device: torch.device,
        seed: int,
        chunk: int,
        *,
        replicates: int,
    ) -> None:
        """No points yet."""
        widest = max(part.dimension for part in parts)
        if widest > torch.quasirandom.SobolEngine.MAXDIM:
            raise ValueError(
                f"Sobol points exist for up to {torch.quasirandom.SobolEngine.MAXDIM} dimensions, and a sample takes "
                f"{widest} here; use points='random'"
            )
        self._parts, self._function, self._batch, self._device = parts, function, batch_shape, device
        self._seed, self._replicates = seed, replicates
        self._size = max(2, chunk // max(1, batch_shape.numel() * widest))
        self._points = [0 for _ in parts]
        shape = (replicates, *batch_shape)
        self._means = [torch.zeros(shape, dtype=torch.float64, device=device) for _ in parts]

    def round(self, num_samples: int) -> Iterator[Chunk]:
        """The chunks that double the points, or the first ones: ``num_samples``, rounded up to powers of two."""
        for k, part in enumerate(self._parts):
            start = self._points[k]
            count = start or 2 ** max(1, math.ceil(math.log2(max(1.0, num_samples * part.share / self._replicates))))
            together = max(1, self._size // count)
            for first in range(0, self._replicates, together):
                for point in range(start, start + count, self._size):
                    some = min(self._size, start + count - point)
                    yield Chunk(first, k, some, point, min(together, self._replicates - first))
            self._points[k] = start + count

    def _uniform(self, chunk: Chunk, replicate: int) -> Tensor:
        """The centres of the cells of 2^-30 that the points are in: never 0 or 1."""
        seed = self._seed + chunk.part * self._replicates + replicate
        engine = torch.quasirandom.SobolEngine(self._parts[chunk.part].dimension, scramble=True, seed=seed)
        cell = 2.0**-engine.MAXBIT
        if chunk.start:
            engine.fast_forward(chunk.start)
            return engine.draw(chunk.size, dtype=torch.float64) + 0.5 * cell
        # the engine keeps its first point in the default dtype, where 1 - 2^-30 rounds to 1
        first = engine.quasi.to(torch.float64, copy=True) * cell
        uniform = engine.draw(chunk.size, dtype=torch.float64)
        uniform[0] = first
        return uniform + 0.5 * cell

    def evaluate(self, chunk: Chunk) -> Tensor:
        """The means of its replicates, in their places, ``(replicates,) + batch_shape``."""
        own = range(chunk.number, chunk.number + chunk.replicates)
        uniform = torch.cat([self._uniform(chunk, r) for r in own]).to(self._device)
        values = self._function(self._parts[chunk.part].at(uniform))
        means = self.blank()
        means[chunk.number : chunk.number + chunk.replicates] = values.unflatten(0, (chunk.replicates, -1)).mean(1)
        return means

    def blank(self) -> Tensor:
        """What `evaluate` returns, of no chunk."""
        return torch.zeros_like(self._means[0])

    def absorb(self, chunk: Chunk, means: Tensor) -> None:
        """Take up a chunk."""
        rows = slice(chunk.number, chunk.number + chunk.replicates)
        old, new = self._means[chunk.part][rows], means[rows]
        mean = old + (new - old) * (chunk.size / (chunk.start + chunk.size))
        self._means[chunk.part][rows] = torch.where(old.isinf(), old, mean)

    def estimate(self) -> MonteCarloEstimate:
        """The mean of the replicates, each the weighted sum over the parts, and the error by their spread."""
        terms = zip(self._parts, self._means, strict=True)
        of_replicates = torch.stack([torch.where(p.weight > 0, p.weight * mean, 0.0) for p, mean in terms]).sum(0)
        return Moments.of(of_replicates.unsqueeze(-1)).estimate()._replace(num_samples=self.drawn)

    @property
    def drawn(self) -> int:
        """Points so far."""
        return sum(self._points) * self._replicates


def controls_for(parts: list[Part], num_samples: int, batch: int, *, even: bool) -> Controls:
    """Those that every part has samples for, and that the memory for so large a batch will hold.

    Raises:
        ValueError: mean and variance are not known, or samples are too few.
    """
    for part in parts:
        if isinstance(part, FamilyPart) and not part.has_moments:
            raise ValueError(
                "control variates take the mean and the variance of p, finite and known, and its mean or variance is "
                "infinite, 0, or not implemented; use control_variates=False"
            )
    independent = not any(isinstance(part, FamilyPart) for part in parts)
    fewest = min(max(2, math.ceil(num_samples * part.share)) for part in parts)
    return Controls(parts[0].dimension, fewest, batch * len(parts), independent=independent, even=even)
