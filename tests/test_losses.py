"""The loss and its sums, each against a computation spelled out; a further term is one subclass."""

import math

import pytest
import torch
import torch.nn.functional as F
from steps import RATES, small_loader, small_net, train
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aig import engine, evaluation, inference, losses, state
from aig.console import TrainingError
from aig.distributed import World
from aig.losses import Objective, add, averages, target_rate_loss, topk_correct


def outputs(count=12, classes=5, device="cpu"):
    """Logits (N, K) with a gradient, labels (N,), and z of three blocks with a gradient."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(count, classes, generator=random).to(device).requires_grad_()
    gates = [(torch.rand(count, generator=random) < 0.6).float().to(device).requires_grad_() for _ in RATES]
    return logits, torch.randint(classes, (count,), generator=random).to(device), gates


def test_target_rate_loss_is_the_mean_square_distance_of_the_batch_rates():
    z = torch.tensor([[1.0, 0, 1], [1, 0, 0]])
    t = torch.tensor([0.6, 0.3, 1.0])
    assert target_rate_loss(z.mean(0), t).item() == pytest.approx((0.4**2 + 0.3**2 + 0.5**2) / 3)


def test_top_k_counts_labels_among_the_k_highest_and_never_more_than_there_are_classes():
    logits, labels = torch.tensor([[3.0, 2, 1], [3, 2, 1], [3, 2, 1]]), torch.tensor([0, 1, 2])
    counts = topk_correct(logits, labels, (1, 2, 5))
    assert {name: count.item() for name, count in counts.items()} == {"top1": 1, "top2": 2, "top5": 3}


def test_the_loss_is_cross_entropy_and_lossfact_times_the_target_rate_loss(device):
    logits, labels, gates = outputs(device=device)
    loss, sums = Objective(RATES, 3, topk=(1, 2), device=device)(logits, labels, gates, 12)
    z = torch.stack(gates, 1)
    target = 3 * sum((t - r) ** 2 for t, r in zip(RATES, z.mean(0), strict=True)) / 3
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels) + target)
    assert sums.keys() == {"gates", "loss_classify", "loss_target", "top1", "top2"}
    torch.testing.assert_close(sums["gates"], z.sum(0).double().detach())
    assert sums["loss_target"].item() / 12 == pytest.approx(target.item())
    assert sums["top1"] == (logits.argmax(1) == labels).sum()
    assert {value.dtype for value in sums.values()} == {torch.float64}
    assert not any(value.requires_grad for value in sums.values())
    means = averages(sums, 12)
    assert means["loss"] == pytest.approx(loss.item())
    assert means["execution_rate"] == pytest.approx(z.mean().item())
    assert means["top2"] == pytest.approx(100 * sums["top2"].item() / 12)


def test_parts_of_a_batch_weigh_as_many_images_as_they_have(device):
    logits, labels, gates = outputs(device=device)
    objective, losses = Objective(RATES, 3, device=device), []
    for part in (slice(0, 5), slice(5, 12)):
        losses.append(objective(logits[part], labels[part], [z[part] for z in gates], 12)[0])
    alone = [
        F.cross_entropy(logits[part], labels[part])
        + 3 * target_rate_loss(torch.stack(gates, 1)[part].mean(0), torch.tensor(RATES, device=device))
        for part in (slice(0, 5), slice(5, 12))
    ]
    torch.testing.assert_close(sum(losses), alone[0] * 5 / 12 + alone[1] * 7 / 12)


def test_the_mean_gradient_of_two_processes_is_that_of_the_whole_batch():
    logits, labels, gates = outputs()
    whole, expected_sums = Objective(RATES, 3)(logits, labels, gates, 12)
    expected = torch.autograd.grad(whole, [logits, *gates])
    shards, own = (slice(0, 5), slice(5, 12)), []

    class Two(World):
        def total(self, values):
            own.append({name: value.clone() for name, value in values.items()})
            return values if len(own) < 3 else {name: own[0][name] + own[1][name] for name in values}

    found = [torch.zeros_like(value) for value in expected]
    for turn in range(4):  # first each process's own sums, then with those of both
        shard = shards[turn % 2]
        objective = Objective(RATES, 3, world=Two(turn % 2, 2))
        loss, sums = objective(logits[shard], labels[shard], [z[shard] for z in gates], 12)
        if turn >= 2:
            for value, gradient in zip(found, torch.autograd.grad(loss, [logits, *gates]), strict=True):
                value += gradient / 2
    torch.testing.assert_close(found, list(expected))
    torch.testing.assert_close(sums, expected_sums)


def test_warming_target_rates_go_linearly_from_1_to_their_values():
    objective, rates = Objective(RATES, 1), torch.tensor([0.2, 0.9, 0.5], dtype=torch.float64)
    for warm in (0.25, 1.0):
        now = torch.tensor([1 - warm * (1 - rate) for rate in RATES], dtype=torch.float64)
        assert objective.of_rates(rates, warm)["loss_target"] == pytest.approx((now - rates).square().mean().item())
    assert objective.of_rates(rates, None) == objective.of_rates(rates, 1)


def test_what_was_computed_in_16_bits_goes_on_in_32():
    logits, labels, gates = outputs()
    loss, _ = Objective(RATES, 1)(logits.bfloat16(), labels, gates, 12)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss - F.cross_entropy(logits.bfloat16().float(), labels), loss * 0, atol=0.2, rtol=0)


def test_open_gates_of_16_bits_are_counted_exactly():
    """Above 256 bfloat16 has only every second number."""
    gates = [torch.ones(301, dtype=torch.bfloat16)] * 3
    _, sums = Objective(RATES, 1)(torch.zeros(301, 4, dtype=torch.bfloat16), torch.zeros(301).long(), gates, 301)
    assert sums["gates"].tolist() == [301] * 3


def test_terms_of_images_are_means_or_sums_as_asked():
    logits, labels, _ = outputs()
    objective = Objective(RATES, 1)
    mean, total = (objective.of_images(logits, labels, reduction=reduction) for reduction in ("mean", "sum"))
    assert total["loss_classify"].item() == pytest.approx(12 * mean["loss_classify"].item())


def test_running_sums_have_a_memory_of_their_own():
    sums, value = {}, torch.ones(3, dtype=torch.float64)
    add(sums, gates=value)
    add(sums, gates=value)
    assert (sums["gates"].tolist(), value.tolist()) == ([2] * 3, [1] * 3)


class WithPenalty(Objective):
    """A further term: 0.01 times the mean square of the logits."""

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self.names += ("loss_penalty",)

    def of_images(self, logits, y, reduction="mean", images=None):
        penalty = 0.01 * logits.square().mean(1)
        return super().of_images(logits, y, reduction, images) | {"loss_penalty": getattr(penalty, reduction)()}


def test_a_third_term_is_trained_recorded_and_in_the_table_of_a_test(monkeypatch):
    model, loader = small_net(), small_loader()
    plain = train(small_net(), loader, epochs=2)
    monkeypatch.setattr(engine, "Objective", WithPenalty)
    run = train(model, loader, epochs=2)
    for record in run.records:
        for part in (record["train"], record["val"]):
            assert part["loss_penalty"] > 0
            terms = [value for name, value in part.items() if name.startswith("loss_")]
            assert len(terms) == 3
            assert part["loss"] == pytest.approx(sum(terms))
    assert run.records[1]["train"]["loss_classify"] != plain.records[1]["train"]["loss_classify"]

    logits = torch.cat([model(images)[0] for images, _ in loader.batches()])
    result = evaluation.measure(model, loader, WithPenalty(RATES, 2), samples=1)
    expected = 0.01 * logits.square().mean().item()
    assert result["loss_penalty"] == pytest.approx(expected, rel=1e-4)
    table = evaluation.describe(result, "argmax", RATES)
    terms = " + ".join(f"{result[f'loss_{name}']:.4f} {name}" for name in ("classify", "penalty", "target"))
    assert f"({terms})" in table


def test_a_broken_third_term_is_noticed(monkeypatch):
    class Broken(WithPenalty):
        def of_images(self, logits, y, reduction="mean", images=None):
            return super().of_images(logits, y, reduction, images) | {"loss_penalty": logits.sum() * math.nan}

    monkeypatch.setattr(engine, "Objective", Broken)
    with pytest.raises(TrainingError, match="step 1"):
        train(small_net(), small_loader())


# ---------------------------------------------------------------------------------------------- without float64


class WithoutFloat64(TorchDispatchMode):
    """A device that has none, like MPS."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        assert not any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in tree_leaves(out)), operator
        return out


@pytest.fixture
def float32_sums(monkeypatch):
    """Sums as on MPS."""
    for module in (losses, evaluation, inference, state):
        monkeypatch.setattr(module, "sum_dtype", lambda device: torch.float32)


def test_sums_are_in_float64_where_there_is_one():
    dtypes = {kind: losses.sum_dtype(torch.device(kind)) for kind in ("cpu", "cuda", "xpu", "mps")}
    assert dtypes == {**dict.fromkeys(("cpu", "cuda", "xpu"), torch.float64), "mps": torch.float32}


@pytest.mark.usefixtures("float32_sums")
@pytest.mark.parametrize("mode", ["argmax", "sample"])
def test_training_and_evaluation_need_no_float64(mode):
    model, loader = small_net(), small_loader(50, augment="crop")
    model.gate_mode = mode
    with WithoutFloat64():
        train(model, loader, target_warmup=2, val=small_loader())
        result = evaluation.measure(model, small_loader(), Objective(RATES, 2, (1, 2)), samples=2)
    assert 0 < result["macs_fraction"] < 1
    assert sum(result["executed_blocks"]) == pytest.approx(48)
