"""Trains and evaluates ConvNet-AIG on small images, by default ResNet-110 on CIFAR-10 as in the paper.

    python train.py --expname NAME
    python train.py --test --resume runs/NAME

This script holds values only: the training loop is in `aig.engine`, the flags of both scripts in `utils`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

import utils
from aig.checkpoint import recorded
from aig.console import Parser, number, run_command
from aig.data import DATASETS
from aig.environment import derive_seed
from convnet_aig import GATE_LAYERS, BasicBlock, ResNet_cifar

MILESTONES, EPOCHS = (150, 250), 350  # of the paper's schedule


def make_parser() -> Parser:
    parser = utils.make_parser(
        __doc__.split("\n")[0],
        expname="give_me_a_name_cifar",
        epochs=EPOCHS,
        weight_decay=5e-4,
        target=0.6,
        lossfact=2,
        print_freq=25,
    )
    images = parser.add_argument_group("images and network")
    images.add_argument("--dataset", default="cifar10", choices=DATASETS, help="what to train on")
    images.add_argument("--data", default="data", metavar="DIR", help="where CIFAR is or goes, or the class folders")
    images.add_argument("--split", type=number(float, above=0, below=1), metavar="P",
                        help="--dataset folder without train/ and test/: hold out this fraction of each class")
    images.add_argument("--depth", type=depth, default=110, help="of the ResNet: 6 n + 2")
    images.add_argument("--val-size", type=number(int, 0), default=0, metavar="N",
                        help="choose the best model on N held-out training images; 0: on the test set, as the original")
    images.add_argument("--train-size", type=number(int, 2), metavar="N",
                        help="train on N of the training images, the same ones for every seed; all without it")
    images.add_argument("--milestones", type=number(int, 1), nargs="*", metavar="EPOCH",
                        help="divide lr by 10 from these epochs on (default: 150 250, scaled with --epochs)")
    return parser


def depth(text: str) -> int:
    value = number(int, 8, 1202)(text)
    if value % 6 != 2:
        raise argparse.ArgumentTypeError(f"{value} must be 6 n + 2, such as 20, 32, 44, 56 or 110")
    return value


def scaled_milestones(epochs: int) -> list[int]:
    """The paper's milestones for another number of epochs."""
    return [max(least, round(m * epochs / EPOCHS)) for least, m in zip((2, 3), MILESTONES, strict=True)]


def make_model(args: argparse.Namespace, num_classes: int) -> ResNet_cifar:
    """The network of the flags, every block at the same target rate."""
    blocks = (args.depth - 2) // 6
    torch.manual_seed(derive_seed(args.seed, "weights"))
    return ResNet_cifar(BasicBlock, (blocks,) * 3, num_classes, [args.target] * (3 * blocks))


def main(argv: Sequence[str] | None = None) -> None:
    args, checkpoint = utils.parse(make_parser(), argv, architecture=("depth",))
    pretrained = utils.open_pretrained(args, checkpoint)
    loaders = utils.load_data(args, checkpoint, pretrained)
    model = make_model(args, len(loaders.val.classes))
    earlier = recorded(checkpoint).get("lr_milestones")  # a run that goes on keeps its own, however long it is to be
    milestones = args.milestones if args.milestones is not None else earlier or scaled_milestones(args.epochs)
    values = {"milestones": milestones, "topk": (1,), "gate_layers": GATE_LAYERS[-1:]}
    recipe = utils.make_recipe(args, checkpoint, loaders, model, **values)
    utils.run(args, checkpoint, loaders, model, recipe, pretrained)


if __name__ == "__main__":
    run_command(main, "train.py")
