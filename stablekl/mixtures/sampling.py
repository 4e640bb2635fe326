r"""Samples of mixtures that can be differentiated: joint ones, and stratified ones.

Two estimators of E[f(X)] = sum_k w_k E[f(X_k)] and of its gradient:

- `reparameterised`: the points of `sample`, each with the implicit derivative of the whole mixture (`implicit`): one
  evaluation of f per point, and a gradient with respect to weights, means and scales alike that x carries;
- `one_per_component`: a point of every component, weighed by its weight. The sum over the labels is exact, so that
  the spread between components adds no variance, a rare component is never missed, and the weights' gradient is
  E[f(X_k)] itself. K evaluations of f per draw.

The first is for many components, a costly f or a sampler that must look like any other distribution's; the second has
the smaller variance per draw (Roeder, Wu and Duvenaud, "Sticking the landing", 2017, section 5; Morningstar et al.,
"Automatic differentiation variational inference with mixture models", 2021).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent

from ..distributions._base import widened
from ..distributions._gaussian import as_gaussian
from .components import gaussian_components
from .implicit import implicit_point

__all__ = ["one_per_component", "reparameterised"]


def reparameterised(mixture: Any, x: Tensor) -> Tensor:
    """Samples ``x`` of the mixture, with their derivatives with respect to its parameters.

    Args:
        mixture: a `MixtureSameFamily`.
        x: ``sample_shape + batch_shape + event_shape``.

    Raises:
        NotImplementedError: the components are not Gaussian.

    Example:
        >>> import torch, stablekl
        >>> logits = torch.zeros(2, requires_grad=True)
        >>> m = stablekl.GaussianMixture(logits, loc=torch.tensor([[0.0], [4.0]]), scale_diag=torch.ones(2, 1))
        >>> _ = torch.manual_seed(0)
        >>> m.rsample((4000,)).mean().backward()  # the mean is 4 w_2, whose derivative is 4 w_1 w_2
        >>> print([f"{g:.1f}" for g in logits.grad])
        ['-1.0', '1.0']
    """
    component = mixture.component_distribution
    gaussian = as_gaussian(component)
    if gaussian is None:
        name = type(component.base_dist if isinstance(component, Independent) else component).__name__
        raise NotImplementedError(
            f"rsample differentiates mixtures of scalar or vector Gaussians, not of {name} with events of shape "
            f"{tuple(component.event_shape)}. Use stratified_sample, whose gradient is that of the components' rsample "
            "and of the exact sum over them; or, for scalar events, icdf(torch.rand(...)), where the family has both "
            "cdf and icdf"
        )
    gaussian = gaussian.to(widened(gaussian.loc).dtype)
    components = gaussian_components(mixture._log_weights(gaussian.loc.dtype), gaussian)
    if component.event_shape:
        return implicit_point(x, components)
    return implicit_point(x.unsqueeze(-1), components).squeeze(-1)


def one_per_component(mixture: Any, sample_shape: torch.Size) -> Tensor:
    """A sample of every component, ``sample_shape + (K,) + batch_shape + event_shape``.

    A component of weight 0 shows a sample of the heaviest one instead of its own: whatever function of it is then
    multiplied by 0 is one of a point of the mixture, and finite.
    """
    component = mixture.component_distribution
    events, batch = len(component.event_shape), len(mixture.batch_shape)
    draw = component.rsample if component.has_rsample else component.sample
    x = draw(sample_shape).movedim(-1 - events, -1 - batch - events)
    log_w = mixture.log_weights.detach().movedim(-1, 0)  # the labels in front of the batch, as in x
    own = torch.arange(log_w.shape[0], device=log_w.device).reshape(-1, *(1,) * batch)
    index = torch.where(log_w == -torch.inf, log_w.argmax(0, keepdim=True), own)
    index = index.reshape(index.shape + (1,) * events).expand(x.shape)
    result: Tensor = x.gather(x.ndim - 1 - batch - events, index)
    return result
