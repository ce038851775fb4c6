"""The picture of a run: windows drawn from its records (`metrics.jsonl`) and flags (`args.json`) alone.

    python -m visdom.server                        # then train with --visdom, or show a finished run:
    python dashboard.py runs/NAME
    python dashboard.py runs/NAME --png FOLDER     # the same windows as images, with no server

What a window shows is a pure function of the run (`panes`); visdom and matplotlib only render it. The dashboard has no
state: after each epoch every window is drawn in full, so a server that was down, restarted or started late is right
again at the next epoch. One that does not answer costs one warning, `TIMEOUT` seconds an epoch, and never the run.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import json
import math
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from tqdm import tqdm

import utils
from utils import InputError

TIMEOUT = 1.5  # seconds that a training waits for its windows after an epoch
SHOWN_CLASSES = 20  # curves of so many classes can be told apart
SERVER, PORT = "http://localhost", 8097
# Okabe and Ito's colours, which colour-blind readers can tell apart: one a stage, and for a few curves
HUES = [(0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0)]
BLACK = (0, 0, 0)


# ---------------------------------------------------------------------------------------------- what is shown


@dataclass(frozen=True)
class Trace:
    """A curve over the x of its window, with a value or NaN for each."""

    y: Sequence[float]
    colour: tuple[int, int, int]
    dash: str = "solid"  # or "dash", "dot"


@dataclass(frozen=True)
class Lines:
    """Curves by name."""

    title: str
    xlabel: str
    ylabel: str
    x: Sequence[float]
    traces: dict[str, Trace]
    limits: tuple[float, float] | None = None
    log: bool = False
    legend: bool = True


@dataclass(frozen=True)
class Bars:
    title: str
    xlabel: str
    ylabel: str
    x: Sequence[float]
    heights: Sequence[float]


@dataclass(frozen=True)
class HeatMap:
    """Values in [0, 1]: rows by name, the first on top; columns by number, from 1, in groups of the given sizes."""

    title: str
    xlabel: str
    rows: Sequence[str]
    values: np.ndarray
    groups: Sequence[int] = field(default_factory=list)


@dataclass(frozen=True)
class Text:
    """Names and what there is to say about them."""

    title: str
    items: dict[str, str]


Pane = Lines | Bars | HeatMap | Text


def panes(name: str, records: Sequence[dict], run: dict[str, Any], matrix: np.ndarray | None) -> dict[str, Pane]:
    """Every window of a run, by its name.

    Args:
        name: of the run.
        records: of its epochs, at least one.
        run: its args.json.
        matrix: classes x blocks opening rates of the newest epoch, where the records do not hold them.
    """
    val, epochs = records[-1]["val"], [record["epoch"] for record in records]
    rates = run.get("block_rates") or [math.nan] * len(val["gates"])
    stages = stage_of_each_block(run.get("stages") or [len(rates)], len(rates))
    shown: dict[str, Pane] = {
        "learning_rate": Lines(
            "Learning rate", "epoch", "learning rate", epochs, {"learning rate": Trace(series(records, "lr"), HUES[0])},
            log=True, legend=False,
        ),
        "loss": curves("Loss", "loss", records, {"loss": "total", "loss_classify": "class", "loss_target": "target"}),
    }
    for accuracy in (key for key in val if key in ("top1", "top5")):
        shown[accuracy] = curves(f"Top-{accuracy[3:]} accuracy", "accuracy, %", records, {accuracy: ""})
    execution = curves("Execution rate", "branches run, fraction", records, {"execution_rate": ""}, limits=(0, 1))
    target = Trace([float(np.mean(rates))] * len(epochs), BLACK, "dot")
    shown["execution_rate"] = replace(execution, traces={**execution.traces, "target": target})
    if any(not rate >= 1 for rate in rates):
        shown["gates"] = gate_curves(records, epochs, rates, stages)
    shown["classes"] = class_curves(records, epochs)
    if (rows := val.get("gates_by_class", matrix)) is not None:
        rows = np.array(rows, dtype=float)  # None, for a class without images, becomes NaN
    if rows is not None and not np.isnan(rows).any(1).all():
        title = f"Activations after epoch {epochs[-1]}: opening rate by class and block"
        groups = [stages.count(stage) for stage in range(max(stages) + 1)]
        shown["activations"] = HeatMap(title, "block", list(val["classes"]), rows, groups)
        shown["modules"] = module_curves(rows, rates)
    counts = val["executed_blocks"]
    shown["executed_blocks"] = Bars(
        f"Executed blocks per image after epoch {epochs[-1]}", f"blocks run, of {len(counts) - 1}", "validation images",
        list(range(len(counts))), counts,
    )
    shown["summary"] = summary(name, records, run)
    return shown


def series(records: Sequence[dict], *path: str | int) -> list[float]:
    """The value under that path in each record; NaN where it is missing or was not finite."""

    def value(record: Any) -> float:
        for key in path:
            record = record[key]
        return math.nan if record is None else float(record)

    return [value(record) for record in records]


def curves(
    title: str, label: str, records: Sequence[dict], names: dict[str, str], limits: tuple[float, float] | None = None
) -> Lines:
    """These values of the records, by the name in the legend: validation drawn through, training dashed."""
    traces = {}
    for hue, (key, name) in zip(HUES, names.items(), strict=False):
        traces[f"validation {name}".strip()] = Trace(series(records, "val", key), hue)
        traces[f"training {name}".strip()] = Trace(series(records, "train", key), hue, "dash")
    return Lines(title, "epoch", label, [record["epoch"] for record in records], traces, limits)


def gate_curves(records: Sequence[dict], epochs: list[int], rates: Sequence[float], stages: list[int]) -> Lines:
    """The opening rate of each gated block, coloured by stage, light to dark; dotted the target rates."""
    gated = [block for block, rate in enumerate(rates) if not rate >= 1]
    traces = {}
    for block in gated:
        stage = stages[block]
        peers = [other for other in gated if stages[other] == stage]
        traces[f"block {block + 1} (stage {stage + 1})"] = Trace(
            series(records, "val", "gates", block), shade(HUES[stage % len(HUES)], peers.index(block), len(peers))
        )
    for rate in sorted({rates[block] for block in gated if math.isfinite(rates[block])}):
        traces[f"target {rate:g}"] = Trace([rate] * len(epochs), BLACK, "dot")
    title = "Gates: opening rate by block (validation)"
    return Lines(title, "epoch", "images open, fraction", epochs, traces, limits=(0, 1), legend=len(traces) <= 60)


def class_curves(records: Sequence[dict], epochs: list[int]) -> Lines:
    """The mean opening rate of each class; of many classes the least and the most demanding."""
    last = records[-1]["val"]["classes"]
    ranked = sorted(last, key=lambda name: -1.0 if last[name] is None else last[name], reverse=True)
    title = "Classes: mean opening rate (validation)"
    if len(ranked) > SHOWN_CLASSES:
        ranked = ranked[: SHOWN_CLASSES // 2] + ranked[-SHOWN_CLASSES // 2 :]
        title = f"Classes, the {SHOWN_CLASSES // 2} most and least demanding of {len(last)}: mean opening rate"
    traces = {}
    for i, name in enumerate(ranked):
        dash = ("solid", "dash", "dot")[i // len(HUES) % 3]
        hue = HUES[i % len(HUES)]
        traces[name] = Trace(series(records, "val", "classes", name), shade(hue, 1, 2) if i >= 18 else hue, dash)
    return Lines(title, "epoch", "branches open, fraction", epochs, traces)


def module_curves(rows: np.ndarray, rates: Sequence[float]) -> Lines:
    """Per block: the opening rate with its spread over the classes, from a matrix (K, L)."""
    rows = rows[~np.isnan(rows).any(1)]  # classes with images
    mean, std = rows.mean(0), rows.std(0)
    relative = np.divide(std, mean, out=np.zeros_like(std), where=mean > 0)
    traces = {
        "opening rate": Trace(mean.tolist(), HUES[0]),
        "of the class that opens it most": Trace(rows.max(0).tolist(), HUES[4], "dash"),
        "of the class that opens it least": Trace(rows.min(0).tolist(), HUES[5], "dash"),
        "std / mean over the classes": Trace(relative.tolist(), HUES[1]),
        "target": Trace(list(rates), BLACK, "dot"),
    }
    return Lines("Blocks: opening rate and spread over classes", "block", "rate", range(1, len(mean) + 1), traces)


def summary(name: str, records: Sequence[dict], run: dict[str, Any]) -> Text:
    """Where the run stands, and how it was started."""
    last = records[-1]
    accuracies = [record["val"]["top1"] for record in records]
    best = max(range(len(records)), key=lambda i: -math.inf if accuracies[i] is None else accuracies[i])
    epochs = run.get("epochs", last["epoch"])
    seconds = float(np.median([record["seconds"] or 0 for record in records[-5:]]))
    left = (epochs - last["epoch"]) * seconds
    items = {
        "epoch": f"{last['epoch']} of {epochs}, {seconds:.0f} s each; {tqdm.format_interval(left)} left",
        "best top-1": f"{number(accuracies[best])} % (validation, epoch {records[best]['epoch']})",
        "now": f"top-1 {number(last['val']['top1'])} %, execution rate {number(last['val']['execution_rate'], 3)}",
        "command": " ; ".join(run.get("commands", [])) or "unknown",
        "hardware": str(run.get("hardware", "unknown")),
        "commit": str(run.get("git_commit", "unknown")),
        "versions": ", ".join(f"{key} {value}" for key, value in run.get("versions", {}).items()) or "unknown",
    }
    return Text(name, items)


def number(value: float | None, digits: int = 2) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"


def stage_of_each_block(stages: Sequence[int], total: int) -> list[int]:
    """0, 0, ..., 1, 1, ...: the stage of each of `total` blocks, given the number of blocks in each."""
    found = [stage for stage, count in enumerate(stages) for _ in range(count)]
    return found if len(found) == total else [0] * total


def shade(hue: tuple[int, int, int], index: int, count: int) -> tuple[int, int, int]:
    """The index-th of `count` tints of a colour, from light to the colour itself."""
    weight = 1 if count == 1 else 0.35 + 0.65 * index / (count - 1)
    return tuple(round(255 - weight * (255 - value)) for value in hue)


# ---------------------------------------------------------------------------------------------- visdom


class Silent:
    """The dashboard of a run without `--visdom`: draws nothing."""

    def update(self, records: list[dict]) -> None:
        pass


class Dashboard:
    """Draws the windows of a run in one visdom environment.

    Args:
        folder: the run folder: its name, args.json and, for many classes, the matrix of gates by class.
        server, port: of the visdom server.
        env: the environment; by default named after the run.

    Raises:
        ImportError: if visdom is not installed.
    """

    def __init__(self, folder: Path, server: str = SERVER, port: int = PORT, env: str = "") -> None:
        import requests  # a dependency of visdom
        import visdom

        server = server if "://" in server else f"http://{server}"
        self.folder, self.url = folder.resolve(), f"{server.rstrip('/')}:{port}"
        self.env = (env or self.folder.name).replace("/", "_")  # as the server does
        # builds messages only; sending them ourselves bounds the time that a dead server can take
        self.painter = visdom.Visdom(env=self.env, send=False, use_incoming_socket=False)
        self.new_session, self.failure = requests.Session, requests.RequestException
        self.session: Any = None
        self.drawing: threading.Thread | None = None
        self.warned = False

    def update(self, records: list[dict]) -> None:
        """Redraws every window from the records of all epochs so far, for at most TIMEOUT; on failure warns, once.

        It works in a thread, because a time-out of requests does not bound a server that answers byte by byte. One
        that is still at work at the next epoch is left alone.
        """
        if self.drawing and self.drawing.is_alive():
            return
        failures: list[str] = []

        def work(records: list[dict]) -> None:
            try:
                self.draw(records)
            except Exception as error:  # whatever it is, it must not end a training; it is reported below
                failures.append(self.reason(error))

        self.drawing = threading.Thread(target=work, args=(list(records),), daemon=True)
        self.drawing.start()
        self.drawing.join(TIMEOUT)
        if self.drawing.is_alive():
            failures.append(f"{self.url} is too slow")
        if failures and not self.warned:
            print(f"visdom: {failures[0]}; trying again each epoch", file=sys.stderr)
        self.warned = bool(failures)

    def draw(self, records: list[dict], patience: float = TIMEOUT) -> None:
        """Redraws every window. Raises `failure` if the server does not take them within `patience` seconds."""
        shown = panes(self.folder.name, records, utils.read_json(self.folder / utils.ARGS), read_matrix(self.folder))
        deadline = time.monotonic() + patience
        try:
            if self.session is None:
                self.session = self.login(deadline)
            for window, pane in shown.items():
                self.post(*render(self.painter, window, pane), deadline)
            self.post({"data": [self.env]}, "save", deadline)  # an environment not saved dies with its server
        except self.failure:
            self.session = None  # a server that comes back wants to see the password again
            raise

    def login(self, deadline: float) -> Any:
        """A session; logged in if VISDOM_USERNAME is set, as for a server started with -enable_login."""
        session = self.new_session()
        session.trust_env = urlsplit(self.url).hostname not in ("localhost", "127.0.0.1", "::1")  # no proxy to here
        if user := os.environ.get("VISDOM_USERNAME"):
            password = os.environ.get("VISDOM_PASSWORD", "")
            credentials = {"username": user, "password": hashlib.sha256(password.encode()).hexdigest()}
            answer = session.post(self.url, json=credentials, timeout=left(deadline), allow_redirects=False)
            answer.raise_for_status()
        return session

    def post(self, message: dict[str, Any], endpoint: str, deadline: float) -> None:
        # an infinity would make the window vanish; None leaves a gap
        text = json.dumps(utils.strict({**message, "eid": self.env}), allow_nan=False)
        answer = self.session.post(f"{self.url}/{endpoint}", data=text, timeout=left(deadline), allow_redirects=False)
        answer.raise_for_status()
        if answer.is_redirect:  # to the login page
            raise self.failure("the server asks for a login: set VISDOM_USERNAME and VISDOM_PASSWORD")

    def reason(self, error: Exception) -> str:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (400, 401, 403):
            return f"{self.url} refuses (HTTP {status}): check VISDOM_USERNAME and VISDOM_PASSWORD"
        if isinstance(error, self.failure) and "VISDOM_USERNAME" not in str(error):
            return f"no answer from {self.url} ({type(error).__name__})"
        return " ".join(f"{type(error).__name__}: {error}".split())


def connect(folder: Path, server: str = SERVER, port: int = PORT, env: str = "") -> Dashboard | Silent:
    """The dashboard of a run; a silent one, after a warning, where visdom is not installed."""
    try:
        return Dashboard(folder, server, port, env)
    except ImportError as error:
        print(f"--visdom: {error}; see the README on how to install visdom", file=sys.stderr)
        return Silent()


def read_matrix(folder: Path) -> np.ndarray | None:
    """The newest opening rates by class and block, if they are in a file of their own."""
    path = folder / utils.MATRIX
    return np.load(path, allow_pickle=False) if path.exists() else None


def left(deadline: float) -> float:
    """Seconds to a deadline, for a time-out, which must be above 0."""
    return max(0.01, deadline - time.monotonic())


def render(painter: Any, window: str, pane: Pane) -> tuple[dict, str]:
    """The message that draws a window, and the endpoint for it."""
    opts: dict[str, Any] = {"title": pane.title, "width": 480, "height": 340}
    if isinstance(pane, Text):
        rows = "".join(f"<b>{html.escape(key)}</b><br>{html.escape(value)}<br>" for key, value in pane.items.items())
        return painter.text(f'<div style="padding: 8px">{rows}</div>', win=window, opts=opts)
    margins = {"marginleft": 60, "marginright": 20, "margintop": 40, "marginbottom": 60}
    opts |= {"xlabel": pane.xlabel, **margins}
    if isinstance(pane, HeatMap):
        names = [str(column) for column in range(1, pane.values.shape[1] + 1)]
        longest = max(map(len, pane.rows), default=0)
        height = min(900, max(340, 90 + 18 * len(pane.rows)))
        opts |= {"width": 980, "height": height, "marginleft": min(200, 20 + 8 * longest), "xmin": 0, "xmax": 1}
        opts |= {"columnnames": names, "rownames": unique(pane.rows)}
        line = {"type": "line", "xref": "x", "yref": "paper", "y0": 0, "y1": 1, "line": {"color": "white", "width": 2}}
        shapes = [{**line, "x0": x, "x1": x} for x in (np.cumsum(pane.groups)[:-1] - 0.5).tolist()]
        rows = {"type": "category", "autorange": "reversed", "automargin": True, "tickfont": {"size": 10}}
        if len(pane.rows) <= 60:
            rows["dtick"] = 1
        columns = {"type": "category", "title": {"text": pane.xlabel}}
        opts["layoutopts"] = {"plotly": {"xaxis": columns, "yaxis": rows, "shapes": shapes}}
        return painter.heatmap(X=pane.values, win=window, opts=opts)
    opts["ylabel"] = pane.ylabel
    if isinstance(pane, Bars):
        return painter.bar(X=np.array(pane.heights), Y=np.array(pane.x), win=window, opts=opts)
    traces = list(pane.traces.values())
    opts |= {"legend": list(pane.traces), "showlegend": pane.legend, "markersymbol": "circle", "markersize": 4}
    opts |= {"markers": True, "markerborderwidth": 0}  # without markers a single point draws nothing
    opts["traceopts"] = {
        "plotly": {
            name: {"line": {"color": f"rgb{trace.colour}", "dash": trace.dash, "width": 2},
                   "marker": {"size": 1 if trace.dash == "dot" else 4, "color": f"rgb{trace.colour}"}}
            for name, trace in pane.traces.items()
        }
    }
    xaxis: dict[str, Any] = {"title": {"text": pane.xlabel}}
    yaxis: dict[str, Any] = {"title": {"text": pane.ylabel}}
    if len(pane.x) <= 12:
        xaxis["dtick"] = 1  # no half epochs
    if pane.limits:
        yaxis["range"] = [pane.limits[0] - 0.02, pane.limits[1] + 0.02]
    elif pane.log:
        yaxis |= {"type": "log", "dtick": 1}
    layout = {"hovermode": "closest", "legend": {"font": {"size": 10}}, "xaxis": xaxis, "yaxis": yaxis}
    opts["layoutopts"] = {"plotly": layout}
    y = np.array([trace.y for trace in traces], dtype=float).T  # (X, traces)
    x = np.array(pane.x, dtype=float)
    return painter.line(Y=y if len(traces) > 1 else y[:, 0], X=x, win=window, opts=opts)


def unique(names: Sequence[str]) -> list[str]:
    """The names, with spaces added to repeated ones: a heat map merges rows of equal names."""
    found: dict[str, None] = {}
    for name in names:
        while name in found:
            name += " "
        found[name] = None
    return list(found)


# ---------------------------------------------------------------------------------------------- matplotlib


def figure(pane: Pane) -> Any:
    """The window as a matplotlib figure."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    if isinstance(pane, HeatMap):
        height = min(12, 1.5 + 0.22 * len(pane.values))
        shown = Figure(figsize=(2.5 + 0.18 * max(30, pane.values.shape[1]), height), layout="constrained")
    else:
        shown = Figure(figsize=(7, 4.2), layout="constrained")
    axes = shown.subplots()
    axes.set_title(pane.title)
    if isinstance(pane, Text):
        axes.axis("off")
        text = "\n".join(f"{key}: {value}" for key, value in pane.items.items())
        axes.text(0, 1, text, va="top", wrap=True, parse_math=False, transform=axes.transAxes)
        return shown
    axes.set_xlabel(pane.xlabel)
    if isinstance(pane, HeatMap):
        image = axes.imshow(pane.values, vmin=0, vmax=1, aspect="auto", interpolation="nearest",
                            extent=(0.5, pane.values.shape[1] + 0.5, len(pane.values) - 0.5, -0.5))
        if len(pane.rows) <= 100:
            axes.set_yticks(range(len(pane.rows)), pane.rows, parse_math=False)
        for boundary in np.cumsum(pane.groups)[:-1]:
            axes.axvline(boundary + 0.5, color="white", linewidth=1.5)
        shown.colorbar(image, label="images open, fraction")
        return shown
    axes.set_ylabel(pane.ylabel)
    if isinstance(pane, Bars):
        axes.bar(pane.x, pane.heights, width=0.9, color=rgb(HUES[0]))
        return shown
    styles = {"solid": "-", "dash": "--", "dot": ":"}
    for name, trace in pane.traces.items():
        marker = None if trace.dash == "dot" and len(pane.x) > 1 else "o"
        style = {"color": rgb(trace.colour), "marker": marker, "markersize": 2.5}
        axes.plot(pane.x, trace.y, styles[trace.dash], label=name, **style)
    if pane.limits:
        axes.set_ylim(pane.limits[0] - 0.02, pane.limits[1] + 0.02)
    if pane.log:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    if pane.legend and len(pane.traces) > 1:
        outside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if len(pane.traces) > 6 else {"loc": "best"}
        axes.legend(fontsize="x-small", handlelength=3, ncols=1 + len(pane.traces) // 21, **outside)
    return shown


def rgb(colour: tuple[int, int, int]) -> tuple[float, ...]:
    return tuple(value / 255 for value in colour)


# ---------------------------------------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> None:
    """Shows a finished or running run."""
    import cli  # which imports this module

    parser = cli.Parser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder, such as runs/NAME")
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="draw the windows into this folder instead")
    cli.add_visdom_flags(parser)
    args = parser.parse_args(argv)
    folder = args.run.resolve()
    records = utils.read_records(folder)
    if not records:
        raise InputError(f"{args.run} holds no records: give a run folder, with a {utils.METRICS} in it")
    try:
        if args.png:
            draw_images(folder, records, args.png)
            return
        board = Dashboard(folder, args.visdom_server, args.visdom_port, args.visdom_env)
        try:
            board.draw(records, patience=60)
        except board.failure as error:
            raise InputError(f"{board.reason(error)}: start one with python -m visdom.server, or use --png") from error
        print(f"{len(records)} epochs drawn: {board.url}/env/{board.env}")
    except ImportError as error:
        raise InputError(f"{error}; see the README on how to install visdom, or draw with --png FOLDER") from error
    except OSError as error:
        raise InputError(f"cannot draw into {args.png}: {error}") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, AssertionError, EOFError) as error:
        raise InputError(f"{args.run} does not hold a run that can be drawn ({error!r})") from error


def draw_images(folder: Path, records: list[dict], target: Path) -> None:
    """One PNG for each window."""
    shown = panes(folder.name, records, utils.read_json(folder / utils.ARGS), read_matrix(folder))
    target.mkdir(parents=True, exist_ok=True)
    for window, pane in tqdm(shown.items(), "drawing", disable=None, leave=False, unit="window"):
        figure(pane).savefig(target / f"{window}.png", dpi=150)
    print(f"{len(shown)} windows drawn into {target}")


if __name__ == "__main__":
    import cli

    cli.main(main, "dashboard.py")
