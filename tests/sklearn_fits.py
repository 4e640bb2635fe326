"""A mixture's covariances in the form in which scikit-learn takes and returns them."""

from __future__ import annotations

import torch
from torch import Tensor


def precisions(kind: str, covariance: Tensor) -> Tensor:
    """Its ``precisions_init`` for covariances ``(K, D, D)``, in float64."""
    inverse = torch.linalg.inv(covariance.double())
    if kind == "tied":
        return inverse[0]
    diagonal = inverse.diagonal(dim1=-2, dim2=-1)
    return {"full": inverse, "diag": diagonal, "spherical": diagonal[:, 0]}[kind]
