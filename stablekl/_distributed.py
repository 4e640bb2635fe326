"""What the processes of torch.distributed have together, or one process has alone."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Processes"]

# Bytes of an error's message that the other processes are told.
_MESSAGE = 2000


class Processes:
    """The processes that share a piece of work: those of torch.distributed's default group, where there is one.

    Every process must make the same calls in the same order, as with torch.distributed itself. Results are the same
    bits in all of them, so that all take the same decisions.

    Args:
        distributed: False for this process alone, whatever torch.distributed says.
    """

    def __init__(self, distributed: bool = True) -> None:
        """Look whether there is a group."""
        shared = distributed and dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank() if shared else 0
        self.size: int = dist.get_world_size() if shared else 1

    def gathered(self, x: Tensor) -> list[Tensor]:
        """The tensors of all processes, which have one shape and dtype, in the order of the ranks."""
        if self.size == 1:
            return [x]
        sent = x.to(_device()).contiguous()
        found = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(found, sent)
        return [f.to(x.device) for f in found]

    def summed(self, x: Tensor) -> Tensor:
        """The sum of the tensors of all processes, added in the order of the ranks."""
        return x if self.size == 1 else torch.stack(self.gathered(x)).sum(0)

    def from_first(self, x: Tensor) -> Tensor:
        """The tensor of rank 0."""
        return self.gathered(x)[0]

    def raise_together(self, failure: Exception | None) -> None:
        """Raise in every process what one of them has met, if any has.

        Raises:
            ValueError: if the first failure is one, with the rank and the message of it.
            RuntimeError: for any other failure.
        """
        if self.size == 1:
            if failure is not None:
                raise failure
            return
        text = b""
        if failure is not None:
            text = ("V" if isinstance(failure, ValueError) else "R").encode() + str(failure).encode()[:_MESSAGE]
        lengths = [int(n) for n in self.gathered(torch.tensor(len(text)))]
        rank = next((r for r, n in enumerate(lengths) if n), None)
        if rank is None:
            return
        sent = torch.zeros(max(lengths), dtype=torch.uint8)
        sent[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
        told = bytes(self.gathered(sent)[rank][: lengths[rank]].tolist()).decode(errors="replace")
        message = f"rank {rank} of {self.size}: {told[1:]}"
        raise (ValueError if told[0] == "V" else RuntimeError)(message) from failure


def _device() -> torch.device:
    """Where the group's backend takes tensors: NCCL on its GPU only, Gloo where every build can, on the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")
