"""Gradients of the two-component integrals, by hand.

They never pass through the eigenvectors, whose derivatives have 1/(l_i - l_j) in them.
The formulas of the integrals are at the head of `spectral`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .spectral_terms import Frame, Partials, Rule, Spectrum, amplitude_and_log_odds, slices

__all__ = ["diagonal_gradient", "full_gradient", "full_gradient_by_inverses", "sensitivity", "weight_gradient"]


def sensitivity(
    log_weights: Tensor, rule: Rule, real: Tensor, imag: Tensor, information: bool
) -> tuple[Tensor, Tensor]:
    """Kappa at each node, real and imaginary part [B, n], such that dF = sum Re(kappa d log rho)."""
    amplitude, c = amplitude_and_log_odds(log_weights)
    omega, kernel = rule
    size = amplitude.unsqueeze(-1) * kernel * torch.exp(real)
    size = -size if information else size
    angle = omega * c.unsqueeze(-1) + imag
    return size * torch.cos(angle), size * torch.sin(angle)


def _tilted(kr: Tensor, ki: Tensor, omega: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The products kappa (1 - s) q/4 and kappa s q/4, s = 1/2 + i omega: (real, imag, real, imag)."""
    q = 0.25 + omega * omega
    hr, hi, wr, wi = 0.5 * q * kr, 0.5 * q * ki, omega * q * kr, omega * q * ki
    return hr + wi, hi - wr, hr - wi, hi + wr


def _diagonal_sums(tanh: Tensor, kr: Tensor, ki: Tensor, omega: Tensor) -> tuple[Tensor, ...]:
    """Sums over the nodes of Re(kappa q/4 {y, (1 - s) y^2, s y^2}), y = 1/(1 + i x); each [B, D]."""
    x = 2 * omega.unsqueeze(-1) * tanh.unsqueeze(-2)
    a = 1 / (1 + x * x)
    ax = a * x
    q = 0.25 + omega * omega
    first = (q * kr).unsqueeze(-2) @ a + (q * ki).unsqueeze(-2) @ ax
    even, odd = (1 - x) * (1 + x) * (a * a), 2 * (a * ax)
    ur, ui, vr, vi = (z.unsqueeze(-2) for z in _tilted(kr, ki, omega))
    return first.squeeze(-2), (ur @ even + ui @ odd).squeeze(-2), (vr @ even + vi @ odd).squeeze(-2)


def _full_sums(tanh: Tensor, kr: Tensor, ki: Tensor, omega: Tensor) -> tuple[Tensor, ...]:
    """As `_diagonal_sums`, with the matrices y_a y_b in place of y^2: one weighted Gram product."""
    x = 2 * omega.unsqueeze(-1) * tanh.unsqueeze(-2)
    a = 1 / (1 + x * x)
    ax = a * x
    q = 0.25 + omega * omega
    first = (q * kr).unsqueeze(-2) @ a + (q * ki).unsqueeze(-2) @ ax
    ur, ui, vr, vi = (z.unsqueeze(-1) for z in _tilted(kr, ki, omega))
    left = torch.cat([a, ax], -2)
    right = torch.cat([torch.cat([z * a + w * ax, w * a - z * ax], -2) for z, w in ((ur, ui), (vr, vi))], -1)
    gram1, gram2 = (left.mT @ right).chunk(2, -1)
    return first.squeeze(-2), gram1, gram2


def _accumulate(
    sums: Callable[..., tuple[Tensor, ...]], tanh: Tensor, kr: Tensor, ki: Tensor, omega: Tensor
) -> tuple[Tensor, ...]:
    """``sums`` block by block over rows and nodes."""
    blocks = list(slices(*tanh.shape))
    if len(blocks) == 1:
        return sums(tanh, kr, ki, omega)
    rows: list[list[Tensor]] = []
    for r, n in blocks:
        part = sums(tanh[r], kr[r, n], ki[r, n], omega[r, n])
        if not n.start:
            rows.append(list(part))
        else:
            rows[-1] = [total + p for total, p in zip(rows[-1], part, strict=True)]
    return tuple(torch.cat(parts) for parts in zip(*rows, strict=True))


def weight_gradient(value: Tensor, slope: Tensor) -> Tensor:
    """w_k KL(p_k || m) for I, w_k E_{p_k}[-log P(k|X)] for H: their sum is the value itself (Euler)."""
    return torch.stack([0.5 * value + slope, 0.5 * value - slope], -1)


def diagonal_gradient(
    loc: Tensor, scale: Tensor, spectrum: Spectrum, omega: Tensor, kr: Tensor, ki: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients by loc [B, 2, D] and by the standard deviations [B, 2, D]."""
    s1, s2 = scale.unbind(-2)
    top = torch.maximum(s1, s2).detach()
    a, b = s1 / top, s2 / top
    norm = 0.5 * (a * a + b * b)
    alpha, beta1, beta2 = _accumulate(_diagonal_sums, spectrum.tanh, kr, ki, omega)
    push = alpha * (((loc[..., 1, :] - loc[..., 0, :]) / top) / norm) / top
    # T/s, not T/(1 -+ T) of the whitened frame: 1 + T rounds to 0 where one scale is 1e8 times the other
    spread = 2 * alpha * spectrum.tanh
    h = spectrum.square
    return (
        torch.stack([push, -push], -2),
        torch.stack([h * beta1 * (a / norm) / top + spread / s1, h * beta2 * (b / norm) / top - spread / s2], -2),
    )


def full_gradient(
    scale: Tensor, spectrum: Spectrum, frame: Frame, omega: Tensor, kr: Tensor, ki: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients by loc [B, 2, D] and by the lower-triangular factors [B, 2, D, D]."""
    l1, l2 = scale.unbind(-3)
    root, vectors, first, second, d = frame
    root = root.triu()
    alpha, gram1, gram2 = _accumulate(_full_sums, spectrum.tanh, kr, ki, omega)
    basis = math.sqrt(2) * torch.linalg.solve_triangular(root, vectors, upper=True)
    push = (basis @ (alpha * d).unsqueeze(-1)).squeeze(-1)
    spread = 2 * alpha * spectrum.tanh
    gradients = []
    for factor, half, gram, f in ((l1, first, gram1, spread), (l2, second, gram2, -spread)):
        # basis^-1 L^-T, not diag(1/(1 -+ T)) basis' L: see diagonal_gradient
        dual = (torch.linalg.solve_triangular(factor, root.mT, upper=False) @ vectors).mT / math.sqrt(2)
        pull = (d.unsqueeze(-1) * gram * d.unsqueeze(-2)) @ (math.sqrt(2) * (vectors.mT @ half))
        gradients.append((basis @ (f.unsqueeze(-1) * dual + pull)).tril())
    return torch.stack([push, -push], -2), torch.stack(gradients, -3)


def full_gradient_by_inverses(
    log_weights: Tensor,
    loc: Tensor,
    scale: Tensor,
    rule: Rule,
    real: Tensor,
    imag: Tensor,
    information: bool,
) -> Partials:
    """The three gradients by one complex inverse per node.

    Differentiable at equal eigenvalues, where an eigendecomposition is not. Its values are good to eps
    absolutely only, so `_engine` takes the derivatives from here and the values from `full_gradient`.
    """
    l1, l2 = (factor.unsqueeze(-3) for factor in scale.unbind(-3))
    omega, kernel = rule
    s = torch.complex(torch.full_like(omega, 0.5), omega)
    s1, s2 = (1 - s)[..., None, None], s[..., None, None]
    mixed = s1 * (l1 @ l1.mT) + s2 * (l2 @ l2.mT)
    inverse = torch.linalg.inv(mixed)
    shift = (loc[..., 1, :] - loc[..., 0, :]).unsqueeze(-2).to(mixed.dtype)
    u = (inverse @ shift.unsqueeze(-1)).squeeze(-1)
    q = 0.25 + omega * omega
    sign, logabs = torch.linalg.slogdet(mixed)
    log_rho = (
        (1 - s) * l1.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        + s * l2.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        - 0.5 * torch.complex(logabs, torch.angle(sign))
        - 0.5 * q * (shift * u).sum(-1)
    )
    # the value from the spectrum (no branch of a logarithm to choose), the derivative from this line
    log_rho = torch.complex(real, imag) + (log_rho - log_rho.detach())
    amplitude, c = amplitude_and_log_odds(log_weights)
    phase = torch.complex(torch.zeros_like(real), omega * c.unsqueeze(-1))
    size = amplitude.unsqueeze(-1) * kernel
    kappa = torch.exp(phase + log_rho) * (-size if information else size)
    turned = kappa + torch.exp(phase) * size if information else kappa
    value, slope = turned.real.sum(-1), -(omega * turned.imag).sum(-1)
    push = ((kappa * q).unsqueeze(-1) * u).real.sum(-2)
    gradients = []
    for factor, tilt in ((l1, s1), (l2, s2)):
        pulled = (u.unsqueeze(-2) @ factor.to(u.dtype)) * (q[..., None, None] * u.unsqueeze(-1))
        identity = torch.diag_embed(1 / factor.diagonal(dim1=-2, dim2=-1))
        inner = identity - inverse @ factor.to(u.dtype) + pulled
        gradients.append(((kappa[..., None, None] * tilt) * inner).real.sum(-3).tril())
    return weight_gradient(value, slope), torch.stack([push, -push], -2), torch.stack(gradients, -3)
