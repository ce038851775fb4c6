"""Timing on a machine that others use, too: contenders take turns in one process, and are compared round by round."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from aig import distributed
from aig.engine import Recipe, make_optimizer, set_lr, step_noise
from aig.environment import device_name
from aig.state import State
from convnet_aig import AdaptiveResNet

WARM_UP = 2  # rounds that are not counted


def interleaved(
    contenders: dict[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    slot: float = 0,
    description: str = "rounds",
) -> dict[str, list[float]]:
    """Seconds per call of each contender, round by round.

    Args:
        slot: seconds that a turn should last at least; short calls are repeated to fill it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    calls = dict.fromkeys(contenders, 1)
    for turn in tqdm(range(rounds + WARM_UP), description, disable=None, leave=False):
        for name, call in contenders.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            each = (time.perf_counter() - start) / calls[name]
            if turn >= WARM_UP:
                seconds[name].append(each)
            elif slot:
                calls[name] = max(1, round(slot / each))
    return seconds


def training_step(
    model: AdaptiveResNet, recipe: Recipe, images: Tensor, labels: Tensor, count: int, mode: str | None = None
) -> tuple[Callable[[], None], nn.Module]:
    """A training step on this process's share of a batch of `count` images, as `aig.engine.fit` does it.

    Args:
        mode: of torch.compile, where the recipe asks for it; None as in a training.

    Returns:
        The step, and the network that it calls, in DistributedDataParallel for several processes.
    """
    world, device = distributed.world(), images.device
    mode = mode or distributed.compile_mode(device.type, recipe.accumulate, world)
    network, forward = distributed.wrap(model, world, recipe.sync_bn, mode if recipe.compile else None)
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    optimizer = make_optimizer(model, recipe)
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "fp16")
    state = State(model, optimizer, scaler, 1, world)
    objective = recipe.objective(device, world)

    def step() -> None:
        lr, warm = recipe.at(1, 1)
        set_lr(optimizer, lr)
        batch = images.contiguous(memory_format=layout)
        noise = step_noise(model, batch, count, (recipe.seed, "noise", 1, 1), world)
        optimizer.zero_grad(set_to_none=True)
        for x, y, g in distributed.batch_parts(network, batch, labels, noise, recipe.parts(count, world)):
            with recipe.autocast(device.type):
                logits, gates = forward(x, temperature=recipe.temperature, noise=g)
            loss, sums = objective(logits, y, gates, count, warm, x)
            scaler.scale(loss).backward()
            state.add(sums)
        state.end_step(1, count)
        scaler.step(optimizer)
        scaler.update()

    network.train()
    return step, network


def where(device: torch.device) -> str:
    """Hardware and versions of a measurement."""
    return f"{device_name(device)}, torch {torch.__version__}, python {platform.python_version()}"
