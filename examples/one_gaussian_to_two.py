"""One Gaussian fitted to two bumps, N(-5, 1) + N(10, 1): the loss on a grid, and what each loss leads to.

``F.kl_div`` of densities is inf, and of log-densities a mean over the points; `grid_kl_loss` is the integral.
The forward divergence covers both bumps, the reverse one settles in one, as other losses do if started there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.animation import FuncAnimation, PillowWriter
from torch import Tensor

import stablekl
from stablekl.losses import Grid, forward_kl_loss, grid_kl_loss, reverse_kl_loss

X = torch.linspace(-15, 15, 1000, dtype=torch.float64)
LOG_P = torch.logaddexp(*(stablekl.Normal(torch.tensor(m, dtype=torch.float64), 1.0).log_prob(X) for m in (-5.0, 10.0)))
GRID = Grid(X, LOG_P, 30 / 999)
P = LOG_P.exp()
Loss = Callable[[stablekl.Normal], Tensor]
LOSSES: dict[str, tuple[float, Loss]] = {  # where it starts, and the loss
    "forward KL": (0.0, lambda q: forward_kl_loss(q, GRID)),
    "reverse KL": (0.0, lambda q: reverse_kl_loss(q, GRID)),
    "squared": (-3.0, lambda q: F.mse_loss(q.log_prob(X).exp(), P, reduction="sum")),
    "absolute": (9.0, lambda q: F.l1_loss(q.log_prob(X).exp(), P, reduction="sum") / 30),
    "cosine": (9.0, lambda q: 1 - F.cosine_similarity(q.log_prob(X).exp(), P, dim=0)),
}


def path(start: float, loss: Loss) -> list[tuple[float, float]]:
    """Mean and standard deviation at every evaluation of L-BFGS, from a standard deviation of 1 on."""
    parameters = torch.tensor([start, 0.0], dtype=torch.float64, requires_grad=True)
    visited = []

    def closure() -> Tensor:
        parameters.grad = None
        q = stablekl.Normal(parameters[0], parameters[1].exp())
        visited.append((q.loc.item(), q.scale.item()))
        value = loss(q)
        value.backward()
        return value

    torch.optim.LBFGS([parameters], max_iter=100, line_search_fn="strong_wolfe").step(closure)
    return visited


def main() -> None:
    """Print the losses at the start and where they lead; draw the way there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="one_gaussian_to_two.gif", help="where the animation goes")
    out = parser.parse_args().out
    log_q = stablekl.Normal(0.0, 1.0).log_prob(X)
    for name, q in (("exp, then log", log_q.float().exp().log()), ("log-densities", log_q)):
        mean = F.kl_div(q, LOG_P.exp().to(q.dtype), reduction="sum") / len(X)
        print(f"F.kl_div of {name:14} {mean:8.4f}, a mean over the points")
    print(f"grid_kl_loss               {grid_kl_loss(log_q, LOG_P, GRID.dx):8.4f}, the integral")
    paths = {name: path(*choice) for name, choice in LOSSES.items()}
    for name, visited in paths.items():
        print(f"{name:11} mean {visited[-1][0]:8.4f}  sd {visited[-1][1]:7.4f}  after {len(visited)} evaluations")
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    axes.fill_between(X, P, color="0.85")
    lines = {n: axes.plot([], [], s, label=n)[0] for n, s in zip(paths, ("-", "-", "--", "-", "--"), strict=True)}
    axes.set(xlim=(-15, 15), ylim=(0, 0.42), xlabel="x", ylabel="density")
    axes.legend(frameon=False, loc="upper center")

    def draw(frame: int) -> None:
        for name, line in lines.items():
            place = torch.tensor(paths[name][min(frame, len(paths[name]) - 1)], dtype=torch.float64)
            line.set_data(X, stablekl.Normal(*place).log_prob(X).exp())

    FuncAnimation(figure, draw, frames=25).save(out, writer=PillowWriter(fps=5))


if __name__ == "__main__":
    main()
