r"""KL divergences of densities on a line from their values at fixed points, without cancellation near p = q.

**The points.** Two densities have two centres m and two widths a, of any ratio and at any distance. The map

.. math:: s(x) = \operatorname{asinh}\frac{x - m_1}{a_1} + \operatorname{asinh}\frac{x - m_2}{a_2}

has a closed inverse (with :math:`w = e^{\operatorname{asinh}}` of either term it is a quadratic equation), and takes
the points :math:`m_i \pm i a_i`, where such densities are singular, to an imaginary part between pi/2 and pi,
whatever the centres and widths are. So the trapezoidal rule in s converges like :math:`e^{-\pi^2/h}`, with a step h
that knows nothing of the parameters; composite panels would need 50 edges around each centre. Tails that fall like a
small power of x are exponential in s: a further map with s' = 1 up to the last singularity and exponential growth
beyond brings any of them into reach.

**The sum.** With :math:`v = \log \tilde p - \log \tilde q` at the points, of unnormalised densities, from the
differences of parameters, and the masses :math:`P_j, Q_j`,

.. math:: KL = \sum_j \hat p_j u_j + \hat q_j - \hat p_j, \qquad u = v + \log \frac{\sum Q}{\sum P},

each term p (e^-u - 1 + u) where u is small. No normalising constant is evaluated: the ratio of the two is the sum of
Q - P, to its own relative accuracy, and an error of it costs nothing of first order. Normalisers by lgamma would lose
the square of the distance of p from q.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._autograd import is_plain
from ..special import expm1_value, expm1mx_value

__all__ = ["Comparison", "Points", "Sum", "chunked", "compared", "placed", "points", "summed", "surest"]

Tensors = tuple[Tensor, ...]

# Points of the rule. Its step is at most 0.12 for ranges of s up to 75, as scales 1e12 apart have, and 0.03 for
# densities alike; light tails need the former for an error of e^-36 (0.145 leaves 1e-13), singularities 0.25.
POINTS = 1280
# Rows at a time: of each there are some forty arrays of as many numbers as points.
ROWS = 128
_LOG2 = math.log(2.0)
# The largest logarithm of a ratio of densities that one follows by from the other.
_MODERATE = 60.0


def chunked(f: Callable[..., Tensors], *inputs: Tensor) -> Tensors:
    """``f`` of a few rows at a time, where the inputs are plain tensors of one shape; ``f(*inputs)`` else."""
    shape, n = inputs[0].shape, inputs[0].numel()
    if n <= ROWS or not is_plain(inputs):
        return f(*inputs)
    flat = [x.reshape(-1) for x in inputs]
    parts = zip(*(f(*(x[i : i + ROWS] for x in flat)) for i in range(0, n, ROWS)), strict=True)
    return tuple(torch.cat(part).reshape(shape) for part in parts)


class Points(NamedTuple):
    """The points of the rule, ``batch_shape + (POINTS,)``, without derivatives.

    Attributes:
        one: asinh((x - m_1)/a_1).
        two: asinh((x - m_2)/a_2).
        log_cosh_ratio: log(cosh(one)/cosh(two)), to an absolute accuracy of eps wherever both are.
        log_step: logarithm of the step of the rule in s, and of ds/dt of the stretched tails.
    """

    one: Tensor
    two: Tensor
    log_cosh_ratio: Tensor
    log_step: Tensor


def _short(x: Tensor) -> Tensor:
    """With the digits of float32: its products with the numbers of the points are exact, and so is the grid.

    A point off by a rounding of s = 60 takes 1e-14 of a mass with it.
    """
    return x.to(torch.float32).to(x.dtype)


def points(shift: Tensor, a_1: Tensor, a_2: Tensor, furthest: Tensor | None, log_reach: Tensor) -> Points:
    """Points for singularities at two centres.

    Args:
        shift: m_1 - m_2, any shape; all arguments have one more dimension of size 1 at their end.
        a_1: the width at the first centre.
        a_2: that at the second.
        furthest: the largest distance of a singularity from the centre it belongs to, where tails are powers of the
            distance and the map is to be stretched; None for exponential ones.
        log_reach: logarithm of the largest distance from a centre at which there is any mass.
    """
    shift, a_1, a_2, log_reach = (x.detach() for x in (shift, a_1, a_2, log_reach))
    size = shift.abs()
    log_a1, log_a2 = torch.log(a_1), torch.log(a_2)
    far = torch.logaddexp(log_reach, torch.log(size)) + _LOG2
    end = torch.logaddexp(far - log_a1, torch.zeros_like(far)) + torch.logaddexp(far - log_a2, torch.zeros_like(far))
    grid = torch.arange(POINTS, dtype=shift.dtype, device=shift.device) - 0.5 * (POINTS - 1)
    if furthest is None:
        step = _short(end / (0.5 * (POINTS - 1)))
        s = step * grid
        log_step = torch.log(step).expand(s.shape)
    else:
        largest = torch.maximum(size, furthest.detach())
        last = _short(torch.asinh(largest / a_1) + torch.asinh(largest / a_2) + 2)
        step = _short(torch.minimum(end, last + torch.log1p(end)) / (0.5 * (POINTS - 1)))
        t = step * grid
        rise, fall = torch.exp(t - last), torch.exp(-t - last)
        s = t + (rise - fall)
        log_step = torch.log(step * (1 + rise + fall))
    # a w^2 + 2 d w = b for w = e^one e^(-s/2), everything times e^(-|s|/2)
    up = s > 0
    shrunk = torch.exp(-s.abs())
    a = torch.where(up, a_1 + a_2 * shrunk, a_1 * shrunk + a_2)
    b = torch.where(up, a_1 * shrunk + a_2, a_1 + a_2 * shrunk)
    d = shift * torch.exp(-0.5 * s.abs())
    root = torch.hypot(d, torch.sqrt(a) * torch.sqrt(b))
    ratio = torch.log(torch.where(d > 0, b / (d.abs() + root), (d.abs() + root) / a))
    one, two = 0.5 * s + ratio, 0.5 * s - ratio
    # |one| - |two|, where both are large and all but equal
    sign = torch.where(one > 0, 1.0, -1.0)
    excess = sign * torch.where(one * two > 0, 2 * ratio, s)
    cosh = excess + torch.log1p(torch.exp(-2 * one.abs())) - torch.log1p(torch.exp(-2 * two.abs()))
    return Points(one, two, cosh, log_step)


def placed(at: Points, m_1: Tensor, a_1: Tensor, m_2: Tensor, a_2: Tensor) -> tuple[Tensor, Tensor]:
    """The points themselves, from the nearer centre, and the logarithm of the step of the rule in x."""
    x = torch.where(at.one.abs() < at.two.abs(), m_1 + a_1 * torch.sinh(at.one), m_2 + a_2 * torch.sinh(at.two))
    size = at.one.abs()
    log_width = torch.log(a_1) + size + torch.log1p(torch.exp(-2 * size)) - _LOG2
    return x, at.log_step + log_width - torch.log1p(a_1 / a_2 * torch.exp(at.log_cosh_ratio))


class Comparison(NamedTuple):
    """Two densities at the points.

    Attributes:
        p: masses of p, which sum to 1.
        gain: masses of p minus those of q, to their relative accuracy.
        u: log(p/q).
        terms: p log(p/q) + q - p, none negative; their sum is the divergence.
    """

    p: Tensor
    gain: Tensor
    u: Tensor
    terms: Tensor


def compared(log_p: Tensor, log_q: Tensor, v: Tensor) -> Comparison:
    """Two densities from the logarithms of their unnormalised masses, and the difference of these."""
    mass_p = torch.exp(log_p)
    # what is wrong by the same factor in both, such as the rounding of a constant, then costs nothing of first order
    moderate = v.abs() < _MODERATE
    mass_q = torch.where(moderate, mass_p * torch.exp(-torch.where(moderate, v, 0.0)), torch.exp(log_q))
    small = v.abs() < 0.5
    change = torch.where(small, mass_p * expm1_value(-torch.where(small, v, 0.0)), mass_q - mass_p)
    total_p, total_q = mass_p.sum(-1, keepdim=True), mass_q.sum(-1, keepdim=True)
    relative = change.sum(-1, keepdim=True) / total_p
    small = relative.abs() < 0.5
    level = torch.where(small, torch.log1p(torch.where(small, relative, 0.0)), torch.log(total_q / total_p))
    p, q, u = mass_p / total_p, mass_q / total_q, v + level
    small = u.abs() < 0.35
    near = torch.where(small, u, 0.0)
    gain = torch.where(small, -p * expm1_value(-near), p - q)
    return Comparison(p, gain, u, torch.where(small, p * expm1mx_value(-near), p * u - gain))


class Sum(NamedTuple):
    """A sum, and that of the absolute values of its terms, of which rounding takes a part."""

    value: Tensor
    size: Tensor


def summed(terms: Tensor) -> Sum:
    """The sum over the points."""
    return Sum(terms.sum(-1), terms.detach().abs().sum(-1))


def surest(first: Sum, *others: Sum) -> Sum:
    """Of equal sums the one that cancels least: derivatives have several forms, each of which fails somewhere."""
    for other in others:
        less = other.size < first.size
        first = Sum(torch.where(less, other.value, first.value), torch.where(less, other.size, first.size))
    return first
