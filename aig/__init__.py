"""ConvNet-AIG as a library: load a trained network or gate your own, run only the blocks that its gates open.

    import aig
    net = aig.load("runs/NAME")                         # a run folder, a checkpoint, or a model folder
    logits, gates = net(net.preprocess(image)[None])    # image: a PIL image of any size; gates: z of each block
    fast = aig.accelerate(net)                          # the same outputs, closed branches not computed
    cost = aig.count_macs(net, 32)                      # multiply-accumulates, part by part
    net = aig.gate(torchvision.models.resnet50())       # your own ResNet, with gates to be trained
    net.threshold = aig.calibrate(net, loader, 0.7)     # thresholds for 70 % of the dense net's computation
    aig.export_onnx(net, "model.onnx")                  # a file that skips in ONNX Runtime and OpenVINO
    session = aig.Session("model.onnx")                 # runs it, without PyTorch
    aig.save(net, "folder")                             # a model folder, to give away

The names are imported when they are first used, so that nobody waits for what they do not use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
PLACES = {
    "Session": "aig.runtime",
    "accelerate": "aig.inference",
    "calibrate": "aig.budget",
    "count_macs": "aig.inference",
    "export_onnx": "aig.export",
    "gate": "aig.networks",
    "load": "aig.networks",
    "save": "aig.folders",
}
__all__ = ["Session", "accelerate", "calibrate", "count_macs", "export_onnx", "gate", "load", "save"]


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module 'aig' has no attribute {name!r}")
    return getattr(importlib.import_module(PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *PLACES])
