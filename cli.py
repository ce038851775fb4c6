"""The command line that `train.py` and `train_img.py` share: flags, resuming, running, reporting, exit status.

Exit status: 0 done; 2 bad arguments, or missing or unfit input (one line on stderr); 128 + the signal that stopped a
training, which is saved first; 1 else.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import platform
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torchvision
from torch import nn

import dashboard
import engine
import processes
import utils
from convnet_aig import GATE_MODES, RUNS_EVERYTHING, AdaptiveResNet
from utils import InputError, Interrupted, TrainingError

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
AUTO = "auto"
# flags of one call, never taken over from a checkpoint
PER_CALL = ("resume", "test", "dense", "overwrite", "start_epoch", "stop_after", "device", "no_cuda")
PER_CALL += ("test_size", "reestimate_bn", "visdom", "visdom_server", "visdom_port", "visdom_env")


# ---------------------------------------------------------------------------------------------- flags


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As the original, but for `--flag=--`, of which that makes an empty list."""
        for text in sys.argv[1:] if args is None else args:
            if text.endswith("=--"):
                self.error(f"argument {text.removesuffix('=--')}: invalid value: '--'")
        return super().parse_known_args(args, namespace)


def number(
    kind: type, low: float = -math.inf, high: float = math.inf, above: float = -math.inf, below: float = math.inf
) -> Callable[[str], Any]:
    """An argparse type: an int or float in [low, high], larger than `above` and smaller than `below`."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a{'n' * (kind is int)} {kind.__name__}") from None
        if not (low <= value <= high and above < value < below) or value in (math.inf, -math.inf):
            bounds = [f"at least {low:g}"] * (low > -math.inf) + [f"above {above:g}"] * (above > -math.inf)
            bounds += [f"at most {high:g}"] * (high < math.inf) + [f"below {below:g}"] * (below < math.inf)
            raise argparse.ArgumentTypeError(f"{text} must be {' and '.join(bounds) or 'finite'}")
        return value

    return convert


def experiment_name(text: str) -> str:
    """An argparse type: the name of one folder."""
    if text in ("", ".", "..") or Path(text).name != text or len(text.encode()) > 200:
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
    run.add_argument("--resume", default="", metavar="FILE",
                     help="continue (or --test) this checkpoint; auto: that of the run folder, if it has one")
    run.add_argument("--stop-after", type=positive, metavar="N", help="end after N more epochs, schedule unchanged")
    run.add_argument("--checkpoint-minutes", type=above0, metavar="M", help="save in mid-epoch, too, every M minutes")
    run.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    run.add_argument("--no-cuda", action="store_true", help="the same as --device cpu")
    run.add_argument("--seed", type=number(int, 0), default=1)
    switch = argparse.BooleanOptionalAction
    run.add_argument("--deterministic", action=switch, default=False,
                     help="only algorithms that repeat exactly; else an error")
    run.add_argument("--visdom", action="store_true", help="show the run live on a visdom server")
    add_visdom_flags(run)
    run.add_argument("--print-freq", "-p", type=positive, help="steps between lines, where no terminal shows a bar")
    run.add_argument("--log-interval", type=positive, default=20, help="steps between refreshes of the progress bar")
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=number(int, 1, 100_000))
    training.add_argument("--start_epoch", "--start-epoch", type=positive, default=1, help="first epoch to run")
    training.add_argument("--batch-size", type=number(int, 2), default=256)
    training.add_argument("--lr", "--learning-rate", type=above0, default=0.1, help="learning rate at the start")
    training.add_argument("--lrfact", type=number(float, 0), default=1, help="learning-rate factor of the gates")
    training.add_argument("--momentum", type=number(float, 0, 1), default=0.9)
    training.add_argument("--weight-decay", "--wd", type=number(float, 0))
    training.add_argument("--target", type=number(float, 0, 1), help="target rate t of the gates")
    training.add_argument("--lossfact", type=number(float, 0), help="weight of the target-rate loss")
    training.add_argument("--target-warmup", type=number(int, 0), default=0, metavar="EPOCHS",
                          help="epochs in which the target rates fall from 1 to their values")
    training.add_argument("--temperature", type=above0, default=1, help="of the gates' Gumbel-softmax")
    training.add_argument("--temperature-end", type=above0, metavar="T",
                          help="change the temperature geometrically to this one in the last epoch")
    training.add_argument("--stochastic-depth", type=number(float, 0, below=1), default=0, metavar="P",
                          help="drop branches with probability P, in nets without gates (--target 1)")
    speed = parser.add_argument_group("speed of training")
    speed.add_argument("--amp", default="off", choices=AMP, help="mixed precision; gates and losses stay in float32")
    speed.add_argument("--compile", action=switch, default=False, help="torch.compile: slow to start, then faster")
    speed.add_argument("--channels-last", action=switch, default=True, help="memory format of images and weights")
    speed.add_argument("--fused", action=switch, help="fused SGD (default: on CUDA)")
    speed.add_argument("--tf32", action=switch, help="TF32 products on NVIDIA GPUs (default: torch's own, in "
                                                     "convolutions only)")
    speed.add_argument("--sync-bn", action=switch, default=False, help="BatchNorm over the images of all GPUs")
    evaluation = parser.add_argument_group("evaluation")
    evaluation.add_argument("--test", action="store_true", help="evaluate the --resume checkpoint and stop")
    evaluation.add_argument("--gate-mode", default="argmax", choices=GATE_MODES, help="how gates decide in evaluation")
    evaluation.add_argument("--threshold", type=number(float, above=0, below=1), default=0.5, metavar="P",
                            help="gate mode argmax opens a gate where P(open) is above this")
    evaluation.add_argument("--dense", action="store_true",
                            help="--test: compute every branch and mask it, instead of running only the open ones")
    evaluation.add_argument("--test-size", type=positive, metavar="N",
                            help="--test: only N of the images, the same ones every time")
    evaluation.add_argument("--reestimate-bn", action="store_true",
                            help="--test: take BatchNorm's statistics anew from the training images, in this gate mode")
    evaluation.add_argument("--gate-samples", type=positive, default=5, help="seeds of --test --gate-mode sample")
    parser.set_defaults(**defaults)
    return parser


def add_visdom_flags(parser: argparse._ActionsContainer) -> None:
    """Where the visdom server is; user and password come from VISDOM_USERNAME and VISDOM_PASSWORD."""
    parser.add_argument("--visdom-server", default=dashboard.SERVER, metavar="URL", help="of the visdom server")
    parser.add_argument("--visdom-port", type=number(int, 1, 65535), default=dashboard.PORT, metavar="PORT")
    parser.add_argument("--visdom-env", default="", metavar="NAME", help="environment; '' means the name of the run")


def parse(
    parser: Parser, argv: Sequence[str] | None, architecture: Sequence[str]
) -> tuple[argparse.Namespace, dict | None]:
    """The values of all flags, and the checkpoint of --resume.

    Flags not given are taken from the checkpoint's own `args`. `architecture` names those that must not differ.

    Raises:
        InputError: on a bad command line or checkpoint.
    """
    args, explicit = parser.parse_args(argv), given(parser, argv)
    if args.resume == AUTO:
        find_resumable(args, explicit)
    if args.test and not args.resume:
        raise InputError("--test needs the checkpoint to evaluate: --resume runs/NAME/model_best.pth.tar")
    if args.dense and not args.test:
        raise InputError("--dense is for --test: training computes every branch anyway")
    if (args.test_size or args.reestimate_bn) and not args.test:
        raise InputError(f"{'--test-size' if args.test_size else '--reestimate-bn'} is for --test: add it")
    if args.test and args.visdom:
        raise InputError("--visdom shows a training: leave it out with --test")
    where = [name for name in ("visdom_server", "visdom_port", "visdom_env") if name in explicit]
    if where and not args.visdom:
        raise InputError(f"--{where[0].replace('_', '-')} says where to show the run: add --visdom")
    if not args.resume:
        utils.check_vacant(run_folder(args, None), args.overwrite)
        if args.start_epoch > args.epochs:
            raise InputError(f"--start-epoch {args.start_epoch} comes after the last of {args.epochs} epochs")
        return args, None
    checkpoint = utils.load_checkpoint(args.resume)
    if own := recorded(checkpoint):
        args = inherit(parser, own, explicit, architecture, args.resume)
    if not args.test:
        args.start_epoch = explicit.get("start_epoch", checkpoint.get("epoch"))
        if "start_epoch" in explicit:
            checkpoint["step"] = 0  # the epoch is to begin anew
        check_resumable(args, checkpoint, explicit)
    return args, checkpoint


def given(parser: Parser, argv: Sequence[str] | None) -> dict[str, Any]:
    """The values of the parser's flags that are on the command line, without any default."""
    unset = object()
    names = [action.dest for action in parser._actions if action.dest != "help"]
    known, _ = parser.parse_known_args(argv, argparse.Namespace(**dict.fromkeys(names, unset)))
    return {name: value for name, value in vars(known).items() if value is not unset and value is not None}


def find_resumable(args: argparse.Namespace, explicit: dict[str, Any]) -> None:
    """Makes of `--resume auto` the checkpoint of the run folder, or a start where there is none yet."""
    folder = run_folder(args, None)
    try:
        there, *others = ((folder / name).exists() for name in (utils.CHECKPOINT, utils.BEST, utils.TEST))
    except OSError as error:
        raise InputError(f"cannot use {folder} as the run folder: {error.strerror}") from error
    args.resume = explicit["resume"] = str(folder / utils.CHECKPOINT) if there else ""
    if there:
        explicit.pop("pretrained", None)
    elif not any(others) and len(utils.read_records(folder)) <= 1:
        args.overwrite = True  # what a run has left that ended before its first checkpoint


def inherit(
    parser: Parser, own: dict, explicit: dict[str, Any], architecture: Sequence[str], source: str
) -> argparse.Namespace:
    """The flags recorded in a checkpoint, checked as if they had been typed, overridden by the explicit ones."""
    for name in architecture:
        flag = "--" + name.replace("_", "-")
        if name not in own:
            raise InputError(f"{source} is not a checkpoint of this script: it does not record {flag}")
        if explicit.get(name, own[name]) != own[name]:
            raise InputError(f"{flag} {explicit[name]}: {source} was trained with {flag} {own[name]}")
    typed: list[str] = []
    for action in parser._actions:
        value = own.get(action.dest)
        if value is None or action.dest in PER_CALL:
            continue
        loose = value if isinstance(value, list) else [] if action.option_strings else [value]
        if any(str(word).startswith("-") for word in loose):  # which would be flags by themselves
            raise InputError(f"{source}: the {action.dest} it records is unfit: {value}")
        if isinstance(action, argparse.BooleanOptionalAction):
            typed.append(action.option_strings[value is False])
        elif action.nargs == 0:
            typed += action.option_strings[:1] * (value is True)
        elif not action.option_strings:
            typed.insert(0, str(value))
        elif isinstance(value, list) and action.nargs:
            typed += [action.option_strings[0], *map(str, value)]
        else:
            typed.append(f"{action.option_strings[0]}={value}")
    try:
        return argparse.Namespace(**{**vars(parser.parse_args(typed)), **explicit})
    except InputError as error:
        raise InputError(f"{source}: the flags it records are unfit: {error}") from error


def check_resumable(args: argparse.Namespace, checkpoint: dict, explicit: dict[str, Any]) -> None:
    """Raises InputError if training cannot go on from the checkpoint as the flags ask."""
    own = recorded(checkpoint)
    epochs = (args.start_epoch, checkpoint.get("epoch")) if own else (args.start_epoch,)
    if not all(isinstance(epoch, int) and epoch >= 1 for epoch in epochs):
        raise InputError(f"{args.resume} does not say which epoch comes next")
    if explicit.get("pretrained"):
        raise InputError("--pretrained starts a new run: it does not go with --resume")
    folder = run_folder(args, checkpoint)
    if not own:
        utils.check_vacant(folder, args.overwrite)
        if folder.resolve() == Path(args.resume).resolve().parent:
            raise InputError(f"{args.resume} would be overwritten: choose another --expname or --save")
    elif {"expname", "save"} & explicit.keys():
        asked = Path(args.save or "runs") / args.expname if "save" in explicit else folder.parent / args.expname
        if asked.resolve() != folder.resolve():
            raise InputError(f"{args.resume} continues in its own folder, {folder}, not in {asked}: leave out the name")


def run_folder(args: argparse.Namespace, checkpoint: dict | None) -> Path:
    """Where a training writes: in the run folder that it resumes, else in --save/--expname.

    A checkpoint without args, such as the original's, is of no run folder of ours, and its folder is left alone.
    """
    return Path(args.resume).parent if recorded(checkpoint) else Path(args.save or "runs") / args.expname


def recorded(checkpoint: dict | None) -> dict[str, Any]:
    """The args in a checkpoint of this program, {} without."""
    return checkpoint.get("args", {}) if checkpoint else {}


def check_gates(checkpoint: dict | None, target_rates: Sequence[float], source: str) -> None:
    """Raises InputError if other blocks have a gate than in the checkpoint: that would be another network."""
    rates = recorded(checkpoint).get("block_rates", target_rates)
    if [rate < 1 for rate in rates] != [rate < 1 for rate in target_rates]:
        raise InputError(f"with these target rates other blocks have gates than in {source}: leave them out")


# ---------------------------------------------------------------------------------------------- running


@dataclass
class Data:
    """What a script hands over: its loaders (`train` is None where nothing needs it) and how it normalised."""

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
    prepare(args, checkpoint, model)
    if args.test:
        run_test(args, checkpoint, data, model, recipe)
    else:
        run_training(args, checkpoint, data, model, recipe, gate_layers)


def prepare(args: argparse.Namespace, checkpoint: dict | None, model: AdaptiveResNet) -> None:
    """Gives the model the checkpoint's weights, its device and gate mode. Raises InputError if these do not fit."""
    device = select(args)
    if checkpoint:
        check_gates(checkpoint, model.target_rates, args.resume)
        utils.load_weights(model, checkpoint["state_dict"], args.resume)
    model.to(device, memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)
    if args.deterministic:
        make_deterministic()
    if args.tf32 is not None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    model.gate_mode, model.threshold = args.gate_mode, args.threshold


def make_recipe(
    args: argparse.Namespace, target_rates: Sequence[float], milestones: Sequence[int], topk: Sequence[int]
) -> engine.Recipe:
    """The recipe of the flags: those that are called as its attributes, and what the script derives from others."""
    names = {field.name for field in dataclasses.fields(engine.Recipe)}
    flags = {name: value for name, value in vars(args).items() if name in names}
    return engine.Recipe(**flags | {"target_rates": target_rates, "milestones": milestones, "topk": topk})


def make_deterministic() -> None:
    """Has torch raise an error where it knows only algorithms that differ from run to run, as some do on GPUs."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory


def select(args: argparse.Namespace) -> torch.device:
    """The device that --device and --no-cuda ask for; of several GPUs the one of this process."""
    if args.no_cuda and args.device not in ("auto", "cpu"):
        raise InputError(f"--no-cuda contradicts --device {args.device}")
    return utils.select_device("cpu" if args.no_cuda else args.device)


def run_test(
    args: argparse.Namespace, checkpoint: dict, data: Data, model: AdaptiveResNet, recipe: engine.Recipe
) -> None:
    """Evaluates, prints a table, and puts the result under its gate mode into test.json."""
    path = Path(args.resume).parent / utils.TEST
    earlier = utils.read_json(path)
    settings = {"samples": args.gate_samples, "seed": args.seed, "dense": args.dense}
    name = args.gate_mode
    if args.reestimate_bn:
        if processes.world().size > 1:
            raise InputError("--reestimate-bn: use one process")
        engine.reestimate_batchnorm(model, data.train, utils.derive_seed(args.seed, "BatchNorm"))
        name += "+bn"
    result = engine.test(model, data.val, **settings, **recipe.evaluation())
    del result["gates_by_class"]
    epoch = checkpoint.get("epoch")
    result["epoch"] = epoch - 1 if isinstance(epoch, int) else None  # the file holds the next one to run
    print(describe(result, args.gate_mode, recipe.target_rates))
    if args.test_size:
        print(f"not written to {path}, which is about all images")
        return
    if processes.world().leads:
        utils.write_json(path, {**earlier, name: result})
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
    world = processes.world()
    if args.batch_size < 2 * world.size or data.train.num_images < 2 * world.size:
        raise InputError(
            f"--batch-size {args.batch_size} and {data.train.num_images} training images: each of {world.size} "
            "process(es) needs two images of a batch, for the BatchNorm of the gates"
        )
    if data.train.dropped:
        print(
            f"the last batch of each epoch would have {data.train.dropped} image(s) and is left out: "
            "BatchNorm of the gates needs two in each process"
        )
    if next(model.parameters()).device.type == "cpu":
        utils.keep_memory()
    check_schedules(args, model)
    model.set_drop_rate(args.stochastic_depth)
    trainer = make_trainer(args, model, recipe, gate_layers)
    own, folder, first = recorded(checkpoint), run_folder(args, checkpoint), args.start_epoch
    records, best, progress = starting_point(args, checkpoint, trainer, data.train, folder)
    if [first, progress.step] != [-number for number in world.agree(-first, -progress.step)]:
        raise InputError(f"not all processes see the same checkpoint in {folder}: put it where all can read it")
    last = min(recipe.epochs, first + args.stop_after - 1) if args.stop_after else recipe.epochs
    kept, begun = describe_run(args, data, model, recipe), bool(own)
    commands = [*earlier_commands(folder), command()] if own else [command()]

    def begin() -> None:
        """Makes way in the run folder, once there is something to put there."""
        nonlocal begun
        begun = True
        if not own:
            utils.clear_run_folder(folder)
        utils.write_json(folder / utils.ARGS, {**kept, "commands": commands, **environment(model)})

    with utils.Signals() as signals, occupied(args, checkpoint, folder, records):
        if first > last:
            print(f"epoch {last} is done already; ask for more with --epochs")
            return
        board: Any = dashboard.Silent()
        if args.visdom and world.leads:
            board = dashboard.connect(folder, args.visdom_server, args.visdom_port, args.visdom_env)
        print(opening_line(folder, data, model, recipe, first, last), flush=True)
        try:
            best = engine.fit(
                trainer,
                data.train,
                data.val,
                folder=folder,
                epochs=range(first, last + 1),
                records=records,
                best=best,
                args=kept,
                begin=begin,
                dashboard=board,
                progress=progress,
                signals=signals,
                save_every=60 * (args.checkpoint_minutes or math.inf),
            )
        except TrainingError as error:
            raise TrainingError(f"{error}; {last_checkpoint(folder) if begun else 'nothing was saved yet'}") from error
    print(f"best top-1 {best:.2f} %: {folder / utils.BEST}")
    if last < recipe.epochs:
        print(f"stopped after epoch {last} of {recipe.epochs}; continue with --resume {folder / utils.CHECKPOINT}")


def check_schedules(args: argparse.Namespace, model: AdaptiveResNet) -> None:
    """Raises InputError for flags of training that do not go together."""
    if args.stochastic_depth and model.num_gates:
        raise InputError("--stochastic-depth is for nets without gates: add --target 1")
    if args.stochastic_depth and processes.world().size > 1:
        raise InputError("--stochastic-depth would drop the same branches in every process: use one process")
    if args.compile and args.temperature_end not in (None, args.temperature):
        raise InputError("--temperature-end changes the network every epoch; --compile would begin anew: choose one")


@contextlib.contextmanager
def occupied(
    args: argparse.Namespace, checkpoint: dict | None, folder: Path, records: list[dict]
) -> Iterator[None]:
    """Makes the run folder and keeps others out of it; after a crash, brings its files in line with the checkpoint.

    Raises:
        InputError: if it cannot be written, or another process trains there, or did since this one looked.
    """
    if not processes.world().leads:
        yield
        return
    with utils.without_empty_folders(folder):
        utils.make_folder(folder)
        with utils.locked(folder):
            utils.clear_temporaries(folder)
            if not recorded(checkpoint):
                utils.check_vacant(folder, args.overwrite)
            else:
                now = utils.load_checkpoint(args.resume)
                if any(now.get(key) != checkpoint.get(key) for key in ("epoch", "seen")):
                    raise InputError(f"another process has just gone on from {args.resume}: start again")
                if Path(args.resume).name == utils.CHECKPOINT:
                    if now.get("is_best"):
                        utils.mend_best(folder)
                    if args.start_epoch == now["epoch"]:  # else the records of later epochs stay until there are others
                        utils.write_records(folder, records)
            yield


def earlier_commands(folder: Path) -> list[str]:
    """The commands that args.json records. Raises InputError if it is damaged."""
    commands = utils.read_json(folder / utils.ARGS).get("commands", [])
    if not isinstance(commands, list):
        raise InputError(f"{folder / utils.ARGS} is damaged: move it away")
    return commands


def last_checkpoint(folder: Path) -> str:
    """Where the last good checkpoint is, and what it holds."""
    path = folder / utils.CHECKPOINT
    if not path.exists():
        return "nothing was saved yet"
    state = utils.load_checkpoint(path)
    where = f"epoch {state['epoch']}, step {state['step']}" if state.get("step") else f"epoch {state['epoch'] - 1}"
    return f"the last good checkpoint, after {where}, is {path}"


def starting_point(
    args: argparse.Namespace,
    checkpoint: dict | None,
    trainer: engine.Trainer,
    train: engine.Loader,
    folder: Path,
) -> tuple[list[dict], float, engine.Progress]:
    """The records of the epochs done, the best accuracy so far, how far the next epoch is. Restores the trainer."""
    if not checkpoint:
        return [], -1.0, engine.Progress()
    best = restore(checkpoint, trainer, args.resume)
    own = recorded(checkpoint)
    if not own:
        return [], best, engine.Progress()
    if own.get("val_size") != vars(args).get("val_size"):
        best = -1.0
        print("the validation set has changed: the best model is chosen anew, and earlier epochs saw these images")
    done = min(args.start_epoch, checkpoint["epoch"])
    records = [record for record in utils.read_records(folder) if record["epoch"] < done]
    return records, best, progress_in(args, checkpoint, train, trainer.recipe)


def progress_in(
    args: argparse.Namespace, checkpoint: dict, train: engine.Loader, recipe: engine.Recipe
) -> engine.Progress:
    """How far the epoch of the checkpoint had come. Raises InputError if it cannot be continued."""
    names = [field.name for field in dataclasses.fields(engine.Progress)]
    if args.start_epoch != checkpoint["epoch"] or not checkpoint.get("step"):
        return engine.Progress()
    try:
        progress = engine.Progress(**{name: checkpoint[name] for name in names})
        expected = min(progress.step * args.batch_size, train.num_images)
        fit = 0 < progress.step <= len(train) and progress.seen == expected and progress.seconds >= 0
        names = ["loss_classify", "loss_target", *(f"top{k}" for k in recipe.topk)]
        shapes = {"gates": (len(recipe.target_rates),), **dict.fromkeys(names, ())}
        fit = fit and {name: tuple(values.shape) for name, values in progress.sums.items()} == shapes
        fit = fit and all(utils.is_ordinary(values) and values.is_floating_point() for values in progress.sums.values())
        fit = fit and all(values.isfinite().all() for values in progress.sums.values())
        progress.sums = {name: values.detach().clone() for name, values in progress.sums.items()}
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"{args.resume}: what it records of its unfinished epoch is damaged ({error})") from error
    if not fit:
        raise InputError(
            f"{args.resume} stopped in the middle of epoch {checkpoint['epoch']}, which goes on only with the same "
            f"images and --batch-size; to begin that epoch again, add --start-epoch {checkpoint['epoch']}"
        )
    return progress


def opening_line(folder: Path, data: Data, model: nn.Module, recipe: engine.Recipe, first: int, last: int) -> str:
    """What is about to run, in one line."""
    parameters = sum(p.numel() for p in model.parameters())
    size = processes.world().size
    return (
        f"{folder}: {parameters:,} parameters, {len(recipe.target_rates)} blocks, "
        f"{data.train.num_images:,} training and {data.val.num_images:,} validation images of "
        f"{len(data.val.classes)} classes, epochs {first} to {last}, "
        f"{utils.device_name(next(model.parameters()).device)}{f' in each of {size} processes' if size > 1 else ''}"
    )


def make_trainer(
    args: argparse.Namespace, model: AdaptiveResNet, recipe: engine.Recipe, gate_layers: Sequence[str]
) -> engine.Trainer:
    """The trainer that the flags ask for: SGD with momentum, `gate_layers` at learning rate lr * lrfact."""
    device, world = next(model.parameters()).device, processes.world()
    if args.sync_bn and world.size > 1:
        if device.type != "cuda":
            raise InputError(f"--sync-bn: torch has it for GPUs only, and this is {device.type}")
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if args.compile:
        try_compiler(device)
    gates, others = [], []
    for name, parameter in model.named_parameters():
        (gates if set(name.split(".")) & set(gate_layers) else others).append(parameter)
    groups = [{"params": others, "lr_factor": 1.0}, {"params": gates, "lr_factor": float(args.lrfact)}]
    optimizer = torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        fused=device.type == "cuda" if args.fused is None else args.fused,  # else the fp16 scaler waits for the GPU
    )
    fill_momentum(optimizer)
    return engine.Trainer(
        model,
        optimizer,
        recipe,
        amp=AMP[args.amp],
        compile=args.compile,
        channels_last=args.channels_last,
        world=world,
    )


def momentum_only(saved: dict, optimizer: torch.optim.SGD) -> dict[str, Any]:
    """A state_dict for the optimizer with nothing of the saved one but its momentum, checked before it is copied.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: if it does not fit.
    """
    own = optimizer.state_dict()
    sizes, own_sizes = ([len(group["params"]) for group in each["param_groups"]] for each in (saved, own))
    if sizes != own_sizes:
        raise ValueError(f"groups of {sizes} parameters instead of {own_sizes}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    own["state"] = {}
    for index, (number, parameter) in enumerate(zip(numbers, parameters, strict=True)):
        buffer = saved["state"].get(number, {}).get("momentum_buffer")
        if buffer is None:
            continue
        if not utils.is_ordinary(buffer) or buffer.shape != parameter.shape or not buffer.is_floating_point():
            raise ValueError(f"momentum {index} of another shape or type")
        own["state"][index] = {"momentum_buffer": buffer.clone()}  # its memory may be shared with others
    return own


def fill_momentum(optimizer: torch.optim.SGD) -> None:
    """Sets momentum that is not there yet to zero, which changes nothing, and which fused SGD needs.

    It would allocate it without values at its first step, and leave it so if the fp16 scaler leaves out that step.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["fused"] and group["momentum"] else ():
            if optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def try_compiler(device: torch.device) -> None:
    """Raises InputError if torch.compile does not work on this machine."""
    print("compiling: the first step can take minutes", flush=True)
    try:
        torch.compile(torch.neg)(torch.zeros(1, device=device))
    except Exception as error:  # it can fail in many ways, which have no common class
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"--compile does not work here: {reason}; on a CPU it needs a C++ compiler") from error


def restore(checkpoint: dict, trainer: engine.Trainer, source: str) -> float:
    """Restores the state of the optimizer and the scaler. Returns the best accuracy so far."""
    optimizer = trainer.optimizer
    best = checkpoint.get("best_prec1", -1)
    best = best.item() if isinstance(best, torch.Tensor) and best.numel() == 1 else best  # as some old files have it
    if not isinstance(best, (int, float)) or not -1 <= best <= 100:
        raise InputError(f"{source}: its best_prec1 is not a number of percent")
    if "optimizer" not in checkpoint:  # as in the original's files
        print(f"{source} holds no optimizer state: the momentum starts at zero")
        return best
    wanted = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(momentum_only(checkpoint["optimizer"], optimizer))
        if trainer.scaler.is_enabled() and (scaler := checkpoint.get("scaler")):
            counts = [scaler["growth_interval"], scaler["_growth_tracker"]]
            factors = [scaler["scale"], scaler["growth_factor"], scaler["backoff_factor"]]
            if not all(type(count) is int for count in counts) or not all(0 < factor < math.inf for factor in factors):
                raise ValueError("its scaler is malformed")
            trainer.scaler.load_state_dict(scaler)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"{source}: its optimizer does not fit this network ({error})") from error
    for group, values in zip(optimizer.param_groups, wanted, strict=True):
        group.update(values)  # the state is the checkpoint's, the hyperparameters are those of the flags
    fill_momentum(optimizer)
    return best


def describe_run(
    args: argparse.Namespace, data: Data, model: AdaptiveResNet, recipe: engine.Recipe
) -> dict[str, Any]:
    """The args that go into args.json and every checkpoint: all flags, and what was derived from the data."""
    mean, std = data.normalisation
    derived = {"classes": data.val.classes, "mean": mean, "std": std}
    derived |= {"lr_milestones": list(recipe.milestones), "block_rates": list(recipe.target_rates)}
    derived |= {"stages": model.stages}
    flags = {name: value for name, value in vars(args).items() if name not in PER_CALL}
    return {**flags, **derived}


def command() -> str:
    """The command line of this process."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def environment(model: nn.Module) -> dict[str, Any]:
    """Versions, commit and hardware, for args.json."""
    return {
        "git_commit": utils.git_commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
        "hardware": utils.device_name(next(model.parameters()).device),
        "processes": processes.world().size,
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
    how = ", closed branches skipped" if result["skipping"] else ", closed branches computed and masked"
    how = ", which runs every branch" if mode in RUNS_EVERYTHING else how
    threshold = f" at threshold {result['threshold']:g}" if mode == "argmax" else ""
    lines = [
        f"gate mode {mode}{threshold}{how}: {result['images']:,} images, {result['images_per_second']:.0f} images/s",
        *(f"  {name:<15}{value:9.2f} %{spread.get(name, '')}" for name, value in result.items() if is_accuracy(name)),
        f"  loss           {result['loss']:9.4f}{spread.get('loss', '')}"
        f"  ({result['loss_classify']:.4f} classification + {result['loss_target']:.4f} target rate)",
        f"  execution rate {result['execution_rate']:9.4f}{spread.get('execution_rate', '')}"
        f"  (target {sum(target_rates) / len(target_rates):.4f})",
        *describe_compute(result, masked=not result["skipping"] and mode not in RUNS_EVERYTHING),
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


def describe_compute(result: dict[str, Any], masked: bool) -> list[str]:
    """The lines of the table about computation: true counts, and the paper's convention."""
    what = "if closed branches were skipped" if masked else "stem, shortcuts, head and gates included"
    quantile = {name: f"{value / 1e6:.2f}" for name, value in result["macs_quantiles"].items()}
    return [
        f"  MMACs an image {result['macs_mean'] / 1e6:9.2f}  ({result['macs_fraction']:.4f} of the dense net's "
        f"{result['macs_dense'] / 1e6:.2f}; {what})",
        f"    5 % of the images below {quantile['0.05']}, 50 % below {quantile['0.5']}, 95 % below {quantile['0.95']}; "
        f"least {quantile['0']}, most {quantile['1']}",
        f"    in the paper's convention {result['macs_paper'] / 1e6:.2f}: the dense net's x execution rate "
        f"(twice that are the paper's CIFAR FLOPs)",
    ]


def is_accuracy(name: str) -> bool:
    return name.startswith("top") and not name.endswith("_std")


def main(script: Callable[[], None], name: str) -> NoReturn:
    """Runs a script's main, as one of several processes if torchrun started it, and ends the process."""
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # broken EXIF data, which nothing here reads
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # --workers is the user's to choose
    warnings.filterwarnings("ignore", message="Grad strides do not match")  # of 1x1 kernels, where it means nothing
    with processes.joined() as failures:
        if not processes.world().leads:
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - open until the process ends
        if status := outcome(script, name, failures):
            sys.exit(status)
    sys.exit(0)


def outcome(script: Callable[[], None], name: str, failures: processes.Failures) -> int:
    """Runs a script's main and returns the exit status of this module's docstring, with its one line on stderr."""
    try:
        script()
        sys.stdout.flush()
        return 0
    except InputError as error:
        line, status = f"{name}: error: {' '.join(str(error).split())}", 2
    except TrainingError as error:
        line, status = f"{name}: {error}", 1
    except BrokenPipeError:  # as in `train.py ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Interrupted as stop:
        line, status = f"{name}: {stop}", 128 + stop.number
    except KeyboardInterrupt:
        line, status = f"{name}: interrupted; what was finished before is saved", 130
    except Exception:
        if failures.first():
            raise
        return 1  # because another process failed, and said why
    # what stops a training does so in all processes, or in the leading one; bad input may be that of one alone
    first = failures.first()
    if first if status == 2 else processes.world().leads:
        print(line, file=sys.stderr)
    return status
