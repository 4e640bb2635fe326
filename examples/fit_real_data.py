"""A Gaussian mixture fitted to the colours of a photograph, by stablekl and by scikit-learn from the same start.

273,280 pixels of the photograph that ships with scikit-learn, as red, green and blue. Then the same colours in other
units, in float32 with an offset of 1e6: one fit does not change, the other gives up.
"""

from __future__ import annotations

import argparse
import time
import warnings

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_sample_image
from sklearn.mixture import GaussianMixture as SklearnMixture
from torch import Tensor

import stablekl
from stablekl.fit import gaussian_mixture

COMPONENTS = 6


def in_sklearn(x: Tensor, start: stablekl.GaussianMixture, kind: str) -> float | str:
    """The log-likelihood of scikit-learn's fit, or how it failed."""
    c = start.component_distribution
    precision = torch.linalg.inv(c.covariance_matrix.double())
    precision = precision if kind == "full" else precision.diagonal(dim1=-2, dim2=-1)
    weights = start.log_weights.double().softmax(-1)
    model = SklearnMixture(
        COMPONENTS,
        covariance_type=kind,
        weights_init=weights.numpy(),
        means_init=c.mean.double().numpy(),
        precisions_init=precision.numpy(),
    )
    try:
        return len(x) * float(model.fit(x.numpy()).score(x.numpy()))
    except ValueError as e:
        return f"ValueError: {str(e)[:60]}..."


def main() -> None:
    """Fit, compare, draw what the components are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="fit_real_data.png", help="where the picture goes")
    out = parser.parse_args().out
    warnings.simplefilter("ignore")  # neither iterates to the end
    image = torch.from_numpy(load_sample_image("china.jpg").copy())
    x = image.reshape(-1, 3).double() / 255

    start = gaussian_mixture(x, COMPONENTS, max_iter=0).mixture
    begin = time.perf_counter()
    fit = gaussian_mixture(x, COMPONENTS, init=start)
    ours = time.perf_counter() - begin
    theirs = in_sklearn(x, start, "full")
    seconds = time.perf_counter() - begin - ours
    print(f"stablekl      {fit.log_likelihood:14.2f}  {ours:5.1f} s, {fit.num_iterations} iterations")
    print(f"scikit-learn  {theirs:14.2f}  {seconds:5.1f} s")

    print("diagonal, in float32 with an offset of 1e6:")
    far = (255 * x + 1e6).float()
    start = gaussian_mixture(far, COMPONENTS, "diag", max_iter=0).mixture
    print(f"stablekl      {gaussian_mixture(far, COMPONENTS, 'diag', init=start).log_likelihood:14.2f}")
    print(f"scikit-learn  {in_sklearn(far, start, 'diag')}")

    means = fit.mixture.component_distribution.mean.clamp(0, 1)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.3), layout="constrained")
    axes[0].imshow(image)
    axes[1].imshow(means[fit.responsibilities.argmax(-1)].reshape(image.shape))
    axes[1].set_title("the mean colour of each pixel's component", fontsize=9)
    for panel in axes:
        panel.axis("off")
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    main()
