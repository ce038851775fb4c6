"""Checkpoints: reading them safely, rebuilding a network from one, pretrained weights.

A file is never trusted: nothing in it is run (`weights_only=True`), every byte of a zip file is checked against its
checksum, and keys, shapes and types are compared before anything is copied.
"""

from __future__ import annotations

import math
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aig.console import InputError
from aig.data import DATASETS, IMAGENET_STATISTICS
from aig.images import Preprocess
from convnet_aig import GATE_LAYERS, AdaptiveResNet, BasicBlock, Bottleneck, ResNet_cifar, ResNet_ImageNet

CHECKPOINT, BEST = "checkpoint.pth.tar", "model_best.pth.tar"  # of a run folder
KINDS = {"epoch": (int,), "step": (int,), "seen": (int,), "seconds": (int, float), "is_best": (bool,), "sums": (dict,)}
MSDOS_FOLDER = 0x10  # an attribute in a zip file, for which torch.load would read nothing


# ---------------------------------------------------------------------------------------------- reading


def load_checkpoint(path: str | Path) -> dict:
    """Reads a checkpoint of this program or of the original, onto the CPU, without running code from it.

    Returns:
        Its dict, with the prefixes `module.` and `_orig_mod.` taken off the keys of `state_dict`.

    Raises:
        InputError: if the file is missing, damaged, or holds something else.
    """
    checkpoint = load_safely(path)
    if not isinstance(checkpoint, dict) or not is_state_dict(checkpoint.get("state_dict")):
        raise InputError(f"{path} holds no state_dict of tensors: not a checkpoint of a ConvNet-AIG")
    checkpoint["state_dict"] = without_prefixes(checkpoint["state_dict"])
    for name, kinds in KINDS.items():
        if name in checkpoint and type(checkpoint[name]) not in kinds:
            kind = type(checkpoint[name]).__name__
            raise InputError(f"{path}: its {name} is a {kind}; not a checkpoint of this program")
    check_args(checkpoint.get("args", {}), path)
    return checkpoint


def check_args(args: Any, path: str | Path) -> None:
    """Raises InputError if what a checkpoint records of its data is malformed. Its flags are for `utils` to check."""

    def numbers(name: str) -> bool:
        return all(isinstance(value, (int, float)) and math.isfinite(value) for value in args[name])

    try:
        fit = isinstance(args, dict) and all(isinstance(name, str) for name in args.get("classes", []))
        if fit and "mean" in args:
            fit = len(args["mean"]) == len(args["std"]) == 3 and numbers("mean") and numbers("std")
            fit = fit and min(args["std"]) > 0
        fit = fit and all(numbers(name) for name in ("block_rates", "lr_milestones") if name in args)
    except (TypeError, KeyError, OverflowError):
        fit = False
    if not fit:
        raise InputError(f"{path}: its args are malformed; not a checkpoint of this program")


def load_safely(path: str | Path) -> Any:
    """What `torch.save` wrote into a file, on the CPU, without running code from it. Raises InputError."""
    try:
        if not Path(path).is_file():
            raise InputError(f"no checkpoint at {path}")
        if zipfile.is_zipfile(path):
            check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # a damaged file can raise anything, and its code is never run
        reason = str(error).strip().split("\n")[0][:120]
        raise InputError(f"{path} cannot be read as a checkpoint; damaged or a foreign file ({reason})") from error


def check_archive(path: str | Path) -> None:
    """Raises ValueError unless every byte in a zip file is the one written: torch.load does not check."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.external_attr & MSDOS_FOLDER:
                raise ValueError(f"{entry.filename} is compressed or called a folder, as torch.save never does")
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of {damaged} is wrong, or it was saved without checksums")


def is_state_dict(value: Any) -> bool:
    """Whether a value is a dict of names and ordinary tensors."""
    named = isinstance(value, dict) and bool(value) and all(isinstance(name, str) for name in value)
    return named and all(map(is_ordinary, value.values()))


def is_ordinary(value: Any) -> bool:
    """Whether a value is a tensor of real numbers that are all there."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.device.type != "cpu":
        return False
    return not value.is_complex() and not value.is_quantized


def without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict without the `module.` of DataParallel and the `_orig_mod.` of torch.compile in its keys."""
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):  # either may wrap the other
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def recorded(checkpoint: dict | None) -> dict[str, Any]:
    """The args in a checkpoint of this program, {} without."""
    return checkpoint.get("args", {}) if checkpoint else {}


# ---------------------------------------------------------------------------------------------- weights


def load_weights(model: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Copies a state_dict into the model; gates of blocks that have none here are left out.

    Raises:
        InputError: naming keys that are missing, left over, or of another shape or type; the model is unchanged.
    """
    expected = model.state_dict()
    ungated = tuple(
        f"{name}.{layer}."
        for name, module in model.named_modules()
        if not getattr(module, "gated", True)
        for layer in GATE_LAYERS
    )
    state = {key: value for key, value in state.items() if not key.startswith(ungated)}
    # files of PyTorch 0.3 do not count BatchNorm's batches
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    foreign = [key for key in state if key not in expected]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    types = [
        f"{key} {state[key].dtype} instead of {value.dtype}"
        for key, value in expected.items()
        if key in state and state[key].is_floating_point() != value.is_floating_point()
    ]
    problems = []
    named = (("missing", missing), ("left over", foreign), ("of another shape", shapes), ("of another type", types))
    for what, keys in named:
        if keys:
            problems.append(f"{len(keys)} {what} ({', '.join(keys[:2])}{', ...' if len(keys) > 2 else ''})")
    if problems:
        raise InputError(f"{source} does not fit this network: keys {'; '.join(problems)}")
    model.load_state_dict(state, strict=False)


def load_pretrained(model: nn.Module, source: str, arch: str) -> str:
    """Starts the backbone from a plain ResNet; gates, and a head for another number of classes, stay fresh.

    Args:
        source: a file as torchvision saves it (or with a `state_dict` inside), or "torchvision" for its official
            IMAGENET1K_V1 weights.
        arch: torchvision's name of the net, such as "resnet50".

    Returns:
        A line that says what was loaded and what stayed fresh.

    Raises:
        InputError: if the weights cannot be had, or keys are missing, left over or of another shape.
    """
    if source == "torchvision":
        import torchvision  # here, because importing it takes seconds

        try:
            state = torchvision.models.get_model_weights(arch)["IMAGENET1K_V1"].get_state_dict(check_hash=True)
        except (OSError, RuntimeError) as error:
            raise InputError(f"--pretrained torchvision: cannot download the weights ({error})") from error
    else:
        state = load_safely(source)
        state = state.get("state_dict", state) if isinstance(state, dict) else state
        if not is_state_dict(state):
            raise InputError(f"{source} holds no state_dict of tensors: not a torchvision ResNet")
    names = {"fc.weight": "linear.weight", "fc.bias": "linear.bias"}
    state = {names.get(key, key.replace(".downsample.", ".shortcut.")): v for key, v in without_prefixes(state).items()}
    own = model.state_dict()
    gates = [key for key in own if key.split(".")[-2] in GATE_LAYERS]
    if any(key in state for key in gates):
        raise InputError(f"{source} is not a plain ResNet, it has gates: continue it with --resume")
    fresh = {key: own[key] for key in gates}
    head = ""
    if "linear.weight" in state and state["linear.weight"].shape != own["linear.weight"].shape:
        fresh |= {key: own[key] for key in names.values()}
        head = f" and the head (it has {len(state['linear.weight'])} classes)"
    load_weights(model, {**state, **fresh}, source)
    loaded = len(state.keys() - fresh.keys())
    return f"{source}: {loaded} tensors loaded; fresh: the {len(gates)} tensors of the gates{head}"


def check_gates(checkpoint: dict | None, target_rates: Sequence[float], source: str) -> None:
    """Raises InputError if other blocks have a gate than in the checkpoint: that would be another network."""
    rates = recorded(checkpoint).get("block_rates", target_rates)
    if [rate < 1 for rate in rates] != [rate < 1 for rate in target_rates]:
        raise InputError(f"with these target rates other blocks have gates than in {source}: leave them out")


# ---------------------------------------------------------------------------------------------- networks


def checkpoint_in(path: str | Path, *names: str) -> Path:
    """The path of a checkpoint: itself, or for a run folder the first of these files that is in it.

    Raises:
        InputError: if the folder holds none of them.
    """
    path = Path(path)
    try:
        if not path.is_dir():
            return path
    except OSError as error:  # a name that is too long, for instance
        raise InputError(f"no checkpoint at {path} ({error.strerror})") from error
    for name in names:
        if (path / name).is_file():
            return path / name
    raise InputError(f"no {' or '.join(names)} in {path}: give a run folder or a checkpoint")


def load(path: str | Path) -> AdaptiveResNet:
    """The trained network of a checkpoint, or of a run folder (its best model), on the CPU, in eval mode.

    It is rebuilt from the keys and shapes in the file, so the original's files load, too. Beside the network's own
    attributes it has `classes`, the names of its K classes (numbers if the file records none), and `preprocess`, which
    makes its input (3, H, W) of a PIL image of any size.

    Raises:
        InputError: if there is no such file, or it holds no ConvNet-AIG.
    """
    file = checkpoint_in(path, BEST, CHECKPOINT)
    checkpoint = load_checkpoint(file)
    own = recorded(checkpoint)
    model = rebuild(checkpoint["state_dict"], own.get("block_rates"), file)
    num_classes = model.linear.out_features
    model.classes = own.get("classes") or [str(index) for index in range(num_classes)]
    if len(model.classes) != num_classes:
        raise InputError(f"{file} names {len(model.classes)} classes, but its network has {num_classes}")
    photographs = isinstance(model, ResNet_ImageNet)
    source = DATASETS.get(str(own.get("dataset", "cifar10")), DATASETS["cifar10"])
    size = own.get("image_size", 224) if photographs else source.size
    usual = IMAGENET_STATISTICS if photographs else source.statistics or IMAGENET_STATISTICS
    mean, std = (own["mean"], own["std"]) if "mean" in own else usual
    if type(size) is not int or not 8 <= size <= 4096:
        raise InputError(f"{file}: its image_size is malformed; not a checkpoint of this program")
    model.preprocess = Preprocess(size, mean, std, photographs)
    threshold = own.get("threshold", 0.5)
    model.threshold = threshold if isinstance(threshold, float) and 0 < threshold < 1 else 0.5
    return model.eval()


def rebuild(state: dict[str, Tensor], rates: Sequence[float] | None, source: str | Path) -> AdaptiveResNet:
    """The network with these weights: block type, widths, stages, gates and classes follow from keys and shapes.

    Args:
        rates: the target rates recorded of it, if any.

    Raises:
        InputError: naming the source, if they are not those of a ConvNet-AIG.
    """
    try:
        places = sorted({tuple(map(int, key[5:].split(".")[:2])) for key in state if is_block_key(key)})
        gated = [f"layer{stage}.{index}.{GATE_LAYERS[0]}.weight" in state for stage, index in places]
        num_classes, photographs = len(state["linear.weight"]), state["conv1.weight"].shape[-1] == 7
        stages = [sum(stage == number for stage, _ in places) for number in range(1, 4 + photographs)]
        if 0 in stages or sum(stages) < len(places):
            raise ValueError(f"{len(places)} blocks, {stages} of them in the stages that it should have")
        own = [0.0 if gate else 1.0 for gate in gated]  # all that matters here is whether there is a gate
        if ".conv3." in " ".join(state):
            width, in_group = state["layer1.0.conv2.weight"].shape[:2]
            groups = width // in_group
            widths = (groups, width // groups) if photographs else ()
            block = Bottleneck
        else:
            block, widths = BasicBlock, ()
        with torch.device("meta"):
            model = (ResNet_ImageNet if photographs else ResNet_cifar)(block, stages, num_classes, own, *widths)
        model.to_empty(device="cpu")
        for statistics in model.buffers():  # PyTorch 0.3 saved no counts of batches
            statistics.zero_()
    except (KeyError, IndexError, ValueError, TypeError, ZeroDivisionError, RuntimeError) as error:
        raise InputError(f"{source} holds no ConvNet-AIG ({error})") from error
    load_weights(model, state, source)
    known = rates is not None and [rate < 1 for rate in rates] == gated
    model.target_rates = list(rates) if known else None
    return model


def is_block_key(key: str) -> bool:
    """Whether a key of a state_dict is of a residual block: layer1.0...."""
    stage, _, rest = key.removeprefix("layer").partition(".")
    return key.startswith("layer") and stage.isdecimal() and rest.split(".")[0].isdecimal()
