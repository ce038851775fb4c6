"""Does gating pay: at the same computation, is a gated network better than a smaller one? Long trainings.

    python -m benchmarks.pays --data DIR           # all that is not done yet; DIR holds train/ and test/
    python -m benchmarks.pays --data DIR --list    # the commands
    python -m benchmarks.pays_table                # what came of them

This file is the protocol, committed before its first training; results/pays.md says what was amended since.

CIFAR-10 as JPEG at quality 75: 45,000 images to train on, 5,000 held out; thresholds are chosen on 2,000 of those. The
last epoch counts. The test images choose nothing but what results/pays.md lists. Every arm but the teacher has 90
epochs in all, two seeds, Nesterov's momentum, the same weight decay and batches. The recipe for gates and the learning
rate of what starts from the teacher are the pilot's (results/pilot.md): a budget without a floor, a teacher, 0.05. The
0.1 of nets from scratch was not tuned. The teacher is a plain ResNet-20 of 60 epochs; what starts from it has 30 more,
and so two cosine schedules where a net from scratch has one of 90 epochs. A smaller net with a teacher has it for 90
epochs, a gated net for 30.

    teacher, control            the dense net, and 30 epochs more of it
    budget 0.75, 0.6, 0.45      gated from the teacher, which also teaches
    rates                       the same with a rate of 0.7 for each gate, as in the paper
    floor                       the same with budget 0.6 and a floor: in the pilot, most gates without one soon did the
                                same for every image
    resnet14, resnet8           smaller static nets, 90 epochs, without and with the same teacher
    control-taught              the dense net, 30 epochs more with its teacher, which did not help in the pilot
    majority 0.75, 0.6, 0.45    those blocks of the teacher that the gated net opens for most held-out images (threshold
                                0.5), for every image, 30 epochs: adaptivity, or merely which blocks?
    majority-floor              the same of `floor`
    random                      each block opens as often as in `floor`, but at random, independently of the others:
                                adaptivity, or merely depth?
    scratch                     AIG as in the paper: from scratch, t = 0.7

**The question**: gated nets, in mode `argmax` at the thresholds for a budget, against static nets of the same cost. The
`budget` nets have their own budget, `floor`, `rates` and `scratch` all three. The static nets are resnet8, resnet14 and
control, each without or with a teacher, whichever has the lower test error (the mean of the seeds), which favours them.
Their error at the gated net's cost follows, seed by seed, from the lower convex hull of their points, over the
logarithm of the multiply-accumulates; between the hull's lowest point and the largest net it stays the same, because
the cheaper net can be taken. If their curve falls and is convex, it lies between two numbers: the upper one is on the
hull; the lower one is the highest of the hull's least error and its other edges, extended. A net *pays* if its test
error, the mean of the seeds, is more than 0.5 points below the lower number, *loses* if more than 0.5 above the upper,
and is *undecided* between; the margin was chosen beforehand. Outside the costs of the other nets there is no verdict.
By the same rule the `budget` nets, and `floor` at 0.6, are compared with nets that always run the same blocks, the four
`majority`. A net that pays, but not against those, is a smaller static net, found by training, and no case for
adaptivity.

**Adaptivity** counts by the same margin: the error of `floor`, on the line between the neighbours among its budgets, at
the cost of `majority-floor` and of `random`. Of the two only `majority-floor` decides: `random` also loses the
dependence between `floor`'s gates. benchmarks.shuffled measures what each image's own graph is worth on the same
weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

import aig
from aig.checkpoint import CHECKPOINT, TEST
from aig.console import InputError, run_command
from aig.networks import gate
from aig.runs import atomic_write, read_records
from benchmarks.runner import ROOT, RUNS, follow, make_parser
from convnet_aig import log_odds

SEEDS = (1, 2)
BUDGETS = (0.75, 0.6, 0.45)
LEVELS = (0.75, 0.6, 0.55, 0.5, 0.45)  # the budgets at which nets without one of their own are tested, and `floor`
SHARED = "--batch-size 128 --val-size 5000 --lr-schedule cosine --nesterov --compile --amp bf16"
SCRATCH = f"--lr 0.1 --epochs 90 {SHARED}"
TUNED = f"--depth 20 --lr 0.05 --epochs 30 {SHARED}"
GATES = "--no-gate-decay --lrfact 5"
FIXED = "--target 0.5 --lossfact 0 --lrfact 0"  # gates that stay as they are
STATIC = ("resnet8", "resnet14", "control")
TAUGHT = "-taught"
MAJORITY = {budget: f"majority{budget}" for budget in BUDGETS}
IMITATED = {  # what fixed gates are taken from
    **{arm: f"budget{budget}" for budget, arm in MAJORITY.items()}, "majority-floor": "floor", "random": "floor"
}
CALIBRATED = {budget: f"argmax@budget={budget}" for budget in LEVELS}
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
        for depth in (14, 8) for name, flags in (("", ""), (TAUGHT, taught))
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
    return found | {CALIBRATED[budget]: [*test, "--budget", str(budget)] for budget in own or LEVELS}


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
    runs = [at / RUNS / f"pays-{IMITATED[arm]}-s{seed}" for at in places]
    done = next((run for run in runs if (run / TEST).exists()), None)
    if done is None:
        raise InputError(f"pays-{IMITATED[arm]}-s{seed} has to be trained first: its gates are to be imitated")
    torch.manual_seed(int(seed))  # the gates' first layers are drawn, though they have no effect
    rates = read_records(done)[-1]["val"]["gates"]  # in mode argmax, on the images held out
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


def main(argv: Sequence[str] | None = None) -> None:
    protocol = [
        [(f"pays-{name}-s{seed}", f"{flags} --seed {seed}") for name, flags in stage.items()]
        for seed in SEEDS for stage in stages(seed)
    ]
    follow(protocol, tests, make_parser(__doc__.split("\n")[0]).parse_args(argv), prepare)


if __name__ == "__main__":
    run_command(main, "pays")
