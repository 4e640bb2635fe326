"""The terms of a Gaussian mixture's log-density and of its gradients, on tensors of any size.

Layout, here and in the modules that build on this one: points lie along the last axis, so that every operation
runs over contiguous memory whatever D is. x (..., D, N), log_weights (..., K), loc (..., K, D), scale (..., K, D) for
standard deviations or (..., K, D, D) for Cholesky factors, logits (..., K, N), z = L_k^-1 (x - mu_k) (..., K, D, N).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["base", "coefficients", "inverse_factor", "is_diagonal", "living", "parameter_gradients", "pool", "shares"]


def is_diagonal(loc: Tensor, scale: Tensor) -> bool:
    """Whether ``scale`` (or its inverse) holds standard deviations rather than Cholesky factors."""
    return scale.ndim == loc.ndim


def living(log_weights: Tensor, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Means and scales with those of weight-zero components replaced: nothing they hold may matter."""
    live = (log_weights != -math.inf).unsqueeze(-1)
    loc = torch.where(live, loc, 0.0)
    if is_diagonal(loc, scale):
        return loc, torch.where(live, scale, 1.0)
    eye = torch.eye(loc.shape[-1], dtype=scale.dtype, device=scale.device)
    return loc, torch.where(live.unsqueeze(-1), scale, eye)


def inverse_factor(loc: Tensor, scale: Tensor) -> Tensor:
    """Inverse factors, so that whitening is a product.

    The inverse is solved from the left, X L = I: substitution then leaves |X L - I| <= c u |X| |L|, and the error of
    X y is bounded by c u |X| |L| |z|, z = L^-1 y, like that of solving L z = y itself (Higham, "Accuracy and
    Stability of Numerical Algorithms", 2002, section 14.2). The inverse from L X = I obeys |L X - I| <= c u |L| |X|
    only, which loses another factor of the condition of L.
    """
    if is_diagonal(loc, scale):
        return scale.reciprocal()
    eye = torch.eye(loc.shape[-1], dtype=scale.dtype, device=scale.device).expand_as(scale)
    inverse: Tensor = torch.linalg.solve_triangular(scale, eye, upper=False, left=False)
    return inverse


def base(log_weights: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Log-weight plus log of the normalising constant, shape (..., K)."""
    diagonal = scale if is_diagonal(loc, scale) else scale.diagonal(dim1=-2, dim2=-1)
    return log_weights - diagonal.log().sum(-1) - 0.5 * math.log(2.0 * math.pi) * loc.shape[-1]


def pool(logits: Tensor, exps: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp over K.

    Args:
        logits: shape (..., K, N).
        exps: where to write the exponentials; its dtype is that of the result.

    Returns:
        The result (..., N); exp(logits - max) (..., K, N); the sum of these (..., N), 0 where every logit is -inf.
    """
    top = logits.detach().amax(-2, keepdim=True)
    top = torch.where(top == -math.inf, 0.0, top)
    # exp in float32 even of float64 logits: its argument is rounded at |a|, which costs exp(a) |a| eps < 0.4 eps of a
    # sum that is at least 1.
    exps = (logits - top).exp() if exps is None else torch.sub(logits, top, out=exps).exp_()
    total = exps.sum(-2)
    return (top.squeeze(-2) + total.log()).to(exps.dtype), exps, total


def shares(grad: Tensor, exps: Tensor, total: Tensor, out: Tensor | None = None) -> Tensor:
    """``grad`` times the responsibilities (..., K, N); zero on a row without any density."""
    share = (grad / torch.where(total == 0, 1.0, total)).unsqueeze(-2)
    return exps * share if out is None else torch.mul(exps, share, out=out)


def coefficients(grad: Tensor, logits: Tensor, pooled: bool) -> Tensor:
    """Gradient with respect to the logits, from that with respect to their log-sum-exp or to themselves."""
    if pooled:
        return shares(grad, *pool(logits)[1:])
    return torch.where(logits == -math.inf, 0.0, grad)


def parameter_gradients(moments: Sequence[Tensor], inverse: Tensor) -> list[Tensor]:
    """Gradients with respect to log-weights, means and scales from the moments of z.

    d/dmu = L^-T z and d/dL = L^-T z z' - diag(1/L_ii) (lower triangle), summed over the points with weights c:
    the moments are sum c (..., K), sum c z (..., K, D) and sum c z^2 (..., K, D) or sum c z z' (..., K, D, D).
    """
    mass, first, second = moments
    inverse = inverse.to(mass.dtype)
    if is_diagonal(first, inverse):
        return [mass, first * inverse, (second - mass.unsqueeze(-1)) * inverse]
    back = inverse.mT
    volume = torch.diag_embed(mass.unsqueeze(-1) * inverse.diagonal(dim1=-2, dim2=-1))
    return [mass, (back @ first.unsqueeze(-1)).squeeze(-1), (back @ second).tril() - volume]
