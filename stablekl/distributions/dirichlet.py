r"""Dirichlet distributions, and their KL divergence without cancellation, stick by stick.

A Dirichlet variable is a stick broken K - 1 times, each time at a Beta variable of the concentration :math:`a =
\alpha_k` and of the sum :math:`b = \sum_{j>k} \alpha_j` of those that follow, and its divergence is the sum of these
Beta variables'. That of a Beta is the Bregman divergence of :math:`\log B(a, b)`, which is convex. Let a be p's larger
concentration and s = a + b. Ten steps of :math:`\log B(a, b) = \log B(a + 1, b) + \log(s/a)` and Stirling's series
leave

.. math:: KL = B_g(b_q, b_p) + \sum_{n=0}^{10} w_n \left[\frac{s_q - s_p}{s_p + n} \tau_n + L(\tau_n)\right]
              + a' L(\sigma_a) + b_q L(\sigma_b) + \text{series},

with L(t) = t - log(1 + t), :math:`w_n` = 1 but 1/2 at last, :math:`1 + \tau_n` the ratio of q's mean to p's after n
steps, a' and the two :math:`\sigma` those of a discrete divergence between these means after ten, and :math:`B_g` of
`_bregman`. Where a and b are alike it is less to add up without any step, :math:`a_q L(\sigma_a) + b_q L(\sigma_b) +
B_g(a_q, a_p) + B_g(b_q, b_p) - B_g(s_q, s_p)`; of both the one whose terms are smaller is taken, at most 3.3 times the
result. Where b is small and only a differs, the latter loses a/b of its digits: what is left is of the order of b.

Every :math:`\tau` and :math:`\sigma` comes from one number, :math:`a_q b_p - a_p b_q`, taken from exact products of
concentrations, of their differences, or of differences less the same multiple of p's: neither sums that round nor means
that agree to more digits than concentrations cost anything.

torch adds lgammas and digammas, of which nothing is left near p = q (Beta(1e6, 1e6) to Beta(1e6 + 100, 1e6): 5.31 for
0.0025 in float32).
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor
from torch.distributions import Dirichlet as TorchDirichlet

from .. import _fused
from .._autograd import may_hold
from .._bregman import (
    STEPS,
    lgamma_bend,
    lgamma_bregman_value,
    log_quotient,
    power_series,
    product_difference,
    remainder_of_log,
    stirling_series,
)
from .._deviance import compensated_sum, deviance, digamma, gamma_entropy, gamma_scale
from .._elementwise import product_error, sum_error
from .._scaled import (
    Scaled,
    difference_of_products,
    digamma_rise,
    less_product,
    lgamma_change,
    scaled,
    scaled_sum,
    trigamma,
    trigamma_fall,
    weighted_remainder,
    where,
)
from ..quadrature import gauss_legendre
from ..registry import register_hardened
from ._base import Checked
from ._density import checked, evaluated
from ._scalar import attached, vector_rule

__all__ = ["Dirichlet", "dirichlet_kl"]

# Gauss and Legendre's nodes on [0, 1]: as many as functions of A + t b need for b below A/50.
_NODES, _SMALL = 4, 0.02


class Dirichlet(TorchDirichlet, Checked):
    """`torch.distributions.Dirichlet` with a KL divergence that is accurate for every pair of concentrations.

    Args:
        concentration: positive, ``(..., K)``.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a concentration is zero, negative or NaN somewhere (says where).

    Example:
        >>> import torch, stablekl
        >>> p = stablekl.Dirichlet(torch.tensor([1e6, 1e6, 1e6]))
        >>> q = stablekl.Dirichlet(torch.tensor([1e6 + 100, 1e6, 1e6]))
        >>> print(f"{torch.distributions.kl_divergence(p, q):.4e}")
        3.3332e-03
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of the density, by deviances where torch's lgammas, of the size of n log n, cancel (see `_deviance`)."""
        return evaluated(_log_density, checked(self, value), self.concentration)

    def entropy(self) -> Tensor:
        """The entropy, by those of Gammas: sum h(a) - h(n) - (K - 1) digamma(n), where n log n has cancelled."""
        return evaluated(_entropy, self.concentration)


def _log_density(x: Tensor, a: Tensor) -> Tensor:
    n, lost = compensated_sum(a)
    (of_n, rest_n), (scale, rest) = gamma_scale(n), gamma_scale(a)
    whole, lost = n.unsqueeze(-1), lost.unsqueeze(-1)
    inside = x > 0
    safe = torch.where(inside, x, 1.0)
    mean, log_whole = whole * safe, torch.log(whole)
    t = product_difference(whole, safe, a, torch.ones_like(a)) + lost * safe
    gap = deviance(a, attached(t, mean - a), mean, log_whole + torch.log(safe))
    edge = torch.where(a == 1, log_whole, torch.where(a < 1, torch.inf, -torch.inf))
    terms = torch.where(inside, log_quotient(scale, safe) - rest - gap, edge)
    # rounded points do not sum to 1
    excess, rest_x = compensated_sum(torch.cat([x, -torch.ones_like(x[..., :1])], -1))
    return terms.sum(-1) + n * (excess + rest_x) + (rest_n - torch.log(of_n))


def _entropy(a: Tensor) -> Tensor:
    n = a.sum(-1)
    return gamma_entropy(a).sum(-1) - gamma_entropy(n) - (a.shape[-1] - 1) * digamma(n)


def _series(a_p: Tensor, a_q: Tensor, d_a: Tensor, b_p: Tensor, b_q: Tensor, d_b: Tensor, cross: Tensor) -> Tensor:
    """What Stirling's series adds for a less what it adds for s = a + b; all a from 10 on.

    Where b is small that is an integral over a + t b of its derivative, every term of which is of the order of b;
    ``cross`` is a_q b_p - a_p b_q.
    """
    largest = torch.finfo(a_p.dtype).max

    def at(x: Tensor, y: Tensor, d: Tensor) -> Tensor:
        x, y, d = (v.clamp(-largest, largest) for v in (x, y, d))
        u, w = 1 / x, 1 / y
        return (d / x) * (d / y) * u * stirling_series(u, u, w)

    small = torch.maximum(b_p / a_p, b_q / a_q) < _SMALL
    difference = at(a_p, a_q, d_a) - at(a_p + b_p, a_q + b_q, d_a + d_b)
    t, weights, _ = gauss_legendre(_NODES, a_p.device).to(a_p.dtype)
    x, y, d, b, cross = (v.unsqueeze(-1) for v in (a_p, a_q, d_a, d_b, cross))
    x, y = ((x + t * b_p.unsqueeze(-1)).clamp(max=largest), (y + t * b_q.unsqueeze(-1)).clamp(max=largest))
    u, w, d = 1 / x, 1 / y, (d + t * b).clamp(-largest, largest)
    even, odd = power_series(u, u, w)
    total = (weights * (d * w) * u * (cross * u * odd + b * u * even)).sum(-1)
    return torch.where(small, total, difference)


def _beta(
    a_p: Tensor, a_q: Tensor, b_p: Tensor, b_q: Tensor, d_a: Tensor, d_b: Tensor, e_a: Tensor, e_b: Tensor
) -> Tensor:
    """KL of two Beta distributions; d = q - p of either concentration, and e = d less the same multiple of p.

    On a CPU a kernel in C does the same (see `_fused`).
    """
    inputs = torch.broadcast_tensors(a_p, a_q, b_p, b_q, d_a, d_b, e_a, e_b)
    if a_p.dtype == torch.float64 and _fused.available(inputs):
        return _fused.beta_kl(inputs)
    swap = a_p < b_p  # then tau is at most 1
    a_p, b_p = torch.where(swap, b_p, a_p), torch.where(swap, a_p, b_p)
    a_q, b_q = torch.where(swap, b_q, a_q), torch.where(swap, a_q, b_q)
    d_a, d_b = torch.where(swap, d_b, d_a), torch.where(swap, d_a, d_b)
    e_a, e_b = torch.where(swap, e_b, e_a), torch.where(swap, e_a, e_b)

    # a_q b_p - a_p b_q: sums have rounded, so by the smallest numbers there are
    base = product_difference(b_p, a_q, a_p, b_q)
    size = b_p * a_q + a_p * b_q
    for u, v in ((d_a, d_b), (e_a, e_b)):
        terms = (b_p * u).abs() + (a_p * v).abs()
        base = torch.where(terms < size, product_difference(b_p, u, a_p, v), base)
        size = torch.minimum(terms, size)

    def means(x: Tensor, y: Tensor, cross: Tensor) -> Tensor:
        """Of (x, b_p) and (y, b_q), the discrete divergence of q's means from p's times q's sum."""
        s, growth = x + b_p, (y + b_q) / (x + b_p)
        first = y * remainder_of_log(-cross / y / s, (x / y) * growth)
        return first + b_q * remainder_of_log(cross / b_q / s, (b_p / b_q) * growth)

    steps = torch.arange(STEPS + 1, dtype=a_p.dtype, device=a_p.device)
    weights = torch.where(steps < STEPS, 1.0, 0.5)
    x, y = a_p.unsqueeze(-1) + steps, a_q.unsqueeze(-1) + steps
    s, z = x + b_p.unsqueeze(-1), y + b_q.unsqueeze(-1)
    cross = base.unsqueeze(-1) - steps * d_b.unsqueeze(-1)
    tau, quotient = cross / x / z, (y / x) * (s / z)
    d = d_a + d_b
    rows = torch.stack([weights * (d.unsqueeze(-1) / s * tau), weights * remainder_of_log(tau, quotient)])
    far_p, far_q, last = a_p + STEPS, a_q + STEPS, cross[..., -1]
    means_far = means(far_p, far_q, last) + _series(far_p, far_q, d_a, b_p, b_q, d_b, last)

    shapes = [torch.stack(v) for v in ((a_q, b_q, a_q + b_q), (a_p, b_p, a_p + b_p), (d_a, d_b, d))]
    gap_a, gap_b, gap_s = lgamma_bregman_value(*shapes).unbind()
    gaps, means_near = gap_a + gap_b, means(a_p, a_q, base)
    alike = gaps + means_near + gap_s < rows.abs().sum((0, -1)) + means_far.abs() + gap_b
    return torch.where(alike, gaps + means_near - gap_s, rows.sum((0, -1)) + means_far + gap_b)


# Next to 1, or not: beyond, numbers have exponents of their own.
_SMALLEST, _LARGEST = 1e-100, 1e100


def _steps_wide(a_p: Scaled, a_q: Scaled, b_p: Scaled, b_q: Scaled) -> tuple[Scaled, ...]:
    """The first concentrations after n steps and the sums, with a dimension for n."""
    n = torch.arange(STEPS + 1, dtype=a_p.mantissa.dtype, device=a_p.mantissa.device)
    x, y, b_p, b_q = (v.each(lambda t: t.unsqueeze(-1)) for v in (a_p, a_q, b_p, b_q))
    x, y = x + scaled(n), y + scaled(n)
    return x, y, x + b_p, y + b_q, scaled(n)


def _beta_wide(
    a_p: Scaled, a_q: Scaled, b_p: Scaled, b_q: Scaled, d_a: Scaled, d_b: Scaled, e_a: Scaled, e_b: Scaled
) -> Tensor:
    """`_beta` of concentrations whose products, quotients and sums need not be floats, term by term the same."""
    swap = a_p.less(b_p)
    a_p, b_p, a_q, b_q = where(swap, b_p, a_p), where(swap, a_p, b_p), where(swap, b_q, a_q), where(swap, a_q, b_q)
    d_a, d_b, e_a, e_b = where(swap, d_b, d_a), where(swap, d_a, d_b), where(swap, e_b, e_a), where(swap, e_a, e_b)

    base = difference_of_products(b_p, a_q, a_p, b_q)
    size = b_p * a_q + a_p * b_q
    for u, v in ((d_a, d_b), (e_a, e_b)):
        terms = (b_p * u).size() + (a_p * v).size()
        smaller = terms.less(size)
        base = where(smaller, difference_of_products(b_p, u, a_p, v), base)
        size = where(smaller, terms, size)

    def means(x: Scaled, y: Scaled, cross: Scaled) -> Scaled:
        s, z = x + b_p, y + b_q
        first = weighted_remainder(y, -cross / y / s, (x / y) * (z / s))
        return first + weighted_remainder(b_q, cross / b_q / s, (b_p / b_q) * (z / s))

    x, y, s, z, n = _steps_wide(a_p, a_q, b_p, b_q)
    column = [v.each(lambda t: t.unsqueeze(-1)) for v in (base, d_a, d_b)]
    cross = column[0] - n * column[2]
    tau = cross / x / z
    weights = scaled(torch.where(n.rounded() < STEPS, 1.0, 0.5).to(tau.mantissa.dtype))
    slopes = scaled_sum(weights * ((column[1] + column[2]) / s * tau))
    rises = scaled_sum(weighted_remainder(weights, tau, (y / x) * (s / z)))
    sizes = scaled_sum((weights * ((column[1] + column[2]) / s * tau)).size()) + rises
    rows, sizes = (v.each(lambda t: t.squeeze(-1)) for v in (slopes + rises, sizes))
    far_p, far_q, last = (v.each(lambda t: t[..., -1]) for v in (x, y, cross))
    largest = torch.finfo(tau.mantissa.dtype).max
    floats = [v.rounded().clamp(-largest, largest) for v in (far_p, far_q, d_a, b_p, b_q, d_b, last)]
    means_far = means(far_p, far_q, last) + scaled(_series(*floats))

    triples = ((a_q, a_p, d_a), (b_q, b_p, d_b), (a_q + b_q, a_p + b_p, d_a + d_b))
    gaps = [lgamma_bregman_value(*(v.rounded().clamp(-largest, largest) for v in t)) for t in triples]
    gap_a, gap_b, gap_s = (scaled(v) for v in gaps)
    near, means_near = gap_a + gap_b, means(a_p, a_q, base)
    alike = (near + means_near + gap_s).less(sizes + means_far.size() + gap_b)
    result = where(alike, near + means_near - gap_s, rows + means_far + gap_b).rounded()
    # the second is all, to a factor of 2, where it overflows
    return torch.where(gaps[1].isinf(), gaps[1], result)


def _split(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The differences y - x, one delta for all of a row, and y - x - delta x to its relative accuracy."""
    d = y - x
    delta = (d.sum(-1, keepdim=True) / x.sum(-1, keepdim=True)).expand_as(x)
    product = delta * x
    e = d - product
    lost = sum_error(d, -product, e) + (sum_error(y, -x, d) - product_error(delta, x, product))
    return d, delta, e + torch.where(lost.isfinite(), lost, 0.0)


def _split_wide(x: Tensor, y: Tensor) -> tuple[Scaled, ...]:
    """Both, their differences and what `_split` leaves of these; the sums of all four."""
    p, q = scaled(x), scaled(y)
    d, sum_p = q - p, scaled_sum(p)
    sum_d = scaled_sum(d)
    e = less_product(q, p, sum_d / sum_p)
    return p, q, d, e, sum_p, scaled_sum(q), sum_d, scaled_sum(e)


def _after(x: Tensor) -> Tensor:
    """For every entry but the last the sum of those that follow."""
    return x.flip(-1).cumsum(-1).flip(-1)[..., 1:]


def _after_wide(x: Tensor) -> Scaled:
    """The same of numbers whose sum may overflow."""
    whole, part = scaled(_after(x)), scaled(_after(x * 2.0**-64))
    return where(whole.mantissa.isfinite(), whole, Scaled(part.mantissa, part.exponent + 64))


def _value(x: Tensor, y: Tensor) -> Tensor:
    d, _, e = _split(x, y)
    pairs = ((v[..., :-1], _after(v)) for v in (x, y, d, e))
    (a_p, b_p), (a_q, b_q), (d_a, d_b), (e_a, e_b) = pairs
    result = _beta(a_p, a_q, b_p, b_q, d_a, d_b, e_a, e_b).sum(-1)
    extreme = ((torch.minimum(x, y) < _SMALLEST) | (torch.maximum(x, y) > _LARGEST)).any(-1)
    if not may_hold(extreme):
        return result
    x, y = (torch.where(extreme.unsqueeze(-1), v, 1.0) for v in (x, y))
    _, _, d_wide, e_wide, *_ = _split_wide(x, y)
    columns = (x, y, d_wide.rounded(), e_wide.rounded())
    sticks = ((scaled(v[..., :-1]), _after_wide(v)) for v in columns)
    (c_p, f_p), (c_q, f_q), (g_a, g_b), (h_a, h_b) = sticks
    return torch.where(extreme, _beta_wide(c_p, c_q, f_p, f_q, g_a, g_b, h_a, h_b).sum(-1), result)


def _others(x: Tensor) -> Scaled:
    """For every entry the sum of all others."""
    zero = torch.zeros_like(x[..., :1])
    before, after = x.cumsum(-1)[..., :-1], x.flip(-1).cumsum(-1).flip(-1)[..., 1:]
    return scaled(torch.cat([zero, before], -1)) + scaled(torch.cat([after, zero], -1))


def _shorter(first: tuple[Scaled, ...], second: tuple[Scaled, ...]) -> Tensor:
    """Of two sums of the same value the one that cancels less, with the derivatives of the first."""
    sums = [reduce(Scaled.__add__, terms) for terms in (first, second)]
    sizes = [reduce(Scaled.__add__, (x.size() for x in terms)) for terms in (first, second)]
    with torch.no_grad():
        better = where(sizes[1].less(sizes[0]), sums[1], sums[0]).rounded()
    return attached(better, sums[0].rounded())


def _gradient(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    p, q, d, e, sum_p, sum_q, sum_d, sum_e = _split_wide(x, y)
    rest_p, rest_q, rest_d = _others(x), _others(y), _others(y - x)
    with torch.no_grad():  # q's mean over p's, less 1
        tau = ((sum_p * e - p * sum_e) / p / sum_q).rounded()
        near = tau.abs() < 0.5
    smooth = ((q / p) * (sum_p / sum_q)).log()
    log = attached(torch.where(near, torch.log1p(torch.where(near, tau, 0.0)), smooth), smooth)
    # next to p = q by the differences of q and p; beside tiny others by those of a concentration and the sum
    by_y = _shorter(
        (lgamma_change(q, p, d), -lgamma_change(sum_q, sum_p, sum_d), scaled(log)),
        (digamma_rise(p, rest_p), -digamma_rise(q, rest_q)),
    )
    bend_p, bend_sum = (scaled(lgamma_bend(v.rounded().clamp(max=torch.finfo(x.dtype).max))) for v in (p, sum_p))
    by_x = _shorter(
        (bend_sum * sum_d / sum_p / sum_p, -(bend_p * d / p / p), sum_e / sum_p, -(e / p)),
        (rest_d * trigamma(sum_p), -(d * trigamma_fall(p, rest_p))),
    )
    return by_x, by_y


dirichlet_kl = vector_rule(_value, _gradient)


@register_hardened(Dirichlet, Dirichlet)
def kl_dirichlet_dirichlet(p: TorchDirichlet, q: TorchDirichlet) -> Tensor:
    """KL between Dirichlet distributions over as many categories; see the module.

    Raises:
        ValueError: the numbers of categories differ.
    """
    if p.event_shape != q.event_shape:
        raise ValueError(
            f"p has {p.event_shape[0]} categories and q has {q.event_shape[0]}: KL needs distributions over the same "
            "simplex"
        )
    return dirichlet_kl(p.concentration, q.concentration)
