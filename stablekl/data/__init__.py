"""A small real data set that ships with the package: Fisher's iris."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import torch
from torch import Tensor

__all__ = ["load_iris"]


def load_iris() -> tuple[Tensor, tuple[str, ...]]:
    """The measurements of 150 iris flowers, 50 of each of three species, in Fisher's order.

    Setosa comes first, then versicolor, then virginica. Setosa stands apart from the other two, which
    overlap, so one Gaussian is a poor description and a mixture of three a good one. The numbers are those
    of the paper (as in R's ``iris``; the copy of the UCI repository differs in samples 35 and 38).
    Many flowers share a measurement, since Fisher gives millimetres.

    Returns:
        The measurements in centimetres, float64, shape ``(150, 4)``, and the names of the four columns.

    References:
        R. A. Fisher, "The use of multiple measurements in taxonomic problems", Annals of Eugenics 7(2),
        179-188, 1936. https://doi.org/10.1111/j.1469-1809.1936.tb02137.x

    Example:
        >>> x, columns = load_iris()
        >>> x.shape, columns[2]
        (torch.Size([150, 4]), 'petal length (cm)')
    """
    text = files(__name__).joinpath("iris.csv").read_text(encoding="ascii").splitlines()
    return torch.from_numpy(np.loadtxt(text[1:], delimiter=",", ndmin=2)), tuple(text[0].split(","))
