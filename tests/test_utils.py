"""From flags to values: what of the command line reaches the loop, and what a resumed run takes over."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from steps import small_net

import aig
import train
import train_img
import utils
from aig import runs
from aig.analysis.__main__ import main as analyze
from aig.checkpoint import CHECKPOINT, load_checkpoint
from aig.console import InputError
from aig.distributed import World
from convnet_aig import BasicBlock, ResNet_cifar

ROOT = Path(__file__).parent.parent
DIGITS = ["--dataset", "digits", "--depth", 8, "--batch-size", 64, "--target", 0.7, "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run folder of one epoch with flags of its own."""
    save = tmp_path_factory.mktemp("runs")
    flags = [*DIGITS, "--epochs", 2, "--stop-after", 1, "--batch-size", 32, "--train-size", 96]
    flags += ["--save", save, "--expname", "run"]
    train.main([str(flag) for flag in [*flags, "--no-channels-last", "--fused", "--amp", "fp16"]])
    return save / "run"


@pytest.fixture
def fitted(monkeypatch):
    """What `fit` was called with, instead of a training."""
    calls = []

    def fit(state, loader, val, recipe, run, boards):
        calls.append((state, recipe))

    monkeypatch.setattr(utils, "fit", fit)
    return calls


def resume_altered(folder, into, **args):
    """A copy of a run's checkpoint that records other flags."""
    checkpoint = load_checkpoint(folder / CHECKPOINT)
    checkpoint["args"].update(args)
    into.mkdir()
    torch.save(checkpoint, into / CHECKPOINT)
    return into / CHECKPOINT


# ---------------------------------------------------------------------------------------------- flags to values


def values(script, *argv, classes=10):
    """The recipe of a command line."""
    args = utils.settle(script.make_parser().parse_args([str(value) for value in argv]))
    rates = () if script is train else (train_img.target_rates_of(args.target_rates, args.arch, args.target),)
    model = script.make_model(args, classes, *rates)
    topk = (1,) if script is train else (1, 5)
    loaders = SimpleNamespace(val=SimpleNamespace(classes=["name"] * classes, size=(8, 8)))
    return utils.make_recipe(args, None, loaders, model, milestones=(3,), topk=topk, gate_layers=("fc2",))


def test_every_attribute_of_a_recipe_is_a_flag_or_derived_from_some():
    recipe = values(train, *DIGITS[2:], "--lr", 0.3, "--target-warmup", 4, "--temperature", 2, "--seed", 9,
                    "--epochs", 8, "--lrfact", 5, "--amp", "bf16", "--print-freq", 7, "--sync-bn", "--compile",
                    "--warmup", 3)
    assert recipe == replace(
        recipe, target_rates=[0.7] * 3, lossfact=2, lr=0.3, milestones=(3,), epochs=8, last=8, seed=9, topk=[1],
        momentum=0.9, weight_decay=5e-4, lrfact=5, gate_layers=("fc2",), fused=None, warmup=3, target_warmup=4,
        temperature=2, accumulate=1, amp="bf16", compile=True, channels_last=True, sync_bn=True, print_freq=7,
        log_interval=20,
    )
    assert values(train, *DIGITS[2:]).warmup == 0  # as in the original
    photographs = values(train_img, "--warmup", 2, "--accumulate", 3, "--target-rates", "paper", "--target", 0.4)
    assert (photographs.warmup, photographs.accumulate, photographs.weight_decay) == (2, 3, 1e-4)
    assert photographs.target_rates[:4] == [1, 1, 0.8, 1]


@pytest.mark.parametrize(("classes", "topk"), [(1000, [1, 5]), (6, [1, 5]), (5, [1]), (2, [1]), (1, [1])])
def test_top_5_is_left_out_where_there_are_fewer_than_six_classes(classes, topk):
    assert values(train_img, classes=classes).topk == topk


def test_stopping_early_ends_the_run_and_not_the_schedule():
    recipe = values(train, "--epochs", 10, "--start-epoch", 4, "--stop-after", 3)
    assert (recipe.epochs, recipe.last) == (10, 6)
    assert values(train, "--epochs", 5, "--start-epoch", 4, "--stop-after", 3).last == 5


def test_flags_of_speed_reach_the_loop_and_are_taken_over(run, trained, fitted, tmp_path):
    checkpoint = resume_altered(trained, tmp_path / "copy")
    assert run(train.main, "--resume", checkpoint, "--device", "cpu")[0] == 0
    ((state, recipe),) = fitted
    assert (recipe.channels_last, recipe.amp, recipe.fused) == (False, "fp16", True)
    assert state.optimizer.param_groups[0]["fused"] is True
    assert state.model.layer1[0].conv1.weight.is_contiguous()
    assert state.scaler.is_enabled()
    assert state.scaler.state_dict()["_growth_tracker"] == 3  # steps, none of them left out
    assert run(train.main, *DIGITS, "--save", tmp_path, "--expname", "other")[0] == 0
    state, recipe = fitted[1]
    assert (recipe.channels_last, recipe.amp, recipe.compile) == (True, "off", False)
    assert not state.optimizer.param_groups[0]["fused"]
    assert not state.scaler.is_enabled()
    assert state.model.layer2[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("rates", "by_block"), [("0.3", [0.3] * 3), ("0.1,0,0.25", [0.1, 0, 0.25])])
def test_stochastic_depth_reaches_the_net_at_one_rate_or_at_one_a_block(run, fitted, tmp_path, rates, by_block):
    flags = [*DIGITS, "--target", 1, "--stochastic-depth", rates, "--save", tmp_path, "--expname", "run"]
    assert run(train.main, *flags)[0] == 0
    ((state, _),) = fitted
    assert [block.drop.p for block in state.model.blocks()] == by_block


@pytest.fixture
def tf32():
    """Reads TF32's switches, and puts them back at the end."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    yield lambda: [switch.allow_tf32 for switch in switches]
    for switch, value in zip(switches, before, strict=True):
        switch.allow_tf32 = value


def test_tf32_is_torchs_own_choice_unless_given(tf32, monkeypatch):
    monkeypatch.setattr(utils, "run_training", lambda *run: None)
    default = tf32()
    for flags, expected in ([], default), (["--tf32"], [True] * 2), (["--no-tf32"], [False] * 2):
        args = train.make_parser().parse_args(["--device", "cpu", *flags])
        utils.run(args, None, None, small_net(), None)
        assert tf32() == expected


def test_a_training_lets_cudnn_try_its_algorithms_unless_it_is_to_repeat(run, fitted, tmp_path, monkeypatch):
    for name, flags, expected in (("tried", [], True), ("repeats", ["--deterministic"], False)):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", not expected)
        try:
            assert run(train.main, *DIGITS, *flags, "--save", tmp_path, "--expname", name)[0] == 0
        finally:
            torch.use_deterministic_algorithms(False)
        assert torch.backends.cudnn.benchmark == expected


# ---------------------------------------------------------------------------------------------- resuming


def test_a_checkpoint_of_a_schedule_that_was_dropped_is_refused(run, trained, tmp_path):
    for test in ([], ["--test"]):
        checkpoint = resume_altered(trained, tmp_path / f"copy{len(test)}", temperature_end=0.5)
        status, _, err = run(train.main, "--resume", checkpoint, "--device", "cpu", *test)
        assert (status, err.count("\n")) == (2, 1)
        assert "was trained with --temperature-end, which this version does not have" in err


def test_a_checkpoint_in_which_a_dropped_flag_was_off_goes_on(run, trained, fitted, tmp_path):
    checkpoint = resume_altered(trained, tmp_path / "copy", temperature_end=None)
    assert run(train.main, "--resume", checkpoint, "--device", "cpu")[0] == 0
    assert len(fitted) == 1


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        ({"lr": -1}, "the lr it records is invalid: -1 must be above 0"),
        ({"amp": "int8"}, "the amp it records is invalid: 'int8' is not one of off, bf16, fp16"),
        ({"compile": 1}, "the compile it records is invalid: 1 is not true or false"),
        ({"milestones": 3}, "the milestones it records is invalid: 3 is not a list"),
        ({"batch_size": True}, "the batch-size it records is invalid: True is not one value"),
    ],
)
def test_recorded_flags_are_checked_as_if_they_had_been_typed(recorded, message):
    parser = train.make_parser()
    with pytest.raises(InputError, match=message):
        utils.inherit(parser, {"depth": 8, **recorded}, {}, ("depth",), "FILE")


SCRIPTS = {"train": (train, {"depth": 8}), "train_img": (train_img, {"arch": "resnet50"})}


def invalid_values(action):
    """Values that a flag must not take over from a file."""
    yield from ({"a": 1}, {}, torch.ones(2))
    if isinstance(action.default, bool) or action.nargs == 0:
        yield from ("yes", 1, 0.0, "--help", [True])
    elif action.nargs == "*":
        yield from (3, "3", "--help", ["--help"], [True], [[1]])
    else:
        yield from (True, False, [], ["--help"])
        if action.choices or action.type is utils.experiment_name:
            yield from ("no/such", "")
        elif action.type:
            yield from ("--help", "x", "", float("nan"), float("inf"), 10**400)
    if action.choices or action.type not in (None, utils.experiment_name):
        yield "-x"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_recorded_flag_passes_its_own_type_and_choices(script):
    module, architecture = SCRIPTS[script]
    parser, tried = module.make_parser(), 0
    for name, action in parser.flags.items():
        for value in invalid_values(action):
            if name in utils.PER_CALL:
                assert name not in utils.inherit(parser, {**architecture, name: value}, {}, architecture, "FILE")
            else:
                with pytest.raises(InputError, match=f"FILE: the {name.replace('_', '-')} it records is invalid"):
                    utils.inherit(parser, {**architecture, name: value}, {}, architecture, "FILE")
            tried += 1
    assert tried > 200


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_run_records_is_what_its_command_line_gave(script):
    """args.json is JSON, and a checkpoint holds the same: neither may change a value on its way back."""
    module, architecture = SCRIPTS[script]
    parser = module.make_parser()
    flags = ["--lr", 0.25, "--seed", 7, "--tf32", "--no-channels-last", "--threshold", 0.7, "--checkpoint-minutes", 2]
    flags += ["--stochastic-depth", "0.1,0,0.25"]
    flags += ["--milestones", 3, 9] if script == "train" else ["--target-rates", "paper"]
    given = vars(parser.parse_args([str(flag) for flag in flags])) | architecture
    recorded = json.loads(json.dumps({name: value for name, value in given.items() if name not in utils.PER_CALL}))
    taken = utils.inherit(parser, recorded, {}, architecture, "FILE")
    assert taken == {name: value for name, value in recorded.items() if value is not None}


def test_resume_auto_tests_the_best_model_and_trains_on_from_the_last(trained, fitted, tmp_path):
    resume_altered(trained, tmp_path / "copy")
    flags = ["--save", str(tmp_path), "--expname", "copy", "--resume", "auto", "--device", "cpu"]
    args, _ = utils.parse(train.make_parser(), [*flags, "--test"], ("depth",))
    assert args.resume == str(tmp_path / "copy" / CHECKPOINT)  # there is nothing else yet
    (tmp_path / "copy" / runs.BEST).write_bytes((trained / runs.BEST).read_bytes())
    for more, name in ([], CHECKPOINT), (["--test"], runs.BEST):
        args, _ = utils.parse(train.make_parser(), [*flags, *more], ("depth",))
        assert args.resume == str(tmp_path / "copy" / name)


def test_a_test_keeps_what_another_has_written_meanwhile(run, trained, tmp_path, monkeypatch):
    path = resume_altered(trained, tmp_path / "copy").parent / runs.TEST
    original = utils.evaluation.measure

    def measure(*args, **settings):
        runs.write_json(path, {"all": {"top1": 1}})
        return original(*args, **settings)

    monkeypatch.setattr(utils.evaluation, "measure", measure)
    assert run(train.main, "--test", "--resume", path.parent, "--device", "cpu")[0] == 0
    tested = runs.read_json(path)
    assert tested.keys() == {"all", "argmax"}
    assert tested["all"] == {"top1": 1}


def test_schedules_go_on_after_an_interruption(tmp_path):
    common = ["--dataset", "digits", "--depth", "8", "--epochs", "3", "--save", str(tmp_path), "--target-warmup", "2"]
    common += ["--temperature", "2", "--train-size", "300", "--lrfact", "3", "--device", "cpu"]
    train.main([*common, "--expname", "whole"])
    train.main([*common, "--expname", "parts", "--stop-after", "1"])
    train.main(["--resume", str(tmp_path / "parts"), "--device", "cpu"])
    whole, parts = ([{**record, "seconds": 0} for record in runs.read_records(tmp_path / name)]
                    for name in ("whole", "parts"))
    assert whole == parts
    files = [tmp_path / name / CHECKPOINT for name in ("whole", "parts")]
    whole, parts = (load_checkpoint(file)["state_dict"] for file in files)
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())


# ---------------------------------------------------------------------------------------------- beyond the paper


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The run folders of a plain network and of one that was gated from it, to a budget."""
    save = tmp_path_factory.mktemp("tuned")
    common = ["--dataset", "digits", "--depth", "8", "--batch-size", "64", "--device", "cpu", "--save", str(save)]
    common += ["--val-size", "200"]
    train.main([*common, "--target", "1", "--epochs", "3", "--lr", "0.05", "--expname", "plain"])
    beyond = ["--pretrained", str(save / "plain"), "--distill", str(save / "plain"), "--budget", "0.7"]
    beyond += ["--lr-schedule", "cosine", "--nesterov", "--no-gate-decay"]
    train.main([*common, *beyond, "--epochs", "6", "--expname", "gated"])
    return save


@pytest.fixture
def copied(tuned, tmp_path):
    shutil.copytree(tuned, tmp_path / "runs")
    return tmp_path / "runs"


def test_a_budget_is_recorded_with_its_terms_and_kept(tuned):
    records = runs.read_records(tuned / "gated")
    for record in records:
        for part in (record["train"], record["val"]):
            terms = [value for name, value in part.items() if name.startswith("loss_")]
            assert part["loss"] == pytest.approx(sum(terms))
            assert {"loss_classify", "loss_distill", "loss_budget", "loss_floor"} <= set(part)
            assert "loss_target" not in part
            assert part["macs_budget"] == pytest.approx(0.7)
    assert records[0]["train"]["macs_fraction"] > 0.8  # the floor has to come down first
    assert records[-1]["train"]["macs_fraction"] == pytest.approx(0.7, abs=0.05)
    assert records[-1]["lr"] == 0
    args = runs.read_json(tuned / "gated" / runs.ARGS)
    assert (args["lr"], args["target_warmup"], args["lossfact"]) == (utils.FINE_TUNING_LR, 2, 0)
    assert args["mean"] == runs.read_json(tuned / "plain" / runs.ARGS)["mean"]


def test_images_are_normalised_as_those_of_the_pretrained_network(run, copied, tmp_path):
    path = copied / "plain" / CHECKPOINT
    checkpoint = torch.load(path)
    checkpoint["args"] |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    torch.save(checkpoint, tmp_path / "plain.pth.tar")
    command = ["--dataset", "digits", "--depth", 8, "--device", "cpu", "--epochs", 1, "--save", tmp_path]
    assert run(train.main, *command, "--pretrained", tmp_path / "plain.pth.tar", "--expname", "run")[0] == 0
    args = runs.read_json(tmp_path / "run" / runs.ARGS)
    assert (args["mean"], args["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


def test_the_best_model_is_one_after_the_floor_has_come_down(tuned):
    best = load_checkpoint(tuned / "gated" / runs.BEST)
    assert best["epoch"] - 1 >= 2  # before that the floor comes down
    accuracies = [record["val"]["top1"] for record in runs.read_records(tuned / "gated")]
    assert best["best_prec1"] == max(accuracies[1:])


def test_a_test_at_a_budget_keeps_its_thresholds_for_aig_load(run, copied):
    folder = copied / "gated"
    shutil.rmtree(copied / "plain")  # neither the teacher nor the start is needed
    assert run(train.main, "--test", "--resume", folder)[0] == 0
    status, out, err = run(train.main, "--test", "--resume", folder, "--budget", 0.75)
    assert (status, err) == (0, "")
    assert "chosen for the budget 0.75 on 200 held-out training images" in out
    assert "target" not in out.replace("0.0000 target", "")
    tested = runs.read_json(folder / runs.TEST)
    assert tested.keys() == {"argmax", "argmax@budget=0.75"}
    result = tested["argmax@budget=0.75"]
    assert result["macs_fraction"] == pytest.approx(0.75, abs=0.03)
    assert result["checkpoint"] == runs.BEST
    assert (result["image_size"], result["data"]) == ([8, 8], "data")
    assert "loss_budget" not in result
    assert aig.load(folder, budget=0.75).threshold == result["threshold"]
    assert aig.load(folder).threshold == 0.5


def test_a_run_with_a_teacher_goes_on_only_with_that_teacher(run, tuned, tmp_path):
    teacher = tmp_path / "teacher"
    command = ["--resume", resume_altered(tuned / "gated", tmp_path / "run", distill=str(teacher)), "--device", "cpu"]
    status, _, err = run(train.main, *command)
    assert (status, err) == (2, f"script: error: no checkpoint at {teacher}\n")
    other = load_checkpoint(tuned / "plain" / runs.BEST)
    other["state_dict"]["linear.bias"] += 1
    torch.save(other, teacher)
    status, _, err = run(train.main, *command)
    assert (status, len(err.splitlines())) == (2, 1)
    assert f"{teacher} is not the teacher that this run began with: name that one with --distill" in err
    assert run(train.main, *command, "--distill", tuned / "plain")[0] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", 9], "start a new run from its weights, with --pretrained"),
        (["--milestones", 2], "a cosine has no steps"),
        (["--pretrained", "plain"], "starts a new run"),
        (["--test", "--budget", 0.7, "--gate-mode", "sample"], "--gate-mode sample: --test --budget is about argmax"),
        (["--gate-decay"], "--gate-decay is decided when a run begins"),
        (["--lr-schedule", "step"], "--lr-schedule is decided when a run begins"),
        (["--budget", 0.6], "--budget is decided when a run begins"),
        (["--overwrite"], "--overwrite starts a run anew: leave it out to go on from"),
        (["--resume", "auto", "--expname", "x", "--overwrite"], "leave one out"),
        (["--test", "--overwrite"], "--overwrite is for training"),
        (["--test", "--budget", 0.7, "--no-budget-floor"], "--budget-floor works only in a training"),
        (["--test", "--gate-mode", "all", "--threshold", 0.9], "--threshold does nothing in gate mode all"),
        (["--test", "--gate-samples", 3], "--gate-samples does nothing in gate mode argmax"),
        (["--test", "--budget", 0.7, "--threshold", 0.4], "--threshold"),
        (["--test", "--budget", 0.01], "--budget: 0.01 is out of reach"),
        (["--test", "--distill", "plain"], "--distill is for training"),
        (["--test", "--pretrained", "plain"], "--pretrained is for training"),
    ],
)
def test_what_a_tuned_run_cannot_do_gets_one_line(run, copied, contents, flags, message):
    before = contents(copied)
    status, _, err = run(train.main, "--resume", copied / "gated", *flags)
    assert (status, len(err.splitlines())) == (2, 1)
    assert message in err
    assert contents(copied) == before


def test_a_copy_of_a_checkpoint_does_not_go_on_in_the_folder_of_another_run(run, copied, contents):
    for name in ("plain", "gated"):
        (copied / name / CHECKPOINT).rename(copied / f"{name}.pth.tar")
    more = ("--epochs", 4, "--device", "cpu")
    assert run(train.main, "--resume", copied / "plain.pth.tar", *more)[0] == 0
    before = contents(copied)
    for name in ("plain", "gated"):
        status, _, err = run(train.main, "--resume", copied / f"{name}.pth.tar")
        assert (status, len(err.splitlines())) == (2, 1)
        assert f"{copied} holds a run, which going on from {copied / name}.pth.tar would replace" in err
    assert contents(copied) == before


@pytest.mark.parametrize(("name", "is_best"), [(CHECKPOINT, False), ("copy.pth.tar", True)])
def test_a_best_model_that_is_not_there_is_none(name, is_best, run, tuned, tmp_path):
    checkpoint = load_checkpoint(tuned / "plain" / CHECKPOINT)
    torch.save({**checkpoint, "best_prec1": 99.5, "is_best": is_best}, tmp_path / name)
    status, out, _ = run(train.main, "--resume", tmp_path / name, "--epochs", 4, "--device", "cpu")
    assert (status, f"there is no {runs.BEST} beside" in out, "best top-1 99.5" in out) == (0, True, False)
    assert load_checkpoint(tmp_path / runs.BEST)["epoch"] == 5


@pytest.mark.parametrize(("name", "flags", "why"), [
    ("gated", ["--threshold", 0.4], "--threshold has changed"),
    ("gated", ["--gate-mode", "sample"], "--gate-mode has changed"),
    ("gated", ["--val-size", 100], "the validation set has changed, and earlier epochs saw its images"),
    ("gated", ["--lr", 0.01], ""),
    ("sampled", ["--threshold", 0.4], ""),
    ("plain", ["--gate-mode", "sample"], ""),  # all modes are the same
])
def test_the_best_model_is_one_that_was_chosen_alike(name, flags, why, run, tuned, tmp_path):
    recorded = {"gate_mode": "sample"} if name == "sampled" else {}
    file = resume_altered(tuned / name.replace("sampled", "gated"), tmp_path / "run", **recorded)
    torch.save({**load_checkpoint(file), "best_prec1": 99.5, "is_best": False}, file)
    shutil.copy(file, file.with_name(runs.BEST))
    _, out, _ = run(train.main, "--resume", file, "--device", "cpu", "--start-epoch", 3, *flags)
    assert [line for line in out.splitlines() if "chosen anew" in line] == (
        [f"{why}: the best model is chosen anew"] if why else []
    )
    assert ("best top-1 99.5" in out) == (not why)


def test_a_changed_validation_set_is_said_even_if_there_is_no_best_model_yet(run, tuned, tmp_path):
    file = resume_altered(tuned / "gated", tmp_path / "run")
    torch.save({**load_checkpoint(file), "best_prec1": -1.0, "is_best": False}, file)
    for flags, said in ((["--val-size", 100], 1), ([], 0)):
        copied = shutil.copytree(file.parent, tmp_path / f"said{said}")
        _, out, _ = run(train.main, "--resume", copied, "--device", "cpu", "--start-epoch", 3, *flags)
        assert out.count("the validation set has changed, and earlier epochs saw its images") == said
        assert f"there is no {runs.BEST} beside" not in out


def test_a_cosine_of_one_step_an_epoch_says_so(run, tmp_path):
    command = ["--dataset", "digits", "--depth", 8, "--device", "cpu", "--lr-schedule", "cosine", "--epochs", 1]
    for size, said in ((2048, True), (1024, False)):
        _, out, _ = run(train.main, *command, "--batch-size", size, "--save", tmp_path, "--expname", str(size))
        assert ("the last epoch trains nothing" in out) == said


def test_flags_of_the_budget_and_the_teacher_win_on_resume(tuned, fitted, tmp_path):
    for name, flags in enumerate((["--budget-weight", "30"], ["--distill-weight", "0.3"], ["--no-budget-floor"])):
        resume = resume_altered(tuned / "gated", tmp_path / str(name))
        train.main(["--resume", str(resume), "--device", "cpu", "--start-epoch", "3", *flags])
    (_, weight), (_, taught), (_, free) = fitted
    assert (weight.budget.weight, taught.distillation.weight, free.budget.floor, free.target_warmup) == (30, 0.3, 0, 0)


def test_a_test_at_a_budget_is_in_argmax_whatever_the_run_was_validated_in(run, tuned, tmp_path):
    resume = resume_altered(tuned / "gated", tmp_path / "run", gate_mode="sample")
    assert run(train.main, "--test", "--resume", resume, "--budget", 0.75)[0] == 0
    assert runs.read_json(tmp_path / "run" / runs.TEST).keys() == {"argmax@budget=0.75"}


def test_a_teacher_runs_in_the_precision_of_amp(monkeypatch, run, tuned, fitted, tmp_path):
    asked = []
    monkeypatch.setattr(utils.networks, "load_teacher", lambda *args: asked.append(args[-1]))
    command = ["--dataset", "digits", "--depth", 8, "--val-size", 200, "--save", tmp_path, "--device", "cpu"]
    for amp in ("off", "bf16"):
        assert run(train.main, *command, "--distill", tuned / "plain", "--amp", amp, "--expname", amp)[0] == 0
    assert asked == [None, torch.bfloat16]
    old = resume_altered(tuned / "gated", tmp_path / "old", distill_sha256="x", distill=str(tuned / "plain"))
    _, out, _ = run(train.main, "--resume", old, "--device", "cpu")
    assert f"whether {tuned / 'plain'} is its teacher cannot be checked" in out


def test_a_run_says_what_its_start_gave_and_whether_images_were_held_out(run, tuned, tmp_path):
    plain = runs.read_records(tuned / "plain")
    common = ["--dataset", "digits", "--depth", 8, "--epochs", 1, "--save", tmp_path, "--device", "cpu"]
    common += ["--pretrained", tuned / "plain" / CHECKPOINT, "--budget", 0.7]
    status, out, _ = run(train.main, *common, "--val-size", 200, "--expname", "same")
    assert status == 0
    assert f"before training, with every gate open: top1 {plain[-1]['val']['top1']:.2f} %" in out
    assert "warning" not in out.partition("epoch 1/1")[0]
    _, out, _ = run(train.main, *common, "--distill", tuned / "plain", "--val-size", 100, "--expname", "other")
    assert out.count("had another --val-size: it may have been trained on images that this run validates on") == 2


def test_a_new_run_does_not_replace_its_own_start_or_teacher(run, copied, contents):
    before = contents(copied)
    for flag in ("--pretrained", "--distill"):
        command = ["--dataset", "digits", "--depth", 8, "--target", 1, "--save", copied, "--expname", "plain"]
        status, _, err = run(train.main, *command, "--overwrite", flag, copied / "plain")
        assert (status, len(err.splitlines())) == (2, 1)
        assert f"{flag} {copied / 'plain'} is in the folder of the new run" in err
    assert contents(copied) == before


def test_while_the_floor_comes_down_there_is_no_best_accuracy(run, tuned, tmp_path):
    command = ["--dataset", "digits", "--depth", 8, "--save", tmp_path, "--pretrained", tuned / "plain"]
    status, out, _ = run(train.main, *command, "--budget", 0.7, "--epochs", 9, "--stop-after", 1, "--expname", "run")
    assert status == 0
    assert f"the newest model, since target rates or floor have yet to come down: {tmp_path / 'run' / runs.BEST}" in out


def test_a_plain_run_is_not_resumed_to_a_budget(run, copied):
    status, _, err = run(train.main, "--resume", copied / "plain", "--budget", 0.7)
    assert (status, len(err.splitlines())) == (2, 1)
    assert "--budget is decided when a run begins: start a new one with --pretrained" in err


def test_a_network_without_gates_keeps_no_budget(run, copied):
    status, _, err = run(train.main, "--test", "--resume", copied / "plain", "--budget", 0.7)
    assert (status, err) == (2, "script: error: --budget: this network has no gates\n")


@pytest.mark.parametrize("script", [train, train_img])
def test_no_cuda_is_the_cpu(script):
    assert script.make_parser().parse_args(["--no-cuda"]).device == "cpu"


@pytest.mark.parametrize(("flags", "own", "key"), [
    ([], {"image_size": 224}, "argmax"),
    (["--image-size", "128"], {"image_size": 224}, "argmax+size=128"),
    (["--image-size", "128", "--gate-mode", "sample", "--reestimate-bn"], {"image_size": 224}, "sample+size=128+bn"),
    (["--image-size", "128", "--budget", "0.7"], {"image_size": 128}, "argmax@budget=0.7"),
    (["--threshold", "0.7"], {}, "argmax@0.7"),
])
def test_a_result_is_named_by_what_is_not_usual(flags, own, key):
    assert utils.result_key(train_img.make_parser().parse_args(["photos", *flags]), own) == key


@pytest.mark.parametrize("flags", [["--reestimate-bn"], ["--budget", 0.7]])
def test_some_tests_are_for_one_process(run, copied, monkeypatch, flags):
    monkeypatch.setattr(utils.distributed, "world", lambda: World(0, 2))
    with pytest.raises(InputError, match=f"{flags[0]}: use one process"):
        train.main(["--test", "--resume", str(copied / "gated"), "--device", "cpu", *map(str, flags)])


def test_a_split_belongs_to_its_images(run, image_folder, tmp_path):
    image_folder(tmp_path, all=8)
    image_folder(tmp_path / "other", train=2, test=3)
    command = ["--dataset", "folder", "--data", tmp_path / "all", "--split", 0.25, "--depth", 8, "--batch-size", 4]
    assert run(train.main, *command, "--epochs", 1, "--device", "cpu", "--save", tmp_path, "--expname", "run")[0] == 0
    test = ["--test", "--resume", tmp_path / "run", "--device", "cpu"]
    for more, images in ([], 4), (["--data", tmp_path / "other"], 6):
        assert run(train.main, *test, *more)[0] == 0
        assert runs.read_json(tmp_path / "run" / runs.TEST)["argmax"]["images"] == images
    for main, rest in ((train.main, test), (analyze, [*test[1:], "--out", tmp_path / "figures"])):
        status, _, err = run(main, *rest, "--split", 0.5)
        assert (status, "was trained with --split 0.25, so some of these test images" in err) == (2, True)
    checkpoint = torch.load(tmp_path / "run" / CHECKPOINT)
    del checkpoint["args"]["split_by"]
    torch.save(checkpoint, tmp_path / "run" / CHECKPOINT)
    resume = ["--resume", tmp_path / "run" / CHECKPOINT, "--device", "cpu"]
    assert run(train.main, "--test", *resume, "--data", tmp_path / "other")[0] == 0
    image = tmp_path / "all" / "ant" / "0.png"
    assert run(analyze, *resume, "--image", image)[0] == 0
    for main, rest in ((train.main, ["--test"]), (train.main, []), (analyze, ["--out", tmp_path / "figures"])):
        status, _, err = run(main, *resume, *rest)
        assert (status, "was trained with the --split of an earlier version" in err) == (2, True)


# ---------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("script", ["train.py", "train_img.py"])
def test_help_is_quick_grouped_and_complete(script):
    command = [sys.executable, "-X", "importtime", ROOT / script, "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert {"torch", "aig"} < imported
    assert not imported & {"torchvision", "sklearn", "scipy", "visdom", "matplotlib", "PIL.ImageFont"}
    for group in ("run", "training", "beyond the paper", "speed of training", "evaluation", "images and network"):
        assert f"\n{group}:\n" in done.stdout
    text = " ".join(done.stdout.split())
    for nonsense in ("(default: None)", "(default: False)", "(default: )", "(default: all) (default", "Fraction"):
        assert nonsense not in text
    parser = {"train.py": train, "train_img.py": train_img}[script].make_parser()
    assert all(action.help for action in parser.flags.values() if action.option_strings)
    assert "(default: 0.5)" in text


# ---------------------------------------------------------------------------------------------- bad flags


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stochastic-depth", "0.3"], "add --target 1"),
        (["--stochastic-depth", "1", "--target", "1"], "below 1"),
        (["--stochastic-depth", "0.3,1,0", "--target", "1"], "below 1"),
        (["--stochastic-depth", "0.3,0.2", "--target", "1"], "--stochastic-depth: 2 rates for 3 blocks"),
        (["--temperature-end", "0.5"], "unrecognized arguments: --temperature-end"),
        (["--temperature", "0"], "above 0"),
        (["--train-size", "2000"], "only 1437"),
        (["--test-size", "10"], "is for --test"),
        (["--reestimate-bn"], "is for --test"),
        (["--target-warmup", "-1"], "at least 0"),
        (["--warmup", "1" + "0" * 400], "10000000000000000000... is too large"),
        (["--split", "0.2"], "digits has a test set of its own"),
        (["--no-cuda", "--device", "cuda"], "--device: not allowed with argument --no-cuda"),
        (["--budget", "0.6", "--target", "0.6"], "--target is about a rate for each gate"),
        (["--budget", "0.6", "--lossfact", "1"], "--lossfact is about a rate for each gate"),
        (["--budget", "1"], "below 1"),
        (["--budget", "0.01"], "--budget: 0.01 is out of reach"),
        (["--budget-weight", "3"], "--budget-weight works only in a training to a --budget"),
        (["--no-budget-floor"], "--budget-floor works only in a training to a --budget"),
        (["--budget", "0.6", "--no-budget-floor", "--target-warmup", "2"], "--target-warmup is for the floor"),
        (["--distill-weight", "0.3"], "--distill-weight does nothing without --distill"),
        (["--distill", "nowhere"], "no checkpoint at nowhere"),
        (["--pretrained", "nowhere"], "no checkpoint at nowhere"),
        (["--pretrained", "torchvision"], "no weights of networks for small images"),
        (["--lr-schedule", "cosine", "--milestones", "2"], "a cosine has no steps"),
        (["--nesterov", "--momentum", "0"], "needs a --momentum"),
    ],
)
def test_bad_input_gets_one_line(run, tmp_path, flags, message):
    status, _, err = run(train.main, "--dataset", "digits", "--depth", 8, "--save", tmp_path / "runs", *flags)
    assert (status, len(err.splitlines())) == (2, 1)
    assert message in err
    assert not (tmp_path / "runs").exists()


LONG = "x" * 300


@pytest.mark.parametrize(
    ("main", "flags", "message"),
    [
        (train.main, ["--resume", LONG], "File name too long"),
        (train.main, ["--resume", LONG, "--test"], "File name too long"),
        (train.main, ["--dataset", "folder", "--data", LONG], "File name too long"),
        (train.main, ["--dataset", "folder", "--data", "missing"], "no such folder: missing"),
        (train.main, ["--dataset", "folder", "--data", "missing", "--split", 0.5], "no such folder: missing"),
        (train.main, ["--dataset", "folder", "--data", "file", "--split", 0.5], "no such folder: file"),
        (train.main, ["--dataset", "folder", "--data", "single", "--split", 0.5], "none can be held out"),
        (train_img.main, [LONG], "File name too long"),
        (train_img.main, ["missing"], "no such folder: missing"),
        (train_img.main, ["missing", "--split", 0.5], "no such folder: missing"),
        (train_img.main, ["single", "--split", 0.5], "none can be held out"),
    ],
)
def test_bad_paths_get_one_line(run, image_folder, contents, tmp_path, monkeypatch, main, flags, message):
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path, single=1)
    (tmp_path / "file").write_text("")
    before = contents(tmp_path)
    status, _, err = run(main, *flags)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "single"]


@pytest.mark.slow
def test_compile_without_a_compiler_is_an_input_error(tmp_path):
    command = [sys.executable, ROOT / "train.py", *DIGITS, "--compile", "--save", tmp_path, "--expname", "no"]
    environment = {**os.environ, "CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "--compile does not work here" in result.stderr
    assert not (tmp_path / "no").exists()


# ---------------------------------------------------------------------------------------------- whole runs


def test_a_test_with_reestimated_statistics_has_its_own_entry(trained, tmp_path):
    checkpoint = resume_altered(trained, tmp_path / "copy")
    before = checkpoint.read_bytes()
    train.main(["--test", "--resume", str(checkpoint), "--device", "cpu"])
    usual = runs.read_json(checkpoint.parent / runs.TEST)["argmax"]
    train.main(["--test", "--resume", str(checkpoint), "--reestimate-bn", "--device", "cpu"])
    tested = runs.read_json(checkpoint.parent / runs.TEST)
    assert tested.keys() == {"argmax", "argmax+bn"}
    assert tested["argmax"] == usual
    assert tested["argmax+bn"]["loss"] != usual["loss"]
    assert checkpoint.read_bytes() == before


@pytest.mark.slow
def test_bfloat16_learns_the_digits_like_float32(run, tmp_path):
    top1 = {}
    for amp in ("off", "bf16"):
        command = [*DIGITS, "--epochs", 12, "--amp", amp, "--save", tmp_path, "--expname", amp]
        assert run(train.main, *command)[0] == 0
        top1[amp] = json.loads((tmp_path / amp / runs.METRICS).read_text().splitlines()[-1])["val"]["top1"] / 100
    assert top1["off"] > 0.9
    p = sum(top1.values()) / 2
    assert abs(top1["off"] - top1["bf16"]) < 4 * (2 * p * (1 - p) / 360) ** 0.5
    assert load_checkpoint(tmp_path / "bf16" / CHECKPOINT)["args"]["amp"] == "bf16"


def test_where_visdom_is_missing_the_training_goes_on(monkeypatch, run, fitted, tmp_path):
    monkeypatch.setitem(sys.modules, "visdom", None)  # Python then reports that there is no such module
    status, _, err = run(train.main, *DIGITS, "--visdom", "--save", tmp_path, "--expname", "run")
    assert status == 0
    assert "--visdom: visdom is not installed: see the README" in err
    assert len(fitted) == 1


# ---------------------------------------------------------------------------------------------- stochastic depth


def test_stochastic_depth_drops_branches_at_its_rate_and_only_in_training():
    torch.manual_seed(0)
    rate, images = 0.3, 4000
    model = ResNet_cifar(BasicBlock, (1, 1, 1), 4, [1, 1, 1])
    block = list(model.blocks())[1]
    x = torch.rand(images, 16, 4, 4)
    block.train()
    usual = block(x)[0].detach()
    shortcut = block.shortcut(x).detach()
    residual = block.residual(x).detach()
    utils.drop_branches(model, [rate] * sum(model.stages))
    out, z = block(x)
    dropped = (out == shortcut.relu()).flatten(1).all(1)
    assert abs(dropped.float().mean() - rate) < 4 * (rate * (1 - rate) / images) ** 0.5
    torch.testing.assert_close(out[~dropped], (shortcut + residual / (1 - rate)).relu()[~dropped])
    assert torch.equal(z, torch.ones(images))
    block.eval()
    assert torch.equal(block(x)[0], block(x)[0])
    assert not torch.equal(usual, out)
