"""The command line that `train.py` and `train_img.py` share: flags, resuming, running, reporting, exit status.

Exit status: 0 done; 2 bad arguments, or missing or unfit input (one line on stderr); 130 interrupted; 1 else.
"""

from __future__ import annotations

import argparse
import math
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torchvision
from torch import nn

import dashboard
import engine
import utils
from convnet_aig import GATE_MODES, RUNS_EVERYTHING, AdaptiveResNet
from utils import InputError, TrainingError

# flags of one call, never taken over from a checkpoint
PER_CALL = (
    *("expname", "save", "overwrite", "visdom", "device", "no_cuda"),
    *("resume", "test", "start_epoch", "stop_after", "pretrained"),
)


# ---------------------------------------------------------------------------------------------- flags


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")


def number(
    kind: type, low: float = -math.inf, high: float = math.inf, above: float = -math.inf
) -> Callable[[str], Any]:
    """An argparse type: an int or float in [low, high], and larger than `above`."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a{'n' * (kind is int)} {kind.__name__}") from None
        if not (low <= value <= high and value > above and math.isfinite(value)):
            bounds = [f"at least {low:g}"] * (low > -math.inf) + [f"above {above:g}"] * (above > -math.inf)
            bounds += [f"at most {high:g}"] * (high < math.inf)
            raise argparse.ArgumentTypeError(f"{text} must be {' and '.join(bounds) or 'finite'}")
        return value

    return convert


def experiment_name(text: str) -> str:
    """An argparse type: the name of one folder."""
    if text in ("", ".", "..") or Path(text).name != text:
        raise argparse.ArgumentTypeError(f"{text!r} must be the name of a folder, without a path")
    return text


def make_parser(description: str, **defaults: Any) -> Parser:
    """A parser with the flags of both scripts; `defaults` sets those that differ between the two."""
    parser = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    positive, above0 = number(int, 1), number(float, above=0)
    run = parser.add_argument_group("run")
    run.add_argument("--expname", type=experiment_name, help="name of the experiment and its run folder")
    run.add_argument("--save", default="", metavar="DIR", help="root of the run folders; '' means runs")
    run.add_argument("--overwrite", action="store_true", help="replace an earlier run of that name")
    run.add_argument("--resume", default="", metavar="FILE", help="continue (or --test) this checkpoint")
    run.add_argument("--stop-after", type=positive, metavar="N", help="end after N more epochs, schedule unchanged")
    run.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    run.add_argument("--no-cuda", action="store_true", help="the same as --device cpu")
    run.add_argument("--seed", type=number(int, 0), default=1)
    run.add_argument("--visdom", action="store_true", help="show the run live on a visdom server")
    run.add_argument("--print-freq", "-p", type=positive, help="steps between lines, where no terminal shows a bar")
    run.add_argument("--log-interval", type=positive, default=20, help="steps between refreshes of the progress bar")
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=positive)
    training.add_argument("--start_epoch", "--start-epoch", type=positive, default=1, help="first epoch to run")
    training.add_argument("--batch-size", type=number(int, 2), default=256)
    training.add_argument("--lr", "--learning-rate", type=above0, default=0.1, help="learning rate at the start")
    training.add_argument("--lrfact", type=number(float, 0), default=1, help="learning-rate factor of the gates")
    training.add_argument("--momentum", type=number(float, 0, 1), default=0.9)
    training.add_argument("--weight-decay", "--wd", type=number(float, 0))
    training.add_argument("--target", type=number(float, 0, 1), help="target rate t of the gates")
    training.add_argument("--lossfact", type=number(float, 0), help="weight of the target-rate loss")
    evaluation = parser.add_argument_group("evaluation")
    evaluation.add_argument("--test", action="store_true", help="evaluate the --resume checkpoint and stop")
    evaluation.add_argument("--gate-mode", default="argmax", choices=GATE_MODES, help="how gates decide in evaluation")
    evaluation.add_argument("--gate-samples", type=positive, default=5, help="seeds of --test --gate-mode sample")
    parser.set_defaults(**defaults)
    return parser


def parse(
    parser: Parser, argv: Sequence[str] | None, architecture: Sequence[str]
) -> tuple[argparse.Namespace, dict | None]:
    """The values of all flags, and the checkpoint of --resume.

    Flags not given are taken from the checkpoint's own `args`. `architecture` names those that must not differ.

    Raises:
        InputError: on a bad command line or checkpoint.
    """
    args = parser.parse_args(argv)
    unset = object()
    explicit = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset))))
    explicit = {name: value for name, value in explicit.items() if value is not unset and value is not None}
    if args.test and not args.resume:
        raise InputError("--test needs the checkpoint to evaluate: --resume runs/NAME/model_best.pth.tar")
    if not args.resume:
        utils.check_vacant(run_folder(args, None), args.overwrite)
        return args, None
    checkpoint = utils.load_checkpoint(args.resume)
    recorded = checkpoint.get("args", {})
    if not isinstance(recorded, dict):
        raise InputError(f"{args.resume}: its args are not a dict; not a checkpoint of this program")
    for name in architecture:
        if name in explicit and explicit[name] != recorded.get(name, explicit[name]):
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag} {explicit[name]}: {args.resume} was trained with {flag} {recorded[name]}")
    inherited = {name: value for name, value in recorded.items() if name in vars(args) and name not in PER_CALL}
    args = argparse.Namespace(**{**vars(args), **inherited, **explicit})
    if args.test:
        return args, checkpoint
    args.start_epoch = explicit.get("start_epoch", checkpoint.get("epoch"))
    if not isinstance(args.start_epoch, int) or args.start_epoch < 1:
        raise InputError(f"{args.resume} does not say which epoch comes next: give --start-epoch")
    folder = run_folder(args, checkpoint)
    if not recorded:
        utils.check_vacant(folder, args.overwrite)
    elif "expname" in explicit and folder.resolve().name != args.expname:
        raise InputError(f"--expname {args.expname}: a resumed run continues in its own folder, {folder}; leave it out")
    return args, checkpoint


def run_folder(args: argparse.Namespace, checkpoint: dict | None) -> Path:
    """Where a training writes: in the run folder that it resumes, else in --save/--expname.

    A checkpoint without args, such as the original's, is of no run folder of ours, and its folder is left alone.
    """
    return Path(args.resume).parent if recorded(checkpoint) else Path(args.save or "runs") / args.expname


def recorded(checkpoint: dict | None) -> dict[str, Any]:
    """The args in a checkpoint of this program, {} without."""
    return checkpoint.get("args", {}) if checkpoint else {}


# ---------------------------------------------------------------------------------------------- running


@dataclass
class Data:
    """What a script hands over: its loaders (`train` is None for --test) and how it normalised."""

    train: engine.Loader | None
    val: engine.Loader
    normalisation: tuple[list[float], list[float]]


def run(
    args: argparse.Namespace,
    checkpoint: dict | None,
    data: Data,
    model: AdaptiveResNet,
    recipe: engine.Recipe,
    gate_layers: Sequence[str],
) -> None:
    """Tests or trains `model` on `data`, as `args` say. `gate_layers` get the learning rate lr * lrfact."""
    device = select(args)
    if checkpoint:
        utils.load_weights(model, checkpoint["state_dict"], args.resume)
    model.to(device, memory_format=torch.channels_last)
    model.gate_mode = args.gate_mode
    if args.test:
        run_test(args, checkpoint, data, model, recipe)
    else:
        run_training(args, checkpoint, data, model, recipe, gate_layers)


def select(args: argparse.Namespace) -> torch.device:
    """The device that --device and --no-cuda ask for."""
    if args.no_cuda and args.device not in ("auto", "cpu"):
        raise InputError(f"--no-cuda contradicts --device {args.device}")
    return utils.select_device("cpu" if args.no_cuda else args.device)


def run_test(
    args: argparse.Namespace, checkpoint: dict, data: Data, model: AdaptiveResNet, recipe: engine.Recipe
) -> None:
    """Evaluates, prints a table, and puts the result under its gate mode into test.json."""
    result = engine.test(
        model,
        data.val,
        samples=args.gate_samples,
        seed=args.seed,
        target_rates=recipe.target_rates,
        lossfact=recipe.lossfact,
        topk=recipe.topk,
    )
    del result["gates_by_class"]
    epoch = checkpoint.get("epoch")
    result["epoch"] = epoch - 1 if isinstance(epoch, int) else None  # the file holds the next one to run
    print(describe(result, args.gate_mode, recipe.target_rates))
    path = Path(args.resume).parent / utils.TEST
    utils.write_json(path, {**utils.read_json(path), args.gate_mode: result})
    print(f"written to {path}")


def run_training(
    args: argparse.Namespace,
    checkpoint: dict | None,
    data: Data,
    model: AdaptiveResNet,
    recipe: engine.Recipe,
    gate_layers: Sequence[str],
) -> None:
    """Trains from the start, or from where the checkpoint stopped."""
    if data.train.num_images < 2:
        raise InputError("there are fewer than two training images: BatchNorm of the gates needs two")
    if data.train.dropped:
        print("the last batch of each epoch would be one image and is left out: BatchNorm of the gates needs two")
    optimizer = make_optimizer(model, args, gate_layers)
    first, records, best = args.start_epoch, [], -1.0
    folder = run_folder(args, checkpoint)
    if checkpoint:
        best = restore(checkpoint, optimizer, args.resume)
    if recorded(checkpoint):
        records = [record for record in utils.read_records(folder) if record["epoch"] < first]
    last = min(recipe.epochs, first + args.stop_after - 1) if args.stop_after else recipe.epochs
    if first > last:
        print(f"all {last} epochs are done already; ask for more with --epochs")
        return
    if recorded(checkpoint):
        utils.write_records(folder, records)
    else:
        utils.new_run_folder(folder, args.overwrite)
    kept = describe_run(args, data, recipe)
    utils.write_json(folder / utils.ARGS, {**kept, **environment(model)})
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{folder}: {parameters:,} parameters, {len(recipe.target_rates)} blocks, "
        f"{data.train.num_images:,} training and {data.val.num_images:,} validation images of "
        f"{len(data.val.classes)} classes, epochs {first} to {last}, {utils.device_name(select(args))}",
        flush=True,
    )
    best = engine.fit(
        model,
        optimizer,
        data.train,
        data.val,
        recipe,
        folder=folder,
        epochs=range(first, last + 1),
        records=records,
        best=best,
        args=kept,
        dashboard=dashboard.connect(folder.name, recipe.target_rates) if args.visdom else dashboard.Silent(),
    )
    print(f"best top-1 {best:.2f} %: {folder / utils.BEST}")
    if last < recipe.epochs:
        print(f"stopped after epoch {last} of {recipe.epochs}; continue with --resume {folder / utils.CHECKPOINT}")


def make_optimizer(model: nn.Module, args: argparse.Namespace, gate_layers: Sequence[str]) -> torch.optim.SGD:
    """SGD with momentum, the parameters of `gate_layers` at learning rate lr * lrfact."""
    gates, others = [], []
    for name, parameter in model.named_parameters():
        (gates if set(name.split(".")) & set(gate_layers) else others).append(parameter)
    groups = [{"params": others, "lr_factor": 1.0}, {"params": gates, "lr_factor": float(args.lrfact)}]
    groups = [group for group in groups if group["params"]]
    return torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay)


def restore(checkpoint: dict, optimizer: torch.optim.Optimizer, source: str) -> float:
    """Restores the optimizer's state. Returns the best accuracy so far."""
    best = float(checkpoint.get("best_prec1", -1))
    if "optimizer" not in checkpoint:  # as in the original's files
        print(f"{source} holds no optimizer state: the momentum starts at zero")
        return best
    wanted = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{source}: its optimizer does not fit this network ({error})") from error
    for group, values in zip(optimizer.param_groups, wanted, strict=True):
        group.update(values)  # the state is the checkpoint's, the hyperparameters are those of the flags
    return best


def describe_run(args: argparse.Namespace, data: Data, recipe: engine.Recipe) -> dict[str, Any]:
    """The args that go into args.json and every checkpoint: all flags, and what was derived from the data."""
    mean, std = data.normalisation
    derived = {"classes": data.val.classes, "mean": mean, "std": std}
    derived |= {"lr_milestones": list(recipe.milestones), "block_rates": list(recipe.target_rates)}
    return {**vars(args), **derived}


def environment(model: nn.Module) -> dict[str, Any]:
    """The command, versions, commit and hardware, for args.json."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "git_commit": utils.git_commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
        "hardware": utils.device_name(next(model.parameters()).device),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


# ---------------------------------------------------------------------------------------------- reporting


def describe(result: dict[str, Any], mode: str, target_rates: Sequence[float]) -> str:
    """The table that --test prints."""
    spread = {
        name: f" ± {value:.{2 if is_accuracy(name) else 4}f}"
        for name in result
        if (value := result.get(f"{name}_std")) is not None
    }
    everything = ", which runs every branch" if mode in RUNS_EVERYTHING else ""
    lines = [
        f"gate mode {mode}{everything}: {result['images']:,} images, {result['images_per_second']:.0f} images/s",
        *(f"  {name:<15}{value:9.2f} %{spread.get(name, '')}" for name, value in result.items() if is_accuracy(name)),
        f"  loss           {result['loss']:9.4f}{spread.get('loss', '')}"
        f"  ({result['loss_classify']:.4f} classification + {result['loss_target']:.4f} target rate)",
        f"  execution rate {result['execution_rate']:9.4f}{spread.get('execution_rate', '')}"
        f"  (target {sum(target_rates) / len(target_rates):.4f})",
        "",
        "  open gates by block (target rate in brackets)",
    ]
    cells = [
        f"{block:3} {rate:.2f} ({target:.2f})"
        for block, (rate, target) in enumerate(zip(result["gates"], target_rates, strict=True), start=1)
    ]
    lines += ["   " + "  ".join(cells[i : i + 6]) for i in range(0, len(cells), 6)]
    rates = {name: rate for name, rate in result["classes"].items() if math.isfinite(rate)}
    ranked = sorted(rates, key=rates.get)
    shown = ranked if len(ranked) <= 20 else [*ranked[:10], *ranked[-10:]]
    lines += ["", f"  open gates by class, fewest first ({len(shown)} of {len(ranked)})"]
    width = max(map(len, shown))
    lines += [f"   {name:<{width}} {rates[name]:.3f} {'#' * round(40 * rates[name])}" for name in shown]
    return "\n".join(lines)


def is_accuracy(name: str) -> bool:
    return name.startswith("top") and not name.endswith("_std")


def main(script: Callable[[], None], name: str) -> NoReturn:
    """Runs a script's main and ends the process with the exit status of the module's docstring."""
    try:
        script()
    except InputError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except TrainingError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{name}: interrupted; finished epochs are saved, continue with --resume", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
