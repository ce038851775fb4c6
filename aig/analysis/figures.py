"""The paper's figures, each a function from arrays to a matplotlib figure; `parts` makes the arrays.

Colours are Okabe and Ito's, the map is cividis: colour-blind readers can tell both apart. In grey, curves differ by
marker and dash, and cividis by lightness.

Shapes: L blocks, K classes, R runs, E epsilons.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from itertools import cycle, pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from scipy.cluster.hierarchy import dendrogram

from aig.palette import HUES, rgb

STYLE = {"font.size": 8, "axes.titlesize": 8, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 200}
WIDTH = 6.9  # inches: a page of a paper
SHOWN = 30  # rows of names that can be read
DRAWN_TREE = 200  # classes; scipy's drawing of larger trees can recurse too deep
COLOURS = [rgb(hue) for hue in HUES]
MARKERS = "osD^vPX*"
MAP = "cividis"
MODES = {"argmax": "o", "sample": "s", "expected": "^", "all": "D"}  # markers of the gate modes


def giga(macs: np.ndarray) -> tuple[float, str]:
    """The divisor and the unit in which multiply-accumulates are easy to read."""
    return (1e9, "GMACs") if np.max(macs) >= 1e9 else (1e6, "MMACs")


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
    """Names at 0, 1, ... of an axis that is so many points long: smaller ones for more rows, or none."""
    size = min(8, 0.8 * height / len(names))
    if size >= 3:
        axis.set_ticks(range(len(names)), names, parse_math=False, fontsize=size)
    else:
        axis.set_ticks([])
    axis.set_tick_params(length=0)


def mark_stages(axes: Axes, stages: Sequence[int]) -> None:
    """Boundaries between the stages of blocks 1, 2, ..., and their numbers above."""
    edges = np.cumsum([0, *stages]) + 0.5
    for edge in edges[1:-1]:
        axes.axvline(edge, color="black", linewidth=2.5)
        axes.axvline(edge, color="white", linewidth=1)
    for number, (left, right) in enumerate(pairwise(edges), start=1):
        middle, above = (left + right) / 2, axes.get_xaxis_transform()
        axes.text(middle, 1.01, f"stage {number}", ha="center", va="bottom", transform=above)


def rates(rates: np.ndarray, order: np.ndarray, tree: np.ndarray, classes: np.ndarray, stages: np.ndarray,
          gated: np.ndarray) -> Figure:
    """Execution rates by class and block, the paper's figure 4.

    Args:
        rates: (K, L), fraction of the class's images that run the block.
        order, tree: of the classes, see `measures.cluster`.
        gated: (L,), whether the block has a gate.
    """
    count, blocks = rates.shape
    height = min(10, 1.2 + 0.2 * count)
    figure = Figure((min(14, max(WIDTH, 2 + 0.17 * blocks)), height), layout="constrained")
    left, axes = figure.subplots(1, 2, width_ratios=(1, 9))
    left.axis("off")
    if 0 < len(tree) < DRAWN_TREE and tree[-1, 2] > 0:  # scipy draws no tree whose leaves are all alike
        drawn = dendrogram(tree, orientation="left", ax=left, no_labels=True, color_threshold=0,
                           above_threshold_color="black")
        order = np.array(drawn["leaves"])
        left.set_ylim(10 * count, 0)  # scipy puts leaf i at 5 + 10 i
    shown = rates[order]
    image = axes.imshow(shown, MAP, vmin=0, vmax=1, aspect="auto", interpolation="nearest",
                        extent=(0.5, blocks + 0.5, count - 0.5, -0.5))
    if blocks <= 20 and count <= SHOWN:
        for row, column in np.ndindex(shown.shape):
            colour = "black" if shown[row, column] > 0.5 else "white"
            text = f"{shown[row, column]:.2f}".lstrip("0") if gated[column] else "1"
            axes.text(column + 1, row, text, ha="center", va="center", color=colour, fontsize=7)
    ticks = [f"{number}" if has_gate else f"({number})" for number, has_gate in enumerate(gated, start=1)]
    axes.set_xticks(range(1, blocks + 1), ticks, fontsize=8 if blocks <= 20 else 5)
    name_rows(axes.yaxis, classes[order], 72 * (height - 1))
    mark_stages(axes, stages)
    axes.set_xlabel("residual block" + ("" if gated.all() else " (in brackets: always runs)"))
    figure.colorbar(image, label="images that run the block", pad=0.01, aspect=30)
    return figure


def usage(executed: np.ndarray, macs: np.ndarray, labels: np.ndarray, classes: np.ndarray, blocks: np.ndarray,
          dense: np.ndarray) -> Figure:
    """How much of the net an image uses, over all and by class, the paper's figure 5.

    Args:
        executed, macs, labels: (N,), blocks run, multiply-accumulates and class of each image.
        blocks, dense: L, and the multiply-accumulates of the net without gates.
    """
    unit, name = giga(dense)
    means = np.bincount(labels, executed) / np.bincount(labels)
    order = ends(np.argsort(means))
    height = max(1.5, 0.19 * len(order))  # of the lower panels
    figure = Figure((WIDTH, 2.2 + height), layout="constrained")
    grid = figure.subplots(2, 2, sharex="col", height_ratios=(2, height))
    (by_blocks, by_macs), (strips, boxes) = grid
    share = np.bincount(executed, minlength=blocks + 1) / len(executed)
    by_blocks.bar(range(blocks + 1), share, 0.9, color=COLOURS[0])
    by_macs.hist(macs / unit, 40, weights=np.full(len(macs), 1 / len(macs)), color=COLOURS[0],
                 edgecolor=COLOURS[0])
    for axes, mean, form in ((by_blocks, executed.mean(), ".2f"), (by_macs, macs.mean() / unit, ".4g")):
        axes.axvline(mean, color="black", linestyle="--", label=f"mean {mean:{form}}")
        axes.legend(frameon=False)
        axes.set_ylabel("images")
        axes.yaxis.set_major_formatter("{x:.0%}")
    by_macs.axvline(dense / unit, color="black", linestyle=":")
    by_macs.text(dense / unit, 1, "dense net", ha="center", va="bottom", transform=by_macs.get_xaxis_transform())
    table = np.stack([np.bincount(executed[labels == index], minlength=blocks + 1) for index in order])
    shares = table / table.sum(1, keepdims=True)
    strips.imshow(shares, "Greys", vmin=0, aspect="auto", interpolation="nearest")
    strips.plot(means[order], range(len(order)), "D", color=COLOURS[1], markersize=4, label="mean")
    least = max(0, int(executed.min()) - 1)
    strips.set_xlim(least - 0.5, blocks + 0.5)
    strips.xaxis.set_major_locator(MaxNLocator(integer=True))
    name_rows(strips.yaxis, classes[order], 72 * height)
    strips.set_xlabel(f"blocks run, of {blocks}")
    places = [macs[labels == index] / unit for index in order]
    boxes.boxplot(places, orientation="horizontal", positions=range(len(order)), whis=(5, 95), showfliers=False,
                  widths=0.6, medianprops={"color": COLOURS[1]})
    boxes.set_ylim(len(order) - 0.5, -0.5)
    boxes.set_yticks([])
    boxes.set_xlabel(f"{name} of an image")
    boxes.set_title("box: half of the images; whiskers: 90 %")
    strips.set_title("shade: part of the images; diamond: mean")
    if len(order) < len(classes):
        strips.set_ylabel(f"{SHOWN // 2} classes at either end")
    return figure


def extremes(
    pixels: np.ndarray, names: np.ndarray, numbers: np.ndarray, executed: np.ndarray, wrong: np.ndarray
) -> Figure:
    """The images of each class that use the least (left) and the most (right) computation, the paper's figure 6.

    Args:
        pixels: (K', 2 n, H, W, 3) uint8, cheapest first.
        names: (K',).
        numbers: (K', 2 n), of the images, -1 where there is none.
        executed: (K', 2 n), blocks run.
        wrong: (K', 2 n), the class it was mistaken for, "" if it was not.
    """
    rows, columns = executed.shape
    figure = Figure((WIDTH, 0.35 + 0.83 * rows), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01)
    half = columns // 2
    grid = figure.subplots(rows, columns + 1, squeeze=False, width_ratios=[*[1] * half, 0.15, *[1] * half])
    for axes in grid.flat:
        axes.axis("off")
    for row in range(rows):
        name = textwrap.fill(str(names[row]), 14)
        grid[row, 0].text(-0.15, 0.5, name, ha="right", va="center", transform=grid[row, 0].transAxes, parse_math=False)
        for column in range(columns):
            if numbers[row, column] >= 0:
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
        run, mode, threshold, usual, error, macs_mean: one value for each point. The threshold is NaN in other modes
            than argmax, `usual` points are marked, the others only swept over, and error is in percent.
    """
    figure = Figure((WIDTH, 3.6), layout="constrained")
    axes = figure.subplots()
    unit, name = giga(macs_mean)
    first, *others = dict.fromkeys(run.tolist())
    swept = np.flatnonzero((run == first) & (mode == "argmax"))
    swept = swept[np.argsort(macs_mean[swept])]
    axes.plot(macs_mean[swept] / unit, error[swept], "-", color=COLOURS[0], marker=".", markersize=4)
    for point in apart(macs_mean[swept], 0.05):
        place = macs_mean[swept[point]] / unit, error[swept[point]]
        axes.annotate(f"{threshold[swept[point]]:g}", place, (3, 4), textcoords="offset points", fontsize=6)
    for each, colour in zip((first, *others), cycle(COLOURS), strict=False):
        for point in np.flatnonzero((run == each) & usual):
            filled = each == first and mode[point] in ("argmax", "sample")
            place = macs_mean[point] / unit, error[point]
            axes.plot(*place, MODES[mode[point]], color=colour, markersize=7 if filled else 9,
                      markerfacecolor=colour if filled else "none")
            if each != first:
                axes.annotate(each, place, (-7, 0), textcoords="offset points", ha="right", va="center", fontsize=7)
    modes = [other for other in MODES if other in set(mode.tolist())]
    handles = [Line2D([], [], color=COLOURS[0], label=f"{first}, argmax by threshold")]
    handles += [Line2D([], [], marker=MODES[other], color="grey", linestyle="none", label=other) for other in modes]
    figure.legend(handles=handles, loc="outside upper center", ncols=5, frameon=False)
    axes.set_xlabel(f"{name} an image (numbers at the curve: thresholds of P(open))")
    axes.set_ylabel("top-1 error, %")
    axes.grid(alpha=0.3)
    return figure


def robustness(runs: np.ndarray, epsilons: np.ndarray, error: np.ndarray, gates_changed: np.ndarray,
               execution_rate: np.ndarray, quality: np.ndarray) -> Figure:
    """Accuracy under FGSM without and with JPEG compression, the paper's figure 7, and what it does to the graphs.

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
    adaptive = (execution_rate < 1).any((1, 2))
    styles = [(COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]) for index in range(len(runs))]
    for axes, (label, values) in zip(panels, shown.items(), strict=True):
        for index, (colour, marker) in enumerate(styles):
            if adaptive[index] or axes is panels[0]:
                style = {"color": colour, "marker": marker, "markersize": 4}
                axes.plot(255 * epsilons, values[index, 0], "-", **style)
                axes.plot(255 * epsilons, values[index, 1], "--", markerfacecolor="white", **style)
        axes.set_ylabel(label)
        axes.set_xlabel("epsilon of FGSM, in 1/255")
        axes.grid(alpha=0.3)
    panels[0].set_ylim(bottom=0)
    names = [Line2D([], [], color=colour, marker=marker, label=name)
             for name, (colour, marker) in zip(runs, styles, strict=True)]
    ways = [Line2D([], [], color="grey", label="as attacked"),
            Line2D([], [], color="grey", linestyle="--", label=f"then JPEG, quality {quality}")]
    figure.legend(handles=[*names, *ways], loc="outside upper center", ncols=4, frameon=False)
    return figure


def similarity(agreement: np.ndarray, order: np.ndarray, classes: np.ndarray, excess: np.ndarray, shuffled: np.ndarray,
               p: np.ndarray) -> Figure:
    """How alike two images' graphs are, by their classes, and whether that is more than chance.

    Args:
        agreement: (K, K), fraction of gates that decide alike in two images of these classes.
        order: of the classes.
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


def graphs(pixels: np.ndarray, files: np.ndarray, guesses: np.ndarray, opened: np.ndarray, gated: np.ndarray,
           stages: np.ndarray, macs: np.ndarray, dense: np.ndarray) -> Figure:
    """The inference graphs of single images: a square for each block, filled if it ran.

    Args:
        pixels: (n, H, W, 3) uint8, as the network sees the images.
        files, guesses: (n,), names of the files and of the best guesses, with their probabilities.
        opened: (n, L).
        gated: (L,), whether the block has a gate.
        stages: blocks in each.
        macs: (n,), multiply-accumulates; `dense` those of the net without gates.
    """
    rows, blocks = opened.shape
    unit, name = giga(dense)
    figure = Figure((WIDTH, 0.3 + 1.15 * rows), layout="constrained")
    grid = figure.subplots(rows, 2, squeeze=False, width_ratios=(1, 6))
    places = np.arange(blocks) + np.repeat(np.arange(len(stages)), stages)  # a gap between stages
    firsts = places[np.cumsum([0, *stages[:-1]])]
    for row, (left, axes) in enumerate(grid):
        left.imshow(pixels[row], interpolation="nearest")
        left.axis("off")
        axes.axis("off")
        ran = opened[row].astype(bool)
        for place, runs, has_gate in zip(places, ran, gated, strict=True):
            face = "white" if not runs else COLOURS[0] if has_gate else "lightgrey"
            axes.bar(place, 1, 0.85, color=face, edgecolor="black", linewidth=0.8, hatch="" if has_gate else "////")
        for number, first in enumerate(firsts, start=1):
            axes.text(first - 0.4, -0.12, f"stage {number}", va="top", fontsize=7)
        axes.set_xlim(-1, places[-1] + 1)
        axes.set_ylim(-0.6, 2.6)
        text = (f"{files[row]}: {guesses[row]}\n{ran.sum()} of {blocks} blocks, {macs[row] / unit:.4g} {name}, "
                f"{100 * macs[row] / dense:.0f} % of the dense net's")
        axes.text(-0.4, 1.3, text, va="bottom", fontsize=8, parse_math=False)
    legend = "filled: the block ran; white: skipped" + ("" if gated.all() else "; hatched: has no gate, always runs")
    figure.supxlabel(legend, fontsize=7)
    return figure


FIGURES: dict[str, Callable[..., Figure]] = {
    figure.__name__: figure for figure in (rates, usage, extremes, curve, robustness, similarity, graphs)
}
