r"""Samples to fit: a tensor or a stream of batches, in one process or sharded over several, in standard units.

A fit sees :math:`z = (x - c) / s` in float64, c the mean and s the standard deviation of every column: the same numbers
whatever the units and the origin of x, so that the fit of :math:`a x + b` is the transformed fit of x, at an offset of
1e6 in float32 or a scale of 1e-12. Means are merged batch by batch (T. F. Chan, G. H. Golub and R. J. LeVeque,
"Algorithms for computing the sample variance", The American Statistician 37 (1983), 242-247), and with them the
triangular factor of the scatter about the mean, by QR factorisations: E[x^2] - E[x]^2 has no digit left at such an
offset, and a scatter matrix none of a direction 1e-8 as wide as another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .._distributed import Processes
from ..mixtures.square_root import lower_square_root

__all__ = ["Data", "Samples"]

Data = Tensor | Iterable[Tensor | tuple[Tensor, ...] | list[Tensor]]

# Numbers in a chunk of rows when their moments are taken.
_CHUNK = 2**20
# Least width of all samples in any direction, for the penalty.
_FLOOR = 1e-3


class _Moments(NamedTuple):
    """Rows with a weight, its sum and least, their mean, factor of their scatter, range of the columns."""

    rows: float
    total: float
    lightest: float
    mean: Tensor
    factor: Tensor
    low: Tensor
    high: Tensor

    def merged(self, other: _Moments) -> _Moments:
        total = self.total + other.total
        if total == 0:
            return self
        gap = other.mean - self.mean
        between = math.sqrt(self.total * other.total / total) * gap.unsqueeze(0)
        return _Moments(
            self.rows + other.rows,
            total,
            min(self.lightest, other.lightest),
            self.mean + gap * (other.total / total),
            _triangle(torch.cat([self.factor, other.factor, between])),
            torch.minimum(self.low, other.low),
            torch.maximum(self.high, other.high),
        )

    def packed(self) -> Tensor:
        numbers = torch.tensor([self.rows, self.total, self.lightest], dtype=self.mean.dtype, device=self.mean.device)
        return torch.cat([numbers, self.mean, self.factor.flatten(), self.low, self.high])

    @classmethod
    def unpacked(cls, x: Tensor, d: int) -> _Moments:
        rows, total, lightest = x[:3].tolist()
        mean, factor, low, high = x[3:].split([d, d * d, d, d])
        return cls(rows, total, lightest, mean, factor.reshape(d, d), low, high)


def _triangle(rows: Tensor) -> Tensor:
    """The upper triangle R, ``(D, D)``, with R'R = rows' rows; large rows first, or small ones are lost under them."""
    d = rows.shape[-1]
    if len(rows) < d:
        rows = torch.cat([rows, rows.new_zeros(d - len(rows), d)])
    order = rows.abs().amax(-1).argsort(descending=True)
    found: Tensor = torch.linalg.qr(rows[order], mode="r")[1]
    return found


def _moments(x: Tensor, weights: Tensor | None) -> _Moments:
    w = x.new_ones(len(x)) if weights is None else weights
    total = float(w.sum())
    share = w / total if total > 0 else w
    mean = share @ x
    mean = mean + share @ (x - mean)
    counts = w > 0
    seen, lightest = x[counts], float(w[counts].amin()) if total > 0 else math.inf
    low, high = (seen.amin(0), seen.amax(0)) if len(seen) else (torch.full_like(mean, math.inf), -math.inf + 0 * mean)
    factor = _triangle(w.sqrt().unsqueeze(-1) * (x - mean))
    return _Moments(len(seen), total, lightest, mean, factor, low, high)


def _check_finite(x: Tensor, row: int) -> None:
    """Say which is the first entry that is not; the rows are those from ``row`` on."""
    if bool((good := x.isfinite()).all()):
        return
    i, j = (~good).nonzero()[0].tolist()
    raise ValueError(
        f"column {j} of sample {row + i} is {float(x[i, j])}: leave such samples out, or fill in what is missing, "
        "before fitting"
    )


class Samples:
    """Rows of data and their weights, in standard units.

    Attributes:
        count: rows with a weight other than 0, of all processes.
        total: sum of their weights.
        lightest: least share of the total that a row has, other than 0.
        dim: D.
        dtype: of the rows as they were given.
        centre: mean of the columns, ``(D,)``, float64.
        unit: what a coordinate is divided by, ``(D,)``.
        reach: largest absolute coordinate in standard units, ``(D,)``.
        pooled: Cholesky factor of the covariance in standard units, ``(D, D)``; with 1e-6 added to every variance, so
            that what is relative to it stays above the rounding of coordinates in every direction.

    Args:
        data: ``(N, D)``, or what can be iterated over again and again and yields such batches (a DataLoader); of a
            tuple or list the first entry is taken. Where processes share the work, this one's rows.
        weights: of the rows of a tensor, ``(N,)``.
        common: one unit for all columns rather than one for each.
        full: whether the covariance matrix must be regular.
        processes: who shares the work.
        device: where to compute; None for where the data are.
    """

    def __init__(
        self,
        data: Data,
        weights: Tensor | None,
        *,
        common: bool,
        full: bool,
        processes: Processes,
        device: torch.device | str | None = None,
    ) -> None:
        """Read everything once."""
        self._data, self._weights, self.processes = data, weights, processes
        self._device = None if device is None else torch.device(device)
        self.dtype, self.dim = torch.float32, 0
        error, moments = None, None
        try:
            moments = self._scan()
        except Exception as e:  # whatever a stream raises: the other processes wait for this one
            error = e
        self._agree(error)
        moments = self._shared(moments)
        self.count, self.total = round(moments.rows), moments.total
        if not self.total > 0:
            raise ValueError("there are no samples to fit: every batch is empty, or all weights are 0")
        self.lightest = moments.lightest / self.total
        self.centre = moments.mean
        factor = moments.factor / math.sqrt(self.total)
        if not bool(factor.isfinite().all()):
            raise ValueError("the samples' squared deviations overflow float64: rescale them")
        self._check_constant(moments.high > moments.low, common)
        variance = factor.square().sum(0)
        variance = variance.mean().expand(self.dim) if common else variance
        self.unit = variance.sqrt()
        self.reach = torch.maximum(moments.high - self.centre, self.centre - moments.low) / self.unit
        if full and self.dim > 1:
            rounding = torch.finfo(self.dtype).eps * torch.maximum(moments.high.abs(), moments.low.abs()) / self.unit
            self._check_rank(factor / self.unit, rounding)
        floor = _FLOOR * torch.eye(self.dim, dtype=factor.dtype, device=factor.device)
        self.pooled = lower_square_root(torch.cat([factor / self.unit, floor]))

    def chunks(self, rows: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """This process's rows in standard units, so many at a time, and their weights."""
        inverse = 1 / self.unit
        for x, w in self._raw():
            for i in range(0, len(x), rows):
                part = x[i : i + rows].to(self.centre)
                yield (part - self.centre) * inverse, None if w is None else w[i : i + rows].to(self.centre)

    @property
    def rows(self) -> int | None:
        """Rows of this process's tensor; None of a stream."""
        return len(self._data) if isinstance(self._data, Tensor) else None

    def taken(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows of a tensor in standard units."""
        data, weights = self._data, self._weights
        if not isinstance(data, Tensor):
            raise TypeError("a stream has no rows to take")
        z = (data[index].to(self.centre) - self.centre) / self.unit
        return z, None if weights is None else weights[index].to(self.centre)

    def _raw(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        if isinstance(self._data, Tensor):
            yield self._data.detach(), self._weights
            return
        for batch in self._data:
            x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
            if not isinstance(x, Tensor):
                raise ValueError(
                    f"a batch must be a tensor, or a tuple or list that begins with one; got {type(batch)}"
                )
            yield x.detach(), None

    def _scan(self) -> _Moments | None:
        """Moments of this process's rows, which are checked."""
        if isinstance(self._data, (np.ndarray, Dataset)):
            how = "torch.from_numpy(x)" if isinstance(self._data, np.ndarray) else "DataLoader(dataset, 4096)"
            name = type(self._data).__name__
            raise ValueError(f"samples come in a tensor or in batches of tensors, not in a {name}: give {how}")
        if isinstance(self._data, Iterator):
            raise ValueError(
                "samples that can be read only once cannot be fitted, which takes several passes: give a DataLoader, a "
                "list of batches, or a tensor"
            )
        if self._weights is not None:
            self._check_weights(self._weights)
        found: _Moments | None = None
        row = 0
        for x, w in self._raw():
            self._check_batch(x, row)
            size = max(1, _CHUNK // max(1, self.dim))
            for i in range(0, len(x), size):
                part = x[i : i + size].to(self._where(x), _working(self._where(x)))
                _check_finite(part, row + i)
                new = _moments(part, None if w is None else w[i : i + size].to(part))
                found = new if found is None else found.merged(new)
            row += len(x)
        return found

    def _where(self, x: Tensor) -> torch.device:
        return x.device if self._device is None else self._device

    def _check_batch(self, x: Tensor, row: int) -> None:
        if x.ndim != 2 or x.shape[1] == 0:
            hint = "; a single column is x.unsqueeze(-1)" if x.ndim == 1 else ""
            raise ValueError(f"samples must have shape (N, D), got {tuple(x.shape)}{hint}")
        if x.is_complex():
            raise ValueError(f"samples must be real, got {x.dtype}: give real and imaginary parts as columns")
        if self.dim and x.shape[1] != self.dim:
            raise ValueError(f"the batch at row {row} has {x.shape[1]} columns, those before it {self.dim}")
        if not self.dim:
            self.dim = x.shape[1]
            self.dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()

    def _check_weights(self, w: Tensor) -> None:
        if not isinstance(self._data, Tensor):
            raise ValueError("weights are for samples in a tensor; in a stream repeat the rows instead")
        if w.shape != self._data.shape[:1]:
            raise ValueError(
                f"weights must have shape (N,), one for each of {len(self._data)} samples, got {tuple(w.shape)}"
            )
        if not bool((good := (w >= 0) & w.isfinite()).all()):
            index = int((~good).nonzero()[0])
            raise ValueError(f"weights[{index}] is {float(w[index])}: it must be finite and not negative")

    def _agree(self, error: Exception | None) -> None:
        """Raise in every process if one of them has to, and if they do not have the same columns."""
        self.processes.raise_together(error)
        found = self.processes.gathered(torch.tensor(self.dim))
        dims = {int(d) for d in found} - {0}
        if len(dims) > 1:
            raise ValueError(f"samples have {' and '.join(map(str, sorted(dims)))} columns in different processes")
        if not dims:
            raise ValueError("there are no samples to fit")
        self.dim = dims.pop()

    def _shared(self, moments: _Moments | None) -> _Moments:
        """Merged in the order of the ranks; a process without rows takes part."""
        d = self.dim
        if moments is None:
            device = torch.device("cpu") if self._device is None else self._device
            zero = torch.zeros(d, dtype=_working(device), device=device)
            moments = _Moments(0, 0.0, torch.inf, zero, zero.unsqueeze(-1) * zero, zero + torch.inf, zero - torch.inf)
        first, *others = (_Moments.unpacked(x, d) for x in self.processes.gathered(moments.packed()))
        for other in others:
            first = other if first.total == 0 else first.merged(other)
        return first

    def _check_constant(self, varies: Tensor, common: bool) -> None:
        if bool(varies.any() if common else varies.all()):
            return
        constant = (~varies).nonzero().flatten().tolist()
        rank = self.dim - len(constant)
        which = f"column {constant[0]} is constant" if len(constant) == 1 else f"columns {constant} are constant"
        if self.count == 1 or rank == 0:
            which = "all samples are the same point"
        raise ValueError(
            f"the samples have rank {rank} at most, of {self.dim}: {which}, and a Gaussian has no density there. Leave "
            "out what is constant, or give more samples."
        )

    def _check_rank(self, factor: Tensor, rounding: Tensor) -> None:
        """ValueError if in some direction all samples are the same but for the rounding of their own coordinates.

        A direction may be narrow beside others, where one sample is far away, and its samples differ all the same.
        """
        _, widths, directions = torch.linalg.svd(factor)
        narrow = widths <= max(float(rounding.norm()), self.dim * torch.finfo(factor.dtype).eps)
        if self.count <= self.dim:
            narrow[self.count - 1 :] = True
        elif bool(narrow.any()):
            apart = factor.new_zeros(self.dim)
            for z, w in self.chunks(max(1, _CHUNK // self.dim)):
                z = z if w is None else z[w > 0]
                own = torch.finfo(self.dtype).eps * (z + self.centre / self.unit).abs() @ directions.abs().mT
                own = own + self.dim * torch.finfo(z.dtype).eps * self.reach.norm()
                apart += ((z @ directions.mT).abs() > own).sum(0)
            narrow &= self.processes.summed(apart) == 0
        rank = self.dim - int(narrow.sum())
        if rank == self.dim:
            return
        columns = (directions[-1].abs() > 1e-3).nonzero().flatten().tolist()
        why = (
            f"{self.count} samples span {self.count - 1} dimensions at most"
            if self.count <= self.dim
            else f"columns {columns} are linearly dependent"
        )
        raise ValueError(
            f"the samples have rank {rank} of {self.dim}: {why}, so every covariance matrix is singular. Leave columns "
            'out, give more samples, or fit with covariance_type="diag" or "spherical".'
        )


def _working(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
