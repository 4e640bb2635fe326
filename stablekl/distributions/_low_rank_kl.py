r"""The KL divergence of low-rank-plus-diagonal Gaussians in :math:`O(D r^2)`, without a Woodbury subtraction.

Everything is whitened by :math:`D_q^{1/2}`, in which :math:`\Sigma_q = I + V_q V_q^\top` and
:math:`\Sigma_p = \Lambda + V_p V_p^\top`; parameters enter as the differences :math:`\delta = \Lambda - 1`,
:math:`G = V_p - V_q` and m of the means.

1. The chain rule over the coordinates that the factors explain best (as many as there are factors; all of them in low
   dimension): each adds :math:`\frac12 [L(s_p/s_q - 1) + E_p(\text{difference of the conditional means})^2/s_q] \ge 0`,
   and leaves a problem of the same kind in which no coordinate is explained almost entirely.
2. What is left, by the QR of :math:`[V_q; I] = [Q_1; Q_2] R`, with :math:`P = I - Q_1 Q_1^\top = \Sigma_q^{-1}`, in two
   forms of twice the KL divergence, both evaluated, and taken row by row where its own terms cancel less:

   - near, with :math:`\epsilon = 1 - 1/\Lambda`, :math:`H = G R^{-1}` and :math:`\lambda` the eigenvalues of
     :math:`Q_1^\top H + H^\top Q_1 + H^\top H - (Q_1 + H)^\top \epsilon (Q_1 + H)`:

     .. math:: \sum L(\delta_i) + \sum L(\lambda_j) + [\mathrm{tr}\,G^\top P G - |H|^2]
               + \sum \epsilon_i (2 Q_{1i} \cdot H_i + |H_i|^2) - \sum \delta_i \epsilon_i |Q_{1i}|^2

     Terms are subtracted, but all are of second order: near p = q nothing of first order cancels. The bracket has a twin
     for small V.
   - far, the definition: :math:`\sum (\Lambda_i P_{ii} - 1 - \log \Lambda_i) + \mathrm{tr}\,V_p^\top P V_p
     + 2 \sum \log |R_{q,jj} / R_{p,jj}|`.

:math:`W_p` and :math:`W_p O` are the same covariance for every rotation O; where :math:`W_p` is a rotation of
:math:`W_q` to far better accuracy than they are close, :math:`W_p` is turned first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._autograd import rowwise
from ..special import log1pmx_value
from ._base import widened
from ._low_rank_factors import Conditioned, Step, Whitened, eliminate, largest, pivot_order, row

__all__ = ["low_rank_kl"]


def _total(x: Tensor) -> Tensor:
    """Sum over the last two dimensions."""
    return x.sum((-2, -1))


def _squares(x: Tensor) -> Tensor:
    return _total(x * x)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _length(a: Tensor) -> Tensor:
    return _dot(a, a).sqrt()


def _pivots(d: int, rank: int) -> int:
    """How many coordinates to eliminate: all when few, since the chain rule alone subtracts nothing."""
    return d if d <= 2 * rank + 2 else rank


def _rotation(v_p: Tensor, v_q: Tensor) -> Tensor:
    """The orthogonal O for which ``v_p @ O`` is nearest to ``v_q`` where that pays, else the identity.

    Unturned, the near form is off by about eps |G|^2. Turned, it is off by eps |V| |G'| + (eps |V|)^2, since the product
    is rounded: for factors a few ulps apart that would replace exact differences by noise.
    """
    eye = torch.eye(v_q.shape[-1], dtype=v_q.dtype, device=v_q.device)
    cross = v_p.mT @ v_q
    finite = cross.isfinite().all(-1).all(-1)[..., None, None]
    u, _, vh = torch.linalg.svd(torch.where(finite, cross, eye))
    turn = u @ vh
    size, before = _squares(v_q), _squares(v_p - v_q)
    after = _squares(v_p @ turn - v_q)
    eps = torch.finfo(v_q.dtype).eps
    pays = (after * size).sqrt() + eps * size < 0.25 * before
    return torch.where(pays[..., None, None] & finite, turn, eye)


def _turned(factor: Tensor, turn: Tensor) -> Tensor:
    """``factor @ turn``, and the very same floats where ``turn`` is the identity."""
    identity = torch.eye(turn.shape[-1], dtype=turn.dtype, device=turn.device)
    same = (turn == identity).all(-1).all(-1)[..., None, None]
    return torch.where(same, factor, factor @ turn)


class _Pair(NamedTuple):
    """Both distributions in the coordinates whitened by diag_q; vectors are columns ``(..., D, 1)``."""

    m: Tensor
    delta: Tensor
    lam: Tensor
    g: Tensor
    v_p: Tensor
    v_q: Tensor


def _pair(
    loc_p: Tensor, factor_p: Tensor, diag_p: Tensor, loc_q: Tensor, factor_q: Tensor, diag_q: Tensor
) -> _Pair:
    root, diag = diag_q.sqrt()[..., None], diag_q[..., None]
    return _Pair(
        m=(loc_p - loc_q)[..., None] / root,
        delta=(diag_p - diag_q)[..., None] / diag,
        lam=diag_p[..., None] / diag,
        g=(factor_p - factor_q) / root,
        v_p=factor_p / root,
        v_q=factor_q / root,
    )


def _reflected(step: Step, x: Tensor) -> Tensor:
    return x - step.tau * _dot(x, step.w) * step.w


def _chain_step(pair: _Pair, j: Tensor) -> tuple[Tensor, _Pair]:
    r"""Twice the KL divergence of coordinate j, and the pair conditioned on it.

    The columns of ``m`` are the difference of the conditional means as a linear function of 1 and the standardised
    innovations of p so far; conditioning appends one.
    """
    m, delta, lam, g, v_p, v_q = pair
    one = torch.ones_like(row(lam, j))
    m_j, delta_j, lam_j, g_j, p_j, q_j = (row(x, j) for x in pair)
    at = largest(q_j)
    p, q = eliminate(v_p, p_j, lam_j, at), eliminate(v_q, q_j, one, at)

    excess = delta_j + _dot(g_j, p_j + q_j)  # s_p - s_q
    ratio = excess / q.variance
    close = ratio > -0.5
    bregman = torch.where(
        close,
        -log1pmx_value(torch.where(close, ratio, torch.zeros_like(ratio))),
        ratio - (p.variance.log() - q.variance.log()),
    )
    value = bregman[..., 0, 0] + (m_j * m_j).sum(-1)[..., 0] / q.variance[..., 0, 0]

    # Difference of the slopes, times sqrt(s_p): from differences, or directly where p is far and those are larger.
    by_difference = _dot(q.rest, _reflected(q, g_j)) + _dot(g - q.slope * g_j, p_j) - q.slope * delta_j
    directly = _dot(v_p, p_j) - q.slope * p.variance
    apart = _length(g_j)
    sizes = _length(v_q) * apart + (_length(g) + q.slope.abs() * apart) * _length(p_j)
    use = sizes + (q.slope * delta_j).abs() < _length(v_p) * _length(p_j) + q.slope.abs() * p.variance
    beta = torch.where(use, by_difference, directly) / p.variance.sqrt()

    # Difference of the conditional factors, the same two ways: Hp v_p - Hq v_q, then that of the scaled columns.
    entry, signed = (torch.where(at, x, torch.zeros_like(x)).sum(-1, keepdim=True) for x in (q_j, g_j))
    signed = torch.where(entry < 0, -signed, signed)
    lengths = p.length + q.length
    none = lengths == 0
    longer = _dot(g_j, p_j + q_j) / torch.where(none, torch.ones_like(lengths), lengths)
    d_w = torch.where(at, g_j + torch.where(entry < 0, -longer, longer), g_j)
    d_tau = -(longer * (2 * q.length + longer) + longer * entry.abs() + p.length * signed) * p.tau * q.tau
    on_q, on_p = _dot(v_q, q.w), _dot(v_p, p.w)
    d_on = _dot(v_p, d_w) + _dot(g, q.w)
    g_turned = g - (d_tau * on_p + q.tau * d_on) * p.w - q.tau * on_q * d_w
    d_kept = (delta_j * q.variance - excess) / (p.variance * q.variance) / (p.kept + q.kept)
    by_difference = torch.where(at, p.kept * g_turned + d_kept * q.turned, g_turned)
    use = _length(g) + _length(v_q) * apart * q.length * q.tau < _length(v_q) + _length(v_p)
    same_side = _dot(torch.where(at, p.w, torch.zeros_like(p.w)), torch.where(at, q.w, torch.zeros_like(q.w))) > 0
    g_next = torch.where(use & same_side, by_difference, p.factor - q.factor)

    index = torch.arange(lam.shape[-2], device=lam.device)[:, None]
    gone = index == j[..., None, None]

    def off(x: Tensor) -> Tensor:
        return torch.where(gone, torch.zeros_like(x), x)

    m_next = off(torch.cat([m - q.slope * m_j, beta], -1))
    left = _Pair(
        m_next, off(delta), torch.where(gone, torch.ones_like(lam), lam), off(g_next), off(p.factor), off(q.factor)
    )
    return value, left


def _near(q: Whitened, pair: _Pair) -> tuple[Tensor, Tensor]:
    """The near form without the means, and the sum of its terms' sizes."""
    h = torch.linalg.solve_triangular(q.r, pair.g, upper=True, left=False)
    epsilon = pair.delta / pair.lam
    q_h = q.q1.mT @ h
    moved = q.q1 + h
    s = q_h + q_h.mT + h.mT @ h - moved.mT @ (epsilon * moved)
    s = 0.5 * (s + s.mT)
    finite = s.isfinite().all(-1).all(-1)
    lam = torch.linalg.eigvalsh(torch.where(finite[..., None, None], s, torch.zeros_like(s)))
    usable = finite & (lam > -1).all(-1)
    lam = torch.where(usable[..., None], lam, torch.zeros_like(lam))
    close = pair.delta > -0.5
    bregman = torch.where(
        close,
        -log1pmx_value(torch.where(close, pair.delta, torch.zeros_like(pair.delta))),
        pair.delta - pair.lam.log(),
    )
    positive = _total(bregman) - log1pmx_value(lam).sum(-1)
    # tr G'PG - |H|^2, also as tr G'G (I - C^-1) - |Q1'G|^2 with I - C^-1 = V'PV. The first pair is small where V is
    # large, the second where V is small and both terms of the first are |G|^2 up to |V|^2.
    a, b = q.residual(pair.v_q)
    inside, along = q.quadratic(pair.g).sum(-1), _squares(h)
    outside, across = _total((pair.g.mT @ pair.g) * (a.mT @ a + b.mT @ b)), _squares(q.q1.mT @ pair.g)
    first = inside + along < outside + across
    positive = positive + torch.where(first, inside, outside)
    negative = torch.where(first, along, across) + _total(pair.delta * epsilon * _dot(q.q1, q.q1))
    mixed = epsilon * h * (2 * q.q1 + h)
    # an eigenvalue is good to eps |s|, which L'(lam) = lam / (1 + lam) magnifies near -1
    magnified = (lam / (1 + lam)).abs().amax(-1) * _squares(s).sqrt()
    size = positive + negative + _total(mixed.abs()) + magnified
    size = torch.where(usable, size, torch.full_like(size, torch.inf))
    return positive - negative + _total(mixed), size


def _far(q: Whitened, pair: _Pair) -> tuple[Tensor, Tensor]:
    """The definition without the means, and the sum of its terms' sizes."""
    p = Whitened.of(pair.v_p / pair.lam.sqrt())
    logs = pair.lam.log()
    diagonal = pair.lam * (1 - _dot(q.q1, q.q1))
    spread = q.quadratic(pair.v_p).sum(-1)
    value = _total(diagonal - 1 - logs) + spread + (q.log_det() - p.log_det())
    return value, _total(pair.lam + 1 + logs.abs()) + spread + q.log_det() + p.log_det()


def _order(pair: _Pair) -> Tensor:
    return pivot_order(pair.v_p / pair.lam.sqrt(), pair.v_q, _pivots(*pair.g.shape[-2:]))


def _value(
    loc_p: Tensor, factor_p: Tensor, diag_p: Tensor, loc_q: Tensor, factor_q: Tensor, diag_q: Tensor
) -> tuple[Tensor, ...]:
    root = diag_q.sqrt()[..., None]
    turn = _rotation(factor_p / root, factor_q / root)
    pair = _pair(loc_p, _turned(factor_p, turn), diag_p, loc_q, factor_q, diag_q)
    order = _order(pair)
    total = torch.zeros_like(loc_p[..., 0])
    for j in order.unbind(-1):
        step, pair = _chain_step(pair, j)
        total = total + step
    if order.shape[-1] < loc_p.shape[-1]:
        q = Whitened.of(pair.v_q)
        near, near_size = _near(q, pair)
        far, far_size = _far(q, pair)
        rest = torch.where(near_size <= far_size, near, far)
        # No clamp: for a result known to be >= 0, |x| is never further from the truth than x. It matters only where
        # different parameters describe one covariance and the terms cancel down to their rounding errors.
        total = total + q.quadratic(pair.m).sum(-1) + rest.abs()
    return 0.5 * total, turn, order


def _gradient(inputs: tuple[Tensor, ...], saved: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    r"""From :math:`\partial/\partial\Sigma_p = \frac12 \Sigma_q^{-1} \Delta \Sigma_p^{-1}` and
    :math:`\partial/\partial\Sigma_q = -\frac12 \Sigma_q^{-1} (\Delta + m m^\top) \Sigma_q^{-1}`,
    :math:`\Delta = \Sigma_p - \Sigma_q = \delta + G V_q^\top + V_p G^\top`, column by column: every term holds a difference.
    """
    loc_p, factor_p, diag_p, loc_q, factor_q, diag_q = inputs
    root = diag_q.sqrt()[..., None]
    if saved is None:
        with torch.no_grad():  # the KL divergence depends on neither, so its derivatives do not
            turn = _rotation(factor_p / root, factor_q / root)
            order = _order(_pair(loc_p, _turned(factor_p, turn), diag_p, loc_q, factor_q, diag_q))
    else:
        turn, order = saved
    m, delta, lam, g, v_p, v_q = _pair(loc_p, _turned(factor_p, turn), diag_p, loc_q, factor_q, diag_q)
    q, p = Conditioned.of(v_q, torch.ones_like(diag_q), order), Conditioned.of(v_p, lam[..., 0], order)

    # The inverses times their own factors never cancel.
    y_q, y_p = q.factor(), p.factor()
    p_g, b_g, p_m = q.solve(g), p.solve(g), q.solve(m)
    d_factor_p = q.solve(delta * y_p) + p_g @ p.explained() + y_q @ (g.mT @ y_p)
    d_factor_q = q.solve(delta * y_q) + p_g @ q.explained() + (y_q + p_g) @ (g.mT @ y_q) + p_m @ (m.mT @ y_q)

    d_diag_q = _diagonal(q, q, delta) + (p_g * (2 * y_q + p_g)).sum(-1) + (p_m * p_m).sum(-1)
    # diag(P - Sp^-1) = diag(P Delta Sp^-1) two ways: the differences, or the two inverses as they are, whichever has
    # the smaller terms. Differences alone are off by eps |V|^2 where p is far from a large q.
    first, second = p_g * (y_p - b_g), (y_q + p_g) * b_g
    weighted = _diagonal(q, p, delta)
    differences = weighted + (first + second).sum(-1)
    size = weighted.abs() + (first.abs() + second.abs()).sum(-1)
    inverse_q, inverse_p = _inverse_diagonal(q), _inverse_diagonal(p)
    d_diag_p = torch.where(size < inverse_q + inverse_p, differences, inverse_q - inverse_p)

    d_loc = (p_m / root)[..., 0]
    return (
        d_loc,
        _turned(d_factor_p, turn.mT) / root,
        0.5 * d_diag_p / diag_q,
        -d_loc,
        -d_factor_q / root,
        -0.5 * d_diag_q / diag_q,
    )


def _scattered(x: Tensor, order: Tensor, rows: Tensor) -> Tensor:
    """``x`` (..., D) with the entries ``order`` replaced by ``rows`` (..., k)."""
    return x.scatter(-1, order, rows)


def _diagonal(q: Conditioned, p: Conditioned, delta: Tensor) -> Tensor:
    r"""The diagonal of :math:`P_q \,\mathrm{diag}(\delta) P_p`.

    Off the eliminated coordinates J an inverse is that of the QR, :math:`\Lambda^{-1/2} (I - Q_1 Q_1^\top) \Lambda^{-1/2}`; its
    columns J are explicit.
    """
    column_q, column_p = q.columns(), p.columns()
    delta_j = torch.take_along_dim(delta[..., 0], q.order, -1)[..., None, :]
    through = (column_q * delta_j * column_p).sum(-1)
    y_q, y_p = q.root * q.q1, p.root * p.q1
    own = q.root * p.root
    inner = _dot(y_q @ (y_q.mT @ (delta * y_p)), y_p)
    lever = own * own * delta * (1 - _dot(q.q1, q.q1) - _dot(p.q1, p.q1))
    rows = (column_q * delta * column_p).sum(-2)
    return _scattered((lever + inner)[..., 0] + through, q.order, rows)


def _inverse_diagonal(c: Conditioned) -> Tensor:
    """The diagonal of the inverse."""
    columns = torch.take_along_dim(c.columns(), c.order[..., None], -2).diagonal(dim1=-2, dim2=-1)
    return _scattered((c.root * c.root * (1 - _dot(c.q1, c.q1)))[..., 0], c.order, columns)


_kl = rowwise(_value, _gradient)


def _padded(factor: Tensor, rank: int) -> Tensor:
    """``factor`` with zero columns up to ``rank``: the same covariance."""
    return torch.nn.functional.pad(factor, (0, rank - factor.shape[-1]))


def low_rank_kl(
    loc_p: Tensor, factor_p: Tensor, diag_p: Tensor, loc_q: Tensor, factor_q: Tensor, diag_q: Tensor
) -> Tensor:
    r"""KL divergence of :math:`N(\mu_p, W_p W_p^\top + D_p)` from :math:`N(\mu_q, W_q W_q^\top + D_q)`.

    Never negative, exactly 0 with gradient exactly 0 at equal parameters, in :math:`O(D r^2)`. The formula is that of this
    module's docstring.

    Args:
        loc_p: mean of p, shape ``(..., D)``.
        factor_p: factor of p, shape ``(..., D, r_p)``; ``r_p = 0`` is a diagonal Gaussian.
        diag_p: diagonal of p, shape ``(..., D)``, positive.
        loc_q: mean of q, shape ``(..., D)``.
        factor_q: factor of q, shape ``(..., D, r_q)``; the ranks may differ.
        diag_q: diagonal of q, shape ``(..., D)``, positive.

    Returns:
        The divergences, of the broadcast batch shape.
    """
    rank = max(factor_p.shape[-1], factor_q.shape[-1], 1)
    dtype = torch.promote_types(factor_p.dtype, factor_q.dtype)
    vectors = torch.broadcast_tensors(
        loc_p, diag_p, loc_q, diag_q, factor_p.new_empty(factor_p.shape[:-1]), factor_q.new_empty(factor_q.shape[:-1])
    )
    shape = (*vectors[0].shape, rank)
    loc_p, diag_p, loc_q, diag_q = (widened(x) for x in vectors[:4])
    factor_p, factor_q = (widened(_padded(w, rank)).expand(shape) for w in (factor_p, factor_q))
    return _kl(loc_p, factor_p, diag_p, loc_q, factor_q, diag_q).to(dtype)
