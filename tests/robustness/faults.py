"""Kills a training at random moments, resumes it each time, and compares its end with that of an undisturbed one.

    python tests/robustness/faults.py --kills 50 --terms 20

Two runs on digits, each disturbed many times: one by SIGKILL, saving after every step, so that many of the kills hit a
save; one by SIGTERM in mid-epoch, saving only then and after epochs. Prints what happened; ends with status 1 if a
checkpoint cannot be loaded, a record is missing or doubled, or the end is not bit for bit that of the undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from aig import runs
from aig.checkpoint import load_checkpoint

ROOT = Path(__file__).parent.parent.parent
STEPS = 6  # of an epoch: 1437 digits in batches of 256
AT_STARTUP = 0.1  # of the kills come before the first step
MOST_LINES = 8  # steps until a disturbance
DIGITS = ["--dataset", "digits", "--depth", "8", "--batch-size", "256", "--target", "0.7", "--device", "cpu"]
DIGITS += ["--print-freq", "1"]


def check(condition: bool, what: str) -> None:
    if not condition:
        raise SystemExit(f"FAILED: {what}")


def records(folder: Path) -> list[dict]:
    """All of metrics.jsonl, but for the times."""
    lines = (folder / runs.METRICS).read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def start(folder: Path, epochs: int, *more: str) -> subprocess.Popen:
    """Starts the training, or goes on with it if it has a checkpoint."""
    command = [sys.executable, str(ROOT / "train.py")]
    if (folder / runs.CHECKPOINT).exists():
        command += ["--resume", str(folder / runs.CHECKPOINT), "--device", "cpu"]
    else:
        command += [*DIGITS, "--epochs", str(epochs), "--save", str(folder.parent), "--expname", folder.name]
        command += ["--overwrite", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(folder: Path, epochs: int, *more: str) -> None:
    """Trains to the end."""
    process = start(folder, epochs, *more)
    _, err = process.communicate()
    check(process.returncode == 0, f"{folder.name} ended with status {process.returncode}: {err}")


def disturb(process: subprocess.Popen, number: int, chance: random.Random) -> str:
    """Sends a signal at a random moment. Returns when: at startup, or after which kind of line."""
    if number == signal.SIGKILL and chance.random() < AT_STARTUP:
        time.sleep(chance.uniform(0, 1))  # to import torch takes longer
        where = "startup"
    else:
        left, where = chance.randint(1, MOST_LINES), "training"
        for line in process.stdout:
            left -= " step " in line
            if left == 0:
                break
        time.sleep(chance.uniform(0, 0.02))  # a step and its save take about as long
    process.send_signal(number)
    return where


def inspect(folder: Path) -> int:
    """Checks what a killed process has left. Returns the number of writes that were cut off."""
    loaded = {
        name: load_checkpoint(folder / name)
        for name in (runs.CHECKPOINT, runs.BEST)
        if (folder / name).exists()
    }
    if runs.BEST in loaded:
        check(runs.CHECKPOINT in loaded, "there is a best model, but no checkpoint")
        check(loaded[runs.BEST]["epoch"] <= loaded[runs.CHECKPOINT]["epoch"], "the best model is from the future")
    epochs = [record["epoch"] for record in runs.read_records(folder)]
    check(epochs == list(range(1, len(epochs) + 1)), f"the records are those of epochs {epochs}")
    return len(list(folder.glob(".*.tmp")))


def same(first: object, second: object) -> bool:
    """Whether nested dicts and lists hold the same numbers and, bit for bit, the same tensors."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def compare(folder: Path, straight: Path) -> None:
    """Checks that two finished runs are the same but for times and names."""
    check(records(folder) == records(straight), f"the records of {folder.name} differ")
    for name in (runs.CHECKPOINT, runs.BEST):
        states = [load_checkpoint(path / name) for path in (folder, straight)]
        for state in states:
            del state["args"], state["seconds"]
        check(same(*states), f"{name} of {folder.name} differs")
    names = [sorted(path.name for path in each.iterdir()) for each in (folder, straight)]
    check(names[0] == names[1], f"{folder.name} holds {names[0]} instead of {names[1]}")


def torment(kind: signal.Signals, times: int, seed: int, root: Path) -> str:
    """Disturbs one training `times` times, and compares it with an undisturbed one. Returns a report."""
    chance, began = random.Random(seed), time.monotonic()
    epochs = times * (MOST_LINES + 4) // STEPS + 3  # so that it does not end before
    more = ["--checkpoint-minutes", "1e-9"] if kind == signal.SIGKILL else []
    straight, folder = root / f"{kind.name}-straight", root / kind.name
    finish(straight, epochs, *more)
    folder.mkdir()
    where, cut_off, fresh = Counter(), 0, 0
    for _ in range(times):
        fresh += not (folder / runs.CHECKPOINT).exists()
        process = start(folder, epochs, *more)
        where[disturb(process, kind, chance)] += 1
        _, err = process.communicate()
        expected = -kind if kind == signal.SIGKILL else 128 + kind
        check(process.returncode == expected, f"status {process.returncode} after {kind.name}: {err}")
        cut_off += inspect(folder)
    finish(folder, epochs, *more)
    compare(folder, straight)
    seconds = time.monotonic() - began
    return (
        f"{kind.name}: {times} in one training of {epochs} epochs, {epochs * STEPS} steps "
        f"({', '.join(f'{count} in {name}' for name, count in where.items())}; {cut_off} cut off a write, "
        f"{fresh} starts had no checkpoint yet); every checkpoint left behind could be loaded; the end is bit for bit "
        f"that of the undisturbed run: weights, momentum, best model, {epochs} records. {seconds:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs")
    parser.add_argument("--terms", type=int, default=20, help="SIGTERMs")
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        for kind, times in ((signal.SIGKILL, args.kills), (signal.SIGTERM, args.terms)):
            if times:
                print(torment(kind, times, args.seed, Path(root)), flush=True)


if __name__ == "__main__":
    main()
