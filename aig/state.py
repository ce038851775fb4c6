"""Where a training stands: what a checkpoint holds beside the flags, and how to go on from one."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from aig.checkpoint import is_ordinary
from aig.console import InputError, TrainingError, say
from aig.data import Loader
from aig.distributed import ALONE, World, average_batchnorm
from aig.losses import Objective, add, averages, sum_dtype
from convnet_aig import AdaptiveResNet

LEAST_SCALE = 1e-3  # of a loss in float16, reached only if every step is left out


@dataclass
class State:
    """Where a training stands: everything in a checkpoint except the flags.

    `first_bad` is the first step whose loss or gradient was not finite, -1 for none; it stays on the device.
    """

    model: AdaptiveResNet
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    steps: int  # of an epoch
    world: World = ALONE
    epoch: int = 1  # to run
    step: int = 0  # how many of its steps are done
    seen: int = 0  # images in them
    sums: dict[str, Tensor] = field(default_factory=dict)  # over these images, see `Objective`
    seconds: float = 0  # spent on the epoch by earlier processes
    best: float = -1.0  # the highest top-1 validation accuracy, in percent

    def __post_init__(self) -> None:
        self.first_bad = torch.full((), -1, device=next(self.model.parameters()).device)
        self.started = time.perf_counter()
        fill_momentum(self.optimizer)

    def add(self, sums: dict[str, Tensor]) -> None:
        """Adds the sums of a part of a batch, on the device."""
        add(self.sums, **sums)

    def end_step(self, step: int, images: int) -> None:
        """Counts a step, and notes on the device whether its loss and gradients are finite.

        A float16 gradient may overflow: then the scaler leaves the update out.
        """
        self.step, self.seen = step, self.seen + images
        bad = ~sum(value for name, value in self.sums.items() if name.startswith("loss_")).isfinite()
        if not self.scaler.is_enabled():
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            bad = bad | ~nn.utils.get_total_norm(gradients).isfinite()
        self.first_bad = self.first_bad.masked_fill(bad & (self.first_bad < 0), step)

    def check_finite(self) -> None:
        """Raises TrainingError if a step had a non-finite loss or gradient. Reads from the device."""
        bad = int(self.first_bad)
        if self.scaler.is_enabled() and self.scaler.get_scale() < LEAST_SCALE:
            raise TrainingError(f"no float16 gradient of epoch {self.epoch} is finite: try --amp bf16 or off")
        if bad >= 0:
            raise TrainingError(f"loss or gradient not finite since epoch {self.epoch}, step {bad}: try a smaller --lr")

    def means(self) -> dict[str, float]:
        """The means of the epoch so far, see `averages`. Reads from the device; raises as `check_finite`."""
        self.check_finite()
        return averages(self.sums, self.seen)

    def elapsed(self) -> float:
        """Seconds spent on the epoch."""
        return self.seconds + time.perf_counter() - self.started

    def end_epoch(self, top1: float, settled: bool = True) -> bool:
        """Goes on to the next epoch. Returns whether this one, of that validation accuracy, is the best so far.

        While target rates still come down (`settled` is False), the newest is the best: those before ran more branches.
        """
        is_best = top1 > self.best or not settled
        self.epoch, self.step, self.seen, self.sums, self.seconds = self.epoch + 1, 0, 0, {}, 0
        self.best, self.started = max(self.best, top1) if settled else -1.0, time.perf_counter()
        return is_best

    def checkpoint(self) -> dict[str, Any]:
        """Tensors, dicts, lists and numbers to go on from. Every process must call it."""
        average_batchnorm(self.model, self.world)
        parts = {"state_dict": self.model, "optimizer": self.optimizer, "scaler": self.scaler}
        names = ("epoch", "step", "seen", "sums")
        values = {name: getattr(self, name) for name in names} | {"seconds": self.elapsed() if self.step else 0}
        return {**values, "best_prec1": self.best, **{name: part.state_dict() for name, part in parts.items()}}


# ---------------------------------------------------------------------------------------------- going on


def restore(state: State, checkpoint: dict, source: str) -> None:
    """Takes over the best accuracy, the momentum and the scaler of a checkpoint; the network has its weights already.

    Raises:
        InputError: if they do not fit; `source` names the file.
    """
    optimizer, best = state.optimizer, checkpoint.get("best_prec1", -1)
    best = best.item() if isinstance(best, Tensor) and best.numel() == 1 else best  # as some old files have it
    if not isinstance(best, (int, float)) or not -1 <= best <= 100:
        raise InputError(f"{source}: its best_prec1 is not a number of percent")
    state.best = best
    if "optimizer" not in checkpoint:  # as in the original's files
        say(f"{source} holds no optimizer state: the momentum starts at zero")
        return
    try:
        optimizer.load_state_dict(momentum_only(checkpoint["optimizer"], optimizer))
        if state.scaler.is_enabled() and (scaler := checkpoint.get("scaler")):
            counts = [scaler["growth_interval"], scaler["_growth_tracker"]]
            factors = [scaler["scale"], scaler["growth_factor"], scaler["backoff_factor"]]
            if not all(type(count) is int for count in counts) or not all(0 < factor < math.inf for factor in factors):
                raise ValueError("its scaler is malformed")
            state.scaler.load_state_dict(scaler)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"{source}: its optimizer does not fit this network ({error})") from error
    fill_momentum(optimizer)


def enter_epoch(state: State, checkpoint: dict, train: Loader, objective: Objective, source: str) -> None:
    """Takes over how far the epoch of a checkpoint had come, if it stopped in the middle of one.

    Raises:
        InputError: if that epoch cannot be continued, with other images or another batch size for instance.
    """
    if state.epoch != checkpoint["epoch"] or not checkpoint.get("step"):
        return
    if isinstance(checkpoint.get("sums"), dict) and (missing := set(objective.names) - checkpoint["sums"].keys()):
        how = f"goes on only with the same ones; to begin that epoch again, add --start-epoch {checkpoint['epoch']}"
        raise InputError(f"{source} stopped in the middle of an epoch without {min(missing)} among its terms: it {how}")
    step, seen, shapes = checkpoint["step"], checkpoint.get("seen"), {"gates": tuple(objective.rates.shape)}
    try:
        sums = {name: checkpoint["sums"][name].detach().clone() for name in ("gates", *objective.names)}
        fits = 0 < step <= len(train) and seen == min(step * train.batch_size, train.num_images)
        fits = fits and checkpoint["seconds"] >= 0
        for name, values in sums.items():
            fits = fits and is_ordinary(values) and values.is_floating_point() and bool(values.isfinite().all())
            fits = fits and values.shape == shapes.get(name, ())
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"{source}: what it records of its unfinished epoch is damaged ({error})") from error
    if not fits:
        raise InputError(
            f"{source} stopped in the middle of epoch {checkpoint['epoch']}, which goes on only with the same "
            f"images and --batch-size; to begin that epoch again, add --start-epoch {checkpoint['epoch']}"
        )
    device = state.first_bad.device
    state.step, state.seen, state.seconds = step, seen, checkpoint["seconds"]
    state.sums = {name: values.to(device, sum_dtype(device)) for name, values in sums.items()}


def momentum_only(saved: dict, optimizer: torch.optim.SGD) -> dict[str, Any]:
    """A state_dict for the optimizer with nothing of the saved one but its momentum, checked before it is copied.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: if it does not fit.
    """
    own, groups = optimizer.state_dict(), list(saved["param_groups"])
    sizes, own_sizes = ([len(group["params"]) for group in each] for each in (groups, own["param_groups"]))
    if sizes != own_sizes and sizes[::-1] == own_sizes:
        groups.reverse()  # the original's ImageNet script has the group of the gates first
    elif sizes != own_sizes:
        raise ValueError(f"groups of {sizes} parameters instead of {own_sizes}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in groups for number in group["params"]]
    own["state"] = {}
    for index, (number, parameter) in enumerate(zip(numbers, parameters, strict=True)):
        buffer = saved["state"].get(number, {}).get("momentum_buffer")
        if buffer is None:
            continue
        if not is_ordinary(buffer) or buffer.shape != parameter.shape or not buffer.is_floating_point():
            raise ValueError(f"momentum {index} of another shape or type")
        # in memory of its own, laid out as the parameter's: fused SGD takes that for granted
        own["state"][index] = {"momentum_buffer": torch.empty_like(parameter).copy_(buffer)}
    return own


def fill_momentum(optimizer: torch.optim.SGD) -> None:
    """Sets missing momentum to zero for fused SGD.

    Fused SGD allocates momentum uninitialised; if the fp16 scaler skips step one, it stays so.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["fused"] and group["momentum"] else ():
            if optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
