r"""Quantiles of scalar mixtures: a bracket, and Newton's method in log space inside it.

The quantile of u solves log F(x) = log u where u <= 1/2, log(1 - F(x)) = log1p(-u) above. In the logarithm a
normal tail is a parabola, on which Newton's method converges from anywhere; F itself is flat there, and 1e-300 is
beyond the reach of a step in it. The bracket, for normal components and after reflection for u > 1/2,

    max(min_k Q_k(u), min_k Q_k(u/(K w_k)))  <=  x  <=  min(max_k Q_k(u), min_k Q_k(u/w_k))

with Q_k(p) = mu_k + sigma_k ndtri(p)
holds since w_k F_k(x) <= F(x) <= K max_k w_k F_k(x), and is narrow at once, except between modes far apart. A Newton
step that leaves it, or that is not at most half the step before, is replaced by bisection (Brent, "Algorithms for
minimization without derivatives", 1973, chapter 4), so that no plateau of F can throw it out. Other families have the
bracket of the components' quantiles.

The derivatives are implicit: dx/du = 1/m(x) and dx/dtheta = -(dF/dtheta)/m(x), formed in log space (`implicit`).

Accuracy: in float64, \|log F(x) - log u\| was at most 1.7 (eps (1 + \|log u\|) + what an ulp of x changes) on 27,000
points
of 150 random mixtures (u from 1e-300 to 1 - 1e-16, weights from 1e-20, modes up to 1e11 standard deviations apart,
scales 1e-4 to 1e4): x is known to its conditioning, eps u (1 + \|log u\|)/m(x), or to its last digit. F was evaluated 6
times for the median mixture (180 points each), 60 times for the worst.

Gaussian mixtures look at the data to stop, under vmap too; torch.compile calls an operator. Other families take all
`STEPS` steps inside a transform, which is slow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from .._autograd import custom, is_plain
from ..distributions._base import moved, widened
from ..special import log_ndtr, logsumexp
from .components import Components
from .cumulative import diagonal_gaussian, nearer_tail
from .density_terms import living
from .family_tails import known_tails
from .implicit import implicit_point
from .interior import interior_point

__all__ = ["capturing", "common_shape", "find_root", "no_vectors", "quantile"]

# Steps at most. Bisection alone halves any bracket of float64 numbers of one scale in 60; where the data cannot be
# looked at, all are taken.
STEPS = 100
# Of the bracket: an ulp or two of ndtri (1.4 observed) and those of its argument.
OUTWARD = 8.0


def quantile(mixture: Any, u: Tensor) -> Tensor:
    """Quantiles of a scalar mixture, differentiable in u and in the parameters.

    Args:
        mixture: a `MixtureSameFamily` of scalar components, or of Gaussians over vectors of length 1.
        u: probabilities, ``sample_shape + batch_shape``. 0 and 1 give the ends of the support.

    Returns:
        ``sample_shape + batch_shape + event_shape``, in the dtype that u and the parameters promote to.

    Raises:
        NotImplementedError: events are vectors longer than 1, or the family has no ``cdf`` or no ``icdf``.
        ValueError: u is NaN or outside [0, 1], and says where; its shape does not broadcast with the batch shape.

    Example:
        >>> import torch, stablekl
        >>> from torch.distributions import Categorical, Normal
        >>> m = stablekl.MixtureSameFamily(
        ...     Categorical(probs=torch.tensor([0.5, 0.5])), Normal(torch.tensor([0.0, 10.0]), torch.ones(2)))
        >>> print([f"{x:.4f}" for x in m.icdf(torch.tensor([1e-30, 0.125, 0.75]))])
        ['-11.4039', '-0.6745', '10.0000']
    """
    component = mixture.component_distribution
    no_vectors(component)
    if not isinstance(u, Tensor):
        raise ValueError(f"the probabilities must be a tensor, got {u!r}")
    _check(u)
    gaussian = diagonal_gaussian(component)
    shape = common_shape(u, mixture)
    u_wide = widened(u).expand(shape)
    if gaussian is None:
        dtype = _dtype(u, mixture, _middle(component, u))
        return _family_quantile(u_wide, mixture).to(dtype)
    components = Components(mixture._log_weights(gaussian.loc.dtype), gaussian.loc, gaussian.scale)
    batch = len(mixture.batch_shape)
    split = len(shape) - batch
    points = u_wide.reshape(math.prod(shape[:split]), *shape[split:]).movedim(0, -1)
    parameters = (t.detach() for t in (components.log_weights, gaussian.loc[..., 0], gaussian.scale[..., 0]))
    x = _normal_root(points.detach(), *parameters).movedim(-1, 0).reshape(shape)
    result = implicit_point(x.unsqueeze(-1), components, u_wide.unsqueeze(-1))
    result = result if component.event_shape else result.squeeze(-1)
    return result.to(_dtype(u, mixture, component.mean))


def no_vectors(component: Distribution) -> None:
    """NotImplementedError for events of more than one number."""
    if component.event_shape not in ((), (1,)):
        raise NotImplementedError(
            f"events of shape {tuple(component.event_shape)} have no quantiles: many points x share one probability "
            "P(X <= x). Take those of a marginal, a mixture of the components' marginals"
        )


def common_shape(u: Tensor, mixture: Any) -> torch.Size:
    """That of the probabilities and of the batch; ValueError where they do not broadcast."""
    try:
        return torch.Size(torch.broadcast_shapes(u.shape, mixture.batch_shape))
    except RuntimeError as error:
        raise ValueError(
            f"probabilities of shape {tuple(u.shape)} must broadcast with the batch shape {tuple(mixture.batch_shape)}"
        ) from error


def _dtype(u: Tensor, mixture: Any, like: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(u.dtype, like.dtype), mixture.mixture_distribution._param.dtype)


def _middle(component: Distribution, u: Tensor) -> Tensor:
    """The components' medians, if there is such a thing."""
    try:
        median: Tensor = component.icdf(u.new_tensor(0.5, dtype=torch.promote_types(u.dtype, torch.float16)))
    except NotImplementedError as error:
        raise NotImplementedError(
            f"{type(component).__name__} has no icdf in torch, which would bracket the quantiles of its mixtures"
        ) from error
    return median


def _check(u: Tensor) -> None:
    values = u.detach()
    bad = ~((values >= 0) & (values <= 1))
    if is_plain((bad,)) and not capturing(bad) and bool(bad.any()):
        index = bad.nonzero()[0].tolist()
        raise ValueError(
            f"u = {float(values[tuple(index)])} at {index} is not a probability: quantiles are those of numbers in "
            "[0, 1]. Look for the first such value upstream; rounding may carry a sum of probabilities past 1."
        )


def capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured, during which data cannot be looked at."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def find_root(rise: Callable[[Tensor], tuple[Tensor, Tensor]], tolerance: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Zero of an increasing function between ``low`` and ``high``, from ``high`` down.

    Args:
        rise: the function and its slope.
        tolerance: below which a value is its rounding error.
        low: where it is negative.
        high: where it is positive.
    """
    x, step, active = high, high - low, torch.ones_like(high, dtype=torch.bool)
    look = is_plain((x,)) and not capturing(x)
    for _ in range(STEPS):
        h, slope = rise(x)
        low, high = torch.where(h < 0, x, low), torch.where(h > 0, x, high)
        move = -h / slope
        new = x + move
        safe = (new >= low) & (new <= high) & (move.abs() <= 0.5 * step.abs())
        noise = h.abs() <= tolerance
        # Where the value is noise, one Newton step more, which is the smaller error of the two; no bisection.
        new = torch.where(safe & (h != 0), new, torch.where(noise, x, 0.5 * low + 0.5 * high))
        step = new - x
        x = torch.where(active, new, x)
        active = active & ~noise & (step != 0)
        if look and not bool(active.any()):
            break
    return x


def _half(u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which tail, the smaller probability, its logarithm, and where neither is 0 (elsewhere 1/4 stands in)."""
    inner = (u > 0) & (u < 1)
    u = torch.where(inner, u, 0.25)
    lower = u <= 0.5
    log_p = torch.where(lower, torch.where(lower, u, 0.5).log(), torch.log1p(-torch.where(lower, 0.5, u)))
    return lower, torch.where(lower, u, 1.0 - u), log_p, inner


def _normal_bracket(p: Tensor, log_p: Tensor, log_weights: Tensor, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The module's bracket, rounded outwards; all (..., K, N) or broadcastable with it."""
    dead = log_weights == -math.inf
    eps = torch.finfo(p.dtype).eps

    def bounds(p: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.special.ndtri(p)
        x = loc + scale * z
        slack = OUTWARD * eps * (loc.abs() + scale * (1.0 + z.abs() + log_p.abs()))
        # An infinite bound stays one: inf - inf would be NaN.
        return tuple(torch.where(z.isinf(), x, x + s * slack) for s in (-1.0, 1.0))  # type: ignore[return-value]

    def least(x: Tensor) -> Tensor:
        return torch.where(dead, math.inf, x).amin(-2)

    log_share = torch.where(dead, 0.0, log_p - log_weights)
    whole, all_of_it = bounds(p), bounds(log_share.exp().clamp(max=1.0))[1]
    part = bounds((log_share - math.log(loc.shape[-2])).exp().clamp(max=1.0))[0]
    low = torch.maximum(least(whole[0]), least(part))
    high = torch.minimum(-least(-whole[1]), least(all_of_it))
    return low, high


def _solve_normal(u: Tensor, log_weights: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    loc, scale = (t.squeeze(-1) for t in living(log_weights, loc.unsqueeze(-1), scale.unsqueeze(-1)))
    log_weights, loc, scale = (t.unsqueeze(-1) for t in (log_weights, loc, scale))
    lower, p, log_p, inner = _half(u)
    sign = torch.where(lower, 1.0, -1.0).to(u.dtype)
    loc = loc * sign.unsqueeze(-2)  # reflected: the quantile of 1 - u
    log_height = log_weights - (scale * math.sqrt(2.0 * math.pi)).log()

    def rise(x: Tensor) -> tuple[Tensor, Tensor]:
        z = (x.unsqueeze(-2) - loc) / scale
        log_cdf = logsumexp(log_weights + log_ndtr(z), -2)
        log_density = logsumexp(log_height - 0.5 * z.square(), -2)
        return log_cdf - log_p, (log_density - log_cdf).exp()

    low, high = _normal_bracket(p.unsqueeze(-2), log_p.unsqueeze(-2), log_weights, loc, scale)
    x = find_root(rise, 2.0 * torch.finfo(u.dtype).eps * (1.0 + log_p.abs()), low, high)
    return torch.where(inner, sign * x, _ends(u, -math.inf, math.inf))


def _ends(u: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """The ends of the support at 0 and 1, NaN outside."""
    return torch.where(u == 0, low, torch.where(u == 1, high, math.nan)).to(u.dtype)


# An operator, so that the steps stay out of compiled graphs, which would hold all of them.
@torch.library.custom_op("stablekl::normal_mixture_quantile", mutates_args=())
def _traced_normal(u: Tensor, log_weights: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    return _solve_normal(u, log_weights, loc, scale).contiguous()


@_traced_normal.register_fake
def _(u: Tensor, log_weights: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(u, memory_format=torch.contiguous_format)


def _value(*inputs: Tensor) -> tuple[Tensor]:
    return ((_traced_normal if torch.compiler.is_compiling() else _solve_normal)(*inputs),)


# Without derivatives: `implicit_point` gives the root its own. It is `custom` for vmap's sake.
_normal_root = custom(
    _value,
    lambda grad, inputs, saved, needed: (None,) * len(inputs),
    lambda inputs, tangents, ndim: torch.zeros_like(inputs[0]),
)


def _family_bracket(
    by_formula: Callable[..., Tensor], p: Tensor, upper: bool, log_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The module's bracket of the quantile of p, or of 1 - p if ``upper``, from the components' own."""
    dead = log_weights == -math.inf
    log_share = p.log() - torch.where(dead, 0.0, log_weights)
    whole, part, all_of_it = (
        by_formula(v.clamp(max=1.0), upper)
        for v in (p, (log_share - math.log(log_weights.shape[-1])).exp(), log_share.exp())
    )
    # More than a component has says nothing: the end of its support need not be an end of the mixture's.
    all_of_it = torch.where(log_share >= 0, -math.inf if upper else math.inf, all_of_it)
    least = [torch.where(dead, math.inf, x).amin(-1) for x in (whole, part, all_of_it)]
    most = [torch.where(dead, -math.inf, x).amax(-1) for x in (whole, part, all_of_it)]
    if upper:
        return torch.maximum(least[0], most[2]), torch.minimum(most[0], most[1])
    return torch.maximum(least[0], least[1]), torch.minimum(most[0], least[2])


def _family_quantile(u: Tensor, mixture: Any) -> Tensor:
    """The same for any family, by its own cdf, icdf and log_prob in working precision."""
    wide = moved(mixture, u.dtype)
    wide._validate_args = False
    component: Distribution = wide.component_distribution
    lower, p, log_p, inner = _half(u)
    sign = torch.where(lower, 1.0, -1.0).to(u.dtype)
    dead = wide.log_weights == -math.inf
    tails = known_tails(component)
    by_formula = None if tails is None else tails.quantile

    def ends(u: Tensor) -> tuple[Tensor, Tensor]:
        q = (by_formula or component.icdf)(u.unsqueeze(-1))
        return torch.where(dead, math.inf, q).amin(-1), torch.where(dead, -math.inf, q).amax(-1)

    def rise(x: Tensor) -> tuple[Tensor, Tensor]:
        log_tail = nearer_tail(wide, x, lower)
        return sign * (log_tail - log_p), (wide.log_prob(x) - log_tail).exp()

    with torch.no_grad():
        if by_formula is None:
            low, high = ends(torch.where(inner, u.detach(), 0.25))
        else:
            column = p.detach().unsqueeze(-1)
            sides = [_family_bracket(by_formula, column, upper, wide.log_weights) for upper in (False, True)]
            low, high = (torch.where(lower, a, b) for a, b in zip(*sides, strict=True))
        x = find_root(rise, 2.0 * torch.finfo(u.dtype).eps * (1.0 + log_p.abs()), low, high)
        # What the family's icdf cannot tell from the end of the support is the end.
        x = torch.where(low.isinf(), low, torch.where(high.isinf(), high, x))
        start, end = ends(torch.where(inner, torch.zeros_like(u), u.detach()))
        x = torch.where(inner, x, _ends(u, start, end))
        # At a point of the edge there is nothing to move by.
        at = torch.where(inner & x.isfinite(), x, start)
        inner = inner & x.isfinite() & (wide.log_prob(at) > -math.inf) & (nearer_tail(wide, at, lower) > -math.inf)
    # Each Newton step at the root doubles the number of derivatives that are right: 1, 3. Its value is 0.
    safe = interior_point(component, u)[..., 0]
    for _ in range(2):
        at = torch.where(inner, x, safe)
        log_tail = nearer_tail(wide, at, lower)
        move = sign * (log_p - log_tail) * (log_tail - wide.log_prob(at)).exp()
        x = torch.where(inner, x + (move - move.detach()), x)
    return x
