"""Where to start EM: k-means on a subsample that neither the order of the samples, nor shards, nor units change.

A sample's random number is a hash of its standardised coordinates. The rows with the smallest exponential variates
(P. S. Efraimidis and P. G. Spirakis, "Weighted random sampling with a reservoir", Information Processing Letters 97
(2006), 181-185) are a random subsample, found in one pass over a stream, and the same one if the samples are shuffled,
sharded over processes, or measured in other units. Centres are seeded by greedy k-means++ (D. Arthur and S.
Vassilvitskii, "k-means++: the advantages of careful seeding", SODA 2007, 1027-1035) and moved by Lloyd's iterations.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ._samples import Samples

__all__ = ["Init", "Subsample", "labels_of", "nearest", "subsample"]

Init = Literal["kmeans", "k-means++", "random_from_data"]

# Rows of the subsample, at least; and for every component.
_ROWS, _ROWS_PER_COMPONENT = 2**14, 64
# Coordinates are hashed to this many parts of a standard deviation: rounding in other units must not change them.
_GRID = 2.0**10
# Seedings of k-means, the best of which is a start; and iterations of each.
_TRIES, _LLOYD = 4, 30


class Subsample(NamedTuple):
    """Rows in standard units, ``(M, D)``, and their weights, ``(M,)``, in an order that is theirs alone."""

    z: Tensor
    weights: Tensor


def _uniform(z: Tensor, seed: int) -> Tensor:
    """A number in (0, 1) for every row, the same for equal rows and for rows of the other sign."""
    generator = torch.Generator().manual_seed(seed)
    factors = 2 * torch.randint(-(2**62), 2**62, (z.shape[1],), generator=generator) + 1
    h = ((z.abs() * _GRID).round().to(torch.int64) * factors.to(z.device)).sum(1)
    for multiplier in (-49064778989728563, -4265267296055464877):  # the 64-bit finaliser of MurmurHash3
        h = (h ^ (h >> 33 & 2**31 - 1)) * multiplier
    h = h ^ (h >> 33 & 2**31 - 1)
    return ((h >> 12 & 2**52 - 1).to(z.dtype) + 0.5) / 2**52


def subsample(samples: Samples, num_components: int, seed: int) -> Subsample:
    """Rows drawn in proportion to their weights, or all there are."""
    rows = max(_ROWS, _ROWS_PER_COMPONENT * num_components)
    d = samples.dim
    best = samples.centre.new_empty(0, d + 2)
    for z, w in samples.chunks(rows):
        w = z.new_ones(len(z)) if w is None else w
        race = -torch.log(_uniform(z, seed)) / w
        best = _smallest(torch.cat([best, torch.cat([race.unsqueeze(-1), w.unsqueeze(-1), z], 1)]), rows)
    padded = best.new_full((rows, d + 2), torch.inf)
    padded[: len(best)] = best
    best = _smallest(torch.cat(samples.processes.gathered(padded)), rows)
    best = best[best[:, 0] < torch.inf]
    weights = best[:, 1] if samples.count <= rows else torch.ones_like(best[:, 1])
    return Subsample(best[:, 2:], weights)


def _smallest(race: Tensor, rows: int) -> Tensor:
    return race[race[:, 0].argsort(stable=True)[:rows]]


def labels_of(sub: Subsample, num_components: int, init: Init, generator: torch.Generator) -> Tensor:
    """Which component every row of the subsample starts in, ``(M,)``."""
    z, w = sub
    if init == "random_from_data":
        return nearest(z, z[torch.multinomial(w.cpu(), num_components, generator=generator).to(z.device)])
    if init == "k-means++":
        return nearest(z, _seeds(z, w, num_components, generator))
    tries = (_lloyd(z, w, _seeds(z, w, num_components, generator)) for _ in range(_TRIES))
    return min(tries, key=lambda found: found[1])[0]


def _lloyd(z: Tensor, w: Tensor, centres: Tensor) -> tuple[Tensor, float]:
    """k-means from these centres: labels, and the weighted sum of squared distances."""
    labels = nearest(z, centres)
    for _ in range(_LLOYD):
        before = labels
        chosen = torch.nn.functional.one_hot(labels, len(centres)).to(z) * w.unsqueeze(-1)
        size = chosen.sum(0).unsqueeze(-1)
        centres = torch.where(size > 0, chosen.mT @ z / size, centres)
        # Expanded, since a start need not tell points that are much nearer to each other than to the mean.
        labels = torch.addmm(0.5 * centres.square().sum(-1), z, centres.mT, alpha=-1).argmin(-1)
        if torch.equal(labels, before):
            break
    return labels, float(w @ (z - centres[labels]).square().sum(-1))


def _seeds(z: Tensor, w: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++, each seed the best of 2 + log K candidates."""
    trials = 2 + int(math.log(count))
    index = torch.multinomial(w.cpu(), 1, generator=generator).to(z.device)
    centres = z[index]
    distance = _squared(z, centres)[:, 0]
    for _ in range(count - 1):
        chance = w * distance
        if not float(chance.sum()) > 0:  # fewer distinct points than components
            chance = w
        drawn = torch.multinomial(chance.cpu(), trials, replacement=True, generator=generator).to(z.device)
        after = torch.minimum(distance.unsqueeze(-1), _squared(z, z[drawn]))
        choice = int((w @ after).argmin())
        centres = torch.cat([centres, z[drawn[choice]].unsqueeze(0)])
        distance = after[:, choice]
    return centres


def nearest(z: Tensor, centres: Tensor) -> Tensor:
    """The index of the centre that is nearest to every row."""
    return _squared(z, centres).argmin(-1)


def _squared(z: Tensor, centres: Tensor) -> Tensor:
    """By differences: the expanded square loses points that are near each other and far from the mean."""
    return torch.cdist(z, centres, compute_mode="donot_use_mm_for_euclid_dist").square()
