"""The log-density of a mixture, and its gradient, in blocks of points and components that fit into the cache.

Only for tensors that hold data here and now. `value` and `vjp` have the signatures that `custom` asks for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .density_expanded import Expansion
from .density_terms import base, coefficients, inverse_factor, is_diagonal, living, parameter_gradients, pool, shares

__all__ = ["value", "vjp"]

# Elements per block: measured on a CPU (fastest of 2**14 ... 2**19); elsewhere enough to fill a device.
_CPU_BLOCK, _DEVICE_BLOCK = 2**18, 2**22
# The expansion does not pay for its preparation with fewer components or points (measured).
_EXPANSION_COMPONENTS, _EXPANSION_POINTS = 4, 256


class _Scratch:
    """Memory reused from block to block: the page faults of a fresh block cost five times its arithmetic."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: dict[str, Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape)
        memory = self._memory.get(name)
        if memory is None or memory.numel() < size or memory.dtype != dtype:
            memory = self._memory[name] = torch.empty(size, dtype=dtype, device=self._device)
        return memory[:size].view(*shape)


class _Part(NamedTuple):
    """Some of the components."""

    k: slice
    loc: Tensor  # (B, k, D, 1)
    inverse: Tensor  # (B, k, D) or (B, k, D, D)


def _within(x: Tensor, bound: float) -> bool:
    """Whether |x| < bound everywhere."""
    if not x.numel():
        return True
    low, high = torch.aminmax(x)
    return -bound < float(low) and float(high) < bound


class _Mixtures:
    """A block of batch elements, prepared; meets the points block by block."""

    def __init__(
        self, log_weights: Tensor, loc: Tensor, scale: Tensor, scratch: _Scratch, elements: int, expand: bool
    ) -> None:
        self.loc, scale = living(log_weights, loc, scale)
        self.diagonal, self.scratch, self.elements = is_diagonal(loc, scale), scratch, elements
        self.inverse, self.base = inverse_factor(self.loc, scale), base(log_weights, self.loc, scale)
        self._part_size, self._part_list = 0, list[_Part]()
        self._bound: float | None = None
        self.expansion: Expansion | None = None
        if expand:
            loc, scale = self.loc.double(), scale.double()
            inverse = inverse_factor(loc, scale).masked_fill((log_weights == -math.inf).unsqueeze(-1), 0.0)
            self.expansion = Expansion(base(log_weights.double(), loc, scale), self.loc, inverse)

    def features(self, x: Tensor) -> Tensor | None:
        """Features of the expansion, or None where the direct form is called for."""
        if self.expansion is None or not self.expansion.holds(x):
            return None
        shape = (x.shape[0], 2 * x.shape[1], x.shape[2])
        return self.expansion.features(x, self.scratch("features", shape, torch.float64))

    def logits(self, x: Tensor, features: Tensor | None) -> Tensor:
        """Log-weight plus log-density of points (B, D, N), shape (B, K, N), in scratch memory."""
        shape = (*self.base.shape, x.shape[-1])
        if self.expansion is not None and features is not None:
            return self.expansion.logits(features, self.scratch("logits64", shape, torch.float64))
        logits = self.scratch("logits", shape, x.dtype)
        for part in self._parts(x):
            torch.sum(self._whiten(x, part).square_(), -2, out=logits[:, part.k])
        # the product turned an infinite coordinate into NaN
        if not self.diagonal and not (x.device.type == "cpu" and _within(x, math.inf)):
            logits.masked_fill_(x.isinf().any(-2, keepdim=True), math.inf)
        return torch.add(self.base.unsqueeze(-1), logits, alpha=-0.5, out=logits)

    def pull(
        self, x: Tensor, features: Tensor | None, c: Tensor, moments: Sequence[Tensor], want_x: bool
    ) -> Tensor | None:
        """Add the weighted moments of z to ``moments``; gradient of ``(c * logits).sum()`` with respect to x."""
        if self.expansion is not None and features is not None:
            for total, new in zip(moments, self.expansion.moments(features, c), strict=True):
                total += new
            return self.expansion.pull(features, c) if want_x else None
        mass, first, second = moments
        mass += c.sum(-1)
        masked = self._may_overflow(x)
        d_x = self.scratch("d_x", x.shape, x.dtype).zero_() if want_x else None
        for part in self._parts(x):
            k, inverse = part.k, part.inverse
            z, weight = self._whiten(x, part), c[:, k].unsqueeze(-2)
            if masked:  # z may be inf where nothing is asked of it
                z.masked_fill_(weight == 0, 0.0)
            cz = torch.mul(z, weight, out=self.scratch("cz", z.shape, z.dtype))
            first[:, k] += cz.sum(-1)
            second[:, k] += z.mul_(cz).sum(-1) if self.diagonal else cz @ z.mT
            if d_x is not None and self.diagonal:
                d_x -= cz.mul_(inverse.unsqueeze(-1)).sum(1)
            elif d_x is not None:  # the sum over components is part of the product
                d_x.baddbmm_(inverse.flatten(1, 2).mT, cz.flatten(1, 2), alpha=-1.0)
        return d_x

    def _parts(self, x: Tensor) -> list[_Part]:
        """The components, as many at a time as fit into a block with these points."""
        size = max(1, self.elements // max(1, x.numel()))
        if size != self._part_size:
            self._part_size, cuts = size, _cuts(self.loc.shape[1], size)
            self._part_list = [_Part(k, self.loc[:, k].unsqueeze(-1), self.inverse[:, k]) for k in cuts]
        return self._part_list

    def _whiten(self, x: Tensor, part: _Part) -> Tensor:
        """Whiten the points for some components, in scratch memory. The mean goes first: exact where x is near it."""
        shape = (*part.inverse.shape[:3], x.shape[-1])
        z, points = self.scratch("z", shape, x.dtype), x.unsqueeze(1)
        if self.diagonal:
            return torch.sub(points, part.loc, out=z).mul_(part.inverse.unsqueeze(-1))
        deviation = torch.sub(points, part.loc, out=self.scratch("cz", shape, x.dtype))
        torch.bmm(part.inverse.flatten(0, 1), deviation.flatten(0, 1), out=z.flatten(0, 1))
        return z

    def _may_overflow(self, x: Tensor) -> bool:
        """Whether the magnitudes leave open that z is infinite; without asking them on an asynchronous device."""
        if x.device.type != "cpu":
            return True
        if self._bound is None:  # |z| <= D |inverse| (|x| + |loc|)
            largest = torch.finfo(x.dtype).max / max(1, x.shape[1])
            self._bound = float(largest / self.inverse.abs().amax() - self.loc.abs().amax())
        return not _within(x, self._bound)


def _cuts(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _flat(inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs with their batch dimensions made one."""
    n = inputs[0].ndim - 2
    batch = math.prod(inputs[0].shape[:n])
    x, log_weights, loc, scale = (t.reshape(batch, *t.shape[n:]) for t in inputs)
    return x, log_weights, loc, scale


def _blocks(inputs: Sequence[Tensor], scratch: _Scratch) -> Iterator[tuple[slice, _Mixtures, Iterator[slice]]]:
    """Blocks of batch elements, each with its prepared mixtures and with cuts of the points."""
    x, log_weights, loc, scale = inputs
    (batch, d, samples), k = x.shape, loc.shape[1]
    elements = _CPU_BLOCK if x.device.type == "cpu" else _DEVICE_BLOCK
    width = max(1, k, 2 * d)
    points = max(1, min(samples, elements // width))
    members = max(1, elements // max(width * points, math.prod(scale.shape[1:])))
    expand = x.dtype == torch.float32 and x.device.type == "cpu" and is_diagonal(loc, scale)
    expand = expand and k >= _EXPANSION_COMPONENTS and points >= _EXPANSION_POINTS
    for b in _cuts(batch, members):
        mixtures = _Mixtures(log_weights[b], loc[b], scale[b], scratch, elements, expand)
        yield b, mixtures, _cuts(samples, points)


def _points(x: Tensor, b: slice, n: slice, scratch: _Scratch) -> Tensor:
    block = x[b, :, n]
    return scratch("x", block.shape, x.dtype).copy_(block)


def value(pooled: bool, keep: bool, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Log-density (pooled) or logits; with ``keep``, also the exponentials and their sum for the backward."""
    flat = _flat(inputs)
    x, k = flat[0], flat[2].shape[1]
    row, table = (x.shape[0], x.shape[2]), (x.shape[0], k, x.shape[2])
    results = [x.new_empty(row if pooled else table)]
    if keep:
        results += [x.new_empty(table), x.new_empty(row)]

    _fill(pooled, flat, results)
    return tuple(r.reshape(*inputs[0].shape[:-2], *r.shape[1:]) for r in results)


def _fill(pooled: bool, inputs: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """`value`, into ``results``."""
    x, (out, *kept) = inputs[0], results
    scratch = _Scratch(x.device)
    for b, mixtures, cuts in _blocks(inputs, scratch):
        for n in cuts:
            block = _points(x, b, n, scratch)
            logits = mixtures.logits(block, mixtures.features(block))
            if not pooled:
                out[b, :, n] = logits
                continue
            exps = kept[0][b, :, n] if kept else scratch("exps", logits.shape, x.dtype)
            out[b, n], _, total = pool(logits, exps)
            if kept:
                kept[1][b, n] = total


def vjp(
    pooled: bool, grad: Tensor, inputs: Sequence[Tensor], saved: Sequence[Tensor], needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients with respect to x, log_weights, loc and scale; ``saved`` may be empty."""
    flat = _flat(inputs)
    x = flat[0]
    rows = [t.reshape(x.shape[0], *t.shape[inputs[0].ndim - 2 :]) for t in (grad, *saved)]
    d_x = x.new_empty(x.mT.shape).mT if needed[0] else None

    gradients = _pull(pooled, rows, flat, d_x)
    return tuple(
        g.to(i.dtype).reshape(i.shape) if g is not None and wanted else None
        for g, i, wanted in zip((d_x, *gradients), inputs, needed, strict=True)
    )


def _pull(pooled: bool, rows: Sequence[Tensor], inputs: Sequence[Tensor], d_x: Tensor | None) -> list[Tensor]:
    """`vjp`: gradients of the parameters; that of the points goes into ``d_x``."""
    (grad, *kept), x = rows, inputs[0]
    scratch = _Scratch(x.device)
    # Sums over points are carried in float64 where that is free.
    wide = torch.float64 if x.device.type == "cpu" else x.dtype
    gradients = [torch.empty(p.shape, dtype=wide, device=p.device) for p in inputs[1:]]
    for b, mixtures, cuts in _blocks(inputs, scratch):
        moments = [torch.zeros_like(g[b]) for g in gradients]
        for n in cuts:
            block = _points(x, b, n, scratch)
            features = mixtures.features(block)
            dtype = x.dtype if features is None else torch.float64
            if kept:
                exps = kept[0][b, :, n]
                c = shares(grad[b, n], exps, kept[1][b, n], out=scratch("c", exps.shape, dtype))
            else:
                c = coefficients(grad[b, ..., n], mixtures.logits(block, features), pooled).to(dtype)
            d_block = mixtures.pull(block, features, c, moments, d_x is not None)
            if d_x is not None and d_block is not None:
                d_x[b, :, n] = d_block
        for g, s in zip(gradients, parameter_gradients(moments, mixtures.inverse), strict=True):
            g[b] = s
    return gradients
