r"""KL penalty of a policy against a reference, from the log-probabilities of its own samples.

With x ~ p and logr = log q(x) - log p(x),

====  ===================  ==========================================================================
k1    -logr                unbiased; negative for some samples
k2    logr^2 / 2           never negative; biased by terms of third order
k3    e^logr - 1 - logr    never negative and unbiased; its variance is that of q/p
====  ===================  ==========================================================================

(J. Schulman, "Approximating KL divergence", 2020, http://joschu.net/blog/kl-approx.html). **The gradient is another
matter.** Samples of a policy are not reparameterised: the distribution that they come from depends on its parameters,
and their log-probabilities do. Differentiating k1 gives the mean of the score, which is zero; differentiating k3 gives
the gradient of the other divergence, KL(q || p). The one of KL(p || q) is

.. math:: E_p\bigl[(\log p - \log q)\,\nabla\log p\bigr] - E_p[\nabla\log q],

and `kl_penalty` has it for every k, with the value of the k asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._autograd import is_eager
from ..estimators.log_ratio import Estimator, check_estimator, of_log_ratio
from ._reduction import check_mask, check_rows, together

__all__ = ["kl_penalty"]


def _check(logp: Tensor, logq: Tensor) -> None:
    """ValueError where no sample of p can be."""
    if not is_eager(logp, logq):
        return
    wrong = logp.isnan() | logq.isnan() | logp.isinf() | (logq == torch.inf)
    if bool(wrong.any()):
        index = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"logp{list(index)} is {float(logp[index])} and logq{list(index)} is {float(logq[index])}: of samples of "
            "p, logp is a number, and logq a number or -inf. Likely causes: padding, which mask=... leaves out, or a "
            "sample that did not come from p"
        )


def kl_penalty(
    logp: Tensor,
    logq: Tensor,
    estimator: Estimator = "k1",
    mask: Tensor | None = None,
    *,
    reparameterized: bool = False,
) -> Tensor:
    r"""Estimates of KL(p || q) from samples of p, each with the value of k1, k2 or k3 and the gradient of KL(p || q).

    Nothing is clamped: where k3 or k2 overflows it is inf, and the gradient, which does not contain e^logr, is finite.
    A sample that q makes impossible is inf, and has no gradient, unless it is reparameterised.

    Args:
        logp: log-probabilities of the samples under p, the policy that they were drawn from.
        logq: those under q, the reference; of the same shape, or one that broadcasts to it.
        estimator: "k1", "k2" or "k3"; with logr = logq - logp: -logr, logr^2/2, expm1(logr) - logr.
        mask: True where there is a sample. What is elsewhere, -inf or NaN, is never looked at: 0, with a gradient of 0.
        reparameterized: the samples are differentiable functions of p's parameters, through which ``logp`` and ``logq``
            depend on them: plain derivatives of the value. Otherwise, by default, the score-function gradient.

    Returns:
        The estimate for each sample, of the broadcast shape, in the dtype that the arguments promote to; computed in
        float64 where the device has it, and rounded once.

    Raises:
        ValueError: an unknown estimator; NaN, or a sample that p makes impossible, where the mask does not leave it
            out; a mask that is not boolean; shapes that would pair each sample with each other, (N,) and (N, 1).

    Example:
        >>> import torch
        >>> from stablekl.losses import kl_penalty
        >>> logp, logq = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -100.0])
        >>> print(kl_penalty(logp, logq, "k3"))
        tensor([ 0.1065, 97.0000])
    """
    check_estimator(estimator)
    check_rows("logp of shape", logp.shape, "logq of shape", logq.shape)
    (logp, logq), dtype = together(logp, logq)
    if mask is not None:
        check_mask(mask, logp.shape, "sample")
        logp, logq = torch.where(mask, logp, 0.0), torch.where(mask, logq, 0.0)
    _check(logp, logq)
    if reparameterized:
        return of_log_ratio(logp - logq, estimator).to(dtype)
    d = (logp - logq).detach()
    finite = (torch.where(x.isfinite(), x, 0.0) for x in (logp, logq))
    moving_p, moving_q = (x - x.detach() for x in finite)  # zeros, but for their gradient
    return (of_log_ratio(d, estimator) + (d.nan_to_num(0.0, 0.0, 0.0) * moving_p - moving_q)).to(dtype)
