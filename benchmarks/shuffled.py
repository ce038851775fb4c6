"""What deciding by the image is worth: the error of a gated network with its own graphs, and with those of others.

    python -m benchmarks.shuffled MODEL --data DIR --budget 0.6    # DIR holds test/, with a folder per class

Every image runs the graph that the gates choose for another image, dealt out at random. The weights are the same, every
graph runs as often as before, so the cost is the same, but nothing is decided by the image. The difference is what
deciding is worth to this network, whose weights were trained with its own graphs. For networks trained without
deciding, see the `majority` arms of benchmarks.pays.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import aig
from aig.console import InputError, Parser, number, run_command
from aig.images import read_image
from benchmarks.latency import CERTAIN, Forced
from convnet_aig import AdaptiveResNet

BATCH = 500


def read_test_images(model: AdaptiveResNet, folder: Path) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W) as the network takes them, and labels (N,). Raises InputError if a class has none."""
    files = [(path, label) for label, name in enumerate(model.classes) for path in sorted((folder / name).glob("*.*"))]
    if len({label for _, label in files}) < len(model.classes):
        raise InputError(f"{folder} must have a folder with images for each of {', '.join(model.classes)}")
    images = [model.preprocess(read_image(path)) for path, _ in tqdm(files, "images", disable=None, leave=False)]
    return torch.stack(images), torch.tensor([label for _, label in files])


def errors(model: AdaptiveResNet, images: Tensor, labels: Tensor, draws: int) -> tuple[Tensor, float, list[float]]:
    """Graphs (N, gates) of the images; the error in percent with these, and with the graphs of other images."""
    network, gated = Forced(model), torch.tensor([block.gated for block in model.blocks()])

    def error(graphs: Tensor) -> float:
        wrong = 0
        for x, target, opened in zip(images.split(BATCH), labels.split(BATCH), graphs.split(BATCH), strict=True):
            network.pattern = torch.where(opened.t(), CERTAIN, -CERTAIN)
            wrong += (network(x)[0].argmax(1) != target).sum().item()
        return 100 * wrong / len(labels)

    decide, random = aig.accelerate(model), torch.Generator().manual_seed(0)
    graphs = torch.cat([torch.stack(decide(x)[1], 1)[:, gated] > 0 for x in images.split(BATCH)])
    orders = [torch.randperm(len(graphs), generator=random) for _ in range(draws)]
    dealt = [error(graphs[order]) for order in tqdm(orders, "draws", disable=None, leave=False)]
    return graphs, error(graphs), dealt


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="of the network, as aig.load takes it")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="holds test/, a folder per class")
    parser.add_argument("--budget", type=number(float, above=0, below=1), metavar="B", help="use its thresholds")
    parser.add_argument("--draws", type=number(int, 2), default=10, help="how often graphs are dealt out")
    args = parser.parse_args(argv)
    model = aig.load(args.model, args.budget)
    images, labels = read_test_images(model, args.data / "test")
    with torch.inference_mode():
        graphs, own, dealt = errors(model, images, labels, args.draws)
    rates = ", ".join(f"{rate:.3f}" for rate in graphs.double().mean(0))
    print(f"{args.model}: {len(labels)} test images, gates open for {rates} of them")
    print(f"error with their own graphs           {own:.2f} %")
    spread = f"{min(dealt):.2f} to {max(dealt):.2f} in {len(dealt)} draws"
    print(f"error with the graphs of other images {statistics.fmean(dealt):.2f} % ({spread})")


if __name__ == "__main__":
    run_command(main, "shuffled")
