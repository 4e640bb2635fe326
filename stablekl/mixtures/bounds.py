r"""Certified bounds on the KL divergence of Gaussian mixtures, and on what it is made of.

With m = sum_k w_k p_k and q = sum_j v_j q_j, KL(m || q) = sum_k w_k KL(p_k || q) - I, I the information between
point and label. Each of these is bounded from both sides, in closed form:

.. math::
    \max\bigl(0,\; -\sum_i w_i \log \sum_j w_j \rho_{ij}\bigr) \;\le\; I \;\le\;
    \min\bigl(H(w),\; -\sum_i w_i \log \sum_j w_j e^{-KL(p_i \| p_j)}\bigr)

with :math:`\rho_{ij} = \int \sqrt{p_i p_j}` (Kolchinsky and Tracey, 2017), and

.. math::
    \max\bigl(0,\; -H_k - \log \sum_j v_j \!\int\! p_k q_j,\; -2\log \sum_j \sqrt{v_j}\!\int\!\sqrt{p_k q_j}\bigr)
    \;\le\; KL(p_k \| q) \;\le\; -\log \sum_j v_j e^{-KL(p_k \| q_j)}

by Jensen's inequality from below (H_k: the entropy of p_k) and the Donsker-Varadhan formula from above (Durrieu, Thiran
and Kelly, 2012). The variational *upper* bound of Hershey and Olsen (2007) bounds the whole at once; it holds for any
coupling of the components, so that the iteration that improves it may stop anywhere. Their variational approximation,
and Taylor series of the entropy, are not bounds and are not here.

One-dimensional integrals tighten the information (`pair_bounds`). With T_ij the label entropy given the sample of the
pair w_i p_i + w_j p_j,

.. math:: \max_{\text{trees}} \sum_{(i,j) \in \text{tree}} T_{ij} \;\le\; H(w) - I \;\le\; \sum_{i<j} T_{ij} :

the inequalities of Hunter and Worsley and of Bonferroni for the union of the events {a_k > t}, integrated over dt/t^2.
Up to five components, subtracting the triples from the pairs gives another lower bound, Bonferroni's next.

All are rounded outwards, by 64 eps of the terms and 4 eps for each dimension; a covariance matrix of condition number
kappa has eps kappa more.

References: A. Kolchinsky and B. Tracey, "Estimating mixture entropy with pairwise distances", Entropy 19 (2017), 361;
J.-L. Durrieu, J.-P. Thiran and F. Kelly, "Lower and upper bounds for approximation of the Kullback-Leibler divergence
between Gaussian mixture models", ICASSP 2012; J. Hershey and P. Olsen, "Approximating the Kullback Leibler divergence
between Gaussian mixture models", ICASSP 2007; D. Hunter, "An upper bound for the probability of a union", Journal of
Applied Probability 13 (1976), 597-603.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..distributions._gaussian import gaussian_kl
from .components import Components, chosen_components
from .engines.overlaps import component_pairs, overlaps
from .engines.spectral import label_entropy_given_sample
from .engines.triple import triple_term
from .estimate import Bounds
from .reading import Mixture
from .weights import label_entropy, weighted

__all__ = [
    "bounds_of_pairs",
    "closed_bounds",
    "information_bounds",
    "pair_bounds",
    "pairwise_kl",
    "refined_bounds",
    "rounded_outwards",
    "soft_minimum",
]

# Rounding errors allowed for, in eps of the terms.
ROUNDING = 64.0
# Iterations of the variational bound: it is one after each of them.
ITERATIONS = 20
# In place of an infinite logarithm or divergence, in the coupling.
VAST = 1e300
# Components up to which triples are integrated for the bounds.
TRIPLES_UP_TO = 5


def pairwise_kl(p: Mixture, q: Mixture) -> Tensor:
    """KL(p_j || q_k), ``batch_shape + (K_p, K_q)``."""
    if q.num_components == 1:
        return gaussian_kl(p.gaussian, q.gaussian).unsqueeze(-1)
    return gaussian_kl(p.gaussian.unsqueeze(-1), q.gaussian.unsqueeze(-2))


def rounded_outwards(lower: Tensor, upper: Tensor, size: Tensor, dim: int = 0) -> Bounds:
    """Outwards, by the errors of terms of this size and of the logarithms of this many scales."""
    slack = ROUNDING * torch.finfo(size.dtype).eps * (1 + dim / 16 + size.detach().abs())
    return Bounds(lower - slack, upper + slack)


def soft_minimum(log_weights: Tensor, distance: Tensor) -> Tensor:
    """``-log sum_j w_j exp(-distance_ij)`` over the last dimension; +inf where all distances are."""
    return -torch.logsumexp(torch.where(log_weights > -torch.inf, log_weights, -VAST) - distance, -1)


def information_bounds(p: Mixture, components: Components) -> Bounds:
    """Closed-form bounds on the information I between point and label, of the batch shape."""
    lw = p.log_weights
    entropy = label_entropy(lw)
    if p.num_components == 1:
        return Bounds(torch.zeros_like(entropy), torch.zeros_like(entropy))
    row = lw.unsqueeze(-2)
    far = weighted(lw, soft_minimum(row, pairwise_kl(p, p)))
    near = weighted(lw, soft_minimum(row, -overlaps(components, components).log_chernoff))
    lower, upper = rounded_outwards(near, torch.minimum(entropy, far), entropy, p.dim)
    return Bounds(lower.clamp(min=0), upper)


def pair_bounds(components: Components, triples: bool = False) -> Bounds:
    """Bounds on the information from the integrals of all pairs, and of all triples if asked for."""
    lw = components.log_weights
    k = lw.shape[-1]
    index = torch.stack(component_pairs(k, lw.device), -1)
    terms = label_entropy_given_sample(chosen_components(components, index.expand(*lw.shape[:-1], *index.shape)))
    triple = None
    if triples and 3 <= k <= TRIPLES_UP_TO:
        three = torch.tensor(list(itertools.combinations(range(k), 3)), device=lw.device)
        sets = chosen_components(components, three.expand(*lw.shape[:-1], *three.shape))
        triple = triple_term(sets).sum(-1)
    return bounds_of_pairs(lw, terms, index, triple)


def bounds_of_pairs(lw: Tensor, terms: Tensor, index: Tensor, triples: Tensor | None = None) -> Bounds:
    """Bounds on the information of K components from the label entropies of all pairs, which ``index`` names.

    Args:
        lw: the log-weights, ``batch_shape + (K,)``.
        terms: of each pair, ``batch_shape + (P,)``.
        index: the pairs, ``(P, 2)``.
        triples: the sum of the terms of all sets of three.
    """
    k = lw.shape[-1]
    entropy = label_entropy(lw)
    most, least = terms.sum(-1), _heaviest_tree(terms, index, k)
    if triples is not None:
        least = torch.maximum(least, most - triples)
    lower, upper = rounded_outwards(entropy - most, entropy - least, 1 + entropy + k * k * 0.25)
    return Bounds(lower.clamp(min=0), torch.minimum(upper, entropy + ROUNDING * torch.finfo(lw.dtype).eps))


def _heaviest_tree(terms: Tensor, index: Tensor, k: int) -> Tensor:
    """Weight of the heaviest spanning tree, by Prim's algorithm for all rows at once."""
    weight = terms.new_zeros(*terms.shape[:-1], k * k)
    for here in (index[:, 0] * k + index[:, 1], index[:, 1] * k + index[:, 0]):
        weight = weight.index_copy(-1, here, terms)
    weight = weight.unflatten(-1, (k, k))
    outside = torch.ones_like(weight[..., 0], dtype=torch.bool).index_fill(-1, index.new_zeros(1), False)
    reach, total = weight[..., 0, :], torch.zeros_like(weight[..., 0, 0])
    for _ in range(k - 1):
        found = torch.where(outside, reach, -1.0).argmax(-1, keepdim=True)
        total = total + reach.gather(-1, found).squeeze(-1)
        outside = outside.scatter(-1, found, False)
        row = weight.gather(-2, found.unsqueeze(-1).expand(*found.shape, k)).squeeze(-2)
        reach = torch.maximum(reach, row)
    return total


def _component_bounds(p: Mixture, q: Mixture, c_p: Components, c_q: Components, pairs: Tensor) -> Bounds:
    """Bounds on KL(p_k || q) for each k, ``batch_shape + (K_p,)``."""
    if q.num_components == 1:
        return Bounds(pairs.squeeze(-1), pairs.squeeze(-1))
    row = q.log_weights.unsqueeze(-2)
    upper = soft_minimum(row, pairs)
    shared = overlaps(c_p, c_q)
    jensen = soft_minimum(row, shared.jensen)
    half = 2 * soft_minimum(0.5 * row, -shared.log_chernoff)
    return Bounds(torch.maximum(jensen, half).clamp(min=0), upper)


def _variational(p: Mixture, q: Mixture, pairs: Tensor) -> Tensor:
    """Hershey and Olsen's upper bound.

    The derivative is that of all iterations: the envelope theorem, which would take the coupling to be a constant, is
    off by 1e-3 where they have not converged.
    """
    # finite, and too large for anything to add to: no NaN from what is switched off, or infinitely far
    log_p, log_q = (torch.where(m.log_weights > -torch.inf, m.log_weights, -VAST) for m in (p, q))
    log_p, log_q, far = log_p.unsqueeze(-1), log_q.unsqueeze(-2), torch.where(pairs < VAST, pairs, VAST)
    # over q's component given p's, and the other way round
    to_q = torch.log_softmax(log_q - far, -1)
    for _ in range(ITERATIONS):
        to_p = torch.log_softmax(log_p + to_q, -2)
        to_q = torch.log_softmax(log_q + to_p - far, -1)
    to_p = torch.log_softmax(log_p + to_q, -2)
    share = (log_p + to_q).exp()
    cost = (log_p + to_q) - (log_q + to_p) + pairs
    return (share * torch.where(share > 0, cost, 0.0)).sum((-2, -1))


def _assembled(p: Mixture, parts: Bounds, information: Bounds) -> Bounds:
    upper = weighted(p.log_weights, parts.upper)
    lower, upper = rounded_outwards(
        weighted(p.log_weights, parts.lower) - information.upper,
        upper - information.lower,
        upper + information.upper,
        p.dim,
    )
    return Bounds(torch.where(upper.isinf(), lower.nan_to_num(), lower).clamp(min=0), upper)


def closed_bounds(p: Mixture, q: Mixture, pairs: Tensor) -> Bounds:
    """Bounds on KL(p || q) without an integral, of the batch shape; ``pairs`` is `pairwise_kl` of the two."""
    c_p, c_q = p.components(), q.components()
    parts = _component_bounds(p, q, c_p, c_q, pairs)
    bounds = _assembled(p, parts, information_bounds(p, c_p))
    if q.num_components == 1:
        return bounds
    variational = _variational(p, q, pairs)
    variational = variational + ROUNDING * torch.finfo(pairs.dtype).eps * (1 + variational.detach())
    return bounds._replace(upper=torch.minimum(bounds.upper, variational))


def refined_bounds(p: Mixture, q: Mixture) -> Bounds:
    """Bounds on KL(p || q) with the integrals of pairs, and of triples up to five components."""
    pairs = pairwise_kl(p, q)
    c_p, c_q = p.components(), q.components()
    closed = closed_bounds(p, q, pairs)
    if p.num_components == 1:
        return closed
    parts = _component_bounds(p, q, c_p, c_q, pairs)
    tight = _assembled(p, parts, pair_bounds(c_p, triples=True))
    return Bounds(torch.maximum(closed.lower, tight.lower), torch.minimum(closed.upper, tight.upper))
