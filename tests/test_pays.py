"""The protocol of the long runs: its arms, gates that ignore the image, and its verdicts."""

import json

import pytest
import torch
from steps import small_net, unsettle_norms

import aig
from aig.checkpoint import CHECKPOINT
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


def test_static_nets_are_compared_on_the_line_between_neighbours():
    points = [(40, 14.0), (10, 20.0), (30, 16.0)]
    assert pays.static_error(points, 20) == pytest.approx(18)
    assert pays.static_error(points, 35) == pytest.approx(15)
    assert pays.static_error(points, 41) is pays.static_error(points, 9) is None


def test_the_table_judges_by_the_margin(tmp_path):
    def keep(arm, **tests):
        for seed in pays.SEEDS:
            folder = tmp_path / f"pays-{arm}-s{seed}"
            folder.mkdir()
            text = {
                mode: {"macs_mean": 1e6 * macs, "top1": 100 - error - seed / 10}
                for mode, (macs, error) in tests.items()
            }
            (folder / "test.json").write_text(json.dumps(text))

    keep("control", argmax=(40, 14))
    keep("resnet14", argmax=(30, 16))
    keep("resnet14-taught", argmax=(30, 15))  # the better one counts
    keep("resnet8", argmax=(10, 20))
    keep("budget0.6", **{"argmax@budget=0.6": (25, 15)})
    keep("floor", argmax=(26, 15))
    keep("budget0.75", **{"argmax@budget=0.75": (30, 15.2)})
    keep("budget0.45", **{"argmax@budget=0.45": (20, 19)})
    keep("majority", argmax=(26, 15.6))
    keep("random", sample=(26, 14.4))
    lines = list(pays.table(tmp_path))
    assert "- budget 0.75: 15.35 against 15.15 of static nets: undecided" in lines
    assert "- budget 0.6: 15.15 against 16.40 of static nets: pays" in lines
    assert "- budget 0.45: 19.15 against 17.65 of static nets: loses" in lines
    assert "- adaptive 15.15 @ 26.00 MMACs against majority 15.75 @ 26.00: pays" in lines
    assert "- adaptive 15.15 @ 26.00 MMACs against random 14.55 @ 26.00: loses" in lines
    assert "| resnet14-taught | 2 | `argmax` | 30.00 | 15.15 (15.10 / 15.20) |" in lines


def test_without_results_there_is_a_table_without_verdicts(tmp_path):
    assert len(list(pays.table(tmp_path))) == 3
