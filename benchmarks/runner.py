"""Carries out a protocol: trainings in stages, each by one line of train.py, tested and kept.

A training that was cut off goes on where it was. Its last epoch is tested as the protocol asks, and its records, logs
and results are copied to results/runs/NAME, or to DIR/runs/NAME with --results DIR; what is there already is not done
again.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from aig.checkpoint import BEST
from aig.console import InputError, Parser, number
from aig.runs import ARGS, METRICS, TEST, read_json

Tests = Callable[[str, str], dict[str, list[str]]]  # name and flags of a training -> its tests, by key in test.json
ROOT = Path(__file__).parent.parent
RUNS = "runs"  # the folder below results/ that holds a folder for every run
BEST_TEST = "test_best.json"  # as test.json, of model_best.pth.tar


def training(name: str, flags: str, data: str) -> list[str]:
    """The command line of a training."""
    return ["train.py", "--expname", name, "--dataset", "folder", "--data", data, *flags.split(), "--resume", "auto"]


def carry_out(
    name: str, flags: str, tests: Tests, data: str, threads: int, results: Path, prepare: Callable[[str], None]
) -> None:
    """Prepares, trains and tests what is not done yet, and copies what is to be kept.

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
        prepare(name)
        call("train.log", *training(name, flags, data))
    pending = list(missing.values())
    untested = "--val-size" in flags and not (kept / BEST_TEST).exists()
    if untested:
        best.mkdir(exist_ok=True)
        shutil.copyfile(folder / BEST, best / BEST)
        pending.append(["train.py", "--test", "--resume", f"runs/{name}/best/{BEST}"])
    failed = []
    for line in pending:
        try:
            call("test.log", *line)
        except InputError as error:  # such as a budget out of reach: what else was tested is kept
            failed.append(error)
    if missing or untested:
        kept.mkdir(parents=True, exist_ok=True)
        for file in (ARGS, METRICS, "train.log", "test.log", TEST):
            if (folder / file).exists():
                shutil.copyfile(folder / file, kept / file)
        if (best / TEST).exists():
            shutil.copyfile(best / TEST, kept / BEST_TEST)
    if failed:
        raise failed[0]


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


def follow(
    stages: Sequence[Sequence[tuple[str, str]]],
    tests: Tests,
    args: argparse.Namespace,
    prepare: Callable[[str], None] = lambda name: None,
) -> None:
    """Carries out a protocol as the command line says: stages of (name, flags), each after the one before.

    `prepare` is called with the name of a training before it is carried out. What fails stops no other training.

    Raises InputError at the end if something failed.
    """
    stages = [[(name, flags) for name, flags in stage if name.startswith(args.only)] for stage in stages]
    if not any(stages):
        raise InputError(f"--only {args.only}: no training has such a name; see --list")
    if args.list:
        for name, flags in chain.from_iterable(stages):
            for line in (training(name, flags, args.data), *tests(name, flags).values()):
                print(f"OMP_NUM_THREADS={args.threads} python {shlex.join(line)}")
        return
    total = sum(map(len, stages))
    failed = []
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(None, "trainings", total, disable=None) as bar:
        for stage in stages:
            where = (args.data, args.threads, args.results, prepare)
            for done in [pool.submit(carry_out, *run, tests, *where) for run in stage]:
                try:
                    done.result()
                except InputError as error:
                    failed.append(str(error))
                    if total > 1:
                        bar.write(f"error: {error}", sys.stderr)  # now, as others may take days
                except BaseException:  # such as Ctrl-C: nothing more is to begin
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
                bar.update()
    if failed:
        raise InputError("; ".join(dict.fromkeys(failed)))
