"""The precision suite as a whole: what it measures, the cases on record, and the command line."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributions import kl as torch_kl

import stablekl
from stablekl import precision, registry
from stablekl.mixtures.family_reading import HOSTS
from stablekl.precision import __main__ as command
from stablekl.precision import ratchet
from stablekl.precision.batches import from_hexadecimal
from stablekl.precision.references.family_mixture import MIXED
from stablekl.precision.rows import DTYPES, Task
from stablekl.precision.run import perform, run, select
from stablekl.precision.search import Limits, _Search
from stablekl.precision.subjects import catalogue

ROOT = Path(stablekl.__file__).parent.parent
CPU = torch.device("cpu")


# ---- the catalogue ------------------------------------------------------------------------------------------------


def pair_of(name: str) -> tuple[str, ...]:
    """The families of a divergence, without the parameters that they are given by."""
    return tuple(re.sub(r"\(.*?\)", "", name).split("-"))


MEASURED = {pair_of(name): s for name, s in catalogue().items() if re.fullmatch(r"[^ ]+-[^ ]+", name)}
# Rules of torch that no subject is named after.
GENERIC = {
    ("ExponentialFamily", "ExponentialFamily"): "the Bregman divergence of families that have a rule of their own",
    ("TransformedDistribution", "TransformedDistribution"): "that of the bases; LogNormal and others stand for it",
    ("Independent", "Independent"): "a sum of another rule's results; measured for Normal",
}
RELAXED = ("RelaxedBernoulli", "LogitRelaxedBernoulli", "RelaxedOneHotCategorical", "ExpRelaxedCategorical")
# Rules of stablekl that are another rule's, or measured elsewhere.
ELSEWHERE = {
    ("TransformedDistribution", "TransformedDistribution"): "that of the bases",
    ("LogisticNormal", "LogisticNormal"): "that of Independent",
    ("LKJCholesky", "LKJCholesky"): "tests/test_pairs_torch_lacks.py",
    ("FisherSnedecor", "FisherSnedecor"): "tests/test_more_pairs.py",
    **dict.fromkeys(
        (("Categorical", "OneHotCategorical"), ("OneHotCategorical", "Categorical")), "that of Categorical"
    ),
    **dict.fromkeys((("Beta", "Dirichlet"), ("Dirichlet", "Beta")), "that of Dirichlet"),
    **{(name, name): "an error that says why there is none" for name in RELAXED},
}
# Rules of stablekl for pairs that torch lacks, which are other spellings of a measured one.
SPELLINGS = {
    *((a, b) for a in ("Normal", "Independent") for b in ("LowRankMultivariateNormal", "MultivariateNormal")),
    *((b, a) for a in ("Normal", "Independent") for b in ("LowRankMultivariateNormal", "MultivariateNormal")),
    *((a, b) for a, b in (("Normal", "Independent"), ("Independent", "Normal"))),
    *((a, "MixtureSameFamily") for a in ("Independent", "LowRankMultivariateNormal", "MultivariateNormal")),
    *(("MixtureSameFamily", a) for a in ("Independent", "LowRankMultivariateNormal")),
    # one engine for two components of all families, measured for three of them; the other way round, a sum or an error
    *(("MixtureSameFamily", a.__name__) for a in HOSTS if a.__name__ not in MIXED),
    *((a.__name__, "MixtureSameFamily") for a in HOSTS),
}


def registered(by: str) -> set[tuple[str, str]]:
    return {
        (p.__name__, q.__name__)
        for (p, q), rule in torch_kl._KL_REGISTRY.items()
        if p.__module__.startswith("torch.") and q.__module__.startswith("torch.") and rule.__module__.startswith(by)
    }


def test_names_are_unique():
    names = [s.name for s in catalogue().values()]
    assert len(set(names)) == len(names) > 100
    assert list(catalogue()) == names


def test_every_rule_of_torch_is_measured():
    assert len(registered("torch.")) > 50
    assert registered("torch.") - MEASURED.keys() <= GENERIC.keys()
    assert registered("torch.") >= GENERIC.keys(), "no exception that is none"
    for pair in registered("torch.") - GENERIC.keys():
        assert "torch" in MEASURED[pair].rules


def test_every_rule_of_stablekl_is_measured():
    hardened = {(p.__name__, q.__name__) for p, q in registry._HARDENED}
    assert len(hardened) > 4
    for pair in hardened - ELSEWHERE.keys():
        assert {"torch", "stablekl"} <= MEASURED[pair].rules.keys()
    assert registered("stablekl.") - MEASURED.keys() - ELSEWHERE.keys() <= SPELLINGS


def test_subjects_of_stablekl_come_first():
    ours = ["stablekl" in s.rules for s in catalogue().values()]
    assert ours == sorted(ours, reverse=True)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("Normal-Normal", {"Normal-Normal", "gradient Normal-Normal"}),
        ("Normal-normal*", {"Normal-Normal"}),
        ("gradient gamma-*", {"gradient Gamma-Gamma"}),
        ("bd0, expm1mx", {"bd0", "expm1mx"}),
        ("[bc]*uniform", {"Beta-Uniform", "ContinuousBernoulli-Uniform"}),
        (" bd0 ,", {"bd0"}),
    ],
)
def test_select(patterns, expected):
    found = {s.name for s in select(patterns)}
    assert expected <= found
    assert len(found) == len(expected) or patterns == "Normal-Normal"
    assert len(select(patterns)) == len(found), "each once"


def test_select_everything_and_nothing():
    assert len(select(None)) == len(catalogue())
    with pytest.raises(ValueError, match=r"no rule matches 'nonsense'.*The rules are: .*Normal-Normal.*Wishart"):
        select("nonsense")


# ---- cases on record ----------------------------------------------------------------------------------------------

CASES = ratchet.stored("cases.json")
ON_RECORD = ratchet.ratchet()


def test_there_are_cases_on_record():
    for name, items in (("cases.json", CASES), ("ratchet.json", ON_RECORD)):
        assert items or not (ratchet.DATA / name).exists()
    assert {(c["rule"], c["dtype"]) for c in CASES} <= {(rule, dtype) for rule, dtype, _ in ON_RECORD}
    for rule, dtype, mode in ON_RECORD:
        assert "stablekl" in catalogue()[rule].rules
        assert dtype in DTYPES
        assert mode in ("eager", "compiled")
        assert math.isfinite(ON_RECORD[rule, dtype, mode])


def judged(case):
    """What a search says of a stored case, by implementation."""
    subject, dtype = catalogue()[case["rule"]], DTYPES[case["dtype"]]
    assert tuple(case["input"]) == subject.parameters
    seeker = _Search(subject, dtype, CPU, Limits(), False)
    seeker.run(tuple(from_hexadecimal(x, dtype).unsqueeze(0) for x in case["input"].values()))
    return seeker.tallies


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['rule']}, {c['dtype']}, {c['name']}")
def test_cases_on_record(case):
    tallies = judged(case)
    ours = tallies["stablekl"]
    allowed = max(v for (rule, dtype, _), v in ON_RECORD.items() if (rule, dtype) == (case["rule"], case["dtype"]))
    assert ours.judged == 1
    assert ours.worst <= ratchet.SLACK * allowed
    assert (ours.nan, ours.inf, ours.negative, ours.failure) == (0, 0, 0, "")
    if case["name"].startswith("torch is ") and torch.__version__.startswith("2.13"):
        kind = case["name"].removeprefix("torch is ")
        assert getattr(tallies["torch"], kind) > 0, "torch's rule fails the same check"


def test_a_case_is_judged_as_the_search_does():
    """The check itself, whatever is on record: torch's rule is infinite where the square of a ratio underflows."""
    inputs = dict(zip(("loc_p", "scale_p", "loc_q", "scale_q"), (0.0, 1e-25, 0.0, 1.0), strict=True))
    case = {"rule": "Normal-Normal", "dtype": "float32", "input": {k: v.hex() for k, v in inputs.items()}}
    tallies = judged(case)
    assert tallies["stablekl"].worst <= 0.75
    assert tallies["torch"].inf == 1
    assert tallies["torch"].worst == math.inf


# ---- running ------------------------------------------------------------------------------------------------------


def test_perform_says_what_broke(monkeypatch):
    task = Task("bd0", "float32", "cpu", Limits(1, 1.0))
    monkeypatch.setattr("stablekl.precision.run.explore", lambda *a: [][0])
    (found,) = perform(task)
    assert found.failure.startswith("IndexError")
    assert found.rule == "bd0"


def test_run_in_this_process_and_in_others():
    tasks = [Task("bd0", d, "cpu", Limits(2, 10.0)) for d in ("float32", "float64")]
    here = {t.dtype: found for t, found in run(tasks, 1)}
    there = {t.dtype: found for t, found in run(tasks, 2)}
    for dtype in ("float32", "float64"):
        for a, b in zip(here[dtype], there[dtype], strict=True):
            assert replace(a, seconds=0.0) == replace(b, seconds=0.0), "the same seed finds the same"


def test_measure_is_public():
    assert set(precision.__all__) >= {"measure", "pairs", "mp", "agreed", "PrecisionError", "Row"}


QUICK = ["--pairs", "Normal-Normal*", "--dtype", "float32", "--examples", "2", "--time-limit", "5", "--jobs", "1"]


def test_the_command(tmp_path, capsys, data):
    files = {kind: tmp_path / f"report.{kind}" for kind in ("json", "html", "csv")}
    assert command.main([*QUICK, *(x for kind, f in files.items() for x in (f"--{kind}", str(f)))]) == 0
    out = capsys.readouterr().out
    assert "Normal-Normal" in out
    assert f"torch {torch.__version__}" in out
    found = json.loads(files["json"].read_text())
    assert [(r["rule"], r["impl"]) for r in found] == [("Normal-Normal", "torch"), ("Normal-Normal", "stablekl")]
    assert found[0]["worst_ulp"] > 1e3 > 1 > found[1]["worst_ulp"]
    assert files["html"].read_text().count("<img ") == 2
    assert files["csv"].read_text().count("\n") == 3


def test_check(capsys, data):
    data.mkdir()
    entry = {"rule": "Normal-Normal", "dtype": "float32", "mode": "eager", "worst_ulp": 0.5}
    (data / "ratchet.json").write_text(json.dumps([entry]))
    assert command.main([*QUICK, "--check"]) == 0
    assert "2 rows checked, 0 regressions" in capsys.readouterr().out
    (data / "ratchet.json").write_text(json.dumps([entry | {"worst_ulp": 0.01}]))
    assert command.main([*QUICK, "--check"]) == 1
    assert "REGRESSION Normal-Normal, float32" in capsys.readouterr().out


def test_record_then_check(capsys, data):
    assert command.main([*QUICK, "--record"]) == 0
    assert set(ratchet.ratchet()) == {("Normal-Normal", "float32", "eager")}
    assert command.main([*QUICK, "--check"]) == 0


def test_list(capsys):
    assert command.main(["--list"]) == 0
    assert capsys.readouterr().out.splitlines() == list(catalogue())
    assert command.main(["--list", "--pairs", "gradient gamma*"]) == 0
    assert capsys.readouterr().out == "gradient Gamma-Gamma\n"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--pairs", "nonsense"], "no rule matches"),
        (["--list", "--pairs", "nonsense"], "no rule matches"),
        (["--pairs", "[/red]"], "no rule matches '[/red]'"),
        (["--exhaustive", "--pairs", "nonsense"], "no rule matches 'nonsense'"),
        (["--exhaustive", "--check"], "does not go with"),
        (["--examples", "0"], "positive"),
        (["--device", "meta"], "--device meta: torch cannot compute there"),
        (["--json", "/nowhere/at/all.json"], "cannot write /nowhere/at/all.json"),
        (["--dtype", "int8"], "--dtype int8"),
    ],
)
def test_options_that_make_no_sense(options, says, capsys):
    assert command.main(options) == 2
    assert says in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said(capsys):
    assert command.main(["--device", "cuda"]) == 2
    assert "--device cuda: torch cannot compute there" in capsys.readouterr().err


def test_the_limits_are_shared_out(data):
    options = command.arguments().parse_args(["--pairs", "bd0,expm1mx", "--time-limit", "60", "--seed", "3"])
    tasks = command.tasks(options, 2)
    assert [(t.rule, t.dtype) for t in tasks] == [(r, d) for r in ("expm1mx", "bd0") for d in ("float32", "float64")]
    assert {t.limits for t in tasks} == {Limits(100, 30.0, 3)}
    options = command.arguments().parse_args(["--pairs", "bd0", "--check"])
    with pytest.raises(ValueError, match="on record"):
        command.tasks(options, 2)


def test_help():
    done = subprocess.run(
        [sys.executable, "-m", "stablekl.precision", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    options = "html json check pairs dtype examples seed time-limit device exhaustive csv jobs list compiled record"
    assert [o for o in options.split() if f"--{o}" not in done.stdout] == []
