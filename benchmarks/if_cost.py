"""What an `If` costs in an exported file: time by the rate of open gates, as a fraction of the dense file's.

    python -m benchmarks.if_cost --net AIG-110 AIG-50

CPU time of one thread, files for single images of untrained nets, the same random images and patterns of open gates in
all; the files take turns in a random order. A ratio is the median over the rounds.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from aig.console import number, run_command
from aig.export import Form, build
from aig.runtime import ENGINES
from benchmarks.latency import CERTAIN, NETS
from benchmarks.latency import build as untrained
from train_img import target_rates_of

RATES = (0, 0.2, 0.4, 0.6, 0.8, 1)


def file(net: str, rates: Sequence[float] | float | None, folder: Path) -> str:
    """A file in which as many gates are open as the rates ask for. None: the dense file."""
    model = untrained(net, rates if isinstance(rates, list) else None)
    every = rates if isinstance(rates, list) else [rates or 0] * sum(1 for _ in model.blocks())
    chosen = [(block, rate) for block, rate in zip(model.blocks(), every, strict=True) if block.gated]
    gated, wanted = [block for block, _ in chosen], torch.tensor([float(rate) for _, rate in chosen])
    keys = torch.rand(len(gated), generator=torch.Generator().manual_seed(0)).log() / wanted.clamp(min=1e-9)
    opened = set(keys.topk(round(wanted.sum().item())).indices.tolist())
    for index, block in enumerate(gated):
        block.fc2.bias.data = torch.tensor([0, CERTAIN if index in opened else -CERTAIN])
    model.gate_mode = "all" if rates is None else "argmax"
    path = folder / f"{len(list(folder.iterdir()))}.onnx"
    path.write_bytes(build(model, Form(1, (NETS[net][0],) * 2, None, False)).SerializeToString())
    return str(path)


def seconds(run: Callable[[], object], slot: float) -> float:
    """CPU time of a call, the mean over as many calls as take `slot` seconds."""
    run()
    count, start = 0, time.process_time()
    while (taken := time.process_time() - start) < slot or not count:
        run()
        count += 1
    return taken / count


def measure(net: str, rounds: int, slot: float, folder: Path) -> None:
    size = NETS[net][0]
    x = np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)
    files = {"dense": None, **{f"{rate:.0%}": rate for rate in RATES}}
    if net == "AIG-50":
        files["paper, t = 0.4"] = target_rates_of("paper", "resnet50", 0.4)
    paths = {name: file(net, rates, folder) for name, rates in files.items()}
    runs = {(engine, name): ENGINES[engine](path, 1, 1) for engine in ENGINES for name, path in paths.items()}
    taken, turns = {key: [] for key in runs}, list(runs)
    for _ in range(rounds):
        random.shuffle(turns)
        for key in turns:
            taken[key].append(seconds(lambda run=runs[key].run: run(x), slot))
    print(f"\n{net}, {rounds} rounds\n\n| | " + " | ".join(files) + " |\n|" + "---|" * (len(files) + 1))
    for engine in ENGINES:
        dense = taken[engine, "dense"]
        cells = [statistics.median(a / b for a, b in zip(taken[engine, name], dense, strict=True)) for name in files]
        milliseconds = f"{1000 * statistics.median(dense):.2f} ms"
        print(f"| {engine} | {milliseconds} | " + " | ".join(f"{cell:.2f}" for cell in cells[1:]) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--net", nargs="*", default=list(NETS), choices=NETS)
    parser.add_argument("--rounds", type=number(int, 1), default=25)
    parser.add_argument("--slot", type=number(float, 0), default=0.02, help="seconds a turn should last at least")
    args = parser.parse_args()
    for net in args.net:
        with tempfile.TemporaryDirectory() as folder:
            measure(net, args.rounds, args.slot, Path(folder))


if __name__ == "__main__":
    run_command(main, "if_cost")
