"""Fisher and Snedecor's F, by sums on the axis of log x (see `integral`)."""

from __future__ import annotations

from collections.abc import Iterator

from .context import Number, agreed, mp
from .integral import Density, Node, divergence_at, gradient_at, nodes
from .room import room

__all__ = ["kl", "kl_at", "kl_gradient_at", "log_density_at"]


def log_density_at(x: Number, df1: Number, df2: Number) -> Number:
    """The log-density at a positive number, at the current precision."""
    a, b = df1 / 2, df2 / 2
    with mp.workprec(mp.prec + room(df1, df2, x, power=1)):
        log_beta = mp.loggamma(a) + mp.loggamma(b) - mp.loggamma(a + b)
        return a * mp.log(a / b) + (a - 1) * mp.log(x) - (a + b) * mp.log1p(a / b * x) - log_beta


def _centre(a: Number, b: Number) -> Number:
    """Where log x has its mass; for small a and b an edge of it."""
    return mp.log1p(1 / a) - mp.log1p(1 / b)


def _density(a: Number, b: Number, second: bool) -> Density:
    """Of log x: e^(a z)/(1 + e^z)^(a + b), z = log(x a/b)."""
    offset = _centre(a, b) + mp.log(a / b)

    def at(node: Node) -> tuple[Number, tuple[Number, ...]]:
        z = offset + (node.two if second else node.one)
        e = mp.exp(-abs(z))
        small = mp.log1p(e)
        left, right = (small, z + small) if z > 0 else (small - z, small)  # log(1 + e^-z), log(1 + e^z)
        slope = (a * e - b if z > 0 else a - b * e) / (1 + e)
        return -a * left - b * right, ((slope / a - left) / 2, -(slope / b + right) / 2)

    return at


def _compared(p: tuple[Number, Number], q: tuple[Number, Number]) -> tuple[Iterator[Node], Density, Density]:
    (a, b), (c, d) = p, q
    widths = [3 * mp.sqrt((x + y) / (x + y + x * y)) / 2 for x, y in (p, q)]
    shift = _centre(c, d) - _centre(a, b)
    reach = abs(shift) + mp.prec * (1 / min(a, b, c, d) + sum(widths))
    end = sum(mp.asinh(reach / w) for w in widths) + 1
    return nodes(shift, widths[0], widths[1], end), _density(a, b, False), _density(c, d, True)


def kl_at(df1_p: Number, df2_p: Number, df1_q: Number, df2_q: Number) -> Number:
    """`kl` at the current precision."""
    with mp.workprec(mp.prec + room(df1_p, df2_p, df1_q, df2_q, power=1)):
        return divergence_at(*_compared((df1_p / 2, df2_p / 2), (df1_q / 2, df2_q / 2)))


def kl_gradient_at(df1_p: Number, df2_p: Number, df1_q: Number, df2_q: Number) -> list[list[Number]]:
    """The derivatives of the divergence by all four parameters, at the current precision."""
    with mp.workprec(mp.prec + room(df1_p, df2_p, df1_q, df2_q, power=1)):
        return gradient_at(*_compared((df1_p / 2, df2_p / 2), (df1_q / 2, df2_q / 2)))


def kl(df1_p: Number, df2_p: Number, df1_q: Number, df2_q: Number) -> Number:
    """KL divergence between two F distributions, given their positive degrees of freedom."""
    if (df1_p, df2_p) == (df1_q, df2_q):
        return mp.mpf(0)
    return agreed(lambda: kl_at(df1_p, df2_p, df1_q, df2_q))
