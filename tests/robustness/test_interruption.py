"""A signal saves the very step, and the resumed run ends bit for bit where the uninterrupted one does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from faults import records

import train
import train_img
from aig import console, engine, runs
from aig.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
DIGITS = ["--dataset", "digits", "--depth", 8, "--batch-size", 256, "--target", 0.7, "--device", "cpu", "--epochs", 3]
STEPS = 6  # an epoch of 1437 digits


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing disturbed."""
    save = tmp_path_factory.mktemp("runs")
    train.main([str(value) for value in [*DIGITS, "--save", save, "--expname", "straight"]])
    return save / "straight"


def assert_same_run(folder, other):
    assert records(folder) == records(other)
    for name in (runs.CHECKPOINT, runs.BEST):
        first, second = (torch.load(path / name, weights_only=True) for path in (folder, other))
        assert all(torch.equal(value, second["state_dict"][key]) for key, value in first["state_dict"].items())
        for state, same in zip(*(each["optimizer"]["state"].values() for each in (first, second)), strict=True):
            assert torch.equal(state["momentum_buffer"], same["momentum_buffer"])
        for key in ("epoch", "step", "seen", "best_prec1"):
            assert first[key] == second[key]
    assert {path.name for path in folder.iterdir()} == {path.name for path in other.iterdir()}


def at_call(monkeypatch, name, number, action):
    """Runs `action` before the number-th call of a function of the engine; a "step" draws its noise first."""
    name = {"step": "step_noise"}.get(name, name)
    function, calls = getattr(engine, name), iter(range(1, 1 << 30))

    def wrapped(*args, **kwargs):
        if next(calls) == number:
            action()
        return function(*args, **kwargs)

    monkeypatch.setattr(engine, name, wrapped)


def resume(run, main, folder, *more):
    return run(main, "--resume", folder / runs.CHECKPOINT, "--device", "cpu", *more)


@pytest.mark.parametrize(
    ("number", "function", "call", "position"),
    [
        (signal.SIGINT, "step", 1, "epoch 1, 1 of 6 steps"),
        (signal.SIGTERM, "step", STEPS + 3, "epoch 2, 3 of 6 steps"),
        (signal.SIGUSR1, "step", 2 * STEPS, "epoch 2, 6 of 6 steps"),
        (signal.SIGTERM, "evaluate", 1, "epoch 1, 6 of 6 steps"),
        (signal.SIGTERM, "check_health", 2, "epoch 3, 1 of 6 steps"),
    ],
)
def test_a_signal_saves_the_step_and_the_run_goes_on_from_there(
    run, straight, tmp_path, monkeypatch, number, function, call, position
):
    usual = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_call(patch, function, call, lambda: os.kill(os.getpid(), number))
        status, _, err = run(train.main, *DIGITS, "--save", tmp_path, "--expname", "straight")
    folder = tmp_path / "straight"
    assert (status, err.count("\n")) == (128 + number, 1)
    assert position in err
    assert f"continue with --resume {folder / runs.CHECKPOINT}" in err
    assert signal.getsignal(number) == usual
    assert resume(run, train.main, folder)[::2] == (0, "")
    assert_same_run(folder, straight)


def test_a_timer_saves_in_mid_epoch_and_a_crash_loses_no_more(run, straight, tmp_path, monkeypatch):
    def crash():
        raise RuntimeError("a crash")

    with monkeypatch.context() as patch:
        at_call(patch, "step", STEPS + 5, crash)
        with pytest.raises(RuntimeError, match="a crash"):
            run(train.main, *DIGITS, "--save", tmp_path, "--expname", "straight", "--checkpoint-minutes", 1e-9)
    folder = tmp_path / "straight"
    checkpoint = torch.load(folder / runs.CHECKPOINT, weights_only=True)
    assert (checkpoint["epoch"], checkpoint["step"], checkpoint["seen"]) == (2, 4, 4 * 256)
    assert resume(run, train.main, folder)[::2] == (0, "")
    assert_same_run(folder, straight)


def test_a_budget_a_teacher_and_a_cosine_go_on_in_mid_epoch_too(run, straight, tmp_path, monkeypatch):
    plain = [*DIGITS, "--target", 1, "--save", tmp_path, "--expname", "plain"]
    assert run(train.main, *plain)[0] == 0
    start = ["--pretrained", tmp_path / "plain", "--distill", tmp_path / "plain", "--budget", 0.7]
    command = [value for value in DIGITS if value not in ("--target", 0.7)]
    command += [*start, "--lr-schedule", "cosine", "--nesterov", "--no-gate-decay", "--expname", "run"]
    assert run(train.main, *command, "--save", tmp_path / "whole")[0] == 0
    for step in (3, STEPS + 2):  # while the floor comes down, and after
        with monkeypatch.context() as patch:
            at_call(patch, "step", step, lambda: os.kill(os.getpid(), signal.SIGTERM))
            assert run(train.main, *command, "--save", tmp_path / str(step))[0] == 143
        assert resume(run, train.main, tmp_path / str(step) / "run")[::2] == (0, "")
        assert_same_run(tmp_path / str(step) / "run", tmp_path / "whole" / "run")


def test_photographs_with_workers_too(run, image_folder, tmp_path, monkeypatch):
    photos = image_folder(tmp_path / "photos", size=(40, 40), train=10, val=3)
    command = [photos, "--image-size", 32, "--batch-size", 4, "--epochs", 2, "--workers", 2]
    command += ["--device", "cpu", "--expname", "run", "--lr", 0.01]
    assert run(train_img.main, *command, "--save", tmp_path / "straight")[0] == 0
    with monkeypatch.context() as patch:
        at_call(patch, "step", 8, lambda: os.kill(os.getpid(), signal.SIGTERM))
        status, _, err = run(train_img.main, *command, "--save", tmp_path / "stopped")
    assert (status, err.count("\n"), "epoch 2, 3 of 5 steps" in err) == (143, 1, True)
    assert resume(run, train_img.main, tmp_path / "stopped" / "run")[0] == 0
    assert_same_run(tmp_path / "stopped" / "run", tmp_path / "straight" / "run")


def test_an_unfinished_epoch_goes_on_only_as_it_began(run, straight, tmp_path, monkeypatch, contents):
    with monkeypatch.context() as patch:
        at_call(patch, "step", 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run(train.main, *DIGITS, "--save", tmp_path, "--expname", "straight")
    folder = tmp_path / "straight"
    before = contents(folder)
    status, _, err = resume(run, train.main, folder, "--batch-size", 128)
    assert (status, err.count("\n"), "--start-epoch 1" in err) == (2, 1, True)
    for flag, value in (("--seed", 2), ("--val-size", 20), ("--train-size", 1400)):
        status, _, err = resume(run, train.main, folder, flag, value)
        assert (status, err.count("\n"), "--start-epoch 1" in err) == (2, 1, True)
    checkpoint = torch.load(folder / runs.CHECKPOINT, weights_only=True)
    broken = [("step", "two"), ("step", 99), ("seen", None), ("seconds", -1), ("sums", []), ("sums", {})]
    broken += [("sums", {"gates": 1}), ("sums", {**checkpoint["sums"], "gates": torch.zeros(2)})]
    for key, value in broken:
        torch.save({**checkpoint, key: value}, folder / "broken.pth.tar")
        status, _, err = run(train.main, "--resume", folder / "broken.pth.tar", "--device", "cpu")
        assert (status, err.count("\n")) == (2, 1)
    (folder / "broken.pth.tar").unlink()
    assert contents(folder) == before
    assert resume(run, train.main, folder, "--batch-size", 128, "--start-epoch", 1)[::2] == (0, "")
    assert [record["epoch"] for record in records(folder)] == [1, 2, 3]


def test_a_second_signal_acts_as_usual():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores SIGINT
    try:
        with console.Signals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.received == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_real_process_exits_with_128_and_the_signal(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), *map(str, DIGITS), "--epochs", "500", "--print-freq", "1"]
    command += ["--save", str(tmp_path), "--expname", "real"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "step 3/" not in process.stdout.readline():
        assert process.poll() is None
    process.terminate()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143
    assert err.startswith("train.py: SIGTERM: stopped in epoch")
    assert load_checkpoint(tmp_path / "real" / runs.CHECKPOINT)["step"] > 0
