"""What a second reader found wrong with the search, each as a case it must catch."""

from __future__ import annotations

import math

import hypothesis
import pytest
import torch

from stablekl.precision import ratchet
from stablekl.precision.measure import measure
from stablekl.precision.references.context import mp
from stablekl.precision.rows import Row, Task
from stablekl.precision.search import Limits
from stablekl.precision.subject import differentiated
from stablekl.precision.subjects import catalogue
from tests.test_precision_search import F32, F64, found, quotient


def at_one_row(what, row=777):
    """A quotient with one result replaced, wherever in the batch it may be asked for."""

    def rule(a, b):
        out = a / b
        if len(out) > row:
            out[row] = what
        return out

    return rule


def test_the_target_is_the_error_of_the_batch_not_the_largest_so_far(monkeypatch):
    scores = []
    monkeypatch.setattr(hypothesis, "target", lambda score, label: scores.append(score))
    rule = torch.compiler.disable(lambda a, b: (a / b) * (1 + 2.0**-30 * (a > 2.0**20)))
    found(rule, examples=20)
    assert len(scores) > 5
    assert scores != sorted(scores), "a running maximum would never fall"


def test_a_nan_does_not_end_the_search():
    tally = found(at_one_row(math.nan), examples=20)
    assert tally.nan >= 10
    assert tally.worst == math.inf
    assert tally.summit is not None
    assert 0.4 < tally.summit[0] <= 0.5, "the climb starts from a finite error"


@pytest.mark.parametrize(("what", "kind"), [(math.nan, "nan"), (-1e300, "negative"), (math.inf, "inf")])
@pytest.mark.parametrize("row", [3, 777])
def test_a_defect_is_judged_wherever_it_stands(what, kind, row):
    tally = found(at_one_row(what, row), examples=5)
    assert getattr(tally, kind) >= 1
    assert tally.worst > 1e15


def test_a_rule_that_changes_its_inputs_fails():
    def rule(a, b):
        return (a / b, a.zero_())[0]

    tally = found(rule, examples=3)
    assert "changes its inputs" in tally.failure
    assert math.isnan(tally.worst), "and none of its results counts"


@pytest.mark.parametrize("result", [lambda a, b: (a / b).double(), lambda a, b: a[:, None] / b[None], lambda a, b: 1.0])
def test_a_result_of_another_dtype_or_shape_fails(result):
    tally = found(result, dtype=F32, examples=3)
    assert tally.failure or tally.worst == math.inf
    assert not tally.worst <= 0.5


def test_each_implementation_is_charged_with_its_infinities():
    first, second = found(at_one_row(math.inf), at_one_row(math.inf), examples=5)
    assert first.inf == second.inf >= 1


def test_an_infinity_of_the_wrong_sign_and_one_beside_a_right_one():
    tally = found(lambda a, b: a / b if a.dtype == F64 else torch.full_like(a, -math.inf), dtype=F32, examples=2)
    assert tally.inf == tally.evaluations

    def two(a, b):
        wide = a.dtype == F64
        return torch.stack([a / b if wide else torch.full_like(a, math.inf), torch.full_like(a, 1e300)], -1)

    both = found(two, dtype=F32, examples=2, reference=lambda a, b: [[a / b, mp.mpf(10) ** 300]])
    assert both.inf == both.evaluations


def test_bits_that_depend_on_the_size_of_the_batch():
    for small, large in ((16, 10**9), (0, 20_000)):
        tally = found(lambda a, b, s=small, n=large: a / b * (1 if s < len(a) < n else 1.5), examples=1)
        assert tally.unstable > 0
    assert found(quotient, examples=1).unstable == 0


def test_gradients_stay_inside_the_ranges_of_probabilities():
    subject = catalogue()["gradient Bernoulli-Bernoulli"]
    zero, half = torch.zeros(1, dtype=F64), torch.full((1,), 0.5, dtype=F64)
    assert not subject.valid(zero, half).any()
    assert not subject.valid(half, 1 - zero).any()
    assert subject.valid(half, half).all()


def test_a_reference_that_raises_is_not_dressed_up():
    def reference(a, b):
        raise KeyError("no such thing")

    strategy = hypothesis.strategies.just((torch.ones(3, dtype=F64), torch.ones(3, dtype=F64)))
    with pytest.raises(KeyError, match="no such thing"):
        measure(quotient, reference, strategy, seconds=1)
    with pytest.raises(ValueError, match="Python float"):
        measure(quotient, lambda a, b: [math.log(2)], strategy, seconds=1)
    with pytest.raises(ValueError, match="share"):
        measure(quotient, quotient, hypothesis.strategies.just((torch.tensor(1.0), torch.tensor(1.0))))
    assert measure(quotient, quotient, strategy, seconds=1).worst_ulp <= 0.5, "a batch of three rows"


def test_a_rule_that_is_gone_is_a_regression(tmp_path, monkeypatch):
    monkeypatch.setattr(ratchet, "DATA", tmp_path)
    entry = {"rule": "Normal-Normal", "dtype": "float32", "mode": "eager", "unit": "ulp", "worst_ulp": 0.5}
    ratchet._write("ratchet.json", [entry])
    task = Task("Normal-Normal", "float32", "cpu", Limits())
    assert ratchet.regressions([], [task]) == ["Normal-Normal, float32: stablekl has no rule any more"]
    assert ratchet.regressions([], [Task("Gamma-Gamma", "float32", "cpu", Limits())]) == []


def test_infinities_are_not_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(ratchet, "DATA", tmp_path)
    fields = {name: 0 for name in Row.__dataclass_fields__ if name not in ("samples", "histogram")}
    row = Row(**(fields | {"rule": "x", "impl": "stablekl", "failure": "", "worst_ulp": math.inf}))
    with pytest.raises(ValueError, match="not recorded: x"):
        ratchet.record([row])
    assert not list(tmp_path.iterdir())


def test_a_gradient_is_independent_of_the_batch():
    rule = differentiated(quotient)
    assert found(rule, examples=2, reference=lambda a, b: [[1 / b], [-a / b**2]]).unstable == 0
