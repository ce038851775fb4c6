"""Does ConvNet-AIG beat its ResNet? The trainings behind results/README.md, each of which can be rerun by one line.

    python -m benchmarks.reproduction --data DIR            # all that is not done yet; DIR holds train/ and test/
    python -m benchmarks.reproduction --data DIR --list     # the commands
    python -m benchmarks.reproduction --data DIR --only small-plain-s1 --results again    # a row once more

The last epoch of each is tested in every gate mode, see `benchmarks.runner`. This file is the protocol: it was
committed before the first training that counts.

The small protocol. AIG ResNet-20 at target rates 0.7 and 0.5, the plain ResNet-20, and the plain one with stochastic
depth at a drop rate of 1 - 0.7, meant to tell adaptivity from mere regularisation: 10,000 training images, always the
same ones, 12 epochs, five seeds, every other flag the same. (The learning rate 0.03 was chosen before, against 0.1,
on the first epochs of a *plain* net with seed 0: 38.5 % right after the second, against 32.2 %.) The measure is the
error of the *last* epoch on the whole test set, in gate mode `sample` for AIG as in the authors' code, with `argmax`
beside it. Mean and standard deviation over the seeds; differences with a 95 % interval by Welch's t. It can show
differences above about one percentage point between nets that are far from converged, and nothing about ResNet-110
after 350 epochs.

The options. The same at target rate 0.7 with one option each (a third one, a falling temperature, is in the results;
train.py had it until commit 0014ec0), to be compared with it, and every last epoch once more in
gate mode `argmax` with BatchNorm's statistics estimated anew in that mode.

The full runs. All training images, 10 epochs, one seed: plain, AIG, and AIG choosing its best epoch on 5,000 held-out
training images, to see how much choosing on the test images flatters. The long runs, added when all of the above but
the options was known: seed 1 of the small protocol, plain and AIG, with three times the epochs, to see whether the
distance between them shrinks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from aig.checkpoint import CHECKPOINT
from aig.console import run_command
from benchmarks.runner import follow, make_parser
from convnet_aig import GATE_MODES

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
FULL_RUNS = {"aig-t0.7": "--target 0.7", "plain": "--target 1", "aig-t0.7-val5000": "--target 0.7 --val-size 5000"}
LONG_RUNS = {"aig-t0.7": "--target 0.7", "plain": "--target 1"}


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
    for arm, flags in LONG_RUNS.items():
        yield f"long-{arm}", f"{LONG} {flags} --seed 1"


def tests(name: str, flags: str) -> dict[str, list[str]]:
    """The command lines that test the last epoch, by their key in test.json."""
    test = ["train.py", "--test", "--resume", f"runs/{name}/{CHECKPOINT}"]
    if "--target 1" in flags:  # without gates all modes are the same
        return {"argmax": test}
    anew = {"argmax+bn": [*test, "--reestimate-bn"]}
    return {mode: [*test, "--gate-mode", mode] for mode in GATE_MODES} | anew


def main(argv: Sequence[str] | None = None) -> None:
    follow([list(protocol())], tests, make_parser(__doc__.split("\n")[0]).parse_args(argv))


if __name__ == "__main__":
    run_command(main, "reproduction")
