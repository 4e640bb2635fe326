"""What every Gaussian family, ours or torch's, must satisfy: a family is data, a requirement a function `check_*`."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent
from torch.distributions import LowRankMultivariateNormal as TorchLowRank
from torch.distributions import MultivariateNormal as TorchMVN
from torch.distributions import Normal as TorchNormal

import stablekl

__all__ = ["FAMILIES", "OURS", "REQUIREMENTS", "VECTORS", "Family"]

Tensors = tuple[Tensor, ...]
D = 3


class Family(NamedTuple):
    """A way to write a Gaussian down.

    Attributes:
        build: parameters -> distribution; projects away what must not vary (the upper triangle of a factor).
        parameters: batch shape, dtype, seed -> valid parameters, float64 values rounded to the dtype.
        lenient: whether the constructor takes half precision and vmap; torch's Cholesky and its check do not.
        other: the family of q, where that is another one.
        rows: of the batches that must not go below 0.
    """

    build: Callable[..., Distribution]
    parameters: Callable[[tuple[int, ...], torch.dtype, int], Tensors]
    lenient: bool = True
    other: Any = None
    rows: int = 300


def _normal(shape: tuple[int, ...], seed: int) -> tuple[Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64), generator


def _diagonal(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensors:
    loc, g = _normal((*shape, D), seed)
    scale = 0.5 + torch.rand((*shape, D), generator=g, dtype=torch.float64)
    return loc.to(dtype), scale.to(dtype)


def _scalar(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensors:
    loc, scale = _diagonal(shape, dtype, seed)
    return loc[..., 0].clone(), scale[..., 0].clone()


def _tril(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensors:
    loc, g = _normal((*shape, D), seed)
    below = 0.4 * torch.randn((*shape, D, D), generator=g, dtype=torch.float64).tril(-1)
    scale = 0.5 + torch.rand((*shape, D), generator=g, dtype=torch.float64)
    return loc.to(dtype), (below + torch.diag_embed(scale)).to(dtype)


def _matrix(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensors:
    loc, tril = _tril(shape, torch.float64, seed)
    return loc.to(dtype), (tril @ tril.mT + 0.5 * torch.eye(D, dtype=torch.float64)).to(dtype)


def _low_rank(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensors:
    loc, g = _normal((*shape, D), seed)
    factor = torch.randn((*shape, D, 2), generator=g, dtype=torch.float64)
    diag = 0.5 + torch.rand((*shape, D), generator=g, dtype=torch.float64)
    return loc.to(dtype), factor.to(dtype), diag.to(dtype)


def _symmetric(a: Tensor) -> Tensor:
    """What our constructor does by itself."""
    return 0.5 * a + 0.5 * a.mT


MVN = stablekl.MultivariateNormal

OURS = {
    "Normal": Family(stablekl.Normal, _scalar),
    "Independent": Family(lambda m, s: Independent(stablekl.Normal(m, s), 1), _diagonal),
    "scale_diag": Family(lambda m, s: MVN(m, scale_diag=s), _diagonal),
    "scale_tril": Family(lambda m, t: MVN(m, scale_tril=t.tril()), _tril),
    "covariance": Family(lambda m, c: MVN(m, covariance_matrix=c), _matrix),
    "precision": Family(lambda m, c: MVN(m, precision_matrix=c), _matrix),
    "low rank": Family(stablekl.LowRankMultivariateNormal, _low_rank),
}
TORCHS = {
    "torch Normal": Family(TorchNormal, _scalar),
    "torch Independent": Family(lambda m, s: Independent(TorchNormal(m, s), 1), _diagonal),
    "torch scale_tril": Family(lambda m, t: TorchMVN(m, scale_tril=t.tril()), _tril),
    "torch covariance": Family(lambda m, c: TorchMVN(m, covariance_matrix=_symmetric(c)), _matrix, False),
    "torch precision": Family(lambda m, c: TorchMVN(m, precision_matrix=_symmetric(c)), _matrix, False),
    "torch low rank": Family(TorchLowRank, _low_rank, False),
}
FAMILIES = OURS | TORCHS
VECTORS = {name: family for name, family in FAMILIES.items() if "Normal" not in name}


@contextlib.contextmanager
def _no_validation(active: bool = True) -> Iterator[None]:
    Distribution.set_default_validate_args(not active)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(True)


def _kl(family: Family, p: Tensors, q: Tensors) -> Tensor:
    return stablekl.kl_divergence(family.build(*p), (family.other or family).build(*q))


def _pair(family: Family, dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = ()) -> tuple[Tensors, Tensors]:
    return family.parameters(shape, dtype, 1), (family.other or family).parameters(shape, dtype, 2)


def check_batch_shapes_broadcast(family: Family) -> None:
    p, q = family.parameters((3,), torch.float64, 1), (family.other or family).parameters((2, 3), torch.float64, 2)
    for reverse in (False,) if family.other else (False, True):
        result = _kl(family, q, p) if reverse else _kl(family, p, q)
        assert result.shape == (2, 3)
        for i in range(2):
            for j in range(3):
                p_j, q_ij = tuple(x[j] for x in p), tuple(x[i, j] for x in q)
                one = _kl(family, q_ij, p_j) if reverse else _kl(family, p_j, q_ij)
                torch.testing.assert_close(result[i, j], one, rtol=1e-14, atol=0)


def check_empty_batches(family: Family) -> None:
    for shape in ((0,), (2, 0)):
        p, q = _pair(family, shape=shape)
        p = tuple(x.requires_grad_() for x in p)
        with _no_validation():  # torch's fails on empty batches
            result = _kl(family, p, q)
        assert result.shape == shape
        result.sum().backward()
        assert all(x.grad is not None and x.grad.shape == x.shape for x in p)


def check_expand_keeps_type_and_value(family: Family) -> None:
    p, q = _pair(family, shape=(3,))
    small, other = family.build(*p), family.build(*q)
    large = small.expand((2, 3))
    assert type(large) is type(small)
    assert large.batch_shape == (2, 3)
    assert large.event_shape == small.event_shape
    expected = stablekl.kl_divergence(small, other).expand(2, 3)
    torch.testing.assert_close(stablekl.kl_divergence(large, other), expected, rtol=1e-14, atol=0)
    assert large.rsample((4,)).shape == (4, 2, 3, *small.event_shape)
    x = small.mean
    torch.testing.assert_close(large.log_prob(x), small.log_prob(x).expand(2, 3))
    torch.testing.assert_close(large.entropy(), small.entropy().expand(2, 3))


def check_copies(family: Family) -> None:
    p, q = _pair(family, shape=(2,))
    original, other = family.build(*p), family.build(*q)
    expected = stablekl.kl_divergence(original, other)
    for duplicate in (copy.copy(original), copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        assert type(duplicate) is type(original)
        assert torch.equal(stablekl.kl_divergence(duplicate, other), expected)
    assert repr(original).startswith(type(original).__name__)


def check_derivatives(family: Family) -> None:
    p, q = _pair(family)
    inputs = tuple(x.clone().requires_grad_() for x in (*p, *q))
    n = len(p)

    def f(*x: Tensor) -> Tensor:
        return _kl(family, x[:n], x[n:])

    assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, inputs)


def check_transforms(family: Family) -> None:
    p, q = _pair(family, shape=(2,))
    inputs = (*p, *q)
    n, argnums = len(p), tuple(range(len(inputs)))

    def f(*x: Tensor) -> Tensor:
        with _no_validation(not family.lenient):
            return _kl(family, x[:n], x[n:])

    rows = [tuple(x[i] for x in inputs) for i in range(2)]
    torch.testing.assert_close(torch.vmap(f)(*inputs), f(*inputs), rtol=1e-13, atol=0)
    jacobians = torch.vmap(torch.func.jacrev(f, argnums))(*inputs)
    each = [torch.func.jacrev(f, argnums)(*row) for row in rows]
    for i, jacobian in enumerate(jacobians):
        torch.testing.assert_close(jacobian, torch.stack([e[i] for e in each]), rtol=1e-11, atol=1e-13)
    tangents = tuple(torch.randn_like(x) for x in inputs)
    _, tangent = torch.func.jvp(f, inputs, tangents)
    expected = sum((j * t).reshape(2, -1).sum(1) for j, t in zip(jacobians, tangents, strict=True))
    torch.testing.assert_close(tangent, expected, rtol=1e-11, atol=1e-13)


def _dtypes(family: Family) -> list[torch.dtype]:
    return [torch.float16, torch.bfloat16] * family.lenient + [torch.float32, torch.float64]


def check_dtypes(family: Family) -> None:
    for dtype in _dtypes(family):
        p, q = _pair(family, dtype, (5,))
        result = _kl(family, p, q)
        assert result.dtype == dtype
        truth = _kl(family, tuple(x.double() for x in p), tuple(x.double() for x in q))
        eps = torch.finfo(dtype).eps
        assert ((result.double() - truth).abs() <= (0.501 if dtype.itemsize == 2 else 16) * eps * truth).all()
        torch.testing.assert_close(_kl(family, p, tuple(x.double() for x in q)), truth, rtol=1e-12, atol=0)


def check_zero_at_equality(family: Family) -> None:
    for dtype in _dtypes(family):
        p = family.parameters((4,), dtype, 1)
        a, b = (tuple(x.clone().requires_grad_() for x in p) for _ in range(2))
        result = _kl(family, a, b)
        assert (result == 0).all()
        result.sum().backward()
        assert all((x.grad == 0).all() for x in (*a, *b))


def check_never_negative(family: Family) -> None:
    for dtype in (torch.float32, torch.float64):
        p = family.parameters((family.rows,), dtype, 3)
        eps = torch.finfo(dtype).eps
        for k in range(0, 12):
            generator = torch.Generator().manual_seed(k)
            q = tuple(x * (1 + 2**k * eps * torch.randn(x.shape, generator=generator, dtype=dtype)) for x in p)
            q = tuple(0.5 * (x + x.mT) if x.shape[-2:] == (D, D) and not (x.triu(1) == 0).all() else x for x in q)
            result = _kl(family, p, q)
            assert (result >= 0).all()
            assert result.isfinite().all()


REQUIREMENTS = {name.removeprefix("check_"): f for name, f in globals().items() if name.startswith("check_")}
