"""Student's t."""

from __future__ import annotations

from typing import ClassVar

from .context import Number, agreed, mp
from .family import ONE, POSITIVE, REAL, Family, Statistic, Support
from .integral import Density, Node, gradient_at, nodes
from .room import room

__all__ = ["StudentT", "kl_gradient", "kl_gradient_at"]


class StudentT(Family):
    """Density proportional to (1 + z^2/df)^(-(df + 1)/2), z = (x - loc)/scale."""

    parameters: ClassVar = {"df": POSITIVE, "loc": REAL, "scale": POSITIVE}

    def support(self, df: Number, loc: Number, scale: Number) -> Support:
        """The whole line."""
        return Support(-mp.inf, mp.inf)

    def terms(self, df: Number, loc: Number, scale: Number) -> dict[Statistic, Number]:
        """A constant, and the logarithm of (x - loc)^2 + df scale^2."""
        with mp.extraprec(abs(int(mp.mag(df))) + 20):
            root = mp.sqrt(df) * scale
            one = mp.loggamma((df + 1) / 2) - mp.loggamma(df / 2) - mp.log(mp.pi) / 2 + df * mp.log(root)
        return {ONE: one, Statistic("log quadratic", (loc, root)): -(df + 1) / 2}

    def expectation(self, statistic: Statistic, df: Number, loc: Number, scale: Number) -> Number:
        """Of log((x - m)^2 + s^2), by an integral where m, s are not those of the density itself."""
        kind, a = statistic
        if kind != "log quadratic":
            raise self.unknown(statistic)
        with mp.extraprec(abs(int(mp.mag(df))) + 20):
            root = mp.sqrt(df) * scale
            if a == (loc, root):
                return mp.psi(0, (df + 1) / 2) - mp.psi(0, df / 2) + 2 * mp.log(root)
            return 2 * mp.log(root) + _mean_log((a[0] - loc) / root, a[1] / root, df)


def _ends(m: Number, s: Number, a: Number, df: Number) -> tuple[Number, Number]:
    """Where (1 + x^2)^(-(df + 1)/2) is nothing, for `nodes`, and where they are to be stretched.

    Args:
        m: the other centre.
        s: the width there.
        a: the width at 0.
        df: degrees of freedom.
    """
    last = mp.asinh(abs(m) / min(a, s)) + abs(mp.log(s / a)) + 4
    power = 2 * mp.prec * mp.log(2) / df
    far = power / 2 + mp.log(-mp.expm1(-power)) / 2 + mp.log(2)
    end = 2 * (far + abs(mp.log(a))) + abs(mp.log(s)) + 2 * mp.log(1 + abs(m))
    return min(end, last + 2 * mp.log(1 + end)) + 2, last


def _mean_log(m: Number, s: Number, df: Number) -> Number:
    """E log((T - m)^2 + s^2), the density of T being proportional to (1 + t^2)^(-(df + 1)/2)."""
    a = mp.sqrt(6 / (df + 6))
    total = weight = mp.mpf(0)
    for x, other, dx in nodes(m, a, s, *_ends(m, s, a, df)):
        p = mp.exp(-(df + 1) / 2 * mp.log1p(x * x)) * dx
        weight += p
        total += p * mp.log(other * other + s * s)
    return total / weight


def _density(df: Number, scale: Number, second: bool) -> Density:
    def at(node: Node) -> tuple[Number, tuple[Number, ...]]:
        t = (node.two if second else node.one) / scale
        y = t * t / df
        log = mp.log1p(y)
        by_scale = (df + 1) * y / (1 + y) / scale
        return -(df + 1) / 2 * log, ((by_scale * scale / df - log) / 2, (df + 1) * t / df / (1 + y) / scale, by_scale)

    return at


def kl_gradient_at(
    df_p: Number, loc_p: Number, scale_p: Number, df_q: Number, loc_q: Number, scale_q: Number
) -> list[list[Number]]:
    """The derivatives of the divergence by all six parameters, at the current precision."""
    theta = (df_p, loc_p, scale_p), (df_q, loc_q, scale_q)
    with mp.workprec(mp.prec + room(*theta, power=1)):
        widths = [scale * mp.sqrt(6 * df / (df + 6)) for df, _, scale in theta]
        # in units of the root of df, from either centre
        ends = []
        for (df, _, scale), own, other, shift in zip(
            theta, widths, reversed(widths), (loc_q - loc_p, loc_p - loc_q), strict=True
        ):
            root = mp.sqrt(df) * scale
            ends.append(_ends(shift / root, other / root, own / root, df))
        # an end is that of a sum of two asinh, the same from both
        end = max(end for end, _ in ends)
        last = max(last for _, last in ends)
        points = nodes(loc_q - loc_p, widths[0], widths[1], end, last)
        return gradient_at(points, _density(df_p, scale_p, False), _density(df_q, scale_q, True))


def kl_gradient(*theta: Number) -> list[list[Number]]:
    """The same at two precisions that agree."""
    if theta[:3] == theta[3:]:
        return [[mp.mpf(0)] for _ in theta]
    # those by loc of equal ones are 0 by symmetry, which no precision shows
    known = (1, 4) if theta[1] == theta[4] else ()
    found = iter(agreed(lambda: [x for i, x in enumerate(kl_gradient_at(*theta)) if i not in known]))
    return [[mp.mpf(0)] if i in known else next(found) for i in range(len(theta))]
