"""Log-density of Gaussian mixtures, streamed: no points x components x dimensions tensor, forward or backward.

Written from the definition, log p(x) = log sum_k exp(log w_k + log N(x; mu_k, Sigma_k)), in log space, with the
mean subtracted before anything is multiplied (right at x = 1e10). Gradients are stated by hand through the
responsibilities r_k = softmax_k: a weight of zero, or a component whose density underflows to zero in log
space (-inf), contributes exactly nothing to the value and to every gradient.

The parameters are shared by many points, and points and components meet only in blocks that fit into the
cache. Three forms: blocks of the direct form; for float32 diagonals on a CPU blocks of a float64 matrix product
(`density_expanded`), where its error is provably below float32's; and, when the result must be traced or
differentiated again, one expression over whole tensors (torch.compile fuses its reductions).

Accuracy: `tests/test_density.py` has the regimes and the worst observed errors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial, reduce

import torch
from torch import Tensor

from .._autograd import custom, is_plain
from .components import Components
from .density_expanded import Expansion

__all__ = ["component_log_probs", "mixture_log_prob"]

# Layout inside this file: points lie along the last axis, so that every operation runs over contiguous memory
# whatever D is. x (..., D, N), log_weights (..., K), loc (..., K, D), scale (..., K, D) or (..., K, D, D).

# Elements per block: measured on a CPU, fastest of 2**15 ... 2**19.
_CPU_BLOCK = 2**17
_DEVICE_BLOCK = 2**22  # elements per block away from the CPU: enough to fill a device, 32 MiB in float64


def mixture_log_prob(value: Tensor, components: Components) -> Tensor:
    """Log-density of a Gaussian mixture, log sum_k w_k N(x; mu_k, Sigma_k).

    Args:
        value: points, shape ``sample_shape + batch_shape + (D,)``.
        components: weights, means and scales, ``batch_shape`` in front.

    Returns:
        Shape ``sample_shape + batch_shape``; -inf (with gradient zero) where every component is -inf.
    """
    result: Tensor = _evaluate(value, components, pooled=True).movedim(-1, 0)
    return result.reshape(_shape(value, components)).to(_dtype(value, components))


def component_log_probs(value: Tensor, components: Components) -> Tensor:
    """Log-density of every component, log N(x; mu_k, Sigma_k), without the weights.

    Args:
        value: points, shape ``sample_shape + batch_shape + (D,)``.
        components: means and scales, ``batch_shape`` in front; the weights are not read.

    Returns:
        Shape ``sample_shape + batch_shape + (K,)``.
    """
    unweighted = components._replace(log_weights=torch.zeros_like(components.loc[..., 0]))
    result: Tensor = _evaluate(value, unweighted, pooled=False).movedim(-1, 0)
    shape = (*_shape(value, components), components.loc.shape[-2])
    return result.reshape(shape).to(_dtype(value, components))


def _dtype(value: Tensor, components: Components) -> torch.dtype:
    return reduce(torch.promote_types, (t.dtype for t in components), value.dtype)


def _batch_shape(components: Components) -> torch.Size:
    event = components.scale.ndim - 2 if components.is_diagonal else components.scale.ndim - 3
    log_weights, loc, scale = components
    return torch.broadcast_shapes(log_weights.shape[:-1], loc.shape[:-2], scale.shape[:event])


def _shape(value: Tensor, components: Components) -> torch.Size:
    return torch.broadcast_shapes(value.shape[:-1], _batch_shape(components))


def _evaluate(value: Tensor, components: Components, *, pooled: bool) -> Tensor:
    """Bring the arguments into this file's layout and call the function; points stay last."""
    dtype = _dtype(value, components)
    dtype = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    batch, shape = _batch_shape(components), _shape(value, components)
    samples = math.prod(shape[: len(shape) - len(batch)])
    x = value.to(dtype).expand(*shape, value.shape[-1]).reshape(samples, *batch, value.shape[-1]).movedim(0, -1)
    k, d = components.loc.shape[-2:]
    parameters = (
        components.log_weights.to(dtype).expand(*batch, k),
        components.loc.to(dtype).expand(*batch, k, d),
        components.scale.to(dtype).expand(*batch, k, *components.scale.shape[components.loc.ndim - 1 :]),
    )
    if not pooled:
        return _components(x, *parameters)
    # The responsibilities cost N K elements to keep. For D < 4 that is of the order of N K D: recompute them.
    keep = d >= 4 and torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters))
    return (_mixture_keep if keep else _mixture)(x, *parameters)


# --- the formulas, on any slice -----------------------------------------------------------------------------


def _is_diagonal(loc: Tensor, scale: Tensor) -> bool:
    return scale.ndim == loc.ndim


def _living(log_weights: Tensor, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Means and scales with those of weight-zero components replaced: nothing they hold may matter."""
    live = (log_weights != -math.inf).unsqueeze(-1)
    loc = torch.where(live, loc, 0.0)
    if _is_diagonal(loc, scale):
        return loc, torch.where(live, scale, 1.0)
    eye = torch.eye(loc.shape[-1], dtype=scale.dtype, device=scale.device)
    return loc, torch.where(live.unsqueeze(-1), scale, eye)


def _inverse(loc: Tensor, scale: Tensor) -> Tensor:
    """Inverse factors, so that whitening is a product.

    The inverse is solved from the left, X L = I: substitution then leaves |X L - I| <= c u |X| |L|, and the error of
    X y is bounded by c u |X| |L| |z|, z = L^-1 y, like that of solving L z = y itself (Higham 2002, section 14.2). The
    inverse from L X = I obeys |L X - I| <= c u |L| |X| only, which loses another factor of the condition of L.
    """
    if _is_diagonal(loc, scale):
        return scale.reciprocal()
    eye = torch.eye(loc.shape[-1], dtype=scale.dtype, device=scale.device).expand_as(scale)
    return torch.linalg.solve_triangular(scale, eye, upper=False, left=False)


def _base(log_weights: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Log-weight plus log of the normalising constant, shape (..., K)."""
    diagonal = scale if _is_diagonal(loc, scale) else scale.diagonal(dim1=-2, dim2=-1)
    return log_weights - diagonal.log().sum(-1) - 0.5 * math.log(2.0 * math.pi) * loc.shape[-1]


def _whiten(x: Tensor, loc: Tensor, inverse: Tensor) -> Tensor:
    """L_k^-1 (x - mu_k), shape (..., K, D, N)."""
    deviation = x.unsqueeze(-3) - loc.unsqueeze(-1)
    return deviation * inverse.unsqueeze(-1) if inverse.ndim == loc.ndim else inverse @ deviation


def _pool(logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp over K with its exponentials (..., K, N) and their sum (..., N), which is 0 if all are -inf."""
    top = logits.detach().amax(-2, keepdim=True)
    top = torch.where(top == -math.inf, 0.0, top)
    exps = (logits - top).to(dtype).exp()
    total = exps.sum(-2)
    return (top.squeeze(-2) + total.log()).to(dtype), exps, total


def _parameter_gradients(moments: Sequence[Tensor], inverse: Tensor) -> list[Tensor]:
    """Gradients with respect to log-weights, means and scales from the moments of z = L^-1 (x - mu).

    d/dmu = L^-T z and d/dL = L^-T z z' - diag(1/L_ii) (lower triangle), summed over the points with weights c:
    the moments are sum c (..., K), sum c z (..., K, D) and sum c z^2 (..., K, D) or sum c z z' (..., K, D, D).
    """
    mass, first, second = moments
    inverse = inverse.to(mass.dtype)
    if inverse.ndim == first.ndim:
        return [mass, first * inverse, (second - mass.unsqueeze(-1)) * inverse]
    back = inverse.mT
    volume = torch.diag_embed(mass.unsqueeze(-1) * inverse.diagonal(dim1=-2, dim2=-1))
    return [mass, (back @ first.unsqueeze(-1)).squeeze(-1), (back @ second).tril() - volume]


# --- whole tensors: traced, or differentiable ---------------------------------------------------------------


def _expression(inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (..., K, N), z (..., K, D, N) (zero where a logit is -inf) and inverse factors, differentiable."""
    x, log_weights, loc, scale = inputs
    loc, scale = _living(log_weights, loc, scale)
    inverse, base = _inverse(loc, scale), _base(log_weights, loc, scale)
    infinite = x.isinf()
    z = _whiten(torch.where(infinite, 0.0, x), loc, inverse)
    # A dead entry must not reach an operation whose derivative at it is NaN: 0 * inf in the second backward.
    dead = infinite.any(-2, keepdim=True) | z.detach().square().sum(-2).isinf()
    z = torch.where(dead.unsqueeze(-2), 0.0, z)
    logits = base.unsqueeze(-1) - 0.5 * z.square().sum(-2)
    return logits.masked_fill(dead, -math.inf), z, inverse


def _shares(grad: Tensor, exps: Tensor, total: Tensor) -> Tensor:
    """grad times the responsibilities; zero on a row without any density."""
    share = grad / torch.where(total == 0, 1.0, total)
    return exps * share.unsqueeze(-2)


def _coefficients(grad: Tensor, logits: Tensor, dtype: torch.dtype, pooled: bool) -> Tensor:
    """Gradient with respect to the logits, shape (..., K, N)."""
    if pooled:
        return _shares(grad, *_pool(logits, dtype)[1:])
    return torch.where(logits == -math.inf, 0.0, grad)


def _jvp(pooled: bool, inputs: Sequence[Tensor], tangents: Sequence[Tensor], ndim: int) -> Tensor:
    logits, z, inverse = _expression(inputs)
    dx, d_log_weights, d_loc, d_scale = (
        torch.zeros_like(i) if t is None else t for i, t in zip(inputs, tangents, strict=True)
    )
    shift = dx.unsqueeze(-3) - d_loc.unsqueeze(-1)
    if inverse.ndim == d_loc.ndim:
        dz = (shift - z * d_scale.unsqueeze(-1)) * inverse.unsqueeze(-1)
        volume = (d_scale * inverse).sum(-1)
    else:
        d_scale = d_scale.tril()
        dz = inverse @ (shift - d_scale @ z)
        volume = (d_scale * inverse).diagonal(dim1=-2, dim2=-1).sum(-1)
    d_logits = (d_log_weights - volume).unsqueeze(-1) - (z * dz).sum(-2)
    c = _coefficients(torch.ones_like(logits[..., 0, :] if pooled else logits), logits, logits.dtype, pooled)
    terms = torch.where(c == 0, 0.0, c * d_logits)
    return terms.sum(-2) if pooled else terms


# --- blocks: plain tensors ----------------------------------------------------------------------------------


def _cuts(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


class _Mixtures:
    """A block of batch elements, prepared; meets the points block by block."""

    def __init__(self, log_weights: Tensor, loc: Tensor, scale: Tensor, elements: int, wide: bool) -> None:
        self.elements, dead = elements, log_weights == -math.inf
        self.diagonal = _is_diagonal(loc, scale)
        self.loc, scale = _living(log_weights, loc, scale)
        self.inverse, self.base = _inverse(self.loc, scale), _base(log_weights, self.loc, scale)
        self.limit = loc.shape[-1] * self.inverse.abs().amax()
        self.expansion: Expansion | None = None
        if wide:
            loc, scale = self.loc.double(), scale.double()
            inverse = _inverse(loc, scale).masked_fill(dead.unsqueeze(-1), 0.0)
            self.expansion = Expansion(_base(log_weights.double(), loc, scale), self.loc, inverse)

    def _features(self, x: Tensor) -> Tensor | None:
        return None if self.expansion is None else self.expansion.features(x)

    def _component_cuts(self, x: Tensor) -> Iterator[slice]:
        return _cuts(self.loc.shape[1], max(1, self.elements // max(1, x.numel())))

    def logits(self, x: Tensor) -> Tensor:
        """Log-weight plus log-density of points (B, D, N), shape (B, K, N)."""
        features = self._features(x)
        if self.expansion is not None and features is not None:
            return self.expansion.logits(features)
        forms = [self._whiten(x, k).square_().sum(-2) for k in self._component_cuts(x)]
        form = forms[0] if len(forms) == 1 else torch.cat(forms, 1)
        if not self.diagonal:  # the product turned an infinite coordinate into NaN
            form = torch.where(x.isinf().any(-2, keepdim=True), math.inf, form)
        return self.base.unsqueeze(-1) - 0.5 * form

    def pull(self, x: Tensor, c: Tensor, moments: Sequence[Tensor], want_x: bool) -> Tensor | None:
        """Add the weighted moments of z to ``moments``; gradient of ``(c * logits).sum()`` with respect to x."""
        features = self._features(x)
        if self.expansion is not None and features is not None:
            c = c.double()
            for total, part in zip(moments, self.expansion.moments(features, c), strict=True):
                total += part
            return self.expansion.pull_value(features, c) if want_x else None
        mass, first, second = moments
        mass += c.sum(-1)
        # Where the magnitudes say that no product can overflow, nothing needs masking.
        size = self.limit * (x.abs().amax() + self.loc.abs().amax())
        masked = x.device.type != "cpu" or not bool(size < torch.finfo(x.dtype).max)
        d_x = torch.zeros_like(x) if want_x else None
        for k in self._component_cuts(x):
            z, inverse, weight = self._whiten(x, k), self.inverse[:, k], c[:, k].unsqueeze(-2)
            if masked:  # z may be inf where nothing is asked of it
                z.masked_fill_(weight == 0, 0.0)
            cz = z * weight
            first[:, k] += cz.sum(-1)
            second[:, k] += z.mul_(cz).sum(-1) if self.diagonal else cz @ z.mT
            if d_x is not None and self.diagonal:
                d_x -= cz.mul_(inverse.unsqueeze(-1)).sum(1)
            elif d_x is not None:  # the sum over components is part of the product
                d_x.baddbmm_(inverse.flatten(1, 2).mT, cz.flatten(1, 2), alpha=-1.0)
        return d_x

    def _whiten(self, x: Tensor, k: slice) -> Tensor:
        """`_whiten` in place."""
        deviation, inverse = x.unsqueeze(1) - self.loc[:, k].unsqueeze(-1), self.inverse[:, k]
        return deviation.mul_(inverse.unsqueeze(-1)) if self.diagonal else inverse @ deviation


def _flat(inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs with their batch dimensions made one."""
    x, log_weights, loc, scale = inputs
    batch = math.prod(x.shape[:-2])
    n = x.ndim - 2
    return (
        x.reshape(batch, *x.shape[n:]),
        log_weights.reshape(batch, *log_weights.shape[n:]),
        loc.reshape(batch, *loc.shape[n:]),
        scale.reshape(batch, *scale.shape[n:]),
    )


def _blocks(inputs: Sequence[Tensor]) -> Iterator[tuple[slice, _Mixtures, Iterator[slice]]]:
    """Blocks of batch elements, each with its prepared mixtures and with cuts of the points."""
    x, log_weights, loc, scale = inputs
    (batch, d, samples), k = x.shape, loc.shape[1]
    elements = _CPU_BLOCK if x.device.type == "cpu" else _DEVICE_BLOCK
    width = max(1, k, 2 * d)
    points = max(1, min(samples, elements // width))
    members = max(1, elements // max(width * points, scale[0].numel() if batch else 1))
    # Measured: with fewer components or points the product does not pay for its preparation.
    wide = x.dtype == torch.float32 and x.device.type == "cpu" and _is_diagonal(loc, scale)
    wide = wide and k >= 4 and points >= 256
    for b in _cuts(batch, members):
        yield b, _Mixtures(log_weights[b], loc[b], scale[b], elements, wide), _cuts(samples, points)


def _value(pooled: bool, keep: bool, *inputs: Tensor) -> tuple[Tensor, ...]:
    if not is_plain(inputs):
        logits = _expression(inputs)[0]
        return (_pool(logits, logits.dtype)[0],) if pooled else (logits,)
    x, log_weights, loc, scale = flat = _flat(inputs)
    batch, samples = inputs[0].shape[:-2], x.shape[2]
    table, row = (x.shape[0], loc.shape[1], samples), (x.shape[0], samples)
    out = x.new_empty(row if pooled else table)
    exps, total = (x.new_empty(table), x.new_empty(row)) if keep else (None, None)
    for b, mixtures, cuts in _blocks(flat):
        for n in cuts:
            logits = mixtures.logits(x[b, :, n].contiguous())
            if not pooled:
                out[b, :, n] = logits
                continue
            out[b, n], block_exps, block_total = _pool(logits, x.dtype)
            if exps is not None and total is not None:
                exps[b, :, n], total[b, n] = block_exps, block_total
    results = (out,) if exps is None or total is None else (out, exps, total)
    return tuple(r.reshape(*batch, *r.shape[1:]) for r in results)


def _vjp(
    pooled: bool,
    grad: Tensor,
    inputs: Sequence[Tensor],
    saved: Sequence[Tensor] | None,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    if saved is None or not is_plain((grad, *inputs)):
        logits, z, inverse = _expression(inputs)
        c = _coefficients(grad, logits, logits.dtype, pooled)
        cz = c.unsqueeze(-2) * z
        diagonal = inverse.ndim == z.ndim - 1
        pulled = cz * inverse.unsqueeze(-1) if diagonal else inverse.mT @ cz
        second = (cz * z).sum(-1) if diagonal else cz @ z.mT
        results = [-pulled.sum(-3), *_parameter_gradients((c.sum(-1), cz.sum(-1), second), inverse)]
        return tuple(r if n else None for r, n in zip(results, needed, strict=True))
    x, log_weights, loc, scale = flat = _flat(inputs)
    grad, *kept = (t.reshape(x.shape[0], *t.shape[inputs[0].ndim - 2 :]) for t in (grad, *saved))
    d_value = x.new_empty(x.mT.shape).mT if needed[0] else None
    gradients = [torch.empty_like(p) for p in flat[1:]]
    # Sums over blocks of points are carried in float64 where that is free.
    wide = torch.float64 if x.device.type == "cpu" else x.dtype
    for b, mixtures, cuts in _blocks(flat):
        moments = [torch.zeros(p[b].shape, dtype=wide, device=p.device) for p in flat[1:]]
        for n in cuts:
            block = x[b, :, n].contiguous()
            if kept:
                c = _shares(grad[b, n], kept[0][b, :, n], kept[1][b, n])
            else:
                c = _coefficients(grad[b, ..., n], mixtures.logits(block), x.dtype, pooled)
            d_block = mixtures.pull(block, c, moments, needed[0])
            if d_value is not None and d_block is not None:
                d_value[b, :, n] = d_block
        for g, s in zip(gradients, _parameter_gradients(moments, mixtures.inverse), strict=True):
            g[b] = s
    return tuple(
        r.reshape(i.shape) if r is not None and m else None
        for r, i, m in zip((d_value, *gradients), inputs, needed, strict=True)
    )


_components = custom(partial(_value, False, False), partial(_vjp, False), partial(_jvp, False))
_mixture = custom(partial(_value, True, False), partial(_vjp, True), partial(_jvp, True))
_mixture_keep = custom(partial(_value, True, True), partial(_vjp, True), partial(_jvp, True))
