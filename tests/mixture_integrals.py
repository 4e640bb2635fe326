"""KL divergences of mixtures by adaptive integration of the definition, in extended precision.

A `Table` holds K components that are arbitrary in the first ``a`` coordinates (at most two) and N(0, t_k^2 I) in
``radial`` more, so that an integral over a line or a plane, the radius one of its coordinates, is the truth in any
number of dimensions: components with means and shapes of their own, of full rank. ``E_{p_k} log(p/q)`` is integrated
over p_k's own coordinates, cell by cell: Gauss-Legendre in a cell against the sum over its halves or quarters, until
they agree. Cells that are wide beside a component of p or q near them are split in any case: nothing can hide between
the nodes. It knows nothing of S - I nor of the engines' rules; its own error comes with every value.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import numpy as np

Float = np.longdouble
_PI = 4 * np.arctan(Float(1))
Array = np.ndarray

NODES = 14
REACH = 11.0  # standard deviations: a mass of 1e-27 is outside
NEAR, WIDE = 8.0, 6.0  # a cell as close as this to a component and as wide, in its standard deviations, is split
MOST_CELLS = 40_000
CHUNK = 2**16  # numbers in an array
AGREE = 1e-15  # of a cell with its parts, relative to 1 + S


class Table(NamedTuple):
    """K components.

    Attributes:
        weights: (K,); of any sum.
        loc: (K, a), the means.
        tril: (K, a, a), lower factors of the covariances.
        spread: (K,), the standard deviation of the radial coordinates.
        radial: their number.
    """

    weights: Array
    loc: Array
    tril: Array
    spread: Array
    radial: int

    @property
    def dim(self) -> int:
        """Of the space."""
        return self.loc.shape[1] + self.radial

    def extended(self, dtype: type = Float) -> Table:
        """In extended precision, the weights summing to one."""
        w, loc, tril, spread = (np.asarray(x, Float) for x in self[:4])
        w, loc, tril, spread = (np.asarray(x, dtype) for x in (w / w.sum(), loc, tril, spread))
        return Table(w, loc, tril, spread, self.radial)

    def take(self, index: list[int] | slice) -> Table:
        """Some of the components."""
        return Table(*(x[index] for x in self[:4]), self.radial)


class Value(NamedTuple):
    """An integral and the sum of the disagreements in its cells."""

    value: np.longdouble
    error: np.longdouble


def _whitened(t: Table, x: Array) -> list[Array]:
    """``L_j^-1 (x - m_j)`` and R/t_j for all components: a list over coordinates, shaped (..., J)."""
    a = t.loc.shape[1]
    z: list[Array] = []
    for i in range(a):
        rest = x[..., i, None] - t.loc[:, i]
        for j in range(i):
            rest = rest - t.tril[:, i, j] * z[j]
        z.append(rest / t.tril[:, i, i])
    if t.radial:
        z.append(x[..., a, None] / t.spread)
    return z


def _log_height(t: Table) -> Array:
    with np.errstate(divide="ignore"):
        height = np.log(t.weights) - t.radial * np.log(t.spread)
    for i in range(t.loc.shape[1]):
        height = height - np.log(t.tril[:, i, i])
    return height


def _log_density(t: Table, x: Array) -> Array:
    """Less the constant of 2 pi."""
    log = _log_height(t) - sum(z * z for z in _whitened(t, x)) / 2
    top = log.max(-1)
    return top + np.log(np.exp(log - top[..., None]).sum(-1))


def pairwise(p: Table, q: Table) -> Array:
    """KL(p_k || q_j), closed form."""
    p, q = p.extended(), q.extended()
    a = p.loc.shape[1]
    ratio = p.spread[:, None] / q.spread
    total = p.radial * (ratio**2 - 1 - 2 * np.log(ratio)) / 2
    for k in range(len(p.loc)):
        moved = _whitened(q, np.concatenate([p.loc[k], np.zeros(min(p.radial, 1), Float)]))[:a]
        total[k] += sum((z**2 for z in moved), Float(0)) / 2
        columns: list[Array] = []
        for i in range(a):  # L_q^-1 L_k, row by row
            row = np.broadcast_to(p.tril[k, i], (len(q.loc), a)).copy()
            for j in range(i):
                row -= q.tril[:, i, j, None] * columns[j]
            columns.append(row / q.tril[:, i, i, None])
            diagonal = columns[i][:, i]
            total[k] += ((columns[i] ** 2).sum(-1) - 1 - 2 * np.log(diagonal)) / 2
    return total


def mean_divergence(p: Table, q: Table) -> float:
    """S = sum_k w_k KL(p_k || q); for a mixture q that of the component next to p_k, up to its weight."""
    p, q = p.extended(), q.extended()
    with np.errstate(divide="ignore"):
        return float((p.weights * (pairwise(p, q) - np.log(q.weights)).min(-1)).sum())


@functools.cache
def _rule(n: int, axes: int) -> tuple[Array, Array]:
    """Nodes (P, axes) and weights (P,) of a tensor rule on [-1, 1]^axes; numpy's nodes, improved once."""
    x = np.polynomial.legendre.leggauss(n)[0].astype(Float)
    for _ in range(2):
        before, value = np.ones_like(x), x
        for k in range(2, n + 1):
            before, value = value, ((2 * k - 1) * x * value - (k - 1) * before) / k
        slope = n * (x * value - before) / (x * x - 1)
        x = x - value / slope
    w = 2 / ((1 - x * x) * slope * slope)
    grids = np.meshgrid(*[x] * axes, indexing="ij")
    weights = functools.reduce(np.multiply.outer, [w] * axes)
    return np.stack([g.reshape(-1) for g in grids], -1), weights.reshape(-1)


def _position(p: Table, k: Array, z: Array) -> Array:
    """The points with coordinates z, (C, P, n), of components k, (C,)."""
    a = p.loc.shape[1]
    parts = [p.loc[k, None, i] + (p.tril[k, None, i, :a] * z[..., :a]).sum(-1) for i in range(a)]
    if p.radial:
        parts.append(p.spread[k, None] * z[..., a])
    return np.stack(parts, -1)


def _log_base(a: int, radial: int, z: Array) -> Array:
    """The log-density of a component's own coordinates: normal, and chi for the radius."""
    log = -(z * z).sum(-1) / 2
    halves = [Float(i) / 2 for i in range(2 - radial % 2, radial, 2)]  # Gamma(r/2) is their product, of 1 or sqrt(pi)
    constant = -a * np.log(2 * _PI) / 2
    if radial:
        constant += (1 - Float(radial) / 2) * np.log(Float(2)) - sum(np.log(h) for h in halves)
        constant -= np.log(_PI) / 2 if radial % 2 else 0
        log = log + (radial - 1) * np.log(z[..., -1])
    return log + constant.astype(z.dtype)


def _evaluate(p: Table, numerator: str, q: Table, k: Array, centre: Array, half: Array) -> Array:
    """w_k times the integrals over cells, (C,)."""
    nodes, weights = (x.astype(centre.dtype) for x in _rule(NODES, centre.shape[1]))
    a, results = p.loc.shape[1], []
    chunk = max(1, CHUNK // (len(weights) * max(len(p.weights), len(q.weights))))
    for start in range(0, len(k), chunk):
        here = slice(start, start + chunk)
        z = centre[here, None] + half[here, None] * nodes
        x = _position(p, k[here], z)
        if numerator == "mixture":
            log_p = _log_density(p, x)
        else:
            log_p = (_log_height(p._replace(weights=np.ones_like(p.weights)))[k[here]])[:, None] - (z * z).sum(-1) / 2
        f = np.exp(_log_base(a, p.radial, z)) * (log_p - _log_density(q, x))
        results.append((f * weights).sum(-1) * half[here].prod(-1) * p.weights[k[here]])
    return np.concatenate(results) if results else np.zeros(0, centre.dtype)


def _hidden(p: Table, q: Table, k: Array, centre: Array, half: Array, unseen: float) -> Array:
    """Which cells may hold a component or a crossing of q's between their nodes, (C, n): the axes to split."""
    a, n = p.loc.shape[1], centre.shape[1]
    x = _position(p, k, centre[:, None])[:, 0]
    split = np.zeros(centre.shape, bool)
    for t in (p, q):
        z = np.stack(_whitened(t, x), -1)  # (C, J, n)
        slope = np.zeros((len(k), len(t.loc), n, n), Float)  # of component j's coordinates in those of component k
        for axis in range(n):
            if axis < a:
                column = [p.tril[k, i, axis, None] for i in range(a)]
                for i in range(a):
                    rest = column[i] - sum(t.tril[:, i, j] * slope[:, :, j, axis] for j in range(i))
                    slope[:, :, i, axis] = rest / t.tril[:, i, i]
            else:
                slope[:, :, a, axis] = p.spread[k, None] / t.spread
        steep = np.sqrt((slope**2).sum(2))  # (C, J, n)
        reach = (steep * half[:, None]).sum(-1)
        near = np.sqrt((z**2).sum(-1)) - reach < NEAR
        split |= (near[..., None] & (2 * steep * half[:, None] > WIDE) & (t.weights > 0)[:, None]).any(1)
    middle = np.array([0.0] * a + [(p.radial - 1) ** 0.5] * (n - a))  # log-concave: no wider than the normal
    nearest = np.maximum(abs(centre - middle) - half, 0)
    mass = p.weights[k] * (2 * half * 0.8 * np.exp(-(nearest**2) / 2)).prod(-1)
    split |= mass[:, None] * _creases(q, z, slope * half[:, None, None]) > unseen
    return split & ((nearest[:, :a] ** 2).sum(-1) < 100)[:, None]


def _creases(q: Table, z: Array, slope: Array) -> Array:
    """What the nodes may miss where components of q cross, far from both, (C, n).

    ``log(1 + e^D)``, D of slope s per half width, is analytic up to pi/s from the real axis.
    """
    log = _log_height(q) - (z * z).sum(-1) / 2
    gradient = -(z[..., None] * slope).sum(2)
    bend = -np.einsum("cjia,cjib->cjab", slope, slope)
    pairs, covered = [], np.zeros_like(log)
    for j, k in itertools.combinations(np.flatnonzero(q.weights > 0), 2):
        steep = abs(gradient[:, j] - gradient[:, k]) + abs(bend[:, j] - bend[:, k]).sum(-1) / 2
        gap, reach = log[:, j] - log[:, k], steep.sum(-1)
        covered[:, j] = np.maximum(covered[:, j], -gap - reach)
        covered[:, k] = np.maximum(covered[:, k], gap - reach)
        pairs.append((j, k, np.maximum(abs(gap) - reach, 0), steep))
    total = np.zeros_like(z[:, 0])
    for j, k, apart, steep in pairs:
        t = np.pi / np.maximum(steep, 1e-3)
        missed = steep * (t + np.sqrt(1 + t * t)) ** (-2.0 * NODES)
        total += missed * np.exp(-np.maximum(covered[:, j], covered[:, k]) - apart)[:, None]
    return total


def _halves(k: Array, centre: Array, half: Array, axis: int) -> tuple[Array, Array, Array]:
    step = np.zeros_like(half)
    step[:, axis] = half[:, axis] / 2
    return np.tile(k, 2), np.concatenate([centre - step, centre + step]), np.tile(half - step, (2, 1))


def _quarters(k: Array, centre: Array, half: Array) -> tuple[Array, Array, Array]:
    """The parts of every cell, those of cell c at c, c + C, ..."""
    cells = k, centre, half
    for axis in range(centre.shape[1]):
        cells = _halves(*cells, axis)
    return cells


def integral(p: Table, q: Table, numerator: str = "mixture", *, dtype: type = Float, agree: float = AGREE) -> Value:
    """``sum_k w_k E_{p_k} log(p/q)``, with p_k in place of p for the numerator "component"."""
    scale = 1 + max(mean_divergence(p, q), 0.0)
    p, q = p.extended(dtype), q.extended(dtype)
    a, radial = p.loc.shape[1], p.radial
    edges = [np.linspace(-REACH, REACH, 5).astype(dtype)] * a
    if radial:
        middle = radial**0.5
        edges.append(np.unique(np.maximum(np.linspace(middle - REACH, middle + REACH, 5), 0)).astype(dtype))
    middles = np.meshgrid(*[(e[1:] + e[:-1]) / 2 for e in edges], indexing="ij")
    halves = np.meshgrid(*[np.diff(e) / 2 for e in edges], indexing="ij")
    centre, half = (np.stack([g.reshape(-1) for g in grids], -1) for grids in (middles, halves))
    alive = np.flatnonzero(p.weights > 0)
    k, centre, half = np.repeat(alive, len(centre)), np.tile(centre, (len(alive), 1)), np.tile(half, (len(alive), 1))
    done: list[tuple[Array, Array, Array]] = []
    while len(k):
        hidden = _hidden(p, q, k, centre, half, agree * scale)
        going = hidden.any(-1)
        done.append((k[~going], centre[~going], half[~going]))
        k, centre, half, hidden = k[going], centre[going], half[going], hidden[going]
        for axis in range(centre.shape[1]):
            cut = hidden[:, axis]
            parts = _halves(k[cut], centre[cut], half[cut], axis)
            k, centre, half = (np.concatenate([x[~cut], y]) for x, y in zip((k, centre, half), parts, strict=True))
            hidden = np.concatenate([hidden[~cut], np.tile(hidden[cut], (2, 1))])
        if len(k) > MOST_CELLS:
            raise RuntimeError("too many cells")
    k, centre, half = (np.concatenate(x) for x in zip(*done, strict=True))
    coarse = _evaluate(p, numerator, q, k, centre, half)
    total, error, evaluated = Float(0), Float(0), len(k)
    while len(k):
        finer = _quarters(k, centre, half)
        fine = _evaluate(p, numerator, q, *finer)
        evaluated += len(fine)
        gap = abs(coarse - fine.reshape(-1, len(k)).sum(0))
        bad = gap > agree * scale
        total += fine.reshape(-1, len(k))[:, ~bad].sum()
        error += gap[~bad].sum()
        again = np.tile(bad, len(fine) // len(k))
        k, centre, half = (x[again] for x in finer)
        coarse = fine[again]
        if evaluated > MOST_CELLS:
            raise RuntimeError("too many cells")
    return Value(total, error)
