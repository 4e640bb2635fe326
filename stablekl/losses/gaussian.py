r"""The KL term of a variational autoencoder: from means and log-variances, in closed form or at a sample.

For one dimension, with x = log var_p - log var_q and m = (mu_p - mu_q)/sigma_q,

.. math:: KL = \tfrac12 \bigl[E(x) + m^2\bigr], \qquad E(x) = e^x - 1 - x \ge 0,

two terms that are not negative. The usual ``-0.5 * (1 + logvar - mu**2 - logvar.exp())`` subtracts numbers near 1: in
float32 it is 0 at mu = 0, logvar = 1e-4, where KL is 2.5e-9, and negative at others nearby.

At a sample z of p, :math:`\log p(z) - \log q(z) = a u + \tfrac12 u^2 - \tfrac12 x`, where a = (z - mu_p)/sigma_p and u
is the difference of z in units of q and of p, :math:`u = m + a\,(e^{x/2} - 1)`: nothing is left of the normalising
constants, which must not be dropped where the variances differ, and nothing cancels as p approaches q.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _fused
from .._autograd import blockwise, rowwise
from .._elementwise import is_lifted
from ..distributions._gaussian import Gaussian, gaussian_kl
from ..distributions.multivariate_normal import MultivariateNormal
from ..special import expm1_value, expm1mx_value
from ._reduction import check_rows, together

__all__ = ["gaussian_kl_loss", "gaussian_log_ratio_loss"]


def _check_vectors(mu: Tensor, logvar: Tensor | float) -> None:
    if mu.ndim == 0:
        raise ValueError(
            "mu must have a last dimension, over which the loss is summed: [batch, n] for a batch of vectors. Of a "
            "single number make a vector with mu.unsqueeze(-1)"
        )
    if isinstance(logvar, Tensor):
        check_rows("mu of shape", mu.shape, "logvar of shape", logvar.shape)


def _value_block(*inputs: Tensor) -> tuple[Tensor]:
    if is_lifted(inputs[0]):
        return (_value_block(*(x.double() for x in inputs))[0].float(),)
    mu, logvar, mu_q, logvar_q = inputs
    m = (mu - mu_q) * torch.exp(-0.5 * logvar_q)
    # halves first: the square may overflow where half of it does not
    return (torch.addcmul(0.5 * expm1mx_value(logvar - logvar_q), 0.5 * m, m),)


def _value(*inputs: Tensor) -> tuple[Tensor, ...]:
    return (_fused.gaussian_kl(inputs),) if _fused.available(inputs) else blockwise(_value_block, *inputs)


def _gradient(inputs: tuple[Tensor, ...], saved: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    if is_lifted(inputs[0]):
        return tuple(x.float() for x in _gradient(tuple(x.double() for x in inputs), saved))
    mu, logvar, mu_q, logvar_q = inputs
    inverse = torch.exp(-0.5 * logvar_q)
    m = (mu - mu_q) * inverse
    by_mu, by_logvar = m * inverse, 0.5 * expm1_value(logvar - logvar_q)
    return by_mu, by_logvar, -by_mu, -torch.addcmul(by_logvar, 0.5 * m, m)


def _pullback(grad: Tensor, inputs: tuple[Tensor, ...], needed: tuple[bool, ...]) -> tuple[Tensor | None, ...] | None:
    return _fused.gaussian_kl_gradient(grad, inputs, needed) if _fused.available((*inputs, grad)) else None


_kl = rowwise(_value, _gradient, _pullback)


def gaussian_kl_loss(
    mu: Tensor,
    logvar: Tensor,
    mu_q: Tensor | float = 0.0,
    logvar_q: Tensor | float = 0.0,
    *,
    scale_tril_q: Tensor | None = None,
    covariance_matrix_q: Tensor | None = None,
) -> Tensor:
    r"""KL divergence of a diagonal Gaussian, given by means and log-variances, to another or to a full one.

    .. math:: \tfrac12 \sum_i \bigl[E(x_i) + (\mu_i - \mu_{q,i})^2 / \sigma_{q,i}^2\bigr], \qquad
              x = \log\sigma^2 - \log\sigma_q^2, \; E(x) = e^x - 1 - x,

    against a diagonal Gaussian; with ``scale_tril_q`` or ``covariance_matrix_q`` as the KL rule of
    `MultivariateNormal`.

    Args:
        mu: means, ``(..., n)``.
        logvar: logarithms of the variances, broadcastable with ``mu``.
        mu_q: means of the second Gaussian; by default those of the standard normal.
        logvar_q: its log-variances; not together with a matrix.
        scale_tril_q: its Cholesky factor, ``(..., n, n)``, for a full covariance.
        covariance_matrix_q: or its covariance matrix.

    Returns:
        The divergence of each row in nats, ``(...)``, in the dtype that the arguments promote to; float16 and
        bfloat16 are computed in float32 at least. Against a diagonal right to 4 + \|x\| units in the last place, since
        e^x magnifies the rounding of x; exactly 0 where the two are equal; inf only where the true value overflows
        (float32 on other devices than a CPU: twice the true value). All of this while the standard deviations are
        numbers of float64 (float32 on other devices): for log-variances within +-1,400.

    Raises:
        ValueError: ``mu`` has no dimension, ``mu`` and ``logvar`` would pair each row with each other, or more than one
            covariance was given, or the matrix is not what it is said to be (lower triangular with a positive diagonal;
            symmetric and positive definite), or not n x n.

    Example:
        >>> import torch
        >>> from stablekl.losses import gaussian_kl_loss
        >>> mu, logvar = torch.tensor([[0.0, 1.0]]), torch.tensor([[1e-4, 0.0]])
        >>> print(gaussian_kl_loss(mu, logvar))
        tensor([0.5000])
    """
    _check_vectors(mu, logvar)
    given = [x for x in (scale_tril_q, covariance_matrix_q) if x is not None]
    if not given:
        rows, dtype = together(mu, logvar, mu_q, logvar_q, wide=False)
        # the terms of a row are rounded once, and their sum is exact beside that
        wide = torch.float64 if is_lifted(rows[0]) else None
        return _kl(*rows).sum(-1, dtype=wide).to(dtype)
    if len(given) > 1 or isinstance(logvar_q, Tensor) or logvar_q != 0:
        raise ValueError("give one of logvar_q, scale_tril_q and covariance_matrix_q, not several")
    (mu, logvar, mu_q), dtype = together(mu, logvar, mu_q)
    dtype = torch.promote_types(dtype, given[0].dtype)
    p = Gaussian("scale_diag", mu, torch.exp(0.5 * logvar))
    matrix = given[0].to(mu.dtype)  # the class checks it: a factor, or symmetric and positive definite
    if scale_tril_q is None:
        full = MultivariateNormal(mu_q, covariance_matrix=matrix)
        q = Gaussian("covariance_matrix", full.loc, full.covariance_matrix)
    else:
        full = MultivariateNormal(mu_q, scale_tril=matrix)
        q = Gaussian("scale_tril", full.loc, full.scale_tril)
    return gaussian_kl(p, q).to(dtype)


def gaussian_log_ratio_loss(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    mu_q: Tensor | float = 0.0,
    logvar_q: Tensor | float = 0.0,
    *,
    sticking_the_landing: bool = False,
) -> Tensor:
    r"""Log p(z) - log q(z) of two diagonal Gaussians: the single-sample estimate of their KL divergence.

    Its mean over z ~ p is `gaussian_kl_loss`, which has no variance: prefer that where both are Gaussian. This is for a
    q that is not, or for importance-weighted bounds, where the ratio itself is needed.

    Args:
        z: samples of p, ``(..., n)``. For the pathwise gradient, reparameterised: ``mu + exp(0.5 * logvar) * eps``.
        mu: means of p, broadcastable with ``z``.
        logvar: its log-variances.
        mu_q: means of q; by default those of the standard normal.
        logvar_q: log-variances of q.
        sticking_the_landing: leave out of the gradient the score of p, whose mean is zero, so that only the path
            through z counts (Roeder, Wu and Duvenaud, 2017): no variance where p = q.

    Returns:
        The log-ratio of each row in nats, ``(...)``, which may be negative, in the dtype that the arguments promote to.

    Raises:
        ValueError: ``mu`` has no dimension, or ``z``, ``mu`` and ``logvar`` would pair each row with each other.

    Example:
        >>> import torch
        >>> from stablekl.losses import gaussian_kl_loss, gaussian_log_ratio_loss
        >>> mu, logvar = torch.tensor([1.0, -1.0]), torch.tensor([0.5, -0.5])
        >>> z = mu + torch.exp(0.5 * logvar) * torch.randn(100_000, 2, generator=torch.Generator().manual_seed(0))
        >>> print(f"{gaussian_log_ratio_loss(z, mu, logvar).mean():.2f} {gaussian_kl_loss(mu, logvar):.2f}")
        1.13 1.13

    References:
        G. Roeder, Y. Wu and D. Duvenaud, "Sticking the landing: simple, lower-variance gradient estimators for
        variational inference", NeurIPS 2017, https://arxiv.org/abs/1703.09194.
    """
    _check_vectors(mu, logvar)
    check_rows("z of shape", z.shape, "mu of shape", mu.shape)
    if sticking_the_landing:
        mu, logvar = mu.detach(), logvar.detach()
    (z, mu, logvar, mu_q, logvar_q), dtype = together(z, mu, logvar, mu_q, logvar_q)
    t = 0.5 * (logvar - logvar_q)
    a = (z - mu) * torch.exp(-0.5 * logvar)
    u = (mu - mu_q) * torch.exp(-0.5 * logvar_q) + a * torch.expm1(t)
    return (a * u + 0.5 * u * u - t).sum(-1).to(dtype)
