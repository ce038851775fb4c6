"""ConvNet-AIG as a library: load a trained network, run only the blocks that its gates open, count what that costs.

    import aig
    net = aig.load("runs/NAME")                         # a run folder or a checkpoint
    logits, gates = net(net.preprocess(image)[None])    # image: a PIL image of any size; gates: z of each block
    fast = aig.accelerate(net)                          # the same outputs, closed branches not computed
    cost = aig.count_macs(net, 32)                      # multiply-accumulates, part by part

The names are imported when they are first used, so that nobody waits for what they do not use.
"""

from __future__ import annotations

import importlib
from typing import Any

PLACES = {"accelerate": "aig.inference", "count_macs": "aig.inference", "load": "aig.checkpoint"}
__all__ = ["accelerate", "count_macs", "load"]


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module 'aig' has no attribute {name!r}")
    return getattr(importlib.import_module(PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *PLACES])
