"""Searches and sweeps for the report, several at a time in processes of their own."""

from __future__ import annotations

import fnmatch
import math
import multiprocessing
import os
import signal
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager

import torch

from .exhaustive import EDGES, Sweep, sweep
from .ratchet import stored_cases
from .rows import DTYPES, Row, Task, rows_of
from .search import Limits, Tally, explore
from .subject import Subject
from .subjects import catalogue

__all__ = ["matching", "order", "perform", "run", "select", "swept"]


def select(patterns: str | None) -> list[Subject]:
    """The subjects whose name matches one of the patterns, separated by commas; all of them for None.

    A pattern is a shell pattern (``Normal-*``), or else a part of the name; case does not matter.

    Raises:
        ValueError: nothing matches.
    """
    return [catalogue()[name] for name in matching(patterns, catalogue())]


def matching(patterns: str | None, names: Iterable[str]) -> list[str]:
    """Those of the names that `select` selects."""
    wanted, names = [w.strip().lower() for w in (patterns or "*").split(",") if w.strip()], list(names)

    def matches(name: str, w: str) -> bool:
        return fnmatch.fnmatchcase(name, w) or (not set(w) & set("*?[") and w in name)

    found = [name for name in names if any(matches(name.lower(), w) for w in wanted)]
    if not found:
        raise ValueError(
            f"no rule matches {patterns!r}; a pattern is for example 'Normal-Normal', 'Gamma-*' or 'gradient *'. "
            f"The rules are: {', '.join(names)}"
        )
    return found


def perform(task: Task) -> list[Row]:
    """The rows of one search; one row that says so where it breaks, since the others are still of use."""
    try:
        return _searched(task)
    except Exception as error:
        return rows_of(catalogue()[task.rule], task, {"search": Tally(failure=f"{type(error).__name__}: {error}")}, 0.0)


def _searched(task: Task) -> list[Row]:
    subject, start = catalogue()[task.rule], time.monotonic()
    cases = list(stored_cases(task.rule, task.dtype).values())
    seed = zlib.crc32(f"{task.rule} {task.dtype} {task.limits.seed}".encode())
    limits = Limits(task.limits.examples, task.limits.seconds, seed)
    tallies = explore(
        subject, DTYPES[task.dtype], torch.device(task.device), limits, [tuple(c) for c in cases], task.compiled
    )
    return rows_of(subject, task, tallies, time.monotonic() - start)


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers


@contextmanager
def _workers(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """A pool that an interrupt or an error ends at once, with all that is queued."""
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _start_worker)
    try:
        yield pool
    except BaseException:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        raise
    pool.shutdown()


def run(tasks: Sequence[Task], jobs: int | None = None) -> Iterator[tuple[Task, list[Row]]]:
    """Perform tasks, several at a time in processes of their own, and yield each as it ends.

    Args:
        tasks: what to do.
        jobs: processes; the number of CPUs when None, none but this one when 1.
    """
    jobs = min(jobs or os.cpu_count() or 1, len(tasks))
    if jobs <= 1:
        for task in tasks:
            yield task, perform(task)
        return
    with _workers(jobs) as pool:
        running = {pool.submit(perform, task): task for task in tasks}
        for done in as_completed(running):
            yield running[done], done.result()


def order(rows: Iterable[Row]) -> list[Row]:
    """Rows in the catalogue's order, implementations of a rule beside each other."""
    place = {name: i for i, name in enumerate(catalogue())}
    return sorted(rows, key=lambda r: (place.get(r.rule, math.inf), r.dtype, r.device, r.mode, r.impl != "torch"))


# ---- all float32 ---------------------------------------------------------------------------------------------


def _sweep_part(name: str, device: str, binades: range) -> list[Sweep]:
    return sweep(name, device, binades)


def swept(name: str, device: str, jobs: int, advance: Callable[[int], None]) -> list[Row]:
    """The rows of a primitive over all float32, in parts shared out among processes."""
    parts = [range(i, min(i + 16, 512)) for i in range(0, 512, 16)]
    found: dict[str, list[Sweep]] = {}
    with _workers(jobs) as pool:
        for done in as_completed([pool.submit(_sweep_part, name, device, part) for part in parts]):
            advance(16)
            for record in done.result():
                found.setdefault(record.impl, []).append(record)
    return [_swept_row(records, device) for records in found.values()]


def _swept_row(records: list[Sweep], device: str) -> Row:
    worst = max(records, key=lambda r: r.worst)
    counts = [sum(column) for column in zip(*(r.counts for r in records), strict=True)]
    labels = [f"<= {edge:g}" for edge in EDGES[:-1]] + [f"> {EDGES[-2]:g}"]
    return Row(
        rule=worst.name,
        impl=worst.impl,
        dtype="float32",
        device=device,
        mode="eager",
        unit="ulp",
        worst_ulp=math.inf if any(r.nan or r.inf for r in records) else worst.worst,
        worst_input={"x": worst.worst_input.hex()},
        worst_value=[worst.worst_value.hex()],
        worst_truth=[worst.worst_truth],
        evaluations=sum(counts),
        judged=sum(r.judged for r in records),
        nan=sum(r.nan for r in records),
        inf=sum(r.inf for r in records),
        negative=0,
        defects={("nan" if r.nan else "inf"): {"x": r.defect.hex()} for r in records if r.defect is not None},
        unstable=0,
        device_gap=None,
        bar=None,
        failure="",
        seconds=round(sum(r.seconds for r in records), 1),
        histogram=dict(zip(labels, counts, strict=True)),
    )
