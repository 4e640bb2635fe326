"""What rules between two families share: reading parameters, values with a gradient of their own, sums that cancel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Distribution

from ..._autograd import is_dual, is_plain
from ..._double import Double, double, subtract
from ..._wide import log_quotient, wide
from ...registry import register_hardened
from .._base import common_dtype, given, widened
from .._scalar import attached, scalar_rule
from ..bernoulli import Bernoulli
from ..beta import Beta
from ..binomial import Binomial
from ..continuous_bernoulli import ContinuousBernoulli
from ..exponential import Exponential
from ..gamma import Gamma
from ..gumbel import Gumbel
from ..half_normal import HalfNormal
from ..inverse_gamma import InverseGamma
from ..laplace import Laplace
from ..log_normal import LogNormal
from ..normal import Normal
from ..pareto import Pareto
from ..poisson import Poisson
from ..uniform import Uniform
from ..weibull import Weibull

__all__ = ["Value", "cross_rule", "read", "register_pair", "settled"]

Value = Callable[..., Tensor]

# The parameters of a rule, in order; None for the one of probs and logits that was given.
PARAMETERS: dict[type[Distribution], tuple[str | None, ...]] = {
    Bernoulli: (None,),
    Beta: ("concentration1", "concentration0"),
    Binomial: ("total_count", None),
    ContinuousBernoulli: (None,),
    Exponential: ("rate",),
    Gamma: ("concentration", "rate"),
    Gumbel: ("loc", "scale"),
    HalfNormal: ("scale",),
    InverseGamma: ("concentration", "rate"),
    Laplace: ("loc", "scale"),
    LogNormal: ("loc", "scale"),
    Normal: ("loc", "scale"),
    Pareto: ("scale", "alpha"),
    Poisson: ("rate",),
    Uniform: ("low", "high"),
    Weibull: ("scale", "concentration"),
}
# From here on a sum of terms is taken again in twice the digits: of float64's it has lost four bits.
_CANCELLED = 16.0


def read(distribution: Distribution, family: type[Distribution]) -> tuple[tuple[str, ...], tuple[Tensor, ...]]:
    """The names and values of a distribution's parameters, as they are stored."""
    names, values = [], []
    for name in PARAMETERS[family]:
        found = (name, getattr(distribution, name)) if name else given(distribution)
        names.append(found[0])
        values.append(found[1])
    return tuple(names), tuple(values)


def _logit(probs: Tensor) -> Tensor:
    """The logit, to its relative accuracy at 1/2 too; may be differentiated."""
    near = (probs - 0.5).abs() < 0.25
    centre, far = torch.where(near, probs, 0.5), torch.where(near, 0.5, probs)
    return torch.where(near, torch.log1p((2 * centre - 1) / (1 - centre)), torch.log(far) - torch.log1p(-far))


def precise_logit(probs: Tensor) -> Double:
    """The logit in twice the digits."""
    return log_quotient(wide(probs), wide(subtract(1.0, probs)))


def cross_rule(value: Value, smooth: Value, safe: tuple[float, ...]) -> Value:
    """A KL rule whose gradient is that of another formula of its value.

    Args:
        value: of float64 tensors of one shape, never differentiated.
        smooth: the same function by differentiable operations, which may lose digits.
        safe: parameters at which the value is finite: ``smooth`` gets them where it is not, and the gradient is 0.
    """
    core = scalar_rule(value, lambda *x: tuple(torch.zeros_like(v) for v in x))

    def rule(*parameters: Tensor) -> Tensor:
        dtype = common_dtype(*parameters)
        x = torch.broadcast_tensors(*(widened(v) for v in parameters))
        result = core(*x)
        if is_plain(x) and not is_dual(x):
            return result.to(dtype)
        finite = result.isfinite()
        slope = smooth(*(torch.where(finite, v, s) for v, s in zip(x, safe, strict=True)))
        return attached(result, torch.where(finite & slope.isfinite(), slope, 0.0)).to(dtype)

    return rule


def register_pair(
    family_p: type[Distribution],
    family_q: type[Distribution],
    value: Value,
    smooth: Value | None = None,
    safe: tuple[float, ...] = (),
    *,
    gradient: Callable[..., tuple[Tensor, ...]] | None = None,
    torch_lacks_it: bool = False,
) -> Value:
    """Register the rule of a pair of families; a ContinuousBernoulli stands in it by its logit.

    Args:
        family_p: ours.
        family_q: ours.
        value: of the parameters of p and then of q. With ``smooth``, a logit is a `Double`.
        smooth: as in `cross_rule`; without it the value is differentiable itself.
        safe: as in `cross_rule`; 0.5 will do for a probability and for a logit.
        gradient: the partial derivatives as in `scalar_rule`, in the place of ``smooth``; of no ContinuousBernoulli.
        torch_lacks_it: as in `register_hardened`.
    """
    width = len(PARAMETERS[family_p])
    place = 0 if family_p is ContinuousBernoulli else width if family_q is ContinuousBernoulli else -1

    def converted(f: Value, plain: Callable[[Tensor], Tensor], logit: Callable[[Tensor], Tensor | Double]) -> Value:
        def found(*x: Tensor) -> Tensor:
            edge = plain(x[place]).detach().isinf()  # all mass at one end, where there is no density
            y = logit(torch.where(edge, 0.5, x[place]))
            return torch.where(edge, torch.inf, f(*x[:place], y, *x[place + 1 :]))

        return f if place < 0 else found

    def built(plain: Callable[[Tensor], Tensor], precise: Callable[[Tensor], Double]) -> Value:
        if smooth is None:
            return scalar_rule(converted(value, plain, plain), gradient)
        return cross_rule(converted(value, plain, precise), converted(smooth, plain, plain), safe)

    rules = {"probs": built(_logit, precise_logit), "logits": built(lambda y: y, double)}

    def rule(p: Distribution, q: Distribution) -> Tensor:
        (names_p, x), (names_q, y) = read(p, family_p), read(q, family_q)
        return rules[(*names_p, *names_q)[place] if place >= 0 else "probs"](*x, *y)

    names = f"{family_p.__name__} against {family_q.__name__}"
    rule.__doc__ = f"KL of {names}, elementwise; see the module."
    return register_hardened(family_p, family_q, torch_lacks_it=torch_lacks_it)(rule)


def settled(
    terms: tuple[Tensor, ...], precise: Value, inputs: tuple[Tensor, ...], where: Tensor | None = None
) -> Tensor:
    """The sum of the terms; where they cancel (and ``where`` holds) that of the inputs in twice the digits.

    Args:
        terms: to add.
        precise: made by `where_needed`.
        inputs: what it takes.
        where: a mask.
    """
    result, size = terms[0], terms[0].abs()
    for x in terms[1:]:
        result, size = result + x, size + x.abs()
    lost = ~(size <= _CANCELLED * result)
    lost = lost if where is None else lost & where
    return precise(result, lost, *inputs)
