"""Which closed form a pair of distributions has, and the checks that all divergences share."""

from __future__ import annotations

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
    Laplace,
    OneHotCategorical,
    Poisson,
)

from .._autograd import is_plain
from ..distributions._base import check_batch_shapes, widened
from ..distributions._gaussian import Gaussian, as_gaussian
from . import concentrations, families, laplace

__all__ = ["Family", "chosen", "gaussians", "inner", "order", "parameter", "rounded"]


class Family(NamedTuple):
    """The rules of a family: ``renyi(p, q, alpha)`` and ``jeffreys(p, q)``, both in float64."""

    host: type[Distribution]
    renyi: Callable[[Any, Any, Tensor], Tensor]
    jeffreys: Callable[[Any, Any], Tensor]


_FAMILIES = (
    Family(Bernoulli, families.bernoulli_renyi, families.bernoulli_jeffreys),
    Family(Beta, concentrations.beta_renyi, concentrations.beta_jeffreys),
    Family(Binomial, families.binomial_renyi, families.binomial_jeffreys),
    Family(Categorical, families.categorical_renyi, families.categorical_jeffreys),
    Family(OneHotCategorical, families.categorical_renyi, families.categorical_jeffreys),
    Family(Dirichlet, concentrations.dirichlet_renyi, concentrations.dirichlet_jeffreys),
    Family(Exponential, families.exponential_renyi, families.exponential_jeffreys),
    Family(Gamma, concentrations.gamma_renyi, concentrations.gamma_jeffreys),
    Family(Geometric, families.geometric_renyi, families.geometric_jeffreys),
    Family(InverseGamma, concentrations.gamma_renyi, concentrations.gamma_jeffreys),
    Family(Laplace, laplace.laplace_renyi, laplace.laplace_jeffreys),
    Family(Poisson, families.poisson_renyi, families.poisson_jeffreys),
)


def _raise_event_shapes(p: Distribution, q: Distribution) -> None:
    raise ValueError(
        f"the divergence needs distributions over the same space, but the event shapes are {tuple(p.event_shape)} and "
        f"{tuple(q.event_shape)}. If the last batch dimension of a Normal holds the coordinates of one vector, wrap "
        "it: Independent(Normal(loc, scale), 1)."
    )


def _check_distribution(distribution: object) -> None:
    if not isinstance(distribution, Distribution):
        raise ValueError(f"a divergence is that of two distributions, got {distribution!r}")


def gaussians(p: Distribution, q: Distribution) -> tuple[Gaussian, Gaussian] | None:
    """Both as Gaussians over vectors of one length, or None if one of them is none.

    Raises:
        ValueError: one is no distribution, or the batch or event shapes do not go together.
    """
    _check_distribution(p)
    _check_distribution(q)
    check_batch_shapes(p, q)
    g_p, g_q = as_gaussian(p), as_gaussian(q)
    if g_p is None or g_q is None:
        return None
    if g_p.loc.shape[-1] != g_q.loc.shape[-1]:
        _raise_event_shapes(p, q)
    return g_p, g_q


def inner(p: Distribution, q: Distribution) -> tuple[Distribution, Distribution, int]:
    """The distributions under a pair of Independent, and how many dimensions they sum over."""
    if not (isinstance(p, Independent) and isinstance(q, Independent)):
        return p, q, 0
    n = p.reinterpreted_batch_ndims
    if p.event_shape != q.event_shape or n != q.reinterpreted_batch_ndims:
        _raise_event_shapes(p, q)
    return p.base_dist, q.base_dist, n


def chosen(p: Distribution, q: Distribution, what: str) -> Family:
    """The family that both belong to."""
    for family in _FAMILIES:
        if isinstance(p, family.host) and isinstance(q, family.host):
            if p.event_shape != q.event_shape:
                _raise_event_shapes(p, q)
            return family
    known = ", ".join(f.host.__name__ for f in _FAMILIES)
    raise NotImplementedError(
        f"no closed form of the {what} of {type(p).__name__} and {type(q).__name__} is known here: there is one for "
        f"two Gaussians of any class, for two members of one of {known}, and for Independent products of these"
    )


def order(alpha: float | Tensor, like: Tensor, highest: float = torch.inf) -> Tensor:
    """The order as a tensor, float64 where the device has it.

    Raises:
        ValueError: it is NaN or outside of [0, highest] (tensors: checked in eager mode only).
    """
    bounds = f"in [0, {highest:g}]" if highest < torch.inf else "finite and not negative"
    if isinstance(alpha, Tensor):
        wide: Tensor = widened(alpha).to(like.device)
        still = wide.detach()
        if is_plain((still,)):
            bad = ~((still >= 0) & (still <= highest) & (still < torch.inf))
            if bool(bad.any()):
                index = bad.nonzero()[0].tolist() if bad.ndim else []
                raise ValueError(f"the order alpha has the value {float(still[tuple(index)])} at {index}, not {bounds}")
        return wide
    if not 0 <= alpha <= highest or alpha == torch.inf:
        raise ValueError(f"the order alpha must be {bounds}, got {alpha}")
    return torch.full((), alpha, dtype=widened(like).dtype, device=like.device)


def parameter(distribution: Distribution) -> Tensor:
    """One of its parameters: what dtype and device it has."""
    _check_distribution(distribution)
    if isinstance(distribution, Independent):
        return parameter(distribution.base_dist)
    if isinstance(distribution, OneHotCategorical):
        distribution = distribution._categorical
    if isinstance(distribution, Beta):
        distribution = distribution._dirichlet
    if isinstance(distribution, InverseGamma):
        distribution = distribution.base_dist
    names = ("loc", "probs", "logits", "rate", "concentration")
    found = [distribution.__dict__[name] for name in names if name in distribution.__dict__]
    return found[0] if found else torch.empty(())


def _dtype(distribution: Distribution) -> torch.dtype:
    g = as_gaussian(distribution)
    return parameter(distribution).dtype if g is None else g.dtype


def rounded(value: Tensor, p: Distribution, q: Distribution) -> Tensor:
    """The value in the dtype that the parameters promote to."""
    return value.to(torch.promote_types(_dtype(p), _dtype(q)))
