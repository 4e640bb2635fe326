"""Gaussian mixtures built from their parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution
from torch.types import _size

from .._autograd import is_plain
from ..distributions._base import widened
from ..distributions._gaussian import Gaussian
from ..distributions.multivariate_normal import MultivariateNormal
from .mixture_same_family import MixtureSameFamily
from .square_root import lower_square_root

__all__ = ["GaussianMixture"]


class GaussianMixture(MixtureSameFamily):
    r"""Mixture of K multivariate normals, :math:`\sum_k w_k N(\mu_k, \Sigma_k)`.

    A `MixtureSameFamily` with a `Categorical` and a `MultivariateNormal` inside: ``.mixture_distribution``,
    ``.component_distribution.loc``, ``.component_distribution.scale_tril`` and so on are where torch has them.
    Samples are differentiable in all parameters, the weights included (`rsample`).

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
        _check_tensors(logits=logits, probs=probs, loc=loc, covariance_matrix=covariance_matrix)
        _check_tensors(scale_tril=scale_tril, scale_diag=scale_diag)
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
        if not loc.is_floating_point():
            loc = loc.to(torch.get_default_dtype())
        component = MultivariateNormal(loc, covariance_matrix, None, scale_tril, validate_args, scale_diag=scale_diag)
        validate = Distribution._validate_args if validate_args is None else validate_args
        if validate:
            _check_weights("logits" if probs is None else "probs", weights)
        # Checked already: torch's own check refuses an empty batch, and what normalising in bfloat16 leaves of the sum.
        labels = Categorical(probs, logits, validate_args=False)
        labels._validate_args = validate
        super().__init__(labels, component, validate_args)
        # As they were given: the Categorical normalises them, which rounds.
        self._given_logits, self._given_probs = logits, probs

    def expand(self, batch_shape: _size, _instance: Any = None) -> GaussianMixture:
        """Return this mixture with its batch shape expanded; no memory is allocated."""
        new: GaussianMixture = self._get_checked_instance(GaussianMixture, _instance)  # type: ignore[no-untyped-call]
        return super().expand(batch_shape, new)  # type: ignore[return-value]

    @classmethod
    def from_eigh(
        cls,
        logits: Tensor | None = None,
        probs: Tensor | None = None,
        loc: Tensor | None = None,
        eigenvalues: Tensor | None = None,
        eigenvectors: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> GaussianMixture:
        r"""A mixture of components with covariances :math:`V \operatorname{diag}(\lambda) V^\top`.

        The ``scale_tril`` is the triangle of a QR factorisation of :math:`\operatorname{diag}(\sqrt\lambda) V^\top`.
        The Cholesky factor of the product is the same but for rounding: eps times the condition number of the
        covariance, where this one has its square root.

        Args:
            logits: as in the constructor.
            probs: as in the constructor.
            loc: as in the constructor.
            eigenvalues: variances along the principal axes, ``batch_shape + (K, D)``, positive, in any order.
            eigenvectors: principal axes in the columns, as from `torch.linalg.eigh`, ``batch_shape + (K, D, D)``.
            validate_args: as in torch; on by default.

        Raises:
            ValueError: as the constructor; an eigenvalue is not positive, or eigenvectors are not orthonormal (says
                which).

        Example:
            >>> import torch, stablekl
            >>> values, vectors = torch.linalg.eigh(torch.tensor([[[2.0, 1.0], [1.0, 2.0]]]))
            >>> m = stablekl.GaussianMixture.from_eigh(probs=torch.ones(1), loc=torch.zeros(1, 2),
            ...                                        eigenvalues=values, eigenvectors=vectors)
            >>> m.covariance_matrix
            tensor([[2.0000, 1.0000],
                    [1.0000, 2.0000]])
        """
        _check_tensors(loc=loc, eigenvalues=eigenvalues, eigenvectors=eigenvectors)
        if loc is None or eigenvalues is None or eigenvectors is None:
            raise ValueError("from_eigh takes loc, eigenvalues and eigenvectors; give all three")
        d = loc.shape[-1] if loc.ndim else 0
        if eigenvalues.shape[-1:] != (d,) or eigenvectors.shape[-2:] != (d, d):
            raise ValueError(
                f"to go with loc of shape {tuple(loc.shape)}, eigenvalues must have shape batch_shape + (K, {d}) and "
                f"eigenvectors batch_shape + (K, {d}, {d}), got {tuple(eigenvalues.shape)} and "
                f"{tuple(eigenvectors.shape)}"
            )
        if Distribution._validate_args if validate_args is None else validate_args:
            _check_eigenvalues(eigenvalues)
            _check_orthonormal(eigenvectors)
        rows = widened(eigenvalues).sqrt().unsqueeze(-1) * widened(eigenvectors).mT
        tril = lower_square_root(rows).to(torch.promote_types(eigenvalues.dtype, eigenvectors.dtype))
        return cls(logits, probs, loc, scale_tril=tril, validate_args=validate_args)

    def _rebuilt(self, component: Gaussian | Distribution, log_weights: Tensor | None = None) -> GaussianMixture:
        """A mixture of other components, with normalised log-weights or those that were given."""
        if not isinstance(component, Gaussian):
            raise TypeError(f"a GaussianMixture has Gaussian components, not {component}")
        logits, probs = (self._given_logits, self._given_probs) if log_weights is None else (log_weights, None)
        parameter: dict[str, Any] = {component.kind: component.scale}
        return GaussianMixture(logits, probs, component.loc, validate_args=self._validate_args, **parameter)


def _check_tensors(**given: object) -> None:
    for name, value in given.items():
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor, got {value!r}: write torch.tensor(...)")


# Largest deviation of V'V from the identity, in units of D eps: eigh leaves a few.
_ORTHONORMAL = 64


def _check_eigenvalues(values: Tensor) -> None:
    values = values.detach()
    if is_plain((values,)) and not bool((good := (values > 0) & values.isfinite()).all()):
        index = (~good).nonzero()[0].tolist()
        raise ValueError(
            f"eigenvalues has the value {float(values[tuple(index)])} at {index}: it must be positive and finite. "
            "eigh returns eigenvalues of 0 or below for a covariance that is singular to working precision: use "
            "float64, or drop that direction."
        )


def _check_orthonormal(vectors: Tensor) -> None:
    vectors = vectors.detach()
    if not is_plain((vectors,)):
        return
    wide = widened(vectors)
    d = wide.shape[-1]
    error = (wide.mT @ wide - torch.eye(d, dtype=wide.dtype, device=wide.device)).abs().amax((-2, -1))
    bad = ~(error <= _ORTHONORMAL * d * torch.finfo(vectors.dtype).eps)
    if bool(bad.any()):
        index = bad.nonzero()[0].tolist()
        raise ValueError(
            f"the eigenvectors at {index} are not orthonormal: V'V is off the identity by "
            f"{float(error[tuple(index)]):.3g}. They belong in the columns and have length 1, as torch.linalg.eigh "
            "returns them."
        )


def _check_weights(name: str, weights: Tensor) -> None:
    """Say where a weight is negative, infinite or NaN, and which mixture has none that is positive."""
    weights = weights.detach()
    if not is_plain((weights,)):
        return
    if name == "probs":
        good, total = weights.isfinite() & (weights >= 0), (weights > 0).any(-1)
        rule, nothing = "not negative and finite", "all probs are 0"
    else:
        good, total = weights < torch.inf, (weights > -torch.inf).any(-1)
        rule, nothing = "finite, or -inf for a component that is switched off", "all logits are -inf"
    if not bool(good.all()):
        index = (~good).nonzero()[0].tolist()
        raise ValueError(
            f"{name} has the value {float(weights[tuple(index)])} at {index}: it must be {rule}. Look for the first "
            "such value upstream; for a network's output pass logits=, which may be any number."
        )
    if not bool(total.all()):
        index = (~total).nonzero()[0].tolist()
        raise ValueError(f"{nothing} in the mixture at {index}: at least one component must have a weight")
