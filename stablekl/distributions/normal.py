r"""Normal distributions, and their KL divergence as a sum of non-negative terms.

Rule: with :math:`r = (\sigma_p - \sigma_q)/\sigma_q` and :math:`t = (\mu_p - \mu_q)/\sigma_q`,

.. math:: KL = \tfrac12 t^2 + \tfrac12 r^2 + L(r), \qquad L(r) = r - \log(1 + r)
              = \mathrm{log\_ratio\_bregman}(\sigma_p, \sigma_q).

torch evaluates :math:`\tfrac12 (\rho + t^2 - 1 - \log \rho)` with :math:`\rho = (\sigma_p/\sigma_q)^2`: near p = q it
subtracts numbers near 1 (negative results, 9e6 eps off), and :math:`\rho` underflows at a ratio of 1e-23 in float32,
where the true value is 52. Here no term is subtracted, so the result keeps its relative accuracy down to neighbouring
floats and up to overflow.

Plain float32 and float64 tensors on a CPU take one pass of a kernel in C (see `_fused`); the operations below are the
same rule for everything else.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Normal as TorchNormal

from .. import _fused
from .._autograd import blockwise, rowwise
from .._elementwise import product_error, sum_error
from ..registry import register_hardened
from ..special import log_ratio_bregman_value
from ._base import Checked, common_dtype, widened
from ._density import checked, evaluated, normal_log_density, normal_log_tail, normal_tail, standardised

__all__ = ["Normal", "normal_kl"]


class Normal(TorchNormal, Checked):
    """`torch.distributions.Normal` with a KL divergence that is accurate for every pair of parameters.

    Args:
        loc: mean, any shape that broadcasts with ``scale``.
        scale: standard deviation, positive.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: ``scale`` is zero, negative or NaN somewhere (says where, and how to parameterise).

    Example:
        >>> import torch, stablekl
        >>> p = stablekl.Normal(torch.tensor(0.0), torch.tensor(1e-25))
        >>> print(f"{torch.distributions.kl_divergence(p, stablekl.Normal(0.0, 1.0)):.3f}")
        57.065
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of the density, with ((x - mu)/sigma)^2 where torch divides by sigma^2, which underflows first."""
        return evaluated(normal_log_density, checked(self, value), self.loc, self.scale)

    def cdf(self, value: Tensor) -> Tensor:
        """P(X <= value), to its relative accuracy in the lower tail too, where torch's 1 + erf is 0."""
        return evaluated(lambda *x: normal_tail(*standardised(*x)), checked(self, value), self.loc, self.scale)

    def sf(self, value: Tensor) -> Tensor:
        """P(X > value), which 1 - cdf loses in the upper tail."""
        return evaluated(
            lambda x, m, s: normal_tail(*standardised(-x, -m, s)), checked(self, value), self.loc, self.scale
        )

    def log_cdf(self, value: Tensor) -> Tensor:
        """Log of P(X <= value), finite where that underflows."""
        return evaluated(lambda *x: normal_log_tail(*standardised(*x)), checked(self, value), self.loc, self.scale)

    def log_sf(self, value: Tensor) -> Tensor:
        """Log of P(X > value), finite where that underflows."""
        return evaluated(
            lambda x, m, s: normal_log_tail(*standardised(-x, -m, s)), checked(self, value), self.loc, self.scale
        )

    def icdf(self, value: Tensor) -> Tensor:
        """The quantile, in the lower tail too, where torch's erfinv(2 u - 1) is of a rounded number, or of -1."""
        return evaluated(lambda u, m, s: m + s * torch.special.ndtri(u), value, self.loc, self.scale)


def _is_lifted(sigma: Tensor) -> bool:
    """Whether float64 holds narrower values; there is then room for reciprocals and squares of every input."""
    return sigma.dtype != widened(sigma).dtype


def _standardised(
    mu_p: Tensor, sigma_p: Tensor, mu_q: Tensor, sigma_q: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The scales, t and r of float64 (or of float32 without float64).

    Divided by sigma_q, never multiplied by 1/sigma_q, which overflows for subnormal scales: 0 * inf at p = q.
    """
    # NaN for sigma_q = inf alone (or both infinite, or NaN, where the logarithm is NaN too): a ratio of 0
    r = torch.nan_to_num((sigma_p - sigma_q) / sigma_q, nan=-1.0, posinf=torch.inf, neginf=-torch.inf)
    # by halves where the difference of the means overflows
    d = mu_p - mu_q
    t = torch.where(d.isinf(), (0.5 * mu_p - 0.5 * mu_q) / sigma_q * 2, d / sigma_q)
    return sigma_p, sigma_q, t, r


def _lifted_value(mu_p: Tensor, sigma_p: Tensor, mu_q: Tensor, sigma_q: Tensor) -> Tensor:
    """The rule for narrower values in float64, in as few passes as it takes.

    The quotient of two float32 is 1 or at least 2^-24 away from it: rounding it leaves r - log(1 + r) good to 2^-28.
    """
    mu_p, sigma_p, mu_q, sigma_q = map(widened, (mu_p, sigma_p, mu_q, sigma_q))
    t, q = (mu_p - mu_q).div_(sigma_q), sigma_p.div(sigma_q)
    excess = q.log().clamp_(max=1e4).neg_()  # the bound changes q = inf alone
    r = q.sub_(1)
    return excess.add_(r).addcmul_(r, r, value=0.5).addcmul_(t, t, value=0.5)


def _value_block(*inputs: Tensor) -> tuple[Tensor]:
    if _is_lifted(inputs[3]):
        return (_lifted_value(*inputs).to(inputs[0].dtype),)
    sigma_p, sigma_q, t, r = _standardised(*inputs)
    excess = log_ratio_bregman_value(sigma_p, sigma_q)
    # (r/2) r rather than r*r/2: the square may overflow where half of it does not
    return (torch.addcmul(torch.addcmul(excess, r, r, value=0.5), t, t, value=0.5),)


def _value(*inputs: Tensor) -> tuple[Tensor, ...]:
    if _fused.available(inputs):
        return (_fused.normal_kl(inputs),)
    return blockwise(_value_block, *inputs)


def _slope(mu_p: Tensor, sigma_p: Tensor, mu_q: Tensor, sigma_q: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """(t^2 + r (r + 2))/sigma_q, the derivative by -sigma_q.

    Where r < 0 the two terms may cancel and leave nothing of t and r as rounded. There it is (d^2 + sigma_p^2 -
    sigma_q^2)/sigma_q^3 with d = mu_p - mu_q, as v^2 + (w - sigma_q)(w + sigma_q) to twice the digits, w the larger of
    sigma_p and |d|.
    """
    square, rest = t * t, r * (r + 2)
    close = (r < 0) & (square > -0.25 * rest) & (square < -4 * rest)
    # Exact, and products of what is scaled neither overflow nor underflow where the terms cancel.
    far, by = (2.0**300, 2.0**600) if t.dtype == torch.float64 else (2.0**40, 2.0**80)
    one = torch.ones_like(sigma_q)
    unit = torch.where(sigma_q < 1 / far, by * one, torch.where(sigma_q > far, one / by, one))
    # elsewhere any numbers will do, as long as they are finite
    x, a, y, b = (torch.where(close, unit * v, one) for v in (mu_p, sigma_p, -mu_q, sigma_q))
    d = x + y
    rest_of_d, zero, swap = sum_error(x, y, d), torch.zeros_like(d), a < 0.5 * b
    v, v_rest = torch.where(swap, a, d), torch.where(swap, zero, rest_of_d)
    w, w_rest = torch.where(swap, d, a), torch.where(swap, rest_of_d, zero)
    low, high = w - b, w + b
    low_rest, high_rest = sum_error(w, -b, low) + w_rest, sum_error(w, b, high) + w_rest
    p, q = v * v, low * high
    p_error = product_error(v, v, p) + 2 * v * v_rest
    q_error = product_error(low, high, q) + low * high_rest + high * low_rest + low_rest * high_rest
    u = p + q
    careful = (u + (sum_error(p, q, u) + (p_error + q_error))) / b / b / b * unit
    return torch.where(close, careful, (rest + square) / sigma_q)


def _gradient(inputs: tuple[Tensor, ...], saved: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    # d/d sigma_p = sigma_p/sigma_q^2 - 1/sigma_p with the common factor r taken out, and likewise for sigma_q; float64
    # leaves float32 values a correct result unless all but 2^-28 of its two terms cancel
    if _is_lifted(inputs[3]):
        dtype = inputs[0].dtype
        mu_p, sigma_p, mu_q, sigma_q = map(widened, inputs)
        inverse, r = 1 / sigma_q, sigma_p / sigma_q - 1
        t = (mu_p - mu_q) * inverse
        d_mu = (t * inverse).to(dtype)
        d_sigma_p = (r * (inverse + 1 / sigma_p)).to(dtype)
        d_sigma_q = (torch.addcmul(r * (r + 2), t, t) * -inverse).to(dtype)
    else:
        sigma_p, sigma_q, t, r = _standardised(*inputs)
        d_mu = t / sigma_q
        d_sigma_p = r / sigma_q + r / sigma_p
        d_sigma_q = -_slope(inputs[0], sigma_p, inputs[2], sigma_q, t, r)
    return d_mu, d_sigma_p, -d_mu, d_sigma_q


def _pullback(grad: Tensor, inputs: tuple[Tensor, ...], needed: tuple[bool, ...]) -> tuple[Tensor | None, ...] | None:
    return _fused.normal_kl_gradient(grad, inputs, needed) if _fused.available((*inputs, grad)) else None


_kl = rowwise(_value, _gradient, _pullback)


def normal_kl(mu_p: Tensor, sigma_p: Tensor, mu_q: Tensor, sigma_q: Tensor) -> Tensor:
    """KL(N(mu_p, sigma_p^2) || N(mu_q, sigma_q^2)), elementwise; shapes broadcast, dtypes promote; see the module."""
    dtype = common_dtype(mu_p, sigma_p, mu_q, sigma_q)
    return _kl(*torch.broadcast_tensors(*(x.to(dtype) for x in (mu_p, sigma_p, mu_q, sigma_q))))


@register_hardened(Normal, Normal)
def kl_normal_normal(p: TorchNormal, q: TorchNormal) -> Tensor:
    """KL between univariate normals, elementwise; the formula and its accuracy are in the module docstring."""
    return normal_kl(p.loc, p.scale, q.loc, q.scale)
