"""Trains and evaluates ConvNet-AIG on small images, by default ResNet-110 on CIFAR-10 as in the paper.

    python train.py --expname NAME
    python train.py --test --resume runs/NAME/model_best.pth.tar

This script holds values only; the loops are in `engine`, the shared command line in `cli`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

import cli
import data
import processes
from convnet_aig import BasicBlock, ResNet_cifar
from utils import derive_seed

MILESTONES, EPOCHS = (150, 250), 350  # of the paper's schedule


def make_parser() -> cli.Parser:
    parser = cli.make_parser(
        __doc__.split("\n")[0],
        expname="give_me_a_name_cifar",
        epochs=EPOCHS,
        weight_decay=5e-4,
        target=0.6,
        lossfact=2,
        print_freq=25,
    )
    parser.add_argument("--dataset", default="cifar10", choices=data.SMALL_DATASETS)
    parser.add_argument("--data", default="data", metavar="DIR", help="where CIFAR is or goes, or the class folders")
    parser.add_argument("--depth", type=depth, default=110, help="of the ResNet: 6 n + 2")
    parser.add_argument("--val-size", type=cli.number(int, 0), default=0, metavar="N",
                        help="choose the best model on N held-out training images; 0: on the test set, as the original")
    parser.add_argument("--train-size", type=cli.number(int, 2), metavar="N",
                        help="train on N of the training images, the same ones for every seed (default: all)")
    parser.add_argument("--milestones", type=cli.number(int, 1), nargs="*", metavar="EPOCH",
                        help="divide lr by 10 from these epochs on (default: 150 250, scaled with --epochs)")
    return parser


def depth(text: str) -> int:
    value = cli.number(int, 8, 1202)(text)
    if value % 6 != 2:
        raise argparse.ArgumentTypeError(f"{value} must be 6 n + 2, such as 20, 32, 44, 56 or 110")
    return value


def scaled_milestones(epochs: int) -> list[int]:
    """The paper's milestones for another number of epochs."""
    return [max(least, round(m * epochs / EPOCHS)) for least, m in zip((2, 3), MILESTONES, strict=True)]


def load_data(args: argparse.Namespace, checkpoint: dict | None) -> cli.Data:
    """The loaders for a test, or for training and validation; normalised as the checkpoint was."""
    place = {"device": cli.select(args), "world": processes.world()}
    test = data.load_small_images(args.dataset, args.data, train=False)
    trained_on = cli.recorded(checkpoint)
    if "classes" in trained_on:
        data.same_classes(trained_on["classes"], test.classes, f"--dataset {args.dataset}")
    normalisation = (trained_on["mean"], trained_on["std"]) if "mean" in trained_on else None
    training, evaluated = not args.test or args.reestimate_bn, test
    if training or normalisation is None:
        train = data.load_small_images(args.dataset, args.data, train=True)
        data.same_classes(train.classes, test.classes, "the test images")
        if args.val_size:
            train, held_out = data.hold_out(train, args.val_size)
            evaluated = test if args.test else held_out
        if args.train_size:
            train = data.choose(train, args.train_size, "--train-size")
        normalisation = normalisation or data.pixel_statistics(args.dataset, train)
    if args.test_size:
        evaluated = data.choose(evaluated, args.test_size, "--test-size")
    val = data.SmallImageLoader(evaluated, args.batch_size, normalisation, **place)
    if not training:
        return cli.Data(None, val, normalisation)
    if not args.val_size and not args.test:
        print("the validation set is the test set, as in the original: choose models honestly with --val-size")
    augment = "crop" if args.dataset == "digits" else "crop+flip"
    loader = data.SmallImageLoader(train, args.batch_size, normalisation, augment=augment, seed=args.seed, **place)
    return cli.Data(loader, val, normalisation)


def make_model(args: argparse.Namespace, num_classes: int) -> ResNet_cifar:
    """The network of the flags, every block at the same target rate."""
    blocks = (args.depth - 2) // 6
    torch.manual_seed(derive_seed(args.seed, "weights"))
    return ResNet_cifar(BasicBlock, (blocks,) * 3, num_classes, [args.target] * (3 * blocks))


def image_transform(args: argparse.Namespace) -> Callable[[Image.Image], Tensor]:
    """What makes (3, H, W) uint8 of an image of any size."""
    return data.small_transform(args.dataset)


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict | None]:
    """The flags and the checkpoint of --resume, see `cli.parse`."""
    return cli.parse(make_parser(), argv, architecture=("depth",))


def main(argv: Sequence[str] | None = None) -> None:
    args, checkpoint = parse(argv)
    loaded = load_data(args, checkpoint)
    model = make_model(args, len(loaded.val.classes))
    milestones = scaled_milestones(args.epochs) if args.milestones is None else args.milestones
    recipe = cli.make_recipe(args, model.target_rates, milestones, topk=(1,))
    cli.run(args, checkpoint, loaded, model, recipe, gate_layers=("fc2",))


if __name__ == "__main__":
    cli.main(main, "train.py")
