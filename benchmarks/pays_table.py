"""What came of the long trainings: the table of all arms, and the verdicts by the rules that benchmarks.pays gives.

    python -m benchmarks.pays_table
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from math import log
from pathlib import Path

from aig.checkpoint import TEST
from aig.console import Parser, run_command
from aig.runs import read_json
from benchmarks.pays import CALIBRATED, MAJORITY, SEEDS, STATIC, TAUGHT, stages
from benchmarks.runner import ROOT, RUNS

MARGIN = 0.5  # points of error
VARIES = 0.01  # a gate that opens for at least this part of the images, and is closed for as many
Tested = dict[int, dict[str, dict]]  # what was tested of an arm, by seed and mode
Point = tuple[float, float]  # multiply-accumulates of an image in millions, and error in percent


def results(folder: Path, arm: str) -> Tested:
    """What was tested of an arm, of the seeds that are done."""
    found = {seed: read_json(folder / f"pays-{arm}-s{seed}" / TEST) for seed in SEEDS}
    return {seed: result for seed, result in found.items() if result}


def mean(found: Tested, mode: str, seeds: Sequence[int]) -> Point | None:
    """The mean over these seeds; None unless all were tested in this mode."""
    each = [found[seed][mode] for seed in seeds if mode in found.get(seed, {})]
    if not each or len(each) < len(seeds):
        return None
    return tuple(statistics.fmean(values) for values in ([result["macs_mean"] / 1e6 for result in each],
                                                         [100 - result["top1"] for result in each]))


def static_points(found: dict[str, Tested], seeds: Sequence[int] = ()) -> list[Point]:
    """Each static net, the better of without and with teacher: the mean over these seeds, else over those there are."""
    points = []
    for arm in STATIC:
        tested = [found.get(kind, {}) for kind in (arm, arm + TAUGHT)]
        both = list(filter(None, (mean(each, "argmax", seeds or list(each)) for each in tested)))
        points += [min(both, key=lambda point: point[1])] if both else []
    return points


def on_line(first: Point, second: Point, macs: float) -> float:
    """The error at so many multiply-accumulates on a line that is straight over log(macs)."""
    return first[1] + (second[1] - first[1]) * log(macs / first[0]) / log(second[0] / first[0])


def error_at(points: Sequence[Point], macs: float) -> float | None:
    """The error at so many multiply-accumulates between neighbouring points; None outside."""
    between = [pair for pair in pairwise(sorted(points)) if pair[0][0] <= macs <= pair[1][0]]
    return on_line(*between[0], macs) if between else None


def least_at(points: Sequence[Point], macs: float) -> float | None:
    """The least that the error of a convex curve can be there: lines through other neighbours, prolonged."""
    inside, pairs = error_at(points, macs), list(pairwise(sorted(points)))
    beside = [on_line(*pair, macs) for pair in pairs if not pair[0][0] <= macs <= pair[1][0]]
    return None if inside is None else max(beside, default=None)


def verdict(distance: float) -> str:
    return "pays" if distance < -MARGIN else "loses" if distance > MARGIN else "undecided"


def varying(found: Tested, mode: str) -> str:
    """How many gates vary, by seed."""
    gates = [result[mode]["gates"] for result in found.values() if mode in result]
    return " / ".join(f"{sum(VARIES <= rate <= 1 - VARIES for rate in each)} of {len(each)}" for each in gates)


def comparisons(found: dict[str, Tested]) -> Iterator[tuple[str, str, str, Sequence[str], Callable]]:
    """Gated arm, its mode, what it is compared with, the arms this takes, and seeds -> (error, that of the other)."""
    kinds = [kind for arm in STATIC for kind in (arm, arm + TAUGHT)]

    def majorities(seeds: Sequence[int]) -> list[Point]:
        return list(filter(None, (mean(found[arm], "argmax", seeds) for arm in MAJORITY.values())))

    def against(arm: str, mode: str, line: Callable, points: Callable) -> Callable:
        return lambda seeds: (ours := mean(found[arm], mode, seeds)) and (ours[1], line(points(seeds), ours[0]))

    for budget, mode in CALIBRATED.items():
        for name, arms, line, points in (
            ("static nets, line", kinds, error_at, lambda seeds: static_points(found, seeds)),
            ("static nets, lower bound", kinds, least_at, lambda seeds: static_points(found, seeds)),
            ("always the same blocks", list(MAJORITY.values()), error_at, majorities),
        ):
            yield f"budget{budget}", mode, name, arms, against(f"budget{budget}", mode, line, points)

    def floor_at(arm: str, mode: str, seeds: Sequence[int]) -> tuple | None:
        curve = list(filter(None, (mean(found["floor"], each, seeds) for each in CALIBRATED.values())))
        return (other := mean(found[arm], mode, seeds)) and (error_at(curve, other[0]), other[1])

    for arm, mode in (("majority", "argmax"), ("random", "sample")):
        yield "floor", CALIBRATED[0.6], arm, [arm], partial(floor_at, arm, mode)


def table(folder: Path) -> Iterator[str]:
    """The lines of the table of all arms, and of that of the verdicts, as far as there are results."""
    arms = list(dict.fromkeys(name for stage in stages(1) for name in stage))
    found = {arm: results(folder, arm) for arm in arms}
    yield "| arm | seeds | mode | MMACs of an image | error, % (by seed) |"
    yield "|---|---|---|---|---|"
    for arm, tested in found.items():
        for mode in dict.fromkeys(mode for result in tested.values() for mode in result):
            seeds = [seed for seed in tested if mode in tested[seed]]
            macs, error = mean(tested, mode, seeds)
            each = " / ".join(f"{100 - tested[seed][mode]['top1']:.2f}" for seed in seeds)
            yield f"| {arm} | {', '.join(map(str, seeds))} | `{mode}` | {macs:.2f} | {error:.2f} ({each}) |"
    yield ""
    yield "| gated net | gates that vary | compared with | errors, % | difference, points (by seed) | verdict |"
    yield "|---|---|---|---|---|---|"
    for arm, mode, name, needed, compare in comparisons(found):
        missing = sum(len(SEEDS) - len(found[other]) for other in (arm, *needed))
        seeds = [seed for seed in SEEDS if (pair := compare([seed])) and None not in pair]
        errors = difference = ""
        word = f"not yet: {missing} trainings to come" if missing else "outside of their range"
        if seeds and (pair := compare(seeds)) and None not in pair:
            distance, each = pair[0] - pair[1], (compare([seed]) for seed in seeds)
            errors, by_seed = f"{pair[0]:.2f} against {pair[1]:.2f}", [f"{ours - theirs:+.2f}" for ours, theirs in each]
            difference = f"{distance:+.2f} ({' / '.join(by_seed)})"
            word = word if missing else verdict(distance)
        yield f"| {arm} | {varying(found[arm], mode)} | {name} | {errors} | {difference} | {word} |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "results", metavar="DIR", help="holds runs/")
    args = parser.parse_args(argv)
    print("\n".join(table(args.results / RUNS)))


if __name__ == "__main__":
    run_command(main, "pays_table")
