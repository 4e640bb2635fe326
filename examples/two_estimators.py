"""Two estimates of KL(P || Q) from samples of P, one right and one wrong, around the closed form.

P = N(0, 1), Q = N(m, 1), m from -5 to 5. Samples of P are already distributed as P: their log-ratios are averaged as
they are. Weighting each by p(x) once more, as the integral seems to say, is the mean of something else.
"""

from __future__ import annotations

import argparse

import matplotlib.pyplot as plt
import torch

import stablekl
from stablekl.estimators import kl_monte_carlo


def main() -> None:
    """Print both, draw both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="two_estimators.png", help="where the picture goes")
    out = parser.parse_args().out
    torch.manual_seed(0)

    mean = torch.linspace(-5, 5, 41)
    p, q = stablekl.Normal(torch.zeros(41), 1.0), stablekl.Normal(mean, 1.0)
    exact = stablekl.kl_divergence(p, q)
    right = kl_monte_carlo(p, q, 300)
    x = p.sample((300,))
    weighted = p.log_prob(x).exp() * (p.log_prob(x) - q.log_prob(x))  # wrong: p is in the samples already
    wrong, wrong_error = weighted.mean(0), weighted.std(0) / 300**0.5

    print(f"{'mean of Q':>9}{'closed form':>13}{'right':>9}{'+-':>8}{'wrong':>9}{'+-':>8}")
    for i in range(0, 41, 8):
        row = (mean[i], exact[i], right.value[i], right.standard_error[i], wrong[i], wrong_error[i])
        print("{:9.1f}{:13.4f}{:9.4f}{:8.4f}{:9.4f}{:8.4f}".format(*(float(v) for v in row)))
    off = ((right.value - exact) / right.standard_error).abs()
    print(f"right: within two standard errors at {int((off < 2).sum())} of {len(off)} means")

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(mean, exact, color="black", label="closed form")
    axes.errorbar(mean, right.value, 2 * right.standard_error, fmt="o", markersize=3, label="mean of log p - log q")
    axes.errorbar(mean, wrong, 2 * wrong_error, fmt="s", markersize=3, label="mean of p (log p - log q): wrong")
    axes.set(xlabel="mean of Q", ylabel="KL(P || Q), two standard errors")
    axes.legend(frameon=False)
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    main()
