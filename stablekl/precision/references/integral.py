"""Two densities on the line whose divergence has no closed form: sums at points that know both, of many digits.

Log-densities come without their constants, and with their derivatives by the parameters: a divergence is then the
mean of their difference and the logarithm of the ratio of two sums, and its derivatives are covariances,

    KL = E_p u + log(Z_q/Z_p),    dKL/dp = Cov_p(u, d log p),    dKL/dq = E_q d log q - E_p d log q.

These are the definitions; what cancels in them costs digits that `agreed` takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from .context import Number, mp

__all__ = ["Density", "Node", "divergence_at", "gradient_at", "nodes"]


class Node(NamedTuple):
    """A point x of the rule: x - m_1, x - m_2, and the weight, the step in x."""

    one: Number
    two: Number
    weight: Number


# The logarithm of a density at a point up to a constant, and its derivatives by the parameters.
Density = Callable[[Node], tuple[Number, tuple[Number, ...]]]


def nodes(shift: Number, a: Number, b: Number, end: Number, last: Number | None = None) -> Iterator[Node]:
    """The trapezoidal rule in asinh((x - m_1)/a) + asinh((x - m_2)/b).

    No singularity at m_1 +- ia, m_2 +- ib is nearer than pi/2 in that variable: the error is e^(-pi^2/step).

    Args:
        shift: m_2 - m_1.
        a: the width at m_1.
        b: the width at m_2.
        end: the largest absolute value of the variable.
        last: where it begins to grow exponentially, for tails that fall like a power of x; None where they don't.
    """
    step = mp.pi**2 / (mp.prec * mp.log(2) + 10)
    count = int(end / step) + 1
    factor = mp.exp(step / 2)
    rise, fall = (mp.exp((sign * count * step - (last or 0)) / 2) for sign in (-1, 1))
    for j in range(-count, count + 1):
        t = j * step
        e, jacobian = (rise, mp.mpf(1)) if last is None else (mp.exp((t + rise - fall) / 2), 1 + (rise + fall) / 2)
        # (x - m_1)/a = (w - 1/w)/2, (x - m_2)/b = (e^2/w - w/e^2)/2, w = e o
        high, low = a * e + b / e, a / e + b * e
        root = mp.sqrt(shift * shift + high * low)
        o = low / (root - shift) if shift < 0 else (shift + root) / high
        w, v = e * o, e / o
        dx = jacobian / (2 / (a * (w + 1 / w)) + 2 / (b * (v + 1 / v)))
        yield Node(a * (w - 1 / w) / 2, b * (v - 1 / v) / 2, step * dx)
        rise, fall = rise * factor, fall / factor


def divergence_at(points: Iterable[Node], p: Density, q: Density) -> Number:
    """The divergence at the current precision."""
    of_p = of_q = mean = mp.mpf(0)
    for node in points:
        log_p, log_q = p(node)[0], q(node)[0]
        mass = mp.exp(log_p) * node.weight
        of_p, of_q, mean = of_p + mass, of_q + mp.exp(log_q) * node.weight, mean + mass * (log_p - log_q)
    return mean / of_p + mp.log(of_q / of_p)


def gradient_at(points: Iterable[Node], p: Density, q: Density) -> list[list[Number]]:
    """Its derivatives by the parameters of p, then of q, each in a list of its own, at the current precision."""
    of_p = of_q = mean = mp.mpf(0)
    sums: list[list[Number]] = []  # of each parameter: u T, T under p, or 0, T under q, under p
    for node in points:
        log_p, slopes_p = p(node)
        log_q, slopes_q = q(node)
        u = log_p - log_q
        mass, other = mp.exp(log_p) * node.weight, mp.exp(log_q) * node.weight
        of_p, of_q, mean = of_p + mass, of_q + other, mean + mass * u
        sums = sums or [[mp.mpf(0), mp.mpf(0)] for _ in (*slopes_p, *slopes_q)]
        for total, slope in zip(sums, slopes_p, strict=False):
            total[0] += mass * u * slope
            total[1] += mass * slope
        for total, slope in zip(sums[len(slopes_p) :], slopes_q, strict=True):
            total[0] += other * slope
            total[1] += mass * slope
        split = len(slopes_p)
    by_p = [(a - mean / of_p * b) / of_p for a, b in sums[:split]]
    return [[x] for x in (*by_p, *(a / of_q - b / of_p for a, b in sums[split:]))]
