"""The figure of the long trainings: error over multiply-accumulates, and over measured time for an image.

    python -m benchmarks.pays_figure --out FILE.png
    python -m benchmarks.pays_figure --measure --images DIR    # the times first

For the times one net of each arm is exported and run in ONNX Runtime and OpenVINO, test image by test image, each with
all cores; a net's time is that of its fastest engine. Gated nets need their weights, of any seed, in runs/ or
results/model. The time of a static net does not depend on its weights; what always runs the same blocks is measured
as the static net that it is. The times are kept in results/pays-time.json.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

import aig
from aig.analysis.figures import COLOURS, MARKERS, STYLE
from aig.checkpoint import CHECKPOINT, TEST, WEIGHTS
from aig.console import InputError, Parser, number, run_command, say
from aig.runs import read_json, write_json
from aig.runtime import ENGINES
from benchmarks.pays import BUDGETS, CALIBRATED, IMITATED, MAJORITY, SEEDS, STATIC, TAUGHT, teacher_folder
from benchmarks.pays_table import DENSE, alike, hull, results
from benchmarks.runner import ROOT, RUNS
from benchmarks.timing import where
from convnet_aig import BasicBlock, ResNet_cifar

TIMES = "pays-time.json"
CURVES = {  # what is joined by a line: arm and mode, by the name in the legend
    "gated, to a budget": [(f"budget{budget}", CALIBRATED[budget]) for budget in BUDGETS],
    "gated, with a floor": [("floor", mode) for mode in CALIBRATED.values()],
    "gated, to target rates": [("rates", mode) for mode in CALIBRATED.values()],
    "AIG from scratch": [("scratch", mode) for mode in CALIBRATED.values()],
    "always the same blocks": [(arm, DENSE) for arm in MAJORITY.values()],
    "always the same blocks (floor)": [("majority-floor", DENSE)],
    "random blocks": [("random", "sample")],
    "static nets": [(arm, DENSE) for arm in STATIC],
    "static nets, taught": [(arm + TAUGHT, DENSE) for arm in STATIC],
}
HUES = [*COLOURS, "tab:brown"]  # no two curves alike
HIGHEST = 20  # percent of error, where the axis ends if a net has more; such nets are named above the figure
Point = tuple[float, float, float, float]  # cost, and the error in percent: the seeds' mean, lowest, highest


# ---------------------------------------------------------------------------------------------- times


def networks(folder: Path) -> Iterator[tuple[str, str, torch.nn.Module]]:
    """Arm, mode and network of what is exported: of what was tested, all static nets, and gated ones with weights."""
    modes = dict.fromkeys((arm.removesuffix(TAUGHT), mode) for curve in CURVES.values() for arm, mode in curve)
    for arm, mode in modes:
        found = [result[mode] for kind in (arm, arm + TAUGHT) for result in results(folder, kind).values()
                 if mode in result]
        if not found or not mode.startswith(DENSE):  # an exported file does not sample
            continue
        if arm in STATIC or arm in IMITATED:
            (stages, *others) = {tuple(open_blocks(each["gates"])) for each in found}
            if all(stages) and not others:
                yield arm, mode, static_net(stages)
            else:
                why = "its seeds run different blocks" if others else "it is not a smaller ResNet"
                say(f"{arm}: not measured, as {why}")
        elif path := weights(arm, mode):
            budget = mode.partition("=")[2]
            yield arm, mode, aig.load(path, budget=float(budget) if budget else None)


def open_blocks(rates: Sequence[float]) -> list[int]:
    """How many blocks of each of the three stages run; 0 for a stage that runs none, or needs its first one.

    Args:
        rates: of each block, 0 or 1.
    """
    stages = np.reshape(rates, (3, -1)) > 0.5
    return [int(each.sum()) if each[0] or index == 0 else 0 for index, each in enumerate(stages)]


def static_net(stages: Sequence[int]) -> torch.nn.Module:
    """A plain network with these numbers of blocks in its stages, not trained."""
    model = ResNet_cifar(BasicBlock, stages, target_rates=[1] * sum(stages)).eval()
    model.preprocess = aig.load(ROOT / teacher_folder(SEEDS[0])).preprocess
    return model


def weights(arm: str, mode: str) -> Path | None:
    """Where the weights of an arm are that were tested in this mode."""
    runs = [ROOT / RUNS / f"pays-{arm}-s{seed}" / CHECKPOINT for seed in SEEDS]
    places = [*runs, ROOT / "results" / "model" / f"aig20-cifar10-jpeg-{arm}" / WEIGHTS]
    return next((path for path in places if path.exists() and mode in read_json(path.with_name(TEST))), None)


def measure(folder: Path, images: Sequence[Path], rounds: int) -> dict[str, dict]:
    """Milliseconds for an image, the median over the rounds: {engine: {arm: {mode: value}}}. The nets take turns.

    Args:
        folder: holds what was tested of each run.
        images: files of images.
        rounds: how often each net classifies all of them.

    Raises InputError if there is nothing to measure.
    """
    found: dict[str, dict] = {}
    with TemporaryDirectory() as exported:
        files = {}
        for arm, mode, model in networks(folder):
            files[arm, mode] = Path(exported) / f"{len(files)}.onnx"
            aig.export_onnx(model, files[arm, mode])
        if not files or not images:
            raise InputError(f"nothing to measure: {len(files)} networks tested in {folder}, {len(images)} images")
        for engine in ENGINES:
            sessions = {key: aig.Session(path, engine) for key, path in files.items()}
            prepare = next(iter(sessions.values())).preprocess
            pixels = [prepare(Image.open(path))[None] for path in images]
            taken: dict[tuple[str, str], list[float]] = {key: [] for key in sessions}
            for _ in tqdm(range(rounds), engine, disable=None, leave=False):
                for key, session in sessions.items():
                    taken[key].append(seconds(session, pixels) / len(pixels))
            for (arm, mode), values in taken.items():
                found.setdefault(engine, {}).setdefault(arm, {})[mode] = 1000 * statistics.median(values)
    return found


def seconds(session: Callable[[np.ndarray], tuple], pixels: Sequence[np.ndarray]) -> float:
    """To classify images one by one."""
    session(pixels[0])
    start = time.perf_counter()
    for image in pixels:
        session(image)
    return time.perf_counter() - start


def fastest(times: dict[str, dict], arm: str, mode: str) -> float | None:
    """Milliseconds in the engine that needs least, if they were measured."""
    arm = arm.removesuffix(TAUGHT)
    measured = [nets[arm][mode] for nets in times.values() if mode in nets.get(arm, {})]
    return min(measured, default=None)


# ---------------------------------------------------------------------------------------------- the figure


def points(folder: Path, curve: Sequence[tuple[str, str]], times: dict[str, dict] | None) -> list[Point]:
    """What is known of a curve, over MMACs, or over milliseconds with `times`; by cost.

    Seeds that do not cost the same are a point each, and have no time.
    """
    known = []
    for arm, mode in curve:
        each = [result[mode] for result in results(folder, arm).values() if mode in result]
        if not each:
            continue
        macs, errors = [result["macs_mean"] / 1e6 for result in each], [100 - result["top1"] for result in each]
        if not alike(macs):
            known += [(cost, *3 * (error,)) for cost, error in zip(macs, errors, strict=True) if times is None]
        elif cost := statistics.fmean(macs) if times is None else fastest(times, arm, mode):
            known.append((cost, statistics.fmean(errors), min(errors), max(errors)))
    return sorted(known)


def draw(axes: Axes, folder: Path, times: dict[str, dict] | None) -> None:
    """All curves on one pair of axes; bars from the lowest to the highest of the seeds, none for a single one."""
    for index, (name, curve) in enumerate(CURVES.items()):
        if known := points(folder, curve, times):
            cost, error, low, high = np.array(known).T
            style = {"color": HUES[index % len(HUES)], "marker": MARKERS[index % len(MARKERS)]}
            style["linestyle"] = "-" if len(curve) > 1 else "none"  # the seeds of one arm are not joined
            if name.startswith("static"):
                style = {"linestyle": "none", "color": "black", "marker": "o"}
            hollow = {"markerfacecolor": "white"} if "taught" in name else {}
            bars = np.where(high > low, [error - low, high - error], np.nan)
            axes.errorbar(cost, error, bars, label=name, markersize=4, linewidth=1, elinewidth=0.7, capsize=2,
                          **style, **hollow)
    static = [point[:2] for name, curve in CURVES.items() if name.startswith("static")
              for point in points(folder, curve, times)]
    if times is None and (line := hull(static)):
        line.append((max(static)[0], line[-1][1]))
        axes.plot(*zip(*line, strict=True), color="0.6", linewidth=0.8, zorder=0, label="best of the static nets")
    axes.grid(color="0.9", linewidth=0.5)


def beyond(folder: Path) -> list[str]:
    """Curves that go above the axis, with the errors there."""
    found = []
    for name, curve in CURVES.items():
        if above := [f"{error:.0f} %" for _, error, *_ in points(folder, curve, None) if error > HIGHEST]:
            found.append(f"{name}, {' and '.join(above)}")
    return found


def figure(folder: Path, times: dict[str, dict]) -> Figure:
    """Error over multiply-accumulates, left, and over time, right, if there are times."""
    columns = 2 if times else 1
    drawing = Figure(figsize=(3.45 * columns, 3.1), layout="constrained")
    first, *second = drawing.subplots(1, columns, sharey=True, squeeze=False)[0]
    draw(first, folder, None)
    # the verdict takes error to be linear in the logarithm of the cost
    first.set(xlabel="multiply-accumulates of an image, millions", ylabel="test error, %", xscale="log")
    first.xaxis.set_major_formatter("{x:g}")  # powers of ten would be hard to read on less than a decade
    first.xaxis.set_minor_formatter("{x:g}")
    for axes in second:
        draw(axes, folder, times)
        axes.set(xlabel="milliseconds for an image (of one seed),\nfaster of ONNX Runtime and OpenVINO")
    handles, labels = first.get_legend_handles_labels()
    text = "Bars: lowest to highest seed. Each error has a standard error of 0.3 points from its 10,000 test images."
    if above := beyond(folder):
        first.set_ylim(top=HIGHEST)
        text += f"\nAbove the axis: {'; '.join(above)}."
    drawing.suptitle(text, fontsize=7, x=0.99, horizontalalignment="right")
    drawing.legend(handles, labels, loc="outside lower center", ncols=columns + 1, frameon=False, fontsize=7)
    return drawing


def main(argv: Sequence[str] | None = None) -> None:
    import matplotlib as mpl

    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the figure")
    parser.add_argument("--results", type=Path, default=ROOT / "results", metavar="DIR", help="holds runs/ and times")
    parser.add_argument("--measure", action="store_true", help="measure times and keep them")
    parser.add_argument("--images", type=Path, metavar="DIR", help="test images, in a folder for each class")
    parser.add_argument("--count", type=number(int, 1), default=200, help="of the images to measure on")
    parser.add_argument("--rounds", type=number(int, 1), default=10)
    args = parser.parse_args(argv)
    if not (args.measure or args.out):
        raise InputError("nothing to do: add --measure or --out FILE")
    kept = args.results / TIMES
    if args.measure:
        files = sorted(args.images.glob("*/*.*")) if args.images else []
        chosen = np.random.default_rng(0).permutation(len(files))[: args.count]
        times = measure(args.results / RUNS, [files[index] for index in chosen], args.rounds)
        write_json(kept, {"device": where(torch.device("cpu")), "images": len(chosen), "milliseconds": times})
        print(f"written to {kept}")
    if args.out:
        with mpl.rc_context(STYLE):
            figure(args.results / RUNS, read_json(kept).get("milliseconds", {})).savefig(args.out)
        print(f"written to {args.out}")


if __name__ == "__main__":
    run_command(main, "pays_figure")
