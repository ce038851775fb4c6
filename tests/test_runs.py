"""A run folder: its log, and which checkpoint it stands for."""

import json
import math
import os
import re
import signal
import stat
import threading
import time

import pytest
import torch

import train
import train_img
from aig import engine, runs
from aig.console import InputError, TrainingError

TINY = ["--dataset", "digits", "--depth", 8, "--batch-size", 256, "--target", 0.7, "--device", "cpu"]


@pytest.fixture
def begun(run, tmp_path):
    """A run of two epochs, of which one is done."""
    assert run(train.main, *TINY, "--epochs", 2, "--stop-after", 1, "--save", tmp_path, "--expname", "begun")[0] == 0
    return tmp_path / "begun"


def log_of(folder):
    """The lines of a log without their times, which every line has."""
    lines = (folder / runs.LOG).read_text().splitlines()
    times = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  "
    starts = [line for line in lines if re.match(times, line)]
    assert starts[0] == lines[0]
    return [re.sub(f"^{times}", "", line) for line in lines]


def test_the_log_holds_what_was_printed_and_why_the_run_ended(run, tmp_path):
    status, out, _ = run(train.main, *TINY, "--epochs", 1, "--save", tmp_path, "--expname", "run")
    assert status == 0
    log = log_of(tmp_path / "run")
    assert [line for line in out.splitlines() if line not in log] == []
    assert sum(line.startswith("command: ") for line in log) == 1
    assert log[-1] == "ended: done"


def test_a_resumed_run_goes_on_with_its_log(run, begun):
    before = log_of(begun)
    assert run(train.main, "--resume", begun, "--device", "cpu")[0] == 0
    log = log_of(begun)
    assert log[: len(before)] == before
    assert sum(line.startswith("epoch ") for line in log) == 2
    assert [line for line in log if line.startswith("ended")] == ["ended: done"] * 2


def test_a_signal_is_the_last_line_of_the_log(run, begun, monkeypatch):
    monkeypatch.setattr(engine, "step_noise", at_once(engine.step_noise))
    assert run(train.main, "--resume", begun, "--device", "cpu")[0] == 143
    assert log_of(begun)[-1].startswith("ended: SIGTERM: stopped in epoch 2, 1 of 6 steps; continue with --resume")


def test_an_error_is_the_last_line_of_the_log(run, begun, monkeypatch):
    assert run(train.main, "--resume", begun, "--device", "cpu", "--lr", 1e30)[0] == 1
    assert re.match("ended: .*not finite since epoch 2, step .*last good checkpoint", log_of(begun)[-1])

    def crash(*args):
        raise RuntimeError("a crash")

    monkeypatch.setattr(engine, "step_noise", crash)
    with pytest.raises(RuntimeError, match="a crash"):
        run(train.main, "--resume", begun, "--device", "cpu")
    assert log_of(begun)[-1] == "ended: RuntimeError('a crash')"


def test_a_run_that_replaces_another_replaces_its_log_with_its_first_file(run, begun, monkeypatch):
    again = [*TINY, "--epochs", 1, "--overwrite", "--save", begun.parent, "--expname", begun.name]
    before = log_of(begun)
    assert run(train.main, *again, "--lr", 1e30)[0] == 1  # before its first file
    assert log_of(begun) == before
    assert run(train.main, *again)[0] == 0
    log = log_of(begun)
    assert sum(line.startswith("command: ") for line in log) == 1
    assert sum(line.startswith("epoch 1/1") for line in log) == 1


@pytest.mark.parametrize("kind", ["a full disk", "a folder"])
def test_a_log_that_cannot_be_written_does_not_end_the_run(run, tmp_path, kind):
    (tmp_path / "run").mkdir()
    log = tmp_path / "run" / runs.LOG
    log.mkdir() if kind == "a folder" else log.symlink_to("/dev/full")
    status, _, err = run(train.main, *TINY, "--epochs", 1, "--save", tmp_path, "--expname", "run")
    assert (status, err) == (0, "")
    assert [record["epoch"] for record in runs.read_records(tmp_path / "run")] == [1]


def test_a_signal_before_the_first_file_is_logged_too(run, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "step_noise", at_once(engine.step_noise))
    status, _, err = run(train.main, *TINY, "--epochs", 1, "--save", tmp_path, "--expname", "run")
    assert status == 143
    said = err.removeprefix("script: ").rstrip()
    assert log_of(tmp_path / "run")[-1] == f"ended: {said}"
    assert {path.name for path in (tmp_path / "run").iterdir()} == {runs.CHECKPOINT, runs.ARGS, runs.LOG}


def at_once(function):
    """The function, with a SIGTERM to this process before it."""

    def stopped(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return function(*args)

    return stopped


def test_bad_input_leaves_no_log(run, image_folder, tmp_path):
    photos = image_folder(tmp_path / "photos", size=(40, 40), train=4, val=4)
    (photos / "train/ant/0.png").write_bytes(b"broken")
    command = [photos, "--image-size", 32, "--batch-size", 4, "--epochs", 1, "--workers", 0, "--device", "cpu"]
    status, _, err = run(train_img.main, *command, "--save", tmp_path / "runs")
    assert (status, err.count("\n"), "0.png" in err) == (2, 1, True)
    assert not (tmp_path / "runs").exists()


def test_a_run_folder_stands_for_its_checkpoints(run, begun, tmp_path):
    status, out, _ = run(train.main, "--test", "--resume", begun, "--device", "cpu")
    assert (status, f"written to {begun / runs.TEST}, as argmax" in out) == (0, True)
    (begun / runs.BEST).write_bytes(b"broken")
    assert run(train.main, "--test", "--resume", begun, "--device", "cpu")[0] == 2  # it takes the best model
    assert run(train.main, "--resume", begun, "--device", "cpu")[0] == 0  # training the last checkpoint
    status, _, err = run(train.main, "--resume", tmp_path, "--device", "cpu")
    assert (status, err.count("\n"), "give a run folder or a checkpoint" in err) == (2, 1, True)


def test_each_script_names_the_other_one_for_its_checkpoints(run, begun):
    status, _, err = run(train_img.main, "--test", "--resume", begun)
    assert (status, err.count("\n"), "use train.py" in err) == (2, 1, True)


def test_a_longer_run_goes_on_at_its_last_learning_rate(run, begun):
    """The default milestones scale with --epochs: those of the longer run would begin again at the full rate."""
    assert run(train.main, "--resume", begun, "--device", "cpu")[0] == 0
    status, out, _ = run(train.main, "--resume", begun, "--device", "cpu", "--epochs", 20, "--stop-after", 2)
    assert (status, "the learning rate keeps its milestones" in out) == (0, True)
    rates = [record["lr"] for record in runs.read_records(begun)]
    assert rates == pytest.approx([0.1, 0.01, 0.001, 0.001])


# ---------------------------------------------------------------------------------------------- records and the folder


def epochs_of(folder):
    return [record["epoch"] for record in runs.read_records(folder)]


def later_record(folder, epoch):
    """Adds a record of an epoch that the checkpoint does not know."""
    with (folder / runs.METRICS).open("a") as file:
        file.write(json.dumps({**runs.read_records(folder)[-1], "epoch": epoch}) + "\n")


def test_resuming_first_cuts_the_records_back_to_what_the_checkpoint_has_done(run, begun):
    later_record(begun, 2)
    assert run(train.main, "--resume", begun, "--device", "cpu", "--lr", 1e30)[0] == 1  # before a record of its own
    assert epochs_of(begun) == [1]


def test_records_of_later_epochs_stay_until_there_is_another_in_their_place(run, begun):
    assert run(train.main, "--resume", begun, "--device", "cpu")[0] == 0
    before = (begun / runs.METRICS).read_bytes()
    back = ["--resume", begun, "--device", "cpu", "--start-epoch", 1]
    assert run(train.main, *back, "--lr", 1e30)[0] == 1
    assert (begun / runs.METRICS).read_bytes() == before
    assert run(train.main, *back, "--stop-after", 1)[0] == 0
    assert epochs_of(begun) == [1]
    assert run(train.main, "--resume", begun, "--device", "cpu")[0] == 0
    assert epochs_of(begun) == [1, 2]


def test_going_on_from_the_best_model_drops_what_came_after_it(run, begun):
    best = (begun / runs.BEST).read_bytes()
    assert run(train.main, "--resume", begun, "--device", "cpu")[0] == 0
    (begun / runs.BEST).write_bytes(best)
    assert run(train.main, "--resume", begun / runs.BEST, "--device", "cpu", "--epochs", 1)[0] == 0
    assert epochs_of(begun) == [1, 2]  # nothing was trained, nothing is lost
    assert run(train.main, "--resume", begun / runs.BEST, "--device", "cpu", "--seed", 2)[0] == 0
    assert epochs_of(begun) == [1, 2]
    assert torch.load(begun / runs.CHECKPOINT)["args"]["seed"] == 2


def test_a_run_that_has_no_best_model_yet_goes_on_and_can_be_tested(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(engine, "step_noise", at_once(engine.step_noise))
        assert run(train.main, *TINY, "--epochs", 1, "--save", tmp_path, "--expname", "run")[0] == 143
    folder = tmp_path / "run"
    assert not (folder / runs.BEST).exists()
    assert run(train.main, "--test", "--resume", folder, "--device", "cpu")[0] == 0
    assert runs.read_json(folder / runs.TEST)["argmax"]["epoch"] == 0
    assert run(train.main, "--resume", folder, "--device", "cpu")[0] == 0
    assert (folder / runs.BEST).exists()
    assert epochs_of(folder) == [1]


def test_a_write_that_fails_leaves_the_file_that_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(TypeError), runs.atomic_write(path) as file:
        file.writelines([b"half of it", None])
    assert path.read_text() == "before"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    with runs.atomic_write(path) as file:
        file.write(b"after")
    assert path.read_text() == "after"


def test_a_file_is_on_the_disk_under_its_name(tmp_path, monkeypatch):
    synced, original = [], os.fsync

    def fsync(number):
        synced.append(stat.S_ISDIR(os.fstat(number).st_mode))
        original(number)

    monkeypatch.setattr(os, "fsync", fsync)
    runs.write_json(tmp_path / "file.json", {})
    assert synced == [False, True]  # what is in it, then the folder that names it


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    runs.write_json(tmp_path / "file", {"a": [math.nan, (1, math.inf)], "b": {"c": -math.inf}})
    assert runs.read_json(tmp_path / "file") == {"a": [None, [1, None]], "b": {"c": None}}
    for text in ("{", "[1]", "3"):
        (tmp_path / "file").write_text(text)
        with pytest.raises(InputError, match="damaged"):
            runs.read_json(tmp_path / "file")
    assert runs.read_json(tmp_path / "none") == {}


def test_a_folder_is_locked_for_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "PATIENCE", 0.1)
    with runs.locked(tmp_path):
        with pytest.raises(InputError, match="another process is training in"), runs.locked(tmp_path):
            pass
        assert (tmp_path / runs.LOCK).exists()
    assert not any(tmp_path.iterdir())
    with runs.locked(tmp_path):
        pass


def test_whoever_waits_for_a_lock_gets_it_next_and_nobody_shares_it(tmp_path):
    """The lock file is removed by its holder: a waiter must not end up with the removed one."""
    inside, most = [], []

    def work():
        for _ in range(20):
            with runs.locked(tmp_path):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.001)
                inside.pop()

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert (len(most), max(most)) == (60, 1)


def test_a_failure_is_told_though_the_checkpoint_cannot_be_read(tmp_path):
    run = runs.Run(tmp_path, {})
    run.begun = True

    def fail():
        with runs.start_run(run):
            (tmp_path / runs.CHECKPOINT).write_bytes(b"nothing")
            raise TrainingError("the loss is not finite")

    with pytest.raises(TrainingError, match=r"the loss is not finite; its checkpoint cannot be read \(.*damaged"):
        fail()
