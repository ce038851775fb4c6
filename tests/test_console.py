"""What a command says and how it ends."""

import argparse
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from aig import console
from aig.console import InputError, Interrupted, Parser, Signals, TrainingError, number

ROOT = Path(__file__).parent.parent

# ---------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("kind", "limits", "text", "message"),
    [
        (int, {}, "x", "'x' is not an int"),
        (float, {}, "x", "'x' is not a float"),
        (int, {}, "2.5", "is not an int"),
        (int, {"low": 1}, "0", "0 must be at least 1"),
        (float, {"above": 0}, "0", "0 must be above 0"),
        (float, {"above": 0, "below": 1}, "1", "above 0 and below 1"),
        (float, {"low": 0, "high": 1}, "1.5", "at least 0 and at most 1"),
        (float, {}, "inf", "must be finite"),
        (float, {"low": 0}, "nan", "must be at least 0"),
        (float, {}, "nan", "must be finite"),
    ],
)
def test_a_number_out_of_bounds_is_an_error_that_names_the_bounds(kind, limits, text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        number(kind, **limits)(text)


def test_a_number_within_its_bounds_is_taken():
    assert number(int, 1, 3)("3") == 3
    assert number(float, above=0, below=1)("0.25") == 0.25
    assert number(float)("-1e300") == -1e300


@pytest.mark.parametrize("text", ["", ".", "..", "a/b", "/a", "a/", "n" * 201])
def test_a_name_with_a_path_is_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match="name of a folder"):
        console.experiment_name(text)


def test_a_name_is_taken_as_it_is():
    assert console.experiment_name("run-1 ü") == "run-1 ü"


@pytest.fixture
def parser():
    parser = Parser(description="A test.")
    parser.add_argument("--rate", type=number(float), default=0.5, help="how fast")
    parser.add_argument("--name", default="", help="of it")
    parser.add_argument("--depth", type=number(int), help="blocks (default: many)")
    parser.add_argument("--fast", action=argparse.BooleanOptionalAction, default=False, help="be fast")
    parser.add_argument("--steps", type=number(int), nargs="*", help="when")
    parser.add_argument("data", nargs="?", help="where")
    return parser


def test_errors_of_flags_are_input_errors(parser):
    for argv in (["--rate", "x"], ["--unknown"], ["--rate"], ["a", "b"], ["--steps=--"]):
        with pytest.raises(InputError, match=r"\(see --help\)"):
            parser.parse_args(argv)


def test_the_flags_given_are_those_on_the_command_line(parser):
    assert parser.given([]) == {}
    assert parser.given(["--rate", "0.5", "--no-fast", "there"]) == {"rate": 0.5, "fast": False, "data": "there"}
    assert parser.given(["--steps"]) == {"steps": []}
    assert parser.flags.keys() == {"rate", "name", "depth", "fast", "steps", "data"}


def test_help_gives_the_defaults_that_say_something(parser):
    text = " ".join(parser.format_help().split())
    assert "how fast (default: 0.5)" in text
    assert text.count("(default:") == 2  # not of an empty one, one that is off, or one that is there already


# ---------------------------------------------------------------------------------------------- signals


@pytest.fixture
def usual_sigint():
    """A background job of a shell script ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("usual_sigint")
def test_the_first_signal_is_noted_and_the_next_acts_as_usual():
    with Signals() as signals:
        assert signals.received == 0
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_in_another_thread_nothing_is_handled():
    seen = []

    def work():
        with Signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]


# ---------------------------------------------------------------------------------------------- printing


def test_what_is_said_is_printed_and_waits_for_a_log(capsys):
    console.log.clear()
    console.say("hello")
    console.warn("careful")
    assert capsys.readouterr() == ("hello\n", "careful\n")
    assert [line.split("  ")[1] for line in console.log.lines] == ["hello\n", "careful\n"]


def test_a_name_that_is_no_text_is_printed_and_logged_with_escapes(run, tmp_path):
    def main(argv):
        console.say("caf\udce9")  # a file name of Latin-1, as Python reads it
        console.log.write_to(tmp_path / "log.txt")

    assert run(main) == (0, "caf\\udce9\n", "")
    assert (tmp_path / "log.txt").read_text().endswith("caf\\udce9\n")


def test_a_bar_is_silent_without_a_terminal(capsys):
    with console.progress_bar(range(3), "counting", 3, "number") as bar:
        assert list(bar) == [0, 1, 2]
        assert bar.disable
    assert capsys.readouterr() == ("", "")


# ---------------------------------------------------------------------------------------------- how a command ends


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (None, 0, ""),
        (InputError("no such\n  folder"), 2, "script: error: no such folder\n"),
        (TrainingError("not finite"), 1, "script: not finite\n"),
        (Interrupted(signal.SIGTERM, "stopped in epoch 1"), 143, "script: SIGTERM: stopped in epoch 1\n"),
        (Interrupted(signal.SIGUSR1, "stopped"), 128 + signal.SIGUSR1, "script: SIGUSR1: stopped\n"),
        (KeyboardInterrupt(), 130, "script: interrupted; what was finished before is saved\n"),
    ],
)
def test_a_command_ends_with_its_status_and_one_line(run, error, status, line):
    def main(argv):
        if error:
            raise error

    assert run(main) == (status, "", line)


def test_what_nobody_expected_keeps_its_traceback():
    def main():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        console.run_command(main, "script")


STREAMS = """
from aig import console
def main():
    for _ in console.progress_bar(range(2), "counting", 2, "number"):
        console.say("hello")
    console.warn("careful")
    if {fails}:
        raise console.InputError("no such folder")
console.run_command(main, "script")
"""


@pytest.mark.parametrize(("closed", "fails", "expected"), [
    (">&-", False, (0, "", "careful\n")),
    ("2>&-", False, (0, "hello\nhello\n", "")),
    ("<&- >&- 2>&-", False, (0, "", "")),
    (">&-", True, (2, "", "careful\nscript: error: no such folder\n")),
    ("2>&-", True, (2, "hello\nhello\n", "")),
])
def test_a_command_runs_with_its_streams_closed(closed, fails, expected):
    """As some daemons start it."""
    words = shlex.join([sys.executable, "-c", STREAMS.format(fails=fails)])
    done = subprocess.run(f"{words} {closed}", shell=True, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == expected


def test_a_reader_that_goes_away_ends_a_command_without_a_word():
    """As in `train.py ... | head`."""
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-c", STREAMS.format(fails=False)]
    done = subprocess.run(words, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_module_is_recorded_by_its_name(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/aig/analysis/__main__.py", "--out", "figures"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name="aig.analysis.__main__"))
    assert console.command() == "python -m aig.analysis --out figures"


def test_the_command_line_is_recorded_as_typed(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/train.py", "--expname", "two words"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # else that of `python -m pytest`
    assert console.command() == "train.py --expname 'two words'"


def test_infinite_bounds_are_no_bounds():
    assert number(float, -math.inf, math.inf)("7") == 7
