"""The protocol of the long runs: its arms, gates that ignore the image, and its verdicts."""

import json

import pytest
import torch
from steps import small_net, unsettle_norms

import aig
from aig.checkpoint import CHECKPOINT
from aig.console import InputError
from aig.images import Preprocess
from benchmarks import pays


def test_each_arm_has_ninety_epochs_and_the_same_schedule():
    for stage in pays.stages(1):
        for name, flags in stage.items():
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
            every = [f"argmax@budget={budget}" for budget in pays.BUDGETS]
            assert calibrated == (own if name.startswith("budget") else every if name in each else [])


def test_between_two_nets_the_error_is_linear_in_the_logarithm_of_the_cost():
    points = [(40, 14.0), (10, 20.0), (30, 16.0)]
    assert pays.error_at(points, 30 / 3**0.5) == pytest.approx(18)
    assert pays.error_at(points, 30) == pytest.approx(16)
    assert pays.error_at(points, 41) is pays.error_at(points, 9) is None


@pytest.fixture
def keep(tmp_path):
    """Writes what was tested of an arm, for each seed: `keep(arm, gates, mode=(MMACs, error))`."""

    def write(arm, gates=(), seeds=pays.SEEDS, **tests):
        for seed in seeds:
            folder = tmp_path / f"pays-{arm}-s{seed}"
            folder.mkdir()
            text = {
                mode: {"macs_mean": 1e6 * macs, "top1": 100 - error - seed / 10}
                for mode, (macs, error) in tests.items()
            }
            (folder / "test.json").write_text(json.dumps(text))
            (folder / "metrics.jsonl").write_text(json.dumps({"epoch": 30, "val": {"gates": gates}}) + "\n")

    return write


def test_the_table_judges_by_the_margin(tmp_path, keep):
    keep("control", argmax=(40, 14))
    keep("resnet14", argmax=(30, 16))
    keep("resnet14-taught", argmax=(30, 15))  # the better one counts
    keep("resnet8", argmax=(10, 20))
    middle = 30 / 3**0.5
    keep("budget0.75", gates=[0.005, 0.5], **{"argmax@budget=0.75": (30, 15.2)})
    keep("budget0.6", gates=[0.02, 0.98], **{"argmax": (1, 1), "argmax@budget=0.6": (middle, 15)})
    keep("budget0.45", gates=[0, 1], **{"argmax@budget=0.45": (10, 20.7)})
    keep("majority-free", argmax=(middle, 15.2))
    lines = list(pays.table(tmp_path))
    where = lines.index("Not all trainings are done: what follows is provisional.")
    assert lines[where + 2 :] == [
        "- budget 0.75: 15.35 against 15.15 of static nets: undecided; gates that vary: 1 of 2 / 1 of 2",
        "- budget 0.6: 15.15 against 17.65 of static nets: pays; gates that vary: 2 of 2 / 2 of 2",
        "- budget 0.45: 20.85 against 20.15 of static nets: loses; gates that vary: 0 of 2 / 0 of 2",
        "- budget 0.6: 15.15 at 17.32 MMACs against 15.35 at 17.32 of majority-free: undecided",
    ]
    assert "| resnet14-taught | 2 | `argmax` | 30.00 | 15.15 (15.10 / 15.20) |" in lines


def test_adaptivity_is_judged_at_the_cost_of_the_fixed_gates(tmp_path, keep):
    """A net that errs less because it runs more is not adaptive for that."""
    keep("floor", gates=[0.3], **{"argmax": (30, 14.4), "argmax@budget=0.6": (10, 16), "argmax@budget=0.75": (30, 14)})
    keep("majority", argmax=(30 / 3**0.5, 14.4))  # where floor has 15
    keep("random", sample=(10, 17), argmax=(10, 1))
    lines = list(pays.table(tmp_path))
    assert "- floor: 15.15 against 14.55 of majority at 17.32 MMACs: loses; gates that vary: 1 of 1 / 1 of 1" in lines
    assert "- floor: 16.15 against 17.15 of random at 10.00 MMACs: pays; gates that vary: 1 of 1 / 1 of 1" in lines


def test_what_is_half_tested_is_left_out(tmp_path, keep):
    keep("budget0.6", argmax=(20, 15))
    keep("control", seeds=[1], argmax=(40, 14))
    keep("resnet8", argmax=(10, 20))
    assert list(pays.table(tmp_path))[-1] == ""  # no verdict
    keep("budget0.75", **{"argmax@budget=0.75": (40, 14)})
    assert list(pays.table(tmp_path))[-1].startswith("- budget 0.75: 14.15 against 14.10 of static nets: undecided")


def test_gates_are_fixed_as_those_of_the_net_to_be_imitated(tmp_path, monkeypatch):
    monkeypatch.setattr(pays, "ROOT", tmp_path)
    pays.prepare("pays-teacher-s1")  # starts from nothing
    with pytest.raises(InputError, match="no results/model/resnet20-cifar10-jpeg-s1: write it with"):
        pays.prepare("pays-control-s1")
    plain = small_net(rates=[1, 1, 1])
    plain.classes, plain.preprocess = list("abcd"), Preprocess(8, (0.5,) * 3, (0.5,) * 3, False)
    aig.save(plain, tmp_path / pays.teacher_folder(1))
    with pytest.raises(InputError, match="pays-floor-s1 has to be trained first"):
        pays.prepare("pays-majority-s1")
    # the second was trained on another machine: its records are kept, its run is not there
    for name, gates in (("runs/pays-floor-s1", [0.3, 1, 0.8]), ("results/runs/pays-budget0.6-s1", [1, 0, 0.2])):
        (tmp_path / name).mkdir(parents=True)
        record = json.dumps({"epoch": 30, "val": {"gates": gates}})
        (tmp_path / name / "metrics.jsonl").write_text(record + "\n")
    opened = {}
    for arm in pays.IMITATED:
        pays.prepare(f"pays-{arm}-s1")
        state = torch.load(pays.fixed_file(arm, 1))["state_dict"]
        opened[arm] = [state[f"layer{k}.0.fc2.bias"].diff().sigmoid().item() for k in (1, 2, 3)]
    assert opened["majority"] == pytest.approx([0, 1, 1], abs=1e-4)
    assert opened["majority-free"] == pytest.approx([1, 0, 0], abs=1e-4)
    assert opened["random"] == pytest.approx([0.3, 1, 0.8], abs=1e-4)
