r"""What the distribution functions of Gamma and Beta share: one tail by its logarithm, the other as its complement.

On the axis of :math:`\log x` (of the logit) these densities are log-concave, and entire functions. Away from the mean
a tail is the density there times :math:`\int_0^\infty e^{-\phi(t)} dt`, with a convex :math:`\phi` from
:math:`\phi(0) = 0` on, of terms that are positive: 48 points of Gauss and Legendre's rule, up to where :math:`\phi`
is 42, leave less than eps of it, whatever the parameters. Its logarithm keeps digits where the tail is no float, and so
does the complement of one that is nearly 1.

**Accuracy**, float64, in ulps times max(1, abs(log p)) of each result p, the largest of the four functions seen against
mpmath for shapes log-uniform in 1e-12 ... 1e12 and points about the mean and far out on either side: Gamma 6.6 (1,200
sets), Beta 6.0 (240 sets). An ulp of the logarithm is what the factor is for. torch's gammainc is off by 6e6.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._autograd import is_plain, rowwise
from .._bregman import lgamma_bregman_value, lgamma_curvature, remainder_of_log
from .._deviance import gamma_scale
from ..quadrature import table
from ..special import expm1mx, expm1mx_value, log1pmx, log1pmx_value
from ._density import log1mexp
from .cross._pieces import remainders

__all__ = [
    "DIFFERENTIABLE",
    "NOTHING",
    "PLAIN",
    "Functions",
    "Tail",
    "in_blocks",
    "lgamma_from_one",
    "lgamma_rest",
    "log_less_digamma",
    "log_ratio",
    "points",
    "steepest",
]

NOTHING = 42.0  # of an exponent; e to the minus that is left out
_ROWS = 2**12  # of blocks: a dozen numbers at each point stay in the caches
# x and w/2 of x = (1 - cos)/2, 48 roots of the Legendre polynomial, correctly rounded: numpy's are off by 1e-13 of
# the first ones, which is where the integrand is largest.
# fmt: off
_POINTS = (
    0.0006144963737869407, 0.003234913866824621, 0.007937708138586571, 0.014704203726876374, 0.02350614841978457,
    0.034306654646722834, 0.04706043164221516, 0.06171398986287606, 0.07820586918780323, 0.09646689798527869,
    0.11642048374212983, 0.13798293453809268, 0.16106381018366805, 0.1855663016117432, 0.21138763695801366,
    0.23841951263888347, 0.2665485476245208, 0.2956567590046416, 0.32562205685391965, 0.3563187563222722,
    0.38761810480265546, 0.41938882196555416, 0.4514976503952686, 0.4838099145185653, 0.5161900854814346,
    0.5485023496047313, 0.5806111780344458, 0.6123818951973445, 0.6436812436777278, 0.6743779431460803,
    0.7043432409953584, 0.7334514523754792, 0.7615804873611165, 0.7886123630419863, 0.8144336983882569,
    0.838936189816332, 0.8620170654619074, 0.8835795162578701, 0.9035331020147214, 0.9217941308121967,
    0.938286010137124, 0.9529395683577848, 0.9656933453532772, 0.9764938515802154, 0.9852957962731236,
    0.9920622918614135, 0.9967650861331754, 0.999385503626213,
)
_WEIGHTS = (
    0.0015766730261529192, 0.0036637769506381312, 0.00573861728961727, 0.007789657861471924, 0.009808080228677764,
    0.01178538041966219, 0.013713254854178474, 0.015583613916399045, 0.01738861128238522, 0.019120675532915354,
    0.020772541471732374, 0.02233728042834714, 0.02380832924624524, 0.025179517776927236, 0.026445094742596834,
    0.027599751849992082, 0.028638646050201607, 0.029557419849197818, 0.03035221958294694, 0.031019711579946332,
    0.03155709614312701, 0.03196211929232409, 0.032233082217975044, 0.03236884840634196, 0.03236884840634196,
    0.032233082217975044, 0.03196211929232409, 0.03155709614312701, 0.031019711579946332, 0.03035221958294694,
    0.029557419849197818, 0.028638646050201607, 0.027599751849992082, 0.026445094742596834, 0.025179517776927236,
    0.02380832924624524, 0.02233728042834714, 0.020772541471732374, 0.019120675532915354, 0.01738861128238522,
    0.015583613916399045, 0.013713254854178474, 0.01178538041966219, 0.009808080228677764, 0.007789657861471924,
    0.00573861728961727, 0.0036637769506381312, 0.0015766730261529192,
)
# fmt: on


class Functions(NamedTuple):
    """Those of `special`, with derivatives or without: torch.compile wants none within another derivative."""

    expm1mx: Callable[[Tensor], Tensor]
    log1pmx: Callable[[Tensor], Tensor]


PLAIN = Functions(expm1mx_value, log1pmx_value)
DIFFERENTIABLE = Functions(expm1mx, log1pmx)


class Tail(NamedTuple):
    """The probability of one side of x.

    Attributes:
        log: its logarithm, to its relative accuracy also where it is nearly 0; differentiable.
        lower: whether it is that of what is below.
    """

    log: Tensor
    lower: Tensor

    def cdf(self) -> Tensor:
        """P(X <= x)."""
        return torch.where(self.lower, torch.exp(self.log), _complement(self.log))

    def sf(self) -> Tensor:
        """P(X > x)."""
        return torch.where(self.lower, _complement(self.log), torch.exp(self.log))

    def log_cdf(self) -> Tensor:
        """Log of P(X <= x)."""
        return torch.where(self.lower, self.log, log1mexp(-self.log))

    def log_sf(self) -> Tensor:
        """Log of P(X > x)."""
        return torch.where(self.lower, log1mexp(-self.log), self.log)


# torch's expm1 differentiates to expm1 + 1, which is 0 from -37 on
_complement = rowwise(lambda log: (-torch.expm1(log),), lambda inputs, saved: (-torch.exp(inputs[0]),))


def points(top: Tensor) -> tuple[Tensor, Tensor]:
    """Points from 0 to ``top``, and their weights, in one more dimension."""
    x, weights = table(_POINTS, top.device).to(top.dtype), table(_WEIGHTS, top.device).to(top.dtype)
    column = top.unsqueeze(-1)
    return column * x, column * weights


def steepest(phi: Callable[[Tensor], tuple[Tensor, Tensor]], top: Tensor) -> Tensor:
    """Three steps of Newton's from above towards the t at which phi, a convex function, is `NOTHING`.

    Args:
        phi: the function and its slope.
        top: where it is that much or more.
    """
    for _ in range(3):
        value, slope = phi(top)
        nearer = top - (value - NOTHING) / slope
        top = torch.where((nearer > 0) & (nearer < top), nearer, top)
    return top


def in_blocks(f: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
    """The results of an elementwise f, some rows at a time on a CPU, since it makes 48 numbers of each."""
    n = inputs[0].numel()
    if n <= _ROWS or inputs[0].device.type != "cpu" or not is_plain(inputs):
        return f(*inputs)
    flat = [x.reshape(-1) for x in inputs]
    parts = [f(*(x[i : i + _ROWS] for x in flat)) for i in range(0, n, _ROWS)]
    return tuple(torch.cat(column).reshape(inputs[0].shape) for column in zip(*parts, strict=True))


def lgamma_rest(x: Tensor) -> tuple[Tensor, Tensor]:
    """`_deviance.gamma_scale`, but by Stirling's remainder from 1 on, up to 10 of 10 ulp less. For values."""
    far = x >= 1
    scale, rest = gamma_scale(torch.where(far, 0.5, x))
    large = torch.where(far, x, 1.0)
    return torch.where(far, torch.sqrt(large / (2 * math.pi)), scale), torch.where(far, remainders(large)[0], rest)


def lgamma_from_one(y: Tensor, x: Tensor, d: Tensor) -> Tensor:
    """The divergence of lgamma at y from x, d = y - x >= 0, as `_bregman.lgamma_bregman`. For values."""
    return y * remainder_of_log(-d / y, x / y) + lgamma_bregman_value(y, x, d)


log_less_digamma = rowwise(
    lambda x: (0.5 / x + remainders(x)[1],), lambda inputs, saved: (-lgamma_curvature(inputs[0]),)
)
"""log(x) - digamma(x), positive; differentiable."""


def log_ratio(x: Tensor, d: Tensor, y: Tensor) -> Tensor:
    """log(y/x), d = y - x; differentiable."""
    near = d.abs() < 0.5 * x
    far = torch.where(near, x, y)
    return torch.where(near, torch.log1p(torch.where(near, d, 0.0) / x), torch.log(far) - torch.log(x))
