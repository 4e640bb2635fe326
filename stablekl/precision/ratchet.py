"""Keeping what was found: the largest errors on record, and named cases, in data files that tests read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .batches import from_hexadecimal
from .rows import DTYPES, Row, Task

__all__ = ["SLACK", "ratchet", "record", "regressions", "stored_cases"]

DATA = Path(__file__).parent / "data"
# A search that looks elsewhere than the one that set the ratchet may find somewhat worse inputs; a lost digit is
# a factor of 10.
SLACK = 4.0
# Numbers in a case: those of a matrix of size 32 would fill the file.
_LARGEST = 200


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


def regressions(rows: Iterable[Row], tasks: Iterable[Task] = ()) -> list[str]:
    """What is worse than the ratchet allows: a sentence for each, with the input.

    Args:
        rows: what was found.
        tasks: what was looked for; each that is on record must have a row of stablekl's.
    """
    known, found, rows = ratchet(), [], list(rows)
    measured = {(row.rule, row.dtype) for row in rows if row.impl != "torch"}
    for task in tasks:
        if (task.rule, task.dtype, task.mode) in known and (task.rule, task.dtype) not in measured:
            found.append(f"{task.rule}, {task.dtype}: stablekl has no rule any more")
    for row in rows:
        allowed = known.get((row.rule, row.dtype, row.mode))
        if row.impl == "torch" or allowed is None:
            continue
        where = f"{row.rule}, {row.dtype}, {row.device}, {row.mode}"
        if row.failure:
            found.append(f"{where}: {row.failure}")
        # a rule without a bound is held to what it did at the inputs on record; NaN where nothing was judged
        error = (row.on_record or 0.0) if row.limit else row.worst_ulp
        if not row.failure and not error <= SLACK * allowed:
            found.append(
                f"{where}: error {error:.3g} {row.unit}, the ratchet allows {SLACK:g} x {allowed:.3g}, "
                f"at {json.dumps(row.worst_input)}"
            )
        for kind in ("nan", "inf", "negative"):
            if getattr(row, kind):
                found.append(f"{where}: {getattr(row, kind)} {kind}, the first at {json.dumps(row.defects[kind])}")
        if row.unstable:
            found.append(f"{where}: the bits of {row.unstable} rows depend on the batch around them")
    return found


def _count(item: Any) -> int:
    return sum(map(_count, item)) if isinstance(item, list) else 1


def _worst(rows: Iterable[Row], impl: str) -> list[Row]:
    return [r for r in rows if r.impl == impl and not r.failure and not math.isnan(r.worst_ulp)]


def record(rows: Iterable[Row]) -> None:
    """Raise the ratchet to the errors of stablekl's rows where they are larger, and store their inputs as cases.

    Of torch's rows for the same rules the inputs are stored that give NaN, infinities or negative results.
    """
    rows = list(rows)
    if broken := [r.rule for r in _worst(rows, "stablekl") if not math.isfinite(r.worst_ulp)]:
        raise ValueError(f"not recorded: {', '.join(broken)} returned NaN or a wrong infinity, which is to be mended")
    known = {(r["rule"], r["dtype"], r["mode"]): r for r in stored("ratchet.json")}
    cases = {(c["rule"], c["dtype"], c["name"]): c for c in stored("cases.json")}
    for row in _worst(rows, "stablekl"):
        key = (row.rule, row.dtype, row.mode)
        before = known.get(key, {"worst_ulp": -1.0, "evaluations": 0, "judged": 0})
        known[key] = {
            "rule": row.rule,
            "dtype": row.dtype,
            "mode": row.mode,
            "unit": row.unit,
            "worst_ulp": max(float(f"{row.worst_ulp:.4g}"), before["worst_ulp"]),
            "evaluations": row.evaluations + before["evaluations"],
            "judged": row.judged + before["judged"],
        }
        if row.worst_ulp > before["worst_ulp"] and row.worst_ulp > 0:
            _store(cases, row, "worst of stablekl", row.worst_input)
    ours = {(r.rule, r.dtype) for r in _worst(rows, "stablekl")}
    for row in _worst(rows, "torch"):
        if (row.rule, row.dtype) in ours:
            for kind, row_input in row.defects.items():
                _store(cases, row, f"torch is {kind}", row_input)
    _write("ratchet.json", [known[k] for k in sorted(known)])
    _write("cases.json", [cases[k] for k in sorted(cases)])


def _store(cases: dict[tuple[str, str, str], Any], row: Row, name: str, inputs: dict[str, Any]) -> None:
    if _count(list(inputs.values())) <= _LARGEST:
        cases[row.rule, row.dtype, name] = {"rule": row.rule, "dtype": row.dtype, "name": name, "input": inputs}


def _write(name: str, items: list[Any]) -> None:
    DATA.mkdir(exist_ok=True)
    text = ",\n".join(json.dumps(item) for item in items)
    (DATA / name).write_text(f"[\n{text}\n]\n", encoding="utf-8")
