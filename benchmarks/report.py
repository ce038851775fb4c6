"""Writes results/README.md from the files that the runs left in results/runs/.

    python -m benchmarks.report            # writes it
    python -m benchmarks.report --check    # status 2 if it is not what would be written

The trainings are those of `benchmarks.reproduction`; other folders with an args.json get a table of their own. What no
numbers can tell stands in a run's handwritten notes.md. Whatever is missing is said to be missing.

Errors are in percent of the images. Differences of means have a 95 % interval by Welch's t (B. L. Welch, Biometrika
1947), those of pairs one by the paired t.
"""

from __future__ import annotations

import csv
import inspect
import math
import re
import statistics
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from scipy import stats

from aig.console import InputError, Parser, run_command
from aig.runs import ARGS, METRICS, TEST, atomic_write, read_json, read_records
from benchmarks import reproduction
from benchmarks.reproduction import ARMS, BEST_TEST, DROPPED, FULL_RUNS, LONG_RUNS, OPTIONS, RUNS, SEEDS
from convnet_aig import GATE_MODES

PLAIN, AIG, AIG_LOW, CONTROL = ARMS
TRIED = OPTIONS | DROPPED  # all options there are runs of
Runs = dict[str, "Run"]  # by name
NONE = "–"
UNKNOWN = "not known yet"  # a verdict
MODES = ("sample", "argmax")  # that verdicts are on: the first is the authors'
REESTIMATED = "argmax+bn"  # the key in test.json of --reestimate-bn
FOLDERS = re.compile(r"""(?<=[\s='"])/(?:[^\s/]+/)*(?=[^\s/])""")  # in a command line: those of the machine
CURVE = Path("model", "analysis", "curve.csv")
THRESHOLD = 0.5  # of gate mode argmax, in the protocol and before there was a flag for it
CHANGES = ("lower", "higher")  # verdicts on options
MEASURES = {  # of a test: column, unit, digits
    "error": ("error, %", 1, 2),
    "execution_rate": ("execution rate", 1, 3),
    "macs_fraction": ("MAC fraction", 1, 3),
    "macs_mean": ("MMACs", 1e6, 2),
    "macs_paper": ("MMACs, paper's way", 1e6, 2),
}
COSTS = ("execution_rate", "macs_fraction", "macs_mean", "macs_paper")
COLUMNS = " | ".join(column for column, *_ in MEASURES.values())
INTRODUCTION = """# Results

Written by `python -m benchmarks.report` from the run folders in [runs](runs); what is not in their records is in a
folder's `notes.md`. The data of the protocol are a copy of CIFAR-10 in JPEG at quality 75, in class folders: these
accuracies are not CIFAR-10 accuracies. Speed, memory and the logs: [speed.md](speed.md)."""
PAPER = """The paper's own numbers are of ResNet-110 after 350 epochs on real CIFAR-10, hence not comparable with ours:

| the paper's net | error, % | layers executed |
|---|---|---|
| ResNet-110 | 6.61 | all |
| with stochastic depth | 5.25 | all |
| AIG-110, t = 0.7 | 5.76 | 82 % |
| AIG-110*, layers scaled by their execution likelihood, trained longer | 5.14 | all |"""


# ---------------------------------------------------------------------------------------------- what the runs left


@dataclass(frozen=True)
class Run:
    """What a folder holds of a training.

    Attributes:
        gated: False without gates, where all gate modes are the same.
        state: what is missing; "" if nothing is.
        errors: of the validation images by epoch; without --val-size they are the test images.
        executed: share of the branches that ran in training, mean over the epochs.
        tests, best_tests: by gate mode, of the tested checkpoint and of model_best.pth.tar; see `read_tests`.
    """

    name: str
    gated: bool
    state: str = "not run yet"
    args: dict[str, Any] = field(default_factory=dict)
    errors: dict[int, float] = field(default_factory=dict)
    seconds: float = 0
    executed: float = math.nan
    tests: dict[str, dict] = field(default_factory=dict)
    best_tests: dict[str, dict] = field(default_factory=dict)
    notes: str = ""

    def results(self, mode: str) -> dict[str, float]:
        """Of the test in this mode; empty if there is none."""
        return self.tests.get(mode if self.gated else "argmax", {})

    def test(self, mode: str, key: str = "error") -> float:
        """One of them, NaN if there is none."""
        return self.results(mode).get(key, math.nan)

    def flattery(self) -> float:
        """Error of the best epoch minus that of the last, both on the validation images."""
        return min(self.errors.values()) - self.errors[max(self.errors)]


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turns what malformed contents raise into an InputError that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged: move it away") from error


def read_tests(path: Path) -> dict[str, dict]:
    """By gate mode: the epoch and the threshold, and `MEASURES`, NaN where they were not counted."""
    with naming(path):
        return {
            mode: {"error": 100 - result["top1"], "epoch": int(result["epoch"])}
            | {"threshold": result.get("threshold", THRESHOLD)}
            | {key: float(result.get(key, math.nan)) for key in COSTS}
            for mode, result in read_json(path).items()
            if "@budget" not in mode
        }


def read_run(folder: Path, flags: str = "", modes: Sequence[str] = GATE_MODES) -> Run:
    """Reads a run folder; one without args.json is a run that has not begun.

    Args:
        flags: that its commands must contain if it belongs to the protocol.
        modes: in which its last epoch must then have been tested; a net without gates has one.

    Raises:
        InputError: if a file is damaged, naming it.
    """
    args, gated = read_json(folder / ARGS), len(modes) > 1
    if not args:
        return Run(folder.name, gated)
    with naming(folder / METRICS):
        records = read_records(folder)
        errors = {record["epoch"]: 100 - record["val"]["top1"] for record in records}
        seconds = sum(record["seconds"] for record in records)
        rates = [record["train"]["execution_rate"] for record in records]
    tests, best_tests = read_tests(folder / TEST), read_tests(folder / BEST_TEST)
    with naming(folder / ARGS):
        commands = [FOLDERS.sub("", line) for line in args.get("commands") or [args["command"]]]
        args = {**args, "commands": commands, "parameters": int(args["parameters"])}
        state = shortcoming(args, errors, tests, flags, modes)
    notes = folder / "notes.md"
    text = notes.read_text().strip() if notes.exists() else ""
    executed = statistics.mean(rates) if rates else math.nan
    return Run(folder.name, gated, state, args, errors, seconds, executed, tests, best_tests, text)


def shortcoming(args: dict, errors: dict, tests: dict, flags: str, modes: Sequence[str]) -> str:
    """What a run that has begun lacks; "" if nothing."""
    if flags and not all(f" {flags} " in f"{command} " for command in args["commands"]):
        return "left out: trained with other flags than the protocol's"
    if len(errors) < args["epochs"]:
        return f"incomplete: {len(errors)} of {args['epochs']} epochs"
    if flags and (untested := [mode for mode in modes if mode not in tests]):
        return f"incomplete: not tested in {', '.join(untested)}"
    if flags and (wrong := {tests[mode]["epoch"] for mode in modes} - {args["epochs"]}):
        return f"left out: tested at epoch {min(wrong)} instead of the last"
    if flags and (wrong := {tests[mode]["threshold"] for mode in modes} - {THRESHOLD}):
        return f"left out: tested at threshold {min(wrong)} instead of {THRESHOLD}"
    return ""


def read_protocol(results: Path) -> Runs:
    """All runs of the protocol, also those that have not begun."""
    runs = {}
    for name, flags in reproduction.protocol(dropped=True):
        modes = [mode for mode in reproduction.tests(name, flags) if mode in GATE_MODES]  # the rest is a bonus
        runs[name] = read_run(results / RUNS / name, flags, modes)
    return runs


# ---------------------------------------------------------------------------------------------- statistics


class Difference(NamedTuple):
    """Of two means, with its 95 % interval; NaN where there is none."""

    mean: float
    low: float
    high: float


def difference(a: Sequence[float], b: Sequence[float], paired: bool = False) -> Difference:
    """mean(a) - mean(b), with an interval if both have two values."""
    mean = low = high = math.nan
    if a and b:
        mean = statistics.mean(a) - statistics.mean(b)
    if min(len(a), len(b)) > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # equal values: an interval of NaN
            test = stats.ttest_rel(a, b) if paired else stats.ttest_ind(a, b, equal_var=False)
            low, high = map(float, test.confidence_interval(0.95))
    return Difference(mean, low, high)


def verdict(found: Difference, better: str = "beat", worse: str = "missed") -> str:
    """What a difference of errors, ours minus the other's, shows."""
    if math.isnan(found.low):
        return UNKNOWN
    if found.high < 0:
        return better
    return worse if found.low > 0 else "no difference shown"


def whole(runs: Runs, arm: str) -> dict[int, Run]:
    """The complete runs of an arm of the small protocol, by seed."""
    return {seed: run for seed in SEEDS if not (run := runs[f"small-{arm}-s{seed}"]).state}


def tests_of(runs: Runs, arm: str, mode: str) -> list[dict[str, float]]:
    """The tests in this mode of the complete runs of an arm."""
    return [found for run in whole(runs, arm).values() if (found := run.results(mode))]


def column(tests: Sequence[dict[str, float]], key: str = "error") -> list[float]:
    """A result of these tests, of all that counted it."""
    return [test[key] for test in tests if not math.isnan(test[key])]


def compare(runs: Runs, arm: str, other: str, mode: str) -> Difference:
    """The error of an arm minus that of another."""
    return difference(column(tests_of(runs, arm, mode)), column(tests_of(runs, other, mode)))


# ---------------------------------------------------------------------------------------------- Markdown


def show(value: float, digits: int = 2) -> str:
    return NONE if math.isnan(value) else f"{value:.{digits}f}"


def show_mean(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard deviation of the sample."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return show(statistics.mean(values), digits) + spread if values else NONE


def show_difference(found: Difference) -> str:
    if math.isnan(found.mean):
        return NONE
    interval = "no interval" if math.isnan(found.low) else f"{found.low:+.2f} to {found.high:+.2f}"
    return f"{found.mean:+.2f} ({interval})"


def show_seeds(runs: Runs, arm: str) -> str:
    missing = [str(seed) for seed in SEEDS if seed not in whole(runs, arm)]
    return f"{len(SEEDS) - len(missing)} of {len(SEEDS)}" + (f", missing: {', '.join(missing)}" if missing else "")


def show_tests(tests: Sequence[dict[str, float]]) -> list[str]:
    """One cell for each of `COLUMNS`, mean and deviation of several tests."""
    return [show_mean([value / unit for value in column(tests, key)], digits)
            for key, (_, unit, digits) in MEASURES.items()]


def show_changes(ours: Sequence[dict], others: Sequence[dict], paired: bool = False) -> list[str]:
    """How the errors and the computation of some tests differ from those of others, one cell each, in points."""
    cells = []
    for key, point in (("error", 1), ("macs_fraction", 0.01)):
        found = difference(*([value / point for value in column(tests, key)] for tests in (ours, others)), paired)
        cells.append(f"{show_difference(found)}: {verdict(found, *CHANGES)}")
    return cells


def show_epoch(run: Run, best: bool) -> str:
    """The error of the validation images in the best or the last epoch, and which one that is."""
    if not run.errors:
        return NONE
    epoch = min(run.errors, key=run.errors.get) if best else max(run.errors)
    return f"{run.errors[epoch]:.2f} ({epoch}{', held out' if run.args.get('val_size') else ''})"


def show_commit(run: Run) -> str:
    commit, *dirty = (run.args.get("git_commit") or NONE).split("-")
    return "-".join([commit[:7], *dirty])


def table(header: str, rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; the columns of `header` are separated by bars."""
    rule = "|".join("---" for _ in header.split("|"))
    return "\n".join([f"| {header} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows)])


# ---------------------------------------------------------------------------------------------- sections


def verdict_section(runs: Runs) -> str:
    pairs = [(arm, PLAIN, mode) for arm in (AIG, AIG_LOW) for mode in MODES]
    pairs += [(CONTROL, PLAIN, NONE), *((AIG, CONTROL, mode) for mode in (*MODES, "expected"))]
    rows = [(*pair, show_difference(found := compare(runs, *pair)), verdict(found)) for pair in pairs]
    lacking = [f"`{arm}` {show_seeds(runs, arm)}" for arm in ARMS if len(whole(runs, arm)) < len(SEEDS)]
    provisional = f"**Provisional**, seeds so far: {'; '.join(lacking)}.\n\n" if lacking else ""
    control, dense = (compare(runs, AIG, CONTROL, mode) for mode in ("sample", "expected"))
    return f"""## Verdict

{provisional}Does AIG (`{AIG}`) match, beat or miss the plain net (`{PLAIN}`)?

{headline(runs, "sample", "as the authors' code evaluates")}
{headline(runs, "argmax", "without noise")}
- All training images (one seed, so no interval), {single(runs, "full")}.
- The small protocol with three times the epochs (one seed), {single(runs, "long")}.

{table("arm | against | gate mode | difference of errors, points (95 % interval) | verdict", rows)}

Mean error of the last epoch; points are percentage points. "beat": the interval lies wholly below 0; "missed": wholly
above. The first row is the protocol's question; the intervals of the others are not corrected for their number.

Against stochastic depth, in mode `sample`: {show_difference(control)} points, {verdict(control)}.
{show_shares(runs)}
Stochastic depth drops branches in training only, and runs all of them in the test. So does AIG in mode `expected`:
{show_difference(dense)} points, {verdict(dense)}."""


def show_shares(runs: Runs) -> str:
    """The shares of the branches that stochastic depth and AIG ran in training."""
    kept = 1 - float(ARMS[CONTROL].split()[-1])
    ours = [run.executed for run in whole(runs, AIG).values()]
    executed = f"{min(ours):.3f} to {max(ours):.3f} (mean over the epochs, {len(ours)} seeds)" if ours else UNKNOWN
    return f"""In training stochastic depth keeps {kept:.2f} of the branches (1 - its drop rate);
AIG executed {executed}."""


def headline(runs: Runs, mode: str, words: str) -> str:
    found, tests = compare(runs, AIG, PLAIN, mode), [tests_of(runs, arm, mode) for arm in (AIG, PLAIN)]
    costs = [column(those, "macs_mean") for those in tests]
    if math.isnan(found.mean):
        return f"- Gate mode `{mode}`, {words}: **{UNKNOWN}**."
    share = 100 * statistics.mean(costs[0]) / statistics.mean(costs[1]) if all(costs) else math.nan
    ours, plain = (show_mean(column(those)) for those in tests)
    return (f"- Gate mode `{mode}`, {words}, at {show(share, 1)} % of the plain net's multiply-accumulates: "
            f"**{verdict(found)}**. Error {ours} % against {plain} %: {show_difference(found)} points.")


def single(runs: Runs, kind: str) -> str:
    """What the one AIG of this kind shows beside the one plain net."""
    ours, plain = (runs[f"{kind}-{arm}"] for arm in (AIG, PLAIN))
    if ours.state or plain.state:
        return f"error {UNKNOWN}"
    errors = " and ".join(f"{ours.test(mode):.2f} % in mode `{mode}`" for mode in MODES)
    return f"{max(plain.errors)} epochs: error {errors} against {plain.test('argmax'):.2f} %"


def protocol_section(runs: Runs) -> str:
    begun = [run for run in runs.values() if run.args]
    recorded = {
        "Hardware": [run.args.get("hardware", NONE) for run in begun],
        "versions": [" ".join(version) for run in begun for version in run.args.get("versions", {}).items()],
        "commit": map(show_commit, begun),
        "data folder": [Path(run.args.get("data") or NONE).name for run in begun],
    }
    facts = "; ".join(f"{what}: {', '.join(dict.fromkeys(values))}" for what, values in recorded.items())
    words = "\n\n".join(inspect.cleandoc(reproduction.__doc__).split("\n\n")[3:])
    return f"""## How it was measured

{f"{facts}." if begun else "No training of the protocol has begun yet."}

    python -m benchmarks.reproduction --data DIR                                  # all that is not done yet
    python -m benchmarks.reproduction --data DIR --results again --only NAME      # a row of "Every run" once more
    python -m benchmarks.report                                                   # this file

DIR holds `train/` and `test/`, with a folder per class in each.

The five `small-option-temperature` rows are records: train.py no longer has `--temperature-end`. "Every run" names the
commit of each. To run one again, check out commit 0014ec0, whose train.py still has the flag; the second
line above works there.

In the words of `benchmarks/reproduction.py`:

{words}"""


def arms_section(runs: Runs) -> str:
    rows, choices = [], []
    for arm in ARMS:
        for mode in GATE_MODES if runs[f"small-{arm}-s{SEEDS[0]}"].gated else (NONE,):
            against = show_difference(compare(runs, arm, PLAIN, mode)) if arm != PLAIN else NONE
            rows.append((arm, mode, show_seeds(runs, arm), *show_tests(tests_of(runs, arm, mode)), against))
        there = list(whole(runs, arm).values())
        parameters = ", ".join(dict.fromkeys(f"{run.args['parameters']:,}" for run in there)) or NONE
        best, gain = [min(run.errors.values()) for run in there], [run.flattery() for run in there]
        seconds = show(statistics.median(run.seconds for run in there), 0) if there else NONE
        choices.append((arm, parameters, show_mean(best), show_mean(gain), seconds))
    return f"""## The arms of the small protocol

Last epoch, mean ± standard deviation over the seeds. Nets without gates have one row: the mode does not matter to them.

{table(f"arm | gate mode | seeds | {COLUMNS} | error minus {PLAIN}'s, points (95 % interval)", rows)}

MAC fraction: multiply-accumulates over those of the same net with every branch and no gate. MMACs: the true count, in
millions, mean over the images; the paper's way: the dense net's count times the execution rate (twice that are the
paper's CIFAR FLOPs).

The best epoch is chosen on the test images, here in mode `argmax`: "best minus last" is how much that flatters.
Seconds: median of a whole training; two at a time, and now and then other work, shared the machine.

{table("arm | parameters | error, best epoch, % | best minus last, points | seconds", choices)}"""


def runs_section(runs: Runs) -> str:
    rows = [
        (run.name, show(run.test("sample")), show(run.test("argmax")), show_epoch(run, best=True),
         show(run.test("sample", "execution_rate"), 3), show(run.test("sample", "macs_fraction"), 3),
         show(run.seconds, 0) if run.args else NONE, show_commit(run), run.state)
        for run in runs.values()
    ]
    notes = [f"\n\n`{run.name}`: {run.notes}" for run in runs.values() if run.notes]
    header = ("run | `sample`, % | `argmax`, % | best, % (epoch) | execution rate | MAC fraction | seconds | commit "
              "| remark")
    return f"""## Every run

All runs of the protocol, in its order: error of the last epoch in two gate modes, the best epoch's on the validation
images (the test images, unless held out; mode `argmax`), costs in mode `sample`. Without gates both modes are the
same. No run with a remark is in the means.

{table(header, rows)}{"".join(notes)}"""


def options_section(runs: Runs) -> str:
    none = {mode: tests_of(runs, AIG, mode) for mode in MODES}
    rows = [("none", mode, show_seeds(runs, AIG), *show_tests(none[mode]), NONE, NONE) for mode in MODES]
    for option in TRIED:
        for mode in MODES:
            tests = tests_of(runs, arm := f"option-{option}", mode)
            rows.append((option, mode, show_seeds(runs, arm), *show_tests(tests), *show_changes(tests, none[mode])))
    flags = "; ".join(f"{option}: `{flags}`" for option, flags in TRIED.items())
    pairs = list(reestimations(runs))
    changes = "change of error, points (95 % interval) | change of computation, points of MAC fraction"
    return f"""## The options

Each against `small-{AIG}`, which has none. {flags}.

{table(f"option | gate mode | seeds | {COLUMNS} | {changes}", rows)}

An option that changes error and computation in opposite directions moves along the curve; whether above or below it,
this does not tell.

The same weights with BatchNorm's statistics re-estimated for the gate mode of the test, paired over the seeds:

{table(f"arm | gate mode | pairs | {COLUMNS} | {changes}", pairs) if pairs
 else f"Not tested yet: no run has `{REESTIMATED}`."}"""


def reestimations(runs: Runs) -> Iterator[tuple[str, ...]]:
    """Two rows for each arm that has been tested with BatchNorm re-estimated, too."""
    for arm in (*ARMS, *(f"option-{option}" for option in TRIED)):
        both = [run for run in whole(runs, arm).values() if REESTIMATED in run.tests]
        before, after = ([run.tests[mode] for run in both] for mode in ("argmax", REESTIMATED))
        if both:
            yield arm, "argmax", str(len(both)), *show_tests(before), NONE, NONE
            yield arm, REESTIMATED, str(len(both)), *show_tests(after), *show_changes(after, before, paired=True)


def full_section(runs: Runs) -> str:
    full = [*(runs[f"full-{arm}"] for arm in FULL_RUNS), *(runs[f"long-{arm}"] for arm in LONG_RUNS)]
    rows = [
        (run.name, f"{which} ({result['epoch']})", mode, *show_tests([result]))
        for run in full
        for which, tests in (("last", run.tests), ("best", run.best_tests))
        for mode, result in tests.items()
    ]
    choices = "\n".join(f"- `{run.name}`: {choice(run)}." for run in full)
    return f"""## The full and the long runs

One seed each, so no interval and no verdict.

{table(f"run | epoch | gate mode | {COLUMNS}", rows) if rows else "None has been tested yet."}

What choosing the best epoch in mode `argmax` does to the error on the test images:

{choices}

{PAPER}"""


def choice(run: Run) -> str:
    """The error on the test images of the best epoch against the last one's."""
    if run.state:
        return run.state
    if not run.args.get("val_size"):
        return f"{run.flattery():+.2f} points against the last epoch, chosen on the test images"
    if "argmax" not in run.best_tests:
        return "chosen on held-out images, but its best epoch has not been tested yet"
    gain = run.best_tests["argmax"]["error"] - run.tests["argmax"]["error"]
    return f"{gain:+.2f} points against the last epoch, chosen on held-out images"


def curve_section(path: Path) -> str:
    """The sweep of operating points; the curve's file has the columns run, mode, threshold and `MEASURES`."""
    title = "## Error over computation"
    if not path.exists():
        return f"{title}\n\nNot measured yet: there is no `{CURVE}`."
    with naming(path), path.open(newline="") as file:
        rows = [
            (row["run"], row["mode"], show(float(row["threshold"] or "nan")),
             *show_tests([{key: float(row[key]) for key in MEASURES}]))
            for row in csv.DictReader(file)
        ]
    return f"""{title}

The same weights at other thresholds and gate modes (`{CURVE}`).

{table(f"run | gate mode | threshold | {COLUMNS}", rows)}"""


def others_section(others: Sequence[Run]) -> str:
    rows, details = [], []
    for run in others:
        depth = run.args.get("depth")
        net = f"{run.args.get('arch') or f'ResNet-{depth}'}, t = {run.args.get('target')}"
        name = (run.name, net, Path(run.args.get("data") or run.args.get("dataset") or NONE).name, show_commit(run))
        last, best = (show_epoch(run, best) for best in (False, True))
        tests = [(f"{mode} ({result['epoch']})", *show_tests([result])) for mode, result in run.tests.items()]
        rows += [(*name, last, best, *test) for test in tests or [("not tested", *[NONE] * len(MEASURES))]]
        lines = "\n".join(f"    python {command}" for command in run.args["commands"])
        details.append("\n\n".join(filter(None, (f"### {run.name}", lines, run.state, run.notes))))
    header = f"run | net | data | commit | last, % (epoch) | best, % (epoch) | tested mode (epoch) | {COLUMNS}"
    parts = [table(header, rows), "Last and best: errors of the validation images in training.", *details]
    return "\n\n".join(["## Other runs", *(parts if others else ["None."])])


def report(results: Path) -> str:
    """The text of README.md.

    Raises:
        InputError: if a file of a run is damaged, naming it.
    """
    runs = read_protocol(results)
    folders = sorted(path.parent for path in (results / RUNS).glob(f"*/{ARGS}"))
    others = [read_run(folder) for folder in folders if folder.name not in runs]
    sections = (verdict_section(runs), protocol_section(runs), arms_section(runs), runs_section(runs),
                options_section(runs), full_section(runs), curve_section(results / CURVE), others_section(others))
    return "\n\n".join([INTRODUCTION, *sections]) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=reproduction.ROOT / "results", metavar="DIR")
    parser.add_argument("--check", action="store_true", help="write nothing; status 2 if README.md differs")
    args = parser.parse_args(argv)
    if not args.results.is_dir():
        raise InputError(f"--results {args.results}: no such folder")
    text, path = report(args.results), args.results / "README.md"
    if not args.check:
        with atomic_write(path) as file:
            file.write(text.encode())
    elif not path.exists() or path.read_text() != text:
        raise InputError(f"{path} is not what its runs say: run python -m benchmarks.report")


if __name__ == "__main__":
    run_command(main, "report")
