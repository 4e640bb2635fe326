r"""Bernoulli distributions, and their KL divergence as a sum of non-negative terms, exact at probabilities of 0 and 1.

.. math:: KL = p\,L\!\left(\frac{q - p}{p}\right) + (1 - p)\,L\!\left(\frac{p - q}{1 - p}\right), \qquad
          L(v) = v - \log(1 + v),

of probabilities; of logits, or of one of each, the same as of two categories (see `_outcomes`). An outcome that p
excludes adds q's probability of it; one that q alone excludes makes the divergence infinite. torch's differences of
cross-entropies cancel near p = q, and its logits of 0 against 20 give inf for 9.307.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import Distribution

from .. import _double
from .._autograd import masked_product
from .._bregman import log_quotient, remainder_of_log
from .._double import Double
from ..registry import register_hardened
from ._base import Checked, common_dtype, given, widened
from ._density import checked, outcomes
from ._outcomes import log_of, log_weights_kl
from ._scalar import attached, scalar_rule

__all__ = ["Bernoulli", "bernoulli_kl", "failure_excess", "log_outcomes", "log_ratio", "paired", "success_excess"]


class Bernoulli(TorchBernoulli, Checked):
    """`torch.distributions.Bernoulli` with a KL divergence that is exact at probabilities of 0 and 1.

    Args:
        probs: of 1, between 0 and 1; or
        logits: log(probs/(1 - probs)), real or infinite.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a probability is outside of [0, 1] or NaN somewhere (says where).

    Example:
        >>> import torch, stablekl
        >>> p, q = stablekl.Bernoulli(torch.tensor(1.0)), stablekl.Bernoulli(logits=torch.tensor(-60.0))
        >>> print(torch.distributions.kl_divergence(p, q))
        tensor(60.)
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of the probability, of those given: torch moves them away from 0 and 1 first."""
        dtype = common_dtype(checked(self, value), given(self)[1])
        x, _, _, log_p, log_q = torch.broadcast_tensors(widened(value), *outcomes(self))
        return (masked_product(x, log_p) + masked_product(1 - x, log_q)).to(dtype)

    def entropy(self) -> Tensor:
        """The entropy, 0 for probabilities of 0 and 1."""
        p, q, log_p, log_q = outcomes(self)
        return -(masked_product(p, log_p) + masked_product(q, log_q)).to(given(self)[1].dtype)


def _excess(x: Tensor, m: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """L(v) for v = m/x - 1 = d/x, and whether v is large; x positive."""
    v = d / x
    return remainder_of_log(v, m / x), v >= 1


def success_excess(p: Tensor, q: Tensor) -> Tensor:
    """[p log(p/q) + q - p]/p for positive p."""
    near, far = _excess(p, q, q - p)
    return torch.where(far, (q - p) / p - log_quotient(q, p), near)


def failure_excess(p: Tensor, q: Tensor) -> Tensor:
    """(1 - p) log((1 - p)/(1 - q)) + p - q, by the differences of p and q; p - q is not that of 1 - q and 1 - p."""
    x, m, d = 1 - p, 1 - q, p - q
    some = x > 0
    safe = torch.where(some, x, 1.0)
    near, far = _excess(safe, m, d)
    terms = torch.where(far, d - x * log_quotient(torch.where(m > 0, m, 1.0), safe), x * near)
    return torch.where(some, terms, m)


def _value(p: Tensor, q: Tensor) -> Tensor:
    some = p > 0
    x = torch.where(some, p, 1.0)
    v = (q - p) / x
    # p L(v), but q - p - p log(q/p) where v may overflow
    near = x * remainder_of_log(v, q / x)
    far = (q - x) - x * log_quotient(torch.where(q > 0, q, 1.0), x)
    return torch.where(some, torch.where(v >= 1, far, near), q) + failure_excess(p, q)


def log_ratio(x: Tensor, y: Tensor, d: Tensor) -> Tensor:
    """log(x/y) with d = x - y; 0 where x is 0."""
    some = (x > 0) & (y > 0)
    x, y, d = (torch.where(some, v, w) for v, w in ((x, 1.0), (y, 1.0), (d, 0.0)))
    near = (d.abs() < 0.5 * y) & some
    log = torch.where(near, torch.log1p(torch.where(near, d / y, 0.0)), log_quotient(x, y))
    return torch.where(some, log, 0.0)


def _gradient(p: Tensor, q: Tensor) -> tuple[Tensor, ...]:
    # The derivative of 0 log 0 is taken to be 0.
    d = p - q
    infinite = ((q == 0) & (p > 0)) | ((q == 1) & (p < 1))
    by_p = log_ratio(p, q, d) - log_ratio(1 - p, 1 - q, -d)
    inner = (p > 0) & (p < 1)
    edge = torch.where(p == 0, 1 / (1 - q), -1 / torch.where(q > 0, q, 1.0))
    by_q = torch.where(inner, -d / torch.where(inner, q, 0.5) / torch.where(inner, 1 - q, 0.5), edge)
    return torch.where(infinite, 0.0, by_p), by_q


_kl = scalar_rule(_value, _gradient)


def log_outcomes(distribution: Distribution) -> Double:
    """Logarithms of the weights of 1 and 0, ``(..., 2)``, to twice the digits."""
    name, x = given(distribution)
    x = widened(x)
    zero = torch.zeros_like(x)
    if name == "logits":  # in units of the larger weight, which an infinite logit makes all there is
        hi = torch.stack([torch.where(x > 0, zero, x), torch.where(x > 0, -x, zero)], -1)
        return Double(hi, torch.zeros_like(hi))
    success = log_of(x)
    with torch.no_grad():
        some = x < 1
        failure = _double.log(_double.exact_sum(torch.ones_like(x), torch.where(some, -x, zero)))
    hi = attached(failure.hi, torch.log1p(torch.where(some, -x, 0.0)))
    hi, lo = torch.where(some, hi, -torch.inf), torch.where(some, failure.lo, 0.0)
    return Double(torch.stack([success.hi, hi], -1), torch.stack([success.lo, lo], -1))


def bernoulli_kl(p: Distribution, q: Distribution) -> Tensor:
    """KL between the successes of one trial of each, in float64; by probabilities or logits, whichever were given."""
    (name_p, x), (name_q, y) = given(p), given(q)
    if name_p == name_q == "probs":
        return _kl(widened(x), widened(y))
    return log_weights_kl(*paired(log_outcomes(p), log_outcomes(q)))


def paired(a: Double, b: Double) -> tuple[Double, Double]:
    """Both, of one shape."""
    shape = torch.broadcast_shapes(a.hi.shape, b.hi.shape)
    return Double(a.hi.expand(shape), a.lo.expand(shape)), Double(b.hi.expand(shape), b.lo.expand(shape))


@register_hardened(Bernoulli, Bernoulli)
def kl_bernoulli_bernoulli(p: TorchBernoulli, q: TorchBernoulli) -> Tensor:
    """KL between Bernoulli distributions, elementwise; see the module."""
    return bernoulli_kl(p, q).to(common_dtype(given(p)[1], given(q)[1]))
