"""The losses as modules, with torch.nn's ``reduction``: "mean" (over rows, those of a mask if any), "sum" or "none"."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..estimators.log_ratio import Estimator
from ._reduction import Reduction, check_reduction, reduced
from .categorical import categorical_kl, grid_kl_loss
from .gaussian import gaussian_kl_loss
from .mixture import mixture_nll_loss
from .penalty import kl_penalty

__all__ = ["CategoricalKLLoss", "GaussianKLLoss", "GridKLLoss", "KLPenalty", "MixtureNLLLoss"]


class _Reducing(nn.Module):
    """A module with a reduction."""

    def __init__(self, reduction: Reduction = "mean") -> None:
        """Check the reduction."""
        super().__init__()
        check_reduction(reduction)
        self.reduction: Reduction = reduction

    def extra_repr(self) -> str:
        """What is printed."""
        return f"reduction={self.reduction!r}"


class GaussianKLLoss(_Reducing):
    """`gaussian_kl_loss`, reduced.

    Args:
        reduction: "mean" over rows, "sum" or "none".

    Example:
        >>> import torch
        >>> from stablekl.losses import GaussianKLLoss
        >>> print(GaussianKLLoss()(torch.ones(8, 2), torch.zeros(8, 2)))
        tensor(1.)
    """

    def forward(self, mu: Tensor, logvar: Tensor, mu_q: Tensor | float = 0.0, logvar_q: Tensor | float = 0.0) -> Tensor:
        """The reduced loss; shapes as for `gaussian_kl_loss`."""
        return reduced(gaussian_kl_loss(mu, logvar, mu_q, logvar_q), self.reduction)


class CategoricalKLLoss(_Reducing):
    """`categorical_kl`, reduced.

    Args:
        reduction: "mean" over rows, "sum" or "none".
    """

    def forward(self, logits_p: Tensor, logits_q: Tensor) -> Tensor:
        """The reduced loss; shapes as for `categorical_kl`."""
        return categorical_kl(logits_p, logits_q, reduction=self.reduction)


class GridKLLoss(_Reducing):
    """`grid_kl_loss`, reduced over whatever stands before the grid.

    Args:
        dx: the distance of the points, or the widths of the cells.
        normalized: whether the log-densities are those of distributions.
        reduction: "mean" over rows, "sum" or "none".
    """

    dx: Tensor

    def __init__(self, dx: Tensor | float, normalized: bool = False, reduction: Reduction = "mean") -> None:
        """Keep the grid."""
        super().__init__(reduction)
        self.register_buffer("dx", torch.as_tensor(dx, dtype=None if isinstance(dx, Tensor) else torch.float64))
        self.normalized = normalized

    def forward(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """The reduced loss; shapes as for `grid_kl_loss`."""
        return reduced(grid_kl_loss(log_q, log_p, self.dx.to(log_q.dtype), self.normalized), self.reduction)


class KLPenalty(_Reducing):
    """`kl_penalty`, reduced over the samples of the mask.

    Args:
        estimator: "k1", "k2" or "k3".
        reduction: "mean" over samples, "sum" or "none".
    """

    def __init__(self, estimator: Estimator = "k1", reduction: Reduction = "mean") -> None:
        """Keep the estimator."""
        super().__init__(reduction)
        self.estimator: Estimator = estimator

    def forward(self, logp: Tensor, logq: Tensor, mask: Tensor | None = None) -> Tensor:
        """The reduced penalty; shapes as for `kl_penalty`."""
        return reduced(kl_penalty(logp, logq, self.estimator, mask), self.reduction, mask)

    def extra_repr(self) -> str:
        """What is printed."""
        return f"{self.estimator!r}, {super().extra_repr()}"


class MixtureNLLLoss(_Reducing):
    """`mixture_nll_loss`, reduced, with a floor relative to the scale of the data.

    Args:
        data_scale: standard deviation of the targets, a number or one for each dimension; None for no floor.
        relative_floor: the floor of the components' scales in its units.
        reduction: "mean" over rows, "sum" or "none".

    Raises:
        ValueError: a scale or floor that is not positive and finite, or an unknown reduction.

    Example:
        >>> import torch
        >>> from stablekl.losses import MixtureNLLLoss
        >>> y = torch.tensor([0.0, 1.0, 2.0, 3.0])
        >>> loss = MixtureNLLLoss(data_scale=y.std())
        >>> print(loss(y, torch.zeros(4, 2), y.unsqueeze(-1).expand(4, 2), log_scale=torch.full((4, 2), -40.0)))
        tensor(-5.7331)
    """

    min_scale: Tensor | None

    def __init__(
        self,
        data_scale: Tensor | float | None = None,
        relative_floor: float = 1e-3,
        reduction: Reduction = "mean",
    ) -> None:
        """Keep the floor as a buffer."""
        super().__init__(reduction)
        floor = None if data_scale is None else relative_floor * torch.as_tensor(data_scale).detach()
        if floor is not None and not bool(((floor > 0) & floor.isfinite()).all()):
            raise ValueError(
                f"data_scale and relative_floor must be positive and finite, got {data_scale} and {relative_floor}: a "
                "dimension in which all targets are the same has no scale, and no density"
            )
        self.register_buffer("min_scale", floor)

    def forward(
        self,
        target: Tensor,
        logits: Tensor,
        loc: Tensor,
        *,
        scale: Tensor | None = None,
        log_scale: Tensor | None = None,
        scale_tril: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The reduced loss; shapes as for `mixture_nll_loss`."""
        values = mixture_nll_loss(
            target,
            logits,
            loc,
            scale=scale,
            log_scale=log_scale,
            scale_tril=scale_tril,
            mask=mask,
            min_scale=self.min_scale,
        )
        return reduced(values, self.reduction, mask)
