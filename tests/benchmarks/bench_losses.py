"""Losses against the lines that are usually written for them: `python -m tests.benchmarks.bench_losses`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Normal

from stablekl.losses import gaussian_kl_loss, mixture_nll_loss
from tests.benchmarks.timing import HEADER, row


def usual_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(-1)


def usual_nll(target: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    log_prob = Normal(loc, log_scale.exp(), validate_args=False).log_prob(target.unsqueeze(-1))
    return -torch.logsumexp(torch.log_softmax(logits, -1) + log_prob, -1)


def step(loss: Callable[..., Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    def run() -> None:
        loss(*leaves).mean().backward()
        for x in leaves:
            x.grad = None

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, forward and backward")
    print(HEADER)
    for dtype in (torch.float32, torch.float64):
        for shape in ((64, 16), (512, 64), (4096, 128)):
            leaves = [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(2)]
            name = f"gaussian_kl_loss {list(shape)}, {str(dtype).removeprefix('torch.')}"
            print(row(name, step(usual_kl, leaves), step(gaussian_kl_loss, leaves), None, device), flush=True)
    for n, k in ((256, 8), (4096, 8), (4096, 32)):
        target = torch.randn(n, device=device)
        leaves = [torch.randn(n, k, device=device, requires_grad=True) for _ in range(3)]
        theirs = step(lambda *x, y=target: usual_nll(y, *x), leaves)
        ours = step(lambda a, b, c, y=target: mixture_nll_loss(y, a, b, log_scale=c), leaves)
        print(row(f"mixture_nll_loss [{n}, {k}], float32", theirs, ours, None, device), flush=True)


if __name__ == "__main__":
    main()
