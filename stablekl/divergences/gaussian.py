r"""Rényi divergences of any order and Jeffreys divergences of Gaussians, as sums of non-negative terms.

With a = min(alpha, 1), c = \|1 - alpha\|, k = max(alpha, 1), the whitening covariance
:math:`B = a\Sigma_q + (1 - a)\Sigma_p`, the eigenvalues :math:`w_i` of :math:`B^{-1/2}(\Sigma_p - \Sigma_q)B^{-1/2}`,
the squared whitened mean differences :math:`h_i`, :math:`s_i = 1 - \max(\alpha - 1, 0) w_i` and
:math:`L(x) = x - \log(1 + x)`,

.. math::
    \frac{D_\alpha(p \| q)}{a}
        = \frac12 \sum_i \Bigl[\frac{L(a w_i)}{a} + \frac{L(-c w_i)}{c} + k \frac{h_i}{s_i}\Bigr],
    \qquad J = \tfrac12 \|L_p^{-1} \Delta L_q^{-\top}\|_F^2 + \tfrac12 |L_p^{-1} d|^2 + \tfrac12 |L_q^{-1} d|^2 .

The integral exists where all :math:`s_i > 0`. The textbook form,
:math:`\frac{\alpha}{2} d^\top \Sigma_*^{-1} d - \frac{1}{2(\alpha - 1)}
\log\frac{|\Sigma_*|}{|\Sigma_p|^{1-\alpha}|\Sigma_q|^\alpha}` with
:math:`\Sigma_* = \alpha\Sigma_q + (1-\alpha)\Sigma_p` (Gil, Alajaji and Linder, 2013), subtracts log-determinants and
divides by alpha - 1.

The gradient needs no eigenvectors and has a difference in every term, too:

.. math::
    \frac{\partial}{\partial\Sigma_p} = \frac k2 [\Sigma_*^{-1}\Delta\Sigma_p^{-1} - (1 - \alpha) y y^\top], \quad
    \frac{\partial}{\partial\Sigma_q} = -\frac k2 [\Sigma_*^{-1}\Delta\Sigma_q^{-1} + \alpha y y^\top], \quad
    y = \Sigma_*^{-1} d.

**Accuracy** (float64; tests/test_divergences.py has the cases): at p = q to 1e-12 relative distance, and far apart,
2e-15 relative for every parameterisation (independent coordinates: 5e-16) and orders 0 to 3; gradients 2e-15 of their
size. Factors of condition 1e3 and less: 1e-14; 1e5: 5e-13. Next to divergence the error grows with 1/min s. Scales
1e100 times each other cost an exponential of their log-ratio, 5e-14. Mixed parameterisations: see `pairs`.

References: M. Gil, F. Alajaji and T. Linder, "Rényi divergence measures for commonly used univariate continuous
distributions", Information Sciences 249 (2013), 124-131; T. van Erven and P. Harremoës, "Rényi divergence and
Kullback-Leibler divergence", IEEE Transactions on Information Theory 60 (2014), 3797-3820.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from .._autograd import rowwise
from ..distributions._base import widened
from ..distributions._gaussian import Gaussian
from ..special import log1pmx, log1pmx_value
from .gaps import log_gap, log_ratio, over, quadratic_ratio, weights
from .pairs import Pair, full_pair, qr_factor, symmetric, whitened_difference

__all__ = ["as_diagonal", "gaussian_jeffreys", "gaussian_renyi"]

Tensors = tuple[Tensor, ...]

# Below this eigenvalue of Sp or Sq in units of B, the sums of logarithms come from the determinants.
_FAR = 0.5


def as_diagonal(g: Gaussian) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviations in float64 (float32 on MPS), if the coordinates are independent by construction."""
    if g.kind == "scale_diag":
        return widened(g.loc), widened(g.scale)
    if g.kind == "scale_tril" and g.loc.shape[-1] == 1:
        return widened(g.loc), widened(g.scale[..., 0])
    return None


# ---- Rényi ------------------------------------------------------------------------------------------------------


def gaussian_renyi(p: Gaussian, q: Gaussian, alpha: Tensor) -> Tensor:
    """D_alpha(p || q) / min(alpha, 1) in float64, of the broadcast batch shape."""
    first, second = as_diagonal(p), as_diagonal(q)
    if first is not None and second is not None:
        return _diagonal_renyi(*first, *second, alpha.unsqueeze(-1)).sum(-1)
    pair = full_pair(p, q)
    batch = torch.broadcast_shapes(pair.shift.shape[:-1], alpha.shape)
    pair = Pair(*(x.expand(batch + x.shape[x.ndim - e :]) for x, e in zip(pair, (1, 2, 2, 2, 2, 2, 2), strict=True)))
    return _renyi(*pair, alpha.expand(batch))


def _diagonal_renyi(mu_p: Tensor, sigma_p: Tensor, mu_q: Tensor, sigma_q: Tensor, alpha: Tensor) -> Tensor:
    mu_p, sigma_p, mu_q, sigma_q, alpha = torch.broadcast_tensors(mu_p, sigma_p, mu_q, sigma_q, alpha)
    gap = log_gap(2 * log_ratio(sigma_p, sigma_q), alpha)
    top = torch.maximum(sigma_p, sigma_q).detach()  # nothing depends on it but the range of the arithmetic
    a, b, d = sigma_p / top, sigma_q / top, (mu_p - mu_q) / top
    mixed = alpha * b * b + (1 - alpha) * a * a
    exists = gap.isfinite() & (mixed > 0)
    square = torch.where(exists, d, 0.0) * (d / torch.where(exists, mixed, 1.0))
    return 0.5 * (torch.where(exists, gap, torch.inf) + weights(alpha)[2] * square)


def _existing(w: Tensor, alpha: Tensor) -> Tensor:
    """Whether the integral exists: all s_i > 0."""
    return (1 - torch.where(alpha > 1, alpha - 1, 0.0).unsqueeze(-1) * w > 0).all(-1)


def _remainder(x: Tensor) -> Tensor:
    return -log1pmx_value(x)


def _spectral_sums(w: Tensor, log_p: Tensor, log_q: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of L(a w)/a and L(-c w)/c; ``log_p`` and ``log_q`` are log-determinants in units of B."""
    capped, gap, _ = (x.unsqueeze(-1) for x in weights(alpha))
    sums = []
    for weight, sign, log_det in ((capped, 1.0, log_p), (gap, -1.0, log_q)):
        x = sign * weight * w
        far = (x < -_FAR).any(-1) & ((alpha <= 1) | (sign > 0))
        safe = torch.where(far.unsqueeze(-1), 0.0, x)
        near = (sign * w * quadratic_ratio(_remainder, safe, -1 / 3)).sum(-1)
        sums.append(torch.where(far, over(x.sum(-1) - log_det, weight.squeeze(-1), near), near))
    return sums[0], sums[1]


def _diagonal(a: Tensor) -> Tensor:
    return a.diagonal(dim1=-2, dim2=-1)


def _log_det(factor: Tensor, root: Tensor) -> Tensor:
    return 2 * torch.log(_diagonal(factor) / _diagonal(root).abs()).sum(-1)


def _renyi_value(
    shift: Tensor,
    cov_p: Tensor,
    cov_q: Tensor,
    factor_p: Tensor,
    factor_q: Tensor,
    left: Tensor,
    right: Tensor,
    alpha: Tensor,
) -> Tensors:
    capped, gap, excess = weights(alpha)
    a = capped[..., None, None]
    root = qr_factor(torch.cat([a.sqrt() * factor_q, (1 - a).sqrt() * factor_p], -1))
    w, vectors = torch.linalg.eigh(whitened_difference(root, left, right))
    d = (vectors.mT @ solve_triangular(root, shift.unsqueeze(-1), upper=False)).squeeze(-1)
    exists = _existing(w, alpha)
    w = torch.where(exists.unsqueeze(-1), w, 0.0)
    d = torch.where(exists.unsqueeze(-1), d, 0.0)
    one, two = _spectral_sums(w, _log_det(factor_p, root), _log_det(factor_q, root), alpha)
    mixture = 1 - torch.where(alpha > 1, gap, 0.0).unsqueeze(-1) * w
    total = 0.5 * (one + two + excess * (d / mixture * d).sum(-1))
    return torch.where(exists, total, torch.inf), one, two, root, w, vectors, d, mixture


def _exact_gradient(inputs: Tensors, kept: Tensors) -> Tensors:
    _, _, _, factor_p, factor_q, _, _, alpha = inputs
    one, two, root, w, vectors, d, mixture = kept
    capped, gap, excess = weights(alpha)
    basis = solve_triangular(root.mT, vectors, upper=True)
    y = basis @ (d / mixture).unsqueeze(-1)
    square = y @ y.mT
    # Sigma_*^-1 Delta S^-1 by solves with the factor of S: dividing by its eigenvalue in units of B would keep no digit
    # of an eigenvalue near 0
    tilted = (root @ vectors) @ ((w / mixture).unsqueeze(-1) * basis.mT)
    c_p = symmetric(torch.cholesky_solve(tilted, factor_p))
    c_q = symmetric(torch.cholesky_solve(tilted, factor_q))
    al, half_k = alpha[..., None, None], 0.5 * excess[..., None, None]
    half_w, square_d = 0.5 * (w * w).sum(-1), d * d
    first, second = over(one, capped, half_w), over(two, gap, half_w)
    below = second - first + (square_d * w).sum(-1)
    above = ((w * w / mixture) + square_d / mixture * ((1 + w) / mixture)).sum(-1) - second
    return (
        excess.unsqueeze(-1) * y.squeeze(-1),
        half_k * (c_p - (1 - al) * square),
        -half_k * (c_q + al * square),
        0.5 * torch.where(alpha <= 1, below, above),
    )


def _moving_gradient(inputs: Tensors, exists: Tensor) -> Tensors:
    """The same from the covariances, to be differentiated: its values are good to eps absolutely."""
    shift, cov_p, cov_q, *_, alpha = inputs
    identity = torch.eye(shift.shape[-1], dtype=shift.dtype, device=shift.device)
    finite = exists[..., None, None]
    cov_p, cov_q = torch.where(finite, cov_p, identity), torch.where(finite, cov_q, identity)
    shift = torch.where(exists.unsqueeze(-1), shift, 0.0)
    capped, gap, excess = (x[..., None, None] for x in weights(alpha))
    al = alpha[..., None, None]
    change = cov_p - cov_q
    inverse = torch.linalg.inv(al * cov_q + (1 - al) * cov_p)
    y = inverse @ shift.unsqueeze(-1)
    square = y @ y.mT
    tilted = inverse @ change
    c_p, c_q = (symmetric(tilted @ torch.linalg.inv(s)) for s in (cov_p, cov_q))
    root = torch.linalg.cholesky(capped * cov_q + (1 - capped) * cov_p)
    half = solve_triangular(root, change, upper=False)
    w = torch.linalg.eigvalsh(symmetric(solve_triangular(root, half.mT, upper=False)))
    first, second = (w * w * _curvature(x) for x in (capped[..., 0] * w, -gap[..., 0] * w))
    mixture = 1 - torch.where(al > 1, gap, 0.0)[..., 0] * w
    below = (second - first).sum(-1) + (y * (change @ y)).sum((-2, -1))
    above = (w * w / mixture - second).sum(-1) + (y * (cov_p @ y)).sum((-2, -1))
    return (
        (excess * y).squeeze(-1),
        0.5 * excess * (c_p - (1 - al) * square),
        -0.5 * excess * (c_q + al * square),
        0.5 * torch.where(alpha <= 1, below, above),
    )


def _curvature(x: Tensor) -> Tensor:
    """L(x)/x^2, differentiable at 0."""
    small = x.abs() < 1e-3
    safe = torch.where(small, 1.0, x)
    series = 0.5 + x * (-1 / 3 + x * (0.25 + x * (-0.2 + x / 6)))
    minus_l = log1pmx_value if torch.compiler.is_compiling() else log1pmx
    return torch.where(small, series, -minus_l(safe) / safe / safe)


def _renyi_gradient(inputs: Tensors, saved: Tensors | None) -> Tensors:
    if saved is not None:
        partials = _exact_gradient(inputs, saved)
    else:
        still = tuple(x.detach() for x in inputs)
        kept = _renyi_value(*still)
        exact = _exact_gradient(still, kept[1:])
        moving = _moving_gradient(inputs, ~kept[0].isinf())
        partials = tuple(e + (m - m.detach()) for e, m in zip(exact, moving, strict=True))
    shift, cov_p, cov_q, by_alpha = partials
    nothing = torch.zeros_like(cov_p)
    return shift, cov_p, cov_q, nothing, nothing, nothing, nothing, by_alpha


_renyi = rowwise(_renyi_value, _renyi_gradient)


# ---- Jeffreys ---------------------------------------------------------------------------------------------------


def gaussian_jeffreys(p: Gaussian, q: Gaussian) -> Tensor:
    """KL(p || q) + KL(q || p) in float64, of the broadcast batch shape."""
    first, second = as_diagonal(p), as_diagonal(q)
    if first is not None and second is not None:
        return _diagonal_jeffreys(*torch.broadcast_tensors(*first, *second)).sum(-1)
    return _jeffreys(*full_pair(p, q))


def _diagonal_jeffreys_value(mu_p: Tensor, sigma_p: Tensor, mu_q: Tensor, sigma_q: Tensor) -> Tensors:
    d, change = mu_p - mu_q, (sigma_p - sigma_q) / sigma_p
    u, v, ratio = d / sigma_p, d / sigma_q, change * ((sigma_p + sigma_q) / sigma_q)
    return (0.5 * ratio * ratio + 0.5 * u * u + 0.5 * v * v,)


def _diagonal_jeffreys_gradient(inputs: Tensors, saved: Tensors | None) -> Tensors:
    mu_p, sigma_p, mu_q, sigma_q = inputs
    d, change = mu_p - mu_q, sigma_p - sigma_q
    u, v = d / sigma_p, d / sigma_q
    ratio = change / sigma_p * ((sigma_p + sigma_q) / sigma_q)
    mean = sigma_p / sigma_q + sigma_q / sigma_p
    d_mu = u / sigma_p + v / sigma_q
    return d_mu, (ratio * mean - u * u) / sigma_p, -d_mu, -(ratio * mean + v * v) / sigma_q


_diagonal_jeffreys = rowwise(_diagonal_jeffreys_value, _diagonal_jeffreys_gradient)


def _squares(x: Tensor) -> Tensor:
    return (0.5 * x * x).sum((-2, -1))


def _jeffreys_value(
    shift: Tensor, cov_p: Tensor, cov_q: Tensor, factor_p: Tensor, factor_q: Tensor, left: Tensor, right: Tensor
) -> Tensors:
    d = shift.unsqueeze(-1)
    # Each of the two products of the symmetrised difference in turn
    by_p = solve_triangular(factor_p, torch.cat([left, right, d], -1), upper=False)
    by_q = solve_triangular(factor_q, torch.cat([left, right, d], -1), upper=False)
    n = shift.shape[-1]
    change = 0.5 * (by_p[..., :n] @ by_q[..., n : 2 * n].mT + by_p[..., n : 2 * n] @ by_q[..., :n].mT)
    return (_squares(change) + _squares(by_p[..., 2 * n :]) + _squares(by_q[..., 2 * n :]),)


def _jeffreys_partials(shift: Tensor, change: Tensor, inverse_p: Tensor, inverse_q: Tensor) -> Tensors:
    """The gradients by shift and by the covariances; P Delta P and not P - P in every term."""
    d = shift.unsqueeze(-1)
    y_p, y_q = inverse_p @ d, inverse_q @ d
    cross = symmetric(inverse_q @ change @ inverse_p)
    d_p = 0.5 * (cross + symmetric(inverse_p @ change @ inverse_p) - y_p @ y_p.mT)
    d_q = -0.5 * (cross + symmetric(inverse_q @ change @ inverse_q) + y_q @ y_q.mT)
    return (y_p + y_q).squeeze(-1), d_p, d_q


def _jeffreys_gradient(inputs: Tensors, saved: Tensors | None) -> Tensors:
    shift, cov_p, cov_q, factor_p, factor_q, left, right = inputs
    change = symmetric(left @ right.mT)
    exact = _jeffreys_partials(
        shift.detach(), change, torch.cholesky_inverse(factor_p), torch.cholesky_inverse(factor_q)
    )
    if saved is None:
        moving = _jeffreys_partials(shift, cov_p - cov_q, torch.linalg.inv(cov_p), torch.linalg.inv(cov_q))
        exact = tuple(e + (m - m.detach()) for e, m in zip(exact, moving, strict=True))
    nothing = torch.zeros_like(cov_p)
    return (*exact, nothing, nothing, nothing, nothing)


_jeffreys = rowwise(_jeffreys_value, _jeffreys_gradient)
