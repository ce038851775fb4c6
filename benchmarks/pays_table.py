"""What came of the long trainings: the table of all arms, and the verdicts by the rules that benchmarks.pays gives.

    python -m benchmarks.pays_table
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import log
from pathlib import Path

from aig.checkpoint import TEST
from aig.console import Parser, run_command
from aig.runs import read_json
from benchmarks.pays import BUDGETS, CALIBRATED, MAJORITY, SEEDS, STATIC, TAUGHT, stages
from benchmarks.runner import ROOT, RUNS

MARGIN = 0.5  # points of error
DENSE = "argmax"  # the mode of nets without gates
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


def static_points(found: dict[str, Tested], seeds: Sequence[int]) -> list[Point]:
    """Each static net, the better of without and with teacher."""
    kinds = [[mean(found.get(kind, {}), DENSE, seeds) for kind in (arm, arm + TAUGHT)] for arm in STATIC]
    return [min(filter(None, each), key=lambda point: point[1]) for each in kinds if any(each)]


def bounds(points: Sequence[Point], macs: float) -> tuple[float | None, float] | None:
    """Between which errors a convex curve through these points lies at so many multiply-accumulates.

    All lines are straight over the logarithm of the cost.

    Returns:
        The lower bound, on lines through other neighbours, prolonged, or None if there are none; and the upper bound,
        on the line between both neighbours. None outside of the points.
    """
    points = sorted(dict(sorted(points, reverse=True)).items())  # of equal cost, the better
    lower, upper = [], None
    for (left, first), (right, second) in pairwise(points):
        error = first + (second - first) * log(macs / left) / log(right / left)
        if left <= macs <= right:
            upper = error
        else:
            lower.append(error)
    if upper is None:
        return None
    return (upper if macs in dict(points) else max(lower, default=None)), upper


def verdict(ours: float, lower: float, upper: float) -> str:
    return "pays" if ours < lower - MARGIN else "loses" if ours > upper + MARGIN else "undecided"


def varying(found: Tested, mode: str) -> str:
    """How many gates vary, by seed."""
    gates = [result[mode]["gates"] for result in found.values() if mode in result]
    return " / ".join(f"{sum(VARIES <= rate <= 1 - VARIES for rate in each)} of {len(each)}" for each in gates)


@dataclass
class Comparison:
    """A gated net against others."""

    arm: str
    mode: str
    others: str  # what the table calls them
    needed: Sequence[str]  # their arms
    errors: Callable[[Sequence[int]], tuple[float, float | None, float] | None]  # of seeds: ours, their two bounds

    def row(self, found: dict[str, Tested]) -> str:
        """A line of the table; no verdict before all trainings are done and within the range of both seeds."""
        missing = sum(len(SEEDS) - len(found[arm]) for arm in (self.arm, *self.needed))
        seeds = [seed for seed in SEEDS if self.errors([seed])]
        cells = [self.arm, varying(found[self.arm], self.mode), self.others]
        if not seeds or (pair := self.errors(seeds)) is None:
            return self.line(*cells, "", "", "", self.waiting(missing))
        ours, lower, upper = pair
        by_seed = " / ".join(f"{own - other:+.2f}" for own, _, other in map(self.errors, ([seed] for seed in seeds)))
        difference, theirs = f"{ours - upper:+.2f} ({by_seed})", f"{upper:.2f}"
        if lower is not None and f"{lower:.2f}" != theirs:
            theirs = f"{lower:.2f} to {theirs}"
        complete = not missing and len(seeds) == len(SEEDS) and lower is not None
        word = verdict(ours, lower, upper) if complete else self.waiting(missing)
        return self.line(*cells, f"{ours:.2f}", theirs, difference, word)

    @staticmethod
    def waiting(missing: int) -> str:
        return f"not yet: {missing} trainings to come" if missing else "none: outside of their range"

    @staticmethod
    def line(*cells: str) -> str:
        return f"| {' | '.join(cells)} |"


def comparisons(found: dict[str, Tested]) -> Iterator[Comparison]:
    """All that the protocol asks for."""

    def majorities(seeds: Sequence[int]) -> list[Point]:
        return list(filter(None, (mean(found[arm], DENSE, seeds) for arm in MAJORITY.values())))

    def at_budget(budget: float, points: Callable, seeds: Sequence[int]) -> tuple | None:
        ours = mean(found[f"budget{budget}"], CALIBRATED[budget], seeds)
        theirs = ours and bounds(points(seeds), ours[0])
        return theirs and (ours[1], *theirs)

    def at_cost_of(arm: str, mode: str, seeds: Sequence[int]) -> tuple | None:
        curve = list(filter(None, (mean(found["floor"], each, seeds) for each in CALIBRATED.values())))
        theirs = mean(found[arm], mode, seeds)
        ours = theirs and bounds(curve, theirs[0])
        return ours and (ours[1], theirs[1], theirs[1])  # the line, which does not favour it

    static = [arm + kind for arm in STATIC for kind in ("", TAUGHT)]
    for budget in BUDGETS:
        arm, mode = f"budget{budget}", CALIBRATED[budget]
        against = partial(at_budget, budget, partial(static_points, found))
        yield Comparison(arm, mode, "static nets", static, against)
        same = partial(at_budget, budget, majorities)
        yield Comparison(arm, mode, "always the same blocks", list(MAJORITY.values()), same)
    fixed = (("majority-floor", "always its usual blocks", DENSE), ("random", "random blocks", "sample"))
    for arm, name, mode in fixed:
        yield Comparison("floor", CALIBRATED[0.6], name, [arm], partial(at_cost_of, arm, mode))


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
    yield "| gated net | gates that vary | against | its error, % | theirs | difference, points (by seed) | verdict |"
    yield "|---|---|---|---|---|---|---|"
    yield from (comparison.row(found) for comparison in comparisons(found))


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "results", metavar="DIR", help="holds runs/")
    args = parser.parse_args(argv)
    print("\n".join(table(args.results / RUNS)))


if __name__ == "__main__":
    run_command(main, "pays_table")
