"""The target-rate loss, a training epoch, evaluation with gate statistics, and `fit`, which strings them together.

Both scripts train and evaluate through this module. Functions that compute return plain dicts; only `fit` writes.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import inference
import utils
from convnet_aig import RUNS_EVERYTHING, AdaptiveResNet
from utils import Interrupted, TrainingError, derive_seed, topk_correct

QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)  # of the images' computation
MATRIX_CLASSES = 100  # above so many classes the classes x blocks matrix is kept outside of the records


class Loader(Protocol):
    """What `data` offers: `num_images` images of `classes`, in `len` batches; `dropped` images are left out.

    `size` is the height and width of an image.
    """

    classes: list[str]
    num_images: int
    dropped: int
    size: tuple[int, int]

    def __len__(self) -> int: ...

    def batches(self, epoch: int = 0, start: int = 0) -> Any: ...


@dataclass(frozen=True)
class Recipe:
    """How to train: the values of the command line that the loops need.

    Attributes:
        target_rates: t_l of each of the L blocks.
        lossfact: weight of the target-rate loss.
        lr: learning rate at the start; each parameter group multiplies it by its own "lr_factor".
        milestones: epochs from which on the learning rate is another 10 times smaller.
        warmup: epochs over which the learning rate rises linearly to lr.
        accumulate: parts in which a batch is computed, to save memory.
        epochs: number of the last epoch, counted from 1.
        seed: of the gates' noise.
        print_freq: steps between plain lines, where the output is no terminal.
        log_interval: steps between refreshes of the progress bar.
        topk: the k of the reported accuracies.
    """

    target_rates: Sequence[float]
    lossfact: float
    lr: float
    milestones: Sequence[int]
    epochs: int
    seed: int
    warmup: int = 0
    accumulate: int = 1
    print_freq: int = 25
    log_interval: int = 20
    topk: Sequence[int] = (1,)

    def evaluation(self) -> dict[str, Any]:
        """The keyword arguments of `evaluate` that a recipe decides."""
        return {"target_rates": self.target_rates, "lossfact": self.lossfact, "topk": self.topk}


def target_rate_loss(z: Tensor, target_rates: Tensor) -> Tensor:
    """The paper's target-rate loss, mean_l (t[l] - mean_n z[n, l])^2, for z (N, L) and t (L,)."""
    return (target_rates - z.mean(0)).square().mean()


def lr_factor(recipe: Recipe, epoch: int, progress: float = 0) -> float:
    """0.1^(number of milestones <= epoch), times (epoch - 1 + progress) / warmup while that is below 1.

    `progress` is the part of the epoch done, in (0, 1].
    """
    factor = 0.1 ** sum(milestone <= epoch for milestone in recipe.milestones)
    return factor * min(1, (epoch - 1 + progress) / recipe.warmup) if recipe.warmup else factor


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


# ---------------------------------------------------------------------------------------------- training


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, rates: Tensor, recipe: Recipe
) -> dict[str, Tensor]:
    """One update. The batch is computed in `recipe.accumulate` parts, each holding the rates on its own.

    Returns:
        Sums over the images, on the device: the two losses, top-k hits, and `gates` (L,).
    """
    optimizer.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    parts = min(recipe.accumulate, max(1, len(images) // 2))  # BatchNorm of a gate needs two images
    for x, y in zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True):
        logits, gates = model(x)
        z = torch.stack(gates, dim=1)  # (N, L)
        loss_classify = F.cross_entropy(logits, y)
        loss_target = recipe.lossfact * target_rate_loss(z, rates)
        loss = loss_classify + loss_target
        (loss * (len(x) / len(images))).backward()
        hits = topk_correct(logits.detach(), y, recipe.topk)
        add(sums, loss_classify=loss_classify.detach() * len(x), loss_target=loss_target.detach() * len(x))
        add(sums, gates=z.detach().sum(0), **{f"top{k}": hit for k, hit in zip(recipe.topk, hits, strict=True)})
    optimizer.step()
    return sums


def add(sums: dict[str, Tensor], **values: Tensor) -> None:
    """Adds tensors to running sums, in place where there is one already: no read from the device."""
    for name, value in values.items():
        sums[name] = sums[name].add_(value) if name in sums else value.to(sum_dtype(value.device), copy=True)


def sum_dtype(device: torch.device) -> torch.dtype:
    """Sums run in float64 but on MPS, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass
class Progress:
    """How far an epoch has come.

    Attributes:
        step: steps done.
        seen: images in them.
        sums: over these images, see `train_step`.
        seconds: spent on them by earlier processes.
    """

    step: int = 0
    seen: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Loader,
    recipe: Recipe,
    epoch: int,
    progress: Progress,
    after_step: Callable[[Callable[[], None]], None] = lambda check: None,
) -> dict[str, float]:
    """Trains for one epoch, or the rest of one; step s draws its noise from (seed, epoch, s) alone.

    Args:
        progress: where to begin; brought up to date after each step.
        after_step: called after each step with a function that raises TrainingError if the epoch must not be saved.

    Returns:
        Means over the epoch: loss, loss_classify, loss_target, top-k accuracies in percent, execution_rate.

    Raises:
        TrainingError: if a loss was not finite, naming the first such step.
    """
    model.train()
    rates = torch.tensor(recipe.target_rates, dtype=torch.float32, device=next(model.parameters()).device)
    progress.sums = {name: value.to(rates.device) for name, value in progress.sums.items()}
    first_bad = torch.full((), -1, device=rates.device)  # stays on the device until something is printed anyway
    steps = len(loader)
    description = f"epoch {epoch}/{recipe.epochs}"
    with tqdm(total=steps, desc=description, initial=progress.step, disable=None, leave=False, unit="step") as bar:
        for step, (images, labels) in enumerate(loader.batches(epoch, progress.step), start=progress.step + 1):
            if recipe.warmup:
                set_lr(optimizer, recipe.lr * lr_factor(recipe, epoch, step / steps))
            torch.manual_seed(derive_seed(recipe.seed, "noise", epoch, step))
            stepped = train_step(model, optimizer, images, labels, rates, recipe)
            add(progress.sums, **stepped)
            progress.step, progress.seen = step, progress.seen + len(images)
            bad = ~(stepped["loss_classify"] + stepped["loss_target"]).isfinite() & (first_bad < 0)
            first_bad = first_bad.masked_fill(bad, step)
            bar.update()
            if step % (recipe.print_freq if bar.disable else recipe.log_interval) == 0:
                check_finite(first_bad, epoch)
                line = brief(averages(progress.sums, progress.seen, recipe.topk))
                if bar.disable:
                    print(f"epoch {epoch}/{recipe.epochs} step {step}/{steps}  {line}", flush=True)
                else:
                    bar.set_postfix_str(line)
            after_step(lambda bad=first_bad: check_finite(bad, epoch))
    check_finite(first_bad, epoch)
    return averages(progress.sums, progress.seen, recipe.topk)


def check_finite(first_bad: Tensor, epoch: int) -> None:
    """Raises TrainingError if a step of the epoch had a non-finite loss. Reads from the device."""
    step = int(first_bad)
    if step >= 0:
        raise TrainingError(
            f"the loss is not finite since epoch {epoch}, step {step}: try a smaller --lr; the epoch was not saved"
        )


def check_health(model: nn.Module, loss: float, epoch: int) -> None:
    """Raises TrainingError if the validation loss or a parameter or buffer is not finite. Reads from the device."""
    finite = torch.stack([value.isfinite().all() for value in model.state_dict().values()]).all()
    if not (math.isfinite(loss) and finite):
        raise TrainingError(
            f"the network is not finite after epoch {epoch}: try a smaller --lr; the epoch was not saved"
        )


def averages(sums: dict[str, Tensor], count: int, topk: Sequence[int]) -> dict[str, float]:
    """Sums over `count` images as the means of a record. Reads from the device, once."""
    names = ["loss_classify", "loss_target", *(f"top{k}" for k in topk)]
    values = torch.stack([*(sums[name] for name in names), sums["gates"].mean()]) / count
    classify, target, *hit_rates, execution_rate = values.tolist()
    losses = {"loss": classify + target, "loss_classify": classify, "loss_target": target}
    accuracies = {f"top{k}": 100 * rate for k, rate in zip(topk, hit_rates, strict=True)}
    return {**losses, **accuracies, "execution_rate": execution_rate}


def brief(record: dict[str, Any]) -> str:
    """Loss, accuracies and execution rate of a record in one short line."""
    accuracies = "  ".join(f"{name} {value:.2f} %" for name, value in record.items() if name.startswith("top"))
    return f"loss {record['loss']:.4f}  {accuracies}  execution rate {record['execution_rate']:.3f}"


# ---------------------------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Loader,
    *,
    target_rates: Sequence[float],
    lossfact: float,
    topk: Sequence[int],
    seed: int,
    cost: inference.Macs | None = None,
    each_batch: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Classifies every image once in the model's gate mode. Shapes: L blocks, K classes.

    Args:
        target_rates, lossfact: of the target-rate loss, taken here on the rates over the whole set.
        topk: the k of the accuracies.
        seed: of the noise, which only the gate mode "sample" draws.
        cost: of an image of the loader's size, to count what the images' graphs cost.
        each_batch: called before each batch; it may raise to stop.

    Returns:
        loss, loss_classify, loss_target, top-k accuracies in percent; execution_rate (branches run over all L),
        gates (L rates), classes ({name: mean rate}), executed_blocks (number of images with 0..L branches run),
        gates_by_class (K x L rates, NaN for a class without images). Rates are means of the multiplier z.
        With `cost` also what `compute` returns: for masked execution, too, the count of the open branches.
    """
    model.eval()
    torch.manual_seed(seed)
    num_classes, num_blocks = len(loader.classes), len(target_rates)
    device = next(model.parameters()).device
    dtype = sum_dtype(device)
    by_class = torch.zeros(num_classes, num_blocks, dtype=dtype, device=device)
    class_counts = torch.zeros(num_classes, dtype=dtype, device=device)
    executed = torch.zeros(num_blocks + 1, dtype=torch.long, device=device)
    sums: dict[str, Tensor] = {}
    costs, all_labels = [], []
    for images, labels in tqdm(loader.batches(), "evaluating", len(loader), disable=None, leave=False, unit="batch"):
        each_batch()
        logits, gates = model(images)
        z = torch.stack(gates, dim=1)  # (N, L)
        run = torch.ones_like(z) if model.gate_mode in RUNS_EVERYTHING else z
        by_class.index_add_(0, labels, z.to(dtype))
        class_counts.index_add_(0, labels, torch.ones_like(labels, dtype=dtype))
        executed.index_add_(0, run.sum(1).round().long(), torch.ones_like(labels))
        hits = topk_correct(logits, labels, topk)
        add(sums, loss_classify=F.cross_entropy(logits, labels, reduction="sum"))
        add(sums, gates=run.sum(0), **{f"top{k}": hit for k, hit in zip(topk, hits, strict=True)})
        if cost:
            costs.append(cost.executed(run, gates=model.gate_mode != "all"))
            all_labels.append(labels)
    gates = by_class.sum(0) / loader.num_images  # (L,)
    rates = torch.tensor(target_rates, dtype=dtype, device=device)
    sums["loss_target"] = loader.num_images * lossfact * (rates - gates).square().mean()
    by_class = by_class / class_counts[:, None]
    return {
        **averages(sums, loader.num_images, topk),
        "gates": gates.tolist(),
        "classes": dict(zip(loader.classes, by_class.mean(1).tolist(), strict=True)),
        "executed_blocks": executed.tolist(),
        "gates_by_class": by_class.tolist(),
        **(compute(torch.cat(costs), torch.cat(all_labels), loader.classes, cost) if cost else {}),
    }


def compute(costs: Tensor, labels: Tensor, classes: Sequence[str], cost: inference.Macs) -> dict[str, Any]:
    """What the images' inference graphs cost, in multiply-accumulates: costs (N,), labels (N,).

    Returns:
        macs_mean per image, macs_quantiles ({"0.05": ...}), macs_classes ({name: mean}), macs_dense of the same net
        with every branch and no gate, and macs_fraction, their mean over that.
    """
    quantiles = torch.tensor(QUANTILES, dtype=costs.dtype, device=costs.device)
    sums, counts = (costs.new_zeros(len(classes)).index_add_(0, labels, of) for of in (costs, torch.ones_like(costs)))
    mean = costs.mean().item()
    return {
        "macs_mean": mean,
        "macs_dense": cost.dense,
        "macs_fraction": mean / cost.dense,
        "macs_quantiles": dict(zip(map(str, QUANTILES), costs.quantile(quantiles).tolist(), strict=True)),
        "macs_classes": dict(zip(classes, (sums / counts).tolist(), strict=True)),
    }


def test(
    model: AdaptiveResNet, loader: Loader, *, samples: int, seed: int, dense: bool, **settings: Any
) -> dict[str, Any]:
    """What `--test` reports: `evaluate`, and in gate mode "sample" the mean over `samples` seeds.

    Args:
        dense: compute every branch and mask it, instead of running only what the gates open.

    Returns:
        As `evaluate` and `compute`, with macs_paper (the paper's convention: macs_dense x execution_rate), images,
        images_per_second, threshold, and `skipping`: whether closed branches were skipped; in mode "sample" also the
        standard deviation over the seeds (None for one seed) of top1, loss and execution_rate, as NAME_std.
    """
    network = model if dense else accelerate(model, loader)
    skipping = not dense and network.conditional and model.gate_mode not in RUNS_EVERYTHING
    settings["cost"] = inference.macs(model, loader.size)
    device = next(model.parameters()).device
    with torch.inference_mode():
        network.eval()(torch.zeros(2, 3, *loader.size, device=device))  # what happens once shall not be timed
    repeats = samples if model.gate_mode == "sample" else 1
    start = time.perf_counter()
    results = [
        evaluate(network, loader, seed=derive_seed(seed, "test", sample), **settings) for sample in range(repeats)
    ]
    seconds = time.perf_counter() - start
    result = mean_of(results)
    if model.gate_mode == "sample":
        for name in ("top1", "loss", "execution_rate"):
            values = [each[name] for each in results]
            result[f"{name}_std"] = statistics.stdev(values) if repeats > 1 else None
    images = loader.num_images
    return {
        **result,
        "macs_paper": result["macs_dense"] * result["execution_rate"],
        "images": images,
        "images_per_second": repeats * images / seconds,
        "threshold": model.threshold,
        "skipping": skipping,
    }


def accelerate(model: AdaptiveResNet, loader: Loader) -> inference.Accelerated:
    """The accelerated network.

    On a CPU it always skips: that mostly pays for the paper's networks (results/latency.log), and a choice by the clock
    would make results round differently from run to run. Elsewhere a first batch has to tell.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    return inference.accelerate(model.eval(), None if on_cpu else next(iter(loader.batches()))[0])


def mean_of(results: list[Any]) -> Any:
    """The elementwise mean of equally nested dicts and lists of numbers; of a single one, itself."""
    first = results[0]
    if len(results) == 1:
        return first
    if isinstance(first, dict):
        return {key: mean_of([each[key] for each in results]) for key in first}
    if isinstance(first, list):
        return [mean_of(list(values)) for values in zip(*results, strict=True)]
    return statistics.fmean(results)


# ---------------------------------------------------------------------------------------------- the run


def keep_matrix(validated: dict[str, Any], folder: Path) -> None:
    """Rounds the classes x blocks matrix of a record; above MATRIX_CLASSES it goes to a file of its own."""
    matrix = np.round(validated.pop("gates_by_class"), 4)  # (K, L)
    if len(matrix) > MATRIX_CLASSES:
        with utils.atomic_write(folder / utils.MATRIX) as file:
            np.save(file, matrix)
    else:
        validated["gates_by_class"] = matrix.tolist()


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train: Loader,
    val: Loader,
    recipe: Recipe,
    *,
    folder: Path,
    epochs: range,
    records: list[dict],
    best: float,
    args: dict[str, Any],
    begin: Callable[[], None],
    dashboard: Any,
    progress: Progress,
    signals: utils.Signals,
    save_every: float = math.inf,
) -> float:
    """Trains through `epochs`, leaving after each a record, a checkpoint, and the best model so far.

    Args:
        folder: the run folder.
        epochs: the epochs to run now, a part of 1..recipe.epochs.
        records: of the epochs before; those of this call are appended.
        best: highest top-1 validation accuracy so far, in percent.
        args: kept in the checkpoint.
        begin: called once, before the first file is written.
        dashboard: its `update(records)` is called after each epoch.
        progress: in the first of the epochs.
        signals: one received saves within the step.
        save_every: seconds after which a checkpoint is written in the middle of an epoch, too.

    Returns:
        The highest top-1 validation accuracy.

    Raises:
        Interrupted: after a signal; the checkpoint then holds the very step.
    """
    begin = functools.cache(begin)  # once
    saved = time.monotonic()

    def save(is_best: bool = False) -> None:
        nonlocal saved
        begin()
        utils.save_checkpoint(checkpoint_of(model, optimizer, epoch, progress, best, args), is_best, folder)
        saved = time.monotonic()

    def stop() -> None:
        where = f"epoch {epoch}, {progress.step} of {len(train)} steps"
        signals.check(f"stopped in {where}; continue with --resume {folder / utils.CHECKPOINT}")

    def after_step(check: Callable[[], None]) -> None:
        if signals.received or time.monotonic() - saved > save_every:
            check()
            progress.seconds = earlier + time.perf_counter() - start
            save()
            stop()

    for epoch in epochs:
        start, earlier = time.perf_counter(), progress.seconds
        lr = recipe.lr * lr_factor(recipe, epoch, 1)
        set_lr(optimizer, lr)
        trained = train_epoch(model, optimizer, train, recipe, epoch, progress, after_step)
        seed = derive_seed(recipe.seed, "validation", epoch)
        try:
            validated = evaluate(model, val, seed=seed, each_batch=stop, **recipe.evaluation())
        except Interrupted:
            progress.seconds = earlier + time.perf_counter() - start
            save()
            raise
        check_health(model, validated["loss"], epoch)
        begin()
        keep_matrix(validated, folder)
        seconds = earlier + time.perf_counter() - start
        records.append({"epoch": epoch, "lr": lr, "seconds": seconds, "train": trained, "val": validated})
        utils.write_records(folder, records)
        is_best = validated["top1"] > best
        best = max(best, validated["top1"])
        epoch, progress = epoch + 1, Progress()
        save(is_best)
        dashboard.update(records)
        left = seconds * (epochs.stop - epoch)
        print(
            f"epoch {epoch - 1}/{recipe.epochs}  lr {lr:g}  train: {brief(trained)}  val: {brief(validated)}"
            f"{'  (best)' if is_best else ''}  {seconds:.0f} s, {left / 60:.0f} min left",
            flush=True,
        )
        if epoch < epochs.stop:
            stop()
    return best


def checkpoint_of(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    progress: Progress,
    best: float,
    args: dict[str, Any],
) -> dict[str, Any]:
    """What a checkpoint holds: enough to go on in `epoch` after `progress`. Only tensors, dicts, lists and numbers."""
    state = {"epoch": epoch, "state_dict": model.state_dict(), "best_prec1": best, "optimizer": optimizer.state_dict()}
    return {**state, **vars(progress), "args": args}
