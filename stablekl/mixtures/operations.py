r"""What Gaussian mixtures are closed under: marginals, conditionals, products; and moments and merges.

The methods that `MixtureSameFamily` and `GaussianMixture` share. Weights stay logarithms throughout. The formulas are
in `algebra` and `reduction`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import (
    Beta,
    Cauchy,
    Distribution,
    Exponential,
    Gamma,
    HalfCauchy,
    HalfNormal,
    Independent,
    Laplace,
    LogNormal,
    Poisson,
    StudentT,
    Uniform,
    VonMises,
)

from .._autograd import is_plain
from ..distributions._base import common_dtype
from ..distributions._gaussian import Gaussian, as_gaussian
from ..distributions.low_rank import LowRankMultivariateNormal
from ..distributions.multivariate_normal import MultivariateNormal
from ..distributions.normal import Normal
from ..special import logsumexp
from .algebra import condition, log_overlap, marginal, matched, positions, product, take
from .reading import as_mixture
from .reduction import merged

__all__ = ["GaussianOperations", "Reduction", "gaussian_distribution"]

# Families over scalars whose parameters all have the batch shape: a product of them is restricted by its entries.
_ELEMENTWISE = (
    *(Beta, Cauchy, Exponential, Gamma, HalfCauchy, HalfNormal, Laplace, LogNormal, Poisson, StudentT, Uniform),
    VonMises,
)


class Reduction(NamedTuple):
    """What `GaussianOperations.reduce` returns.

    Attributes:
        mixture: with fewer components.
        kl_bound: certified up to rounding: KL(original || mixture) is at most this, in nats, ``batch_shape``.
    """

    mixture: Any
    kl_bound: Tensor


def gaussian_distribution(g: Gaussian, validate_args: bool | None, *, scalar: bool = False) -> Distribution:
    """The distribution that has these parameters; a `Normal` over scalars if ``scalar``, where D is 1."""
    if scalar:
        scale = g.scale[..., 0] if g.kind == "scale_diag" else g.scale[..., 0, 0]
        return Normal(g.loc[..., 0], scale, validate_args=validate_args)
    if g.cov_factor is not None:
        return LowRankMultivariateNormal(g.loc, g.cov_factor, g.scale, validate_args=validate_args)
    parameter: dict[str, Any] = {g.kind: g.scale}
    return MultivariateNormal(g.loc, validate_args=validate_args, **parameter)


class GaussianOperations:
    """Mixin for mixtures whose components are Gaussians of any parameterisation, scalar or over vectors."""

    if TYPE_CHECKING:
        _component_distribution: Distribution
        _validate_args: bool
        _event_ndims: int
        batch_shape: torch.Size
        event_shape: torch.Size

        def _log_weights(self, dtype: torch.dtype | None = None) -> Tensor: ...
        def _rebuilt(self, component: Gaussian | Distribution, log_weights: Tensor | None = None) -> Any: ...

    def _over_vectors(self, method: str) -> int:
        if self._event_ndims != 1:
            raise ValueError(
                f"{method} picks coordinates of a vector, but events have shape {tuple(self.event_shape)}. If the last "
                "batch dimension of the components holds the coordinates, wrap them: Independent(component, 1)."
            )
        return self.event_shape[0]

    def marginal(self, dims: Sequence[int]) -> Any:
        r"""The mixture over some of the coordinates, in the order of ``dims``; the weights stay.

        Components keep their form where they have one: standard deviations, low-rank factors and covariances by their
        entries, ``scale_tril`` by a QR of its rows (exact where ``dims`` is 0, 1, ..., n - 1), a precision by the
        ``scale_tril`` of its marginal. Products of scalar families other than Normal are restricted by their entries.

        Args:
            dims: indices of coordinates; negative ones count from the end.

        Returns:
            A mixture of this class, batch shape as before, event shape ``(len(dims),)``.

        Raises:
            ValueError: an index is out of range or occurs twice, there is none, dims are no sequence of integers (a
                mask), or events are not vectors.
            NotImplementedError: the components' family has no marginals here.

        Example:
            >>> import torch, stablekl
            >>> m = stablekl.GaussianMixture(probs=torch.tensor([0.5, 0.5]), loc=torch.arange(6.0).reshape(2, 3),
            ...                              scale_diag=torch.ones(2, 3))
            >>> m.marginal([2, 0]).component_distribution.loc
            tensor([[2., 0.],
                    [5., 3.]])
        """
        places = positions(dims, self._over_vectors("marginal"))
        component = self._component_distribution
        g = as_gaussian(component)
        if g is not None:
            return self._rebuilt(marginal(g, places))
        if isinstance(component, Independent) and component.reinterpreted_batch_ndims == 1:
            base = component.base_dist
            if type(base) in _ELEMENTWISE:
                names = [name for name in base.arg_constraints if name not in ("probs", "logits")]
                parameters = {name: getattr(base, name).expand(base.batch_shape) for name in names}
                picked = {name: take(x, places, -1) for name, x in parameters.items()}
                return self._rebuilt(Independent(type(base)(**picked, validate_args=self._validate_args), 1))
        as_mixture(self, "marginal")  # type: ignore[arg-type]
        raise NotImplementedError

    def condition(self, dims: Sequence[int], value: Tensor) -> Any:
        r"""The mixture over the other coordinates, in their order, given ``x[dims] = value``.

        .. math:: p(x_b | x_a) = \sum_k w_k' \, p_k(x_b | x_a), \qquad
            \log w_k' = \log w_k + \log p_k(x_a) - \log \textstyle\sum_j w_j p_j(x_a)

        by triangular solves with factors whose first rows belong to a: nothing is inverted. The weights are logarithms,
        so that a value far from every component decides between them, to about ``eps`` times its log-densities.
        Components given by ``scale_diag``, ``scale_tril``, ``precision_matrix`` or low-rank factors stay so, a
        ``covariance_matrix`` becomes a ``scale_tril``.

        Args:
            dims: indices of the coordinates that are known; negative ones count from the end.
            value: shape ``sample_shape + batch_shape + (len(dims),)``.

        Returns:
            A mixture of this class of batch shape ``sample_shape + batch_shape``, differentiable in the value and all
            parameters.

        Raises:
            ValueError: an index is out of range or occurs twice, dims are no sequence of integers (a mask), none or
                every coordinate is named, events are not vectors, or the value is no tensor, has the wrong shape, is
                not finite, or is so far away that every component's log-density is -inf (says where).
            NotImplementedError: components are not Gaussian.

        Example:
            >>> import torch, stablekl
            >>> m = stablekl.GaussianMixture(probs=torch.tensor([0.5, 0.5]), loc=torch.tensor([[0.0, 0.0], [5.0, 9.0]]),
            ...                              scale_tril=torch.tensor([[1.0, 0.0], [0.5, 1.0]]).expand(2, 2, 2))
            >>> m.condition([0], torch.tensor([1.0])).mean
            tensor([0.5036])
        """
        log_weights, g, _ = as_mixture(self, "condition")  # type: ignore[arg-type]
        places = positions(dims, self._over_vectors("condition"))
        if len(places) == g.loc.shape[-1]:
            raise ValueError("dims names every coordinate, so none is left; log_prob(value) is their density")
        self._check_known(value, len(places))
        rest, log_density = condition(g, places, value)
        joint = torch.where(log_weights == -torch.inf, -torch.inf, log_density) + log_weights
        total = logsumexp(joint, -1)
        if self._validate_args and is_plain((total.detach(),)) and not bool((total > -torch.inf).all()):
            index = (~(total > -torch.inf)).nonzero()[0].tolist()
            raise ValueError(
                f"the value at {index} has log-density -inf under every component, so there is no conditional: the "
                "squares of its distances in standard deviations overflow. Look for an outlier or a unit upstream."
            )
        return self._rebuilt(rest, (joint - total.unsqueeze(-1)).to(rest.loc.dtype))

    def _check_known(self, value: Tensor, n: int) -> None:
        if not isinstance(value, Tensor):
            raise ValueError(f"the value must be a tensor, got {value!r}")
        shape = tuple(value.shape)
        wanted = f"sample_shape + {tuple(self.batch_shape)} + ({n},)"
        if not shape or shape[-1] != n:
            raise ValueError(f"the value must have shape {wanted} to go with {n} dims, got {shape}")
        try:
            torch.broadcast_shapes(shape[:-1], self.batch_shape)
        except RuntimeError as error:
            raise ValueError(f"the value must have shape {wanted} or broadcast with it, got {shape}") from error
        plain = value.detach()
        if self._validate_args and is_plain((plain,)) and not bool(plain.isfinite().all()):
            index = (~plain.isfinite()).nonzero()[0].tolist()
            raise ValueError(
                f"the value has the entry {float(plain[tuple(index)])} at {index}: it must be finite. Look for the "
                "first such value upstream."
            )

    def log_inner_product(self, other: Distribution) -> Tensor:
        r"""Log of the inner product of two densities (the expected-likelihood kernel), in nats, ``batch_shape``.

        .. math:: \log \int m_1 m_2 \, dx = \log \sum_{ij} w_i v_j N(\mu_i; \mu_j, \Sigma_i + \Sigma_j)

        with the factor of :math:`\Sigma_i + \Sigma_j` by a QR of both. ``-m.log_inner_product(m)`` is m's quadratic
        Renyi entropy. (T. Jebara, R. Kondor, A. Howard, Probability product kernels, JMLR 5, 2004.)

        Args:
            other: a mixture of Gaussians, torch's or ours, or a Gaussian, over the same space. Batch shapes broadcast.

        Raises:
            ValueError: the event shapes differ.
            NotImplementedError: components of one are not Gaussian.

        Example:
            >>> import torch, stablekl
            >>> m = stablekl.GaussianMixture(probs=torch.ones(1), loc=torch.zeros(1, 1), scale_diag=torch.ones(1, 1))
            >>> print(f"{m.log_inner_product(m).exp():.6f}")  # 1/sqrt(4 pi)
            0.282095
        """
        joint, _, _, dtype = self._pairs(other, "log_inner_product")
        return logsumexp(joint.flatten(-2), -1).to(dtype)

    def product(self, other: Distribution) -> Any:
        r"""The mixture proportional to :math:`m_1(x) m_2(x)`, of all :math:`K_1 K_2` products of components.

        Weights are proportional to :math:`w_i v_j N(\mu_i; \mu_j, \Sigma_i + \Sigma_j)`, in log space. A component's
        precision is the sum of two, by the QR of both inverse factors: symmetric, without subtraction. Component
        ``i * K2 + j`` is that of i and j. Two diagonal mixtures have a diagonal product; every other has
        ``scale_tril``. The logarithm of what the product was divided by is ``m.log_inner_product(other)``.

        Args:
            other: a mixture of Gaussians, torch's or ours, or a Gaussian, over the same space. Batch shapes broadcast.

        Raises:
            ValueError: the event shapes differ, or no pair overlaps at all: every log-weight is -inf (says where).
            NotImplementedError: components of one are not Gaussian.

        Example:
            >>> import torch, stablekl
            >>> m = stablekl.GaussianMixture(probs=torch.tensor([0.5, 0.5]), loc=torch.tensor([[-1.0], [1.0]]),
            ...                              scale_diag=torch.ones(2, 1))
            >>> m.product(stablekl.MultivariateNormal(torch.tensor([1.0]), scale_diag=torch.ones(1))).mean
            tensor([0.7311])
        """
        joint, p, q, dtype = self._pairs(other, "product")
        total = logsumexp(joint.flatten(-2), -1)
        if self._validate_args and is_plain((total.detach(),)) and not bool((total > -torch.inf).all()):
            index = (~(total > -torch.inf)).nonzero()[0].tolist()
            raise ValueError(
                f"the mixtures at {index} have no overlap that float64 can hold: the log inner product of every pair "
                "of components is -inf, so there is no product. Look for outlying means upstream."
            )
        g = product(p, q)
        g = Gaussian(
            g.kind, g.loc.flatten(-3, -2), g.scale.flatten(*((-3, -2) if g.kind == "scale_diag" else (-4, -3)))
        )
        return self._rebuilt(g.to(dtype), (joint.flatten(-2) - total.unsqueeze(-1)).to(dtype))

    def _pairs(self, other: Distribution, method: str) -> tuple[Tensor, Gaussian, Gaussian, torch.dtype]:
        """Log-weights of all pairs with their overlaps, (..., K1, K2), and both sides with two component dimensions."""
        (lw_p, p, _), (lw_q, q, _) = (as_mixture(m, method) for m in (self, other))  # type: ignore[arg-type]
        if self.event_shape != other.event_shape:
            raise ValueError(
                f"{method} needs distributions over the same space, but the event shapes are "
                f"{tuple(self.event_shape)} and {tuple(other.event_shape)}"
            )
        dtype = common_dtype(p.loc, p.scale, q.loc, q.scale)
        p, q = p.unsqueeze(-1), q.unsqueeze(-2)
        weights = lw_p.unsqueeze(-1) + lw_q.unsqueeze(-2)
        overlap = log_overlap(p, q)
        return torch.where(weights == -torch.inf, -torch.inf, overlap) + weights, p, q, dtype

    def to_mvn(self) -> Distribution:
        r"""The Gaussian with the mixture's mean and covariance (moment matching): it minimises KL(mixture || q).

        A `MultivariateNormal` by its ``scale_tril``, or a `Normal` where events are scalars. The factor is a QR of
        :math:`\sqrt{w_k} L_k^\top` and :math:`\sqrt{w_k}(\mu_k - \mu)^\top`: it exists however narrow the components
        are beside the distance of their means, where the summed covariance is no longer positive definite.

        Raises:
            NotImplementedError: components are not Gaussian.

        Example:
            >>> import torch, stablekl
            >>> m = stablekl.GaussianMixture(probs=torch.tensor([0.5, 0.5]), loc=torch.tensor([[0., 0.], [2., 2.]]),
            ...                              scale_diag=torch.full((2, 2), 1e-12))
            >>> m.to_mvn().scale_tril
            tensor([[1.0000e+00, 0.0000e+00],
                    [1.0000e+00, 1.4142e-12]])
        """
        log_weights, g, _ = as_mixture(self, "to_mvn")  # type: ignore[arg-type]
        result = matched(log_weights, g).to(g.dtype)
        return gaussian_distribution(result, self._validate_args, scalar=not self._event_ndims)

    def reduce(self, num_components: int) -> Reduction:
        r"""Merge components until ``num_components`` are left, the cheapest pair first (Runnalls' algorithm).

        The cost of a pair is :math:`w_i KL(p_i \| p_{ij}) + w_j KL(p_j \| p_{ij})`, :math:`p_{ij}` the Gaussian with
        the pair's mean and covariance: an upper bound on the divergence of the mixture from that with the pair merged.
        Mean and covariance of the mixture stay as they are, up to rounding. Components of weight 0 go first, at no
        cost. (A. R. Runnalls, Kullback-Leibler approach to Gaussian mixture reduction, 2007.)

        Args:
            num_components: K', between 1 and the number of components K.

        Returns:
            ``(mixture, kl_bound)``: the mixture, of this class, by its ``scale_tril``; and an upper bound on the KL
            divergence of this mixture from it, in nats, ``batch_shape``. The bound,
            :math:`\sum_k w_k KL(p_k \| r_{c(k)})` with r the result's component that k went into, holds by the log-sum
            inequality (up to rounding) and equals the sum of the costs. With K' = K this mixture itself and 0.

        Raises:
            ValueError: K' is no integer between 1 and K.
            NotImplementedError: components are not Gaussian.

        Example:
            >>> import torch, stablekl
            >>> loc = torch.tensor([[0.0], [0.1], [5.0]])
            >>> m = stablekl.GaussianMixture(probs=torch.tensor([0.3, 0.3, 0.4]), loc=loc, scale_diag=torch.ones(3, 1))
            >>> smaller, kl_bound = m.reduce(2)
            >>> print(smaller.mixture_distribution.probs, f"{kl_bound:.5f}")
            tensor([0.6000, 0.4000]) 0.00075
        """
        log_weights, g, _ = as_mixture(self, "reduce")  # type: ignore[arg-type]
        k = log_weights.shape[-1]
        try:
            count = operator.index(num_components)
        except TypeError:
            count = 0
        if not 1 <= count <= k:
            raise ValueError(
                f"num_components must be an integer between 1 and {k}, the number of components, got {num_components!r}"
            )
        if count == k:
            return Reduction(self, log_weights.new_zeros(self.batch_shape, dtype=g.dtype))
        result = merged(log_weights, g, count)
        mixture = self._rebuilt(result.gaussian.to(g.dtype), result.log_weights.to(g.dtype))
        return Reduction(mixture, result.bound.to(g.dtype))
