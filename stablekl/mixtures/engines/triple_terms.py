"""The integral of p1^s1 p2^s2 p3^s3 for Gaussians, and the plane rule that integrates over s.

The formulas and their reasons are at the head of `triple`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...quadrature import _outside_transforms
from ...special import log1pmx
from .spectral_terms import x_minus_atan

__all__ = ["Geometry", "Rule", "Spectrum", "blocks", "geometry", "integrand", "log_moment", "plane_rule", "spectrum"]

# Found by search. The error of a rule that holds for every mixture is the largest of
# |sum_n k_n prod_i a_i^s_ni - t(a)| / sum_i a_i over a > 0 (see `triple`): 1.1e-14 among 18,000 a. 84 directions and 58
# radii (step 0.1) leave 1.1e-11; 105 and 70 (0.09), 7e-14; 150 and 90 (0.075), 2e-15.
DIRECTIONS = 132  # in half a turn; 264 is a multiple of 12, which keeps the symmetry in the components
RADII = 85
STEP = 0.075
STRETCH = 0.025  # r = t (1 + STRETCH t^2): the kernel decays, so that far nodes may lie further apart
RULE_ERROR = 1.2e-14

# Elements (rows x nodes x dimensions) handled at once, so that float64 temporaries stay in a core's cache
# and memory does not grow with the batch.
BLOCK = 2**16

# Where |3Q - I| is below this, it is formed from differences of the factors.
CLOSE = 0.25

# Whitened distances above this make M zero at every node; cutting them keeps their squares finite.
VAST = 1e140


class Rule(NamedTuple):
    """The nodes w = r u and the weights: ``direction`` (u) [n, 3], ``radius`` [m], ``real`` and ``imag`` [n, m]."""

    direction: Tensor
    radius: Tensor
    real: Tensor
    imag: Tensor


class Geometry(NamedTuple):
    """Three Gaussians in the frame where their precisions add up to the identity, R'R = P1 + P2 + P3.

    With F_i = L_i^-1 R^-1 and Q_i = F_i'F_i: ``root`` R, ``factor`` F_i, ``excess`` 3 Q_i - I, ``log_det`` its
    log det(3 Q_i) - tr(3 Q_i - I) <= 0; the means x_i about their precision-weighted mean, ``shift``, with
    ``push`` Q_i x_i (adding up to 0) and ``square`` |F_i x_i|^2. Matrices are vectors for diagonal components.
    """

    root: Tensor
    factor: Tensor
    excess: Tensor
    log_det: Tensor
    shift: Tensor
    push: Tensor
    square: Tensor


class Spectrum(NamedTuple):
    """Along each direction u: ``eigenvalue`` of sum_i u_i (3 Q_i - I) and ``push`` sum_i u_i Q_i x_i, [B, n, D].

    ``push`` is in the basis of the eigenvectors ``vectors`` [B, n, D, D], None for diagonal components.
    """

    eigenvalue: Tensor
    push: Tensor
    vectors: Tensor | None


# ------------------------------------------------------------------------------------------------ the rule


def _bessel_zeros(n: int) -> tuple[np.ndarray, np.ndarray]:
    """The first n zeros of J0, and J1 there.

    Both functions as the mean of an oscillation over a period, which a trapezoid rule takes exactly.
    (torch.special.bessel_j0 and bessel_j1 are off by 3e-7 at 5.1, torch 2.13.)
    """
    b = (np.arange(1, n + 1) - 0.25) * np.pi
    z = b + 1 / (8 * b)
    count = int(1.4 * z[-1]) + 100
    sine = np.sin(2 * np.pi * (np.arange(count) + 0.5) / count)
    for _ in range(4):
        turn = z[:, None] * sine
        z = z + np.cos(turn).mean(1) / (sine * np.sin(turn)).mean(1)
    return z, (sine * np.sin(z[:, None] * sine)).mean(1)


def _gamma(z: np.ndarray) -> np.ndarray:
    """The gamma function for Re z > 0, by Stirling's series at z + 12; relative error 1e-14."""
    y = z + 12
    series = [1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156]
    correction = sum(c * y ** -(2 * n + 1) for n, c in enumerate(series))
    shifted: np.ndarray = np.exp((y - 0.5) * np.log(y) - y + 0.5 * math.log(2 * math.pi) + correction)
    for k in range(12):
        shifted = shifted / (z + k)
    return shifted


def _constants() -> np.ndarray:
    zeros, slope = _bessel_zeros(RADII)
    t = STEP * zeros / np.pi
    stretched = 1 + STRETCH * t * t
    radius = t * stretched
    weight = 2 * (STEP / (np.pi * slope)) ** 2 * stretched * (1 + 3 * STRETCH * t * t)
    angle = np.pi * (np.arange(DIRECTIONS) + 0.5) / DIRECTIONS
    direction = math.sqrt(2 / 3) * np.cos(angle[:, None] - 2 * np.pi * np.arange(3) / 3)
    s = 1 / 3 + 1j * radius[:, None] * direction[:, None, :]
    kernel = (_gamma(1 - s) / s).prod(-1) * weight * (2 * np.pi / DIRECTIONS / math.sqrt(3) / (2 * np.pi) ** 2)
    return np.concatenate([x.ravel() for x in (direction, radius, kernel.real, kernel.imag)])


_SIZES = [3 * DIRECTIONS, RADII, DIRECTIONS * RADII, DIRECTIONS * RADII]


@functools.lru_cache(maxsize=64)
def _kept_constants(device: torch.device) -> Tensor:
    return _outside_transforms(lambda: torch.from_numpy(_constants()).to(device))


# An operator rather than 23,000 constants in the graph.
@torch.library.custom_op("stablekl::triple_constants", mutates_args=())
def _traced_constants(device: torch.device) -> Tensor:
    return _kept_constants(device).clone()


@_traced_constants.register_fake
def _(device: torch.device) -> Tensor:
    return torch.empty(sum(_SIZES), dtype=torch.float64, device=device)


def plane_rule(device: torch.device) -> Rule:
    """Nodes and weights of the half plane; the conjugate half is in the weights."""
    make = _traced_constants if torch.compiler.is_compiling() else _kept_constants
    direction, radius, real, imag = make(device).split(_SIZES)
    return Rule(direction.view(-1, 3), radius, real.view(-1, RADII), imag.view(-1, RADII))


def blocks(rows: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of rows and directions, for ``size`` numbers per node; a single one while tracing."""
    if torch.compiler.is_compiling() or rows == 0:
        yield slice(None), slice(None)
        return
    directions = max(1, min(DIRECTIONS, BLOCK // (RADII * size)))
    step = max(1, BLOCK // (directions * RADII * size))
    for row in range(0, rows, step):
        for direction in range(0, DIRECTIONS, directions):
            yield slice(row, row + step), slice(direction, direction + directions)


# ------------------------------------------------------------------------- from parameters to the geometry


def geometry(loc: Tensor, scale: Tensor) -> Geometry:
    """The common frame of three Gaussians, loc [B, 3, D] and scale [B, 3, D] or factors [B, 3, D, D]."""
    return _diagonal_geometry(loc, scale) if scale.ndim == loc.ndim else _full_geometry(loc, scale)


def _pairs(x: Tensor, events: int) -> tuple[Tensor, Tensor]:
    """x_i and x_j, to broadcast to [B, i, j, ...]."""
    return x.unsqueeze(-events - 1), x.unsqueeze(-events - 2)


def _diagonal_geometry(loc: Tensor, scale: Tensor) -> Geometry:
    low = scale.amin(-2, keepdim=True).detach()  # nothing depends on it but the range of the arithmetic
    a = low / scale
    norm = (a * a).sum(-2, keepdim=True)
    inverse = torch.rsqrt(norm)
    factor = a * inverse
    q = factor * factor
    (si, sj), (ai, aj) = _pairs(scale, 1), _pairs(a, 1)
    # 3 Q_i - 1 = sum_j (Q_i - Q_j), from the difference of the scales: exactly 0 for equal ones
    excess = (ai * ((sj - si) / sj) * (ai + aj)).sum(-2) / norm
    root = 1 / (inverse * low)
    mi, mj = _pairs(loc, 1)
    shift = (q.unsqueeze(-3) * ((mi - mj) * root.unsqueeze(-2)).clamp(-VAST, VAST)).sum(-2)
    push = q * shift
    far = excess < -0.5
    log_ratio = math.log(3) + 2 * torch.log(a) - torch.log(norm)
    log_det = torch.where(far, log_ratio - excess, log1pmx(torch.where(far, torch.zeros_like(excess), excess)))
    scaled = factor * shift
    return Geometry(root.squeeze(-2), factor, excess, log_det.sum(-1), shift, push, (scaled * scaled).sum(-1))


def _full_geometry(loc: Tensor, scale: Tensor) -> Geometry:
    dim = loc.shape[-1]
    identity = torch.eye(dim, dtype=loc.dtype, device=loc.device)
    inverse = torch.linalg.solve_triangular(scale, identity.expand_as(scale), upper=False)
    # R'R = P1 + P2 + P3 from the factors: adding the precisions up would square the condition number.
    # linalg.qr(mode="r") fails under vmap and geqrf under dynamic shapes (torch 2.13).
    stacked = inverse.flatten(-3, -2)
    packed = torch.linalg.qr(stacked).R if torch.compiler.is_compiling() else torch.geqrf(stacked)[0]
    root = packed[..., :dim, :].triu()
    factor = torch.linalg.solve_triangular(root.unsqueeze(-3), inverse, upper=True, left=False)
    q = factor.mT @ factor
    direct = 3 * q - identity
    close = (direct.abs().sum(-1).amax((-1, -2)) < CLOSE)[..., None, None, None]
    # Near identical components: 3 Q_i - I = sum_j (Q_i - Q_j) by products of the factors' differences,
    # F_i - F_j = L_i^-1 (L_j - L_i) F_j, whose error is eps of the difference; 3 Q_i - I leaves eps.
    (li, lj), (fi, fj), (gi, _) = (_pairs(x, 2) for x in (scale, factor, inverse))
    products = (gi @ ((lj - li) @ fj)).mT @ (fi + fj)
    excess = torch.where(close, products.sum(-3), direct)
    excess = 0.5 * (excess + excess.mT)

    mi, mj = _pairs(loc, 1)
    distance = (root[..., None, None, :, :] @ (mi - mj).unsqueeze(-1)).clamp(-VAST, VAST)
    shift = (q.unsqueeze(-4) @ distance).sum(-3)
    scaled = factor @ shift
    push = (factor.mT @ scaled).squeeze(-1)

    determinant = -2 * (
        scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        + root.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1).unsqueeze(-1)
    )
    determinant = determinant + dim * math.log(3) - excess.diagonal(dim1=-2, dim2=-1).sum(-1)
    small = torch.linalg.eigvalsh(torch.where(close, excess, torch.zeros_like(excess)))
    log_det = torch.where(close[..., 0, 0], log1pmx(small).sum(-1), determinant)
    squares = scaled.squeeze(-1)
    return Geometry(root, factor, excess, log_det, shift.squeeze(-1), push, (squares * squares).sum(-1))


# --------------------------------------------------------------------------------------------- the integral


def spectrum(frame: Geometry, direction: Tensor) -> Spectrum:
    """The matrices along directions [n, 3], diagonalised: one eigendecomposition serves a whole ray."""
    push = direction @ frame.push
    if frame.excess.ndim == frame.shift.ndim:
        return Spectrum(direction @ frame.excess, push, None)
    mixed = (direction @ frame.excess.flatten(-2)).unflatten(-1, frame.excess.shape[-2:])
    eigenvalue, vectors = torch.linalg.eigh(mixed)
    return Spectrum(eigenvalue, (vectors.mT @ push.unsqueeze(-1)).squeeze(-1), vectors)


def log_moment(frame: Geometry, along: Spectrum, rule: Rule) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of log M at the nodes of a rule, [B, n, m]."""
    direction, radius = rule.direction, rule.radius
    y = radius.unsqueeze(-1) * along.eigenvalue.unsqueeze(-2)
    z = y * y
    h = along.push * along.push
    even, odd = ((1 / (1 + z)) @ torch.stack([h, along.eigenvalue * h], -1)).unbind(-1)
    square = 1.5 * radius * radius
    constant = (frame.log_det - frame.square).sum(-1)[..., None, None] / 6
    linear = 0.5 * (direction @ (frame.log_det - frame.square).unsqueeze(-1))
    real = constant - 0.25 * torch.log1p(z).sum(-1) - square * even
    imag = radius * linear + 0.5 * x_minus_atan(y).sum(-1) + square * radius * odd
    return real, imag


def _amplitude_and_log_odds(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """(w1 w2 w3)^(1/3) and the log-weights about their mean, 0 beside a zero weight (the amplitude is 0 there)."""
    dead = torch.isneginf(log_weights).any(-1, keepdim=True)
    safe = torch.where(dead, torch.zeros_like(log_weights), log_weights)
    mean = safe.mean(-1, keepdim=True)
    amplitude = torch.where(dead, torch.zeros_like(mean), torch.exp(mean))
    return amplitude, safe - mean


def integrand(
    log_weights: Tensor, rule: Rule, real: Tensor, imag: Tensor, information: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Terms of the sum with their imaginary parts, and kappa with dF = sum Re(kappa d log M): four times [B, n, m]."""
    amplitude, c = _amplitude_and_log_odds(log_weights)
    turn = rule.radius * (rule.direction @ c.unsqueeze(-1))
    cos, sin = torch.cos(turn), torch.sin(turn)
    amplitude = amplitude.unsqueeze(-1)
    kr = amplitude * (rule.real * cos - rule.imag * sin)
    ki = amplitude * (rule.real * sin + rule.imag * cos)
    modulus = torch.exp(real)
    mr, mi = modulus * torch.cos(imag), modulus * torch.sin(imag)
    tr, ti = kr * mr - ki * mi, kr * mi + ki * mr
    if not information:
        return tr, ti, tr, ti
    # 1 - M with the half-angle: cos(imag) would round to 1 where 1 - M is small
    half = torch.sin(0.5 * imag)
    lr = 2 * modulus * half * half - torch.expm1(real)
    return kr * lr + ki * mi, ki * lr - kr * mi, -tr, -ti
