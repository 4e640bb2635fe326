r"""Gaussian mixtures fitted to samples by maximum likelihood.

**Units do not matter.** The fit of :math:`a x + b` is the transformed fit of x. scikit-learn 1.9 adds 1e-6 to variances
in whatever unit they are, and expands squares: data at an offset of 1e6, or at a scale of 1e-12, are fitted wrongly or
refused.

**Likelihoods of mixtures have no maximum.** A component that shrinks to a point gains without end. A penalty relative
to the covariance of all samples ends that; its default only keeps numbers finite. A component that the penalty alone
holds up is reported as ``collapsed``. Chen and Tan's consistent choice, ``penalty=1 / n**2`` (their a_n = 1/n), is
stronger; it is not the default since it moves healthy components: it costs 1e-4 of the log-likelihood of iris (K = 3),
and a cluster of unit width beside another at a distance of 1e6, n = 1,000, becomes 1,000 times as wide.

References:
    A. P. Dempster, N. M. Laird and D. B. Rubin, "Maximum likelihood from incomplete data via the EM algorithm", Journal
    of the Royal Statistical Society B 39 (1977), 1-38.
    O. Cappe and E. Moulines, "On-line expectation-maximization algorithm for latent data models", Journal of the Royal
    Statistical Society B 71 (2009), 593-613.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from numbers import Integral
from typing import get_args

import torch
from torch import Tensor
from torch.distributions import Distribution

from .._distributed import Processes
from .._progress import Progress
from ..mixtures.components import Components
from ..mixtures.gaussian_mixture import GaussianMixture
from ._model import CovarianceType, Model, components_of, in_units
from ._run import CollapseError, Options, Run, by_weight, from_labels, run
from ._samples import Data, Samples
from ._start import Init, labels_of, nearest, subsample

__all__ = ["FitWarning", "GaussianMixtureFit", "gaussian_mixture"]


class FitWarning(UserWarning):
    """A fit that has not converged, or a component that has collapsed."""


@dataclass(frozen=True)
class GaussianMixtureFit:
    """What `gaussian_mixture` found.

    Attributes:
        mixture: the fitted `GaussianMixture`, its components in order of falling weight, or in that of the
            start that was given.
        covariance_type: as it was asked for.
        history: mean log-density of a sample at the start and after every iteration, float64, the last that of
            ``mixture``, before its parameters are rounded to their dtype. Of stepwise EM, averages over a pass.
        converged: whether the last iteration changed the penalised mean log-density by less than ``tol``.
        num_iterations: iterations, or passes of stepwise EM.
        num_samples: N, of all processes; of weighted samples the sum of the weights.
        collapsed: True for components that only the penalty keeps from a variance of 0 in some direction, ``(K,)``.
        responsibilities: posterior probabilities of the components, ``(N, K)``, of this process's samples; None of a
            stream, whose batches ``mixture.posterior_marginal(batch).probs`` takes.
    """

    mixture: GaussianMixture
    covariance_type: CovarianceType
    history: Tensor
    converged: bool
    num_iterations: int
    num_samples: float
    collapsed: Tensor
    responsibilities: Tensor | None

    @property
    def log_likelihood(self) -> float:
        """Sum of the log-densities of all samples, by weight."""
        return float(self.history[-1]) * self.num_samples

    @property
    def num_parameters(self) -> int:
        """Free parameters of the mixture."""
        k, d = self.mixture.component_distribution.mean.shape
        each = {"full": k * d * (d + 1) // 2, "tied": d * (d + 1) // 2, "diag": k * d, "spherical": k}
        return each[self.covariance_type] + k * d + k - 1

    @property
    def bic(self) -> float:
        """Bayesian information criterion, -2 log-likelihood + parameters times log N; less is better."""
        return -2 * self.log_likelihood + self.num_parameters * math.log(self.num_samples)

    @property
    def aic(self) -> float:
        """Akaike's information criterion, -2 log-likelihood + 2 parameters; less is better."""
        return -2 * self.log_likelihood + 2 * self.num_parameters


def gaussian_mixture(
    x: Data,
    num_components: int,
    covariance_type: CovarianceType = "full",
    *,
    weights: Tensor | None = None,
    init: Init | Tensor | Distribution = "kmeans",
    n_init: int = 1,
    max_iter: int = 100,
    tol: float = 1e-3,
    penalty: float = 1e-20,
    batch_size: int | None = None,
    seed: int = 0,
    distributed: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool | None = None,
) -> GaussianMixtureFit:
    r"""Fit a mixture of K Gaussians to samples by EM.

    In float64 and standard units it maximises

    .. math:: \frac{1}{\sum_i w_i} \sum_i w_i \log p(x_i)
              - a \sum_k [\operatorname{tr}(S_0 \Sigma_k^{-1}) + \log\det \Sigma_k],

    S_0 the covariance of all samples and a the ``penalty``. With the penalty relative to S_0, and every sum about the
    component's mean, units and origin make no difference.

    Args:
        x: samples, ``(N, D)``; or a DataLoader, a list or anything else that yields such batches each time it is
            iterated over, of which two are read for the start and one in an iteration. Of a tuple (samples, labels)
            the samples are taken.
        num_components: K.
        covariance_type: "full", "tied" (one covariance for all), "diag" or "spherical".
        weights: of the samples in a tensor, ``(N,)``; 2 counts as the sample twice, 0 as none.
        init: "kmeans" (k-means++ seeds, then k-means), "k-means++" (seeds alone), "random_from_data", means ``(K, D)``,
            or a mixture of K Gaussians to start from.
        n_init: starts, of which the best end is returned; one with a collapsed component only if all have one.
        max_iter: iterations at most; 0 returns the start.
        tol: mean log-density, in nats, by which an iteration must improve to be followed by another.
        penalty: a above; 0 for plain maximum likelihood.
        batch_size: stepwise EM, which updates the mixture after every so many samples of each process (shuffled if they
            are in a tensor), the n-th time by a step of (n + 1)^-0.7; None for EM on all samples at once. For data that
            are read slowly: 100,000 samples, D = 8, by 10,000, were 0.05 nats from the maximum after one pass (EM
            0.17), 0.005 after two (EM 2e-4), 1e-4 after four (EM 3e-9).
        seed: of the starts. torch's random state is neither used nor changed.
        distributed: where torch.distributed is initialised, x is this process's share of the samples, sums are taken
            over all processes, and all of them, which must all call, get the fit of all samples. False for this process
            alone.
        device: where to compute; None for where the samples are.
        dtype: of the mixture; None for that of the samples. Means of float32 at 1e6 are rounded to 0.06.
        progress: a line on stderr; None for on a terminal, after two seconds.

    Returns:
        A `GaussianMixtureFit`.

    Raises:
        ValueError: samples or weights that are not finite (says which), of a wrong shape or that can be read only once;
            samples that do not span the space (names their rank); fewer samples than components; a component that
            collapses without a penalty; a mixture that leaves the range of ``dtype``; an option out of range.

    Warns:
        FitWarning: ``max_iter`` was reached, or a component has collapsed.

    Accuracy:
        From the same start and in float64 log-likelihoods agree with scikit-learn's to 1e-6 relative, and to 1e-9 where
        the 1e-6 that it adds to variances does not show; samples in float32 are fitted in float64, where its own
        rounding leads it up to 1e-5 away. Parameters do not depend on units, offset, order or shards but for rounding.

    Example:
        >>> import torch
        >>> from stablekl.data import load_iris
        >>> from stablekl.fit import gaussian_mixture
        >>> x, _ = load_iris()
        >>> fit = gaussian_mixture(x, 3, tol=1e-6, max_iter=200)
        >>> print(f"{fit.log_likelihood:.2f} after {fit.num_iterations} iterations")
        -180.19 after 24 iterations
        >>> fit.mixture.mixture_distribution.probs.sort().values
        tensor([...], dtype=torch.float64)
    """
    _check(num_components, covariance_type, init, n_init, max_iter, tol, penalty, batch_size)
    options = Options(max_iter, tol, penalty, batch_size, seed)
    with torch.no_grad():
        samples = Samples(
            x,
            weights,
            common=covariance_type == "spherical",
            full=covariance_type in ("full", "tied"),
            processes=Processes(distributed),
            device=device,
        )
        if samples.count < num_components:
            raise ValueError(f"{num_components} components need as many samples at least, got {samples.count}")
        line = Progress(f"fit of {num_components} components", progress if samples.processes.rank == 0 else False)
        try:
            starts = _starts(samples, num_components, covariance_type, init, n_init, seed)
            best = _best(samples, starts, options, line)
        finally:
            line.close()
    best = by_weight(best) if isinstance(init, str) else best
    _warn(best, options)
    return _result(best, samples, covariance_type, dtype)


def _best(samples: Samples, starts: list[Model], options: Options, line: Progress) -> Run:
    """The best of the runs from every start; without a penalty some may end in a collapse, but not all."""
    found, failure = [], None
    for start in starts:
        try:
            found.append(run(samples, start, options, line))
        except CollapseError as error:
            failure = error
    if failure is not None and not found:
        raise failure
    return max(found, key=_merit)


def _merit(found: Run) -> tuple[bool, float]:
    return not bool(found.collapsed.any()), found.objective


def _starts(
    samples: Samples,
    count: int,
    kind: CovarianceType,
    init: Init | Tensor | Distribution,
    n_init: int,
    seed: int,
) -> list[Model]:
    if isinstance(init, Distribution):
        given = components_of(init, samples.dim)
        if len(given.log_weights) != count:
            raise ValueError(f"the mixture to start from has {len(given.log_weights)} components, not {count}")
        given = Components(*(x.to(samples.centre) for x in given))
        return [in_units(kind, given, samples.centre, samples.unit)]
    sub = subsample(samples, count, seed)
    if isinstance(init, Tensor):
        if init.shape != (count, samples.dim) or not bool(init.isfinite().all()):
            raise ValueError(
                f"means to start from must be finite and of shape {(count, samples.dim)}, got shape {tuple(init.shape)}"
            )
        means = (init.detach().to(samples.centre) - samples.centre) / samples.unit
        every = [nearest(sub.z, means)]
    else:
        every = [labels_of(sub, count, init) for _ in range(n_init)]
    return [from_labels(kind, sub, labels, count, samples.pooled) for labels in every]


def _warn(found: Run, options: Options) -> None:
    if bool(found.collapsed.any()):
        which = found.collapsed.nonzero().flatten().tolist()
        warnings.warn(
            f"components {which} have collapsed onto samples that span fewer dimensions than there are: only the "
            "penalty keeps their variance from 0, and the log-likelihood means little. Fit fewer components, try "
            "n_init=10, or raise penalty (1 / N**2 is consistent).",
            FitWarning,
            stacklevel=3,
        )
    if not found.converged and options.max_iter > 0:
        warnings.warn(
            f"EM has not converged to tol={options.tol:g} in {options.max_iter} iterations: raise max_iter, or go on "
            "from here with init=fit.mixture",
            FitWarning,
            stacklevel=3,
        )


def _result(found: Run, samples: Samples, kind: CovarianceType, dtype: torch.dtype | None) -> GaussianMixtureFit:
    model = found.model
    dtype = samples.dtype if dtype is None else dtype
    loc = samples.centre + samples.unit * model.loc
    if model.triangular:
        tril = (samples.unit.unsqueeze(-1) * model.scale).expand(len(loc), -1, -1)
        _check_range(loc, tril.diagonal(dim1=-2, dim2=-1), dtype)
        mixture = GaussianMixture(model.log_weights.to(dtype), None, loc.to(dtype), scale_tril=tril.to(dtype))
    else:
        diagonal = (samples.unit * model.scale).expand(loc.shape)
        _check_range(loc, diagonal, dtype)
        mixture = GaussianMixture(model.log_weights.to(dtype), None, loc.to(dtype), scale_diag=diagonal.to(dtype))
    history = torch.tensor(found.history, dtype=torch.float64) - float(samples.unit.log().sum())
    return GaussianMixtureFit(
        mixture,
        kind,
        history,
        found.converged,
        found.iterations,
        samples.total,
        found.collapsed,
        found.responsibilities,
    )


def _check_range(loc: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    """ValueError where the parameters, in float64, leave the range of the mixture's dtype."""
    rounded = scale.to(dtype)
    if bool(((rounded > 0) & rounded.isfinite()).all()) and bool(loc.to(dtype).isfinite().all()):
        return
    raise ValueError(
        f"the mixture does not fit into {dtype}: standard deviations are {float(scale.min()):.3g} to "
        f"{float(scale.max()):.3g}, means up to {float(loc.abs().max()):.3g}. Likely causes: a component that has "
        "collapsed onto equal samples, or a unit too small or too large. Pass dtype=torch.float64, or other units"
    )


def _check(
    num_components: int,
    covariance_type: str,
    init: object,
    n_init: int,
    max_iter: int,
    tol: float,
    penalty: float,
    batch_size: int | None,
) -> None:
    if covariance_type not in get_args(CovarianceType):
        names = ", ".join(map(repr, get_args(CovarianceType)))
        raise ValueError(f"covariance_type must be one of {names}, got {covariance_type!r}")
    given = isinstance(init, (Tensor, Distribution))
    if not given and not (isinstance(init, str) and init in get_args(Init)):
        names = ", ".join(map(repr, get_args(Init)))
        raise ValueError(
            f"init must be one of {names}, means of shape (K, D), or a mixture; got "
            f"{init if isinstance(init, str) else type(init)!r}"
        )
    if given and n_init != 1:
        raise ValueError(f"n_init={n_init} fits from the start that init gives would be the same; use n_init=1")
    for name, count in {"num_components": num_components, "n_init": n_init, "max_iter": max_iter}.items():
        if isinstance(count, bool) or not isinstance(count, Integral):
            raise ValueError(f"{name} must be a whole number, got {count!r}")
    whole = {"num_components": num_components, "n_init": n_init, "batch_size": batch_size}
    for name, number in whole.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    for name, value in {"max_iter": max_iter, "tol": tol, "penalty": penalty}.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must not be negative, got {value}")
