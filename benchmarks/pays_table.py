"""What came of the long trainings: the table of all arms, and the verdicts by the rules that benchmarks.pays gives.

    python -m benchmarks.pays_table
    python -m benchmarks.pays_table --held-out    # the same on the images held out, in mode argmax: decides nothing
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import log
from pathlib import Path
from statistics import fmean

from aig.checkpoint import TEST
from aig.console import Parser, run_command
from aig.runs import read_json, read_records
from benchmarks.pays import BUDGETS, CALIBRATED, MAJORITY, SEEDS, STATIC, TAUGHT, stages
from benchmarks.runner import ROOT, RUNS

MARGIN = 0.5  # points of error
ALIKE = 1.1  # by which factor the costs of an arm's seeds may differ, if a mean is to stand for them
DENSE = "argmax"  # the mode of nets without gates
VARIES = 0.01  # a gate that opens for at least this fraction of the images, and is closed for as many
Tested = dict[int, dict[str, dict]]  # what was tested of an arm, by seed and mode
Point = tuple[float, float]  # multiply-accumulates of an image in millions, and error in percent
Errors = tuple[float, float, float]  # in percent: of a gated net, and the bounds of others at the same cost


def results(folder: Path, arm: str) -> Tested:
    """What was tested of an arm, of the seeds that are done."""
    found = {seed: read_json(folder / f"pays-{arm}-s{seed}" / TEST) for seed in SEEDS}
    return {seed: result for seed, result in found.items() if result}


def held_out(folder: Path, arm: str) -> Tested:
    """The error on the images held out instead, in mode `argmax`, as validation in training gave it (bfloat16).

    Costs and gates are those of the test images.
    """
    found = {}
    for seed, tested in results(folder, arm).items():
        if records := read_records(folder / f"pays-{arm}-s{seed}"):
            found[seed] = {DENSE: tested[DENSE] | {"top1": records[-1]["val"]["top1"]}}
    return found


def point(tested: Tested, seed: int, mode: str) -> Point | None:
    """One training in one mode."""
    result = tested.get(seed, {}).get(mode)
    return result and (result["macs_mean"] / 1e6, 100 - result["top1"])


def points(found: dict[str, Tested], arms: Sequence[str], seeds: Sequence[int]) -> list[list[Point]]:
    """For each seed the nets of these arms, none of which has gates that look at the image."""
    return [[p for arm in arms if (p := point(found[arm], seed, DENSE))] for seed in seeds]


def static_points(found: dict[str, Tested], seeds: Sequence[int]) -> list[list[Point]]:
    """For each seed the static nets: of both kinds, without and with teacher, that with the lower mean error."""
    chosen = []
    for arm in STATIC:
        kinds = [kind for kind in (arm, arm + TAUGHT) if all(point(found[kind], seed, DENSE) for seed in seeds)]
        errors = {kind: fmean(point(found[kind], seed, DENSE)[1] for seed in seeds) for kind in kinds}
        chosen += [min(errors, key=errors.get)] if errors else []
    return points(found, chosen, seeds)


def line(left: Point, right: Point, macs: float) -> float:
    """The error at a cost on the line through two points, which is straight over the logarithm of the cost."""
    return left[1] + (right[1] - left[1]) * log(macs / left[0]) / log(right[0] / left[0])


def between(nets: Iterable[Point], macs: float) -> float | None:
    """The error at a cost, on the line through the nets on either side of it; None outside of their range."""
    neighbours = (pair for pair in pairwise(sorted(nets)) if pair[0][0] <= macs <= pair[1][0])
    return next((line(*pair, macs) for pair in neighbours), None)


def hull(nets: Iterable[Point]) -> list[Point]:
    """The nets on the lower convex hull, over the logarithm of the cost, as far as it falls."""
    kept: list[Point] = []
    for net in sorted(nets):
        if kept and net[1] >= kept[-1][1]:
            continue
        while len(kept) > 1 and line(kept[-2], net, kept[-1][0]) <= kept[-1][1]:
            kept.pop()
        kept.append(net)
    return kept


def bounds(nets: Sequence[Point], macs: float) -> tuple[float, float] | None:
    """The lower and the upper bound, at a cost, of a falling convex curve through the hull of these nets.

    Returns:
        The lower bound, the highest of the hull's least error and its other edges, extended; and the upper bound, on
        the hull. None outside of the nets' range.
    """
    best = hull(nets)
    if not best or not best[0][0] <= macs <= max(nets)[0]:
        return None
    lower, upper = best[-1][1], best[-1][1]
    for left, right in pairwise(best):
        if left[0] <= macs < right[0]:
            upper = line(left, right, macs)
        else:
            lower = max(lower, line(left, right, macs))
    return (upper if macs in dict(best) else lower), upper


def verdict(ours: float, lower: float, upper: float) -> str:
    return "pays" if ours < lower - MARGIN else "loses" if ours > upper + MARGIN else "undecided"


def alike(costs: Sequence[float]) -> bool:
    """Whether the seeds of an arm cost about the same. Those of `majority-floor` run five and four blocks."""
    return max(costs) <= ALIKE * min(costs)


def varying(found: Tested, mode: str) -> str:
    """How many gates vary, by seed."""
    gates = [result[mode]["gates"] for result in found.values() if mode in result]
    return " / ".join(f"{sum(VARIES <= rate <= 1 - VARIES for rate in each)} of {len(each)}" for each in gates)


@dataclass
class Comparison:
    """A gated net against others."""

    arm: str
    at: str  # what the table says of its computation
    mode: str
    others: str
    needed: Sequence[str]  # the arms of the others
    their_mode: str
    errors: Callable[[Sequence[int]], Iterator[Errors | None]]  # for each seed

    def row(self, found: dict[str, Tested]) -> str:
        """A line of the table: the seeds for which the same nets are done, and a verdict once all are."""
        modes = {self.arm: self.mode, **dict.fromkeys(self.needed, self.their_mode)}
        missing = sum(seed not in found[arm] for arm in modes for seed in SEEDS)
        done = {seed: [arm for arm in modes if point(found[arm], seed, modes[arm])] for seed in SEEDS}
        most = max((arms for arms in done.values() if self.arm in arms), key=len, default=None)
        seeds = [seed for seed in SEEDS if done[seed] == most]
        each = {seed: errors for seed, errors in zip(seeds, self.errors(seeds), strict=True) if errors} if seeds else {}
        complete = all(len(arms) == len(modes) for arms in done.values())
        outside = [f"seed {seed}" for seed in SEEDS if seed not in each] if each else []  # else both
        where = " ".join([*outside, "outside of their range"]) if complete else "not tested at this cost"
        word = f"not yet: {missing} training{'s' * (missing > 1)} to come" if missing else f"none: {where}"
        gates = varying({seed: found[self.arm][seed] for seed in each or found[self.arm]}, self.mode)
        cells = [self.arm, self.at, gates, self.others]
        if not each:
            return f"| {' | '.join([*cells, '', '', '', word])} |"
        ours, lower, upper = map(fmean, zip(*each.values(), strict=True))
        by_seed = ", ".join(f"seed {seed}: {own - theirs:+.2f}" for seed, (own, _, theirs) in each.items())
        span = " to ".join(dict.fromkeys((f"{lower:.2f}", f"{upper:.2f}")))
        if complete and len(each) == len(SEEDS):
            word = verdict(ours, lower, upper)
        return f"| {' | '.join([*cells, f'{ours:.2f}', span, f'{ours - upper:+.2f} ({by_seed})', word])} |"


def comparisons(found: dict[str, Tested], modes: Mapping[float, str]) -> Iterator[Comparison]:
    """All that the protocol asks for, with the mode of gated nets for each budget."""

    def at_budget(rivals: Callable, arm: str, mode: str, seeds: Sequence[int]) -> Iterator[Errors | None]:
        """A gated net and others at its cost."""
        for seed, nets in zip(seeds, rivals(seeds), strict=True):
            ours = point(found[arm], seed, mode)
            theirs = ours and bounds(nets, ours[0])
            yield theirs and (ours[1], *theirs)

    def at_cost_of(arm: str, mode: str, seeds: Sequence[int]) -> Iterator[Errors | None]:
        """`floor` at the cost of another net."""
        for seed in seeds:
            curve = [net for key in CALIBRATED.values() if (net := point(found["floor"], seed, key))]
            theirs = point(found[arm], seed, mode)
            ours = theirs and between(curve, theirs[0])
            yield ours and (ours, theirs[1], theirs[1])

    static = [arm + kind for arm in STATIC for kind in ("", TAUGHT)]
    same = [*MAJORITY.values(), "majority-floor"]
    own = [(f"budget{budget}", modes[budget]) for budget in BUDGETS]
    every = dict.fromkeys((arm, modes[budget]) for arm in ("floor", "rates", "scratch") for budget in BUDGETS)
    rivals = [
        ("static nets", static, [*own, *every], partial(static_points, found)),
        ("always the same blocks", same, [*own, ("floor", modes[0.6])], partial(points, found, same)),
    ]
    for name, needed, gated, nets in rivals:
        for arm, mode in gated:
            at = mode.removeprefix("argmax@budget=")
            yield Comparison(arm, at, mode, name, needed, DENSE, partial(at_budget, nets, arm, mode))
    for arm, mode in (("majority-floor", DENSE), ("random", "sample")):
        yield Comparison("floor", "its cost", CALIBRATED[0.6], f"`{arm}`", [arm], mode, partial(at_cost_of, arm, mode))


def by_seed(values: Sequence[float]) -> str:
    return " / ".join(f"{value:.2f}" for value in values)


def table(folder: Path, read: Callable = results, modes: Mapping[float, str] = CALIBRATED) -> Iterator[str]:
    """The lines of the table of all arms, and of that of the verdicts, as far as there are results."""
    arms = list(dict.fromkeys(name for stage in stages(1) for name in stage))
    found = {arm: read(folder, arm) for arm in arms}
    yield "| arm | seeds | mode | MMACs of an image | error, % (by seed) |"
    yield "|---|---|---|---|---|"
    for arm, tested in found.items():
        for mode in dict.fromkeys(mode for result in tested.values() for mode in result):
            seeds = [seed for seed in tested if mode in tested[seed]]
            each = [point(tested, seed, mode) for seed in seeds]
            macs, errors = zip(*each, strict=True)
            cost = f"{fmean(macs):.2f}" + ("" if alike(macs) else f" ({by_seed(macs)})")
            error = f"{fmean(errors):.2f} ({by_seed(errors)})"
            yield f"| {arm} | {', '.join(map(str, seeds))} | `{mode}` | {cost} | {error} |"
    yield ""
    yield "| gated net | at | gates that vary | against | its error, % | theirs | difference, points | verdict |"
    yield "|---|---|---|---|---|---|---|---|"
    yield from (comparison.row(found) for comparison in comparisons(found, modes))


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "results", metavar="DIR", help="holds runs/")
    held = "on the images held out, in mode argmax; the protocol's verdicts are those on the test images"
    parser.add_argument("--held-out", action="store_true", help=held)
    args = parser.parse_args(argv)
    other = (held_out, dict.fromkeys(BUDGETS, DENSE)) if args.held_out else ()
    print("\n".join(table(args.results / RUNS, *other)))


if __name__ == "__main__":
    run_command(main, "pays_table")
