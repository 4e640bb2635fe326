"""The search for the worst input: hypothesis over batches, then a climb over bit patterns from the worst found.

Every parameter set of a batch is evaluated on the device and looked at for NaN, infinities and signs. mpmath is too slow to
judge them all: it judges *suspects* and a random sample. For dtypes narrower than float64 the suspects are the rows that
differ most from the same rule in float64; for float64, those where implementations differ most from each other. No
error is ever reported that mpmath has not confirmed.
"""

from __future__ import annotations

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
CLIMB = 48  # neighbours tried in a step of the climb
PATIENCE = 6  # steps without progress before it ends
SAMPLES_KEPT = 4000  # points of the report's plots


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
    """What was found of one implementation of a rule.

    Attributes:
        worst: the largest error that mpmath confirmed, in the subject's unit; NaN before the first.
        row: the input that gives it.
        value: what was computed there.
        truth: the true result there.
        evaluations: parameter sets evaluated, each looked at for NaN, infinities and signs.
        judged: those of them compared with mpmath.
        nan: results that are NaN.
        inf: results that are infinite where the truth is a number of the dtype.
        negative: results below zero, of a divergence.
        defects: an input for each of the three that occurred.
        unstable: rows whose bits depend on the batch they stand in.
        failure: what the rule raised, where it could not be evaluated.
        samples: (distance of p from q, scale of the input, error) of the judged.
    """

    worst: float = math.nan
    row: Batch | None = None
    value: list[float] = field(default_factory=list)
    truth: list[Number] = field(default_factory=list)
    evaluations: int = 0
    judged: int = 0
    nan: int = 0
    inf: int = 0
    negative: int = 0
    defects: dict[str, Batch] = field(default_factory=dict)
    unstable: int = 0
    failure: str = ""
    samples: list[tuple[float, float, float]] = field(default_factory=list)


@dataclass
class _Search:
    subject: Subject
    dtype: torch.dtype
    device: torch.device
    limits: Limits
    compiled: bool = False
    started: float = field(default_factory=time.monotonic)
    tallies: dict[str, Tally] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rules: dict[str, Rule] = {
            name: torch.compile(rule, dynamic=True) if self.compiled else rule
            for name, rule in self.subject.rules.items()
        }
        self.tallies = {name: Tally() for name in self.rules}
        self.rng = np.random.default_rng(self.limits.seed)
        self.truths: dict[tuple[Any, ...], list[list[Number]]] = {}

    def spent(self, part: float = 1.0) -> bool:
        return time.monotonic() - self.started > part * self.limits.seconds

    # ---- one batch ------------------------------------------------------------------------------------------------

    def evaluate(self, batch: Batch) -> dict[str, tuple[Tensor, ...]]:
        """The results of each implementation that works, on the CPU in float64."""
        placed = tuple(x.to(self.device) for x in batch)
        results = {}
        for name, rule in self.rules.items():
            tally = self.tallies[name]
            try:
                results[name] = tuple(r.cpu().double() for r in outputs(rule, placed))
            except Exception as error:  # a host's rule may raise anything: that is a finding, not our failure
                tally.failure = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return results

    def screen(self, batch: Batch) -> tuple[Tensor, ...] | None:
        """Float64 results for narrower inputs, by stablekl's rule where there is one."""
        if self.dtype == torch.float64:
            return None
        rules = self.subject.rules
        try:
            return outputs(rules.get("stablekl") or next(iter(rules.values())), tuple(x.double() for x in batch))
        except Exception:  # the rule does not work: `evaluate` has said so
            return None

    def suspicion(self, name: str, results: dict[str, tuple[Tensor, ...]], screen: tuple[Tensor, ...] | None) -> Tensor:
        """For each row how wrong it may be: by float64, or by another implementation."""
        mine = results[name]
        if screen is not None:
            others = [screen]
        else:
            others = [r for other, r in results.items() if other != name]
        rows = torch.zeros(len(mine[0]), dtype=torch.float64)
        for other in others:
            for a, b in zip(mine, other, strict=True):
                # components are judged by the largest of their group
                top = torch.nan_to_num(b).abs().amax(-1, keepdim=True).expand_as(b)
                gap = rough_ulps(
                    torch.where((a - b).isfinite(), top + (a - b), a), torch.where(b.isfinite(), top, b), self.dtype
                )
                rows = torch.maximum(rows, gap.amax(-1))
        return rows

    def count(
        self, name: str, batch: Batch, result: tuple[Tensor, ...], screen: tuple[Tensor, ...] | None
    ) -> list[int]:
        """Count NaN and negative results; the rows of infinite ones, which are to be judged, unless float64 has done so."""
        tally, joined = self.tallies[name], torch.cat(result, -1)
        tally.evaluations += len(joined)
        nan, below = joined.isnan().any(-1), (joined < 0).any(-1)
        found = {"nan": nan} | ({"negative": below} if self.subject.divergence else {})
        infinite = joined.isinf().any(-1)
        if screen is not None:
            other = torch.cat(screen, -1)
            info = torch.finfo(self.dtype)
            found["inf"] = infinite & (other.isfinite() & (other.abs() < info.max)).all(-1)
            infinite = infinite & False
        for kind, rows in found.items():
            self.note(name, kind, batch, rows)
        return [int(i) for i in infinite.nonzero().reshape(-1)]

    def note(self, name: str, kind: str, batch: Batch, rows: Tensor) -> None:
        tally, hits = self.tallies[name], int(rows.sum())
        if hits:
            setattr(tally, kind, getattr(tally, kind) + hits)
            tally.defects.setdefault(kind, _row(batch, int(rows.nonzero()[0])))

    def judge(self, batch: Batch, i: int, results: dict[str, tuple[Tensor, ...]], names: Iterable[str]) -> None:
        """Compare row i of the implementations with mpmath."""
        row = _row(batch, i)
        key = tuple(
            x.numpy().tobytes() if x.dtype != torch.bfloat16 else x.view(torch.int16).numpy().tobytes() for x in row
        )
        if key not in self.truths:
            try:
                self.truths[key] = self.subject.truth([x[0] for x in row])
            except PrecisionError:
                return
        truth = self.truths[key]
        values = [x[0] for x in row]
        tops = [max((abs(t) for t in group if mp.isfinite(t)), default=mp.mpf(0)) for group in truth]
        scales = [self.subject.scale(top, values) if self.subject.scale else None for top in tops]
        for name in names:
            computed = [r[i].tolist() for r in results[name]]
            error = max(
                group_error(c, t, self.dtype, scale) for c, t, scale in zip(computed, truth, scales, strict=True)
            )
            self.record(name, row, computed, truth, error)

    def record(
        self, name: str, row: Batch, computed: list[list[float]], truth: list[list[Number]], error: float
    ) -> None:
        tally = self.tallies[name]
        tally.judged += 1
        # a NaN or an infinity that is wrong is the worst there is, and counted as such; beyond them, numbers are ranked
        if not tally.worst >= error:
            flat = [(c, t) for cs, ts in zip(computed, truth, strict=True) for c, t in zip(cs, ts, strict=True)]
            tally.worst, tally.row = error, row
            tally.value, tally.truth = [c for c, _ in flat], [t for _, t in flat]
        if len(tally.samples) < SAMPLES_KEPT and len(truth) == 1 and mp.isfinite(truth[0][0]):
            distance = float(mp.sqrt(2 * abs(truth[0][0])))
            scale = max((float(x.double().abs().max()) for x in row), default=0.0)
            tally.samples.append((distance, scale, error))

    def run(self, batch: Batch) -> dict[str, float]:
        """Evaluate a batch and judge a part of it; the largest error of each implementation."""
        results, screen = self.evaluate(batch), self.screen(batch)
        before = {name: (t.worst, t.judged) for name, t in self.tallies.items()}
        suspects: dict[int, set[str]] = {}
        for name, result in results.items():
            infinite = self.count(name, batch, result, screen)
            doubt = self.suspicion(name, results, screen)
            worst = torch.topk(doubt, min(SUSPECTS, len(doubt))).indices.tolist()
            for i in worst:
                suspects.setdefault(i, set()).update(results)
            budget = SUSPECTS * 30
            for i in infinite[:budget]:
                suspects.setdefault(i, set()).add(name)
        chosen = self.rng.permutation(len(batch[0]))[: max(2, int(SAMPLE / max(1.0, self.subject.cost)))]
        for i in chosen.tolist():
            suspects.setdefault(i, set()).update(results)
        largest: dict[str, float] = {}
        for done, (i, names) in enumerate(suspects.items()):
            if done > 2 and self.spent():
                break
            self.judge(batch, i, results, names)
            if screen is None:
                self.confirm_infinite(batch, i, results, names)
        self.truths.clear()
        for name, tally in self.tallies.items():
            if before[name] != (tally.worst, tally.judged):
                largest[name] = tally.worst
        return largest

    def confirm_infinite(
        self, batch: Batch, i: int, results: dict[str, tuple[Tensor, ...]], names: Iterable[str]
    ) -> None:
        """Count an infinity of float64 that mpmath finds to be wrong."""
        row = _row(batch, i)
        key = tuple(x.numpy().tobytes() for x in row)
        truth = self.truths.get(key)
        if truth is None:
            return
        flat = [t for group in truth for t in group]
        for name in names:
            values = torch.cat([r[i] for r in results[name]]).tolist()
            if any(
                math.isinf(c) and group_error([c], [t], self.dtype) == math.inf
                for c, t in zip(values, flat, strict=True)
            ):
                rows = torch.zeros(len(batch[0]), dtype=torch.bool)
                rows[i] = True
                self.note(name, "inf", batch, rows)

    # ---- the climb ------------------------------------------------------------------------------------------------

    def climb(self, name: str) -> None:
        """From the worst row of an implementation to worse ones, by changes of bits."""
        idle = 0
        while idle < PATIENCE and not self.spent():
            tally = self.tallies[name]
            if tally.row is None or not math.isfinite(tally.worst):
                return
            before = tally.worst
            count = max(4, int(CLIMB / max(1.0, self.subject.cost)))
            changed = self.mutated(tally.row, 4 * CLIMB if self.dtype != torch.float64 else count)
            if changed is None:
                return
            results, screen = self.evaluate(changed), self.screen(changed)
            if name not in results:
                return
            self.count(name, changed, results[name], screen)
            order = torch.argsort(self.suspicion(name, results, screen), descending=True).tolist()
            for i in order[:count]:
                if self.spent():
                    break
                self.judge(changed, i, results, [name])
            self.truths.clear()
            idle = 0 if tally.worst > before else idle + 1

    def mutated(self, row: Batch, count: int) -> Batch | None:
        """Sets that differ from ``row`` in some bits and are valid."""
        changed = []
        bits = int(-math.log2(torch.finfo(self.dtype).eps))
        # a step shared by all parameters keeps p where it was relative to q
        for x in row:
            repeated = x.expand(count, *x.shape[1:]).clone()
            shape = repeated.shape
            steps = np.floor(2.0 ** self.rng.uniform(0, bits + 1, shape)) * self.rng.choice((-1, 1), shape)
            entries = max(1, repeated[0].numel())
            steps *= self.rng.uniform(size=shape) < max(0.5 if entries == 1 else 0, 1.5 / entries)
            pattern = repeated.view(INTEGER[self.dtype]) + torch.from_numpy(steps.astype(np.int64)).to(
                INTEGER[self.dtype]
            )
            value = torch.where(repeated == 0, repeated, pattern.view(self.dtype))
            if entries > 1 and x.ndim == 3 and torch.equal(x, x.mT):
                value = torch.triu(value) + torch.triu(value, 1).mT
            changed.append(value)
        good = self.subject.valid(*changed).nonzero().reshape(-1)
        return tuple(x[good] for x in changed) if len(good) else None

    # ---- bits -----------------------------------------------------------------------------------------------------

    def check_bits(self, batch: Batch) -> None:
        """Count the rows whose bits change with the batch's size, order or layout, or from one run to the next."""
        n = len(batch[0])
        order = torch.from_numpy(self.rng.permutation(n))
        offset = int(self.rng.integers(1, max(2, n // 3)))
        placed = tuple(x.to(self.device) for x in batch)
        there = order.to(self.device)
        for name, rule in self.rules.items():
            if self.tallies[name].failure:
                continue
            plain = torch.cat(outputs(rule, placed), -1)
            strided = tuple(x.repeat_interleave(2, 0)[::2] for x in placed)
            variants = [
                (plain, torch.cat(outputs(rule, placed), -1)),
                (plain[there], torch.cat(outputs(rule, tuple(x[there] for x in placed)), -1)),
                (plain[offset:], torch.cat(outputs(rule, tuple(x[offset:] for x in placed)), -1)),
                (plain, torch.cat(outputs(rule, strided), -1)),
            ]
            differ = sum(int(((a != b) & ~(a.isnan() & b.isnan())).any(-1).sum()) for a, b in variants)
            self.tallies[name].unstable += differ


def _row(batch: Batch, i: int) -> Batch:
    return tuple(x[i : i + 1].cpu() for x in batch)


def rows_of(cases: Sequence[Batch]) -> list[Batch]:
    """Stored cases as batches of one row each."""
    return list(cases)


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
    first = True

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
        nonlocal first
        if not first and search.spent(0.7):
            return
        batch = subject.expand(drawn, dtype) if isinstance(drawn, Plan) else tuple(drawn)
        for name, error in search.run(batch).items():
            if math.isfinite(error):
                hypothesis.target(math.log2(max(error, 2.0**-40)), label=name)
        if first and subject.elementwise:
            search.check_bits(batch)
        first = False

    look()
    for name in search.tallies:
        search.climb(name)
    return search.tallies
