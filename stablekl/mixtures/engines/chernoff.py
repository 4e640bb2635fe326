r"""Chernoff coefficients of exponential families on the line Re s = 1/2, as sums of the gaps of `chernoff_gaps`.

With J = -log rho, coordinates of a product adding up:

=====================  ====================================================================================
family                 J
=====================  ====================================================================================
Poisson                ``rate_gap`` of the rates
Exponential            ``log_gap`` of the rates
Gamma, InverseGamma    ``ratio_gap`` of concentrations and rates, the mismatch of the means, plus
                       ``lgamma_gap`` of the concentrations
Dirichlet, Beta        ``ratio_gap`` of each concentration and the sum of all, plus ``lgamma_gap`` of each,
                       less ``lgamma_gap`` of the sums, the only term subtracted
categories             -n log(1 - r), r the sum of ``rate_gap`` of the probabilities: 1 - rho = r for one draw
Geometric              ``log_gap`` of the probabilities p of success, plus log(1 + r/m), r the ``rate_gap`` of
                       those of failure and m = s p_1 + (1 - s) p_2
=====================  ====================================================================================

Bernoulli and Binomial distributions are two categories. The parameters are [..., 2, D]: two components, D coordinates;
or [..., 2, D, C], of C categories or concentrations each. What is known to more digits than the parameters leave, a
log-ratio or a difference, comes beside them, without the 2; derivatives take the way through the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..._elementwise import product_error
from .chernoff_gaps import (
    STEPS,
    Complex,
    Ratio,
    lgamma_gap,
    lgamma_partials,
    log1p,
    log_gap,
    log_partials,
    plus,
    rate_gap,
    rate_partials,
    ratio_gap,
    ratio_partials,
)
from .spectral_terms import ratio_log

__all__ = ["CATEGORIES", "CHERNOFF", "DIRICHLET", "EXPONENTIAL", "GAMMA", "GEOMETRIC", "RATES", "Chernoff", "log_ratio"]

Tensors = tuple[Tensor, ...]
# A coefficient below this counts as 0: its logarithm stays finite, and so do the derivatives.
LEAST = 1e-300


class Chernoff(NamedTuple):
    """A family as the spectral integral sees it.

    Attributes:
        name: of it.
        width: elements of an intermediate for each node and parameter.
        events: the numbers of dimensions of the parameters behind the batch.
        gap: ``gap(parameters, omega [..., n])``, J at the nodes, [..., n].
        partials: ``partials(parameters, omega, kappa)``, the sums over the nodes of Re(kappa d log rho), of the shapes
            of the parameters.
    """

    name: str
    width: int
    events: tuple[int, ...]
    gap: Callable[[Tensors, Tensor], Complex]
    partials: Callable[[Tensors, Tensor, Complex], Tensors]


def _attached(value: Tensor, smooth: Tensor) -> Tensor:
    """The value with the derivatives of another formula of it."""
    return value.detach() + (smooth - smooth.detach())


def _sides(x: Tensor, events: int = 1) -> tuple[Tensor, Tensor]:
    """The two components' parameters, with a dimension for the nodes at the end."""
    one, two = x.unsqueeze(-1).unbind(-2 - events)
    return one, two


def _sum(a: Complex) -> Complex:
    return Complex(a.real.sum(-2), a.imag.sum(-2))


def _minus(a: Complex) -> Complex:
    return Complex(-a.real, -a.imag)


def _contracted(kappa: Complex, *partials: Complex, events: int = 1) -> Tensor:
    """-Re sum of kappa times each partial derivative of J over the nodes, those of both components."""
    sums = [(kappa.imag.unsqueeze(-2) * p.imag - kappa.real.unsqueeze(-2) * p.real).sum(-1) for p in partials]
    return torch.stack(sums, -1 - events)


def log_ratio(x: Tensor, y: Tensor) -> Tensor:
    """log(x/y) to its own relative accuracy, of positive numbers; 0 where one of them is 0."""
    both = (x > 0) & (y > 0)
    x, y = torch.where(both, x, 1.0), torch.where(both, y, 1.0)
    near = (x > 0.5 * y) & (y > 0.5 * x)
    change = torch.where(near, (x - y) / torch.where(near, y, 1.0), 0.0)
    return torch.where(near, torch.log1p(change), ratio_log(torch.where(near, 1.0, x), torch.where(near, 1.0, y)))


# ---- rates ------------------------------------------------------------------------------------------------------


def _poisson_gap(parameters: Tensors, omega: Tensor) -> Complex:
    x, y = _sides(parameters[0])
    return _sum(rate_gap(x, y, log_ratio(x, y), omega.unsqueeze(-2)))


def _poisson_partials(parameters: Tensors, omega: Tensor, kappa: Complex) -> Tensors:
    x, y = _sides(parameters[0])
    return (_contracted(kappa, *rate_partials(x, y, log_ratio(x, y), omega.unsqueeze(-2))),)


def _exponential_gap(parameters: Tensors, omega: Tensor) -> Complex:
    x, y = _sides(parameters[0])
    return _sum(log_gap(x, y, x - y, omega.unsqueeze(-2)))


def _exponential_partials(parameters: Tensors, omega: Tensor, kappa: Complex) -> Tensors:
    x, y = _sides(parameters[0])
    return (_contracted(kappa, *log_partials(x, y, x - y, omega.unsqueeze(-2))),)


# ---- concentrations ---------------------------------------------------------------------------------------------


def _excess(p: Tensor, q: Tensor, factor: Tensor) -> Tensor:
    """``p - factor q``, rounded once, without derivatives."""
    p, q = p.detach(), q.detach()
    product = factor * q
    return (p - product) - product_error(factor, q, product)


def _points(a_x: Tensor, b_x: Tensor, a_y: Tensor, b_y: Tensor, total: bool) -> Ratio:
    """With (b_x - b_y)/(b_x + b_y) - (a_x - a_y)/(a_x + a_y), which may be far smaller than the two.

    In units of y's parameters times about b_x/b_y, where what rounding has taken from the b's, sums of the a's if
    ``total``, does not enter.
    """
    factor = (b_x / b_y).detach()
    more_a = _excess(a_x, a_y, factor)
    more_b = more_a.sum(-2, keepdim=True) if total else _excess(b_x, b_y, factor)
    sum_a, sum_b = a_x + a_y, b_x + b_y
    gap = 2 * ((more_b / sum_b) * (a_y / sum_a) - (more_a / sum_a) * (b_y / sum_b))
    plain = (b_x - b_y) / sum_b - (a_x - a_y) / sum_a
    usable = gap.isfinite() & (factor > torch.finfo(factor.dtype).tiny)
    return Ratio(a_x, b_x, a_y, b_y, _attached(torch.where(usable, gap, plain), plain))


def _gamma_gap(parameters: Tensors, omega: Tensor) -> Complex:
    (x, y), (b, c) = (_sides(p) for p in parameters)
    nodes = omega.unsqueeze(-2)
    return _sum(plus(ratio_gap(_points(x, b, y, c, False), nodes), lgamma_gap(x, y, x - y, nodes)))


def _gamma_partials(parameters: Tensors, omega: Tensor, kappa: Complex) -> Tensors:
    (x, y), (b, c) = (_sides(p) for p in parameters)
    nodes = omega.unsqueeze(-2)
    by_x, by_b, by_y, by_c = ratio_partials(_points(x, b, y, c, False), nodes)
    more_x, more_y = lgamma_partials(x, y, x - y, nodes)
    return _contracted(kappa, plus(by_x, more_x), plus(by_y, more_y)), _contracted(kappa, by_b, by_c)


def _dirichlet_parts(parameters: Tensors, omega: Tensor) -> tuple[Tensor, Tensor, Tensors, Tensor]:
    x, y = _sides(parameters[0], 2)
    return x, y, tuple(v.sum(-2, keepdim=True) for v in (x, y, x - y)), omega[..., None, None, :]


def _dirichlet_gap(parameters: Tensors, omega: Tensor) -> Complex:
    x, y, (b, c, d), nodes = _dirichlet_parts(parameters, omega)
    terms = plus(ratio_gap(_points(x, b, y, c, True), nodes), lgamma_gap(x, y, x - y, nodes))
    return _sum(plus(_sum(terms), _minus(_sum(lgamma_gap(b, c, d, nodes)))))


def _dirichlet_partials(parameters: Tensors, omega: Tensor, kappa: Complex) -> Tensors:
    # by the sum of the concentrations the derivatives of all terms together are 0
    x, y, (b, c, d), nodes = _dirichlet_parts(parameters, omega)
    by_x, _, by_y, _ = ratio_partials(_points(x, b, y, c, True), nodes)
    own, total = lgamma_partials(x, y, x - y, nodes), lgamma_partials(b, c, d, nodes)
    partials = plus(by_x, own[0], _minus(total[0])), plus(by_y, own[1], _minus(total[1]))
    return (_contracted(Complex(*(k.unsqueeze(-2) for k in kappa)), *partials, events=2),)


# ---- categories -------------------------------------------------------------------------------------------------


def _category_parts(parameters: Tensors, omega: Tensor) -> tuple[tuple[Tensor, ...], Complex]:
    """The masses, their log-ratio and the nodes, [..., D, C, n]; 1 - rho of one draw, [..., D, n]."""
    masses, ratio, _ = parameters
    x, y = _sides(masses, 2)
    inputs = x, y, _attached(ratio.unsqueeze(-1), log_ratio(x, y)), omega[..., None, None, :]
    return inputs, _sum(rate_gap(*inputs))


def _category_gap(parameters: Tensors, omega: Tensor) -> Complex:
    _, r = _category_parts(parameters, omega)
    x, y = 1 - r.real, -r.imag
    size = x * x + y * y
    alive = size > LEAST
    x, size = torch.where(alive, x, 1.0), torch.where(alive, size, LEAST)
    far = Complex(0.5 * torch.log(size), torch.atan2(torch.where(alive, y, 0.0), x))
    log, _ = log1p(_minus(r), far)
    count = -parameters[2].unsqueeze(-1)
    return _sum(Complex(count * log.real, count * log.imag))


def _category_partials(parameters: Tensors, omega: Tensor, kappa: Complex) -> Tensors:
    inputs, r = _category_parts(parameters, omega)
    x, y = 1 - r.real, r.imag
    size = x * x + y * y
    alive = size > LEAST
    share = torch.where(alive, parameters[2].unsqueeze(-1) / torch.where(alive, size, 1.0), 0.0)
    real, imag = (k.unsqueeze(-2) for k in kappa)
    each = Complex(share * (real * x - imag * y), share * (real * y + imag * x))
    zeros = (torch.zeros_like(p) for p in parameters[1:])
    return _contracted(each, *rate_partials(*inputs), events=2), *zeros


class _Geometric(NamedTuple):
    x: Tensor
    y: Tensor
    d: Tensor
    failures: Tensors
    gap: Complex
    mean: Complex


def _geometric_parts(parameters: Tensors, omega: Tensor) -> _Geometric:
    """Those of success, their difference, the failures with log-ratio and nodes, their gap r, and m."""
    (x, y), (f, g) = (_sides(p) for p in parameters[:2])
    d, ratio = (p.unsqueeze(-1) for p in parameters[2:])
    d, nodes = _attached(d, x - y), omega.unsqueeze(-2)
    failures = f, g, _attached(ratio, log_ratio(f, g)), nodes
    return _Geometric(x, y, d, failures, rate_gap(*failures), Complex(0.5 * (x + y), nodes * d))


def _geometric_gap(parameters: Tensors, omega: Tensor) -> Complex:
    x, y, d, (*_, nodes), r, mean = _geometric_parts(parameters, omega)
    size = mean.real * mean.real + mean.imag * mean.imag
    z = Complex((r.real * mean.real + r.imag * mean.imag) / size, (r.imag * mean.real - r.real * mean.imag) / size)
    total = plus(mean, r)  # 1 - (1 - p_1)^s (1 - p_2)^(1-s), whose real part is positive, as m's is
    modulus = 0.5 * torch.log((total.real * total.real + total.imag * total.imag) / size)
    turn = torch.atan2(total.imag, total.real) - torch.atan2(mean.imag, mean.real)
    log, _ = log1p(z, Complex(modulus, turn))
    return _sum(plus(log_gap(x, y, d, nodes), log))


def _geometric_partials(parameters: Tensors, omega: Tensor, kappa: Complex) -> Tensors:
    x, y, d, (f, g, ratio, nodes), r, mean = _geometric_parts(parameters, omega)
    total = plus(mean, r)
    size = total.real * total.real + total.imag * total.imag
    real, imag = (k.unsqueeze(-2) for k in kappa)
    each = Complex(
        (real * total.real + imag * total.imag) / size, (imag * total.real - real * total.imag) / size
    )  # kappa over the total
    q_d = (0.25 + nodes * nodes) * d
    by_p = []
    for value, sign in ((x, 1.0), (y, -1.0)):
        # [q d - s r]/p_1 and [-q d - (1 - s) r]/p_2, over the total
        top = Complex(sign * q_d - 0.5 * r.real + sign * nodes * r.imag, -0.5 * r.imag - sign * nodes * r.real)
        by_p.append(Complex(top.real / value, top.imag / value))
    partials = (*by_p, *rate_partials(f, g, ratio, nodes))
    by_x, by_y, by_f, by_g = ((each.imag * p.imag - each.real * p.real).sum(-1) for p in partials)
    zeros = (torch.zeros_like(p) for p in parameters[2:])
    return torch.stack([by_x, by_y], -2), torch.stack([by_f, by_g], -2), *zeros


RATES = Chernoff("rates", 1, (2,), _poisson_gap, _poisson_partials)
EXPONENTIAL = Chernoff("exponential", 1, (2,), _exponential_gap, _exponential_partials)
GAMMA = Chernoff("gamma", STEPS, (2, 2), _gamma_gap, _gamma_partials)
DIRICHLET = Chernoff("dirichlet", STEPS, (3,), _dirichlet_gap, _dirichlet_partials)
CATEGORIES = Chernoff("categories", 1, (3, 2, 1), _category_gap, _category_partials)
GEOMETRIC = Chernoff("geometric", 1, (2, 2, 1, 1), _geometric_gap, _geometric_partials)
CHERNOFF = (RATES, EXPONENTIAL, GAMMA, DIRICHLET, CATEGORIES, GEOMETRIC)
