r"""KL divergences between full Gaussians, by what the caller gave: factors, covariances or precisions.

All three are one formula. With :math:`\Sigma_q = L_q L_q^\top`, :math:`m = L_q^{-1}(\mu_p - \mu_q)` and a triangular X
such that :math:`(I + X)(I + X)^\top = L_q^{-1} \Sigma_p L_q^{-\top}`,

.. math:: KL = \tfrac12 |m|^2 + \tfrac12 \|X\|_F^2 + \sum_j L(x_{jj}), \qquad L(r) = r - \log(1 + r),

a sum of non-negative terms. torch evaluates :math:`\tfrac12(\mathrm{tr} + |m|^2 - D) + \log\det L_q - \log\det L_p`,
which subtracts numbers near D/2 when p is near q. The rules differ only in how X is obtained so that it keeps its
relative accuracy:

* factors: :math:`X = L_q^{-1}(L_p - L_q)`, the difference first;
* covariances: two Cholesky factors near each other carry eps * cond(Sigma) of noise each, which no later
  subtraction removes (3e6 ulp). So :math:`W = L_q^{-1}(\Sigma_p - \Sigma_q)L_q^{-\top}` first, and X from
  :math:`X + X^\top + XX^\top = W` by one Newton step;
* precisions: likewise from :math:`U_q^{-1}(P_p - P_q)U_q^{-\top}`, no inverse of a matrix.

Far from each other, the factorisations are corrected to first order by their residuals (float64; for narrower values
the factorisation is float64's): log det Sp alone would cost eps * cond(Sp), 1e4 units where p is ill conditioned and q
is not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from .. import _fused
from .._autograd import is_dual, is_plain, may_hold, rowwise
from .._elementwise import product_error, sum_error
from .._residual import residual
from ..special import log1pmx_value, log_ratio_bregman_value
from ._base import broadcast_shape, of_both, widened

__all__ = ["covariance_kl", "precision_kl", "scale_tril_kl", "trace_excess"]

Tensors = tuple[Tensor, ...]

# The largest first-order correction for the rounding of a factorisation: beyond it, the matrix is singular to float64.
_FIRST_ORDER = 2.0**-6
_BLOCKED = 256  # rows from which it pays to leave out the blocks above a diagonal (measured)


def _diagonal(a: Tensor) -> Tensor:
    return a.diagonal(dim1=-2, dim2=-1)


def _recorded(*tensors: Tensor) -> bool:
    """Whether operations are recorded or transformed, which must then not happen in place."""
    return torch.is_grad_enabled() or not is_plain(tensors) or is_dual(tensors)


def _lower(block: Callable[[int, int], Tensor], d: int, diagonal: Tensor) -> Tensor:
    """The lower triangle of a fresh D x D matrix plus a diagonal.

    Args:
        block: ``block(start, stop)``: its columns start to stop, rows start to D. A large matrix is made of a few,
            and nothing above them is computed.
        d: D.
        diagonal: what to add to its diagonal.
    """
    if _recorded(diagonal):
        return block(0, d).tril() + torch.diag_embed(diagonal)
    size = d if d < _BLOCKED else max(_BLOCKED // 2, d // 4)
    result = block(0, size).tril_()
    if size < d:
        left, result = result, result.new_zeros((*result.shape[:-1], d))
        result[..., :size] = left
        for start in range(size, d, size):
            result[..., start:, start : start + size] = block(start, start + size).tril_()
    _diagonal(result).add_(diagonal)
    return result


def _whitened(factor_p: Tensor, factor_q: Tensor, shift: Tensor) -> Tensor:
    """``[m, X]``, shape (..., D, D + 1), from triangular factors; the diagonal of X is (p - q)/q itself.

    Off the diagonal, Lq^-1 Lp and Lq^-1 (Lp - Lq) are the same numbers. Subtracting first is exact for columns that
    are near each other; for a column with Lp << Lq it would bury Lp under Lq (1e4 eps), so it is left alone there.
    """
    dp, dq = _diagonal(factor_p), _diagonal(factor_q)
    r = (dp - dq) / dq
    near = ((r - 0.25).abs() < 0.75).to(dp.dtype).unsqueeze(-2)  # within a factor of 2
    if _recorded(factor_p, factor_q, shift):
        difference = torch.addcmul(factor_p, factor_q, near, value=-1)
        z = _solve(factor_q, torch.cat((shift.unsqueeze(-1), difference), -1))
        return torch.diagonal_scatter(z, r, 1, -2, -1)
    d = dp.shape[-1]
    rhs = shift.new_empty((*shift.shape[:-1], d, d + 1))
    torch.addcmul(factor_p, factor_q, near, value=-1, out=rhs[..., 1:])
    rhs[..., 0] = shift
    z = _solve(factor_q, rhs)
    _diagonal(z[..., 1:]).copy_(r)
    return z


def _solve(factor: Tensor, rhs: Tensor, *, transposed: bool = False) -> Tensor:
    """``F^-1 B`` for a lower-triangular F, or ``F^-T B``.

    Solved from the right, as (B' F^-T)', since torch's rows are LAPACK's columns: two copies fewer.
    """
    f = factor if transposed else factor.mT
    solved: Tensor = solve_triangular(f, rhs.mT, upper=not transposed, left=False)
    return solved.mT


def _diagonal_excess(dp: Tensor, dq: Tensor) -> Tensor:
    """sum_j L(dp_j/dq_j - 1), in float64 where the device has it; to an error of eps times half the squares besides."""
    wide_p, wide_q = widened(dp), widened(dq)
    zero = wide_p.new_zeros(()).expand_as(wide_p)
    normals = zero, wide_p, zero, wide_q
    if _fused.available(normals):  # a pass in C in the place of fifty operations
        r = (wide_p - wide_q) / wide_q
        return (_fused.normal_kl(normals) - 0.5 * r * r).sum(-1).to(dp.dtype)
    return log_ratio_bregman_value(wide_p, wide_q, lifted=wide_p.dtype != dp.dtype).sum(-1).to(dp.dtype)


def _half_square(z: Tensor) -> Tensor:
    """|z|^2 / 2; +inf from half of the largest number on."""
    # A norm reads once and writes nothing, where the dot product of z/2 and z takes 2 to 10 times as long; it adds in
    # sequence, though (20 eps at D = 512), so long rows come first.
    rows = torch.linalg.vector_norm(z, dim=-1) if z.shape[-1] > 64 else z.flatten(-2)
    norm: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    return (0.5 * norm) * norm


def _unless_overflowed(total: Tensor, *inputs: Tensor) -> Tensor:
    """The sum of non-negative terms, +inf where its NaN comes from none of the inputs.

    A whitened entry beyond the largest number turns to NaN in the rows below it (0 * inf), and to +inf in truth.
    """
    overflowed = total.isnan()
    if not may_hold(overflowed):
        return total
    probe = torch.zeros_like(total)
    for x in inputs:
        probe = probe + (x.sum((-2, -1)) if x.ndim > total.ndim + 1 else x.sum(-1))
    return torch.where(overflowed & ~probe.isnan(), torch.inf, total)


# ---- factors ----------------------------------------------------------------------------------------------------


def _tril_value(mu_p: Tensor, tril_p: Tensor, mu_q: Tensor, tril_q: Tensor) -> Tensors:
    z = _whitened(tril_p, tril_q, mu_p - mu_q)
    value = _half_square(z) + _diagonal_excess(_diagonal(tril_p), _diagonal(tril_q))
    return _unless_overflowed(value, mu_p, tril_p, mu_q, tril_q), z


def _tril_gradient(inputs: Tensors, saved: Tensors | None) -> Tensors:
    mu_p, tril_p, mu_q, tril_q = inputs
    z = _whitened(tril_p, tril_q, mu_p - mu_q) if saved is None else saved[0]
    # [y, Y] = Lq^-T [m, X]. d/dLp = tril(Lq^-T (I + X)) - diag(1/Lp) and d/dLq = tril(Lq^-T (I - (I+X)(I+X)' - mm')),
    # written without the identity, which would cancel near p = q.
    y = _solve(tril_q, z, transposed=True)
    d, r = mu_p.shape[-1], _diagonal(z[..., 1:])

    def block_p(start: int, stop: int) -> Tensor:
        return y[..., start:, start + 1 : stop + 1].clone()

    def block_q(start: int, stop: int) -> Tensor:
        # X has nothing above its diagonal; Y has, but not where it meets the rest of X
        product = y[..., start:, : stop + 1] @ z[..., start:stop, : stop + 1].mT
        return (product + y[..., start:, start + 1 : stop + 1]).neg()

    d_mu = y[..., 0].clone()
    d_p = _lower(block_p, d, r / _diagonal(tril_p))
    return d_mu, d_p, -d_mu, _lower(block_q, d, -r / _diagonal(tril_q))


_tril_kl = rowwise(_tril_value, _tril_gradient)


# ---- covariances ------------------------------------------------------------------------------------------------


def _sandwich(factor: Tensor, a: Tensor, *, transposed: bool = False) -> Tensor:
    """``F^-1 A F^-T`` for a lower-triangular factor and symmetric A; ``F^-T A F^-1`` if transposed."""
    f = factor.mT if transposed else factor
    half = solve_triangular(f, a, upper=transposed)
    full: Tensor = solve_triangular(f, half.mT, upper=transposed)
    return 0.5 * (full + full.mT)


def _root_minus_identity(w: Tensor) -> Tensor:
    """Lower-triangular X with (I + X)(I + X)' = I + W, to the relative accuracy of W, for |W| < 7/8.

    cholesky(I + W) - I knows X to eps only. I + W is well conditioned, so one Newton step from there, with the
    residual formed from the small matrices, leaves eps^2.
    """
    identity = torch.eye(w.shape[-1], dtype=w.dtype, device=w.device)
    root: Tensor = torch.linalg.cholesky_ex(identity + w)[0]
    x = root - identity
    step = _sandwich(root, w - (x + x.mT + x @ x.mT))
    return x + root @ (step.tril(-1) + torch.diag_embed(0.5 * _diagonal(step)))


def _is_small(w: Tensor) -> Tensor:
    """Where the Frobenius norm, and with it every eigenvalue, is below 7/8.

    The nearer to 1, the less is left of the rounding of two separate factorisations: uncorrected, 18 units at 1/2 and 6
    at 7/8.
    """
    return w.square().sum((-2, -1)) < 0.875**2


def _factor(a: Tensor) -> Tensor:
    # The constructor has said what there is to say about matrices that are not positive definite.
    factor: Tensor = torch.linalg.cholesky_ex(a)[0]
    return factor


def _factorisation_error(a: Tensor, factor: Tensor) -> Tensor:
    """E = L^-1 A L^-T - I for the computed factor L of A.

    Rounding in the factorisation costs log det A eps cond(A), of which tr E is the first and only visible order. Of p
    that is what no conditioning of the divergence excuses; of q it must go where p's goes, since for Sq = 4 Sp the two
    are one and the same.
    """
    return _sandwich(factor, residual(a, factor, factor))


def _norm(a: Tensor) -> Tensor:
    return a.square().sum((-2, -1)).sqrt()


def _trace(a: Tensor) -> Tensor:
    return _diagonal(a).sum(-1)


def _corrected(value: Tensor, correction: Tensor, far: Tensor) -> Tensor:
    """``value + correction`` where far, unless a matrix is singular to float64: then the first order is no order."""
    return value + torch.where(far & (correction.abs() < _FIRST_ORDER * value), correction, 0.0)


def _covariance_value(mu_p: Tensor, cov_p: Tensor, mu_q: Tensor, cov_q: Tensor) -> Tensors:
    dtype = mu_p.dtype
    mu_p, cov_p, mu_q, cov_q = map(widened, (mu_p, cov_p, mu_q, cov_q))
    factor_p, factor_q = of_both(_factor, (cov_p,), (cov_q,))
    far = _whitened(factor_p, factor_q, mu_p - mu_q)
    m, x = far[..., :1], far[..., 1:]
    excess = _diagonal_excess(_diagonal(factor_p), _diagonal(factor_q))
    near = _is_small(x + x.mT + x @ x.mT)[..., None, None]
    if may_hold(near):
        w = torch.where(near, _sandwich(factor_q, cov_p - cov_q), torch.zeros_like(x))
        x_near = _root_minus_identity(w)
        x = torch.where(near, x_near, x)
        excess = torch.where(near[..., 0, 0], -log1pmx_value(_diagonal(x_near)).sum(-1), excess)
    value = _half_square(x) + _half_square(m) + excess
    is_far = ~near[..., 0, 0]
    if dtype == torch.float64 and may_hold(is_far):  # narrower values leave room enough
        error_p, error_q = of_both(_factorisation_error, (cov_p, factor_p), (cov_q, factor_q))
        g = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device) + far[..., 1:]  # tr(Sq^-1 Sp) = |G|^2
        determinants = _trace(error_q - error_p)
        trace = (g * (g @ error_p - error_q @ g)).sum((-2, -1))
        square = (m.mT @ error_q @ m).squeeze((-2, -1))
        value = _corrected(value, 0.5 * (determinants + trace - square), is_far)
    return _unless_overflowed(value, mu_p, cov_p, mu_q, cov_q).to(dtype), factor_p, factor_q, m


def _moment_difference(mu_p: Tensor, cov_p: Tensor, mu_q: Tensor, cov_q: Tensor) -> tuple[Tensor, Tensor]:
    """Sp - Sq + (mu_p - mu_q)(mu_p - mu_q)', rounded about once: each term is taken to twice the digits.

    Divided by the second result, about the size of Sq, lest the square of the means overflow.
    """
    size = _diagonal(cov_q).detach().amax(-1)[..., None, None].sqrt()  # the result does not depend on it
    unit = torch.where(size > 0, size / torch.frexp(size).mantissa, 1.0)  # a power of two, so nothing is rounded
    a, b = mu_p.unsqueeze(-1) / unit, -mu_q.unsqueeze(-1) / unit
    cov_p, cov_q = cov_p / unit / unit, cov_q / unit / unit
    d, change = a + b, cov_p - cov_q
    d_error = sum_error(a, b, d)
    square = d * d.mT
    total = change + square
    cross = d * d_error.mT
    rest = product_error(d, d.mT, square) + cross + cross.mT + sum_error(cov_p, -cov_q, change)
    return total + (sum_error(change, square, total) + rest), unit


def _covariance_gradient(inputs: Tensors, saved: Tensors | None) -> Tensors:
    dtype = inputs[0].dtype
    mu_p, cov_p, mu_q, cov_q = map(widened, inputs)
    if saved is None:
        factor_p, factor_q = torch.linalg.cholesky(cov_p), torch.linalg.cholesky(cov_q)
        m = solve_triangular(factor_q, (mu_p - mu_q).unsqueeze(-1), upper=False)
    else:
        factor_p, factor_q, m = saved
    # (Sq^-1 - Sp^-1)/2 = Sp^-1 (Sp - Sq) Sq^-1 / 2, not Lq^-T (I + W)^-1 W Lq^-1 / 2: I + W loses Sp where Sp << Sq
    d_p = torch.cholesky_solve(torch.cholesky_solve(cov_p - cov_q, factor_p).mT, factor_q)
    d_p = 0.25 * (d_p + d_p.mT)
    d_mu = solve_triangular(factor_q.mT, m, upper=True).squeeze(-1)
    # -Sq^-1 (Sp - Sq + dmu dmu') Sq^-1 / 2. Whitened one by one, since the square of a whitened vector keeps more
    # digits than a whitened square; together where the two cancel, which would leave none.
    w, square = _sandwich(factor_q, cov_p - cov_q), m @ m.mT
    moments = w + square
    cancels = (_norm(moments) < 0.125 * torch.maximum(_norm(w), _norm(square)))[..., None, None]
    if may_hold(cancels):
        together, unit = _moment_difference(mu_p, cov_p, mu_q, cov_q)
        moments = torch.where(cancels, _sandwich(factor_q / unit, together), moments)
    d_q = -0.5 * _sandwich(factor_q, moments, transposed=True)
    return tuple(d.to(dtype) for d in (d_mu, d_p, -d_mu, d_q))


_covariance_kl = rowwise(_covariance_value, _covariance_gradient)


# ---- precisions -------------------------------------------------------------------------------------------------


def _precision_value(mu_p: Tensor, precision_p: Tensor, mu_q: Tensor, precision_q: Tensor) -> Tensors:
    dtype = mu_p.dtype
    mu_p, precision_p, mu_q, precision_q = map(widened, (mu_p, precision_p, mu_q, precision_q))
    factor_p, factor_q = _factor(precision_p), _factor(precision_q)
    shift = (factor_q.mT @ (mu_p - mu_q).unsqueeze(-1)).squeeze(-1)
    # (I + M)(I + M)' = U_q^-1 P_p U_q^-T is the inverse of what X stands for, so X = (I + M)^-1 - I = -(I + M)^-1 M.
    v = _sandwich(factor_q, precision_p - precision_q)
    near = _is_small(v)[..., None, None]
    m = _root_minus_identity(torch.where(near, v, torch.zeros_like(v)))
    identity = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
    x_near = -solve_triangular(identity + m, m, upper=False)
    # Far: U_p^-1 U_q has the diagonal and the norm of the transposed X.
    x_far = _whitened(factor_q, factor_p, torch.zeros_like(shift))[..., 1:]
    x = torch.where(near, x_near, x_far)
    l_near = -log1pmx_value(torch.where(near[..., 0], _diagonal(x), torch.zeros_like(_diagonal(x))))
    l_far = log_ratio_bregman_value(_diagonal(factor_q), _diagonal(factor_p))
    value = _half_square(x) + (0.5 * shift * shift).sum(-1) + torch.where(near[..., 0], l_near, l_far).sum(-1)
    is_far = ~near[..., 0, 0]
    if dtype == torch.float64 and may_hold(is_far):
        error_p, error_q = _factorisation_error(precision_p, factor_p), _factorisation_error(precision_q, factor_q)
        f = identity + x_far  # tr(P_p^-1 P_q) = |F|^2, and F was solved for
        solution = _solve(factor_p, residual(factor_q, factor_p, f.mT))
        determinants = _trace(error_p - error_q)
        trace = (f * (f @ error_q - error_p @ f)).sum((-2, -1))
        square = (shift * (error_q @ shift.unsqueeze(-1)).squeeze(-1)).sum(-1)
        value = _corrected(value, 0.5 * (determinants + trace + square) + (f * solution).sum((-2, -1)), is_far)
    return (_unless_overflowed(value, mu_p, precision_p, mu_q, precision_q).to(dtype),)


def _precision_gradient(inputs: Tensors, saved: Tensors | None) -> Tensors:
    dtype = inputs[0].dtype
    mu_p, precision_p, mu_q, precision_q = map(widened, inputs)
    shift = (mu_p - mu_q).unsqueeze(-1)
    difference = precision_p - precision_q
    half = torch.linalg.solve(precision_p, difference)  # Sp (P_p - P_q)
    d_mu = (precision_q @ shift).squeeze(-1)
    d_p = 0.5 * torch.linalg.solve(precision_p, half.mT)  # Sp (P_p - P_q) Sp / 2
    d_q = 0.5 * (shift @ shift.mT - torch.linalg.solve(precision_q, half.mT))  # (Sp - Sq + dmu dmu')/2
    return d_mu.to(dtype), _symmetric(d_p).to(dtype), -d_mu.to(dtype), _symmetric(d_q).to(dtype)


def _symmetric(a: Tensor) -> Tensor:
    return 0.5 * (a + a.mT)


_precision_kl = rowwise(_precision_value, _precision_gradient)


# ---- the three, with broadcasting -------------------------------------------------------------------------------


def _broadcast(mu_p: Tensor, a_p: Tensor, mu_q: Tensor, a_q: Tensor) -> Tensors:
    batch = broadcast_shape(mu_p.shape[:-1], a_p.shape[:-2], mu_q.shape[:-1], a_q.shape[:-2])
    return (
        mu_p.expand(batch + mu_p.shape[-1:]),
        a_p.expand(batch + a_p.shape[-2:]),
        mu_q.expand(batch + mu_q.shape[-1:]),
        a_q.expand(batch + a_q.shape[-2:]),
    )


def scale_tril_kl(mu_p: Tensor, tril_p: Tensor, mu_q: Tensor, tril_q: Tensor) -> Tensor:
    """KL from means (..., D) and lower-triangular factors (..., D, D); batch shapes broadcast."""
    return _tril_kl(*_broadcast(mu_p, tril_p, mu_q, tril_q))


def covariance_kl(mu_p: Tensor, cov_p: Tensor, mu_q: Tensor, cov_q: Tensor) -> Tensor:
    """KL from means (..., D) and covariances (..., D, D). The gradient is that of the symmetric matrices."""
    return _covariance_kl(*_broadcast(mu_p, cov_p, mu_q, cov_q))


def precision_kl(mu_p: Tensor, precision_p: Tensor, mu_q: Tensor, precision_q: Tensor) -> Tensor:
    """KL from means (..., D) and precisions (..., D, D). The gradient is that of the symmetric matrices."""
    return _precision_kl(*_broadcast(mu_p, precision_p, mu_q, precision_q))


def trace_excess(kind: str, a_p: Tensor, a_q: Tensor) -> Tensor:
    """tr(Sq^-1 Sp) - D from matrices (..., D, D) of one kind, by their difference."""
    zero = torch.zeros_like(a_p[..., 0])
    _, a_p, _, a_q = _broadcast(zero, a_p, zero, a_q)
    if kind == "scale_tril":
        x = _whitened(a_p, a_q, torch.zeros_like(a_p[..., 0]))[..., 1:]
        r = _diagonal(x)
        return (r * (2 + r)).sum(-1) + x.tril(-1).square().sum((-2, -1))
    # of precisions it is tr(Pp^-1 Pq) - D
    near, far = (a_p, a_q) if kind == "covariance_matrix" else (a_q, a_p)
    return _trace(_sandwich(_factor(far), near - far))
