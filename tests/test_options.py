"""What is off by default: stochastic depth, schedules of targets and temperature, subsets, BatchNorm anew."""

import json

import pytest
import torch
from torch import nn

import data
import engine
import train
import utils
from convnet_aig import BasicBlock, ResNet_cifar

RECIPE = {"target_rates": [0.5, 0.7, 1.0], "lossfact": 2, "lr": 0.1, "milestones": (), "epochs": 5, "seed": 1}


def make_trainer(**options):
    torch.manual_seed(0)
    model = ResNet_cifar(BasicBlock, (1, 1, 1), 4, RECIPE["target_rates"])
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "lr_factor": 1.0}], lr=0.1)
    return engine.Trainer(model, optimizer, engine.Recipe(**RECIPE | options))


# ---------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(("first", "last", "expected"), [(1, None, [1, 1, 1]), (4, 0.25, [4, 1, 0.25])])
def test_the_temperature_changes_geometrically_from_the_first_epoch_to_the_last(first, last, expected):
    recipe = engine.Recipe(**RECIPE, temperature=first, temperature_end=last)
    assert [engine.temperature(recipe, epoch) for epoch in (1, 3, 5)] == pytest.approx(expected)


def test_the_temperature_reaches_the_gradient_and_not_the_decisions():
    images, labels = torch.randn(16, 3, 8, 8), torch.randint(0, 4, (16,))
    found = []
    for tau in (1, 3):
        trainer = make_trainer(temperature=tau)
        trainer.network.train()
        torch.manual_seed(1)
        sums = trainer.step(images, labels, 16)
        found.append((sums["gates"], next(trainer.model.blocks()).fc2.weight.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.allclose(found[0][1], found[1][1])


def test_target_rates_fall_linearly_from_1():
    trainer = make_trainer(target_warmup=2)
    for epoch, progress, part in [(1, 0.5, 0.25), (1, 1, 0.5), (2, 0.5, 0.75), (2, 1, 1), (5, 1, 1)]:
        trainer.schedule(epoch, progress)
        expected = [1 - part * (1 - rate) for rate in RECIPE["target_rates"]]
        assert trainer.rates.tolist() == pytest.approx(expected)


def test_schedules_go_on_after_an_interruption(tmp_path):
    common = ["--dataset", "digits", "--depth", "8", "--epochs", "3", "--save", str(tmp_path), "--target-warmup", "2"]
    common += ["--temperature", "2", "--temperature-end", "0.5", "--train-size", "300", "--lrfact", "3"]
    train.main([*common, "--expname", "whole"])
    train.main([*common, "--expname", "parts", "--stop-after", "1"])
    train.main(["--resume", str(tmp_path / "parts" / utils.CHECKPOINT)])
    whole, parts = ([{**record, "seconds": 0} for record in utils.read_records(tmp_path / name)]
                    for name in ("whole", "parts"))
    assert whole == parts
    files = [tmp_path / name / utils.CHECKPOINT for name in ("whole", "parts")]
    whole, parts = (utils.load_checkpoint(file)["state_dict"] for file in files)
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())


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
    model.set_drop_rate(rate)
    out, z = block(x)
    dropped = (out == shortcut.relu()).flatten(1).all(1)
    assert abs(dropped.float().mean() - rate) < 4 * (rate * (1 - rate) / images) ** 0.5
    torch.testing.assert_close(out[~dropped], (shortcut + residual / (1 - rate)).relu()[~dropped])
    assert torch.equal(z, torch.ones(images))
    block.eval()
    assert torch.equal(block(x)[0], block(x)[0])
    assert not torch.equal(usual, out)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stochastic-depth", "0.3"], "add --target 1"),
        (["--stochastic-depth", "1", "--target", "1"], "below 1"),
        (["--compile", "--temperature-end", "0.5"], "choose one"),
        (["--temperature", "0"], "above 0"),
        (["--train-size", "2000"], "only 1437"),
        (["--test-size", "10"], "is for --test"),
        (["--reestimate-bn"], "is for --test"),
        (["--target-warmup", "-1"], "at least 0"),
    ],
)
def test_bad_input_gets_one_line(run, tmp_path, flags, message):
    status, _, err = run(train.main, "--dataset", "digits", "--depth", 8, "--save", tmp_path / "runs", *flags)
    assert (status, len(err.splitlines())) == (2, 1)
    assert message in err
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------------------------------------- subsets, BatchNorm


def test_a_subset_does_not_depend_on_the_seed_of_the_run(tmp_path):
    chosen = []
    for seed in (1, 2):
        flags = ["--dataset", "digits", "--train-size", "100", "--seed", str(seed), "--save", str(tmp_path)]
        args, _ = train.parse(flags)
        chosen.append(train.load_data(args, None).train)
    assert torch.equal(chosen[0].images, chosen[1].images)
    assert chosen[0].num_images == 100
    held = train.parse(["--dataset", "digits", "--train-size", "100", "--val-size", "50", "--save", str(tmp_path)])[0]
    loaded = train.load_data(held, None)
    assert (loaded.train.num_images, loaded.val.num_images) == (100, 50)


def test_reestimated_statistics_are_those_of_the_images_in_the_gate_mode():
    torch.manual_seed(0)
    model = ResNet_cifar(BasicBlock, (1, 1, 1), 4)
    model.gate_mode = "all"
    images = data.SmallImages(torch.randint(0, 256, (64, 8, 8, 3), dtype=torch.uint8), torch.zeros(64).long(), ["a"])
    loader = data.SmallImageLoader(images, 32, ([0.5] * 3, [0.3] * 3))
    inputs = torch.cat([batch for batch, _ in loader.batches()])
    model(inputs)
    engine.reestimate_batchnorm(model, loader, seed=0)
    assert {norm.momentum for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)} == {0.1}
    assert not any(module.training for module in model.modules())
    first = model.conv1(inputs)
    torch.testing.assert_close(model.bn1.running_mean, first.mean((0, 2, 3)))
    by_batch = torch.stack([part.var((0, 2, 3)) for part in first.split(32)])
    torch.testing.assert_close(model.bn1.running_var, by_batch.mean(0))
    assert next(model.blocks()).fc1bn.num_batches_tracked == 0  # mode "all" does not ask the gates


def test_a_test_with_reestimated_statistics_has_its_own_entry(tmp_path):
    train.main(["--dataset", "digits", "--depth", "8", "--epochs", "1", "--save", str(tmp_path), "--expname", "run"])
    checkpoint = tmp_path / "run" / utils.CHECKPOINT
    before = checkpoint.read_bytes()
    train.main(["--test", "--resume", str(checkpoint)])
    usual = json.loads((tmp_path / "run" / utils.TEST).read_text())["argmax"]
    train.main(["--test", "--resume", str(checkpoint), "--reestimate-bn"])
    tested = json.loads((tmp_path / "run" / utils.TEST).read_text())
    assert tested.keys() == {"argmax", "argmax+bn"}
    assert tested["argmax"] == usual
    assert tested["argmax+bn"]["loss"] != usual["loss"]
    assert checkpoint.read_bytes() == before
