"""A variational autoencoder on scikit-learn's digits, its KL term in closed form and from a single sample.

log p(z) - log q(z) at one z has the closed form for its mean, so both train the same model. The sample adds noise to
the loss and to its gradient, measured here on one batch for 200 draws of z.
"""

from __future__ import annotations

import argparse

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from stablekl.losses import gaussian_kl_loss, gaussian_log_ratio_loss

LATENT, EPOCHS, BATCH = 6, 25, 64
TERMS = {"closed form": lambda z, mu, logvar: gaussian_kl_loss(mu, logvar), "single sample": gaussian_log_ratio_loss}


def coders() -> tuple[nn.Module, nn.Module]:
    """From 64 pixels to means and log-variances of 6 numbers, and back."""
    encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 2 * LATENT))
    return encoder, nn.Sequential(nn.Linear(LATENT, 128), nn.ReLU(), nn.Linear(128, 64))


def terms(encoder: nn.Module, decoder: nn.Module, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Nats to encode each picture given its z, and the KL term."""
    mu, logvar = encoder(x).chunk(2, -1)
    z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
    misfit = binary_cross_entropy_with_logits(decoder(z), x, reduction="none").sum(-1)
    return misfit, TERMS[name](z, mu, logvar)


def main() -> None:
    """Train twice, measure, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="vae.png", help="where the picture goes")
    out = parser.parse_args().out
    x = torch.from_numpy(load_digits().data).float() / 16
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    models = {}
    for name in TERMS:
        torch.manual_seed(0)
        encoder, decoder = models[name] = coders()
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=2e-3)
        losses = []
        for _ in range(EPOCHS):
            for batch in x[torch.randperm(len(x))].split(BATCH):
                optimizer.zero_grad()
                loss = torch.stack(terms(encoder, decoder, batch, name)).sum(0).mean()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        print(f"trained with the {name}: {torch.tensor(losses[-29:]).mean():.2f} nats")
        left.plot(torch.arange(len(losses)) / 29, losses, linewidth=0.7, label=f"trained with the {name}")
    encoder, decoder = models["closed form"]
    for name in TERMS:
        values, gradients = [], []
        for _ in range(200):
            value = terms(encoder, decoder, x[:BATCH], name)[1].mean()
            gradients.append(torch.autograd.grad(value, encoder[2].weight)[0])
            values.append(value.item())
        noise, values = torch.stack(gradients).double().var(0).sum(), torch.tensor(values)
        print(f"{name:>13}: {values.mean():.3f} +- {values.std():.2g} nats, variance of the gradient {noise:.2g}")
        right.plot(values, ".", markersize=3, label=name)
    left.set(xlabel="epoch", ylabel="negative ELBO, nats", ylim=(None, 40))
    right.set(xlabel="draw of z", ylabel="KL term of one batch of 64, nats")
    left.legend(frameon=False)
    right.legend(frameon=False)
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    main()
