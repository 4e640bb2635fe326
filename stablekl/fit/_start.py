"""Where to start EM: k-means on a subsample that neither the order of the samples, nor shards, nor units change.

A sample's random number is a hash of its standardised coordinates. The rows with the smallest exponential variates
(P. S. Efraimidis and P. G. Spirakis, "Weighted random sampling with a reservoir", Information Processing Letters 97
(2006), 181-185) are a random subsample, found in one pass over a stream, and the same one if the samples are shuffled,
sharded over processes, or measured in other units. Centres are seeded by greedy k-means++ (D. Arthur and S.
Vassilvitskii, "k-means++: the advantages of careful seeding", SODA 2007, 1027-1035) and moved by Lloyd's iterations.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ._samples import Samples

__all__ = ["Init", "Subsample", "labels_of", "nearest", "subsample"]

Init = Literal["kmeans", "k-means++", "random_from_data"]

# Rows of the subsample, at least; and for every component.
_ROWS, _ROWS_PER_COMPONENT = 2**14, 64
# Coordinates are hashed to this many parts of a standard deviation: rounding in other units must not change them. Rows
# that are the same to this are told apart by so many parts.
_GRID, _FINE = 2.0**10, 2.0**30
# The 64-bit integer nearest to 2^64 over the golden ratio, less 2^64: its multiples are far apart.
_GOLDEN = -7046029254386353131
# Seedings of k-means, the best of which is a start; and iterations of each.
_TRIES, _LLOYD = 4, 30


class Subsample:
    """Rows in standard units, in an order that is theirs alone, and random numbers that belong to them.

    A draw is a race of exponential variates, each made from a row's own hash and the number of the draw: a row more or
    less, or in another place, changes nothing unless it wins.

    Attributes:
        z: ``(M, D)``.
        weights: ``(M,)``.
    """

    def __init__(self, z: Tensor, weights: Tensor, names: Tensor) -> None:
        """Rows, their weights, and their hashes."""
        self.z, self.weights, self._names = z, weights, names
        self._draws = 0

    def drawn(self, chance: Tensor, count: int = 1) -> Tensor:
        """The indices of so many different rows, drawn by their chances, ``(M,)``."""
        self._draws += 1
        salt = (self._draws * _GOLDEN + 2**63) % 2**64 - 2**63  # as 64-bit integers wrap around
        race = _race(self._names + salt, chance)
        return race.argmin().unsqueeze(0) if count == 1 else race.argsort(stable=True)[:count]


def _mixed(h: Tensor) -> Tensor:
    """The 64-bit finaliser of MurmurHash3."""
    for multiplier in (-49064778989728563, -4265267296055464877):
        h = (h ^ (h >> 33 & 2**31 - 1)) * multiplier
    return h ^ (h >> 33 & 2**31 - 1)


def _race(names: Tensor, chance: Tensor) -> Tensor:
    """Exponential variates: the smallest is that of each row with its chance."""
    uniform = ((_mixed(names) >> 12 & 2**52 - 1).to(chance.dtype) + 0.5) / 2**52
    return -torch.log(uniform) / chance


def _names(z: Tensor, seed: int, grid: float) -> Tensor:
    """A hash of every row, the same for equal rows and for rows of the other sign."""
    generator = torch.Generator().manual_seed(seed)
    factors = 2 * torch.randint(-(2**62), 2**62, (z.shape[1],), generator=generator) + 1
    return _mixed(((z.abs() * grid).round().to(torch.int64) * factors.to(z.device)).sum(1))


def subsample(samples: Samples, num_components: int, seed: int) -> Subsample:
    """Rows drawn in proportion to their weights, or all there are."""
    count = max(_ROWS, _ROWS_PER_COMPONENT * num_components)
    best = samples.centre.new_empty(0, samples.dim + 1)
    for z, w in samples.chunks(count):
        w = z.new_ones(len(z)) if w is None else w
        best = _first(torch.cat([best, torch.cat([w.unsqueeze(-1), z], 1)]), seed, count)
    padded = best.new_zeros(count, samples.dim + 1)
    padded[: len(best)] = best
    best = _first(torch.cat(samples.processes.gathered(padded)), seed, count)
    w, z = best[:, 0], best[:, 1:]
    return Subsample(z, w if samples.count <= count else torch.ones_like(w), _names(z, seed, _GRID))


def _first(rows: Tensor, seed: int, count: int) -> Tensor:
    """The winners of the race, of weights and coordinates, in order; rows of one cell of the grid by a finer one."""
    rows = rows[rows[:, 0] > 0]
    rows = rows[_names(rows[:, 1:], seed, _FINE).argsort(stable=True)]
    return rows[_race(_names(rows[:, 1:], seed, _GRID), rows[:, 0]).argsort(stable=True)[:count]]


def labels_of(sub: Subsample, num_components: int, init: Init) -> Tensor:
    """Which component every row of the subsample starts in, ``(M,)``; another start at every call."""
    if init == "random_from_data":
        return nearest(sub.z, sub.z[sub.drawn(sub.weights, num_components)])
    if init == "k-means++":
        return nearest(sub.z, _seeds(sub, num_components))
    tries = (_lloyd(sub.z, sub.weights, _seeds(sub, num_components)) for _ in range(_TRIES))
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


def _seeds(sub: Subsample, count: int) -> Tensor:
    """k-means++, each seed the best of 2 + log K candidates."""
    z, w = sub.z, sub.weights
    trials = 2 + int(math.log(count))
    centres = z[sub.drawn(w)]
    distance = _squared(z, centres)[:, 0]
    for _ in range(count - 1):
        chance = w * distance
        if not float(chance.sum()) > 0:  # fewer distinct points than components
            chance = w
        drawn = torch.cat([sub.drawn(chance) for _ in range(trials)])
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
