"""The quadratic form of a float32 diagonal mixture as one float64 matrix product.

With the origin moved among the means,

    sum_d (x_d - mu_kd)^2 / s_kd^2  =  [x^2, x] . [1/s_k^2, -2 mu_k/s_k^2]  +  sum_d mu_kd^2 / s_kd^2,

so the quadratic forms of all points under all components are one product of matrices, an order of magnitude
faster than subtracting every mean from every point. The expansion cancels: its error is that of
R = max_k sum_d ((|x_d| + |mu_kd|) / s_kd)^2 rather than that of the result. In the working precision of the
caller that is ruinous (in float32 at a spread of 100 standard deviations nothing is left of a value near 1);
in float64 for a float32 caller it is invisible as long as R is below a bound that `Expansion.holds` checks
block by block. Callers fall back on the direct form where it does not hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Expansion"]

# Each of the 2 D + 1 terms passes through at most 2 D + 6 roundings (centring, squares, weights, sums), so
# |error of the log-density| <= (D + 3) 2^-53 R (Higham, "Accuracy and Stability of Numerical Algorithms", 2002,
# section 3.1). Derived bound: at most 2^-23, the spacing of float32 at 1.
_ROUNDING, _TOLERANCE = 2.0**-53, 2.0**-23


class Expansion:
    """A batch of float32 diagonal mixtures, prepared for products in float64.

    Args:
        base: log-weight plus log of the normalising constant, shape ``(B, K)``; -inf for a weight of zero.
        loc: means, shape ``(B, K, D)``, finite.
        inverse: reciprocal standard deviations in float64, shape ``(B, K, D)``; 0 for a weight of zero.
    """

    def __init__(self, base: Tensor, loc: Tensor, inverse: Tensor) -> None:
        # An origin with a float32 value: subtracting it from float32 points is then all but exact.
        self.origin = loc.mean(1).unsqueeze(-1).double()
        self.inverse = inverse
        self.loc = loc.double() - self.origin.mT
        precision = inverse.square()
        self.weights = torch.cat([-0.5 * precision, precision * self.loc], -1)
        self.constant = (base - 0.5 * (self.loc * inverse).square().sum(-1)).unsqueeze(-1)

    def holds(self, x: Tensor) -> bool:
        """Whether float64 hides the cancellation for all of these points, shape ``(B, D, N)``."""
        low, high = torch.aminmax(x, dim=-1, keepdim=True)
        reach = torch.maximum((low - self.origin).abs(), (high - self.origin).abs())
        spread = ((reach.mT + self.loc.abs()) * self.inverse).square().sum(-1)
        return bool((spread * ((x.shape[1] + 3) * _ROUNDING) <= _TOLERANCE).all())  # not for NaN or inf

    def features(self, x: Tensor, out: Tensor) -> Tensor:
        """``[x^2, x]`` of the centred points, written to ``out``: shape ``(B, 2 D, N)``, float64."""
        squares, linear = out.chunk(2, 1)
        torch.square(torch.sub(x, self.origin, out=linear), out=squares)
        return out

    def logits(self, features: Tensor, out: Tensor) -> Tensor:
        """Log-weight plus log-density, written to ``out``: shape ``(B, K, N)``, float64."""
        return torch.baddbmm(self.constant, self.weights, features, out=out)

    def pull(self, features: Tensor, c: Tensor) -> Tensor:
        """Gradient of ``(c * logits).sum()`` with respect to the points, shape ``(B, D, N)``."""
        squares, linear = (self.weights.mT @ c).chunk(2, 1)
        return torch.addcmul(linear, squares, features.chunk(2, 1)[1], value=2.0)

    def moments(self, features: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over the points of c, c z and c z^2, where z = (x - mu) / s."""
        mass = c.sum(-1)
        second, first = (c @ features.mT).chunk(2, -1)
        deviation = first - self.loc * mass.unsqueeze(-1)
        scatter = second - self.loc * (first + deviation)
        return mass, deviation * self.inverse, scatter * self.inverse.square()
