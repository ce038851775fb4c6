"""The network computes what the authors' code computed: `golden/` holds one step of it in float64, noise at zero."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import convnet_aig
from convnet_aig import BasicBlock, ResNet_cifar
from engine import target_rate_loss

GOLDEN = np.load(Path(__file__).parent / "golden" / "cifar_basicblock_222.npz")
ATOL = 1e-8


def section(name):
    return {key.removeprefix(name): torch.from_numpy(GOLDEN[key]) for key in GOLDEN if key.startswith(name)}


@pytest.fixture
def network(monkeypatch):
    monkeypatch.setattr(convnet_aig, "gumbel_noise", torch.zeros_like)
    model = ResNet_cifar(BasicBlock, [2, 2, 2]).double()
    model.load_state_dict(section("state/"), strict=True)
    return model


def close(actual, expected):
    torch.testing.assert_close(actual, torch.as_tensor(expected), rtol=0, atol=ATOL)


def test_eval_forward_matches_the_original(network):
    logits, gates = network.eval()(torch.from_numpy(GOLDEN["x"]))
    close(logits, GOLDEN["eval/logits"])
    close(torch.stack(gates, 1), GOLDEN["eval/gates"])


def test_one_training_step_matches_the_original(network):
    logits, gates = network.train()(torch.from_numpy(GOLDEN["x"]))
    z = torch.stack(gates, 1)
    classify = F.cross_entropy(logits, torch.from_numpy(GOLDEN["y"]))
    target = float(GOLDEN["lossfact"]) * target_rate_loss(z.mean(0), torch.from_numpy(GOLDEN["target_rates"]))
    (classify + target).backward()

    close(logits, GOLDEN["train/logits"])
    close(z, GOLDEN["train/gates"])
    close(classify, GOLDEN["train/loss_classify"])
    close(target, GOLDEN["train/loss_target"])
    gradients = section("grad/")
    assert set(gradients) == {name for name, _ in network.named_parameters()}
    for name, parameter in network.named_parameters():
        close(parameter.grad, gradients[name])
    buffers = dict(network.named_buffers())
    for name, expected in section("after/").items():
        close(buffers[name], expected)
