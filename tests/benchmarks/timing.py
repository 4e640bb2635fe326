"""Two functions in turn, the ratio of their medians; printed, never asserted: the machines are shared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

HEADER = f"{'case':52}{'torch ms':>10}{'stablekl ms':>13}{'ratio':>8}{'bar':>7}"


def seconds(f: Callable[[], object], device: str) -> float:
    """Wall time of one call, the device's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(f: Callable[[], object], g: Callable[[], object], device: str, rounds: int = 15) -> tuple[float, float]:
    """Median seconds of both, after two warm-up calls, measured in turn."""
    for _ in range(2):
        f(), g()
    times = [(seconds(f, device), seconds(g, device)) for _ in range(rounds)]
    return statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)


def row(
    name: str, theirs: Callable[[], object], ours: Callable[[], object], bar: float | None, device: str = "cpu"
) -> str:
    """One line of the table."""
    a, b = medians(theirs, ours, device)
    limit = f"{bar:7.2f}" if bar is not None else f"{'':7}"
    return f"{name:52}{1e3 * a:10.2f}{1e3 * b:13.2f}{b / a:8.2f}{limit}"
