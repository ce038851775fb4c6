"""ConvNet-AIG: residual networks in which gates decide, image by image, which residual blocks run.

    x_{l+1} = relu(shortcut_l(x_l) + z_l(x_l) * F_l(x_l)),   z_l(x) in {0, 1}

Andreas Veit, Serge Belongie, "Convolutional networks with adaptive inference graphs", ECCV 2018,
https://arxiv.org/abs/1711.11503. The backbones are those of He et al., "Deep residual learning for
image recognition", CVPR 2016, with the stride of a bottleneck in its 3x3 convolution, as in torchvision.

This module owns the gate, the blocks, the backbones and their constructors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_linear_bn_weights

from gumbelmodule import gumbel_noise, gumbel_softmax

GATE_MODES = ("argmax", "sample", "expected", "all")
RUNS_EVERYTHING = ("expected", "all")  # the modes that execute every branch
GATE_LAYERS = ("fc1", "fc1bn", "fc2")  # of a block, by the names in the public parameter keys; the last gives logits
GATE_WIDTH = 16  # hidden units of a gate


def conv3x3(in_planes: int, planes: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, planes, 3, stride, padding=1, groups=groups, bias=False)


def conv1x1(in_planes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, planes, 1, stride, bias=False)


def draw_noise(num_gates: int, num_images: int, like: Tensor) -> Tensor:
    """Gumbel noise for the two logits of every gate and image, in one draw: (num_gates, N, 2)."""
    return gumbel_noise(torch.rand(num_gates, num_images, 2, dtype=like.dtype, device=like.device))


def log_odds(probability: float) -> float:
    """The difference of two logits, "execute" - "skip", at which P(open) is `probability`."""
    return math.log(probability / (1 - probability))


def conv_macs(conv: nn.Conv2d, size: Sequence[int]) -> tuple[int, tuple[int, int]]:
    """The multiply-accumulates for one image of `size` (H, W), and the size of the output."""
    geometry = zip(size, conv.kernel_size, conv.stride, conv.padding, strict=True)
    height, width = ((length + 2 * padding - kernel) // stride + 1 for length, kernel, stride, padding in geometry)
    return conv.weight.numel() * height * width, (height, width)


class ScaledBranch(torch.autograd.Function):
    """z F for a branch F (N, C, H, W) in low precision and z (N,). The gradient of z is summed up in z's precision."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, z: Tensor) -> Tensor:
        ctx.save_for_backward(residual, z)
        return residual * z.to(residual.dtype).view(-1, 1, 1, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        residual, z = ctx.saved_tensors
        of_z = (gradient * residual).sum((1, 2, 3), dtype=z.dtype)
        return gradient * z.to(gradient.dtype).view(-1, 1, 1, 1), of_z


class Gate(nn.Module):
    """Global average pool -> fc1 -> BatchNorm -> ReLU -> fc2 -> two logits (sec. 3.2), index 1 meaning "execute".

    A base class of the blocks, because the public keys name its layers as the block's own: `fc1`, `fc1bn`, `fc2`,
    of which `fc1` and `fc2` are 1x1 convolutions with 4-D weights. Another gate is another class with these methods.
    """

    def build_gate(self, in_planes: int) -> None:
        self.fc1 = nn.Conv2d(in_planes, GATE_WIDTH, 1)
        self.fc1bn = nn.BatchNorm1d(GATE_WIDTH)
        self.fc2 = nn.Conv2d(GATE_WIDTH, 2, 1)
        nn.init.normal_(self.fc2.weight, 0, 0.001)
        # softmax(0.1, 2.0) = 0.87 open at the start, the paper's setting
        self.fc2.bias.data = torch.tensor([0.1, 2.0])

    def gate_logits(self, x: Tensor) -> Tensor:
        """The relevance scores of "skip" and "execute", (N, C, H, W) -> (N, 2), never in reduced precision."""
        with torch.autocast(x.device.type, enabled=False):
            h = x.sum((2, 3), dtype=self.fc1.weight.dtype)  # (N, C); unlike mean's, sum's gradient is a mere view
            h = h / (x.shape[2] * x.shape[3])
            h = F.linear(h, self.fc1.weight.flatten(1), self.fc1.bias)  # (N, 16)
            h = F.relu(self.fc1bn(h))
            return F.linear(h, self.fc2.weight.flatten(1), self.fc2.bias)  # (N, 2)

    def fold_gate(self) -> FoldedGate:
        """The gate for inference."""
        return FoldedGate(self.fc1, self.fc1bn, self.fc2)

    def gate_macs(self) -> int:
        """Multiply-accumulates of the folded gate for one image."""
        return self.fc1.weight.numel() + self.fc1.out_channels


class FoldedGate:
    """A gate with its BatchNorm folded in, and one output: the log-odds of "execute" instead of two logits.

    Not an nn.Module: its overhead would be felt for one small image.
    """

    def __init__(self, fc1: nn.Conv2d, bn: nn.BatchNorm1d, fc2: nn.Conv2d) -> None:
        statistics = (bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
        weight1, bias1 = fuse_linear_bn_weights(fc1.weight.flatten(1), fc1.bias, *statistics)
        skip, execute = fc2.weight.detach().flatten(1)
        self.weight1, self.bias1 = weight1.detach().t().contiguous(), bias1.detach()  # (C, 16), (16,)
        self.weight2, self.bias2 = (execute - skip)[:, None], fc2.bias.detach().diff()  # (16, 1), (1,)

    def move(self, function: Callable[[Tensor], Tensor]) -> None:
        """Applies what `nn.Module.to` applies to each tensor."""
        for name, value in vars(self).items():
            setattr(self, name, function(value) if isinstance(value, Tensor) else value)

    def pool(self, x: Tensor) -> Tensor:
        """What the gate needs of its input, (N, C, H, W) -> (N, C): the sums over the pixels."""
        return x.sum((2, 3))

    def __call__(self, pooled: Tensor, pixels: int) -> Tensor:
        """The output of `pool` for images of `pixels` pixels -> log-odds (N, 1)."""
        h = torch.addmm(self.bias1, pooled, self.weight1, alpha=1 / pixels).relu_()  # (N, 16)
        return torch.addmm(self.bias2, h, self.weight2)

    def linear_layers(self) -> list[tuple[Tensor, Tensor]]:
        """The same for `aig.export_onnx`: weights (in, out) and biases of what follows the channels' means."""
        return [(self.weight1, self.bias1), (self.weight2, self.bias2)]


class GatedBlock(Gate):
    """A residual block behind its gate; subclasses have `build_residual`, which makes the branch, and its `layers`.

    Attributes:
        expansion: of the class, output channels divided by `planes`.
        gated: whether there is a gate.
        drop: stochastic depth (Huang et al., ECCV 2016), the paper's control for adaptivity, in blocks without a gate.
    """

    def __init__(
        self, in_planes: int, planes: int, stride: int = 1, gated: bool = True,
        groups: int = 1, width_per_group: int = 64,
    ) -> None:
        super().__init__()
        out_planes = planes * self.expansion
        self.build_residual(in_planes, planes, stride, groups, planes * width_per_group // 64 * groups)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != out_planes:
            self.shortcut = nn.Sequential(conv1x1(in_planes, out_planes, stride), nn.BatchNorm2d(out_planes))
        self.gated = gated
        self.drop: nn.Module = nn.Identity()
        if gated:
            self.build_gate(in_planes)

    def layers(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        """The convolutions of the branch with their BatchNorms, first to last."""
        raise NotImplementedError

    def macs(self, size: Sequence[int]) -> tuple[int, int, int, Sequence[int]]:
        """Multiply-accumulates of shortcut, branch and gate for an input of `size` (H, W); the size of the output."""
        shortcut = conv_macs(self.shortcut[0], size)[0] if len(self.shortcut) else 0
        branch = 0
        for conv, _ in self.layers():
            count, size = conv_macs(conv, size)
            branch += count
        return shortcut, branch, self.gate_macs() if self.gated else 0, size

    def residual(self, x: Tensor) -> Tensor:
        """F_l(x): the branch up to its last BatchNorm, (N, C, H, W) -> (N, C', H', W')."""
        *inner, (last_conv, last_bn) = self.layers()
        for conv, bn in inner:
            x = F.relu(bn(conv(x)), inplace=True)
        return last_bn(last_conv(x))

    def decide(self, x: Tensor, mode: str, threshold: float, temperature: float, noise: Tensor | None) -> Tensor:
        """The multiplier z of the branch, (N, C, H, W) -> (N,)."""
        logits = self.gate_logits(x)
        if mode == "sample":
            return gumbel_softmax(logits, temperature, hard=True, noise=noise)[:, 1]
        score = logits[:, 1] - logits[:, 0]
        if mode == "expected":  # P(open)
            return torch.sigmoid(score)
        opened = (score > log_odds(threshold)).to(score.dtype)  # P(open) > threshold
        if not score.requires_grad:
            return opened
        soft = torch.sigmoid(score / temperature)
        return opened + (soft - soft.detach())  # the bracket is exactly 0

    def forward(
        self, x: Tensor, mode: str = "sample", threshold: float = 0.5, temperature: float = 1,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Runs the branch for every image and multiplies it by its gate: the form that has a gradient.

        Args:
            x: (N, C, H, W).
            mode, threshold, temperature: see `AdaptiveResNet`.
            noise: (N, 2) Gumbel noise for mode "sample"; drawn here if None.

        Returns:
            relu(shortcut(x) + z * F(x)), (N, C', H', W'), and z, (N,).
        """
        shortcut, residual = self.shortcut(x), self.residual(x)
        if not self.gated or mode == "all":
            return F.relu(self.drop(residual).add_(shortcut), inplace=True), x.new_ones(len(x))
        z = self.decide(x, mode, threshold, temperature, noise)
        autocast = residual.dtype != z.dtype
        out = ScaledBranch.apply(residual, z) if autocast else residual * z.view(-1, 1, 1, 1)
        return F.relu(out.add_(shortcut), inplace=True), z


class BasicBlock(GatedBlock):
    """Two 3x3 convolutions, (N, C, H, W) -> (N, planes, H/stride, W/stride)."""

    expansion = 1

    def build_residual(self, in_planes: int, planes: int, stride: int, groups: int, width: int) -> None:
        if (groups, width) != (1, planes):
            raise ValueError("BasicBlock has no groups and no width of its own: use Bottleneck")
        self.conv1 = conv3x3(in_planes, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)

    def layers(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        return [(self.conv1, self.bn1), (self.conv2, self.bn2)]


class Bottleneck(GatedBlock):
    """1x1, 3x3 and 1x1 convolution, (N, C, H, W) -> (N, 4 planes, H/stride, W/stride).

    The 3x3 convolution has `planes` channels in one group, except in ResNeXt and wide ResNets.
    """

    expansion = 4

    def build_residual(self, in_planes: int, planes: int, stride: int, groups: int, width: int) -> None:
        self.conv1 = conv1x1(in_planes, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride, groups)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)

    def layers(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        return [(self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)]


def check_gate_mode(mode: str) -> str:
    """The mode. Raises ValueError if there is none of that name."""
    if mode not in GATE_MODES:
        raise ValueError(f"gate_mode {mode!r}: choose from {', '.join(GATE_MODES)}")
    return mode


def is_one(threshold: float | Sequence[float]) -> bool:
    """Whether it is one for all gates: a number, or an array or tensor of one."""
    return isinstance(threshold, Real) or getattr(threshold, "ndim", 1) == 0


def check_thresholds(threshold: float | Sequence[float], num_gates: int) -> list[float]:
    """The threshold of each gate, of one for all or one each. Raises ValueError unless they lie in (0, 1)."""
    one = is_one(threshold)
    thresholds = [float(threshold)] * num_gates if one else [float(each) for each in threshold]
    if len(thresholds) != num_gates or not all(0 < value < 1 for value in thresholds):
        raise ValueError(f"threshold {threshold}: must be a number in (0, 1), or one for each of {num_gates} gates")
    return thresholds


class AdaptiveResNet(nn.Module):
    """What both backbones share: stages of gated blocks and the forward pass through them.

    Attributes:
        gate_mode: how gates decide in eval mode (training always samples).
            "argmax": open where P(open) > `threshold`; repeatable, the default.
            "sample": a straight-through Gumbel-softmax sample, as in training and in the original's evaluation.
            "expected": run every branch and scale it by P(open), the starred row of the paper's table 1.
            "all": every gate open, the plain ResNet of the same weights.
            Hard decisions have straight-through gradients in eval mode, too: z is differentiated as the soft
            Gumbel-softmax sample in "sample", as P(open) = softmax(logits / temperature)[1] in "argmax".
        threshold: of P(open) in mode "argmax", strictly between 0 and 1; a number, or one for each gate.
        target_rates: one rate per block; a block at rate 1 has no gate and always runs.
        stages: the number of blocks in each.
    """

    gate_mode: str = "argmax"
    threshold: float | Sequence[float] = 0.5

    def build_stages(
        self,
        block: type[GatedBlock],
        num_blocks: Sequence[int],
        planes: Sequence[int],
        target_rates: Sequence[float] | None,
        **width: int,
    ) -> int:
        """Builds `layer1`, `layer2`, ... with the stride in the first block of all but the first.

        `width` may hold `groups` and `width_per_group`. Returns the number of channels after the last block.
        Raises ValueError if target_rates do not fit.
        """
        total = sum(num_blocks)
        # without rates every block is gated; the rates themselves matter only to the loss
        self.target_rates = None if target_rates is None else check_target_rates(target_rates, total)
        gated = iter([True] * total if target_rates is None else [rate < 1 for rate in target_rates])
        self.stages = list(num_blocks)
        in_planes = planes[0]
        for stage, (depth, channels) in enumerate(zip(num_blocks, planes, strict=True), start=1):
            layers = []
            for i in range(depth):
                stride = 2 if stage > 1 and i == 0 else 1
                layers.append(block(in_planes, channels, stride, next(gated), **width))
                in_planes = channels * block.expansion
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
        return in_planes

    def blocks(self) -> Iterator[GatedBlock]:
        """The residual blocks, first to last."""
        return chain.from_iterable(getattr(self, f"layer{s}") for s in range(1, len(self.stages) + 1))

    @property
    def num_gates(self) -> int:
        return sum(block.gated for block in self.blocks())

    def stem(self, x: Tensor) -> Tensor:
        """What comes before the blocks, (N, 3, H, W) -> (N, C, H', W')."""
        return self.maxpool(F.relu(self.bn1(self.conv1(x)), inplace=True))

    def forward(self, x: Tensor, temperature: float = 1, noise: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Classifies images, each through its own inference graph.

        Args:
            x: (N, 3, H, W).
            temperature: of the Gumbel-softmax; it changes gradients, never decisions.
            noise: (num_gates, N, 2) Gumbel noise to sample with, as `draw_noise` draws it; drawn here if None.

        Returns:
            logits (N, K) and, per block, the multiplier z (N,) that was applied to its branch; both with a gradient,
            also in eval mode, unless inside of `torch.no_grad()`.
        """
        mode = "sample" if self.training else check_gate_mode(self.gate_mode)
        if mode == "sample" and noise is None:  # of all gates in one draw: a few kernels instead of a few per gate
            noise = draw_noise(self.num_gates, len(x), x)
        thresholds = check_thresholds(self.threshold, self.num_gates)
        by_gate = zip(thresholds, [None] * self.num_gates if noise is None else noise, strict=True)
        x = self.stem(x)
        gate_activations = []
        for block in self.blocks():
            threshold, block_noise = next(by_gate) if block.gated else (0.5, None)
            x, z = block(x, mode, threshold, temperature, block_noise)
            gate_activations.append(z)
        return self.linear(x.mean((2, 3))), gate_activations


class ResNet_cifar(AdaptiveResNet):
    """The ResNet for 32x32 images: three stages of 16, 32 and 64 planes.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        num_blocks: blocks in each of the three stages.
        num_classes: K.
        target_rates: one per block in [0, 1]; blocks at 1 have no gate. None gates every block.

    Raises:
        ValueError: if target_rates has another length or leaves [0, 1].
    """

    def __init__(
        self,
        block: type[GatedBlock],
        num_blocks: Sequence[int],
        num_classes: int = 10,
        target_rates: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.maxpool = nn.Identity()
        features = self.build_stages(block, num_blocks, (16, 32, 64), target_rates)
        self.linear = nn.Linear(features, num_classes)


class ResNet_ImageNet(AdaptiveResNet):
    """The ResNet for photographs: four stages of 64, 128, 256 and 512 planes after a 7x7 stem and a max-pool.

    Arguments as for `ResNet_cifar`, with the blocks of four stages in `layers`; `groups` and `width_per_group` make a
    ResNeXt or a wide ResNet, as in torchvision. Convolutions, the gates' `fc1` included, start at
    N(0, sqrt(2 / (k * k * out_channels))).
    """

    def __init__(
        self,
        block: type[GatedBlock],
        layers: Sequence[int],
        num_classes: int = 1000,
        target_rates: Sequence[float] | None = None,
        groups: int = 1,
        width_per_group: int = 64,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        width = {"groups": groups, "width_per_group": width_per_group}
        features = self.build_stages(block, layers, (64, 128, 256, 512), target_rates, **width)
        self.linear = nn.Linear(features, num_classes)
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d) and not name.endswith(GATE_LAYERS[-1]):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def ResNet110_cifar(nclass: int = 10, target_rates: Sequence[float] | None = None) -> ResNet_cifar:
    """ConvNet-AIG-110, 54 blocks, 1,766,630 parameters with every block gated and 10 classes."""
    return ResNet_cifar(BasicBlock, (18, 18, 18), nclass, target_rates)


# Further backbones go here: (block, blocks by stage[, groups, width per group]), under torchvision's names
ARCHS: dict[str, tuple] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
    "resnext50_32x4d": (Bottleneck, (3, 4, 6, 3), 32, 4),
    "resnext101_32x8d": (Bottleneck, (3, 4, 23, 3), 32, 8),
    "resnext101_64x4d": (Bottleneck, (3, 4, 23, 3), 64, 4),
    "wide_resnet50_2": (Bottleneck, (3, 4, 6, 3), 1, 128),
    "wide_resnet101_2": (Bottleneck, (3, 4, 23, 3), 1, 128),
}


def make_resnet(arch: str, num_classes: int = 1000, target_rates: Sequence[float] | None = None) -> ResNet_ImageNet:
    """The network of this name in ARCHS; arguments as for `ResNet_cifar`."""
    block, layers, *width = ARCHS[arch]
    return ResNet_ImageNet(block, layers, num_classes, target_rates, *width)


def ResNet50_ImageNet(num_classes: int = 1000, target_rates: Sequence[float] | None = None) -> ResNet_ImageNet:
    """ConvNet-AIG-50, 16 blocks, 25,768,264 parameters with every block gated."""
    return make_resnet("resnet50", num_classes, target_rates)


def ResNet101_ImageNet(num_classes: int = 1000, target_rates: Sequence[float] | None = None) -> ResNet_ImageNet:
    """ConvNet-AIG-101, 33 blocks, 45,040,314 parameters with every block gated."""
    return make_resnet("resnet101", num_classes, target_rates)


def ResNet152_ImageNet(num_classes: int = 1000, target_rates: Sequence[float] | None = None) -> ResNet_ImageNet:
    """ConvNet-AIG-152, 50 blocks, 60,931,116 parameters with every block gated."""
    return make_resnet("resnet152", num_classes, target_rates)


def check_target_rates(rates: Sequence[float], num_blocks: int) -> list[float]:
    """The rates as floats. Raises ValueError unless they are num_blocks numbers in [0, 1]."""
    rates = [float(rate) for rate in rates]
    if len(rates) != num_blocks:
        raise ValueError(f"{len(rates)} target rates for {num_blocks} blocks")
    for block, rate in enumerate(rates, start=1):
        if not 0 <= rate <= 1:
            raise ValueError(f"target rate {rate} of block {block}: must lie in [0, 1]")
    return rates
