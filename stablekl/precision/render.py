"""The report: a table in the terminal, JSON, and a page of HTML with plots of the error."""

from __future__ import annotations

import base64
import csv
import html
import io
import math
import platform
from collections import defaultdict
from collections.abc import Sequence

import matplotlib
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .rows import Row
from .run import order

__all__ = ["as_csv", "environment", "page", "table"]

_COLUMNS = ("rule", "impl", "dtype", "largest error", "unit", "sets", "mpmath", "NaN", "inf", "< 0")
_COLOURS = {"torch": "#c0392b", "stablekl": "#1f618d", "yours": "#117a65"}


def environment(device: str) -> str:
    """What was measured with, in one line."""
    chip = (
        torch.cuda.get_device_name()
        if device.startswith("cuda") and torch.cuda.is_available()
        else platform.processor()
    )
    name = f"{device} ({chip})" if chip else device
    system = f"{platform.system()} {platform.machine()}"
    return f"torch {torch.__version__}, Python {platform.python_version()}, {system}, {name}"


def number(x: float) -> str:
    """An error in at most seven characters."""
    if math.isnan(x):
        return "-"
    if math.isinf(x):
        return "inf"
    return f"{x:.2f}" if x < 100 else f"{x:.0f}" if x < 1e5 else f"{x:.0e}"


def short(rule: str) -> str:
    """A rule's name as the table has room for it."""
    names = {"MultivariateNormal": "MVN", "MixtureSameFamily": "Mixture", "ContinuousBernoulli": "ContBernoulli"}
    for name, brief in names.items():
        rule = rule.replace(name, brief)
    return rule


def _cells(row: Row) -> tuple[str, ...]:
    counts = (row.nan, row.inf, row.negative)
    rule = short(row.rule) + (" (compiled)" if row.mode == "compiled" else "")
    if row.failure:
        return (rule, row.impl, row.dtype, "fails", row.failure[:40], "", "", "", "", "")
    return (
        rule,
        row.impl,
        row.dtype,
        number(row.worst_ulp) + ("*" if row.limit else ""),
        row.unit,
        f"{row.evaluations:,}",
        f"{row.judged:,}",
        *(str(c) if c else "" for c in counts),
    )


def _verdict(row: Row) -> str:
    """Green where the bar is met, red where it is not; nothing where there is none."""
    if row.bar is None or row.failure:
        return ""
    good = row.worst_ulp <= row.bar and not (row.nan or row.inf or row.negative)
    return "green" if good else "red"


def table(rows: Sequence[Row], console: Console) -> None:
    """Print the rows, implementations of one rule beside each other."""
    grid = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    for i, name in enumerate(_COLUMNS):
        # in a narrow terminal the names fold, never the numbers
        grid.add_column(
            name, justify="left" if i in (0, 1, 2, 4) else "right", no_wrap=i not in (0, 4), overflow="fold"
        )
    for row in order(rows):
        cells, colour = [escape(cell) for cell in _cells(row)], _verdict(row)
        if colour:
            cells[3] = f"[{colour}]{cells[3]}[/{colour}]"
        grid.add_row(*cells)
    console.print(grid)
    for line in _footnotes(rows):
        console.print(line, markup=False, highlight=False)
    histograms = [row for row in rows if row.histogram]
    if histograms:
        grid = Table(box=None, header_style="bold", pad_edge=False, title="arguments by error in ulps")
        for name in ("rule", "impl", *histograms[0].histogram):
            grid.add_column(name, justify="right")
        for row in histograms:
            grid.add_row(row.rule, row.impl, *(f"{n:,}" for n in row.histogram.values()))
        console.print(grid)


def _footnotes(rows: Sequence[Row]) -> list[str]:
    """Why the errors with a star have no bound."""
    reasons: dict[str, list[str]] = {}
    for row in order(rows):
        if row.limit and short(row.rule) not in reasons.setdefault(row.limit, []):
            reasons[row.limit].append(short(row.rule))
    return [f"* {', '.join(rules)}: {reason}" for reason, rules in reasons.items()]


def as_csv(rows: Sequence[Row]) -> str:
    """The table, with a first line that names the columns, for a spreadsheet or a page of documentation."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    binned = [row for row in rows if row.histogram]
    if binned:  # a sweep: 2^32 arguments each, so the histogram says the rest
        writer.writerow(("function", "implementation", "largest error, ulp", "at x", *binned[0].histogram))
        for row in binned:
            x = float.fromhex(row.worst_input["x"])
            writer.writerow((row.rule, row.impl, number(row.worst_ulp), f"{x:.9g}", *row.histogram.values()))
        return out.getvalue()
    writer.writerow(_COLUMNS)
    writer.writerows(_cells(row) for row in order(rows))
    return out.getvalue()


# ---- the page -----------------------------------------------------------------------------------------------------


def _scatter(rows: Sequence[Row], axis: int, label: str) -> str:
    """Errors against a coordinate of the samples, as an inline picture; empty where there are none."""
    far = 1e150  # matplotlib's ticks overflow beyond
    points = [(r.impl, s[axis], s[2]) for r in rows for s in r.samples if 1 / far < s[axis] < far]
    if not points:
        return ""
    figure = Figure(figsize=(4.6, 2.9), layout="constrained")
    axes = figure.subplots()
    floor = 2.0**-12  # what is exact stands here
    for impl in dict.fromkeys(p[0] for p in points):
        xs = [p[1] for p in points if p[0] == impl]
        ys = [min(max(p[2], floor), 1e20) for p in points if p[0] == impl]
        axes.plot(xs, ys, ".", markersize=2, color=_COLOURS.get(impl, "black"), label=impl, rasterized=True)
    axes.axhline(1.0, color="black", linewidth=0.6)
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel="error")
    axes.legend(loc="best", fontsize="small", markerscale=4)
    out = io.BytesIO()
    with matplotlib.rc_context({"savefig.dpi": 110}):
        figure.savefig(out, format="png")
    data = base64.b64encode(out.getvalue()).decode()
    return f'<img alt="error against {html.escape(label)}" src="data:image/png;base64,{data}">'


def _input(row: Row) -> str:
    lines = [f"{name} = {_readable(value)}" for name, value in row.worst_input.items()]
    got, truth = row.worst_value[:4], row.worst_truth[:4]
    if got:
        lines.append(f"computed {', '.join(f'{float.fromhex(g):.17g}' for g in got)}; true {', '.join(truth)}")
    return "<br>".join(html.escape(line) for line in lines)


def _readable(value: object) -> str:
    if isinstance(value, list):
        inner = ", ".join(_readable(v) for v in value)
        return f"[{inner}]"
    return str(value)


def page(rows: Sequence[Row], title: str = "How wrong is kl_divergence here?") -> str:
    """The report as one page of HTML that needs no other file."""
    rows = order(rows)
    body = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(environment(rows[0].device if rows else 'cpu'))}</p>"]
    body.append(
        "<p>The largest error known, confirmed by mpmath, of every rule measured; the sets of parameters evaluated, "
        "each looked at for NaN, infinities and signs, and how many of them mpmath judged. A search, so a lower "
        "bound on the true worst case. In plots, exact results stand at 2^-12 and infinite errors at 1e20. "
        "Green meets the project's bar, red misses it.</p><table><tr>"
    )
    body += [f"<th>{c}</th>" for c in _COLUMNS]
    body.append("</tr>")
    for row in rows:
        cells = "".join(f"<td>{html.escape(c)}</td>" for c in _cells(row))
        body.append(f'<tr class="{_verdict(row)}">{cells}</tr>')
    body.append("</table>")
    body += [f"<p>{html.escape(line)}</p>" for line in _footnotes(rows)]
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.rule, row.dtype].append(row)
    for (rule, dtype), group in groups.items():
        if all(r.failure for r in group):
            continue
        body.append(f"<h2>{html.escape(rule)}, {dtype}</h2>")
        body.append(_scatter(group, 0, "sqrt(2 KL), the distance of p from q") if "-" in rule else "")
        body.append(_scatter(group, 1, "largest parameter"))
        body += [
            f"<p>{html.escape(r.impl)}, worst input:<br><code>{_input(r)}</code></p>" for r in group if r.worst_input
        ]
    return _PAGE.replace("BODY", "\n".join(body)).replace("TITLE", html.escape(title))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>TITLE</title><style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem }
table { border-collapse: collapse } td, th { padding: .15rem .7rem; text-align: left; border-bottom: 1px solid #ddd }
td:nth-child(4), td:nth-child(n+6) { text-align: right }
.green td:nth-child(4) { color: #1e8449 } .red td:nth-child(4) { color: #c0392b }
code { font-size: 12px; overflow-wrap: anywhere } h2 { margin-top: 2rem; font-size: 1.1rem }
</style></head><body>
BODY
</body></html>
"""
