r"""The 2-Wasserstein distance of Gaussians, with the Bures distance of the covariances from their difference.

.. math:: W_2^2 = |\mu_p - \mu_q|^2 + \mathrm{tr}(\Sigma_p + \Sigma_q - 2 (\Sigma_q^{1/2}\Sigma_p\Sigma_q^{1/2})^{1/2})

The traces cancel: 1e-12 apart nothing of them is left. With independent coordinates the sum of
:math:`(\sigma_p - \sigma_q)^2` replaces them. Otherwise, let T be the optimal map from q to p,
:math:`T \Sigma_q T = \Sigma_p`, so that the squared Bures distance is :math:`\|(T - I) L_q\|_F^2`. With
:math:`C = L_q^\top L_q` and :math:`S = (L_q^\top \Sigma_p L_q)^{1/2} = L_q^\top T L_q`, the
difference :math:`Z = S - C` solves a Lyapunov equation whose right-hand side is the difference of the covariances,

.. math:: (S + C) Z + Z (S + C) = 2 L_q^\top (\Sigma_p - \Sigma_q) L_q, \qquad (T - I) L_q = L_q^{-\top} Z,

exactly, not to first order, because :math:`S^2 - C^2 = \frac12[(S + C)(S - C) + (S - C)(S + C)]`. S itself comes from
the singular values of :math:`L_p^\top L_q`, no square of a matrix. Far apart, the distance is
:math:`\|L_p - L_q U\|_F`, U the orthogonal polar factor of :math:`L_q^\top L_p`: no inverse.

The gradients are :math:`I - T^{-1}` by the covariance of p and :math:`I - T` by that of q, from the same equations.

**Accuracy** (float64, moderate covariances): 3e-15 relative from 1e-12 apart to far, gradients 4e-15 of their size.
Factors of condition 1e3: 4e-13; 1e5: 4e-12.

References: D. C. Dowson and B. V. Landau, "The Fréchet distance between multivariate normal distributions", Journal of
Multivariate Analysis 12 (1982), 450-455; R. Bhatia, T. Jain and Y. Lim, "On the Bures-Wasserstein distance between
positive definite matrices", Expositiones Mathematicae 37 (2019), 165-191.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from .._autograd import custom, rowwise
from ..distributions._gaussian import Gaussian
from .gaussian import as_diagonal
from .pairs import full_pair, symmetric

__all__ = ["gaussian_distance", "gaussian_transport"]

Tensors = tuple[Tensor, ...]

# From this share of the traces on, the difference of the factors is taken, which is off by at most 16 eps there.
_FAR = 2.0**-8


def gaussian_transport(p: Gaussian, q: Gaussian) -> Tensor:
    """The squared 2-Wasserstein distance in float64, of the broadcast batch shape."""
    first, second = as_diagonal(p), as_diagonal(q)
    if first is not None and second is not None:
        (mu_p, sigma_p), (mu_q, sigma_q) = first, second
        return (mu_p - mu_q).square().sum(-1) + (sigma_p - sigma_q).square().sum(-1)
    pair = full_pair(p, q)
    return pair.shift.square().sum(-1) + _bures(*pair[1:])


def gaussian_distance(p: Gaussian, q: Gaussian) -> Tensor:
    """Its root, with gradient 0 where it is 0; of independent coordinates to 1e308, where the square overflows."""
    first, second = as_diagonal(p), as_diagonal(q)
    if first is not None and second is not None:
        moved = torch.cat([(a - b) for a, b in zip(first, second, strict=True)], -1)
        unit = moved.detach().abs().amax(-1, keepdim=True)
        scale = torch.where((unit > 0) & (unit < torch.inf), unit, 1.0)
        return scale.squeeze(-1) * _root((moved / scale).square().sum(-1))
    return _root(gaussian_transport(p, q))


def _root(square: Tensor) -> Tensor:
    apart = square > 0
    return torch.where(apart, torch.where(apart, square, 1.0).sqrt(), square)


# ---- matrix functions, differentiable any number of times -------------------------------------------------------


def _lyapunov_value(a: Tensor, b: Tensor) -> tuple[Tensor]:
    values, vectors = torch.linalg.eigh(a)
    inner = vectors.mT @ b @ vectors
    return (symmetric(vectors @ (inner / (values.unsqueeze(-1) + values.unsqueeze(-2))) @ vectors.mT),)


def _lyapunov_vjp(
    grad: Tensor, inputs: Sequence[Tensor], saved: Sequence[Tensor] | None, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    a, b = inputs
    solved = _lyapunov(a, symmetric(grad))
    product = solved @ _lyapunov(a, b)
    return -(product + product.mT), solved


def _lyapunov_jvp(inputs: Sequence[Tensor], tangents: Sequence[Tensor | None], ndim: int) -> Tensor | None:
    a, b = inputs
    d_a, d_b = (torch.zeros_like(x) if t is None else t for x, t in zip(inputs, tangents, strict=True))
    product = d_a @ _lyapunov(a, b)
    return _lyapunov(a, d_b - (product + product.mT))


# The symmetric X with A X + X A = B, for positive-definite A and symmetric B.
_lyapunov = custom(_lyapunov_value, _lyapunov_vjp, _lyapunov_jvp)


def _square_root_value(a: Tensor) -> tuple[Tensor]:
    values, vectors = torch.linalg.eigh(a)
    return (symmetric(vectors @ (values.sqrt().unsqueeze(-1) * vectors.mT)),)


def _square_root_vjp(
    grad: Tensor, inputs: Sequence[Tensor], saved: Sequence[Tensor] | None, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    return (_lyapunov(_square_root(inputs[0]), symmetric(grad)),)


def _square_root_jvp(inputs: Sequence[Tensor], tangents: Sequence[Tensor | None], ndim: int) -> Tensor | None:
    return None if tangents[0] is None else _lyapunov(_square_root(inputs[0]), symmetric(tangents[0]))


# The positive-definite root of a positive-definite matrix.
_square_root = custom(_square_root_value, _square_root_vjp, _square_root_jvp)


# ---- the squared Bures distance ---------------------------------------------------------------------------------


def _map_excess(factor: Tensor, root: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """``(T - I) L`` and ``T - I`` for the map T from L L' onto what differs from it by ``left right'``.

    ``root`` is S of the module's head.
    """
    size = left.shape[-1]
    moved = factor.mT @ torch.cat([left, right], -1)
    change = symmetric(moved[..., :size] @ moved[..., size:].mT)
    (z,) = _lyapunov_value(root + factor.mT @ factor, 2 * change)
    by_factor = solve_triangular(factor.mT, z, upper=True)
    return by_factor, symmetric(solve_triangular(factor.mT, by_factor.mT, upper=True))


def _bures_value(
    cov_p: Tensor, cov_q: Tensor, factor_p: Tensor, factor_q: Tensor, left: Tensor, right: Tensor
) -> Tensors:
    u, s, vh = torch.linalg.svd(factor_p.mT @ factor_q)
    scaled = s.unsqueeze(-1) * vh
    moved, excess_q = _map_excess(factor_q, vh.mT @ scaled, left, right)
    _, excess_p = _map_excess(factor_p, (u * s.unsqueeze(-2)) @ u.mT, -left, right)
    near = moved.square().sum((-2, -1))
    far = (factor_p - factor_q @ (vh.mT @ u.mT)).square().sum((-2, -1))
    size = factor_p.square().sum((-2, -1)) + factor_q.square().sum((-2, -1))
    return torch.where(far > _FAR * size, far, near), excess_p, excess_q


def _bures_gradient(inputs: Tensors, saved: Tensors | None) -> Tensors:
    if saved is None:
        cov_p, cov_q = inputs[:2]
        _, excess_p, excess_q = _bures_value(*(x.detach() for x in inputs))
        factor = torch.linalg.cholesky(cov_q)
        root = _square_root(symmetric(factor.mT @ cov_p @ factor))
        by_factor = solve_triangular(factor.mT, root, upper=True)
        forth = symmetric(solve_triangular(factor.mT, by_factor.mT, upper=True))
        back = symmetric(torch.linalg.inv(forth))
        excess_p, excess_q = excess_p + (back - back.detach()), excess_q + (forth - forth.detach())
    else:
        excess_p, excess_q = saved
    nothing = torch.zeros_like(excess_p)
    return -excess_p, -excess_q, nothing, nothing, nothing, nothing


_bures = rowwise(_bures_value, _bures_gradient)
