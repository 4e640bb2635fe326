"""Elementary functions without cancellation, with analytic first and second derivatives.

Everything the closed-form rules are sums of: `log1pmx`, `expm1mx`, `bd0`, `log_ratio_bregman` (all of one sign, zero at
one point and accurate next to it), `logsumexp` and `log_ndtr`. Dtypes float16 to float64; every function supports
backward, double backward, forward mode, ``vmap`` and ``torch.compile``. Outside its domain each is NaN.

Two roads to a value. float32 on a CPU is lifted (see `_elementwise`): evaluated in float64 by short formulas and
rounded once. float64, and float32 on other devices ("native"), use a minimax polynomial on a wide interval and the
textbook form outside, where it no longer cancels. The plain functions ``*_value(..., lifted=...)`` are these formulas
without the gradient, for rules that inline them in a pass of their own.

Accuracy on a CPU, eager: the largest error seen, in ulps of the correctly rounded result, subnormal results included. A
search, so a lower bound on the true worst case. Inputs are log-uniform, and ladders of pairs 1 to 2^40 ulps apart.

=================  ===========  ==============  =======  ===========================
function           float32      native float32  float64  evaluations per column
=================  ===========  ==============  =======  ===========================
log1pmx            0.51         2.9             2.5      all float32; 6 million
expm1mx            0.51         3.0             2.6      all float32; 6 million
log_ratio_bregman  0.58         3.8             3.6      8, 16 and 38 million
bd0                0.56         4.1             4.3      8 million
log_ndtr           0.51         6.3             4.6      all float32; 75,000
logsumexp          0.50         -               2.6      20,000 sums of 8 terms, none cancelling
=================  ===========  ==============  =======  ===========================

float16 and bfloat16 were correctly rounded for every argument, or for 3 million pairs. First derivatives are within 2
ulp and second ones within 3.3 (`log_ndtr`: 3.4 and 6), as long as they are normal numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._autograd import rowwise
from ._elementwise import broadcast_apply, elementwise, horner, is_lifted
from ._fused import fused
from ._normal_tail import log_ndtr_value as log_ndtr_value
from ._normal_tail import normal_log_cdf

__all__ = ["bd0", "expm1mx", "log1pmx", "log_ndtr", "log_ratio_bregman", "logsumexp"]

# (atanh(s) - s)/s^3 as a polynomial in s^2, |s| <= 3/7, that is x = 2s/(1-s) in [-0.6, 1.5]; highest power
# first. mpmath.chebyfit(f, [0, (3/7)^2], 6 or 12) at 50 digits: absolute error 3e-9 and 2e-17, of which
# log1pmx sees a tenth. Used for -0.6 < x < 1: a narrower interval needs fewer terms, but log1p(x) - x still
# cancels just outside it (8 ulp at the ends of (-0.3, 0.45)).
_ATANH_CENTRE, _ATANH_REACH = 0.2, 0.8
# fmt: off
_ATANH = {
    torch.float32: (
        0.12836656903, 0.079165537412, 0.11228274835, 0.14280546023, 0.20000082331, 0.33333333123,
    ),
    torch.float64: (
        0.11974262895067175, -0.0027016372512737754, 0.06160893542716858, 0.05003989026028942,
        0.05913487309275028, 0.06664198430842003, 0.07692435595045058, 0.09090904910246529,
        0.11111111191430766, 0.14285714284919523, 0.2000000000000307, 0.3333333333333333,
    ),
}
# (expm1(x) - x)/x^2 on [-1.6, 1.3]: mpmath.chebyfit with 10 or 16 terms, absolute error 2e-10 and 2e-18.
_EXP_CENTRE, _EXP_REACH = -0.15, 1.45
_EXP = {
    torch.float32: (
        2.2865580396e-08, 2.8449792198e-07, 2.7659981118e-06, 2.4788113044e-05, 0.00019839855801,
        0.0013888974351, 0.0083333403146, 0.041666664682, 0.16666666576, 0.50000000008,
    ),
    torch.float64: (
        2.521787304106386e-15, 4.871034539917216e-14, 7.668281912639482e-13, 1.1468690828927503e-11,
        1.6058468153483998e-10, 2.087677893072447e-09, 2.505211629487346e-08, 2.7557319115262285e-07,
        2.755731916576075e-06, 2.480158730175495e-05, 0.0001984126984149074, 0.0013888888888889182,
        0.008333333333332962, 0.04166666666666666, 0.16666666666666669, 0.5,
    ),
}
# What a lifted argument needs: subtraction costs it 2^-53/|x|, nothing where |x| > 2^-10, and below that the
# first terms of the Taylor series of either function over x^2 leave 2^-30.
_LIFTED_REACH = 2.0**-10
_LOG_LIFTED, _EXP_LIFTED = (-1 / 4, 1 / 3, -1 / 2), (1 / 24, 1 / 6, 1 / 2)
# fmt: on
_LOW, _HIGH = math.log(2) - 0.5, 1 - math.log(2)


# --- log1p(x) - x -----------------------------------------------------------------------------------------


def _log1pmx_near(x: Tensor) -> Tensor:
    # log1p(x) = 2 atanh(s), s = x/(x + 2), and x - 2 s = x^2/2 (1 - s). So x^2/2 comes first, and the
    # roundings of s only enter through a term s times as large; s (2 s^2 p - x), which needs one product
    # fewer, doubles the error near zero. A polynomial in x itself would need twice the terms.
    h = (0.5 * x) * x
    s = x / (x + 2)
    w = s * s
    return s * (h + 2 * w * horner(w, _ATANH[x.dtype])) - h


@fused
def log1pmx_value(x: Tensor, *, lifted: bool = False) -> Tensor:
    """`log1pmx` without its gradient; ``lifted``: x holds float32 values as float64."""
    # min(log1p, max) changes infinity alone, for which inf - inf would be NaN
    far = torch.log1p(x).clamp(max=torch.finfo(x.dtype).max) - x
    if lifted:
        return torch.where(x.abs() < _LIFTED_REACH, x * horner(x, _LOG_LIFTED) * x, far)
    return torch.where((x - _ATANH_CENTRE).abs() < _ATANH_REACH, _log1pmx_near(x), far)


def _log1pmx_slope_value(x: Tensor, *, lifted: bool = False) -> Tensor:
    return torch.where(x.isinf(), -x.sign(), -x / (1 + x))


_log1pmx_slope = elementwise(_log1pmx_slope_value, lambda x: -(1 / (1 + x)).square())
_log1pmx = elementwise(log1pmx_value, _log1pmx_slope)


def log1pmx(x: Tensor) -> Tensor:
    """``log1p(x) - x``, which is never positive, without cancellation near zero.

    Name and sign are SciPy's and R's. Subtracting loses 1/x of all digits: every one from x = 1e-16 (float64) down.

    Args:
        x: any shape; the function is -inf at -1 and NaN below.

    Returns:
        A tensor of the shape and dtype of ``x``.

    Example:
        >>> import torch, stablekl
        >>> x = torch.tensor(1e-8)
        >>> print(f"{stablekl.special.log1pmx(x):.4e}, {torch.log1p(x) - x:.4e}")
        -5.0000e-17, 0.0000e+00
    """
    return broadcast_apply(_log1pmx, x)


# --- expm1(x) - x -----------------------------------------------------------------------------------------


@fused
def expm1mx_value(x: Tensor, *, lifted: bool = False) -> Tensor:
    """`expm1mx` without its gradient; ``lifted``: x holds float32 values as float64."""
    # clamping the subtrahend changes x = inf alone (expm1 has long overflowed), where inf - inf would be NaN
    far = torch.expm1(x) - x.clamp(max=1e4)
    if lifted:
        return torch.where(x.abs() < _LIFTED_REACH, x * horner(x, _EXP_LIFTED) * x, far)
    # (x p) x, not p x^2: one rounding where the result is subnormal
    near = x * horner(x, _EXP[x.dtype]) * x
    return torch.where((x - _EXP_CENTRE).abs() < _EXP_REACH, near, far)


def expm1_value(x: Tensor, *, lifted: bool = False) -> Tensor:
    """expm1 that stays accurate under torch.compile, whose code for CPUs computes ``exp(x) - 1``."""
    near = x + x * horner(x, _EXP_LIFTED if lifted else _EXP[x.dtype]) * x
    return torch.where(x.abs() < (_LIFTED_REACH if lifted else 0.5), near, torch.expm1(x))


# torch's own expm1 differentiates to expm1(x) + 1, which is 0 from x = -17 (float32) on
_expm1 = elementwise(expm1_value, torch.exp)
_expm1mx = elementwise(expm1mx_value, _expm1)


def expm1mx(x: Tensor) -> Tensor:
    """``expm1(x) - x``, which is never negative, without cancellation near zero.

    Args:
        x: any shape.

    Returns:
        A tensor of the shape and dtype of ``x``.
    """
    return broadcast_apply(_expm1mx, x)


# --- (a - b)/b - log(a/b) ---------------------------------------------------------------------------------


def _log_quotient(a: Tensor, b: Tensor, q: Tensor) -> Tensor:
    """log(a/b), q = a/b, to an absolute error of an ulp of max(1, |log|); finite where a and b are."""
    info = torch.finfo(q.dtype)
    return torch.where((q >= info.tiny) & (q <= info.max), torch.log(q), torch.log(a) - torch.log(b))


@fused
def log_ratio_bregman_value(a: Tensor, b: Tensor, *, lifted: bool = False) -> Tensor:
    """`log_ratio_bregman` without its gradient; ``lifted``: a and b hold float32 values as float64.

    Then q = a/b is 1 or at least 2^-24 from it, the error of q hardly matters (the function is stationary
    at q = 1) and q - 1 is exact there: (q - 1) - log q keeps 2^-28 in four passes and no branch.
    """
    q = a / b
    if lifted:
        return (q - 1) - torch.log(q).clamp_(max=1e4)  # the bound changes q = inf alone
    # With q = 2^k (1 + z) and L = -log1pmx, L(q - 1) = (2^k - 1 - k log 2) + (2^k - 1) z + L(z), all terms
    # positive. For k = -1, 0, 1 the difference in z is exact (Sterbenz's lemma); a - b is not beyond a
    # factor of 2, and either L((a - b)/b) or log q alone costs 8 ulp at q = 0.3.
    low, high = q < 0.5, q > 2
    a_k, b_k = torch.where(low, 2 * a, a), torch.where(high, 2 * b, b)
    z = (a_k - b_k) / b_k
    shift = torch.where(low, _LOW - 0.5 * z, torch.where(high, _HIGH + z, 0))
    near = shift - _log1pmx_near(z)
    # q - 1, not (a - b)/b: the error of q then cancels partly against that of log q
    far = (q - 1) - _log_quotient(a, b, q).clamp(max=torch.finfo(q.dtype).max)
    return torch.where((q > 0.25) & (q < 4), near, far)


def _reciprocal_gap_value(a: Tensor, b: Tensor, *, lifted: bool = False) -> Tensor:
    """1/b - 1/a; dividing by the larger first neither overflows nor underflows early."""
    return (a - b) / torch.maximum(a, b) / torch.minimum(a, b)


def _scaled_gap_value(a: Tensor, b: Tensor, *, lifted: bool = False) -> Tensor:
    """(b - a)/b^2."""
    return (b - a) / b / b


_reciprocal_gap = elementwise(_reciprocal_gap_value, lambda a, b: 1 / a / a, lambda a, b: -1 / b / b)
_scaled_gap = elementwise(
    _scaled_gap_value,
    lambda a, b: -1 / b / b,
    lambda a, b: (a - 0.5 * b) / b / b / b * 2,  # 2a - b without its overflow
)
_log_ratio_bregman = elementwise(log_ratio_bregman_value, _reciprocal_gap, _scaled_gap)


def log_ratio_bregman(a: Tensor, b: Tensor) -> Tensor:
    """``(a - b)/b - log(a/b)``, which is never negative and 0 only where a = b.

    The Bregman divergence of -log (Itakura and Saito's), as a function of two arguments since the rounded ratio is
    not enough: it is off by 1e16 ulp next to a = b, and 0 where a/b underflows. Accurate at every ratio of positive
    floats, from neighbours to 10^+-76 in float32 and 10^+-616 in float64, subnormal ones included.

    Args:
        a: positive, any shape.
        b: positive, broadcastable with ``a``.

    Returns:
        A tensor of the broadcast shape and the wider dtype; +inf where a or b is 0 or infinite and the other not.

    Example:
        >>> import torch, stablekl
        >>> a, b = torch.tensor([1e-38, 1.0, 1.0000001]), torch.tensor([1e38, 1.0, 1.0])
        >>> print(stablekl.special.log_ratio_bregman(a, b))
        tensor([1.7400e+02, 0.0000e+00, 7.1054e-15])
    """
    return broadcast_apply(_log_ratio_bregman, a, b)


# --- x log(x/M) + M - x -----------------------------------------------------------------------------------


def log_ratio_value(a: Tensor, b: Tensor, *, lifted: bool = False) -> Tensor:
    """log(a/b) to its relative accuracy near a = b too, where log of the rounded quotient has none."""
    x, q = (a - b) / b, a / b
    return torch.where(x.abs() < 0.5, torch.log1p(x), torch.log(q) if lifted else _log_quotient(a, b, q))


def bd0_value(x: Tensor, M: Tensor, *, lifted: bool = False) -> Tensor:
    """`bd0` without its gradient; ``lifted``: x and M hold float32 values as float64."""
    q = M / x
    if lifted:
        regular = x * log_ratio_bregman_value(M, x, lifted=True)
        return torch.where((x == 0) | M.isinf(), M - x, regular)
    # for M >> x, q may be infinite where the result is not
    above = (M - x) - torch.where((x == 0) | M.isinf(), 0, x * _log_quotient(M, x, q))
    return torch.where((x == 0) | (q > 4), above, x * log_ratio_bregman_value(M, x))


def _bd0_x_value(x: Tensor, M: Tensor, *, lifted: bool = False) -> Tensor:
    return torch.where(x == 0, 0, log_ratio_value(x, M, lifted=lifted))


def _bd0_M_value(x: Tensor, M: Tensor, *, lifted: bool = False) -> Tensor:
    # (M - x)/M; 1 - x/M, which would cancel, where the former is NaN
    return torch.where(M.isinf(), 1 - x / M, torch.where(x == 0, 1, (M - x) / M))


def _unless_zero(x: Tensor, value: Tensor) -> Tensor:
    return torch.where(x == 0, 0, value)


_bd0_x = elementwise(
    _bd0_x_value,
    lambda x, M: _unless_zero(x, 1 / torch.where(x == 0, 1, x)),
    lambda x, M: _unless_zero(x, -1 / torch.where(x == 0, 1, M)),
)
_bd0_M = elementwise(
    _bd0_M_value,
    lambda x, M: _unless_zero(x, -1 / torch.where(x == 0, 1, M)),
    lambda x, M: _unless_zero(x, x / torch.where(x == 0, 1, M) / M),
)
_bd0 = elementwise(bd0_value, _bd0_x, _bd0_M)


def bd0(x: Tensor, M: Tensor) -> Tensor:
    """The deviance term ``x log(x/M) + M - x``, which is never negative and 0 only where x = M.

    Evaluated as ``x log_ratio_bregman(M, x)``. After C. Loader, "Fast and accurate computation of binomial
    probabilities" (2000), whose name R kept.

    Args:
        x: not negative, any shape. At 0 the value is M and the gradient in x is returned as 0 (the one-sided
            derivative is -inf), as are the second derivatives: 0 log 0 is taken to be constant.
        M: not negative, broadcastable with ``x``; the value is +inf where M = 0 < x.

    Returns:
        A tensor of the broadcast shape and the wider dtype.
    """
    return broadcast_apply(_bd0, x, M)


# --- log of a sum of exponentials -------------------------------------------------------------------------


def _softmax(x: Tensor) -> Tensor:
    """The weights of the last dimension: they sum to 1; 0 for a row of -inf; shared among entries of +inf."""
    top = x.detach().amax(-1, keepdim=True)
    at_infinity = torch.where(x == top, 0.0, -torch.inf).to(x.dtype)
    weights = torch.softmax(torch.where(top.isinf(), at_infinity, x - top), -1)
    return torch.where(top == -torch.inf, 0, weights)


def _logsumexp_value(x: Tensor) -> tuple[Tensor]:
    working = x.double() if is_lifted(x) else x
    top, index = working.max(-1, keepdim=True)
    terms = torch.exp(working - torch.where(top.isinf(), 0, top))
    # log1p of the others' sum: log of the whole sum loses them where they are small and top is zero
    others = terms.scatter(-1, index, 0.0).sum(-1)
    return ((top.squeeze(-1) + torch.log1p(others)).to(x.dtype),)


_logsumexp = rowwise(_logsumexp_value, lambda inputs, saved: (_softmax(inputs[0]),))


def logsumexp(x: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    """``log(sum(exp(x), dim))`` whose gradient is the softmax, so that its weights sum to 1.

    torch's gradient is exp(x - result): its weights sum to 0.6 ... 1.6 at x = -1e7 in float32, where the result is
    rounded to a whole number. The value is ``max + log1p(sum of the others)``, which keeps [0, -40] apart from [0].
    Where the terms sum to nearly 1 though none is near 1, the result is small and its error is eps, not eps times it.

    Args:
        x: any shape. A row of -inf gives -inf and zero gradient; entries of +inf give +inf and share the
            gradient.
        dim: the dimension summed over.
        keepdim: whether to keep it with size one.

    Returns:
        A tensor without that dimension, or with size one there; -inf for a sum of no terms.
    """
    if x.shape[dim] == 0:
        return x.sum(dim, keepdim) - torch.inf
    out = broadcast_apply(_logsumexp, x.movedim(dim, -1))
    return out.unsqueeze(dim) if keepdim else out


# --- log of the normal distribution function ----------------------------------------------------------


def log_ndtr(x: Tensor) -> Tensor:
    """Log of the standard normal distribution function, ``log Phi(x)``, with its gradient ``phi(x)/Phi(x)``.

    With h(y) = phi(y)/Phi(-y) as y plus a positive polynomial: ``-(x^2/2 + log(sqrt(2 pi) h(-x)))`` below 0 and
    ``log1p(-phi(x)/h(x))`` above, so that the value keeps its relative accuracy in both tails (-1.1e-16 at 8.2) and the
    gradient, h(-x) below 0, any x (torch's is 64929 instead of 1e4 at x = -1e4).

    Args:
        x: any shape.

    Returns:
        A tensor of the shape and dtype of ``x``.
    """
    return broadcast_apply(normal_log_cdf, x)
