"""Mixtures of scalar normals, and their distribution functions in mpmath."""

from __future__ import annotations

from collections.abc import Sequence

import mpmath as mp
import torch
from torch.distributions import Categorical, Normal

from stablekl import MixtureSameFamily

F64 = torch.float64
EPS = 2.0**-52

# name: weights, means, standard deviations
CASES = {
    "plain": ([0.25, 0.75], [-2.0, 2.0], [1.0, 0.5]),
    "far": ([0.25, 0.5, 0.25], [-100.0, 0.0, 100.0], [1.0, 1e-4, 1.0]),
    "very far": ([0.5, 0.5], [0.0, 1e6], [1.0, 1.0]),
    "tiny weight": ([1e-300, 1.0], [0.0, 5.0], [1.0, 1.0]),
    "scales": ([0.5, 0.25, 0.25], [0.0, 1.0, -1e3], [1e-4, 1e4, 1.0]),
    "zero weight": ([0.5, 0.0, 0.5], [0.0, 1e5, 1.0], [1.0, 1e-3, 2.0]),
}


def mixture(
    weights: Sequence[float], loc: Sequence[float], scale: Sequence[float], dtype: torch.dtype = F64
) -> MixtureSameFamily:
    loc, scale = (torch.tensor(v, dtype=dtype) for v in (loc, scale))
    return MixtureSameFamily(Categorical(probs=torch.tensor(weights, dtype=dtype)), Normal(loc, scale))


def tails(x, weights, loc, scale):
    """F, 1 - F and the density at one point."""
    total = mp.fsum(weights)
    x, terms = (
        mp.mpf(x),
        [(mp.mpf(w) / total, mp.mpf(m), mp.mpf(s)) for w, m, s in zip(weights, loc, scale, strict=True)],
    )
    root = mp.sqrt(2)
    lower = mp.fsum(w * mp.erfc((m - x) / s / root) / 2 for w, m, s in terms)
    upper = mp.fsum(w * mp.erfc((x - m) / s / root) / 2 for w, m, s in terms)
    return lower, upper, mp.fsum(w * mp.npdf(x, m, s) for w, m, s in terms)
