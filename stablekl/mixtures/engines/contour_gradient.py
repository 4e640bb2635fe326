"""Gradients of the cross term E softplus(y) along its contour, by hand.

With E_s the (complex) Gaussian tilted by exp(s y) and kappa the weight of a node, such that the value is the sum of
Re kappa, E sigmoid(y) f(z) = sum Re(kappa s E_s f): every gradient is a first or second moment of z under sigmoid(y),
diagonal in the joint eigenbasis but for one weighted Gram product. Nothing passes through the derivatives of
eigenvectors, which have 1/(l_i - l_j) in them. The formulas of the integral are at the head of `contour`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .contour_terms import (
    Ordered,
    Quadratic,
    Rule,
    WhitenedPair,
    by_blocks,
    integrand,
    log_odds,
    log_ratio,
)

__all__ = ["Partials", "diagonal_gradient", "full_gradient", "full_gradient_by_inverses"]

# Gradients by the fields of Ordered.
Partials = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class _Moments(NamedTuple):
    """Mass, mean and second moment of z - origin under sigmoid(y): [B], [B, D], [B, D] or [B, D, D]."""

    mass: Tensor
    mean: Tensor
    second: Tensor


def _tilted(quadratic: Quadratic, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Variance h = 1/(1 + s k) and mean (s g - z0) h of z - z0 under E_s, real and imaginary parts [B, n, D]."""
    k, g, z = (q.unsqueeze(-2) for q in quadratic[1:])
    x, y = x.unsqueeze(-1), y.unsqueeze(-1)
    u, v = 1 + x * k, y * k
    norm = u * u + v * v
    hr, hi = u / norm, -v / norm
    mr, mi = x * g - z, y * g
    return hr, hi, mr * hr - mi * hi, mr * hi + mi * hr


def _diagonal_sums(quadratic: Quadratic, x: Tensor, y: Tensor, cr: Tensor, ci: Tensor) -> tuple[Tensor, ...]:
    hr, hi, mr, mi = _tilted(quadratic, x, y)
    cr, ci = cr.unsqueeze(-2), ci.unsqueeze(-2)
    mean = cr @ mr - ci @ mi
    second = cr @ (hr + (mr - mi) * (mr + mi)) - ci @ (hi + 2 * mr * mi)
    return mean.squeeze(-2), second.squeeze(-2)


def _full_sums(quadratic: Quadratic, x: Tensor, y: Tensor, cr: Tensor, ci: Tensor) -> tuple[Tensor, ...]:
    """As `_diagonal_sums`, with the products of all pairs of directions: one weighted Gram product."""
    hr, hi, mr, mi = _tilted(quadratic, x, y)
    cr, ci = cr.unsqueeze(-1), ci.unsqueeze(-1)
    left = torch.cat([mr, mi], -2)
    right = torch.cat([cr * mr - ci * mi, -ci * mr - cr * mi], -2)
    diagonal = torch.diag_embed((cr * hr - ci * hi).sum(-2))
    return (cr * mr - ci * mi).sum(-2), left.mT @ right + diagonal


def _moments(quadratic: Quadratic, rule: Rule, kr: Tensor, ki: Tensor, diagonal: bool) -> _Moments:
    x, y = rule.real, rule.imag
    cr, ci = x * kr - y * ki, x * ki + y * kr
    sums = by_blocks(_diagonal_sums if diagonal else _full_sums, quadratic, x, y, cr, ci, total=True)
    return _Moments(cr.sum(-1), *sums)


def _signed(pair: Tensor) -> Tensor:
    """Second component plus, first minus: the log-ratio is log q2 - log q1."""
    first, second = pair.unbind(1)
    return torch.stack([-first, second], 1)


def diagonal_gradient(
    rows: Ordered, quadratic: Quadratic, pair: WhitenedPair, rule: Rule, kr: Tensor, ki: Tensor
) -> Partials:
    """Gradients for diagonal covariances."""
    mass, mean, second = _moments(quadratic, rule, kr, ki, True)
    z = quadratic.origin.unsqueeze(-2)
    maps, m = pair.maps, pair.centres
    mass, mean, second = mass[:, None, None], mean.unsqueeze(-2), second.unsqueeze(-2)
    # first and second moments of the residual m + a (z - origin), and of its product with z
    by_loc = _signed((mass * m + maps * mean) / rows.scale)
    square = mass * (m - 1) * (m + 1) + maps * (2 * m * mean + maps * second)
    by_scale = _signed(square / rows.scale)
    cross = (mass * m + maps * mean) * z + m * mean + maps * second
    by_p_scale = -_signed(cross / rows.scale).sum(-2)
    return _weights(mass), -by_loc.sum(-2), by_p_scale, by_loc, by_scale


def _weights(mass: Tensor) -> Tensor:
    mass = mass.reshape(-1)
    return torch.stack([-mass, mass], -1)


def full_gradient(
    rows: Ordered, quadratic: Quadratic, pair: WhitenedPair, rule: Rule, kr: Tensor, ki: Tensor
) -> Partials:
    """Gradients for full covariances, by lower-triangular factors."""
    moments = _moments(quadratic, rule, kr, ki, False)
    return _assembled(rows, pair, quadratic.origin, moments)


def _assembled(rows: Ordered, pair: WhitenedPair, origin: Tensor, moments: _Moments) -> Partials:
    mass, mean, second = moments
    mass = mass[:, None, None, None]
    m, z = pair.centres.unsqueeze(-1), origin[:, None, :, None]
    pushed = pair.maps @ mean[:, None, :, None]  # mean of the residual beyond m
    first = mass * m + pushed
    spread = pair.maps @ second.unsqueeze(-3)
    identity = torch.eye(z.shape[-2], dtype=z.dtype, device=z.device)
    squares = first @ m.mT + m @ pushed.mT + spread @ pair.maps.mT - mass * identity
    cross = (first @ z.mT + m @ mean[:, None, None, :] + spread) @ pair.vectors.unsqueeze(-3).mT
    dim = z.shape[-2]
    solved = torch.linalg.solve_triangular(rows.scale.mT, torch.cat([squares, cross, first], -1), upper=True)
    by_scale, by_p_scale, by_loc = (_signed(x) for x in solved.split([dim, dim, 1], -1))
    by_loc = by_loc.squeeze(-1)
    return _weights(mass), -by_loc.sum(-2), -by_p_scale.sum(-3).tril(), by_loc, by_scale.tril()


def full_gradient_by_inverses(
    rows: Ordered, quadratic: Quadratic, vectors: Tensor, rule: Rule, real: Tensor, imag: Tensor
) -> Partials:
    """The same by one complex inverse per node, differentiable at equal eigenvalues, where eigenvectors are not.

    The caller takes the values from `full_gradient` and the derivatives from here. ``quadratic`` and ``vectors`` are
    constants; ``real`` and ``imag`` are the log-moment's values.
    """
    start = (vectors @ quadratic.origin.unsqueeze(-1)).detach()
    point = rows.p_loc + (rows.p_scale @ start).squeeze(-1)
    factor = rows.p_scale.unsqueeze(-3).expand_as(rows.scale)
    shift = (point.unsqueeze(-2) - rows.loc).unsqueeze(-1)
    solved = torch.linalg.solve_triangular(rows.scale, torch.cat([factor, shift], -1), upper=False)
    maps, centres = solved[..., :-1], solved[..., -1]
    (a1, a2), (m1, m2) = maps.unbind(-3), centres.unbind(-2)
    product = (a2 - a1).mT @ (a1 + a2)
    matrix = (0.5 * (product + product.mT)).unsqueeze(-3)
    pulled = (maps.mT @ centres.unsqueeze(-1)).squeeze(-1)
    slope = (pulled[..., 0, :] - pulled[..., 1, :])[:, None, :, None]
    d1, d2 = rows.scale.diagonal(dim1=-2, dim2=-1).unbind(-2)
    level = log_odds(rows.log_weights)[0] + (log_ratio(d1, d2) + 0.5 * (m1 - m2) * (m1 + m2)).sum(-1)

    s = torch.complex(rule.real, rule.imag)[..., None, None]
    identity = torch.eye(d1.shape[-1], dtype=d1.dtype, device=d1.device)
    mixed = identity + s * matrix
    inverse = torch.linalg.inv(mixed)
    start = start.unsqueeze(-3)
    force = s * slope - start
    mean = inverse @ force
    sign, logabs = torch.linalg.slogdet(mixed)
    determinant = torch.complex(logabs, torch.angle(sign))
    form = (force.mT @ mean).squeeze((-2, -1))
    moving = s.squeeze((-2, -1)) * level.unsqueeze(-1) + 0.5 * (form - determinant)
    moving = moving - moving.detach()  # the value from the spectrum: no branch of a logarithm to choose
    kr, ki = integrand(rule, real + moving.real, imag + moving.imag)
    weight = torch.complex(kr, ki)[..., None, None] * s
    moments = _Moments(
        weight.real.sum((-3, -2, -1)),
        (weight * mean).real.sum(-3).squeeze(-1),
        (weight * (inverse + mean @ mean.mT)).real.sum(-3),
    )
    return _assembled(rows, WhitenedPair(identity.expand_as(a1), maps, centres), start[:, 0, :, 0], moments)
