r"""KL divergences of mixtures over a few outcomes, which are such distributions themselves: exact sums.

A mixture of Categorical distributions is a Categorical with the probabilities :math:`m_j = \sum_k w_k p_{kj}`, and
likewise n_j of q,

.. math:: KL = \sum_j n_j \varphi\Bigl(\frac{m_j - n_j}{n_j}\Bigr), \qquad \varphi(d) = (1 + d) \log(1 + d) - d \ge 0.

The differences come from those of the parameters, component by component: the sums m_j and n_j themselves are rounded,
which is more than nearby divergences are,

.. math:: m_j - n_j = \sum_k w_k (p_{kj} - q_{kj}) + \sum_k (w_k - v_k) (q_{kj} - q_{1j})

for mixtures of as many components, and for any mixture and a single distribution, which counts as that many copies with
the weights of the other. (Where two mixtures differ in that number, m_j - n_j is what it says.) An outcome that p has
and q has not makes the divergence infinite.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributions._base import broadcast_shape
from ..special import bd0, expm1_value, log1pmx

__all__ = ["Outcomes", "binary_outcomes", "finite_jensen_shannon", "finite_kl", "outcomes"]

# Relative differences up to which phi is taken from the difference itself.
NEAR = 0.5
LOG2 = math.log(2.0)


class Outcomes(NamedTuple):
    """K distributions over C outcomes.

    Attributes:
        log_weights: ``batch_shape + (K,)``.
        masses: their probabilities, ``batch_shape + (K, C)``.
        given: what they were made of, unnormalised probabilities or logits, ``(..., K, C)``, or those of success alone,
            ``(..., K, 1)``.
        kind: "probs", "logits", "prob" or "logit".
    """

    log_weights: Tensor
    masses: Tensor
    given: Tensor
    kind: str

    def row(self, k: int) -> Outcomes:
        """One of the K, alone."""
        zero = torch.zeros_like(self.log_weights[..., :1])
        return self._replace(
            log_weights=zero, masses=self.masses[..., k : k + 1, :], given=self.given[..., k : k + 1, :]
        )

    def beside(self, other: Outcomes) -> Outcomes:
        """The mixture of both in equal parts; of the broadcast batch shape."""
        one, two = self, other
        if one.kind != two.kind or one.given.shape[-1] != two.given.shape[-1]:
            one, two = (x._replace(given=x.masses, kind="probs") for x in (one, two))
        batch = broadcast_shape(one.log_weights.shape[:-1], two.log_weights.shape[:-1])

        def joined(a: Tensor, b: Tensor, events: int) -> Tensor:
            return torch.cat([x.expand(batch + x.shape[x.ndim - events :]) for x in (a, b)], -events)

        return Outcomes(
            joined(one.log_weights, two.log_weights, 1) - LOG2,
            joined(one.masses, two.masses, 2),
            joined(one.given, two.given, 2),
            one.kind,
        )


def outcomes(log_weights: Tensor, probs: Tensor | None, logits: Tensor | None) -> Outcomes:
    """From unnormalised probabilities or logits, ``(..., K, C)``, float64."""
    if probs is not None:
        masses = probs / probs.sum(-1, keepdim=True)
        return Outcomes(log_weights, masses, probs, "probs")
    if logits is None:
        raise ValueError("give probs or logits; got neither")
    return Outcomes(log_weights, torch.softmax(logits, -1), logits, "logits")


def binary_outcomes(log_weights: Tensor, probs: Tensor | None, logits: Tensor | None) -> Outcomes:
    """Success and failure, from probabilities or logits of success, ``(..., K)``, float64."""
    if probs is not None:
        masses = torch.stack([probs, 1 - probs], -1)
        return Outcomes(log_weights, masses, probs.unsqueeze(-1), "prob")
    if logits is None:
        raise ValueError("give probs or logits; got neither")
    masses = torch.stack([torch.sigmoid(logits), torch.sigmoid(-logits)], -1)
    return Outcomes(log_weights, masses, logits.unsqueeze(-1), "logit")


def _difference(p: Outcomes, q: Outcomes) -> Tensor:
    """The difference of the masses of each p and q, of the size of that of the parameters."""
    if p.kind != q.kind:
        return p.masses - q.masses
    if p.kind == "probs":
        change = p.given - q.given
        # x/X - y/Y = [x - y - (X - Y) y/Y]/X
        return (change - change.sum(-1, keepdim=True) * q.masses) / p.given.sum(-1, keepdim=True)
    if p.kind == "prob":
        change = p.given - q.given
        return torch.cat([change, -change], -1)
    same = p.given == q.given  # also where both are infinite
    change = torch.where(same, 0.0, p.given - q.given)
    if p.kind == "logit":
        # sigmoid(x) - sigmoid(y) = sigmoid(x) sigmoid(-y) (1 - e^(y - x))
        rises = change > 0
        small = expm1_value(torch.where(rises, -change, change))
        size = torch.where(rises, p.masses[..., :1] * q.masses[..., 1:], q.masses[..., :1] * p.masses[..., 1:])
        size = torch.where(rises, -size * small, size * small)
        return torch.cat([size, -size], -1)
    near = (change.abs() < 1).all(-1, keepdim=True)
    small = torch.where(near, change, 0.0)
    ratio = small - torch.log1p((q.masses * expm1_value(small)).sum(-1, keepdim=True))
    return torch.where(near, q.masses * expm1_value(ratio), p.masses - q.masses)


def _mean(log_weights: Tensor, x: Tensor) -> Tensor:
    return (log_weights.exp().unsqueeze(-1) * x).sum(-2)


def finite_kl(p: Outcomes, q: Outcomes) -> Tensor:
    """KL of two mixtures over the same outcomes, of the broadcast batch shape."""
    m, n = _mean(p.log_weights, p.masses), _mean(q.log_weights, q.masses)
    k_p, k_q = p.log_weights.shape[-1], q.log_weights.shape[-1]
    if k_q == 1:
        change = _mean(p.log_weights, _difference(p, q))
    elif k_p == 1:
        change = _mean(q.log_weights, _difference(p, q))
    elif k_p == k_q:
        more = (p.log_weights.exp() - q.log_weights.exp()).unsqueeze(-1) * _difference(q, q.row(0))
        change = _mean(p.log_weights, _difference(p, q)) + more.sum(-2)
    else:
        change = m - n
    m, n, change = torch.broadcast_tensors(m, n, change)
    within = n > 0
    near = within & (change.abs() < NEAR * n)
    safe = torch.where(near, n, 1.0)
    d = torch.where(near, change, 0.0) / safe
    # phi(d) = (1 + d) L(-d/(1 + d)), L(x) = x - log(1 + x)
    by_change = safe * (1 + d) * -log1pmx(-d / (1 + d))
    far = bd0(torch.where(near | ~within, 1.0, m), torch.where(near | ~within, 1.0, n))
    outside = torch.where(m > 0, torch.inf, 0.0)
    return torch.where(near, by_change, torch.where(within, far, outside)).sum(-1)


def finite_jensen_shannon(p: Outcomes, q: Outcomes) -> Tensor:
    """Half the divergences of both to their mean, in which each component has a counterpart where there are as many."""
    m = p.beside(q)
    if p.log_weights.shape[-1] == q.log_weights.shape[-1] > 1:
        p, q = p.beside(p), q.beside(q)
    return 0.5 * (finite_kl(p, m) + finite_kl(q, m))
