"""A mixture density network on a curve that turns back on itself: several answers for one question.

x = y + 0.3 sin(2 pi y) + noise (C. M. Bishop, "Mixture density networks", 1994). For x near a half there are three y.
Squared error learns their mean, where there is none. The network starts at log-scales of -20, where densities underflow
and the usual ``log(sum(exp))`` of densities is inf and its gradient NaN.
"""

from __future__ import annotations

import argparse

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import stablekl
from stablekl.losses import MixtureNLLLoss, mixture_diagnostics

COMPONENTS = 5


def trained(net: nn.Module, x: Tensor, y: Tensor, loss: MixtureNLLLoss, steps: int = 1500) -> list[float]:
    """The loss at each step of Adam."""
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    history = []
    for _ in range(steps):
        optimizer.zero_grad()
        logits, loc, log_scale = net(x).chunk(3, -1)
        value = loss(y, logits, loc, log_scale=log_scale)
        value.backward()
        optimizer.step()
        history.append(value.item())
    return history


def main() -> None:
    """Train, print what the components do, draw them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="mixture_density_network.png", help="where the picture goes")
    out = parser.parse_args().out
    torch.manual_seed(0)
    y = torch.rand(600)
    x = (y + 0.3 * torch.sin(2 * torch.pi * y) + 0.03 * torch.randn(600)).unsqueeze(-1)
    net = nn.Sequential(nn.Linear(1, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 3 * COMPONENTS))
    with torch.no_grad():
        net[-1].bias[-COMPONENTS:] = -20.0  # far too narrow, on purpose
        net[-1].bias[COMPONENTS : 2 * COMPONENTS] = torch.linspace(0, 1, COMPONENTS)
        logits, loc, log_scale = net(x).chunk(3, -1)
        density = (
            logits.softmax(-1) * torch.distributions.Normal(loc, log_scale.exp()).log_prob(y[:, None]).exp()
        ).sum(-1)
    loss = MixtureNLLLoss(data_scale=y.std(), relative_floor=1e-2)
    history = trained(net, x, y, loss)
    with torch.no_grad():
        logits, loc, log_scale = net(x).chunk(3, -1)
    found = mixture_diagnostics(y, logits, loc, log_scale=log_scale, min_scale=loss.min_scale)
    print(f"at the start: {-density.log().mean():.4g} by densities, {history[0]:.4g} by MixtureNLLLoss")
    print(f"at the end:   {history[-1]:.3f} nats a target")
    print(
        f"components used: {found.effective_components:.2f} of {COMPONENTS}, collapsed targets: {found.collapsed:.1%}"
    )

    grid = torch.linspace(-0.05, 1.05, 300).unsqueeze(-1)
    with torch.no_grad():
        logits, loc, log_scale = net(grid).chunk(3, -1)
    mixture = stablekl.GaussianMixture(logits=logits, loc=loc.unsqueeze(-1), scale_diag=log_scale.exp().unsqueeze(-1))
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.scatter(x, y, s=4, color="0.7")
    weights = logits.softmax(-1)
    for k in range(COMPONENTS):
        seen = weights[:, k] > 0.05
        axes.scatter(grid[seen, 0], loc[seen, k], s=12 * weights[seen, k], label=f"component {k + 1}")
    axes.plot(grid, mixture.mean, color="black", linewidth=1, label="mean: what squared error learns")
    axes.set(xlabel="x", ylabel="y", ylim=(-0.1, 1.1))
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    main()
