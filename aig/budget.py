"""A budget of computation for a whole network: the term of the loss for training, the thresholds for a trained one.

    net.threshold = aig.calibrate(net, loader, 0.7)

A budget is a fraction of the dense network's multiply-accumulates; those of the gates count as executed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from aig.console import progress_bar
from aig.data import Loader
from aig.inference import Macs, count_macs, evaluating
from aig.losses import sum_dtype
from aig.terms import Budget
from convnet_aig import AdaptiveResNet, check_thresholds

PASSES, CLOSE = 8, 0.001  # at most 8 passes over the images; stop once within 0.001 of the budget
TOLERATED = 0.05  # farther from the budget is an error; with few images a smaller distance can remain
Batches = Loader | DataLoader
EXTREME = 30.0  # thresholds stay within these log-odds: beyond, P(open) rounds to 1 in float64


def make_budget(
    model: AdaptiveResNet, size: tuple[int, int], fraction: float, weight: float, floor: bool, device: torch.device
) -> Budget:
    """The budget of a training with images of `size` (H, W).

    Let r be the rate at which all gates, opening equally often, meet the budget. With `floor`, the floor is r / 2.
    Raises ValueError if the network cannot run on so little.
    """
    cost = count_macs(model, size)
    least, most = reach(model, cost)
    if fraction <= least:
        raise ValueError(f"{fraction:g} is out of reach: {least:.3f} of the dense net always run")
    branches = torch.tensor(cost.branches, dtype=sum_dtype(device), device=device) / cost.dense
    fixed = (cost.stem + sum(cost.shortcuts) + sum(cost.gates) + cost.head) / cost.dense
    alike = min(1, (fraction - least) / (most - least))
    return Budget(fraction, weight, fixed, branches, floor=alike / 2 if floor else 0)


def reach(model: AdaptiveResNet, cost: Macs) -> tuple[float, float]:
    """The least and the most that images can execute. Raises ValueError if there are no gates."""
    if not model.num_gates:
        raise ValueError("this network has no gates")
    shut = torch.tensor([[0.0 if block.gated else 1.0 for block in model.blocks()]])
    return tuple(cost.executed(z).item() / cost.dense for z in (shut, torch.ones_like(shut)))


# ---------------------------------------------------------------------------------------------- thresholds


class Trial(NamedTuple):
    """What a network does at certain thresholds."""

    log_odds: Tensor  # (G,), the thresholds of the gates
    scores: Tensor  # (N, G), the gates' log-odds for each image
    loss: float  # cross entropy
    executed: float  # multiply-accumulates, as a fraction of the dense network's


def calibrate(model: AdaptiveResNet, loader: Batches, budget: float) -> float | list[float]:
    """The thresholds at which mode "argmax" executes `budget`: one for all gates, or one for each.

    One for each: the log-odds of all gates get the same shift, and each threshold opens its gate as often as sampling
    from the shifted log-odds would. The way with the lower loss is taken. What a gate sees depends on the decisions of
    those before it, so thresholds are chosen from scores, tried, and chosen again, until they meet the budget.

    Args:
        model: its modes and threshold are restored.
        loader: batches of images (n, 3, H, W) and labels (n,), a DataLoader for instance, which is gone through several
            times. Use held-out images if possible, and never test images.
        budget: a fraction of the dense network's multiply-accumulates.

    Raises:
        ValueError: if there are no images, or no thresholds within 0.05 of the budget.
    """
    return find_thresholds(model, loader, budget)[0]


def find_thresholds(model: AdaptiveResNet, loader: Batches, budget: float) -> tuple[float | list[float], float]:
    """What `calibrate` returns, and what the images execute with these thresholds."""
    first = next(iter(loader), None)
    if first is None:
        raise ValueError("there are no images to choose thresholds on")
    cost = count_macs(model, first[0].shape[2:])
    least, most = reach(model, cost)
    if not least < budget < most:
        raise ValueError(f"{budget:g} is out of reach: from {least:.3f} to {most:.3f} of the dense net are executed")
    usual = model.gate_mode, model.threshold
    model.gate_mode = "argmax"
    try:
        with evaluating(model):
            half = attempt(model, loader, cost, torch.zeros(model.num_gates))
            found = [search(model, loader, cost, budget, half, rule) for rule in (same_threshold, rates_as_sampled)]
    finally:
        model.gate_mode, model.threshold = usual
    nearest = min(found, key=lambda trial: abs(trial.executed - budget)).executed
    if abs(nearest - budget) > TOLERATED:
        raise ValueError(f"no thresholds execute {budget:g}, the nearest ones {nearest:.3f}")
    met = [trial for trial in found if abs(trial.executed - budget) <= max(5 * CLOSE, abs(nearest - budget))]
    best = min(met, key=lambda trial: trial.loss)
    thresholds = torch.sigmoid(best.log_odds.cpu().double()).tolist()
    one = best is found[0] or model.num_gates == 1
    return thresholds[0] if one else check_thresholds(thresholds, model.num_gates), best.executed


def search(
    model: AdaptiveResNet,
    loader: Batches,
    cost: Macs,
    budget: float,
    trial: Trial,
    rule: Callable[[Tensor, float], Tensor],
) -> Trial:
    """The trial nearest to the budget, of thresholds by the rule (scores (N, G), shift) -> (G,).

    The next shift is the one that would be right if thresholds did not change the scores. It lies between those that
    executed too little and too much, else in their middle.
    """
    low, high, trials = -EXTREME, EXTREME, [trial]
    for _ in range(PASSES):
        scores = trials[-1].scores
        shift = bisect(rule, scores, model, cost, budget)
        shift = shift if low < shift < high else (low + high) / 2
        trials.append(attempt(model, loader, cost, rule(scores, shift)))
        missing = budget - trials[-1].executed
        if abs(missing) < CLOSE:
            break
        low, high = (shift, high) if missing > 0 else (low, shift)
    return min(trials[1:], key=lambda tried: abs(tried.executed - budget))


def bisect(
    rule: Callable[[Tensor, float], Tensor], scores: Tensor, model: AdaptiveResNet, cost: Macs, budget: float
) -> float:
    """The shift by the rule with which these scores (N, G) would execute the budget."""
    low, high = -EXTREME, EXTREME  # a larger shift executes more
    for _ in range(50):
        middle = (low + high) / 2
        if executed(scores > rule(scores, middle), model, cost) < budget:
            low = middle
        else:
            high = middle
    return high


def same_threshold(scores: Tensor, shift: float) -> Tensor:
    """One threshold for all gates."""
    return scores.new_full(scores.shape[1:], -shift)


def rates_as_sampled(scores: Tensor, shift: float) -> Tensor:
    """Thresholds at which gates open as often as samples of their shifted scores would, as nearly as ties allow."""
    rates = torch.sigmoid(scores + shift).mean(0)  # (G,)
    ordered, count = scores.sort(0, descending=True).values, len(scores)  # (N, G)
    padded = F.pad(ordered, (0, 0, 1, 1))  # a row above and one below
    padded[0], padded[-1] = ordered[0] + 1, ordered[-1] - 1
    off = (torch.arange(count + 1, device=scores.device)[:, None] - rates * count).abs()  # if this many are opened
    opened = off.where(padded[:-1] > padded[1:], math.inf).argmin(0)  # a threshold does not part equal scores
    places = torch.stack([opened, opened + 1])
    return padded.gather(0, places).mean(0).clamp(-EXTREME, EXTREME)


def executed(opened: Tensor, model: AdaptiveResNet, cost: Macs) -> float:
    """The mean part of the dense network that images execute if their gates (N, G) are open so."""
    z = torch.ones(len(opened), sum(model.stages), device=opened.device)
    z[:, [block.gated for block in model.blocks()]] = opened.to(z.dtype)
    return cost.executed(z).mean().item() / cost.dense


@torch.inference_mode()
def attempt(model: AdaptiveResNet, loader: Batches, cost: Macs, log_odds: Tensor) -> Trial:
    """Runs the network at these thresholds, log-odds (G,)."""
    device = next(model.parameters()).device
    model.threshold = torch.sigmoid(log_odds.cpu().double()).tolist()
    losses, opened, found = [], [], []
    with recorded_scores(model) as scores:
        for images, labels in progress_bar(loader, "calibrating", len(loader), "batch"):
            logits, gates = model(images.to(device))
            losses.append(F.cross_entropy(logits, labels.to(device), reduction="none"))
            gated = [z for z, block in zip(gates, model.blocks(), strict=True) if block.gated]
            opened.append(torch.stack(gated, dim=1))
            found.append(torch.stack(scores, dim=1))  # (n, G)
            scores.clear()
    return Trial(log_odds, torch.cat(found), torch.cat(losses).mean().item(), executed(torch.cat(opened), model, cost))


@contextmanager
def recorded_scores(model: AdaptiveResNet) -> Iterator[list[Tensor]]:
    """A list to which each gate that decides adds its log-odds (n,)."""
    scores: list[Tensor] = []

    def recording(gate_logits: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def record(x: Tensor) -> Tensor:
            logits = gate_logits(x)
            scores.append(logits[:, 1] - logits[:, 0])
            return logits

        return record

    gated = [block for block in model.blocks() if block.gated]
    wrapped = [vars(block).get("gate_logits") for block in gated]  # by somebody else
    for block in gated:
        block.gate_logits = recording(block.gate_logits)
    try:
        yield scores
    finally:
        for block, before in zip(gated, wrapped, strict=True):
            del block.gate_logits
            if before is not None:
                block.gate_logits = before
