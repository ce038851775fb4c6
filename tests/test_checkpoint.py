"""A network is rebuilt from what a checkpoint holds: block type, widths, stages, gates and classes."""

import math
import zipfile

import pytest
import torch
from PIL import Image
from steps import small_net
from torch.utils.flop_counter import FlopCounterMode

import aig
from aig import checkpoint
from aig.checkpoint import BEST, CHECKPOINT
from aig.console import InputError
from aig.data import DATASETS, IMAGENET_STATISTICS
from convnet_aig import BasicBlock, Bottleneck, ResNet_cifar, ResNet_ImageNet

MIXED = [1, 0.5, 0.5, 1, 0.5]
NETWORKS = {
    "basic blocks": lambda: ResNet_cifar(BasicBlock, (1, 2, 3), 7),
    "basic blocks, some without a gate": lambda: ResNet_cifar(BasicBlock, (2, 1, 2), 7, MIXED),
    "bottlenecks for small images": lambda: ResNet_cifar(Bottleneck, (1, 1, 2), 3, [0.5, 1, 0.5, 1]),
    "basic blocks for photographs": lambda: ResNet_ImageNet(BasicBlock, (1, 1, 1, 1), 5),
    "bottlenecks for photographs": lambda: ResNet_ImageNet(Bottleneck, (1, 1, 1, 1), 5, [1, 1, 0.5, 0.5]),
    "no gates at all": lambda: ResNet_cifar(BasicBlock, (1, 1, 1), 4, [1, 1, 1]),
    "groups": lambda: ResNet_ImageNet(Bottleneck, (1, 1, 1, 1), 5, [1, 0.5, 0.5, 0.5], groups=2, width_per_group=4),
    "a wide net": lambda: ResNet_ImageNet(Bottleneck, (1, 1, 1, 1), 5, None, width_per_group=96),
    "many blocks in a stage": lambda: ResNet_cifar(BasicBlock, (1, 12, 1), 4),
}


def made(kind):
    """A network of its kind that has seen images, so that its statistics are its own."""
    torch.manual_seed(0)
    model = NETWORKS[kind]().train()
    with torch.no_grad():
        for block in model.blocks():
            if block.gated:
                torch.nn.init.normal_(block.fc2.weight, 0, 2)
                torch.nn.init.zeros_(block.fc2.bias)
        model(torch.randn(8, 3, 32, 32))
    return model.eval()


def saved(path, model, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": model.state_dict(), **more}, path)
    return path


def assert_equal_networks(model, net):
    x = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert not net.training
    with torch.no_grad():
        (logits, gates), (net_logits, net_gates) = model(x), net(x)
    assert torch.equal(net_logits, logits)
    assert torch.equal(torch.stack(net_gates), torch.stack(gates))
    assert [block.gated for block in net.blocks()] == [block.gated for block in model.blocks()]
    assert net.stages == model.stages


# ---------------------------------------------------------------------------------------------- aig.load


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_network_is_rebuilt_from_its_weights_alone(kind, tmp_path):
    model = made(kind)
    net = aig.load(saved(tmp_path / "file", model))
    assert_equal_networks(model, net)
    assert net.classes == [str(index) for index in range(model.linear.out_features)]
    assert not any(value.is_meta for value in net.state_dict().values())


def test_a_file_of_the_original_loads(tmp_path):
    model = made("basic blocks")
    state = {f"module.{key}": value for key, value in model.state_dict().items() if "num_batches" not in key}
    content = {"epoch": 3, "state_dict": state, "best_prec1": 12.5}
    torch.save(content, tmp_path / "file", _use_new_zipfile_serialization=False)
    net = aig.load(tmp_path / "file")
    assert_equal_networks(model, net)
    mean, std = DATASETS["cifar10"].statistics
    assert (net.preprocess.size, net.preprocess.mean, net.preprocess.std) == (32, mean, std)
    assert all(value == 0 for key, value in net.state_dict().items() if "num_batches" in key)


def test_of_a_run_folder_the_best_model_is_loaded_and_else_the_last(tmp_path):
    best, last = made("basic blocks"), made("no gates at all")
    saved(tmp_path / "run" / CHECKPOINT, last)
    assert_equal_networks(last, aig.load(tmp_path / "run"))
    saved(tmp_path / "run" / BEST, best)
    assert_equal_networks(best, aig.load(tmp_path / "run"))
    assert_equal_networks(last, aig.load(str(tmp_path / "run" / CHECKPOINT)))


def test_what_a_checkpoint_records_is_taken_over(tmp_path):
    model = made("basic blocks, some without a gate")
    args = {"classes": [*"abcdefg"], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "dataset": "digits"}
    args |= {"block_rates": [1.0, 0.5, 0.5, 1.0, 0.5], "threshold": 0.7}
    net = aig.load(saved(tmp_path / "file", model, args=args))
    assert net.classes == [*"abcdefg"]
    assert (net.preprocess.size, net.preprocess.mean, net.preprocess.std) == (8, args["mean"], args["std"])
    assert (net.target_rates, net.threshold) == (args["block_rates"], 0.7)
    other = aig.load(saved(tmp_path / "other", model, args={**args, "block_rates": [0.5] * 5, "threshold": 7}))
    assert (other.target_rates, other.threshold) == (None, 0.5)  # not those of this network


@pytest.mark.parametrize(("kind", "side"), [("basic blocks", 32), ("bottlenecks for photographs", 224)])
@pytest.mark.parametrize("size", [(300, 260), (20, 33)])
def test_its_preprocessing_takes_an_image_of_any_size(kind, side, size, tmp_path):
    net = aig.load(saved(tmp_path / "file", made(kind)))
    x = net.preprocess(Image.new("RGB", size, (124, 116, 104)))
    assert x.shape == (3, side, side)
    assert x.abs().max() < 0.3 + 4 * (side == 224 and min(size) < 224)  # about the mean colour
    assert net.preprocess.photographs == (side == 224)
    if side == 224:
        assert (net.preprocess.mean, net.preprocess.std) == IMAGENET_STATISTICS
    logits, _ = net(x[None])
    assert logits.shape == (1, len(net.classes))


def test_the_image_size_of_a_run_on_photographs_is_kept(tmp_path):
    path = saved(tmp_path / "file", made("groups"), args={"image_size": 96})
    assert aig.load(path).preprocess(Image.new("RGB", (100, 200))).shape == (3, 96, 96)


def spoilt_files():
    state = small_net().state_dict()
    yield {}, "no state_dict"
    yield {"state_dict": {}}, "no state_dict"
    yield {"state_dict": {"weight": torch.ones(3)}}, "no ConvNet-AIG"
    yield {"state_dict": {k: v for k, v in state.items() if not k.startswith("layer2.0")}}, "no ConvNet-AIG"
    yield {"state_dict": {k: v for k, v in state.items() if not k.startswith("layer3")}}, "no ConvNet-AIG"
    yield {"state_dict": {k: v for k, v in state.items() if k != "linear.weight"}}, "no ConvNet-AIG"
    yield {"state_dict": {k: v for k, v in state.items() if k != "layer1.0.fc2.bias"}}, "1 missing"
    for stage in (7, 10**9, "9" * 5000):  # which must not take long either
        yield {"state_dict": {**state, f"layer{stage}.0.conv1.weight": torch.ones(1)}}, "no ConvNet-AIG"
    yield {"state_dict": {**state, "layer1.0.more": torch.ones(1)}}, "1 left over"
    yield {"state_dict": {**state, "linear.weight": torch.zeros(4, 5)}}, "1 of another shape or type"
    yield {"state_dict": {**state, "conv1.weight": state["conv1.weight"].long()}}, "1 of another shape or type"
    yield {"state_dict": {**state, "conv1.weight": torch.tensor(1.0)}}, "no ConvNet-AIG"
    yield {"state_dict": {**state, "layer1.7.conv1.weight": torch.ones(1)}}, "file"
    yield {"state_dict": state, "args": {"classes": ["one"]}}, "names 1 classes, but its network has 4"
    yield {"state_dict": state, "args": {"mean": [1, 2]}}, "args are malformed"
    yield {"state_dict": state, "args": {"mean": [0, 0, 0], "std": [1, 1, 0]}}, "args are malformed"
    yield {"state_dict": state, "args": {"mean": [0, 0, math.nan], "std": [1, 1, 1]}}, "args are malformed"
    yield {"state_dict": state, "args": {"mean": [0, 0, 0], "std": [1, 1, math.inf]}}, "args are malformed"
    for name in ("block_rates", "lr_milestones"):
        for values in ([math.nan], ["a"], 7):
            yield {"state_dict": state, "args": {name: values}}, "args are malformed"
    yield {"state_dict": state, "epoch": True}, "its epoch is a bool"
    yield {"state_dict": state, "seconds": "1"}, "its seconds is a str"
    for tensor in (torch.zeros(4, dtype=torch.cfloat), torch.zeros(4).to_sparse(), torch.zeros(4, device="meta")):
        yield {"state_dict": {**state, "linear.bias": tensor}}, "no state_dict of tensors"
    photographs = ResNet_ImageNet(BasicBlock, (1, 1, 1, 1), 5).state_dict()
    for size in (7, 4097, 96.0, True):
        yield {"state_dict": photographs, "args": {"image_size": size}}, "image_size is malformed"


def test_what_is_no_convnet_aig_is_an_input_error(tmp_path):
    for content, message in spoilt_files():
        torch.save(content, tmp_path / "file")
        with pytest.raises(InputError, match=message) as error:
            aig.load(tmp_path / "file")
        assert str(tmp_path / "file") in str(error.value)


def damaged_files(path):
    """The bytes of archives that are not as `torch.save` wrote them."""
    whole = path.read_bytes()
    middle = whole.index(bytes(small_net().state_dict()["linear.weight"].numpy().data))
    yield whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for compression, attributes in ((zipfile.ZIP_DEFLATED, 0), (zipfile.ZIP_STORED, checkpoint.MSDOS_FOLDER)):
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(path.with_name("other"), "w") as new:
            for name in old.namelist():
                entry = zipfile.ZipInfo(name)
                entry.compress_type = compression
                entry.external_attr = attributes if "/data/" in name else 0  # the weights
                new.writestr(entry, old.read(name))
        yield path.with_name("other").read_bytes()


def test_an_archive_that_is_not_as_it_was_written_is_refused(tmp_path):
    """`torch.load` itself would take each of them, and two of them with other weights."""
    path = saved(tmp_path / "file", small_net())
    for content in damaged_files(path):
        (tmp_path / "damaged").write_bytes(content)
        with pytest.raises(InputError, match="damaged or a foreign file"):
            checkpoint.load_checkpoint(tmp_path / "damaged")


class Code:
    """What runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w')",)


@pytest.mark.parametrize("new_format", [True, False])
def test_code_in_a_file_is_never_run(tmp_path, new_format):
    content = {"state_dict": small_net().state_dict(), "more": Code(tmp_path / "executed")}
    torch.save(content, tmp_path / "file", _use_new_zipfile_serialization=new_format)
    with pytest.raises(InputError, match="damaged or a foreign file"):
        checkpoint.load_checkpoint(tmp_path / "file")
    assert not (tmp_path / "executed").exists()


def test_a_file_saved_on_a_gpu_is_read_onto_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    path = saved(tmp_path / "file", small_net())
    assert {value.device.type for value in checkpoint.load_checkpoint(path)["state_dict"].values()} == {"cpu"}


@pytest.mark.parametrize("threshold", [0.0, 1.0, math.nan, "0.5", 1])
def test_a_threshold_that_is_none_is_left_at_one_half(tmp_path, threshold):
    assert aig.load(saved(tmp_path / "file", small_net(), args={"threshold": threshold})).threshold == 0.5


def test_gates_of_blocks_that_have_none_here_are_left_out():
    gated, ungated = small_net(), small_net(rates=[0.5, 1, 1])
    with torch.no_grad():
        gated.linear.bias.fill_(3)
    checkpoint.load_weights(ungated, gated.state_dict(), "FILE")
    assert all(torch.equal(value, gated.state_dict()[name]) for name, value in ungated.state_dict().items())
    with pytest.raises(InputError, match=r"FILE does not fit this network: keys .* missing"):
        checkpoint.load_weights(gated, ungated.state_dict(), "FILE")


def test_a_plain_resnet_of_torchvision_is_no_convnet_aig(tmp_path):
    from torchvision.models import resnet18

    torch.save({"state_dict": resnet18().state_dict()}, tmp_path / "file")
    with pytest.raises(InputError, match="no ConvNet-AIG"):
        aig.load(tmp_path / "file")


def test_where_there_is_no_file_it_says_so(tmp_path):
    with pytest.raises(InputError, match="no checkpoint at"):
        aig.load(tmp_path / "file")
    with pytest.raises(InputError, match=f"no {BEST} or {CHECKPOINT} or .* in .*give a run folder or a checkpoint"):
        aig.load(tmp_path)
    (tmp_path / "file").write_bytes(b"no checkpoint")
    with pytest.raises(InputError, match="damaged or a foreign file"):
        aig.load(tmp_path / "file")


# ---------------------------------------------------------------------------------------------- its use


@pytest.mark.parametrize("kind", ["basic blocks", "groups"])
def test_a_loaded_network_is_accelerated_and_counted(kind, tmp_path):
    net = aig.load(saved(tmp_path / "file", made(kind))).double()
    fast, x = aig.accelerate(net), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        logits, gates = fast(x)
    with torch.no_grad():
        torch.testing.assert_close(logits, net(x)[0])
    cost = aig.count_macs(net, 32).executed(torch.stack(gates, dim=1))
    assert counter.get_total_flops() == 2 * cost.sum().item()


def test_prefixes_of_wrappers_are_taken_off():
    state = {"conv1.weight": torch.ones(1), "module.x": torch.ones(1)}
    assert checkpoint.without_prefixes(state) == state  # not all of them have it
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        assert checkpoint.without_prefixes({prefix + "a": 1, prefix + "b": 2}) == {"a": 1, "b": 2}
