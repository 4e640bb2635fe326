"""One fit in two processes, each with half of the samples: the same mixture as one process finds with all of them.

Run as it is, it starts itself: ``torchrun --nproc-per-node=2 distributed_fit.py`` does the same, on many machines too.
On GPUs say "nccl" for "gloo" and move the samples there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
from torch import Tensor

from stablekl.estimators import kl_monte_carlo
from stablekl.fit import gaussian_mixture


def spiral(count: int) -> Tensor:
    """Points along two turns, with noise."""
    g = torch.Generator().manual_seed(0)
    t = 12 * torch.rand(count, generator=g).sqrt()
    return torch.stack([t * t.cos(), t * t.sin()], -1) + 0.5 * torch.randn(count, 2, generator=g)


def work(out: str) -> None:
    """What each process does."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    x = spiral(100_000)
    own = x[rank::size]  # a process would read its own files here
    fit = gaussian_mixture(own, 12, tol=1e-4)
    print(f"rank {rank}: {len(own)} samples, log-likelihood of all {fit.num_samples:.0f} {fit.log_likelihood:.4f}")
    q = torch.distributions.MultivariateNormal(x.mean(0), x.T.cov())
    divergence = kl_monte_carlo(fit.mixture, q, 100_000)  # samples are shared out as well
    if rank == 0:
        alone = gaussian_mixture(x, 12, tol=1e-4, distributed=False)
        gap = (alone.mixture.component_distribution.mean - fit.mixture.component_distribution.mean).abs().max()
        print(f"one process: log-likelihood {alone.log_likelihood:.4f}, means differ by {gap:.1e}")
        print(f"KL(fit || one Gaussian) = {divergence.value:.3f} +- {divergence.standard_error:.3f}")
        figure, axes = plt.subplots(figsize=(5, 5), layout="constrained")
        axes.scatter(*x[:5000].T, s=1, color="0.6")
        axis = torch.linspace(-16, 16, 300)
        density = fit.mixture.log_prob(torch.cartesian_prod(axis, axis)).exp().reshape(300, 300).T
        axes.contour(axis, axis, density, levels=6, linewidths=0.8)
        axes.set_title("12 components, fitted in two processes", fontsize=10)
        figure.savefig(out, dpi=120)
    dist.destroy_process_group()


def main() -> None:
    """Start two processes, unless torchrun has."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="distributed_fit.png", help="where the picture goes")
    out = parser.parse_args().out
    if "RANK" in os.environ:
        work(out)
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--out", out], check=True, env=environment)


if __name__ == "__main__":
    main()
