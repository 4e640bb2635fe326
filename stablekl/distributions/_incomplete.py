r"""What the distribution functions of Gamma and Beta share: one tail by its logarithm, the other as its complement.

On the axis of :math:`\log x` (of the logit) these densities are log-concave, and entire functions. Away from the mean
a tail is the density there times :math:`\int_0^\infty e^{-\phi(t)} dt`, with a convex :math:`\phi` from
:math:`\phi(0) = 0` on, of terms that are positive: 56 points of Gauss and Legendre's rule, up to where :math:`\phi`
is 40, leave less than eps of it, whatever the parameters. Its logarithm keeps digits where the tail is no float, and so
does the complement of one that is nearly 1.

**Accuracy**, float64, in ulps times max(1, abs(log p)) of each result p, the largest of the four functions seen against
mpmath for shapes log-uniform in 1e-12 ... 1e12 and points about the mean and far out on either side: Gamma 3.3 (1,282
sets), Beta 3.0 (317 sets), most of them before the rule had its last points; as it is, 1.8 (106 sets) and 1.7
(79 sets). An ulp of the logarithm is what the factor is for. torch's gammainc is off by 6e6.
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

NOTHING = 40.0  # of an exponent; e to the minus that is left out
_ROWS = 2**12  # of blocks: a dozen numbers at each point stay in the caches
# x and w/2 of x = (1 - cos)/2, 56 roots of the Legendre polynomial, correctly rounded: numpy's are off by 1e-13 of
# the first ones, which is where the integrand is largest.
# fmt: off
_POINTS = (
    0.0004528280992672078, 0.0023843869594651263, 0.005853142229919245, 0.010849145429871808, 0.017357049047254908,
    0.02535676021901868, 0.03482355987625185, 0.045728189789672254, 0.05803694583608623, 0.07171178311862568,
    0.08671043392855918, 0.10298653855306675, 0.12048978864743555, 0.13916608277490597, 0.15895769365276477,
    0.17980344659649655, 0.20163890861466835, 0.2243965875722327, 0.24800614080780914, 0.2723945925607702,
    0.29748655953645436, 0.32320448391252277, 0.3494688730663897, 0.3761985452828314, 0.40331088068236237,
    0.4307220765948119, 0.4583474065887823, 0.4861014823563623, 0.5138985176436377, 0.5416525934112177,
    0.5692779234051881, 0.5966891193176377, 0.6238014547171686, 0.6505311269336104, 0.6767955160874772,
    0.7025134404635457, 0.7276054074392297, 0.7519938591921909, 0.7756034124277673, 0.7983610913853316,
    0.8201965534035034, 0.8410423063472352, 0.8608339172250941, 0.8795102113525645, 0.8970134614469333,
    0.9132895660714409, 0.9282882168813743, 0.9419630541639138, 0.9542718102103277, 0.9651764401237481,
    0.9746432397809813, 0.9826429509527451, 0.9891508545701282, 0.9941468577700807, 0.9976156130405349,
    0.9995471719007328,
)
_WEIGHTS = (
    0.0011619276878866078, 0.002701261123007669, 0.0042345315816539435, 0.0057549121701916915, 0.007257544639010736,
    0.008737756455700473, 0.010190964941201286, 0.011612675781282658, 0.012998493529195977, 0.01434413423691137,
    0.015645438373655222, 0.01689838355780588, 0.018099096936157594, 0.01924386712962383, 0.02032915569237226,
    0.021351608042333544, 0.02230806382634614, 0.023195566686500947, 0.02401137339680013, 0.02475296234152379,
    0.025418041308899242, 0.0260045545758707, 0.026510689262005383, 0.026934880932857244, 0.027275818435444712,
    0.027532447950881212, 0.02770397625162256, 0.027789873153257198, 0.027789873153257198, 0.02770397625162256,
    0.027532447950881212, 0.027275818435444712, 0.026934880932857244, 0.026510689262005383, 0.0260045545758707,
    0.025418041308899242, 0.02475296234152379, 0.02401137339680013, 0.023195566686500947, 0.02230806382634614,
    0.021351608042333544, 0.02032915569237226, 0.01924386712962383, 0.018099096936157594, 0.01689838355780588,
    0.015645438373655222, 0.01434413423691137, 0.012998493529195977, 0.011612675781282658, 0.010190964941201286,
    0.008737756455700473, 0.007257544639010736, 0.0057549121701916915, 0.0042345315816539435, 0.002701261123007669,
    0.0011619276878866078,
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
    """The results of an elementwise f, some rows at a time on a CPU, since it makes 56 numbers of each."""
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
