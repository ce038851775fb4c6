"""The accelerated network has the masked one's outputs, runs only open branches, and costs what is counted.

With fused kernels of oneDNN and without: float32 on a CPU uses them, float64 does not.
"""

import copy
import functools
import math
import pickle
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from steps import unsettle_norms
from torch.utils.flop_counter import FlopCounterMode

import convnet_aig
from aig import inference, onednn
from convnet_aig import BasicBlock, Bottleneck, ResNet50_ImageNet, ResNet110_cifar, ResNet_cifar, ResNet_ImageNet

PLAIN, ADDED = "_convolution_pointwise", "_convolution_pointwise_"  # the fused kernels, where this torch has them
CERTAIN = 1e4


def unsettle(model):
    """Statistics, weights and gates as if after training: nothing at its initial value, gates far from sure."""
    torch.manual_seed(1)
    unsettle_norms(model)
    for block in model.blocks():
        if block.gated:
            torch.nn.init.normal_(block.fc2.weight, 0, 2)
            torch.nn.init.zeros_(block.fc2.bias)
    return model.eval()


def built_once(build):
    """Copies of a network, because building it takes longer."""
    original = functools.cache(build)
    return lambda dtype=torch.float64: copy.deepcopy(original()).to(dtype)


@built_once
def cifar():
    torch.manual_seed(0)
    return unsettle(ResNet_cifar(BasicBlock, (2, 3, 2), 5))


@built_once
def photo():
    torch.manual_seed(0)
    return unsettle(ResNet_ImageNet(Bottleneck, (2, 2, 1, 1), 7, [1, 0.5, 0.5, 0.5, 1, 0.5]))


@built_once
def grouped():
    torch.manual_seed(0)
    rates = [0.5, 0.5, 1, 0.5, 0.5]
    return unsettle(ResNet_ImageNet(Bottleneck, (1, 2, 1, 1), 5, rates, groups=2, width_per_group=16))


NETWORKS = {"BasicBlock": (cifar, (16, 16)), "Bottleneck": (photo, (36, 36)), "grouped": (grouped, (36, 36))}


def images(n, size, dtype=torch.float64):
    return torch.randn(n, 3, *size, dtype=dtype, generator=torch.Generator().manual_seed(n))


def outputs(network, x, seed=0):
    """Logits (N, K) and gates (N, L)."""
    torch.manual_seed(seed)
    with torch.no_grad():
        logits, gates = network(x)
    return logits, torch.stack(gates, dim=1)


def assert_same(model, fast, x):
    (logits, gates), (fast_logits, fast_gates) = outputs(model, x), outputs(fast, x)
    if model.gate_mode == "expected":  # probabilities, not decisions
        torch.testing.assert_close(fast_gates, gates, rtol=0, atol=1e-12)
    else:
        assert torch.equal(gates, fast_gates)
    torch.testing.assert_close(fast_logits, logits, rtol=0, atol=1e-9)
    return gates


class Forced(inference.Accelerated):
    """Decides by `pattern` (gates, N), computing the gates all the same."""

    def bias(self, x, noise, device):
        return torch.where(self.pattern, CERTAIN, -CERTAIN).to(x)


def force(model, monkeypatch, pattern):
    """Makes the masked network decide by the same pattern, through the noise that it draws."""
    noise = torch.where(pattern, CERTAIN, -CERTAIN).double()
    monkeypatch.setattr(convnet_aig, "draw_noise", lambda gates, n, x: torch.stack([-noise, noise], dim=2).to(x) / 2)
    model.gate_mode = "sample"
    fast = Forced(model)
    fast.pattern = pattern
    return fast


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("mode", convnet_aig.GATE_MODES)
def test_gates_and_logits_are_those_of_the_masked_network(device, kind, mode):
    build, size = NETWORKS[kind]
    model = build().to(device)
    model.gate_mode = mode
    fast = inference.accelerate(model)
    rates = [assert_same(model, fast, images(n, size).to(device)).mean().item() for n in (1, 2, 5, 12)]
    assert mode == "all" or 0.1 < rates[-1] < 0.9  # else there would be nothing to tell
    fast.conditional = False
    assert_same(model, fast, images(5, size).to(device))


@pytest.mark.parametrize(
    ("kind", "size"), [("BasicBlock", (17, 40)), ("Bottleneck", (81, 50)), ("Bottleneck", (33, 33))]
)
def test_images_of_any_size_and_shape(device, kind, size):
    model = NETWORKS[kind][0]().to(device)
    assert_same(model, inference.accelerate(model), images(4, size).to(device))


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("pattern", ["all open", "all closed", "one gate open", "one image open"])
def test_extreme_patterns(device, kind, pattern, monkeypatch):
    build, size = NETWORKS[kind]
    model = build().to(device)
    gates = sum(block.gated for block in model.blocks())
    for n in (1, 4):
        is_open = torch.full((gates, n), pattern == "all open")
        is_open[2] |= pattern == "one gate open"
        is_open[:, 0] |= pattern == "one image open"
        z = assert_same(model, force(model, monkeypatch, is_open), images(n, size).to(device)).cpu()
        assert torch.equal(z[:, [block.gated for block in model.blocks()]].bool().t(), is_open)


@pytest.fixture
def hypothesis():
    return pytest.importorskip("hypothesis", reason="hypothesis is not installed")


def test_any_pattern(hypothesis):
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=12, deadline=None)
    @hypothesis.given(st.data())
    def is_the_same(data):
        build, size = NETWORKS[data.draw(st.sampled_from(sorted(NETWORKS)))]
        model, n = build(), data.draw(st.integers(1, 9))
        gates = sum(block.gated for block in model.blocks())
        rows = st.lists(st.booleans(), min_size=n, max_size=n)
        pattern = torch.tensor(data.draw(st.lists(rows, min_size=gates, max_size=gates)))
        with pytest.MonkeyPatch.context() as monkeypatch:
            assert_same(model, force(model, monkeypatch, pattern), images(n, size))

    is_the_same()


@pytest.mark.parametrize("kind", NETWORKS)
def test_float32_to_1e_4_away_from_the_threshold(kind):
    build, size = NETWORKS[kind]
    model = build(torch.float32)
    for n in (1, 7):
        x = images(n, size, torch.float32)
        logits, gates = outputs(model, x)
        fast_logits, fast_gates = outputs(inference.accelerate(model), x)
        clear = distance_to_threshold(model, x) > 1e-5
        assert clear.float().mean() > 0.9
        assert torch.equal(gates[clear], fast_gates[clear])
        torch.testing.assert_close(fast_logits[clear], logits[clear], rtol=0, atol=1e-4)


def distance_to_threshold(model, x):
    """The least |P(open) - threshold| over the gates on each image's way, (N,)."""
    least, h = torch.ones(len(x)), model.stem(x)
    for block in model.blocks():
        if block.gated:
            p = torch.softmax(block.gate_logits(h), 1)[:, 1]
            least = torch.minimum(least, (p - model.threshold).abs())
        h, _ = block(h, "argmax", model.threshold)
    return least.detach()


@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_a_gate_exactly_at_the_threshold_is_closed(n, conditional):
    model = cifar()
    for block in model.blocks():
        torch.nn.init.zeros_(block.fc2.weight)
        torch.nn.init.zeros_(block.fc2.bias)
    fast = inference.accelerate(model)
    fast.conditional = conditional
    assert (assert_same(model, fast, images(n, (16, 16))) == 0).all()


def test_after_real_training():
    torch.manual_seed(0)
    model = ResNet_cifar(BasicBlock, (2, 2, 2), 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    x, y = images(32, (12, 12), torch.float32), torch.arange(32) % 4
    x = x + y.view(-1, 1, 1, 1)  # something to learn
    for _ in range(30):
        logits, gates = model.train()(x)
        loss = F.cross_entropy(logits, y) + 2 * (0.5 - torch.stack(gates).mean(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1.5
    model.eval()
    for threshold in (0.3, 0.5, 0.8):
        model.threshold = threshold
        (logits, gates), (fast_logits, fast_gates) = outputs(model, x), outputs(inference.accelerate(model), x)
        clear = distance_to_threshold(model, x) > 1e-5
        assert torch.equal(gates[clear], fast_gates[clear])
        torch.testing.assert_close(fast_logits[clear], logits[clear], rtol=0, atol=1e-4)
    assert_same(model.double(), inference.accelerate(model), x.double())


def test_large_batches_go_through_in_chunks_and_photographs_one_by_one(monkeypatch):
    model = cifar()
    fast = inference.accelerate(model)
    assert fast.chunk_size(images(200, (32, 32))) == inference.CHUNK_PIXELS // 1024
    assert inference.accelerate(ResNet50_ImageNet().eval()).chunk_size(torch.empty(8, 3, 224, 224)) == 1
    for size in (1, 3):
        monkeypatch.setattr(inference.Accelerated, "chunk_size", lambda self, x, size=size: size)
        for model.gate_mode in convnet_aig.GATE_MODES:
            fast.gate_mode = model.gate_mode
            assert_same(model, fast, images(7, (32, 32)))


def executed_convolutions(network, x):
    """How often a convolution kernel was called, seen by the profiler."""
    with torch.profiler.profile(acc_events=True) as profile:
        network(x)
    calls = Counter({event.key: event.count for event in profile.key_averages()})
    return calls["aten::convolution"] + calls[f"mkldnn::{PLAIN}"] + calls[f"mkldnn::{ADDED}"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 3])
def test_the_convolutions_of_a_closed_branch_are_never_called(n, dtype, monkeypatch):
    model = cifar(dtype)
    fixed = 1 + 2  # the stem and two shortcuts
    for is_open in (torch.zeros(7, n), torch.eye(7, n), torch.ones(7, n)):
        fast = force(model, monkeypatch, is_open.bool())
        x = images(n, (32, 32), dtype)
        fast(x)
        running = is_open.any(1).sum().item()  # a branch runs if any of the images needs it
        assert executed_convolutions(fast, x) == fixed + 2 * running


def test_a_mixed_batch_convolves_only_the_open_images(monkeypatch):
    seen = []
    call = inference.Convolution.__call__
    monkeypatch.setattr(
        inference.Convolution, "__call__", lambda self, x, *a, **k: (seen.append(len(x)), call(self, x, *a, **k))[1]
    )
    model, n = cifar(), 6
    pattern = torch.rand(7, n, generator=torch.Generator().manual_seed(0)) < 0.5
    force(model, monkeypatch, pattern)(images(n, (32, 32)))
    expected = [n]  # the stem
    for block, count in zip(model.blocks(), pattern.sum(1).tolist(), strict=True):
        expected += [n] * bool(len(block.shortcut)) + [count] * 2 * (count > 0)
    assert seen == expected


def test_counts_equal_torchs_own_on_what_ran(hypothesis):
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=8, deadline=None)
    @hypothesis.given(st.data())
    def is_equal(data):
        build, _ = NETWORKS[data.draw(st.sampled_from(sorted(NETWORKS)))]
        size = data.draw(st.tuples(st.integers(16, 40), st.integers(16, 40)))
        model, n = build(), data.draw(st.integers(1, 4))
        cost = inference.count_macs(model, size)
        fast = inference.accelerate(model)
        for mode in convnet_aig.GATE_MODES:
            fast.gate_mode = mode
            with FlopCounterMode(display=False) as counter:
                _, gates = fast(images(n, size))
            ran = torch.ones(n, len(gates)) if mode in convnet_aig.RUNS_EVERYTHING else torch.stack(gates, dim=1)
            counted = cost.executed(ran, gates=mode != "all")
            assert counter.get_total_flops() == 2 * counted.sum().item()
        with FlopCounterMode(display=False) as counter:  # in mode "all" now
            fast(images(1, size))
        assert counter.get_total_flops() == 2 * cost.dense

    is_equal()


@pytest.mark.parametrize("n", [1, 3])
def test_what_no_branch_has_changed_is_not_pooled_again(n, monkeypatch):
    rows, pool = [], convnet_aig.FoldedGate.pool
    monkeypatch.setattr(convnet_aig.FoldedGate, "pool", lambda self, x: (rows.append(len(x)), pool(self, x))[1])
    pattern = torch.zeros(7, n).bool()
    pattern[3, 0] = True
    force(cifar(), monkeypatch, pattern)(images(n, (16, 16)))
    # of stages of 2, 3 and 2 blocks: anew after the stem and after each shortcut, one image after its branch
    assert rows == [n, n, 1, n]


def test_the_fused_kernels_run_the_same_convolutions():
    if not onednn.fused_kernels():
        pytest.skip("this torch has no fused oneDNN kernels")
    from torch.utils.flop_counter import conv_flop_count

    def plain(x, weight, *args, out_shape, **kwargs):
        return conv_flop_count(x, weight, out_shape)

    def added(into, x, weight, *args, out_shape, **kwargs):
        return conv_flop_count(x, weight, out_shape)

    mapping = {getattr(torch.ops.mkldnn, PLAIN): plain, getattr(torch.ops.mkldnn, ADDED): added}
    model = cifar(torch.float32)
    for n in (1, 5):
        x = images(n, (24, 24), torch.float32)
        fast = inference.accelerate(model)
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            _, gates = fast(x)
        counted = inference.count_macs(model, 24).executed(torch.stack(gates, dim=1))
        assert counter.get_total_flops() == 2 * counted.sum().item()


def test_dense_counts_of_the_papers_networks():
    with torch.device("meta"):
        assert round(inference.count_macs(ResNet110_cifar(), 32).dense / 1e9, 3) == 0.253
        assert round(inference.count_macs(ResNet50_ImageNet(), 224).dense / 1e9, 2) == 4.09


def test_without_fused_kernels_the_outputs_are_the_same(monkeypatch):
    model, x = cifar(torch.float32), images(5, (32, 32), torch.float32)
    expected = outputs(inference.accelerate(model), x)
    monkeypatch.setattr(inference, "fused_kernels", lambda: None)
    plain = outputs(inference.accelerate(model), x)
    assert torch.equal(plain[1], expected[1])
    torch.testing.assert_close(plain[0], expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("mode", convnet_aig.GATE_MODES)
def test_what_is_not_finite_is_not_hidden(n, mode):
    model, x = cifar(torch.float32), images(n, (16, 16), torch.float32)
    model.gate_mode = mode
    fast = inference.accelerate(model)
    for bad in (math.nan, math.inf):
        spoilt = x.clone()
        spoilt[-1, 0, 3, 3] = bad
        finite = outputs(fast, spoilt)[0].isfinite().all(1)
        assert finite.tolist() == [True] * (n - 1) + [False]
    *_, block = model.blocks()
    shortcut = next(block.shortcut[0] for block in model.blocks() if len(block.shortcut))
    for parameter in (model.conv1.weight, block.conv2.weight, block.bn2.bias, shortcut.weight):
        kept = parameter.data.clone()
        parameter.data[0] = math.nan
        fast = inference.accelerate(model)
        fast.gate_mode = "all"  # a closed branch is not computed, whatever it holds
        assert not outputs(fast, x)[0].isfinite().any()
        parameter.data = kept


def test_no_images_give_no_logits():
    model = cifar(torch.float32)
    for model.gate_mode in convnet_aig.GATE_MODES:
        logits, gates = inference.accelerate(model)(images(0, (16, 16), torch.float32))
        assert (logits.shape, [z.shape for z in gates]) == ((0, 5), [(0,)] * 7)


def test_it_is_for_inference_only_and_leaves_the_network_alone():
    model = cifar(torch.float32)
    before = copy.deepcopy(model.state_dict())
    fast = inference.accelerate(model.train())
    x = images(3, (32, 32), torch.float32)
    kept = x.clone()
    logits, _ = fast(x)
    assert torch.equal(x, kept)
    assert not logits.requires_grad
    assert not fast(x.clone().requires_grad_())[0].requires_grad
    assert not fast.training
    assert fast.eval() is fast
    with pytest.raises(RuntimeError, match="for inference only"):
        fast.train()
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    fast.double()
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    fast.gate_mode = "maybe"
    with pytest.raises(ValueError, match="choose from argmax"):
        fast(x.double())


def test_it_can_be_moved_copied_and_saved():
    model = cifar(torch.float32)
    fast, x = inference.accelerate(model), images(1, (32, 32), torch.float32)
    logits, _ = fast(x)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(twin(x)[0], logits)
        assert bool(twin.conv1.fused) == bool(fast.conv1.fused)
    smaller = images(1, (20, 28), torch.float32)
    assert torch.equal(fast(smaller)[0], inference.accelerate(model)(smaller)[0])
    fast.double()
    torch.testing.assert_close(fast(x.double())[0], logits.double(), rtol=1e-4, atol=1e-4)
    assert torch.equal(fast.float()(x)[0], logits)


def test_given_a_batch_it_chooses_a_form_and_the_outputs_stay(monkeypatch):
    model, x = cifar(), images(3, (32, 32))
    chosen = []
    for times in ([1, 2], [2, 1]):
        monkeypatch.setattr(inference, "time_forward", lambda network, images, times=times: times.pop(0))
        fast = inference.accelerate(model, x)
        chosen.append(fast.conditional)
        assert_same(model, fast, x)
    assert chosen == [True, False]
    monkeypatch.undo()
    assert inference.time_forward(fast, x, repeats=1) > 0


def test_the_choice_of_a_form_draws_nothing_and_skips_in_every_mode(monkeypatch):
    model, x, tried = cifar(), images(3, (32, 32)), []
    monkeypatch.setattr(inference, "time_forward", lambda network, images: tried.append(network.gate_mode) or 1)
    for model.gate_mode in convnet_aig.GATE_MODES:
        assert inference.accelerate(model, x).gate_mode == model.gate_mode
    assert set(tried) == {"argmax"}


@pytest.mark.parametrize("change", ["double", "half", "byte"])
def test_input_of_another_dtype_or_shape_is_named(change):
    fast, x = inference.accelerate(cifar(torch.float32)), images(2, (16, 16), torch.float32)
    for wrong in (getattr(x, change)(), x[0], x[:, :1], x[:, 0]):
        with pytest.raises(ValueError, match=r"images must be \(N, 3, H, W\) in torch\.float32, not \("):
            fast(wrong)


@pytest.mark.parametrize("fused", [True, False])
def test_under_autocast_gates_decide_in_full_precision(fused, monkeypatch):
    if not fused:
        monkeypatch.setattr(inference, "fused_kernels", lambda: None)
    fast, x, dtypes = inference.accelerate(cifar(torch.float32)), images(4, (16, 16), torch.float32), []
    call = convnet_aig.FoldedGate.__call__
    monkeypatch.setattr(convnet_aig.FoldedGate, "__call__",
                        lambda *args: dtypes.append((found := call(*args)).dtype) or found)
    with torch.autocast("cpu", torch.bfloat16):
        for batch in (x, x[:1], x.bfloat16(), x.double()):
            logits, _ = fast(batch)
            assert logits.isfinite().all()
    assert set(dtypes) == {torch.float32}


def test_a_forward_pass_on_a_device_is_timed_to_its_end(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: calls.append(device.type))
    images = torch.zeros(1, device="meta")
    assert inference.time_forward(lambda x: calls.append("forward"), images, repeats=2) > 0
    assert calls == ["forward", "meta"] * 3


def test_a_timing_is_the_best_of_several_after_one_to_warm_up(monkeypatch):
    took, clock = [1, 5, 3, 4], [0.0]
    monkeypatch.setattr(inference.time, "perf_counter", lambda: clock[0])

    def network(x):
        clock[0] += took.pop(0)

    assert inference.time_forward(network, torch.zeros(1), repeats=3) == 3
    assert took == []
