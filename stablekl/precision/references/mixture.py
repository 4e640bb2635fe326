"""Mixtures of Gaussians: the definition on the line, and two components of any dimension against one Gaussian.

A *row* is one component on the line: (weight, mean, standard deviation). Weights need not sum to one. `line` integrates
p log(p/q) panel by panel, on panels that it halves until two Gauss-Legendre rules agree. In many dimensions there is
no such integral; for two components the information that a draw x carries about its component z is one over the
Fourier variable of the log-ratio of their densities:

    I(X; Z) = sqrt(w1 w2)/2 * integral of exp(i t c) (1 - rho(1/2 + i t))/((1/4 + t^2) cosh(pi t)) dt

with c = log(w1/w2) and rho(s) the integral of p1^s p2^(1-s), of which Gaussians have a closed form, and
KL(m || q) = w1 KL(p1 || q) + w2 KL(p2 || q) - I.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import pairwise

import numpy as np

from . import multivariate_normal
from .context import Number, PrecisionError, agreed, mp
from .multivariate_normal import Gaussian

__all__ = [
    "fourier_integral",
    "information",
    "information_at",
    "kl_to_gaussian",
    "line",
    "line_at",
    "line_gradients",
    "line_log_density",
    "line_log_density_at",
    "log_density",
    "log_density_at",
]

Row = Sequence[Number]
Vector = list[Number]
# The last digit of an integral, relative to 1 + |KL|; panels of 24 and of 36 nodes that agree to it.
_TOLERANCE = mp.mpf(10) ** -24
_COARSE, _FINE = 24, 36
_MOST_PANELS = 20_000
# Panels end at these multiples of a standard deviation; mass of 1e-43 is outside.
_STEPS_P = (-14, -11, -8, -6, -4, -2, 0, 2, 4, 6, 8, 11, 14)
_STEPS_Q = (-14, -8, -4, 0, 4, 8, 14)
# And at these multiples of the width on which one component takes over from another.
_STEPS_CROSSING = (-70, -20, -6, 0, 6, 20, 70)


# --- on the line ------------------------------------------------------------------------------------------


@lru_cache
def _gauss_legendre(n: int, bits: int) -> tuple[tuple[Number, Number], ...]:
    """Nodes and weights on [-1, 1], by Newton's method from numpy's."""
    rule = []
    with mp.workprec(bits + 20):
        for start in np.polynomial.legendre.leggauss(n)[0].tolist():
            x, slope = mp.mpf(start), mp.mpf(1)
            for _ in range(bits.bit_length() - 3):  # digits double, and the last round finds the slope
                before, value = mp.mpf(1), x
                for k in range(2, n + 1):
                    before, value = value, ((2 * k - 1) * x * value - (k - 1) * before) / k
                slope = n * (x * value - before) / (x * x - 1)
                x -= value / slope
            rule.append((x, 2 / ((1 - x * x) * slope * slope)))
    return tuple(rule)


class _Line:
    """A mixture on the line, with the log-density at the current precision."""

    def __init__(self, rows: Sequence[Row]):
        kept = [tuple(row) for row in rows if row[0] != 0]
        self.total = mp.fsum(w for w, _, _ in kept)
        self.rows = [(w / self.total, m, s) for w, m, s in kept]
        norm = mp.log(2 * mp.pi) / 2
        # log of the height, mean and 1/s
        self.terms = [(mp.log(w / s) - norm, m, 1 / s) for w, m, s in self.rows]

    def log_density(self, x: Number) -> Number:
        logs = []
        for top, m, inverse in self.terms:
            z = (x - m) * inverse
            logs.append(top - z * z / 2)
        largest = max(logs)
        floor = largest - mp.prec  # 2^-1.4 prec of the sum
        others = mp.fsum(mp.exp(v - largest) for v in logs if v > floor)
        return largest + mp.log(others) if others != 1 else largest

    def edges(self, steps: tuple[int, ...]) -> set[Number]:
        return {m + s * t for _, m, s in self.rows for t in steps}

    def crossings(self) -> set[Number]:
        """Where two components have one density, with the surroundings in which one takes over from the other."""
        found: set[Number] = set()
        for i, (top, m, inverse) in enumerate(self.terms):
            for top_2, m_2, inverse_2 in self.terms[:i]:
                # a x^2 + 2 b x + c = 0 at a crossing, x relative to m
                v, v_2, d = inverse * inverse, inverse_2 * inverse_2, m_2 - m
                a, b, c = v_2 - v, -v_2 * d, v_2 * d * d + 2 * (top - top_2)
                inner = b * b - a * c
                if inner < 0:
                    continue
                root = mp.sqrt(inner)
                far = -(b + root) if b > 0 else root - b
                for x in ([far / a] if a else []) + ([c / far] if far else []):
                    slope = abs(a * x + b)  # of the log-ratio
                    width = 1 / slope if slope else 0
                    found.update(m + x + width * t for t in _STEPS_CROSSING)
        return found


def _spans(p: _Line) -> list[tuple[Number, Number]]:
    """Disjoint intervals that hold all of the mass."""
    merged: list[tuple[Number, Number]] = []
    for low, high in sorted((m + s * _STEPS_P[0], m + s * _STEPS_P[-1]) for _, m, s in p.rows):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged


def _integral(f: Callable[[Number], Number], panels: list[tuple[Number, Number]]) -> Number:
    """The integral of f over all panels, the worst of which is halved until their disagreements sum to nothing."""
    bits = -(-mp.prec // 64) * 64
    coarse, fine = _gauss_legendre(_COARSE, bits), _gauss_legendre(_FINE, bits)

    def examined(low: Number, high: Number) -> tuple[Number, Number, Number, Number]:
        half, middle = (high - low) / 2, (high + low) / 2
        first, second = (half * mp.fsum(w * f(middle + half * x) for x, w in rule) for rule in (coarse, fine))
        return -abs(first - second), low, high, second

    heap = [examined(*panel) for panel in panels]
    heapq.heapify(heap)
    value, error = mp.fsum(h[3] for h in heap), -mp.fsum(h[0] for h in heap)
    count = len(heap)
    while error > _TOLERANCE * (1 + abs(value)):
        count += 1
        if count > _MOST_PANELS:
            raise PrecisionError(f"an integral of {mp.nstr(value, 20)} is not known beyond {mp.nstr(error, 3)}")
        worst, low, high, part = heapq.heappop(heap)
        halves = [examined(low, (low + high) / 2), examined((low + high) / 2, high)]
        for half in halves:
            heapq.heappush(heap, half)
        value += halves[0][3] + halves[1][3] - part
        error += worst - halves[0][0] - halves[1][0]
    return value


def _panels(p: _Line, q: _Line) -> list[tuple[Number, Number]]:
    """Intervals that hold all of p's mass, with ends wherever anything happens."""
    edges = p.edges(_STEPS_P) | p.crossings() | q.edges(_STEPS_Q) | q.crossings()
    panels: list[tuple[Number, Number]] = []
    for low, high in _spans(p):
        panels += pairwise(sorted({low, high, *(x for x in edges if low < x < high)}))
    return panels


def line_at(p_rows: Sequence[Row], q_rows: Sequence[Row]) -> Number:
    """`line` at the current precision."""
    p, q = _Line(p_rows), _Line(q_rows)

    def integrand(x: Number) -> Number:
        log_p = p.log_density(x)
        return mp.exp(log_p) * (log_p - q.log_density(x))

    return _integral(integrand, _panels(p, q))


def _bits(*mixtures: Sequence[Row]) -> int:
    """Bits with which the narrowest component of all still sees 40 digits of a place that it is asked for."""
    rows = [row for rows in mixtures for row in rows if row[0] != 0]
    reach = max(abs(m) + 64 * s for _, m, s in rows) / min(s for _, _, s in rows)
    return 140 + max(0, int(mp.ceil(mp.log(reach, 2))))


def line(p_rows: Sequence[Row], q_rows: Sequence[Row]) -> Number:
    """KL(p || q) of mixtures of Gaussians on the line, a single row being a Gaussian.

    Args:
        p_rows: components (weight, mean, standard deviation), weights nonnegative and not all zero.
        q_rows: the same, of any number.

    Returns:
        The integral of p log(p/q), with an error below 1e-24 (1 + KL).

    Raises:
        PrecisionError: the integral did not settle.
    """
    if [tuple(row) for row in p_rows] == [tuple(row) for row in q_rows]:
        return mp.mpf(0)
    with mp.workprec(_bits(p_rows, q_rows)):
        return line_at(p_rows, q_rows)


def line_gradients(p_rows: Sequence[Row], q_rows: Sequence[Row]) -> list[list[Number]]:
    """Partial derivatives of `line`, for weights that are all positive and need not sum to one.

    With h = log(p/q) they are integrals of dp h, the integral of dp being zero, and of -p dlog q. Those of a mixture m
    are dm/dw = (m_k - m)/sum(w), dm/dloc = w_k m_k (x - loc)/scale^2 and dm/dscale = w_k m_k ((x - loc)^2/scale^2 -
    1)/scale.

    Args:
        p_rows: components (weight, mean, standard deviation).
        q_rows: the same, of any number.

    Returns:
        Derivatives by the weights, means and scales of p, then of q, each with an error below 1e-24 of one plus itself.

    Raises:
        PrecisionError: an integral did not settle.
    """
    with mp.workprec(_bits(p_rows, q_rows)):
        p, q = _Line(p_rows), _Line(q_rows)
        panels = _panels(p, q)

        def by_log_density(side: _Line, k: int, kind: int, x: Number) -> Number:
            """The derivative of log m, times m."""
            w, m, s = side.rows[k]
            top, _, inverse = side.terms[k]
            z = (x - m) * inverse
            weighted = mp.exp(top - z * z / 2)
            if kind == 0:
                return (weighted / w - mp.exp(side.log_density(x))) / side.total
            return weighted * (z if kind == 1 else z * z - 1) / s

        def of_p(x: Number, k: int, kind: int) -> Number:
            return by_log_density(p, k, kind, x) * (p.log_density(x) - q.log_density(x))

        def of_q(x: Number, k: int, kind: int) -> Number:
            log_q = q.log_density(x)
            return -mp.exp(p.log_density(x) - log_q) * by_log_density(q, k, kind, x)

        return [
            [_integral(partial(f, k=k, kind=kind), panels) for k in range(len(side.rows))]
            for f, side in ((of_p, p), (of_q, q))
            for kind in range(3)
        ]


def line_log_density_at(x: Number, rows: Sequence[Row]) -> Number:
    """`line_log_density` at the current precision."""
    return _Line(rows).log_density(x)


def line_log_density(x: Number, rows: Sequence[Row]) -> Number:
    """The log-density of a mixture on the line at a number x."""
    return agreed(lambda: line_log_density_at(x, rows))


# --- in many dimensions -----------------------------------------------------------------------------------


def log_density_at(x: Vector, weights: Vector, components: Sequence[Gaussian]) -> Number:
    """`log_density` at the current precision."""
    logs = [mp.log(w) + multivariate_normal.log_density_at(x, c) for w, c in zip(weights, components, strict=True) if w]
    return mp.log(mp.fsum(mp.exp(v) for v in logs) / mp.fsum(weights))


def log_density(x: Vector, weights: Vector, components: Sequence[Gaussian]) -> Number:
    """The log-density of a mixture of Gaussians at a point."""
    return multivariate_normal.settled(lambda: log_density_at(x, weights, components))


def _relative(first: Gaussian, second: Gaussian) -> list[tuple[Number, Number]]:
    """Variances of the second along axes in which the first is standard, and squares of the difference of the means."""
    root, root_2 = (multivariate_normal.factor(g.kind, g.value) for g in (first, second))
    shift = root.whitened([b - a for a, b in zip(first.loc, second.loc, strict=True)])
    m = root.quotient(root_2)
    size = range(root.size)
    off = any(m[i][j] for i in size for j in size if i != j)
    if not off:
        return [(m[i][i] ** 2, shift[i] ** 2) for i in size]
    gram = mp.matrix([[mp.fdot(zip(a, b, strict=True)) for b in m] for a in m])
    variances, axes = mp.eigsy(gram)
    along = [mp.fdot((axes[i, k], shift[i]) for i in size) for k in size]
    return [(variances[k], along[k] ** 2) for k in size]


def _transform(spectrum: list[tuple[Number, Number, Number]], t: Number) -> tuple[Number, Number]:
    """Real part and phase of log rho(1/2 + i t), from (variance, its logarithm, squared difference) of each axis.

    The logarithm of 1 + s (variance - 1), whose real part is positive for 0 < Re s < 1, is the principal one.
    """
    real = phase = mp.mpf(0)
    outer = mp.mpf(1) / 4 + t * t  # s (1 - s)
    for variance, log, h in spectrum:
        u, v = (1 + variance) / 2, t * (variance - 1)
        square = u * u + v * v
        real += log / 4 - mp.log(square) / 4 - outer * h * u / (2 * square)
        phase += t * log / 2 - mp.atan(v / u) / 2 + outer * h * v / (2 * square)
    return real, phase


def information_at(weights: Vector, components: Sequence[Gaussian]) -> Number:
    """`information`, with the eigenvalues at the current precision and the integral at 200 bits."""
    # p1^s p2^(1-s) is symmetric in the exchange of both and of s and 1 - s: the whitening component is the second
    spectrum = [(v, mp.log(v), h) for v, h in _relative(*components[::-1])]
    total = mp.fsum(weights)
    with mp.workprec(200):
        return fourier_integral([w / total for w in weights], partial(_transform, spectrum))


def fourier_integral(weights: Vector, transform: Callable[[Number], tuple[Number, Number]]) -> Number:
    """The integral of the module's head, from the real part and the phase of log rho(1/2 + i t) at a number t."""
    w, w_2 = weights
    c = mp.log(w / w_2)

    def integrand(t: Number) -> Number:
        real, phase = transform(t)
        # the other half-line has the complex conjugate
        value = mp.cos(t * c) - mp.exp(real) * mp.cos(t * c - phase)
        return value / ((mp.mpf(1) / 4 + t * t) * mp.cosh(mp.pi * t))

    step = mp.mpf(1) / 16
    ends, end = int(mp.ceil(24 / step)), integrand(mp.mpf(0)) / 2  # 1e-33 is left beyond 24
    value = step * (end + mp.fsum(integrand(step * i) for i in range(1, ends + 1)))
    for _ in range(5):
        between = step * mp.fsum(integrand(step * (i + mp.mpf(1) / 2)) for i in range(ends))
        difference, value = abs(value - between), (value + between) / 2
        # either rule is as wrong as they differ; half the step squares that
        if difference < mp.mpf(10) ** -13:
            return mp.sqrt(w * w_2) * value
        step, ends = step / 2, 2 * ends
    raise PrecisionError(f"trapezoid rules differ by {mp.nstr(difference, 3)}")


def information(weights: Vector, components: Sequence[Gaussian]) -> Number:
    """I(X; Z), the information in a draw of a mixture of two Gaussians about which component it came from.

    Args:
        weights: two nonnegative numbers, of any positive sum.
        components: two Gaussians of one dimension.

    Returns:
        The information in nats, with an error below 1e-23.

    Raises:
        PrecisionError: the integral did not settle.
    """
    if components[0] == components[1] or 0 in weights:
        return mp.mpf(0)
    with mp.workprec(640):
        return information_at(weights, components)


def kl_to_gaussian(weights: Vector, components: Sequence[Gaussian], q: Gaussian) -> Number:
    """KL divergence from a mixture of two Gaussians to one Gaussian, with an error below 1e-23 (1 + KL)."""
    with mp.workprec(320):
        total = mp.fsum(weights)
        apart = [w / total * multivariate_normal.kl(c, q) for w, c in zip(weights, components, strict=True) if w]
        return mp.fsum(apart) - information(weights, components)
