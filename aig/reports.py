"""What a training says of itself: its lines, and its warnings when something is wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from aig.console import TrainingError, say
from aig.distributed import World
from convnet_aig import RUNS_EVERYTHING

# A gate has collapsed if its rate is within STUCK of 0 or 1 and more than OFF_TARGET from its target
STUCK, OFF_TARGET = 0.001, 0.1
EXPLODED = 10  # times the cross entropy of guessing


def brief(record: dict[str, Any]) -> str:
    """Loss, accuracies and execution rate of a record in one short line."""
    accuracies = "  ".join(f"{name} {value:.2f} %" for name, value in record.items() if name.startswith("top"))
    macs = f"  MACs {record['macs_fraction']:.3f} (budget {record['macs_budget']:g})" if "macs_budget" in record else ""
    return f"loss {record['loss']:.4f}  {accuracies}  execution rate {record['execution_rate']:.3f}{macs}"


def report_interval(print_freq: int, log_interval: int, bar: Any, world: World) -> int:
    """Steps between reports, the same in every process: only the main one knows whether it has a terminal."""
    interval = print_freq if bar.disable else log_interval
    return world.all_max(interval if world.is_main else 0)[0]


def report(bar: Any, where: str, means: dict[str, float]) -> None:
    """Shows the means of the epoch so far, on the bar or as a line."""
    if bar.disable:
        say(f"{where}  {brief(means)}")
    else:
        bar.set_postfix_str(brief(means))


def epoch_line(record: dict[str, Any], epochs: int, last: int, mode: str, is_best: bool) -> str:
    """An epoch in one line. Training samples its gates; validation decides in gate mode `mode`."""
    epoch, seconds = record["epoch"], record["seconds"]
    return (
        f"epoch {epoch}/{epochs}  lr {record['lr']:g}  train (sample): {brief(record['train'])}  "
        f"val ({mode}): {brief(record['val'])}{'  (best)' if is_best else ''}  "
        f"{seconds:.0f} s, {seconds * (last - epoch) / 60:.0f} min left"
    )


def check_health(model: nn.Module, loss: float, epoch: int) -> None:
    """Raises TrainingError if the validation loss or a parameter or buffer is not finite. Reads from the device."""
    finite = torch.stack([value.isfinite().all() for value in model.state_dict().values()]).all()
    if not (math.isfinite(loss) and finite):
        raise TrainingError(f"the network is not finite after epoch {epoch}: try a smaller --lr")


def warnings_of(
    records: Sequence[dict[str, Any]], opened: Sequence[float], recipe: Any, mode: str, settled: bool = True
) -> list[str]:
    """What to say after the newest of the epochs recorded.

    Args:
        records: of the epochs so far; none in processes that keep none.
        opened: how often the gate of each block was open in training.
        recipe: see `aig.engine.Recipe`; its target_rates, budget, distillation and fine_tunes count.
        mode: the gate mode of validation.
        settled: whether the target rates have come down to their values.
    """
    found = []
    if settled:
        found.append((static_warning if recipe.budget else collapsed_warning)(opened, recipe.target_rates))
    if validated := [record["val"] for record in records]:
        labels = 1 - recipe.distillation.weight if recipe.distillation else 1
        found.append(spoiled_warning(validated) if recipe.fine_tunes else None)
        found += [exploded_warning(validated, labels), all_open_hint(validated, recipe, mode)]
    return [text for text in found if text]


def static_warning(rates: Sequence[float], target_rates: Sequence[float]) -> str | None:
    """A warning, with a budget, if no gate decides image by image any more."""
    of_gates = [rate for rate, target in zip(rates, target_rates, strict=True) if target < 1]
    if not of_gates or any(STUCK <= rate <= 1 - STUCK for rate in of_gates):
        return None
    return (
        "warning: every gate did the same for nearly every image, so the network is a smaller static one; "
        "try a smaller --lr or --lrfact, or --budget-floor if it is off"
    )


def spoiled_warning(validated: Sequence[dict[str, Any]]) -> str | None:
    """A warning if the first epoch has made a loaded network as bad as guessing."""
    classes = len(validated[0]["classes"])
    if len(validated) > 1 or classes < 2 or validated[0]["top1"] > 100 / classes:
        return None
    return (
        f"warning: after the first epoch the loaded network is no better than guessing "
        f"({validated[0]['top1']:.2f} %): try a smaller --lr"
    )


def collapsed_warning(rates: Sequence[float], target_rates: Sequence[float]) -> str | None:
    """A warning if gates did the same for nearly every image of an epoch, though their target rates are others.

    `rates` (L,): how often each was open.
    """
    stuck = [
        f"{block} ({'open' if rate > 0.5 else 'closed'}, target {target:g})"
        for block, (rate, target) in enumerate(zip(rates, target_rates, strict=True), start=1)
        if min(rate, 1 - rate) < STUCK and abs(rate - target) > OFF_TARGET
    ]
    if not stuck:
        return None
    named = ", ".join(stuck[:5]) + ", ..." * (len(stuck) > 5)
    return (
        f"warning: {len(stuck)} of {len(rates)} gates did the same for nearly every image, those of blocks {named}; "
        "if this persists, try a larger --lossfact or a smaller --lr"
    )


def exploded_warning(validated: Sequence[dict[str, Any]], labels: float = 1) -> str | None:
    """A warning if the validation loss is far above chance, or grows while the accuracy stays at chance.

    `labels`: the weight of the cross entropy, beside a teacher's.
    """
    now, classes = validated[-1], len(validated[-1]["classes"])
    chance = labels * math.log(max(2, classes))  # the cross entropy of guessing
    if now["loss_classify"] > EXPLODED * chance:
        return (
            f"warning: the validation loss, {now['loss_classify']:.4g}, is more than {EXPLODED} times that of guessing "
            f"({chance:.2f}): the training diverges; try a smaller --lr"
        )
    if len(validated) < 2 or classes < 2:
        return None
    before = validated[-2]["loss_classify"]
    grows = before is not None and now["loss_classify"] > max(before, chance)
    if grows and now["top1"] <= 100 / classes:
        return (
            f"warning: the accuracy, {now['top1']:.2f} %, is that of guessing, and the validation loss grows: "
            "try a smaller --lr"
        )
    return None


def all_open_hint(validated: Sequence[dict[str, Any]], recipe: Any, mode: str) -> str | None:
    """A hint, given once, if every gate is open for all validation images."""
    gated = any(rate < 1 for rate in recipe.target_rates)
    if mode in RUNS_EVERYTHING or not gated or any(min(each["gates"]) < 1 for each in validated[-1:]):
        return None
    if any(min(each["gates"]) == 1 for each in validated[:-1]):
        return None
    later = "" if recipe.budget else "; later try a higher --threshold or a larger --lossfact"
    return (
        f"hint: in gate mode {mode} every gate is open for all validation images, so nothing is skipped yet; early "
        f"in a training that is usual, as gates start nearly open{later}"
    )
