r"""Control variates for the information of a mixture: functions of a point whose means are known exactly.

With r_k(x) the posterior weights of the components at x, the information is the mean under the mixture of a function of
r alone, g = sum_k r_k log(r_k/w_k). So are these, and their means are closed forms or one-dimensional integrals:

====================================  ======================================================================
mean over m of                        is
====================================  ======================================================================
sum_k r_k (log w_k - c)               sum_k w_k log w_k - c, c the mean of the log w_k
sum over pairs of the pair's entropy  the sum of the pairs' label entropies given the sample (`spectral`)
sum over pairs of (r_i r_j)^(1/2)     sum of (w_i w_j)^(1/2) times the overlap of sqrt(p_i p_j) (`overlaps`)
sum over triples (r_i r_j r_k)^(1/3)  the same for three
(r_1 ... r_K)^(1/K)                   the same for all
====================================  ======================================================================

The entropy of a pair is -r_i log(r_i/(r_i + r_j)) - r_j log(r_j/(r_i + r_j)). Where no three components overlap, the
first two are all there is to g and the variance vanishes; the others describe the places where three and more meet.
g less the best combination of them has a reported half-width 2 to 20 times smaller than g itself, and up to 200 times,
where `sobol.FLOOR` stops it (256 points; K = 3, 4, 8, 16 in 2 to 32 dimensions, means 0.3 to 10 standard deviations
apart: medians of ten problems each from 1.4 to 35; the more components meet in one place, the less).

The coefficients are the least-squares ones over the first points of all replicates, within the strata. They are smooth
functions of the parameters, and the gradient of the result includes theirs. Coefficients fitted to the points they are
used on bias the result by one part in the number of points: nothing beside its error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..components import Components, chosen_components
from .overlaps import component_pairs, geometric_overlaps, overlaps
from .spectral import label_entropy_given_sample

__all__ = ["Controls", "Fit", "fit"]

# Pairs whose entropy is used: all of up to ALL components, else those that overlap most. Each costs a logarithm at
# every point.
ALL, PAIRS = 16, 64
# Triples: K over 3 factorisations once. Above this many components the pairs and the geometric mean have to do.
TRIPLES_UP_TO = 20
# Relative to the variances of the controls: one that is a combination of the others shares its coefficient with them.
RIDGE = 1e-12
# A control of a smaller deviation, relative to its mean, is not used: the coefficient is the larger, and multiplies the
# rounding of the mean. (Of even weights the sum of r_k log w_k is constant but for rounding, which was given 3e11.)
FLAT = 1e-6
# Points that a control's variance must come from, in effect, for its coefficient to be fitted. One that is large at
# fewer has any coefficient (5e4 was observed), and what it leaves of the function there says nothing of the error.
ENOUGH = 16.0
# Standard errors of 16 replicates: among a million means of controls, none that the points had seen was 7 off.
TRUST = 8.0


def _entropy_term(r: Tensor) -> Tensor:
    """``r log r``, 0 with a finite gradient at 0."""
    return r * r.clamp(min=torch.finfo(r.dtype).tiny).log()


class Controls:
    """The control variates of one batch of mixtures: their exact means, and their values at points.

    Args:
        p: the mixtures, float64, K >= 3.
    """

    def __init__(self, p: Components) -> None:
        """Choose the pairs and compute the means."""
        k = p.log_weights.shape[-1]
        first, second = component_pairs(k, p.loc.device)
        lw = p.log_weights
        live = lw > -torch.inf
        # about their mean: what all of them have in common is no control
        centre = torch.where(live, lw, 0.0).sum(-1, keepdim=True) / live.sum(-1, keepdim=True)
        self.log_weights = torch.where(live, lw - centre, 0.0)
        weights = torch.exp(lw)
        chernoff = 0.5 * (lw[..., first] + lw[..., second]) + overlaps(p, p).log_chernoff[..., first, second]
        self.all = k <= ALL
        if not self.all:
            chosen = torch.topk(chernoff.detach(), PAIRS, dim=-1).indices
            self.first, self.second = first[chosen], second[chosen]
        else:
            self.first, self.second = (i.expand(*chernoff.shape[:-1], -1) for i in (first, second))
        self.triples = 4 <= k <= TRIPLES_UP_TO
        means = [
            (weights * self.log_weights).sum(-1),
            label_entropy_given_sample(self._pairs_of(p)).sum(-1),
            chernoff.exp().sum(-1),
            geometric_overlaps(p, k),
        ]
        if self.triples:
            means.append(geometric_overlaps(p, 3))
        self.means = torch.stack(means, -1)
        # what the places where components overlap are seen by: of pairs, and of triples
        self.overlaps = [1, 4] if self.triples else [1, 3] if k == 3 else [1]

    def _pairs_of(self, p: Components) -> Components:
        """The chosen pairs as mixtures of two, ``batch_shape + (M, 2)``, their weights as they are."""
        return chosen_components(p, torch.stack((self.first, self.second), -1))

    def at(self, log_posterior: Tensor) -> Tensor:
        """Values at points with these log-posterior weights, ``(...) + batch_shape + (K,)``: ``... + (controls,)``."""
        r = torch.exp(log_posterior)
        k = r.shape[-1]
        single = _entropy_term(r)
        pairs = torch.zeros_like(r[..., 0])
        if self.all:
            for n in range(1, k):
                pairs = pairs + _entropy_term(r[..., n - 1 : n] + r[..., n:]).sum(-1)
            pairs = pairs - (k - 1) * single.sum(-1)
        else:
            lead = r.shape[: r.ndim - self.first.ndim]
            for start in range(0, self.first.shape[-1], k):  # k at a time: no more memory than the posterior takes
                i, j = (x[..., start : start + k].expand(*lead, *x.shape[:-1], -1) for x in (self.first, self.second))
                both = _entropy_term(r.gather(-1, i) + r.gather(-1, j))
                pairs = pairs + (both - single.gather(-1, i) - single.gather(-1, j)).sum(-1)
        roots = torch.exp(0.5 * log_posterior).sum(-1)
        values = [
            (r * self.log_weights).sum(-1),
            pairs,
            0.5 * (roots * roots - r.sum(-1)),
            torch.exp(log_posterior.mean(-1)),
        ]
        if self.triples:
            # the third elementary symmetric function, by Newton's identities
            a = torch.exp(log_posterior / 3)
            s1, s2, s3 = a.sum(-1), (a * a).sum(-1), r.sum(-1)
            values.append((s1 * s1 * s1 - 3 * s1 * s2 + 2 * s3) / 6)
        return torch.stack(values, -1)


class Fit(NamedTuple):
    """What the control variates are worth.

    Attributes:
        beta: least-squares coefficients, ``batch_shape + (C,)``.
        missed: 0, or by how much the points miss the mean of a control that is not used because they do.
    """

    beta: Tensor
    missed: Tensor


def fit(strata: Sequence[tuple[Tensor, Tensor]], shares: Tensor, means: Tensor, prior: Tensor | None = None) -> Fit:
    """Coefficients of a function on its controls, fitted within the strata.

    A control that lives where no point fell has a tiny variance, a random coefficient of any size and the wrong mean:
    one whose mean is more than `TRUST` standard errors off is not used.

    Args:
        strata: for each stratum the function and the controls at its points, of shapes ``(R, N) + batch_shape`` and
            ``(R, N) + batch_shape + (C,)``.
        shares: the share of each stratum, ``batch_shape + (len(strata),)``.
        means: the exact means of the controls, ``batch_shape + (C,)``.
        prior: the coefficients of those that are large at fewer than `ENOUGH` points, ``batch_shape + (C,)``; None to
            fit these as well.
    """
    gram: Tensor | float = 0.0
    right: Tensor | float = 0.0
    seen: Tensor | float = 0.0
    fourth: Tensor | float = 0.0
    for k, (f, c) in enumerate(strata):
        share = shares[..., k : k + 1]
        size = share / math.sqrt(math.prod(f.shape[:2]))
        centred = ((c - c.mean((0, 1))) * size).flatten(0, 1).movedim(0, -1)  # batch_shape + (C, points)
        target = ((f - f.mean((0, 1))) * size[..., 0]).flatten(0, 1).movedim(0, -1).unsqueeze(-1)
        gram, right = gram + centred @ centred.mT, right + (centred @ target).squeeze(-1)
        seen = seen + share * c.mean(1)
        fourth = fourth + centred.detach().pow(4).sum(-1)
    gram, right, seen = (torch.as_tensor(x, device=means.device) for x in (gram, right, seen))
    with torch.no_grad():
        off = (seen.mean(0) - means).abs()
        error = seen.std(0) / math.sqrt(len(seen))
        trusted = off <= TRUST * error + 1e-9 * means.abs()
    variance = gram.diagonal(dim1=-2, dim2=-1)
    used = (variance > (FLAT * means.detach()).square()) & trusted
    given = torch.zeros_like(right)
    if prior is not None:
        few = variance.detach().square() < ENOUGH * fourth
        given, used = torch.where(used & few, prior, 0.0), used & ~few
        right = right - (gram @ given.unsqueeze(-1)).squeeze(-1)
    unit = torch.where(used, torch.where(used, variance, 1.0).rsqrt(), 0.0)
    scaled = gram * unit.unsqueeze(-1) * unit.unsqueeze(-2)
    solution: Tensor = torch.linalg.solve(scaled + torch.diag_embed(torch.where(used, RIDGE, 1.0)), unit * right)
    return Fit(unit * solution + given, torch.where(trusted, 0.0, off))
