"""The protocol of the long trainings: its arms, and gates that ignore the image."""

import json
from itertools import chain

import pytest
import torch
from steps import small_net, unsettle_norms

import aig
from aig.checkpoint import CHECKPOINT
from aig.console import InputError
from aig.images import Preprocess
from benchmarks import pays


def test_each_arm_has_ninety_epochs_and_the_same_schedule():
    for seed in pays.SEEDS:
        for name, flags in chain.from_iterable(stage.items() for stage in pays.stages(seed)):
            assert f"-s{3 - seed}" not in flags  # nothing of the other seed
            words = flags.split()
            epochs = int(words[words.index("--epochs") + 1])
            assert epochs + (60 if "--pretrained" in words else 0) == (60 if name == "teacher" else 90)
            assert pays.SHARED in flags


def test_fixed_gates_open_by_chance_and_not_by_image(tmp_path):
    torch.manual_seed(0)
    plain = small_net(rates=[1, 1, 1])
    unsettle_norms(plain)
    torch.save({"state_dict": plain.state_dict()}, tmp_path / CHECKPOINT)
    model = pays.with_fixed_gates(tmp_path / CHECKPOINT, [1.0, 0.3, 0.0])
    images = torch.randn(2000, 3, 8, 8)
    model.gate_mode = "sample"
    with torch.no_grad():
        opened = torch.stack(model(images)[1])
        assert (opened[0].mean(), opened[2].mean()) == (1, 0)
        assert opened[1].mean().item() == pytest.approx(0.3, abs=0.03)
        model.gate_mode = "argmax"
        assert [z.unique().tolist() for z in model(images)[1]] == [[1], [0], [0]]
        model.gate_mode = "all"
        torch.testing.assert_close(model(images)[0], aig.load(tmp_path / CHECKPOINT)(images)[0])


def test_a_net_is_tested_at_its_own_budget_and_one_without_a_budget_at_each():
    for stage in pays.stages(1):
        for name, flags in stage.items():
            calibrated = [key for key in pays.tests(f"pays-{name}-s1", flags) if "budget" in key]
            own, each = [f"argmax@{name.replace('budget', 'budget=')}"], ["rates", "floor", "scratch"]
            every = [f"argmax@budget={budget}" for budget in pays.LEVELS]
            assert calibrated == (own if name.startswith("budget") else every if name in each else [])


def test_gates_are_fixed_as_those_of_the_net_to_be_imitated(tmp_path, monkeypatch):
    monkeypatch.setattr(pays, "ROOT", tmp_path)
    pays.prepare("pays-teacher-s1")  # starts from nothing
    with pytest.raises(InputError, match="no results/model/resnet20-cifar10-jpeg-s1: write it with"):
        pays.prepare("pays-control-s1")
    plain = small_net(rates=[1, 1, 1])
    plain.classes, plain.preprocess = list("abcd"), Preprocess(8, (0.5,) * 3, (0.5,) * 3, False)
    aig.save(plain, tmp_path / pays.teacher_folder(1))
    with pytest.raises(InputError, match="pays-floor-s1 has to be trained first"):
        pays.prepare("pays-majority-floor-s1")
    # the others were trained on another machine: their records are kept, their runs are not there
    runs = {"runs/pays-floor-s1": [0.3, 1, 0.8], "results/runs/pays-budget0.6-s1": [1, 0, 0.2]}
    runs |= {f"results/runs/pays-budget{budget}-s1": [1, 1, 1] for budget in (0.75, 0.45)}
    for name, gates in runs.items():
        (tmp_path / name).mkdir(parents=True)
        record = json.dumps({"epoch": 30, "val": {"gates": gates}})
        (tmp_path / name / "metrics.jsonl").write_text(record + "\n")
        with pytest.raises(InputError, match="has to be trained first"):  # until it is tested, it may be in mid-run
            pays.prepare(f"pays-{next(arm for arm, other in pays.IMITATED.items() if other in name)}-s1")
        (tmp_path / name / "test.json").write_text("{}")
    opened = {}
    for arm in pays.IMITATED:
        pays.prepare(f"pays-{arm}-s1")
        state = torch.load(pays.fixed_file(arm, 1))["state_dict"]
        opened[arm] = [state[f"layer{k}.0.fc2.bias"].diff().sigmoid().item() for k in (1, 2, 3)]
    assert opened["majority-floor"] == pytest.approx([0, 1, 1], abs=1e-4)
    assert opened["majority0.6"] == pytest.approx([1, 0, 0], abs=1e-4)
    assert opened["random"] == pytest.approx([0.3, 1, 0.8], abs=1e-4)
