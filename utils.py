"""What surrounds a run: input errors, seeds, devices, accuracy, checkpoints and the files of a run folder."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import platform
import signal
import subprocess
import threading
import time
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
import torchvision
from torch import Tensor, nn
from tqdm import tqdm

import processes

CHECKPOINT, BEST = "checkpoint.pth.tar", "model_best.pth.tar"
ARGS, METRICS, TEST, MATRIX = "args.json", "metrics.jsonl", "test.json", "gates_by_class.npy"
KINDS = {"epoch": (int,), "step": (int,), "seen": (int,), "seconds": (int, float), "is_best": (bool,), "sums": (dict,)}
RUN_FILES = (CHECKPOINT, BEST, ARGS, METRICS, TEST, MATRIX)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LOCK = ".lock"
MSDOS_FOLDER = 0x10  # an attribute in a zip file, for which torch.load would read nothing
PATIENCE = 10  # seconds to wait for a run folder; the workers of a killed process keep it for 5


class InputError(Exception):
    """Bad arguments, or missing or unfit input: one line that says what to do; exit status 2."""


class TrainingError(Exception):
    """A run that cannot go on, for a non-finite loss or a full disk: one line; exit status 1."""


class Interrupted(Exception):
    """A signal stopped the run; what it had done is saved.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(f"{signal.Signals(number).name}: {message}")
        self.number = number


class Signals:
    """Inside of a `with`, the first SIGINT, SIGTERM or SIGUSR1 is only noted, in `received`; the next acts as usual.

    Under torchrun it does not: torchrun itself sends a second one, and kills what does not end.
    """

    def __init__(self) -> None:
        self.received = 0
        self.usual: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # Python handles signals nowhere else
            handled = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
            self.usual = {number: signal.signal(number, self.note) for number in handled}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.usual.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: Any) -> None:
        self.received = number
        if processes.world().size == 1:
            self.__exit__()


# ---------------------------------------------------------------------------------------------- seeds, memory, devices


def keep_memory() -> bool:
    """Has glibc keep freed memory for the next tensors, instead of returning it to the system with every training step.

    Returned pages come back one page fault at a time, which can take a third of the time of a step on a CPU
    (results/memory.log). Returns whether this C library has the setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    # where large blocks come from, up to 32 MiB in older versions; only then what becomes of them, because that setting
    # alone would stop glibc from adapting the first by itself
    largest = 2**31 - 1
    mapped = any(mallopt(M_MMAP_THRESHOLD, size) for size in (largest, 2**25))
    return mapped and bool(mallopt(M_TRIM_THRESHOLD, largest))


def derive_seed(*key: int | str) -> int:
    """A 64-bit seed that is a function of the key, such as (seed, "noise", epoch, step), and of nothing else."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big")


def select_device(name: str) -> torch.device:
    """The device called auto, cpu, cuda or mps. Raises InputError if this machine does not have it."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, present in available.items() if present)
    if not available[name]:
        raise InputError(f"--device {name}: this machine or this build of torch has none; use --device auto or cpu")
    if processes.world().size == 1 or name == "cpu":
        return torch.device(name)
    if name != "cuda":
        raise InputError(f"--device {name}: several processes need CUDA or --device cpu")
    gpu, gpus = processes.local_rank(), torch.cuda.device_count()
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


def progress_bar(iterable: Iterable | None, description: str, total: int, unit: str, initial: int = 0) -> tqdm:
    """A bar on the terminal; silent where there is none, and in all processes but the leading one."""
    disable = None if processes.world().leads else True
    return tqdm(iterable, description, total, leave=False, disable=disable, unit=unit, initial=initial)


# ---------------------------------------------------------------------------------------------- measures


def topk_correct(logits: Tensor, labels: Tensor, ks: Iterable[int]) -> list[Tensor]:
    """For each k, the number of images whose label is among the min(k, K) highest of logits (N, K): 0-d tensors."""
    ks = list(ks)
    predicted = logits.topk(min(max(ks), logits.shape[1]), dim=1).indices  # (N, max k)
    hits = predicted == labels[:, None]
    return [hits[:, :k].sum() for k in ks]


def get_mean_and_std(dataset: Iterable[tuple[Tensor, Any]]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation over all pixels, per channel.

    Args:
        dataset: yields (image, label) or (images, labels); images (..., C, H, W), uint8 or float in [0, 1].

    Returns:
        Two lists of C floats, in units of [0, 1].
    """
    count, total, squares = 0, 0.0, 0.0
    for images, _ in dataset:
        pixels = images.double() / 255 if images.dtype == torch.uint8 else images.double()
        pixels = pixels.movedim(-3, 0).flatten(1)  # (C, pixels)
        count += pixels.shape[1]
        total = total + pixels.sum(1)
        squares = squares + pixels.square().sum(1)
    mean = total / count
    return mean.tolist(), (squares / count - mean.square()).clamp(min=0).sqrt().tolist()


# ---------------------------------------------------------------------------------------------- files


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that replaces `path` only once it is whole and on the disk.

    Raises:
        TrainingError: if it cannot be written, for lack of space for instance; `path` is then what it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise TrainingError(f"cannot write {path} ({error.strerror}); what was there before is intact") from error
    try:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that does not do it
            raise TrainingError(f"cannot be sure that {path} is on the disk ({error.strerror})") from error


def clear_temporaries(folder: Path) -> None:
    """Deletes what writes that were cut off, by SIGKILL for instance, have left in a run folder."""
    for name in RUN_FILES:
        for path in folder.glob(f".{name}.*.tmp"):
            path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from training in a run folder; the lock ends with the process, however that ends.

    Raises:
        InputError: if another process keeps it locked.
    """
    path, deadline = folder / LOCK, time.monotonic() + PATIENCE
    while (descriptor := take_lock(path)) is None:
        if time.monotonic() > deadline:
            raise InputError(f"another process is training in {folder}: wait for it, or stop it")
        time.sleep(0.1)
    try:
        yield
    finally:
        with suppress(OSError):  # a folder that is gone
            path.unlink()
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing would not do it: DataLoader workers share the descriptor
        os.close(descriptor)


def take_lock(path: Path) -> int | None:
    """A descriptor of the file, locked; None if another process has it. Raises InputError if it cannot be opened.

    A file, because network file systems pass on locks of files, and not of folders.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise InputError(f"cannot lock the run folder with {path}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.stat()):  # else the one who had it has just removed it
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as error:
        print(f"{path.parent} cannot be locked ({error.strerror}): never train in it twice at a time")
        return descriptor
    os.close(descriptor)
    return None


def strict(value: Any) -> Any:
    """The value with every non-finite float as None, which strict JSON can hold."""
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Writes the value atomically as indented strict JSON."""
    with atomic_write(path) as file:
        file.write(json.dumps(strict(value), indent=1, allow_nan=False).encode() + b"\n")


def read_json(path: Path) -> dict:
    """The object in a JSON file, {} if there is no file. Raises InputError if it holds something else."""
    try:
        value = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError):
        value = None
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged: move it away")
    return value


def read_records(folder: Path) -> list[dict]:
    """The epoch records of a run folder, [] if it has none; a torn last line (a crash) is left out.

    Raises:
        InputError: if another line is damaged.
    """
    path, records = folder / METRICS, []
    try:
        lines = path.read_text().splitlines() if path.exists() else []
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): move it away") from error
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("epoch"), int):
            raise InputError(f"{path}, line {number}, is damaged: repair it or move the file away")
        records.append(record)
    return records


def write_records(folder: Path, records: list[dict]) -> None:
    """Replaces the metrics file by these records, one strict-JSON object a line."""
    with atomic_write(folder / METRICS) as file:
        for record in records:
            file.write(json.dumps(strict(record), allow_nan=False).encode() + b"\n")


def check_vacant(folder: Path, overwrite: bool) -> None:
    """Raises InputError if `folder` already holds files of a run, unless it may be overwritten."""
    try:
        taken = any((folder / name).exists() for name in RUN_FILES)
    except OSError as error:
        raise InputError(f"cannot use {folder} as the run folder: {error.strerror}") from error
    if taken and not overwrite:
        go_on = f", go on with --resume {folder / CHECKPOINT}" if (folder / CHECKPOINT).exists() else ""
        how = f"choose another --expname{go_on}, or replace it with --overwrite"
        raise InputError(f"{folder} already holds a run: {how}")


def make_folder(folder: Path, what: str = "the run folder") -> None:
    """Makes the folder if it is missing. Raises InputError if that, or writing into it, is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make {what} {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"cannot write into {what} {folder}")


def clear_run_folder(folder: Path) -> None:
    """Deletes the files of an earlier run."""
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)


@contextmanager
def without_empty_folders(folder: Path) -> Iterator[None]:
    """Removes at the end those of `folder` and its parents that were made inside the block and stayed empty."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        for path in missing:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def git_commit() -> str | None:
    """The commit of this checkout, with "-dirty" after local changes; None outside of git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# ---------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(state: dict, folder: Path) -> None:
    """Writes checkpoint.pth.tar and, where state["is_best"], the same as model_best.pth.tar, each atomically."""
    buffer = io.BytesIO()  # torch.save into a file would tell of a full disk in its own words
    torch.save(state, buffer)
    for name in (CHECKPOINT, BEST) if state["is_best"] else (CHECKPOINT,):
        with atomic_write(folder / name) as file:
            file.write(buffer.getbuffer())


def mend_best(folder: Path) -> None:
    """Writes model_best.pth.tar, which a crash kept `save_checkpoint` from writing after its checkpoint.

    Call it where the checkpoint says that it is the best so far, with the folder locked.
    """
    best, checkpoint = folder / BEST, (folder / CHECKPOINT).read_bytes()
    if not best.exists() or best.read_bytes() != checkpoint:
        with atomic_write(best) as file:
            file.write(checkpoint)


def load_checkpoint(path: str | Path) -> dict:
    """Reads a checkpoint of this program or of the original, onto the CPU, without running code from it.

    Returns:
        Its dict, with the prefixes `module.` and `_orig_mod.` taken off the keys of `state_dict`.

    Raises:
        InputError: if the file is missing, damaged, or holds something else.
    """
    checkpoint = load_safely(path)
    if not isinstance(checkpoint, dict) or not is_state_dict(checkpoint.get("state_dict")):
        raise InputError(f"{path} holds no state_dict of tensors: not a checkpoint of a ConvNet-AIG")
    checkpoint["state_dict"] = without_prefixes(checkpoint["state_dict"])
    for name, kinds in KINDS.items():
        if name in checkpoint and type(checkpoint[name]) not in kinds:
            kind = type(checkpoint[name]).__name__
            raise InputError(f"{path}: its {name} is a {kind}; not a checkpoint of this program")
    check_args(checkpoint.get("args", {}), path)
    return checkpoint


def check_args(args: Any, path: str | Path) -> None:
    """Raises InputError if what a checkpoint records of its data is malformed. Its flags are for `cli` to check."""

    def numbers(name: str) -> bool:
        return all(isinstance(value, (int, float)) and math.isfinite(value) for value in args[name])

    try:
        fit = isinstance(args, dict) and all(isinstance(name, str) for name in args.get("classes", []))
        if fit and "mean" in args:
            fit = len(args["mean"]) == len(args["std"]) == 3 and numbers("mean") and numbers("std")
            fit = fit and min(args["std"]) > 0
        fit = fit and numbers("block_rates") if "block_rates" in args else fit
    except (TypeError, KeyError, OverflowError):
        fit = False
    if not fit:
        raise InputError(f"{path}: its args are malformed; not a checkpoint of this program")


def load_safely(path: str | Path) -> Any:
    """What `torch.save` wrote into a file, on the CPU, without running code from it. Raises InputError."""
    try:
        if not Path(path).is_file():
            raise InputError(f"no checkpoint at {path}")
        if zipfile.is_zipfile(path):
            check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # a damaged file can raise anything, and its code is never run
        reason = str(error).strip().split("\n")[0][:120]
        raise InputError(f"{path} cannot be read as a checkpoint; damaged or a foreign file ({reason})") from error


def check_archive(path: str | Path) -> None:
    """Raises ValueError unless every byte in a zip file is the one written: torch.load does not check."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.external_attr & MSDOS_FOLDER:
                raise ValueError(f"{entry.filename} is compressed or called a folder, as torch.save never does")
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of {damaged} is wrong, or it was saved without checksums")


def is_state_dict(value: Any) -> bool:
    """Whether a value is a dict of names and ordinary tensors."""
    named = isinstance(value, dict) and bool(value) and all(isinstance(name, str) for name in value)
    return named and all(map(is_ordinary, value.values()))


def is_ordinary(value: Any) -> bool:
    """Whether a value is a tensor of real numbers that are all there."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.device.type != "cpu":
        return False
    return not value.is_complex() and not value.is_quantized


def without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict without the `module.` of DataParallel and the `_orig_mod.` of torch.compile in its keys."""
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):  # either may wrap the other
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def load_pretrained(model: nn.Module, source: str, arch: str) -> str:
    """Starts the backbone from a plain ResNet; gates, and a head for another number of classes, stay fresh.

    Args:
        source: a file as torchvision saves it (or with a `state_dict` inside), or "torchvision" for its official
            IMAGENET1K_V1 weights.
        arch: torchvision's name of the net, such as "resnet50".

    Returns:
        A line that says what was loaded and what stayed fresh.

    Raises:
        InputError: if the weights cannot be had, or keys are missing, left over or of another shape.
    """
    if source == "torchvision":
        try:
            state = torchvision.models.get_model_weights(arch)["IMAGENET1K_V1"].get_state_dict(check_hash=True)
        except (OSError, RuntimeError) as error:
            raise InputError(f"--pretrained torchvision: cannot download the weights ({error})") from error
    else:
        state = load_safely(source)
        state = state.get("state_dict", state) if isinstance(state, dict) else state
        if not is_state_dict(state):
            raise InputError(f"{source} holds no state_dict of tensors: not a torchvision ResNet")
    names = {"fc.weight": "linear.weight", "fc.bias": "linear.bias"}
    state = {names.get(key, key.replace(".downsample.", ".shortcut.")): v for key, v in without_prefixes(state).items()}
    own = model.state_dict()
    gates = [key for key in own if key.split(".")[-2] in ("fc1", "fc1bn", "fc2")]
    if any(key in state for key in gates):
        raise InputError(f"{source} is not a plain ResNet, it has gates: continue it with --resume")
    fresh = {key: own[key] for key in gates}
    head = ""
    if "linear.weight" in state and state["linear.weight"].shape != own["linear.weight"].shape:
        fresh |= {key: own[key] for key in names.values()}
        head = f" and the head (it has {len(state['linear.weight'])} classes)"
    load_weights(model, {**state, **fresh}, source)
    loaded = len(state.keys() - fresh.keys())
    return f"{source}: {loaded} tensors loaded; fresh: the {len(gates)} tensors of the gates{head}"


def load_weights(model: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Copies a state_dict into the model; gates of blocks that have none here are left out.

    Raises:
        InputError: naming keys that are missing, left over, or of another shape or type; the model is unchanged.
    """
    expected = model.state_dict()
    ungated = tuple(
        f"{name}.{layer}."
        for name, module in model.named_modules()
        if not getattr(module, "gated", True)
        for layer in ("fc1", "fc1bn", "fc2")
    )
    state = {key: value for key, value in state.items() if not key.startswith(ungated)}
    # files of PyTorch 0.3 do not count BatchNorm's batches
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    foreign = [key for key in state if key not in expected]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    types = [
        f"{key} {state[key].dtype} instead of {value.dtype}"
        for key, value in expected.items()
        if key in state and state[key].is_floating_point() != value.is_floating_point()
    ]
    problems = []
    named = (("missing", missing), ("left over", foreign), ("of another shape", shapes), ("of another type", types))
    for what, keys in named:
        if keys:
            problems.append(f"{len(keys)} {what} ({', '.join(keys[:2])}{', ...' if len(keys) > 2 else ''})")
    if problems:
        raise InputError(f"{source} does not fit this network: keys {'; '.join(problems)}")
    model.load_state_dict(state, strict=False)
