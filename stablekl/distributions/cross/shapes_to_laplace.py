r"""KL from Gamma and Beta distributions to Laplace distributions, which torch lacks: `to_laplace`, by partial moments.

With :math:`A = E_p|X - \mu|` by `_deviation`, sigma the standard deviation of p, :math:`G(x) = x - 1 - \log x`, and J
the divergence of p from the normal distribution of its mean and variance (see `to_normal`),

.. math:: KL = G\!\left(\frac Ab\right) + J(p) + \log\left(\sqrt{\frac\pi 2}\,\frac A\sigma\right)
               + \frac12 - \log\frac\pi2 ,

where all but G is the divergence from the Laplace distribution about mu of the best scale, A. It is 0.048 for a normal
p and more for any other of these, so that an error of A costs up to twenty times itself. Entropies of the size of
log a would cancel between H(p) and log A where concentrations are large; J has none of it.

Gradients are by hand: :math:`E|X - \mu|/b - H(p)` by the derivatives of the deviation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Beta as TorchBeta
from torch.distributions import Gamma as TorchGamma
from torch.distributions import Laplace as TorchLaplace

from ..._bregman import lgamma_curvature
from ..._double import exact_product, rounded, subtract
from ...registry import register_hardened
from ...special import log_ratio_bregman
from .._integrated import chunked
from .._scalar import attached, scalar_rule
from ..beta import Beta
from ..gamma import Gamma
from ..laplace import Laplace
from ._deviation import Deviation, beta_deviation, gamma_deviation
from ._pieces import gamma_shape
from .to_normal import beta_shape

__all__ = ["kl_beta_laplace", "kl_gamma_laplace"]

_NORMAL = 0.5 - math.log(math.pi / 2)
_ROOT = math.sqrt(math.pi / 2)


def _sum(deviation: Tensor, b: Tensor, sigma: Tensor, shape: Tensor) -> Tensor:
    return log_ratio_bregman(deviation, b) + (shape + (_NORMAL + torch.log(_ROOT * (deviation / sigma))))


# ---- Gamma ------------------------------------------------------------------------------------------------------


def _gamma_deviation(a: Tensor, rate: Tensor, mu: Tensor) -> Deviation:
    """In units of 1/rate."""
    with torch.no_grad():
        exact = rounded(subtract(exact_product(rate.detach(), mu.detach()), a.detach()))
    z = rate * mu
    return gamma_deviation(a, z, attached(exact, z - a))


def _gamma_value(a: Tensor, rate: Tensor, mu: Tensor, b: Tensor) -> Tensor:
    deviation = chunked(lambda *x: (_gamma_deviation(*x).value,), a, rate, mu)[0]
    return _sum(deviation, rate * b, torch.sqrt(a), gamma_shape(a))


def _gamma_gradient(a: Tensor, rate: Tensor, mu: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    def partials(a: Tensor, rate: Tensor, mu: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        found, scaled = _gamma_deviation(a, rate, mu), rate * b
        by_a = found.by_shapes[0] / scaled + ((a - 1) * lgamma_curvature(a) - 1 / a)
        by_rate = ((scaled - found.value) / scaled + found.by_point * (mu / b)) / rate
        return by_a, by_rate, found.by_point / b, (scaled - found.value) / scaled / b

    return chunked(partials, a, rate, mu, b)


# ---- Beta -------------------------------------------------------------------------------------------------------


def _beta_value(a: Tensor, b: Tensor, mu: Tensor, scale: Tensor) -> Tensor:
    n = a + b
    deviation = chunked(lambda *x: (beta_deviation(*x).value,), a, b, mu)[0]
    sigma = torch.sqrt(torch.minimum(a, b)) * torch.sqrt(torch.maximum(a, b) / (n + 1))
    return _sum(deviation, n * scale, sigma, beta_shape(a, b))


def _beta_gradient(a: Tensor, b: Tensor, mu: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    def partials(a: Tensor, b: Tensor, mu: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        found, n = beta_deviation(a, b, mu), a + b
        common = 2 / n - (n - 2) * lgamma_curvature(n)
        by_a, by_b = (
            slope / scale + (common + ((x - 1) * lgamma_curvature(x) - 1 / x))
            for slope, x in zip(found.by_shapes, (a, b), strict=True)
        )
        return by_a, by_b, found.by_point / scale, (scale - found.value / n) / scale / scale

    return chunked(partials, a, b, mu, scale)


_gamma, _beta = scalar_rule(_gamma_value, _gamma_gradient), scalar_rule(_beta_value, _beta_gradient)


@register_hardened(Gamma, Laplace)
def kl_gamma_laplace(p: TorchGamma, q: TorchLaplace) -> Tensor:
    """KL of Gamma against Laplace, elementwise; see the module."""
    return _gamma(p.concentration, p.rate, q.loc, q.scale)


@register_hardened(Beta, Laplace)
def kl_beta_laplace(p: TorchBeta, q: TorchLaplace) -> Tensor:
    """KL of Beta against Laplace, elementwise; see the module."""
    return _beta(p.concentration1, p.concentration0, q.loc, q.scale)
