"""A point inside the support of any torch distribution."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Distribution, biject_to

__all__ = ["interior_point"]


def interior_point(component: Distribution, like: Tensor) -> Tensor:
    """A point inside the support, one for each batch element, ``batch_shape + event_shape``.

    For evaluating, where a value lies outside, a formula whose result is then discarded: there it may raise, and its
    gradient may be NaN, which 0 does not mask. Drawing a sample instead would disturb the state of the generator.

    Args:
        component: any distribution; one whose support is unknown or unusual gets a point of zeros.
        like: gives dtype and device.
    """
    shape = component.batch_shape + component.event_shape
    zeros = like.new_zeros(shape, dtype=torch.promote_types(like.dtype, torch.float16))
    try:
        support = component.support
        to_support = biject_to(support)
    except NotImplementedError:  # supports of integers have no bijection
        return _lattice_point(component, zeros)
    point: Tensor = to_support(zeros.new_zeros(to_support.inverse_shape(shape)))
    return point


def _lattice_point(component: Distribution, zeros: Tensor) -> Tensor:
    """Zeros, ones, or everything in the first category: one of them belongs to every discrete family of torch's."""
    try:
        support = component.support
    except NotImplementedError:
        return zeros
    if support is None:
        return zeros
    point = zeros
    total = getattr(component, "total_count", 1)
    first = torch.zeros_like(zeros)
    if component.event_shape:
        first[..., 0] = total
    for candidate in (torch.ones_like(zeros), first):
        inside = support.check(point)
        inside = inside.reshape(inside.shape + (1,) * (zeros.ndim - inside.ndim))
        point = torch.where(inside, point, candidate)
    return point
