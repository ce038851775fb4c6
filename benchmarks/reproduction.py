"""Does ConvNet-AIG beat its ResNet? The trainings behind results/README.md, each of which can be rerun by one line.

    python -m benchmarks.reproduction --data DIR            # all that is not done yet; DIR holds train/ and test/
    python -m benchmarks.reproduction --data DIR --list     # the commands
    python -m benchmarks.reproduction --data DIR --only small-plain

A training that was cut off goes on where it was. Its last epoch is tested in every gate mode, and its records, logs and
results are copied to results/NAME. This file is the protocol: it is committed before the first training that counts.

The small protocol. AIG ResNet-20 at target rates 0.7 and 0.5, the plain ResNet-20, and the plain one with stochastic
depth at a drop rate of 1 - 0.7, which tells adaptivity from mere regularisation: 10,000 training images, always the
same ones, 12 epochs, five seeds, every other flag the same. (The learning rate 0.03 was chosen before, against 0.1,
on the first epochs of a *plain* net with seed 0: 38.5 % against 32.2 % after the second.) The measure is the error of
the *last* epoch on the whole test set, in gate mode `sample` for AIG as in the authors' code, with `argmax` beside
it. Mean and standard deviation over the seeds; differences with a 95 % interval by Welch's t. It can show differences
above about one percentage point between nets that are far from converged, and nothing about ResNet-110 after 350
epochs.

The options. The same at target rate 0.7 with one option each, to be compared with it.

The full runs. All training images, 10 epochs, one seed: plain, AIG, and AIG choosing its best epoch on 5,000 held-out
training images, to see how much choosing on the test images flatters.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

import cli
import utils
from convnet_aig import GATE_MODES

ROOT = Path(__file__).parent.parent
SEEDS = range(1, 6)
SMALL = "--depth 20 --train-size 10000 --batch-size 64 --epochs 12 --milestones 8 11 --lr 0.03"
FULL = "--depth 20 --batch-size 128 --epochs 10 --milestones 7 9"
ARMS = {
    "plain": "--target 1",
    "aig-t0.7": "--target 0.7",
    "aig-t0.5": "--target 0.5",
    "stochastic-depth": "--target 1 --stochastic-depth 0.3",
}
OPTIONS = {
    "lrfact": "--target 0.7 --lrfact 10",
    "target-warmup": "--target 0.7 --target-warmup 4",
    "temperature": "--target 0.7 --temperature 2 --temperature-end 0.5",
}
FULL_RUNS = {"aig-t0.7": "--target 0.7", "plain": "--target 1", "aig-t0.7-val5000": "--target 0.7 --val-size 5000"}


def protocol() -> Iterator[tuple[str, str]]:
    """The name and the flags of every training, in the order in which they run."""
    for arm in ("aig-t0.7", "plain"):
        yield f"full-{arm}", f"{FULL} {FULL_RUNS[arm]} --seed 1"
    for seed in SEEDS:  # all arms of a seed before the next: cut off anywhere, no arm is ahead
        for arm, flags in ARMS.items():
            yield f"small-{arm}-s{seed}", f"{SMALL} {flags} --seed {seed}"
    yield "full-aig-t0.7-val5000", f"{FULL} {FULL_RUNS['aig-t0.7-val5000']} --seed 1"
    for seed in SEEDS:
        for option, flags in OPTIONS.items():
            yield f"small-option-{option}-s{seed}", f"{SMALL} {flags} --seed {seed}"


def commands(name: str, flags: str, data: str) -> list[list[str]]:
    """The command lines of a training and its tests."""
    train = ["train.py", "--expname", name, "--dataset", "folder", "--data", data, *flags.split(), "--resume", "auto"]
    modes = ("argmax",) if "--target 1" in flags else GATE_MODES  # without gates all modes are the same
    last = f"runs/{name}/{utils.CHECKPOINT}"
    return [train, *(["train.py", "--test", "--resume", last, "--gate-mode", mode] for mode in modes)]


def carry_out(name: str, flags: str, data: str, threads: int) -> None:
    """Trains and tests, and copies what is to be kept. Raises CalledProcessError if a command fails."""
    kept, folder = ROOT / "results" / name, ROOT / "runs" / name
    if (kept / utils.TEST).exists():
        return
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    folder.mkdir(parents=True, exist_ok=True)
    train, *tests = commands(name, flags, data)
    for log, lines in (("train.log", [train]), ("test.log", tests)):
        with (folder / log).open("a" if log == "train.log" else "w") as file:
            for line in lines:
                file.write(f"$ OMP_NUM_THREADS={threads} python {shlex.join(line)}\n")
                file.flush()
                command = [sys.executable, *line]
                subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=file, check=True)
    kept.mkdir(parents=True, exist_ok=True)
    for file in (utils.ARGS, utils.METRICS, "train.log", "test.log", utils.TEST):  # the last one tells that it is done
        shutil.copyfile(folder / file, kept / file)


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.Parser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", required=True, metavar="DIR", help="holds train/ and test/, a folder per class")
    parser.add_argument("--only", default="", metavar="PREFIX", help="of the names of the trainings")
    parser.add_argument("--jobs", type=cli.number(int, 1), default=2, help="trainings at a time")
    parser.add_argument("--threads", type=cli.number(int, 1), default=1, help="of each; results depend on it")
    parser.add_argument("--list", action="store_true", help="print the commands instead")
    args = parser.parse_args(argv)
    runs = [(name, flags) for name, flags in protocol() if name.startswith(args.only)]
    if not runs:
        raise utils.InputError(f"--only {args.only}: no training has such a name; see --list")
    if args.list:
        for name, flags in runs:
            print("\n".join(f"OMP_NUM_THREADS={args.threads} python {shlex.join(line)}"
                            for line in commands(name, flags, args.data)))
        return
    with ThreadPoolExecutor(args.jobs) as pool:
        done = pool.map(lambda run: carry_out(*run, args.data, args.threads), runs)
        for _ in tqdm(done, "trainings", len(runs), disable=None):
            pass


if __name__ == "__main__":
    cli.main(main, "reproduction")
