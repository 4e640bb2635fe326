"""What stablekl's distributions have beyond torch's, ``.to(device, dtype)`` and errors that help; shapes and dtypes."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions import Geometric as TorchGeometric

from .._autograd import is_plain
from ..parameterizations import check_positive, holds_data, raise_outside
from ..registry import check_batch_shapes

__all__ = [
    "Checked",
    "Given",
    "Movable",
    "broadcast_shape",
    "check_batch_shapes",
    "common_dtype",
    "given",
    "mapped",
    "moved",
    "of_both",
    "validate_as",
    "widened",
]

DistributionT = TypeVar("DistributionT", bound=Distribution)


def widened(x: Tensor) -> Tensor:
    """``x`` in float64 where the device has it, so that one rounding is left; float32 on MPS.

    Differences of float32 inputs are exact in float64 and the result is rounded once, which is cheaper inside a
    fused pass than any float32 formula of the same accuracy.
    """
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def common_dtype(*tensors: Tensor) -> torch.dtype:
    """The floating-point dtype that all the tensors promote to."""
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype if dtype.is_floating_point else torch.get_default_dtype()


class Given:
    """Mixin of classes whose torch constructor rounds or clamps a parameter: they keep what was given.

    Attributes:
        given_as: ``"probs"`` or ``"logits"``.
        given_value: the parameter by that name.
    """

    given_as: str
    given_value: Tensor

    def _keep(self, probs: Tensor | float | None, logits: Tensor | float | None, like: Tensor) -> None:
        value = logits if probs is None else probs
        self.given_as = "logits" if probs is None else "probs"
        self.given_value = value if isinstance(value, Tensor) else torch.full_like(like, value)  # type: ignore[arg-type]


def given(distribution: Distribution) -> tuple[str, Tensor]:
    """``"probs"`` or ``"logits"``, whichever the distribution was built from, and its value.

    What torch's constructors store comes before what has been asked for since.
    """
    if isinstance(distribution, Given):
        return distribution.given_as, distribution.given_value
    stored = [name for name in ("probs", "logits") if name in distribution.__dict__]
    if len(stored) > 1:  # never so where torch.compile traces, which before torch 2.12 can't run through a __dict__
        stored = [name for name in distribution.__dict__ if name in stored]
    value: Tensor = distribution.__dict__[stored[0]]
    return stored[0], value


def broadcast_shape(*shapes: torch.Size) -> torch.Size:
    """`torch.broadcast_shapes`, which takes 0.05 ms, without it where one of the shapes is the answer."""
    if all(s == shapes[0] for s in shapes):
        return shapes[0]
    if not torch.compiler.is_compiling():
        for widest in shapes:
            if all(
                len(s) <= len(widest) and all(n in (1, m) for n, m in zip(reversed(s), reversed(widest), strict=False))
                for s in shapes
            ):
                return widest
    result: torch.Size = torch.broadcast_shapes(*shapes)
    return result


def _distinct(a: Tensor) -> Tensor:
    """Matrices without the copies that expanding their batch shape has made, its dimensions kept."""
    if is_plain((a,)):
        for i, stride in enumerate(a.stride()[:-2]):
            a = a.narrow(i, 0, 1) if stride == 0 and a.shape[i] > 1 else a
    return a


def of_both(f: Callable[..., Tensor], p: tuple[Tensor, ...], q: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """``f(*p)`` and ``f(*q)`` for matrices of one shape, in one call, and once for a q that several p share."""
    shape, distinct = p[0].shape, [_distinct(a) for a in q]
    stacked = (torch.cat([x.reshape(-1, *shape[-2:]) for x in pair]) for pair in zip(p, distinct, strict=True))
    result = f(*stacked)
    rows = result.shape[0] - math.prod(distinct[0].shape[:-2])
    return result[:rows].reshape(shape), result[rows:].reshape(distinct[0].shape).expand(shape)


def mapped(distribution: DistributionT, f: Callable[[Tensor], Tensor]) -> DistributionT:
    """A copy of any torch distribution with every tensor in it, nested ones too, sent through ``f``."""
    new = copy.copy(distribution)
    for name, item in distribution.__dict__.items():
        if isinstance(item, Tensor):
            new.__dict__[name] = f(item)
        elif isinstance(item, Distribution):
            new.__dict__[name] = mapped(item, f)
    return new


def moved(distribution: DistributionT, *args: Any, **kwargs: Any) -> DistributionT:
    """`mapped` through ``Tensor.to``. Only floating-point tensors change their dtype."""

    def move(item: Tensor) -> Tensor:
        target = item.to(*args, **kwargs)
        return target if item.is_floating_point() else item.to(device=target.device)

    return mapped(distribution, move)


class Movable:
    """Mixin: ``distribution.to(...)`` with the arguments of `torch.Tensor.to`."""

    def to(self: DistributionT, *args: Any, **kwargs: Any) -> DistributionT:  # type: ignore[misc]
        """Return a copy on another device or in another dtype; takes what `torch.Tensor.to` takes."""
        return moved(self, *args, **kwargs)


_SCALAR = torch.Size()
_REQUIREMENTS = {
    "real": "finite or infinite, and no NaN",
    "nonnegative": "0 or more",
    "unit_interval": "between 0 and 1",
    "nonnegative_integer": "a whole number, 0 or more",
    "simplex": "0 or more and sum to 1 along the last dimension",
    "real_vector": "no NaN",
}


def _named(constraint: Any) -> str:
    """In words what a constraint requires."""
    for name, words in _REQUIREMENTS.items():
        if constraint is getattr(constraints, name):
            return words
    if isinstance(constraint, constraints.less_than):
        return "below the upper end"
    if isinstance(constraint, constraints.greater_than_eq):
        return f"at least {constraint.lower_bound}"
    return f"within the constraint {constraint}"


def _raised_by_torch(trace: TracebackType | None) -> bool:
    module = ""
    while trace is not None:
        module, trace = trace.tb_frame.f_globals.get("__name__", ""), trace.tb_next
    return module.startswith("torch.")


def _raise_better(distribution: Distribution, given_values: dict[str, Any]) -> None:
    """Raise an error that says which entry of which parameter is wrong, if one is."""
    owner = type(distribution).__name__
    for name, value in given_values.items():
        if not (value is None or isinstance(value, (Tensor, float, int))):
            raise TypeError(
                f"{name} of {owner} must be a tensor, and is a {type(value).__name__}: give torch.tensor({name})"
            )
    for name, value in given_values.items():
        constraint: Any = distribution.arg_constraints[name]
        if value is None or constraints.is_dependent(constraint):
            continue
        value = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.get_default_dtype())
        if not holds_data(value) or value.ndim < constraint.event_dim:
            continue
        if isinstance(constraint, constraints.independent):  # whose entries are judged one by one
            constraint = constraint.base_constraint
        good = constraint.check(value)
        if constraint is constraints.positive and not bool(good.all()):
            check_positive(name, value, owner)
        requirement = _named(constraint)
        if isinstance(distribution, TorchGeometric) and name == "probs":  # torch checks that in its constructor
            good, requirement = good & (value > 0), "above 0 and up to 1"
        if not bool(good.all()):
            raise_outside(owner, name, value, good, requirement)


def _helpful(constructor: Callable[..., None], cls: type[Checked]) -> Callable[..., None]:
    """A constructor whose errors name the class that was built, and what it was given.

    torch's construct another class inside (a Beta a Dirichlet, a LogNormal a Normal) and let that one complain.
    """
    asks = "validate_args" in inspect.signature(constructor).parameters

    @functools.wraps(constructor)
    def init(self: Checked, *args: Any, **kwargs: Any) -> None:
        if torch.compiler.is_compiling():  # no data to look at, and torch's loop over constraints may not trace
            constructor(self, *args, **({**kwargs, "validate_args": False} if asks and cls is type(self) else kwargs))
            return
        if type(self) is not cls:  # inside that of a subclass
            constructor(self, *args, **kwargs)
            return
        try:
            constructor(self, *args, **kwargs)
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            try:
                named = inspect.signature(constructor).bind(self, *args, **kwargs).arguments
            except TypeError:  # no such arguments: Python says so
                raise error from None
            values = {name: named[name] for name in self.arg_constraints if name in named}
            asked = named.get("validate_args")
            empty = any(isinstance(x, Tensor) and x.numel() == 0 for x in values.values())
            if isinstance(error, RuntimeError) and empty and asked is not False:
                # torch's check of vectors inside fails of an empty batch, in which there is nothing to check
                constructor(**{**named, "validate_args": False})
                validate_as(self, asked)
                return
            if isinstance(error, ValueError) and not _raised_by_torch(error.__traceback__):
                raise
            _raise_better(self, values)
            raise

    return init


def validate_as(distribution: Distribution, asked: bool | None) -> None:
    """As if it had been constructed with this ``validate_args``."""
    distribution.__dict__.pop("_validate_args", None)
    if asked is not None:
        distribution._validate_args = asked


class Checked(Movable, Distribution):
    """Mixin, to be listed after torch's class: errors about parameters that say which entry is wrong, and why.

    torch's constructors end in that of `Distribution`, which checks the parameters; this one stands before it. Those of
    subclasses, torch's too, are wrapped, so that what they raise is said again with names and indices; ``expand`` keeps
    their type. What is valid costs nothing more.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Wrap the constructor."""
        super().__init_subclass__(**kwargs)
        constructor = cls.__init__
        cls.__init__ = _helpful(constructor, cls)  # type: ignore[method-assign]

    def __init__(
        self, batch_shape: torch.Size = _SCALAR, event_shape: torch.Size = _SCALAR, validate_args: bool | None = None
    ) -> None:
        """Let torch check the parameters, where there is data to look at."""
        if torch.compiler.is_compiling():  # no looking at data then, and torch's loop over constraints may not trace
            super().__init__(batch_shape, event_shape, validate_args=False)
        elif 0 in batch_shape:  # nothing to check, and torch's check of vectors fails
            super().__init__(batch_shape, event_shape, validate_args=False)
            validate_as(self, validate_args)
        else:
            super().__init__(batch_shape, event_shape, validate_args=validate_args)

    def _get_checked_instance(self, cls, _instance=None):  # type: ignore[no-untyped-def]  # as torch's
        """torch's, which a wrapped constructor would make refuse ``expand``."""
        if _instance is None and inspect.unwrap(type(self).__init__) is not inspect.unwrap(cls.__init__):
            raise NotImplementedError(
                f"{type(self).__name__} has a constructor of its own and must have an expand of its own"
            )
        return self.__new__(type(self)) if _instance is None else _instance
