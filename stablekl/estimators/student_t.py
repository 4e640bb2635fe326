"""Quantiles of Student's t for any degrees of freedom, whole or not."""

from __future__ import annotations

import math
import statistics

import torch
from torch import Tensor

from ..quadrature import gauss_legendre

__all__ = ["student_t_quantile"]

# Nodes of the integral, and steps of Newton's method: 4 to 20 are taken. From MANY degrees of freedom on t and the
# normal agree to 1e-7. Below FEW the tail is integrated.
NODES, STEPS, MANY, FEW = 48, 80, 1e8, 20.0


def student_t_quantile(confidence: float, dof: Tensor) -> Tensor:
    r"""The t with P(\|T\| <= t) = ``confidence``.

    With t = sqrt(n) tan(a) the density of T becomes c cos(a)^(n-1), smooth on an interval of about z/sqrt(n), which a
    Gauss-Legendre rule integrates; Newton's method from a = 0 rises to the root and never passes it, since the integral
    is concave. For few degrees of freedom the density is not smooth at its end, a = pi/2, and the root may be there:
    the tail c sin(b)^(n-1) from b = 0 on is integrated in the fourth root of b, and Newton's method falls from pi/2,
    the integral being convex. Within 1e-8 of the exact value, relatively, for confidences up to 1 - 1e-6 (mpmath).

    Args:
        confidence: in (0, 1).
        dof: degrees of freedom, at least 1, any shape; inf is the normal distribution.

    Returns:
        float64, the shape of ``dof``.
    """
    normal = statistics.NormalDist().inv_cdf(0.5 + 0.5 * confidence)
    distinct, place = torch.unique(dof.double(), return_inverse=True)
    n = distinct.clamp(max=MANY)
    c = _gamma_ratio(0.5 * n) / math.sqrt(math.pi)
    few = _of_few(confidence, n.clamp(max=FEW), c)
    t = torch.where(distinct < FEW, few, _of_many(confidence, n.clamp(min=FEW), c))
    return torch.where(distinct < MANY, t, normal)[place]


def _gamma_ratio(x: Tensor) -> Tensor:
    """Gamma(x + 1/2)/Gamma(x). Of large x by its asymptotic series: the two log-gammas would cancel."""
    y = x.clamp(min=0.5 * FEW).reciprocal()
    z = y * y
    # the exponent's Bernoulli numbers: -1/8, 1/192, -1/640, 17/14336, -31/18432, and 691/180224 x^-11 < 4e-14 is left
    # out: of the tail beyond a confidence of 1 - 1e-6 that is 1e-7
    series = y * (-1 / 8 + z * (1 / 192 + z * (-1 / 640 + z * (17 / 14336 + z * (-31 / 18432)))))
    small = torch.exp(torch.lgamma(x + 0.5) - torch.lgamma(x))
    return torch.where(2 * x < FEW, small, x.sqrt() * torch.exp(series))


def _of_many(confidence: float, n: Tensor, c: Tensor) -> Tensor:
    rule = gauss_legendre(NODES, n.device)

    def density(a: Tensor) -> Tensor:
        # log cos(a) by log1p: cos rounds to 1 for the small angles of many degrees of freedom
        return c.unsqueeze(-1) * torch.exp(0.5 * (n.unsqueeze(-1) - 1) * torch.log1p(-torch.sin(a).square()))

    a = torch.zeros_like(n)
    for _ in range(STEPS):
        covered = a * (density(a.unsqueeze(-1) * rule[0]) * rule[1]).sum(-1)
        step = (0.5 * confidence - covered) / density(a.unsqueeze(-1)).squeeze(-1)
        a = a + step
        if bool((step.abs() <= 1e-14 * a).all()):
            break
    return n.sqrt() * torch.tan(a)


def _of_few(confidence: float, n: Tensor, c: Tensor) -> Tensor:
    rule = gauss_legendre(NODES, n.device)

    def density(b: Tensor) -> Tensor:
        return c.unsqueeze(-1) * torch.sin(b).pow(n.unsqueeze(-1) - 1)

    nodes, weights = rule[0].pow(4), 4 * rule[0].pow(3) * rule[1]
    b = torch.full_like(n, 0.5 * math.pi)
    for _ in range(STEPS):
        beyond = b * (density(b.unsqueeze(-1) * nodes) * weights).sum(-1)
        step = (beyond - 0.5 * (1 - confidence)) / density(b.unsqueeze(-1)).squeeze(-1)
        b = b - step
        if bool((step.abs() <= 1e-14 * b).all()):
            break
    return n.sqrt() / torch.tan(b)
