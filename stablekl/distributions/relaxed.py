"""Relaxed categories: no KL rule, and an error that says so.

torch sends RelaxedBernoulli and RelaxedOneHotCategorical to its rule of transformed distributions, which then fails for
want of a rule between classes that nobody has built, LogitRelaxedBernoulli and ExpRelaxedCategorical. Their divergence
is an integral without a closed form, of as many dimensions as there are categories less one; it is not the divergence
of the categories, which is only what a training loop may want in its place.
"""

from __future__ import annotations

from typing import NoReturn

from torch.distributions import (
    Distribution,
    RelaxedBernoulli,
    RelaxedOneHotCategorical,
)
from torch.distributions.relaxed_bernoulli import LogitRelaxedBernoulli
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical

from ..registry import register_hardened

__all__ = ["kl_relaxed_relaxed"]

_PLAIN: dict[type[Distribution], str] = {
    LogitRelaxedBernoulli: "Bernoulli",
    RelaxedBernoulli: "Bernoulli",
    ExpRelaxedCategorical: "OneHotCategorical",
    RelaxedOneHotCategorical: "OneHotCategorical",
}


def kl_relaxed_relaxed(p: Distribution, q: Distribution) -> NoReturn:
    """KL between relaxed categories.

    Raises:
        NotImplementedError: always.
    """
    plain = next(name for family, name in _PLAIN.items() if isinstance(p, family))
    raise NotImplementedError(
        f"no KL rule for {type(p).__name__} against {type(q).__name__}: the divergence of relaxed categories is an "
        "integral without a closed form. Estimate it with stablekl.estimators.kl_monte_carlo(p, q), or, if the "
        f"divergence of the categories themselves will do, take that of {plain}(logits=...)"
    )


for _family in _PLAIN:
    register_hardened(_family, _family, torch_lacks_it=True)(kl_relaxed_relaxed)
