"""The target-rate loss, a training epoch, evaluation with gate statistics, and `fit`, which strings them together.

Both scripts train and evaluate through this module. Functions that compute return plain dicts; only `fit` writes.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import inference
import utils
from convnet_aig import RUNS_EVERYTHING, AdaptiveResNet, draw_noise
from processes import ALONE, World
from utils import Interrupted, TrainingError, derive_seed, progress_bar, topk_correct

QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)  # of the images' computation
LEAST_SCALE = 1e-3  # of a loss in float16, reached only if every step is left out
STUCK, OFF_TARGET = 0.001, 0.1  # a gate has collapsed if it decides otherwise so seldom, so far from its target
MATRIX_CLASSES = 100  # above so many classes the classes x blocks matrix is kept outside of the records


class Loader(Protocol):
    """What `data` offers: `num_images` images of `classes`, in `len` batches; `dropped` images are left out.

    `labels` are those of all images, before shuffling; `size` is the height and width of an image. `batches` yields
    this process's share of each batch of the `world`.
    """

    classes: list[str]
    labels: Tensor
    num_images: int
    dropped: int
    size: tuple[int, int]
    batch_size: int
    world: World

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
        target_warmup: epochs over which the target rates go linearly from 1 to t_l.
        temperature, temperature_end: of the gates' Gumbel-softmax in the first and the last epoch, geometric between.
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
    target_warmup: int = 0
    temperature: float = 1
    temperature_end: float | None = None
    accumulate: int = 1
    print_freq: int = 25
    log_interval: int = 20
    topk: Sequence[int] = (1,)

    def evaluation(self) -> dict[str, Any]:
        """The keyword arguments of `evaluate` that a recipe decides."""
        return {"target_rates": self.target_rates, "lossfact": self.lossfact, "topk": self.topk}


def target_rate_loss(rates: Tensor, target_rates: Tensor) -> Tensor:
    """The paper's target-rate loss, mean_l (t[l] - r[l])^2, for t (L,) and r[l] = mean_n z[n, l] over a batch, (L,)."""
    return (target_rates - rates).square().mean()


def lr_factor(recipe: Recipe, epoch: int, progress: float = 0) -> float:
    """0.1^(number of milestones <= epoch), times (epoch - 1 + progress) / warmup while that is below 1.

    `progress` is the part of the epoch done, in (0, 1].
    """
    factor = 0.1 ** sum(milestone <= epoch for milestone in recipe.milestones)
    return factor * min(1, (epoch - 1 + progress) / recipe.warmup) if recipe.warmup else factor


def temperature(recipe: Recipe, epoch: int) -> float:
    """T (T' / T)^((epoch - 1) / (epochs - 1)) for T in the first and T' in the last epoch."""
    first = recipe.temperature
    last = first if recipe.temperature_end is None else recipe.temperature_end
    return first * (last / first) ** ((epoch - 1) / max(1, recipe.epochs - 1))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


# ---------------------------------------------------------------------------------------------- training


class Trainer:
    """A network with what trains it: optimizer, precision, compiler and the other processes.

    Args:
        model: on its device; the one to evaluate and to save.
        optimizer: of its parameters.
        recipe: how to train.
        amp: what autocast computes convolutions in, torch.bfloat16 or torch.float16; None leaves all in float32.
            Gates, losses and weights stay in float32.
        compile: run full batches through torch.compile.
        channels_last: the memory format of images, which should be that of the model.
        world: the processes that share each batch.

    Attributes:
        network: the model, in DistributedDataParallel where there are several processes.
        compiled: the same, compiled if it shall be.
        scaler: of the loss, to keep float16 gradients from vanishing; does nothing with other types.
        compile_seconds: what the first compiled step took.
        rates: the target rates of the steps to come, (L,).
        temperature: of the Gumbel-softmax in the steps to come.
    """

    def __init__(
        self,
        model: AdaptiveResNet,
        optimizer: torch.optim.Optimizer,
        recipe: Recipe,
        *,
        amp: torch.dtype | None = None,
        compile: bool = False,
        channels_last: bool = True,
        world: World = ALONE,
    ) -> None:
        device = next(model.parameters()).device
        self.model, self.optimizer, self.recipe, self.world, self.amp = model, optimizer, recipe, world, amp
        self.network: nn.Module = model
        if world.size > 1:  # BatchNorm's statistics are averaged by `settle`, when someone is to use them
            devices = None if device.type == "cpu" else [device]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # the new name of broadcast_buffers is too new to use
                self.network = DistributedDataParallel(
                    model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
                )
        # one graph for one shape: the smaller batch at the end of an epoch is not worth another
        self.compiled = torch.compile(self.network, dynamic=False) if compile else self.network
        self.compile_seconds: float | None = None
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.rates = self.final_rates = torch.tensor(recipe.target_rates, dtype=torch.float32, device=device)
        self.temperature = recipe.temperature

    def schedule(self, epoch: int, progress: float) -> None:
        """Sets what changes from step to step, for one that ends when the part `progress` of an epoch is done."""
        recipe = self.recipe
        if recipe.warmup:
            set_lr(self.optimizer, recipe.lr * lr_factor(recipe, epoch, progress))
        if recipe.target_warmup:
            part = min(1, (epoch - 1 + progress) / recipe.target_warmup)
            self.rates = 1 - part * (1 - self.final_rates)
        self.temperature = temperature(recipe, epoch)

    def step(self, images: Tensor, labels: Tensor, batch_size: int, full: bool = False) -> dict[str, Tensor]:
        """One update. The batch is computed in `recipe.accumulate` parts, each holding the rates on its own.

        Args:
            images, labels: this process's share of the batch, (n, 3, H, W) and (n,).
            batch_size: N, images of the batch in all processes.
            full: whether this is a batch of the usual size, for which it pays to compile.

        Returns:
            Sums over the images of all processes, on the device: the two losses, top-k hits, `gates` (L,), and
            `broken`, 1 if the loss or the gradient is not finite, else 0. (A float16 gradient may overflow: then the
            scaler leaves this update out.)
        """
        self.optimizer.zero_grad(set_to_none=True)
        network = self.compiled if full else self.network
        images = images.contiguous(memory_format=self.memory_format)
        # that of all processes, so that it does not depend on their number
        noise = draw_noise(self.model.num_gates, batch_size, images)[:, self.world.share(batch_size)]
        parts = min(self.recipe.accumulate, max(1, batch_size // (2 * self.world.size)))  # BatchNorm needs two images
        sums: dict[str, Tensor] = {}
        split = (images.tensor_split(parts), labels.tensor_split(parts), noise.tensor_split(parts, dim=1))
        for number, part in enumerate(zip(*split, strict=True), start=1):
            reduce = self.world.size == 1 or number == parts  # else gradients wait for those of the parts to come
            with nullcontext() if reduce else self.network.no_sync():
                loss, part_sums = self.losses(network, *part, batch_size)
                self.scaler.scale(loss).backward()
            add(sums, **part_sums)
        broken = ~(sums["loss_classify"] + sums["loss_target"]).isfinite()
        if not self.scaler.is_enabled():
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            broken = broken | ~nn.utils.get_total_norm(gradients).isfinite()
        add(sums, broken=broken)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return sums

    def losses(
        self, network: nn.Module, x: Tensor, y: Tensor, noise: Tensor, batch_size: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one part of a batch in this process, and sums over this part in all processes, see `step`.

        With n of the part's N' images here and N in the whole batch, the loss is n W / N cross entropy + N' / N target
        rate: the mean of its gradients over the W processes, which DistributedDataParallel takes, is the whole one's.
        """
        size = self.world.size
        with torch.autocast(x.device.type, self.amp, enabled=self.amp is not None):
            logits, gates = network(x, temperature=self.temperature, noise=noise)
        logits, z = logits.to(x.dtype), torch.stack(gates, dim=1).to(x.dtype)  # (n, K), (n, L)
        opened = z.sum(0)
        loss_classify = F.cross_entropy(logits, y)
        hits = topk_correct(logits.detach(), y, self.recipe.topk)
        sums: dict[str, Tensor] = {}
        add(sums, images=torch.full((), len(x), device=x.device), gates=opened.detach())
        add(sums, loss_classify=loss_classify.detach() * len(x))
        add(sums, **{f"top{k}": hit for k, hit in zip(self.recipe.topk, hits, strict=True)})
        sums = self.world.total(sums)
        images = sums.pop("images").to(z.dtype)
        # every process has this loss, so the sum of its gradients over them is W times that of one
        rates = (sums["gates"].to(z.dtype) + size * (opened - opened.detach())) / images
        loss_target = self.recipe.lossfact * target_rate_loss(rates, self.rates)
        add(sums, loss_target=loss_target.detach() * images)
        return loss_classify * (len(x) * size / batch_size) + loss_target * (images / batch_size), sums

    def settle(self) -> None:
        """Gives every process the mean of all processes' BatchNorm statistics."""
        if self.world.size > 1:
            statistics = {name: value for name, value in self.model.named_buffers() if value.is_floating_point()}
            for name, total in self.world.total(statistics).items():
                statistics[name].copy_(total / self.world.size)


def add(sums: dict[str, Tensor], **values: Tensor) -> None:
    """Adds tensors to running sums, in place where there is one already: no read from the device."""
    for name, value in values.items():
        sums[name] = sums[name].add_(value) if name in sums else value.to(sum_dtype(value.device), copy=True)


def sum_dtype(device: torch.device) -> torch.dtype:
    """Sums run in float64 but on MPS, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def batch_count(loader: Loader, step: int) -> int:
    """Images in batch `step`, counted from 1, of all processes."""
    return min(loader.batch_size, loader.num_images - (step - 1) * loader.batch_size)


@dataclass
class Progress:
    """How far an epoch has come.

    Attributes:
        step: steps done.
        seen: images in them.
        sums: over these images, see `Trainer.step`.
        seconds: spent on them by earlier processes.
    """

    step: int = 0
    seen: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0


def train_epoch(
    trainer: Trainer,
    loader: Loader,
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
        TrainingError: if a loss or gradient was not finite, naming the first such step.
    """
    recipe, device = trainer.recipe, trainer.rates.device
    trainer.network.train()
    progress.sums = {name: value.to(device) for name, value in progress.sums.items()}
    first_bad = torch.full((), -1, device=device)  # stays on the device until something is printed anyway
    steps = len(loader)
    with progress_bar(None, f"epoch {epoch}/{recipe.epochs}", steps, "step", initial=progress.step) as bar:
        interval = recipe.print_freq if bar.disable else recipe.log_interval
        (interval,) = trainer.world.agree(interval if trainer.world.leads else 0)  # only the first knows its terminal
        for step, (images, labels) in enumerate(loader.batches(epoch, progress.step), start=progress.step + 1):
            trainer.schedule(epoch, step / steps)
            torch.manual_seed(derive_seed(recipe.seed, "noise", epoch, step))
            count, start = batch_count(loader, step), time.perf_counter()
            full = count == loader.batch_size
            stepped = trainer.step(images, labels, count, full)
            if full and trainer.compiled is not trainer.network and trainer.compile_seconds is None:
                trainer.compile_seconds = time.perf_counter() - start
                print(f"compiled: the first step took {trainer.compile_seconds:.0f} s", flush=True)
            broken = stepped.pop("broken") > 0
            add(progress.sums, **stepped)
            progress.step, progress.seen = step, progress.seen + count
            first_bad = first_bad.masked_fill(broken & (first_bad < 0), step)
            bar.update()
            if step % interval == 0:
                check_finite(trainer, first_bad, epoch)
                line = brief(averages(progress.sums, progress.seen, recipe.topk))
                if bar.disable:
                    print(f"epoch {epoch}/{recipe.epochs} step {step}/{steps}  {line}", flush=True)
                else:
                    bar.set_postfix_str(line)
            after_step(lambda bad=first_bad: check_finite(trainer, bad, epoch))
    check_finite(trainer, first_bad, epoch)
    return averages(progress.sums, progress.seen, recipe.topk)


def check_finite(trainer: Trainer, first_bad: Tensor, epoch: int) -> None:
    """Raises TrainingError if a step of the epoch had a non-finite loss or gradient. Reads from the device."""
    step = int(first_bad)
    if trainer.scaler.is_enabled() and trainer.scaler.get_scale() < LEAST_SCALE:
        raise TrainingError(f"no float16 gradient of epoch {epoch} is finite, however scaled: try --amp bf16 or off")
    if step >= 0:
        raise TrainingError(f"loss or gradient not finite since epoch {epoch}, step {step}: try a smaller --lr")


def check_health(model: nn.Module, loss: float, epoch: int) -> None:
    """Raises TrainingError if the validation loss or a parameter or buffer is not finite. Reads from the device."""
    finite = torch.stack([value.isfinite().all() for value in model.state_dict().values()]).all()
    if not (math.isfinite(loss) and finite):
        raise TrainingError(f"the network is not finite after epoch {epoch}: try a smaller --lr")


def collapsed(rates: Sequence[float], target_rates: Sequence[float]) -> str | None:
    """A warning if gates hardly ever decided otherwise in an epoch, though their targets lie elsewhere.

    Args:
        rates, target_rates: of each of the L blocks.
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
        "should it stay so, try a larger --lossfact or a smaller --lr"
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
def predictions(
    model: nn.Module, loader: Loader, seed: int, each_batch: Callable[[], None] = lambda: None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Classifies every image once in the model's gate mode.

    Args:
        seed: of the noise, which only the gate mode "sample" draws.
        each_batch: called before each batch; it may raise to stop.

    Yields:
        images (n, 3, H, W), labels (n,), logits (n, K) and multipliers z (n, L): this process's share of a batch, if
        that is not empty.
    """
    model.eval()
    torch.manual_seed(seed)
    bar = progress_bar(loader.batches(), "evaluating", len(loader), "batch")
    for step, (images, labels) in enumerate(bar, start=1):
        each_batch()
        noise = None
        if model.gate_mode == "sample":  # that of all processes, so that it does not depend on their number
            count = batch_count(loader, step)
            noise = draw_noise(model.num_gates, count, images)[:, loader.world.share(count)]
        if len(images):
            logits, gates = model(images, noise=noise)
            yield images, labels, logits, torch.stack(gates, dim=1)


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
        seed, each_batch: see `predictions`.
        cost: of an image of the loader's size, to count what the images' graphs cost.

    Returns:
        loss, loss_classify, loss_target, top-k accuracies in percent; execution_rate (branches run over all L),
        gates (L rates), classes ({name: mean rate}), executed_blocks (number of images with 0..L branches run),
        gates_by_class (K x L rates, NaN for a class without images). Rates are means of the multiplier z.
        With `cost` also what `compute` returns: for masked execution, too, the count of the open branches.
    """
    num_classes, num_blocks = len(loader.classes), len(target_rates)
    device = next(model.parameters()).device
    dtype = sum_dtype(device)
    shapes = {"by_class": (num_classes, num_blocks), "class_counts": num_classes, "executed": num_blocks + 1}
    shapes |= {"gates": num_blocks, "loss_classify": (), **{f"top{k}": () for k in topk}}
    sums = {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    costs, all_labels = [torch.zeros(0, dtype=dtype, device=device)], [torch.zeros(0, dtype=torch.long, device=device)]
    for _, labels, logits, z in predictions(model, loader, seed, each_batch):
        run = torch.ones_like(z) if model.gate_mode in RUNS_EVERYTHING else z
        ones = torch.ones_like(labels, dtype=dtype)
        sums["by_class"].index_add_(0, labels, z.to(dtype))
        sums["class_counts"].index_add_(0, labels, ones)
        sums["executed"].index_add_(0, run.sum(1).round().long(), ones)
        hits = topk_correct(logits, labels, topk)
        add(sums, loss_classify=F.cross_entropy(logits, labels, reduction="sum"))
        add(sums, gates=run.sum(0), **{f"top{k}": hit for k, hit in zip(topk, hits, strict=True)})
        if cost:
            costs.append(cost.executed(run, gates=model.gate_mode != "all"))
            all_labels.append(labels)
    sums = loader.world.total(sums)
    gates = sums["by_class"].sum(0) / loader.num_images  # (L,)
    rates = torch.tensor(target_rates, dtype=dtype, device=device)
    sums["loss_target"] = loader.num_images * lossfact * target_rate_loss(gates, rates)
    by_class = sums["by_class"] / sums["class_counts"][:, None]
    counted = {}
    if cost:
        all_costs, all_labels = (loader.world.gather(torch.cat(parts)) for parts in (costs, all_labels))
        counted = compute(all_costs, all_labels, loader.classes, cost)
    return {
        **averages(sums, loader.num_images, topk),
        "gates": gates.tolist(),
        "classes": dict(zip(loader.classes, by_class.mean(1).tolist(), strict=True)),
        "executed_blocks": sums["executed"].long().tolist(),
        "gates_by_class": by_class.tolist(),
        **counted,
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


@torch.no_grad()
def reestimate_batchnorm(model: AdaptiveResNet, loader: Loader, seed: int) -> None:
    """Replaces the running statistics of every BatchNorm by those of one epoch in the model's gate mode.

    Training sees sampled gates, so its statistics are not those of "argmax". Means over the batches of a training
    loader, as `torch.optim.swa_utils.update_bn` takes them, which would sample, too.
    """
    norms = [module for module in model.eval().modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a mean over all batches
        norm.train()
    torch.manual_seed(seed)
    for images, _ in progress_bar(loader.batches(epoch=1), "BatchNorm", len(loader), "batch"):
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


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
    if next(model.parameters()).device.type == "cpu":
        return inference.accelerate(model.eval())
    network = inference.accelerate(model, next(iter(loader.batches()))[0])
    network.conditional = bool(*loader.world.agree(network.conditional))  # all processes in the same way
    return network


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
    trainer: Trainer,
    train: Loader,
    val: Loader,
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
        TrainingError: if the training cannot go on.
    """
    recipe, world, begin = trainer.recipe, trainer.world, functools.cache(begin)  # once
    saved = time.monotonic()

    def save(is_best: bool = False) -> None:
        nonlocal saved
        trainer.settle()
        if world.leads:
            begin()
            utils.save_checkpoint(checkpoint_of(trainer, epoch, progress, best, is_best, args), folder)
        saved = time.monotonic()

    def stop(number: int | None = None) -> None:
        """Raises Interrupted for the signal of this number; asks the processes if there was one where it is None."""
        if number is None:
            (number,) = world.agree(signals.received)
        if number:
            where = f"epoch {epoch}, {progress.step} of {len(train)} steps"
            raise Interrupted(number, f"stopped in {where}; continue with --resume {folder / utils.CHECKPOINT}")

    def after_step(check: Callable[[], None]) -> None:
        number, due = world.agree(signals.received, time.monotonic() - saved > save_every)
        if number or due:
            check()
            progress.seconds = earlier + time.perf_counter() - start
            save()
            stop(number)

    for epoch in epochs:
        start, earlier = time.perf_counter(), progress.seconds
        lr = recipe.lr * lr_factor(recipe, epoch, 1)
        set_lr(trainer.optimizer, lr)
        trained = train_epoch(trainer, train, epoch, progress, after_step)
        trainer.settle()
        seed = derive_seed(recipe.seed, "validation", epoch)
        try:
            validated = evaluate(trainer.model, val, seed=seed, each_batch=stop, **recipe.evaluation())
        except Interrupted:
            progress.seconds = earlier + time.perf_counter() - start
            save()
            raise
        check_health(trainer.model, validated["loss"], epoch)
        seconds = earlier + time.perf_counter() - start
        if world.leads:
            begin()
            keep_matrix(validated, folder)
            records.append({"epoch": epoch, "lr": lr, "seconds": seconds, "train": trained, "val": validated})
            utils.write_records(folder, records)
        is_best = validated["top1"] > best
        best = max(best, validated["top1"])
        opened = (progress.sums["gates"] / progress.seen).tolist()
        epoch, progress = epoch + 1, Progress()
        save(is_best)
        dashboard.update(records)
        left = seconds * (epochs.stop - epoch)
        print(
            f"epoch {epoch - 1}/{recipe.epochs}  lr {lr:g}  train: {brief(trained)}  val: {brief(validated)}"
            f"{'  (best)' if is_best else ''}  {seconds:.0f} s, {left / 60:.0f} min left",
            flush=True,
        )
        if warning := collapsed(opened, recipe.target_rates):
            print(warning, flush=True)
        if epoch < epochs.stop:
            stop()
    return best


def checkpoint_of(
    trainer: Trainer, epoch: int, progress: Progress, best: float, is_best: bool, args: dict[str, Any]
) -> dict[str, Any]:
    """What a checkpoint holds: enough to go on in `epoch` after `progress`. Only tensors, dicts, lists and numbers."""
    state = {"state_dict": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()}
    state |= {"scaler": trainer.scaler.state_dict()}
    return {"epoch": epoch, "best_prec1": best, "is_best": is_best, **state, **vars(progress), "args": args}
