"""Does ConvNet-AIG beat its ResNet? The trainings behind results/README.md, each of which can be rerun by one line.

    python -m benchmarks.reproduction --data DIR            # all that is not done yet; DIR holds train/ and test/
    python -m benchmarks.reproduction --data DIR --list     # the commands
    python -m benchmarks.reproduction --data DIR --only small-plain-s1 --results again    # a row once more

A training that was cut off goes on where it was. Its last epoch is tested in every gate mode, and its records, logs
and results are copied to results/runs/NAME, or to DIR/runs/NAME with --results DIR; what is there already is not done
again. This file is the protocol: it is committed before the first training that counts.

The small protocol. AIG ResNet-20 at target rates 0.7 and 0.5, the plain ResNet-20, and the plain one with stochastic
depth at a drop rate of 1 - 0.7, meant to tell adaptivity from mere regularisation: 10,000 training images, always the
same ones, 12 epochs, five seeds, every other flag the same. (The learning rate 0.03 was chosen before, against 0.1,
on the first epochs of a *plain* net with seed 0: 38.5 % right after the second, against 32.2 %.) The measure is the
error of the *last* epoch on the whole test set, in gate mode `sample` for AIG as in the authors' code, with `argmax`
beside it. Mean and standard deviation over the seeds; differences with a 95 % interval by Welch's t. It can show
differences above about one percentage point between nets that are far from converged, and nothing about ResNet-110
after 350 epochs.

The options. The same at target rate 0.7 with one option each, to be compared with it, and every last epoch once more in
gate mode `argmax` with BatchNorm's statistics estimated anew in that mode.

The full runs. All training images, 10 epochs, one seed: plain, AIG, and AIG choosing its best epoch on 5,000 held-out
training images, to see how much choosing on the test images flatters. The long runs, added when all of the above but
the options was known: seed 1 of the small protocol, plain and AIG, with three times the epochs, to see whether the
distance between them shrinks.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from aig.checkpoint import BEST, CHECKPOINT
from aig.console import InputError, Parser, number, run_command
from aig.runs import ARGS, METRICS, TEST, read_json
from convnet_aig import GATE_MODES

Tests = Callable[[str, str], dict[str, list[str]]]  # name and flags of a training -> its tests, by key in test.json
ROOT = Path(__file__).parent.parent
RUNS = "runs"  # the folder below results/ that holds a folder for every run
BEST_TEST = "test_best.json"  # as test.json, of model_best.pth.tar
SEEDS = range(1, 6)
SMALL = "--depth 20 --train-size 10000 --batch-size 64 --epochs 12 --milestones 8 11 --lr 0.03"
FULL = "--depth 20 --batch-size 128 --epochs 10 --milestones 7 9"
LONG = SMALL.replace("12 --milestones 8 11", "36 --milestones 24 33")
ARMS = {
    "plain": "--target 1",
    "aig-t0.7": "--target 0.7",
    "aig-t0.5": "--target 0.5",
    "stochastic-depth": "--target 1 --stochastic-depth 0.3",
}
OPTIONS = {
    "lrfact": "--target 0.7 --lrfact 10",
    "target-warmup": "--target 0.7 --target-warmup 4",
}
DROPPED = {"temperature": "--target 0.7 --temperature 2 --temperature-end 0.5"}  # of train.py until commit 0014ec0
FULL_RUNS = {"aig-t0.7": "--target 0.7", "plain": "--target 1", "aig-t0.7-val5000": "--target 0.7 --val-size 5000"}
LONG_RUNS = {"aig-t0.7": "--target 0.7", "plain": "--target 1"}


def protocol(dropped: bool = False) -> Iterator[tuple[str, str]]:
    """The name and the flags of every training, in the order in which they run.

    Args:
        dropped: include those of `DROPPED`, which have been run, and which train.py cannot run any more.
    """
    options = OPTIONS | DROPPED if dropped else OPTIONS
    for arm in ("aig-t0.7", "plain"):
        yield f"full-{arm}", f"{FULL} {FULL_RUNS[arm]} --seed 1"
    for seed in SEEDS:  # all arms of a seed before the next: cut off anywhere, no arm is ahead
        for arm, flags in ARMS.items():
            yield f"small-{arm}-s{seed}", f"{SMALL} {flags} --seed {seed}"
    yield "full-aig-t0.7-val5000", f"{FULL} {FULL_RUNS['aig-t0.7-val5000']} --seed 1"
    for seed in SEEDS:
        for option, flags in options.items():
            yield f"small-option-{option}-s{seed}", f"{SMALL} {flags} --seed {seed}"
    for arm, flags in LONG_RUNS.items():
        yield f"long-{arm}", f"{LONG} {flags} --seed 1"


def training(name: str, flags: str, data: str) -> list[str]:
    """The command line of a training."""
    return ["train.py", "--expname", name, "--dataset", "folder", "--data", data, *flags.split(), "--resume", "auto"]


def tests(name: str, flags: str) -> dict[str, list[str]]:
    """The command lines that test the last epoch, by their key in test.json."""
    test = ["train.py", "--test", "--resume", f"runs/{name}/{CHECKPOINT}"]
    if "--target 1" in flags:  # without gates all modes are the same
        return {"argmax": test}
    anew = {"argmax+bn": [*test, "--reestimate-bn"]}
    return {mode: [*test, "--gate-mode", mode] for mode in GATE_MODES} | anew


def carry_out(name: str, flags: str, tests: Tests, data: str, threads: int, results: Path) -> None:
    """Trains and tests what is not done yet, and copies what is to be kept.

    Raises:
        InputError: if a command failed, naming the log that says why.
    """
    kept, folder = results / RUNS / name, ROOT / "runs" / name
    best = folder / "best"  # a folder of its own, because tests are written beside the checkpoint
    folder.mkdir(parents=True, exist_ok=True)

    def call(log: str, *command: str) -> None:
        with (folder / log).open("a") as file:
            file.write(f"$ OMP_NUM_THREADS={threads} python {shlex.join(command)}\n")
            file.flush()
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            line = [sys.executable, *command]
            if status := subprocess.run(line, cwd=ROOT, env=environment, stdout=file, stderr=file).returncode:
                raise InputError(f"{name} ended with status {status}: {folder / log} says why")

    missing = {key: line for key, line in tests(name, flags).items() if key not in read_json(kept / TEST)}
    if not (kept / TEST).exists():
        call("train.log", *training(name, flags, data))
    for line in missing.values():
        call("test.log", *line)
    untested = "--val-size" in flags and not (kept / BEST_TEST).exists()
    if untested:
        best.mkdir(exist_ok=True)
        shutil.copyfile(folder / BEST, best / BEST)
        call("test.log", "train.py", "--test", "--resume", f"runs/{name}/best/{BEST}")
    if missing or untested:
        kept.mkdir(parents=True, exist_ok=True)
        for file in (ARGS, METRICS, "train.log", "test.log", TEST):
            shutil.copyfile(folder / file, kept / file)
        if best.exists():
            shutil.copyfile(best / TEST, kept / BEST_TEST)


def make_parser(description: str) -> Parser:
    """The command line of a protocol."""
    parser = Parser(description=description)
    parser.add_argument("--data", required=True, metavar="DIR", help="holds train/ and test/, a folder per class")
    parser.add_argument("--only", default="", metavar="PREFIX", help="of the names of the trainings")
    parser.add_argument("--jobs", type=number(int, 1), default=2, help="trainings at a time")
    parser.add_argument("--threads", type=number(int, 1), default=1, help="of each; results depend on it")
    parser.add_argument("--results", type=Path, default=ROOT / "results", metavar="DIR",
                        help="results are kept in DIR/runs/NAME")
    parser.add_argument("--list", action="store_true", help="print the commands instead")
    return parser


def follow(stages: Sequence[Sequence[tuple[str, str]]], tests: Tests, args: argparse.Namespace) -> None:
    """Carries out a protocol as the command line says: stages of (name, flags), each after the one before."""
    stages = [[(name, flags) for name, flags in stage if name.startswith(args.only)] for stage in stages]
    if not any(stages):
        raise InputError(f"--only {args.only}: no training has such a name; see --list")
    if args.list:
        for name, flags in chain.from_iterable(stages):
            for line in (training(name, flags, args.data), *tests(name, flags).values()):
                print(f"OMP_NUM_THREADS={args.threads} python {shlex.join(line)}")
        return
    total = sum(map(len, stages))
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(None, "trainings", total, disable=None) as bar:
        for stage in stages:
            for _ in pool.map(lambda run: carry_out(*run, tests, args.data, args.threads, args.results), stage):
                bar.update()


def main(argv: Sequence[str] | None = None) -> None:
    follow([list(protocol())], tests, make_parser(__doc__.split("\n")[0]).parse_args(argv))


if __name__ == "__main__":
    run_command(main, "reproduction")
