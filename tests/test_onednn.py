"""oneDNN's fused convolutions give what the plain ones give, and are not used where they do not."""

import pytest
import torch
import torch.nn.functional as F

from aig import onednn
from aig.onednn import PackedWeight


@pytest.mark.skipif(not onednn.fused_kernels(), reason="this torch has no fused oneDNN kernels")
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_a_packed_weight_computes_the_convolution_for_every_shape_that_follows(groups, activation):
    random = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(8, 4 // groups, 3, 3, generator=random), torch.randn(8, generator=random)
    packed = PackedWeight(weight, bias, (2, 2), (1, 1), groups)
    function = torch.relu if activation == "relu" else torch.clone
    for count, size in ((1, 9), (1, 9), (3, 9), (1, 12), (1, 9)):
        x = torch.randn(count, 4, size, size, generator=random).contiguous(memory_format=torch.channels_last)
        expected = F.conv2d(x, weight, bias, 2, 1, groups=groups)
        torch.testing.assert_close(packed(x, activation, None), function(expected), rtol=1e-5, atol=1e-5)
        if activation == "none":  # oneDNN has no sum without a ReLU
            continue
        into = torch.randn(expected.shape, generator=random).contiguous(memory_format=torch.channels_last)
        expected = (expected + into).relu()
        found = packed(x, activation, into)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(found, into)  # written over it


@pytest.mark.skipif(not onednn.fused_kernels(), reason="this torch has no fused oneDNN kernels")
def test_a_weight_is_packed_once_for_any_number_of_images(monkeypatch):
    shapes, pack = [], onednn.pack
    monkeypatch.setattr(onednn, "pack", lambda *args: (shapes.append(tuple(args[-1])), pack(*args))[1])
    packed = PackedWeight(torch.randn(8, 4, 3, 3), torch.randn(8), (1, 1), (1, 1), 1)
    for count, size in ((3, 9), (1, 9), (16, 9), (2, 12)):
        packed(torch.randn(count, 4, size, size).contiguous(memory_format=torch.channels_last), "relu", None)
    assert shapes == [(3, 4, 9, 9), (2, 4, 12, 12)]


def test_kernels_that_miscompute_or_have_gone_are_not_used(monkeypatch):
    monkeypatch.setattr(onednn, "pack", lambda weight, *args: weight + 1)
    assert onednn.fused_kernels.__wrapped__() is None

    def gone(*args):
        raise AttributeError

    monkeypatch.setattr(onednn, "pack", gone)
    assert onednn.fused_kernels.__wrapped__() is None


def test_trying_the_kernels_leaves_the_callers_seed_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    onednn.fused_kernels.__wrapped__()
    assert torch.equal(torch.rand(1), expected)
