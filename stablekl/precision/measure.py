"""The search for a rule of your own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st

from .rows import Row, Task, rows_of
from .search import Limits, explore
from .subject import Rule, Subject, settled

__all__ = ["measure"]


def measure(
    rule: Rule,
    reference: Callable[..., Any],
    strategy: st.SearchStrategy[tuple[torch.Tensor, ...]],
    *,
    name: str = "rule",
    dtype: torch.dtype = torch.float64,
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
            of them for vectors and matrices), written plainly: it is evaluated at rising precision until two agree.
        strategy: hypothesis strategy of batches; `pairs` makes one for scalar families.
        name: of the row.
        dtype: of the tensors that the strategy draws.
        device: where the rule is evaluated.
        examples: batches, at most.
        seconds: to spend, roughly.
        seed: the same seed finds the same, as long as time does not run out.
        divergence: count negative results as defects.
        elementwise: check that a row's bits do not depend on the batch around it.
        valid: from a batch to a mask of the sets that are in the rule's domain, for the climb; by default, finite and
            of the same sign as the set it starts from.

    Returns:
        The row: ``worst_ulp``, ``worst_input``, ``evaluations``, ``nan``, ``inf``, ``negative`` and more.

    Raises:
        ValueError: the strategy draws something else than tensors of ``dtype``.

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

    def expand(drawn: Any, _: torch.dtype) -> Any:
        if not (isinstance(drawn, tuple) and all(isinstance(x, torch.Tensor) and x.dtype == dtype for x in drawn)):
            kinds = [getattr(x, "dtype", type(x).__name__) for x in drawn] if isinstance(drawn, tuple) else type(drawn)
            raise ValueError(
                f"the strategy must draw tuples of {dtype} tensors, one row a parameter set, but drew {kinds}; "
                "pass dtype= to measure, or to the strategy"
            )
        return drawn

    subject = Subject(
        name=name,
        parameters=(),
        rules={"yours": rule},
        reference=settled(reference),
        draw=strategy.map(lambda batch: expand(batch, dtype)),
        valid=valid or (lambda *batch: torch.stack([x.reshape(len(x), -1).isfinite().all(-1) for x in batch]).all(0)),
        divergence=divergence,
        elementwise=elementwise,
    )
    start = time.monotonic()
    tallies = explore(subject, dtype, torch.device(device), Limits(examples, seconds, seed))
    tally = tallies["yours"]
    count = len(tally.row) if tally.row else 0
    names = list(rule.__code__.co_varnames[: rule.__code__.co_argcount]) if hasattr(rule, "__code__") else []
    parameters = tuple(names) if len(names) == count else tuple(f"input {i}" for i in range(count))
    subject = replace(subject, parameters=parameters)
    task = Task(name, str(dtype).removeprefix("torch."), str(device), Limits(examples, seconds, seed))
    return rows_of(subject, task, tallies, time.monotonic() - start)[0]
