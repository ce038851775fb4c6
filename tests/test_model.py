"""The networks have the paper's sizes, gates that open as the paper says, and four gate modes."""

import math

import pytest
import torch
import torch.nn.functional as F

import convnet_aig
from convnet_aig import BasicBlock, Bottleneck, ResNet_cifar, ResNet_ImageNet

PLAIN = {"ResNet50_ImageNet": 25_557_032, "ResNet101_ImageNet": 44_549_160, "ResNet152_ImageNet": 60_192_808}


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.fixture
def small():
    torch.manual_seed(0)
    return ResNet_cifar(BasicBlock, (2, 2, 2), 5).double().eval()


@pytest.fixture
def images():
    return torch.randn(64, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def unsettle(model):
    """Gates that are neither all open nor all closed."""
    for block in model.blocks():
        torch.nn.init.normal_(block.fc2.weight, 0, 2)
        torch.nn.init.zeros_(block.fc2.bias)
    return model


@pytest.mark.parametrize(
    ("constructor", "blocks", "count"),
    [
        ("ResNet110_cifar", 54, 1_766_630),
        ("ResNet50_ImageNet", 16, 25_768_264),
        ("ResNet101_ImageNet", 33, 45_040_314),
        ("ResNet152_ImageNet", 50, 60_931_116),
    ],
)
def test_parameter_counts_are_those_of_the_paper(constructor, blocks, count):
    with torch.device("meta"):
        model = getattr(convnet_aig, constructor)()
        assert (len(list(model.blocks())), parameters(model)) == (blocks, count)
        ungated = getattr(convnet_aig, constructor)(target_rates=[1] * blocks)
    gates = sum(17 * b.conv1.in_channels - b.conv1.in_channels + 16 + 32 + 34 for b in model.blocks())
    assert parameters(ungated) == count - gates == PLAIN.get(constructor, count - gates)


def test_parameter_keys_are_the_public_ones():
    with torch.device("meta"):
        keys = set(ResNet_ImageNet(Bottleneck, (1, 1, 1, 1)).state_dict())
    assert {"conv1.weight", "bn1.running_var", "layer4.0.conv3.weight", "layer2.0.shortcut.1.weight"} <= keys
    assert {"layer1.0.fc1.bias", "layer1.0.fc1bn.weight", "layer1.0.fc2.weight", "linear.bias"} <= keys
    assert not any("gate" in key for key in keys)


def test_a_fresh_gate_is_open_with_probability_087(images):
    torch.manual_seed(0)
    model = ResNet_cifar(BasicBlock, (3, 3, 3)).double().train()
    z = torch.cat([torch.stack(model(images)[1]) for _ in range(20)])
    p = 1 / (1 + math.exp(0.1 - 2.0))
    # the weights, N(0, 0.001), move a block's log-odds by 0.001 sqrt(2 sum_16 h^2), where h = relu(N(0, 1))
    moved = p * (1 - p) * 0.001 * (2 * 16 * 0.5) ** 0.5
    assert abs(z.mean().item() - p) < 4 * (p * (1 - p) / z.numel()) ** 0.5 + 4 * moved


def test_forward_returns_logits_and_one_multiplier_per_block(small, images):
    logits, gates = small(images)
    assert logits.shape == (64, 5)
    assert [tuple(z.shape) for z in gates] == [(64,)] * 6


@pytest.mark.parametrize("mode", convnet_aig.GATE_MODES)
def test_a_gate_mode_multiplies_the_branch_by_its_z(small, images, mode):
    unsettle(small).gate_mode = mode
    torch.manual_seed(1)
    logits, gates = small(images)
    x = small.stem(images)
    for block, z in zip(small.blocks(), gates, strict=True):
        x = F.relu(block.shortcut(x) + z.view(-1, 1, 1, 1) * block.residual(x))
    torch.testing.assert_close(small.linear(x.mean((2, 3))), logits)


def probabilities(model, images):
    """P(open) of each block along the path that the argmax takes."""
    x, result = model.stem(images), []
    for block in model.blocks():
        result.append(torch.softmax(block.gate_logits(x), 1)[:, 1])
        x, _ = block(x, "argmax")
    return torch.stack(result)


def test_argmax_opens_where_p_exceeds_the_threshold_and_repeats(small, images):
    p = probabilities(unsettle(small), images)
    first, second = small(images), small(images)
    assert torch.equal(torch.stack(first[1]), (p > 0.5).double())
    assert torch.equal(first[0], second[0])
    small.threshold = 0.8
    block, x = next(small.blocks()), small.stem(images)
    assert torch.equal(small(images)[1][0], (torch.softmax(block.gate_logits(x), 1)[:, 1] > 0.8).double())


def test_sample_differs_between_seeds_and_agrees_in_the_mean_with_p(small, images):
    unsettle(small).gate_mode = "sample"
    n, block = 100, next(small.blocks())
    p = torch.softmax(block.gate_logits(small.stem(images)), 1)[:, 1]
    draws = []
    for seed in range(n):
        torch.manual_seed(seed)
        draws.append(small(images)[1][0])
    draws = torch.stack(draws)
    assert not torch.equal(draws[0], draws[1])
    # over images and seeds together; the variance of the mean is at most 1/4 of one over their number
    assert abs(draws.mean() - p.mean()) < 4 * 0.5 / (n * len(images)) ** 0.5


def test_expected_scales_by_p_and_all_is_the_plain_resnet(small, images):
    unsettle(small)
    plain = ResNet_cifar(BasicBlock, (2, 2, 2), 5, target_rates=[1] * 6).double().eval()
    plain.load_state_dict({k: v for k, v in small.state_dict().items() if "fc" not in k})
    small.gate_mode = "all"
    torch.testing.assert_close(small(images)[0], plain(images)[0], rtol=1e-9, atol=0)
    small.gate_mode = "expected"
    first = small(images)[1][0]
    torch.testing.assert_close(first, probabilities(small, images)[0])


def test_training_samples_whatever_the_gate_mode(small, images):
    unsettle(small).train().gate_mode = "all"
    torch.manual_seed(0)
    first = torch.stack(small(images)[1])
    assert 0 < first.mean() < 1
    assert not torch.equal(first, torch.stack(small(images)[1]))


def test_temperature_reaches_the_gradient_and_changes_no_decision(small, images):
    unsettle(small).train()
    results = []
    for tau in (1, 5):
        torch.manual_seed(0)
        small.zero_grad()
        logits, gates = small(images, temperature=tau)
        logits.square().sum().backward()
        results.append((torch.stack(gates), next(small.blocks()).fc2.weight.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.allclose(results[0][1], results[1][1], rtol=0.01)


def test_blocks_at_rate_1_have_no_gate_and_report_1(images):
    model = ResNet_cifar(BasicBlock, (2, 2, 2), target_rates=[1, 0.5, 1, 0, 1.0, 0.999]).double()
    assert [block.gated for block in model.blocks()] == [False, True, False, True, False, True]
    assert not any(key.startswith(("layer1.0.fc", "layer2.0.fc", "layer3.0.fc")) for key in model.state_dict())
    for mode in (model.train(), model.eval()):
        gates = mode(images)[1]
        assert all((gates[block] == 1).all() for block in (0, 2, 4))


@pytest.mark.parametrize(
    ("rates", "message"),
    [([0.5] * 5, "5 target rates for 6 blocks"), ([0.5] * 5 + [1.5], r"1\.5 of block 6"), ([float("nan")] * 6, "nan")],
)
def test_target_rates_that_do_not_fit_are_an_error(rates, message):
    with pytest.raises(ValueError, match=message):
        ResNet_cifar(BasicBlock, (2, 2, 2), target_rates=rates)


def test_an_unknown_gate_mode_is_an_error(small, images):
    small.gate_mode = "maybe"
    with pytest.raises(ValueError, match="choose from argmax, sample, expected, all"):
        small(images)


def test_imagenet_networks_start_with_the_originals_distribution():
    torch.manual_seed(0)
    model = ResNet_ImageNet(Bottleneck, (1, 1, 1, 1), num_classes=7)
    for name in ("layer4.0.conv2", "layer4.0.fc1", "layer2.0.shortcut.0", "conv1"):
        conv = model.get_submodule(name)
        k, n = conv.kernel_size[0], conv.weight.numel()
        std = math.sqrt(2 / (k * k * conv.out_channels))
        assert abs(conv.weight.std().item() / std - 1) < 4 / math.sqrt(2 * n)
    fc2 = model.get_submodule("layer4.0.fc2")
    assert fc2.weight.std() < 0.002
    assert fc2.bias.tolist() == pytest.approx([0.1, 2.0])


def test_imagenet_forward_downsamples_to_one_thirty_second():
    model = ResNet_ImageNet(Bottleneck, (1, 1, 1, 1), num_classes=7).eval()
    logits, gates = model(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 7)
    assert len(gates) == 4
