r"""Samples of a Gaussian mixture as differentiable functions of its parameters: implicit reparameterisation.

A sample x of the mixture solves z_i = F(x_i | x_1 ... x_{i-1}) for uniform z that do not depend on the parameters
(Rosenblatt, "Remarks on a multivariate transformation", 1952). Holding z fixed gives dx/dtheta = -(dz/dx)^-1 dz/dtheta
without inverting anything: only x, drawn in any way, is needed (Graves, "Stochastic backpropagation through mixture
density distributions", 2016; Figurnov, Mohamed and Mnih, "Implicit reparameterization gradients", 2018).

With e = L_k^-1 (x - mu_k) by forward substitution, component k's conditional is F_k(x_i | x_<i) = Phi(e_ki), so that

    z_i = sum_k r_ki Phi(e_ki),                                  r_ki the posterior of the label given x_<i,
    m_i = sum_k r_ki phi(e_ki)/L_kii,                            the conditional density,
    rho_ki = r_{k,i+1} = r_ki phi(e_ki)/(L_kii m_i),   c_ki = r_ki (Phi(e_ki) - z_i)/m_i,

and row i divided by m_i reads, with l_ki = log w_k - sum_{j<i} (e_kj^2/2 + log L_kjj),

    0 = sum_k rho_ki L_kii de_ki + sum_k c_ki dl_ki.

No density is left, only posterior weights and c, whose ratio is formed in log space: no underflow at D = 100. Summed
over k, c is 0, and Phi(e) - z is taken as differences to the component of the largest weight b, in the smaller tail:
r_k (Phi_k - Phi_b) - r_k sum_j r_j (Phi_j - Phi_b). Subtracting z itself leaves eps where one weight is nearly 1 and
the others, 1e-20, carry the whole gradient; subtracting probabilities near 1 leaves eps for far modes.
Transposed, the rows are solved from the last to the first, O(K D^2) per sample (O(K D) for diagonal scales).

The gradient does not depend on how x was drawn but on the order of the coordinates, as that of any full-rank
Gaussian through its Cholesky factor does; its expectation does not.

Accuracy: in float64, 1-D, against -(dF/dtheta)/m in mpmath and relative to the largest component of a parameter's
gradient: 1e-14 for modes 100 standard deviations apart, scales of 1e-4 and weights of 1e-20
(``tests/test_implicit.py``). Where components nearly coincide, delta standard deviations apart, the weights' gradient
vanishes with delta, and its relative error is eps/delta (5e-10 at 1e-6); that of the others stays. float32 is computed
in float64 and rounded once, but from an x that was rounded to float32: where eps \|mu\| is no longer small beside the
scale, x - mu is what is left of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._autograd import custom
from ..distributions._base import widened
from ..special import log_ndtr, logsumexp
from .components import Components
from .density_terms import is_diagonal, living

__all__ = ["implicit_point"]

# Elements of (..., K, D, N) per block of samples in the backward pass: some twenty float64 tensors of 4 MiB.
BLOCK = 2**19


def implicit_point(x: Tensor, components: Components, z: Tensor | None = None) -> Tensor:
    """``x`` itself, with the derivatives of the solution of ``z_i = F(x_i | x_<i)``.

    Args:
        x: points, shape ``sample_shape + batch_shape + (D,)``, not differentiable. At an infinite point all are 0.
        components: in working precision, ``batch_shape`` in front.
        z: F of the points, if it too is to be differentiated with respect to; of the shape of ``x``.

    Returns:
        Of the shape and dtype of ``x``.
    """
    batch, (k, d) = components.log_weights.shape[:-1], components.loc.shape[-2:]
    samples = math.prod(x.shape[: x.ndim - 1 - len(batch)])

    def last(t: Tensor) -> Tensor:
        return widened(t).reshape(samples, *batch, d).movedim(0, -1)

    points = last(x.detach())
    uniform = torch.zeros_like(points) if z is None else last(z)
    parameters = (
        components.log_weights.expand(*batch, k),
        components.loc.expand(*batch, k, d),
        components.scale.expand(*batch, *components.scale.shape[len(batch) :]),
    )
    return _implicit(points, uniform, *parameters).movedim(-1, 0).reshape(x.shape).to(x.dtype)


def _terms(inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """e, rho and c, all (..., K, D, N), and log m (..., D, N), differentiable."""
    x, _, log_weights, loc, scale = inputs
    loc, scale = living(log_weights, loc, scale)
    deviation = x.unsqueeze(-3) - loc.unsqueeze(-1)
    if is_diagonal(loc, scale):
        e, spread = deviation / scale.unsqueeze(-1), scale
    else:
        e = torch.linalg.solve_triangular(scale.tril(), deviation, upper=False)
        spread = scale.diagonal(dim1=-2, dim2=-1)
    log_density = -0.5 * e.square() - (spread.log() + 0.5 * math.log(2.0 * math.pi)).unsqueeze(-1)
    past = torch.cat([torch.zeros_like(e[..., :1, :]), log_density[..., :-1, :].cumsum(-2)], -2)
    log_r = torch.log_softmax(past + log_weights[..., None, None], -3)
    joint = log_r + log_density
    log_m = logsumexp(joint, -3)
    r = log_r.exp()
    # The smaller tail is the same for all components at a point: their differences are what counts.
    side = torch.where((r * torch.erf(e * math.sqrt(0.5))).sum(-3, keepdim=True).detach() > 0, -1.0, 1.0).to(e.dtype)
    log_p = log_ndtr(side * e)
    heaviest = log_r.detach().argmax(-3, keepdim=True)
    log_pb = log_p.gather(-3, heaviest)
    total = logsumexp(log_r + log_p, -3).unsqueeze(-3)
    # Divided by their sum before they are exponentials: p alone may underflow, or overflow over r.
    t = (log_r + log_p - total).exp() - (log_r + log_pb - total).exp()
    c = side * (t - r * t.sum(-3, keepdim=True)) * (total - log_m.unsqueeze(-3)).exp()
    return e, (joint - log_m.unsqueeze(-3)).exp(), c, log_m


def _times(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` with 0 inf = 0: components without a share in a point may be infinitely far from it."""
    return a * torch.where((a == 0) & ~b.isfinite(), 0.0, b)


def _column(scale: Tensor, j: int, ys: list[Tensor]) -> Tensor | float:
    """``sum_{i>j} L_ij y_i``, (..., K, N); ``ys`` from the last coordinate down to j + 1."""
    if not ys:
        return 0.0
    below = scale[..., j + 1 :, j].unsqueeze(-2)
    return (below @ torch.stack(ys[::-1], -2)).squeeze(-2)


def _pull(grad: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients with respect to z and the parameters: the transposed rows, solved from the last to the first.

    With a the multipliers of the rows and u_kj = sum_{i>j} a_i c_ki:  y = sum of the rows through de_k, per component,
    y_kj = rho_kj a_j - (e_kj u_kj + sum_{i>j} L_kij y_ki)/L_kjj, and sum_k y_kj = grad_j determines a_j.
    """
    x, z, log_weights, loc, scale = inputs
    finite = x.isfinite()
    grad = torch.where(finite, grad, 0.0)
    inputs = (torch.where(finite, x, 0.0), z, log_weights, loc, scale)
    e, rho, c, log_m = _terms(inputs)
    loc, scale = living(log_weights, loc, scale)
    diagonal = is_diagonal(loc, scale)
    spread = scale if diagonal else scale.diagonal(dim1=-2, dim2=-1)
    u = torch.zeros_like(e[..., 0, :])
    ys: list[Tensor] = []
    us: list[Tensor] = []
    multipliers: list[Tensor] = []
    for j in reversed(range(e.shape[-2])):
        coupling = _times(u, e[..., j, :])
        if not diagonal:
            coupling = coupling + _column(scale, j, ys)
        coupling = coupling / spread[..., j, None]
        a = grad[..., j, :] + coupling.sum(-2)
        ys.append(rho[..., j, :] * a.unsqueeze(-2) - coupling)
        us.append(u)
        multipliers.append(a)
        u = u + a.unsqueeze(-2) * c[..., j, :]
    y, volume = torch.stack(ys[::-1], -2), torch.stack(us[::-1], -2).sum(-1) / spread
    if diagonal:
        d_scale = _times(y, e).sum(-1) + volume
    else:
        d_scale = (y @ torch.where(e.isfinite(), e, 0.0).mT).tril() + torch.diag_embed(volume)
    d_z = _times(torch.stack(multipliers[::-1], -2), (-log_m).exp())
    return d_z, -u.sum(-1), y.sum(-1), d_scale


def _vjp(
    grad: Tensor, inputs: Sequence[Tensor], saved: Sequence[Tensor] | None, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    if saved is None:
        # To be differentiated again, the point must move with the parameters: it is an input only in name.
        x = inputs[0] if torch.compiler.is_compiling() else _implicit(*inputs)
        results = _pull(grad, (x, *inputs[1:]))
    else:
        results = _pull_in_blocks(grad, inputs)
    return (None, *(r if wanted else None for r, wanted in zip(results, needed[1:], strict=True)))


def _pull_in_blocks(grad: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    x, _, log_weights, loc, scale = inputs
    size = max(1, BLOCK // max(1, loc.numel()))
    if torch.compiler.is_compiling() or x.shape[-1] <= size:
        return _pull(grad, inputs)
    parts = [
        _pull(g, (block, block, log_weights, loc, scale))
        for g, block in zip(grad.split(size, -1), x.split(size, -1), strict=True)
    ]
    d_z, *totals = zip(*parts, strict=True)
    return (torch.cat(d_z, -1), *(torch.stack(t).sum(0) for t in totals))


def _jvp(inputs: Sequence[Tensor], tangents: Sequence[Tensor | None], ndim: int) -> Tensor:
    """The rows solved from the first to the last."""
    x = _implicit(*inputs)
    finite = x.isfinite()
    e, rho, c, log_m = _terms((torch.where(finite, x, 0.0), *inputs[1:]))
    log_weights, loc, scale = inputs[2:]
    _, scale = living(log_weights, loc, scale)
    dz, dw, dloc, dscale = (
        torch.zeros_like(i) if t is None else t for i, t in zip(inputs[1:], tangents[1:], strict=True)
    )
    diagonal = is_diagonal(loc, scale)
    spread, dspread = (t if diagonal else t.diagonal(dim1=-2, dim2=-1) for t in (scale, dscale))
    dl = torch.where(log_weights == -math.inf, 0.0, dw).unsqueeze(-1).expand_as(e[..., 0, :])
    dxs: list[Tensor] = []
    des: list[Tensor] = []
    for i in range(e.shape[-2]):
        shift = dloc[..., i, None] + dspread[..., i, None] * e[..., i, :]
        if not diagonal and i:
            before = dscale[..., i, None, :i] @ e[..., :i, :] + scale[..., i, None, :i] @ torch.stack(des, -2)
            shift = shift + before.squeeze(-2)
        row = _times(rho[..., i, :], shift) - _times(c[..., i, :], dl)
        dxs.append(row.sum(-2) + _times(dz[..., i, :], (-log_m[..., i, :]).exp()))
        des.append((dxs[-1].unsqueeze(-2) - shift) / spread[..., i, None])
        dl = dl - e[..., i, :] * des[-1] - (dspread / spread)[..., i, None]
    return torch.where(finite, torch.stack(dxs, -2), 0.0)


_implicit = custom(lambda *inputs: (inputs[0].clone(),), _vjp, _jvp)
