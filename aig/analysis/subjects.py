"""A trained network with the images that it is tested on, from its checkpoint and the flags of the command."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import aig
from aig.checkpoint import recorded
from aig.console import InputError, command
from aig.data import PHOTOGRAPHS, Batching, Choice, Loader, open_loaders
from aig.environment import derive_seed, environment, select_device
from aig.inference import Macs, count_macs
from aig.losses import Objective
from convnet_aig import AdaptiveResNet


@dataclass
class Subject:
    """A trained network with its test images.

    Attributes:
        name: what figures and tables call it.
        path, epoch: the checkpoint, and the epochs it was trained for; None if that is not recorded.
        model: the network in its gate mode, at its threshold, on its device.
        loader: the images.
        cost: multiply-accumulates for one of them.
        seed, samples, dense: see `evaluation.measure`.
    """

    name: str
    path: str
    epoch: int | None
    model: AdaptiveResNet
    loader: Loader
    cost: Macs
    seed: int
    samples: int
    dense: bool

    @property
    def gated(self) -> np.ndarray:
        """Whether each block has a gate, (L,)."""
        return np.array([block.gated for block in self.model.blocks()])

    @property
    def first_seed(self) -> int:
        """The first of the seeds over which --test takes the mean in gate mode "sample"."""
        return derive_seed(self.seed, "test", 0)

    @property
    def objective(self) -> Objective:
        """Measures accuracies; the target rates matter only to the loss, which nothing here reports."""
        return Objective([1.0] * len(self.gated), 0, device=next(self.model.parameters()).device)

    def provenance(self) -> dict[str, Any]:
        """Where the numbers of this network come from."""
        return {
            "command": command(),
            "checkpoint": self.path,
            "epoch": self.epoch,
            "gate_mode": self.model.gate_mode,
            "threshold": self.model.threshold,
            "seed": self.seed,
            **environment(self.model),
        }


def open_model(path: str, args: argparse.Namespace) -> AdaptiveResNet:
    """The network of a checkpoint in the gate mode, at the threshold and on the device of the flags."""
    model = aig.load(path).to(select_device(args.device), memory_format=torch.channels_last)
    model.gate_mode, model.threshold = args.gate_mode, args.threshold
    return model


def open_subject(path: str, args: argparse.Namespace, checkpoint: dict, name: str = "") -> Subject:
    """The network of a checkpoint with its test images. Raises InputError if either cannot be used.

    Args:
        path, checkpoint: where the network is, and what is in that file.
        args: the flags for this checkpoint.
        name: of the run; '' takes the recorded one.
    """
    model = open_model(path, args)
    own, epoch = recorded(checkpoint), checkpoint.get("epoch")
    choice = Choice(
        dataset=PHOTOGRAPHS if model.preprocess.photographs else args.dataset,
        data=args.data,
        split=args.split,
        test_size=args.test_size,
        image_size=model.preprocess.size,
        test=True,
        **{key: own.get(key) for key in ("classes", "mean", "std")},
    )
    device = next(model.parameters()).device
    loader = open_loaders(choice, Batching(args.batch_size, args.seed, device, workers=args.workers)).val
    if len(loader.classes) != len(model.classes):
        found, wanted = len(loader.classes), len(model.classes)
        raise InputError(f"{path} tells {wanted} classes apart, but the images have {found}: give --dataset or --data")
    return Subject(
        name or recorded_name(own, path),
        path,
        epoch - 1 if isinstance(epoch, int) else None,  # the file holds the next one to run
        model,
        loader,
        count_macs(model, loader.size),
        args.seed,
        args.gate_samples,
        args.dense,
    )


def recorded_name(own: dict[str, Any], path: str) -> str:
    """The name of a run as its checkpoint records it, else its folder's."""
    name = own.get("expname")
    return name if isinstance(name, str) and name and name.isprintable() else Path(path).resolve().parent.name
