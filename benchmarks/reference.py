"""The baseline: a ConvNet-AIG computed the way the authors' code computes it.

Every branch runs, the gate is a chain of 4-D operations with two logits, each operation is its own kernel, nothing
is folded, and tensors are contiguous. No straw man: ReLUs and sums are in place, as in torchvision. The parameters
are those of `convnet_aig`, so that both compute the same function; `tests/test_convnet_aig.py` checks it against the
golden numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnet_aig import AdaptiveResNet, Bottleneck, GatedBlock, ResNet_ImageNet


def gumbel_like(logits: Tensor) -> Tensor:
    """The original's noise, -log(eps - log(u + eps))."""
    return -torch.log(1e-10 - torch.log(torch.rand_like(logits) + 1e-10))


def sample_gate(block: GatedBlock, x: Tensor, noise: bool) -> Tensor:
    """One-hot gate decisions with the gradient of softmax, (N, C, H, W) -> (N, 2, 1, 1)."""
    bn = block.fc1bn
    w = F.adaptive_avg_pool2d(x, 1)
    w = block.fc1(w)
    if bn.training:
        bn.num_batches_tracked += 1
    w = F.batch_norm(w, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training, bn.momentum, bn.eps)
    logits = block.fc2(F.relu(w))
    if noise:
        logits = logits + gumbel_like(logits)
    soft = F.softmax(logits, dim=1)
    hard = torch.zeros_like(soft).scatter_(1, soft.argmax(1, keepdim=True), 1.0)
    return hard - soft.detach() + soft


class Reference(nn.Module):
    """Wraps a network of `convnet_aig` with every block gated; `noise` as in the original, also in eval mode.

    `open_gates` replaces the sampled decisions by ones after computing them: the cost with all gates open.
    """

    def __init__(self, model: AdaptiveResNet, noise: bool = True, open_gates: bool = False) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.contiguous_format)
        self.noise, self.open_gates = noise, open_gates

    def residual(self, block: GatedBlock, x: Tensor) -> Tensor:
        out = F.relu(block.bn1(block.conv1(x)), inplace=True)
        out = block.bn2(block.conv2(out))
        if isinstance(block, Bottleneck):
            out = block.bn3(block.conv3(F.relu(out, inplace=True)))
        return out

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(N, 3, H, W) -> logits (N, K) and one (N, 1, 1) tensor per block."""
        x = F.relu(self.model.bn1(self.model.conv1(x)), inplace=True)
        if isinstance(self.model, ResNet_ImageNet):
            x = F.max_pool2d(x, 3, 2, 1)
        gates = []
        scale = torch.mul if torch.is_grad_enabled() else Tensor.mul_  # a gradient needs the branch itself
        for block in self.model.blocks():
            w = sample_gate(block, x, self.noise)
            if self.open_gates:
                w = torch.ones_like(w)
            shortcut = block.shortcut(x)
            x = scale(self.residual(block, x), w[:, 1].unsqueeze(1)).add_(shortcut)
            x = F.relu(x, inplace=True)
            gates.append(w[:, 1])
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.model.linear(x), gates


def target_rate_loss(gates: list[Tensor], target: float) -> Tensor:
    """The original's loop over the blocks."""
    return sum((target - gate.mean()) ** 2 for gate in gates) / len(gates)
