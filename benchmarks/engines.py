"""Skipping against the dense net in every engine that a user would take for it, on the CPU.

    python -m benchmarks.engines
    python -m benchmarks.engines --net AIG-110 --batch 16 --engine onnxruntime pytorch    # a part of it

The nets and settings are those of `benchmarks.latency`. Random patterns of open gates are forced by the gates' weights,
so that exported files decide the same; batches repeat 16 images. Each engine has processes of its own. They take turns,
because spinning threads disturb each other. Prints tables in Markdown, where skipping loses, and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import aig
from aig.console import InputError, number, run_command
from aig.inference import count_macs
from aig.runtime import available_cores, openvino_core, require
from benchmarks.latency import NETS, build, draw_pattern
from benchmarks.timing import where
from convnet_aig import AdaptiveResNet

DENSE = "dense"  # the setting without gates
IMAGES = 16  # as many as a gate has hidden units to tell them apart
LEFT_OUT = "0.5"  # a setting of `benchmarks.latency`
FORMS = {1: "streams", "any": "any batch"}  # of an exported file in aig.Session
Calls = dict[tuple[str, str], Callable[[], tuple]]  # by contender and setting; they return logits and gates


# ---------------------------------------------------------------------------------------------- networks


@torch.no_grad()
def force(model: AdaptiveResNet, images: Tensor, is_open: Tensor) -> Tensor:
    """Gives the gates weights by which they decide so, (gates, N), for these N <= 16 images; returns z (N, L).

    Of the hidden units each is 1 for one image and 0 for the others, and the output is 1 or -1.
    """
    x, rows, z = model.stem(images), iter(is_open), []
    for block in model.blocks():
        if block.gated:
            known = torch.nn.functional.pad(x.mean((2, 3)), (0, 1), value=1).double()  # (N, C + 1)
            *weight, bias = torch.linalg.pinv(known)  # (C + 1, N): known @ this = 1
            block.fc1.weight.zero_()[: len(x), :, 0, 0] = torch.stack(weight, dim=1)
            block.fc1.bias.zero_()[: len(x)] = bias
            block.fc2.weight.zero_()[1, : len(x), 0, 0] = 2.0 * next(rows)
            block.fc2.bias.copy_(torch.tensor([0.0, -1.0]))
        x, decided = block(x, "argmax")
        z.append(decided)
    return torch.stack(z, dim=1)


def write_networks(net: str, folder: Path, export: bool) -> dict[str, Tensor]:
    """Writes the images and, for each setting, the network, its files and z. Returns the share of the MACs, (16,)."""
    size, _, settings = NETS[net]
    tiles = torch.randn(IMAGES, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images = tiles.repeat(1, 1, size // 4, size // 4)  # unlike noise, each has means of its own
    np.save(folder / "images.npy", images.numpy())
    ones, shares = [1] * len(next(iter(settings.values()))), {}
    for name, rates in {DENSE: ones, **settings}.items():
        if name == LEFT_OUT:
            continue
        # AIG-50 has no gates at rate 1, as in the paper; AIG-110 has all
        model = build(net, rates if net == "AIG-50" or name == DENSE else None)
        gated = [rate for rate, block in zip(rates, model.blocks(), strict=True) if block.gated]
        z = force(model, images, draw_pattern(gated, IMAGES))
        np.save(folder / f"{name}.npy", z.numpy())
        torch.save(model, folder / f"{name}.pt")
        for batch in FORMS if export else ():
            aig.export_onnx(model, folder / f"{name}-{batch}.onnx", batch, size)
        cost = count_macs(model, size)
        shares[name] = cost.executed(z) / cost.dense
    return shares


# ---------------------------------------------------------------------------------------------- engines


@dataclass(frozen=True)
class Job:
    """What the process of an engine is to do with what `write_networks` wrote."""

    engine: str
    folder: Path
    settings: tuple[str, ...]  # DENSE is the first
    batch: int
    threads: int

    def network(self, setting: str) -> AdaptiveResNet:
        return torch.load(self.folder / f"{setting}.pt", weights_only=False)


def pytorch(job: Job, x: np.ndarray) -> Calls:
    images = torch.from_numpy(x)
    eager = job.network(DENSE).to(memory_format=torch.channels_last)
    last = images.contiguous(memory_format=torch.channels_last)
    calls: Calls = {("PyTorch", DENSE): lambda: eager(last)}
    for setting in job.settings:
        fast = aig.accelerate(job.network(setting))
        calls["PyTorch, aig.accelerate", setting] = lambda fast=fast: fast(images)
    return calls


def compiled(job: Job, x: np.ndarray) -> Calls:
    import torch._inductor.config as inductor

    inductor.freezing = True
    network = torch.compile(job.network(DENSE), dynamic=False)
    images = torch.from_numpy(x).contiguous(memory_format=torch.channels_last)
    return {("torch.compile, frozen", DENSE): lambda: network(images)}


def onnxruntime(job: Job, x: np.ndarray) -> Calls:
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    # after a run; else the next contender is slow. It costs nothing
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.intra_op_num_threads = job.threads
    options.add_free_dimension_override_by_name("N", job.batch)
    session = runtime.InferenceSession(job.folder / f"{DENSE}-any.onnx", options, providers=["CPUExecutionProvider"])
    dense = {("ONNX Runtime", DENSE): lambda: session.run(["logits", "gates"], {"images": x})}
    return dense | sessions(job, x, "ONNX Runtime")


def openvino(job: Job, x: np.ndarray) -> Calls:
    model = openvino_core().read_model(job.folder / f"{DENSE}-any.onnx")
    model.reshape(x.shape)
    hints = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": job.threads}
    request = openvino_core().compile_model(model, "CPU", hints).create_infer_request()

    def run() -> tuple[np.ndarray, np.ndarray]:
        found = request.infer([x])
        return found["logits"], found["gates"]

    return {("OpenVINO", DENSE): run} | sessions(job, x, "OpenVINO")


def sessions(job: Job, x: np.ndarray, title: str) -> Calls:
    """The files in aig.Session, in both forms for a batch."""
    calls: Calls = {}
    for form, way in FORMS.items() if job.batch > 1 else [(1, "aig.Session")]:
        for setting in job.settings:
            session = aig.Session(job.folder / f"{setting}-{form}.onnx", job.engine, job.threads)
            calls[f"{title}, {way}", setting] = lambda session=session: session(x)
    return calls


ENGINES = {"pytorch": pytorch, "compile": compiled, "onnxruntime": onnxruntime, "openvino": openvino}


def serve(pipe: Connection, job: Job) -> None:
    """A process of an engine: says which contenders it has, then is told (contender, calls) and answers seconds."""
    torch.set_num_threads(job.threads)
    x = np.load(job.folder / "images.npy")
    which = np.arange(job.batch) % len(x)
    with torch.no_grad():
        calls = ENGINES[job.engine](job, x[which])
        for (title, setting), call in calls.items():
            _, gates = call()
            decided = np.stack(gates, axis=1) if isinstance(gates, list) else gates
            if not np.array_equal(decided, np.load(job.folder / f"{setting}.npy")[which]):
                raise RuntimeError(f"{title}, {setting}: gates decide otherwise")
        pipe.send(list(calls))
        with suppress(EOFError):  # the end
            while True:
                key, count = pipe.recv()
                times = [time.perf_counter()]
                for _ in range(count):
                    calls[key]()
                    times.append(time.perf_counter())
                pipe.send(np.diff(times))


# ---------------------------------------------------------------------------------------------- the table


def take_turns(jobs: list[Job], rounds: int, slot: float, title: str) -> dict[tuple[str, str], list[np.ndarray]]:
    """Seconds of each call, by round, of each contender."""
    context, owner = multiprocessing.get_context("spawn"), {}
    pipes = [context.Pipe() for _ in jobs]
    processes = [context.Process(target=serve, args=(there, job)) for (_, there), job in zip(pipes, jobs, strict=True)]
    for process, (_, there) in zip(processes, pipes, strict=True):
        process.start()
        there.close()
    try:
        for pipe, _ in pipes:
            owner |= dict.fromkeys(pipe.recv(), pipe)
        seconds, count = {key: [] for key in owner}, dict.fromkeys(owner, 1)
        for turn in tqdm(range(rounds + 1), title, disable=None, leave=False):  # the first is to warm up
            for key, pipe in owner.items():
                pipe.send((key, count[key]))
                times = pipe.recv()
                if turn:
                    seconds[key].append(times)
                else:
                    count[key] = max(1, round(slot / times.mean()))
    except EOFError:
        raise InputError(f"{title}: the process of an engine has failed, as it says above") from None
    finally:
        for process, (pipe, _) in zip(processes, pipes, strict=True):
            pipe.close()
            process.join()
    return seconds


def rows_of(net: str, batch: int, seconds: dict[tuple[str, str], list[np.ndarray]], shares: dict) -> list[dict]:
    """A row for each contender; medians are of the rounds."""
    medians = {key: statistics.median(times.mean() for times in turns) for key, turns in seconds.items()}
    best_dense = min(value for (_, setting), value in medians.items() if setting == DENSE)
    return [
        {
            "net": net,
            "batch": batch,
            "engine": title,
            "setting": setting,
            "median_s": medians[title, setting],
            "best_s": min(times.mean() for times in turns),
            "p95_s": float(np.percentile(np.concatenate(turns), 95)) if batch == 1 else None,
            "mac_fraction": shares[setting][torch.arange(batch) % IMAGES].mean().item(),
            "time_fraction": medians[title, setting] / medians[title, DENSE],
            "times_best_dense": best_dense / medians[title, setting],
        }
        for (title, setting), turns in seconds.items()
    ]


def line(row: dict) -> str:
    p95 = "" if row["p95_s"] is None else f"{1000 * row['p95_s']:.1f}"
    numbers = f"{1000 * row['median_s']:.1f} | {1000 * row['best_s']:.1f} | {p95} | {row['mac_fraction']:.2f}"
    return (f"| {row['net']} | {row['batch']} | {row['setting']} | {row['engine']} | {numbers} | "
            f"{row['time_fraction']:.2f} | {row['times_best_dense']:.2f} |")


def losses(rows: list[dict]) -> list[str]:
    """Where the fastest way of skipping is slower than the fastest dense engine."""
    best: dict[tuple, dict] = {}
    for row in rows:
        key = row["net"], row["batch"], row["setting"]
        if row["setting"] != DENSE and (key not in best or row["median_s"] < best[key]["median_s"]):
            best[key] = row
    found = [(*key, row["times_best_dense"], row["engine"]) for key, row in best.items() if row["times_best_dense"] < 1]
    return [f"- {net}, batch {batch}, {name}: {ratio:.2f} ({engine})" for net, batch, name, ratio, engine in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--net", nargs="+", default=list(NETS), choices=NETS)
    parser.add_argument("--batch", nargs="+", type=number(int, 1), help="default: 1 16 128, at 224 px 1 16 32")
    parser.add_argument("--engine", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--rounds", type=number(int, 1), default=5)
    parser.add_argument("--slot", type=number(float, 0), default=0.2, help="seconds a turn should last at least")
    parser.add_argument("--threads", type=number(int, 1), default=available_cores())
    args = parser.parse_args()
    versions = [f"{name} {require(name).__version__.split('-')[0]}" for name in args.engine if name.startswith("o")]
    device = ", ".join([where(torch.device("cpu")), *versions])
    print(f"float32, {args.threads} threads, {args.rounds} rounds; {device}")
    print("MACs, time: fractions of the dense net's, in the same engine; x: times as fast as the best dense engine\n")
    print("| net | batch | open | engine | ms | best | p95 | MACs | time | x |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    rows = []
    for net in args.net:
        with TemporaryDirectory() as folder:
            shares = write_networks(net, Path(folder), export=bool(versions))
            for batch in args.batch or NETS[net][1]:
                jobs = [Job(name, Path(folder), tuple(shares), batch, args.threads) for name in args.engine]
                seconds = take_turns(jobs, args.rounds, args.slot, f"{net}, batch {batch}")
                measured = rows_of(net, batch, seconds, shares)
                print("\n".join(map(line, measured)), flush=True)
                rows += measured
    print("\n".join(["", "Skipping loses here, x < 1 (its fastest engine):", *(losses(rows) or ["nowhere"])]))
    print("\n" + json.dumps({"device": device, "threads": args.threads, "rounds": args.rounds, "rows": rows}))


if __name__ == "__main__":
    run_command(main, "engines")
