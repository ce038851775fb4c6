"""Which recipe to gate a trained network with? The trainings behind results/pilot.md, one line each.

    python -m benchmarks.pilot --data DIR           # all that is not done yet; DIR holds train/ and test/
    python -m benchmarks.pilot --data DIR --list    # the commands
    python -m benchmarks.pilot --data DIR --table   # what came of them

A pilot: one seed, 15 epochs in all, far from converged. It chooses recipes and learning rates for longer runs, on
5,000 held-out training images (the last record of metrics.jsonl); the test images are only reported. Every arm has
trained for 15 epochs of 45,000 images at its end: 10 of the teacher, a plain ResNet-20, and 5 of its own, or all 15
from scratch. All have the same cosine schedule, Nesterov's momentum and weight decay. This file is the protocol: it is
committed before its first training.

First the learning rate of the 5 epochs, for a gated net and for the control, which trains the plain net on; static nets
at a comparable cost beside, ResNet-14 (0.65 of ResNet-20's multiply-accumulates), with and without distillation. (It
was to be 0.01, 0.02 or 0.05. When 0.05 had beaten 0.02, 0.1 took the place of 0.01, which had not been tested: the best
one should not be the largest.)

Then, at the rate that was best for both, 0.05: target rates against a budget, with and without distillation, with and
without a floor, the control with distillation; AIG from scratch. And a second budget at 0.02, the default of train.py:
there the rates of sampled gates kept closest to the budget, though the errors were higher.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from aig.checkpoint import CHECKPOINT, TEST
from aig.console import run_command
from aig.runs import read_json, read_records
from benchmarks.runner import RUNS, follow, make_parser

TEACHER = f"runs/pilot-teacher/{CHECKPOINT}"
SHARED = "--batch-size 128 --val-size 5000 --lr-schedule cosine --nesterov --compile --seed 1"
SCRATCH = f"--depth 20 --epochs 15 --lr 0.1 {SHARED}"
SMALLER = SCRATCH.replace("--depth 20", "--depth 14")
TUNED = f"--depth 20 --epochs 5 --pretrained {TEACHER} {SHARED}"
GATED = f"{TUNED} --no-gate-decay --lrfact 5"
DISTILL = f"--distill {TEACHER}"
LEARNING_RATES = (0.02, 0.05, 0.1)
BEST = "--lr 0.05"

STAGES = (
    {"teacher": f"{SCRATCH.replace('15', '10')} --target 1", "scratch-plain": f"{SCRATCH} --target 1"},
    {f"budget-distill-lr{lr}": f"{GATED} --budget 0.6 {DISTILL} --lr {lr}" for lr in LEARNING_RATES}
    | {f"control-lr{lr}": f"{TUNED} --target 1 --lr {lr}" for lr in LEARNING_RATES}
    | {"smaller": f"{SMALLER} --target 1", "smaller-distill": f"{SMALLER} --target 1 {DISTILL}"},
    {
        "budget0.75-distill-lr0.02": f"{GATED} --budget 0.75 {DISTILL} --lr 0.02",
        "rates-only": f"{GATED} --target 0.6 {BEST}",
        "budget-only": f"{GATED} --budget 0.6 {BEST}",
        "control-distill": f"{TUNED} --target 1 {DISTILL} {BEST}",
        "budget-distill-no-floor": f"{GATED} --budget 0.6 --no-budget-floor {DISTILL} {BEST}",
        "rates-distill": f"{GATED} --target 0.6 {DISTILL} {BEST}",
        "scratch-rates": f"{SCRATCH} --target 0.6",
    },
)


def tests(name: str, flags: str) -> dict[str, list[str]]:
    """The command lines that test the last epoch, by their key in test.json."""
    test = ["train.py", "--test", "--resume", f"runs/{name}/{CHECKPOINT}"]
    if "--target 1" in flags:  # without gates all modes are the same
        return {"argmax": test}
    budgets = re.findall(r"--budget (\S+)", flags) or ["0.6", "0.75"]
    calibrated = {f"argmax@budget={budget}": [*test, "--budget", budget] for budget in budgets}
    return {mode: [*test, "--gate-mode", mode] for mode in ("argmax", "sample")} | calibrated


def table(folder: Path) -> Iterator[str]:
    """The lines of a table of all trainings in a folder of results, in the order of the protocol."""
    yield "| training | held out, error % | test: mode or budget, error % @ MACs of the dense ResNet-20 |"
    yield "|---|---|---|"
    dense = None
    for name in chain.from_iterable(STAGES):
        results = read_json(folder / f"pilot-{name}" / TEST)
        if not results:
            continue
        dense = dense or next(iter(results.values()))["macs_dense"]  # the first one is the teacher's
        held_out = 100 - read_records(folder / f"pilot-{name}")[-1]["val"]["top1"]
        cells = [
            f"{key.removeprefix('argmax@')} {100 - result['top1']:.2f} @ {result['macs_mean'] / dense:.3f}"
            for key, result in results.items()
        ]
        yield f"| {name} | {held_out:.2f} | {' · '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> None:
    stages = [[(f"pilot-{name}", flags) for name, flags in stage.items()] for stage in STAGES]
    parser = make_parser(__doc__.split("\n")[0])
    parser.add_argument("--table", action="store_true", help="print what is in the results instead")
    args = parser.parse_args(argv)
    if args.table:
        print("\n".join(table(args.results / RUNS)))
    else:
        follow(stages, tests, args)


if __name__ == "__main__":
    run_command(main, "pilot")
