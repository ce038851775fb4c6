"""Inference that runs only what the gates open, and counts of what that costs.

In training every branch is computed and multiplied by its gate. Here a closed branch is not computed at all, for any
batch size: the branch runs on a copy of the images whose gate is open, and what comes out is written back. The shortcut
of a closed identity block costs nothing, because its input is what a ReLU left.

    fast = aig.accelerate(model)            # the outputs of model.eval(), sooner
    logits, gates = fast(images)
    cost = aig.count_macs(model, 224)       # multiply-accumulates, part by part

Source of what is computed: Veit, Belongie, "Convolutional networks with adaptive inference graphs", ECCV 2018, sec. 3.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_weights

from aig.losses import sum_dtype
from aig.onednn import PackedWeight, fused_kernels
from convnet_aig import (
    RUNS_EVERYTHING,
    AdaptiveResNet,
    FoldedGate,
    GatedBlock,
    check_gate_mode,
    check_thresholds,
    conv_macs,
    draw_noise,
    is_one,
    log_odds,
)

# Found by trials on a CPU; they decide about speed, never about results
CHUNK_PIXELS = 1 << 17  # of the images that go through the network together
FEW = 2  # photographs: this many at a time are no faster than one by one


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode; afterwards each of its modules is in the mode that it was in."""
    in_training = [module for module in model.modules() if module.training]
    try:
        yield model.eval()
    finally:
        for module in in_training:
            module.training = True


class Convolution:
    """A convolution with its BatchNorm folded in, and the sum and the ReLU that may follow.

    Not an nn.Module, as nothing below `Accelerated` is: its overhead would be felt for one small image.
    """

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
        statistics = (bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
        weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
        self.channels, self.stride, self.padding, self.groups = conv.in_channels, conv.stride, conv.padding, conv.groups
        self.hold(weight.detach().contiguous(memory_format=torch.channels_last), bias.detach())

    def hold(self, weight: Tensor, bias: Tensor) -> None:
        """Takes these for its own and chooses how to compute."""
        self.weight, self.bias = weight, bias
        fuses = weight.device.type == "cpu" and weight.dtype == torch.float32 and fused_kernels() is not None
        self.fused = PackedWeight(weight, bias, self.stride, self.padding, self.groups) if fuses else None

    def move(self, function: Callable[[Tensor], Tensor]) -> None:
        self.hold(function(self.weight), function(self.bias))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "fused": None}  # oneDNN's layout can be neither copied nor saved

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.hold(self.weight, self.bias)  # perhaps with another torch, or on another device

    def __call__(self, x: Tensor, relu: bool = True, into: Tensor | None = None) -> Tensor:
        """relu(conv(x) + into), written over `into` if given: (N, C, H, W) -> (N, C', H', W')."""
        if self.fused:
            return self.fused(x, "relu" if relu else "none", into)
        out = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, groups=self.groups)
        out = out if into is None else into.add_(out)
        return out.relu_() if relu else out


def rows_of(x: Tensor, rows: Tensor) -> Tensor:
    """A copy of these rows, (N, C, H, W) -> (M, C, H, W), in channels-last layout as x is."""
    return x.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)


class ConditionalBlock:
    """A residual block that runs its branch only for the images whose gate is open."""

    def __init__(self, block: GatedBlock) -> None:
        *self.inner, self.last = (Convolution(conv, bn) for conv, bn in block.layers())
        self.shortcut = Convolution(*block.shortcut) if len(block.shortcut) else None
        self.gate = block.fold_gate() if block.gated else None

    def parts(self) -> list[Convolution | FoldedGate]:
        return [part for part in (*self.inner, self.last, self.shortcut, self.gate) if part is not None]

    def log_odds(self, x: Tensor, pooled: Tensor) -> Tensor:
        """What the gate says to each row, (N, 1), from what it pools of x; no product in low precision."""
        device, pixels = x.device.type, x.shape[2] * x.shape[3]
        if not torch.is_autocast_enabled(device):
            return self.gate(pooled, pixels)
        with torch.autocast(device, enabled=False):
            return self.gate(pooled.float(), pixels)

    def run(self, x: Tensor) -> Tensor:
        """relu(shortcut(x) + F(x)), written over x if the shortcut is the identity."""
        return self.last(self.branch(x), into=x if self.shortcut is None else self.shortcut(x, relu=False))

    def skip(self, x: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor | None]:
        """relu(shortcut(x)), and what the gate pools of that: None if it has yet to be pooled."""
        return (x, pooled) if self.shortcut is None else (self.shortcut(x), None)  # x is what a ReLU left: relu(x) = x

    def run_open(self, x: Tensor, pooled: Tensor, is_open: Tensor) -> tuple[Tensor, Tensor | None]:
        """`run` for the rows that are open, `skip` for the others; written over x and `pooled`, as there."""
        rows = is_open.nonzero()[:, 0]  # reads from the device
        if len(rows) == len(x):
            return self.run(x), None
        if not len(rows):
            return self.skip(x, pooled)
        taken = rows_of(x, rows)
        if self.shortcut is None:
            ran = self.last(self.branch(taken), into=taken)
            pooled.index_copy_(0, rows, self.gate.pool(ran))
        else:
            x, pooled = self.shortcut(x, relu=False), None
            ran = self.last(self.branch(taken), into=rows_of(x, rows))
            x.relu_()
        x.permute(0, 2, 3, 1).index_copy_(0, rows, ran.permute(0, 2, 3, 1))
        return x, pooled

    def scale(self, x: Tensor, z: Tensor) -> Tensor:
        """relu(shortcut(x) + z F(x)), z (N,)."""
        out = x if self.shortcut is None else self.shortcut(x, relu=False)
        return self.last(self.branch(x), relu=False).mul_(z[:, None, None, None]).add_(out).relu_()

    def branch(self, x: Tensor) -> Tensor:
        """All of the branch but its last convolution."""
        for conv in self.inner:
            x = conv(x)
        return x


class Accelerated(nn.Module):
    """A trained network for inference; made by :func:`accelerate`. It has no state_dict worth saving: save the network.

    Attributes:
        gate_mode, threshold: as of `AdaptiveResNet`. "argmax" and "sample" run only open branches; "expected" and
            "all" have to run every branch.
        conditional: if False, "argmax" and "sample" run every branch, too, and multiply it by its gate: nothing is
            read from the device, and nothing saved.
    """

    def __init__(self, model: AdaptiveResNet) -> None:
        super().__init__()
        self.gate_mode, self.threshold, self.conditional = model.gate_mode, model.threshold, True
        self.conv1 = Convolution(model.conv1, model.bn1)
        self.maxpool = model.maxpool
        self.blocks = [ConditionalBlock(block) for block in model.blocks()]
        self.linear = copy.deepcopy(model.linear).requires_grad_(False)
        convolutions = [part for part in self.parts() if isinstance(part, Convolution)]
        self.poison = sum((0 * conv.weight.sum() + 0 * conv.bias.sum()).item() for conv in convolutions)  # 0 or NaN
        self.eval()

    def parts(self) -> list[Convolution | FoldedGate]:
        """All convolutions and gates."""
        return [self.conv1, *chain.from_iterable(block.parts() for block in self.blocks)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Accelerated:
        """What `to` and its like call: moves the convolutions and gates, too."""
        for part in self.parts():
            part.move(fn)
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Accelerated:
        """Raises RuntimeError for mode True: train the network this one was made from."""
        if mode:
            raise RuntimeError("an accelerated network is for inference only: train the one it was made from")
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Classifies images: (N, 3, H, W) -> logits (N, K) and per block z (N,), as the network it was made from.

        Mode "sample" takes or draws the same `noise` as that network, and so decides the same.

        Raises ValueError for input of another shape or dtype; under autocast any floating-point dtype is taken.
        """
        want, channels = self.conv1.weight.dtype, self.conv1.channels
        fits = x.dtype == want or (x.is_floating_point() and torch.is_autocast_enabled(x.device.type))
        if x.ndim != 4 or x.shape[1] != channels or not fits:
            raise ValueError(f"images must be (N, {channels}, H, W) in {want}, not {tuple(x.shape)} in {x.dtype}")
        x = x.to(want)
        size = self.chunk_size(x)
        if check_gate_mode(self.gate_mode) in RUNS_EVERYTHING or not self.conditional:
            run = self.masked
        else:
            run = self.skipping_single if min(size, len(x)) == 1 else self.skipping
        device = torch.device("cpu") if run == self.skipping_single else x.device  # where the comparison is
        chunks = zip(x.split(size), self.bias(x, noise, device).split(size, dim=1), strict=True)
        logits, gates = zip(*(run(images, bias) for images, bias in chunks), strict=True)
        logits, gates = (logits[0], gates[0]) if len(logits) == 1 else (torch.cat(logits), torch.cat(gates, dim=1))
        if self.conv1.fused:  # oneDNN's ReLU makes 0 of NaN: what is broken must not look sound
            logits = logits + (0 * x.sum((1, 2, 3)) + self.poison)[:, None]
        return logits, list(gates.unbind())

    @property
    def num_gates(self) -> int:
        return sum(block.gate is not None for block in self.blocks)

    def bias(self, x: Tensor, noise: Tensor | None, device: torch.device) -> Tensor:
        """Offsets b, (gates, N) on a device: a gate opens where log-odds + b > 0."""
        if self.gate_mode == "sample":
            noise = draw_noise(self.num_gates, len(x), x) if noise is None else noise
            return (noise[..., 1] - noise[..., 0]).to(device)
        thresholds = check_thresholds(self.threshold, self.num_gates)
        if is_one(self.threshold):  # nothing to copy
            return torch.full((self.num_gates, len(x)), -log_odds(float(self.threshold)), dtype=x.dtype, device=device)
        offsets = [-log_odds(threshold) for threshold in thresholds]
        pinned = torch.tensor(offsets, dtype=x.dtype, pin_memory=device.type == "cuda")  # no wait for the copy
        return pinned.to(device, non_blocking=pinned.is_pinned())[:, None].expand(-1, len(x))

    def chunk_size(self, x: Tensor) -> int:
        """How many of the images x go through the network together."""
        if x.device.type != "cpu":
            return max(1, len(x))
        size = CHUNK_PIXELS // (x.shape[2] * x.shape[3])
        return size if size > FEW else 1

    def start(self, x: Tensor) -> Tensor:
        """The activations before the first block, in channels-last layout and our own to write over."""
        return self.maxpool(self.conv1(x.contiguous(memory_format=torch.channels_last)))

    def finish(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x.mean((2, 3))), z.to(x)

    def skipping(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Runs the branches that are open: logits (N, K) and z (L, N).

        The decisions of a gated block are the one thing that it reads from the device.
        """
        x, pooled, biases, z = self.start(x), None, iter(bias), []
        for block in self.blocks:
            if block.gate is None:
                z.append(x.new_ones(len(x), dtype=torch.bool))
                x, pooled = block.run(x), None
                continue
            pooled = block.gate.pool(x) if pooled is None else pooled
            z.append(block.log_odds(x, pooled)[:, 0] + next(biases) > 0)
            x, pooled = block.run_open(x, pooled, z[-1])
        return self.finish(x, torch.stack(z))

    def skipping_single(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """`skipping` for one image, whose time is mostly overhead: no rows to pick, only branches to take or not."""
        x, pooled, biases, z = self.start(x), None, iter(bias.flatten().tolist()), []
        for block in self.blocks:
            is_open = True
            if block.gate is not None:
                pooled = block.gate.pool(x) if pooled is None else pooled
                is_open = block.log_odds(x, pooled).item() + next(biases) > 0
            x, pooled = (block.run(x), None) if is_open else block.skip(x, pooled)
            z.append([is_open])
        return self.finish(x, torch.tensor(z))

    def masked(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Runs every branch and multiplies it by its gate: logits (N, K) and z (L, N)."""
        x, biases, z = self.start(x), iter(bias), []
        for block in self.blocks:
            if block.gate is None or self.gate_mode == "all":
                z.append(x.new_ones(len(x)))
                x = block.run(x)
                continue
            score = block.log_odds(x, block.gate.pool(x))[:, 0]
            expected = self.gate_mode == "expected"
            z.append(score.sigmoid() if expected else (score + next(biases) > 0).to(score.dtype))
            x = block.scale(x, z[-1])
        return self.finish(x, torch.stack(z))


def accelerate(model: AdaptiveResNet, images: Tensor | None = None) -> Accelerated:
    """An eval-only copy of a network, on its device, that runs only open branches and folds its BatchNorms.

    It returns what `model.eval()` returns, in the gate mode and with the threshold that the model has now (both can be
    changed later), up to rounding: a gate within rounding of the threshold may decide differently.

    Args:
        images: a typical batch. On a GPU it can take longer to wait for a decision than to run the branch; given a
            batch, the faster form is found by trying, and kept in `conditional`. Without one, branches are skipped.
    """
    fast = Accelerated(model)
    if images is not None:
        fast.gate_mode, mode = "argmax", fast.gate_mode  # others run everything, or draw
        skipping = time_forward(fast, images)
        fast.conditional = False
        fast.conditional = skipping <= time_forward(fast, images)
        fast.gate_mode = mode
    return fast


def time_forward(network: nn.Module, images: Tensor, repeats: int = 3) -> float:
    """The best of several timings of a forward pass, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        network(images)
        if images.device.type != "cpu":
            torch.accelerator.synchronize(images.device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


# ---------------------------------------------------------------------------------------------- counting


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates for one image, part by part."""

    stem: int  # before the first block
    shortcuts: tuple[int, ...]  # per block; 0 for the identity
    branches: tuple[int, ...]  # per block
    gates: tuple[int, ...]  # per block, as `accelerate` computes them; 0 for a block without one
    head: int  # after the last block

    @property
    def dense(self) -> int:
        """Of the plain ResNet: every branch and no gate."""
        return self.stem + sum(self.shortcuts) + sum(self.branches) + self.head

    def executed(self, z: Tensor, gates: bool = True) -> Tensor:
        """Of images that run the branches where z (N, L) is 1, with or without the gates' own share: (N,).

        In float64, which holds the counts exactly (on MPS in float32).
        """
        dtype = sum_dtype(z.device)
        fixed = self.stem + sum(self.shortcuts) + self.head + gates * sum(self.gates)
        return fixed + z.to(dtype) @ torch.tensor(self.branches, dtype=dtype, device=z.device)


def count_macs(model: AdaptiveResNet, image_size: int | Sequence[int]) -> Macs:
    """Multiply-accumulates of the convolutions and linear layers of a network, for one image.

    Args:
        image_size: height and width in pixels, or one number for both.
    """
    size = tuple(image_size) if isinstance(image_size, Sequence) else (int(image_size), int(image_size))
    stem, size = conv_macs(model.conv1, size)
    size = model.maxpool(torch.empty(1, 1, *size, device="meta")).shape[2:]
    counts = []
    for block in model.blocks():
        *count, size = block.macs(size)
        counts.append(count)
    shortcuts, branches, gates = zip(*counts, strict=True)
    return Macs(stem, shortcuts, branches, gates, model.linear.weight.numel())
