r"""Binomial distributions, and their KL divergence: that of one trial (see `bernoulli`) times their number.

Where q has fewer trials than p, it is infinite unless p never succeeds. Where it has more, with n and m trials and the
binomial coefficients' ratio as an integral, since :math:`\log c = \int_0^\infty (e^{-t} - e^{-ct})\,dt/t`,

.. math:: KL = n\,KL_1 - (m - n) \log(1 - q)
               - \int_0^\infty \sum_{i=1}^{m-n} e^{-it}
                 \left[\left(p + (1 - p) e^{-t}\right)^n - e^{-nt}\right] \frac{dt}{t},

by the trapezoidal rule in log t, whose 360 points are as many for any n; a sum over n + 1 outcomes would depend on
the data. What is subtracted may be nearly all: the error is some ulps of the larger terms, not of the result.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Binomial as TorchBinomial

from .._autograd import masked_product, may_hold
from .._deviance import binomial_deviance, binomial_rest
from ..registry import register_hardened
from ._base import Checked, common_dtype, given, widened
from ._density import checked, outcomes
from .bernoulli import bernoulli_kl

__all__ = ["Binomial"]

# Points of log t: from where t m is 1e-17 for any m to where e^-t is 1e-17, at a step whose error is e^(-pi^2/0.2).
_FIRST, _LAST, _STEP = -68.0, 4.0, 0.2


class Binomial(TorchBinomial, Checked):
    """`torch.distributions.Binomial` with a KL divergence that is exact at probabilities of 0 and 1.

    Args:
        total_count: number of trials, not negative.
        probs: of success, between 0 and 1; or
        logits: log(probs/(1 - probs)), real or infinite.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is outside of its domain somewhere (says where).

    Example:
        >>> import torch, stablekl
        >>> p, q = stablekl.Binomial(3, torch.tensor(1.0)), stablekl.Binomial(3, torch.tensor(0.5))
        >>> print(torch.distributions.kl_divergence(p, q))
        tensor(2.0794)
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of the probability, by deviances (see `_deviance`), of the probabilities or logits as they were given."""
        dtype = common_dtype(checked(self, value), self.total_count, given(self)[1])
        inputs = widened(value), widened(self.total_count), *outcomes(self)
        return _log_mass(*torch.broadcast_tensors(*inputs)).to(dtype)


def _log_mass(k: Tensor, n: Tensor, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    inside = (k >= 0) & (k <= n)
    k, j = torch.where(inside, k, 0.0), torch.where(inside, n - k, n)
    value = binomial_rest(k, j) - binomial_deviance(k, j, p, q, log_p, log_q)
    return torch.where(inside, value, -torch.inf)


def _probability(distribution: TorchBinomial) -> Tensor:
    name, x = given(distribution)
    return torch.sigmoid(widened(x)) if name == "logits" else widened(x)


def _more_trials(n: Tensor, p: Tensor, m: Tensor, q: Tensor, one: Tensor) -> Tensor:
    """For m above n, from the divergence ``one`` of a trial."""
    points = torch.arange(_FIRST, _LAST, _STEP, dtype=p.dtype, device=p.device)
    t = torch.exp(points)
    n, p, m, q, more = (x.unsqueeze(-1) for x in (n, p, m, q, torch.where(m > n, m - n, 0.0)))
    terms = torch.expm1(-more * t) / torch.expm1(-t) * torch.exp(-t)
    fall = (1 - p) * torch.expm1(-t)
    early = fall > -0.5
    near = torch.log1p(torch.where(early, fall, 0.0))
    terms = terms * (
        torch.exp(n * torch.where(early, near, torch.log(p + (1 - p) * torch.exp(-t)))) - torch.exp(-n * t)
    )
    certain = q.squeeze(-1) == 1
    failures = torch.log1p(-torch.where(certain, 0.0, q.squeeze(-1)))
    value = (
        masked_product(n.squeeze(-1), torch.where(certain, 0.0, one))
        - more.squeeze(-1) * failures
        - _STEP * terms.sum(-1)
    )
    return torch.where(certain, torch.inf, value)


@register_hardened(Binomial, Binomial)
def kl_binomial_binomial(p: TorchBinomial, q: TorchBinomial) -> Tensor:
    """KL between binomial distributions, elementwise; see the module."""
    dtype = common_dtype(given(p)[1], given(q)[1])
    one = bernoulli_kl(p, q)
    n, m, a, b = (
        x.expand(one.shape)
        for x in torch.broadcast_tensors(
            widened(p.total_count), widened(q.total_count), _probability(p), _probability(q)
        )
    )
    if not may_hold(n != m):
        return masked_product(n, one).to(dtype)
    # what is not taken must be finite, for the gradient's sake
    fewer, none = n < m, (n > m) & (a == 0)
    value = masked_product(n, torch.where(n == m, one, 0.0))
    inputs = (torch.where(fewer, x, s) for x, s in ((n, 1.0), (a, 0.5), (m, 2.0), (b, 0.5), (one, 0.0)))
    rest = torch.where(none, masked_product(m, torch.where(none, one, 0.0)), torch.inf)
    value = torch.where(n == m, value, torch.where(fewer, _more_trials(*inputs), rest))
    return value.to(dtype)
