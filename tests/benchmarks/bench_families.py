"""KL rules of the families, ours against torch's, in one run: medians of interleaved calls.

``python -m tests.benchmarks.bench_families [--size 100000] [--dtype float32]``
"""

from __future__ import annotations

import argparse

import torch

from stablekl.precision.batches import Plan
from stablekl.precision.subjects import catalogue
from tests.benchmarks.timing import HEADER, row

__all__ = ["main"]


def main() -> None:
    """Print milliseconds of either, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=100_000)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--pairs", default="")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    print(HEADER)
    for name, subject in catalogue().items():
        if len(subject.rules) < 2 or " " in name or options.pairs not in name or "Mixture" in name:
            continue
        first, _, second = name.partition("-")
        plan = Plan("ratio" if first == second else "apart", 0, 0.0, 0.02, 1.0, 3)
        batch = subject.expand(plan, dtype)
        repeats = -(-options.size // len(batch[0]))
        batch = tuple(x.repeat(repeats, *(1,) * (x.ndim - 1))[: options.size] for x in batch)
        theirs, ours = ((lambda rule=subject.rules[k]: rule(*batch)) for k in ("torch", "stablekl"))  # noqa: B023
        try:
            print(row(f"{name}, {options.size}, {options.dtype}", theirs, ours, None))
        except Exception as error:  # a rule of torch's that fails
            print(f"{name:52} {type(error).__name__}: {str(error)[:60]}")


if __name__ == "__main__":
    main()
