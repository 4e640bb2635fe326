r"""A Gaussian against a mixture of three, in any dimension: pairs, and one integral over a plane.

For q = v1 q1 + v2 q2 + v3 q3 and the log-ratios y_i(x) = log(v_i q_i/(v1 q1)), i = 2 and 3,

.. math::
    KL(p \| q) = KL(p \| q_1) - \log v_1 - E\,\mathrm{softplus}(y_2) - E\,\mathrm{softplus}(y_3)
        + E\,g(e^{y_2}, e^{y_3}), \qquad g(a, b) = \log\frac{(1 + a)(1 + b)}{1 + a + b} \ge 0,

expectations under p. Those of softplus are the contour integrals of `contour`. The rest, g being the integral over
t > 0 of :math:`e^{-t} (1 - e^{-ta}) (1 - e^{-tb}) / t`, is one in two variables, of Mellin and Barnes, 0 < Re s_i < 1:

.. math::
    E\,g = \frac1{(2\pi i)^2} \int\!\!\int \Gamma(-s_2)\,\Gamma(-s_3)\,\Gamma(s_2 + s_3)\, M(s)\,ds_2\,ds_3, \qquad
    M(s) = E_p e^{s_2 y_2 + s_3 y_3}.

With :math:`y_i(z) = c_i + b_i^\top z - \tfrac12 z^\top K_i z` in coordinates z that whiten p,

.. math::
    \log M(s) = s \cdot c - \tfrac12 \log\det(I + s \cdot K)
        + \tfrac12 (s \cdot b)^\top (I + s \cdot K)^{-1} (s \cdot b),

finite where I + s.K is positive definite.

**The plane** is fitted to each integrand. On the real points of the domain the integrand is positive and log-convex,
and infinite on the boundary: the plane crosses at its minimum, which Newton's method finds, and is measured in the
coordinates that make the logarithm's Hessian there the identity. So neither the distance of the components nor their
widths in units of p matter (for p a hundred times wider than the components, the minimum is at s = 1e-5).

**Polar nodes**, s = s0 + i r u: along a ray, I + s0.K + i r u.K is one real symmetric pencil, an eigendecomposition for
each direction u, everything else elementwise, and no branch of a logarithm to choose. With y_j its eigenvalues, x_j = r
y_j, and h_j the component of the slope at the saddle's tilted mean,

.. math::
    \log\frac{M(s)}{M(s_0)} = i r\,u \cdot \nabla\log M(s_0) - \sum_j \Bigl[\tfrac14\log(1 + x_j^2)
        + \tfrac{r^2}2 \frac{h_j^2}{1 + x_j^2}\Bigr] + \tfrac i2 \sum_j \Bigl[x_j - \arctan x_j
        + r^3 \frac{h_j^2 y_j}{1 + x_j^2}\Bigr],

whose real part has terms of one sign. The radii are those of a trapezoid rule for r = exp(t - exp(-t)), since M decays
like a Gaussian or, where p is wide, like a power. The directions are those of a periodic one, dense about the three
in which the kernel does not decay by itself, and doubled until the result stays.

**Accuracy** (float64): the error asked for, of 1 + E g, down to 1e-11, and 1e-13 (1 + KL) of rounding; the reported one
is the change of the last doubling of the rays, and what the radii leave by their series of changes. None of 3,500
problems with known truths, p from 100 times narrower to 1e4 times wider, was beyond it, but for 9 by 2e-12: of the
narrow p's seen through a linear map, whose rounding that is.

References: R. B. Paris and D. Kaminski, "Asymptotics and Mellin-Barnes Integrals", Cambridge University Press (2001);
L. N. Trefethen and J. A. C. Weideman, "The exponentially convergent trapezoidal rule", SIAM Review 56 (2014), 385-458.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..._autograd import is_dual, is_eager, rowwise
from ..components import Components, chosen_components
from .contour import contour_kl
from .contour_plane_terms import DIRECTIONS, LogRatios, Rule, Saddle, integrand, log_ratios, rays, reach, saddle
from .overlaps import divergences

__all__ = ["contour_kl_of_three", "excess_of_three"]

# How often directions and radii are doubled at most: 1,024 directions in half a turn, steps of 0.016.
TURNS, FINE = 4, 3
# How much slower than the last halving of the steps the next may converge.
SLOWER = 4.0
# Nodes x dimensions of a block of rows: temporaries stay small, whatever the batch.
BLOCK = 2**19
EPS = 2.0**-52
# Rounding errors of the pairs, in eps of 1 + KL: no more is asked of the plane.
ROUNDING = 64.0


def _radii(rule: Rule) -> int:
    """About how many."""
    return (rule.reach + 3) * 8 << rule.fine


def _blocks(rows: int, dim: int, rule: Rule) -> list[slice]:
    step = max(1, BLOCK // ((DIRECTIONS << rule.turns) * _radii(rule) * dim))
    return [slice(i, i + step) for i in range(0, rows, step)]


def _pieces(rows: int, dim: int, rule: Rule) -> list[slice]:
    """The rays of a block, all of them but for very many nodes in many dimensions."""
    count = DIRECTIONS << rule.turns
    step = max(8, min(count, 4 * BLOCK // (rows * _radii(rule) * dim)))
    return [slice(i, i + step) for i in range(0, count, step)]


class _Sums(NamedTuple):
    """E g, an estimate of what its radii miss, and of the rounding errors of the phases, [B]."""

    value: Tensor
    radial: Tensor
    rounding: Tensor


def _sums(y: LogRatios, at: Saddle, rule: Rule, diagonal: bool) -> _Sums:
    parts = []
    for piece in _pieces(len(y.level), y.slope.shape[-1], rule):
        along = rays(y, at, rule, diagonal, piece)
        kappa, _, r = integrand(y, at, along, rule)
        whole, half, quarter = (n * kappa.real[..., ::n].sum(-1) for n in (1, 2, 4))
        phase = 1 + r * (along.direction * y.level.unsqueeze(-2)).sum(-1, keepdim=True).abs()
        rounding = (kappa.abs() * phase).sum((-2, -1))
        parts.append((whole.sum(-1), (whole - half).abs().sum(-1), (half - quarter).abs().sum(-1), rounding))
    value, last, before, rounding = (torch.stack(x).sum(0) for x in zip(*parts, strict=True))
    # Halving the steps changes each ray's sum by so much, and before that by so much: what is left goes on like that.
    # Of the sum over the rays the changes may be small by chance (an error 230 times the claim).
    radial = last * (SLOWER * last / before.clamp(min=1e-300)).clamp(max=1.0)
    return _Sums(value, radial, 8 * EPS * rounding)


def _partials(y: LogRatios, at: Saddle, rule: Rule, diagonal: bool) -> LogRatios:
    """Derivatives of E g by the parts of y."""
    pieces = _pieces(len(y.level), 4 * y.slope.shape[-1], rule)
    parts = [_partials_of_rays(y, at, rule, diagonal, piece) for piece in pieces]
    return parts[0] if len(parts) == 1 else LogRatios(*(torch.stack(x).sum(0) for x in zip(*parts, strict=True)))


def _partials_of_rays(y: LogRatios, at: Saddle, rule: Rule, diagonal: bool, piece: slice) -> LogRatios:
    """Sums over the nodes of Re(kappa d log M), by eigenvectors of each ray."""
    along = rays(y, at, rule, diagonal, piece)
    kappa, s, r = integrand(y, at, along, rule)
    weight = kappa.unsqueeze(-1) * s  # [B, n, r, 2]
    by_level = weight.real.sum((1, 2))
    x = r.unsqueeze(-1) * along.eigenvalue.unsqueeze(-2)
    inverse = 1 / torch.complex(torch.ones_like(x), x)
    push, pull = along.push.unsqueeze(-2), r.unsqueeze(-1) * along.pull.unsqueeze(-2)
    mean = torch.complex(push.expand_as(pull), pull) * inverse  # of the tilted Gaussian, [B, n, r, D]
    w = weight.mT  # [B, n, 2, r]
    by_slope, spread = (w @ mean).real, (w @ inverse).real  # [B, n, 2, D]
    if along.vectors is None:
        square = spread + (w @ (mean * mean)).real
        root = at.root.unsqueeze(-2)
        return LogRatios(by_level, by_slope.sum(1) / root, -0.5 * square.sum(1) / root / root)
    # mean mean' summed over the radii, for each ray and log-ratio
    outer = ((w.unsqueeze(-1) * mean.unsqueeze(2)).mT @ mean.unsqueeze(2)).real + torch.diag_embed(spread)
    vectors, root = along.vectors, at.root
    by_slope = (vectors @ by_slope.mT).sum(1)  # [B, D, 2]
    outer = (vectors.unsqueeze(2) @ outer @ vectors.unsqueeze(2).mT).sum(1)
    by_slope = torch.linalg.solve_triangular(root.mT, by_slope, upper=True).mT
    back = root.mT.unsqueeze(1)
    half = torch.linalg.solve_triangular(back, outer, upper=True)
    whole = torch.linalg.solve_triangular(back, half.mT, upper=True)
    return LogRatios(by_level, by_slope, -0.25 * (whole + whole.mT))


def _moving(y: LogRatios, at: Saddle, rule: Rule, diagonal: bool) -> LogRatios:
    """The same by an inverse at each node: differentiable, also where eigenvalues coincide."""
    still = LogRatios(*(x.detach() for x in y))
    kappa, s, _ = integrand(still, at, rays(still, at, rule, diagonal), rule)
    kappa, s = kappa.flatten(1), s.flatten(1, 2)  # [B, N], [B, N, 2]
    dtype = s.dtype
    c, b, k = (x.to(dtype) for x in y)
    push, mixed = s @ b, (s @ k.flatten(2)).unflatten(-1, k.shape[2:])
    if diagonal:
        inverse = 1 / (1 + mixed)
        mean = inverse * push
        log_det = -torch.log(inverse).sum(-1)
        second = inverse + mean * mean
    else:
        whole = torch.eye(b.shape[-1], dtype=dtype, device=b.device) + mixed
        inverse = torch.linalg.inv(whole)
        mean = (inverse @ push.unsqueeze(-1)).squeeze(-1)
        sign, size = torch.linalg.slogdet(whole)
        log_det = torch.log(sign) + size
        second = inverse + mean.unsqueeze(-1) * mean.unsqueeze(-2)
    log_m = (s @ c.unsqueeze(-1)).squeeze(-1) - 0.5 * log_det + 0.5 * (push * mean).sum(-1)
    weight = (kappa * torch.exp(log_m - log_m.detach())).unsqueeze(-1) * s
    turned = weight.mT
    by_curvature = -0.5 * (turned @ second.flatten(2)).real.unflatten(-1, second.shape[2:])
    return LogRatios(weight.real.sum(1), (turned @ mean).real, by_curvature)


@functools.lru_cache(maxsize=256)
def _engine(rule: Rule, diagonal: bool) -> Callable[..., Tensor]:
    """E g of flattened rows by one rule; differentiable by the log-ratios any number of times."""

    def by_blocks(f: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], size: int) -> tuple[Tensor, ...]:
        parts = []
        for i in _blocks(len(inputs[0]), size, rule):
            y, at = LogRatios(*(x[i] for x in inputs[:3])), Saddle(*(x[i] for x in inputs[3:]))
            parts.append(f(y, at, rule, diagonal))
        return tuple(torch.cat(x) for x in zip(*parts, strict=True))

    def value(*inputs: Tensor) -> tuple[Tensor, ...]:
        return by_blocks(_sums, inputs, inputs[1].shape[-1])[:1]

    def gradient(inputs: tuple[Tensor, ...], saved: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        dim = inputs[1].shape[-1]
        partials = by_blocks(_partials, [x.detach() for x in inputs], 4 * dim)
        if saved is None:
            moving = by_blocks(
                _moving, (*inputs[:3], *(x.detach() for x in inputs[3:])), dim if diagonal else dim * dim
            )
            partials = tuple(e + (m - m.detach()) for e, m in zip(partials, moving, strict=True))
        return (*partials, *(torch.zeros_like(x) for x in inputs[3:]))

    return rowwise(value, gradient)


def _taken(x: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    return [a.index_select(0, index) for a in x]


def _refined(y: LogRatios, at: Saddle, far: int, goal: Tensor, diagonal: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value, error and rule (doublings of rays and of radii) of each row: as many nodes as its goal takes."""
    value, error = torch.zeros_like(goal), torch.full_like(goal, torch.inf)
    turns, fine = torch.zeros_like(goal, dtype=torch.int64), torch.zeros_like(goal, dtype=torch.int64)
    # rays, radii, rows, and what half of the rays gave
    todo: list[tuple[int, int, Tensor, Tensor | None]] = [(0, 0, torch.arange(len(goal), device=goal.device), None)]
    while todo:
        t, f, index, coarse = todo.pop()
        rule = Rule(t, f, far)
        parts = [
            _sums(LogRatios(*_taken(y, index[i])), Saddle(*_taken(at, index[i])), rule, diagonal)
            for i in _blocks(len(index), y.slope.shape[-1], rule)
        ]
        new = _Sums(*(torch.cat(x) for x in zip(*parts, strict=True)))
        finer = (new.radial > 0.3 * goal[index]) & (f < FINE)
        known = torch.full_like(new.value, torch.inf) if coarse is None else (new.value - coarse).abs()
        error[index] = (known + new.radial + new.rounding).nan_to_num(nan=torch.inf)
        value[index], turns[index], fine[index] = new.value, t, f
        wider = (known > 0.6 * goal[index]) & ~finer & (t < TURNS)
        if bool(finer.any()):
            todo.append((t, f + 1, index[finer], None if coarse is None else coarse[finer]))
        if bool(wider.any()):
            todo.append((t + 1, f, index[wider], new.value[wider]))
    return value, error, turns, fine


def excess_of_three(rows: Components, p_loc: Tensor, p_scale: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """E g of the module's head, under Gaussians p, and an estimate of its error; eager mode only.

    Args:
        rows: three components each, the reference first, ``(B, 3)``.
        p_loc: p's means, ``(B, D)``.
        p_scale: p's standard deviations ``(B, D)`` or factors ``(B, D, D)``, as those of ``rows``.
        goal: the error asked for, ``(B,)``.

    Returns:
        E g >= 0, differentiable, and its error, inf where there is no saddle to be found; of shape ``(B,)``. Exactly 0
        beside a weight of zero.
    """
    diagonal = rows.is_diagonal
    dead = (rows.log_weights == -torch.inf).any(-1)
    log_weights = torch.where(dead.unsqueeze(-1), 0.0, rows.log_weights)
    with torch.no_grad():
        still = log_ratios(log_weights, p_loc, p_scale, rows.loc, rows.scale)
        finite = torch.stack([x.isfinite().flatten(1).all(-1) for x in still]).all(0)
    # what overflows must not meet a derivative of 0: p itself in its place
    scale = torch.where(finite.reshape(-1, *(1,) * (rows.scale.ndim - 1)), rows.scale, p_scale.detach().unsqueeze(1))
    loc = torch.where(finite[:, None, None], rows.loc, p_loc.detach().unsqueeze(1))
    y = log_ratios(log_weights, p_loc, p_scale, loc, scale)
    with torch.no_grad():
        live = (finite & ~dead).nonzero().squeeze(-1)
        chosen = LogRatios(*_taken(still, live))
        at = saddle(chosen, diagonal)
        value, error = torch.zeros_like(goal), torch.where(dead, 0.0, torch.inf).to(goal.dtype)
        rules = torch.zeros(len(live), 3, dtype=torch.int64, device=goal.device)
        far = torch.where(at.found, reach(at), -1)
        for r in far.unique().tolist():
            index = (far == r).nonzero().squeeze(-1)
            if r >= 0:
                here = LogRatios(*_taken(chosen, index)), Saddle(*_taken(at, index))
                part, part_error, turns, fine = _refined(*here, r, goal[live[index]], diagonal)
                value[live[index]], error[live[index]] = part, part_error
                rules[index] = torch.stack([turns, fine, torch.full_like(fine, r)], -1)
        sure = error[live].isfinite().nonzero().squeeze(-1)
    if not (is_dual(y) or (torch.is_grad_enabled() and any(x.requires_grad for x in y))):
        return value, error
    value = value + 0 * y.level.sum(-1).nan_to_num(0.0, 0.0, 0.0)  # a backward has something to follow, always
    for rule in {Rule(*x) for x in rules[sure].tolist()}:
        index = sure[(rules[sure] == torch.tensor(rule, device=goal.device)).all(-1)]
        plane = _engine(rule, diagonal)
        value = value.index_copy(0, live[index], plane(*_taken(y, live[index]), *_taken(at, index)))
    return value, error


def contour_kl_of_three(p: Components, q: Components, rtol: float) -> tuple[Tensor, Tensor]:
    r"""KL divergence of each component of ``p`` to the mixture ``q`` of three, KL(p_k || q); eager mode only.

    Evaluated by the formula of the module's head, the first component of q being that of the smallest
    ``KL(p_k || q_j) - log v_j``.

    Args:
        p: any number K of Gaussian components, float64, ``(rows, K)``.
        q: three of them, ``(rows, 3)``.
        rtol: the error asked for, relative to 1 and the most that E g can be: the smaller E softplus.

    Returns:
        The divergences in nats, differentiable, and an estimate of their absolute errors, both of shape ``(rows, K)``.
        Where there is no plane E g is left out, and what it can be at most is in the error.

    Raises:
        NotImplementedError: under vmap, torch.compile or CUDA graph capture.
    """
    if not is_eager(*p, *q):
        raise NotImplementedError(
            "the contour integral for a mixture q of three components chooses its nodes by the data, which vmap, "
            "torch.compile and CUDA graphs do not show; use method='auto', which takes fixed points there"
        )
    rows, k = p.log_weights.shape
    lv = q.log_weights
    cost = divergences(p, q) - torch.where(lv > -torch.inf, lv, -1e300).unsqueeze(-2)  # (rows, K, 3)
    order = cost.detach().argsort(-1)
    every = Components(*(x.unsqueeze(1).expand(rows, k, *x.shape[1:]) for x in q))
    ordered = chosen_components(every, order)
    nearest = cost.gather(-1, order[..., :1]).squeeze(-1)
    one = Components(torch.zeros_like(p.log_weights).unsqueeze(-1), p.loc.unsqueeze(-2), p.scale.unsqueeze(2))
    total, error = -nearest, torch.zeros_like(nearest.detach())
    most = torch.full_like(error, torch.inf)
    for j in (1, 2):
        pair = chosen_components(ordered, torch.tensor([0, j], device=lv.device).expand(rows, k, 2))
        weight = torch.logaddexp(pair.log_weights[..., 0], pair.log_weights[..., 1])
        apart, part_error = contour_kl(one, pair._replace(log_weights=pair.log_weights - weight.unsqueeze(-1)))
        apart, part_error = apart.squeeze(-1) - weight, part_error.squeeze(-1)
        total, error = total + apart, error + part_error
        # g is no more than either softplus: where that is nothing, so is E g, and no plane is needed (or to be found)
        most = torch.minimum(most, (nearest - apart).detach().clamp(min=0) + part_error)
    # relative to what E g may be, not to the divergence: the gradient is only as good
    rounding = ROUNDING * EPS * (1 + nearest.detach())
    goal = torch.maximum(rtol * (1 + most), rounding)
    index = (most > rounding).flatten().nonzero().squeeze(-1)
    flat = Components(*(x.flatten(0, 1).index_select(0, index) for x in ordered))
    loc, scale = (x.flatten(0, 1).index_select(0, index) for x in p[1:])
    part, part_error = excess_of_three(flat, loc, scale, goal.flatten()[index])
    useless = part_error > most.flatten()[index]
    part = torch.where(useless, 0.0, part)
    part_error = torch.where(useless, most.flatten()[index], part_error)
    excess = torch.zeros_like(total).flatten().index_copy(0, index, part).reshape(rows, k)
    excess_error = most.flatten().index_copy(0, index, part_error).reshape(rows, k)
    return total + excess, error + excess_error
