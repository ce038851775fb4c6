"""What a command says and how it ends: one-line errors, flags, signals, progress bars, exit status.

Exit status: 0 done; 2 bad arguments, or missing or invalid input (one line on stderr); 128 + the signal that stopped a
training, which is saved first; 1 anything else.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

from tqdm import tqdm

from aig import distributed

ESCAPED = "backslashreplace"  # names of files need not be text: write what can be written


class InputError(Exception):
    """Bad arguments, or missing or invalid input: one line that says what to do; exit status 2."""


class TrainingError(Exception):
    """A run that cannot go on, for a non-finite loss or a full disk: one line; exit status 1."""


class Interrupted(Exception):
    """A signal stopped the run; what it had done is saved."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(f"{signal.Signals(number).name}: {message}")
        self.signal = number


class Signals:
    """Inside a `with`, the first SIGINT, SIGTERM or SIGUSR1 is only noted, in `received`; the next acts as usual.

    Under torchrun every one is only noted: torchrun itself sends a second one, and kills what does not end.
    """

    def __init__(self) -> None:
        self.received = 0
        self.usual: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # Python handles signals nowhere else
            handled = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
            self.usual = {number: signal.signal(number, self.note) for number in handled}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.usual.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: Any) -> None:
        self.received = number
        if distributed.world().size == 1:
            self.__exit__()


# ---------------------------------------------------------------------------------------------- printing


class Log:
    """What was said, with times. It waits in `lines` for a run folder, whose log.txt it then goes to.

    A log that cannot be written does not end a run: the next checkpoint reports a full disk.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.path: Path | None = None
        self.lines: list[str] = []

    def add(self, text: str) -> None:
        self.lines.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")
        if self.path:
            self.write_to(self.path)

    def write_to(self, path: Path) -> None:
        """Appends to a file what waits, and from now on every line at once."""
        self.path, waiting, self.lines = path, self.lines, []
        with suppress(OSError), path.open("a", encoding="utf-8", errors=ESCAPED) as file:
            file.writelines(waiting)


log = Log()


def say(text: str, stream: TextIO | None = None) -> None:
    """Prints text, at once, and adds it to the log of the run that is going on."""
    print(text, file=stream, flush=True)
    log.add(text)


def warn(text: str) -> None:
    """The same on stderr."""
    say(text, sys.stderr)


def progress_bar(iterable: Iterable | None, description: str, total: int, unit: str, initial: int = 0) -> tqdm:
    """A bar on the terminal; silent if there is none, and in all processes but the main one."""
    disable = None if distributed.world().is_main else True
    return tqdm(iterable, description, total, leave=False, disable=disable, unit=unit, initial=initial)


# ---------------------------------------------------------------------------------------------- flags


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and whose help gives each default that says something."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=HelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")

    def parse_known_args(
        self, args: Iterable[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Like argparse, but rejects `--flag=--`, which argparse reads as an empty list."""
        args = list(sys.argv[1:] if args is None else args)
        for text in args:
            if text.endswith("=--"):
                self.error(f"argument {text.removesuffix('=--')}: invalid value: '--'")
        return super().parse_known_args(args, namespace)

    @property
    def flags(self) -> dict[str, argparse.Action]:
        """The flags by the name of their value. (argparse has no public list of them.)"""
        return {action.dest: action for action in self._actions if action.dest != "help"}

    def given(self, argv: Iterable[str] | None) -> dict[str, Any]:
        """The values that are on the command line, without any default."""
        unset = object()
        known, _ = self.parse_known_args(argv, argparse.Namespace(**dict.fromkeys(self.flags, unset)))
        return {name: value for name, value in vars(known).items() if value is not unset and value is not None}

    def as_typed(self, values: dict[str, Any], source: str | Path) -> dict[str, Any]:
        """Values of flags that a file records, None left out, checked as if they had been typed. Raises InputError."""
        found = {}
        for name, value in values.items():
            if value is None:
                continue
            try:
                found[name] = typed(self.flags[name], value)
            except (argparse.ArgumentTypeError, TypeError, ValueError, OverflowError) as error:
                raise InputError(f"{source}: the {name.replace('_', '-')} it records is invalid: {error}") from error
        return found


class HelpFormatter(argparse.HelpFormatter):
    """Adds "(default: ...)" to the help of flags that have one, unless it is off, empty or in the text already."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        silent = action.default in (None, False, "", argparse.SUPPRESS) or "default" in text
        return text if silent or not action.option_strings else f"{text} (default: %(default)s)".strip()


def typed(action: argparse.Action, value: Any) -> Any:
    """A recorded value, passed through its flag's own type and choices. Raises ArgumentTypeError."""
    if isinstance(action, argparse.BooleanOptionalAction) or action.nargs == 0:
        if not isinstance(value, bool):
            raise argparse.ArgumentTypeError(f"{value!r} is not true or false")
        return value
    if action.nargs in ("*", "+"):
        if not isinstance(value, list):
            raise argparse.ArgumentTypeError(f"{value!r} is not a list")
        return [action.type(str(item)) for item in value]
    if not isinstance(value, (str, int, float, list)) or isinstance(value, bool):
        raise argparse.ArgumentTypeError(f"{value!r} is not one value")
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    converted = (action.type or str)(text)
    if isinstance(value, list) and converted != value:
        raise argparse.ArgumentTypeError(f"{value!r} is not one value")
    if action.choices is not None and converted not in action.choices:
        raise argparse.ArgumentTypeError(f"{value!r} is not one of {', '.join(action.choices)}")
    return converted


def number(
    kind: type, low: float = -math.inf, high: float = math.inf, above: float = -math.inf, below: float = math.inf
) -> Callable[[str], Any]:
    """An argparse type: an int, float or Fraction in [low, high], larger than `above` and smaller than `below`."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except (ValueError, ZeroDivisionError):
            raise argparse.ArgumentTypeError(f"{text!r} is not a{'n' * (kind is int)} {kind.__name__}") from None
        if kind is int and abs(value) >= 2**63:  # no tensor and no float may hold it
            raise argparse.ArgumentTypeError(f"{text[:20]}... is too large")
        if not (low <= value <= high and above < value < below) or value in (math.inf, -math.inf):
            bounds = [f"at least {low:g}"] * (low > -math.inf) + [f"above {above:g}"] * (above > -math.inf)
            bounds += [f"at most {high:g}"] * (high < math.inf) + [f"below {below:g}"] * (below < math.inf)
            raise argparse.ArgumentTypeError(f"{text} must be {' and '.join(bounds) or 'finite'}")
        return value

    return convert


def one_or_several(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argparse type: a value, or a list of several with commas between them."""

    def convert(text: str) -> Any:
        values = [kind(part) for part in text.split(",")]
        return values if len(values) > 1 else values[0]

    return convert


def experiment_name(text: str) -> str:
    """An argparse type: the name of one folder."""
    if text in ("", ".", "..") or Path(text).name != text or len(text.encode()) > 200:
        raise argparse.ArgumentTypeError(f"{text!r} must be the name of a folder, without a path")
    return text


def command() -> str:
    """The command line of this process."""
    spec = sys.modules["__main__"].__spec__  # of `python -m`
    program = ["python", "-m", spec.name.removesuffix(".__main__")] if spec else [Path(sys.argv[0]).name]
    return shlex.join([*program, *sys.argv[1:]])


# ---------------------------------------------------------------------------------------------- a command's end


def run_command(main: Callable[[], None], name: str) -> NoReturn:
    """Runs `main`, as one of several processes if torchrun started it, and ends the process with its exit status."""
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # broken EXIF data, which nothing here reads
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # --workers is the user's to choose
    warnings.filterwarnings("ignore", message="Grad strides do not match")  # of 1x1 kernels, where it means nothing
    open_streams()
    with distributed.joined() as failures:
        if not distributed.world().is_main:
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - open until the process ends
        if hasattr(sys.stdout, "reconfigure"):  # else it is a notebook's
            sys.stdout.reconfigure(errors=ESCAPED)
        if status := outcome(main, name, failures):
            sys.exit(status)
    sys.exit(0)


def open_streams() -> None:
    """Opens the standard streams that are closed, to lead nowhere: else the next file would get what is printed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)  # the lowest that is free: its own, if nothing has taken that
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def outcome(main: Callable[[], None], name: str, failures: distributed.Failures) -> int:
    """Runs `main` and returns the exit status of this module's docstring, after its one line on stderr."""
    log.clear()
    try:
        main()
        sys.stdout.flush()
        return 0
    except InputError as error:
        line, status = f"{name}: error: {' '.join(str(error).split())}", 2
    except TrainingError as error:
        line, status = f"{name}: {error}", 1
    except BrokenPipeError:  # as in `train.py ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Interrupted as stop:
        line, status = f"{name}: {stop}", 128 + stop.signal
    except KeyboardInterrupt:
        line, status = f"{name}: interrupted; what was finished before is saved", 130
    except Exception as error:
        if isinstance(error, OSError) and error.filename:  # a name too long, a folder that cannot be written, ...
            line, status = f"{name}: error: {error.filename}: {error.strerror}", 2
        elif failures.first():
            raise
        else:
            return 1  # because another process failed, and said why
    # Training stops in every process or in the main one, so the main one reports.
    # An input error may hit one process only, so the first to fail reports.
    first = failures.first()
    if first if status == 2 else distributed.world().is_main:
        print(line, file=sys.stderr)
    return status
