"""What the precision suite reports, as JSON, HTML, CSV and a table, and what it keeps."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from stablekl.precision import ratchet, render
from stablekl.precision.rows import Row, as_json
from stablekl.precision.run import order
from stablekl.precision.subjects import catalogue


def row(**changes) -> Row:
    """A row of the report, as a search without findings leaves it."""
    plain = Row(
        rule="Normal-Normal",
        impl="stablekl",
        dtype="float32",
        device="cpu",
        mode="eager",
        unit="ulp",
        worst_ulp=0.5,
        worst_input={"loc_p": "0x1.8000000000000p+1", "scale_p": ["0x1.0p+0", "0x1.0p-3"]},
        worst_value=["0x1.4p+3"],
        worst_truth=["10.125"],
        evaluations=1000,
        judged=100,
        nan=0,
        inf=0,
        negative=0,
        defects={},
        unstable=0,
        device_gap=None,
        bar=4.0,
        failure="",
        seconds=1.5,
        samples=[(10.0 ** (-i), float(i + 1), 0.1 * i) for i in range(5)],
    )
    return replace(plain, **changes)


# ---- what is reported ---------------------------------------------------------------------------------------------


def test_json():
    rows = [
        row(),
        row(impl="torch", worst_ulp=math.inf, nan=3, defects={"nan": {"loc_p": "nan"}}, samples=[(1.0, 1.0, math.inf)]),
        row(dtype="float64", worst_ulp=math.nan, failure="ValueError: no", device_gap=math.inf),
    ]
    text = as_json(rows)
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    keys = {"rule", "impl", "dtype", "device", "worst_ulp", "worst_input", "evaluations", "nan", "inf", "negative"}
    assert all(keys <= item.keys() for item in found)
    assert [item["worst_ulp"] for item in found] == [0.5, math.inf, None]
    assert found[2]["device_gap"] == math.inf
    assert found[0]["worst_input"] == rows[0].worst_input
    assert "samples" not in found[0]
    with pytest.raises(pytest.fail.Exception):
        json.loads(json.dumps(rows[1].worst_ulp), parse_constant=lambda name: pytest.fail(name))


def test_page():
    rows = [row(), row(impl="torch", worst_ulp=1e7, negative=2), row(dtype="float64", failure="RuntimeError: <no>")]
    text = render.page(rows)
    assert text.count("<img ") == 2
    assert 'alt="error against sqrt(2 KL), the distance of p from q"' in text
    assert 'alt="error against largest parameter"' in text
    for part in ("loc_p = 0x1.8000000000000p+1", "[0x1.0p+0, 0x1.0p-3]", "computed 10; true 10.125", "1e+07"):
        assert part in text
    assert text.count('<tr class="green">') == text.count('<tr class="red">') == 1
    assert "&lt;no&gt;" in text
    assert "<no>" not in text
    assert text.count("<tr") == text.count("</tr>") == 4
    assert "<img" not in render.page([row(samples=[])])
    assert render.page([]).startswith("<!doctype html>")


def printed(rows) -> str:
    console = Console(file=io.StringIO(), width=200)
    render.table(rows, console)
    return console.file.getvalue()


def test_table_has_every_row():
    rows = [
        row(worst_ulp=12.345, evaluations=1234567, negative=17),
        row(impl="torch", worst_ulp=math.inf, nan=23),
        row(dtype="float64", worst_ulp=math.nan),
        row(rule="MultivariateNormal(scale_tril)-Independent", mode="compiled"),
        row(rule="log_prob Gamma", failure="IndexError: [/i] and [j] are none", impl="torch"),
    ]
    lines = printed(rows).splitlines()
    assert len(lines) == 1 + len(rows)
    text = "\n".join(line.rstrip() for line in lines)
    for part in ("12.35", "1,234,567", " 17", "inf", " 23", " - ", "MVN(scale_tril)-Independent (compiled)"):
        assert part in text
    assert "IndexError: [/i] and [j] are none" in text, "what a rule says is no markup"
    assert [line.split()[1] for line in lines[1:3]] == ["torch", "stablekl"], "beside each other"


def test_csv_and_the_histograms_of_sweeps():
    lines = list(csv.reader(io.StringIO(render.as_csv([row(), row(impl="torch")]))))
    assert [len(line) for line in lines] == [10] * 3
    assert [line[1] for line in lines] == ["impl", "torch", "stablekl"]
    swept = row(rule="bd0", worst_input={"x": (0.5).hex()}, histogram={"<= 0.5": 7, "> 0.5": 1234})
    header, line = csv.reader(io.StringIO(render.as_csv([swept])))
    assert header[-2:] == ["<= 0.5", "> 0.5"]
    assert line == ["bd0", "stablekl", "0.50", "0.5", "7", "1234"]
    assert "1,234" in printed([swept])


def test_order():
    names = ["bd0", "Normal-Normal", "of my own", "Gamma-Gamma"]
    found = [(r.rule, r.impl) for r in order(row(rule=n, impl=i) for n in names for i in ("stablekl", "torch"))]
    place = list(catalogue())
    assert [f[0] for f in found[::2]] == [*sorted(set(names) - {"of my own"}, key=place.index), "of my own"]
    assert [f[1] for f in found] == ["torch", "stablekl"] * 4


# ---- what is kept -------------------------------------------------------------------------------------------------


def test_regressions(data):
    ratchet.record([row(worst_ulp=0.5)])
    assert ratchet.regressions([row(worst_ulp=0.5 * ratchet.SLACK)]) == []
    assert ratchet.regressions([row(impl="torch", worst_ulp=math.inf, nan=7)]) == []
    unknown = [row(worst_ulp=9.0, **{k: v}) for k, v in (("rule", "x"), ("dtype", "float64"), ("mode", "compiled"))]
    assert ratchet.regressions(unknown) == []
    for worst in (0.51 * ratchet.SLACK, 100.0, math.inf):
        (line,) = ratchet.regressions([row(worst_ulp=worst)])
        for part in (
            "Normal-Normal",
            "float32",
            "cpu",
            "eager",
            "ulp",
            "0x1.8000000000000p+1",
            f"{ratchet.SLACK:g} x 0.5",
        ):
            assert part in line


def test_a_rule_without_a_bound_is_shown_but_no_regression(data):
    ratchet.record([row(worst_ulp=0.5)])
    loose = row(worst_ulp=1e9, limit="it cancels")
    assert ratchet.regressions([loose]) == []
    assert ratchet.regressions([replace(loose, limit="")]), "must fail"
    assert ratchet.regressions([replace(loose, nan=1, defects={"nan": {}})]), "a NaN is one all the same"
    assert "1e+09*" in render.as_csv([loose])
    assert "* Normal-Normal: it cancels" in render.page([loose])


@pytest.mark.parametrize("kind", ["nan", "inf", "negative"])
def test_defects_are_regressions(kind, data):
    ratchet.record([row()])
    (line,) = ratchet.regressions([row(defects={kind: {"loc_p": "0x1.7p+2"}}, **{kind: 3})])
    assert f"3 {kind}" in line
    assert "0x1.7p+2" in line


def test_failures_and_unstable_bits_are_regressions(data):
    ratchet.record([row()])
    (line,) = ratchet.regressions([row(failure="RuntimeError: no", worst_ulp=math.nan)])
    assert "RuntimeError: no" in line
    (line,) = ratchet.regressions([row(unstable=12)])
    assert "12 rows" in line


def test_record_only_ever_adds(data):
    assert ratchet.ratchet() == {}
    assert ratchet.stored_cases("Normal-Normal", "float32") == {}
    torchs = row(impl="torch", worst_ulp=math.inf, nan=1, defects={"nan": {"loc_p": "nan", "scale_p": "0x1.0p+0"}})
    ratchet.record([row(worst_ulp=0.50012345), torchs, row(rule="Gamma-Gamma", impl="torch")])
    assert ratchet.ratchet() == {("Normal-Normal", "float32", "eager"): 0.5001}
    cases = ratchet.stored_cases("Normal-Normal", "float32")
    assert set(cases) == {"worst of stablekl", "torch is nan"}
    loc, scale = cases["worst of stablekl"]
    assert (loc.dtype, loc.shape, loc.item()) == (torch.float32, (1,), 3.0)
    assert scale.tolist() == [[1.0, 0.125]]
    before = (data / "ratchet.json").read_text(), (data / "cases.json").read_text()
    other = {"loc_p": "0x1.0p+0", "scale_p": "0x1.0p+0"}
    ratchet.record([row(worst_ulp=0.4, worst_input=other, evaluations=0, judged=0)])
    assert ((data / "ratchet.json").read_text(), (data / "cases.json").read_text()) == before, (
        "a better result: as it was"
    )
    ratchet.record([row(worst_ulp=0.75, worst_input=other)])
    assert ratchet.ratchet()["Normal-Normal", "float32", "eager"] == 0.75
    assert ratchet.stored_cases("Normal-Normal", "float32")["worst of stablekl"][0].item() == 1.0
    ratchet.record([row(worst_ulp=1.0, worst_input={"loc_p": ["0x1.0p+0"] * 201})])
    assert ratchet.stored_cases("Normal-Normal", "float32")["worst of stablekl"][0].item() == 1.0, "too large to keep"
    assert json.loads((data / "ratchet.json").read_text())[0]["evaluations"] == 3000
