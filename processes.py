"""The processes that train or test one network together, as torchrun starts them:

    torchrun --nproc-per-node 8 train_img.py --expname NAME IMAGENET_FOLDER

Each takes its share of every batch; what they have to agree on goes through torch.distributed, gloo between CPUs and
NCCL between GPUs. A process on its own is a world of one, which communicates with nobody.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """All the processes, seen from one of them. Its methods are collective: every process has to call them.

    Attributes:
        rank: number of this process, from 0.
        size: W, the number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that prints, writes and plots."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's part of `count` items, as torch.tensor_split divides them; no communication."""
        each, more = divmod(count, self.size)
        start = self.rank * each + min(self.rank, more)
        return slice(start, start + each + (self.rank < more))

    def total(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The sums over the processes of all tensors, which must be of one dtype, in a single all-reduce."""
        if self.size == 1:
            return values
        flat = torch.cat([value.flatten() for value in values.values()])
        dist.all_reduce(flat)
        parts = flat.split([value.numel() for value in values.values()])
        return {name: part.view_as(value) for (name, value), part in zip(values.items(), parts, strict=True)}

    def agree(self, *numbers: int) -> list[int]:
        """The highest of each number over the processes. It waits for them, but not for a GPU's pending work."""
        if self.size == 1:
            return list(numbers)
        highest = torch.tensor(numbers, dtype=torch.long)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        return highest.tolist()

    def gather(self, values: Tensor) -> Tensor:
        """The values (n, ...) of all processes behind each other, where they may differ in n."""
        if self.size == 1:
            return values
        parts: list[Tensor] = [values] * self.size
        dist.all_gather_object(parts, values.cpu())
        return torch.cat(parts).to(values.device)

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """Lets the leading process through the block before the others."""
        if not self.leads:
            self.agree(0)
        yield
        if self.leads:
            self.agree(0)


ALONE = World()


def world() -> World:
    """The processes that this one has joined."""
    return World(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else ALONE


def local_rank() -> int:
    """The number of this process on its machine, and of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_size() -> int:
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


class Failures:
    """Which process reports why the job ends. Those that fail because another did stay silent."""

    def __init__(self, store: dist.Store | None = None) -> None:
        self.store = store

    def first(self) -> bool:
        """Whether this process is the first to fail, and marks it as failed."""
        try:
            return self.store is None or self.store.add("failed", 1) == 1
        except dist.DistError:  # torchrun, which keeps the store, is gone
            return world().leads


@contextmanager
def joined() -> Iterator[Failures]:
    """Joins the other processes, if torchrun started this one."""
    if not dist.is_torchelastic_launched():
        yield Failures()
        return
    store, rank, size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=rank, world_size=size)
    yield Failures(store)
    # not after an error: the others may be waiting in a collective, and torchrun ends them
    dist.destroy_process_group()
