"""A variational autoencoder on scikit-learn's digits, its KL term in closed form and from a single sample.

log p(z) - log q(z) at one z has the closed form for its mean, so both train the same model. The sample adds noise to the
loss and to its gradient, the more the further the posterior is from the prior; measured here on the same batches.
"""

from __future__ import annotations

import argparse

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from stablekl.losses import gaussian_kl_loss, gaussian_log_ratio_loss

LATENT, EPOCHS, BATCH = 6, 30, 64
TERMS = {
    "closed form": lambda z, mu, logvar: gaussian_kl_loss(mu, logvar),
    "single sample": lambda z, mu, logvar: gaussian_log_ratio_loss(z, mu, logvar),
}


class VAE(nn.Module):
    """64 pixels to 6 numbers and back."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 2 * LATENT))
        self.decoder = nn.Sequential(nn.Linear(LATENT, 128), nn.ReLU(), nn.Linear(128, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Nats to encode each picture given z, and z, mu, logvar."""
        mu, logvar = self.encoder(x).chunk(2, -1)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        return binary_cross_entropy_with_logits(self.decoder(z), x, reduction="none").sum(-1), z, mu, logvar


def trained(x: Tensor, term: str) -> tuple[VAE, list[float]]:
    """The model and the loss of every epoch, in nats for a picture."""
    torch.manual_seed(0)
    model, history = VAE(), []
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(EPOCHS):
        total = 0.0
        for batch in x[torch.randperm(len(x))].split(BATCH):
            optimizer.zero_grad()
            misfit, z, mu, logvar = model(batch)
            loss = (misfit + TERMS[term](z, mu, logvar)).mean()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        history.append(total / len(x))
    return model, history


def spread(model: VAE, x: Tensor, term: str, repeats: int = 200) -> tuple[Tensor, float]:
    """The KL term of one batch for repeated draws of z, and the variance of its gradient by the encoder."""
    values, gradients = [], []
    for _ in range(repeats):
        _, z, mu, logvar = model(x[:BATCH])
        value = TERMS[term](z, mu, logvar).mean()
        gradient = torch.autograd.grad(value, list(model.encoder.parameters()))
        values.append(value.detach())
        gradients.append(torch.cat([g.flatten() for g in gradient]))
    return torch.stack(values), float(torch.stack(gradients).double().var(0).sum())


def main() -> None:
    """Train twice, measure, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="vae.png", help="where the picture goes")
    out = parser.parse_args().out
    x = torch.from_numpy(load_digits().data).float() / 16
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for term in TERMS:
        model, history = trained(x, term)
        values, noise = spread(model, x, term)
        left.plot(history, label=f"trained with the {term}")
        right.hist(values, bins=30 if values.std() > 1e-4 else [values[0] - 0.02, values[0] + 0.02], label=term)
        print(f"{term:>13}: loss {history[-1]:.2f}, KL {values.mean():.2f} +- {values.std():.3f} over draws of z, ")
        print(f"{'':>13}  variance of its gradient {noise:.2g}")
    left.set(xlabel="epoch", ylabel="negative ELBO, nats", ylim=(None, 40))
    right.set(xlabel="KL term of one batch of 64", ylabel="of 200 draws of z", yscale="log")
    left.legend(frameon=False)
    right.legend(frameon=False)
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    main()
