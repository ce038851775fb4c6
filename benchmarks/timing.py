"""Timing on a machine that others use, too: contenders take turns in one process, and are compared round by round."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable

import torch
from tqdm import tqdm

import utils

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


def where(device: torch.device) -> str:
    """Hardware and versions of a measurement."""
    return f"{utils.device_name(device)}, torch {torch.__version__}, python {platform.python_version()}"
