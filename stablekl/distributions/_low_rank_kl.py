r"""The KL divergence of low-rank-plus-diagonal Gaussians in :math:`O(D r^2)`, with no Woodbury subtraction.

Everything is whitened by :math:`D_q^{1/2}`, in which :math:`\Sigma_q = I + V_q V_q^\top` and
:math:`\Sigma_p = \Lambda + V_p V_p^\top`; parameters enter as the differences :math:`\delta = \Lambda - 1`,
:math:`G = V_p - V_q` and m of the means.

1. The chain rule over the coordinates that the factors explain best (as many as there are factors; all of
   them in low dimension). Each adds
   :math:`\frac12 [L(s_p/s_q - 1) + E_p(\text{difference of the conditional means})^2/s_q] \ge 0` and leaves a
   problem of the same kind, in which no coordinate is explained almost entirely.
2. What is left, by the QR of :math:`[V_q; I] = [Q_1; Q_2] R`, with
   :math:`P = I - Q_1 Q_1^\top = \Sigma_q^{-1}`, in two forms of twice the KL divergence, both evaluated, and taken
   row by row where its own terms cancel less:

   - near, with :math:`\epsilon = 1 - 1/\Lambda`, :math:`H = G R^{-1}` and :math:`\lambda` the eigenvalues of
     :math:`Q_1^\top H + H^\top Q_1 + H^\top H - (Q_1 + H)^\top \epsilon (Q_1 + H)`:

     .. math:: \sum L(\delta_i) + \sum L(\lambda_j) + [\mathrm{tr}\,G^\top P G - |H|^2]
               + \sum \epsilon_i (2 Q_{1i} \cdot H_i + |H_i|^2) - \sum \delta_i \epsilon_i |Q_{1i}|^2

     Terms are subtracted, but all are of second order: near p = q nothing of first order cancels. The bracket
     has a twin for small V.
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
from ..special import log1pmx_value, log_ratio_value
from ._base import widened
from ._low_rank_factors import Conditioned, Step, Whitened, dot, eliminate, identity, largest, masked, row

__all__ = ["low_rank_kl"]


def _total(x: Tensor) -> Tensor:
    """Sum over the last two dimensions."""
    return x.sum((-2, -1))


def _squares(x: Tensor) -> Tensor:
    return _total(x * x)


def _length(a: Tensor) -> Tensor:
    return dot(a, a).sqrt()


def _bregman(excess: Tensor, log_ratio: Tensor) -> Tensor:
    """L(excess), with the logarithm of 1 + excess from elsewhere where excess has rounded towards -1."""
    close = excess > -0.5
    return torch.where(close, -log1pmx_value(masked(close, excess)), excess - log_ratio)


def _rotation(v_p: Tensor, v_q: Tensor) -> Tensor:
    """The orthogonal O for which ``v_p @ O`` is nearest to ``v_q`` where that pays, else the identity.

    Unturned, the near form is off by about eps |G|^2. Turned, it is off by eps |V| |G'| + (eps |V|)^2, since
    the product is rounded: for factors a few ulps apart that would replace exact differences by noise. Where O
    only swaps factors or their signs, it is made exact. Nearness is judged with each coordinate in units of its
    standard deviation: in units of diag_q a tiny diagonal would leave the other coordinates no say.
    """
    eye = identity(v_q.shape[-1], v_q)
    unit = (1 + dot(v_q, v_q)).rsqrt()
    v_p, v_q = v_p * unit, v_q * unit
    cross = v_p.mT @ v_q
    finite = cross.isfinite().all(-1).all(-1)[..., None, None]
    u, _, vh = torch.linalg.svd(torch.where(finite, cross, eye))
    turn = u @ vh
    eps = torch.finfo(v_q.dtype).eps
    swap = turn.round()
    exact = ((turn - swap).abs() < eps**0.5).all(-1).all(-1)
    turn = torch.where(exact[..., None, None], swap, turn)
    size, before, after = _squares(v_q), _squares(v_p - v_q), _squares(v_p @ turn - v_q)
    lost = torch.where(exact, after, (after * size).sqrt() + eps * size)
    return torch.where((lost < 0.25 * before)[..., None, None] & finite, turn, eye)


def _turned(factor: Tensor, turn: Tensor) -> Tensor:
    """``factor @ turn``, and the very same floats where ``turn`` is the identity."""
    same = (turn == identity(turn.shape[-1], turn)).all(-1).all(-1)[..., None, None]
    return torch.where(same, factor, factor @ turn)


class _Pair(NamedTuple):
    """Both distributions in the coordinates whitened by diag_q; vectors are columns ``(..., D, 1)``."""

    m: Tensor
    delta: Tensor
    lam: Tensor
    g: Tensor
    v_p: Tensor
    v_q: Tensor


def _pair(loc_p: Tensor, factor_p: Tensor, diag_p: Tensor, loc_q: Tensor, factor_q: Tensor, diag_q: Tensor) -> _Pair:
    root, diag = diag_q.sqrt()[..., None], diag_q[..., None]
    return _Pair(
        m=(loc_p - loc_q)[..., None] / root,
        delta=(diag_p - diag_q)[..., None] / diag,
        lam=diag_p[..., None] / diag,
        g=(factor_p - factor_q) / root,
        v_p=factor_p / root,
        v_q=factor_q / root,
    )


def _next_factor_difference(p: Step, q: Step, pair: _Pair, rows: _Pair, excess: Tensor, at: Tensor) -> Tensor:
    """The difference of the conditional factors: that of the reflections, then that of the scaled columns.

    Not ``p.factor - q.factor``, which is off by eps |V|, except where p is far.
    """
    g, g_j, on_p = pair.g, rows.g, dot(pair.v_p, p.w)
    flip = torch.where(masked(at, rows.v_q).sum(-1, keepdim=True) < 0, -1.0, 1.0)
    entry = flip * masked(at, rows.v_q).sum(-1, keepdim=True)  # its size; likewise its change:
    entry_change = flip * masked(at, g_j).sum(-1, keepdim=True)
    lengths = p.length + q.length
    longer = dot(g_j, rows.v_p + rows.v_q) / torch.where(lengths == 0, 1.0, lengths)
    d_w = torch.where(at, g_j + flip * longer, g_j)
    d_tau = -(longer * (2 * q.length + longer) + longer * entry + p.length * entry_change) * p.tau * q.tau
    d_on = dot(pair.v_p, d_w) + dot(g, q.w)
    g_turned = g - (d_tau * on_p + q.tau * d_on) * p.w - q.tau * dot(pair.v_q, q.w) * d_w
    d_kept = (rows.delta * q.variance - excess) / (p.variance * q.variance) / (p.kept + q.kept)
    by_difference = torch.where(at, p.kept * g_turned + d_kept * q.turned, g_turned)
    size_q = _length(pair.v_q)
    close = _length(g) + size_q * _length(g_j) * q.length * q.tau < size_q + _length(pair.v_p)
    same_side = masked(at, p.w * q.w).sum(-1, keepdim=True) > 0
    return torch.where(close & same_side, by_difference, p.factor - q.factor)


def _chain_step(pair: _Pair, j: Tensor) -> tuple[Tensor, _Pair]:
    r"""Twice the KL divergence of coordinate j, and the pair conditioned on it.

    The columns of ``m`` are the difference of the conditional means as a linear function of 1 and the
    standardised innovations of p so far; conditioning appends one.
    """
    rows = _Pair(*(row(x, j) for x in pair))
    at = largest(rows.v_q)
    lams = torch.stack([rows.lam, torch.ones_like(rows.lam)])
    both = eliminate(torch.stack([pair.v_p, pair.v_q]), torch.stack([rows.v_p, rows.v_q]), lams, at)
    p, q = both.unbind()

    excess = rows.delta + dot(rows.g, rows.v_p + rows.v_q)  # s_p - s_q
    bregman = _bregman(excess / q.variance, log_ratio_value(p.variance, q.variance))
    value = _total(bregman) + _total(rows.m * rows.m / q.variance)

    # Difference of the slopes, times sqrt(s_p): from differences, or directly where p is far and those are larger.
    rest = torch.where(at, q.turned / q.variance, q.turned)  # v_i - slope_i v_j, in the reflected basis
    g_j = rows.g - q.tau * dot(rows.g, q.w) * q.w
    sloped = q.slope * rows.delta
    by_difference = dot(rest, g_j) + dot(pair.g - q.slope * rows.g, rows.v_p) - sloped
    directly = dot(pair.v_p, rows.v_p) - q.slope * p.variance
    apart, slope = _length(rows.g), q.slope.abs()
    size = _length(pair.v_q) * apart + (_length(pair.g) + slope * apart) * p.length + sloped.abs()
    close = size < _length(pair.v_p) * p.length + slope * p.variance
    beta = torch.where(close, by_difference, directly) / p.variance.sqrt()

    g_next = _next_factor_difference(p, q, pair, rows, excess, at)
    index = torch.arange(pair.lam.shape[-2], device=pair.lam.device)[:, None]
    stays = index != j[..., None, None]
    return value, _Pair(
        m=masked(stays, torch.cat([pair.m - q.slope * rows.m, beta], -1)),
        delta=masked(stays, pair.delta),
        lam=torch.where(stays, pair.lam, 1.0),
        g=masked(stays, g_next),
        v_p=masked(stays, p.factor),
        v_q=masked(stays, q.factor),
    )


def _near(q: Whitened, pair: _Pair) -> tuple[Tensor, Tensor]:
    """The near form without the means, and the sum of its terms' sizes."""
    h = torch.linalg.solve_triangular(q.r, pair.g, upper=True, left=False)
    epsilon = pair.delta / pair.lam
    q_h = q.q1.mT @ h
    moved = q.q1 + h
    s = q_h + q_h.mT + h.mT @ h - moved.mT @ (epsilon * moved)
    s = 0.5 * (s + s.mT)
    finite = s.isfinite().all(-1).all(-1)
    lam = torch.linalg.eigvalsh(masked(finite[..., None, None], s))
    usable = finite & (lam > -1).all(-1)
    lam = masked(usable[..., None], lam)
    # tr G'PG - |H|^2, also as tr G'G (I - C^-1) - |Q1'G|^2 with I - C^-1 = V'PV. The first pair is small where V
    # is large, the second where V is small and both terms of the first are |G|^2 up to |V|^2.
    a, b = q.residual(pair.v_q)
    inside, along = q.quadratic(pair.g).sum(-1), _squares(h)
    outside = _total((pair.g.mT @ pair.g) * (a.mT @ a + b.mT @ b))
    across = _squares(q.q1.mT @ pair.g)
    first = inside + along < outside + across
    positive = _total(_bregman(pair.delta, pair.lam.log())) - log1pmx_value(lam).sum(-1)
    positive = positive + torch.where(first, inside, outside)
    negative = torch.where(first, along, across) + _total(pair.delta * epsilon * dot(q.q1, q.q1))
    mixed = epsilon * h * (2 * q.q1 + h)
    # an eigenvalue is good to eps |s|, which L'(lam) = lam / (1 + lam) magnifies near -1
    magnified = (lam / (1 + lam)).abs().amax(-1) * _squares(s).sqrt()
    size = positive + negative + _total(mixed.abs()) + magnified
    return positive - negative + _total(mixed), torch.where(usable, size, torch.inf)


def _far(q: Whitened, p: Whitened, pair: _Pair) -> tuple[Tensor, Tensor]:
    """The definition without the means, and the sum of its terms' sizes."""
    logs = pair.lam.log()
    diagonal = pair.lam * (1 - dot(q.q1, q.q1))
    spread = q.quadratic(pair.v_p).sum(-1)
    log_q, log_p = q.log_det(), p.log_det()
    value = _total(diagonal - 1 - logs) + spread + (log_q - log_p)
    return value, _total(pair.lam + 1 + logs.abs()) + spread + log_q + log_p


def _value(
    loc_p: Tensor, factor_p: Tensor, diag_p: Tensor, loc_q: Tensor, factor_q: Tensor, diag_q: Tensor
) -> tuple[Tensor, ...]:
    root = diag_q.sqrt()[..., None]
    turn = _rotation(factor_p / root, factor_q / root)
    pair = _pair(loc_p, _turned(factor_p, turn), diag_p, loc_q, factor_q, diag_q)
    d, rank = factor_p.shape[-2:]
    total = torch.zeros_like(loc_p[..., 0])
    order: list[Tensor] = []
    gone = torch.zeros_like(loc_p, dtype=torch.bool)
    index = torch.arange(d, device=loc_p.device)
    # In low dimension all of them: the chain rule alone subtracts nothing.
    for _ in range(d if d <= 2 * rank + 2 else rank):
        # The best explained next, given those before: after as many as there are factors none is far above 1.
        explained = (dot(pair.v_p, pair.v_p) / pair.lam + dot(pair.v_q, pair.v_q))[..., 0]
        j = torch.where(gone, -1.0, explained).argmax(-1)
        gone = gone | (index == j[..., None])
        order.append(j)
        step, pair = _chain_step(pair, j)
        total = total + step
    if len(order) < d:
        both = Whitened.of(torch.stack([pair.v_q, pair.v_p / pair.lam.sqrt()]))
        q, p = (Whitened(*(x[i] for x in both)) for i in range(2))
        near, near_size = _near(q, pair)
        far, far_size = _far(q, p, pair)
        rest = torch.where(near_size <= far_size, near, far)
        # No clamp: for a result known to be >= 0, |x| is never further from the truth than x. It matters only
        # where different parameters describe one covariance and the terms cancel down to their rounding errors.
        total = total + q.quadratic(pair.m).sum(-1) + rest.abs()
    return 0.5 * total, turn, torch.stack(order, -1)


def _diagonal(a: Conditioned, b: Conditioned, columns_a: Tensor, columns_b: Tensor, delta: Tensor) -> Tensor:
    r"""The diagonal of :math:`A\,\mathrm{diag}(\delta)\,B` for two inverses given with their columns J.

    Off J, an inverse is that of the QR, :math:`\Lambda^{-1/2} (I - Q_1 Q_1^\top) \Lambda^{-1/2}`, at J it is columns.
    """
    q_a, q_b = a.root * a.rest.q1, b.root * b.rest.q1
    inner = dot(q_a @ (q_a.mT @ (delta * q_b)), q_b)
    own = (a.root * b.root) ** 2
    lever = own * delta * (1 - dot(a.rest.q1, a.rest.q1) - dot(b.rest.q1, b.rest.q1))
    product = columns_a * columns_b
    through = (product @ torch.take_along_dim(delta, a.order[..., None], -2))[..., 0]
    return a.scattered((lever + inner)[..., 0] + through, (product * delta).sum(-2))


def _inverse_diagonal(c: Conditioned, columns: Tensor) -> Tensor:
    at = torch.take_along_dim(columns, c.order[..., None], -2).diagonal(dim1=-2, dim2=-1)
    return c.scattered((c.root * c.root * (1 - dot(c.rest.q1, c.rest.q1)))[..., 0], at)


def _gradient(inputs: tuple[Tensor, ...], saved: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    r"""The derivatives, each a sum of terms that hold a difference.

    From :math:`\partial/\partial\Sigma_p = \frac12 \Sigma_q^{-1} \Delta \Sigma_p^{-1}` and
    :math:`\partial/\partial\Sigma_q = -\frac12 \Sigma_q^{-1} (\Delta + m m^\top) \Sigma_q^{-1}` with
    :math:`\Delta = \Sigma_p - \Sigma_q = \delta + G V_q^\top + V_p G^\top`.
    """
    loc_p, factor_p, diag_p, loc_q, factor_q, diag_q = inputs
    root = diag_q.sqrt()[..., None]
    if saved is None:
        with torch.no_grad():  # the KL divergence depends on neither, so its derivatives do not
            _, turn, order = _value(*(x.detach() for x in inputs))
    else:
        turn, order = saved
    m, delta, lam, g, v_p, v_q = _pair(loc_p, _turned(factor_p, turn), diag_p, loc_q, factor_q, diag_q)
    both = Conditioned.of(
        torch.stack([v_q, v_p]), torch.stack([torch.ones_like(lam), lam]), torch.stack([order, order])
    )
    q, p = both.unbind()
    y_q, y_p = both.factor().unbind(0)  # the inverses P of Sigma_q and B of Sigma_p times their factors
    rank, k = g.shape[-1], order.shape[-1]
    right = torch.cat([g, q.basis(), m, delta * y_p, delta * y_q], -1)
    solved_q, solved_p = both.solve(torch.stack([right, right])).unbind(0)
    p_g, columns_q, p_m, p_dp, p_dq = torch.split(solved_q, [rank, k, 1, rank, rank], -1)
    b_g, columns_p = solved_p[..., :rank], solved_p[..., rank : rank + k]

    d_factor_p = p_dp + p_g @ p.explained(v_p, y_p) + y_q @ (g.mT @ y_p)
    d_factor_q = p_dq + p_g @ q.explained(v_q, y_q) + (y_q + p_g) @ (g.mT @ y_q) + p_m @ (m.mT @ y_q)
    d_diag_q = _diagonal(q, q, columns_q, columns_q, delta)
    d_diag_q = d_diag_q + (p_g * (2 * y_q + p_g)).sum(-1) + (p_m * p_m).sum(-1)
    # diag(P - B) = diag(P Delta B) two ways: the differences, or the two inverses as they are, whichever has the
    # smaller terms. Differences alone are off by eps |V|^2 where p is far from a large q.
    first, second = p_g * (y_p - b_g), (y_q + p_g) * b_g
    weighted = _diagonal(q, p, columns_q, columns_p, delta)
    size = weighted.abs() + (first.abs() + second.abs()).sum(-1)
    inverse_q, inverse_p = _inverse_diagonal(q, columns_q), _inverse_diagonal(p, columns_p)
    differences = weighted + (first + second).sum(-1)
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


_kl = rowwise(_value, _gradient)


def _padded(factor: Tensor, rank: int) -> Tensor:
    """``factor`` with zero columns up to ``rank``: the same covariance."""
    return torch.nn.functional.pad(factor, (0, rank - factor.shape[-1]))


def low_rank_kl(
    loc_p: Tensor, factor_p: Tensor, diag_p: Tensor, loc_q: Tensor, factor_q: Tensor, diag_q: Tensor
) -> Tensor:
    r"""KL divergence of :math:`N(\mu_p, W_p W_p^\top + D_p)` from :math:`N(\mu_q, W_q W_q^\top + D_q)`.

    Never negative, exactly 0 with gradient exactly 0 at equal parameters, in :math:`O(D r^2)`; the formula is
    that of this module's docstring.

    Args:
        loc_p: mean of p, shape ``(..., D)``.
        factor_p: factor of p, shape ``(..., D, r_p)``; ``r_p = 0`` is a diagonal Gaussian.
        diag_p: diagonal of p, variances, shape ``(..., D)``, positive.
        loc_q: mean of q, shape ``(..., D)``.
        factor_q: factor of q, shape ``(..., D, r_q)``; the ranks may differ.
        diag_q: diagonal of q, variances, shape ``(..., D)``, positive.

    Returns:
        The divergences, of the broadcast batch shape.
    """
    rank = max(factor_p.shape[-1], factor_q.shape[-1], 1)
    inputs = (loc_p, diag_p, loc_q, diag_q, factor_p, factor_q)
    dtype = inputs[0].dtype
    for x in inputs[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    loc_p, diag_p, loc_q, diag_q, first, _ = torch.broadcast_tensors(
        *(widened(x) for x in inputs[:4]), *(x.new_empty(x.shape[:-1]) for x in (factor_p, factor_q))
    )
    shape = (*first.shape, rank)
    factor_p, factor_q = (widened(_padded(w, rank)).expand(shape) for w in (factor_p, factor_q))
    return _kl(loc_p, factor_p, diag_p, loc_q, factor_q, diag_q).to(dtype)
