"""How many components: by an information criterion."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, get_args

from ._samples import Data
from .em import FitWarning, GaussianMixtureFit, gaussian_mixture

__all__ = ["Criterion", "Selection", "select"]

Criterion = Literal["bic", "aic"]


class Selection(NamedTuple):
    """What `select` found.

    Attributes:
        best: the fit with the least criterion, of those without a collapsed component.
        num_components: of the best.
        values: the criterion by number of components.
        collapsed: the numbers whose fit had a collapsed component, and were passed over.
    """

    best: GaussianMixtureFit
    num_components: int
    values: dict[int, float]
    collapsed: frozenset[int]


def select(x: Data, candidates: Iterable[int], criterion: Criterion = "bic", **options: Any) -> Selection:
    """Fit mixtures of several numbers of components, and take the one with the least BIC or AIC.

    A component that has collapsed onto a few samples makes any criterion as small as its penalty lets it, and means
    nothing: such fits are passed over, and named in the result.

    Args:
        x: samples, as for `gaussian_mixture`.
        candidates: numbers of components, ``range(1, 10)``.
        criterion: "bic" or "aic".
        options: of `gaussian_mixture`: ``covariance_type``, ``n_init``, ``tol`` and so on.

    Returns:
        A `Selection`.

    Raises:
        ValueError: no candidate, a criterion of another name, whatever `gaussian_mixture` raises, or a collapsed
            component in every fit.

    Warns:
        FitWarning: the best has not converged.

    Example:
        >>> from stablekl.data import load_iris
        >>> from stablekl.fit import select
        >>> found = select(load_iris()[0], range(1, 5), tol=1e-5, max_iter=1000)
        >>> found.num_components
        2
    """
    if criterion not in get_args(Criterion):
        raise ValueError(f"criterion must be 'bic' or 'aic', got {criterion!r}")
    fits: dict[int, GaussianMixtureFit] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FitWarning)
        for k in candidates:
            fits[k] = gaussian_mixture(x, k, **options)
    if not fits:
        raise ValueError("there is no candidate to select from")
    values = {k: fit.bic if criterion == "bic" else fit.aic for k, fit in fits.items()}
    collapsed = frozenset(k for k, fit in fits.items() if bool(fit.collapsed.any()))
    if len(collapsed) == len(fits):
        raise ValueError(
            f"components collapsed in the fit of every candidate, {sorted(fits)}: try fewer components, n_init=10, or "
            "a larger penalty (1 / N**2 is consistent)"
        )
    best = min(fits.keys() - collapsed, key=values.__getitem__)
    if not fits[best].converged:
        warnings.warn(f"the best fit, of {best} components, has not converged: raise max_iter", FitWarning, 2)
    return Selection(fits[best], best, values, collapsed)
