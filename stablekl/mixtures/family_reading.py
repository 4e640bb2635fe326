"""Members of exponential families and mixtures of them, read as the tensors that the spectral integral takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
    Dirichlet,
    Distribution,
    Exponential,
    Gamma,
    Geometric,
    Independent,
    InverseGamma,
    OneHotCategorical,
    Poisson,
)
from torch.distributions import MixtureSameFamily as TorchMixtureSameFamily

from .. import distributions
from .._autograd import is_eager
from ..distributions._base import Given as Raw
from ..distributions._base import broadcast_shape, common_dtype, given, widened
from ..registry import kl_divergence
from ..special import expm1_value
from .engines.chernoff import (
    CATEGORIES,
    DIRICHLET,
    EXPONENTIAL,
    GAMMA,
    GEOMETRIC,
    RATES,
    Chernoff,
    Tensors,
    log_ratio,
)
from .finite import Outcomes, binary_outcomes, outcomes
from .weights import given_weights, log_weights_of

__all__ = ["HOSTS", "FamilyMixture", "as_family", "class_name"]

Given = dict[str, Tensor]


class _Family(NamedTuple):
    """How to read a family.

    Attributes:
        host: torch's class.
        build: ours.
        vector: the number of dimensions of an event.
        given: the parameters as given, by the names that ``build`` takes.
        chernoff: rho, and its parameters from the given ones, ``(..., 2) + event_shape``.
    """

    host: type[Distribution]
    build: Callable[..., Distribution]
    vector: int
    given: Callable[[Any], Given]
    chernoff: Callable[[Given], tuple[Chernoff, Tensors]]


# ---- the parameters ---------------------------------------------------------------------------------------------


def _named(*names: str) -> Callable[[Any], Given]:
    return lambda d: {name: getattr(d, name) for name in names}


def _probabilities(d: Any) -> Given:
    """Probabilities or logits, of which torch may have made the other since, or clamped it."""
    plain = d._categorical if isinstance(d, OneHotCategorical) and not isinstance(d, Raw) else d
    if isinstance(plain, Categorical) and not isinstance(plain, Raw):
        logits, probs = given_weights(plain)
        name, value = ("logits", logits) if probs is None else ("probs", probs)
    else:
        name, value = given(plain)
    found = {name: value} if value is not None else {}
    return {**found, "total_count": d.total_count} if isinstance(d, Binomial) else found


def _plain(chernoff: Chernoff, *names: str) -> Callable[[Given], tuple[Chernoff, Tensors]]:
    return lambda given: (chernoff, tuple(given[name] for name in names))


def _beta(given: Given) -> tuple[Chernoff, Tensors]:
    return DIRICHLET, (torch.stack([given["concentration1"], given["concentration0"]], -1),)


class _Binary(NamedTuple):
    """Probabilities (..., 2, D); of the two components their difference and the log-ratios, (..., D)."""

    success: Tensor
    failure: Tensor
    difference: Tensor
    successes: Tensor
    failures: Tensor


def _binary(given: Given) -> _Binary:
    if "probs" in given:
        success, failure = given["probs"], 1 - given["probs"]
        (x, y), (f, g) = success.detach().unbind(-2), failure.detach().unbind(-2)
        d, both = x - y, (f > 0) & (g > 0)
        # log((1 - x)/(1 - y)), not from 1 - x and 1 - y, which have been rounded
        change = torch.where(both, -d / torch.where(both, g, 1.0), 0.0)
        near = change.abs() < 0.5
        return _Binary(
            success,
            failure,
            d,
            log_ratio(x, y),
            torch.where(near, torch.log1p(torch.where(near, change, 0.0)), log_ratio(f, g)),
        )
    success, failure = torch.sigmoid(given["logits"]), torch.sigmoid(-given["logits"])
    (x, y), (f, g), (a, b) = (v.detach().unbind(-2) for v in (success, failure, given["logits"]))
    change = torch.where(a == b, 0.0, a - b)
    near = change.abs() < 1
    change = torch.where(near, change, 0.0)
    up, down = expm1_value(change), expm1_value(-change)
    return _Binary(
        success,
        failure,
        torch.where(near, -x * g * down, x - y),  # sigmoid(a) sigmoid(-b) (1 - e^(b - a))
        torch.where(near, -torch.log1p(g * down), log_ratio(x, y)),
        torch.where(near, -torch.log1p(y * up), log_ratio(f, g)),
    )


def _two_categories(given: Given) -> tuple[Chernoff, Tensors]:
    b = _binary(given)
    count = given.get("total_count", torch.ones_like(b.success)).expand_as(b.success)
    if is_eager(count) and not bool((count[..., 0, :] == count[..., 1, :]).all()):
        raise NotImplementedError(
            "the components of a mixture of Binomial distributions must have the same number of trials: with different "
            "ones they are no exponential family. Estimate the divergence from samples: "
            "stablekl.estimators.kl_monte_carlo"
        )
    masses, ratios = torch.stack([b.success, b.failure], -1), torch.stack([b.successes, b.failures], -1)
    return CATEGORIES, (masses, ratios, count[..., 0, :])


def _categories(given: Given) -> tuple[Chernoff, Tensors]:
    if "probs" in given:
        probs = given["probs"]
        total = probs.sum(-1, keepdim=True)
        masses = probs / total
        x, y = probs.detach().unbind(-3)
        total_y = y.sum(-1, keepdim=True)
        ratio = log_ratio(x, y) - torch.log1p((x - y).sum(-1, keepdim=True) / total_y)
    else:
        masses = torch.softmax(given["logits"], -1)
        x, y = given["logits"].detach().unbind(-3)
        p, q = masses.detach().unbind(-3)
        change = torch.where(x == y, 0.0, x - y)
        near = (change.abs() < 1).all(-1, keepdim=True)
        change = torch.where(near, change, 0.0)
        change = change - torch.log1p((q * expm1_value(change)).sum(-1, keepdim=True))
        ratio = torch.where(near, change, log_ratio(p, q))
    x, y = masses.detach().unbind(-3)
    ratio = torch.where((x > 0) & (y > 0), ratio, 0.0)
    return CATEGORIES, (masses, ratio, torch.ones_like(ratio[..., 0]))


def _geometric(given: Given) -> tuple[Chernoff, Tensors]:
    b = _binary(given)
    return GEOMETRIC, (b.success, b.failure, b.difference, b.failures)


_FAMILIES = (
    _Family(
        Beta,
        distributions.Beta,
        0,
        _named("concentration1", "concentration0"),
        _beta,
    ),
    _Family(Bernoulli, distributions.Bernoulli, 0, _probabilities, _two_categories),
    _Family(Binomial, distributions.Binomial, 0, _probabilities, _two_categories),
    _Family(Categorical, distributions.Categorical, 1, _probabilities, _categories),
    _Family(Dirichlet, distributions.Dirichlet, 1, _named("concentration"), _plain(DIRICHLET, "concentration")),
    _Family(Exponential, distributions.Exponential, 0, _named("rate"), _plain(EXPONENTIAL, "rate")),
    _Family(Gamma, distributions.Gamma, 0, _named("concentration", "rate"), _plain(GAMMA, "concentration", "rate")),
    _Family(Geometric, distributions.Geometric, 0, _probabilities, _geometric),
    _Family(
        InverseGamma,
        distributions.InverseGamma,
        0,
        _named("concentration", "rate"),
        _plain(GAMMA, "concentration", "rate"),
    ),
    _Family(OneHotCategorical, distributions.OneHotCategorical, 1, _probabilities, _categories),
    _Family(Poisson, distributions.Poisson, 0, _named("rate"), _plain(RATES, "rate")),
)
HOSTS = tuple(family.host for family in _FAMILIES)
# A mixture of these over a few outcomes is one of them.
_FINITE = (Bernoulli, Categorical, OneHotCategorical)


# ---- mixtures ---------------------------------------------------------------------------------------------------


class FamilyMixture(NamedTuple):
    """A mixture of members of a family, or one member as a mixture of one.

    Attributes:
        family: theirs.
        log_weights: normalised, ``batch_shape + (K,)``.
        given: parameters in float64, ``batch_shape + (K, D)``, or ``(K, D, C)`` for vectors; D is 1 but for
            Independent.
        dtype: what the caller's parameters promote to.
    """

    family: _Family
    log_weights: Tensor
    given: Given
    dtype: torch.dtype

    @property
    def num_components(self) -> int:
        """K."""
        return self.log_weights.shape[-1]

    @property
    def is_finite(self) -> bool:
        """Whether the mixture is a distribution over a few outcomes."""
        one = next(iter(self.given.values()))
        return self.family.host in _FINITE and one.shape[-1 - self.family.vector] == 1

    def component_dim(self, name: str) -> int:
        """The dimension of this parameter that indexes the components."""
        return -2 - self._events(name)

    def _events(self, name: str) -> int:
        return 0 if name == "total_count" else self.family.vector

    def outcomes(self) -> Outcomes:
        """As one."""
        of = outcomes if self.family.vector else binary_outcomes
        probs, logits = (self.given[n].squeeze(-1 - self.family.vector) if n in self.given else None for n in _NAMES)
        return of(self.log_weights, probs, logits)

    def chosen(self, index: Tensor) -> FamilyMixture:
        """Of the components with these numbers, their weights as they are."""
        given = {n: x.index_select(self.component_dim(n), index) for n, x in self.given.items()}
        return self._replace(log_weights=self.log_weights.index_select(-1, index), given=given)

    def chernoff(self) -> tuple[Chernoff, Tensors]:
        """Of two components."""
        return self.family.chernoff(self.given)

    def kl(self, other: FamilyMixture) -> Tensor:
        """KL(p_k || q_k) by the registered rule, component by component, ``batch_shape + (K,)``."""
        shapes = [x.shape[: x.ndim - m._events(n)] for m in (self, other) for n, x in m.given.items()]
        batch = broadcast_shape(*shapes)  # not all of torch's rules broadcast
        p, q = (
            m.family.build(
                **{n: x.expand(batch + x.shape[x.ndim - m._events(n) :]) for n, x in m.given.items()},
                validate_args=False,
            )
            for m in (self, other)
        )
        return kl_divergence(p, q).sum(-1)

    def by_probs(self) -> FamilyMixture:
        """With probabilities where logits were given."""
        if "logits" not in self.given:
            return self
        logits = self.given["logits"]
        probs = torch.softmax(logits, -1) if self.family.vector else torch.sigmoid(logits)
        others = {n: x for n, x in self.given.items() if n != "logits"}
        return self._replace(given={"probs": probs, **others})

    def alike(self, other: FamilyMixture) -> tuple[FamilyMixture, FamilyMixture]:
        """Both, by parameters of the same names."""
        if self.given.keys() == other.given.keys():
            return self, other
        return self.by_probs(), other.by_probs()

    def paired(self, other: FamilyMixture) -> FamilyMixture:
        """Each component with each of the other's, ``batch_shape + (K, K', 2)``, with equal weights."""
        one, two = self.alike(other)
        given = {}
        for n, x in one.given.items():
            k = self.component_dim(n)
            a, b = torch.broadcast_tensors(x.unsqueeze(k), two.given[n].unsqueeze(k - 1))
            given[n] = torch.stack([a, b], k)
        lw = self.log_weights.new_full((2,), -math.log(2.0))
        return self._replace(log_weights=lw, given=given)


_NAMES = "probs", "logits"


def class_name(distribution: Distribution) -> str:
    """Of its class, and of what is inside of Independent."""
    name = type(distribution).__name__
    if isinstance(distribution, Independent):
        return f"{name}({class_name(distribution.base_dist)}, {distribution.reinterpreted_batch_ndims})"
    return name


def as_family(distribution: Distribution) -> FamilyMixture | None:
    """A mixture, torch's or ours, of members of one of these families, or a member; None for any other."""
    mixture = distribution if isinstance(distribution, TorchMixtureSameFamily) else None
    member = distribution if mixture is None else mixture.component_distribution
    spread = 0
    if isinstance(member, Independent):
        spread, member = member.reinterpreted_batch_ndims, member.base_dist
    family = next((f for f in _FAMILIES if isinstance(member, f.host)), None)
    if family is None or (family.vector and spread and family.host is Dirichlet):
        return None
    parameters = {}
    for name, x in family.given(member).items():
        events = 0 if name == "total_count" else family.vector
        at = x.ndim - events - spread
        wide = widened(x)
        wide = wide.flatten(at, at + spread - 1) if spread else wide.unsqueeze(at)
        parameters[name] = wide if mixture is not None else wide.unsqueeze(at)
    dtype = common_dtype(*(x for name, x in family.given(member).items() if name != "total_count"))
    first = next(iter(parameters.values()))
    if mixture is None:
        single = first.new_zeros(first.shape[: first.ndim - 1 - family.vector])
        return FamilyMixture(family, single, parameters, dtype)
    log_weights = log_weights_of(mixture, first.dtype)
    dtype = torch.promote_types(dtype, mixture.mixture_distribution._param.dtype)
    return FamilyMixture(family, log_weights, parameters, dtype)
