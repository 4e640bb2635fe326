"""Student's t."""

from __future__ import annotations

from typing import ClassVar

from .context import Number, mp
from .family import ONE, POSITIVE, REAL, Family, Statistic, Support

__all__ = ["StudentT"]


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


def _mean_log(m: Number, s: Number, df: Number) -> Number:
    """E log((T - m)^2 + s^2), the density of T being proportional to (1 + t^2)^(-(df + 1)/2).

    The trapezoidal rule in the variable asinh(t/a) + asinh((t - m)/s), in which no singularity is nearer than pi/2,
    with tails that are exponential of it: its error is e^(-pi^2/step).
    """
    a = mp.sqrt(6 / (df + 6))
    digits = mp.prec * mp.log(2)
    step = mp.pi**2 / (digits + 10)
    last = mp.asinh(abs(m) / min(a, s)) + abs(mp.log(s / a)) + 4
    power = 2 * digits / df
    far = power / 2 + mp.log(-mp.expm1(-power)) / 2 + mp.log(2)
    end = 2 * (far + abs(mp.log(a))) + abs(mp.log(s)) + 2 * mp.log(1 + abs(m))
    end = min(end, last + 2 * mp.log(1 + end)) + 2
    total = weight = mp.mpf(0)
    for j in range(-int(end / step), int(end / step) + 1):
        t = j * step
        rise, fall = mp.exp((t - last) / 2), mp.exp(-(t + last) / 2)
        e = mp.exp((t + rise - fall) / 2)
        # (x - 0)/a = (w - 1/w)/2, (x - m)/s = (e^2/w - w/e^2)/2, w = e o
        high, low = a * e + s / e, a / e + s * e
        root = mp.sqrt(m * m + high * low)
        o = low / (root - m) if m < 0 else (m + root) / high
        w, v = e * o, e / o
        x, other = a * (w - 1 / w) / 2, s * (v - 1 / v) / 2
        jacobian = (1 + (rise + fall) / 2) / (2 / (a * (w + 1 / w)) + 2 / (s * (v + 1 / v)))
        p = mp.exp(-(df + 1) / 2 * mp.log1p(x * x)) * jacobian
        weight += p
        total += p * mp.log(other * other + s * s)
    return total / weight
