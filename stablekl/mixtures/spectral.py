r"""Two Gaussian components in any dimension: one integral over one real variable.

For m = w1 p1 + w2 p2 and the component label Z of a draw X ~ m, with c = log(w1/w2) and the Chernoff
coefficient rho(s) = integral of p1^s p2^(1-s),

.. math::
    H(Z|X) = \tfrac12\sqrt{w_1 w_2} \int \frac{e^{i\omega c}\,\rho(1/2 + i\omega)}
             {(1/4 + \omega^2)\cosh\pi\omega}\,d\omega, \qquad
    I(X;Z) = \text{the same with } 1 - \rho,

because softplus(-r) e^(r/2) + softplus(r) e^(-r/2), r the log-ratio of the two weighted densities, is the
Fourier transform of the kernel. |rho| <= 1 on the whole strip 0 < Re s < 1, so one fixed trapezoid rule
(Trefethen and Weideman, 2014) serves every dimension and every pair: no node depends on the data.

**Everything is real.** The whitening covariance is the midpoint C = (S1 + S2)/2, symmetric in the components.
With T_i in (-1, 1) the eigenvalues of C^-1/2 (S2 - S1)/2 C^-1/2, t_i = atanh(T_i) (the log-ratio of the
standard deviations), h_i the squared whitened mean difference, x = 2 omega T_i and q = 1 + 4 omega^2,

.. math::
    \Re\log\rho &= -\sum_i \bigl[\tfrac12\log\cosh t_i + \tfrac14\log(1 + x_i^2)
                   + \tfrac q8 \tfrac{h_i}{1 + x_i^2}\bigr] \\
    \Im\log\rho &= \sum_i \bigl[\omega (t_i - \tanh t_i) + \tfrac12 (x_i - \arctan x_i)
                   + \tfrac q8 \tfrac{h_i x_i}{1 + x_i^2}\bigr].

All terms of a sum have one sign for each i, so nothing cancels for components that nearly coincide. The
textbook form, which whitens by S1 and takes complex logarithms of 1 + s e_i, subtracts s log(1 + e_i)/2 from
them and loses e_i^-1 eps; it also overflows or meets log(0) at extreme ratios, where T_i just reaches +-1.

**Accuracy** (float64): absolute error below 1e-15 (observed 5e-16), relative error of I near 1e-15 as the
components approach each other with weights of like size. With a small weight the error of I stays
absolute: aliases of the trapezoid rule of up to 3e-16 max|1 - rho|. For full covariances read the bars as
multiplied by the condition number of the factors, as for any function of a Cholesky factor.

References: L. N. Trefethen and J. A. C. Weideman, "The exponentially convergent trapezoidal rule", SIAM
Review 56 (2014), 385-458; H. Chernoff, Annals of Mathematical Statistics 23 (1952), 493-507.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .._autograd import rowwise
from .components import Components

__all__ = ["label_entropy_given_sample", "label_information"]

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
_Rule = tuple[Tensor, Tensor]
# Gradients by log_weights, loc and scale.
_Partials = tuple[Tensor, Tensor, Tensor]


class _Spectrum(NamedTuple):
    """What rho depends on: ``tanh`` and ``square`` (T and h) are [B, D]; the two sums over i are [B]."""

    tanh: Tensor
    square: Tensor
    log_cosh: Tensor
    excess: Tensor


class _Frame(NamedTuple):
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


def _diagonal_spectrum(loc: Tensor, scale: Tensor) -> _Spectrum:
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
    return _Spectrum(tanh, square, log_cosh.sum(-1), excess.sum(-1))


def _full_spectrum(loc: Tensor, scale: Tensor) -> tuple[_Spectrum, _Frame]:
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
        _Spectrum(
            tanh,
            square,
            torch.where(any_far, far_log_cosh.sum(-1), near_log_cosh.sum(-1)),
            torch.where(any_far, (_ratio_log(d2, d1) - tanh).sum(-1), excess.sum(-1)),
        ),
        _Frame(root, vectors, first, second, whitened),
    )


# ------------------------------------------------------------------------------------------ the integral


def _quadrature(spectrum: _Spectrum, information: bool) -> tuple[Tensor, Tensor]:
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


def _log_rho(spectrum: _Spectrum, omega: Tensor) -> tuple[Tensor, Tensor]:
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


def _slices(rows: int, dim: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of rows and nodes; a single one while tracing, where a fused kernel needs no temporaries."""
    if torch.compiler.is_compiling() or rows == 0:
        yield slice(None), slice(None)
        return
    nodes = max(1, min(NODES, BLOCK // dim))
    step = max(1, BLOCK // (nodes * dim))
    for row in range(0, rows, step):
        for node in range(0, NODES, nodes):
            yield slice(row, row + step), slice(node, node + nodes)


def _log_rho_blocked(spectrum: _Spectrum, omega: Tensor) -> tuple[Tensor, Tensor]:
    rows: list[list[tuple[Tensor, Tensor]]] = []
    for r, n in _slices(*spectrum.tanh.shape):
        if not n.start:
            rows.append([])
        rows[-1].append(_log_rho(_Spectrum(*(field[r] for field in spectrum)), omega[r, n]))
    if len(rows) == 1 and len(rows[0]) == 1:
        return rows[0][0]
    real, imag = (torch.cat([torch.cat([p[k] for p in row], -1) for row in rows]) for k in (0, 1))
    return real, imag


def _weights(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(w1 w2) and c = log(w1/w2), with c = 0 beside a zero weight (the amplitude is 0 there)."""
    lw1, lw2 = log_weights.unbind(-1)
    dead = torch.isneginf(lw1) | torch.isneginf(lw2)
    zero = torch.zeros_like(lw1)
    lw1, lw2 = torch.where(dead, zero, lw1), torch.where(dead, zero, lw2)
    return torch.where(dead, zero, torch.exp(0.5 * (lw1 + lw2))), lw1 - lw2


def _integrals(
    log_weights: Tensor, rule: _Rule, real: Tensor, imag: Tensor, information: bool
) -> tuple[Tensor, Tensor]:
    """F (I or H(Z|X)) and its derivative with respect to c at fixed sqrt(w1 w2), both [B]."""
    amplitude, c = _weights(log_weights)
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


# ------------------------------------------------------------------------------------------- the gradient


def _sensitivity(
    log_weights: Tensor, rule: _Rule, real: Tensor, imag: Tensor, information: bool
) -> tuple[Tensor, Tensor]:
    """Kappa at each node, real and imaginary part [B, n], such that dF = sum Re(kappa d log rho)."""
    amplitude, c = _weights(log_weights)
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
    right = torch.cat(
        [torch.cat([z * a + w * ax, w * a - z * ax], -2) for z, w in ((ur, ui), (vr, vi))], -1
    )
    gram1, gram2 = (left.mT @ right).chunk(2, -1)
    return first.squeeze(-2), gram1, gram2


def _accumulate(
    sums: Callable[..., tuple[Tensor, ...]], tanh: Tensor, kr: Tensor, ki: Tensor, omega: Tensor
) -> tuple[Tensor, ...]:
    """``sums`` block by block over rows and nodes."""
    blocks = list(_slices(*tanh.shape))
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


def _weight_gradient(value: Tensor, slope: Tensor) -> Tensor:
    """w_k KL(p_k || m) for I, w_k E_{p_k}[-log P(k|X)] for H: their sum is the value itself (Euler)."""
    return torch.stack([0.5 * value + slope, 0.5 * value - slope], -1)


def _diagonal_gradient(
    loc: Tensor, scale: Tensor, spectrum: _Spectrum, omega: Tensor, kr: Tensor, ki: Tensor
) -> tuple[Tensor, Tensor]:
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
        torch.stack(
            [h * beta1 * (a / norm) / top + spread / s1, h * beta2 * (b / norm) / top - spread / s2], -2
        ),
    )


def _full_gradient(
    scale: Tensor, spectrum: _Spectrum, frame: _Frame, omega: Tensor, kr: Tensor, ki: Tensor
) -> tuple[Tensor, Tensor]:
    l1, l2 = scale.unbind(-3)
    root, vectors, first, second, d = frame
    alpha, gram1, gram2 = _accumulate(_full_sums, spectrum.tanh, kr, ki, omega)
    basis = math.sqrt(2) * torch.linalg.solve_triangular(root, vectors, upper=True)
    push = (basis @ (alpha * d).unsqueeze(-1)).squeeze(-1)
    spread = 2 * alpha * spectrum.tanh
    gradients = []
    for factor, half, gram, f in ((l1, first, gram1, spread), (l2, second, gram2, -spread)):
        # basis^-1 L^-T, not diag(1/(1 -+ T)) basis' L: see _diagonal_gradient
        dual = (torch.linalg.solve_triangular(factor, root.mT, upper=False) @ vectors).mT / math.sqrt(2)
        pull = (d.unsqueeze(-1) * gram * d.unsqueeze(-2)) @ (math.sqrt(2) * (vectors.mT @ half))
        gradients.append((basis @ (f.unsqueeze(-1) * dual + pull)).tril())
    return torch.stack([push, -push], -2), torch.stack(gradients, -3)


def _full_gradient_by_inverses(
    log_weights: Tensor,
    loc: Tensor,
    scale: Tensor,
    rule: _Rule,
    real: Tensor,
    imag: Tensor,
    information: bool,
) -> _Partials:
    """The three gradients by one complex inverse per node.

    Differentiable at equal eigenvalues, where an eigendecomposition is not. Its values are good to eps
    absolutely only, so `_engine` takes the derivatives from here and the values from `_full_gradient`.
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
    amplitude, c = _weights(log_weights)
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
    return _weight_gradient(value, slope), torch.stack([push, -push], -2), torch.stack(gradients, -3)


# --------------------------------------------------------------------------------------------- assembly


def _flat(x: Tensor, events: int) -> Tensor:
    return x.reshape(-1, *x.shape[x.ndim - events :])


def _engine(information: bool, diagonal: bool) -> Callable[..., Tensor]:
    input_events = (1, 2, 2 if diagonal else 3)
    kept_events = (0, 0, 1, 1, 1, 1, 0, 0) + (() if diagonal else (2, 2, 2, 2, 1))

    def analyse(loc: Tensor, scale: Tensor) -> tuple[_Spectrum, tuple[Tensor, ...]]:
        return (_diagonal_spectrum(loc, scale), ()) if diagonal else _full_spectrum(loc, scale)

    def evaluate(log_weights: Tensor, loc: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        spectrum, frame = analyse(loc, scale)
        rule = _quadrature(spectrum, information)
        real, imag = _log_rho_blocked(spectrum, rule[0])
        return (*_integrals(log_weights, rule, real, imag, information), real, imag, *spectrum, *frame)

    def value(*inputs: Tensor) -> tuple[Tensor, ...]:
        batch = inputs[0].shape[:-1]
        results = evaluate(*(_flat(x, e) for x, e in zip(inputs, input_events, strict=True)))
        shaped = tuple(x.reshape(batch + x.shape[1:]) for x in results)
        return shaped[0].clone(), *shaped  # a saved tensor may not also be the output

    def by_formula(log_weights: Tensor, loc: Tensor, scale: Tensor, kept: tuple[Tensor, ...]) -> _Partials:
        out, slope, real, imag = kept[:4]
        spectrum = _Spectrum(*kept[4:8])
        rule = _quadrature(spectrum, information)
        kappa = _sensitivity(log_weights, rule, real, imag, information)
        if diagonal:
            pair = _diagonal_gradient(loc, scale, spectrum, rule[0], *kappa)
        else:
            pair = _full_gradient(scale, spectrum, _Frame(*kept[8:]), rule[0], *kappa)
        return _weight_gradient(out, slope), *pair

    def differentiable(log_weights: Tensor, loc: Tensor, scale: Tensor) -> _Partials:
        if diagonal:
            return by_formula(log_weights, loc, scale, evaluate(log_weights, loc, scale))
        still = log_weights.detach(), loc.detach(), scale.detach()
        kept = evaluate(*still)
        exact = by_formula(*still, kept)
        rule = _quadrature(_Spectrum(*kept[4:8]), information)
        moving = _full_gradient_by_inverses(log_weights, loc, scale, rule, kept[2], kept[3], information)
        lw, mu, factor = (e + (m - m.detach()) for e, m in zip(exact, moving, strict=True))
        return lw, mu, factor

    def gradient(inputs: tuple[Tensor, ...], saved: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        log_weights, loc, scale = (_flat(x, e) for x, e in zip(inputs, input_events, strict=True))
        if saved is None:
            results = differentiable(log_weights, loc, scale)
        else:
            kept = tuple(_flat(x, e) for x, e in zip(saved, kept_events, strict=True))
            results = by_formula(log_weights, loc, scale, kept)
        return tuple(r.reshape(x.shape) for r, x in zip(results, inputs, strict=True))

    return rowwise(value, gradient)


_ENGINES = {
    (information, diagonal): _engine(information, diagonal)
    for information in (True, False)
    for diagonal in (True, False)
}


def _evaluate(components: Components, information: bool) -> Tensor:
    log_weights, loc, scale = components
    if log_weights.shape[-1] != 2 or loc.shape[-2] != 2:
        raise ValueError(
            "the spectral integral is for two components, got log_weights of shape "
            f"{tuple(log_weights.shape)} and loc of shape {tuple(loc.shape)}; for any other number of "
            "components use kl_estimate with method='auto'"
        )
    dtype = torch.promote_types(torch.promote_types(log_weights.dtype, loc.dtype), scale.dtype)
    diagonal = components.is_diagonal
    if not diagonal and loc.shape[-1] == 1:
        scale, diagonal = scale.squeeze(-1), True
    events = 2 if diagonal else 3
    corner = scale[..., 0, 0] if diagonal else scale[..., 0, 0, 0]
    batch = (log_weights[..., 0] + loc[..., 0, 0] + corner).shape
    inputs = (
        x.to(torch.float64).expand(batch + x.shape[x.ndim - e :])
        for x, e in ((log_weights, 1), (loc, 2), (scale, events))
    )
    return _ENGINES[information, diagonal](*inputs).to(dtype)


def label_information(components: Components) -> Tensor:
    r"""Information that a draw carries about its component, I(X; Z) = sum_k w_k KL(p_k || m), for K = 2.

    Evaluated as the integral of the module's head with 1 - rho, in float64. Exactly 0, with gradients exactly
    0 in locations and scales, for identical components and for a zero weight.

    Args:
        components: two Gaussian components; ``log_weights`` of shape ``batch_shape + (2,)``, normalised.

    Returns:
        I in nats, shape ``batch_shape``, in the dtype of the components. The log-weights count as two
        independent inputs: the gradient is w_k KL(p_k || m), which ``log_softmax`` completes.

    Raises:
        ValueError: the number of components is not two.
    """
    return _evaluate(components, True)


def label_entropy_given_sample(components: Components) -> Tensor:
    r"""Uncertainty about the component that a draw leaves, H(Z|X) = H(w) - I(X; Z), for K = 2.

    Evaluated as the integral of the module's head with rho, in float64: right to about 1e-15 of its
    Bhattacharyya bound 2 sqrt(w1 w2) rho(1/2), so accurate where the components are far apart and it goes
    to 0, which H(w) - I is not. The other way round, near-identical components need `label_information`.

    Args:
        components: two Gaussian components; ``log_weights`` of shape ``batch_shape + (2,)``, normalised.

    Returns:
        H(Z|X) in nats, shape ``batch_shape``, in the dtype of the components. The log-weights count as two
        independent inputs: the gradient is w_k E_{p_k}[-log P(k | X)].

    Raises:
        ValueError: the number of components is not two.
    """
    return _evaluate(components, False)
