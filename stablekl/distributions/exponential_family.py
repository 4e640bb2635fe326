r"""Exponential families without a rule of their own, those that users write: the Bregman divergence of log-normalisers.

With natural parameters :math:`\theta`, the log-normaliser A of ``_log_normalizer`` and
:math:`\Delta = \theta_q - \theta_p`,

.. math:: KL = A(\theta_q) - A(\theta_p) - \langle \Delta, \nabla A(\theta_p) \rangle
             = \int_0^1 (1 - t) \frac{d^2}{dt^2} A(\theta_p + t \Delta)\,dt.

torch subtracts, which leaves nothing next to p = q, and cuts p out of the graph: the gradient with respect to p's
parameters is missing. The integrand on the right is not negative. It is taken by 20 of Gauss and Legendre's nodes, and
what 12 of them give differently is compared with what rounding takes from the difference on the left: the smaller of
the two decides, row by row.

Accuracy: that of ``_log_normalizer`` and its derivatives, which are evaluated in float64 where they follow their
arguments' dtype; of inverse Gaussian distributions, 1e-13 relative from neighbouring floats to 1e6 apart. Gradients are
those of the difference: their error is an ulp of the gradient of A.

Source: F. Nielsen and R. Nock, "Entropies and cross-entropies of exponential families" (2010).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import ExponentialFamily

from ..quadrature import gauss_legendre
from ..registry import register_hardened
from ._base import common_dtype, widened
from ._scalar import attached

__all__: list[str] = []

_NODES, _FEWER = 20, 12
# What rounding takes from the difference, in ulps of the sum of its terms' sizes.
_ROUNDING = 4.0


def _rows(x: Tensor, batch: int) -> Tensor:
    """The sum over all dimensions but the batch's."""
    return x.flatten(batch).sum(-1) if x.ndim > batch else x


def _integral(p: ExponentialFamily, at: list[Tensor], change: list[Tensor], batch: int, count: int) -> Tensor:
    t, weights, _ = gauss_legendre(count, at[0].device).to(at[0].dtype)
    shape = torch.broadcast_shapes(*(x.shape[:batch] for x in at))
    steps = t.reshape(-1, *(1,) * batch).expand(-1, *shape)

    def log_normaliser(steps: Tensor) -> Tensor:
        moved = [x + steps.reshape(*steps.shape, *(1,) * (x.ndim - batch)) * d for x, d in zip(at, change, strict=True)]
        total: Tensor = p._log_normalizer(*moved).sum()
        return total

    def slope(steps: Tensor) -> Tensor:
        result: Tensor = torch.func.grad(log_normaliser)(steps)
        return result.sum()

    curvature = torch.func.grad(slope)(steps)
    terms: Tensor = (weights * (1 - t)).reshape(-1, *(1,) * batch) * curvature
    return terms.sum(0)


@register_hardened(ExponentialFamily, ExponentialFamily)
def kl_exponential_families(p: ExponentialFamily, q: ExponentialFamily) -> Tensor:
    """KL between two members of one exponential family; see the module.

    Raises:
        NotImplementedError: p and q are of different types, whose log-normalisers have nothing to do with each other.
    """
    if type(p) is not type(q):
        raise NotImplementedError(
            f"no KL rule for {type(p).__name__} against {type(q).__name__}: of exponential families without rules of "
            "their own only two members of the same one can be compared. Register a rule with "
            "torch.distributions.register_kl, or estimate the divergence with stablekl.kl_estimate."
        )
    given_p, given_q = p._natural_params, q._natural_params
    dtype, batch = common_dtype(*given_p, *given_q), max(len(p.batch_shape), len(q.batch_shape))

    def aligned(x: Tensor, own: torch.Size) -> Tensor:
        return widened(x)[(None,) * (batch - len(own))]

    pairs = zip((aligned(x, p.batch_shape) for x in given_p), (aligned(x, q.batch_shape) for x in given_q), strict=True)
    at, to = (list(x) for x in zip(*(torch.broadcast_tensors(*pair) for pair in pairs), strict=True))

    def log_normaliser(*theta: Tensor) -> Tensor:
        result: Tensor = p._log_normalizer(*theta)
        return result

    mean = torch.func.grad(lambda *theta: log_normaliser(*theta).sum(), tuple(range(len(at))))(*at)
    change = [y - x for x, y in zip(at, to, strict=True)]
    first, second = log_normaliser(*to), log_normaliser(*at)
    linear = [_rows(d * g, batch) for d, g in zip(change, mean, strict=True)]
    difference = first - second - sum(linear)
    with torch.no_grad():
        still, fixed = [x.detach() for x in at], [d.detach() for d in change]
        integral, coarse = (_integral(p, still, fixed, batch, n) for n in (_NODES, _FEWER))
        sizes = first.abs() + second.abs() + sum(x.abs() for x in linear)
        lost = _ROUNDING * torch.finfo(sizes.dtype).eps * sizes
        value = torch.where((integral - coarse).abs() < lost, integral, difference)
    return attached(value, difference).to(dtype)
