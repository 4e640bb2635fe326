"""KL of Normal and MultivariateNormal against torch's own rules: `python -m tests.benchmarks.bench_gaussian`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, distributions
from torch.distributions import kl_divergence

import stablekl
from tests.benchmarks.timing import HEADER, row


def factors(batch: int, d: int, device: str) -> Tensor:
    noise = torch.randn(batch, d, d, device=device) * 0.2 / d**0.5
    return (torch.eye(d, device=device) + noise).tril()


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in tensors]


def forward(make: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            make(*inputs)

    return run


def backward(make: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    def run() -> None:
        make(*inputs).sum().backward()
        for t in inputs:
            t.grad = None

    return run


def compare(name: str, make: Callable[..., Callable[..., Tensor]], theirs, ours, inputs, bars, device) -> None:
    for kind, timed, bar in (("forward", forward, bars[0]), ("forward + backward", backward, bars[1])):
        print(row(f"{name}, {kind}", timed(make(theirs), inputs), timed(make(ours), inputs), bar, device), flush=True)


def normal(family):
    return lambda a, b, c, d: kl_divergence(family(a, b, validate_args=False), family(c, d, validate_args=False))


def multivariate(parameter):
    def make(family):
        def f(mu_p, a_p, mu_q, a_q):
            p = family(mu_p, validate_args=False, **{parameter: a_p})
            return kl_divergence(p, family(mu_q, validate_args=False, **{parameter: a_q}))

        return f

    return make


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, float32")
    print(HEADER)
    n = 4_000_000
    positive = [torch.rand(n, device=device) + 0.5 for _ in range(4)]
    for kind, tensors, bar in (("", positive, 0.6), (", float64", [x.double() for x in positive], None)):
        name, families = f"Normal, 4,000,000{kind}", (distributions.Normal, stablekl.Normal)
        compare(name, normal, *families, leaves(*tensors), (None, bar), device)
    for batch, d in ((100_000, 4), (2_000, 32), (4, 512)):
        tril_p, tril_q = factors(batch, d, device), factors(batch, d, device)
        mu_p, mu_q = torch.randn(batch, d, device=device), torch.randn(batch, d, device=device)
        for parameter, a_p, a_q, bars in (
            ("scale_tril", tril_p, tril_q, (1.1, 0.8)),
            ("covariance_matrix", tril_p @ tril_p.mT, tril_q @ tril_q.mT, (None, None)),
        ):
            compare(
                f"MVN {batch:,} x D {d}, {parameter}",
                multivariate(parameter),
                distributions.MultivariateNormal,
                stablekl.MultivariateNormal,
                leaves(mu_p, a_p, mu_q, a_q),
                bars,
                device,
            )


if __name__ == "__main__":
    main()
