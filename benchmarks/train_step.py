"""What a training step costs: AIG and the same net without gates, in several ways, and the original's way.

    python -m benchmarks.train_step
    python -m benchmarks.train_step --depth 20 --ways eager compile
    python -m benchmarks.train_step --arch resnet50 --batch-size 32 --counts   # peak memory and kernels, too
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
from functools import partial

import torch
import torch.nn.functional as F
from PIL import Image
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from aig.console import number, run_command
from aig.data import DATASETS, SmallImageLoader, SmallImages
from aig.engine import Recipe
from aig.environment import keep_memory, select_device
from benchmarks.reference import Reference, target_rate_loss
from benchmarks.timing import interleaved, training_step, where
from convnet_aig import ARCHS, AdaptiveResNet, BasicBlock, ResNet_cifar, make_resnet
from train import depth

TARGET, LOSSFACT, LR = 0.6, 2.0, 0.1
PROFILED = 5  # steps
ORIGINAL = "original's way"
WAYS = {  # attributes of the recipe
    "eager": {},
    "contiguous": {"channels_last": False},
    "fused": {"fused": True},
    "bf16": {"amp": "bf16"},
    "compile": {"compile": True},
    "compile-bf16": {"compile": True, "amp": "bf16"},
    "graphs": {"compile": True},
    "graphs-bf16": {"compile": True, "amp": "bf16"},
}
MODES = {"compile": "default", "graphs": "reduce-overhead"}  # of torch.compile; the second records CUDA graphs


def build(args: argparse.Namespace, target: float = TARGET) -> AdaptiveResNet:
    """The network of the flags, every block at the same target rate: without gates at 1."""
    if args.arch:
        return make_resnet(args.arch, target_rates=[target] * sum(ARCHS[args.arch][1]))
    blocks = (args.depth - 2) // 6
    return ResNet_cifar(BasicBlock, (blocks,) * 3, target_rates=[target] * (3 * blocks))


def ours(model: AdaptiveResNet, images: torch.Tensor, labels: torch.Tensor, way: str) -> Callable[[], object]:
    """A training step of this repository, done one of the WAYS."""
    recipe = Recipe(model.target_rates, LOSSFACT, LR, milestones=(), epochs=1, last=1, seed=1, weight_decay=5e-4,
                    **WAYS[way])
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    model, images = model.to(images.device, memory_format=layout).train(), images.to(memory_format=layout)
    return training_step(model, recipe, images, labels, len(images), MODES.get(way.split("-")[0]))[0]


def original(model: AdaptiveResNet, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], object]:
    """A training step in the original's way."""
    model = Reference(model).to(images.device).train()
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


def profiled(step: Callable[[], object], device: torch.device) -> EventList:
    """What PROFILED steps call, by operator and by kernel."""
    step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        for _ in range(PROFILED):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return profiler.key_averages()


def by_operator(step: Callable[[], object], device: torch.device) -> dict[str, tuple[float, float]]:
    """Milliseconds and calls per step of each operator, without those it calls."""
    column = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    found = profiled(step, device)
    return {each.key: (getattr(each, column) / PROFILED / 1e3, each.count / PROFILED) for each in found}


def counts(step: Callable[[], object], device: torch.device, before: int) -> dict[str, float | None]:
    """Of a step: peak MiB above `before` bytes, kernels, and launches by the host, of which a CUDA graph is one.

    On a CPU, which has neither of these, `kernels` counts calls of operators.
    """
    if device.type != "cuda":
        found = profiled(step, device)
        return {"peak_mib": None, "kernels": sum(each.count for each in found) / PROFILED, "launches": None}
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    found = profiled(step, device)
    launches = sum(each.count for each in found if "Launch" in each.key and each.key.startswith("cu"))
    kernels = sum(each.count for each in found if each.device_type == DeviceType.CUDA)
    return {"peak_mib": peak, "kernels": kernels / PROFILED, "launches": launches / PROFILED}


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


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--depth", type=depth, default=110)
    parser.add_argument("--arch", choices=ARCHS, help="a network for photographs instead")
    parser.add_argument("--image-size", type=number(int, 32), help="default: 32, and 224 with --arch")
    parser.add_argument("--batch-size", type=number(int, 2), default=128)
    parser.add_argument("--rounds", type=number(int, 1), default=15)
    parser.add_argument("--ways", nargs="+", default=["eager"], choices=WAYS)
    parser.add_argument("--tf32", action=argparse.BooleanOptionalAction, help="as of train.py, for all contenders")
    parser.add_argument("--counts", action="store_true", help="peak memory and kernels of a step, too")
    parser.add_argument("--profile", action="store_true", help="time by operator instead, of the first of the ways")
    parser.add_argument("--images", type=number(int, 0), default=0, help="of the input pipelines")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    return parser.parse_args()


def prepare(args: argparse.Namespace) -> torch.device:
    """The device, set up as for a training."""
    device = select_device(args.device)
    if device.type == "cpu":
        keep_memory()
    torch.backends.cudnn.benchmark = True
    if args.tf32 is not None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    torch.manual_seed(0)
    return device


def print_rows(seconds: dict[str, list[float]], first: dict[str, float], batch_size: int) -> dict[str, dict]:
    """Prints the table and returns what is in it."""

    def ratios(over: list[float], under: list[float]) -> tuple[float, float]:
        """Of the best times, and the median of the ratios by round, in which drift of the machine cancels."""
        return min(over) / min(under), statistics.median(a / b for a, b in zip(over, under, strict=True))

    results, reference = {}, seconds[ORIGINAL]
    print(f"{'':29}{'best s':>8}{'median':>8}{'images/s':>10}{'x the original: best':>22}{'by round':>9}", end="")
    print(f"{'/ without gates: best':>23}{'by round':>9}{'first step, s':>15}")
    for name, times in seconds.items():
        faster, slower = ratios(reference, times), None
        print(f"{name:29}{min(times):8.4f}{statistics.median(times):8.4f}{batch_size / min(times):10.0f}", end="")
        print(f"{faster[0]:22.3f}{faster[1]:9.3f}", end="")
        if name.startswith("AIG"):
            slower = ratios(times, seconds[name.replace("AIG", "without gates")])
            print(f"{slower[0]:23.3f}{slower[1]:9.3f}", end="")
        print(f"{'':{0 if slower else 32}}{first[name]:15.1f}" if name in first else "")
        results[name] = {"seconds": times, "x_original": faster, "over_plain": slower, "first_step_s": first.get(name)}
    return results


def main() -> None:
    args = parse()
    device = prepare(args)
    size = args.image_size or (224 if args.arch else 32)
    images = torch.randn(args.batch_size, 3, size, size, device=device)
    labels = torch.randint(10, (args.batch_size,), device=device)
    net = args.arch or f"ResNet-{args.depth}"
    print(f"training step, {net}, batch {args.batch_size}, {args.rounds} rounds; {where(device)}\n")
    if args.profile:
        steps = [ours(build(args, target), images, labels, args.ways[0]) for target in (TARGET, 1.0)]
        print_profile(*(by_operator(step, device) for step in steps))
        return
    contenders: dict[str, Callable[[], Callable[[], object]]] = {}
    for way in args.ways:
        for name, target in ((f"AIG, {way}", TARGET), (f"without gates, {way}", 1.0)):
            contenders[name] = partial(lambda target, way: ours(build(args, target), images, labels, way), target, way)
    contenders[ORIGINAL] = lambda: original(build(args), images, labels)
    steps, first, counted = {}, {}, {}
    for name, make in contenders.items():
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        steps[name], start = make(), time.perf_counter()
        steps[name]()  # compiles
        if name != ORIGINAL:
            first[name] = time.perf_counter() - start
        counted[name] = counts(steps[name], device, before) if args.counts else {}
    seconds = interleaved(steps, args.rounds, device)
    results = print_rows(seconds, first, args.batch_size)
    results = {name: row | counted[name] for name, row in results.items()}
    pipelines = input_pipelines(args.images, args.batch_size, device) if args.images else None
    if pipelines:
        ratio = pipelines["ours"] / pipelines["torchvision"]
        print(f"\ninput pipeline: {pipelines['ours']:,.0f} images/s, torchvision's PIL transforms in 2 workers "
              f"{pipelines['torchvision']:,.0f} images/s, ratio {ratio:.1f}")
    print("\n" + json.dumps({"net": net, "batch_size": args.batch_size, "device": where(device),
                             "input_images_per_s": pipelines, "steps": results}))


if __name__ == "__main__":
    run_command(main, "train_step")
