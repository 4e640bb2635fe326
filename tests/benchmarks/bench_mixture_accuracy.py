"""Errors of mixture divergences, true and reported: `python -m tests.benchmarks.bench_mixture_accuracy`.

Random problems with known truths (`tests.mixture_problems`) in cells of numbers of components and dimensions, at the
default settings. In the table: the engines that took part; the largest and the median error and the largest reported
one, relative to 1 + S, S the mean divergence of p's components; the shares of problems whose error is covered by the
reported one, and whose certified interval holds the truth; and the median time of one.
"""

from __future__ import annotations

import argparse
import collections
import csv
import statistics
import sys
import time
from typing import NamedTuple

import torch

import stablekl
from tests.mixture_problems import Problem, draw, families, realised

DIMENSIONS = (1, 2, 3, 8, 32)
TO_ONE = [(k, 1, d) for k in (2, 3, 4, 5, 6, 16) for d in DIMENSIONS]
TO_TWO = [(k, 2, d) for k in (1, 2) for d in DIMENSIONS]
TO_MANY = [(p, q, d) for p, q in ((1, 3), (2, 3), (3, 5), (5, 3), (16, 5)) for d in (1, 2, 3, 8)]
DTYPES = {"float64": torch.float64, "float32": torch.float32}
COLUMNS = "worst error", "median", "reported", "bar", "covered", "bounds hold", "ms"


def bar(family: str, k_p: int, k_q: int, dim: int, dtype: torch.dtype) -> float:
    """The error allowed, relative to 1 + S."""
    if dim == 1 or k_p == 2 >= k_q or k_p == 1 < k_q == 2 or (family == "shared" and k_q == 1):
        exact = 1e-12
    elif k_p == 3 and k_q == 1:
        exact = 1e-8
    else:
        exact = 1e-6 if dim <= 3 else 1e-4
    return max(exact, 1e-6 if dtype == torch.float32 else 0.0)


class Outcome(NamedTuple):
    """One problem: errors relative to 1 + S."""

    engine: str
    error: float
    reported: float
    covered: bool
    bounded: bool
    seconds: float


def outcome(problem: Problem, dtype: torch.dtype, device: str = "cpu") -> Outcome:
    """What `stablekl.kl_estimate` makes of a problem; an error that is not finite counts as infinite."""
    p, q, slack = realised(problem, dtype, device)
    start = time.perf_counter()
    try:
        e = stablekl.kl_estimate(p, q)
        value, error, lower, upper = (float(x) for x in e[:4])
        engine = e.method
    except Exception as reason:
        print(f"\n{problem.family}: {reason!r}", file=sys.stderr)
        value = error = lower = upper = float("nan")
        engine = type(reason).__name__
    seconds = time.perf_counter() - start
    miss = abs(value - problem.truth)
    unit = 1 + problem.scale
    relative = miss / unit if miss == miss else float("inf")
    reported = error / unit if error == error else float("inf")
    bounded = lower - slack <= problem.truth <= upper + slack
    return Outcome(engine, relative, reported, miss <= error + slack, bounded, seconds)


def summary(results: list[Outcome]) -> tuple[str, float, float, float, float, float, float]:
    """A row of the table: engines, errors, shares, time."""
    count = len(results)
    engines = collections.Counter(x.engine for x in results)
    return (
        ", ".join(f"{name} {n}" for name, n in engines.most_common()),
        max(x.error for x in results),
        statistics.median(x.error for x in results),
        max(x.reported for x in results),
        sum(x.covered for x in results) / count,
        sum(x.bounded for x in results) / count,
        statistics.median(x.seconds for x in results),
    )


def main(options: argparse.Namespace) -> None:
    """Print the table, a row for each cell, family and precision, with what misses its bar marked."""
    rows = []
    print(f"{'cell':22}{'family':9}{'':9}" + "".join(f"{name:>12}" for name in COLUMNS) + "  engines")
    for k_p, k_q, dim in [*TO_ONE, *TO_TWO, *TO_MANY]:
        cell = f"K {k_p} || {k_q}, D {dim}"
        if options.cells not in cell:
            continue
        for family in families(k_p, k_q, dim):
            if options.families and family not in options.families.split(","):
                continue
            found: dict[str, list[Outcome]] = {name: [] for name in options.dtypes.split(",")}
            for i in range(options.problems):
                print(f"\r{cell}, {family} {i + 1}/{options.problems}   ", end="", file=sys.stderr, flush=True)
                problem = draw(family, k_p, k_q, dim, 1000 * options.seed + i)
                for name, results in found.items():
                    results.append(outcome(problem, DTYPES[name], options.device))
                    o, limit = results[-1], bar(family, k_p, k_q, dim, DTYPES[name])
                    if o.error > limit or not o.covered or not o.bounded or o.seconds > options.slow:
                        print(f"\r{cell}, {family}, seed {1000 * options.seed + i}, {name}: {o}", file=sys.stderr)
            print("\r" + " " * 60 + "\r", end="", file=sys.stderr, flush=True)
            for name, results in found.items():
                engines, worst, median, reported, covered, bounded, seconds = summary(results)
                limit = bar(family, k_p, k_q, dim, DTYPES[name])
                fine = worst <= limit and covered >= 0.95 and bounded == 1
                numbers = f"{worst:12.1e}{median:12.1e}{reported:12.1e}{limit:12.0e}{covered:12.2f}{bounded:12.2f}"
                print(f"{cell:22}{family:9}{name:9}{numbers}{1e3 * seconds:12.1f}  {engines}{'' if fine else '  <--'}")
                rows.append([cell, family, name, worst, median, reported, limit, covered, bounded, seconds, engines])
            sys.stdout.flush()
    if options.csv:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["cell", "family", "dtype", *COLUMNS, "engines"], *rows])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--problems", type=int, default=20, help="of each family in each cell")
    parser.add_argument("--cells", default="", help='only those with this in their name, such as "K 3 ||" or "D 8"')
    parser.add_argument("--families", default="", help="separated by commas; default all")
    parser.add_argument("--dtypes", default="float64,float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slow", type=float, default=5.0, help="seconds from which a problem is reported")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", default="", help="a file for the table")
    main(parser.parse_args())
