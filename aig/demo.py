"""A page in the browser that shows which blocks an image uses.

    pip install ".[demo]"
    python -m aig.demo                  # the network that comes with the repository; or a run, a model folder, ...

For an image, or two side by side: its classes, its graph block by block, what that costs, and a slider for the
threshold at which gates open. The page needs no internet, and other machines cannot reach it.
"""

from __future__ import annotations

import html
import os
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

import aig
from aig.budget import recorded_scores
from aig.checkpoint import TRAINED, checkpoint_in, load_checkpoint
from aig.console import InputError, Parser, number, run_command, say
from aig.images import read_image
from aig.inference import Macs, count_macs
from aig.networks import fetched, results_of
from aig.palette import HUES, rgb
from convnet_aig import AdaptiveResNet

HERE = Path(__file__).parent
ROOT = HERE if (HERE / "released").exists() else HERE.parent  # installed, or a checkout
RELEASED = ROOT / ("released" if ROOT == HERE else "results/model") / "aig20-cifar10-jpeg-floor"
EXAMPLES = ROOT / ("examples" if ROOT == HERE else "docs/images")
HOST = "127.0.0.1"
GUESSES = 5  # classes shown
STEP = 0.005  # of the slider
LARGEST = "20mb"  # of an uploaded file
NARROW = 50  # resizing an image this many times longer than wide would need too much memory
KEPT = 3600  # seconds that an uploaded file is kept
CSS = """
.graph { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 12px; }
.graph .blocks { display: flex; flex-wrap: wrap; gap: 3px; }
.graph .block { width: 30px; height: 30px; line-height: 28px; text-align: center; box-sizing: border-box;
                border: 1px solid var(--body-text-color); border-radius: 3px; }
.graph .ran { background: BLUE; color: white; }
.graph .skipped { border-style: dashed; }
.graph .always { background: repeating-linear-gradient(45deg, #999, #999 3px, #bbb 3px, #bbb 6px); }
.bars { display: grid; grid-template-columns: minmax(auto, 45%) 1fr max-content; gap: 4px 8px; margin: 8px 0 16px;
        align-items: center; font-size: 13px; }
.bars div:nth-child(3n) { text-align: right; }
.bars .bar { height: 10px; min-width: 1px; background: #999; border-radius: 2px; }
.bars .own { background: BLUE; }
.picture img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated; }
#threshold { position: sticky; top: 0; z-index: 10; }
footer { display: none !important; }
""".replace("BLUE", rgb(HUES[0]))


@dataclass(frozen=True)
class Graph:
    """What the network did with an image."""

    probabilities: dict[str, float]  # by the name of the class
    opened: list[bool]  # (L,), whether each block ran
    p_open: list[float]  # (L,), what its gate said; NaN for a block without one
    macs: float  # multiply-accumulates


@torch.no_grad()
def look(model: AdaptiveResNet, cost: Macs, path: str | Path, threshold: float | Sequence[float]) -> Graph:
    """The graph of an image file at a threshold. Raises InputError if the file is no image, or a very narrow one."""
    model.threshold, picture = threshold, read_image(path)
    if max(picture.size) > NARROW * min(picture.size):
        raise InputError(f"{path} is {picture.width} x {picture.height} pixels: too narrow")
    image = model.preprocess(picture)[None]
    with recorded_scores(model) as scores:
        logits, gates = model(image)
    odds = iter(scores)
    p_open = [next(odds).sigmoid().item() if block.gated else np.nan for block in model.blocks()]
    probabilities = dict(zip(model.classes, logits.softmax(1)[0].tolist(), strict=True))
    z = torch.stack(gates, dim=1)
    return Graph(probabilities, [value > 0.5 for value in z[0].tolist()], p_open, cost.executed(z).item())


# ---------------------------------------------------------------------------------------------- what is drawn


def draw(graph: Graph, cost: Macs, stages: Sequence[int], tested: dict[str, Any]) -> str:
    """What belongs under an image, in HTML: its graph, what that costs, and the classes it is most likely of."""
    best = sorted(graph.probabilities.items(), key=lambda item: -item[1])[:GUESSES]
    share = f"{100 * graph.macs / cost.dense:.1f} % of the dense net's {cost.dense / 1e6:.2f}"
    use = f"{sum(graph.opened)} of {len(graph.opened)} blocks; {graph.macs / 1e6:.2f} MMACs, {share}"
    costs = [("this image", graph.macs / cost.dense, "own"), ("dense net", 1, "")]
    if mean := tested.get("macs_classes", {}).get(best[0][0]):
        at = tested.get("threshold")
        at = f" at {at:g}" if isinstance(at, float) else ""
        costs.insert(1, (f"mean of test images of class {best[0][0]}{at}", mean / cost.dense, ""))
    return draw_graph(graph, stages) + f"<p>{use}</p>" + bars(costs) + bars([(*each, "own") for each in best])


def draw_graph(graph: Graph, stages: Sequence[int]) -> str:
    """The blocks by stage, each with its P(open)."""
    squares = []
    for index, (ran, p_open) in enumerate(zip(graph.opened, graph.p_open, strict=True), start=1):
        gated = not np.isnan(p_open)
        kind = ("ran" if ran else "skipped") if gated else "always"
        said = f"P(open) {p_open:.3f}, {kind}" if gated else "has no gate, always runs"
        text = f"{p_open:.2f}".removeprefix("0") if gated else ""
        squares.append(f'<div class="block {kind}" title="block {index}: {said}">{text}</div>')
    edges = pairwise(np.cumsum([0, *stages]).tolist())
    parts = [
        f'<div>stage {stage}<div class="blocks">{"".join(squares[start:end])}</div></div>'
        for stage, (start, end) in enumerate(edges, start=1)
    ]
    return f'<div class="graph">{"".join(parts)}</div>'


def bars(rows: Iterable[tuple[str, float, str]]) -> str:
    """A bar for each row: its name, the part of the whole that it is, its CSS class."""
    cells = [
        f'<div>{html.escape(name)}</div><div><div class="bar {kind}" style="width: {100 * part:.1f}%"></div></div>'
        f"<div>{100 * part:.1f} %</div>"
        for name, part, kind in rows
    ]
    return f'<div class="bars">{"".join(cells)}</div>'


def shown(
    model: AdaptiveResNet, cost: Macs, tested: dict[str, Any], folders: Sequence[Path], path: str | None,
    threshold: float | Sequence[float],
) -> str:
    """The HTML for an image file in one of the folders; a note if there is none, or it is no image."""
    if not path or not any(Path(path).resolve().is_relative_to(folder) for folder in folders):
        return '<p class="note">Choose an image.</p>'
    try:
        return draw(look(model, cost, path, threshold), cost, model.stages, tested)
    except InputError as error:
        said = str(error).replace(path, Path(path).name)  # the folder that it was uploaded to says nothing
        return f'<p class="note">{html.escape(said)}</p>'


# ---------------------------------------------------------------------------------------------- the page


def require_gradio() -> ModuleType:
    """Gradio, with its telemetry off. Raises InputError if it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    local = ",".join(filter(None, [os.environ.get("no_proxy"), HOST]))
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = local  # it looks at its own page when it starts
    try:
        import gradio
    except ImportError as error:
        raise InputError(f"the page needs Gradio ({error}): pip install gradio") from error
    return gradio


def make_page(model: AdaptiveResNet, name: str, tested: dict[str, Any]) -> Any:
    """The page of a network of this name; `tested` is what `--test` measured of it in mode argmax, or {}."""
    gradio, cost, own = require_gradio(), count_macs(model, model.preprocess.size), model.threshold
    many = isinstance(own, list)

    def show(path: str | None, threshold: float, is_own: bool) -> str:
        at = own if is_own else min(max(threshold, STEP), 1 - STEP)
        return shown(model, cost, tested, [EXAMPLES.resolve(), Path(image.GRADIO_CACHE).resolve()], path, at)

    with gradio.Blocks(title="ConvNet-AIG", analytics_enabled=False, delete_cache=(60, KEPT)) as page:
        gradio.Markdown(f"# Which blocks does an image use?\n**{html.escape(name)}**: {note(model, tested)}")
        slider = gradio.Slider(0, 1, 0.5 if many else own, step=STEP, label="threshold of P(open)", elem_id="threshold",
                               visible=model.num_gates > 0)
        is_own = gradio.Checkbox(many, label="the network's own threshold for each gate instead", visible=many)
        with gradio.Row():
            for side, known in (("left", "truck"), ("right", "dog")):
                example = str(EXAMPLES / f"{known}.jpg") if known in model.classes else None
                with gradio.Column(min_width=320):
                    image = gradio.Image(example, type="filepath", sources=["upload", "clipboard"], height=220,
                                         label=f"{side} image", elem_id=side, elem_classes="picture", buttons=[])
                    image.preprocess = lambda file: file and file.path  # `shown` says if that is no image
                    drawn = gradio.HTML(elem_id=f"{side}-graph")
                    gradio.Examples(sorted(map(str, EXAMPLES.glob("*.jpg"))), image, label="examples")
                    hidden = {"show_progress": "hidden", "concurrency_id": "network", "api_visibility": "private"}
                    gradio.on([image.change, slider.change, is_own.change, page.load], show, [image, slider, is_own],
                              drawn, trigger_mode="always_last", **hidden)
    return page


def note(model: AdaptiveResNet, tested: dict[str, Any]) -> str:
    """What a reader of the page has to know of this network."""
    text = [f"{sum(model.stages)} residual blocks, {model.num_gates or 'none'} of them with a gate."]
    if model.num_gates:
        text.append("A gate opens where P(open) is above the threshold. Filled blocks ran, dashed ones were skipped; "
                    "the numbers are P(open).")
    if {"images", "top1"} <= tested.keys():
        text.append(f"{tested['top1']:.1f} % of {tested['images']:,} test images were classified correctly.")
    return " ".join(text)


def make_parser() -> Parser:
    parser = Parser(prog="python -m aig.demo", description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default=str(RELEASED), metavar="MODEL",
                        help="a model folder, run folder, checkpoint, or name on the Hugging Face Hub (default: the "
                        "released network)")
    parser.add_argument("--port", type=number(int, 1, 65535), help="of the page (default: the first free from 7860)")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    gradio = require_gradio()
    file = checkpoint_in(fetched(args.model), *TRAINED)
    model, path = aig.load(file), Path(args.model).resolve()
    name = path.parent.name if path.name in TRAINED else path.name  # of a run, that of its folder
    page = make_page(model, name, results_of(file, load_checkpoint(file)).get("argmax", {}))
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}  # none from the internet
    try:
        _, url, _ = page.launch(
            server_name=HOST, server_port=args.port, share=False, inbrowser=args.open, quiet=True,
            prevent_thread_lock=True, max_file_size=LARGEST, allowed_paths=[str(EXAMPLES)], css=CSS,
            theme=gradio.themes.Default(**fonts), ssr_mode=False, footer_links=[],
        )
    except OSError as error:
        raise InputError(f"cannot open the page: {error}; choose another --port") from error
    say(f"{name}: {url}  (Ctrl-C ends it)")
    with suppress(KeyboardInterrupt):
        threading.Event().wait()
    page.close(verbose=False)


if __name__ == "__main__":
    run_command(main, "aig.demo")
