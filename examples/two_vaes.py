"""Two encoders, means and log-variances only: their KL divergence without a matrix, and a variance that is exactly 0.

A batch of diagonal Gaussians against another, or against one full covariance. Then what a ReLU as the last layer does:
a variance of 0, an error that names it, and the layer that cannot do so.
"""

from __future__ import annotations

import argparse

import matplotlib.pyplot as plt
import torch
from torch import nn

import stablekl
from stablekl.losses import gaussian_kl_loss


def main() -> None:
    """Print the divergences and the error; draw the usual formula's rounding near p = q."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="two_vaes.png", help="where the picture goes")
    out = parser.parse_args().out
    torch.manual_seed(0)

    batch, n = 5, 3
    mu, logvar, mu_q, logvar_q = torch.randn(4, batch, n)
    rows = gaussian_kl_loss(mu, logvar, mu_q, logvar_q)
    print(f"diagonal against diagonal, a row each: {[round(x, 4) for x in rows.tolist()]}")
    p = stablekl.MultivariateNormal(mu, covariance_matrix=torch.diag_embed(logvar.exp()))
    q = stablekl.MultivariateNormal(mu_q, covariance_matrix=torch.diag_embed(logvar_q.exp()))
    print(f"  the same as matrices, at most {(stablekl.kl_divergence(p, q) - rows).abs().max():.0e} apart")
    factor = torch.randn(n, n).tril(-1) + torch.eye(n)
    full = gaussian_kl_loss(mu, logvar, mu_q, scale_tril_q=factor)
    print(f"diagonal against full:                 {[round(x, 4) for x in full.tolist()]}")

    features = torch.randn(batch, 8)
    variance = nn.Sequential(nn.Linear(8, n), nn.BatchNorm1d(n), nn.ReLU())(features)
    try:
        stablekl.MultivariateNormal(mu, scale_diag=variance.sqrt())
    except ValueError as error:
        print(f"a ReLU's variances: ValueError: {error}")
    scale = stablekl.softplus_scale(nn.Linear(8, n)(features))
    p = stablekl.MultivariateNormal(mu, scale_diag=scale)
    print(f"softplus_scale: smallest {scale.min():.3f}, KL {stablekl.kl_divergence(p, q).mean():.3f} in the mean")

    x = torch.logspace(-6, 0, 400)
    zero = torch.zeros(1)
    exact = torch.stack([gaussian_kl_loss(zero, v.double().reshape(1)) for v in x])
    usual = -0.5 * (1 + x - x.exp())
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for values, label in (
        (usual, "-0.5 (1 + logvar - exp(logvar))"),
        (gaussian_kl_loss(zero, x[:, None]), "gaussian_kl_loss"),
    ):
        axes.loglog(x, ((values.double() - exact) / exact).abs().clamp(min=1e-9), ".", markersize=3, label=label)
    axes.set(xlabel="log-variance (mean 0, against the standard normal)", ylabel="relative error, float32")
    axes.legend(frameon=False)
    figure.savefig(out, dpi=120)
    print(f"picture: {out}")


if __name__ == "__main__":
    main()
