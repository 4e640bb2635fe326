"""Families of two outcomes by logits, and ContinuousBernoulli by its logit: probabilities that round to 1 have none."""

from __future__ import annotations

from .context import Number, mp

__all__ = ["continuous_kl", "trial_kl", "wait_kl"]


def _logs(x: Number) -> tuple[Number, Number]:
    """Logarithms of the probabilities of success and failure."""
    rest = -mp.log1p(mp.exp(-abs(x)))
    return (rest, rest - x) if x > 0 else (rest + x, rest)


def trial_kl(x: Number, y: Number) -> Number:
    """The KL divergence of one trial."""
    return mp.fsum(mp.exp(a) * (a - b) for a, b in zip(_logs(x), _logs(y), strict=True))


def wait_kl(x: Number, y: Number) -> Number:
    """That of the number of failures before a success."""
    return trial_kl(x, y) / mp.exp(_logs(x)[0])


def continuous_kl(x: Number, y: Number) -> Number:
    """That of continuous Bernoulli distributions, a Bregman divergence of log((e^x - 1)/x)."""

    def normaliser(z: Number) -> Number:
        return mp.log(mp.expm1(z) / z) if z else mp.mpf(0)

    with mp.extraprec(40 - 4 * min(0, int(mp.mag(x)) if x else 0, int(mp.mag(y)) if y else 0)):
        mean = -1 / mp.expm1(-x) - 1 / x if x else mp.mpf(1) / 2
        return normaliser(y) - normaliser(x) - mean * (y - x)
