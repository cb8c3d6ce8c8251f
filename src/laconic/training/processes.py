"""Several processes that train one model, as `torchrun` starts them.

Each process computes some of the batches of a step. Gradients are summed over all of them, and so
are the moments of batch normalisation (`normalization.py`), so the result is that of one process
that goes through the same batches one after the other.
"""

import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process among those that train together.

    Attributes:
        rank: its number, from 0.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> "Processes":
        """Those of `torch.distributed`'s default group; one process where there is none."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    @torch.no_grad()
    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all processes; one message per dtype."""
        if self.count == 1:
            return
        for dtype in sorted({t.dtype for t in tensors}, key=str):
            same = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.reshape(-1) for t in same])
            dist.all_reduce(flat)
            for tensor, part in zip(same, flat.split([t.numel() for t in same]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    @torch.no_grad()
    def same_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by those of the first process."""
        if self.count == 1:
            return
        for tensor in tensors:
            held = tensor.contiguous()
            dist.broadcast(held, 0)
            tensor.copy_(held)

    def agree(self, value: float) -> float:
        """The first process's number."""
        held = torch.tensor([value], dtype=torch.float64)
        self.same_([held])
        return float(held)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def joined() -> Generator[Processes, None, None]:
    """Join the processes that `torchrun` started, for the length of a `with` block.

    For programs that are run by `torchrun`: it tells each process its place in the environment.
    Without it this is one process alone.
    """
    if dist.is_initialized() or "WORLD_SIZE" not in os.environ:
        yield Processes.current()
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Processes.current()
    finally:
        dist.destroy_process_group()
