"""Evaluation: every image once, with statistics of its gates; what `--test` measures, and the table it prints.

Shapes: N images, L blocks, K classes.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from aig import inference
from aig.console import progress_bar
from aig.data import Loader
from aig.environment import derive_seed
from aig.losses import Objective, add, averages, sum_dtype, topk_correct
from convnet_aig import RUNS_EVERYTHING, AdaptiveResNet, draw_noise

FLOAT32 = nullcontext()
QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)  # of the images' computation


@torch.inference_mode()
def predictions(
    model: nn.Module,
    loader: Loader,
    seed: int,
    each_batch: Callable[[], None] = lambda: None,
    autocast: AbstractContextManager = FLOAT32,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Classifies every image once in the model's gate mode.

    Args:
        seed: of the noise, which only the gate mode "sample" draws.
        each_batch: called before each batch; it may raise to stop.
        autocast: what the network runs in; what it returns goes on in float32 at least.

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
        if model.gate_mode == "sample":  # drawn for all processes, whatever their number
            count = loader.images_in(step)
            noise = draw_noise(model.num_gates, count, images)[:, loader.world.shard(count)]
        if len(images):
            with autocast:
                logits, gates = model(images, noise=noise)
            dtype = torch.promote_types(logits.dtype, torch.float32)
            yield images, labels, logits.to(dtype), torch.stack(gates, dim=1).to(dtype)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Loader,
    objective: Objective,
    seed: int,
    *,
    cost: inference.Macs | None = None,
    each_batch: Callable[[], None] = lambda: None,
    autocast: AbstractContextManager = FLOAT32,
) -> dict[str, Any]:
    """Classifies every image once in the model's gate mode. Shapes: L blocks, K classes.

    Args:
        objective: the terms of the loss; those of the rates are taken on the rates over the whole set.
        seed, each_batch, autocast: see `predictions`.
        cost: of an image of the loader's size, to count what the images' graphs cost.

    Returns:
        loss, its terms, top-k accuracies in percent; execution_rate (branches run over all L),
        gates (L rates), classes ({name: mean rate}), executed_blocks (number of images with 0..L branches run),
        gates_by_class (K x L rates, NaN for a class without images). Rates are means of the multiplier z.
        With `cost` also what `compute` returns. It counts the open branches only, even where the others are computed
        and masked.
    """
    num_classes, num_blocks = len(loader.classes), len(objective.rates)
    device = next(model.parameters()).device
    dtype = sum_dtype(device)
    shapes = {"by_class": (num_classes, num_blocks), "class_counts": num_classes, "executed": num_blocks + 1}
    shapes |= {"gates": num_blocks, **dict.fromkeys(objective.names, ())}
    sums = {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    runs, all_labels = [torch.zeros(0, num_blocks, device=device)], [torch.zeros(0, dtype=torch.long, device=device)]
    for images, labels, logits, z in predictions(model, loader, seed, each_batch, autocast):
        run = torch.ones_like(z) if model.gate_mode in RUNS_EVERYTHING else z
        ones = torch.ones_like(labels, dtype=dtype)
        sums["by_class"].index_add_(0, labels, z.to(dtype))
        sums["class_counts"].index_add_(0, labels, ones)
        sums["executed"].index_add_(0, run.sum(1).nan_to_num().round().long(), ones)  # a broken net: counted as 0
        add(sums, gates=run.sum(0), **topk_correct(logits, labels, objective.topk))
        add(sums, **objective.of_images(logits, labels, "sum", images))
        if cost:
            runs.append(run)
            all_labels.append(labels)
    sums = loader.world.total(sums)
    gates = sums["by_class"].sum(0) / loader.num_images  # (L,)
    of_rates = objective.of_rates(gates) | objective.of_execution(sums["gates"] / loader.num_images)
    sums |= {name: loader.num_images * term for name, term in of_rates.items()}
    by_class = sums["by_class"] / sums["class_counts"][:, None]
    counted = {}
    if cost:
        costs = cost.executed(torch.cat(runs), gates=model.gate_mode != "all")  # copies the counts to the device: once
        costs, all_labels = (loader.world.gather(values) for values in (costs, torch.cat(all_labels)))
        counted = compute(costs, all_labels, loader.classes, cost)
    return {
        **averages(sums, loader.num_images),
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

    Training samples the gates, so its statistics are not those of "argmax". These are means over the batches of a
    training loader, as in `torch.optim.swa_utils.update_bn`, which cannot be used because it would sample.
    """
    norms = [module for module in model.eval().modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
    torch.manual_seed(seed)
    bar = progress_bar(loader.batches(epoch=1), "BatchNorm", len(loader), "batch")
    for step, (images, _) in enumerate(bar, start=1):
        for norm in norms:
            norm.momentum = 1 / step  # a mean over all batches; None reads their number from the device
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def measure(
    model: AdaptiveResNet, loader: Loader, objective: Objective, *, samples: int = 5, seed: int = 1, dense: bool = False
) -> dict[str, Any]:
    """What `--test` reports: `evaluate`, and in gate mode "sample" the mean over `samples` seeds.

    Args:
        dense: compute every branch and mask it, instead of running only what the gates open.

    Returns:
        As `evaluate` and `compute`, with macs_paper (the paper's convention: macs_dense x execution_rate), images,
        images_per_second, threshold, and `skipping`: whether closed branches were skipped; in mode "sample" also the
        standard deviation over the seeds (None for one seed) of top1, loss and execution_rate, as NAME_std.
    """
    network = model if dense else accelerated_for(model, loader)
    skipping = not dense and network.conditional and model.gate_mode not in RUNS_EVERYTHING
    cost = inference.count_macs(model, loader.size)
    device = next(model.parameters()).device
    with torch.inference_mode():
        network.eval()(torch.zeros(2, 3, *loader.size, device=device))  # what happens only once is not timed
    repeats = samples if model.gate_mode == "sample" else 1
    start = time.perf_counter()
    seeds = [derive_seed(seed, "test", sample) for sample in range(repeats)]
    results = [evaluate(network, loader, objective, each, cost=cost) for each in seeds]
    seconds = time.perf_counter() - start
    result = mean_of(results)
    if model.gate_mode == "sample":
        for name in ("top1", "loss", "execution_rate"):
            values = [each[name] for each in results]
            finite = all(map(math.isfinite, values))  # else statistics.stdev raises
            result[f"{name}_std"] = (statistics.stdev(values) if finite else math.nan) if repeats > 1 else None
    images = loader.num_images
    return {
        **result,
        "macs_paper": result["macs_dense"] * result["execution_rate"],
        "images": images,
        "images_per_second": repeats * images / seconds,
        "threshold": model.threshold,
        "skipping": skipping,
    }


def accelerated_for(model: AdaptiveResNet, loader: Loader) -> inference.Accelerated:
    """The accelerated network, in the form that suits the device.

    On a CPU it always skips: that mostly pays for the paper's networks (results/logs/latency.log), and a choice by the
    clock would make results round differently from run to run. On other devices a trial decides, unless results must
    repeat exactly: then every branch is computed and masked.
    """
    device = next(model.parameters()).device
    if device.type == "cpu":
        return inference.accelerate(model.eval())
    if torch.are_deterministic_algorithms_enabled():
        network = inference.accelerate(model.eval())
        network.conditional = False
        return network
    images = torch.randn(min(loader.batch_size, loader.num_images), 3, *loader.size, device=device)
    network = inference.accelerate(model.eval(), images)
    network.conditional = bool(*loader.world.all_max(network.conditional))  # all processes in the same way
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


# ---------------------------------------------------------------------------------------------- the table


def describe(
    result: dict[str, Any], mode: str, target_rates: Sequence[float] | None, budget: float | None = None
) -> str:
    """The table that --test prints. A network trained to a budget has no target rates."""
    spread = {
        name: f" ± {value:.{2 if is_accuracy(name) else 4}f}"
        for name in result
        if (value := result.get(f"{name}_std")) is not None
    }
    terms = [f"{value:.4f} {name.removeprefix('loss_')}" for name, value in result.items() if is_term(name)
             and (target_rates or name != "loss_target")]
    how = ", closed branches skipped" if result["skipping"] else ", closed branches computed and masked"
    how = ", which runs every branch" if mode in RUNS_EVERYTHING else how
    many = isinstance(result["threshold"], list)
    threshold = "a threshold for each gate" if many else f"threshold {result['threshold']:g}"
    threshold = f" at {threshold}" if mode == "argmax" else ""
    target = f"  (target {sum(target_rates) / len(target_rates):.4f})" if target_rates else ""
    targets = [f" ({rate:.2f})" for rate in target_rates] if target_rates else [""] * len(result["gates"])
    lines = [
        f"gate mode {mode}{threshold}{how}: {result['images']:,} images, {result['images_per_second']:.0f} images/s",
        *(f"  {name:<15}{value:9.2f} %{spread.get(name, '')}" for name, value in result.items() if is_accuracy(name)),
        f"  loss           {result['loss']:9.4f}{spread.get('loss', '')}"
        f"  ({' + '.join(terms)})",
        f"  execution rate {result['execution_rate']:9.4f}{spread.get('execution_rate', '')}{target}",
        *describe_compute(result, budget, masked=not result["skipping"] and mode not in RUNS_EVERYTHING),
        "",
        f"  open gates by block{' (target rate in brackets)' if target_rates else ''}",
    ]
    cells = [
        f"{block:3} {rate:.2f}{of_block}"
        for block, (rate, of_block) in enumerate(zip(result["gates"], targets, strict=True), start=1)
    ]
    lines += ["   " + "  ".join(cells[i : i + 6]) for i in range(0, len(cells), 6)]
    rates = {name: rate for name, rate in result["classes"].items() if math.isfinite(rate)}
    ranked = sorted(rates, key=rates.get)
    shown = ranked if len(ranked) <= 20 else [*ranked[:10], *ranked[-10:]]
    lines += ["", f"  open gates by class, fewest first ({len(shown)} of {len(ranked)})"]
    width = max(map(len, shown), default=0)  # none where no rate is finite
    lines += [f"   {name:<{width}} {rates[name]:.3f} {'#' * round(40 * rates[name])}" for name in shown]
    return "\n".join(lines)


def describe_compute(result: dict[str, Any], budget: float | None, masked: bool) -> list[str]:
    """The lines of the table about computation: true counts, and the paper's convention."""
    what = "if closed branches were skipped" if masked else "stem, shortcuts, head and gates included"
    quantile = {name: f"{value / 1e6:.2f}" for name, value in result["macs_quantiles"].items()}
    return [
        f"  MMACs an image {result['macs_mean'] / 1e6:9.2f}  ({result['macs_fraction']:.4f} of the dense net's "
        f"{result['macs_dense'] / 1e6:.2f}{f', budget {budget:g}' if budget else ''}; {what})",
        f"    5 % of the images below {quantile['0.05']}, 50 % below {quantile['0.5']}, 95 % below {quantile['0.95']}; "
        f"least {quantile['0']}, most {quantile['1']}",
        f"    in the paper's convention {result['macs_paper'] / 1e6:.2f}: the dense net's x execution rate "
        "(its FLOPs on CIFAR are twice that)",
    ]


def is_accuracy(name: str) -> bool:
    return name.startswith("top") and not name.endswith("_std")


def is_term(name: str) -> bool:
    return name.startswith("loss_") and not name.endswith("_std")
