r"""Inverses of :math:`\Lambda + V V^\top` applied without squaring V and without a Woodbury subtraction.

`Whitened` is one QR of :math:`[V; I]`. It is accurate to eps times the size of what it is applied to, which is
not enough for a coordinate that the factors explain almost entirely (a Heywood case: diagonal 1e-10 beside 1): its row of
the inverse is 1e10 times smaller. `Conditioned` first eliminates a few coordinates, the best explained ones, one by one
as a Cholesky factorisation would; given those, no coordinate is explained much better than any other, and
QR does the rest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Conditioned", "Step", "Whitened", "eliminate", "largest", "pivot_order", "row"]


class Whitened(NamedTuple):
    r"""The QR factors of :math:`[V; I]`: the inverse P of :math:`I + V V^\top` as a projection.

    Attributes:
        q1: upper block of the orthonormal factor, ``(..., D, r)``: :math:`P = I - Q_1 Q_1^\top`.
        q2: lower block, the inverse of ``r``, ``(..., r, r)``: :math:`P V = Q_1 Q_2^\top`.
        r: upper triangular, :math:`R^\top R = I + V^\top V`, ``(..., r, r)``; the signs of its diagonal are arbitrary.
    """

    q1: Tensor
    q2: Tensor
    r: Tensor

    @classmethod
    def of(cls, v: Tensor) -> Whitened:
        """Factorise, by Householder reflections: squaring V, as the capacitance matrix does, costs half the digits."""
        size = v.shape[-1]
        eye = torch.eye(size, dtype=v.dtype, device=v.device).expand(*v.shape[:-2], size, size)
        q, r = torch.linalg.qr(torch.cat([v, eye], -2))
        # The lower block of q is R^-1 as well, but only to an absolute eps, and its size is 1/|V|.
        return cls(q[..., : v.shape[-2], :], torch.linalg.solve_triangular(r, eye, upper=True), r)

    def residual(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""``(a, b)`` with a = P x and :math:`x^\top P x = |a|^2 + |b|^2`, for the columns of x.

        Projected twice: once leaves a component along Q of eps times |x|, and P x may be |V|^2 times smaller.
        """
        z = self.q1.mT @ x
        a, b = x - self.q1 @ z, -(self.q2 @ z)
        z = self.q1.mT @ a + self.q2.mT @ b
        return a - self.q1 @ z, b - self.q2 @ z

    def quadratic(self, x: Tensor) -> Tensor:
        r""":math:`x^\top P x` for the columns of x, as a sum of squares."""
        a, b = self.residual(x)
        return (a * a).sum(-2) + (b * b).sum(-2)

    def log_det(self) -> Tensor:
        r""":math:`\log\det(I + V V^\top)`."""
        return 2 * self.r.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)


def row(x: Tensor, index: Tensor) -> Tensor:
    """Row ``index`` of each matrix: ``(..., D, n)`` and ``(...)`` to ``(..., 1, n)``."""
    return torch.take_along_dim(x, index[..., None, None], -2)


class Step(NamedTuple):
    r"""What conditioning on coordinate j does to the rows of V, in a basis of the factors in which :math:`v_j` has one entry.

    That basis comes from the reflection :math:`I - \tau w w^\top`, :math:`w = v_j + \mathrm{sign}(v_{jm}) |v_j| e_m`, m the
    largest entry of :math:`v_j`.

    Attributes:
        w: the reflection's direction, ``(..., 1, r)``.
        tau: :math:`1/(|v_j| (|v_j| + |v_{jm}|))`, or 0 where :math:`v_j = 0`, ``(..., 1, 1)``.
        length: :math:`|v_j|`, ``(..., 1, 1)``.
        variance: :math:`s = \lambda_j + |v_j|^2`, ``(..., 1, 1)``.
        kept: :math:`\sqrt{\lambda_j / s}`, by which column m is scaled, ``(..., 1, 1)``.
        turned: the reflected rows, ``(..., D, r)``.
        slope: regression coefficients :math:`v_i \cdot v_j / s`, ``(..., D, 1)``.
        rest: :math:`v_i - (v_i \cdot v_j / s) v_j`, reflected: column m of ``turned`` times ``kept`` squared.
        factor: the conditional factor: column m of ``turned`` times ``kept``, ``(..., D, r)``.
    """

    w: Tensor
    tau: Tensor
    length: Tensor
    variance: Tensor
    kept: Tensor
    turned: Tensor
    slope: Tensor
    rest: Tensor
    factor: Tensor


def largest(v_j: Tensor) -> Tensor:
    """One-hot mask of the largest entry of each row, ``(..., 1, r)``."""
    index = torch.arange(v_j.shape[-1], device=v_j.device)
    return index == v_j.abs().argmax(-1, keepdim=True)


def eliminate(v: Tensor, v_j: Tensor, lam_j: Tensor, at: Tensor) -> Step:
    """Condition the rows of ``v`` on one of them, ``v_j``, whose own variance is ``lam_j``; ``at`` is m as a mask.

    A reflection, and one column scaled. The same by subtraction, :math:`v_i - c (v_i \cdot v_j) v_j`, costs eps |V|: what
    remains along :math:`v_j` is 1 where 1e8 was subtracted. And |v_j| goes to the largest entry, so that columns that
    earlier steps made small stay accurate relative to themselves.
    """
    square = (v_j * v_j).sum(-1, keepdim=True)
    some = square > 0
    length = torch.where(some, torch.where(some, square, torch.ones_like(square)).sqrt(), torch.zeros_like(square))
    entry = torch.where(at, v_j, torch.zeros_like(v_j)).sum(-1, keepdim=True)
    signed = torch.where(entry < 0, -length, length)
    w = torch.where(at, v_j + signed, v_j)
    denominator = length * (length + entry.abs())
    usable = denominator > 0
    tau = torch.where(usable, 1 / torch.where(usable, denominator, torch.ones_like(square)), torch.zeros_like(square))
    turned = v - tau * (v * w).sum(-1, keepdim=True) * w
    s = lam_j + square
    kept = (lam_j / s).sqrt()
    along = torch.where(at, turned, torch.zeros_like(v)).sum(-1, keepdim=True)
    return Step(
        w=w,
        tau=tau,
        length=length,
        variance=s,
        kept=kept,
        turned=turned,
        slope=-along * signed / s,
        rest=torch.where(at, turned * (lam_j / s), turned),
        factor=torch.where(at, turned * kept, turned),
    )


def pivot_order(v_p: Tensor, v_q: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` coordinates that the factors of p and q explain best, each given those before it.

    Greedy, so that after as many steps as there are factors no conditional variance is far above 1.

    Args:
        v_p: factor of p whitened by its own diagonal, ``(..., D, r)``.
        v_q: factor of q whitened by its own diagonal, ``(..., D, r)``.
        count: how many.

    Returns:
        Integers of shape ``(..., count)``.
    """
    order: list[Tensor] = []
    left = torch.ones(v_q.shape[:-1], dtype=torch.bool, device=v_q.device)
    one = torch.ones((), dtype=v_q.dtype, device=v_q.device)
    rows = torch.arange(v_q.shape[-2], device=v_q.device)
    for _ in range(count):
        explained = (v_p * v_p).sum(-1) + (v_q * v_q).sum(-1)
        j = torch.where(left, explained, torch.full_like(explained, -1)).argmax(-1)
        order.append(j)
        left = left & (rows != j[..., None])
        p_j, q_j = row(v_p, j), row(v_q, j)
        v_p = eliminate(v_p, p_j, one, largest(p_j)).factor
        v_q = eliminate(v_q, q_j, one, largest(q_j)).factor
    return torch.stack(order, -1)


class Conditioned(NamedTuple):
    r"""The inverse of :math:`\Lambda + V V^\top` with some coordinates eliminated first, the others by QR.

    Attributes:
        order: the eliminated coordinates J, ``(..., k)``.
        variances: their conditional variances, ``(..., k, 1)``.
        slopes: regression of each coordinate on the innovations of J, 0 on the eliminated ones' own past,
            ``(..., D, k)``.
        rows: what elimination leaves of the rows of V in J, in the original basis of the factors, ``(..., k, r)``.
        turn: T with conditional covariance :math:`T T^\top` of the factors given J, ``(..., r, r)``.
        root: :math:`\Lambda^{-1/2}`, 0 on J, ``(..., D, 1)``.
        q1: of the QR of :math:`[\Lambda^{-1/2} V T; I]`, ``(..., D, r)``, 0 on J.
        q2: the same, ``(..., r, r)``.
        r: the same, ``(..., r, r)``.
    """

    order: Tensor
    variances: Tensor
    slopes: Tensor
    rows: Tensor
    turn: Tensor
    root: Tensor
    q1: Tensor
    q2: Tensor
    r: Tensor

    @classmethod
    def of(cls, v: Tensor, lam: Tensor, order: Tensor) -> Conditioned:
        """Eliminate ``order``, then factorise what is left; ``lam`` has shape ``(..., D)``."""
        d, size = v.shape[-2:]
        lam = lam[..., None]
        index = torch.arange(d, device=v.device)[:, None]
        turn = torch.eye(size, dtype=v.dtype, device=v.device).expand(*v.shape[:-2], size, size)
        variances, slopes, rows = [], [], []
        left = torch.ones_like(lam, dtype=torch.bool)
        for j in order.unbind(-1):
            v_j, lam_j = row(v, j), row(lam, j)
            at = largest(v_j)
            step = eliminate(v, v_j, lam_j, at)
            rows.append(v_j @ turn.mT)
            left = left & (index != j[..., None, None])
            v = torch.where(left, step.factor, torch.zeros_like(v))
            slopes.append(torch.where(left, step.slope, torch.zeros_like(lam)))
            variances.append(step.variance)
            turn = eliminate(turn, v_j, lam_j, at).factor
        root = torch.where(left, lam.rsqrt(), torch.zeros_like(lam))
        return cls(
            order, torch.cat(variances, -2), torch.cat(slopes, -1), torch.cat(rows, -2), turn, root,
            *Whitened.of(root * v),
        )  # fmt: skip

    def _select(self, x: Tensor) -> Tensor:
        return torch.take_along_dim(x, self.order[..., None], -2)

    def _back(self, innovations: Tensor, rest: Tensor) -> Tensor:
        """Second half of the solve: from the solution off J to all of it."""
        triangle = self._select(self.slopes)
        eye = torch.eye(triangle.shape[-1], dtype=triangle.dtype, device=triangle.device)
        y = innovations / self.variances - self.slopes.mT @ rest
        y = torch.linalg.solve_triangular((triangle + eye).mT, y, upper=True, unitriangular=True)
        index = self.order[..., None].expand(y.shape)
        return rest.scatter(-2, index, y)

    def solve(self, x: Tensor) -> Tensor:
        r""":math:`(\Lambda + V V^\top)^{-1} x` for the columns of x."""
        triangle = self._select(self.slopes)
        eye = torch.eye(triangle.shape[-1], dtype=triangle.dtype, device=triangle.device)
        innovations = torch.linalg.solve_triangular(
            triangle + eye, self._select(x), upper=False, unitriangular=True
        )
        x = x - self.slopes @ innovations
        return self._back(innovations, self.root * Whitened(self.q1, self.q2, self.r).residual(self.root * x)[0])

    def columns(self) -> Tensor:
        """The columns J of the inverse, ``(..., D, k)``."""
        d = self.slopes.shape[-2]
        index = torch.arange(d, device=self.slopes.device)[:, None]
        return self.solve((index == self.order[..., None, :]).to(self.slopes.dtype))

    def factor(self) -> Tensor:
        r""":math:`(\Lambda + V V^\top)^{-1} V`, which no subtraction enters."""
        return self._back(self.rows, self.root * (self.q1 @ (self.turn @ self.q2).mT))

    def explained(self) -> Tensor:
        r""":math:`V^\top (\Lambda + V V^\top)^{-1} V = I - C^{-1}`, ``(..., r, r)``."""
        t = self.turn @ self.q2
        return torch.eye(t.shape[-1], dtype=t.dtype, device=t.device) - t @ t.mT
