"""Categorical and OneHotCategorical: finitely many outcomes, by weights or by their logarithms.

Neither is taken to be normalised, so that the distribution meant by rounded probabilities is an exact one.
"""

from __future__ import annotations

from .context import Number, agreed, mp
from .room import room

__all__ = [
    "kl_from_logits",
    "kl_from_logits_at",
    "kl_from_probs",
    "kl_from_probs_at",
    "log_prob_from_logits",
    "log_prob_from_logits_at",
    "log_prob_from_probs",
    "log_prob_from_probs_at",
]

Vector = list[Number]


def _from_probs(probs: Vector) -> tuple[Vector, Vector]:
    """Probabilities and their logarithms."""
    total = mp.fsum(probs)
    normalised = [w / total for w in probs]
    return normalised, [mp.log(w) if w else -mp.inf for w in normalised]


def _from_logits(logits: Vector) -> tuple[Vector, Vector]:
    """The same from logits; an mpf has room for the exponential of any float."""
    total = mp.log(mp.fsum(mp.exp(x) for x in logits))
    logs = [x - total for x in logits]
    return [mp.exp(x) for x in logs], logs


def _weights(logits: Vector) -> Vector:
    """Their sizes, for `room`."""
    return [mp.exp(x - max(logits)) for x in logits]


def _kl(p: tuple[Vector, Vector], q: tuple[Vector, Vector]) -> Number:
    return mp.fsum(w * (a - b) for w, a, b in zip(p[0], p[1], q[1], strict=True) if w)


def kl_from_probs_at(probs_p: Vector, probs_q: Vector) -> Number:
    """`kl_from_probs` at the current precision."""
    with mp.workprec(mp.prec + room(probs_p, probs_q)):
        return _kl(_from_probs(probs_p), _from_probs(probs_q))


def kl_from_logits_at(logits_p: Vector, logits_q: Vector) -> Number:
    """`kl_from_logits` at the current precision."""
    with mp.workprec(mp.prec + room(_weights(logits_p), _weights(logits_q))):
        value = _kl(_from_logits(logits_p), _from_logits(logits_q))
        # weights that are smaller still have no room
        return mp.mpf(0) if abs(value) < mp.ldexp(mp.mpf(1), -2600) else value


def log_prob_from_probs_at(index: int, probs: Vector) -> Number:
    """`log_prob_from_probs` at the current precision."""
    with mp.workprec(mp.prec + room(probs)):
        return _from_probs(probs)[1][index]


def log_prob_from_logits_at(index: int, logits: Vector) -> Number:
    """`log_prob_from_logits` at the current precision."""
    with mp.workprec(mp.prec + room(_weights(logits))):
        return _from_logits(logits)[1][index]


def kl_from_probs(probs_p: Vector, probs_q: Vector) -> Number:
    """KL divergence between the distributions with these weights.

    Args:
        probs_p: nonnegative weights, not all zero; an outcome of weight zero adds nothing.
        probs_q: the same, of the same number of outcomes.

    Returns:
        The divergence; +inf where an outcome has weight zero in q alone.
    """
    return mp.mpf(0) if probs_p == probs_q else agreed(lambda: kl_from_probs_at(probs_p, probs_q))


def kl_from_logits(logits_p: Vector, logits_q: Vector) -> Number:
    """KL divergence between the distributions whose weights are the exponentials of these numbers.

    Args:
        logits_p: finite numbers, or -inf for an outcome that does not occur.
        logits_q: the same, of the same number of outcomes.

    Returns:
        The divergence; +inf where an outcome does not occur in q alone.
    """
    return mp.mpf(0) if logits_p == logits_q else agreed(lambda: kl_from_logits_at(logits_p, logits_q))


def log_prob_from_probs(index: int, probs: Vector) -> Number:
    """The log-probability of an outcome, given the weights of all; -inf at weight zero."""
    return agreed(lambda: log_prob_from_probs_at(index, probs))


def log_prob_from_logits(index: int, logits: Vector) -> Number:
    """The log-probability of an outcome, given the logits of all."""
    return agreed(lambda: log_prob_from_logits_at(index, logits))
