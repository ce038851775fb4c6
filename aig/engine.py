"""The training loop. `fit` is the loop, `Recipe` holds its settings, `State` (in `aig.state`) what a checkpoint stores.

Source: Veit, Belongie, "Convolutional networks with adaptive inference graphs", ECCV 2018, sec. 3 and 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aig.console import progress_bar, say
from aig.data import Loader
from aig.distributed import World, average_batchnorm, batch_parts, compile_mode, wrap
from aig.environment import derive_seed
from aig.evaluation import evaluate
from aig.losses import Objective
from aig.reports import check_health, epoch_line, report, report_interval, warnings_of
from aig.state import State
from aig.terms import Budget, Distillation
from convnet_aig import GATE_LAYERS, AdaptiveResNet, draw_noise

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Recipe:
    """How to train."""

    target_rates: Sequence[float]  # this, `lossfact`, `topk`, `budget` and `distillation`: see `Objective`
    lossfact: float
    lr: float  # of the schedule "step": divided by 10 once more from each milestone on; of "cosine": falls to 0
    milestones: Sequence[int]
    epochs: int  # of the whole schedule, counted from 1
    last: int  # epoch to run now
    seed: int  # of the gates' noise
    lr_schedule: str = "step"
    topk: Sequence[int] = (1,)
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0
    gate_decay: bool = True  # whether weight decay reaches the gates
    lrfact: float = 1  # factor of the learning rate of `gate_layers` of the blocks
    gate_layers: Sequence[str] = GATE_LAYERS
    fused: bool | None = None  # SGD in one kernel; None: on CUDA
    warmup: int = 0  # epochs in which the learning rate rises linearly
    target_warmup: float = 0  # epochs in which target rates, or the floor of a budget, go linearly down from 1
    budget: Budget | None = None
    distillation: Distillation | None = None
    temperature: float = 1  # of the gates' Gumbel-softmax
    fine_tunes: bool = False  # whether the network was trained before
    accumulate: int = 1  # parts in which a batch is computed, to save memory
    amp: str = "off"  # what convolutions are computed in, a key of AMP; gates, losses and weights stay in float32
    compile: bool = False  # run full batches through torch.compile
    channels_last: bool = True  # memory format of the images
    sync_bn: bool = False  # BatchNorm over the images of all GPUs
    print_freq: int = 25  # steps between reports on plain output
    log_interval: int = 20  # the same on a terminal

    def at(self, epoch: int, progress: float) -> tuple[float, float | None]:
        """The settings of the step that ends at the fraction `progress` of the epoch, in (0, 1].

        The learning rate, and how far target rates have come from 1 to their values, None for all the way.
        """
        done = epoch - 1 + progress
        if self.lr_schedule == "cosine":
            factor = (1 + math.cos(math.pi * done / self.epochs)) / 2
        else:
            factor = 0.1 ** sum(milestone <= epoch for milestone in self.milestones)
        factor *= min(1, done / self.warmup) if self.warmup else 1
        warm = min(1, done / self.target_warmup) if self.target_warmup else None
        return self.lr * factor, warm

    def autocast(self, device_type: str) -> torch.autocast:
        """What the network computes in, in training and validation: convolutions as `amp` says, gates in float32."""
        return torch.autocast(device_type, AMP[self.amp], enabled=self.amp != "off")

    def objective(self, device: torch.device | str, world: World) -> Objective:
        """What to minimise, on a device, in all processes together."""
        terms = {"budget": self.budget, "distillation": self.distillation}
        return Objective(self.target_rates, self.lossfact, self.topk, device, world, **terms)

    def parts(self, count: int, world: World) -> int:
        """In how many parts to compute a batch of `count`: BatchNorm needs two images of each part in every process."""
        return min(self.accumulate, max(1, count // (2 * world.size)))


def fit(state: State, train: Loader, val: Loader, recipe: Recipe, run: Any, boards: Sequence[Any]) -> None:
    """Trains from `state` to the end of epoch `recipe.last`: a record and a checkpoint an epoch, the best model kept.

    Args:
        run: keeps files, see `aig.runs.Run`: add_record, save, save_if_due, records.
        boards: draw, see `aig.dashboard.Dashboard`: update.

    Raises:
        Interrupted: after a signal; the checkpoint then holds the very step.
        TrainingError: if the training cannot go on.
    """
    model, optimizer, scaler, world = state.model, state.optimizer, state.scaler, state.world
    device = state.first_bad.device
    mode = compile_mode(device.type, recipe.accumulate, world) if recipe.compile else None
    network, compiled = wrap(model, world, recipe.sync_bn, mode)
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    objective = recipe.objective(device, world)
    for epoch in range(state.epoch, recipe.last + 1):
        network.train()
        with progress_bar(None, f"epoch {epoch}/{recipe.epochs}", len(train), "step", initial=state.step) as bar:
            interval = report_interval(recipe.print_freq, recipe.log_interval, bar, world)
            for step, (images, labels) in enumerate(train.batches(epoch, state.step), start=state.step + 1):
                (lr, warm), count = recipe.at(epoch, step / len(train)), train.images_in(step)
                set_lr(optimizer, lr)
                forward = compiled if count == train.batch_size else network
                images = images.contiguous(memory_format=layout)
                noise = step_noise(model, images, count, (recipe.seed, "noise", epoch, step), world)
                optimizer.zero_grad(set_to_none=True)
                for x, y, g in batch_parts(network, images, labels, noise, recipe.parts(count, world)):
                    with recipe.autocast(device.type):
                        logits, gates = forward(x, temperature=recipe.temperature, noise=g)
                    loss, sums = objective(logits, y, gates, count, warm, x)
                    scaler.scale(loss).backward()
                    state.add(sums)
                state.end_step(step, count)
                scaler.step(optimizer)
                scaler.update()
                bar.update()
                if step % interval == 0:
                    report(bar, f"epoch {epoch}/{recipe.epochs} step {step}/{len(train)}", state.means())
                run.save_if_due(state)
        trained, opened = state.means(), state.sums["gates"] / state.seen  # the latter by block, (L,)
        average_batchnorm(model, world)
        seed = derive_seed(recipe.seed, "validation", epoch)
        watch = partial(run.save_if_due, state)
        validated = evaluate(model, val, objective, seed, autocast=recipe.autocast(device.type), each_batch=watch)
        check_health(model, validated["loss"], epoch)
        lr, warm = recipe.at(epoch, 1)
        record = {"epoch": epoch, "lr": lr, "seconds": state.elapsed(), "train": trained, "val": validated}
        run.add_record(record)
        settled = warm in (None, 1)
        is_best = state.end_epoch(validated["top1"], settled)
        run.save(state, is_best)
        for board in boards:
            board.update(run.records)
        say(epoch_line(record, recipe.epochs, recipe.last, model.gate_mode, is_best))
        for warning in warnings_of(run.records, opened.tolist(), recipe, model.gate_mode, settled):
            say(warning)


def make_optimizer(model: AdaptiveResNet, recipe: Recipe) -> torch.optim.SGD:
    """SGD with momentum, `gate_layers` at learning rate lr * lrfact."""
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}  # by: scaled by lrfact, without weight decay
    for name, parameter in model.named_parameters():
        layers = set(name.split("."))
        scaled = not layers.isdisjoint(recipe.gate_layers)
        free = not recipe.gate_decay and not layers.isdisjoint(GATE_LAYERS)
        factor, decay = float(recipe.lrfact) if scaled else 1.0, 0 if free else recipe.weight_decay
        new = {"params": [], "lr_factor": factor, "weight_decay": decay}
        groups.setdefault((scaled, free), new)["params"].append(parameter)
    on_gpu = next(model.parameters()).is_cuda  # where the fp16 scaler would wait for an optimizer that is not fused
    fused = on_gpu if recipe.fused is None else recipe.fused
    ordered = [groups[key] for key in sorted(groups)]
    return torch.optim.SGD(ordered, recipe.lr, recipe.momentum, nesterov=recipe.nesterov, fused=fused)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def step_noise(model: AdaptiveResNet, images: Tensor, count: int, key: tuple, world: World) -> Tensor:
    """The gates' noise for this process's images of a batch of `count`, (gates, n, 2), a function of the key.

    It is drawn for the images of all processes, so that it does not depend on their number.
    """
    torch.manual_seed(derive_seed(*key))
    return draw_noise(model.num_gates, count, images)[:, world.shard(count)]
