"""An exported file computes what the masked network does, in ONNX Runtime and OpenVINO, and runs no closed branch."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from steps import unsettle_norms

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

import aig  # noqa: E402
from aig import export, images, runtime  # noqa: E402
from aig.inference import count_macs  # noqa: E402
from convnet_aig import BasicBlock, Bottleneck, FoldedGate, ResNet_cifar, ResNet_ImageNet  # noqa: E402

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parent.parent
RELEASED = ROOT / "results" / "model" / "aig20-cifar10-jpeg-floor"
NETWORKS = {  # how to build it, and the height and width of its images
    "cifar": (lambda: ResNet_cifar(BasicBlock, (2, 3, 2), 5), (16, 16)),
    "bottleneck": (lambda: ResNet_cifar(Bottleneck, (1, 2, 1), 4, [0.5, 0.5, 1, 0.5]), (12, 20)),
    "photo": (lambda: ResNet_ImageNet(BasicBlock, (2, 1, 1, 1), 7, [1, 0.5, 0.5, 0.5, 1]), (36, 36)),
    "grouped and wide": (
        lambda: ResNet_ImageNet(Bottleneck, (1, 2, 1, 1), 5, [0.5, 0.5, 0.5, 1, 0.5], groups=2, width_per_group=48),
        (33, 40),
    ),
}
FAR = 1 - 1e-13  # of P(open): no gate of these networks is so sure


def draw(n, size, seed=0):
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def trained(build, size):
    """A network as if after training, with the threshold of each gate at the median of P(open) over random images."""
    torch.manual_seed(0)
    model = build()
    unsettle_norms(model)
    for block in model.blocks():
        if block.gated:
            torch.nn.init.normal_(block.fc1.weight, 0, 4 / block.fc1.in_channels**0.5)
            torch.nn.init.normal_(block.fc2.weight, 0, 2)
    model.eval()
    for _ in range(2):  # what a gate sees depends on those before it
        _, _, scores = export.decisions(model, draw(64, size, seed=1))
        model.threshold = torch.sigmoid(scores.double().median(0).values).tolist()
    return model


@pytest.fixture(scope="session")
def network():
    """A network of NETWORKS by its name, built once, and the size of its images."""
    found = {}

    def get(kind):
        if kind not in found:
            found[kind] = trained(*NETWORKS[kind])
        return found[kind], NETWORKS[kind][1]

    return get


@pytest.fixture(scope="session")
def file_of(network, tmp_path_factory):
    """The exported file of a network of NETWORKS."""
    folder = tmp_path_factory.mktemp("exported")

    def get(kind, batch):
        path = folder / f"{kind}-{batch}.onnx"
        if not path.exists():
            model, size = network(kind)
            aig.export_onnx(model, path, batch, size)
        return path

    return get


def session_of(path, engine, **options):
    pytest.importorskip(engine)
    return aig.Session(path, engine, **options)


def clear_images(model, n, size, seed=0):
    """n random images about which no gate is undecided, with the network's logits (n, K) and gates (n, L)."""
    odds = torch.tensor([export.log_odds(threshold) for threshold in model.threshold])
    x = draw(n + 20, size, seed)
    logits, gates, scores = export.decisions(model, x)
    clear = ((scores - odds).abs() > export.CLOSE).all(1)
    assert clear.sum() >= n
    return (values[clear][:n] for values in (x, logits, gates))


def assert_same(model, session, x, logits, gates):
    found, decided = session(x.numpy())
    assert np.array_equal(decided, gates.numpy())
    np.testing.assert_allclose(found, logits.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("engine", runtime.ENGINES)
@pytest.mark.parametrize("batch", [1, "any"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_the_file_computes_what_the_network_does(kind, batch, engine, network, file_of):
    (model, size), session = network(kind), session_of(file_of(kind, batch), engine)
    opened = []
    for n in (1, 2, 5, 16):
        x, logits, gates = clear_images(model, n, size, seed=n)
        assert_same(model, session, x, logits, gates)
        opened.append(gates[:, [block.gated for block in model.blocks()]])
    rates = torch.cat(opened).mean(0)
    assert ((rates > 0.1) & (rates < 0.9)).all()  # else there would be nothing to tell


@pytest.mark.slow
@pytest.mark.parametrize("engine", runtime.ENGINES)
@pytest.mark.parametrize("batch", [1, "any"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_on_a_thousand_images_in_batches_of_1_to_64(kind, batch, engine, network, file_of):
    (model, size), session = network(kind), session_of(file_of(kind, batch), engine)
    x, logits, gates = clear_images(model, 1000, size, seed=7)
    start = 0
    for n in (*range(1, 30), 35, 40, 48, 56, 63, 64, 64, 64, 64, 67):
        part = slice(start, start + n)
        assert_same(model, session, x[part], logits[part], gates[part])
        start += n
    assert start == 1000


@pytest.mark.parametrize("engine", runtime.ENGINES)
@pytest.mark.parametrize("batch", [1, "any"])
@pytest.mark.parametrize("threshold", [1 - FAR, FAR], ids=["all open", "none open"])
def test_extreme_thresholds(threshold, batch, engine, network, tmp_path):
    model, size = network("cifar")
    usual, model.threshold = model.threshold, threshold
    try:
        aig.export_onnx(model, tmp_path / "model.onnx", batch, size)
        session = session_of(tmp_path / "model.onnx", engine)
        for n in (1, 3):
            x = draw(n, size)
            logits, gates, _ = export.decisions(model, x)
            assert (gates == (threshold < 0.5)).all()
            assert_same(model, session, x, logits, gates)
    finally:
        model.threshold = usual


def convolutions_run(path, x, tmp_path):
    """The names of the convolutions that ONNX Runtime's profiler saw, for one image x (1, 3, H, W)."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    _, gates = session.run(["logits", "gates"], {"images": x.numpy()})
    events = json.loads(Path(session.end_profiling()).read_text())
    names = [event["name"] for event in events if "Conv" in event.get("args", {}).get("op_name", "")]
    return names, gates[0]


def test_closed_branches_are_not_run(network, file_of, tmp_path):
    model, size = network("cifar")
    places = [name for name, module in model.named_modules() if isinstance(module, BasicBlock)]
    seen = set()
    for seed in range(6):
        names, gates = convolutions_run(file_of("cifar", 1), draw(1, size, seed), tmp_path)
        for place, z in zip(places, gates, strict=True):
            ran = [name for name in names if name.startswith(place) and "shortcut" not in name]  # perhaps with its ReLU
            assert len(ran) == 2 * z, (place, names)
        assert sum("shortcut" in name for name in names) == 2
        seen |= set(zip(places, gates, strict=True))
    assert len(seen) > 1.5 * len(places)  # most blocks were seen both open and closed


def nodes_of(path):
    graph = onnx.load(path).graph
    return [node.op_type for node in graph.node], graph


def test_a_block_is_one_if_and_its_threshold_is_a_constant_of_its_own(network, file_of):
    model, _ = network("bottleneck")
    kinds, graph = nodes_of(file_of("bottleneck", 1))
    assert kinds.count("If") == model.num_gates == 3
    assert kinds.count("Conv") == 1 + 3  # stem and the block without gate, whose shortcut is the identity
    limits = [value for value in graph.initializer if value.name.endswith(".gate.threshold")]
    found = [onnx.numpy_helper.to_array(value).item() for value in limits]
    assert found == pytest.approx([export.log_odds(threshold) for threshold in model.threshold])
    kinds, _ = nodes_of(file_of("bottleneck", "any"))
    assert "If" not in kinds
    assert kinds.count("NonZero") == 3


@pytest.mark.parametrize("batch", [1, "any"])
def test_mode_all_exports_the_dense_network(batch, network, tmp_path):
    model, size = network("cifar")
    model.gate_mode = "all"
    try:
        aig.export_onnx(model, tmp_path / "dense.onnx", batch, size)
        x = draw(3, size)
        assert_same(model, aig.Session(tmp_path / "dense.onnx"), x, *export.decisions(model, x)[:2])
    finally:
        model.gate_mode = "argmax"
    kinds, _ = nodes_of(tmp_path / "dense.onnx")
    assert not {"If", "NonZero", "Greater"} & set(kinds)


def test_a_network_without_gates(tmp_path):
    model = trained(lambda: ResNet_cifar(BasicBlock, (1, 1, 1), 3, [1, 1, 1]), (8, 8))
    aig.export_onnx(model, tmp_path / "plain.onnx", "any", 8)
    x = draw(2, (8, 8))
    assert_same(model, aig.Session(tmp_path / "plain.onnx"), x, *export.decisions(model, x)[:2])


def test_the_file_says_what_it_holds(network, file_of, tmp_path):
    model, size = network("bottleneck")
    said = aig.Session(file_of("bottleneck", 1)).metadata
    cost = count_macs(model, size)
    assert said["macs"] == {
        "dense": cost.dense, "stem": cost.stem, "shortcuts": list(cost.shortcuts), "branches": list(cost.branches),
        "gates": list(cost.gates), "head": cost.head,
    }
    assert said["threshold"] == model.threshold
    assert said["gated"] == [True, True, False, True]
    assert (said["gate_mode"], said["image_size"], said["batch"]) == ("argmax", [12, 20], 1)
    assert (said["classes"], said["preprocess"], said["licence"]) == (["0", "1", "2", "3"], None, "")
    assert said["program"] == f"convnet-aig {aig.__version__}"
    released = aig.load(RELEASED)
    aig.export_onnx(released, tmp_path / "model.onnx", licence="MIT")
    said = aig.Session(tmp_path / "model.onnx").metadata
    assert (said["classes"], said["licence"]) == (released.classes, "MIT")
    assert said["preprocess"] == {
        "size": 32, "short_side": 32, "mean": released.preprocess.mean, "std": released.preprocess.std,
    }
    assert onnx.load(tmp_path / "model.onnx").ir_version == 8


def test_the_network_stays_as_it_is(tmp_path):
    model = aig.load(RELEASED).train().double()
    model.threshold = [0.3] * 9
    before = {name: value.clone() for name, value in model.state_dict().items()}
    aig.export_onnx(model, tmp_path / "model.onnx")
    assert model.training
    assert (model.threshold, model.gate_mode) == ([0.3] * 9, "argmax")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("uint8", [False, True])
@pytest.mark.parametrize("engine", runtime.ENGINES)
def test_the_released_network_decides_as_in_torch(engine, uint8, tmp_path):
    model = aig.load(RELEASED)
    aig.export_onnx(model, tmp_path / "model.onnx", uint8=uint8)
    session = session_of(tmp_path / "model.onnx", engine)
    for path in sorted((ROOT / "docs" / "images").glob("*.jpg")):
        picture = Image.open(path)
        logits, gates, _ = export.decisions(model, model.preprocess(picture)[None])
        found, decided = session(session.preprocess(picture)[None])
        assert np.array_equal(decided, gates.numpy())
        np.testing.assert_allclose(found, logits.numpy(), rtol=0, atol=1e-4)
        assert session.classes[found.argmax()] == path.stem


# ---------------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize("engine", runtime.ENGINES)
@pytest.mark.parametrize(("size", "photographs"), [(32, False), (48, True)])
def test_pixels_are_resized_and_cropped_as_pillow_does(size, photographs, engine):
    preprocess = images.Preprocess(size, (0.48, 0.45, 0.4), (0.2, 0.23, 0.25), photographs)
    graph = export.Graph("pixels")
    export.from_pixels(graph, "pixels", preprocess)
    infos = [
        onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.UINT8, ["N", "H", "W", 3]),
        onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["N", 3, size, size]),
    ]
    main = onnx.helper.make_graph(graph.nodes, "pixels", infos[:1], infos[1:], graph.constants)
    opset = [onnx.helper.make_opsetid("", export.OPSET)]
    content = onnx.helper.make_model(main, opset_imports=opset, ir_version=export.IR).SerializeToString()
    if engine == "onnxruntime":
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        run = lambda pixels: session.run(None, {"pixels": pixels})[0]  # noqa: E731
    else:
        core = pytest.importorskip("openvino").Core()
        compiled = core.compile_model(core.read_model(content), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        run = lambda pixels: compiled([pixels])[0]  # noqa: E731
    random = np.random.default_rng(0)
    for height, width in ((32, 32), (48, 48), (67, 90), (100, 301), (20, 25), (500, 375), (1, 7)):
        pixels = random.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
        wanted = torch.stack([preprocess(Image.fromarray(picture)) for picture in pixels])
        levels = images.Normaliser(preprocess.mean, preprocess.std).std.numpy()  # a grey level is 1 / this
        apart = np.abs(run(pixels) - wanted.numpy()) * levels
        assert apart.max() < 2.01
        assert (apart > 0.01).mean() < 0.03
        if min(height, width) == preprocess.short_side:
            assert apart.max() < 1e-4


# ---------------------------------------------------------------------------------------------- errors


@pytest.fixture
def small():
    model = ResNet_cifar(BasicBlock, (1, 1, 1), 3)
    for block in model.blocks():
        torch.nn.init.normal_(block.fc2.weight, 0, 2)
    return model.eval()


def refused(model, folder, match, **options):
    """Asserts that an export ends with this ValueError, and leaves nothing behind."""
    options = {"size": 8, **options}
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=match) as error:
        aig.export_onnx(model, options.pop("path", folder / "model.onnx"), **options)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_what_cannot_be_exported(small, tmp_path):
    refused(small, tmp_path, 'batch 2: must be 1 or "any"', batch=2)
    refused(small, tmp_path, "size .0, 8.: must be a number of pixels, or height and width", size=(0, 8))
    refused(small, tmp_path, "uint8 needs a network with `preprocess`", uint8=True)
    refused(small, tmp_path, "no folder .*nowhere", path=tmp_path / "nowhere" / "model.onnx")
    refused(small, tmp_path, "it is a folder", path=tmp_path)
    small.threshold = 1
    refused(small, tmp_path, r"threshold 1: must be a number in \(0, 1\)")
    for mode in ("sample", "expected"):
        small.gate_mode = mode
        refused(small, tmp_path, f"gate mode '{mode}' cannot be exported, only 'argmax'")


def test_a_file_that_is_there_is_replaced_only_on_request(small, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"precious")
    refused(small, tmp_path, "model.onnx is there already")
    aig.export_onnx(small, path, size=8, overwrite=True)
    assert aig.Session(path).classes == ["0", "1", "2"]
    assert [found.name for found in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("broken", ["logits", "gates"])
def test_a_file_that_computes_something_else_is_not_written(broken, small, tmp_path, monkeypatch):
    def spoiled(self, given):
        logits, gates = call(self, given)
        return (logits + 0.01, gates) if broken == "logits" else (logits, 1 - gates)

    call = runtime.Session.__call__
    monkeypatch.setattr(runtime.Session, "__call__", spoiled)
    refused(small, tmp_path, "the file would not compute what the network does: .* nothing is written")


def test_weights_that_are_not_finite_are_not_written(small, tmp_path):
    torch.nn.init.constant_(small.linear.bias, torch.nan)
    refused(small, tmp_path, "logits differ by nan")


def test_gates_that_are_always_at_their_threshold_cannot_be_checked(small, tmp_path):
    for block in small.blocks():
        torch.nn.init.zeros_(block.fc2.weight)
        torch.nn.init.zeros_(block.fc2.bias)
    refused(small, tmp_path, "cannot be checked: .* within 0.0001 of its threshold.*: change the threshold a little")
    small.threshold = 0.49
    aig.export_onnx(small, tmp_path / "model.onnx", size=8)


def test_gates_that_are_surer_than_any_threshold(small, tmp_path):
    for block, bias in zip(small.blocks(), (-100.0, 100.0, 40.0), strict=True):
        block.fc2.bias.data = torch.tensor([0, bias])
    aig.export_onnx(small, tmp_path / "model.onnx", size=8)
    assert aig.Session(tmp_path / "model.onnx")(draw(1, (8, 8)).numpy())[1].tolist() == [[0, 1, 1]]


def test_images_near_a_threshold_are_drawn_anew(small, tmp_path, monkeypatch):
    score = export.decisions(small, draw(export.CHECKED, (8, 8)))[2][0, 0]  # of the first image to be drawn
    small.threshold = [torch.sigmoid(score.double()).item(), 0.5, 0.5]
    drawn = []
    monkeypatch.setattr(export, "draw", lambda *args: drawn.append(draw(export.CHECKED, (8, 8), len(drawn) % 2))
                        or (drawn[-1].numpy(), drawn[-1]))
    aig.export_onnx(small, tmp_path / "model.onnx", size=8)
    assert len(drawn) > 5  # once for the medians, once for each of four patterns


class OtherGate(FoldedGate):
    """Says nothing of its layers."""


class OpenGate(FoldedGate):
    def linear_layers(self):
        return super().linear_layers()


def test_another_gate_is_named_unless_it_gives_its_layers(small, tmp_path):
    first = next(small.blocks())
    first.fold_gate = lambda: OtherGate(first.fc1, first.fc1bn, first.fc2)
    refused(small, tmp_path, "a OtherGate cannot be exported: give it linear_layers")
    first.fold_gate = lambda: OpenGate(first.fc1, first.fc1bn, first.fc2)
    aig.export_onnx(small, tmp_path / "model.onnx", size=8)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named(package, small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package} is not installed.*pip install {package}"):
        aig.export_onnx(small, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- the command


def test_the_command_writes_what_was_asked_for(run, tmp_path):
    path = tmp_path / "model.onnx"
    status, out, err = run(export.main, "--resume", RELEASED, "--out", path, "--threshold", 0.7, "--licence", "MIT")
    assert (status, err) == (0, "")
    assert out == f"{path}: {path.stat().st_size:,} bytes; computes what the network does\n"
    said = aig.Session(path).metadata
    assert (said["threshold"], said["licence"], said["batch"]) == ([0.7] * 9, "MIT", 1)
    more = ("--overwrite", "--batch", "any", "--uint8", "--dense", "--size", 40)
    assert run(export.main, "--resume", RELEASED, "--out", path, *more)[0] == 0
    said = aig.Session(path).metadata
    assert (said["gate_mode"], said["image_size"], said["batch"], said["uint8"]) == ("all", [40, 40], "any", True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resume", "none"], "no checkpoint at none"),
        (["--resume", RELEASED, "--budget", "0.3"], "no thresholds for this budget"),
        (["--resume", RELEASED, "--budget", "0.6", "--dense"], "not allowed with argument --budget"),
        (["--resume", RELEASED, "--batch", "2"], "invalid choice: '2'"),
        (["--resume", RELEASED, "--size", "4"], "4 must be at least 8"),
        (["--resume", RELEASED, "--out", "x" * 300], "File name too long"),
        (["--resume", RELEASED, "--out", ""], "it is a folder"),
        ([], "required: --resume"),
    ],
)
def test_an_error_of_the_command_is_one_line(flags, message, run, tmp_path):
    status, out, err = run(export.main, "--out", tmp_path / "model.onnx", *flags)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not list(tmp_path.iterdir())


def test_the_command_does_not_overwrite_by_itself(run, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"precious")
    status, _, err = run(export.main, "--resume", RELEASED, "--out", path)
    assert (status, err.count("\n"), path.read_bytes()) == (2, 1, b"precious")
    assert "is there already" in err
