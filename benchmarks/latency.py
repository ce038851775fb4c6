"""Time saved by conditional execution, beside the computation saved.

    python -m benchmarks.latency

Contenders, interleaved in one process: the accelerated network at several open rates; its own dense form (the same net
without gates, accelerated, too); the baseline `benchmarks/reference.py` with all gates open; for the ImageNet net
torchvision's resnet50, as it comes and in channels-last. The decisions are forced by a fixed random pattern of the
wanted rates, the same for every contender's batch, while the gates' own arithmetic runs. Prints a table, and one JSON
line. No weights are trained here: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models import resnet50

from aig import inference
from aig.console import number, run_command
from aig.environment import select_device
from benchmarks.reference import Reference
from benchmarks.timing import interleaved, where
from convnet_aig import (
    AdaptiveResNet,
    BasicBlock,
    ResNet50_ImageNet,
    ResNet110_cifar,
    ResNet_cifar,
)
from train_img import target_rates_of

CERTAIN = 1e4  # log-odds that no gate of an untrained net outweighs
NETS = {  # image size, batch sizes, and the rates of the blocks by the name of the setting
    "AIG-110": (32, (1, 16, 128), {f"{rate:g}": [rate] * 54 for rate in (1, 0.8, 0.6, 0.5, 0.4)}),
    "AIG-50": (224, (1, 16, 32), {f"t = {t}": target_rates_of("paper", "resnet50", t) for t in (0.4, 0.7)}),
}
TINY = {"AIG-8": (8, (1,), {"0.6": [0.6] * 3})}  # to see that all of this runs


class Forced(inference.Accelerated):
    """An accelerated network whose gates are computed and then overruled by `pattern`, (gates, N) of ±CERTAIN."""

    pattern: Tensor

    def bias(self, x: Tensor, noise: Tensor | None, device: torch.device) -> Tensor:
        return self.pattern


def build(net: str, target_rates: Sequence[float] | None = None) -> AdaptiveResNet:
    torch.manual_seed(0)
    constructors = {"AIG-110": ResNet110_cifar, "AIG-50": ResNet50_ImageNet}
    constructors["AIG-8"] = partial(ResNet_cifar, BasicBlock, (1, 1, 1))
    return constructors[net](target_rates=target_rates).eval()


def draw_pattern(rates: Sequence[float], batch: int) -> Tensor:
    """Which gates of these rates are open, (gates, N): in each image as many as the rates ask for."""
    rates, random = torch.tensor(rates), torch.Generator().manual_seed(0)
    keys = torch.rand(len(rates), batch, generator=random).log() / rates[:, None]  # drawn without replacement
    chosen = keys.topk(round(rates.sum().item()), dim=0).indices
    return torch.zeros(len(rates), batch, dtype=torch.bool).scatter_(0, chosen, True)


def forced(model: AdaptiveResNet, rates: Sequence[float], batch: int, device: torch.device) -> Forced:
    """The accelerated network with decisions of the given rates."""
    fast = Forced(model.to(device))
    gated = [rate for rate, block in zip(rates, fast.blocks, strict=True) if block.gate]
    fast.pattern = torch.where(draw_pattern(gated, batch), CERTAIN, -CERTAIN).to(device)
    return fast


def measure(net: str, batch: int, rounds: int, slot: float, device: torch.device) -> list[dict]:
    """A row for each contender."""
    size, _, settings = (NETS | TINY)[net]
    x = torch.randn(batch, 3, size, size, device=device)
    x_last = x.contiguous(memory_format=torch.channels_last)
    dense = build(net, [1] * len(next(iter(settings.values())))).to(device)
    networks: dict[str, tuple[nn.Module, Tensor]] = {
        "baseline": (Reference(build(net).to(device), open_gates=True), x),
        "own dense form": (inference.accelerate(dense), x),
    }
    if net == "AIG-50":
        networks["torchvision"] = (resnet50().eval().to(device), x)
        channels_last = resnet50().eval().to(device, memory_format=torch.channels_last)
        networks["torchvision, channels-last"] = (channels_last, x_last)
    fractions = {}
    for name, rates in settings.items():
        # AIG-50 has no gates at rate 1, as in the paper; AIG-110 has all
        model = build(net, rates if net == "AIG-50" else None)
        cost = inference.count_macs(model, size)
        networks[name] = (fast := forced(model, rates, batch, device), x)
        z = torch.stack(fast(x)[1], dim=1)
        fractions[name] = (cost.executed(z).mean().item() / cost.dense, z.mean().item())

    if device.type != "cpu":  # the form that reads nothing from the device, and saves nothing
        networks["every branch, masked"] = (masked := forced(model, rates, batch, device), x)
        masked.conditional = False

    def caller(network: nn.Module, images: Tensor) -> Callable[[], object]:
        return lambda: network(images)

    with torch.inference_mode():
        contenders = {name: caller(*pair) for name, pair in networks.items()}
        seconds = interleaved(contenders, rounds, device, slot, f"{net}, batch {batch}")

    def ratio(name: str, other: str) -> float | None:
        if name not in seconds or other not in seconds:
            return None
        return statistics.median(a / b for a, b in zip(seconds[name], seconds[other], strict=True))

    return [
        {
            "net": net,
            "batch": batch,
            "contender": name,
            "open_rate": fractions[name][1] if name in fractions else None,
            "best_s": min(seconds[name]),
            "median_s": statistics.median(seconds[name]),
            "images_per_second": batch / statistics.median(seconds[name]),
            "mac_fraction": fractions[name][0] if name in fractions else None,
            "time_fraction": ratio(name, "own dense form") if name in fractions else None,
            "time_fraction_best": min(seconds[name]) / min(seconds["own dense form"]) if name in fractions else None,
            "times_baseline": ratio("baseline", name),
            "times_torchvision": ratio("torchvision", name),
            "times_torchvision_channels_last": ratio("torchvision, channels-last", name),
        }
        for name in contenders
    ]


def line(row: dict) -> str:
    """A row of the table."""

    def cell(value: float | None, format: str) -> str:
        return f"{'-' if value is None else format % value:>10}"

    return f"  {row['contender']:<28}" + "".join(
        [
            cell(row["open_rate"], "%.3f"),
            cell(1000 * row["median_s"], "%.2f"),
            cell(row["images_per_second"], "%.0f"),
            cell(row["mac_fraction"], "%.3f"),
            cell(row["time_fraction"], "%.3f"),
            cell(row["time_fraction_best"], "%.3f"),
            cell(row["times_baseline"], "%.2f"),
            cell(row["times_torchvision"], "%.2f"),
            cell(row["times_torchvision_channels_last"], "%.2f"),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--net", nargs="*", default=list(NETS), choices=NETS | TINY)
    parser.add_argument("--batch", nargs="*", type=number(int, 1), help="default: 1 16 128, at 224 px 1 16 32")
    parser.add_argument("--rounds", type=number(int, 1), default=15)
    parser.add_argument("--slot", type=number(float, 0), default=0.3, help="seconds a turn should last at least")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    args = parser.parse_args()
    device = select_device(args.device)
    print(f"conditional execution, float32, median of {args.rounds} interleaved rounds; {where(device)}")
    print("MACs, time: fractions of the own dense form's (best: of the best times); x: times as fast as the baseline,")
    print("torchvision's resnet50, and that in channels-last\n")
    rows = []
    for net in args.net:
        size, batches, _ = (NETS | TINY)[net]
        for batch in args.batch or batches:
            heads = ("open rate", "ms", "images/s", "MACs", "time", "best", "x yard.", "x tv", "x tv c.l.")
            print(f"{net}, {size} x {size}, batch {batch}".ljust(30) + "".join(f"{head:>10}" for head in heads))
            measured = measure(net, batch, args.rounds, args.slot, device)
            print("\n".join(map(line, measured)), flush=True)
            rows += measured
    print(json.dumps({"device": where(device), "rounds": args.rounds, "rows": rows}))


if __name__ == "__main__":
    run_command(main, "latency")
