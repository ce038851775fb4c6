"""What a training says: its lines, and its warnings when something is wrong."""

import math
from types import SimpleNamespace

import pytest
import torch
from steps import small_net

from aig import reports
from aig.console import TrainingError
from aig.distributed import World

RATES = [0.7, 0.5, 1.0]
USUAL = [0.6, 0.4, 1.0]
CHANCE = math.log(4)


def record(epoch=1, loss=1.0, top1=60.0, gates=USUAL, classes=4):
    """A record of an epoch whose validation came out so."""
    val = {"loss": loss, "loss_classify": loss, "loss_target": 0.0, "top1": top1, "top5": 90.0, "gates": gates}
    val |= {"execution_rate": 0.5, "classes": dict.fromkeys(map(str, range(classes)), 0.5)}
    return {"epoch": epoch, "lr": 0.01, "seconds": 90.0, "train": val, "val": val}


def said(*records, opened=USUAL, mode="argmax", rates=RATES, budget=None, fine_tunes=False, settled=True, taught=0):
    distillation = SimpleNamespace(weight=taught) if taught else None
    recipe = SimpleNamespace(target_rates=rates, budget=budget, fine_tunes=fine_tunes, distillation=distillation)
    return list(reports.warnings_of(records, opened, recipe, mode, settled))


def test_a_usual_epoch_gives_no_warning():
    assert said(record(1), record(2)) == []


# ---------------------------------------------------------------------------------------------- warnings


def test_a_loss_above_ten_times_that_of_guessing_is_an_explosion():
    assert said(record(loss=9.9 * CHANCE)) == []
    (line,) = said(record(loss=10.1 * CHANCE))
    assert line.startswith("warning: the validation loss, 14, is more than 10 times that of guessing (1.39)")
    assert line.endswith("try a smaller --lr")
    assert said(record(loss=10.1 * CHANCE, classes=100)) == []  # where guessing costs log 100


def test_accuracy_at_chance_while_the_loss_grows_is_a_warning():
    (line,) = said(record(1, 1.5, 25.0), record(2, 1.6, 25.0))
    assert "the accuracy, 25.00 %, is that of guessing, and the validation loss grows" in line


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ((1.6, 25.0), (1.5, 25.0)),  # the loss falls
        ((1.5, 25.0), (1.6, 25.1)),  # better than guessing
        ((1.2, 25.0), (1.3, 25.0)),  # below the loss of guessing
        ((None, 25.0), (1.6, 25.0)),  # what a record holds of a loss that was not finite
    ],
)
def test_a_net_that_learns_however_slowly_gets_no_warning(before, now):
    assert said(record(1, *before), record(2, *now)) == []


def test_beside_a_teacher_the_loss_of_guessing_is_smaller():
    assert said(record(loss=1.1 * CHANCE), taught=0.9)[0].startswith("warning: the validation loss")
    assert said(record(loss=0.9 * CHANCE), taught=0.9) == []


def test_under_a_budget_no_flag_is_advised_that_would_be_refused():
    (line,) = said(record(gates=[1.0, 1.0, 1.0]), budget=object())
    assert "every gate is open" in line
    assert "--lossfact" not in line


def test_the_first_epoch_at_chance_is_no_warning():
    assert said(record(1, 1.6, 25.0)) == []


def test_one_class_is_no_guessing():
    assert said(record(1, 0.1, 100.0, classes=1), record(2, 0.8, 100.0, classes=1)) == []


def test_gates_that_are_open_for_all_images_get_a_hint_once():
    everything = [1.0, 1.0, 1.0]
    (line,) = said(record(1, gates=everything))
    assert line.startswith("hint: in gate mode argmax every gate is open for all validation images")
    assert "--threshold" in line
    assert said(record(1, gates=everything), record(2, gates=everything)) == []
    assert len(said(record(1), record(2, gates=everything))) == 1  # not in the first epoch
    assert said(record(1, gates=everything), record(2), record(3, gates=everything)) == []


@pytest.mark.parametrize(("mode", "rates"), [("all", RATES), ("expected", RATES), ("argmax", [1, 1, 1])])
def test_where_nothing_could_be_skipped_there_is_no_hint(mode, rates):
    assert said(record(gates=[1.0] * 3), mode=mode, rates=rates, opened=[1, 1, 1] if rates[0] == 1 else USUAL) == []


def test_a_gate_that_always_did_the_same_has_collapsed():
    (line,) = said(record(), opened=[0.9995, 0.0, 1.0])
    assert line.startswith("warning: 2 of 3 gates did the same for nearly every image, those of blocks ")
    assert "1 (open, target 0.7), 2 (closed, target 0.5);" in line
    assert "larger --lossfact" in line
    assert reports.collapsed_warning([0.998, 0.002, 1.0], RATES) is None
    assert reports.collapsed_warning([1.0, 0.0], [0.95, 0.05]) is None  # near to their targets
    many = reports.collapsed_warning([1.0] * 8, [0.5] * 8)
    assert "8 of 8 gates" in many
    assert "5 (open, target 0.5), ...;" in many


def test_gates_may_be_open_for_all_or_none_under_a_budget_unless_all_of_them_are():
    assert said(record(), opened=[1.0, 0.3, 1.0], budget=object()) == []
    (line,) = said(record(), opened=[1.0, 0.0, 1.0], budget=object())
    assert line.startswith("warning: every gate did the same for nearly every image")
    assert said(record(), opened=[1.0, 1.0, 1.0], rates=[1, 1, 1], budget=object()) == []  # no gates


def test_gates_that_are_open_while_the_targets_come_down_are_no_collapse():
    assert said(record(), opened=[1.0, 1.0, 1.0], settled=False) == []


def test_a_loaded_network_that_the_first_epoch_has_spoilt_is_a_warning():
    (line,) = said(record(top1=25.0), fine_tunes=True)
    assert line.startswith("warning: after the first epoch the loaded network is no better than guessing (25.00 %)")
    assert said(record(top1=26.0), fine_tunes=True) == []
    assert said(record(top1=25.0)) == []  # as a new network may be
    assert said(record(top1=26.0), record(2, top1=25.0), fine_tunes=True) == []


def test_a_process_without_records_warns_of_collapsed_gates_only():
    assert said() == []
    assert len(said(opened=[0.0, 0.4, 1.0])) == 1


# ---------------------------------------------------------------------------------------------- lines


def test_an_epoch_is_one_line():
    assert reports.epoch_line(record(4), epochs=10, last=6, mode="argmax", is_best=True) == (
        "epoch 4/10  lr 0.01  "
        "train (sample): loss 1.0000  top1 60.00 %  top5 90.00 %  execution rate 0.500  "
        "val (argmax): loss 1.0000  top1 60.00 %  top5 90.00 %  execution rate 0.500  (best)  90 s, 3 min left"
    )
    assert "(best)" not in reports.epoch_line(record(4), 10, 6, "argmax", is_best=False)


def test_what_a_budget_has_come_to_is_beside_it():
    assert reports.brief(record()["val"] | {"macs_fraction": 0.6123, "macs_budget": 0.6}).endswith(
        "execution rate 0.500  MACs 0.612 (budget 0.6)")


def test_reports_come_more_often_on_a_terminal_and_in_every_process_alike():
    plain, terminal = SimpleNamespace(disable=True), SimpleNamespace(disable=False)
    assert reports.report_interval(25, 20, plain, World()) == 25
    assert reports.report_interval(25, 20, terminal, World()) == 20

    class Two(World):
        def all_max(self, *numbers):
            return [max(number, 20) for number in numbers]

    assert reports.report_interval(25, 20, plain, Two(1, 2)) == 20


def test_a_report_goes_to_the_bar_or_is_a_line(capsys):
    shown = []
    means = record()["val"]
    reports.report(SimpleNamespace(disable=False, set_postfix_str=shown.append), "step 2/5", means)
    assert (shown, capsys.readouterr().out) == ([reports.brief(means)], "")
    reports.report(SimpleNamespace(disable=True), "step 2/5", means)
    assert capsys.readouterr().out == f"step 2/5  {reports.brief(means)}\n"


@pytest.mark.parametrize("spoil", ["loss", "weight", "statistic", "nothing"])
def test_a_network_that_is_not_finite_is_an_error(spoil):
    model = small_net()
    with torch.no_grad():
        model.linear.bias[0] = math.inf if spoil == "weight" else 0
        model.bn1.running_mean[0] = math.nan if spoil == "statistic" else 0
    loss = math.inf if spoil == "loss" else 1.0
    if spoil == "nothing":
        assert reports.check_health(model, loss, 3) is None
    else:
        with pytest.raises(TrainingError, match="not finite after epoch 3: try a smaller --lr"):
            reports.check_health(model, loss, 3)
