"""E|X - mu| by quadrature of the definition, where the incomplete gamma and beta functions do not converge."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .context import Number, mp

__all__ = ["tail_moment"]


def tail_moment(
    log_density: Callable[[Number], Number], at: Callable[[Number], Number] | None, start: Number, up: bool
) -> Number:
    """E[|X - at(start)|] over the x beyond ``at(start)``, or the probability of these x.

    Args:
        log_density: the logarithm of the density on an axis on which it is log-concave and falls from ``start`` on.
        at: from that axis to x, rising; None for the probability.
        start: a point of the axis.
        up: whether beyond is above.
    """
    direction, top = (1 if up else -1), log_density(start)
    mu = at(start) if at else None

    def integrand(t: Number) -> Number:
        y = start + direction * t
        density = mp.exp(log_density(y) - top)
        return abs(at(y) - mu) * density if at else density

    edges = [mp.mpf(0), *_edges(lambda t: top - log_density(start + direction * t), mp.prec)]
    return mp.exp(top) * mp.quad(integrand, edges, method="gauss-legendre", maxdegree=7)


def _edges(fall: Callable[[Number], Number], bits: int) -> Iterator[Number]:
    """Distances at which the logarithm has fallen by 1, 2, 4, ... and, before these, halves down to 1/8."""
    levels = [mp.mpf(1)]
    while levels[-1] < bits:
        levels.append(2 * levels[-1])
    found, step = [], mp.mpf(1)
    for level in levels:
        while fall(step) < level:
            step *= 2
        low, high = mp.mpf(0), step
        while low == 0 or high > low * mp.mpf(1.05):
            middle = mp.sqrt(low * high) if low else high / 1024
            low, high = (low, middle) if fall(middle) >= level else (middle, high)
        found.append(high)
    first = found[0]
    # smallest first
    small = []
    while first > mp.mpf(1) / 8:
        first /= 2
        small.append(first)
    yield from reversed(small)
    yield from found
