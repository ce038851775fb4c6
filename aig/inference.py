"""Inference that runs only what the gates open, and counts of what that costs.

In training every branch is computed and multiplied by its gate. Here a closed branch is not computed at all, for any
batch size: the images whose gate is open are moved to the front of the batch, and the branch runs on that part of the
activations, in place. The shortcut of a closed identity block costs nothing, because its input is what a ReLU left.

    fast = aig.accelerate(model)            # the outputs of model.eval(), sooner
    logits, gates = fast(images)
    cost = aig.count_macs(model, 224)       # multiply-accumulates, part by part

Source of what is computed: Veit, Belongie, "Convolutional networks with adaptive inference graphs", ECCV 2018, sec. 3.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
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
    log_odds,
)

# Found by trials on a CPU; they decide about speed, never about results
CHUNK_PIXELS = 1 << 17  # of the images that go through the network together
REPACKING = 1 << 17  # bytes of weights that take as long to bring into oneDNN's layout as a convolution to start


class Convolution:
    """A convolution with its BatchNorm folded in, and the sum and the ReLU that may follow.

    No Module, as nothing below `Accelerated` is: for one small image, the work of Module itself would be felt.
    """

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
        statistics = (bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
        weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
        self.stride, self.padding, self.groups = conv.stride, conv.padding, conv.groups
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


class Rows:
    """The activations of images on their way through the network.

    Attributes:
        x: (N, C, H, W), in channels-last layout and our own to write over.
        order: the image that each row belongs to.
        changed: so many first rows of x are not what `pooled` was computed from.
    """

    def __init__(self, x: Tensor) -> None:
        self.x, self.order = x, list(range(len(x)))
        self.changed = len(x)

    def update(self, x: Tensor, changed: int) -> None:
        """Takes the output of a block, which differs from its input in the first `changed` rows."""
        self.x, self.changed = x, changed

    def pooled_by(self, gate: FoldedGate) -> Tensor:
        """What the gate pools, (N, C). A row that no branch has changed since is not pooled again."""
        if self.changed == len(self.order):
            self.pooled = gate.pool(self.x)
        elif self.changed:
            self.pooled[: self.changed] = gate.pool(self.x[: self.changed])
        self.changed = 0
        return self.pooled

    def to_front(self, chosen: Sequence[bool]) -> None:
        """Moves the chosen rows before the others: no more rows than have to move."""
        count = sum(chosen)
        leaving = [row for row in range(count) if not chosen[row]]
        coming = [row for row in range(count, len(chosen)) if chosen[row]]
        if not coming:
            return
        source, target = coming + leaving, leaving + coming
        images = [self.order[row] for row in source]
        for row, image in zip(target, images, strict=True):
            self.order[row] = image
        source, target = torch.tensor([source, target], device=self.x.device)
        for values in (self.x.permute(0, 2, 3, 1), self.pooled):  # the order of channels-last memory
            values.index_copy_(0, target, values.index_select(0, source))

    def in_order(self, values: Tensor) -> Tensor:
        """Values of the rows, (N, ...), in the order of the images."""
        if self.order == list(range(len(self.order))):
            return values
        index = torch.tensor(self.order, device=values.device)
        return torch.empty_like(values).index_copy_(0, index, values)


class ConditionalBlock:
    """A residual block that runs its branch only for the images whose gate is open."""

    def __init__(self, block: GatedBlock) -> None:
        *self.inner, self.last = (Convolution(conv, bn) for conv, bn in block.layers())
        self.shortcut = Convolution(*block.shortcut) if len(block.shortcut) else None
        self.gate = block.fold_gate() if block.gated else None

    def parts(self) -> list[Convolution | FoldedGate]:
        return [part for part in (*self.inner, self.last, self.shortcut, self.gate) if part is not None]

    def log_odds(self, rows: Rows) -> Tensor:
        """What the gate says to each row, (N, 1)."""
        return self.gate(rows.pooled_by(self.gate), rows.x.shape[2] * rows.x.shape[3])

    def run(self, rows: Rows, is_open: Sequence[bool]) -> None:
        """relu(shortcut(x) + F(x)) for the rows that are open, relu(shortcut(x)) for the others."""
        count, total = sum(is_open), len(is_open)
        if 0 < count < total:
            rows.to_front(is_open)
        out = rows.x if self.shortcut is None else self.shortcut(rows.x, relu=False)
        if count == total:
            self.last(self.branch(rows.x), into=out)
        elif count:
            self.last(self.branch(rows.x[:count]), into=out[:count])
        if self.shortcut is None:
            rows.update(out, count)  # the others are what a ReLU left: relu(x) = x
        else:
            out[count:].relu_()
            rows.update(out, total)

    def scale(self, rows: Rows, z: Tensor) -> None:
        """relu(shortcut(x) + z F(x)) for all rows, z (N, 1)."""
        out = rows.x if self.shortcut is None else self.shortcut(rows.x, relu=False)
        residual = self.last(self.branch(rows.x), relu=False)
        rows.update(residual.mul_(z[..., None, None]).add_(out).relu_(), len(out))

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
        mean_size = sum(conv.weight.nbytes for conv in convolutions) / len(convolutions)
        self.repacking = mean_size / REPACKING  # in starts of a convolution
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
        """
        size = self.chunk_size(x)
        if check_gate_mode(self.gate_mode) in RUNS_EVERYTHING or not self.conditional:
            run = self.masked
        else:
            run = self.skipping_single if min(size, len(x)) == 1 else self.skipping
        chunks = zip(x.split(size), self.bias(x, noise).split(size, dim=1), strict=True)
        logits, gates = zip(*(run(images, bias) for images, bias in chunks), strict=True)
        logits, gates = (logits[0], gates[0]) if len(logits) == 1 else (torch.cat(logits), torch.cat(gates, dim=1))
        if self.conv1.fused:  # oneDNN's ReLU makes 0 of NaN: what is broken must not look sound
            logits = logits + (0 * x.sum((1, 2, 3)) + self.poison)[:, None]
        return logits, list(gates.unbind())

    @property
    def num_gates(self) -> int:
        return sum(block.gate is not None for block in self.blocks)

    def bias(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Offsets b, (gates, N): a gate opens where log-odds + b > 0."""
        if self.gate_mode == "sample":
            noise = draw_noise(self.num_gates, len(x), x) if noise is None else noise
            return noise[..., 1] - noise[..., 0]
        thresholds = check_thresholds(self.threshold, self.num_gates)
        if isinstance(self.threshold, (int, float)):  # one number: no copy to the device
            return x.new_full((self.num_gates, len(x)), -log_odds(self.threshold))
        return -x.new_tensor([log_odds(threshold) for threshold in thresholds])[:, None].expand(-1, len(x))

    def chunk_size(self, x: Tensor) -> int:
        """How many of the images x go through the network together."""
        if x.device.type != "cpu":
            return max(1, len(x))
        size = CHUNK_PIXELS // (x.shape[2] * x.shape[3])
        return size if size > self.repacking else 1

    def start(self, x: Tensor) -> Rows:
        return Rows(self.maxpool(self.conv1(x.contiguous(memory_format=torch.channels_last))))

    def finish(self, rows: Rows) -> Tensor:
        return rows.in_order(self.linear(rows.x.mean((2, 3))))

    def skipping(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Runs the branches that are open: logits (N, K) and z (L, N).

        The decisions of a gated block are the one thing that it reads from the device.
        """
        rows, biases = self.start(x), iter(bias.tolist())
        z = []
        for block in self.blocks:
            if block.gate is None:
                is_open = [True] * len(x)
                z.append(is_open)
            else:
                scores, added = block.log_odds(rows).tolist(), next(biases)
                is_open = [score + added[image] > 0 for (score,), image in zip(scores, rows.order, strict=True)]
                by_image = dict(zip(rows.order, is_open, strict=True))
                z.append([by_image[image] for image in range(len(x))])
            block.run(rows, is_open)
        return self.finish(rows), torch.tensor(z, dtype=rows.x.dtype, device=x.device)

    def skipping_single(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """`skipping` for one image, whose time is mostly overhead: no rows to sort, only branches to take or not."""
        x, biases = self.start(x).x, iter(bias.flatten().tolist())
        pooled, z = None, []
        for block in self.blocks:
            is_open = True
            if block.gate is not None:
                pooled = block.gate.pool(x) if pooled is None else pooled  # after a closed branch x is what it was
                is_open = block.gate(pooled, x.shape[2] * x.shape[3]).item() + next(biases) > 0
            out = x if block.shortcut is None else block.shortcut(x, relu=False)
            if is_open:
                block.last(block.branch(x), into=out)
            elif block.shortcut is not None:
                out.relu_()
            pooled = None if is_open or block.shortcut is not None else pooled
            z.append([is_open])
            x = out
        return self.linear(x.mean((2, 3))), torch.tensor(z, dtype=x.dtype, device=x.device)

    def masked(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Runs every branch and multiplies it by its gate: logits (N, K) and z (L, N)."""
        rows, biases = self.start(x), iter(bias)
        z = []
        for block in self.blocks:
            if block.gate is None or self.gate_mode == "all":
                z.append(rows.x.new_ones(len(x), 1))
                block.run(rows, [True] * len(x))
                continue
            score = block.log_odds(rows)  # (N, 1)
            expected = self.gate_mode == "expected"
            z.append(score.sigmoid() if expected else (score + next(biases)[:, None] > 0).to(score.dtype))
            block.scale(rows, z[-1])
        return self.finish(rows), torch.cat(z, dim=1).t()


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
        fast.conditional = True
        skipping = seconds(fast, images)
        fast.conditional = False
        fast.conditional = skipping <= seconds(fast, images)
    return fast


def seconds(network: nn.Module, images: Tensor, repeats: int = 3) -> float:
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
    """Multiply-accumulates for one image, part by part.

    Attributes:
        stem, head: before the first block, after the last.
        shortcuts: per block; 0 for the identity.
        branches: per block.
        gates: per block, as `accelerate` computes them; 0 for a block without one.
    """

    stem: int
    shortcuts: tuple[int, ...]
    branches: tuple[int, ...]
    gates: tuple[int, ...]
    head: int

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
