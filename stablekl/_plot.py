"""The demo's picture. The only module that imports matplotlib; `__main__` loads it when asked for a picture."""

from __future__ import annotations

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Ellipse
from torch import Tensor

from .distributions import MultivariateNormal
from .mixtures import GaussianMixture

__all__ = ["draw"]


def _ellipse(mean: Tensor, covariance: Tensor, **style: object) -> Ellipse:
    """The ellipse of two standard deviations."""
    variances, axes = torch.linalg.eigh(covariance)
    width, height = (4 * variances.sqrt()).tolist()
    angle = float(torch.atan2(axes[1, 0], axes[0, 0]).rad2deg())
    return Ellipse(tuple(mean.tolist()), width, height, angle=angle, fill=False, **style)


def draw(
    x: Tensor, names: tuple[str, ...], mixture: GaussianMixture, gaussian: MultivariateNormal, title: str, path: str
) -> None:
    """Data, mixture and Gaussian in the plane of the last two coordinates, as ellipses of two standard deviations.

    Args:
        x: the data, ``(n, D)``.
        names: the names of its columns.
        mixture: the mixture fitted to it.
        gaussian: the Gaussian with the mixture's moments.
        title: what stands above the picture.
        path: where it goes; the suffix says the format.
    """
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    label = mixture.posterior_marginal(x).probs.argmax(-1)
    axes.scatter(x[:, -2], x[:, -1], c=[f"C{int(k)}" for k in label], s=14, alpha=0.6, linewidths=0)
    component = mixture.component_distribution
    if not isinstance(component, MultivariateNormal):
        raise TypeError(f"cannot draw components of type {type(component).__name__}")
    for k, weight in enumerate(mixture.log_weights.exp().tolist()):
        axes.add_patch(
            _ellipse(
                component.loc[k, -2:],
                component.covariance_matrix[k, -2:, -2:],
                color=f"C{k}",
                linewidth=2,
                label=f"component of weight {weight:.2f}",
            )
        )
    axes.add_patch(
        _ellipse(
            gaussian.loc[-2:], gaussian.covariance_matrix[-2:, -2:], color="0.2", linestyle="--", label="one Gaussian"
        )
    )
    axes.set(xlabel=names[-2], ylabel=names[-1], title=title)
    axes.autoscale_view()
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=120)
    plt.close(figure)
