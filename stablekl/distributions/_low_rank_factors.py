r"""Inverses of :math:`\Lambda + V V^\top` applied without squaring V and without a Woodbury subtraction.

`Whitened` is one QR of :math:`[V; I]`. It is accurate to eps times the size of what it is applied to, which
is not enough for a coordinate that the factors explain almost entirely (a Heywood case: a diagonal of 1e-10
beside 1): its row of the inverse is 1e10 times smaller. `Conditioned` first eliminates a few coordinates, the
best explained ones, one by one as a Cholesky factorisation would; given those, no coordinate is explained much
better than any other, and QR does the rest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Conditioned", "Step", "Whitened", "dot", "eliminate", "identity", "largest", "masked", "row"]


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of rows, keeping the dimension."""
    return (a * b).sum(-1, keepdim=True)


def identity(size: int, like: Tensor) -> Tensor:
    """The identity matrix in the dtype and on the device of ``like``."""
    return torch.eye(size, dtype=like.dtype, device=like.device)


def masked(keep: Tensor, x: Tensor) -> Tensor:
    """``x`` where ``keep``, else 0 (a product would make NaN of an infinity)."""
    return torch.where(keep, x, 0.0)


def row(x: Tensor, index: Tensor) -> Tensor:
    """Row ``index`` of each matrix: ``(..., D, n)`` and ``(...)`` to ``(..., 1, n)``."""
    return torch.take_along_dim(x, index[..., None, None], -2)


def largest(v_j: Tensor) -> Tensor:
    """Mask of the largest entry of each row, ``(..., 1, r)``."""
    index = torch.arange(v_j.shape[-1], device=v_j.device)
    return index == v_j.abs().argmax(-1, keepdim=True)


class Whitened(NamedTuple):
    r"""The QR factors of :math:`[V; I]`: the inverse P of :math:`I + V V^\top` as a projection.

    Attributes:
        q1: upper block of the orthonormal factor, ``(..., D, r)``: :math:`P = I - Q_1 Q_1^\top`.
        q2: lower block, the inverse of ``r``, ``(..., r, r)``: :math:`P V = Q_1 Q_2^\top`.
        r: upper triangular, :math:`R^\top R = I + V^\top V`, ``(..., r, r)``; the signs of its diagonal are
            arbitrary.
    """

    q1: Tensor
    q2: Tensor
    r: Tensor

    @classmethod
    def of(cls, v: Tensor) -> Whitened:
        """Factorise by Householder reflections: squaring V, as C does, costs half the digits."""
        size = v.shape[-1]
        eye = identity(size, v).expand(*v.shape[:-2], size, size)
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


class Step(NamedTuple):
    r"""What conditioning on coordinate j does to the rows of V, in a basis where :math:`v_j` has one entry.

    The basis comes from the reflection :math:`I - \tau w w^\top` with
    :math:`w = v_j + \mathrm{sign}(v_{jm}) |v_j| e_m`, m the largest entry of :math:`v_j`.

    Attributes:
        w: the reflection's direction, ``(..., 1, r)``.
        tau: :math:`1/(|v_j| (|v_j| + |v_{jm}|))`, or 0 where :math:`v_j = 0`, ``(..., 1, 1)``.
        length: :math:`|v_j|`, ``(..., 1, 1)``.
        variance: :math:`s = \lambda_j + |v_j|^2`, ``(..., 1, 1)``.
        kept: :math:`\sqrt{\lambda_j / s}`, by which column m is scaled, ``(..., 1, 1)``.
        turned: the reflected rows, ``(..., D, r)``.
        slope: regression coefficients :math:`v_i \cdot v_j / s`, ``(..., D, 1)``.
        factor: the conditional factor: column m of ``turned`` times ``kept``, ``(..., D, r)``.
    """

    w: Tensor
    tau: Tensor
    length: Tensor
    variance: Tensor
    kept: Tensor
    turned: Tensor
    slope: Tensor
    factor: Tensor

    def unbind(self) -> tuple[Step, ...]:
        """Take a step of several matrices stacked along dimension 0 apart."""
        return tuple(Step(*parts) for parts in zip(*(x.unbind(0) for x in self), strict=True))


def eliminate(v: Tensor, v_j: Tensor, lam_j: Tensor, at: Tensor) -> Step:
    r"""Condition the rows of ``v`` on ``v_j``, whose own variance is ``lam_j``; ``at`` is m as a mask.

    A reflection, and one column scaled. The same by subtraction, :math:`v_i - c (v_i \cdot v_j) v_j`, costs
    eps |V|: what remains along :math:`v_j` is 1 where 1e8 was subtracted. The length goes to the largest
    entry, so that columns that earlier steps made small stay accurate relative to themselves.
    """
    square = dot(v_j, v_j)
    none = square == 0
    length = masked(~none, torch.where(none, 1.0, square).sqrt())
    entry = masked(at, v_j).sum(-1, keepdim=True)
    signed = torch.where(entry < 0, -length, length)
    w = torch.where(at, v_j + signed, v_j)
    tau = masked(~none, 1 / torch.where(none, 1.0, length * (length + entry.abs())))
    turned = v - tau * dot(v, w) * w
    s = lam_j + square
    kept = (lam_j / s).sqrt()
    along = masked(at, turned).sum(-1, keepdim=True)
    factor = torch.where(at, turned * kept, turned)
    return Step(w, tau, length, s, kept, turned, -along * signed / s, factor)


class Conditioned(NamedTuple):
    r"""The inverse of :math:`\Lambda + V V^\top` with some coordinates eliminated first, the others by QR.

    Attributes:
        order: the eliminated coordinates J, ``(..., k)``.
        variances: their conditional variances, ``(..., k, 1)``.
        slopes: regression of each coordinate on the innovations of J, 0 on the eliminated ones' own past,
            ``(..., D, k)``.
        rows: what elimination leaves of the rows of V in J, in the original basis of the factors,
            ``(..., k, r)``.
        turn: T with conditional covariance :math:`T T^\top` of the factors given J, ``(..., r, r)``.
        root: :math:`\Lambda^{-1/2}`, 0 on J, ``(..., D, 1)``.
        rest: the QR of :math:`[\Lambda^{-1/2} V T; I]`, 0 on J.
    """

    order: Tensor
    variances: Tensor
    slopes: Tensor
    rows: Tensor
    turn: Tensor
    root: Tensor
    rest: Whitened

    @classmethod
    def of(cls, v: Tensor, lam: Tensor, order: Tensor) -> Conditioned:
        """Eliminate ``order``, then factorise what is left; ``lam`` has shape ``(..., D, 1)``."""
        d, size = v.shape[-2:]
        index = torch.arange(d, device=v.device)[:, None]
        # The rows of the identity below those of V record T.
        both = torch.cat([v, identity(size, v).expand(*v.shape[:-2], size, size)], -2)
        past = torch.zeros_like(lam, dtype=torch.bool)
        variances, slopes, rows = [], [], []
        for j in order.unbind(-1):
            v_j = row(both, j)
            rows.append(v_j @ both[..., d:, :].mT)
            step = eliminate(both, v_j, row(lam, j), largest(v_j))
            past = past | (index == j[..., None, None])
            slopes.append(masked(~past, step.slope[..., :d, :]))
            variances.append(step.variance)
            both = step.factor
        root = masked(~past, lam.rsqrt())
        stacked = torch.cat(variances, -2), torch.cat(slopes, -1), torch.cat(rows, -2)
        return cls(order, *stacked, both[..., d:, :], root, Whitened.of(root * both[..., :d, :]))

    def unbind(self) -> tuple[Conditioned, ...]:
        """Take several stacked along dimension 0 apart."""
        tensors = [x.unbind(0) for x in (*self[:6], *self.rest)]
        return tuple(
            Conditioned(order, s, slopes, rows, turn, root, Whitened(q1, q2, r))
            for order, s, slopes, rows, turn, root, q1, q2, r in zip(*tensors, strict=True)
        )

    def _select(self, x: Tensor) -> Tensor:
        return torch.take_along_dim(x, self.order[..., None], -2)

    def _triangle(self) -> Tensor:
        return self._select(self.slopes) + identity(self.slopes.shape[-1], self.slopes)

    def _back(self, innovations: Tensor, rest: Tensor) -> Tensor:
        """Second half of the solve: from the solution off J to all of it."""
        y = innovations / self.variances - self.slopes.mT @ rest
        y = torch.linalg.solve_triangular(self._triangle().mT, y, upper=True, unitriangular=True)
        return rest.scatter(-2, self.order[..., None].expand(y.shape), y)

    def solve(self, x: Tensor) -> Tensor:
        r""":math:`(\Lambda + V V^\top)^{-1} x` for the columns of x."""
        innovations = torch.linalg.solve_triangular(self._triangle(), self._select(x), upper=False, unitriangular=True)
        x = x - self.slopes @ innovations
        return self._back(innovations, self.root * self.rest.residual(self.root * x)[0])

    def basis(self) -> Tensor:
        """The columns J of the identity, ``(..., D, k)``; solving for them gives those of the inverse."""
        index = torch.arange(self.slopes.shape[-2], device=self.slopes.device)[:, None]
        return (index == self.order[..., None, :]).to(self.slopes.dtype)

    def factor(self) -> Tensor:
        r""":math:`(\Lambda + V V^\top)^{-1} V`, which no subtraction enters."""
        return self._back(self.rows, self.root * (self.rest.q1 @ (self.turn @ self.rest.q2).mT))

    def explained(self, v: Tensor, y: Tensor) -> Tensor:
        r""":math:`V^\top (\Lambda + V V^\top)^{-1} V = I - C^{-1}` from V and y, its `factor`, ``(..., r, r)``.

        Where V is small so is the result, of which the difference leaves no digit; where V is large, the product would
        be off by eps times the largest of its columns over the smallest.
        """
        t = self.turn @ self.rest.q2
        product = v.mT @ y
        small = ((product * product).sum((-2, -1)) < 0.25)[..., None, None]
        return torch.where(small, product, identity(t.shape[-1], t) - t @ t.mT)

    def scattered(self, x: Tensor, rows: Tensor) -> Tensor:
        """``x`` (..., D) with the entries J replaced by ``rows`` (..., k)."""
        return x.scatter(-1, self.order, rows)
