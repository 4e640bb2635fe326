r"""KL divergences to and from a target, whichever way it is known: a distribution, samples, a log-density, or a grid.

=====================  =======================================  ========================================
the target is          forward, KL(target || q)                 reverse, KL(q || target)
=====================  =======================================  ========================================
a distribution         the KL rule, or its samples              the KL rule, or samples of q
samples                - mean log q, up to the target's         not defined: nothing is known between
                       entropy                                  them
a log-density          importance-weighted samples of q         samples of q
on a `Grid`            the sum of p (log p - log q) dx          the divergence on the grid
=====================  =======================================  ========================================

Forward is mode-covering: a Gaussian that minimises it has the target's mean and covariance. Reverse is mode-seeking.

**Samples of q** are reparameterised, so that the gradient passes through them. Of a mixture every component is sampled,
and weighted by its weight: nothing is left to the choice of components, which is half the variance where they are
apart, and has no pathwise gradient. By default the parameters of log q are held still ("sticking the landing"): their
score has mean zero and is noise, all there is of it where q fits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions import MixtureSameFamily as TorchMixtureSameFamily

from ..distributions._base import mapped
from ..mixtures.weights import log_weights_of
from ..registry import kl_divergence
from ..special import logsumexp
from .categorical import grid_kl_loss

__all__ = ["Grid", "LogDensity", "Target", "elbo_loss", "forward_kl_loss", "reverse_kl_loss"]

LogDensity = Callable[[Tensor], Tensor]


class Grid(NamedTuple):
    """A density on a line, known at points up to a factor.

    Attributes:
        x: the points, ``(N,)``.
        log_density: there, ``(N,)``.
        dx: their distance, or the widths of the cells.
    """

    x: Tensor
    log_density: Tensor
    dx: Tensor | float

    def normalized(self) -> Tensor:
        """Log-density that integrates to one over the grid."""
        log_dx = torch.log(torch.as_tensor(self.dx, dtype=self.log_density.dtype, device=self.log_density.device))
        return self.log_density - logsumexp(self.log_density + log_dx, -1, keepdim=True)


Target = Distribution | Tensor | Grid | LogDensity


def _on_grid(q: Distribution, grid: Grid) -> Tensor:
    """Log q at the points, ``batch_shape + (N,)``."""
    if q.event_shape.numel() != 1:
        raise ValueError(f"a grid is on a line, and q has event_shape {tuple(q.event_shape)}")
    if grid.x.numel() != grid.log_density.shape[-1]:
        raise ValueError(f"the grid has {grid.x.numel()} points, and log-densities at {grid.log_density.shape[-1]}")
    points = grid.x.reshape(-1, *(1,) * (len(q.batch_shape) + len(q.event_shape)))
    return q.log_prob(points.expand(-1, *q.batch_shape, *q.event_shape)).movedim(0, -1)


def _check_number(num_samples: int) -> None:
    """ValueError unless there are some."""
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")


def _draws(q: Distribution, num_samples: int) -> tuple[Tensor, Tensor]:
    """Points of q, ``(S,) + batch_shape + event_shape``, and their weights, which add up to one over S."""
    _check_number(num_samples)
    if not isinstance(q, TorchMixtureSameFamily):
        if not q.has_rsample:
            raise ValueError(
                f"{type(q).__name__} has no reparameterised samples (has_rsample), for the gradient of a mean to pass "
                "through. Use a family that has, or kl_penalty on its samples: the score-function gradient"
            )
        x = q.rsample((num_samples,))
        return x, x.new_full((num_samples, *q.batch_shape), 1 / num_samples)
    component = q.component_distribution
    if not component.has_rsample:
        raise ValueError(f"the components, {type(component).__name__}, have no reparameterised samples (has_rsample)")
    x = component.rsample((num_samples,)).movedim(-1 - len(q.event_shape), 0)
    weights = log_weights_of(q, x.dtype).exp().movedim(-1, 0).expand(x.shape[0], *q.batch_shape)
    # a component without weight may be anywhere: its points are those of the likeliest, and meet no 0 * inf
    row = (*q.batch_shape, *(1,) * len(q.event_shape))
    likeliest = weights.argmax(0).reshape(1, 1, *row).expand(1, *x.shape[1:])
    alive = (weights > 0).reshape(x.shape[0], 1, *row)
    x = torch.where(alive, x, x.detach().gather(0, likeliest))
    return x.flatten(0, 1), weights.repeat_interleave(num_samples, 0) / num_samples


def _valued(values: Tensor, rows: torch.Size, name: str) -> Tensor:
    """ValueError unless a function of so many points has given a number for each, and not their sum."""
    if isinstance(values, Tensor) and values.shape != rows:
        raise ValueError(
            f"{name} must return one number for each point, of shape num_samples x batch_shape = {tuple(rows)}, got "
            f"{tuple(values.shape)}. Likely causes: a sum over all dimensions rather than over the data (sum(-1)), or "
            "none over the coordinates of a point"
        )
    return values


def _mean_ratio(q: Distribution, log_density: LogDensity, num_samples: int, sticking_the_landing: bool) -> Tensor:
    """The mean under q of log q - log p."""
    x, weights = _draws(q, num_samples)
    still = mapped(q, Tensor.detach) if sticking_the_landing else q
    log_q = still.log_prob(x)
    return (weights * (log_q - _valued(log_density(x), log_q.shape, "the log-density"))).sum(0)


def forward_kl_loss(q: Distribution, target: Target, *, num_samples: int = 256) -> Tensor:
    r"""KL(target || q), for a q that is to cover the target.

    Args:
        q: the distribution that is trained.
        target: a distribution: by the KL rule, or the mean of log p - log q over its samples where there is none. A
            tensor: samples ``(N,) + batch_shape + event_shape``, for - mean log q, which is the divergence plus the
            target's entropy, a constant. A `Grid`: ``sum p (log p - log q) dx``, p normalised on the grid. A function,
            the log-density up to a constant: by samples of q with the weights p/q, normalised; biased by one part in
            their number, and poor where q misses what p has.
        num_samples: where something is sampled.

    Returns:
        The loss in nats, of q's batch shape; differentiable by q's parameters.

    Raises:
        ValueError: a grid for a q over vectors or of other points than its log-density; samples that are too few or not
            of q's shape; a log-density that is not one number for each point.

    Example:
        >>> import torch, stablekl
        >>> from stablekl.losses import Grid, forward_kl_loss
        >>> two = stablekl.GaussianMixture(probs=torch.tensor([0.5, 0.5]), loc=torch.tensor([[-5.0], [10.0]]),
        ...                                scale_diag=torch.ones(2, 1))
        >>> print(f"{forward_kl_loss(torch.distributions.Normal(0.0, 1.0), two):.3f}")
        30.557
    """
    if isinstance(target, Grid):
        return grid_kl_loss(_on_grid(q, target), target.normalized(), target.dx, normalized=True)
    if isinstance(target, Tensor):
        events = len(q.batch_shape) + len(q.event_shape)
        given = tuple(target.shape)
        fits = target.ndim == 1 + events and all(n in (1, m) for n, m in zip(given[1:], q.batch_shape, strict=False))
        if not fits or given[target.ndim - len(q.event_shape) :] != tuple(q.event_shape):
            raise ValueError(
                "samples must have shape (N,) + batch_shape + event_shape, here (N,) + "
                f"{(*q.batch_shape, *q.event_shape)}; got {given}. For samples that "
                "all of a batch of q share, unsqueeze a dimension of 1"
            )
        if not len(target):
            raise ValueError("there are no samples: target has a first dimension of 0")
        return -q.log_prob(target).mean(0)
    if isinstance(target, Distribution):
        try:
            return kl_divergence(target, q)
        except NotImplementedError:
            _check_number(num_samples)
            x = target.sample((num_samples,))
            missing = len(q.batch_shape) - len(target.batch_shape)
            x = x.reshape(num_samples, *(1,) * missing, *x.shape[1:])
            return (target.log_prob(x) - q.log_prob(x)).mean(0)
    with torch.no_grad():
        x, weights = _draws(q, num_samples)
    log_q = q.log_prob(x)
    log_ratio = _valued(target(x), log_q.shape, "the log-density") - log_q
    with torch.no_grad():
        logits = log_ratio + weights.log()  # -inf for a component without weight
        posterior, normalizer = torch.softmax(logits, 0), torch.logsumexp(logits, 0)
    return (posterior * torch.where(posterior > 0, log_ratio, 0.0)).sum(0) - normalizer


def reverse_kl_loss(
    q: Distribution, target: Target, *, num_samples: int = 64, sticking_the_landing: bool = True
) -> Tensor:
    r"""KL(q || target), for a q that is to settle where the target has mass.

    Args:
        q: the distribution that is trained.
        target: a distribution: by the KL rule, or by samples of q where there is none. A function, the log-density up
            to a constant, which shifts the loss: by samples of q. A `Grid`: both normalised on the grid; beyond it
            nothing is known of the target.
        num_samples: of q; of each component, where it is a mixture.
        sticking_the_landing: leave out of the gradient the score of q, noise of mean zero. What the transforms of a
            TransformedDistribution have as parameters keeps its score: right on average, with the noise.

    Returns:
        The loss in nats, of q's batch shape; differentiable by q's parameters.

    Raises:
        ValueError: samples as a target; a q without reparameterised samples; a grid for a q over vectors; a log-density
            that is not one number for each point.

    Example:
        >>> import torch
        >>> from stablekl.losses import reverse_kl_loss
        >>> q = torch.distributions.Normal(torch.zeros(2), 1.0)
        >>> print(reverse_kl_loss(q, torch.distributions.Normal(1.0, 1.0)))
        tensor([0.5000, 0.5000])
    """
    if isinstance(target, Grid):
        return grid_kl_loss(target.log_density, _on_grid(q, target), target.dx)
    if isinstance(target, Tensor):
        raise ValueError(
            "the reverse divergence needs the target's density, and samples have none: use forward_kl_loss, or fit a "
            "density to them first (a GaussianMixture) and pass that"
        )
    if isinstance(target, Distribution):
        try:
            return kl_divergence(q, target)
        except NotImplementedError:
            target = target.log_prob
    return _mean_ratio(q, target, num_samples, sticking_the_landing)


def elbo_loss(
    q: Distribution,
    log_likelihood: LogDensity,
    prior: Distribution | LogDensity,
    *,
    num_samples: int = 16,
    sticking_the_landing: bool = True,
) -> Tensor:
    r"""Negative evidence lower bound, :math:`KL(q \| prior) - E_q \log p(data | z)`.

    The first term is the KL rule where there is one, mixtures included; only the second is noise then.

    Args:
        q: the variational posterior.
        log_likelihood: of the data given z; takes ``(S,) + batch_shape + event_shape`` and returns
            ``(S,) + batch_shape``.
        prior: a distribution, or its log-density.
        num_samples: of q; of each component, where it is a mixture.
        sticking_the_landing: where the first term is sampled, leave the score of q out of its gradient.

    Returns:
        The loss in nats, of q's batch shape.

    Raises:
        ValueError: a q without reparameterised samples; a log-likelihood or log-density that is not one number for each
            point.

    Example:
        >>> import torch
        >>> from torch.distributions import Normal
        >>> from stablekl.losses import elbo_loss
        >>> q = Normal(torch.tensor(0.5), torch.tensor(0.5).sqrt())  # the posterior of one observation at 1
        >>> def log_likelihood(z):
        ...     return Normal(z, 1.0).log_prob(torch.tensor(1.0))
        >>> loss = elbo_loss(q, log_likelihood, Normal(0.0, 1.0), num_samples=10_000)
        >>> evidence = Normal(0.0, torch.tensor(2.0).sqrt()).log_prob(torch.tensor(1.0))
        >>> bool((loss + evidence).abs() < 0.03)
        True
    """
    if isinstance(prior, Distribution):
        try:
            divergence = kl_divergence(q, prior)
        except NotImplementedError:
            prior = prior.log_prob
        else:
            x, weights = _draws(q, num_samples)
            return divergence - (weights * _valued(log_likelihood(x), weights.shape, "log_likelihood")).sum(0)
    density = prior

    def joint(x: Tensor) -> Tensor:
        rows = x.shape[: x.ndim - len(q.event_shape)]
        return _valued(density(x), rows, "the prior") + _valued(log_likelihood(x), rows, "log_likelihood")

    return _mean_ratio(q, joint, num_samples, sticking_the_landing)
