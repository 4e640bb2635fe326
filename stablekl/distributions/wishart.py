r"""Wishart distributions, and their KL divergence by what the scale matrices were given as.

With :math:`a = \nu/2`, the eigenvalues :math:`\lambda` of :math:`V_q^{-1} V_p` and the Bregman divergence
:math:`B_{\log\Gamma}` of lgamma (see `_bregman`),

.. math:: KL = \sum_{j=0}^{D-1} B_{\log\Gamma}\!\left(a_q - \tfrac j2, a_p - \tfrac j2\right)
               + 2 a_q\,G + (a_p - a_q) \sum_i (\lambda_i - 1), \qquad
          G = \tfrac12 \sum_i (\lambda_i - 1 - \log \lambda_i),

where G is the divergence of two normal distributions with these covariances (see `_mvn_kl`). The last term may be
negative. Where it leaves little, since the means :math:`\nu V` nearly agree, the sum is taken about them:
:math:`\lambda` times :math:`a_p/a_q` in G, and :math:`B_g` for :math:`B_{\log\Gamma}`, less what the means have in
common. torch goes by automatic differentiation of the log-normaliser, whose difference cancels near p = q.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Wishart as TorchWishart

from .._autograd import may_hold
from .._bregman import lgamma_bregman, lgamma_bregman_value, remainder_of_log
from .._elementwise import product_error
from ..registry import register_hardened
from ._base import Checked, broadcast_shape, common_dtype, widened
from ._mvn_kl import covariance_kl, precision_kl, scale_tril_kl, trace_excess
from ._scalar import attached
from .multivariate_normal import given_parameter

__all__ = ["Wishart"]

# Of the positive terms, what has to be left for the sum not to be taken about the means.
_CANCELS = 0.2
_RULES = {"covariance_matrix": covariance_kl, "precision_matrix": precision_kl, "scale_tril": scale_tril_kl}


class Wishart(TorchWishart, Checked):
    """`torch.distributions.Wishart` with a KL divergence that is accurate near p = q too.

    Args:
        df: degrees of freedom, above D - 1.
        covariance_matrix: positive definite, ``(..., D, D)``; or
        precision_matrix: positive definite, ``(..., D, D)``; or
        scale_tril: lower triangular with a positive diagonal, ``(..., D, D)``.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is outside of its domain somewhere (says where).
    """


def _shapes_about_means(a_p: Tensor, a_q: Tensor, d: Tensor, halves: Tensor) -> Tensor:
    """The sum over j of B_g(y, x) + [bd0(y, x) - bd0(a_q, a_p)], x and y less than a_p and a_q by s = j/2."""
    up, down, d = a_q.unsqueeze(-1), a_p.unsqueeze(-1), d.unsqueeze(-1).expand(*a_p.shape, len(halves))
    y, x = up - halves, down - halves
    # bd0 has the derivative log_ratio_bregman(y, x) by s
    near = halves < 0.5 * torch.minimum(x, y)
    v = halves * d / x / up
    slow = halves * remainder_of_log(d / x, y / x) - up * remainder_of_log(v, 1 + v)
    fast = y * remainder_of_log(-d / y, x / y) - up * remainder_of_log(-d / up, down / up)
    return (torch.where(near, slow, fast) + lgamma_bregman_value(y, x, d)).sum(-1)


def _gap_of_factors(a_p: Tensor, a_q: Tensor, factor_p: Tensor, factor_q: Tensor) -> Tensor:
    """G for p's factor times the root of a_p/a_q, from a difference that has the digits of this product."""
    p, q = a_p.reshape(*a_p.shape, 1, 1), a_q.reshape(*a_q.shape, 1, 1)
    ratio = p / q
    root = ratio.sqrt()
    square, product = root * root, ratio * q
    rest = ((p - product) - product_error(ratio, q, product)) / q
    low = (rest + ((ratio - square) - product_error(root, root, square))) / (2 * root)
    scaled = root * factor_p
    low = product_error(root, factor_p, scaled) + low * factor_p
    up, down = (x.diagonal(dim1=-2, dim2=-1) for x in (scaled, factor_q))
    r = ((up - down) + low.diagonal(dim1=-2, dim2=-1)) / down
    # a column of p that is far smaller than q's would be buried under it
    near = ((r - 0.25).abs() < 0.75).to(r.dtype).unsqueeze(-2)
    x = torch.linalg.solve_triangular(factor_q, (scaled - near * factor_q) + low, upper=False).tril(-1)
    gap: Tensor = 0.5 * x.square().sum((-2, -1)) + (0.5 * r * r + remainder_of_log(r, up / down)).sum(-1)
    return gap


def _gap(kind: str, a_p: Tensor, a_q: Tensor, v_p: Tensor, v_q: Tensor) -> tuple[Tensor, Tensor]:
    """G for p's scale times a_p/a_q, and its error in units of eps."""
    size = v_p.shape[-1]
    if kind == "scale_tril":
        gap = _gap_of_factors(a_p, a_q, v_p, v_q)
        return gap, gap
    ratio, mean = (a_p / a_q).reshape(*a_p.shape, 1, 1), torch.zeros_like(v_p[..., 0])
    factor = ratio if kind == "covariance_matrix" else 1 / ratio
    gap = _RULES[kind](mean, v_p * factor, mean, v_q)
    # rounding moves the matrix by eps, and the divergence by that times about its root
    return gap, (2 * gap * size).sqrt() + size * torch.finfo(gap.dtype).eps


def _scale(p: TorchWishart, kind: str) -> Tensor:
    return widened(p._unbroadcasted_scale_tril if kind == "scale_tril" else getattr(p, kind))


@register_hardened(Wishart, Wishart)
def kl_wishart_wishart(p: TorchWishart, q: TorchWishart) -> Tensor:
    """KL between Wishart distributions over matrices of one size; see the module.

    Raises:
        ValueError: the matrices have different sizes.
    """
    if p.event_shape != q.event_shape:
        raise ValueError(f"KL needs matrices of one size, but the event shapes are {p.event_shape} and {q.event_shape}")
    kind = given_parameter(p) if given_parameter(p) == given_parameter(q) else "scale_tril"
    v_p, v_q = _scale(p, kind), _scale(q, kind)
    df_p, df_q = widened(p.df), widened(q.df)
    shape = broadcast_shape(df_p.shape, df_q.shape, v_p.shape[:-2], v_q.shape[:-2])
    df_p, df_q = df_p.expand(shape), df_q.expand(shape)

    halves = 0.5 * torch.arange(p.event_shape[-1], dtype=df_p.dtype, device=df_p.device)
    a_p, a_q, d = 0.5 * df_p, 0.5 * df_q, 0.5 * (df_q - df_p)
    x, y = a_p.unsqueeze(-1) - halves, a_q.unsqueeze(-1) - halves
    shapes = lgamma_bregman(y, x, d.detach().unsqueeze(-1).expand_as(x)).sum(-1)
    mean = torch.zeros_like(v_p[..., 0])
    scales = df_q * _RULES[kind](mean, v_p, mean, v_q).expand(shape)
    both = d * trace_excess(kind, v_p, v_q).expand(shape)
    total = shapes + scales - both
    with torch.no_grad():
        cancels = total < _CANCELS * (shapes + scales)
        if may_hold(cancels):
            gap, error = _gap(kind, a_p, a_q, v_p, v_q)
            about = 2 * a_q * gap + _shapes_about_means(a_p, a_q, d, halves)
            value = torch.where(cancels & (2 * a_q * error < shapes + scales), about, total)
        else:
            value = total
    return attached(value, total).to(common_dtype(p.df, q.df, p._unbroadcasted_scale_tril, q._unbroadcasted_scale_tril))
