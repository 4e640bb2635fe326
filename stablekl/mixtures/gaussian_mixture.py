"""Gaussian mixtures built from their parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution
from torch.types import _size

from ..distributions.multivariate_normal import MultivariateNormal
from .mixture_same_family import MixtureSameFamily
from .weights import log_probability

__all__ = ["GaussianMixture"]


class GaussianMixture(MixtureSameFamily):
    r"""Mixture of K multivariate normals, :math:`\sum_k w_k N(\mu_k, \Sigma_k)`.

    A `MixtureSameFamily` with a `Categorical` and a `MultivariateNormal` inside: ``.mixture_distribution``,
    ``.component_distribution.loc``, ``.component_distribution.scale_tril`` and so on are where torch has them.

    Args:
        logits: unnormalised log-weights, ``batch_shape + (K,)``; -inf switches a component off. Give this or ``probs``.
        probs: unnormalised non-negative weights, ``batch_shape + (K,)``; 0 switches a component off, exactly.
        loc: means, ``batch_shape + (K, D)``.
        covariance_matrix: covariances, ``batch_shape + (K, D, D)``. Give this, ``scale_tril`` or ``scale_diag``.
        scale_tril: lower-triangular factors, ``batch_shape + (K, D, D)``.
        scale_diag: standard deviations of diagonal components, ``batch_shape + (K, D)``.
        validate_args: as in torch; on by default.

    Raises:
        ValueError: parameters are missing, given twice, of shapes that do not match, or invalid (says where).

    Example:
        >>> import torch, stablekl
        >>> m = stablekl.GaussianMixture(probs=torch.tensor([0.3, 0.7]), loc=torch.tensor([[-2.0], [2.0]]),
        ...                              scale_diag=torch.ones(2, 1))
        >>> q = stablekl.MultivariateNormal(m.mean, covariance_matrix=m.covariance_matrix)
        >>> print(f"{torch.distributions.kl_divergence(m, q):.5f}")
        0.18009
    """

    def __init__(
        self,
        logits: Tensor | None = None,
        probs: Tensor | None = None,
        loc: Tensor | None = None,
        covariance_matrix: Tensor | None = None,
        scale_tril: Tensor | None = None,
        scale_diag: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        """Keep the weights as they were given and build the two distributions."""
        if (logits is None) == (probs is None):
            raise ValueError(f"give exactly one of logits and probs; got {'both' if probs is not None else 'neither'}")
        if loc is None or loc.dim() < 2:
            shape = None if loc is None else tuple(loc.shape)
            raise ValueError(f"loc must have shape batch_shape + (K, D), got {shape}")
        weights = logits if logits is not None else probs
        if weights is None or weights.dim() < 1 or weights.shape[-1] != loc.shape[-2]:
            shape = None if weights is None else tuple(weights.shape)
            raise ValueError(
                f"the weights must have shape batch_shape + (K,) with K = {loc.shape[-2]} as in loc, got {shape}"
            )
        component = MultivariateNormal(
            loc, covariance_matrix, None, scale_tril, validate_args, scale_diag=scale_diag
        )
        self._given_logits, self._given_probs = logits, probs
        super().__init__(Categorical(probs, logits, validate_args), component, validate_args)

    @property
    def log_weights(self) -> Tensor:
        """Normalised log-weights, ``batch_shape + (K,)``; -inf for a weight of 0."""
        if self._given_probs is not None:
            p = self._given_probs
            normalised = log_probability(p) - p.sum(-1, keepdim=True).log()
        else:
            normalised = torch.log_softmax(self._given_logits, -1)
        return normalised.expand((*self._batch_shape, normalised.shape[-1]))

    def expand(self, batch_shape: _size, _instance: Any = None) -> GaussianMixture:
        """Return this mixture with its batch shape expanded; no memory is allocated."""
        new = self._get_checked_instance(GaussianMixture, _instance)
        new._given_logits, new._given_probs = self._given_logits, self._given_probs
        return super().expand(batch_shape, new)  # type: ignore[return-value]

    def to_mvn(self) -> Distribution:
        """The multivariate normal with the mixture's mean and covariance: the minimiser of KL(mixture || q)."""
        return MultivariateNormal(self.mean, covariance_matrix=self.covariance_matrix)
