"""Networks that exist already: given gates, as the start of a training, as its teacher."""

import copy
import json

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from steps import PIXELS, Batches, small_loader, small_net
from torch.utils.flop_counter import FlopCounterMode

import aig
from aig import networks
from aig.checkpoint import BEST, CHECKPOINT, TEST
from aig.console import InputError
from aig.losses import Objective
from aig.networks import read_pretrained
from convnet_aig import ARCHS, BasicBlock, Bottleneck, ResNet_cifar, ResNet_ImageNet

QUICK = [("torchvision", "resnet18"), ("torchvision", "resnext50_32x4d"), ("timm", "resnet26")]
SLOW = [("torchvision", arch) for arch in ARCHS if hasattr(torchvision.models, arch)]
SLOW += [("timm", "resnet34"), ("timm", "wide_resnet50_2")]
FAMILY = [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW if each not in QUICK)]


def lived(model):
    """The network with running statistics that are not 0 and 1."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    return model.eval()


def plain_net():
    """A small network without gates."""
    torch.manual_seed(0)
    return lived(ResNet_cifar(BasicBlock, (1, 1, 1), 4, [1, 1, 1]))


# ---------------------------------------------------------------------------------------------- gates for a network


def theirs(library, name, **options):
    torch.manual_seed(0)
    if library == "timm":
        return lived(pytest.importorskip("timm").create_model(name, **options))
    return lived(getattr(torchvision.models, name)(**options))


@pytest.mark.parametrize(("library", "name"), FAMILY)
def test_a_gated_network_computes_what_the_plain_one_did(library, name):
    plain = theirs(library, name, num_classes=7)
    net = aig.gate(plain)
    images = torch.randn(2, 3, 64, 64)
    net.gate_mode = "all"
    with torch.no_grad():
        torch.testing.assert_close(net(images)[0], plain(images), rtol=1e-5, atol=1e-5)
        state = net.state_dict()
        again = ResNet_ImageNet(*structure(net))
        again.load_state_dict(state)
        net.gate_mode = again.gate_mode = "argmax"
        assert torch.equal(again.eval()(images)[0], net(images)[0])
        for block in net.blocks():  # gates that tell images apart
            torch.nn.init.normal_(block.fc2.weight, 0, 2)
            torch.nn.init.zeros_(block.fc2.bias)
        logits, gates = net(images)
        fast_logits, fast_gates = aig.accelerate(net)(images)
        in_float64 = aig.accelerate(copy.deepcopy(net).double())  # whose convolutions the counter knows
        with FlopCounterMode(display=False) as counter:
            _, executed = in_float64(images.double())
    assert [z.tolist() for z in fast_gates] == [z.tolist() for z in gates]
    torch.testing.assert_close(fast_logits, logits, rtol=1e-4, atol=1e-4)
    macs = aig.count_macs(net, 64).executed(torch.stack(executed, dim=1))
    assert counter.get_total_flops() == 2 * macs.sum().item()
    with FlopCounterMode(display=False) as counter:
        plain(images)
    assert counter.get_total_flops() == 2 * 2 * aig.count_macs(net, 64).dense

    before = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    labels = torch.tensor([1, 3])
    logits, gates = net.train()(images)
    Objective([0.5] * len(gates), 2)(logits, labels, gates, 2)[0].backward()
    optimizer.step()
    moved = [key for key, value in net.state_dict().items() if not torch.equal(value, before[key])]
    assert {"conv1.weight", "layer4.0.shortcut.0.weight", "linear.weight"} <= set(moved)
    assert any(key.endswith("fc2.weight") for key in moved)


def structure(net):
    """The arguments that build a network of the same structure."""
    (block, *_) = net.blocks()
    wide = {"groups": 1, "width_per_group": 64}
    if isinstance(block, Bottleneck):
        wide = {"groups": block.conv2.groups, "width_per_group": block.conv2.out_channels // block.conv2.groups}
    return type(block), net.stages, net.linear.out_features, None, wide["groups"], wide["width_per_group"]


def test_new_gates_start_as_open_as_asked():
    images = torch.rand(4, 3, 64, 64)
    for given, expected in (({}, networks.OPEN), ({"probability": 0.6}, 0.6)):
        net = aig.gate(torchvision.models.resnet18(num_classes=3), **given)
        net.gate_mode = "expected"
        with torch.no_grad():
            opened = torch.stack(net(images)[1])
        assert (opened - expected).abs().max() < 0.01


def test_blocks_at_rate_one_get_no_gate_and_rates_must_fit():
    net = aig.gate(torchvision.models.resnet18(num_classes=3), [1, 0.5, 1, 1, 0.5, 1, 1, 1])
    assert [block.gated for block in net.blocks()] == [False, True, False, False, True, False, False, False]
    assert net.target_rates == [1, 0.5, 1, 1, 0.5, 1, 1, 1]
    with pytest.raises(ValueError, match="3 target rates for 8 blocks"):
        aig.gate(torchvision.models.resnet18(num_classes=3), [1, 1, 1])


@pytest.mark.parametrize("probability", [0, 1, -0.1, float("nan")])
def test_a_probability_that_is_none_is_an_error(probability):
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        aig.gate(plain_net(), probability=probability)


def test_our_own_plain_network_gets_gates_too_and_keeps_its_classes():
    plain = plain_net()
    plain.classes = [*"abcd"]
    plain.train()
    plain.bn1.eval()  # frozen, as in fine-tuning
    net = aig.gate(plain)
    assert [plain.training, plain.bn1.training, plain.layer1[0].bn1.training] == [True, False, True]
    plain.eval()
    images = torch.randn(3, 3, 32, 32)
    net.gate_mode = "all"
    with torch.no_grad():
        assert torch.equal(net(images)[0], plain(images)[0])
    assert (net.num_gates, net.classes) == (3, [*"abcd"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_network_of_another_dtype_stays_in_it(dtype):
    net = aig.gate(plain_net().to(dtype))
    logits, gates = net(torch.randn(2, 3, 32, 32, dtype=dtype))
    assert {value.dtype for value in (*net.parameters(), logits, *gates)} == {dtype}


class OwnForward(torchvision.models.ResNet):
    def forward(self, x):
        return super().forward(x.flip(1))


def dilated():
    return torchvision.models.resnet50(replace_stride_with_dilation=[False, True, False])


def other_epsilon():
    return torchvision.models.resnet18(norm_layer=lambda planes: torch.nn.BatchNorm2d(planes, eps=1e-3))


UNFIT = {
    "an SE layer": (lambda: theirs("timm", "seresnet18"), r"layer1\.0\.se\.\S+ \(Conv2d\) does not fit"),
    "a deep stem": (lambda: theirs("timm", "resnet26d"), r"conv1\.0 \(Conv2d\) does not fit"),
    "anti-aliasing": (lambda: theirs("timm", "resnetblur18"), r"\(BlurPool2d\) does not fit"),
    "another normalisation": (lambda: theirs("timm", "resnet50_gn"), r"bn1 \(GroupNorm\) does not fit"),
    "another activation": (lambda: theirs("timm", "resnet18", act_layer="silu"), r"act1 \(SiLU\) does not fit"),
    "dilation": (dilated, r"layer3\.0\.conv2 does not fit: its stride is \(1, 1\) instead of \(2, 2\)"),
    "another epsilon": (other_epsilon, r"bn1 does not fit: its eps is 0.001"),
    "another network": (lambda: torchvision.models.vgg11(), r"features\.0 \(Conv2d\) does not fit"),
    "gates": (lambda: small_net(), r"layer1\.0\.fc1 \(Conv2d\) does not fit"),
    "a forward pass of its own": (lambda: OwnForward(torchvision.models.resnet.BasicBlock, (1, 1, 1, 1)),
                                  "OwnForward does not fit: it computes something else"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_what_is_no_plain_resnet_is_named(what):
    build, message = UNFIT[what]
    model = build()
    with pytest.raises(ValueError, match=message):
        aig.gate(model)


# ---------------------------------------------------------------------------------------------- weights to start from


def test_weights_come_from_pth_safetensors_and_checkpoints_of_ours(tmp_path):
    plain = theirs("torchvision", "resnet18", num_classes=7)
    torch.save(plain.state_dict(), tmp_path / "file.pth")
    save_file(plain.state_dict(), tmp_path / "file.safetensors")
    own = networks.build_like(networks.our_names(plain.state_dict()), [1.0] * 8)
    own.load_state_dict(networks.our_names(plain.state_dict()))
    (tmp_path / "run").mkdir()
    torch.save({"state_dict": own.state_dict(), "args": {"mean": [0.1] * 3, "std": [0.2] * 3}}, tmp_path / "run" / BEST)
    for source in ("file.pth", "file.safetensors", "run"):
        pretrained = read_pretrained(str(tmp_path / source))
        net = ResNet_ImageNet(BasicBlock, (2, 2, 2, 2), 7)
        assert pretrained.load_into(net).endswith(
            ": 122 tensors loaded; 72 gate tensors start fresh, open with probability 0.95")
        images = torch.randn(2, 3, 64, 64)
        net.eval().gate_mode = "all"
        with torch.no_grad():
            torch.testing.assert_close(net(images)[0], plain(images), rtol=1e-5, atol=1e-5)
        assert bool(pretrained.args) == (source == "run")


def test_a_head_of_other_classes_starts_fresh():
    trained, net = plain_net(), small_net()
    before = net.linear.weight.clone()
    pretrained = networks.Pretrained("FILE", trained.state_dict(), {"classes": [*"abcd"]})
    assert "the head starts fresh, as the file has 4 other classes" in pretrained.load_into(net, [*"abce"])
    assert torch.equal(net.linear.weight, before)
    assert "head" not in pretrained.load_into(net, [*"abcd"])
    assert torch.equal(net.linear.weight, trained.linear.weight)


def test_gates_in_the_weights_are_taken_over():
    trained, net = small_net(), small_net()
    for value in trained.state_dict().values():
        value.mul_(2)
    count = len(trained.state_dict())
    assert networks.Pretrained("FILE", trained.state_dict()).load_into(net) == f"FILE: {count} tensors loaded"
    assert torch.equal(net.layer1[0].fc2.weight, trained.layer1[0].fc2.weight)


@pytest.mark.parametrize("content", [b"", b"no safetensors", b"\xff" * 64])
def test_damaged_safetensors_are_an_input_error(content, tmp_path):
    (tmp_path / "file.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        read_pretrained(str(tmp_path / "file.safetensors"))


def test_torchvisions_weights_are_asked_for_by_name(monkeypatch):
    asked = []

    def fetched(self, **options):
        asked.append(self.name)
        return theirs("torchvision", "resnet18", num_classes=7).state_dict()

    monkeypatch.setattr(torchvision.models.ResNet50_Weights, "get_state_dict", fetched)
    read_pretrained("torchvision", "resnet50")
    assert "linear.weight" in read_pretrained("torchvision:IMAGENET1K_V2", "resnet50").state
    assert asked == ["IMAGENET1K_V1", "IMAGENET1K_V2"]
    with pytest.raises(InputError, match="torchvision has IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT of resnet50"):
        read_pretrained("torchvision:V9", "resnet50")
    with pytest.raises(InputError, match="torchvision has no network called resnet26"):
        read_pretrained("torchvision", "resnet26")
    with pytest.raises(InputError, match="no weights of networks for small images"):
        read_pretrained("torchvision")


def test_of_several_processes_the_first_one_fetches_the_weights(monkeypatch):
    calls = []

    class First:
        def __enter__(self):
            calls.append("enter")

        def __exit__(self, *error):
            calls.append("exit")

    monkeypatch.setattr(networks.distributed.World, "main_first", lambda self: First())
    fetch = lambda *args, **options: calls.append("get") or {}  # noqa: E731
    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", fetch)
    networks.download("torchvision", "resnet18")
    assert calls == ["enter", "get", "exit"]


# ---------------------------------------------------------------------------------------------- a teacher


def teacher_file(tmp_path, model, **args):
    torch.save({"state_dict": model.state_dict(), "args": args}, tmp_path / "teacher")
    return read_pretrained(str(tmp_path / "teacher"))


def test_a_teacher_gives_its_logits_for_images_normalised_as_its_own_were(tmp_path):
    plain, loader = plain_net(), small_loader(16)
    images, _ = next(loader.batches())
    same = networks.load_teacher(teacher_file(tmp_path, plain), loader, "cpu")
    with torch.no_grad():
        torch.testing.assert_close(same(images), plain(images)[0], rtol=1e-4, atol=1e-5)
    assert not same(images).requires_grad

    mean, std = [0.2, 0.3, 0.4], [0.1, 0.2, 0.3]
    path = teacher_file(tmp_path, plain, mean=mean, std=std, classes=loader.classes)
    other = networks.load_teacher(path, loader, "cpu")
    pixels = images * torch.tensor(PIXELS[1]).view(3, 1, 1) + torch.tensor(PIXELS[0]).view(3, 1, 1)
    seen = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(other(images), plain(seen)[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("net", [plain_net, small_net])
def test_a_teacher_computes_in_the_precision_of_the_training(net, tmp_path):
    model, loader, dtypes = net().eval(), small_loader(16), []
    images, _ = next(loader.batches())
    path = teacher_file(tmp_path, model)
    exact, rounded = (networks.load_teacher(path, loader, "cpu", dtype) for dtype in (None, torch.bfloat16))
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _, out: dtypes.append(out.dtype) if isinstance(module, torch.nn.Conv2d) else None)
    try:
        logits = rounded(images)
    finally:
        handle.remove()
    assert set(dtypes) == {torch.bfloat16}
    assert (logits.dtype, logits.requires_grad) == (torch.float32, False)
    torch.testing.assert_close(logits, exact(images), rtol=0.05, atol=0.05)
    assert not torch.equal(logits, exact(images))


def test_a_teacher_of_other_classes_is_an_error(tmp_path):
    loader = small_loader(16, classes=3)
    with pytest.raises(InputError, match="knows 4 classes, but the images have 3"):
        networks.load_teacher(teacher_file(tmp_path, plain_net()), loader, "cpu")
    images = Batches(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))
    with pytest.raises(InputError, match="classes of the teacher"):
        networks.load_teacher(teacher_file(tmp_path, plain_net(), classes=[*"wxyz"]), images, "cpu")


def test_a_gated_teacher_decides_at_the_threshold_that_it_was_saved_with(tmp_path):
    gated, loader = small_net().eval(), small_loader(16)
    images, _ = next(loader.batches())
    for threshold in (0.2, 0.8):
        teacher = networks.load_teacher(teacher_file(tmp_path, gated, threshold=threshold), loader, "cpu")
        gated.threshold = threshold
        with torch.no_grad():
            torch.testing.assert_close(teacher(images), gated(images)[0], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------- thresholds of a budget


def test_the_thresholds_of_a_budget_are_loaded_with_the_network_they_were_chosen_for(tmp_path):
    for name in (BEST, CHECKPOINT):
        torch.save({"state_dict": small_net().state_dict(), "epoch": 4}, tmp_path / name)
    with pytest.raises(InputError, match=r"model_best\.pth\.tar .* no thresholds .*: run --test --budget 0\.7"):
        aig.load(tmp_path, budget=0.7)
    result = {"threshold": [0.2, 0.3, 0.9], "checkpoint": BEST, "epoch": 3}
    (tmp_path / TEST).write_text(json.dumps({"argmax@budget=0.7": result}))
    assert aig.load(tmp_path, budget=0.7).threshold == [0.2, 0.3, 0.9]
    assert aig.load(tmp_path).threshold == 0.5
    with pytest.raises(InputError, match=r"checkpoint\.pth\.tar .* no thresholds for this budget"):
        aig.load(tmp_path / CHECKPOINT, budget=0.7)
    (tmp_path / TEST).write_text(json.dumps({"argmax@budget=0.7": {**result, "epoch": 2}}))
    with pytest.raises(InputError, match="as it is now"):  # it has been trained further since
        aig.load(tmp_path, budget=0.7)
    for threshold in ([0.2, 0.3], "high", [0.1, 0.2, 1.5], None):
        (tmp_path / TEST).write_text(json.dumps({"argmax@budget=0.7": {**result, "threshold": threshold}}))
        with pytest.raises(InputError, match="are invalid"):
            aig.load(tmp_path, budget=0.7)
    (tmp_path / TEST).write_text("[")
    with pytest.raises(InputError, match="is damaged"):
        aig.load(tmp_path, budget=0.7)


def test_weights_of_any_type_have_a_digest():
    state = {"a": torch.ones(2, 3, dtype=torch.bfloat16), "b": torch.tensor(3), "c": torch.tensor([True])}
    found = networks.digest(state)
    assert networks.digest(dict(reversed(state.items()))) == found
    assert networks.digest({**state, "b": torch.tensor(4)}) != found
