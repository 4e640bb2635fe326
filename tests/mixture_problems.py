"""Random divergences of mixtures in any number of components and dimensions, with truths that no engine shares.

A problem is a product of independent factors: pairs of mixtures on a line, in a plane, of concentric components, or of
components that differ along an axis and in how wide they are around it (`mixture_integrals`). KL(p || q) is the
sum of the factors' divergences, each of them an integral of the definition; what is left of the space is the same for
all components. Or the mixture is made of groups a thousand standard deviations apart: S less the entropy of the groups'
weights and the information in each.

Parameters are multiples of a power of two, and the map through which the problem is seen has few entries, all of them
powers of two: the tensors are exactly the problem that was solved, in float32 as in float64. Some problems in
float64 are seen through a dense random map instead, which rounds.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch.distributions import Distribution

import stablekl

from .mixture_integrals import Float, Table, Value, integral, mean_divergence, pairwise

Rng = np.random.Generator

SEPARATIONS = (0.0, 0.1, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0)
ROUNDING = 1e-16  # of a truth in float64, relative to 1 + S
SUMMED = 2e-15  # of an integral in float64
DENSE = 1e-13  # what the rounding of a dense map may cost, relative to 1 + S


class Problem(NamedTuple):
    """A divergence.

    Attributes:
        family: of which kind.
        p: the factors of p, one Table each.
        q: those of q.
        dim: of the space.
        truth: KL(p || q).
        scale: S.
        slack: by how much the truth itself may be off.
        mild: no factor's condition number is above 100.
        seed: of the map.
    """

    family: str
    p: list[Table]
    q: list[Table]
    dim: int
    truth: float
    scale: float
    slack: float
    mild: bool
    seed: int


class Style(NamedTuple):
    """How components are drawn: distances in standard deviations, kinds of weights and of scales, and the grid."""

    separation: float
    weights: str
    scales: str
    grid: float = 2.0**-12


def style(rng: Rng, **fixed: object) -> Style:
    """A random one."""
    chosen = Style(
        float(rng.choice(SEPARATIONS)),
        str(rng.choice(["even", "uneven", "rare"])),
        str(rng.choice(["alike", "mild", "mild", "extreme"])),
    )
    return chosen._replace(**fixed)


# ------------------------------------------------------------------------------------------------ components


def _on(grid: float, x: np.ndarray) -> np.ndarray:
    return np.clip(np.round(x / grid) * grid, -(2**23) * grid, 2**23 * grid)


def weights(rng: Rng, k: int, kind: str) -> np.ndarray:
    """Weights that float32 holds, down to 1e-9 for the rare."""
    w = {"even": np.ones(k), "uneven": rng.dirichlet(np.ones(k)), "rare": rng.dirichlet(2 * np.ones(k))}[kind]
    if kind == "rare":
        w[: rng.integers(1, max(k, 2))] *= 10.0 ** -rng.uniform(2, 9)
    return (w / w.sum()).astype(np.float32).astype(float)


def table(rng: Rng, k: int, a: int, radial: int, s: Style, *, factor: np.ndarray | None = None) -> Table:
    """K components that are arbitrary in ``a`` dimensions and concentric in the others."""
    spreads = {"alike": 0.0, "mild": 0.4, "extreme": 0.0}[s.scales]

    def sizes(*shape: int) -> np.ndarray:
        x = spreads * rng.normal(size=shape)
        if s.scales == "extreme":
            x = rng.uniform(-math.log(1e3) / 2, math.log(1e3) / 2, size=shape)
        return np.maximum(_on(s.grid, np.exp(x)), s.grid)

    tril = np.zeros((k, a, a))
    diagonal = sizes(k, a)
    for i in range(a):
        tril[:, i, i] = diagonal[:, i]
        for j in range(i):
            mixed = rng.normal(size=k) * 0.5 * (s.scales != "alike") * np.minimum(diagonal[:, i], diagonal[:, j])
            tril[:, i, j] = _on(s.grid, mixed)
    if factor is not None:
        tril = np.broadcast_to(factor, tril.shape).copy()
    spread = np.ones(k) if not radial else sizes(k)
    if radial and radial > 3 and s.scales == "mild":  # nearer to each other, or they separate
        spread = np.maximum(_on(s.grid, spread ** (2 / math.sqrt(radial))), s.grid)
    loc = _on(s.grid, s.separation * rng.normal(size=(k, a)))
    if s.separation == 0 and rng.random() < 0.3:  # all the same
        tril, spread = tril[:1].repeat(k, 0), spread[:1].repeat(k, 0)
    return Table(weights(rng, k, s.weights), loc, tril, spread, radial)


def single(rng: Rng, p: Table, grid: float) -> Table:
    """A Gaussian with the mixture's moments, or wider, or shifted."""
    w = p.weights / p.weights.sum()
    mean = w @ p.loc
    centred = p.loc - mean
    cov = np.einsum("k,kij,klj->il", w, p.tril, p.tril) + np.einsum("k,ki,kj->ij", w, centred, centred)
    tril = np.linalg.cholesky(cov) if len(mean) else np.zeros((0, 0))
    spread = math.sqrt(w @ p.spread**2)
    kind = rng.choice(["matched", "matched", "wide", "shifted"])
    if kind == "wide":
        factor = 10.0 ** rng.uniform(0.3, 2)
        tril, spread = factor * tril, (factor * spread if p.radial else 1.0)
    if kind == "shifted":
        mean = mean + tril @ rng.normal(size=len(mean))
    tril = np.tril(_on(grid, tril))
    tril[range(len(mean)), range(len(mean))] = np.maximum(tril.diagonal(), grid)
    widths = np.maximum(_on(grid, np.array([spread])), grid)
    return Table(np.ones(1), _on(grid, mean)[None], tril[None], widths, p.radial)


# -------------------------------------------------------------------------------------------------- families


def _definition(p: Table, q: Table, family: str) -> Value:
    axes = p.loc.shape[1] + (p.radial > 0)
    if axes == 1 or len(p.weights) * len(q.weights) <= 3:
        return integral(p, q)
    found = integral(p, q, dtype=np.float64, agree=1e-15 if family == "shared" else 1e-13)
    # the agreement of a few cells may be chance: three times less than the error was observed
    return found._replace(error=4 * found.error + SUMMED * (1 + mean_divergence(p, q)))


def _mild(tables: list[Table]) -> bool:
    worst = 1.0
    for t in tables:
        singular = np.linalg.svd(t.tril, compute_uv=False) if t.loc.shape[1] else np.ones((1, 1))
        worst = max(worst, float(singular.max() / singular.min()) ** 2, float(t.spread.max() / t.spread.min()) ** 2)
    return worst <= 100


def _problem(family: str, p: list[Table], q: list[Table], dim: int, rng: Rng) -> Problem:
    parts = [_definition(a, b, family) for a, b in zip(p, q, strict=True)]
    truth, slack = sum(x.value for x in parts), sum(x.error for x in parts)
    scale = sum(mean_divergence(a, b) for a, b in zip(p, q, strict=True))
    seed = int(rng.integers(2**31))
    slack = float(slack) + ROUNDING * (1 + scale)
    return Problem(family, p, q, dim, max(float(truth), 0.0), max(scale, 0.0), slack, _mild([*p, *q]), seed)


def _shape(family: str, dim: int) -> tuple[int, int]:
    """Arbitrary dimensions and concentric ones of a family of one factor."""
    return {"line": (1, 0), "plane": (2, 0), "shared": (2, 0), "axial": (1, dim - 1), "radial": (0, dim)}[family]


def _one_factor(rng: Rng, family: str, k_p: int, k_q: int, dim: int) -> Problem:
    s = style(rng)
    shape = _shape(family, dim)
    if family == "shared":
        s = s._replace(scales="mild")
    if k_q > 1 and family in ("line", "radial", "axial") and rng.random() < 0.25:
        return _wide(rng, family, k_p, k_q, dim)
    p = table(rng, k_p, *shape, s)
    if family == "shared":
        p = p._replace(tril=p.tril[:1].repeat(k_p, 0))
    if k_q == 1:
        q = single(rng, p, s.grid)
    else:
        far = style(rng, separation=s.separation, scales=s.scales)
        shared = p.tril[0] if family == "shared" else None
        q = table(rng, k_q, *shape, far, factor=shared)
    return _problem(family, [p], [q], dim, rng)


def _wide(rng: Rng, family: str, k_p: int, k_q: int, dim: int) -> Problem:
    """The first mixture up to 1e4 times wider than the components of the second."""
    s = style(rng, scales="mild", grid=2.0**-6)
    shape, factor = _shape(family, dim), np.round(10.0 ** rng.uniform(1, 4))
    p, q = (table(rng, k, *shape, s) for k in (k_p, k_q))
    p = p._replace(tril=p.tril * factor, loc=p.loc * factor, spread=p.spread * (factor if p.radial else 1))
    return _problem(family, [p], [q], dim, rng)


def _product(rng: Rng, k_p: tuple[int, ...], k_q: tuple[int, ...], dim: int) -> Problem:
    """One factor for each number, which share the space."""
    count = len(k_p)
    cuts = np.sort(rng.choice(np.arange(1, dim), count - 1, replace=False)) if count > 1 else np.zeros(0, int)
    sizes = np.diff([0, *cuts, dim])
    p, q = [], []
    for m, n, size in zip(k_p, k_q, sizes.tolist(), strict=True):
        a = 1 if size == 1 else int(rng.choice([0, 1, 2] if size == 2 else [0, 1]))
        s = style(rng, weights=str(rng.choice(["even", "uneven"])), scales=str(rng.choice(["alike", "mild"])))
        s = s._replace(separation=min(s.separation, 5.0))
        p.append(table(rng, m, a, size - a, s))
        q.append(single(rng, p[-1], s.grid) if n == 1 else table(rng, n, a, size - a, s))
    return _problem("product", p, q, dim, rng)


def _groups(rng: Rng, k: int, dim: int) -> Problem:
    """Groups of two or three, a thousand standard deviations apart."""
    size = int(rng.choice([2, 3]))
    sizes = [size] * (k // size) + ([k % size] if k % size else [])
    a = int(rng.choice([1, 2]))
    radial = dim - 1 if a == 1 and dim <= 8 and rng.random() < 0.5 else 0
    places = rng.permutation(np.arange(-4, 4))[: len(sizes)]
    heights = weights(rng, len(sizes), str(rng.choice(["even", "uneven"]))).astype(Float)
    heights /= heights.sum()
    groups, truth, slack = [], Float(0), Float(0)
    for place, n, height in zip(places, sizes, heights, strict=True):
        s = style(rng, scales="mild", grid=2.0**-8)
        g = table(rng, n, a, radial, s._replace(separation=min(s.separation, 5.0)))
        within = np.asarray(g.weights, Float) / np.asarray(g.weights, Float).sum()
        found = integral(g, g, "component") if n > 1 else Value(Float(0), Float(0))
        truth -= height * (found.value - np.log(height))
        slack += height * found.error
        offset = np.zeros(a)
        offset[0] = 1024.0 * place
        groups.append(g._replace(weights=height * within, loc=g.loc + offset))
    p = Table(*(np.concatenate([g[i] for g in groups]) for i in range(4)), radial)
    q = single(rng, p._replace(weights=p.weights.astype(float)), 2.0**-8)
    scale = mean_divergence(p, q)
    truth += _exact_mean(p, q)
    slack = float(slack) + ROUNDING * (1 + scale)
    return Problem("groups", [p], [q], dim, float(truth), scale, slack, False, int(rng.integers(2**31)))


def _exact_mean(p: Table, q: Table) -> np.longdouble:
    return (p.extended().weights * pairwise(p, q)[:, 0]).sum()


FACTORS = {4: ((2, 2),), 6: ((2, 3),), 16: ((4, 4), (2, 8), (2, 2, 4), (2, 2, 2, 2))}


def families(k_p: int, k_q: int, dim: int) -> list[str]:
    """Those that exist for these numbers of components and dimensions."""
    if k_q == 1 and k_p in (4, 6):
        return ["groups"] if dim > 1 else []
    names = ["line"]
    if dim > 1:
        names += ["plane", "shared", "radial"]
        names += ["axial"] if dim > 2 else []
        names += ["product"] if k_p == 16 or (k_q > 1 and max(k_p, k_q) > 2) else []
        names += ["groups"] if k_q == 1 and k_p > 2 else []
    return names


def draw(family: str, k_p: int, k_q: int, dim: int, seed: int) -> Problem:
    """A random problem of a family, the same for the same seed."""
    rng = np.random.default_rng([seed, k_p, k_q, dim, sum(family.encode())])
    while True:
        try:
            if family == "groups":
                return _groups(rng, k_p, dim)
            if family == "product":
                if k_q > 1:  # one factor each
                    return _product(rng, (k_p, 1), (1, k_q), dim) if k_p > 1 else _product(rng, (1, 1), (k_q, 1), dim)
                choices = [x for x in FACTORS[k_p] if len(x) <= dim]
                shape = choices[rng.integers(len(choices))]
                return _product(rng, shape, (1,) * len(shape), dim)
            return _one_factor(rng, family, k_p, k_q, dim)
        except RuntimeError:  # too fine for the reference: another one
            continue


# -------------------------------------------------------------------------------------------- distributions


def joint(factors: list[Table], dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights (K,), means (K, D) and lower factors (K, D, D) of a product, with what is left of the space."""
    shapes = [range(len(t.weights)) for t in factors]
    w, loc, tril = [], [], []
    for choice in itertools.product(*shapes):
        mean, root = np.zeros(dim), np.eye(dim)
        weight, start = 1.0, 0
        for t, k in zip(factors, choice, strict=True):
            a = t.loc.shape[1]
            weight *= float(t.weights[k])
            mean[start : start + a] = t.loc[k]
            root[start : start + a, start : start + a] = t.tril[k]
            rest = range(start + a, start + t.dim)
            root[rest, rest] = t.spread[k]
            start += t.dim
        w.append(weight), loc.append(mean), tril.append(root)
    return np.array(w), np.stack(loc), np.stack(tril)


def sparse_map(dim: int, rng: Rng) -> np.ndarray:
    """Unit lower triangular, one or two of 1/2 and -1/2 in each row."""
    a = np.eye(dim)
    for i in range(1, dim):
        a[i, rng.integers(0, i, size=2)] = rng.choice([-0.5, 0.5])
    return a


def dense_map(dim: int, rng: Rng) -> np.ndarray:
    """A random matrix with singular values between 0.7 and 1.4."""
    u, v = (np.linalg.qr(rng.normal(size=(dim, dim)))[0] for _ in range(2))
    return u * np.exp2(rng.uniform(-0.5, 0.5, dim)) @ v


def _distribution(w: np.ndarray, dtype: torch.dtype, device: str, **given: np.ndarray) -> Distribution:
    tensors = {name: torch.tensor(x, dtype=dtype, device=device) for name, x in given.items()}
    if len(w) == 1:
        return stablekl.MultivariateNormal(**{name: x[0] for name, x in tensors.items()})
    return stablekl.GaussianMixture(probs=torch.tensor(w, dtype=dtype, device=device), **tensors)


def realised(problem: Problem, dtype: torch.dtype, device: str = "cpu") -> tuple[Distribution, Distribution, float]:
    """Both distributions, and the slack of the truth: as factors, as covariances or as standard deviations."""
    rng = np.random.default_rng(problem.seed)
    kind = ("scale_tril", "covariance_matrix", "scale_diag")[problem.seed % 3]
    both = [joint(t, problem.dim) for t in (problem.p, problem.q)]
    make = functools.partial(_distribution, dtype=dtype, device=device)
    diagonal = all(not (x[2] - x[2] * np.eye(problem.dim)).any() for x in both)
    if problem.dim == 1 or (diagonal and kind == "scale_diag"):
        order, unit = rng.permutation(problem.dim), np.exp2(rng.integers(-3, 4, problem.dim))
        p, q = (
            make(w, loc=(m * unit)[:, order], scale_diag=(np.diagonal(t, 0, 1, 2) * unit)[:, order]) for w, m, t in both
        )
        return p, q, problem.slack
    if kind == "covariance_matrix" and dtype == torch.float64 and problem.mild:
        a = dense_map(problem.dim, rng)
        shift = a @ rng.normal(size=problem.dim)
        covariances = [(a @ t) @ (a @ t).swapaxes(1, 2) for _, _, t in both]
        p, q = (
            make(w, loc=m @ a.T + shift, covariance_matrix=(c + c.swapaxes(1, 2)) / 2)
            for (w, m, _), c in zip(both, covariances, strict=True)
        )
        return p, q, problem.slack + DENSE * (1 + problem.scale)
    a = sparse_map(problem.dim, rng)
    images = [(w, m @ a.T, a @ t) for w, m, t in both]
    for _, m, t in images:
        if not all((x.astype(np.float32) == x).all() for x in (m, t)):
            raise ValueError("the problem is not exact in float32")
    p, q = (make(w, loc=m, scale_tril=t) for w, m, t in images)
    return p, q, problem.slack
