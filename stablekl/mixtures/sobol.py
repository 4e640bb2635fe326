r"""KL divergence of Gaussian mixtures by scrambled Sobol points: any number of components, any dimension.

Every component in turn is sampled by the same fixed standard normal points, x = loc_k + L_k z, and weighted
by its exact weight. The points never change, so that the result is a deterministic, smooth function of the
parameters, and its gradient through x is the exact derivative of the value returned. Replicates
(independent scrambles) give the error.

Most points come from p, some from q. With u = log(p/q), s = a p + (1 - a) q and a = 7/8,

    KL(p || q) = \int q phi(u) dx = a E_p[F(u)] + (1 - a) E_q[F(u)],    F(u) = (p u - p + q)/s >= 0.

Why not points of p alone: the mean of u is noisy near p = q (its variance is of first order, F's of second:
1000 times the error at KL = 1e-7) and may come out negative; u + expm1(-u) is positive, but its variance is
that of q/p, infinite as soon as q is wider than p by more than sqrt(2) (30 times the error of u at
D = 1, means 5 apart). F is never more than 8 where q > p and grows as u/a where p > q: measured, its error
is that of whichever of the two is better, within a factor of 2. Equal numbers of both (a = 1/2) cost twice
the error far apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._autograd import is_plain, rowwise
from ..quadrature import sobol_normals, student_t_half_width
from ..special import expm1mx, expm1mx_value, logsumexp
from .components import Components
from .controls import Controls, fit
from .density import component_log_probs, mixture_log_prob
from .line import expm1

__all__ = ["PILOT", "blocks", "points", "sobol_information", "sobol_kl", "summary"]

# Elements of the points' coordinates per block in eager mode: 8 MiB in float64.
BLOCK = 2**20
# Measured: the t interval covers the truth in 90 to 99 % of the problems of a setting, not in 95 %, for two reasons.
# The scrambles are fixed, so that similar problems share their luck; and whoever doubles the points until the estimated
# error is small favours underestimates. Wider by half, it covers 95 % in every setting (tests/test_kl_estimate.py).
WIDENING = 1.5
# The share of p in the sampling density. It sets the rates at which q/p is bounded, and is not tuned.
SHARE = 0.875
# Points of each replicate and stratum that the control variates' coefficients are fitted to.
PILOT = 256


def _excess_value(u: Tensor) -> tuple[Tensor]:
    small = u.abs() < 1.0
    near = torch.where(small, u, 0.0)
    ratio = torch.exp(-u.abs())  # q/p or p/q, whichever is at most 1
    above = (u - 1.0 + ratio) / (SHARE + (1.0 - SHARE) * ratio)
    # exp underflows long before u does: no 0 * inf
    below = (ratio * (torch.clamp(u, min=-1e3) - 1.0) + 1.0) / (SHARE * ratio + (1.0 - SHARE))
    here = expm1mx_value(-near) / (1.0 + (1.0 - SHARE) * torch.expm1(-near))
    return (torch.where(small, here, torch.where(u > 0, above, below)),)


def _excess_slope(inputs: tuple[Tensor, ...], saved: tuple[Tensor, ...] | None) -> tuple[Tensor]:
    """``F' = (a (1 - e^-u) + (1 - a) u e^-u)/(a + (1 - a) e^-u)^2``: two terms of one sign."""
    (u,) = inputs
    negative = u < 0
    size = torch.where(negative, -u, u)  # not abs: its derivative at 0 is 0, and F'' there is 1
    ratio = torch.exp(-size)
    change = -SHARE * expm1(-size)
    above = (change + (1.0 - SHARE) * size * ratio) / (SHARE + (1.0 - SHARE) * ratio) ** 2
    # exp underflows long before the size of u overflows
    grown = change + (1.0 - SHARE) * torch.clamp(size, max=1e3)
    below = -ratio * grown / (SHARE * ratio + (1.0 - SHARE)) ** 2
    return (torch.where(negative, below, torch.where(negative, 0.0, above)),)


_excess = rowwise(_excess_value, _excess_slope)


def points(components: Components, k: int, z: Tensor) -> Tensor:
    """``loc_k + L_k z`` for normals of shape (R, N, D): shape ``(R, N) + batch_shape + (D,)``."""
    loc, scale = components.loc[..., k, :], components.scale
    z = z.reshape(*z.shape[:2], *(1,) * (loc.ndim - 1), z.shape[-1])
    if components.is_diagonal:
        return loc + scale[..., k, :] * z
    return loc + (scale[..., k, :, :] @ z.unsqueeze(-1)).squeeze(-1)


def blocks(components: Components, z: Tensor) -> list[Tensor]:
    """The points in blocks of bounded memory; one block inside transforms."""
    if not is_plain(tuple(components)):
        return [z]
    per_point = z.shape[0] * components.loc[..., 0, :].numel()
    return list(torch.split(z, max(1, BLOCK // max(1, per_point)), dim=1))


def summary(means: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 95 % half-width of the replicates' results, shape ``(R,) + batch_shape``."""
    half_width = student_t_half_width(means.shape[0]) * means.detach().std(0)
    return means.mean(0), WIDENING * half_width


def sobol_kl(p: Components, q: Components, *, num_points: int = 2048, num_replicates: int = 8) -> tuple[Tensor, Tensor]:
    r"""``KL(p || q)`` by stratified scrambled Sobol points of both mixtures; see the module's formula.

    Args:
        p: the first mixture, float64.
        q: the second, with the same batch shape.
        num_points: points per component of p and replicate, an eighth of it for q; a power of two.
        num_replicates: independent scrambles, at least 2.

    Returns:
        The divergence (>= 0; 0 with gradient 0 when the parameters are equal) and the half-width of its
        95 % confidence interval (not differentiable), both of the batch shape.

    Raises:
        ValueError: for fewer than two replicates or more than 21201 dimensions.
    """
    total = torch.zeros((num_replicates, *p.loc.shape[:-2]), dtype=p.loc.dtype, device=p.loc.device)
    normals = sobol_normals(p.loc.shape[-1], num_points, num_replicates, p.loc.device)
    for source, share, n in ((p, SHARE, num_points), (q, 1.0 - SHARE, max(1, num_points // 8))):
        z = normals[:, :n]
        for k in range(source.loc.shape[-2]):
            weight = torch.exp(source.log_weights[..., k]) * (share / n)
            for block in blocks(source, z):
                x = points(source, k, block)
                u = mixture_log_prob(x, p) - mixture_log_prob(x, q)
                total = total + weight * _excess(u).sum(1)
    return summary(total)


def sobol_information(p: Components, *, num_points: int = 2048, num_replicates: int = 8) -> tuple[Tensor, Tensor]:
    r"""Mutual information of a mixture's point and label, ``I = sum_k w_k KL(p_k || p)``.

    It is what a mixture's KL lacks to the mean of its components': ``KL(p || q) = S - I`` for any single
    density q, and ``0 <= I <= H(w)``. With ``t_k = log(p_k/p)`` at x, conditioned on the point:

        I = E_p[sum_k w_k phi(t_k)] = E_p[KL(posterior of the label || w)],

    positive at every x and bounded by ``-log min w``, where ``log(p_k/p)`` under p_k is neither positive nor
    averaged over the labels. Points come from ``s = sum_k v_k p_k``, v_k = (w_k + 1/K)/2, and count p/s <= 2
    (the balance heuristic of Veach and Guibas, 1995): with v = w, a rare component's neighbourhood is left to
    the few points that a frequent one sends there, no replicate sees it, and the error estimate misses it too (95 %
    intervals covered 87 % at weights around 1e-3, ten standard deviations apart; errors were twice as large). Three
    components and more are integrated less their control variates (`controls`), which takes the error down 5 to 1000
    times.

    Args:
        p: the mixture, float64.
        num_points: points per component and replicate; a power of two.
        num_replicates: independent scrambles, at least 2.

    Returns:
        The information and the half-width of its 95 % confidence interval, both of the batch shape.

    Raises:
        ValueError: for fewer than two replicates or more than 21201 dimensions.
    """
    z = sobol_normals(p.loc.shape[-1], num_points, num_replicates, p.loc.device)
    weights = torch.exp(p.log_weights)
    live = weights > 0
    shares = torch.where(live, 0.5 * weights + 0.5 / live.sum(-1, keepdim=True), 0.0)
    log_shares = torch.where(live, torch.log(torch.where(live, shares, 1.0)), -torch.inf)
    k = p.loc.shape[-2]
    controls = Controls(p) if k > 2 else None  # of two components, the pair's entropy is all there is

    def evaluate(component: int, block: Tensor) -> tuple[Tensor, Tensor | None]:
        x = points(p, component, block)
        t = component_log_probs(x, p)
        t = t - logsumexp(t + p.log_weights, -1).unsqueeze(-1)
        ratio = torch.exp(-logsumexp(t + log_shares, -1))
        g = ratio * _label_divergence(t, p.log_weights, weights)
        return g, None if controls is None else ratio.unsqueeze(-1) * controls.at(p.log_weights + t)

    pilot = z[:, :PILOT]
    first = [evaluate(j, pilot) for j in range(k)]
    total = torch.zeros((num_replicates, *p.loc.shape[:-2]), dtype=p.loc.dtype, device=p.loc.device)
    beta, missed = None, torch.zeros_like(total[0])
    if controls is not None:
        beta, unseen, rare = fit([(g, c) for g, c in first if c is not None], shares, controls.means)
        total = total + (beta * controls.means).sum(-1)
        # overlaps that no point fell into: they matter as much as the entropies of the pairs, then of the triples,
        # which are at most 0.9 (r_i r_j r_k)^(1/3)
        missed = (unseen + rare)[..., controls.overlaps].sum(-1)

    def share(component: int, g: Tensor, c: Tensor | None) -> Tensor:
        residual = g if c is None or beta is None else g - (c * beta).sum(-1)
        return shares[..., component] / num_points * residual.sum(1)

    for j in range(k):
        total = total + share(j, *first[j])
        for block in blocks(p, z[:, PILOT:]):
            total = total + share(j, *evaluate(j, block))
    value, error = summary(total)
    return value, error + missed


def _label_divergence(t: Tensor, log_weights: Tensor, weights: Tensor) -> Tensor:
    """KL of the label's posterior to its weights, sum_k w_k phi(t_k) with t_k = log(p_k/p): positive term by term.

    w phi(t) as w e^t E(-t) near 0; elsewhere r t - r + w, r = w e^t the posterior weight.
    """
    small = t.abs() < 1.0
    near = torch.where(small, t, 0.0)
    posterior = torch.exp(log_weights + t)
    seen = posterior > 0
    far = torch.where(seen, posterior * torch.where(seen, t, 0.0), 0.0) - posterior + weights
    return torch.where(small, posterior * expm1mx(-near), far).sum(-1)
