"""What several processes make of a training step: time with and without communication, and bytes all-reduced.

    OMP_NUM_THREADS=1 python -m benchmarks.scaling                                        # one process
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m benchmarks.scaling                   # two share the batch
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m benchmarks.scaling --batch-size 256  # twice the batch

The batch is that of all processes together, as in training.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import nullcontext

import torch

from aig import distributed
from aig.console import number
from aig.engine import Recipe
from aig.environment import keep_memory, select_device
from benchmarks.timing import WARM_UP, training_step, where
from convnet_aig import BasicBlock, ResNet_cifar
from train import depth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--depth", type=depth, default=110)
    parser.add_argument("--batch-size", type=number(int, 2), default=128, help="of all processes together")
    parser.add_argument("--steps", type=number(int, 1), default=10)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    args = parser.parse_args()
    with distributed.joined():
        measure(args)


def measure(args: argparse.Namespace) -> None:
    world, device = distributed.world(), select_device(args.device)
    if device.type == "cpu":
        keep_memory()
    torch.manual_seed(0)
    blocks = (args.depth - 2) // 6
    rates = [0.6] * (3 * blocks)
    model = ResNet_cifar(BasicBlock, (blocks,) * 3, target_rates=rates)
    model = model.to(device, memory_format=torch.channels_last)
    recipe = Recipe(rates, lossfact=2, lr=0.1, milestones=(), epochs=1, last=1, seed=1)
    share = len(range(args.batch_size)[world.shard(args.batch_size)])
    images, labels = torch.randn(share, 3, 32, 32, device=device), torch.randint(10, (share,), device=device)
    step, network = training_step(model, recipe, images, labels, args.batch_size)
    seconds: dict[str, list[float]] = {"all": [], "gradients not all-reduced": []}
    for turn in range(WARM_UP + args.steps):
        for name, times in seconds.items():
            world.all_max(0)  # everybody starts at once
            start = time.perf_counter()
            with nullcontext() if name == "all" or world.size == 1 else network.no_sync():
                step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= WARM_UP:
                times.append(time.perf_counter() - start)
    if world.is_main:
        gradients = sum(p.numel() * p.element_size() for p in model.parameters())
        totals = 8 * (len(rates) + 2 + len(recipe.topk))  # gate sums, images, cross entropy, hits, in float64
        best, median = ([of(times) for times in seconds.values()] for of in (min, statistics.median))
        print(f"AIG-{args.depth}, batch {args.batch_size}, {world.size} process(es), {where(device)}: "
              f"step {best[0]:.3f} s (median {median[0]:.3f}), {args.batch_size / best[0]:.0f} images/s; "
              f"gradients not all-reduced {best[1]:.3f} s (median {median[1]:.3f}); "
              f"all-reduced: {gradients / 2**20:.2f} MiB of gradients, {totals} bytes of sums")


if __name__ == "__main__":
    main()
