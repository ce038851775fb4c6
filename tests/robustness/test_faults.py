"""The short form of faults.py, and what else may befall a run: full disks, locks, clocks, lost folders."""

import errno
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import faults
import pytest
import torch

import train
import train_img
from aig import console, data, engine, environment, reports, runs
from aig.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
DIGITS = ["--dataset", "digits", "--depth", 8, "--batch-size", 256, "--target", 0.7, "--device", "cpu"]


@pytest.mark.parametrize(("kind", "times"), [(signal.SIGKILL, 4), (signal.SIGTERM, 2)])
def test_a_training_disturbed_at_random_moments_ends_as_if_it_had_not_been(tmp_path, kind, times):
    report = faults.torment(kind, times, seed=int.from_bytes(os.urandom(4), "big"), root=tmp_path)
    assert "bit for bit" in report


@pytest.fixture
def begun(run, tmp_path):
    """A run of two epochs, of which one is done."""
    command = [*DIGITS, "--epochs", 2, "--stop-after", 1, "--save", tmp_path, "--expname", "begun"]
    assert run(train.main, *command)[0] == 0
    return tmp_path / "begun"


def resume(run, folder, *more):
    return run(train.main, "--resume", folder / runs.CHECKPOINT, "--device", "cpu", *more)


def mount(folder, *options):
    """Mounts a small file system in memory, or skips the test."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")


@pytest.fixture
def small_disk(begun, tmp_path):
    """The run on a disk that has no room for another checkpoint."""
    disk = tmp_path / "disk"
    size = sum(path.stat().st_size for path in begun.iterdir())
    mount(disk, f"size={size + 300_000}")
    shutil.copytree(begun, disk / "begun")
    yield disk / "begun"
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_one_line_and_the_old_checkpoint_stays(run, small_disk):
    before = (small_disk / runs.CHECKPOINT).read_bytes()
    status, _, err = resume(run, small_disk)
    assert (status, err.count("\n")) == (1, 1)
    assert "No space left on device" in err
    assert f"the last good checkpoint, after epoch 1, is {small_disk / runs.CHECKPOINT}" in err
    assert (small_disk / runs.CHECKPOINT).read_bytes() == before
    assert load_checkpoint(small_disk / runs.CHECKPOINT)["epoch"] == 2
    assert not list(small_disk.glob(".*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk.parent)], check=True)
    assert resume(run, small_disk)[0] == 0
    assert load_checkpoint(small_disk / runs.CHECKPOINT)["epoch"] == 3


def test_a_read_only_run_folder_is_one_line(run, small_disk, contents):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk.parent)], check=True)
    before = contents(small_disk)
    status, _, err = resume(run, small_disk)
    assert (status, err.count("\n"), "cannot write into the run folder" in err) == (2, 1, True)
    status, _, err = run(train.main, *DIGITS, "--save", small_disk.parent, "--expname", "new")
    assert (status, err.count("\n"), "Read-only file system" in err) == (2, 1, True)
    status, _, err = run(train.main, "--test", "--resume", small_disk / runs.BEST, "--device", "cpu")
    assert (status, err.count("\n"), "cannot write" in err) == (1, 1, True)
    assert contents(small_disk) == before


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there(begun, monkeypatch, failing):
    def fail(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    before = (begun / runs.CHECKPOINT).read_bytes()
    if failing == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(console.TrainingError, match=r"Input/output error.*intact"):
        runs.save_checkpoint({"is_best": True}, begun)
    assert (begun / runs.CHECKPOINT).read_bytes() == before
    assert not list(begun.glob(".*.tmp"))


def test_a_run_folder_that_vanishes_is_one_line(run, tmp_path, monkeypatch):
    original = engine.evaluate

    def evaluate(*args, **settings):
        if (tmp_path / "run" / runs.CHECKPOINT).exists():
            shutil.rmtree(tmp_path / "run")
        return original(*args, **settings)

    monkeypatch.setattr(engine, "evaluate", evaluate)
    status, _, err = run(train.main, *DIGITS, "--epochs", 3, "--save", tmp_path, "--expname", "run")
    assert (status, err.count("\n")) == (1, 1)
    assert "No such file or directory" in err


def test_photographs_that_vanish_are_one_line_and_the_checkpoint_stays(run, image_folder, tmp_path, monkeypatch):
    photos = image_folder(tmp_path / "photos", size=(40, 40), train=4, val=4)
    command = [photos, "--image-size", 32, "--batch-size", 4, "--epochs", 3, "--workers", 1]
    command += ["--device", "cpu", "--lr", 0.01, "--save", tmp_path, "--expname", "run"]
    original = data.PhotoLoader.batches

    def batches(loader, epoch=0, start=0):
        if epoch == 2:
            shutil.rmtree(tmp_path / "photos")
        return original(loader, epoch, start)

    monkeypatch.setattr(data.PhotoLoader, "batches", batches)
    status, _, err = run(train_img.main, *command)
    assert (status, err.count("\n"), "cannot read the image" in err) == (2, 1, True)
    assert load_checkpoint(tmp_path / "run" / runs.CHECKPOINT)["epoch"] == 2
    status, _, err = run(train_img.main, "--resume", tmp_path / "run" / runs.CHECKPOINT, "--device", "cpu")
    assert (status, err.count("\n"), "no such folder" in err) == (2, 1, True)


def test_a_clock_that_runs_backwards_changes_nothing(run, begun, tmp_path, monkeypatch):
    now = [2e9]

    def backwards():
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", backwards)
    flags = ["--epochs", 2, "--checkpoint-minutes", 1e-9, "--save", tmp_path, "--expname", "again"]
    assert run(train.main, *DIGITS, *flags)[0] == 0
    assert resume(run, begun)[0] == 0
    first, second = (faults.records(folder) for folder in (begun, tmp_path / "again"))
    assert first == second
    assert all(0 <= record["seconds"] < 60 for record in runs.read_records(begun))


def test_a_second_process_on_the_same_folder_is_refused(run, begun, contents, monkeypatch):
    monkeypatch.setattr(runs, "PATIENCE", 0.3)
    hold = "import sys, pathlib\nfrom aig import runs\n"
    hold += "with runs.locked(pathlib.Path(sys.argv[1])): print('locked', flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(begun)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    assert holder.stdout.readline() == b"locked\n"
    before = contents(begun)
    status, _, err = resume(run, begun)
    assert (status, err.count("\n"), "another process is training in" in err) == (2, 1, True)
    status, _, err = run(train.main, *DIGITS, "--overwrite", "--save", begun.parent, "--expname", begun.name)
    assert (status, "another process is training in" in err) == (2, True)
    assert contents(begun) == before
    holder.kill()  # nobody unlocks; the system does
    holder.communicate()
    assert resume(run, begun)[0] == 0


def test_a_run_that_another_process_took_further_meanwhile_is_not_continued(run, begun, monkeypatch):
    original = runs.make_folder

    def meanwhile(folder):
        original(folder)
        state = torch.load(begun / runs.CHECKPOINT, weights_only=True)
        torch.save({**state, "epoch": 3}, begun / runs.CHECKPOINT)

    monkeypatch.setattr(runs, "make_folder", meanwhile)
    status, _, err = resume(run, begun)
    assert (status, err.count("\n"), "start again" in err) == (2, 1, True)
    assert load_checkpoint(begun / runs.CHECKPOINT)["epoch"] == 3


def test_two_new_runs_of_one_name_do_not_meet(run, begun, monkeypatch, contents):
    before, calls, original = contents(begun), [], runs.check_vacant

    def late(folder, overwrite):
        """Finds nothing at first, as if the other run had not begun then."""
        calls.append(folder)
        if len(calls) > 1:
            original(folder, overwrite)

    monkeypatch.setattr(runs, "check_vacant", late)
    status, _, err = run(train.main, *DIGITS, "--save", begun.parent, "--expname", begun.name)
    assert (status, "already holds a run" in err) == (2, True)
    assert contents(begun) == before


def test_what_cut_off_writes_left_is_cleared_away(run, begun):
    (begun / f".{runs.CHECKPOINT}.4711.tmp").write_bytes(b"half")
    (begun / ".mine.tmp").write_bytes(b"not of ours")
    assert resume(run, begun)[0] == 0
    assert [path.name for path in begun.glob(".*")] == [".mine.tmp"]


def test_a_crash_between_checkpoint_and_best_model_is_mended(run, begun):
    checkpoint = (begun / runs.CHECKPOINT).read_bytes()
    assert (begun / runs.BEST).read_bytes() == checkpoint  # the first epoch is the best so far
    for left in (None, b"that of an earlier epoch"):
        (begun / runs.BEST).unlink()
        if left:
            (begun / runs.BEST).write_bytes(left)
        status, out, _ = resume(run, begun, "--epochs", 1)
        assert (status, "epoch 1 is done already" in out) == (0, True)
        assert (begun / runs.BEST).read_bytes() == checkpoint


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(run, begun):
    status, _, err = resume(run, begun, "--lr", 1e30)
    assert (status, err.count("\n")) == (1, 1)
    assert "not finite since epoch 2, step" in err
    assert f"the last good checkpoint, after epoch 1, is {begun / runs.CHECKPOINT}" in err
    records = (begun / runs.METRICS).read_bytes()
    status, _, err = resume(run, begun, "--start-epoch", 1, "--lr", 1e30)
    assert (status, f"after epoch 1, is {begun / runs.CHECKPOINT}" in err) == (1, True)
    assert (begun / runs.METRICS).read_bytes() == records  # nothing new, nothing lost
    status, _, err = run(train.main, *DIGITS, "--lr", 1e30, "--save", begun.parent, "--expname", "diverging")
    assert (status, "nothing was saved yet" in err) == (1, True)


def test_what_is_not_finite_is_not_saved_in_mid_epoch_either(run, begun):
    status, _, err = resume(run, begun, "--lr", 1e30, "--checkpoint-minutes", 1e-9, "--print-freq", 1000)
    assert (status, "not finite since epoch 2, step" in err) == (1, True)
    assert all(value.isfinite().all() for value in load_checkpoint(begun / runs.CHECKPOINT)["state_dict"].values())


def test_resume_auto_starts_goes_on_and_ends(run, begun, tmp_path):
    auto = [*DIGITS, "--epochs", 2, "--save", tmp_path, "--resume", "auto", "--expname"]
    assert run(train.main, *auto, "new", "--stop-after", 1)[0] == 0
    (tmp_path / "left").mkdir()
    (tmp_path / "left" / runs.ARGS).write_text("{}")  # ended before its first checkpoint
    record = (begun / runs.METRICS).read_bytes()
    (tmp_path / "left" / runs.METRICS).write_bytes(record)  # or between the first record and its checkpoint
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / runs.METRICS).write_bytes(record + record.replace(b'"epoch": 1', b'"epoch": 2'))
    status, _, err = run(train.main, *auto, "lost")  # its checkpoint was taken away
    assert (status, "already holds a run" in err) == (2, True)
    for name in ("new", "begun", "left"):
        assert run(train.main, *auto, name)[0] == 0
        assert [record["epoch"] for record in runs.read_records(tmp_path / name)] == [1, 2]
    status, out, _ = run(train.main, *auto, "new")
    assert (status, "epoch 2 is done already" in out) == (0, True)
    test = ["--test", "--device", "cpu", "--save", tmp_path, "--resume", "auto"]
    assert run(train.main, *test, "--expname", "new")[0] == 0
    status, _, err = run(train.main, *test)
    assert (status, err.count("\n"), "--test needs the run" in err) == (2, 1, True)


def test_gates_that_all_decide_the_same_are_named():
    assert reports.collapsed_warning([0.5, 0.9, 0.1], [0.7] * 3) is None
    assert reports.collapsed_warning([1.0, 0.0], [0.95, 0.05]) is None  # close to their targets
    warning = reports.collapsed_warning([1.0, 0.6, 0.0], [0.6] * 3)
    assert "2 of 3 gates" in warning
    assert "1 (open, target 0.6), 3 (closed, target 0.6)" in warning


def test_a_collapse_is_told_in_training(run, tmp_path, monkeypatch):
    original = train.make_model

    def stuck(*args):
        model = original(*args)
        with torch.no_grad():
            model.layer2[0].fc2.bias.copy_(torch.tensor([-50.0, 50.0]))
        return model

    monkeypatch.setattr(train, "make_model", stuck)
    command = [*DIGITS, "--epochs", 1, "--lr", 1e-4, "--save", tmp_path, "--expname", "stuck"]
    status, out, _ = run(train.main, *command)
    assert (status, out.count("warning: 1 of 3 gates")) == (0, 1)
    assert "2 (open, target 0.7)" in out


def test_deterministic_has_torch_refuse_what_does_not_repeat(run, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        command = [*DIGITS, "--epochs", 1, "--deterministic", "--save", tmp_path, "--expname", "run"]
        assert run(train.main, *command)[0] == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True


def test_freed_memory_is_kept_where_the_c_library_can():
    assert environment.keep_memory() or platform.libc_ver()[0] != "glibc"
