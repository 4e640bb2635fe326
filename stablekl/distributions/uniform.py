r"""Uniform distributions, and their KL divergence without cancellation.

Where q's interval contains p's,

.. math:: KL = \log\left[1 + \frac{(h_q - h_p) + (l_p - l_q)}{h_p - l_p}\right],

and infinite elsewhere. torch's logarithm of the quotient of the widths has lost the digits of its distance from 1 where
the intervals are nearly the same.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Uniform as TorchUniform

from ..registry import register_hardened
from ._base import Checked
from ._scalar import scalar_rule

__all__ = ["Uniform"]


class Uniform(TorchUniform, Checked):
    """`torch.distributions.Uniform` with a KL divergence that is accurate for every pair of parameters.

    Args:
        low: lower end of the interval.
        high: upper end, above ``low``.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: a parameter is outside of its domain somewhere (says where).
    """


def _value(low_p: Tensor, high_p: Tensor, low_q: Tensor, high_q: Tensor) -> Tensor:
    inside = (low_q <= low_p) & (high_p <= high_q)
    # halves where a width overflows; a half of the smallest number is none
    half = torch.where((high_q - low_q).isinf(), 0.5, 1.0).to(low_q.dtype)
    spare = (half * high_q - half * high_p) + (half * low_p - half * low_q)
    width = half * high_p - half * low_p
    # NaN is nowhere inside, nor is it an interval
    spare = torch.where(inside, spare, torch.where((low_p <= high_p) & (low_q <= high_q), 0.0, torch.nan))
    x = spare / width
    x = torch.where(x.isinf(), torch.log(spare) - torch.log(width), torch.log1p(x))
    return torch.where(inside | x.isnan(), x, torch.inf)


def _inverse_width(low: Tensor, high: Tensor) -> Tensor:
    return torch.where((high - low).isinf(), 0.5 / (0.5 * high - 0.5 * low), 1 / (high - low))


def _gradient(low_p: Tensor, high_p: Tensor, low_q: Tensor, high_q: Tensor) -> tuple[Tensor, ...]:
    inside = (low_q <= low_p) & (high_p <= high_q)
    by_p, by_q = (torch.where(inside, _inverse_width(x, h), 0.0) for x, h in ((low_p, high_p), (low_q, high_q)))
    return by_p, -by_p, -by_q, by_q


_kl = scalar_rule(_value, _gradient)


@register_hardened(Uniform, Uniform)
def kl_uniform_uniform(p: TorchUniform, q: TorchUniform) -> Tensor:
    """KL between uniform distributions, elementwise; +inf where p's interval is not within q's; see the module."""
    return _kl(p.low, p.high, q.low, q.high)
