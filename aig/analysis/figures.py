"""The paper's figures, each a function from arrays to a matplotlib figure; `parts` makes the arrays.

Colours are Okabe and Ito's, the map is cividis: colour-blind readers can tell both apart. In grey, curves differ by
marker and dash, and cividis by lightness.

Shapes: N images, L blocks, K classes, R runs, E epsilons. What several figures take:

    classes (K,)         names of the classes
    order (K,), tree     of the classes, see `measures.cluster`
    stages               the number of blocks in each
    gated (L,)           whether the block has a gate
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter
from scipy.cluster.hierarchy import dendrogram

from aig.palette import HUES, rgb

STYLE = {"font.size": 8, "axes.titlesize": 8, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 200}
WIDTH = 6.9  # inches: a page of a paper
SHOWN = 30  # rows of names that can be read
DRAWN_TREE = 200  # classes; scipy's drawing of larger trees can recurse too deep
COLOURS = [rgb(hue) for hue in HUES]
MARKERS = "osD^vPX*"
MAP = "cividis"
MEGA = 1e6  # multiply-accumulates in an MMAC
MODES = {"argmax": "o", "sample": "s", "expected": "^", "all": "D"}  # markers of the gate modes


def ends(order: np.ndarray) -> np.ndarray:
    """An order of classes; of too many to show only the first and the last."""
    return order if len(order) <= SHOWN else np.concatenate([order[: SHOWN // 2], order[-SHOWN // 2 :]])


def apart(places: np.ndarray, least: float) -> list[int]:
    """Indices of ascending places that are at least this part of their range apart."""
    chosen = [0]
    for index, place in enumerate(places):
        if place - places[chosen[-1]] >= least * np.ptp(places) > 0:
            chosen.append(index)
    return chosen


def name_rows(axis: Axis, names: Sequence[str], height: float) -> None:
    """Names at 0, 1, ... of an axis of this length in points: smaller ones for more rows, or none."""
    size = min(8, 0.8 * height / len(names))
    if size >= 3:
        axis.set_ticks(range(len(names)), names, parse_math=False, fontsize=size)
    else:
        axis.set_ticks([])
    axis.set_tick_params(length=0)


def rates(rates: np.ndarray, order: np.ndarray, tree: np.ndarray, classes: np.ndarray, stages: np.ndarray,
          gated: np.ndarray) -> Figure:
    """Execution rates (K, L), the fraction of a class's images that run a block, as the paper's figure 4."""
    count, blocks = rates.shape
    height = min(10, 1.2 + 0.2 * count)
    figure = Figure((min(14, max(WIDTH, 2 + 0.17 * blocks)), height), layout="constrained")
    left, axes = figure.subplots(1, 2, width_ratios=(1, 9))
    left.axis("off")
    if 0 < len(tree) < DRAWN_TREE and tree[-1, 2] > 0:  # scipy draws no tree whose leaves are all alike
        dendrogram(tree, orientation="left", ax=left, no_labels=True, color_threshold=0, above_threshold_color="black")
        left.invert_yaxis()
    shown = rates[order]
    image = axes.imshow(shown, MAP, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    if blocks <= 20 and count <= SHOWN:
        for (row, column), rate in np.ndenumerate(shown):
            text = f"{rate:.2f}".lstrip("0") if gated[column] else "1"
            colour = "black" if rate > 0.5 else "white"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=7)
    ticks = [f"{number}" if has_gate else f"({number})" for number, has_gate in enumerate(gated, start=1)]
    axes.set_xticks(range(blocks), ticks, fontsize=8 if blocks <= 20 else 5)
    name_rows(axes.yaxis, classes[order], 72 * (height - 1))
    above = axes.get_xaxis_transform()
    for number, (start, end) in enumerate(pairwise(np.cumsum([0, *stages]) - 0.5), start=1):
        axes.text((start + end) / 2, 1.01, f"stage {number}", ha="center", va="bottom", transform=above)
        if number > 1:
            axes.axvline(start, color="black", linewidth=2.5)
            axes.axvline(start, color="white", linewidth=1)
    axes.set_xlabel("residual block" + ("" if gated.all() else " (in brackets: always runs)"))
    figure.colorbar(image, label="images that run the block", pad=0.01, aspect=30)
    return figure


def usage(executed: np.ndarray, macs: np.ndarray, labels: np.ndarray, classes: np.ndarray, blocks: np.ndarray,
          dense: np.ndarray) -> Figure:
    """How much of the net an image uses, over all and by class, as the paper's figure 5.

    Args:
        executed, macs, labels: (N,), blocks run, multiply-accumulates and class of each image.
        blocks, dense: L, and the multiply-accumulates of the net without gates.
    """
    macs, dense = macs / MEGA, dense / MEGA
    means = np.bincount(labels, executed) / np.bincount(labels)
    order = ends(np.argsort(means))
    height = max(1.5, 0.19 * len(order))  # of the lower panels
    figure = Figure((WIDTH, 2.2 + height), layout="constrained")
    (by_blocks, by_macs), (strips, boxes) = figure.subplots(2, 2, sharex="col", height_ratios=(2, height))
    edges = np.arange(blocks + 2) - 0.5
    for axes, values, bins, form in ((by_blocks, executed, edges, ".2f"), (by_macs, macs, 40, ".4g")):
        axes.hist(values, bins, rwidth=0.9, color=COLOURS[0], edgecolor=COLOURS[0])
        axes.axvline(values.mean(), color="black", linestyle="--", label=f"mean {values.mean():{form}}")
        axes.legend(frameon=False)
        axes.set_ylabel("images")
        axes.yaxis.set_major_formatter(PercentFormatter(len(values), decimals=0))
    by_macs.axvline(dense, color="black", linestyle=":")
    by_macs.text(dense, 1, "dense net", ha="center", va="bottom", transform=by_macs.get_xaxis_transform())
    shares = [np.histogram(executed[labels == k], edges, density=True)[0] for k in order]
    strips.imshow(shares, "Greys", vmin=0, aspect="auto", interpolation="nearest")
    strips.plot(means[order], range(len(order)), "D", color=COLOURS[1], markersize=4)
    strips.set_xlim(max(-0.5, executed.min() - 1.5), blocks + 0.5)
    strips.xaxis.set_major_locator(MaxNLocator(integer=True))
    name_rows(strips.yaxis, classes[order], 72 * height)
    strips.set_xlabel(f"blocks run, of {blocks}")
    strips.set_title("shade: part of the images; diamond: mean")
    if len(order) < len(classes):
        strips.set_ylabel(f"{SHOWN // 2} classes at either end")
    boxes.boxplot([macs[labels == k] for k in order], orientation="horizontal", positions=range(len(order)),
                  whis=(5, 95), showfliers=False, widths=0.6, medianprops={"color": COLOURS[1]})
    boxes.set_ylim(len(order) - 0.5, -0.5)
    boxes.set_yticks([])
    boxes.set_xlabel("MMACs of an image")
    boxes.set_title("box: half of the images; whiskers: 90 %")
    return figure


def extremes(
    pixels: np.ndarray, names: np.ndarray, numbers: np.ndarray, executed: np.ndarray, wrong: np.ndarray
) -> Figure:
    """The images of each class that use the least (left) and the most (right) computation, as the paper's figure 6.

    Args:
        pixels: (K', 2 n, H, W, 3) uint8, cheapest first.
        names, numbers, executed: of classes (K',), of images in the table and of blocks run (K', 2 n).
        wrong: (K', 2 n), the class it was mistaken for, "" if it was not.
    """
    rows, columns = numbers.shape
    half = columns // 2
    figure = Figure((WIDTH, 0.35 + 0.83 * rows), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01)
    grid = figure.subplots(rows, columns + 1, squeeze=False, width_ratios=[*[1] * half, 0.15, *[1] * half])
    for axes in grid.flat:
        axes.axis("off")
    for row, left in enumerate(grid[:, 0]):
        name = textwrap.fill(str(names[row]), 14)
        left.text(-0.15, 0.5, name, ha="right", va="center", transform=left.transAxes, parse_math=False)
        for column in range(columns):
            axes = grid[row, column + (column >= half)]
            axes.imshow(pixels[row, column], interpolation="nearest")
            mistake = f" ({wrong[row, column][:11]})" if wrong[row, column] else ""
            axes.set_title(f"{executed[row, column]}{mistake}", fontsize=6, pad=1.5, parse_math=False)
    figure.suptitle("fewest multiply-accumulates (left) and most (right); equal ones in the order of the files\n"
                    "above each image: blocks run (and the class it was mistaken for)", fontsize=7)
    return figure


def curve(run: np.ndarray, mode: np.ndarray, threshold: np.ndarray, usual: np.ndarray, error: np.ndarray,
          macs_mean: np.ndarray) -> Figure:
    """Error over computation, as the paper's figure 3: a curve for the thresholds of the first run, marks for others.

    Args:
        run, mode, threshold, usual, error, macs_mean: one value for each point. The threshold is NaN except in mode
            argmax with one for all gates. `usual` points are marked; the others make the curve. Error is in percent.
    """
    figure = Figure((WIDTH, 3.6), layout="constrained")
    axes = figure.subplots()
    macs, runs = macs_mean / MEGA, list(dict.fromkeys(run.tolist()))
    swept = np.flatnonzero((run == runs[0]) & (mode == "argmax") & ~np.isnan(threshold))
    swept = swept[np.argsort(macs[swept])]
    axes.plot(macs[swept], error[swept], ".-", color=COLOURS[0], markersize=4)
    for point in swept[apart(macs[swept], 0.05)]:
        where = macs[point], error[point]
        axes.annotate(f"{threshold[point]:g}", where, (3, 4), textcoords="offset points", fontsize=6)
    for point in np.flatnonzero(usual):
        where, number = (macs[point], error[point]), runs.index(run[point])
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(*where, MODES[mode[point]], color=colour, markersize=8, fillstyle="none")
        if number > 0:
            axes.annotate(run[point], where, (-7, 0), textcoords="offset points", ha="right", va="center", fontsize=7)
    handles = [Line2D([], [], color=COLOURS[0], label=f"{runs[0]}, argmax by threshold")]
    handles += [Line2D([], [], marker=marker, color="grey", linestyle="none", fillstyle="none", label=name)
                for name, marker in MODES.items() if name in mode]
    figure.legend(handles=handles, loc="outside upper center", ncols=5, frameon=False)
    axes.set_xlabel("MMACs an image (numbers at the curve: thresholds of P(open))")
    axes.set_ylabel("top-1 error, %")
    axes.grid(alpha=0.3)
    return figure


def robustness(runs: np.ndarray, epsilons: np.ndarray, error: np.ndarray, gates_changed: np.ndarray,
               execution_rate: np.ndarray, quality: np.ndarray) -> Figure:
    """Accuracy under FGSM without and with JPEG compression, as the paper's figure 7, and what it does to the graphs.

    Args:
        runs: (R,) names.
        epsilons: (E,), of the whole range of pixels.
        error, gates_changed, execution_rate: (R, 2, E), without and with compression.
        quality: of the compression.
    """
    figure = Figure((WIDTH, 2.9), layout="constrained")
    panels = figure.subplots(1, 3)
    shown = {"top-1 accuracy, %": 100 - error, "gate decisions changed, %": 100 * gates_changed,
             "execution rate": execution_rate}
    handles = []
    for index, name in enumerate(runs):
        style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 4}
        handles.append(Line2D([], [], label=name, **style))
        for axes, values in zip(panels, shown.values(), strict=True):
            axes.plot(255 * epsilons, values[index, 0], "-", **style)
            axes.plot(255 * epsilons, values[index, 1], "--", markerfacecolor="white", **style)
    for axes, label in zip(panels, shown, strict=True):
        axes.set_ylabel(label)
        axes.set_xlabel("epsilon of FGSM, in 1/255")
        axes.grid(alpha=0.3)
    panels[0].set_ylim(bottom=0)
    handles += [Line2D([], [], color="grey", label="as attacked"),
                Line2D([], [], color="grey", linestyle="--", label=f"then JPEG, quality {quality}")]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    return figure


def similarity(agreement: np.ndarray, order: np.ndarray, classes: np.ndarray, excess: np.ndarray, shuffled: np.ndarray,
               p: np.ndarray) -> Figure:
    """How alike two images' graphs are, by their classes, and whether that is more than chance.

    Args:
        agreement: (K, K), fraction of gates that decide alike in two images of these classes.
        excess, shuffled, p: see `measures.similarity`.
    """
    if len(order) <= SHOWN:
        figure, height = Figure((WIDTH, 3.4), layout="constrained"), 140
        axes, chance = figure.subplots(1, 2, width_ratios=(4, 3))
    else:
        figure, height = Figure((WIDTH, 8.4), layout="constrained"), 380
        axes, chance = figure.subplots(2, 1, height_ratios=(4, 1))
    image = axes.imshow(agreement[np.ix_(order, order)], MAP, interpolation="nearest")
    for axis in (axes.xaxis, axes.yaxis):
        name_rows(axis, classes[order], height)
    axes.tick_params("x", rotation=90)
    figure.colorbar(image, label="gates that decide alike")
    # with an edge, because their range can be too narrow to be seen
    chance.hist(shuffled, 40, color="grey", edgecolor="grey",
                label=f"labels shuffled {len(shuffled)} times: std {shuffled.std():.1g}")
    chance.axvline(excess, color=COLOURS[1], label=f"these labels: {excess:.4f}, p = {p:.3g}")
    chance.set_xlabel("agreement within classes - between classes")
    chance.set_yticks([])
    chance.xaxis.set_major_locator(MaxNLocator(4))
    chance.spines["left"].set_visible(False)
    chance.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), frameon=False)
    return figure


def graphs(pixels: np.ndarray, captions: np.ndarray, opened: np.ndarray, gated: np.ndarray,
           stages: np.ndarray) -> Figure:
    """The inference graphs of single images: a square for each block, filled if it ran.

    Args:
        pixels: (n, H, W, 3) uint8, as the network sees the images.
        captions: (n,), two lines about each.
        opened: (n, L), whether the block ran.
    """
    rows, blocks = opened.shape
    figure = Figure((WIDTH, 0.3 + 1.15 * rows), layout="constrained")
    grid = figure.subplots(rows, 2, squeeze=False, width_ratios=(1, 6))
    places = np.arange(blocks) + np.repeat(np.arange(len(stages)), stages)  # a gap between stages
    firsts = places[np.cumsum([0, *stages[:-1]])]
    ran = np.where(gated, COLOURS[0], "lightgrey")
    hatches = ["" if has_gate else "////" for has_gate in gated]
    for row, (left, axes) in enumerate(grid):
        left.imshow(pixels[row], interpolation="nearest")
        left.axis("off")
        axes.axis("off")
        faces = np.where(opened[row], ran, "white")
        axes.bar(places, 1, 0.85, color=faces, edgecolor="black", linewidth=0.8, hatch=hatches)
        for number, first in enumerate(firsts, start=1):
            axes.text(first - 0.4, -0.12, f"stage {number}", va="top", fontsize=7)
        axes.set_xlim(-1, places[-1] + 1)
        axes.set_ylim(-0.6, 2.6)
        axes.text(-0.4, 1.3, captions[row], va="bottom", fontsize=8, parse_math=False)
    legend = "filled: the block ran; white: skipped" + ("" if gated.all() else "; hatched: has no gate, always runs")
    figure.supxlabel(legend, fontsize=7)
    return figure


FIGURES: dict[str, Callable[..., Figure]] = {
    figure.__name__: figure for figure in (rates, usage, extremes, curve, robustness, similarity, graphs)
}
