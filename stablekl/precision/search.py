"""The search for the worst input: hypothesis over batches, then a climb over bit patterns from the worst found.

Every parameter set of a batch is evaluated on the device and looked at for NaN, infinities and signs. mpmath is too
slow to judge them all: it judges *suspects* and a random sample. For dtypes narrower than float64 the suspects are the
rows that differ most from the same rule in float64; for float64, those where implementations differ most from each
other. No error is ever reported that mpmath has not confirmed.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import numpy as np
import torch
from hypothesis import HealthCheck, Phase
from torch import Tensor

from .batches import INTEGER, Batch, Plan
from .metrics import group_error, rough_ulps
from .references.context import Number, PrecisionError, mp
from .subject import Rule, Subject, outputs

__all__ = ["Limits", "Tally", "explore"]

SUSPECTS, SAMPLE = 6, 24  # judged in a batch: for each implementation by suspicion, and at random
INFINITIES = 200  # infinite float64 results that mpmath looks at in a batch
CLIMB, PATIENCE = 48, 6  # neighbours judged in a step of the climb; steps without progress before it ends
SAMPLES_KEPT = 4000  # points of the report's plots
SIZES, LARGE = (1, 2, 7, 17), 40_000  # of batches that must give a row the bits that any other gives it

Results = dict[str, tuple[Tensor, ...]]  # of each implementation: tensors (n, components), float64, on the CPU


@dataclass(frozen=True)
class Limits:
    """How long to look.

    Attributes:
        examples: batches that hypothesis draws, at most.
        seconds: for the whole subject, at most; one batch is always evaluated.
        seed: of every random choice.
    """

    examples: int = 100
    seconds: float = math.inf
    seed: int = 0


@dataclass
class Tally:
    """What was found of one implementation of a rule; the attributes mean what they do in `rows.Row`."""

    worst: float = math.nan
    row: Batch | None = None
    value: list[float] = field(default_factory=list)
    truth: list[Number] = field(default_factory=list)
    on_record: float | None = None
    evaluations: int = 0
    judged: int = 0
    unsettled: int = 0
    nan: int = 0
    inf: int = 0
    negative: int = 0
    defects: dict[str, Batch] = field(default_factory=dict)
    unstable: int = 0
    device_gap: float | None = None
    failure: str = ""
    samples: list[tuple[float, float, float]] = field(default_factory=list)
    summit: tuple[float, Batch] | None = None  # the largest finite error, which the climb starts from

    def note(self, kind: str, batch: Batch, hits: Tensor) -> None:
        """Count rows with a defect of one kind, and keep the first."""
        if count := int(hits.sum()):
            setattr(self, kind, getattr(self, kind) + count)
            self.defects.setdefault(kind, _row(batch, int(hits.nonzero()[0])))

    def record(self, row: Batch, computed: list[list[float]], truth: list[list[Number]], error: float) -> None:
        """Take in a judged row."""
        self.judged += 1
        if not self.worst >= error:  # NaN before the first
            self.worst, self.row = error, row
            self.value, self.truth = [c for group in computed for c in group], [t for group in truth for t in group]
        if math.isfinite(error) and (self.summit is None or error > self.summit[0]):
            self.summit = error, row
        if len(self.samples) < SAMPLES_KEPT and len(truth) == 1 and mp.isfinite(truth[0][0]):
            distance = float(mp.sqrt(2 * abs(truth[0][0])))
            self.samples.append((distance, max(float(x.double().abs().max()) for x in row), error))


class _Search:
    """One subject, dtype and device."""

    def __init__(self, subject: Subject, dtype: torch.dtype, device: torch.device, limits: Limits, compiled: bool):
        self.subject, self.dtype, self.device, self.limits = subject, dtype, device, limits
        self.rules: dict[str, Rule] = {
            name: torch.compile(rule, dynamic=True) if compiled else rule for name, rule in subject.rules.items()
        }
        self.tallies = {name: Tally() for name in self.rules}
        self.rng = np.random.default_rng(limits.seed)
        self.started = time.monotonic()

    def spent(self, part: float = 1.0) -> bool:
        return time.monotonic() - self.started > part * self.limits.seconds

    def affordable(self, count: int) -> int:
        """Fewer, but one at least, of references that take longer than a millisecond."""
        return max(1, int(count / max(1.0, self.subject.cost**0.5)))

    # ---- one batch ------------------------------------------------------------------------------------------------

    def results(self, rule: Rule, batch: Batch) -> tuple[Tensor, ...]:
        """What a rule makes of a copy of a batch, on the CPU in float64; an error if it changes the copy."""
        placed = tuple(x.to(self.device, copy=True) for x in batch)
        found = outputs(rule, placed)
        if not all(
            torch.equal(torch.nan_to_num(x), torch.nan_to_num(y.cpu())) for x, y in zip(batch, placed, strict=True)
        ):
            raise ValueError("the rule changes its inputs in place")
        return tuple(r.cpu().double() for r in found)

    def evaluate(self, batch: Batch) -> Results:
        """The results of each implementation that works."""
        found = {}
        for name, rule in self.rules.items():
            try:
                found[name] = self.results(rule, batch)
            except Exception as error:  # a rule may raise anything: that is a finding, not our failure
                self.tallies[name].failure = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return found

    def screen(self, batch: Batch) -> tuple[Tensor, ...] | None:
        """Float64 results for narrower inputs, by stablekl's rule where there is one."""
        if self.dtype == torch.float64:
            return None
        rules = self.subject.rules
        try:
            return outputs(rules.get("stablekl") or next(iter(rules.values())), tuple(x.double() for x in batch))
        except Exception:  # the rule does not work: `evaluate` has said so
            return None

    def suspicion(self, name: str, batch: Batch, results: Results, screen: tuple[Tensor, ...] | None) -> Tensor:
        """For each row how wrong it may be, about in the subject's unit: by float64, or by another implementation."""
        others = [screen] if screen is not None else [r for other, r in results.items() if other != name]
        doubt = torch.zeros(len(results[name][0]), dtype=torch.float64)
        for other in others:
            for a, b in zip(results[name], other, strict=True):
                # components are judged by the largest of their group, results of absolute error by 1 at least
                top = torch.nan_to_num(b).abs().amax(-1, keepdim=True).clamp(min=self.subject.floor).expand_as(b)
                shifted = torch.where((a - b).isfinite(), top + (a - b), a)
                gap = rough_ulps(shifted, torch.where(b.isfinite(), top, b), self.dtype)
                doubt = torch.maximum(doubt, gap.amax(-1))
        return doubt / self.subject.kappa(*batch) if self.subject.kappa else doubt

    def count(self, name: str, batch: Batch, results: Results, screen: tuple[Tensor, ...] | None) -> list[int]:
        """Count what needs no mpmath; the rows that it must judge first: one of each defect, and infinities."""
        tally, joined = self.tallies[name], torch.cat(results[name], -1)
        tally.evaluations += len(joined)
        found = {"nan": joined.isnan().any(-1)}
        if self.subject.divergence:
            found["negative"] = (joined < 0).any(-1)
        infinite = joined.isinf().any(-1)
        if screen is not None:
            wide = torch.cat(screen, -1)
            differs = (wide.abs() < torch.finfo(self.dtype).max) | (wide.sign() != joined.sign())
            found["inf"] = (joined.isinf() & ~wide.isnan() & differs).any(-1)
        for kind, hits in found.items():
            tally.note(kind, batch, hits)
        first = [int(hits.nonzero()[0]) for hits in found.values() if hits.any()]
        if self.subject.divergence and first:
            first.append(int(torch.nan_to_num(joined[:, 0], nan=0.0).argmin()))
        return first + (infinite.nonzero().reshape(-1).tolist()[:INFINITIES] if screen is None else [])

    def judge(self, batch: Batch, i: int, results: Results, names: Iterable[str], screened: bool) -> dict[str, float]:
        """Compare row i of the implementations with mpmath; their errors."""
        row, errors = _row(batch, i), {}
        values = [x[0] for x in row]
        try:
            truth = self.subject.truth(values)
        except PrecisionError:
            for name in names:
                self.tallies[name].unsettled += 1
            return {}
        tops = [max((abs(t) for t in group if mp.isfinite(t)), default=mp.mpf(0)) for group in truth]
        scales = [self.subject.scale(top, values) if self.subject.scale else None for top in tops]
        for name in names:
            computed = [r[i].tolist() for r in results[name]]
            if [len(c) for c in computed] != [len(t) for t in truth]:
                shapes = [len(c) for c in computed], [len(t) for t in truth]
                self.tallies[name].failure = "results of {} numbers a row, where the truth has {}".format(*shapes)
                continue
            groups = zip(computed, truth, scales, strict=True)
            errors[name] = max(group_error(c, t, self.dtype, scale) for c, t, scale in groups)
            self.tallies[name].record(row, computed, truth, errors[name])
            pairs = [(c, t) for cs, ts in zip(computed, truth, strict=True) for c, t in zip(cs, ts, strict=True)]
            if not screened and any(math.isinf(c) and group_error([c], [t], self.dtype) for c, t in pairs):
                self.tallies[name].note("inf", row, torch.tensor([True]))
        return errors

    def run(self, batch: Batch) -> dict[str, float]:
        """Evaluate a batch and judge a part of it; the largest finite error in it of each implementation."""
        results, screen = self.evaluate(batch), self.screen(batch)
        suspects: dict[int, set[str]] = {}
        for name in results:
            for i in self.count(name, batch, results, screen):
                suspects.setdefault(i, set()).add(name)
        everyone = set(results)
        for name in results:
            doubt = self.suspicion(name, batch, results, screen)
            for i in torch.topk(doubt, min(self.affordable(SUSPECTS), len(doubt))).indices.tolist():
                suspects.setdefault(i, set()).update(everyone)
        for i in self.rng.permutation(len(batch[0]))[: self.affordable(SAMPLE)].tolist():
            suspects.setdefault(i, set()).update(everyone)
        largest: dict[str, float] = {}
        for done, (i, names) in enumerate(suspects.items()):
            if done > 2 and self.spent():
                break
            for name, error in self.judge(batch, i, results, sorted(names), screen is not None).items():
                if math.isfinite(error):
                    largest[name] = max(error, largest.get(name, 0.0))
        return largest

    # ---- the climb ------------------------------------------------------------------------------------------------

    def climb(self, name: str) -> None:
        """From the worst row of an implementation to worse ones, by changes of bits."""
        tally, idle = self.tallies[name], 0
        judged = max(4, self.affordable(CLIMB))
        tried = 4 * CLIMB if self.dtype != torch.float64 else judged  # float64 has nothing to choose them by
        while idle < PATIENCE and not self.spent() and tally.summit is not None:
            before, changed = tally.summit[0], self.mutated(tally.summit[1], tried)
            results = self.evaluate(changed) if len(changed[0]) else {}
            if name not in results:
                return
            screen = self.screen(changed)
            chosen = dict.fromkeys(self.count(name, changed, results, screen)[:judged])
            order = torch.argsort(self.suspicion(name, changed, results, screen), descending=True)
            chosen |= dict.fromkeys(order.tolist()[:judged])
            for i in chosen:
                if self.spent():
                    break
                self.judge(changed, i, results, [name], screen is not None)
            idle = 0 if tally.summit[0] > before else idle + 1

    def mutated(self, row: Batch, count: int) -> Batch:
        """Sets that differ from ``row`` by up to a factor of two in some entries, those that are valid."""
        changed, bits = [], int(-math.log2(torch.finfo(self.dtype).eps))
        for x in row:
            repeated = x.expand(count, *x.shape[1:]).clone()
            entries = max(1, x[0].numel())
            steps = np.floor(2.0 ** self.rng.uniform(0, bits + 1, repeated.shape))
            steps *= self.rng.choice((-1, 1), repeated.shape)
            steps *= self.rng.uniform(size=repeated.shape) < (0.5 if entries == 1 else 1.5 / entries)
            pattern = repeated.view(INTEGER[self.dtype]) + torch.from_numpy(steps).to(INTEGER[self.dtype])
            value = pattern.view(self.dtype)
            value = torch.where((repeated == 0) | (value.sign() != repeated.sign()), repeated, value)
            if x.ndim > 2 and x.shape[-1] == x.shape[-2] and torch.equal(x, x.mT):
                value = torch.triu(value) + torch.triu(value, 1).mT
            changed.append(value)
        good = self.subject.valid(*changed)
        return tuple(x[good] for x in changed)

    # ---- the same bits, and the same digits on another device -------------------------------------------------------

    def check_bits(self, batch: Batch) -> None:
        """Count the rows whose bits change with the batch's size, order or layout, or from one run to the next."""
        n = len(batch[0])
        order = torch.from_numpy(self.rng.permutation(n))
        whole = torch.arange(n)
        many = whole.repeat(-(-LARGE // n))  # more than torch gives to one thread
        places = [whole, order, whole[n // 3 :], many, *(whole[:size] for size in SIZES if size < n)]
        variants = [(place, tuple(x[place] for x in batch)) for place in places]
        variants.append((whole, tuple(x.repeat_interleave(2, 0)[::2] for x in batch)))
        for name, rule in self.rules.items():
            if self.tallies[name].failure:
                continue
            plain, moved = torch.cat(self.results(rule, batch), -1), torch.zeros(n, dtype=torch.bool)
            for place, inputs in variants:
                a, b = plain[place], torch.cat(self.results(rule, inputs), -1)
                moved[place[((a != b) & ~(a.isnan() & b.isnan())).any(-1)]] = True
            self.tallies[name].unstable += int(moved.sum())

    def check_device(self, batch: Batch) -> None:
        """The largest difference from the CPU's results, in ulps of the largest of a group."""
        if self.device.type == "cpu":
            return
        here = self.evaluate(batch)
        for name, results in here.items():
            cpu = tuple(r.double() for r in outputs(self.subject.rules[name], batch))
            gaps = self.suspicion("here", batch, {"here": results, "cpu": cpu}, cpu)
            self.tallies[name].device_gap = float(gaps.max())


class _EnoughError(Exception):
    """Time is up: to return would leave hypothesis drawing all the batches that are left."""


def _row(batch: Batch, i: int) -> Batch:
    return tuple(x[i : i + 1].cpu() for x in batch)


def explore(
    subject: Subject,
    dtype: torch.dtype,
    device: torch.device,
    limits: Limits,
    cases: Sequence[Batch] = (),
    compiled: bool = False,
) -> dict[str, Tally]:
    """Search for the largest error of each implementation of a subject.

    Args:
        subject: what to measure.
        dtype: of the inputs.
        device: where rules are evaluated; truths are mpmath's.
        limits: how long.
        cases: stored inputs, batches of one row, judged before anything else.
        compiled: evaluate the rules under ``torch.compile``.

    Returns:
        What was found of each implementation.
    """
    search = _Search(subject, dtype, device, limits, compiled)
    for case in cases:
        search.run(case)
    for tally in search.tallies.values():
        tally.on_record = tally.worst if cases else None
    seen = 0

    @hypothesis.seed(limits.seed)
    @hypothesis.settings(
        max_examples=limits.examples,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.target),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @hypothesis.given(subject.draw)
    def look(drawn: Any) -> None:
        nonlocal seen
        if seen and search.spent(0.7):
            raise _EnoughError
        batch = subject.expand(drawn, dtype) if isinstance(drawn, Plan) else tuple(drawn)
        if not len(batch[0]):
            return
        for name, error in search.run(batch).items():
            if math.isfinite(error):
                hypothesis.target(math.log2(max(error, 2.0**-40)), label=name)
        if not seen:
            search.check_device(batch)
            if subject.elementwise:
                search.check_bits(batch)
        seen += 1

    with contextlib.suppress(_EnoughError):
        look()
    for name in search.tallies:
        search.climb(name)
    return search.tallies
