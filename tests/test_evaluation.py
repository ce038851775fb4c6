"""Evaluation and `--test`: statistics of images and gates, each against a count image by image."""

import copy
import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from steps import PIXELS, RATES, small_loader, small_net
from torch import nn
from waits import watching

from aig import evaluation, inference
from aig.data import SmallImageLoader, SmallImages
from aig.distributed import World
from aig.environment import derive_seed
from aig.losses import Objective
from convnet_aig import GATE_MODES, BasicBlock, ResNet_cifar

OBJECTIVE = Objective(RATES, 2, topk=(1, 2))


@pytest.fixture
def model():
    return small_net().eval()


@pytest.fixture
def loader():
    return small_loader(50)


@pytest.fixture
def placed(device):
    """A network, a loader and an objective on the device."""
    objective = Objective(RATES, 2, topk=(1, 2), device=device)
    return small_net().eval().to(device), small_loader(50, device=device), objective


def result_of(model, loader, **more):
    """What `--test` measures, without its time."""
    result = evaluation.measure(model, loader, OBJECTIVE, **more)
    assert result.pop("images_per_second") > 0
    return result


# ---------------------------------------------------------------------------------------------- statistics


def test_in_low_precision_sums_over_many_images_stay_exact():
    """bfloat16 has no 301."""
    model, loader = small_net().eval(), small_loader(301, batch_size=301)
    model.gate_mode = "all"
    record = evaluation.evaluate(model, loader, OBJECTIVE, 7, autocast=torch.autocast("cpu", torch.bfloat16))
    exact = evaluation.evaluate(model, loader, OBJECTIVE, 7)
    assert record["gates"] == [1, 1, 1]
    assert record["execution_rate"] == 1
    assert record["loss"] != exact["loss"]
    assert record["loss"] == pytest.approx(exact["loss"], rel=0.02)


@pytest.mark.parametrize("mode", GATE_MODES)
def test_evaluation_statistics_equal_a_count_image_by_image(placed, mode):
    model, loader, objective = placed
    model.gate_mode = mode
    record = evaluation.evaluate(model, loader, objective, seed=7)

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


def test_a_network_in_train_mode_is_evaluated_in_eval_mode_and_left_there(model, loader):
    expected = evaluation.evaluate(model, loader, OBJECTIVE, 1)
    before = copy.deepcopy(model.state_dict())
    for measured in (False, True):
        model.train()
        found = result_of(model, loader, dense=True) if measured else evaluation.evaluate(model, loader, OBJECTIVE, 1)
        np.testing.assert_equal({name: found[name] for name in expected}, expected)
        assert not any(module.training for module in model.modules())
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name


def test_each_batch_of_the_evaluation_may_stop_it(model, loader):
    calls = []

    def stop():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate(model, loader, OBJECTIVE, 1, each_batch=stop)
    assert len(calls) == 3


@pytest.mark.parametrize("counting", [False, True])
@pytest.mark.parametrize("mode", GATE_MODES)
def test_an_evaluation_reads_from_the_device_when_it_is_through(model, loader, mode, counting):
    model.gate_mode, begun, noted = mode, [], []
    cost = inference.count_macs(model, loader.size) if counting else None
    with watching(lambda name: noted.append((len(begun), name))):
        evaluation.evaluate(model, loader, OBJECTIVE, 1, cost=cost, each_batch=lambda: begun.append(1))
    assert len(begun) == 4
    assert {batch for batch, _ in noted} == {4}


def test_predictions_are_of_every_image_once_and_without_a_gradient(placed):
    model, loader, _ = placed
    images, labels, logits, z = map(torch.cat, zip(*evaluation.predictions(model, loader, 1), strict=True))
    assert torch.equal(images, torch.cat([x for x, _ in loader.batches()]))
    assert torch.equal(labels, loader.labels)
    assert (logits.shape, z.shape) == ((50, 4), (50, 3))
    assert not logits.requires_grad
    assert not z.requires_grad


# ---------------------------------------------------------------------------------------------- --test


def test_repeated_tests_agree_and_samples_report_their_spread(model, loader):
    first, second = (result_of(model, loader, samples=4) for _ in range(2))
    np.testing.assert_equal(first, second)  # equal NaNs of the class without images included
    assert "top1_std" not in first
    model.gate_mode = "sample"
    sampled = result_of(model, loader, samples=4)
    seeds = [derive_seed(1, "test", sample) for sample in range(4)]
    each = [evaluation.evaluate(model, loader, OBJECTIVE, seed)["execution_rate"] for seed in seeds]
    assert len(set(each)) > 1
    assert sampled["execution_rate"] == pytest.approx(np.mean(each))
    assert sampled["execution_rate_std"] == pytest.approx(np.std(each, ddof=1))
    assert result_of(model, loader, samples=4, seed=2)["gates"] != sampled["gates"]
    assert result_of(model, loader, samples=1)["top1_std"] is None


def test_only_a_test_that_samples_is_repeated_and_its_speed_counts_every_image(model, loader, monkeypatch):
    clock, batches = [0.0], loader.batches

    def tick(*args):
        clock[0] += 2
        return batches(*args)

    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(loader, "batches", tick)
    for model.gate_mode, passes in (("argmax", 1), ("expected", 1), ("sample", 4)):
        before = clock[0]
        result = evaluation.measure(model, loader, OBJECTIVE, samples=4)
        assert clock[0] - before == 2 * passes
        assert result["images_per_second"] == 25  # 50 images in 2 seconds


@pytest.mark.parametrize("mode", ["argmax", "all"])
def test_the_computation_of_a_test_is_counted_image_by_image(model, loader, mode):
    model.gate_mode = mode
    skipping, dense = (result_of(model, loader, dense=dense) for dense in (False, True))
    cost = inference.count_macs(model, 8)
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


def test_results_of_several_seeds_are_averaged_number_by_number():
    results = [{"top1": 1.0, "gates": [0.0, 1.0], "of": {"a": 2}}, {"top1": 2.0, "gates": [1.0, 1.0], "of": {"a": 4}}]
    assert evaluation.mean_of(results) == {"top1": 1.5, "gates": [0.5, 1.0], "of": {"a": 3}}
    assert evaluation.mean_of(results[:1]) is results[0]


# ---------------------------------------------------------------------------------------------- the form by device


class Elsewhere:
    """What `accelerated` needs of a network that is not on a CPU."""

    def parameters(self):
        yield torch.empty(0, device="meta")

    def eval(self):
        return self


@dataclass(frozen=True)
class Share(World):
    """One of several processes; `another` says whether any other has chosen to skip."""

    another: bool = False

    def all_max(self, *numbers):
        return [max(number, self.another) for number in numbers]


class Untouched(SmallImageLoader):
    def batches(self, epoch=0, start=0):
        raise AssertionError("an epoch of the loader was begun")


@pytest.fixture
def tried(monkeypatch):
    """The images on which `accelerate` has chosen a form, and the form that it is to choose."""
    given = SimpleNamespace(images=[], conditional=False)

    def accelerate(model, images=None):
        given.images.append(images)
        return SimpleNamespace(conditional=True if images is None else given.conditional)

    monkeypatch.setattr(inference, "accelerate", accelerate)
    return given


def share(another=False, count=5):
    """The share of the last of eight processes: none of five images."""
    images = SmallImages(torch.zeros(count, 8, 12, 3, dtype=torch.uint8), torch.zeros(count).long(), ["a"])
    return Untouched(images, 16, PIXELS, world=Share(7, 8, another))


def test_off_the_cpu_a_trial_on_made_up_images_decides_even_in_a_process_without_images(tried):
    loader = share()
    assert loader.world.shard(5) == slice(5, 5)
    evaluation.accelerated_for(Elsewhere(), loader)
    evaluation.accelerated_for(Elsewhere(), share(count=40))
    assert [tuple(images.shape) for images in tried.images] == [(5, 3, 8, 12), (16, 3, 8, 12)]
    assert {images.device.type for images in tried.images} == {"meta"}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("another", [False, True])
def test_all_processes_compute_in_the_form_that_any_has_chosen(tried, own, another):
    tried.conditional = own
    assert evaluation.accelerated_for(Elsewhere(), share(another=another)).conditional is (own or another)


def test_results_that_must_repeat_are_not_left_to_a_trial(tried):
    torch.use_deterministic_algorithms(True)
    try:
        network = evaluation.accelerated_for(Elsewhere(), share())
    finally:
        torch.use_deterministic_algorithms(False)
    assert (tried.images, network.conditional) == ([None], False)


def test_a_cpu_always_skips_without_a_trial(tried, model):
    assert evaluation.accelerated_for(model, share()).conditional is True
    assert tried.images == [None]


# ---------------------------------------------------------------------------------------------- the table


def table(model, loader, mode="argmax", **more):
    model.gate_mode = mode
    result = evaluation.measure(model, loader, OBJECTIVE, samples=2, **more)
    return result, evaluation.describe(result, mode, RATES)


def test_the_table_gives_the_numbers_of_the_result(model, loader):
    result, text = table(model, loader)
    assert text.startswith("gate mode argmax at threshold 0.5, closed branches skipped: 50 images, ")
    for name in ("top1", "top2"):
        assert f"  {name:<15}{result[name]:9.2f} %\n" in text
    terms = f"{result['loss_classify']:.4f} classify + {result['loss_target']:.4f} target"
    assert f"{result['loss']:9.4f}  ({terms})" in text
    assert f"{result['execution_rate']:9.4f}  (target 0.6000)" in text
    assert f"MMACs an image {result['macs_mean'] / 1e6:9.2f}  ({result['macs_fraction']:.4f} of the dense net's" in text
    blocks = zip(result["gates"], RATES, strict=True)
    assert "  ".join(f"{n:3} {rate:.2f} ({target:.2f})" for n, (rate, target) in enumerate(blocks, start=1)) in text
    shares = [line.split() for line in text.split("fewest first (3 of 3)\n")[1].splitlines()]
    assert [float(share) for _, share, _ in shares] == sorted(float(share) for _, share, _ in shares)
    for name, share, bar in shares:
        assert share == f"{result['classes'][name]:.3f}"
        assert len(bar) == round(40 * result["classes"][name])


def test_the_table_says_how_it_was_computed(model, loader):
    assert "closed branches computed and masked" in table(model, loader, dense=True)[1]
    assert "if closed branches were skipped" in table(model, loader, dense=True)[1]
    assert "gate mode all, which runs every branch" in table(model, loader, "all")[1]
    result, text = table(model, loader, "sample")
    assert f"{result['top1']:9.2f} % ± {result['top1_std']:.2f}\n" in text
    assert f"{result['loss']:9.4f} ± {result['loss_std']:.4f}  (" in text
    assert "threshold" not in text


def test_of_many_classes_the_table_shows_the_ends(model):
    result, _ = table(model, small_loader(50))
    result["classes"] = {f"class {k}": k / 100 for k in range(60)}
    text = evaluation.describe(result, "argmax", RATES)
    assert "fewest first (20 of 60)" in text
    assert [f"class {k} " in text for k in (0, 9, 10, 49, 50, 59)] == [True, True, False, False, True, True]


# ---------------------------------------------------------------------------------------------- BatchNorm anew


def test_reestimated_statistics_are_those_of_the_images_in_the_gate_mode():
    torch.manual_seed(0)
    model = ResNet_cifar(BasicBlock, (1, 1, 1), 4)
    model.gate_mode = "all"
    images = SmallImages(torch.randint(0, 256, (64, 8, 8, 3), dtype=torch.uint8), torch.zeros(64).long(), ["a"])
    loader = SmallImageLoader(images, 32, PIXELS)
    inputs = torch.cat([batch for batch, _ in loader.batches()])
    model(inputs)
    evaluation.reestimate_batchnorm(model, loader, seed=0)
    assert {norm.momentum for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)} == {0.1}
    assert not any(module.training for module in model.modules())
    first = model.conv1(inputs)
    torch.testing.assert_close(model.bn1.running_mean, first.mean((0, 2, 3)))
    by_batch = torch.stack([part.var((0, 2, 3)) for part in first.split(32)])
    torch.testing.assert_close(model.bn1.running_var, by_batch.mean(0))
    assert next(model.blocks()).fc1bn.num_batches_tracked == 0  # mode "all" does not ask the gates


def test_reestimating_reads_nothing_between_the_batches_and_is_a_mean_over_them(model):
    """As `momentum=None` computes it, which reads a count from the device for each BatchNorm and batch."""
    loader, begun, noted = small_loader(50), [], []
    expected = copy.deepcopy(model)
    for norm in expected.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
    torch.manual_seed(7)
    with torch.no_grad():
        for images, _ in loader.batches(epoch=1):
            expected(images)
    model.register_forward_pre_hook(lambda *_: begun.append(1))
    with watching(lambda name: noted.append((len(begun), name))):
        evaluation.reestimate_batchnorm(model, loader, seed=7)
    assert len(begun) == 4
    assert not [name for batch, name in noted if batch > 0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name


def test_reestimated_statistics_depend_on_the_seed_alone_and_need_no_gradient(model, loader):
    found, with_gradient = [], []
    model.gate_mode = "sample"
    model.register_forward_hook(lambda module, args, output: with_gradient.append(output[0].requires_grad))
    for seed in (1, 1, 2):
        evaluation.reestimate_batchnorm(model, loader, seed=seed)
        found.append(torch.cat([value.flatten() for name, value in model.named_buffers() if "running" in name]))
        torch.rand(1)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert with_gradient == [False] * 3 * len(loader)


def test_a_network_that_is_not_finite_is_tested_to_the_end(loader):
    """Its gates are NaN, which is no number of executed blocks."""
    broken = small_net()
    with torch.no_grad():
        broken.conv1.weight.fill_(math.nan)
    broken.gate_mode = "sample"
    result = evaluation.measure(broken.eval(), loader, Objective(RATES, 2), samples=2, dense=True)
    assert math.isnan(result["loss"])
    assert sum(result["executed_blocks"]) == loader.num_images
    assert "open gates by class, fewest first (0 of 0)" in evaluation.describe(result, "sample", RATES)
