"""The records of a run for TensorBoard: numbers of `metrics.jsonl`, and the heat maps of the dashboard.

    python train.py --tensorboard ...
    tensorboard --logdir runs

They lie in `runs/NAME/tensorboard`. As the dashboard, this has no state: a training that goes on writes the numbers of
all epochs anew. Heat maps are drawn of the newest epoch only.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aig.console import InputError, warn
from aig.dashboard import figure, windows_in
from aig.runs import EVENTS

HEAT_MAPS = ("activations", "modules")  # windows of the dashboard


class TensorBoard:
    """Writes the records of a run into its folder, as events. Raises InputError if tensorboard is not installed."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(f"--tensorboard: it is not installed ({error}): pip install tensorboard") from error
        self.folder, self.kind, self.writer = folder, SummaryWriter, None
        self.written, self.warned = 0, False

    def update(self, records: list[dict]) -> None:
        """Writes what is new. A failure is warned of once, and does not end the training."""
        try:
            if self.writer is None:  # instead of what an earlier call has left
                shutil.rmtree(self.folder / EVENTS, ignore_errors=True)
                self.writer = self.kind(str(self.folder / EVENTS))
            for record in records[self.written :]:
                for tag, value in scalars(record):
                    self.writer.add_scalar(tag, value, record["epoch"])
            self.written = len(records)
            shown = windows_in(self.folder, records)
            for name in HEAT_MAPS:
                if name in shown:
                    self.writer.add_figure(name, figure([shown[name]]), records[-1]["epoch"], close=False)
            self.writer.flush()
        except OSError as error:
            if not self.warned:
                warn(f"tensorboard: {error}; the training goes on")
            self.warned = True


def scalars(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of an epoch and their tags, those of both parts side by side: loss/train, loss/val."""
    numbers = {"lr": record["lr"], "seconds": record["seconds"]}
    for part in ("train", "val"):
        numbers |= {f"{name}/{part}": value for name, value in record[part].items()}
    val = record["val"]
    numbers |= {f"gates/block {block}": rate for block, rate in enumerate(val["gates"], start=1)}
    numbers |= {f"classes/{name}": rate for name, rate in val["classes"].items()}
    yield from ((tag, value) for tag, value in numbers.items() if isinstance(value, (int, float)))
