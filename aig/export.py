"""Writes a network as an ONNX file in which closed branches cost nothing, for engines other than PyTorch.

    python -m aig.export --resume runs/NAME --out model.onnx                 # for single images: each block is an `If`
    python -m aig.export --resume runs/NAME --out model.onnx --batch any     # open rows are gathered and scattered
    python -m aig.export --resume runs/NAME --folder DIR                     # not ONNX: a model folder, see aig.folders

The graph is written node by node from the folded network of `aig.accelerate`, under the names of the network's modules.
`aig.runtime` runs the file.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import aig
from aig import folders
from aig.budget import EXTREME, recorded_scores
from aig.console import InputError, Parser, number, one_or_several, run_command, say
from aig.images import Normaliser, Preprocess
from aig.inference import Accelerated, ConditionalBlock, Convolution, count_macs
from aig.networks import load
from aig.runs import atomic_write
from aig.runtime import PROGRAM, Session, require
from convnet_aig import AdaptiveResNet, FoldedGate, GatedBlock, ResNet_ImageNet, check_thresholds, log_odds

try:
    from onnx import GraphProto, ModelProto, TensorProto, checker, helper, numpy_helper
except ImportError:  # `export_onnx` says so
    helper = None

OPSET, IR = 18, 8  # of the end of 2022: all engines in use read them
CHECKED, ATTEMPTS = 8, 10  # images for each pattern of open gates; draws until that many are clear
CLOSE = 1e-4  # log-odds nearer than this to a threshold may decide either way
TOLERANCE = 1e-4  # of the logits, absolute, or relative to the largest


# ---------------------------------------------------------------------------------------------- nodes


class Graph:
    """Nodes and constants in the making: the main graph, or a branch of an `If`, which sees what is around it."""

    def __init__(self, name: str) -> None:
        self.name = name  # the names of nodes and constants without one of their own begin with it
        self.nodes, self.constants = [], []

    def add(self, kind: str, *inputs: Any, out: str | Sequence[str] = "", **attributes: Any) -> str:
        """Appends a node and returns the name of its first output. Inputs that are not names become constants."""
        out = out or f"{self.name}.{kind}{len(self.nodes)}"
        outputs = [out] if isinstance(out, str) else list(out)
        names = [
            value if isinstance(value, str) else self.constant(f"{outputs[0]}.{index}", value)
            for index, value in enumerate(inputs)
        ]
        self.nodes.append(helper.make_node(kind, names, outputs, outputs[0], **attributes))
        return outputs[0]

    def constant(self, name: str, value: Any) -> str:
        array = torch.as_tensor(value).detach().contiguous().numpy()
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def branch(self, *outputs: str) -> GraphProto:
        infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        return helper.make_graph(self.nodes, self.name, [], infos, self.constants)


def convolution(graph: Graph, conv: Convolution, x: str, out: str) -> str:
    """conv(x), its BatchNorm included."""
    geometry = {"strides": conv.stride, "pads": [*conv.padding, *conv.padding], "group": conv.groups}
    shape = list(conv.weight.shape[2:])
    return graph.add("Conv", x, conv.weight, conv.bias, out=out, kernel_shape=shape, **geometry)


def pool(graph: Graph, x: str, out: str) -> str:
    """The channels' means, which the gates and the head take: (N, C, H, W) -> (N, C)."""
    return graph.add("ReduceMean", x, [2, 3], out=out, keepdims=0)


def decide(graph: Graph, gate: FoldedGate, pooled: str, threshold: float, place: str) -> str:
    """Whether the gate opens, (N,) bool. Its threshold is a constant under a name of its own, as log-odds.

    Raises ValueError if the gate's class does not say of which linear layers it is made.
    """
    if "linear_layers" not in vars(type(gate)):
        raise ValueError(f"a {type(gate).__name__} cannot be exported: give it linear_layers (docs/extending.md)")
    h = pooled
    for index, (weight, bias) in enumerate(gate.linear_layers(), start=1):
        if index > 1:
            h = graph.add("Relu", h, out=f"{place}.gate.relu{index - 1}")
        h = graph.add("Gemm", h, weight, bias, out=f"{place}.gate.fc{index}")
    limit = graph.constant(f"{place}.gate.threshold", torch.tensor([log_odds(threshold)]))
    score = graph.add("Reshape", h, [-1], out=f"{place}.gate.score")  # (N,)
    return graph.add("Greater", score, limit, out=f"{place}.gate.open")


# ---------------------------------------------------------------------------------------------- blocks


def residual(graph: Graph, block: ConditionalBlock, x: str, place: str) -> str:
    """F(x)."""
    for index, conv in enumerate(block.inner, start=1):
        x = graph.add("Relu", convolution(graph, conv, x, f"{place}.conv{index}"), out=f"{place}.relu{index}")
    return convolution(graph, block.last, x, f"{place}.conv{len(block.inner) + 1}")


def shortcut(graph: Graph, block: ConditionalBlock, x: str, place: str) -> str:
    return x if block.shortcut is None else convolution(graph, block.shortcut, x, f"{place}.shortcut")


def always(graph: Graph, block: ConditionalBlock, x: str, place: str) -> str:
    """The output relu(shortcut(x) + F(x)) of a block that always runs."""
    total = graph.add("Add", residual(graph, block, x, place), shortcut(graph, block, x, place), out=f"{place}.sum")
    return graph.add("Relu", total, out=place)


def one_image(graph: Graph, block: ConditionalBlock, x: str, pooled: str, is_open: str, place: str) -> tuple[str, str]:
    """A block as an `If`: its output, and the means of that, pooled in the branch because the data is at hand there.

    ONNX Runtime takes its blocked layout for convolutions whose weights are in the branch; see results/export.md.
    """
    run, skip = Graph(f"{place}.run"), Graph(f"{place}.skip")
    if block.shortcut is None:  # x is what a ReLU left, and its means are known
        base, kept, means = x, skip.add("Identity", x), skip.add("Identity", pooled)
    else:  # in both branches: ONNX Runtime before 1.23 aborts at a Conv whose output only an `If` takes
        base, passed = (convolution(branch, block.shortcut, x, f"{branch.name}.shortcut") for branch in (run, skip))
        kept = skip.add("Relu", passed, out=f"{place}.skip.shortcut.relu")
        means = pool(skip, kept, f"{place}.skip.pooled")
    total = run.add("Add", residual(run, block, x, place), base, out=f"{place}.sum")
    total = run.add("Relu", total, out=f"{place}.run")
    graph.add(
        "If", is_open, out=[place, f"{place}.pooled"],
        then_branch=run.branch(total, pool(run, total, f"{place}.run.pooled")), else_branch=skip.branch(kept, means),
    )
    return place, f"{place}.pooled"


def open_rows(graph: Graph, block: ConditionalBlock, x: str, pooled: str, is_open: str, place: str) -> tuple[str, str]:
    """A block that gathers the M rows whose gate is open, runs and scatters them: its output, and the means of that."""
    rows = graph.add("Transpose", graph.add("NonZero", is_open, out=f"{place}.found"), out=f"{place}.rows")  # (M, 1)
    base = shortcut(graph, block, x, place)
    taken = graph.add("GatherND", x, rows, out=f"{place}.taken")
    at_rows = taken if block.shortcut is None else graph.add("GatherND", base, rows, out=f"{place}.base")
    total = graph.add("Add", residual(graph, block, taken, place), at_rows, out=f"{place}.sum")
    if block.shortcut is None:
        total = graph.add("Relu", total, out=f"{place}.run")
        graph.add("ScatterND", x, rows, total, out=place)
        means = pool(graph, total, f"{place}.run.pooled")
        return place, graph.add("ScatterND", pooled, rows, means, out=f"{place}.pooled")
    graph.add("Relu", graph.add("ScatterND", base, rows, total, out=f"{place}.all"), out=place)
    return place, pool(graph, place, f"{place}.pooled")


# ---------------------------------------------------------------------------------------------- pixels


def from_pixels(graph: Graph, pixels: str, preprocess: Preprocess) -> str:
    """Pixels (N, H, W, 3) uint8 of any size -> images (N, 3, size, size) as `preprocess` makes them.

    Resizing and cropping are products with two matrices of weights, computed from H and W in whole numbers, and rounded
    as Pillow rounds. So all engines give Pillow's pixels, except for a few per cent that lie in the middle between two
    grey levels. A `Resize` node is up to 14 levels off in ONNX Runtime; in OpenVINO it does not antialias.
    """
    normaliser, size = Normaliser(preprocess.mean, preprocess.std), preprocess.size
    old = graph.add("Shape", pixels, start=1, end=3)  # (2,): H, W
    scaled = graph.add("Mul", old, [preprocess.short_side])
    new = graph.add("Div", scaled, graph.add("ReduceMin", old, keepdims=1))  # (2,): before the crop; rounds down
    excess = graph.add("Cast", graph.add("Sub", new, [size]), to=TensorProto.FLOAT)
    margins = graph.add("Cast", graph.add("Round", graph.add("Mul", excess, [0.5])), to=TensorProto.INT64)
    rows, columns = (
        resizing(graph, size, *(graph.add("Gather", values, axis) for values in (old, new, margins))) for axis in (0, 1)
    )
    x = graph.add("Cast", graph.add("Transpose", pixels, perm=[0, 3, 1, 2]), to=TensorProto.FLOAT)
    x = graph.add("MatMul", x, graph.add("Transpose", columns, perm=[1, 0]))  # (N, 3, H, size)
    x = graph.add("Floor", graph.add("Add", x, [0.5]))
    x = graph.add("MatMul", rows, x)  # (N, 3, size, size)
    x = graph.add("Floor", graph.add("Add", x, [0.5]))
    return graph.add("Add", graph.add("Mul", x, normaliser.scale), normaliser.shift, out="images")


def resizing(graph: Graph, size: int, old: str, new: str, margin: str) -> str:
    """The weights (size, old) that resize an axis from `old` to `new` pixels, of which the middle `size` are kept.

    Each row is a triangle of total 1 around the centre of a new pixel, wider when shrinking. From n to m pixels
    w[i, j] ~ max(0, 1 - |(2j + 1) m - (2i + 1) n| / (2 max(n, m))).
    """
    i = graph.add("Add", [[place] for place in range(size)], margin)
    j = graph.add("Range", 0, old, 1)
    centres = [graph.add("Mul", graph.add("Add", graph.add("Mul", at, 2), 1), by) for at, by in ((j, new), (i, old))]
    distance = graph.add("Cast", graph.add("Abs", graph.add("Sub", *centres)), to=TensorProto.FLOAT)
    reach = graph.add("Cast", graph.add("Mul", graph.add("Max", old, new), 2), to=TensorProto.FLOAT)
    weights = graph.add("Relu", graph.add("Sub", 1.0, graph.add("Div", distance, reach)))
    return graph.add("Div", weights, graph.add("ReduceSum", weights, [1]))


# ---------------------------------------------------------------------------------------------- the file


@dataclass(frozen=True)
class Form:
    """What a file takes."""

    batch: int | str  # 1, or "any"
    size: tuple[int, int]  # height and width of the network's images
    preprocess: Preprocess | None  # how they are made of pictures, if that is known
    uint8: bool  # whether the file does that, and takes pixels


def build(model: AdaptiveResNet, form: Form) -> ModelProto:
    """The graph from "images" (N, 3, H, W) or "pixels" (N, H, W, 3) to "logits" (N, K) and "gates" (N, L).

    The latter are z, 1 for a block that always runs.
    """
    folded, graph, count = Accelerated(model), Graph("main"), 1 if form.batch == 1 else "N"
    if form.uint8:
        entry = helper.make_tensor_value_info("pixels", TensorProto.UINT8, [count, "height", "width", 3])
        x = from_pixels(graph, "pixels", form.preprocess)
    else:
        x, entry = "images", helper.make_tensor_value_info("images", TensorProto.FLOAT, [count, 3, *form.size])
    true = helper.make_tensor("true", TensorProto.BOOL, [1], [True])
    always_open = graph.add("ConstantOfShape", graph.add("Shape", x, end=1), value=true)  # (N,)
    x = graph.add("Relu", convolution(graph, folded.conv1, x, "conv1"), out="conv1.relu")
    if isinstance(folded.maxpool, nn.MaxPool2d):
        kernel, stride, padding = ([getattr(folded.maxpool, name)] * 2 for name in ("kernel_size", "stride", "padding"))
        x = graph.add("MaxPool", x, out="maxpool", kernel_shape=kernel, strides=stride, pads=padding * 2)
    places = [name for name, module in model.named_modules() if isinstance(module, GatedBlock)]
    thresholds = iter(check_thresholds(model.threshold, model.num_gates))
    conditional = one_image if form.batch == 1 else open_rows
    pooled, opened = None, []  # known means of x; by block (N,) bool
    for place, block in zip(places, folded.blocks, strict=True):
        if block.gate is None or model.gate_mode == "all":
            x, pooled = always(graph, block, x, place), None
            opened.append(always_open)
        else:
            pooled = pooled or pool(graph, x, f"{place}.gate.pooled")
            opened.append(decide(graph, block.gate, pooled, next(thresholds), place))
            x, pooled = conditional(graph, block, x, pooled, opened[-1], place)
    pooled = pooled or pool(graph, x, "pooled")
    graph.add("Gemm", pooled, folded.linear.weight, folded.linear.bias, out="logits", transB=1)
    z = graph.add("Cast", graph.add("Concat", *opened, axis=0), to=TensorProto.FLOAT)  # (L * N,)
    graph.add("Transpose", graph.add("Reshape", z, [len(opened), -1]), out="gates", perm=[1, 0])
    widths = {"logits": folded.linear.out_features, "gates": len(opened)}
    exits = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [count, width]) for name, width in widths.items()]
    main = helper.make_graph(graph.nodes, PROGRAM, [entry], exits, graph.constants)
    return helper.make_model(main, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR, producer_name=PROGRAM)


def export_onnx(
    model: AdaptiveResNet, path: str | Path, batch: int | str = 1, size: int | Sequence[int] | None = None,
    uint8: bool = False, licence: str = "", overwrite: bool = False,
) -> None:
    """Writes a network, with the thresholds that it has now, to an ONNX file, after checking what the file computes.

    In gate mode "argmax" the file skips; of a model in mode "all" it is the dense network, a baseline.

    Args:
        model: stays as it is; exported as for `model.eval()`, in float32.
        batch: 1, for a file that takes single images; "any", for one that takes any number of them.
        size: of the images, height and width or one number for both. None: the size that the network was made for.
        uint8: take pixels (N, H, W, 3) of any size; resizing, cropping and normalising them is part of the file.
        licence: of the weights; kept in the file.
        overwrite: replace what is at `path`.

    Raises:
        ValueError: if the network cannot be exported, or the file computes something else; nothing is written then.
        ImportError: if onnx or onnxruntime is not installed.
    """
    for package in ("onnx", "onnxruntime"):
        require(package)
    path, form = Path(path), form_of(model, batch, size, uint8)
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: " + ("it is a folder" if path.is_dir() else f"no folder {path.parent}"))
    if path.exists() and not overwrite:
        raise ValueError(f"{path} is there already: overwrite it, or choose another name")
    said = {name: json.dumps(value) for name, value in properties(model, form, licence).items()}
    content = checked(copy.deepcopy(model).cpu().float().eval(), form, said)
    with atomic_write(path) as target:
        target.write(content)


def form_of(model: AdaptiveResNet, batch: int | str, size: int | Sequence[int] | None, uint8: bool) -> Form:
    """What the arguments of `export_onnx` ask for. Raises ValueError if there can be no such file of this model."""
    preprocess = getattr(model, "preprocess", None)
    if size is None:
        size = preprocess.size if preprocess else 224 if isinstance(model, ResNet_ImageNet) else 32
    size = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size {size}: must be a number of pixels, or height and width, at least 1 each")
    height, width = size = tuple(map(int, size))
    if batch not in (1, "any"):
        raise ValueError(f'batch {batch!r}: must be 1 or "any"')
    if model.gate_mode not in ("argmax", "all"):
        raise ValueError(f"gate mode {model.gate_mode!r} cannot be exported, only 'argmax' (and 'all', the dense net)")
    preprocess = replace(preprocess, size=height) if preprocess and height == width else None
    if uint8 and preprocess is None:
        raise ValueError("uint8 needs a network with `preprocess`, as aig.load gives it, and square images")
    return Form(batch, size, preprocess, uint8)


def properties(model: AdaptiveResNet, form: Form, licence: str) -> dict[str, Any]:
    """What the file says of the network, by the names in `runtime.METADATA`."""
    cost, how = count_macs(model, form.size), form.preprocess
    return {
        "program": f"{PROGRAM} {aig.__version__}",
        "batch": form.batch,
        "uint8": form.uint8,
        "image_size": form.size,
        "preprocess": how and {"short_side": how.short_side, "size": how.size, "mean": how.mean, "std": how.std},
        "classes": getattr(model, "classes", None) or [str(index) for index in range(model.linear.out_features)],
        "macs": {"dense": cost.dense, **asdict(cost)},
        "gated": [block.gated for block in model.blocks()],
        "gate_mode": model.gate_mode,
        "threshold": check_thresholds(model.threshold, model.num_gates),
        "licence": licence,
    }


# ---------------------------------------------------------------------------------------------- the check


def draw(form: Form, random: torch.Generator) -> tuple[np.ndarray, Tensor]:
    """Random images, as the file takes them and as the network does."""
    if not form.uint8:
        images = torch.randn(CHECKED, 3, *form.size, generator=random)
        return images.numpy(), images
    side = form.preprocess.short_side  # not to be resized, where a pixel may differ by a level
    pixels = torch.randint(256, (CHECKED, side, side + 5, 3), dtype=torch.uint8, generator=random).numpy()
    return pixels, torch.stack([form.preprocess(Image.fromarray(picture)) for picture in pixels])


def checked(model: AdaptiveResNet, form: Form, said: dict[str, str]) -> bytes:
    """Builds the file with these properties, compares it with the model in ONNX Runtime, and returns its bytes.

    Compared are the model's own thresholds, and others at which all gates are open, none is, and each is for about
    half the images. Raises ValueError if the two differ.
    """
    usual, trials, random = model.threshold, [], torch.Generator().manual_seed(0)
    if model.num_gates and model.gate_mode == "argmax":
        _, _, scores = decisions(model, draw(form, random)[1])
        middle = scores.median(0).values + 100 * CLOSE  # (G,); some gates are constant
        middle = middle.clamp(-EXTREME, EXTREME)
        odds = (torch.full_like(middle, -EXTREME), torch.full_like(middle, EXTREME), middle)
        trials = [torch.sigmoid(each.double()).tolist() for each in odds]
    for threshold in [*trials, usual]:
        model.threshold = threshold
        proto = build(model, form)
        helper.set_model_props(proto, said)
        content = proto.SerializeToString()
        checker.check_model(content)
        session = Session(content, streams=1)
        given, logits, gates = clear_images(model, form, random)
        compare(session, given, logits, gates)
        compare(session, given[:1], logits[:1], gates[:1])
    return content


@torch.no_grad()
def decisions(model: AdaptiveResNet, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (N, K), z (N, L), and the log-odds of the gates that decided, (N, G)."""
    with recorded_scores(model) as scores:
        logits, gates = model(images)
    return logits, torch.stack(gates, 1), torch.stack(scores, 1) if scores else logits.new_empty(len(images), 0)


def clear_images(model: AdaptiveResNet, form: Form, random: torch.Generator) -> tuple[np.ndarray, Tensor, Tensor]:
    """Images as the file takes them, about which no gate is undecided, with the logits and z that the model has."""
    found = []
    for _ in range(ATTEMPTS):
        given, images = draw(form, random)
        logits, gates, scores = decisions(model, images)
        odds = [log_odds(threshold) for threshold in check_thresholds(model.threshold, model.num_gates)]
        clear = ((scores - torch.tensor(odds)[: scores.shape[1]]).abs() >= CLOSE).all(1)
        found.append((given[clear.numpy()], logits[clear], gates[clear]))
        if sum(len(images) for images, _, _ in found) >= CHECKED:
            givens, *wanted = zip(*found, strict=True)
            return np.concatenate(givens), *map(torch.cat, wanted)
    raise ValueError(f"cannot be checked: for most images some gate is within {CLOSE:g} of its threshold, in log-odds: "
                     "change the threshold a little")


def compare(session: Session, given: np.ndarray, logits: Tensor, gates: Tensor) -> None:
    """Raises ValueError if a session does not give these logits (N, K) and gates (N, L)."""
    found, decided = map(torch.from_numpy, session(given))
    wrong, error = int((decided != gates).sum()), (found - logits).abs().max().item()
    if wrong or not error <= TOLERANCE * max(1, logits.abs().max().item()):
        raise ValueError(f"the file would not compute what the network does: {wrong} of {gates.numel()} gates decide "
                         f"differently, logits differ by {error:.2g}; nothing is written")


# ---------------------------------------------------------------------------------------------- the command


def make_parser() -> Parser:
    parser = Parser(prog="python -m aig.export", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--resume", required=True, metavar="RUN", help="the checkpoint or run folder (its best model)")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, metavar="FILE", help="the file to write, such as model.onnx")
    target.add_argument("--folder", type=Path, metavar="DIR", help="the model folder to write instead, see aig.folders")
    parser.add_argument("--batch", choices=("1", "any"), default="1", help="how many images the file takes at a time")
    parser.add_argument("--size", type=number(int, 8, 4096), metavar="PIXELS",
                        help="height and width of the images (default: as in training)")
    parser.add_argument("--uint8", action="store_true",
                        help="take pixels of images of any size; the file then resizes and normalises them")
    decides = parser.add_mutually_exclusive_group()
    decides.add_argument("--threshold", type=one_or_several(number(float, above=0, below=1)), metavar="P[,P,...]",
                         help="gates open where P(open) is above this (default: as the checkpoint records it)")
    decides.add_argument("--budget", type=number(float, above=0, below=1), metavar="B",
                         help="take the thresholds that --test --budget B found")
    decides.add_argument("--dense", action="store_true", help="the plain ResNet instead: all branches, no gates")
    parser.add_argument("--licence", default="", metavar="TEXT", help="of the weights; kept in the file")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there already")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args, given = parser.parse_args(argv), parser.given(argv)
    if of_file := [name for name in ("batch", "size", "uint8", "dense") if args.folder and name in given]:
        raise InputError(f"--{of_file[0]} is about an ONNX file: leave it out with --folder")
    model = load(args.resume, args.budget)
    model.threshold = args.threshold or model.threshold
    model.gate_mode = "all" if args.dense else model.gate_mode
    batch = 1 if args.batch == "1" else args.batch
    try:
        if args.folder:
            folders.save(model, args.folder, args.resume, args.licence, args.overwrite)
            say(f"{args.folder}: a model folder; aig.load reads it")
            return
        export_onnx(model, args.out, batch, args.size, args.uint8, args.licence, args.overwrite)
    except (ValueError, ImportError, OSError) as error:
        raise InputError(str(error)) from error
    say(f"{args.out}: {args.out.stat().st_size:,} bytes; computes what the network does")


if __name__ == "__main__":
    run_command(main, "aig.export")
