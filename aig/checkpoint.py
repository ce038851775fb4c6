"""Checkpoints: reading them safely, and copying weights out of them.

A file is never trusted: nothing in it is run (`weights_only=True`), every byte of a zip file is checked against its
checksum, and keys, shapes and types are compared before anything is copied.
"""

from __future__ import annotations

import json
import math
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aig.console import InputError
from aig.runtime import PROGRAM
from convnet_aig import GATE_LAYERS

CHECKPOINT, BEST, TEST = "checkpoint.pth.tar", "model_best.pth.tar", "test.json"  # of a run folder
CONFIG, WEIGHTS = "config.json", "model.safetensors"  # of a model folder, see `aig.folders`
TRAINED = (BEST, CHECKPOINT, WEIGHTS)  # a folder's trained network is in the first of these that it has
KINDS = {"epoch": (int,), "step": (int,), "seen": (int,), "seconds": (int, float), "is_best": (bool,), "sums": (dict,)}
MSDOS_FOLDER = 0x10  # an attribute in a zip file, for which torch.load would read nothing


# ---------------------------------------------------------------------------------------------- reading


def checkpoint_in(path: str | Path, *names: str) -> Path:
    """The path of a checkpoint: itself, or for a folder the first of these files that is in it.

    Raises InputError if the folder holds none of them.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    for name in names:
        if (path / name).is_file():
            return path / name
    raise InputError(f"no {' or '.join(names)} in {path}: give a run folder or a checkpoint")


def load_checkpoint(path: str | Path, bare: bool = False) -> dict:
    """Reads a checkpoint of this program or of the original, onto the CPU, without running code from it.

    The weights of a model folder come with what its config.json says, as if they were a checkpoint.

    Args:
        bare: take a file that holds nothing but weights, too, as those of torchvision and timm do.

    Returns:
        Its dict, with the prefixes `module.` and `_orig_mod.` taken off the keys of `state_dict`.

    Raises:
        InputError: if the file is missing, damaged, or holds something else.
    """
    checkpoint = read_model(Path(path), bare) if Path(path).suffix == Path(WEIGHTS).suffix else load_safely(path)
    if bare and is_state_dict(checkpoint):
        checkpoint = {"state_dict": checkpoint}
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
        classes = args.get("classes") if isinstance(args, dict) else 0
        fits = classes is None or (isinstance(classes, list) and all(isinstance(name, str) for name in classes))
        if fits and "mean" in args:
            fits = len(args["mean"]) == len(args["std"]) == 3 and numbers("mean") and numbers("std")
            fits = fits and min(args["std"]) > 0
        fits = fits and all(numbers(name) for name in ("block_rates", "lr_milestones") if name in args)
    except (TypeError, KeyError, OverflowError):
        fits = False
    if not fits:
        raise InputError(f"{path}: its args are malformed; not a checkpoint of this program")


def read_model(path: Path, bare: bool) -> dict:
    """The weights of a model folder and what its config.json says of them, as a checkpoint. Raises InputError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = read_json(path.with_name(CONFIG))
    ours = config.get("library_name") == PROGRAM
    if not ours and not bare:
        raise InputError(f"{path} has no {CONFIG} of {PROGRAM} beside it: give a folder that aig.save wrote")
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read as safetensors ({error})") from error
    if not ours:
        return state
    flags = config.get("flags", {})
    args = {**flags, **config} if isinstance(flags, dict) else None  # the one check for all: `check_args`
    done = config.get("epochs_done")
    epoch = {"epoch": done + 1} if type(done) is int else {}  # a checkpoint holds the next one
    return {**epoch, "state_dict": state, "args": args}


def read_json(path: Path) -> dict:
    """The object in a JSON file, {} if there is no file. Raises InputError if it holds something else."""
    try:
        value = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged: move it away")
    return value


def load_safely(path: str | Path) -> Any:
    """What `torch.save` wrote into a file, on the CPU, without running code from it. Raises InputError."""
    if not Path(path).is_file():
        raise InputError(f"no checkpoint at {path}")
    try:
        if zipfile.is_zipfile(path):
            check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
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

    Raises InputError naming keys that are missing, left over, or of another shape or type; the model is unchanged.
    """
    expected = model.state_dict()
    ungated = tuple(
        f"{name}.{layer}."
        for name, module in model.named_modules()
        if not getattr(module, "gated", True)
        for layer in GATE_LAYERS
    )
    state = {key: value for key, value in state.items() if not key.startswith(ungated)}

    def kind(value: Tensor) -> str:
        return f"{'floating' if value.is_floating_point() else 'integer'} {tuple(value.shape)}"

    problems = {
        # files of PyTorch 0.3 do not count BatchNorm's batches
        "missing": [key for key in expected if key not in state and not key.endswith("num_batches_tracked")],
        "left over": [key for key in state if key not in expected],
        "of another shape or type": [
            f"{key} {kind(state[key])} instead of {kind(expected[key])}"
            for key in expected
            if key in state and kind(state[key]) != kind(expected[key])
        ],
    }
    said = [
        f"{len(keys)} {what} ({', '.join(keys[:2])}{', ...' if len(keys) > 2 else ''})"
        for what, keys in problems.items()
        if keys
    ]
    if said:
        raise InputError(f"{source} does not fit this network: keys {'; '.join(said)}")
    model.load_state_dict(state, strict=False)
