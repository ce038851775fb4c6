"""The live picture of a run: visdom windows drawn from its records (`metrics.jsonl`) alone.

The dashboard has no state: after each epoch every window is drawn in full from all records, so a server that was
down or started late is right again at the next epoch. A server that does not answer costs one warning, at most
`TIMEOUT` seconds an epoch, and never the run.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from typing import Any

TIMEOUT = 2  # seconds
SHOWN_CLASSES = 20


class Silent:
    """The dashboard of a run without `--visdom`: draws nothing."""

    def update(self, records: list[dict]) -> None:
        pass


class Dashboard:
    """Draws the windows of one environment.

    Args:
        env: the visdom environment.
        target_rates: one per block, to tell gated blocks from those that always run.
        server, port: of the visdom server.

    Raises:
        ImportError: if visdom is not installed.
    """

    def __init__(
        self, env: str, target_rates: list[float], server: str = "http://localhost", port: int = 8097
    ) -> None:
        import requests  # a dependency of visdom
        import visdom

        self.url = f"{server}:{port}"
        self.env, self.target_rates = env, target_rates
        self.painter = visdom.Visdom(env=env, send=False, use_incoming_socket=False)  # builds messages only
        self.session, self.failure = requests.Session(), requests.RequestException
        self.warned = False

    def update(self, records: list[dict]) -> None:
        """Redraws every window from the records of all epochs so far."""
        try:
            for message, endpoint in windows(self.painter, records, self.target_rates):
                self.post(message, endpoint)
            self.post({"data": [self.env]}, "save")  # an environment not saved dies with its server
            self.warned = False
        except self.failure as error:
            if not self.warned:
                reason = type(error).__name__
                print(f"visdom: no answer from {self.url} ({reason}); trying again each epoch", file=sys.stderr)
            self.warned = True

    def post(self, message: dict[str, Any], endpoint: str) -> None:
        message = finite({**message, "eid": self.env})
        self.session.post(f"{self.url}/{endpoint}", data=json.dumps(message), timeout=TIMEOUT).raise_for_status()


def connect(env: str, target_rates: list[float]) -> Dashboard | Silent:
    """The dashboard for an experiment; a silent one, after a warning, where visdom is not installed."""
    try:
        return Dashboard(env, target_rates)
    except ImportError as error:
        print(f"--visdom: {error}; see the README on how to install visdom", file=sys.stderr)
        return Silent()


def finite(value: Any) -> Any:
    """Infinite numbers as NaN, which leaves a gap; one infinity would make the whole window vanish."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return math.nan if isinstance(value, float) and math.isinf(value) else value


# ---------------------------------------------------------------------------------------------- windows


def windows(painter: Any, records: list[dict], target_rates: list[float]) -> list[tuple[dict, str]]:
    """The (message, endpoint) pairs that draw every window, given a visdom client that does not send."""
    last = records[-1]["val"]
    curves = Curves(painter, records)
    drawn = [
        curves("learning_rate", "learning rate", {"learning rate": lambda r: r["lr"]}, ytype="log"),
        curves("loss", "loss", both("loss", "loss_classify", "loss_target")),
        *(curves(k, f"{k} accuracy, %", both(k)) for k in ("top1", "top5") if k in last),
        curves("execution_rate", "fraction of branches run", both("execution_rate")),
    ]
    gated = [block for block, rate in enumerate(target_rates) if rate < 1]
    traces = {f"block {b + 1}": (lambda r, b=b: r["val"]["gates"][b]) for b in gated}
    drawn.append(curves("gates", "opening rate (validation)", traces, showlegend=len(gated) <= SHOWN_CLASSES))
    ranked = sorted(last["classes"], key=lambda name: last["classes"][name] or 0)
    if len(ranked) > SHOWN_CLASSES:
        ranked = ranked[: SHOWN_CLASSES // 2] + ranked[-SHOWN_CLASSES // 2 :]
    traces = {name: (lambda r, name=name: r["val"]["classes"][name]) for name in ranked}
    drawn.append(curves("classes", "mean opening rate (validation)", traces))
    if "gates_by_class" in last:
        drawn += [heat_map(painter, last), spread(painter, last)]
    return drawn


def both(*names: str) -> dict[str, Callable[[dict], float]]:
    """Traces of these values in training and in validation."""
    return {
        f"{part} {name}": (lambda r, part=part, name=name: r[part][name]) for name in names for part in ("train", "val")
    }


class Curves:
    """Draws values over the epochs, one complete window a call."""

    def __init__(self, painter: Any, records: list[dict]) -> None:
        self.painter, self.records = painter, records

    def __call__(
        self, window: str, label: str, traces: dict[str, Callable[[dict], float]], **opts: Any
    ) -> tuple[dict, str]:
        epochs = [record["epoch"] for record in self.records]
        values = [[as_number(value(record)) for value in traces.values()] for record in self.records]
        return lines(self.painter, window, "epoch", label, epochs, values, list(traces), **opts)


def as_number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def lines(
    painter: Any,
    window: str,
    xlabel: str,
    ylabel: str,
    x: list[float],
    y: list[list[float]],
    names: list[str],
    **opts: Any,
) -> tuple[dict, str]:
    """One line per name over x; y holds, for each x, a value per name."""
    import numpy as np

    opts = {"title": window, "xlabel": xlabel, "ylabel": ylabel, "legend": names, "showlegend": len(names) > 1} | opts
    opts |= {"markers": True, "markersize": 4}  # without markers a single point draws nothing
    array = np.array(y)
    return painter.line(Y=array if len(names) > 1 else array[:, 0], X=np.array(x), win=window, opts=opts)


def heat_map(painter: Any, last: dict) -> tuple[dict, str]:
    """Classes x blocks, the first class on top."""
    import numpy as np

    rates = last["gates_by_class"]
    opts = {
        "title": "activations: opening rate by class and block",
        "columnnames": [str(block) for block in range(1, len(rates[0]) + 1)],
        "rownames": list(last["classes"]),
        "xlabel": "block",
        "xmin": 0,
        "xmax": 1,
        "layoutopts": {"plotly": {"yaxis": {"autorange": "reversed"}}},
    }
    return painter.heatmap(X=np.array([[as_number(r) for r in row] for row in rates]), win="activations", opts=opts)


def spread(painter: Any, last: dict) -> tuple[dict, str]:
    """Per block: the opening rate, and its standard deviation over the classes relative to the mean."""
    import numpy as np

    rates = np.array([[as_number(r) for r in row] for row in last["gates_by_class"]])  # (K, L)
    mean, std = np.nanmean(rates, 0), np.nanstd(rates, 0)
    relative = np.divide(std, mean, out=np.zeros_like(std), where=mean > 0)
    blocks = list(range(1, len(mean) + 1))
    values = np.stack([mean, relative], 1).tolist()
    return lines(painter, "modules", "block", "rate", blocks, values, ["opening rate", "std / mean over classes"])
