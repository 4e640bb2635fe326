r"""LKJ distributions of Cholesky factors of correlation matrices, and their KL divergence without cancellation.

The density in the matrix is proportional to the determinant to the power concentration - 1: an exponential family,
whose divergence is that of Bregman of its log-normaliser, in D dimensions

.. math:: F(\eta) = \sum_{i=0}^{D-2} (i + 1) H(\eta + \tfrac i2), \qquad
    H(a) = \log\Gamma(a) - \log\Gamma(a + \tfrac12).

Two neighbours are a logarithm, :math:`H(a) + H(a + \frac12) = -\log a`, which leaves D - 2 logarithms, of Bregman
divergences :math:`L(v) = v - \log(1 + v)`, and multiples of a single H, whose is the integral of a positive function:

.. math:: B_H(y, x) = \int_0^\infty \frac{e^{-yt} - e^{-xt} (1 - (y - x) t)}{t (1 + e^{-t/2})}\,dt,

by the trapezoidal rule in log t. Its integrand is analytic up to an imaginary part of pi/2 for any x and y. All terms
are positive; the differences of lgammas and the digammas of the textbook lose all digits near p = q, and for large
concentrations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import LKJCholesky as TorchLKJCholesky
from torch.types import _size

from .._bregman import remainder_of_log
from ..registry import register_hardened
from ..special import expm1_value, expm1mx_value
from ._base import Checked, validate_as
from ._scalar import scalar_rule

__all__ = ["LKJCholesky"]

# Points of log t, from where (x t)^2 is 2^-56 to where e^-xt is, of the larger and the smaller of x and y: a step of
# 0.2 for numbers alike, of 0.25 for those 1e12 apart.
_POINTS, _FIRST, _LAST = 256, -20.0, 4.0


class LKJCholesky(TorchLKJCholesky, Checked):
    """`torch.distributions.LKJCholesky` with a KL divergence, which torch has not.

    Args:
        dim: of the matrices, at least 2.
        concentration: positive, any shape; 1 is uniform over correlation matrices.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a concentration is zero, negative or NaN somewhere (says where).

    Example:
        >>> import torch, stablekl
        >>> p, q = stablekl.LKJCholesky(3, torch.tensor(1.0)), stablekl.LKJCholesky(3, torch.tensor(1.0001))
        >>> print(f"{torch.distributions.kl_divergence(p, q):.3e}")
        6.451e-09
    """

    def __init__(self, dim: int, concentration: Tensor | float = 1.0, validate_args: bool | None = None) -> None:
        """As torch's, which an empty batch makes fail in the check of the Beta distribution that it keeps."""
        if isinstance(concentration, Tensor) and concentration.numel() == 0:
            super().__init__(dim, concentration.new_ones(()), validate_args)
            self.expand(concentration.shape, self)
            self.concentration = concentration
            validate_as(self, validate_args)
        else:
            super().__init__(dim, concentration, validate_args)

    def expand(self, batch_shape: _size, _instance: Any = None) -> LKJCholesky:
        """Return this distribution with its batch shape expanded; no memory is allocated."""
        new = self._get_checked_instance(LKJCholesky, _instance)  # type: ignore[no-untyped-call]
        expanded: LKJCholesky = super().expand(batch_shape, new)  # type: ignore[no-untyped-call]
        return expanded


def _weights(dim: int) -> tuple[list[float], float]:
    """How often each -log(a + i/2), i = 0 ... D - 3, and how often the last H."""
    logs = [float(i // 2 + 1) for i in range(dim - 2)]
    return logs, dim - 1 - (logs[-1] if logs else 0.0)


def _points(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The points t, with a dimension more, and the weights, divided by 1 + e^(-t/2)."""
    x, y = x.detach(), y.detach()
    first = _FIRST - torch.log(torch.maximum(x, y))
    last = _LAST - torch.log(torch.minimum(x, y))
    share = torch.linspace(0, 1, _POINTS, dtype=x.dtype, device=x.device)
    step = ((last - first) / (_POINTS - 1)).unsqueeze(-1)
    t = torch.exp(first.unsqueeze(-1) + share * (last - first).unsqueeze(-1))
    return t, step / (1 + torch.exp(-0.5 * t))


def _bregman(x: Tensor, y: Tensor, d: Tensor) -> Tensor:
    t, weight = _points(x, y)
    x, y, move = x.unsqueeze(-1), y.unsqueeze(-1), d.unsqueeze(-1) * t
    small = move.abs() < 1
    near = torch.exp(-x * t) * expm1mx_value(-torch.where(small, move, 0.0))
    far = torch.exp(-y * t) - torch.exp(-x * t) * (1 - move)
    return (weight * torch.where(small, near, far)).sum(-1)


def _slopes(x: Tensor, y: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """H'(y) - H'(x), and H''(x)."""
    t, weight = _points(x, y)
    x, y, move = x.unsqueeze(-1), y.unsqueeze(-1), d.unsqueeze(-1) * t
    small = move.abs() < 1
    fall = -torch.exp(-x * t) * expm1_value(-torch.where(small, move, 0.0))
    fall = torch.where(small, fall, torch.exp(-x * t) - torch.exp(-y * t))
    t_x, weight_x = _points(x.squeeze(-1), x.squeeze(-1))
    return (weight * t * fall).sum(-1), (weight_x * t_x * t_x * torch.exp(-x * t_x)).sum(-1)


@functools.cache
def _rule(dim: int) -> Callable[..., Tensor]:
    """The divergence in ``dim`` dimensions as a function of the two concentrations."""
    logs, last = _weights(dim)
    top = 0.5 * (dim - 2)

    def value(x: Tensor, y: Tensor) -> Tensor:
        d = y - x
        total = last * _bregman(x + top, y + top, d)
        for i, times in enumerate(logs):
            a, b = x + 0.5 * i, y + 0.5 * i
            total = total + times * remainder_of_log(d / a, b / a)
        return total

    def gradient(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        d = y - x
        rise, curvature = (last * s for s in _slopes(x + top, y + top, d))
        for i, times in enumerate(logs):
            a, b = x + 0.5 * i, y + 0.5 * i
            rise, curvature = rise + times * (d / a / b), curvature + times / a / a
        return -d * curvature, rise

    return scalar_rule(value, gradient)


@register_hardened(LKJCholesky, LKJCholesky)
def kl_lkj_cholesky_lkj_cholesky(p: TorchLKJCholesky, q: TorchLKJCholesky) -> Tensor:
    """KL between LKJ distributions of matrices of one size, elementwise; see the module.

    Raises:
        ValueError: the sizes differ.
    """
    if p.dim != q.dim:
        raise ValueError(
            f"KL needs distributions over the same space, but p is over correlation matrices of size {p.dim} and q "
            f"over those of size {q.dim}"
        )
    return _rule(p.dim)(p.concentration, q.concentration)
