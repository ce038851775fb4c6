"""The dashboard of a run: windows drawn from its records (`metrics.jsonl`) and its flags (`args.json`).

    python -m visdom.server                              # then train with --visdom, or show a finished run:
    python -m aig.dashboard runs/NAME
    python -m aig.dashboard runs/NAME --png FOLDER       # the same windows as images, without a server

A window is a Plotly figure as a plain dict: `{"data": [traces], "layout": {...}}`. `windows` makes all windows of a
run, as a pure function of its records and flags. visdom shows them on its page, and `figure` draws them with
matplotlib.

The dashboard has no state. After each epoch it draws every window in full, so a server that was down or started late
is right again at the next epoch. A server that does not answer costs one warning and at most `TIMEOUT` seconds an
epoch. It never stops the run.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import math
import os
import re
import textwrap
import threading
from collections.abc import Collection, Iterable, Sequence
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from tqdm import tqdm

from aig.console import InputError, Parser, number, progress_bar, run_command, say, warn
from aig.palette import BLACK, HUES, Colour, rgb, shade
from aig.runs import ARGS, MATRIX, METRICS, nan_to_none, read_json, read_records

SERVER, PORT = "http://localhost", 8097
TIMEOUT = 1.5  # seconds that a training waits for its windows after an epoch
PATIENCE = 10  # seconds that the server has to answer a message
SHOWN_CLASSES = 18  # as many curves as a reader can tell apart: six hues, three dashes
NAMED = 25  # the most rows of a heat map that have space for a name
WIDTH, HEIGHT = 480, 340  # of a window, in pixels
PER_INCH = 70  # pixels in an inch of an image
FRACTION = [-0.02, 1.02]  # the range of an axis
LOG = {"type": "log", "dtick": 1}
DASHES = {"solid": "-", "dash": "--", "dot": ":"}  # Plotly's name: matplotlib's

Window = dict[str, Any]


# ---------------------------------------------------------------------------------------------- the windows


def windows(name: str, records: Sequence[dict], run: dict[str, Any], matrix: np.ndarray | None) -> dict[str, Window]:
    """Every window of the run called `name`, by the window's name.

    Args:
        records: one for each epoch, at least one.
        run: the run's args.json.
        matrix: (K, L) opening rates of the newest epoch by class and block, or None if the records hold them.
    """
    val, epochs = records[-1]["val"], [record["epoch"] for record in records]
    rates = run.get("block_rates") or [math.nan] * len(val["gates"])
    counts = run.get("stages", [len(rates)])
    stages = [stage for stage, count in enumerate(counts) for _ in range(count)]  # of each block
    gated = [block for block, rate in enumerate(rates) if not rate >= 1]
    targets = [math.nan] * len(rates) if run.get("budget") else rates  # a budget asks no gate for a rate of its own
    learning_rate = [curve("learning rate", epochs, series(record["lr"] for record in records), HUES[0])]
    losses = {key: key.removeprefix("loss_") for key in keys(records, r"loss_\w+")}
    execution = both_parts(records, {"execution_rate": ""})
    if not run.get("budget"):
        execution.append(curve("target", epochs, [float(np.mean(rates))] * len(epochs), BLACK, "dot"))
    shown = {
        "learning_rate": chart("Learning rate", "epoch", "learning rate", learning_rate, **LOG),
        "loss": chart("Loss", "epoch", "loss", both_parts(records, {"loss": "total", **losses})),
    }
    for key in keys(records, r"top\d+"):
        title = f"Top-{key.removeprefix('top')} accuracy"
        shown[key] = chart(title, "epoch", "accuracy, %", both_parts(records, {key: ""}))
    shown["execution_rate"] = chart("Execution rate", "epoch", "branches run, fraction", execution, range=FRACTION)
    if keys(records, "macs_fraction"):
        macs = both_parts(records, {"macs_fraction": ""})
        budget = series(record["val"].get("macs_budget") for record in records)
        macs.append(curve("budget", epochs, budget, BLACK, "dot"))
        shown["macs"] = chart("Computation", "epoch", "MACs, of the dense net's", macs, range=FRACTION)
    if gated:
        shown["gates"] = gate_window(records, epochs, gated, targets, stages)
    shown["classes"] = class_window(records, epochs)
    rows = val.get("gates_by_class", matrix)
    rows = np.empty((0, 0)) if rows is None else np.array(rows, dtype=float)  # a class without images: None, then NaN
    if not np.isnan(rows).any(axis=1).all():
        title = f"Activations after epoch {epochs[-1]}: opening rate by class and block"
        shown["activations"] = heat_map(title, list(val["classes"]), rows, stages)
        shown["modules"] = block_window(rows, targets)
    shown["executed_blocks"] = executed_window(epochs[-1], val["executed_blocks"])
    shown["summary"] = summary(name, records, run)
    return shown


def keys(records: Sequence[dict], pattern: str) -> list[str]:
    """The names of all values of this pattern in the records, in their order there."""
    found = (key for record in records for part in ("val", "train") for key in record[part])
    return list(dict.fromkeys(key for key in found if re.fullmatch(pattern, key)))


def series(values: Iterable[float | None]) -> list[float]:
    """The values of a curve. A record holds None where the value was not finite. That becomes NaN, a gap."""
    return [math.nan if value is None else float(value) for value in values]


def curve(name: str, x: Sequence[float], y: Sequence[float], colour: Colour, dash: str = "solid") -> dict[str, Any]:
    """A trace of a chart. It has markers, because Plotly draws no line through a single point."""
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": list(x),
        "y": list(y),
        "line": {"color": rgb(colour), "dash": dash, "width": 2},
        "marker": {"color": rgb(colour), "size": 1 if dash == "dot" else 4},
    }


def both_parts(records: Sequence[dict], names: dict[str, str]) -> list[dict[str, Any]]:
    """Curves of values of the records (key: name in the legend), solid for validation and dashed for training."""
    epochs, traces = [record["epoch"] for record in records], []
    for hue, (key, name) in zip(cycle(HUES), names.items(), strict=False):
        for part, word, dash in (("val", "validation", "solid"), ("train", "training", "dash")):
            if any(key in record[part] for record in records):
                values = series(record[part].get(key) for record in records)
                traces.append(curve(f"{word} {name}".strip(), epochs, values, hue, dash))
    return traces


def chart(title: str, xlabel: str, ylabel: str, data: list[dict[str, Any]], **yaxis: Any) -> Window:
    """A window with curves or bars. `yaxis`: what Plotly's layout says about that axis."""
    layout = {
        "title": {"text": title},
        "xaxis": {"title": {"text": xlabel}},
        "yaxis": {"title": {"text": ylabel}, **yaxis},
        "showlegend": 1 < len(data) <= 60,
        "legend": {"font": {"size": 10}},
        "hovermode": "closest",
        "margin": {"l": 60, "r": 20, "t": 40, "b": 60},
    }
    if len(data[0]["x"]) <= 20:
        layout["xaxis"]["dtick"] = 1  # no half epochs
    return {"data": data, "layout": layout}


def gate_window(
    records: Sequence[dict], epochs: list[int], gated: list[int], targets: Sequence[float], stages: list[int]
) -> Window:
    """The opening rate of each gated block. A stage has one hue, light to dark. The target rates are dotted."""
    traces = []
    for block in gated:
        stage = stages[block]
        peers = [other for other in gated if stages[other] == stage]
        colour = shade(HUES[stage % len(HUES)], peers.index(block), len(peers))
        values = series(record["val"]["gates"][block] for record in records)
        traces.append(curve(f"block {block + 1} (stage {stage + 1})", epochs, values, colour))
    for rate in sorted({targets[block] for block in gated if math.isfinite(targets[block])}):
        traces.append(curve(f"target {rate:g}", epochs, [rate] * len(epochs), BLACK, "dot"))
    title = "Gates: opening rate by block (validation)"
    return chart(title, "epoch", "images open, fraction", traces, range=FRACTION)


def class_window(records: Sequence[dict], epochs: list[int]) -> Window:
    """The mean opening rate of each class. Of many classes it shows the highest and the lowest."""
    last = records[-1]["val"]["classes"]
    ranked = sorted(last, key=lambda name: -1.0 if last[name] is None else last[name], reverse=True)
    title, half = "Classes: mean opening rate (validation)", SHOWN_CLASSES // 2
    if len(ranked) > SHOWN_CLASSES:
        ranked = ranked[:half] + ranked[-half:]
        title = f"Classes, the {half} most and least demanding of {len(last)}: mean opening rate"
    traces = []
    for index, name in enumerate(ranked):
        dash, hue = divmod(index, len(HUES))
        values = series(record["val"]["classes"][name] for record in records)
        traces.append(curve(name, epochs, values, HUES[hue], list(DASHES)[dash]))
    return chart(title, "epoch", "branches open, fraction", traces)


def heat_map(title: str, names: Sequence[str], rows: np.ndarray, stages: list[int]) -> Window:
    """The opening rate (K, L) of each class and block. The first class is on top. White lines part the stages."""
    blocks = rows.shape[1]
    trace = {
        "type": "heatmap",
        "x": list(range(1, blocks + 1)),
        "y": list(names),
        "z": rows.tolist(),
        "zmin": 0,
        "zmax": 1,
        "colorscale": "Viridis",
        "colorbar": {"title": {"text": "images open, fraction", "side": "right"}},
    }
    yaxis = {"type": "category", "autorange": "reversed", "automargin": True, "tickfont": {"size": 10}}
    yaxis["dtick"] = math.ceil(len(rows) / NAMED)
    window = chart(title, "block", "", [trace], **yaxis)
    ends = [block + 0.5 for block in range(1, blocks) if stages[block] != stages[block - 1]]
    line = {"type": "line", "xref": "x", "yref": "paper", "y0": 0, "y1": 1, "line": {"color": "white", "width": 2}}
    window["layout"]["shapes"] = [{**line, "x0": end, "x1": end} for end in ends]
    return window


def block_window(rows: np.ndarray, rates: Sequence[float]) -> Window:
    """The opening rate of each block and its spread over the classes, from the matrix (K, L)."""
    rows = rows[~np.isnan(rows).any(axis=1)]  # classes with images
    mean, std = rows.mean(axis=0), rows.std(axis=0)
    relative = np.divide(std, mean, out=np.zeros_like(std), where=mean > 0)
    blocks = range(1, len(mean) + 1)
    traces = [
        curve("opening rate", blocks, mean.tolist(), HUES[0]),
        curve("highest of all classes", blocks, rows.max(axis=0).tolist(), HUES[4], "dash"),
        curve("lowest of all classes", blocks, rows.min(axis=0).tolist(), HUES[5], "dash"),
        curve("std / mean over the classes", blocks, relative.tolist(), HUES[1]),
    ]
    if not np.isnan(rates).all():
        traces.append(curve("target", blocks, rates, BLACK, "dot"))
    return chart("Blocks: opening rate and spread over classes", "block", "rate", traces)


def executed_window(epoch: int, counts: Sequence[int]) -> Window:
    """How many images run 0, 1, ... blocks."""
    bars = {"type": "bar", "x": list(range(len(counts))), "y": list(counts), "marker": {"color": rgb(HUES[0])}}
    title = f"Executed blocks per image after epoch {epoch}"
    return chart(title, f"blocks run, of {len(counts) - 1}", "validation images", [bars])


def summary(name: str, records: Sequence[dict], run: dict[str, Any]) -> Window:
    """Where the run stands and how it was started, as a window of text."""
    last = records[-1]
    accuracies = series(record["val"]["top1"] for record in records)
    best = max(range(len(records)), key=lambda index: np.nan_to_num(accuracies[index], nan=-1))
    epochs = run.get("epochs", last["epoch"])
    seconds = float(np.median([record["seconds"] or 0 for record in records[-5:]]))
    left = tqdm.format_interval((epochs - last["epoch"]) * seconds)
    items = {
        "epoch": f"{last['epoch']} of {epochs}, {seconds:.0f} s each; {left} left",
        "best top-1": f"{fixed(accuracies[best])} % (validation, epoch {records[best]['epoch']})",
        "now": f"top-1 {fixed(accuracies[-1])} %, execution rate {fixed(last['val']['execution_rate'], 3)}",
        "command": " ; ".join(run.get("commands", [])) or "unknown",
        "hardware": str(run.get("hardware", "unknown")),
        "commit": str(run.get("git_commit", "unknown")),
        "versions": ", ".join(f"{key} {value}" for key, value in run.get("versions", {}).items()) or "unknown",
    }
    rows = "".join(f"<b>{key}:</b> {html.escape(value)}<br>" for key, value in items.items())
    return {"data": [{"type": "text", "content": rows}], "layout": {"title": {"text": name}}}


def fixed(value: float | None, digits: int = 2) -> str:
    return "not finite" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def windows_in(folder: Path, records: Sequence[dict]) -> dict[str, Window]:
    """The windows of a run folder, from its records, args.json and matrix file."""
    path = folder / MATRIX
    matrix = np.load(path, allow_pickle=False) if path.exists() else None
    return windows(folder.name, records, read_json(folder / ARGS), matrix)


# ---------------------------------------------------------------------------------------------- visdom


class Dashboard:
    """Shows the windows of a run in one visdom environment, by default of the run's name.

    Its messages are those of `Visdom.plotlyplot` and `Visdom.text`. It sends them itself, because visdom's client has
    no time-out. Raises InputError if visdom is not installed.
    """

    def __init__(self, folder: Path, server: str = SERVER, port: int = PORT, env: str = "") -> None:
        if find_spec("visdom") is None:
            how = "see the README on how to install it, or use python -m aig.dashboard RUN --png FOLDER"
            raise InputError(f"visdom is not installed: {how}")
        import requests  # a dependency of visdom

        self.requests = requests
        server = server if "://" in server else f"http://{server}"
        self.folder, self.url = folder.resolve(), f"{server.rstrip('/')}:{port}"
        self.env = (env or self.folder.name).replace("/", "_")  # as the server does
        self.drawing: threading.Thread | None = None
        self.warned = False

    def update(self, records: list[dict]) -> None:
        """Draws every window from the records so far, for at most TIMEOUT seconds. A failure is warned of once.

        It draws in a thread, because a time-out of requests does not stop a server that answers byte by byte. While
        the thread of an earlier epoch is still at work, nothing is drawn.
        """
        if self.drawing and self.drawing.is_alive():
            return
        failures: list[str] = []
        self.drawing = threading.Thread(target=self.attempt, args=(list(records), failures), daemon=True)
        self.drawing.start()
        self.drawing.join(TIMEOUT)
        if self.drawing.is_alive():
            failures.append(f"{self.url} is too slow")
        if failures and not self.warned:
            warn(f"visdom: {failures[0]}; trying again each epoch")
        self.warned = bool(failures)

    def attempt(self, records: list[dict], failures: list[str]) -> None:
        """Draws, and adds the reason to `failures` if that fails."""
        try:
            self.draw(records)
        except Exception as error:  # no error here may end a training; `update` reports it
            failures.append(str(error) if isinstance(error, InputError) else repr(error))

    def draw(self, records: list[dict]) -> None:
        """Draws every window. Raises InputError if the server does not take them."""
        with self.requests.Session() as session:
            session.trust_env = urlsplit(self.url).hostname not in ("localhost", "127.0.0.1", "::1")  # no proxy to here
            if user := os.environ.get("VISDOM_USERNAME"):  # for a server started with -enable_login
                password = hashlib.sha256(os.environ.get("VISDOM_PASSWORD", "").encode()).hexdigest()
                self.post(session, "", {"username": user, "password": password})
            for name, window in windows_in(self.folder, records).items():
                opts = {"title": window["layout"]["title"]["text"], "width": WIDTH, "height": HEIGHT}
                self.post(session, "events", {"win": name, "eid": self.env, **window, "opts": opts})
            # without it, the windows die with their server
            self.post(session, "save", {"data": [self.env], "eid": self.env})

    def post(self, session: Any, endpoint: str, message: dict[str, Any]) -> None:
        """Sends one message. Raises InputError if the server does not take it."""
        where = f"{self.url}/{endpoint}"
        message = nan_to_none(message)  # one infinity would make the window vanish; None leaves a gap
        try:
            answer = session.post(where, json=message, timeout=PATIENCE, allow_redirects=False)
            if answer.is_redirect or answer.status_code in (400, 401, 403):  # or sent to the login page
                raise InputError(f"{self.url} asks for a login: check VISDOM_USERNAME and VISDOM_PASSWORD")
            answer.raise_for_status()
        except self.requests.RequestException as error:
            kind = type(error).__name__
            raise InputError(f"no answer from {self.url} ({kind}): start one with python -m visdom.server") from error


# ---------------------------------------------------------------------------------------------- matplotlib


def figure(shown: Collection[Window]) -> Any:
    """The windows as one matplotlib figure, three in a row."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    page = Figure((columns * WIDTH / PER_INCH, rows * HEIGHT / PER_INCH), layout="constrained")
    page.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # inches
    places = page.subfigures(rows, columns, squeeze=False)
    for window, place in zip(shown, places.flat, strict=False):
        draw_window(window, place)
    return page


def draw_window(window: Window, place: Any) -> None:
    """Draws a window into a matplotlib subfigure."""
    data, layout, axes = window["data"], window["layout"], place.subplots()
    axes.set_title(layout["title"]["text"], parse_math=False)
    kind = data[0]["type"]
    if kind == "text":
        draw_text(data[0]["content"], axes)
        return
    if kind == "heatmap":
        draw_heat_map(data[0], layout["shapes"], axes)
    else:
        draw_curves(data, layout["yaxis"], axes)
    axes.set_xlabel(layout["xaxis"]["title"]["text"])
    if "dtick" in layout["xaxis"]:
        axes.set_xticks(data[0]["x"])
    else:
        axes.xaxis.get_major_locator().set_params(integer=True)
    if layout["showlegend"]:
        draw_legend(axes)


def draw_curves(data: list[dict[str, Any]], yaxis: dict[str, Any], axes: Any) -> None:
    """Draws curves or bars."""
    for trace in data:
        if trace["type"] == "bar":
            axes.bar(trace["x"], trace["y"], width=0.9, color=trace["marker"]["color"])
        else:
            style = {"color": trace["line"]["color"], "marker": "o", "markersize": trace["marker"]["size"] / 2}
            axes.plot(trace["x"], trace["y"], DASHES[trace["line"]["dash"]], label=trace["name"], **style)
    axes.set_ylabel(yaxis["title"]["text"])
    axes.set_yscale(yaxis.get("type", "linear"))
    axes.set_ylim(yaxis.get("range"))
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)


def draw_text(content: str, axes: Any) -> None:
    """Writes the content of a text window, without its tags."""
    lines = html.unescape(re.sub("<[^>]*>", "", content.replace("<br>", "\n"))).splitlines()
    text = "\n".join(textwrap.fill(line, 75) for line in lines)
    axes.text(0, 1, text, va="top", parse_math=False, transform=axes.transAxes)
    axes.axis("off")


def draw_heat_map(trace: dict[str, Any], lines: list[dict[str, Any]], axes: Any) -> None:
    """Draws a heat map with its colour bar. So many rows have names as there is space for."""
    names = trace["y"]
    extent = (0.5, len(trace["x"]) + 0.5, len(names) - 0.5, -0.5)
    image = axes.imshow(trace["z"], vmin=0, vmax=1, aspect="auto", interpolation="nearest", extent=extent)
    axes.figure.colorbar(image, label=trace["colorbar"]["title"]["text"])
    step = math.ceil(len(names) / NAMED)
    axes.set_yticks(range(0, len(names), step), names[::step], fontsize="x-small", parse_math=False)
    for line in lines:
        axes.axvline(line["x0"], color=line["line"]["color"], linewidth=1.5)


def draw_legend(axes: Any) -> None:
    """Draws a legend of all curves: beside the chart if there are many, in two columns if there are very many."""
    lines = axes.get_lines()
    names = [line.get_label() for line in lines]
    beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "ncols": 1 + len(lines) // 31}
    place = beside if len(lines) > 4 else {"loc": "best"}
    for text in axes.legend(lines, names, fontsize="x-small", handlelength=3, **place).get_texts():
        text.set_parse_math(False)


# ---------------------------------------------------------------------------------------------- the command


def add_visdom_flags(parser: argparse._ActionsContainer) -> None:
    """Where the visdom server is. User and password come from VISDOM_USERNAME and VISDOM_PASSWORD."""
    parser.add_argument("--visdom-server", default=SERVER, metavar="URL", help="of the visdom server")
    parser.add_argument("--visdom-port", type=number(int, 1, 65535), default=PORT, metavar="PORT", help="of the server")
    parser.add_argument("--visdom-env", default="", metavar="NAME", help="environment; '' means the name of the run")


def main(argv: Sequence[str] | None = None) -> None:
    """Shows a run, whether it is finished or still going on."""
    parser = Parser(prog="python -m aig.dashboard", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="a run folder, such as runs/NAME")
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="draw the windows into this folder instead")
    add_visdom_flags(parser)
    args = parser.parse_args(argv)
    folder = args.run.resolve()
    records = read_records(folder)
    if not records:
        raise InputError(f"{args.run} holds no records: give a run folder, with a {METRICS} in it")
    try:
        if args.png:
            draw_images(windows_in(folder, records), args.png)
        else:
            board = Dashboard(folder, args.visdom_server, args.visdom_port, args.visdom_env)
            board.draw(records)
            say(f"{len(records)} epochs drawn: {board.url}/env/{board.env}")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, EOFError) as error:
        raise InputError(f"{args.run} does not hold a run that can be drawn ({error!r})") from error


def draw_images(shown: dict[str, Window], target: Path) -> None:
    """Writes one PNG for each window, and `dashboard.png` with all of them."""
    target.mkdir(parents=True, exist_ok=True)
    for name, window in progress_bar(shown.items(), "drawing", len(shown), "window"):
        figure([window]).savefig(target / f"{name}.png", dpi=150)
    figure(shown.values()).savefig(target / "dashboard.png", dpi=100)
    say(f"{len(shown)} windows drawn into {target}, and all of them into {target / 'dashboard.png'}")


if __name__ == "__main__":
    run_command(main, "aig.dashboard")
