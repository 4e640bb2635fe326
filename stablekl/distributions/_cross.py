"""KL rules between all Gaussian families: Independent(Normal, 1), full, diagonal and low rank, ours and torch's."""

from __future__ import annotations

from itertools import product
from typing import NoReturn

from torch import Tensor
from torch.distributions import Distribution, Independent
from torch.distributions import Normal as TorchNormal

from ..registry import kl_divergence, register_hardened
from ._gaussian import Gaussian, as_gaussian, gaussian_kl
from .low_rank import LowRankMultivariateNormal
from .multivariate_normal import MultivariateNormal
from .normal import Normal

__all__ = ["kl_gaussian_gaussian", "kl_independent_independent"]


def _read(distribution: Distribution) -> Gaussian:
    gaussian = as_gaussian(distribution)
    if gaussian is None:
        raise NotImplementedError(
            f"no KL rule between a Gaussian and {distribution}: of the Independent distributions only "
            "Independent(Normal, 1) is a Gaussian over vectors"
        )
    return gaussian


def _raise_event_shapes(p: Distribution, q: Distribution) -> NoReturn:
    raise ValueError(
        f"KL needs distributions over the same space, but the event shapes are {tuple(p.event_shape)} and "
        f"{tuple(q.event_shape)}. If the last batch dimension of a Normal holds the coordinates of one vector, wrap "
        "it: Independent(Normal(loc, scale), 1)."
    )


def kl_gaussian_gaussian(p: Distribution, q: Distribution) -> Tensor:
    """KL between Gaussians over vectors of one length D, each of any family; batch shapes broadcast.

    A scalar Normal stands for a vector of length 1. Formulas and accuracy: `_gaussian`, `_mvn_kl`, `_low_rank_kl` and
    `normal`.

    Raises:
        ValueError: the event shapes differ.
        NotImplementedError: an Independent that is no Gaussian over vectors.
    """
    g_p, g_q = _read(p), _read(q)
    if g_p.loc.shape[-1] != g_q.loc.shape[-1]:
        _raise_event_shapes(p, q)
    return gaussian_kl(g_p, g_q)


@register_hardened(Independent, Independent)
def kl_independent_independent(p: Independent[Distribution], q: Independent[Distribution]) -> Tensor:
    """KL between products of independent distributions: the sum over the reinterpreted dimensions.

    Raises:
        ValueError: the event shapes differ.
        NotImplementedError: the two reinterpret different numbers of batch dimensions.
    """
    n = p.reinterpreted_batch_ndims
    if n != q.reinterpreted_batch_ndims:
        raise NotImplementedError(
            f"Independent reinterprets {n} batch dimensions in p and {q.reinterpreted_batch_ndims} in q"
        )
    if p.event_shape != q.event_shape:  # they would broadcast, and a coordinate count several times
        _raise_event_shapes(p, q)
    if n == 1 and isinstance(p.base_dist, TorchNormal) and isinstance(q.base_dist, TorchNormal):
        return gaussian_kl(_read(p), _read(q))  # rounded once, after the sum, in half precision
    result = kl_divergence(p.base_dist, q.base_dist)
    return result.sum(tuple(range(-n, 0))) if n else result


_FAMILIES: tuple[type[Distribution], ...] = (Normal, Independent, MultivariateNormal, LowRankMultivariateNormal)

for _p, _q in product(_FAMILIES, repeat=2):
    if (_p, _q) not in ((Normal, Normal), (Independent, Independent)):
        register_hardened(_p, _q)(kl_gaussian_gaussian)
