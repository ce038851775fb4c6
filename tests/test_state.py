"""Where a training stands: what a checkpoint holds of it, and what one that does not fit is told."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from steps import RATES, RECIPE, Batches, new_state, small_loader, small_net, train

from aig import engine
from aig.console import InputError, TrainingError
from aig.distributed import World
from aig.losses import Objective
from aig.state import State, enter_epoch, fill_momentum, restore

RECIPE9 = replace(RECIPE, momentum=0.9)


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def stopped():
    """The checkpoint of a training that was stopped after step 2 of 4."""
    model, loader = small_net(), small_loader(50)
    state = new_state(model, loader, RECIPE9)

    def interrupt(state):
        if state.step == 2:
            raise Stopped

    with pytest.raises(Stopped):
        train(model, loader, state=state, after_step=interrupt, momentum=0.9)
    state.best = 37.5
    return state.checkpoint()


@pytest.fixture
def checkpoint(stopped):
    """A copy to spoil."""
    return copy.deepcopy(stopped)


def fresh(recipe=RECIPE9, loader=None, device="cpu"):
    return new_state(small_net().to(device), loader or small_loader(50), recipe)


def enter(state, checkpoint, loader=None, objective=None):
    enter_epoch(state, checkpoint, loader or small_loader(50), objective or Objective(RATES, 2), "FILE")


# ---------------------------------------------------------------------------------------------- a step, an epoch


def test_an_epoch_that_ends_leaves_nothing_behind_but_the_best_accuracy():
    state = fresh()
    state.step, state.seen, state.seconds, state.sums = 4, 50, 12.0, {"gates": torch.ones(3)}
    assert state.end_epoch(40.0)
    assert (state.epoch, state.step, state.seen, state.sums, state.seconds, state.best) == (2, 0, 0, {}, 0, 40)
    assert not state.end_epoch(40.0)
    assert not state.end_epoch(39.0)
    assert (state.epoch, state.best) == (4, 40)


def test_while_target_rates_come_down_the_newest_epoch_is_the_best():
    state = fresh()
    assert state.end_epoch(90.0, settled=False)
    assert state.end_epoch(80.0, settled=False)
    assert state.best == -1
    assert state.end_epoch(70.0)
    assert not state.end_epoch(60.0)
    assert state.best == 70


def test_seconds_go_on_from_those_of_earlier_processes():
    state = fresh()
    state.seconds = 100.0
    assert 100 < state.elapsed() < 110


def test_each_epoch_is_timed_from_its_own_start(monkeypatch):
    clock = iter([10.0, 14.0, 15.0, 21.0])
    monkeypatch.setattr("aig.state.time.perf_counter", lambda: next(clock))
    state = fresh()
    assert state.elapsed() == 4
    state.end_epoch(40.0)
    assert state.elapsed() == 6


@pytest.mark.parametrize("spoil", ["loss", "gradient", "nothing"])
def test_the_first_step_that_is_not_finite_is_remembered(spoil):
    state = fresh()
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for step in (1, 2, 3):
        if step == 2 and spoil == "gradient":
            state.model.conv1.weight.grad[0] = math.inf
        state.add({"loss_any": torch.tensor(math.nan if step == 2 and spoil == "loss" else 1.0)})
        state.end_step(step, 16)
    assert (state.step, state.seen) == (3, 48)
    if spoil == "nothing":
        assert state.check_finite() is None
    else:
        with pytest.raises(TrainingError, match="not finite since epoch 1, step 2"):
            state.check_finite()


def test_a_checkpoint_holds_everything_but_the_flags(stopped):
    assert stopped.keys() == {
        "epoch", "step", "seen", "sums", "seconds", "best_prec1", "state_dict", "optimizer", "scaler"}
    assert (stopped["epoch"], stopped["step"], stopped["seen"], stopped["best_prec1"]) == (1, 2, 32, 37.5)
    assert stopped["sums"].keys() == {"gates", "loss_classify", "loss_target", "top1"}
    assert stopped["seconds"] > 0


class Two(World):
    """One of two processes, of which the other has running means higher by 2."""

    def total(self, values):
        return {name: 2 * value + 2 * name.endswith("running_mean") for name, value in values.items()}


def test_a_checkpoint_holds_the_mean_of_all_processes_statistics():
    state = fresh()
    own = copy.deepcopy(state.model.state_dict())
    state.world = Two(0, 2)
    for held in (state.checkpoint()["state_dict"], state.model.state_dict()):  # with which this process goes on, too
        for name, value in held.items():
            torch.testing.assert_close(value, own[name] + name.endswith("running_mean"))


def test_between_two_epochs_a_checkpoint_holds_no_seconds():
    state = fresh()
    assert state.checkpoint()["seconds"] == 0


# ---------------------------------------------------------------------------------------------- going on


def test_a_checkpoint_is_taken_over_on_whatever_device(device, checkpoint):
    state = fresh(replace(RECIPE9, lr=0.5, weight_decay=0.25), device=device)
    restore(state, checkpoint, "FILE")
    enter(state, checkpoint)
    assert (state.best, state.epoch, state.step, state.seen) == (37.5, 1, 2, 32)
    assert state.seconds == checkpoint["seconds"]
    for name, value in checkpoint["sums"].items():
        assert torch.equal(state.sums[name], value.to(device))
    found = [state.optimizer.state[p]["momentum_buffer"] for g in state.optimizer.param_groups for p in g["params"]]
    saved = [each["momentum_buffer"].to(device) for each in checkpoint["optimizer"]["state"].values()]
    assert all(torch.equal(*pair) for pair in zip(found, saved, strict=True))
    # what the flags say is not the checkpoint's to decide
    assert {(group["lr"], group["weight_decay"]) for group in state.optimizer.param_groups} == {(0.5, 0.25)}


def test_a_checkpoint_without_an_optimizer_starts_without_momentum(checkpoint, capsys):
    del checkpoint["optimizer"]
    checkpoint["best_prec1"] = torch.tensor([12.5])  # as in the original's files
    state = fresh()
    restore(state, checkpoint, "FILE")
    assert "no optimizer state" in capsys.readouterr().out
    assert (state.best, len(state.optimizer.state)) == (12.5, 0)


@pytest.mark.parametrize("best", [101, -2, math.nan, "7", torch.zeros(2)])
def test_a_best_accuracy_that_is_none_is_an_error(checkpoint, best):
    with pytest.raises(InputError, match="FILE: its best_prec1 is not a number of percent"):
        restore(fresh(), {**checkpoint, "best_prec1": best}, "FILE")


def spoilt_optimizers(saved):
    first = saved["state"][0]
    yield {**saved, "param_groups": saved["param_groups"][:1]}
    yield {**saved, "state": {**saved["state"], 0: {"momentum_buffer": torch.zeros(1)}}}
    yield {**saved, "state": {**saved["state"], 0: {"momentum_buffer": first["momentum_buffer"].long()}}}
    yield {**saved, "state": {**saved["state"], 0: {"momentum_buffer": "none"}}}
    yield {**saved, "state": {**saved["state"], 0: 7}}
    yield {"state": saved["state"]}
    yield 7


def test_an_optimizer_that_does_not_fit_is_an_error(checkpoint):
    for spoilt in spoilt_optimizers(checkpoint["optimizer"]):
        with pytest.raises(InputError, match="FILE: its optimizer does not fit"):
            restore(fresh(), {**checkpoint, "optimizer": spoilt}, "FILE")


def test_the_scaler_of_float16_goes_on(checkpoint):
    recipe = replace(RECIPE9, amp="fp16")
    state = fresh(recipe)
    state.scaler.scale(torch.ones(1))  # which makes its tensors
    state.scaler.load_state_dict({**state.scaler.state_dict(), "scale": 8.0, "_growth_tracker": 5})
    checkpoint["scaler"] = state.checkpoint()["scaler"]
    continued = fresh(recipe)
    restore(continued, checkpoint, "FILE")
    assert continued.scaler.state_dict()["_growth_tracker"] == 5
    assert continued.scaler.get_scale() == 8
    for name, value in (("scale", math.inf), ("scale", 0.0), ("growth_interval", 2.5), ("_growth_tracker", "1")):
        with pytest.raises(InputError, match="its optimizer does not fit this network"):
            restore(fresh(recipe), {**checkpoint, "scaler": {**checkpoint["scaler"], name: value}}, "FILE")


def test_an_epoch_that_is_begun_anew_takes_over_no_sums(checkpoint):
    for change in ({"step": 0}, {"epoch": 5}):
        state = fresh()
        enter(state, {**checkpoint, **change})
        assert (state.step, state.sums) == (0, {})


@pytest.mark.parametrize("other", [small_loader(50, batch_size=10), small_loader(20)])
def test_an_epoch_goes_on_only_with_the_same_images_and_batches(checkpoint, other):
    with pytest.raises(InputError, match=r"only with the same images and --batch-size; .* add --start-epoch 1"):
        enter(fresh(), checkpoint, other)


@pytest.mark.parametrize("change", [{"step": 5, "seen": 50}, {"step": -1, "seen": -16}, {"seconds": -1}, {"seen": 33}])
def test_an_epoch_goes_on_only_from_a_place_that_it_has(checkpoint, change):
    with pytest.raises(InputError, match="FILE stopped in the middle of epoch 1, which goes on only with the same"):
        enter(fresh(), {**checkpoint, **change})


def test_going_on_leaves_the_checkpoint_as_it_was(checkpoint, stopped):
    state = fresh()
    enter(state, checkpoint)
    state.add({name: torch.ones_like(value) for name, value in checkpoint["sums"].items()})
    for name, value in stopped["sums"].items():
        assert torch.equal(checkpoint["sums"][name], value)


@pytest.mark.parametrize("value", [torch.tensor(math.nan), torch.zeros(2), torch.tensor(3), None, "none"])
@pytest.mark.parametrize("name", ["loss_classify", "gates"])
def test_sums_that_are_damaged_are_an_error(checkpoint, name, value):
    checkpoint["sums"][name] = value
    with pytest.raises(InputError, match="FILE"):
        enter(fresh(), checkpoint)


def test_sums_of_another_device_take_the_precision_of_this_one(checkpoint, monkeypatch):
    """MPS has no float64."""
    assert {value.dtype for value in checkpoint["sums"].values()} == {torch.float64}
    monkeypatch.setattr("aig.state.sum_dtype", lambda device: torch.float32)
    state = fresh()
    enter(state, checkpoint)
    for name, value in checkpoint["sums"].items():
        assert torch.equal(state.sums[name], value.float())


def test_sums_of_a_term_that_is_missing_are_an_error(checkpoint):
    del checkpoint["sums"]["loss_target"]
    with pytest.raises(InputError, match=r"without loss_target among its terms: .*add --start-epoch 1"):
        enter(fresh(), checkpoint)


# ---------------------------------------------------------------------------------------------- fused momentum


def test_fused_sgd_has_momentum_before_a_first_step_that_is_left_out():
    model = small_net()
    loader = Batches(torch.randn(16, 3, 8, 8), torch.arange(16) % 4)
    recipe = replace(RECIPE9, fused=True, amp="fp16")
    optimizer = engine.make_optimizer(model, recipe)
    state = State(model, optimizer, torch.amp.GradScaler("cpu", init_scale=2.0**120), len(loader))
    train(model, loader, state=state, momentum=0.9, fused=True, amp="fp16")
    assert all((optimizer.state[p]["momentum_buffer"] == 0).all() for p in model.parameters())
    plain = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    fill_momentum(plain)
    assert not plain.state


def test_fused_sgd_has_momentum_where_the_checkpoint_has_none(checkpoint):
    checkpoint["optimizer"]["state"] = {}
    state = fresh(replace(RECIPE9, fused=True))
    restore(state, checkpoint, "FILE")
    assert all((state.optimizer.state[p]["momentum_buffer"] == 0).all() for p in state.model.parameters())


def test_momentum_takes_the_memory_layout_of_its_parameter():
    """Fused SGD takes for granted that both are laid out alike: with another layout it trains wrongly, in silence."""
    saved = new_state(small_net().to(memory_format=torch.channels_last), small_loader(), RECIPE9)
    for parameter in saved.model.parameters():
        saved.optimizer.state[parameter]["momentum_buffer"] = torch.randn_like(parameter)
    held = {"best_prec1": 1.0, "optimizer": saved.optimizer.state_dict()}
    state = new_state(small_net(), small_loader(), RECIPE9)
    restore(state, held, "FILE")
    for parameter, other in zip(state.model.parameters(), saved.model.parameters(), strict=True):
        buffer = state.optimizer.state[parameter]["momentum_buffer"]
        assert buffer.stride() == parameter.stride()
        assert torch.equal(buffer, saved.optimizer.state[other]["momentum_buffer"])


def test_the_originals_order_of_parameter_groups_is_taken_over():
    """Its ImageNet script has the group of the gates first."""
    saved = new_state(small_net(), small_loader(), RECIPE9)
    for number, parameter in enumerate(p for group in saved.optimizer.param_groups for p in group["params"]):
        saved.optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, number)
    held = saved.optimizer.state_dict()
    held["param_groups"].reverse()
    state = new_state(small_net(), small_loader(), RECIPE9)
    restore(state, {"best_prec1": 1.0, "optimizer": held}, "FILE")
    for parameter, other in zip(state.model.parameters(), saved.model.parameters(), strict=True):
        buffers = (each.optimizer.state[p]["momentum_buffer"] for each, p in ((state, parameter), (saved, other)))
        assert torch.equal(*buffers)
