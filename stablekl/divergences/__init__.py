"""Divergences beyond KL, in closed form and without cancellation: Rényi and its kin, Jeffreys, 2-Wasserstein."""

from .alpha import bhattacharyya_distance, chernoff_distance, renyi_divergence, squared_hellinger
from .symmetric import jeffreys_divergence, squared_wasserstein2, wasserstein2

__all__ = [
    "bhattacharyya_distance",
    "chernoff_distance",
    "jeffreys_divergence",
    "renyi_divergence",
    "squared_hellinger",
    "squared_wasserstein2",
    "wasserstein2",
]
