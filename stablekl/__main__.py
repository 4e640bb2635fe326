"""``python -m stablekl``: the main job on real data, and what torch makes of a few easy cases.

Fits a mixture to Fisher's iris, prints its KL divergence to the Gaussian with the same moments, and back, each beside
plain Monte Carlo; then five lines "torch / stablekl / truth". ``--plot FILE`` draws data, mixture and Gaussian.
"""

from __future__ import annotations

import argparse
import importlib
import math
import time
from decimal import Decimal, localcontext

import torch
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    kl_divergence,
)
from torch.distributions import LowRankMultivariateNormal as TorchLowRank
from torch.distributions import MixtureSameFamily as TorchMixture
from torch.distributions import MultivariateNormal as TorchMVN
from torch.distributions import Normal as TorchNormal

from .data import load_iris
from .distributions import LowRankMultivariateNormal, MultivariateNormal, Normal
from .estimators import kl_monte_carlo
from .fit import gaussian_mixture
from .mixtures import KLEstimate, MixtureSameFamily, kl_estimate

_SAMPLES = 100_000


def _row(name: str, p: Distribution, q: Distribution) -> str:
    kl_estimate(p, q)  # what is computed once and kept (quadrature points) is not part of the time
    start = time.perf_counter()
    estimate = kl_estimate(p, q)
    seconds = time.perf_counter() - start
    sampled = kl_monte_carlo(p, q, _SAMPLES, stratified=False)
    half_width = 1.96 * float(sampled.standard_error)
    needed = _SAMPLES * (half_width / float(estimate.error)) ** 2
    return (
        f"{name:28}{_with_error(estimate)}  {estimate.method:9}{1e3 * seconds:7.1f} ms"
        f"   {float(sampled.value):9.6f} ± {half_width:.1e}   {needed:.0e}"
    )


def _with_error(estimate: KLEstimate) -> str:
    digits = min(max(2 - math.floor(math.log10(float(estimate.error))), 0), 13)
    return f"{float(estimate.value):18.{digits}f} ± {float(estimate.error):.1e}"


def show_real_data(plot: str | None) -> None:
    """Print the divergences between mixtures fitted to iris and the Gaussian with their moments."""
    x, names = load_iris()
    torch.manual_seed(0)
    print(f"Fisher's iris: {len(x)} flowers, {x.shape[1]} measurements each; KL in nats, ± is a 95% half-width\n")
    print(
        f"{'':28}{'stablekl':>28}  {'method':9}{'time':>10}   {f'Monte Carlo, {_SAMPLES:,} samples':21}"
        "   samples for stablekl's error"
    )
    for k in (2, 3):
        mixture = gaussian_mixture(x, k, tol=1e-8, max_iter=1000).mixture
        gaussian = mixture.to_mvn()
        print(_row(f"KL(mixture of {k} || Gaussian)", mixture, gaussian))
        print(_row(f"KL(Gaussian || mixture of {k})", gaussian, mixture))
    if plot:
        # matplotlib is optional, so its module is loaded only here
        title = f"iris: KL(mixture || Gaussian) = {float(kl_divergence(mixture, gaussian)):.4f} nats"
        importlib.import_module("stablekl._plot").draw(x, names, mixture, gaussian, title, plot)
        print(f"\nwrote {plot}")


def _decimal(x: Tensor) -> Decimal:
    return Decimal(float(x))  # exact: every float is a decimal


def _normal_truth(mu_p: Tensor, sigma_p: Tensor, mu_q: Tensor, sigma_q: Tensor) -> Decimal:
    """The textbook formula in 60 digits, where it is harmless."""
    m_p, s_p, m_q, s_q = map(_decimal, (mu_p, sigma_p, mu_q, sigma_q))
    return (s_q / s_p).ln() + (s_p**2 + (m_p - m_q) ** 2) / (2 * s_q**2) - Decimal(1) / 2


def _planar_truth(cov_p: Tensor, cov_q: Tensor) -> Decimal:
    """KL between centred Gaussians of the plane, textbook formula in 60 digits."""
    (a, b), (_, c) = ([_decimal(x) for x in row] for row in cov_p)
    (d, e), (_, f) = ([_decimal(x) for x in row] for row in cov_q)
    det_p, det_q = a * c - b * b, d * f - e * e
    return ((a * f - 2 * b * e + c * d) / det_q - 2 + (det_q / det_p).ln()) / 2


def show_defects() -> None:
    """Print five cases torch gets wrong; truth in 60-digit decimal arithmetic from the very same floats."""
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    tiny, near = torch.tensor(1e-25), torch.tensor(1e-4)
    cov_q = torch.tensor([[1.0, 0.999], [0.999, 1.0]])
    cov_p = cov_q + torch.tensor([[0.0, 1e-6], [1e-6, 0.0]])
    origin, loading, diagonal = torch.zeros(2), torch.ones(3, 1), torch.full((3,), 1e-8)
    switched_off = Categorical(probs=torch.tensor([1.0, 0.0]))
    bumps, far = torch.tensor([0.0, 10.0]), torch.tensor(10.0)

    def lowrank(family: type[TorchLowRank]) -> Tensor:
        p = family(torch.zeros(3), loading, diagonal)
        return kl_divergence(p, p)

    with localcontext() as context:
        context.prec = 60
        pi = Decimal("3.14159265358979323846264338327950288419716939937510582097494")
        rows: list[tuple[str, Tensor, Tensor, Decimal]] = [
            (
                "KL N(0, 1e-25) to N(0, 1)",
                kl_divergence(TorchNormal(zero, tiny), TorchNormal(zero, one)),
                kl_divergence(Normal(zero, tiny), Normal(zero, one)),
                _normal_truth(zero, tiny, zero, one),
            ),
            (
                "KL N(0, 1) to N(1e-4, 1)",
                kl_divergence(TorchNormal(zero, one), TorchNormal(near, one)),
                kl_divergence(Normal(zero, one), Normal(near, one)),
                _normal_truth(zero, one, near, one),
            ),
            (
                "KL of planes, correlation 0.999001 to 0.999",
                kl_divergence(TorchMVN(origin, cov_p), TorchMVN(origin, cov_q)),
                kl_divergence(MultivariateNormal(origin, cov_p), MultivariateNormal(origin, cov_q)),
                _planar_truth(cov_p, cov_q),
            ),
            (
                "KL of low rank 1 1' + 1e-8 I to itself",
                lowrank(TorchLowRank),
                lowrank(LowRankMultivariateNormal),
                Decimal(0),
            ),
            (
                "log-density at 10 of 1 N(0, 1) + 0 N(10, 1)",
                TorchMixture(switched_off, TorchNormal(bumps, torch.ones(2))).log_prob(far),
                MixtureSameFamily(switched_off, Normal(bumps, torch.ones(2))).log_prob(far),
                -50 - (2 * pi).ln() / 2,
            ),
        ]
    print(f"\n{'float32':46}{'torch':>14}{'stablekl':>14}{'truth':>14}")
    for name, theirs, ours, truth in rows:
        print(f"{name:46}{float(theirs):14.6g}{float(ours):14.6g}{float(truth):14.6g}")


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(prog="python -m stablekl", description=__doc__.splitlines()[0])
    parser.add_argument("--plot", metavar="FILE", help="draw data, mixture and Gaussian (needs stablekl[plot])")
    arguments = parser.parse_args()
    show_real_data(arguments.plot)
    show_defects()


if __name__ == "__main__":
    main()
