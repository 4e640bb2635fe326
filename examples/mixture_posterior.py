"""A posterior with two modes, approximated by one Gaussian and by mixtures, with their KL to the prior in the ELBO.

A beacon is somewhere in the plane; two receivers have measured their distance to it, which leaves two places where it
can be. The divergence of the mixture from the prior, a MultivariateNormal, is `kl_divergence`: to rounding for two
components, not sampled, so that only the likelihood's mean is noise.
"""

from __future__ import annotations

import argparse

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import stablekl
from stablekl.fit import GaussianMixtureModel
from stablekl.losses import elbo_loss

RECEIVERS = torch.tensor([[-1.0, 0.0], [1.0, 0.3]])
DISTANCES = torch.tensor([1.5, 1.6])
NOISE = 0.15
PRIOR = stablekl.MultivariateNormal(torch.zeros(2), scale_diag=torch.full((2,), 2.0))


def log_likelihood(z: Tensor) -> Tensor:
    """Log-density of the measured distances, for a beacon at z."""
    distance = torch.linalg.vector_norm(z.unsqueeze(-2) - RECEIVERS, dim=-1)
    return torch.distributions.Normal(distance, NOISE).log_prob(DISTANCES).sum(-1)


def fitted(components: int, steps: int = 1000) -> tuple[stablekl.GaussianMixture, list[float]]:
    """The variational posterior and the ELBO at every step of Adam."""
    torch.manual_seed(0)
    start = stablekl.GaussianMixture(
        logits=torch.zeros(components), loc=PRIOR.sample((components,)), scale_diag=torch.full((components, 2), 0.5)
    )
    model = GaussianMixtureModel(start)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    history = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = elbo_loss(model(), log_likelihood, PRIOR, num_samples=32)
        loss.backward()
        optimizer.step()
        history.append(-loss.item())
    return model(), history


def main() -> None:
    """Compare the ELBOs with the evidence, which a grid can give in the plane; draw both posteriors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="mixture_posterior.png", help="where the picture goes")
    out = parser.parse_args().out
    axis = torch.linspace(-4, 4, 401)
    grid = torch.cartesian_prod(axis, axis)
    log_joint = log_likelihood(grid) + PRIOR.log_prob(grid)
    evidence = float(torch.logsumexp(log_joint, 0) + 2 * torch.log(axis[1] - axis[0]))
    print(f"log evidence, by a grid: {evidence:.3f}")

    figure, axes = plt.subplots(1, 3, figsize=(10, 3.5), layout="constrained")
    for panel, components in zip(axes, (1, 2), strict=False):
        q, history = fitted(components)
        average = torch.tensor(history[-100:]).mean()
        print(f"{components} component(s): ELBO {average:.3f}, so KL(q || posterior) = {evidence - average:.3f}")
        with torch.no_grad():
            for values, style in ((log_joint, "Greys"), (q.log_prob(grid), "viridis")):
                density = (values - values.max()).exp().reshape(401, 401).T
                panel.contour(axis, axis, density, levels=[0.05, 0.3, 0.7], cmap=style)
        panel.set(title=f"{components} component(s)", xlim=(-2, 2), ylim=(-2.5, 2.5))
        panel.plot(*RECEIVERS.T, "k^")
        axes[2].plot(history, linewidth=0.7, label=f"{components} component(s)")
    axes[2].axhline(evidence, color="black", linewidth=1, label="log evidence")
    axes[2].set(xlabel="step", ylabel="ELBO, nats", ylim=(evidence - 2, evidence + 1.2))
    axes[2].legend(frameon=False, loc="upper center")
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    main()
