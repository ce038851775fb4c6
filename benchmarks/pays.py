"""Does gating pay: at the same computation, is a gated network better than a smaller one? Long trainings, the table.

    python -m benchmarks.pays --data DIR           # all that is not done yet; DIR holds train/ and test/
    python -m benchmarks.pays --data DIR --list    # the commands
    python -m benchmarks.pays --data DIR --table   # what came of them

This file is the protocol: it is committed before its first training. CIFAR-10 as JPEG at quality 75: 45,000 images to
train on, 5,000 held out, on which thresholds are chosen. Nothing is chosen on the test images, which are looked at
after the last epoch, the one that counts. Every arm has 90 epochs in all, two seeds, the same cosine schedule,
Nesterov's momentum, weight decay and batches; learning rates and the recipe for gates are the pilot's
(results/pilot.md): a budget without a floor, and a teacher. The teacher is a plain ResNet-20 of 60 epochs; what starts
from it has 30 more. In this order, so that what is there when it has to stop is worth having:

    teacher, control            the dense net, and 30 epochs more of it
    budget 0.75, 0.6, 0.45      gated from the teacher, which also teaches
    rates                       the same with a rate of 0.7 for each gate, as in the paper
    floor                       the same with budget 0.6 and a floor: in the pilot, most gates without one soon did the
                                same for every image
    resnet14, resnet8           smaller static nets, 90 epochs, without and with the same teacher
    control-taught              the dense net, 30 epochs more with its teacher, which did not help in the pilot
    majority                    those blocks of the teacher that `floor` opens for most held-out images, for every
                                image: adaptivity, or merely which blocks?
    random                      each block opens as often as in `floor`, but at random: adaptivity, or merely depth?
    scratch                     AIG as in the paper: from scratch, t = 0.7

**The question**: the gated nets, each in mode `argmax` at the thresholds for its budget, against static nets: of
resnet8, resnet14 and control, each the better of without and with teacher, a straight line between those neighbouring
in multiply-accumulates. Gating *pays* at a budget if its test error, the mean of the seeds, is lower than that line
by more than 0.5 points, *loses* if higher by more than 0.5, and is *undecided* between: two seeds of 10,000 test
images tell no less apart. Adaptivity counts by the same margin: `floor` in mode `argmax` at threshold 0.5 against
majority and random.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch

import aig
from aig.checkpoint import CHECKPOINT, TEST
from aig.console import InputError, run_command
from aig.networks import gate
from aig.runs import atomic_write, read_json, read_records
from benchmarks.runner import ROOT, follow_or_print
from convnet_aig import log_odds

SEEDS = (1, 2)
BUDGETS = (0.75, 0.6, 0.45)
MARGIN = 0.5  # points of error
SHARED = "--batch-size 128 --val-size 5000 --lr-schedule cosine --nesterov --compile"
SCRATCH = f"--lr 0.1 --epochs 90 {SHARED}"
TUNED = f"--depth 20 --lr 0.05 --epochs 30 {SHARED}"
GATES = "--no-gate-decay --lrfact 5"
FIXED = "--target 0.5 --lossfact 0 --lrfact 0"  # gates that stay as they are
STATIC = ("resnet8", "resnet14", "control")
SURE = 1e-6  # how far from 0 and 1 the P(open) of a fixed gate stays


def stages(seed: int) -> list[dict[str, str]]:
    """The trainings of a seed, each stage after the one before: name -> flags."""
    teacher = f"runs/pays-teacher-s{seed}/{CHECKPOINT}"
    start, taught = f"{TUNED} --pretrained {teacher}", f"--distill {teacher}"
    gated = {f"budget{budget}": f"{start} {GATES} --budget {budget} --no-budget-floor {taught}" for budget in BUDGETS}
    gated["rates"] = f"{start} {GATES} --target 0.7 {taught}"
    gated["floor"] = f"{start} {GATES} --budget 0.6 {taught}"
    smaller = {
        f"resnet{depth}{name}": f"--depth {depth} {SCRATCH} --target 1 {flags}".strip()
        for depth in (14, 8) for name, flags in (("", ""), ("-taught", taught))
    }
    fixed = {
        name: f"{TUNED} --pretrained {fixed_file(name, seed).relative_to(ROOT)} {FIXED} {taught}"
        for name in ("majority", "random")
    }
    return [
        {"teacher": f"--depth 20 --lr 0.1 --epochs 60 {SHARED} --target 1"},
        {"control": f"{start} --target 1", **gated, **smaller, "control-taught": f"{start} --target 1 {taught}"},
        {**fixed, "scratch": f"--depth 20 {SCRATCH} --target 0.7"},
    ]


def tests(name: str, flags: str) -> dict[str, list[str]]:
    """The command lines that test the last epoch, by their key in test.json."""
    test = ["train.py", "--test", "--resume", f"runs/{name}/{CHECKPOINT}"]
    if "--target 1" in flags:  # without gates all modes are the same
        return {"argmax": test}
    found = {mode: [*test, "--gate-mode", mode] for mode in ("argmax", "sample")}
    if FIXED in flags:
        return found
    own = [budget for budget in BUDGETS if f"budget{budget}" in name]  # most of its gates vary too little for another
    return found | {f"argmax@budget={budget}": [*test, "--budget", str(budget)] for budget in own or BUDGETS}


# ---------------------------------------------------------------------------------------------- gates that are fixed


def fixed_file(name: str, seed: int) -> Path:
    return ROOT / "runs" / "pays-fixed" / f"{name}-s{seed}.pth.tar"


def fix_gates(seed: int) -> None:
    """Writes the teacher with gates that ignore the image, for the arms majority and random. Raises InputError."""
    runs = ROOT / "runs"
    records = read_records(runs / f"pays-floor-s{seed}")
    if not records:
        raise InputError(f"pays-floor-s{seed} has to be trained first: its gates are to be imitated")
    rates = records[-1]["val"]["gates"]  # in mode argmax, on the images held out
    for name, chances in (("majority", [float(rate > 0.5) for rate in rates]), ("random", rates)):
        model = with_fixed_gates(runs / f"pays-teacher-s{seed}" / CHECKPOINT, chances)
        fixed_file(name, seed).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(fixed_file(name, seed)) as file:
            torch.save({"state_dict": model.state_dict()}, file)


def prepare(name: str) -> None:
    """Makes what a training starts from, if that is none of the other trainings."""
    if name.startswith(("pays-majority", "pays-random")):
        fix_gates(int(name[-1]))


def with_fixed_gates(teacher: Path, chances: Sequence[float]) -> torch.nn.Module:
    """A plain network with gates that open with these chances, whatever the image."""
    model = gate(aig.load(teacher))
    for block, chance in zip(model.blocks(), chances, strict=True):
        torch.nn.init.zeros_(block.fc2.weight)
        block.fc2.bias.data = torch.tensor([0, log_odds(min(max(chance, SURE), 1 - SURE))])
    return model


# ---------------------------------------------------------------------------------------------- the table


def results(folder: Path, arm: str) -> list[dict[str, dict]]:
    """What was tested of an arm, by mode, one for each seed that is done."""
    found = [read_json(folder / f"pays-{arm}-s{seed}" / TEST) for seed in SEEDS]
    return [result for result in found if result]


def mean(found: Sequence[dict[str, dict]], mode: str) -> tuple[float, float]:
    """Multiply-accumulates of an image in millions, and error in percent; means over the seeds."""
    macs, errors = zip(*((each[mode]["macs_mean"] / 1e6, 100 - each[mode]["top1"]) for each in found), strict=True)
    return statistics.fmean(macs), statistics.fmean(errors)


def static_points(found: dict[str, list]) -> list[tuple[float, float]]:
    """(macs, error) of each static net: the better of without and with teacher."""
    kinds = [[mean(found[kind], "argmax") for kind in (arm, f"{arm}-taught") if found.get(kind)] for arm in STATIC]
    return [min(each, key=lambda point: point[1]) for each in kinds if each]


def static_error(points: Sequence[tuple[float, float]], macs: float) -> float | None:
    """The error of static nets at so many multiply-accumulates, on lines between points (macs, error); None outside."""
    points = sorted(points)
    for (low, left), (high, right) in pairwise(points):
        if low <= macs <= high:
            return left + (right - left) * (macs - low) / (high - low)
    return None


def verdict(distance: float) -> str:
    return "pays" if distance < -MARGIN else "loses" if distance > MARGIN else "undecided"


def table(folder: Path) -> Iterator[str]:
    """The lines of the table of all arms, and the verdicts as far as there are results."""
    arms = list(dict.fromkeys(name for stage in stages(1) for name in stage))
    found = {arm: results(folder, arm) for arm in arms}
    yield "| arm | seeds | mode | MMACs of an image | error, % (by seed) |"
    yield "|---|---|---|---|---|"
    for arm in arms:
        for mode in found[arm][0] if found[arm] else ():
            each = [result for result in found[arm] if mode in result]
            macs, error = mean(each, mode)
            seeds = " / ".join(f"{100 - result[mode]['top1']:.2f}" for result in each)
            yield f"| {arm} | {len(each)} | `{mode}` | {macs:.2f} | {error:.2f} ({seeds}) |"
    yield ""
    points = static_points(found)
    for budget in BUDGETS:
        if gated := found[f"budget{budget}"]:
            macs, error = mean(gated, f"argmax@budget={budget}")
            line = static_error(points, macs)
            if line is not None:
                yield f"- budget {budget}: {error:.2f} against {line:.2f} of static nets: {verdict(error - line)}"
    for arm, mode in (("majority", "argmax"), ("random", "sample")):
        if found[arm] and found["floor"]:
            ours, theirs = mean(found["floor"], "argmax"), mean(found[arm], mode)
            yield f"- adaptive {ours[1]:.2f} @ {ours[0]:.2f} MMACs against {arm} {theirs[1]:.2f} @ {theirs[0]:.2f}: " \
                  f"{verdict(ours[1] - theirs[1])}"


def main(argv: Sequence[str] | None = None) -> None:
    protocol = [
        [(f"pays-{name}-s{seed}", f"{flags} --seed {seed}") for name, flags in stage.items()]
        for seed in SEEDS for stage in stages(seed)
    ]
    follow_or_print(argv, __doc__, protocol, tests, table, prepare)


if __name__ == "__main__":
    run_command(main, "pays")
