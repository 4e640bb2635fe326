"""The search for a rule of your own."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import mpmath
import torch
from hypothesis import strategies as st

from .references.context import PrecisionError, mp
from .rows import DTYPES, Row, Task, rows_of
from .search import Limits, explore
from .subject import Rule, Subject, settled

__all__ = ["measure"]


def _finite(*batch: torch.Tensor) -> torch.Tensor:
    return torch.stack([x.reshape(len(x), -1).isfinite().all(-1) for x in batch]).all(0)


def _names(rule: Rule, count: int) -> tuple[str, ...]:
    """The names of the rule's arguments, where it has as many as there are inputs."""
    try:
        names = tuple(inspect.signature(rule).parameters)
    except (TypeError, ValueError):  # a built-in function
        names = ()
    return names if len(names) == count else tuple(f"input {i}" for i in range(count))


class _Reference:
    """The caller's reference, with mpmath's own context at the private one's precision, in case it uses that.

    What it raises is kept: hypothesis would wrap it, and call again with other rows to see whether it is raised again.
    """

    def __init__(self, reference: Callable[..., Any]):
        self.reference = reference
        self.error: Exception | None = None

    def __call__(self, *row: Any) -> Any:
        try:
            with mpmath.workprec(mp.prec):
                result = self.reference(*row)
            for item in _leaves(result):
                if not hasattr(item, "_mpf_") and not isinstance(item, int):
                    raise ValueError(
                        f"the reference returned a Python {type(item).__name__}, which is no truth for a rule in "
                        "floating point: compute it from the numbers it is given, with functions of "
                        "stablekl.precision.mp, such as mp.log instead of math.log"
                    )
            return result
        except PrecisionError:
            raise
        except Exception as error:
            self.error = error
            raise PrecisionError("the reference failed") from error


def _leaves(item: Any) -> Iterator[Any]:
    if isinstance(item, (list, tuple)):
        for i in item:
            yield from _leaves(i)
    else:
        yield item


def measure(
    rule: Rule,
    reference: Callable[..., Any],
    strategy: st.SearchStrategy[tuple[torch.Tensor, ...]],
    *,
    name: str = "rule",
    device: torch.device | str = "cpu",
    examples: int = 100,
    seconds: float = 20.0,
    seed: int = 0,
    divergence: bool = True,
    elementwise: bool = True,
    valid: Callable[..., torch.Tensor] | None = None,
) -> Row:
    """Search for the input at which a rule of your own is most wrong.

    Args:
        rule: a function of tensors of shape ``(n, ...)``, one parameter set a row, that returns a tensor ``(n,)``.
        reference: the true value for one parameter set, from exact numbers of ``stablekl.precision.mp`` (nested lists
            of them for vectors and matrices), written plainly with functions of ``mp`` or of mpmath: it is evaluated
            at rising precision until two agree.
        strategy: hypothesis strategy of batches, tuples of tensors of one dtype; `pairs` makes one for scalar families.
        name: of the row.
        device: where the rule is evaluated.
        examples: batches, at most.
        seconds: to spend, roughly.
        seed: the same seed finds the same, as long as time does not run out.
        divergence: count negative results as defects.
        elementwise: check that a row's bits do not depend on the batch around it.
        valid: from a batch to a mask of the sets that are in the rule's domain, for the climb, which changes no sign;
            by default all that are finite.

    Returns:
        The row: ``worst_ulp``, ``worst_input``, ``evaluations``, ``nan``, ``inf``, ``negative`` and more.

    Raises:
        ValueError: the strategy draws something else than tuples of tensors of one dtype, or the reference returns
            Python floats, which are not true to more digits than the rule. What the reference raises is raised.

    Example:
        >>> import torch
        >>> from stablekl import precision
        >>> from stablekl.precision import mp
        >>> def naive(mu_p, sigma_p, mu_q, sigma_q):
        ...     return torch.log(sigma_q / sigma_p) + (sigma_p**2 + (mu_p - mu_q) ** 2) / (2 * sigma_q**2) - 0.5
        >>> def true(mu_p, sigma_p, mu_q, sigma_q):
        ...     return mp.log(sigma_q / sigma_p) + (sigma_p**2 + (mu_p - mu_q) ** 2) / (2 * sigma_q**2) - mp.mpf(1) / 2
        >>> row = precision.measure(naive, true, precision.pairs(loc="real", scale="positive"), examples=20)
        >>> row.worst_ulp > 1e6, row.negative > 0
        (True, True)
    """
    first = hypothesis.find(strategy, lambda _: True, settings=hypothesis.settings(database=None))
    if not (isinstance(first, (tuple, list)) and first and all(isinstance(x, torch.Tensor) for x in first)):
        raise ValueError(
            f"the strategy must draw tuples of tensors, one parameter set a row, but drew {first!r:.60}; "
            "stablekl.precision.pairs makes such a strategy for a scalar family"
        )
    if (
        any(x.ndim == 0 for x in first)
        or len({(x.dtype, len(x)) for x in first}) > 1
        or first[0].dtype not in DTYPES.values()
    ):
        raise ValueError(
            "the tensors of a batch must share a floating-point dtype and their length, but the strategy drew "
            f"{[(x.dtype, tuple(x.shape)) for x in first]}"
        )
    dtype = first[0].dtype
    judge = _Reference(reference)
    subject = Subject(
        name=name,
        parameters=_names(rule, len(first)),
        rules={"yours": rule},
        reference=settled(judge),
        draw=strategy,
        valid=valid or _finite,
        divergence=divergence,
        elementwise=elementwise,
    )
    start = time.monotonic()
    tallies = explore(subject, dtype, torch.device(device), Limits(examples, seconds, seed))
    if judge.error is not None:
        raise judge.error
    task = Task(name, str(dtype).removeprefix("torch."), str(device), Limits(examples, seconds, seed))
    return rows_of(subject, task, tallies, time.monotonic() - start)[0]
