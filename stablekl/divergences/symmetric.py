r"""Symmetric divergences with forms of their own: Jeffreys' divergence and the 2-Wasserstein distance.

The formulas and their accuracy are in `gaussian`, `transport`, `families`, `concentrations` and `laplace`.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributions import Distribution

from ..distributions._gaussian import Gaussian
from ._dispatch import chosen, gaussians, inner, rounded
from .gaussian import gaussian_jeffreys
from .transport import gaussian_distance, gaussian_transport

__all__ = ["jeffreys_divergence", "squared_wasserstein2", "wasserstein2"]


def _jeffreys(p: Distribution, q: Distribution) -> Tensor:
    pair = gaussians(p, q)
    if pair is not None:
        return gaussian_jeffreys(*pair)
    p, q, n = inner(p, q)
    if n:
        return _jeffreys(p, q).sum(tuple(range(-n, 0)))
    return chosen(p, q, "Jeffreys divergence").jeffreys(p, q)


def jeffreys_divergence(p: Distribution, q: Distribution) -> Tensor:
    r"""Jeffreys' divergence :math:`KL(p \| q) + KL(q \| p) = \int (p - q) \log (p/q)`.

    Evaluated as a sum of squares for Gaussians,
    :math:`\frac12 \|L_p^{-1}(\Sigma_p - \Sigma_q) L_q^{-\top}\|_F^2 + \frac12 |L_p^{-1} d|^2 + \frac12 |L_q^{-1} d|^2`,
    and as a product of parameter differences for families over rates and probabilities, not as the sum of two KL
    divergences: no logarithm of a determinant enters, since they cancel. Gamma, Beta, Dirichlet and Laplace
    distributions take the sum, whose terms are positive.

    Args:
        p: the first distribution; the pairs known are those of `renyi_divergence`.
        q: the second; batch shapes broadcast.

    Returns:
        The divergence in nats, of the broadcast batch shape and the dtype of the distributions.

    Raises:
        ValueError: the event shapes differ.
        NotImplementedError: no closed form is known for the pair.

    Example:
        >>> import torch, stablekl
        >>> p, q = stablekl.Normal(0.0, 1.0), stablekl.Normal(1.0, 2.0)
        >>> print(f"{stablekl.jeffreys_divergence(p, q):.4f}")
        1.7500
    """
    return rounded(_jeffreys(p, q), p, q)


def _two_gaussians(p: Distribution, q: Distribution) -> tuple[Gaussian, Gaussian]:
    pair = gaussians(p, q)
    if pair is None:
        raise NotImplementedError(
            f"the 2-Wasserstein distance of {type(p).__name__} and {type(q).__name__} has no closed form here: there "
            "is one for two Gaussians of any class"
        )
    return pair


def squared_wasserstein2(p: Distribution, q: Distribution) -> Tensor:
    r"""Squared 2-Wasserstein distance of two Gaussians, :math:`\min E|X - Y|^2` over all couplings.

    The squared distance of the means plus the squared Bures distance of the covariances, see `transport`; relative
    accuracy near p = q included, and smooth there: value and gradient are 0 at p = q.

    Args:
        p: the first Gaussian, of any class and parameterisation.
        q: the second; batch shapes broadcast.

    Returns:
        The squared distance, in the squared unit of the variables, of the broadcast batch shape.

    Raises:
        ValueError: the event shapes differ.
        NotImplementedError: one of the two is no Gaussian.

    Example:
        >>> import torch, stablekl
        >>> p, q = stablekl.Normal(0.0, 1.0), stablekl.Normal(3.0, 5.0)
        >>> print(f"{stablekl.squared_wasserstein2(p, q):.1f}")
        25.0
    """
    return rounded(gaussian_transport(*_two_gaussians(p, q)), p, q)


def wasserstein2(p: Distribution, q: Distribution) -> Tensor:
    r"""2-Wasserstein distance of two Gaussians, the root of `squared_wasserstein2`.

    A metric, with the kink of one: at p = q the gradient is returned as 0, one of its subgradients, and next to it its
    length does not vanish. As a loss, take the square.

    Args:
        p: the first Gaussian, of any class and parameterisation.
        q: the second; batch shapes broadcast.

    Returns:
        The distance, in the unit of the variables, of the broadcast batch shape.

    Raises:
        ValueError: the event shapes differ.
        NotImplementedError: one of the two is no Gaussian.

    Example:
        >>> import torch, stablekl
        >>> p, q = stablekl.Normal(0.0, 1.0), stablekl.Normal(3.0, 5.0)
        >>> print(f"{stablekl.wasserstein2(p, q):.1f}")
        5.0
    """
    return rounded(gaussian_distance(*_two_gaussians(p, q)), p, q)
