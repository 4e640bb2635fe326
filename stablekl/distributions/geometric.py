r"""Geometric distributions (failures before the first success), and their KL divergence without cancellation.

That of one trial, divided by p's probability of success: with :math:`L(v) = v - \log(1 + v)`,

.. math:: KL = L\!\left(\frac{q - p}{p}\right) + \frac{1 - p}{p}\,L\!\left(\frac{p - q}{1 - p}\right).

By logits, see `_trials`. torch subtracts p's entropy from a cross-entropy: 1e32 ulp off next to p = q, and NaN at
p = 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Geometric as TorchGeometric

from .._autograd import masked_product
from ..registry import register_hardened
from ._base import Checked, common_dtype, given, widened
from ._density import checked, outcomes
from ._scalar import scalar_rule
from ._trials import by_kinds, by_parameter, trial, wait_kl, wait_slopes
from .bernoulli import failure_excess, log_ratio, success_excess

__all__ = ["Geometric"]


class Geometric(TorchGeometric, Checked):
    """`torch.distributions.Geometric` with a KL divergence that is accurate for every pair of probabilities.

    Args:
        probs: of success, above 0 and up to 1; or
        logits: log(probs/(1 - probs)), real.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a probability is 0, outside of (0, 1] or NaN somewhere (says where).
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of the probability, from the probability or logit as given."""
        dtype = common_dtype(checked(self, value), given(self)[1])
        k, _, _, log_p, log_q = torch.broadcast_tensors(widened(value), *outcomes(self))
        return torch.where(k >= 0, masked_product(k, log_q) + log_p, -torch.inf).to(dtype)

    def entropy(self) -> Tensor:
        """The entropy, which torch takes from a probability that it has moved away from 0 and 1."""
        p, q, log_p, log_q = outcomes(self)
        # where p is no float it is 1 - log p to all digits
        failures = torch.where(p > 0, masked_product(q, log_q) / torch.where(p > 0, p, 1.0), -1.0)
        return -(log_p + failures).to(given(self)[1].dtype)


def _value(p: Tensor, q: Tensor) -> Tensor:
    return success_excess(p, q) + failure_excess(p, q) / p + 0.0  # not -0


def _gradient(p: Tensor, q: Tensor) -> tuple[Tensor, ...]:
    d = p - q
    infinite = (q == 1) & (p < 1)
    # log((1 - p)/(1 - q))/p^2, and (q - p)/(p q (1 - q))
    by_p = -log_ratio(1 - p, 1 - q, -d) / p / p
    by_q = torch.where(p < 1, -d / p / q / torch.where(q < 1, 1 - q, 1.0), -1 / q)
    return torch.where(infinite, 0.0, by_p), torch.where(infinite, torch.inf, by_q)


def _wait_value(kind_p: str, kind_q: str) -> Callable[..., Tensor]:
    return lambda x, y: wait_kl(trial(kind_p, x), trial(kind_q, y))


def _wait_gradient(kind_p: str, kind_q: str) -> Callable[..., tuple[Tensor, ...]]:
    def gradient(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        p, q = trial(kind_p, x), trial(kind_q, y)
        by_p, by_q = wait_slopes(p, q)
        return by_parameter(kind_p, p, by_p, (0.0, 0.0)), by_parameter(kind_q, q, by_q, (0.0, -1.0))

    return gradient


_RULES = by_kinds(_wait_value, _wait_gradient) | {("probs", "probs"): scalar_rule(_value, _gradient)}


@register_hardened(Geometric, Geometric)
def kl_geometric_geometric(p: TorchGeometric, q: TorchGeometric) -> Tensor:
    """KL between geometric distributions, elementwise; by probabilities or logits, whichever were given."""
    (name_p, x), (name_q, y) = given(p), given(q)
    return _RULES[name_p, name_q](x, y)
