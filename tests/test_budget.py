"""A budget for a whole network: its loss in training, and the thresholds that keep to it."""

import copy
import math

import numpy as np
import pytest
import torch
from steps import PIXELS, small_loader, small_net

import aig
from aig import budget
from aig.data import SmallImageLoader, SmallImages
from aig.inference import count_macs
from convnet_aig import BasicBlock, ResNet_cifar, check_thresholds, log_odds

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    """A network whose gates differ in how often they open, and in how sure they are."""
    torch.manual_seed(0)
    model = ResNet_cifar(BasicBlock, (2, 2, 2), 4, [1, 0.5, 0.5, 0.5, 0.5, 0.5])
    for number, block in enumerate(block for block in model.blocks() if block.gated):
        torch.nn.init.normal_(block.fc2.weight, 0, 1 + number)
        block.fc2.bias.data = torch.tensor([0.0, number - 1.0])
    return model.eval()


@pytest.fixture(scope="module")
def loader():
    return small_loader(400, batch_size=100)


def executed(model, loader):
    """What the images of a loader execute in mode "argmax", as a part of the dense network, and the mean rates."""
    cost = count_macs(model, loader.size)
    with torch.no_grad():
        z = torch.cat([torch.stack(model(images)[1], 1) for images, _ in loader.batches()])
    return cost.executed(z).mean().item() / cost.dense, z.mean(0)


# ---------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("part", [0.45, 0.6, 0.9])
def test_the_budget_of_a_training_counts_what_is_executed(model, loader, part):
    made = budget.make_budget(model, loader.size, part, 7, True, CPU)
    found, rates = executed(model, loader)
    assert made.executed(rates).item() == pytest.approx(found)
    assert (made.fraction, made.weight) == (part, 7)
    alike = torch.tensor([1.0, *[2 * made.floor] * 5])  # twice the floor: where all gates that save alike would be
    assert made.executed(alike).item() == pytest.approx(part)
    assert budget.make_budget(model, loader.size, part, 7, False, CPU).floor == 0


def test_a_budget_below_what_always_runs_is_an_error(model, loader):
    least = budget.reach(model, count_macs(model, loader.size))[0]
    with pytest.raises(ValueError, match="always run"):
        budget.make_budget(model, loader.size, 0.9 * least, 7, True, CPU)
    with pytest.raises(ValueError, match="no gates"):
        budget.make_budget(small_net(rates=[1, 1, 1]), loader.size, 0.7, 7, True, CPU)


# ---------------------------------------------------------------------------------------------- thresholds


@pytest.mark.parametrize("part", [0.5, 0.7, 0.85])
def test_calibrated_thresholds_keep_to_the_budget_on_images_never_seen(model, loader, part):
    before = model.gate_mode, model.threshold
    thresholds = aig.calibrate(model, loader, part)
    assert (model.gate_mode, model.threshold) == before
    assert not any("gate_logits" in vars(block) for block in model.blocks())
    model.threshold = thresholds
    try:
        assert executed(model, loader)[0] == pytest.approx(part, abs=0.01)
        random = torch.Generator().manual_seed(5)
        images = torch.randint(256, (2000, 8, 8, 3), dtype=torch.uint8, generator=random)
        other = SmallImageLoader(SmallImages(images, torch.zeros(2000, dtype=torch.long), loader.classes), 500, PIXELS)
        assert executed(model, other)[0] == pytest.approx(part, abs=0.03)
    finally:
        model.threshold = 0.5


def test_a_data_loader_of_torch_will_do(model, loader):
    images, labels = (torch.cat(parts) for parts in zip(*loader.batches(), strict=True))
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=150)
    assert aig.calibrate(model, batches, 0.7) == pytest.approx(aig.calibrate(model, loader, 0.7), abs=1e-6)


def test_what_was_there_is_restored_and_no_images_are_an_error(model, loader):
    block = model.layer2[0]
    wrapper = block.gate_logits
    block.gate_logits = lambda x: wrapper(x)
    mine = block.gate_logits
    model.train()
    model.bn1.eval()  # frozen
    try:
        aig.calibrate(model, loader, 0.7)
        assert [model.training, model.bn1.training, model.layer1[0].bn1.training] == [True, False, True]
        assert block.gate_logits is mine
    finally:
        del block.gate_logits
        model.eval()
    with pytest.raises(ValueError, match="no images"):
        aig.calibrate(model, [], 0.7)


def test_of_both_ways_the_one_with_the_lower_loss_is_taken(model, loader, monkeypatch):
    losses = {"one": 1.0, "each": 0.5}

    def search(model, loader, cost, part, first, rule):
        kind = "one" if rule is budget.same_threshold else "each"
        odds = torch.full((5,), log_odds(0.3)) if kind == "one" else torch.linspace(-1, 1, 5)
        return budget.Trial(odds, first.scores, losses[kind], part)

    monkeypatch.setattr(budget, "search", search)
    each = aig.calibrate(model, loader, 0.7)
    assert each == pytest.approx(torch.sigmoid(torch.linspace(-1, 1, 5)).tolist())
    losses["one"] = 0.4
    assert aig.calibrate(model, loader, 0.7) == pytest.approx(0.3)


def test_a_threshold_for_each_gate_opens_it_as_often_as_it_is_sampled():
    torch.manual_seed(0)
    scores = torch.randn(5000, 3) * torch.tensor([0.2, 1.0, 5.0]) + torch.tensor([2.0, 0.0, -1.0])
    for shift in (-1.0, 0.0, 0.7):
        thresholds = budget.rates_as_sampled(scores, shift)
        sampled = torch.sigmoid(scores + shift).mean(0)
        torch.testing.assert_close((scores > thresholds).float().mean(0), sampled, atol=1e-3, rtol=0)
    assert not (scores > budget.rates_as_sampled(scores, -budget.EXTREME)).any()
    assert (scores > budget.rates_as_sampled(scores, budget.EXTREME)).all()


def test_equal_scores_are_opened_together_and_no_threshold_is_on_them():
    constant, few = torch.full((100, 1), 1.3), torch.tensor([0.0] * 40 + [1.0] * 50 + [3.0] * 10)[:, None]
    for scores, shift, opened in ((constant, 0.0, 1), (constant, -2.0, 0), (few, 0.0, 0.6), (few, -1.5, 0.1)):
        threshold = budget.rates_as_sampled(scores, shift)
        assert (scores > threshold).float().mean() == pytest.approx(opened)
        assert (scores - threshold).abs().min() >= 0.5


def test_one_gate_has_one_threshold(loader, monkeypatch):
    single = small_net(rates=[1, 1, 0.5]).eval()
    losses = iter((2.0, 1.0))  # of the rule with one threshold a gate is the lower
    monkeypatch.setattr(budget, "search", lambda *_: budget.Trial(torch.zeros(1), None, next(losses), 0.85))
    assert aig.calibrate(single, loader, 0.85) == 0.5


def test_a_budget_out_of_reach_is_an_error(model, loader):
    least, most = budget.reach(model, count_macs(model, loader.size))
    for part in (0.5 * least, 1.01 * most):
        with pytest.raises(ValueError, match=f"from {least:.3f} to {most:.3f}"):
            aig.calibrate(model, loader, part)
    with pytest.raises(ValueError, match="no gates"):
        aig.calibrate(small_net(rates=[1, 1, 1]), loader, 0.7)


def test_gates_that_treat_all_images_alike_meet_no_budget_between(loader):
    same = small_net(rates=[1, 1, 0.5])
    torch.nn.init.zeros_(same.layer3[0].fc2.weight)
    with pytest.raises(ValueError, match="no thresholds execute"):
        aig.calibrate(same.eval(), loader, 0.85)  # all closed: 0.72, all open: 1


# ---------------------------------------------------------------------------------------------- one threshold a gate


@pytest.mark.parametrize("form", ["masked", "accelerated", "one by one"])
def test_each_gate_decides_by_its_own_threshold(model, loader, form):
    images = next(loader.batches())[0]
    with budget.recorded_scores(model) as scores, torch.no_grad():
        model(images)
        first = scores[0].clone()
    model.threshold = [torch.sigmoid(first.double().median()).item(), 0.2, 0.5, 0.9, 1e-9]
    try:
        with torch.no_grad():
            _, gates = model(images)
            network = model if form == "masked" else aig.accelerate(model)
            if form == "one by one":
                parts = [network(image[None])[1] for image in images]
                opened = [torch.cat(z) for z in zip(*parts, strict=True)]
            else:
                opened = network(images)[1]
    finally:
        model.threshold = 0.5
    assert [z.tolist() for z in opened] == [z.tolist() for z in gates]
    assert torch.equal(opened[1].bool(), first > first.median())
    assert opened[5].bool().all()


def test_thresholds_may_be_an_array_or_a_tensor():
    for thresholds in (np.array([0.25, 0.5]), torch.tensor([0.25, 0.5]), (0.25, 0.5)):
        assert check_thresholds(thresholds, 2) == [0.25, 0.5]


@pytest.mark.parametrize("one", [np.float32(0.25), np.float64(0.25), np.array(0.25), torch.tensor(0.25), 0.25])
def test_a_threshold_may_be_any_kind_of_number(model, one):
    model = copy.deepcopy(model)
    images = torch.randn(4, 3, 8, 8, dtype=next(model.parameters()).dtype)
    model.threshold = 0.25
    wanted = torch.stack(model(images)[1])
    model.threshold = one
    for found in (model(images), aig.accelerate(model)(images)):
        assert torch.equal(torch.stack(found[1]), wanted)


@pytest.mark.parametrize("threshold", [0, 1, math.nan, [0.5] * 4, [0.5, 0.5, 0.5, 0.5, 1.0]])
def test_thresholds_that_do_not_fit_are_an_error(model, threshold):
    with pytest.raises(ValueError, match="for each of 5 gates"):
        check_thresholds(threshold, 5)
    model.threshold = threshold
    try:
        with pytest.raises(ValueError, match="threshold"):
            model(torch.randn(2, 3, 8, 8))
        with pytest.raises(ValueError, match="threshold"):
            aig.accelerate(model)(torch.randn(2, 3, 8, 8))
    finally:
        model.threshold = 0.5
