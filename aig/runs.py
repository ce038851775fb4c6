"""A run folder: its files, its lock, its records and its log.

    runs/NAME/checkpoint.pth.tar      after every epoch, and where a signal stopped the run
    runs/NAME/model_best.pth.tar      the same, of the epoch with the best top-1
    runs/NAME/args.json               every flag, versions, hardware, the commands
    runs/NAME/metrics.jsonl           one record an epoch
    runs/NAME/gates_by_class.npy      above 100 classes: the newest classes x blocks matrix
    runs/NAME/test.json               what `--test` measured
    runs/NAME/tensorboard/            with --tensorboard: the records as events
    runs/NAME/log.txt                 what was printed, with times, and at the end why the run ended

Every file is replaced only by a whole one that is on the disk.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import filelock
import numpy as np
import torch

from aig.checkpoint import BEST, CHECKPOINT, TEST, load_checkpoint, read_json
from aig.console import InputError, Interrupted, Signals, TrainingError, command, log
from aig.distributed import ALONE, World
from aig.environment import without_empty_folders

ARGS, METRICS, MATRIX, LOG = "args.json", "metrics.jsonl", "gates_by_class.npy", "log.txt"
EVENTS = "tensorboard"
RUN_FILES = (CHECKPOINT, BEST, ARGS, METRICS, TEST, MATRIX)  # a folder with any of them holds a run
LOCK = ".lock"
PATIENCE = 10  # seconds to wait for a run folder; the image workers of a killed process keep it for 5
MATRIX_CLASSES = 100  # with more classes, the classes x blocks matrix is kept outside of the records


# ---------------------------------------------------------------------------------------------- files


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that replaces `path` only once it is whole and on the disk.

    Raises TrainingError if it cannot be written, for lack of space for instance; `path` is then what it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise TrainingError(f"cannot write {path} ({error.strerror}); what was there before is intact") from error
    try:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that does not do it
            raise TrainingError(f"cannot be sure that {path} is on the disk ({error.strerror})") from error


def nan_to_none(value: Any) -> Any:
    """The value with every non-finite float as None, which strict JSON can hold."""
    if isinstance(value, dict):
        return {key: nan_to_none(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [nan_to_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Writes the value atomically as indented strict JSON."""
    with atomic_write(path) as file:
        file.write(json.dumps(nan_to_none(value), indent=1, allow_nan=False).encode() + b"\n")


def read_records(folder: Path) -> list[dict]:
    """The epoch records of a run folder, [] if it has none; a torn last line (a crash) is left out.

    Raises InputError if another line is damaged.
    """
    path, records = folder / METRICS, []
    try:
        lines = path.read_text().splitlines() if path.exists() else []
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): move it away") from error
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("epoch"), int):
            raise InputError(f"{path}, line {number}, is damaged: repair it or move the file away")
        records.append(record)
    return records


def write_records(folder: Path, records: list[dict]) -> None:
    """Replaces the metrics file by these records, one strict-JSON object a line."""
    with atomic_write(folder / METRICS) as file:
        for record in records:
            file.write(json.dumps(nan_to_none(record), allow_nan=False).encode() + b"\n")


def keep_matrix(validated: dict[str, Any], folder: Path) -> None:
    """Rounds the classes x blocks matrix of a record; above MATRIX_CLASSES it goes to a file of its own."""
    matrix = np.round(validated.pop("gates_by_class"), 4)  # (K, L)
    if len(matrix) > MATRIX_CLASSES:
        with atomic_write(folder / MATRIX) as file:
            np.save(file, matrix)
    else:
        validated["gates_by_class"] = matrix.tolist()


def save_checkpoint(state: dict, folder: Path) -> None:
    """Writes checkpoint.pth.tar and, if state["is_best"], the same as model_best.pth.tar, each atomically."""
    buffer = io.BytesIO()  # torch.save into a file would report a full disk in its own words
    torch.save(state, buffer)
    for name in (CHECKPOINT, BEST) if state["is_best"] else (CHECKPOINT,):
        with atomic_write(folder / name) as file:
            file.write(buffer.getbuffer())


# ---------------------------------------------------------------------------------------------- folders


def check_vacant(folder: Path, overwrite: bool) -> None:
    """Raises InputError if `folder` already holds files of a run, unless it may be overwritten."""
    if any((folder / name).exists() for name in RUN_FILES) and not overwrite:
        go_on = f", go on with --resume {folder / CHECKPOINT}" if (folder / CHECKPOINT).exists() else ""
        how = f"choose another --expname{go_on}, or replace it with --overwrite"
        raise InputError(f"{folder} already holds a run: {how}")


def make_folder(folder: Path, what: str = "the run folder") -> None:
    """Makes the folder if it is missing. Raises OSError, or InputError if it cannot be written into."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise InputError(f"cannot write into {what} {folder}")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from training in a run folder; the lock ends with the process, however that ends.

    Raises InputError if another process keeps it locked.
    """
    path = folder / LOCK
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=PATIENCE)
    except filelock.Timeout:
        raise InputError(f"another process is training in {folder}: wait for it, or stop it") from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is locked: whoever waits for it notices, and makes a new one
        lock.release()


# ---------------------------------------------------------------------------------------------- a run


@dataclass
class Run:
    """A training in its folder; made by `start_run`. Only the main process writes."""

    folder: Path
    args: dict[str, Any]  # what checkpoints record: all flags, and what was derived from the data
    environment: dict[str, Any] = field(default_factory=dict)  # versions and hardware, for args.json
    resumed: Path | None = None  # the checkpoint file it continues, if any
    checkpoint: dict = field(default_factory=dict)  # what that held
    first: int = 1  # the first epoch to run
    overwrite: bool = False  # replace what is in the folder
    save_every: float = math.inf  # seconds between checkpoints within an epoch
    world: World = ALONE

    def __post_init__(self) -> None:
        self.signals = Signals()
        self.begun = self.resumed is not None  # whether the files in the folder are this run's
        self.has_written = False
        self.saved = time.monotonic()
        self.commands, self.records = [command()], []  # records: of the epochs done
        if self.resumed:
            earlier = read_json(self.folder / ARGS).get("commands", [])
            if not isinstance(earlier, list):
                raise InputError(f"{self.folder / ARGS} is damaged: move it away")
            self.commands = [*earlier, command()]
            done = min(self.first, self.checkpoint["epoch"])
            self.records = [record for record in read_records(self.folder) if record["epoch"] < done]

    def begin(self) -> None:
        """Before the first file of this process: makes way for a new run, and writes args.json."""
        if self.has_written:
            return
        self.has_written = True
        if not self.begun:
            self.begun = True
            for name in RUN_FILES:
                (self.folder / name).unlink(missing_ok=True)
            shutil.rmtree(self.folder / EVENTS, ignore_errors=True)
            if not log.path:  # the log there belongs to the run that is replaced
                (self.folder / LOG).unlink(missing_ok=True)
                log.write_to(self.folder / LOG)
        write_json(self.folder / ARGS, {**self.args, "commands": self.commands, **self.environment})

    def save(self, state: Any, is_best: bool = False) -> None:
        """Writes what `state.checkpoint()` returns. Every process must call it."""
        checkpoint = {**state.checkpoint(), "is_best": is_best, "args": self.args}
        if self.world.is_main:
            self.begin()
            save_checkpoint(checkpoint, self.folder)
        self.saved = time.monotonic()

    def save_if_due(self, state: Any) -> None:
        """Saves after a signal, and every `save_every` seconds. Every process must call it.

        Raises Interrupted after a signal that any process has received; the state is saved.
        """
        number, due = self.world.all_max(self.signals.received, time.monotonic() - self.saved > self.save_every)
        if number or due:
            state.check_finite()
            self.save(state)
        if number:
            where = f"epoch {state.epoch}, {state.step} of {state.steps} steps"
            raise Interrupted(number, f"stopped in {where}; continue with --resume {self.folder / CHECKPOINT}")

    def add_record(self, record: dict[str, Any]) -> None:
        """Appends the record of an epoch to metrics.jsonl."""
        if self.world.is_main:
            self.begin()
            keep_matrix(record["val"], self.folder)
            self.records.append(record)
            write_records(self.folder, self.records)

    def last_checkpoint(self) -> str:
        """Where the last good checkpoint is, and what it holds."""
        path = self.folder / CHECKPOINT
        if not self.begun:
            return "nothing was saved yet"
        try:
            state = load_checkpoint(path)
        except (InputError, OSError) as error:  # the reason of the failure counts, not this one
            return f"its checkpoint cannot be read ({error})"
        where = f"epoch {state['epoch']}, step {state['step']}" if state.get("step") else f"epoch {state['epoch'] - 1}"
        return f"the last good checkpoint, after {where}, is {path}"

    def tidy(self) -> None:
        """Brings the files in line with the checkpoint, after a crash.

        Raises InputError if another process has trained in the folder since this one looked.
        """
        for name in RUN_FILES:
            for path in self.folder.glob(f".{name}.*.tmp"):  # what a write that was cut off has left
                path.unlink(missing_ok=True)
        if self.resumed is None:
            check_vacant(self.folder, self.overwrite)
            return
        now = load_checkpoint(self.resumed)
        if any(now.get(key) != self.checkpoint.get(key) for key in ("epoch", "seen")):
            raise InputError(f"another process has just gone on from {self.resumed}: start again")
        if self.resumed.name == CHECKPOINT:
            best, content = self.folder / BEST, self.resumed.read_bytes()
            # a crash may have kept `save_checkpoint` from writing the best model after its checkpoint
            if now.get("is_best") and not (best.exists() and best.read_bytes() == content):
                with atomic_write(best) as file:
                    file.write(content)
            if self.first == now["epoch"]:  # else the records of later epochs stay until there are others
                write_records(self.folder, self.records)


@contextmanager
def start_run(run: Run) -> Iterator[Run]:
    """Makes and locks the run folder, and logs what is said and why the run ends.

    Raises:
        InputError: if the folder cannot be written, or another process trains there.
        TrainingError: raised by the block; the last good checkpoint is added to its message.
    """
    with run.signals:
        if not run.world.is_main:
            yield run
            return
        with without_empty_folders(run.folder):
            make_folder(run.folder)
            with locked(run.folder):
                run.tidy()
                with logged(run):
                    try:
                        yield run
                    except TrainingError as error:
                        raise TrainingError(f"{error}; {run.last_checkpoint()}") from error


@contextmanager
def logged(run: Run) -> Iterator[None]:
    """Appends what is said to log.txt, and why the block ends.

    A run that overwrites another logs nothing to the folder until it writes its first file. A new run that ends with
    an InputError before its first file leaves no log either: bad input changes nothing.
    """
    replaces = run.overwrite and not run.begun and any((run.folder / name).exists() for name in RUN_FILES)
    is_new = not (run.folder / LOG).exists()
    log.add(f"command: {run.commands[-1]}")
    if not replaces:
        log.write_to(run.folder / LOG)
    reason: BaseException | str = "done"
    try:
        yield
    except BaseException as error:
        reason = error
        raise
    finally:
        named = isinstance(reason, (str, InputError, TrainingError, Interrupted))
        log.add(f"ended: {reason if named else repr(reason)}")
        log.clear()
        if isinstance(reason, InputError) and is_new and not run.begun:
            (run.folder / LOG).unlink(missing_ok=True)
