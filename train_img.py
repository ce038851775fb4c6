"""Trains and evaluates ConvNet-AIG-50/101/152 on ImageNet, or on any folder laid out like it.

    python train_img.py --expname NAME IMAGENET_FOLDER
    python train_img.py --test --resume runs/NAME

This script holds values only, the paper's target rates among them. The training loop is in `aig.engine`, the flags of
both scripts are in `utils`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

import utils
from aig.console import InputError, Parser, number, run_command
from aig.data import default_workers
from aig.environment import derive_seed
from convnet_aig import ARCHS, ResNet_ImageNet, check_target_rates, make_resnet

PAPER_RATES: dict[str, list] = {  # sec. 4.2: early, last and downsampling blocks always run; t stands for --target
    "resnet50": [1, 1, 0.8, 1, "t", "t", "t", 1, "t", "t", "t", "t", "t", 1, 0.7, 1],
    "resnet101": [1] * 8 + ["t"] * 25,
}


def make_parser() -> Parser:
    parser = utils.make_parser(
        __doc__.split("\n")[0],
        expname="give_me_a_name",
        epochs=100,
        weight_decay=1e-4,
        target=0.7,
        lossfact=1,
        print_freq=50,
    )
    parser.add_argument("data", nargs="?", metavar="DIR", help="holds train/ and val/, a folder per class in each")
    images = parser.add_argument_group("images and network")
    images.add_argument("--split", type=number(float, above=0, below=1), metavar="P",
                        help="DIR holds the class folders themselves: hold out this fraction of each class")
    images.add_argument("--arch", default="resnet50", choices=ARCHS, help="the backbone")
    images.add_argument("--target-rates", default="uniform", metavar="uniform|paper|R1,R2,...",
                        help="target rate of each block; in a list, t stands for --target; blocks at 1 have no gate")
    images.add_argument("--image-size", type=number(int, 32, 4096), default=224, metavar="PIXELS",
                        help="height and width of the images")
    images.add_argument("--workers", type=number(int, 0, 1024), default=default_workers(),
                        help="processes that decode images")
    images.add_argument("--lrdecay", type=number(int, 1), default=30, help="epochs between tenfold drops of lr")
    images.add_argument("--accumulate", type=number(int, 1), default=1, metavar="PARTS",
                        help="compute a batch in parts, to save memory; target rates and BatchNorm then see parts")
    return parser


def target_rates_of(schedule: str, arch: str, target: float) -> list[float]:
    """The target rate of each block, first to last.

    Args:
        schedule: "uniform" (every block at target), "paper" (the paper's own, which it gives for ResNet-50 and
            ResNet-101), or one rate per block, comma-separated, where `t` stands for the target.
        arch: a key of ARCHS.
        target: t.

    Raises:
        InputError: if the schedule is unknown, has another length, or leaves [0, 1].
    """
    num_blocks = sum(ARCHS[arch][1])
    if schedule == "uniform":
        return [target] * num_blocks
    if schedule == "paper" and arch not in PAPER_RATES:
        raise InputError(f"--target-rates: the paper gives none for {arch}: use uniform, or a list of {num_blocks}")
    rates = PAPER_RATES[arch] if schedule == "paper" else schedule.split(",")
    try:
        rates = [target if str(rate).strip() == "t" else float(rate) for rate in rates]
    except ValueError:
        raise InputError(f"--target-rates {schedule}: use uniform, paper, or numbers and t, with commas") from None
    try:
        return check_target_rates(rates, num_blocks)
    except ValueError as error:
        raise InputError(f"--target-rates: {error}") from error


def make_model(args: argparse.Namespace, num_classes: int, rates: Sequence[float]) -> ResNet_ImageNet:
    """The network of the flags."""
    torch.manual_seed(derive_seed(args.seed, "weights"))
    return make_resnet(args.arch, num_classes, rates)


def main(argv: Sequence[str] | None = None) -> None:
    args, checkpoint = utils.parse(make_parser(), argv, architecture=("arch",))
    rates = target_rates_of(args.target_rates, args.arch, args.target)
    pretrained = utils.open_pretrained(args, checkpoint)
    loaders = utils.load_data(args, checkpoint, pretrained)
    model = make_model(args, len(loaders.val.classes), rates)
    milestones = range(args.lrdecay, args.epochs + 1, args.lrdecay)
    recipe = utils.make_recipe(args, checkpoint, loaders, model, milestones=milestones, topk=(1, 5))
    utils.run(args, checkpoint, loaders, model, recipe, pretrained)


if __name__ == "__main__":
    run_command(main, "train_img.py")
