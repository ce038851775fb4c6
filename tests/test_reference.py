"""The yardstick of the benchmarks computes the original's numbers, and the same as our own code."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.reference import Reference, target_rate_loss
from convnet_aig import BasicBlock, Bottleneck, ResNet_cifar, ResNet_ImageNet

GOLDEN = np.load(Path(__file__).parent / "golden" / "cifar_basicblock_222.npz")


def test_reference_matches_the_golden_numbers():
    model = ResNet_cifar(BasicBlock, (2, 2, 2)).double()
    model.load_state_dict({k.removeprefix("state/"): torch.from_numpy(GOLDEN[k]) for k in GOLDEN if "state/" in k})
    reference, x = Reference(model, noise=False), torch.from_numpy(GOLDEN["x"])
    logits, gates = reference.eval()(x)
    np.testing.assert_allclose(logits.detach(), GOLDEN["eval/logits"], rtol=0, atol=1e-8)
    np.testing.assert_array_equal(torch.cat([z.flatten(1) for z in gates], 1).detach(), GOLDEN["eval/gates"])

    logits, gates = reference.train()(x)
    loss = F.cross_entropy(logits, torch.from_numpy(GOLDEN["y"])) + 2 * target_rate_loss(gates, 0.6)
    loss.backward()
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.grad, GOLDEN[f"grad/{name}"], rtol=0, atol=1e-8)
    for name, buffer in model.named_buffers():
        if f"after/{name}" in GOLDEN:
            np.testing.assert_allclose(buffer, GOLDEN[f"after/{name}"], rtol=0, atol=1e-8)


def test_reference_equals_the_network_with_all_gates_open():
    torch.manual_seed(0)
    model = ResNet_ImageNet(Bottleneck, (1, 2, 1, 1), num_classes=7).double().eval()
    model.gate_mode = "all"
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(Reference(model, open_gates=True)(x)[0], model(x)[0], rtol=1e-9, atol=1e-9)
