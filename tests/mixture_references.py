"""KL divergences of mixtures from the definition, and problems in many dimensions that reduce to one or two.

A *row* is one component, (weight, mean, standard deviation) in one dimension. `line` and `radial` integrate p log(p/q)
in mpmath, `plane` on a grid in extended precision. They know nothing of S - I, of u + expm1(-u) or of any regrouping.
`embedded` turns a problem on a line into one in D dimensions of the same divergence: components that differ along
one direction only, seen through a random affine map.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import stablekl
from stablekl.precision.references import mixture
from stablekl.precision.references.context import Number, mp

Row = tuple[float, float, float]
F64 = torch.float64


def line(p: Sequence[Sequence[object]], q: Sequence[Sequence[object]]) -> Number:
    """The suite's integral over the line, for rows of any numbers."""
    return mixture.line(*([tuple(map(mp.mpf, row)) for row in rows] for rows in (p, q)))


def lines(p: np.ndarray, q: np.ndarray, n: int = 24) -> np.ndarray:
    """`line` for a batch of problems, tables (B, K, 3), in extended precision.

    Good to 1e-14, but for 1e-4 where components of q cross steeply, ten standard deviations out (compared with n = 60).
    """
    p, q = (x.astype(np.longdouble) for x in (p, q))
    steps = np.arange(-12, 13, 2, dtype=np.longdouble)
    edges = np.concatenate([(x[..., 1:2] + x[..., 2:] * steps).reshape(len(x), -1) for x in (p, q)], 1)
    low, high = (p[..., 1] - 12 * p[..., 2]).min(-1), (p[..., 1] + 12 * p[..., 2]).max(-1)
    edges = np.sort(np.clip(edges, low[:, None], high[:, None]), 1)
    half = np.diff(edges)[..., None] / 2
    nodes, weights = (x.astype(np.longdouble) for x in np.polynomial.legendre.leggauss(n))
    x = (edges[:, :-1, None] + half + half * nodes).reshape(len(p), -1)

    def log_mixture(rows: np.ndarray) -> np.ndarray:
        w, m, s = (rows[..., i, None] for i in range(3))
        terms = np.log(w / w.sum(1, keepdims=True)) - np.log(s) - ((x[:, None] - m) / s) ** 2 / 2
        return np.logaddexp.reduce(terms, 1) - np.log(2 * np.longdouble(np.pi)) / 2

    log_p, log_q = log_mixture(p), log_mixture(q)
    return ((half * weights).reshape(len(p), -1) * np.exp(log_p) * (log_p - log_q)).sum(1)


def plane(
    p: tuple[np.ndarray, np.ndarray, np.ndarray], q: tuple[np.ndarray, np.ndarray, np.ndarray], step: float
) -> float:
    """KL(p || q) in the plane; each of them weights (K,), means (K, 2) and covariances (K, 2, 2); trapezoid rule."""
    reach = 11 * max(np.sqrt(c).max() for c in (p[2][:, [0, 1], [0, 1]],))
    low, high = p[1].min() - reach, p[1].max() + reach
    grid = np.arange(low, high, step, dtype=np.longdouble)
    x = np.stack(np.meshgrid(grid, grid, indexing="ij"), -1)

    def log_mixture(w: np.ndarray, m: np.ndarray, c: np.ndarray) -> np.ndarray:
        terms = []
        for weight, mean, cov in zip(w / w.sum(), m, c, strict=True):
            a, b, d = (np.longdouble(v) for v in (cov[0, 0], cov[0, 1], cov[1, 1]))
            det = a * d - b * b
            u, v = x[..., 0] - mean[0], x[..., 1] - mean[1]
            form = (d * u * u - 2 * b * u * v + a * v * v) / det
            terms.append(np.log(np.longdouble(weight)) - form / 2 - np.log(det) / 2)
        return functools.reduce(np.logaddexp, terms) - np.log(2 * np.longdouble(np.pi))

    log_p, log_q = log_mixture(*p), log_mixture(*q)
    return float((np.exp(log_p) * (log_p - log_q)).sum() * np.longdouble(step) ** 2)


def radial(p: Sequence[tuple[float, float]], q: Sequence[tuple[float, float]], dim: int) -> Number:
    """KL of mixtures of N(0, s^2 I) in ``dim`` dimensions, given as (weight, s): an integral over the radius."""
    with mp.workdps(30):

        def log_radial(r: Number, rows: Sequence[tuple[float, float]]) -> Number:
            total = sum(mp.mpf(w) for w, _ in rows)
            return mp.log(
                sum(mp.mpf(w) / total * mp.mpf(s) ** -dim * mp.exp(-((r / mp.mpf(s)) ** 2) / 2) for w, s in rows)
            )

        norm = mp.mpf(2) ** (1 - mp.mpf(dim) / 2) / mp.gamma(mp.mpf(dim) / 2)
        centre = mp.sqrt(dim)
        edges = sorted({max(mp.mpf(0), mp.mpf(s) * (centre + t)) for _, s in (*p, *q) for t in range(-12, 13, 2)})
        edges = [x for x in edges if x <= max(mp.mpf(s) for _, s in p) * (centre + 12)]
        total = mp.mpf(0)
        for a, b in itertools.pairwise(edges):
            half, middle = (b - a) / 2, (a + b) / 2
            for node, weight in mixture._gauss_legendre(24, 128):
                r = middle + half * node
                log_p = log_radial(r, p)
                total += half * weight * norm * r ** (dim - 1) * mp.exp(log_p) * (log_p - log_radial(r, q))
        return total


def affine_map(dim: int, seed: int) -> Tensor:
    """A random matrix with singular values between 1/2 and 2."""
    g = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(dim, dim, generator=g, dtype=F64))[0] for _ in range(2))
    return u * torch.exp2(2 * torch.rand(dim, generator=g, dtype=F64) - 1) @ v


def embedded(rows: Sequence[Row] | Tensor, dim: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (K,), means (K, D) and covariances (K, D, D); differentiable in a tensor of rows.

    A batch of tables, (B, K, 3), is seen through a batch of maps.
    """
    table = torch.as_tensor(rows, dtype=F64)
    if table.ndim == 2:
        a = affine_map(dim, seed)
    else:  # each its own: the fixed points would treat problems that share a direction alike
        a = torch.stack([affine_map(dim, 1000 * seed + i) for i in range(len(table))]).unsqueeze(1)
    direction = a[..., 0]
    loc = table[..., 1:2] * direction + a.sum(-1)
    variances = torch.cat([table[..., 2:] ** 2, torch.ones(*table.shape[:-1], dim - 1, dtype=F64)], -1)
    return table[..., 0], loc, a * variances.unsqueeze(-2) @ a.mT


def gaussian(rows: Sequence[Row] | Tensor, dim: int, seed: int = 0, dtype: torch.dtype = F64):
    """A single row as a stablekl.MultivariateNormal, several as a stablekl.GaussianMixture, after `embedded`."""
    w, loc, cov = (x.to(dtype) for x in embedded(rows, dim, seed))
    if w.shape[-1] == 1:
        return stablekl.MultivariateNormal(loc[..., 0, :], covariance_matrix=cov[..., 0, :, :])
    return stablekl.GaussianMixture(probs=w, loc=loc, covariance_matrix=cov)
