"""Certified bounds on divergences of mixtures of exponential families, for any number of components on both sides.

Those of `bounds`, with the families' own divergences and Chernoff coefficients in the place of the Gaussians': of
Kolchinsky and Tracey (2017) on the information, of the pairs' label entropies on the same, and of Durrieu et al. (2012)
on KL(p_k || q) for a mixture q.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Distribution

from .bounds import bounds_of_pairs, rounded_outwards, soft_minimum
from .engines.overlaps import component_pairs
from .estimate import Bounds
from .families import checked_pair, exact_kl, pair_information
from .family_reading import FamilyMixture
from .weights import label_entropy, weighted

__all__ = ["family_bounds"]


def _pairwise_kl(p: FamilyMixture, q: FamilyMixture) -> Tensor:
    """KL(p_j || q_k), ``batch_shape + (K_p, K_q)``."""
    one, two = (
        m._replace(given={n: x.unsqueeze(m.component_dim(n) + shift) for n, x in m.given.items()})
        for m, shift in ((p, 0), (q, -1))
    )
    return one.kl(two)


def _log_overlaps(p: FamilyMixture, q: FamilyMixture) -> Tensor:
    """Logarithms of the integrals of sqrt(p_j q_k), ``batch_shape + (K_p, K_q)``."""
    family, parameters = p.paired(q).chernoff()
    middle = torch.zeros(1, dtype=p.log_weights.dtype, device=p.log_weights.device)
    return -family.gap(parameters, middle).real.squeeze(-1)


def _information_bounds(m: FamilyMixture) -> Bounds:
    lw = m.log_weights
    entropy = label_entropy(lw)
    if m.num_components == 1:
        return Bounds(torch.zeros_like(entropy), torch.zeros_like(entropy))
    row = lw.unsqueeze(-2)
    far = weighted(lw, soft_minimum(row, _pairwise_kl(m, m)))
    near = weighted(lw, soft_minimum(row, -_log_overlaps(m, m)))
    closed = rounded_outwards(near, torch.minimum(entropy, far), entropy)
    first, second = component_pairs(m.num_components, lw.device)
    index = torch.stack([first, second], -1)
    w = lw[..., index]
    total = torch.logsumexp(torch.where(w > -torch.inf, w, -1e300), -1, keepdim=True)
    own = -weighted(w, torch.where(w > -torch.inf, w - total, 0.0))
    tight = bounds_of_pairs(lw, own - pair_information(m, index), index)
    return Bounds(torch.maximum(closed.lower, tight.lower).clamp(min=0), torch.minimum(closed.upper, tight.upper))


def family_bounds(p: Distribution, q: Distribution) -> Bounds | None:
    """Bounds on KL(p || q), or None where one of them is of no family that is known here.

    Raises:
        NotImplementedError: the families differ, and q is a mixture.
        ValueError: event or batch shapes do not go together.
    """
    found = checked_pair(p, q)
    if found is None:
        return None
    m_p, m_q = found
    exact = exact_kl(m_p, m_q)
    if exact is not None:
        return Bounds(exact.lower, exact.upper)
    dtype = torch.promote_types(m_p.dtype, m_q.dtype)
    pairs = _pairwise_kl(m_p, m_q)
    parts = Bounds(pairs.squeeze(-1), pairs.squeeze(-1))
    if m_q.num_components > 1:
        row = m_q.log_weights.unsqueeze(-2)
        lower = torch.zeros_like(pairs[..., 0])
        if m_p.family is m_q.family:
            lower = (2 * soft_minimum(0.5 * row, -_log_overlaps(m_p, m_q))).clamp(min=0)
        parts = Bounds(lower, soft_minimum(row, pairs))
    information = _information_bounds(m_p)
    lower, upper = (weighted(m_p.log_weights, x) for x in parts)
    low, high = rounded_outwards(lower - information.upper, upper - information.lower, upper + information.upper)
    low = torch.where(lower.isinf(), lower, torch.where(upper.isinf(), low.nan_to_num(), low))
    return Bounds(low.clamp(min=0), torch.where(upper.isinf(), upper, high)).rounded(dtype)
