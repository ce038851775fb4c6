"""The events of a run for TensorBoard hold what metrics.jsonl holds."""

import json
import sys

import pytest

import train
from aig import tensorboard
from aig.runs import EVENTS, METRICS, read_records
from aig.tensorboard import TensorBoard, scalars

DIGITS = ["--dataset", "digits", "--depth", 8, "--batch-size", 64, "--train-size", 256, "--device", "cpu"]


def written(folder):
    """The numbers in the event files of a run, by tag and epoch, and the tags of the images by epoch."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = loader.EventAccumulator(str(folder / EVENTS), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    numbers = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags["scalars"]}
    return numbers, {tag: [event.step for event in events.Images(tag)] for tag in tags["images"]}


@pytest.fixture
def trained(run, tmp_path):
    def call(*flags):
        status, _, err = run(train.main, *DIGITS, "--save", tmp_path, "--expname", "run", "--tensorboard", *flags)
        assert status == 0, err
        return tmp_path / "run"

    pytest.importorskip("tensorboard")
    return call


def check(folder):
    records, (numbers, images) = read_records(folder), written(folder)
    expected = {}
    for record in records:
        found = {name: record[name] for name in ("lr", "seconds")}
        for part in ("train", "val"):
            values = record[part].items()
            found |= {f"{name}/{part}": value for name, value in values if isinstance(value, (int, float))}
        found |= {f"gates/block {number + 1}": rate for number, rate in enumerate(record["val"]["gates"])}
        found |= {f"classes/{name}": rate for name, rate in record["val"]["classes"].items()}
        for tag, value in found.items():
            expected.setdefault(tag, {})[record["epoch"]] = pytest.approx(value, rel=1e-6)
    assert numbers == expected
    assert images.keys() == set(tensorboard.HEAT_MAPS)
    return records, numbers, images


def test_the_events_are_those_of_the_records(trained):
    records, numbers, images = check(trained("--epochs", 2))
    assert set(images["activations"]) == {1, 2}
    for part in ("train", "val"):  # each number of a record is there
        for name, value in records[-1][part].items():
            if isinstance(value, float):
                assert numbers[f"{name}/{part}"][2] == pytest.approx(value, rel=1e-6)
    assert numbers["gates/block 1"][2] == pytest.approx(records[-1]["val"]["gates"][0], rel=1e-6)
    assert numbers["lr"].keys() == {1, 2}


def test_a_training_that_goes_on_writes_them_all_once(trained):
    trained("--epochs", 3, "--stop-after", 2)
    records, _, _ = check(trained("--resume", "auto", "--epochs", 3))
    assert len(records) == 3


def test_a_run_that_replaces_another_keeps_none_of_its_events(run, trained, tmp_path):
    trained("--epochs", 2)
    assert len(check(trained("--epochs", 1, "--overwrite"))[0]) == 1
    status, *_ = run(train.main, *DIGITS, "--save", tmp_path, "--expname", "run", "--epochs", 1, "--overwrite")
    assert status == 0
    assert not (tmp_path / "run" / EVENTS).exists()


def test_without_the_package_a_run_does_not_begin(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    flags = ["--save", tmp_path, "--expname", "run", "--epochs", 1]
    status, _, err = run(train.main, *DIGITS, *flags, "--tensorboard")
    assert (status, err.count("\n"), "pip install tensorboard" in err) == (2, 1, True)
    assert not (tmp_path / "run").exists()


def test_it_is_for_a_training(run, trained):
    status, _, err = run(train.main, "--test", "--resume", trained("--epochs", 1), "--tensorboard")
    assert (status, err) == (2, "script: error: --tensorboard shows a training: leave it out with --test\n")


def test_values_that_are_not_finite_are_left_out(trained):
    folder = trained("--epochs", 1)
    (record,) = read_records(folder)
    record["train"]["loss"] = None  # as metrics.jsonl holds it
    record["val"]["classes"] = {"a": None, "b": 0.5}
    tags = dict(scalars(record))
    assert "loss/train" not in tags
    assert {tag for tag in tags if tag.startswith("classes/")} == {"classes/b"}
    assert json.loads((folder / METRICS).read_text())["train"]["loss"] is not None


def test_a_disk_that_is_full_is_warned_of_once(capsys, trained, monkeypatch):
    folder = trained("--epochs", 1)
    board, records = TensorBoard(folder), read_records(folder)

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(tensorboard, "windows_in", full)
    capsys.readouterr()
    board.update(records)
    board.update(records)
    assert capsys.readouterr().err.count("no space left on device; the training goes on") == 1
