"""Single images: what a network takes them for, and their inference graphs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aig.analysis.output import Part
from aig.environment import derive_seed
from aig.images import Normaliser, read_image
from aig.inference import accelerate, count_macs
from convnet_aig import AdaptiveResNet

GUESSES = 5  # classes that are printed for an image


def graphs(model: AdaptiveResNet, paths: Sequence[str], seed: int) -> Part:
    """The best guesses for some image files and their graphs; `seed` is of the noise of gate mode "sample"."""
    device, preprocess = next(model.parameters()).device, model.preprocess
    pixels = torch.stack([preprocess.pixels(read_image(path)) for path in paths])  # (n, 3, H, W) uint8
    images = Normaliser(preprocess.mean, preprocess.std, device)(pixels.to(device, torch.float32))
    torch.manual_seed(derive_seed(seed, "image"))
    with torch.inference_mode():
        logits, gates = accelerate(model)(images.contiguous(memory_format=torch.channels_last))
    z, cost = torch.stack(gates, dim=1), count_macs(model, pixels.shape[2:])
    opened, macs = (z > 0.5).cpu(), cost.executed(z).cpu()  # (n, L), (n,)
    gated = [block.gated for block in model.blocks()]
    guesses = [describe_guesses(row, model.classes) for row in logits.softmax(1).cpu()]
    lines = []
    for path, guess, graph, count in zip(paths, guesses, opened.tolist(), macs.tolist(), strict=True):
        lines += [f"{path}: {', '.join(guess)}", f"  {describe_graph(graph, gated, model.stages)}"]
        share = f"{100 * count / cost.dense:.1f} % of the dense net's {cost.dense / 1e6:.2f}"
        lines.append(f"  {sum(graph)} of {len(graph)} blocks; {count / 1e6:.2f} MMACs, {share}")
    arrays = {
        "pixels": pixels.permute(0, 2, 3, 1).numpy(),
        "files": np.array([Path(path).name for path in paths]),
        "guesses": np.array([", ".join(guess[:3]) for guess in guesses]),
        "opened": opened.numpy(),
        "gated": np.array(gated),
        "stages": np.array(model.stages),
        "macs": macs.numpy(),
        "dense": np.array(cost.dense),
    }
    return Part({"graphs": arrays}, lines=lines)


def describe_guesses(probabilities: Tensor, classes: Sequence[str]) -> list[str]:
    """The classes of the highest of probabilities (K,), with these in percent."""
    best = (values.tolist() for values in probabilities.topk(min(GUESSES, len(classes))))
    return [f"{classes[index]} {100 * value:.1f} %" for value, index in zip(*best, strict=True)]


def describe_graph(opened: Sequence[bool], gated: Sequence[bool], stages: Sequence[int]) -> str:
    """A graph as a mark for each of the L blocks."""
    marks = ["." if not is_open else "#" if has_gate else "=" for is_open, has_gate in zip(opened, gated, strict=True)]
    edges = pairwise(np.cumsum([0, *stages]).tolist())
    strips = [f"stage {number} {''.join(marks[start:end])}" for number, (start, end) in enumerate(edges, start=1)]
    meaning = "# ran, . skipped" + ("" if all(gated) else ", = always runs")
    return f"{'  '.join(strips)}   ({meaning})"
