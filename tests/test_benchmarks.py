"""The benchmarks measure what the product does, and run."""

import json
import math
import sys
import time
from dataclasses import replace

import pytest
import torch
from steps import RECIPE, Batches, small_net
from steps import train as train_net

import aig
import train
from aig.console import InputError
from benchmarks import engines, gpu, latency, timing, train_step
from convnet_aig import BasicBlock, Bottleneck, ResNet_cifar

CPU = torch.device("cpu")


@pytest.mark.parametrize("changes", [{}, {"amp": "bf16", "accumulate": 2, "momentum": 0.9}])
def test_the_step_that_is_timed_is_that_of_the_training(changes):
    torch.manual_seed(0)
    images, labels = torch.randn(16, 3, 8, 8), torch.randint(4, (16,))
    trained, timed = small_net(), small_net()
    train_net(trained, Batches(images, labels), **changes)
    step, network = timing.training_step(timed, replace(RECIPE, **changes), images, labels, 16)
    step()
    assert network is timed
    for name, value in trained.state_dict().items():
        assert torch.equal(value, timed.state_dict()[name]), name


def test_contenders_take_turns():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = timing.interleaved(contenders, 3, CPU)
    assert calls == ["a", "b"] * (3 + timing.WARM_UP)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_short_calls_are_repeated_to_fill_their_slot():
    calls = []
    timing.interleaved({"a": lambda: calls.append(1)}, 1, CPU, slot=1e-3)
    assert len(calls) > timing.WARM_UP + 1


def test_training_steps_are_compared(run, monkeypatch):
    flags = ["--depth", "8", "--batch-size", "4", "--rounds", "1", "--device", "cpu", "--ways", "eager", "contiguous"]
    monkeypatch.setattr(sys, "argv", ["train_step", *flags])
    status, out, err = run(lambda argv: train_step.main())
    assert (status, err) == (0, "")
    steps = json.loads(out.splitlines()[-1])["steps"]
    assert steps.keys() == {
        "AIG, eager", "without gates, eager", "AIG, contiguous", "without gates, contiguous", "original's way"}
    assert all(len(each["seconds"]) == 1 for each in steps.values())


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_gates_decide_by_a_pattern_that_is_in_their_weights(block):
    torch.manual_seed(0)
    model = ResNet_cifar(block, (3, 2, 2), 5, [0.5, 0.5, 1, 0.5, 0.5, 0.5, 0.5]).eval()
    pattern = latency.draw_pattern([0.3, 0.5, 0.5, 0.9, 0.1, 0.7], engines.IMAGES)
    assert (pattern.sum(0) == 3).all()  # in each image as many as the rates ask for
    images = torch.randn(engines.IMAGES, 3, 4, 4).repeat(1, 1, 4, 4)
    z = engines.force(model, images, pattern)
    for network in (model, aig.accelerate(model)):
        gates = torch.stack(network(images)[1])
        assert torch.equal(gates[[0, 1, 3, 4, 5, 6]].bool(), pattern)
        assert torch.equal(gates.t(), z)


@pytest.mark.slow
@pytest.mark.engine
def test_engines_are_compared(run, monkeypatch):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    rates = {"1": [1] * 3, "0.6": [0.6] * 3}
    monkeypatch.setattr(engines, "NETS", {"AIG-110": (16, (1, 3), rates)})
    monkeypatch.setattr(engines, "build", lambda net, rates: ResNet_cifar(BasicBlock, (1, 1, 1), 4, rates).eval())
    flags = ["--engine", "pytorch", "onnxruntime", "--rounds", "2", "--slot", "0.001", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["engines", *flags])
    status, out, err = run(lambda argv: engines.main())
    assert (status, err) == (0, "")
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert sum(line.startswith("| AIG-110 |") for line in out.splitlines()) == len(rows)
    found = {(row["batch"], row["engine"], row["setting"]) for row in rows}
    ways = {1: ["aig.Session"], 3: ["streams", "any batch"]}
    assert found == {
        (batch, engine, setting)
        for batch, forms in ways.items()
        for engine in ["PyTorch, aig.accelerate", *(f"ONNX Runtime, {form}" for form in forms)]
        for setting in ("dense", "1", "0.6")
    } | {(batch, engine, "dense") for batch in ways for engine in ("PyTorch", "ONNX Runtime")}
    for row in rows:
        assert 0 < row["best_s"] <= row["median_s"]
        assert (row["p95_s"] is None) == (row["batch"] > 1)
        assert row["times_best_dense"] <= 1 or row["setting"] != "dense"
        assert row["mac_fraction"] < 0.8 or row["setting"] != "0.6"


def test_an_engine_that_fails_is_an_error(tmp_path):
    job = engines.Job("pytorch", tmp_path, ("dense",), 1, 1)  # there are no files
    with pytest.raises(InputError, match="process of an engine has failed"):
        engines.take_turns([job], 1, 0, "a net")


def test_where_skipping_loses_is_said_of_its_fastest_engine():
    def row(engine, setting, seconds):
        return {"net": "N", "batch": 1, "engine": engine, "setting": setting, "median_s": seconds,
                "times_best_dense": 2 / seconds}

    rows = [row("a", "dense", 2), row("a", "0.6", 4), row("b", "0.6", 2.5), row("a", "0.4", 1), row("b", "0.4", 3)]
    assert engines.losses(rows) == ["- N, batch 1, 0.6: 0.80 (b)"]


# ---------------------------------------------------------------------------------------------- all for a GPU


def test_a_piece_is_done_once_and_one_that_fails_is_recorded_and_stops_no_other(tmp_path):
    todo = {
        "tests_bad": ["-c", "print('so far'); raise SystemExit('it broke')"],
        "tests_good": ["-c", "print('1 passed')"],
    }
    gpu.carry_out_all(todo, tmp_path, math.inf)
    bad, good = (json.loads((tmp_path / f"{name}.json").read_text()) for name in todo)
    assert (bad["status"], bad["last_lines"]) == (1, ["so far", "it broke"])
    assert (good["status"], good["result"], good["command"]) == (0, "1 passed", todo["tests_good"])
    gpu.carry_out_all({name: ["-c", "print('again')"] for name in todo}, tmp_path, math.inf)
    assert "again" not in (tmp_path / "tests_good.log").read_text()
    table = (tmp_path / gpu.TABLE).read_text()
    assert "- tests_good: 1 passed" in table
    assert "## Failed: tests_bad" in table


SAVES = """
import pathlib, signal, sys, time
done = pathlib.Path(sys.argv[1])
def save(*_):
    done.touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
time.sleep(0 if done.exists() else 60)
"""


def test_a_training_is_stopped_in_time_and_goes_on_and_then_its_tests_run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LIMIT", 2)
    todo = {"train_a": ["-c", SAVES, str(tmp_path / "saved")], "test_a_argmax": ["-c", ""], "test_b_argmax": ["-c", ""]}
    gpu.carry_out_all(todo, tmp_path, math.inf)
    assert (tmp_path / "saved").exists()
    assert {path.name for path in tmp_path.glob("*.json")} == {"train_a.json", "test_a_argmax.json"}


def test_a_piece_that_the_budget_cuts_off_is_not_done_and_one_that_is_too_slow_has_failed(tmp_path, monkeypatch):
    todo = {"tests_slow": ["-c", "import time; time.sleep(60)"]}
    gpu.carry_out_all(todo, tmp_path, time.monotonic() + 0.2)
    assert not (tmp_path / "tests_slow.json").exists()
    monkeypatch.setattr(gpu, "LIMIT", 0.2)
    gpu.carry_out_all(todo, tmp_path, math.inf)
    assert json.loads((tmp_path / "tests_slow.json").read_text())["status"] == -15


def test_every_piece_is_a_command_that_its_program_takes(run, tmp_path, monkeypatch):
    found = {}
    monkeypatch.setattr(gpu, "carry_out_all", lambda todo, out, *_: (found.update(todo), (out / gpu.TABLE).touch()))
    assert run(gpu.main, "--out", tmp_path, "--data", tmp_path, "--flags", "--amp bf16")[0] == 0
    kinds = [name.split("_")[0] for name in found]
    assert [kinds.count(kind) for kind in ("step", "inference", "train", "test")] == [16, 6, 3, 9]
    assert kinds[0] == "tests"
    for name, command in found.items():
        if name.startswith("step"):
            monkeypatch.setattr(sys, "argv", command[1:])
            assert train_step.parse().counts
        if name.startswith("train"):
            args = train.make_parser().parse_args(command[1:])
            assert (args.epochs, args.amp, args.resume, args.data) == (350, "bf16", "auto", str(tmp_path))


@pytest.mark.parametrize(("only", "row"), [("step_AIG-8_bf16", "| AIG-8 | bf16 "), ("inference", "| AIG-8 | 1 | 0.6 ")])
def test_a_piece_gives_rows_of_the_table(run, tmp_path, only, row):
    status, out, err = run(gpu.main, "--out", tmp_path, "--small", "--device", "cpu", "--only", only)
    assert (status, err) == (0, "")
    assert row in out
    assert out.endswith((tmp_path / gpu.TABLE).read_text() + "\n")


@pytest.mark.slow
def test_the_small_form_does_everything(run, tmp_path):
    call = gpu.main, "--out", tmp_path, "--small", "--device", "cpu"
    status, out, err = run(*call)
    assert (status, err) == (0, "")
    assert "22 of 22 pieces done" in out
    assert "Failed" not in out
    assert out.count(" % at ") == 9  # the trainings, in every gate mode
    assert run(*call)[1].strip() == out[out.index("22 of 22 p") :].strip()
