"""Gradient of the three-component integral, by hand.

It never passes through the eigenvectors, whose derivatives have 1/(l_i - l_j) in them. In the frame of
`triple_terms.Geometry`, with kappa the derivative of the integral by log M at a node, mu the mean of the density
proportional to p1^s1 p2^s2 p3^s3, and z_i = R (m_i - mu),

    dF/dm_i = -R' Q_i Re sum kappa s_i z_i
    dF/dL_i = tril R' {Re sum kappa s_i (E_i + Q_i [z_i z_i' - 3 V diag(iy/(1 + iy)) V'])} F_i',    E_i = 3 Q_i - I.

The textbook's P_i^-1 - (sum s_j P_j)^-1 in the place of E_i and the last term leaves eps near identical components,
where both go to zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .triple_terms import Geometry, Rule, Spectrum, integrand

__all__ = ["Moments", "diagonal_gradient", "full_gradient", "inverse_sums", "moments"]


class Moments(NamedTuple):
    """Re sum kappa s_i times 1, times R (mu - centre) and times [z_i z_i' - ...] without its terms in x_i.

    Shapes [B, 3], [B, 3, D] and [B, 3, D, D], or [B, 3, D] for diagonal components.
    """

    weight: Tensor
    first: Tensor
    second: Tensor


def moments(along: Spectrum, rule: Rule, kr: Tensor, ki: Tensor) -> Moments:
    """The sums over the nodes of a rule, given kappa [B, n, m]."""
    direction, radius = rule.direction, rule.radius
    y = radius.unsqueeze(-1) * along.eigenvalue.unsqueeze(-2)
    a = 1 / (1 + y * y)
    b = a * y
    c = b * y
    r1r, r1i = radius * kr, radius * ki
    r2r, r2i = radius * r1r, radius * r1i
    r3r, r3i = radius * r2r, radius * r2i

    def over(weight: Tensor, x: Tensor) -> Tensor:
        return (weight.unsqueeze(-2) @ x).squeeze(-2)

    # s_i = 1/3 + i r u_i: real parts of sums with kappa, imaginary parts of sums with kappa r
    weight = kr.sum((-2, -1)).unsqueeze(-1) / 3 - r1i.sum(-1) @ direction
    g = 3 * along.push
    first0, first1 = g * (over(r1r, b) - over(r1i, a)), g * (over(r2r, a) + over(r2i, b))
    bend0, bend1 = over(kr, c) - over(ki, b), over(r1r, b) + over(r1i, c)
    if along.vectors is None:
        even, odd = b * b - a * a, 2 * a * b
        second0 = g * g * (over(r2r, even) - over(r2i, odd)) - 3 * bend0
        second1 = g * g * (over(r3i, even) + over(r3r, odd)) - 3 * bend1
        return Moments(weight, _combined(first0, first1, direction), _combined(second0, second1, direction))
    r2r, r2i, r3r, r3i = (x.unsqueeze(-1) for x in (r2r, r2i, r3r, r3i))
    left = torch.cat([b, a], -2)
    right = torch.cat(
        [torch.cat([r2r * b - r2i * a, -r2r * a - r2i * b], -2), torch.cat([r3i * b + r3r * a, r3r * b - r3i * a], -2)],
        -1,
    )
    outer = g.unsqueeze(-1) * g.unsqueeze(-2)
    vectors = along.vectors
    seconds = [
        vectors @ (outer * gram - 3 * torch.diag_embed(bend)) @ vectors.mT
        for gram, bend in zip((left.mT @ right).chunk(2, -1), (bend0, bend1), strict=True)
    ]
    firsts = [(vectors @ x.unsqueeze(-1)).squeeze(-1) for x in (first0, first1)]
    return Moments(weight, _combined(firsts[0], firsts[1], direction), _combined(seconds[0], seconds[1], direction))


def _combined(zero: Tensor, one: Tensor, direction: Tensor) -> Tensor:
    """Sum over directions of zero/3 - u_i one: [B, n, ...] to [B, 3, ...]."""
    mixed: Tensor = (direction.mT @ one.flatten(2)).unflatten(-1, one.shape[2:])
    return zero.sum(1).unsqueeze(1) / 3 - mixed


def diagonal_gradient(scale: Tensor, frame: Geometry, sums: Moments) -> tuple[Tensor, Tensor]:
    """Gradients by loc and by the standard deviations, both [B, 3, D]."""
    q = frame.factor * frame.factor
    x, weight = frame.shift, sums.weight.unsqueeze(-1)
    push = -frame.root.unsqueeze(-2) * q * (weight * x - sums.first)
    square = (weight * x - 2 * sums.first) * x + sums.second
    return push, (weight * frame.excess + q * square) / scale


def full_gradient(frame: Geometry, sums: Moments) -> tuple[Tensor, Tensor]:
    """Gradients by loc [B, 3, D] and by the lower-triangular factors [B, 3, D, D]."""
    f, root = frame.factor, frame.root.unsqueeze(-3)
    x, first = frame.shift.unsqueeze(-1), sums.first.unsqueeze(-1)
    weight = sums.weight[..., None, None]
    push = -(root.mT @ (f.mT @ (f @ (weight * x - first))))
    square = (weight * x - first) @ x.mT - x @ first.mT + sums.second
    spread = root.mT @ (weight * frame.excess + f.mT @ (f @ square)) @ f.mT
    return push.squeeze(-1), spread.tril()


def inverse_sums(
    log_weights: Tensor, loc: Tensor, factor: Tensor, rule: Rule, real: Tensor, imag: Tensor, information: bool
) -> tuple[Tensor, ...]:
    """F, its slope by the log-weights and its gradients by loc and factors, by one complex inverse per node.

    Differentiable where eigenvalues coincide, which an eigendecomposition is not. The gradients are good to eps times
    the square of the condition number only, so `triple` takes from here their derivatives and nothing else. The
    logarithm of M itself, ``real`` and ``imag``, is given: the one formed here does not know its branch.
    """
    dim = loc.shape[-1]
    identity = torch.eye(dim, dtype=loc.dtype, device=loc.device)
    inverse = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
    precision = inverse.mT @ inverse
    w = rule.radius.unsqueeze(-1) * rule.direction.unsqueeze(-2)
    s = torch.complex(torch.full_like(w, 1 / 3), w).flatten(0, 1)  # [N, 3]
    # [B, N, D, D]; means about the first one, which M does not depend on
    middle = torch.linalg.inv((s @ precision.flatten(-2).to(s.dtype)).unflatten(-1, (dim, dim)))
    sign, log_abs = torch.linalg.slogdet(middle)
    x = loc - loc[..., :1, :]
    px = (precision @ x.unsqueeze(-1)).squeeze(-1)
    b = s @ px.to(s.dtype)
    mu = (middle @ b.unsqueeze(-1)).squeeze(-1)
    squares = (x * px).sum(-1)
    log_det = -2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_m = 0.5 * (
        (s @ (log_det - squares).unsqueeze(-1).to(s.dtype)).squeeze(-1)
        + torch.complex(log_abs, torch.angle(sign))
        + (b * mu).sum(-1)
    )
    log_m = log_m.unflatten(-1, rule.real.shape)
    log_m = torch.complex(real, imag) + (log_m - log_m.detach())
    tr, ti, kr, ki = integrand(log_weights, rule, log_m.real, log_m.imag, information)
    slope = -(ti @ rule.radius) @ rule.direction
    weighted = torch.complex(kr, ki).flatten(-2).unsqueeze(-1) * s  # kappa s_i, [B, N, 3]
    total = weighted.sum(-2).real
    first = (weighted.mT @ mu).real  # [B, 3, D]
    second = (mu.unsqueeze(-1) * mu.unsqueeze(-2) + middle).flatten(-2)
    second = (weighted.mT @ second).real.unflatten(-1, (dim, dim))
    push = -(precision @ (total.unsqueeze(-1) * x - first).unsqueeze(-1)).squeeze(-1)
    cross = x.unsqueeze(-1) * first.unsqueeze(-2)
    total = total[..., None, None]
    spread = total * (x.unsqueeze(-1) * x.unsqueeze(-2)) - cross - cross.mT + second
    pulled = inverse.mT @ (total * identity - inverse @ spread @ inverse.mT)
    return tr.sum((-2, -1)), slope, push, -pulled.tril()
