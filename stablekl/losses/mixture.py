r"""Negative log-likelihood of targets under mixtures of Gaussians that a network puts out: mixture density networks.

The log-density is that of `GaussianMixture`: in log space, streamed over the components, its gradient by the
responsibilities. A target that no component is near has a finite loss and a gradient that leads there, where
``log(sum(w * exp(log_prob)))`` is inf and NaN; both in float64, so that they are finite wherever the dtype can hold
them (float32, target 1 away: down to log-scales of -43).

Likelihoods of mixtures are unbounded: a component may shrink to one target, and its loss falls for ever. ``min_scale``,
a share of the data's own standard deviation, is a floor of the scales, in logarithms a hyperbola,

.. math:: \log s = \log f + \tfrac12 \bigl(t + \sqrt{t^2 + 4c^2}\bigr), \qquad t = \log(\text{scale}/f), \; c = 0.1,

whose slope below the floor is c^2/t^2: a network that starts, or strays, at a log-scale of -20 comes back. Under a
floor that is added, in quadrature or not, the gradient by a log-scale is a power of scale/f, and nothing moves again.
A scale of 10 f is used 0.4 % wider, one of 1,000 f 0.1 %. To factors of covariances f^2 I is added.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..distributions._base import broadcast_shape
from ..mixtures.components import Components
from ..mixtures.density import component_log_probs, mixture_log_prob
from ..mixtures.weights import normalised_log_weights
from ..parameterizations import check_positive
from ._reduction import check_factor, check_mask, check_rows, promoted
from .categorical import check_logits

__all__ = ["MixtureDiagnostics", "mixture_diagnostics", "mixture_nll_loss"]


# Half the width of the corner of a floor, in the logarithm of the scale.
CORNER = 0.1


def _above(log_scale: Tensor, floor: Tensor) -> Tensor:
    """The scale, kept above the floor."""
    log_floor = torch.log(floor)
    t = log_scale - log_floor
    root = torch.sqrt(t * t + 4 * CORNER**2)
    below = t < 0  # where t + root would cancel
    excess = torch.where(below, 2 * CORNER**2 / (root - t.clamp(max=0)), 0.5 * (t.clamp(min=0) + root))
    return torch.exp(log_floor + excess)


class MixtureDiagnostics(NamedTuple):
    """What to look at when a mixture's likelihood looks too good. Nothing here is differentiable.

    Attributes:
        usage: mean posterior probability of each component over all targets, ``(K,)``; 0 for one that explains none.
        effective_components: the exponential of the entropy of ``usage``, from 1 to K.
        smallest_scale: the least standard deviation of a component in any row, in the unit of the targets, with the
            floor where there is one.
        collapsed: the share of targets most likely to come from a component narrower than twice the floor.
    """

    usage: Tensor
    effective_components: Tensor
    smallest_scale: Tensor
    collapsed: Tensor


def _components(
    target: Tensor,
    logits: Tensor,
    loc: Tensor,
    scale: Tensor | None,
    log_scale: Tensor | None,
    scale_tril: Tensor | None,
    mask: Tensor | None,
    min_scale: Tensor | float | None,
) -> tuple[Tensor, Components]:
    named = (("scale", scale), ("log_scale", log_scale), ("scale_tril", scale_tril))
    given = [(name, x) for name, x in named if x is not None]
    if len(given) != 1:
        names = ", ".join(name for name, _ in given) or "none"
        raise ValueError(f"give exactly one of scale, log_scale and scale_tril; got {names}")
    ((name, raw),) = given
    scalar = loc.ndim == logits.ndim
    if scalar:
        if scale_tril is not None:
            raise ValueError("scale_tril is for vectors: loc has shape (..., K), targets are numbers; use scale")
        target, loc, raw = target.unsqueeze(-1), loc.unsqueeze(-1), raw.unsqueeze(-1)
        min_scale = min_scale.unsqueeze(-1) if isinstance(min_scale, Tensor) and min_scale.ndim else min_scale
    if loc.ndim != logits.ndim + 1 or loc.shape[-2] != logits.shape[-1] or target.shape[-1] != loc.shape[-1]:
        raise ValueError(
            "a mixture needs logits (..., K) and loc (..., K, D) for targets (..., D), or loc (..., K) for targets "
            f"(...); got shapes {tuple(logits.shape)}, {tuple(loc.shape)} and {tuple(target.shape)}"
        )
    n, (k, d) = logits.ndim - 1, loc.shape[-2:]
    wanted = (k, d, d) if name == "scale_tril" else (k, d)
    tail = tuple(raw.shape[n:])
    if raw.ndim != n + len(wanted) or any(x not in (1, y) for x, y in zip(tail, wanted, strict=True)):
        text = f"scale_tril (..., K, D, D) = {(*loc.shape, d)}" if len(wanted) == 3 else f"{name} of the shape of loc"
        raise ValueError(f"a mixture with loc of shape {tuple(loc.shape)} needs {text}, got {tuple(raw.shape)}")
    raw = raw.expand(*raw.shape[:n], *wanted)
    batch = broadcast_shape(logits.shape[:-1], loc.shape[:-2], raw.shape[:n])
    rows = check_rows("targets in rows of shape", target.shape[:-1], "mixtures in rows of shape", batch)
    # in float64: the gradient by a log-scale goes through that by the scale, z^2/scale, which leaves the range first
    dtype = torch.float32 if loc.device.type == "mps" else torch.float64
    narrow = promoted(logits)
    target, logits, loc, raw = (x.to(dtype) for x in (target, logits, loc, raw))
    if mask is not None:
        check_mask(mask, rows, "target")
        row = mask.unsqueeze(-1)
        target, logits = torch.where(row, target, 0.0), torch.where(row, logits, 0.0)
        loc = torch.where(row.unsqueeze(-1), loc, 0.0)
        blank = torch.eye(loc.shape[-1], dtype=dtype, device=loc.device) if name == "scale_tril" else 1.0
        wide = row.reshape(*row.shape, *(1,) * (len(wanted) - 1))
        raw = torch.where(
            wide, raw, 0.0 if name == "log_scale" else torch.as_tensor(blank, device=loc.device).to(dtype)
        )
    check_logits("logits", logits.to(narrow))  # by the rounding that they came with
    if name == "scale_tril":
        check_factor(name, raw)
    elif name == "scale":
        check_positive(name, raw)
    if min_scale is None:
        raw = torch.exp(raw) if name == "log_scale" else raw
    else:
        floor = torch.as_tensor(min_scale, dtype=dtype, device=loc.device)
        check_positive("min_scale", floor)
        if name == "scale_tril":
            raw = torch.linalg.cholesky(raw @ raw.mT + torch.diag_embed(floor.square().expand(loc.shape[-1])))
        else:
            raw = _above(raw if name == "log_scale" else raw.log(), floor)
    return target, Components(normalised_log_weights(logits, None), loc, raw)


def mixture_nll_loss(
    target: Tensor,
    logits: Tensor,
    loc: Tensor,
    *,
    scale: Tensor | None = None,
    log_scale: Tensor | None = None,
    scale_tril: Tensor | None = None,
    mask: Tensor | None = None,
    min_scale: Tensor | float | None = None,
) -> Tensor:
    r"""``-log sum_k w_k N(target; loc_k, scale_k)``, each row with a mixture of its own.

    Args:
        target: ``(..., D)``; or numbers, ``(...)``.
        logits: of the weights, ``(..., K)``.
        loc: means, ``(..., K, D)``; for numbers ``(..., K)``.
        scale: standard deviations, of the shape of ``loc``.
        log_scale: or their logarithms.
        scale_tril: or Cholesky factors of full covariances, ``(..., K, D, D)``.
        mask: True where there is a target, ``(...)``. What is elsewhere, NaN or not, is never looked at: the loss is 0
            there, with a gradient of 0.
        min_scale: the least standard deviation, or one for each of the D dimensions, by the floor at the head of the
            module; a thousandth of the data's own is a start. None: no floor, and a likelihood without bound.

    Returns:
        The loss of each row in nats, ``(...)``, in the dtype that the arguments promote to; computed in float64 where
        the device has it.

    Raises:
        ValueError: not exactly one of ``scale``, ``log_scale`` and ``scale_tril``; shapes that do not fit, or would
            pair each target with each row's mixture; a scale that is not positive (named, with its index), a factor
            that is not lower triangular; probabilities in place of logits, NaN or +inf among them, or a row of -inf; a
            mask that is not boolean.

    Example:
        >>> import torch
        >>> from stablekl.losses import mixture_nll_loss
        >>> far = mixture_nll_loss(torch.tensor([1e4]), torch.zeros(1, 2), torch.tensor([[-1.0, 1.0]]),
        ...                        scale=torch.ones(1, 2))
        >>> print(far)
        tensor([49990004.])
    """
    scales = (x for x in (scale, log_scale, scale_tril) if x is not None)
    point, components = _components(target, logits, loc, scale, log_scale, scale_tril, mask, min_scale)
    loss = -mixture_log_prob(point, components)
    if mask is not None:
        loss = torch.where(mask, loss, 0.0)
    return loss.to(promoted(target, logits, loc, *scales))


def mixture_diagnostics(
    target: Tensor,
    logits: Tensor,
    loc: Tensor,
    *,
    scale: Tensor | None = None,
    log_scale: Tensor | None = None,
    scale_tril: Tensor | None = None,
    mask: Tensor | None = None,
    min_scale: Tensor | float | None = None,
) -> MixtureDiagnostics:
    """Which components explain the targets, and whether some have collapsed; arguments as for `mixture_nll_loss`.

    Raises:
        ValueError: as `mixture_nll_loss`; or a mask without a target.
    """
    with torch.no_grad():
        point, c = _components(target, logits, loc, scale, log_scale, scale_tril, mask, min_scale)
        posterior = torch.softmax(component_log_probs(point, c) + c.log_weights, -1)
        spread = c.scale if c.is_diagonal else torch.linalg.vector_norm(c.scale, dim=-1)
        narrow = spread.amin(-1)
        if mask is not None:
            used = mask.expand(posterior.shape[:-1])
            posterior, narrow = posterior[used], narrow.expand(posterior.shape)[used]
        posterior, narrow = posterior.reshape(-1, posterior.shape[-1]), narrow.reshape(-1, narrow.shape[-1])
        if not len(posterior):
            raise ValueError("there is no target to diagnose: the mask is False everywhere, or the batch is empty")
        usage = posterior.mean(0)
        entropy = -(usage * usage.clamp(min=torch.finfo(usage.dtype).tiny).log()).sum()
        floor = 0.0 if min_scale is None else float(torch.as_tensor(min_scale).max())
        likely = narrow.expand(posterior.shape).gather(-1, posterior.argmax(-1, keepdim=True))
        return MixtureDiagnostics(usage, entropy.exp(), narrow.min(), (likely < 2 * floor).to(usage.dtype).mean())
