r"""Continuous Bernoulli distributions, and their KL divergence without cancellation.

With :math:`\eta = \log(\lambda/(1 - \lambda))` the density on [0, 1] is :math:`\exp(\eta x - A(\eta))`, and

.. math:: KL = A(\eta_q) - A(\eta_p) - A'(\eta_p)\,d, \qquad A(\eta) = \log\frac{e^\eta - 1}{\eta}
             = \frac\eta2 + \log\frac{\sinh(\eta/2)}{\eta/2}, \qquad d = \eta_q - \eta_p.

* For d up to 6 as :math:`d^2 \int_0^1 (1 - t) A''(\eta_p + t d)\,dt`, positive, by 14 of Gauss and Legendre's nodes.
* Beyond, as it stands, of A or of its even part, or, far out on one side, where the distributions are all but
  exponential, as :math:`\mathrm{log\_ratio\_bregman}(\eta_q, \eta_p)` less the divergence of :math:`-\log(1 -
  e^{-s})`, s the size of :math:`\eta`: whichever has the smallest terms.

d comes from the difference of the probabilities or logits given. torch subtracts entropies and a logarithm of a
normaliser that it expands near 1/2, and clamps probabilities in its constructor; `ContinuousBernoulli` of stablekl
keeps them, and :math:`\lambda` = 0 or 1 is a point mass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import ContinuousBernoulli as TorchContinuousBernoulli
from torch.distributions import Distribution
from torch.types import _size

from .. import _double
from .._autograd import rowwise
from .._bregman import remainder_of_log
from .._double import Double
from .._elementwise import horner
from ..parameterizations import holds_data, raise_outside
from ..quadrature import gauss_legendre
from ..registry import register_hardened
from ._base import Checked, Given, common_dtype, given, widened
from ._density import checked
from ._scalar import attached
from ._trials import logit

__all__ = ["ContinuousBernoulli", "mean_slope", "natural_parameters"]

# A''(eta) and (A'(eta) - 1/2)/eta as polynomials in eta^2 for eta up to 4, highest power first: mpmath.chebyfit of 16
# and 15 coefficients at 60 digits, absolute errors 2e-17 and 9e-18.
_CLOSE = 4.0
_VARIANCE = (
    -8.7461811792205694e-26,
    1.4382300766259613e-23,
    -1.172613802458125e-21,
    6.5133466340978834e-20,
    -2.8795353968592137e-18,
    1.1213931842922492e-16,
    -4.103466029745024e-15,
    1.45788586721147e-13,
    -5.0837413653991473e-12,
    1.7397046974088612e-10,
    -5.8126035495973551e-9,
    1.8789080462182801e-7,
    -5.7870370296254095e-6,
    0.00016534391534041344,
    -0.0041666666666660103,
    0.083333333333333313,
)
_MEAN = (
    1.5860800101113014e-25,
    -2.5294553140893172e-23,
    2.026368811982919e-21,
    -1.129883044469803e-19,
    5.161013381374339e-18,
    -2.1410370188615053e-16,
    8.561801710616144e-15,
    -3.3884123460150783e-13,
    1.3382063400019012e-11,
    -5.2841779407789306e-10,
    2.0876754923315428e-8,
    -8.2671957460525947e-7,
    3.3068783067644531e-5,
    -0.001388888888888646,
    0.083333333333333325,
)
# The largest d of the integral, and the number of its nodes; A'' has its poles at 2 pi i.
_REACH, _NODES = 6.0, 14


class ContinuousBernoulli(Given, TorchContinuousBernoulli, Checked):
    """`torch.distributions.ContinuousBernoulli` with a KL divergence that is accurate for every pair of parameters.

    Args:
        probs: between 0 and 1; or
        logits: log(probs/(1 - probs)), real or infinite.
        lims: as in torch: between them its other methods use series about 1/2.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is outside of its domain somewhere (says where).
    """

    def __init__(
        self,
        probs: Tensor | float | None = None,
        logits: Tensor | float | None = None,
        lims: tuple[float, float] = (0.499, 0.501),
        validate_args: bool | None = None,
    ) -> None:
        """Check what was given, and keep it besides torch's clamped version of it."""
        checked = self._validate_args if validate_args is None else validate_args
        # torch checks the clamped version, and looks at the data whenever validate_args is not None
        self._validate_args = False
        super().__init__(probs, logits, lims, validate_args=None)
        self._validate_args = checked
        self._keep(probs, logits, self._param)
        x = self.given_value
        if checked and holds_data(x):
            good = (x >= 0) & (x <= 1) if self.given_as == "probs" else x == x
            if not bool(good.all()):
                required = "between 0 and 1" if self.given_as == "probs" else "real, and no NaN"
                raise_outside(type(self).__name__, self.given_as, x, good, required)

    def expand(self, batch_shape: _size, _instance: Any = None) -> ContinuousBernoulli:
        """Return this distribution with its batch shape expanded; no memory is allocated."""
        new = self._get_checked_instance(ContinuousBernoulli, _instance)  # type: ignore[no-untyped-call]
        expanded: ContinuousBernoulli = super().expand(batch_shape, new)  # type: ignore[no-untyped-call]
        expanded.given_as, expanded.given_value = self.given_as, self.given_value.expand(batch_shape)
        return expanded

    def _evaluated(self, f: Callable[..., Tensor], *values: Tensor) -> Tensor:
        """Of the values and of the logit, of what was given rather than of torch's clamped probability."""
        eta = _logit(self).hi
        return f(*torch.broadcast_tensors(*map(widened, values), eta)).to(common_dtype(self.given_value, *values))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of the density: -s y - log((1 - e^-s)/s), s the size of the logit and y the distance from the mode."""
        return self._evaluated(_log_density, checked(self, value))

    def cdf(self, value: Tensor) -> Tensor:
        """P(X <= value), without torch's expansion about 1/2."""
        return self._evaluated(_distribution, checked(self, value))

    def entropy(self) -> Tensor:
        """The entropy: minus the divergence from the uniform distribution, which has the logit 0."""
        return self._evaluated(lambda eta: -_kl(eta, torch.zeros_like(eta), -eta.detach()))

    @property
    def mean(self) -> Tensor:
        """The mean, to its relative accuracy."""
        return self._evaluated(_mean)

    @property
    def variance(self) -> Tensor:
        """The variance."""
        return self._evaluated(lambda eta: torch.where(eta.isinf(), 0.0, _variance(torch.where(eta.isinf(), 0.0, eta))))


def _log_density(x: Tensor, eta: Tensor) -> Tensor:
    finite = eta.isfinite()
    up, s = eta > 0, torch.where(finite, eta, 1.0).abs()
    y = torch.where(up, 1 - x, x)
    inside = (x >= 0) & (x <= 1)
    value = torch.where(finite, -s * y - _fall(s), torch.where(y == 0, torch.inf, -torch.inf))
    return torch.where(inside, value, -torch.inf)


def _distribution(x: Tensor, eta: Tensor) -> Tensor:
    some = (eta != 0) & eta.isfinite()
    up, s = eta > 0, torch.where(some, eta, 1.0).abs()
    low = torch.expm1(-s * x) / torch.expm1(-s)
    value = torch.where(up, torch.exp(-s * (1 - x)) * low, low)
    value = torch.where(some, value, torch.where(eta == 0, x, torch.where(up, 0.0, 1.0)))
    return torch.where(x <= 0, 0.0, torch.where(x >= 1, 1.0, value))


def _mean(eta: Tensor) -> Tensor:
    low = _low_mean(-eta.abs())
    return torch.where(eta > 0, 1 - low, low)


def _variance(eta: Tensor) -> Tensor:
    """The second derivative of A, 1/eta^2 - 1/(4 sinh(eta/2)^2)."""
    close = eta.abs() < _CLOSE
    near, far = torch.where(close, eta, 0.0), torch.where(close, _CLOSE, eta)
    fall = torch.exp(-torch.where(far > 0, far, -far))
    return torch.where(close, horner(near * near, _VARIANCE), 1 / far / far - fall / (1 - fall) / (1 - fall))


def mean_slope(eta: Tensor) -> Tensor:
    """A'(eta) - 1/2, the mean less 1/2: coth(eta/2)/2 - 1/eta."""
    close = eta.abs() < _CLOSE
    near, far = torch.where(close, eta, 0.0), torch.where(close, _CLOSE, eta)
    half = 0.5 / torch.tanh(0.5 * far)
    return torch.where(close, near * horner(near * near, _MEAN), half - 1 / far)


def _fall(s: Tensor) -> Tensor:
    """log((1 - e^-s)/s) for s >= 0: A(-s)."""
    safe = torch.where(s > 0, s, 1.0)
    return torch.where(s > 0, torch.log(-torch.expm1(-safe) / safe), 0.0)


def _low_mean(eta: Tensor) -> Tensor:
    """A'(eta) for eta <= 0."""
    far = torch.where(eta < -_CLOSE, -eta, _CLOSE)
    return torch.where(eta < -_CLOSE, 1 / far - 1 / torch.expm1(far), 0.5 + mean_slope(eta))


def _integral(eta: Tensor, d: Tensor, power: int) -> Tensor:
    """Of (1 - t)^power A''(eta + t d) over t from 0 to 1."""
    t, weights, _ = gauss_legendre(_NODES, eta.device).to(eta.dtype)
    terms: Tensor = weights * (1 - t) ** power * _variance(eta.unsqueeze(-1) + t * d.unsqueeze(-1))
    return terms.sum(-1)


def _sums(terms: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Of the terms and of their sizes."""
    stacked = torch.stack(terms)
    return stacked.sum(0), stacked.abs().sum(0)


def _value(eta_p: Tensor, eta_q: Tensor, d: Tensor) -> tuple[Tensor]:
    close = d.abs() < _REACH
    near = d * _integral(torch.where(close, eta_p, 0.0), torch.where(close, d, 0.0), 1) * d
    size_p, size_q = eta_p.abs(), eta_q.abs()
    fall_p, fall_q = _fall(size_p), _fall(size_q)
    # of A less eta/2; of A, mirrored so that p leans towards 0; and far out on one side
    even = 0.5 * size_q + fall_q, -(0.5 * size_p + fall_p), -mean_slope(eta_p) * d
    one_side = (eta_p > 0) == (eta_q > 0)
    leaning = torch.where(one_side, 0.0, size_q) + fall_q, -fall_p, -_low_mean(-size_p) * torch.where(eta_p > 0, -d, d)
    s, r = torch.where(one_side, size_p, 1.0), torch.where(one_side, size_q, 1.0)
    growth = torch.where(eta_p > 0, d, -d) / s
    tails = (
        remainder_of_log(torch.where(one_side, growth, 0.0), r / s),
        torch.log1p(-torch.exp(-r)),
        -torch.log1p(-torch.exp(-s)),
        -growth * (s / torch.expm1(s)),
    )
    value, size = _sums(even)
    for terms, exists in ((leaning, torch.ones_like(one_side)), (tails, one_side)):
        other, other_size = _sums(terms)
        better = (other_size < size) & exists
        value, size = torch.where(better, other, value), torch.where(better, other_size, size)
    value = torch.where(close, near, value)
    known = ~(eta_p.isnan() | eta_q.isnan())
    return (torch.where((eta_p.isinf() | eta_q.isinf()) & known, torch.inf, value),)


def _gradient(inputs: tuple[Tensor, ...], saved: object) -> tuple[Tensor, ...]:
    eta_p, eta_q, d = inputs
    finite = eta_p.isfinite() & eta_q.isfinite()  # elsewhere the divergence is infinite, and constant
    eta_p, eta_q, d = (torch.where(finite, x, 0.0) for x in (eta_p, eta_q, d))
    plain = eta_q - eta_p
    d = torch.where(plain.isfinite(), attached(d, plain), d)
    close = d.abs() < _REACH
    near = d * _integral(torch.where(close, eta_p, 0.0), torch.where(close, d, 0.0), 0)
    # where both lean to one side by their distances from it
    up, down = (torch.where(eta_p > 0, -x, x) for x in (eta_q, eta_p))
    apart = _low_mean(torch.where(up < 0, up, -1.0)) - _low_mean(down)
    one_side = torch.where(eta_p > 0, -apart, apart)
    far = torch.where(up < 0, one_side, mean_slope(eta_q) - mean_slope(eta_p))
    by_q = torch.where(close, near, far)
    return -_variance(eta_p) * d, by_q, torch.zeros_like(d)


_kl = rowwise(_value, _gradient)


def _logit(distribution: Distribution) -> Double:
    name, x = given(distribution)
    return logit(name, widened(x))


def natural_parameters(p: Distribution, q: Distribution) -> tuple[Tensor, Tensor, Tensor]:
    """The logits of both in float64, and q's less p's to its relative accuracy."""
    a, b = _logit(p), _logit(q)
    shape = torch.broadcast_shapes(a.hi.shape, b.hi.shape)
    with torch.no_grad():
        d = _double.subtract(b, a).hi
        (name_p, x), (name_q, y) = given(p), given(q)
        if name_p == name_q == "probs":  # twice the digits of logarithms are not enough next to p = q
            odds = (widened(y) - widened(x)) / widened(x) / (1 - widened(y))
            d = torch.where(odds.abs() < 1e-10, torch.log1p(odds.clamp(-0.5, 0.5)), d)
        # logits whose difference is no float are on either side of 0, where the divergence hardly depends on it
        plain, largest = b.hi - a.hi, torch.finfo(d.dtype).max
        d = torch.where(plain.isinf(), largest * plain.sign(), d)
        d = torch.where(a.hi.isinf() | b.hi.isinf(), torch.where(plain.isnan() & (a.hi != b.hi), plain, 0.0), d)
    return a.hi.expand(shape), b.hi.expand(shape), d.expand(shape)


@register_hardened(ContinuousBernoulli, ContinuousBernoulli)
def kl_continuous_bernoulli_continuous_bernoulli(p: TorchContinuousBernoulli, q: TorchContinuousBernoulli) -> Tensor:
    """KL between continuous Bernoulli distributions, elementwise; see the module."""
    eta_p, eta_q, d = natural_parameters(p, q)
    same_end = (eta_p == eta_q) & eta_p.isinf()
    return torch.where(same_end, 0.0, _kl(eta_p, eta_q, d.detach())).to(common_dtype(given(p)[1], given(q)[1]))
