"""True KL divergences of Gaussians and their gradients, by mpmath, on the exact values of the inputs.

Written from the definition E_p[log p - log q], evaluated for the two densities as any textbook does, with enough digits
that its cancellation does not matter, at two precisions that must agree. Nothing here uses a formula of stablekl's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mpmath as mp
import torch

__all__ = ["agreed", "diagonal_kl", "exact", "mvn_gradients", "mvn_kl", "normal_gradients", "normal_kl"]

Number = Any  # an mpf, or another number of many digits
Matrix = list[list[Number]]
# Bits; the cancellation is about 2 log2(1/distance) + 2 log2(condition), for normals at any scale.
PRECISIONS, NORMAL_PRECISIONS = (900, 1400), (6500, 7000)


# ---- inputs -------------------------------------------------------------------------------------------------------


def exact(x: torch.Tensor) -> Any:
    """The values of a tensor as nested lists of mpf; every float is exact."""

    def convert(item: Any) -> Any:
        return [convert(i) for i in item] if isinstance(item, list) else mp.mpf(item)

    return convert(x.detach().double().tolist())


def agreed(f: Callable[[], Any], precisions: Sequence[int] = PRECISIONS, noise_bits: int | None = None) -> Any:
    """``f()`` at two precisions, which must agree to 90 bits; what is below the noise, 2^-noise_bits, is 0."""
    results = []
    for bits in precisions:
        with mp.workprec(bits):
            results.append(f())
    noise = mp.mpf(2) ** -(noise_bits or 2 * precisions[0] // 3)
    for a, b in zip(_flat(results[0]), _flat(results[1]), strict=True):
        scale = max(abs(a), abs(b))
        assert scale < noise or abs(a - b) <= scale * mp.mpf(2) ** -90, "raise the precision of the reference"
    return _without_noise(results[1], noise)


def _without_noise(item: Any, noise: Number) -> Any:
    if isinstance(item, list):
        return [_without_noise(i, noise) for i in item]
    return mp.mpf(0) if abs(item) < noise else item


def _flat(item: Any) -> list[Number]:
    return [x for i in item for x in _flat(i)] if isinstance(item, (list, tuple)) else [item]


# ---- univariate ---------------------------------------------------------------------------------------------------


def _normal(mu_p: Number, sigma_p: Number, mu_q: Number, sigma_q: Number) -> Number:
    # E_p[log p] = -log sigma_p - 1/2 and E_p[-log q] = log sigma_q + E_p[(x - mu_q)^2]/(2 sigma_q^2), both without
    # log(2 pi)/2
    second_moment = sigma_p * sigma_p + (mu_p - mu_q) ** 2
    return second_moment / (2 * sigma_q * sigma_q) + mp.log(sigma_q) - mp.log(sigma_p) - mp.mpf(1) / 2


def normal_kl(*parameters: float) -> Number:
    """KL between two normals: mu_p, sigma_p, mu_q, sigma_q."""
    return agreed(lambda: _normal(*(mp.mpf(x) for x in parameters)), NORMAL_PRECISIONS)


def normal_gradients(*parameters: float) -> list[Number]:
    """The four partial derivatives, by central differences of the definition with a relative step of 2^-1000."""

    def partials() -> list[Number]:
        values = [mp.mpf(x) for x in parameters]
        unit = min(values[1], values[3])  # nothing varies faster than on this scale
        h = unit * mp.mpf(2) ** -1000
        results = []
        for i in range(4):
            up, down = list(values), list(values)
            up[i] += h
            down[i] -= h
            results.append((_normal(*up) - _normal(*down)) * unit / (2 * h))
        return results

    # Truncation leaves 2^-2000 and rounding 2^-2600; what lies below 2^-1900 is therefore 0.
    scaled = agreed(partials, (3600, 4000), noise_bits=1900)
    with mp.workprec(200):
        return [x / min(mp.mpf(parameters[1]), mp.mpf(parameters[3])) for x in scaled]


def diagonal_kl(mu_p: Any, sigma_p: Any, mu_q: Any, sigma_q: Any) -> Number:
    """KL between products of normals, from lists of numbers."""
    return agreed(lambda: mp.fsum(_normal(*map(mp.mpf, row)) for row in zip(mu_p, sigma_p, mu_q, sigma_q, strict=True)))


# ---- matrices -----------------------------------------------------------------------------------------------------


def _dot(a: Sequence[Number], b: Sequence[Number]) -> Number:
    return sum((x * y for x, y in zip(a, b, strict=True)), mp.mpf(0))


def _transpose(a: Matrix) -> Matrix:
    return [list(column) for column in zip(*a, strict=True)]


def _product(a: Matrix, b: Matrix) -> Matrix:
    columns = _transpose(b)
    return [[_dot(row, column) for column in columns] for row in a]


def _cholesky(a: Matrix) -> Matrix:
    n = len(a)
    lower = [[mp.mpf(0)] * n for _ in range(n)]
    for i in range(n):
        for j in range(i + 1):
            rest = a[i][j] - _dot(lower[i][:j], lower[j][:j])
            lower[i][j] = mp.sqrt(rest) if i == j else rest / lower[j][j]
    return lower


def _inverse_of_lower(lower: Matrix) -> Matrix:
    n = len(lower)
    inverse = [[mp.mpf(0)] * n for _ in range(n)]
    for j in range(n):
        for i in range(j, n):
            known = _dot(lower[i][j:i], [inverse[k][j] for k in range(j, i)])
            inverse[i][j] = ((1 if i == j else 0) - known) / lower[i][i]
    return inverse


def _factor(kind: str, a: Any) -> tuple[Matrix, Matrix]:
    """Any square root of the covariance, and a square root of the precision: S = A A', P = B' B, A = B^-1."""
    if kind == "scale_diag":
        n = len(a)
        return (
            [[a[i] if i == j else mp.mpf(0) for j in range(n)] for i in range(n)],
            [[1 / a[i] if i == j else mp.mpf(0) for j in range(n)] for i in range(n)],
        )
    if kind == "precision_matrix":
        root = _cholesky(a)  # P = C C', B = C', A = C'^-1
        return _transpose(_inverse_of_lower(root)), _transpose(root)
    lower = a if kind == "scale_tril" else _cholesky(a)
    return lower, _inverse_of_lower(lower)


def _log_det(factor: Matrix) -> Number:
    """Half the log-determinant of the covariance; every factor made above is triangular."""
    return sum((mp.log(factor[i][i]) for i in range(len(factor))), mp.mpf(0))


def _mvn(mu_p: Any, kind_p: str, a_p: Any, mu_q: Any, kind_q: str, a_q: Any) -> Number:
    root_p, _ = _factor(kind_p, a_p)
    root_q, whitening = _factor(kind_q, a_q)
    # E_p[-log q] + E_p[log p] with E_p[(x - mu_q)' Pq (x - mu_q)] = tr(Pq Sp) + delta' Pq delta
    trace = _dot(*[[x for row in _product(whitening, root_p) for x in row]] * 2)
    delta = [x - y for x, y in zip(mu_p, mu_q, strict=True)]
    m = [_dot(row, delta) for row in whitening]
    return (trace + _dot(m, m) - len(delta)) / 2 + _log_det(root_q) - _log_det(root_p)


def mvn_kl(mu_p: Any, kind_p: str, a_p: Any, mu_q: Any, kind_q: str, a_q: Any) -> Number:
    """KL between two multivariate normals, each given as a mean, the name of a parameter and its value (`exact`)."""
    return agreed(lambda: _mvn(mu_p, kind_p, a_p, mu_q, kind_q, a_q))


def _difference_quotient(f: Callable[[Any], Number], x: Any, index: tuple[int, ...], h: Number) -> Number:
    def moved(step: Number) -> Any:
        if len(index) == 1:
            return [v + step if i == index[0] else v for i, v in enumerate(x)]
        return [[v + step if (i, j) == index else v for j, v in enumerate(row)] for i, row in enumerate(x)]

    return (f(moved(h)) - f(moved(-h))) / (2 * h)


def mvn_gradients(mu_p: Any, kind: str, a_p: Any, mu_q: Any, a_q: Any) -> list[Any]:
    """Partial derivatives in mu_p, A_p, mu_q, A_q, both of one kind, by central differences of the definition.

    For a symmetric matrix: the symmetric G with dKL = <G, dA>, which is what autograd through 0.5 (A + A') gives.
    """
    arguments = [mu_p, a_p, mu_q, a_q]
    n = len(mu_p)

    def at(position: int) -> Callable[[Any], Number]:
        def f(x: Any) -> Number:
            new = list(arguments)
            new[position] = x
            if position % 2 and kind in ("covariance_matrix", "precision_matrix"):
                new[position] = [[(x[i][j] + x[j][i]) / 2 for j in range(n)] for i in range(n)]
            return _mvn(new[0], kind, new[1], new[2], kind, new[3])

        return f

    def scale(position: int) -> Number:
        return min(arguments[position][i][i] for i in range(n))

    def quotients() -> list[Any]:
        results: list[Any] = []
        for position in range(4):
            # nothing varies faster than on the scale of the smallest diagonal entry; 2^-700 truncates at 2^-1400
            unit = scale(1 if position == 0 else 3 if position == 2 else position)
            h = mp.mpf(2) ** -700 * (unit if kind == "scale_tril" or position % 2 else min(unit, 1 / unit))
            if position % 2 == 0:
                results.append([_difference_quotient(at(position), arguments[position], (i,), h) for i in range(n)])
                continue
            matrix = [[mp.mpf(0)] * n for _ in range(n)]
            for i in range(n):
                for j in range(i + 1):
                    matrix[i][j] = _difference_quotient(at(position), arguments[position], (i, j), h)
                    if kind != "scale_tril":
                        matrix[j][i] = matrix[i][j]
            results.append(matrix)
        return results

    return agreed(quotients, (2600, 3000), noise_bits=1200)
