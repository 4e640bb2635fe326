"""A mixture, or a single Gaussian, as the weights and Gaussians that the KL engines take."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent
from torch.distributions import MixtureSameFamily as TorchMixtureSameFamily

from .._autograd import is_eager
from ..distributions._base import check_batch_shapes, widened
from ..distributions._gaussian import Gaussian, as_gaussian
from .components import Components, gaussian_components
from .weights import log_weights_of

__all__ = ["Mixture", "as_mixture", "check_same_space", "simplified"]


class Mixture(NamedTuple):
    """Weights and the Gaussians they weigh, in the form that the caller gave them.

    Attributes:
        log_weights: normalised, in working precision, shape ``batch_shape + (K,)`` or broadcastable with it.
        gaussian: of batch shape ``batch_shape + (K,)`` or broadcastable with it.
        dtype: what the caller's parameters promote to.
    """

    log_weights: Tensor
    gaussian: Gaussian
    dtype: torch.dtype

    @property
    def num_components(self) -> int:
        """K."""
        return self.log_weights.shape[-1]

    @property
    def dim(self) -> int:
        """D."""
        return self.gaussian.loc.shape[-1]

    def widened(self) -> Mixture:
        """The same in working precision."""
        dtype = widened(self.gaussian.loc).dtype
        return self._replace(log_weights=self.log_weights.to(dtype), gaussian=self.gaussian.to(dtype))

    def components(self) -> Components:
        """With standard deviations or Cholesky factors, which costs a factorisation where neither was given."""
        return gaussian_components(self.log_weights, self.gaussian)


def _class_name(distribution: Distribution) -> str:
    name = type(distribution).__name__
    if isinstance(distribution, Independent):
        return f"{name}({_class_name(distribution.base_dist)}, {distribution.reinterpreted_batch_ndims})"
    return name


def as_mixture(distribution: Distribution, what: str = "a KL rule") -> Mixture:
    """Read a mixture of Gaussians, torch's or ours, or a Gaussian as a mixture of one.

    Args:
        distribution: to be read.
        what: it is read for, as the error names it.

    Raises:
        NotImplementedError: it is neither; names the class.
    """
    mixture = distribution if isinstance(distribution, TorchMixtureSameFamily) else None
    component = distribution if mixture is None else mixture.component_distribution
    gaussian = as_gaussian(component)
    if gaussian is None:
        kind = "" if mixture is None else "mixtures of "
        raise NotImplementedError(
            f"{what} is not available for {kind}{_class_name(component)} ({component}): it must be Normal, "
            "Independent(Normal, 1), MultivariateNormal or LowRankMultivariateNormal. Estimate what you need from "
            "samples, or register a rule with torch.distributions.register_kl"
        )
    if mixture is None:
        single = gaussian.loc.new_zeros((*gaussian.loc.shape[:-1], 1))
        return Mixture(single, gaussian.unsqueeze(-1), gaussian.loc.dtype)
    dtype = widened(gaussian.loc).dtype
    # in working precision: rounded log-weights would be off by their size in units of the caller's eps
    log_weights = log_weights_of(mixture, dtype)
    weights = mixture.mixture_distribution._param
    return Mixture(log_weights, gaussian, torch.promote_types(gaussian.loc.dtype, weights.dtype))


def check_same_space(p: Distribution, q: Distribution, m_p: Mixture, m_q: Mixture) -> None:
    """ValueError unless both live in the same space, and their batch shapes broadcast."""
    if m_p.dim != m_q.dim:
        raise ValueError(
            "a divergence needs distributions over the same space, but the event shapes are "
            f"{tuple(p.event_shape)} and {tuple(q.event_shape)}. If the last batch dimension of a Normal holds the "
            "coordinates of one vector, wrap it: Independent(Normal(loc, scale), 1)"
        )
    check_batch_shapes(p, q)


def _k_dim(g: Gaussian) -> int:
    """The dimension of ``scale`` that indexes the components."""
    return -2 if g.scale.ndim == g.loc.ndim else -3


def simplified(m: Mixture) -> Mixture:
    """The same mixture without components of weight 0, and as one Gaussian where all components are the same.

    Looks at the data, and so does nothing inside transforms. Derivatives of the first order are right for a merged
    mixture too; those of the second order, with respect to single components, are not.
    """
    g = m.gaussian
    if m.num_components == 1 or not is_eager(m.log_weights, g.loc, g.scale):
        return m
    if not (m.log_weights.numel() and g.loc.numel()):  # of no rows, all components would be dead
        return m
    alive = m.log_weights.detach() > -torch.inf
    if not bool(alive.all()):
        keep = alive.reshape(-1, m.num_components).any(0).nonzero()[:, 0]
        factor = None if g.cov_factor is None else g.cov_factor.index_select(-3, keep)
        g = Gaussian(g.kind, g.loc.index_select(-2, keep), g.scale.index_select(_k_dim(g), keep), factor)
        m = m._replace(log_weights=m.log_weights.index_select(-1, keep), gaussian=g)
    parameters = [(g.loc, -2), (g.scale, _k_dim(g))] + ([] if g.cov_factor is None else [(g.cov_factor, -3)])
    if not all(bool((x.detach() == x.detach().narrow(dim, 0, 1)).all()) for x, dim in parameters):
        return m
    # The weighted mean of equal parameters, formed so that it is exactly they: each component then receives its
    # share w_k of the gradient.
    means = [_mean_of_equals(m.log_weights, x, dim) for x, dim in parameters]
    merged = Gaussian(g.kind, means[0], means[1], means[2] if len(means) > 2 else None)
    return m._replace(log_weights=torch.zeros_like(m.log_weights[..., :1]), gaussian=merged)


def _mean_of_equals(log_weights: Tensor, x: Tensor, dim: int) -> Tensor:
    first = x.narrow(dim, 0, 1)
    w = log_weights.exp().to(x.dtype).reshape(log_weights.shape + (1,) * (-1 - dim))
    return first.detach() + (w * (x - first.detach())).sum(dim, keepdim=True)
