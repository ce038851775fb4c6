"""The optional terms of the loss, and their gradients, against closed forms in float64."""

import pytest
import torch
from steps import small_loader, small_net
from torch import nn

from aig import evaluation
from aig.distributed import World
from aig.losses import Objective
from aig.terms import Budget, Distillation

BRANCHES = torch.tensor([0.2, 0.3, 0.4], dtype=torch.float64)
BUDGET = Budget(0.5, weight=7, fixed=0.15, branches=BRANCHES, floor=0.25)


def gates(rates, images=20):
    """Multipliers z (N,) of each block, open for these parts of the images, with a gradient."""
    z = torch.zeros(images, len(rates), dtype=torch.float64)
    for block, rate in enumerate(rates):
        z[: round(rate * images), block] = 1
    return z.requires_grad_()


def test_the_budget_and_the_floor_and_their_gradients_are_those_of_the_formula():
    z = gates([0.1, 0.6, 1.0])
    rates = z.mean(0)
    executed = 0.15 + 0.2 * 0.1 + 0.3 * 0.6 + 0.4 * 1.0
    assert BUDGET.executed(rates).item() == pytest.approx(executed)
    for warm, floor in ((1, 0.25), (0, 1.0), (0.5, 0.625)):
        terms = BUDGET.terms(rates, warm)
        below = [max(0, floor - rate) for rate in (0.1, 0.6, 1.0)]
        assert terms["loss_budget"].item() == pytest.approx(7 * (executed - 0.5) ** 2)
        assert terms["loss_floor"].item() == pytest.approx(7 * sum(each**2 for each in below))
        (gradient,) = torch.autograd.grad(sum(terms.values()), z, retain_graph=True)
        expected = (2 * 7 * (executed - 0.5) * BRANCHES - 2 * 7 * torch.tensor(below, dtype=torch.float64)) / 20
        torch.testing.assert_close(gradient, expected.expand(20, 3))


def test_without_a_floor_there_is_no_term_for_it():
    free = Budget(0.5, 7, 0.15, BRANCHES)
    assert set(free.terms(gates([0.1, 0.2, 0.3]).mean(0))) == {"loss_budget"}


def test_distillation_and_its_gradient_are_those_of_the_formula():
    torch.manual_seed(0)
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    taught = torch.randn(6, 5, dtype=torch.float64)
    term = Distillation(lambda images: taught, weight=0.3, temperature=4).term(logits, torch.zeros(6), "mean")
    p, q = torch.softmax(taught / 4, 1), torch.softmax(logits / 4, 1)
    expected = 0.3 * 16 * (p * (p.log() - q.log())).sum(1).mean()
    assert term.item() == pytest.approx(expected.item())
    (gradient,) = torch.autograd.grad(term, logits)
    torch.testing.assert_close(gradient, 0.3 * 4 * (q - p) / 6)
    total = Distillation(lambda images: taught, 0.3, 4).term(logits, torch.zeros(6), "sum")
    assert total.item() == pytest.approx(6 * expected.item())


def objective(world=None, teacher=None, weight=0.3):
    distillation = Distillation(teacher, weight, 4) if teacher else None
    return Objective([0.5] * 3, 0, budget=BUDGET, distillation=distillation, **({"world": world} if world else {}))


def test_the_loss_is_the_sum_of_its_recorded_terms():
    torch.manual_seed(0)
    images, y = torch.randn(20, 3, 8, 8, dtype=torch.float64), torch.arange(20) % 4
    model = small_net().double()
    z, logits = gates([0.1, 0.6, 1.0]), torch.randn(20, 4, dtype=torch.float64)
    whole = objective(teacher=lambda images: model.eval()(images)[0].detach())
    loss, sums = whole(logits, y, list(z.unbind(1)), 20, 0.5, images)
    assert set(sums) == {"gates", *whole.names}
    assert set(whole.names) == {
        "loss_classify", "loss_distill", "loss_budget", "loss_floor", "macs_fraction", "macs_budget", "top1"}
    means = {name: value.item() / 20 for name, value in sums.items() if name != "gates"}
    assert sum(mean for name, mean in means.items() if name.startswith("loss_")) == pytest.approx(loss.item())
    assert means["loss_classify"] == pytest.approx(0.7 * nn.functional.cross_entropy(logits, y).item())
    assert means["macs_fraction"] == pytest.approx(BUDGET.executed(z.mean(0)).item())
    assert means["macs_budget"] == pytest.approx(0.5)


def test_the_budget_is_of_the_whole_batch_whatever_the_number_of_processes():
    torch.manual_seed(0)
    z, logits, y = gates([0.1, 0.6, 0.9]), torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 4
    (expected,) = torch.autograd.grad(objective()(logits, y, list(z.unbind(1)), 20)[0], z)

    class Two(World):
        """One of two processes, which knows what the other has."""

        def total(self, values):
            other = z.detach()[slice(10, 20) if self.rank == 0 else slice(0, 10)]
            more = {"gates": other.sum(0), "count": torch.tensor(10)}
            return {name: value + more.get(name, 0) for name, value in values.items()}

    for rank, shard in enumerate((slice(0, 10), slice(10, 20))):
        of_process = objective(Two(rank, 2))(logits[shard], y[shard], list(z[shard].unbind(1)), 20)[0]
        (gradient,) = torch.autograd.grad(of_process, z)
        torch.testing.assert_close(gradient[shard] / 2, expected[shard])  # DDP takes the mean over processes


def test_an_evaluation_has_the_terms_of_training_and_counts_what_was_executed():
    model, loader = small_net().eval(), small_loader(48)
    budget = Budget(0.5, 7, 0.15, BRANCHES)
    teacher = Distillation(lambda images: model.linear.weight.new_zeros(len(images), 4), 0.3, 4)
    measured = Objective([0.5] * 3, 0, budget=budget, distillation=teacher)
    record = evaluation.evaluate(model, loader, measured, seed=1)
    assert record["macs_fraction"] == pytest.approx(budget.executed(torch.tensor(record["gates"])).item())
    terms = ("loss_classify", "loss_distill", "loss_budget")
    assert record["loss"] == pytest.approx(sum(record[name] for name in terms))
    model.gate_mode = "all"
    assert evaluation.evaluate(model, loader, measured, seed=1)["macs_fraction"] == pytest.approx(0.15 + 0.9)
