"""The benchmarks measure what the product does, and run."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from steps import RECIPE, Batches, small_net, train

import aig
from aig.console import InputError
from benchmarks import engines, latency, timing, train_step
from convnet_aig import BasicBlock, Bottleneck, ResNet_cifar

CPU = torch.device("cpu")


@pytest.mark.parametrize("changes", [{}, {"amp": "bf16", "accumulate": 2, "momentum": 0.9}])
def test_the_step_that_is_timed_is_that_of_the_training(changes):
    torch.manual_seed(0)
    images, labels = torch.randn(16, 3, 8, 8), torch.randint(4, (16,))
    trained, timed = small_net(), small_net()
    train(trained, Batches(images, labels), **changes)
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
