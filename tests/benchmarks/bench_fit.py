"""Fits against scikit-learn's, from one start, by as many iterations: `python -m tests.benchmarks.bench_fit`.

The last column is how much more likely our fit makes the samples, relative to the log-likelihood.
"""

from __future__ import annotations

import argparse
import statistics
import warnings

import torch
from sklearn.mixture import GaussianMixture as SklearnMixture
from torch import Tensor

import stablekl
from stablekl.fit import gaussian_mixture
from tests.benchmarks.timing import seconds
from tests.sklearn_fits import precisions

KINDS = ("full", "tied", "diag", "spherical")


def samples(n: int, d: int, k: int) -> Tensor:
    """Clusters of random covariances that overlap."""
    g = torch.Generator().manual_seed(0)
    loc = 2 * torch.randn(k, d, generator=g, dtype=torch.float64)
    factor = torch.eye(d, dtype=torch.float64) + torch.randn(k, d, d, generator=g, dtype=torch.float64) / d**0.5
    label = torch.randint(k, (n,), generator=g)
    return loc[label] + (factor[label] @ torch.randn(n, d, 1, generator=g, dtype=torch.float64)).squeeze(-1)


def likelihood(model: SklearnMixture, kind: str, x: Tensor) -> float:
    """Mean log-density, in float64 whatever the model was fitted in."""
    covariance = torch.as_tensor(model.covariances_).double()
    d = x.shape[1]
    if kind == "spherical":
        covariance = covariance.reshape(-1, 1).expand(-1, d)
    covariance = (
        torch.diag_embed(covariance) if kind in ("diag", "spherical") else covariance.expand(len(model.means_), d, d)
    )
    weights, loc = torch.as_tensor(model.weights_).double(), torch.as_tensor(model.means_).double()
    return float(stablekl.GaussianMixture(probs=weights, loc=loc, covariance_matrix=covariance).log_prob(x).mean())


def compare(x: Tensor, k: int, kind: str, rounds: int) -> str:
    """One line of the table."""
    c = gaussian_mixture(x, k, kind, max_iter=0).mixture.component_distribution
    weights = torch.full((k,), 1 / k, dtype=x.dtype)  # a power of 2: scikit-learn wants a sum of exactly 1
    start = stablekl.GaussianMixture(probs=weights, loc=c.mean, scale_tril=c.scale_tril)
    precision = precisions(kind, c.covariance_matrix)
    array = x.numpy()
    given = {"weights_init": weights, "means_init": c.mean, "precisions_init": precision}
    theirs = SklearnMixture(
        k,
        covariance_type=kind,
        max_iter=10,
        tol=0.0,
        init_params="random_from_data",
        **{name: value.to(x.dtype).numpy() for name, value in given.items()},
    )
    times = []
    for _ in range(rounds):
        fits: list[object] = []
        a = seconds(lambda: fits.append(theirs.fit(array)), "cpu")  # noqa: B023 - called at once
        b = seconds(lambda: fits.append(gaussian_mixture(x, k, kind, init=start, max_iter=10, tol=0.0)), "cpu")  # noqa: B023
        times.append((a, b))
    ours = float(fits[1].history[-1])
    a, b = (statistics.median(t[i] for t in times) for i in (0, 1))
    gain = (ours - likelihood(theirs, kind, x.double())) / abs(ours)
    name = f"N {x.shape[0]:,} D {x.shape[1]} K {k} {kind}, {str(x.dtype).removeprefix('torch.')}"
    return f"{name:44}{a:10.2f}{b:10.2f}{b / a:8.2f}{gain:12.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    warnings.simplefilter("ignore")  # neither iterates to the end
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, 10 iterations, medians of {rounds}")
    print(f"{'case':44}{'sklearn s':>10}{'ours s':>10}{'ratio':>8}{'likelier':>12}")
    for n, d, k in ((100_000, 16, 16), (300_000, 3, 8), (10_000, 64, 8)):
        x = samples(n, d, k)
        for dtype in (torch.float64, torch.float32):
            for kind in KINDS:
                print(compare(x.to(dtype), k, kind, rounds), flush=True)


if __name__ == "__main__":
    main()
