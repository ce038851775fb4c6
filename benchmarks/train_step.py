"""What a training step costs: AIG, the same net without gates, and the original's way; and the input pipeline.

    python -m benchmarks.train_step

All contenders run interleaved in one process. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import utils
from benchmarks.reference import Reference, target_rate_loss
from benchmarks.timing import interleaved, where
from cli import number
from convnet_aig import BasicBlock, ResNet_cifar
from data import CIFAR, SmallImageLoader, SmallImages
from engine import Recipe, train_step
from train import depth

TARGET, LOSSFACT, LR = 0.6, 2.0, 0.1


def ours(blocks: int, target: float, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], object]:
    """A training step of this repository; without gates at target 1."""
    rates = [target] * (3 * blocks)
    model = ResNet_cifar(BasicBlock, (blocks,) * 3, target_rates=rates).to(images.device)
    model = model.to(memory_format=torch.channels_last).train()
    images = images.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=5e-4)
    recipe = Recipe(target_rates=rates, lossfact=LOSSFACT, lr=LR, milestones=(), epochs=1, seed=1)
    rates = torch.tensor(rates, device=images.device)
    return lambda: train_step(model, optimizer, images, labels, rates, recipe)


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
        mean, std = CIFAR["cifar10"][1]
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
    loader = SmallImageLoader(source, batch_size, CIFAR["cifar10"][1], augment="crop+flip", device=device)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--depth", type=depth, default=110)
    parser.add_argument("--batch-size", type=number(int, 2), default=128)
    parser.add_argument("--rounds", type=number(int, 1), default=15)
    parser.add_argument("--images", type=number(int, 1), default=10_000, help="of the input pipelines")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    args = parser.parse_args()
    device = utils.select_device(args.device)
    blocks = (args.depth - 2) // 6
    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, 32, 32, device=device)
    labels = torch.randint(10, (args.batch_size,), device=device)
    contenders = {
        "AIG": ours(blocks, TARGET, images, labels),
        "without gates": ours(blocks, 1.0, images, labels),
        "original's way": original(blocks, images, labels),
    }
    seconds = interleaved(contenders, args.rounds, device)
    best = {name: min(times) for name, times in seconds.items()}
    median = {name: statistics.median(times) for name, times in seconds.items()}
    pairs = {name: [a / b for a, b in zip(seconds["AIG"], seconds[name], strict=True)] for name in contenders}
    by_round = {name: statistics.median(ratios) for name, ratios in pairs.items()}  # drift of the machine cancels
    pipelines = input_pipelines(args.images, args.batch_size, device)

    print(f"training step, ResNet-{args.depth}, batch {args.batch_size}, float32, {args.rounds} rounds; "
          f"{where(device)}\n")
    print(f"{'':16}{'best s':>10}{'median s':>10}{'images/s':>10}{'AIG / it, best':>16}{'by round':>10}")
    for name in contenders:
        print(f"{name:16}{best[name]:10.4f}{median[name]:10.4f}{args.batch_size / best[name]:10.0f}", end="")
        print(f"{best['AIG'] / best[name]:16.3f}{by_round[name]:10.3f}")
    ratio = pipelines["ours"] / pipelines["torchvision"]
    print(f"\ninput pipeline: {pipelines['ours']:,.0f} images/s, torchvision's PIL transforms in 2 workers "
          f"{pipelines['torchvision']:,.0f} images/s, ratio {ratio:.1f}\n")
    print(json.dumps({"depth": args.depth, "batch_size": args.batch_size, "rounds": args.rounds,
                      "device": where(device), "best_s": best, "median_s": median,
                      "ratio_by_round": by_round, "input_images_per_s": pipelines}))


if __name__ == "__main__":
    main()
