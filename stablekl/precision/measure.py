"""Rows of the report: a search for each rule, dtype and device; the ratchet; a rule of your own."""

from __future__ import annotations

import fnmatch
import json
import math
import multiprocessing
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from .batches import from_hexadecimal, hexadecimal
from .exhaustive import EDGES, Sweep, sweep
from .references.context import mp
from .search import Limits, Tally, explore
from .subject import Rule, Subject, settled
from .subjects import catalogue

__all__ = ["Row", "Task", "measure", "regressions", "run", "select", "stored_cases"]

DATA = Path(__file__).parent / "data"
# A search that looks elsewhere than the one that set the ratchet may find somewhat worse inputs; a lost digit is
# a factor of 10.
SLACK = 2.0
DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}


@dataclass(frozen=True)
class Row:
    """What is known of one implementation of a rule, in one dtype, on one device.

    Attributes:
        rule: the subject's name.
        impl: the implementation: ``"torch"`` or ``"stablekl"``.
        dtype: of inputs and result.
        device: where it ran.
        mode: ``"eager"`` or ``"compiled"``.
        unit: what errors are counted in.
        worst_ulp: the largest error that mpmath confirmed, in that unit; infinite for a NaN or a wrong infinity.
        worst_input: the input that gives it, by parameter, in hexadecimal.
        worst_value: what was computed there, in hexadecimal.
        worst_truth: the true result there, to 20 digits.
        evaluations: parameter sets evaluated, each looked at for the following three.
        judged: those of them that mpmath judged.
        nan: results that are NaN.
        inf: results that are infinite where the truth is a number of the dtype.
        negative: divergences below zero.
        defects: an input for each of the three that occurred.
        unstable: rows of elementwise rules whose bits depend on the batch around them.
        bar: the error the project aims at.
        failure: what the rule raised, where it could not be evaluated.
        seconds: that the search took.
        samples: distance of p from q, scale of the input, and error of the judged.
        histogram: of an exhaustive sweep, arguments by the upper end of their error's bin, in ulps.
    """

    rule: str
    impl: str
    dtype: str
    device: str
    mode: str
    unit: str
    worst_ulp: float
    worst_input: dict[str, Any]
    worst_value: list[str]
    worst_truth: list[str]
    evaluations: int
    judged: int
    nan: int
    inf: int
    negative: int
    defects: dict[str, dict[str, Any]]
    unstable: int
    bar: float | None
    failure: str
    seconds: float
    samples: list[tuple[float, float, float]] = field(repr=False, default_factory=list)
    histogram: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """One search: the name of a subject, and how to look."""

    rule: str
    dtype: str
    device: str
    limits: Limits
    compiled: bool = False


def _named(subject: Subject, batch: Sequence[torch.Tensor] | None) -> dict[str, Any]:
    return {} if batch is None else {n: hexadecimal(x[0]) for n, x in zip(subject.parameters, batch, strict=True)}


def _rows(subject: Subject, task: Task, tallies: dict[str, Tally], seconds: float) -> list[Row]:
    return [
        Row(
            rule=subject.name,
            impl=impl,
            dtype=task.dtype,
            device=task.device,
            mode="compiled" if task.compiled else "eager",
            unit=subject.unit,
            worst_ulp=t.worst,
            worst_input=_named(subject, t.row),
            worst_value=[float(v).hex() for v in t.value],
            worst_truth=[mp.nstr(v, 20) for v in t.truth],
            evaluations=t.evaluations,
            judged=t.judged,
            nan=t.nan,
            inf=t.inf,
            negative=t.negative,
            defects={kind: _named(subject, row) for kind, row in t.defects.items()},
            unstable=t.unstable,
            bar=subject.bars.get(DTYPES[task.dtype]),
            failure=t.failure,
            seconds=round(seconds, 3),
            samples=t.samples,
        )
        for impl, t in tallies.items()
    ]


# ---- stored cases and the ratchet -----------------------------------------------------------------------------------


def stored(name: str) -> Any:
    """The contents of a data file; an empty list where there is none yet."""
    path = DATA / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def stored_cases(rule: str, dtype: str) -> dict[str, list[torch.Tensor]]:
    """The worst inputs of earlier searches for a rule, by name, as batches of one row each."""
    return {
        case["name"]: [from_hexadecimal(x, DTYPES[dtype]).unsqueeze(0) for x in case["input"].values()]
        for case in stored("cases.json")
        if case["rule"] == rule and case["dtype"] == dtype
    }


def ratchet() -> dict[tuple[str, str, str], float]:
    """The largest errors known of stablekl's rules, by rule, dtype and mode."""
    return {(r["rule"], r["dtype"], r["mode"]): float(r["worst_ulp"]) for r in stored("ratchet.json")}


def regressions(rows: Iterable[Row]) -> list[str]:
    """What is worse than the ratchet allows: a sentence for each, with the input."""
    known, found = ratchet(), []
    for row in rows:
        allowed = known.get((row.rule, row.dtype, row.mode))
        if row.impl == "torch" or allowed is None:
            continue
        where = f"{row.rule}, {row.dtype}, {row.device}, {row.mode}"
        if row.failure:
            found.append(f"{where}: {row.failure}")
        if row.worst_ulp > SLACK * allowed:
            found.append(
                f"{where}: error {row.worst_ulp:.3g} {row.unit}, the ratchet allows {SLACK:g} x {allowed:.3g}, "
                f"at {json.dumps(row.worst_input)}"
            )
        for kind in ("nan", "inf", "negative"):
            if getattr(row, kind):
                found.append(f"{where}: {getattr(row, kind)} {kind}, the first at {json.dumps(row.defects[kind])}")
        if row.unstable:
            found.append(f"{where}: the bits of {row.unstable} rows depend on the batch around them")
    return found


# ---- the report's rows ----------------------------------------------------------------------------------------------


def select(patterns: str | None) -> list[Subject]:
    """The subjects whose name matches one of the patterns, separated by commas; all of them for None.

    A pattern is a shell pattern (``Normal-*``), or else a part of the name; case does not matter.

    Raises:
        ValueError: nothing matches.
    """
    wanted = [w.strip().lower() for w in (patterns or "*").split(",") if w.strip()]
    found = [
        s
        for s in catalogue().values()
        if any(fnmatch.fnmatchcase(s.name.lower(), w) or (not set(w) & set("*?[") and w in s.name.lower()) for w in wanted)
    ]
    if not found:
        raise ValueError(
            f"no rule matches {patterns!r}; a pattern is for example 'Normal-Normal', 'Gamma-*' or 'gradient *'. "
            f"The rules are: {', '.join(catalogue())}"
        )
    return found


def perform(task: Task) -> list[Row]:
    """The rows of one search; one row that says so where it breaks, since the others are still of use."""
    try:
        return _searched(task)
    except Exception as error:
        return _rows(catalogue()[task.rule], task, {"search": Tally(failure=f"{type(error).__name__}: {error}")}, 0.0)


def _searched(task: Task) -> list[Row]:
    subject, start = catalogue()[task.rule], time.monotonic()
    cases = list(stored_cases(task.rule, task.dtype).values())
    seed = zlib.crc32(f"{task.rule} {task.dtype} {task.limits.seed}".encode())
    limits = Limits(task.limits.examples, task.limits.seconds, seed)
    tallies = explore(
        subject, DTYPES[task.dtype], torch.device(task.device), limits, [tuple(c) for c in cases], task.compiled
    )
    return _rows(subject, task, tallies, time.monotonic() - start)


def _start_worker() -> None:
    torch.set_num_threads(1)


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
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _start_worker) as pool:
        running = {pool.submit(perform, task): task for task in tasks}
        for done in as_completed(running):
            yield running[done], done.result()


def _sweep_part(name: str, device: str, binades: range) -> list[Sweep]:
    return sweep(name, device, binades)


def swept(name: str, device: str, jobs: int, advance: Callable[[int], None]) -> list[Row]:
    """The rows of a primitive over all float32, in a dozen parts shared out among processes."""
    parts = [range(i, min(i + 16, 512)) for i in range(0, 512, 16)]
    found: dict[str, list[Sweep]] = {}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _start_worker) as pool:
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
        worst_ulp=worst.worst,
        worst_input={"x": worst.worst_input.hex()},
        worst_value=[worst.worst_value.hex()],
        worst_truth=[mp.nstr(worst.worst_truth, 20)],
        evaluations=sum(counts),
        judged=len(records) * 16,
        nan=0,
        inf=sum(r.wrong for r in records),
        negative=0,
        defects={},
        unstable=0,
        bar=None,
        failure="",
        seconds=round(sum(r.seconds for r in records), 1),
        histogram=dict(zip(labels, counts, strict=True)),
    )


# ---- a rule of your own ---------------------------------------------------------------------------------------------


def measure(
    rule: Rule,
    reference: Callable[..., Any],
    strategy: st.SearchStrategy[tuple[torch.Tensor, ...]],
    *,
    name: str = "rule",
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    examples: int = 100,
    seconds: float = 20.0,
    seed: int = 0,
    divergence: bool = True,
    elementwise: bool = True,
    valid: Callable[..., torch.Tensor] | None = None,
) -> Row:
    """Search for the input at which a rule of your own is most wrong.

    Args:
        rule: a function of tensors of shape ``(n, ...)``, one parameter set a row, that returns a tensor ``(n,)``.
        reference: the true value for one parameter set, from exact numbers of ``stablekl.precision.mp`` (nested lists of
            them for vectors and matrices), written plainly: it is evaluated at rising precision until two agree.
        strategy: hypothesis strategy of batches; `pairs` makes one for scalar families.
        name: of the row.
        dtype: of the tensors that the strategy draws.
        device: where the rule is evaluated.
        examples: batches, at most.
        seconds: to spend, roughly.
        seed: the same seed finds the same, as long as time does not run out.
        divergence: count negative results as defects.
        elementwise: check that a row's bits do not depend on the batch around it.
        valid: from a batch to a mask of the sets that are in the rule's domain, for the climb; by default, finite and
            of the same sign as the set it starts from.

    Returns:
        The row: ``worst_ulp``, ``worst_input``, ``evaluations``, ``nan``, ``inf``, ``negative`` and more.

    Raises:
        ValueError: the strategy draws something else than tensors of ``dtype``.

    Example:
        >>> import torch
        >>> from stablekl import precision
        >>> from stablekl.precision import mp
        >>> def naive(mu_p, sigma_p, mu_q, sigma_q):
        ...     return torch.log(sigma_q / sigma_p) + (sigma_p**2 + (mu_p - mu_q) ** 2) / (2 * sigma_q**2) - 0.5
        >>> def true(mu_p, sigma_p, mu_q, sigma_q):
        ...     return mp.log(sigma_q / sigma_p) + (sigma_p**2 + (mu_p - mu_q) ** 2) / (2 * sigma_q**2) - mp.mpf(1) / 2
        >>> row = precision.measure(naive, true, precision.pairs(loc="real", scale="positive"), examples=20)
        >>> row.worst_ulp > 1e6, row.negative > 0
        (True, True)
    """

    def expand(drawn: Any, _: torch.dtype) -> Any:
        if not (isinstance(drawn, tuple) and all(isinstance(x, torch.Tensor) and x.dtype == dtype for x in drawn)):
            kinds = [getattr(x, "dtype", type(x).__name__) for x in drawn] if isinstance(drawn, tuple) else type(drawn)
            raise ValueError(
                f"the strategy must draw tuples of {dtype} tensors, one row a parameter set, but drew {kinds}; "
                "pass dtype= to measure, or to the strategy"
            )
        return drawn

    subject = Subject(
        name=name,
        parameters=(),
        rules={"yours": rule},
        reference=settled(reference),
        draw=strategy.map(lambda batch: expand(batch, dtype)),
        valid=valid or (lambda *batch: torch.stack([x.reshape(len(x), -1).isfinite().all(-1) for x in batch]).all(0)),
        divergence=divergence,
        elementwise=elementwise,
    )
    start = time.monotonic()
    tallies = explore(subject, dtype, torch.device(device), Limits(examples, seconds, seed))
    tally = tallies["yours"]
    count = len(tally.row) if tally.row else 0
    names = [n for n in rule.__code__.co_varnames[: rule.__code__.co_argcount]] if hasattr(rule, "__code__") else []
    parameters = tuple(names) if len(names) == count else tuple(f"input {i}" for i in range(count))
    subject = Subject(**{**_fields(subject), "parameters": parameters})
    task = Task(name, str(dtype).removeprefix("torch."), str(device), Limits(examples, seconds, seed))
    return _rows(subject, task, tallies, time.monotonic() - start)[0]


def _fields(subject: Subject) -> dict[str, Any]:
    return {k: getattr(subject, k) for k in subject.__dataclass_fields__}


def as_json(rows: Iterable[Row]) -> str:
    """The rows as a JSON array; an infinite error is written 1e999, which every parser reads as infinity."""
    table = [{k: v for k, v in asdict(row).items() if k != "samples"} for row in rows]
    text = json.dumps(table, indent=1)
    return text.replace(": Infinity", ": 1e999").replace(": NaN", ": null")


def is_worse(row: Row) -> bool:
    """Whether a row misses its bar."""
    return bool(row.bar is not None and (row.worst_ulp > row.bar or row.nan or row.inf or row.negative))


def order(rows: Iterable[Row]) -> list[Row]:
    """Rows in the catalogue's order, implementations of a rule beside each other."""
    place = {name: i for i, name in enumerate(catalogue())}
    return sorted(rows, key=lambda r: (place.get(r.rule, math.inf), r.dtype, r.device, r.mode, r.impl != "torch"))
