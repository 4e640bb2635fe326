"""One Gaussian for two bumps: the best in KL(mixture || Gaussian) and the best in KL(Gaussian || mixture).

The first covers both bumps: it has the mixture's mean, 2.5, and its standard deviation, sqrt(57.25) = 7.566.
The second settles on the bump nearest to where it starts. Both start at N(0, 1), are fitted by gradient
descent through ``kl_divergence`` itself, and need no sample, no grid and no learning rate.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

import stablekl


def gaussian(parameters: Tensor) -> stablekl.MultivariateNormal:
    """The Gaussian on the line with mean ``parameters[0]`` and log standard deviation ``parameters[1]``."""
    return stablekl.MultivariateNormal(parameters[:1], scale_diag=parameters[1:].exp())


def fit(divergence: Callable[[Distribution], Tensor]) -> stablekl.MultivariateNormal:
    """The Gaussian of the least divergence, from N(0, 1)."""
    parameters = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = divergence(gaussian(parameters))
        loss.backward()
        return loss

    optimizer.step(closure)
    return gaussian(parameters.detach())


def main() -> None:
    """Fit both, print them, draw them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="mixture_vs_gaussian.png", help="where the picture goes")
    out = parser.parse_args().out

    mixture = stablekl.GaussianMixture(
        probs=torch.tensor([0.5, 0.5], dtype=torch.float64),
        loc=torch.tensor([[-5.0], [10.0]], dtype=torch.float64),
        scale_diag=torch.ones(2, 1, dtype=torch.float64),
    )
    fits = {
        "covers: KL(mixture || Gaussian)": fit(lambda q: kl_divergence(mixture, q)),
        "seeks: KL(Gaussian || mixture)": fit(lambda q: kl_divergence(q, mixture)),
    }

    x = torch.linspace(-25, 30, 1001, dtype=torch.float64)
    figure, axes = plt.subplots(figsize=(8, 4))
    axes.fill_between(x, mixture.log_prob(x[:, None]).exp(), color="0.85", label="mixture")
    print(f"{'minimises':34}{'mean':>9}{'sd':>9}{'KL(m||q)':>12}{'KL(q||m)':>12}")
    for name, q in fits.items():
        mean, sd = q.mean.item(), q.variance.sqrt().item()
        forward, reverse = kl_divergence(mixture, q).item(), kl_divergence(q, mixture).item()
        print(f"{name:34}{mean:9.4f}{sd:9.4f}{forward:12.5f}{reverse:12.5f}")
        axes.plot(x, q.log_prob(x[:, None]).exp(), label=f"{name}\nN({mean:.2f}, {sd:.2f}²)")
    axes.legend(frameon=False)
    axes.set(xlabel="x", ylabel="density", ylim=(0, None))
    figure.tight_layout()
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    main()
