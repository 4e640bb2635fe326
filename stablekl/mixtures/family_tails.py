r"""Logarithms of both tails, and quantiles, of families over scalars that have them in elementary terms.

torch's ``cdf`` has nothing below eps in the upper tail, and for some families (Laplace, Cauchy) neither in the lower
one, which is 0 from 37 scales on; Laplace's ``icdf`` is -inf for a probability below eps/2. Here, from t, minus the
logarithm of the survival function, and :math:`\log(1 - e^{-t})`:

=====================  ==========================================================================
Exponential, Weibull   :math:`t = \lambda x`, :math:`t = (x/\lambda)^k`
Pareto                 :math:`t = \alpha \log(x/m)`, near m by log1p
Kumaraswamy            :math:`t = -b \log(1 - e^{-s}), s = -a \log x`
HalfNormal             :math:`t = -\log 2 - \log \Phi(-z)`; the lower tail by erf
Gumbel                 the lower tail: :math:`-e^{-z}`
Laplace                :math:`-|z| - \log 2` on the nearer side
Cauchy, HalfCauchy     arctangents of the reciprocal on the farther side
LogNormal              the Normal's, of the logarithm
Uniform                the shares of the interval
Gamma, Chi2            both incomplete gamma functions (no quantile; derivatives by x alone, as torch has them)
InverseGamma           the Gamma's of the reciprocal
=====================  ==========================================================================

Accuracy, observed against mpmath in float64: both logarithms, and the smaller tail of the quantile, 3e-15 relative to
themselves and to what an ulp of x changes, to 1e4 scales either side (Gamma, whose incomplete functions underflow where
the logarithm is -700: 1e-13 to there).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import (
    Cauchy,
    Chi2,
    Distribution,
    Exponential,
    Gamma,
    Gumbel,
    HalfCauchy,
    HalfNormal,
    InverseGamma,
    Kumaraswamy,
    Laplace,
    LogNormal,
    Pareto,
    Uniform,
    Weibull,
)

from ..distributions._base import widened
from ..special import log_ndtr
from .weights import log_probability

__all__ = ["Tails", "known_tails"]

_LOG2 = math.log(2.0)
Rule = Callable[..., Tensor]


class Tails(NamedTuple):
    """What is known of a family, for one distribution of it.

    Attributes:
        lower: log F(x) inside the support, x finite.
        upper: log(1 - F(x)).
        quantile: x with F(x) = p, or with 1 - F(x) = p if told ``upper=True``; None where there is no such formula.
        parameters: as the distribution holds them.
    """

    lower: Callable[[Tensor], Tensor]
    upper: Callable[[Tensor], Tensor]
    quantile: Callable[..., Tensor] | None
    parameters: tuple[Tensor, ...]


def _log1mexp(t: Tensor) -> Tensor:
    """log(1 - e^-t) for t >= 0; -inf with gradient 0 at 0."""
    small = t < _LOG2
    near = log_probability(-torch.expm1(-torch.where(small, t, 0.0)))
    return torch.where(small, near, torch.log1p(-torch.exp(-torch.where(small, 1.0, t))))


def _log_of(part: Tensor, rest: Tensor) -> Tensor:
    """log(part) of two numbers that add up to 1."""
    small = part < 0.5
    return torch.where(small, log_probability(part), torch.log1p(-torch.where(small, 0.25, rest)))


def _log_share(a: Tensor, b: Tensor) -> Tensor:
    """log(a/(a + b)) of two numbers that are not negative."""
    return _log_of(a / (a + b), b / (a + b))


# ---- by t -------------------------------------------------------------------------------------------------------


class _ByHazard(NamedTuple):
    """A family by t(x), minus the log of the survival function, and its inverse."""

    t: Rule
    inverse: Rule


def _pareto_t(x: Tensor, scale: Tensor, alpha: Tensor) -> Tensor:
    near = x < 2 * scale
    excess = torch.where(near, x, scale) - scale
    return alpha * torch.where(near, torch.log1p(excess / scale), torch.log(x / scale))


def _kumaraswamy_t(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    positive = x > 0
    return torch.where(positive, -b * _log1mexp(-a * torch.log(torch.where(positive, x, 0.5))), 0.0)


def _weibull_t(x: Tensor, scale: Tensor, k: Tensor) -> Tensor:
    positive = x > 0  # the slope at 0 is infinite where k < 1
    return torch.where(positive, (torch.where(positive, x, 1.0) / scale) ** k, 0.0)


def _kumaraswamy_inverse(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return (-torch.expm1(-t / b)) ** (1 / a)


_HAZARDS = {
    Exponential: (("rate",), _ByHazard(lambda x, rate: rate * x, lambda t, rate: t / rate)),
    Weibull: (
        ("scale", "concentration"),
        _ByHazard(_weibull_t, lambda t, scale, k: scale * t ** (1 / k)),
    ),
    Pareto: (("scale", "alpha"), _ByHazard(_pareto_t, lambda t, scale, alpha: scale * torch.exp(t / alpha))),
    Kumaraswamy: (("concentration1", "concentration0"), _ByHazard(_kumaraswamy_t, _kumaraswamy_inverse)),
}


# ---- others: log F, log(1 - F) and the two quantiles ------------------------------------------------------------


def _laplace(z: Tensor) -> Tensor:
    low = z < 0
    return torch.where(low, z - _LOG2, torch.log1p(-0.5 * torch.exp(-torch.where(low, 0.0, z))))


def _cauchy(z: Tensor) -> Tensor:
    one = torch.ones_like(z)
    far = torch.log1p(-torch.atan2(one, torch.where(z < 0, 1.0, z)) / math.pi)
    return torch.where(z < 0, torch.log(torch.atan2(one, -z) / math.pi), far)


def _gumbel_upper(z: Tensor) -> Tensor:
    # e^-z may underflow to the right, where the result is -z, and overflow to the left, where it is 0.
    inner = (z > -6) & (z < 40)
    return torch.where(inner, _log1mexp(torch.exp(-torch.where(inner, z, 0.0))), torch.where(z < 0, 0.0, -z))


def _half_normal_lower(z: Tensor) -> Tensor:
    near = z < 1
    body = log_probability(torch.erf(torch.where(near, z, 0.0) * math.sqrt(0.5)))
    return torch.where(near, body, _log1mexp(-_LOG2 - log_ndtr(-torch.where(near, 1.0, z))))


def _half_normal_upper(z: Tensor) -> Tensor:
    near = z < 0.5
    body = torch.log1p(-torch.erf(torch.where(near, z, 0.0) * math.sqrt(0.5)))
    return torch.where(near, body, _LOG2 + log_ndtr(-torch.where(near, 1.0, z)))


def _half_cauchy_lower(z: Tensor) -> Tensor:
    near, one = z < 1, torch.ones_like(z)
    body = log_probability(torch.atan(torch.where(near, z, 0.0)) * (2 / math.pi))
    return torch.where(near, body, torch.log1p(-torch.atan2(one, torch.where(near, 1.0, z)) * (2 / math.pi)))


def _half_cauchy_upper(z: Tensor) -> Tensor:
    near, one = z < 1, torch.ones_like(z)
    body = torch.log1p(-torch.atan(torch.where(near, z, 0.0)) * (2 / math.pi))
    return torch.where(near, body, torch.log(torch.atan2(one, torch.where(near, 1.0, z)) * (2 / math.pi)))


def _gamma_lower(x: Tensor, a: Tensor, rate: Tensor) -> Tensor:
    return _log_of(torch.special.gammainc(a, rate * x), torch.special.gammaincc(a, rate * x))


def _gamma_upper(x: Tensor, a: Tensor, rate: Tensor) -> Tensor:
    return _log_of(torch.special.gammaincc(a, rate * x), torch.special.gammainc(a, rate * x))


def _standard(lower: Rule, upper: Rule, quantile_lower: Rule, quantile_upper: Rule) -> tuple[Rule, Rule, Rule, Rule]:
    """Rules of the standard member as those of locations and scales."""
    return (
        lambda x, loc, scale: lower((x - loc) / scale),
        lambda x, loc, scale: upper((x - loc) / scale),
        lambda p, loc, scale: loc + scale * quantile_lower(p),
        lambda p, loc, scale: loc + scale * quantile_upper(p),
    )


def _scaled(lower: Rule, upper: Rule, quantile_lower: Rule, quantile_upper: Rule) -> tuple[Rule, Rule, Rule, Rule]:
    return (
        lambda x, scale: lower(x / scale),
        lambda x, scale: upper(x / scale),
        lambda p, scale: scale * quantile_lower(p),
        lambda p, scale: scale * quantile_upper(p),
    )


_RULES: dict[type[Distribution], tuple[tuple[str, ...], tuple[Rule, Rule, Rule | None, Rule | None]]] = {
    Laplace: (
        ("loc", "scale"),
        _standard(_laplace, lambda z: _laplace(-z), lambda p: torch.log(2 * p), lambda p: -torch.log(2 * p)),
    ),
    Cauchy: (
        ("loc", "scale"),
        _standard(
            _cauchy,
            lambda z: _cauchy(-z),
            lambda p: -1 / torch.tan(math.pi * p),
            lambda p: 1 / torch.tan(math.pi * p),
        ),
    ),
    Gumbel: (
        ("loc", "scale"),
        _standard(
            lambda z: -torch.exp(-z),
            _gumbel_upper,
            lambda p: -torch.log(-torch.log(p)),
            lambda p: -torch.log(-torch.log1p(-p)),
        ),
    ),
    HalfNormal: (
        ("scale",),
        _scaled(
            _half_normal_lower,
            _half_normal_upper,
            lambda p: math.sqrt(2) * torch.erfinv(p),
            lambda p: -torch.special.ndtri(0.5 * p),
        ),
    ),
    HalfCauchy: (
        ("scale",),
        _scaled(
            _half_cauchy_lower,
            _half_cauchy_upper,
            lambda p: torch.tan(0.5 * math.pi * p),
            lambda p: 1 / torch.tan(0.5 * math.pi * p),
        ),
    ),
    LogNormal: (
        ("loc", "scale"),
        (
            lambda x, loc, scale: log_ndtr((torch.log(x) - loc) / scale),
            lambda x, loc, scale: log_ndtr((loc - torch.log(x)) / scale),
            lambda p, loc, scale: torch.exp(loc + scale * torch.special.ndtri(p)),
            lambda p, loc, scale: torch.exp(loc - scale * torch.special.ndtri(p)),
        ),
    ),
    Uniform: (
        ("low", "high"),
        (
            lambda x, low, high: _log_share(x - low, high - x),
            lambda x, low, high: _log_share(high - x, x - low),
            lambda p, low, high: low + p * (high - low),
            lambda p, low, high: high - p * (high - low),
        ),
    ),
    Gamma: (("concentration", "rate"), (_gamma_lower, _gamma_upper, None, None)),
    Chi2: (("concentration", "rate"), (_gamma_lower, _gamma_upper, None, None)),
    InverseGamma: (
        ("concentration", "rate"),
        (
            lambda x, a, rate: _gamma_upper(1 / x, a, rate),
            lambda x, a, rate: _gamma_lower(1 / x, a, rate),
            None,
            None,
        ),
    ),
}


def known_tails(component: Distribution) -> Tails | None:
    """The tails of a distribution, or None: another family, or a class derived from one of these.

    Args:
        component: scalar, of any batch shape. Arguments of its rules broadcast with that, in working precision.
    """
    kind = type(component)
    if kind in _HAZARDS:
        names, (t, inverse) = _HAZARDS[kind]
        rules: tuple[Rule, Rule, Rule | None, Rule | None] = (
            lambda x, *v: _log1mexp(t(x, *v)),
            lambda x, *v: -t(x, *v),
            lambda p, *v: inverse(-torch.log1p(-p), *v),
            lambda p, *v: inverse(-torch.log(p), *v),
        )
    elif kind in _RULES:
        names, rules = _RULES[kind]
    else:
        return None
    given = tuple(getattr(component, name) for name in names)
    wide = [widened(v) for v in given]
    lower, upper, quantile_lower, quantile_upper = rules
    if quantile_lower is None or quantile_upper is None:
        return Tails(lambda x: lower(x, *wide), lambda x: upper(x, *wide), None, given)
    sides = (quantile_lower, quantile_upper)

    def quantile(p: Tensor, upper: bool = False) -> Tensor:
        small = p <= 0.5
        own, other = sides[upper], sides[not upper]
        return torch.where(small, own(torch.where(small, p, 0.5), *wide), other(torch.where(small, 0.5, 1 - p), *wide))

    return Tails(lambda x: lower(x, *wide), lambda x: upper(x, *wide), quantile, given)
