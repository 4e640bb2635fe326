r"""One iteration of EM for mixtures of Gaussians, in one pass over the samples.

Everything is measured from the component as it is. With :math:`y = L_k^{-1} (z - \mu_k)` a pass collects, weighted by
the responsibilities :math:`r_{ik}`, the sums of 1, y and y y'. If m is the mean of y, the next component is

.. math:: \mu_k + L_k m, \qquad L_k \operatorname{chol}\!\left(
          \frac{\sum r y y' - n_k m m' + 2 a L_k^{-1} S_0 L_k^{-T}}{n_k + 2 a}\right):

no covariance matrix is formed and none is subtracted from another, since m is small and :math:`\sum r y y' / n_k`
about the identity when the iteration settles. Moments about the origin, and densities by expanded squares, lose
:math:`\epsilon (\mu/\sigma)^2` of a covariance, all of it at an offset of 1e6 in float32. Where m is so large that
something is lost here, in the first iterations from a bad start, the pass is repeated about the new means.

The penalty :math:`-a \sum_k [\operatorname{tr}(S_0 S_k^{-1}) + \log\det S_k]`, S_0 the covariance of all samples, keeps
components from shrinking to a point, and the likelihood from growing without end; the same in all units (J. Chen and X.
Tan, "Inference for multivariate normal mixtures", Journal of Multivariate Analysis 100 (2009), 1367-1383).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ._model import Model

__all__ = ["Sums", "collect", "maximised", "posterior"]

# Rounding of y that is accepted for speed: L^-1 z - L^-1 mu, where the terms are large and their difference is not.
_ROUNDING = 1e-10
# Rounding in a covariance, relative to its smallest direction, that calls for a second pass.
_LOST = 1e-6
# Variances fall by this factor at most in an iteration where rounding hides how small they are.
_SHRINKAGE = 1e-10


class Sums(NamedTuple):
    """What a pass collects; the sums over samples are of weight times responsibility.

    Attributes:
        total: of the weights.
        log_likelihood: weighted sum of log-densities.
        size: of 1, ``(K,)``.
        first: of y less the shift, ``(K, D)``.
        second: of its products, ``(K, D, D)``, or squares, ``(K, D)``; summed over what shares a covariance,
            ``(1, D, D)`` and ``(K, 1)``.
    """

    total: Tensor
    log_likelihood: Tensor
    size: Tensor
    first: Tensor
    second: Tensor

    def packed(self) -> Tensor:
        """All in one vector."""
        return torch.cat([x.flatten() for x in self])

    def unpacked(self, x: Tensor) -> Sums:
        """Sums of these shapes from such a vector."""
        parts = x.split([y.numel() for y in self])
        return Sums(*(p.reshape(y.shape) for p, y in zip(parts, self, strict=True)))

    def __mul__(self, factor: float) -> Sums:  # type: ignore[override]
        return Sums(*(factor * x for x in self))

    def __add__(self, other: Sums) -> Sums:  # type: ignore[override]
        return Sums(*(x + y for x, y in zip(self, other, strict=True)))


def _whitened(model: Model, z: Tensor) -> Tensor:
    """The vectors y of every component and row, ``(K, D, B)``: rows last, for long loops whatever D is."""
    k, d = model.loc.shape
    z, loc = z.mT, model.loc.unsqueeze(-1)
    if not model.triangular:
        return (z - loc).mul_(1 / model.scale.unsqueeze(-1))
    eye = torch.eye(d, dtype=z.dtype, device=z.device)
    inverse: Tensor = torch.linalg.solve_triangular(model.scale, eye.expand(model.scale.shape), upper=False)
    largest = inverse.abs() @ (z.abs().amax(-1, keepdim=True) + loc.abs())
    if bool(torch.finfo(z.dtype).eps * largest.amax() > _ROUNDING):
        return inverse @ (z - loc)
    # One product for all components, and no differences to write and to read.
    bias = -(inverse @ loc)
    if model.kind == "tied":
        return inverse @ z + bias
    return torch.addmm(bias.reshape(k * d, 1), inverse.reshape(k * d, d), z).reshape(k, d, -1)


def posterior(model: Model, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The vectors y, ``(K, D, B)``, responsibilities, ``(K, B)``, and log-densities, ``(B,)``."""
    y = _whitened(model, z)
    logits = y.square().sum(1).mul_(-0.5).add_(model.base())
    log_density = torch.logsumexp(logits, 0)
    return y, logits.sub_(log_density).exp_(), log_density


def collect(model: Model, chunks: Iterable[tuple[Tensor, Tensor | None]], shift: Tensor | None = None) -> Sums:
    """The sums over these rows.

    Args:
        model: what the responsibilities are of.
        chunks: rows in standard units and their weights.
        shift: ``(K, D)``, what y is measured from; None for 0.
    """
    k, d = model.loc.shape
    zero = model.loc.new_zeros
    found = Sums(zero(()), zero(()), zero(k), zero(k, d), zero(k, d, d) if model.triangular else zero(k, d))
    for z, w in chunks:
        y, r, log_density = posterior(model, z)
        if w is not None:
            r, log_density = r * w, w * log_density
        if shift is not None:
            y = y - shift.unsqueeze(-1)
        found.total.add_(len(z) if w is None else w.sum())
        found.log_likelihood.add_(log_density.sum())
        found.size.add_(r.sum(-1))
        found.first.add_((y @ r.unsqueeze(-1)).squeeze(-1))
        ry = y * r.unsqueeze(1)
        if model.triangular:
            found.second.baddbmm_(ry, y.mT)
        else:
            found.second.add_(ry.mul_(y).sum(-1))
    if model.kind == "tied":
        return found._replace(second=found.second.sum(0, keepdim=True))
    return found._replace(second=found.second.sum(-1, keepdim=True)) if model.kind == "spherical" else found


def maximised(model: Model, sums: Sums, pooled: Tensor, penalty: float, shift: Tensor | None = None) -> Model | None:
    """The next model; None where rounding has spoilt a covariance, and the sums are to be collected about new means.

    Args:
        model: the model that the sums are of.
        sums: over all samples.
        pooled: Cholesky factor of S_0.
        penalty: a, as a share of the samples' total weight.
        shift: what the sums are measured from; then there is always a next model.
    """
    d = model.loc.shape[-1]
    alive = sums.size > 0
    size = torch.where(alive, sums.size, 1.0).unsqueeze(-1)
    step = torch.where(alive.unsqueeze(-1), sums.first / size, 0.0)
    moved = step if shift is None else step + shift
    weight = 2 * penalty * sums.total
    if model.triangular:
        loc = model.loc + (model.scale @ moved.unsqueeze(-1)).squeeze(-1)
        between = sums.first.unsqueeze(-1) * step.unsqueeze(-2)
        members = sums.size.reshape(-1, 1, 1)
        if model.kind == "tied":
            between, members = between.sum(0, keepdim=True), members.sum(0, keepdim=True)
        inner = sums.second - between + weight * model.pulls(pooled)
        eye = torch.eye(d, dtype=inner.dtype, device=inner.device)
        inner = torch.where(members > 0, inner / (members + weight), eye)
        factor, info = torch.linalg.cholesky_ex(inner)
        least = factor.diagonal(dim1=-2, dim2=-1).amin(-1).square()
        spoilt = bool(((info != 0) | _lost(step, least)).any())
        if spoilt and shift is not None:
            factor = _shrunk(inner)
        scale = (model.scale @ factor).tril()
    else:
        loc = model.loc + model.scale * moved
        shared = d // model.scale.shape[-1]  # columns to a variance
        between = sums.first * step
        if model.kind == "spherical":
            between = between.sum(-1, keepdim=True)
        inner = sums.second - between + shared * weight * model.pulls(pooled)
        inner = torch.where(alive.unsqueeze(-1), inner / (shared * (size + weight)), 1.0)
        spoilt = bool(((inner <= 0).any(-1) | _lost(step, inner.amin(-1))).any())
        scale = model.scale * inner.clamp(min=_SHRINKAGE).sqrt()
    if spoilt and shift is None:
        return None
    return Model(model.kind, torch.log(sums.size / sums.size.sum()), loc, scale)


def _shrunk(inner: Tensor) -> Tensor:
    """Cholesky factors where directions shrink by no more than can be told from rounding.

    The likelihood rises on the way from the component as it is, where this is the identity, to the best one, along
    every principal axis; the rest of the way is gone in the next iterations.
    """
    values, vectors = torch.linalg.eigh(inner)
    values = torch.maximum(values, _SHRINKAGE * values[..., -1:].clamp(min=1.0))
    factor: Tensor = torch.linalg.cholesky((vectors * values.unsqueeze(-2)) @ vectors.mT)
    return factor


def _lost(step: Tensor, least: Tensor) -> Tensor:
    """Whether subtracting the step's square has cost digits of the smallest variance."""
    eps = torch.finfo(step.dtype).eps
    return eps * step.square().sum(-1) > _LOST * least
