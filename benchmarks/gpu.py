"""Everything that is to be measured on a GPU, in pieces of under ten minutes, and a table of it.

    python -m benchmarks.gpu --out DIR --data DIR         # all that is not done yet; --data holds train/ and test/
    python -m benchmarks.gpu --out DIR --minutes 25       # go on where it stopped, for 25 minutes
    python -m benchmarks.gpu --out DIR --small            # everything with tiny nets, in a few minutes of a CPU

Each piece is a process. What it gave is DIR/NAME.json, what it printed DIR/NAME.log, and a piece whose file is there is
not run again: delete the file for that. A piece that fails is recorded, too, and the next one runs. Trainings are in
DIR/runs; they are stopped in time and go on in the next piece. The table, DIR/table.md, is written anew after each.

The pieces, most valuable first: the tests that use a GPU; a training step in every way that flags can ask for, beside
the net without gates and the original's way; conditional inference; the paper's trainings; all other tests.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from aig.console import InputError, Parser, number, run_command
from aig.runs import read_json, write_json
from benchmarks.gpu_table import table
from convnet_aig import GATE_MODES
from train import EPOCHS

ROOT, TABLE = Path(__file__).parent.parent, "table.md"
LIMIT = 9 * 60  # seconds of a piece
SAVING = 60  # seconds that a training may take to save itself
STOPPED = (128 + signal.SIGTERM, -signal.SIGTERM)  # exit status of a training: saved, or not yet begun
LAST_LINES = 15  # kept of what failed
WAYS = {  # flags of `benchmarks.train_step`
    "float32": "--ways contiguous --no-tf32",
    "channels-last": "--ways eager --no-tf32",
    "tf32": "--ways eager --tf32",
    "bf16": "--ways bf16 --tf32",
    "compile": "--ways compile --tf32",
    "compile-bf16": "--ways compile-bf16 --tf32",
    "graphs": "--ways graphs --tf32",
    "graphs-bf16": "--ways graphs-bf16 --tf32",
}
STEPS = {"AIG-110": "--depth 110 --batch-size 256", "AIG-50": "--arch resnet50 --batch-size 128"}
TINY_STEPS = {"AIG-8": "--depth 8 --batch-size 4", "AIG-18": "--arch resnet18 --image-size 32 --batch-size 2"}
TRAININGS = {"aig110-t0.7": "--target 0.7", "aig110-t0.6": "--target 0.6", "resnet110": "--target 1"}
GPU_TESTS = "cuda or gpu"  # the fixture `device` names its tests so


def pieces(args: argparse.Namespace) -> dict[str, list[str]]:
    """What follows `python`, by the name of the piece, in their order.

    Names are tests_FILE, step_NET_WAY, inference_NET_BATCH, train_RUN and test_RUN_MODE.
    """
    device, rounds = ("--device", args.device), ("--rounds", "1" if args.small else "10")
    quick = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow and not engine")
    steps, ways, nets = STEPS, list(WAYS), {"AIG-110": (1, 32, 256), "AIG-50": (1, 32, 256)}
    found, others = {"tests_gpu": [*quick, "-k", GPU_TESTS]}, sorted((ROOT / "tests").glob("test_*.py"))
    if args.small:
        steps, ways, nets = TINY_STEPS, ways[:4], {"AIG-8": (1,)}  # compiling takes a CPU minutes
        found, others = {"tests_small": [*quick, "tests/test_gumbelmodule.py"]}, []
    for net, flags in steps.items():
        for way in ways:
            how = f"{flags} {WAYS[way]} --counts".split()
            found[f"step_{net}_{way}"] = ["-m", "benchmarks.train_step", *how, *rounds, *device]
    for net, batches in nets.items():
        for batch in map(str, batches):
            how = ["--net", net, "--batch", batch]
            found[f"inference_{net}_{batch}"] = ["-m", "benchmarks.latency", *how, *rounds, *device]
    for name, flags in TRAININGS.items():
        found |= of_training(name, flags, args)
    return found | {f"tests_{path.stem[5:]}": [*quick, "-k", f"not ({GPU_TESTS})", str(path)] for path in others}


def of_training(name: str, flags: str, args: argparse.Namespace) -> dict[str, list[str]]:
    """A training, and the tests of its best model in every gate mode."""
    root, device = str(args.out / "runs"), ["--device", args.device]
    images = ["--dataset", "folder" if args.data else "cifar10", "--data", str(args.data or args.out / "data")]
    if args.small:
        name, images = name.replace("110", "8"), ["--dataset", "digits", "--depth", "8", "--batch-size", "64"]
    flags = f"{flags} --epochs {args.epochs} {args.flags}".split()
    train = ["train.py", "--expname", name, "--save", root, *images, *flags, *device, "--resume", "auto"]
    test = ["train.py", "--test", "--resume", f"{root}/{name}", *device, "--gate-mode"]
    modes = GATE_MODES[:1] if flags[:2] == ["--target", "1"] else GATE_MODES  # without gates all modes are the same
    return {f"train_{name}": train} | {f"test_{name}_{mode}": [*test, mode] for mode in modes}


# ---------------------------------------------------------------------------------------------- running


def stop(process: subprocess.Popen) -> int:
    """Ends the process and what it has started; a training saves its step. Returns the exit status."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sent)
        with suppress(subprocess.TimeoutExpired):
            return process.wait(SAVING)
    return process.wait()


def carry_out(name: str, command: Sequence[str], out: Path, seconds: float) -> dict | None:
    """Runs a piece within a time limit: its record, or None if it was stopped and has more to do."""
    start, limit, line = time.perf_counter(), min(LIMIT, seconds), [sys.executable, *command]
    with (out / f"{name}.log").open("a+") as log:
        before = log.tell()
        process = subprocess.Popen(line, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            stop(process)
            if process.returncode in STOPPED if name.startswith("train_") else limit < LIMIT:
                return None
        finally:
            status = stop(process) if process.poll() is None else process.returncode
        log.seek(before)
        lines = log.read().splitlines()
    record = {"command": list(command), "status": status, "seconds": time.perf_counter() - start}
    if status:
        return record | {"last_lines": lines[-LAST_LINES:]}
    values = next((line for line in reversed(lines) if line.startswith('{"')), None)
    return record | {"result": json.loads(values) if values else next(iter(lines[-1:]), "")}


def carry_out_all(todo: dict[str, list[str]], out: Path, until: float, only: str = "") -> None:
    """Runs what is not done and called `only`..., until `until`. The tests of a training wait for its end."""
    for count, (name, command) in enumerate(todo.items(), start=1):
        path, (kind, about, *_) = out / f"{name}.json", name.split("_")
        waits = kind == "test" and read_json(out / f"train_{about}.json").get("status") != 0
        mine = name.startswith(only) and not waits
        while mine and not path.exists() and (left := until - time.monotonic()) > 0:
            print(f"{count}/{len(todo)} {name}", flush=True)
            if record := carry_out(name, command, out, left):
                write_json(path, record)
                print(f"  status {record['status']} after {record['seconds']:.0f} s", flush=True)
            (out / TABLE).write_text(table(list(todo), out))
    (out / TABLE).write_text(table(list(todo), out))


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where everything is kept")
    parser.add_argument("--data", type=Path, metavar="DIR", help="class folders of CIFAR-10; without: a download")
    parser.add_argument("--minutes", type=number(float, above=0), default=float("inf"), help="to stop after")
    parser.add_argument("--epochs", type=number(int, 1), help="of the trainings (default: the paper's 350; small: 2)")
    parser.add_argument("--flags", default="", metavar="'...'", help="further flags of the trainings")
    parser.add_argument("--only", default="", metavar="PREFIX", help="of the names of the pieces")
    parser.add_argument("--small", action="store_true", help="tiny nets, to see that it runs")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    args = parser.parse_args(argv)
    args.out, args.epochs = args.out.resolve(), args.epochs or (2 if args.small else EPOCHS)
    args.data = args.data and args.data.resolve()  # the pieces run in the root of the repository
    if args.data and not args.data.is_dir():
        raise InputError(f"--data: no such folder: {args.data}")
    args.out.mkdir(parents=True, exist_ok=True)
    todo = pieces(args)
    if not any(name.startswith(args.only) for name in todo):
        raise InputError(f"--only {args.only}: no piece has such a name")
    carry_out_all(todo, args.out, time.monotonic() + 60 * args.minutes, args.only)
    print(f"\n{(args.out / TABLE).read_text()}")


if __name__ == "__main__":
    run_command(main, "gpu")
