"""Does gating pay: at the same computation, is a gated network better than a smaller one? Long trainings, the table.

    python -m benchmarks.pays --data DIR           # all that is not done yet; DIR holds train/ and test/
    python -m benchmarks.pays --data DIR --list    # the commands
    python -m benchmarks.pays --data DIR --table   # what came of them

This file is the protocol, committed before its first training; on 2026-11-25, before anything was tested,
`majority-free` and the rules for comparing nets of different cost were added, and all arms began anew with convolutions
in bfloat16 (tests are in float32), which takes two thirds of the time. On 2026-11-27 the weights of the first teachers
were lost with their machine, when only these and their controls were trained: both arms are trained anew, by the same
commands, and the teachers come with the repository as model folders.

CIFAR-10 as JPEG at quality 75: 45,000 images to train on, 5,000 held out, on which thresholds are chosen. The test
images are looked at after the last epoch, the one that counts. Every arm but the teacher has 90 epochs in all, two
seeds, the same cosine schedule, Nesterov's momentum, weight decay and batches. The recipe for gates and the learning
rate of what starts from the teacher are the pilot's (results/pilot.md): a budget without a floor, a teacher, 0.05. The
0.1 of nets from scratch was not tuned. The teacher is a plain ResNet-20 of 60 epochs; what starts from it has 30 more.
In this order, so that what is there when it has to stop is worth having:

    teacher, control            the dense net, and 30 epochs more of it
    budget 0.75, 0.6, 0.45      gated from the teacher, which also teaches
    rates                       the same with a rate of 0.7 for each gate, as in the paper
    floor                       the same with budget 0.6 and a floor: in the pilot, most gates without one soon did the
                                same for every image
    resnet14, resnet8           smaller static nets, 90 epochs, without and with the same teacher
    control-taught              the dense net, 30 epochs more with its teacher, which did not help in the pilot
    majority                    those blocks of the teacher that `floor` opens for most held-out images, for every
                                image: adaptivity, or merely which blocks?
    majority-free               the same of `budget 0.6`
    random                      each block opens as often as in `floor`, but at random: adaptivity, or merely depth?
    scratch                     AIG as in the paper: from scratch, t = 0.7

**The question**: the gated nets, each in mode `argmax` at the thresholds for its budget, against static nets: of
resnet8, resnet14 and control, each the better of without and with teacher (on the test images, which favours them).
Between neighbours in multiply-accumulates their error is taken to be linear in the logarithm of these. A net *pays* at
a budget if its test error, the mean of the seeds, is lower by more than 0.5 points, *loses* if higher by more than 0.5,
and is *undecided* between; the margin was chosen beforehand. Beside each verdict: how many gates vary, open for 1 to
99 % of the images held out. A net that pays but does not beat `majority-free` by the margin is a smaller static net,
found by training, and no case for deciding by the image.

**Adaptivity** counts by the same margin: the error of `floor`, on the line through its calibrated thresholds, at the
multiply-accumulates of majority and of random.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import log
from pathlib import Path

import torch

import aig
from aig.checkpoint import CHECKPOINT, TEST
from aig.console import InputError, run_command
from aig.networks import gate
from aig.runs import atomic_write, read_json, read_records
from benchmarks.runner import ROOT, RUNS, follow_or_print
from convnet_aig import log_odds

SEEDS = (1, 2)
BUDGETS = (0.75, 0.6, 0.45)
MARGIN = 0.5  # points of error
SHARED = "--batch-size 128 --val-size 5000 --lr-schedule cosine --nesterov --compile --amp bf16"
SCRATCH = f"--lr 0.1 --epochs 90 {SHARED}"
TUNED = f"--depth 20 --lr 0.05 --epochs 30 {SHARED}"
GATES = "--no-gate-decay --lrfact 5"
FIXED = "--target 0.5 --lossfact 0 --lrfact 0"  # gates that stay as they are
STATIC = ("resnet8", "resnet14", "control")
IMITATED = {"majority": "floor", "majority-free": "budget0.6", "random": "floor"}  # what fixed gates are taken from
VARIES = 0.01  # a gate that opens for at least this part of the images, and is closed for as many
CALIBRATED = {budget: f"argmax@budget={budget}" for budget in BUDGETS}
SURE = 1e-6  # how far from 0 and 1 the P(open) of a fixed gate stays


def teacher_folder(seed: int) -> str:
    """The model folder of a teacher, below the root of the repository."""
    return f"results/model/resnet20-cifar10-jpeg-s{seed}"


def stages(seed: int) -> list[dict[str, str]]:
    """The trainings of a seed, each stage after the one before: name -> flags."""
    start, taught = f"{TUNED} --pretrained {teacher_folder(seed)}", f"--distill {teacher_folder(seed)}"
    gated = {f"budget{budget}": f"{start} {GATES} --budget {budget} --no-budget-floor {taught}" for budget in BUDGETS}
    gated["rates"] = f"{start} {GATES} --target 0.7 {taught}"
    gated["floor"] = f"{start} {GATES} --budget 0.6 {taught}"
    smaller = {
        f"resnet{depth}{name}": f"--depth {depth} {SCRATCH} --target 1 {flags}".strip()
        for depth in (14, 8) for name, flags in (("", ""), ("-taught", taught))
    }
    fixed = {
        name: f"{TUNED} --pretrained {fixed_file(name, seed).relative_to(ROOT)} {FIXED} {taught}"
        for name in IMITATED
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
    return found | {CALIBRATED[budget]: [*test, "--budget", str(budget)] for budget in own or BUDGETS}


# ---------------------------------------------------------------------------------------------- gates that are fixed


def fixed_file(name: str, seed: int) -> Path:
    return ROOT / "runs" / "pays-fixed" / f"{name}-s{seed}.pth.tar"


def prepare(name: str) -> None:
    """Makes what a training starts from, if that is none of the others: the teacher with gates that ignore the image.

    Raises InputError if the teacher, or the net whose gates are to be imitated, is missing.
    """
    arm, seed = name.removeprefix("pays-").rsplit("-s", 1)
    folder = teacher_folder(int(seed))
    if arm != "teacher" and not (ROOT / folder).exists():
        command = f"--resume runs/pays-teacher-s{seed}/{CHECKPOINT} --folder {folder} --licence mit"
        raise InputError(f"no {folder}: write it with python -m aig.export {command}")
    if arm not in IMITATED:
        return
    places = (ROOT, ROOT / "results")  # where it was trained, or else what is kept of it
    records = next(filter(None, (read_records(at / RUNS / f"pays-{IMITATED[arm]}-s{seed}") for at in places)), None)
    if not records:
        raise InputError(f"pays-{IMITATED[arm]}-s{seed} has to be trained first: its gates are to be imitated")
    rates = records[-1]["val"]["gates"]  # in mode argmax, on the images held out
    chances = rates if arm == "random" else [float(rate > 0.5) for rate in rates]
    model = with_fixed_gates(ROOT / folder, chances)
    path = fixed_file(arm, int(seed))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        torch.save({"state_dict": model.state_dict()}, file)


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


def mean(found: Sequence[dict[str, dict]], mode: str) -> tuple[float, float] | None:
    """Multiply-accumulates of an image in millions, and error in percent; means over the seeds tested in this mode."""
    each = [result[mode] for result in found if mode in result]
    if not each:
        return None
    return tuple(statistics.fmean(values) for values in ([result["macs_mean"] / 1e6 for result in each],
                                                         [100 - result["top1"] for result in each]))


def static_points(found: dict[str, list]) -> list[tuple[float, float]]:
    """(macs, error) of each static net: the better of without and with teacher."""
    kinds = [[mean(found.get(kind, []), "argmax") for kind in (arm, f"{arm}-taught")] for arm in STATIC]
    return [min(filter(None, each), key=lambda point: point[1]) for each in kinds if any(each)]


def error_at(points: Sequence[tuple[float, float]], macs: float) -> float | None:
    """The error at so many multiply-accumulates, between points (macs, error) linear in log(macs); None outside."""
    for (low, left), (high, right) in pairwise(sorted(points)):
        if low <= macs <= high:
            return left + (right - left) * log(macs / low) / log(high / low)
    return None


def verdict(distance: float) -> str:
    return "pays" if distance < -MARGIN else "loses" if distance > MARGIN else "undecided"


def varying(folder: Path, arm: str) -> str:
    """How many gates vary on the images held out, by seed."""
    records = [read_records(folder / f"pays-{arm}-s{seed}") for seed in SEEDS]
    gates = [each[-1]["val"]["gates"] for each in records if each]
    return " / ".join(f"{sum(VARIES <= rate <= 1 - VARIES for rate in each)} of {len(each)}" for each in gates)


def table(folder: Path) -> Iterator[str]:
    """The lines of the table of all arms, and the verdicts as far as there are results."""
    arms = list(dict.fromkeys(name for stage in stages(1) for name in stage))
    found = {arm: results(folder, arm) for arm in arms}
    yield "| arm | seeds | mode | MMACs of an image | error, % (by seed) |"
    yield "|---|---|---|---|---|"
    for arm in arms:
        for mode in dict.fromkeys(mode for result in found[arm] for mode in result):
            each = [result[mode] for result in found[arm] if mode in result]
            macs, error = mean(found[arm], mode)
            seeds = " / ".join(f"{100 - result['top1']:.2f}" for result in each)
            yield f"| {arm} | {len(each)} | `{mode}` | {macs:.2f} | {error:.2f} ({seeds}) |"
    yield ""
    if any(len(each) < len(SEEDS) for each in found.values()):
        yield "Not all trainings are done: what follows is provisional."
        yield ""
    points = static_points(found)
    for budget, mode in CALIBRATED.items():
        gated = mean(found[f"budget{budget}"], mode)
        if gated and (line := error_at(points, gated[0])) is not None:
            yield (f"- budget {budget}: {gated[1]:.2f} against {line:.2f} of static nets: {verdict(gated[1] - line)}; "
                   f"gates that vary: {varying(folder, f'budget{budget}')}")
    ours, theirs = mean(found["budget0.6"], CALIBRATED[0.6]), mean(found["majority-free"], "argmax")
    if ours and theirs:
        yield (f"- budget 0.6: {ours[1]:.2f} at {ours[0]:.2f} MMACs against {theirs[1]:.2f} at {theirs[0]:.2f} of "
               f"majority-free: {verdict(ours[1] - theirs[1])}")
    curve = list(filter(None, (mean(found["floor"], mode) for mode in CALIBRATED.values())))
    for arm, mode in (("majority", "argmax"), ("random", "sample")):
        fixed = mean(found[arm], mode)
        if fixed and (ours := error_at(curve, fixed[0])) is not None:
            yield f"- floor: {ours:.2f} against {fixed[1]:.2f} of {arm} at {fixed[0]:.2f} MMACs: " \
                  f"{verdict(ours - fixed[1])}; gates that vary: {varying(folder, 'floor')}"


def main(argv: Sequence[str] | None = None) -> None:
    protocol = [
        [(f"pays-{name}-s{seed}", f"{flags} --seed {seed}") for name, flags in stage.items()]
        for seed in SEEDS for stage in stages(seed)
    ]
    follow_or_print(argv, __doc__, protocol, tests, table, prepare)


if __name__ == "__main__":
    run_command(main, "pays")
