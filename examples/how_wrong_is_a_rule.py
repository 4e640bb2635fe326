"""A KL divergence written down as the textbook has it, one that computes the log-ratio first, and the difference.

``stablekl.precision.measure`` searches for the input at which a rule is most wrong, with mpmath as the judge. The
textbook's is right to a few units in the last place where p and q are far apart, and noise where they are close, some
of it negative. The picture shows the errors of both over the distance between p and q.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from stablekl import precision, special
from stablekl.precision import mp


def textbook(mu_p: Tensor, sigma_p: Tensor, mu_q: Tensor, sigma_q: Tensor) -> Tensor:
    """KL between two normals, as everybody writes it."""
    return torch.log(sigma_q / sigma_p) + (sigma_p**2 + (mu_p - mu_q) ** 2) / (2 * sigma_q**2) - 0.5


def differences(mu_p: Tensor, sigma_p: Tensor, mu_q: Tensor, sigma_q: Tensor) -> Tensor:
    """The same as a sum of terms that are never negative, from differences of the parameters."""
    r, t = (sigma_p - sigma_q) / sigma_q, (mu_p - mu_q) / sigma_q
    return 0.5 * r * r + 0.5 * t * t + special.log_ratio_bregman(sigma_p, sigma_q)


def truth(mu_p: Any, sigma_p: Any, mu_q: Any, sigma_q: Any) -> Any:
    """The textbook's formula again: with enough digits, that of any formula is right."""
    return mp.log(sigma_q / sigma_p) + (sigma_p**2 + (mu_p - mu_q) ** 2) / (2 * sigma_q**2) - mp.mpf(1) / 2


def main() -> None:
    """Measure both, print a table, draw the errors."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    print(f"{'rule':12} {'largest error':>14} {'sets':>9} {'negative':>9}   at")
    for rule in (textbook, differences):
        batches = precision.pairs(torch.float32, loc="real", scale="positive")
        row = precision.measure(rule, truth, batches, name=rule.__name__, examples=60, seconds=10)
        at = ", ".join(f"{name} = {float.fromhex(x):.9g}" for name, x in row.worst_input.items())
        print(f"{row.rule:12} {row.worst_ulp:10.3g} ulp {row.evaluations:9,} {row.negative:9,}   {at}")
        points = [(d, max(e, 1e-4)) for d, _, e in row.samples if 1e-20 < d < 1e20 and e < 1e30]
        axes.plot(*zip(*points, strict=True), ".", markersize=2, label=rule.__name__)
    axes.axhline(1, color="black", linewidth=0.6)
    axes.set(xscale="log", yscale="log", xlabel="sqrt(2 KL), the distance of p from q", ylabel="error in float32 ulps")
    axes.legend(markerscale=5)
    figure.savefig("how_wrong_is_a_rule.png", dpi=150)
    print("how_wrong_is_a_rule.png drawn")


if __name__ == "__main__":
    main()
