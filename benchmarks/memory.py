"""What it costs a training step on a CPU that glibc returns freed memory to the system, and what keeping it brings.

    python -m benchmarks.memory

Each case runs in processes of its own, in turns, because the setting is the process's.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch

from aig.console import number
from aig.engine import Recipe
from aig.environment import keep_memory
from benchmarks.timing import training_step, where
from convnet_aig import ResNet50_ImageNet, ResNet110_cifar

CASES = {  # net, target rate, blocks, batch size, pixels
    "AIG-110": (ResNet110_cifar, 0.6, 54, 128, 32),
    "ResNet-110": (ResNet110_cifar, 1.0, 54, 128, 32),
    "AIG-50": (ResNet50_ImageNet, 0.5, 16, 16, 224),
}
WARM_UP = 2


def measure(case: str, keep: bool, steps: int) -> dict[str, float]:
    """Medians over the steps, in this process."""
    if keep:
        keep_memory()
    build, target, blocks, batch_size, pixels = CASES[case]
    torch.manual_seed(0)
    rates = [target] * blocks
    model = build(target_rates=rates).to(memory_format=torch.channels_last)
    recipe = Recipe(rates, lossfact=1, lr=0.01, milestones=(), epochs=1, last=1, seed=1)
    images = torch.randn(batch_size, 3, pixels, pixels)
    step, _ = training_step(model, recipe, images, torch.randint(10, (batch_size,)), batch_size)
    rows = []
    for _ in range(WARM_UP + steps):
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        step()
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
        rows.append((seconds, after.ru_stime - before.ru_stime, after.ru_minflt - before.ru_minflt))
    names = ("seconds", "system_seconds", "page_faults")
    medians = dict(zip(names, map(statistics.median, zip(*rows[WARM_UP:], strict=True)), strict=True))
    return {**medians, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=number(int, 1), default=3)
    parser.add_argument("--steps", type=number(int, 1), default=6, help="that are timed in a process")
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "KEEP"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], args.measure[1] == "True", args.steps)))
        return
    print(f"training step, float32, median of {args.steps} steps and {args.rounds} processes; "
          f"{where(torch.device('cpu'))}\n")
    print(f"{'':12}{'freed memory':>14}{'s a step':>10}{'in the system':>15}{'page faults':>13}{'peak MiB':>10}")
    command = [sys.executable, "-m", "benchmarks.memory", "--steps", str(args.steps), "--measure"]
    for case in CASES:
        found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
        for _ in range(args.rounds):
            for keep, results in found.items():
                output = subprocess.run([*command, case, str(keep)], capture_output=True, text=True, check=True).stdout
                results.append(json.loads(output))
        for keep, results in found.items():
            row = {name: statistics.median(each[name] for each in results) for name in results[0]}
            print(f"{case:12}{'kept' if keep else 'returned':>14}{row['seconds']:10.3f}{row['system_seconds']:15.3f}"
                  f"{row['page_faults']:13,.0f}{row['peak_mib']:10,.0f}", flush=True)


if __name__ == "__main__":
    main()
