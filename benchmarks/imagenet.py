"""What the schedules cost in memory, and how fast photographs are loaded.

    python -m benchmarks.imagenet IMAGENET_FOLDER

Memory: bytes that one training step of AIG-50 saves for the backward pass, under the schedules `uniform` and `paper`
(saved-tensor hooks, each storage once, parameters not counted), and the plain ResNet-50. Loading: images/s of our
loader and of torchvision's usual one, interleaved. Prints two tables and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from aig.console import number, run_command
from aig.data import IMAGENET_STATISTICS, PhotoLoader, open_image_folder
from aig.losses import target_rate_loss
from benchmarks.timing import where as machine
from convnet_aig import make_resnet
from train_img import target_rates_of


def saved_bytes(schedule: str, batch_size: int, size: int) -> int:
    """Bytes of distinct storages that the forward pass of a training step keeps for the backward pass."""
    torch.manual_seed(0)
    rates = target_rates_of(schedule, "resnet50", 0.5)
    model = make_resnet("resnet50", 1000, rates).to(memory_format=torch.channels_last).train()
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = torch.randn(batch_size, 3, size, size).to(memory_format=torch.channels_last)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits, gates = model(images)
        opened = torch.stack(gates, 1).mean(0)
        loss = F.cross_entropy(logits, torch.zeros(batch_size).long()) + target_rate_loss(opened, torch.tensor(rates))
    del loss
    return sum(saved.values())


def torchvision_loader(folder: Path, batch_size: int, size: int, workers: int) -> DataLoader:
    """The loader of the PyTorch ImageNet example: float images from the workers."""
    mean, std = IMAGENET_STATISTICS
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
    return DataLoader(datasets.ImageFolder(folder, transform), batch_size, shuffle=True, num_workers=workers)


def images_per_second(batches: Iterable) -> float:
    start, count = time.perf_counter(), 0
    for images, _ in batches:
        count += len(images.to(memory_format=torch.channels_last))
    return count / (time.perf_counter() - start)


def loading(folder: Path, batch_size: int, size: int, workers: list[int], repeats: int) -> dict[str, dict[int, float]]:
    """Best images/s over `repeats` epochs, by number of workers; the first epoch, which starts workers, not counted."""
    results: dict[str, dict[int, float]] = {"ours": {}, "torchvision": {}}
    for count in workers:
        ours = PhotoLoader(open_image_folder(folder), batch_size, augment=True, size=size, workers=count)
        usual = torchvision_loader(folder, batch_size, size, count)
        rates = [(images_per_second(ours.batches(epoch)), images_per_second(usual)) for epoch in range(repeats + 1)]
        results["ours"][count], results["torchvision"][count] = map(max, zip(*rates[1:], strict=True))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, metavar="DIR", help="holds train/, a folder per class inside")
    parser.add_argument("--batch-size", type=number(int, 2), default=32)
    parser.add_argument("--image-size", type=number(int, 32), default=224)
    parser.add_argument("--repeats", type=number(int, 1), default=3)
    args = parser.parse_args()

    plain = ",".join(["1"] * 16)
    schedules = {"uniform": "uniform", "paper": "paper", "without gates": plain}
    memory = {name: saved_bytes(value, args.batch_size, args.image_size) for name, value in schedules.items()}
    rates = loading(args.data / "train", args.batch_size, args.image_size, [0, 1, 2], args.repeats)

    where = f"{machine(torch.device('cpu'))}, torchvision {torchvision.__version__}"
    print(f"saved for backward, AIG-50, batch {args.batch_size}, {args.image_size} px, float32; {where}\n")
    for name, size in memory.items():
        print(f"  {name:15}{size / 2**20:9.1f} MiB{size / memory['uniform']:8.3f} of uniform")
    print(f"\nloading {args.data}/train, images/s\n\n  workers{'ours':>10}{'torchvision':>14}{'ratio':>8}")
    for count, rate in rates["ours"].items():
        usual = rates["torchvision"][count]
        print(f"  {count:7}{rate:10.0f}{usual:14.0f}{rate / usual:8.2f}")
    print("\n" + json.dumps({"batch_size": args.batch_size, "image_size": args.image_size, "where": where,
                             "saved_bytes": memory, "images_per_second": rates}))


if __name__ == "__main__":
    run_command(main, "imagenet")
