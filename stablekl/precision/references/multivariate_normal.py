"""Gaussians in many dimensions, by any of torch's parameters or stablekl's.

==================  =======================================  ===========================
kind                value                                    covariance S
==================  =======================================  ===========================
scale_tril          L; the upper triangle is not read        L L'
covariance_matrix   S; of any matrix, the symmetric part     S
precision_matrix    P; of any matrix, the symmetric part     P^-1
scale_diag          s, a vector                              diag(s)^2
low_rank            (W, d), a D x r matrix and a vector      W W' + diag(d), formed in full
==================  =======================================  ===========================

The KL divergence is the definition: E_p[-log q] + E_p[log p], half of which is a trace and a quadratic form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .context import Number, agreed, mp

__all__ = [
    "Factor",
    "Gaussian",
    "NotPositiveDefiniteError",
    "condition",
    "covariance",
    "factor",
    "gradients",
    "gradients_at",
    "kl",
    "kl_at",
    "log_density",
    "log_density_at",
    "settled",
]

Vector = list[Number]
Matrix = list[list[Number]]
# Bits: a matrix of floats loses its condition number, and what p - q cancels comes on top.
_LADDER = (320, 480, 720, 1080, 1620, 2430, 3640, 5460)


class Gaussian(NamedTuple):
    """A mean, the kind of parameter that the covariance comes from, and its value: numbers of `context.exact`."""

    loc: Vector
    kind: str
    value: Any


class NotPositiveDefiniteError(ArithmeticError):
    """A pivot of a Cholesky decomposition is not positive, at the current precision at least."""


def settled(f: Callable[[], Any], ladder: tuple[int, ...] = _LADDER) -> Any:
    """`agreed`, leaving out the precisions at which a matrix is not positive definite.

    Raises:
        NotPositiveDefiniteError: it is not so at the last two precisions.
        PrecisionError: as in `agreed`.
    """
    try:
        return agreed(f, ladder)
    except NotPositiveDefiniteError:
        if len(ladder) < 3:
            raise
    return settled(f, ladder[1:])


# --- linear algebra ---------------------------------------------------------------------------------------


def _dot(a: Sequence[Number], b: Sequence[Number]) -> Number:
    return mp.fdot(zip(a, b, strict=True))


def _transpose(a: Matrix) -> Matrix:
    return [list(column) for column in zip(*a, strict=True)]


def _product(a: Matrix, b: Matrix) -> Matrix:
    columns = _transpose(b)
    return [[_dot(row, column) for column in columns] for row in a]


def _cholesky(a: Matrix) -> Matrix:
    n = len(a)
    lower = [[mp.mpf(0)] * n for _ in range(n)]
    for i in range(n):
        for j in range(i):
            lower[i][j] = (a[i][j] - _dot(lower[i][:j], lower[j][:j])) / lower[j][j]
        pivot = a[i][i] - _dot(lower[i][:i], lower[i][:i])
        if not pivot > 0:
            raise NotPositiveDefiniteError(f"pivot {i} is {mp.nstr(pivot, 5)} at {mp.prec} bits")
        lower[i][i] = mp.sqrt(pivot)
    return lower


def _inverse_of_lower(lower: Matrix) -> Matrix:
    n = len(lower)
    columns = [[mp.mpf(0)] * n for _ in range(n)]
    for j, column in enumerate(columns):
        for i in range(j, n):
            column[i] = ((1 if i == j else 0) - _dot(lower[i][j:i], column[j:i])) / lower[i][i]
    return _transpose(columns)


def _symmetric(a: Matrix) -> Matrix:
    return [
        [(x + y) / 2 for x, y in zip(row, column, strict=True)] for row, column in zip(a, _transpose(a), strict=True)
    ]


class Factor:
    """A triangular A with S = A A', and its inverse B, for which S^-1 = B' B."""

    def __init__(self, root: Matrix, whitening: Matrix):
        self.root, self.whitening, self.size = root, whitening, len(root)

    def half_log_det(self) -> Number:
        """log|S|/2."""
        return mp.fsum(mp.log(self.root[i][i]) for i in range(self.size))

    def whitened(self, x: Vector) -> Vector:
        """B x, the squared length of which is x' S^-1 x."""
        return [_dot(row, x) for row in self.whitening]

    def quotient(self, other: Factor) -> Matrix:
        """B times the root of another: M, for which B S' B' = M M'."""
        return _product(self.whitening, other.root)

    def trace_of_quotient(self, other: Factor) -> Number:
        """tr(S^-1 S') for the S' of another."""
        entries = [x for row in self.quotient(other) for x in row]
        return _dot(entries, entries)

    def covariance(self) -> Matrix:
        """S."""
        return _product(self.root, _transpose(self.root))

    def precision(self) -> Matrix:
        """S^-1."""
        return _product(_transpose(self.whitening), self.whitening)


def covariance(kind: str, value: Any) -> Matrix:
    """The covariance at the current precision."""
    if kind == "low_rank":
        w, d = value
        n = len(d)
        return [[_dot(w[i], w[j]) + (d[i] if i == j else 0) for j in range(n)] for i in range(n)]
    return _symmetric(value) if kind == "covariance_matrix" else factor(kind, value).covariance()


def factor(kind: str, value: Any) -> Factor:
    """A factor of the covariance that a parameter stands for, at the current precision."""
    if kind == "scale_diag":
        n = len(value)
        return Factor(
            [[value[i] if i == j else mp.mpf(0) for j in range(n)] for i in range(n)],
            [[1 / value[i] if i == j else mp.mpf(0) for j in range(n)] for i in range(n)],
        )
    if kind == "precision_matrix":  # P = C C', B = C', A = C'^-1
        root = _cholesky(_symmetric(value))
        return Factor(_transpose(_inverse_of_lower(root)), _transpose(root))
    if kind == "scale_tril":
        lower = [[x if j <= i else mp.mpf(0) for j, x in enumerate(row)] for i, row in enumerate(value)]
    elif kind in ("covariance_matrix", "low_rank"):
        lower = _cholesky(covariance(kind, value))
    else:
        raise ValueError(f"no parameter of a Gaussian is called {kind!r}")
    return Factor(lower, _inverse_of_lower(lower))


def condition(kind: str, value: Any) -> float:
    """The condition number that a parameter of a Gaussian has, for the unit of error eps max(1, kappa), as a float.

    Args:
        kind: a name of the module's table.
        value: nested lists of numbers.

    Returns:
        cond(L) for a Cholesky factor, the largest ratio of two scales, cond(S) or cond(P) for all others: squares of
        cond(L), which float64 knows up to 1e15. The matrix S itself would be known up to 1e15 only.
    """
    if kind == "scale_diag":
        sizes = np.abs(np.array(value, dtype=float))
        return float(sizes.max() / sizes.min())
    if kind == "scale_tril":
        return float(np.linalg.cond(np.tril(np.array(value, dtype=float))))
    extra = 0
    if kind == "low_rank":  # a pivot is at least the smallest d, in the presence of the largest variance
        w, d = value
        ratio = max(_dot(row, row) + x for row, x in zip(w, d, strict=True)) / min(d)
        extra = max(0, int(mp.ceil(mp.log(ratio, 2)))) if 0 < ratio < mp.inf else 0
    for bits in _LADDER:
        with mp.workprec(bits + extra):
            try:
                lower = factor(kind, value)
            except NotPositiveDefiniteError:
                continue
            root = lower.whitening if kind == "precision_matrix" else lower.root
            return float(np.linalg.cond(np.array(root, dtype=float))) ** 2
    return float("inf")


# --- values -----------------------------------------------------------------------------------------------


def _difference(x: Vector, y: Vector) -> Vector:
    return [a - b for a, b in zip(x, y, strict=True)]


def kl_at(p: Gaussian, q: Gaussian) -> Number:
    """`kl` at the current precision."""
    root_p, root_q = factor(p.kind, p.value), factor(q.kind, q.value)
    m = root_q.whitened(_difference(p.loc, q.loc))
    form = root_q.trace_of_quotient(root_p) + _dot(m, m)
    return (form - len(m)) / 2 + root_q.half_log_det() - root_p.half_log_det()


def kl(p: Gaussian, q: Gaussian) -> Number:
    """KL divergence between two Gaussians, each by any kind of parameter; 0 for equal parameters."""
    return mp.mpf(0) if p == q else settled(lambda: kl_at(p, q))


def log_density_at(x: Vector, p: Gaussian) -> Number:
    """`log_density` at the current precision."""
    root = factor(p.kind, p.value)
    z = root.whitened(_difference(x, p.loc))
    return -(len(z) * mp.log(2 * mp.pi) + _dot(z, z)) / 2 - root.half_log_det()


def log_density(x: Vector, p: Gaussian) -> Number:
    """The log-density at a point."""
    return settled(lambda: log_density_at(x, p))


# --- derivatives ------------------------------------------------------------------------------------------


def _in_parameter(kind: str, value: Any, g: Matrix, root: Factor) -> Any:
    """The derivative by a parameter from G, the symmetric one by the covariance, for which dKL = <G, dS>."""
    n = root.size
    if kind == "covariance_matrix":
        return g
    if kind == "precision_matrix":  # dS = -S dP S
        s = root.covariance()
        return [[-x for x in row] for row in _product(_product(s, g), s)]
    if kind == "scale_diag":
        return [2 * g[i][i] * value[i] for i in range(n)]
    if kind == "low_rank":
        w = value[0]
        return [[[2 * _dot(row, column) for column in zip(*w, strict=True)] for row in g], [g[i][i] for i in range(n)]]
    lower = _product(g, root.root)
    return [[2 * lower[i][j] for j in range(i + 1)] for i in range(n)]


def gradients_at(p: Gaussian, q: Gaussian) -> list[Any]:
    """`gradients` at the current precision, without what is 0 above the diagonal of a Cholesky factor."""
    root_p, root_q = factor(p.kind, p.value), factor(q.kind, q.value)
    delta = _difference(p.loc, q.loc)
    by_p, by_q = root_p.precision(), root_q.precision()
    by_loc = [_dot(row, delta) for row in by_q]
    sandwich = _product(_product(by_q, root_p.covariance()), by_q)
    n = len(delta)
    g_p = [[(by_q[i][j] - by_p[i][j]) / 2 for j in range(n)] for i in range(n)]
    g_q = [[(by_q[i][j] - sandwich[i][j] - by_loc[i] * by_loc[j]) / 2 for j in range(n)] for i in range(n)]
    return [
        by_loc,
        _in_parameter(p.kind, p.value, g_p, root_p),
        [-x for x in by_loc],
        _in_parameter(q.kind, q.value, g_q, root_q),
    ]


def gradients(p: Gaussian, q: Gaussian) -> list[Any]:
    """Partial derivatives of the KL divergence by the mean and the parameter of p, then of q.

    They come from dKL = <(Q - P)/2, dSp> + <(Q - Q (Sp + delta delta') Q)/2, dSq> + delta' Q (dmu_p - dmu_q), with
    the precisions P and Q of both and delta the difference of the means.

    Args:
        p: one Gaussian.
        q: the other.

    Returns:
        Four nested lists of the parameters' shapes; for low_rank a pair of them. For a symmetric matrix the symmetric
        G with dKL = <G, dA>, which is what autograd through (A + A')/2 gives; for a Cholesky factor 0 above the
        diagonal.
    """
    flat = p.loc == q.loc  # exact zeros, which `agreed` would look for at every precision
    n = len(p.loc)
    if p == q:
        results = [[], _shaped_zeros(p.value), [], _shaped_zeros(p.value)]
    else:
        results = settled(lambda: [[] if flat and i % 2 == 0 else g for i, g in enumerate(gradients_at(p, q))])
        for i, kind in ((1, p.kind), (3, q.kind)):
            if kind == "scale_tril":
                results[i] = [[*row, *[mp.mpf(0)] * (n - len(row))] for row in results[i]]
    zeros = [mp.mpf(0)] * n
    return [x if i % 2 or not flat else list(zeros) for i, x in enumerate(results)]


def _shaped_zeros(item: Any) -> Any:
    return [_shaped_zeros(i) for i in item] if isinstance(item, (list, tuple)) else mp.mpf(0)
