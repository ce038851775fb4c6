"""The processes that train or test one network together, as torchrun starts them:

    torchrun --nproc-per-node 8 train_img.py --expname NAME IMAGENET_FOLDER

Each takes its share of every batch; what they have to agree on goes through torch.distributed, gloo between CPUs and
NCCL between GPUs. A process on its own is a world of one, which communicates with nobody.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class World:
    """All the processes, seen from one of them. Its methods are collective: every process has to call them."""

    rank: int = 0  # number of this process
    size: int = 1  # W, the number of processes

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that prints, writes and plots."""
        return self.rank == 0

    def shard(self, count: int) -> slice:
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

    def all_max(self, *numbers: int) -> list[int]:
        """The highest of each number over the processes. It waits for them, but not for a GPU's pending work."""
        if self.size == 1:
            return list(numbers)
        highest = torch.tensor(numbers, dtype=torch.long)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        return highest.tolist()

    def gather(self, values: Tensor) -> Tensor:
        """The values (n, ...) of all processes, concatenated; n may differ."""
        if self.size == 1:
            return values
        parts: list[Tensor] = [values] * self.size
        dist.all_gather_object(parts, values.cpu())
        return torch.cat(parts).to(values.device)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Lets the main process through the block before the others."""
        if not self.is_main:
            self.all_max(0)
        yield
        if self.is_main:
            self.all_max(0)


ALONE = World()


def world() -> World:
    """The processes that this one has joined."""
    return World(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else ALONE


def wrap(model: nn.Module, world: World, sync_bn: bool, mode: str | None) -> tuple[nn.Module, nn.Module]:
    """The network as training calls it: in DistributedDataParallel for several processes; the same, compiled.

    `mode` is torch.compile's, None to leave it as it is.
    """
    network, device = model, next(model.parameters()).device
    if world.size > 1:
        if sync_bn:
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the new name of broadcast_buffers is too new to use
            network = DistributedDataParallel(
                model,
                device_ids=None if device.type == "cpu" else [device],
                broadcast_buffers=False,  # `average_batchnorm` averages them, when someone is to use them
                gradient_as_bucket_view=True,
            )
    # one graph for one shape: the smaller batch at the end of an epoch is not worth another
    return network, torch.compile(network, dynamic=False, mode=mode) if mode else network


def compile_mode(device_type: str, accumulate: int, world: World) -> str:
    """The mode of torch.compile: where possible, one that records CUDA graphs.

    They do not go with `accumulate`, since a replay would write over the gradients that the parts add up. With several
    processes, DistributedDataParallel cuts the graph up; nobody has tried that.
    """
    graphs = device_type == "cuda" and accumulate == 1 and world.size == 1
    return "reduce-overhead" if graphs else "default"


def batch_parts(
    network: nn.Module, images: Tensor, labels: Tensor, noise: Tensor, parts: int
) -> Iterator[list[Tensor]]:
    """The parts in which a batch is computed to save memory; processes exchange gradients after the last one only."""
    distributed = isinstance(network, DistributedDataParallel)
    pieces = zip(images.tensor_split(parts), labels.tensor_split(parts), noise.tensor_split(parts, 1), strict=True)
    for number, piece in enumerate(pieces, start=1):
        with network.no_sync() if distributed and number < parts else nullcontext():
            yield list(piece)


def average_batchnorm(model: nn.Module, world: World) -> None:
    """Gives every process the mean of all processes' BatchNorm statistics, which each keeps of its own images."""
    if world.size > 1:
        statistics = {name: value for name, value in model.named_buffers() if value.is_floating_point()}
        for name, total in world.total(statistics).items():
            statistics[name].copy_(total / world.size)


class Failures:
    """Which process reports why the job ends. Those that fail because another did stay silent."""

    def __init__(self, store: dist.Store | None = None) -> None:
        self.store = store

    def first(self) -> bool:
        """Whether this process is the first to fail, and marks it as failed."""
        try:
            return self.store is None or self.store.add("failed", 1) == 1
        except dist.DistError:  # torchrun, which keeps the store, is gone
            return world().is_main


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
