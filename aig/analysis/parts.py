"""The parts of an analysis: what each measures, and the figures, tables, numbers and lines that come of it.

Shapes: N images, L blocks, K classes with images, R runs, E epsilons.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from aig.analysis import measures
from aig.analysis.measures import Arrays
from aig.analysis.output import Part
from aig.analysis.subjects import Subject
from aig.console import InputError
from aig.evaluation import QUANTILES, accelerated

GALLERY_CLASSES, GALLERY_IMAGES = 10, 4  # of the contact sheet: rows, and images on either side


@dataclass
class Graphs:
    """The inference graphs of all images.

    Attributes:
        classes: (K,) names of the classes that have images.
        labels: (N,) indices into `classes`.
        guesses: (N,) names of the predicted classes.
        right: (N,) whether they are those of the labels.
        opened: (N, L) whether the branch ran.
        macs: (N,) multiply-accumulates.
    """

    classes: np.ndarray
    labels: np.ndarray
    guesses: np.ndarray
    right: np.ndarray
    opened: np.ndarray
    macs: np.ndarray


@dataclass
class Analysis:
    """What the parts work on; what several of them need is computed once.

    Attributes:
        subject: the network that is analyzed.
        others: yields those that it is compared with, one after the other: their images need not be in memory together.
        thresholds: those of P(open) on the curve.
        epsilons, quality: how strong the attack and the JPEG compression are.
        permutations: how often the labels are shuffled.
        compared: where the numbers of the others come from, by name.
    """

    subject: Subject
    others: Callable[[], Iterator[Subject]]
    thresholds: Sequence[float]
    epsilons: Sequence[float]
    quality: int
    permutations: int
    compared: dict[str, dict[str, Any]] = field(default_factory=dict)

    def subjects(self) -> Iterator[Subject]:
        """The network and those that it is compared with. Raises InputError for one that is tested on other images."""
        yield self.subject
        for other in self.others():
            if not torch.equal(other.loader.labels, self.subject.loader.labels):
                ours = self.subject.path
                raise InputError(f"{other.path} is tested on other images than {ours}: give the data of both")
            self.compared[other.name] = other.provenance()
            yield other

    @property
    def has_pairs(self) -> bool:
        """Whether there are two images of one class, and two classes."""
        counts = self.subject.loader.labels.unique(return_counts=True)[1]
        return bool(len(counts) > 1 and counts.max() > 1)

    @cached_property
    def graphs(self) -> Graphs:
        """The graphs of all images in the network's gate mode; "sample" is drawn once."""
        s, names = self.subject, np.array(self.subject.loader.classes)
        network = s.model if s.dense else accelerated(s.model, s.loader)
        found = measures.inference_graphs(network, s.loader, s.cost, s.first_seed)
        present, labels = np.unique(found["labels"], return_inverse=True)
        predicted = found["predicted"]
        right = predicted == found["labels"]
        return Graphs(names[present], labels, names[predicted], right, found["opened"], found["macs"])

    @cached_property
    def clusters(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Execution rates by class and block, (K, L), and the order and the tree of the classes."""
        opened, labels = self.graphs.opened, self.graphs.labels
        rates = np.stack([opened[labels == k].mean(0) for k in range(len(self.graphs.classes))])
        return rates, *measures.cluster(rates)

    def headline(self) -> dict[str, Any]:
        """What --test reports (in gate mode "sample": for the first of its seeds), from the graphs of the images."""
        found, dense = self.graphs, self.subject.cost.dense
        return {
            "images": len(found.right),
            "top1": 100 * float(found.right.mean()),
            "execution_rate": float(found.opened.mean()),
            "macs_mean": float(found.macs.mean()),
            "macs_fraction": float(found.macs.mean() / dense),
            "macs_dense": dense,
        }


def rates(analysis: Analysis) -> Part:
    """Execution rates by class and block."""
    subject, found, (rates, order, tree) = analysis.subject, analysis.graphs, analysis.clusters
    classes, gated = found.classes, subject.gated
    counts = np.bincount(found.labels)
    header = ["class", "images", "mean", *(f"block{block}" for block in range(1, len(gated) + 1))]
    rows = [[classes[k], counts[k], rates[k].mean(), *rates[k]] for k in order]
    arrays = {"rates": rates, "order": order, "tree": tree, "classes": classes}
    arrays |= {"stages": np.array(subject.model.stages), "gated": gated}
    numbers = {**analysis.headline(), "gates": found.opened.mean(0).tolist()}
    line = "rates: every gate does the same for all classes"
    spread = np.where(gated, rates.std(0), 0)
    if spread.any():
        block = int(spread.argmax())
        least, most = rates[:, block].argmin(), rates[:, block].argmax()
        line = f"rates: the gate that differs most between classes is that of block {block + 1}: " + ", ".join(
            f"{classes[index]} {rates[index, block]:.3f}" for index in (least, most)
        )
    return Part({"rates": arrays}, {"rates": [header, *rows]}, numbers, [line])


def usage(analysis: Analysis) -> Part:
    """Blocks and multiply-accumulates by image, and the images at both ends."""
    found, dense = analysis.graphs, analysis.subject.cost.dense
    executed, blocks, macs = found.opened.sum(1), found.opened.shape[1], found.macs
    arrays = {"executed": executed, "macs": macs, "labels": found.labels, "classes": found.classes}
    arrays |= {"blocks": np.array(blocks), "dense": np.array(dense)}
    images = image_rows(found, executed, analysis.subject.loader.files)
    tables = {"usage": usage_rows(found, executed), "images": images}
    right, wrong = (macs[hit].mean() if hit.any() else math.nan for hit in (found.right, ~found.right))
    numbers = {
        **analysis.headline(),
        "blocks_mean": executed.mean().item(),
        "executed_blocks": np.bincount(executed, minlength=blocks + 1).tolist(),
        "macs_mean_right": right,
        "macs_mean_wrong": wrong,
    }
    line = (
        f"usage: {executed.mean():.2f} of {blocks} blocks in the mean, {executed.min()} to {executed.max()}; "
        f"{right / 1e6:.2f} MMACs for images classified rightly, {wrong / 1e6:.2f} for the others"
    )
    return Part({"usage": arrays, "extremes": extremes(analysis, executed)}, tables, numbers, [line])


def usage_rows(found: Graphs, executed: np.ndarray) -> list[Sequence[Any]]:
    """The table of blocks run (N,) and multiply-accumulates over all images, and by class."""
    blocks = found.opened.shape[1]
    header = ["class", "images", "blocks_mean", "macs_mean", *(f"macs_{q:g}" for q in QUANTILES)]
    rows = [[*header, *(f"images_with_{count}_blocks" for count in range(blocks + 1))]]
    for name, chosen in [("all", found.labels >= 0), *((c, found.labels == k) for k, c in enumerate(found.classes))]:
        run, macs = executed[chosen], found.macs[chosen]
        histogram = np.bincount(run, minlength=blocks + 1)
        rows.append([name, len(run), run.mean(), macs.mean(), *np.quantile(macs, QUANTILES), *histogram])
    return rows


def image_rows(found: Graphs, executed: np.ndarray, files: Sequence[str]) -> list[Sequence[Any]]:
    """The table of the images, with the names of their files if they have some."""
    rows = [["number", "class", "predicted", "blocks", "macs", "graph"]]
    marks = ("".join(".#"[is_open] for is_open in graph) for graph in found.opened.astype(int))
    columns = (found.classes[found.labels], found.guesses, executed, (f"{macs:.0f}" for macs in found.macs), marks)
    rows += [[number, *row] for number, row in enumerate(zip(*columns, strict=True))]
    return [[*row, name] for row, name in zip(rows, ("file", *files), strict=True)] if files else rows


def extremes(analysis: Analysis, executed: np.ndarray) -> Arrays:
    """The arrays of the contact sheet, the cheapest and the dearest images of some classes; `executed` (N,) blocks."""
    found, loader = analysis.graphs, analysis.subject.loader
    classes = np.unique(np.linspace(0, len(found.classes) - 1, GALLERY_CLASSES).round().astype(int))
    members = [np.flatnonzero(found.labels == k) for k in classes]
    places = [measures.cheapest_and_dearest(found.macs[images], GALLERY_IMAGES) for images in members]
    numbers = np.stack([np.where(at >= 0, images[at], -1) for at, images in zip(places, members, strict=True)])
    pixels = np.zeros((*numbers.shape, *loader.size, 3), np.uint8)
    for place in zip(*np.nonzero(numbers >= 0), strict=True):
        pixels[place] = loader.pixels(numbers[place]).permute(1, 2, 0).numpy()
    return {
        "pixels": pixels,
        "names": found.classes[classes],
        "numbers": numbers,
        "executed": np.where(numbers >= 0, executed[numbers], -1),
        "wrong": np.where((numbers >= 0) & ~found.right[numbers], found.guesses[numbers], ""),
    }


def curve(analysis: Analysis) -> Part:
    """Error over computation, by threshold and gate mode, other runs beside it."""
    found, marked = [], []
    for subject in analysis.subjects():
        usual = subject.model.threshold
        if subject is analysis.subject:
            points = [("argmax", threshold) for threshold in sorted({*analysis.thresholds, usual})]
            points += [(mode, 0.5) for mode in ("sample", "expected", "all")]
        else:
            points = [("argmax", usual), ("sample", 0.5)][: 2 if subject.model.num_gates else 1]
        how = {"samples": subject.samples, "seed": subject.seed, "dense": subject.dense}
        measured = measures.operating_points(subject.model, subject.loader, subject.objective, points, **how)
        found += [{"run": subject.name, **point} for point in measured]
        marked += [point["mode"] != "argmax" or point["threshold"] == usual for point in measured]
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


def robustness(analysis: Analysis) -> Part:
    """Accuracy and graphs under attack."""
    names, results, epsilons, quality = [], [], analysis.epsilons, analysis.quality
    for s in analysis.subjects():
        results.append(measures.robustness(s.model, s.loader, epsilons, quality, s.cost, s.first_seed))
        names.append(s.name)
    arrays = {name: np.stack([result[name] for result in results]) for name in results[0]}  # (R, 2, E)
    rows = [["run", "epsilon", "jpeg_quality", *arrays]]
    for r, compressed, e in np.ndindex(arrays["error"].shape):
        values = (array[r, compressed, e] for array in arrays.values())
        rows.append([names[r], epsilons[e], quality if compressed else "", *values])
    first, last, changed = arrays["error"][:, 0, 0], arrays["error"][:, 0, -1], arrays["gates_changed"][:, 0, -1]
    lines = [
        f"robustness: {name}: error {first[r]:.2f} % at epsilon {epsilons[0]:.4g}, {last[r]:.2f} % at "
        f"{epsilons[-1]:.4g}, where {100 * changed[r]:.1f} % of the gate decisions have changed"
        for r, name in enumerate(names)
    ]
    drawn = {name: arrays[name] for name in ("error", "gates_changed", "execution_rate")}
    drawn |= {"runs": np.array(names), "epsilons": np.array(epsilons), "quality": np.array(quality)}
    numbers = {"epsilons": epsilons, "jpeg_quality": quality, "runs": names}
    numbers |= {name: values.tolist() for name, values in arrays.items()}
    return Part({"robustness": drawn}, {"robustness": rows}, numbers, lines)


def similarity(analysis: Analysis) -> Part:
    """Agreement of graphs within and between classes."""
    found, (_, order, _) = analysis.graphs, analysis.clusters
    opened, classes, permutations = found.opened[:, analysis.subject.gated], found.classes, analysis.permutations
    result = measures.similarity(opened, found.labels, len(classes), permutations, analysis.subject.seed)
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


PARTS: dict[str, Callable[[Analysis], Part]] = {
    part.__name__: part for part in (rates, usage, curve, robustness, similarity)
}
