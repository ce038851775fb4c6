"""An exported network without PyTorch: ONNX Runtime or OpenVINO runs the file, each image through its own graph.

    session = aig.Session("model.onnx")                     # written by aig.export_onnx
    logits, gates = session(session.preprocess(image)[None])    # (1, K), and z of each block (1, L)

A file for batch 1 skips exactly what an image closes. A larger batch goes through it in streams, one image each.
"""

from __future__ import annotations

import importlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from pathlib import Path
from queue import SimpleQueue
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

PROGRAM = "convnet-aig"  # the producer that a file of ours names
METADATA = (  # of a file, each in JSON
    "program", "batch", "uint8", "image_size", "preprocess", "classes", "macs", "gated", "gate_mode", "threshold",
    "licence",
)
Outputs = tuple[np.ndarray, np.ndarray]


def require(package: str) -> ModuleType:
    """An optional package. Raises ImportError that says how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{package} is not installed ({error}): pip install {package}") from error


def rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB, 8 bits per channel. Raises ValueError for pixels of which no range is known."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # Pillow would cut off what is above 255
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known range: save it with 8 or 16 bits per channel")
    return image.convert("RGB")


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------------------------------------- engines


class OnnxRuntime:
    """A file in ONNX Runtime, on the CPU.

    Args:
        source: its path, or its bytes.
        cores: how many threads may compute, all streams together.
        streams: how many calls of `run` may go on at the same time.
    """

    def __init__(self, source: str | bytes, cores: int, streams: int) -> None:
        runtime = require("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = cores // streams
        options.add_session_config_entry("session.force_spinning_stop", "1")  # after a run: it would disturb others
        options.log_severity_level = 3  # errors only
        self.session = runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name

    def metadata(self) -> dict[str, str]:
        return self.session.get_modelmeta().custom_metadata_map

    def run(self, images: np.ndarray) -> Outputs:
        """Images as the file takes them -> logits (N, K), gates (N, L). Several threads may call it."""
        return tuple(self.session.run(["logits", "gates"], {self.input: images}))


@cache
def openvino_core() -> Any:
    """The one core of this process, never unloaded: that would leave the stack for signal handlers in freed memory."""
    return require("openvino").Core()


class OpenVino:
    """A file in OpenVINO, on the CPU, in float32. Arguments as of `OnnxRuntime`."""

    def __init__(self, source: str | bytes, cores: int, streams: int) -> None:
        core = openvino_core()
        self.model = core.read_model(source)
        hints = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": streams, "INFERENCE_NUM_THREADS": cores}
        compiled = core.compile_model(self.model, "CPU", hints)  # by itself it takes bfloat16 on some machines
        self.requests: SimpleQueue[Any] = SimpleQueue()
        for _ in range(streams):
            self.requests.put(compiled.create_infer_request())
        entry = compiled.input(0)
        shape = [length.get_length() if length.is_static else 1 for length in entry.partial_shape]
        # Its Python binding sets itself up in the first call; two threads in there at once wait for each other forever
        self.run(np.zeros(shape, entry.element_type.to_dtype()))

    def metadata(self) -> dict[str, str]:
        places = {name: ["framework", name] for name in METADATA}
        found = {name: place for name, place in places.items() if self.model.has_rt_info(place)}
        return {name: self.model.get_rt_info(place).astype(str) for name, place in found.items()}

    def run(self, images: np.ndarray) -> Outputs:
        """Images as the file takes them -> logits (N, K), gates (N, L). Several threads may call it."""
        request = self.requests.get()
        try:
            found = request.infer([images])
            return found["logits"], found["gates"]
        finally:
            self.requests.put(request)


ENGINES = {"onnxruntime": OnnxRuntime, "openvino": OpenVino}


# ---------------------------------------------------------------------------------------------- a session


class Session:
    """A file of `aig.export_onnx`, ready to classify.

    Args:
        path: the file, or its bytes.
        engine: "onnxruntime" or "openvino".
        streams: how many images of a batch run at the same time, one thread each, if the file is for single images.
            A single image, or a batch if the file takes batches, uses this many threads. None: the number of cores.

    Attributes:
        classes: the names of the K classes.
        macs: multiply-accumulates of one image: "dense", "stem", "head", and by block "shortcuts", "branches", "gates".
        metadata: all that the file says of the network.

    Raises:
        ValueError: if there is no such engine, or it cannot read the file, or the file is not of `aig.export_onnx`.
        ImportError: if the engine is not installed.
    """

    def __init__(self, path: str | Path | bytes, engine: str = "onnxruntime", streams: int | None = None) -> None:
        if engine not in ENGINES:
            raise ValueError(f"engine {engine!r}: choose from {', '.join(ENGINES)}")
        if streams is not None and (not isinstance(streams, int) or streams < 1):
            raise ValueError(f"streams {streams!r}: must be a whole number, at least 1")
        self.source, name = (path, "the file") if isinstance(path, bytes) else (str(path), str(path))
        if isinstance(self.source, str) and not Path(self.source).is_file():
            raise ValueError(f"no file at {name}")
        require(engine)
        self.start, self.streams = ENGINES[engine], streams or available_cores()
        try:
            self.whole = self.start(self.source, self.streams, 1)
            metadata = self.whole.metadata()
        except Exception as error:  # engines have errors of their own
            reason = " ".join(str(error).split())[:120]
            raise ValueError(f"{name} cannot be read by {engine}: damaged or a foreign file ({reason})") from error
        try:
            self.metadata = {key: json.loads(metadata[key]) for key in METADATA}
        except (KeyError, ValueError):
            raise ValueError(f"{name} was not written by this version of aig.export_onnx") from None
        self.classes, self.macs = self.metadata["classes"], self.metadata["macs"]

    def __call__(self, images: np.ndarray) -> Outputs:
        """Classifies images, each through its own graph.

        Args:
            images: (N, 3, H, W) float32, normalised; or if the file takes pixels, (N, H, W, 3) uint8 of any size.

        Returns:
            logits (N, K), and z (N, L): 1 for each block whose branch ran.

        Raises:
            ValueError: if the images do not fit, or are not finite.
        """
        images = np.ascontiguousarray(images)
        self.check(images)
        if len(images) == 1 or self.metadata["batch"] == "any":
            return self.whole.run(images)
        found = self.workers.map(self.single.run, np.split(images, len(images)))
        logits, gates = zip(*found, strict=True)
        return np.concatenate(logits), np.concatenate(gates)

    def check(self, images: np.ndarray) -> None:
        """Raises ValueError unless the file takes these images."""
        if not images.size:
            raise ValueError("an empty batch: give at least one image")
        uint8, (height, width) = self.metadata["uint8"], self.metadata["image_size"]
        shape, kind = ("(N, H, W, 3)", "uint8") if uint8 else (f"(N, 3, {height}, {width})", "float32")
        fits = images.ndim == 4 and images.shape[1:] == ((*images.shape[1:3], 3) if uint8 else (3, height, width))
        if not fits or images.dtype != kind:
            raise ValueError(f"images {images.shape} {images.dtype}: this file takes {shape} {kind}")
        if not uint8 and not np.isfinite(images).all():
            raise ValueError("images hold numbers that are not finite")

    @cached_property
    def single(self) -> OnnxRuntime | OpenVino:
        """The engine once more, for several images at the same time, one thread each."""
        return self.whole if self.streams == 1 else self.start(self.source, self.streams, self.streams)

    @cached_property
    def workers(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.streams)

    def preprocess(self, image: Image.Image) -> np.ndarray:
        """What the file takes of a PIL image of any size: (3, H, W) float32, or (h, w, 3) uint8 if it takes pixels.

        Raises:
            ValueError: if the file does not say how, or as `rgb`.
        """
        image, how = rgb(image), self.metadata["preprocess"]
        if self.metadata["uint8"]:
            return np.asarray(image)
        if how is None:
            raise ValueError("the file records no preprocessing: export a network from aig.load, for square images")
        size, short = how["size"], min(image.size)
        wide, high = (length * how["short_side"] // short for length in image.size)
        left, top = round((wide - size) / 2), round((high - size) / 2)
        image = image.resize((wide, high), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
        mean, std = (255 * np.array(how[name], np.float32) for name in ("mean", "std"))
        pixels = np.asarray(image, np.float32) * (1 / std) - mean / std  # (H, W, 3)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))
