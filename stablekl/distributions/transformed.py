r"""KL divergence of transformed distributions: that of the bases, if the transforms lose nothing.

An injective transform common to both leaves the divergence as it is. One that maps several points to the same, as
taking absolute values does, lowers it; torch returns that of the bases anyway: 18 for the absolute values of N(3, 1)
and of N(-3, 1), which are the same distribution. The absolute value of a normal variable is one half of a mixture of
two,

.. math:: KL(|X_p| \,\|\, |X_q|) = KL\left(\tfrac12 N(\mu_p, \sigma_p^2) + \tfrac12 N(-\mu_p, \sigma_p^2) \,\middle\|\,
          \tfrac12 N(\mu_q, \sigma_q^2) + \tfrac12 N(-\mu_q, \sigma_q^2)\right),

since both densities on the right are symmetric; mixtures have a rule.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import (
    AbsTransform,
    Categorical,
    Distribution,
    MixtureSameFamily,
    Normal,
    TransformedDistribution,
)

from ..registry import kl_divergence, register_hardened

__all__ = ["kl_transformed_transformed"]


def _folded(p: Normal) -> MixtureSameFamily:
    """A symmetric mixture of two, in the order that the same distribution always has."""
    size = p.loc.abs()
    components = Normal(torch.stack([-size, size], -1), torch.stack([p.scale, p.scale], -1), validate_args=False)
    return MixtureSameFamily(Categorical(torch.full_like(components.loc, 0.5)), components, validate_args=False)


@register_hardened(TransformedDistribution, TransformedDistribution)
def kl_transformed_transformed(p: TransformedDistribution, q: TransformedDistribution) -> Tensor:
    """KL between two distributions sent through the same transforms; see the module.

    Raises:
        NotImplementedError: the transforms differ, or are not injective (but for the absolute value of a Normal).
        ValueError: the event shapes differ.
    """
    if p.event_shape != q.event_shape:
        raise ValueError(
            f"KL needs distributions over the same space, but the event shapes are {tuple(p.event_shape)} and "
            f"{tuple(q.event_shape)}"
        )
    if p.transforms != q.transforms:
        raise NotImplementedError(
            f"no KL rule for {type(p).__name__} against {type(q).__name__} through different transforms, "
            f"{p.transforms} and {q.transforms}: only where they are the same it is that of the bases"
        )
    bases: tuple[Distribution, Distribution] = (p.base_dist, q.base_dist)
    lossy = [t for t in p.transforms if not t.bijective]
    if not lossy:
        return kl_divergence(*bases)
    only_abs = len(p.transforms) == 1 and isinstance(lossy[0], AbsTransform)
    if only_abs and isinstance(bases[0], Normal) and isinstance(bases[1], Normal):
        return kl_divergence(_folded(bases[0]), _folded(bases[1]))
    raise NotImplementedError(
        f"no KL rule through {lossy[0]}, which maps several points to one: that of the bases would only be an upper "
        "bound. Estimate it from samples, or fold the base's density by hand"
    )
