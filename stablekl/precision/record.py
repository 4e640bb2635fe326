"""Keeping what was found: the ratchet and the named cases, in data files that tests read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from .measure import DATA, Row, stored

__all__ = ["record"]

# Numbers in a case: those of a matrix of size 32 would fill the file.
_LARGEST = 200


def _count(item: Any) -> int:
    return sum(map(_count, item)) if isinstance(item, list) else 1


def _worst(rows: Iterable[Row], impl: str) -> list[Row]:
    return [r for r in rows if r.impl == impl and not r.failure and not math.isnan(r.worst_ulp)]


def record(rows: Iterable[Row]) -> None:
    """Raise the ratchet to the errors of stablekl's rows where they are larger, and store their inputs as cases.

    Of torch's rows for the same rules the inputs are stored that give NaN, infinities or negative results.
    """
    rows = list(rows)
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
