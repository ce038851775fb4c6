"""Losses, schedules and gate statistics, each against a computation spelled out."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import engine
import inference
from convnet_aig import BasicBlock, ResNet_cifar, draw_noise
from data import SmallImageLoader, SmallImages
from engine import Recipe
from train import scaled_milestones
from utils import TrainingError, derive_seed

RATES = [0.7, 0.5, 0.6]
RECIPE = Recipe(target_rates=RATES, lossfact=2, lr=0.1, milestones=(3, 5), epochs=6, seed=1, topk=(1, 2))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = ResNet_cifar(BasicBlock, (1, 1, 1), 4, RATES)
    for block in model.blocks():
        torch.nn.init.normal_(block.fc2.weight, 0, 2)
        torch.nn.init.zeros_(block.fc2.bias)
    return model


@pytest.fixture
def loader():
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (50, 8, 8, 3), dtype=torch.uint8, generator=random)
    source = SmallImages(images, torch.randint(3, (50,), generator=random), ["a", "b", "c", "empty"])
    return SmallImageLoader(source, 16, ([0.5] * 3, [0.3] * 3))


def trainer_of(model, lr=0.1, **changes):
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "lr_factor": 1.0}], lr)
    return engine.Trainer(model, optimizer, replace(RECIPE, **changes))


def test_target_rate_loss_is_the_mean_square_distance_of_the_batch_rates():
    z = torch.tensor([[1.0, 0, 1], [1, 0, 0]])
    t = torch.tensor([0.6, 0.3, 1.0])
    assert engine.target_rate_loss(z.mean(0), t).item() == pytest.approx((0.4**2 + 0.3**2 + 0.5**2) / 3)


def test_the_learning_rate_falls_tenfold_from_each_milestone_on():
    factors = [engine.lr_factor(RECIPE, epoch, 1) for epoch in range(1, 7)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_warm_up_rises_linearly_to_the_learning_rate():
    recipe = replace(RECIPE, warmup=2)
    assert engine.lr_factor(recipe, 1, 0.5) == pytest.approx(0.25)
    assert engine.lr_factor(recipe, 2, 0.5) == pytest.approx(0.75)
    assert engine.lr_factor(recipe, 2, 1) == 1
    assert engine.lr_factor(recipe, 3, 0.1) == pytest.approx(0.1)


@pytest.mark.parametrize(("epochs", "expected"), [(350, [150, 250]), (10, [4, 7]), (6, [3, 4]), (1, [2, 3])])
def test_default_milestones_scale_with_the_epochs(epochs, expected):
    assert scaled_milestones(epochs) == expected


@pytest.mark.parametrize("mode", ["argmax", "sample", "expected", "all"])
def test_evaluation_statistics_equal_a_count_image_by_image(model, loader, mode):
    model.eval().gate_mode = mode
    record = engine.evaluate(model, loader, target_rates=RATES, lossfact=2, topk=(1, 2), seed=7)

    torch.manual_seed(7)
    with torch.no_grad():
        outputs = [(model(x), y) for x, y in loader.batches()]
    logits = torch.cat([output[0] for output, _ in outputs])
    z = torch.cat([torch.stack(output[1], 1) for output, _ in outputs]).double()
    labels = torch.cat([y for _, y in outputs])
    run = torch.ones_like(z) if mode in ("expected", "all") else z

    assert record["gates"] == pytest.approx(z.mean(0).tolist())
    assert record["execution_rate"] == pytest.approx(run.mean().item())
    assert record["executed_blocks"] == [int((run.sum(1) == n).sum()) for n in range(4)]
    for k, name in enumerate("abc"):
        assert record["gates_by_class"][k] == pytest.approx(z[labels == k].mean(0).tolist())
        assert record["classes"][name] == pytest.approx(z[labels == k].mean().item())
    assert math.isnan(record["classes"]["empty"])
    assert record["top1"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert record["top2"] == pytest.approx(100 * (ranks < 2).double().mean().item())
    assert record["loss_classify"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    expected = 2 * sum((t - r) ** 2 for t, r in zip(RATES, z.mean(0).tolist(), strict=True)) / 3
    assert record["loss_target"] == pytest.approx(expected)
    assert record["loss"] == pytest.approx(record["loss_classify"] + record["loss_target"])


def test_repeated_tests_agree_and_samples_report_their_spread(model, loader):
    settings = {"samples": 4, "seed": 1, "dense": False, "target_rates": RATES, "lossfact": 2, "topk": (1,)}
    first, second = (engine.test(model, loader, **settings) for _ in range(2))
    assert first.pop("images_per_second") > 0
    assert second.pop("images_per_second") > 0
    np.testing.assert_equal(first, second)  # equal NaNs of the class without images included
    assert "top1_std" not in first
    model.gate_mode = "sample"
    sampled = engine.test(model, loader, **settings)
    each = [
        engine.evaluate(
            model, loader, target_rates=RATES, lossfact=2, topk=(1,), seed=derive_seed(1, "test", i)
        )["execution_rate"]
        for i in range(4)
    ]
    assert len(set(each)) > 1
    assert sampled["execution_rate"] == pytest.approx(torch.tensor(each).mean().item())
    assert sampled["execution_rate_std"] == pytest.approx(torch.tensor(each, dtype=torch.float64).std().item())


@pytest.mark.parametrize("mode", ["argmax", "all"])
def test_the_computation_of_a_test_is_counted_image_by_image(model, loader, mode):
    model.eval().gate_mode = mode
    settings = {"samples": 1, "seed": 1, "target_rates": RATES, "lossfact": 2, "topk": (1,)}
    skipping, dense = (engine.test(model, loader, dense=dense, **settings) for dense in (False, True))
    cost = inference.macs(model, 8)
    by_image, labels = [], []
    for images, y in loader.batches():
        z = torch.stack(model(images)[1], 1).detach()
        by_image += cost.executed(z, gates=mode != "all").tolist()
        labels += y.tolist()
    by_image, labels = np.array(by_image), np.array(labels)
    assert skipping["macs_mean"] == pytest.approx(by_image.mean())
    assert skipping["macs_fraction"] == pytest.approx(by_image.mean() / cost.dense)
    assert skipping["macs_dense"] == cost.dense
    assert skipping["macs_paper"] == pytest.approx(cost.dense * skipping["execution_rate"])
    for quantile, value in skipping["macs_quantiles"].items():
        assert value == pytest.approx(np.quantile(by_image, float(quantile)))
    for k, name in enumerate(loader.classes[:3]):
        assert skipping["macs_classes"][name] == pytest.approx(by_image[labels == k].mean())
    assert (skipping["skipping"], dense["skipping"]) == (mode == "argmax", False)
    for name in ("macs_mean", "macs_quantiles", "executed_blocks", "gates", "top1"):
        assert skipping[name] == dense[name]
    assert skipping["loss"] == pytest.approx(dense["loss"], rel=1e-5)


def test_a_training_step_is_the_gradient_of_both_losses(model, loader):
    images, labels = next(loader.batches())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(3)
    logits, gates = model.train()(images)
    z = torch.stack(gates, 1)
    loss = F.cross_entropy(logits, labels) + 2 * (torch.tensor(RATES) - z.mean(0)).square().mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    torch.manual_seed(3)
    trainer_of(model).step(images, labels, len(images))
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.detach(), before[name] - 0.1 * gradient)


def test_accumulation_gives_the_classification_gradient_of_the_whole_batch(model, loader):
    images, labels = next(loader.batches())
    model.train()
    for module in model.modules():  # batch statistics are per part; freeze them to compare
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    gradients = []
    for parts in (1, 3):
        for block in model.blocks():
            block.gated = False
        trainer_of(model, lr=0.0, accumulate=parts).step(images, labels, len(images))
        gradients.append(model.conv1.weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_accumulation_weighs_the_target_rate_loss_of_each_part_by_its_size(model, loader):
    images, labels = next(loader.batches())
    images, labels = images[:7], labels[:7]  # parts of 3, 2 and 2
    torch.manual_seed(0)
    sums = trainer_of(model.train()).step(images, labels, 7)
    assert sums["gates"].sum() <= 21

    gradients = []
    torch.manual_seed(0)
    trainer_of(model, lr=0.0, accumulate=3).step(images, labels, 7)
    gradients.append([p.grad.clone() for p in model.parameters()])
    torch.manual_seed(0)
    noise = draw_noise(3, 7, images)
    model.zero_grad()
    for part, size in ((slice(0, 3), 3), (slice(3, 5), 2), (slice(5, 7), 2)):
        logits, gates = model(images[part], noise=noise[:, part])
        loss_target = 2 * engine.target_rate_loss(torch.stack(gates, 1).mean(0), torch.tensor(RATES))
        ((F.cross_entropy(logits, labels[part]) + loss_target) * size / 7).backward()
    gradients.append([p.grad for p in model.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


def test_warm_up_reaches_the_optimizer_at_every_step(model, loader):
    seen = []
    trainer = trainer_of(model, warmup=1)
    optimizer, step = trainer.optimizer, trainer.optimizer.step
    optimizer.step = lambda: (seen.append(optimizer.param_groups[0]["lr"]), step())
    engine.train_epoch(trainer, loader, 1, engine.Progress())
    assert seen == pytest.approx([0.025, 0.05, 0.075, 0.1])


def test_gates_learn_their_target_rates(model, loader):
    trainer = trainer_of(model, lossfact=20)
    losses = [engine.train_epoch(trainer, loader, epoch, engine.Progress())["loss_target"] for epoch in range(1, 16)]
    assert sum(losses[-3:]) < 0.3 * sum(losses[:3])


def test_a_non_finite_loss_ends_training_naming_epoch_and_step(model, loader, capsys):
    original, calls = model.forward, []

    def broken(x, **more):
        calls.append(1)
        logits, gates = original(x, **more)
        return (logits * float("nan") if len(calls) == 2 else logits), gates

    model.forward = broken
    with pytest.raises(TrainingError, match="epoch 5, step 2"):
        engine.train_epoch(trainer_of(model), loader, 5, engine.Progress())
