"""How wrong ``kl_divergence`` is on this machine, for torch's rules and for stablekl's."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .exhaustive import NAMES
from .ratchet import ratchet, record, regressions
from .render import as_csv, environment, page, table
from .rows import DTYPES, Row, Task, as_json
from .run import matching, run, select, swept
from .search import Limits

TIME_LIMIT = 80.0  # with what starting and finishing take, two minutes on two cores


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m stablekl.precision", description=__doc__)
    add = parser.add_argument
    add("--pairs", metavar="PATTERN", help="rules to measure: shell patterns or parts of names, separated by commas")
    add(
        "--dtype", default="float32,float64", help=f"of {', '.join(DTYPES)}, separated by commas (default: %(default)s)"
    )
    add("--device", default="cpu", help="where rules are evaluated (default: %(default)s)")
    add("--compiled", action="store_true", help="evaluate under torch.compile")
    add("--examples", type=int, default=100, metavar="N", help="batches for each rule, at most (default: %(default)s)")
    add("--seed", type=int, default=0, help="of every random choice (default: %(default)s)")
    add("--time-limit", type=float, default=TIME_LIMIT, metavar="S", help="seconds to search (default: %(default)s)")
    add("--jobs", type=int, default=None, metavar="N", help="processes (default: one for each CPU)")
    add("--check", action="store_true", help="compare with the errors on record; exit with 1 if any has grown")
    add("--exhaustive", action="store_true", help="all 2^32 float32 arguments of one-argument primitives")
    add("--json", type=Path, metavar="FILE", help="write the rows")
    add("--csv", type=Path, metavar="FILE", help="write the table")
    add("--html", type=Path, metavar="FILE", help="write a page with the worst inputs and plots")
    add("--record", action="store_true", help="for maintainers: store the worst errors and inputs as the new ratchet")
    add("--list", action="store_true", help="print the names of the rules and stop")
    return parser


def tasks(options: argparse.Namespace, jobs: int) -> list[Task]:
    """The searches that the options ask for; a check looks only at what is on record."""
    names = [name.strip() for name in options.dtype.split(",")]
    if unknown := [name for name in names if name not in DTYPES]:
        raise ValueError(f"--dtype {','.join(unknown)}: not one of {', '.join(DTYPES)}")
    mode, known = "compiled" if options.compiled else "eager", ratchet()
    wanted = [(s.name, dtype) for s in select(options.pairs) for dtype in names]
    if options.check:
        wanted = [(rule, dtype) for rule, dtype in wanted if (rule, dtype, mode) in known]
        if not wanted:
            raise ValueError(f"--check: no error of these rules is on record for {options.dtype}, {mode}")
    limits = Limits(options.examples, options.time_limit * jobs / max(1, len(wanted)), options.seed)
    return [Task(rule, dtype, options.device, limits, options.compiled) for rule, dtype in wanted]


def sensible(options: argparse.Namespace) -> None:
    """Raise a ValueError for options that make no sense, before hours are spent."""
    if options.examples < 1 or not options.time_limit > 0 or (options.jobs or 1) < 1:
        raise ValueError("--examples, --time-limit and --jobs must be positive")
    if options.exhaustive and options.check:
        raise ValueError("--check compares searches; it does not go with --exhaustive")
    for path in filter(None, (options.json, options.csv, options.html)):
        if path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
            raise ValueError(f"cannot write {path}")
    try:
        torch.empty(1, device=options.device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"--device {options.device}: torch cannot compute there ({str(error).splitlines()[0]})"
        ) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if ``--check`` finds a regression, 2 for options that make no sense."""
    options, console = arguments().parse_args(argv), Console(stderr=True)
    todo: list[Task] = []
    rows: list[Row] = []
    status = 0
    try:
        if options.list:
            print(*(s.name for s in select(options.pairs)), sep="\n")
            return 0
        sensible(options)
        # several processes would share one GPU, and wait for it in turn
        jobs = options.jobs or (1 if options.device != "cpu" else os.cpu_count() or 1)
        if options.exhaustive:
            sweep_all(matching(options.pairs, NAMES), options.device, jobs, console, rows)
        else:
            todo = tasks(options, jobs)
            search_all(todo, jobs, console, rows)
    except ValueError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted; this is what was found so far", style="red")
        status = 130
    wide = Console(width=None if sys.stdout.isatty() else 170)
    wide.print(environment(options.device), highlight=False)
    table(rows, wide)
    if options.json:
        options.json.write_text(as_json(rows), encoding="utf-8")
    if options.csv:
        options.csv.write_text(as_csv(rows), encoding="utf-8")
    if options.html:
        options.html.write_text(page(rows), encoding="utf-8")
    if status:
        return status
    if options.record:
        record(rows)
    if not options.check:
        return 0
    worse = regressions(rows, todo)
    for line in worse:
        print(f"REGRESSION {line}")
    print(f"{len(rows)} rows checked, {len(worse)} regressions")
    return 1 if worse else 0


def search_all(todo: Sequence[Task], jobs: int, console: Console, rows: list[Row]) -> None:
    """Append the rows of all searches, with a bar that fills."""
    with bar(console) as progress:
        shown = progress.add_task("", total=len(todo))
        for task, found in run(todo, jobs):
            rows += found
            progress.update(shown, advance=1, description=f"{task.rule}, {task.dtype}")


def sweep_all(names: Sequence[str], device: str, jobs: int, console: Console, rows: list[Row]) -> None:
    """Append the rows of `exhaustive`, one primitive after another."""
    start = time.monotonic()
    with bar(console) as progress:
        shown = progress.add_task("", total=len(names) * 512)
        for name in names:
            progress.update(shown, description=name)
            rows += swept(name, device, jobs, lambda n: progress.advance(shown, n))
    console.print(f"{len(names)} primitives over 2^32 arguments in {time.monotonic() - start:.0f} s")


def bar(console: Console) -> Progress:
    """A progress bar on standard error."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    return Progress(*columns, console=console, transient=True)


if __name__ == "__main__":
    sys.exit(main())
