"""What `train.py` and `train_img.py` share: their flags, resuming, running. Nothing below this module sees `args`."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aig import checkpoint as files
from aig import distributed, environment, evaluation, networks, runs
from aig.budget import find_thresholds, make_budget
from aig.console import InputError, Parser, experiment_name, number, one_or_several, say, warn
from aig.dashboard import Dashboard, add_visdom_flags
from aig.data import SPLIT_BY, Batching, Choice, Loaders, check_split_rule, open_loaders, tested_split
from aig.engine import AMP, Recipe, fit, make_optimizer
from aig.losses import Objective
from aig.networks import Pretrained
from aig.state import State, enter_epoch, restore
from aig.tensorboard import TensorBoard
from aig.terms import Distillation
from convnet_aig import GATE_MODES, AdaptiveResNet, check_thresholds

AUTO = "auto"
# flags of one call, never taken over from a checkpoint
PER_CALL = ("resume", "test", "dense", "overwrite", "start_epoch", "stop_after", "device")
PER_CALL += ("test_size", "reestimate_bn", "visdom", "visdom_server", "visdom_port", "visdom_env", "tensorboard")
PER_CALL += ("workers",)
ONLY_TRAINING = ("budget", "distill", "pretrained")  # what --test does not take over
IMAGES = ("seed", "dataset", "split", "val_size", "train_size", "image_size")  # decide which images a step sees
GATING = ("target", "target_rates", "gate_mode", "threshold")  # decide what runs in validation; the last in argmax only
BUDGET_WEIGHT, FINE_TUNING_LR = 50, 0.02  # see results/pilot.md
DROPPED = {"temperature_end": None}  # flags of earlier versions, and the value at which they did nothing


# ---------------------------------------------------------------------------------------------- flags


def make_parser(description: str, **defaults: Any) -> Parser:
    """A parser with the flags of both scripts; `defaults` sets those that differ between the two."""
    parser = Parser(description=description)
    add_run_flags(parser.add_argument_group("run"))
    add_training_flags(parser.add_argument_group("training"))
    add_newer_flags(parser.add_argument_group("beyond the paper"))
    add_speed_flags(parser.add_argument_group("speed of training"))
    add_evaluation_flags(parser.add_argument_group("evaluation"))
    parser.set_defaults(**defaults)
    return parser


def add_run_flags(run: argparse._ArgumentGroup) -> None:
    positive = number(int, 1)
    run.add_argument("--expname", type=experiment_name, help="name of the experiment and its run folder")
    run.add_argument("--save", default="", metavar="DIR", help="root of the run folders; '' means runs")
    run.add_argument("--overwrite", action="store_true", help="start anew in place of an earlier run of that name")
    run.add_argument("--resume", default="", metavar="RUN",
                     help="continue (or --test) this checkpoint or run folder; auto: the run folder's, if it has one")
    run.add_argument("--stop-after", type=positive, metavar="N", help="end after N more epochs, schedule unchanged")
    run.add_argument("--checkpoint-minutes", type=number(float, above=0), metavar="M",
                     help="save in mid-epoch, too, every M minutes")
    place = run.add_mutually_exclusive_group()
    place.add_argument("--no-cuda", action="store_const", const="cpu", dest="device", default=argparse.SUPPRESS,
                       help="the same as --device cpu")
    place.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"),
                       help="where to compute; auto takes a GPU if there is one")
    run.add_argument("--seed", type=number(int, 0), default=1, help="of weights, shuffling, augmentation and noise")
    run.add_argument("--deterministic", action=argparse.BooleanOptionalAction, default=False,
                     help="only algorithms that repeat exactly; else an error")
    run.add_argument("--visdom", action="store_true", help="show the run live on a visdom server")
    add_visdom_flags(run)
    run.add_argument("--tensorboard", action="store_true", help="write the records to the run folder for TensorBoard")
    run.add_argument("--print-freq", "-p", type=positive, help="steps between lines, where no terminal shows a bar")
    run.add_argument("--log-interval", type=positive, default=20, help="steps between refreshes of the progress bar")


def add_training_flags(training: argparse._ArgumentGroup) -> None:
    above0 = number(float, above=0)
    training.add_argument("--epochs", type=number(int, 1, 100_000), help="length of the schedule")
    training.add_argument("--start_epoch", "--start-epoch", type=number(int, 1), default=1, help="first epoch to run")
    training.add_argument("--batch-size", type=number(int, 2), default=256, help="images, over all processes")
    training.add_argument("--lr", "--learning-rate", type=above0, default=0.1, help="learning rate at the start")
    training.add_argument("--lrfact", type=number(float, 0), default=1, help="learning-rate factor of the gates")
    training.add_argument("--momentum", type=number(float, 0, 1), default=0.9, help="of SGD")
    training.add_argument("--weight-decay", "--wd", type=number(float, 0), help="of SGD")
    training.add_argument("--target", type=number(float, 0, 1),
                          help="target rate t of the gates; a block at rate 1 has no gate")
    training.add_argument("--lossfact", type=number(float, 0), help="weight of the target-rate loss")
    training.add_argument("--temperature", type=above0, default=1, help="of the gates' Gumbel-softmax")
    training.add_argument("--stochastic-depth", type=one_or_several(number(float, 0, below=1)), default=0,
                          metavar="P[,P,...]", help="drop branches with this probability, one for all or one "
                          "per block, in nets without gates")


def add_newer_flags(newer: argparse._ArgumentGroup) -> None:
    natural, above0, part = number(int, 0), number(float, above=0), number(float, above=0, below=1)
    switch = argparse.BooleanOptionalAction
    newer.add_argument("--warmup", type=natural, default=0, metavar="EPOCHS", help="epochs of linear rise to lr")
    newer.add_argument("--target-warmup", type=number(float, 0), metavar="EPOCHS",
                       help="epochs in which the target rates fall from 1 to their values (default: 0; with --budget "
                       "a third of --epochs, for its floor)")
    newer.add_argument("--lr-schedule", default="step", choices=("step", "cosine"),
                       help="divide lr by 10 at the milestones, or let it fall to 0 along a cosine")
    newer.add_argument("--nesterov", action=switch, default=False, help="Nesterov's momentum")
    newer.add_argument("--gate-decay", action=switch, default=True, help="apply weight decay to the gates, too")
    newer.add_argument("--pretrained", default="", metavar="FILE",
                       help="start from these weights: a run of ours, a .pth or .safetensors file of torchvision or "
                       f"timm, torchvision[:NAME]; --lr is then {FINE_TUNING_LR:g} by default")
    newer.add_argument("--budget", type=part, metavar="B",
                       help="one target for the whole net instead of --target: this fraction of the dense "
                       "net's multiply-accumulates; with --test: choose thresholds for it")
    newer.add_argument("--budget-weight", type=above0, default=BUDGET_WEIGHT, metavar="W",
                       help="weight of the budget's loss and of the floor's")
    newer.add_argument("--budget-floor", action=switch, default=True,
                       help="penalise gates that open more rarely than a floor, "
                       "which comes down in --target-warmup epochs")
    newer.add_argument("--distill", default="", metavar="FILE",
                       help="a trained network that teaches this one; named as for --pretrained")
    newer.add_argument("--distill-weight", type=part, default=0.5, metavar="W",
                       help="of the teacher; the labels weigh 1 - W")
    newer.add_argument("--distill-temperature", type=above0, default=4, metavar="T",
                       help="softens the outputs of teacher and student")


def add_speed_flags(speed: argparse._ArgumentGroup) -> None:
    switch = argparse.BooleanOptionalAction
    speed.add_argument("--amp", default="off", choices=AMP, help="mixed precision; gates and losses stay in float32")
    speed.add_argument("--compile", action=switch, default=False, help="torch.compile: slow to start, then faster")
    speed.add_argument("--channels-last", action=switch, default=True, help="memory format of images and weights")
    speed.add_argument("--fused", action=switch, help="fused SGD (default: on CUDA)")
    speed.add_argument("--tf32", action=switch,
                       help="TF32 products on NVIDIA GPUs (default: torch's own, in convolutions only)")
    speed.add_argument("--sync-bn", action=switch, default=False, help="BatchNorm over the images of all GPUs")


def add_evaluation_flags(evaluation: argparse._ArgumentGroup) -> None:
    positive = number(int, 1)
    evaluation.add_argument("--test", action="store_true", help="evaluate the --resume checkpoint and stop")
    evaluation.add_argument("--gate-mode", default="argmax", choices=GATE_MODES, help="how gates decide in evaluation")
    evaluation.add_argument("--threshold", type=one_or_several(number(float, above=0, below=1)), default=0.5,
                            metavar="P[,P,...]", help="gate mode argmax opens a gate where P(open) is above this, "
                            "one for all or one per gate")
    evaluation.add_argument("--dense", action="store_true",
                            help="--test: compute every branch and mask it, instead of running only the open ones")
    evaluation.add_argument("--test-size", type=positive, metavar="N",
                            help="--test: only N of the images, the same ones every time")
    evaluation.add_argument("--reestimate-bn", action="store_true",
                            help="--test: take BatchNorm's statistics anew from the training images, in this gate mode")
    evaluation.add_argument("--gate-samples", type=positive, default=5, help="seeds of --test --gate-mode sample")


def parse(
    parser: Parser, argv: Sequence[str] | None, architecture: Sequence[str]
) -> tuple[argparse.Namespace, dict | None]:
    """The values of all flags, and the checkpoint of --resume.

    Flags not given are taken from the checkpoint's own `args`. `architecture` names those that must not differ.
    Raises InputError on a bad command line or checkpoint.
    """
    args, given = parser.parse_args(argv), parser.given(argv)
    if args.resume == AUTO:
        find_resumable(args, given)
    if args.resume:
        names = files.TRAINED if args.test else (runs.CHECKPOINT,)
        args.resume = given["resume"] = str(files.checkpoint_in(args.resume, *names))
    if not args.resume:
        check_flags(args, given)
        if args.test:
            raise InputError("--test needs the run to evaluate: --resume runs/NAME")
        runs.check_vacant(new_folder(args), args.overwrite)
        if args.start_epoch > args.epochs:
            raise InputError(f"--start-epoch {args.start_epoch} comes after the last of {args.epochs} epochs")
        check_sources(args)
        if args.pretrained and "lr" not in given:
            args.lr = FINE_TUNING_LR
        return settle(args), None
    checkpoint = files.load_checkpoint(args.resume)
    if own := files.recorded(checkpoint):
        inherited = inherit(parser, own, given, architecture, args.resume)
        args = argparse.Namespace(**{**vars(parser.parse_args([])), **inherited, **given})
        if args.test:
            args.split = tested_split(args.split, args.data or "", own, given, args.resume)
        else:
            check_split_rule(own, args.resume)
    check_flags(args, given)
    if not args.test:
        args.start_epoch = given.get("start_epoch", checkpoint.get("epoch"))
        if "start_epoch" in given:
            checkpoint["step"] = 0  # the epoch is to begin anew
        check_resumable(args, checkpoint, given)
    return settle(args), checkpoint


def settle(args: argparse.Namespace) -> argparse.Namespace:
    """Gives flags their values where these depend on others."""
    if args.budget and args.test:
        args.gate_mode = "argmax"
    elif args.budget:
        args.target, args.lossfact = args.budget, 0  # below 1, a target here only means: this block has a gate
    if args.budget and not args.budget_floor:
        args.target_warmup = 0
    elif args.target_warmup is None:
        args.target_warmup = args.epochs / 3 if args.budget else 0
    return args


def check_sources(args: argparse.Namespace) -> None:
    """Raises InputError if a new run would replace the network that it starts or learns from."""
    folder = new_folder(args).resolve()
    for name in ("pretrained", "distill"):
        source = vars(args)[name]
        if source and folder in (Path(source).resolve(), *Path(source).resolve().parents):
            raise InputError(f"--{name} {source} is in the folder of the new run: choose another --expname")


def check_flags(args: argparse.Namespace, given: dict[str, Any]) -> None:
    """Raises InputError for flags that do not go together."""
    trains_to_budget = args.budget and not args.test
    mode = "argmax" if args.test and args.budget else args.gate_mode
    rules = [  # flags, when they may not be given, and why
        (("dense", "test_size", "reestimate_bn"), not args.test, "is for --test: add it"),
        (("visdom", "tensorboard"), args.test, "shows a training: leave it out with --test"),
        (("distill", "pretrained"), args.test, "is for training: leave it out with --test"),
        (("threshold", "reestimate_bn"), args.test and args.budget, "does not go with --test --budget: leave it out"),
        (("milestones", "lrdecay"), args.lr_schedule == "cosine", "is for --lr-schedule step: a cosine has no steps"),
        (("target", "lossfact"), trains_to_budget, "is about a rate for each gate: --budget takes its place"),
        (("target_warmup",), args.budget and not args.budget_floor, "is for the floor, which is off: leave it out"),
        (("budget_weight", "budget_floor"), not trains_to_budget, "works only in a training to a --budget"),
        (("threshold",), args.test and mode != "argmax", f"does nothing in gate mode {mode}"),
        (("gate_samples",), args.test and mode != "sample", f"does nothing in gate mode {mode}"),
        (("overwrite",), args.test, "is for training: leave it out with --test"),
        (("distill_weight", "distill_temperature"), not args.distill, "does nothing without --distill"),
        (("visdom_server", "visdom_port", "visdom_env"), not args.visdom, "says where to show the run: add --visdom"),
    ]
    for names, forbidden, why in rules:
        for name in names:
            if forbidden and name in given:
                raise InputError(f"--{name.replace('_', '-')} {why}")
    if args.test and args.budget and given.get("gate_mode", "argmax") != "argmax":
        raise InputError(f"--gate-mode {args.gate_mode}: --test --budget is about argmax")
    if args.nesterov and not args.momentum:
        raise InputError("--nesterov needs a --momentum above 0")


def find_resumable(args: argparse.Namespace, given: dict[str, Any]) -> None:
    """Resolves `--resume auto`: the run folder, or a fresh start if it has no checkpoint yet."""
    if "overwrite" in given:
        raise InputError("--overwrite starts a run anew, --resume auto goes on with it: leave one out")
    folder = new_folder(args)
    there, *others = ((folder / name).exists() for name in (runs.CHECKPOINT, runs.BEST, runs.TEST))
    args.resume = given["resume"] = str(folder) if there else ""
    if there:
        given.pop("pretrained", None)
    elif not any(others) and len(runs.read_records(folder)) <= 1:
        args.overwrite = True  # what a run has left that ended before its first checkpoint


def inherit(
    parser: Parser, own: dict, given: dict[str, Any], architecture: Sequence[str], source: str
) -> dict[str, Any]:
    """The flags recorded in a checkpoint, checked as if they had been typed."""
    for name in architecture:
        flag = "--" + name.replace("_", "-")
        if own.get(name) is None:
            other = "train.py" if "depth" in own else "train_img.py" if "arch" in own else ""
            use = f"; use {other}" if other else ""
            raise InputError(f"{source} is not a checkpoint of this script: it does not record {flag}{use}")
        trained = parser.as_typed({name: own[name]}, source)[name]
        if given.get(name, trained) != trained:
            raise InputError(f"{flag} {given[name]}: {source} was trained with {flag} {trained}")
    for name, harmless in DROPPED.items():
        if own.get(name, harmless) != harmless:
            raise InputError(f"{source} was trained with --{name.replace('_', '-')}, which this version does not have")
    wanted = parser.flags.keys() - set(PER_CALL) - set(ONLY_TRAINING if given.get("test") else ())
    return parser.as_typed({name: value for name, value in own.items() if name in wanted}, source)


def check_resumable(args: argparse.Namespace, checkpoint: dict, given: dict[str, Any]) -> None:
    """Raises InputError if training cannot go on from the checkpoint as the flags ask."""
    own = files.recorded(checkpoint)
    epochs = (args.start_epoch, checkpoint.get("epoch")) if own else (args.start_epoch,)
    if not all(isinstance(epoch, int) and epoch >= 1 for epoch in epochs):
        raise InputError(f"{args.resume} does not say which epoch comes next")
    if own.get("lr_schedule") == "cosine" and args.epochs != own.get("epochs"):
        raise InputError(
            f"--epochs {args.epochs}: the cosine of {args.resume} ends after {own.get('epochs')} epochs, and another "
            f"would jump; start a new run from its weights, with --pretrained"
        )
    for name, usual in (("gate_decay", True), ("lr_schedule", "step"), ("budget", None)):
        if own and own.get(name, usual) != vars(args)[name]:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} is decided when a run begins: start a new one with --pretrained {args.resume}")
    if Path(args.resume).name == files.WEIGHTS:
        raise InputError(f"{args.resume} keeps no state of a training: start a new run with --pretrained")
    if given.get("pretrained"):
        raise InputError("--pretrained starts a new run: it does not go with --resume")
    folder = run_folder(args, checkpoint)
    if not own:
        runs.check_vacant(folder, args.overwrite)
        if folder.resolve() == Path(args.resume).resolve().parent:
            raise InputError(f"{args.resume} would be overwritten: choose another --expname or --save")
        return
    if Path(args.resume).name in (runs.CHECKPOINT, runs.BEST):
        if "overwrite" in given:
            raise InputError(f"--overwrite starts a run anew: leave it out to go on from {args.resume}")
    elif any((folder / name).exists() for name in (runs.CHECKPOINT, runs.BEST)):
        raise InputError(f"{folder} holds a run, which going on from {args.resume} would replace: copy that file into "
                         "a folder of its own")
    if {"expname", "save"} & given.keys():
        asked = new_folder(args) if "save" in given else folder.parent / args.expname
        if asked.resolve() != folder.resolve():
            raise InputError(f"{args.resume} continues in its own folder, {folder}, not in {asked}: leave out the name")


def new_folder(args: argparse.Namespace) -> Path:
    """The folder of a new run."""
    return Path(args.save or "runs") / args.expname


def run_folder(args: argparse.Namespace, checkpoint: dict | None) -> Path:
    """Where a training writes: in the run folder that it resumes, else in --save/--expname.

    A checkpoint without args, such as the original's, is of no run folder of ours, and its folder is left alone.
    """
    return Path(args.resume).parent if files.recorded(checkpoint) else new_folder(args)


# ---------------------------------------------------------------------------------------------- flags to values


def named_in(args: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The flags that are called as fields of a dataclass."""
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in vars(args).items() if name in names}


def open_pretrained(args: argparse.Namespace, checkpoint: dict | None) -> Pretrained | None:
    """The weights that a new run starts from."""
    if checkpoint or not args.pretrained:
        return None
    pretrained = networks.read_pretrained(args.pretrained, vars(args).get("arch"))
    say_if_not_held_out(args, pretrained)
    return pretrained


def say_if_not_held_out(args: argparse.Namespace, network: Pretrained) -> None:
    """Says if a network may have been trained on images that this run validates on."""
    for name in ("split", "val_size"):
        if name in network.args and network.args[name] != vars(args).get(name):
            flag = f"--{name.replace('_', '-')}"
            why = "it may have been trained on images that this run validates on"
            say(f"warning: {network.source} had another {flag}: {why}")


def load_data(args: argparse.Namespace, checkpoint: dict | None, pretrained: Pretrained | None = None) -> Loaders:
    """The images that the flags, and the checkpoint, ask for; normalised as a pretrained network's were."""
    own, before = files.recorded(checkpoint), pretrained.args if pretrained else {}
    recorded = {"classes": own.get("classes")} | {name: {**before, **own}.get(name) for name in ("mean", "std")}
    choice = Choice(**{**named_in(args, Choice), "data": args.data or "", **recorded,
                       "needs_training": args.reestimate_bn, "calibrates": bool(args.test and args.budget)})
    place = {"device": environment.select_device(args.device), "world": distributed.world()}
    return open_loaders(choice, Batching(**{**named_in(args, Batching), **place}))


def make_recipe(
    args: argparse.Namespace, checkpoint: dict | None, loaders: Loaders, model: AdaptiveResNet, **derived: Any
) -> Recipe:
    """The recipe of the flags: those called as its attributes, and what the script derives from others."""
    last = min(args.epochs, args.start_epoch + args.stop_after - 1) if args.stop_after else args.epochs
    num_classes = len(loaders.val.classes)
    # of few classes, top-5 says nothing
    derived["topk"] = [k for k in derived["topk"] if k == 1 or k < num_classes]
    derived |= {"target_rates": model.target_rates, "last": last, "fine_tunes": bool(args.pretrained)}
    derived |= {"budget": None, "distillation": None}
    if args.budget and not args.test:
        weight, device = args.budget_weight, environment.select_device(args.device)
        try:
            derived["budget"] = make_budget(model, loaders.val.size, args.budget, weight, args.budget_floor, device)
        except ValueError as error:
            raise InputError(f"--budget: {error}") from error
    if args.distill:
        taught = networks.read_pretrained(args.distill, vars(args).get("arch"))
        weights = networks.digest(taught.state)
        if "distill_sha256" in files.recorded(checkpoint):  # as version 0.1.0 recorded it
            say(f"{args.resume} is of an earlier version: whether {args.distill} is its teacher cannot be checked")
        if files.recorded(checkpoint).get("distill_weights", weights) != weights:
            how = "name that one with --distill"
            raise InputError(f"{args.distill} is not the teacher that this run began with: {how}")
        say_if_not_held_out(args, taught)
        teacher = networks.load_teacher(taught, loaders.val, environment.select_device(args.device), AMP[args.amp])
        derived["distillation"] = Distillation(teacher, args.distill_weight, args.distill_temperature, weights)
    return Recipe(**{**named_in(args, Recipe), **derived})


def describe_run(args: argparse.Namespace, loaders: Loaders, model: AdaptiveResNet, recipe: Recipe) -> dict[str, Any]:
    """The args that go into args.json and every checkpoint: all flags, and what was derived from the data."""
    mean, std = loaders.normalisation
    derived = {"classes": loaders.val.classes, "mean": list(mean), "std": list(std), "stages": model.stages}
    derived |= {"lr_milestones": list(recipe.milestones), "block_rates": list(recipe.target_rates)}
    if args.split:
        derived["split_by"] = SPLIT_BY
    if recipe.distillation:
        derived["distill_weights"] = recipe.distillation.digest
    flags = {name: value for name, value in vars(args).items() if name not in PER_CALL}
    return {**flags, **derived}


# ---------------------------------------------------------------------------------------------- running


def run(
    args: argparse.Namespace,
    checkpoint: dict | None,
    loaders: Loaders,
    model: AdaptiveResNet,
    recipe: Recipe,
    pretrained: Pretrained | None = None,
) -> None:
    """Tests or trains `model`, as `args` say, from a checkpoint, from pretrained weights or from new ones."""
    if checkpoint:
        rates = files.recorded(checkpoint).get("block_rates", model.target_rates)
        if [rate < 1 for rate in rates] != [rate < 1 for rate in model.target_rates]:
            raise InputError(f"these target rates put gates on other blocks than in {args.resume}: leave them out")
        files.load_weights(model, checkpoint["state_dict"], args.resume)
    elif pretrained:
        say(pretrained.load_into(model, loaders.val.classes))
    device = environment.select_device(args.device)
    model.to(device, memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)
    if args.deterministic:
        environment.make_deterministic()
    if args.tf32 is not None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    try:
        check_thresholds(args.threshold, model.num_gates)
    except ValueError as error:
        raise InputError(f"--threshold: {error}") from error
    model.gate_mode, model.threshold = args.gate_mode, args.threshold
    go_on = run_test if args.test else run_training
    go_on(args, checkpoint, loaders, model, recipe)


def result_key(args: argparse.Namespace, own: dict[str, Any]) -> str:
    """The name of a result in test.json: the gate mode, and each setting that is not the default or the training's."""
    thresholds = args.threshold if isinstance(args.threshold, list) else [args.threshold]
    usual = args.gate_mode != "argmax" or args.threshold == 0.5
    threshold = "" if usual else f"@{','.join(f'{value:g}' for value in thresholds)}"
    threshold = f"@budget={args.budget:g}" if args.budget else threshold
    size = vars(args).get("image_size")
    other = size if size != own.get("image_size", size) else None
    return args.gate_mode + threshold + (f"+size={other}" if other else "") + "+bn" * args.reestimate_bn


def run_test(
    args: argparse.Namespace, checkpoint: dict, loaders: Loaders, model: AdaptiveResNet, recipe: Recipe
) -> None:
    """Evaluates, prints a table, and puts the result into test.json, beside those of other modes and thresholds."""
    path, key = Path(args.resume).parent / runs.TEST, result_key(args, files.recorded(checkpoint))
    target_rates = None if files.recorded(checkpoint).get("budget") else recipe.target_rates
    runs.read_json(path)  # a damaged one is found now
    if args.reestimate_bn:
        if distributed.world().size > 1:
            raise InputError("--reestimate-bn: use one process")
        evaluation.reestimate_batchnorm(model, loaders.train, environment.derive_seed(args.seed, "BatchNorm"))
    if args.budget:
        set_thresholds(args, checkpoint, loaders, model)
    objective = recipe.objective(next(model.parameters()).device, distributed.world())
    how = {"samples": args.gate_samples, "seed": args.seed, "dense": args.dense}
    result = evaluation.measure(model, loaders.val, objective, **how)
    del result["gates_by_class"]
    epoch = checkpoint.get("epoch")
    result["epoch"] = epoch - 1 if isinstance(epoch, int) else None  # the file holds the next one to run
    result |= {"checkpoint": Path(args.resume).name, "weights": networks.digest(checkpoint["state_dict"])}
    result |= {"image_size": list(loaders.val.size), "data": args.data}
    say(evaluation.describe(result, args.gate_mode, target_rates, args.budget))
    if args.test_size:
        say(f"not written to {path}, which is about all images")
        return
    if distributed.world().is_main:
        runs.write_json(path, {**runs.read_json(path), key: result})  # another test may have ended
    say(f"written to {path}, as {key}")


def set_thresholds(args: argparse.Namespace, checkpoint: dict, loaders: Loaders, model: AdaptiveResNet) -> None:
    """Sets the thresholds at which the model keeps to the budget on training images. Raises InputError."""
    if distributed.world().size > 1:
        raise InputError("--test --budget: use one process")
    images = loaders.calibration
    try:
        model.threshold, executed = find_thresholds(model, images, args.budget)
    except ValueError as error:
        raise InputError(f"--budget: {error}") from error
    kind = "a threshold for each gate" if isinstance(model.threshold, list) else f"threshold {model.threshold:.4f}"
    held_out = vars(args).get("val_size") and args.val_size == files.recorded(checkpoint).get("val_size")
    which = f"{images.num_images:,} {'held-out ' if held_out else ''}training images"
    say(f"{kind}, chosen for the budget {args.budget:g} on {which}, which execute {executed:.3f}")


def run_training(
    args: argparse.Namespace, checkpoint: dict | None, loaders: Loaders, model: AdaptiveResNet, recipe: Recipe
) -> None:
    """Trains from the start, or from where the checkpoint stopped."""
    world, folder, train = distributed.world(), run_folder(args, checkpoint), loaders.train
    check_training(args, model, loaders)
    if next(model.parameters()).device.type == "cpu":
        environment.keep_memory()
    # cuDNN's trials pay for the few shapes of a training; skipped branches in --test have another one each time
    torch.backends.cudnn.benchmark = not args.deterministic
    if args.compile:
        environment.try_compiler(next(model.parameters()).device)
    if rates := args.stochastic_depth:
        drop_branches(model, rates if isinstance(rates, list) else [rates] * sum(model.stages))
    state = make_state(args, checkpoint, loaders, model, recipe)
    own = files.recorded(checkpoint)
    started = runs.Run(
        folder,
        describe_run(args, loaders, model, recipe),
        environment.environment(model),
        resumed=Path(args.resume) if own else None,
        checkpoint=checkpoint or {},
        first=args.start_epoch,
        overwrite=args.overwrite,
        save_every=60 * (args.checkpoint_minutes or math.inf),
        world=world,
    )
    boards: list[Any] = [TensorBoard(folder)] if args.tensorboard and world.is_main else []
    if (before := own.get("epochs")) and recipe.epochs > before and vars(args).get("milestones", 0) is None:
        say(f"the run was of {before} epochs: the learning rate keeps its milestones; give others with --milestones")
    with runs.start_run(started) as run:
        if args.start_epoch > recipe.last:
            say(f"epoch {recipe.last} is done already; ask for more with --epochs")
            return
        if args.visdom and world.is_main:
            try:
                boards.append(Dashboard(folder, args.visdom_server, args.visdom_port, args.visdom_env))
            except InputError as error:  # visdom is not installed
                warn(f"--visdom: {error}")
        say(opening_line(folder, loaders, model, args.start_epoch, recipe.last))
        if recipe.fine_tunes and not checkpoint:
            say(before_training(loaders, model, recipe))
        fit(state, train, loaders.val, recipe, run, boards)
        newest = "the newest model, since target rates or floor have yet to come down"
        best = f"best top-1 {state.best:.2f} %" if state.best >= 0 else newest
        say(f"{best}: {folder / runs.BEST}")
        if recipe.last < recipe.epochs:
            go_on = f"continue with --resume {folder / runs.CHECKPOINT}"
            say(f"stopped after epoch {recipe.last} of {recipe.epochs}; {go_on}")


def before_training(loaders: Loaders, model: AdaptiveResNet, recipe: Recipe) -> str:
    """What the loaded network gives with every gate open, in one line."""
    mode, model.gate_mode = model.gate_mode, "all"
    objective = Objective(recipe.target_rates, 0, recipe.topk, next(model.parameters()).device, distributed.world())
    top1 = evaluation.evaluate(model, loaders.val, objective, seed=0)["top1"]
    model.gate_mode = mode
    return f"before training, with every gate open: top1 {top1:.2f} % of the validation images"


def check_training(args: argparse.Namespace, model: AdaptiveResNet, loaders: Loaders) -> None:
    """Raises InputError for images and flags with which no training is possible."""
    size, train = distributed.world().size, loaders.train
    if args.batch_size < 2 * size or train.num_images < 2 * size:
        raise InputError(
            f"--batch-size {args.batch_size} and {train.num_images} training images: each of {size} "
            "process(es) needs two images of a batch, for the BatchNorm of the gates"
        )
    if train.dropped:
        say(
            f"the last batch of each epoch would have {train.dropped} image(s) and is left out: "
            "BatchNorm of the gates needs two in each process"
        )
    if args.lr_schedule == "cosine" and len(train) == 1:
        say("an epoch is a single step, so the last epoch trains nothing: its learning rate is 0 by --lr-schedule "
            "cosine; choose a smaller --batch-size")
    if args.stochastic_depth and model.num_gates:
        raise InputError("--stochastic-depth is for nets without gates: add --target 1")
    if isinstance(args.stochastic_depth, list) and len(args.stochastic_depth) != sum(model.stages):
        raise InputError(f"--stochastic-depth: {len(args.stochastic_depth)} rates for {sum(model.stages)} blocks")
    if args.stochastic_depth and size > 1:
        raise InputError("--stochastic-depth would drop the same branches in every process: use one process")
    device = next(model.parameters()).device
    if args.sync_bn and size > 1 and device.type != "cuda":
        raise InputError(f"--sync-bn: torch has it for GPUs only, and this is {device.type}")


def drop_branches(model: AdaptiveResNet, rates: Sequence[float]) -> None:
    """Trains the blocks without gate with stochastic depth: each drops its branch with its rate."""
    from torchvision.ops import StochasticDepth  # here, because importing torchvision takes seconds

    for block, rate in zip(model.blocks(), rates, strict=True):
        block.drop = StochasticDepth(rate, "row")


def make_state(
    args: argparse.Namespace, checkpoint: dict | None, loaders: Loaders, model: AdaptiveResNet, recipe: Recipe
) -> State:
    """Where training begins: at the start, or where the checkpoint stopped. Raises InputError if that does not fit."""
    device, world, train = next(model.parameters()).device, distributed.world(), loaders.train
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")  # keeps float16 gradients from vanishing
    state = State(model, make_optimizer(model, recipe), scaler, len(train), world, args.start_epoch)
    if checkpoint:
        restore(state, checkpoint, args.resume)
    if checkpoint and not files.recorded(checkpoint):
        state.best = -1.0  # the best of another program's folder is none of this run's
    elif checkpoint:
        if why := why_best_is_void(args, checkpoint, model, state.best):
            state.best = -1.0
            say(f"{why}: the best model is chosen anew")
        check_mid_epoch(args, checkpoint)
        enter_epoch(state, checkpoint, train, recipe.objective(device, world), args.resume)
    if [state.epoch, state.step] != [-highest for highest in world.all_max(-state.epoch, -state.step)]:
        raise InputError(f"not all processes see the same {args.resume}: put it where all can read it")
    return state


def changed(args: argparse.Namespace, checkpoint: dict, names: Sequence[str]) -> list[str]:
    """Which of these flags, as they are typed, differ from those of the checkpoint."""
    own = files.recorded(checkpoint)
    return [f"--{name.replace('_', '-')}" for name in names if own.get(name) != vars(args).get(name)]


def why_best_is_void(args: argparse.Namespace, checkpoint: dict, model: AdaptiveResNet, best: float) -> str:
    """Why `best`, the best accuracy so far, cannot be compared with those to come; "" if it can."""
    own, file = files.recorded(checkpoint), Path(args.resume)
    if changed(args, checkpoint, ("val_size", "split")):
        return "the validation set has changed, and earlier epochs saw its images"
    if changed(args, checkpoint, ("dataset", "image_size")):
        return "the validation images have changed"
    gating = GATING if "argmax" in (own.get("gate_mode"), args.gate_mode) else GATING[:-1]
    flags = changed(args, checkpoint, [name for name in gating if name in own])
    if flags and model.num_gates:
        return f"{flags[0]} has changed"
    is_best = checkpoint.get("is_best") and file.name == runs.CHECKPOINT  # then `Run.tidy` makes a copy of it
    if best >= 0 and not is_best and not file.with_name(runs.BEST).exists():
        return f"there is no {runs.BEST} beside {file}"
    return ""


def check_mid_epoch(args: argparse.Namespace, checkpoint: dict) -> None:
    """Raises InputError if an epoch that was left in the middle would go on with other images."""
    flags = changed(args, checkpoint, IMAGES)
    if checkpoint.get("step") and flags:
        raise InputError(
            f"{flags[0]}: {args.resume} stopped in the middle of epoch {checkpoint['epoch']}, which goes on "
            f"only with what it began with; to begin that epoch again, add --start-epoch {checkpoint['epoch']}"
        )


def opening_line(folder: Path, loaders: Loaders, model: nn.Module, first: int, last: int) -> str:
    """What is about to run, in one line."""
    parameters, size = sum(p.numel() for p in model.parameters()), distributed.world().size
    return (
        f"{folder}: {parameters:,} parameters, {sum(model.stages)} blocks, {loaders.train.num_images:,} training and "
        f"{loaders.val.num_images:,} validation images of {len(loaders.val.classes)} classes, epochs {first} to "
        f"{last}, {environment.device_name(next(model.parameters()).device)}"
        f"{f' in each of {size} processes' if size > 1 else ''}"
    )
