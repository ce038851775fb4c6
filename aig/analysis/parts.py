"""The parts of an analysis: what each measures, and the figures, tables, numbers and lines that come of it.

Shapes: N images, L blocks, K classes with images, R runs, E epsilons.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aig.analysis import measures
from aig.analysis.measures import Arrays
from aig.analysis.subjects import Subject
from aig.data import Loader
from aig.environment import derive_seed
from aig.evaluation import QUANTILES
from aig.images import Normaliser, read_image
from aig.inference import accelerate, count_macs
from convnet_aig import AdaptiveResNet

PARTS = ("rates", "usage", "curve", "robustness", "similarity")
USAGE_FILES = ("extremes", "images")  # what `usage` writes under other names
GALLERY_CLASSES, GALLERY_IMAGES = 10, 4  # of the contact sheet: rows, and images on either side
GUESSES = 5  # classes that are printed for a single image


@dataclass
class Part:
    """What a part of the analysis found."""

    arrays: dict[str, Arrays] = field(default_factory=dict)  # by figure: arguments of the function in `figures`
    tables: dict[str, list[Sequence[Any]]] = field(default_factory=dict)  # of CSV files; the first row names columns
    numbers: dict[str, Any] = field(default_factory=dict)  # for the summary
    lines: list[str] = field(default_factory=list)  # to print


def rates(subject: Subject) -> Part:
    """Execution rates by class and block."""
    found, gated, (by_class, order, tree) = subject.graphs, subject.gated, subject.clusters
    classes, counts = found["classes"], np.bincount(found["labels"])
    rows = [["class", "images", "mean", *(f"block{block}" for block in range(1, len(gated) + 1))]]
    rows += [[classes[k], counts[k], by_class[k].mean(), *by_class[k]] for k in order]
    arrays = {"rates": by_class, "order": order, "tree": tree, "classes": classes}
    arrays |= {"stages": np.array(subject.model.stages), "gated": gated}
    numbers = {**subject.headline(), "gates": found["opened"].mean(0).tolist()}
    line = "rates: every gate does the same for all classes"
    spread = np.where(gated, by_class.std(0), 0)
    if spread.any():
        block = int(spread.argmax())
        least, most = by_class[:, block].argmin(), by_class[:, block].argmax()
        ends = ", ".join(f"{classes[k]} {by_class[k, block]:.3f}" for k in (least, most))
        line = f"rates: the gate that differs most between classes is that of block {block + 1}: {ends}"
    return Part({"rates": arrays}, {"rates": rows}, numbers, [line])


def usage(subject: Subject) -> Part:
    """Blocks and multiply-accumulates by image, and the images at both ends."""
    found, blocks = subject.graphs, len(subject.gated)
    executed, macs = found["executed"], found["macs"]
    arrays = {name: found[name] for name in ("executed", "macs", "labels", "classes")}
    arrays |= {"blocks": np.array(blocks), "dense": np.array(subject.cost.dense)}
    right, wrong = (macs[hit].mean() if hit.any() else math.nan for hit in (found["right"], ~found["right"]))
    numbers = {
        **subject.headline(),
        "blocks_mean": executed.mean().item(),
        "executed_blocks": np.bincount(executed, minlength=blocks + 1).tolist(),
        "graphs": len(np.unique(found["opened"], axis=0)),
        "macs_mean_right": right,
        "macs_mean_wrong": wrong,
    }
    line = (
        f"usage: {executed.mean():.2f} of {blocks} blocks on average, {executed.min()} to {executed.max()}; "
        f"{numbers['graphs']} different graphs; "
        f"{right / 1e6:.2f} MMACs for images classified correctly, {wrong / 1e6:.2f} for the others"
    )
    tables = {"usage": usage_rows(found), "images": image_rows(found, subject.loader.files)}
    return Part({"usage": arrays, "extremes": extremes(found, subject.loader)}, tables, numbers, [line])


def usage_rows(found: Arrays) -> list[Sequence[Any]]:
    """The table of blocks run and multiply-accumulates over all images, and by class."""
    labels, blocks = found["labels"], found["opened"].shape[1]
    rows = [["class", "images", "blocks_mean", "macs_mean", *(f"macs_{q:g}" for q in QUANTILES)]]
    rows[0] += [f"images_with_{count}_blocks" for count in range(blocks + 1)]
    chosen = [("all", labels >= 0), *((name, labels == k) for k, name in enumerate(found["classes"]))]
    for name, images in chosen:
        run, macs = found["executed"][images], found["macs"][images]
        histogram = np.bincount(run, minlength=blocks + 1)
        rows.append([name, len(run), run.mean(), macs.mean(), *np.quantile(macs, QUANTILES), *histogram])
    return rows


def image_rows(found: Arrays, files: Sequence[str]) -> list[Sequence[Any]]:
    """The table of the images, with the names of their files if they have some."""
    columns = {
        "number": range(len(found["labels"])),
        "class": found["classes"][found["labels"]],
        "predicted": found["guesses"],
        "blocks": found["executed"],
        "macs": [f"{macs:.0f}" for macs in found["macs"]],
        "graph": ["".join(row) for row in np.where(found["opened"], "#", ".")],
    }
    if files:
        columns["file"] = files
    return [list(columns), *zip(*columns.values(), strict=True)]


def extremes(found: Arrays, loader: Loader) -> Arrays:
    """The arrays of the contact sheet: of some classes the cheapest and the most expensive images, as many of each."""
    classes = np.unique(np.linspace(0, len(found["classes"]) - 1, GALLERY_CLASSES).round().astype(int))
    order = np.argsort(found["macs"], kind="stable")  # equal ones in the order of the files
    members = [order[found["labels"][order] == k] for k in classes]
    count = min(GALLERY_IMAGES, max(1, min(map(len, members)) // 2))
    numbers = np.stack([np.concatenate([images[:count], images[-count:]]) for images in members])
    pixels = [loader.pixels(number).permute(1, 2, 0).numpy() for number in numbers.flat]
    return {
        "pixels": np.reshape(pixels, (*numbers.shape, *loader.size, 3)),
        "names": found["classes"][classes],
        "numbers": numbers,
        "executed": found["executed"][numbers],
        "wrong": np.where(found["right"][numbers], "", found["guesses"][numbers]),
    }


def curve(subjects: Iterable[Subject], thresholds: Sequence[float]) -> Part:
    """Error over computation: of the first by threshold and gate mode, of the others as they are used."""
    found, marked = [], []
    for index, subject in enumerate(subjects):
        usual = subject.model.threshold
        if index == 0:
            swept = sorted({*thresholds, usual}) if isinstance(usual, float) else [*sorted(thresholds), usual]
            points = [("argmax", threshold) for threshold in swept]
            points += [(mode, 0.5) for mode in ("sample", "expected", "all")]
        else:
            points = [("argmax", usual), ("sample", 0.5)][: 2 if subject.model.num_gates else 1]
        measured = measures.operating_points(subject.model, subject.loader, points, subject.samples, subject.seed)
        found += [{"run": subject.name, **point} for point in measured]
        marked += [mode != "argmax" or threshold == usual for mode, threshold in points]
    drawn = ("run", "mode", "threshold", "error", "macs_mean")
    arrays = {**{name: np.array([point[name] for point in found]) for name in drawn}, "usual": np.array(marked)}
    lines = [
        f"curve: {point['run']}, {point['mode']}: error {point['error']:.2f} % at {point['macs_fraction']:.3f} of "
        "the multiply-accumulates"
        for point, mark in zip(found, marked, strict=True)
        if mark
    ]
    table = [list(found[0]), *(list(point.values()) for point in found)]
    return Part({"curve": arrays}, {"curve": table}, {"points": found}, lines)


def robustness(subjects: Iterable[Subject], epsilons: Sequence[float], quality: int) -> Part:
    """Accuracy and graphs under attack, for ascending epsilons."""
    found = {s.name: measures.robustness(s.model, s.loader, epsilons, quality, s.first_seed) for s in subjects}
    rows: list[Sequence[Any]] = []
    lines = []
    for name, result in found.items():
        for row, compression in enumerate(("", quality)):
            for column, epsilon in enumerate(epsilons):
                rows.append([name, epsilon, compression, *(values[row, column] for values in result.values())])
        error, changed = result["error"][0], 100 * result["gates_changed"][0, -1]
        lines.append(
            f"robustness: {name}: error {error[0]:.2f} % at epsilon {epsilons[0]:.4g}, {error[-1]:.2f} % at "
            f"{epsilons[-1]:.4g}, where {changed:.1f} % of the gate decisions have changed"
        )
    results = list(found.values())
    arrays = {key: np.stack([result[key] for result in results]) for key in results[0]}  # (R, 2, E)
    header = ["run", "epsilon", "jpeg_quality", *arrays]
    numbers = {"epsilons": epsilons, "jpeg_quality": quality, "runs": list(found)}
    numbers |= {key: values.tolist() for key, values in arrays.items()}
    drawn = {key: arrays[key] for key in ("error", "gates_changed", "execution_rate")}
    drawn |= {"runs": np.array(list(found)), "epsilons": np.array(epsilons), "quality": np.array(quality)}
    return Part({"robustness": drawn}, {"robustness": [header, *rows]}, numbers, lines)


def similarity(subject: Subject, permutations: int) -> Part:
    """Agreement of graphs within and between classes."""
    found, (_, order, _) = subject.graphs, subject.clusters
    opened, classes = found["opened"][:, subject.gated], found["classes"]
    if len(classes) < 2 or np.bincount(found["labels"]).max() < 2:
        return Part(lines=["similarity is left out: it needs two classes, and two images of one of them"])
    result = measures.similarity(opened, found["labels"], len(classes), permutations, subject.seed)
    rows = [["class", *classes[order]], *([classes[k], *result["agreement"][k, order]] for k in order)]
    numbers = {name: float(result[name]) for name in ("within", "between", "excess", "p")}
    mean, std = float(result["shuffled"].mean()), float(result["shuffled"].std())
    numbers |= {"shuffled_mean": mean, "shuffled_std": std, "permutations": permutations}
    line = (
        f"similarity: graphs of a class agree in {numbers['within']:.4f} of the gates, of different classes in "
        f"{numbers['between']:.4f}; shuffled labels differ by {mean:.5f} +- {std:.5f}, p = {numbers['p']:.3g}"
    )
    drawn = {name: result[name] for name in ("agreement", "excess", "shuffled", "p")}
    return Part({"similarity": {**drawn, "order": order, "classes": classes}}, {"similarity": rows}, numbers, [line])


def graphs(model: AdaptiveResNet, paths: Sequence[str], seed: int) -> Part:
    """The best guesses for some image files and their graphs; `seed` is of the noise of gate mode "sample"."""
    device, preprocess = next(model.parameters()).device, model.preprocess
    pixels = torch.stack([preprocess.pixels(read_image(path)) for path in paths])  # (n, 3, H, W) uint8
    images = Normaliser(preprocess.mean, preprocess.std, device)(pixels.to(device, torch.float32))
    torch.manual_seed(derive_seed(seed, "image"))
    with torch.inference_mode():
        logits, gates = accelerate(model)(images.contiguous(memory_format=torch.channels_last))
    z, cost = torch.stack(gates, dim=1), count_macs(model, pixels.shape[2:])
    opened, macs = (z > 0.5).cpu(), cost.executed(z).tolist()  # (n, L), (n,)
    gated = [block.gated for block in model.blocks()]
    lines, captions = [], []
    for path, probabilities, graph, count in zip(paths, logits.softmax(1), opened.tolist(), macs, strict=True):
        guesses = describe_guesses(probabilities, model.classes)
        share = f"{100 * count / cost.dense:.1f} % of the dense net's {cost.dense / 1e6:.2f}"
        use = f"{sum(graph)} of {len(graph)} blocks; {count / 1e6:.2f} MMACs, {share}"
        lines += [f"{path}: {', '.join(guesses)}", f"  {describe_graph(graph, gated, model.stages)}", f"  {use}"]
        captions.append(f"{Path(path).name}: {', '.join(guesses[:3])}\n{use}")
    arrays = {
        "pixels": pixels.permute(0, 2, 3, 1).numpy(),
        "captions": np.array(captions),
        "opened": opened.numpy(),
        "gated": np.array(gated),
        "stages": np.array(model.stages),
    }
    return Part({"graphs": arrays}, lines=lines)


def describe_guesses(probabilities: Tensor, classes: Sequence[str]) -> list[str]:
    """The classes of the highest of probabilities (K,), with these in percent."""
    best = probabilities.topk(min(GUESSES, len(classes)))
    return [f"{classes[k]} {100 * p:.1f} %" for p, k in zip(best.values.tolist(), best.indices.tolist(), strict=True)]


def describe_graph(opened: Sequence[bool], gated: Sequence[bool], stages: Sequence[int]) -> str:
    """A graph as a mark for each of the L blocks."""
    marks = ["." if not is_open else "#" if has_gate else "=" for is_open, has_gate in zip(opened, gated, strict=True)]
    edges = pairwise(np.cumsum([0, *stages]).tolist())
    strips = [f"stage {number} {''.join(marks[start:end])}" for number, (start, end) in enumerate(edges, start=1)]
    meaning = "# ran, . skipped" + ("" if all(gated) else ", = always runs")
    return f"{'  '.join(strips)}   ({meaning})"
