"""A trained network with the images that it is tested on, and their inference graphs.

Shapes: L blocks, K classes with images.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

import aig
from aig.analysis import measures
from aig.console import InputError, command
from aig.data import PHOTOGRAPHS, Batching, Choice, Loader, open_loaders
from aig.environment import derive_seed, environment, select_device
from aig.inference import Macs, count_macs
from convnet_aig import AdaptiveResNet, check_thresholds


@dataclass
class Subject:
    """A trained network with its test images; their graphs are computed once, when a part asks for them."""

    name: str  # what figures and tables call it
    path: str  # of the checkpoint
    epoch: int | None  # the epochs it was trained for; None if that is not recorded
    model: AdaptiveResNet  # in its gate mode, at its threshold, on its device
    loader: Loader  # of the images
    seed: int  # this and `samples`: see `evaluation.measure`
    samples: int
    compared: dict[str, dict[str, Any]] = field(default_factory=dict)  # provenance of those beside it, by name

    @cached_property
    def cost(self) -> Macs:
        """Multiply-accumulates for one image."""
        return count_macs(self.model, self.loader.size)

    @property
    def gated(self) -> np.ndarray:
        """Whether each block has a gate, (L,)."""
        return np.array([block.gated for block in self.model.blocks()])

    @property
    def first_seed(self) -> int:
        """The first of the seeds over which --test takes the mean in gate mode "sample"."""
        return derive_seed(self.seed, "test", 0)

    @cached_property
    def graphs(self) -> measures.Arrays:
        """The graphs of all images in the network's gate mode; "sample" is drawn once."""
        return measures.inference_graphs(self.model, self.loader, self.first_seed)

    @cached_property
    def clusters(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Execution rates by class and block, (K, L), and the order and the tree of the classes."""
        found = self.graphs
        rates = np.stack([found["opened"][found["labels"] == k].mean(0) for k in range(len(found["classes"]))])
        return rates, *measures.cluster(rates)

    def headline(self) -> dict[str, Any]:
        """What --test reports (in gate mode "sample": for the first of its seeds), from the graphs of the images."""
        found, dense = self.graphs, self.cost.dense
        return {
            "images": len(found["labels"]),
            "top1": 100 * float(found["right"].mean()),
            "execution_rate": float(found["opened"].mean()),
            "macs_mean": float(found["macs"].mean()),
            "macs_fraction": float(found["macs"].mean() / dense),
            "macs_dense": dense,
        }

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


def open_model(flags: argparse.Namespace) -> AdaptiveResNet:
    """The network of a checkpoint in the gate mode, at the threshold and on the device of its flags."""
    model = aig.load(flags.path)
    if model.num_gates:  # else all modes and thresholds are the same
        threshold = aig.load(flags.path, flags.budget).threshold if flags.budget else flags.threshold
        try:
            check_thresholds(threshold, model.num_gates)
        except ValueError as error:
            raise InputError(f"{flags.path}: {error}") from error
        model.gate_mode, model.threshold = "argmax" if flags.budget else flags.gate_mode, threshold
    return model.to(select_device(flags.device), memory_format=torch.channels_last)


def open_subject(flags: argparse.Namespace) -> Subject:
    """The network of a checkpoint with its test images, see `flags_for`. Raises InputError if either cannot be used."""
    model, path, own = open_model(flags), flags.path, flags.recorded
    choice = Choice(
        dataset=PHOTOGRAPHS if model.preprocess.photographs else flags.dataset,
        data=flags.data,
        split=flags.split,
        test_size=flags.test_size,
        image_size=model.preprocess.size,
        test=True,
        **{key: own.get(key) for key in ("classes", "mean", "std")},
    )
    device = next(model.parameters()).device
    loader = open_loaders(choice, Batching(flags.batch_size, flags.seed, device, workers=flags.workers)).val
    if len(loader.classes) != len(model.classes):
        found, wanted = len(loader.classes), len(model.classes)
        raise InputError(f"{path} tells {wanted} classes apart, but the images have {found}: give --dataset or --data")
    name = own.get("expname")
    if not (isinstance(name, str) and name and name.isprintable()):
        name = Path(path).resolve().parent.name
    return Subject(name, path, flags.epoch, model, loader, flags.seed, flags.gate_samples)


def with_others(subject: Subject, compared: Sequence[argparse.Namespace]) -> Iterator[Subject]:
    """The subject and those that it is compared with, one after the other: their images need not be in memory together.

    Raises InputError if one is tested on other images.
    """
    yield subject
    names = [subject.name]
    for flags in compared:
        other = open_subject(flags)
        if not torch.equal(other.loader.labels, subject.loader.labels):
            raise InputError(f"{other.path} is tested on other images than {subject.path}: give the data of both")
        if other.name in names:
            other.name = f"{other.name} ({1 + len(names)})"
        names.append(other.name)
        subject.compared[other.name] = other.provenance()
        yield other
