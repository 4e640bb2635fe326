"""Chunks of work that several processes share, in an order that does not depend on how many they are.

Chunk i has a seed of its own, base + i, whichever process draws it, and results are taken up in the order of the
chunks: any number of processes gives the same bits. An error that one of them meets is raised in all, since those that
went on would wait for it forever.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from .._distributed import Processes

__all__ = ["base_seed", "check_same", "device_of", "in_order", "seeded"]

TaskT = TypeVar("TaskT")


def in_order(
    processes: Processes,
    tasks: Iterable[TaskT],
    evaluate: Callable[[TaskT], Tensor],
    absorb: Callable[[TaskT, Tensor], None],
    blank: Callable[[], Tensor],
) -> None:
    """Evaluate tasks, one for each process at a time, and absorb all results in all processes, in their order.

    Args:
        processes: who shares the work.
        tasks: the same in every process.
        evaluate: of one task; all results have one shape.
        absorb: takes a task and its result.
        blank: what a process without a task hands over, of the same shape.
    """
    queue = iter(tasks)
    while group := list(itertools.islice(queue, processes.size)):
        result, failure = blank() if processes.rank >= len(group) else None, None
        try:
            result = evaluate(group[processes.rank]) if result is None else result
        except Exception as error:
            failure = error
        processes.raise_together(failure)
        if result is not None:
            for task, found in zip(group, processes.gathered(result), strict=False):
                absorb(task, found)


def check_same(processes: Processes, facts: Sequence[int]) -> None:
    """ValueError, in all processes, unless they have the same numbers: as many of them, too."""
    counts = [int(n) for n in processes.gathered(torch.tensor(len(facts)))]
    padded = torch.tensor([*facts, *[0] * (max(counts) - len(facts))], dtype=torch.int64)
    found = [tuple(x.tolist()) for x in processes.gathered(padded)]
    other = next((r for r in range(processes.size) if (counts[r], found[r]) != (counts[0], found[0])), None)
    if other is not None:
        raise ValueError(
            "the processes of torch.distributed share the samples of one problem, but were given different ones: rank "
            f"{other} has shapes and numbers of samples {list(found[other])} where rank 0 has {list(found[0])}. Make "
            "the same call in every process, or pass distributed=False for one of its own"
        )


def base_seed(processes: Processes) -> int:
    """One draw from torch's default generator, that of rank 0 in all processes."""
    drawn = torch.randint(2**62, (), dtype=torch.int64, device="cpu")
    return int(processes.from_first(drawn))


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """With this seed in the generators of the CPU and of the device; afterwards they are as they were."""
    on_cpu = device.type == "cpu"
    index = [] if on_cpu else [device.index or 0]
    with torch.random.fork_rng(devices=index, device_type="cuda" if on_cpu else device.type):
        # torch.manual_seed would seed the accelerators that were not forked as well
        torch.default_generator.manual_seed(seed)
        if not on_cpu:
            module = torch.get_device_module(device)
            with module.device(index[0]):
                module.manual_seed(seed)
        yield


def device_of(p: Distribution) -> torch.device:
    """Where a distribution's parameters are; the CPU where it has none."""
    for item in p.__dict__.values():
        if isinstance(item, Tensor):
            return item.device
        if isinstance(item, Distribution):
            return device_of(item)
    return torch.device("cpu")
