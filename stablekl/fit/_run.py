"""EM from a start to convergence: passes over all samples, or over one batch after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .._progress import Progress
from ..mixtures.square_root import lower_square_root
from ._model import CovarianceType, Model, scale_of
from ._samples import Samples
from ._squares import collect_squares, squares_are_safe
from ._start import Subsample
from ._steps import Sums, collect, maximised, posterior

__all__ = ["CollapseError", "Options", "Run", "by_weight", "from_labels", "run"]

# Numbers in a chunk of y: the caches of a CPU hold it, and a GPU is busy with it.
_CPU_CHUNK, _GPU_CHUNK = 2**19, 2**25
# A component with less than this much of the lightest sample is dead, and is given half of the largest one; so many
# times its number in a run.
_DEAD, _RESEEDS = 0.5, 2
# In a start every component takes this many of an average component's samples from all groups together, and their
# pooled factor this share of that of all samples: no covariance is singular.
_SHARED, _START = 0.1, 1e-6
# A variance this many times smaller than all samples' is on its way to 0.
_VANISHED = 1e26
# Stepwise EM: the n-th batch counts n^-0.7.
_FORGETTING = 0.7


class CollapseError(ValueError):
    """A component's likelihood has become infinite."""


class Options(NamedTuple):
    """How to iterate; as in `stablekl.fit.gaussian_mixture`."""

    max_iter: int
    tol: float
    penalty: float
    batch_size: int | None
    seed: int


class Run(NamedTuple):
    """Where EM ended.

    Attributes:
        model: the mixture.
        history: mean log-densities in standard units at every iteration's start, and at the end.
        objective: the last one less the penalty.
        converged: whether the tolerance was met.
        iterations: M-steps, or passes of stepwise EM.
        collapsed: which components are held up by the penalty alone in some direction, ``(K,)``.
        responsibilities: ``(N, K)`` of this process's samples, or None of a stream.
    """

    model: Model
    history: list[float]
    objective: float
    converged: bool
    iterations: int
    collapsed: Tensor
    responsibilities: Tensor | None


def by_weight(found: Run) -> Run:
    """The same with the components in order of falling weight."""
    order = found.model.log_weights.argsort(descending=True, stable=True)
    kind, log_weights, loc, scale = found.model
    scale = scale if kind == "tied" else scale[order]
    responsibilities = None if found.responsibilities is None else found.responsibilities[:, order]
    model = Model(kind, log_weights[order], loc[order], scale)
    return found._replace(model=model, collapsed=found.collapsed[order], responsibilities=responsibilities)


def from_labels(kind: CovarianceType, sub: Subsample, labels: Tensor, count: int, pooled: Tensor) -> Model:
    """The mixture of the groups that the labels make; a small group takes after the others."""
    z, w = sub.z, sub.weights
    size = torch.zeros(count, dtype=z.dtype, device=z.device).index_add_(0, labels, w)
    sums = torch.zeros(count, z.shape[1], dtype=z.dtype, device=z.device).index_add_(0, labels, z * w.unsqueeze(-1))
    loc = sums / size.clamp(min=torch.finfo(z.dtype).tiny).unsqueeze(-1)
    rest = (z - loc[labels]) * w.sqrt().unsqueeze(-1)
    total = float(w.sum())
    within = lower_square_root(torch.cat([rest / math.sqrt(total), _START * pooled.mT])).mT
    prior = _SHARED * total / count
    groups = [torch.cat([rest[labels == k], math.sqrt(prior) * within]) for k in range(count)]
    if kind == "tied":
        scale = scale_of(kind, within.unsqueeze(0))
    else:
        scale = torch.cat([scale_of(kind, g.unsqueeze(0)) for g in groups])
        scale = scale / (size + prior).sqrt().reshape(-1, *(1,) * (scale.ndim - 1))
    return Model(kind, torch.log((size + prior) / (size + prior).sum()), loc, scale)


def run(samples: Samples, model: Model, options: Options, progress: Progress) -> Run:
    """EM until the mean penalised log-density rises by less than the tolerance."""
    em = _Em(samples, options)
    history: list[float] = []
    before: float | None = None
    converged = False
    for _ in range(options.max_iter):
        value, objective, new = em.epoch(model) if options.batch_size else em.iteration(model)
        history.append(value)
        progress.update(len(history) / options.max_iter, f"iteration {len(history)}, log-likelihood {value:.6g}")
        model, split = em.reseeded(new)
        converged = before is not None and not split and abs(objective - before) < options.tol
        before = None if split else objective
        if converged:
            break
    value, responsibilities = em.final(model)
    objective = value - options.penalty * model.penalty(samples.pooled)
    collapsed = em.collapsed(model)
    return Run(model, [*history, value], objective, converged, len(history), collapsed, responsibilities)


class _Em:
    def __init__(self, samples: Samples, options: Options) -> None:
        self.samples, self.options = samples, options
        self.left: int | None = None  # splits
        self.updates = 0

    def rows(self, numbers: int) -> int:
        """Rows in a chunk that needs so many numbers for each."""
        size = _CPU_CHUNK if self.samples.centre.device.type == "cpu" else _GPU_CHUNK
        return max(64, size // numbers)

    def sums(self, model: Model, shift: Tensor | None = None) -> Sums:
        if shift is None and squares_are_safe(model, self.samples.reach):
            found = collect_squares(model, self.samples.chunks(self.rows(sum(model.loc.shape))))
        else:
            found = collect(model, self.samples.chunks(self.rows(model.loc.numel())), shift)
        return found.unpacked(self.samples.processes.summed(found.packed()))

    def iteration(self, model: Model) -> tuple[float, float, Model]:
        """Mean log-density and objective of the model, and the next one."""
        sums = self.sums(model)
        value = float(sums.log_likelihood / sums.total)
        objective = value - self.options.penalty * model.penalty(self.samples.pooled)
        pooled, penalty = self.samples.pooled, self.options.penalty
        new = maximised(model, sums, pooled, penalty)
        if new is None:
            shift = sums.first / sums.size.clamp(min=torch.finfo(sums.size.dtype).tiny).unsqueeze(-1)
            new = maximised(model, self.sums(model, shift), pooled, penalty, shift)
        return value, objective, self.checked(new)

    def epoch(self, model: Model) -> tuple[float, float, Model]:
        """The same by stepwise EM: every batch moves the model.

        With the component itself as what was seen before, moments y of mean 0 and covariance I, an update is an
        ordinary M-step of (1 - g) times those sums and g times the batch's; the penalty's share is g as well.
        """
        total, log_likelihood = 0.0, 0.0
        for batch in self.batches(model):
            sums = collect(model, batch)
            sums = sums.unpacked(self.samples.processes.summed(sums.packed()))
            weight = float(sums.total)
            total += weight
            log_likelihood += float(sums.log_likelihood)
            if weight == 0:
                continue
            self.updates += 1
            g = (self.updates + 1) ** -_FORGETTING
            mixed = _as_sums(model) * (1 - g) + sums * (g / weight)
            new = maximised(model, mixed, self.samples.pooled, g * self.options.penalty)
            if new is None:
                shift = torch.zeros_like(model.loc)
                new = maximised(model, mixed, self.samples.pooled, g * self.options.penalty, shift)
            model = self.checked(new)
        value = log_likelihood / total
        return value, value - self.options.penalty * model.penalty(self.samples.pooled), model

    def batches(self, model: Model) -> Iterator[list[tuple[Tensor, Tensor | None]]]:
        """Batches of this process, and empty ones while another process has some."""
        own = self.own_batches(model)
        while True:
            batch = next(own, [])
            left = self.samples.processes.summed(torch.tensor(float(bool(batch))))
            if not left:
                return
            yield batch

    def own_batches(self, model: Model) -> Iterator[list[tuple[Tensor, Tensor | None]]]:
        size = self.options.batch_size or 1
        rows = self.samples.rows
        if rows is not None:
            generator = torch.Generator().manual_seed(self.options.seed + self.updates)
            for index in torch.randperm(rows, generator=generator).split(size):
                yield [self.samples.taken(part) for part in index.split(self.rows(model.loc.numel()))]
            return
        batch, count = [], 0
        for z, w in self.samples.chunks(min(size, self.rows(model.loc.numel()))):
            batch.append((z, w))
            count += len(z)
            if count >= size:
                yield batch
                batch, count = [], 0
        if batch:
            yield batch

    def checked(self, model: Model | None) -> Model:
        """ValueError for a component that has shrunk away, since nothing held it up."""
        if model is None:
            raise ArithmeticError("a shifted M-step has no result")
        pulls = model.pulls(self.samples.pooled)
        most = pulls.diagonal(dim1=-2, dim2=-1).amax(-1) if model.triangular else pulls.amax(-1)
        bad = ~(most < _VANISHED)
        if bool(bad.any()):
            k = int(bad.nonzero()[0])
            raise CollapseError(
                f"component {k} has collapsed: its samples span fewer than {self.samples.dim} dimensions, and its "
                f"likelihood is infinite. Fit fewer components, or give a penalty above {self.options.penalty:g}."
            )
        return model

    def reseeded(self, model: Model) -> tuple[Model, bool]:
        """The model with dead components put to work, and whether there were any."""
        self.left = _RESEEDS * len(model.loc) if self.left is None else self.left
        alone = math.log(_DEAD * self.samples.lightest)
        split = False
        for k in (model.log_weights < alone).nonzero().flatten().tolist():
            if self.left == 0:
                break
            self.left -= 1
            split = True
            model = _split(model, int(model.log_weights.argmax()), k)
        return model, split

    def collapsed(self, model: Model) -> Tensor:
        """Where the penalty is more than half of a variance."""
        pulls = model.pulls(self.samples.pooled)
        most = torch.linalg.eigvalsh(pulls)[..., -1] if model.triangular else pulls.amax(-1)
        weight = 2 * self.options.penalty
        members = torch.ones_like(most) if model.kind == "tied" else model.log_weights.exp()
        return (weight / (members + weight) * most > 0.5).expand(model.log_weights.shape)

    def final(self, model: Model) -> tuple[float, Tensor | None]:
        """Mean log-density, and responsibilities of a tensor."""
        total = log_likelihood = torch.zeros_like(model.log_weights[0])
        parts: list[Tensor] | None = None if self.samples.rows is None else []
        for z, w in self.samples.chunks(self.rows(model.loc.numel())):
            _, r, log_density = posterior(model, z)
            if parts is not None:
                parts.append(r.mT.to(self.samples.dtype))
            total = total + (len(z) if w is None else w.sum())
            log_likelihood = log_likelihood + (log_density if w is None else w * log_density).sum()
        total, log_likelihood = self.samples.processes.summed(torch.stack([total, log_likelihood]))
        return float(log_likelihood / total), torch.cat(parts) if parts else None


def _as_sums(model: Model) -> Sums:
    """What samples of the model itself would sum to, for a total weight of 1."""
    size = model.log_weights.exp()
    d = model.loc.shape[-1]
    eye = torch.eye(d, dtype=size.dtype, device=size.device)
    second = {
        "full": size.reshape(-1, 1, 1) * eye,
        "tied": eye.unsqueeze(0),
        "diag": size.unsqueeze(-1).expand(model.loc.shape),
        "spherical": d * size.unsqueeze(-1),
    }[model.kind]
    one = torch.ones_like(size[0])
    return Sums(one, 0 * one, size, torch.zeros_like(model.loc), second)


def _split(model: Model, whole: int, dead: int) -> Model:
    """Two halves of a component, moved apart along its longest axis, one of them in place of a dead one."""
    tied = model.scale.shape[0] == 1 and len(model.loc) > 1
    values, vectors = torch.linalg.eigh(model.covariance()[0 if tied else whole])
    apart = 0.5 * values[-1].sqrt() * vectors[:, -1]
    log_weights, loc, scale = (x.clone() for x in model[1:])
    log_weights[[whole, dead]] = log_weights[whole] - torch.log(torch.full_like(log_weights[whole], 2.0))
    loc[dead] = loc[whole] + apart
    loc[whole] -= apart
    if not tied:
        scale[dead] = scale[whole]
    return Model(model.kind, torch.log_softmax(log_weights, 0), loc, scale)
