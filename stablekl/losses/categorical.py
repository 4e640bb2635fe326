r"""KL divergence of categorical distributions from logits, and of densities on a grid: without exp and log again.

With u_i = log p_i - log q_i,

.. math:: KL = \sum_i \bigl[p_i u_i - p_i + q_i\bigr] = \sum_i p_i\, \phi(u_i), \qquad \phi(u) = u - 1 + e^{-u} \ge 0,

each term positive, where :math:`\sum p_i u_i` cancels to second order as p approaches q. The differences u come from
those of the logits: with d_i = a_i - b_i less the difference of the most likely class, and c = log E_p exp(-d), u = d +
c. Log probabilities subtracted from each other would leave eps log p_i of rounding in u.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._autograd import is_eager, rowwise
from .._elementwise import is_lifted, sum_error
from ..special import expm1mx_value
from ._reduction import Reduction, reduced, together

__all__ = ["categorical_kl", "check_logits", "grid_kl_loss"]

# The size of u below which a term is p phi(u), beyond it p (u - 1) + q.
NEAR = 1.0


def _log_ratio(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log p, log q, and their difference; NaN where both are -inf."""
    log_p, log_q = torch.log_softmax(a, -1), torch.log_softmax(b, -1)
    log_q = torch.where((b == -torch.inf).all(-1, keepdim=True), -torch.inf, log_q)  # a density that misses the grid
    seen = log_p > -torch.inf
    usable = seen & (log_q > -torch.inf)
    top = log_p.detach().argmax(-1, keepdim=True)
    safe_a, safe_b = torch.where(usable, a, 0.0), torch.where(usable, b, 0.0)
    d = safe_a - safe_b
    rest = sum_error(safe_a, -safe_b, d)  # what rounding took: of logits 5 apart in all classes, 1e-15
    d = (d - d.gather(-1, top)) + (rest - rest.gather(-1, top))
    small = torch.where(usable, d, 0.0).detach().abs().amax(-1, keepdim=True) < 0.5
    small = small & (usable | ~(seen | (log_q > -torch.inf))).all(-1, keepdim=True)
    moved = torch.where(small & usable, d, 0.0)
    shift = torch.log1p((torch.exp(log_p) * torch.expm1(-moved)).sum(-1, keepdim=True))
    return log_p, log_q, torch.where(small & usable, d + shift, log_p - log_q)


def _value(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    if is_lifted(a):
        return (_value(a.double(), b.double())[0].float(),)
    log_p, log_q, u = _log_ratio(a, b)
    p, q = torch.exp(log_p), torch.exp(log_q)
    near = u.abs() < NEAR
    small = torch.where(near, u, 0.0)
    far = torch.where(p == 0, 0.0, p * torch.where(p == 0, 0.0, u - 1)) + q  # p > 0 would leave out what is NaN
    return (torch.where(near, p * expm1mx_value(-small), far).sum(-1),)


def _gradient(inputs: tuple[Tensor, ...], saved: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    """``p (u - KL)`` by the logits of p, ``q - p`` by those of q."""
    if is_lifted(inputs[0]):
        return tuple(x.float() for x in _gradient(tuple(x.double() for x in inputs), saved))
    log_p, log_q, u = _log_ratio(*inputs)
    p, q = torch.exp(log_p), torch.exp(log_q)
    near = u.abs() < NEAR
    u = torch.where(p == 0, 0.0, u)
    gap = u - (p * u).sum(-1, keepdim=True)
    gap = torch.where(u == torch.inf, torch.inf, gap)  # impossible under q: the only way is down
    by_q = torch.where(near, p * torch.expm1(torch.where(near, -u, 0.0)), q - p)
    return torch.where(p == 0, 0.0, p * gap), by_q


_kl = rowwise(_value, _gradient)


def check_logits(name: str, x: Tensor) -> None:
    """ValueError where what was given are probabilities, not numbers, or nothing is possible in a row."""
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name} must have a last dimension of classes, got shape {tuple(x.shape)}")
    if not x.is_floating_point() or not is_eager(x) or not x.numel():
        return
    x = x.detach()
    _check_numbers(name, x)
    impossible = (x == -torch.inf).all(-1)
    if bool(impossible.any()):
        index = tuple(impossible.nonzero()[0].tolist())
        raise ValueError(
            f"every class of {name}{list(index) if index else ''} has a logit of -inf: no class is possible. Mask "
            "fewer classes, or leave that row out"
        )
    sums = x.sum(-1, dtype=torch.float64)
    slack = (
        8 * torch.finfo(x.dtype).eps * (x.shape[-1] if x.element_size() > 2 else 1)
    )  # half precision is rounded once
    # one row of 0 and 1 is more likely to be logits; in all of several rows just one 1 is not
    single = x.numel() == x.shape[-1] or x.shape[-1] == 1
    if single and bool((x == x.round()).all()):
        return
    if bool(((x >= 0).all(-1) & ((sums - 1).abs() <= slack)).all()):
        raise ValueError(
            f"{name} looks like probabilities, or one-hot labels: every row is non-negative and sums to 1. Pass their "
            f"logarithms, {name}=probs.log(). If these are logits by chance, add any number to them: only differences "
            "count"
        )


def _check_numbers(name: str, x: Tensor) -> None:
    """ValueError for NaN and +inf; -inf is a logarithm of 0."""
    wrong = x.isnan() | (x == torch.inf)
    if bool(wrong.any()):
        index = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"{name}{list(index)} is {float(x[index])}: logarithms are numbers, or -inf for what is impossible. Likely "
            "causes: a step that diverged, or a parameter that is not finite"
        )


def _check_log_densities(name: str, x: Tensor, dx: Tensor) -> None:
    """ValueError where what was given are densities, or not numbers."""
    if not is_eager(x) or not x.numel():
        return
    x = x.detach()
    _check_numbers(name, x)
    total = (x * dx.detach()).sum(-1)
    if bool(((x >= 0).all(-1) & ((total - 1).abs() <= 1e-2)).all()):
        raise ValueError(
            f"{name} looks like a density: non-negative, and its integral is 1. Pass its logarithm, as log_prob "
            "returns it. If it is a log-density by chance, add any number to it: with normalized=False it is known up "
            "to one"
        )


def categorical_kl(logits_p: Tensor, logits_q: Tensor, *, reduction: Reduction = "none") -> Tensor:
    r"""KL divergence between categorical distributions, of logits or log-probabilities.

    .. math:: KL = \sum_i p_i\, \phi(\log p_i - \log q_i), \qquad \phi(u) = u - 1 + e^{-u}

    Both arguments are logits: log-probabilities are too, up to the constant that does not matter. Where all rows of an
    argument are probabilities it raises an error, and the order is that of ``kl_divergence(p, q)``, not of
    ``F.kl_div``. A class impossible under p (a logit of -inf) counts nothing, with a gradient of 0; one impossible
    under q alone makes the divergence inf.

    Args:
        logits_p: ``(..., K)``.
        logits_q: likewise; batch shapes broadcast.
        reduction: "none" for each row, "mean" over the rows, or "sum".

    Returns:
        The divergence in nats, ``(...)``, or a number. Non-negative; exactly 0, with a gradient of 0, for equal logits.
        Within 4 units in the last place and 1e-15 of the sum of p_i u_i^2 (float64).

    Raises:
        ValueError: probabilities in place of logits, NaN or +inf among them, a row without a possible class, numbers of
            classes that differ, or an unknown reduction.

    Example:
        >>> import torch
        >>> from stablekl.losses import categorical_kl
        >>> print(categorical_kl(torch.tensor([0.0, 0.0]), torch.tensor([0.0, -68.0])))
        tensor(33.3069)
    """
    check_logits("logits_p", logits_p)
    check_logits("logits_q", logits_q)
    if logits_p.shape[-1] != logits_q.shape[-1]:
        raise ValueError(
            f"the last dimension holds the classes: logits_p has {logits_p.shape[-1]} and logits_q {logits_q.shape[-1]}"
        )
    (a, b), dtype = together(logits_p, logits_q, wide=False)
    return reduced(_kl(a, b).to(dtype), reduction)


def grid_kl_loss(log_q: Tensor, log_p: Tensor, dx: Tensor | float, normalized: bool = False) -> Tensor:
    r"""KL(P || Q) of densities on a grid, from their logarithms: nothing is exponentiated and logged again.

    ``F.kl_div(q.log_prob(x).exp().log(), p)`` is inf as soon as q underflows, averages over the points, and does not
    know how far apart they are. This is the integral. The order of the arguments is that of ``F.kl_div``.

    Args:
        log_q: log-density of Q at the points, ``(..., N)``.
        log_p: that of P.
        dx: the distance of the points, a number, or the width of each cell, broadcastable with the densities.
        normalized: False for densities that are known up to a factor: both are made to sum to one over the grid, and
            the result is a divergence on the grid, never negative. True for those of distributions, as ``log_prob``
            returns them: :math:`\sum p (\log p - \log q) dx` as they are, so that what Q has outside of the grid
            counts, and Q is fitted to P rather than to P on the grid.

    Returns:
        The divergence in nats, ``(...)``; inf where Q is impossible and P is not.

    Raises:
        ValueError: ``dx`` is not positive; densities in place of their logarithms; NaN or +inf; a P that is -inf at all
            points; or with ``normalized=True``, P does not integrate to one within 1 %.

    Example:
        >>> import torch
        >>> from torch.distributions import Normal
        >>> from stablekl.losses import grid_kl_loss
        >>> x = torch.linspace(-15, 15, 1000)
        >>> log_p = torch.logaddexp(Normal(-5.0, 1.0).log_prob(x), Normal(10.0, 1.0).log_prob(x))
        >>> print(f"{grid_kl_loss(Normal(0.0, 1.0).log_prob(x), log_p, dx=30 / 999):.3f}")
        30.557
    """
    if not (log_q.ndim and log_p.ndim and log_q.shape[-1] == log_p.shape[-1]):
        raise ValueError(
            "log_q and log_p must be known at the same points, in their last dimension; got shapes "
            f"{tuple(log_q.shape)} and {tuple(log_p.shape)}"
        )
    (log_q, log_p, dx), dtype = together(log_q, log_p, dx)
    if is_eager(dx) and not bool((dx > 0).all()):
        raise ValueError("dx must be positive: the distance of the points, or the widths of the cells")
    log_dx = torch.log(dx)
    for name, x in (("log_q", log_q), ("log_p", log_p)):
        _check_log_densities(name, x, dx)
    if not normalized:
        if is_eager(log_p) and bool((missing := (log_p == -torch.inf).all(-1)).any()):
            where = missing.nonzero()[0].tolist()
            raise ValueError(f"log_p{where or ''} is -inf at every point: P has no mass on the grid. Move the grid")
        return _kl(log_p + log_dx, log_q + log_dx).to(dtype)
    mass = torch.exp(log_p + log_dx)
    if is_eager(mass) and mass.numel():
        total = mass.detach().sum(-1)
        off = ((total - 1).abs() > 1e-2).nonzero()
        if len(off):
            index = tuple(off[0].tolist())
            raise ValueError(
                f"with normalized=True log_p{list(index) if index else ''} must integrate to 1; its sum times dx "
                f"is {float(total[index]):.6g}: a grid too short or too coarse, another dx, or a density up to a "
                "factor, for which normalized=False"
            )
    seen = mass > 0
    ratio = torch.where(seen, log_p, 0.0) - torch.where(seen, log_q, 0.0)
    return (mass * ratio).sum(-1).to(dtype)
