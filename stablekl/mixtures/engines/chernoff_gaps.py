r"""Jensen gaps of four convex functions at complex order, of which log-normalisers of exponential families are sums.

In a family with log-normaliser F the Chernoff coefficient of two members with parameters x and y is
:math:`\rho(s) = \int p_1^s p_2^{1-s} = e^{-J(s)}`,

.. math:: J(s) = s F(x) + (1 - s) F(y) - F(m), \qquad m = s x + (1 - s) y,

needed on the line s = 1/2 + i omega. There 1 - s is the conjugate of s, s (1 - s) = q = 1/4 + omega^2, and with
X = (x + y)/2 and T = (x - y)/(x + y) the mixture is m = X (1 + i u), u = 2 omega T. J vanishes with the square of the
distance, and its textbook form subtracts numbers of any size. With L(z) = z - log(1 + z):

* `rate_gap`, F = exp at the logarithms of x and y, g = sqrt(x y) and l = log(x/y):

  .. math:: J = \tfrac12 (\sqrt x - \sqrt y)^2 + 2 g \sin^2 \tfrac{\omega l}2
            + i g \bigl[\omega l - \sin \omega l + 2 \omega (\sinh \tfrac l2 - \tfrac l2)\bigr];

* `log_gap`, F = -log, t = atanh T:

  .. math:: J = \log\cosh t + \tfrac12 \log(1 + u^2) - i [u - \arctan u + 2 \omega (t - T)];

* `ratio_gap`, F(a, b) = a log(a/b): with A, T and u of the a's, v of the b's, and D = T_b - T_a,

  .. math:: J = s a_1 L(D A/a_1) + (1 - s) a_2 L(-D A/a_2) - m\,L\Bigl(\frac{2 i \omega D}{1 + i u}\Bigr),

  since the arguments' linear terms add up to 0: all of second order in the difference of the means a/b, however far
  a_1 is from a_2;

* `lgamma_gap`, F(a) = log Gamma(a) - a log a + a: ten steps of F(a) = (a + 1) log((a + 1)/a) - 1 + F(a + 1), which are
  gaps of the third kind with D = d/(2 A B), then Stirling's series, whose logarithm is of the second kind and whose
  powers are divided differences, J = q d^2 (x y m)^-1 h(1/x, 1/y, 1/m), h complete homogeneous symmetric polynomials.

The real parts are sums of non-negative terms. An imaginary part of third order is one of terms of second order in the
last two kinds: what counts for 1 - rho is the error relative to \|J\|, which is a few eps, near and far.

Everything is real arithmetic on pairs: torch.compile has no kernels for complex numbers, and torch's complex logarithm
does not keep the relative accuracy of either part. Each gap has its partial derivatives, s (F'(x) - F'(m)) by x and
(1 - s) (F'(y) - F'(m)) by y, as such differences too; autograd through either is right for the next derivative.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..._elementwise import horner
from ...special import expm1_value, log1pmx, log1pmx_value
from .spectral_terms import atanh_minus_x, ratio_log, x_minus_atan

__all__ = ["STEPS", "Complex", "Ratio", "lgamma_gap", "lgamma_partials", "log1p", "log_gap", "log_partials", "plus"]
__all__ += ["rate_gap", "rate_partials", "ratio_gap", "ratio_partials"]

# B_2k/(2k (2k - 1)), k = 1 ... 7: with them and as many steps, what is left out is 8e-18 of the gap.
STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156)
STEPS = 10
# Below FAR, t = atanh T comes from T (1/(1 - T^2) <= 6 amplifies its rounding); above it from the ratio itself.
FAR = 0.9
# A logarithm of 1 + x is taken from x down to here, and below from a ratio that is known to its own accuracy.
LOW = -0.5
# The square of the largest |z| for which log(1 + z) is taken from z.
NEAR_SQUARE = 0.25
# (x - sin x)/x^3 and (sinh x - x)/x^3 in z = -x^2 and x^2: Taylor series, of which 1e-18 is left out at 1.5. Lowest
# order last.
CUBIC_REACH = 1.5
CUBIC = tuple(1 / math.factorial(2 * k + 3) for k in range(9, -1, -1))


class Complex(NamedTuple):
    """Real and imaginary part."""

    real: Tensor
    imag: Tensor


def plus(*terms: Complex) -> Complex:
    """The sum."""
    real, imag = terms[0]
    for term in terms[1:]:
        real, imag = real + term.real, imag + term.imag
    return Complex(real, imag)


def _times(a: Complex, b: Complex) -> Complex:
    return Complex(a.real * b.real - a.imag * b.imag, a.real * b.imag + a.imag * b.real)


def _scaled(factor: Tensor, a: Complex) -> Complex:
    return Complex(factor * a.real, factor * a.imag)


def _weighted(omega: Tensor, a: Complex, sign: float = 1.0) -> Complex:
    """``s a`` or, with a sign of -1, ``(1 - s) a``."""
    turn = sign * omega
    return Complex(0.5 * a.real - turn * a.imag, 0.5 * a.imag + turn * a.real)


def _minus_log1pmx(x: Tensor) -> Tensor:
    # torch.compile can't trace one autograd function within another's backward
    return -(log1pmx_value if torch.compiler.is_compiling() else log1pmx)(x)


def log1p(z: Complex, far: Complex) -> tuple[Complex, Complex]:
    """log(1 + z) and L(z) = z - log(1 + z), both accurate relative to their moduli.

    Args:
        z: any numbers but -1.
        far: log(1 + z) where the modulus of z is above 1/2, from what has not been rounded to -1 there.
    """
    size = z.real * z.real + z.imag * z.imag
    near = size < NEAR_SQUARE
    x, y = torch.where(near, z.real, 0.0), torch.where(near, z.imag, 0.0)
    square = torch.where(near, size, 0.0)
    w, t = 2 * x + square, y / (1 + x)
    rest = Complex(0.5 * (_minus_log1pmx(w) - square), x_minus_atan(t) + x * t)
    log = (torch.where(near, n, f) for n, f in zip((0.5 * torch.log1p(w), torch.atan(t)), far, strict=True))
    # beyond, the two differ by a fifth of z at least
    gap = (torch.where(near, r, v - f) for r, v, f in zip(rest, z, far, strict=True))
    return Complex(*log), Complex(*gap)


# ---- exp --------------------------------------------------------------------------------------------------------


def _cubic(x: Tensor, sign: float) -> Tensor:
    z = x * x
    return x * z * horner(sign * z, CUBIC)


def _x_minus_sin(x: Tensor) -> Tensor:
    near = x.abs() < CUBIC_REACH
    return torch.where(near, _cubic(torch.where(near, x, 0.0), -1.0), x - torch.sin(x))


def rate_gap(x: Tensor, y: Tensor, ratio: Tensor, omega: Tensor) -> Complex:
    """J for F = exp at log x and log y: of two Poisson distributions with rates x and y, which may be 0.

    Args:
        x: not negative.
        y: not negative.
        ratio: log(x/y) to its own relative accuracy; 0 where x or y is.
        omega: the nodes; all four broadcast.
    """
    both = (x > 0) & (y > 0)
    root_x, root_y = (torch.where(v > 0, torch.where(v > 0, v, 1.0).sqrt(), 0.0) for v in (x, y))
    total = root_x + root_y
    gap = (x - y) / torch.where(total > 0, total, 1.0)
    g = root_x * root_y
    turn, half = omega * ratio, torch.sin(0.5 * omega * ratio)
    near = both & (ratio.abs() < 2)
    cubic = 2 * _cubic(0.5 * torch.where(near, ratio, 0.0), 1.0)
    imag = torch.where(near, g * (_x_minus_sin(turn) + omega * cubic), omega * (x - y) - g * torch.sin(turn))
    return Complex(0.5 * gap * gap + 2 * g * half * half, imag)


def _phase_expm1(change: Tensor, turn: Tensor) -> Complex:
    """exp(change + i turn) - 1."""
    half = torch.sin(0.5 * turn)
    return Complex(expm1_value(change) * torch.cos(turn) - 2 * half * half, torch.exp(change) * torch.sin(turn))


def rate_partials(x: Tensor, y: Tensor, ratio: Tensor, omega: Tensor) -> tuple[Complex, Complex]:
    """By x and y: s (1 - (y/x)^(1-s)), and its mirror image; 0 by what is 0, where 0 log 0 counts as constant."""
    both, turn = (x > 0) & (y > 0), omega * ratio
    results = []
    for sign, value in ((1.0, x), (-1.0, y)):
        inner = _phase_expm1(-0.5 * sign * ratio, turn)
        finite = _weighted(omega, Complex(-inner.real, -inner.imag), sign)
        alone = torch.where(value > 0, 0.5, 0.0)
        parts = zip(finite, (alone, 2 * sign * omega * alone), strict=True)
        results.append(Complex(*(torch.where(both, part, limit) for part, limit in parts)))
    return results[0], results[1]


# ---- -log -------------------------------------------------------------------------------------------------------


def log_gap(x: Tensor, y: Tensor, d: Tensor, omega: Tensor) -> Complex:
    """J for F = -log at x and y, d = x - y: of two exponential distributions with these rates."""
    tanh = d / (x + y)
    u = 2 * omega * tanh
    far = tanh.abs() > FAR
    safe = torch.where(far, 0.0, tanh)
    t = torch.where(far, 0.5 * ratio_log(torch.where(far, x, 1.0), torch.where(far, y, 1.0)), 0.0)
    size = torch.where(t < 0, -t, t)
    beyond = size + torch.log1p(torch.exp(-2 * size)) - math.log(2)
    log_cosh = torch.where(far, beyond, -0.5 * torch.log1p(-safe * safe))
    excess = torch.where(far, t - tanh, atanh_minus_x(safe))
    return Complex(log_cosh + 0.5 * torch.log1p(u * u), -(x_minus_atan(u) + 2 * omega * excess))


def log_partials(x: Tensor, y: Tensor, d: Tensor, omega: Tensor) -> tuple[Complex, Complex]:
    """By x and y: q d/(m x) and -q d/(m y)."""
    tanh = d / (x + y)
    u = 2 * omega * tanh
    size = (0.5 + 2 * omega * omega) * tanh / (1 + u * u)
    return Complex(size / x, -u * size / x), Complex(-size / y, u * size / y)


# ---- a log(a/b) -------------------------------------------------------------------------------------------------


class Ratio(NamedTuple):
    """Two points (a, b), positive, and ``gap``: D of the module's head to its own relative accuracy."""

    a_x: Tensor
    b_x: Tensor
    a_y: Tensor
    b_y: Tensor
    gap: Tensor


def _ratio_logs(r: Ratio) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """log(1 + e) and a L(e) for e = D A/a_x and -D A/a_y, where 1 + e = (b/B)(A/a)."""
    mean_a, mean_b = 0.5 * (r.a_x + r.a_y), 0.5 * (r.b_x + r.b_y)
    results = []
    for a, b, gap in ((r.a_x, r.b_x, r.gap), (r.a_y, r.b_y, -r.gap)):
        move = gap * mean_a
        e = move / a
        near = e > LOW
        e_near = torch.where(near, e, 0.0)
        far = ratio_log(torch.where(near, 1.0, b), torch.where(near, 1.0, mean_b))
        far = far - ratio_log(torch.where(near, 1.0, a), torch.where(near, 1.0, mean_a))
        log = torch.where(near, torch.log1p(e_near), far)
        results.append((log, torch.where(near, a * _minus_log1pmx(e_near), move - a * far)))
    return results[0], results[1]


def _ratio_inner(r: Ratio, omega: Tensor) -> tuple[Tensor, Tensor, Complex, Complex]:
    """u, v, and log(1 + z) and L(z) of the mixture."""
    u = 2 * omega * ((r.a_x - r.a_y) / (r.a_x + r.a_y))
    v = 2 * omega * ((r.b_x - r.b_y) / (r.b_x + r.b_y))
    y = 2 * omega * r.gap / (1 + u * u)
    far = Complex(0.5 * (torch.log1p(v * v) - torch.log1p(u * u)), torch.atan(v) - torch.atan(u))
    return u, v, *log1p(Complex(y * u, y), far)


def ratio_gap(r: Ratio, omega: Tensor) -> Complex:
    """J for F(a, b) = a log(a/b)."""
    (_, one), (_, two) = _ratio_logs(r)
    u, _, _, inner = _ratio_inner(r, omega)
    mean = 0.5 * (r.a_x + r.a_y)
    real = 0.5 * (one + two) - mean * (inner.real - u * inner.imag)
    return Complex(real, omega * (one - two) - mean * (inner.imag + u * inner.real))


def ratio_partials(r: Ratio, omega: Tensor) -> tuple[Complex, Complex, Complex, Complex]:
    """By a_x, b_x, a_y, b_y: s log((a_x/b_x)/(m/n)), s (m/n - a_x/b_x), n the mixture of the b; and their mirrors."""
    (log_x, _), (log_y, _) = _ratio_logs(r)
    _, v, log, _ = _ratio_inner(r, omega)
    by_a = (_weighted(omega, Complex(log.real - own, log.imag), sign) for own, sign in ((log_x, 1.0), (log_y, -1.0)))
    a_x, a_y = by_a
    size = (0.25 + omega * omega) * r.gap * (r.a_x + r.a_y) / (1 + v * v)
    return a_x, Complex(size / r.b_x, -v * size / r.b_x), a_y, Complex(-size / r.b_y, v * size / r.b_y)


# ---- lgamma -----------------------------------------------------------------------------------------------------


def _steps(x: Tensor, y: Tensor, d: Tensor, omega: Tensor) -> tuple[Ratio, Tensor]:
    """The points of all steps, with a dimension for them before the nodes', and the nodes."""
    i = torch.arange(STEPS, dtype=x.dtype, device=x.device).unsqueeze(-1)
    x, y, d, omega = (v.unsqueeze(-2) for v in (x, y, d, omega))
    low, high = x + y + 2 * i, x + y + 2 * (i + 1)
    return Ratio(x + (i + 1), x + i, y + (i + 1), y + i, 2 * d / low / high), omega


def _inverse_mixture(x: Tensor, y: Tensor, d: Tensor, omega: Tensor) -> Complex:
    mean, up = 0.5 * (x + y), omega * d
    size = mean * mean + up * up
    return Complex(mean / size, -up / size)


def lgamma_gap(x: Tensor, y: Tensor, d: Tensor, omega: Tensor) -> Complex:
    """J for F(a) = lgamma(a) - a log a + a, with d = x - y to its own relative accuracy."""
    parts = ratio_gap(*_steps(x, y, d, omega))
    x, y = x + STEPS, y + STEPS
    half = log_gap(x, y, d, omega)
    # sum of c_k h_(2k-2)(1/x, 1/y, 1/m), by the recurrence of the polynomials of one, two and three variables
    u, v, w = 1 / x, 1 / y, _inverse_mixture(x, y, d, omega)
    one = two = torch.ones_like(u)
    three = Complex(torch.ones_like(w.real), torch.zeros_like(w.imag))
    total = _scaled(STIRLING[0] * one, three)
    for degree in range(1, 2 * len(STIRLING) - 1):
        one = one * u
        two = one + v * two
        three = _times(w, three)
        three = Complex(two + three.real, three.imag)
        if degree % 2 == 0:
            total = plus(total, Complex(*(STIRLING[degree // 2] * part for part in three)))
    series = _scaled((0.25 + omega * omega) * (d * u) * (d * v), _times(w, total))
    return plus(Complex(*(part.sum(-2) for part in parts)), Complex(0.5 * half.real, 0.5 * half.imag), series)


def lgamma_partials(x: Tensor, y: Tensor, d: Tensor, omega: Tensor) -> tuple[Complex, Complex]:
    """By x and y.

    Those of a step by a and by b nearly cancel for large arguments, where what is left of all steps is of the order of
    1/x times the logarithm's: their rounding errors are a few eps of that.
    """
    by_a, by_b, by_c, by_d = (
        Complex(*(part.sum(-2) for part in partial)) for partial in ratio_partials(*_steps(x, y, d, omega))
    )
    by_x, by_y = plus(by_a, by_b), plus(by_c, by_d)
    x, y = x + STEPS, y + STEPS
    w = _inverse_mixture(x, y, d, omega)
    factor = (0.25 + omega * omega) * d
    results = []
    for value, sign, before in ((x, 1.0, by_x), (y, -1.0, by_y)):
        # c_k a^(1-2k) has the derivative -(2k-1) c_k a^(-2k), differences of which are h_(2k-1)(1/x, 1/m)
        u = 1 / value
        one = torch.ones_like(u)
        two = Complex(torch.ones_like(w.real), torch.zeros_like(w.imag))
        total = _scaled(torch.full_like(u, 0.5), two)  # the logarithm's
        for degree in range(1, 2 * len(STIRLING)):
            one = one * u
            two = _times(w, two)
            two = Complex(one + two.real, two.imag)
            if degree % 2:
                total = plus(total, Complex(*(degree * STIRLING[degree // 2] * part for part in two)))
        results.append(plus(before, _scaled(sign * factor * u, _times(w, total))))
    return results[0], results[1]
