"""Mixtures whose components share a family: torch's class with a density that stays in log space.

The density of Gaussian components is streamed (`density`); that of any other family is the log-sum-exp of
the components' own, where a point outside a component's support makes that component -inf rather than the mixture NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, constraints
from torch.distributions import MixtureSameFamily as TorchMixtureSameFamily
from torch.distributions.constraints import MixtureSameFamilyConstraint
from torch.types import _size

from .._autograd import is_plain
from ..distributions._base import Movable
from ..distributions._gaussian import Gaussian, as_gaussian
from ..special import logsumexp
from .components import Components, gaussian_components
from .density import component_log_probs, mixture_log_prob
from .distribution_functions import DistributionFunctions
from .entropies import entropy_estimate
from .estimate import warn_of_excess
from .interior import interior_point
from .moments import mixture_covariance, mixture_mean, mixture_variance
from .operations import GaussianOperations, gaussian_distribution
from .sampling import one_per_component, reparameterised
from .weights import given_weights, normalised_log_weights

__all__ = ["MixtureSameFamily"]

_NO_SHAPE = torch.Size()


class MixtureSameFamily(GaussianOperations, DistributionFunctions, Movable, TorchMixtureSameFamily):
    r"""`torch.distributions.MixtureSameFamily` with an exact, streamed log-density and exact weights.

    The density is :math:`m(x) = \sum_k w_k p_k(x)`. Weights of exactly 0 contribute nothing, as read from what the
    Categorical was given (torch clamps its logits). No N x K x D tensor is built for Gaussian components, forward or
    backward. Distribution functions and quantiles are in log space too, and samples of Gaussian mixtures can be
    differentiated (`rsample`, `stratified_sample`).

    Args:
        mixture_distribution: the weights, batch shape broadcasting with the component's but for its last dimension.
        component_distribution: any torch distribution; the last batch dimension indexes the K components.
        validate_args: as in torch; on by default.

    Example:
        >>> import torch, stablekl
        >>> from torch.distributions import Categorical, Normal
        >>> m = stablekl.MixtureSameFamily(
        ...     Categorical(probs=torch.tensor([1.0, 0.0])), Normal(torch.tensor([0.0, 10.0]), torch.ones(2)))
        >>> print(f"{m.log_prob(torch.tensor(10.0)):.4f}")
        -50.9189
    """

    def __init__(
        self,
        mixture_distribution: Categorical,
        component_distribution: Distribution,
        validate_args: bool | None = None,
    ) -> None:
        """Build torch's mixture, over the batch shape the weights and the components broadcast to."""
        if isinstance(component_distribution, Distribution) and not component_distribution.batch_shape:
            raise ValueError(
                f"the last batch dimension of the components counts them, but {component_distribution} has batch shape "
                "(): give all K components' parameters in one distribution"
            )
        # Read before torch's constructor asks the Categorical for logits, which it clamps.
        self._given_logits, self._given_probs = given_weights(mixture_distribution)
        super().__init__(mixture_distribution, component_distribution, validate_args=validate_args)
        k = component_distribution.batch_shape[-1]
        batch_shape = torch.broadcast_shapes(mixture_distribution.batch_shape, component_distribution.batch_shape[:-1])
        if component_distribution.batch_shape != (*batch_shape, k):
            self._component_distribution = component_distribution.expand(torch.Size((*batch_shape, k)))
        if mixture_distribution.batch_shape != batch_shape:
            self._mixture_distribution = mixture_distribution.expand(batch_shape)
        self._batch_shape = batch_shape

    def expand(self, batch_shape: _size, _instance: Any = None) -> MixtureSameFamily:
        """Return this mixture with its batch shape expanded; no memory is allocated."""
        new: MixtureSameFamily = self._get_checked_instance(MixtureSameFamily, _instance)  # type: ignore[no-untyped-call]
        batch_shape = torch.Size(batch_shape)
        new._component_distribution = self._component_distribution.expand(
            torch.Size((*batch_shape, self._num_component))
        )
        new._mixture_distribution = self._mixture_distribution.expand(batch_shape)
        new._given_logits, new._given_probs = self._given_logits, self._given_probs
        new._num_component, new._event_ndims = self._num_component, self._event_ndims
        Distribution.__init__(new, batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def log_weights(self) -> Tensor:
        """Normalised log-weights, ``batch_shape + (K,)``; -inf for a weight of 0."""
        return self._log_weights()

    def _log_weights(self, dtype: torch.dtype | None = None) -> Tensor:
        """`log_weights` in another dtype, with the accuracy of that dtype."""
        result = normalised_log_weights(self._given_logits, self._given_probs, dtype)
        return result.expand(torch.Size((*self._batch_shape, self._num_component)))

    def _components(self) -> Components | None:
        """The parameters of Gaussian components; None for other families."""
        gaussian = as_gaussian(self._component_distribution)
        return None if gaussian is None else gaussian_components(self._working_log_weights(), gaussian)

    def _working_log_weights(self) -> Tensor:
        """`log_weights`, half precisions in float32: the density is rounded once."""
        return self._log_weights(torch.promote_types(self._mixture_distribution._param.dtype, torch.float32))

    def _event(self, value: Tensor) -> Tensor:
        """A scalar as the vector of length 1 that the Gaussian density works on."""
        return value if self._event_ndims else value.unsqueeze(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, ``sample_shape + batch_shape``; -inf outside every component's support.

        Raises:
            ValueError: the value has the wrong shape, is NaN, or lies outside the support of every component (when
                validation is on; says where).
        """
        if self._validate_args:
            self._check_value(value)
        components = self._components()
        if components is not None:
            result = mixture_log_prob(self._event(value), components)
            dtype = torch.promote_types(value.dtype, self._component_distribution.mean.dtype)
        else:
            log_weights = self._working_log_weights()
            # A component that is switched off is not evaluated at the value: its gradient there may be NaN.
            by_component = self._family_log_probs(value, self._inside(value) & (log_weights > -torch.inf))
            result = logsumexp(by_component + log_weights, -1)
            dtype = by_component.dtype
        return result.to(torch.promote_types(dtype, self._mixture_distribution._param.dtype))

    def component_log_probs(self, value: Tensor) -> Tensor:
        """Log-density under each component, without its weight, ``sample_shape + batch_shape + (K,)``.

        -inf where the value lies outside a component's support.
        """
        components = self._components()
        if components is not None:
            result = component_log_probs(self._event(value), components)
            return result.to(torch.promote_types(value.dtype, components.loc.dtype))
        return self._family_log_probs(value, self._inside(value))

    def _family_log_probs(self, value: Tensor, use: Tensor) -> Tensor:
        """Log-densities of components of any family; -inf where they are not to be used."""
        component, padded = self._component_distribution, self._pad(value)
        interior = interior_point(component, padded)

        def evaluate(use: Tensor) -> Tensor:
            # The component's formula may raise or return NaN outside its support: evaluate it at a point inside.
            mask = use.reshape(use.shape + (1,) * self._event_ndims)
            log_prob: Tensor = component.log_prob(torch.where(mask, padded, interior))
            return torch.where(use, log_prob, -torch.inf)

        log_prob = evaluate(use)
        live = log_prob.detach() > -torch.inf
        if is_plain((log_prob,)) or (is_plain((live,)) and bool((live == use).all())):
            return log_prob
        # A density of 0 on the edge of the support: its gradient is infinite, and 0 * inf would be NaN.
        return evaluate(use & live)

    def _inside(self, value: Tensor) -> Tensor:
        """Whether each component's support contains the value, ``(..., K)``."""
        padded = self._pad(value)
        component = self._component_distribution
        shape = torch.broadcast_shapes(padded.shape[: padded.ndim - self._event_ndims], component.batch_shape)
        if 0 in shape:  # torch's check of vectors cannot reshape nothing (2.13)
            return torch.ones(shape, dtype=torch.bool, device=value.device)
        try:
            support = component.support
        except NotImplementedError:  # a component class that does not say where it lives
            support = None
        if support is None:
            support = constraints.independent(constraints.real, self._event_ndims)
        inside: Tensor = support.check(padded)
        return inside

    def _pad(self, value: Tensor) -> Tensor:
        """With a dimension for the components before the event's."""
        return value.unsqueeze(-1 - self._event_ndims)

    def posterior_marginal(self, value: Tensor) -> Categorical:
        """Distribution of the component label given each value: weights proportional to w_k p_k(x).

        Raises:
            ValueError: as `log_prob`. Where every component is -inf there is no posterior, and its weights are NaN.
        """
        if self._validate_args:
            self._check_value(value)
        joint = _joint(self.component_log_probs(value), self.log_weights)
        return Categorical(logits=joint, validate_args=False)

    def posterior_mode(self, value: Tensor) -> Tensor:
        """The most probable component given each value, argmax_k w_k p_k(x), ``sample_shape + batch_shape``.

        An index (int64); the lowest where several are equally probable.

        Raises:
            ValueError: as `log_prob`. With validation off, 0 where every component is -inf.
        """
        if self._validate_args:
            self._check_value(value)
        return _joint(self.component_log_probs(value), self.log_weights).argmax(-1)

    def _rebuilt(self, component: Gaussian | Distribution, log_weights: Tensor | None = None) -> MixtureSameFamily:
        """A mixture of this class of other components, with normalised log-weights or those it has."""
        if isinstance(component, Gaussian):
            component = gaussian_distribution(component, self._validate_args, scalar=not self._event_ndims)
        weights = self._mixture_distribution
        if log_weights is not None:
            weights = Categorical(logits=log_weights, validate_args=False)
        return MixtureSameFamily(weights, component, validate_args=self._validate_args)

    @property
    def mean(self) -> Tensor:
        """Mean, ``batch_shape + event_shape``."""
        return mixture_mean(self)

    @property
    def variance(self) -> Tensor:
        """Variance of each coordinate, ``batch_shape + event_shape``: within plus between components."""
        return mixture_variance(self)

    @property
    def covariance_matrix(self) -> Tensor:
        """Covariance of vector-valued events, ``batch_shape + (D, D)``: within plus between components.

        Raises:
            AttributeError: events are not vectors, or the component has no covariance of its own.
        """
        if self._event_ndims != 1:
            raise AttributeError(f"a covariance matrix needs vector events, not event shape {self.event_shape}")
        return mixture_covariance(self)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        """Where some component has its support; torch's asks for all of them, which refuses samples."""
        return _Union(self._component_distribution.support)  # type: ignore[no-untyped-call]

    def entropy(self) -> Tensor:
        """Differential entropy in nats of a mixture of Gaussians, ``batch_shape``; see `stablekl.entropy_estimate`.

        Raises:
            NotImplementedError: components of another family.

        Warns:
            AccuracyWarning: in eager mode, where the estimated error exceeds the tolerance of `stablekl.accuracy`.
        """
        estimate = entropy_estimate(self)
        warn_of_excess(estimate, "entropy", stacklevel=2)
        return estimate.value

    def sample(self, sample_shape: _size = _NO_SHAPE) -> Tensor:
        """Samples, ``sample_shape + batch_shape + event_shape``; without a gradient."""
        if 0 in sample_shape:  # a Categorical refuses to draw no labels
            return self._component_distribution.sample(torch.Size(sample_shape)).select(-1 - self._event_ndims, 0)
        drawn: Tensor = super().sample(torch.Size(sample_shape))  # type: ignore[no-untyped-call]
        return drawn

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether `rsample` can differentiate samples: the components are Gaussian."""
        return as_gaussian(self._component_distribution) is not None

    def rsample(self, sample_shape: _size = _NO_SHAPE) -> Tensor:
        """The points that `sample` draws, ``sample_shape + batch_shape + event_shape``, with implicit derivatives.

        Weights, means and scales all receive the gradient of E[f(X)] through the point alone; see `mixtures.implicit`.

        Raises:
            NotImplementedError: the components are not Gaussian.
        """
        return reparameterised(self, self.sample(torch.Size(sample_shape)))

    def stratified_sample(self, sample_shape: _size = _NO_SHAPE) -> Tensor:
        r"""A point of every component, ``sample_shape + (K,) + batch_shape + event_shape``.

        For :math:`E[f(X)] = \sum_k w_k E[f(X_k)]` with an exact sum over k: no variance from the labels, and the
        gradient with respect to the weights is that of the sum. Points are differentiable where the component has
        ``rsample``; where a weight is 0 the point is one of the heaviest component, so that 0 f stays 0. With a batch
        shape, the weights to multiply by are ``log_weights.exp().movedim(-1, 0)``.

        Example:
            >>> import torch, stablekl
            >>> q = stablekl.GaussianMixture(torch.zeros(3, requires_grad=True), loc=torch.randn(3, 2),
            ...                              scale_diag=torch.ones(3, 2))
            >>> x = q.stratified_sample((64,))  # (64, 3, 2)
            >>> log_joint = stablekl.MultivariateNormal(torch.zeros(2), torch.eye(2)).log_prob
            >>> elbo = (q.log_weights.exp() * (log_joint(x) - q.log_prob(x))).sum(-1).mean()
            >>> elbo.backward()
        """
        return one_per_component(self, torch.Size(sample_shape))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(\n  {self.mixture_distribution},\n  {self.component_distribution})"

    def _check_shape(self, value: Tensor) -> None:
        if not isinstance(value, Tensor):
            raise ValueError(f"the value must be a tensor, got {value!r}")
        n = value.ndim - self._event_ndims
        shape = value.shape[:n] if n >= 0 else None
        if shape is None or value.shape[n:] != self.event_shape or not _broadcasts(shape, self.batch_shape):
            raise ValueError(
                f"the value of shape {tuple(value.shape)} must end in the event shape {tuple(self.event_shape)}, and "
                f"what comes before that must broadcast with the batch shape {tuple(self.batch_shape)}"
            )

    def _check_point(self, value: Tensor) -> None:
        """For distribution functions, which are 0 or 1 outside the support."""
        self._check_shape(value)
        missing = value.detach().isnan()
        if is_plain((missing,)) and bool(missing.any()):
            raise ValueError(
                f"the value is NaN at {missing.nonzero()[0].tolist()}. Look for the first such value upstream, or pass "
                "validate_args=False to get NaN."
            )

    def _check_value(self, value: Tensor) -> None:
        self._check_shape(value)
        inside = self._inside(value.detach())
        if not is_plain((inside,)):
            return
        inside = inside.any(-1)
        if not bool(inside.all()):
            index = (~inside).nonzero()[0].tolist()
            point = value.detach().expand(inside.shape + self.event_shape)[tuple(index)]
            raise ValueError(
                f"value {point.tolist()} at {index} lies outside the support of every component "
                f"({self._component_distribution.support}) or is NaN. Look for the first such value upstream, or pass "
                "validate_args=False to get -inf."
            )


class _Union(MixtureSameFamilyConstraint):
    """A point belongs to the support of a mixture if it belongs to that of one component."""

    def check(self, value: Tensor) -> Tensor:
        events = len(value.shape) - self.base_constraint.event_dim
        inside: Tensor = self.base_constraint.check(value.unsqueeze(events)).any(-1)
        return inside

    def __repr__(self) -> str:
        return f"MixtureSameFamilyConstraint({self.base_constraint!r})"


def _broadcasts(a: torch.Size, b: torch.Size) -> bool:
    return all(m == n or m == 1 or n == 1 for m, n in zip(reversed(a), reversed(b), strict=False))


def _joint(by_component: Tensor, log_weights: Tensor) -> Tensor:
    """log(w_k p_k): -inf for a weight of 0, also where the density is infinite."""
    return torch.where(log_weights == -torch.inf, -torch.inf, by_component) + log_weights
