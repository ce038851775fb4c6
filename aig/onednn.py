"""oneDNN's fused convolutions on CPUs: with a ReLU, and with a sum and a ReLU, in one call.

torch.compile uses them, but torch does not offer them as a public interface. So they are compared with the plain
convolution before they are used, and `aig.inference` does without them where they are missing or wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def fused_kernels() -> tuple[Callable, Callable] | None:
    """oneDNN's convolution with a ReLU, and the one that also adds to its first argument in place; None without them.

    torch.compile uses them, but they are no public interface: so they are tried before they are trusted.
    """
    if not torch.backends.mkldnn.is_available():
        return None
    options = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float32, "device": "cpu"}
    weight, bias = torch.randn(8, 8, 3, 3, **options), torch.randn(8, **options)
    x, into = torch.randn(2, 2, 4, 4, 8, **options).permute(0, 1, 4, 2, 3)  # channels-last
    with torch.autocast("cpu", enabled=False):
        expected = F.conv2d(x, weight, bias, 1, 1)
    try:
        kernels = torch.ops.mkldnn._convolution_pointwise.default, torch.ops.mkldnn._convolution_pointwise_.binary
        packed, rest = pack(weight, (1, 1), (1, 1), 1, x.shape), (bias, (1, 1), (1, 1), (1, 1), 1)
        plain = kernels[0](x, packed, *rest, "relu", [], "")
        added = kernels[1](into.clone(), x, packed, *rest, "add", 1.0, "relu", [], "")
        right = plain.allclose(expected.relu(), atol=1e-4) and added.allclose((expected + into).relu(), atol=1e-4)
    except (AttributeError, RuntimeError, TypeError):
        return None
    return kernels if right else None


def pack(weight: Tensor, stride: tuple, padding: tuple, groups: int, shape: Sequence[int]) -> Tensor:
    """The weight of a convolution in the layout that oneDNN wants for inputs of this shape.

    So far the layout has not depended on the number of images. If it does, oneDNN packs anew in every call.
    """
    return torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, (1, 1), groups, list(shape))


class PackedWeight:
    """The weight of a convolution, packed for images of the size that it has seen last, any number of them.

    Args:
        weight: (C', C / groups, k, k), float32 on the CPU.
        bias: (C',).
    """

    def __init__(self, weight: Tensor, bias: Tensor, stride: tuple, padding: tuple, groups: int) -> None:
        self.weight, self.bias, self.stride, self.padding, self.groups = weight, bias, stride, padding, groups
        self.plain, self.added = fused_kernels()
        self.packed: Tensor | None = None
        self.shape: torch.Size | None = None  # of the last input

    def __call__(self, x: Tensor, activation: str, into: Tensor | None) -> Tensor:
        """activation(conv(x) + into), written over `into` if given; "relu", or without `into` "none"."""
        if x.shape != self.shape:
            self.prepare(x.shape)
        weight, bias, padding, stride, groups = self.packed, self.bias, self.padding, self.stride, self.groups
        if into is None:
            return self.plain(x, weight, bias, padding, stride, (1, 1), groups, activation, [], "")
        return self.added(into, x, weight, bias, padding, stride, (1, 1), groups, "add", 1.0, activation, [], "")

    def prepare(self, shape: torch.Size) -> None:
        """Packs the weight for inputs of this shape, unless only the number of images is new."""
        if self.shape is None or shape[1:] != self.shape[1:]:
            self.packed = pack(self.weight, self.stride, self.padding, self.groups, shape)
        self.shape = shape
