"""What p is sampled from, itself or the components of a mixture: by random numbers, or by given ones."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, TransformedDistribution
from torch.distributions import MixtureSameFamily as TorchMixtureSameFamily

from ..distributions._base import moved
from ..distributions._gaussian import Gaussian, as_gaussian, lower_factor
from ..mixtures.mixture_same_family import MixtureSameFamily
from ..mixtures.operations import gaussian_distribution
from ..mixtures.weights import log_weights_of
from .sharing import device_of

__all__ = ["FamilyPart", "GaussianPart", "Part", "Points", "lifted", "parts_of"]


class Points(NamedTuple):
    """Samples of a part.

    Attributes:
        x: ``(n,) + batch_shape + event_shape``.
        mirrored: the same at the other side of the mean, if that is as likely.
        standard: coordinates of mean 0 and variance 1, ``(n,) + batch_shape + (D,)``, if there are such.
    """

    x: Tensor
    mirrored: Tensor | None
    standard: Tensor | None


def lifted(p: Distribution) -> Distribution:
    """The same distribution in float64, of torch's and our classes; others are as they are.

    A sample's log-ratio is a difference; in float32 it is off by rounding errors that do not average out where the
    parameters' own rounding (of a factorised covariance, say) makes them.
    """
    if not _known(p):
        return p
    gaussian = as_gaussian(p)
    if gaussian is not None:
        return _wide_gaussian(gaussian, p)
    if isinstance(p, TorchMixtureSameFamily):
        inner = as_gaussian(p.component_distribution)
        if inner is not None:
            weights = Categorical(logits=log_weights_of(p, torch.float64), validate_args=False)
            return MixtureSameFamily(weights, _wide_gaussian(inner, p.component_distribution), validate_args=False)
    return moved(p, torch.float64)


def _known(p: Distribution) -> bool:
    """Whether all that the distribution is made of is in its tensors, and not in a network, say."""
    return (
        type(p).__module__.startswith(("torch.distributions.", "stablekl."))
        and not isinstance(p, TransformedDistribution)
        and all(_known(item) for item in p.__dict__.values() if isinstance(item, Distribution))
    )


def _wide_gaussian(gaussian: Gaussian, p: Distribution) -> Distribution:
    wide = gaussian_distribution(gaussian.to(torch.float64), False, scalar=not p.event_shape)
    return wide if wide.batch_shape == p.batch_shape else wide.expand(p.batch_shape)


class Part:
    """One of the distributions whose weighted sum is p.

    Args:
        weight: float64, of the batch shape of p.
        share: of the samples, the same for all batch elements.
        batch_shape: of p.
    """

    def __init__(self, weight: Tensor, share: float, batch_shape: torch.Size) -> None:
        """Keep them."""
        self.weight, self.share, self.batch_shape = weight, share, batch_shape

    @property
    def dimension(self) -> int:
        """Of the uniform numbers that a sample takes."""
        raise NotImplementedError

    def random(self, n: int) -> Points:
        """Samples from torch's generators."""
        raise NotImplementedError

    def at(self, uniform: Tensor) -> Tensor:
        """Samples at points of the unit cube, ``(n, dimension)``: the same ones for all batch elements."""
        raise NotImplementedError


class GaussianPart(Part):
    """Mean plus factor times standard normals: mirrored, at quantiles, and with controls.

    Args:
        weight: as in `Part`.
        share: as in `Part`.
        batch_shape: as in `Part`.
        gaussian: the parameters, float64.
        scalar: whether events have no dimension.
    """

    def __init__(
        self, weight: Tensor, share: float, batch_shape: torch.Size, gaussian: Gaussian, *, scalar: bool
    ) -> None:
        """Factorise."""
        super().__init__(weight, share, batch_shape)
        self._scalar = scalar
        self._loc = gaussian.loc
        self._diagonal: Tensor | None = None
        self._factor: Tensor | None = None
        if gaussian.kind == "scale_diag":
            self._diagonal = gaussian.scale
        elif gaussian.cov_factor is not None:
            # D + r normals rather than a D x D factor
            self._diagonal, self._factor = gaussian.scale.sqrt(), gaussian.cov_factor
        else:
            self._factor = lower_factor(gaussian)

    @property
    def dimension(self) -> int:
        """Of the standard normals."""
        d = self._loc.shape[-1]
        return d + self._factor.shape[-1] if self._diagonal is not None and self._factor is not None else d

    def _move(self, z: Tensor) -> Tensor:
        """Factor times z."""
        d = self._loc.shape[-1]
        moved = torch.zeros((), dtype=z.dtype, device=z.device)
        if self._diagonal is not None:
            moved = self._diagonal * z[..., :d]
            z = z[..., d:]
        if self._factor is not None:
            # the samples as columns: matmul would copy the factor for each of them
            moved = moved + (self._factor @ z.movedim(0, -1)).movedim(-1, 0)
        return moved

    def _event(self, x: Tensor) -> Tensor:
        return x.squeeze(-1) if self._scalar else x

    def random(self, n: int) -> Points:
        """Samples, those mirrored at the mean, and the standard normals they are made of."""
        z = torch.randn(n, *self.batch_shape, self.dimension, dtype=torch.float64, device=self._loc.device)
        shift = self._move(z)
        return Points(self._event(self._loc + shift), self._event(self._loc - shift), z)

    def at(self, uniform: Tensor) -> Tensor:
        """Mean plus factor times the normal quantiles."""
        z = torch.special.ndtri(uniform).reshape(len(uniform), *(1,) * len(self.batch_shape), -1)
        return self._event(self._loc + self._move(z))


class FamilyPart(Part):
    """Any distribution, or the k-th component of a mixture.

    Args:
        weight: as in `Part`.
        share: as in `Part`.
        batch_shape: as in `Part`.
        distribution: p, or the components.
        component: k, or None for p itself.
    """

    def __init__(
        self,
        weight: Tensor,
        share: float,
        batch_shape: torch.Size,
        distribution: Distribution,
        component: int | None = None,
    ) -> None:
        """Find the moments, if there are any."""
        super().__init__(weight, share, batch_shape)
        self._all, self._k = distribution, component
        self._moments = self._mean_and_deviation()

    def _chosen(self, x: Tensor) -> Tensor:
        return x if self._k is None else x.select(-1 - len(self._all.event_shape), self._k)

    def _mean_and_deviation(self) -> tuple[Tensor, Tensor] | None:
        try:
            mean, variance = self._chosen(self._all.mean), self._chosen(self._all.variance)
        except (NotImplementedError, AttributeError):
            return None
        fine = mean.isfinite().all() & variance.isfinite().all() & (variance > 0).all()
        return (mean, variance.sqrt()) if bool(fine) else None

    @property
    def has_moments(self) -> bool:
        """Whether mean and variance are known and finite."""
        return self._moments is not None

    @property
    def dimension(self) -> int:
        """Numbers in an event."""
        return math.prod(self._all.event_shape)

    def random(self, n: int) -> Points:
        """Samples, and these standardised."""
        x = self._chosen(self._all.sample(torch.Size((n,))))
        standard = None
        if self._moments is not None:
            mean, deviation = self._moments
            standard = ((x - mean) / deviation).double().reshape(n, *self.batch_shape, -1)
        return Points(x, None, standard)

    def at(self, uniform: Tensor) -> Tensor:
        """Quantiles.

        Raises:
            ValueError: the family has none.
        """
        base = self._all
        while isinstance(base, Independent):
            base = base.base_dist
        shape = (len(uniform), *(1,) * len(self._all.batch_shape), *self._all.event_shape)
        try:
            if base.event_shape:
                raise NotImplementedError
            x: Tensor = base.icdf(uniform.reshape(shape))
        except NotImplementedError as error:
            name = type(base).__name__
            raise ValueError(
                f"Sobol points are put through quantile functions, and {name} with events of shape "
                f"{tuple(base.event_shape)} has none that torch knows: Gaussians, mixtures of Gaussians with "
                "stratified=True, and families with icdf, Independent ones too, have. Use points='random'"
            ) from error
        return self._chosen(x)


def parts_of(p: Distribution, original: Distribution, stratified: bool) -> list[Part]:
    """What to sample.

    Args:
        p: in the precision to work in.
        original: as it was given, whose weights are read.
        stratified: of a mixture, every component on its own, in proportion to the largest weight it has in the batch.
    """
    batch = torch.Size(p.batch_shape)
    if not (stratified and isinstance(p, TorchMixtureSameFamily)):
        gaussian = as_gaussian(p)
        if gaussian is None:
            return [FamilyPart(torch.ones((), dtype=torch.float64, device=device_of(p)), 1.0, batch, p)]
        one = torch.ones((), dtype=torch.float64, device=gaussian.loc.device)
        return [GaussianPart(one, 1.0, batch, gaussian.to(torch.float64), scalar=not p.event_shape)]
    weights = log_weights_of(original, torch.float64).exp()  # type: ignore[arg-type]
    weights = weights.expand(*batch, weights.shape[-1])
    most = weights.reshape(-1, weights.shape[-1]).amax(0)
    shares = (most / most.sum()).tolist()
    component = p.component_distribution
    gaussian = as_gaussian(component)
    found: list[Part] = []
    for k, share in enumerate(shares):
        if share > 0:
            if gaussian is None:
                found.append(FamilyPart(weights[..., k], share, batch, component, k))
            else:
                chosen = _component(gaussian.to(torch.float64), component.batch_shape, k)
                found.append(GaussianPart(weights[..., k], share, batch, chosen, scalar=not p.event_shape))
    return found


def _component(gaussian: Gaussian, batch_shape: torch.Size, k: int) -> Gaussian:
    """The k-th along the last batch dimension."""

    def chosen(x: Tensor, events: int) -> Tensor:
        return x.expand(*batch_shape, *x.shape[x.ndim - events :]).select(-1 - events, k)

    events = 1 if gaussian.kind in ("scale_diag", "low_rank") else 2
    factor = None if gaussian.cov_factor is None else chosen(gaussian.cov_factor, 2)
    return Gaussian(gaussian.kind, chosen(gaussian.loc, 1), chosen(gaussian.scale, events), factor)
