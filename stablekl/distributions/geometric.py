r"""Geometric distributions (failures before the first success), and their KL divergence without cancellation.

That of one trial, divided by p's probability of success: with :math:`L(v) = v - \log(1 + v)`,

.. math:: KL = L\!\left(\frac{q - p}{p}\right) + \frac{1 - p}{p}\,L\!\left(\frac{p - q}{1 - p}\right).

torch subtracts p's entropy from a cross-entropy: 1e32 ulp off next to p = q, and NaN at p = 1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Geometric as TorchGeometric

from .._autograd import masked_product, rowwise
from .._double import Double
from ..registry import register_hardened
from ..special import expm1mx_value
from ._base import Checked, common_dtype, given, widened
from ._density import checked, outcomes
from ._outcomes import of_log_weights
from ._scalar import scalar_rule
from .bernoulli import failure_excess, log_outcomes, log_ratio, paired, success_excess

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
    return success_excess(p, q) + failure_excess(p, q) / p


def _gradient(p: Tensor, q: Tensor) -> tuple[Tensor, ...]:
    d = p - q
    infinite = (q == 1) & (p < 1)
    # log((1 - p)/(1 - q))/p^2, and (q - p)/(p q (1 - q))
    by_p = -log_ratio(1 - p, 1 - q, -d) / p / p
    by_q = torch.where(p < 1, -d / p / q / torch.where(q < 1, 1 - q, 1.0), -1 / q)
    return torch.where(infinite, 0.0, by_p), torch.where(infinite, torch.inf, by_q)


_kl = scalar_rule(_value, _gradient)


def _log_value(a: Tensor, a_low: Tensor, b: Tensor, b_low: Tensor) -> tuple[Tensor]:
    o = of_log_weights(Double(a, a_low), Double(b, b_low))
    small = o.t.abs() < 1
    # E(-t), or q/p - 1 + t; the failures' share in units of p, which is 0 where the success is no float
    excess = torch.where(small, expm1mx_value(torch.where(small, -o.t, 0.0)), torch.exp(-o.t) - 1 + o.t)
    odds = torch.exp(a[..., 1] - a[..., 0])
    failures = torch.where(excess[..., 1] == 0, 0.0, odds * excess[..., 1])
    return (torch.where(o.p[..., 1] == 0, torch.exp(-a[..., 0]) * o.q[..., 1], failures) + excess[..., 0],)


def _log_gradient(inputs: tuple[Tensor, ...], saved: object) -> tuple[Tensor, ...]:
    a, a_low, b, b_low = inputs
    o = of_log_weights(Double(a, a_low.detach()), Double(b, b_low.detach()))
    # by p's logit (1 - p)/p log((1 - p)/(1 - q)), by q's q/p - 1 = v
    odds = torch.exp(a[..., 1] - a[..., 0])
    by_a = -torch.where(o.t[..., 1] == 0, 0.0, odds * o.t[..., 1])
    by_b = o.v[..., 0]
    # each logit is the difference of two logarithms
    return torch.stack([by_a, -by_a], -1), torch.zeros_like(a), torch.stack([by_b, -by_b], -1), torch.zeros_like(b)


_log_kl = rowwise(_log_value, _log_gradient)


@register_hardened(Geometric, Geometric)
def kl_geometric_geometric(p: TorchGeometric, q: TorchGeometric) -> Tensor:
    """KL between geometric distributions, elementwise; by probabilities or logits, whichever were given."""
    (name_p, x), (name_q, y) = given(p), given(q)
    if name_p == name_q == "probs":
        return _kl(x, y)
    a, b = paired(log_outcomes(p), log_outcomes(q))
    return _log_kl(a.hi, a.lo.detach(), b.hi, b.lo.detach()).to(common_dtype(x, y))
