"""Shows what a trained ConvNet-AIG learned to skip, for whom, and what that does: the paper's figures 3 to 7.

    python analyze.py --resume runs/NAME/model_best.pth.tar --out DIR
    python analyze.py --resume runs/NAME/model_best.pth.tar --image FILE ...       # the graph of single images
    python analyze.py --redraw --out DIR                                           # the figures again, from arrays

Takes the flags of the script that trained the network, too: those of its data (where they are not as recorded), and
--gate-mode, --threshold, --batch-size, --device, --seed, --test-size. `measures` computes, `figures` draws.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import sys
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor

import cli
import data
import engine
import figures
import inference
import measures
import processes
import train
import train_img
import utils
from convnet_aig import AdaptiveResNet
from utils import InputError, derive_seed

SUMMARY = "summary.json"
FORMATS = ("png", "pdf", "svg")
THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
EPSILONS = [Fraction(steps, 255) for steps in (0, 1, 2, 4, 8, 16)]
GALLERY_CLASSES, GALLERY_IMAGES = 10, 4  # of the contact sheet: rows, and images on either side
IMAGE_FLAGS = {  # of the scripts, that mean something to single images
    *("dataset", "image_size", "depth", "arch", "target", "target_rates", "gate_mode", "threshold", "seed"),
    *("device", "no_cuda", "deterministic", "channels_last", "tf32"),
}
USED_FLAGS = IMAGE_FLAGS | {"data", "workers", "batch_size", "test_size", "gate_samples", "lossfact", "dense"}
GUESSES = 5  # classes that are printed for an image


# ---------------------------------------------------------------------------------------------- flags


def epsilon(text: str) -> Fraction:
    """An argparse type: a number such as 0.01 or 4/255, in [0, 1]."""
    try:
        value = Fraction(text) if "/" in text else Fraction(float(text))
    except (ValueError, OverflowError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 0.01 or 4/255") from None
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0 and at most 1")
    return value


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        description=__doc__.split("\n")[0],
        epilog="All flags of train.py or train_img.py, whichever trained the network, can be given, too: those of the "
        "data, --gate-mode (argmax or sample), --threshold, --batch-size, --device, --seed, --test-size.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    positive = cli.number(int, 1)
    parser.add_argument("--resume", metavar="FILE", help="the checkpoint to analyze")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where figures, tables and arrays go")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="what to compute")
    parser.add_argument("--compare", nargs="+", default=[], metavar="RUN",
                        help="checkpoints or run folders for the curve and the robustness, plain ResNets included")
    parser.add_argument("--image", nargs="+", default=[], metavar="FILE", help="show these images' graphs instead")
    parser.add_argument("--thresholds", nargs="+", type=cli.number(float, above=0, below=1), default=THRESHOLDS,
                        metavar="P", help="of P(open), for the curve")
    parser.add_argument("--epsilons", nargs="+", type=epsilon, default=EPSILONS, metavar="E",
                        help="of the attack, of the range of pixels")
    parser.add_argument("--jpeg-quality", type=cli.number(int, 1, 100), default=75)
    parser.add_argument("--permutations", type=positive, default=999, help="of the labels, for the similarity's chance")
    parser.add_argument("--redraw", action="store_true", help="draw the figures in --out again, from their arrays")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier analysis left in --out")
    parser.add_argument("--format", default="png", choices=FORMATS, help="of the figures")
    return parser


# ---------------------------------------------------------------------------------------------- what is analyzed


@dataclass
class Subject:
    """A trained network with the images to look at."""

    name: str
    args: argparse.Namespace
    checkpoint: dict
    model: AdaptiveResNet
    loader: engine.Loader
    pixels: measures.Pixels
    cost: inference.Macs

    @property
    def gated(self) -> np.ndarray:
        return np.array([block.gated for block in self.model.blocks()])

    @property
    def first_seed(self) -> int:
        """Of the seeds over which --test takes the mean in gate mode "sample": single images have one graph."""
        return derive_seed(self.args.seed, "test", 0)

    def settings(self) -> dict[str, Any]:
        """What `engine.test` takes, as --test gives it."""
        rates = {"target_rates": self.model.target_rates, "lossfact": self.args.lossfact, "topk": (1,)}
        return {"samples": self.args.gate_samples, "seed": self.args.seed, "dense": self.args.dense, **rates}


def script_of(path: str) -> ModuleType:
    """The script that trains such networks as in a checkpoint. Raises InputError if it cannot be used."""
    checkpoint = utils.load_checkpoint(path)
    photographs = any(".conv3." in key for key in checkpoint["state_dict"])  # of a bottleneck
    return train_img if "arch" in cli.recorded(checkpoint) or photographs else train


def open_network(
    path: str, rest: Sequence[str], used: Set[str] = USED_FLAGS
) -> tuple[ModuleType, argparse.Namespace, dict]:
    """The script, the flags and the checkpoint of a network; `rest` are the script's flags of this call."""
    script = script_of(path)
    parser = script.make_parser()
    parser.allow_abbrev = False
    parser.parse_args(rest)  # there are no others
    check_flags(parser, rest, used, "--image" if used is IMAGE_FLAGS else "analyze.py")
    args, checkpoint = script.parse(["--test", f"--resume={path}", *rest])
    if args.gate_mode not in ("argmax", "sample"):
        raise InputError(f"--gate-mode {args.gate_mode} has no graphs to look at: use argmax or sample")
    return script, args, checkpoint


def check_flags(parser: cli.Parser, argv: Sequence[str], used: Set[str], what: str) -> None:
    """Raises InputError for flags that have no meaning here."""
    for name in cli.given(parser, argv):
        if name not in used:
            raise InputError(f"--{name.replace('_', '-')} means nothing to {what}: leave it out")


def load_subject(path: str, rest: Sequence[str], name: str = "") -> Subject:
    """A checkpoint with its test images. Raises InputError if either cannot be used."""
    script, args, checkpoint = open_network(path, rest)
    loaded = script.load_data(args, checkpoint)
    model = script.make_model(args, len(loaded.val.classes))
    cli.prepare(args, checkpoint, model)
    pixels = measures.Pixels(*loaded.normalisation, next(model.parameters()).device)
    cost = inference.macs(model, loaded.val.size)
    return Subject(name or str(args.expname), args, checkpoint, model.eval(), loaded.val, pixels, cost)


def checkpoint_in(run: str) -> str:
    """The checkpoint of a run: the file itself, or the best one of a run folder."""
    candidates = [Path(run) / name for name in (utils.BEST, utils.CHECKPOINT)]
    return next((str(path) for path in candidates if path.is_file()), run)


# ---------------------------------------------------------------------------------------------- the parts


@dataclass
class Part:
    """What a part of the analysis found.

    Attributes:
        arrays: of each figure, by its name.
        tables: rows of each CSV file, by its name; the first row names the columns.
        numbers: for the summary.
        lines: to print.
    """

    arrays: dict[str, measures.Arrays] = field(default_factory=dict)
    tables: dict[str, list[Sequence[Any]]] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


class Analysis:
    """Computes the parts for a network; what several of them need, only once."""

    def __init__(self, subject: Subject, others: Callable[[], Iterable[Subject]], args: argparse.Namespace) -> None:
        self.subject, self.others, self.args = subject, others, args
        self.graphs: measures.Arrays = {}
        self.compared: dict[str, dict[str, Any]] = {}  # the origin of the others
        present = subject.loader.labels.unique().tolist()
        spread = np.unique(np.linspace(0, len(present) - 1, GALLERY_CLASSES).round().astype(int))
        self.gallery = measures.Gallery([present[index] for index in spread], GALLERY_IMAGES)

    def classify(self) -> measures.Arrays:
        """The graphs of all images, see `measures.inference_graphs`, and the names of the `classes` with images."""
        if not self.graphs:
            s = self.subject
            network = s.model if s.args.dense else engine.accelerate(s.model, s.loader)
            found = measures.inference_graphs(network, s.loader, s.cost, s.pixels, self.gallery, s.first_seed)
            present, found["labels"] = np.unique(found["labels"], return_inverse=True)
            self.present = present
            self.graphs = {**found, "classes": np.array(s.loader.classes)[present]}
        return self.graphs

    def headline(self) -> dict[str, Any]:
        """What --test reports (in gate mode "sample": for the first of its seeds), from the graphs of the images."""
        found = self.classify()
        hits = self.present[found["labels"]] == found["predicted"]
        return {
            "images": len(hits),
            "top1": 100 * float(hits.mean()),
            "execution_rate": float(found["opened"].mean()),
            "macs_mean": float(found["macs"].mean()),
            "macs_fraction": float(found["macs"].mean() / self.subject.cost.dense),
            "macs_dense": self.subject.cost.dense,
        }

    def clusters(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Opening rates by class and block, and the order and the tree of the classes."""
        found = self.classify()
        rates = measures.means_by_class(found["opened"], found["labels"], len(found["classes"]))
        return rates, *measures.cluster(rates)

    def rates(self) -> Part:
        """Execution rates by class and block."""
        found, (rates, order, tree) = self.classify(), self.clusters()
        counts = np.bincount(found["labels"])
        header = ["class", "images", "mean", *(f"block{block}" for block in range(1, rates.shape[1] + 1))]
        rows = [[found["classes"][k], counts[k], rates[k].mean(), *rates[k]] for k in order]
        arrays = {"rates": rates, "order": order, "tree": tree, "classes": found["classes"],
                  "stages": np.array(self.subject.model.stages), "gated": self.subject.gated}
        spread = rates[:, self.subject.gated].std(0)
        block = int(np.flatnonzero(self.subject.gated)[spread.argmax()])
        least, most = (found["classes"][index] for index in (rates[:, block].argmin(), rates[:, block].argmax()))
        numbers = {**self.headline(), "gates": found["opened"].mean(0).tolist()}
        line = "rates: every gate does the same for all classes" if not spread.max() else (
                f"rates: the gate that differs most between classes is that of block {block + 1}: "
                f"{least} {rates[:, block].min():.3f}, {most} {rates[:, block].max():.3f}")
        return Part({"rates": arrays}, {"rates": [header, *rows]}, numbers, [line])

    def usage(self) -> Part:
        """Blocks and multiply-accumulates by image, and the images at both ends."""
        found, classes = self.classify(), self.classify()["classes"]
        labels, macs, executed = found["labels"], found["macs"], found["opened"].sum(1)
        blocks, dense = found["opened"].shape[1], self.subject.cost.dense
        arrays = {"executed": executed, "macs": macs, "labels": labels, "classes": classes,
                  "blocks": np.array(blocks), "dense": np.array(dense)}
        quantiles = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
        header = ["class", "images", "blocks_mean", "macs_mean", *(f"macs_{q:g}" for q in quantiles),
                  *(f"images_with_{count}_blocks" for count in range(blocks + 1))]
        rows = [header]
        for name, chosen in [("all", labels >= 0), *((name, labels == k) for k, name in enumerate(classes))]:
            histogram = np.bincount(executed[chosen], minlength=blocks + 1)
            spread = np.quantile(macs[chosen], quantiles)
            rows.append([name, chosen.sum(), executed[chosen].mean(), macs[chosen].mean(), *spread, *histogram])
        names = self.subject.loader.classes
        each = zip(self.present[labels], found["predicted"], executed, macs, found["opened"].astype(int), strict=True)
        images = [["number", "class", "predicted", "blocks", "macs", "graph"]]
        images += [[number, names[label], names[guess], run, f"{cost:.0f}", "".join(".#"[is_open] for is_open in graph)]
                   for number, (label, guess, run, cost, graph) in enumerate(each)]
        extremes = self.extremes(executed)
        hits = self.present[labels] == found["predicted"]
        by_hit = [macs[chosen].mean() / 1e6 if chosen.any() else math.nan for chosen in (hits, ~hits)]
        line = (f"usage: {executed.mean():.2f} of {blocks} blocks in the mean, {executed.min()} to {executed.max()}; "
                f"{by_hit[0]:.2f} MMACs for images classified rightly, {by_hit[1]:.2f} for the others")
        histogram = np.bincount(executed, minlength=blocks + 1)
        numbers = {**self.headline(), "blocks_mean": executed.mean().item(), "executed_blocks": histogram.tolist(),
                   "macs_mean_right": 1e6 * by_hit[0], "macs_mean_wrong": 1e6 * by_hit[1]}
        return Part({"usage": arrays, "extremes": extremes}, {"usage": rows, "images": images}, numbers, [line])

    def extremes(self, executed: np.ndarray) -> measures.Arrays:
        """The arrays of the contact sheet."""
        names, predicted = np.array(self.subject.loader.classes), self.classify()["predicted"]
        sheet = self.gallery.arrays()
        numbers, row = sheet["gallery_numbers"], sheet["gallery_classes"][:, None]
        mistaken = (numbers >= 0) & (predicted[numbers] != row)
        return {"pixels": sheet["gallery_pixels"], "names": names[sheet["gallery_classes"]], "numbers": numbers,
                "executed": np.where(numbers >= 0, executed[numbers], -1),
                "wrong": np.where(mistaken, names[predicted[numbers]], "")}

    def curve(self) -> Part:
        """Error over computation, by threshold and gate mode, other runs beside it."""
        thresholds = sorted({*self.args.thresholds, self.subject.args.threshold})
        points = [("argmax", threshold) for threshold in thresholds]
        points += [(mode, 0.5) for mode in ("sample", "expected", "all")]
        found, marked = [], []
        for subject in (self.subject, *self.others()):
            first = subject is self.subject
            usual = [("argmax", subject.args.threshold), ("sample", 0.5)][: 2 if subject.model.num_gates else 1]
            chosen = points if first else usual
            measured = measures.operating_points(subject.model, subject.loader, chosen, **subject.settings())
            marked += [point["mode"] != "argmax" or point["threshold"] == subject.args.threshold for point in measured]
            found += [{"run": subject.name, **point} for point in measured]
        arrays = {name: np.array([point[name] for point in found])
                  for name in ("run", "mode", "threshold", "error", "macs_mean")}
        arrays["usual"] = np.array(marked)
        lines = [f"curve: {point['run']}, {point['mode']}: error {point['error']:.2f} % at "
                 f"{point['macs_fraction']:.3f} of the multiply-accumulates"
                 for point, mark in zip(found, marked, strict=True) if mark]
        return Part({"curve": arrays}, {"curve": [list(found[0]), *(list(p.values()) for p in found)]},
                    {"points": found}, lines)

    def robustness(self) -> Part:
        """Accuracy and graphs under attack."""
        epsilons = [float(value) for value in sorted(set(self.args.epsilons))]
        names, results = [], []
        for subject in (self.subject, *self.others()):
            s = subject
            how = (epsilons, self.args.jpeg_quality, s.cost, s.first_seed)
            results.append(measures.robustness(s.model, s.loader, s.pixels, *how))
            names.append(s.name)
        arrays = {name: np.stack([result[name] for result in results]) for name in results[0]}
        columns = list(arrays)
        rows = [["run", "epsilon", "jpeg_quality", *columns]]
        for r, row, e in np.ndindex(arrays["error"].shape):
            quality = self.args.jpeg_quality if row else ""
            rows.append([names[r], epsilons[e], quality, *(arrays[name][r, row, e] for name in columns)])
        first, last, changed = arrays["error"][:, 0, 0], arrays["error"][:, 0, -1], arrays["gates_changed"][:, 0, -1]
        lines = [f"robustness: {name}: error {first[r]:.2f} % at epsilon {epsilons[0]:.4g}, {last[r]:.2f} % at "
                 f"{epsilons[-1]:.4g}, where {100 * changed[r]:.1f} % of the gate decisions have changed"
                 for r, name in enumerate(names)]
        drawn = {name: arrays[name] for name in ("error", "gates_changed", "execution_rate")}
        drawn |= {"runs": np.array(names), "epsilons": np.array(epsilons), "quality": np.array(self.args.jpeg_quality)}
        numbers = {"epsilons": epsilons, "jpeg_quality": self.args.jpeg_quality, "runs": names}
        numbers |= {name: values.tolist() for name, values in arrays.items()}
        return Part({"robustness": drawn}, {"robustness": rows}, numbers, lines)

    def similarity(self) -> Part:
        """Agreement of graphs within and between classes."""
        found, (_, order, _) = self.classify(), self.clusters()
        opened, classes = found["opened"][:, self.subject.gated], found["classes"]
        how = (self.args.permutations, self.subject.args.seed)
        result = measures.similarity(opened, found["labels"], len(classes), *how)
        rows = [["class", *classes[order]], *([classes[k], *result["agreement"][k, order]] for k in order)]
        numbers = {name: float(result[name]) for name in ("within", "between", "excess", "p")}
        numbers |= {"shuffled_mean": float(result["shuffled"].mean()), "shuffled_std": float(result["shuffled"].std()),
                    "permutations": self.args.permutations}
        line = (f"similarity: graphs of a class agree in {numbers['within']:.4f} of the gates, of different classes in "
                f"{numbers['between']:.4f}; shuffled labels differ by {numbers['shuffled_mean']:.5f} +- "
                f"{numbers['shuffled_std']:.5f}, p = {numbers['p']:.3g}")
        drawn = {name: result[name] for name in ("agreement", "excess", "shuffled", "p")}
        drawn |= {"order": order, "classes": classes}
        return Part({"similarity": drawn}, {"similarity": rows}, numbers, [line])


PARTS: dict[str, Callable[[Analysis], Part]] = {
    "rates": Analysis.rates,
    "usage": Analysis.usage,
    "curve": Analysis.curve,
    "robustness": Analysis.robustness,
    "similarity": Analysis.similarity,
}
FILES = {"usage": ("usage", "extremes", "images")}  # what a part writes, if not just files of its own name


def analyze(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Computes the parts asked for, and writes each as soon as it is there."""
    utils.read_json(args.out / SUMMARY)  # what is wrong is better known before the work than after it
    subject = load_subject(args.resume, rest)
    if not subject.model.num_gates:
        raise InputError(f"{args.resume} is a net without gates: analyze one with gates, and --compare this one")
    compared = [checkpoint_in(run) for run in args.compare]
    for path in compared:
        *_, checkpoint = open_network(path, rest)
        data.same_classes(subject.loader.classes, cli.recorded(checkpoint).get("classes", subject.loader.classes), path)
    names = unique([subject.name, *(Path(path).resolve().parent.name for path in compared)])
    subject.name = names[0]

    def others() -> Iterable[Subject]:
        """One after the other: their images need not be in memory together."""
        for path, name in zip(compared, names[1:], strict=True):
            other = load_subject(path, rest, name)
            if not torch.equal(other.loader.labels, subject.loader.labels):
                raise InputError(f"{path} is tested on other images than {args.resume}: give the data of both")
            analysis.compared[name] = provenance(other)
            yield other

    analysis = Analysis(subject, others, args)
    utils.make_folder(args.out, "--out")
    counts = subject.loader.labels.unique(return_counts=True)[1]
    pairs = len(counts) > 1 and counts.max() > 1
    parts = [name for name in dict.fromkeys(args.only) if pairs or name != "similarity"]
    if not pairs and "similarity" in args.only:
        print("similarity is left out: it needs two classes, and two images of one of them")
    for name in parts:
        part = PARTS[name](analysis)
        keep(args.out, name, part, {**provenance(subject), "compared": analysis.compared}, args.format)
        print("\n".join(part.lines), flush=True)
    print(f"written to {args.out}: {', '.join([*parts, SUMMARY])}")


def unique(names: Sequence[str]) -> list[str]:
    """The names, with numbers added to those that are there already."""
    found: list[str] = []
    for name in names:
        found.append(name if name not in found else f"{name} ({1 + len(found)})")
    return found


def provenance(subject: Subject) -> dict[str, Any]:
    """Where the numbers of a part come from."""
    args, epoch = subject.args, subject.checkpoint.get("epoch")
    return {
        "command": cli.command(),
        "checkpoint": args.resume,
        "epoch": epoch - 1 if isinstance(epoch, int) else None,
        "gate_mode": args.gate_mode,
        "threshold": args.threshold,
        "seed": args.seed,
        **cli.environment(subject.model),
    }


# ---------------------------------------------------------------------------------------------- single images


def show_images(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Prints the best guesses and the graph of each image, and draws them into --out."""
    script, flags, checkpoint = open_network(args.resume, rest, IMAGE_FLAGS)
    own = cli.recorded(checkpoint)
    if not {"classes", "mean", "std"} <= own.keys():
        raise InputError(f"{args.resume} does not record its classes and normalisation: train it with this program")
    model = script.make_model(flags, len(own["classes"]))
    cli.prepare(flags, checkpoint, model)
    device, transform = next(model.parameters()).device, script.image_transform(flags)
    seen = torch.stack([transform(data.read_image(path)) for path in args.image])  # (n, 3, H, W) uint8
    pixels, cost = measures.Pixels(own["mean"], own["std"], device), inference.macs(model, seen.shape[2:])
    torch.manual_seed(derive_seed(flags.seed, "image"))
    with torch.inference_mode():
        images = pixels.normalise(seen.to(device, torch.float32)).contiguous(memory_format=torch.channels_last)
        logits, gates = inference.accelerate(model.eval())(images)
    opened, macs = (torch.stack(gates, 1) > 0.5).cpu(), cost.executed(torch.stack(gates, 1)).cpu()
    guesses = [describe_guesses(row, own["classes"]) for row in logits.softmax(1).cpu()]
    gated = [block.gated for block in model.blocks()]
    for path, guess, graph, count in zip(args.image, guesses, opened.tolist(), macs.tolist(), strict=True):
        print(describe_graph(path, guess, graph, gated, model.stages, count, cost.dense))
    if args.out:
        names, best = [Path(path).name for path in args.image], [", ".join(guess[:3]) for guess in guesses]
        arrays = {"pixels": seen.permute(0, 2, 3, 1).numpy(), "files": np.array(names), "guesses": np.array(best),
                  "opened": opened.numpy(), "gated": np.array(gated), "stages": np.array(model.stages),
                  "macs": macs.numpy(), "dense": np.array(cost.dense)}
        utils.make_folder(args.out, "--out")
        draw(args.out, "graphs", arrays, args.format)
        print(f"written to {args.out}: graphs")


def describe_guesses(probabilities: Tensor, classes: Sequence[str]) -> list[str]:
    """The classes of the highest of probabilities (K,), with these in percent."""
    best = (values.tolist() for values in probabilities.topk(min(GUESSES, len(classes))))
    return [f"{classes[index]} {100 * value:.1f} %" for value, index in zip(*best, strict=True)]


def describe_graph(
    path: str,
    guesses: Sequence[str],
    opened: Sequence[bool],
    gated: Sequence[bool],
    stages: Sequence[int],
    macs: float,
    dense: float,
) -> str:
    """An image's best classes and its graph, a mark for each of the L blocks, in a few lines."""
    marks = ["." if not is_open else "#" if has_gate else "=" for is_open, has_gate in zip(opened, gated, strict=True)]
    ends = np.cumsum([0, *stages]).tolist()
    strips = [f"stage {number} {''.join(marks[start:end])}"
              for number, (start, end) in enumerate(pairwise(ends), start=1)]
    meaning = "# ran, . skipped" + ("" if all(gated) else ", = always runs")
    return "\n".join([
        f"{path}: {', '.join(guesses)}",
        f"  {'  '.join(strips)}   ({meaning})",
        f"  {sum(opened)} of {len(opened)} blocks; {macs / 1e6:.2f} MMACs, "
        f"{100 * macs / dense:.1f} % of the dense net's {dense / 1e6:.2f}",
    ])


# ---------------------------------------------------------------------------------------------- files


def check_vacant(folder: Path, parts: Iterable[str]) -> None:
    """Raises InputError if --out holds files of these parts already."""
    for name in (file for part in parts for file in FILES.get(part, (part,))):
        if found := [path.name for path in sorted(folder.glob(f"{name}.*"))]:
            raise InputError(f"{folder} already holds {', '.join(found)}: choose another --out, or add --overwrite")


def keep(folder: Path, name: str, part: Part, origin: dict[str, Any], form: str) -> None:
    """Writes the figures, arrays, tables and numbers of a part."""
    for figure, arrays in part.arrays.items():
        draw(folder, figure, arrays, form)
    for table, rows in part.tables.items():
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows(rows)
        with utils.atomic_write(folder / f"{table}.csv") as file:
            file.write(text.getvalue().encode())
    summary = utils.read_json(folder / SUMMARY)
    utils.write_json(folder / SUMMARY, {**summary, name: {**part.numbers, **origin}})


def draw(folder: Path, name: str, arrays: measures.Arrays, form: str) -> None:
    """Keeps arrays as NAME.npz and draws their figure."""
    for other in FORMATS:  # of an earlier analysis
        (folder / f"{name}.{other}").unlink(missing_ok=True)
    with utils.atomic_write(folder / f"{name}.npz") as file:
        np.savez_compressed(file, **arrays)
    render(folder, name, form)


def render(folder: Path, name: str, form: str) -> None:
    """Draws the figure of NAME.npz, which may hold more than that needs. Raises InputError if it is damaged."""
    function = figures.FIGURES[name]
    try:
        with (folder / f"{name}.npz").open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in function.__annotations__ if key != "return"}
        image = io.BytesIO()
        with matplotlib.rc_context(figures.STYLE):
            function(**arrays).savefig(image, format=form)
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{folder / name}.npz cannot be drawn ({error})") from error
    with utils.atomic_write(folder / f"{name}.{form}") as file:
        file.write(image.getvalue())


def redraw(folder: Path, form: str) -> None:
    """Draws the figures of an earlier analysis again."""
    names = [name for name in figures.FIGURES if (folder / f"{name}.npz").exists()]
    if not names:
        raise InputError(f"{folder} holds no arrays to draw from: analyze a checkpoint first")
    for name in utils.progress_bar(names, "drawing", len(names), "figure"):
        render(folder, name, form)
    print(f"drawn in {folder}: {', '.join(names)}")


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args, rest = make_parser().parse_known_args(argv)
    if processes.world().size > 1:
        raise InputError("analyze.py runs in one process: start it without torchrun")
    if not args.out and (args.redraw or not args.image):
        raise InputError("say where figures and tables go: --out DIR")
    if args.redraw:
        check_flags(make_parser(), argv, {"redraw", "out", "format"}, "--redraw")
        if rest:
            raise InputError(f"{' '.join(rest)} means nothing to --redraw: leave it out")
        redraw(args.out, args.format)
        return
    if args.image:
        check_flags(make_parser(), argv, {"image", "resume", "out", "overwrite", "format"}, "--image")
    if not args.resume:
        raise InputError("name the checkpoint: --resume runs/NAME/model_best.pth.tar")
    if args.out and not args.overwrite:
        check_vacant(args.out, ["graphs"] if args.image else args.only)
    (show_images if args.image else analyze)(args, rest)


if __name__ == "__main__":
    cli.main(main, "analyze.py")
