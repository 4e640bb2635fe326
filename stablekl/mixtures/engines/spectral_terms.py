"""The Chernoff coefficient of two Gaussians on the line Re s = 1/2, and the integrals over it.

The formulas and their reasons are at the head of `spectral`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Frame",
    "Partials",
    "Rule",
    "Spectrum",
    "amplitude_and_log_odds",
    "diagonal_spectrum",
    "full_spectrum",
    "integrals",
    "log_rho",
    "quadrature",
    "slices",
]

# Derived: the aliases of a trapezoid rule with step h lie 2 pi/h = 80 away in the log-ratio and weigh
# (2 pi/h) exp(-pi/h) = 3e-16. Near identical components 1 - rho grows like omega^2 and the part beyond the
# cut-off 11.6 is 8 exp(-11.6 pi)/pi = 3e-16 of I.
NODES = 150
STEP = 0.078125

# Elements (rows x nodes x dimensions) handled at once, so that float64 temporaries stay in a core's cache
# and memory does not grow with the batch.
BLOCK = 2**17

# Switch points, on tanh of the log-ratio of scales and on x = 2 omega tanh. Below NEAR, t - tanh t and
# x - atan x come from their series; above it the subtraction loses 4 eps. Below FAR, log cosh t comes from
# tanh t = T (1/(1 - T^2) <= 6 amplifies its rounding); above it from the determinants.
NEAR = 0.25
FAR = 0.9

# Chebyshev fit of (x - atan x)/x^3 in z = x^2 on |z| <= 1/16, relative error 2e-16; at z = -T^2 it gives
# (atanh T - T)/T^3. Lowest order last. (Derived with mpmath.chebyfit.)
ODD_EXCESS = (
    -0.048012610347942936,
    0.05305933665086521,
    -0.05882217917657473,
    0.06666519914571077,
    -0.0769230788120244,
    0.0909090929620994,
    -0.1111111111101866,
    0.14285714285613804,
    -0.20000000000000007,
    0.3333333333333334,
)

# A squared mean difference above this makes exp(log rho) zero at every node; cutting it here leaves every
# result the same bit for bit and keeps inf * 0 out of the phase.
VAST = 1e60


# Nodes omega and weights, [B, n].
Rule = tuple[Tensor, Tensor]
# Gradients by log_weights, loc and scale.
Partials = tuple[Tensor, Tensor, Tensor]


class Spectrum(NamedTuple):
    """What rho depends on: ``tanh`` and ``square`` (T and h) are [B, D]; the two sums over i are [B]."""

    tanh: Tensor
    square: Tensor
    log_cosh: Tensor
    excess: Tensor


class Frame(NamedTuple):
    """The joint basis of two full covariances.

    R with R'R = S1 + S2, the eigenvectors V of R^-T (S2 - S1) R^-1, R^-T L1 and R^-T L2, all [B, D, D]; the
    mean difference in that basis, [B, D].
    """

    root: Tensor
    vectors: Tensor
    half_first: Tensor
    half_second: Tensor
    shift: Tensor


def _odd_excess(z: Tensor) -> Tensor:
    p = z * ODD_EXCESS[0]
    for coefficient in ODD_EXCESS[1:-1]:
        p = (p + coefficient) * z
    return p + ODD_EXCESS[-1]


# --------------------------------------------------------------------------- from parameters to the spectrum


def _ratio_log(a: Tensor, b: Tensor) -> Tensor:
    """log(a/b); the difference of logarithms only where the quotient leaves the normal range."""
    r = a / b
    usable = (r > 1e-300) & (r < 1e300)
    return torch.where(usable, torch.log(torch.where(usable, r, torch.ones_like(r))), a.log() - b.log())


def diagonal_spectrum(loc: Tensor, scale: Tensor) -> Spectrum:
    """The spectrum of two diagonal Gaussians, loc and scale [B, 2, D]: elementwise."""
    s1, s2 = scale.unbind(-2)
    top = torch.maximum(s1, s2).detach()  # nothing depends on it but the range of the arithmetic
    a, b = s1 / top, s2 / top
    norm = a * a + b * b
    tanh = ((s2 - s1) / top) * (a + b) / norm
    d = (loc[..., 1, :] - loc[..., 0, :]) / top
    square = (2 * (d / norm) * d).clamp(max=VAST)

    t = _ratio_log(s2, s1)
    z = tanh * tanh
    far = z > FAR * FAR
    log_cosh = torch.where(
        far,
        t.abs() + torch.log1p(torch.exp(-2 * t.abs())) - math.log(2),
        -0.5 * torch.log1p(-torch.where(far, torch.zeros_like(z), z)),
    )
    near = z < NEAR * NEAR
    excess = torch.where(near, tanh * z * _odd_excess(-torch.where(near, z, torch.zeros_like(z))), t - tanh)
    return Spectrum(tanh, square, log_cosh.sum(-1), excess.sum(-1))


def full_spectrum(loc: Tensor, scale: Tensor) -> tuple[Spectrum, Frame]:
    """The spectrum of two full Gaussians, loc [B, 2, D] and factors [B, 2, D, D], and their joint basis."""
    l1, l2 = scale.unbind(-3)
    # R'R = S1 + S2 from the factors: forming the covariances and factorising their sum would square the
    # condition number. linalg.qr(mode="r") fails under vmap and geqrf under dynamic shapes (torch 2.13); the
    # latter forms no Q. Nothing differentiates this line.
    dim = loc.shape[-1]
    stacked = torch.cat([l1, l2], -1).mT
    packed = torch.linalg.qr(stacked).R if torch.compiler.is_compiling() else torch.geqrf(stacked)[0]
    root = packed[..., :dim, :].triu()
    shift = (loc[..., 1, :] - loc[..., 0, :]).unsqueeze(-1)
    solved = torch.linalg.solve_triangular(root.mT, torch.cat([l2 - l1, l1, l2, shift], -1), upper=False)
    difference, first, second, shift = solved.split([dim, dim, dim, 1], -1)
    # R^-T (S2 - S1) R^-1 as a product of the factors' difference: exactly 0 for equal factors, and of error
    # eps |T| near them, where R^-T S2 R^-1 - R^-T S1 R^-1 leaves eps.
    product = difference @ (first + second).mT
    tanh, vectors = torch.linalg.eigh(0.5 * (product + product.mT))
    whitened = math.sqrt(2) * (vectors.mT @ shift).squeeze(-1)
    square = (whitened * whitened).clamp(max=VAST)

    d1, d2 = l1.diagonal(dim1=-2, dim2=-1), l2.diagonal(dim1=-2, dim2=-1)
    c = root.diagonal(dim1=-2, dim2=-1).abs()
    z = tanh * tanh
    far = z > FAR * FAR
    near_log_cosh = -0.5 * torch.log1p(-torch.where(far, torch.zeros_like(z), z))
    far_log_cosh = _ratio_log(c, d1) + _ratio_log(c, d2) - math.log(2)
    near = z < NEAR * NEAR
    safe = torch.where(near, tanh, torch.zeros_like(tanh))
    moderate = torch.where(near | far, torch.zeros_like(tanh), tanh)
    excess = safe * safe * safe * _odd_excess(-safe * safe) + torch.atanh(moderate) - moderate
    any_far = far.any(-1)
    return (
        Spectrum(
            tanh,
            square,
            torch.where(any_far, far_log_cosh.sum(-1), near_log_cosh.sum(-1)),
            torch.where(any_far, (_ratio_log(d2, d1) - tanh).sum(-1), excess.sum(-1)),
        ),
        Frame(root, vectors, first, second, whitened),
    )


# ------------------------------------------------------------------------------------------ the integral


def quadrature(spectrum: Spectrum, information: bool) -> tuple[Tensor, Tensor]:
    """Nodes omega >= 0 and weights of the kernel, [B, n]; the two halves of the line in one.

    For H(Z|X) the nodes shrink to where rho(1/2 + i omega) lives: far components make it a peak narrower
    than the step, and H, though right absolutely, would lose its relative accuracy.
    """
    tanh, square = spectrum.tanh.detach(), spectrum.square.detach()
    j = torch.arange(NODES, dtype=torch.float64, device=tanh.device)
    step = torch.full_like(tanh[..., 0], STEP)
    if not information:
        z = tanh * tanh
        low = torch.zeros_like(step)
        for k in range(1, 49):
            # The decay of the integrand's logarithm at a trial cut-off; 40 is exp(-40) = 4e-18.
            trial = low + STEP * (NODES - 1) * 0.5**k
            w = (trial * trial).unsqueeze(-1)
            bend = 1 + 4 * w * z
            decay = (0.25 * torch.log(bend) + 0.5 * square * (w * (1 - z) / bend)).sum(-1)
            low = torch.where(decay + math.pi * trial < 40, trial, low)
        step = (low + STEP * (NODES - 1) * 0.5**48) / (NODES - 1)
    omega = step.unsqueeze(-1) * j
    kernel = step.unsqueeze(-1) / ((0.25 + omega * omega) * torch.cosh(math.pi * omega))
    return omega, torch.where(j == 0, 0.5 * kernel, kernel)


def _log_rho_slice(spectrum: Spectrum, omega: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of log rho(1/2 + i omega), [B, n]."""
    tanh, square, log_cosh, excess = spectrum
    x = 2 * omega.unsqueeze(-1) * tanh.unsqueeze(-2)
    z = x * x
    a = 1 / (1 + z)
    eighth_q = 0.125 + 0.5 * omega * omega
    h = square.unsqueeze(-1)
    real = -(0.25 * torch.log1p(z).sum(-1) + eighth_q * (a @ h).squeeze(-1) + 0.5 * log_cosh.unsqueeze(-1))
    near = z < NEAR * NEAR
    series = x * z * _odd_excess(torch.where(near, z, torch.zeros_like(z)))
    bend = torch.where(near, series, x - torch.atan(x))
    imag = 0.5 * bend.sum(-1) + eighth_q * ((a * x) @ h).squeeze(-1) + omega * excess.unsqueeze(-1)
    return real, imag


def slices(rows: int, dim: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of rows and nodes; a single one while tracing, where a fused kernel needs no temporaries."""
    if torch.compiler.is_compiling() or rows == 0:
        yield slice(None), slice(None)
        return
    nodes = max(1, min(NODES, BLOCK // dim))
    step = max(1, BLOCK // (nodes * dim))
    for row in range(0, rows, step):
        for node in range(0, NODES, nodes):
            yield slice(row, row + step), slice(node, node + nodes)


def log_rho(spectrum: Spectrum, omega: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of log rho at the nodes omega [B, n], a slice of bounded size at a time."""
    rows: list[list[tuple[Tensor, Tensor]]] = []
    for r, n in slices(*spectrum.tanh.shape):
        if not n.start:
            rows.append([])
        rows[-1].append(_log_rho_slice(Spectrum(*(field[r] for field in spectrum)), omega[r, n]))
    if len(rows) == 1 and len(rows[0]) == 1:
        return rows[0][0]
    real, imag = (torch.cat([torch.cat([p[k] for p in row], -1) for row in rows]) for k in (0, 1))
    return real, imag


def amplitude_and_log_odds(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(w1 w2) and c = log(w1/w2), with c = 0 beside a zero weight (the amplitude is 0 there)."""
    lw1, lw2 = log_weights.unbind(-1)
    dead = torch.isneginf(lw1) | torch.isneginf(lw2)
    zero = torch.zeros_like(lw1)
    lw1, lw2 = torch.where(dead, zero, lw1), torch.where(dead, zero, lw2)
    return torch.where(dead, zero, torch.exp(0.5 * (lw1 + lw2))), lw1 - lw2


def integrals(log_weights: Tensor, rule: Rule, real: Tensor, imag: Tensor, information: bool) -> tuple[Tensor, Tensor]:
    """F (I or H(Z|X)) and its derivative with respect to c at fixed sqrt(w1 w2), both [B]."""
    amplitude, c = amplitude_and_log_odds(log_weights)
    omega, kernel = rule
    turn = omega * c.unsqueeze(-1)
    modulus = torch.exp(real)
    if information:
        # 1 - rho with the half-angle: cos(imag) would round to 1 where 1 - rho is small
        half = 2 * modulus * torch.sin(0.5 * imag)
        lost = torch.expm1(real)
        value = half * torch.sin(turn + 0.5 * imag) - torch.cos(turn) * lost
        slope = half * torch.cos(turn + 0.5 * imag) + torch.sin(turn) * lost
    else:
        value = modulus * torch.cos(turn + imag)
        slope = -modulus * torch.sin(turn + imag)
    return amplitude * (value * kernel).sum(-1), amplitude * (slope * omega * kernel).sum(-1)
