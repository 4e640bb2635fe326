"""The Chernoff coefficient of two Gaussians on the line Re s = 1/2, and the integrals over it.

The formulas and their reasons are at the head of `spectral`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..._autograd import may_hold
from ...quadrature import _outside_transforms, table

__all__ = [
    "Frame",
    "Partials",
    "Rule",
    "Spectrum",
    "amplitude_and_log_odds",
    "atanh_minus_x",
    "diagonal_spectrum",
    "fixed_rule",
    "full_spectrum",
    "integral",
    "log_rho",
    "quadrature",
    "ratio_log",
    "slices",
    "slope",
    "x_minus_atan",
]

# Derived: the aliases of a trapezoid rule with step h lie 2 pi/h = 80 away in the log-ratio and weigh
# (2 pi/h) exp(-pi/h) = 3e-16. Near identical components 1 - rho grows like omega^2 and the part beyond the
# cut-off 11.6 is 8 exp(-11.6 pi)/pi = 3e-16 of I.
NODES = 150
STEP = 0.078125

# Elements (rows x nodes x dimensions) handled at once, so that float64 temporaries stay in a core's cache
# and memory does not grow with the batch.
BLOCK = 2**16

# x - atan x comes from its series up to NEAR, on tanh of the log-ratio of scales and on x = 2 omega tanh; the
# subtraction would lose x^-2 eps. Below FAR, log cosh t and t come from tanh t = T (1/(1 - T^2) <= 6 amplifies its
# rounding); above it from the scales or determinants themselves.
NEAR = 0.125
FAR = 0.9

# Chebyshev fit of (x - atan x)/x^3 in z = x^2 on |z| <= NEAR^2, relative error 7e-16, which is 1e-16 of the terms in
# x^2 that it is added to; at z = -T^2 it gives (atanh T - T)/T^3. Lowest order last. (Derived with mpmath.chebyfit.)
ODD_EXCESS = (
    0.066689158973397,
    -0.07694821525645677,
    0.09090908816324032,
    -0.11111110804223945,
    0.14285714285722664,
    -0.20000000000009366,
    0.3333333333333333,
)

# A squared mean difference above this makes exp(log rho) zero at every node; cutting it here leaves every
# result the same bit for bit and keeps inf * 0 out of the phase.
VAST = 1e60


# Nodes omega and weights, [..., n].
Rule = tuple[Tensor, Tensor]
# Gradients by log_weights, loc and scale.
Partials = tuple[Tensor, Tensor, Tensor]


class Spectrum(NamedTuple):
    """What rho depends on: ``tanh`` and ``square`` (T and h) are [..., D]; the two sums over i are [...]."""

    tanh: Tensor
    square: Tensor
    log_cosh: Tensor
    excess: Tensor


class Frame(NamedTuple):
    """The joint basis of two full covariances.

    R with R'R = S1 + S2, upper triangular (what is below its diagonal is not part of it), the eigenvectors V of
    R^-T (S2 - S1) R^-1, R^-T L1 and R^-T L2, all [..., D, D]; the mean difference in that basis, [..., D].
    """

    root: Tensor
    vectors: Tensor
    half_first: Tensor
    half_second: Tensor
    shift: Tensor


def _odd_excess(z: Tensor) -> Tensor:
    p, *rest = table(ODD_EXCESS, z.device).unbind()
    for coefficient in rest:
        p = torch.addcmul(coefficient, p, z)
    return p


def x_minus_atan(x: Tensor) -> Tensor:
    """``x - atan(x)`` to its relative accuracy, without a choice between two formulas.

    With n the nearest number to x in [-NEAR, NEAR]: the series at n, and the rest from
    ``atan x - atan n = atan((x - n)/(1 + n x))``. (`torch.where` takes as long as ten multiplications.)
    """
    n = x.clamp(-NEAR, NEAR)
    z, rest = n * n, x - n
    return n * z * _odd_excess(z) + (rest - torch.atan(rest / (1 + n * x)))


def atanh_minus_x(x: Tensor) -> Tensor:
    """``atanh(x) - x`` likewise."""
    n = x.clamp(-NEAR, NEAR)
    z, rest = n * n, x - n
    return n * z * _odd_excess(-z) + (torch.atanh(rest / (1 - n * x)) - rest)


# --------------------------------------------------------------------------- from parameters to the spectrum


def ratio_log(a: Tensor, b: Tensor) -> Tensor:
    """log(a/b); the difference of logarithms only where the quotient leaves the normal range."""
    r = a / b
    usable = (r > 1e-300) & (r < 1e300)
    return torch.where(usable, torch.log(torch.where(usable, r, torch.ones_like(r))), a.log() - b.log())


def diagonal_spectrum(loc: Tensor, scale: Tensor) -> Spectrum:
    """The spectrum of two diagonal Gaussians, loc and scale [..., 2, D]: elementwise."""
    s1, s2 = scale.unbind(-2)
    top = torch.maximum(s1, s2).detach()  # nothing depends on it but the range of the arithmetic
    a, b = s1 / top, s2 / top
    norm = a * a + b * b
    tanh = ((s2 - s1) / top) * (a + b) / norm
    d = (loc[..., 1, :] - loc[..., 0, :]) / top
    square = (2 * (d / norm) * d).clamp(max=VAST)

    far = tanh.abs() > FAR
    safe = torch.where(far, 0.0, tanh)
    log_cosh, excess = -0.5 * torch.log1p(-safe * safe), atanh_minus_x(safe)
    if may_hold(far):
        t = ratio_log(s2, s1)
        beyond = t.abs() + torch.log1p(torch.exp(-2 * t.abs())) - math.log(2)
        log_cosh, excess = torch.where(far, beyond, log_cosh), torch.where(far, t - tanh, excess)
    return Spectrum(tanh, square, log_cosh.sum(-1), excess.sum(-1))


def full_spectrum(loc: Tensor, scale: Tensor) -> tuple[Spectrum, Frame]:
    """The spectrum of two full Gaussians, loc [..., 2, D] and factors [..., 2, D, D], and their joint basis."""
    l1, l2 = scale.unbind(-3)
    # R'R = S1 + S2 from the factors: forming the covariances and factorising their sum would square the
    # condition number. linalg.qr(mode="r") fails under vmap and geqrf under dynamic shapes (torch 2.13); the
    # latter forms no Q. Nothing differentiates this line.
    dim = loc.shape[-1]
    stacked = torch.cat([l1, l2], -1).mT
    packed = torch.linalg.qr(stacked).R if torch.compiler.is_compiling() else torch.geqrf(stacked)[0]
    root = packed[..., :dim, :]  # above its diagonal; what is below is something else
    shift = (loc[..., 1, :] - loc[..., 0, :]).unsqueeze(-1)
    solved = torch.linalg.solve_triangular(root.mT, torch.cat([l2 - l1, l1, l2, shift], -1), upper=False)
    difference, first, second, shift = solved.split([dim, dim, dim, 1], -1)
    # R^-T (S2 - S1) R^-1 as a product of the factors' difference: exactly 0 for equal factors, and of error
    # eps |T| near them, where R^-T S2 R^-1 - R^-T S1 R^-1 leaves eps.
    product = difference @ (first + second).mT
    tanh, vectors = torch.linalg.eigh(0.5 * (product + product.mT))
    whitened = math.sqrt(2) * (vectors.mT @ shift).squeeze(-1)
    square = (whitened * whitened).clamp(max=VAST)

    log_cosh, excess = -0.5 * torch.log1p(-tanh * tanh).sum(-1), atanh_minus_x(tanh).sum(-1)
    far = (tanh.abs() > FAR).any(-1)
    if may_hold(far):
        d1, d2, c = (_positive_diagonal(x) for x in (l1, l2, root))
        ratio1, ratio2, ratio = ratio_log(torch.stack([c, c, d2]), torch.stack([d1, d2, d1])).unbind()
        log_cosh = torch.where(far, (ratio1 + ratio2 - math.log(2)).sum(-1), log_cosh)
        excess = torch.where(far, (ratio - tanh).sum(-1), excess)
    return Spectrum(tanh, square, log_cosh, excess), Frame(root, vectors, first, second, whitened)


def _positive_diagonal(factor: Tensor) -> Tensor:
    """The diagonal of a triangular factor, whichever signs its rows have."""
    return factor.diagonal(dim1=-2, dim2=-1).abs()


# ------------------------------------------------------------------------------------------ the integral


def _rule(step: Tensor) -> Rule:
    j = torch.arange(NODES, dtype=torch.float64, device=step.device)
    omega = step.unsqueeze(-1) * j
    kernel = step.unsqueeze(-1) / ((0.25 + omega * omega) * torch.cosh(math.pi * omega))
    return omega, torch.where(j == 0, 0.5 * kernel, kernel)


@functools.lru_cache(maxsize=64)
def _kept_rule(nodes: int, step: float, device: torch.device) -> Rule:
    return _outside_transforms(lambda: _rule(torch.tensor(step, dtype=torch.float64, device=device)))


def fixed_rule(like: Tensor) -> Rule:
    """Nodes omega >= 0 and weights of the kernel for each element of ``like``, [..., n], two halves in one."""
    if torch.compiler.is_compiling():
        return _rule(torch.full_like(like, STEP))
    omega, kernel = _kept_rule(NODES, STEP, like.device)
    return omega.expand(*like.shape, NODES), kernel.expand(*like.shape, NODES)


def quadrature(spectrum: Spectrum, information: bool) -> Rule:
    """Nodes omega >= 0 and weights of the kernel, [..., n].

    For H(Z|X) the nodes shrink to where rho(1/2 + i omega) lives: far components make it a peak narrower
    than the step, and H, though right absolutely, would lose its relative accuracy.
    """
    tanh, square = spectrum.tanh.detach(), spectrum.square.detach()
    if information:
        return fixed_rule(tanh[..., 0])
    z = tanh * tanh
    low = torch.zeros_like(tanh[..., 0])
    for k in range(1, 49):
        # The decay of the integrand's logarithm at a trial cut-off; 40 is exp(-40) = 4e-18.
        trial = low + STEP * (NODES - 1) * 0.5**k
        w = (trial * trial).unsqueeze(-1)
        bend = 1 + 4 * w * z
        decay = (0.25 * torch.log(bend) + 0.5 * square * (w * (1 - z) / bend)).sum(-1)
        low = torch.where(decay + math.pi * trial < 40, trial, low)
    return _rule((low + STEP * (NODES - 1) * 0.5**48) / (NODES - 1))


def _log_rho_slice(spectrum: Spectrum, omega: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of log rho(1/2 + i omega), [..., n]."""
    tanh, square, log_cosh, excess = spectrum
    x = 2 * omega.unsqueeze(-1) * tanh.unsqueeze(-2)
    z = x * x
    # sums over i of h_i/(1 + x_i^2) and of h_i T_i/(1 + x_i^2)
    even, odd = ((1 / (1 + z)) @ torch.stack([square, tanh * square], -1)).unbind(-1)
    eighth_q = 0.125 + 0.5 * omega * omega
    real = -(0.25 * torch.log1p(z).sum(-1) + eighth_q * even + 0.5 * log_cosh.unsqueeze(-1))
    imag = 0.5 * x_minus_atan(x).sum(-1) + omega * (2 * eighth_q * odd + excess.unsqueeze(-1))
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
    """Real and imaginary part of log rho at the nodes omega [..., n], a slice of bounded size at a time."""
    rows, dim = spectrum.log_cosh.numel(), spectrum.tanh.shape[-1]
    if torch.compiler.is_compiling() or rows * NODES * dim <= BLOCK:
        return _log_rho_slice(spectrum, omega)
    flat = Spectrum(*(x.reshape(rows, *x.shape[omega.ndim - 1 :]) for x in spectrum))
    nodes = omega.reshape(rows, NODES)
    parts: list[list[tuple[Tensor, Tensor]]] = []
    for r, n in slices(rows, dim):
        if not n.start:
            parts.append([])
        parts[-1].append(_log_rho_slice(Spectrum(*(field[r] for field in flat)), nodes[r, n]))
    real, imag = (torch.cat([torch.cat([p[k] for p in row], -1) for row in parts]) for k in (0, 1))
    return real.reshape(omega.shape), imag.reshape(omega.shape)


def amplitude_and_log_odds(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(w1 w2) and c = log(w1/w2), with c = 0 beside a zero weight (the amplitude is 0 there)."""
    lw1, lw2 = log_weights.unbind(-1)
    return torch.exp(0.5 * (lw1 + lw2)), torch.nan_to_num(lw1 - lw2, nan=0.0, posinf=0.0, neginf=0.0)


def integral(log_weights: Tensor, rule: Rule, real: Tensor, imag: Tensor, information: bool) -> Tensor:
    """I or H(Z|X), [...]."""
    amplitude, c = amplitude_and_log_odds(log_weights)
    omega, kernel = rule
    turn = omega * c.unsqueeze(-1)
    modulus = torch.exp(real)
    if information:
        # 1 - rho with the half-angle: cos(imag) would round to 1 where 1 - rho is small
        half = 0.5 * imag
        value = 2 * modulus * torch.sin(half) * torch.sin(turn + half) - torch.cos(turn) * torch.expm1(real)
    else:
        value = modulus * torch.cos(turn + imag)
    return amplitude * (value * kernel).sum(-1)


def slope(log_weights: Tensor, rule: Rule, real: Tensor, imag: Tensor, information: bool) -> Tensor:
    """The derivative of `integral` with respect to c = log(w1/w2) at fixed sqrt(w1 w2), [...]."""
    amplitude, c = amplitude_and_log_odds(log_weights)
    omega, kernel = rule
    turn = omega * c.unsqueeze(-1)
    modulus = torch.exp(real)
    if information:
        half = 0.5 * imag
        slope = 2 * modulus * torch.sin(half) * torch.cos(turn + half) + torch.sin(turn) * torch.expm1(real)
    else:
        slope = -modulus * torch.sin(turn + imag)
    return amplitude * (slope * omega * kernel).sum(-1)
