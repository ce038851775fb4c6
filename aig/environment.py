"""The machine a run is on: seeds, devices, memory, determinism, versions."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aig import distributed
from aig.console import InputError, say

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def derive_seed(*key: int | str) -> int:
    """A 64-bit seed that is a function of the key, such as (seed, "noise", epoch, step), and of nothing else."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big")


def keep_memory() -> bool:
    """Has glibc keep freed memory for the next tensors, instead of returning it to the system with every training step.

    Returned pages come back one page fault at a time, which can take a third of the time of a step on a CPU
    (results/logs/memory.log). Returns whether this C library has the setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    # First where large blocks come from (up to 32 MiB in older versions), then what becomes of them: the second
    # setting alone would stop glibc from adapting the first by itself.
    largest = 2**31 - 1
    mapped = any(mallopt(M_MMAP_THRESHOLD, size) for size in (largest, 2**25))
    return mapped and bool(mallopt(M_TRIM_THRESHOLD, largest))


def select_device(name: str) -> torch.device:
    """The device called auto, cpu, cuda or mps. Raises InputError if this machine does not have it."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, present in available.items() if present)
    if not available[name]:
        raise InputError(f"--device {name}: this machine or this build of torch has none; use --device auto or cpu")
    if distributed.world().size == 1 or name == "cpu":
        return torch.device(name)
    if name != "cuda":
        raise InputError(f"--device {name}: several processes need CUDA or --device cpu")
    gpu, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if gpu >= gpus:
        raise InputError(f"this machine has {gpus} GPUs: use torchrun --nproc-per-node {gpus}")
    torch.cuda.set_device(gpu)
    return torch.device(name, gpu)


def device_name(device: torch.device) -> str:
    """What computes: the GPU's name, or the processor's and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    processor, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.exists():  # on Linux, where platform knows no more than the architecture
        models = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = models[0] if models else processor
    return f"{device.type} ({processor}, {torch.get_num_threads()} threads)"


def git_commit() -> str | None:
    """The commit of this checkout, with "-dirty" after local changes; None outside of git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@contextmanager
def without_empty_folders(folder: Path) -> Iterator[None]:
    """At the end, removes `folder` and those of its parents that the block has made and left empty."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        for path in missing:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def make_deterministic() -> None:
    """Has torch raise an error where it knows only algorithms that differ from run to run, as some do on GPUs."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory


def try_compiler(device: torch.device) -> None:
    """Raises InputError if torch.compile does not work on this machine."""
    say("compiling: the first step can take minutes")
    try:
        torch.compile(torch.neg)(torch.zeros(1, device=device))
    except Exception as error:  # it can fail in many ways, which have no common class
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"--compile does not work here: {reason}; on a CPU it needs a C++ compiler") from error


def environment(model: nn.Module) -> dict[str, Any]:
    """Versions, commit and hardware, for args.json."""
    return {
        "git_commit": git_commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": importlib.metadata.version("torchvision"),  # importing it would take a second
        },
        "hardware": device_name(next(model.parameters()).device),
        "processes": distributed.world().size,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
