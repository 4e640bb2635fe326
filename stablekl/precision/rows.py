"""Rows of the report: what a search found of one implementation of a rule."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .batches import hexadecimal
from .references.context import mp
from .search import Limits, Tally
from .subject import Subject

__all__ = ["DTYPES", "Row", "Task", "as_json", "rows_of"]

DTYPES: dict[str, torch.dtype] = {n: getattr(torch, n) for n in ("float16", "bfloat16", "float32", "float64")}


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
        unsettled: those that it could not, because no two precisions agreed.
        nan: results that are NaN.
        inf: results that are infinite where the truth is a number of the dtype.
        negative: divergences below zero.
        defects: an input for each of the three that occurred.
        unstable: rows of elementwise rules whose bits depend on the batch around them.
        device_gap: largest difference from the CPU's results in a batch, in ulps; None on a CPU.
        bar: the error the project aims at.
        failure: what the rule raised, where it could not be evaluated.
        seconds: that the search took.
        samples: distance of p from q, scale of the input, and error of the judged.
        histogram: of an exhaustive sweep, arguments by the upper end of their error's bin, in ulps.
        limit: why stablekl's rule has no bound on its error, where it has none.
        on_record: the largest error at the inputs of earlier searches that are stored; None without any.
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
    device_gap: float | None
    bar: float | None
    failure: str
    seconds: float
    samples: list[tuple[float, float, float]] = field(repr=False, default_factory=list)
    histogram: dict[str, int] = field(default_factory=dict)
    limit: str = ""
    unsettled: int = 0
    on_record: float | None = None


@dataclass(frozen=True)
class Task:
    """One search: the name of a subject, and how to look."""

    rule: str
    dtype: str
    device: str
    limits: Limits
    compiled: bool = False

    @property
    def mode(self) -> str:
        """As rows and the ratchet name it."""
        return "compiled" if self.compiled else "eager"


def _named(subject: Subject, batch: Sequence[torch.Tensor] | None) -> dict[str, Any]:
    return {} if batch is None else {n: hexadecimal(x[0]) for n, x in zip(subject.parameters, batch, strict=True)}


def rows_of(subject: Subject, task: Task, tallies: dict[str, Tally], seconds: float) -> list[Row]:
    """A row for each implementation."""
    return [
        Row(
            rule=subject.name,
            impl=impl,
            dtype=task.dtype,
            device=task.device,
            mode=task.mode,
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
            device_gap=t.device_gap,
            bar=subject.bars.get(DTYPES[task.dtype]),
            limit=subject.limit.get(DTYPES[task.dtype], "") if impl == "stablekl" else "",
            unsettled=t.unsettled,
            on_record=t.on_record,
            failure=t.failure,
            seconds=round(seconds, 3),
            samples=t.samples,
        )
        for impl, t in tallies.items()
    ]


def as_json(rows: Iterable[Row]) -> str:
    """The rows as a JSON array; an infinite error is written 1e999, which every parser reads as infinity."""
    table = [{k: v for k, v in asdict(row).items() if k != "samples"} for row in rows]
    text = json.dumps(table, indent=1)
    # of the numbers alone, each of which stands on a line of its own
    for name, legal in (("Infinity", "1e999"), ("NaN", "null")):
        line = rf'^( +"(?:worst_ulp|device_gap|on_record)": ){name}(,?)$'
        text = re.sub(line, rf"\g<1>{legal}\g<2>", text, flags=re.MULTILINE)
    return text
