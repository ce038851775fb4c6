"""What a training step costs: AIG and the same net without gates, in several ways, and the original's way.

    python -m benchmarks.train_step
    python -m benchmarks.train_step --depth 20 --ways eager compile
    python -m benchmarks.train_step --profile              # where the time goes, by operator
    python -m benchmarks.train_step --images 10000         # the input pipeline, too

All contenders run interleaved in one process. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from aig.console import number, run_command
from aig.data import DATASETS, SmallImageLoader, SmallImages
from aig.engine import Recipe
from aig.environment import keep_memory, select_device
from benchmarks.reference import Reference, target_rate_loss
from benchmarks.timing import interleaved, training_step, where
from convnet_aig import BasicBlock, ResNet_cifar
from train import depth

TARGET, LOSSFACT, LR = 0.6, 2.0, 0.1
PROFILED = 5  # steps
WAYS = {  # attributes of the recipe
    "eager": {},
    "contiguous": {"channels_last": False},
    "fused": {"fused": True},
    "bf16": {"amp": "bf16"},
    "compile": {"compile": True},
    "compile-bf16": {"compile": True, "amp": "bf16"},
}


def ours(blocks: int, target: float, images: torch.Tensor, labels: torch.Tensor, **way: Any) -> Callable[[], object]:
    """A training step of this repository, done one of the WAYS; without gates at target 1."""
    rates = [target] * (3 * blocks)
    layout = torch.channels_last if way.get("channels_last", True) else torch.contiguous_format
    model = ResNet_cifar(BasicBlock, (blocks,) * 3, target_rates=rates).to(images.device, memory_format=layout).train()
    images = images.to(memory_format=layout)
    recipe = Recipe(rates, LOSSFACT, LR, milestones=(), epochs=1, last=1, seed=1, weight_decay=5e-4, **way)
    return training_step(model, recipe, images, labels, len(images))[0]


def original(blocks: int, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], object]:
    """A training step in the original's way."""
    model = Reference(ResNet_cifar(BasicBlock, (blocks,) * 3)).to(images.device).train()
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        logits, gates = model(images)
        loss = F.cross_entropy(logits, labels) + LOSSFACT * target_rate_loss(gates, TARGET)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


class PilImages(Dataset):
    """Images as torchvision's CIFAR10 keeps and transforms them."""

    def __init__(self, images: SmallImages) -> None:
        mean, std = DATASETS["cifar10"].statistics
        self.images, self.labels = images.images.numpy(), images.labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def input_pipelines(count: int, batch_size: int, device: torch.device, repeats: int = 3) -> dict[str, float]:
    """Best images/s over one epoch of `count` random images: ours, and PIL transforms in 2 DataLoader workers."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8, generator=random)
    source = SmallImages(images, torch.randint(10, (count,), generator=random), [str(k) for k in range(10)])
    loader = SmallImageLoader(source, batch_size, DATASETS["cifar10"].statistics, augment="crop+flip", device=device)
    workers = DataLoader(PilImages(source), batch_size, shuffle=True, num_workers=2, persistent_workers=True)

    def rate(batches: Callable[[], object]) -> float:
        start = time.perf_counter()
        for batch, _ in batches():
            batch.to(device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return count / (time.perf_counter() - start)

    iter(workers)  # starts the workers
    rates = [(rate(loader.batches), rate(lambda: workers)) for _ in range(repeats)]
    best_ours, best_torchvision = map(max, zip(*rates, strict=True))
    return {"ours": best_ours, "torchvision": best_torchvision}


def by_operator(step: Callable[[], object], device: torch.device) -> dict[str, tuple[float, float]]:
    """Milliseconds and calls per step of each operator, without those it calls."""
    step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        for _ in range(PROFILED):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    column = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    found = profiler.key_averages()
    return {each.key: (getattr(each, column) / PROFILED / 1e3, each.count / PROFILED) for each in found}


def print_profile(gated: dict[str, tuple[float, float]], plain: dict[str, tuple[float, float]], rows: int = 25) -> None:
    """The operators that take longest with gates, beside the same without."""
    none = (0.0, 0.0)
    total, plain_total = (sum(ms for ms, _ in each.values()) for each in (gated, plain))
    print(f"{'operator':56}{'AIG: ms':>9}{'%':>6}{'calls':>7}{'without gates: ms':>19}{'calls':>7}{'more ms':>9}")
    for name in sorted(gated, key=gated.get, reverse=True)[:rows]:
        (ms, calls), (plain_ms, plain_calls) = gated[name], plain.get(name, none)
        print(f"{name[:55]:56}{ms:9.1f}{100 * ms / total:6.1f}{calls:7.0f}{plain_ms:19.1f}{plain_calls:7.0f}", end="")
        print(f"{ms - plain_ms:9.1f}")
    print(f"{'all':56}{total:9.1f}{100:6.1f}{'':7}{plain_total:19.1f}{'':7}{total - plain_total:9.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--depth", type=depth, default=110)
    parser.add_argument("--batch-size", type=number(int, 2), default=128)
    parser.add_argument("--rounds", type=number(int, 1), default=15)
    parser.add_argument("--ways", nargs="+", default=["eager"], choices=WAYS)
    parser.add_argument("--profile", action="store_true", help="time by operator instead, of the first of the ways")
    parser.add_argument("--images", type=number(int, 0), default=0, help="of the input pipelines")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    args = parser.parse_args()
    device = select_device(args.device)
    if device.type == "cpu":
        keep_memory()  # as training does
    blocks = (args.depth - 2) // 6
    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, 32, 32, device=device)
    labels = torch.randint(10, (args.batch_size,), device=device)
    print(f"training step, ResNet-{args.depth}, batch {args.batch_size}, {args.rounds} rounds; {where(device)}\n")
    if args.profile:
        way = WAYS[args.ways[0]]
        profiles = (by_operator(ours(blocks, target, images, labels, **way), device) for target in (TARGET, 1.0))
        print_profile(*profiles)
        return
    steps, first = {}, {}
    for way in args.ways:
        for name, target in ((f"AIG, {way}", TARGET), (f"without gates, {way}", 1.0)):
            steps[name] = ours(blocks, target, images, labels, **WAYS[way])
            start = time.perf_counter()
            steps[name]()  # compiles
            first[name] = time.perf_counter() - start
    steps["original's way"] = yardstick = original(blocks, images, labels)
    yardstick()
    seconds = interleaved(steps, args.rounds, device)
    reference = seconds["original's way"]

    def ratios(over: list[float], under: list[float]) -> tuple[float, float]:
        """Of the best times, and the median of the ratios by round, in which drift of the machine cancels."""
        return min(over) / min(under), statistics.median(a / b for a, b in zip(over, under, strict=True))

    results = {}
    print(f"{'':29}{'best s':>8}{'median':>8}{'images/s':>10}{'x the original: best':>22}{'by round':>9}", end="")
    print(f"{'/ without gates: best':>23}{'by round':>9}{'first step, s':>15}")
    for name, times in seconds.items():
        faster, slower = ratios(reference, times), None
        print(f"{name:29}{min(times):8.4f}{statistics.median(times):8.4f}{args.batch_size / min(times):10.0f}", end="")
        print(f"{faster[0]:22.3f}{faster[1]:9.3f}", end="")
        if name.startswith("AIG"):
            slower = ratios(times, seconds[name.replace("AIG", "without gates")])
            print(f"{slower[0]:23.3f}{slower[1]:9.3f}", end="")
        print(f"{'':{0 if slower else 32}}{first[name]:15.1f}" if name in first else "")
        results[name] = {"seconds": times, "x_original": faster, "over_plain": slower, "first_step_s": first.get(name)}
    pipelines = input_pipelines(args.images, args.batch_size, device) if args.images else None
    if pipelines:
        ratio = pipelines["ours"] / pipelines["torchvision"]
        print(f"\ninput pipeline: {pipelines['ours']:,.0f} images/s, torchvision's PIL transforms in 2 workers "
              f"{pipelines['torchvision']:,.0f} images/s, ratio {ratio:.1f}")
    print("\n" + json.dumps({"depth": args.depth, "batch_size": args.batch_size, "device": where(device),
                             "input_images_per_s": pipelines, "steps": results}))


if __name__ == "__main__":
    run_command(main, "train_step")
