"""Log-density of Gaussian mixtures against torch's: `python -m tests.benchmarks.bench_mixture_log_prob`."""

from __future__ import annotations

import argparse
import gc
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stablekl.mixtures.components import Components
from stablekl.mixtures.density import mixture_log_prob
from tests.benchmarks.timing import HEADER, row


class Problem(NamedTuple):
    """Sizes and bars: forward, forward + backward."""

    name: str
    n: int
    k: int
    d: int
    full: bool = False
    dtype: torch.dtype = torch.float32
    batch: tuple[int, ...] = ()
    bars: tuple[float | None, float | None] = (None, None)


PROBLEMS = (
    Problem("diagonal, N 100,000 K 16 D 8", 100_000, 16, 8, bars=(0.2, 0.3)),
    Problem("diagonal, N 20,000 K 64 D 64", 20_000, 64, 64, bars=(0.12, 0.15)),
    Problem("full, N 10,000 K 16 D 32", 10_000, 16, 32, True, bars=(0.5, 0.6)),
    Problem("diagonal f64, N 100,000 K 16 D 8", 100_000, 16, 8, dtype=torch.float64),
    Problem("full f64, N 10,000 K 16 D 32", 10_000, 16, 32, True, torch.float64),
    Problem("diagonal f64, batch 1,000 N 64 K 2 D 8", 64, 2, 8, False, torch.float64, (1000,)),
    Problem("full f64, batch 1,000 N 64 K 2 D 8", 64, 2, 8, True, torch.float64, (1000,)),
    Problem("diagonal f64, batch 5,000 N 1 K 3 D 4", 1, 3, 4, False, torch.float64, (5000,)),
)


def inputs(p: Problem, device: str) -> list[Tensor]:
    """Points, log-weights, means and scales that require gradients."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    scale = draw(*p.batch, p.k, p.d).abs() + 0.5
    if p.full:
        scale = draw(*p.batch, p.k, p.d, p.d).tril(-1) * 0.3 / p.d**0.5 + torch.diag_embed(scale)
    tensors = draw(p.n, *p.batch, p.d), draw(*p.batch, p.k).log_softmax(-1), draw(*p.batch, p.k, p.d), scale
    return [t.to(device, p.dtype).requires_grad_() for t in tensors]


def theirs(value: Tensor, log_weights: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """torch's MixtureSameFamily."""
    if scale.ndim == loc.ndim:
        components = Independent(Normal(loc, scale, validate_args=False), 1, validate_args=False)
    else:
        components = MultivariateNormal(loc, scale_tril=scale, validate_args=False)
    weights = Categorical(logits=log_weights, validate_args=False)
    return MixtureSameFamily(weights, components, validate_args=False).log_prob(value)


def ours(value: Tensor, log_weights: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """stablekl's."""
    return mixture_log_prob(value, Components(log_weights, loc, scale))


def forward(f: Callable[..., Tensor], tensors: list[Tensor]) -> Callable[[], object]:
    """The value alone."""

    def run() -> None:
        with torch.no_grad():
            f(*tensors)

    return run


def backward(f: Callable[..., Tensor], tensors: list[Tensor], first: int) -> Callable[[], object]:
    """The value and its gradient with respect to ``tensors[first:]``."""
    fixed = [t.detach() for t in tensors[:first]] + tensors[first:]
    return lambda: torch.autograd.grad(f(*fixed).sum(), fixed[first:])


class Memory(TorchDispatchMode):
    """Counts the bytes of storage that live at one time, and the elements of the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._seen: set[int] = set()

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size

    def _note(self, t: Tensor, counts: bool) -> None:
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if counts else 0
        if key not in self._seen:
            self._seen.add(key)
            self.largest = max(self.largest, size // t.element_size())
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._release, key, size)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for t in tree_leaves((args, kwargs)):
            if isinstance(t, Tensor):
                self._note(t, False)  # what is not known yet was there before
        out = func(*args, **kwargs)
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._note(t, True)
        return out


def memory(f: Callable[[], object]) -> Memory:
    """What one call allocates beyond its inputs."""
    gc.collect()
    with Memory() as counted:
        f()
    return counted


def main(device: str) -> None:
    """Print the tables."""
    print(HEADER)
    for p in PROBLEMS:
        tensors = inputs(p, device)
        print(
            row(f"{p.name}, forward", forward(theirs, tensors), forward(ours, tensors), p.bars[0], device), flush=True
        )
        for kind, first in (("parameters", 1), ("and points", 0)):
            pair = (backward(f, tensors, first) for f in (theirs, ours))
            print(row(f"{p.name}, backward {kind}", *pair, p.bars[1], device), flush=True)
    print(f"\n{'extra memory with backward, elements / (N K D)':52}{'torch':>10}{'stablekl':>13}{'bar':>7}")
    for p in PROBLEMS[:3]:
        tensors = inputs(p, device)
        unit = p.n * p.k * p.d * p.dtype.itemsize
        a, b = (memory(backward(f, tensors, 0)).peak / unit for f in (theirs, ours))
        print(f"{p.name:52}{a:10.2f}{b:13.2f}{0.6:7.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    main(arguments.device)
