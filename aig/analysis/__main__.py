"""Shows what a trained ConvNet-AIG learned to skip, for whom, and what that does: the paper's figures 3 to 7.

    python -m aig.analysis --resume runs/NAME --out DIR
    python -m aig.analysis --resume runs/NAME --image FILE ...       # the graphs of single images
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path

from aig import checkpoint as files
from aig import distributed, runs
from aig.analysis import output, single
from aig.analysis.parts import PARTS, Analysis
from aig.analysis.subjects import Subject, open_model, open_subject
from aig.console import InputError, Parser, number, run_command, say
from aig.data import DATASETS, default_workers, same_classes

THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
EPSILONS = [Fraction(steps, 255) for steps in (0, 1, 2, 4, 8, 16)]
# flags whose values a checkpoint records
RECORDED = ("data", "dataset", "split", "gate_mode", "threshold", "batch_size", "seed", "gate_samples", "workers")


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


def make_parser() -> Parser:
    parser = Parser(prog="python -m aig.analysis", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--resume", required=True, metavar="RUN", help="the checkpoint or run folder to analyze")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where figures, tables and arrays go")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="what to compute (default: all)")
    parser.add_argument("--compare", nargs="+", metavar="RUN",
                        help="show these runs on the curve and in the robustness, too; plain ResNets included")
    parser.add_argument("--image", nargs="+", metavar="FILE", help="show these images' graphs instead")
    parser.add_argument("--thresholds", nargs="+", type=number(float, above=0, below=1), default=THRESHOLDS,
                        metavar="P", help="thresholds of P(open) on the curve (default: eleven from 0.05 to 0.95)")
    parser.add_argument("--epsilons", nargs="+", type=epsilon, default=EPSILONS, metavar="E",
                        help="strengths of the attack, in parts of the pixels' range (default: 0 to 16/255)")
    parser.add_argument("--jpeg-quality", type=number(int, 1, 100), default=75, metavar="Q",
                        help="quality at which attacked images are compressed")
    parser.add_argument("--permutations", type=number(int, 1), default=999, metavar="N",
                        help="shuffle the labels so often, to know which similarity is chance")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier analysis left in --out")
    parser.add_argument("--format", default="png", choices=output.FORMATS, help="format of the figures")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--test-size", type=number(int, 1), metavar="N",
                        help="take only N of the images, the same ones as --test")
    parser.add_argument("--dense", action="store_true", help="compute every branch and mask it, as in training")
    add_recorded_flags(parser.add_argument_group("as the checkpoint records it, unless given"))
    return parser


def add_recorded_flags(recorded: argparse._ArgumentGroup) -> None:
    recorded.add_argument("--data", default="data", metavar="DIR", help="the folder of the images")
    recorded.add_argument("--dataset", default="cifar10", choices=DATASETS, help="which small images")
    recorded.add_argument("--split", type=number(float, above=0, below=1), metavar="P",
                          help="DIR holds the class folders themselves: test on this part of each class")
    recorded.add_argument("--gate-mode", default="argmax", choices=("argmax", "sample"), help="how gates decide")
    recorded.add_argument("--threshold", type=number(float, above=0, below=1), default=0.5, metavar="P",
                          help="gate mode argmax opens a gate where P(open) is above this")
    recorded.add_argument("--batch-size", type=number(int, 2), default=256, metavar="N")
    recorded.add_argument("--seed", type=number(int, 0), default=1, metavar="N")
    recorded.add_argument("--gate-samples", type=number(int, 1), default=5, metavar="N",
                          help="draws of gate mode sample, of which the curve shows the mean")
    recorded.add_argument("--workers", type=number(int, 0, 1024), default=default_workers(), metavar="N",
                          help="processes that decode photographs")


def read_checkpoint(path: str, parser: Parser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict]:
    """A checkpoint and the flags with which to use it: as given, else as it records them, else the defaults."""
    checkpoint, given = files.load_checkpoint(path), parser.given(argv)
    own = files.recorded(checkpoint)
    inherited = parser.as_typed({name: own.get(name) for name in RECORDED if name not in given}, path)
    return argparse.Namespace(**{**vars(parser.parse_args(argv)), **inherited}), checkpoint


# ---------------------------------------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    if distributed.world().size > 1:
        raise InputError("the analysis runs in one process: start it without torchrun")
    if not args.out and not args.image:
        raise InputError("say where figures and tables go: --out DIR")
    if args.out and not args.overwrite:
        output.check_vacant(args.out, ["graphs"] if args.image else args.only)
    path, *compared = (find(run) for run in (args.resume, *(args.compare or ())))
    read = partial(read_checkpoint, parser=parser, argv=argv)
    if args.image:
        show_images(path, read(path)[0])
    else:
        analyze(path, compared, read)


def find(run: str) -> str:
    """The checkpoint of a run: the file itself, or the best one of a run folder."""
    return str(files.checkpoint_in(run, runs.BEST, runs.CHECKPOINT))


def analyze(path: str, compared: Sequence[str], read: Callable[[str], tuple[argparse.Namespace, dict]]) -> None:
    """Computes the parts asked for, and writes each as soon as it is there.

    Args:
        path, compared: the checkpoints to analyze, and to compare it with.
        read: opens one, see `read_checkpoint`.
    """
    args, checkpoint = read(path)
    runs.read_json(args.out / output.SUMMARY)  # if it is damaged, better say so before the work than after it
    subject = open_subject(path, args, checkpoint)
    if not subject.model.num_gates:
        raise InputError(f"{path} is a net without gates: analyze one with gates, and --compare this one")
    for other in compared:
        classes = files.recorded(read(other)[1]).get("classes", subject.loader.classes)
        same_classes(subject.loader.classes, classes, other)
    names = unique([subject.name, *(Path(other).resolve().parent.name for other in compared)])

    def others() -> Iterator[Subject]:
        for other, name in zip(compared, names[1:], strict=True):
            yield open_subject(other, *read(other), name)

    settings = (args.thresholds, [float(value) for value in sorted(set(args.epsilons))], args.jpeg_quality)
    analysis = Analysis(subject, others, *settings, args.permutations)
    runs.make_folder(args.out, "--out")
    parts = list(dict.fromkeys(args.only))
    if "similarity" in parts and not analysis.has_pairs:
        parts.remove("similarity")
        say("similarity is left out: it needs two classes, and two images of one of them")
    for name in parts:
        part = PARTS[name](analysis)
        origin = {**subject.provenance(), "compared": analysis.compared}
        output.keep(args.out, name, part, origin, args.format)
        say("\n".join(part.lines))
    say(f"written to {args.out}: {', '.join([*parts, output.SUMMARY])}")


def unique(names: Sequence[str]) -> list[str]:
    """The names, each that repeats an earlier one with a number added."""
    found: list[str] = []
    for name in names:
        found.append(name if name not in found else f"{name} ({1 + len(found)})")
    return found


def show_images(path: str, args: argparse.Namespace) -> None:
    """Prints the best guesses and the graph of each image, and draws them into --out."""
    part = single.graphs(open_model(path, args), args.image, args.seed)
    say("\n".join(part.lines))
    if args.out:
        runs.make_folder(args.out, "--out")
        output.draw(args.out, "graphs", part.arrays["graphs"], args.format)
        say(f"written to {args.out}: graphs")


if __name__ == "__main__":
    run_command(main, "aig.analysis")
