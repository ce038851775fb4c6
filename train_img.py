"""Trains and evaluates ConvNet-AIG-50/101/152 on ImageNet, or on any folder laid out like it.

    python train_img.py --expname NAME IMAGENET_FOLDER
    python train_img.py --test --resume runs/NAME/model_best.pth.tar

This script holds values only; the loops are in `engine`, the shared command line in `cli`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import cli
import data
import processes
from convnet_aig import LAYERS, Bottleneck, ResNet_ImageNet, target_rates_of
from utils import InputError, derive_seed, load_pretrained


def make_parser() -> cli.Parser:
    parser = cli.make_parser(
        __doc__.split("\n")[0],
        expname="give_me_a_name",
        epochs=100,
        weight_decay=1e-4,
        target=0.7,
        lossfact=1,
        print_freq=50,
    )
    natural = cli.number(int, 0)
    parser.add_argument("data", nargs="?", metavar="DIR", help="holds train/ and val/, a folder per class in each")
    parser.add_argument("--arch", default="resnet50", choices=LAYERS)
    parser.add_argument("--target-rates", default="uniform", metavar="uniform|paper|R1,R2,...",
                        help="target rate of each block; in a list, t stands for --target; blocks at 1 have no gate")
    parser.add_argument("--pretrained", default="", metavar="FILE",
                        help="start from a plain ResNet as torchvision saves it, or from its own weights: torchvision")
    parser.add_argument("--image-size", type=cli.number(int, 32, 4096), default=224, metavar="PIXELS")
    parser.add_argument("--workers", type=cli.number(int, 0, 1024), default=data.default_workers(),
                        help="processes that decode images")
    parser.add_argument("--lrdecay", type=cli.number(int, 1), default=30, help="epochs between tenfold drops of lr")
    parser.add_argument("--warmup", type=natural, default=0, help="epochs of linear rise to lr")
    parser.add_argument("--accumulate", type=cli.number(int, 1), default=1, metavar="PARTS",
                        help="compute a batch in parts, to save memory; target rates and BatchNorm then see parts")
    return parser


def load_data(args: argparse.Namespace, checkpoint: dict | None) -> cli.Data:
    """The loaders for a test, or for training and validation."""
    if not args.data:
        raise InputError("name the folder of the images, with train/ and val/ inside: train_img.py IMAGENET_FOLDER")
    values = {"size": args.image_size, "seed": args.seed, "workers": args.workers}
    values |= {"device": cli.select(args), "world": processes.world()}
    root, names = Path(args.data), cli.recorded(checkpoint).get("classes")
    split, count = data.find_split(root, ("val",)), args.test_size
    val = data.PhotoLoader(split, args.batch_size, augment=False, count=count, **values)
    data.same_classes(names or val.classes, val.classes, str(root))
    if args.test and not args.reestimate_bn:
        return cli.Data(None, val, data.IMAGENET_STATISTICS)
    train = data.PhotoLoader(data.find_split(root, ("train",)), args.batch_size, augment=True, **values)
    data.same_classes(train.classes, val.classes, f"{root}/val")
    return cli.Data(train, val, data.IMAGENET_STATISTICS)


def block_rates(args: argparse.Namespace) -> list[float]:
    """The target rate of each block. Raises InputError if the flags give none."""
    try:
        return target_rates_of(args.target_rates, args.arch, args.target)
    except ValueError as error:
        raise InputError(f"--target-rates: {error}") from error


def make_model(args: argparse.Namespace, num_classes: int) -> ResNet_ImageNet:
    """The network of the flags."""
    torch.manual_seed(derive_seed(args.seed, "weights"))
    return ResNet_ImageNet(Bottleneck, LAYERS[args.arch], num_classes, block_rates(args))


def image_transform(args: argparse.Namespace) -> Callable[[Image.Image], Tensor]:
    """What makes (3, H, W) uint8 of an image of any size."""
    return data.photo_transform(args.image_size, train=False)


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict | None]:
    """The flags and the checkpoint of --resume, see `cli.parse`."""
    return cli.parse(make_parser(), argv, architecture=("arch",))


def main(argv: Sequence[str] | None = None) -> None:
    args, checkpoint = parse(argv)
    target_rates = block_rates(args)
    loaded = load_data(args, checkpoint)
    model = make_model(args, len(loaded.val.classes))
    if args.pretrained and not checkpoint:
        print(load_pretrained(model, args.pretrained, args.arch))
    milestones = range(args.lrdecay, args.epochs + 1, args.lrdecay)
    recipe = cli.make_recipe(args, target_rates, milestones, topk=(1, 5))
    cli.run(args, checkpoint, loaded, model, recipe, gate_layers=("fc1", "fc1bn", "fc2"))


if __name__ == "__main__":
    cli.main(main, "train_img.py")
