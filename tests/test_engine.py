"""The loop: what a step does, and with what values."""

import copy
import shutil
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from steps import RATES, RECIPE, Batches, MemoryRun, new_state, small_loader, small_net, step, train
from waits import watching

import convnet_aig
import train as script
from aig import distributed, engine
from aig.console import Interrupted, TrainingError
from aig.distributed import World, compile_mode
from aig.environment import derive_seed
from aig.inference import accelerate
from aig.losses import target_rate_loss
from aig.terms import Budget, Distillation
from convnet_aig import GATE_LAYERS, BasicBlock, Bottleneck, ResNet_cifar, ResNet_ImageNet, draw_noise


def batch(count=16, classes=4, device="cpu"):
    torch.manual_seed(1)
    return torch.randn(count, 3, 8, 8).to(device), torch.randint(classes, (count,)).to(device)


def noise_of(epoch, number, count, like):
    """What `fit` draws for a step."""
    torch.manual_seed(derive_seed(RECIPE.seed, "noise", epoch, number))
    return draw_noise(len(RATES), count, like)


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


# ---------------------------------------------------------------------------------------------- values of a step


def test_the_learning_rate_falls_tenfold_from_each_milestone_on():
    recipe = replace(RECIPE, milestones=(3, 5))
    assert [recipe.at(epoch, 1)[0] for epoch in range(1, 7)] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_a_cosine_falls_to_zero_over_all_epochs_whatever_the_milestones():
    recipe = replace(RECIPE, lr_schedule="cosine", milestones=(2,), epochs=4, warmup=1)
    for epoch, progress, factor in [(1, 0.5, 0.5 * 0.9619398), (2, 1, 0.5), (3, 1, 0.1464466), (4, 1, 0)]:
        assert recipe.at(epoch, progress)[0] == pytest.approx(0.1 * factor)


def test_warm_up_rises_linearly_to_the_learning_rate():
    recipe = replace(RECIPE, milestones=(3,), warmup=2)
    for epoch, progress, factor in [(1, 0.5, 0.25), (2, 0.5, 0.75), (2, 1, 1), (3, 0.1, 0.1)]:
        assert recipe.at(epoch, progress)[0] == pytest.approx(0.1 * factor)


def test_target_rates_warm_up_linearly_over_their_epochs():
    recipe = replace(RECIPE, target_warmup=2)
    for epoch, progress, part in [(1, 0.5, 0.25), (1, 1, 0.5), (2, 0.5, 0.75), (2, 1, 1), (5, 1, 1)]:
        assert recipe.at(epoch, progress)[1] == pytest.approx(part)
    assert RECIPE.at(1, 0.5)[1] is None


@pytest.mark.parametrize(("epochs", "expected"), [(350, [150, 250]), (10, [4, 7]), (6, [3, 4]), (1, [2, 3])])
def test_default_milestones_scale_with_the_epochs(epochs, expected):
    assert script.scaled_milestones(epochs) == expected


@pytest.mark.parametrize(
    ("accumulate", "count", "processes", "parts"),
    [(1, 16, 1, 1), (4, 16, 1, 4), (4, 5, 1, 2), (4, 3, 1, 1), (4, 16, 4, 2)],
)
def test_every_part_has_two_images_for_each_process(accumulate, count, processes, parts):
    assert replace(RECIPE, accumulate=accumulate).parts(count, World(0, processes)) == parts


# ---------------------------------------------------------------------------------------------- the optimizer


@pytest.mark.parametrize(
    ("layers", "of_gates"),
    [(("fc2",), {"fc2"}), (convnet_aig.GATE_LAYERS, {"fc1", "fc1bn", "fc2"}), ((), set())],
)
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_gate_layers_have_a_learning_rate_of_their_own(block, layers, of_gates):
    model = ResNet_cifar(block, (1, 1, 1), 4, RATES)
    recipe = replace(RECIPE, lrfact=5, gate_layers=layers, momentum=0.8, weight_decay=0.01)
    optimizer = engine.make_optimizer(model, recipe)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    factors = {
        names[id(parameter)]: group["lr_factor"] for group in optimizer.param_groups for parameter in group["params"]
    }
    assert factors.keys() == set(names.values())
    assert {name.split(".")[2] for name, factor in factors.items() if factor == 5} == of_gates
    assert set(factors.values()) <= {1, 5}
    engine.set_lr(optimizer, 0.3)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.3 * group["lr_factor"])
        assert (group["momentum"], group["weight_decay"], group["fused"]) == (0.8, 0.01, False)


def test_gates_may_be_free_of_weight_decay_and_the_others_are_not():
    model = small_net()
    recipe = replace(RECIPE, gate_layers=("fc2",), lrfact=5, weight_decay=0.01, gate_decay=False, momentum=0.9,
                     nesterov=True)
    names = {id(parameter): name.split(".")[-2] for name, parameter in model.named_parameters()}
    for group in engine.make_optimizer(model, recipe).param_groups:
        layers = {names[id(parameter)] for parameter in group["params"]}
        of_gates = not layers.isdisjoint(GATE_LAYERS)
        assert layers <= set(GATE_LAYERS) or not of_gates
        assert group["weight_decay"] == (0 if of_gates else 0.01)
        assert group["lr_factor"] == (5 if layers == {"fc2"} else 1)
        assert group["nesterov"] is True


def test_a_net_without_gates_has_one_group():
    model = ResNet_ImageNet(Bottleneck, (1, 1, 1, 1), 4, [1] * 4)
    assert len(engine.make_optimizer(model, replace(RECIPE, fused=True)).param_groups) == 1
    assert engine.make_optimizer(model, replace(RECIPE, fused=True)).param_groups[0]["fused"] is True


# ---------------------------------------------------------------------------------------------- a step


def test_a_training_step_is_the_gradient_of_both_losses(device):
    model, (images, labels) = small_net().to(device), batch(device=device)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    logits, gates = model.train()(images, noise=noise_of(1, 1, 16, images))
    z = torch.stack(gates, 1)
    loss = F.cross_entropy(logits, labels) + 2 * (torch.tensor(RATES, device=device) - z.mean(0)).square().mean()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    sums = step(model, images, labels)
    for (name, parameter), gradient in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), before[name] - 0.1 * gradient)
    assert sums["gates"].tolist() == z.sum(0).tolist()
    assert sums["loss_classify"].item() == pytest.approx(16 * F.cross_entropy(logits, labels).item())


def test_no_step_adds_to_the_gradient_of_the_one_before():
    model, (images, labels) = small_net(), batch(32)
    train(model, Batches(images, labels, 16), lr=0)
    found = gradients(model)
    logits, gates = model.train()(images[16:], noise=noise_of(1, 2, 16, images))
    loss_target = 2 * target_rate_loss(torch.stack(gates, 1).mean(0), torch.tensor(RATES))
    loss = F.cross_entropy(logits, labels[16:]) + loss_target
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for gradient, (name, value) in zip(expected, found.items(), strict=True):
        torch.testing.assert_close(value, gradient, msg=name)


def test_noise_is_that_of_the_step_whatever_came_before_and_however_many_processes_share_it():
    model, images = small_net(), torch.zeros(7, 3, 8, 8)
    whole = engine.step_noise(model, images, 7, (1, "noise", 2, 3), World())
    torch.rand(5)
    parts = [engine.step_noise(model, images, 7, (1, "noise", 2, 3), World(rank, 3)) for rank in range(3)]
    assert whole.shape == (3, 7, 2)
    assert torch.equal(torch.cat(parts, dim=1), whole)
    for other in ((1, "noise", 2, 4), (1, "noise", 3, 3), (2, "noise", 2, 3)):
        assert not torch.equal(engine.step_noise(model, images, 7, other, World()), whole)


def test_parts_give_every_image_its_label_and_noise_once():
    images, labels, noise = torch.arange(7.0), torch.arange(7), torch.arange(21.0).view(3, 7)
    parts = list(distributed.batch_parts(torch.nn.Identity(), images, labels, noise, 3))
    assert [len(part[0]) for part in parts] == [3, 2, 2]
    assert torch.equal(torch.cat([part[0] for part in parts]), images)
    assert torch.equal(torch.cat([part[1] for part in parts]), labels)
    assert torch.equal(torch.cat([part[2] for part in parts], 1), noise)


class Exchanging(torch.nn.parallel.DistributedDataParallel):
    """Notes whether gradients would be exchanged, without another process."""

    def __init__(self):
        torch.nn.Module.__init__(self)
        self.exchanges = True

    @contextmanager
    def no_sync(self):
        self.exchanges = False
        yield
        self.exchanges = True


@pytest.mark.parametrize("parts", [1, 3])
def test_processes_exchange_gradients_after_the_last_part_only(parts):
    network, values = Exchanging(), torch.arange(7)
    pieces = distributed.batch_parts(network, values, values, values.expand(3, 7), parts)
    exchanges = [network.exchanges for _ in pieces]
    assert exchanges == [False] * (parts - 1) + [True]


def test_accumulation_gives_the_classification_gradient_of_the_whole_batch():
    found, (images, labels) = [], batch()
    for parts in (1, 3):
        model = small_net(rates=[1, 1, 1])
        for module in model.modules():  # batch statistics are per part; freeze them to compare
            if isinstance(module, torch.nn.BatchNorm2d):
                module.train = lambda mode=True, module=module: module
                module.training = False
        step(model, images, labels, lossfact=0, accumulate=parts, target_rates=[1, 1, 1])
        found.append(gradients(model))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_accumulation_weighs_the_target_rate_loss_of_each_part_by_its_size():
    images, labels = batch(7)  # parts of 3, 2 and 2
    model = small_net()
    sums = step(model, images, labels, accumulate=3)
    found = gradients(model)

    model = small_net().train()
    noise, opened = noise_of(1, 1, 7, images), 0
    for part, size in ((slice(0, 3), 3), (slice(3, 5), 2), (slice(5, 7), 2)):
        logits, gates = model(images[part], noise=noise[:, part])
        z = torch.stack(gates, 1)
        loss_target = 2 * target_rate_loss(z.mean(0), torch.tensor(RATES))
        ((F.cross_entropy(logits, labels[part]) + loss_target) * size / 7).backward()
        opened = opened + z.sum(0).detach()
    torch.testing.assert_close(found, gradients(model))
    torch.testing.assert_close(sums["gates"], opened.double())


def test_the_temperature_reaches_the_gradient_and_not_the_decisions():
    found, (images, labels) = [], batch()
    for tau in (1, 3):
        model = small_net()
        sums = step(model, images, labels, temperature=tau)
        found.append((sums["gates"], next(model.blocks()).fc2.weight.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.allclose(found[0][1], found[1][1])


def test_warming_target_rates_reach_the_loss():
    images, labels = batch()
    sums = step(small_net(), images, labels, target_warmup=4)  # a quarter of the way after the only step
    rates = sums["gates"] / 16
    now = 1 - 0.25 * (1 - torch.tensor(RATES, dtype=torch.float64))
    assert sums["loss_target"].item() / 16 == pytest.approx(2 * (now - rates).square().mean().item())


def test_memory_formats_compute_the_same(device, monkeypatch):
    (images, labels), sums, layouts = batch(device=device), [], []
    original = ResNet_cifar.stem
    monkeypatch.setattr(ResNet_cifar, "stem", lambda self, x: (
        layouts.append(x.is_contiguous(memory_format=torch.channels_last)), original(self, x))[1])
    for channels_last in (True, False):
        sums.append(step(small_net().to(device).double(), images.double(), labels, channels_last=channels_last))
    torch.testing.assert_close(*sums, rtol=1e-10, atol=1e-10)
    assert (layouts[0], layouts[2]) == (True, False)  # between them is a batch of the validation


# ---------------------------------------------------------------------------------------------- the loop


def test_warm_up_reaches_the_optimizer_at_every_step():
    model, loader, seen = small_net(), small_loader(50), []
    recipe = replace(RECIPE, warmup=1)
    state = new_state(model, loader, recipe)
    optimizer, original = state.optimizer, state.optimizer.step
    optimizer.step = lambda: (seen.append(optimizer.param_groups[0]["lr"]), original())
    train(model, loader, state=state, warmup=1)
    assert seen == pytest.approx([0.025, 0.05, 0.075, 0.1])


def test_the_recorded_learning_rate_is_that_of_the_epochs_last_step():
    run = train(small_net(), small_loader(), epochs=3, warmup=2)
    assert [record["lr"] for record in run.records] == pytest.approx([0.05, 0.1, 0.1])


def test_the_noise_of_a_validation_is_a_function_of_seed_and_epoch():
    def validated(**changes):
        """The rates of a network that stays as it is, in two epochs."""
        model = small_net()
        model.gate_mode = "sample"
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.momentum = 0
        return [record["val"]["gates"] for record in train(model, small_loader(), epochs=2, lr=0, **changes).records]

    first = validated()
    assert validated() == first
    assert len({tuple(rates) for rates in first + validated(seed=2)}) == 4


def test_of_gates_that_always_and_that_sometimes_open_a_training_names_the_former(capsys):
    model = small_net()
    block = list(model.blocks())[1]
    torch.nn.init.zeros_(block.fc2.weight)
    with torch.no_grad():
        block.fc2.bias.copy_(torch.tensor([-50.0, 50.0]))
    train(model, small_loader())
    warning = capsys.readouterr().out.split("warning: ")[1]
    assert warning.startswith("1 of 3 gates did the same for nearly every image, those of blocks 2 (open, target 0.5);")


def test_gates_learn_their_target_rates():
    run = train(small_net(), small_loader(), epochs=15, lossfact=20)
    losses = [record["train"]["loss_target"] for record in run.records]
    assert sum(losses[-3:]) < 0.3 * sum(losses[:3])


def test_a_training_leaves_a_record_and_a_checkpoint_an_epoch():
    loader, drawn = small_loader(50), []

    class Board:
        def update(self, records):
            drawn.append(len(records))

    model, run = small_net(), MemoryRun()
    state = new_state(model, loader)
    engine.fit(state, loader, small_loader(20), replace(RECIPE, last=3, milestones=(2,)), run, [Board()])
    assert [record["epoch"] for record in run.records] == [1, 2, 3]
    assert [record["lr"] for record in run.records] == pytest.approx([0.1, 0.01, 0.01])
    for record in run.records:
        assert record.keys() == {"epoch", "lr", "seconds", "train", "val"}
        common = {"loss", "loss_classify", "loss_target", "top1", "execution_rate"}
        assert record["train"].keys() == common
        assert record["val"].keys() == common | {"gates", "classes", "executed_blocks", "gates_by_class"}
        assert sum(record["val"]["executed_blocks"]) == 20
    assert drawn == [1, 2, 3]
    tops = [record["val"]["top1"] for record in run.records]
    best = [top > max(tops[:epoch], default=-1) for epoch, top in enumerate(tops)]
    assert run.saved == [(epoch + 2, 0, is_best) for epoch, is_best in enumerate(best)]
    assert state.best == max(tops)


def test_the_lines_of_a_training_come_at_the_steps_asked_for(capsys):
    train(small_net(), small_loader(80), epochs=2, print_freq=2)
    lines = capsys.readouterr().out.splitlines()
    assert Counter(line.split("  ")[0] for line in lines if " step " in line) == {
        "epoch 1/6 step 2/5": 1, "epoch 1/6 step 4/5": 1, "epoch 2/6 step 2/5": 1, "epoch 2/6 step 4/5": 1}
    assert [line for line in lines if line.startswith("epoch 2/6  lr 0.1  train (sample): loss")]


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_training_stopped_at_any_step_goes_on_to_the_same_weights(stop):
    loader = small_loader(50, augment="crop")
    straight, parts = small_net(), small_net()
    whole = train(straight, loader, epochs=2, momentum=0.9)

    def interrupt(state):
        if state.step == stop:
            raise Stopped

    recipe = replace(RECIPE, momentum=0.9)
    state = new_state(parts, loader, recipe)
    with pytest.raises(Stopped):
        train(parts, loader, state=state, after_step=interrupt, momentum=0.9)
    assert (state.epoch, state.step, state.seen) == (1, stop, min(16 * stop, 50))
    continued = train(parts, loader, epochs=2, state=state, momentum=0.9)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    for record in (*whole.records, *continued.records):
        record["seconds"] = 0
    np.testing.assert_equal(continued.records, whole.records)  # equal NaNs of the class without images included


def test_a_stop_in_the_validation_leaves_the_epoch_unfinished():
    loader, calls = small_loader(), []

    def interrupt(state):
        calls.append(state.step)
        if len(calls) == 5:  # three steps, and the second batch of the validation
            raise Interrupted(15, "stopped")

    with pytest.raises(Interrupted):
        train(small_net(), loader, after_step=interrupt)
    assert calls == [1, 2, 3, 3, 3]


def test_a_non_finite_loss_ends_training_naming_epoch_and_step():
    model, calls = small_net(), []
    original = model.forward

    def broken(x, **more):
        calls.append(1)
        logits, gates = original(x, **more)
        return (logits * float("nan") if len(calls) == 2 else logits), gates

    model.forward = broken
    loader = small_loader()
    with pytest.raises(TrainingError, match="epoch 5, step 2"):
        train(model, loader, state=new_state(model, loader, epoch=5))


def test_a_gradient_that_is_not_finite_ends_training_though_the_loss_is():
    model, steps, loader = small_net(), [], small_loader()
    model.conv1.weight.register_hook(lambda g: steps.append(1) or g * (float("inf") if len(steps) == 2 else 1))
    with pytest.raises(TrainingError, match="gradient not finite since epoch 4, step 2"):
        train(model, loader, state=new_state(model, loader, epoch=4))


def test_a_network_that_is_not_finite_after_an_epoch_is_neither_recorded_nor_saved():
    model, loader = small_net(), small_loader()
    run, state = MemoryRun(), new_state(model, loader)

    def spoil(state):
        model.bn1.running_var[0] = float("nan")

    run.save_if_due = spoil
    with pytest.raises(TrainingError, match="not finite after epoch 1"):
        engine.fit(state, loader, loader, RECIPE, run, [])
    assert (run.records, run.saved) == ([], [])


def taught(amp="off"):
    """A budget, and a teacher as `networks.load_teacher` makes it."""
    network, dtype = small_net(rates=[1, 0.5, 1]).eval(), engine.AMP[amp]
    if dtype is None:
        network = accelerate(network)
        network.conditional = False

    @torch.no_grad()
    def teacher(images):
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            return network.to(images.device)(images)[0].float()

    return {
        "budget": Budget(0.5, 7, 0.1, torch.tensor([0.2, 0.3, 0.4]), floor=0.3),
        "distillation": Distillation(teacher),
        "target_warmup": 0.5,
        "amp": amp,
    }


SETTINGS = [
    {"amp": "off"},
    taught(),
    taught("bf16"),
    {"amp": "bf16", "accumulate": 2, "target_warmup": 3, "warmup": 2},
    {"amp": "fp16", "fused": True, "momentum": 0.9},
]


@pytest.mark.parametrize("changes", SETTINGS)
def test_between_two_reports_the_training_loop_waits_for_no_device(changes):
    model, loader = small_net(), small_loader(80, augment="crop")
    state, noted = new_state(model, loader, replace(RECIPE, **changes)), []
    with watching(lambda name: noted.append((state.epoch, state.step, name))):
        train(model, loader, state=state, print_freq=3, log_interval=3, **changes)
    by_step = {(epoch, step) for epoch, step, _ in noted}
    assert by_step - {(1, 0)} == {(1, 3), (1, 5), (2, 0)}  # the report, and when the epoch is through
    assert {name for epoch, step, name in noted if (epoch, step) == (1, 0)} == {"lift_fresh"}  # the target rates


WAITS = {
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x[0]),
    "int": lambda x: int(x[0]),
    "a condition": lambda x: 1 if x[0] > 0 else 2,
    "an index of a list": lambda x: [1, 2][x[0].long()],
    "the end of a slice": lambda x: x[: x[0].long()],
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: np.asarray(x),
    "in words": lambda x: f"{x[0]:.2f}",
    "a mask as index": lambda x: x[x > 0],
    "assignment by a mask": lambda x: x.clone().__setitem__(x > 0, x[:1]),
    "nonzero": lambda x: x.nonzero(),
    "where without values": lambda x: torch.where(x > 0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "bincount": lambda x: x.long().bincount(),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "a tensor of numbers": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "a tensor of one number": lambda x: x.new_tensor(1.0),
    "a list as index": lambda x: x[[0, 1]],
    "an array": lambda x: torch.from_numpy(np.ones(2)).to(x.device),
}


@pytest.mark.parametrize("name", WAITS)
def test_whatever_waits_for_a_device_is_noticed_in_a_step(name):
    """What the test above relies on."""
    model, loader, noted, values = small_net(), small_loader(), [], torch.tensor([0.0, 1.0])
    state = new_state(model, loader)

    def put(*_):
        WAITS[name](values)

    model.register_forward_hook(put)
    with watching(lambda _: noted.append((state.epoch, state.step))):
        train(model, loader, state=state)
    assert {(1, 1), (1, 2)} < set(noted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("changes", SETTINGS)
def test_on_a_gpu_no_step_waits_for_it(changes):
    model, loader = small_net().cuda(), small_loader(80, augment="crop", device="cuda")
    state = new_state(model, loader, replace(RECIPE, **changes))

    def watch(state):  # not the first step, which loads kernels, nor the end of the epoch
        torch.cuda.set_sync_debug_mode("error" if state.step < len(loader) else "default")

    try:
        train(model, loader, state=state, after_step=watch, **changes)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------------------------------------- several processes


class Two(World):
    """One of two processes, of which the other sees the same images and has running means higher by 2."""

    def total(self, values):
        return {name: 2 * value + 2 * name.endswith("running_mean") for name, value in values.items()}

    def all_max(self, *numbers):
        return list(numbers)


@pytest.fixture
def without_processes(monkeypatch):
    """DistributedDataParallel needs the other process."""
    class Unwrapped:
        def __new__(cls, model, **settings):
            return model

    monkeypatch.setattr(distributed, "DistributedDataParallel", Unwrapped)


def train_as_one_of_two(model, **changes):
    loader = small_loader(world=Two(0, 2))
    state = new_state(model, loader, replace(RECIPE, **changes))
    state.world = loader.world
    return train(model, loader, state=state, **changes)


@pytest.mark.usefixtures("without_processes")
def test_a_validation_is_of_the_mean_of_all_processes_statistics():
    model, means = small_net(), []
    model.register_forward_pre_hook(lambda *_: means.append((model.training, model.bn1.running_mean.clone())))
    model.register_forward_hook(lambda *_: means.append((model.training, model.bn1.running_mean.clone())))
    train_as_one_of_two(model)
    own = [mean for training, mean in means if training][-1]
    validated = [mean for training, mean in means if not training]
    assert len(validated) == 6
    for mean in validated:
        torch.testing.assert_close(mean, own + 1)


@pytest.mark.usefixtures("without_processes")
@pytest.mark.parametrize("sync", [True, False])
def test_sync_bn_turns_every_batch_norm_into_one_over_all_processes(sync):
    model = small_net()
    before, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    network, _ = distributed.wrap(model, World(0, 2), sync_bn=sync, mode=None)
    norms = [module for module in network.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 1 + 3 * 2 + 3 + 2  # stem, branches, gates, shortcuts
    assert {isinstance(norm, torch.nn.SyncBatchNorm) for norm in norms} == {sync}
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))  # which the optimizer has


@pytest.mark.usefixtures("without_processes")
@pytest.mark.parametrize("sync", [True, False])
def test_sync_bn_reaches_the_steps(monkeypatch, sync):
    calls = Counter()

    def forward(norm, x):
        calls[norm.training] += 1
        return torch.nn.BatchNorm2d.forward(norm, x)

    monkeypatch.setattr(torch.nn.SyncBatchNorm, "forward", forward)
    train_as_one_of_two(small_net(), sync_bn=sync)
    assert calls == ({True: 3 * 12, False: 3 * 12} if sync else {})  # three steps, and the validation


# ---------------------------------------------------------------------------------------------- precision


PRECISIONS = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("amp", PRECISIONS)
def test_in_training_and_validation_convolutions_alone_are_in_the_precision_of_amp(device, amp):
    model, dtypes = small_net().to(device), {True: Counter(), False: Counter()}  # of training, of validation

    def note(name):
        return lambda module, inputs, out: dtypes[model.training].update([(name, out.dtype)])

    convolutions = [model.conv1, *(conv for block in model.blocks() for conv, _ in block.layers())]
    for convolution in convolutions:
        convolution.register_forward_hook(note("convolution"))
    for block in model.blocks():
        block.gate_logits = lambda x, gate=block.gate_logits: (out := gate(x), note("gate")(None, None, out))[0]
    step(model, *batch(device=device), amp=amp)
    for of_mode in dtypes.values():
        assert of_mode == {("convolution", PRECISIONS[amp]): 7, ("gate", torch.float32): 3}


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_weights_and_gradients_stay_in_float32(device, amp):
    model = small_net().to(device)
    images, labels = batch(device=device)
    sums = step(model, images, labels, amp=amp)
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert {value.dtype for value in sums.values()} == {torch.float64}
    exact = step(small_net().to(device), images, labels)
    assert sums["loss_classify"] != exact["loss_classify"]
    assert sums["loss_classify"].item() == pytest.approx(exact["loss_classify"].item(), rel=0.05)


@pytest.mark.parametrize(("scale", "changes"), [(2.0**120, False), (2.0**10, True)])
def test_a_float16_gradient_that_overflows_is_left_out_and_no_error(scale, changes):
    model, (images, labels) = small_net(), batch()
    loader = Batches(images, labels)
    recipe = replace(RECIPE, amp="fp16")
    state = new_state(model, loader, recipe)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, loader, state=state, amp="fp16")
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters()) == changes
    assert state.scaler.get_scale() == scale / (1 if changes else 2)


def test_float16_that_never_fits_is_an_error():
    model, loader = small_net(), small_loader()
    model.conv1.weight.register_hook(lambda g: g * torch.nan)
    state = new_state(model, loader, replace(RECIPE, amp="fp16"))
    state.scaler = torch.amp.GradScaler("cpu", init_scale=4e-3)
    with pytest.raises(TrainingError, match="no float16 gradient of epoch 1 is finite"):
        train(model, loader, state=state, amp="fp16")


def test_only_batches_of_the_usual_size_go_through_the_compiled_network(monkeypatch):
    sizes = []
    monkeypatch.setattr(torch, "compile", lambda network, dynamic, mode: lambda x, **more: (
        sizes.append(len(x)), network(x, **more))[1])
    compiled, eager = small_net(), small_net()
    train(compiled, small_loader(40), compile=True)
    train(eager, small_loader(40))
    assert sizes == [16, 16]  # not the last 8, and no validation
    for name, value in compiled.state_dict().items():
        assert torch.equal(value, eager.state_dict()[name])


@pytest.mark.parametrize(
    ("device", "processes", "accumulate", "mode"),
    [("cuda", 1, 1, "reduce-overhead"), ("cuda", 2, 1, "default"), ("cuda", 1, 2, "default"), ("cpu", 1, 1, "default")],
)
def test_compiling_records_cuda_graphs_in_one_process_that_computes_whole_batches(device, processes, accumulate, mode):
    assert compile_mode(device, accumulate, World(0, processes)) == mode


def test_the_loop_compiles_in_the_mode_of_its_recipe(monkeypatch):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda network, dynamic, mode: (modes.append(mode), network)[1])
    monkeypatch.setattr(engine, "compile_mode", lambda *where: where)
    train(small_net(), small_loader(), compile=True)
    assert modes == [("cpu", RECIPE.accumulate, World(0, 1))]


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="there is no C++ compiler"
)


def steps_of(compile, device):
    """The records, and the weights, of six full batches and two that are smaller."""
    model, (images, labels) = small_net().double().to(device), batch(48 + 5, device=device)
    run = train(model, Batches(images.double(), labels, 16), epochs=2, compile=compile, momentum=0.9)
    return [record["train"] for record in run.records], model.state_dict()


@pytest.mark.slow
@needs_compiler
@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_a_compiled_network_takes_the_same_steps():
    (records, state), (compiled_records, compiled_state) = (steps_of(compile, "cpu") for compile in (False, True))
    for record, compiled_record in zip(records, compiled_records, strict=True):
        assert record == pytest.approx(compiled_record, rel=1e-8)
    torch.testing.assert_close(compiled_state, state, rtol=1e-8, atol=1e-8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_on_a_gpu_recorded_graphs_take_the_same_steps(monkeypatch):
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), replay(graph))[1])
    (records, state), (compiled_records, compiled_state) = (steps_of(compile, "cuda") for compile in (False, True))
    assert replays
    for record, compiled_record in zip(records, compiled_records, strict=True):
        assert record == pytest.approx(compiled_record, rel=1e-7)
    torch.testing.assert_close(compiled_state, state, rtol=1e-7, atol=1e-7)
