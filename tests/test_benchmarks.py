"""The benchmarks measure what the product does, and run."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from steps import RECIPE, Batches, small_net, train

from benchmarks import timing, train_step

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
