r"""Closed forms between pairs of Gaussians: overlap integrals, and the Chernoff coefficient at one half.

With :math:`R^\top R = S_a + S_b` and :math:`\delta = |R^{-\top}(\mu_a - \mu_b)|^2`,

.. math::
    \log \int \sqrt{p_a p_b} &= -\tfrac14 \delta - \tfrac12 \sum \Bigl[\log \frac{R_{ii}}{L_{a,ii}}
        + \log \frac{R_{ii}}{L_{b,ii}} - \log 2\Bigr], \\
    -H(p_a) - \log \int p_a p_b &= \tfrac12 \delta + \sum \Bigl[\log \frac{R_{ii}}{L_{a,ii}} - \tfrac12\Bigr].

The logarithms are of ratios: log R - (log L_a + log L_b)/2, or H and the integral on their own, would carry the units,
of -18 in each dimension for scales of 1e-8, and cancel them (1e-13 nats in 64 dimensions, which took a certified bound
across the truth). For diagonal components R^2/(2 L_a L_b) is 1 + (L_a - L_b)^2/(2 L_a L_b), a sum of positive terms,
exact near equality. R comes from a QR factorisation of the stacked factors: S_a + S_b, formed and factorised, would
square the condition number. For n Gaussians at once, with :math:`A = \frac1n \sum P_i` and :math:`\mu^* = A^{-1}
\frac1n \sum P_i \mu_i`,

.. math::
    \log \int \prod p_i^{1/n} = \tfrac1{2n} \sum \log\det P_i - \tfrac12 \log\det A
        - \tfrac1{2n} \sum |L_i^{-1}(\mu_i - \mu^*)|^2,

in coordinates that whiten the mean covariance of all components, so that only the components' shapes relative
to each other condition it. The quadratic form is a sum of squares at its minimum, where an error of :math:`\mu^*`
enters squared; the textbook difference of sum m'Pm and b'A^-1 b loses all digits for means far apart.

Accuracy: a few eps of the terms above times the condition number of the factors relative to each other.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...distributions._gaussian import Gaussian, gaussian_kl
from ..components import Components

__all__ = [
    "Overlaps",
    "component_pairs",
    "divergences",
    "geometric_overlaps",
    "log_determinants",
    "overlaps",
    "whitened",
]


class Overlaps(NamedTuple):
    """Between each Gaussian of one set and each of another, ``batch_shape + (K_a, K_b)``.

    Attributes:
        log_chernoff: log of the integral of sqrt(p_a p_b): minus the Bhattacharyya distance, at most 0.
        jensen: minus the entropy of p_a less the log of the integral of p_a p_b: at most KL(p_a || p_b).
    """

    log_chernoff: Tensor
    jensen: Tensor


def log_determinants(c: Components) -> Tensor:
    """Log det of each component's Cholesky factor, ``batch_shape + (K,)``."""
    return (c.scale if c.is_diagonal else c.scale.diagonal(dim1=-2, dim2=-1)).log().sum(-1)


def overlaps(a: Components, b: Components) -> Overlaps:
    """The closed forms of the module's head, for each pair of components; differentiable."""
    if a.is_diagonal != b.is_diagonal:
        a, b = a.full(), b.full()
    shift = a.loc.unsqueeze(-2) - b.loc.unsqueeze(-3)
    if a.is_diagonal:
        s_a, s_b = a.scale.unsqueeze(-2), b.scale.unsqueeze(-3)
        top = torch.maximum(s_a, s_b).detach()
        root = top * torch.sqrt((s_a / top).square() + (s_b / top).square())
        square = (shift / root).square().sum(-1)
        excess = (s_a - s_b) / s_a * ((s_a - s_b) / s_b)
        wider = 0.5 * torch.log1p(0.5 * excess).sum(-1)
        growth = (root / s_a).log().sum(-1)
    else:
        s_a, s_b = torch.broadcast_tensors(a.scale.unsqueeze(-3), b.scale.unsqueeze(-4))
        root = torch.linalg.qr(torch.cat([s_a, s_b], -1).mT).R
        square = torch.linalg.solve_triangular(root.mT, shift.unsqueeze(-1), upper=False).square().sum((-2, -1))
        pivots, own_a, own_b = (x.diagonal(dim1=-2, dim2=-1) for x in (root.abs(), s_a, s_b))
        growth = (pivots / own_a).log().sum(-1)
        wider = 0.5 * ((pivots / own_a).log() + (pivots / own_b).log() - math.log(2)).sum(-1)
        wider = wider.clamp(min=0.0)  # it is; rounding may say otherwise for equal Gaussians
    return Overlaps(-0.25 * square - wider, 0.5 * square + growth - 0.5 * a.loc.shape[-1])


def divergences(a: Components, b: Components) -> Tensor:
    """KL(a_j || b_k), ``batch_shape + (K_a, K_b)``."""
    first, second = (Gaussian("scale_diag" if c.is_diagonal else "scale_tril", c.loc, c.scale) for c in (a, b))
    return gaussian_kl(first.unsqueeze(-1), second.unsqueeze(-2))


def component_pairs(k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First and second index of each of the k (k - 1)/2 pairs."""
    first, second = torch.triu_indices(k, k, 1, device=device)
    return first, second


def whitened(c: Components) -> Components:
    """The mixture in coordinates where the mean covariance of its components is the identity.

    The coordinates are taken as constants: what is computed from the result must not depend on them.
    """
    with torch.no_grad():
        centre = c.loc.mean(-2, keepdim=True)
        if c.is_diagonal:
            top = c.scale.amax(-2, keepdim=True)  # the square of a scale of 1e-170 is 0
            unit = top * (c.scale / top).square().mean(-2, keepdim=True).sqrt()
        else:
            stacked = c.scale.mT.flatten(-3, -2) / math.sqrt(c.scale.shape[-3])
            root = torch.linalg.qr(stacked).R
            root = (root * root.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-1)).unsqueeze(-3)
    if c.is_diagonal:
        return c._replace(loc=(c.loc - centre) / unit, scale=c.scale / unit)
    loc = torch.linalg.solve_triangular(root.mT, (c.loc - centre).unsqueeze(-1), upper=False).squeeze(-1)
    # lower triangular: R^-T and the factor are
    return c._replace(loc=loc, scale=torch.linalg.solve_triangular(root.mT, c.scale, upper=False))


def geometric_overlaps(c: Components, n: int) -> Tensor:
    """Sum over all sets of n components of the integral of prod (w_i p_i)^(1/n), of the batch shape.

    The set of all components (n = K), of the pairs (n = 2) or of the triples: any n, at a cost of K over n
    factorisations.
    """
    k = c.loc.shape[-2]
    index = torch.tensor(list(itertools.combinations(range(k), n)), device=c.loc.device)
    c = whitened(c)
    log_w = c.log_weights[..., index].sum(-1) / n
    log_det = log_determinants(c)[..., index].sum(-1) / n
    if c.is_diagonal:
        precision = c.scale.square().reciprocal()[..., index, :]
        loc = c.loc[..., index, :]
        total = precision.mean(-2)
        centre = ((precision * loc).mean(-2) / total).unsqueeze(-2)
        square = (precision * (loc - centre).square()).sum((-2, -1)) / n
        log_total = 0.5 * total.log().sum(-1)
    else:
        identity = torch.eye(c.loc.shape[-1], dtype=c.loc.dtype, device=c.loc.device)
        inverse = torch.linalg.solve_triangular(c.scale, identity.expand_as(c.scale), upper=False)
        inverse, loc = inverse[..., index, :, :], c.loc[..., index, :]
        # A = (1/n) sum P_i as R'R, from the stacked inverse factors
        root = torch.linalg.qr(inverse.flatten(-3, -2) / math.sqrt(n)).R
        pulled = (inverse.mT @ (inverse @ loc.unsqueeze(-1))).mean(-3)
        centre = torch.cholesky_solve(pulled, root, upper=True).squeeze(-1).unsqueeze(-2)
        square = (inverse @ (loc - centre).unsqueeze(-1)).square().sum((-3, -2, -1)) / n
        log_total = root.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
    return torch.exp(log_w - log_det - log_total - 0.5 * square).sum(-1)
