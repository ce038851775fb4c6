"""Shows what a trained ConvNet-AIG learned to skip, for whom, and what that does: the paper's figures 3 to 7.

    python -m aig.analysis --resume runs/NAME --out DIR
    python -m aig.analysis --resume runs/NAME --image FILE ...       # the graphs of single images
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np

from aig import checkpoint as files
from aig import distributed, runs
from aig.analysis import figures, parts
from aig.analysis.subjects import open_model, open_subject, with_others
from aig.console import ESCAPED, InputError, Parser, number, one_or_several, run_command, say
from aig.data import DATASETS, check_classes, default_workers, tested_split
from convnet_aig import RUNS_EVERYTHING

SUMMARY = "summary.json"
FORMATS = ("png", "pdf", "svg")
THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
EPSILONS = [steps / 255 for steps in (0, 1, 2, 4, 8, 16)]
# flags whose values a checkpoint records
RECORDED = ("data", "dataset", "split", "gate_mode", "threshold", "batch_size", "seed", "gate_samples", "workers")


# ---------------------------------------------------------------------------------------------- flags


def make_parser() -> Parser:
    parser = Parser(prog="python -m aig.analysis", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--resume", required=True, metavar="RUN", help="the checkpoint or run folder to analyze")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where figures, tables and arrays go")
    parser.add_argument("--only", nargs="+", choices=parts.PARTS, default=parts.PARTS,
                        help="what to compute (default: all)")
    parser.add_argument("--compare", nargs="+", default=[], metavar="RUN",
                        help="show these runs on the curve and in the robustness, too; plain ResNets included")
    parser.add_argument("--image", nargs="+", metavar="FILE", help="show these images' graphs instead")
    parser.add_argument("--thresholds", nargs="+", type=number(float, above=0, below=1), default=THRESHOLDS,
                        metavar="P", help="thresholds of P(open) on the curve (default: eleven from 0.05 to 0.95)")
    parser.add_argument("--epsilons", nargs="+", type=number(Fraction, 0, 1), default=EPSILONS, metavar="E",
                        help="strengths of the attack, such as 4/255 of the pixels' range (default: 0 to 16/255)")
    parser.add_argument("--jpeg-quality", type=number(int, 1, 100), default=75, metavar="Q",
                        help="quality at which attacked images are compressed")
    parser.add_argument("--permutations", type=number(int, 1), default=999, metavar="N",
                        help="number of shuffles of the labels, for the chance level of the similarity")
    parser.add_argument("--budget", type=number(float, above=0, below=1), metavar="B",
                        help="use the thresholds that --test --budget B has found, for each run with gates")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier analysis left in --out")
    parser.add_argument("--format", default="png", choices=FORMATS, help="format of the figures")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--test-size", type=number(int, 1), metavar="N",
                        help="take only N of the images, the same ones as --test")
    recorded = parser.add_argument_group("as the checkpoint records it, unless given")
    recorded.add_argument("--data", default="data", metavar="DIR", help="the folder of the images")
    recorded.add_argument("--dataset", default="cifar10", choices=DATASETS, help="which small images")
    recorded.add_argument("--split", type=number(float, above=0, below=1), metavar="P",
                          help="DIR holds the class folders themselves: test on this fraction of each class")
    recorded.add_argument("--gate-mode", default="argmax", choices=("argmax", "sample"), help="how gates decide")
    recorded.add_argument("--threshold", type=one_or_several(number(float, above=0, below=1)), default=0.5, metavar="P",
                          help="gate mode argmax opens a gate where P(open) is above this")
    recorded.add_argument("--batch-size", type=number(int, 2), default=256, metavar="N")
    recorded.add_argument("--seed", type=number(int, 0), default=1, metavar="N")
    recorded.add_argument("--gate-samples", type=number(int, 1), default=5, metavar="N",
                          help="draws of gate mode sample, of which the curve shows the mean")
    recorded.add_argument("--workers", type=number(int, 0, 1024), default=default_workers(), metavar="N",
                          help="processes that decode photographs")
    return parser


def flags_for(run: str, parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags with which to use a run: as given, else as its checkpoint records them, else the defaults.

    Beside them `path` of the checkpoint, all that is `recorded` in it, and `epoch`, those it was trained for.
    """
    path = str(files.checkpoint_in(run, *files.TRAINED))
    checkpoint, given = files.load_checkpoint(path), parser.given(argv)
    own, following = files.recorded(checkpoint), checkpoint.get("epoch")
    args = parser.parse_args(argv)
    if own.get("gate_mode") in RUNS_EVERYTHING and "gate_mode" not in given:
        if not args.budget and any(rate < 1 for rate in own.get("block_rates", [0])):
            how = f"records gate mode {own['gate_mode']}, which runs every branch: add --gate-mode argmax"
            raise InputError(f"{path} {how}")
        own = {**own, "gate_mode": "argmax"}  # the budget's, or the same as any other without gates
    inherited = parser.as_typed({name: own.get(name) for name in RECORDED if name not in given}, path)
    epoch = following - 1 if isinstance(following, int) else None
    flags = argparse.Namespace(**{**vars(args), **inherited}, path=path, recorded=own, epoch=epoch)
    if not args.image:  # which needs no test images
        recorded = {**own, **parser.as_typed({"split": own.get("split")}, path)}
        flags.split = tested_split(flags.split, flags.data, recorded, given, path)
    return flags


# ---------------------------------------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args, given = parser.parse_args(argv), parser.given(argv)
    if args.budget and ("threshold" in given or given.get("gate_mode", "argmax") != "argmax"):
        raise InputError("--budget brings thresholds of its own, for gate mode argmax: leave out the other flag")
    if distributed.world().size > 1:
        raise InputError("the analysis runs in one process: start it without torchrun")
    if not args.out and not args.image:
        raise InputError("say where figures and tables go: --out DIR")
    if args.out and not args.overwrite:
        check_vacant(args.out, ["graphs"] if args.image else args.only)
    flags = flags_for(args.resume, parser, argv)
    if args.image:
        show_images(flags)
    else:
        analyze(flags, [flags_for(run, parser, argv) for run in args.compare])


def analyze(flags: argparse.Namespace, compared: Sequence[argparse.Namespace]) -> None:
    """Computes the parts asked for, and writes each as soon as it is there."""
    summary = flags.out / SUMMARY
    runs.read_json(summary)  # if it is damaged, better say so before the work than after it
    subject = open_subject(flags)
    if not subject.model.num_gates:
        raise InputError(f"{flags.path} is a net without gates: analyze one with gates, and --compare this one")
    for other in compared:
        check_classes(subject.loader.classes, other.recorded.get("classes", subject.loader.classes), other.path)
    epsilons = sorted(set(map(float, flags.epsilons)))
    compute = {
        "rates": partial(parts.rates, subject),
        "usage": partial(parts.usage, subject),
        "curve": partial(parts.curve, with_others(subject, compared), flags.thresholds),
        "robustness": partial(parts.robustness, with_others(subject, compared), epsilons, flags.jpeg_quality),
        "similarity": partial(parts.similarity, subject, flags.permutations),
    }
    runs.make_folder(flags.out, "--out")
    for name in dict.fromkeys(flags.only):
        part = compute[name]()
        write(flags.out, part, flags.format)
        numbers = {**part.numbers, **subject.provenance(), "compared": subject.compared}
        runs.write_json(summary, {**runs.read_json(summary), name: numbers})
        say("\n".join(part.lines))
    say(f"written to {flags.out}")


def show_images(flags: argparse.Namespace) -> None:
    """Prints the best guesses and the graph of each image, and draws them into --out."""
    part = parts.graphs(open_model(flags), flags.image, flags.seed)
    say("\n".join(part.lines))
    if flags.out:
        runs.make_folder(flags.out, "--out")
        write(flags.out, part, flags.format)
        say(f"written to {flags.out}")


# ---------------------------------------------------------------------------------------------- its files


def check_vacant(folder: Path, names: Sequence[str]) -> None:
    """Raises InputError if --out holds results of these parts already."""
    written = {*names, *(parts.USAGE_FILES if "usage" in names else ())}
    if found := sorted(path.name for path in folder.glob("*.*") if path.stem in written):
        raise InputError(f"{folder} already holds {', '.join(found)}: choose another --out, or add --overwrite")


def write(folder: Path, part: parts.Part, form: str) -> None:
    """Writes the tables of a part, and each figure as an image and as the arrays that it is drawn from."""
    for table, rows in part.tables.items():
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows(rows)
        with runs.atomic_write(folder / f"{table}.csv") as file:
            file.write(text.getvalue().encode(errors=ESCAPED))
    for name, arrays in part.arrays.items():
        for other in FORMATS:  # of an earlier analysis
            (folder / f"{name}.{other}").unlink(missing_ok=True)
        with runs.atomic_write(folder / f"{name}.npz") as file:
            np.savez_compressed(file, **arrays)
        with runs.atomic_write(folder / f"{name}.{form}") as file, matplotlib.rc_context(figures.STYLE):
            figures.FIGURES[name](**arrays).savefig(file, format=form)


if __name__ == "__main__":
    run_command(main, "aig.analysis")
