"""Pairs whose KL divergence is infinite whatever the parameters: p has mass where q has none.

The result has the broadcast batch shape and the dtype that all parameters promote to (torch's has the shape and dtype
of p's first parameter), and its gradient is 0. A NaN among the parameters makes it NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Distribution

from ...registry import register_hardened
from .._scalar import scalar_rule
from ..beta import Beta
from ..continuous_bernoulli import ContinuousBernoulli
from ..exponential import Exponential
from ..gamma import Gamma
from ..gumbel import Gumbel
from ..laplace import Laplace
from ..normal import Normal
from ..pareto import Pareto
from ..uniform import Uniform
from ._rule import Value, read

__all__ = ["INFINITE"]

_BOUNDED: tuple[type[Distribution], ...] = (Beta, ContinuousBernoulli, Uniform)
_BEGINNING: tuple[type[Distribution], ...] = (Exponential, Gamma, Pareto)

# By the support of p: the families of q that lack a part of it.
INFINITE: dict[type[Distribution], tuple[type[Distribution], ...]] = {
    Beta: (Pareto,),
    ContinuousBernoulli: (Pareto,),
    Exponential: (*_BOUNDED, Pareto),
    Gamma: (*_BOUNDED, Pareto),
    Gumbel: (*_BOUNDED, *_BEGINNING),
    Laplace: (*_BOUNDED, *_BEGINNING),
    Normal: (*_BOUNDED, *_BEGINNING),
    Pareto: _BOUNDED,
}


def _value(*parameters: Tensor) -> Tensor:
    """inf, but NaN of NaN; that a parameter is outside of its domain is not looked at."""
    known = parameters[0] == parameters[0]
    for x in parameters[1:]:
        known = known & (x == x)
    return torch.where(known, torch.inf, torch.nan)


_infinite = scalar_rule(_value, lambda *x: tuple(torch.zeros_like(v) for v in x))


def _rule(family_p: type[Distribution], family_q: type[Distribution]) -> Value:
    def rule(p: Distribution, q: Distribution) -> Tensor:
        """Infinite, elementwise; see the module."""
        return _infinite(*read(p, family_p)[1], *read(q, family_q)[1])

    return rule


for _p, _families in INFINITE.items():
    for _q in _families:
        register_hardened(_p, _q)(_rule(_p, _q))
